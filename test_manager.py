"""Panguard Manager's tests: behaviour through the public doors, one file for manager.py."""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import configparser
import contextlib
import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import importlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import uuid
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import bottle
import jsonschema
import pytest
import waitress
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webtest import TestApp

import manager
from manager import Config, Manager, ManualClock, Server, StartError, Status, Store, main

# Helpers ##############################################################################################


AGENT = {"hostname": "web-1", "os": "linux", "version": "1.2.0"}
LIMIT_S = 60.0  # of real time: how long a test waits before it fails; no test needs it


class Client:
    """The HTTP API of a server without a socket between; the admin's token unless another is given."""

    def __init__(self, server: Server, address: str = "198.51.100.7") -> None:
        self.server = server
        self.app = TestApp(manager.create_app(server.manager, (server.token,)),
                           extra_environ={"REMOTE_ADDR": address})

    def call(self, method: str, path: str, body: Any = None, *, token: str | None = "admin",
             status: int = 200, headers: dict[str, str] | None = None) -> Any:
        """The answer, whose status must be `status`. `body` is sent as JSON, or as it is if bytes."""
        headers = dict(headers or {})
        if token is not None:
            headers["Authorization"] = f"Bearer {self.server.token if token == 'admin' else token}"
        raw = b""
        if body is not None:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        answer = self.app.request(path, method=method, body=raw, headers=headers, expect_errors=True)
        assert answer.status_int == status, f"{method} {path}: {answer.status} {answer.text}"
        return answer

    def get(self, path: str, **how: Any) -> Any:
        """The `data` of a GET."""
        return self.call("GET", path, **how).json["data"]

    def post(self, path: str, body: Any = None, **how: Any) -> Any:
        """The `data` of a POST."""
        return self.call("POST", path, body, **how).json["data"]

    def register(self, **fields: Any) -> Any:
        """The `data` of a registration: seed fields and token."""
        return self.post("/api/agents/register", {**AGENT, **fields}, status=201)

    def beat(self, agent: Any, **fields: Any) -> Any:
        """The `data` of a heartbeat sent with the agent's own token."""
        return self.post(f"/api/agents/{agent['id']}/heartbeat", fields, token=agent["token"])

    def refusal(self, method: str, path: str, body: Any = None, *, status: int, **how: Any) -> str:
        """The `error` text of a refused call, in its envelope."""
        answer = self.call(method, path, body, status=status, **how).json
        assert answer["ok"] is False and set(answer) == {"ok", "error"}, answer
        return str(answer["error"])

    def get_openapi(self) -> Any:
        """The OpenAPI document."""
        return self.call("GET", "/openapi.json", token=None).json

    def journal(self, *types: str) -> list[Any]:
        """The journal's entries: of these types, or of all but the manager's own start and stop."""
        return [entry for entry in self.get("/api/events?limit=200")
                if (entry["type"] in types if types else not entry["type"].startswith("manager_"))]


@pytest.fixture
def server() -> Iterator[Server]:
    """A manager in a temporary folder, on a free port, whose clock the test moves."""
    with Server(port=0, clock=ManualClock()) as running:
        yield running


@pytest.fixture
def clock(server: Server) -> ManualClock:
    assert isinstance(server.clock, ManualClock)
    return server.clock


@pytest.fixture
def api(server: Server) -> Client:
    return Client(server)



START_MS = ManualClock().now().wall_ms
START_ISO = manager.iso(START_MS)
RULE = {"type": "block_ip", "config": {"ip": "203.0.113.9"}}
THREAT = {"type": "brute_force", "severity": "high", "details": {"sourceIp": "203.0.113.9"}}


def until(true: Callable[[], Any], what: str, deadline_s: float = LIMIT_S) -> Any:
    """What `true()` gives once it is true; fails after the deadline."""
    end = time.monotonic() + deadline_s
    while not (found := true()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        select.select([], [], [], 0.002)
    return found


def until_queued(server: Server, count: int) -> None:
    """Wait until so many writers hold the write lock or wait for it."""
    until(lambda: len(server.manager.store.write_lock) == count, f"{count} writers in the queue")


def ask(port: int, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
    """Status and JSON of one request over a socket."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body), {
            "Authorization": f"Bearer {token}", "Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def open_stream(url: str, token: str, *, after: int | None = None) -> Any:
    """The answer of an event stream: entries after a number, or from now on. entries_of() reads it."""
    resume = {} if after is None else {"Last-Event-ID": str(after)}
    return urllib.request.urlopen(urllib.request.Request(
        url + STREAM, headers={"Authorization": f"Bearer {token}", **resume}), timeout=LIMIT_S)


def entries_of(stream: Iterable[bytes]) -> Iterator[Any]:
    """The entries of a stream until it ends, without one that was cut off."""
    for line in stream:
        if line.startswith(b"data: ") and line.endswith(b"}\n"):
            entry = json.loads(line[6:])
            if entry["type"] != "connected":
                yield entry


class Running(contextlib.AbstractContextManager["Running"]):
    """`python manager.py` on a folder, as an operator runs it; killed when the test is over."""

    def __init__(self, folder: Path, *options: str, token: str = "", **environ: str) -> None:
        self.log = folder.parent / f"{folder.name}.log"
        clean = {name: text for name, text in os.environ.items() if not re.match("MANAGER_|CORS_", name)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, manager.__file__, "--port", "0", "--data-dir", str(folder), *options],
                env={**clean, **environ}, stdout=subprocess.PIPE, stderr=log, text=True)
        self.lines: list[str] = []
        hung = threading.Timer(LIMIT_S, self.process.kill)
        hung.start()
        while not (self.lines and "curl " in self.lines[-1]):
            self.lines.append(self.process.stdout.readline().rstrip())
            assert self.lines[-1], f"the start ended after {self.lines}: {self.log.read_text()}"
        hung.cancel()
        self.url = re.search(r"https?://\S+", self.lines[0])[0]
        self.port = port_of(self.url)
        self.token = (token or environ.get("MANAGER_AUTH_TOKEN", "").partition(",")[0]
                      or (folder / "token").read_text().strip())

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
        """Status and JSON of a request, the admin's unless a token is given."""
        return ask(self.port, method, path, body, token or self.token)

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit status after a signal; fails if it does not come within LIMIT_S."""
        self.process.send_signal(number)
        return self.process.wait(timeout=LIMIT_S)


def interruptible() -> None:
    """For Popen's preexec_fn: SIGINT ends the process as at a terminal, wherever the tests run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def interrupted(*words: Any, **environ: str) -> Iterator[Any]:
    """A command at a terminal. The end of the block sends Ctrl-C; the exit status must be 0."""
    with subprocess.Popen([sys.executable, manager.__file__, *words], stdout=subprocess.PIPE, text=True,
                          preexec_fn=interruptible, env={**os.environ, **environ}) as process:
        try:
            yield process
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=LIMIT_S) == 0
        finally:
            process.kill()


def at_once(server: Server, calls: list[tuple[str, str, Any, str]]) -> list[tuple[int, Any]]:
    """The answers to calls that start together, each on a socket of its own."""
    start = threading.Barrier(len(calls))

    def one(call: tuple[str, str, Any, str]) -> tuple[int, Any]:
        start.wait()
        return ask(port_of(server.url), *call)
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def journal_of(fleet: Manager) -> list[tuple[str, int]]:
    """Type and instant (ms since the clock's start) of all entries but registrations and managers' starts."""
    return [(entry.type, entry.at_ms - START_MS) for entry in fleet.journal()
            if entry.type not in ("agent_registered", "agent_reregistered", "manager_started",
                                  "manager_stopped")]


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[tuple[Manager, ManualClock]]:
    """A manager at the default settings without a server: nothing happens between two calls."""
    clock, store = ManualClock(), manager.Store(tmp_path)
    yield Manager(Config(data_dir=tmp_path), clock, store), clock
    store.close()


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """main() in this process: its exit status and what it wrote to standard error."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def run(*argv: Any) -> tuple[int, str]:
        capsys.readouterr()
        return main([str(each) for each in argv]), capsys.readouterr().err
    yield run
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for number, handler in signals.items():
        signal.signal(number, handler)


BODIES: dict[str, Any] = {
    "POST /api/agents/register": AGENT,
    "POST /api/agents/:id/heartbeat": {},
    "PATCH /api/agents/:id": {"tags": ["a"]},
    "POST /api/enroll-tokens": {},
    "PATCH /api/threats/:id": {"state": "acknowledged"},
    "POST /api/agents/bulk": {"filter": {"tag": ["kept"]}, "addTags": ["b"], "dryRun": True},
    "POST /api/agents/:id/events": {"events": [THREAT]},
    "POST /api/policy": {"name": "p", "rules": [RULE]},
}


EXAMPLES = settings(deadline=None, database=None, derandomize=True,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


ROUTES = {f"{each.method} {each.path}": each for each in manager.ENDPOINTS}


WITH_QUERY = [name for name, each in ROUTES.items() if each.query]


WITH_BODY = [name for name, each in ROUTES.items() if each.body is not None]


# 1  Settings ##########################################################################################


INT = "a whole number from 1 to "
TOKENS = "visible ASCII characters without a comma"
LONG, LONGER = "sixteen-letters-", "seventeen-letters"  # LONG is the shortest token that an operator may set
# name, option, variable, default, good (text and value), bad (texts), the rule that a refusal states
SETTINGS: list[tuple[str, str | None, str, Any, list[tuple[str, Any]], list[str], str]] = [
    ("host", "--host", "MANAGER_HOST", "127.0.0.1", [("::1", "::1"), ("node-1.example", "node-1.example")],
     ["a b", "x" * 256, "host/8"], "a host name or an address"),
    ("port", "--port", "MANAGER_PORT", 8443, [("0", 0), ("65535", 65535)],
     ["65536", "-1", "80a", "1.0", " 80", "८०"], "a whole number from 0 to 65535"),
    ("data_dir", "--data-dir", "MANAGER_DATA_DIR", Path("~/.panguard-manager").expanduser(),
     [("/srv/x y", Path("/srv/x y")), ("~/z", Path.home() / "z")], ["~nobody-of-that-name/z", "a\0b"],
     "the path of a folder"),
    ("auth_token", "--auth-token", "MANAGER_AUTH_TOKEN", (),
     [(LONG, (LONG,)), (f"{LONG}, {LONGER}", (LONG, LONGER))],
     ["secret 1", "a,b,secret", "secret,", "sec\nret", "x" * 256, "sécret"], TOKENS),
    ("auth_token_file", "--auth-token-file", "MANAGER_AUTH_TOKEN_FILE", None, [], ["a\0b"],
     "the path of a file"),
    ("enroll_token", None, "MANAGER_ENROLL_TOKEN", None, [(LONG, LONG)], ["secret,2", "secret 2"], TOKENS),
    ("viewer_token", None, "MANAGER_VIEWER_TOKEN", None, [(LONG, LONG)], ["secret,2", "secret 2"], TOKENS),
    ("heartbeat_timeout_ms", None, "MANAGER_HEARTBEAT_TIMEOUT_MS", 60_000, [("1", 1), ("1000", 1000)],
     ["0", "-5", "1e3", "60s", "9" * 16], INT),
    ("heartbeat_grace_ms", None, "MANAGER_HEARTBEAT_GRACE_MS", 6_000, [("0", 0), ("5", 5)], ["-1", "x"],
     "a whole number from 0 to "),
    ("offline_timeout_ms", None, "MANAGER_OFFLINE_TIMEOUT_MS", 300_000, [("66001", 66_001)], ["0", "x"], INT),
    ("max_agents", None, "MANAGER_MAX_AGENTS", 100_000, [("1", 1)], ["0", "many"], INT),
    ("rate_limit", None, "MANAGER_RATE_LIMIT", 0, [("0", 0), ("600", 600)], ["-1", "5/s"],
     "a whole number from 0 to "),
    ("trusted_proxy", None, "MANAGER_TRUSTED_PROXY", (), [], ["10.0.0.1/8", "proxy", "10.0.0.0/8,", "::/129"],
     "addresses or networks such as 10.0.0.0/8"),
    ("cors_allowed_origins", None, "CORS_ALLOWED_ORIGINS", (),
     [("https://a.example,http://[::1]:3000", ("https://a.example", "http://[::1]:3000"))],
     ["*", "a.example", "https://a.example/", "ftp://a"], "origins such as https://console.example.org"),
    ("threat_retention_ms", None, "MANAGER_THREAT_RETENTION_MS", 30 * 86_400_000, [("1", 1)],
     ["0", "30d"], INT),
    ("journal_retention_ms", None, "MANAGER_JOURNAL_RETENTION_MS", 30 * 86_400_000, [("1", 1)],
     ["0", "30d"], INT),
    ("max_db_bytes", None, "MANAGER_MAX_DB_BYTES", 2**32, [("1048576", 2**20)], ["1048575", "4G"],
     "a whole number from 1048576 to "),
    ("correlation_window_ms", None, "MANAGER_CORRELATION_WINDOW_MS", 300_000, [("1", 1)], ["0", "5m"], INT),
    ("tls", "--tls", "MANAGER_TLS", "auto", [("off", "off"), ("require", "require")], ["on", "OFF"],
     "auto, require or off"),
    ("tls_cert", "--tls-cert", "MANAGER_TLS_CERT", None, [("/c.pem", Path("/c.pem"))], ["a\0b"],
     "the path of a file"),
    ("tls_key", "--tls-key", "MANAGER_TLS_KEY", None, [("~/k.pem", Path.home() / "k.pem")], ["a\0b"],
     "the path of a file"),
    ("tls_name", "--tls-name", "MANAGER_TLS_NAME", (), [("a.example,10.0.0.1", ("a.example", "10.0.0.1"))],
     ["a b", "a.example,", "*.example", "-" * 64, "a..b"], "host names or addresses, with commas between"),
    ("open_enrollment", None, "MANAGER_OPEN_ENROLLMENT", False, [("1", True), ("0", False)],
     ["yes", "2", "on"], "1 or 0"),
    ("open_enrollment_org", None, "MANAGER_OPEN_ENROLLMENT_ORG", None, [("Sites open", "Sites open")],
     ["x" * 129, "a\nb", "  "], "1 to 128 characters without control characters"),
    ("reenroll", None, "MANAGER_REENROLL", True, [("0", False), ("1", True)], ["yes"], "1 or 0"),
    ("max_streams", None, "MANAGER_MAX_STREAMS", 500, [("1", 1)], ["-1", "all"], "a whole number from "),
    ("connections_per_address", None, "MANAGER_CONNECTIONS_PER_ADDRESS", None, [("1", 1)], ["0", "all"],
     "a whole number from 1 to "),
    ("max_buffered_bytes", None, "MANAGER_MAX_BUFFERED_BYTES", 33_554_432, [("2097152", 2_097_152)],
     ["2097151", "32M"], "a whole number from 2097152 to "),
    ("notify_url", None, "MANAGER_NOTIFY_URL", (), [
        ("https://a.example/x?y=1,slack+http://[::1]:8080/",
         ("https://a.example/x?y=1", "slack+http://[::1]:8080/"))],
     ["a.example", "ftp://a", "irc+https://a", "https://", "https://a:x/", "https://a b",
      ",".join(["http://a"] * 9)],
     "1 to 8 addresses such as https://hooks.example.org/panguard"),
    ("notify_secret", None, "MANAGER_NOTIFY_SECRET", None, [("whsec_" + "QUJD" * 8, b"ABC" * 8)],
     ["whsec_", "whsec_QUJD", "whsec_*", "secret"], "whsec_ and then 16 to 64 bytes in base64"),
    ("notify_on", None, "MANAGER_NOTIFY_ON", ("offline", "online", "threat:high", "correlated", "conflict"),
     [("threat:low, offline", ("threat:low", "offline"))], ["all", "threat", "offline,"],
     "some of offline, online"),
    ("notify_delay_ms", None, "MANAGER_NOTIFY_DELAY_MS", 60_000, [("1", 1)], ["0", "1m"], INT),
    ("notify_repeat_ms", None, "MANAGER_NOTIFY_REPEAT_MS", 0, [("0", 0), ("5", 5)], ["-1", "1h"],
     "a whole number from 0 to "),
    ("prune_offline_ms", None, "MANAGER_PRUNE_OFFLINE_MS", 0, [("0", 0), ("5", 5)], ["-1", "30d"],
     "a whole number from 0 to "),
    ("backup_dir", None, "MANAGER_BACKUP_DIR", None, [("/srv/kept", Path("/srv/kept"))], ["a\0b"],
     "the path of a folder"),
    ("backup_every_ms", None, "MANAGER_BACKUP_EVERY_MS", 86_400_000, [("1000", 1000)], ["999", "1d"],
     "a whole number from 1000 to "),
    ("backup_keep", None, "MANAGER_BACKUP_KEEP", 7, [("1", 1)], ["0", "all"], INT + "10000"),
    ("log_format", None, "MANAGER_LOG_FORMAT", "text", [("json", "json")], ["JSON", "xml"], "text or json"),
    ("threads", None, "MANAGER_THREADS", 16, [("1", 1), ("256", 256)], ["0", "257"], INT + "256"),
    ("log_level", None, "MANAGER_LOG_LEVEL", "INFO", [("DEBUG", "DEBUG"), ("ERROR", "ERROR")], ["LOUD", "10"],
     "DEBUG, INFO, WARNING or ERROR"),
]
# what a setting has no meaning without
COMPANIONS = {"tls_cert": ("tls_key", "MANAGER_TLS_KEY"), "tls_key": ("tls_cert", "MANAGER_TLS_CERT")}
BY_NAME = {row[0]: row for row in SETTINGS}
each_setting = pytest.mark.parametrize(("name", "option", "variable", "default", "good", "bad", "rule"),
                                       SETTINGS, ids=BY_NAME)


def test_the_table_of_settings_here_is_complete() -> None:
    assert set(BY_NAME) == {each.name for each in dataclasses.fields(Config)}


@each_setting
def test_a_setting_is_its_option_or_its_variable_or_its_default(
        name: str, option: str | None, variable: str, default: Any, good: list[tuple[str, Any]],
        bad: list[str], rule: str) -> None:
    assert getattr(Config.load([], {}), name) == default
    assert getattr(Config.load([], {variable: ""}), name) == default, "an empty variable counts as unset"
    keyword, with_it = COMPANIONS.get(name, ("", ""))
    keywords, others = {keyword: "/x"} if keyword else {}, {with_it: "/x"} if with_it else {}
    for text, value in good:
        assert getattr(Config.load([], {variable: text, **others}), name) == value
        for form in (text, value):
            assert getattr(Config(**{name: form, **keywords}), name) == value
            assert getattr(Server(**{name: form, **keywords}).config, name) == value
        if option:
            for environ in ({}, {variable: good[-1][0]}, {variable: bad[0]}):
                assert getattr(Config.load([option, text], {**environ, **others}), name) == value
                assert getattr(Config.load([f"{option}={text}"], {**environ, **others}), name) == value


@each_setting
def test_a_bad_value_is_refused_by_setting_value_and_rule(
        name: str, option: str | None, variable: str, default: Any, good: list[tuple[str, Any]],
        bad: list[str], rule: str) -> None:
    for text in bad:
        attempts = [(variable, lambda text=text: Config.load([], {variable: text})),
                    (f"{name} ({variable})", lambda text=text: Config(**{name: text})),
                    (f"{name} ({variable})", lambda text=text: Server(**{name: text}))]
        if option:
            attempts.append((option, lambda text=text: Config.load([f"{option}={text}"], {})))
        for named, attempt in attempts:
            with pytest.raises(manager.SettingError) as refused:
                attempt()
            said = str(refused.value)
            assert said.startswith(f"{named} is ") and " and must be " in said and rule in said, said
            if name in ("auth_token", "enroll_token", "viewer_token", "notify_url", "notify_secret"):
                assert "(its value is not shown here)" in said and "secret 1" not in said
            else:
                assert f"'{text}'" in said
            assert said.endswith(", in ms") is variable.endswith("_MS")


@pytest.mark.parametrize("name", ["port", "rate_limit", "heartbeat_timeout_ms"])
def test_true_is_no_value_of_a_setting(name: str) -> None:
    with pytest.raises(manager.SettingError, match=BY_NAME[name][2]):
        Config(**{name: True})


def test_networks_of_proxies_are_read_from_text() -> None:
    networks = Config.load([], {"MANAGER_TRUSTED_PROXY": "10.0.0.0/8, 2001:db8::1"}).trusted_proxy
    assert [str(each) for each in networks] == ["10.0.0.0/8", "2001:db8::1/128"]


@pytest.mark.parametrize(("timeout", "grace", "offline", "ages"), [
    (None, None, None, (66_000, 300_000)),
    ("1000", None, None, (1_100, 5_000)),
    ("1000", "0", None, (1_000, 5_000)),
    ("1000", "9000", None, (10_000, 10_001)),
    ("1000", "500", "1501", (1_500, 1_501)),
    ("1000", "500", "1500", None),
    ("1000", None, "1100", None),
    (None, None, "66000", None)])
def test_offline_must_be_later_than_timeout_and_grace(
        timeout: str | None, grace: str | None, offline: str | None, ages: tuple[int, int] | None) -> None:
    environ = {f"MANAGER_{name}_MS": text for name, text in (
        ("HEARTBEAT_TIMEOUT", timeout), ("HEARTBEAT_GRACE", grace), ("OFFLINE_TIMEOUT", offline)) if text}
    if ages:
        assert tuple(manager.Liveness.of(Config.load([], environ))) == ages
    else:
        with pytest.raises(manager.SettingError,
                           match=f"MANAGER_OFFLINE_TIMEOUT_MS is '{offline}' and must be more"):
            Config.load([], environ)


@pytest.mark.parametrize(("argv", "environ", "words"), [
    (["--port", "http"], {}, ["--port", "'http'", "from 0 to 65535"]),
    (["--port", "-1"], {}, ["--port", "'-1'", "from 0 to 65535"]),
    ([], {"MANAGER_THREADS": "none"}, ["MANAGER_THREADS", "'none'", "from 1 to 256"]),
    (["--auth-token", "hunter 2"], {}, ["--auth-token", TOKENS]),
    ([], {"MANAGER_ENROLL_TOKEN": "hunter 2"}, ["MANAGER_ENROLL_TOKEN", TOKENS]),
    ([], {"MANAGER_OFFLINE_TIMEOUT_MS": "5"}, ["MANAGER_OFFLINE_TIMEOUT_MS", "'5'", "66000"])])
def test_a_bad_setting_ends_the_start_with_one_line_and_status_2(
        argv: list[str], environ: dict[str, str], words: list[str], run_main: Any,
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in {"MANAGER_DATA_DIR": str(tmp_path / "d"), **environ}.items():
        monkeypatch.setenv(name, text)
    status, said = run_main(*argv)
    assert status == 2 and said.count("\n") == 1 and said.endswith("\n"), said
    assert all(word in said for word in words) and "hunter" not in said, said
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("variable", ["MANAGER_AUTH_TOKEN", "MANAGER_ENROLL_TOKEN", "MANAGER_VIEWER_TOKEN"])
def test_an_operators_token_has_sixteen_characters_and_an_embedded_one_may_have_fewer(variable: str) -> None:
    short, name = LONG[:15], variable.removeprefix("MANAGER_").lower()
    for text in (short, *([f"{LONGER},{short}", f"{short},{LONGER}"] if name == "auth_token" else [])):
        with pytest.raises(manager.SettingError, match=f"{variable} is .* 16 characters") as refused:
            Config.load([], {variable: text})
        assert short not in str(refused.value)
    with pytest.raises(manager.SettingError, match=f"{variable} is .* 16 characters"):
        Config.load(["--port", "0"], {variable: "ab"})
    assert getattr(Config(**{name: "ab"}), name) in ("ab", ("ab",))


def test_the_admins_token_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{LONG},{LONGER}\n")
    for config in (Config.load(["--auth-token-file", str(file)], {}), Config(auth_token_file=file),
                   Config.load([], {"MANAGER_AUTH_TOKEN_FILE": str(file)})):
        assert config.auth_token == (LONG, LONGER)
    with pytest.raises(manager.SettingError, match="MANAGER_AUTH_TOKEN and MANAGER_AUTH_TOKEN_FILE"):
        Config.load([], {"MANAGER_AUTH_TOKEN_FILE": str(file), "MANAGER_AUTH_TOKEN": LONG})
    for text, reason in ((None, "cannot be read"), ("hunter 2", TOKENS), ("hünter", "cannot be read"),
                         ("hunter", "16 characters"), ("", TOKENS)):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text, "utf-8")
        with pytest.raises(manager.SettingError, match=reason) as refused:
            Config.load([], {"MANAGER_AUTH_TOKEN_FILE": str(file)})
        assert "nter" not in str(refused.value)


@pytest.mark.parametrize("name", ["auth_token", "enroll_token", "viewer_token"])
def test_a_token_is_read_from_a_systemd_credential_unless_it_is_set(name: str, tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert not getattr(Config.load([], environ), name)
    (tmp_path / name).write_text(LONG + "\n")
    assert getattr(Config.load([], environ), name) in (LONG, (LONG,))
    token = getattr(Config.load([], {**environ, f"MANAGER_{name.upper()}": LONGER}), name)
    assert token in (LONGER, (LONGER,))
    (tmp_path / name).write_text("ab")
    with pytest.raises(manager.SettingError, match="16 characters"):
        Config.load([], environ)


def test_tokens_of_different_roles_must_differ() -> None:
    for environ in ({"MANAGER_AUTH_TOKEN": LONG, "MANAGER_ENROLL_TOKEN": LONG},
                    {"MANAGER_AUTH_TOKEN": f"{LONGER},{LONG}", "MANAGER_VIEWER_TOKEN": LONG},
                    {"MANAGER_ENROLL_TOKEN": LONG, "MANAGER_VIEWER_TOKEN": LONG}):
        with pytest.raises(manager.SettingError, match="must differ"):
            Config.load([], environ)


def test_a_token_on_the_command_line_and_an_unknown_variable_are_warned_about(tmp_path: Path) -> None:
    with Running(tmp_path / "d", "--tls", "off", "--auth-token", LONG, MANAGER_AUTH_TOKEN=LONG,
                 MANAGER_PROT="hunter2", MANAGER_LOG_LEVEL="WARNING", MANAGER_URL="https://localhost:8443",
                 MANAGER_CACERT="/cert.pem") as running:
        assert running.ask("GET", "/api/agents")[0] == 200
        said = running.log.read_text()
    assert len(said.splitlines()) == 2 and "--auth-token" in said and "'MANAGER_PROT'" in said, said
    assert "did you mean MANAGER_PORT?" in said
    assert "hunter2" not in said and LONG not in said
    file = tmp_path / "secret"
    file.write_text(LONG)
    with Running(tmp_path / "e", "--tls", "off", "--auth-token-file", str(file), MANAGER_LOG_LEVEL="WARNING",
                 token=LONG) as running:
        assert running.ask("GET", "/api/agents")[0] == 200 and running.log.read_text() == ""


def test_help_names_every_option_variable_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    for _, option, variable, default, *_ in SETTINGS:
        line = next((each for each in out.splitlines() if each.split()[:1] == [variable]), "")
        assert line, f"{variable} is not explained"
        assert option is None or re.search(rf"^  {option}\b", out, re.MULTILINE)
        if isinstance(default, int) and variable not in ("MANAGER_HEARTBEAT_GRACE_MS",
                                                         "MANAGER_OFFLINE_TIMEOUT_MS"):
            assert f"({int(default)}" in line


@pytest.mark.parametrize(("argv", "status", "words"), [
    (["--nonsense"], 2, "--nonsense"), (["--por", "1"], 2, "--por"), (["serve", "extra"], 2, "extra"),
    (["--version"], 0, manager.__version__)])
def test_the_command_line_takes_its_options_and_no_others(argv: list[str], status: int, words: str,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    written = capsys.readouterr()
    assert left.value.code == status and words in (written.err if status else written.out)


def test_a_keyword_that_is_no_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="prot"):
        Server(prot=1)


@pytest.mark.parametrize("name", ["port", "host", "auth_token", "notify_url", "open_enrollment"])
def test_none_is_refused_for_a_setting_that_must_have_a_value(name: str) -> None:
    with pytest.raises(manager.SettingError, match=rf"{name} \(MANAGER_"):
        Config(**{name: None})
    assert Config(data_dir=None, heartbeat_grace_ms=None, tls_cert=None).heartbeat_grace_ms == 6_000


def test_the_keywords_for_type_checkers_are_the_settings() -> None:
    assert manager.Settings.__annotations__.keys() == {each.name for each in fields(Config)}


# 2  Domain ############################################################################################


@pytest.mark.parametrize(("settings", "age_ms", "status"), [
    ({}, 0, "online"), ({}, 60_001, "online"), ({}, 66_000, "online"), ({}, 66_001, "stale"),
    ({}, 300_000, "stale"), ({}, 300_001, "offline"), ({}, 86_400_000, "offline"),
    ({"heartbeat_grace_ms": 0}, 60_000, "online"), ({"heartbeat_grace_ms": 0}, 60_001, "stale"),
    ({"heartbeat_timeout_ms": 1, "heartbeat_grace_ms": 0, "offline_timeout_ms": 2}, 1, "online"),
    ({"heartbeat_timeout_ms": 1, "heartbeat_grace_ms": 0, "offline_timeout_ms": 2}, 2, "stale"),
    ({"heartbeat_timeout_ms": 1, "heartbeat_grace_ms": 0, "offline_timeout_ms": 2}, 3, "offline")])
def test_status_changes_at_the_exact_millisecond(settings: dict[str, int], age_ms: int, status: str) -> None:
    assert manager.Liveness.of(Config(**settings)).status(5_000, 5_000 + age_ms) is Status(status)
    with Server(port=0, clock=ManualClock(), **settings) as server:
        api = Client(server)
        agent = api.register()
        server.clock.advance(age_ms / 1000)
        assert api.get(f"/api/agents/{agent['id']}")["status"] == status
        for each in Status:
            assert len(api.get(f"/api/agents?status={each}")) == (each == status)
            assert api.get("/api/overview")[f"{each}Agents"] == (each == status)
        assert api.get("/health")["agents"] == {"total": 1, "online": int(status == "online")}


def a_rule(kind: str, mark: str) -> dict[str, Any]:
    return {"type": kind, "config": {"mark": mark}, "enabled": True}


@pytest.mark.parametrize(("in_force", "acknowledged", "version", "marks", "pending"), [
    ([], 0, 0, [], 0),
    ([], 7, 0, [], 0),
    ([(1, ["block:a"])], 0, 1, ["a"], 1),
    ([(1, ["block:a"])], 1, 1, ["a"], 0),
    ([(1, ["block:a", "block:b"])], 0, 1, ["a", "b"], 1),
    ([(1, ["block:a"]), (2, ["custom:b"])], 1, 2, ["a", "b"], 1),
    ([(1, ["block:a"]), (2, ["block:b"])], 0, 2, ["b"], 2),
    ([(1, ["block:a", "custom:c"]), (2, ["block:b", "block:d"])], 0, 2, ["c", "b", "d"], 2),
    ([(3, ["block:a"]), (2, ["block:b"])], 2, 3, ["b"], 1),
    ([(3, ["block:a"]), (2, ["block:b"]), (1, ["block:c"])], 0, 3, ["c"], 3),
    ([(1, ["block:a"]), (2, ["custom:b"]), (5, ["block:c", "custom:d"])], 2, 5, ["c", "d"], 1),
    ([(1, ["block:a"]), (2, ["custom:b"]), (5, ["alert:c"])], 9, 5, ["a", "b", "c"], 0)])
def test_resolving_keeps_the_narrowest_rules_of_each_type(
        in_force: list[tuple[int, list[str]]], acknowledged: int, version: int, marks: list[str],
        pending: int) -> None:
    effective = manager.resolve([(number, [a_rule(*each.split(":")) for each in rules])
                                 for number, rules in in_force],
                                acknowledged)
    assert (effective.version, [rule["config"]["mark"] for rule in effective.rules], effective.pending) == (
        version, marks, pending)


def test_an_agent_that_beats_every_minute_is_never_stale(by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, clock = by_hand
    jitter = random.Random(20260307)
    agent = fleet.register(**AGENT).agent
    for beat in range(1, 1441):
        clock.advance(START_MS / 1000 + 60 * beat + jitter.uniform(-2, 2) - clock.now().wall_ms / 1000)
        assert fleet.agent(agent.id).status is Status.ONLINE
        assert fleet.sweep() == 0
        assert fleet.heartbeat(agent.id).status is Status.ONLINE
    assert [entry.type for entry in fleet.journal()] == ["agent_registered"]


def test_each_change_of_status_is_journalled_once_in_order_at_the_instant_it_fell_due() -> None:
    with Server(port=0, clock=ManualClock(), heartbeat_timeout_ms=1000) as server:
        agent = server.manager.register(**AGENT).agent
        expected = []
        for round_ms in (0, 7_000):
            for advance_s, status in ((1.1, "online"), (0.2, "stale"), (3.7, "stale"), (1.0, "offline"),
                                      (1.0, "offline")):
                server.clock.advance(advance_s)
                assert server.manager.agent(agent.id).status == status
                server.manager.sweep()
            server.manager.heartbeat(agent.id)
            assert server.manager.agent(agent.id).status == "online"
            expected += [("agent_stale", round_ms + 1_100), ("agent_offline", round_ms + 5_000),
                         ("agent_online", round_ms + 7_000)]
            assert journal_of(server.manager) == expected


@pytest.mark.parametrize("hear", ["sweep", "heartbeat", "register"])
def test_what_fell_due_is_journalled_before_a_return(hear: str, by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, clock = by_hand
    agent = fleet.register(**AGENT, machine_id="m").agent
    clock.advance(1000)
    if hear == "sweep":
        assert fleet.sweep() == 2 and fleet.sweep() == 0
    fleet.heartbeat(agent.id) if hear != "register" else fleet.register(**AGENT, machine_id="m")
    assert journal_of(fleet) == [("agent_stale", 66_000), ("agent_offline", 300_000),
                                 ("agent_online", 1_000_000)]
    assert fleet.sweep() == 0


@pytest.mark.parametrize(("age_s", "status"), [(66.0, "online"), (66.001, "stale"), (300.001, "offline")])
def test_reads_between_two_sweeps_are_right_already(age_s: float, status: str,
                                                    by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, clock = by_hand
    agent = fleet.register(**AGENT, org_id="o").agent
    clock.advance(age_s)
    assert fleet.agent(agent.id).status == status
    for each in Status:
        listed = json.loads(fleet.agents_json(status=each)[0])
        assert [item["status"] for item in listed] == [status] * (each == status)
        for org_id in (None, "o"):
            assert fleet.overview(org_id=org_id)[f"{each}Agents"] == (each == status)
        assert fleet.census().agents[each] == (each == status)
    fleet.check_health()
    assert fleet.health() == (1, int(status == "online"))
    assert fleet.create_policy("p", [RULE]).broadcasted_to == (status == "online")
    assert journal_of(fleet) == [("policy_created", round(age_s * 1000))], "a read writes nothing"


@pytest.mark.parametrize("swept", [True, False], ids=["swept", "not swept"])
def test_an_agent_says_since_when_it_has_its_status_and_why(swept: bool,
                                                            by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, clock = by_hand
    agent_id = fleet.register(**AGENT).agent.id

    def check(status: str, since_s: float, stale_s: float, offline_s: float, reason: str) -> None:
        if swept:
            fleet.sweep()
        agent = fleet.agent(agent_id)
        assert (agent.status, agent.status_since_ms, agent.stale_at_ms, agent.offline_at_ms) == (
            status, *(START_MS + round(each * 1000) for each in (since_s, stale_s, offline_s)))
        assert agent.status_reason == reason
        assert fleet.agents(status=status) == ([agent], None)
    check("online", 0, 66, 300, "last heartbeat 12:00:00.000Z, due by 12:01:06.000Z")
    clock.advance(70)
    check("stale", 66, 66, 300, "last heartbeat 12:00:00.000Z, due by 12:01:06.000Z")
    clock.advance(300)
    check("offline", 300, 66, 300, "last heartbeat 12:00:00.000Z, due by 12:01:06.000Z")
    fleet.heartbeat(agent_id)
    check("online", 370, 436, 670, "last heartbeat 12:06:10.000Z, due by 12:07:16.000Z")
    clock.advance(30)
    fleet.heartbeat(agent_id)
    check("online", 370, 466, 700, "last heartbeat 12:06:40.000Z, due by 12:07:46.000Z")
    clock.advance(86_400)
    check("offline", 700, 466, 700,
          "last heartbeat 2026-03-07T12:06:40.000Z, due by 2026-03-07T12:07:46.000Z")


@pytest.mark.parametrize(("silent_s", "expected"), [
    (0, ("online", 0)), (70, ("stale", 66)), (400, ("offline", 300))], ids=["online", "stale", "offline"])
def test_a_status_began_when_it_began_before_a_restart_too(silent_s: int, expected: tuple[str, int],
                                                           by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, clock = by_hand
    agent_id = fleet.register(**AGENT).agent.id
    clock.advance(silent_s)
    fleet.sweep()
    clock.advance(3600 if silent_s else 1)
    agent = Manager(fleet.config, clock, fleet.store).agent(agent_id)
    assert (agent.status, agent.status_since_ms) == (expected[0], START_MS + expected[1] * 1000)
    assert agent.stale_at_ms < agent.offline_at_ms


def test_a_step_of_the_system_clock_expires_nobody(api: Client, clock: ManualClock) -> None:
    agent = api.register()
    for seconds in (86_400, -3 * 86_400, 2 * 86_400 + 7200):
        clock.step(seconds)
        clock.advance(1)
        assert api.get(f"/api/agents/{agent['id']}")["status"] == "online"
    clock.advance(63)
    assert api.get(f"/api/agents/{agent['id']}")["status"] == "online"
    assert api.journal("agent_stale", "agent_offline") == []
    clock.advance(0.001)
    assert api.get(f"/api/agents/{agent['id']}")["status"] == "stale"
    (stale,) = api.journal("agent_stale")
    assert stale["at"] == manager.iso(START_MS + 7_200_000 + 66_000)


@pytest.mark.parametrize("first", ["timer", "heartbeat", "registration"])
def test_a_stop_of_the_process_makes_no_agent_stale(first: str, by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, clock = by_hand
    dead, alive = (fleet.register(**AGENT, machine_id=each).agent for each in ("m-1", "m-2"))
    fleet.heartbeat(alive.id)
    clock.advance(60)
    clock.stall(3600)
    if first == "heartbeat":
        fleet.heartbeat(alive.id, version="2", cpu=7)
        assert fleet.agent(alive.id).cpu == 7
    elif first == "registration":
        assert fleet.register(**AGENT, machine_id="m-2").created, "its machine is online: this one is a clone"
    fleet.forgive_suspend()
    fleet.journal_forgiven()
    assert fleet.sweep() == 0 and fleet.agent(dead.id).status is Status.ONLINE
    (entry,) = [each for each in fleet.journal() if each.type == "silence_forgiven"]
    assert entry.data == {"cause": "process_stopped", "durationMs": 3_600_000}
    clock.advance(6.001)
    fleet.sweep()
    assert fleet.agent(dead.id).status is Status.STALE, "the time before and after counts"
    assert fleet.agent(alive.id).status is (Status.ONLINE if first == "heartbeat" else Status.STALE)
    clock.advance(100)
    fleet.sweep()
    assert fleet.agent(alive.id).status is Status.STALE, "a contact before it was forgiven gains nothing"


def test_what_fell_due_before_the_process_was_stopped_is_journalled_at_its_instant(
        by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, clock = by_hand
    fleet.register(**AGENT)
    clock.advance(66.5)
    clock.stall(3600)
    fleet.forgive_suspend()
    fleet.journal_forgiven()
    assert journal_of(fleet) == [("agent_stale", 66_000), ("silence_forgiven", 3_666_500)]


def test_a_suspend_makes_no_agent_stale_and_is_journalled(server: Server, clock: ManualClock) -> None:
    agent = server.manager.register(**AGENT).agent
    clock.advance(60)
    clock.suspend(86_400)
    assert server.manager.agent(agent.id).status is Status.ONLINE
    (entry,) = server.manager.journal(type="silence_forgiven")
    assert entry.data == {"cause": "machine_suspended", "durationMs": 86_400_000}
    clock.advance(6.001)
    assert [each for each in journal_of(server.manager)
            if each[0] == "agent_stale"] == [("agent_stale", 86_466_000)]


def test_a_manager_disturbed_again_and_again_announces_a_dead_agent_all_the_same(
        server: Server, clock: ManualClock) -> None:
    server.manager.register(**AGENT)
    for _ in range(200):
        clock.advance(0.1)
        clock.stall(4)
    entries = server.manager.journal()
    assert Counter(entry.type for entry in entries) == {
        "agent_registered": 1, "silence_forgiven": 10, "agent_stale": 1, "agent_offline": 1}
    assert entries[-1].at_ms - START_MS <= 300_000 + 10 * 4_000 + 10_000


def test_the_clocks_of_the_system_are_read_at_one_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    readings_ns = [number * 100_000 for number in range(30)]
    apart = set()
    for passed_ns in readings_ns:
        with monkeypatch.context() as stopped:
            stopped.setattr(time, "monotonic_ns", lambda ns=passed_ns: 5_000_300_000 + ns)
            stopped.setattr(time, "time_ns", lambda ns=passed_ns: 1_700_000_000_000_700_000 + ns)
            now = manager.SystemClock().now()
        apart.add(now.wall_ms - now.tick_ms)
    assert len(apart) == 1


def test_a_short_stop_is_not_forgiven(server: Server, clock: ManualClock) -> None:
    agent = server.manager.register(**AGENT).agent
    for _ in range(34):
        clock.stall(2)
    assert server.manager.agent(agent.id).status is Status.STALE
    assert not server.manager.journal(type="silence_forgiven")


def test_a_busy_process_is_not_taken_for_a_stopped_one() -> None:
    clock, worked = manager.SystemClock(), threading.Event()

    def busy() -> bool:
        for size in range(16, 40):  # no other thread of Python runs while an expression backtracks
            began_s = time.process_time()
            re.match("(a+)+b", "a" * size)
            if time.process_time() - began_s > 1:
                break
        worked.set()
        return False
    began_s, cpu_s = time.monotonic(), time.process_time()
    stop = clock.every(0.05, busy)
    assert worked.wait(LIMIT_S)
    stop()
    clock.stalled_ms()
    given_to_others_s = time.monotonic() - began_s - (time.process_time() - cpu_s)
    assert clock.stalled_ms() <= 1000 * given_to_others_s + 100


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_stop_of_the_process_by_a_signal_makes_no_agent_stale(tmp_path: Path) -> None:
    with Running(tmp_path / "data", MANAGER_TLS="off", MANAGER_HEARTBEAT_TIMEOUT_MS="2000",
                 MANAGER_OFFLINE_TIMEOUT_MS="600000") as running:
        def entries(*types: str) -> list[Any]:
            return [each for each in running.ask("GET", "/api/events?limit=200")[1]["data"]
                    if each["type"] in types]

        agent = running.ask("POST", "/api/agents/register", AGENT)[1]["data"]
        running.process.send_signal(signal.SIGSTOP)
        os.waitpid(running.process.pid, os.WUNTRACED)  # send_signal() does not wait for the stop
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=3)) as asking:
            asking.request("GET", "/livez")
            with pytest.raises(TimeoutError):
                asking.getresponse()
        running.process.send_signal(signal.SIGCONT)
        assert running.ask("GET", f"/api/agents/{agent['id']}")[0] == 200
        stop, stale = until(lambda: len(found := entries("silence_forgiven", "agent_stale")) >= 2
                            and found[:2], "the agent fell silent, too")
        assert (stop["type"], stale["type"]) == ("silence_forgiven", "agent_stale")
        assert stop["cause"] == "process_stopped" and stop["durationMs"] >= 2000


@pytest.mark.parametrize("seconds", [-0.001, math.nan, math.inf, -math.inf, "3", None, True, 10**12])
def test_a_manual_clock_refuses_time_that_cannot_pass(seconds: Any) -> None:
    clock = ManualClock()
    before = clock.now()
    moves: list[Callable[[Any], Any]] = [clock.advance, clock.stall, clock.suspend]
    if seconds != -0.001:  # the system clock can be set back
        moves += [clock.step, ManualClock]
    for move in moves:
        with pytest.raises(ValueError, match=r"^seconds: (must be a number from|is required)"):
            move(seconds)
    assert clock.now() == before


def test_a_manual_clock_moves_from_1970_to_the_end_of_9999(by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, clock = by_hand
    clock.step(-START_MS / 1000)
    assert clock.now().wall_ms == 0
    with pytest.raises(ValueError, match=r"^seconds: must be a number from -?0\.0 to"):
        clock.step(-1)
    clock.step(253_402_300_799)
    assert fleet.overview()["updatedAt"] == "9999-12-31T23:59:59.000Z"


@pytest.mark.parametrize("restarts", [1, 2, 3])
def test_time_in_which_the_manager_was_down_counts_against_no_agent(restarts: int, tmp_path: Path) -> None:
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path) as server:
        agent = server.manager.register(**AGENT).agent
        server.clock.advance(60)
    for number in range(restarts):
        began_s = START_MS / 1000 + 60 + 3600 * (number + 1)
        with Server(port=0, clock=ManualClock(began_s), data_dir=tmp_path) as server:
            assert server.manager.agent(agent.id).status is Status.ONLINE
            server.clock.advance(1)
            assert journal_of(server.manager) == []
            if number == restarts - 1:
                server.clock.advance(65)
                assert server.manager.agent(agent.id).status is Status.ONLINE
                server.clock.advance(0.001)
                assert server.manager.agent(agent.id).status is Status.STALE
                server.clock.advance(300)
                began_ms = round(began_s * 1000) - START_MS
                assert journal_of(server.manager) == [("agent_stale", began_ms + 66_000),
                                                      ("agent_offline", began_ms + 300_000)]


@pytest.mark.parametrize(("silent_s", "status", "then"), [
    (100, "stale", ["agent_offline", "agent_online"]), (1000, "offline", ["agent_online"])])
def test_a_silent_agent_stays_silent_over_a_restart(silent_s: int, status: str, then: list[str],
                                                    tmp_path: Path) -> None:
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path) as server:
        agent = server.manager.register(**AGENT).agent
        server.clock.advance(silent_s)
        said = journal_of(server.manager)
        seen = server.manager.agent(agent.id)
    with Server(port=0, clock=ManualClock(START_MS / 1000 + 3600), data_dir=tmp_path) as server:
        found = server.manager.agent(agent.id)  # only time in which the manager ran counts
        assert dataclasses.replace(found, offline_at_ms=seen.offline_at_ms) == seen and seen.status == status
        server.clock.advance(1)
        assert server.manager.agent(agent.id).status == status and journal_of(server.manager) == said
        server.clock.advance(999)
        server.manager.heartbeat(agent.id)
        entries = dict(journal_of(server.manager)[len(said):])
        assert list(entries) == then and entries["agent_online"] == 4_600_000
        # Of the 234 s from stale to offline at most those before the stop count.
        assert 3_800_000 <= entries.get("agent_offline", 3_800_000) <= 3_834_000


def test_thousands_are_journalled_in_the_order_they_fell_due(by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, clock = by_hand
    seen: dict[str, int] = {}
    with fleet.store.transaction():
        for _ in range(2500):
            clock.advance(1)
            seen[fleet.register(**AGENT).agent.id] = clock.now().wall_ms
        for agent_id in random.Random(1).sample(sorted(seen), 700):
            clock.advance(0.01)
            fleet.heartbeat(agent_id)
            seen[agent_id] = clock.now().wall_ms
    before = len(fleet.journal())
    clock.advance(3600)
    assert fleet.sweep() == 2 * len(seen)
    found = [(entry.at_ms, entry.agent_id, entry.type) for entry in fleet.journal()[before:]]
    assert sorted(found) == sorted([(at + 66_000, name, "agent_stale") for name, at in seen.items()]
                                   + [(at + 300_000, name, "agent_offline") for name, at in seen.items()])
    instants = [at for at, *_ in found]
    assert instants == sorted(instants)
    assert fleet.sweep() == 0 and fleet.census().agents[Status.OFFLINE] == len(seen)


# 3  Validation ########################################################################################


LONE = "\ud800"
INFINITE = "<1e999>"  # becomes 1e999, which is a number to JSON and infinite to Python
CONTROLS = ("a\x00b", "\x1b[31m", "a\x7f", "a\x85b")
NO_TEXT = (1, True, [], {}, "", " ", LONE)
NO_NUMBER = ("1", True, False, [], {}, math.nan, math.inf, -math.inf, INFINITE, 10**400)


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


def kind(schema: Any) -> str:
    """What a wrong value depends on. A schema of a new kind has no row in WRONG, and fails."""
    if "anyOf" in schema:
        return "address"
    if schema["type"] == "object":
        return "record" if "properties" in schema else "object"
    if "maxLength" in schema:
        return "string"
    return next((name for name in ("enum", "pattern", "format") if name in schema), schema["type"])


WRONG: dict[str, Any] = {
    "string": lambda schema: (*NO_TEXT, *CONTROLS, "x" * (schema["maxLength"] + 1)),
    "number": lambda schema: (*NO_NUMBER, schema["minimum"] - 0.001, schema["maximum"] + 1),
    "integer": lambda schema: (*NO_NUMBER, 1.5, schema["minimum"] - 1, schema["maximum"] + 1),
    "boolean": lambda schema: (0, 1, "true", "", [], {}),
    "enum": lambda schema: (*NO_TEXT, "nonsense", schema["enum"][0].upper(), schema["enum"][0] + " "),
    "pattern": lambda schema: (*NO_TEXT, "v", "v0", "2", "V2", "v02", "v1.0", "v-1", "v1\n", "v\u0661",
                               "v" + "9" * 16),
    "format": lambda schema: (*NO_TEXT, 0, "yesterday", "2026-03-07", "2026-03-07T12:00:00",
                              "2026-02-30T12:00:00Z", "2026-03-07T25:00:00Z", "\u0662026-03-07T12:00:00Z",
                              "2026-03-07T12:00:00Z\n"),
    "address": lambda schema: (*NO_TEXT, 3405803776, "203.0.113", "203.0.113.256", "203.0.113.10/24", "::g",
                               "fe80::1%1",
                               " 203.0.113.10", "web-1"),
    "object": lambda schema: (1, True, "x", "", [], LONE, {"x": math.nan}, {"x": [INFINITE]}, {"x": LONE},
                              {LONE: 1}, deep(66), deep(500)),
    "array": lambda schema: (1, True, "x", "", {}, [0] * (schema["maxItems"] + 1),
                             *[[]][:schema["minItems"]]),
    "record": lambda schema: (1, True, "x", "", []),
}


def wrong(schema: Any, sound: Any) -> Iterator[tuple[str, Any]]:
    """Every way in which WRONG spoils a value: the path to what is wrong with it, and the spoiled value."""
    yield from (("", value) for value in WRONG[kind(schema)](schema))
    if kind(schema) == "array":
        yield "[0]", [None]
        yield from ((f"[0]{path}", [value])
                    for path, value in wrong(schema["items"], sound[0] if sound else None))
    if kind(schema) == "record":
        for name, inner in schema["properties"].items():
            if name in schema["required"]:
                yield f".{name}", {key: value for key, value in sound.items() if key != name}
                yield f".{name}", {**sound, name: None}
            elif inner["anyOf"][1] == {"type": "null"}:
                inner = inner["anyOf"][0]
            one_line = kind(inner) == "string" and name not in ("description", "note")
            values = (("", value) for value in (("a\nb", "a\tb") if one_line else ()))
            for path, value in itertools.chain(values, wrong(inner, sound.get(name))):
                yield f".{name}{path}", {**sound, name: value}


def target(route: str, agent: Any) -> tuple[str, str]:
    method, path = route.split(" ")
    return method, path.replace(":id", FIRST_EVENT if "/threats/" in path else agent["id"])


@pytest.mark.parametrize("route", WITH_BODY)
def test_a_wrong_value_in_any_field_is_refused_by_name_and_stores_nothing(
        route: str, api: Client, caplog: pytest.LogCaptureFixture) -> None:
    agent = api.register(tags=["kept"])
    before = stored(api, agent)
    schema = manager.table_schema(ROUTES[route].body or {})
    tried = 0
    for path, body in wrong(schema, BODIES[route]):
        raw = json.dumps(body).replace(f'"{INFINITE}"', "1e999").encode()
        error = api.refusal(*target(route, agent), raw, status=400)
        path = path.lstrip(".")
        if not path or b"NaN" in raw or b"Infinity" in raw or b"\\ud800" in raw:
            assert error.startswith("body: "), (raw, error)  # the field cannot be told, or it is the whole
        else:
            assert re.search(rf"(^|; ){re.escape(path)}: (must be|is required)", error), (path, raw, error)
        tried += 1
    assert tried > 10 * len(schema["properties"])
    assert stored(api, agent) == before
    assert not faults(caplog)


TEXT_QUERY = ("", "a%00b", "a%0Ab", "%C2%85", "%20")
WRONG_QUERY: dict[str, Any] = {
    "string": lambda schema: (*TEXT_QUERY, "x" * (schema["maxLength"] + 1)),
    "integer": lambda schema: ("", "x", "true", "1.5", "1e3", "-1", "%201", "NaN", "Infinity", "%D9%A1",
                               schema["minimum"] - 1, schema["maximum"] + 1, "1" * 5000),
    "boolean": lambda schema: ("", "yes", "1", "TRUE"),
    "enum": lambda schema: (*TEXT_QUERY, "nonsense", schema["enum"][0].upper()),
    "format": lambda schema: (*TEXT_QUERY, "0", "yesterday", "2026-03-07", "2026-02-30T12:00:00Z"),
    "pattern": lambda schema: (*TEXT_QUERY, "evt_1", "EVT_000000000001", "evt_00000000000g"),
    "array": lambda schema: (*TEXT_QUERY, "x" * (schema["items"].get("maxLength", 255) + 1)),
}


@pytest.mark.parametrize("route", WITH_QUERY)
def test_a_wrong_query_parameter_is_refused_by_name(
        route: str, api: Client, caplog: pytest.LogCaptureFixture) -> None:
    method, path = target(route, api.register())
    for name, param in ROUTES[route].query.items():
        schema = param.check.schema
        for value in WRONG_QUERY[kind(schema)](schema):
            error = api.refusal(method, f"{path}?{name}={value}", status=400)
            assert re.match(rf"{name}(\[0\])?: must be ", error), (name, value, error)
        if kind(schema) == "array":
            many = "&".join([f"{name}=x"] * (schema["maxItems"] + 1))
            assert api.refusal(method, f"{path}?{many}", status=400).startswith(f"{name}: ")
        else:
            refusal = api.refusal(method, f"{path}?{name}=1&{name}=1", status=400)
            assert f"{name}: must be given once" in refusal
        for raw in (f"{name}=%FF", f"{name}=%ED%A0%80", f"{name}=1&" + "x=1&" * 200):
            assert api.refusal(method, f"{path}?{raw}", status=400).startswith("query: ")
    assert not faults(caplog)


@pytest.mark.parametrize(("query", "named"), [
    ("page=1&limit=1", []), ("page=1000000&limit=200", []), ("page=0&limit=0", ["page", "limit"]),
    ("page=1000001&limit=201", ["page", "limit"]), ("page=9007199254740993", ["page"])])
def test_page_and_limit_have_bounds(query: str, named: list[str], api: Client) -> None:
    for path in ("/api/agents", "/api/threats", "/api/policy"):
        if named:
            assert re.findall(r"(\w+): must be a whole number", api.refusal("GET", f"{path}?{query}",
                                                                            status=400)) == named
        else:
            assert api.get(f"{path}?{query}") == []


NO_OBJECTS = {
    "cut short": b'{"a":', "no JSON": b"hostname=web-1", "a list": b"[]", "a text": b'"x"', "a number": b"1",
    "null": b"null", "true": b"true", "NaN": b"NaN", "two objects": b"{}{}", "a comment": b"{} // x",
    "single quotes": b"{'a': 1}", "blank": b"  ", "a BOM": b"\xef\xbb\xbf{}", "UTF-16": "{}".encode("utf-16"),
    "broken UTF-8": b'{"a": "\xff"}', "an encoded surrogate": b'{"a": "\xed\xa0\x80"}',
    "a raw NUL": b'{"a": "\x00"}', "nested lists": b"[" * 100_000, "nested objects": b'{"a":' * 100_000,
    "nested and closed": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a huge number": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("route", WITH_BODY)
def test_a_body_that_is_no_json_object_is_refused(route: str, api: Client,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    agent = api.register()
    before = stored(api, agent)
    sound = json.dumps(BODIES[route]).encode()
    for what, raw in NO_OBJECTS.items():
        assert api.refusal(*target(route, agent), raw, status=400).startswith("body: "), what
    assert "body: " in api.refusal(*target(route, agent), sound + b" " * (2**20 + 1 - len(sound)), status=413)
    for kind_of_body in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
                         "application/jsonp", "application/jsonx; charset=utf-8", "json"):
        assert "Content-Type: " in api.refusal(*target(route, agent), sound, status=415,
                                               headers={"Content-Type": kind_of_body})
    assert stored(api, agent) == before
    assert not faults(caplog)


def test_a_body_of_one_mebibyte_or_of_any_json_type_is_taken(api: Client) -> None:
    agent = api.register()
    path = f"/api/agents/{agent['id']}/heartbeat"
    assert api.post(path, b"{" + b" " * (2**20 - 2) + b"}")["status"] == "online"
    for kind_of_body in ("application/json", "application/json; charset=utf-8", "APPLICATION/JSON",
                         "application/a+json"):
        api.post(path, {"cpu": 1}, headers={"Content-Type": kind_of_body})


def test_an_absent_body_counts_as_an_empty_one(api: Client) -> None:
    agent = api.register()
    assert api.post(f"/api/agents/{agent['id']}/heartbeat")["status"] == "online"
    assert api.refusal("POST", "/api/agents/register", status=400) == \
        "hostname: is required; os: is required; version: is required"
    assert "tags" in api.refusal("PATCH", f"/api/agents/{agent['id']}", status=400)


def test_every_wrong_field_is_named_at_once(api: Client) -> None:
    error = api.refusal("POST", "/api/agents/register",
                        {"hostname": 1, "os": "", "ip": "x", "tags": ["a", 1]}, status=400)
    assert [part.partition(":")[0]
            for part in error.split("; ")] == ["hostname", "os", "version", "ip", "tags[1]"]
    agent = api.register()
    assert api.refusal("POST", f"/api/agents/{agent['id']}/heartbeat", {"cpu": 101}, status=400) == \
        "cpu: must be a number from 0 to 100"


def test_bounds_themselves_and_nulls_and_unknown_fields_are_taken(api: Client) -> None:
    agent = api.register(hostname="x" * 255, org_id="o" * 128, tags=["t" * 64, *map(str, range(63))], ip=None,
                         arch=None,
                         colour="blue", nested={"a": [None]})
    assert len(agent["tags"]) == 64
    for value in (0, 100, 0.5, 100.0):
        api.beat(agent, cpu=value, memory=value, uptime=value, version=None, mode="x")
    api.beat(agent, uptime=2**53 - 1)
    assert api.get(f"/api/agents/{agent['id']}")["uptime"] == 2**53 - 1
    report(api, agent, {**THREAT, "details": deep(64), "confidence": 1},
           {**THREAT, "details": {}, "confidence": 0}, {**THREAT, "timestamp": "2026-03-07T20:00:00+08:00"})


def test_tags_lose_repetitions_and_keep_their_order(api: Client) -> None:
    agent = api.register(tags=["b", "a", "b", "c", "a"])
    assert agent["tags"] == ["b", "a", "c"]
    path = f"/api/agents/{agent['id']}"
    assert api.call("PATCH", path,
                    {"addTags": ["d", "a", "d"], "removeTags": ["c", "x"]}).json["data"]["tags"] == \
        ["b", "a", "d"]
    assert api.call("PATCH", path, {"tags": ["z", "y", "z"]}).json["data"]["tags"] == ["z", "y"]
    assert "addTags" in api.refusal("PATCH", path, {"addTags": [str(each) for each in range(63)]}, status=400)
    assert "tags" in api.refusal("PATCH", path, {"tags": [], "addTags": ["a"]}, status=400)
    assert api.get(path)["tags"] == ["z", "y"]


ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT |
    st.sampled_from(["linux", "high", "v1", "203.0.113.9", "custom", "2026-03-07T12:00:00Z",
                     "agent-00000000"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3), max_leaves=8)


def near(schema: Any) -> st.SearchStrategy[Any]:
    """Values about as often right as wrong by a schema, so that examples reach what lies behind it."""
    if kind(schema) == "record":
        optional = {name: near(inner) for name, inner in schema["properties"].items()}
        return st.fixed_dictionaries({name: optional.pop(name) for name in schema["required"]},
                                     optional=optional)
    if "anyOf" in schema and {"type": "null"} in schema["anyOf"]:
        return near(schema["anyOf"][0]) | st.none()
    right = {
        "string": st.text(min_size=1, max_size=9), "number": st.floats(0, 1), "integer": st.integers(1, 9),
        "boolean": st.booleans(),
        "enum": st.sampled_from(schema.get("enum", [0])), "pattern": st.sampled_from(["v1", "v2"]),
        "format": st.just("2026-03-07T12:00:00Z"), "address": st.ip_addresses().map(str),
        "object": st.dictionaries(ANY_TEXT, ANY_JSON, max_size=3)}
    if kind(schema) == "array":
        return st.lists(near(schema["items"]), min_size=schema["minItems"], max_size=3)
    return st.one_of(right[kind(schema)], right[kind(schema)], right[kind(schema)], ANY_JSON)


@pytest.mark.parametrize("route", [name for name in WITH_BODY if "bulk" not in name])  # it may deregister
def test_no_json_is_a_fault_and_only_what_openapi_allows_is_taken(
        route: str, api: Client, caplog: pytest.LogCaptureFixture) -> None:
    agent = api.register()
    report(api, agent, THREAT)
    method, path = target(route, agent)
    table = ROUTES[route].body or {}
    described = api.call("GET", "/openapi.json").json["paths"][ROUTES[route].path.replace(":id", "{id}")]
    schema = described[method.lower()]["requestBody"]["content"]["application/json"]["schema"]
    taken = Counter[bool]()

    @settings(EXAMPLES, max_examples=80)
    @given(ANY_JSON | near(manager.table_schema(table)))
    def answers(body: Any) -> None:
        raw = json.dumps(body).encode()
        answer = api.app.request(path, method=method, body=raw, expect_errors=True, headers={
            "Authorization": f"Bearer {api.server.token}", "Content-Type": "application/json"})
        assert answer.status_int in (200, 201, 400, 404), (raw, answer)
        assert answer.json["ok"] is (answer.status_int < 300)
        taken[answer.json["ok"]] += 1
        if answer.json["ok"]:
            jsonschema.validate(body, schema)

    answers()
    assert taken[True] and taken[False]
    assert not faults(caplog)
    assert api.get("/health")["agents"]["total"] >= 1


# 4  Storage ###########################################################################################


def pragma(path: Path, name: str) -> Any:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(f"PRAGMA {name}").fetchone()[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock that a manager holds there."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
            and path.name != "lock"}


def one_sentence(said: str, *words: str) -> None:
    assert said.count("\n") == 1 and said.startswith("panguard-manager: ") and "Traceback" not in said, said
    assert all(word in said for word in words), said


def test_a_new_file_has_had_every_migration(server: Server) -> None:
    assert pragma(server.manager.store.folder / "manager.db", "user_version") == len(manager.MIGRATIONS)


def test_an_old_file_is_migrated_and_keeps_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path) as server:
        agent = server.manager.register(**AGENT).agent
    monkeypatch.setattr(manager, "MIGRATIONS", (*manager.MIGRATIONS, "CREATE TABLE later (x)"))
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path) as server:
        assert server.manager.agent(agent.id) == agent
    assert pragma(tmp_path / "manager.db", "user_version") == len(manager.MIGRATIONS)
    assert pragma(tmp_path / "manager.db", "table_info(later)") == 0


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path) as server:
        agent = server.manager.register(**AGENT).agent
    with monkeypatch.context() as patch:
        patch.setattr(manager, "MIGRATIONS", (*manager.MIGRATIONS, "CREATE TABLE later (x); SELECT nonsense"))
        with pytest.raises(manager.StartError, match=r"manager\.db"):
            Server(port=0, clock=ManualClock(), data_dir=tmp_path).start()
    assert pragma(tmp_path / "manager.db", "user_version") == len(manager.MIGRATIONS)
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path) as server:
        assert server.manager.agent(agent.id) == agent


# The digest of each migration. A new migration adds its digest; a released one must not change.
RELEASED = ["ed1f0752610b6d27", "46291b0c3314ecff", "329c10660a3cdd14", "0953a1f929c78372",
            "9f1faaeb4b6dcc08", "0773770dae394551", "f50b2a7887d16788", "6352923b7efbeaf5",
            "dde6f8dd4c3c9628", "1e4247294172e9fe"]


def test_released_migrations_never_change() -> None:
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in manager.MIGRATIONS]
    assert digests == RELEASED


# What stood for which text of migration 1 at these commits, newest first; each adds to the one before.
SIGHTINGS = re.search(r"CREATE TABLE sightings.*?ROWID;\s*CREATE INDEX sightings_time.*?;",
                      manager.MIGRATIONS[0], re.DOTALL)[0]
EARLIER: dict[str, list[tuple[str, str]]] = {
    "1062d14 (1.0.0 and 1.1.0)": [],
    "6cfbd5a": [("journal (agent_id)", "journal (agent_id, seq)"), ("journal (type)", "journal (type, seq)"),
                ("journal (org_id)", "journal (org_id, seq)")],
    "95dcf60": [("token_digest BLOB,", "token_digest BLOB UNIQUE,"), (
        "CREATE INDEX agents_token ON agents (token_digest, id, org_id) "
        "WHERE token_digest IS NOT NULL;", "")],
    "65c229d": [("CREATE INDEX contacts_silent ON contacts (announced, seen_ms) WHERE announced != 'online';",
                 "CREATE INDEX contacts_due ON contacts (announced, seen_ms);")],
    "ad9acbc": [(SIGHTINGS, "CREATE TABLE correlations (org_id TEXT NOT NULL, indicator TEXT NOT NULL, "
                 "announced_ms INTEGER NOT NULL, PRIMARY KEY (org_id, indicator)) WITHOUT ROWID;")],
    "396502c": [("CREATE TABLE probe (padding BLOB);", "")],
    "1a03308": [("agents (org_id);", "agents (org_id, os);")]}


def old_file(path: Path, commit: str) -> None:
    """The database of an earlier commit with one agent, which has had another after it; user_version is 1."""
    statements = manager.MIGRATIONS[0]
    for name, changes in EARLIER.items():
        for new, old in changes:
            assert new in statements
            statements = statements.replace(new, old)
        if name == commit:
            break
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(f"PRAGMA page_size = 4096; PRAGMA journal_mode = WAL; {statements} PRAGMA "
                         f"user_version = 1; PRAGMA application_id = {0x50474D31}; PRAGMA foreign_keys = ON;")
        for number, token in ((1, hashlib.sha256(b"secret").digest()), (2, None)):
            agent = f"agent-0000000{number}"
            db.execute("INSERT INTO agents VALUES (?, ?, ?, 'web-1', 'linux', NULL, '192.0.2.1', 'acme', "
                       "'m', '[\"a\"]', 1)", (number, agent, token))
            db.execute("INSERT INTO contacts (agent, seen_ms, heartbeat_ms, announced, version) "
                       "VALUES (?, 0, 1, 'online', '1.0')", (number,))
            db.execute("INSERT INTO journal (at_ms, type, actor, org_id, agent_id, data) VALUES "
                       "(?, 'agent_registered', '{\"role\": \"admin\"}', 'acme', ?, '{}')", (START_MS, agent))
        db.execute("DELETE FROM agents WHERE key = 2")
        db.commit()


def sqlite_dump(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return list(db.iterdump())


@pytest.mark.parametrize("commit", EARLIER)
def test_a_file_of_any_earlier_schema_is_brought_to_the_present_one(commit: str, tmp_path: Path) -> None:
    old_file(tmp_path / "manager.db", commit)
    before = sqlite_dump(tmp_path / "manager.db")
    with Server(port=0, data_dir=tmp_path, clock=ManualClock()) as server:
        api = Client(server)
        assert api.get("/api/agents?tag=a&org_id=acme")[0]["id"] == "agent-00000001"
        path = "/api/agents/agent-00000001"
        assert api.post(f"{path}/heartbeat", {}, token="secret")["status"] == "online"
        api.post(f"{path}/events", {"events": [THREAT]}, token="secret", status=201)
        server.manager.sweep()
        assert api.get("/health")["status"] == "healthy"
        assert [entry["seq"] for entry in api.journal("agent_registered")] == [1, 2]
        api.register()
        with contextlib.closing(sqlite3.connect(tmp_path / "manager.db")) as db:
            assert manager.schema_of(db) == manager.expected_schema(manager.MIGRATIONS)
            assert db.execute("SELECT max(key) FROM agents").fetchone() == (3,), "no key is given twice"
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        api.call("DELETE", path)
        assert api.get("/api/agents?tag=a") == []
    copy = tmp_path / "manager.db.schema-1"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert sqlite_dump(copy) == before, "the file as it was is kept"


def test_a_start_goes_on_after_a_migration_that_ended_half_way(tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    old_file(tmp_path / "manager.db", "1a03308")
    before = sqlite_dump(tmp_path / "manager.db")
    with monkeypatch.context() as patch:
        patch.setattr(manager, "MIGRATIONS",
                      (manager.MIGRATIONS[0], manager.MIGRATIONS[1] + "; SELECT nonsense"))
        with pytest.raises(StartError):
            Server(port=0, data_dir=tmp_path).start()
    assert sqlite_dump(tmp_path / "manager.db") == before
    (tmp_path / "manager.db.schema-1.new").write_bytes(b"the beginning of a copy")
    with Server(port=0, data_dir=tmp_path) as server:
        assert server.manager.health() == (1, 1)
    assert sqlite_dump(tmp_path / "manager.db.schema-1") == before
    assert not (tmp_path / "manager.db.schema-1.new").exists()


def test_without_a_copy_nothing_is_migrated(tmp_path: Path, run_main: Any) -> None:
    old_file(tmp_path / "manager.db", "1a03308")
    (tmp_path / "manager.db.schema-1").mkdir()
    status, said = run_main("--port", 0, "--data-dir", tmp_path)
    assert status == 1
    one_sentence(said, "manager.db.schema-1", "copy")
    assert pragma(tmp_path / "manager.db", "user_version") == 1


@pytest.mark.parametrize(("damage", "named"), [
    ("DROP TABLE sightings", "sightings"), ("DROP INDEX contacts_silent", "contacts_silent"),
    ("DROP TRIGGER agent_tagged", "agent_tagged"), ("ALTER TABLE agents ADD COLUMN nick TEXT", "agents")])
def test_a_file_of_another_schema_than_its_version_has_is_refused(damage: str, named: str, tmp_path: Path,
                                                                  run_main: Any) -> None:
    with Server(port=0, data_dir=tmp_path):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "manager.db")) as db:
        db.executescript(damage)
    status, said = run_main("--port", 0, "--data-dir", tmp_path)
    assert status == 1
    one_sentence(said, named, "restore a backup")


def newer_file(path: Path) -> None:
    with Server(port=0, data_dir=path.parent) as server:
        server.manager.register(**AGENT)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {len(manager.MIGRATIONS) + 1}")


def other_program(path: Path, mode: str = "DELETE") -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.executescript("CREATE TABLE notes (x); INSERT INTO notes VALUES ('mine')")


@pytest.mark.parametrize(("make", "word"), [
    (newer_file, "newer"),
    (lambda path: path.write_bytes(b"Dear diary, " * 1000), "not a database"),
    (lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 8176), "manager.db"),
    (other_program, "another program"),
    (lambda path: other_program(path, "WAL"), "another program"),
    (lambda path: path.mkdir(), "manager.db")],
    ids=["newer", "text", "damaged", "another program's", "another program's in WAL mode", "a folder"])
def test_a_file_that_is_not_ours_is_refused_and_left_alone(make: Callable[[Path], None], word: str,
                                                           tmp_path: Path, run_main: Any) -> None:
    make(tmp_path / "manager.db")
    (tmp_path / "lock").unlink(missing_ok=True)
    before = contents(tmp_path)
    with pytest.raises(manager.StartError, match=word) as refused:
        Server(port=0, data_dir=tmp_path).start()
    status, said = run_main("--port", 0, "--data-dir", tmp_path)
    assert status == 1
    one_sentence(said, str(refused.value), word, str(tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", [
    "{file}", "{file}/data", "{file}/deeper/data",
    pytest.param("/proc/self", marks=pytest.mark.skipif(not os.path.isdir("/proc/self"),
                                                        reason="no /proc here")),
    pytest.param("/proc/nothing", marks=pytest.mark.skipif(not os.path.isdir("/proc/self"),
                                                           reason="no /proc here"))])
def test_a_folder_that_cannot_be_made_or_written_is_refused_in_one_sentence(place: str, tmp_path: Path,
                                                                            run_main: Any) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    folder = place.format(file=file)
    with pytest.raises(manager.StartError, match=re.escape(folder)):
        Server(port=0, data_dir=folder).start()
    status, said = run_main("--port", 0, "--data-dir", folder)
    assert status == 1
    one_sentence(said, folder, "choose another")
    assert file.read_text() == "mine"


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A data folder that this user may not enter."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "data")
        with Server(port=0, data_dir=folder):
            pass
        is_root = os.geteuid() == 0
        if is_root:
            Path(place).chmod(0o755)
            os.seteuid(65534)
        else:
            folder.chmod(0)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o700)


def test_a_folder_that_may_not_be_entered_is_refused_in_one_sentence(forbidden: Path, run_main: Any) -> None:
    status, said = run_main("--port", 0, "--data-dir", forbidden)
    assert status == 1
    one_sentence(said, f"this user may not enter the data folder {forbidden}", "sudo -u", "--data-dir")


@pytest.mark.parametrize("words", [["status"], ["doctor"], ["check"], ["backup", "/dev/null/none"]])
def test_a_command_in_a_folder_that_may_not_be_entered_says_so(words: list[str], forbidden: Path,
                                                               run_main: Any) -> None:
    status, said = run_main(*words, "--data-dir", forbidden)
    assert status == 1
    one_sentence(said, f"this user may not use {forbidden}", "sudo")


def test_a_folder_serves_one_manager_at_a_time(tmp_path: Path, run_main: Any) -> None:
    with Server(port=0, data_dir=tmp_path, clock=ManualClock()) as server:
        agent = server.manager.register(**AGENT).agent
        with pytest.raises(manager.StartError, match="another manager is running on"):
            Server(port=0, data_dir=tmp_path).start()
        assert run_main("--port", 0, "--data-dir", tmp_path)[0] == 1
        other = subprocess.run([sys.executable, manager.__file__, "--port", "0", "--data-dir", tmp_path],
                               text=True, capture_output=True, timeout=LIMIT_S, check=False)
        assert other.returncode == 1 and other.stdout == ""
        one_sentence(other.stderr, "another manager is running on", str(tmp_path))
        server.manager.heartbeat(agent.id, cpu=3)
        assert server.manager.agent(agent.id).cpu == 3
    with Server(port=0, data_dir=tmp_path, clock=ManualClock()) as server:
        assert server.manager.agent(agent.id).cpu == 3


@pytest.mark.parametrize("fault", ["newer file", "port in use"])
def test_a_start_that_failed_lets_go_of_the_folder(fault: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if fault == "newer file":
            newer_file(tmp_path / "manager.db")
        with pytest.raises(manager.StartError):
            Server(port=taken.getsockname()[1], data_dir=tmp_path).start()
        (tmp_path / "manager.db").unlink()
        with Server(port=0, data_dir=tmp_path) as server:
            assert [entry.type for entry in server.manager.journal()] == ["manager_started"]


def test_starts_and_stops_are_in_the_journal_of_a_folder_that_is_kept(tmp_path: Path) -> None:
    clock = ManualClock()
    for _ in range(2):
        with Server(port=0, data_dir=tmp_path, clock=clock) as server:
            server.manager.register(**AGENT)
            clock.advance(10)
    with Server(port=0, data_dir=tmp_path, clock=clock) as server:
        entries = [(entry.type, entry.at_ms - START_MS, entry.actor, entry.data.get("version"))
                   for entry in server.manager.journal() if entry.type.startswith("manager_")]
    by_manager, version = {"role": "manager"}, manager.__version__
    assert entries == [(f"manager_{what}", at_ms, by_manager, version) for what, at_ms in (
        ("started", 0), ("stopped", 10_000), ("started", 10_000), ("stopped", 20_000), ("started", 20_000))]
    with Server(port=0) as server:
        assert server.manager.journal() == []


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Another program in the midst of writing to the database."""
    with contextlib.closing(sqlite3.connect(folder / "manager.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def test_a_locked_database_is_a_503_until_it_is_free_and_loses_nothing(api: Client, server: Server,
                                                                       clock: ManualClock) -> None:
    agent = api.register()
    api.beat(agent, cpu=1)
    before = api.journal()
    path = f"/api/agents/{agent['id']}"
    with locked(server.manager.store.folder), ThreadPoolExecutor(5) as pool:
        server.clock.advance(1)  # the timer finds it
        # Each waits a second for the lock: together they do not wait five.
        writes = [pool.submit(Client(server).call, *each, status=503) for each in (
            ("POST", "/api/agents/register", AGENT), ("POST", f"{path}/heartbeat", {"cpu": 99}),
            ("POST", f"{path}/events", {"events": [THREAT]}), ("DELETE", path))]
        assert api.get(path)["cpu"] == 1, "a read waits for no lock"
        assert api.journal() == before
        answers = [each.result() for each in writes]
        answers.append(api.call("GET", "/health", status=503))
    for answer in answers:
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json["ok"] is False and "locked" in answer.json["error"]
    assert answers[-1].json["data"]["status"] == "unhealthy"
    server.clock.advance(1)
    assert api.get("/health")["status"] == "healthy"
    assert api.journal() == before and api.get(path)["cpu"] == 1 and len(api.get("/api/agents")) == 1
    api.beat(agent, cpu=2)
    assert api.get(path)["cpu"] == 2


def test_who_writes_again_and_again_lets_others_write_in_between(server: Server) -> None:
    store, over, turns = server.manager.store, threading.Event(), []

    def write() -> None:
        while not over.is_set():
            with store.transaction(durable=False) as db:
                turns.append(1)
                db.execute("SELECT count(*) FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 "
                           "FROM n LIMIT 20000) SELECT i FROM n)").fetchone()
    greedy, waited = threading.Thread(target=write), []
    greedy.start()
    for _ in range(30):
        before = len(turns)
        while len(turns) == before:
            select.select([], [], [], 0.0005)
        before = len(turns)
        with store.transaction(durable=False):
            waited.append(len(turns) - before)
    over.set()
    greedy.join()
    assert max(waited) <= 1, waited


def test_a_writer_interrupted_while_it_waits_does_not_block_the_others(server: Server) -> None:
    store, done = server.manager.store, []
    mine, entered, go = threading.get_ident(), threading.Event(), threading.Event()

    def hold() -> None:
        with store.transaction():
            store.on_commit(lambda: done.append(0))
            entered.set()
            until_queued(server, 2)
            signal.pthread_kill(mine, signal.SIGUSR1)
            assert go.wait(LIMIT_S)
            with store.transaction():  # still a part of the outer one
                pass

    def interrupt(number: int, frame: Any) -> None:
        raise InterruptedError

    def write() -> None:
        server.manager.register(**AGENT)
        done.append(1)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        holder = threading.Thread(target=hold)
        with pytest.raises(InterruptedError):
            holder.start()
            assert entered.wait(LIMIT_S)
            with store.transaction():
                raise AssertionError("there are two at once")
    finally:
        signal.signal(signal.SIGUSR1, before)
    others = [threading.Thread(target=write) for _ in range(3)]
    for each in others:
        each.start()
    assert not done
    go.set()
    for each in (holder, *others):
        each.join(LIMIT_S)
    assert sorted(done) == [0, 1, 1, 1] and server.manager.register(**AGENT)


@contextmanager
def waiting_writers(server: Server,
                    *writes: Callable[[], Any]) -> Iterator[list[concurrent.futures.Future[Any]]]:
    """Writes that wait, in this order, until the block ends: it holds the write lock."""
    store = server.manager.store
    with ThreadPoolExecutor(len(writes)) as pool:
        with store.transaction(durable=False):
            waiting = []
            for write in writes:
                waiting.append(pool.submit(write))
                until_queued(server, len(waiting) + 1)
            yield waiting
        concurrent.futures.wait(waiting, LIMIT_S)


def test_waiting_writers_share_a_commit_and_a_failed_one_is_undone_alone() -> None:
    with Server(port=0, clock=ManualClock(), max_agents=4) as server:
        known, commits = server.manager.register(**AGENT).agent, []

        def register() -> Any:
            return server.manager.register(**AGENT).agent.id

        def tag() -> Any:
            return server.manager.retag(known.id, tags=["late"]).tags
        with waiting_writers(server, register, register, tag, register, register, tag) as writes:
            server.manager.store.writer.set_trace_callback(
                lambda text: commits.append(text)
                if text.startswith(("COMMIT", "PRAGMA synchronous")) else None)
        server.manager.store.writer.set_trace_callback(None)
        ids = {writes[number].result() for number in (0, 1, 3)}
        with pytest.raises(manager.Conflict, match="the fleet is full"):
            writes[4].result()
        assert writes[2].result() == writes[5].result() == ("late",)
        assert {agent.id for agent in server.manager.agents()[0]} == ids | {known.id}
        assert [entry.type for entry in server.manager.journal()] == [
            "agent_registered", "agent_registered", "agent_registered", "agent_updated", "agent_registered"]
        assert commits == ["COMMIT", "PRAGMA synchronous = FULL", "COMMIT"], "one for all"


def test_a_listener_added_before_a_shared_commit_is_called(server: Server) -> None:
    store, heard = server.manager.store, []

    def listen() -> None:
        with store.transaction():
            store.listeners.append(lambda: heard.append(1))
    with waiting_writers(server, lambda: server.manager.register(**AGENT), listen):
        assert not heard
    assert heard


def test_a_database_fault_fails_the_writers_of_a_shared_transaction_and_no_later_one(server: Server) -> None:
    agent, store = server.manager.register(**AGENT).agent, server.manager.store
    large = {**THREAT, "details": {"text": "x" * 500_000}}
    writes = [lambda: server.manager.retag(agent.id, tags=["a"]),
              lambda: server.manager.report_events(agent.id, [large]),
              lambda: server.manager.retag(agent.id, add_tags=["b"])]
    (pages,) = store.writer.execute("PRAGMA page_count").fetchone()
    with waiting_writers(server, *writes) as waiting:
        store.writer.execute(f"PRAGMA max_page_count = {pages + 50}")
    for each in waiting[:2]:
        with pytest.raises(manager.Unavailable, match="is full"):
            each.result()
    assert waiting[2].result().tags == ("b",)
    store.writer.execute("PRAGMA max_page_count = 1000000")
    server.clock.advance(1)
    for write in writes[:2]:
        write()
    assert server.manager.agent(agent.id).tags == ("a",)
    assert [type for type, _ in journal_of(server.manager)] == [
        "agent_updated", "agent_updated", "threats_reported"]


def test_writers_that_fail_again_and_again_do_not_delay_the_commit_of_another(server: Server) -> None:
    over = threading.Event()

    def register() -> None:
        server.manager.register(**AGENT)
        over.set()

    def fail() -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not over.is_set():
            assert time.monotonic() < deadline_s, "the commit is put off"
            with pytest.raises(manager.NotFound):
                server.manager.retag("nobody", tags=["a"])
    with waiting_writers(server, register, fail, fail, fail) as writes:
        pass
    for each in writes:
        each.result(LIMIT_S)


@pytest.fixture
def no_gc() -> Iterator[None]:
    """No garbage collection: what a signal handler raises in a callback of it, as Hypothesis has, is lost."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
def test_writers_that_share_a_commit_lose_nothing_while_signals_interrupt_another(server: Server) -> None:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt  # not an OSError: the product may handle that

    def write() -> int:
        written = 0
        while not over.is_set():
            with contextlib.suppress(manager.Unavailable):  # in the transaction that was interrupted
                with server.manager.store.transaction() as db:
                    db.execute("INSERT INTO probe VALUES (zeroblob(1))")
                written += 1
        return written
    before, over, interrupts = signal.signal(signal.SIGALRM, interrupt), threading.Event(), 0
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(write) for _ in range(3)]
        try:
            while interrupts < 300:
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.random() / 1000 + 1e-6)
                    while True:
                        with contextlib.suppress(manager.Unavailable), server.manager.store.transaction():
                            pass
                except KeyboardInterrupt:
                    interrupts += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            over.set()
        written = sum(each.result(LIMIT_S) for each in others)
    with server.manager.store.read() as db:
        assert db.execute("SELECT count(*) FROM probe").fetchone()[0] == written


@pytest.mark.usefixtures("no_gc")
def test_a_signal_that_raises_anywhere_in_a_write_leaves_the_next_one_its_turn(server: Server) -> None:
    def interrupt(number: int, frame: Any) -> None:
        raise InterruptedError
    before, interrupts = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        while interrupts < 1000:
            try:
                signal.setitimer(signal.ITIMER_REAL, random.random() / 20_000 + 1e-6)
                while True:
                    with server.manager.store.transaction(durable=False):
                        pass
            except InterruptedError:
                interrupts += 1
            with ThreadPoolExecutor(1) as other:
                other.submit(server.manager.store.probe).result(LIMIT_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_time_may_pass_within_a_transaction(server: Server, clock: ManualClock) -> None:
    with server.manager.store.transaction():
        for _ in range(700):  # enough that the timer would fold the log
            server.manager.register(**AGENT)
        clock.advance(1)
    assert server.manager.health() == (700, 700)


def test_an_agent_that_registers_while_another_writes_is_as_new_as_its_entry(
        server: Server, clock: ManualClock) -> None:
    manager_, store = server.manager, server.manager.store
    with ThreadPoolExecutor(1) as pool:
        with store.transaction():
            waiting = pool.submit(manager_.register, **AGENT)
            until_queued(server, 2)
            clock.advance(66)
        agent = waiting.result(LIMIT_S).agent
    assert agent.registered_ms == clock.now().wall_ms
    clock.advance(66)
    assert server.manager.agent(agent.id).status == "online" and not journal_of(manager_)
    clock.advance(0.001)
    assert [type for type, _ in journal_of(manager_)] == ["agent_stale"]


def test_heartbeats_to_a_locked_database_keep_nobody_waiting(server: Server) -> None:
    agent = Client(server).register()
    beat = ("POST", f"/api/agents/{agent['id']}/heartbeat", {"cpu": 1}, agent["token"])
    began = time.monotonic()
    with locked(server.manager.store.folder):
        answers = at_once(server, [beat] * 12)
        assert ask(port_of(server.url), "GET", "/health")[0] == 503, "a write has failed"
    assert {status for status, _ in answers} == {503}
    assert time.monotonic() - began < 10, "each waited for those before it"
    assert at_once(server, [beat])[0][0] == 200


def test_a_sweep_that_could_not_write_is_made_up_for(api: Client, server: Server, clock: ManualClock) -> None:
    agent = api.register()
    with locked(server.manager.store.folder):
        with pytest.raises(manager.Unavailable):
            clock.advance(100)
        assert api.get(f"/api/agents/{agent['id']}")["status"] == "stale"
    clock.advance(1)
    assert journal_of(server.manager) == [("agent_stale", 66_000)]


def test_an_outage_of_the_database_counts_against_no_agent() -> None:
    with fleet(heartbeat_timeout_ms=3000) as api:
        alive, dead = api.register(), api.register()
        advance(api, 1)
        with locked(api.server.manager.store.folder):
            for _ in range(20):
                api.call("POST", f"/api/agents/{alive['id']}/heartbeat", {}, token=alive["token"], status=503)
                with suppress(manager.Unavailable):
                    advance(api, 1)
                assert api.get("/api/agents?status=online"), "a read makes no agent stale either"
        api.beat(alive)
        advance(api, 1)
        assert [each["type"] for each in api.journal()] == ["agent_registered"] * 2 + ["silence_forgiven"]
        (entry,) = api.journal("silence_forgiven")
        assert (entry["cause"], entry["durationMs"]) == ("database_unavailable", 21_000)
        advance(api, 2.301)
        (stale,) = api.journal("agent_stale")
        assert stale["agentId"] == dead["id"], "the time before counts"


def test_a_database_locked_at_the_start_is_refused_in_one_sentence(tmp_path: Path, run_main: Any) -> None:
    with Server(port=0, data_dir=tmp_path) as server:
        server.manager.register(**AGENT)
    with locked(tmp_path):
        status, said = run_main("--port", 0, "--data-dir", tmp_path)
    assert status == 1
    one_sentence(said, "locked", str(tmp_path))


@contextlib.contextmanager
def limited_files(running: Running, folder: Path) -> Iterator[None]:
    """No file of the process may grow past what the log of the database has now."""
    largest = max(path.stat().st_size for path in folder.iterdir())
    _, hard = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (largest, hard))
    yield
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def full_disk(running: Running, folder: Path) -> Iterator[None]:
    """Another program has filled the disk."""
    filling = folder / "filling"
    with filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    yield
    filling.unlink()


def mount_disk(request: pytest.FixtureRequest, folder: Path, size: str) -> None:
    """Make `folder`, on a file system of its own, until the test is over."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(folder)], check=True))


@pytest.fixture(params=[limited_files, full_disk])
def cramped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A folder, and a way to fill its disk for a while."""
    folder = tmp_path / "data"
    if request.param is full_disk:
        mount_disk(request, folder, "1m")
    elif not hasattr(resource, "prlimit"):
        pytest.skip("only Linux limits another process")
    else:
        folder.mkdir()
    yield folder, request.param


def test_without_room_on_the_disk_writes_are_503_and_nothing_acknowledged_is_lost(
        cramped: tuple[Path, Any]) -> None:
    folder, no_room = cramped
    ids: list[str] = []
    with Running(folder, MANAGER_TLS="off", MANAGER_LOG_LEVEL="ERROR") as running:
        def register() -> int:
            status, body = running.ask("POST", "/api/agents/register", {**AGENT, "tags": ["x" * 64]})
            if status == 201:
                ids.append(body["data"]["id"])
            else:
                assert status == 503 and body["ok"] is False and str(folder) in body["error"], body
            return status
        for _ in range(3):
            assert register() == 201
        for _ in range(2):
            with no_room(running, folder):
                for _ in range(200):
                    if register() == 503:
                        break
                assert register() == 503
                status, body = running.ask("GET", "/health")
                assert status == 503 and body["data"]["status"] == "unhealthy" and body["ok"] is False
                status, body = running.ask("GET", "/api/agents")
                assert status == 200 and [each["id"] for each in body["data"]] == ids
            assert register() == 201
            until(lambda: running.ask("GET", "/health")[0] == 200, "the timer finds free space")
        assert "Traceback" not in running.log.read_text()
    with Running(folder, MANAGER_TLS="off") as running:
        assert [each["id"] for each in running.ask("GET", "/api/agents")[1]["data"]] == ids
        assert running.end() == 0
    assert pragma(folder / "manager.db", "integrity_check") == "ok"


def test_agents_that_report_without_end_do_not_fill_a_small_disk(
        request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    mount_disk(request, folder, "16m")
    events = {"events": [threat(sourceIp=f"10.0.{n // 250}.{n % 250}", padding="x" * 900)
                         for n in range(800)]}
    with Running(folder, MANAGER_TLS="off") as running:
        assert "MANAGER_MAX_DB_BYTES" in running.process.stdout.readline()
        agents = [running.ask("POST", "/api/agents/register", AGENT)[1]["data"] for _ in range(6)]

        def report_often(agent: dict[str, Any]) -> Counter[int]:
            path = f"/api/agents/{agent['id']}/events"
            return Counter(running.ask("POST", path, events)[0] for _ in range(12))
        with ThreadPoolExecutor(len(agents)) as pool:
            answered = sum(pool.map(report_often, agents), Counter[int]())
        assert answered.keys() == {201, 503}
        status, body = running.ask("GET", "/health")
        assert status == 200 and "disk" in body["data"]["warning"], "to be out of room is no fault"
        assert running.ask("POST", f"/api/agents/{agents[0]['id']}/heartbeat", {})[0] == 200
        assert running.ask("DELETE", f"/api/agents/{agents[1]['id']}")[0] == 200
        path = f"/api/agents/{agents[0]['id']}/events"
        until(lambda: running.ask("POST", path, {"events": [THREAT]})[0] == 201,
              "the oldest events make room for new ones")
        assert running.end() == 0
        assert "ERROR" not in running.log.read_text()


def test_a_disk_that_another_program_fills_for_a_while_costs_no_event(
        request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    mount_disk(request, folder, "16m")
    with Server(port=0, data_dir=folder, tls="off", clock=ManualClock()) as server:
        agent = server.manager.register(**AGENT).agent.id
        for _ in range(4):
            server.manager.report_events(agent, [threat(padding="x" * 900) for _ in range(800)])
            server.clock.advance(1)  # which empties the log
        with (folder / "filling").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 11 * 2**20)
        with pytest.raises(manager.Unavailable, match="disk"):
            server.manager.report_events(agent, [threat()])
        server.manager.heartbeat(agent)
        server.clock.advance(60)
        assert server.manager.census().threats == 3200
        (folder / "filling").unlink()
        assert len(server.manager.report_events(agent, [threat()])) == 1


@pytest.mark.parametrize(("stopped", "free_kib"), [("cleanly", 0), ("cleanly", 8), ("killed", 0)])
def test_a_start_without_room_on_the_disk_is_refused_in_one_sentence(
        stopped: str, free_kib: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    mount_disk(request, folder, "2m")
    with Running(folder, MANAGER_TLS="off") as running:
        if stopped == "cleanly":
            assert running.end() == 0
    with full_disk(running, folder):
        os.truncate(folder / "filling", max((folder / "filling").stat().st_size - free_kib * 1024, 0))
        done = subprocess.run([sys.executable, manager.__file__, "--port", "0", "--tls", "off",
                               "--data-dir", folder],
                              capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"panguard-manager: the disk of {folder} is full; free some space"


# Faults of the file and the disk


def test_a_use_case_that_fails_in_another_undoes_itself_only(by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, _ = by_hand
    with fleet.store.transaction():
        first = fleet.register(**AGENT).agent
        with pytest.raises(ZeroDivisionError), fleet.store.transaction():
            fleet.register(**AGENT)
            fleet.heartbeat(first.id)
            raise ZeroDivisionError
        fleet.heartbeat(first.id, cpu=5)
    assert [entry.agent_id for entry in fleet.journal()] == [first.id]
    assert fleet.agent(first.id).cpu == 5 and fleet.heartbeats == 1
    with pytest.raises(ZeroDivisionError), fleet.store.transaction():
        fleet.heartbeat(first.id, cpu=6)
        raise ZeroDivisionError
    assert fleet.agent(first.id).cpu == 5 and fleet.heartbeats == 1, "what is undone is not counted"


def test_heartbeats_that_could_not_be_committed_are_not_counted_as_answered(tmp_path: Path) -> None:
    with Running(tmp_path / "data", MANAGER_TLS="off", MANAGER_LOG_LEVEL="ERROR") as running:
        agent = running.ask("POST", "/api/agents/register", AGENT)[1]["data"]
        path = f"/api/agents/{agent['id']}/heartbeat"
        answered = Counter(running.ask("POST", path, {}, agent["token"])[0] for _ in range(3))
        with limited_files(running, tmp_path / "data"):
            while answered[503] < 3:
                answered[running.ask("POST", path, {}, agent["token"])[0]] += 1
                assert answered.total() < 10_000
        text = scraped(running)
        assert f"\npanguard_heartbeats_total {answered[200]}\n" in text
        counted = dict(re.findall(
            r'panguard_http_requests_total{[^}]*heartbeat[^}]*status="(\w+)"[^}]*} (\d+)', text))
        assert counted == {"2xx": str(answered[200]), "5xx": "3"}


@pytest.mark.parametrize("files", [["manager.db"], ["manager.db-wal"],
                                   ["manager.db", "manager.db-wal", "manager.db-shm"]],
                         ids=["database", "log", "all"])
@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_file_removed_or_replaced_is_noticed_within_a_second_and_nothing_is_written_on(
        files: list[str], replaced: bool, api: Client, server: Server, clock: ManualClock,
        tmp_path: Path) -> None:
    agent = api.register()
    folder = server.manager.store.folder
    for name in files:
        shutil.copy(folder / name, tmp_path / name)
        (folder / name).rename(tmp_path / f"{name}.kept")
        if replaced:
            shutil.copy(tmp_path / name, folder / name)
    with suppress(manager.Unavailable):
        clock.advance(1)
    for method, path, body in (
            ("GET", "/health", None), ("POST", "/api/agents/register", AGENT), ("GET", "/api/agents", None),
            ("POST", f"/api/agents/{agent['id']}/heartbeat", {})):
        answer = api.call(method, path, body, status=503)
        assert "removed or replaced" in answer.json["error"] and answer.headers["Retry-After"]
    assert replaced or not any((folder / name).exists() for name in files), "no reader makes an empty one"
    for name in files:
        (tmp_path / f"{name}.kept").replace(folder / name)
    clock.advance(1)
    assert api.get("/health")["agents"]["total"] == 1
    api.register()
    assert len(api.get("/api/agents")) == 2


def killed(folder: Path) -> str:
    """A folder whose manager was killed, and the id of the agent there."""
    with Running(folder, MANAGER_TLS="off") as running:
        return str(running.ask("POST", "/api/agents/register", AGENT)[1]["data"]["id"])


def test_a_log_without_its_database_refuses_the_start_and_is_kept(tmp_path: Path, run_main: Any) -> None:
    folder = tmp_path / "data"
    agent = killed(folder)
    assert run_main("backup", tmp_path / "backup", "--data-dir", folder)[0] == 0
    database, log = (folder / "manager.db").read_bytes(), (folder / "manager.db-wal").read_bytes()
    (folder / "manager.db").unlink()
    status, said = run_main("--port", 0, "--data-dir", folder)
    assert status == 1
    one_sentence(said, "manager.db is missing", "manager.db-wal", "backup")
    assert (folder / "manager.db-wal").read_bytes() == log and not (folder / "manager.db").exists()
    for back in (lambda: run_main("restore", tmp_path / "backup", "--yes", "--data-dir", folder),
                 lambda: (folder / "manager.db").write_bytes(database)):
        back()
        with Server(port=0, data_dir=folder) as server:
            assert server.manager.agent(agent).id == agent
        (folder / "manager.db").unlink()
        (folder / "manager.db-wal").write_bytes(log)


def test_a_database_made_in_a_folder_that_had_one_is_warned_about(tmp_path: Path) -> None:
    def warnings() -> list[str]:
        with Server(port=0, data_dir=tmp_path) as server:
            return [note for note in server.notes if "its manager.db is gone" in note]
    assert warnings() == []
    for path in tmp_path.glob("manager.db*"):
        path.unlink()
    (warning,) = warnings()
    assert str(tmp_path) in warning and "panguard-manager restore FILE" in warning
    assert warnings() == []


def test_a_second_manager_is_refused_although_the_lock_file_was_removed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with Running(folder, MANAGER_TLS="off") as running:
        (folder / "lock").unlink()
        other = subprocess.run([sys.executable, manager.__file__, "--port", "0", "--data-dir", folder],
                               text=True, capture_output=True, timeout=LIMIT_S, check=False)
        assert other.returncode == 1
        one_sentence(other.stderr, "another manager is running on", str(folder))
        assert running.ask("POST", "/api/agents/register", AGENT)[0] == 201


def test_a_manager_starts_after_a_power_cut_during_its_first_start(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "other", isolation_level=None)) as db:
        db.executescript("PRAGMA cache_size = 1; BEGIN; CREATE TABLE t (x); "
                         "INSERT INTO t VALUES (zeroblob(100000))")
        shutil.copy(tmp_path / "other-journal", tmp_path / "manager.db-journal")
    (tmp_path / "manager.db").write_bytes(bytes(1024))  # its size reached the disk, its contents did not
    with Server(port=0, data_dir=tmp_path, tls="off") as server:
        agent_id = server.manager.register(**AGENT).agent.id
    with Server(port=0, data_dir=tmp_path, tls="off") as server:
        assert server.manager.agent(agent_id)


def damage(path: Path, table: str = "agents") -> None:
    """Overwrite the first page of a table."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        db.execute("INSERT INTO probe VALUES ('')")
        db.commit()
        log = path.with_name("manager.db-wal").read_bytes()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)
    path.with_name("manager.db-wal").write_bytes(log)  # as a manager that was killed leaves it


def test_a_damaged_file_is_refused_after_an_unclean_stop(tmp_path: Path, run_main: Any) -> None:
    folder = tmp_path / "data"
    killed(folder)
    damage(folder / "manager.db")
    status, said = run_main("--port", 0, "--data-dir", folder)
    assert status == 1
    one_sentence(said, "damaged", "restore a backup")


def test_damage_in_a_large_file_is_found_in_the_background(tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    killed(folder)
    damage(folder / "manager.db", "threats")
    monkeypatch.setattr(Store, "check_at_start_bytes", -1)
    with Server(port=0, data_dir=folder) as server:
        assert "damaged" in until(lambda: server.manager.store.problem, "the check of an unclean stop")
        assert "restore a backup" in Client(server).call("GET", "/health", status=503).json["error"]


def test_a_damaged_row_is_said_in_a_sentence_and_makes_the_manager_unhealthy(
        api: Client, server: Server, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    api.register()
    with contextlib.closing(sqlite3.connect(server.manager.store.folder / "manager.db")) as db:
        db.execute("UPDATE journal SET data = '{'")
        db.commit()
    assert "damaged" in api.refusal("GET", "/api/events", status=503)
    clock.advance(1)
    assert "damaged" in api.call("GET", "/health", status=503).json["error"]
    assert "Traceback" not in caplog.text


def test_a_fault_is_logged_once_then_counted_and_logged_when_it_ends(
        api: Client, server: Server, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    with locked(server.manager.store.folder):
        for _ in range(11):
            api.call("POST", "/api/agents/register", AGENT, status=503)
    assert ["repeated 10 times" in line for line in caplog.messages] == [False, True]
    assert all("locked" in line for line in caplog.messages)
    api.call("GET", "/health", status=503)
    caplog.clear()
    clock.advance(1)
    assert [("works again" in line, "11 times" in line) for line in caplog.messages] == [(True, True)]
    assert api.get("/health")["status"] == "healthy"


def test_the_log_stays_short_whatever_is_written(api: Client, server: Server, clock: ManualClock) -> None:
    store = server.manager.store
    store.log_limit_bytes = limit = 2**18
    agent = api.register()
    longest = 0
    for _ in range(12):
        api.post(f"/api/agents/{agent['id']}/events", {"events": [
            {**THREAT, "details": {"text": "x" * 60_000}}] * 8}, status=201)
        longest = max(longest, store.log_bytes())
    assert longest < 4 * limit + 2**20
    clock.advance(1)
    assert store.log_bytes() <= limit
    assert f"panguard_write_ahead_log_bytes {store.log_bytes()}" in api.call("GET", "/metrics").text


@pytest.mark.parametrize(("broken", "named"), [("fcntl.lockf", "file locks"), ("mmap.mmap", "share memory")])
def test_a_file_system_that_lacks_what_is_needed_is_named(
        broken: str, named: str, tmp_path: Path, run_main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "Not supported")
    monkeypatch.setattr(broken, fail)
    status, said = run_main("--port", 0, "--data-dir", tmp_path)
    assert status == 1
    one_sentence(said, str(tmp_path), named, "choose another")


def test_a_read_only_folder_is_refused_in_one_sentence(tmp_path: Path, run_main: Any) -> None:
    with Server(port=0, data_dir=tmp_path):
        pass
    mount = ["mount", "--bind", str(tmp_path), str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path)], check=True, capture_output=True)
        status, said = run_main("--port", 0, "--data-dir", tmp_path)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert status == 1
    one_sentence(said, str(tmp_path), "cannot be written")


def test_an_entry_is_streamed_only_once_it_is_durable(by_hand: tuple[Manager, ManualClock],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    class Channel:
        backlog = 0
        text = ""

        def publish(self, data: bytes) -> bool:
            self.text += data.decode()
            return True

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    fleet, clock = by_hand
    fleet.register(**AGENT)
    streams, channel = manager.Streams(fleet), Channel()
    streams.open(None, {}).start(channel)
    clock.advance(67)
    with monkeypatch.context() as patch:
        patch.setattr(manager, "sync_path", fail)
        assert fleet.sweep() == 1
        with pytest.raises(manager.Unavailable):
            streams.pump()
        assert "agent_stale" not in channel.text
        assert fleet.store.problem
    streams.pump()
    assert "agent_stale" in channel.text


# Power cuts


SECTOR_BYTES = 512
TRACED = "open,openat,write,pwrite64,writev,pwritev,pwritev2,sendfile,copy_file_range,ftruncate,truncate," \
         "fallocate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,link," \
         "linkat,sendto"


class Kept:
    """A file or a folder: `synced` is on the disk for sure, `written` since the last sync, as (turn, offset,
    bytes). None instead of bytes: the size changed to the offset."""

    def __init__(self, folder: bool = False) -> None:
        self.folder = folder
        self.synced = bytearray()
        self.written: list[tuple[int, int, bytes | None]] = []
        self.position = 0  # of the next write that names no offset

    def contents(self, survives: Callable[[int], bool]) -> bytes:
        """What was synced, and what survives of each sector written since."""
        found = bytearray(self.synced)
        for turn, offset, data in self.written:
            if data is None and survives(turn):
                del found[offset:]
                found.extend(bytes(offset - len(found)))
            for start in range(0, len(data or b""), SECTOR_BYTES):
                if survives(turn):
                    sector, at = data[start:start + SECTOR_BYTES], offset + start
                    found.extend(bytes(max(0, at - len(found))))
                    found[at:at + len(sector)] = sector
        return bytes(found)


class Disk:
    """A folder as a power cut leaves it, at any system call that `strace` saw: all that was synced, and some
    of the rest. The names in a folder are synced with the folder. `turn` counts the system calls so far.
    `marks` are the lines written to the file `marks`, and the notifications that were posted."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)
        self.names: dict[bytes, Kept] = {b"": Kept(folder=True)}  # by their paths below the root
        for path in sorted(root.rglob("*")):
            found = self.names[os.fsencode(path)[len(self.root):]] = Kept(path.is_dir())
            found.synced += b"" if found.folder else path.read_bytes()
        self.synced = dict(self.names)
        self.changed: list[tuple[int, dict[bytes, Kept | None]]] = []  # names, since their folder was synced
        self.marks: list[Any] = []
        self.turn = 0

    def left(self, survives: Callable[[int], bool]) -> dict[str, bytes | None]:
        """Each file with its contents, each folder with None; `survives(turn)` decides on each change."""
        names = dict(self.synced)
        for turn, changes in self.changed:
            if survives(turn):
                names |= changes
        left: dict[str, bytes | None] = {"": None}
        for path, found in sorted(names.items()):
            if found and left.get(path.rpartition(b"/")[0].decode(), b"") is None:  # its folder is there
                left[path.decode()] = None if found.folder else found.contents(survives)
        return left

    def replay(self, trace: Path) -> Iterator[None]:
        """Repeat the calls of the trace. Yields before each sync, and at the end."""
        begun: dict[bytes, tuple[bytes, int]] = {}  # by thread: its call, and the turn at its begin
        for line in trace.read_bytes().splitlines():
            thread, text = line.split(None, 1)
            if text.endswith(b" <unfinished ...>"):
                begun[thread] = text.removesuffix(b" <unfinished ...>"), self.turn
                continue
            began = self.turn
            if resumed := re.match(rb"<\.\.\. \w+ resumed>", text):
                start, began = begun.pop(thread)
                text = start + text[resumed.end():]
            call = re.fullmatch(rb"(\w+)\((.*)\) += (\d+).*", text)  # a failed call does not match
            if call and b">(deleted)" not in call[2]:
                words = [bytes.fromhex(word[1:-1].decode().replace("\\x", ""))
                         for word in re.findall(rb'"[^"]*"|<[^>]*>', call[2])]
                name = call[1].decode().removesuffix("2")
                if name == "sendto" and words[-1].startswith(b'{"type":"panguard.notification"'):
                    self.marks.append({"posted": words[-1].decode()})
                if name.endswith("at"):  # before each path is the folder to which it is relative
                    words = [os.path.join(*pair) for pair in zip(words[::2], words[1::2], strict=True)]
                paths = words[:1] if "write" in name else words
                if any(word == self.root or word.startswith(self.root + b"/") for word in paths):
                    if name.endswith("sync"):
                        yield
                    self.turn += 1
                    self._do(name.removesuffix("at"), call[2], words, int(call[3]), began)
        yield

    def _do(self, name: str, given: bytes, words: list[bytes], result: int, began: int) -> None:
        path, *others = (word.removeprefix(self.root) for word in words)
        found = self.names.get(path)
        if name in ("mkdir", "unlink", "rmdir", "rename") or (found is None and b"O_CREAT" in given):
            made = None if name in ("unlink", "rmdir") else found or Kept(folder=name == "mkdir")
            changes = {path: None, others[0]: made} if name == "rename" else {path: made}
            self.changed.append((self.turn, changes))
            self.names = {each: kept for each, kept in (self.names | changes).items() if kept}
        elif name == "open":
            assert found, words
            found.position = 0
            if b"O_TRUNC" in given:
                found.written.append((self.turn, 0, None))
        elif name.endswith("sync"):
            self._sync(path, began)
        elif path == b"/marks":
            self.marks.append(json.loads(others[0]))
        else:
            assert found and name in ("write", "pwrite64", "ftruncate", "sendfile"), (name, words)
            last = int(given.rpartition(b", ")[2])
            if name == "sendfile":
                others = [self.names[others[0]].contents(lambda _: True)[found.position:][:result]]
            found.written.append((self.turn, found.position if name in ("write", "sendfile") else last,
                                  None if name == "ftruncate" else others[0][:result]))
            found.position += result

    def _sync(self, path: bytes, began: int) -> None:
        found = self.names[path]
        for turn, changes in self.changed if found.folder else ():
            for each in [each for each in changes if each.rpartition(b"/")[0] == path and turn <= began]:
                kept = changes.pop(each)
                self.synced |= {each: kept} if kept else {}
                if kept is None:
                    self.synced.pop(each, None)
        found.synced[:] = found.contents(lambda turn: turn <= began)
        found.written = [each for each in found.written if each[0] > began]


class Cut(NamedTuple):
    """A folder after a power cut, and what its TracedRun marked before the cut, and after it."""

    root: Path
    said: list[Any]
    later: list[Any]
    whole: bool  # everything written survived, as if only the process was killed

    @property
    def folder(self) -> Path:
        return self.root / "home" / "data"

    def serving(self, **settings: Any) -> Server[ManualClock]:
        """A manager on this folder, at the time of the cut."""
        clock = ManualClock(max([START_MS / 1000, *(each.get("at_s", 0) for each in self.said)]))
        return Server(port=0, **{"clock": clock, "data_dir": self.folder, "tls": "off", **settings})

    def possible(self) -> list[Any]:
        """The allowed states: the last one answered, those not synced since, and the one being written."""
        before, after = ([each for each in said if "held" in each] for said in (self.said, self.later))
        answered = [number for number, each in enumerate(before) if not each["under_way"]]
        more = list(itertools.takewhile(lambda each: each["under_way"], after))
        return before[answered[-1]:] + after[:len(more) + 1] if answered else []


@functools.lru_cache
def may_trace() -> bool:
    return bool(shutil.which("strace")) and not subprocess.run(["strace", "-o", "/dev/null", "true"],
                                                               capture_output=True, check=False).returncode


def nothing(turn: int) -> bool:
    return False


def everything(turn: int) -> bool:
    return True


def some(seed: int, turn: int, most: int) -> Iterator[Callable[[int], bool]]:
    """Survivors, `most` times two: all that was written up to a turn, and a random half of all."""
    chance = random.Random(seed)
    for limit in (chance.randint(max(0, turn - 40), turn) for _ in range(most)):
        yield lambda turn, limit=limit: turn <= limit
        yield lambda turn: chance.random() < 0.5


def power_cuts(root: Path, work: Callable[[TracedRun], None], most: int, *given: str) -> Iterator[Cut]:
    """Let a manager work, and cut the power before each sync and at the end: once nothing survives that was
    not synced, and `most` times some of it does. No cut is made after a sync: what it could lose, the cut
    before the next sync can lose too."""
    if not may_trace():
        pytest.skip("needs strace, and the right to trace")
    trace, after = root.with_suffix(".trace"), root.with_suffix(".after")
    (root / "marks").touch()
    disk, whole = Disk(root), Disk(root)
    subprocess.run(["strace", "-f", "-y", "-xx", "-s", str(2**24), "--seccomp-bpf", "-o", trace, "-e", TRACED,
                    sys.executable, "-c",
                    f"import sys, test_manager as t; t.{work.__name__}(t.TracedRun(*sys.argv[1:]))", root,
                    *given], cwd=Path(__file__).parent, check=True, timeout=LIMIT_S)
    for _ in whole.replay(trace):
        pass
    seen = set()
    for number, _ in enumerate(disk.replay(trace)):
        for way in [nothing, *random.Random(number).sample(
                [everything, *some(number, disk.turn, most)], most)]:
            left = disk.left(way)
            known = hash(frozenset(left.items())), len(disk.marks)
            if known in seen:
                continue
            seen.add(known)
            shutil.rmtree(after, ignore_errors=True)
            for path, data in left.items():
                made = Path(f"{after}{path}")
                made.mkdir(mode=0o700) if data is None else made.write_bytes(data)
            yield Cut(after, disk.marks[:], whole.marks[len(disk.marks):], way is everything)


class TracedRun:
    """A manager in a process that `strace` watches. It writes to the file `marks` what was answered."""

    def __init__(self, root: str, *given: str) -> None:
        self.root, self.given, self.folder = Path(root), given, Path(root, "home", "data")
        self.clock = ManualClock()
        self.tokens: dict[str, str] = {}  # by agent: its latest token
        self._marks = (self.root / "marks").open("ab", buffering=0)

    def mark(self, **said: Any) -> None:
        """Add a line to `marks`; `at_s` is the time of the clock."""
        self._marks.write(json.dumps({**said, "at_s": self.clock.now().wall_ms / 1000}).encode() + b"\n")

    def serving(self, **settings: Any) -> Server[ManualClock]:
        return Server(port=0, **{"clock": self.clock, "data_dir": self.folder, "tls": "off", **settings})

    def answered(self, api: Client, *, under_way: bool = False) -> None:
        """Mark what the manager holds: it was answered, or with `under_way` a power cut may still undo it."""
        self.mark(held=promised(api), under_way=under_way, tokens=self.tokens,
                  beats={each["id"]: each["cpu"] for each in api.get("/api/agents?detail=true")})

    @contextlib.contextmanager
    def following(self, server: Server[Any]) -> Iterator[Callable[[], None]]:
        """Mark what a stream sends; the function waits until it has sent the whole journal."""
        heard = [0]

        def follow() -> None:
            for entry in entries_of(stream):
                self.mark(streamed=entry)
                heard[0] = entry["seq"]

        with open_stream(server.url, server.token) as stream:
            reader = threading.Thread(target=follow)
            reader.start()
            yield lambda: until(lambda: heard[0] >= server.manager.last_seq(), "the stream has given all")
            server.stop()
            reader.join()

    def register(self, api: Client, status: int = 201, **how: Any) -> Any:
        body = {name: how.pop(name) for name in set(how) - {"token"}}
        agent = api.post("/api/agents/register", {**AGENT, **body}, status=status, **how)
        self.tokens[agent["id"]] = agent["token"]
        self.answered(api)
        return agent

    def change(self, api: Client, method: str, path: str, body: Any = None, **how: Any) -> Any:
        answer = api.call(method, path, body, **how)
        self.answered(api)
        return answer.json.get("data")


def promised(api: Client) -> dict[str, Any]:
    """What a power cut must not undo once it was answered."""
    kept = "id", "hostname", "ip", "os", "tags", "org_id", "machine_id", "registeredAt", "activePolicyVersion"
    return {"agents": [[each[name] for name in kept] for each in api.get("/api/agents?detail=true")],
            **{path: api.get(path) for path in ("/api/threats", "/api/policy", "/api/policy/active",
                                                "/api/enroll-tokens")}}


def make_every_change(run: TracedRun) -> None:
    """Every write that an operator or an agent can cause."""
    with run.serving(open_enrollment=True) as server:
        api = Client(server)
        run.answered(api)
        one, two = (run.register(api, machine_id=f"m{number}", org_id="o") for number in range(2))
        run.register(api, token=None)
        api.beat(one, cpu=1)
        run.answered(api)
        again = run.register(api, 200, machine_id="m1", org_id="o", hostname="web-2")
        api.beat(again, cpu=2)
        run.answered(api)
        events = [{**THREAT, "id": f"e{number}"} for number in range(3)]
        for batch in (events[:2], events[1:], [{**THREAT, "details": {"text": "x" * 20_000}}]):
            found = run.change(api, "POST", f"/api/agents/{one['id']}/events", {"events": batch},
                               token=one["token"], status=201)
        for state in ("acknowledged", "false_positive"):
            run.change(api, "PATCH", f"/api/threats/{found['eventIds'][0]}", {"state": state, "note": "seen"})
        for scope in ({}, {"org_id": "o"}, {"agent_id": two["id"]}):
            run.change(api, "POST", "/api/policy", {"name": "p", "rules": [RULE], **scope}, status=201)
        run.change(api, "GET", f"/api/policy/agent/{one['id']}", token=one["token"])
        run.change(api, "DELETE", f"/api/policy/agent/{two['id']}")
        run.change(api, "PATCH", f"/api/agents/{one['id']}", {"addTags": ["a"]})
        for change in ({"addTags": ["b"]}, {"removeTags": ["a"]}):
            run.change(api, "POST", "/api/agents/bulk",
                       {"filter": {"org_id": "o"}, "dryRun": False, **change})
        issued = run.change(api, "POST", "/api/enroll-tokens", {"maxUses": 2, "tags": ["new"]}, status=201)
        run.register(api, token=issued["token"])
        run.change(api, "DELETE", f"/api/enroll-tokens/{issued['id']}")
        run.change(api, "DELETE", f"/api/agents/{two['id']}")
        run.change(api, "POST", "/api/agents/bulk",
                   {"filter": {"tag": ["new"]}, "deregister": True, "dryRun": False})


def let_time_pass(run: TracedRun) -> None:
    """Silence, copying of the log, retention, a stop and a start, with a stream open."""
    settings = {"threat_retention_ms": 86_400_000, "journal_retention_ms": 86_400_000}
    for _ in range(2):
        with run.serving(**settings) as server, run.following(server) as all_streamed:
            server.manager.store.log_limit_bytes = 2**16
            api = Client(server)
            agents = [run.register(api) for _ in range(2)]
            for seconds in (66.5, 300):
                run.clock.advance(seconds)  # some fall silent
                all_streamed()
                run.change(api, "POST", f"/api/agents/{agents[0]['id']}/events",
                           {"events": [{**THREAT, "details": {"text": "x" * 60_000}}]},
                           token=agents[0]["token"], status=201)
                api.beat(agents[0], cpu=1)
                run.answered(api)
                run.clock.advance(1)  # the log is copied
                api.beat(agents[0], cpu=2)
                run.answered(api)
            run.mark(purging=True)
            run.clock.advance(2 * 86_400)
            run.answered(api, under_way=True)
            run.change(api, "PATCH", f"/api/agents/{agents[0]['id']}", {"addTags": ["a"]})
            all_streamed()


def hold(cut: Cut, api: Client) -> None:
    """Assert that nothing is missing that was answered and synced."""
    possible, found = cut.possible(), promised(api)
    if possible:
        assert found in [each["held"] for each in possible]
        if cut.whole:
            beats = {each["id"]: each["cpu"] for each in api.get("/api/agents?detail=true")}
            assert (found, beats) in [(each["held"], each["beats"]) for each in possible]
        for agent_id, *_ in found["agents"]:
            if agent_id in possible[0]["tokens"]:
                api.get(f"/api/policy/agent/{agent_id}?ack=false", token=possible[0]["tokens"][agent_id])
    journal = {each["seq"]: each for each in api.get("/api/events?limit=200")}
    streamed = {each["streamed"]["seq"]: each["streamed"] for each in cut.said if "streamed" in each}
    purging = any("purging" in each for each in cut.said)
    missing = [seq for seq in streamed if seq not in journal]
    assert not missing or (purging and max(missing) < min(journal)), "a streamed entry is lost"
    assert {seq: journal.get(seq, entry) for seq, entry in streamed.items()} == streamed
    started = api.journal("manager_started")[-1]["seq"]
    assert started > max(streamed, default=0), "a number was given twice"


SOME_CUTS = [1, pytest.param(8, marks=pytest.mark.slow)]
MANY_CUTS = [pytest.param(4, marks=pytest.mark.slow)]


@pytest.mark.parametrize("most", SOME_CUTS)
@pytest.mark.parametrize("work", [make_every_change, pytest.param(let_time_pass, marks=pytest.mark.slow)])
def test_a_power_cut_loses_no_synced_write_that_was_answered(
        work: Callable[[TracedRun], None], most: int, tmp_path: Path) -> None:
    root = tmp_path / "disk"
    (root / "home" / "data").mkdir(parents=True, mode=0o700)
    for cut in power_cuts(root, work, most):
        with cut.serving(open_enrollment=True) as server:
            hold(cut, Client(server))
        manager.examine(cut.folder / "manager.db")


def write_at_once(run: TracedRun) -> None:
    """Many writers at once, which share commits, and heartbeats, which are not synced."""
    with run.serving() as server:
        store, kept = server.manager.store, Client(server).register()

        def work(number: int) -> None:
            api = Client(server)
            for _ in range(4):
                agent = api.register()
                run.mark(agent=agent["id"])
                run.mark(events=report(api, agent, THREAT))
                api.beat(kept)
        with ThreadPoolExecutor(6) as pool:
            with store.transaction():  # all of them wait for it
                jobs = [pool.submit(work, number) for number in range(6)]
                until_queued(server, 7)
            for job in jobs:
                job.result()


@pytest.mark.parametrize("most", SOME_CUTS)
def test_a_power_cut_loses_no_answered_write_of_a_shared_commit(most: int, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for cut in power_cuts(tmp_path / "disk", write_at_once, most):
        with cut.serving() as server:
            api = Client(server)
            found = {each["id"] for path in ("agents", "threats")
                     for each in api.get(f"/api/{path}?limit=200")}
        assert {each["agent"] for each in cut.said if "agent" in each} <= found
        assert {event for each in cut.said for event in each.get("events", ())} <= found
        manager.examine(cut.folder / "manager.db")


def start_first(run: TracedRun) -> None:
    """A first start, which makes the folder's files."""
    with run.serving(tls="auto") as server:
        run.mark(token=server.token, fingerprint=server.certificate[1])


@pytest.mark.parametrize("most", SOME_CUTS)
def test_a_power_cut_in_the_first_start_keeps_the_token_and_certificate(most: int, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for cut in power_cuts(tmp_path / "disk", start_first, most):
        with cut.serving(tls="auto") as server:
            for said in cut.said:
                assert (server.token, server.certificate[1]) == (said["token"], said["fingerprint"])


def start_upgraded(run: TracedRun) -> None:
    """A start that migrates."""
    with run.serving() as server:
        run.tokens["agent-00000001"] = "secret"
        run.register(Client(server))


@pytest.mark.parametrize("most", MANY_CUTS)
def test_a_power_cut_during_an_upgrade_loses_nothing(most: int, tmp_path: Path) -> None:
    folder = tmp_path / "disk" / "home" / "data"
    folder.mkdir(parents=True, mode=0o700)
    old_file(folder / "manager.db", "1a03308")
    before = sqlite_dump(folder / "manager.db")
    for cut in power_cuts(tmp_path / "disk", start_upgraded, most):
        with cut.serving() as server:
            api = Client(server)
            hold(cut, api)
            api.beat({"id": "agent-00000001", "token": "secret"})
        manager.examine(cut.folder / "manager.db")
        assert sqlite_dump(cut.folder / "manager.db.schema-1") == before


def back_up_and_restore(run: TracedRun) -> None:
    """A backup, a change, the backup restored in its place, and elsewhere."""
    kept = run.root / "kept" / "backup"
    with run.serving() as server:
        api = Client(server)
        run.register(api)
        assert main(["backup", str(kept), "--data-dir", str(run.folder)]) == 0
        run.mark(backup=promised(api))
        held, tokens = promised(api), dict(run.tokens)
        run.register(api)
    for folder in (run.folder, run.root / "new" / "data"):
        assert main(["restore", str(kept), "--data-dir", str(folder), "--yes"]) == 0
        if folder == run.folder:
            run.mark(held=held, under_way=False, tokens=tokens, beats={agent: None for agent in tokens})
    run.mark(elsewhere=True)


@pytest.mark.parametrize("most", MANY_CUTS)
def test_a_power_cut_during_a_backup_or_a_restore_leaves_the_old_or_the_new_state(most: int, tmp_path: Path,
                                                                                   shell: Any) -> None:
    for folder in ("home/data", "kept"):
        (tmp_path / "disk" / folder).mkdir(parents=True, mode=0o700)
    for cut in power_cuts(tmp_path / "disk", back_up_and_restore, most):
        kept = cut.root / "kept" / "backup"
        held = [each["backup"] for each in cut.said if "backup" in each]
        if (cut.folder / "restore-unfinished").exists():
            with pytest.raises(StartError, match="a restore was cut short"):
                cut.serving().start()
            assert shell("restore", kept, "--data-dir", cut.folder, "--yes")[0] == 0
        with cut.serving() as server:
            hold(cut, Client(server))
        manager.examine(cut.folder / "manager.db")
        if any("elsewhere" in each for each in cut.said):
            with cut.serving(data_dir=cut.root / "new" / "data") as server:
                assert promised(Client(server)) == held[0]
        elif held:
            (tmp_path / "unpacked").mkdir()
            assert manager.unpack(kept, tmp_path / "unpacked")["agents"] == 1
            shutil.rmtree(tmp_path / "unpacked")


def notify_twice(run: TracedRun) -> None:
    """Two notifications, to a receiver in another process."""
    with run.serving(notify_url=run.given[0], notify_delay_ms=1000) as server:
        api = Client(server)
        for number in range(2):
            report(api, run.register(api, hostname=f"told-{number}"), threat(sourceIp=f"203.0.113.{number}"))
            run.mark(reported=f"told-{number}")
            for _ in range(2):
                run.clock.advance(1)
            line = f"\npanguard_notifications_delivered_total {number + 1}\n"
            until(lambda line=line: line in scraped(server), "it was delivered")
            run.mark(delivered=f"told-{number}")


@pytest.mark.parametrize("most", SOME_CUTS)
def test_a_power_cut_loses_no_notification_and_repeats_no_delivered_one(most: int, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with Receiving() as receiver:
        for cut in power_cuts(tmp_path / "disk", notify_twice, most, receiver.url):
            before = len(receiver.heard)
            with cut.serving(notify_url=receiver.url, notify_delay_ms=1000) as server:
                api = Client(server)
                for _ in range(2):
                    advance(api, 1)
                report(api, api.register(hostname="last"), threat(sourceIp="203.0.113.9"))
                for _ in range(2):
                    advance(api, 1)
                until(lambda before=before: "last" in "".join(receiver.texts()[before:]), "the last one came")
            texts = "".join(receiver.texts()[before:])
            delivered = [each["delivered"] for each in cut.said if "delivered" in each]
            assert not [name for name in delivered if name in texts], "notified twice"
            texts += "".join(each["posted"] for each in cut.said if "posted" in each)
            assert not [each["reported"] for each in cut.said
                        if each.get("reported", "") not in texts], "not notified"


def test_what_is_kept_is_for_the_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        for folder in (tmp_path / "new" / "data", tmp_path / "old"):
            with Server(port=0, data_dir=folder) as server:
                server.manager.register(**AGENT)
                modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
                assert modes.keys() >= {"manager.db", "manager.db-wal", "token", "key.pem"}
                assert {name for name, mode in modes.items() if mode != 0o600} <= {"lock", "cert.pem"}
        assert stat.S_IMODE((tmp_path / "new" / "data").stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_an_embedded_manager_leaves_no_file_behind() -> None:
    with Server(port=0) as server:
        folder = server.manager.store.folder
        server.manager.register(**AGENT)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


def test_everything_is_kept_over_a_restart(tmp_path: Path) -> None:
    types = urlencode([("type", each) for each in manager.ENTRY_TYPES if not each.startswith("manager_")])

    def pictures(api: Client) -> dict[str, Any]:
        paths = ["/api/agents", "/api/agents?org_id=o&tag=b", "/api/threats", "/api/threats/summary",
                 "/api/policy", "/api/policy/active", "/api/policy/active?org_id=o", "/api/overview",
                 f"/api/events?limit=200&{types}"]
        for agent in agents:
            paths += [f"/api/agents/{agent['id']}", f"/api/policy/agent/{agent['id']}?ack=false"]
        return {path: api.get(path) for path in paths}

    with Server(port=0, clock=ManualClock(), data_dir=tmp_path) as server:
        api = Client(server)
        agents = [api.register(hostname=f"h{number}", org_id="o" if number else None, tags=["b", "a"],
                               machine_id=f"m{number}") for number in range(3)]
        gone = api.register()
        for agent in (*agents, gone):
            api.beat(agent, uptime=86_400, cpu=12.5, memory=45.2, version="1.3.0")
            api.post(f"/api/agents/{agent['id']}/events", {"events": [{**THREAT, "id": "e1"}]}, status=201)
        for scope in ({}, {"org_id": "o"}, {"agent_id": agents[1]["id"]}, {"agent_id": agents[2]["id"]}):
            api.post("/api/policy", {"name": "p", "rules": [RULE], **scope}, status=201)
        api.call("DELETE", f"/api/policy/agent/{agents[2]['id']}")
        api.get(f"/api/policy/agent/{agents[1]['id']}", token=agents[1]["token"])
        api.call("PATCH", f"/api/agents/{agents[1]['id']}", {"addTags": ["c"]})
        api.call("DELETE", f"/api/agents/{gone['id']}")
        before, token = pictures(api), server.token
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path) as server:
        api = Client(server)
        assert server.token == token
        assert pictures(api) == before
        assert [api.beat(agent)["pendingPolicies"] for agent in agents] == [1, 0, 3]
        api.refusal("POST", f"/api/agents/{gone['id']}/heartbeat", {}, token=gone["token"], status=401)
        api.refusal("GET", f"/api/agents/{gone['id']}", status=404)
        path = f"/api/agents/{agents[0]['id']}/events"
        again = api.post(path, {"events": [{**THREAT, "id": "e1"}]}, status=201)
        assert again["eventIds"][0] in [each["id"] for each in before["/api/threats"]]
        assert api.post("/api/policy", {"name": "p", "rules": [RULE]}, status=201)["version"] == "v6"
        last = before[f"/api/events?limit=200&{types}"][-1]["seq"]  # then a stop, a start, the new version
        assert api.journal()[-1]["seq"] == last + 3


# 5  Manager ###########################################################################################


def test_a_holder_of_an_agents_token_registers_it_again(api: Client, clock: ManualClock) -> None:
    first = api.register(tags=["a", "b"], org_id="o", ip="192.0.2.1")
    api.beat(first, cpu=7, uptime=3)
    clock.advance(10)
    again = api.post("/api/agents/register", {**AGENT, "hostname": "web-2", "version": "1.3.0"},
                     token=first["token"])
    assert (again["id"], again["tags"], again["org_id"]) == (first["id"], ["a", "b"], "o")
    assert (again["hostname"], again["version"], again["status"]) == ("web-2", "1.3.0", "online")
    assert again["registeredAt"] == first["registeredAt"] and again["token"] != first["token"]
    assert api.beat(first)["id"] == first["id"], "the former token works until the new one is used"
    assert api.beat(again)["id"] == first["id"]
    api.refusal("POST", f"/api/agents/{first['id']}/heartbeat", {}, token=first["token"], status=401)
    detail = api.get(f"/api/agents/{first['id']}")
    assert (detail["cpu"], detail["uptime"], detail["ip"]) == (7, 3, "198.51.100.7")
    assert len(api.get("/api/agents")) == 1
    renewed = api.post("/api/agents/register", {**AGENT, "tags": []}, token=again["token"])
    assert renewed["tags"] == []


@pytest.mark.parametrize(("silent_s", "org_id", "caller", "same"), [
    (67, "o", "admin", True), (1000, "o", "admin", True), (67, "o", "enroller", True),
    (66, "o", "admin", False), (0, "o", "enroller", False),
    (1000, "other", "admin", False), (1000, None, "admin", False)])
def test_a_machine_whose_agent_was_heard_is_registered_again_once_it_is_silent(
        silent_s: float, org_id: str | None, caller: str, same: bool) -> None:
    with Server(port=0, clock=ManualClock(), enroll_token="join") as server:
        api = Client(server)
        first = api.register(machine_id="m", org_id="o", tags=["a"])
        api.beat(first, cpu=7)
        server.clock.advance(silent_s)
        how = {"token": "join" if caller == "enroller" else "admin", "status": 200 if same else 201}
        again = api.post("/api/agents/register", {**AGENT, "machine_id": "m", "org_id": org_id}, **how)
        assert (again["id"] == first["id"]) is same
        assert again["machine_id"] == "m" and again["status"] == "online"
        assert api.get(f"/api/agents/{again['id']}")["cpu"] == (7 if same else None)
        assert again["tags"] == (["a"] if same else [])
        assert again["token"] != first["token"]
        api.beat(again)
        path = f"/api/agents/{first['id']}/heartbeat"
        api.call("POST", path, {}, token=first["token"], status=401 if same else 200)
        conflicts = api.journal("identity_conflict")
        assert [entry["agentId"] for entry in conflicts] == (
            [again["id"]] if not same and org_id == "o" else [])
        assert len(api.get("/api/agents")) == 2 - same
        if same:
            server.clock.advance(67)
            tagged = api.post("/api/agents/register",
                              {**AGENT, "machine_id": "m", "org_id": "o", "tags": ["z"]})
            assert tagged["id"] == first["id"] and tagged["tags"] == ["z"]


@pytest.mark.parametrize("restart", [False, True], ids=["lost reply", "restart"])
@pytest.mark.parametrize("heard", ["", "heartbeat", "events"])
@pytest.mark.parametrize("caller", ["admin", "enroller"])
def test_an_online_agent_registers_again_by_machine_id_if_not_heard_since(
        caller: str, heard: str, restart: bool, tmp_path: Path) -> None:
    """Contract, rule 3: since its last registration, or since this manager started."""
    def register(api: Client, status: int) -> Any:
        token = {"admin": "admin", "enroller": "join"}[caller]
        return api.post("/api/agents/register", {**AGENT, "machine_id": "m"}, token=token, status=status)

    server = Server(port=0, clock=ManualClock(), data_dir=tmp_path, tls="off", enroll_token="join")
    with server:
        api = Client(server)
        first = register(api, 201)
        again = register(api, 200)
        assert again["id"] == first["id"] and not api.journal("identity_conflict")
        body = {"events": [THREAT]} if heard == "events" else {}
        if heard:  # with the admin's token, as the published page has agents do
            api.call("POST", f"/api/agents/{first['id']}/{heard}", body,
                     status=201 if heard == "events" else 200)
        if not restart:
            last = register(api, 201 if heard else 200)
            assert (last["id"] == first["id"]) is (not heard)
            assert len(api.journal("identity_conflict")) == bool(heard)
    if restart:
        with server:
            api = Client(server)
            last = register(api, 200)
            assert last["id"] == first["id"]
            api.beat(first)
            api.beat(last)
            register(api, 201)
            assert len(api.journal("identity_conflict")) == 1


def test_a_whole_fleet_that_registers_again_after_a_restart_keeps_its_ids(tmp_path: Path) -> None:
    server = Server(port=0, clock=ManualClock(), data_dir=tmp_path, tls="off")
    ids = []
    for _ in range(2):
        with server:
            fleet = server.manager
            ids.append([fleet.register(**AGENT, machine_id=f"m{n}").agent.id for n in range(100)])
            for agent_id in ids[-1]:
                fleet.heartbeat(agent_id)
    assert ids[0] == ids[1]


def test_a_lost_reply_to_registering_again_locks_no_agent_out(api: Client, clock: ManualClock) -> None:
    first = api.register(machine_id="m")
    api.beat(first)
    clock.advance(67)
    for caller in ("admin", first["token"], "admin"):
        lost = api.post("/api/agents/register", {**AGENT, "machine_id": "m"}, token=caller)
        assert lost["id"] == first["id"]
        if caller == "admin":
            clock.advance(67)
    latest = api.post("/api/agents/register", {**AGENT, "machine_id": "m"}, token=first["token"])
    api.refusal("GET", f"/api/agents/{first['id']}", token=lost["token"], status=401)
    api.beat(first)
    assert api.get(f"/api/agents/{first['id']}", token=latest["token"])["id"] == first["id"], "a first use"
    api.refusal("POST", f"/api/agents/{first['id']}/heartbeat", {}, token=first["token"], status=401)
    api.beat(latest)
    assert not api.journal("identity_conflict")


def test_registering_again_is_journalled_with_both_addresses_under_the_agents_own_org(api: Client) -> None:
    first = api.register(org_id="o", machine_id="m", ip="192.0.2.1")
    again = api.post("/api/agents/register",
                     {**AGENT, "hostname": "web-2", "org_id": "other", "machine_id": "n"},
                     token=first["token"])
    assert (again["org_id"], again["machine_id"]) == ("o", "m")
    assert len(api.journal("agent_registered")) == 1
    (entry,) = api.journal("agent_reregistered")
    assert (entry["org_id"], entry["agentId"], entry["actor"]["role"]) == ("o", first["id"], "agent")
    assert {"hostname": "web-2", "formerHostname": "web-1", "ip": "198.51.100.7",
            "formerIp": "192.0.2.1"}.items() <= entry.items()


def test_with_reenroll_off_only_an_admin_or_the_agent_itself_registers_it_again() -> None:
    with Server(port=0, clock=ManualClock(), enroll_token="join", reenroll=False) as server:
        api = Client(server)
        body = {**AGENT, "machine_id": "m"}
        first = api.post("/api/agents/register", body, token="join", status=201)
        for silent_s in (0, 1000):
            server.clock.advance(silent_s)
            before = api.journal()
            assert "MANAGER_REENROLL" in api.refusal("POST", "/api/agents/register", body,
                                                     token="join", status=403)
            assert api.journal() == before
        assert api.post("/api/agents/register", body, token=first["token"])["id"] == first["id"]
        assert api.post("/api/agents/register", body)["id"] == first["id"]
        api.post("/api/agents/register", {**AGENT, "machine_id": "n"}, token="join", status=201)


def test_an_enrolment_token_gives_agents_its_org_and_tags_and_the_journal_names_it(api: Client) -> None:
    issued = api.post("/api/enroll-tokens",
                      {"maxUses": 2, "org_id": "o", "tags": ["edge", "edge"], "note": "rack 7"}, status=201)
    shown = {"id": issued["id"], "expiresAt": manager.iso(START_MS + 86_400_000), "maxUses": 2, "uses": 0,
             "org_id": "o", "tags": ["edge"], "note": "rack 7"}
    assert {name: issued[name] for name in shown} == shown and set(issued) == {*shown, "token"}
    agents = [api.post("/api/agents/register", {**AGENT, "org_id": "other", "tags": ["mine"]},
                       token=issued["token"], status=201) for _ in range(2)]
    assert [(each["org_id"], each["tags"]) for each in agents] == [("o", ["edge"])] * 2
    before = api.journal()
    assert "used up" in api.refusal("POST", "/api/agents/register", AGENT, token=issued["token"], status=401)
    assert api.journal() == before and len(api.get("/api/agents")) == 2
    assert api.get("/api/enroll-tokens") == [{**shown, "uses": 2}]
    assert {entry["enrollToken"] for entry in api.journal("agent_registered")} == {issued["id"]}
    assert {entry["actor"]["credential"] for entry in api.journal("agent_registered")} == {issued["id"]}
    (entry,) = api.journal("enroll_token_issued")
    assert entry["org_id"] == "o" and entry["actor"]["role"] == "admin"
    assert {"enrollToken": issued["id"], "maxUses": 2, "note": "rack 7"}.items() <= entry.items()
    assert issued["token"] not in json.dumps(api.journal())


def test_without_an_org_or_tags_an_enrolment_token_leaves_them_to_the_agent(api: Client) -> None:
    issued = api.post("/api/enroll-tokens", status=201)
    assert (issued["maxUses"], issued["org_id"], issued["tags"], issued["note"]) == (1, None, [], None)
    agent = api.post("/api/agents/register", {**AGENT, "org_id": "o", "tags": ["t"]},
                     token=issued["token"], status=201)
    assert (agent["org_id"], agent["tags"]) == ("o", ["t"])


@pytest.mark.parametrize("ended", ["expired", "revoked"])
def test_an_enrolment_token_that_ended_is_no_credential(ended: str, api: Client, clock: ManualClock) -> None:
    issued = api.post("/api/enroll-tokens", {"ttlMs": 5000, "maxUses": 3}, status=201)
    agent = api.post("/api/agents/register", AGENT, token=issued["token"], status=201)
    path = f"/api/enroll-tokens/{issued['id']}"
    if ended == "expired":
        clock.advance(5)
    else:
        api.call("DELETE", path)
        assert api.get("/api/enroll-tokens") == []
        (entry,) = api.journal("enroll_token_revoked")
        assert (entry["enrollToken"], entry["uses"]) == (issued["id"], 1)
        api.refusal("DELETE", path, status=404)
    assert "expired" in api.refusal("POST", "/api/agents/register", AGENT, token=issued["token"], status=401)
    api.beat(agent)


def test_a_step_of_the_system_clock_neither_ends_nor_prolongs_an_enrolment_token(
        api: Client, clock: ManualClock) -> None:
    issued = api.post("/api/enroll-tokens", {"ttlMs": 3_600_000, "maxUses": 9}, status=201)
    for step_s in (10 * 365 * 86_400, -20 * 365 * 86_400):
        clock.step(step_s)
        clock.advance(1)
        api.post("/api/agents/register", AGENT, token=issued["token"], status=201)
        (listed,) = api.get("/api/enroll-tokens")
        passed_ms = 1000 if step_s > 0 else 2000
        assert listed["expiresAt"] == manager.iso(clock.now().wall_ms + 3_600_000 - passed_ms)
    fresh = api.post("/api/enroll-tokens", {"ttlMs": 3_600_000}, status=201)
    assert fresh["expiresAt"] == manager.iso(clock.now().wall_ms + 3_600_000)
    assert fresh["expiresAt"] in [each["expiresAt"] for each in api.get("/api/enroll-tokens")]
    clock.advance(3598)
    api.refusal("POST", "/api/agents/register", AGENT, token=issued["token"], status=401)
    api.post("/api/agents/register", AGENT, token=fresh["token"], status=201)


def test_a_used_up_enrolment_token_repeats_a_registration_of_which_nothing_was_heard(api: Client) -> None:
    token = api.post("/api/enroll-tokens", status=201)["token"]
    body = {**AGENT, "machine_id": "m"}
    first = api.post("/api/agents/register", body, token=token, status=201)
    again = api.post("/api/agents/register", body, token=token)
    assert again["id"] == first["id"]
    api.refusal("POST", "/api/agents/register", {**AGENT, "machine_id": "n"}, token=token, status=401)
    api.beat(again)
    api.refusal("POST", "/api/agents/register", body, token=token, status=401)


@pytest.mark.parametrize(("body", "named"), [
    ({"ttlMs": 0}, "ttlMs"), ({"ttlMs": 90 * 86_400_000 + 1}, "ttlMs"), ({"ttlMs": 1.5}, "ttlMs"),
    ({"maxUses": 0}, "maxUses"), ({"maxUses": True}, "maxUses"), ({"tags": "x"}, "tags"),
    ({"org_id": ""}, "org_id"), ({"note": "a\nb"}, "note")])
def test_a_wrong_enrolment_token_is_refused_by_field(body: dict[str, Any], named: str, api: Client) -> None:
    assert api.refusal("POST", "/api/enroll-tokens", body, status=400).startswith(f"{named}: must be ")
    assert api.get("/api/enroll-tokens") == []


def test_an_enrolment_token_registers_over_a_socket_with_a_large_body(server: Server, api: Client) -> None:
    token = api.post("/api/enroll-tokens", status=201)["token"]
    body = {**AGENT, "unknown": "x" * 300_000}
    assert ask(port_of(server.url), "POST", "/api/agents/register", body, token)[0] == 201


def test_enrolments_at_once_register_no_more_agents_than_the_token_may(server: Server, api: Client) -> None:
    token = api.post("/api/enroll-tokens", {"maxUses": 3}, status=201)["token"]
    answers = at_once(server, [("POST", "/api/agents/register", AGENT, token)] * 8)
    assert Counter(status for status, _ in answers) == {201: 3, 401: 5}


def test_a_registration_also_counts_the_threat_events_reported_right_after_its_commit(server: Server) -> None:
    fleet_manager, store = server.manager, server.manager.store
    first = fleet_manager.register("web-1", "linux", "1.2.0", machine_id="m1")

    def write() -> None:  # called after the commit
        store.listeners.remove(write)
        fleet_manager.report_events(first.agent.id, [THREAT])
    store.listeners.append(write)
    again = fleet_manager.register("web-1", "linux", "1.2.0", machine_id="m1")
    assert (again.agent.id, again.agent.recent_threats) == (first.agent.id, 1)


def test_without_machine_id_every_registration_is_another_agent(api: Client, clock: ManualClock) -> None:
    first = api.register()
    clock.advance(1000)
    assert api.register()["id"] != first["id"]


def test_a_full_fleet_takes_no_more_agents_but_its_own_again() -> None:
    with Server(port=0, clock=ManualClock(), max_agents=2) as server:
        api = Client(server)
        first, second = api.register(machine_id="m"), api.register()
        said = api.refusal("POST", "/api/agents/register", AGENT, status=409)
        assert "full" in said and "2" in said
        assert len(api.get("/api/agents")) == 2 and len(api.journal()) == 2
        api.post("/api/agents/register", AGENT, token=second["token"])
        server.clock.advance(67)
        api.post("/api/agents/register", {**AGENT, "machine_id": "m"})
        api.call("DELETE", f"/api/agents/{first['id']}")
        api.register()


def test_ids_are_unique_although_they_are_short(api: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = api.register()
    api.call("DELETE", f"/api/agents/{gone['id']}")
    digits = gone["id"].removeprefix("agent-")
    assert re.fullmatch("[0-9a-f]{8}", digits)
    drawn = iter([digits, "0000000a", "0000000a", "0000000a", "0000000b", digits, "0000000b", "0000000c"])
    any_other = secrets.token_hex
    monkeypatch.setattr(secrets, "token_hex",
                        lambda count=None: next(drawn) if count == 4 else any_other(count))
    assert [api.register()["id"] for _ in range(3)] == ["agent-0000000a", "agent-0000000b", "agent-0000000c"]


@pytest.mark.parametrize(("body", "after"), [
    ({"tags": ["x", "y", "x"]}, ["x", "y"]), ({"tags": []}, []), ({"tags": ["b", "a"]}, ["b", "a"]),
    ({"addTags": ["c", "a", "c"]}, ["a", "b", "c"]), ({"removeTags": ["a", "z"]}, ["b"]),
    ({"addTags": ["c"], "removeTags": ["a"]}, ["b", "c"]),
    ({"tags": None, "addTags": ["c"]}, ["a", "b", "c"]), ({"tags": ["a", "b"]}, ["a", "b"]),
    ({}, "tags"), ({"tags": ["x"], "addTags": ["y"]}, "tags"), ({"tags": "x"}, "tags"),
    ({"addTags": [""]}, "addTags"), ({"addTags": [f"t{number}" for number in range(63)]}, "64")])
def test_tags_are_replaced_added_and_removed(body: dict[str, Any], after: Any, api: Client) -> None:
    agent = api.register(tags=["a", "b"])
    path = f"/api/agents/{agent['id']}"
    if isinstance(after, str):
        assert after in api.refusal("PATCH", path, body, status=400)
        after = ["a", "b"]
    else:
        assert api.call("PATCH", path, body).json["data"]["tags"] == after
    assert api.get(path)["tags"] == after
    for tag in ("a", "b", "c", "x", "y", "z"):
        assert len(api.get(f"/api/agents?tag={tag}")) == (tag in after)
    changes = [entry["tags"] for entry in api.journal("agent_updated")]
    assert changes == ([] if after == ["a", "b"] else [{"from": ["a", "b"], "to": after}])


def test_only_the_admin_retags_and_the_journal_says_so(api: Client) -> None:
    agent = api.register(tags=["a"])
    api.refusal("PATCH", f"/api/agents/{agent['id']}", {"tags": []}, token=agent["token"], status=403)
    api.beat(agent, tags=["z"])
    assert api.get(f"/api/agents/{agent['id']}")["tags"] == ["a"]
    api.call("PATCH", f"/api/agents/{agent['id']}", {"tags": []})
    actor = api.journal("agent_updated")[0]["actor"]
    assert actor["role"] == "admin" and actor["address"] == "198.51.100.7"
    api.refusal("PATCH", "/api/agents/agent-00000000", {"tags": []}, status=404)


def test_a_deregistered_agent_is_gone_and_its_threats_stay(api: Client) -> None:
    kept, gone = api.register(tags=["t"]), api.register(hostname="old", tags=["t"], org_id="o")
    path = f"/api/agents/{gone['id']}"
    ids = api.post(f"{path}/events", {"events": [THREAT, THREAT]}, status=201)["eventIds"]
    api.post("/api/policy", {"name": "p", "rules": [RULE], "agent_id": gone["id"]}, status=201)
    assert api.call("DELETE", path).json["data"] == {
        "message": f"Agent {gone['id']} deregistered successfully"}
    for method, below, body in (("GET", "", None), ("DELETE", "", None), ("PATCH", "", {"tags": []}),
                                ("POST", "/heartbeat", {}), ("POST", "/events", {"events": [THREAT]})):
        api.refusal(method, path + below, body, status=404)
        if method != "PATCH":
            api.refusal(method, path + below, body, token=gone["token"], status=401)
    api.refusal("GET", f"/api/policy/agent/{gone['id']}", status=404)
    assert [each["id"] for each in api.get("/api/agents")] == [kept["id"]] == [
        each["id"] for each in api.get("/api/agents?tag=t")]
    assert api.get("/api/overview")["totalAgents"] == 1
    assert api.get("/health")["agents"] == {"total": 1, "online": 1}
    threats = api.get(f"/api/threats?agent_id={gone['id']}")
    assert {each["id"] for each in threats} == set(ids) and {each["hostname"] for each in threats} == {"old"}
    assert api.get("/api/overview")["threatSummary"]["last24h"]["total"] == 2
    entry = api.journal("agent_deregistered")[0]
    assert entry["agentId"] == gone["id"] and entry["org_id"] == "o" and entry["actor"]["role"] == "admin"


def test_an_agent_may_deregister_itself_and_no_other(api: Client) -> None:
    agent, other = api.register(), api.register()
    api.refusal("DELETE", f"/api/agents/{other['id']}", token=agent["token"], status=403)
    api.call("DELETE", f"/api/agents/{agent['id']}", token=agent["token"])
    assert [each["id"] for each in api.get("/api/agents")] == [other["id"]]
    assert api.journal("agent_deregistered")[0]["actor"]["role"] == "agent"


def test_a_heartbeat_keeps_what_it_does_not_say(api: Client, clock: ManualClock) -> None:
    agent = api.register()
    values = dict.fromkeys(("uptime", "cpu", "memory"))
    for told in ({}, {"cpu": 12.5}, {"uptime": 86_400}, {"memory": 45.2, "cpu": None},
                 {"cpu": 0, "memory": 100},
                   {"unknown": 1}, {"uptime": 0}):
        clock.advance(1)
        beat = api.beat(agent, **told)
        assert beat == {"id": agent["id"], "status": "online",
                        "lastHeartbeat": manager.iso(clock.now().wall_ms), "pendingPolicies": 0}
        values |= {name: value for name, value in told.items() if name in values and value is not None}
        detail = api.get(f"/api/agents/{agent['id']}")
        assert {name: detail[name] for name in values} == values
        assert detail["lastHeartbeat"] == beat["lastHeartbeat"]


def test_a_change_of_version_is_journalled_once(api: Client) -> None:
    agent = api.register()
    for version in ("1.2.0", "1.3.0", "1.3.0", None, "1.2.0"):
        api.beat(agent, version=version)
    entries = api.journal("agent_updated")
    assert [entry["version"] for entry in entries] == [{"from": "1.2.0", "to": "1.3.0"},
                                                              {"from": "1.3.0", "to": "1.2.0"}]
    assert {entry["agentId"] for entry in entries} == {agent["id"]}
    assert api.get(f"/api/agents/{agent['id']}")["version"] == "1.2.0"


def test_an_agent_causes_at_most_thirty_entries_a_minute_and_the_next_counts_the_others(
        api: Client, clock: ManualClock) -> None:
    agent, other = api.register(), api.register()
    for number in range(100):
        api.beat(agent, version=f"2.{number}")
    entries = [entry for entry in api.journal() if entry["agentId"] == agent["id"]]
    assert 20 <= len(entries) <= 30 and api.get(f"/api/agents/{agent['id']}")["version"] == "2.99"
    api.beat(other, version="3")
    assert "suppressed" not in api.journal("agent_updated")[-1], "each agent has a bound of its own"
    api.call("PATCH", f"/api/agents/{agent['id']}", {"tags": ["a"]})
    assert api.journal("agent_updated")[-1]["actor"]["role"] == "admin"
    clock.advance(60)
    for _ in range(2):
        api.beat(agent, version="4")
        api.beat(agent, version="5")
    counted = [entry.get("suppressed") for entry in api.journal("agent_updated")[-4:]]
    assert counted == [101 - len(entries), None, None, None]


def test_a_flood_of_lesser_threats_hides_no_worse_one(api: Client, clock: ManualClock) -> None:
    agent = api.register()
    for severity in ("low",) * 40 + ("critical", "high") + ("critical",) * 40:
        api.post(f"/api/agents/{agent['id']}/events",
                 {"events": [{**THREAT, "severity": severity}]}, status=201)
    reported = api.journal("threats_reported")
    assert [entry["maxSeverity"] for entry in reported][-2:] == ["low", "critical"] and len(reported) <= 29
    assert len(api.get("/api/threats?limit=200")) == 82, "only entries are suppressed"


@pytest.mark.parametrize(("age_s", "kept"), [(3600.0, 250), (3600.001, 0)])
def test_threats_are_kept_for_their_retention_and_no_longer(age_s: float, kept: int) -> None:
    with Server(port=0, clock=ManualClock(), threat_retention_ms=3_600_000) as server:
        api = Client(server)
        agent = api.register()
        path = f"/api/agents/{agent['id']}/events"
        api.post(path, {"events": [{**THREAT, "id": f"e{number}"} for number in range(250)]}, status=201)
        server.clock.advance(age_s - 1)
        late = api.post(path, {"events": [THREAT]}, status=201)["eventIds"]
        server.clock.advance(1)
        assert api.call("GET", "/api/threats?limit=1").json["pagination"]["total"] == kept + 1
        assert api.get(f"/api/agents/{agent['id']}")["recentThreats"] == kept + 1
        assert [each["id"] for each in api.get("/api/threats?limit=1")] == late
        assert len(api.journal("threats_reported")) == 2, "the journal has a retention of its own"


def test_a_database_that_is_too_large_loses_its_oldest_threats_and_entries() -> None:
    with Server(port=0, clock=ManualClock(), max_db_bytes=2**20) as server:
        api = Client(server)
        agent = api.register()
        state = api.get("/health", token=None)
        assert "warning" not in state
        ids = []
        for _ in range(20):
            server.clock.advance(30)
            event = {**THREAT, "details": {"padding": "x" * 10_000}}
            ids += api.post(f"/api/agents/{agent['id']}/events", {"events": [event] * 20},
                            status=201)["eventIds"]
        server.clock.advance(1)
        kept = [each["id"] for each in api.get("/api/threats?limit=200")]
        assert 0 < len(kept) < 100 and kept == ids[::-1][:len(kept)], "the latest"
        entries = api.journal()
        assert entries[0]["seq"] > 1 and entries[-1]["type"] == "threats_reported"
        assert "MANAGER_MAX_DB_BYTES" in api.get("/health", token=None)["warning"]
        removed = int(re.search(r"^panguard_purged_for_space_total (\d+)$",
                                api.call("GET", "/metrics").text, re.M)[1])
        assert removed >= 400 - len(kept)
        server.clock.advance(3600)
        assert "warning" not in api.get("/health", token=None)
        assert api.get(f"/api/agents/{agent['id']}")["id"] == agent["id"]


def test_purging_for_space_leaves_no_gap_in_the_journal(tmp_path: Path) -> None:
    clock, store = ManualClock(), manager.Store(tmp_path)
    with contextlib.closing(store):
        small = Manager(Config(data_dir=tmp_path, max_db_bytes=2**20), clock, store)
        agent = small.register("web-1", "linux", "1").agent.id
        clock.advance(350)
        small.report_events(agent, [threat(padding="x" * 10_000) for _ in range(110)])
        clock.advance(50)
        small.create_policy("p", [RULE])
        small.heartbeat(agent)  # entries for the silence before the policy come after that of the policy
        assert small.purge()
        seqs = [entry.seq for entry in small.journal()]
        assert seqs == list(range(seqs[0], seqs[-1] + 1)) and seqs[0] > 1
    assert manager.examine(tmp_path / "manager.db")["agents"] == 1


def try_report(api: Client, agent: Any, body: bytes) -> Any:
    """The answer to a report, whatever its status."""
    return api.app.request(f"/api/agents/{agent['id']}/events", method="POST", body=body, expect_errors=True,
                           headers={"Authorization": f"Bearer {agent['token']}",
                                    "Content-Type": "application/json"})


def test_a_flood_of_reports_removes_no_event_of_others_and_the_database_keeps_its_bound() -> None:
    with fleet(max_db_bytes=16 * 2**20) as api:
        victim, flooder = api.register(), api.register()
        report(api, victim, threat(type="evidence"))
        large = json.dumps({"events": [
            threat(sourceIp=f"{number}" + "x" * 200, padding="x" * 9000) for number in range(100)]}).encode()
        statuses = Counter[int]()
        for _ in range(30):
            for _ in range(6):
                answer = try_report(api, flooder, large)
                statuses[answer.status_int] += 1
                assert answer.status_int == 201 or 1 <= int(answer.headers["Retry-After"]) <= 60
            advance(api, 1)
            assert api.server.manager.store.used_bytes() < 26 * 2**20
        assert statuses[201] and statuses[429]
        assert "evidence" in {each["type"] for each in api.get(f"/api/threats?agent_id={victim['id']}")}
        report(api, victim, threat(type="later"))


@pytest.mark.parametrize("names", [("type",), ("id",), ("ruleId",), ("sourceIp",), ("sha256",),
                                   ("type", "id", "ruleId", "sourceIp", "sha256")], ids="-".join)
@pytest.mark.parametrize("letter", ["x", "\N{GRINNING FACE}"], ids=["ascii", "emoji"])
def test_the_reports_of_a_minute_are_bounded_by_the_room_they_take_in_the_database(
        names: tuple[str, ...], letter: str) -> None:
    share_bytes = 4 * 2**20
    with fleet(max_db_bytes=20 * share_bytes) as api:
        agent, store = api.register(), api.server.manager.store
        before_bytes, statuses = store.used_bytes(), Counter[int]()
        while statuses.keys() <= {201}:
            texts = [f"{statuses[201]}-{each}".ljust(255, letter) for each in range(50)]
            values = [dict.fromkeys(names, text) for text in texts]
            events = [{"type": "t", "severity": "low", "details": value, **value} for value in values]
            body = json.dumps({"events": events}, ensure_ascii=False).encode()
            statuses[try_report(api, agent, body).status_int] += 1
        assert set(statuses) == {201, 429}
        assert share_bytes / 2 < store.used_bytes() - before_bytes < 1.5 * share_bytes


TEN_YEARS_S = 10 * 365 * 86_400


def attack(api: Client, hostname: str) -> Any:
    """A new agent that reports the address of an attacker."""
    agent = api.register(hostname=hostname)
    return {**agent, "event": api.post(f"/api/agents/{agent['id']}/events", {"events": [THREAT]},
                                       token=agent["token"], status=201)["eventIds"][0]}


def kept(api: Client) -> tuple[list[str], list[int]]:
    """The ids of all threat events and the numbers of all entries, in order."""
    return ([each["id"] for each in api.get("/api/threats?limit=200")],
            [entry["seq"] for entry in api.journal() if entry["type"] != "clock_stepped"])


@pytest.mark.parametrize("years_s", [TEN_YEARS_S, -TEN_YEARS_S])
def test_a_wall_clock_that_is_wrong_for_six_seconds_purges_nothing(years_s: int, server: Server, api: Client,
                                                                   clock: ManualClock) -> None:
    attack(api, "before")
    clock.advance(60)
    clock.step(years_s)
    during = attack(api, "during")
    before = kept(api)
    for _ in range(6):
        clock.advance(1)
    assert api.get("/api/threats?limit=1")[0]["receivedAt"].startswith("20")
    clock.step(-years_s)
    for seconds in (1, 60, 4000):
        clock.advance(seconds)
        assert [entry for entry in api.journal("threats_reported", "agent_registered")
                if entry["seq"] in before[1]] and kept(api)[0] == before[0]
        assert set(before[1]) <= set(kept(api)[1])
    assert [entry["byMs"] for entry in api.journal("clock_stepped")] == [years_s * 1000, -years_s * 1000]
    assert api.get(f"/api/agents/{during['id']}")["recentThreats"] == 1
    assert api.get("/api/threats/summary")["total"] == 2
    clock.advance(86_400)
    assert api.get("/api/threats/summary")["total"] == 0, "what was received in those seconds grows old, too"
    clock.advance(30 * 86_400)
    assert kept(api)[0] == []


def test_a_first_start_in_1970_purges_nothing_and_correlates_across_the_correction() -> None:
    clock = ManualClock(5.0)
    with Server(port=0, clock=clock) as server:
        api = Client(server)
        first, second = attack(api, "one"), attack(api, "two")
        clock.advance(2)
        clock.step(START_MS / 1000)
        third = attack(api, "three")
        clock.advance(4)
        before = kept(api)
        assert before[0] == [third["event"], second["event"], first["event"]]
        (together,) = api.journal("threats_correlated")
        assert together["count"] == 3
        newest = api.get("/api/threats")[0]
        assert sorted(newest["correlatedWith"]) == sorted([first["event"], second["event"]])
        fourth = attack(api, "four")
        assert api.get("/api/threats?limit=1")[0]["receivedAt"] == manager.iso(START_MS + 11_000)
        assert api.get("/api/threats/summary")["total"] == 4 and len(api.journal("clock_stepped")) == 1
        assert [each["id"] for each in api.get(f"/api/threats?since={manager.iso(START_MS + 8_000)}")] == [
            fourth["event"]]
        clock.advance(7200)
        assert kept(api)[0] == [fourth["event"], *before[0]] and set(before[1]) <= set(kept(api)[1])


def test_a_wall_clock_set_back_makes_no_correlation_of_events_that_were_far_apart(api: Client,
                                                                                 clock: ManualClock) -> None:
    attack(api, "one"), attack(api, "two")
    clock.advance(600)
    clock.step(-600)
    attack(api, "three")
    assert api.journal("threats_correlated") == []
    assert api.get("/api/threats?limit=1")[0]["correlatedWith"] == []


@pytest.mark.parametrize(("off_s", "stepped"), [
    (0, 0), (2 * 86_400, 0), (TEN_YEARS_S, 1), (-TEN_YEARS_S, 1), (-3600, 1)])
def test_retention_counts_the_time_in_which_a_manager_ran(off_s: int, stepped: int, tmp_path: Path) -> None:
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path, threat_retention_ms=7_200_000) as server:
        attack(Client(server), "one")
        server.clock.advance(3000)
    clock = ManualClock(START_MS / 1000 + 3000 + off_s)
    with Server(port=0, clock=clock, data_dir=tmp_path, threat_retention_ms=7_200_000) as server:
        api = Client(server)
        assert len(api.journal("clock_stepped")) == stepped
        clock.advance(4200)
        assert len(kept(api)[0]) == 1
        clock.advance(0.001)
        assert kept(api)[0] == []


def test_purging_resumes_an_hour_after_the_last_step() -> None:
    with fleet(threat_retention_ms=60_000) as api:
        attack(api, "one")
        advance(api, 30)
        api.server.clock.step(-7200)
        for seconds, left in ((30, 1), (3599, 1), (1, 0)):
            advance(api, seconds)
            assert len(kept(api)[0]) == left


def test_after_a_step_a_database_that_is_too_large_is_purged_all_the_same() -> None:
    with fleet(max_db_bytes=2**20) as api:
        agent = api.register()
        api.server.clock.step(TEN_YEARS_S)
        for number in range(20):
            event = {**THREAT, "details": {"padding": "x" * 10_000}}
            report(api, agent, *[{**event, "id": f"{number}-{each}"} for each in range(20)])
            advance(api, 30)
        assert 0 < len(kept(api)[0]) < 100
        assert len(api.journal("threats_reported")) < 20, "entries are as old as the threats beside them"


def test_rows_of_an_older_version_from_the_future_are_kept_for_their_retention(tmp_path: Path) -> None:
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path) as server:
        for hostname in ("one", "two"):
            attack(Client(server), hostname)
    with contextlib.closing(sqlite3.connect(tmp_path / "manager.db", isolation_level=None)) as db:
        db.execute("DELETE FROM clock_spans")
        db.execute("UPDATE threats SET received_ms = received_ms + ? WHERE key = 2", (TEN_YEARS_S * 1000,))
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path, threat_retention_ms=7_200_000) as server:
        api = Client(server)
        server.clock.advance(7199)
        assert len(kept(api)[0]) == 2
        third = attack(api, "three")
        assert [each["receivedAt"] for each in api.get("/api/threats") if each["id"] == third["event"]] == [
            manager.iso(START_MS + 7_199_000)]
        server.clock.advance(1.001)
        assert kept(api)[0] == [third["event"]]


def test_the_journal_is_kept_for_its_retention_and_goes_on_counting() -> None:
    with Server(port=0, clock=ManualClock(), journal_retention_ms=3_600_000) as server:
        api = Client(server)
        agents = [api.register() for _ in range(150)]
        server.clock.advance(60)
        api.call("DELETE", f"/api/agents/{agents[0]['id']}")
        last = api.journal()[-1]["seq"]
        server.clock.advance(3540)
        assert len(api.journal("agent_registered")) == 150
        server.clock.advance(60)
        kept = api.journal("agent_registered", "agent_deregistered")
        assert [entry["type"] for entry in kept] == ["agent_deregistered"]
        server.clock.advance(7200)
        assert api.journal() == []
        api.register()
        assert api.journal()[0]["seq"] > last
        assert len(api.get("/api/agents")) == 150


def test_a_race_has_one_winner(server: Server, clock: ManualClock) -> None:
    api = Client(server)
    first = api.register(machine_id="m")
    register = ("POST", "/api/agents/register", {**AGENT, "machine_id": "m"}, server.token)
    answers = at_once(server, [register] * 8)
    assert [(status, body["data"]["id"]) for status, body in answers] == [(200, first["id"])] * 8
    tokens = [body["data"]["token"] for _, body in answers]
    answers = at_once(server, [("POST", f"/api/agents/{first['id']}/heartbeat", {}, token)
                               for token in tokens])
    assert Counter(status for status, _ in answers) == {200: 1, 401: 7}, "the last one issued holds"

    path = f"/api/agents/{first['id']}"
    answers = at_once(server, [("POST", f"{path}/events", {"events": [{**THREAT, "id": "e"}]},
                                server.token)] * 8)
    stored = api.get("/api/threats")[0]["id"]
    assert {(status, body["data"]["eventIds"][0]) for status, body in answers} == {(201, stored)}
    assert len(api.get("/api/threats")) == len(api.journal("threats_reported")) == 1

    answers = at_once(server, [("DELETE", path, None, server.token)] * 8)
    assert Counter(status for status, _ in answers) == {200: 1, 404: 7}
    assert len(api.journal("agent_deregistered")) == 1


def test_a_race_does_not_overfill_the_fleet() -> None:
    with Server(port=0, max_agents=5) as server:
        answers = at_once(server, [("POST", "/api/agents/register", AGENT, server.token)] * 8)
        assert Counter(status for status, _ in answers) == {201: 5, 409: 3}
        assert server.manager.health() == (5, 5)


def test_counts_add_up_after_mixed_traffic_of_eight_threads() -> None:
    with Server(port=0) as server:
        def agent_life(seed: int) -> tuple[int, set[str], dict[str, int]]:
            """Registrations made, ids that are gone, last uptime of those that are left."""
            chance = random.Random(seed)
            tokens: dict[str, str] = {}
            gone: set[str] = set()
            uptimes: dict[str, int] = {}
            for number in range(1, 61):
                if not tokens or chance.random() < 0.35:
                    status, body = ask(port_of(server.url), "POST", "/api/agents/register",
                                       AGENT, server.token)
                    assert status == 201, body
                    tokens[body["data"]["id"]] = body["data"]["token"]
                    continue
                agent_id = chance.choice(sorted(tokens))
                path, token = f"/api/agents/{agent_id}", tokens[agent_id]
                if chance.random() < 0.3:
                    assert ask(port_of(server.url), "DELETE", path, None, token)[0] == 200
                    gone.add(agent_id)
                    uptimes.pop(agent_id, None)
                    del tokens[agent_id]
                else:
                    assert ask(port_of(server.url), "POST", f"{path}/heartbeat", {"uptime": number},
                               token)[0] == 200
                    uptimes[agent_id] = number
            return len(tokens) + len(gone), gone, {name: uptimes.get(name, -1) for name in tokens}

        with ThreadPoolExecutor(8) as pool:
            lives = list(pool.map(agent_life, range(8)))
        registered = sum(made for made, _, _ in lives)
        gone = set().union(*(each for _, each, _ in lives))
        left = {name: uptime for *_, each in lives for name, uptime in each.items()}
        assert registered == len(gone) + len(left)
        listed = json.loads(server.manager.agents_json()[0])
        assert {each["id"] for each in listed} == set(left) and len(listed) == len(left)
        for name, uptime in left.items():
            assert server.manager.agent(name).uptime == (None if uptime == -1 else uptime)
        journal = server.manager.journal()
        assert Counter(entry.type for entry in journal) == {"agent_registered": registered,
                                                            "agent_deregistered": len(gone)}
        assert [entry.seq for entry in journal] == list(range(1, len(journal) + 1))
        assert server.manager.overview()["totalAgents"] == len(left) == server.manager.health()[0]


# Prune


def test_agents_offline_for_long_are_pruned_a_tenth_of_the_fleet_a_day() -> None:
    with fleet(prune_offline_ms=10 * 86_400_000, heartbeat_timeout_ms=7_200_000) as api:
        agents = [api.register(hostname=f"h{number:02}") for number in range(40)]

        def live(days: float) -> None:
            for _ in range(round(days * 24)):
                for agent in agents[10:]:
                    api.server.manager.heartbeat(agent["id"])
                advance(api, 3600)

        live(9.9)
        api.server.clock.step(3650 * 86_400)  # what the wall clock says does not count
        advance(api, 1)
        api.server.clock.step(-3650 * 86_400)
        advance(api, 1)
        assert len(api.get("/api/agents")) == 40 and not api.journal("agents_pruned")
        live(1)
        assert [each["hostname"] for each in api.get("/api/agents")][:2] == ["h04", "h05"]
        found = api.get("/api/events?type=agents_pruned&limit=200")
        assert [each["count"] for each in found] == [4]
        assert (found[0]["hostnames"],
                found[0]["actor"]) == (["h00", "h01", "h02", "h03"], {"role": "manager"})
        gone = api.get("/api/events?type=agent_deregistered&limit=200")
        assert len(gone) == 4 and gone[0]["actor"] == {"role": "manager"}
        live(2)
        assert len(api.get("/api/agents")) == 40 - 10


def test_many_agents_are_pruned_fifty_in_a_transaction() -> None:
    with Server(port=0, clock=ManualClock(), prune_offline_ms=60_000) as server:
        server.seed(200)
        server.clock.advance(3599)
        server.seed(1010)
        server.clock.advance(2)
        pruned = [entry.data["count"] for entry in server.manager.journal(type="agents_pruned")]
        assert pruned == [50, 50, 21], "121 are a tenth of the fleet"
        assert len(server.manager.agents()[0]) == 1210 - 121


def test_pruning_keeps_its_limit_over_restarts_and_waits_after_a_suspend(tmp_path: Path) -> None:
    clock = ManualClock()
    settings: Any = {"port": 0, "clock": clock, "data_dir": tmp_path, "tls": "off",
                     "prune_offline_ms": 7 * 86_400_000, "heartbeat_timeout_ms": 7_200_000}
    with Server(**settings) as server:
        ids = [server.manager.register(f"h{number:02}", "linux", "1").agent.id for number in range(40)]

        def live(server: Server, hours: float, step_s: float = 1200) -> None:
            for _ in range(round(hours * 3600 / step_s)):
                for agent in ids[16:]:
                    server.manager.heartbeat(agent)
                clock.advance(step_s)
        live(server, 7 * 24)
        clock.suspend(8 * 86_400)
        clock.advance(60)
        assert len(server.manager.agents()[0]) == 40, "the others must be heard first"
    for _ in range(6):
        with Server(**settings) as server:
            live(server, 3)
    with Server(**settings) as server:
        assert [entry.data["count"] for entry in server.manager.journal(type="agents_pruned")] == [4]
        live(server, 24)
        assert len(server.manager.agents()[0]) == 40 - 4 - 3


def test_nobody_is_pruned_while_half_of_the_fleet_is_silent_or_unless_asked_for() -> None:
    for days, left in ((0, 9), (1, 9)):
        with fleet(prune_offline_ms=days * 86_400_000, heartbeat_timeout_ms=7_200_000) as api:
            agents = [api.register(hostname=f"h{number}") for number in range(9)]
            for _ in range(72):
                for agent in agents[5 if days else 1:]:
                    api.beat(agent)
                advance(api, 3600)
            assert len(api.get("/api/agents")) == left and not api.journal("agents_pruned")


# Threat events

def test_a_threat_event_is_triaged(api: Client) -> None:
    agent = api.register(org_id="o")
    one, two, three = report(api, agent, threat(), threat(severity="low", type="noise"), threat())
    noise = api.call("PATCH", f"/api/threats/{two}",
                     {"state": "false_positive", "note": "a test"}).json["data"]
    assert (noise["id"], noise["state"], noise["note"]) == (two, "false_positive", "a test")
    assert api.call("PATCH", f"/api/threats/{two}", {"note": "our scanner"}).json["data"] == {
        **noise, "note": "our scanner"}
    api.call("PATCH", f"/api/threats/{one}", {"state": "acknowledged"})
    api.call("PATCH", f"/api/threats/{one}", {"state": "acknowledged"})  # changes nothing
    for state, expected in (("open", [three]), ("acknowledged", [one]), ("false_positive", [two])):
        assert [each["id"] for each in api.get(f"/api/threats?state={state}")] == expected, state
    entries = api.journal("threat_updated")
    assert [(each["eventId"], each["agentId"], each["org_id"], each["actor"]["role"])
            for each in entries] == \
        [(each, agent["id"], "o", "admin") for each in (two, two, one)]
    assert entries[0]["state"] == {"from": "open", "to": "false_positive"}
    assert entries[1]["note"] == {"from": "a test", "to": "our scanner"} and "state" not in entries[1]
    for of_org in ("", "&org_id=o"):
        summary = api.get(f"/api/threats/summary?period=7d{of_org}")
        assert (summary["total"], summary["falsePositives"], summary["byType"]) == (2, 1, {"brute_force": 2})
        last = api.get(f"/api/overview?{of_org}")["threatSummary"]["last24h"]
        assert (last["total"], last["low"], last["falsePositives"]) == (2, 0, 1)
    assert "state: must be given" in api.refusal("PATCH", f"/api/threats/{two}", {}, status=400)
    for unknown in ("evt_00000000ffff", "evt_1", agent["id"], "summary"):
        api.refusal("PATCH", f"/api/threats/{unknown}", {"state": "open"}, status=404)


def test_threat_events_are_read_on_from_an_event_while_others_arrive(api: Client) -> None:
    agent = api.register()
    ids = report(api, agent, *[threat() for _ in range(5)])
    advance(api, 1)
    ids += report(api, agent, threat(sha256="AB"), {**THREAT, "ruleId": "r-1"})
    read = [each["id"] for each in api.get("/api/threats?limit=3")]
    while page := api.get(f"/api/threats?limit=3&before={read[-1]}"):
        report(api, agent, threat())
        read += [each["id"] for each in page]
    assert read == ids[::-1]
    assert [each["id"] for each in api.get("/api/threats?file_hash=aB")] == [ids[5]]
    assert [each["sigmaRuleId"] for each in api.get(f"/api/threats?before={read[0]}&limit=1")] == [None]
    assert next(each["sigmaRuleId"] for each in api.get("/api/threats") if each["id"] == ids[6]) == "r-1"
    assert api.get("/api/threats?before=evt_00000000ffff") == []


def test_a_redelivered_event_is_stored_once_and_keeps_its_id(api: Client) -> None:
    one, two = api.register(), api.register()
    first = report(api, one, threat(own="x"), threat(own="y", severity="low"),
                   threat(own="x", severity="low"))
    assert first[0] == first[2] != first[1]
    assert all(re.fullmatch(r"evt_[0-9a-f]+", each) for each in first)
    entries = len(api.journal())
    assert report(api, one, threat(own="y"), threat(own="x")) == [first[1], first[0]]
    assert len(api.journal()) == entries, "a redelivery reports nothing"
    assert {each["id"]: each["severity"]
            for each in api.get("/api/threats")} == {first[0]: "high", first[1]: "low"}
    again = report(api, one, threat(own="x"), threat(own="z"), threat(), threat())
    assert again[0] == first[0] and len({*first, *again}) == 5
    assert not {*report(api, two, threat(own="x"))} & {*first, *again}, "an own id is one agent's"
    assert len(api.get("/api/threats")) == 6


def test_a_redelivered_event_keeps_its_id_across_a_restart(tmp_path: Any) -> None:
    with fleet(data_dir=tmp_path) as api:
        agent = api.register()
        first = report(api, agent, threat(own="x"), threat(own="y"))
    with fleet(data_dir=tmp_path) as api:
        assert report(api, agent, threat(own="y"), threat(own="x"), threat(own="z"))[:2] == first[::-1]
        assert len(api.get("/api/threats")) == 3
        assert [each["count"] for each in api.journal("threats_reported")] == [2, 1]


def test_a_batch_is_stored_whole_or_not_at_all(api: Client) -> None:
    agent = api.register()
    path, sound = f"/api/agents/{agent['id']}/events", threat(own="x")
    for events, named in (([sound, {**sound, "severity": "worse"}, sound], "events[1].severity: "),
                          ([sound, sound, 1], "events[2]: "), ([], "events: "), ([sound] * 1001, "events: "),
                          ([sound, {}], "events[1].type: is required; events[1].severity: is required; "
                                        "events[1].details: is required")):
        assert named in api.refusal("POST", path, {"events": events}, status=400)
    api.refusal("POST", "/api/agents/agent-00000000/events", {"events": [sound]}, status=404)
    assert api.get("/api/threats") == [] and not api.journal("threats_reported", "threats_correlated")
    assert len(set(report(api, agent, *[threat(n=n) for n in range(1000)]))) == 1000


IP, HASH = {"sourceIp": "203.0.113.9"}, {"sha256": "ABCD"}
# Steps: seconds since the former, agent, org, details. Then the pairs that correlate, the announcements.
CORRELATIONS: dict[str, tuple[list[tuple[float, str, str | None, Any]], list[tuple[int, int]], int]] = {
    "three agents of one org within five minutes": (
        [(0, "a", "o", IP), (120, "b", "o", IP), (120, "c", "o", IP)], [(0, 1), (0, 2), (1, 2)], 1),
    "two agents are not yet announced": ([(0, "a", "o", IP), (1, "b", "o", IP)], [(0, 1)], 0),
    "another org": (
        [(0, "a", "o", IP), (0, "b", "o", IP), (0, "c", "p", IP), (0, "d", None, IP)], [(0, 1)], 0),
    "six minutes apart": ([(0, "a", "o", IP), (360, "b", "o", IP), (360, "c", "o", IP)], [], 0),
    "just within the window": ([(0, "a", "o", IP), (300, "b", "o", IP)], [(0, 1)], 0),
    "just outside the window": ([(0, "a", "o", IP), (300.001, "b", "o", IP)], [], 0),
    "one agent alone": ([(0, "a", "o", IP), (1, "a", "o", IP), (1, "a", "o", IP)], [], 0),
    "other addresses": (
        [(0, "a", "o", IP), (0, "b", "o", {"sourceIp": "203.0.113.10"}), (0, "c", "o", {})], [], 0),
    "nothing to share": ([(0, "a", "o", {}), (0, "b", "o", {}), (0, "c", "o", {})], [], 0),
    "a hash under two names": ([(0, "a", "o", HASH), (0, "b", "o", {"malwareHash": "abcd"})], [(0, 1)], 0),
    "every name of an address": (
        [(0, name, "o", {name: "2001:DB8::1" if number % 2 else "2001:db8:0::1"})
         for number, name in enumerate(
            ("sourceIp", "sourceIP", "source_ip", "src_ip", "remoteAddress", "attacker_ip", "client_ip"))],
        [*itertools.combinations(range(7), 2)], 1),
    "every name of a hash": (
        [(0, name, "o", {name: "abcd"})
         for name in ("sha256", "sha1", "md5", "fileHash", "hash", "malwareHash")],
        [*itertools.combinations(range(6), 2)], 1),
    "the first name wins, and only a text counts": (
        [(0, "a", "o", {"client_ip": "203.0.113.1", **IP}),
         (0, "b", "o", {"sourceIp": 7, "src_ip": "203.0.113.9"}),
         (0, "c", "o", {"client_ip": "203.0.113.1"})], [(0, 1)], 0),
    "an address with some and a hash with others": (
        [(0, "a", "o", {**IP, **HASH}), (0, "b", "o", IP), (0, "c", "o", HASH)], [(0, 1), (0, 2)], 0),
    "address and hash at once": ([(0, each, "o", {**IP, **HASH}) for each in "abc"],
                                 [(0, 1), (0, 2), (1, 2)], 2),
    "once per window": ([(0, "a", "o", IP), (0, "b", "o", IP), (0, "c", "o", IP), (60, "d", "o", IP)],
                        [*itertools.combinations(range(4), 2)], 1),
}


@pytest.mark.parametrize("name", CORRELATIONS)
def test_events_correlate(name: str, api: Client) -> None:
    steps, pairs, announced = CORRELATIONS[name]
    agents: dict[str, Any] = {}
    ids = []
    for delay, who, org, details in steps:
        advance(api, delay)
        if who not in agents:
            agents[who] = api.register(hostname=who, org_id=org)
        ids += report(api, agents[who], {**THREAT, "details": details})
    expected: dict[str, set[str]] = {each: set() for each in ids}
    for one, other in pairs:
        expected[ids[one]].add(ids[other])
        expected[ids[other]].add(ids[one])
    found = {each["id"]: each["correlatedWith"] for each in api.get("/api/threats")}
    assert {event: set(others) for event, others in found.items()} == expected
    assert all(len(others) == len(set(others)) for others in found.values())
    entries = api.journal("threats_correlated")
    assert len(entries) == announced
    assert all(entry["org_id"] == "o" and entry["actor"] == {"role": "manager"} for entry in entries)


def test_an_indicator_is_announced_once_per_window_and_again_after_it(api: Client) -> None:
    agents = [api.register(org_id="o") for _ in range(3)]
    announced = []
    for delay, reporters in ((0, agents), (299.999, agents), (0.001, agents[:1]), (299.999, agents),
                             (0.001, agents[1:2])):
        advance(api, delay)
        for agent in reporters:
            report(api, agent, THREAT)
        announced.append(len(api.journal("threats_correlated")))
    assert announced == [1, 1, 2, 2, 3]
    assert api.journal("threats_correlated")[0]["agentIds"] == sorted(agent["id"] for agent in agents)


def test_the_correlation_window_is_a_setting() -> None:
    with fleet(correlation_window_ms=1000) as api:
        ids = []
        for delay in (0, 1, 1.001):
            advance(api, delay)
            ids += report(api, api.register(org_id="o"), THREAT)
        assert [each["correlatedWith"] for each in api.get("/api/threats")] == [[], [ids[0]], [ids[1]]]


def stamp(ms: int) -> str:
    return quote(manager.iso(ms))


def test_since_and_until_are_exact_to_the_millisecond(api: Client) -> None:
    agent = api.register()
    advance(api, 1.123)
    (event,) = report(api, agent, THREAT)
    at = START_MS + 1123
    for query, expected in (
            (f"since={stamp(at)}", 1), (f"since={stamp(at + 1)}", 0),
            (f"until={stamp(at)}", 0), (f"until={stamp(at + 1)}", 1),
            (f"since={stamp(at)}&until={stamp(at + 1)}", 1), (f"since={stamp(at + 1)}&until={stamp(at)}", 0),
            ("since=2026-03-07T20:00:01.123%2B08:00", 1), ("since=2026-03-07T20:00:01.124+08:00", 0),
            ("until=2026-03-07T12:00:01Z", 0),
            ("since=0001-01-01T00:00:00Z&until=9999-12-31T23:59:59Z", 1)):
        assert [each["id"] for each in api.get(f"/api/threats?{query}")] == [event] * expected, query


@pytest.mark.parametrize(("period", "hours"), [("1h", 1), ("6h", 6), ("24h", 24), ("7d", 168), ("30d", 720)])
def test_a_period_is_exact_to_the_millisecond(period: str, hours: int, api: Client) -> None:
    report(api, api.register(), THREAT)
    for delay, total in ((hours * 3600, 1), (0.001, 0)):
        advance(api, delay)
        assert api.get(f"/api/threats/summary?period={period}")["total"] == total
        if name := {"24h": "last24h", "7d": "last7d"}.get(period):
            assert api.get("/api/overview")["threatSummary"][name]["total"] == total


def test_recent_threats_are_those_of_a_day_of_that_agent(api: Client) -> None:
    agent, other = api.register(), api.register()
    report(api, agent, THREAT, THREAT)
    report(api, other, THREAT)
    for delay, recent in ((0, 2), (86_400, 2), (0.001, 0)):
        advance(api, delay)
        assert api.get(f"/api/agents/{agent['id']}")["recentThreats"] == recent


def test_an_event_past_its_retention_is_gone() -> None:
    with fleet(threat_retention_ms=3_600_000, journal_retention_ms=7_200_000) as api:
        agent = api.register()
        report(api, agent, *[threat(own=str(n)) for n in range(250)])
        for delay, left in ((3600, 200), (0.001, 0)):
            advance(api, delay)
            assert len(api.get("/api/threats?limit=200")) == left
        assert api.journal("threats_reported")
        advance(api, 3600)
        assert not api.journal("threats_reported")


def test_threats_are_filtered_newest_first(api: Client) -> None:
    one, two = api.register(hostname="one", org_id="o"), api.register(hostname="two")
    made = []
    for agent, type, severity, address in (
            (one, "scan", "low", "203.0.113.1"), (one, "malware", "high", "2001:db8::1"),
            (two, "scan", "high", "203.0.113.1"), (two, "scan", "critical", "x")):
        advance(api, 1)
        made += report(api, agent, threat(type=type, severity=severity, sourceIp=address))
    for query, expected in (
            ({}, [3, 2, 1, 0]), ({"org_id": "o"}, [1, 0]), ({"agent_id": two["id"]}, [3, 2]),
            ({"type": "scan"}, [3, 2, 0]), ({"severity": "high"}, [2, 1]),
            ({"source_ip": "203.0.113.1"}, [2, 0]), ({"source_ip": "2001:DB8:0::1"}, [1]),
            ({"source_ip": "x"}, [3]), ({"type": "scan", "severity": "high"}, [2]),
            ({"org_id": "o", "type": "nope"}, []), ({"org_id": "o", "agent_id": two["id"]}, []),
            ({"limit": 3}, [3, 2, 1]), ({"limit": 3, "page": 2}, [0]),
            ({"type": "scan", "limit": 1, "page": 2}, [2])):
        assert [made.index(each["id"])
                for each in api.get(f"/api/threats?{urlencode(query)}")] == expected, query
    api.call("DELETE", f"/api/agents/{one['id']}")
    assert [each["hostname"] for each in api.get(f"/api/threats?agent_id={one['id']}")] == ["one", "one"]
    assert api.get("/api/threats/summary")["total"] == 4


HISTORY = st.lists(st.tuples(
    st.integers(0, 3), st.sampled_from(manager.SEVERITIES), st.sampled_from("xyz"),
    st.sampled_from(["", "203.0.113.1", "203.0.113.2"]),
    st.sampled_from([0, 1, 3_599, 3_600, 21_600, 86_400, 302_400]),
    st.lists(st.sampled_from(["open", "acknowledged", "false_positive"]), max_size=2)),
    min_size=1, max_size=25)


@settings(EXAMPLES, max_examples=15)
@given(HISTORY, st.sampled_from([24, 720]))
def test_sums_equal_a_recount(history: list[tuple[int, str, str, str, int, list[str]]], kept_h: int) -> None:
    with fleet(threat_retention_ms=kept_h * 3_600_000) as api:
        orgs = ["o", "o", "p", None]
        agents = [api.register(hostname=f"h{n}", org_id=org) for n, org in enumerate(orgs)]
        now, rows = 0, []
        for who, severity, type, address, delay, states in history:
            made = report(api, agents[who], threat(type=type, severity=severity,
                                                   **({"src_ip": address} if address else {})))[0]
            for state in states:
                api.call("PATCH", f"/api/threats/{made}", {"state": state})
            rows.append((now, who, severity, type, address, states[-1:] == ["false_positive"]))
            advance(api, delay)
            now += delay

        for org in (None, "o", "p", "nobody"):
            of_org = f"&org_id={org}" if org else ""
            totals = {}
            for period, hours in (("1h", 1), ("6h", 6), ("24h", 24), ("7d", 168), ("30d", 720)):
                every = [row for row in rows if now - row[0] <= min(hours, kept_h) * 3600
                         and (org is None or orgs[row[1]] == org)]
                kept = [row for row in every if not row[5]]
                totals[period] = {"total": len(kept), **{s: sum(row[2] == s for row in kept) for s
                                                         in manager.SEVERITIES},
                                  "falsePositives": len(every) - len(kept)}
                summary = api.get(f"/api/threats/summary?period={period}{of_org}")
                assert (summary["total"], summary["falsePositives"]) == (len(kept), len(every) - len(kept))
                assert summary["bySeverity"] == {s: totals[period][s] for s in manager.SEVERITIES}
                assert summary["byType"] == Counter(row[3] for row in kept)
                assert {(each["agentId"], each["hostname"]): each["count"]
                        for each in summary["topAgents"]} == \
                    Counter((agents[row[1]]["id"], f"h{row[1]}") for row in kept)
                assert {each["ip"]: each["count"] for each in summary["topSourceIps"]} == \
                    Counter(row[4] for row in kept if row[4])
                for ranking in ("topAgents", "topSourceIps"):
                    counts = [each["count"] for each in summary[ranking]]
                    assert counts == sorted(counts, reverse=True)
                if period == "24h":
                    types = Counter(row[3] for row in kept)
            overview = api.get(f"/api/overview?{of_org[1:]}")
            assert overview["threatSummary"] == {"last24h": totals["24h"], "last7d": totals["7d"]}
            assert {each["type"]: each["count"] for each in overview["topThreats"]} == types
            assert overview["totalAgents"] == sum(org is None or each == org for each in orgs)


def test_agents_by_system_equal_a_recount_after_any_changes(by_hand: tuple[Manager, ManualClock]) -> None:
    registry, clock = by_hand
    chance, known = random.Random(11), {}
    for _ in range(150):
        machine, system = chance.choice("abcdefgh"), chance.choice(["linux", "macos", "windows"])
        org = "o" if machine < "d" else None
        if machine in known and chance.random() < 0.4:
            registry.deregister(known.pop(machine)[0])
            continue
        clock.advance(70)  # the machine is silent: it is the same agent that comes back
        agent = registry.register(**{**AGENT, "os": system}, org_id=org, machine_id=machine).agent
        known[machine] = (agent.id, org, system)
    for org in (None, "o"):
        expected = Counter(system for _, its_org, system in known.values() if org in (None, its_org))
        overview = registry.overview(org_id=org)
        assert overview["agentsByOs"] == expected and overview["totalAgents"] == expected.total()
    assert registry.agents(page=1)[1] == len(known)


def test_a_migration_counts_the_agents_in_the_file(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "manager.db")) as db:
        db.executescript(f"{';'.join(manager.MIGRATIONS[:9])}; PRAGMA user_version = 9; "
                         f"PRAGMA application_id = {0x50474D31}")
        rows = [("o", "linux"), ("o", "macos"), (None, "linux"), (None, "linux")]
        for key, (org, system) in enumerate(rows):
            db.execute("INSERT INTO agents (key, id, hostname, os, ip, org_id, tags, registered_ms, "
                       "token_digest) VALUES (?, ?, 'h', ?, '127.0.0.1', ?, '[]', 0, ?)",
                       (key + 1, f"agent-{key}", system, org, bytes([key])))
            db.execute("INSERT INTO contacts (agent, seen_ms, heartbeat_ms, announced, version) "
                       "VALUES (?, 0, 0, 'offline', '1')", (key + 1,))
        db.commit()
    with fleet(data_dir=tmp_path) as api:
        assert api.get("/api/overview")["agentsByOs"] == {"linux": 3, "macos": 1}
        assert api.get("/api/overview?org_id=o")["agentsByOs"] == {"linux": 1, "macos": 1}


def test_a_migration_counts_the_threat_events_in_the_file(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "manager.db")) as db:
        db.executescript(f"{';'.join(manager.MIGRATIONS[:8])}; PRAGMA user_version = 8; "
                         f"PRAGMA application_id = {0x50474D31}")
        db.executemany(
            "INSERT INTO threats (agent_id, hostname, org_id, type, severity, received_ms, source_ip, state, "
            "details) VALUES ('agent-1', 'h', ?, 't', ?, ?, ?, ?, '{}')", [
                (org, severity, START_MS - age_h * 3_600_000, "203.0.113.9" if age_h % 2 else None, state)
                for age_h in range(20) for org, severity, state in (
                    ("o", "high", "open"), (None, "low", "acknowledged"), (None, "low", "false_positive"))])
        db.commit()
    with fleet(data_dir=tmp_path) as api:
        for org, severities in (("", {"critical": 0, "high": 20, "medium": 0, "low": 20}),
                                ("&org_id=o", {"critical": 0, "high": 20, "medium": 0, "low": 0})):
            summary = api.get(f"/api/threats/summary?period=24h{org}")
            assert summary["bySeverity"] == severities and summary["falsePositives"] == (0 if org else 20)
            total = sum(severities.values())
            assert summary["byType"] == {"t": total} and summary["topAgents"][0]["count"] == total
            assert summary["topSourceIps"] == [{"ip": "203.0.113.9", "count": total // 2}]


def test_rankings_end_at_ten(api: Client) -> None:
    for number in range(12):
        report(api, api.register(hostname=f"h{number}"),
               *[threat(type=f"t{number}", sourceIp=f"203.0.113.{number}")
                for _ in range(number + 1)])
    summary, overview = api.get("/api/threats/summary"), api.get("/api/overview")
    assert [(each["hostname"], each["count"]) for each in summary["topAgents"]] == \
        [(f"h{number}", number + 1) for number in range(11, 1, -1)]
    assert [each["ip"] for each in summary["topSourceIps"]] == [
        f"203.0.113.{number}" for number in range(11, 1, -1)]
    assert [(each["type"], each["count"]) for each in overview["topThreats"]] == \
        [(f"t{number}", number + 1) for number in range(11, 1, -1)]
    assert len(summary["byType"]) == 12



def test_a_summary_names_the_thousand_most_frequent_types_and_counts_all(api: Client) -> None:
    agent = api.register()
    report(api, agent, *[threat(type=f"t{number}") for number in range(1000)])
    report(api, agent, threat(type="rare"), threat(type="frequent"), threat(type="frequent"))
    summary = api.get("/api/threats/summary")
    assert summary["total"] == 1003 and len(summary["byType"]) == 1000
    assert next(iter(summary["byType"].items())) == ("frequent", 2)


# Policies

SCOPES = {"all": ("block_ip", "custom"), "org": ("custom", "alert_threshold"), "agent": ("alert_threshold",
                                                                                         "auto_respond")}
# Scopes that have a policy, and for each rule in force the scope it comes from.
IN_FORCE: dict[tuple[str, ...], Any] = {
    (): {},
    ("all",): {"block_ip": "all", "custom": "all"},
    ("org",): {"custom": "org", "alert_threshold": "org"},
    ("agent",): {"alert_threshold": "agent", "auto_respond": "agent"},
    ("all", "org"): {"block_ip": "all", "custom": "org", "alert_threshold": "org"},
    ("all", "agent"): {"block_ip": "all", "custom": "all", "alert_threshold": "agent",
                       "auto_respond": "agent"},
    ("org", "agent"): {"custom": "org", "alert_threshold": "agent", "auto_respond": "agent"},
    ("all", "org", "agent"): {"block_ip": "all", "custom": "org", "alert_threshold": "agent",
                              "auto_respond": "agent"},
}


@pytest.mark.parametrize(("scopes", "others"), [
    (order, number % 2 == 0) for each in IN_FORCE
    for number, order in enumerate(itertools.permutations(each))])
def test_a_narrower_scope_replaces_rules_of_the_same_type(scopes: tuple[str, ...], others: bool,
                                                          api: Client) -> None:
    agent, other = api.register(org_id="o"), api.register(org_id="p")
    scope_of = {"all": {}, "org": {"org_id": "o"}, "agent": {"agent_id": agent["id"]}}
    if others:  # what is meant for others changes nothing but the numbers
        policy(api, "custom", org_id="p")
        policy(api, "custom", agent_id=other["id"])
    for scope in scopes:
        rules = [{"type": type, "config": {"from": scope}} for type in SCOPES[scope]]
        last = api.post("/api/policy", {"name": scope, "rules": rules, **scope_of[scope]},
                        status=201)["version"]
    path = f"/api/policy/agent/{agent['id']}"
    assert api.beat(agent)["pendingPolicies"] == len(scopes)
    fetched = api.get(path, token=agent["token"])
    expected = next(rules for each, rules in IN_FORCE.items() if set(each) == set(scopes))
    assert {rule["type"]: rule["config"]["from"] for rule in fetched["rules"]} == expected
    assert len(fetched["rules"]) == len(expected)
    assert fetched["policyVersion"] == (last if scopes else None)
    assert api.beat(agent)["pendingPolicies"] == 0
    assert api.get(f"/api/agents/{agent['id']}")["activePolicyVersion"] == fetched["policyVersion"]


def test_rules_of_one_type_in_one_scope_stand_together(api: Client) -> None:
    agent = api.register()
    rules = [{"type": "custom", "config": {"n": n}, "enabled": n == 1} for n in range(3)]
    made = api.post("/api/policy",
                    {"name": "p", "rules": [*rules, {"type": "block_ip", "config": {}}]}, status=201)
    assert made["rules"] == [*rules, {"type": "block_ip", "config": {}, "enabled": True}]
    assert api.get(f"/api/policy/agent/{agent['id']}")["rules"] == made["rules"]


def test_the_newest_policy_of_a_scope_replaces_the_former(api: Client) -> None:
    agent = api.register(org_id="o")
    made = [policy(api, "custom"), policy(api, "block_ip", org_id="o"), policy(api, "auto_respond"),
            policy(api, "alert_threshold", org_id="o")]
    assert [each["version"] for each in made] == ["v1", "v2", "v3", "v4"]
    assert api.beat(agent)["pendingPolicies"] == 2
    assert {rule["type"] for rule in api.get(f"/api/policy/agent/{agent['id']}")["rules"]} == \
        {"auto_respond", "alert_threshold"}
    assert api.get("/api/policy/active") == made[2]
    assert api.get("/api/policy/active?org_id=o") == made[3]
    assert api.get("/api/policy/active?org_id=p") is None
    assert api.get("/api/policy") == made[::-1]


def test_a_dropped_override_leaves_the_wider_scopes(api: Client) -> None:
    agent = api.register(org_id="o")
    path = f"/api/policy/agent/{agent['id']}"
    policy(api, "custom")
    policy(api, "block_ip", agent_id=agent["id"])
    assert api.get(path, token=agent["token"])["policyVersion"] == "v2"
    api.call("DELETE", path)
    fetched = api.get(path)
    assert (fetched["policyVersion"], [rule["type"] for rule in fetched["rules"]]) == ("v3", ["custom"])
    assert api.beat(agent)["pendingPolicies"] == 1, "the agent learns that its rules have changed"
    assert api.get(path, token=agent["token"]) == {**fetched, "appliedAt": NOON}
    assert api.beat(agent)["pendingPolicies"] == 0
    assert api.get(f"/api/agents/{agent['id']}")["activePolicyVersion"] == "v3"
    issued = api.get("/api/policy?limit=1")[0]
    assert (issued["version"], issued["rules"]) == ("v3", [])
    (dropped,) = api.journal("policy_dropped")
    assert (dropped["agentId"], dropped["version"], dropped["ruleCount"], dropped["droppedVersion"]) == \
        (agent["id"], "v3", 0, "v2")
    assert agent["id"] in api.refusal("DELETE", path, status=404)
    assert policy(api, agent_id=agent["id"])["version"] == "v4", "no version is ever given twice"


@pytest.mark.parametrize(("who", "query", "method", "acknowledges"), [
    ("agent", "", "GET", True), ("agent", "?ack=true", "GET", True), ("agent", "?ack=false", "GET", False),
    ("agent", "", "HEAD", False), ("admin", "", "GET", False), ("admin", "?ack=false", "GET", False),
    ("admin", "?ack=true", "GET", True), ("admin", "?ack=true", "HEAD", False)])
def test_who_acknowledges_policy(who: str, query: str, method: str, acknowledges: bool, api: Client) -> None:
    agent = api.register()
    policy(api)
    api.call(method, f"/api/policy/agent/{agent['id']}{query}",
             token=agent["token"] if who == "agent" else "admin")
    assert api.beat(agent)["pendingPolicies"] == (0 if acknowledges else 1)


def test_a_dry_run_of_a_policy_tells_its_effect_and_issues_nothing(api: Client) -> None:
    agent = api.register(org_id="o")
    api.register(org_id="p")
    policy(api, "custom", "block_ip")
    before = stored(api, agent)
    body = {"name": "p", "rules": [{"type": "custom", "config": {}}, RULE], "dryRun": True}
    rule = {**RULE, "enabled": True}
    exactly(api.post("/api/policy", body), {
        "dryRun": True, "agents": 2, "broadcastedTo": 2, "replaces": "v1", "added": [rule],
        "removed": [{"type": "block_ip", "config": {}, "enabled": True}]})
    advance(api, 67)
    of_org = api.post("/api/policy", {**body, "org_id": "o"})
    assert (of_org["agents"], of_org["broadcastedTo"], of_org["replaces"],
            of_org["removed"]) == (1, 0, None, [])
    assert api.post("/api/policy", {**body, "agent_id": agent["id"]})["agents"] == 1
    api.refusal("POST", "/api/policy", {**body, "agent_id": "agent-00000000"}, status=404)
    both = {**body, "org_id": "o", "agent_id": agent["id"]}
    assert "agent_id: " in api.refusal("POST", "/api/policy", both, status=400)
    assert api.get("/api/policy") == before[3] and not api.journal("policy_created")[1:]


@pytest.mark.parametrize(("acknowledged", "pending", "active"), [
    ([], 2, None), (["v1"], 1, "v1"), (["v2"], 0, "v2"), (["v1", "v2"], 0, "v2"), (["v2", "v1"], 0, "v2"),
    (["v3"], 2, None), (["v1", "v99"], 1, "v1"), (["fetch"], 0, "v2"), (["fetch", "v1"], 0, "v2"),
    (["v1", "fetch"], 0, "v2"), (["peek"], 2, None), (["v1", "peek"], 1, "v1")])
def test_an_acknowledgement_never_goes_backwards(
        acknowledged: list[str], pending: int, active: str | None, api: Client) -> None:
    agent = api.register(org_id="o")
    policy(api, "custom")
    policy(api, "block_ip", org_id="o")
    for each in acknowledged:
        if each.startswith("v"):
            assert api.beat(agent, policyVersion=each)["status"] == "online"
        else:
            api.get(f"/api/policy/agent/{agent['id']}" + "?ack=false" * (each == "peek"),
                    token=agent["token"])
    assert api.beat(agent)["pendingPolicies"] == pending
    assert api.get(f"/api/agents/{agent['id']}")["activePolicyVersion"] == active


def test_applied_at_is_when_the_agent_acknowledged(api: Client, clock: ManualClock) -> None:
    agent = api.register()
    path = f"/api/policy/agent/{agent['id']}"
    policy(api)
    assert api.get(f"{path}?ack=false")["appliedAt"] is None
    clock.advance(1)
    assert api.get(path, token=agent["token"])["appliedAt"] == manager.iso(START_MS + 1000)
    clock.advance(1)
    assert api.get(path)["appliedAt"] == manager.iso(START_MS + 1000)
    assert api.get(f"{path}?ack=true")["appliedAt"] == manager.iso(START_MS + 1000)
    policy(api)
    assert api.get(f"{path}?ack=false")["appliedAt"] is None
    api.beat(agent, policyVersion="v2")
    assert api.get(f"{path}?ack=false")["appliedAt"] == manager.iso(START_MS + 2000)


def test_an_unchanged_policy_is_answered_304(api: Client) -> None:
    agent = api.register(org_id="o")
    path = f"/api/policy/agent/{agent['id']}"
    call = partial(api.call, "GET", token=agent["token"])
    none = call(path).headers["ETag"]
    assert call(path, headers={"If-None-Match": none}, status=304).headers["ETag"] == none
    policy(api)
    tag = call(f"{path}?ack=false", headers={"If-None-Match": none}).headers["ETag"]
    assert re.fullmatch(r'(W/)?"[^"]+"', tag) and tag != none
    for sent in (tag, f"W/{tag}", f'"x", {tag}', f'W/"x" ,W/{tag},"y"', "*"):
        answer = call(f"{path}?ack=false", headers={"If-None-Match": sent}, status=304)
        assert answer.body == b"" and answer.headers["ETag"] == tag
    for sent in ('"x"', tag.strip('"'), tag[:-2] + '"', ""):
        assert call(f"{path}?ack=false", headers={"If-None-Match": sent}).headers["ETag"] == tag
    assert api.beat(agent)["pendingPolicies"] == 1
    call(path, headers={"If-None-Match": tag}, status=304)
    assert api.beat(agent)["pendingPolicies"] == 0, "a fetch acknowledges, answered in full or not"
    policy(api, org_id="p")
    call(path, headers={"If-None-Match": tag}, status=304)
    policy(api, org_id="o")
    assert call(path, headers={"If-None-Match": tag}).headers["ETag"] != tag


def test_a_policy_is_broadcast_to_the_online_agents_of_its_scope(api: Client) -> None:
    silent = [api.register(org_id="o"), api.register()]
    advance(api, 67)
    online = [api.register(org_id="o"), api.register(org_id="o"), api.register(org_id="p"), api.register()]
    for scope, expected in (({}, 4), ({"org_id": "o"}, 2), ({"org_id": "p"}, 1), ({"org_id": "nobody"}, 0),
                            ({"agent_id": online[0]["id"]}, 1), ({"agent_id": silent[0]["id"]}, 0)):
        assert policy(api, **scope)["broadcastedTo"] == expected, scope
    api.call("DELETE", f"/api/agents/{online[0]['id']}")
    api.beat(silent[1])
    assert policy(api)["broadcastedTo"] == 4


def test_pending_policies_whenever_the_agent_registered(api: Client) -> None:
    def pending() -> list[int]:
        return [api.beat(agent)["pendingPolicies"] for agent in agents]
    agents = [api.register(org_id="o")]
    policy(api)
    agents.append(api.register(org_id="o"))
    assert pending() == [1, 1]
    policy(api, org_id="o")
    agents += [api.register(org_id="o"), api.register(org_id="p")]
    assert pending() == [2, 2, 2, 1]
    for agent in agents:
        api.get(f"/api/policy/agent/{agent['id']}", token=agent["token"])
    assert pending() == [0, 0, 0, 0]
    policy(api)
    policy(api)
    assert pending() == [1, 1, 1, 1]
    policy(api, agent_id=agents[0]["id"])
    assert pending() == [2, 1, 1, 1]


def test_a_policy_of_two_scopes_or_of_an_unknown_agent_is_refused(api: Client) -> None:
    agent = api.register()
    body = {"name": "p", "rules": [RULE]}
    assert "agent_id" in api.refusal("POST", "/api/policy", {**body, "org_id": "o", "agent_id": agent["id"]},
                                     status=400)
    api.refusal("POST", "/api/policy", {**body, "agent_id": "agent-00000000"}, status=404)
    api.refusal("GET", "/api/policy/agent/agent-00000000", status=404)
    api.refusal("DELETE", "/api/policy/agent/agent-00000000", status=404)
    assert api.get("/api/policy") == [] and not api.journal("policy_created")



def test_a_timeline_counts_agents_and_threats_of_each_hour(api: Client, clock: ManualClock) -> None:
    noon = START_MS // 3_600_000 * 3_600_000
    first, second = api.register(), api.register(hostname="h2")
    report(api, first, threat(severity="low"), threat(severity="critical"))
    clock.advance(3600)  # both went stale and offline within the first hour
    assert [(hour["at"], hour["online"], hour["stale"], hour["offline"], hour["threats"]["low"],
             hour["threats"]["critical"]) for hour in api.get("/api/timeline?hours=3")["hours"]] == [
        (manager.iso(noon - 3_600_000), 0, 0, 0, 0, 0), (manager.iso(noon), 0, 0, 2, 1, 1),
        (manager.iso(noon + 3_600_000), 0, 0, 2, 0, 0)]
    api.beat(first)
    event = report(api, first, threat(severity="low"))[0]
    api.call("PATCH", f"/api/threats/{event}", {"state": "false_positive"})
    clock.advance(3600)
    api.call("DELETE", f"/api/agents/{second['id']}")
    third = api.register(hostname="h3")
    clock.advance(100)
    hours = api.get("/api/timeline")["hours"]
    assert len(hours) == 24 and {hour["at"][13:] for hour in hours} == {":00:00.000Z"}
    assert [(hour["online"], hour["stale"], hour["offline"]) for hour in hours[-4:]] == [
        (0, 0, 0), (0, 0, 2), (0, 0, 2), (0, 1, 1)]
    assert [sum(hour["threats"].values()) for hour in hours[-4:]] == [0, 2, 0, 0]
    assert third["id"] in {each["id"] for each in api.get("/api/agents?status=stale")}
    for query, named in (("hours=0", "hours"), ("hours=169", "hours"), ("hours=x", "hours")):
        assert named in api.refusal("GET", f"/api/timeline?{query}", status=400)
    api.refusal("GET", "/api/timeline?agent_id=agent-00000000", status=404)


def test_the_timeline_of_an_agent_tells_its_intervals_without_gaps(api: Client, clock: ManualClock) -> None:
    agent = api.register()
    clock.advance(30)
    api.beat(agent)
    clock.advance(67)
    api.beat(agent)
    report(api, agent, threat())
    report(api, api.register(), threat())
    clock.advance(7200)
    timeline = api.get(f"/api/timeline?hours=3&agent_id={agent['id']}")
    at = [manager.iso(START_MS + passed_ms) for passed_ms in (0, 96_000, 97_000, 163_000, 397_000, 7_297_000)]
    assert timeline["intervals"] == [
        {"status": status, "from": since, "until": until} for status, (since, until) in zip(
            ("online", "stale", "online", "stale", "offline"), itertools.pairwise(at), strict=True)]
    assert [hour["threats"]["high"] for hour in timeline["hours"]] == [1, 0, 0]
    assert "online" not in timeline["hours"][0]
    (only,) = api.get(f"/api/timeline?hours=1&agent_id={agent['id']}")["intervals"]
    assert (only["status"], only["from"]) == ("offline", timeline["hours"][-1]["at"])
    clock.advance(40 * 86_400)  # of its entries none is kept
    (only,) = api.get(f"/api/timeline?hours=2&agent_id={agent['id']}")["intervals"]
    assert only["status"] == "offline"


def test_a_timeline_agrees_with_what_was_counted_at_each_hour(api: Client, clock: ManualClock) -> None:
    chance = random.Random(7)
    agents, counted = [api.register() for _ in range(8)], []
    clock.advance(3600.5)
    for _ in range(30):
        for _ in range(12):
            if chance.random() < 0.1:
                agents.append(api.register())
            if chance.random() < 0.1:
                api.call("DELETE", f"/api/agents/{agents.pop(chance.randrange(len(agents)))['id']}")
            for agent in chance.sample(agents, len(agents) // 2):
                api.beat(agent)
            clock.advance(299.9)
        clock.advance(0.2)  # half a second before the hour ends
        overview = api.get("/api/overview")
        counted.append(tuple(overview[f"{status}Agents"] for status in Status))
        clock.advance(1)
    hours = api.get("/api/timeline?hours=31")["hours"]
    assert [tuple(hour[status] for status in Status) for hour in hours[:-1]] == counted


@pytest.mark.parametrize("step_s", [0, 7200, 1234], ids=["no step", "whole hours", "part of an hour"])
def test_a_timeline_counts_threats_by_the_hours_of_the_wall_clock(
        api: Client, clock: ManualClock, step_s: int) -> None:
    agent, expected = api.register(), Counter()
    clock.step(step_s)
    clock.advance(60)  # the step is noticed
    for number in range(20):
        severity = ("high", "low")[number % 2]
        made = report(api, agent, threat(severity=severity))[0]
        if number % 5 == 0:
            api.call("PATCH", f"/api/threats/{made}", {"state": "false_positive"})
        else:
            expected[clock.now().wall_ms // 3_600_000, severity] += 1
        clock.advance(1500)
    last = clock.now().wall_ms // 3_600_000
    for path in ("/api/timeline?hours=12", f"/api/timeline?hours=12&agent_id={agent['id']}"):
        hours = api.get(path)["hours"]
        found = {(last - 11 + index, severity): count for index, hour in enumerate(hours)
                 for severity, count in hour["threats"].items() if count}
        assert found == expected


# The journal and query plans

def test_the_journal_says_what_happened_and_who_did_it() -> None:
    with fleet(auth_token="first,second", enroll_token="enrol") as api:
        first, second = (
            {"role": "admin", "address": "198.51.100.7",
             "credential": hashlib.sha256(token.encode()).hexdigest()[:8]} for token in ("first", "second"))
        enroller = {"role": "enroller", "address": "198.51.100.7"}
        by_manager = {"role": "manager"}
        agent = api.post("/api/agents/register", {**AGENT, "org_id": "o", "machine_id": "m"},
                         token="enrol", status=201)
        api.beat(agent)
        clone = api.register(org_id="o", machine_id="m", hostname="web-2")
        itself = {"role": "agent", "agent_id": agent["id"]}
        path = f"/api/agents/{agent['id']}"
        api.call("PATCH", path, {"tags": ["a"]}, token="second")
        api.call("PATCH", path, {"tags": ["a"]})  # changes nothing
        policy(api, agent_id=agent["id"])
        api.call("DELETE", f"/api/policy/agent/{agent['id']}", token="second")
        report(api, agent, threat(severity="low"), threat(severity="high"))
        api.beat(agent, version="2.0")
        advance(api, 67)
        api.beat(agent)
        api.call("DELETE", path, token=agent["token"])
        api.call("DELETE", f"/api/agents/{clone['id']}")
        expected = [
            ("agent_registered", agent, enroller, {"hostname": "web-1"}),
            ("agent_registered", clone, first, {"hostname": "web-2"}),
            ("identity_conflict", clone, first, {"otherAgentId": agent["id"], "machineId": "m"}),
            ("agent_updated", agent, second, {"tags": {"from": [], "to": ["a"]}}),
            ("policy_created", agent, first, {"version": "v1", "ruleCount": 1}),
            ("policy_dropped", agent, second, {"droppedVersion": "v1", "version": "v2", "hostname": "web-1"}),
            ("threats_reported", agent, itself,
             {"agentId": agent["id"], "hostname": "web-1", "count": 2, "maxSeverity": "high"}),
            ("agent_updated", agent, itself, {"version": {"from": "1.2.0", "to": "2.0"}}),
            ("agent_stale", agent, by_manager, {}), ("agent_stale", clone, by_manager, {}),
            ("agent_online", agent, by_manager, {}),
            ("agent_deregistered", agent, itself, {"hostname": "web-1"}),
            ("agent_deregistered", clone, first, {"hostname": "web-2"})]
        entries = api.journal()
        assert [(entry["type"], entry["agentId"], entry["org_id"]) for entry in entries] == \
            [(type, who["id"], "o") for type, who, _, _ in expected]
        for entry, (type, _, actor, data) in zip(entries, expected, strict=True):
            assert actor.items() <= entry["actor"].items(), type
            assert entry["actor"]["role"] != "admin" or entry["actor"] == actor
            assert data.items() <= entry.items(), type
        assert [entry["seq"] for entry in entries] == sorted({entry["seq"] for entry in entries})
        assert set(api.journal("policy_created")[0]) >= {"policyId", "version", "ruleCount"}
        tokens = ("first", "second", "enrol", agent["token"])
        assert not any(json.dumps(token) in json.dumps(entries) for token in tokens)


def test_the_journal_is_read_on_from_where_one_was(api: Client) -> None:
    agents = [api.register() for _ in range(60)]
    policy(api)
    seqs = [entry["seq"] for entry in api.journal()]
    assert [entry["seq"] for entry in api.get("/api/events")] == seqs[:50]
    assert [entry["seq"] for entry in api.get("/api/events?limit=3")] == seqs[:3]
    after, read = 0, []
    while page := api.get(f"/api/events?after={after}&limit=25"):
        read += [entry["seq"] for entry in page]
        after = read[-1]
    assert read == seqs and len(seqs) == 61
    for query, expected in ((f"after={seqs[-2]}", seqs[-1:]), ("type=policy_created", seqs[-1:]),
                            (f"agent_id={agents[3]['id']}", seqs[3:4]),
                            (f"after={seqs[3]}&agent_id={agents[3]['id']}", []),
                            (f"type=policy_created&agent_id={agents[3]['id']}", []), ("type=agent_stale", []),
                            (f"after={2**53 - 1}", [])):
        assert [entry["seq"] for entry in api.get(f"/api/events?{query}")] == expected, query


def test_an_entry_is_flat_with_the_fields_of_its_type_beside_the_common_ones(api: Client) -> None:
    agent = api.register(org_id="o", ip="192.0.2.1")
    api.beat(agent)
    seen = api.get(f"/api/agents/{agent['id']}")["lastHeartbeat"]
    report(api, agent, threat(severity="low"), threat(severity="high"))
    policy(api, agent_id=agent["id"])
    advance(api, 400)
    api.beat(agent)
    shapes = {
        "threats_reported": {"hostname": "web-1", "count": 2, "maxSeverity": "high"},
        "policy_created": {"version": "v1", "ruleCount": 1},
        "agent_stale": {"hostname": "web-1", "lastSeen": seen},
        "agent_offline": {"hostname": "web-1", "lastSeen": seen},
        "agent_online": {"hostname": "web-1", "ip": "192.0.2.1"}}
    for type, expected in shapes.items():
        (entry,) = api.journal(type)
        assert list(entry)[:6] == ["seq", "at", "type", "agentId", "org_id", "actor"], type
        assert (entry["agentId"], entry["org_id"], "data" in entry) == (agent["id"], "o", False), type
        assert expected.items() <= entry.items(), type
    assert api.journal("policy_created")[0]["policyId"].startswith("pol_")


def test_an_agent_that_registers_again_comes_online_with_its_new_address_and_hostname(api: Client) -> None:
    agent = api.register(machine_id="m", ip="192.0.2.1")
    api.beat(agent)
    advance(api, 67)
    api.post("/api/agents/register", {**AGENT, "machine_id": "m", "ip": "192.0.2.2", "hostname": "web-2"})
    (stale,), (online,) = api.journal("agent_stale"), api.journal("agent_online")
    assert (stale["hostname"], online["hostname"], online["ip"]) == ("web-1", "web-2", "192.0.2.2")


def test_the_journal_is_read_by_time_by_several_types_and_backwards(api: Client) -> None:
    api.register()
    advance(api, 10)
    policy(api)
    api.register()
    advance(api, 10)
    policy(api)
    first, second, third, fourth = api.journal()
    of_types = "type=policy_created&type=agent_registered"
    for query, expected in (
            (f"since={second['at']}", [second, third, fourth]), (f"until={second['at']}", [first]),
            (f"since={second['at']}&until={fourth['at']}", [second, third]),
            (of_types, [first, second, third, fourth]),
            (f"{of_types}&order=desc&limit=3", [fourth, third, second]), ("order=desc&type=agent_registered",
                           [third, first]),
            (f"order=desc&after={second['seq']}", [fourth, third]), ("order=asc&limit=1", [first]),
            ("org_id=o", [])):
        assert api.get(f"/api/events?{query}") == expected, query
    for query, named in (("order=up", "order"), ("since=yesterday", "since"), ("type=nope", "type[0]")):
        assert api.refusal("GET", f"/api/events?{query}", status=400).startswith(f"{named}: must be"), query


# What may read a table or an index from end to end. Agents are counted so. The online ones are read in order
# of registration, since most agents are online and the page is soon full.
_ALL_COUNTED = r"SCAN (contacts|agents|a) USING COVERING INDEX \w+$|SCAN contacts$"
MAY_SCAN = {"an overview": rf"COVERING INDEX agents_os$|{_ALL_COUNTED}", "health": _ALL_COUNTED,
            "agents": _ALL_COUNTED + "|SCAN c$", "threats": r"INDEX threats_(time|type)$",
            "agents online": _ALL_COUNTED + "|SCAN c$",
            "a sweep": r"SCAN contacts$|COVERING INDEX agents_\w+$", "a purge": r"SCAN contacts$",
            # By an index the page is soon full. What every heartbeat writes has no index: the narrow rows of
            # at most MANAGER_MAX_AGENTS agents are read.
            "agents sorted": r"SCAN [ac] USING (COVERING )?INDEX (agents_hostname|contacts_version)$|"
                             + _ALL_COUNTED,
            "agents sorted by what heartbeats write": rf"SCAN [ac]$|{_ALL_COUNTED}",
            "agents searched": rf"SCAN [ac]$|{_ALL_COUNTED}", "a timeline": _ALL_COUNTED}
# A search that is none: it begins neither with a value nor with a bound in time or order.
ENDLESS = re.compile(r"SEARCH \w+ USING [^(]*\((?!\w+=|received_ms|at_ms|seen_ms|rowid)")
WORK: dict[str, Any] = {
    "a heartbeat": lambda api, agent: api.beat(agent, cpu=1),
    "a heartbeat with news": lambda api, agent: api.beat(agent, version="3", policyVersion="v1"),
    "an agent": lambda api, agent: api.get(f"/api/agents/{agent['id']}"),
    "events": lambda api, agent: report(api, agent, threat(own="new", sha1="ab", **IP)),
    "threats": lambda api, agent: api.get("/api/threats?limit=50&page=2"),
    "threats by anything": lambda api, agent: [api.get(f"/api/threats?limit=5&{query}") for query in (
        "org_id=o1", "severity=low", "type=t1", "file_hash=ab", "state=false_positive",
        "before=evt_000000000009", "source_ip=203.0.113.1", f"agent_id={agent['id']}",
        "since=2026-03-07T12:00:01Z&until=2026-03-07T12:00:02Z")],
    "a summary": lambda api, agent: [api.get(f"/api/threats/summary?{query}")
                                     for query in ("", "org_id=o1&period=7d")],
    "an overview": lambda api, agent: [api.get(f"/api/overview?{query}") for query in ("", "org_id=o1")],
    "agents online": lambda api, agent: api.get("/api/agents?limit=5&status=online"),
    "agents": lambda api, agent: [api.get(f"/api/agents?limit=5&{query}") for query in (
        "status=stale", "status=offline", "org_id=o1", "tag=a", "tag=a&tag=b&org_id=o1&status=online")],
    "agents by os and version": lambda api, agent: [api.get(f"/api/agents?limit=5&{query}") for query in (
        "os=x", "version=1.2.0", "os=x&version=1.2.0&org_id=o1", "os=x&tag=a&detail=true")],
    "agents sorted": lambda api, agent: [api.get(f"/api/agents?limit=5&sort={sort}") for sort in (
        "hostname", "-hostname", "version", "-version")],
    "agents sorted by what heartbeats write": lambda api, agent: [
        api.get(f"/api/agents?limit=5&sort={sort}") for sort in (
            "lastHeartbeat", "status", "recentThreats", "-cpu", "memory")],
    "agents searched": lambda api, agent: [
        api.get(f"/api/agents?limit=5&{query}") for query in ("q=h1", "silent_ms=5")],
    "agents in bulk": lambda api, agent: api.post("/api/agents/bulk",
                                                  {"ids": [agent["id"]], "addTags": ["x"]}),
    "a policy": lambda api, agent: policy(api, org_id="o1"),
    "a fetch": lambda api, agent: api.get(f"/api/policy/agent/{agent['id']}"),
    "the journal": lambda api, agent: [api.get(f"/api/events?limit=5&{query}") for query in (
        "after=3", "type=agent_stale", f"agent_id={agent['id']}", "type=agent_stale&type=agent_online",
        "since=2026-03-07T12:00:01Z&until=2026-03-07T12:00:02Z", "order=desc&org_id=o1")],
    "a timeline": lambda api, agent: [api.get(f"/api/timeline?{query}") for query in (
        "", f"hours=168&agent_id={agent['id']}")],
    "health": lambda api, agent: advance(api, 1),
    "a sweep": lambda api, agent: advance(api, 67),
    "a purge": lambda api, agent: advance(api, 31 * 86_400),
}


def test_no_query_reads_a_whole_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, statements, current = sqlite3.connect, dict[tuple[str, str], sqlite3.Connection](), [""]

    def tracing(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(lambda sql: statements.update({(current[0], sql): connection}))
        return connection

    monkeypatch.setattr(sqlite3, "connect", tracing)
    with fleet(data_dir=tmp_path) as api:
        rng = random.Random(1)
        agents = [api.register(hostname=f"h{n}", org_id=f"o{n % 7}", tags=["a", "b"][:n % 3],
                               os=rng.choice("xy"))
                  for n in range(60)]
        for agent in agents[:20]:
            report(api, agent, *[threat(type=f"t{n % 9}", severity=rng.choice(manager.SEVERITIES), own=str(n),
                                        sourceIp=f"203.0.113.{rng.randrange(200)}") for n in range(150)])
        policy(api)
        statements.clear()
        for name, work in WORK.items():
            current[0] = name
            work(api, agents[1])
        found, scans = set[str](), list[str]()
        for connection in statements.values():
            connection.set_trace_callback(None)
        for (name, sql), connection in sorted(statements.items(), key=lambda each: each[0]):
            if not re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)", sql) or "sqlite_sequence" in sql:
                continue
            aliases = {alias or table: table for table, alias in re.findall(
                r"(?:FROM|JOIN|UPDATE)\s+(\w+)"
                r"(?:\s+(?!WHERE|JOIN|ORDER|GROUP|SET|USING|LIMIT|ON|AND|UNION)(\w+))?", sql)}
            for *_, step in connection.execute("EXPLAIN QUERY PLAN " + sql):
                verb, name_in_plan, *_ = [*step.split(), ""]
                if aliases.get(name_in_plan, name_in_plan) not in (
                        "threats", "contacts", "journal", "agents"):
                    continue
                found.add(name)
                if (verb == "SCAN" and not re.search(MAY_SCAN.get(name, "-"), step)) or ENDLESS.match(step):
                    scans.append(f"{name}: {step}\n    {' '.join(sql.split())}")
    assert not scans, "\n".join(scans)
    assert found >= set(WORK), "work whose statements were not seen"


# 6  HTTP ##############################################################################################


# Shapes

NOON = "2026-03-07T12:00:00.000Z"
PAGES = "/api/agents", "/api/threats", "/api/policy", "/api/events"


def test_an_empty_fleet_has_every_shape(api: Client) -> None:
    none = {"total": 0, "critical": 0, "high": 0, "medium": 0, "low": 0, "falsePositives": 0}
    for path, expected in {
        **{path: [] for path in PAGES},
        "/api/policy/active": None, "/api/policy/active?org_id=o": None,
        "/api/threats/summary": {
            "period": "24h", "total": 0, "bySeverity": {"critical": 0, "high": 0, "medium": 0, "low": 0},
            "byType": {}, "topAgents": [], "topSourceIps": [], "falsePositives": 0},
        "/api/overview": {
            "totalAgents": 0, "onlineAgents": 0, "staleAgents": 0, "offlineAgents": 0,
            "threatSummary": {"last24h": none, "last7d": none}, "activePolicyVersion": None, "topThreats": [],
            "agentsByOs": {}, "updatedAt": NOON},
        "/health": {"status": "healthy", "version": manager.__version__, "uptime": 0,
                    "agents": {"total": 0, "online": 0}},
    }.items():
        answer = api.call("GET", path)
        exactly(answer.json, {"ok": True, "data": expected})
        assert answer.content_type == "application/json"
    for path in ("/api/agents", "/api/threats", "/api/policy"):
        exactly(api.call("GET", f"{path}?page=1").json,
                {"ok": True, "data": [], "pagination": {"total": 0, "page": 1, "limit": 50, "pages": 0}})


def test_agents_have_the_shapes_of_the_published_page(api: Client, clock: ManualClock) -> None:
    tags = ["production", "web-tier"]
    registered = api.call("POST", "/api/agents/register", {**AGENT, "hostname": "web-server-1", "tags": tags},
                          status=201)
    data = registered.json["data"]
    agent_id, token = data["id"], data["token"]
    assert re.fullmatch(r"agent-[0-9a-f]{8}", agent_id) and len(token) >= 32
    base = {"id": agent_id, "hostname": "web-server-1", "os": "linux", "version": "1.2.0",
            "ip": "198.51.100.7"}
    exactly(registered.json, {"ok": True,
                              "data": {**base, "tags": tags, "status": "online", "registeredAt": NOON,
                                      "token": token}})
    detail = {**base, "status": "online", "tags": tags, "cpu": None, "memory": None, "uptime": None,
              "lastHeartbeat": NOON,
              "registeredAt": NOON, "recentThreats": 0, "activePolicyVersion": None, "pendingPolicies": 0,
              "org_id": None, "machine_id": None, "arch": None, "statusSince": NOON,
              "statusReason": "last heartbeat 12:00:00.000Z, due by 12:01:06.000Z",
              "staleAt": "2026-03-07T12:01:06.000Z", "offlineAt": "2026-03-07T12:05:00.000Z"}
    exactly(api.get(f"/api/agents/{agent_id}"), detail)
    clock.advance(30.5)
    policy(api)
    beat = api.call("POST", f"/api/agents/{agent_id}/heartbeat",
                    {"uptime": 86400, "cpu": 12.5, "memory": 45.2,
                     "version": "1.2.1"}, token=token)
    at = "2026-03-07T12:00:30.500Z"
    exactly(beat.json, {"ok": True, "data": {"id": agent_id, "status": "online", "lastHeartbeat": at,
                                             "pendingPolicies": 1}})
    assert beat.headers["X-Heartbeat-Interval"] == "20"
    api.get(f"/api/policy/agent/{agent_id}?ack=true")
    report(api, data, THREAT)
    detail |= {"version": "1.2.1", "cpu": 12.5, "memory": 45.2, "uptime": 86400, "lastHeartbeat": at,
               "recentThreats": 1, "activePolicyVersion": "v1",
               "statusReason": "last heartbeat 12:00:30.500Z, due by 12:01:36.500Z",
               "staleAt": "2026-03-07T12:01:36.500Z", "offlineAt": "2026-03-07T12:05:30.500Z"}
    exactly(api.get(f"/api/agents/{agent_id}"), detail)
    exactly(api.call("PATCH", f"/api/agents/{agent_id}", {"tags": ["x"]}).json,
            {"ok": True, "data": {**detail, "tags": ["x"]}})
    exactly(api.get("/api/agents?detail=true"), [{**detail, "tags": ["x"]}])
    full = api.register(org_id="o", machine_id="m", arch="arm64", ip="2001:DB8::1")
    shown = api.get(f"/api/agents/{full['id']}")
    assert (shown["org_id"], shown["machine_id"], shown["arch"],
            shown["pendingPolicies"]) == ("o", "m", "arm64", 1)
    assert list(full) == ["id", "hostname", "os", "version", "ip", "tags", "status", "registeredAt", "org_id",
                          "machine_id", "token"]
    item = {**base, "version": "1.2.1", "status": "online", "tags": ["x"], "lastHeartbeat": at,
            "registeredAt": NOON}
    exactly(api.call("GET", "/api/agents").json, {"ok": True, "data": [item, {
        **item, "id": full["id"], "hostname": "web-1", "version": "1.2.0", "ip": "2001:db8::1", "tags": [],
        "registeredAt": at}]})
    exactly(api.call("DELETE", f"/api/agents/{agent_id}").json,
            {"ok": True, "data": {"message": f"Agent {agent_id} deregistered successfully"}})
    assert agent_id in api.refusal("GET", f"/api/agents/{agent_id}", status=404)
    api.refusal("POST", f"/api/agents/{agent_id}/heartbeat", {}, status=401, token=token)


def test_threats_have_the_shapes_of_the_contract(api: Client) -> None:
    agent, other = api.register(hostname="h", org_id="o"), api.register(org_id="o")
    details = {"sourceIp": "203.0.113.9", "é": [1, 0.1, None, {"\x00": "\u2028"}], "big": 2**53 - 1,
               "small": 1e-7}
    answer = api.call("POST", f"/api/agents/{agent['id']}/events", {"events": [
        {"type": "a", "severity": "low", "details": {}}, {
            "type": "b", "severity": "critical", "details": details, "timestamp": "2026-03-01T00:00:00+08:00",
            "sigmaRuleId": "s-1", "confidence": 0.93, "id": "own"}]}, status=201, token=agent["token"])
    one, two = answer.json["data"]["eventIds"]
    exactly(answer.json, {"ok": True, "data": {"received": 2, "eventIds": [one, two]}})
    (three,) = report(api, other, THREAT)
    found = api.call("GET", "/api/threats").json
    item = {"id": two, "agentId": agent["id"], "hostname": "h", "type": "b", "severity": "critical",
            "confidence": 0.93, "details": details, "sigmaRuleId": "s-1",
            "timestamp": "2026-03-01T00:00:00+08:00", "receivedAt": NOON,
            "correlatedWith": [three], "state": "open", "note": None}
    exactly(found["data"][1:], [item, {
        **item, "id": one, "type": "a", "severity": "low", "confidence": None, "details": {},
        "sigmaRuleId": None, "timestamp": None, "correlatedWith": []}])
    assert list(found) == ["ok", "data"]
    ranked = [{"agentId": agent["id"], "hostname": "h", "count": 2},
              {"agentId": other["id"], "hostname": "web-1", "count": 1}]
    by_severity = {"critical": 1, "high": 1, "medium": 0, "low": 1}
    summary = api.get("/api/threats/summary?period=7d")
    assert list(summary) == ["period", "total", "bySeverity", "byType", "topAgents", "topSourceIps",
                             "falsePositives"]
    assert summary == {"period": "7d", "total": 3, "bySeverity": by_severity, "byType": {"a": 1, "b": 1,
                                                                                         "brute_force": 1},
                       "topAgents": ranked, "topSourceIps": [{"ip": "203.0.113.9", "count": 2}],
                       "falsePositives": 0}
    assert [list(each) for each in summary["topAgents"]] == [list(each) for each in ranked]


def test_policies_have_the_shapes_of_the_contract(api: Client) -> None:
    agent = api.register(org_id="o")
    rule = {**RULE, "enabled": True}
    made = []
    for version, scope in (("v1", {}), ("v2", {"org_id": "o"}), ("v3", {"agent_id": agent["id"]})):
        answer = api.call("POST", "/api/policy",
                          {"name": "p", "rules": [RULE], "description": "two\nlines", **scope},
                          status=201).json
        made.append({"id": answer["data"]["id"], "name": "p", "description": "two\nlines", "version": version,
                     "rules": [rule], **scope, "broadcastedTo": 1, "createdAt": NOON})
        exactly(answer, {"ok": True, "data": made[-1]})
        assert re.fullmatch(r"pol_\w+", answer["data"]["id"])
    exactly(api.call("GET", "/api/policy").json, {"ok": True, "data": made[::-1]})
    exactly(api.get("/api/policy/active"), made[0])
    exactly(api.get("/api/policy/active?org_id=o"), made[1])
    exactly(api.get(f"/api/policy/agent/{agent['id']}", token=agent["token"]),
            {"agentId": agent["id"], "policyVersion": "v3", "rules": [rule], "appliedAt": NOON})
    api.register()
    other = api.register(hostname="bare")
    api.call("DELETE", f"/api/policy/agent/{agent['id']}")
    assert policy(api)["description"] is None
    exactly(api.get(f"/api/policy/agent/{other['id']}?ack=false"), {
        "agentId": other["id"], "policyVersion": "v5",
        "rules": [{"type": "custom", "config": {}, "enabled": True}], "appliedAt": None})


def test_an_agent_without_policies_is_answered_nulls(api: Client) -> None:
    agent = api.register()
    exactly(api.get(f"/api/policy/agent/{agent['id']}"),
            {"agentId": agent["id"], "policyVersion": None, "rules": [], "appliedAt": None})


def test_the_overview_and_the_journal_have_the_shapes_of_the_contract(api: Client) -> None:
    offline = api.register(os="darwin", org_id="o")
    advance(api, 240)
    api.register(os="win32")
    advance(api, 67)
    agent = api.register(os="darwin", org_id="o")
    report(api, agent, threat(type="a"), threat(type="b"), threat(type="b", severity="low"))
    policy(api, org_id="o")
    policy(api)
    overview = api.get("/api/overview")
    counts = {"total": 3, "critical": 0, "high": 2, "medium": 0, "low": 1, "falsePositives": 0}
    exactly(overview, {
        "totalAgents": 3, "onlineAgents": 1, "staleAgents": 1, "offlineAgents": 1,
        "threatSummary": {"last24h": counts, "last7d": counts}, "activePolicyVersion": "v2",
        "topThreats": [{"type": "b", "count": 2}, {"type": "a", "count": 1}],
        "agentsByOs": {"darwin": 2, "win32": 1}, "updatedAt": manager.iso(START_MS + 307_000)})
    of_org = api.get("/api/overview?org_id=o")
    assert [of_org[name] for name in ("totalAgents", "onlineAgents", "staleAgents", "offlineAgents",
                                      "agentsByOs")] == \
        [2, 1, 0, 1, {"darwin": 2}]
    entry = api.journal("agent_offline")[0]
    exactly(entry, {"seq": entry["seq"], "at": manager.iso(START_MS + 300_000), "type": "agent_offline",
                    "agentId": offline["id"], "org_id": "o", "actor": {"role": "manager"},
                    "hostname": "web-1", "lastSeen": offline["registeredAt"]})


def test_health_counts_the_fleet_and_the_seconds(api: Client, clock: ManualClock) -> None:
    api.register()
    clock.advance(67.9)
    gone = api.register()
    state = {"status": "healthy", "version": manager.__version__, "uptime": 67}
    exactly(api.get("/health", token=None), {**state, "agents": {"total": 2, "online": 1}})
    exactly(api.get("/readyz", token=None), state)
    exactly(api.get("/livez", token=None), {"status": "alive"})
    api.call("DELETE", f"/api/agents/{gone['id']}")
    assert api.get("/health", token=None)["agents"] == {"total": 1, "online": 0}


def test_no_request_without_a_token_asks_the_database(server: Server, api: Client) -> None:
    anyones = [each.path for each in manager.ENDPOINTS if "anyone" in each.allow]
    assert {"/health", "/readyz", "/livez", "/openapi.json"} <= set(anyones)
    with server.manager.store.transaction(), ThreadPoolExecutor(1) as pool:
        for path in anyones:  # another thread would wait for this transaction to end
            assert pool.submit(api.call, "GET", path, token=None).result(LIMIT_S).status_int == 200
    server.manager.store.close()
    for path in anyones:
        api.call("GET", path, token=None)


def test_health_says_what_the_timer_last_found(server: Server, api: Client, clock: ManualClock) -> None:
    with locked(server.manager.store.folder):
        assert api.get("/health", token=None)["status"] == "healthy"
        clock.advance(1)
        for path in ("/health", "/readyz"):
            answer = api.call("GET", path, token=None, status=503)
            assert "locked" in answer.json["error"] and answer.json["data"]["status"] == "unhealthy"
        api.get("/livez", token=None)
    clock.advance(1)
    assert api.get("/readyz", token=None)["status"] == "healthy"


def test_a_list_is_paged_if_asked(api: Client) -> None:
    agents = [api.register(hostname=f"h{n}")["id"] for n in range(7)]
    report(api, api.register(hostname="h7"), *[threat(n=n) for n in range(7)])
    for _ in range(7):
        policy(api)
    ids = {"/api/agents": [*agents, api.get("/api/agents")[7]["id"]],
           **{path: [each["id"] for each in api.get(path)] for path in ("/api/threats", "/api/policy")}}
    for path, every in ids.items():
        total = len(every)
        assert "pagination" not in api.call("GET", path).json
        for query, page, limit in (
                ("page=1&limit=3", 1, 3), ("page=2&limit=3", 2, 3), ("page=3&limit=3", 3, 3),
                ("limit=2", 1, 2), ("page=1", 1, 50), ("page=9&limit=3", 9, 3), ("limit=200", 1, 200),
                (f"limit={total}", 1, total), ("page=1000000&limit=200", 1_000_000, 200)):
            answer = api.call("GET", f"{path}?{query}").json
            assert list(answer) == ["ok", "data", "pagination"]
            assert [each["id"] for each in answer["data"]] == every[(page - 1) * limit:page * limit]
            exactly(answer["pagination"], {"total": total, "page": page, "limit": limit,
                                           "pages": -(-total // limit)})


def test_agents_are_filtered_by_every_tag_and_by_status_and_org(api: Client) -> None:
    for name, org, tags in (("0", "o", ["a", "b"]), ("1", "p", ["a"]), ("2", None, ["b", "ä&=%"])):
        api.register(hostname=name, org_id=org, tags=tags)
    advance(api, 67)
    for name, org, tags in (("3", "o", ["a", "b", "c"]), ("4", "o", []), ("5", "p", ["b", "a"])):
        api.register(hostname=name, org_id=org, tags=tags)
    for query, expected in (
            ([], "012345"), ([("tag", "a")], "0135"), ([("tag", "a"), ("tag", "b")], "035"),
            ([("tag", "a"), ("tag", "a")], "0135"), ([("tag", "c"), ("tag", "nope")], ""),
            ([("tag", "ä&=%")], "2"), ([("tag", "A")], ""), ([("status", "online")], "345"),
            ([("status", "stale")], "012"), ([("status", "offline")], ""), ([("org_id", "o")], "034"),
            ([("org_id", "o"), ("tag", "b")], "03"),
            ([("org_id", "o"), ("tag", "b"), ("status", "stale")], "0"),
            ([("tag", "a"), ("tag", "b"), ("status", "online"), ("org_id", "p")], "5")):
        answer = api.call("GET", f"/api/agents?{urlencode([*query, ('limit', 2)])}").json
        assert answer["pagination"]["total"] == len(expected), query
        assert "".join(each["hostname"]
                       for each in api.get(f"/api/agents?{urlencode(query)}")) == expected, query



def test_agents_are_filtered_by_os_version_text_and_silence(api: Client) -> None:
    for name, system, version, tags in (("Web-0", "linux", "1", ["rack"]),
                                        ("db-1", "mac", "2", ["RACK-9", '"']),
                                    ("web-2", "linux", "2", [])):
        api.register(hostname=name, os=system, version=version, tags=tags,
                     ip=f"203.0.113.{9 + len(name)}", org_id="o")
        advance(api, 100)
    ids = [each["id"] for each in api.get("/api/agents")]
    for query, expected in (
            ({"os": "linux"}, "02"), ({"os": "Linux"}, ""), ({"version": "2"}, "12"),
            ({"os": "mac", "version": "1"}, ""),
            ({"q": "WEB"}, "02"), ({"q": "rack"}, "01"), ({"q": ids[1][:-1].upper()}, "1"),
            ({"q": "113.1"}, "012"), ({"q": "%"}, ""), ({"q": "_"}, ""), ({"q": '"'}, "1"),
            ({"q": "web", "org_id": "o", "version": "2"}, "2"),
            ({"silent_ms": 0}, "012"), ({"silent_ms": 100_000}, "012"), ({"silent_ms": 100_001}, "01"),
            ({"silent_ms": 300_000}, "0"), ({"silent_ms": 300_001}, ""),
            ({"silent_ms": 150_000, "status": "stale"}, "01"),
            ({"silent_ms": 1, "os": "linux", "tag": "rack"}, "0")):
        answer = api.call("GET", f"/api/agents?{urlencode({**query, 'limit': 2})}").json
        assert answer["pagination"]["total"] == len(expected), query
        for detail in ("", "&detail=true"):
            found = api.get(f"/api/agents?{urlencode(query)}{detail}")
            assert "".join(str(ids.index(each["id"])) for each in found) == expected, query


SORT_KEYS: dict[str, Callable[[Any], Any]] = {
    "status": lambda agent: ("offline", "stale", "online").index(agent["status"]),
    **{name: lambda agent, name=name: (agent[name] is not None, agent[name])  # type: ignore[misc]
       for name in ("hostname", "lastHeartbeat", "version", "recentThreats", "cpu", "memory")}}


@pytest.mark.parametrize("sort", [*SORT_KEYS, *(f"-{name}" for name in SORT_KEYS)])
@pytest.mark.parametrize("query", ["", "&os=x", "&tag=a", "&status=offline", "&version=1&q=h"])
def test_agents_are_sorted_and_paged(sort: str, query: str, api: Client) -> None:
    chance = random.Random(1)
    assert set(SORT_KEYS) == set(manager.SORTS)
    for number in range(12):
        agent = api.register(hostname=f"h{chance.randrange(5)}", version=chance.choice("12"),
                             os=chance.choice("xy"), tags=["a"][:number % 2])
        if number % 3:
            api.beat(agent, cpu=chance.randrange(100), memory=chance.randrange(3))
        if number % 4 == 0:
            report(api, agent, *[threat() for _ in range(chance.randrange(1, 4))])
        advance(api, 40)
    listed = api.get(f"/api/agents?detail=true{query}")
    expected = sorted(listed, key=SORT_KEYS[sort.lstrip("-")])
    if sort[0] == "-":
        expected = sorted(listed[::-1], key=SORT_KEYS[sort[1:]], reverse=True)
    assert len(listed) > 1
    paths = [f"/api/agents?sort={sort}{query}&detail=true&limit=5&page={page}" for page in (1, 2, 3)]
    assert [each for path in paths for each in api.get(path)] == expected
    assert [each["id"] for each in api.get(f"/api/agents?sort={sort}{query}")] == [
        each["id"] for each in expected]


# Bulk changes

def test_many_agents_are_changed_at_once(api: Client) -> None:
    agents = [api.register(hostname=f"h{n}", os="xy"[n % 2], tags=["old"]) for n in range(7)]
    ids = [agent["id"] for agent in agents]

    def bulk(**body: Any) -> tuple[int, int, list[int]]:
        before = stored(api, agents[6])
        answer = api.post("/api/agents/bulk", {**body, "dryRun": True})
        assert stored(api, agents[6]) == before
        entries = len(api.journal())
        assert list(answer) == ["matched", "changed", "ids"] and api.post("/api/agents/bulk", body) == answer
        assert len(api.journal()) == entries + answer["changed"], "an entry for each"
        return answer["matched"], answer["changed"], [ids.index(each) for each in answer["ids"]]

    assert bulk(filter={"os": "x"}, addTags=["new", "old"]) == (4, 4, [0, 2, 4, 6])
    assert bulk(filter={"os": "x"}, addTags=["new"]) == (4, 0, [])
    assert bulk(ids=[ids[1], ids[0], "agent-unknown"], removeTags=["new", "x"]) == (2, 1, [0])
    assert [agent["tags"] for agent in api.get("/api/agents")[:3]] == [["old"], ["old"], ["old", "new"]]
    assert api.journal("agent_updated")[-1]["agentId"] == ids[0]
    assert bulk(filter={"tag": ["old", "new"], "status": "online", "q": "h4"}, deregister=True) == (1, 1, [4])
    assert bulk(filter={"silent_ms": 1}, deregister=True) == (0, 0, [])
    assert bulk(ids=[ids[3]], deregister=True) == (1, 1, [3])
    api.refusal("GET", f"/api/agents/{ids[3]}", status=404)
    assert bulk(filter={"all": True}, addTags=["z"]) == (5, 5, [0, 1, 2, 5, 6])
    assert bulk(filter={"all": True}, deregister=True)[:2] == (5, 5)
    assert api.get("/api/agents") == [] and len(api.journal("agent_deregistered")) == 7


def test_a_bulk_change_does_not_count_forgiven_time_as_silence(api: Client, clock: ManualClock) -> None:
    agent = api.register()
    clock.stall(3600)
    api.beat(agent)
    for filters in ({"status": "offline"}, {"status": "stale"}, {"silent_ms": 60_000}):
        answer = api.post("/api/agents/bulk", {"filter": filters, "deregister": True, "dryRun": True})
        assert answer == {"matched": 0, "changed": 0, "ids": []}, filters
    assert api.post("/api/agents/bulk",
                    {"filter": {"status": "online"}, "addTags": ["a"]})["ids"] == [agent["id"]]


@pytest.mark.parametrize(("body", "named"), [
    ({"filter": {}, "addTags": ["a"]}, "filter"), ({"filter": {"all": False}, "deregister": True}, "filter"),
    ({"filter": {"all": True, "os": "x"}, "addTags": ["a"]}, "filter"), ({"addTags": ["a"]}, "ids, filter"),
    ({"filter": {"tag": []}, "deregister": True}, "filter"),
    ({"filter": {"limit": 1}, "addTags": ["a"]}, "filter.'limit'"),
    ({"ids": ["a"], "filter": {"all": True}, "addTags": ["a"]}, "ids, filter"),
    ({"ids": ["x"] * 1001, "addTags": ["a"]}, "ids"), ({"ids": []}, "addTags, removeTags, deregister"),
    ({"ids": [], "addTags": ["a"], "removeTags": ["b"]}, "addTags, removeTags, deregister"),
    ({"ids": [], "deregister": False}, "addTags, removeTags, deregister"),
    ({"filter": {"all": True}, "addTags": [str(number) for number in range(64)]}, "addTags")])
def test_a_wrong_bulk_change_changes_nothing(body: Any, named: str, api: Client) -> None:
    agent = api.register(tags=["kept"])
    before = stored(api, agent)
    assert api.refusal("POST", "/api/agents/bulk", body, status=400).startswith(named + ": ")
    assert stored(api, agent) == before


def test_a_bulk_change_of_many_is_complete_and_lists_a_thousand(by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, _ = by_hand
    with fleet.store.transaction():
        for number in range(1203):
            fleet.register(**AGENT, org_id=f"o{number % 3}")
    answer = fleet.bulk(filter={"q": "web"}, add_tags=["a"])
    assert (answer["matched"], answer["changed"], len(answer["ids"])) == (1203, 1203, 1000)
    assert fleet.agents_json(tag=["a"], limit=1)[1] == 1203


# Conventions

@pytest.mark.parametrize(("method", "path", "body", "named"), [
    ("GET", "/api/agents?colour=blue&limit=1&size=2", None, ["'colour'", "'size'"]),
    ("GET", "/api/events?page=1", None, ["'page'"]), ("GET", "/api/overview?since=x", None, ["'since'"]),
    ("GET", "/metrics?x=1", None, ["'x'"]), ("DELETE", "/api/agents/{id}?force=1", None, ["'force'"]),
    ("PATCH", "/api/agents/{id}", {"tags": ["x"], "addTag": 1}, ["'addTag'"]),
    ("POST", "/api/policy", {"name": "p", "rules": [{**RULE, "on": 1}], "org": 2},
     ["'org'", "rules[0].'on'"])])
def test_unknown_names_in_an_administrators_calls_are_refused(method: str, path: str, body: Any,
                                                              named: list[str], api: Client) -> None:
    agent = api.register(tags=["kept"])
    before = stored(api, agent)
    error = api.refusal(method, path.format(**agent), body, status=400)
    assert [part.partition(": ")[0] for part in error.split("; ")] == named
    assert stored(api, agent) == before


def test_calls_from_python_are_checked_as_calls_over_http_are(by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, _ = by_hand
    agent_id = fleet.register(**AGENT, tags=("a", "b"), ip="2001:DB8::1").agent.id
    before = (fleet.journal(), fleet.agents())
    for named, call in (
            ("hostname", lambda: fleet.register("")), ("os", lambda: fleet.register("h", "", "1")),
            ("ip", lambda: fleet.register(**AGENT, ip="x")),
            ("tags[1]", lambda: fleet.register(**AGENT, tags=["a", 1])),
            ("cpu", lambda: fleet.heartbeat(agent_id, cpu=101)),
            ("memory", lambda: fleet.heartbeat(agent_id, memory=True)),
            ("policyVersion", lambda: fleet.heartbeat(agent_id, policy_version=-1)),
            ("addTags", lambda: fleet.retag(agent_id, add_tags="abc")),
            ("rules[0].type", lambda: fleet.create_policy("x", [{"type": "nope"}])),
            ("name", lambda: fleet.create_policy("", [RULE])),
            ("ids", lambda: fleet.bulk(ids="x", deregister=True)),
            ("'colour'", lambda: fleet.agents_json(colour="blue")),
            ("status", lambda: fleet.agents(status="gone")),
            ("limit", lambda: fleet.agents_json(limit=201)), ("state", lambda: fleet.triage(1, state="opne")),
            ("key", lambda: fleet.triage(-1, state="open")),
            ("type[0]", lambda: fleet.journal(type="agent_stle")),
            ("order", lambda: fleet.journal(order="dsc")), ("limit", lambda: fleet.journal(limit="x")),
            ("since", lambda: fleet.journal(since=10**18)), ("until", lambda: fleet.journal(until=True)),
            ("severity", lambda: fleet.threats_json(severity="huge")),
            ("limit", lambda: fleet.threats_json(limit=0)),
            ("before", lambda: fleet.threats_json(before="x")),
            ("page", lambda: fleet.policies(page=0)), ("period", lambda: fleet.threat_summary(period="7y")),
            ("org_id", lambda: fleet.overview(org_id=7)), ("org_id", lambda: fleet.active_policy(org_id="")),
            ("maxUses", lambda: fleet.issue_enroll_token(max_uses=0)),
            ("ttlMs", lambda: fleet.issue_enroll_token(ttl_ms=-1)),
            ("rules[0].type", lambda: fleet.preview_policy([{"type": "nope"}])),
            *((f"events{named}", partial(fleet.report_events, agent_id, events)) for named, events in (
                ("", []), ("", "scan"), ("[0].severity", [{"type": "x"}]), ("[1]", [THREAT, 3]),
                ("[0].severity", [{**THREAT, "severity": "huge"}]),
                ("[0].details", [{**THREAT, "details": 3}]), ("[0].'sigma'", [{**THREAT, "sigma": "s"}]),
                ("[0].timestamp", [{**THREAT, "timestamp": 3}])))):
        with pytest.raises(manager.Invalid, match=rf"(^|; ){re.escape(named)}: "):
            call()
        assert (fleet.journal(), fleet.agents()) == before, named
    (agent,), _ = fleet.agents()
    assert (agent.tags, agent.ip) == (("a", "b"), "2001:db8::1")
    assert fleet.create_policy("x", [RULE]).rules == [{**RULE, "enabled": True}]
    assert fleet.heartbeat(agent_id, policy_version=1, cpu=3).pending_policies == 0


def test_calls_from_python_take_what_python_has(by_hand: tuple[Manager, ManualClock]) -> None:
    fleet, _ = by_hand
    agent_id = fleet.register(**AGENT).agent.id
    first, second, _ = fleet.report_events(agent_id, (
        {**THREAT, "sigmaRuleId": "one"}, {**THREAT, "sigma_rule_id": "two"}, {**THREAT, "rule_id": "three"}))
    items = json.loads(fleet.threats_json(since=START_MS, until=START_MS + 1)[0])
    assert [each["sigmaRuleId"] for each in items] == ["three", "two", "one"]
    assert [json.loads(fleet.threats_json(before=each)[0]) for each in (2, second)] == [items[2:]] * 2
    assert json.loads(fleet.triage(1, state="acknowledged"))["id"] == first
    types = [fleet.journal(type=type, since=START_MS) for type in (
        "threat_updated", ("threat_updated",), ["threat_updated", "agent_stale"])]
    assert types[0] == types[1] == types[2] == fleet.journal(order="desc", limit=1)
    assert len(fleet.journal(limit=201)) == len(fleet.journal(limit=-1)) == 3


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("secret detail")


def unwritable(*_: Any, **__: Any) -> Any:
    raise manager.Unavailable("the disk is full", retry_after_s=5)


ANSWERS: list[tuple[int, str, str, Any, dict[str, Any]]] = [
    (200, "GET", "/api/agents", None, {}),
    (200, "GET", "/health", None, {"token": None}),
    (200, "GET", "/metrics", None, {}),
    (200, "GET", "/openapi.json", None, {"token": None}),
    (201, "POST", "/api/policy", BODIES["POST /api/policy"], {}),
    (204, "OPTIONS", "/api/agents", None, {"token": None}),
    (304, "GET", "/api/policy/agent/{agent}", None, {"headers": {"If-None-Match": "*"}}),
    (400, "GET", "/api/agents?limit=0", None, {}),
    (400, "POST", "/api/agents/register", b"{", {}),
    (404, "GET", "/api/%FF", None, {}),
    (401, "GET", "/api/agents", None, {"token": None}),
    (401, "GET", "/api/agents", None, {"token": "wrong"}),
    (403, "GET", "/api/agents", None, {"token": "{own}"}),
    (404, "GET", "/api/agents/agent-00000000", None, {}),
    (404, "GET", "/nowhere", None, {"token": None}),
    (404, "POST", "/api/nowhere/", {}, {}),
    (405, "PUT", "/api/agents/{agent}", {}, {}),
    (405, "DELETE", "/health", None, {"token": None}),
    (409, "POST", "/api/agents/register", AGENT, {}),
    (413, "POST", "/api/agents/register", b" " * (2**20 + 1), {}),
    (415, "POST", "/api/agents/register", b"{}", {"headers": {"Content-Type": "text/plain"}}),
    (429, "GET", "/api/agents", None, {"token": "throttled"}),
    (500, "GET", "/api/overview", None, {}),
    (503, "GET", "/api/threats/summary", None, {}),
    (503, "GET", "/health", None, {"token": None}),
]
SECURITY = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store"}


@pytest.mark.parametrize(("status", "method", "path", "body", "how"), ANSWERS,
                         ids=[f"{each[0]} {each[1]} {each[2][:30]}" for each in ANSWERS])
def test_every_answer_keeps_the_conventions(status: int, method: str, path: str, body: Any,
                                            how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet(max_agents=1, cors_allowed_origins="https://console.example.org") as api:
        agent = api.register()
        monkeypatch.setattr(manager.Manager, "overview", fail)
        monkeypatch.setattr(manager.Manager, "threat_summary", unwritable)
        if path == "/health" and status == 503:
            monkeypatch.setattr(manager.Manager, "health", unwritable)
        for _ in range(20 if how.get("token") == "throttled" else 0):
            api.call("GET", "/api/agents", token="wrong", status=401)
        how = {**how, "token": how.get("token", "admin")
               and how.get("token", "admin").replace("{own}", agent["token"])}
        answer = api.call(method, path.replace("{agent}", agent["id"]), body, status=status, **how)
        for name, value in SECURITY.items():
            assert answer.headers.getall(name) == [value], name
        assert answer.headers.getall("Content-Security-Policy") != [""]
        assert len(answer.headers.getall("Content-Security-Policy")) == 1
        assert str(uuid.UUID(answer.headers["X-Request-Id"])) == answer.headers["X-Request-Id"]
        assert "Strict-Transport-Security" not in answer.headers, "nothing was served over TLS"
        assert ("Allow" in answer.headers) is (status == 405)
        assert (answer.headers.get("WWW-Authenticate") == "Bearer") is (status == 401)
        assert ("Retry-After" in answer.headers) is (status in (429, 503))
        if status in (204, 304):
            assert answer.body == b"" and "Content-Type" not in answer.headers
        elif path not in ("/metrics", "/openapi.json"):
            assert answer.content_type == "application/json"
            assert answer.json["ok"] is (status < 400)
            assert set(answer.json) == {"ok", "data"} if status < 400 else set(answer.json) >= {"ok", "error"}
            assert status < 400 or (answer.json["error"]
                                    and ("internal" in answer.json["error"]) is (status == 500))
        if path == "/health" and status == 503:
            assert '"unhealthy"' in answer.text


@pytest.mark.parametrize(("path", "allow"), [
    ("/api/agents", "GET"), ("/api/agents/register", "DELETE,GET,PATCH,POST"),
    ("/api/agents/x", "DELETE,GET,PATCH"), ("/api/agents/x/heartbeat", "POST"), ("/api/policy", "GET,POST"),
    ("/api/policy/agent/x", "DELETE,GET"), ("/health", "GET")])
def test_405_says_what_the_path_takes(path: str, allow: str, api: Client) -> None:
    for method in ("PUT", "TRACE"):
        allowed = api.call(method, path, token=None, status=405).headers["Allow"]
        assert {each.strip() for each in allowed.split(",")} - {"OPTIONS", "HEAD"} == set(allow.split(","))


def test_a_fault_is_told_in_the_log_and_not_to_the_caller(
        api: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(manager.Manager, "overview", fail)
    monkeypatch.setattr(manager.Manager, "register", fail)
    texts = {api.refusal(method, path, body, status=500, headers={"X-Request-Id": f"id-{method}"})
             for method, path, body in (("GET", "/api/overview", None),
                                        ("POST", "/api/agents/register", AGENT))}
    assert len(texts) == 1 and "secret" not in texts.pop()
    logged = {each.getMessage(): each for each in caplog.records if each.exc_info}
    assert len(logged) == 2 and all("secret detail" in str(each.exc_info[1]) for each in logged.values()
                                    if each.exc_info)
    assert any("id-GET" in text for text in logged) and any("id-POST" in text for text in logged)
    api.get("/api/agents")


def test_a_sane_request_id_is_kept_and_any_other_replaced(api: Client) -> None:
    made = []
    for sane, given_ids in ((True, ("abc", "a.B-9_x:1", "x" * 128)),
                            (False, ("x" * 129, "", "a b", "é", '"', "a,b", "<script>", "a\tb"))):
        for given_id, (path, status) in itertools.product(given_ids, (("/health", 200), ("/nowhere", 404),
                                                                      ("/api/agents?page=0", 400))):
            answered = api.call("GET", path, headers={"X-Request-Id": given_id},
                                status=status).headers["X-Request-Id"]
            assert (answered == given_id) is sane, given_id
            if not sane:
                assert uuid.UUID(answered).version == 4
                made.append(answered)
    assert len(made) == len(set(made)), "every request has an id of its own"


def test_only_listed_origins_may_read_answers() -> None:
    with fleet(cors_allowed_origins="https://a.example, http://localhost:3000") as api:
        for origin, allowed in (
                ("https://a.example", True), ("http://localhost:3000", True), ("https://b.example", False),
                ("https://a.example.evil.org", False), ("http://a.example", False),
                ("null", False), ("https://A.example/", False), ("", False)):
            for method, path, status in (("GET", "/api/agents", 200), ("GET", "/api/threats?page=0", 400),
                                         ("GET", "/nowhere", 404), ("OPTIONS", "/api/agents", 204)):
                headers = api.call(method, path, status=status, headers={"Origin": origin}).headers
                assert headers.get("Access-Control-Allow-Origin") == (
                    origin if allowed else None), (origin, path)
                assert "Access-Control-Allow-Credentials" not in headers
                assert not allowed or "Origin" in headers["Vary"]
                if method == "OPTIONS" and allowed:
                    assert {"GET", "POST", "PATCH", "DELETE"} <= {
                        each.strip() for each in headers["Access-Control-Allow-Methods"].split(",")}
                    assert "authorization" in headers["Access-Control-Allow-Headers"].lower()
    with fleet() as api:
        headers = api.call("GET", "/api/agents", headers={"Origin": "https://a.example"}).headers
        assert not [name for name in headers if name.startswith("Access-Control")]


def test_options_needs_no_token_anywhere(api: Client) -> None:
    for path in ("/", "/nowhere/at/all", *(each.path for each in manager.ENDPOINTS)):
        assert api.call("OPTIONS", path, token=None, status=204).body == b""


def test_head_is_a_get_without_its_body(api: Client) -> None:
    agent = api.register()
    for path, status in (("/api/agents", 200), (f"/api/agents/{agent['id']}", 200), ("/health", 200),
                         ("/nowhere", 404), ("/api/threats?limit=x", 400)):
        head, get = api.call("HEAD", path, status=status), api.call("GET", path, status=status)
        assert head.body == b"" and head.content_type == get.content_type
        assert head.headers["Content-Length"] == get.headers["Content-Length"]
    api.call("HEAD", "/api/agents", token=None, status=401)
    api.call("HEAD", "/api/agents/x/heartbeat", status=405)


def test_openapi_describes_every_route(api: Client) -> None:
    document = api.call("GET", "/openapi.json", token=None).json
    assert document["openapi"].startswith("3.1")
    described = {f"{method.upper()} {path}": each for path, item in document["paths"].items() for method,
                 each in item.items()}
    assert set(described) == {re.sub(r":(\w+)", r"{\1}", route) for route in ROUTES}
    for name, each in ROUTES.items():
        operation = described[re.sub(r":(\w+)", r"{\1}", name)]
        assert {param["name"] for param in operation["parameters"] if param["in"] != "header"} == {
            *each.query, *re.findall(r":(\w+)", each.path)}
        assert all(len(param["description"]) > 5 for param in operation["parameters"])
        assert (operation["security"] == []) is ("anyone" in each.allow)
        assert ("requestBody" in operation) is (each.body is not None)
    assert "304" in described["GET /api/policy/agent/{id}"]["responses"]
    metrics = described["GET /metrics"]["responses"]["200"]["content"]
    assert [name.partition(";")[0] for name in metrics] == ["text/plain"]
    assert {name for name, answer in document["components"]["responses"].items()
            if "Retry-After" in answer.get("headers", ())} == {"Failure429", "Failure503"}
    headers = {(name, header) for name, each in described.items() for answer in each["responses"].values()
               for header in answer.get("headers", ())}
    assert headers == {("POST /api/agents/{id}/heartbeat", "X-Heartbeat-Interval"),
                       ("GET /api/policy/agent/{id}", "ETag"), ("GET /api/overview", "X-Caller")}
    taken = {(name, each["name"]) for name, operation in described.items()
             for each in operation["parameters"]}
    assert {("GET /api/events/stream", "Last-Event-ID"),
            ("GET /api/policy/agent/{id}", "If-None-Match")} <= taken


def strictly(schema: Any) -> Any:
    """The schema with no field allowed in an object that it does not name."""
    if isinstance(schema, list):
        return [strictly(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: strictly(value) for name, value in schema.items()} | (
        {"additionalProperties": False} if isinstance(schema.get("properties"), dict) and "seq" not in
        schema["properties"] else {})


def conforms(document: Any, route: str, status: int, answer: Any) -> None:
    """Fails unless the answer is what the document says of the route, without another field."""
    path, responses = route.split(" ")[1], document["paths"]
    found = responses[re.sub(r":(\w+)", r"{\1}", path)][route.split(" ")[0].lower()]["responses"][str(status)]
    if "$ref" in found:
        found = document["components"]["responses"][found["$ref"].rpartition("/")[2]]
    schema = {**found["content"]["application/json"]["schema"], "components": document["components"]}
    jsonschema.validate(answer, strictly(schema), format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("full", [False, True], ids=["an empty fleet", "a fleet"])
def test_every_answer_is_as_openapi_types_it(full: bool, api: Client, clock: ManualClock) -> None:
    document = api.get_openapi()
    agent = api.register(org_id="o", machine_id="m", arch="arm64") if full else api.register()
    event = report(api, agent, threat(sourceIp="203.0.113.9"))[0]
    token_id = api.post("/api/enroll-tokens", {}, status=201)["id"]
    if full:
        api.beat(agent, cpu=1.5, memory=2, uptime=3, version="2")
        others = [api.register(org_id="o") for _ in range(2)]
        for other in others:
            report(api, other, threat(sourceIp="203.0.113.9", rule="r"))
        policy(api, description="d")
        policy(api, org_id="o")
        clock.advance(4000)
        api.beat(agent)
        api.call("GET", "/api/agents", token="wrong", status=401)
    policy(api, agent_id=agent["id"])
    last = [route for route in ROUTES if route.startswith("DELETE /api/agents")
            or route == "GET /api/timeline"]
    for route, each in sorted(ROUTES.items(), key=lambda one: one[0] in last):
        if each.media or route == "POST /api/notify/test":
            continue
        own_id = {"/api/threats/:id": event, "/api/enroll-tokens/:id": token_id}.get(each.path, agent["id"])
        paths = [each.path.replace(":id", own_id)]
        if route == "GET /api/agents":
            paths += [paths[0] + "?detail=true", paths[0] + "?page=1"]
        if route == "GET /api/timeline" and full:
            paths += [paths[0] + f"?agent_id={others[0]['id']}"]
        for path in paths:
            conforms(document, route, each.status, api.call(
                each.method, path, BODIES.get(route), status=each.status).json)
    if full:
        preview = api.call("POST", "/api/policy", {**BODIES["POST /api/policy"], "dryRun": True}).json
        conforms(document, "POST /api/policy", 200, preview)
        conforms(document, "GET /api/agents/:id", 404, api.call("GET", "/api/agents/x", status=404).json)


def test_the_examples_are_those_of_the_published_page(api: Client) -> None:
    document = api.get_openapi()
    operations = {each["operationId"]: each for item in document["paths"].values() for each in item.values()}
    found = {name: answer["content"]["application/json"]["example"]["data"]
             for name, each in operations.items()
             for status, answer in each["responses"].items()
             if "example" in answer.get("content", {}).get("application/json", {})}
    assert set(found) == {"register", "heartbeat", "deregister", "agents", "agent"}
    assert found["heartbeat"] == {"id": "agent-a1b2c3d4", "status": "online",
                                  "lastHeartbeat": "2026-03-07T12:05:00.000Z", "pendingPolicies": 1}
    assert list(found["agent"])[:14] == ["id", "hostname", "os", "version", "ip", "status", "tags", "cpu",
                                         "memory", "uptime", "lastHeartbeat", "registeredAt", "recentThreats",
                                         "activePolicyVersion"]
    for route, name in (("POST /api/agents/register", "register"),
                        ("POST /api/agents/:id/heartbeat", "heartbeat"),
                        ("DELETE /api/agents/:id", "deregister"), ("GET /api/agents", "agents"),
                        ("GET /api/agents/:id", "agent")):
        conforms(document, route, ROUTES[route].status, {"ok": True, "data": found[name]})
        if "requestBody" in operations[name]:
            content = operations[name]["requestBody"]["content"]["application/json"]
            jsonschema.validate(content["example"], content["schema"])



# Who may call

# The token: none, a wrong one, the agent's own, another agent's, the enroller's, the viewer's, the admin's.
MATRIX = {route: [int(status) for status in row.split()] for route, row in {
    "POST /api/agents/register":             "401 401 200 200 201 403 201",
    "POST /api/enroll-tokens":               "401 401 403 403 403 403 201",
    "GET /api/enroll-tokens":                "401 401 403 403 403 200 200",
    "DELETE /api/enroll-tokens/:id":         "401 401 403 403 403 403 404",
    "POST /api/agents/:id/heartbeat":        "401 401 200 403 403 403 200",
    "DELETE /api/agents/:id":                "401 401 200 403 403 403 200",
    "GET /api/agents":                       "401 401 403 403 403 200 200",
    "GET /api/agents/:id":                   "401 401 200 403 403 200 200",
    "POST /api/agents/bulk":                 "401 401 403 403 403 403 200",
    "PATCH /api/agents/:id":                 "401 401 403 403 403 403 200",
    "POST /api/agents/:id/events":           "401 401 201 403 403 403 201",
    "PATCH /api/threats/:id":                "401 401 403 403 403 403 200",
    "GET /api/threats":                      "401 401 403 403 403 200 200",
    "GET /api/threats/summary":              "401 401 403 403 403 200 200",
    "POST /api/policy":                      "401 401 403 403 403 403 201",
    "GET /api/policy":                       "401 401 403 403 403 200 200",
    "GET /api/policy/active":                "401 401 403 403 403 200 200",
    "GET /api/policy/agent/:id":             "401 401 200 403 403 200 200",
    "DELETE /api/policy/agent/:id":          "401 401 403 403 403 403 200",
    "GET /api/overview":                     "401 401 403 403 403 200 200",
    "GET /api/timeline":                     "401 401 403 403 403 200 200",
    "GET /api/events":                       "401 401 403 403 403 200 200",
    "GET /api/events/stream":                "401 401 403 403 403 200 200",
    "GET /api/rules/latest":                 "401 401 200 200 403 200 200",
    "POST /api/notify/test":                 "401 401 403 403 403 403 409",
    "GET /metrics":                          "401 401 403 403 403 200 200",
    "GET /readyz":                           "200 200 200 200 200 200 200",
    "GET /livez":                           "200 200 200 200 200 200 200",
    "GET /health":                           "200 200 200 200 200 200 200",
    "GET /openapi.json":                     "200 200 200 200 200 200 200",
    "GET /":                                 "200 200 200 200 200 200 200",
}.items()}  # fmt: skip
MALFORMED = ("Bearer", "Bearer ", "Basic YTpi", "{admin}", "Bearer {admin} x", "Bearer{admin}",
             'Bearer "{admin}"', "Token {admin}", "Bearer \xe9", ",", "Bearer {admin},Bearer {admin}")


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_admits_whom_it_should(route: str) -> None:
    nobody, wrong_token, own_token, others_token, enrollers, viewers, admins = MATRIX[route]
    with fleet(auth_token="old-admin,new-admin", enroll_token="enroller", viewer_token="viewer") as api:
        host = urlsplit(api.server.url).netloc
        method = route.split(" ")[0]
        body = json.dumps(BODIES[route]) if route in BODIES else None

        def status(headers: dict[str, str]) -> int:
            advance(api, 61)  # so that wrong tokens do not add up
            with contextlib.closing(http.client.HTTPConnection(host, timeout=LIMIT_S)) as connection:
                connection.request(method, target(route, {"id": own.agent.id})[1], body, headers)
                answer = connection.getresponse()
                if answer.status >= 400:
                    assert json.loads(answer.read())["ok"] is False
                return answer.status

        gone = api.server.manager.register(**AGENT)
        api.server.manager.deregister(gone.agent.id)
        used = True
        for name, expected in (("", nobody), ("Bearer wrong", wrong_token), ("Bearer {gone}", wrong_token),
                               ("Bearer {own}", own_token), ("Bearer {other}", others_token),
                               ("Bearer enroller", enrollers), ("Bearer viewer", viewers),
                               ("Bearer old-admin", admins), ("bearer new-admin", admins),
                               *((each, wrong_token) for each in MALFORMED)):
            if used:
                own, other = (api.server.manager.register(**AGENT) for _ in range(2))
                api.server.manager.create_policy("p", [RULE], agent_id=own.agent.id)
                api.server.manager.report_events(own.agent.id, [THREAT])
            header = name.format(own=own.token, other=other.token, gone=gone.token, admin="new-admin")
            assert status({"Authorization": header} if header else {}) == expected, name
            used = expected < 300 and method != "GET"


def test_a_viewer_changes_and_acknowledges_nothing() -> None:
    with fleet(viewer_token="viewer") as api:
        agent = api.register()
        api.post("/api/policy", {"name": "p", "rules": [RULE]}, status=201)
        before = api.journal()
        for route in ROUTES.values():
            if route.path != "/api/events/stream":
                path = route.path.replace(":id", agent["id"])
                for query in ("", "?ack=true") if "ack" in route.query else ("",):
                    api.call(route.method, path + query, token="viewer",
                             status=200 if route.method == "GET" else 403)
        assert [each for each in api.journal() if each["type"] != "agent_refused"] == before
        assert api.beat(agent)["pendingPolicies"] == 1
        assert api.get(f"/api/agents/{agent['id']}")["activePolicyVersion"] is None


def test_without_an_enroll_token_there_is_no_enroller(api: Client) -> None:
    for token in ("None", "enroller"):
        api.refusal("POST", "/api/agents/register", AGENT, token=token, status=401)


def test_an_application_without_tokens_has_no_admin(server: Server) -> None:
    app = TestApp(manager.create_app(server.manager))
    for token in ("", "None", server.token):
        assert app.get("/api/agents", headers={"Authorization": f"Bearer {token}"},
                       expect_errors=True).status_int == 401


def test_wrong_tokens_are_throttled_by_address(api: Client) -> None:
    agent = api.register()
    elsewhere = seen_from(api, "203.0.113.77")
    advance(api, 10)
    for _ in range(20):
        api.refusal("GET", "/api/agents", token="wrong", status=401)
        advance(api, 1)
    answer = api.call("GET", "/api/agents", token="wrong", status=429)
    assert answer.json["ok"] is False and int(answer.headers["Retry-After"]) == 40
    api.get("/api/agents")
    api.beat(agent)
    api.get("/health", token=None)
    elsewhere.refusal("GET", "/api/agents", token="wrong", status=401)
    advance(api, 39.999)
    api.call("GET", "/api/agents", token="wrong", status=429)
    advance(api, 0.001)
    api.call("GET", "/api/agents", token="wrong", status=401)


def refusals(api: Client) -> dict[str, int]:
    """The metric of refusals by reason."""
    return {reason: int(count) for reason, count in re.findall(
        r'^panguard_refusals_total\{reason="(\w+)"\} (\d+)$', api.call("GET", "/metrics").text, re.M)}


def test_refusals_are_counted_by_reason_and_logged_once_a_minute_and_address(
        api: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    agent = api.register()
    assert refusals(api) == dict.fromkeys(
        ("no_token", "wrong_token", "forbidden", "throttled", "handshake", "connections"), 0)
    for token, status, times in ((None, 401, 2), (agent["token"], 403, 3), ("secret-wrong", 401, 20),
                                 ("secret-wrong", 429, 4)):
        for _ in range(times):
            api.call("GET", "/api/agents", token=token, status=status)
    assert refusals(api) == {
        "no_token": 2, "wrong_token": 20, "forbidden": 3, "throttled": 4, "handshake": 0, "connections": 0}
    seen_from(api, "203.0.113.77").call("GET", "/api/agents", token="secret-wrong", status=401)
    lines = [each.getMessage() for each in caplog.records]
    assert len(lines) == 2 and "203.0.113.77" in lines[1]
    assert "198.51.100.7" in lines[0] and "no_token" in lines[0]
    advance(api, 60)
    api.call("GET", "/api/agents", token="secret-wrong", status=401)
    assert len(caplog.records) == 3 and "secret" not in caplog.text
    for number in range(100):
        seen_from(api, f"192.0.2.{number}").call("GET", "/api/agents", token="secret-wrong", status=401)
    assert len(caplog.records) <= 62, "no more than 60 lines a minute"


def test_the_last_refusal_of_a_known_agent_is_journalled_once_a_minute(api: Client) -> None:
    agent, other = api.register(hostname="db-1", org_id="o"), api.register()
    path = f"/api/agents/{agent['id']}/heartbeat"
    for _ in range(3):
        api.call("POST", path, {}, token="wrong", status=401)
        api.call("POST", "/api/agents/agent-00000000/heartbeat", {}, token="wrong", status=401)
    (entry,) = api.journal("agent_refused")
    assert (entry["agentId"], entry["org_id"]) == (agent["id"], "o")
    assert entry["actor"] == {"role": "anyone", "address": "198.51.100.7"}
    assert "wrong_token" in json.dumps(entry) and "db-1" in json.dumps(entry)
    advance(api, 60)
    api.call("POST", path, {}, token=other["token"], status=403)
    assert [("forbidden" in json.dumps(each)) for each in api.journal("agent_refused")] == [False, True]
    assert api.beat(agent)["status"] == "online"


def test_no_credential_causes_few_entries_of_however_many_agents(api: Client) -> None:
    agents = [api.register() for _ in range(30)]
    for agent in agents:
        api.call("POST", f"/api/agents/{agent['id']}/heartbeat", {}, token=None, status=401)
    assert len(api.journal("agent_refused")) == 20


def test_requests_without_a_token_are_not_guesses(api: Client) -> None:
    for _ in range(30):
        api.refusal("GET", "/api/agents", token=None, status=401)


def test_requests_are_limited_by_address_if_set() -> None:
    with fleet(rate_limit=5) as api:
        elsewhere = seen_from(api, "203.0.113.77")
        for _ in range(5):
            api.get("/api/agents")
        for token in ("admin", "wrong"):
            answer = api.call("GET", "/api/agents", token=token, status=429)
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
        elsewhere.get("/api/agents")
        advance(api, 60)
        api.get("/api/agents")
    with fleet() as api:
        for _ in range(100):
            api.get("/api/agents")


def test_every_answer_says_how_many_requests_are_left() -> None:
    with fleet(rate_limit=6) as api:
        def left(method: str, path: str, status: int, **how: Any) -> int:
            headers = api.call(method, path, status=status, **how).headers
            assert headers["X-RateLimit-Limit"] == "6"
            return int(headers["X-RateLimit-Remaining"])
        assert [left("GET", "/api/agents", 200), left("OPTIONS", "/api/agents", 204, token=None),
                left("GET", "/nothing", 404), left("GET", "/api/agents", 401, token="wrong"),
                left("POST", "/api/agents/register", 400, body=b"{"),
                left("GET", "/health", 200, token=None)] == \
            [5, 4, 3, 2, 1, 0]
        for method in ("OPTIONS", "GET"):
            assert left(method, "/api/agents", 429) == 0
            assert left(method, "/nothing", 429) == 0
        advance(api, 60)
        assert left("OPTIONS", "/nothing", 204) == 5
        assert api.server.manager.register(**AGENT, caller=manager.Caller("admin"))
    with fleet() as api:
        assert not [name for name in api.call("GET", "/health").headers if "ratelimit" in name.lower()]


@pytest.mark.parametrize("request_bytes", [
    b"NONSENSE\r\n\r\n",
    b"POST /api/agents/agent-00000000/heartbeat HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"],
    ids=["malformed", "heartbeat"])
def test_requests_that_no_worker_sees_are_counted(request_bytes: bytes) -> None:
    with Server(port=0, clock=ManualClock(), tls="off", rate_limit=2) as server:
        answers = []
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port_of(server.url)), timeout=LIMIT_S) as connection:
                connection.sendall(request_bytes)
                answers.append(connection.recv(65536).decode().lower())
        for answer, left in zip(answers, (1, 0, 0), strict=True):
            assert f"\r\nx-ratelimit-limit: 2\r\nx-ratelimit-remaining: {left}\r\n" in answer
        assert [" 429 " in answer for answer in answers] == [False, False, True]


PROXIES = "10.0.0.0/8, fd00::/8, 192.0.2.1"
FORWARDED = [  # who is trusted, the peer, X-Forwarded-For, and whom it is taken for
    (None, "10.0.0.1", "203.0.113.9", "10.0.0.1"),
    (PROXIES, "198.51.100.7", "203.0.113.9", "198.51.100.7"),
    (PROXIES, "192.0.2.2", "203.0.113.9", "192.0.2.2"),
    (PROXIES, "10.0.0.1", None, "10.0.0.1"),
    (PROXIES, "10.0.0.1", "", "10.0.0.1"),
    (PROXIES, "10.0.0.1", "203.0.113.9", "203.0.113.9"),
    (PROXIES, "192.0.2.1", " 203.0.113.9 ", "203.0.113.9"),
    (PROXIES, "10.0.0.1", "6.6.6.6, 203.0.113.9, 10.0.0.2, fd00::2", "203.0.113.9"),
    (PROXIES, "10.0.0.1", "6.6.6.6,203.0.113.9", "203.0.113.9"),
    (PROXIES, "10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
    (PROXIES, "10.0.0.1", "unknown", "10.0.0.1"),
    (PROXIES, "10.0.0.1", "6.6.6.6, <script>, 10.0.0.2", "10.0.0.2"),
    (PROXIES, "10.0.0.1", "6.6.6.6, , ,", "10.0.0.1"),
    (PROXIES, "10.0.0.1", "203.0.113.999", "10.0.0.1"),
    (PROXIES, "10.0.0.1", ",".join(["10.0.0.2"] * 500), "10.0.0.2"),
    (PROXIES, "fd00::1", "2001:DB8:0::5", "2001:db8::5"),
    (PROXIES, "fd00::1", "fe80::1%eth0", "fd00::1"),
    (PROXIES, "2001:db8::1", "203.0.113.9", "2001:db8::1"),
    ("0.0.0.0/0", "198.51.100.7", "203.0.113.9", "203.0.113.9"),
    ("0.0.0.0/0", "::1", "203.0.113.9", "::1"),
]


@pytest.mark.parametrize(("trusted", "peer", "forwarded", "expected"), FORWARDED)
def test_x_forwarded_for_is_believed_of_a_trusted_proxy_only(
        trusted: str | None, peer: str, forwarded: str | None, expected: str) -> None:
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    with fleet(peer, **({"trusted_proxy": trusted} if trusted else {})) as api:
        assert api.post("/api/agents/register", AGENT, status=201, headers=headers)["ip"] == expected
        assert api.post("/api/agents/register", {**AGENT, "ip": "::FFFF:1"}, status=201,
                        headers=headers)["ip"] == "::ffff:1"
        assert {entry["actor"]["address"] for entry in api.journal()} == {expected}
        for _ in range(21):
            answer = api.app.get("/api/agents", expect_errors=True, headers={"Authorization": "Bearer wrong",
                                                                             **headers})
        assert answer.status_int == 429
        seen_from(api, expected).call("GET", "/api/agents", token="wrong", status=429)
        seen_from(api, "203.0.113.200").call("GET", "/api/agents", token="wrong", status=401)


def test_throttling_counts_behind_a_trusted_proxy_and_not_what_an_unknown_client_writes() -> None:
    with fleet("10.0.0.1", trusted_proxy="10.0.0.0/8") as api:
        other = seen_from(api, "198.51.100.7")
        for number in range(20):
            for client, forwarded in ((api, "203.0.113.1"), (other, f"203.0.113.{100 + number}")):
                client.call("GET", "/api/agents", token="wrong", status=401,
                            headers={"X-Forwarded-For": forwarded})
        for client, forwarded, status in (
                (api, "203.0.113.1", 429), (api, "203.0.113.2", 401), (other, "203.0.113.3", 429),
                (api, "6.6.6.6, 203.0.113.1", 429)):
            client.call("GET", "/api/agents", token="wrong", status=status,
                        headers={"X-Forwarded-For": forwarded})


def test_throttling_takes_a_network_of_ipv6_for_one_address(api: Client) -> None:
    for number in range(20):
        seen_from(api, f"2001:db8::{number + 1:x}").call("GET", "/api/agents", token="wrong", status=401)
    seen_from(api, "2001:db8::ffff").call("GET", "/api/agents", token="wrong", status=429)
    seen_from(api, "2001:db8:0:1::1").call("GET", "/api/agents", token="wrong", status=401)



# Metrics

def test_metrics_are_prometheus_text_and_count_what_happened(api: Client) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    first = api.register()
    advance(api, 67)
    agent = api.register()
    for _ in range(3):
        api.beat(agent)
    own = threat(severity="low", own="x")
    report(api, agent, threat(severity="critical"), threat(severity="critical"), own)
    report(api, agent, own)
    policy(api)
    policy(api)
    api.get(f"/api/agents/{agent['id']}")
    api.refusal("GET", "/api/agents/agent-00000000", status=404)
    api.refusal("GET", "/made/up/path", status=404)
    api.refusal("GET", "/api/agents?page=0", status=400)
    api.call("DELETE", f"/api/agents/{first['id']}")
    answer = api.call("GET", "/metrics")
    assert answer.content_type == "text/plain" and "version=0.0.4" in answer.headers["Content-Type"]
    families = {family.name: family for family in parser.text_string_to_metric_families(answer.text)}
    samples = {}
    for family in families.values():
        assert family.name.startswith("panguard_"), family.name
        assert family.documentation and family.type != "unknown", family.name
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.values()))
            assert key not in samples, key
            samples[key] = sample.value
            assert (family.type == "counter") is sample.name.endswith("_total")
            assert math.isfinite(sample.value) and sample.value >= 0
    written = re.findall(r"^# (HELP|TYPE) (\S+)", answer.text, re.MULTILINE)
    assert len(written) == len(set(written)) == 2 * len(families)
    assert not re.search(r"_(ms|milliseconds|minutes|hours|kb|mb|percent)(_|\b)", " ".join(families))
    for key, value in {
        ("agents", "online"): 1, ("agents", "stale"): 0, ("agents", "offline"): 0, ("heartbeats_total",): 3,
        ("threat_events_total", "critical"): 2, ("threat_events_total", "low"): 1,
        ("threat_events_total", "high"): 0, ("threat_events_total", "medium"): 0, ("event_streams_open",): 0,
        ("policies",): 2, ("journal_sequence",): api.journal()[-1]["seq"],
        ("http_requests_total", "2xx", "/api/agents/register", "POST"): 2,
        ("http_requests_total", "2xx", "/api/agents/:id", "GET"): 1,
        ("http_requests_total", "4xx", "/api/agents/:id", "GET"): 1,
        ("http_requests_total", "4xx", "/api/agents", "GET"): 1,
        ("http_requests_total", "2xx", "/api/agents/:id/heartbeat", "POST"): 3,
    }.items():
        assert samples[("panguard_" + key[0], *sorted(key[1:]))] == value, key
    assert samples["panguard_database_size_bytes",] > 4096
    assert not [key for key in samples if "/made/up/path" in key or agent["id"] in key], "a label per path"
    requests = Counter[str]()
    for sample in families["panguard_http_requests"].samples:
        requests[sample.labels["route"]] += int(sample.value)
    histogram = families["panguard_http_request_duration_seconds"]
    assert histogram.type == "histogram"
    for route in {sample.labels["route"] for sample in histogram.samples}:
        of_route = [sample for sample in histogram.samples if sample.labels["route"] == route]
        buckets = [(float(each.labels["le"]), each.value) for each in of_route
                   if each.name.endswith("_bucket")]
        assert buckets == sorted(buckets) and buckets[-1][0] == math.inf
        assert [value for _, value in buckets] == sorted(value for _, value in buckets)
        (count,) = (each.value for each in of_route if each.name.endswith("_count"))
        assert buckets[-1][1] == count == requests[route]


# 8  Server ############################################################################################


@pytest.mark.parametrize(("in_flight", "rounds"), [(1, 20), (12, 5)])
def test_requests_in_flight_are_answered_before_the_stop(in_flight: int, rounds: int) -> None:
    for number in range(rounds):
        with Server(port=0, threads=5) as server, contextlib.ExitStack() as callers, \
                ThreadPoolExecutor(1) as pool:
            pool.submit(int).result()
            calling = [callers.enter_context(contextlib.closing(http.client.HTTPConnection(
                "127.0.0.1", port_of(server.url), timeout=LIMIT_S))) for _ in range(in_flight)]
            for caller in calling:
                caller.connect()
            with server.manager.store.transaction():
                for caller in calling:
                    caller.request("POST", "/api/agents/register", json.dumps(AGENT), {
                        "Authorization": f"Bearer {server.token}", "Content-Type": "application/json"})
                with socket.create_connection(("127.0.0.1", port_of(server.url)), timeout=LIMIT_S) as last:
                    last.sendall(request("POST", "/", b"", "Content-Length: 9", "Expect: 100-continue",
                                         token=server.token))
                    assert b" 100 " in last.recv(100)  # every worker is busy: the others have been read
                threads = threading.active_count()
                stopping = pool.submit(server.stop)
                until(lambda threads=threads: threading.active_count() < threads, "the stop has begun")
            for caller in calling:
                answer = caller.getresponse()
                assert (answer.status, json.loads(answer.read())["ok"]) == (201, True), f"in round {number}"
            stopping.result(timeout=LIMIT_S)


def test_a_stopped_server_leaves_no_thread_and_no_port() -> None:
    before = set(threading.enumerate())
    for _ in range(10):
        with Server(port=0) as server:
            port = port_of(server.url)
            idle = socket.create_connection(("127.0.0.1", port))
            assert ask(port, "GET", "/health")[0] == 200
        until(lambda: set(threading.enumerate()) <= before, "its threads have ended")
        idle.close()
        with Server(port=port), pytest.raises(manager.StartError, match=f"port {port}"):
            Server(port=port).start()


def test_a_port_in_use_ends_the_start_with_one_sentence_and_status_1(tmp_path: Path, run_main: Any) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, said = run_main("--port", port, "--data-dir", tmp_path)
    assert status == 1
    one_sentence(said, f"port {port}", "127.0.0.1", "end what listens there")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked, "its caller can still be interrupted"


# Malformed http

REGISTER = b"POST /api/agents/register HTTP/1.1\r\nHost: x\r\n"
MALFORMED_HTTP = {
    "garbage": b"\x16\x03\x01\x02\x00garbage\r\n\r\n",
    "no request line": b"hello\r\n\r\n",
    "a method in lower case": b"get /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "a NUL in the request line": b"GET /hea\0lth HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes beyond ASCII in the request line": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "an escape that is no UTF-8": b"GET /api/agents/%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    "an address that is none": b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    "a NUL in a header": b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: a\0b\r\n\r\n",
    "a bare line feed": b"GET /health HTTP/1.1\r\nHost: x\nX-A: b\r\n\r\n",
    "a folded header name": b"GET /health HTTP/1.1\r\nHost: x\r\n X-A: b\r\n: x\r\n\r\n",
    "headers too large": b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 300_000 + b"\r\n\r\n",
    "a path too long": b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a length that is no number": REGISTER + b"Content-Length: abc\r\n\r\n",
    "a negative length": REGISTER + b"Content-Length: -1\r\n\r\n",
    "a length in hexadecimal": REGISTER + b"Content-Length: 0x10\r\n\r\n{}",
    "two lengths": REGISTER + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    "a chunk without a size": REGISTER + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk without an end": REGISTER + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}xx0\r\n\r\n",
    "an unknown encoding": REGISTER + b"Transfer-Encoding: gzip\r\n\r\n",
    "3 MiB": REGISTER + b"Content-Length: 3145728\r\n\r\n" + b"x" * 3145728,
    "3 MiB in chunks": (REGISTER + b"Transfer-Encoding: chunked\r\n\r\n"
                        + 3 * (b"100000\r\n" + b"x" * 2**20 + b"\r\n") + b"0\r\n\r\n"),
    "a length of 3 GiB": REGISTER + b"Content-Length: 3221225472\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "a target without a slash": b"GET health HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target with a fragment": b"GET /health#x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a tab in the target": b"GET /hea\tlth HTTP/1.1\r\nHost: x\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: a\r\n b\r\n\r\n",
    "600 headers": b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: \r\n" * 600 + b"\r\n",
    "chunked twice": REGISTER + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked in two headers": REGISTER + 2 * b"Transfer-Encoding: chunked\r\n" + b"\r\n0\r\n\r\n",
    "an empty encoding": REGISTER + b"Transfer-Encoding:\r\n\r\n",
    "an empty encoding after chunked": REGISTER + b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n",
    "a chunk size with a line feed": REGISTER + b"Transfer-Encoding: chunked\r\n\r\n2\n\r\n{}\r\n0\r\n\r\n",
    "a chunk without a line": REGISTER + b"Transfer-Encoding: chunked\r\n\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a chunk line of 5 KiB": REGISTER + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"a" * 5120,
    "a malformed chunk extension": REGISTER + b'Transfer-Encoding: chunked\r\n\r\n2;a="\r\n{}\r\n0\r\n\r\n',
    "a malformed trailer": REGISTER + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nno colon\r\n\r\n",
    "5 KiB of trailers": REGISTER + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 853,
}


def authorized(server: Server, data: bytes) -> bytes:
    """A request whose body is received, since it has the admin's token."""
    return data.replace(REGISTER, REGISTER + f"Authorization: Bearer {server.token}\r\n".encode())


@pytest.mark.parametrize("what", MALFORMED_HTTP)
def test_malformed_http_is_refused_in_the_envelope(what: str, server: Server,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    host = urlsplit(server.url)
    with socket.create_connection((host.hostname or "", host.port or 0), timeout=LIMIT_S) as connection:
        with contextlib.suppress(OSError):  # it may be refused before all of it is sent
            connection.sendall(authorized(server, MALFORMED_HTTP[what]))
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        body = json.loads(answer.read())
    assert answer.status in (400, 404, 413, 431, 501), body
    assert body["ok"] is False and set(body) == {"ok", "error"} and body["error"]
    for name, value in SECURITY.items():
        assert answer.getheader(name) == value
    assert answer.getheader("X-Request-Id") and answer.getheader("Content-Type") == "application/json"
    with contextlib.closing(http.client.HTTPConnection(host.netloc, timeout=LIMIT_S)) as after:
        after.request("GET", "/health")
        assert json.loads(after.getresponse().read())["data"]["agents"]["total"] == 0
    assert not faults(caplog)


SIZE = 30_000
BEGUN = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CHUNKED = REGISTER + b"Transfer-Encoding: chunked\r\n\r\n"
LONG_FORMS = {  # status and request; the parser below ours takes from 0.4 s to a minute for most of these
    "digits in an absolute target": (400, b"GET a://" + b"1" * SIZE + b" x HTTP/1.1\r\nHost: x\r\n\r\n"),
    "digits in an absolute http target": (400,
                                          b"GET http://" + b"1" * SIZE + b" x HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a host of digits": (404, b"GET http://" + b"1" * SIZE + b"/x HTTP/1.1\r\nHost: x\r\n\r\n"),
    "blanks before a control character": (400, BEGUN + b"X:" + b" " * SIZE + b"\x7f\r\n\r\n"),
    "tabs before a value": (200, BEGUN + b"X:" + b"\t" * SIZE + b"1\r\n\r\n"),
    "blanks after a value": (200, BEGUN + b"X: 1" + b" " * SIZE + b"\r\n\r\n"),
    "blanks for a value": (200, BEGUN + b"X:" + b" " * SIZE + b"\r\n\r\n"),
    "blanks between words": (200, BEGUN + b"X: 1" + b" \ta" * (SIZE // 3) + b"\r\n\r\n"),
    "blanks before each of many values": (200,
                                          BEGUN + (b"X:" + b" " * 98 + b"1\r\n") * (SIZE // 103) + b"\r\n"),
    "many folded lines": (400, BEGUN + b"X: 1" + b"\r\n " * (SIZE // 3) + b"\r\n\r\n"),
    "many short headers": (400, BEGUN + b"X:\r\n" * (SIZE // 4) + b"\r\n"),
    "a chunk size of many digits": (400, CHUNKED + b"0" * SIZE),
    "a chunk line of many extensions": (400, CHUNKED + b"1" + b";a" * (SIZE // 2)),
    "a quoted chunk extension": (400, CHUNKED + b'1;a="' + b'\\"' * 2000 + b"\r\n"),
    "trailers": (400, CHUNKED + b"0\r\n" + b"X: 1\r\n" * (SIZE // 6)),
    "many chunks of one byte": (400, CHUNKED + b"1\r\nx\r\n" * (SIZE // 6) + b"0\r\n\r\n"),
}


def sent_raw(server: Server, data: bytes) -> tuple[bytes, float]:
    """What a connection answers until it closes, and the processor time in s that this process used."""
    began_s = time.process_time()
    with socket.create_connection(("127.0.0.1", port_of(server.url)), timeout=LIMIT_S) as connection:
        answer = b""
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
    return answer, time.process_time() - began_s


@pytest.mark.parametrize("what", LONG_FORMS)
def test_long_requests_are_parsed_in_linear_time(what: str, server: Server) -> None:
    status, data = LONG_FORMS[what]
    answer, cpu_s = sent_raw(server, authorized(server, data))
    assert answer[8:12] == b" %d" % status
    assert cpu_s < 0.3, "quadratic: some milliseconds are enough"


PIECES = [b"GET ", b"POST ", b"/", b"http://", b"a://", b"9" * 50, b" ", b" " * 500, b"\t", b"\t" * 500,
          b" HTTP/1.1", b"\r\n", b"\r", b"\n", b":", b"X:", b"X: ", b"Host: x\r\n",
          b"Transfer-Encoding: chunked\r\n", b",", b";",
          b";a=", b'"', b'\\"', b"\\", b"1\r\nx\r\n", b"0\r\n", b"\x00", b"\x7f", b"\xff", b"%2e", b"a b ",
          b"Content-Length: 9\r\n", b"\r\n ", b"#", b"?", b"_"]
STARTS = [b"", b"GET ", b"GET http://", BEGUN, BEGUN + b"X:", REGISTER, CHUNKED, CHUNKED + b"2;",
          CHUNKED + b"0\r\n", CHUNKED + b"0\r\nX:"]


@pytest.mark.parametrize("start", range(len(STARTS)))
def test_no_32_kilobytes_take_more_than_linear_time(start: int, server: Server) -> None:
    choose = random.Random(start)
    for _ in range(12):
        few = choose.sample(PIECES, choose.randint(1, 4))
        data = STARTS[start]
        while len(data) < 32_000:
            data += choose.choice(few) * choose.choice([1, 1, 1, 10, 1000])
        data = data[:32_000] + choose.choice([b"", b"\r\n\r\n", b"\x7f\r\n\r\n"])
        answer, cpu_s = sent_raw(server, authorized(server, data))
        assert answer == b"" or answer.startswith(b"HTTP/1."), data[:200]
        assert cpu_s < 1, f"{cpu_s} s for {few} after {STARTS[start]!r}"
    assert ask(port_of(server.url), "GET", "/health")[0] == 200


def test_chunks_with_extensions_and_trailers_are_taken_in_any_two_pieces(server: Server) -> None:
    who, body = server.manager.register(**AGENT), b'{"cpu": 7, "uptime": 5}'
    chunks = (b"%x;a=b;c=\"d \\\" e\"\r\n%b\r\n" % (10, body[:10])
              + b"00%X\r\n%b\r\n" % (len(body) - 10, body[10:])
              + b"0;last\r\nX-A: 1\r\nX-B:\r\n\r\n")
    head = request("POST", f"/api/agents/{who.agent.id}/heartbeat", b"", "Transfer-Encoding: Chunked",
                   token=who.token)
    with socket.create_connection(("127.0.0.1", port_of(server.url)), timeout=LIMIT_S) as connection:
        for cut in range(len(chunks)):
            connection.sendall(head + chunks[:cut])
            select.select([connection], [], [], 0.002)  # so that they most often arrive apart
            connection.sendall(chunks[cut:])
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert (answer.status, json.loads(answer.read())["data"]["id"]) == (200, who.agent.id), cut
    assert server.manager.agent(who.agent.id).cpu == 7


@pytest.mark.parametrize(("count", "status"), [(2_000, 200), (10_000, 400)])
def test_a_body_in_very_many_small_chunks_is_refused(count: int, status: int, server: Server) -> None:
    who = server.manager.register(**AGENT)
    body = b'{"cpu": 7' + b" " * (count - 10) + b"}"
    head = request("POST", f"/api/agents/{who.agent.id}/heartbeat", b"", "Transfer-Encoding: chunked",
                   "Connection: close", token=who.token)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    answer, _ = sent_raw(server, head + chunks)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer


@pytest.mark.parametrize("path", ["//metrics", "///metrics", "/api//agents", "/metr%ffics", "/metrics%ff",
                                  "/%6detrics", "/metrics%2f", "/%2e/metrics", "/x/%2E%2e/metrics",
                                  "/openapi%2ejson", "/%2fmetrics", "/api%2Fagents", "http://x//metrics",
                                  "http://x/%6Detrics"])
def test_no_path_is_repaired(path: str, server: Server, api: Client) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        answer, _ = sent_raw(server, request(method, path, b"", "Connection: close", token=server.token))
        assert answer.startswith(b"HTTP/1.1 404 ") and b"there is nothing at this path" in answer, answer
    if path.startswith("/") and not re.search("%(?!ff)", path):  # the application gets the rest decoded
        assert api.refusal("GET", path, status=404) == "there is nothing at this path"


@pytest.mark.parametrize("path", ["/api/agents/{id}//heartbeat", "//api/agents/{id}/heartbeat",
                                  "/api/agents/%61{id}/heartbeat", "/api/agents/{id}%ff/heartbeat",
                                  "/api/agents/{id}/heartb%65at"])
def test_no_path_of_a_heartbeat_is_repaired(path: str, server: Server) -> None:
    who = server.manager.register(**AGENT)
    for line in ("X-A: batch", "Expect: pool"):
        answer, _ = sent_raw(server, request("POST", path.replace("{id}", who.agent.id), b"{}", line,
                                             "Connection: close", token=who.token))
        assert answer.startswith(b"HTTP/1.1 404 ") and b"there is nothing at this path" in answer, answer


def test_a_client_that_leaves_in_the_middle_disturbs_nobody(server: Server,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    host = urlsplit(server.url)
    for sent in (b"", b"GET", REGISTER, REGISTER + b"Content-Length: 100\r\n\r\n{",
                 b"GET /api/agents HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection((host.hostname or "", host.port or 0), timeout=LIMIT_S) as connection:
            connection.sendall(sent)
    with contextlib.closing(http.client.HTTPConnection(host.netloc, timeout=LIMIT_S)) as after:
        after.request("GET", "/health")
        assert after.getresponse().status == 200
    assert not faults(caplog)


BEAT = "/api/agents/{id}/heartbeat"
JSON = {"Content-Type": "application/json"}
# The heartbeat most of all, which may have a way of its own.
REQUESTS: list[tuple[str, str, bytes | None, dict[str, str]]] = [
    ("POST", BEAT, b"", {}),
    ("POST", BEAT, b'{"cpu": 1.5, "uptime": 3}', JSON),
    ("POST", BEAT, b'{"version": "2", "policyVersion": "v1"}', JSON),
    ("POST", BEAT + "?x=%FF", b"{}", {}),
    ("POST", BEAT, b'{"cpu": 101, "memory": true}', JSON),
    ("POST", BEAT, b'{"cpu": NaN}', JSON),
    ("POST", BEAT, b'{"cpu": "\xff"}', JSON),
    ("POST", BEAT, b"[" * 100_000, JSON),
    ("POST", BEAT, b"[]", JSON),
    ("POST", BEAT, b"{}", {"Content-Type": "text/plain"}),
    ("POST", BEAT, b"{}", {"Origin": "https://a.example"}),
    ("POST", BEAT, b"{}", {"Origin": "https://b.example"}),
    ("POST", BEAT, b"{}", {"Authorization": "Bearer wrong"}),
    ("POST", BEAT, b"{}", {"Authorization": ""}),
    ("POST", BEAT, b"{}", {"Authorization": "Bearer enroller"}),
    ("POST", "/api/agents/agent-00000000/heartbeat", b"{}", JSON),
    ("POST", "/api/agents/%C3%A9%22/heartbeat", b"{}", JSON),
    ("POST", "/api/agents//heartbeat", b"{}", JSON),
    ("POST", BEAT + "/", b"{}", JSON),
    ("GET", BEAT, None, {}),
    ("PUT", BEAT, b"{}", JSON),
    ("OPTIONS", BEAT, None, {"Origin": "https://a.example"}),
    ("GET", "/api/agents/{id}", None, {}),
    ("GET", "/api/agents?limit=1", None, {"Origin": "https://a.example"}),
    ("HEAD", "/api/agents", None, {}),
    ("GET", "/api/policy/agent/{id}", None, {"If-None-Match": "*"}),
    ("DELETE", "/api/nowhere", None, {}),
]


def test_the_port_answers_as_the_application_does() -> None:
    with fleet(auth_token="admin", enroll_token="enroller", cors_allowed_origins="https://a.example") as api:
        agent = api.register()
        host = urlsplit(api.server.url).netloc
        with contextlib.closing(http.client.HTTPConnection(host, timeout=LIMIT_S)) as connection:
            for method, path, body, headers in REQUESTS:
                headers = {"Authorization": "Bearer admin", "X-Request-Id": "same", **headers}
                path = path.replace("{id}", agent["id"])
                expected = api.app.request(path, method=method, body=body or b"", headers=headers,
                                           expect_errors=True)
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                what = (method, path, (body or b"")[:50], headers)
                assert (answer.status, answer.read()) == (expected.status_int, expected.body), what
                of_server = {"date", "server", "connection", "via", "content-length"}
                assert sorted((name.lower(), value) for name, value in answer.getheaders()
                              if name.lower() not in of_server) == \
                    sorted((name.lower(), value) for name, value in expected.headers.items()
                           if name.lower() not in of_server), what
            connection.request("POST", BEAT.replace("{id}", agent["id"]), iter([b'{"cpu"', b": 7}"]),
                               encode_chunked=True,
                               headers={"Authorization": f"Bearer {agent['token']}",
                                        "Transfer-Encoding": "chunked"})
            assert json.loads(connection.getresponse().read())["data"]["status"] == "online"
        assert api.get(f"/api/agents/{agent['id']}")["cpu"] == 7


def test_beats_sent_in_one_breath_are_answered_in_order(server: Server) -> None:
    host = urlsplit(server.url)
    agents = [server.manager.register(**AGENT) for _ in range(5)]
    requests = b"".join(
        f"POST /api/agents/{each.agent.id}/heartbeat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Length: 2\r\n\r\n{{}}".encode() for each in agents for token in (each.token, "wrong"))
    with socket.create_connection((host.hostname or "", host.port or 0), timeout=LIMIT_S) as connection:
        connection.sendall(requests)
        with connection.makefile("rb") as file:
            answers = []
            for _ in range(10):
                status = file.readline().split()[1]
                headers = dict(line.rstrip().split(b": ", 1) for line in iter(file.readline, b"\r\n"))
                length = next(int(value) for name, value in headers.items()
                              if name.lower() == b"content-length")
                answers.append((status, json.loads(file.read(length))))
    assert [status for status, _ in answers] == [b"200", b"401"] * 5
    assert [body["data"]["id"] for status, body in answers
            if status == b"200"] == [each.agent.id for each in agents]



# Connections on which every byte can be chosen

MIB = 2**20
STREAM = "/api/events/stream"
LONG_TAGS = ["\N{GRINNING FACE}" * 62 + f"{number:02}" for number in range(64)]  # 16 KiB of UTF-8


def request(method: str, path: str, body: bytes = b"", *lines: str, token: str = "",
            version: str = "1.1") -> bytes:
    lines += (f"Authorization: Bearer {token}",
              ) * bool(token) + (f"Content-Length: {len(body)}",) * bool(body)
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: x", *lines, "", ""]).encode() + body


def beat(who: manager.Registration, body: bytes = b'{"cpu": 5}', *lines: str, **how: Any) -> bytes:
    return request("POST", f"/api/agents/{who.agent.id}/heartbeat", body, *lines,
                   **{"token": who.token, **how})


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The text of a refusal, which must be in its envelope."""
        envelope = json.loads(self.body)
        assert envelope["ok"] is False and set(envelope) == {"ok", "error"}
        return str(envelope["error"])


class Wire:
    """A connection that sends what it is told and reads answers and events one by one."""

    def __init__(self, port: int, context: ssl.SSLContext | None, address: str = "127.0.0.1",
                 buffer: int = 0) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.sock.settimeout(LIMIT_S)
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        try:
            self.sock.connect((address, port))
            if context is not None:
                self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        except BaseException:
            self.sock.close()
            raise
        self.file = self.sock.makefile("rb")
        self.chunked = False
        self.text = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self, *, head: bool = False) -> Answer:
        line = self.file.readline().decode()
        assert line.startswith("HTTP/1."), f"no answer but {line!r}"
        headers = {}
        while field := self.file.readline().decode().strip():
            name, _, value = field.partition(": ")
            headers[name.lower()] = value
        self.chunked = "transfer-encoding" in headers
        length = 0 if head else int(headers.get("content-length", 0))
        return Answer(int(line.split()[1]), headers, self.file.read(length))

    def call(self, data: bytes) -> Answer:
        self.send(data)
        return self.answer()

    def event(self) -> tuple[int, str, Any] | str:
        """The next event's id, type and data, or a comment, or nothing when the stream has ended properly."""
        while b"\n\n" not in self.text:
            if self.chunked:
                size = int(self.file.readline(), 16)
                data = self.file.read(size)
                assert self.file.readline() == b"\r\n"
            else:
                data = self.file.read1(65536)
            if not data:
                assert not self.text
                return ""
            self.text += data
        text, _, self.text = self.text.partition(b"\n\n")
        if text.startswith(b":"):
            return text.decode()
        fields = dict(line.split(": ", 1) for line in text.decode().split("\n"))
        assert list(fields) == ["id", "event", "data"]
        return int(fields["id"]), fields["event"], json.loads(fields["data"])

    def ended(self) -> bool:
        """Whether the server closes without another word."""
        try:
            return self.file.read(1) == b""
        except (ConnectionError, ssl.SSLError):
            return True

    def rest(self) -> bytes:
        """What comes until the server closes."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            return self.file.read()
        return b""

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        self.sock.close()


def trusting(certificate: Path, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificate)
    if version:
        context.minimum_version = context.maximum_version = version
    return context


class Site:
    """A started server and a test's connections to it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.context = trusting(server.certificate[0]) if server.certificate else None
        self.wires: list[Wire] = []
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def wire(self, **how: Any) -> Wire:
        """A connection as the server's URL wants it; `context=None` is plaintext."""
        self.wires.append(Wire(self.port, **{"context": self.context, **how}))
        return self.wires[-1]

    def get(self, path: str, *lines: str) -> bytes:
        """The body of an answer to the admin, on a connection of its own."""
        with contextlib.closing(self.wire()) as wire:
            answer = wire.call(request("GET", path, b"", *lines, token=self.server.token))
            assert answer.status == 200, answer
            return answer.body

    def agent(self, **fields: Any) -> manager.Registration:
        return self.server.manager.register(**{**AGENT, **fields})

    def stream(self, query: str = "", *lines: str, version: str = "1.1", **how: Any) -> Wire:
        """An event stream that has said so."""
        wire = self.wire(**how)
        answer = wire.call(request("GET", STREAM + query, b"", *lines, token=self.server.token,
                                   version=version))
        assert answer.status == 200, answer
        assert wire.event()[1] == "connected"
        return wire

    def open_streams(self) -> int:
        return int(re.search(rb"\npanguard_event_streams_open (\d+)\n", self.get("/metrics"))[1])

    def hold(self, monkeypatch: pytest.MonkeyPatch) -> bytes:
        """A request that from now on keeps its thread until `gate` is open."""
        overview = self.server.manager.overview

        def held(**query: Any) -> Any:
            self.entered.release()
            assert self.gate.wait(LIMIT_S)
            return overview(**query)
        monkeypatch.setattr(self.server.manager, "overview", held)
        return request("GET", "/api/overview", token=self.server.token)

    def close(self) -> None:
        self.gate.set()
        for wire in self.wires:
            wire.close()
        stopping = threading.Thread(target=self.server.stop, daemon=True)
        stopping.start()
        stopping.join(LIMIT_S)
        assert not stopping.is_alive(), "the server does not stop"


def make_pair(folder: Path, name: str = "given") -> dict[str, Path]:
    """A certificate and its key, as settings."""
    pair = {"tls_cert": folder / f"{name}.pem", "tls_key": folder / f"{name}.key"}
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                    "-nodes", "-days", "30", "-subj", f"/CN={name}", "-addext",
                    "subjectAltName=DNS:localhost", "-keyout", pair["tls_key"], "-out", pair["tls_cert"]],
                   check=True, capture_output=True)
    return pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
           pair: dict[str, Path]) -> Iterator[Callable[..., Site]]:
    """Starts servers; nothing but what a test has cleared may be logged as a warning or worse."""
    how = getattr(request, "param", None)
    if how == "poll":
        monkeypatch.delattr(select, "epoll", raising=False)
    sites: list[Site] = []

    def start(**settings: Any) -> Site:
        settings = {**(pair if how == "TLS" else {"tls": "off"} if "tls" not in settings else {}), **settings}
        server = Server(port=0, **{"clock": ManualClock(), **settings})
        server.start()
        sites.append(Site(server))
        return sites[-1]
    yield start
    for site in sites:
        site.close()
    logged = [*caplog.get_records("call"), *caplog.records]
    assert [each.getMessage() for each in logged if each.levelno >= logging.WARNING] == []


everywhere = pytest.mark.parametrize("launch", ["poll", "TLS"], indirect=True)  # TLS runs over epoll
Launch = Callable[..., Site]


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients have a fraction of a second for everything."""
    for name, seconds in (("CLEANUP_S", 0.02), ("HANDSHAKE_S", 0.6), ("REQUEST_S", 0.6), ("IDLE_S", 0.6),
                          ("UNAUTHENTICATED_IDLE_S", 0.6)):
        monkeypatch.setattr(manager, name, seconds)


# Event streams


@everywhere
def test_a_stream_says_connected_then_each_entry_as_the_journal_has_it(launch: Launch) -> None:
    site = launch()
    old = site.agent()
    wire = site.wire()
    answer = wire.call(request("GET", STREAM, b"", "X-Request-Id: mine", token=site.server.token))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["x-request-id"], answer.headers["cache-control"]) == ("mine", "no-store")
    assert answer.headers["transfer-encoding"] == "chunked" and "content-length" not in answer.headers
    seq, kind, said = wire.event()
    assert (seq, kind, said["version"]) == (1, "connected", manager.__version__)
    new = site.agent(hostname="\u7db2\u9801", org_id="acme")
    site.server.manager.deregister(old.agent.id)
    items = json.loads(site.get("/api/events?after=1"))["data"]
    assert [item["agentId"] for item in items] == [new.agent.id, old.agent.id]
    assert [wire.event() for _ in items] == [(item["seq"], item["type"], item) for item in items]


SAMPLE_CLIENT = """
import json, sys
for line in sys.stdin.buffer:
    if line.startswith(b"data: "):
        data = json.loads(line[6:])
        if data["type"] != "connected":
            print(data["type"], data["hostname"], flush=True)
"""


@everywhere
def test_a_client_that_reads_the_hostname_from_the_data_of_an_event_prints_hostnames(launch: Launch) -> None:
    site = launch()
    wire = site.wire()
    wire.call(request("GET", STREAM, token=site.server.token))
    lines = [wire.event()]
    site.agent(hostname="web-1")
    site.agent(hostname="web-2")
    lines += [wire.event(), wire.event()]
    stream = "".join(f"data: {json.dumps(data)}\n\n" for _, _, data in lines)
    printed = subprocess.run([sys.executable, "-c", SAMPLE_CLIENT], input=stream, capture_output=True,
                             text=True, timeout=LIMIT_S, check=True).stdout
    assert printed.splitlines() == ["agent_registered web-1", "agent_registered web-2"]
    assert lines[0][2]["message"] and set(lines[0][2]) >= {"seq", "at", "type", "agentId", "org_id", "actor"}


def test_a_stream_is_filtered_by_type_organisation_and_agent_whether_live_or_resumed(launch: Launch) -> None:
    site = launch()
    a, b = site.agent(org_id="acme").agent.id, site.agent().agent.id
    wanted = {"": [1, 2, 3, 4, 5], "?type=agent_deregistered": [4, 5], "?org_id=acme": [1, 4],
              f"?agent_id={b}": [2, 5], f"?agent_id={a}&type=agent_registered": [1],
              "?type=agent_deregistered&type=agent_registered&org_id=acme": [1, 4],
              f"?org_id=acme&agent_id={b}": []}
    streams = {site.stream(query, *lines): [seq for seq in seqs if seq > after]
               for query, seqs in wanted.items()
               for lines, after in (((), 2), (("Last-Event-ID: 0",), 0))}
    site.agent(org_id="other")
    for each in (a, b):
        site.server.manager.deregister(each)
    for stream, seqs in streams.items():
        assert [stream.event()[0] for _ in seqs] == seqs
    site.server.stop()
    assert {stream.event() for stream in streams} == {""}


@everywhere
def test_last_event_id_misses_and_repeats_nothing_while_a_thousand_are_written_across_a_restart(
        launch: Launch, tmp_path: Path) -> None:
    site = launch(data_dir=tmp_path)
    count, done, running = 1000, [], threading.Event()
    running.set()

    def write() -> None:
        while len(done) < count:
            assert running.wait(LIMIT_S)
            with contextlib.suppress(manager.ManagerError):
                site.agent()
                done.append(1)

    got, restarted = [], False
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write) for _ in range(2)]
        while not all(writer.done() for writer in writers) or len(got) < site.server.manager.last_seq():
            wire = site.stream("", f"Last-Event-ID: {got[-1] if got else 0}")
            got += [wire.event()[0] for _ in range(min(97, site.server.manager.last_seq() - len(got)))]
            if len(got) > count // 2 and not restarted:
                restarted = True
                running.clear()
                site.server.stop()
                got += [event[0] for event in iter(wire.event, "")]
                site.server.start()
                running.set()
            wire.close()
        for writer in writers:
            writer.result()
    assert restarted and len(got) >= count and got == [entry.seq for entry in site.server.manager.journal()]


@everywhere
def test_a_reader_that_resumes_gets_entries_that_are_large_together(launch: Launch) -> None:
    site = launch()
    who = site.agent().agent.id
    for number in range(60):  # 32 KiB each
        site.server.manager.retag(who, tags=[*LONG_TAGS[1:], str(number)])
    wire = site.stream("", "Last-Event-ID: 0")
    assert [wire.event()[0] for _ in range(61)] == list(range(1, 62))


@everywhere
def test_a_stream_is_kept_alive_after_fifteen_silent_seconds_of_the_clock(launch: Launch) -> None:
    site = launch()
    early, late = site.stream(), site.stream()
    site.server.clock.advance(14.999)
    site.agent()
    assert early.event()[1] == "agent_registered"  # and no comment before it
    assert late.event()[1] == "agent_registered"
    fresh = site.stream("?type=policy_created")
    site.server.clock.advance(15)
    assert fresh.event() == ": keepalive"


def test_a_stream_is_the_admins_alone_and_its_parameters_are_checked(launch: Launch) -> None:
    site = launch(enroll_token="enroller")
    wire = site.wire()
    for token, status in ((site.agent().token, 403), ("enroller", 403), ("", 401), ("wrong", 401)):
        answer = wire.call(request("GET", STREAM, token=token))
        assert (answer.status, bool(answer.error)) == (status, True)
    for bad in ("x", "-1", "1.5", "9" * 16, "1 2", "\u0661"):
        answer = wire.call(request("GET", STREAM, b"", f"Last-Event-ID: {bad}", token=site.server.token))
        assert (answer.status, answer.error) == (400, "Last-Event-ID: must be the id of an event")
    answer = wire.call(request("GET", STREAM + "?type=nonsense", token=site.server.token))
    assert answer.status == 400 and answer.error.startswith("type[0]: must be one of")
    assert site.open_streams() == 0
    future = site.stream("", "Last-Event-ID: 999999999999999")  # which is from now on
    site.agent()
    assert future.event()[:2] == (2, "agent_registered")


@everywhere
def test_one_stream_too_many_gets_a_503_and_later_the_place_of_one_that_left(launch: Launch) -> None:
    site = launch(max_streams=2)
    readers = [site.stream(), site.stream()]
    wire = site.wire()
    refused = wire.call(request("GET", STREAM, token=site.server.token))
    assert refused.status == 503 and "MANAGER_MAX_STREAMS" in refused.error
    assert int(refused.headers["retry-after"]) > 0
    assert site.open_streams() == 2
    for leave in (readers[0].close, readers[1].reset):
        leave()
        until(lambda: site.open_streams() == 1, "the reader that left is still counted")
        site.stream()
        assert site.open_streams() == 2


def test_head_of_a_stream_has_its_headers_and_takes_no_place(launch: Launch) -> None:
    site = launch(max_streams=1)
    for _ in range(3):
        wire = site.wire()
        wire.send(request("HEAD", STREAM, token=site.server.token))
        answer = wire.answer(head=True)
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
        if answer.headers.get("connection") == "close":
            assert wire.ended()
        else:
            assert wire.call(request("GET", "/health")).status == 200
    assert site.open_streams() == 0
    site.stream()


@everywhere
def test_a_reader_that_stops_reading_is_dropped_and_nobody_else_notices(launch: Launch) -> None:
    site = launch(threads=2)
    who = site.agent().agent.id
    site.stream(buffer=4096)
    good, requests = site.stream(), site.wire()
    for number in range(1000):
        site.server.manager.retag(who, tags=[*LONG_TAGS[1:], str(number)])
        assert good.event()[2]["tags"]["to"][-1] == str(number)
        assert requests.call(request("GET", f"/api/agents/{who}", token=site.server.token)).status == 200
        if number % 20 == 0 and site.open_streams() == 1:
            break
    assert site.open_streams() == 1, "32 MiB behind, and still not dropped"
    site.agent()
    assert good.event()[1] == "agent_registered"


@everywhere
def test_streams_hold_no_thread_and_an_entry_reaches_all(launch: Launch) -> None:
    site = launch(threads=1)
    threads = threading.active_count()
    readers = [site.stream() for _ in range(30)]
    assert threading.active_count() == threads and site.open_streams() == 30
    site.agent()
    assert {reader.event()[:2] for reader in readers} == {(1, "agent_registered")}


@everywhere
def test_streams_over_http_1_1_and_1_0_end_cleanly_when_the_manager_stops(launch: Launch) -> None:
    site = launch()
    old = site.wire()
    answer = old.call(request("GET", STREAM, b"", "Connection: keep-alive", token=site.server.token,
                              version="1.0"))
    assert not {"transfer-encoding", "content-length"} & set(answer.headers)
    assert (answer.headers["connection"], old.event()[1]) == ("close", "connected")
    readers = [old, site.stream()]
    site.agent()
    assert {reader.event()[1] for reader in readers} == {"agent_registered"}
    site.server.stop()
    for reader in readers:
        assert reader.event() == "" and reader.ended()


def test_what_follows_a_stream_on_its_connection_is_not_served(launch: Launch) -> None:
    site = launch()
    who = site.agent().agent.id
    token = site.server.token
    wire = site.wire()
    wire.send(request("GET", STREAM, token=token) + request("DELETE", f"/api/agents/{who}", token=token))
    assert wire.answer().status == 200 and wire.event()[1] == "connected"
    wire.send(request("DELETE", f"/api/agents/{who}", token=token))
    other = site.agent()
    assert wire.event()[2]["agentId"] == other.agent.id
    assert site.get(f"/api/agents/{who}")


def test_another_server_than_ours_says_that_it_has_no_streams(api: Client) -> None:
    assert "GET /api/events" in api.refusal("GET", STREAM, status=501)


# Notifications


class Receiving(contextlib.AbstractContextManager["Receiving"]):
    """A receiver of notifications: answers as it was told, and keeps what came (path, headers, body)."""

    def __init__(self, *answers: int | bytes | None) -> None:
        self.answers = list(answers)  # then 200; bytes are sent as they are, None answers nothing
        self.heard: list[tuple[str, dict[str, str], Any]] = []
        self.before: Callable[[], object] = lambda: None  # called before it answers
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/hook?key=1"
        self.silent: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            told = self._read(client)
            if told is None:
                client.close()
                continue
            self.heard.append(told)
            self.before()
            answer = self.answers.pop(0) if self.answers else 200
            if answer is None:
                self.silent.append(client)
                continue
            if isinstance(answer, int):
                answer = f"HTTP/1.1 {answer} Said\r\nContent-Length: 0\r\n\r\n".encode()
            with client, suppress(OSError):
                client.sendall(answer)

    def _read(self, client: socket.socket) -> tuple[str, dict[str, str], Any] | None:
        """The path, headers and body of a request; None if the connection ended before the request did."""
        with client.makefile("rb") as file, suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = file.readline()
                if not line:
                    return None
                head += line
            first, *lines = head.decode().split("\r\n")[:-2]
            headers = dict(each.split(": ", 1) for each in lines)
            length = int(headers["Content-Length"])
            body = file.read(length)
            if len(body) == length:
                return first.split()[1], headers, json.loads(body)
        return None

    def texts(self) -> list[str]:
        """The texts of the notifications that came."""
        return [body["data"]["text"] for _, _, body in self.heard]

    def __exit__(self, *exc: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for each in self.silent:
            each.close()


@pytest.mark.parametrize("half", [b"", b"POST", b"POST / HTTP/1.1\r\nHo", request("POST", "/", b"{}")[:-2],
                                  request("POST", "/", b"{}")[:-1]],
                         ids=["nothing", "half a line", "half a head", "no body", "half a body"])
def test_the_receiver_of_these_tests_skips_a_request_that_was_cut(half: bytes) -> None:
    with Receiving() as receiver:
        for data in (half, request("POST", "/whole", b"{}")):
            address = "127.0.0.1", urlsplit(receiver.url).port
            with socket.create_connection(address, timeout=LIMIT_S) as client:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                client.recv(100)
        assert [path for path, _, _ in receiver.heard] == ["/whole"]


@contextlib.contextmanager
def notifying(*receivers: Receiving, **settings: Any) -> Iterator[Client]:
    """A manager that notifies these receivers."""
    with fleet(notify_url=",".join(each.url for each in receivers), **settings) as api:
        yield api


def heard(receiver: Receiving, count: int) -> list[str]:
    """The texts of all notifications, once there are so many."""
    until(lambda: len(receiver.heard) >= count, f"{count} notifications, of {receiver.texts()}")
    assert len(receiver.heard) == count, receiver.texts()
    return receiver.texts()


def test_an_agent_that_stays_silent_for_the_delay_is_notified_and_its_return_too() -> None:
    with Receiving() as receiver, notifying(receiver) as api:
        agent, brief = api.register(hostname="web-1"), api.register(hostname="web-2")
        seen = agent["registeredAt"]
        advance(api, 301)
        advance(api, 30)
        api.beat(brief)
        advance(api, 29)
        assert receiver.heard == []
        advance(api, 2)
        assert heard(receiver, 1) == [f"web-1 ({agent['id']}) fell silent, last seen {seen}"]
        path, headers, body = receiver.heard[0]
        assert path == "/hook?key=1" and headers["Content-Type"] == "application/json"
        assert body["type"] == "panguard.notification"
        assert body["timestamp"] == manager.iso(START_MS + 362_000)
        assert [each["agentId"] for each in body["data"]["offline"]] == [agent["id"]]
        assert not body["data"]["online"]
        api.beat(agent)
        api.beat(brief)
        advance(api, 1)  # the timer reads the journal each second
        advance(api, 60)
        assert heard(receiver, 2)[1] == f"web-1 ({agent['id']}) is back"
        assert "webhook-signature" not in headers, "no secret was set"


def test_what_comes_within_the_delay_is_one_notification() -> None:
    with Receiving() as receiver, notifying(receiver, notify_delay_ms=10_000) as api:
        agents = [api.register(hostname=f"h{number}", machine_id=f"m{number}") for number in range(3)]
        for agent in agents:
            api.beat(agent)
        report(api, agents[0], threat(severity="high"), threat(severity="low"))
        advance(api, 1)
        advance(api, 4)
        for agent in agents:
            report(api, agent, threat(severity="medium", sourceIp="203.0.113.77"))
        api.register(hostname="copy", machine_id="m1")
        advance(api, 1)
        assert not receiver.heard
        advance(api, 6)
        (text,) = heard(receiver, 1)
        lines = text.split("\n")
        assert lines[0] == f"h0 ({agents[0]['id']}) reported 2 threats, the worst high"
        assert lines[1] == "3 agents saw sourceIp 203.0.113.77"
        assert lines[2].startswith("copy (") and lines[2].endswith("which is online: a cloned machine")
        assert len(lines) == 3, "less than high is not notified"
        assert [each["type"] for each in receiver.heard[0][2]["data"]["events"]] == [
            "threats_reported", "threats_correlated", "identity_conflict"]


def test_many_agents_that_fall_silent_together_are_one_outage() -> None:
    with Receiving() as receiver, notifying(receiver, heartbeat_timeout_ms=10_000) as api:
        here = [api.register(hostname=f"a{n:02}", ip=f"10.0.3.{n + 1}", tags=["rack-3"][:n % 2])
                for n in range(20)]
        for number in range(40):
            api.register(hostname=f"b{number}", ip=f"10.0.4.{number + 1}")
        rest = api.get("/api/agents")[20:]
        for passed in range(40):
            for agent in rest + here[17:] + (here[:17] if passed < 2 else here[:9] if passed < 6 else []):
                api.call("POST", f"/api/agents/{agent['id']}/heartbeat", {})
            advance(api, 5)
        (text,) = heard(receiver, 1)
        assert text.startswith("17 of 20 agents in 10.0.3.0/24 fell silent within 20 s: a00, a01, ")
        for agent in here[:17]:
            api.beat(agent)
        for _ in range(13):
            for agent in rest + here:
                api.call("POST", f"/api/agents/{agent['id']}/heartbeat", {})
            advance(api, 5)
        assert heard(receiver, 2)[1] == "17 agents are back"


def test_those_still_silent_are_reminded_of() -> None:
    with Receiving() as receiver, notifying(receiver, notify_repeat_ms=3_600_000,
                                            notify_delay_ms=1000) as api:
        agent = api.register(hostname="web-1")
        advance(api, 301)
        advance(api, 1)
        assert len(heard(receiver, 1)) == 1
        advance(api, 3599)
        advance(api, 1)
        assert heard(receiver, 2)[1] == "web-1 is still silent"
        advance(api, 3600)
        assert len(heard(receiver, 3)) == 3
        api.call("DELETE", f"/api/agents/{agent['id']}")
        advance(api, 2)
        advance(api, 7200)
        assert len(heard(receiver, 3)) == 3


def test_what_is_notified_can_be_chosen() -> None:
    with Receiving() as receiver, notifying(receiver, notify_on="threat:low", notify_delay_ms=1000) as api:
        agent = api.register()
        report(api, agent, threat(severity="low"))
        advance(api, 400)
        api.beat(agent)
        advance(api, 2)
        advance(api, 2)
        assert heard(receiver, 1) == [f"web-1 ({agent['id']}) reported 1 threats, the worst low"]


@pytest.mark.parametrize(("kind", "field"),
                         [("slack", "text"), ("mattermost", "text"), ("discord", "content")])
def test_a_chat_gets_the_text_it_takes(kind: str, field: str) -> None:
    with Receiving() as receiver, fleet(notify_url=f"{kind}+{receiver.url}", notify_delay_ms=1000) as api:
        agent = api.register()
        report(api, agent, threat(severity="critical"))
        advance(api, 2)
        advance(api, 2)
        until(lambda: receiver.heard, "a notification")
        said = receiver.heard[0][2]
        assert said.pop("allowed_mentions", None) == ({"parse": []} if kind == "discord" else None)
        assert said == {field: f"web-1 ({agent['id']}) reported 1 threats, the worst critical"}


@contextlib.contextmanager
def composing(tmp_path: Path, *receivers: Receiving) -> Iterator[
        tuple[Manager, ManualClock, Callable[[], list[bool]]]]:
    """A manager without threads, its clock, and a function that composes and delivers once."""
    clock, store = ManualClock(), manager.Store(tmp_path)
    with contextlib.closing(store):
        fleet = Manager(Config(data_dir=tmp_path, notify_url=",".join(each.url for each in receivers),
                               notify_delay_ms=1000), clock, store)
        notifier = manager.Notifier(fleet)

        def turn() -> list[bool]:
            notifier.compose()
            return [receiver.deliver() for receiver in notifier.receivers]
        yield fleet, clock, turn


def reported(fleet: Manager, clock: ManualClock, turn: Callable[[], Any], severity: str = "high") -> None:
    """Have an agent report a threat, and let the delay pass up to when it is to be delivered."""
    fleet.report_events(fleet.register("web-1", "linux", "1").agent.id, [threat(severity=severity)])
    turn()
    clock.advance(1)


def test_a_receiver_that_fails_gets_it_again_and_the_other_meanwhile(tmp_path: Path) -> None:
    busy = b"HTTP/1.1 503 No\r\nRetry-After: 100\r\nContent-Length: 0\r\n\r\n"
    redirect = b"HTTP/1.1 302 No\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    with Receiving(500, busy, redirect, b"\x00", 200) as bad, Receiving() as good, \
            composing(tmp_path, bad, good) as (fleet, clock, turn):
        reported(fleet, clock, turn)
        assert turn() == [False, True]
        for tries, wait_s in enumerate((5, 100, 20, 40), 2):
            clock.advance(wait_s - 1)
            assert turn() == [False, False] and len(bad.heard) == tries - 1, "not before its time"
            clock.advance(1)
            assert turn() == [tries == 5, False] and len(bad.heard) == tries
        assert len(good.heard) == 1
        assert {headers["webhook-id"] for _, headers, _ in bad.heard} == {good.heard[0][1]["webhook-id"]}
        (entry,) = fleet.journal(type="notification_failed")
        assert entry.data == {"receiver": bad.url.rpartition("/")[0], "error": "500 Said", "off": False}
        reported(fleet, clock, turn)
        assert turn() == [True, True]


def test_a_receiver_that_is_gone_is_asked_no_more_until_a_start() -> None:
    with Receiving(410) as receiver, notifying(receiver, notify_delay_ms=1000) as api:
        agent = api.register()
        for _ in range(3):
            report(api, agent, threat(severity="high"))
            advance(api, 2)
            advance(api, 100_000)
        assert len(heard(receiver, 1)) == 1
        until(lambda: api.journal("notification_failed"), "it is journalled")
        assert api.journal("notification_failed")[0]["off"] is True
        port, operator = port_of(api.server.url), api.server.token
        health = {token: ask(port, "GET", "/health", None, token)[1]["data"] for token in (
            operator, "", "wrong", agent["token"])}
        assert health.pop(operator)["receivers"] == [
            {"receiver": receiver.url.rpartition("/")[0], "failing": True}]
        assert not any("receivers" in each for each in health.values()), "only operators see receivers"


def test_what_was_not_delivered_is_delivered_after_a_restart_and_nothing_twice(tmp_path: Path) -> None:
    clock = ManualClock()
    with Receiving(200, None) as receiver:
        settings: Any = {"port": 0, "clock": clock, "data_dir": tmp_path, "tls": "off",
                         "notify_url": receiver.url, "notify_delay_ms": 1000}
        with Server(**settings) as server:
            agent = server.manager.register("web-1", "linux", "1").agent
            for number in range(2):
                server.manager.report_events(agent.id, [threat(type=f"t{number}", severity="high")])
                clock.advance(2)
                clock.advance(2)
                heard(receiver, number + 1)  # the second hangs
            server.manager.report_events(agent.id, [threat(type="t3", severity="critical")])
        clock.advance(10)
        with Server(**settings) as server:
            clock.advance(2)
            clock.advance(2)
            heard(receiver, 4)
        ids = [headers["webhook-id"] for _, headers, _ in receiver.heard]
        assert ids[1] == ids[2] and len(set(ids)) == 3, "the one that hung is the same one again"
        assert receiver.texts()[3].endswith("critical")
        with Server(**{**settings, "notify_url": ()}) as server:
            server.manager.report_events(agent.id, [threat(type="t4", severity="critical")])
            clock.advance(5)
        with Server(**settings) as server:
            clock.advance(5)
            clock.advance(5)
            server.manager.report_events(agent.id, [threat(type="t5", severity="high")])
            clock.advance(2)
            clock.advance(2)
            text = heard(receiver, 5)[4]
            assert text.endswith("high"), "what came while nobody was to be told is not told later"


@pytest.mark.parametrize("kind", ["", "slack+", "mattermost+", "discord+"])
def test_what_agents_send_neither_calls_people_nor_makes_lines(kind: str) -> None:
    hostile = "@everyone <!channel> [x](https://evil.example) \u202e&"
    with Receiving() as receiver, fleet(notify_url=kind + receiver.url, notify_delay_ms=1000) as api:
        for _ in range(3):
            report(api, api.register(hostname=hostile),
                   threat(severity="high", sourceIp="1.2.3.4\nall clear \x1b[31m"))
        advance(api, 2)
        advance(api, 2)
        until(lambda: receiver.heard, "a notification")
        said = receiver.heard[0][2]
        text = said["data"]["text"] if not kind else said.get("text") or said["content"]
        assert len(text.split("\n")) == 4 and "\x1b" not in text and "\u202e" not in text
        attack = {"": "", "slack+": "<!channel>", "mattermost+": "@everyone", "discord+": "[x]("}[kind]
        assert attack in ("", *(each for each in ("<!channel>", "@everyone", "[x](") if each not in text))


def test_many_events_are_counted_with_the_worst_first_and_a_chat_ends_on_a_line() -> None:
    with Receiving() as plain, Receiving() as chat, fleet(
            notify_url=f"{plain.url},slack+{chat.url}", notify_delay_ms=1000, notify_on="threat:low") as api:
        for number in range(50):
            agent = api.register(hostname=f"{number:02}-" + "x" * 100)
            report(api, agent, threat(severity="critical" if number == 40 else "low"))
        advance(api, 2)
        advance(api, 2)
        lines = heard(plain, 1)[0].split("\n")
        assert lines[0].startswith("40-") and lines[0].endswith("worst critical")
        assert lines[-1] == "and 30 more" and len(lines) == 21
        until(lambda: chat.heard, "the chat's")
        short = chat.heard[0][2]["text"].split("\n")
        assert short[-1] == "…" and short[:-1] == lines[:len(short) - 1] and len(short) > 5


def test_an_outage_names_its_own_agents_and_counts_the_others() -> None:
    with Receiving() as receiver, notifying(receiver, heartbeat_timeout_ms=10_000) as api:
        for number in range(16):
            api.register(hostname=f"z{number:02}", ip=f"10.0.3.{number + 1}")
        for number in range(4):
            api.register(hostname=f"a{number}", ip=f"10.9.{number}.1")
        for _ in range(3):
            advance(api, 60)
        (text,) = heard(receiver, 1)
        assert text.startswith("16 of 16 agents in 10.0.3.0/24 fell silent within 0 s: z00, z01, ")
        assert text.endswith("z15; and 4 others")


def test_returns_alone_can_be_notified_and_an_address_is_one_receiver() -> None:
    with Receiving() as receiver, notifying(receiver, receiver, notify_on="online",
                                            notify_delay_ms=1000) as api:
        agent = api.register(hostname="web-1")
        advance(api, 301)
        advance(api, 2)
        api.beat(agent)
        advance(api, 1)
        advance(api, 2)
        assert heard(receiver, 1) == [f"web-1 ({agent['id']}) is back"]


def test_an_address_within_an_address_is_no_receiver() -> None:
    with Receiving() as receiver, Receiving() as other, fleet(
            notify_url=f"{receiver.url}&next=slack+{other.url}", notify_delay_ms=1000) as api:
        report(api, api.register(), threat(severity="high"))
        advance(api, 2)
        advance(api, 2)
        assert len(heard(receiver, 1)) == 1 and not other.heard


def test_what_nobody_takes_for_a_day_is_let_go(tmp_path: Path) -> None:
    with Receiving(410) as gone, Receiving(*[503] * 99) as down, \
            composing(tmp_path, gone, down) as (fleet, clock, turn):
        for _ in range(5):
            reported(fleet, clock, turn)
            turn()
            clock.advance(86_000)
        with fleet.store.read() as db:
            assert db.execute("SELECT count(*) FROM notifications").fetchone()[0] == 2
        assert len(gone.heard) == 1 and len(down.heard) == 5


def test_a_notification_that_is_refused_for_itself_does_not_hold_up_the_next(tmp_path: Path) -> None:
    with Receiving(*[413] * 5) as receiver, composing(tmp_path, receiver) as (fleet, clock, turn):
        for severity in ("high", "critical"):
            reported(fleet, clock, turn, severity)
            turn()
        for _ in range(6):
            clock.advance(100)
            turn()
        assert [text.rpartition(" ")[2] for text in receiver.texts()] == ["high"] * 5 + ["critical"]


def test_a_fault_of_the_database_after_a_delivery_delivers_nothing_twice(tmp_path: Path) -> None:
    with Receiving(200, 503) as receiver, composing(tmp_path, receiver) as (fleet, clock, turn):
        for _ in range(2):
            reported(fleet, clock, turn)
            notified = len(receiver.heard)
            with contextlib.suppress(manager.Unavailable):
                receiver.before = lambda: locking.enter_context(contextlib.closing(sqlite3.connect(
                    tmp_path / "manager.db", isolation_level=None, check_same_thread=False))).execute(
                        "BEGIN IMMEDIATE")
                with contextlib.ExitStack() as locking:
                    turn()
            receiver.before = lambda: None
            for _ in range(4):
                turn()
            assert len(receiver.heard) == notified + 1
        clock.advance(5)
        turn()
        assert len(receiver.heard) == 3
        assert len({headers["webhook-id"] for _, headers, _ in receiver.heard}) == 2


@pytest.mark.parametrize(("answer", "said"), [
    (b"HTTP/1.1 500 bad\x1b[31m\rforged\r\n\r\n", "500 bad"),
    (b"HTTP/1.1 503 No\r\nRetry-After: Wed, 21 Oct 2099 07:28:00 GMT\r\n\r\n", "503 No")])
def test_what_a_receiver_answers_is_one_line(answer: bytes, said: str) -> None:
    with Receiving(answer) as receiver, notifying(receiver, notify_delay_ms=1000) as api:
        report(api, api.register(), threat(severity="high"))
        advance(api, 2)
        advance(api, 2)
        until(lambda: api.journal("notification_failed"), "it is journalled")
        error = api.journal("notification_failed")[0]["error"]
        assert error.startswith(said) and error.isprintable()
        advance(api, 100 if said == "503 No" else 0)
        assert len(receiver.heard) == 1, "a date is obeyed, too"


def test_a_receiver_that_hangs_delays_no_stop(tmp_path: Path) -> None:
    with Receiving(None) as receiver, notifying(receiver, notify_delay_ms=1000) as api:
        report(api, api.register(), threat(severity="high"))
        advance(api, 2)
        advance(api, 2)
        heard(receiver, 1)
        began_s = time.monotonic()
        api.server.stop()
        assert time.monotonic() - began_s < 9, "less than the time that it is waited for"


def test_a_test_notification_shows_each_receivers_answer(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiving(200, 200) as good, Receiving(404, 200) as bad, notifying(good, bad) as api:
        monkeypatch.setenv("MANAGER_URL", api.server.url)
        monkeypatch.setenv("MANAGER_AUTH_TOKEN", api.server.token)
        status, out, err = shell("notify", "test")
        assert (status, err) == (3, "")
        assert re.search(r"true +200 Said\n", out) and re.search(r"false +404 Said\n", out)
        assert shell("notify", "test", "--json")[0] == 0
        assert good.texts() == ["A test of Panguard Manager's notifications"] * 2
    with fleet() as api:
        assert "MANAGER_NOTIFY_URL" in api.refusal("POST", "/api/notify/test", status=409)


@pytest.mark.fuzz
def test_the_reference_library_verifies_notifications() -> None:
    from standardwebhooks import Webhook

    secret = "whsec_" + b64encode(b"a secret of 24 bytes, yes").decode()
    with Receiving() as receiver, Server(port=0, notify_url=receiver.url, notify_secret=secret) as server:
        status, answered = ask(port_of(server.url), "POST", "/api/notify/test", None, server.token)
        assert status == 200 and answered["data"][0]["delivered"]
        _, headers, body = receiver.heard[0]
        assert Webhook(secret).verify(json.dumps(body, separators=(",", ":"), ensure_ascii=False), {
            name: headers[name] for name in ("webhook-id", "webhook-timestamp", "webhook-signature")}) == body


# Heartbeats in the loop


def use_pool(site: Site) -> None:
    """Have a worker serve every heartbeat from now on: the loop serves none while a fault is waiting."""
    site.server.faults.add(route="GET /metrics", status=500)


@everywhere
def test_the_lane_needs_no_worker(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    site = launch(threads=1)
    who, busy, wire = site.agent(), site.wire(), site.wire()
    busy.send(site.hold(monkeypatch))
    assert site.entered.acquire(timeout=LIMIT_S)
    for number in range(10):
        assert wire.call(beat(who, b'{"cpu": %d}' % number)).status == 200
    use_pool(site)  # or else the comparison below would compare the loop with itself
    wire.send(beat(who))
    assert not select.select([wire.sock], [], [], 0.05)[0]
    site.gate.set()
    assert wire.answer().status == busy.answer().status == 200


@everywhere
def test_the_lane_serves_heartbeats_that_arrive_in_any_two_pieces(
        launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    site = launch(threads=1)
    who, wire, other = site.agent(), site.wire(), site.wire()
    wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = beat(who, b'{"cpu": 5}', "X-Request-Id: 000", "Content-Type: application/json")
    for cut in range(1, len(data)):
        data = data.replace(b"Id: %03d" % (cut - 1), b"Id: %03d" % cut)
        wire.send(data[:cut])
        assert other.call(beat(who)).status == 200  # by now the first piece has been looked at
        answer = wire.call(data[cut:])
        assert (answer.status, answer.headers["x-request-id"]) == (200, f"{cut:03d}")
    busy = site.wire()
    busy.send(site.hold(monkeypatch))
    assert site.entered.acquire(timeout=LIMIT_S)
    head, body = data[:-10], data[-10:]
    for pieces in ((head, body), (head, body[:4], body[4:])):  # a worker is not to be had
        for piece in pieces[:-1]:
            wire.send(piece)
            assert other.call(beat(who)).status == 200
        assert wire.call(pieces[-1]).status == 200
    site.gate.set()
    assert busy.answer().status == 200


@everywhere
def test_what_follows_a_heartbeat_in_pieces_is_served_after_it(launch: Launch) -> None:
    site = launch()
    who, wire, other = site.agent(), site.wire(), site.wire()
    head, rest = beat(who)[:-3], beat(who)[-3:] + request("GET", "/nowhere") + beat(who, b"{")
    wire.send(head)
    assert other.call(beat(who)).status == 200
    wire.send(rest)
    assert [wire.answer().status for _ in range(3)] == [200, 404, 400]
    for gone in (wire.close, other.reset):  # a client that leaves in the middle of one
        site.wire()
        (wire if gone == wire.close else other).send(head)
        gone()
    assert site.wire().call(beat(who)).status == 200


def test_a_fault_strikes_the_heartbeats_that_come_after_it(launch: Launch) -> None:
    site = launch()
    route = "POST /api/agents/:id/heartbeat"
    for fault in ({"status": 599}, {"drop": "before"}, {"drop": "after"}):
        who, wire, other = site.agent(), site.wire(), site.wire()
        with site.server.manager.store.transaction():  # meanwhile heartbeats wait in the loop
            wire.send(beat(who))
            until_queued(site.server, 2)
            site.server.faults.add(route=route, **fault)
        assert wire.answer().status == 200
        other.send(beat(who))
        assert other.answer().status == 599 if "status" in fault else other.ended()
        assert wire.call(beat(who)).status == 200


def test_public_paths_are_answered_while_heartbeats_and_all_workers_wait_to_write(launch: Launch) -> None:
    site = launch(threads=1)
    who, beating, reporting, other = site.agent(), site.wire(), site.wire(), site.wire()
    store = site.server.manager.store
    with store.transaction():
        beating.send(beat(who))
        until_queued(site.server, 2)
        reporting.send(request("DELETE", f"/api/agents/{who.agent.id}", token=who.token))
        until_queued(site.server, 3)
        for path in ("/livez", "/readyz", "/health", "/openapi.json", "/"):
            assert other.call(request("GET", path)).status == 200
    assert beating.answer().status == 200
    assert reporting.answer().status == 200
    assert beating.call(beat(who)).status == 401


def test_heartbeats_wait_for_another_program_while_the_loop_and_other_writers_do_not(
        launch: Launch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(manager, "BLOCKED_S", LIMIT_S)
    site = launch()
    who, beating, other = site.agent(), site.wire(), site.wire()
    with locked(site.server.manager.store.folder):
        beating.send(beat(who))
        assert other.call(request("GET", "/livez")).status == 200
        assert other.call(request("DELETE", f"/api/agents/{who.agent.id}", token=who.token)).status == 503
    assert beating.answer().status == 200
    caplog.clear()  # of the refused write


def test_a_connection_closed_while_its_heartbeat_waits_disturbs_no_other(launch: Launch) -> None:
    site = launch()
    who, gone, pipelined = site.agent(), site.wire(), site.wire()
    store = site.server.manager.store
    with store.transaction():
        gone.send(beat(who))
        until_queued(site.server, 2)
        gone.reset()
        pipelined.send(beat(who))
        pipelined.send(request("GET", "/nowhere") + beat(who))
        assert site.wire().call(request("GET", "/livez")).status == 200
    assert [pipelined.answer().status for _ in range(3)] == [200, 404, 200]


def test_requests_that_arrived_before_the_stop_are_answered(launch: Launch) -> None:
    site = launch()
    who, first, *wires = site.agent(), *(site.wire() for _ in range(4))
    for wire in wires:
        assert wire.call(request("GET", "/nowhere")).status == 404
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with site.server.manager.store.transaction():
            first.send(beat(who))
            until_queued(site.server, 2)
            for wire, data in zip(wires, (beat(who), request("GET", "/nowhere"), beat(who, b"{")),
                                  strict=True):
                wire.send(data)
            stopping = pool.submit(site.server.stop)
        assert [wire.answer().status for wire in (first, *wires)] == [200, 200, 404, 400]
        stopping.result(LIMIT_S)


@everywhere
def test_lane_and_route_answer_alike_to_the_byte(launch: Launch) -> None:
    site = launch(enroll_token="enroller", cors_allowed_origins="https://a.example")
    one, other, admin, close = site.agent(), site.agent(), site.server.token, "Connection: close"
    path = f"/api/agents/{one.agent.id}/heartbeat"
    site.server.manager.create_policy(name="p", rules=[{"type": "block_ip", "config": {}, "enabled": True}])
    bodies = [b"", b"{}", b'{"cpu": 1.5, "memory": null, "uptime": 3, "new": []}', b'{"version": "2"}',
              b'{"policyVersion": "v1"}', b"{", b"[]", b'{"cpu": NaN}', b'{"cpu": "1"}',
              b'{"cpu": 101, "memory": true}', b'{"policyVersion": 1}', b"\xff", b"[" * 4000,
              b" " * 4097 + b"{}", b"{}" + b" " * MIB]
    requests = [
        *(beat(one, body, close, "X-Request-Id: mine") for body in bodies),
        *(beat(one, b"{}", close, f"Content-Type: {kind}")
          for kind in ("text/plain", "application/json; charset=x")),
        *(beat(one, b"{}", close, token=token) for token in (admin, other.token, "enroller", "wrong", "")),
        beat(one, b"{}", close, "Authorization: Basic eA==", token=""),
        *(beat(one, b"{}", close, f"X-Request-Id: {given}") for given in ("a.b:c-1", "not sane", "x" * 129)),
        *(beat(one, b"{}", close, f"Origin: https://{origin}.example") for origin in "ab"),
        *(request("POST", f"/api/agents/{name}/heartbeat", b"{}", close, token=admin)
          for name in ("agent-00000000", "%C3%A9", "%2F", "", "a/b", "x" * 300)),
        *(request(method, path, b"", close, token=one.token)
          for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS")),
        *(request("POST", path + tail, b"{}", close, token=one.token)
          for tail in ("/", "?cpu=x", "?", "#x", "%20")),
        beat(one, b"{}", version="1.0"), beat(one, b"{}", "Connection: keep-alive", version="1.0") + beat(
            one, b"{}", version="1.0"),
        beat(one) + beat(one, b"{") + beat(one, b"{}", close),
        request("POST", path, b"", close, "Transfer-Encoding: chunked",
                token=one.token) + b"2\r\n{}\r\n0\r\n\r\n",
        beat(one, b"{}", close, "Expect: 100-continue"), beat(one, b"{}", close, "Content-Length: 2"),
        beat(one, b"{}", close).replace(b"POST /", b"POST http://x/"), b"POST " + path.encode() + b"\r\n\r\n",
        *(beat(one, b"{}", line, close) for line in (
            "X-A:1", "X-A:  1 ", "X-A:", "X-A", ": 1", "X A: 1", "X-A : 1", "X-A:\t1\t", " folded: 1",
            "\tfolded", "X_A: 1", "X-\u00e9: 1", "X-A: \u00e9", "X-A: \x01", "X-A: \x7f", "X-A: \x00",
            "X-A: a\rb", "X-A: a\nX-B: b", "host: y",
            "AUTHORIZATION: Bearer x", "content-type: text/plain",
            "x-request-ID: twice\r\nX-Request-Id: thrice",
            "X-Forwarded-For: 1.2.3.4", "X-A: " + "x" * 9000, "X-A: 1\r\n" * 200 + "X-B: 2",
            "Transfer-Encoding: gzip", "Transfer-Encoding:", "Upgrade: websocket", "Trailer: X-A")),
        *(beat(one, b"{}", f"Connection: {how}") + beat(one, b"{}", close)
          for how in ("Close", "close ", "keep-alive", "Keep-Alive, TE", "upgrade", "close, x", "")),
        *(request("POST", path, b"", close, f"Content-Length: {length}", token=one.token) + b"{}"
          for length in ("2", "002", "+2", "-2", " 2", "2 ", "2, 2", "2.0", "0x2", "\u0662", "", "1", "0",
                         "9" * 30, "0" * 4300 + "2")),
        *(beat(one, b"{}", close).replace(b"Host: x\r\n", host) for host in (
            b"", b"Host:\r\n", b"Host: a, b\r\n", b"Host: a\r\nHost: a\r\n")),
        *(front + beat(one, b"{}", close) for front in (b"\r\n", b"\n", b" ", b"\r\n\r\n", b"\x16")),
        *(beat(one, b"{}", close).replace(b" HTTP/1.1", version) for version in (
            b"  HTTP/1.1", b" HTTP/1.1 ", b" http/1.1", b" HTTP/1.2", b" HTTP/2.0", b"\tHTTP/1.1", b"")),
        beat(one, b"{}", close).replace(b"\r\n", b"\n") + b"\r\n\r\n",
        beat(one, b"{}", close).replace(b"POST", b"post")]

    def served() -> list[bytes]:
        answers = []
        for data in requests:
            with contextlib.closing(site.wire()) as wire:
                wire.send(data)
                answers.append(re.sub(rb"(Date: [A-Z].{28}|X-Request-Id: [0-9a-f-]{36})\r\n",
                                      b"", wire.rest()))
        return answers

    site.server.manager.heartbeat(one.agent.id, version="2", policy_version=1)  # what one of them changes
    in_loop = served()
    use_pool(site)
    for data, batch, pool in zip(requests, in_loop, served(), strict=True):
        assert batch == pool, data[:300]
        assert batch.startswith(b"HTTP/1."), data[:300]


@everywhere
def test_lane_and_route_throttle_alike(launch: Launch) -> None:
    for options, token, before in (({}, "wrong", 401), ({"rate_limit": 20}, None, 200)):
        site = launch(**options)
        who, wire = site.agent(), site.wire()
        data = beat(who, token=token or who.token)
        assert [wire.call(data).status for _ in range(21)] == [before] * 20 + [429]
        site.server.clock.advance(20.5)
        batch = wire.call(data)
        use_pool(site)
        pool = wire.call(data)
        assert batch.headers["retry-after"] == "40" and "20" in batch.error
        for answer in (batch, pool):
            del answer.headers["x-request-id"], answer.headers["date"]
        assert batch == pool
        site.server.faults.clear()
        site.server.clock.advance(40)
        assert wire.call(data).status == before


@everywhere
def test_pipelined_requests_of_lane_and_pool_are_answered_in_order(launch: Launch) -> None:
    site = launch()
    who = site.agent()
    wires = [site.wire() for _ in range(4)]
    for _ in range(5):
        for wire in wires:
            wire.send(b"".join(
                beat(who, b"{}", f"X-Request-Id: {n}") if n % 3 else
                request("GET", "/health", b"", f"X-Request-Id: {n}")
                for n in range(40)) + request("GET", "/nowhere", b"", "X-Request-Id: 40"))
        for wire in wires:
            answers = [wire.answer() for _ in range(41)]
            assert [int(answer.headers["x-request-id"]) for answer in answers] == list(range(41))
            assert [answer.status for answer in answers] == [200] * 40 + [404]
            assert [b"lastHeartbeat" in answer.body
                    for answer in answers] == [n % 3 > 0 and n < 40 for n in range(41)]


@everywhere
def test_pipelined_answers_that_nobody_reads_hold_no_thread(launch: Launch) -> None:
    site = launch(threads=1)
    who = site.agent()
    with site.server.manager.store.transaction():
        for _ in range(300):
            site.agent(tags=LONG_TAGS)
    deaf, other = site.wire(buffer=4096), site.wire()
    deaf.send(request("GET", "/api/agents", token=site.server.token) * 5  # 30 MB
              + request("GET", "/api/agents", b"", "Connection: close", token=site.server.token))
    deaf.sock.recv(1)
    other.sock.settimeout(5)
    for _ in range(10):
        assert other.call(request("GET", "/health")).status == other.call(beat(who)).status == 200
    assert len(deaf.rest()) > 6 * 300 * 16_000  # it reads after all, and misses nothing


@everywhere
def test_a_request_that_came_with_another_is_served_after_a_large_answer(launch: Launch) -> None:
    site = launch()
    with site.server.manager.store.transaction():
        for _ in range(400):  # more than the system's buffers take at once
            site.agent(tags=LONG_TAGS)
    wire = site.wire(buffer=65536)
    wire.send(request("GET", "/api/agents", token=site.server.token) + 3 * request("GET", "/health"))
    assert [wire.answer().status for _ in range(4)] == [200] * 4


@everywhere
def test_pipelined_heartbeats_whose_answers_nobody_reads_do_not_stop_the_loop(launch: Launch) -> None:
    site = launch()
    deaf, other = site.wire(buffer=4096), site.wire()
    deaf.sock.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        for _ in range(100):
            deaf.send(request("POST", "/api/agents/a/heartbeat") * 1000)
    other.sock.settimeout(5)
    assert other.call(beat(site.agent())).status == 200


@everywhere
def test_heartbeats_that_wait_together_are_one_write(launch: Launch, tmp_path: Path) -> None:
    site = launch(data_dir=tmp_path)
    everyone = [(site.agent(), site.wire()) for _ in range(60)]
    log = tmp_path / "manager.db-wal"
    sizes = [log.stat().st_size]
    for who, wire in everyone:
        assert wire.call(beat(who)).status == 200
    sizes.append(log.stat().st_size)
    with site.server.manager.store.transaction():  # while this lasts nobody else writes, and they gather
        for who, wire in everyone:
            wire.send(beat(who, b'{"cpu": 6}'))
    assert [wire.answer().status for _, wire in everyone] == [200] * 60
    sizes.append(log.stat().st_size)
    assert 0 < sizes[2] - sizes[1] < (sizes[1] - sizes[0]) / 4
    assert {site.server.manager.agent(who.agent.id).cpu for who, _ in everyone} == {6}


def test_a_heartbeat_by_itself_writes_little_to_the_disk(launch: Launch, tmp_path: Path) -> None:
    site = launch(data_dir=tmp_path)
    everyone, wire, log = [site.agent() for _ in range(200)], site.wire(), tmp_path / "manager.db-wal"
    before = log.stat().st_size
    assert {wire.call(beat(who)).status for who in everyone} == {200}
    assert 0 < log.stat().st_size - before <= 200 * 1536


@everywhere
def test_no_heartbeat_is_answered_before_its_commit(launch: Launch, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    site = launch(data_dir=tmp_path)
    who, wire, depth = site.agent(), site.wire(), []
    assert wire.call(beat(who)).status == 200
    transaction, committing, go = Store.transaction, threading.Event(), threading.Event()

    @contextlib.contextmanager
    def slow(self: Store, **how: Any) -> Iterator[sqlite3.Connection]:
        depth.append(1)
        try:
            with transaction(self, **how) as db:
                yield db
                if len(depth) == 1:
                    committing.set()
                    assert go.wait(LIMIT_S)
        finally:
            depth.pop()
    monkeypatch.setattr(Store, "transaction", slow)
    wire.send(beat(who, b'{"cpu": 99}'))
    assert committing.wait(LIMIT_S)
    assert not select.select([wire.sock], [], [], 0.1)[0]
    go.set()
    assert wire.answer().status == 200
    with contextlib.closing(sqlite3.connect(tmp_path / "manager.db")) as other:
        assert other.execute("SELECT cpu FROM contacts").fetchall() == [(99,)]


def test_the_lanes_requests_are_measured(launch: Launch) -> None:
    site = launch()
    who, wire = site.agent(), site.wire()
    for data in [beat(who)] * 7 + [beat(who, b"{")] * 2 + [beat(who, token="wrong")]:
        wire.call(data)
    metrics = site.get("/metrics").decode()
    labels = 'method="POST",route="/api/agents/:id/heartbeat"'
    assert f'panguard_http_requests_total{{{labels},status="2xx"}} 7\n' in metrics
    assert f'panguard_http_requests_total{{{labels},status="4xx"}} 3\n' in metrics
    assert 'panguard_http_request_duration_seconds_count{route="/api/agents/:id/heartbeat"} 10\n' in metrics
    assert "panguard_heartbeats_total 7\n" in metrics


@everywhere
def test_a_locked_database_answers_503_to_every_heartbeat_until_it_is_free(
        launch: Launch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = launch(data_dir=tmp_path)
    everyone = [(site.agent(), site.wire()) for _ in range(10)]
    with contextlib.closing(sqlite3.connect(tmp_path / "manager.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for who, wire in everyone:
            wire.send(beat(who))
        for _, wire in everyone:
            answer = wire.answer()
            assert answer.status == 503 and "locked" in answer.error
            assert int(answer.headers["retry-after"]) > 0
            assert answer.headers["x-request-id"] and answer.headers["x-frame-options"] == "DENY"
    caplog.clear()
    assert [wire.call(beat(who)).status for who, wire in everyone] == [200] * 10
    metrics = site.get("/metrics").decode()
    assert 'route="/api/agents/:id/heartbeat",status="5xx"} 10\n' in metrics
    assert "panguard_heartbeats_total 10\n" in metrics


def test_one_heartbeat_that_fails_within_fails_alone(launch: Launch, monkeypatch: pytest.MonkeyPatch,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    site = launch()
    everyone = [(site.agent(), site.wire()) for _ in range(6)]
    heartbeat, broken = site.server.manager.heartbeat, everyone[2][0].agent.id

    def sometimes(agent_id: str, **told: Any) -> Any:
        if agent_id == broken:
            raise KeyError("secret")
        return heartbeat(agent_id, **told)
    monkeypatch.setattr(site.server.manager, "heartbeat", sometimes)
    with site.server.manager.store.transaction():
        for who, wire in everyone:
            wire.send(beat(who))
    answers = [wire.answer() for _, wire in everyone]
    assert [answer.status for answer in answers] == [200, 200, 500, 200, 200, 200]
    assert "secret" not in answers[2].error and "secret" in caplog.text
    caplog.clear()


# Connections


@everywhere
def test_connections_beyond_the_limit_are_refused_at_once_until_others_close(launch: Launch,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "SPARE_DESCRIPTORS", 20)
    monkeypatch.setattr(manager, "raise_descriptor_limit", lambda: 70)
    site = launch(connections_per_address=100)
    who = site.agent()
    inside = [site.wire() for _ in range(48)]  # and the listener, and what waitress has beside it
    assert {wire.call(beat(who)).status for wire in inside} == {200}
    for data in [beat(who), request("GET", "/health"), request("GET", STREAM, token=site.server.token)] * 5:
        late = site.wire()
        answer = late.call(data)
        assert answer.status == 503 and answer.headers["retry-after"] and answer.error and late.ended()
        late.close()
    crowd = [site.wire(context=None) for _ in range(40)]
    assert all(wire.ended() for wire in crowd[15:])
    assert {wire.call(beat(who)).status for wire in inside} == {200}
    for wire in [*crowd, *inside]:
        wire.close()

    def served() -> bool:
        try:
            return bool(site.get("/health"))
        except (AssertionError, OSError):
            return False
    until(served, "connections are still refused after the others have closed")


@everywhere
def test_connections_of_an_address_without_a_credential_are_limited_others_not(launch: Launch) -> None:
    site = launch(connections_per_address=3)
    who, health = site.agent(), request("GET", "/health")
    inside = [site.wire() for _ in range(3)]
    assert {wire.call(health).status for wire in inside} == {200}
    late = site.wire()
    answer = late.call(health)
    assert answer.status == 503 and answer.headers["retry-after"] and answer.error and late.ended()
    elsewhere = socket.create_connection(("127.0.0.1", site.port), LIMIT_S, ("127.0.0.2", 0))
    if site.context:
        elsewhere = site.context.wrap_socket(elsewhere, server_hostname="localhost")
    with contextlib.closing(elsewhere):
        elsewhere.sendall(health)
        assert elsewhere.recv(12) == b"HTTP/1.1 200"
    big = beat(who, b'{"cpu": 5}'.ljust(9000))  # too long for the loop
    listing = request("GET", "/api/agents", token=site.server.token)
    for wire, data in zip(inside, (beat(who), big, listing), strict=True):
        assert wire.call(data).status == 200
    until(lambda: site.wire().call(health).status == 200, "connections of agents still count")
    crowd = [site.wire() for _ in range(50)]
    assert {wire.call(beat(who)).status for wire in inside} == {200}
    for wire in [*crowd, late]:
        wire.close()
    until(lambda: site.wire().call(health).status == 200, "connections that are closed still count")


def test_connections_beyond_the_share_of_an_address_are_counted_and_logged_once_a_minute(
        launch: Launch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    site = launch(connections_per_address=1)
    inside = site.wire()
    assert inside.call(request("GET", "/health")).status == 200
    for _ in range(3):
        assert site.wire().call(request("GET", "/health")).status == 503
    text = inside.call(request("GET", "/metrics", token=site.server.token)).body.decode()
    assert 'panguard_refusals_total{reason="connections"} 3\n' in text
    (line,) = (each.getMessage() for each in caplog.records if "connections" in each.getMessage())
    assert "127.0.0.1" in line and "MANAGER_CONNECTIONS_PER_ADDRESS" in line


def test_connections_of_a_trusted_proxy_are_not_limited(launch: Launch) -> None:
    site = launch(connections_per_address=1, trusted_proxy="127.0.0.1")
    assert {wire.call(request("GET", "/health")).status for wire in [site.wire() for _ in range(5)]} == {200}


@everywhere
@pytest.mark.parametrize("step_s", [-1000, 1000])
def test_idle_unauthenticated_connections_are_closed_early_and_agents_stay_whatever_the_system_clock_says(
        step_s: int, launch: Launch, hurry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "IDLE_S", LIMIT_S)
    site = launch()
    who, other, wall_s = site.agent(), site.wire(), time.time
    agents = [site.wire() for _ in range(2)]
    assert agents[0].call(beat(who)).status == 200
    assert agents[1].call(request("GET", "/api/agents", token=site.server.token)).status == 200
    assert other.call(request("GET", "/health")).status == 200
    monkeypatch.setattr(time, "time", lambda: wall_s() + step_s)
    assert other.ended()
    assert {wire.call(beat(who)).status for wire in agents} == {200}


@everywhere
def test_blank_lines_earn_no_time(launch: Launch, hurry: None) -> None:
    site = launch()
    wire, end_s = site.wire(), time.monotonic() + LIMIT_S
    assert wire.call(b"\r\n\r\n" + request("GET", "/health")).status == 200
    with contextlib.suppress(OSError):
        while not select.select([wire.sock], [], [], 0.02)[0]:
            wire.send(b"\r\n" * 2000)
            assert time.monotonic() < end_s, "blank lines keep a connection open"
    assert wire.ended()


@everywhere
def test_a_body_is_not_received_before_its_credential(launch: Launch) -> None:
    site = launch()
    path, length = "/api/agents/register", f"Content-Length: {MIB}"
    for lines in ((length,), ("Transfer-Encoding: chunked",), (length, "Expect: 100-continue"),
                  ("Content-Length: 1",)):
        for token, how in (("", path), ("wrong", path), ("", "/nowhere"), ("wrong", "/api/policy")):
            wire = site.wire()
            answer = wire.call(request("POST", how, b"", *lines, token=token))
            assert answer.status == (404 if how == "/nowhere" else 401) and answer.error and wire.ended()
    wire = site.wire()
    assert wire.call(request("GET", "/health", b"{}")).status == 200
    body = json.dumps(AGENT).encode().ljust(100_000)
    data = request("POST", path, body, "Expect: 100-continue", token=site.server.token)
    wire.send(data[:-len(body)])
    assert wire.file.readline() + wire.file.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert wire.call(body).status == 201


def test_open_enrolment_takes_a_large_registration_without_a_token(launch: Launch) -> None:
    site = launch(open_enrollment=True)
    data = request("POST", "/api/agents/register", json.dumps(AGENT).encode().ljust(100_000),
                   "Content-Type: application/json")
    wire = site.wire()
    wire.send(data[:50_000])
    assert wire.call(data[50_000:]).status == 201
    assert site.wire().call(request("POST", "/api/policy", b"", f"Content-Length: {MIB}")).status == 401


@everywhere
def test_bodies_being_received_are_bounded_together(launch: Launch) -> None:
    site = launch(max_buffered_bytes=2 * MIB)
    data = request("POST", "/api/agents/register", json.dumps(AGENT).encode().ljust(MIB),
                   token=site.server.token)
    for leave in (False, True):
        wires = [site.wire() for _ in range(3)]
        for wire in wires:
            assert wire.call(request("GET", "/health")).status == 200  # what TLS sends first has been read
        for wire in wires:
            wire.send(data[:-1])
        answered = select.select([wire.sock for wire in wires], [], [], LIMIT_S)[0]
        (refused,) = (wire for wire in wires if wire.sock in answered)
        answer = refused.answer()
        assert answer.status == 503 and answer.headers["retry-after"] and answer.error and refused.ended()
        for wire in wires:
            if wire is not refused and leave:
                wire.reset()
            elif wire is not refused:
                assert wire.call(data[-1:]).status == 201
    until(lambda: {site.wire().call(data).status for _ in range(2)} == {201}, "given up bodies count")


def test_one_agents_unfinished_bodies_leave_room_for_those_of_others(launch: Launch) -> None:
    site = launch(max_buffered_bytes=8 * MIB)
    who, victim = site.agent(), site.agent()
    path = f"/api/agents/{who.agent.id}/events"
    data = request("POST", path, json.dumps({"events": [THREAT]}).encode().ljust(MIB), token=who.token)
    held = [site.wire() for _ in range(12)]
    for wire in held:
        wire.send(data[:-1])
    until(lambda: len(select.select([wire.sock for wire in held], [], [], 0.01)[0]) >= 10, "beyond its share")
    report_path = f"/api/agents/{victim.agent.id}/events"
    large = request("POST", report_path, json.dumps({"events": [THREAT]}).encode().ljust(MIB),
                    token=victim.token)
    assert site.wire().call(large).status == 201


def test_calls_that_ask_for_calls_do_not_keep_the_loop_from_its_sockets() -> None:
    sockets, made = manager.SocketMap(), [0]

    def again() -> None:
        made[0] += 1
        assert made[0] < 1000, "the loop never looks at its sockets"
        sockets.call_soon(again)
    sockets.call_soon(again)
    for turns in range(1, 4):
        sockets.run_once(60.0)
        assert made == [turns]
    sockets.close()


def test_an_agents_token_takes_no_more_connections_than_an_address_may_have(launch: Launch) -> None:
    site = launch(connections_per_address=5)
    who, other = site.agent(), site.agent()
    wires = []
    for number in range(8):
        wires.append(site.wire())
        assert wires[-1].call(beat(who)).status == 200, number
    assert [wire.call(beat(who)).status for wire in wires] == [200] * 5 + [503] * 3
    assert b'panguard_refusals_total{reason="connections"} 3\n' in site.get("/metrics")
    assert site.wire().call(beat(other)).status == 200
    for wire in wires[3:]:
        wire.reset()

    def has_room() -> bool:
        fresh = site.wire()
        found = [fresh.call(beat(who)).status for _ in range(2)] == [200, 200]
        fresh.reset()
        return found
    until(has_room, "connections that are closed still count")


def test_an_id_that_is_no_address_is_refused_as_others(api: Client, caplog: pytest.LogCaptureFixture) -> None:
    for odd in ("a:b", "::", "1:2:3", "%25a:b"):
        api.refusal("GET", f"/api/agents/{odd}", token=None, status=401)
        api.refusal("GET", f"/api/agents/{odd}", status=404)
    assert not faults(caplog)


@everywhere
def test_silent_slow_and_idle_clients_are_closed_while_heartbeats_go_on(launch: Launch, hurry: None) -> None:
    site = launch()
    who, began_s = site.agent(), time.monotonic()
    live, idle, half, half_body, *dripping = (site.wire() for _ in range(24))
    victims = [site.wire(context=None), idle, half, half_body, *dripping]
    for wire in (live, *victims[1:]):
        assert wire.call(request("GET", "/health")).status == 200
    half.send(beat(who)[:40])
    half_body.send(beat(who)[:-1])
    for wire in dripping[:5]:
        wire.send(beat(who, b"x" * 3000)[:-3000])
    if site.context:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            site.context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
        hello = outgoing.read()
        for start in (hello[:1], hello[:50], hello, hello[:-1] + b"\0", b"\x16" + os.urandom(200),
                      b"\0" * 1000):
            victims.append(site.wire(context=None))
            victims[-1].send(start)
    left, drops = {wire.sock: wire for wire in victims}, iter(beat(who, b"x" * 10_000))
    while left:
        assert live.call(beat(who)).status == 200
        for sock in select.select(list(left), [], [], 0.01)[0]:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                if sock.recv(65536):  # a server's hello, an alert
                    continue
            wire = left.pop(sock)
            assert wire not in victims[:24] or time.monotonic() - began_s > 0.4
        drop = bytes([next(drops)])
        for wire in dripping:
            with contextlib.suppress(OSError):
                wire.send(drop)
        assert time.monotonic() - began_s < LIMIT_S
    assert live.call(beat(who)).status == 200


@everywhere
def test_a_slow_reader_who_has_begun_its_next_request_gets_all_of_this_answer(
        launch: Launch, hurry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "IDLE_S", LIMIT_S)
    site = launch()
    with site.server.manager.store.transaction():
        for _ in range(400):
            site.agent(tags=LONG_TAGS)
    wire, data = site.wire(buffer=8192), request("GET", "/nowhere")
    wire.send(request("GET", "/api/agents", token=site.server.token) + data[:20])
    answer, left, began_s = wire.answer(head=True), 0, time.monotonic()
    left = int(answer.headers["content-length"])
    while time.monotonic() - began_s < 2 * manager.REQUEST_S:  # longer than a request may take
        left -= len(wire.file.read(4096))
        select.select([], [], [], 0.02)
    assert left > 5_000_000, "the answer fits into the buffers of the system"
    monkeypatch.setattr(manager, "REQUEST_S", LIMIT_S)  # from here on, only the test's own speed counts
    while left:
        left -= len(wire.file.read(min(left, 200_000)) or pytest.fail("the answer was cut off"))
    wire.send(data[20:])
    assert wire.answer().status == 404


@everywhere
def test_a_slow_but_honest_upload_and_a_request_that_takes_long_are_served(
        launch: Launch, hurry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "SLOWEST_UPLOAD_BYTES_PER_S", 200_000)
    site = launch()
    long, wire = site.wire(), site.wire()
    for each in (long, wire):
        assert each.call(request("GET", "/health")).status == 200
    long.send(site.hold(monkeypatch))
    data = request("POST", "/api/agents/register", json.dumps(AGENT).encode().ljust(MIB),
                   token=site.server.token)
    for start in range(0, len(data), 80_000):
        wire.send(data[start:start + 80_000])
        assert start > 10**6 or not select.select([wire.sock, long.sock], [], [], 0.05)[0]
    assert wire.answer().status == 201
    site.gate.set()
    assert long.answer().status == 200


@everywhere
def test_a_body_over_a_mebibyte_receives_413_while_it_is_being_sent(launch: Launch, tmp_path: Path) -> None:
    site = launch()
    path, chunk = "/api/agents/register", b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    for data in (request("POST", path, b"x" * (MIB + 1)), request("POST", path, b"x" * 3 * MIB),
                 beat(site.agent(), b"x" * 3 * MIB), request("POST", STREAM, b"x" * 3 * MIB),
                 request("POST", path, b"", "Transfer-Encoding: chunked",
                         token=site.server.token) + chunk * 48):
        wire = site.wire()
        answer = wire.call(data)
        assert answer.status == 413 and answer.error and wire.ended()
    (tmp_path / "upload").write_bytes(b"x" * 3 * MIB)
    trust = ["--cacert", str(site.server.certificate[0])] if site.server.certificate else []
    for extra in ([], ["-H", "Expect:"], ["-0"]):
        done = subprocess.run(["curl", "-sS", "--max-time", "10", *trust, *extra, "-X", "POST",
                               "--data-binary", f"@{tmp_path}/upload", "-w", " %{http_code}",
                               site.server.url + path],
                              capture_output=True, text=True)
        assert done.stdout.endswith(" 413") and json.loads(done.stdout[:-4])["ok"] is False, (extra, done)


def open_sockets() -> int:
    def is_socket(file: Path) -> bool:
        with suppress(OSError):  # closed meanwhile, by another thread
            return os.readlink(file).startswith("socket:")
        return False
    return sum(map(is_socket, Path("/proc/self/fd").iterdir()))


@everywhere
def test_clients_that_leave_at_any_point_leave_nothing(launch: Launch) -> None:
    site = launch()
    who = site.agent(tags=LONG_TAGS)
    for number in range(40):
        site.server.manager.retag(who.agent.id, tags=[*LONG_TAGS[1:], str(number)])
    token = site.server.token
    site.get("/api/agents")
    sockets = open_sockets()
    for data in (request("GET", "/api/events?limit=200", token=token), beat(who),
                 beat(who) * 3 + b"rubbish\r\n\r\n",
                 request("POST", "/api/agents/register", b"{}" * 9000, token=token),
                 request("GET", STREAM, b"", "Last-Event-ID: 1", token=token),
                 request("HEAD", STREAM, token=token)):
        for length in (0, 1, 30, len(data) - 1, len(data)):
            for leave in (Wire.close, Wire.reset):
                wire = site.wire()
                wire.send(data[:length])
                leave(wire)
    until(lambda: open_sockets() <= sockets, "connections of clients that left stay open")
    until(lambda: site.open_streams() == 0, "streams of clients that left are still counted")


@everywhere
def test_ten_megabytes_reach_a_slow_reader_whole_and_nobody_waits(launch: Launch) -> None:
    site = launch(threads=1)
    who = site.agent()
    with site.server.manager.store.transaction():
        for number in range(650):
            site.agent(hostname=f"web-{number}", tags=LONG_TAGS)
    slow, other = site.wire(buffer=8192), site.wire()
    slow.send(request("GET", "/api/agents", token=site.server.token))
    answer = slow.answer(head=True)
    body = b""
    while len(body) < int(answer.headers["content-length"]):
        body += slow.file.read(min(10**6, int(answer.headers["content-length"]) - len(body)))
        assert other.call(beat(who)).status == other.call(request("GET", "/health")).status == 200
    assert len(body) > 10**7
    assert [each["hostname"] for each in json.loads(body)["data"][1:]] == [
        f"web-{number}" for number in range(650)]


# TLS


@contextlib.contextmanager
def command(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str], Path]]:
    """`python manager.py` while it runs, the lines it greeted with, and its log."""
    log = folder / "log"
    with log.open("w") as errors, subprocess.Popen(
            [sys.executable, manager.__file__, "--port", "0", "--data-dir", str(folder / "data"), *arguments],
            stdout=subprocess.PIPE, stderr=errors, text=True,
            env={name: value for name, value in os.environ.items()
                 if not name.startswith("MANAGER_")}) as process:
        try:
            greeting = []
            while not greeting or not greeting[-1].startswith("Try: "):
                line = process.stdout.readline()
                assert line, log.read_text()
                greeting.append(line.rstrip())
            yield process, greeting, log
        finally:
            process.terminate()
            process.wait(LIMIT_S)
        assert process.returncode == 0, log.read_text()


def test_the_first_start_makes_a_pair_and_greets_with_a_line_that_works(tmp_path: Path) -> None:
    with command(tmp_path) as (_, greeting, _):
        text = "\n".join(greeting)
        certificate, key = tmp_path / "data/cert.pem", tmp_path / "data/key.pem"
        assert key.stat().st_mode & 0o777 == 0o600
        shown = subprocess.run(["openssl", "x509", "-in", certificate, "-noout", "-fingerprint", "-sha256"],
                               capture_output=True, text=True, check=True).stdout.strip().partition("=")[2]
        assert f"Certificate: {certificate} (SHA-256 {shown})" in greeting
        assert re.search(r"listens on https://localhost:\d+$", text, re.M)
        line = greeting[-1].removeprefix("Try: ")
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert json.loads(done.stdout) == {"ok": True, "data": []}, done
        assert "--cacert" in line and subprocess.run(
            ["bash", "-c", line.replace("--cacert", "--proto =https #")], capture_output=True).returncode
        was = certificate.read_bytes(), key.read_bytes()
    with command(tmp_path):
        assert (certificate.read_bytes(), key.read_bytes()) == was


def test_sighup_takes_a_renewed_pair_and_keeps_it_when_the_next_is_broken(tmp_path: Path) -> None:
    given, health = make_pair(tmp_path), request("GET", "/health")
    with command(tmp_path, "--tls-cert", str(given["tls_cert"]), "--tls-key", str(given["tls_key"])) as (
            process, greeting, log), contextlib.ExitStack() as wires:
        def connect(trust: ssl.SSLContext) -> Wire:
            return wires.enter_context(contextlib.closing(Wire(int(greeting[0].rpartition(":")[2]), trust)))

        def reload(then: str, count: int) -> None:
            process.send_signal(signal.SIGHUP)
            until(lambda: log.read_text().count(then) == count, f"not {then!r} {count} times")
        first = trusting(given["tls_cert"])
        old = connect(first)
        make_pair(tmp_path)
        reload("the certificate was read again", 1)
        second = trusting(given["tls_cert"])
        with pytest.raises(ssl.SSLCertVerificationError):
            connect(first)
        given["tls_key"].write_bytes(make_pair(tmp_path, "other")["tls_key"].read_bytes())  # another's key
        reload("the former one stays in use", 1)
        given["tls_cert"].unlink()
        reload("the former one stays in use", 2)
        assert old.call(health).status == connect(second).call(health).status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken(launch: Launch, pair: dict[str, Path], version: ssl.TLSVersion) -> None:
    site = launch(**pair, tls="auto")
    wire = site.wire(context=trusting(pair["tls_cert"], version))
    assert wire.sock.version() == version.name.replace("_", ".")
    assert wire.call(beat(site.agent())).status == 200


def test_tls_1_1_is_refused(launch: Launch, pair: dict[str, Path]) -> None:
    site = launch(**pair, tls="auto")
    done = subprocess.run(["openssl", "s_client", "-connect", f"127.0.0.1:{site.port}", "-tls1_1", "-cipher",
                           "ALL:@SECLEVEL=0"], input="", capture_output=True, text=True)
    assert done.returncode and "alert protocol version" in done.stderr


def test_failed_handshakes_are_counted_and_logged(launch: Launch, pair: dict[str, Path],
                                                  caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    site = launch(**pair, tls="auto")
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", site.port), timeout=LIMIT_S) as wire:
            wire.sendall(b"\x16garbage that is no handshake\r\n\r\n")
            with suppress(ConnectionResetError):
                while wire.recv(1000):
                    pass
    metrics = urllib.request.Request(f"http://127.0.0.1:{site.port}/metrics",
                                     headers={"Authorization": f"Bearer {site.server.token}"})
    with urllib.request.urlopen(metrics, timeout=LIMIT_S) as answer:
        assert 'panguard_refusals_total{reason="handshake"} 3\n' in answer.read().decode()
    (line,) = (each.getMessage() for each in caplog.records if "handshake" in each.getMessage())
    assert "127.0.0.1" in line


def test_plaintext_is_for_loopback_in_auto_never_in_require(launch: Launch, pair: dict[str, Path]) -> None:
    site = launch(**pair, tls="auto")
    assert site.wire(context=None).call(beat(site.agent())).status == 200
    site = launch(**pair, tls="require")
    who = site.agent()
    for data in (beat(who), request("GET", "/health"), request("GET", STREAM, token=site.server.token),
                 b"x\r\n\r\n"):
        wire = site.wire(context=None)
        answer = wire.call(data)
        assert (answer.status, answer.headers["upgrade"]) == (426, "TLS/1.2, HTTP/1.1")
        assert "https://" in answer.error and wire.ended()
    assert site.server.manager.heartbeats == 0
    assert site.wire().call(beat(who)).status == 200


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, str, list[str]]]:
    """An address of this host, one of another host, and the words that run a command there."""
    name, low = f"pg{os.getpid()}", os.getpid() % 60 * 4
    net = f"198.18.{os.getpid() // 60 % 250}"
    ours, theirs = f"{net}.{low + 1}", f"{net}.{low + 2}"

    def ip(words: str) -> bool:
        return subprocess.run(["ip", *words.split()], capture_output=True).returncode == 0
    try:
        if not shutil.which("ip") or not all(map(ip, (
                f"netns add {name}", f"link add {name}a type veth peer name {name}b netns {name}",
                f"address add {ours}/30 dev {name}a", f"link set {name}a up",
                f"-n {name} address add {theirs}/30 dev {name}b", f"-n {name} link set {name}b up"))):
            pytest.skip("no network namespace can be made here: that takes iproute2 and root")
        yield ours, theirs, ["ip", "netns", "exec", name]
    finally:
        ip(f"link del {name}a")
        ip(f"netns del {name}")


def test_plaintext_from_another_host_is_told_to_upgrade_unless_it_is_the_proxy(
        launch: Launch, elsewhere: tuple[str, str, list[str]], tmp_path: Path) -> None:
    ours, theirs, there = elsewhere

    def curl(site: Site, scheme: str, *extra: str) -> tuple[int, Any]:
        done = subprocess.run([*there, "curl", "-sSk", "--max-time", "10", "-w", " %{http_code}", *extra,
                               f"{scheme}://{ours}:{site.port}/health"], capture_output=True, text=True)
        assert done.returncode == 0, done
        return int(done.stdout[-3:]), json.loads(done.stdout[:-4])

    site = launch(host="0.0.0.0", data_dir=tmp_path / "1", tls="auto")
    status, body = curl(site, "http")
    assert status == 426 and body["ok"] is False and "https://" in body["error"]
    assert curl(site, "https")[0] == 200
    assert site.wire(context=None).call(request("GET", "/health")).status == 200  # while loopback may
    site = launch(host="0.0.0.0", data_dir=tmp_path / "2", tls="auto", trusted_proxy=theirs)
    assert curl(site, "http", "-H", "X-Forwarded-For: 203.0.113.1")[0] == 200
    site = launch(host="0.0.0.0", data_dir=tmp_path / "3", tls="require", trusted_proxy=theirs)
    assert curl(site, "http")[0] == 426
    site = launch(host="0.0.0.0", data_dir=tmp_path / "4", tls="off")
    assert curl(site, "http")[0] == 200


def test_hsts_is_said_over_tls_with_a_given_certificate_only(launch: Launch, pair: dict[str, Path],
                                                             tmp_path: Path) -> None:
    given, own = launch(**pair, tls="auto", trusted_proxy="127.0.0.1"), launch(data_dir=tmp_path, tls="auto")
    who, header = given.agent(), "strict-transport-security"
    for data in (request("GET", "/health"), beat(who), request("GET", "/nowhere")):
        assert given.wire().call(data).headers[header].startswith("max-age=")
        assert header not in given.wire(context=None).call(data).headers
        assert header not in own.wire().call(data).headers
    proxied = request("GET", "/health", b"", "X-Forwarded-Proto: https")
    assert header in given.wire(context=None).call(proxied).headers
    assert header not in own.wire(context=None).call(proxied).headers


def test_a_pair_that_cannot_be_used_is_said_in_a_sentence(tmp_path: Path, pair: dict[str, Path]) -> None:
    garbage, data = tmp_path / "garbage.pem", tmp_path / "data"
    garbage.write_bytes(os.urandom(100))
    locked = tmp_path / "locked.key"
    subprocess.run(["openssl", "ec", "-in", pair["tls_key"], "-aes128", "-passout", "pass:secret",
                    "-out", locked],
                   check=True, capture_output=True)
    other = make_pair(tmp_path)["tls_key"]
    for wrong in ({"tls_cert": garbage}, {"tls_key": garbage}, {"tls_key": other}, {"tls_key": locked},
                  {"tls_cert": tmp_path / "none"}, {"tls_key": tmp_path / "none"}, {"tls_key": tmp_path}):
        with pytest.raises(StartError, match=f"{next(iter(wrong.values()))}.*cannot be used") as refused:
            Server(port=0, data_dir=data, **{**pair, **wrong}).start()
        assert "\n" not in str(refused.value)
    done = subprocess.run([sys.executable, manager.__file__, "--port", "0", "--data-dir", data, "--tls-cert",
                           garbage, "--tls-key", garbage], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")
    with Server(port=0, data_dir=data, **pair) as server:  # and nothing is left of those starts
        assert server.url.startswith("https://")


def test_a_key_that_others_can_read_is_warned_about(tmp_path: Path) -> None:
    given = make_pair(tmp_path)
    for mode, count in ((0o600, 0), (0o640, 1), (0o604, 1)):
        given["tls_key"].chmod(mode)
        with Server(port=0, **given) as server:
            assert len([note for note in server.notes if str(given["tls_key"]) in note]) == count


@pytest.mark.parametrize("settings", [{}, {"host": "localhost"}], ids=["127.0.0.1", "localhost"])
def test_without_openssl_auto_speaks_plaintext_to_loopback_with_a_warning(
        settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        pair: dict[str, Path]) -> None:
    monkeypatch.setenv("PATH", "")
    with Server(port=0, data_dir=tmp_path, **settings) as server:
        assert server.url.startswith("http://") and server.certificate is None
        assert any("openssl command is missing" in note and "plaintext" in note for note in server.notes)
        assert ask(port_of(server.url), "GET", "/health")[0] == 200
    with Server(port=0, data_dir=tmp_path, **pair) as server:  # which needs none
        assert server.url.startswith("https://")


@pytest.mark.parametrize("settings", [{"tls": "require"}, {"host": "0.0.0.0"}, {"host": "::"},
                                      {"host": "0.0.0.0", "trusted_proxy": "192.0.2.0/24"}], ids=str)
def test_without_a_certificate_nothing_is_served_beyond_loopback(
        settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_main: Any) -> None:
    monkeypatch.setenv("PATH", "")
    for folder in ({"data_dir": tmp_path}, {}):
        with pytest.raises(StartError, match=r"openssl command is missing.*--tls off") as refused:
            Server(port=0, **folder, **settings).start()
        assert "\n" not in str(refused.value)
    with Server(port=0, data_dir=tmp_path, **{**settings, "host": "0.0.0.0", "tls": "off"}) as server:
        assert server.url.startswith("http://")


def shown_certificate(path: Path) -> str:
    """What openssl says of a certificate."""
    return subprocess.run(["openssl", "x509", "-in", path, "-noout", "-text"], capture_output=True, text=True,
                          check=True).stdout


def alternative_names(path: Path) -> set[str]:
    return set(re.findall(r"(?:DNS|IP Address):([^,\s]+)", shown_certificate(path)))


def test_the_certificate_made_is_a_servers_for_a_year_and_names_this_machine(tmp_path: Path) -> None:
    with Server(port=0, data_dir=tmp_path, host="127.0.0.2", tls="auto", tls_name="fleet.example,192.0.2.77"):
        text, names = shown_certificate(tmp_path / "cert.pem"), alternative_names(tmp_path / "cert.pem")
    assert "CA:FALSE" in text and "CA:TRUE" not in text and "TLS Web Server Authentication" in text
    starts, ends = (ssl.cert_time_to_seconds(each) for each in re.findall(r"Not \w+ ?: (.+ GMT)", text))
    assert ends - starts == 365 * 86_400
    assert names >= {"localhost", "127.0.0.1", "127.0.0.2", "0:0:0:0:0:0:0:1", "fleet.example", "192.0.2.77"}
    assert (socket.gethostname() in names) is bool(re.fullmatch(r"[\w.-]+", socket.gethostname()))
    if shutil.which("ip"):
        done = subprocess.run(["ip", "-o", "-4", "address"], capture_output=True, text=True)
        assert names >= set(re.findall(r"inet ([\d.]+)", done.stdout))


@pytest.mark.parametrize("name", [
    "a,DNS:evil.example", "a b", "x" * 300, "a\nbasicConstraints=CA:TRUE", "", "é.example"])
def test_a_host_name_that_is_none_stays_out_of_the_certificate(name: str, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: name)
    monkeypatch.setattr(socket, "getfqdn", lambda: name + ".example")
    with Server(port=0, data_dir=tmp_path, host="0.0.0.0", tls="auto") as server:
        assert server.url.startswith("https://")
    assert "localhost" in alternative_names(tmp_path / "cert.pem")
    text = shown_certificate(tmp_path / "cert.pem")
    assert "evil" not in text and "CA:TRUE" not in text and "é" not in text


def test_the_certificate_is_made_anew_when_its_names_no_longer_fit(tmp_path: Path) -> None:
    certificate = tmp_path / "cert.pem"

    def start(**settings: Any) -> tuple[bytes, list[str]]:
        with Server(port=0, data_dir=tmp_path, tls="auto", **settings) as server:
            return certificate.read_bytes(), [note for note in server.notes if "certificate" in note]
    first, notes = start()
    assert not notes and start() == (first, []) == start(host="localhost")
    second, notes = start(tls_name="fleet.example")
    assert second != first and "did not name fleet.example" in notes[0]
    assert start(tls_name="fleet.example") == (second, []) == start()
    third, notes = start(host="127.0.0.3")
    assert third != second and "127.0.0.3" in alternative_names(certificate)


def test_the_certificate_is_renewed_while_running_thirty_days_before_it_ends(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate, clock = tmp_path / "cert.pem", ManualClock(time.time())
    with Server(port=0, data_dir=tmp_path, tls="auto", clock=clock) as server:
        first = certificate.read_bytes()
        clock.advance(334 * 86_400)
        assert certificate.read_bytes() == first
        clock.advance(86_400)
        second = certificate.read_bytes()
        assert second != first and "was renewed" in caplog.text
        with contextlib.closing(Wire(port_of(server.url), trusting(certificate))) as wire:
            assert wire.call(request("GET", "/health")).status == 200
        clock.advance(86_400)
        assert certificate.read_bytes() == second


@pytest.mark.parametrize(("tls", "valid_s"), [("off", None), ("auto", 365 * 86_400)])
def test_metrics_say_when_the_certificate_in_use_ends_and_how_much_of_the_disk_is_free(
        tls: str, valid_s: int | None, tmp_path: Path) -> None:
    began_s = time.time()
    with Server(port=0, data_dir=tmp_path, tls=tls, clock=ManualClock(began_s)) as server:
        text = scraped(server)
    found = {name: float(value) for name, value in re.findall(r"^panguard_(\w+) (\S+)$", text, re.M)}
    end_s = 0 if valid_s is None else began_s + valid_s
    assert abs(found["certificate_end_timestamp_seconds"] - end_s) < 3600
    assert found["disk_free_bytes"] > 0


def test_a_certificate_made_while_the_clock_was_ahead_is_replaced_once_it_is_set_back(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
        shell: Any) -> None:
    certificate, wall_s, clock = tmp_path / "cert.pem", time.time, ManualClock(time.time())
    with Server(port=0, data_dir=tmp_path, tls="auto", clock=clock) as server:
        first = certificate.read_bytes()
        monkeypatch.setattr(time, "time", lambda: wall_s() - 10)
        clock.advance(1)
        assert certificate.read_bytes() == first, "clocks are often corrected by some seconds"
        monkeypatch.setattr(time, "time", lambda: wall_s() - 30 * 86_400)
        clock.advance(1)
        assert certificate.read_bytes() != first and "was renewed" in caplog.text
        monkeypatch.setattr(time, "time", wall_s)
        signed_between(tmp_path, "20900101000000Z", "20910101000000Z")
        server.reload_certificate()
        status, _, error = shell("status", "--data-dir", tmp_path)
        assert status == 1 and "clock" in error and "--cacert" not in error
    with Server(port=0, data_dir=tmp_path, tls="auto") as server:
        assert any("was not valid yet" in note for note in server.notes)


def test_a_renewal_that_fails_keeps_the_certificate_and_is_tried_again_an_hour_later(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, clock = tmp_path / "cert.pem", ManualClock(time.time())
    with Server(port=0, data_dir=tmp_path, tls="auto", clock=clock), monkeypatch.context() as without:
        first = certificate.read_bytes()
        without.setenv("PATH", "")
        for advance_s, count in ((340 * 86_400, 1), (60, 1), (3600, 2)):
            clock.advance(advance_s)
            assert caplog.text.count("must be renewed, which failed: the openssl command is missing") == count
        without.undo()
        assert certificate.read_bytes() == first
        clock.advance(3600)
        assert certificate.read_bytes() != first


@pytest.mark.parametrize("broken", ["cert.pem empty", "key.pem empty", "cert.pem gone", "key.pem gone",
                                    "key.pem other", "ended in 1971", "starts later"])
def test_a_generated_pair_that_cannot_serve_is_made_anew(broken: str, tmp_path: Path) -> None:
    with Server(port=0, data_dir=tmp_path, tls="auto"):
        first = (tmp_path / "cert.pem").read_bytes()
    name, how = broken.split(" ", 1)
    if how == "empty":
        (tmp_path / name).write_bytes(b"")
    elif how == "gone":
        (tmp_path / name).unlink()
    elif how == "other":
        (tmp_path / name).write_bytes(make_pair(tmp_path, "other")["tls_key"].read_bytes())
    else:
        year = {"in 1971": 1970, "later": 2090}[how]
        signed_between(tmp_path, f"{year}0101000000Z", f"{year + 1}0101000000Z")
    before = {f"{name}.former": text for name, text in contents(tmp_path).items()
              if name in ("cert.pem", "key.pem")}
    with Server(port=0, data_dir=tmp_path, tls="auto") as server:
        assert (tmp_path / "cert.pem").read_bytes() != first
        (note,) = (note for note in server.notes if note.startswith("Warning: the former certificate"))
        assert "cert.pem.former" in note
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.former")} == before
        with contextlib.closing(Wire(port_of(server.url), trusting(tmp_path / "cert.pem"))) as wire:
            assert wire.call(request("GET", "/health")).status == 200


def test_a_start_without_its_backup_folder_replaces_no_certificate(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with Server(port=0, data_dir=folder):
        former = (folder / "cert.pem").read_bytes()
    with pytest.raises(StartError, match="MANAGER_BACKUP_DIR"):
        Server(port=0, data_dir=folder, tls_name="new.example.org", backup_dir=tmp_path / "missing").start()
    assert (folder / "cert.pem").read_bytes() == former


@pytest.mark.parametrize("wrong", [{"host": "192.0.2.200"}, {"tls_name": "typo.example.org"}])
def test_a_start_that_cannot_listen_replaces_no_certificate(wrong: Any, tmp_path: Path) -> None:
    with Server(port=0, data_dir=tmp_path, tls="auto") as server:
        port = port_of(server.url)
    before = {name: text for name, text in contents(tmp_path).items() if name.endswith(".pem")}
    with socket.create_server(("127.0.0.1", port)), pytest.raises(StartError, match="cannot listen"):
        Server(**{"port": port, "data_dir": tmp_path, "tls": "auto", **wrong}).start()
    assert {name: text for name, text in contents(tmp_path).items() if ".pem" in name} == before


def signed_between(folder: Path, starts: str, ends: str) -> None:
    """Give the certificate in a folder other dates, with the same names and key."""
    ca = folder / "ca"
    ca.mkdir()
    (ca / "index.txt").touch()
    (ca / "serial").write_text("01")
    (ca / "cnf").write_text(f"[ca]\ndefault_ca = d\n[d]\nnew_certs_dir = {ca}\ndatabase = {ca}/index.txt\n"
                            f"serial = {ca}/serial\ndefault_md = sha256\npolicy = p\n[p]\nCN = supplied\n"
                            "[e]\nsubjectAltName = DNS:localhost,IP:127.0.0.1,IP:::1\n")
    for command in (f"req -new -key {folder}/key.pem -subj '/CN=Panguard Manager' -out {ca}/csr",
                    f"ca -batch -selfsign -config {ca}/cnf -extensions e -keyfile {folder}/key.pem "
                    f"-in {ca}/csr -startdate {starts} -enddate {ends} -notext -out {folder}/cert.pem"):
        subprocess.run(["openssl", *shlex.split(command)], check=True, capture_output=True)


def test_an_operators_certificate_in_the_data_folder_is_never_replaced(tmp_path: Path) -> None:
    given = make_pair(tmp_path)
    (tmp_path / "data").mkdir()
    for name, path in (("cert.pem", given["tls_cert"]), ("key.pem", given["tls_key"])):
        shutil.copy(path, tmp_path / "data" / name)
    with Server(port=0, data_dir=tmp_path / "data", tls="auto", tls_name="fleet.example") as server:
        assert (tmp_path / "data/cert.pem").read_bytes() == given["tls_cert"].read_bytes()
        assert not [note for note in server.notes if "Warning" in note]


def test_the_line_printed_for_other_hosts_works_there(elsewhere: tuple[str, str, list[str]],
                                                      tmp_path: Path) -> None:
    ours, _, there = elsewhere
    with command(tmp_path, "--host", "0.0.0.0") as (_, greeting, _):
        line = next((each for each in greeting if each.startswith("Other hosts reach it at https://")), "")
        port = greeting[0].rpartition(":")[2]
        assert not line or line.endswith(f":{port}")
        done = subprocess.run([*there, "curl", "-sS", "--cacert", tmp_path / "data/cert.pem",
                               f"https://{ours}:{port}/health"], capture_output=True, text=True)
        assert json.loads(done.stdout)["ok"] is True, done


def test_two_hundred_tls_clients_at_once_are_all_served(launch: Launch, pair: dict[str, Path]) -> None:
    site = launch(**pair, tls="require")
    who, start = site.agent(), threading.Barrier(200)

    def work(_: int) -> tuple[int, int]:
        start.wait(LIMIT_S)
        wire = site.wire()
        return wire.call(beat(who)).status, wire.call(request("GET", "/health")).status
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        assert set(pool.map(work, range(200))) == {(200, 200)}


def test_an_embedded_server_speaks_plaintext_unless_it_is_told_otherwise(pair: dict[str, Path]) -> None:
    for options, scheme in (({}, "http"), ({"tls": "require"}, "https"), (pair, "https")):
        with Server(port=0, **options) as server:
            assert server.url.partition(":")[0] == scheme


# Start and stop


@everywhere
def test_a_stop_finishes_the_request_in_flight_and_takes_no_other(launch: Launch,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    site = launch()
    idle, wire, port = site.wire(), site.wire(), site.port
    wire.send(site.hold(monkeypatch))
    assert site.entered.acquire(timeout=LIMIT_S)
    stopping = threading.Thread(target=site.server.stop)
    stopping.start()

    def refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0
    until(refused, "the port still accepts")
    site.gate.set()
    answer = wire.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close") and json.loads(answer.body)["ok"]
    assert wire.ended() and idle.ended()
    stopping.join(LIMIT_S)
    assert not stopping.is_alive()


def test_a_stop_takes_under_five_seconds_however_stuck_its_clients_are(
        launch: Launch, pair: dict[str, Path], caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    assert manager.GRACE_S <= 4
    monkeypatch.setattr(manager, "GRACE_S", 0.3)
    site = launch(**pair, tls="auto")
    who = site.agent(tags=LONG_TAGS)
    for number in range(100):
        site.server.manager.retag(who.agent.id, tags=[str(number), *LONG_TAGS[1:]])
    stuck = site.wire()
    stuck.send(site.hold(monkeypatch))
    assert site.entered.acquire(timeout=LIMIT_S)
    site.wire(context=None)
    site.wire(context=None).send(b"\x16")
    for data in (beat(who)[:30], request("GET", "/api/events?limit=200", token=site.server.token),
                 request("GET", STREAM, b"", "Last-Event-ID: 0", token=site.server.token)):
        site.wire(buffer=4096).send(data)
    began_s = time.monotonic()
    site.server.stop()
    assert time.monotonic() - began_s < 10
    assert stuck.ended()
    before = threading.active_count()
    site.gate.set()
    until(lambda: threading.active_count() < before, "the worker that was stuck never ended")
    caplog.clear()


@everywhere
def test_what_the_loop_dies_of_is_raised_by_the_stop_and_not_again(launch: Launch,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    site = launch()
    wire = site.wire()
    assert wire.call(request("GET", "/health")).status == 200
    with monkeypatch.context() as broken:
        broken.setattr(manager.SocketMap, "run_once", lambda *_: 1 / 0)
        wire.send(b"x")
        assert wire.ended()
    with pytest.raises(ZeroDivisionError):
        site.server.stop()
    site.server.stop()
    site.server.start()
    assert site.get("/health")


def left_over() -> tuple[int, int]:
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_a_taken_port_is_said_in_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server, before = Server(port=port, data_dir=tmp_path), left_over()
        for _ in range(2):
            with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1 port {port}") as refused:
                server.start()
            assert "\n" not in str(refused.value)
        assert left_over() == before
    with server:
        assert server.url.endswith(f":{port}")


# A client whose connection is reset then loses a socket within ssl.wrap_socket(); ours are counted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@everywhere
def test_starts_and_stops_under_load_leave_no_thread_and_no_descriptor(launch: Launch) -> None:
    site = launch()
    who = site.agent()
    over, running, answered = threading.Event(), threading.Event(), threading.Semaphore(0)
    context = trusting(site.server.certificate[0]) if site.server.certificate else None

    def load(number: int) -> None:
        data = [beat(who), request("GET", "/health"), request("GET", STREAM, token=token)][number % 3]
        while not over.is_set():
            running.wait(LIMIT_S)
            with contextlib.suppress(OSError, AssertionError, ValueError), \
                    contextlib.closing(Wire(port, context)) as wire:
                while wire.call(data).status:
                    answered.release()
                    while number % 3 == 2 and wire.event():
                        pass
    site.server.stop()
    before, token, port = left_over(), site.server.token, 0
    threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        site.server.start()
        token, port = site.server.token, site.port
        running.set()
        for _ in range(10):
            assert answered.acquire(timeout=LIMIT_S)
        running.clear()
        site.server.stop()
    over.set()
    running.set()
    for thread in threads:
        thread.join(LIMIT_S)
    assert left_over() == before


def test_the_url_of_an_ipv6_address_has_brackets(launch: Launch, pair: dict[str, Path]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    site = launch(host="::1")
    assert re.fullmatch(r"http://\[::1\]:\d+", site.server.url)
    assert site.wire(address="::1").call(beat(site.agent())).status == 200
    site = launch(host="::1", tls="auto", **pair)  # loopback in IPv6 too
    assert site.wire(address="::1", context=None).call(request("GET", "/health")).status == 200


def test_another_loopback_address_is_printed_as_it_is_and_its_certificate_fits(tmp_path: Path) -> None:
    with command(tmp_path, "--host", "127.0.0.2") as (_, greeting, _):
        assert re.search(r"https://127\.0\.0\.2:\d+$", greeting[0])
        done = subprocess.run(["bash", "-c", greeting[-1].removeprefix("Try: ")],
                              capture_output=True, text=True)
        assert json.loads(done.stdout) == {"ok": True, "data": []}, done


def test_an_unknown_host_is_said_in_a_sentence(tmp_path: Path, run_main: Any) -> None:
    status, said = run_main("--host", "nosuchhost.invalid", "--port", "0", "--tls", "off",
                            "--data-dir", tmp_path)
    assert status == 1 and said.count("\n") == 1 and "cannot listen on nosuchhost.invalid" in said, said


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o707])
def test_a_data_folder_that_others_can_write_to_is_refused(mode: int, tmp_path: Path, run_main: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(mode)
    status, said = run_main("--port", "0", "--data-dir", folder)
    assert status == 1 and said.count("\n") == 1 and f"chmod go-w {folder}" in said, said
    assert not list(folder.iterdir())


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_files_are_made_with_their_modes_whatever_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with Server(port=0, data_dir=tmp_path / "data", tls="auto"):
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").iterdir()}
    finally:
        os.umask(before)
    assert set(modes) >= {"manager.db", "lock", "token", "cert.pem",
                          "key.pem"} and set(modes.values()) == {0o600}


def test_what_the_start_makes_is_synced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, set[str]]] = []
    folder = tmp_path / "new" / "data"

    def fsync(handle: int) -> None:
        at = os.fstat(handle)
        inside = {path.name for path in folder.iterdir()} if folder.exists() else set()
        synced.append((at.st_ino, inside))
    monkeypatch.setattr(os, "fsync", fsync)
    with Server(port=0, data_dir=folder, tls="auto"):
        inodes = {ino for ino, _ in synced}
        for path in (folder / "token", folder / "cert.pem", folder / "key.pem", folder,
                     folder.parent, tmp_path):
            assert path.stat().st_ino in inodes, path
        of_folder = [names for ino, names in synced if ino == folder.stat().st_ino]
        assert of_folder[-1] >= {"token", "cert.pem", "key.pem", "manager.db"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize(("name", "mode"), [
    ("manager.db", 0o600), ("manager.db", 0o644), ("lock", 0o600), ("lock", 0o644), ("token", 0o600),
    ("cert.pem", 0o600), ("key.pem", 0o600), (".", 0o755)])
def test_a_file_of_another_owner_is_said_in_a_sentence(name: str, mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with Server(port=0, data_dir=folder, tls="auto"):
        pass
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, 65534)
    os.chown(folder / name, 12345, 12345)
    (folder / name).chmod(mode)
    for path in tmp_path, tmp_path.parent, tmp_path.parent.parent:
        path.chmod(0o755)
    as_nobody = ("import _strptime, encodings.ascii, encodings.idna, importlib.metadata; "  # while root
                 "import os, sys, manager; "
                 "os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.exit(manager.main())")
    done = subprocess.run([sys.executable, "-c", as_nobody, "--port", "0", "--data-dir", folder], cwd=PROJECT,
                          capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and str(folder) in done.stderr, done


def test_localhost_is_served_on_both_of_its_addresses_by_one_port(launch: Launch) -> None:
    site = launch(host="localhost")
    for *_, address in socket.getaddrinfo("localhost", site.port, type=socket.SOCK_STREAM):
        assert site.wire(address=str(address[0])).call(request("GET", "/health")).status == 200


# Embedding: faults, waiting, the clock


def over_the_wire(server: Server, method: str, path: str, body: Any = None, *,
                  token: str | None = None) -> Any:
    """Over a real connection: the `data` of the answer. Raises HTTPError, or OSError when there is none."""
    request = urllib.request.Request(server.url + path, method=method,
                                     data=None if body is None else json.dumps(body).encode(),
                                     headers={"Content-Type": "application/json"} if body is not None else {})
    request.add_header("Authorization", f"Bearer {token or server.token}")
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        return json.load(answer)["data"]


def test_a_server_starts_and_stops_again_and_keeps_what_it_has_in_a_folder_of_its_own(tmp_path: Path) -> None:
    server = Server(port=0, data_dir=tmp_path, tls="off")
    server.start()
    agent = over_the_wire(server, "POST", "/api/agents/register", AGENT)
    server.stop()
    server.stop()
    with pytest.raises(OSError):
        over_the_wire(server, "GET", "/health")
    with server:
        assert over_the_wire(server, "GET", "/api/agents")[0]["id"] == agent["id"]


def test_several_servers_live_in_one_process() -> None:
    with Server(port=0) as one, Server(port=0) as other:
        over_the_wire(one, "POST", "/api/agents/register", AGENT)
        assert (len(one.manager.journal()), len(other.manager.journal())) == (1, 0)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            over_the_wire(other, "GET", "/api/agents", token=one.token)


def test_an_embedded_server_takes_the_settings_of_config_and_no_others(tmp_path: Path) -> None:
    with Server(port=0, auth_token="mine", heartbeat_timeout_ms=1000) as server:
        assert server.token == "mine" and server.config.heartbeat_timeout_ms == 1000
    with pytest.raises(TypeError, match="heartbeat_timeout_s"):
        Server(heartbeat_timeout_s=1)
    with pytest.raises(manager.SettingError, match="not both"):
        Server(Config(data_dir=tmp_path), port=0)


def test_wait_for_goes_on_from_the_entry_it_gave_last(server: Server) -> None:
    agents = [server.manager.register(f"h{number}", "linux", "1").agent.id for number in range(2)]
    assert [server.wait_for(type="agent_registered").agent_id for _ in range(2)] == agents
    with pytest.raises(TimeoutError):
        server.wait_for(type="agent_registered", timeout_s=0)
    assert server.wait_for(type="agent_registered", after=0).agent_id == agents[0]


@pytest.mark.parametrize("wrong", [
    {"type": "agent_registred"}, {"timeout_s": -1}, {"timeout_s": math.nan}, {"timeout_s": "1"},
    {"after": -1}, {"agent_id": 7}])
def test_a_wait_with_a_wrong_argument_is_refused_at_once(server: Server, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: must be "):
        server.wait_for(**wrong)
    if name != "type":
        with pytest.raises(ValueError, match=f"^{name}: must be "):
            server.wait_for_request(**wrong)


def test_a_wait_for_a_type_or_a_route_that_there_is_not_names_those_there_are(server: Server) -> None:
    with pytest.raises(ValueError, match="type: must be one of agent_registered, "):
        server.wait_for(type="agent_registred")
    with pytest.raises(ValueError, match=r"route: must be one of .*, POST /api/agents/register, "):
        server.wait_for_request(route="POST /api/agents")


def test_a_timeout_says_what_came_and_what_came_before_the_position(server: Server) -> None:
    fleet = server.manager
    one, other = (fleet.register(name, "linux", "1").agent.id for name in ("one", "other"))
    fleet.deregister(one)
    server.wait_for(type="agent_deregistered")
    with pytest.raises(TimeoutError) as over:
        server.wait_for(type="agent_registered", agent_id=other, timeout_s=0)
    assert str(over.value) == (
        f"nothing with type 'agent_registered', agent_id '{other}' came after number 3, the one given last, "
        "within 0 s; nothing else came; number 2 fits and came before; after=0 begins with the first again")
    for number in range(30):
        fleet.retag(other, tags=[str(number)])
    with pytest.raises(TimeoutError) as over:
        server.wait_for(agent_id="agent-none", timeout_s=0)
    text = str(over.value)
    assert f"; 10 others came, then:; 14 agent_updated {other}; " in text
    assert f"; 33 agent_updated {other}; " in text
    assert text.endswith("; agent agent-none is not registered")
    with pytest.raises(TimeoutError, match="after number 0 within 0 s; 13 others came, then:; 14 agent"):
        server.wait_for(type="clock_stepped", after=0, timeout_s=0)


def test_a_coroutine_waits_without_a_thread_and_one_that_is_cancelled_takes_nothing(server: Server) -> None:
    fleet, threads = server.manager, threading.active_count()

    async def play() -> None:
        waits = [asyncio.create_task(server.wait_for_async(type="agent_registered", timeout_s=LIMIT_S))
                 for _ in range(60)]
        await asyncio.sleep(0)
        assert threading.active_count() == threads
        for wait in waits[1:]:
            wait.cancel()
        registered = await asyncio.to_thread(fleet.register, "h", "linux", "1")
        assert (await waits[0]).agent_id == registered.agent.id
        for wait in waits[1:]:
            with pytest.raises(asyncio.CancelledError):
                await wait
        late = asyncio.create_task(server.wait_for_async(type="agent_deregistered", timeout_s=LIMIT_S))
        await asyncio.sleep(0)
        fleet.deregister(registered.agent.id)
        late.cancel()  # after the entry came, and before the loop ran
        with pytest.raises(asyncio.CancelledError):
            await late
        assert (await server.wait_for_async(type="agent_deregistered", timeout_s=0)).seq == 2
        with pytest.raises(TimeoutError, match="after number 2, the one given last, within"):
            await server.wait_for_async(type="agent_stale", timeout_s=0.01)
    asyncio.run(play())


def test_a_loop_that_was_closed_while_a_coroutine_waited_disturbs_nobody(server: Server) -> None:
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # the task is deleted while it waits, whenever that is
    wait = loop.create_task(server.wait_for_async(timeout_s=LIMIT_S))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    server.manager.register("h", "linux", "1")
    wait.get_coro().close()
    assert not wait.done()


def test_a_stop_ends_waits_with_unavailable(server: Server) -> None:
    async def play() -> Any:
        waits = [asyncio.to_thread(server.wait_for, timeout_s=LIMIT_S),
                 asyncio.to_thread(server.wait_for_request, timeout_s=LIMIT_S),
                 server.wait_for_async(timeout_s=LIMIT_S), server.wait_for_request_async(timeout_s=LIMIT_S)]
        return await asyncio.gather(*waits, asyncio.to_thread(server.stop), return_exceptions=True)
    began_s = time.monotonic()
    assert [type(error) for error in asyncio.run(play())] == [manager.Unavailable] * 4 + [type(None)]
    assert time.monotonic() - began_s < LIMIT_S
    with pytest.raises(manager.Unavailable, match="stopped"):
        server.wait_for(timeout_s=LIMIT_S)


@pytest.mark.parametrize("kept", [True, False])
def test_wait_for_goes_on_after_a_restart_unless_the_journal_is_a_new_one(tmp_path: Path, kept: bool) -> None:
    server = Server(port=0, tls="off", clock=ManualClock(), data_dir=tmp_path if kept else None)
    for name in ("first", "second"):
        with server:
            made = server.manager.register(name, "linux", "1").agent
            over_the_wire(server, "GET", f"/api/agents/{made.id}")
            assert server.wait_for(type="agent_registered", timeout_s=0).agent_id == made.id
            assert server.wait_for_request(timeout_s=0).is_of(made.id)


def test_wait_for_request_gives_the_next_request_to_a_route_or_of_an_agent(
        server: Server, clock: ManualClock, tmp_path: Path) -> None:
    (one, other), late = (made.agent.id for made in server.seed(2)), server.seed(1)[0]
    asked = "GET /api/agents/:id"
    for agent_id, method in ((one, "GET"), (other, "GET"), (one, "DELETE")):
        over_the_wire(server, method, f"/api/agents/{agent_id}")
    assert [server.wait_for_request(route=asked).path.rpartition("/")[2] for _ in range(2)] == [one, other]
    assert server.wait_for_request(agent_id=one, timeout_s=0).method == "DELETE"
    with pytest.raises(TimeoutError, match=f"number 1 fits .* agent {one} is not registered"):
        server.wait_for_request(route=asked, agent_id=one, timeout_s=0)

    async def play() -> Any:
        route, path = "POST /api/agents/:id/heartbeat", f"/api/agents/{late.agent.id}/heartbeat"
        sent = asyncio.to_thread(over_the_wire, server, "POST", path, {}, token=late.token)
        return await asyncio.gather(server.wait_for_request_async(route=route, timeout_s=LIMIT_S), sent)
    found = asyncio.run(play())[0]
    assert (found.status, found.seq, found.at_ms) == (200, 4, clock.now().wall_ms)
    assert found.caller.role == "agent" and found.caller.agent.id == late.agent.id
    assert server.wait_for_request(route=asked, after=1, timeout_s=0).seq == 2
    text = "requests are kept by a server without data_dir"
    with Server(port=0, data_dir=tmp_path, tls="off") as operators, pytest.raises(ValueError, match=text):
        operators.wait_for_request(timeout_s=0)


def test_a_server_that_is_not_started_and_a_wrong_clock_are_told_in_words() -> None:
    for wrong in (ManualClock, 3):
        with pytest.raises(TypeError, match=r"clock is .* and must be a clock, such as"):
            Server(port=0, clock=wrong)
    server = Server(port=0)
    for name in ("url", "token", "manager", "faults"):
        with pytest.raises(AttributeError, match=f"'{name}'; start"):
            getattr(server, name)
    with pytest.raises(AttributeError, match=r"no attribute 'uri'$"):
        _ = server.uri


def test_a_setting_that_is_none_is_named_and_those_there_are() -> None:
    with pytest.raises(TypeError, match="'prot' is no setting; they are host, port, "):
        Server(prot=0)


def test_a_fault_may_be_a_bad_answer_and_counts_its_hits(server: Server) -> None:
    fault = server.faults.add(route="GET /livez", status=200, body=b'{"ok": tru', times=2)
    busy = server.faults.add(route="GET /livez", status=429, retry_after_s=7)
    for _ in range(2):
        with urllib.request.urlopen(f"{server.url}/livez", timeout=LIMIT_S) as answer:
            assert answer.read() == b'{"ok": tru'
    with pytest.raises(urllib.error.HTTPError, match="429") as refused:
        urllib.request.urlopen(f"{server.url}/livez", timeout=LIMIT_S)
    with refused.value:
        assert refused.value.headers["Retry-After"] == "7" and json.load(refused.value)["ok"] is False
    with urllib.request.urlopen(f"{server.url}/livez", timeout=LIMIT_S) as answer:
        assert json.load(answer)["ok"] is True
    assert (fault.hits, busy.hits) == (2, 1)
    for wrong in ({"sttus": 3}, {"status": 200}, {"status": 199, "body": b""}):
        with pytest.raises((TypeError, ValueError)):
            server.faults.add(**wrong)


@pytest.mark.parametrize("path", ["batch", "worker"])
def test_server_requests_has_what_agents_sent_and_were_answered(server: Server, path: str) -> None:
    agent = over_the_wire(server, "POST", "/api/agents/register", AGENT)
    if path == "worker":  # while there is a fault, workers answer heartbeats
        server.faults.add(route="GET /livez", status=503)
    route = "POST /api/agents/:id/heartbeat"
    beat = over_the_wire(server, "POST", f"/api/agents/{agent['id']}/heartbeat", {"cpu": 1.5},
                         token=agent["token"])
    made, beaten = server.requests
    assert (made.route, made.body, made.status) == (REGISTER_ROUTE, AGENT, 201)
    assert (beaten.method, beaten.path) == ("POST", f"/api/agents/{agent['id']}/heartbeat")
    assert (beaten.route, beaten.body, beaten.status) == (route, {"cpu": 1.5}, 200)
    assert beaten.answer == {"ok": True,
                             "data": beat} and beaten.headers["Content-Type"] == "application/json"
    for each in (made, beaten):
        assert agent["token"] not in str(each) and server.token not in str(each), "credentials are not kept"
    assert made.answer["data"] == {**agent, "token": "(not kept)"}
    assert (made.caller.role, beaten.caller.role, beaten.caller.agent.id) == ("admin", "agent", agent["id"])
    assert [(each.seq, each.at_ms) for each in server.requests] == [(1, START_MS), (2, START_MS)]


def test_headers_of_a_request_are_found_in_any_case_of_letters(server: Server) -> None:
    over_the_wire(server, "GET", "/api/agents", token=server.token)
    asked = urllib.request.Request(f"{server.url}/livez", headers={"last-event-id": "3", "X-Thing": "a"})
    urllib.request.urlopen(asked, timeout=LIMIT_S).close()
    admin, nobody = server.requests
    headers = nobody.headers
    assert (nobody.caller, admin.caller.role) == (None, "admin")
    assert headers["Last-Event-ID"] == headers["LAST-EVENT-ID"] == headers.get("last-event-id") == "3"
    assert "x-thing" in headers and "authorization" not in headers and headers.get("nothing") is None
    assert {"Last-Event-ID", "X-Thing", "Host"} <= set(headers) and "'X-Thing': 'a'" in repr(headers)


def test_server_requests_has_refused_dropped_malformed_and_long_requests(server: Server) -> None:
    agent = server.seed(1)[0]
    events = f"/api/agents/{agent.agent.id}/events"
    long = {"events": [{"type": "scan", "severity": "low", "details": {"n": "x" * 70_000}}]}
    server.faults.add(route="POST /api/agents/:id/events", drop="before")
    server.faults.add(route="POST /api/agents/:id/events", status=200, body=b'{"ok": tru')
    for path, body, token in (
            (events, {"events": []}, agent.token), (events, {"events": [1]}, agent.token),
            ("/api/agents?page=1", None, server.token), ("/api/nothing", {"a": 1}, agent.token),
            (events, long, agent.token), (f"/api/agents/{agent.agent.id}/heartbeat", {"cpu": 1}, "wrong")):
        with suppress(OSError, ValueError):
            over_the_wire(server, "POST" if body else "GET", path, body, token=token)
    with socket.create_connection(("127.0.0.1", port_of(server.url))) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        raw.recv(9)
    with socket.create_connection(("127.0.0.1", port_of(server.url))) as raw:
        raw.sendall(b"POST /api/agents/register HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n"
                    b"Authorization: Bearer " + server.token.encode() + b"\r\n\r\n[[[")
        raw.recv(9)
    seen = [(each.route.rpartition("/")[2], each.path.rpartition("/")[2], each.body, each.status)
            for each in server.requests]
    assert seen == [
        ("events", "events", {"events": []}, None), ("events", "events", {"events": [1]}, 200),
        ("agents", "agents?page=1", None, 200), ("", "nothing", {"a": 1}, 404),
        ("events", "events", None, 201), ("heartbeat", "heartbeat", {"cpu": 1}, 401), ("", "", None, 400),
        ("register", "register", b"[[[", 400)]
    assert server.requests[1].answer == b'{"ok": tru' and server.requests[0].answer is None


def test_server_requests_has_the_latest_1000_and_none_of_an_operators_manager(
        server: Server, tmp_path: Path) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server.url), timeout=LIMIT_S)
    with contextlib.closing(connection):
        for number in range(1010):
            connection.request("GET", "/livez", headers={"X-Number": str(number)})
            connection.getresponse().read()
    assert [each.headers["X-Number"]
            for each in server.requests] == [str(number) for number in range(10, 1010)]
    with Server(port=0, data_dir=tmp_path, tls="off") as operators:
        over_the_wire(operators, "GET", "/health")
        assert operators.requests == []
    restarted = Server(port=0, data_dir=tmp_path, tls="off", clock=ManualClock())
    for count in range(3):
        assert len(restarted.requests) == count, "requests before a restart are kept"
        with restarted:
            over_the_wire(restarted, "GET", "/health")


def test_seed_registers_agents_and_reports_threat_events(server: Server) -> None:
    made = server.seed(200, threats=450, tags=["lab"])
    fleet = server.manager.census()
    assert (len(made), fleet.agents[Status.ONLINE], fleet.threats) == (200, 200, 450)
    over_the_wire(server, "POST", f"/api/agents/{made[-1].agent.id}/heartbeat", {}, token=made[-1].token)
    assert server.manager.agent(made[-1].agent.id).tags == ("lab",)
    assert server.seed(0) == [] and len(server.seed(3, threats=1)) == 3
    first = over_the_wire(server, "GET", f"/api/agents/{made[0].agent.id}")
    assert (first["recentThreats"], first["hostname"]) == (3, "host-1")
    with Server(port=0, max_agents=5) as small:
        with pytest.raises(manager.Conflict):
            small.seed(6)
        assert small.manager.census().agents[Status.ONLINE] == 0, "all or none"


def test_seed_gives_filters_and_summaries_something_to_show_and_goes_on_counting(api: Client) -> None:
    server = api.server
    made = [*server.seed(3, threats=2500), *server.seed(2)]
    assert [each.agent.hostname for each in made] == [f"host-{number}" for number in range(1, 6)]
    for name, count in (("os", 3), ("version", 4), ("ip", 5)):
        assert len({getattr(each.agent, name) for each in made}) == count
    summary = api.get("/api/threats/summary")
    assert summary["total"] == 2500 and len(summary["topSourceIps"]) == 10 and len(summary["byType"]) == 3
    assert api.journal("threats_correlated")
    for names, arguments in (
            ("agents", {"agents": -1}), ("threats", {"threats": -3}), ("agents", {"agents": "5"}),
            ("threats", {"agents": 0, "threats": 3}), ("tags", {"tags": "lab"})):
        with pytest.raises(ValueError, match=f"^{names}: must be"):
            server.seed(**arguments)
    restarted = Server(port=0)
    for _ in range(2):
        with restarted:
            assert restarted.seed(1)[0].agent.hostname == "host-1", "a new folder has no agents"


def test_wait_for_returns_an_entry_that_is_there_or_comes(server: Server) -> None:
    first = server.manager.register("web-1", "linux", "1.2.0").agent
    assert server.wait_for(type="agent_registered", agent_id=first.id).agent_id == first.id
    late = threading.Thread(target=lambda: server.manager.deregister(first.id))
    late.start()
    entry = server.wait_for(type="agent_deregistered", timeout_s=LIMIT_S)
    late.join()
    assert (entry.agent_id, entry.data["hostname"]) == (first.id, "web-1")


def test_the_journal_comes_in_order_as_dataclasses(server: Server, clock: ManualClock) -> None:
    agent = server.manager.register("web-1", "linux", "1.2.0").agent
    clock.advance(67)
    entries = server.manager.journal()
    assert [(entry.seq, entry.type, entry.agent_id) for entry in entries] == [
        (1, "agent_registered", agent.id), (2, "agent_stale", agent.id)]
    assert entries[1].at_ms == agent.last_heartbeat_ms + 66_000
    assert server.manager.journal(after=1) == entries[1:]


def test_advancing_the_clock_does_what_fell_due_before_it_returns(server: Server, clock: ManualClock,
                                                                   api: Client) -> None:
    agent = api.register()
    clock.advance(67)
    assert api.get(f"/api/agents/{agent['id']}")["status"] == "stale"
    assert [entry["type"] for entry in api.journal()] == ["agent_registered", "agent_stale"]


REGISTER_ROUTE = "POST /api/agents/register"


def test_a_fault_answers_a_status_n_times_to_the_route_and_agent_it_names(server: Server) -> None:
    one, other = (server.manager.register(name, "linux", "1") for name in ("one", "other"))
    server.faults.add(route="POST /api/agents/:id/heartbeat", agent_id=one.agent.id, status=503, times=2)
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            over_the_wire(server, "POST", f"/api/agents/{one.agent.id}/heartbeat", {}, token=one.token)
        assert json.load(refused.value)["ok"] is False
        over_the_wire(server, "POST", f"/api/agents/{other.agent.id}/heartbeat", {}, token=other.token)
    over_the_wire(server, "POST", f"/api/agents/{one.agent.id}/heartbeat", {}, token=one.token)


@pytest.mark.parametrize(("drop", "registered"), [("before", 0), ("after", 1)])
def test_a_fault_drops_before_or_after_the_commit(server: Server, drop: str, registered: int) -> None:
    server.faults.add(route=REGISTER_ROUTE, drop=drop)
    with pytest.raises(OSError):
        over_the_wire(server, "POST", "/api/agents/register", AGENT)
    assert len(over_the_wire(server, "GET", "/api/agents")) == registered


def test_a_fault_answers_late_and_the_others_do_not_wait_for_it(server: Server) -> None:
    agent = server.manager.register("one", "linux", "1")
    server.faults.add(route="POST /api/agents/:id/heartbeat", delay_s=1.5)
    took_s: list[float] = []

    def beat() -> None:
        began_s = time.monotonic()
        over_the_wire(server, "POST", f"/api/agents/{agent.agent.id}/heartbeat", {}, token=agent.token)
        took_s.append(time.monotonic() - began_s)

    late = threading.Thread(target=beat)
    late.start()
    assert over_the_wire(server, "GET", "/health")["status"] == "healthy" and not took_s
    late.join()
    assert took_s[0] >= 1.5


@pytest.mark.parametrize(("wrong", "names"), [
    ({"route": "POST /api/nothing", "status": 500}, "route"), ({"drop": "never"}, "drop"),
    ({"status": 200}, "status"), ({}, "status, drop, delay_s, body_s"), ({"body_s": -1}, "body_s"),
    ({"delay_s": -1}, "delay_s"),
    ({"delay_s": math.nan}, "delay_s"), ({"delay_s": math.inf}, "delay_s"), ({"delay_s": "1"}, "delay_s"),
    ({"status": 500, "times": 0}, "times"), ({"status": 500, "times": 1.5}, "times"),
    ({"status": 500, "times": "2"}, "times"), ({"status": 500, "body": "text"}, "body"),
    ({"body": b"x"}, "retry_after_s, body"), ({"retry_after_s": 3}, "retry_after_s, body"),
    ({"status": 503.0}, "status"), ({"status": "503"}, "status"), ({"status": True}, "status"),
    ({"status": 503, "drop": "after"}, "status, drop"),
    ({"status": 429, "retry_after_s": -3}, "retry_after_s"),
    ({"status": 429, "retry_after_s": "3\r\nX: y"}, "retry_after_s"),
    ({"status": 500, "agent_id": 7}, "agent_id"),
    ({"status": 500, "agent_id": "agent-1", "route": "GET /livez"}, "agent_id"),
    ({"status": 500, "agent_id": "agent-1", "route": "PATCH /api/threats/:id"}, "agent_id")])
def test_a_fault_that_makes_no_sense_is_refused_by_the_arguments_name(
        server: Server, wrong: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=f"^{names}: must "):
        server.faults.add(**wrong)
    assert not server.faults


@pytest.mark.parametrize("fault", [{}, {"status": 503}, {"status": 200, "body": b'{"ok":true}'}])
def test_a_fault_ends_a_connection_in_the_middle_of_an_answer(server: Server, fault: dict[str, Any]) -> None:
    server.faults.add(route=REGISTER_ROUTE, drop="middle", **fault)
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(port_of(server.url), "POST", "/api/agents/register", AGENT, server.token)
    assert 0 <= cut.value.expected - len(cut.value.partial) <= 1
    assert len(over_the_wire(server, "GET", "/api/agents")) == (0 if fault else 1)
    assert server.requests[0].status == fault.get("status", 201)


def test_a_fault_makes_the_body_of_an_answer_slow(launch: Launch) -> None:
    site = launch()
    site.server.faults.add(route="GET /livez", body_s=2 * LIMIT_S)
    wire = site.wire()
    wire.send(request("GET", "/livez"))
    received = b""
    while b"\r\n\r\n" not in received or received.endswith(b"\r\n\r\n"):
        received += wire.sock.recv(4096)
    head, _, half = received.partition(b"\r\n\r\n")
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    assert len(half) == length // 2
    site.server.faults.over.set()  # as a stop does
    while len(half) < length:
        half += wire.sock.recv(4096)
    assert json.loads(half)["data"] == {"status": "alive"}


def test_a_stop_does_not_wait_for_a_delayed_request(caplog: pytest.LogCaptureFixture) -> None:
    with Server(port=0) as server, ThreadPoolExecutor(1) as pool:
        fault = server.faults.add(route="GET /livez", delay_s=2 * LIMIT_S)
        late = pool.submit(over_the_wire, server, "GET", "/livez")
        until(lambda: fault.hits, "the request is delayed")
        server.stop()
        assert late.result(timeout=LIMIT_S) == {"status": "alive"}
    assert not caplog.records


def test_faults_can_be_forgotten_and_no_route_adds_one(server: Server, api: Client) -> None:
    server.faults.add(status=500, times=100)
    server.faults.clear()
    assert api.get("/health")["status"] == "healthy"
    assert not [route.path for route in manager.ENDPOINTS if "fault" in route.path]


def test_lost_replies_to_a_registration_and_a_batch_leave_one_agent_and_one_event(server: Server) -> None:
    identity = {**AGENT, "machine_id": "m-1"}
    server.faults.add(route=REGISTER_ROUTE, drop="after")
    server.faults.add(route="POST /api/agents/:id/events", drop="after")
    with pytest.raises(OSError):
        over_the_wire(server, "POST", "/api/agents/register", identity)
    agent = over_the_wire(server, "POST", "/api/agents/register", identity)
    event = {"id": "e-1", "type": "scan", "severity": "low", "details": {}}
    with pytest.raises(OSError):
        over_the_wire(server, "POST", f"/api/agents/{agent['id']}/events", {"events": [event]},
                      token=agent["token"])
    ids = over_the_wire(server, "POST", f"/api/agents/{agent['id']}/events", {"events": [event]},
                        token=agent["token"])
    assert [each["id"] for each in over_the_wire(server, "GET", "/api/agents")] == [agent["id"]]
    assert [each["id"] for each in over_the_wire(server, "GET", "/api/threats")] == ids["eventIds"]
    assert not server.manager.journal(type="identity_conflict")


# The Guard agent as shipped


@pytest.fixture
def open_server() -> Iterator[Server]:
    with Server(port=0, clock=ManualClock(), open_enrollment=True) as running:
        yield running


SHIPPED_BEAT = {"eventsProcessed": 5, "threatsDetected": 1, "actionsExecuted": 0, "mode": "protection",
                "uptime": 90_500, "memoryUsageMB": 81.5}
SHIPPED_EVENT = {
    "event": {"id": "syslog-1", "timestamp": "2026-03-07T11:59:59.500Z", "source": "authlog",
              "severity": "info", "category": "auth", "description": "login failed", "raw": {"line": 1},
              "host": "web-1", "metadata": {"remoteAddr": "203.0.113.50", "newHash": "ABCDEF",
                                            "user": "root"}},
    "verdict": {"conclusion": "malicious", "confidence": 92, "action": "block_ip"}}


def test_open_enrolment_takes_and_answers_what_the_shipped_agent_expects(open_server: Server) -> None:
    api = Client(open_server)
    made = api.call("POST", "/api/agents/register", {**AGENT, "arch": "x64"}, token=None, status=201).json
    assert made["ok"] is True and (made["agentId"],
                                   made["token"]) == (made["data"]["id"], made["data"]["token"])
    path, token = f"/api/agents/{made['agentId']}", made["token"]
    api.post(path + "/heartbeat", SHIPPED_BEAT, token=token)
    assert api.get(path)["uptime"] == 90.5
    api.post(path + "/events", SHIPPED_EVENT, token=token, status=201)
    threat = api.get(f"/api/threats?agent_id={made['agentId']}&source_ip=203.0.113.50")[0]
    assert (threat["type"], threat["severity"], threat["confidence"], threat["timestamp"]) == (
        "auth", "low", 0.92, "2026-03-07T11:59:59.500Z")
    assert threat["details"] == {"sourceIp": "203.0.113.50", "fileHash": "ABCDEF", **SHIPPED_EVENT}
    api.post(path + "/events", SHIPPED_EVENT, token=token, status=201)
    assert len(api.get("/api/threats")) == 1
    api.post("/api/policy", {"name": "p", "rules": [
        {"type": "custom", "config": {"text": "title: a rule"}}, {"type": "custom", "config": {"x": 1}},
        {"type": "custom", "config": {"text": "off"}, "enabled": False}, {"type": "block_ip", "config": {}}]},
             status=201)
    assert api.call("GET", "/api/rules/latest", token=token).json["rules"] == ["title: a rule", '{"x":1}']


@pytest.mark.parametrize(("body", "named"), [
    ({**SHIPPED_BEAT, "uptime": "long"}, "uptime"), ({**SHIPPED_BEAT, "uptime": -1}, "uptime"),
    ({**SHIPPED_BEAT, "uptime": True}, "uptime"), ({**SHIPPED_BEAT, "uptime": 10**400}, "uptime")])
def test_a_broken_heartbeat_of_a_shipped_agent_is_refused(open_server: Server, body: Any, named: str) -> None:
    api = Client(open_server)
    agent = api.register()
    assert named in api.refusal("POST", f"/api/agents/{agent['id']}/heartbeat", body,
                                token=agent["token"], status=400)


@pytest.mark.parametrize(("event", "verdict", "named"), [
    ({"category": 7}, {}, "type"), ({"severity": "terrible"}, {}, "severity"),
    ({"timestamp": "then"}, {}, "timestamp"), ({"id": ""}, {}, "id"), ({}, {"confidence": 101}, "confidence"),
    ({}, {"confidence": "sure"}, "confidence"), ({}, {"confidence": 10**400}, "confidence"),
    (None, {}, "event"), ({}, 5, "verdict"), ({"raw": json.loads("[" * 70 + "]" * 70)}, {}, "details")])
def test_a_broken_event_of_the_shipped_agent_is_refused(open_server: Server, event: Any, verdict: Any,
                                                         named: str) -> None:
    api = Client(open_server)
    agent = api.register()
    body = {"event": None if event is None else {**SHIPPED_EVENT["event"], **event},
            "verdict": {**SHIPPED_EVENT["verdict"], **verdict} if isinstance(verdict, dict) else verdict}
    assert named in api.refusal("POST", f"/api/agents/{agent['id']}/events", body,
                                token=agent["token"], status=400)
    assert api.get("/api/threats") == []


def test_a_newcomer_chooses_neither_org_nor_machine_id_nor_tags() -> None:
    with Server(port=0, clock=ManualClock(), open_enrollment=True, open_enrollment_org="open") as server:
        api = Client(server)
        known = api.register(machine_id="m", org_id="open")
        claimed = {"org_id": "acme", "machine_id": "m", "tags": ["production"]}
        made = api.post("/api/agents/register", {**AGENT, **claimed}, token=None, status=201)
        assert made["id"] != known["id"] and made["tags"] == [] and made["org_id"] == "open"
        assert "machine_id" not in made and not api.journal("identity_conflict")
        entry = api.journal("agent_registered")[-1]
        assert (entry["org_id"], entry["claimed"]) == ("open", claimed)
        again = api.post("/api/agents/register", {**AGENT, **claimed}, token=made["token"])
        assert again["id"] == made["id"] and again["org_id"] == "open"


def test_newcomers_fill_half_of_the_fleet_at_most() -> None:
    with Server(port=0, clock=ManualClock(), open_enrollment=True, max_agents=4) as server:
        api = Client(server)
        api.register()
        first, _ = (api.post("/api/agents/register", AGENT, token=None, status=201) for _ in range(2))
        said = api.refusal("POST", "/api/agents/register", AGENT, token=None, status=409)
        assert "MANAGER_MAX_AGENTS" in said and "2" in said
        api.register()
        api.call("DELETE", f"/api/agents/{first['id']}")
        api.post("/api/agents/register", AGENT, token=None, status=201)


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 201), ({"Content-Type": "application/json; charset=utf-8"}, 201),
    ({"Content-Type": "text/plain"}, 415), ({"Content-Type": ""}, 415),
    ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ({"Origin": "https://a.example"}, 201), ({"Origin": "https://b.example"}, 403),
    ({"Origin": "null"}, 403)])
def test_a_web_page_cannot_have_a_browser_register_agents(headers: dict[str, str], status: int) -> None:
    with Server(port=0, clock=ManualClock(), open_enrollment=True,
                cors_allowed_origins="https://a.example") as server:
        api = Client(server)
        api.call("POST", "/api/agents/register", AGENT, token=None, headers=headers, status=status)
        assert len(api.get("/api/agents")) == (status == 201)


def test_open_enrolment_is_throttled_and_takes_over_nobody(open_server: Server, clock: ManualClock) -> None:
    api, elsewhere = Client(open_server), Client(open_server, address="198.51.100.8")
    known = api.register(machine_id="m-1")
    open_server.clock.advance(67)  # type: ignore[attr-defined]
    body = {**AGENT, "machine_id": "m-1"}
    made = [api.call("POST", "/api/agents/register", body, token=None, status=201).json for _ in range(120)]
    assert known["id"] not in {each["agentId"]
                               for each in made} and len({each["agentId"] for each in made}) == 120
    refused = api.call("POST", "/api/agents/register", body, token=None, status=429)
    assert int(refused.headers["Retry-After"]) > 0
    elsewhere.call("POST", "/api/agents/register", body, token=None, status=201)
    api.refusal("POST", "/api/agents/register", body, token="wrong", status=401)
    api.beat(known)


def test_without_open_enrolment_a_token_is_needed_and_shapes_are_the_published_ones(api: Client) -> None:
    api.refusal("POST", "/api/agents/register", AGENT, token=None, status=401)
    assert api.get("/api/agents") == [] and api.journal() == []
    agent = api.register()
    api.beat(agent, **SHIPPED_BEAT)
    assert api.get(f"/api/agents/{agent['id']}")["uptime"] == 90_500
    assert "events" in api.refusal("POST", f"/api/agents/{agent['id']}/events", SHIPPED_EVENT, status=400)


GUARD = os.environ.get("GUARD_CLIENT", "")
DRIVE = """
const { PanguardAgentClient } = await import(process.argv[2]);
const [url, count] = [process.argv[3], Number(process.argv[4])];
const event = JSON.parse(process.argv[5]);
const sent = [];
const fetched = await Promise.all(Array.from({ length: count }, async (_, number) => {
  const client = new PanguardAgentClient(url, 50);
  await client.register("1.4.5");
  client.startHeartbeat(() => ({ eventsProcessed: 1, threatsDetected: 0, actionsExecuted: 0,
                                 mode: "protection", uptime: 61000, memoryUsageMB: 50 }));
  await client.reportEvent({ event: { ...event.event, id: `event-${number}`, timestamp: new Date() },
                             verdict: event.verdict });
  const rules = await client.pullRules();
  await new Promise((done) => setTimeout(done, 400));
  client.stopHeartbeat();
  return { id: client.getAgentId(), rules };
}));
console.log(JSON.stringify(fetched));
"""


@pytest.mark.skipif(not GUARD, reason="GUARD_CLIENT names no @panguard-ai/panguard-guard; CI installs one")
@pytest.mark.parametrize("count", [1, 50])
def test_the_guard_agent_from_npm_registers_beats_reports_and_pulls_rules(tmp_path: Path, count: int) -> None:
    script = tmp_path / "drive.mjs"
    script.write_text(DRIVE)
    with Server(port=0, open_enrollment=True) as server:
        server.manager.create_policy("p", [{"type": "custom", "config": {"text": "a rule"}, "enabled": True}])
        done = subprocess.run(["node", script, GUARD, server.url, str(count), json.dumps(SHIPPED_EVENT)],
                              capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr
        fetched = json.loads(done.stdout.splitlines()[-1])
        assert [each["rules"] for each in fetched] == [["a rule"]] * count
        ids = [each["id"] for each in over_the_wire(server, "GET", "/api/agents")]
        assert sorted(ids) == sorted(each["id"] for each in fetched) and len(set(ids)) == count
        threats = over_the_wire(server, "GET", "/api/threats?limit=200")
        assert {threat["agentId"] for threat in threats} == set(ids)
        assert {(each["type"], each["severity"], each["confidence"])
                for each in threats} == {("auth", "low", 0.92)}
        assert {over_the_wire(server, "GET", f"/api/agents/{each}")["uptime"] for each in ids} == {61}


@pytest.mark.skipif(not GUARD, reason="GUARD_CLIENT names no @panguard-ai/panguard-guard; CI installs one")
def test_the_guard_agent_from_npm_is_refused_without_open_enrolment(tmp_path: Path, server: Server) -> None:
    script = tmp_path / "drive.mjs"
    script.write_text(DRIVE)
    done = subprocess.run(["node", script, GUARD, server.url, "1", json.dumps(SHIPPED_EVENT)],
                          capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode != 0 and "401" in done.stderr
    assert server.manager.journal() == [] and over_the_wire(server, "GET", "/api/agents") == []


# A simulated fleet against a model


class Model:
    """What the manager should say, worked out the slow and obvious way."""

    STALE_MS, OFFLINE_MS = 66_000, 300_000

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.announced: dict[str, str] = {}
        self.since: dict[str, int] = {}  # when the announced status began
        self.acknowledged: dict[str, int] = {}
        self.org: dict[str, str | None] = {}
        self.events: dict[str, set[str]] = {}
        self.policies: list[tuple[str | None, str | None]] = []  # (org, agent) of version index + 1
        self.journal: list[tuple[int, str, str | None]] = []

    def sweep(self, now: int) -> None:
        due = []
        for agent, seen in self.seen.items():
            if self.announced[agent] == "online" and now > seen + self.STALE_MS:
                due.append((seen + self.STALE_MS, agent, "stale"))
                self.announced[agent] = "stale"
                self.since[agent] = seen + self.STALE_MS
            if self.announced[agent] == "stale" and now > seen + self.OFFLINE_MS:
                due.append((seen + self.OFFLINE_MS, agent, "offline"))
                self.announced[agent] = "offline"
                self.since[agent] = seen + self.OFFLINE_MS
        self.journal += [(at, f"agent_{status}", agent)
                         for at, agent, status in sorted(due, key=lambda each: each[0])]

    def contact(self, now: int, agent: str) -> None:
        if self.announced[agent] != "online":
            self.journal.append((now, "agent_online", agent))
            self.since[agent] = now
        self.announced[agent] = "online"
        self.seen[agent] = now

    def restart(self, now: int) -> None:
        ages = {"online": 0, "stale": self.STALE_MS + 1, "offline": self.OFFLINE_MS + 1}
        self.seen = {agent: now - ages[self.announced[agent]] for agent in self.seen}

    def status(self, now: int, agent: str) -> str:
        age = now - self.seen[agent]
        return "online" if age <= self.STALE_MS else "stale" if age <= self.OFFLINE_MS else "offline"

    def pending(self, agent: str) -> int:
        newest: dict[tuple[str | None, str | None], int] = {}
        for version, scope in enumerate(self.policies, 1):
            newest[scope] = version
        scopes = {(None, None), (None, agent)} | ({(self.org[agent], None)} if self.org[agent] else set())
        return sum(version > self.acknowledged[agent] for scope, version in newest.items() if scope in scopes)


def test_a_thousand_agents_over_a_week_agree_with_a_model(  # noqa: C901  # the model is one function
        tmp_path: Path) -> None:
    chance = random.Random(20260307)
    clock = ManualClock()
    start = clock.now().wall_ms
    model = Model()
    tokens: dict[str, str] = {}
    with Server(port=0, clock=clock, data_dir=tmp_path, tls="off", max_agents=1000,
                journal_retention_ms=60 * 86_400_000, threat_retention_ms=60 * 86_400_000) as server:
        fleet = server.manager

        def register(number: int) -> None:
            org = chance.choice([None, "acme", "umbra"])
            made = fleet.register(f"host-{number}", "linux", "1.0", org_id=org, machine_id=f"m-{number}")
            agent, now = made.agent.id, clock.now().wall_ms
            tokens[agent] = made.token
            model.seen[agent], model.since[agent], model.announced[agent] = now, now, "online"
            model.acknowledged[agent] = 0
            model.org[agent], model.events[agent] = org, set()
            model.journal.append((now, "agent_registered", agent))

        with fleet.store.transaction():  # one commit for a thousand, for the sake of the test's own speed
            for number in range(1000):
                register(number)
        silent_until = {agent: 0 for agent in model.seen}
        for _ in range(200):
            clock.advance(chance.choice([5, 20, 60, 61.5, 300, 3000, 6000]))
            if chance.random() < 0.2:
                clock.step(chance.uniform(-900, 900))  # the system clock is corrected: nobody is to blame
                shift = clock.now().wall_ms - start - (clock.now().tick_ms)
                clock.step(-shift / 1000)  # and corrected back, so that the model's instants stay comparable
            now = clock.now().wall_ms
            model.sweep(now)
            if chance.random() < 0.05:
                server.stop()
                server.start()
                fleet = server.manager
                model.restart(now)
            agents = list(model.seen)
            for agent in map(fleet.agent, agents[:3]):
                assert (agent.status, agent.status_since_ms, agent.pending_policies) == (
                    model.status(now, agent.id), model.since[agent.id], model.pending(agent.id))
            for agent in chance.sample(agents, 60):
                if silent_until[agent] > now:
                    continue
                what = chance.random()
                if what < 0.6:
                    ack = chance.choice([None, None, max(1, len(model.policies) - chance.randrange(3)), 999])
                    beat = fleet.heartbeat(agent, uptime=1.0, policy_version=ack)
                    model.contact(now, agent)
                    if ack and ack <= len(model.policies):
                        model.acknowledged[agent] = max(model.acknowledged[agent], ack)
                    assert beat.pending_policies == model.pending(agent)
                elif what < 0.75:
                    ids = [f"e-{chance.randrange(40)}" for _ in range(chance.randrange(1, 6))]
                    events = [{"type": "scan", "severity": "low", "details": {}, "id": each, "timestamp":
                               "1999-01-01T00:00:00Z"} for each in ids]
                    first = fleet.report_events(agent, events)
                    assert fleet.report_events(agent, events[::-1]) == first[::-1]
                    if set(ids) - model.events[agent]:
                        model.journal.append((now, "threats_reported", agent))
                    model.events[agent] |= set(ids)
                elif what < 0.8:
                    silent_until[agent] = now + chance.randrange(400_000)
                elif what < 0.85 and model.status(now, agent) != "online":
                    number = fleet.agent(agent).hostname.partition("-")[2]
                    again = fleet.register(f"host-{number}", "linux", "1.1", org_id=model.org[agent],
                                           machine_id=f"m-{number}")
                    assert again.agent.id == agent and not again.created
                    model.contact(now, agent)
                    model.journal.append((now, "agent_reregistered", agent))
                elif what < 0.87:
                    fleet.deregister(agent)
                    for table in (model.seen, model.announced, model.acknowledged):
                        del table[agent]
                    model.policies = [(org, None if of == agent else of) if of != agent else ("gone", agent)
                                      for org, of in model.policies]
                    model.journal.append((now, "agent_deregistered", agent))
            if chance.random() < 0.15:
                scope = chance.choice([(None, None), ("acme", None), ("umbra", None),
                                       (None, chance.choice(list(model.seen)))])
                fleet.create_policy("p", [{"type": "custom", "config": {}, "enabled": True}],
                                    org_id=scope[0], agent_id=scope[1])
                model.policies.append(scope)
                model.journal.append((now, "policy_created", scope[1]))
        clock.advance(7 * 86_400 - (clock.now().wall_ms - start) / 1000)
        now = clock.now().wall_ms
        assert now - start == 7 * 86_400_000
        model.sweep(now)
        listed = json.loads(fleet.agents_json()[0])
        assert {each["id"]: each["status"] for each in listed} == {
            agent: model.status(now, agent) for agent in model.seen}
        assert len(json.loads(fleet.agents_json(status="offline")[0])) == len(model.seen)
        assert [(entry.at_ms, entry.type, entry.agent_id) for entry in fleet.journal()
                if not entry.type.startswith("manager_")] == model.journal
        for agent in model.seen:
            assert fleet.heartbeat(agent).pending_policies == model.pending(agent)
        assert fleet.census().threats == sum(map(len, model.events.values()))


# Nothing is left behind


def test_two_hundred_servers_leave_no_thread_descriptor_or_file(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def once() -> None:
        with Server(port=0) as server:
            over_the_wire(server, "POST", "/api/agents/register", AGENT)
            idle = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        idle.close()

    once()
    threads = threading.active_count()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(200):
        once()
    assert threading.active_count() == threads
    if files:
        assert len(os.listdir("/proc/self/fd")) <= files
    assert list(tmp_path.iterdir()) == []


# 9  Command line ######################################################################################


def test_the_start_says_where_and_how_and_its_curl_line_works(tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    with Running(folder) as running:
        said = "\n".join(running.lines)
        assert str(folder) in said and str(folder / "token") in said and running.url in said
        assert running.token not in said + running.log.read_text()
        assert len(running.lines) <= 8, "what a person needs and no more"
        command = running.lines[-1].partition("curl ")[2]
        if shutil.which("curl"):
            pasted = subprocess.run(["bash", "-c", f"curl -sS {command}"], capture_output=True, text=True,
                                    timeout=LIMIT_S, check=False)
            assert json.loads(pasted.stdout) == {"ok": True, "data": []}, pasted.stderr
        else:
            assert running.ask("GET", "/api/agents") == (200, {"ok": True, "data": []})
        token = running.token
        assert running.end() == 0
    with Running(folder) as running:
        assert running.token == token


def test_a_new_token_is_shown_to_a_terminal_once(tmp_path: Path) -> None:
    def shown() -> str:
        ours, theirs = os.openpty()
        process = subprocess.Popen([sys.executable, manager.__file__, "--port", "0", "--data-dir", tmp_path],
                                   stdout=theirs, stderr=subprocess.DEVNULL)
        os.close(theirs)
        hung = threading.Timer(20, process.kill)
        hung.start()
        out = b""
        try:
            while b"curl " not in out.rpartition(b"\n")[0]:
                out += os.read(ours, 4096)
            process.terminate()
            assert process.wait(timeout=LIMIT_S) == 0
        finally:
            hung.cancel()
            process.kill()
            process.wait()
            os.close(ours)
        return out.decode()
    first = shown()
    token = (tmp_path / "token").read_text().strip()
    assert token in first and token not in shown()


def test_a_token_that_is_given_is_neither_shown_nor_written(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with Running(folder, MANAGER_AUTH_TOKEN="given-first-token,given-second-token") as running:
        for token, status in (("given-first-token", 200), ("given-second-token", 200), ("given", 401),
                              ("given-first-token,given-second-token", 401)):
            assert running.ask("GET", "/api/agents", token=token)[0] == status
        assert not (folder / "token").exists()
        assert "given-" not in "\n".join(running.lines) + running.log.read_text()
        assert running.end() == 0
    assert b"given-" not in (folder / "manager.db").read_bytes()


def test_the_service_manager_is_told_and_the_watchdog_fed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(LIMIT_S)
        for unwatched in ({}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "200000", "WATCHDOG_PID": "1"}):
            with Running(tmp_path / "data", MANAGER_TLS="off", NOTIFY_SOCKET=str(tmp_path / "notify"),
                         **unwatched) as running:
                assert systemd.recv(99) == b"READY=1"
                assert running.end() == 0
                assert systemd.recv(99) == b"STOPPING=1"
        with Running(tmp_path / "data", MANAGER_TLS="off", NOTIFY_SOCKET=str(tmp_path / "notify"),
                     WATCHDOG_USEC="200000") as running:
            heard = {systemd.recv(99), systemd.recv(99), systemd.recv(99)}
            assert heard == {b"READY=1", b"WATCHDOG=1"}
            assert running.end() == 0
            systemd.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    heard.add(systemd.recv(99))
            assert heard == {b"READY=1", b"WATCHDOG=1", b"STOPPING=1"}


def test_logs_may_be_json_a_line_each(tmp_path: Path) -> None:
    with Running(tmp_path / "data", MANAGER_TLS="off", MANAGER_LOG_FORMAT="json",
                 MANAGER_TYPO="1") as running:
        running.ask("GET", "/api/agents", token="wrong")
        assert running.end() == 0
    lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert len(lines) >= 2 and all({"at", "level", "logger", "message"} <= set(line) for line in lines)
    assert any("MANAGER_TYPO" in line["message"] and line["level"] == "WARNING" for line in lines)
    assert all(manager.instant_ms(line["at"]) for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the address space")
def test_a_start_with_too_little_memory_ends_with_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, manager.__file__, "--port", "0", "--data-dir", tmp_path / "data"], check=False,
        capture_output=True, text=True, env={**os.environ, "MANAGER_TLS": "off"}, timeout=LIMIT_S,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (150 * 2**20,) * 2))
    assert done.returncode == 1
    one_sentence(done.stderr, "memory", "ulimit -v")


def test_warnings_of_a_start_and_its_refusal_are_json_too(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    environ = {"MANAGER_TLS": "off", "MANAGER_LOG_FORMAT": "json"}
    with Running(folder, "--host", "0.0.0.0", **environ) as running:
        until(lambda: "plaintext" in running.log.read_text(), "the warning")
        done = subprocess.run([sys.executable, manager.__file__, "--port", "0", "--data-dir", folder],
                              check=False, capture_output=True, text=True, env={**os.environ, **environ},
                              timeout=LIMIT_S)
        assert running.end() == 0 and "Warning" not in running.process.stdout.read()
    said = [json.loads(line) for line in (running.log.read_text() + done.stderr).splitlines()]
    for level, word in (("WARNING", "plaintext"), ("CRITICAL", "another manager")):
        assert any(line["level"] == level and word in line["message"] for line in said), word
    assert done.returncode == 1


def test_plaintext_beyond_loopback_is_warned_about_once(tmp_path: Path) -> None:
    for host, times in (("0.0.0.0", 1), ("127.0.0.1", 0)):
        folder = tmp_path / host
        with Running(folder, "--host", host, MANAGER_TLS="off") as running:
            assert running.ask("GET", "/health")[0] == 200
            assert running.end() == 0
            said = "\n".join(running.lines) + running.process.stdout.read() + running.log.read_text()
        assert len(re.findall(r"\bplaintext\b", said)) == times, said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_in_flight_and_exits_0(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with Running(folder, MANAGER_TLS="off") as running:
        idle = socket.create_connection(("127.0.0.1", running.port))
        caller = http.client.HTTPConnection("127.0.0.1", running.port, timeout=LIMIT_S)
        with contextlib.closing(idle), contextlib.closing(caller):
            with locked(folder):
                caller.request("POST", "/api/agents/register", json.dumps(AGENT), {
                    "Authorization": f"Bearer {running.token}", "Content-Type": "application/json"})
                assert running.ask("GET", "/api/agents")[0] == 200  # so the other has begun
                running.process.send_signal(number)
            answer = caller.getresponse()
            assert answer.status == 201
            agent = json.loads(answer.read())["data"]
            assert running.process.wait(timeout=LIMIT_S) == 0
        assert "Traceback" not in running.log.read_text()
    assert {path.name for path in folder.glob("manager.db*")} == {"manager.db"}, "it is closed cleanly"
    with Running(folder, MANAGER_TLS="off") as running:
        assert running.ask("GET", f"/api/agents/{agent['id']}", token=agent["token"])[0] == 200


@pytest.mark.slow
def test_ten_thousand_agents_that_register_again_after_a_restart_keep_their_ids(tmp_path: Path) -> None:
    def register(port: int, token: str, numbers: range) -> set[str]:
        ids = set()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)) as connection:
            for number in numbers:
                connection.request("POST", "/api/agents/register",
                                   json.dumps({**AGENT, "machine_id": f"m-{number}"}),
                                   {"Authorization": f"Bearer {token}", "Content-Type": "application/json"})
                answer = connection.getresponse()
                made = json.load(answer)
                assert answer.status in (200, 201), made
                ids.add(made["data"]["id"])
        return ids

    with Server(port=0, data_dir=tmp_path, tls="off") as server:
        with server.manager.store.transaction():
            known = {server.manager.register(**AGENT, machine_id=f"m-{number}").agent.id
                     for number in range(10_000)}
        for agent_id in known:
            server.manager.heartbeat(agent_id)
    with Server(port=0, data_dir=tmp_path, tls="off") as server, ThreadPoolExecutor(20) as pool:
        again = [pool.submit(register, port_of(server.url), server.token, range(first, 10_000, 20))
                 for first in range(20)]
        assert set().union(*(each.result() for each in again)) == known
        assert len(server.manager.agents()[0]) == 10_000


class Ledger:
    """What one client was told was done, and of what it does not know whether it was."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.name = f"host-{seed}"
        self.acknowledged = 0
        self.tokens: dict[str, str] = {}    # of registered agents that nobody tried to deregister
        self.uptimes: dict[str, int] = {}
        self.doubtful: set[str] = set()
        self.gone: dict[str, str] = {}
        self.events: dict[str, str] = {}    # own id: event id
        self.batches: list[set[str]] = []   # own ids that were sent together
        self.policies: set[str] = set()

    def step(self, running: Running) -> None:
        """One request, and a note of its answer. Raises OSError or HTTPException when there is none."""
        kind = self.chance.choices(["register", "beat", "report", "policy", "deregister"],
                                   [30, 30, 20, 5, 15])[0]
        if kind == "register" or not self.tokens:
            agent = self.sent(running, "POST", "/api/agents/register", {**AGENT, "hostname": self.name}, 201)
            self.tokens[agent["id"]] = agent["token"]
        elif kind == "policy":
            policy = {"name": "p", "rules": [RULE], "org_id": self.name}
            self.policies.add(self.sent(running, "POST", "/api/policy", policy, 201)["id"])
        else:
            agent_id = self.chance.choice(sorted(self.tokens))
            path, token = f"/api/agents/{agent_id}", self.tokens[agent_id]
            if kind == "beat":
                uptime = self.uptimes.get(agent_id, 0) + 1
                self.sent(running, "POST", f"{path}/heartbeat", {"uptime": uptime}, 200, token)
                self.uptimes[agent_id] = uptime
            elif kind == "report":
                own = [f"{agent_id}-{self.chance.getrandbits(60):x}"
                       for _ in range(self.chance.randint(1, 20))]
                self.batches.append(set(own))
                batch = {"events": [{**THREAT, "id": each, "details": {"own": each}} for each in own]}
                ids = self.sent(running, "POST", f"{path}/events", batch, 201, token)["eventIds"]
                self.events.update(zip(own, ids, strict=True))
            else:
                del self.tokens[agent_id]
                self.uptimes.pop(agent_id, None)
                self.doubtful.add(agent_id)
                self.sent(running, "DELETE", path, None, 200, token)
                self.doubtful.remove(agent_id)
                self.gone[agent_id] = token
        self.acknowledged += 1

    @staticmethod
    def sent(running: Running, method: str, path: str, body: Any, expected: int, token: str = "") -> Any:
        status, answer = running.ask(method, path, body, token)
        assert status == expected, answer
        return answer["data"]

    def work(self, running: Running) -> None:
        """One request after the other until the manager is gone."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                self.step(running)

    def check(self, agents: dict[str, Any], policies: set[str], threats: dict[str, str]) -> None:
        """Assert that all answered writes are there, no batch in part. `threats`: since the last check."""
        assert self.tokens.keys() <= agents.keys(), "a registered agent is lost"
        assert not self.gone.keys() & agents.keys(), "a deregistered agent is back"
        for agent_id, uptime in self.uptimes.items():
            assert uptime <= agents[agent_id]["uptime"] <= uptime + 1, "an acknowledged heartbeat is lost"
            self.uptimes[agent_id] = agents[agent_id]["uptime"]
        assert self.policies <= policies, "an acknowledged policy is lost"
        assert self.events.items() <= threats.items(), "an acknowledged event is lost"
        for batch in self.batches:
            assert batch <= threats.keys() or not batch & threats.keys(), "half a batch was stored"
        self.events, self.batches = {}, []


# For each change of an agent's status, which may come before it; None: an entry that was purged.
COMES_AFTER = {"agent_registered": (None,), "agent_stale": (None, "agent_registered", "agent_online"),
               "agent_offline": (None, "agent_stale"), "agent_online": (None, "agent_stale", "agent_offline")}


class Rounds:
    """A folder whose manager is killed again and again: what was answered, streamed and journalled."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.folder, self.backups = home, home / "data", home / "backups"
        self.chance = random.Random(seed)
        self.ledgers = [Ledger(self.chance.randrange(2**32)) for _ in range(4)]
        self.silent: set[str] = set()  # agents that send no heartbeats
        self.newest_threat = ""
        self.streamed: dict[int, Any] = {}
        self.journal: dict[int, Any] = {}
        self.announced: dict[str, str] = {}  # by agent: its last change of status
        self.environ = {"MANAGER_TLS": "off", "MANAGER_HEARTBEAT_TIMEOUT_MS": "1000",
                        "MANAGER_LOG_LEVEL": "ERROR"}

    def follow(self, running: Running) -> None:
        """Read the stream after the last entry received, until the manager ends."""
        after = max(self.streamed, default=0)
        with suppress(OSError, http.client.HTTPException), open_stream(
                running.url, running.token, after=after) as stream:
            for entry in entries_of(stream):
                assert self.streamed.setdefault(entry["seq"], entry) == entry

    def kill(self, what: str) -> None:
        """Kill a manager while it does `what`, and check what is left."""
        print(what, end=" ")
        least_s, most_s, environ = 0.1, 1.0, {}
        if what == "start":
            for _ in range(2):
                self._kill_start(self.folder)
        elif what == "sweep":
            least_s, most_s = 1.0, 1.5
            self._add_silent()
        elif what == "purge":
            least_s, most_s = 0.8, 1.5
            environ = {f"MANAGER_{name}_RETENTION_MS": "1000" for name in ("THREAT", "JOURNAL")}
        elif what == "backup":
            self.backups.mkdir(exist_ok=True)
            environ = {"MANAGER_BACKUP_DIR": str(self.backups), "MANAGER_BACKUP_EVERY_MS": "1000"}
        work = [self.follow, *(each.work for each in self.ledgers)]
        environ |= self.environ
        with ThreadPoolExecutor(len(work)) as pool, Running(self.folder, **environ) as running:
            jobs = [pool.submit(each, running) for each in work]
            self._wait(least_s, most_s)
        for job in jobs:
            job.result()
        self._check(purged=what == "purge")

    def _wait(self, least_s: float, most_s: float) -> None:
        wait_s = self.chance.uniform(least_s, most_s)
        print(f"killed after {wait_s:.3f} s")
        select.select([], [], [], wait_s)

    def _kill_start(self, folder: Path) -> None:
        with subprocess.Popen([sys.executable, manager.__file__, "--port", "0", "--data-dir", str(folder)],
                              env={**os.environ, **self.environ}, stdout=subprocess.DEVNULL) as process:
            self._wait(0.1, 0.6)
            process.kill()

    def _add_silent(self) -> None:
        store = Store(self.folder)
        with contextlib.closing(store), store.transaction():
            fleet = Manager(Config(), manager.SystemClock(), store)
            self.silent |= {fleet.register(**AGENT).agent.id for _ in range(300)}

    def kill_upgrade(self) -> None:
        """Kill a manager while it migrates a file of schema 1."""
        folder = self.home / "old"
        folder.mkdir(mode=0o700)
        old_file(folder / "manager.db", "1a03308")
        before = sqlite_dump(folder / "manager.db")
        print("upgrade", end=" ")
        self._kill_start(folder)
        with Server(port=0, data_dir=folder, tls="off") as server:
            Client(server).beat({"id": "agent-00000001", "token": "secret"})
        manager.examine(folder / "manager.db")
        assert sqlite_dump(folder / "manager.db.schema-1") == before
        shutil.rmtree(folder)

    def _check(self, *, purged: bool) -> None:
        """Check a copy of the folder, so that the next manager finds what the killed one left."""
        copy = self.home / "copy"
        shutil.copytree(self.folder, copy)
        manager.examine(copy / "manager.db")
        with Server(port=0, data_dir=copy, tls="off", clock=ManualClock(time.time())) as server:
            api = Client(server)
            agents = {each["id"]: each for each in api.get("/api/agents?detail=true")}
            policies = {each["id"] for each in api.get("/api/policy")}
            threats = self._new_threats(api)
            entries = [manager.entry_shape(entry) for entry in server.manager.journal(after=self.last_seq())]
        assert self.silent <= agents.keys()
        for each in self.ledgers:
            if purged:
                each.events, each.batches = {}, []
            each.check(agents, policies, threats)
        self._check_journal(entries[:-1], purged=purged)  # not the start of this manager
        counted = Counter(entry["type"] for entry in self.journal.values())
        registered = counted["agent_registered"] - counted["agent_deregistered"]
        purged_before = len(self.journal) < self.last_seq()
        assert len(agents) == registered or purged_before, "an agent is missing"
        for backup in self.backups.glob("panguard-*.backup"):
            (self.home / "unpacked").mkdir()
            manager.unpack(backup, self.home / "unpacked")
            shutil.rmtree(self.home / "unpacked")
        shutil.rmtree(copy)

    def _new_threats(self, api: Client) -> dict[str, str]:
        """The ids of the threat events since the last check, by the agents' own ids for them."""
        found: dict[str, str] = {}
        page = api.get("/api/threats?limit=200")
        while page:
            found |= {each["details"]["own"]: each["id"] for each in page}
            if page[-1]["id"] <= self.newest_threat:
                break
            # Not before the least id: ids of reports that wait together are not in the order of instants.
            page = api.get(f"/api/threats?limit=200&before={page[-1]['id']}")
        self.newest_threat = max(found.values(), default="")
        return found

    def last_seq(self) -> int:
        """The number of the last entry that a check has found."""
        return max(self.journal, default=0)

    def _check_journal(self, entries: list[Any], *, purged: bool) -> None:
        if entries[0]["seq"] > self.last_seq() + 1:
            assert purged, "entries are lost"
            self.announced.clear()
        for entry in entries:
            if before := COMES_AFTER.get(entry["type"]):
                assert self.announced.get(entry["agentId"]) in before, f"announced twice: {entry}"
                self.announced[entry["agentId"]] = entry["type"]
        self.journal |= {entry["seq"]: entry for entry in entries}
        assert max(self.streamed, default=0) <= self.last_seq()
        assert {seq: self.journal.get(seq, entry) for seq, entry in self.streamed.items()} == self.streamed

    def end(self) -> None:
        """Start a last manager: its stream must send all entries of the journal."""
        with ThreadPoolExecutor(1) as pool, Running(self.folder, **self.environ) as running:
            job = pool.submit(self.follow, running)
            until(lambda: max(self.streamed) >= self.last_seq(), "the stream has given all")
            found = [{"seq": 0}]
            while page := running.ask("GET", f"/api/events?limit=200&after={found[-1]['seq']}")[1]["data"]:
                found += page
            assert running.end() == 0
            job.result()
        assert [self.streamed.get(entry["seq"]) for entry in found[1:]] == found[1:]
        for kind in ("tokens", "gone", "policies"):
            assert any(getattr(each, kind) for each in self.ledgers), f"the traffic had no {kind}"


@pytest.mark.parametrize("kills", [
    ["traffic", "start", "backup"], pytest.param(["traffic", "start", "sweep", "purge", "backup"] * 6,
                                                 marks=pytest.mark.slow)], ids=len)
def test_a_manager_killed_during_its_work_loses_nothing_and_announces_nothing_twice(
        kills: list[str], tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rounds = Rounds(tmp_path, seed)
    for what in kills:
        rounds.kill(what)
    for _ in range(len(kills) // 3):
        rounds.kill_upgrade()
    rounds.end()


# Commands


@pytest.fixture(params=["off", "auto"], ids=["plaintext", "TLS"])
def managed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    """A manager on a data folder, as the commands find one on their own machine; its clock the test moves."""
    with Server(port=0, clock=ManualClock(), data_dir=tmp_path / "data", tls=request.param) as server:
        yield Client(server)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str],
          monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A command run in this process: its exit status, what it wrote, and what it said on standard error."""
    for name in list(os.environ):
        if name.startswith("MANAGER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MANAGER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)

    def run(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(each) for each in words])
        except SystemExit as leaving:  # argparse
            status = int(leaving.code or 0)
        return (status, *capsys.readouterr())
    return run


@pytest.fixture
def furnished(managed: Client, tmp_path: Path) -> Client:
    """Two agents, one of them silent; two policies for all and one override; an event; an enrolment token."""
    silent = managed.register(hostname="db-1", tags=["database"])
    managed.server.clock.advance(400)
    agent = managed.register(hostname="web-1", org_id="o")
    report(managed, agent, threat(severity="critical", sourceIp="203.0.113.9"))
    for name, ip in (("one", "203.0.113.1"), ("two", "203.0.113.2")):
        managed.post("/api/policy", {"name": name, "rules": [{"type": "block_ip", "config": {"ip": ip}}]},
                     status=201)
    policy(managed, agent_id=agent["id"])
    managed.post("/api/enroll-tokens", {}, status=201)
    (tmp_path / "policy.json").write_text(json.dumps({"name": "p", "rules": [RULE]}))
    assert silent["id"] != agent["id"]
    return managed


# What an example answers beside 0: 3 is that agents are silent.
EXAMPLE_STATUS = {"status": 3, "doctor": 0}


@pytest.mark.parametrize("name", [name for name in manager.COMMANDS
                                  if name not in ("demo", "restore", "notify test")])
def test_the_example_of_every_command_runs(name: str, furnished: Client, shell: Any) -> None:
    words = shlex.split(manager.COMMANDS[name].example)
    if name == "enroll revoke":
        words[-1] = furnished.get("/api/enroll-tokens")[0]["id"]
    if name == "deregister":
        furnished.server.clock.advance(31 * 86_400)
    status, out, err = shell(*words)
    assert (status, err) == (EXAMPLE_STATUS.get(name, 0), ""), out
    assert out.strip()
    status, out, _ = shell(*name.split(), "--help")
    example = f"example: panguard-manager {manager.COMMANDS[name].example}"
    assert status == 0 and example in " ".join(out.split())


def test_commands_say_what_the_api_says(furnished: Client, shell: Any) -> None:
    silent, agent = furnished.get("/api/agents")
    for words, path in (("agents", "/api/agents?detail=true"), ("threats", "/api/threats"),
                        ("policy list", "/api/policy"),
                        ("enroll list", "/api/enroll-tokens"), ("events", "/api/events"),
                        ("agents --status offline --find DB", "/api/agents?detail=true&status=offline"),
                        ("agents --tag database --os linux --version 1.2.0 --silent 5m --sort=-hostname",
                         "/api/agents?detail=true&tag=database"),
                        ("agents --org-id o", "/api/agents?detail=true&org_id=o"),
                        ("threats --severity critical --agent web --state open --source-ip 203.0.113.9 "
                         "--limit 1", "/api/threats"), ("policy show v1", None),
                        ("agent web-1", f"/api/agents/{agent['id']}")):
        status, out, err = shell(*words.split(), "--json")
        assert (status, err) == (0, ""), words
        if path:
            assert json.loads(out) == furnished.get(path), words
    assert shell("agents", "-q")[1].split() == [silent["id"], agent["id"]]
    nothing = "STATUS  HOSTNAME  ID  TAGS  OS  VERSION  ADDRESS  POLICY  LAST SEEN\n"
    assert shell("agents", "--tag", "none") == (3, nothing, "")
    assert shell("agents", "--tag", "none", "-q")[:2] == (3, "")
    status, out, _ = shell("status")
    assert status == 3 and "2 agents: 1 online, 0 stale, 1 offline" in out and f"db-1 ({silent['id']})" in out
    assert "1 threats in 24 h: 1 critical" in out and "policy v2 (acknowledged by 0 of 2)" in out
    assert json.loads(shell("status", "--json")[1])["silent"][0]["id"] == silent["id"]
    assert shell("status", "-q")[:2] == (3, silent["id"] + "\n")
    furnished.call("DELETE", f"/api/agents/{silent['id']}")
    assert shell("status")[0] == 0
    diff = shell("policy", "diff", "v1", "v2")[1]
    assert re.search(r'^- .*203\.0\.113\.1"', diff) and re.search(r'\n\+ .*203\.0\.113\.2"', diff)
    assert shell("policy", "diff", "1", "v1")[:2] == (0, "no difference\n")
    assert re.search(r"acknowledgedBy +0 of 1\nwaiting +web-1\n", shell("policy", "show", "2")[1])
    assert json.loads(shell("threats", "--summary", "--json")[1])["total"] == 1


def test_an_agent_is_named_by_the_beginning_of_its_id_or_hostname(furnished: Client, shell: Any) -> None:
    silent, agent = (each["id"] for each in furnished.get("/api/agents"))
    for name in (agent, agent[:-1], "web-1", "web"):
        assert json.loads(shell("agent", name, "--json")[1])["id"] == agent
    furnished.register(hostname="web-10")
    found = json.loads(shell("agent", "web-1", "--json")[1])
    assert found["id"] == agent, "the whole name goes before its beginning"
    for name, why in (("web", "means 2 agents"), ("nobody", "no agent is called 'nobody'"), ("", "no agent"),
                      ("eb-1", "no agent"), ("agent-", "means 3 agents")):
        status, out, err = shell("agent", name)
        assert (status, out) == (3, "") and why in one_line(err), name
    assert silent


def test_agents_are_changed_by_name_pattern_or_filter_after_a_yes(furnished: Client, shell: Any) -> None:
    def tags() -> list[list[str]]:
        return [each["tags"] for each in furnished.get("/api/agents")]

    assert shell("tag", "web-1", "--add", "a", "--add", "b", "--yes")[:2] == (0, "1 agent tagged: web-1\n")
    assert tags() == [["database"], ["a", "b"]]
    untagged = json.loads(shell("tag", "--tag", "database", "--remove", "database", "--yes", "--json")[1])
    assert untagged["changed"] == 1
    assert shell("tag", "web-1", "--remove", "c", "--yes")[:2] == (0, "1 agent found, and none to change\n")
    assert shell("tag", "?b-*", "*-1", "--add", "c",
                 "--dry-run")[:2] == (0, "2 agents would be tagged: db-1, web-1\n")
    assert tags() == [[], ["a", "b"]]
    for words, why in ((["tag", "web-1", "--add", "c"], "Add tags to 1 agent (web-1)? Add --yes"),
                       (["tag", "web-1"], "--add or --remove"), (["deregister", "--yes"], "filter"),
                       (["tag", "--add", "c", "--yes"], "at least one filter"),
                       (["tag", "web-1", "--find", "x", "--add", "c", "--yes"], "not both"),
                       (["deregister", "db-1"], "Deregister 1 agent (db-1)? Add --yes"),
                       (["deregister", "--silent", "soon"], "'soon' must be a number and its unit"),
                       # A variable that is not set must not widen what is chosen.
                       (["deregister", "--org-id", "", "--os", "linux", "--yes"], "org_id: must be"),
                       (["tag", "--find", "", "--os", "linux", "--add", "z", "--yes"], "q: must be"),
                       (["policy", "push", "policy.json", "--org-id", ""], "org_id: must be"),
                       (["threats", "--agent", ""], "no agent"), (["events", "--agent", ""], "no agent")):
        status, _, err = shell(*words)
        assert status in (2, 3) and why in err, (words, err)
    assert shell("policy", "push", "policy.json", "--agent",
                 "")[0] == 3 and len(furnished.get("/api/policy")) == 3
    assert tags() == [[], ["a", "b"]]
    assert shell("deregister", "--silent", "30d", "--yes")[:2] == (3, "0 agents found, and none to change\n")
    assert json.loads(shell("deregister", "--silent", "30d", "--yes", "--json")[1])["matched"] == 0
    assert shell("tag", "nope-*", "--add", "c", "--yes")[0] == 3
    assert shell("deregister", "d*", "--yes")[:2] == (0, "1 agent deregistered: db-1\n") and len(tags()) == 1


def test_a_policy_that_asks_for_a_dry_run_itself_is_not_issued(furnished: Client, shell: Any,
                                                               tmp_path: Path) -> None:
    (tmp_path / "dry.json").write_bytes("\ufeff".encode() + json.dumps(
        {"name": "p", "rules": [RULE], "dryRun": True}).encode())
    assert "dryRun" in shell("policy", "push", "dry.json")[1] and len(furnished.get("/api/policy")) == 3
    (tmp_path / "huge.json").write_text(" " * 2**20 + "{}")
    assert "1048576 bytes" in one_line(shell("policy", "push", "huge.json")[2])


def one_line(text: str) -> str:
    """A message on standard error, which must be one sentence that says who speaks."""
    assert text.startswith("panguard-manager: ") and text.count("\n") == 1 and "Traceback" not in text, text
    return text


def test_what_a_command_cannot_do_is_one_sentence_and_a_status(
        managed: Client, shell: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = managed.server.url
    (tmp_path / "not.json").write_text("{")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        free = silent.getsockname()[1]
    nowhere = tmp_path / "nowhere"
    for words, status, why in (
            (["status", "--token", "wrong"], 1, "the token is wrong"),
            (["status", "--url", f"http://127.0.0.1:{free}"], 1, "nothing listens at"),
            (["status", "--url", "ftp://x"], 2, "--url takes"),
            (["status", "--url", "https://[::1"], 2, "--url takes"),
            (["status", "--url", "http://user:secret@localhost"], 2, "--url takes"),
            (["events", "--follow", "--url", "http://a b"], 2, "--url takes"),
            (["status", "--url", f"http://{'x' * 70}.example"], 1, "cannot be asked"),
            (["status", "--token", "secret\rx"], 2, "no token is known"),
            (["status", "--data-dir", "~nobody-of-that-name/x"], 2, "--data-dir"),
            (["demo", "--port", "99999999"], 2, "MANAGER_PORT"),
            (["status", "--url", "http://nosuchhost.invalid"], 1, "cannot be asked"),
            (["status", "--cacert", tmp_path / "none.pem", "--url", "https://localhost:1"], 2, "--cacert"),
            (["status", "--data-dir", nowhere], 2, "no token is known"),
            (["threats", "--limit", 0], 2, "limit: must be"),
            (["policy", "show"], 3, "no policy is in force"),
            (["policy", "show", "v9"], 3, "no policy has the version"),
            (["policy", "push", "none"], 2, "No such file"),
            (["policy", "push", "not.json"], 2, "is not JSON"),
            (["events", "--exec", "true"], 2, "needs --follow"),
            (["restore", "none", "--yes"], 1, "No such file"),
            (["events", "--follow", "--exec", "/no/such"], 2, "can be run"),
            (["threats", "--follow", "--exec", "'"], 2, "can be run"),
            (["threat", "evt_00000000ffff", "--state", "open"], 1, "is not kept"),
            (["enroll", "revoke", "../agents"], 1, "there is no"),
            (["enroll", "issue", "--ttl", "365d"], 2, "at most 90d"),
            (["check", "--data-dir", nowhere], 2, "manager.db"),
            (["backup", "b", "--data-dir", nowhere], 2, "manager.db"),
            (["backup", "none/b"], 1, "none/b cannot be written (No such file"),
            (["backup", "data/token"], 1, "outside of the data folder"),
            (["backup", "/dev/null"], 1, "name a file"), (["--completion", "csh"], 2, "--completion takes")):
        found, out, err = shell(*words)
        assert (found, out) == (status, ""), (words, err)
        assert why in one_line(err) and "secret" not in err, (words, err)
    if url.startswith("https"):
        own = (tmp_path / "data" / "cert.pem")
        own.rename(tmp_path / "cert.pem")
        assert "is not trusted" in one_line(shell("status")[2])
        assert shell("status", "--cacert", tmp_path / "cert.pem")[0] == 0
    monkeypatch.setenv("MANAGER_AUTH_TOKEN", "wrong,other")
    assert "the token is wrong" in shell("agents", "--cacert",
                                         tmp_path / "cert.pem")[2] or url.startswith("http:")
    assert shell("agents", "--nosuch")[0] == 2 and shell("policy")[0] == 2


def test_commands_take_the_token_from_a_file(tmp_path: Path, shell: Any,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("a-token-of-my-own-1,another-of-my-own-2\n")
    (tmp_path / "wrong").write_text("wrong")
    with Server(port=0, data_dir=tmp_path / "data"):
        pass
    with Server(port=0, data_dir=tmp_path / "data", auth_token_file=tmp_path / "mine"):
        assert "the token is wrong; name the file" in one_line(shell("agents")[2])
        assert shell("status", "--token-file", "mine")[0] == 0
        assert "none: No such file" in one_line(shell("status", "--token-file", "none")[2])
        monkeypatch.setenv("MANAGER_AUTH_TOKEN_FILE", str(tmp_path / "mine"))
        assert shell("status")[0] == 0
        assert "the token is wrong" in shell("status", "--token-file", "wrong")[2]
        monkeypatch.setenv("MANAGER_AUTH_TOKEN", "wrong")
        assert "the token is wrong" in shell("status")[2]
        assert shell("status", "--token-file", "mine")[0] == 0


def test_a_backup_says_which_files_it_holds(tmp_path: Path, shell: Any) -> None:
    for tls, held in (("off", "manager.db"), ("auto", "manager.db cert.pem key.pem")):
        with Server(port=0, data_dir=tmp_path / "data", tls=tls, auth_token="a-token-of-my-own"):
            assert re.search(rf"^holds +{held}$", shell("backup", "b")[1], re.MULTILINE)
    assert re.search(r"^holds +manager.db$", shell("backup", "b", "--db-only")[1], re.MULTILINE)


@pytest.mark.parametrize("words", [["status"], ["status", "-q"], ["doctor"]])
def test_commands_say_that_the_manager_is_unhealthy(words: list[str], tmp_path: Path, shell: Any) -> None:
    with Server(port=0, data_dir=tmp_path / "data", clock=ManualClock()) as server, locked(tmp_path / "data"):
        server.clock.advance(10)
        status, out, err = shell(*words)
        assert (status, out) == (1, "")
        assert "the manager is unhealthy: the database is not available: another" in one_line(err)


@pytest.mark.parametrize(("word", "near"), [
    ("docter", "did you mean doctor?"), ("xyzzy", "--help lists them")])
def test_an_unknown_command_is_refused_with_the_nearest_one(word: str, near: str, shell: Any) -> None:
    status, out, err = shell(word)
    assert (status, out) == (2, "")
    assert f"there is no command '{word}'; {near}" in one_line(err)


def test_a_command_says_that_the_certificate_has_other_names(tmp_path: Path, shell: Any,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(port=0, data_dir=tmp_path / "data", host="0.0.0.0", tls="auto") as server:
        monkeypatch.setenv("MANAGER_URL", f"https://127.0.0.2:{port_of(server.url)}")
        assert "--tls-name 127.0.0.2" in one_line(shell("status")[2])
        monkeypatch.setenv("MANAGER_URL", server.url)
        monkeypatch.setenv("MANAGER_CACERT", str(tmp_path / "data/cert.pem"))
        assert shell("status", "--token", server.token, "--data-dir", tmp_path / "none")[0] == 0
        monkeypatch.delenv("MANAGER_CACERT")
        refused = shell("status", "--token", server.token, "--data-dir", tmp_path / "none")[2]
        assert "name its file with --cacert" in one_line(refused)


@pytest.mark.parametrize("words", [["policy", "push", "policy.json"], ["policy", "drop", "web-1"]])
def test_a_policy_is_issued_for_all_or_dropped_after_a_yes(words: list[str], furnished: Client,
                                                           shell: Any) -> None:
    before = furnished.get("/api/policy")
    status, out, err = shell(*words)
    assert (status, out) == (2, "") and "Add --yes" in one_line(err)
    assert furnished.get("/api/policy") == before
    assert shell(*words, "--yes")[0] == 0
    assert len(furnished.get("/api/policy")) == len(before) + 1


def test_a_policy_for_some_agents_is_issued_without_a_question(furnished: Client, shell: Any) -> None:
    for scope in (["--agent", "web-1"], ["--org-id", "o"], ["--dry-run"]):
        assert shell("policy", "push", "policy.json", *scope)[0] == 0


def test_a_command_says_that_a_server_is_no_manager(shell: Any, tmp_path: Path) -> None:
    shapes = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body) for body in (
        b"[]", b"null", b'{"data": null}', b'{"data": 5}', b'{"data": "x"}', b'{"data": [null]}',
        b'{"data": [{}]}', b"[" * 5000)]
    answers = (*shapes, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
               b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n",
               b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", b"\x00\x01", b"HTTP/1.1 400 \x1b[2J\r\n"
               b"Content-Length: 22\r\n\r\n{\"error\":\"\\u001b[31m\"}")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def serve() -> None:
            for answer in answers:
                with contextlib.closing(listening.accept()[0]) as client:
                    client.recv(65536)
                    client.sendall(answer)
        thread = threading.Thread(target=serve)
        thread.start()
        for _ in answers:
            status, _, err = shell("agents", "--url", f"http://127.0.0.1:{listening.getsockname()[1]}",
                                   "--token", "t")
            assert status in (1, 2) and "\x1b" not in one_line(err)
        thread.join()


def drawn(columns: int, *words: str, **environ: str) -> str:
    """What a command draws on a terminal of so many columns."""
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, manager.__file__, *words], stdout=theirs,
                               stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": str(columns),
                                                            "LINES": "24", **environ})
    os.close(theirs)
    out = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while block := os.read(ours, 65536):
            out += block
    os.close(ours)
    _, err = process.communicate(timeout=LIMIT_S)
    assert not err
    return out.decode().replace("\r\n", "\n")


HOSTILE_NAMES = ("<b>\u202eevil", "\u0085x", "a\u200bb", "\U000e0041tag", "\ufeffbom")


@pytest.mark.parametrize("columns", [80, 200])
def test_tables_are_aligned_whatever_the_hostnames_and_fit_a_terminal(columns: int, managed: Client,
                                                                      tmp_path: Path) -> None:
    names = ["資料庫主機-一", "web-1", "Å-combining-a\u0301", "x" * 120]
    for name in names:
        managed.register(hostname=name, tags=["正式環境", "web"])
    lines = drawn(columns, "agents", NO_COLOR="1", MANAGER_DATA_DIR=str(tmp_path / "data")).splitlines()
    assert len(lines) == 5 and max(map(manager.display_width,
                                       lines)) <= columns and "\x1b" not in "".join(lines)
    start = manager.display_width(lines[0].partition("ADDRESS")[0])
    for line in lines[1:]:
        before = line.rpartition("198.51.")[0] if "198.51." in line else line[:start]
        assert manager.display_width(before) == start, line
    coloured = drawn(columns, "agents", NO_COLOR="", MANAGER_DATA_DIR=str(tmp_path / "data"))
    assert "\x1b[32monline\x1b[0m" in coloured
    piped = subprocess.run([sys.executable, manager.__file__, "agents", "--data-dir", tmp_path / "data"],
                           capture_output=True, text=True, check=True)
    assert "x" * 120 in piped.stdout and "\x1b" not in piped.stdout, "cut on a terminal only"


def test_what_agents_send_never_controls_the_terminal(managed: Client, shell: Any) -> None:
    for number, name in enumerate(HOSTILE_NAMES):
        with contextlib.suppress(AssertionError):  # control characters are refused; what is left is shown
            agent = managed.register(hostname=name, machine_id=f"m{number}")
            report(managed, agent, threat(type=f"t{name}", sourceIp=name))
    assert len(managed.get("/api/agents")) >= 4
    for words in (["agents"], ["status"], ["threats"], ["events"], ["agent", "<b>"], ["doctor", "<b>"]):
        out, err = shell(*words)[1:]
        assert out and not err, (words, err)
        assert not [each for each in out if each != "\n" and unicodedata.category(each)[0] == "C"], words


def test_events_are_followed_and_handed_to_a_command_one_at_a_time(tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    script = tmp_path / "hear.py"
    script.write_text(f"import sys; open({str(heard)!r}, 'a').write(sys.stdin.read())")
    folder = tmp_path / "data"
    port = 0
    follower: Any = None

    def heard_lines() -> list[str]:
        return heard.read_text().splitlines() if heard.exists() else []
    try:
        for round_number in range(2):
            with Running(folder, "--port", str(port)) as running:
                port = running.port
                token = running.token
                if follower is None:
                    follower = subprocess.Popen([
                        sys.executable, manager.__file__, "events", "--follow", "--type", "policy_created",
                        "--data-dir", folder, "--exec", shlex.join([sys.executable, str(script)])],
                        stderr=subprocess.PIPE, text=True, preexec_fn=interruptible)
                    until(lambda: "_open 1\n" in scraped(running), "the follower is there")
                assert tls_ask(running, folder, "POST", "/api/policy",
                               {"name": f"p{round_number}", "rules": [RULE]}, token) == 201
                until(lambda heard_before=round_number: len(heard_lines()) > heard_before, "it was heard")
                assert running.end() == 0
        assert [json.loads(line)["name"] for line in heard_lines()] == ["p0", "p1"]
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=LIMIT_S)
        assert follower.returncode == 0 and "trying again" in err
    finally:
        if follower:
            follower.kill()
            follower.wait()


def test_threats_are_followed_one_by_one_as_they_match(tmp_path: Path) -> None:
    with Server(port=0, data_dir=tmp_path / "data", tls="off") as server:
        agent = server.manager.register("web-1", "linux", "1").agent
        server.manager.report_events(agent.id, [threat(severity="critical", type="before")])
        with interrupted("threats", "--follow", "--severity", "critical", "--data-dir", tmp_path / "data",
                         "--json") as follower:
            until(lambda: "_open 1\n" in scraped(server), "the follower is there")
            for batch in ([("low", "a"), ("critical", "b"), ("critical", "c")], [("low", "d")],
                          [("critical", "e")]):
                server.manager.report_events(agent.id, [
                    threat(severity=severity, type=name) for severity, name in batch])
            found = [json.loads(follower.stdout.readline())["type"] for _ in range(3)]
            assert found == ["b", "c", "e"]


def test_a_command_whose_reader_leaves_ends(tmp_path: Path) -> None:
    with Server(port=0, data_dir=tmp_path / "data", tls="off") as server:
        for number in range(3):
            server.manager.register(f"h\u00e9-{number}", "linux", "1")
        python = f"{sys.executable} {manager.__file__}"
        environ = {**os.environ, "MANAGER_DATA_DIR": str(tmp_path / "data")}
        either = "h.xe9-2\\|h.u00e9-2"
        for line, status in ((f"{python} agents | true", 0), (f"{python} --completion bash | true", 0),
                             (f"{python} agents > /dev/full", 1), (f"{python} agents >&-", 0),
                             (f"PYTHONIOENCODING=ascii {python} agents --json | grep -q '{either}'", 0),
                             (f"PYTHONIOENCODING=ascii {python} agents | grep -q 'h.xe9-2'", 0)):
            done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True,
                                  check=False, timeout=LIMIT_S, env=environ)
            assert (done.returncode, "Traceback" in done.stderr) == (status, False), (line, done.stderr)
        follower = subprocess.Popen(["bash", "-c", f"{python} events --follow | head -1"],
                                    stdout=subprocess.PIPE, env=environ)
        try:
            until(lambda: "_open 1\n" in scraped(server), "the follower is there")
            until(lambda: server.manager.create_policy("p", [RULE]) and follower.poll() is not None,
                  "it has ended")
            assert follower.returncode == 0
        finally:
            follower.kill()
            follower.communicate()


def tls_ask(running: Running, folder: Path, method: str, path: str, body: Any, token: str) -> int:
    """The status of a request over TLS, trusting the folder's certificate."""
    request_ = urllib.request.Request(running.url + path, json.dumps(body).encode(), method=method, headers={
        "Authorization": f"Bearer {token}", "Content-Type": "application/json"})
    context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    with urllib.request.urlopen(request_, context=context, timeout=LIMIT_S) as answer:
        return int(answer.status)


def scraped(running: Running | Server) -> str:
    """The metrics of a running manager."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(running.url), timeout=LIMIT_S)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {running.token}"})
        return connection.getresponse().read().decode()


def test_doctor_tells_what_happened_to_an_agent_and_what_to_do(managed: Client, shell: Any) -> None:
    clock = managed.server.clock
    others = [managed.register(hostname=f"other-{number}", version="2.0") for number in range(2)]
    agent = managed.register(hostname="web-1", machine_id="m", ip="192.0.2.1")
    status, out, _ = shell("doctor", "web-1")
    assert status == 0 and "online: not heard since it registered" in out and "makes it stale at" in out
    assert "it runs version 1.2.0, 2 agents run 2.0: upgrade" in out
    assert shell("doctor")[:2] == (0, "no agent is silent\n")
    managed.beat(agent)
    policy(managed)
    managed.register(hostname="web-1-clone", machine_id="m")
    managed.call("POST", f"/api/agents/{agent['id']}/heartbeat", {}, token="wrong", status=401)
    report(managed, agent, {**THREAT, "timestamp": "2026-03-07T18:00:00Z"})
    clock.advance(400)
    managed.post("/api/agents/register", {**AGENT, "hostname": "web-2", "machine_id": "m", "ip": "192.0.2.2"})
    clock.advance(67)
    status, out, _ = shell("doctor", "web-2")
    for finding in ("stale: last heartbeat", "see whether the machine runs", "it came back, from 192",
                    "(wrong_token)", "it has policy none, and 1 newer ones wait",
                    "formerly as web-1 from 192.0.2.1", "it went offline", "is off by 21600 s",
                    "it reported 1 threats, the worst high"):
        assert finding in out, (finding, out)
    assert status == 3
    (one,) = json.loads(shell("doctor", "web-2", "--json")[1])
    findings = one["findings"]
    assert one["id"] == agent["id"] and agent["id"] in shell("doctor")[1]
    assert len(findings) >= 8 and findings[0]["finding"].startswith("stale: ")
    instants = [manager.instant_ms(each["at"]) for each in findings[1:]]
    assert instants == sorted(instants, reverse=True)
    for number in range(40):
        managed.beat(others[0], version=f"3.{number}")
    clock.advance(61)
    managed.beat(others[0], version="4")
    assert re.search(r"[0-9]+ entries were suppressed", shell("doctor", "other-0")[1])


def test_doctor_puts_the_cause_of_silence_first(managed: Client, shell: Any) -> None:
    quiet, refused = (managed.register(hostname=name) for name in ("quiet", "refused"))
    for token, status in ((refused["token"], 200), ("wrong", 401)):
        managed.server.clock.advance(10)
        managed.call("POST", f"/api/agents/{refused['id']}/heartbeat", {}, token=token, status=status)
    managed.call("PATCH", f"/api/agents/{quiet['id']}", {"addTags": ["new"]})
    managed.server.clock.advance(400)
    since = managed.journal("agent_refused")[-1]["at"]
    managed.call("POST", f"/api/agents/{refused['id']}/heartbeat", {}, token="wrong", status=401)
    lines = shell("doctor", "refused")[1].splitlines()
    assert f"; since {since} its requests are refused (wrong_token): give it" in lines[1]
    assert "see whether the machine runs" not in "".join(lines)
    lines = shell("doctor", "quiet")[1].splitlines()
    assert f"offline: not heard since it registered at {START_ISO[11:]}, due by" in lines[1]
    assert "see whether the machine runs" in lines[1] and "tags=" not in "".join(lines)


def test_events_show_who_did_it_from_where_and_with_which_token(managed: Client, shell: Any) -> None:
    managed.register()
    actor = managed.journal("agent_registered")[0]["actor"]
    assert set(actor) == {"role", "address", "credential"}
    assert " ".join(actor.values()) in shell("events", "--type", "agent_registered")[1]


def test_an_issued_token_and_its_line_register_an_agent(managed: Client, shell: Any, tmp_path: Path) -> None:
    token = shell("enroll", "issue", "--uses", 2, "--ttl", "2h", "--org-id", "o", "--tag", "t",
                  "--note", "n", "-q")[1]
    made = managed.post("/api/agents/register", AGENT, token=token.strip(), status=201)
    assert (made["org_id"], made["tags"]) == ("o", ["t"])
    (listed,) = json.loads(shell("enroll", "list", "--json")[1])
    assert (listed["uses"], listed["maxUses"], listed["note"]) == (1, 2, "n")
    warning, said, line = shell("enroll", "issue")[1].splitlines()
    assert "No other host reaches" in warning and "registers 1 agent until" in said
    if shutil.which("curl") and shutil.which("hostname"):
        if managed.server.certificate:
            shutil.copy(tmp_path / "data" / "cert.pem", tmp_path / "manager.pem")
        pasted = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=LIMIT_S,
                                check=False, cwd=tmp_path)
        assert json.loads(pasted.stdout)["data"]["hostname"] == socket.gethostname(), pasted.stderr


@pytest.mark.parametrize(("settings", "host"), [
    ({"host": "0.0.0.0", "tls_name": "manager.example.org,fleet"}, "manager.example.org"),
    ({"host": "0.0.0.0"}, None),
    ({"host": "127.0.0.2", "tls_name": "manager.example.org"}, "127.0.0.2")])
def test_commands_tell_other_hosts_an_address_that_they_reach(settings: Any, host: str | None, shell: Any,
                                                              tmp_path: Path) -> None:
    with Server(port=0, data_dir=tmp_path / "data", clock=ManualClock(), tls="auto", **settings) as server:
        agent = server.manager.register(**AGENT).agent
        server.clock.advance(400)
        url = f"https://{host or manager.outer_address() or socket.gethostname()}:{port_of(server.url)}"
        *before, line = shell("enroll", "issue")[1].splitlines()
        assert f" -X POST {url}/api/agents/register " in line and "--cacert manager.pem" in line
        assert len(before) == (2 if host == "127.0.0.2" else 1)
        assert f"it reaches {url}" in shell("doctor", agent.id)[1]
        given = shell("enroll", "issue", "--url", server.url, "--cacert", tmp_path / "data/cert.pem")[1]
        assert f"curl --cacert manager.pem -X POST {server.url}/" in given


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_a_shell_completes_every_command_and_option(name: str, shell: Any) -> None:
    status, out, _ = shell("--completion", name)
    words = set(re.findall(r"[\w-]+", out))
    assert status == 0 and {part for each in manager.COMMANDS
                            for part in each.split()} | {"serve", "--silent"} <= words
    if shutil.which(name):
        assert subprocess.run([name, "-n"], input=out, text=True, check=False).returncode == 0


def test_help_names_every_command(shell: Any) -> None:
    status, out, _ = shell("--help")
    assert status == 0 and all(f"  {each.name}" in out and each.summary in out
                               for each in manager.COMMANDS.values())
    assert shell("serve", "--help")[1] == out


def test_demo_has_a_fleet_with_a_life_of_its_own(tmp_path: Path) -> None:
    clock = ManualClock()
    with Server(port=0, clock=clock, heartbeat_timeout_ms=10_000) as server:
        demo = manager.Demo(server.manager)
        for _ in range(120):
            demo.step()
            clock.advance(1)
        found = Counter(entry.type for entry in server.manager.journal())
        assert server.manager.census().agents[Status.ONLINE] >= 30 and found["agent_registered"] == 40
        assert {"agent_stale", "agent_online", "threats_reported", "threats_correlated"} <= set(found)
        assert any(agent.acknowledged for agent in server.manager.agents()[0])


def test_demo_prints_its_address_and_token_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    with interrupted("demo", HOME=str(tmp_path)) as process:
        found = re.search(r"(http://\S+) .* token (\S+);", process.stdout.readline())
        status, body = ask(port_of(found[1]), "GET", "/api/agents", token=found[2])
        assert status == 200 and len(body["data"]) == 40
    assert not list(tmp_path.iterdir()), "nothing is left behind"


# Backup, restore and check


def held_by(server: Server) -> dict[str, Any]:
    """What a manager keeps, as its API shows it."""
    api = Client(server)
    return {path: api.get(path) for path in ("/api/agents?detail=true", "/api/threats", "/api/policy")}


@pytest.mark.parametrize("db_only", [False, True])
def test_a_backup_is_restored_elsewhere_with_all_it_held(db_only: bool, furnished: Client, shell: Any,
                                                        tmp_path: Path) -> None:
    held, seqs = held_by(furnished.server), [entry["seq"] for entry in furnished.journal()]
    only = ["--db-only"] * db_only
    status, out, err = shell("backup", "kept", "--json", *only)
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said.pop("file") == str(tmp_path / "kept") and ("token" in said.pop("holds")) is not db_only
    assert said == {"schema": len(manager.MIGRATIONS), "agents": 2, "threatEvents": 1, "policies": 3,
                    "journalEntries": seqs[-1]}
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"data", "kept", "policy.json"}, "no work is left"
    furnished.register(hostname="later")
    assert shell("check")[:2] == (0, f"sound: schema {len(manager.MIGRATIONS)}, agents 3, threatEvents 1, "
                                     f"policies 3, journalEntries {seqs[-1] + 1}\n")
    other = tmp_path / "other"
    assert shell("restore", "kept", "--data-dir", other, "--yes")[0] == 0
    token = furnished.server.token
    with Server(port=0, clock=furnished.server.clock, data_dir=other, tls="off") as server:
        assert (server.token == token) is not db_only
        assert [each["hostname"] for each in held_by(server)["/api/agents?detail=true"]] == ["db-1", "web-1"]
        for path in ("/api/threats", "/api/policy"):
            assert held_by(server)[path] == held[path]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of files")
def test_what_root_restores_belongs_to_the_owner_of_the_folder(furnished: Client, shell: Any,
                                                               tmp_path: Path) -> None:
    assert shell("backup", "kept")[0] == 0
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    os.chown(other, 12345, 12346)
    assert shell("restore", "kept", "--data-dir", other, "--yes")[0] == 0
    for name in ("manager.db", "token", "lock"):
        found = (other / name).stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 12346, 0o600)


def test_restoring_keeps_what_it_replaces(tmp_path: Path, shell: Any) -> None:
    folder = tmp_path / "data"
    with Server(port=0, data_dir=folder, tls="off") as server:
        server.manager.register("first", "linux", "1")
        shell("backup", "kept")
        server.manager.register("second", "linux", "1")
        token = server.token
        assert "another manager is running" in one_line(shell("restore", "kept", "--yes")[2])
    assert "Add --yes" in one_line(shell("restore", "kept")[2])
    status, out, _ = shell("restore", "kept", "--yes", "--json")
    former = Path(json.loads(out)["formerFiles"])
    assert status == 0 and former.parent == folder and (former / "token").read_text().strip() == token
    with Server(port=0, data_dir=folder, tls="off") as server:
        assert [agent.hostname for agent in server.manager.agents()[0]] == ["first"] and server.token == token
    with Server(port=0, data_dir=former, tls="off") as server:
        assert [agent.hostname for agent in server.manager.agents()[0]] == ["first", "second"]


def flipped(kept: Path) -> bytes:
    data = bytearray(kept.read_bytes())
    data[data.index(b"SQLite format 3") + 5000] ^= 1
    return bytes(data)


def archived(**members: bytes | None) -> Callable[[Path], bytes]:
    """An archive with these members; None is one that links to itself. Those not named are the good one's."""
    def make(kept: Path) -> bytes:
        made = io.BytesIO()
        with tarfile.open(kept) as whole, tarfile.open(fileobj=made, mode="w") as archive:
            for name in ("manifest.json", "manager.db", "token"):
                member, content = tarfile.TarInfo(name), members.get(name.partition(".")[0], b"")
                if content is None:
                    member.type, member.linkname = tarfile.SYMTYPE, name
                content = content or whole.extractfile(name).read()
                member.size = 0 if member.issym() else len(content)
                archive.addfile(member, io.BytesIO(content))
        return made.getvalue()
    return make


def changed(sql: str) -> Callable[[Path], bytes]:
    """A manager's database after some SQL."""
    def make(kept: Path) -> bytes:
        folder = kept.parent / "hostile"
        with Server(port=0, data_dir=folder, tls="off") as server:
            server.manager.register("h", "linux", "1")
        with contextlib.closing(sqlite3.connect(folder / "manager.db")) as db:
            db.executescript(sql)
        return (folder / "manager.db").read_bytes()
    return make


def made_by(make: Callable[[Path], object]) -> Callable[[Path], bytes]:
    """What a function writes to a path."""
    def read(kept: Path) -> bytes:
        make(kept.with_name("made"))
        return kept.with_name("made").read_bytes()
    return read


BAD_BACKUPS: dict[str, Callable[[Path], bytes]] = {
    "cut short": lambda kept: kept.read_bytes()[:kept.stat().st_size // 2], "a bit flipped": flipped,
    "empty": lambda kept: b"", "no backup": lambda kept: b"\x89PNG" * 1000,
    "compressed": lambda kept: gzip.compress(kept.read_bytes()),
    "another program's": made_by(other_program), "a newer manager's": made_by(newer_file),
    "a manifest that is no object": archived(manifest=b"[]"), "a null manifest": archived(manifest=b"null"),
    "a deep manifest": archived(manifest=b"[" * 100_000), "a link to itself": archived(manager=None),
    "a hostile trigger": changed("CREATE TRIGGER t AFTER INSERT ON journal BEGIN DELETE FROM agents; END"),
    "a table in another form": changed("DROP TABLE journal; CREATE TABLE journal (seq TEXT)"),
    "a schema below 1": changed("PRAGMA user_version = -3")}


@pytest.mark.parametrize("kind", BAD_BACKUPS)
def test_a_bad_backup_is_refused_and_nothing_is_replaced(kind: str, tmp_path: Path, shell: Any) -> None:
    with Server(port=0, data_dir=tmp_path / "data", tls="off") as server:
        server.manager.register("first", "linux", "1")
        assert shell("backup", "kept")[0] == 0
    before = contents(tmp_path / "data")
    (tmp_path / "kept").write_bytes(BAD_BACKUPS[kind](tmp_path / "kept"))
    status, out, err = shell("restore", "kept", "--yes")
    assert (status, out) == (1, "") and one_line(err)
    after = contents(tmp_path / "data")
    assert {name: after[name] for name in before if name != "lock"} == {
        name: before[name] for name in before if name != "lock"}
    assert not [path for path in (tmp_path / "data").iterdir() if "restore" in path.name]


@pytest.mark.parametrize("options", [[], ["--db-only"]], ids=["all", "database"])
def test_check_proves_a_backup_and_leaves_nothing_beside_it(
        options: list[str], tmp_path: Path, shell: Any) -> None:
    with Server(port=0, data_dir=tmp_path / "data", tls="off") as server:
        server.manager.register(**AGENT)
    backup = tmp_path / "kept" / "panguard.backup"
    backup.parent.mkdir()
    assert shell("backup", backup, *options)[0] == 0
    status, said, _ = shell("check", backup)
    assert status == 0 and said.startswith("sound: schema") and "agents 1" in said
    assert shell("check", backup, "--json") == shell("check", "--json")
    whole = backup.read_bytes()
    half = whole[:len(whole) // 2]
    for broken in (half, half + bytes(len(whole) - len(half)), b"", b"x" * 5000):
        backup.write_bytes(broken)
        status, said, error = shell("check", backup)
        assert (status, said) == (3, "") and str(backup) in error and one_line(error)
    assert list(backup.parent.iterdir()) == [backup]
    backup.unlink()
    assert shell("check", backup)[0] == 1


def test_damage_is_found_by_check_and_is_not_backed_up(tmp_path: Path, shell: Any) -> None:
    folder = tmp_path / "data"
    with Server(port=0, data_dir=folder, tls="off") as server:
        for number in range(50):
            server.manager.register(f"h{number}", "linux", "1")
    file = folder / "manager.db"
    whole = file.read_bytes()
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.execute("DELETE FROM journal WHERE seq = 20")
        db.commit()
    status, _, err = shell("check")
    assert status == 3 and "the journal lacks 1 entries between 1 and" in one_line(err)
    file.write_bytes(whole[:20 * 1024] + b"\xff" * 4096 + whole[24 * 1024:])
    status, _, err = shell("check")
    assert status == 3 and "damaged" in one_line(err)
    file.chmod(0)
    if os.geteuid():
        assert shell("check")[0] == 1 and "may read it" in shell("check")[2]
    file.chmod(0o600)
    (tmp_path / "kept").write_text("a former backup")
    status, _, err = shell("backup", "kept")
    assert status == 1 and one_line(err) and (tmp_path / "kept").read_text() == "a former backup"


@pytest.mark.parametrize("how", ["killed", "an error", "interrupted"])
@pytest.mark.parametrize("renames", range(9))
def test_a_restore_cut_short_loses_nothing_and_lets_no_manager_start(
        renames: int, how: str, tmp_path: Path, shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    with Server(port=0, data_dir=folder, tls="auto") as server:
        server.manager.register("first", "linux", "1")
        shell("backup", "kept")
        server.manager.register("second", "linux", "1")
        token = server.token
    rename, done = Path.rename, [0]

    def cut(self: Path, target: Path) -> Path:
        if done[0] == renames:
            if how == "killed":
                os._exit(9)
            done[0] = 99
            raise KeyboardInterrupt if how == "interrupted" else OSError(errno.EIO, "Input/output error")
        done[0] += 1
        return rename(self, target)

    pid = os.fork() if how == "killed" else 0
    if not pid:
        monkeypatch.setattr(Path, "rename", cut)
        status, _, err = shell("restore", "kept", "--yes")
        monkeypatch.undo()
        if how == "killed":
            os._exit(0)
        assert status == (0 if renames == 8 else 130 if how == "interrupted" else 1), err
    else:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (0 if renames == 8 else 9)
    monkeypatch.setenv("MANAGER_DATA_DIR", str(folder))
    if how == "killed" and renames < 8:
        with pytest.raises(StartError, match="a restore was cut short"):
            Server(port=0, data_dir=folder).start()
        assert shell("restore", tmp_path / "kept", "--yes")[0] == 0
    with Server(port=0, data_dir=folder) as server:
        assert server.token == token
        hostnames = [agent.hostname for agent in server.manager.agents()[0]]
        assert hostnames == (["first"] if renames == 8 or how == "killed" else ["first", "second"])


def test_a_restore_is_refused_while_a_manager_runs_whose_lock_was_removed(tmp_path: Path, shell: Any) -> None:
    with Running(tmp_path / "data", MANAGER_TLS="off") as running:
        assert shell("backup", "kept")[0] == 0
        (tmp_path / "data" / "lock").unlink()
        assert "another manager is running" in one_line(shell("restore", "kept", "--yes")[2])
        assert running.ask("GET", "/health")[0] == 200


def test_a_database_with_its_log_is_restored_with_what_is_in_the_log(tmp_path: Path, shell: Any) -> None:
    with Running(tmp_path / "data", MANAGER_TLS="off") as running:
        for _ in range(20):
            assert running.ask("POST", "/api/agents/register", AGENT)[0] == 201
    assert (tmp_path / "data" / "manager.db-wal").stat().st_size
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    status, out, _ = shell("restore", "copy/manager.db", "--yes", "--json", "--data-dir", tmp_path / "other")
    assert status == 0 and json.loads(out)["agents"] == 20


def test_a_token_that_is_a_link_is_backed_up_and_kept(tmp_path: Path, shell: Any) -> None:
    folder = tmp_path / "data"
    with Server(port=0, data_dir=folder, tls="off") as server:
        token = server.token
    (folder / "token").rename(tmp_path / "secret")
    (folder / "token").symlink_to("../secret")
    for only in ([], ["--db-only"]):
        assert shell("backup", "kept", *only)[0] == 0 and shell("restore", "kept", "--yes")[0] == 0
        with Server(port=0, data_dir=folder, tls="off") as server:
            assert server.token == token


def test_a_backup_without_room_leaves_no_file_of_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with Server(port=0, data_dir=folder, tls="off") as server:
        server.manager.register("first", "linux", "1")
    target = tmp_path / "kept"
    done = subprocess.run(["bash", "-c",
                           f"ulimit -f 16; exec {sys.executable} {manager.__file__} backup {target} "
                           f"--data-dir {folder}"], capture_output=True, text=True, check=False,
                          timeout=LIMIT_S)
    assert done.returncode == 1 and one_line(done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_the_manager_makes_backups_by_itself_and_keeps_the_latest(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()

    def names() -> list[str]:
        return sorted(path.name for path in kept.glob("panguard-*.backup"))

    began_s = time.time()
    with Server(port=0, data_dir=tmp_path / "data", tls="off", backup_dir=kept, backup_every_ms=1000,
                backup_keep=2) as server:
        until(lambda: len(names()) == 2, "two backups")
        first = names()[0]
        until(lambda: first not in names(), "the oldest is removed")
        assert len(names()) <= 3 and "backups_failed 0" in scraped(server)
        assert float(re.search(r"backup_proved_timestamp_seconds ([0-9.]+)",
                               scraped(server))[1]) > began_s - 1
        kept.rename(tmp_path / "moved")
        kept.write_text("a file in its place")
        until(lambda: re.search(r"backups_failed [1-9]", scraped(server)), "it fails")
        kept.unlink()
        kept.mkdir()
        until(lambda: "backups work again" in caplog.text, "the log says that it works again")
        assert "backups_failed 0" in scraped(server)
    assert manager.unpack(sorted((tmp_path / "moved").iterdir())[-1],
                          tmp_path)["schema"] == len(manager.MIGRATIONS)


def test_managers_that_share_a_backup_folder_keep_each_others_backups(tmp_path: Path) -> None:
    kept, settings = tmp_path / "kept", {"port": 0, "tls": "off", "backup_dir": tmp_path / "kept"}
    kept.mkdir()

    def names() -> set[str]:
        return {path.name for path in kept.glob("panguard-*.backup")}
    with Server(data_dir=tmp_path / "one", backup_every_ms=1000, backup_keep=1, **settings):
        until(names, "the first manager's backup")
    theirs = names()
    with Server(data_dir=tmp_path / "two", backup_every_ms=1000, backup_keep=1, **settings):
        second = until(lambda: names() - theirs, "the second manager's backup")
        until(lambda: not names() & second, "the second removes its own")
        assert names() >= theirs
    with Server(data_dir=tmp_path / "one", backup_every_ms=1000, backup_keep=1, **settings):
        until(lambda: not names() & theirs, "after a restart, too, the first removes its own")


def test_a_folder_for_backups_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    missing = tmp_path / "disk that is not mounted" / "kept"
    with pytest.raises(StartError, match="MANAGER_BACKUP_DIR") as refused:
        Server(port=0, data_dir=tmp_path / "data", tls="off", backup_dir=missing).start()
    assert str(missing) in str(refused.value) and not missing.parent.exists()


def test_backups_by_itself_leave_alone_what_is_not_theirs(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("panguard-1.2.0-before-upgrade.backup", "panguard-x.backup", "other"):
        (kept / name).write_text("not the manager's")
    (kept / "panguard-y.backup").symlink_to("nowhere")
    (kept / "panguard-z.backup").mkdir()
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "backup-id").write_text("0123abcd")
    future = kept / "panguard-0123abcd-20990101T000000Z.backup"
    future.write_text("of a clock that was wrong")
    os.utime(future, (time.time() + 10**9,) * 2)
    left = kept / ".panguard-killed"
    left.mkdir()
    (left / "manager.db").write_text("a copy")
    os.utime(left, (time.time() - 2 * 86_400,) * 2)
    with Server(port=0, data_dir=tmp_path / "data", tls="off", backup_dir=kept, backup_every_ms=1000,
                backup_keep=2) as server:
        until(lambda: re.search(r"backup_proved_timestamp_seconds [1-9]", scraped(server)), "it is made")
        until(lambda: not future.exists() or len(list(kept.glob("panguard-0*"))) >= 2, "another")
        assert "backups_failed 0" in scraped(server)
    assert {"panguard-1.2.0-before-upgrade.backup", "panguard-x.backup", "panguard-y.backup",
            "panguard-z.backup", "other"} <= {path.name for path in kept.iterdir()}
    assert not left.exists() and [path for path in kept.glob("panguard-0*") if path.stat().st_size > 1000]
    with pytest.raises(manager.SettingError, match="must differ"):
        Config(data_dir=tmp_path, backup_dir=tmp_path)


def test_a_backup_within_traffic_has_all_that_was_acknowledged_before_it(tmp_path: Path, shell: Any) -> None:
    with Server(port=0, data_dir=tmp_path / "data", tls="off") as server:
        over, made = threading.Event(), list[str]()

        def work(name: int) -> None:
            number = 0
            while not over.is_set():
                number += 1
                agent = server.manager.register(f"{name}-{number}", "linux", "1").agent
                server.manager.report_events(agent.id, [THREAT])
                made.append(agent.id)

        with ThreadPoolExecutor(3) as pool:
            for name in range(3):
                pool.submit(work, name)
            try:
                for number in range(4):
                    until(lambda number=number: len(made) > 40 * number, "traffic")
                    before = set(made)
                    assert shell("backup", f"kept{number}")[0] == 0
                    assert shell("restore", f"kept{number}", "--yes", "--data-dir",
                                 tmp_path / f"r{number}")[0] == 0
                    with Server(port=0, data_dir=tmp_path / f"r{number}", tls="off") as other:
                        assert before <= {agent.id for agent in other.manager.agents()[0]}
            finally:
                over.set()


# A sound body for every route that takes one: a route that has none fails the tests of validation.
FIRST_EVENT = "evt_000000000001"  # the first threat event that a manager is told of


@contextlib.contextmanager
def fleet(address: str = "198.51.100.7", **config: Any) -> Iterator[Client]:
    """A client of a manager of its own, with these settings and a clock that the test moves."""
    with Server(port=0, clock=ManualClock(), **config) as server:
        client = Client(server, address)
        client.app = TestApp(manager.create_app(server.manager, server.config.auth_token or (server.token,)),
                             extra_environ={"REMOTE_ADDR": address})
        yield client


def seen_from(api: Client, address: str) -> Client:
    """The same application, called from another address."""
    other = Client(api.server, address)
    other.app = TestApp(api.app.app, extra_environ={"REMOTE_ADDR": address})
    return other


def advance(api: Client, seconds: float) -> None:
    assert isinstance(api.server.clock, ManualClock)
    api.server.clock.advance(seconds)


def threat(*, type: str = "brute_force", severity: str = "high", own: str | None = None,
           **details: Any) -> Any:
    return {"type": type, "severity": severity, "details": details, **({"id": own} if own else {})}


def report(api: Client, agent: Any, *events: Any) -> Any:
    """The ids of events that an agent reports with its own token."""
    answer = api.call("POST", f"/api/agents/{agent['id']}/events", {"events": list(events)},
                      token=agent["token"], status=201).json["data"]
    assert answer["received"] == len(events) == len(answer["eventIds"])
    return answer["eventIds"]


def policy(api: Client, *types: str, **fields: Any) -> Any:
    """A policy of rules of these types."""
    return api.post("/api/policy", {"name": "p", "rules": [{"type": each, "config": {}} for each
                                                           in types or ["custom"]],
                                    **fields}, status=201)


def stored(api: Client, agent: Any) -> Any:
    """All that can be read of what is stored."""
    return [api.get(path) for path in ("/api/agents", f"/api/agents/{agent['id']}", "/api/threats?limit=200",
                                       "/api/policy", "/api/events?limit=200")]


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged with a traceback or as an error."""
    return [each.getMessage() for each in caplog.records if each.exc_info or each.levelno >= logging.ERROR]


def exactly(actual: Any, expected: Any) -> None:
    """Equal, and in the same order of fields, and with the same kinds of number."""
    assert json.dumps(actual, indent=1) == json.dumps(expected, indent=1)


# 10  Dashboard ########################################################################################


HOSTILE = "<img src=x onerror=alert(1)>\"'`${1}</script><script>alert(2)</script>&amp;"


def test_the_page_is_the_same_in_every_process() -> None:
    show = "import hashlib, manager; print(hashlib.sha256(manager.DASHBOARD).hexdigest())"
    pages = {subprocess.run([sys.executable, "-c", show], cwd=PROJECT,
                            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True,
                            check=True).stdout for seed in ("1", "2", "3")}
    assert len(pages) == 1


def test_dashboard_runs_its_own_style_and_script_only(api: Client) -> None:
    answer = api.call("GET", "/", token=None)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().partition(" ")[::2]
                  for part in answer.headers["Content-Security-Policy"].split(";"))
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        hashed = b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{hashed}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert set(re.findall(r"https?://[^\s\"']*", answer.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", answer.text)


def test_dashboard_size(api: Client) -> None:
    assert len(api.call("GET", "/", token=None).body) <= 45 * 1024


def test_overview_names_the_callers_role(api: Client) -> None:
    assert api.call("GET", "/api/overview").headers["X-Caller"] == "admin"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium from the system's packages."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")
    path = shutil.which("chromium")
    if not path:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--no-first-run"])
        yield browser
        browser.close()


class Screen:
    """A browser with one tab on a server's dashboard. What it logs and whom it asks is collected."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.server = server
        self.context = browser.new_context(**{"locale": "en-GB",
                                              "viewport": {"width": 1400, "height": 900}, **options})
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page = self.tab()

    def tab(self) -> Any:
        """A further tab."""
        page = self.context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda said: said.type in ("error", "warning") and self.problems.append(said.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        return page

    def sign_in(self, page: Any = None, *, token: str = "", at: str = "") -> Any:
        """Sign in with the admin's token, or another."""
        page = page or self.page
        page.goto(f"{self.server.url}/{at}")
        page.get_by_label("Token").fill(token or self.server.token)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_text("Live", exact=True).wait_for()
        return page

    def settled(self) -> None:
        """Wait until the view has been read and drawn."""
        self.page.locator("main[aria-busy=false]").wait_for()

    def row(self, hostname: str) -> Any:
        """The fleet's row of an agent."""
        link = self.page.get_by_role("link", name=hostname, exact=True)
        return self.page.get_by_role("row").filter(has=link)


@pytest.fixture
def screen(chromium: Any, server: Server) -> Iterator[Screen]:
    shown = Screen(chromium, server)
    yield shown
    shown.context.close()
    assert not shown.problems
    assert not [url for url in shown.requests if not url.startswith((f"{server.url}/", "data:", "blob:"))]


@pytest.mark.browser
def test_dashboard_sign_in(screen: Screen) -> None:
    page = screen.page
    page.goto(f"{screen.server.url}/")
    page.get_by_label("Token").fill("wrong-token-wrong-token")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("alert").get_by_text("The token is wrong").wait_for()
    until(lambda: not page.wait_for_timeout(10) and screen.problems, "Chromium logs the refusal")
    assert len(screen.problems) == 1 and "401" in screen.problems.pop()
    page.get_by_label("Token").fill(screen.server.token)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text("No agents yet").wait_for()
    page.reload()
    page.get_by_text("No agents yet").wait_for()  # the tab keeps the token
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Token").wait_for()
    page.reload()
    page.get_by_label("Token").wait_for()


@pytest.mark.browser
def test_dashboard_follows_the_fleet(screen: Screen, api: Client, clock: ManualClock) -> None:
    screen.sign_in()
    agent = api.register(hostname="web-1")
    row = screen.row("web-1")
    row.get_by_text("online").wait_for()
    clock.advance(67)
    row.get_by_text("stale").wait_for()
    clock.advance(300)
    row.get_by_text("offline").wait_for()
    until(lambda: screen.page.title().startswith("1 offline"), "the title counts the offline ones")
    api.beat(agent)
    row.get_by_text("online").wait_for()
    api.call("DELETE", f"/api/agents/{agent['id']}")
    screen.page.get_by_text("No agents yet").wait_for()


@pytest.mark.browser
def test_dashboard_shows_hostile_text_as_text(screen: Screen, api: Client) -> None:
    agent = api.register(hostname=HOSTILE, os=HOSTILE, version=HOSTILE, tags=[HOSTILE[:60]], org_id=HOSTILE,
                         arch=HOSTILE, machine_id=HOSTILE)
    api.post(f"/api/agents/{agent['id']}/events", {"events": [{
        "type": HOSTILE, "severity": "high", "details": {"sourceIp": HOSTILE, HOSTILE: HOSTILE},
        "sigmaRuleId": HOSTILE}]}, status=201)
    api.post("/api/policy", {"name": HOSTILE, "rules": [{"type": "custom", "config": {HOSTILE: HOSTILE}}]},
             status=201)
    page = screen.sign_in()
    page.get_by_role("link", name=HOSTILE).first.click()
    page.get_by_role("heading", name=HOSTILE).wait_for()
    for view in page.get_by_role("navigation").get_by_role("link").all_inner_texts():
        page.get_by_role("link", name=view, exact=True).click()
        page.get_by_role("heading", name=view, level=1).wait_for()
        screen.settled()
        assert page.locator("main img, main script").count() == 0


@pytest.mark.browser
def test_dashboard_a_view_that_was_left_does_not_draw_over_the_next(screen: Screen, api: Client) -> None:
    agent = api.register(hostname="web-1")
    page = screen.sign_in()
    held: list[Any] = []
    page.route("**/api/timeline*", lambda route: held.append(route))
    page.goto(f"{api.server.url}/#agent/{agent['id']}")
    until(lambda: not page.wait_for_timeout(10) and held, "the agent is being read")
    page.get_by_role("link", name="Fleet", exact=True).click()
    page.get_by_role("heading", name="Fleet", level=1).wait_for()
    with page.expect_response("**/api/timeline*"):
        held[0].continue_()
    page.wait_for_timeout(200)
    assert page.get_by_role("heading", name="Fleet", level=1).is_visible()


@pytest.mark.browser
def test_dashboard_edits_tags_and_deregisters(screen: Screen, api: Client) -> None:
    agent = api.register(hostname="web-1", tags=["old"])
    page = screen.sign_in(at=f"#agent/{agent['id']}")
    page.get_by_label("New tag").fill("fresh")
    page.get_by_role("button", name="Add tag").click()
    page.get_by_role("button", name="Remove tag fresh").wait_for()
    page.get_by_role("button", name="Remove tag old").click()
    page.get_by_role("button", name="Remove tag old").wait_for(state="detached")
    assert api.get(f"/api/agents/{agent['id']}")["tags"] == ["fresh"]
    page.get_by_role("button", name="Deregister…").click()
    dialog = page.get_by_role("dialog", name="Deregister web-1?")
    dialog.get_by_role("button", name="Cancel").click()
    assert len(api.get("/api/agents")) == 1
    page.get_by_role("button", name="Deregister…").click()
    dialog.get_by_role("button", name="Deregister").click()
    page.get_by_text("No agents yet").wait_for()
    assert api.get("/api/agents") == []


@pytest.mark.browser
def test_dashboard_says_why_an_agent_is_silent_in_the_readers_zone(chromium: Any, server: Server, api: Client,
                                                                   clock: ManualClock) -> None:
    agent = api.register(hostname="web-1")
    clock.advance(10)
    api.call("POST", f"/api/agents/{agent['id']}/heartbeat", {}, token="wrong", status=401)
    clock.advance(400)
    screen = Screen(chromium, server, timezone_id="Asia/Taipei")
    screen.sign_in(at=f"#agent/{agent['id']}")
    why = screen.page.locator("section").filter(has_text="Why it is offline")
    why.get_by_text("Refused since").wait_for()
    shown = why.inner_text()
    assert all(each in shown for each in ("20:00:00", "20:01:06", "20:00:10", "wrong_token"))
    assert not re.search("12:0[0-9]:", shown)
    screen.context.close()


@pytest.mark.browser
def test_dashboard_two_tabs_share_one_stream(screen: Screen, api: Client) -> None:
    def streams() -> int:
        return sum(url.endswith("/api/events/stream") for url in screen.requests)

    first = screen.sign_in()
    second = screen.sign_in(screen.tab())
    assert streams() == 1
    api.register(hostname="web-1")
    for page in (first, second):
        page.bring_to_front()
        page.get_by_role("link", name="web-1").wait_for()
    first.close()
    until(lambda: not second.wait_for_timeout(50) and streams() == 2, "the other tab takes over")
    api.register(hostname="web-2")
    second.get_by_role("link", name="web-2").wait_for()


@pytest.mark.browser
def test_dashboard_comes_back_after_a_restart(chromium: Any, tmp_path: Path) -> None:
    with Server(port=0, data_dir=tmp_path, tls="off") as server:
        port = urlsplit(server.url).port
        screen = Screen(chromium, server)
        page = screen.sign_in()
    page.get_by_text("Reconnecting").wait_for()
    page.get_by_text("as of").wait_for()
    with Server(port=port, data_dir=tmp_path, tls="off") as server:
        Client(server).register(hostname="web-1")
        page.get_by_text("Live", exact=True).wait_for()
        page.get_by_role("link", name="web-1").wait_for()
        screen.context.close()


@pytest.mark.browser
def test_dashboard_has_nothing_that_changes_something_for_a_viewer(chromium: Any) -> None:
    viewer = "viewer-token-viewer-token"
    with Server(port=0, viewer_token=viewer) as server:
        agent = Client(server).register(hostname="web-1", tags=["old"])
        Client(server).post("/api/policy",
                            {"name": "one", "rules": [RULE], "agent_id": agent["id"]}, status=201)
        screen = Screen(chromium, server)
        page = screen.sign_in(token=viewer)
        views = page.get_by_role("navigation").get_by_role("link").all_inner_texts()
        page.get_by_role("link", name="web-1").click()
        page.get_by_role("heading", name="Why it is online").wait_for()
        for view in (None, *views):
            if view:
                page.get_by_role("link", name=view, exact=True).click()
                page.get_by_role("heading", name=view, level=1).wait_for()
                screen.settled()
            for name in ("Deregister", "Add tag", "Remove tag", "Issue", "Drop", "Revoke", "Select"):
                assert page.get_by_role("button", name=name).or_(
                    page.get_by_role("checkbox", name=name)).count() == 0, f"{view}: {name}"
        screen.context.close()
        assert not screen.problems


@pytest.mark.browser
@pytest.mark.skipif("sort" not in ROUTES["GET /api/agents"].query, reason="the manager does not offer it yet")
def test_dashboard_finds_filters_sorts_and_pages(screen: Screen, server: Server, clock: ManualClock) -> None:
    for number in range(120):
        server.manager.register(f"host-{number:03}", ("linux", "darwin")[number % 2], "1.2.0",
                                tags=[f"rack-{number % 3}"])
    page = screen.sign_in()
    rows = page.locator("main tbody tr")
    first = rows.first.get_by_role("link").first
    page.get_by_text("Page 1 of 2").wait_for()
    assert rows.count() == 100
    page.get_by_role("button", name="Next page").click()
    page.get_by_text("Page 2 of 2").wait_for()
    assert rows.count() == 20
    page.get_by_role("button", name="Hostname").click()
    page.get_by_role("columnheader", name="Hostname ▲").wait_for()
    page.get_by_role("button", name="Hostname").click()
    page.get_by_role("columnheader", name="Hostname ▼").wait_for()
    until(lambda: first.inner_text() == "host-119", "the last host comes first")
    page.get_by_role("searchbox").fill("HOST-00")
    page.get_by_text("10 agents").wait_for()
    page.get_by_role("combobox", name="OS").select_option("darwin")
    page.get_by_text("5 agents").wait_for()
    page.get_by_role("textbox", name="Tag", exact=True).fill("rack-0")
    page.get_by_text("2 agents").wait_for()
    page.reload()
    page.get_by_text("2 agents").wait_for()  # the address holds the filters
    assert page.get_by_role("searchbox").input_value() == "HOST-00"
    page.get_by_role("textbox", name="Tag", exact=True).fill("rack-9")
    page.get_by_text("No agent matches.").wait_for()
    page.get_by_role("link", name="Show all").click()
    page.get_by_text("120 agents").wait_for()
    clock.advance(67)
    page.get_by_role("button", name="stale 120").click()
    page.get_by_role("button", name="online 0").click()
    page.get_by_text("No agent matches.").wait_for()


@pytest.mark.browser
def test_dashboard_changes_many_agents_at_once(screen: Screen, api: Client) -> None:
    for number in range(3):
        api.register(hostname=f"web-{number}")
    page = screen.sign_in()
    for hostname in ("web-0", "web-2"):
        page.get_by_label(f"Select {hostname}").check()
    page.get_by_text("2 selected").wait_for()
    page.get_by_label("New tag").fill("fresh")
    page.get_by_role("button", name="Add tag").click()
    dialog = page.get_by_role("dialog", name="Add tag: fresh")
    dialog.get_by_text("2 match, 2 would change.").wait_for()
    dialog.get_by_text("web-2").wait_for()
    api.register(hostname="web-3")
    page.get_by_text("4 agents").wait_for()  # drawn anew: the tag typed is kept
    dialog.get_by_role("button", name="Cancel").click()
    assert not [agent for agent in api.get("/api/agents") if agent["tags"]]
    page.get_by_role("button", name="Add tag").click()
    dialog.get_by_role("button", name="Add tag: fresh").click()
    page.get_by_text("Done: 2 of 2 changed.").wait_for()
    assert [agent["tags"] for agent in api.get("/api/agents")] == [["fresh"], [], ["fresh"], []]
    page.get_by_role("button", name="Deregister…").click()
    page.get_by_role("dialog").get_by_role("button", name="Deregister").click()
    page.get_by_text("2 agents").wait_for()
    assert [agent["hostname"] for agent in api.get("/api/agents")] == ["web-1", "web-3"]


@pytest.mark.browser
@pytest.mark.skipif("PATCH /api/threats/:id" not in ROUTES, reason="the manager does not offer it yet")
def test_dashboard_triage(screen: Screen, api: Client) -> None:
    agents = [api.register(hostname=f"web-{number}") for number in range(3)]
    for agent in agents:
        api.post(f"/api/agents/{agent['id']}/events", {"events": [THREAT, THREAT]}, status=201)
    page = screen.sign_in(at="#threats")
    page.get_by_text("Correlated attack on 3 agents").wait_for()
    rows = page.locator("main tbody tr")
    assert rows.count() == 3
    rows.first.get_by_role("button", name="Open").click()
    page.get_by_role("dialog").get_by_label("State").select_option("false_positive")
    page.get_by_role("dialog").get_by_label("Note").fill("a scan of ours")
    page.get_by_role("dialog").get_by_role("button", name="Save").click()
    page.get_by_text("a scan of ours").wait_for()
    states = [threat["state"] for threat in api.get("/api/threats")]
    assert states == ["false_positive"] * 2 + ["open"] * 4
    rows.first.get_by_title("Same source").click()
    until(lambda: page.get_by_label("Source").input_value() == "203.0.113.9",
          "the source is not what is looked for")
    page.get_by_text("6 threats").wait_for()


@pytest.mark.browser
def test_dashboard_issues_and_drops_a_policy(screen: Screen, api: Client) -> None:
    agent = api.register(hostname="web-1")
    page = screen.sign_in(at="#policies")
    page.get_by_text("Issue a policy").click()
    text = page.get_by_label("Policy as JSON")
    issue = page.get_by_role("button", name="Issue…")
    text.fill('{"name": "broken"')
    assert issue.is_disabled()
    text.fill(json.dumps({"name": "block", "rules": [RULE], "agent_id": agent["id"]}))
    issue.click()
    page.get_by_role("dialog", name="Issue block?").get_by_role("button", name="Issue").click()
    page.get_by_text("0 of 1").wait_for()
    assert api.get("/api/policy")[0]["name"] == "block"
    page.get_by_role("button", name="Drop…").click()
    page.get_by_role("dialog").get_by_role("button", name="Drop").click()
    page.get_by_text("Saved.").wait_for()
    assert api.get(f"/api/policy/agent/{agent['id']}?ack=false")["rules"] == []
    page.get_by_role("row").filter(has_text="v2").wait_for()
    assert page.get_by_role("row").filter(has_text="v2").get_by_role("cell").last.inner_text() == "Changes"


@pytest.mark.browser
def test_dashboard_shows_past_hours(screen: Screen, api: Client, clock: ManualClock) -> None:
    agent = api.register(hostname="web-1")
    clock.advance(400)
    api.beat(agent)
    report(api, agent, threat(severity="high"), threat(severity="low"))
    clock.advance(3600)
    screen.sign_in()
    page = screen.page
    page.goto(f"{api.server.url}/#overview")
    drawn_threats, drawn_agents = (page.get_by_role("img", name=f"{what} per hour")
                                   for what in ("Threats", "Agents"))
    drawn_threats.wait_for()
    assert drawn_threats.locator("rect.high").count() == drawn_threats.locator("rect.low").count() == 1
    assert drawn_agents.locator("rect.offline").count() == 2
    assert drawn_agents.locator("rect.online").count() == 0
    page.goto(f"{api.server.url}/#agent/{agent['id']}")
    strip = page.get_by_role("img", name="24 hours")
    strip.wait_for()
    assert [rect.get_attribute("class") for rect in strip.locator("rect").all()] == [
        "online", "stale", "offline", "online", "stale", "offline"]
    width = strip.bounding_box()["width"]
    last = strip.locator("rect").last.bounding_box()
    assert abs(last["x"] + last["width"] - strip.bounding_box()["x"] - width) < 2, "the strip ends now"


@pytest.mark.browser
def test_dashboard_tells_the_command_for_what_it_shows(screen: Screen, api: Client,
                                                       monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    api.register(hostname="web-1", tags=["it's"])
    screen.sign_in()
    monkeypatch.setenv("MANAGER_URL", api.server.url)
    monkeypatch.setenv("MANAGER_AUTH_TOKEN", api.server.token)
    for view in ("fleet", "fleet?sort=-cpu", "fleet?tag=it's&silent_ms=0&q=web", "fleet?silent_ms=2592000000",
                 "threats?severity=low", "overview", "policies", "journal?type=agent_online"):
        screen.page.goto(f"{api.server.url}/#{view}")
        screen.page.locator("main[aria-busy=false] details.foot pre").last.wait_for(state="attached")
        command = screen.page.locator("details.foot pre").last.text_content()
        assert command.startswith("panguard-manager ") and ("sort=-cpu" not in view or "'-cpu'" in command)
        assert main(shlex.split(command)[1:]) in (0, 3), command
        assert capsys.readouterr().err == "", command


@pytest.mark.browser
def test_dashboard_journal_pauses(screen: Screen, api: Client) -> None:
    page = screen.sign_in(at="#journal")
    api.register(hostname="web-1")
    page.get_by_role("link", name="web-1").wait_for()
    page.get_by_role("button", name="Pause").click()
    api.register(hostname="web-2")
    page.get_by_role("button", name="Go on (1 new)").click()
    page.get_by_role("link", name="web-2").wait_for()


@pytest.mark.browser
def test_dashboard_speaks_chinese_and_turns_dark(screen: Screen, api: Client) -> None:
    api.register(hostname="web-1")
    page = screen.sign_in()
    page.get_by_role("button", name="中文").click()
    for word in ("機群", "威脅", "新增代理"):
        page.get_by_role("link", name=word, exact=True).wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh-Hant"
    page.get_by_role("button", name="深色").click()
    page.get_by_role("button", name="淺色").wait_for()
    page.reload()
    page.get_by_role("link", name="機群", exact=True).wait_for()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


@pytest.mark.browser
@pytest.mark.skipif("q" not in ROUTES["GET /api/agents"].query, reason="the manager does not offer it yet")
def test_dashboard_works_by_keyboard(screen: Screen, api: Client) -> None:
    for number in range(2):
        api.register(hostname=f"web-{number}")
    page = screen.sign_in()
    screen.row("web-1").wait_for()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.type("web")
    page.get_by_text("2 agents").wait_for()
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Export CSV").focus()
    for key in "jjk":
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.textContent") == "web-0"
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keys").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="detached")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="web-0").wait_for()


@pytest.mark.browser
def test_dashboard_sends_nothing_while_idle(screen: Screen, api: Client) -> None:
    api.register(hostname="web-1")
    screen.page.clock.install()
    page = screen.sign_in()
    page.get_by_role("link", name="web-1").wait_for()
    page.clock.run_for(3000)  # what it reads again when the stream begins
    screen.settled()
    page.evaluate("fetch('/health').then((answer) => answer.text())")
    before = len(screen.requests)
    page.clock.run_for(30_000)
    assert screen.requests[before:] == []


@pytest.mark.browser
def test_dashboard_rows_stay_under_the_pointer(screen: Screen, api: Client, clock: ManualClock) -> None:
    agent = api.register(hostname="web-1")
    api.register(hostname="web-2")
    page = screen.sign_in()
    screen.row("web-2").hover()
    clock.advance(67)
    page.get_by_role("button", name="2 changed").wait_for()
    assert screen.row("web-1").get_by_text("online").count() == 1
    page.get_by_role("heading", name="Fleet").hover()
    screen.row("web-1").get_by_text("stale").wait_for()
    assert agent["status"] == "online"


@pytest.mark.browser
@pytest.mark.skipif("AXE" not in os.environ, reason="needs AXE, the path of axe.min.js of npm's axe-core")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_dashboard_is_accessible(chromium: Any, theme: str) -> None:
    axe = Path(os.environ["AXE"]).read_text("utf-8")
    with Server(port=0, clock=ManualClock()) as server:
        api = Client(server)
        agents = [api.register(hostname=f"web-{number}", tags=["a"]) for number in range(4)]
        for agent in agents[:3]:
            api.post(f"/api/agents/{agent['id']}/events", {"events": [
                {**THREAT, "severity": severity} for severity in manager.SEVERITIES]}, status=201)
        api.post("/api/policy", {"name": "one", "rules": [RULE]}, status=201)
        assert isinstance(server.clock, ManualClock)
        server.clock.advance(67)
        api.beat(agents[0], cpu=50, memory=50)
        screen = Screen(chromium, server, color_scheme=theme)
        screen.page.goto(server.url)

        def check() -> None:
            found = screen.page.evaluate(axe + "; axe.run()")["violations"]
            assert not [(each["id"], node["html"], node["failureSummary"]) for each in found
                        for node in each["nodes"]]

        screen.page.get_by_label("Token").wait_for()
        check()
        page = screen.sign_in()
        for view in page.get_by_role("navigation").get_by_role("link").all_inner_texts():
            page.get_by_role("link", name=view, exact=True).click()
            page.get_by_role("heading", name=view, level=1).wait_for()
            screen.settled()
            check()
        page.get_by_role("link", name="Fleet", exact=True).click()
        page.get_by_role("link", name="web-0").click()
        page.get_by_role("heading", name="Why it is").wait_for()
        screen.settled()
        check()
        screen.context.close()


@pytest.mark.browser
def test_dashboard_enrolment_token(screen: Screen, api: Client) -> None:
    page = screen.sign_in(at="#enroll")
    page.get_by_label("Uses").fill("2")
    page.get_by_label("Tags").fill("web, rack-1")
    page.get_by_role("button", name="Issue a token").click()
    line = page.locator("main pre").get_by_text("/api/agents/register").inner_text()
    token = re.search(r"Bearer ([^\"]+)", line)
    assert token
    agent = api.post("/api/agents/register", AGENT, token=token[1], status=201)
    assert agent["tags"] == ["web", "rack-1"]
    page.get_by_role("link", name=AGENT["hostname"]).wait_for()
    page.get_by_text("1 / 2").wait_for()
    api.call("DELETE", f"/api/agents/{agent['id']}")
    page.get_by_role("link", name=AGENT["hostname"]).wait_for(state="detached")
    page.get_by_role("button", name="Revoke").click()
    page.get_by_role("button", name="Revoke").wait_for(state="detached")
    api.refusal("POST", "/api/agents/register", AGENT, token=token[1], status=401)


# The file and its README ##############################################################################


PROJECT = Path(manager.__file__).parent
README = (PROJECT / "README.md").read_text("utf-8")
SOURCE = Path(manager.__file__).read_text("utf-8")
SETUP = configparser.ConfigParser()
SETUP.read(PROJECT / "setup.cfg", "utf-8")


class Block(NamedTuple):
    """A code block of the README."""

    heading: str  # the nearest one above it
    kind: str  # the words after ```: a language, and which test runs it
    text: str


def code_blocks(text: str) -> list[Block]:
    heading, found = "", []
    for match in re.finditer(r"^#{2,3} (.+)$|^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        heading = match[1] or heading
        if match[3] is not None:
            found.append(Block(heading, match[2], match[3]))
    return found


BLOCKS = code_blocks(README)


def of_kind(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind]


def section(title: str) -> str:
    """The text of a README section."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return [block.text for block in code_blocks(text) if block.kind == language]


def readme_line(kind: str) -> str:
    """The one command of the README's blocks of a kind."""
    (block,) = of_kind(kind)
    return block.text.strip()


def environ(home: Path) -> dict[str, str]:
    """What a person with this home folder has set: nothing for Python or for the manager."""
    kept = {name: value for name, value in os.environ.items()
            if name in ("PATH", "LANG", "TMPDIR") or name.startswith("PIP_")}
    return {**kept, "HOME": str(home)}


@contextmanager
def newcomer(home: Path, *command: str, cwd: Path | None = None) -> Iterator[str]:
    """The URL of a manager run by somebody with an empty home folder, on a free port."""
    process = subprocess.Popen(
        command, cwd=cwd or home, env={**environ(home), "MANAGER_PORT": "0"}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout
    try:
        line = next((line for line in process.stdout if " listens on " in line), "")
        assert line, f"the manager ended with {process.wait()}"
        yield line.split()[-1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=LIMIT_S)  # to the end of what it says
        assert process.returncode in (0, -signal.SIGTERM)


# The README's code blocks, and the test that runs each kind


RUN_BY = {
    "sh start": "test_readme_start_line", "sh test": "test_ci_runs_the_readme_test_line",
    "sh serve": "test_readme_serve_lines", "sh env": "test_readme_settings_files",
    "sh container": "test_readme_container", "sh service": "test_readme_service",
    "sh copy": "test_readme_copy",
    "sh guard": "test_readme_agents", "sh agent": "test_readme_agents", "json policy": "test_readme_recipe",
    "json notification": "test_readme_notification", "python webhook": "test_readme_notification",
    "ini unit": "test_readme_unit",
    "console": "test_readme_recipe", "console stopped": "test_readme_recipe",
    "console stream": "test_readme_recipe", "python": "test_readme_embedding", "nginx": "test_readme_nginx",
    "caddyfile": "test_readme_caddy", "yaml prometheus": "test_readme_prometheus",
    "yaml alerts": "test_readme_prometheus",
    "text": ""}  # not code


def test_every_block_of_the_readme_is_run() -> None:
    assert {block.kind for block in BLOCKS} == set(RUN_BY), "a new kind of block needs a test that runs it"
    assert all(name in globals() for name in RUN_BY.values() if name)


NAMES = re.compile(r"agent-[0-9a-f]{8}|pg[ae]_[\w-]{32}|(?:enr|pol)_[0-9a-f]{12}")


def masked(answer: str) -> Any:
    """What must be equal in two answers: their JSON with its order, or their text; no names, no instants."""
    answer = NAMES.sub(lambda name: name[0][:4], answer.strip())
    answer = re.sub(r"(\d{4}-\d\d-\d\dT)?\d\d:\d\d:\d\d\.\d{3}Z", "INSTANT", answer)
    answer = re.sub(r"\d+ (s|min|h) ago", "AGO", answer)
    answer = re.sub(r"before-restore-\w+\.\w+Z", "before-restore", re.sub(" {2,}", "  ", answer))
    try:
        return json.loads(answer, object_pairs_hook=list)
    except ValueError:
        return answer


def session_steps(block: Block) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output shown under it."""
    steps = []
    for step in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command = re.match(r"(?:.*\\\n)*.*\n", step)
        assert command
        steps.append((command[0].strip(), step[command.end():]))
    return steps


# Programs for a session. The other host is this machine, with the same home folder.
TOOLS = f"""
panguard-manager() {{ {shlex.quote(sys.executable)} {shlex.quote(manager.__file__)} "$@"; }}
ssh() {{ shift; (cd && "$@"); }}
scp() {{ cp "$HOME/${{1#*:}}" "$2"; }}
"""


def furnish_recipes(running: Server[ManualClock]) -> None:
    """The fleet of the recipes: two agents online, and one that sends a wrong token and is offline."""
    fleet = (("db-1", "10.0.3.9"), ("web-1", "10.0.3.10"), ("web-2", "10.0.3.11"))
    *well, silent = (running.manager.register(name, "linux", "1.2.0", ip=ip).agent.id for name, ip in fleet)
    Client(running, "10.0.3.11").refusal("POST", f"/api/agents/{silent}/heartbeat", {}, status=401,
                                         token="pga_" + 32 * "x")
    for _ in range(8):
        running.clock.advance(45)
        for agent in well:
            running.manager.heartbeat(agent)


class Session:
    """A shell with the home folder `home`. Port 8443 of the README becomes the manager's port."""

    def __init__(self, folder: Path, hooks: str = "") -> None:
        self.home, self.folder, self.hooks = folder / "lin", folder / "manager", hooks
        self.home.mkdir()
        self.folder.mkdir()
        self.assignments: list[str] = []
        self.names: dict[str, str] = {}  # ids and tokens: the README's to the real one

    def run(self, kind: str, command: str, shown: str, url: str) -> None:
        """Run a command of the README; what it writes must be what the README shows."""
        line = NAMES.sub(lambda name: self.names[name[0]], command)
        line = re.sub(r"[\w.]+:8443", here := f"localhost:{url.rpartition(':')[2]}", line)
        if re.match(r"export |\w+=", line):
            self.assignments.append(line)
            return
        shell = subprocess.Popen(
            ["bash", "-c", "\n".join([TOOLS, *self.assignments, line])], cwd=self.folder, text=True,
            env=environ(self.home), stdout=subprocess.PIPE, start_new_session=True)
        assert shell.stdout
        if kind == "console stream":  # it does not end by itself
            wrote = "".join(itertools.islice(shell.stdout, shown.count("\n")))
            os.killpg(shell.pid, signal.SIGKILL)
            shell.communicate()
        else:
            wrote, _ = shell.communicate(timeout=LIMIT_S)
            assert shell.returncode in (0, 3), command
        named = re.search(r"[\w.]+:8443", shown)
        answer = wrote.replace(here, named[0] if named else "localhost:8443")
        answer = answer.replace(str(self.home.parent), "/home").replace(
            self.hooks or "none", "https://hooks.example.org")
        assert masked(answer) == masked(shown), f"$ {command}\n{answer}"
        self.names.update(zip(NAMES.findall(shown), NAMES.findall(wrote), strict=True))


def consoles(heading: str) -> list[Block]:
    return [each for each in BLOCKS if each.heading == heading and each.kind.startswith("console")]


def test_readme_first_session(tmp_path: Path) -> None:
    session = Session(tmp_path)
    steps = [step for each in consoles("A first session") for step in session_steps(each)]
    assert sum(command.startswith("curl ") for command, _ in steps) == 6
    with newcomer(session.home, sys.executable, manager.__file__) as url:
        for command, shown in steps:
            session.run("console", command, shown, url)
    assert {path.name for path in session.home.iterdir()} == {".panguard-manager"}


RECIPES = dict.fromkeys(each.heading for each in BLOCKS if each.kind.startswith("console"))


@pytest.mark.parametrize("heading", [each for each in RECIPES if each != "A first session"])
def test_readme_recipe(heading: str, tmp_path: Path) -> None:
    """The console blocks of a recipe, in order. The manager is stopped during a "console stopped" block."""
    with Receiving(*[b"HTTP/1.1 204 No Content\r\n\r\n"] * 9) as receiver:
        session = Session(tmp_path, receiver.url.partition("/hook")[0])
        session.assignments.append(
            "export TOKEN=$(cat ~/.panguard-manager/token) CURL_CA_BUNDLE=~/.panguard-manager/cert.pem")
        for block in of_kind("json policy"):
            (session.folder / "policy.json").write_text(block.text)
        running = Server(port=0, data_dir=session.home / ".panguard-manager", notify_url=receiver.url,
                         clock=ManualClock(time.time() - 360), tls_name="manager.example.org")
        running.start()
        try:
            furnish_recipes(running)
            for block in consoles(heading):
                if block.kind == "console stopped":
                    running.stop()
                for command, shown in session_steps(block):
                    session.run(block.kind, command, shown, running.url)
                if block.kind == "console stopped":
                    running.start()
        finally:
            running.stop()


def test_readme_agents(tmp_path: Path) -> None:
    """The line for Panguard Guard, and the agent in shell, which ends here after two heartbeats."""
    (guard,), (agent,) = of_kind("sh guard"), of_kind("sh agent")
    stub(tmp_path / "panguard", """
        test "$1 $2 $3" = "guard start --manager"; curl --silent --cacert "$NODE_EXTRA_CA_CERTS" "$4/readyz"
        test -z "$GUARD" || node drive.mjs "$GUARD" "$4" 1 "$EVENT" """)
    stub(tmp_path / "sleep", "test ! -e slept; touch slept")
    (tmp_path / "drive.mjs").write_text(DRIVE)
    (tmp_path / "agent.sh").write_text(agent.text)
    with Server(port=0, data_dir=tmp_path / "data", open_enrollment=True) as running:
        shutil.copy(tmp_path / "data" / "cert.pem", tmp_path / "manager.pem")
        issued = running.manager.issue_enroll_token(tags=["lab"])
        shell: Any = {"cwd": tmp_path, "text": True, "capture_output": True, "timeout": LIMIT_S, "env": {
            **environ(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "GUARD": GUARD,
            "EVENT": json.dumps(SHIPPED_EVENT), "MANAGER_URL": running.url, "ENROLL_TOKEN": issued.token}}
        line = guard.text.replace("https://manager.example.org:8443", running.url)
        done = subprocess.run(["bash", "-euc", line], **shell)
        assert done.returncode == 0 and '"status":"healthy"' in done.stdout, done.stderr
        assert len(running.manager.agents()[0]) == bool(GUARD)
        done = subprocess.run(["sh", "-eu", "agent.sh"], **shell)
        assert done.stdout.count('"status":"online"') == 2, done.stderr
        (made,) = (each for each in running.manager.agents()[0] if each.tags == ("lab",))
        assert running.manager.agent(made.id).uptime is not None


def test_readme_notification() -> None:
    """A receiver gets what the README shows, and the README's function verifies its signature."""
    (shown,), (code,) = of_kind("json notification"), of_kind("python webhook")
    (secret,) = re.findall("`echo (whsec_[^`]+)`", README)
    secret = subprocess.run(["bash", "-c", f"echo {secret}"], text=True, capture_output=True).stdout.strip()
    names: dict[str, Any] = {}
    exec(compile(code.text, "README.md", "exec"), names)
    clock = ManualClock(time.time() - 421)  # the notification is sent 421 s after the start
    with Receiving() as receiver, Server(port=0, clock=clock, notify_url=receiver.url + "&from=berlin",
                                         notify_secret=secret, notify_repeat_ms=3_600_000) as running:
        furnish_recipes(running)
        clock.advance(61)
        until(lambda: receiver.heard, "a notification has come")
        path, headers, body = receiver.heard[0]
        assert path.endswith("&from=berlin") and set(headers) >= {"webhook-id", "webhook-timestamp"}
        sent = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
        assert masked(sent.decode()) == masked(shown.text)
        assert names["is_genuine"](secret, headers, sent)
        assert not names["is_genuine"](secret, headers, sent + b" ")
        old = {**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) - 301)}
        assert not names["is_genuine"](secret, old, sent)
        for _ in range(3):
            clock.advance(3601)
        until(lambda: any("web-2" in told["data"].get("reminder", ()) for _, _, told in receiver.heard),
              "a reminder")


def test_readme_serve_lines(tmp_path: Path) -> None:
    for block in of_kind("sh serve"):
        with newcomer(tmp_path, "bash", "-c", TOOLS + block.text):
            certificate = tmp_path / ".panguard-manager" / "cert.pem"
            names = subprocess.run(["openssl", "x509", "-noout", "-ext", "subjectAltName",
                                    "-in", certificate], capture_output=True, text=True)
            assert "DNS:manager.example.org" in names.stdout


def test_readme_settings_files() -> None:
    for block in of_kind("sh env"):
        variables = dict(line.split("=", 1) for line in block.text.splitlines())
        assert set(variables) <= {each.metadata["variable"] for each in fields(Config)}
        Config.load([], variables)


def stub(path: Path, text: str) -> None:
    path.write_text("#!/bin/bash -eu\n" + text)
    path.chmod(0o755)


def test_readme_copy(tmp_path: Path) -> None:
    """The folder with the file and what it needs. pip is a stub that copies what is installed here."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(manager.__file__, tmp_path / "manager.py")
    needed = SETUP["options"]["install_requires"].split()
    sources = [bottle.__file__, str(Path(waitress.__file__).parent)]
    stub(tmp_path / ".venv/bin/pip", f"""
        test "$1 $2 $3" = "install -q --target"; test "${{*:5}}" = {shlex.quote(" ".join(needed))}
        mkdir "$4"; cp -r {shlex.join(sources)} "$4" """)
    (block,) = of_kind("sh copy")
    subprocess.run(["bash", "-euc", block.text], cwd=tmp_path, check=True)
    with newcomer(tmp_path, sys.executable, "-S", "panguard-manager/manager.py"):
        pass


def test_readme_service(tmp_path: Path) -> None:
    """The commands of the service, in order, below another root folder. git, pip and systemd are stubs."""
    def here(text: str) -> str:
        return re.sub(r"(?<![\w.])/(opt|etc|usr|var)/", rf"{tmp_path}/\1/", text)

    bins, home = tmp_path / "usr/local/bin", tmp_path / "home"
    for folder in ("etc/systemd/system", "home", "opt", "usr/local/bin", "var/backups", "var/lib"):
        (tmp_path / folder).mkdir(parents=True)
    (unit,) = of_kind("ini unit")
    (tmp_path / "etc/systemd/system/panguard-manager.service").write_text(here(unit.text))
    stub(bins / "sudo", 'exec "$@"')
    stub(bins / "git", 'test "$*" = "pull -q"')
    stub(bins / "pip", """
        case "$*" in
        "install -q .") ;;
        "wheel -q -w "*" .") mkdir "$4"; touch "$4/panguard_manager-1.2.0-py3-none-any.whl" ;;
        "install -q --no-index --force-reinstall "*) test -f "$5" ;;
        *) false ;;
        esac""")
    stub(bins / "program", f'exec {sys.executable} {manager.__file__} "$@"')
    stub(bins / "python3", f"""
        test "$1 $2" = "-m venv"; mkdir -p "$3/bin"; cp {bins}/pip "$3/bin/pip"
        cp {bins}/program "$3/bin/panguard-manager" """)
    stub(bins / "systemctl", here("""
        unit=/etc/systemd/system/panguard-manager.service; data=/var/lib/panguard-manager; pid=/var/pid
        case "$*" in
        "enable --now panguard-manager"|"start panguard-manager")
            mkdir -p -m 700 $data; rm -f $data/url
            MANAGER_PORT=0 $(sed -n s/^ExecStart=//p $unit) >/var/log 2>&1 & echo $! >$pid
            until [ -s $data/url ]; do sleep 0.05; done ;;
        "stop panguard-manager")
            kill $(cat $pid); while kill -0 $(cat $pid); do sleep 0.05; done 2>/dev/null ;;
        "reload panguard-manager") kill -HUP $(cat $pid) ;;
        *) test "$*" = daemon-reload ;;
        esac"""))
    path = {**environ(home), "PATH": f"{bins}:{os.environ['PATH']}"}
    try:
        for block in of_kind("sh service"):
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", here(block.text)], env=path, cwd=home,
                                  text=True, capture_output=True, timeout=LIMIT_S)
            assert done.returncode == 0, block.text + done.stdout + done.stderr
    finally:
        os.kill(int((tmp_path / "var/pid").read_text()), signal.SIGTERM)


def test_readme_container(tmp_path: Path) -> None:
    """The arguments of podman fit each other and the Containerfile."""
    stub(tmp_path / "podman", f'echo "$@" >>{tmp_path}/words; test "$1" != run || echo 0123456789ab')
    (block,) = of_kind("sh container")
    subprocess.run(["bash", "-euc", block.text], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True,
                   cwd=PROJECT, capture_output=True)
    build, run, *others = (line.split() for line in (tmp_path / "words").read_text().splitlines())
    image, name = build[build.index("-t") + 1], run[run.index("--name") + 1]
    told = (PROJECT / build[build.index("-f") + 1]).read_text()
    assert run[-1] == image and (PROJECT / build[-1]).is_dir()
    assert f"VOLUME {run[run.index('-v') + 1].split(':')[1]}\n" in told
    assert f"EXPOSE {run[run.index('-p') + 1].split(':')[1]}\n" in told
    assert {words[1].partition(":")[0] for words in others} == {name}
    assert {words[2] for words in others if words[0] == "exec"} <= {"panguard-manager", "cat"}


def test_readme_unit(tmp_path: Path) -> None:
    (unit,) = of_kind("ini unit")
    assert "ExecStart=/opt/panguard-manager/bin/panguard-manager " in unit.text
    path = tmp_path / "panguard-manager.service"
    path.write_text(re.sub("ExecStart=[^ ]+", "ExecStart=/bin/true", unit.text))
    done = checked_by("systemd-analyze", "verify", path)
    assert "panguard-manager" not in done
    path.write_text(unit.text)
    checked_by("systemd-analyze", "security", "--offline=true", "--threshold=20", path)  # at most 2.0


def checked_by(program: str, *words: Any, **variables: str) -> str:
    """The output of a program that must succeed; the test is skipped where it is not installed."""
    if not shutil.which(program):
        pytest.skip(f"needs {program}; CI has it")
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False,
                          env={**os.environ, **variables})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_readme_nginx(tmp_path: Path, pair: dict[str, Path]) -> None:
    (site,) = of_kind("nginx")
    text = site.text.replace("listen 443 ", f"listen unix:{tmp_path}/socket ")
    text = text.replace("/etc/ssl/manager.pem", str(pair["tls_cert"]))
    text = text.replace("/etc/ssl/manager.key", str(pair["tls_key"]))
    folders = "".join(f"{name}_temp_path {tmp_path}/{name};\n" for name in (
        "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(f"events {{}}\nhttp {{\naccess_log off;\n{folders}{text}}}\n")
    checked_by("nginx", "-t", "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g",
               f"pid {tmp_path}/pid; error_log stderr;")


def test_readme_caddy(tmp_path: Path) -> None:
    (site,) = of_kind("caddyfile")
    (tmp_path / "Caddyfile").write_text(site.text)
    checked_by("caddy", "validate", "--adapter", "caddyfile", "--config", tmp_path / "Caddyfile",
               HOME=str(tmp_path))


def test_readme_prometheus(tmp_path: Path, pair: dict[str, Path]) -> None:
    (config,) = of_kind("yaml prometheus")
    text = re.sub(r"/etc/prometheus/\S+", str(pair["tls_cert"]), config.text)
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "alerts.yml").write_text(of_kind("yaml alerts")[0].text)
    checked_by("promtool", "check", "config", tmp_path / "prometheus.yml")
    checked_by("promtool", "check", "rules", tmp_path / "alerts.yml")


def test_the_containerfile_copies_what_the_package_needs() -> None:
    text = (PROJECT / "Containerfile").read_text()
    copied = re.search(r"COPY (.+) \./", text)[1].split()
    assert set(copied) >= {"manager.py", "README.md", "LICENSE", "setup.cfg", "pyproject.toml"}
    assert all((PROJECT / name).exists() for name in copied) and "COPY src src" in text
    variables = {each.metadata["variable"] for each in fields(Config)}
    assert set(re.findall(r"\b(MANAGER_\w+)=", text)) <= variables and "USER panguard" in text




# The README's tables and numbers


def table(head: str, rows: list[list[str]]) -> str:
    columns = head.split(", ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(cell if cell == "---" else f" {cell} " for cell in line) + "|"
                     for line in lines)


def shown_table(title: str) -> str:
    return "\n".join(line for line in section(title).splitlines() if line.startswith("|"))


def test_readme_settings() -> None:
    rows = []
    for each in fields(manager.Config):
        told = each.metadata
        default = told["shown"] + (" " + told["unit"] if told["unit"] and told["shown"].isdigit() else "")
        rows.append([f"`{told['option']}`" if told["option"] else "", f"`{told['variable']}`", default,
                     told["help"]])
    expected = table("Option, Variable, Default, Meaning", rows)
    assert shown_table("Settings") == expected, f"the README's table of settings must be\n\n{expected}\n"


def test_readme_api() -> None:
    roles = (manager.ADMIN, manager.VIEWER, manager.ENROLLER, manager.AGENT, manager.NEWCOMER)
    rows = [[each.method, f"`{each.path}`",
             "anyone" if manager.ANYONE in each.allow
             else ", ".join(role for role in roles if role in each.allow),
             each.summary] for each in manager.ENDPOINTS]
    expected = table("Method, Path, Who may call, What it does", rows)
    assert shown_table("API") == expected, f"the README's table of the API must be\n\n{expected}\n"


def test_readme_commands() -> None:
    expected = table("Command, Does, Example", [
        [f"`{each.name}`", each.summary, f"`{each.example}`"] for each in manager.COMMANDS.values()])
    assert shown_table("Commands") == expected, f"the README's table of commands must be\n\n{expected}\n"


def test_readme_journal(tmp_path: Path) -> None:
    """The table of the journal has all types in their order, and the fields of the entries of each."""
    rows = [re.findall(r"\(?`\w+`\)?", line) for line in shown_table("Journal").splitlines()[2:]]
    told = {row[0].strip("`"): {name.strip("(`)"): name[0] != "(" for name in row[1:]} for row in rows}
    assert tuple(told) == manager.ENTRY_TYPES
    clock = ManualClock()
    with Receiving(500) as receiver, Server(
            port=0, clock=clock, data_dir=tmp_path / "data", notify_url=receiver.url, notify_delay_ms=1000,
            open_enrollment=1, prune_offline_ms=3_600_000) as running:
        api, fleet = Client(running), running.manager
        agents = [api.register(hostname=f"web-{number}", machine_id=f"m-{number}") for number in range(3)]
        api.beat(agents[0])
        api.register(machine_id="m-0")  # its agent is online: a cloned machine
        clock.advance(400)  # all agents are offline
        issued = api.post("/api/enroll-tokens", {"tags": ["a"], "maxUses": 2}, status=201)
        for status in (201, 200):  # a new agent, and again, as if its answer was lost
            api.post("/api/agents/register", {**AGENT, "machine_id": "new"}, token=issued["token"],
                     status=status)
        api.call("DELETE", f"/api/enroll-tokens/{issued['id']}")
        api.post("/api/agents/register", {**AGENT, "machine_id": "claimed"}, token=None, status=201)
        for number, agent in enumerate(agents):
            api.post(f"/api/agents/{agent['id']}/events", {"events": [THREAT]}, status=201,
                     token=agent["token"])
            for version in range(40 if number == 0 else 1):  # the first agent causes too many entries
                api.beat(agent, version=f"2.{version}")
        clock.advance(61)
        again = api.post("/api/agents/register", AGENT, token=agents[0]["token"])
        assert again["id"] == agents[0]["id"]
        api.call("PATCH", f"/api/agents/{agents[1]['id']}", {"tags": ["b"]})
        threat = api.get("/api/threats")[0]["id"]
        api.call("PATCH", f"/api/threats/{threat}", {"state": "acknowledged", "note": "seen"})
        api.post("/api/policy", {"name": "p", "rules": [RULE], "agent_id": agents[1]["id"]}, status=201)
        api.call("DELETE", f"/api/policy/agent/{agents[1]['id']}")
        api.refusal("POST", f"/api/agents/{agents[1]['id']}/heartbeat", {}, status=401,
                    token="pga_" + 32 * "x")
        clock.advance(3200)
        clock.advance(3590)
        for each in fleet.agents()[0]:
            if each.id != agents[2]["id"]:
                fleet.heartbeat(each.id)
        clock.advance(20)  # after an hour offline, the silent agent is pruned
        clock.suspend(60)
        clock.step(86400)
        clock.advance(1)
        until(lambda: api.journal("notification_failed"), "the receiver has failed")
        entries = fleet.journal()
    with Server(port=0, clock=clock, data_dir=tmp_path / "data") as running:
        entries += running.manager.journal()
    seen: dict[str, list[set[str]]] = {}
    for entry in entries:
        seen.setdefault(entry.type, []).append(set(entry.data) - {"suppressed"})
    assert set(seen) == set(told) and any("suppressed" in entry.data for entry in entries)
    for name, names in told.items():
        assert set().union(*seen[name]) == set(names), name
        assert set.intersection(*seen[name]) >= {field for field, always in names.items() if always}, name


def test_the_chinese_readme_has_the_same_code_and_tables() -> None:
    chinese = (PROJECT / "README.zh-Hant.md").read_text("utf-8")
    assert [(each.kind, each.text) for each in code_blocks(chinese)] == [
        (each.kind, each.text) for each in BLOCKS if each.heading != "In your tests" and each.kind != "text"]

    def rows(text: str, heading: str) -> list[list[str]]:
        part = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        return [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("|")][2:]

    def columns(text: str, heading: str, *wanted: int) -> list[list[str]]:
        return [[row[column].strip() for column in wanted] for row in rows(text, heading)]

    for english, heading, wanted in (("Settings", "設定", (0, 1)), ("API", "API", (0, 1, 2)),
                                     ("Commands", "指令", (0, 2)), ("Journal", "日誌", (0, 2))):
        assert columns(chinese, heading, *wanted) == columns(README, english, *wanted) != []
    answers = [[re.findall("[0-9]{3}|`[^`]+`", row[2]) for row in rows(text, heading)]
               for text, heading in ((chinese, "故障"), (README, "Faults"))]
    assert answers[0] == answers[1] != []
    bounds = [[sorted(re.findall("[0-9](?:,?[0-9])*|`[^`]+`", " ".join(row))) for row in rows(text, heading)]
              for text, heading in ((chinese, "安全"), (README, "Security"))]
    assert bounds[0] == bounds[1] != []
    figures = [re.findall(r"[\d.,]+ [KMG]i?B", text.partition(f"\n### {heading}\n")[2].partition("\n##")[0])
               for text, heading in ((chinese, "在小型主機上"), (README, "On a small box"))]
    assert figures[0] == figures[1] != []
    metrics = [set(re.findall(r"`(panguard_\w+)`", text)) for text in (chinese, README)]
    assert metrics[0] == metrics[1] - {"panguard_manager"}


@pytest.mark.parametrize("name", ["README.md", "README.zh-Hant.md"])
def test_the_readmes_and_openapi_name_the_details_that_are_addresses_and_hashes(name: str) -> None:
    told = re.findall(r"`(\w+)`", (PROJECT / name).read_text("utf-8"))
    event = manager.openapi()["paths"]["/api/agents/{id}/events"]["post"]["requestBody"]
    for keys in (manager.SOURCE_KEYS, manager.HASH_KEYS):
        at = told.index(keys[0], told.index("confidence"))
        assert tuple(told[at:at + len(keys)]) == keys
        assert ", ".join(keys) in json.dumps(event)


@pytest.mark.parametrize("name", ["README.md", "README.zh-Hant.md"])
def test_every_link_within_the_readmes_leads_to_a_heading(name: str) -> None:
    for file, target in re.findall(r"\]\(([\w.-]*)#([^)]+)\)", (PROJECT / name).read_text("utf-8")):
        headings = re.findall(r"^#+ (.+)$", (PROJECT / (file or name)).read_text("utf-8"), re.MULTILINE)
        assert target in {re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in headings}


def test_the_table_of_faults_has_the_texts_that_are_answered() -> None:
    texts = [node.value for node in ast.walk(ast.parse(SOURCE))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for told in re.findall(r"(?:503|status 1,) `([^`]+)`", section("Faults")):
        for part in re.split(r"[A-Z]{4,}|…", told):
            assert len(part) < 9 or any(part.strip() in text for text in texts), part


def test_readme_numbers(api: Client) -> None:
    liveness = manager.Liveness.of(manager.Config())
    agent = api.register()
    beat = api.call("POST", f"/api/agents/{agent['id']}/heartbeat")
    text = " ".join(section("How it works").split())
    assert f"more than {liveness.stale_after_ms // 1000} s ago" in text
    assert f"more than {liveness.offline_after_ms // 1000} s (five timeouts)" in text
    assert f"until the next: {beat.headers['X-Heartbeat-Interval']}, a third of the timeout of 60 s" in text
    assert f"After {manager.FAILED_LOGINS_PER_MINUTE} wrong tokens in a minute" in section("API")
    assert {each.metadata["variable"].removeprefix("MANAGER_").lower()
            for each in fields(manager.Config)} == {each.name for each in fields(manager.Config)}


def test_readme_metrics(api: Client) -> None:
    api.register()
    told = set(re.findall(r"^# TYPE (\w+)", api.call("GET", "/metrics").text, re.MULTILINE))
    assert set(re.findall(r"`(panguard_\w+)`", README)) - {"panguard_manager"} == told
    assert set(re.findall(r"panguard_\w+", of_kind("yaml alerts")[0].text)) <= told


@pytest.mark.parametrize("example", [
    each.text for each in of_kind("python") if each.heading != "In your tests"])
def test_readme_embedding(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example, "README.md", "exec"), {})


def test_readme_is_dated() -> None:
    dated = re.search(r"^### (\S+), \d{4}-\d\d-\d\d$", section("Changes"), re.MULTILINE)
    assert dated and dated[1] == manager.__version__


def test_ci_runs_the_readme_test_line() -> None:
    (pattern,) = re.findall(r"grep -E '(.+)' README\.md", (PROJECT / ".ci" / "run").read_text("utf-8"))
    assert re.findall(pattern, README, re.MULTILINE) == [readme_line("sh test")]


def test_readme_in_your_tests(tmp_path: Path) -> None:
    """The conftest and the example tests run as a newcomer would run them."""
    conftest, *examples = blocks(section("In your tests"), "python")
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_examples.py").write_text("\n\n".join(examples))
    fixture = conftest.split("\n\n\n", 1)[1]
    assert fixture in (PROJECT / ".ci" / "consumer.py").read_text("utf-8"), "type checkers read it there"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PROJECT / "src")},
                          capture_output=True, text=True)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout + done.stderr


# The file and its packaging


def test_map_matches_banners() -> None:
    told = ast.get_docstring(ast.parse(SOURCE), clean=False) or ""
    sections = [(number, name.strip())
                for number, name in re.findall(r"^    (\d+) +(.{14})\S", told, re.MULTILINE)]
    banners = re.findall(r"^#{40,}\n# (\d+)  (.+?) #+\n#{40,}$", SOURCE, re.MULTILINE)
    assert sections and sections == banners


def test_inline_metadata_equals_setup() -> None:
    header = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", SOURCE)
    assert header
    told = {name: json.loads(value)
            for name, value in re.findall(r"^# (\S+) = (.+)$", header[1], re.MULTILINE)}
    assert told == {"requires-python": SETUP["options"]["python_requires"],
                    "dependencies": SETUP["options"]["install_requires"].split()}


def test_imports_stdlib_bottle_waitress_only() -> None:
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == {"bottle", "waitress", "typing_extensions"}
    assert re.findall(r"\n(.*)\n.*typing_extensions",
                      SOURCE) == ["if typing.TYPE_CHECKING:"], "not at run time"


def test_public_names_are_documented() -> None:
    assert manager.__all__ == sorted(manager.__all__)
    for name in manager.__all__:
        text = getattr(manager, name).__doc__
        assert text and not text.startswith(f"{name}("), f"{name} has no docstring"


def test_every_error_that_a_caller_can_get_is_public() -> None:
    errors = {name for name, each in vars(manager).items() if isinstance(each, type)
              and issubclass(each, Exception)
              and each.__module__ == manager.__name__}
    assert errors - set(manager.__all__) == {"CommandError"}, "main() prints it"


@pytest.mark.parametrize(("order", "beside"), [
    ("manager, panguard_manager", False), ("panguard_manager, manager", False),
    ("manager, panguard_manager", True)])
def test_both_names_import_the_same_module(order: str, beside: bool, tmp_path: Path) -> None:
    """Also if `manager` is a copy of the file in the current folder, as in this repository."""
    if beside:
        shutil.copy(manager.__file__, tmp_path)
    code = f"import {order}; assert manager is panguard_manager; print(manager.Server.__doc__[:9])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(PROJECT / "src")}, check=False)
    assert done.stdout == "A manager\n", done.stderr


@pytest.mark.parametrize("name", ["manager", "panguard_manager"])
def test_either_name_runs_as_a_module(name: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", name, "--version"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(PROJECT / "src")},
                          check=False)
    assert done.stdout == f"Panguard Manager {manager.__version__}\n", done.stderr


PLUGIN_EXAMPLES = """
import subprocess, sys, urllib.request

def test_nothing_is_imported_for_a_test_that_does_not_ask():
    assert not {"manager", "panguard_manager", "bottle", "sqlite3"} & sys.modules.keys()

def test_a_manager_of_its_own(guard_manager):
    from manager import Server, Status
    from panguard_manager import ManualClock
    assert isinstance(guard_manager, Server) and isinstance(guard_manager.clock, ManualClock)
    agent = guard_manager.seed(1)[0].agent
    guard_manager.clock.advance(67)
    assert guard_manager.manager.agent(agent.id).status is Status.STALE
    assert urllib.request.urlopen(guard_manager.url + "/health").status == 200

def test_another(guard_manager):
    assert guard_manager.manager.census().agents["online"] == 0
"""


PLUGIN = "pytest_panguard_manager"


def test_the_pytest_fixture_imports_the_manager_only_for_a_test_that_uses_it(tmp_path: Path) -> None:
    assert SETUP["options.entry_points"]["pytest11"].strip() == f"panguard-manager = {PLUGIN}"
    assert f"`-p {PLUGIN}`" in README and "`-p no:panguard-manager`" in README
    (tmp_path / "test_agent.py").write_text(PLUGIN_EXAMPLES)
    environ = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-p", PLUGIN],
        cwd=tmp_path, env=environ, text=True, capture_output=True, check=False)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_a_missing_package_ends_the_start_with_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-I", "-S", manager.__file__], text=True,
                          capture_output=True, check=False)
    assert done.returncode == 1 and re.fullmatch(r"manager\.py needs bottle .*'bottle'.*\n",
                                                 done.stderr), done.stderr


@pytest.mark.parametrize(("name", "version", "refused"), [
    ("waitress", "2.1.2", True), ("bottle", "0.12.25", True), ("waitress", "3.0.1", True),
    ("bottle", "0.13.10", False), ("waitress", "3.0.2.post1", False)])
def test_a_library_that_is_too_old_is_refused_in_one_sentence(
        name: str, version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"bottle": "0.13.2", "waitress": "3.0.2", name: version}
    monkeypatch.setattr(importlib.metadata, "version", found.__getitem__)
    wanted = Path(manager.__file__).read_text().partition('# ///\n"""')[0]
    least = dict(re.findall(r'"(\w+)>=([\d.]+),', wanted))
    if refused:
        with pytest.raises(StartError, match=f"{name} {version} is too old.*{least[name]}"):
            Server(port=0).start()
    else:
        Server(port=0).__enter__().stop()


def test_a_library_without_a_version_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "version", version)
    Server(port=0).__enter__().stop()


def test_a_system_without_posix_ends_the_start_with_one_sentence() -> None:
    start = ("import runpy, sys; sys.modules['fcntl'] = None; "
             f"runpy.run_path({manager.__file__!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", start], text=True, capture_output=True, check=False)
    assert done.returncode == 1 and re.fullmatch(r"manager\.py needs Linux or macOS; .*\n",
                                                 done.stderr), done.stderr


def test_file_alone_runs(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(Path(waitress.__file__).parent, alone / "waitress")
    for file in (manager.__file__, bottle.__file__):
        shutil.copy(file, alone)
    python = [sys.executable, "-E", "-s", "-S", "manager.py"]
    version = subprocess.run([*python, "--version"], cwd=alone, text=True, capture_output=True, check=True)
    assert version.stdout == f"Panguard Manager {manager.__version__}\n"
    with newcomer(tmp_path, *python, cwd=alone):
        assert (tmp_path / ".panguard-manager" / "manager.db").exists()


def test_readme_start_line(tmp_path: Path) -> None:
    clone, home = tmp_path / "clone", tmp_path / "home"
    clone.mkdir()
    home.mkdir()
    for name in ("LICENSE", "README.md", "manager.py", "pyproject.toml", "setup.cfg"):
        shutil.copy(PROJECT / name, clone)
    shutil.copytree(PROJECT / "src", clone / "src", symlinks=True,
                    ignore=shutil.ignore_patterns("*.egg-info"))
    with newcomer(home, "bash", "-c", readme_line("sh start"), cwd=clone):
        assert (home / ".panguard-manager" / "token").stat().st_mode & 0o777 == 0o600
    elsewhere: Any = {"cwd": home, "env": environ(home), "text": True, "capture_output": True, "check": True}
    version = subprocess.run([clone / ".venv/bin/panguard-manager", "--version"], **elsewhere)
    assert version.stdout == f"Panguard Manager {manager.__version__}\n"
    module = subprocess.run([clone / ".venv/bin/python", "-c", "import manager; print(manager.__file__)"],
                            **elsewhere)
    assert "site-packages" in module.stdout


# Fuzzing


@pytest.mark.fuzz
def test_openapi_is_valid(api: Client) -> None:
    from openapi_spec_validator import validate

    validate(api.get_openapi())


@pytest.mark.fuzz
def test_a_generated_client_is_typed_and_works(
        server: Server, api: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document, package = tmp_path / "api.json", tmp_path / "panguard_client"
    settings_file = tmp_path / "config.yml"
    document.write_text(json.dumps(api.get_openapi()))
    settings_file.write_text("post_hooks: []\n")
    subprocess.run([sys.executable, "-m", "openapi_python_client", "generate", "--path", document, "--meta",
                    "none", "--output-path", package, "--config", settings_file], check=True, cwd=tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def call(name: str, /, *path: str, credential: str = server.token, **how: Any) -> Any:
        operation = importlib.import_module(f"panguard_client.api.default.{name}")
        client = importlib.import_module("panguard_client").AuthenticatedClient(server.url, credential)
        with client:
            return operation.sync(*path, client=client, **how)

    models = importlib.import_module("panguard_client.models")
    made = call("register", body=models.RegisterBody(hostname="h", os="linux", version="1")).data
    beat = call("heartbeat", made.id, credential=made.token, body=models.HeartbeatBody(cpu=1.5)).data
    listed = call("agents").data
    agent = call("agent", made.id).data
    assert (beat.id, str(beat.status), [each.id for each in listed]) == (made.id, "online", [made.id])
    assert isinstance(agent, models.Agent) and isinstance(agent.status, models.Status)
    assert (agent.cpu, agent.registered_at, agent.active_policy_version) == (1.5, datetime.fromtimestamp(
        START_MS / 1000, timezone.utc), None)
    refused = call("agent", "agent-00000000")
    assert isinstance(refused, models.Error) and "agent-00000000" in refused.error


@pytest.mark.fuzz
def test_openapi_fuzzed(server: Server, api: Client, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the document allows, and much that it does not, gets one of the answers it tells of."""
    import schemathesis
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode, checks

    schema = schemathesis.openapi.from_wsgi("/openapi.json", api.app.app).exclude(path="/api/events/stream")
    for operation in (result.ok() for result in schema.get_all_operations()):
        for mode in GenerationMode:
            @seed(1)
            @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                agent = server.manager.register("web-1", "linux", "1.2.0").agent
                if "id" in case.path_parameters and len(case.path_parameters["id"]) % 2:
                    case.path_parameters["id"] = agent.id
                answer = case.call(headers={"Authorization": f"Bearer {server.token}"})
                case.validate_response(answer, checks=[
                    checks.not_a_server_error, checks.status_code_conformance,
                    checks.content_type_conformance, checks.response_schema_conformance])
            with suppress(Unsatisfiable):  # a route that takes nothing takes nothing wrong
                check()
    assert not caplog.records
