# /// script
# requires-python = ">=3.10"
# dependencies = ["bottle>=0.13.2,<0.14", "waitress>=3.0.2,<3.1"]
# ///
"""Panguard Manager: a fleet manager for Panguard Guard agents, in one file.

Registration, heartbeat monitoring and an audit journal over HTTP, kept in one SQLite file. Copy this
file beside bottle and waitress and run it, or embed it:

    with Server(port=0) as server:
        agent = server.manager.register(hostname="web-1", os="linux", version="1.2.0").agent
        assert server.manager.agent(agent.id).status is Status.ONLINE

The file has ten sections. A section uses only the sections above it:

    1  Settings      what an operator may set: one table for options, variables, help and README
    2  Domain        agents, liveness, errors: pure functions and frozen records
    3  Validation    checks that clean a body and describe it to OpenAPI
    4  Storage       migrations, the one writing connection, the readers
    5  Manager       the use cases, one method each: no HTTP, no threads, no sleep
    6  HTTP          the routes: who may call, what they take, what they answer
    7  Followers     of the journal: event streams, which hold connections, not threads, and notifications
    8  Server        waitress on one loop: heartbeat batch, socket map, streams, TLS; clocks, start and stop
    9  Command line  main(): serve, and the commands that ask a manager or work on its data folder
    10 Dashboard     the page: HTML, style and script as constants, last because it is data
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import difflib
import email.utils
import enum
import errno
import fnmatch
import functools
import hashlib
import hmac
import http.client
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import typing
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, NoReturn, Protocol, TypeVar, cast, overload
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

try:
    import fcntl
    import resource

    import bottle
    from waitress import wasyncore
    from waitress.adjustments import Adjustments
    from waitress.buffers import OverflowableBuffer
    from waitress.channel import ClientDisconnected, HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.receiver import ChunkedReceiver
    from waitress.server import TcpWSGIServer
    from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask, rename_headers
    from waitress.utilities import BadRequest, Error, build_http_date
except ImportError as missing:
    if __name__ != "__main__":
        raise
    if missing.name in ("fcntl", "resource"):
        sys.exit("manager.py needs Linux or macOS; on Windows run it in WSL 2 or in a container")
    sys.exit(f"manager.py needs bottle 0.13 and waitress 3.0 ({missing}); `uv run manager.py` brings them, "
             "or install both with pip in a virtual environment")

if typing.TYPE_CHECKING:
    from typing_extensions import Unpack

__version__ = "1.2.0"
__all__ = ["Agent", "Caller", "Clock", "Config", "Conflict", "Dropped", "Entry", "Exchange", "Fault",
           "Faults", "Forbidden", "Invalid", "Manager", "ManagerError", "ManualClock", "Moment", "NotFound",
           "Registration", "Server", "SettingError", "Settings", "StartError", "Status", "Store",
           "SystemClock", "Throttled", "Unauthorized", "Unavailable", "create_app", "main"]

if __name__ == "manager":  # both names are the same module: no error class may exist twice
    sys.modules.setdefault("panguard_manager", sys.modules[__name__])

log = logging.getLogger("panguard")

########################################################################################################
# 1  Settings ##########################################################################################
########################################################################################################


class SettingError(ValueError):
    """A setting has a value it may not have; the text names the setting, the value and the rule."""


class Parser(NamedTuple):
    """Turns a setting's text into its value, or raises ValueError; `must` says what it must be."""

    parse: Callable[[str], Any]
    must: str


def _whole(low: int, high: int) -> Parser:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,15}", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)
    return Parser(parse, f"a whole number from {low} to {high}")


def _matching(pattern: str, must: str) -> Parser:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text
    return Parser(parse, must)


def _several(one: Callable[[str], Any], most: int, must: str) -> Parser:
    def parse(text: str) -> tuple[Any, ...]:
        parts = [part.strip() for part in text.split(",")]
        if not 1 <= len(parts) <= most:
            raise ValueError
        return tuple(one(part) for part in parts)
    return Parser(parse, must)


def _parse_path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError from error


def _as_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(text)
    return None


_DAY_MS = 86_400_000
_PORT = _whole(0, 65535)
_MS = _whole(1, 1000 * _DAY_MS)
_TOKEN = _matching(r"[!-+\--~]{1,255}", "1 to 255 visible ASCII characters without a comma")
_TOKENS = _several(_TOKEN.parse, 2, "one token, or two with a comma between, each " + _TOKEN.must)
_FOLDER = Parser(_parse_path, "the path of a folder")
_FILE = Parser(_parse_path, "the path of a file")
_LEAST_TOKEN = 16  # characters of a token that an operator sets: guessing it is hopeless
_HOST = _matching(r"[0-9A-Za-z.:_-]{1,255}", "a host name or an address")
_DNS_NAME = _matching(r"(?=.{1,253}$)[0-9A-Za-z_-]{1,63}(\.[0-9A-Za-z_-]{1,63})*", "a host name")
_TLS_NAMES = _several(lambda text: str(_as_ip(text) or _DNS_NAME.parse(text)), 16,
                      "host names or addresses, with commas between")
_NETWORKS = _several(ipaddress.ip_network, 64,
                     "addresses or networks such as 10.0.0.0/8, with commas between")
_ORIGINS = _several(_matching(r"https?://[0-9A-Za-z.:\[\]_-]+", "").parse, 64,
                    "origins such as https://console.example.org, with commas between")
_ORG = _matching(r"(?=.*\S)[^\x00-\x1f\x7f-\x9f]{1,128}", "1 to 128 characters without control characters")
_EVENTS_TOLD = ("offline", "online", "correlated", "conflict", *(f"threat:{severity}" for severity in (
    "low", "medium", "high", "critical")))


def _parse_receiver(text: str) -> str:
    target = urlsplit(re.sub(r"^(slack|mattermost|discord)\+", "", text))
    if target.scheme not in ("http", "https") or not target.hostname:
        raise ValueError
    if not re.fullmatch(r"[!-~]{1,2048}", text) or target.port == 0:  # reading a wrong port raises ValueError
        raise ValueError
    return text


def _parse_secret(text: str) -> bytes:
    secret = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    if not 16 <= len(secret) <= 64:
        raise ValueError
    return secret


_RECEIVERS = _several(
    _parse_receiver, 8, "1 to 8 addresses such as https://hooks.example.org/panguard, with commas between; "
    "slack+https://, mattermost+https:// and discord+https:// say which text one takes")
_SECRET = Parser(_parse_secret, "whsec_ and then 16 to 64 bytes in base64")
_TOLD = _several({name: name for name in _EVENTS_TOLD}.__getitem__, 8,
                 f"some of {', '.join(_EVENTS_TOLD)}, with commas between")
_SWITCH = Parser({"1": True, "true": True, "0": False, "false": False}.__getitem__, "1 or 0, true or false")
_TLS = _matching("auto|require|off", "auto, require or off")
_LOG_FORMAT = _matching("text|json", "text or json")
_LEVEL = _matching("DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR")


def _setting(default: Any, variable: str, parser: Parser, help: str, *, option: str | None = None,
             unit: str = "", shown: str | None = None) -> Any:
    return field(default=default, metadata={
        "variable": variable, "parser": parser, "help": help, "option": option, "unit": unit,
        "shown": ("none" if default is None else str(default)) if shown is None else shown})


_Path = str | Path | None
_Texts = str | tuple[str, ...] | list[str]
Settings = typing.TypedDict("Settings", {  # noqa: UP013 - as a class it would have a line for each setting
    "host": str, "port": int, "threads": int, "log_format": typing.Literal["text", "json"],
    "log_level": typing.Literal["DEBUG", "INFO", "WARNING", "ERROR"],
    "data_dir": _Path, "backup_dir": _Path, "backup_every_ms": int, "backup_keep": int,
    "auth_token": _Texts, "auth_token_file": _Path, "enroll_token": str | None, "viewer_token": str | None,
    "heartbeat_timeout_ms": int, "heartbeat_grace_ms": int | None, "offline_timeout_ms": int | None,
    "max_agents": int, "open_enrollment": bool, "open_enrollment_org": str | None, "reenroll": bool,
    "trusted_proxy": str | Sequence[Any], "rate_limit": int, "cors_allowed_origins": _Texts,
    "connections_per_address": int | None, "max_streams": int, "max_buffered_bytes": int,
    "tls": typing.Literal["auto", "require", "off"], "tls_cert": _Path, "tls_key": _Path, "tls_name": _Texts,
    "threat_retention_ms": int, "journal_retention_ms": int, "max_db_bytes": int,
    "correlation_window_ms": int, "prune_offline_ms": int, "notify_repeat_ms": int, "notify_delay_ms": int,
    "notify_url": _Texts, "notify_secret": str | bytes | None, "notify_on": _Texts}, total=False)
Settings.__doc__ = "The keywords of Config and Server, for type checkers; Config describes each."


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of the manager, checked on construction.

    The fields are the one table of settings: `--help`, `load()`, the keywords of `Server` and the
    README's table are all read from it. A field takes its value or the text an operator would write.
    Raises SettingError for a value that a setting may not have.
    """

    host: str = _setting(
        "127.0.0.1", "MANAGER_HOST", _HOST, "address to listen on", option="--host")
    port: int = _setting(
        8443, "MANAGER_PORT", _PORT, "port to listen on; 0 takes a free one", option="--port")
    data_dir: Path | None = _setting(
        Path("~/.panguard-manager"), "MANAGER_DATA_DIR", _FOLDER,
        "folder of manager.db and token, made if missing", option="--data-dir")
    auth_token: tuple[str, ...] = _setting(
        (), "MANAGER_AUTH_TOKEN", _TOKENS, "the admin's token, or two with a comma between while one "
        "replaces the other; without it one is generated and kept in the data folder",
        option="--auth-token", shown="generated")
    auth_token_file: Path | None = _setting(
        None, "MANAGER_AUTH_TOKEN_FILE", _FILE, "a file that holds what MANAGER_AUTH_TOKEN would",
        option="--auth-token-file")
    enroll_token: str | None = _setting(
        None, "MANAGER_ENROLL_TOKEN", _TOKEN, "a token that may register agents and nothing else")
    viewer_token: str | None = _setting(
        None, "MANAGER_VIEWER_TOKEN", _TOKEN, "a token that may read what an admin may, and change nothing")
    heartbeat_timeout_ms: int = _setting(
        60_000, "MANAGER_HEARTBEAT_TIMEOUT_MS", _MS, "silence allowed before an agent is stale", unit="ms")
    heartbeat_grace_ms: int = _setting(
        None, "MANAGER_HEARTBEAT_GRACE_MS", _whole(0, 1000 * _DAY_MS),
        "lateness forgiven on top of the timeout", unit="ms", shown="a tenth of the timeout")
    offline_timeout_ms: int = _setting(
        None, "MANAGER_OFFLINE_TIMEOUT_MS", _MS, "silence after which a stale agent is offline", unit="ms",
        shown="five timeouts")
    max_agents: int = _setting(
        100_000, "MANAGER_MAX_AGENTS", _whole(1, 10_000_000), "agents that may be registered at once")
    trusted_proxy: tuple[Any, ...] = _setting(
        (), "MANAGER_TRUSTED_PROXY", _NETWORKS, "proxies whose X-Forwarded-For is believed", shown="none")
    rate_limit: int = _setting(
        0, "MANAGER_RATE_LIMIT", _whole(0, 1_000_000_000), "requests per address and minute; 0 is no limit")
    cors_allowed_origins: tuple[str, ...] = _setting(
        (), "CORS_ALLOWED_ORIGINS", _ORIGINS, "web origins that may call from a browser", shown="none")
    threat_retention_ms: int = _setting(
        30 * _DAY_MS, "MANAGER_THREAT_RETENTION_MS", _MS, "age at which a threat event is removed", unit="ms",
        shown="2592000000, 30 days")
    journal_retention_ms: int = _setting(
        30 * _DAY_MS, "MANAGER_JOURNAL_RETENTION_MS", _MS, "age at which a journal entry is removed",
        unit="ms", shown="2592000000, 30 days")
    max_db_bytes: int = _setting(
        2**32, "MANAGER_MAX_DB_BYTES", _whole(2**20, 2**49), "size of the database from which on the oldest "
        "threat events and journal entries are removed early", unit="bytes", shown="4294967296, 4 GiB")
    correlation_window_ms: int = _setting(
        300_000, "MANAGER_CORRELATION_WINDOW_MS", _MS,
        "time within which events of several agents are taken for one attack", unit="ms")
    tls: str = _setting(
        "auto", "MANAGER_TLS", _TLS, "auto: TLS for all, plaintext for loopback and the proxy only; require: "
        "plaintext for nobody; off: plaintext for all", option="--tls")
    tls_cert: Path | None = _setting(
        None, "MANAGER_TLS_CERT", _FILE,
        "certificate chain (PEM) instead of the self-signed one in the data folder", option="--tls-cert")
    tls_key: Path | None = _setting(
        None, "MANAGER_TLS_KEY", _FILE, "private key (PEM) of that certificate", option="--tls-key")
    tls_name: tuple[str, ...] = _setting(
        (), "MANAGER_TLS_NAME", _TLS_NAMES, "further names and addresses, with commas between, for the "
        "self-signed certificate", option="--tls-name", shown="none")
    open_enrollment: bool = _setting(
        False, "MANAGER_OPEN_ENROLLMENT", _SWITCH, "1 lets agents register without a token, as the Guard "
        "agent shipped on npm does", shown="0")
    open_enrollment_org: str | None = _setting(
        None, "MANAGER_OPEN_ENROLLMENT_ORG", _ORG, "org of the agents that register without a token")
    reenroll: bool = _setting(
        True, "MANAGER_REENROLL", _SWITCH, "0 lets an enroller register no known machine_id again: that "
        "takes the admin's token or the agent's own", shown="1")
    max_streams: int = _setting(
        500, "MANAGER_MAX_STREAMS", _whole(0, 100_000), "event streams that may be open at once")
    connections_per_address: int = _setting(
        None, "MANAGER_CONNECTIONS_PER_ADDRESS", _whole(1, 1_000_000), "connections that an address may have "
        "open without a credential shown on them; a trusted proxy any number", shown="an eighth of all")
    max_buffered_bytes: int = _setting(
        32 * 2**20, "MANAGER_MAX_BUFFERED_BYTES", _whole(2 * 2**20, 2**40),
        "bytes of request bodies kept in memory at once; further bodies are refused with 503", unit="bytes")
    notify_url: tuple[str, ...] = _setting(
        (), "MANAGER_NOTIFY_URL", _RECEIVERS,
        "receivers of notifications, up to 8 addresses with commas between", shown="none")
    notify_secret: bytes | None = _setting(
        None, "MANAGER_NOTIFY_SECRET", _SECRET,
        "secret that signs notifications (Standard Webhooks): whsec_, base64")
    notify_on: tuple[str, ...] = _setting(
        ("offline", "online", "threat:high", "correlated", "conflict"), "MANAGER_NOTIFY_ON", _TOLD,
        f"what is notified, some of {', '.join(_EVENTS_TOLD)}",
        shown="offline,online,threat:high,correlated,conflict")
    notify_delay_ms: int = _setting(
        60_000, "MANAGER_NOTIFY_DELAY_MS", _MS,
        "time for which notifications are gathered; an agent back within it is not mentioned", unit="ms")
    notify_repeat_ms: int = _setting(
        0, "MANAGER_NOTIFY_REPEAT_MS", _whole(0, 1000 * _DAY_MS),
        "time between reminders of agents that are still silent; 0 is none", unit="ms")
    prune_offline_ms: int = _setting(
        0, "MANAGER_PRUNE_OFFLINE_MS", _whole(0, 1000 * _DAY_MS),
        "time offline after which an agent is deregistered; 0 is never", unit="ms")
    backup_dir: Path | None = _setting(
        None, "MANAGER_BACKUP_DIR", _FOLDER,
        "folder for backups that the manager makes itself, not the data folder")
    backup_every_ms: int = _setting(
        _DAY_MS, "MANAGER_BACKUP_EVERY_MS", _whole(1000, 1000 * _DAY_MS), "time between two of these backups",
        unit="ms", shown="86400000, a day")
    backup_keep: int = _setting(
        7, "MANAGER_BACKUP_KEEP", _whole(1, 10_000), "how many of these backups are kept, the latest")
    threads: int = _setting(
        16, "MANAGER_THREADS", _whole(1, 256), "threads that serve requests")
    log_level: str = _setting(
        "INFO", "MANAGER_LOG_LEVEL", _LEVEL, "least serious message written to standard error")
    log_format: str = _setting(
        "text", "MANAGER_LOG_FORMAT", _LOG_FORMAT,
        "how messages are written: text, or json with one object a line")

    if typing.TYPE_CHECKING:
        def __init__(self, **settings: Unpack[Settings]) -> None: ...

    def __post_init__(self) -> None:
        for each in fields(self):
            value, name = getattr(self, each.name), f"{each.name} ({each.metadata['variable']})"
            if value is None and each.default is not None and each.name != "data_dir":
                raise SettingError(_refusal(each, "None", name))
            if value is None or value == each.default == () or isinstance(value, bytes):
                continue
            text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
            if isinstance(value, bool) and not isinstance(each.default, bool):
                raise SettingError(_refusal(each, text, name))
            parsed = _parsed(each, text.lower() if isinstance(value, bool) else text, name)
            object.__setattr__(self, each.name, parsed)
        if self.auth_token_file:
            if self.auth_token:
                raise SettingError(
                    "MANAGER_AUTH_TOKEN and MANAGER_AUTH_TOKEN_FILE must not be given together")
            object.__setattr__(self, "auth_token", self._read_secret("auth_token", self.auth_token_file))
        self._check_timeouts()
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.enroll_token in self.auth_token:
            raise SettingError("MANAGER_ENROLL_TOKEN must differ from MANAGER_AUTH_TOKEN")
        if self.viewer_token and self.viewer_token in (*self.auth_token, self.enroll_token):
            raise SettingError(
                "MANAGER_VIEWER_TOKEN must differ from MANAGER_AUTH_TOKEN and MANAGER_ENROLL_TOKEN")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingError("MANAGER_TLS_CERT and MANAGER_TLS_KEY must be given together")
        if self.backup_dir and self.data_dir and self.backup_dir.absolute() == self.data_dir.absolute():
            raise SettingError("MANAGER_BACKUP_DIR must differ from MANAGER_DATA_DIR")
        if self.tls_cert and self.tls == "off":
            raise SettingError(
                "MANAGER_TLS_CERT has no use with MANAGER_TLS 'off'; it must be auto or require")

    def _check_timeouts(self) -> None:
        timeout = self.heartbeat_timeout_ms
        if self.heartbeat_grace_ms is None:
            object.__setattr__(self, "heartbeat_grace_ms", timeout // 10)
        stale_after_ms = timeout + self.heartbeat_grace_ms
        if self.offline_timeout_ms is None:
            object.__setattr__(self, "offline_timeout_ms", max(5 * timeout, stale_after_ms + 1))
        elif self.offline_timeout_ms <= stale_after_ms:
            raise SettingError(f"MANAGER_OFFLINE_TIMEOUT_MS is '{self.offline_timeout_ms}' and must be more "
                               f"than the heartbeat timeout and its grace together, {stale_after_ms}")

    @classmethod
    def load(cls, argv: Sequence[str], environ: Mapping[str, str], more_help: str = "") -> Config:
        """Settings from a command line and an environment; an option beats its variable.

        An empty variable counts as unset. A token that neither sets is read from the systemd credential
        of its name (`auth_token`, `enroll_token`, `viewer_token`), if there is one. Tokens must have
        16 characters here; those of a Config made in Python may have fewer. Raises SettingError;
        `--help` and an unknown option leave through argparse, with status 0 and 2.
        """
        parser = argparse.ArgumentParser(
            prog="panguard-manager", description="Fleet manager for Panguard Guard agents.",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
            epilog=more_help + "environment variables:\n" + "\n".join(
                f"  {each.metadata['variable']:<32}{each.metadata['help']} ({each.metadata['shown']})"
                for each in fields(cls)) + "\n\nthe commands also read " + " and ".join(_COMMANDS_VARIABLES))
        parser.add_argument("--version", action="version", version=f"Panguard Manager {__version__}")
        for each in fields(cls):
            if each.metadata["option"]:
                parser.add_argument(each.metadata["option"], dest=each.name, metavar=each.name.upper(),
                                    help=f"{each.metadata['help']} ({each.metadata['variable']})")
        options = vars(parser.parse_args(argv))
        chosen: dict[str, Any] = {}
        for each in fields(cls):
            if (text := options.get(each.name)) is not None:
                chosen[each.name] = _parsed(each, text, each.metadata["option"])
            elif text := environ.get(each.metadata["variable"]):
                chosen[each.name] = _parsed(each, text)
        for name in _TOKEN_SETTINGS:
            secret = Path(environ.get("CREDENTIALS_DIRECTORY") or os.devnull) / name
            if not {name, f"{name}_file"} & chosen.keys() and os.path.isfile(secret):
                chosen[name] = cls._read_secret(name, secret)
        config = cls(**chosen)
        for name in _TOKEN_SETTINGS:
            value = getattr(config, name) or ()
            if any(len(token) < _LEAST_TOKEN for token in ((value,) if isinstance(value, str) else value)):
                raise SettingError(f"MANAGER_{name.upper()} is too short and must be of {_LEAST_TOKEN} "
                                   "characters or more, each of two; `openssl rand -hex 16` makes one")
        return config

    @classmethod
    def advice(cls, argv: Sequence[str], environ: Mapping[str, str]) -> Iterator[str]:
        """What an operator should know about a command line and an environment that load() accepts."""
        if any(word.partition("=")[0] == "--auth-token" for word in argv):
            yield ("every user of this machine can read --auth-token in the list of processes; use "
                   "--auth-token-file or MANAGER_AUTH_TOKEN_FILE")
        known = [*(each.metadata["variable"] for each in fields(cls)), *_COMMANDS_VARIABLES]
        for name in sorted(name for name in environ if name.startswith("MANAGER_") and name not in known):
            yield f"{name!r} is no variable of this manager and has no effect; {did_you_mean(name, known)}"

    @classmethod
    def _read_secret(cls, name: str, path: Path) -> Any:
        try:
            text = path.read_text("ascii").strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
            raise SettingError(
                f"the file {path} of MANAGER_{name.upper()} cannot be read ({reason})") from None
        return _parsed(cls.__dataclass_fields__[name], text, f"the text of {path}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to say of a word that is not known: which it is like, or where all are listed."""
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]}?" if near else "--help lists them"


_COMMANDS_VARIABLES = ("MANAGER_URL", "MANAGER_CACERT")  # that the commands read, and the manager does not
_TOKEN_SETTINGS = ("auth_token", "enroll_token", "viewer_token")


def _parsed(setting: Field[Any], text: str, name: str | None = None) -> Any:
    try:
        return setting.metadata["parser"].parse(text)
    except (ValueError, KeyError):
        raise SettingError(_refusal(setting, text, name)) from None


def _refusal(setting: Field[Any], text: str, name: str | None = None) -> str:
    # A refused token may be a real one with a typing error: it does not belong in a terminal or a log.
    secret = (*_TOKEN_SETTINGS, "notify_url", "notify_secret")
    shown = "malformed (its value is not shown here)" if setting.name in secret else f"'{text}'"
    must, unit = setting.metadata["parser"].must, setting.metadata["unit"]
    return (f"{name or setting.metadata['variable']} is {shown} and must be {must}"
            + f", in {unit}" * bool(unit))


########################################################################################################
# 2  Domain ############################################################################################
########################################################################################################


class ManagerError(Exception):
    """A refusal or a fault that has words for its caller. `status` is its HTTP status."""

    status = 500

    def __init__(self, text: str, *, status: int | None = None, retry_after_s: int | None = None):
        super().__init__(text)
        self.status = status or self.status
        self.retry_after_s = retry_after_s


class Invalid(ManagerError, ValueError):
    """Input that is not what it must be; the text names every offending field."""
    status = 400


class Unauthorized(ManagerError):
    """No credential, or one that nobody was given."""
    status = 401


class Forbidden(ManagerError):
    """A credential that does not reach this far."""
    status = 403


class NotFound(ManagerError):
    """Nothing is registered under that name."""
    status = 404


class Conflict(ManagerError):
    """The request is sound but the fleet does not allow it now."""
    status = 409


class Throttled(ManagerError):
    """Too many requests of a kind from one address; `retry_after_s` says when to come back."""
    status = 429


class Unavailable(ManagerError):
    """A fault of the manager's surroundings; the text says what to do about it."""
    status = 503


class Dropped(ConnectionAbortedError):
    """The connection is to be dropped without an answer, as a fault asked for."""


class StartError(ManagerError):
    """The manager cannot start; the text says why and what to do."""


class Status(str, enum.Enum):
    """What the age of an agent's last contact says of it."""

    ONLINE = "online"
    STALE = "stale"
    OFFLINE = "offline"

    def __str__(self) -> str:
        return str(self.value)


class Moment(NamedTuple):
    """A reading of a clock in ms. `wall_ms` since 1970 is shown; `tick_ms` never steps and decides liveness.

    `suspended_ms` is how long the machine has been suspended so far, if the tick stops meanwhile. The manager
    adds `steady_ms`: it never steps, continues after a restart, and decides retention and correlation.
    """

    wall_ms: int
    tick_ms: int
    suspended_ms: int = 0
    steady_ms: int = 0

    def wall_of(self, tick_ms: int) -> int:
        """The instant, on today's wall clock, at which the tick stood at `tick_ms`."""
        return self.wall_ms - (self.tick_ms - tick_ms)


class Clock(Protocol):
    """What the manager asks of a clock: SystemClock outside, ManualClock in tests."""

    def now(self) -> Moment:
        """One reading."""

    def stalled_ms(self) -> int:
        """The time so far in which the tick ran but this process did not: stopped, or without CPU time."""

    def every(self, interval_s: float, callback: Callable[[], bool]) -> Callable[[], None]:
        """Call `callback()` every interval, again while it returns true; the function returned ends that."""


class Liveness(NamedTuple):
    """The ages, in ms since the last contact, past which an agent is stale, then offline."""

    stale_after_ms: int
    offline_after_ms: int

    @classmethod
    def of(cls, config: Config) -> Liveness:
        """As an operator has set them."""
        return cls(config.heartbeat_timeout_ms + config.heartbeat_grace_ms, config.offline_timeout_ms)

    def status(self, seen_ms: int, tick_ms: int) -> Status:
        """The status at `tick_ms` of an agent last in contact at `seen_ms`, both on the tick."""
        age_ms = tick_ms - seen_ms
        if age_ms <= self.stale_after_ms:
            return Status.ONLINE
        return Status.STALE if age_ms <= self.offline_after_ms else Status.OFFLINE

    def explain(self, now: Moment, seen_ms: int, heartbeat_ms: int, announced: Status,
                announced_ms: int) -> dict[str, Any]:
        """The fields of Agent that say which status it has at `now`, since when and why.

        `announced` is the status last written to the journal, `announced_ms` (since 1970) when it began.
        Silence is counted from zero after a start of the manager, so `seen_ms` does not tell when it began.
        """
        status = self.status(seen_ms, now.tick_ms)
        stale_ms, offline_ms = (now.wall_of(seen_ms + age_ms) for age_ms in self)
        if status is announced is Status.STALE:
            stale_ms = announced_ms
        elif status is announced is Status.OFFLINE:
            stale_ms, offline_ms = announced_ms - (self.offline_after_ms - self.stale_after_ms), announced_ms
        since_ms = {Status.ONLINE: announced_ms, Status.STALE: stale_ms, Status.OFFLINE: offline_ms}[status]
        instants = [iso(heartbeat_ms), iso(stale_ms)]
        if {each[:10] for each in instants} == {iso(now.wall_ms)[:10]}:
            instants = [each[11:] for each in instants]
        reason = "last heartbeat {}, due by {}".format(*instants)
        return {"status": status, "status_since_ms": since_ms, "stale_at_ms": stale_ms,
                "offline_at_ms": offline_ms, "status_reason": reason}

    def cutoffs(self, tick_ms: int) -> dict[str, int]:
        """The same rule as two bounds for SQL: online is `seen_ms >= online_from`, stale `>= stale_from`."""
        return {"online_from": tick_ms - self.stale_after_ms, "stale_from": tick_ms - self.offline_after_ms}


class Span(NamedTuple):
    """A time in which the manager ran and nobody set the wall clock; `from_ms` and `until_ms` are steady.

    The wall clock was `shift_ms` ahead. `first_threat` and `first_entry` are the first keys used in it.
    """

    first_threat: int
    first_entry: int
    shift_ms: int
    from_ms: int
    until_ms: int


class Identity(NamedTuple):
    """An agent as the registry knows it by its token or its id; `key` is its row."""

    key: int
    id: str
    org_id: str | None


class Caller(NamedTuple):
    """Who calls: `role` is admin, viewer, enroller, agent, anyone or manager; `address` is the client's.
    An enroller's `credential` is the id of an enrolment token, or None for MANAGER_ENROLL_TOKEN."""

    role: str
    address: str | None = None
    agent: Identity | None = None
    credential: str | None = None

    def actor(self) -> dict[str, str]:
        """How the journal names the caller; an admin's credential by the first digits of its digest."""
        names = {"role": self.role, "address": self.address, "agent_id": self.agent and self.agent.id,
                 "credential": self.credential}
        return {name: value for name, value in names.items() if value is not None}


LOCAL = Caller("admin")
"""The caller of a Manager method that was called from Python."""


@dataclass(frozen=True)
class Agent:
    """An agent as of one instant. Instants in ms since 1970, `uptime` in s, `cpu` and `memory` in percent.

    `acknowledged` is a policy version, 0 if none; `pending_policies` is how many newer policies are in force.
    At `stale_at_ms` silence makes, or made, the agent stale; at `offline_at_ms` offline.
    """

    id: str
    hostname: str
    os: str
    version: str
    ip: str
    org_id: str | None
    machine_id: str | None
    arch: str | None
    tags: tuple[str, ...]
    status: Status
    cpu: float | None
    memory: float | None
    uptime: float | None
    last_heartbeat_ms: int
    registered_ms: int
    acknowledged: int
    recent_threats: int
    pending_policies: int
    status_since_ms: int
    status_reason: str
    stale_at_ms: int
    offline_at_ms: int


@dataclass(frozen=True)
class EnrollToken:
    """A token that registers up to `max_uses` agents, until `expires_ms` (since 1970), with its org and tags.
    `token` is the credential itself, which only the call that issues it returns."""

    id: str
    expires_ms: int
    max_uses: int
    uses: int
    org_id: str | None
    tags: tuple[str, ...]
    note: str | None
    token: str | None = None


@dataclass(frozen=True)
class Registration:
    """What registering gave: the agent, its token (shown this once), and whether its id is new."""

    agent: Agent
    token: str
    created: bool


class Beat(NamedTuple):
    """What a heartbeat is answered: `at_ms` since 1970, and how many policies wait to be fetched."""

    id: str
    status: Status
    at_ms: int
    pending_policies: int


@dataclass(frozen=True)
class Entry:
    """One entry of the journal. `seq` orders it, `at_ms` (since 1970) is when what it reports happened."""

    seq: int
    at_ms: int
    type: str
    actor: Mapping[str, str]
    org_id: str | None
    agent_id: str | None
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Policy:
    """One version of one scope's policy: of all agents, of an organization, or (an override) of one agent."""

    version: int
    id: str
    name: str
    description: str | None
    rules: Sequence[Mapping[str, Any]]
    org_id: str | None
    agent_id: str | None
    broadcasted_to: int
    created_ms: int


@dataclass(frozen=True)
class Effective:
    """What the policies in force for an agent amount to; `version` 0 is none, `pending` how many it lacks."""

    version: int
    rules: Sequence[Mapping[str, Any]]
    pending: int


@dataclass(frozen=True)
class AgentPolicy:
    """What an agent must obey, and when (ms since 1970) it acknowledged that, if it has."""

    agent_id: str
    effective: Effective
    applied_ms: int | None


class Census(NamedTuple):
    """How many agents have which status, and how many threat events and policies are kept."""

    agents: Mapping[Status, int]
    threats: int
    policies: int


ENTRY_TYPES = (
    "agent_registered", "agent_reregistered", "agent_online", "agent_stale", "agent_offline", "agent_updated",
    "agent_deregistered", "agents_pruned", "identity_conflict", "threats_reported", "threats_correlated",
    "threat_updated", "policy_created", "policy_dropped", "enroll_token_issued", "enroll_token_revoked",
    "silence_forgiven", "clock_stepped", "agent_refused", "notification_failed", "manager_started",
    "manager_stopped")
SEVERITIES = ("critical", "high", "medium", "low")
THREAT_STATES = ("open", "acknowledged", "false_positive")
RULE_TYPES = ("block_ip", "alert_threshold", "auto_respond", "custom")
PERIODS_MS = {"1h": 3_600_000, "6h": 6 * 3_600_000, "24h": _DAY_MS, "7d": 7 * _DAY_MS, "30d": 30 * _DAY_MS}
SOURCE_KEYS = ("sourceIp", "sourceIP", "source_ip", "src_ip", "remoteAddress", "attacker_ip", "client_ip")
HASH_KEYS = ("sha256", "sha1", "md5", "fileHash", "hash", "malwareHash")


def iso(ms: int) -> str:
    """An instant in ms since 1970 as the API writes it: 2026-03-07T12:00:00.000Z."""
    return f"{_iso_second(ms // 1000)}.{ms % 1000:03d}Z"


@functools.lru_cache(maxsize=64)
def _iso_second(second: int) -> str:
    return f"{datetime.fromtimestamp(second, timezone.utc):%Y-%m-%dT%H:%M:%S}"


def version_text(version: int) -> str | None:
    """A policy's version as the API writes it; version 0 is none."""
    return f"v{version}" if version else None


def event_id(key: int) -> str:
    """The id of a threat event."""
    return f"evt_{key:012x}"


def resolve(in_force: Sequence[tuple[int, Sequence[Mapping[str, Any]]]], acknowledged: int) -> Effective:
    """What policies in force, as (version, rules) from the widest scope to the narrowest, amount to.

    A rule replaces those of its type from wider scopes; rules of one type in one scope stand together.
    """
    rules: list[Mapping[str, Any]] = []
    for _, narrower in in_force:
        replaced = {rule["type"] for rule in narrower}
        rules = [rule for rule in rules if rule["type"] not in replaced] + list(narrower)
    versions = [version for version, _ in in_force]
    return Effective(max(versions, default=0), rules, sum(version > acknowledged for version in versions))


def first_text(details: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first text among the values of `keys`, in their order."""
    texts = (value.strip() for key in keys if isinstance(value := details.get(key), str))
    return next(filter(None, texts), None)


def source_address(details: Mapping[str, Any]) -> str | None:
    """The address that an event came from, in canonical form if it is one."""
    found = first_text(details, SOURCE_KEYS)
    return found and (_canonical(found) if len(found) < 64 else found[:255])


@functools.lru_cache(maxsize=1024)  # an attack has few addresses, and parsing one takes long
def _canonical(address: str) -> str:
    return str(_as_ip(address) or address)


def file_hash(details: Mapping[str, Any]) -> str | None:
    """The hash of the file that an event is about, in lower case."""
    found = first_text(details, HASH_KEYS)
    return found and found[:255].lower()


########################################################################################################
# 3  Validation ########################################################################################
########################################################################################################


class Check(NamedTuple):
    """One rule: `clean(value, path, problems)` gives the value or adds `path: must be …`; `schema` is the
    same rule for OpenAPI."""

    clean: Callable[[Any, str, list[str]], Any]
    schema: Mapping[str, Any]


class Param(NamedTuple):
    """One row of a table of body fields or query parameters."""

    check: Check
    required: bool = False
    default: Any = None


Table = Mapping[str, Param]
Translate = Callable[[dict[str, Any]], dict[str, Any]]


def _check(accept: Callable[[Any], Any], must: str, kind: type | tuple[type, ...],
           schema: Mapping[str, Any]) -> Check:
    """A check of a value of type `kind`: `accept` returns the clean value, or raises ValueError."""
    def clean(value: Any, path: str, problems: list[str]) -> Any:
        with contextlib.suppress(ValueError, OverflowError):
            if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
                return accept(value)
        problems.append(f"{path}: must be {must}")
        return None
    return Check(clean, schema)


def text(longest: int, *, lines: bool = False) -> Check:
    """Text of 1 to `longest` characters, not all blank, no control characters; `lines` allows line ends."""
    printable = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$" if lines else r"^[^\x00-\x1f\x7f-\x9f]*$"
    is_printable = re.compile(printable.rstrip("$")).fullmatch

    def accept(value: str) -> str:
        if not 0 < len(value) <= longest or value.isspace() or not is_printable(value):
            raise ValueError
        return value
    return _check(accept, f"text of 1 to {longest} characters without control characters", str, {
        "type": "string", "minLength": 1, "maxLength": longest, "pattern": printable})


def number(low: float, high: float, *, whole: bool = False) -> Check:
    """A finite number from `low` to `high`, without a fraction if `whole`."""
    def accept(value: float) -> float:
        if not low <= value <= high:
            raise ValueError
        return value
    must = f"a {'whole number' if whole else 'number'} from {low} to {high}"
    return _check(accept, must, int if whole else (int, float),
                  {"type": "integer" if whole else "number", "minimum": low, "maximum": high})


def digits(low: int, high: int) -> Check:
    """A whole number, written in a query or given in Python."""
    def clean(value: Any, path: str, problems: list[str]) -> Any:
        written = isinstance(value, str) and re.fullmatch("[0-9]{1,16}", value)
        return checked_number.clean(int(value) if written else value, path, problems)
    checked_number = number(low, high, whole=True)
    return Check(clean, checked_number.schema)


def one_of(*values: str) -> Check:
    return _check(lambda value: values[values.index(value)], "one of " + ", ".join(values), str,
                  {"type": "string", "enum": list(values)})


def numbered(pattern: str, example: str, read: Callable[[str], int]) -> Check:
    """Text that matches `pattern`; its clean value is the number that `read` finds in it."""
    def accept(value: str) -> int:
        if not re.fullmatch(pattern, value):
            raise ValueError
        return read(value)
    return _check(accept, example, str, {"type": "string", "pattern": f"^{pattern}$"})


def list_of(item: Check, most: int, *, least: int = 0) -> Check:
    """A list of `least` to `most` values that each pass `item`."""
    def clean(value: Any, path: str, problems: list[str]) -> Any:
        if not isinstance(value, list) or not least <= len(value) <= most:
            problems.append(f"{path}: must be a list of {least} to {most} values")
            return None
        return [item.clean(each, f"{path}[{index}]", problems) for index, each in enumerate(value)]
    return Check(clean, {"type": "array", "items": item.schema, "minItems": least, "maxItems": most})


def _accept_address(value: str) -> str:
    if "%" in value:
        raise ValueError
    return str(ipaddress.ip_address(value))


def _accept_switch(value: str) -> bool:
    return ("false", "true").index(value) == 1


def _accept_object(value: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [value]
    for _ in range(64):
        inner = [each for one in level for each in (one.values() if isinstance(one, dict) else one)]
        level = [each for each in inner if isinstance(each, (dict, list))]
        if not level:
            to_json(value)
            return value
    raise ValueError


def instant_ms(value: str) -> int:
    """The ms since 1970 of an ISO 8601 instant. Raises ValueError."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(\.\d{1,9})?([Zz]|[+ -]\d\d:\d\d)", value,
                         re.ASCII)
    if not match:
        raise ValueError
    day, second, fraction, zone = match.groups()
    # A '+' that nobody escaped arrives in a query as a blank.
    at = datetime.fromisoformat(f"{day}T{second}" + ("+00:00" if zone in "Zz" else zone.replace(" ", "+")))
    return int(at.timestamp()) * 1000 + int(f"{fraction or '.'}000"[1:4])


def _accept_claim(value: str) -> str:
    instant_ms(value)
    return value


def _accept_instant(value: str | int) -> int:
    if isinstance(value, str):
        return instant_ms(value)
    iso(value)  # raises ValueError outside of the years 1 to 9999
    return value


_MUST_BE_INSTANT = "an instant such as 2026-03-07T12:00:00.000Z"
_INSTANT_SCHEMA = {"type": "string", "format": "date-time"}
# Of a query, or in ms since 1970 from Python; the clean value is in ms since 1970.
INSTANT = _check(_accept_instant, _MUST_BE_INSTANT, (str, int), _INSTANT_SCHEMA)
CLAIMED_INSTANT = _check(_accept_claim, _MUST_BE_INSTANT, str, _INSTANT_SCHEMA)  # the clean value is the text
ADDRESS = _check(_accept_address, "an IPv4 or IPv6 address", str,
                 {"type": "string", "anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]})
POLICY_VERSION = numbered("v[1-9][0-9]{0,14}", "a policy version such as v2", lambda found: int(found[1:]))
EVENT_ID = numbered("evt_[0-9a-f]{12}", "the id of a threat event such as evt_00000000002a",
                    lambda found: int(found[4:], 16))
FLAG = _check(bool, "true or false", bool, {"type": "boolean"})
SWITCH = _check(_accept_switch, "true or false", str, FLAG.schema)  # as a query has it
OBJECT = _check(_accept_object, "a JSON object nested at most 64 deep, with finite numbers", dict,
                {"type": "object"})


def record(table: Table, *, strict: bool = False) -> Check:
    """A JSON object with the fields of a table, and if `strict` no others."""
    def clean(value: Any, path: str, problems: list[str]) -> Any:
        if not isinstance(value, dict):
            problems.append(f"{path}: must be a JSON object")
            return None
        return clean_fields(table, value, problems, path + ".", strict=strict)
    return Check(clean, table_schema(table, strict=strict))


def spelled_either_way(table: Table) -> Check:
    """A record with the fields of `table` and no others, each named as over HTTP or as in Python."""
    names, check = {snake(name): name for name in table}, record(table, strict=True)

    def clean(value: Any, path: str, problems: list[str]) -> Any:
        if isinstance(value, Mapping):
            value = {names.get(name, name): each for name, each in value.items()}
        return check.clean(value, path, problems)
    return Check(clean, check.schema)


def table_schema(table: Table, *, strict: bool = False) -> dict[str, Any]:
    """The JSON Schema of an object with the fields of `table`, and if `strict` no others."""
    properties = {name: param.check.schema if param.required else
                  {"anyOf": [param.check.schema, {"type": "null"}]} for name, param in table.items()}
    return {"type": "object", **({"additionalProperties": False} if strict else {}),
            "required": [name for name, param in table.items() if param.required], "properties": properties}


def need(check: Check) -> Param:
    return Param(check, required=True)


def may(check: Check, default: Any = None) -> Param:
    """A field that may be absent or null."""
    return Param(check, default=default)


@functools.cache
def snake(name: str) -> str:
    """The Python name of a JSON field: sigmaRuleId is sigma_rule_id."""
    return re.sub(r"[A-Z]", lambda capital: "_" + capital[0].lower(), name)


def clean_fields(table: Table, values: Mapping[str, Any], problems: list[str], prefix: str = "", *,
                 strict: bool = False) -> dict[str, Any]:
    """The fields of `table` out of `values`, under their Python names. Adds to `problems` what is wrong; with
    `strict` also names that are not in the table."""
    cleaned = {}
    if strict:
        problems += [f"{prefix}{name[:64]!r}: is unknown, known are: {', '.join(table) or 'none'}"
                     for name in values if name not in table][:20]
    for name, param in table.items():
        value = values.get(name)
        if value is None and param.required:
            problems.append(f"{prefix}{name}: is required")
        cleaned[snake(name)] = param.default if value is None else param.check.clean(
            value, prefix + name, problems)
    return cleaned


def clean_query(table: Table, query: str, *, strict: bool = False) -> dict[str, Any]:
    """The parameters of `table` out of a query string, and if `strict` no others. Raises Invalid."""
    try:
        given = parse_qs(query, keep_blank_values=True, max_num_fields=200, errors="strict") if query else {}
    except ValueError:
        raise Invalid("query: must be at most 200 name=value pairs in UTF-8") from None
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, texts in given.items():
        many = name in table and table[name].check.schema.get("type") == "array"
        if len(texts) > 1 and not many and name in table:
            problems.append(f"{name}: must be given once")
        values[name] = texts if many else texts[0]
    return _valid(clean_fields(table, values, problems, strict=strict), problems)


def clean_body(table: Table, raw: bytes, translate: Translate | None = None, *,
               strict: bool = False) -> dict[str, Any]:
    """The fields of `table` out of a JSON body, which `translate` changes first. No body counts as `{}`.
    Raises Invalid; with `strict` for unknown fields too."""
    problems: list[str] = []
    body = parse_object(raw) if raw else {}
    body = translate(body) if translate else body
    return _valid(clean_fields(table, body, problems, strict=strict), problems)


# Numbers of calls from Python, and how HTTP writes them.
_WRITTEN: Mapping[str, Callable[[int], str | None]] = {
    "policy_version": version_text, "before": event_id, "key": event_id}


def clean_arguments(table: Table, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call from Python, by the rules for the fields of `table` over HTTP. Raises Invalid.

    Names are in Python's spelling, sequences may be tuples, and what `_WRITTEN` names may be a number.
    """
    names = {snake(name): name for name in table}
    problems: list[str] = []
    values = {}
    for name, value in arguments.items():
        if isinstance(value, (tuple, set)):
            value = list(value)
        elif name in _WRITTEN and type(value) is int:
            value = _WRITTEN[name](value)
        values[names.get(name, name)] = value
    return _valid(clean_fields(table, values, problems, strict=True), problems)


def _valid(cleaned: dict[str, Any], problems: Sequence[str]) -> dict[str, Any]:
    if problems:
        raise Invalid("; ".join(problems))
    return cleaned


_Method = TypeVar("_Method", bound=Callable[..., Any])


def checked(table: Table) -> Callable[[_Method], _Method]:
    """A decorator: a call of the method from Python, whose `caller` is LOCAL, is checked by `table`. Calls
    over HTTP are checked already. Arguments that `table` does not name are not checked. Raises Invalid."""
    def decorate(method: _Method) -> _Method:
        signature = inspect.signature(method)
        names = {snake(name) for name in table}

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("caller", LOCAL) is not LOCAL:
                return method(*args, **kwargs)
            given = signature.bind_partial(*args, **kwargs).arguments
            cleaned = clean_arguments(table, {name: value for name, value in given.items() if name in names})
            given.update((name, value) for name, value in cleaned.items() if name in signature.parameters)
            return method(given.pop("self"), **given)
        return cast("_Method", call)
    return decorate


def _no_constant(name: str) -> Any:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def to_json(value: Any) -> str:
    """Compact JSON; text stays UTF-8. Raises ValueError for what JSON has no word for."""
    return _ENCODER.encode(value)


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object in strict UTF-8. Raises Invalid."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # an unpaired surrogate has no UTF-8
    except UnicodeError:
        raise Invalid("body: must be JSON in UTF-8") from None
    except RecursionError:
        raise Invalid("body: is nested too deeply") from None
    except ValueError as error:
        raise Invalid(f"body: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise Invalid("body: must be a JSON object")
    return value


_NAME = text(255)
_KEY = text(128)
_TAGS = list_of(text(64), 64)
_EXACT = 2**53 - 1

REGISTER: Table = {
    "hostname": need(_NAME), "os": need(_NAME), "version": need(_NAME), "ip": may(ADDRESS),
    "org_id": may(_KEY), "tags": may(_TAGS), "arch": may(_NAME), "machine_id": may(_KEY)}
HEARTBEAT: Table = {
    "uptime": may(number(0, _EXACT)), "cpu": may(number(0, 100)), "memory": may(number(0, 100)),
    "version": may(_NAME), "policyVersion": may(POLICY_VERSION)}
RETAG: Table = {"tags": may(_TAGS), "addTags": may(_TAGS), "removeTags": may(_TAGS)}
_DETAILS = OBJECT._replace(schema={**OBJECT.schema, "description":
    f"The source address is the first text among {', '.join(SOURCE_KEYS)}; the file's hash among "
    + ", ".join(HASH_KEYS)})
EVENT: Table = {
    "type": need(_NAME), "severity": need(one_of(*SEVERITIES)), "details": need(_DETAILS),
    "timestamp": may(CLAIMED_INSTANT), "sigmaRuleId": may(_NAME), "ruleId": may(_NAME),
    "confidence": may(number(0, 1)), "id": may(_NAME)}
EVENTS: Table = {"events": need(list_of(record(EVENT), 1000, least=1))}
REPORT: Table = {"events": need(list_of(spelled_either_way(EVENT), 1000, least=1))}
RULE: Table = {
    "type": need(one_of(*RULE_TYPES)), "config": need(OBJECT),
    "enabled": may(FLAG, True)}
POLICY: Table = {
    "name": need(_NAME), "rules": need(list_of(record(RULE, strict=True), 500, least=1)),
    "description": may(text(4096, lines=True)), "org_id": may(_KEY), "agent_id": may(_KEY),
    "dryRun": may(FLAG, False)}
PREVIEW: Table = {name: POLICY[name] for name in ("rules", "org_id", "agent_id")}
ENROLL_TOKEN: Table = {
    "ttlMs": may(number(1, 90 * _DAY_MS, whole=True), _DAY_MS),
    "maxUses": may(number(1, 1_000_000, whole=True), 1), "org_id": may(_KEY), "tags": may(_TAGS),
    "note": may(text(255))}
# The Guard agent as shipped (contract, last section): its bodies, turned into ours before they are checked.
_SHIPPED_KEYS = {"sourceIp": (*SOURCE_KEYS, "remoteAddr"),
                 "fileHash": (*HASH_KEYS, "newHash", "currentChecksum")}


def shipped_heartbeat(body: dict[str, Any]) -> dict[str, Any]:
    """Its uptime is in ms; of the rest nothing is asked for."""
    if "eventsProcessed" not in body and "memoryUsageMB" not in body:
        return body
    uptime = body.get("uptime")
    if isinstance(uptime, (int, float)) and not isinstance(uptime, bool) and abs(uptime) <= _EXACT:
        uptime /= 1000
    return {"uptime": uptime}


def shipped_event(body: dict[str, Any]) -> dict[str, Any]:
    """It reports one `{event, verdict}` at a time; both are kept whole in `details`."""
    if "event" not in body or "events" in body:
        return body
    event, verdict = body["event"], body.get("verdict") or {}
    if not isinstance(event, dict) or not isinstance(verdict, dict):
        raise Invalid("event, verdict: must be JSON objects")
    confidence = verdict.get("confidence")
    if isinstance(confidence, (int, float)) and not isinstance(confidence, bool):
        confidence = confidence / 100 if abs(confidence) <= 100 else -1
    severity = event.get("severity")
    metadata = event["metadata"] if isinstance(event.get("metadata"), dict) else {}
    found = {name: first_text(event, keys) or first_text(metadata, keys)
             for name, keys in _SHIPPED_KEYS.items()}
    details = {name: value for name, value in found.items() if value} | {"event": event, "verdict": verdict}
    return {"events": [{
        "type": event.get("category"), "severity": "low" if severity == "info" else severity,
        "details": details, "confidence": confidence, "timestamp": event.get("timestamp"),
        "id": event.get("id")}]}


PAGE: Table = {"page": may(digits(1, 1_000_000)), "limit": may(digits(1, 200))}
_SOME_AGENTS: Table = {
    "status": may(one_of(*Status)), "org_id": may(_KEY), "tag": may(_TAGS), "os": may(_NAME),
    "version": may(_NAME), "q": may(_NAME)}
SORTS = ("hostname", "lastHeartbeat", "status", "version", "recentThreats", "cpu", "memory")
AGENT_FILTER: Table = {
    **_SOME_AGENTS, "silent_ms": may(digits(0, _EXACT)),
    "sort": may(one_of(*(sign + name for name in SORTS for sign in ("", "-")))), **PAGE}
AGENT_LIST: Table = {**AGENT_FILTER, "detail": may(SWITCH, False)}
BULK_FILTER: Table = {**_SOME_AGENTS, "silent_ms": may(number(0, _EXACT)), "all": may(FLAG)}
BULK: Table = {
    "ids": may(list_of(_KEY, 1000)), "filter": may(record(BULK_FILTER, strict=True)), "addTags": may(_TAGS),
    "removeTags": may(_TAGS), "deregister": may(FLAG), "dryRun": may(FLAG, False)}
THREAT_FILTER: Table = {
    "since": may(INSTANT), "until": may(INSTANT), "org_id": may(_KEY), "agent_id": may(_KEY),
    "severity": may(one_of(*SEVERITIES)), "type": may(_NAME), "source_ip": may(_NAME),
    "file_hash": may(_NAME), "state": may(one_of(*THREAT_STATES)), "before": may(EVENT_ID), **PAGE}
TRIAGE: Table = {"state": may(one_of(*THREAT_STATES)), "note": may(text(4096, lines=True))}
OF_ORG: Table = {"org_id": may(_KEY)}
SUMMARY: Table = {"period": may(one_of(*PERIODS_MS), "24h"), **OF_ORG}
STREAM_FILTER: Table = {
    "type": may(list_of(one_of(*ENTRY_TYPES), len(ENTRY_TYPES))), "agent_id": may(_KEY), "org_id": may(_KEY)}
ENTRY_FILTER: Table = {
    "after": may(digits(0, _EXACT), 0), "limit": may(digits(1, 200), 50), **STREAM_FILTER,
    "since": may(INSTANT), "until": may(INSTANT), "order": may(one_of("asc", "desc"), "asc")}
_ENTRY_TYPE = STREAM_FILTER["type"].check


def _clean_types(value: Any, path: str, problems: list[str]) -> Any:
    return _ENTRY_TYPE.clean([value] if isinstance(value, str) else value, path, problems)


JOURNAL: Table = {
    **ENTRY_FILTER, "type": may(Check(_clean_types, _ENTRY_TYPE.schema)),
    "limit": may(number(-1, _EXACT, whole=True), -1)}
TIMELINE: Table = {"agent_id": may(_KEY), "hours": may(digits(1, 168), 24)}
MEANINGS = {
    "id": "Id of the agent, the threat event or the enrolment token",
    "page": "Number of the page, from 1; the answer then has `pagination`",
    "limit": "How many items to answer at most", "status": "Status now",
    "tag": "A tag; an agent must carry all of those given", "os": "Operating system, exactly",
    "q": "Text in hostname, id, address or a tag, in any case of letters",
    "version": "Version of the agent, exactly",
    "silent_ms": "Silent for at least this many ms",
    "sort": "Field to sort by; `-` before it reverses the order",
    "detail": "Whether to show all fields of each agent", "org_id": "Id of an organization",
    "agent_id": "Id of an agent", "since": "Not before this instant", "until": "Before this instant",
    "severity": "Severity, exactly", "source_ip": "Address that the events came from",
    "type": "Type of the events or entries; of entries it may be given several times",
    "file_hash": "Hash of the file that the events are about",
    "state": "State that an operator gave the events",
    "before": "Id of the last event read; the list goes on with the next older one",
    "after": "Number of the last entry read; the list goes on with the next one",
    "order": "`desc`: the latest first", "period": "Time up to now", "hours": "Hours up to now",
    "ack": "Whether this request acknowledges the policy",
    "Last-Event-ID": "Number of the last entry read; the stream goes on with the next one",
    "If-None-Match": "The `ETag` of what the caller has", "ETag": "Name of this version of the answer",
    "Retry-After": "Seconds to wait before the next try", "X-Caller": "Role of the caller",
    "X-Heartbeat-Interval": "Seconds to wait before the next heartbeat"}
"""What query parameters and headers mean, for OpenAPI."""

# The objects that are answered, one in each row. A word is a field, `name:type`; without a type it is text.
# `?` allows null. `*` before the name: the field may be absent. `[…]` is a list, `{…}` an object of such
# values. A type with a capital letter is another row. `=` names the record's attribute, if it is not `name`
# in Python's spelling.
ANSWERS = {
    "AgentItem": "id hostname os version ip status:Status tags:[text] lastHeartbeat:instant "
                 "registeredAt:instant",
    "Agent": "id hostname os version ip status:Status tags:[text] cpu:number? memory:number? uptime:number? "
             "lastHeartbeat:instant registeredAt=registered_ms:instant recentThreats:int "
             "activePolicyVersion=acknowledged:version? pendingPolicies:int org_id? machine_id? arch? "
             "statusSince:instant statusReason staleAt:instant offlineAt:instant",
    "Registered": "id hostname os version ip tags:[text] status:Status registeredAt=registered_ms:instant "
                  "*org_id *machine_id token",
    "Beat": "id status:Status lastHeartbeat:instant pendingPolicies:int",
    "EnrollToken": "id *token expiresAt=expires_ms:instant maxUses:int uses:int org_id? tags:[text] note?",
    "Bulk": "matched:int changed:int ids:[text]", "Message": "message", "Dropped": "message version:version",
    "Received": "received:int eventIds:[text]",
    "Threat": "id agentId hostname type severity:Severity confidence:number? details:object sigmaRuleId? "
              "timestamp? receivedAt:instant correlatedWith:[text] state:ThreatState note?",
    "ThreatSummary": "period total:int bySeverity:Severities byType:{int} topAgents:[AgentCount] "
                     "topSourceIps:[IpCount] falsePositives:int",
    "Severities": "critical:int high:int medium:int low:int", "AgentCount": "agentId hostname count:int",
    "IpCount": "ip count:int", "TypeCount": "type count:int",
    "Rule": "type:RuleType config:object *enabled:bool",
    "Policy": "id name description? version:version rules:[Rule] *org_id *agent_id broadcastedTo:int "
              "createdAt=created_ms:instant",
    "PolicyPreview": "dryRun:bool agents:int broadcastedTo:int replaces:version? added:[Rule] removed:[Rule]",
    "AgentPolicy": "agentId policyVersion:version? rules:[Rule] appliedAt:instant?", "Rules": "rules:[text]",
    "Overview": "totalAgents:int onlineAgents:int staleAgents:int offlineAgents:int threatSummary:Threats "
                "activePolicyVersion:version? topThreats:[TypeCount] agentsByOs:{int} updatedAt:instant",
    "Threats": "last24h:ThreatTotals last7d:ThreatTotals",
    "ThreatTotals": "total:int critical:int high:int medium:int low:int falsePositives:int",
    "Timeline": "agentId? hours:[Hour] *intervals:[Interval]",
    "Hour": "at:instant *online:int *stale:int *offline:int threats:Severities",
    "Interval": "status:Status from:instant until:instant",
    "Entry": "seq:int at=at_ms:instant type:EntryType agentId? org_id? actor:Actor",
    "Actor": "role *address *agent_id *credential", "Alive": "status",
    "Health": "status version uptime:int *agents:Totals *warning *receivers:[ReceiverState]",
    "Totals": "total:int online:int", "ReceiverState": "receiver failing:bool",
    "Pagination": "total:int page:int limit:int pages:int",
    "TestedReceiver": "receiver delivered:bool answer"}
_TYPES: Mapping[str, Mapping[str, Any]] = {
    "text": {"type": "string"}, "int": {"type": "integer"}, "number": {"type": "number"},
    "bool": FLAG.schema, "object": OBJECT.schema, "instant": INSTANT.schema, "version": POLICY_VERSION.schema}
_WORDS = {"Status": tuple(map(str, Status)), "Severity": SEVERITIES, "ThreatState": THREAT_STATES,
          "RuleType": RULE_TYPES, "EntryType": ENTRY_TYPES}


class AnswerField(NamedTuple):
    """One word of a row of ANSWERS."""

    name: str
    attribute: str
    type: str
    optional: bool

    def shown(self, value: Any) -> Any:
        """A record's value as the API writes it."""
        if "instant" in self.type:
            return None if value is None else iso(value)
        return version_text(value) if "version" in self.type else value


@functools.cache
def answer_fields(answer: str) -> tuple[AnswerField, ...]:
    """The fields of a row of ANSWERS, or of a text like one."""
    found = []
    for word in ANSWERS.get(answer, answer).split():
        name, _, kind = word.strip("*").partition(":")
        name, _, attribute = name.partition("=")
        kind = kind or "text" + "?" * name.endswith("?")
        name = name.rstrip("?")
        attribute = attribute or snake(name) + "_ms" * kind.startswith("instant")
        found.append(AnswerField(name, attribute, kind, word[0] == "*"))
    return tuple(found)


def shape(answer: str, record: Any, **more: Any) -> dict[str, Any]:
    """A record as a row of ANSWERS shows it; `more` are values that the record has not."""
    values = ((each, each.shown(more[each.name] if each.name in more else getattr(record, each.attribute)))
              for each in answer_fields(answer))
    return {each.name: value for each, value in values if value is not None or not each.optional}


def present(kind: str, data: Any) -> Any:
    """Data in the form of `kind`, a type of ANSWERS. Records become objects; objects, JSON and None stay."""
    if isinstance(data, list):
        return [present(kind[1:-1], each) for each in data]
    return data if data is None or isinstance(data, (dict, bytes)) else shape(kind.rstrip("?"), data)


def answer_schema(kind: str) -> Mapping[str, Any]:
    """The JSON Schema of a type of ANSWERS; `A|B` is either."""
    if kind.endswith("?"):
        return {"anyOf": [answer_schema(kind[:-1]), {"type": "null"}]}
    if kind[0] == "[":
        return {"type": "array", "items": answer_schema(kind[1:-1])}
    if kind[0] == "{":
        return {"type": "object", "additionalProperties": answer_schema(kind[1:-1])}
    if "|" in kind:
        return {"anyOf": [answer_schema(each) for each in kind.split("|")]}
    return _TYPES.get(kind) or {"$ref": f"#/components/schemas/{kind}"}


def object_schema(answer: str) -> dict[str, Any]:
    """The JSON Schema of an object with the fields of a row of ANSWERS. Further ones may come."""
    found = answer_fields(answer)
    return {"type": "object", "required": [each.name for each in found if not each.optional],
            "properties": {each.name: answer_schema(each.type) for each in found}}


########################################################################################################
# 4  Storage ###########################################################################################
########################################################################################################

# Append only: a file's user_version counts the migrations it has had, and released ones never change again.
# They run with foreign keys off, so that a table can be made anew. E501: a released line is not wrapped.
MIGRATIONS = (
    """
    CREATE TABLE agents (            -- who an agent is; `key` is registration order
        key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, token_digest BLOB,
        hostname TEXT NOT NULL, os TEXT NOT NULL, arch TEXT, ip TEXT NOT NULL, org_id TEXT, machine_id TEXT,
        tags TEXT NOT NULL, registered_ms INTEGER NOT NULL);
    CREATE INDEX agents_token ON agents (token_digest, id, org_id) WHERE token_digest IS NOT NULL;
    CREATE INDEX agents_os ON agents (os);
    CREATE INDEX agents_org ON agents (org_id);
    CREATE INDEX agents_machine ON agents (machine_id, org_id) WHERE machine_id IS NOT NULL;
    CREATE TABLE contacts (          -- what its heartbeats say: narrow, because it is all that they write
        agent INTEGER PRIMARY KEY REFERENCES agents (key) ON DELETE CASCADE,
        seen_ms INTEGER NOT NULL,    -- on the tick of this run, which no step of the system clock moves
        heartbeat_ms INTEGER NOT NULL,
        announced TEXT NOT NULL,     -- the status last written to the journal, never the answer to a read
        version TEXT NOT NULL, uptime, cpu, memory,
        acknowledged INTEGER NOT NULL DEFAULT 0, acknowledged_ms INTEGER);
    CREATE INDEX contacts_silent ON contacts (announced, seen_ms) WHERE announced != 'online';
    CREATE TABLE agent_tags (        -- kept by the triggers below; `agents.tags` is the truth
        tag TEXT NOT NULL, agent INTEGER NOT NULL REFERENCES agents (key) ON DELETE CASCADE,
        PRIMARY KEY (tag, agent)) WITHOUT ROWID;
    CREATE INDEX agent_tags_agent ON agent_tags (agent);
    CREATE TRIGGER agent_tagged AFTER INSERT ON agents BEGIN
        INSERT INTO agent_tags SELECT value, new.key FROM json_each(new.tags);
    END;
    CREATE TRIGGER agent_retagged AFTER UPDATE OF tags ON agents BEGIN
        DELETE FROM agent_tags WHERE agent = new.key;
        INSERT INTO agent_tags SELECT value, new.key FROM json_each(new.tags);
    END;
    CREATE TABLE journal (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, type TEXT NOT NULL, actor TEXT NOT NULL,
        org_id TEXT, agent_id TEXT, data TEXT NOT NULL);
    CREATE INDEX journal_time ON journal (at_ms);
    CREATE INDEX journal_agent ON journal (agent_id) WHERE agent_id IS NOT NULL;
    CREATE INDEX journal_type ON journal (type);
    CREATE INDEX journal_org ON journal (org_id) WHERE org_id IS NOT NULL;
    CREATE TABLE threats (           -- outlives its agent, hence hostname and org_id of its own
        key INTEGER PRIMARY KEY AUTOINCREMENT, agent_id TEXT NOT NULL, hostname TEXT NOT NULL, org_id TEXT,
        own_id TEXT, type TEXT NOT NULL, severity TEXT NOT NULL, confidence, sigma_rule_id TEXT,
        timestamp TEXT, received_ms INTEGER NOT NULL, source_ip TEXT, file_hash TEXT, details TEXT NOT NULL);
    CREATE UNIQUE INDEX threats_own ON threats (agent_id, own_id) WHERE own_id IS NOT NULL;
    CREATE INDEX threats_time ON threats (received_ms, severity, type, agent_id, source_ip, org_id);
    CREATE INDEX threats_agent ON threats (agent_id, received_ms);
    CREATE INDEX threats_org ON threats (org_id, received_ms, severity, type, agent_id, source_ip)
        WHERE org_id IS NOT NULL;
    CREATE INDEX threats_severity ON threats (severity, received_ms);
    CREATE INDEX threats_type ON threats (type, received_ms);
    CREATE INDEX threats_source ON threats (source_ip, received_ms, org_id, agent_id) WHERE source_ip IS NOT NULL;
    CREATE INDEX threats_file ON threats (file_hash, received_ms, org_id, agent_id) WHERE file_hash IS NOT NULL;
    CREATE TABLE probe (padding BLOB);
    CREATE TABLE sightings (         -- when an agent last reported an indicator; agent '' is when it was announced
        org_id TEXT NOT NULL, indicator TEXT NOT NULL, agent_id TEXT NOT NULL, at_ms INTEGER NOT NULL,
        PRIMARY KEY (org_id, indicator, agent_id)) WITHOUT ROWID;
    CREATE INDEX sightings_time ON sightings (at_ms);
    CREATE TABLE policies (          -- every version of every scope
        version INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, description TEXT,
        rules TEXT NOT NULL, org_id TEXT, agent_id TEXT, broadcasted_to INTEGER NOT NULL, created_ms INTEGER NOT NULL);
    CREATE TABLE policies_in_force ( -- the newest of each scope: 'all', 'org:…' or 'agent:…'
        scope TEXT PRIMARY KEY, version INTEGER NOT NULL REFERENCES policies (version)) WITHOUT ROWID;
    """,  # noqa: E501
    # Files of user_version 1 have one of seven schemas, since migration 1 was edited. This makes them one.
    """
    CREATE TABLE new_agents (
        key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, token_digest BLOB,
        hostname TEXT NOT NULL, os TEXT NOT NULL, arch TEXT, ip TEXT NOT NULL, org_id TEXT, machine_id TEXT,
        tags TEXT NOT NULL, registered_ms INTEGER NOT NULL);
    INSERT INTO sqlite_sequence SELECT 'new_agents', seq FROM sqlite_sequence WHERE name = 'agents';
    INSERT INTO new_agents SELECT key, id, token_digest, hostname, os, arch, ip, org_id, machine_id, tags,
        registered_ms FROM agents;
    DROP TABLE agents;
    ALTER TABLE new_agents RENAME TO agents;
    CREATE INDEX agents_token ON agents (token_digest, id, org_id) WHERE token_digest IS NOT NULL;
    CREATE INDEX agents_os ON agents (os);
    CREATE INDEX agents_org ON agents (org_id);
    CREATE INDEX agents_machine ON agents (machine_id, org_id) WHERE machine_id IS NOT NULL;
    CREATE TRIGGER agent_tagged AFTER INSERT ON agents BEGIN
        INSERT INTO agent_tags SELECT value, new.key FROM json_each(new.tags);
    END;
    CREATE TRIGGER agent_retagged AFTER UPDATE OF tags ON agents BEGIN
        DELETE FROM agent_tags WHERE agent = new.key;
        INSERT INTO agent_tags SELECT value, new.key FROM json_each(new.tags);
    END;
    DROP INDEX IF EXISTS contacts_due;
    CREATE INDEX IF NOT EXISTS contacts_silent ON contacts (announced, seen_ms) WHERE announced != 'online';
    DROP INDEX IF EXISTS journal_agent;
    CREATE INDEX journal_agent ON journal (agent_id) WHERE agent_id IS NOT NULL;
    DROP INDEX IF EXISTS journal_type;
    CREATE INDEX journal_type ON journal (type);
    DROP INDEX IF EXISTS journal_org;
    CREATE INDEX journal_org ON journal (org_id) WHERE org_id IS NOT NULL;
    CREATE TABLE IF NOT EXISTS probe (padding BLOB);
    DROP TABLE IF EXISTS correlations;
    CREATE TABLE IF NOT EXISTS sightings (
        org_id TEXT NOT NULL, indicator TEXT NOT NULL, agent_id TEXT NOT NULL, at_ms INTEGER NOT NULL,
        PRIMARY KEY (org_id, indicator, agent_id)) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS sightings_time ON sightings (at_ms);
    """,
    """
    -- A token issued by registering again; it replaces token_digest when it is first used.
    ALTER TABLE agents ADD COLUMN new_token_digest BLOB;
    CREATE INDEX agents_new_token ON agents (new_token_digest) WHERE new_token_digest IS NOT NULL;
    -- Whether the agent registered without a token.
    ALTER TABLE agents ADD COLUMN newcomer INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX agents_newcomer ON agents (newcomer) WHERE newcomer;
    -- Whether the agent was heard since its last registration and since this manager started.
    ALTER TABLE contacts ADD COLUMN heard INTEGER NOT NULL DEFAULT 0;
    """,
    """
    CREATE TABLE enroll_tokens (
        id TEXT PRIMARY KEY, token_digest BLOB NOT NULL UNIQUE, expires_ms INTEGER NOT NULL, max_uses INTEGER NOT NULL,
        uses INTEGER NOT NULL DEFAULT 0, org_id TEXT, tags TEXT NOT NULL, note TEXT);
    -- The id of the enrolment token that the agent last registered with.
    ALTER TABLE agents ADD COLUMN enroll_token TEXT;
    """,  # noqa: E501
    """
    -- What an operator has said of a threat event: open, acknowledged or false_positive, and why.
    ALTER TABLE threats ADD COLUMN state TEXT NOT NULL DEFAULT 'open';
    ALTER TABLE threats ADD COLUMN note TEXT;
    CREATE INDEX threats_state ON threats (state, received_ms) WHERE state != 'open';
    DROP INDEX threats_time;
    CREATE INDEX threats_time ON threats (received_ms, severity, type, agent_id, source_ip, org_id, state);
    DROP INDEX threats_org;
    CREATE INDEX threats_org ON threats (org_id, received_ms, severity, type, agent_id, source_ip, state)
        WHERE org_id IS NOT NULL;
    """,
    """
    -- See class Span. received_ms and sightings.at_ms are on the steady clock from here on, journal.at_ms is not.
    CREATE TABLE clock_spans (
        key INTEGER PRIMARY KEY, first_threat INTEGER NOT NULL, first_entry INTEGER NOT NULL,
        shift_ms INTEGER NOT NULL, from_ms INTEGER NOT NULL, until_ms INTEGER NOT NULL);
    DELETE FROM sightings;
    """,  # noqa: E501
    """
    -- When the announced status began, in ms since 1970; of files made before, as far as the journal knows.
    ALTER TABLE contacts ADD COLUMN announced_ms INTEGER;
    UPDATE contacts SET announced_ms = (
        SELECT max(at_ms) FROM journal JOIN agents ON agents.id = journal.agent_id
        WHERE agents.key = contacts.agent AND type = 'agent_' || announced);
    CREATE INDEX agents_hostname ON agents (hostname);
    CREATE INDEX contacts_version ON contacts (version);
    """,
    """
    CREATE TABLE notifications (     -- to be delivered, or kept until the next one
        key INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, at_ms INTEGER NOT NULL, body TEXT NOT NULL);
    CREATE TABLE receivers (         -- by the digest of the address: the last notification delivered, and its state
        digest BLOB PRIMARY KEY, delivered INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'works') WITHOUT ROWID;
    CREATE TABLE follower (          -- of the journal: the last entry that notifications have been made of
        name TEXT PRIMARY KEY, position INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE told_silent (agent_id TEXT PRIMARY KEY, hostname TEXT NOT NULL) WITHOUT ROWID;
    -- When the announced status began, on the steady clock; of files made before not known.
    ALTER TABLE contacts ADD COLUMN announced_steady_ms INTEGER;
    """,  # noqa: E501
    """
    CREATE TABLE threat_totals (     -- how many events of an hour (received_ms / 3600000) have a value
        kind TEXT NOT NULL,          -- severity, type, agent_id or source_ip, without false positives; false_positives
        hour INTEGER NOT NULL, org_id TEXT NOT NULL, value TEXT NOT NULL, n INTEGER NOT NULL,
        PRIMARY KEY (kind, hour, org_id, value)) WITHOUT ROWID;
    INSERT INTO threat_totals SELECT kind, hour, org_id, value, count(*) FROM (
        SELECT received_ms / 3600000 AS hour, coalesce(org_id, '') AS org_id, kind, CASE
            WHEN (state = 'false_positive') != (kind = 'false_positives') THEN NULL
            WHEN kind = 'severity' THEN severity WHEN kind = 'type' THEN type WHEN kind = 'agent_id' THEN agent_id
            WHEN kind = 'source_ip' THEN source_ip ELSE '' END AS value
        FROM threats, (SELECT 'severity' AS kind UNION SELECT 'type' UNION SELECT 'agent_id' UNION SELECT 'source_ip'
            UNION SELECT 'false_positives')) WHERE value IS NOT NULL GROUP BY 1, 2, 3, 4;
    DROP INDEX threats_time;
    CREATE INDEX threats_time ON threats (received_ms, severity, state);
    DROP INDEX threats_org;
    CREATE INDEX threats_org ON threats (org_id, received_ms) WHERE org_id IS NOT NULL;
    """,  # noqa: E501
    """
    CREATE TABLE agent_totals (      -- how many agents of an org have an operating system
        org_id TEXT NOT NULL, os TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (org_id, os)) WITHOUT ROWID;
    INSERT INTO agent_totals SELECT coalesce(org_id, ''), os, count(*) FROM agents GROUP BY 1, 2;
    CREATE TRIGGER agent_counted AFTER INSERT ON agents BEGIN
        INSERT INTO agent_totals VALUES (coalesce(new.org_id, ''), new.os, 1)
            ON CONFLICT DO UPDATE SET n = n + 1;
    END;
    CREATE TRIGGER agent_uncounted AFTER DELETE ON agents BEGIN
        UPDATE agent_totals SET n = n - 1 WHERE org_id = coalesce(old.org_id, '') AND os = old.os;
        DELETE FROM agent_totals WHERE org_id = coalesce(old.org_id, '') AND os = old.os AND n = 0;
    END;
    CREATE TRIGGER agent_os_changed AFTER UPDATE OF os ON agents WHEN new.os != old.os BEGIN
        UPDATE agent_totals SET n = n - 1 WHERE org_id = coalesce(old.org_id, '') AND os = old.os;
        DELETE FROM agent_totals WHERE org_id = coalesce(old.org_id, '') AND os = old.os AND n = 0;
        INSERT INTO agent_totals VALUES (coalesce(new.org_id, ''), new.os, 1)
            ON CONFLICT DO UPDATE SET n = n + 1;
    END;
    """,
)

_LEAST_SQLITE = (3, 35)
_BUSY_MS = 250  # how long a write waits for another program
_CHECKPOINT_CHANGES = 2000
_PAGE_BYTES = 1024  # a heartbeat is 60 bytes, and writes a page
_LOG_BYTES = 8 * 2**20  # a longer log is truncated; less on a small disk
_LONGEST_LOG_BYTES = 8 * _LOG_BYTES  # for which the disk keeps space
_LEAST_TO_COPY_BYTES = 2**20  # that the log may hold, if an eighth of the space is less
_FEW_PAGES = 1000  # at most so many are copied while writers wait
_PROBE_BYTES = 2**17  # more than the log may hold without growing
_APPLICATION_ID = 0x50474D31  # "PGM1": marks the file as a manager's, also for the command `file`
_LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'journal'"
_RUNNING = "another manager is running on {folder}; stop it or choose another --data-dir"
_NOT_AVAILABLE = "the database is not available: "
_FAULTS = (
    ("moved", "{folder}/manager.db or its log was removed or replaced; put it back, or stop the manager and "
              "restore a backup"),
    ("disk is full|No space left", "the disk of {folder} is full; free some space"),
    ("locked", "another program holds {folder}/manager.db locked; end it"),
    ("readonly", "{folder}/manager.db cannot be written; give this user the right to write it"),
    ("malformed|Could not decode|not a database",
     "{folder}/manager.db is damaged; stop the manager and restore a backup: panguard-manager restore FILE"),
    ("disk I/O error", "the disk under {folder} fails to read or write; check it"),
    ("unable to open",
     "{folder}/manager.db cannot be opened; check that the folder is there and can be written"),
)


def free_bytes(folder: Path) -> int:
    """The free space on the disk of a folder. Raises OSError."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def fault_sentence(error: BaseException, folder: Path) -> str | None:
    """The sentence in the table of faults for an error about a data folder; None if there is none."""
    text = str(error)
    if "disk I/O error" in text:  # SQLite also reports this if its shared memory does not fit on the disk
        with contextlib.suppress(OSError):
            text = "disk is full" if free_bytes(folder) < _PROBE_BYTES else text
    return next((sentence.format(folder=folder) for sign, sentence in _FAULTS if re.search(sign, text)), None)


@contextlib.contextmanager
def refused_start(folder: Path) -> Iterator[None]:
    """Raise StartError for what the system or SQLite refuses, with the sentence of the table of faults, if it
    has one."""
    try:
        yield
    except Unavailable as error:
        raise StartError(str(error).removeprefix(_NOT_AVAILABLE)) from error
    except sqlite3.Error as error:
        raise StartError(fault_sentence(error, folder)
                         or f"{folder}/manager.db cannot be used ({error})") from error
    except OSError as error:
        raise StartError(fault_sentence(error, folder) or f"{error.filename or folder} cannot be used "
                         f"({error.strerror or error}); let this user read and write it") from error


def schema_of(db: sqlite3.Connection) -> dict[str, str]:
    """The SQL of every table, index and trigger by kind and name, without comments, quotes and spacing."""
    rows = db.execute("SELECT type || ' ' || name, sql FROM sqlite_master WHERE sql IS NOT NULL "
                      "AND name NOT LIKE 'sqlite_%'")
    return {name: re.sub(r'--.*|[\s"]', "", sql).replace("IFNOTEXISTS", "") for name, sql in rows}


@functools.lru_cache
def expected_schema(migrations: tuple[str, ...]) -> dict[str, str]:
    """The schema of a new file that has had these migrations."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(";".join(migrations))
        return schema_of(db)


def sync_path(path: Path) -> None:
    """Make the contents of a file, or the entries of a folder, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can read, and its parents, if they are missing, so that a power cut
    does not undo that. Raises OSError."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in new:
        sync_path(each.parent)


def private_file(path: Path) -> None:
    """Make a file that only its owner can read, if there is none. Raises OSError if it cannot be written.

    One that is there is not opened: closing it would end this process' locks on it (POSIX).
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    if not os.access(path, os.R_OK | os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def take_folder(folder: Path) -> sqlite3.Connection:
    """Lock a data folder until the connection is closed or the process ends. Raises StartError."""
    guard = None
    try:
        private_file(folder / "lock")  # a user who could open it could lock it
        guard = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None, check_same_thread=False)
        guard.execute("PRAGMA journal_mode = MEMORY")
        guard.execute("BEGIN EXCLUSIVE")
    except (sqlite3.Error, OSError) as error:
        if guard:
            guard.close()
        if "database is locked" in str(error):
            raise StartError(_RUNNING.format(folder=folder)) from None
        raise StartError(f"the data folder {folder} cannot be written ({error}); choose another or change "
                         "its owner") from None
    return guard


def lock_file(path: Path) -> int:
    """Lock a byte of the database that SQLite does not use, since the file `lock` may have been removed.

    Needs WAL mode: in others SQLite unlocks all bytes. POSIX locks end once the process closes any descriptor
    of the file, so the one returned stays open until SQLite's is closed. Raises StartError.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2**62)
    except OSError:
        os.close(descriptor)
        raise StartError(_RUNNING.format(folder=path.parent)) from None
    return descriptor


class Turn:
    """A place in the queue of a FairLock. With `joins` its transaction may share a commit with others.

    A thread waits for its turn with wait(), or `on_grant` is called by the thread that releases the lock.
    """

    def __init__(self, *, joins: bool = False, on_grant: Callable[[], object] | None = None) -> None:
        self.joins, self._on_grant = joins, on_grant
        self._granted = threading.Lock()  # held until the grant; an Event takes ten times as long to make
        self._granted.acquire()

    def wait(self) -> None:
        """Wait until the lock is granted."""
        self._granted.acquire()

    def grant(self) -> None:
        """End wait(), or call `on_grant`. May be called again."""
        if self._on_grant:
            self._on_grant()
            return
        with contextlib.suppress(RuntimeError):  # it is released already
            self._granted.release()


class FairLock:
    """A lock granted in the order of asking, so that no thread can take it again before one that waits.

    Release is idempotent and safe at any interruption point, since a signal handler may raise anywhere.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[Turn] = deque()  # the first holds the lock

    def __len__(self) -> int:
        """How many hold it or wait for it."""
        return len(self._queue)

    def holds(self, turn: Turn) -> bool:
        """Whether `turn` holds the lock."""
        with self._lock:
            return bool(self._queue) and self._queue[0] is turn

    def ask(self, turn: Turn) -> bool:
        """Add `turn` to the queue. True if it holds the lock at once; if not, its grant() is called later."""
        with self._lock:
            self._queue.append(turn)
            return self._queue[0] is turn

    def release(self, turn: Turn, *, if_joined: bool = False) -> bool:
        """Remove `turn` from the queue and grant the next; `if_joined`: only if both join. True if done."""
        with self._lock:
            if if_joined and not (turn.joins and len(self._queue) > 1 and self._queue[1].joins):
                return False
            if turn in self._queue:
                self._queue.remove(turn)
            if self._queue:
                self._queue[0].grant()  # again, if a signal handler interrupted the first release
            return True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock."""
        turn = Turn()
        try:
            if not self.ask(turn):
                turn.wait()
            yield
        finally:
            try:
                self.release(turn)
            except BaseException:  # from a signal handler
                self.release(turn)
                raise


class Commit:
    """A transaction of SQLite that several callers share. Each has a part of it; if that fails, only the part
    is undone. All callers return after the commit. `error` is why the whole transaction failed."""

    def __init__(self) -> None:
        self.parts = 0
        self.error: BaseException | None = None
        self.turns: list[Turn] = []  # of all callers
        self.ended = False

    def wait(self, turn: Turn) -> None:
        """Wait for the end of the transaction. Raises its `error`, if there is one."""
        while not self.ended:  # a turn may be granted twice
            turn.wait()
        if self.error:
            raise self.error

    def end(self, turn: Turn) -> None:
        """End wait() of all other callers. May be called again."""
        self.ended = True
        for each in self.turns:
            if each is not turn:
                each.grant()


class Within(contextlib.AbstractContextManager["sqlite3.Connection"]):
    """The open transaction of this thread. Each heartbeat enters it twice, so it is no generator: that would
    take four times as long."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> sqlite3.Connection:
        self._store.require_whole()
        return self._store.writer

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            self._store.break_off(error)


class Store:
    """The database in a folder: one connection that writes, behind a lock, and others that read.

    Raises StartError, leaving the files as they were, when the folder cannot be used: not writable,
    in use by another manager, holding a newer, damaged or foreign file.
    """

    check_at_start_bytes = 64 * 2**20  # after an unclean stop a larger file is checked in the background

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listeners: list[Callable[[], None]] = []
        self.write_lock = FairLock()
        self._owner: int | None = None  # the thread within a transaction
        self._within = Within(self)
        self._commit: Commit | None = None  # the transaction of SQLite that is open
        self._on_commit: list[Callable[[], None]] = []
        self.journaled = False  # whether this transaction added entries, of which the listeners are told
        self._synchronous = ""
        self._readers: list[sqlite3.Connection] = []
        self._closed = False
        self._moved = False
        self._damage: str | None = None
        self.is_new = False  # whether the file was made now
        self._faults: Counter[str] = Counter()  # since the database was last found to work
        self._durable_seq = 0
        self._checkpointing = threading.Lock()
        self._checkpointed_changes = 0
        self._log_was_long = False
        if sqlite3.sqlite_version_info < _LEAST_SQLITE:
            raise StartError(f"SQLite {sqlite3.sqlite_version} is too old: this manager needs 3.35 or later")
        self._path = folder / "manager.db"
        self._log = self._path.with_name("manager.db-wal")
        self._make_folder(folder)
        self._check_folder()
        disk = os.statvfs(folder)
        self.log_limit_bytes = max(2**16, min(_LOG_BYTES, disk.f_blocks * disk.f_frsize // 64))
        with contextlib.ExitStack() as undo:
            self._open(undo)
            undo.pop_all()

    @staticmethod
    def _make_folder(folder: Path) -> None:
        try:
            make_folder(folder)
            held = folder.stat()
        except OSError as error:
            raise StartError(f"the data folder {folder} cannot be made ({error.strerror}); "
                             "choose another") from None
        try:
            os.stat(f"{folder}/.")
        except PermissionError:
            raise StartError(f"this user may not enter the data folder {folder}; start the manager as its "
                             "owner (sudo -u OWNER), or choose another --data-dir") from None
        if held.st_uid not in (os.geteuid(), 0):
            raise StartError(f"the data folder {folder} belongs to another user, who could replace what is "
                             "in it; chown it to the user that runs the manager, or choose another "
                             "--data-dir")
        if held.st_mode & 0o022:
            raise StartError(f"other users can write to the data folder {folder}; run: "
                             f"chmod go-w {shlex.quote(str(folder))}")
        if (folder / _UNFINISHED).exists():
            raise StartError(f"a restore was cut short in {folder}: run it again, or move the files of its "
                             f"newest before-restore folder back and remove the file {_UNFINISHED}")

    def _open(self, undo: contextlib.ExitStack) -> None:
        self._guard = take_folder(self.folder)
        undo.callback(self._guard.close)
        with refused_start(self.folder):
            stopped_cleanly = self.log_bytes() == 0
            self._check_file()
            private_file(self._path)
            sync_path(self.folder)
            self.writer = self._connect()
            undo.callback(self.writer.close)
            undo.callback(self._close_readers)
            self.checked = stopped_cleanly or self.size_bytes() <= self.check_at_start_bytes
            if not stopped_cleanly and self.checked:
                self.check()
            self._migrate()
            self._file_lock = lock_file(self._path)
            undo.callback(os.close, self._file_lock)
            self._inodes = self._find_inodes()

    def _check_folder(self) -> None:
        """Raises StartError if the folder cannot be written, or its file system lacks what SQLite needs."""
        lacks = "cannot be written"
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.truncate(mmap.PAGESIZE)
                lacks = "is on a file system without file locks"
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lacks = "is on a file system that cannot share memory"
                mmap.mmap(file.fileno(), mmap.PAGESIZE).close()
        except OSError as error:
            raise StartError(f"the data folder {self.folder} {lacks} ({error.strerror}); choose another or "
                             "change its owner") from None

    def _find_inodes(self) -> list[tuple[int, int]] | None:
        try:
            found = [os.stat(f"{self._path}{end}") for end in ("", "-wal", "-shm")]
        except OSError:
            return None
        return [(each.st_dev, each.st_ino) for each in found]

    def _check_file(self) -> None:
        if self._path.exists() and self._path.with_name("manager.db-journal").exists():
            with contextlib.closing(self._connect()) as db:  # a power cut ended the first start: roll back
                db.execute("SELECT 1 FROM sqlite_master")
        try:
            if not self._path.exists() or self._path.stat().st_size == 0:
                if self.log_bytes():
                    raise StartError(f"{self._path} is missing, but its log {self._log} is there; put the "
                                     "file back, or restore a backup: panguard-manager restore FILE")
                return
            with self._path.open("rb") as file:
                if file.read(16) != b"SQLite format 3\0":
                    raise StartError(f"{self._path} is damaged or is not a database; restore a backup: "
                                     "panguard-manager restore FILE")
        except OSError as error:
            raise StartError(f"{self._path} cannot be read ({error.strerror}); change its owner") from None
        # A file that is refused stays as it was: without a log, SQLite need not make its files beside it.
        mode = "?mode=ro" if self._log.exists() else "?immutable=1"
        with contextlib.closing(sqlite3.connect(self._path.absolute().as_uri() + mode, uri=True)) as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (owner,) = db.execute("PRAGMA application_id").fetchone()
            if owner != _APPLICATION_ID and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise StartError(f"{self._path} belongs to another program; move it away")
            if version > len(MIGRATIONS):
                raise StartError(f"{self._path} was written by a newer manager (schema {version}, this one "
                                 f"knows {len(MIGRATIONS)}); run that one, or restore a backup")

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path.absolute().as_uri() + "?mode=rw", uri=True, timeout=_BUSY_MS / 1000,
                             isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA foreign_keys = ON")
        return db

    def _migrate(self) -> None:
        db = self.writer
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # of a file that is new
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StartError(f"the file system of {self.folder} cannot share memory, as SQLite must; "
                             "choose another")
        self._path.chmod(0o600)
        (version,) = db.execute("PRAGMA user_version").fetchone()
        self.is_new = version == 0
        if 0 < version < len(MIGRATIONS):
            self._keep_copy(self._path.with_name(f"manager.db.schema-{version}"))
        for number, statements in enumerate(MIGRATIONS[version:], version + 1):
            db.executescript(
                f"PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE; {statements}; "
                f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {number}; COMMIT;")
        db.execute("PRAGMA foreign_keys = ON")
        found = schema_of(db)
        wrong = [name for name, sql in expected_schema(MIGRATIONS).items() if found.get(name) != sql]
        if wrong:
            raise StartError(f"{self._path} lacks what this version needs, or has it in another form "
                             f"({', '.join(wrong)}); restore a backup")
        db.executescript(
            "PRAGMA busy_timeout = 0; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -8000; "
            f"PRAGMA wal_autocheckpoint = 1000000; PRAGMA journal_size_limit = {self.log_limit_bytes}; "
            "CREATE TEMP TABLE due (agent INTEGER PRIMARY KEY, status TEXT, due_ms INTEGER)")

    def _keep_copy(self, path: Path) -> None:
        """Copy the database to `path`, durably. A former copy is replaced once the new one is whole."""
        part = path.with_name(path.name + ".new")
        try:
            part.unlink(missing_ok=True)
            private_file(part)
            with contextlib.closing(sqlite3.connect(part)) as copy:
                self.writer.backup(copy)
            sync_path(part)
            part.replace(path)
            sync_path(self.folder)
        except (OSError, sqlite3.Error) as error:
            part.unlink(missing_ok=True)
            raise StartError(f"{self._path} must be changed for this version, and no copy of it can be kept "
                             f"first ({error}); free some space for {path}") from error
        log.info("%s is changed for this version; %s is a copy of what it was", self._path, path)

    def transaction(self, *, durable: bool = True, savepoint: bool = True, turn: Turn | None = None,
                    ) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """All or nothing. A durable one is on the disk when it returns, any other with the next durable one.

        Durable ones that wait for the lock share a commit. Within a transaction of the same thread this is a
        part of it: if the part fails, only the part is undone; if the whole fails, all of it is. Without a
        `savepoint` a part is undone only with the whole. `turn`, if given, holds the lock already; then
        another program is not waited for. Raises Unavailable, with nothing changed, if the file cannot be
        written.
        """
        if self._owner != threading.get_ident():
            return self._transaction(durable, turn)
        return self._part() if savepoint else self.read()

    @contextlib.contextmanager
    def _part(self, name: str = "part") -> Iterator[sqlite3.Connection]:
        """A part of the open transaction. If it fails, only the part is undone."""
        self.require_whole()
        db, kept = self.writer, len(self._on_commit)
        try:
            db.execute(f"SAVEPOINT {name}")
            yield db
            db.execute(f"RELEASE {name}")
        except BaseException as error:
            if self._owner != threading.get_ident():  # a signal handler raised in contextlib: the turn ended
                raise
            del self._on_commit[kept:]
            try:
                db.execute(f"ROLLBACK TO {name}")
                db.execute(f"RELEASE {name}")
            except sqlite3.Error:  # SQLite undid all of it, or a signal handler raised after RELEASE
                interrupted = Unavailable("another write was interrupted", retry_after_s=1)
                self._fail(error if isinstance(error, Exception) else interrupted)
            self._translate(error)

    @contextlib.contextmanager
    def _transaction(self, durable: bool, turn: Turn | None) -> Iterator[sqlite3.Connection]:
        mine, failure, commit = turn or Turn(joins=durable), None, None
        try:
            if not turn and not self.write_lock.ask(mine):
                mine.wait()
            self._require_usable()
            commit = self._begin(durable, 0 if turn else _BUSY_MS)
            commit.turns.append(mine)
            self._owner = threading.get_ident()
            with self._part("turn") if commit.parts else self._within as db:
                yield db
            commit.parts += 1
            calls, journaled = self._on_commit, self.journaled
        except Exception as error:
            failure = error
        finally:
            try:
                self._finish(mine)
            except BaseException:  # from a signal handler
                self._finish(mine)
                raise
        if commit:  # also after a failure: it may be due to writes that are still undone
            commit.wait(mine)
        if failure:
            self._translate(failure)
        for call in calls:
            call()
        for listener in tuple(self.listeners) if journaled else ():  # also those added meanwhile
            listener()
        if durable and self.log_bytes() > 4 * self.log_limit_bytes:  # the timer alone does not keep up
            with contextlib.suppress(Unavailable):
                self.checkpoint()

    def _begin(self, durable: bool, wait_ms: int) -> Commit:
        """The transaction that the turn before left open, or a new one, once no other program is writing."""
        if self._commit:
            return self._commit
        self._commit = Commit()  # first: if a signal handler raises, _finish() must see it
        deadline_s = time.monotonic() + wait_ms / 1000
        while not self.writer.in_transaction:
            try:
                if (synchronous := "FULL" if durable else "NORMAL") != self._synchronous:
                    self._synchronous = ""  # not known, if a signal handler raises now
                    self.writer.execute(f"PRAGMA synchronous = {synchronous}")
                    self._synchronous = synchronous
                self.writer.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() >= deadline_s:
                    raise
                time.sleep(0.005)
        return self._commit

    def blocked(self) -> bool:
        """Whether another program is writing. If not, a transaction has begun. The caller holds the lock."""
        try:
            self._begin(durable=False, wait_ms=0)
        except sqlite3.Error as error:  # transaction() raises any other error
            self._commit = None
            return "locked" in str(error)
        return False

    def _finish(self, turn: Turn) -> None:
        """End a turn. The transaction stays open if the next turn joins, else it is committed. Idempotent."""
        if self.write_lock.holds(turn):  # not if it was interrupted while it waited, or has ended
            self._owner, self._on_commit, self.journaled = None, [], False
            if self._commit and not self._end(self._commit, turn):
                return
            self._commit = None
        self.write_lock.release(turn)

    def _end(self, commit: Commit, turn: Turn) -> bool:
        """Commit or roll back, and let all callers return; false if it stays open for the next turn."""
        is_open, whole = self.writer.in_transaction, commit.parts and not commit.error
        if is_open and whole and self.write_lock.release(turn, if_joined=True):
            return False
        try:
            if is_open:
                self.writer.execute("COMMIT" if whole else "ROLLBACK")
        except (sqlite3.Error, MemoryError) as error:
            fault = self._fault(error)
            commit.error = commit.error or fault
            with contextlib.suppress(sqlite3.Error):
                if self.writer.in_transaction:
                    self.writer.execute("ROLLBACK")
        commit.end(turn)
        return True

    def require_whole(self) -> None:
        """Raise the error of this thread's transaction, if it has failed: SQLite may have undone it, and
        would commit each further statement by itself."""
        if self._commit and self._commit.error:
            raise self._commit.error

    def on_commit(self, call: Callable[[], None]) -> None:
        """Make a call once this thread's transaction is committed; outside of one, at once."""
        if self._owner == threading.get_ident():
            self._on_commit.append(call)
        else:
            call()

    def _require_usable(self) -> None:
        if self._closed:
            raise Unavailable("the manager is stopping", retry_after_s=1)
        if self._moved:
            self._translate(sqlite3.OperationalError("moved: device and inode differ"))

    def read(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """A view of one instant, which delays no writer; within a transaction of this thread, of that.

        Raises Unavailable when the file cannot be read.
        """
        return self._within if self._owner == threading.get_ident() else self._read()

    def break_off(self, error: sqlite3.Error) -> NoReturn:
        """Raise a fault within this thread's transaction, and have all of it undone."""
        fault = self._fault(error)
        self._fail(fault)
        raise fault

    def _fail(self, error: BaseException) -> None:
        if self._commit:
            self._commit.error = error

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        self._require_usable()
        try:
            try:
                db = self._readers.pop()
            except IndexError:
                db = self._connect()
            try:
                db.execute("BEGIN")
                yield db
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                self._readers.append(db)
                if self._closed:
                    self._close_readers()
        except sqlite3.Error as error:
            self._translate(error)

    def durable_seq(self) -> int:
        """Sync the log. Returns the number of the latest journal entry; no power cut can undo it any more.

        Raises Unavailable.
        """
        with self.read() as db:
            newest = int(db.execute(_LAST_SEQ).fetchone()[0])
        if newest > self._durable_seq:
            try:
                sync_path(self._log)
            except OSError as error:
                self._translate(sqlite3.OperationalError(f"disk I/O error: {error.strerror}"))
            self._durable_seq = newest
        return newest

    def journal(self, at_ms: int, type: str, caller: Caller, agent_id: str | None, org_id: str | None,
                data: Mapping[str, Any]) -> None:
        """Add an entry within the transaction of the change that it reports."""
        self.journaled = True
        self.writer.execute(
            "INSERT INTO journal (at_ms, type, actor, org_id, agent_id, data) VALUES (?, ?, ?, ?, ?, ?)",
            (at_ms, type, to_json(caller.actor()), org_id, agent_id, to_json(data)))

    @property
    def problem(self) -> str | None:
        """Why the database cannot be used or written, as last found; None if it works."""
        return self._damage or next(reversed(list(self._faults)), None)  # a copy: other threads add to it

    @property
    def failed(self) -> bool:
        """Whether something failed since the database was last found to work."""
        return bool(self._faults)

    def check_files(self) -> None:
        """Find out whether the open files are those in the folder; if not, nothing is read or written."""
        self._moved = self._find_inodes() != self._inodes

    def probe(self) -> None:
        """Write something; after a fault durably, and more than the log may hold without growing.

        Raises Unavailable when that fails.
        """
        self.check_files()
        failed = self.failed
        with self.transaction(durable=failed) as db:
            db.execute("INSERT INTO probe VALUES (zeroblob(?))", (_PROBE_BYTES if failed else 0,))
        with self.transaction(durable=failed) as db:
            db.execute("DELETE FROM probe")
        if failed:
            ended, self._faults = self._faults, Counter()
            log.warning("the database works again, after: %s", "; ".join(
                f"{sentence} ({times} times)" for sentence, times in ended.items()))

    def check(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Look for damage in all of the file, and keep it in `problem`. Ends early once `stopped()` is true.

        Raises Unavailable for a damaged file.
        """
        with self.read() as db:
            db.set_progress_handler(stopped, 100_000)
            try:
                (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise sqlite3.DatabaseError(f"malformed: {found}")
            except sqlite3.OperationalError:
                if not stopped():
                    raise
            finally:
                db.set_progress_handler(None, 0)

    def loads(self, text: str) -> Any:
        """What a column of JSON holds. Raises Unavailable if it is damaged."""
        try:
            return json.loads(text)
        except (ValueError, TypeError) as error:
            self._translate(sqlite3.DatabaseError(f"malformed row: {error}"))

    def checkpoint(self) -> None:
        """Copy the log into the file, if it has grown or a write has failed, while others go on writing.

        SQLite would do it within a commit, and a heartbeat would wait for the disk. A log longer than its
        limit is truncated, while writers wait: when little is left to copy, or when it is very long.
        """
        if self._closed or self._owner == threading.get_ident() or \
                not self._checkpointing.acquire(blocking=False):
            return
        try:
            if not self._faults and self.log_bytes() <= self.log_limit_bytes and \
                    self.writer.total_changes - self._checkpointed_changes < _CHECKPOINT_CHANGES:
                return
            self._checkpointed_changes = self.writer.total_changes
            with self.read() as db:
                db.execute("ROLLBACK")
                copied = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[2]
                if self.log_bytes() <= self.log_limit_bytes and not self._faults:
                    return
                _, pages, copied_now = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()  # the rest
            if (pages == copied_now <= copied + _FEW_PAGES) or self.log_bytes() > 8 * self.log_limit_bytes:
                self._empty_log()
        finally:
            self._checkpointing.release()

    def _empty_log(self) -> None:
        """Copy what is left of the log and truncate it, unless somebody reads what is older."""
        with self.write_lock.held():
            if self._closed:
                return
            try:
                self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:
                self._translate(error)
        long = self.log_bytes() > 8 * self.log_limit_bytes
        if long and not self._log_was_long:
            log.warning("%s has %d bytes: another program reads the database for long, such as a backup or a "
                        "shell; end it", self._log, self.log_bytes())
        self._log_was_long = long

    def log_bytes(self) -> int:
        """The size of the write-ahead log."""
        try:
            return self._log.stat().st_size
        except OSError:
            return 0

    def used_bytes(self) -> int:
        """The size of the pages in use: the file does not shrink, and uses pages of removed rows again."""
        with self.read() as db:
            return int(db.execute("SELECT (page_count - freelist_count) * page_size FROM pragma_page_count, "
                                  "pragma_freelist_count, pragma_page_size").fetchone()[0])

    def space_bytes(self) -> tuple[int, int]:
        """The space that the file and its log may take, and how much of it the file may. Raises OSError.

        The rest is for the log: one transaction can write every page, and the log can be emptied only if the
        disk has space to copy it into the file.
        """
        space_bytes = self.size_bytes() + free_bytes(self.folder)
        return space_bytes, space_bytes - min(space_bytes * 5 // 8, _LONGEST_LOG_BYTES)

    def has_space(self) -> bool:
        """Within a transaction: whether the disk has the space for more."""
        (pages_bytes,) = self.writer.execute(
            "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()
        try:
            space_bytes, file_bytes = self.space_bytes()
            to_copy_bytes = self.log_bytes() + max(0, pages_bytes - self._path.stat().st_size)
        except OSError:
            return True  # the file is gone, which check_files() finds
        most_bytes = max(space_bytes // 8, _LEAST_TO_COPY_BYTES)
        return self.used_bytes() <= file_bytes and to_copy_bytes <= most_bytes

    def size_bytes(self) -> int:
        """What the database takes on the disk, its write-ahead log included."""
        return self.log_bytes() + (self._path.stat().st_size if self._path.exists() else 0)

    def close(self) -> None:
        """Copy the log into the file and let go of the folder."""
        with self.write_lock.held():
            if self._closed:
                return
            self._closed = True
            self._close_readers()
            self.writer.close()
            os.close(self._file_lock)  # once only: its number may be another file's by now
            self._guard.close()

    def _close_readers(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._readers.pop().close()

    def _translate(self, error: BaseException) -> NoReturn:
        """Raise Unavailable for a fault of the file or its disk, and any other error as it is."""
        raise self._fault(error)

    def _fault(self, error: BaseException) -> BaseException:
        """What _translate() raises. A fault is logged, and this thread's transaction fails with it."""
        sentence = fault_sentence(error, self.folder) if isinstance(error, sqlite3.DatabaseError) else None
        if sentence is None:
            return error
        sentence = _NOT_AVAILABLE + sentence
        if "is damaged" in sentence:
            self._damage = sentence  # until a restart: reads may have given wrong answers
        self._faults[sentence] += 1
        if (times := self._faults[sentence]) == 1:
            log.error("%s (%s)", sentence, error)
        elif times == 10 ** (len(str(times)) - 1):  # a power of ten; probe() logs when the fault has ended
            log.error("repeated %d times: %s", times, sentence)
        fault = Unavailable(sentence, retry_after_s=5)
        fault.__cause__ = error
        if self._owner == threading.get_ident():
            self._fail(fault)
        return fault


# Backup, restore and check

_COPY_PAGES = 1000  # between two reports of a backup's progress
_KEPT = ("token", "cert.pem", "key.pem", "manager.db")  # what a backup holds
_UNFINISHED = "restore-unfinished"  # there while a restore changes the folder


def examine(path: Path, shown: Path | None = None) -> dict[str, int]:
    """Look for damage in all of a database; its schema, and how many rows of each kind it holds.

    `shown` is what messages call it. Raises Unavailable for what is damaged or is not a manager's database,
    and StartError for what cannot be read.
    """
    shown = shown or path
    try:
        with contextlib.closing(sqlite3.connect(path.absolute().as_uri() + "?mode=ro", uri=True)) as db:
            return _examined(db, shown)
    except sqlite3.OperationalError as error:
        raise StartError(f"{shown} cannot be read ({error}); check that this user may read it") from None
    except sqlite3.Error as error:
        raise Unavailable(f"{shown} is damaged ({error}); restore a backup") from None


def _examined(db: sqlite3.Connection, shown: Path) -> dict[str, int]:
    (owner,) = db.execute("PRAGMA application_id").fetchone()
    (schema,) = db.execute("PRAGMA user_version").fetchone()
    if owner != _APPLICATION_ID or schema < 1:
        raise Unavailable(f"{shown} is not a database of this manager")
    if schema > len(MIGRATIONS):
        raise Unavailable(f"{shown} was written by a newer manager (schema {schema}, this one knows "
                          f"{len(MIGRATIONS)})")
    found, expected = schema_of(db), expected_schema(MIGRATIONS[:schema])
    strange = [name for name in found if name not in expected and name.split(" ")[0] in ("trigger", "view")]
    # Files of schema 1 differ from each other: migration 2 makes them one.
    strange += [name for name, sql in expected.items() if schema > 1 and found.get(name) != sql]
    if strange:
        raise Unavailable(f"{shown} has another form than a manager gives it ({', '.join(strange[:3])})")
    wrong = [row[0] for row in db.execute("PRAGMA integrity_check(3)") if row[0] != "ok"]
    wrong += [f"a row of {row[0]} refers to nothing" for row in db.execute("PRAGMA foreign_key_check")][:3]
    count, first, last = db.execute("SELECT count(*), min(seq), max(seq) FROM journal").fetchone()
    if count and count != last - first + 1:
        wrong.append(f"the journal lacks {last - first + 1 - count} entries between {first} and {last}")
    if wrong:
        raise Unavailable(f"{shown} is damaged: {'; '.join(wrong)}; restore a backup")
    held = {"schema": schema}
    for name, table in (("agents", "agents"), ("threatEvents", "threats"), ("policies", "policies"),
                        ("journalEntries", "journal")):
        (held[name],) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
    return held


def copy_database(source: Path, target: Path, progress: Callable[[float], None]) -> None:
    """Copy a database that may be in use to a new file, as of one instant; `progress` takes the part done."""
    with contextlib.closing(sqlite3.connect(source.absolute().as_uri() + "?mode=ro", uri=True)) as db, \
            contextlib.closing(sqlite3.connect(target)) as copy:
        db.execute("BEGIN")
        db.execute("SELECT 1 FROM sqlite_master").fetchone()  # one view for all steps; it delays no writer
        db.backup(copy, pages=_COPY_PAGES, progress=lambda _, left, total: progress(1 - left / max(total, 1)))
        copy.execute("PRAGMA journal_mode = DELETE")  # one file


def back_up(folder: Path, target: Path, progress: Callable[[float], None],
            *, db_only: bool = False) -> dict[str, int]:
    """Write a checked backup of a data folder to a file of mode 0600, replacing a former one; what it holds.

    Raises ManagerError, and then leaves a file that was there as it was.
    """
    target = target.resolve()
    if target.parent == folder.resolve() or (target.exists() and not target.is_file()):
        raise Unavailable(f"a backup cannot be written to {target}; name a file outside of the data folder")
    try:
        with tempfile.TemporaryDirectory(prefix=".panguard-", dir=target.parent) as work:
            copy, made = Path(work, "manager.db"), Path(work, "made")
            copy_database(folder / "manager.db", copy, progress)
            held = examine(copy, folder / "manager.db")
            if db_only:
                made = copy
            else:
                _archive(folder, copy, made, held)
            made.chmod(0o600)
            sync_path(made)
            made.replace(target)
            sync_path(target.parent)
    except sqlite3.Error as error:
        raise Unavailable(f"{folder / 'manager.db'} cannot be copied to {target} ({error}); free some space, "
                          "or check the disk") from None
    except OSError as error:
        raise Unavailable(f"the backup {target} cannot be written ({error.strerror}); check its folder and "
                          "its disk") from None
    return held


def _archive(folder: Path, copy: Path, made: Path, held: Mapping[str, int]) -> None:
    manifest = copy.with_name("manifest.json")
    digest = digest_of(copy.open("rb"))
    manifest.write_text(json.dumps({"version": __version__, **held, "sha256": digest}, indent=1))
    with tarfile.open(made, "w", dereference=True) as archive:
        archive.add(manifest, "manifest.json")
        for name in _KEPT[:-1]:
            if (folder / name).exists():
                archive.add(folder / name, name)
        archive.add(copy, "manager.db")
    with tarfile.open(made, "r:") as archive:
        if digest_of(cast("BinaryIO", archive.extractfile("manager.db"))) != digest:
            raise Unavailable("what was written reads back otherwise; check the disk")


def digest_of(file: BinaryIO) -> str:
    """The SHA-256 digest of what a file holds, in hexadecimal digits; closes it."""
    found = hashlib.sha256()
    with file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def unpack(backup: Path, work: Path) -> dict[str, int]:
    """Unpack a backup into an empty folder and check it; what it holds. Raises ManagerError and OSError."""
    with backup.open("rb") as file:
        plain = file.read(16) == b"SQLite format 3\0"
    if plain and Path(f"{backup}-wal").exists():  # the log holds a part of it
        copy_database(backup, work / "manager.db", lambda part: None)
    elif plain:
        shutil.copyfile(backup, work / "manager.db")
    else:
        _extract(backup, work)
    return examine(work / "manager.db", backup)


def _extract(backup: Path, work: Path) -> None:
    try:
        with tarfile.open(backup, "r:") as archive:  # not compressed, so its size bounds what is unpacked
            for member in archive:
                if member.name in ("manifest.json", *_KEPT) and member.isreg():
                    with (work / member.name).open("xb") as file:  # of a folder that only this user can read
                        shutil.copyfileobj(cast("BinaryIO", archive.extractfile(member)), file)
        whole = json.loads((work / "manifest.json").read_text())["sha256"] == digest_of(
            (work / "manager.db").open("rb"))
    except (tarfile.TarError, ValueError, KeyError, TypeError, FileNotFoundError, FileExistsError, EOFError,
            RecursionError):
        whole = False
    if not whole:
        raise Unavailable(f"{backup} is no whole backup of this manager; take another")


def _give_to_owner(path: Path, folder: Path) -> None:
    """Let root's file belong to the owner of the folder, which may be a service's user."""
    if os.geteuid() == 0:
        os.chown(path, folder.stat().st_uid, folder.stat().st_gid)


def restore(backup: Path, folder: Path) -> tuple[dict[str, int], Path | None]:
    """Replace what a data folder holds by a backup; what the backup holds, and where the former files are.

    Raises OSError and ManagerError, also if a manager runs there; then nothing is replaced. After a restore
    that was cut short, no manager starts there.
    """
    backup.open("rb").close()
    make_folder(folder)
    with contextlib.ExitStack() as undo:
        undo.enter_context(contextlib.closing(take_folder(folder)))
        _give_to_owner(folder / "lock", folder)
        if (folder / "manager.db").exists():
            undo.callback(os.close, lock_file(folder / "manager.db"))
        work = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix=".restore-", dir=folder)))
        held = unpack(backup, work)
        for name in _KEPT:
            if not (work / name).exists() and (folder / name).exists():  # a backup of the database alone
                shutil.copyfile(folder / name, work / name)
            if (work / name).exists():
                (work / name).chmod(0o600)
                _give_to_owner(work / name, folder)
                sync_path(work / name)
        names = (*_KEPT, "manager.db-wal", "manager.db-shm")
        former = [folder / name for name in names if (folder / name).exists()]
        kept = folder / f"before-restore-{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}"
        kept.mkdir(mode=0o700)
        _exchange(folder, former, kept, [work / name for name in _KEPT if (work / name).exists()])
    if former:
        return held, kept
    kept.rmdir()
    return held, None


def _exchange(folder: Path, former: Sequence[Path], kept: Path, new: Sequence[Path]) -> None:
    private_file(folder / _UNFINISHED)
    sync_path(folder)
    try:
        for path in former:
            path.rename(kept / path.name)
        sync_path(kept)
        for path in new:
            path.rename(folder / path.name)
    except BaseException:
        for path in new:
            if not path.exists():  # it is in the folder
                (folder / path.name).unlink()
        for path in former:
            if (kept / path.name).exists():
                (kept / path.name).rename(path)
        (folder / _UNFINISHED).unlink()
        raise
    sync_path(folder)
    (folder / _UNFINISHED).unlink()
    sync_path(folder)


def sql_iso(column: str) -> str:
    """SQL for `iso(column)`."""
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {column} / 1000.0, 'unixepoch')"


########################################################################################################
# 5  Manager ###########################################################################################
########################################################################################################

_STATUS = """CASE WHEN c.seen_ms >= :online_from THEN 'online'
    WHEN c.seen_ms >= :stale_from THEN 'stale' ELSE 'offline' END"""
_AGENT = (f"SELECT a.*, c.*, {_STATUS} AS status FROM agents a JOIN contacts c ON c.agent = a.key "
          "WHERE a.id = :id")
_RECENT_THREATS = "(SELECT count(*) FROM threats WHERE agent_id = a.id AND received_ms >= :day_ago_ms)"
_AGENT_DETAIL = f"""
    SELECT a.*, c.*, c.heartbeat_ms AS last_heartbeat_ms,
        coalesce(c.announced_ms, a.registered_ms) AS since_ms, {_RECENT_THREATS} AS recent_threats,
        (SELECT version FROM policies_in_force WHERE scope = 'all') AS for_all,
        (SELECT version FROM policies_in_force WHERE scope = 'org:' || a.org_id) AS for_org,
        (SELECT version FROM policies_in_force WHERE scope = 'agent:' || a.id) AS for_agent"""
# The tables that choose agents, by their letter in queries: the table, and its column with the agent's key.
_CHOOSE = {"t": ("agent_tags t", "t.agent"), "a": ("agents a", "a.key"), "c": ("contacts c", "c.agent")}
_SORTS = {
    "hostname": ("a", "a.hostname"), "lastHeartbeat": ("c", "c.heartbeat_ms"), "version": ("c", "c.version"),
    "status": ("c", "(c.seen_ms >= :stale_from) + (c.seen_ms >= :online_from)"), "cpu": ("c", "c.cpu"),
    "memory": ("c", "c.memory"), "recentThreats": ("a", _RECENT_THREATS)}
# Each tag is looked at once, however many agents carry it.
_FOUND = """(instr(lower(a.hostname || char(10) || a.id || char(10) || a.ip), lower(:q))
    OR a.key IN (SELECT agent FROM agent_tags WHERE tag IN (
        WITH RECURSIVE every (tag) AS (SELECT min(tag) FROM agent_tags UNION ALL
            SELECT (SELECT min(tag) FROM agent_tags WHERE tag > every.tag) FROM every WHERE tag IS NOT NULL)
        SELECT tag FROM every WHERE instr(lower(tag), lower(:q)))))"""
_BULK_STEP = 50  # agents changed in one transaction of a bulk change: about 10 ms, for which heartbeats wait
_STORED = ("id", "hostname", "os", "version", "ip", "org_id", "machine_id", "arch", "cpu", "memory", "uptime",
           "last_heartbeat_ms", "registered_ms", "acknowledged", "recent_threats")
_AGENT_LIST = f"""json_object('id', a.id, 'hostname', a.hostname, 'os', a.os, 'version', c.version,
    'ip', a.ip, 'status', {_STATUS}, 'tags', json(a.tags), 'lastHeartbeat', {sql_iso('c.heartbeat_ms')},
    'registeredAt', {sql_iso('a.registered_ms')})"""
# One statement records the heartbeat of an agent that stays online and changes nothing else.
# Its parameters are `?`: binding nine names takes longer than everything else.
_BEAT = """
    UPDATE contacts SET seen_ms = max(seen_ms, ?), heartbeat_ms = ?, uptime = coalesce(?, uptime),
        cpu = coalesce(?, cpu), memory = coalesce(?, memory), heard = 1
    WHERE agent = ? AND announced = 'online' AND seen_ms >= ?
        AND coalesce(?, version) = version AND coalesce(?, 0) <= acknowledged"""
_IN_FORCE = """
    SELECT acknowledged,
        (SELECT version FROM policies_in_force WHERE scope = 'all'),
        (SELECT version FROM policies_in_force WHERE scope = 'org:' || ?),
        (SELECT version FROM policies_in_force WHERE scope = 'agent:' || ?)
    FROM contacts WHERE agent = ?"""
_FORGIVEN_PER_HOUR = 10  # a dead agent may not stay online for as long as somebody disturbs the manager
_FULL = ("the database is as large as MANAGER_MAX_DB_BYTES or its disk allows; the oldest threats and "
         "entries are removed early")
_HOUR_MS = 3_600_000
_PROBE_MS = 5000  # between two writes to learn whether the database can be written
_STEP_MS = 120_000  # a wall clock that differs by more from the time that has passed was stepped
_LONGEST_DOWN_MS = 366 * _DAY_MS  # a manager that seems to have been down for longer has a wrong clock
_RECORD_MS = 60_000  # how often the time that has passed is recorded
_SWEEP_STEP = 2000  # agents announced in one transaction: some 30 ms, so that no heartbeat waits long
_SILENT = "announced != 'online'"  # repeats the partial index's predicate so that SQLite uses it
_SWEEP_READ = 50 * _SWEEP_STEP
_ENTRIES_PER_MINUTE = 30  # that one agent can cause in the journal
_ROW_BYTES = 512  # of a threat event beside its texts, its indexes included
_LEAST_SHARE_BYTES = 4 * 2**20  # that an agent may report in a minute, if 5 % of the bound is less
_PURGE_SPACE_BYTES = 32 * 2**20  # left to purges on the disk; on a small one an eighth of the file's space
_LEAST_EXCESS_BYTES = 8 * 2**20  # over the bound, from which reports are refused, if 10 % of it is less
_AGENTS_COUNTED = 100_000  # agents whose bytes in a minute are remembered, the latest
_PURGE_STEP = 25  # rows removed in one transaction: each is a page in every index
_COUNTED = "received_ms, org_id, severity, type, agent_id, source_ip, state"  # what threat_totals count by
_ALL_AGENTS = "SELECT coalesce(sum(n), 0) FROM agent_totals"
_ALL_THREATS = "SELECT coalesce(sum(n), 0) FROM threat_totals WHERE kind IN ('severity', 'false_positives')"
_TYPES_SUMMED_UP = 1000  # an agent can report any number, and encoding a million stops all else for 0.7 s
_LISTED = 100      # events that one event lists as correlated with it, at most
_LOOKED_AT = 2000  # events of one indicator within the window that are looked at, the latest first


def _shared(column: str) -> str:
    """The latest events of other agents that share an indicator with `t`; the LIMITs bound what is read."""
    return f"""SELECT key FROM (SELECT key FROM (
        SELECT key, agent_id FROM threats WHERE {column} = t.{column} AND org_id IS t.org_id
            AND received_ms BETWEEN t.received_ms - :window_ms AND t.received_ms + :window_ms
        ORDER BY received_ms DESC LIMIT {_LOOKED_AT}) WHERE agent_id != t.agent_id LIMIT {_LISTED})"""


_RECEIVED = """(t.received_ms + (
    SELECT shift_ms FROM clock_spans WHERE first_threat <= t.key ORDER BY clock_spans.key DESC LIMIT 1))"""
_EVENT_ID = "printf('evt_%012x', {})"
_THREAT = f"""json_object('id', {_EVENT_ID.format('t.key')}, 'agentId', t.agent_id, 'hostname', t.hostname,
    'type', t.type, 'severity', t.severity, 'confidence', t.confidence, 'details', json(t.details),
    'sigmaRuleId', t.sigma_rule_id, 'timestamp', t.timestamp, 'receivedAt', {sql_iso(_RECEIVED)},
    'correlatedWith', json((SELECT json_group_array({_EVENT_ID.format('key')}) FROM (
        {_shared('source_ip')} UNION {_shared('file_hash')} ORDER BY key DESC LIMIT {_LISTED}))),
    'state', t.state, 'note', t.note)"""
_ENTRY_CONDITIONS = {"agent_id": "agent_id = :agent_id", "org_id": "org_id = :org_id",
                     "since": "at_ms >= :since", "until": "at_ms < :until"}
# Entries that change an agent's status: which it has after them, and before them if no earlier entry tells.
_AFTER = {"agent_registered": "online", "agent_online": "online", "agent_stale": "stale",
          "agent_offline": "offline", "agent_deregistered": ""}
_BEFORE = {"agent_registered": "", "agent_online": "offline", "agent_stale": "online",
           "agent_offline": "stale", "agent_deregistered": "online"}
_STATUS_ENTRIES = ", ".join(f"'{type}'" for type in _AFTER)
THE_MANAGER = Caller("manager")


def digest(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class Manager:
    """The use cases of a fleet, each one method, each on one reading of the clock.

    Methods that change something take the `caller` whom the journal will name. They raise
    ManagerError's subclasses and, having raised, have changed nothing. They may be called from any thread.
    """

    def __init__(self, config: Config, clock: Clock, store: Store) -> None:
        self.config = config
        self.clock = clock
        self.store = store
        self.liveness = Liveness.of(config)
        self.started = clock.now()
        self.heartbeats = 0
        self.events_reported: Counter[str] = Counter()
        self._checked_ms = self._probed_ms = self.started.tick_ms - _PROBE_MS
        self._agent_counts = (0, 0)  # agents in all, and online, when check_health() last counted them
        self._problem: str | None = None  # why it could not write
        # By agent: the tick its minute began at, its entries since, those suppressed, the worst severity.
        self._entries: dict[str, tuple[int, int, int, int]] = {}
        self._reported: dict[str, tuple[int, int]] = {}  # by agent: the same tick, bytes of events since
        self.purged_for_space = 0  # threat events and entries removed because of MANAGER_MAX_DB_BYTES
        self._full_ms: int | None = None  # on the clock's tick: when the database was last too large
        self._prune_due_ms = self.started.tick_ms + _HOUR_MS  # on the clock's tick
        self._none_due_until_ms = 0  # on the tick: until then every agent announced as online is
        self._stalled_ms, self._suspended_ms = clock.stalled_ms(), self.started.suspended_ms
        self._forgiven_ms = 0  # how far the tick that decides liveness is behind the clock's
        self._forgiven_at: deque[int] = deque(maxlen=_FORGIVEN_PER_HOUR)  # on the tick that decides liveness
        # Shorter stalls are ignored: they happen on any busy machine.
        self._least_forgiven_ms = max(500, config.heartbeat_timeout_ms // 20)
        self._to_journal: list[tuple[int, str, int]] = []  # what was forgiven: wall_ms, cause, duration in ms
        self._writable_ms = self.started.tick_ms  # when contacts could last be recorded, on the same tick
        self._outage_ms: int | None = None  # that instant, while they cannot be recorded
        self._measured_ms = self.started.tick_ms - _HOUR_MS  # when the disk was last measured, on the tick
        self._measure_disk()
        self._start_clock()
        self.reset_silence()
        self.check_health()

    def now(self) -> Moment:
        """One reading of the clock. Its tick decides liveness: it leaves out the time that is forgiven."""
        now, outage_ms = self.clock.now(), self._outage_ms
        tick_ms = now.tick_ms - self._forgiven_ms if outage_ms is None else outage_ms
        passed_ms = self._passed_ms(now)
        steady_ms = now.wall_ms - self._spans[-1].shift_ms
        if not -_STEP_MS <= steady_ms - passed_ms <= _STEP_MS:
            steady_ms = passed_ms
        return Moment(now.wall_ms, tick_ms, now.suspended_ms, steady_ms)

    # The steady clock

    def _passed_ms(self, now: Moment) -> int:
        return self._steady_offset_ms + now.tick_ms + now.suspended_ms

    def _start_clock(self) -> None:
        """Continue the steady clock from where it last stood, plus the time since then on the wall clock."""
        wall_ms = self.started.wall_ms
        with self.store.transaction() as db:
            columns = ", ".join(Span._fields)
            spans = [Span(*row) for row in db.execute(f"SELECT {columns} FROM clock_spans ORDER BY key")]
            if not spans:
                newest_ms = max(db.execute("SELECT max(received_ms) FROM threats").fetchone()[0] or 0,
                                db.execute("SELECT max(at_ms) FROM journal").fetchone()[0] or 0) or wall_ms
                # Rows that an older version has stamped are believed, unless one is from the future.
                spans.append(Span(0, 0, 0, 0 if newest_ms <= wall_ms + _STEP_MS else newest_ms, newest_ms))
                self._insert_span(db, spans[0])
            down_ms = wall_ms - spans[-1].until_ms - spans[-1].shift_ms
            stepped = not -_STEP_MS <= down_ms <= _LONGEST_DOWN_MS
            steady_ms = spans[-1].until_ms + (0 if stepped else max(0, down_ms))
            if stepped or not 0 <= down_ms <= _STEP_MS:
                spans.append(self._begin_span(db, wall_ms, steady_ms, down_ms if stepped else 0))
        self._spans = spans
        self._steady_offset_ms = steady_ms - self.started.tick_ms - self.started.suspended_ms
        self._stepped_ms = steady_ms - (0 if stepped else _HOUR_MS)

    def _begin_span(self, db: sqlite3.Connection, wall_ms: int, steady_ms: int, stepped_ms: int) -> Span:
        used = dict(db.execute("SELECT name, seq FROM sqlite_sequence").fetchall())
        span = Span(used.get("threats", 0) + 1, used.get("journal", 0) + 1, wall_ms - steady_ms, steady_ms,
                    steady_ms)
        self._insert_span(db, span)
        if stepped_ms:
            log.warning("the system clock was stepped by %d ms; nothing is purged for an hour", stepped_ms)
            self.store.journal(wall_ms, "clock_stepped", THE_MANAGER, None, None, {"byMs": stepped_ms})
        return span

    @staticmethod
    def _insert_span(db: sqlite3.Connection, span: Span) -> None:
        db.execute(f"INSERT INTO clock_spans ({', '.join(span._fields)}) VALUES (?, ?, ?, ?, ?)", span)

    def follow_clock(self, *, record: bool = False) -> None:
        """Called by the timer: notice a step of the wall clock; write the time each minute or to `record`."""
        now, last = self.now(), self._spans[-1]
        stepped_ms = now.wall_ms - last.shift_ms - now.steady_ms
        if not (record or stepped_ms or now.steady_ms - last.until_ms >= _RECORD_MS):
            return
        ended = last._replace(until_ms=max(last.until_ms, now.steady_ms))
        with self.store.transaction() as db:
            db.execute("UPDATE clock_spans SET until_ms = ? WHERE key = (SELECT max(key) FROM clock_spans)",
                       (ended.until_ms,))
            begun = [self._begin_span(db, now.wall_ms, now.steady_ms, stepped_ms)] if stepped_ms else []
        self._spans = [*self._spans[:-1], ended, *begun]
        if stepped_ms:
            self._stepped_ms = now.steady_ms
        else:  # clocks that drift apart, by a thousandth at most, are none that were stepped
            self._steady_offset_ms += max(-60, min(60, now.steady_ms - self._passed_ms(self.clock.now())))

    def _cutoff_ms(self, now: Moment, kept_ms: int) -> int:
        """The instant on the steady clock since when the manager has run for `kept_ms`."""
        for span in (self._spans[-1]._replace(until_ms=now.steady_ms), *self._spans[-2::-1]):
            ran_ms = span.until_ms - span.from_ms
            if ran_ms >= kept_ms:
                return span.until_ms - kept_ms
            kept_ms -= ran_ms
        return 0

    def _entry_steady_ms(self, now: Moment, seq: int, at_ms: int) -> int:
        index = bisect.bisect(self._spans, seq, key=lambda span: span.first_entry) - 1
        span = self._spans[index]
        until_ms = now.steady_ms if span is self._spans[-1] else span.until_ms
        return max(span.from_ms, min(at_ms - span.shift_ms, until_ms))

    # Liveness

    def reset_silence(self) -> None:
        """Begin the silence of every agent anew within the status it was last announced with.

        For the start: nobody could be heard before it, and the tick of another run means nothing in this one.
        """
        now = self.now()
        with self.store.transaction() as db:
            for status, age_ms in ((Status.ONLINE, 0), (Status.STALE, self.liveness.stale_after_ms + 1),
                                   (Status.OFFLINE, self.liveness.offline_after_ms + 1)):
                db.execute("UPDATE contacts SET seen_ms = ?, heard = 0 WHERE announced = ?",
                           (now.tick_ms - age_ms, status))
            # NULL in rows of schema 8 and before.
            db.execute(f"UPDATE contacts SET announced_steady_ms = ? WHERE {_SILENT} "
                       "AND announced = 'offline' AND announced_steady_ms IS NULL", (now.steady_ms,))
        self._none_due_until_ms = now.tick_ms + self.liveness.stale_after_ms

    def forgive_suspend(self) -> None:
        """Leave out of every agent's silence the time in which this process was stopped.

        Called by the timer, and before an agent's silence is judged. Time in which the manager was only busy
        is not left out. At most ten stops, of any length, are forgiven in an hour, which does not count them.
        """
        before_ms, self._stalled_ms = self._stalled_ms, self.clock.stalled_ms()
        self._forgive("process_stopped", self._stalled_ms - before_ms)

    def forgive_outage(self) -> None:
        """The same for the time in which no contact could be recorded. Called by the timer only."""
        now = self.clock.now()
        suspended_ms, self._suspended_ms = now.suspended_ms - self._suspended_ms, now.suspended_ms
        if suspended_ms >= self._least_forgiven_ms:  # the tick stood still, so there is nothing to leave out
            self._to_journal.append((now.wall_ms, "machine_suspended", suspended_ms))
            self._prune_due_ms = now.tick_ms + _HOUR_MS
        tick_ms = now.tick_ms - self._forgiven_ms
        if not self.store.failed:
            if self._outage_ms is not None:
                self._forgive("database_unavailable", tick_ms - self._outage_ms)
            self._writable_ms, self._outage_ms = now.tick_ms - self._forgiven_ms, None
        elif self._outage_ms is None and self._may_forgive(tick_ms):
            self._outage_ms = self._writable_ms

    def _may_forgive(self, tick_ms: int) -> bool:
        return len(self._forgiven_at) < _FORGIVEN_PER_HOUR or tick_ms - self._forgiven_at[0] >= _HOUR_MS

    def _forgive(self, cause: str, duration_ms: int) -> None:
        if duration_ms < self._least_forgiven_ms:
            return
        now = self.clock.now()
        tick_ms = now.tick_ms - self._forgiven_ms - duration_ms
        if not self._may_forgive(tick_ms):
            log.warning("%s for %d ms; it counts as silence, because this happened too often", cause,
                        duration_ms)
            return
        self._forgiven_at.append(tick_ms)
        self._forgiven_ms += duration_ms
        self._prune_due_ms = now.tick_ms + _HOUR_MS
        self._none_due_until_ms = 0
        self._to_journal.append((now.wall_ms, cause, duration_ms))

    def journal_forgiven(self) -> None:
        """Write to the journal what was forgiven, after the changes of status that had fallen due before."""
        if not self._to_journal:
            return
        now, forgiven = self.now(), self._to_journal[:]
        with self.store.transaction() as db:
            self.sweep(now._replace(wall_ms=now.wall_ms - sum(duration_ms for *_, duration_ms in forgiven)))
            db.execute("UPDATE contacts SET seen_ms = :now WHERE seen_ms > :now", {"now": now.tick_ms})
            for at_ms, cause, duration_ms in forgiven:
                log.warning("%s for %d ms; it counts as silence of no agent", cause, duration_ms)
                self.store.journal(at_ms, "silence_forgiven", THE_MANAGER, None, None,
                                   {"cause": cause, "durationMs": duration_ms})
        del self._to_journal[:len(forgiven)]

    def sweep(self, as_of: Moment | None = None) -> int:
        """Announce every change of status that has fallen due, in the order it fell due; their number."""
        announced = 0
        while due := self._fallen_due(as_of or self.now()):
            for first in range(0, len(due), _SWEEP_STEP):
                announced += self._announce_step(due[first:first + _SWEEP_STEP], as_of or self.now())
        return announced

    def _fallen_due(self, now: Moment) -> list[tuple[int, int, str]]:
        """Changes of status to announce next: (due_ms on the tick, agent's key, status), oldest first."""
        # An index of online agents would slow heartbeats: all are read once the longest silent may be due.
        online_from, stale_from = self.liveness.cutoffs(now.tick_ms).values()
        select = f"SELECT seen_ms + ? AS due_ms, agent, ? FROM contacts WHERE {{}} AND seen_ms < ? " \
                 f"ORDER BY seen_ms LIMIT {_SWEEP_READ}"
        due: list[tuple[int, int, str]] = []
        with self.store.read() as db:
            rows = db.cursor()
            rows.row_factory = None  # plain tuples
            if now.tick_ms > self._none_due_until_ms:
                due += rows.execute(select.format("announced = 'online'"),
                                    (self.liveness.stale_after_ms, "stale", online_from))
                if not due:
                    (seen_ms,) = rows.execute(
                        "SELECT min(seen_ms) FROM contacts WHERE announced = 'online'").fetchone()
                    self._none_due_until_ms = self.liveness.stale_after_ms + (
                        now.tick_ms if seen_ms is None else seen_ms)
            due += rows.execute(select.format(f"{_SILENT} AND announced = 'stale'"),
                                (self.liveness.offline_after_ms, "offline", stale_from))
        due.sort()
        # An agent made stale here may be due to go offline before a later one of these: stop before that.
        gap_ms = self.liveness.offline_after_ms - self.liveness.stale_after_ms
        return [change for change in due[:_SWEEP_READ] if change[0] < due[0][0] + gap_ms]

    def _announce_step(self, due: Sequence[tuple[int, int, str]], now: Moment) -> int:
        """Announce changes of status in one short transaction, each unless its agent was heard meanwhile."""
        with self.store.transaction(durable=False) as db:
            db.executemany("INSERT INTO temp.due (due_ms, agent, status) VALUES (?, ?, ?)", due)
            db.execute(
                "DELETE FROM temp.due WHERE NOT EXISTS (SELECT 1 FROM contacts c WHERE c.agent = due.agent "
                "AND (c.announced, c.seen_ms) = (iif(status = 'stale', 'online', 'stale'), due_ms - "
                "iif(status = 'stale', :stale_after_ms, :offline_after_ms)))", self.liveness._asdict())
            step = db.execute(
                "INSERT INTO journal (at_ms, type, actor, org_id, agent_id, data) "
                "SELECT ? + due_ms, 'agent_' || status, ?, org_id, id, json_object("
                f"'hostname', hostname, 'lastSeen', {sql_iso('heartbeat_ms')}) FROM temp.due "
                "CROSS JOIN agents ON key = due.agent CROSS JOIN contacts c ON c.agent = due.agent "
                "ORDER BY due_ms, due.agent",
                (now.wall_of(0), to_json(THE_MANAGER.actor()))).rowcount
            db.execute(
                "UPDATE contacts SET (announced, announced_ms, announced_steady_ms) = "
                "(SELECT status, ? + due_ms, ? + due_ms FROM temp.due WHERE due.agent = contacts.agent) "
                "WHERE agent IN (SELECT agent FROM temp.due)", (now.wall_of(0), now.steady_ms - now.tick_ms))
            db.execute("DELETE FROM temp.due")
            self.store.journaled = True
        return step

    def _of_status(self, now: Moment, status: Status, *, hint: bool = True) -> str:
        """The SQL condition for agents of a status. The announced status may be out of date. With `hint` its
        index is used while no agent that is announced as online can be overdue."""
        if status is Status.ONLINE:
            return "c.announced = 'online' AND c.seen_ms >= :online_from"
        looked_in = f"c.{_SILENT} AND c.announced IN ('stale', 'offline') AND "
        return looked_in * (hint and now.tick_ms <= self._none_due_until_ms) + (
            "c.seen_ms < :stale_from" if status is Status.OFFLINE else
            "c.seen_ms < :online_from AND c.seen_ms >= :stale_from")

    def _announce(self, db: sqlite3.Connection, at_ms: int, status: Status, row: Mapping[str, Any]) -> None:
        db.execute("UPDATE contacts SET announced = ?, announced_ms = ? WHERE agent = ?",
                   (status, at_ms, row["key"]))
        more = {"ip": row["ip"]} if status is Status.ONLINE else {"lastSeen": iso(row["heartbeat_ms"])}
        self.store.journal(at_ms, "agent_" + status, THE_MANAGER, row["id"], row["org_id"],
                           {"hostname": row["hostname"], **more})

    def _contact(self, db: sqlite3.Connection, now: Moment, row: Mapping[str, Any], *,
                 heard: bool = True) -> None:
        """Record a contact: announce what fell due before, then that the agent is back.

        A registration does not count as `heard`: its answer may have been lost.
        """
        announced, seen_ms = Status(row["announced"]), row["seen_ms"]
        for before, after, age_ms in ((Status.ONLINE, Status.STALE, self.liveness.stale_after_ms),
                                      (Status.STALE, Status.OFFLINE, self.liveness.offline_after_ms)):
            if announced is before and now.tick_ms - seen_ms > age_ms:
                self._announce(db, now.wall_of(seen_ms + age_ms), after, row)
                announced = after
        if announced is not Status.ONLINE:
            self._announce(db, now.wall_ms, Status.ONLINE, row)
        db.execute("UPDATE contacts SET seen_ms = ?, heartbeat_ms = ?, heard = ? WHERE agent = ?",
                   (now.tick_ms, now.wall_ms, heard, row["key"]))

    def _journal_of_agent(self, now: Moment, type: str, caller: Caller, agent_id: str, org_id: str | None,
                          data: Mapping[str, Any], *, severity: int = len(SEVERITIES),
                          always: bool = False) -> None:
        """Journal what an agent caused, at most 30 entries a minute: the next one counts those `suppressed`.
        Some of the 30 are kept for threats worse than any reported in that minute."""
        began_ms, count, suppressed, worst = self._entries.pop(agent_id, (now.tick_ms, 0, 0, len(SEVERITIES)))
        if now.tick_ms - began_ms >= 60_000:
            began_ms, count, worst = now.tick_ms, 0, len(SEVERITIES)
        if always or severity < worst or count < _ENTRIES_PER_MINUTE - len(SEVERITIES):
            self.store.journal(now.wall_ms, type, caller, agent_id, org_id,
                               {**data, "suppressed": suppressed} if suppressed else data)
            count, suppressed = count + 1, 0
        else:
            suppressed += 1
        self._entries[agent_id] = began_ms, count, suppressed, min(worst, severity)
        if len(self._entries) > _AGENTS_COUNTED:
            del self._entries[next(iter(self._entries))]

    # Agents

    @checked(REGISTER)
    def register(self, hostname: str, os: str, version: str, *, ip: str | None = None,
                 org_id: str | None = None, tags: Sequence[str] | None = None, arch: str | None = None,
                 machine_id: str | None = None, caller: Caller = LOCAL) -> Registration:
        """Register an agent, or an agent again (README, section Agents).

        When an agent registers again, its former token works until the new one is first used. A caller of
        role "anyone" (open enrolment) sets no org_id, machine_id or tags: the journal has them as `claimed`.
        Raises Conflict when the fleet is full, Forbidden, Unauthorized.
        """
        token = "pga_" + secrets.token_urlsafe(24)
        newcomer = caller.role == "anyone"
        claims = {"org_id": org_id, "machine_id": machine_id, "tags": tags}
        claimed = {name: value for name, value in claims.items() if newcomer and value is not None}
        if newcomer:
            org_id, machine_id, tags = self.config.open_enrollment_org, None, None
        with self.store.transaction() as db:
            self.forgive_suspend()  # the timer may not have run yet since the process was stopped
            now = self.now()  # here, because a sweep while this waited has judged who could fall silent next
            issued = self._enroll_token(db, now, caller)
            if issued:
                org_id, tags = issued["org_id"] or org_id, json.loads(issued["tags"]) or tags
            given: dict[str, Any] = {
                "hostname": hostname, "os": os, "ip": ip or caller.address, "arch": arch,
                "tags": None if tags is None else to_json(list(dict.fromkeys(tags))),
                "enroll_token": issued and issued["id"]}
            row, clone = self._known(db, now, org_id, machine_id, caller)
            if issued:
                self._use_enroll_token(db, issued, row)
            given["ip"] = given["ip"] or (row["ip"] if row else "127.0.0.1")
            entry: dict[str, Any] = {"hostname": hostname, "ip": given["ip"], "os": os, "version": version}
            entry |= {"enrollToken": issued["id"]} if issued else {}
            if row:
                agent_id, org_id, key = row["id"], row["org_id"], row["key"]
                given["new_token_digest"] = digest(token)
                db.execute(
                    "UPDATE agents SET " + ", ".join(f"{name} = coalesce(:{name}, {name})" for name in given)
                    + " WHERE key = :key", {**given, "key": key})
                self._contact(db, now, {**dict(row), "hostname": hostname, "ip": given["ip"]}, heard=False)
                db.execute("UPDATE contacts SET version = ? WHERE agent = ?", (version, key))
                entry |= {"formerHostname": row["hostname"], "formerIp": row["ip"]}
            else:
                self._check_fleet_size(db, newcomer)
                agent_id = self._new_id(db)
                given |= {"id": agent_id, "org_id": org_id, "machine_id": machine_id,
                          "registered_ms": now.wall_ms, "tags": given["tags"] or "[]",
                          "token_digest": digest(token), "newcomer": newcomer}
                key = db.execute(f"INSERT INTO agents ({', '.join(given)}) VALUES "
                                 f"({', '.join(':' + name for name in given)})", given).lastrowid
                db.execute("INSERT INTO contacts (agent, seen_ms, heartbeat_ms, announced, version) "
                           "VALUES (?, ?, ?, 'online', ?)", (key, now.tick_ms, now.wall_ms, version))
                entry |= {"claimed": claimed} if claimed else {}
                total, online = self._agent_counts
                self._agent_counts = total + 1, online + 1
            self._journal_of_agent(now, "agent_reregistered" if row else "agent_registered", caller,
                                   agent_id, org_id, entry, always=row is None or caller.role == "admin")
            if clone:
                self.store.journal(now.wall_ms, "identity_conflict", caller, agent_id, org_id, {
                    "hostname": hostname, "machineId": machine_id, "otherAgentId": clone})
        with self.store.read() as db:  # while others write: counting its threat events may take long
            return Registration(self._agent(db, now, agent_id), token, row is None)

    def _known(self, db: sqlite3.Connection, now: Moment, org_id: str | None, machine_id: str | None,
               caller: Caller) -> tuple[sqlite3.Row | None, str | None]:
        """The agent that a registration is for, if known, and the id of one it would be a clone of."""
        both = "SELECT * FROM agents a JOIN contacts c ON c.agent = a.key "
        if caller.role == "agent":
            row = db.execute(both + "WHERE a.key = ?", (caller.agent and caller.agent.key,)).fetchone()
            if row is None:
                raise Unauthorized("the token is wrong, or its agent was deregistered")
            return row, None
        if machine_id is None:
            return None, None
        rows = db.execute(both + "WHERE a.machine_id = ? AND a.org_id IS ? ORDER BY c.seen_ms DESC",
                          (machine_id, org_id)).fetchall()
        for row in rows:
            if not row["heard"] or self.liveness.status(row["seen_ms"], now.tick_ms) is not Status.ONLINE:
                if caller.role == "enroller" and not self.config.reenroll:
                    raise Forbidden(f"machine_id: is that of {row['id']}; registering it again takes an "
                                    "admin's token or the agent's own (MANAGER_REENROLL is 0)")
                return row, None
        return None, rows[0]["id"] if rows else None

    def _enroll_token(self, db: sqlite3.Connection, now: Moment, caller: Caller) -> sqlite3.Row | None:
        if caller.role != "enroller" or caller.credential is None:
            return None
        row: sqlite3.Row | None = db.execute("SELECT * FROM enroll_tokens WHERE id = ? AND expires_ms > ?",
                                             (caller.credential, now.steady_ms)).fetchone()
        if row is None:
            raise Unauthorized("the enrolment token has expired or was revoked")
        return row

    @staticmethod
    def _use_enroll_token(db: sqlite3.Connection, issued: sqlite3.Row, known: sqlite3.Row | None) -> None:
        # A registration repeated before anything was heard counts once: its answer may have been lost.
        if known and not known["heard"] and known["enroll_token"] == issued["id"]:
            return
        if not db.execute("UPDATE enroll_tokens SET uses = uses + 1 WHERE id = ? AND uses < max_uses",
                          (issued["id"],)).rowcount:
            raise Unauthorized("the enrolment token is used up")

    def _check_fleet_size(self, db: sqlite3.Connection, newcomer: bool) -> None:
        """Raises Conflict when the fleet is full, or the half of it for newcomers without a token is."""
        most = self.config.max_agents
        (newest,) = db.execute("SELECT coalesce(max(key), 0) FROM agents").fetchone()
        # No more agents exist than the newest key: while it is below the limit, none need be counted.
        if newest >= most and db.execute(_ALL_AGENTS).fetchone()[0] >= most:
            raise Conflict(f"the fleet is full: MANAGER_MAX_AGENTS allows {most} agents")
        if newcomer and newest >= most // 2 and db.execute(
                "SELECT count(*) FROM agents WHERE newcomer").fetchone()[0] >= most // 2:
            raise Conflict("no more agents may register without a token: they may be half of "
                           f"MANAGER_MAX_AGENTS, {most // 2}")

    def _new_id(self, db: sqlite3.Connection) -> str:
        """An id that no agent has, and none had whose threats or entries are still kept."""
        while True:
            agent_id = "agent-" + secrets.token_hex(4)
            (taken,) = db.execute(
                "SELECT EXISTS (SELECT 1 FROM agents WHERE id = :id) OR EXISTS (SELECT 1 FROM threats WHERE "
                "agent_id = :id) OR EXISTS (SELECT 1 FROM journal WHERE agent_id = :id)",
                {"id": agent_id}).fetchone()
            if not taken:
                return agent_id

    @checked(HEARTBEAT)
    def heartbeat(self, agent_id: str, *, uptime: float | None = None, cpu: float | None = None,
                  memory: float | None = None, version: str | None = None, policy_version: int | None = None,
                  caller: Caller = LOCAL) -> Beat:
        """Record that an agent is alive: `uptime` in s, `cpu` and `memory` in %; None keeps the last value.

        Raises NotFound.
        """
        with self.store.transaction(durable=False, savepoint=False) as db:
            now = self.now()  # after waiting for the lock, as in register()
            agent = caller.agent
            if agent is None or agent.id != agent_id:
                row = self._row(db, now, agent_id)
                agent = Identity(row["key"], agent_id, row["org_id"])
            key, _, org_id = agent
            stale_after_ms = self.liveness.stale_after_ms
            if not db.execute(_BEAT, (now.tick_ms, now.wall_ms, uptime, cpu, memory, key,
                                      now.tick_ms - stale_after_ms, version, policy_version)).rowcount:
                with self.store.transaction():
                    self.forgive_suspend()  # as in register()
                    now = self.now()
                    row = self._row(db, now, agent_id)
                    self._contact(db, now, dict(row))
                    if version not in (None, row["version"]):
                        db.execute("UPDATE contacts SET version = ? WHERE agent = ?", (version, key))
                        self._journal_of_agent(
                            now, "agent_updated", Caller("agent", agent=agent), agent_id, org_id,
                            {"hostname": row["hostname"], "version": {"from": row["version"], "to": version}})
                    if policy_version:
                        self._acknowledge(db, now, key, policy_version)
                    db.execute(_BEAT, (now.tick_ms, now.wall_ms, uptime, cpu, memory, key,
                                       now.tick_ms - stale_after_ms, None, None))
            acknowledged, *versions = db.execute(_IN_FORCE, (org_id, agent_id, key)).fetchone()
            self.store.on_commit(self._count_heartbeat)
        in_force = [(version, ()) for version in versions if version]
        pending = resolve(in_force, acknowledged).pending if in_force else 0
        return Beat(agent_id, Status.ONLINE, now.wall_ms, pending)

    def _count_heartbeat(self) -> None:
        self.heartbeats += 1

    def _acknowledge(self, db: sqlite3.Connection, now: Moment, key: int, version: int) -> None:
        """Take a version as acknowledged unless it is older than the last one or was never issued."""
        db.execute("UPDATE contacts SET acknowledged = :version, acknowledged_ms = :at_ms WHERE agent = :key "
                   "AND acknowledged < :version AND :version <= (SELECT max(version) FROM policies)",
                   {"version": version, "at_ms": now.wall_ms, "key": key})

    def agent(self, agent_id: str) -> Agent:
        """One agent as of now. Raises NotFound."""
        with self.store.read() as db:
            return self._agent(db, self.now(), agent_id)

    def _row(self, db: sqlite3.Connection, now: Moment, agent_id: str) -> sqlite3.Row:
        row = db.execute(_AGENT, {"id": agent_id, **self.liveness.cutoffs(now.tick_ms)}).fetchone()
        if row is None:
            raise NotFound(f"agent {agent_id} is not registered")
        found: sqlite3.Row = row
        return found

    def _agent(self, db: sqlite3.Connection, now: Moment, agent_id: str) -> Agent:
        source = "agents a JOIN contacts c ON c.agent = a.key WHERE a.id = :id"
        found = self._agents(db, now, source, {"id": agent_id})
        if not found:
            raise NotFound(f"agent {agent_id} is not registered")
        return found[0]

    def _agents(self, db: sqlite3.Connection, now: Moment, source: str,
                given: Mapping[str, Any]) -> list[Agent]:
        agents = []
        given = {**given, "day_ago_ms": now.steady_ms - _DAY_MS}
        for row in db.execute(f"{_AGENT_DETAIL} FROM {source}", given):
            in_force = [(row[scope], ()) for scope in ("for_all", "for_org", "for_agent") if row[scope]]
            agents.append(Agent(
                **{name: row[name] for name in _STORED}, tags=tuple(self.store.loads(row["tags"])),
                pending_policies=resolve(in_force, row["acknowledged"]).pending,
                **self.liveness.explain(now, row["seen_ms"], row["heartbeat_ms"], Status(row["announced"]),
                                        row["since_ms"])))
        return agents

    def agents(self, **filters: Any) -> tuple[list[Agent], int | None]:
        """Agents, and, if paged, how many match in all; `filters` are the parameters of GET /api/agents, as
        agents_json() takes them. Raises Invalid."""
        now = self.now()
        with self.store.read() as db:
            source, given, total = self._choose(db, now, **clean_arguments(AGENT_FILTER, filters))
            return self._agents(db, now, source, given), total

    def agents_json(self, **filters: Any) -> tuple[bytes, int | None]:
        """A JSON array of agents in registration order, and, if paged, how many match in all. Raises Invalid.

        `filters`: `status`, `org_id`, `tag` (a list, all of which an agent must carry), `os`, `version`,
        `q` (text in hostname, id, ip or a tag), `silent_ms`, `sort` (one of SORTS, `-` before it reverses),
        `page`, `limit`. SQLite writes the JSON: making a list of the whole fleet does not hold Python's lock.
        """
        now = self.now()
        with self.store.read() as db:
            source, given, total = self._choose(db, now, **clean_arguments(AGENT_FILTER, filters))
            (body,) = db.execute(f"SELECT CAST(json_group_array(json(item)) AS BLOB) FROM "
                                 f"(SELECT {_AGENT_LIST} AS item FROM {source})", given).fetchone()
            return body, total

    def _choose(self, db: sqlite3.Connection, now: Moment, *, sort: str | None, page: int | None,
                limit: int | None, **filters: Any) -> tuple[str, dict[str, Any], int | None]:
        """FROM for SQL of a list, with the tables a and c; its parameters; and, if paged, the total."""
        paged, window = _window(page, limit)
        tables, where, given, total = self._filter(db, now, **filters)
        if paged and total is None:
            counted = f"SELECT count(*) FROM {_joined(tables)}{where}" if where else _ALL_AGENTS
            (total,) = db.execute(counted, given).fetchone()
        order = ""
        if sort:
            table, value = _SORTS[sort.lstrip("-")]
            if not where:
                tables = table
            elif table not in tables:
                tables = table + tables if tables == "c" else tables + table
            order = f"{value} DESC," if sort[0] == "-" else f"{value},"
        key = _CHOOSE[tables[0]][1]
        # The page is chosen before the rest of its agents is read.
        chosen = (f"SELECT {key} AS key FROM {_joined(tables)}{where} ORDER BY {order} {key}"
                  f"{' DESC' if 'DESC' in order else ''} LIMIT :size OFFSET :skip")
        return (f"({chosen}) chosen CROSS JOIN agents a ON a.key = chosen.key "
                "CROSS JOIN contacts c ON c.agent = a.key", {**given, **window}, total if paged else None)

    def _filter(self, db: sqlite3.Connection, now: Moment, *, status: str | None = None,
                org_id: str | None = None, tag: Sequence[str] | None = None, os: str | None = None,
                version: str | None = None, q: str | None = None, silent_ms: float | None = None,
                ids: Sequence[str] | None = None) -> tuple[str, str, dict[str, Any], int | None]:
        """The letters of the tables that filters need, in an order that finds few agents first and in the
        order of registration; the WHERE, or nothing; its parameters; how many agents match, if known."""
        wanted = list(dict.fromkeys(tag or ()))
        if len(wanted) > 1:  # the rarest first, so that few agents are looked at
            carriers = "SELECT count(*) FROM (SELECT 1 FROM agent_tags WHERE tag = ? LIMIT 10000)"
            wanted.sort(key=lambda each: db.execute(carriers, (each,)).fetchone()[0])
        tags = {f"tag{number}": each for number, each in enumerate(wanted)}
        given = {**self.liveness.cutoffs(now.tick_ms), "day_ago_ms": now.steady_ms - _DAY_MS,
                 "org_id": org_id, "os": os, "version": version, "q": q, "ids": to_json(ids),
                 "heard_ms": now.tick_ms - (silent_ms or 0), **tags}
        plus = "" if ids is None else "+"  # keeps SQLite to the index of ids
        of_agent = [condition for value, condition in (
            (ids, "a.id IN (SELECT value FROM json_each(:ids))"), (org_id, f"{plus}a.org_id = :org_id"),
            (os, f"{plus}a.os = :os"), (q, _FOUND)) if value is not None]
        of_contact = [condition for value, condition in (
            (version, "c.version = :version"), (silent_ms, "c.seen_ms <= :heard_ms")) if value is not None]
        total = None
        if status:
            counts = self._counts(db, now)
            count = counts[Status(status)]
            total = None if tags or of_agent or of_contact else count
            # A rare status is found by its index; a common one soonest by walking along.
            of_contact.append(self._of_status(now, Status(status), hint=2 * count <= sum(counts.values())))
        of_tag = ["t.tag = :tag0"] if tags else []
        of_tag += [f"EXISTS (SELECT 1 FROM agent_tags o WHERE o.tag = :{name} AND o.agent = t.agent)"
                   for name in list(tags)[1:]]
        conditions = {"t": of_tag, "a": of_agent, "c": of_contact}
        order = "act" if ids is not None else "tac" if org_id or os else "tca"
        tables = "".join(each for each in order if conditions[each])
        where = " AND ".join(condition for each in tables for condition in conditions[each])
        return tables or "a", f" WHERE {where}" if where else "", given, total

    @staticmethod
    def _threats(db: sqlite3.Connection, where: Sequence[str], given: Mapping[str, Any], page: int | None,
                 limit: int | None) -> tuple[bytes, int | None]:
        """A JSON array of threat events, newest first, and, if paged, how many there are in all."""
        matching = "WHERE " + " AND ".join(where) if where else ""
        paged, window = _window(page, limit, 50)
        count = f"SELECT count(*) FROM threats t {matching}" if where else _ALL_THREATS
        total = db.execute(count, given).fetchone()[0] if paged else None
        order = "ORDER BY t.received_ms DESC, t.key DESC"
        # Keys are chosen first, or SQLite would make the JSON of all events that have the same received_ms.
        (body,) = db.execute(f"""SELECT CAST(json_group_array(json(item)) AS BLOB) FROM (
            SELECT {_THREAT} AS item FROM (
                SELECT t.key FROM threats t {matching} {order} LIMIT :size OFFSET :skip)
            AS chosen CROSS JOIN threats t ON t.key = chosen.key {order})""", {**given, **window}).fetchone()
        return body, total

    @checked(RETAG)
    def retag(self, agent_id: str, *, tags: Sequence[str] | None = None,
              add_tags: Sequence[str] | None = None, remove_tags: Sequence[str] | None = None,
              caller: Caller = LOCAL) -> Agent:
        """Replace an agent's tags, or add some and remove others. Raises NotFound, Invalid."""
        if (tags is None) == (add_tags is None and remove_tags is None):
            raise Invalid("tags: must be given, or else addTags, removeTags or both")
        now = self.now()
        with self.store.transaction() as db:
            row = self._row(db, now, agent_id)
            self._write_tags(db, now, row, list(dict.fromkeys(tags)) if tags is not None else
                             _edited_tags(row, add_tags, remove_tags), caller)
            return self._agent(db, now, agent_id)

    def _write_tags(self, db: sqlite3.Connection, now: Moment, row: sqlite3.Row, after: Sequence[str],
                    caller: Caller) -> bool:
        before = self.store.loads(row["tags"])
        if after != before:
            db.execute("UPDATE agents SET tags = ? WHERE key = ?", (to_json(after), row["key"]))
            self.store.journal(now.wall_ms, "agent_updated", caller, row["id"], row["org_id"], {
                "hostname": row["hostname"], "tags": {"from": before, "to": after}})
        return bool(after != before)

    def deregister(self, agent_id: str, *, caller: Caller = LOCAL) -> None:
        """Remove an agent; its threat events and its entries stay. Raises NotFound."""
        now = self.now()
        with self.store.transaction() as db:
            self._remove(db, now, self._row(db, now, agent_id), caller)

    def _remove(self, db: sqlite3.Connection, now: Moment, row: sqlite3.Row, caller: Caller) -> bool:
        db.execute("DELETE FROM agents WHERE key = ?", (row["key"],))
        total, online = self._agent_counts
        was_online = self.liveness.status(row["seen_ms"], now.tick_ms) is Status.ONLINE
        self._agent_counts = total - 1, online - was_online
        db.execute("DELETE FROM policies_in_force WHERE scope = 'agent:' || ?", (row["id"],))
        self.store.journal(now.wall_ms, "agent_deregistered", caller, row["id"], row["org_id"],
                           {"hostname": row["hostname"]})
        return True

    @checked(BULK)
    def bulk(self, *, ids: Sequence[str] | None = None, filter: Mapping[str, Any] | None = None,
             add_tags: Sequence[str] | None = None, remove_tags: Sequence[str] | None = None,
             deregister: bool | None = None, dry_run: bool = False, caller: Caller = LOCAL) -> dict[str, Any]:
        """Change the tags of many agents, or deregister them: those of `ids` that are registered, or those
        that `filter` (a mapping with the fields of BULK_FILTER) finds; `{"all": True}` finds all.

        Gives `matched`, `changed`, and `ids` of at most 1,000 that are changed, or would be if not `dry_run`.
        Each transaction changes a few agents, if they still match; heartbeats pass in between. A fault keeps
        what was done before it; the same call then does the rest. Raises Invalid.
        """
        filters = {name: value for name, value in (filter or {}).items() if value}
        everyone = filters.pop("all", False)
        if (ids is None) == (filter is None):
            raise Invalid("ids, filter: exactly one of them must be given")
        if filter is not None and bool(filters) == everyone:
            raise Invalid('filter: must name at least one filter, or be {"all": true} for all agents')
        if [bool(deregister), add_tags is not None, remove_tags is not None].count(True) != 1:
            raise Invalid("addTags, removeTags, deregister: exactly one of them must be given")

        def matching(db: sqlite3.Connection, ids: Sequence[str] | None) -> list[sqlite3.Row]:
            tables, where, given, _ = self._filter(db, self.now(), **filters, ids=ids)
            tables += "".join(each for each in "ac" if each not in tables)
            agents = f"SELECT a.*, c.seen_ms FROM {_joined(tables)}{where} ORDER BY a.key"
            return db.execute(agents, given).fetchall()

        with self.store.read() as db:
            rows = matching(db, ids)
        due = [row["id"] for row in rows
               if deregister or _edited_tags(row, add_tags, remove_tags) != self.store.loads(row["tags"])]
        changed = due if dry_run else []
        for first in range(0, 0 if dry_run else len(due), _BULK_STEP):
            with self.store.transaction() as db:
                now = self.now()
                changed += [row["id"] for row in matching(db, due[first:first + _BULK_STEP]) if (
                    self._remove(db, now, row, caller) if deregister else
                    self._write_tags(db, now, row, _edited_tags(row, add_tags, remove_tags), caller))]
        return {"matched": len(rows), "changed": len(changed), "ids": changed[:1000]}

    def holder(self, token_digest: bytes) -> Identity | None:
        """The agent to whom the token of this digest was given.

        The first use of the new token of an agent that registered again shows that the answer to it arrived:
        the former token ends.
        """
        select = "SELECT key, id, org_id FROM agents WHERE "
        with self.store.read() as db:
            row = db.execute(select + "token_digest = ?", (token_digest,)).fetchone()
            pending = row is None and db.execute(select + "new_token_digest = ?", (token_digest,)).fetchone()
        if pending:
            with self.store.transaction(durable=False) as db:
                db.execute("UPDATE contacts SET heard = 1 WHERE agent = ?", (pending["key"],))
                db.execute("UPDATE agents SET token_digest = new_token_digest, new_token_digest = NULL "
                           "WHERE new_token_digest = ?", (token_digest,))
                # Read again: another registration may have replaced the token meanwhile.
                row = db.execute(select + "token_digest = ?", (token_digest,)).fetchone()
        return row and Identity(*row)

    def knows_token(self, token_digest: bytes) -> bool:
        """Whether this is the digest of an agent's token, in use or new. Never waits for a writer."""
        with self.store.read() as db:
            return db.execute("SELECT 1 FROM agents WHERE token_digest = :digest UNION SELECT 1 FROM "
                              "agents WHERE new_token_digest = :digest",
                              {"digest": token_digest}).fetchone() is not None

    # Enrolment tokens

    @checked(ENROLL_TOKEN)
    def issue_enroll_token(self, *, ttl_ms: int = _DAY_MS, max_uses: int = 1, org_id: str | None = None,
                           tags: Sequence[str] | None = None, note: str | None = None,
                           caller: Caller = LOCAL) -> EnrollToken:
        """Issue a token for `max_uses` registrations within `ttl_ms`, with this org and these tags."""
        token = "pge_" + secrets.token_urlsafe(24)
        now = self.now()
        issued = EnrollToken("enr_" + secrets.token_hex(6), now.wall_ms + ttl_ms, max_uses, 0, org_id,
                             tuple(dict.fromkeys(tags or ())), note, token)
        with self.store.transaction() as db:  # expires_ms of the table is on the steady clock
            db.execute(
                "INSERT INTO enroll_tokens (id, token_digest, expires_ms, max_uses, org_id, tags, note) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (issued.id, digest(token), now.steady_ms + ttl_ms, max_uses, org_id, to_json(issued.tags),
                 note))
            self.store.journal(now.wall_ms, "enroll_token_issued", caller, None, org_id, {
                "enrollToken": issued.id, "expiresAt": iso(issued.expires_ms), "maxUses": max_uses,
                "tags": issued.tags, "note": note})
        return issued

    def enroll_tokens(self) -> list[EnrollToken]:
        """Every enrolment token not revoked, used up and expired ones included, in the order they expire."""
        with self.store.read() as db:
            return [EnrollToken(row["id"], row["expires_ms"] + self._spans[-1].shift_ms, row["max_uses"],
                                row["uses"], row["org_id"],
                                tuple(self.store.loads(row["tags"])), row["note"])
                    for row in db.execute("SELECT * FROM enroll_tokens ORDER BY expires_ms, id")]

    def revoke_enroll_token(self, token_id: str, *, caller: Caller = LOCAL) -> None:
        """End an enrolment token; the agents it registered stay. Raises NotFound."""
        now = self.now()
        with self.store.transaction() as db:
            row = db.execute("DELETE FROM enroll_tokens WHERE id = ? RETURNING org_id, uses",
                             (token_id,)).fetchone()
            if row is None:
                raise NotFound(f"there is no enrolment token {token_id}")
            self.store.journal(now.wall_ms, "enroll_token_revoked", caller, None, row["org_id"], {
                "enrollToken": token_id, "uses": row["uses"]})

    def enroll_token_id(self, token_digest: bytes) -> str | None:
        """The id of the enrolment token of this digest unless it has expired; register() checks its uses."""
        now = self.now()
        with self.store.read() as db:
            row = db.execute("SELECT id FROM enroll_tokens WHERE token_digest = ? AND expires_ms > ?",
                             (token_digest, now.steady_ms)).fetchone()
        return row and str(row["id"])

    def note_run(self, type: str) -> None:
        """Journal that this manager started or stopped."""
        with self.store.transaction():
            self.store.journal(self.now().wall_ms, type, THE_MANAGER, None, None, {"version": __version__})

    def note_refusal(self, agent_id: str, reason: str, *, caller: Caller) -> None:
        """Journal that a request in the name of this agent was refused, if it is registered."""
        with self.store.read() as db:
            row = db.execute("SELECT org_id, hostname FROM agents WHERE id = ?", (agent_id,)).fetchone()
        if row:
            with self.store.transaction(durable=False):
                self.store.journal(self.now().wall_ms, "agent_refused", caller, agent_id, row["org_id"],
                                   {"hostname": row["hostname"], "reason": reason})

    # Threat events

    @checked(REPORT)
    def report_events(self, agent_id: str, events: Sequence[Mapping[str, Any]], *,
                      caller: Caller = LOCAL) -> list[str]:
        """Store what an agent reports, all or nothing; the events' ids, in their order.

        An event is a mapping with the fields of EVENT, in JSON's or Python's spelling. One whose `id` the
        agent has reported before is not stored again and keeps its first event id. Raises NotFound, Invalid.
        """
        now = self.now()
        details = [to_json(event["details"]) for event in events]
        indicators = [(source_address(event["details"]), file_hash(event["details"])) for event in events]
        if caller.role == "agent":
            self._bound_report(now, agent_id, sum(map(_stored_bytes, events, details, indicators)))
        ids, stored = [], []
        with self.store.transaction() as db:
            if not self.store.has_space():
                self._note_full()
                raise Unavailable(_FULL, retry_after_s=5)
            agent = self._row(db, now, agent_id)
            for event, text, (source_ip, hash) in zip(events, details, indicators, strict=True):
                known = event.get("id") and db.execute(
                    "SELECT key FROM threats WHERE agent_id = ? AND own_id = ?",
                    (agent_id, event["id"])).fetchone()
                if known:
                    ids.append(event_id(known[0]))
                    continue
                key = db.execute(
                    "INSERT INTO threats (agent_id, hostname, org_id, own_id, type, severity, confidence, "
                    "sigma_rule_id, timestamp, received_ms, source_ip, file_hash, details) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (agent_id, agent["hostname"], agent["org_id"], event.get("id"), event["type"],
                     event["severity"], event.get("confidence"),
                     event.get("sigma_rule_id") or event.get("rule_id"), event.get("timestamp"),
                     now.steady_ms, source_ip, hash, text)).lastrowid
                ids.append(event_id(cast("int", key)))
                stored.append((now.steady_ms, agent["org_id"], event["severity"], event["type"], agent_id,
                               source_ip, "open", hash))
            db.execute("UPDATE contacts SET heard = 1 WHERE agent = ? AND NOT heard", (agent["key"],))
            if stored:
                self._count_threats(db, stored)
                severities = Counter(event[2] for event in stored)
                worst = min(severities, key=SEVERITIES.index)
                self._journal_of_agent(now, "threats_reported", caller, agent_id, agent["org_id"], {
                    "hostname": agent["hostname"], "count": len(stored), "maxSeverity": worst},
                                       severity=SEVERITIES.index(worst))
                self.store.on_commit(lambda: self.events_reported.update(severities))
                for name, column in (("sourceIp", 5), ("fileHash", 7)):
                    for value in dict.fromkeys(filter(None, (event[column] for event in stored))):
                        self._correlate(db, now, agent_id, agent["org_id"], name, value)
        return ids

    def _bound_report(self, now: Moment, agent_id: str, more_bytes: int) -> None:
        """Raises Throttled for an agent whose events would displace those of others, and Unavailable while
        the database is larger than it may be by more than is removed at once."""
        most = self.most_bytes
        if self.store.used_bytes() - most > max(most // 10, _LEAST_EXCESS_BYTES):
            raise Unavailable(_FULL, retry_after_s=5)
        began_ms, reported_bytes = self._reported.pop(agent_id, (now.tick_ms, 0))
        if now.tick_ms - began_ms >= 60_000:
            began_ms, reported_bytes = now.tick_ms, 0
        share_bytes = max(most // 20, _LEAST_SHARE_BYTES)
        refused = reported_bytes + more_bytes > share_bytes
        self._reported[agent_id] = began_ms, reported_bytes if refused else reported_bytes + more_bytes
        if len(self._reported) > _AGENTS_COUNTED:
            del self._reported[next(iter(self._reported))]
        if refused:
            raise Throttled(f"more than {share_bytes} bytes of threat events in a minute from one agent",
                            retry_after_s=math.ceil((began_ms + 60_000 - now.tick_ms) / 1000))

    def _correlate(self, db: sqlite3.Connection, now: Moment, agent_id: str, org_id: str | None, name: str,
                   value: str) -> None:
        """Announce an indicator that three or more agents of an org have seen, once per window."""
        given = {"org": org_id or "", "indicator": f"{name}:{value}", "agent": agent_id, "at": now.steady_ms,
                 "since": now.steady_ms - self.config.correlation_window_ms}
        seen = ("INSERT INTO sightings VALUES (:org, :indicator, {}, :at) "
                "ON CONFLICT DO UPDATE SET at_ms = :at")
        db.execute(seen.format(":agent"), given)
        if db.execute("SELECT 1 FROM sightings WHERE org_id = :org AND indicator = :indicator "
                      "AND agent_id = '' AND at_ms > :since", given).fetchone():
            return
        agents = [row[0] for row in db.execute(
            "SELECT agent_id FROM sightings WHERE org_id = :org AND indicator = :indicator "
            "AND agent_id != '' AND at_ms >= :since ORDER BY agent_id", given)]
        if len(agents) >= 3:
            db.execute(seen.format("''"), given)
            self.store.journal(now.wall_ms, "threats_correlated", THE_MANAGER, None, org_id, {
                "indicator": {name: value}, "agentIds": agents[:_LISTED], "count": len(agents)})

    @checked(THREAT_FILTER)
    def threats_json(self, *, since: int | None = None, until: int | None = None, org_id: str | None = None,
                     agent_id: str | None = None, severity: str | None = None, type: str | None = None,
                     source_ip: str | None = None, file_hash: str | None = None, state: str | None = None,
                     before: int | None = None, page: int | None = None,
                     limit: int | None = None) -> tuple[bytes, int | None]:
        """A JSON array of threat events, newest first, received at or after `since` and before `until` (ms
        since 1970), and, if paged, how many match in all.

        `before` is the key of the last event read: the list continues with the next older one. It is empty if
        that event is past its retention, for then the older ones are too.
        """
        shift_ms = self._spans[-1].shift_ms
        given: dict[str, Any] = {
            "since": since and since - shift_ms, "until": until and until - shift_ms, "org_id": org_id,
            "agent_id": agent_id, "severity": severity,
            "type": type, "source_ip": source_ip and source_address({"sourceIp": source_ip}),
            "file_hash": file_hash and file_hash.strip().lower(), "state": state, "before": before,
            "window_ms": self.config.correlation_window_ms}
        where = ["t.received_ms >= :since"] * (since is not None)
        where += ["t.received_ms < :until"] * (until is not None)
        where += [f"t.{name} = :{name}" for name in ("org_id", "agent_id", "severity", "type", "source_ip",
                                                     "file_hash", "state") if given[name] is not None]
        if state not in (None, "open"):
            where.append("t.state != 'open'")  # repeats the partial index's predicate so that SQLite uses it
        with self.store.read() as db:
            if before is not None:
                row = db.execute("SELECT received_ms FROM threats WHERE key = ?", (before,)).fetchone()
                given["before_ms"] = row[0] if row else -1
                where += ["t.received_ms <= :before_ms", "(t.received_ms < :before_ms OR t.key < :before)"]
            return self._threats(db, where, given, page, limit)

    @checked({"key": need(EVENT_ID), **TRIAGE})
    def triage(self, key: int, *, state: str | None = None, note: str | None = None,
               caller: Caller = LOCAL) -> bytes:
        """Set the state of a threat event, its note, or both; the event as JSON. Raises NotFound, Invalid."""
        if state is None and note is None:
            raise Invalid("state: must be given, or note, or both")
        now = self.now()
        given = {"key": key, "state": state, "note": note, "window_ms": self.config.correlation_window_ms}
        with self.store.transaction() as db:
            before = db.execute("SELECT * FROM threats WHERE key = ?", (key,)).fetchone()
            if before is None:
                raise NotFound(f"threat event {event_id(key)} is not kept")
            changed = {name: {"from": before[name], "to": given[name]} for name in ("state", "note")
                       if given[name] not in (None, before[name])}
            if changed:
                after = db.execute(
                    "UPDATE threats SET state = coalesce(:state, state), note = coalesce(:note, note) "
                    f"WHERE key = :key RETURNING {_COUNTED}", given).fetchall()
                self._count_threats(db, [[before[name] for name in _COUNTED.split(", ")]], -1)
                self._count_threats(db, after)
                self.store.journal(
                    now.wall_ms, "threat_updated", caller, before["agent_id"], before["org_id"],
                    {"hostname": before["hostname"], "eventId": event_id(key),
                     "threatType": before["type"], **changed})
            items, _ = self._threats(db, ["t.key = :key"], given, None, None)
        return items[1:-1]

    @checked(SUMMARY)
    def threat_summary(self, *, period: str = "24h", org_id: str | None = None) -> dict[str, Any]:
        """How many events of which kinds, agents and sources were received within a period up to now."""
        with self.store.read() as db:
            count = functools.partial(self._threats_of, db, self.now(), period, org_id)
            summary = self._summary(count)
            severities = {severity: summary[severity] for severity in SEVERITIES}
            agents, sources = count("agent_id", 10), count("source_ip", 10)
            hostname = "SELECT hostname FROM threats WHERE agent_id = ? ORDER BY received_ms DESC LIMIT 1"
            return {
                "period": period, "total": summary["total"], "bySeverity": severities,
                "byType": count("type", _TYPES_SUMMED_UP),
                "topAgents": [
                    {"agentId": agent, "hostname": db.execute(hostname, (agent,)).fetchone()[0], "count": n}
                    for agent, n in agents.items()],
                "topSourceIps": [{"ip": ip, "count": n} for ip, n in sources.items()],
                "falsePositives": summary["falsePositives"]}

    @staticmethod
    def _summary(count: Callable[[str], dict[str, int]]) -> dict[str, int]:
        found = count("severity")
        return {"total": sum(found.values()), **{severity: found.get(severity, 0) for severity in SEVERITIES},
                "falsePositives": sum(count("false_positives").values())}

    @staticmethod
    def _threats_of(db: sqlite3.Connection, now: Moment, period: str, org_id: str | None, kind: str,
                    most: int = -1) -> dict[str, int]:
        """The number of threat events of a period for each value of `kind`, the greatest number first.

        Whole hours are read from threat_totals; the events of the hour in which the period began are counted.
        """
        since_ms = now.steady_ms - PERIODS_MS[period]
        of_org = "AND org_id = :org_id" if org_id else ""
        column, equals = ("''", "=") if kind == "false_positives" else (kind, "!=")
        return dict(db.execute(f"""
            SELECT value, sum(n) FROM (
                SELECT value, n FROM threat_totals WHERE kind = :kind AND hour >= :hour {of_org} UNION ALL
                SELECT {column}, count(*) FROM threats INDEXED BY threats_time
                    WHERE received_ms >= :since_ms AND received_ms < :hour * {_HOUR_MS}
                    AND state {equals} 'false_positive' {of_org} GROUP BY 1)
            WHERE value IS NOT NULL GROUP BY value ORDER BY sum(n) DESC, value LIMIT :most""", {
                "kind": kind, "hour": since_ms // _HOUR_MS + 1, "since_ms": since_ms, "org_id": org_id,
                "most": most}).fetchall())

    @staticmethod
    def _count_threats(db: sqlite3.Connection, events: Iterable[Sequence[Any]], by: int = 1) -> None:
        """Add events, rows that begin with _COUNTED, to the totals of their hours; `by` -1 subtracts them."""
        totals: Counter[tuple[str, int, str, str]] = Counter()
        for received_ms, org_id, severity, type, agent_id, source_ip, state, *_ in events:
            values = {"severity": severity, "type": type, "agent_id": agent_id, "source_ip": source_ip}
            if state == "false_positive":
                values = {"false_positives": ""}
            for kind, value in values.items():
                if value is not None:
                    totals[kind, received_ms // _HOUR_MS, org_id or "", value] += by
        db.executemany("INSERT INTO threat_totals VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
                       "SET n = n + excluded.n", ((*total, n) for total, n in totals.items()))
        if by < 0:
            db.executemany("DELETE FROM threat_totals WHERE (kind, hour, org_id, value) = (?, ?, ?, ?) "
                           "AND n = 0", totals)

    # Policies

    @checked(POLICY)
    def create_policy(self, name: str, rules: Sequence[Mapping[str, Any]], *,
                      description: str | None = None, org_id: str | None = None,
                      agent_id: str | None = None, caller: Caller = LOCAL) -> Policy:
        """Issue a policy, which replaces its scope's former one. Raises Invalid, NotFound."""
        now = self.now()
        with self.store.transaction() as db:
            org_of_agent = self._policy_scope(db, now, org_id, agent_id)
            policy = self._issue(db, now, name, description, rules, org_id, agent_id)
            self.store.journal(now.wall_ms, "policy_created", caller, agent_id, org_id or org_of_agent, {
                "policyId": policy.id, "version": version_text(policy.version), "ruleCount": len(rules),
                "name": name})
        return policy

    @checked(PREVIEW)
    def preview_policy(self, rules: Sequence[Mapping[str, Any]], *, org_id: str | None = None,
                       agent_id: str | None = None) -> dict[str, Any]:
        """What issuing a policy would change: how many agents are in scope and online, the version that it
        would replace, and the rules that it would add and remove there. Raises Invalid, NotFound."""
        now = self.now()
        with self.store.read() as db:
            self._policy_scope(db, now, org_id, agent_id)
            counts = self._counts(db, now, org_id, agent_id)
            scope = _scopes(org_id, agent_id)[-1:]
            former = next(iter(self._in_force(db, scope)), None)
        held: Sequence[Mapping[str, Any]] = former.rules if former else ()
        return {"dryRun": True, "agents": sum(counts.values()), "broadcastedTo": counts[Status.ONLINE],
                "replaces": version_text(former.version) if former else None,
                "added": [rule for rule in rules if rule not in held],
                "removed": [rule for rule in held if rule not in rules]}

    def _policy_scope(self, db: sqlite3.Connection, now: Moment, org_id: str | None,
                      agent_id: str | None) -> Any:
        """The org of the agent whom an override is for. Raises Invalid, NotFound."""
        if org_id and agent_id:
            raise Invalid("agent_id: must not be given together with org_id")
        return self._row(db, now, agent_id)["org_id"] if agent_id else None

    def _issue(self, db: sqlite3.Connection, now: Moment, name: str, description: str | None,
               rules: Sequence[Mapping[str, Any]], org_id: str | None, agent_id: str | None) -> Policy:
        reached = self._counts(db, now, org_id, agent_id)[Status.ONLINE]
        policy_id = "pol_" + secrets.token_hex(6)
        version = db.execute(
            "INSERT INTO policies (id, name, description, rules, org_id, agent_id, broadcasted_to, "
            "created_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (policy_id, name, description, to_json(rules),
                                                            org_id, agent_id, reached, now.wall_ms)).lastrowid
        assert version is not None
        db.execute("INSERT OR REPLACE INTO policies_in_force VALUES (?, ?)",
                   (_scopes(org_id, agent_id)[-1], version))
        return Policy(version, policy_id, name, description, rules, org_id, agent_id, reached, now.wall_ms)

    @checked(OF_ORG)
    def active_policy(self, *, org_id: str | None = None) -> Policy | None:
        """The policy in force of an organization, or of all agents."""
        with self.store.read() as db:
            return next(iter(self._in_force(db, _scopes(org_id, None)[-1:])), None)

    @checked(PAGE)
    def policies(self, *, page: int | None = None,
                 limit: int | None = None) -> tuple[list[Policy], int | None]:
        """Every policy ever issued, newest first, and, if paged, how many there are."""
        paged, window = _window(page, limit)
        with self.store.read() as db:
            found = [self._policy(row) for row in db.execute(
                "SELECT * FROM policies ORDER BY version DESC LIMIT :size OFFSET :skip", window)]
            total = db.execute("SELECT count(*) FROM policies").fetchone()[0] if paged else None
        return found, total

    def custom_rules(self, agent_id: str | None) -> list[str]:
        """The texts of enabled `custom` rules, of an agent or of all: `config.text`, or `config` as JSON."""
        if agent_id:
            rules = self.agent_policy(agent_id, ack=False).effective.rules
        else:
            rules = policy.rules if (policy := self.active_policy()) else []
        return [first_text(rule["config"], ("text",)) or to_json(rule["config"])
                for rule in rules if rule["type"] == "custom" and rule.get("enabled", True)]

    def drop_override(self, agent_id: str, *, caller: Caller = LOCAL) -> int:
        """Put an agent back under the policies of its org and of all: issue a version without rules for it,
        so that it sees a pending policy. Gives that version. Raises NotFound."""
        now = self.now()
        with self.store.transaction() as db:
            agent = self._row(db, now, agent_id)
            dropped = next(iter(self._in_force(db, _scopes(None, agent_id)[1:])), None)
            if dropped is None or not dropped.rules:
                raise NotFound(f"agent {agent_id} has no policy of its own")
            issued = self._issue(db, now, f"{dropped.name} dropped"[:255], None, [], None, agent_id)
            self.store.journal(now.wall_ms, "policy_dropped", caller, agent_id, agent["org_id"], {
                "hostname": agent["hostname"], "policyId": issued.id, "version": version_text(issued.version),
                "ruleCount": 0, "droppedVersion": version_text(dropped.version)})
        return issued.version

    def agent_policy(self, agent_id: str, *, ack: bool = True) -> AgentPolicy:
        """What an agent must obey; asking acknowledges it unless `ack` is false. Raises NotFound."""
        now = self.now()
        with self.store.transaction() if ack else self.store.read() as db:
            row = self._row(db, now, agent_id)
            in_force = [(policy.version, policy.rules)
                        for policy in self._in_force(db, _scopes(row["org_id"], agent_id))]
            effective = resolve(in_force, row["acknowledged"])
            if ack and effective.version:
                self._acknowledge(db, now, row["key"], effective.version)
                row = self._row(db, now, agent_id)
        applied = effective.version and row["acknowledged"] >= effective.version
        return AgentPolicy(agent_id, effective, row["acknowledged_ms"] if applied else None)

    def _policy(self, row: sqlite3.Row) -> Policy:
        return Policy(**{each.name: row[each.name] for each in fields(Policy) if each.name != "rules"},
                      rules=self.store.loads(row["rules"]))

    def _in_force(self, db: sqlite3.Connection, scopes: Sequence[str]) -> list[Policy]:
        rows = {row["scope"]: self._policy(row) for row in db.execute(
            f"SELECT * FROM policies_in_force JOIN policies USING (version) "
            f"WHERE scope IN ({', '.join('?' * len(scopes))})", scopes)}
        return [rows[scope] for scope in scopes if scope in rows]

    # Fleet

    @checked(OF_ORG)
    def overview(self, *, org_id: str | None = None) -> dict[str, Any]:
        """The fleet at a glance: agents by status and system, threats by severity and type."""
        now = self.now()
        of_org = "WHERE org_id = :org_id" if org_id else ""
        with self.store.read() as db:
            counts = self._counts(db, now, org_id)
            count = functools.partial(self._threats_of, db, now)
            in_force = [(policy.version, ()) for policy in self._in_force(db, _scopes(org_id, None))]
            return {
                "totalAgents": sum(counts.values()),
                **{f"{status}Agents": counts[status] for status in Status},
                "threatSummary": {f"last{period}": self._summary(functools.partial(count, period, org_id))
                                  for period in ("24h", "7d")},
                "activePolicyVersion": version_text(resolve(in_force, 0).version),
                "topThreats": [{"type": type, "count": n}
                               for type, n in count("24h", org_id, "type", 10).items()],
                "agentsByOs": dict(db.execute(f"SELECT os, sum(n) FROM agent_totals {of_org} GROUP BY os "
                                              "ORDER BY sum(n) DESC, os", {"org_id": org_id}).fetchall()),
                "updatedAt": iso(now.wall_ms)}

    @checked(TIMELINE)
    def timeline(self, *, agent_id: str | None = None, hours: int = 24) -> dict[str, Any]:
        """The last `hours` hours, oldest first: threat events by severity, without false positives, and how
        many agents had which status at the hour's end, or now; of one agent, instead, the `intervals` of each
        status. The journal tells as far back as it is kept. Raises NotFound.
        """
        now = self.now()
        first_ms = now.wall_ms // _HOUR_MS * _HOUR_MS - (hours - 1) * _HOUR_MS
        since_ms = first_ms - self._spans[-1].shift_ms
        given = {"agent_id": agent_id, "first_ms": first_ms, "since_ms": since_ms, "last": hours - 1}
        shown: list[dict[str, Any]] = [{"at": iso(first_ms + hour * _HOUR_MS)} for hour in range(hours)]
        with self.store.read() as db:
            intervals = {"intervals": self._intervals(db, now, agent_id, given)} if agent_id else {}
            for hour, counts in zip(shown, [] if agent_id else self._hourly_counts(db, given), strict=False):
                hour |= counts
            for hour in shown:
                hour["threats"] = dict.fromkeys(SEVERITIES, 0)
            source = "WHERE agent_id = :agent_id" if agent_id else "INDEXED BY threats_time WHERE TRUE"
            counted = (f"SELECT min((received_ms - :since_ms) / {_HOUR_MS}, :last), severity, count(*) "
                       f"FROM threats {source} AND received_ms >= :since_ms AND state != 'false_positive'")
            if not agent_id and since_ms % _HOUR_MS == 0:  # else the hours of the totals are not those shown
                counted = (f"SELECT min(hour - :since_ms / {_HOUR_MS}, :last), value, sum(n) FROM "
                           f"threat_totals WHERE kind = 'severity' AND hour >= :since_ms / {_HOUR_MS}")
            for index, severity, count in db.execute(f"{counted} GROUP BY 1, 2", given):
                shown[index]["threats"][severity] = count
        return {"agentId": agent_id, "hours": shown, **intervals}

    def _hourly_counts(self, db: sqlite3.Connection, given: Mapping[str, Any]) -> list[dict[str, int]]:
        """How many agents had which status at each hour's end: the present numbers less the changes since."""
        silent = db.execute(f"SELECT announced, count(*) FROM contacts WHERE {_SILENT} GROUP BY 1").fetchall()
        counts = Counter(dict(silent))
        counts["online"] = db.execute(_ALL_AGENTS).fetchone()[0] - counts.total()
        changed: list[Counter[str]] = [Counter() for _ in range(given["last"] + 1)]
        before = (f"SELECT type FROM journal p WHERE p.agent_id = j.agent_id AND p.seq < j.seq AND p.type IN "
                  f"({_STATUS_ENTRIES}) ORDER BY p.seq DESC LIMIT 1")
        for index, entry, former, count in db.execute(
                f"SELECT min((at_ms - :first_ms) / {_HOUR_MS}, :last), type, "
                f"iif(type IN ('agent_online', 'agent_deregistered'), ({before}), NULL), count(*) "
                f"FROM journal j WHERE at_ms >= :first_ms AND type IN ({_STATUS_ENTRIES}) "
                "GROUP BY 1, 2, 3", given):
            changed[index][_AFTER[entry]] -= count
            changed[index][_AFTER[former] if former else _BEFORE[entry]] += count
        found = []
        for change in reversed(changed):
            found.append({status.value: max(0, counts[status.value]) for status in Status})
            counts.update(change)
        return found[::-1]

    def _intervals(self, db: sqlite3.Connection, now: Moment, agent_id: str,
                   given: Mapping[str, Any]) -> list[dict[str, Any]]:
        agent = self._agent(db, now, agent_id)
        select = ("SELECT at_ms, type FROM journal WHERE agent_id = :agent_id "
                  f"AND type IN ({_STATUS_ENTRIES}) AND at_ms ")
        entries = db.execute(select + ">= :first_ms ORDER BY seq", given).fetchall()
        before = db.execute(select + "< :first_ms ORDER BY seq DESC LIMIT 1", given).fetchone()
        at_first = _AFTER[before["type"]] if before else (
            _BEFORE[entries[0]["type"]] if entries else agent.status)
        changes = [(given["first_ms"], at_first), *((at_ms, _AFTER[type]) for at_ms, type in entries)]
        if changes[-1][1] != agent.status:  # not announced yet
            changes.append((agent.status_since_ms, agent.status))
        found: list[dict[str, Any]] = []
        reached_ms = given["first_ms"]
        for (from_ms, status), (until_ms, _) in itertools.pairwise([*changes, (now.wall_ms, "")]):
            from_ms = max(from_ms, reached_ms)  # the wall clock may have been set back meanwhile
            if not status or until_ms <= from_ms:
                continue
            reached_ms = until_ms
            if found and found[-1]["status"] == status:
                found[-1]["until"] = iso(until_ms)
            else:
                found.append({"status": status, "from": iso(from_ms), "until": iso(until_ms)})
        return found

    def purge(self) -> bool:
        """Remove a little of what is past its retention, in time that has passed; whether there may be more.

        After a step of the wall clock nothing is removed, except for space, for an hour after the last step.
        """
        now = self.now()
        self._measure_disk()
        if now.steady_ms - self._stepped_ms < _HOUR_MS:
            return self._purge_for_space() > 0
        removed = 0
        old = f"SELECT {{}} FROM {{}} WHERE {{}} < ? ORDER BY {{}} LIMIT {_PURGE_STEP}"
        threats = old.format("key", "threats", "received_ms", "received_ms")
        sightings = old.format("org_id, indicator, agent_id", "sightings", "at_ms", "at_ms")
        received_ms = self._cutoff_ms(now, self.config.threat_retention_ms)
        at_ms = now.steady_ms - self.config.correlation_window_ms - 1
        with self.store.read() as db:
            expired = (db.execute(threats, (received_ms,)).fetchone(),
                       db.execute(sightings, (at_ms,)).fetchone())
        if any(expired):
            with self.store.transaction(durable=False) as db:
                removed += self._remove_threats(db, threats, received_ms)
                removed += db.execute("DELETE FROM sightings WHERE (org_id, indicator, agent_id) IN "
                                      f"({sightings})", (at_ms,)).rowcount
        before_ms = self._cutoff_ms(now, self.config.journal_retention_ms)
        with self.store.read() as db:
            rows = db.execute("SELECT seq, at_ms FROM journal WHERE seq > 0 ORDER BY seq LIMIT ?",
                              (_PURGE_STEP,)).fetchall()
        entries = [*itertools.takewhile(lambda row: self._entry_steady_ms(now, *row) < before_ms, rows)]
        if entries:
            with self.store.transaction(durable=False) as db:
                removed += db.execute("DELETE FROM journal WHERE seq <= ?", (entries[-1]["seq"],)).rowcount
        removed += self._purge_for_space()
        return removed > 0

    def _remove_threats(self, db: sqlite3.Connection, keys: str, given: Any) -> int:
        """Remove the events whose keys a query finds, and take them out of the totals; how many."""
        gone = db.execute(f"DELETE FROM threats WHERE key IN ({keys}) RETURNING {_COUNTED}",
                          (given,)).fetchall()
        self._count_threats(db, gone, -1)
        return len(gone)

    def _measure_disk(self) -> None:
        """Find out how large the database may be, at the start and then once an hour. A disk that another
        program fills for some minutes is no reason to remove anything."""
        tick_ms = self.clock.now().tick_ms
        if tick_ms - self._measured_ms < _HOUR_MS:
            return
        self._measured_ms = tick_ms
        self.most_bytes = self.config.max_db_bytes
        with contextlib.suppress(OSError):  # the folder is gone: the store tells that
            file_bytes = self.store.space_bytes()[1]
            self.most_bytes = min(self.most_bytes, file_bytes - min(file_bytes // 8, _PURGE_SPACE_BYTES))

    def _purge_for_space(self) -> int:
        """Remove some of the oldest threat events and entries if the database is too large; how many."""
        excess_bytes = self.store.used_bytes() - self.most_bytes
        if excess_bytes <= 0:
            return 0
        removed, step = 0, max(_PURGE_STEP, min(excess_bytes // 4096, 10 * _PURGE_STEP))
        with self.store.transaction(durable=False) as db:
            rows = db.execute(
                f"SELECT * FROM (SELECT 'threats' AS source, t.key, {_RECEIVED} AS at_ms FROM threats t "
                "ORDER BY t.key LIMIT :step) UNION ALL "
                "SELECT * FROM (SELECT 'journal', seq, at_ms FROM journal ORDER BY seq LIMIT :step) "
                "ORDER BY at_ms LIMIT :step", {"step": step}).fetchall()
            db.execute("DELETE FROM sightings WHERE (org_id, indicator, agent_id) IN (SELECT org_id, "
                       "indicator, agent_id FROM sightings ORDER BY at_ms LIMIT ?)", (step,))
            keys = to_json([row["key"] for row in rows if row["source"] == "threats"])
            removed += self._remove_threats(db, "SELECT value FROM json_each(?)", keys)
            # Entries go by number, which is not the order of their instants: the journal must have no gaps.
            last = max((row["key"] for row in rows if row["source"] == "journal"), default=0)
            removed += db.execute("DELETE FROM journal WHERE seq <= ?", (last,)).rowcount
        if removed:
            self._note_full()
            self.purged_for_space += removed
        return removed

    def _note_full(self) -> None:
        if self.warning() is None:
            log.warning("%s (%d)", _FULL, self.most_bytes)
        self._full_ms = self.clock.now().tick_ms

    def prune(self) -> None:
        """Deregister agents that have been offline for long, if that is wanted; looked at once an hour.

        At most a tenth of the fleet a day, and none while more than half of it is silent: then the manager is
        cut off. None within an hour of a start or of time that was forgiven: agents are heard again first.
        Time in which the manager was stopped does not count. The timer calls it.
        """
        tick_ms = self.clock.now().tick_ms
        if not self.config.prune_offline_ms or tick_ms < self._prune_due_ms:
            return
        self._prune_due_ms = tick_ms + _HOUR_MS
        now = self.now()
        with self.store.read() as db:
            counts = self._counts(db, now)
            total = sum(counts.values())
            (pruned,) = db.execute(
                "SELECT coalesce(sum(json_extract(data, '$.count')), 0) FROM journal "
                "WHERE type = 'agents_pruned' AND at_ms > ?", (now.wall_ms - _DAY_MS,)).fetchone()
        allowed = min(max(1, total // 10) - pruned, 1000)
        while 2 * counts[Status.ONLINE] >= total and allowed > 0:
            pruned = self._prune_step(now, min(allowed, _BULK_STEP))
            allowed = allowed - pruned if pruned == _BULK_STEP else 0

    def _prune_step(self, now: Moment, most: int) -> int:
        """Deregister up to `most` of the agents that have been offline longest. Returns how many."""
        with self.store.transaction() as db:
            rows = db.execute(
                f"SELECT a.*, c.seen_ms FROM contacts c JOIN agents a ON a.key = c.agent WHERE c.{_SILENT} "
                "AND announced = 'offline' AND announced_steady_ms < ? ORDER BY announced_steady_ms LIMIT ?",
                (self._cutoff_ms(now, self.config.prune_offline_ms), most)).fetchall()
            for row in rows:
                self._remove(db, now, row, THE_MANAGER)
            if rows:
                self.store.journal(now.wall_ms, "agents_pruned", THE_MANAGER, None, None, {
                    "count": len(rows), "hostnames": [row["hostname"] for row in rows],
                    "offlineMs": self.config.prune_offline_ms})
        return len(rows)

    def warning(self) -> str | None:
        """What /health says beside its status, from memory: in the last hour the database was too large."""
        last_ms = self._full_ms
        return None if last_ms is None or self.clock.now().tick_ms - last_ms >= _HOUR_MS else _FULL

    # Journal and health

    @checked(JOURNAL)
    def journal(self, *, after: int = 0, limit: int = -1, type: str | Sequence[str] | None = None,
                agent_id: str | None = None, org_id: str | None = None, since: int | None = None,
                until: int | None = None, order: str = "asc") -> list[Entry]:
        """Entries with a `seq` above `after`, of one type or several, at or after `since` and before `until`
        (ms since 1970), in order or the latest first ("desc"); at most `limit`, if not negative."""
        types = [type] if isinstance(type, str) else list(type or ())
        given = {"after": after, "limit": limit, "agent_id": agent_id, "org_id": org_id, "since": since,
                 "until": until, **{f"type{number}": each for number, each in enumerate(types)}}
        where = ["seq > :after"]
        if types:
            where.append(f"type IN ({', '.join(f':type{number}' for number in range(len(types)))})")
        where += [condition for name, condition in _ENTRY_CONDITIONS.items() if given[name] is not None]
        with self.store.read() as db:
            rows = db.execute(f"SELECT * FROM journal WHERE {' AND '.join(where)} ORDER BY seq "
                              f"{'DESC' if order == 'desc' else ''} LIMIT :limit", given).fetchall()
        loads = self.store.loads
        return [Entry(row["seq"], row["at_ms"], row["type"], loads(row["actor"]), row["org_id"],
                      row["agent_id"], loads(row["data"])) for row in rows]

    def last_seq(self) -> int:
        """The sequence number of the latest entry, removed ones included."""
        with self.store.read() as db:
            return int(db.execute(_LAST_SEQ).fetchone()[0])

    def check_health(self) -> None:
        """For health(): learn if the database can be written, and count the agents. The timer calls it."""
        now, tick_ms = self.now(), self.clock.now().tick_ms  # now() stops while nothing can be written
        failed = self._problem is not None or self.store.failed
        if tick_ms - self._checked_ms < min(900, self.config.heartbeat_timeout_ms // 10) and not failed:
            return  # the timer comes more often while it purges
        self._checked_ms = tick_ms
        try:
            if failed or tick_ms - self._probed_ms >= _PROBE_MS:
                self.store.probe()
                self._probed_ms = tick_ms
            with self.store.transaction(durable=False) as db:  # in which nobody adds or removes an agent
                counts = self._counts(db, now)
                self._agent_counts = sum(counts.values()), counts[Status.ONLINE]
            self._problem = None
        except Unavailable as error:
            self._problem = str(error)

    def health(self) -> tuple[int, int]:
        """How many agents there are and are online, as check_health() found or as changed since; from memory.

        Raises Unavailable when the database could not be written then, or a write has failed since.
        """
        if problem := self._problem or self.store.problem:
            raise Unavailable(problem, retry_after_s=5)
        return self._agent_counts

    def census(self) -> Census:
        """How much there is of everything."""
        now = self.now()
        with self.store.read() as db:
            counted = db.execute(f"SELECT ({_ALL_THREATS}), (SELECT count(*) FROM policies)").fetchone()
            return Census(self._counts(db, now), *counted)

    def _counts(self, db: sqlite3.Connection, now: Moment, org_id: str | None = None,
                agent_id: str | None = None) -> dict[Status, int]:
        """How many agents have which status: of all, of an org, or one. Only the silent ones are read."""
        given = {**self.liveness.cutoffs(now.tick_ms), "org_id": org_id, "agent_id": agent_id}
        source, scope = "contacts c", ""
        if org_id or agent_id:
            source = "agents a CROSS JOIN contacts c ON c.agent = a.key"
            scope = " AND a.org_id = :org_id" * bool(org_id) + " AND a.id = :agent_id" * bool(agent_id)
        counts = {status: db.execute(
            f"SELECT count(*) FROM {source} WHERE {self._of_status(now, status)}{scope}", given).fetchone()[0]
            for status in (Status.STALE, Status.OFFLINE)}
        counted = "SELECT count(*) FROM agents WHERE id = :agent_id" if agent_id else _ALL_AGENTS
        if org_id:
            counted += " AND org_id = :org_id" if agent_id else " WHERE org_id = :org_id"
        (total,) = db.execute(counted, given).fetchone()
        return {Status.ONLINE: total - sum(counts.values()), **counts}


def _stored_bytes(event: Mapping[str, Any], details: str, indicators: Sequence[str | None]) -> int:
    """About what a threat event takes in the database, with its keys in tables and indexes."""
    source_ip, hash = indicators
    copies = ((event["type"], 3), (event.get("id"), 2), (source_ip, 5), (hash, 4))
    bytes_of = ((len(key.encode()), count) for key, count in copies if key)
    # SQLite gives the rest of a long key a page of its own.
    keys = sum(count * (size if size < _PAGE_BYTES // 5 else _PAGE_BYTES) for size, count in bytes_of)
    rule = event.get("sigma_rule_id") or event.get("rule_id") or ""
    return _ROW_BYTES + len(details.encode()) + len(rule.encode()) + keys


def _window(page: int | None, limit: int | None, unpaged: int = -1) -> tuple[bool, dict[str, int]]:
    """Whether a page is asked for, and the parameters of LIMIT :size OFFSET :skip."""
    paged = page is not None or limit is not None
    size = (limit or 50) if paged else unpaged
    return paged, {"size": size, "skip": ((page or 1) - 1) * size}


def _joined(tables: str) -> str:
    """FROM for SQL of tables that choose agents, read in the order of their letters (CROSS JOIN keeps it)."""
    first = _CHOOSE[tables[0]]
    others = (_CHOOSE[each] for each in tables[1:])
    return first[0] + "".join(f" CROSS JOIN {table} ON {key} = {first[1]}" for table, key in others)


def _edited_tags(row: sqlite3.Row, add: Sequence[str] | None, remove: Sequence[str] | None) -> list[str]:
    """An agent's tags with some added and others removed. Raises Invalid for more than 64."""
    without = set(remove or ())
    after = list(dict.fromkeys(tag for tag in [*json.loads(row["tags"]), *(add or ())] if tag not in without))
    if len(after) > 64:
        raise Invalid(f"addTags: must leave at most 64 tags, and would leave {len(after)} on {row['id']}")
    return after


def _scopes(org_id: str | None, agent_id: str | None) -> list[str]:
    """The scopes whose policies reach an agent, or an org's agents, from the widest to the narrowest."""
    return ["all"] + [f"org:{org_id}"] * bool(org_id) + [f"agent:{agent_id}"] * bool(agent_id)


########################################################################################################
# 6  HTTP ##############################################################################################
########################################################################################################

ADMIN, VIEWER, ENROLLER, AGENT = "admin", "viewer", "enroller", "agent"
ANYONE, NEWCOMER = "anyone", "newcomer"
_MOST_BYTES = 2**20
FAILED_LOGINS_PER_MINUTE = 20
_NEWCOMERS_PER_MINUTE = 120
_NOTHING: Table = {}
_JSON_TYPE = ("Content-Type", "application/json")
_COMMON_HEADERS = (
    ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"), ("Cache-Control", "no-store"))
_CORS_HEADERS = (
    ("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE"),
    ("Access-Control-Allow-Headers",
     "Authorization, Content-Type, If-None-Match, Last-Event-ID, X-Request-Id"),
    ("Access-Control-Expose-Headers",
     "ETag, Retry-After, X-Heartbeat-Interval, X-RateLimit-Limit, X-RateLimit-Remaining, X-Request-Id"),
    ("Access-Control-Max-Age", "600"))


class RequestState:
    """What the server and the API pass to each other about one request; see request_state()."""

    stream: EventStream | None = None  # from the API: the stream that takes the connection over
    caller: Caller | None = None  # from the API: whose credential it was; None if there was no right one
    requests_left: int | None = None  # that its client may send in this minute; None: not counted yet
    request_id = ""  # the one made for a request that brings none


def request_state(environ: dict[str, Any]) -> RequestState:
    """The RequestState of a request, kept in its WSGI environ."""
    found: RequestState | None = environ.get("manager.request_state")
    if found is None:
        found = environ["manager.request_state"] = RequestState()
    return found


class Reply(NamedTuple):
    """An answer. `headers` (named in bottle's capitals) are its own, `common` those that all answers have."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = (_JSON_TYPE,)
    common: tuple[tuple[str, str], ...] = _COMMON_HEADERS
    cut: bool = False  # the connection is to end after half of the body
    pause_s: float = 0.0  # between the halves of the body


class Call(NamedTuple):
    """What a route is given: all of it checked."""

    manager: Manager
    api: Api
    route: Endpoint
    caller: Caller
    path: Mapping[str, str]
    query: dict[str, Any]
    body: dict[str, Any]
    environ: dict[str, Any]


class Endpoint(NamedTuple):
    """One row of the API: what bottle routes, what OpenAPI and the README's table say.

    `serve` returns a Reply, or the data of a success as present() takes them for `answer`, a type of ANSWERS;
    a paged list comes with the number of all matches. The data go into the JSON envelope, with the fields of
    `beside` at its top level, unless `media` names another type. `also` describes another success, of status
    200. `headers` are those that it sends or, with `:` before the name, reads. `translate` changes the body
    of the agent shipped on npm to the form that `body` checks."""

    serve: Callable[[Call], Any]
    method: str
    path: str
    summary: str
    allow: frozenset[str]
    query: Table = _NOTHING
    body: Table | None = None
    answer: str = ""
    beside: str = ""
    status: int = 200
    also: tuple[str, str] | None = None
    headers: tuple[str, ...] = ()
    media: str = ""
    translate: Translate | None = None


ENDPOINTS: list[Endpoint] = []


def endpoint(method: str, path: str, summary: str, *, allow: Iterable[str] = (), public: bool = False,
             **rest: Any) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Add a route for admins, and if it is a GET for viewers; `allow` adds other roles, `public` adds all.
    `NEWCOMER` in `allow` means anyone while enrolment is open."""
    def add(serve: Callable[[Call], Any]) -> Callable[[Call], Any]:
        readers = (VIEWER,) if method == "GET" else ()
        everyone = (ENROLLER, AGENT, ANYONE) if public else ()
        allowed = frozenset((ADMIN, *allow, *readers, *everyone))
        ENDPOINTS.append(Endpoint(serve, method, path, summary, allowed, **rest))
        return serve
    return add


def forward(method: str, path: str, summary: str, use: Callable[..., Any], message: str = "",
            **rest: Any) -> None:
    """Add a route that calls a method of Manager with the values of the path, and for a GET those of the
    query, else those of the body and the caller. It answers what the method returns, or `message` with the
    values of the path."""
    def serve(call: Call) -> Any:
        given = call.query if method == "GET" else {**call.body, "caller": call.caller}
        found = getattr(call.manager, use.__name__)(*call.path.values(), **given)
        return {"message": message.format(**call.path)} if message else found
    serve.__name__ = use.__name__.removesuffix("_json")
    endpoint(method, path, summary, **rest)(serve)


def success(data: Any, status: int = 200, headers: Iterable[tuple[str, str]] = (), **beside: Any) -> Reply:
    """The envelope of a success; bytes are JSON already. `beside` are further fields at its top level."""
    raw = data if isinstance(data, bytes) else to_json(data).encode()
    end = f",{to_json(beside)[1:]}" if beside else "}"
    return Reply(status, b'{"ok":true,"data":' + raw + end.encode(), (_JSON_TYPE, *headers))


def failure(error: ManagerError, **beside: Any) -> Reply:
    """The envelope of a failure; `beside` are further fields at its top level."""
    headers = [_JSON_TYPE]
    if error.retry_after_s is not None:
        headers.append(("Retry-After", str(error.retry_after_s)))
    if error.status == 401:
        headers.append(("Www-Authenticate", "Bearer"))
    body = to_json({"ok": False, "error": str(error), **beside}).encode("utf-8", "replace")
    return Reply(error.status, body, tuple(headers))


class Throttle:
    """Counts something per address and minute; at most `_MOST` addresses are remembered, the latest."""

    _MOST = 10_000

    def __init__(self, what: str, per_minute: int) -> None:
        self.what = what
        self.per_minute = per_minute
        self._lock = threading.Lock()
        self._windows: dict[str, tuple[int, int]] = {}

    def count(self, address: str, tick_ms: int) -> int:
        """Count once more for `address`. Returns how often it still may in this minute. Raises Throttled."""
        key = network_of(address)
        with self._lock:
            began, count = self._windows.get(key, (tick_ms, 0))
            left_ms = began + 60_000 - tick_ms
            if left_ms <= 0:
                began, count = tick_ms, 0
            elif count >= self.per_minute:
                raise Throttled(f"more than {self.per_minute} {self.what} in a minute from {address}",
                                retry_after_s=math.ceil(left_ms / 1000))
            self._windows.pop(key, None)
            self._windows[key] = began, count + 1
            if len(self._windows) > self._MOST:
                del self._windows[next(iter(self._windows))]
            return self.per_minute - count - 1


def network_of(address: str) -> str:
    """The address, or its network of 2^64 for IPv6: whoever has one address there has all of them."""
    host = address.partition("%")[0]
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_network((host, 64), strict=False)) if ":" in host else host
    return host


class Refusals:
    """Counts refused credentials, TLS handshakes and connections; logs one in a minute of each address, and
    60 of all."""

    REASONS = ("no_token", "wrong_token", "forbidden", "throttled", "handshake", "connections")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts = Counter[str]()
        self._logged, self._logged_of_all = Throttle("", 1), Throttle("", 60)
        self.of_agent, self.journaled = Throttle("", 1), Throttle("", FAILED_LOGINS_PER_MINUTE)

    def note(self, reason: str, address: str, tick_ms: int, what: str) -> None:
        """Count a refusal, one of REASONS, and log it unless one of this address was within the minute."""
        with self._lock:
            self.counts[reason] += 1
        with contextlib.suppress(Throttled):
            self._logged.count(address, tick_ms)
            self._logged_of_all.count("", tick_ms)
            log.info("refused %s: %s, %s; more of this minute are counted only", address, reason, what)


def _by(label: str, counts: Mapping[Any, float]) -> dict[str, float]:
    """Samples of a Prometheus family, one for each value of a label."""
    return {f'{{{label}="{value}"}}': count for value, count in counts.items()}


class Latencies:
    """Requests by route and status class, and how long they took, as a Prometheus histogram."""

    BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counter[tuple[str, str, int]]()
        self._buckets = defaultdict[str, list[int]](lambda: [0] * (len(self.BOUNDS_S) + 1))
        self._sums_s = defaultdict[str, float](float)

    def observe(self, method: str, route: str, status: int, duration_s: float, count: int = 1) -> None:
        """Count requests that were answered together."""
        with self._lock:
            self._counts[method, route, status // 100] += count
            self._buckets[route][bisect.bisect_left(self.BOUNDS_S, duration_s)] += count
            self._sums_s[route] += count * duration_s

    def families(self) -> Iterator[tuple[str, str, str, dict[str, float]]]:
        """The counts as rows for `Api.metrics()`."""
        with self._lock:
            counts, sums_s = sorted(self._counts.items()), dict(self._sums_s)
            buckets = sorted((route, list(row)) for route, row in self._buckets.items())
        yield "http_requests_total", "counter", "Requests answered.", {
            f'{{method="{method}",route="{route}",status="{hundreds}xx"}}': count
            for (method, route, hundreds), count in counts}
        samples: dict[str, float] = {}
        upper = [f"{bound:g}" for bound in self.BOUNDS_S] + ["+Inf"]
        for route, row in buckets:
            for le, count in zip(upper, itertools.accumulate(row), strict=True):
                samples[f'_bucket{{route="{route}",le="{le}"}}'] = count
            samples[f'_sum{{route="{route}"}}'] = sums_s[route]
            samples[f'_count{{route="{route}"}}'] = sum(row)
        yield ("http_request_duration_seconds", "histogram", "Time from the parsed request to its answer.",
               samples)


def _clean_route(value: Any, path: str, problems: list[str]) -> Any:
    return one_of(*sorted(f"{each.method} {each.path}" for each in ENDPOINTS)).clean(value, path, problems)


ROUTE = Check(_clean_route, {"type": "string"})  # ENDPOINTS is complete only later
REAL_S = number(0, 86_400)
Drop = typing.Literal["before", "after", "middle"]
_FAULT: Table = {
    "route": may(ROUTE), "agent_id": may(_KEY), "status": may(number(200, 599, whole=True)),
    "delay_s": need(REAL_S), "body_s": need(REAL_S), "drop": may(one_of(*typing.get_args(Drop))),
    "times": need(number(1, _EXACT, whole=True)), "retry_after_s": may(number(0, _EXACT, whole=True)),
    "body": may(_check(bytes, "bytes", bytes, {}))}


@dataclass
class Fault:
    """What to do to the next `times` requests of a route (`POST /api/agents/register`; None is any) that name
    an agent (None is any): wait `delay_s` (real seconds), then answer `status`, with `body` (else an error's)
    and `Retry-After`, or drop the connection `before` or `after` the commit, or in the `middle` of the
    answer's body. `body_s` (real seconds) pass between the halves of the body. A request that is answered
    `status` is not executed. `hits` counts the requests."""

    route: str | None = None
    agent_id: str | None = None
    status: int | None = None
    delay_s: float = 0.0
    drop: Drop | None = None
    times: int = 1
    retry_after_s: int | None = None
    body: bytes | None = None
    body_s: float = 0.0
    hits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        clean_arguments(_FAULT, {name: getattr(self, name) for name in _FAULT})
        if self.route and self.agent_id and not re.search("/agents?/:id", self.route):
            raise Invalid(f"agent_id: must not be given with {self.route}, whose path names no agent")
        if self.status is None:
            if self.retry_after_s is not None or self.body is not None:
                raise Invalid("retry_after_s, body: must not be given without a status")
            if self.drop is None and self.delay_s == self.body_s == 0:
                raise Invalid("status, drop, delay_s, body_s: must not all be absent or 0")
        elif self.status < 400 and self.body is None:
            raise Invalid("status: must be from 400 to 599, or with a body from 200 to 599")
        elif self.drop in ("before", "after"):
            raise Invalid(f"status, drop: must not be given together if drop is {self.drop!r}")

    def apply(self, sleep: Callable[[float], object]) -> Reply | None:
        """Do what comes before the request is served. Returns the answer, if there is one. Raises Dropped."""
        sleep(self.delay_s)
        if self.drop == "before":
            raise Dropped
        if self.status is None:
            return None
        reply = failure(ManagerError("a fault that the test asked for", status=self.status,
                                     retry_after_s=self.retry_after_s))
        return reply if self.body is None else reply._replace(body=self.body)


class Faults(list[Fault]):
    """Faults on demand, for testing agents: `server.faults.add(route="GET /api/agents", status=503)`.

    The list has the faults that requests have not used up. `add()` takes the fields of Fault. No request over
    HTTP can add one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.over = threading.Event()  # set when the server stops: no request is delayed any more

    def add(self, *, route: str | None = None, agent_id: str | None = None, status: int | None = None,
            delay_s: float = 0.0, drop: Drop | None = None, times: int = 1,
            retry_after_s: int | None = None, body: bytes | None = None, body_s: float = 0.0) -> Fault:
        """Apply a fault to the next requests that match, after those added before it. Raises Invalid, a
        ValueError."""
        added = Fault(route, agent_id, status, delay_s, drop, times, retry_after_s, body, body_s)
        self.append(added)
        return added

    def take(self, route: Endpoint, agent_id: str | None) -> Fault | None:
        """The fault that a request is to suffer, counted down."""
        name = f"{route.method} {route.path}"
        with self._lock:
            for fault in self:
                if fault.route in (None, name) and fault.agent_id in (None, agent_id):
                    fault.times -= 1
                    fault.hits += 1
                    if not fault.times:
                        self.remove(fault)
                    return fault
        return None


class Headers(Mapping[str, str]):
    """Headers by their usual names, such as `Content-Type`; any case of letters finds them."""

    def __init__(self, sent: Mapping[str, str]) -> None:
        self._sent = {self._usual(name): value for name, value in sent.items()}

    @staticmethod
    def _usual(name: str) -> str:
        return "Last-Event-ID" if name.lower() == "last-event-id" else name.title()

    def __getitem__(self, name: str) -> str:
        return self._sent[self._usual(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sent)

    def __len__(self) -> int:
        return len(self._sent)

    def __repr__(self) -> str:
        return repr(self._sent)


class Exchange(NamedTuple):
    """A request to a Server under test, and its answer.

    `route` is like `POST /api/agents/:id/heartbeat`, or "" where no route fits; `path` has the query.
    `headers` are found in any case of letters; credentials are left out. `body` and `answer` are parsed
    JSON, or bytes if they are not JSON, or None if they are empty, were not received or have more than
    64 KiB. In `answer` a token is "(not kept)". `status` is None if the request was dropped. `caller` has the
    `role` of the credential, and for an agent's `agent.id`; None if there was no right one or none was asked
    for. `at_ms` (since 1970, by the server's clock) is when it was answered. `seq` counts requests from 1.
    """

    method: str
    path: str
    route: str
    headers: Mapping[str, str]
    body: Any
    status: int | None
    answer: Any
    caller: Caller | None = None
    at_ms: int = 0
    seq: int = 0

    def is_of(self, agent_id: str) -> bool:
        """Whether the request has the agent's token, or its id in the path."""
        agent = self.caller and self.caller.agent
        return (agent and agent.id) == agent_id or agent_id in self.path.partition("?")[0].split("/")


_KEPT_BYTES = 2**16


def _parsed_json(raw: bytes) -> Any:
    if not raw or len(raw) > _KEPT_BYTES:
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw


def _without_token(answer: Any) -> Any:
    for each in (answer, answer.get("data")) if isinstance(answer, dict) else ():
        if isinstance(each, dict) and "token" in each:
            each["token"] = "(not kept)"
    return answer


class Api:
    """What stands between a request and the Manager, for bottle's routes and for any other server of them.

    `answer()` is the only way to an endpoint: it decides who calls, cleans what they sent and words
    what comes back.
    """

    def __init__(self, manager: Manager, auth_tokens: Sequence[str]) -> None:
        self.manager = manager
        config = manager.config
        interval_s = round(config.heartbeat_timeout_ms / 3000, 3)
        self.beat_headers = (("X-Heartbeat-Interval", f"{interval_s:.12g}"),)
        roles = [*((token, ADMIN) for token in auth_tokens), (config.enroll_token, ENROLLER),
                 (config.viewer_token, VIEWER)]
        self._roles = [(digest(token), role) for token, role in roles if token]
        self._failed_logins = Throttle("wrong tokens", FAILED_LOGINS_PER_MINUTE)
        self._requests = Throttle("requests", config.rate_limit) if config.rate_limit else None
        self._newcomers = Throttle("registrations without a token", _NEWCOMERS_PER_MINUTE)
        self.latencies, self.refusals = Latencies(), Refusals()
        self.streams: Streams | None = None  # set by a server that can serve event streams
        self.notifier: Notifier | None = None  # set by a server that sends notifications
        self.certificate_end_s: Callable[[], float] = lambda: 0.0  # set by a server with a certificate
        self.proved_s = 0.0  # when the manager made its last backup by itself, in s since 1970
        self.backups_failed = 0  # since then
        self.faults = Faults()
        self.on_exchange: Callable[[Exchange], None] | None = None  # set by a Server under test

    def keep_exchange(self, route: Endpoint | None, environ: dict[str, Any], reply: Reply | None) -> None:
        """Give a request and its reply to `on_exchange`, if the server keeps those."""
        if self.on_exchange is None:
            return
        sent = environ.get("wsgi.input") or io.BytesIO()
        sent.seek(0)
        query = environ.get("QUERY_STRING")
        secret = re.compile("AUTHORIZATION|COOKIE").search
        shown = [name for name, value in environ.items()
                 if re.match("HTTP_|CONTENT_", name) and value and not secret(name)]
        headers = Headers({name.removeprefix("HTTP_").replace("_", "-"): environ[name] for name in shown})
        name = f"{route.method} {route.path}" if route else ""
        self.on_exchange(Exchange(
            environ["REQUEST_METHOD"], environ["PATH_INFO"] + (f"?{query}" if query else ""), name, headers,
            _parsed_json(sent.read(_KEPT_BYTES + 1)), reply and reply.status,
            _without_token(_parsed_json(reply.body if reply else b"")),
            request_state(environ).caller, self.manager.clock.now().wall_ms))

    def answer(self, route: Endpoint, environ: dict[str, Any], path: Mapping[str, str], *,
               in_batch: bool = False) -> Reply:
        """Serve a request to `route`, whatever happens. Raises Dropped only, for a fault.

        In a batch no fault is applied, and the caller counts and notes the answers after the commit.
        """
        began_s = time.perf_counter()
        try:
            caller = self._admit(route, environ, path)
            fault = None if in_batch or not self.faults else self.faults.take(route, path.get("id"))
            asked = fault and fault.apply(self.faults.over.wait)
            reply = asked or self._serve(route, environ, path, caller)
            if fault and fault.drop == "after":
                raise Dropped
            if fault:
                reply = reply._replace(cut=fault.drop == "middle", pause_s=fault.body_s)
        except Dropped:
            self.keep_exchange(route, environ, None)
            raise
        except ManagerError as error:
            reply = failure(error)
        except Exception:
            log.exception("request %s failed", request_id(environ))
            reply = failure(ManagerError("internal error; the log has its details under this request's id"))
        if not in_batch:
            self.latencies.observe(route.method, route.path, reply.status, time.perf_counter() - began_s)
            self.keep_exchange(route, environ, reply)
        return self.finish(reply, environ)

    def _serve(self, route: Endpoint, environ: dict[str, Any], path: Mapping[str, str],
               caller: Caller) -> Reply:
        body: dict[str, Any] = {}
        query: dict[str, Any] = {}
        paging: dict[str, Any] = {}
        if route.body is not None:
            translate = route.translate if self.manager.config.open_enrollment else None
            body = clean_body(route.body, self._read(environ), translate, strict=AGENT not in route.allow)
        given = environ.get("QUERY_STRING", "")
        if given or route.query:
            query = clean_query(route.query, given, strict=caller.role in (ADMIN, VIEWER))
        data = route.serve(Call(self.manager, self, route, caller, path, query, body, environ))
        if isinstance(data, Reply):
            return data
        if route.media:
            return Reply(200, data, (("Content-Type", route.media),))
        if isinstance(data, tuple):
            data, total = data
            if total is not None:  # a page was asked for
                limit = query["limit"] or 50
                paging["pagination"] = {"total": total, "page": query["page"] or 1, "limit": limit,
                                        "pages": math.ceil(total / limit)}
        return success(present(route.answer, data), route.status, **paging)

    def metrics(self) -> str:
        """The Prometheus text exposition: https://prometheus.io/docs/instrumenting/exposition_formats/."""
        manager, notifier = self.manager, self.notifier
        census = manager.census()
        reported = {severity: manager.events_reported[severity] for severity in SEVERITIES}
        refused = {reason: self.refusals.counts[reason] for reason in Refusals.REASONS}
        families: list[tuple[str, str, str, float | Mapping[str, float]]] = [
            ("agents", "gauge", "Registered agents by status.", _by("status", census.agents)),
            ("heartbeats_total", "counter", "Heartbeats accepted since the start.", manager.heartbeats),
            ("threat_events_total", "counter", "Threat events stored since the start, by severity.",
             _by("severity", reported)),
            ("threat_events_stored", "gauge", "Threat events kept.", census.threats),
            ("policies", "gauge", "Policies issued, superseded ones included.", census.policies),
            ("journal_sequence", "gauge", "Sequence number of the latest journal entry.", manager.last_seq()),
            ("database_size_bytes", "gauge", "Size of the database and its write-ahead log.",
             manager.store.size_bytes()),
            ("purged_for_space_total", "counter",
             "Threat events and entries removed because of MANAGER_MAX_DB_BYTES.", manager.purged_for_space),
            ("write_ahead_log_bytes", "gauge", "Size of the write-ahead log.", manager.store.log_bytes()),
            ("disk_free_bytes", "gauge", "Free space on the disk of the data folder.",
             free_bytes(manager.store.folder)),
            ("certificate_end_timestamp_seconds", "gauge",
             "When the certificate in use ends, 0 if there is none or openssl is missing.",
             self.certificate_end_s()),
            ("event_streams_open", "gauge", "Event streams open.", self.streams.count if self.streams else 0),
            ("notifications_delivered_total", "counter",
             "Notifications that a receiver took, since the start.", notifier.delivered if notifier else 0),
            ("notification_receivers_failing", "gauge",
             "Receivers that did not take the last notification.", notifier.failing() if notifier else 0),
            ("backup_proved_timestamp_seconds", "gauge",
             "When the manager itself last made a backup, 0 if never.", self.proved_s),
            ("backups_failed", "gauge", "Backups that have failed since the last one.", self.backups_failed),
            ("refusals_total", "counter",
             "Requests, TLS handshakes and connections refused, by reason.", _by("reason", refused)),
            *self.latencies.families()]
        lines = []
        for name, kind, help_text, samples in families:
            lines += [f"# HELP panguard_{name} {help_text}", f"# TYPE panguard_{name} {kind}"]
            lines += [f"panguard_{name}{label} {value:.17g}" for label, value in (
                samples if isinstance(samples, Mapping) else {"": samples}).items()]
        return "\n".join(lines) + "\n"

    def finish(self, reply: Reply, environ: dict[str, Any]) -> Reply:
        """Add the headers that every answer has, having counted its request if that is not done."""
        config = self.manager.config
        try:
            self._limit(environ)
        except Throttled as error:
            reply = failure(error)
        headers = (*reply.headers, ("X-Request-Id", request_id(environ)), *reply.common)
        if (origin := environ.get("HTTP_ORIGIN")) and origin in config.cors_allowed_origins:
            headers += (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"), *_CORS_HEADERS)
        if config.tls_cert and self._is_https(environ):  # no user could accept a self-signed one
            headers += (("Strict-Transport-Security", "max-age=31536000"),)
        if self._requests:
            headers += (("X-Ratelimit-Limit", str(self._requests.per_minute)),
                        ("X-Ratelimit-Remaining", str(request_state(environ).requests_left)))
        return reply._replace(headers=headers)

    def refuse(self, status: int, text: str, environ: dict[str, Any], *headers: tuple[str, str]) -> Reply:
        """Word a refusal of what has no route, or never became a request."""
        refusal = failure(ManagerError(text, status=status))
        reply = self.finish(refusal._replace(headers=(*headers, *refusal.headers)), environ)
        # One name for all of them: made-up paths must not become labels.
        self.latencies.observe("-", "none", reply.status, 0.0)
        self.keep_exchange(None, environ, reply)
        return reply

    def body_owner(self, path: str, authorization: str | None, address: str) -> str | None:
        """Under which name the bytes of a request's body are counted: "" for an admin, else the credential,
        or the address of a newcomer. None if the body is not to be received: the credential is not known."""
        if authorization is None:
            newcomer = self.manager.config.open_enrollment and path == "/api/agents/register"
            return network_of(address) if newcomer else None
        token_digest = _bearer_digest(authorization)
        if token_digest is None:
            return None
        role = self._role(token_digest)
        try:
            known = (role or self.manager.knows_token(token_digest)
                     or self.manager.enroll_token_id(token_digest))
        except Unavailable:
            known = True  # answered with 503 in the end
        return "" if role == ADMIN else authorization if known else None

    def _role(self, token_digest: bytes) -> str | None:
        """The role of a token that an operator has set, by its digest; None if there is no such token."""
        return next((role for known, role in self._roles if hmac.compare_digest(known, token_digest)), None)

    def is_operator(self, environ: Mapping[str, Any]) -> bool:
        """Whether a request has an admin's or the viewer's token; does not read the database."""
        token_digest = _bearer_digest(environ.get("HTTP_AUTHORIZATION", ""))
        return token_digest is not None and self._role(token_digest) in (ADMIN, VIEWER)

    def _admit(self, route: Endpoint, environ: dict[str, Any], path: Mapping[str, str]) -> Caller:
        """Who calls, if they may. Where anyone may, a credential is not looked at."""
        address = self.client_address(environ)
        self._limit(environ)
        config = self.manager.config
        newcomer = NEWCOMER in route.allow and config.open_enrollment and "HTTP_AUTHORIZATION" not in environ
        if newcomer:
            # Any web page may have a browser send a form here, but JSON only if its origin is allowed.
            if environ.get("HTTP_ORIGIN", "") not in ("", *config.cors_allowed_origins):
                raise Forbidden("Origin: is not among CORS_ALLOWED_ORIGINS")
            if "json" not in environ.get("CONTENT_TYPE", "").lower():
                raise ManagerError("Content-Type: must be application/json", status=415)
            self._newcomers.count(address, self.manager.clock.now().tick_ms)
        if newcomer or ANYONE in route.allow:
            return Caller(ANYONE, address)
        try:
            return self._authenticate(route, environ, path, address)
        except (Unauthorized, Forbidden, Throttled) as error:
            self._note_refusal(route, environ, path, address, error)
            raise

    def _note_refusal(self, route: Endpoint, environ: Mapping[str, Any], path: Mapping[str, str],
                      address: str, error: ManagerError) -> None:
        tick_ms = self.manager.clock.now().tick_ms
        reason = {403: "forbidden", 429: "throttled"}.get(
            error.status, "wrong_token" if "HTTP_AUTHORIZATION" in environ else "no_token")
        self.refusals.note(reason, address, tick_ms, f"{route.method} {route.path}")
        if "id" in path and AGENT in route.allow:
            with contextlib.suppress(Throttled, Unavailable):  # few entries without a credential
                self.refusals.journaled.count(address, tick_ms)
                self.refusals.of_agent.count(path["id"], tick_ms)
                self.manager.note_refusal(path["id"], reason, caller=Caller(ANYONE, address))

    def _authenticate(self, route: Endpoint, environ: dict[str, Any], path: Mapping[str, str],
                      address: str) -> Caller:
        authorization = environ.get("HTTP_AUTHORIZATION", "")
        if not authorization.partition(" ")[2].strip():
            raise Unauthorized("a token is required: Authorization: Bearer …")
        token_digest = _bearer_digest(authorization)
        caller = self._identify(token_digest, address) if token_digest else None
        if caller is None:
            self._failed_logins.count(address, self.manager.clock.now().tick_ms)
            raise Unauthorized("the token is wrong or has expired, or its agent was deregistered")
        request_state(environ).caller = caller
        if caller.role not in route.allow:
            raise Forbidden(f"the {caller.role}'s token may not do this")
        if caller.agent and path.get("id", caller.agent.id) != caller.agent.id:
            raise Forbidden("an agent's token reaches that agent only")
        return caller

    def _identify(self, token_digest: bytes, address: str) -> Caller | None:
        if role := self._role(token_digest):
            return Caller(role, address, credential=token_digest.hex()[:8] if role == ADMIN else None)
        if agent := self.manager.holder(token_digest):
            return Caller(AGENT, address, agent)
        enroll_token = self.manager.enroll_token_id(token_digest)
        return Caller(ENROLLER, address, credential=enroll_token) if enroll_token else None

    def _limit(self, environ: dict[str, Any]) -> None:
        """Count a request for its client, unless it is counted already. Raises Throttled."""
        if self._requests and (state := request_state(environ)).requests_left is None:
            state.requests_left = 0
            tick_ms = self.manager.clock.now().tick_ms
            state.requests_left = self._requests.count(self.client_address(environ), tick_ms)

    def client_address(self, environ: Mapping[str, Any]) -> str:
        """The address of the client, taken from X-Forwarded-For as far back as trusted proxies wrote it."""
        address: str = environ.get("REMOTE_ADDR") or "127.0.0.1"
        if self.manager.config.trusted_proxy:
            for hop in reversed(environ.get("HTTP_X_FORWARDED_FOR", "").split(",")):
                known = _as_address(hop)
                if not self.is_proxy(address) or not known or "%" in hop:  # "%": valid on one machine only
                    break
                address = known
        return address

    def is_proxy(self, address: str) -> bool:
        """Whether `address` is one of the trusted proxies."""
        return bool(_as_address(address)) and any(
            ipaddress.ip_address(address) in network for network in self.manager.config.trusted_proxy)

    def _is_https(self, environ: Mapping[str, Any]) -> bool:
        return environ.get("wsgi.url_scheme") == "https" or (
            environ.get("HTTP_X_FORWARDED_PROTO") == "https"
            and self.is_proxy(environ.get("REMOTE_ADDR", "127.0.0.1")))

    @staticmethod
    def _read(environ: Mapping[str, Any]) -> bytes:
        try:
            length = int(environ.get("CONTENT_LENGTH") or 0)
        except ValueError:
            raise Invalid("Content-Length: must be a whole number") from None
        if length > _MOST_BYTES:
            raise ManagerError(f"body: must be at most {_MOST_BYTES} bytes", status=413)
        raw: bytes = environ["wsgi.input"].read(length) if length > 0 else b""
        kind = environ.get("CONTENT_TYPE")
        if raw and kind and kind != "application/json" and not _JSON_KIND(kind):
            raise ManagerError("Content-Type: must be application/json", status=415)
        return raw


_JSON_KIND = re.compile(r"\s*(application/([a-z0-9.-]+\+)?json\s*)?(;.*)?", re.IGNORECASE).fullmatch
_REQUEST_ID = re.compile(r"[0-9A-Za-z._:-]{1,128}").fullmatch
# An escaped slash, or an escape of a character that RFC 3986 (2.3) calls unreserved.
_NEEDLESS_ESCAPE = re.compile(r"[^?]*%(?:2[DEF]|3[0-9]|[46][1-9A-F]|[57][0-9A]|5F|7E)", re.IGNORECASE).match


def _as_address(text: str) -> str:
    """An IP address in canonical form, or nothing if it is none."""
    address = _as_ip(text.strip())
    return str(getattr(address, "ipv4_mapped", None) or address or "")


def _bearer_digest(authorization: str) -> bytes | None:
    """The digest of the token in an Authorization header; None if its scheme is not Bearer."""
    scheme, _, token = authorization.partition(" ")
    return digest(token.strip()) if scheme.lower() == "bearer" else None


def request_id(environ: dict[str, Any]) -> str:
    """The caller's X-Request-Id, if it is a sane one, else one made for this request."""
    given: str = environ.get("HTTP_X_REQUEST_ID", "")
    if given and _REQUEST_ID(given):
        return given
    request = request_state(environ)
    if not request.request_id:  # a UUID of version 4 (RFC 9562), made in a third of uuid's time
        made = f"{random.getrandbits(128):032x}"
        request.request_id = f"{made[:8]}-{made[8:12]}-4{made[13:16]}-a{made[17:20]}-{made[20:]}"
    return request.request_id


def _halves_of(reply: Reply, wait: Callable[[float], object]) -> Iterator[bytes]:
    half = len(reply.body) // 2
    yield reply.body[:half]
    wait(reply.pause_s)
    if reply.cut:
        raise Dropped
    yield reply.body[half:]


def _as_response(reply: Reply, wait: Callable[[float], object]) -> bottle.HTTPResponse:
    if not reply.cut and not reply.pause_s:
        return bottle.HTTPResponse(reply.body, reply.status, headers=reply.headers)
    headers = [*reply.headers, ("Content-Length", str(len(reply.body)))]
    return bottle.HTTPResponse(_halves_of(reply, wait), reply.status, headers=headers)


def create_app(manager: Manager, auth_tokens: Sequence[str] = ()) -> bottle.Bottle:
    """The HTTP API of a manager as a WSGI application.

    `auth_tokens` are the admin's; without them `config.auth_token` is, and with neither nobody is admin.
    """
    api = Api(manager, auth_tokens or manager.config.auth_token)
    app = bottle.Bottle()
    app.config["catchall"] = False  # answer() has caught what is ours to word; the rest is the server's
    app.api = api
    as_response = functools.partial(_as_response, wait=api.faults.over.wait)

    def serve(**path: str) -> bottle.HTTPResponse:
        return as_response(api.answer(bottle.request.route.config["endpoint"], bottle.request.environ, path))

    @app.hook("before_request")  # type: ignore[untyped-decorator]
    def preflight() -> None:
        environ = bottle.request.environ
        path = environ["bottle.raw_path"]
        # Rules of a proxy miss paths with double slashes, needless escapes, or escapes that are not UTF-8.
        try:
            path.encode("latin-1").decode()
        except ValueError:
            raise bottle.HTTPError(404) from None
        if "//" in path or _NEEDLESS_ESCAPE(environ.get("REQUEST_URI", "")):
            raise bottle.HTTPError(404)
        if bottle.request.method == "OPTIONS":
            raise as_response(api.finish(Reply(204, b"", ()), environ))

    def refuse(error: bottle.HTTPError) -> str:
        texts = {404: "there is nothing at this path", 405: "this path does not take that method"}
        text = texts.get(error.status_code, "the request is malformed")
        allow = re.sub(r"\bGET\b", "GET,HEAD", error.headers.get("Allow", ""))
        headers = [("Allow", allow)] if allow else []
        reply = api.refuse(error.status_code, text, bottle.request.environ, *headers)
        as_response(reply).apply(bottle.response)
        return reply.body.decode()

    app.default_error_handler = refuse
    for each in ENDPOINTS:
        app.route(re.sub(r":(\w+)", r"<\1>", each.path), each.method, serve, endpoint=each)
    return app


def entry_shape(entry: Entry) -> dict[str, Any]:
    """A journal entry as the API shows it: the fields of its type stand beside those that every entry has.

    `data` of files written by 1.1.0 repeats `agentId` in threats_reported; the common field wins.
    """
    common = shape("Entry", entry)
    return {**common, **entry.data, **common}


@endpoint("POST", "/api/agents/register", "Register an agent", allow=(ENROLLER, AGENT, NEWCOMER),
          body=REGISTER, status=201, answer="Registered", beside="*agentId *token",
          also=("Success, of an agent known before", "Registered"))
def _register(call: Call) -> Reply:
    made = call.manager.register(**call.body, caller=call.caller)
    # The shipped agent looks for its identity beside `data`.
    beside: dict[str, Any] = {}
    if call.caller.role == ANYONE:
        beside = {"agentId": made.agent.id, "token": made.token}
    return success(shape("Registered", made.agent, token=made.token), 201 if made.created else 200, **beside)


forward("POST", "/api/enroll-tokens", "Issue a token that registers agents, into an org and with tags",
        Manager.issue_enroll_token, body=ENROLL_TOKEN, status=201, answer="EnrollToken")
forward("GET", "/api/enroll-tokens", "List the enrolment tokens, without the tokens themselves",
        Manager.enroll_tokens, answer="[EnrollToken]")
forward("DELETE", "/api/enroll-tokens/:id", "Revoke an enrolment token; the agents it registered stay",
        Manager.revoke_enroll_token, "Enrolment token {id} revoked successfully", answer="Message")


@endpoint("POST", "/api/agents/:id/heartbeat", "Say that an agent is alive", allow=(AGENT,), body=HEARTBEAT,
          translate=shipped_heartbeat, answer="Beat", headers=("X-Heartbeat-Interval",))
def _heartbeat(call: Call) -> Reply:
    beat = call.manager.heartbeat(call.path["id"], **call.body, caller=call.caller)
    return success({"id": beat.id, "status": beat.status, "lastHeartbeat": iso(beat.at_ms),
                    "pendingPolicies": beat.pending_policies}, headers=call.api.beat_headers)


forward("DELETE", "/api/agents/:id", "Deregister an agent; its threat events stay", Manager.deregister,
        "Agent {id} deregistered successfully", allow=(AGENT,), answer="Message")


@endpoint("GET", "/api/agents", "List agents in registration order, or sorted", query=AGENT_LIST,
          answer="[Agent|AgentItem]")
def _agents(call: Call) -> tuple[Any, int | None]:
    filters = {name: value for name, value in call.query.items() if name != "detail"}
    if not call.query["detail"]:
        return call.manager.agents_json(**filters)
    agents, total = call.manager.agents(**filters)
    return present("[Agent]", agents), total


forward("POST", "/api/agents/bulk", "Change the tags of many agents, or deregister them", Manager.bulk,
        body=BULK, answer="Bulk")
forward("GET", "/api/agents/:id", "Show one agent in detail", Manager.agent, allow=(AGENT,), answer="Agent")
forward("PATCH", "/api/agents/:id", "Replace, add or remove an agent's tags", Manager.retag, body=RETAG,
        answer="Agent")


@endpoint("POST", "/api/agents/:id/events", "Report threat events, all or nothing", allow=(AGENT,),
          body=EVENTS, status=201, translate=shipped_event, answer="Received")
def _report(call: Call) -> Mapping[str, Any]:
    ids = call.manager.report_events(call.path["id"], call.body["events"], caller=call.caller)
    return {"received": len(ids), "eventIds": ids}


forward("GET", "/api/threats", "List threat events, newest first", Manager.threats_json, query=THREAT_FILTER,
        answer="[Threat]")


@endpoint("PATCH", "/api/threats/:id", "Set the state or the note of a threat event", body=TRIAGE,
          answer="Threat")
def _triage(call: Call) -> bytes:
    problems: list[str] = []
    key = EVENT_ID.clean(call.path["id"], "id", problems)
    if problems:
        raise NotFound("; ".join(problems))
    return call.manager.triage(key, **call.body, caller=call.caller)


forward("GET", "/api/threats/summary", "Sum up the threat events of a period", Manager.threat_summary,
        query=SUMMARY, answer="ThreatSummary")


@endpoint("POST", "/api/policy",
          "Issue a policy for all, for an org, or for one agent; dryRun tells its effect",
          body=POLICY, status=201, answer="Policy",
          also=("What the policy would change (dryRun)", "PolicyPreview"))
def _create_policy(call: Call) -> Policy | Reply:
    if not call.body.pop("dry_run"):
        return call.manager.create_policy(**call.body, caller=call.caller)
    return success(call.manager.preview_policy(
        call.body["rules"], org_id=call.body["org_id"], agent_id=call.body["agent_id"]))


forward("GET", "/api/policy", "List every policy ever issued, newest first", Manager.policies, query=PAGE,
        answer="[Policy]")
forward("GET", "/api/policy/active", "Show the policy in force for all, or of an org", Manager.active_policy,
        query=OF_ORG, answer="Policy?")


@endpoint("GET", "/api/policy/agent/:id",
          "Fetch what an agent must obey; an agent acknowledges it unless ack=false", allow=(AGENT,),
          query={"ack": may(SWITCH)}, answer="AgentPolicy", headers=("ETag", ":If-None-Match"))
def _agent_policy(call: Call) -> Reply:
    asked = call.query["ack"]
    ack = {AGENT: asked is not False, ADMIN: asked is True}.get(call.caller.role, False)
    policy = call.manager.agent_policy(call.path["id"], ack=ack and call.environ["REQUEST_METHOD"] != "HEAD")
    shown = {"agentId": policy.agent_id, "policyVersion": version_text(policy.effective.version),
             "rules": policy.effective.rules}
    tag = f'"{digest(to_json(shown)).hex()[:16]}"'
    known = call.environ.get("HTTP_IF_NONE_MATCH", "").split(",")
    if {tag, "*"} & {each.strip().removeprefix("W/") for each in known}:
        return Reply(304, b"", (("Etag", tag),))
    applied = None if policy.applied_ms is None else iso(policy.applied_ms)
    return success({**shown, "appliedAt": applied}, headers=[("Etag", tag)])


@endpoint("GET", "/api/rules/latest",
          "Fetch the text of the `custom` rules in force, as the shipped agent does", allow=(AGENT,),
          answer="Rules", beside="rules:[text]")
def _latest_rules(call: Call) -> Reply:
    rules = call.manager.custom_rules(call.caller.agent and call.caller.agent.id)
    return success({"rules": rules}, rules=rules)


@endpoint("DELETE", "/api/policy/agent/:id", "Drop the policy of one agent", answer="Dropped")
def _drop_override(call: Call) -> Mapping[str, Any]:
    agent_id = call.path["id"]
    version = call.manager.drop_override(agent_id, caller=call.caller)
    return {"message": f"Policy override of agent {agent_id} dropped", "version": version_text(version)}


@endpoint("GET", "/api/overview", "Show the fleet at a glance", query=OF_ORG, answer="Overview",
          headers=("X-Caller",))
def _overview(call: Call) -> Reply:
    return success(call.manager.overview(**call.query), headers=[("X-Caller", call.caller.role)])


forward("GET", "/api/timeline", "Show the statuses and threats of past hours, of all agents or of one",
        Manager.timeline, query=TIMELINE, answer="Timeline")


@endpoint("GET", "/api/events", "Read the journal, which is the audit log, in order", query=ENTRY_FILTER,
          answer="[Entry]")
def _entries(call: Call) -> Sequence[Any]:
    return [entry_shape(entry) for entry in call.manager.journal(**call.query)]


@endpoint("GET", "/api/events/stream", "Follow the journal as server-sent events; `Last-Event-ID` resumes",
          query=STREAM_FILTER, media="text/event-stream; charset=utf-8", headers=(":Last-Event-ID",))
def _stream(call: Call) -> bytes:
    if call.api.streams is None:
        raise ManagerError("event streams need the manager's own server; page through GET /api/events here",
                           status=501)
    last = call.environ.get("HTTP_LAST_EVENT_ID", "")
    if last and not re.fullmatch("[0-9]{1,15}", last):
        raise Invalid("Last-Event-ID: must be the id of an event")
    stream = call.api.streams.open(int(last) if last else None, call.query)
    request_state(call.environ).stream = stream
    return b""


@endpoint("POST", "/api/notify/test", "Send a notification to every receiver, and show what each answers",
          answer="[TestedReceiver]")
def _notify_test(call: Call) -> Sequence[Any]:
    if not call.manager.config.notify_url:
        raise Conflict("no receiver is set: MANAGER_NOTIFY_URL")
    return call.api.notifier.test() if call.api.notifier else []


@endpoint("GET", "/metrics", "Measure the manager, in the Prometheus text format",
          media="text/plain; version=0.0.4; charset=utf-8")
def _metrics(call: Call) -> bytes:
    return call.api.metrics().encode()


def _state(call: Call, counts: bool) -> Reply:
    manager = call.manager
    state: dict[str, Any] = {"status": "healthy", "version": __version__,
                             "uptime": (manager.clock.now().tick_ms - manager.started.tick_ms) // 1000}
    try:
        total, online = manager.health()
    except Unavailable as error:
        return failure(error, data={**state, "status": "unhealthy"})
    if counts:
        state["agents"] = {"total": total, "online": online}
    if warning := manager.warning():
        state["warning"] = warning
    receivers = call.api.notifier.receivers if counts and call.api.notifier else []
    if receivers and call.api.is_operator(call.environ):
        state["receivers"] = [{"receiver": each.name, "failing": each.failing} for each in receivers]
    return success(state)


@endpoint("GET", "/health", "Say whether the manager can do its work; 503 if not", public=True,
          answer="Health")
def _health(call: Call) -> Reply:
    return _state(call, counts=True)


@endpoint("GET", "/readyz", "Say the same without counting agents", public=True, answer="Health")
def _readyz(call: Call) -> Reply:
    return _state(call, counts=False)


@endpoint("GET", "/livez", "Say that the process answers", public=True, answer="Alive")
def _livez(call: Call) -> Mapping[str, Any]:
    return {"status": "alive"}


@functools.cache
def _openapi_json() -> bytes:
    return to_json(openapi()).encode()


@endpoint("GET", "/openapi.json", "Describe this API as OpenAPI 3.1", public=True, media="application/json")
def _openapi(call: Call) -> bytes:
    return _openapi_json()


_FAILURES = {
    "400": "Invalid input; the text names every offending field", "401": "No token, or a wrong one",
    "403": "A token that does not reach this far", "404": "Not registered", "409": "The fleet is full",
    "413": "A body over 1 MiB", "415": "A body that is not JSON",
    "429": "Too many requests or wrong tokens from this address", "503": "The database is not available"}
_SEED_AGENT = {"id": "agent-a1b2c3d4", "hostname": "web-server-1", "os": "linux", "version": "1.2.0",
               "ip": "203.0.113.10"}
_SEED_LIST = {"status": "online", "tags": ["production", "web-tier"]}
_SEED_INSTANTS = {"lastHeartbeat": "2026-03-07T12:05:00.000Z", "registeredAt": "2026-03-01T08:00:00.000Z"}
_SEED_LOAD = {"cpu": 12.5, "memory": 45.2, "uptime": 86400}
# The published page's body and answer of each of its routes, with the fields that we add.
_EXAMPLES: Mapping[str, tuple[Any, Any]] = {
    "register": (
        {"hostname": "web-server-1", "os": "linux", "version": "1.2.0", "tags": ["production", "web-tier"]},
        {**_SEED_AGENT, "tags": ["production", "web-tier"], "status": "online",
         "registeredAt": "2026-03-07T12:00:00.000Z", "token": "pga_JcH4s1LE4gDRb_r_sQMZW11sbL-OC_Sr"}),
    "heartbeat": ({**_SEED_LOAD, "version": "1.2.0"}, {
        "id": "agent-a1b2c3d4", "status": "online", "lastHeartbeat": "2026-03-07T12:05:00.000Z",
        "pendingPolicies": 1}),
    "deregister": (None, {"message": "Agent agent-a1b2c3d4 deregistered successfully"}),
    "agents": (None, [{**_SEED_AGENT, **_SEED_LIST, **_SEED_INSTANTS}]),
    "agent": (None, {
        **_SEED_AGENT, **_SEED_LIST, **_SEED_LOAD, **_SEED_INSTANTS, "recentThreats": 3,
        "activePolicyVersion": "v2", "pendingPolicies": 0, "org_id": None, "machine_id": None, "arch": None,
        "statusSince": "2026-03-01T08:00:00.000Z",
        "statusReason": "last heartbeat 2026-03-07T12:05:00.000Z, due by 2026-03-07T12:06:06.000Z",
        "staleAt": "2026-03-07T12:06:06.000Z", "offlineAt": "2026-03-07T12:10:00.000Z"})}


def _content(schema: Mapping[str, Any], media: str = _JSON_TYPE[1], example: Any = None) -> dict[str, Any]:
    shown = {"schema": schema} if example is None else {"schema": schema, "example": example}
    return {media.partition(";")[0]: shown}


def _success_schema(each: Endpoint, answer: str) -> dict[str, Any]:
    beside = answer_fields(each.beside)
    paging = {"pagination": answer_schema("Pagination")} if "page" in each.query else {}
    return {"type": "object", "required": ["ok", "data", *(one.name for one in beside if not one.optional)],
            "properties": {"ok": {"const": True}, "data": answer_schema(answer), **paging,
                           **{one.name: answer_schema(one.type) for one in beside}}}


def _successes(each: Endpoint, example: Any) -> dict[str, Any]:
    """What a route answers when all went well, by status."""
    if each.media:
        content = _content({"type": "object" if each.media == _JSON_TYPE[1] else "string"}, each.media)
    else:
        shown = example and {"ok": True, "data": example}
        content = _content(_success_schema(each, each.answer), example=shown)
    found: dict[str, Any] = {str(each.status): {"description": "Success", "content": content}}
    if sent := [name for name in each.headers if name[0] != ":"]:
        found[str(each.status)]["headers"] = {name: _header(name) for name in sent}
    if "ETag" in sent:
        found["304"] = {"description": "What If-None-Match names is still so"}
    if each.also:
        description, answer = each.also
        found["200"] = {"description": description, "content": _content(_success_schema(each, answer))}
    return found


def _header(name: str) -> dict[str, Any]:
    return {"description": MEANINGS[name], "schema": {"type": "string"}}


def _parameters(each: Endpoint) -> list[dict[str, Any]]:
    text_schema = {"type": "string"}
    rows = [(name, "path", {"required": True, "schema": text_schema})
            for name in re.findall(r":(\w+)", each.path)]
    rows += [(name, "query", {"required": param.required, "schema": param.check.schema})
             for name, param in each.query.items()]
    rows += [(name[1:], "header", {"schema": text_schema}) for name in each.headers if name[0] == ":"]
    return [{"name": name, "in": place, **rest, "description": MEANINGS[name]} for name, place, rest in rows]


def _operation(each: Endpoint) -> dict[str, Any]:
    name = each.serve.__name__.strip("_")
    sent, answered = _EXAMPLES.get(name, (None, None))
    failures = {status: {"$ref": f"#/components/responses/Failure{status}"} for status in _FAILURES}
    operation: dict[str, Any] = {
        "summary": each.summary, "operationId": name, "parameters": _parameters(each),
        "responses": {**_successes(each, answered), **failures}}
    if each.body is not None:
        schema = table_schema(each.body, strict=AGENT not in each.allow)
        content = _content(schema, example=sent)
        operation["requestBody"] = {"required": bool(schema["required"]), "content": content}
    operation["security"] = [] if ANYONE in each.allow else [{"bearer": []}]
    operation["x-callers"] = sorted(each.allow)
    return operation


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document, from the tables that route, validate and answer."""
    paths: dict[str, dict[str, Any]] = {}
    for each in ENDPOINTS:
        paths.setdefault(re.sub(r":(\w+)", r"{\1}", each.path), {})[each.method.lower()] = _operation(each)
    failures: dict[str, Any] = {f"Failure{status}": {
        "description": description, "content": _content(answer_schema("Error"))}
        for status, description in _FAILURES.items()}
    for status in ("429", "503"):
        failures[f"Failure{status}"]["headers"] = {"Retry-After": _header("Retry-After")}
    schemas = {name: object_schema(name) for name in ANSWERS}
    schemas |= {name: {"type": "string", "enum": list(words)} for name, words in _WORDS.items()}
    schemas["Error"] = {"type": "object", "required": ["ok", "error"], "properties": {
        "ok": {"const": False}, "error": {"type": "string"}}}
    return {"openapi": "3.1.0", "info": {"title": "Panguard Manager", "version": __version__}, "paths": paths,
            "components": {"schemas": schemas, "responses": failures,
                           "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}}}


########################################################################################################
# 7  Followers #########################################################################################
########################################################################################################

_KEEPALIVE_MS = 15_000
_BACKLOG = 2**18  # bytes a reader may be behind while it catches up with the past
_BATCH = 500      # entries read at once


class EventStream:
    """One reader of the journal: what it has had, what it wants, and the connection that it holds."""

    def __init__(self, streams: Streams, after: int, wanted: Mapping[str, Any]) -> None:
        self.streams = streams
        self.after = after
        self.live = False  # has caught up once: from then on only the channel's own bound holds
        self.sent_ms = 0
        self.channel: Any = None
        self._wanted = {name: value for name, value in wanted.items() if value is not None}

    def wants(self, entry: Entry) -> bool:
        """Whether the entry passes the filters."""
        return all(getattr(entry, name) in (value if isinstance(value, list) else (value,))
                   for name, value in self._wanted.items())

    def start(self, channel: Any) -> None:
        """Take over a connection whose headers have been sent."""
        self.channel = channel
        now = self.streams.manager.clock.now()
        self.sent_ms = now.tick_ms
        data = to_json({"seq": self.after, "at": iso(now.wall_ms), "type": "connected", "agentId": None,
                        "org_id": None, "actor": {"role": "manager"}, "version": __version__,
                        "message": "Connected to the event stream of Panguard Manager"})
        channel.publish(f"id: {self.after}\nevent: connected\ndata: {data}\n\n".encode())
        self.streams.join(self)

    def closed(self) -> None:
        """The connection is gone, or was never handed over."""
        self.streams.leave(self)


class Streams:
    """All event streams. They hold connections, not threads: one thread runs `pump()` for all of them.

    `count` is how many are open. Whoever wants them served calls `pump()` when the journal has grown and
    `keep_alive()` now and then.
    """

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.count = 0
        self.wake = threading.Event()
        self._lock = threading.Lock()
        self._joined: list[EventStream] = []
        manager.store.listeners.append(self.wake.set)

    def open(self, last_seq: int | None, wanted: Mapping[str, Any]) -> EventStream:
        """A stream of what comes after `last_seq`, or after now. Raises Unavailable if too many are open."""
        newest = self.manager.store.durable_seq()
        with self._lock:
            if self.count >= self.manager.config.max_streams:
                raise Unavailable(f"{self.count} event streams are open and MANAGER_MAX_STREAMS allows no "
                                  "more", retry_after_s=15)
            self.count += 1
        return EventStream(self, newest if last_seq is None else min(last_seq, newest), wanted)

    def join(self, stream: EventStream) -> None:
        """Serve a stream from now on."""
        with self._lock:
            self._joined.append(stream)
        self.wake.set()

    def leave(self, stream: EventStream) -> None:
        """Serve a stream no more."""
        with self._lock:
            self.count -= 1
            if stream in self._joined:
                self._joined.remove(stream)

    def pump(self) -> bool:
        """Send the streams one batch of the entries they lack; whether one of them has been left behind.

        Live ones share a batch; each that catches up has its own, and so delays the others by no more.
        """
        with self._lock:
            streams = tuple(self._joined)
        groups = [[stream for stream in streams if stream.live]]
        groups += [[stream] for stream in streams if not stream.live and stream.channel.backlog <= _BACKLOG]
        for group in filter(None, groups):
            last_seq = self.manager.store.durable_seq()  # a power cut must not undo what a reader has seen
            entries = [entry for entry in self.manager.journal(
                after=min(stream.after for stream in group), limit=_BATCH) if entry.seq <= last_seq]
            texts: list[tuple[Entry, bytes]] = []
            size = 0
            for entry in entries:
                data = to_json(entry_shape(entry))
                text = f"id: {entry.seq}\nevent: {entry.type}\ndata: {data}\n\n".encode()
                if size and size + len(text) > _BACKLOG:  # the rest at the next call
                    break
                texts.append((entry, text))
                size += len(text)
            for stream in group:
                wanted = b"".join(
                    text for entry, text in texts if entry.seq > stream.after and stream.wants(entry))
                if wanted and stream.channel.publish(wanted):
                    stream.sent_ms = self.manager.clock.now().tick_ms
                stream.after = max(stream.after, texts[-1][0].seq if texts else 0)
                stream.live = len(texts) == len(entries) < _BATCH
        return not all(stream.live for stream in streams)

    def keep_alive(self) -> None:
        """Say something on every stream that has been silent for 15 s."""
        tick_ms = self.manager.clock.now().tick_ms
        with self._lock:
            silent = [stream for stream in self._joined if tick_ms - stream.sent_ms >= _KEEPALIVE_MS]
        for stream in silent:
            stream.sent_ms = tick_ms
            stream.channel.publish(b": keepalive\n\n")


# Notifications

_TOLD_TYPES = ("agent_offline", "agent_online", "agent_deregistered", "threats_reported",
               "threats_correlated", "identity_conflict")
_OUTAGE = 10  # so many agents that fall silent together are one outage, or a fifth of the fleet
_NAMED = 20  # agents or events that a text names, at most
_MOST_ENTRIES = 1000  # of each kind in a notification
_READ_AT_ONCE = 10_000
_CHAT_CHARACTERS = 1900
_CONNECT_RECEIVER_S, _SEND_S = 3.0, 10.0
_FIRST_RETRY_MS, _LONGEST_RETRY_MS = 5_000, 3_600_000
# By the host's domain or the prefix of the address: the field that the text goes into.
_CHATS = {"slack": "text", "slack.com": "text", "mattermost": "text", "mattermost.com": "text",
          "discord": "content", "discord.com": "content", "discordapp.com": "content"}
_FINAL_STATUSES = (400, 413, 422)  # the notification itself is refused: after some tries the next one is sent
_TRIES_IF_FINAL = 5


class Notifier:
    """Makes notifications of the journal, in the timer, and keeps them until the receivers have had them.

    It follows the journal from a durable position. What comes within the delay becomes one notification.
    `receivers` send them, each in a thread of its own.
    """

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.delivered = 0
        self._pending: list[tuple[int, Entry]] = []  # with the tick at which each was read
        self._reminded_ms = self._tick_ms()
        config = manager.config
        with manager.store.transaction() as db:
            if not config.notify_url:  # what happens until notifications are wanted again is not told then
                for table in ("notifications", "receivers", "follower", "told_silent"):
                    db.execute(f"DELETE FROM {table}")
            db.execute("INSERT OR IGNORE INTO follower VALUES ('notifications', ?)", (manager.last_seq(),))
            (self._read_seq,) = db.execute("SELECT position FROM follower").fetchone()
            if not config.notify_url:
                db.execute("DELETE FROM follower")
            (newest,) = db.execute("SELECT coalesce(max(key), 0) FROM notifications").fetchone()
            digests = [digest(url) for url in config.notify_url]
            db.executemany("INSERT OR IGNORE INTO receivers (digest, delivered) VALUES (?, ?)",
                           [(each, newest) for each in digests])
            known = [row[0] for row in db.execute("SELECT digest FROM receivers")]
            db.executemany("DELETE FROM receivers WHERE digest = ?",
                           [(each,) for each in known if each not in digests])
            failing = {row[0] for row in db.execute("SELECT digest FROM receivers WHERE state != 'works'")}
        self.receivers = [Receiver(self, url, digest(url) in failing)
                          for url in dict.fromkeys(config.notify_url)]
        self._testing = threading.Lock()

    def _tick_ms(self) -> int:
        return self.manager.clock.now().tick_ms

    def compose(self) -> None:
        """Called by the timer: read the journal on, and make a notification of what waited for the delay."""
        if not self.receivers:
            return
        tick_ms, config = self._tick_ms(), self.manager.config
        for entry in self.manager.journal(after=self._read_seq, type=_TOLD_TYPES, limit=_READ_AT_ONCE):
            self._pending.append((tick_ms, entry))
            self._read_seq = entry.seq
        first_ms = self._pending[0][0] if self._pending else tick_ms
        until_ms = first_ms + config.notify_delay_ms
        group = [(read_ms, entry) for read_ms, entry in self._pending if read_ms <= until_ms]
        silent_ms = [read_ms for read_ms, entry in group if entry.type == "agent_offline"]
        if group and tick_ms >= max(silent_ms, default=first_ms) + config.notify_delay_ms:
            later = [entry for _, entry in self._pending[len(group):]]
            self._make([entry for _, entry in group], later)
            self._pending = self._pending[len(group):]
        elif config.notify_repeat_ms and tick_ms - self._reminded_ms >= config.notify_repeat_ms:
            self._remind()
        for receiver in self.receivers:
            receiver.wake.set()

    def _make(self, group: Sequence[Entry], later: Sequence[Entry]) -> None:
        wanted = self.manager.config.notify_on
        silent, back, gone = self._changes(group, later)
        with self.manager.store.read() as db:
            told = {row[0] for row in db.execute("SELECT agent_id FROM told_silent")}
            rows = db.execute("SELECT id, ip, org_id, tags FROM agents").fetchall() if silent else []
        known = {row["id"] for row in rows}
        silent = [entry for entry in silent if entry.agent_id in known]
        back = [entry for entry in back if entry.agent_id in told]
        shown = sorted(filter(self._is_told, group), key=_rank)
        data = {"offline": silent if "offline" in wanted else [],
                "online": back if "online" in wanted else [], "events": shown}
        lines = self._silence(rows, data["offline"])
        lines += _listed([f"{_name(entry)} is back" for entry in data["online"]], "agents are back")
        lines += [_sentence(entry) for entry in shown[:_NAMED]]
        lines += [f"and {len(shown) - _NAMED} more"] if len(shown) > _NAMED else []
        ended = {entry.agent_id for entry in back} | gone
        with self.manager.store.transaction() as db:
            db.executemany("INSERT OR REPLACE INTO told_silent VALUES (?, ?)",
                           [(entry.agent_id, str(entry.data.get("hostname"))) for entry in silent])
            db.executemany("DELETE FROM told_silent WHERE agent_id = ?", [(agent_id,) for agent_id in ended])
            db.execute("UPDATE follower SET position = ?", (group[-1].seq,))
            if lines:
                self._reminded_ms = self._tick_ms()
                self._keep(db, lines, {name: [entry_shape(entry) for entry in entries[:_MOST_ENTRIES]]
                                       for name, entries in data.items()})

    @staticmethod
    def _changes(group: Sequence[Entry],
                 later: Sequence[Entry]) -> tuple[list[Entry], list[Entry], set[str | None]]:
        """Whose last change was to fall silent, whose to return, and who was deregistered."""
        last = {entry.agent_id: entry for entry in group if entry.type.startswith("agent_")}
        returned = {entry.agent_id for entry in later if entry.type in ("agent_online", "agent_deregistered")}
        silent = [entry for entry in last.values()
                  if entry.type == "agent_offline" and entry.agent_id not in returned]
        return (silent, [entry for entry in last.values() if entry.type == "agent_online"],
                {entry.agent_id for entry in last.values() if entry.type == "agent_deregistered"})

    def _is_told(self, entry: Entry) -> bool:
        wanted = self.manager.config.notify_on
        if entry.type == "threats_reported":
            worst = SEVERITIES.index(str(entry.data["maxSeverity"]))
            return any(f"threat:{severity}" in wanted for severity in SEVERITIES[worst:])
        return {"threats_correlated": "correlated", "identity_conflict": "conflict"}.get(entry.type) in wanted

    def _silence(self, rows: Sequence[sqlite3.Row], silent: Sequence[Entry]) -> list[str]:
        """What to say of agents that fell silent: who, or of many at once, how many and what they share."""
        if len(silent) < 2 or len(silent) < min(_OUTAGE, len(rows) / 5):
            return [f"{_name(entry)} fell silent, last seen {entry.data.get('lastSeen')}" for entry in silent]
        ids = {entry.agent_id for entry in silent}
        all_of, silent_of = Counter[str](), defaultdict[str, set[str]](set)
        for row in rows:
            for shared in self._shared(row):
                all_of[shared] += 1
                if row["id"] in ids:
                    silent_of[shared].add(row["id"])
        # The narrowest of what most of them share.
        most = 0.8 * len(silent)
        among = min((all_of[each], each) for each, some in silent_of.items() if len(some) >= most)[1]
        inside = [entry for entry in silent if entry.agent_id in silent_of[among]]
        passed_ms = max(entry.at_ms for entry in inside) - min(entry.at_ms for entry in inside)
        together = passed_ms <= 2 * self.manager.config.notify_delay_ms  # else the wall clock was set
        within = f" within {(passed_ms + 999) // 1000} s" if together else ""
        named = ", ".join(sorted(_plain(entry.data.get("hostname")) for entry in inside)[:_NAMED])
        more = ", …" if len(inside) > _NAMED else ""
        others = f"; and {len(silent) - len(inside)} others" if len(silent) > len(inside) else ""
        return [f"{len(inside)} of {all_of[among]} {_plain(among)} fell silent{within}: "
                f"{named}{more}{others}"]

    def _shared(self, row: sqlite3.Row) -> list[str]:
        """What an agent may share with others, as it is said of several."""
        prefix = 64 if ":" in row["ip"] else 24
        network = ipaddress.ip_network((row["ip"], prefix), strict=False)
        return ["agents", f"agents in {network}", *([f"agents of {row['org_id']}"] if row["org_id"] else []),
                *(f"agents tagged {tag}" for tag in self.manager.store.loads(row["tags"]))]

    def _remind(self) -> None:
        self._reminded_ms = self._tick_ms()
        with self.manager.store.transaction() as db:
            rows = db.execute("SELECT hostname FROM told_silent ORDER BY hostname")
            told = [_plain(row[0]) for row in rows]
            if told:
                lines = _listed([f"{name} is still silent" for name in told], "agents are still silent")
                self._keep(db, lines, {"reminder": told})

    def _keep(self, db: sqlite3.Connection, lines: Sequence[str], data: Mapping[str, Any]) -> None:
        """Keep a notification for the receivers that take any; remove those that none took for a day."""
        now = self.manager.now()
        db.execute("UPDATE receivers SET delivered = max(delivered, coalesce((SELECT max(key) FROM "
                   "notifications WHERE at_ms < ?), 0))", (now.steady_ms - _DAY_MS,))
        takers = db.execute("SELECT min(delivered) FROM receivers WHERE state != 'gone'").fetchone()[0]
        db.execute("DELETE FROM notifications WHERE key <= coalesce(?, key)", (takers,))
        if takers is not None:
            body = {"type": "panguard.notification", "timestamp": iso(now.wall_ms), "data": {
                "text": "\n".join(lines), **data}}
            db.execute("INSERT INTO notifications (id, at_ms, body) VALUES (?, ?, ?)",
                       ("msg_" + secrets.token_hex(12), now.steady_ms, to_json(body)))

    def test(self) -> list[dict[str, Any]]:
        """Send a notification to every receiver; what each answered. Raises Throttled while a test runs."""
        if not self._testing.acquire(blocking=False):
            raise Throttled("a test of the notifications is under way", retry_after_s=int(_SEND_S))
        try:
            now = self.manager.now()
            body = {"type": "panguard.test", "timestamp": iso(now.wall_ms), "data": {
                "text": "A test of Panguard Manager's notifications"}}
            answers: dict[str, Answer] = {}

            def send(receiver: Receiver) -> None:
                answers[receiver.url] = receiver.send("msg_" + secrets.token_hex(12), to_json(body))
            threads = [threading.Thread(target=send, args=(each,), daemon=True) for each in self.receivers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(_CONNECT_RECEIVER_S + _SEND_S + 1)
            late = Answer(0, "no answer in time")
            return [{"receiver": each.name, "delivered": answers.get(each.url, late).ok,
                     "answer": answers.get(each.url, late).text} for each in self.receivers]
        finally:
            self._testing.release()

    def stop(self) -> None:
        """End all requests to receivers."""
        for each in self.receivers:
            each.stop()

    def failing(self) -> int:
        """How many receivers did not take the last notification."""
        return sum(each.failing for each in self.receivers)


class Answer(NamedTuple):
    """What a receiver answered: a status, or 0 and why there was none, and when it may be asked again."""

    status: int
    text: str
    retry_after_s: int = 0

    @property
    def ok(self) -> bool:
        """Whether it took the notification."""
        return 200 <= self.status < 300


class Receiver:
    """A receiver of notifications. `wake` makes its thread look for one to send; `stop()` ends a request."""

    def __init__(self, notifier: Notifier, url: str, failing: bool) -> None:
        self.notifier = notifier
        self.url = url
        match = cast("re.Match[str]", re.fullmatch(r"(?:(slack|mattermost|discord)\+)?(.*)", url))
        kind, address = match.groups()
        self._target = urlsplit(address)
        host = self._target.hostname or ""
        domain = next((each for each in _CHATS if "." in each and f".{host}".endswith(f".{each}")), "")
        self._chat = kind or domain.partition(".")[0].replace("discordapp", "discord")
        self.name = f"{self._target.scheme}://{self._target.netloc.rpartition('@')[2]}"  # the path is secret
        self.failing = failing
        self.wake = threading.Event()
        self._digest = digest(url)
        self._tries, self._next_ms = 0, 0
        self._sent_key = 0  # of the last one taken, which the database may not know yet
        self._over = False
        self._connections: set[http.client.HTTPConnection] = set()

    def run(self) -> None:
        """Deliver what there is, whenever woken, until stop()."""
        while not self._over:
            self.wake.wait()
            self.wake.clear()
            try:
                while not self._over and self.deliver():
                    pass
            except Unavailable:
                pass  # the timer wakes it again
            except Exception:
                log.exception("notifications to %s failed", self.name)

    def stop(self) -> None:
        """Have run() return, now."""
        self._over = True
        self.wake.set()
        for connection in list(self._connections):
            _cut(connection)

    def deliver(self) -> bool:
        """Deliver the next notification, if it is time; whether there may be another."""
        manager = self.notifier.manager
        if manager.clock.now().tick_ms < self._next_ms:
            return False
        with manager.store.read() as db:
            row = db.execute(
                "SELECT n.*, r.state FROM receivers r JOIN notifications n ON n.key > max(r.delivered, ?) "
                "WHERE r.digest = ? AND n.at_ms >= ? ORDER BY n.key LIMIT 1",
                (self._sent_key, self._digest, manager.now().steady_ms - _DAY_MS)).fetchone()
        if row is None or row["state"] == "gone":
            return False
        answer = self.send(row["id"], row["body"])
        if self._over and not answer.ok:
            return False
        self._tries = 0 if answer.ok else self._tries + 1
        self._next_ms = 0 if answer.ok else manager.clock.now().tick_ms + self._wait_ms(answer)
        done = answer.ok or (answer.status in _FINAL_STATUSES and self._tries >= _TRIES_IF_FINAL)
        self._sent_key = row["key"] if done else self._sent_key
        self.failing = not answer.ok
        state = "works" if answer.ok else "gone" if answer.status == 410 else "fails"
        with manager.store.transaction() as db:
            db.execute("UPDATE receivers SET state = ?, delivered = max(delivered, ?) WHERE digest = ?",
                       (state, self._sent_key, self._digest))
            if state not in ("works", row["state"]):  # journalled once
                manager.store.journal(manager.now().wall_ms, "notification_failed", THE_MANAGER, None, None, {
                    "receiver": self.name, "error": answer.text, "off": state == "gone"})
                log.warning("%s took no notification: %s", self.name, answer.text)
        self.notifier.delivered += answer.ok
        return answer.ok

    def _wait_ms(self, answer: Answer) -> int:
        backoff_ms = min(_LONGEST_RETRY_MS, _FIRST_RETRY_MS << min(self._tries - 1, 20))
        return min(_DAY_MS, max(1000 * answer.retry_after_s, backoff_ms))

    def _chat_body(self, text: str) -> dict[str, Any]:
        """The body for a chat. What an agent sent in the text cannot mention people or hide an address."""
        if len(text) > _CHAT_CHARACTERS:
            text = text[:_CHAT_CHARACTERS].rpartition("\n")[0] + "\n…"
        if self._chat == "discord":
            return {"content": re.sub(r"([\[\]<>*_~`|])", r"\\\1", text), "allowed_mentions": {"parse": []}}
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return {"text": re.sub("@(?=[a-z])", "@\u200b", text) if self._chat == "mattermost" else text}

    def send(self, message_id: str, body: str) -> Answer:
        """Post a notification as the receiver takes it; redirects are not followed."""
        config = self.notifier.manager.config
        if self._chat:
            body = to_json(self._chat_body(json.loads(body)["data"]["text"]))
        instant = str(self.notifier.manager.clock.now().wall_ms // 1000)
        headers = {"Content-Type": "application/json", "User-Agent": f"panguard-manager/{__version__}",
                   "webhook-id": message_id, "webhook-timestamp": instant}
        if config.notify_secret:  # https://github.com/standard-webhooks/standard-webhooks, version 1.0
            signed = hmac.digest(config.notify_secret, f"{message_id}.{instant}.{body}".encode(), "sha256")
            headers["webhook-signature"] = "v1," + base64.b64encode(signed).decode()
        if self._target.username:
            pair = f"{unquote(self._target.username)}:{unquote(self._target.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        kind = http.client.HTTPSConnection if self._target.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._target.hostname or "", self._target.port, timeout=_CONNECT_RECEIVER_S)
        self._connections.add(connection)
        limit = threading.Timer(_CONNECT_RECEIVER_S + _SEND_S, _cut, (connection,))  # for the whole exchange
        limit.daemon = True
        limit.start()
        path = (self._target.path or "/") + ("?" + self._target.query if self._target.query else "")
        try:
            with contextlib.closing(connection):
                connection.connect()
                if self._over:
                    return Answer(0, "the manager is stopping")
                connection.sock.settimeout(_SEND_S)
                connection.request("POST", path, body.encode(), headers)
                answer = connection.getresponse()
                return Answer(answer.status, _plain(f"{answer.status} {answer.reason}")[:200],
                              _seconds_of(answer.headers.get("Retry-After", "")))
        except (OSError, http.client.HTTPException, ValueError) as error:
            return Answer(0, _plain(error)[:200] or type(error).__name__)
        finally:
            limit.cancel()
            self._connections.discard(connection)


def _cut(connection: http.client.HTTPConnection) -> None:
    """End whatever a connection waits for, from another thread."""
    with contextlib.suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def _seconds_of(retry_after: str) -> int:
    """The seconds of a Retry-After header, which may be a date (RFC 9110, 10.2.3); 0 if it is neither."""
    if retry_after.isdecimal():
        return int(retry_after[:9])
    with contextlib.suppress(ValueError, TypeError):
        return max(0, round(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()))
    return 0


def _plain(value: Any) -> str:
    """What an agent or a receiver sent, as a part of one line."""
    return "".join("\ufffd" if unicodedata.category(each)[0] == "C" or each in "\u2028\u2029" else each
                   for each in str(value))


def _rank(entry: Entry) -> int:
    """The worst threats first, then the others."""
    severity = str(entry.data["maxSeverity"]) if entry.type == "threats_reported" else None
    return SEVERITIES.index(severity) if severity else len(SEVERITIES)


def _name(entry: Entry) -> str:
    return f"{_plain(entry.data.get('hostname'))} ({entry.agent_id})"


def _listed(lines: list[str], many: str) -> list[str]:
    return lines if len(lines) < _OUTAGE else [f"{len(lines)} {many}"]


def _sentence(entry: Entry) -> str:
    """What an entry about threats or identities says."""
    if entry.type == "threats_reported":
        return f"{_name(entry)} reported {entry.data['count']} threats, the worst {entry.data['maxSeverity']}"
    if entry.type == "threats_correlated":
        (kind, value), = entry.data["indicator"].items()
        return f"{entry.data['count']} agents saw {kind} {_plain(value)}"
    return (f"{_name(entry)} registered with the machine_id of {entry.data['otherAgentId']}, which is "
            "online: a cloned machine")


########################################################################################################
# 8  Server ############################################################################################
########################################################################################################

# What of waitress is overridden, and why a user would notice if it were not:
#
#   ChunkedReceiver   received                    linear time; chunk lines and trailers are bounded
#   HTTPRequestParser received, close             bodies are bounded in all; one request is read at a time
#                     parse_header                linear time; what readers may read differently is refused;
#                                                 a body is not received without a known credential
#   WSGITask          get_environment             a path keeps its slashes
#                     write                       a part of a body is sent before the rest is made
#                     service, finish             a stream keeps its connection and returns its worker
#                     build_response_header       our headers bypass its normalisation: 5 times faster
#   ErrorTask         execute                     refusals are JSON, with the headers that all answers have
#   HTTPChannel       readable, writable          connections that are idle or at a worker cost no loop time
#                     handle_read, received       TLS on the same port; heartbeats in the loop
#                     handle_write, handle_close  the last answer arrives before the connection ends
#                     write_soon, send_continue   the loop alone sends: no worker waits for a client, and no
#                                                 two threads use one SSL object
#                     recv, send                  a client that is gone is no error
#                     service                     the loop goes on with the next request
#   TcpWSGIServer     handle_accept               connections are bounded per address
#                     add_task                    refusals and answers from memory need no worker
#                     pull_trigger                an answer wakes the loop once, not twice
#   ThreadedTask…     start_new_thread            workers run at a lower priority than the loop


def run_thread(name: str, target: Callable[[], None], end: Callable[[], None]) -> Callable[[], None]:
    """Run `target` in a thread. The function returned calls `end`, which must end `target`, and waits."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()

    def stop() -> None:
        end()
        thread.join()
    return stop


class SystemClock:
    """The clock of the machine: wall time for what is shown, monotonic time for what is decided."""

    _READING_NS = 10_000_000  # a process that is stopped between two of the clocks reads them again
    _BUSY_S = 0.5  # a thread may wake so late on a busy machine
    _BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # goes on while the machine is suspended

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stalled_ms = 0
        self._watch_s = math.inf  # the interval of watch(), while it runs
        self._ran_s = self._cpu_s = 0.0  # at the last measurement: the time, and the CPU time used so far

    def now(self) -> Moment:
        """One reading of the machine's clocks."""
        while True:
            tick_ns, boot_ns, wall_ns = time.monotonic_ns(), time.clock_gettime_ns(self._BOOT), time.time_ns()
            if time.monotonic_ns() - tick_ns < self._READING_NS:
                wall_ns -= tick_ns % 1_000_000  # so that the difference of both in ms is constant
                return Moment(wall_ns // 1_000_000, tick_ns // 1_000_000, (boot_ns - tick_ns) // 1_000_000)

    def stalled_ms(self) -> int:
        """How long, in ms, this process was not run: the sum of long gaps, each less the CPU time used in it.

        Measured while `every()` runs, by a thread that waits for nothing else: a slow disk or callback does
        not delay it, and a computation that delays it uses CPU time.
        """
        with self._lock:
            ran_s, cpu_s = time.monotonic(), time.process_time()
            if ran_s - self._ran_s > self._watch_s + self._BUSY_S:
                self._stalled_ms += max(0, round(1000 * (ran_s - self._ran_s - (cpu_s - self._cpu_s))))
            self._ran_s, self._cpu_s = ran_s, cpu_s
            return self._stalled_ms

    def every(self, interval_s: float, callback: Callable[[], bool]) -> Callable[[], None]:
        """Repeat `callback()` in a thread of its own; what it raises is logged and the thread goes on."""
        over = threading.Event()

        def repeat() -> None:
            again = False
            while not over.wait(0.02 if again else interval_s):  # other threads run in between
                again = False
                try:
                    again = callback()
                except Unavailable:
                    pass  # logged where it arose; the next round tries again
                except Exception:
                    log.exception("the timer failed")

        def watch() -> None:
            while not over.wait(interval_s):
                self.stalled_ms()

        self.stalled_ms()
        self._watch_s = interval_s
        stops = [run_thread("panguard-timer", repeat, over.set),
                 run_thread("panguard-watch", watch, over.set)]

        def stop() -> None:
            for each in stops:
                each()
            self._watch_s = math.inf
        return stop


class ManualClock:
    """A clock that moves when told to, for tests, from 1970 to 9999. `start` is in s since 1970."""

    _LAST_S = 253_402_300_799

    def __init__(self, start: float = 1_772_884_800.0) -> None:
        self._now = Moment(0, 0)
        self.step(start)
        self._stalled_ms = 0
        self._callbacks: list[Callable[[], bool]] = []

    def now(self) -> Moment:
        """Where the clock stands."""
        return self._now

    def stalled_ms(self) -> int:
        """The sum of what `stall()` was told, in ms."""
        return self._stalled_ms

    def every(self, interval_s: float, callback: Callable[[], bool]) -> Callable[[], None]:
        """Call `callback()` at the end of every `advance()`, whatever the interval."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def advance(self, seconds: float) -> None:
        """Let time pass, and make all calls that are due. Raises Invalid, a ValueError, for less than 0."""
        self._pass(seconds)

    def stall(self, seconds: float) -> None:
        """Let time pass while this process is stopped, as by SIGSTOP."""
        self._pass(seconds, stalled=True)

    def suspend(self, seconds: float) -> None:
        """Let time pass while the machine is suspended."""
        self._pass(seconds, suspended=True)

    def _pass(self, seconds: float, *, stalled: bool = False, suspended: bool = False) -> None:
        passed_ms = self._in_ms(seconds, 0)
        self._stalled_ms += passed_ms if stalled else 0
        ticked_ms = 0 if suspended else passed_ms
        self._now = Moment(self._now.wall_ms + passed_ms, self._now.tick_ms + ticked_ms,
                           self._now.suspended_ms + passed_ms - ticked_ms)
        for callback in tuple(self._callbacks):
            while callback():
                pass

    def step(self, seconds: float) -> None:
        """Set the system clock, as an operator or NTP does: the wall time jumps and no time passes."""
        stepped_ms = self._in_ms(seconds, -self._now.wall_ms / 1000)
        self._now = self._now._replace(wall_ms=self._now.wall_ms + stepped_ms)

    def _in_ms(self, seconds: float, least_s: float) -> int:
        check = number(least_s, self._LAST_S - self._now.wall_ms // 1000)
        clean_arguments({"seconds": need(check)}, {"seconds": seconds})
        return round(seconds * 1000)


Environ = dict[str, Any]
Application = Callable[[Environ, Any], Iterable[bytes]]

KIB, MIB = 1 << 10, 1 << 20
HANDSHAKE_S = 15.0  # for the first byte and a TLS handshake
REQUEST_S = 30.0  # for a request to arrive, and a second more for each
SLOWEST_UPLOAD_BYTES_PER_S = 4 * KIB
IDLE_S = 120.0
BLOCKED_S = 1.0  # how long heartbeats wait for another program that writes
RETRY_S = 0.01  # between two tries
UNAUTHENTICATED_IDLE_S = 15.0  # for connections on which nobody has shown a credential yet
CLEANUP_S = 5.0  # between two searches for connections that have had their time
GRACE_S = 4.0  # at the stop, for what is in flight
MAX_HEADERS = 32 * KIB
MAX_HEADER_LINES = 512
CHUNK_LINE_BYTES = 4 * KIB  # of a chunk line, and of all trailers
SEND_BYTES = 64 * KIB  # at once
SENDS_AT_ONCE = 16  # then other clients have their turn
OUTPUT_BUFFER_BYTES = 8 * KIB  # up to this waitress uses bytes, which take the least time and memory
STREAM_BACKLOG = 1 * MIB  # a reader further behind than this is dropped
LINGER_BYTES = 8 * MIB  # what a client may still send after its last answer
SPARE_DESCRIPTORS = 200  # for the database, logs, and clients being told that there are too many
ACCEPTS_AT_ONCE = 128
IN_MEMORY_AT_ONCE = 16  # if more calls wait for the loop, workers answer from memory
LATER = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
FRAMING = frozenset({"connection", "content-length", "server"})  # headers that waitress looks at itself
BATCH_BYTES = 4 * KIB  # a longer request is a worker's to parse
_STATUS_LINES = {each.value: f"{each.value} {each.phrase}" for each in http.HTTPStatus}
_CLOSE = "Connection: close\r\n"
_PRINTABLE = bytes(range(32, 127))
READ, WRITE = select.POLLIN, select.POLLOUT  # epoll uses the same numbers

http_date = functools.lru_cache(maxsize=2)(build_http_date)


class UpgradeRequired(Error):  # type: ignore[misc]
    code, reason = 426, "Upgrade Required"
    headers = (("Upgrade", "TLS/1.2, HTTP/1.1"), ("Connection", "close, Upgrade"))


class Overloaded(Error):  # type: ignore[misc]
    code, reason = 503, "Service Unavailable"
    headers = (("Retry-After", "5"),)


# The socket map


class SocketMap(dict[int, Any]):
    """The sockets of one loop, over epoll or poll; a socket is looked at only after something happened to it.

    "Something" is an event, or a call that another thread asked for with call_soon(). Nothing else may change
    what a socket waits for, so no wake-up is lost and idle connections cost nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.use_epoll = hasattr(select, "epoll")
        self._poller: Any = select.epoll() if self.use_epoll else select.poll()
        self._interest: dict[int, int] = {}
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._later: deque[tuple[float, Callable[[], object]]] = deque()  # each with its monotonic time
        self._asleep = False
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._poller.register(self._wake_r.fileno(), READ)

    def __setitem__(self, fd: int, channel: Any) -> None:
        super().__setitem__(fd, channel)
        self._interest[fd] = READ
        self._poller.register(fd, READ)

    def __delitem__(self, fd: int) -> None:
        super().__delitem__(fd)
        del self._interest[fd]
        with contextlib.suppress(OSError, KeyError):
            self._poller.unregister(fd)

    @property
    def calls_waiting(self) -> int:
        """How many calls the loop has still to make."""
        return len(self._calls)

    def call_soon(self, call: Callable[..., object], *args: Any) -> None:
        """Have the loop make a call; for every thread, the loop's own included."""
        self._calls.append((call, args))
        if self._asleep:  # the loop sets it before it looks for calls, so it sees this one or is woken
            self._asleep = False
            with contextlib.suppress(OSError):
                self._wake_w.send(b"!")

    def call_later(self, call: Callable[[], object]) -> None:
        """Have the loop make a call after RETRY_S; for the loop's own thread."""
        self._later.append((time.monotonic() + RETRY_S, call))

    def run_once(self, timeout: float) -> None:
        """Wait until something happens, deal with it, then make the calls asked for."""
        self._asleep = True
        if self._later:
            timeout = min(timeout, max(0.0, self._later[0][0] - time.monotonic()))
        if self._calls:
            timeout = 0.0
        events = self._poller.poll(timeout if self.use_epoll else timeout * 1000)
        self._asleep = False
        for fd, flags in events:
            channel = self.get(fd)
            if channel is None:
                if fd == self._wake_r.fileno():
                    self._wake_r.recv(4096)
            elif channel.accepting:  # later: a new descriptor may be one that events of this pass name
                self.call_soon(channel.handle_accept)
            else:
                if flags & READ and not channel.readable():
                    self._watch(fd, self._interest[fd] & ~READ)
                    flags &= ~READ
                wasyncore.readwrite(channel, flags)
                self.update_interest(channel)
        while self._later and self._later[0][0] <= time.monotonic():
            self.call_soon(self._later.popleft()[1])
        for _ in range(len(self._calls)):  # calls that these add wait until the sockets had their turn
            call, args = self._calls.popleft()
            call(*args)

    def update_interest(self, channel: Any) -> None:
        """Send what can be sent at once, then wait for what the channel now wants."""
        fd: int = channel.fd
        if self._has(channel) and (writes := channel.writable()):
            wasyncore.write(channel)
            writes = channel.writable()
        if not self._has(channel):  # closed, by this or before
            return
        wanted = self._interest[fd] & READ  # withdrawn only if it fires unwanted: saves two calls per request
        if not wanted and channel.readable():
            wanted = READ
        self._watch(fd, wanted | WRITE if writes else wanted)

    def _has(self, channel: Any) -> bool:
        return self.get(channel.fd) is channel

    def reads(self, channel: Any) -> bool:
        """Whether the poller reports data that arrive for the channel."""
        return bool(self._interest.get(channel.fd, READ) & READ)

    def _watch(self, fd: int, wanted: int) -> None:
        if wanted != self._interest[fd]:
            self._interest[fd] = wanted
            self._poller.modify(fd, wanted)

    def close(self) -> None:
        for channel in list(self.values()):
            channel.handle_close() if isinstance(channel, Channel) else channel.close()
        self._wake_r.close()
        self._wake_w.close()
        if self.use_epoll:
            self._poller.close()


# Requests and answers


_TOKEN_CHARS = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_FIELD = _TOKEN_CHARS + rb":[\t -~\x80-\xff]*"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
# No two neighbours of these patterns match the same character, so that a match takes time linear in its text.
_HEAD = re.compile(rb"%b (?:/|(?i:https?)://|\*)[!-\"$-~]* HTTP/[0-9]\.[0-9]\r\n(?:%b\r\n)*(?:\r\n)?"
                   % (_TOKEN_CHARS, _FIELD)).fullmatch
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;%b(?:=(?:%b|%b))?)*" % (
    _TOKEN_CHARS, _TOKEN_CHARS, _QUOTED)).fullmatch
_TRAILER_LINE = re.compile(_FIELD).fullmatch
_CODINGS = re.compile(rb"\r\ntransfer-encoding:([^\r]*)", re.IGNORECASE).findall
_MANY_BLANKS = re.compile(rb":[\t ]{9}").search
_LEADING_BLANKS = re.compile(rb"(\r\n%b:)[\t ]+" % _TOKEN_CHARS)


class ChunkedBody(ChunkedReceiver):  # type: ignore[misc]
    """A chunked body (RFC 9112, 7.1) for waitress' parser, read in time linear in what arrives.

    waitress' own reads unfinished lines again at every receive, copies the rest at every chunk, and takes a
    size with a line feed after it. Here a chunk line, and all trailers, have at most CHUNK_LINE_BYTES.
    """

    error: Error | None = None
    completed: bool = False
    buf: OverflowableBuffer
    _unread = b""  # the start of a line
    _chunk_bytes = 0  # of the present chunk, still to come
    _after_chunk = _after_last_chunk = False
    _trailer_bytes = 0
    _framing_bytes = 0  # by which chunk lines exceed what they frame

    def received(self, data: bytes) -> int:
        """Read on, and return how many bytes of `data` belong to this body. A fault is left in `error`."""
        before = len(self._unread)
        data, at, pieces = self._unread + data, 0, []
        self._unread = b""
        while not self.completed and not self.error:
            piece = data[at:at + self._chunk_bytes]
            pieces.append(piece)
            at += len(piece)
            self._chunk_bytes -= len(piece)
            end = data.find(b"\r\n", at, at + CHUNK_LINE_BYTES)
            if self._chunk_bytes or end < 0:
                self._unread = data[at:]
                if len(self._unread) >= CHUNK_LINE_BYTES:
                    self.error = BadRequest(f"a chunk line must have at most {CHUNK_LINE_BYTES} bytes")
                break
            self._line(data[at:end])
            at = end + 2
        self.buf.append(b"".join(pieces))
        return at + len(self._unread) - before

    def _line(self, line: bytes) -> None:
        if self._after_chunk:
            self._after_chunk = False
            if line:
                self.error = BadRequest("a chunk must end where its size says")
        elif self._after_last_chunk:
            self._trailer_bytes += len(line) + 2
            self.completed = not line
            if line and not _TRAILER_LINE(line):
                self.error = BadRequest("a trailer is malformed")
            elif self._trailer_bytes > CHUNK_LINE_BYTES:
                self.error = BadRequest(f"the trailers must have at most {CHUNK_LINE_BYTES} bytes together")
        elif size := _CHUNK_LINE(line):
            self._chunk_bytes = int(size[1], 16)
            self._after_chunk = self._chunk_bytes > 0
            self._after_last_chunk = not self._after_chunk
            self._framing_bytes = max(self._framing_bytes + len(line) + 4 - self._chunk_bytes, 0)
            if self._framing_bytes > 4 * CHUNK_LINE_BYTES:
                self.error = BadRequest("the chunks are too small for their lines")
        else:
            self.error = BadRequest("a chunk line must be a size in hexadecimal digits, with or without "
                                    "extensions")


class Request(HTTPRequestParser):  # type: ignore[misc]
    """waitress' parser, given only what it reads in linear time; strict where two readers might differ."""

    command = path = ""  # until they are parsed
    body_rcv: Any
    chunked: bool
    content_length: int
    error: Error | None
    left_out_bytes = 0.0  # of a body that is not to be received
    counted_bytes = 0  # of its body, as part of what all bodies may have
    counted_as = ""  # whose body it is, see Api.body_owner()

    def __init__(self, adj: Any, channel: Channel) -> None:
        super().__init__(adj)
        self.channel = channel

    def received(self, data: bytes) -> int:
        """Read on. What follows this request is left with the channel: one request is read at a time."""
        consumed: int = super().received(data)
        site = self.channel.server.site
        if self.body_rcv is not None and self.error is None:
            arrived_bytes = len(self.body_rcv) - self.counted_bytes
            if site.count_body_bytes(self.counted_as, arrived_bytes):
                self.counted_bytes += arrived_bytes
            else:
                self.close()  # its bytes count no more, so that others can be received
                self.error, self.completed = Overloaded("too many bodies are being received; try again"), True
        if not self.completed:
            return consumed
        rest = data[consumed:]
        if self.left_out_bytes > len(rest):
            self.headers["CONNECTION"] = "close"
        self.channel.held = rest[int(min(self.left_out_bytes, len(rest))):]
        return len(data)

    def close(self) -> None:
        self.channel.server.site.count_body_bytes(self.counted_as, -self.counted_bytes)
        self.counted_bytes = 0
        super().close()

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the request line and the headers, which waitress has stripped of blanks in front."""
        if header_plus.count(b"\r\n") > MAX_HEADER_LINES:
            raise ParsingError(f"there must be at most {MAX_HEADER_LINES} lines of headers")
        if not _HEAD(header_plus):
            raise ParsingError("the request line or a header is malformed")
        codings = [each.strip(b" \t").lower() for each in b",".join(_CODINGS(header_plus)).split(b",")]
        if codings.count(b"chunked") > 1 or (b"" in codings and _CODINGS(header_plus)):
            raise ParsingError("Transfer-Encoding must be chunked, said once")
        if _MANY_BLANKS(header_plus):  # waitress takes quadratic time for those before a value
            header_plus = _LEADING_BLANKS.sub(rb"\1", header_plus)
        try:
            super().parse_header(header_plus)
        except ValueError as problem:  # a length of 5,000 digits, a URI of "http://["
            raise ParsingError(str(problem)) from None
        self._check_headers()
        if self.body_rcv is None or self.content_length >= self.adj.max_request_body_size:
            self.expect_continue = False  # else waitress would send 100 Continue instead of the answer
            return
        if self.chunked:
            self.body_rcv = ChunkedBody(OverflowableBuffer(self.adj.inbuf_overflow))
        owner = self.channel.server.site.api.body_owner(self.path, self.headers.get("AUTHORIZATION"),
                                                        self.channel.addr[0])
        self.counted_as = owner or ""
        if owner is None:
            self.left_out_bytes = math.inf if self.chunked else self.content_length
            self.body_rcv, self.chunked, self.content_length, self.expect_continue = None, False, 0, False
            self.headers.pop("CONTENT_LENGTH", None)

    def _check_headers(self) -> None:
        hosts = self.headers.get("HOST")
        if (self.version == "1.1" and hosts is None) or "," in (hosts or ""):
            raise ParsingError("there must be one Host header")
        if "TRANSFER_ENCODING" in self.headers:  # waitress has taken out that of HTTP/1.1
            raise ParsingError("Transfer-Encoding needs HTTP/1.1")
        if self.chunked and "CONTENT_LENGTH" in self.headers:  # RFC 9112, 6.1: two lengths are an attack
            raise ParsingError("there must not be both Content-Length and Transfer-Encoding")


class Task(WSGITask):  # type: ignore[misc]
    """A request being answered by the application."""

    content_length: int | None = None
    content_bytes_written: int
    response_headers: list[tuple[str, str]]

    def get_environment(self) -> Environ:
        environ: Environ = super().get_environment()
        environ["PATH_INFO"] = self.request.path  # waitress takes away slashes in front of it
        return environ

    def service(self) -> None:
        try:
            super().service()
        except Dropped:
            raise ClientDisconnected from None
        finally:
            request = request_state(self.environ or {})
            if not self.channel.authenticated and request.caller:
                self.channel.sockets.call_soon(self.channel.authenticate, request.caller)
            if request.stream:  # not handed over: an error, a HEAD, a client that left
                request.stream.closed()

    def write(self, data: bytes) -> None:
        """Write a part of the body, and have the loop send it before the rest is made."""
        super().write(data)
        if data and self.content_length and self.content_bytes_written < self.content_length:
            self.channel.send_early()

    def build_response_header(self) -> bytes:
        """waitress decides about the framing; other headers bypass its normalisation (5 times faster)."""
        if self.channel.server.site.stopping:
            self.request.headers["CONNECTION"] = "close"
        framing, lines = [("Date", http_date(int(self.start_time)))], []
        for name, value in self.response_headers:
            if name.lower() in FRAMING:
                framing.append((name, value))
            else:
                lines.append(f"{name}: {value}\r\n")
        self.response_headers = framing
        if request_state(self.environ or {}).stream:
            self.remove_content_length_header()
            self.content_length = None
        head: bytes = super().build_response_header()
        return head[:-2] + "".join(lines).encode("latin-1") + b"\r\n"

    def finish(self) -> None:
        stream = request_state(self.environ or {}).stream
        if not self.wrote_header:
            self.write(b"")
        if self.request.command == "HEAD":
            self.chunked_response = False  # and so no last chunk
        if not stream or self.request.command == "HEAD" or not self.has_body:
            super().finish()
            return
        self.channel.hand_over(self.environ, self.chunked_response)
        self.close_on_finish = False


class ErrorReply(ErrorTask):  # type: ignore[misc]
    """The answer to what waitress or the channel itself refuses, as the application would refuse it."""

    def execute(self) -> None:
        error, sent = self.request.error, self.request.headers
        sent["CONNECTION"] = "close"
        if error.code == 413:
            error.body = f"body: must be at most {_MOST_BYTES} bytes"
        reply = self.channel.server.site.api.refuse(error.code, error.body, {
            "wsgi.url_scheme": self.channel.scheme, "REMOTE_ADDR": self.channel.addr[0],
            "REQUEST_METHOD": self.request.command, "PATH_INFO": self.request.path,
            **{f"HTTP_{name}": sent.get(name, "")
               for name in ("X_REQUEST_ID", "ORIGIN", "X_FORWARDED_PROTO")}})
        self.status = _STATUS_LINES[reply.status]
        self.response_headers = [*reply.headers, *getattr(error, "headers", ())]
        self.content_length = len(reply.body)
        self.set_close_on_finish()
        self.write(b"" if self.request.command == "HEAD" else reply.body)


# The channel


class Phase(enum.Enum):
    """What a connection is doing.

    from        to          when
    FIRST_BYTE  HANDSHAKE   the first byte opens a TLS handshake
    FIRST_BYTE  HTTP        it does not (where there is no certificate, a connection begins here)
    HANDSHAKE   HTTP        the handshake is done
    HTTP        STREAM      a request opened an event stream
    HTTP        LINGER      the last answer was sent and the connection is to end
    STREAM      LINGER      the stream was ended
    any         closed      the client left, broke a rule or had its time
    """

    FIRST_BYTE = enum.auto()  # TLS or plaintext?
    HANDSHAKE = enum.auto()
    HTTP = enum.auto()
    STREAM = enum.auto()  # written to by publish(); what arrives is dropped
    LINGER = enum.auto()  # half-closed; what arrives is dropped, since closing with unread data sends a reset


class Channel(HTTPChannel):  # type: ignore[misc]
    """One connection. Only the loop uses its socket; other threads add to what it has to send."""

    task_class, error_task_class = Task, ErrorReply
    phase = Phase.HTTP
    refusal: Error | None = None  # the answer to whatever this client asks
    socket: Any  # a plain one, or the SSLSocket made of it
    stream: EventStream | None = None
    chunked = False
    handshake_writes = False
    tolerance = 0  # bytes that may still be dropped
    scheme = "http"
    held, wanted = b"", 0  # what has arrived of the next request; for a heartbeat also how long it will be
    in_batch = False  # whether a heartbeat waits for the database
    early = False  # whether a part of an answer is sent before the rest is made
    began_s, taken = 0.0, 0  # the request being received
    authenticated = False
    counted_as = ""  # the address, later the agent, whose connection it is

    def __init__(self, server: Listener, sock: socket.socket, addr: Any, adj: Any, map: SocketMap) -> None:
        self.opened_s = self.active_s = time.monotonic()  # active: when something was last sent
        super().__init__(server, sock, addr, adj, map=map)
        self.sockets, self.fd = map, sock.fileno()
        self.output: deque[OverflowableBuffer] = deque()  # to be sent; a large buffer is a temporary file
        self.output_bytes = 0
        self.output_lock = threading.RLock()  # for both of these, `stream` and `connected`
        if server.site.tls_context is not None:
            self.phase = Phase.FIRST_BYTE

    # What the loop asks

    def readable(self) -> bool:
        busy = self.requests or self.in_batch or self.output_bytes or self.close_when_flushed
        return not (self.will_close or (busy and self.phase is Phase.HTTP))

    def writable(self) -> bool:
        if self.requests and not self.early:  # its worker calls update_interest() when it has finished
            return bool(self.will_close)
        closing = self.will_close or self.close_when_flushed
        return bool(self.output_bytes or closing or self.handshake_writes)

    def expires_s(self) -> float:
        """When this client will have had its time, on the monotonic clock."""
        if self.phase in (Phase.FIRST_BYTE, Phase.HANDSHAKE) or self.refusal:
            return self.opened_s + HANDSHAKE_S
        if self.phase is Phase.LINGER:
            return self.active_s + HANDSHAKE_S
        if self.phase is Phase.STREAM and not self.output_bytes:
            return math.inf
        if self.in_batch or self.requests:
            return math.inf  # no time limit while the answer is made
        if (self.request is not None or self.held) and not self.output_bytes:
            return self.began_s + REQUEST_S + self.taken / SLOWEST_UPLOAD_BYTES_PER_S
        return self.active_s + (IDLE_S if self.authenticated else UNAUTHENTICATED_IDLE_S)

    # What the loop does

    def handle_read(self) -> None:
        if self.phase is Phase.FIRST_BYTE:
            self._detect_tls()
        if self.phase is Phase.HANDSHAKE:
            self._handshake()
        if self.phase is Phase.HTTP:
            if self.connected and (data := self.recv(self.adj.recv_bytes)):
                self.received(data)
        elif self.phase in (Phase.STREAM, Phase.LINGER):
            self.tolerance -= len(self.recv(self.adj.recv_bytes))
            if self.tolerance < 0:
                self.handle_close()

    def received(self, data: bytes) -> bool:
        """Read one request; what has arrived of later ones waits in `held` until it has been answered."""
        data, self.held = self.held + data, b""
        if self.request is None:
            data = data.lstrip()  # waitress skips blanks before a request; they do not start its time limit
            if not data:
                return True
            if not self.wanted:
                self.began_s, self.taken = time.monotonic(), 0
            if len(data) < self.wanted:
                self.held = data
                return True
            self.wanted = 0
            if not self.refusal and self.server.site.batch.take(self, data):
                return True
        self.taken += len(data)
        return bool(super().received(data))

    def read_next(self) -> None:
        """Read the request that came with the one before, if the client has taken all answers."""
        busy = self.requests or self.in_batch or self.output_bytes or self.wanted
        if self.held and not busy and self.phase is Phase.HTTP and self.connected:
            self.received(b"")

    def parser_class(self, adj: Any) -> Request:
        return Request(adj, self)

    def authenticate(self, caller: Caller) -> None:
        """Let a client that has shown a credential be idle for longer; count an agent's connection as its."""
        if not self.connected:  # closed meanwhile: it is no longer counted
            return
        site = self.server.site
        self.authenticated = True
        site.count_connection(self.counted_as, -1)
        self.counted_as = caller.agent.id if caller.agent else ""
        site.count_connection(self.counted_as, 1)
        if site.connections_of[self.counted_as] > site.address_limit:
            site.note_connection(self.addr[0])
            self.refusal = Overloaded("this agent has too many connections; close those not needed")

    def handle_write(self) -> None:
        if self.phase is Phase.HANDSHAKE:
            self._handshake()
        elif not self.requests or self.early:
            self._send_output()
        if self.will_close:
            self.handle_close()
        elif self.close_when_flushed and not self.output_bytes:
            self._linger()
        else:
            self.read_next()

    def handle_close(self) -> None:
        with self.output_lock:
            stream, self.stream = self.stream, None
            super().handle_close()
            self.output_bytes = 0
            while self.output:
                self.output.popleft().close()
        self.server.site.count_connection(self.counted_as, -1)
        self.counted_as = ""
        if self.request is not None:
            self.request.close()
        if stream is not None:
            stream.closed()

    def _detect_tls(self) -> None:
        """Look at the first byte: 0x16 opens a TLS handshake, and no HTTP request."""
        site = self.server.site
        try:
            first = self.socket.recv(1, socket.MSG_PEEK)
            if first == b"\x16":
                self.socket = site.tls_context.wrap_socket(
                    self.socket, server_side=True, do_handshake_on_connect=False)
                self.scheme = "https"
                self.phase = Phase.HANDSHAKE
            elif first:
                self.phase = Phase.HTTP
                if not site.plaintext_allowed(self.addr[0]):
                    self.refusal = UpgradeRequired("this port speaks TLS: use https://")
            else:
                self.handle_close()
        except LATER:
            pass
        except (OSError, ValueError):
            self.handle_close()

    def _handshake(self) -> None:
        self.handshake_writes = False
        try:
            self.socket.do_handshake()
            self.phase = Phase.HTTP
            self.active_s = time.monotonic()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            self.handshake_writes = True
        except (OSError, ValueError) as error:
            api, reason = self.server.site.api, getattr(error, "reason", None) or type(error).__name__
            api.refusals.note("handshake", self.addr[0], api.manager.clock.now().tick_ms, reason)
            self.handle_close()

    def _linger(self) -> None:
        """Close our half and let the client finish its own, within bounds."""
        self.close_when_flushed = False
        self.phase, self.tolerance, self.active_s = Phase.LINGER, LINGER_BYTES, time.monotonic()
        if isinstance(self.socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()  # sends close_notify; nobody waits for the client's
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.handle_close()

    def recv(self, size: int) -> bytes:
        """What has arrived; nothing if there is nothing, or the client is gone and the channel closed."""
        try:
            data: bytes = self.socket.recv(size)
        except LATER:
            return b""
        except (OSError, ValueError):
            data = b""
        if not data:
            self.handle_close()
        return data

    def send(self, data: bytes) -> int:
        try:
            sent = int(self.socket.send(data))
        except LATER:
            return 0
        except (OSError, ValueError):
            self.will_close = True
            return 0
        self.active_s = time.monotonic()
        return sent

    def write_now(self, data: bytes, closing: bool) -> None:
        """Send in the loop, keeping only what the client cannot take yet."""
        sent = self.send(data) if self.connected else len(data)
        if sent < len(data):
            self.write_soon(data[sent:])
        if closing or sent < len(data) or not self.sockets.reads(self):
            self.close_when_flushed = closing
            self.sockets.call_soon(self.sockets.update_interest, self)

    def send_continue(self) -> None:
        """Ask for the body of the request that is being received."""
        self.request.expect_continue = self.request.completed = False
        self.sent_continue = True
        self.write_now(b"HTTP/1.1 100 Continue\r\n\r\n", closing=False)

    def _send_output(self) -> None:
        """Send what the client takes, within bounds; update_interest() asks for the rest."""
        with self.output_lock:
            for _ in range(SENDS_AT_ONCE):
                if not self.output or not (sent := self.send(self.output[0].get(SEND_BYTES))):
                    break
                self.output_bytes -= sent
                self.output[0].skip(sent, True)
                if not self.output[0]:
                    self.output.popleft().close()

    # What workers and the threads of streams call

    def write_soon(self, data: bytes) -> int:
        """Have the loop send these data, once service() has ended or update_interest() is called."""
        with self.output_lock:
            if not self.connected:
                raise ClientDisconnected
            if not data:
                return 0
            # Not to the first: it may have been sent in part, and keeps what was sent until it is closed.
            if len(self.output) < 2 or len(self.output[-1]) + len(data) > OUTPUT_BUFFER_BYTES:
                self.output.append(OverflowableBuffer(self.adj.outbuf_overflow))
            self.output[-1].append(data)
            self.output_bytes += len(data)
        return len(data)

    def send_early(self) -> None:
        """Have the loop send what there is, in a worker."""
        self.early = True
        self.sockets.call_soon(self.sockets.update_interest, self)

    def service(self) -> None:
        super().service()
        self.early = False
        self.active_s = time.monotonic()
        self.sockets.call_soon(self._go_on)  # one call, so that the loop is woken once

    def _go_on(self) -> None:
        self.sockets.update_interest(self)
        self.read_next()

    # Streams

    def hand_over(self, environ: Environ, chunked: bool) -> None:
        """Keep the connection for a stream and return the worker that opened it."""
        self.held, self.chunked = b"", chunked
        request = request_state(environ)
        assert request.stream
        request.stream.start(self)
        with self.output_lock:
            if not self.connected:
                raise ClientDisconnected
            self.stream, request.stream = request.stream, None
            self.phase, self.tolerance = Phase.STREAM, 64 * KIB

    @property
    def backlog(self) -> int:
        """Bytes published that the client has not taken yet."""
        return self.output_bytes

    def publish(self, data: bytes) -> bool:
        """Send on a stream, from any thread and without waiting; false if it is over."""
        return self._add_output(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def end(self) -> None:
        """End a stream as its reader expects it."""
        with self.output_lock:
            self._add_output(b"0\r\n\r\n" if self.chunked else b"")
            self.close_when_flushed = True

    def _add_output(self, data: bytes) -> bool:
        with self.output_lock:
            if not self.connected or self.close_when_flushed or self.phase is Phase.LINGER:
                return False
            if self.output_bytes + len(data) > STREAM_BACKLOG:
                self.sockets.call_soon(self.handle_close)
                return False
            self.write_soon(data)
        self.sockets.call_soon(self.sockets.update_interest, self)
        return True


# Heartbeats in the loop

_HEARTBEAT_ROUTE = next(each for each in ENDPOINTS if each.serve is _heartbeat)
_HEARTBEAT_LINE = re.compile(rb"POST (?P<path>/api/agents/[0-9A-Za-z_-]+/heartbeat) HTTP/1\.1\r\n").match


class HeartbeatBatch:
    """Heartbeats, answered in the loop: all of one pass in one transaction.

    It takes requests in the plain form that clients use, whole or with their body on the way, and reads them
    as waitress does. All others are left to waitress: this accepts a strict subset of what waitress accepts.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._store = api.manager.store
        self._waiting: list[tuple[Channel, Environ]] = []
        self._turn: Turn | None = None  # while it waits for the write lock
        self._deadline_s: float | None = None  # while it waits for another program: until when, monotonic

    def take(self, channel: Channel, data: bytes) -> bool:
        """Take a request, or keep its beginning in `channel.held`; false if a worker must take it."""
        line = _HEARTBEAT_LINE(data)
        end = data.find(b"\r\n\r\n")
        if not line or end < line.end() or len(data) > BATCH_BYTES:
            return False
        if channel.output_bytes or self._api.faults:
            return False
        environ = self._headers(data[line.end():end])
        if environ is None or "," in environ.get("HTTP_HOST", ","):
            return False
        length = environ.get("CONTENT_LENGTH", "0")
        if not length.isdecimal() or len(length) > 9 or int(length) > BATCH_BYTES:
            return False
        wanted = end + 4 + int(length)
        if len(data) < wanted:
            channel.held, channel.wanted = data, wanted
            return True
        if len(data) > wanted:
            return False
        environ["REQUEST_METHOD"] = "POST"
        environ["PATH_INFO"] = line["path"].decode("ascii")
        environ["QUERY_STRING"] = ""
        environ["REMOTE_ADDR"] = channel.addr[0]
        environ["wsgi.url_scheme"] = channel.scheme
        environ["wsgi.input"] = io.BytesIO(data[end + 4:])
        if not self._waiting:
            channel.sockets.call_soon(self._ask, channel.sockets)
        self._waiting.append((channel, environ))
        channel.in_batch = True
        return True

    @staticmethod
    def _headers(head: bytes) -> Environ | None:
        """These headers by their WSGI names; None if they are not in the plain form."""
        if head.translate(None, _PRINTABLE) != b"\r\n" * head.count(b"\r\n"):
            return None
        environ: Environ = {}
        for line in head.decode("ascii").split("\r\n"):
            name, colon, value = line.partition(":")
            key = _environ_key(name)
            if not colon or key is None or key in environ:
                return None
            environ[key] = value.strip(" ")
        return environ

    def _ask(self, sockets: SocketMap) -> None:
        """Ask for the write lock. If it is held, the thread that releases it has the loop call _granted()."""
        turn = self._turn = Turn(on_grant=lambda: sockets.call_soon(self._granted, sockets, turn))
        if self._store.write_lock.ask(turn):
            self._granted(sockets, turn)

    def _granted(self, sockets: SocketMap, turn: Turn) -> None:
        """Answer the heartbeats; or, while another program writes, release the lock and ask again."""
        if turn is not self._turn:  # a turn may be granted twice
            return
        self._turn = None
        self._deadline_s = self._deadline_s or time.monotonic() + BLOCKED_S
        if time.monotonic() < self._deadline_s and self._store.blocked():
            self._store.write_lock.release(turn)
            sockets.call_later(lambda: self._ask(sockets))
        else:
            self._deadline_s = None
            self._answer_all(turn)

    def close(self) -> None:
        """Leave the queue of the write lock. Heartbeats that still wait get no answer."""
        if self._turn:
            self._store.write_lock.release(self._turn)
            self._turn = None

    def _answer_all(self, turn: Turn) -> None:
        waiting, self._waiting = self._waiting, []
        site, route = waiting[0][0].server.site, _HEARTBEAT_ROUTE
        began_s = time.perf_counter()
        try:
            with self._store.transaction(durable=False, turn=turn):
                replies = [self._api.answer(route, environ, {"id": environ["PATH_INFO"].split("/")[3]},
                                            in_batch=True) for _, environ in waiting]
        except Unavailable as error:
            replies = [self._api.finish(failure(error), environ) for _, environ in waiting]
        except Exception:
            log.exception("heartbeats could not be answered")
            replies = [self._api.finish(failure(ManagerError("internal error")), {})] * len(waiting)
        duration_s = time.perf_counter() - began_s
        for status, count in Counter(reply.status for reply in replies).items():
            self._api.latencies.observe(route.method, route.path, status, duration_s, count)
        date = http_date(int(time.time()))
        for (channel, environ), reply in zip(waiting, replies, strict=True):
            channel.in_batch = False
            caller = request_state(environ).caller
            if not channel.authenticated and caller:
                channel.authenticate(caller)
            self._api.keep_exchange(route, environ, reply)
            closing = site.stopping or environ.get("HTTP_CONNECTION", "").lower() == "close"
            lines = "".join([f"{name}: {value}\r\n" for name, value in reply.headers])
            head = (f"HTTP/1.1 {_STATUS_LINES[reply.status]}\r\n{_CLOSE if closing else ''}"
                    f"Content-Length: {len(reply.body)}\r\nDate: {date}\r\n{lines}\r\n")
            channel.write_now(head.encode("latin-1") + reply.body, closing)


@functools.lru_cache(maxsize=256)
def _environ_key(name: str) -> str | None:
    """The WSGI name of a header; None if the header changes how the request is read."""
    key = name.upper().replace("-", "_")
    if not re.fullmatch("[0-9A-Za-z-]+", name) or key in ("TRANSFER_ENCODING", "EXPECT"):
        return None
    return rename_headers.get(key) or "HTTP_" + key


# The loop and its owner


def lower_priority() -> None:
    """Let the loop run before this thread, where more threads want to run than there are processors."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process'
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class Workers(ThreadedTaskDispatcher):  # type: ignore[misc]
    """waitress' thread pool, which can be waited for."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.started: list[threading.Thread] = []
        self.set_thread_count(count)

    def start_new_thread(self, target: Callable[[int], None], thread_no: int) -> None:
        def work() -> None:
            lower_priority()
            target(thread_no)
        thread = threading.Thread(target=work, name=f"worker-{thread_no}", daemon=True)
        self.started.append(thread)
        thread.start()

    def stop(self, timeout: float) -> None:
        self.shutdown(timeout=timeout)
        if not self.threads:
            for thread in self.started:
                thread.join(timeout)


class Listener(TcpWSGIServer):  # type: ignore[misc]
    """One listening socket: accepts connections, and gives each request to the loop or to a worker."""

    def __init__(self, site: WebServer, sockinfo: Any) -> None:
        self.site = site
        super().__init__(
            site.application, site.sockets, dispatcher=site.workers, adj=site.settings, sockinfo=sockinfo)

    def pull_trigger(self) -> None:
        """Do nothing: channels use SocketMap.call_soon()."""

    def handle_accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                connection, address = self.socket.accept()
            except LATER:
                return
            except (OSError, AttributeError) as problem:
                if isinstance(problem, OSError) and problem.errno in (errno.EMFILE, errno.ENFILE):
                    time.sleep(0.01)  # the process is out of descriptors: do not spin on it
                return
            counted_as = "" if self.site.api.is_proxy(address[0]) else network_of(address[0])
            too_many = max(len(self.site.sockets) - self.site.connection_limit,
                           self.site.connections_of[counted_as] - self.site.address_limit) + 1
            if too_many > 0:
                self.site.note_connection(address[0])
            if too_many > SPARE_DESCRIPTORS // 2:  # a few too many are answered 503, more are closed
                connection.close()
                continue
            try:
                self.set_socket_options(connection)
                channel = Channel(self, connection, address, self.adj, self.site.sockets)
            except OSError:  # gone already; let out, this would close the listener
                connection.close()
                continue
            channel.counted_as = counted_as
            self.site.count_connection(counted_as, 1)
            if too_many > 0:
                channel.refusal = Overloaded("too many connections; close those not needed, or try again")

    def add_task(self, channel: Channel) -> None:
        request = channel.requests[0]
        if channel.refusal is not None:
            request.error = channel.refusal
        request.url_scheme = channel.scheme
        if request.error is not None or self._is_in_memory(channel.sockets, request):
            channel.sockets.call_soon(channel.service)
        else:
            self.task_dispatcher.add_task(channel)

    def _is_in_memory(self, sockets: SocketMap, request: Request) -> bool:
        """Whether the loop itself answers, from memory: the workers may all wait for the database."""
        return (request.command in ("GET", "HEAD") and request.path in self.site.in_memory and
                sockets.calls_waiting < IN_MEMORY_AT_ONCE and not self.site.api.faults)


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Raises StartError when memory or threads are refused, as where the address space is bounded."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "start new thread" not in str(error):
            raise
        raise StartError("the system gives too little memory or too few threads "
                         f"({error or 'none is left'}); bound it with MemoryMax instead of ulimit -v, "
                         "and check ulimit -u") from None


def require_libraries() -> None:
    """Raises StartError for a library that is too old: it would fail later, in some request only."""
    import importlib.metadata  # here, since the commands do without it

    for name, least in (("bottle", "0.13.2"), ("waitress", "3.0.2")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a copy of its files only
            found = importlib.metadata.version(name)
            if [int(part) for part in re.findall(r"\d+", found)] < [int(part) for part in least.split(".")]:
                raise StartError(f"{name} {found} is too old: {least} or later is needed; "
                                 "`uv run manager.py` brings it, or install it with pip in a virtual "
                                 "environment")


def raise_descriptor_limit() -> int:
    """Allow as many open files as the system lets us, and say how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 65536 if soft == resource.RLIM_INFINITY else soft


def tell_systemd(state: str) -> None:
    """Tell the service manager, if there is one, what state this process is in (sd_notify(3))."""
    if not (address := os.environ.get("NOTIFY_SOCKET")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.setblocking(False)
        systemd.connect("\0" + address[1:] if address[0] == "@" else address)
        systemd.send(state.encode())


def watchdog_s() -> float:
    """How often to tell the service manager that this process runs, or infinity (sd_watchdog_enabled(3))."""
    wanted_us, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    ours = wanted_us.isdecimal() and int(wanted_us) > 0 and pid in ("", str(os.getpid()))
    return int(wanted_us) / 2e6 if ours else math.inf


class WebServer:
    """Serves a WSGI application from one loop thread and a few workers, between start() and stop().

    `owner.on_death()` is called if the loop fails. `tls_context` may be replaced at any time, for the
    connections that come after; None serves plaintext to all.
    """

    tls_context: ssl.SSLContext | None = None

    def __init__(self, owner: Server[Any], application: Application, api: Api) -> None:
        config = owner.config
        self.owner, self.application, self.api = owner, application, api
        self.batch = HeartbeatBatch(api)
        self.config = config
        # Routes that anyone may call do not read the database.
        self.in_memory = frozenset(each.path for each in ENDPOINTS if ANYONE in each.allow)
        self.body_bytes: Counter[str] = Counter()  # buffered, by owner; the loop and workers count them
        self._body_bytes_lock = threading.Lock()
        # By address while nobody has shown a credential on them, then by agent; counted in the loop.
        self.connections_of: Counter[str] = Counter()
        self.settings = Adjustments(
            host=config.host, port=config.port, threads=config.threads, ident=None,
            clear_untrusted_proxy_headers=False, max_request_body_size=_MOST_BYTES + 1,
            max_request_header_size=MAX_HEADERS, recv_bytes=SEND_BYTES)
        self.stopping = False
        self.error: BaseException | None = None

    def bind(self) -> None:
        """Listen, so that a taken port is the caller's exception; start() accepts."""
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        self.connection_limit = max(raise_descriptor_limit() - SPARE_DESCRIPTORS, 50)
        self.address_limit = self.config.connections_per_address or max(self.connection_limit // 8, 1)
        self.sockets = SocketMap()
        self._stop_loop: Callable[[], None] = self.sockets.close  # until start()
        self.workers = Workers(self.settings.threads)
        self.listeners: list[Listener] = []
        try:
            for family, kind, protocol, address in self.settings.listen:
                if self.listeners and address[1] == 0:  # "localhost" twice, with one port
                    address = (address[0], self.port, *address[2:])
                self.listeners.append(Listener(self, (family, kind, protocol, address)))
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        """Serve in a thread."""
        self._stop_loop = run_thread(
            "server-loop", self._run, lambda: self.sockets.call_soon(self._begin_stop))

    @property
    def port(self) -> int:
        return int(self.listeners[0].effective_port)

    def stop(self) -> None:
        """Finish what is in flight, leave nothing behind, and raise the error that ended the loop."""
        self._stop_loop()
        self.workers.stop(1)
        if self.error is not None:
            raise self.error

    def plaintext_allowed(self, address: str) -> bool:
        """Whether that peer may do without TLS where there is a certificate."""
        return self.config.tls != "require" and (_is_loopback(address) or self.api.is_proxy(address))

    def count_body_bytes(self, whose: str, more: int) -> bool:
        """Count bytes of bodies that were buffered, or (negative) let go; false if there would be too many.

        An agent's or enroller's credential, or a newcomer's address, may have a quarter: no one uses up all.
        """
        most = self.config.max_buffered_bytes
        share = max(most // 4, _MOST_BYTES) if whose else most
        with self._body_bytes_lock:
            if more > 0 and (self.body_bytes.total() + more > most or self.body_bytes[whose] + more > share):
                return False
            self.body_bytes[whose] += more
            if not self.body_bytes[whose]:
                del self.body_bytes[whose]
            return True

    def count_connection(self, whose: str, more: int) -> None:
        """Count a connection of an address or an agent, or one fewer."""
        if whose:
            self.connections_of[whose] += more
            if not self.connections_of[whose]:
                del self.connections_of[whose]

    def note_connection(self, address: str) -> None:
        """Count and log a connection that is refused because there are too many."""
        self.api.refusals.note("connections", address, self.api.manager.clock.now().tick_ms,
                               "too many; see MANAGER_CONNECTIONS_PER_ADDRESS and ulimit -n")

    def channels(self) -> list[Channel]:
        return [channel for listener in self.listeners for channel in listener.active_channels.values()]

    def _run(self) -> None:
        watched = watchdog_s() < math.inf
        cleanup_s = min(CLEANUP_S, watchdog_s())
        next_cleanup = time.monotonic() + cleanup_s
        try:
            while not self.stopping:
                self.sockets.run_once(max(0.0, next_cleanup - time.monotonic()))
                if time.monotonic() >= next_cleanup:
                    next_cleanup = time.monotonic() + cleanup_s
                    if watched:
                        tell_systemd("WATCHDOG=1")
                    for channel in self.channels():
                        if channel.expires_s() <= time.monotonic():
                            channel.handle_close()
            deadline = time.monotonic() + GRACE_S
            self.sockets.run_once(0.0)  # what has arrived by now is in flight
            while self._in_flight() and time.monotonic() < deadline:
                self.sockets.run_once(max(0.0, deadline - time.monotonic()))
        except BaseException as error:
            self.error = error
            self.owner.on_death()
        finally:
            self.stopping = True
            self.batch.close()
            self.sockets.close()

    def _begin_stop(self) -> None:
        self.stopping = True
        for listener in self.listeners:
            listener.close()
        for channel in self.channels():
            if channel.phase is Phase.STREAM:
                channel.end()

    def _in_flight(self) -> bool:
        return bool(self.workers.queue) or any(
            channel.requests or channel.in_batch or channel.output_bytes for channel in self.channels())


class Backups:
    """Makes the backups that MANAGER_BACKUP_DIR asks for: run() in a thread, until `over` is set."""

    def __init__(self, config: Config, folder: Path, api: Api) -> None:
        self.over = threading.Event()
        self._config, self._folder, self._api = config, folder, api
        self._kept = cast("Path", config.backup_dir)
        if not (self._kept.is_dir() and os.access(self._kept, os.W_OK | os.X_OK)):
            raise StartError(f"MANAGER_BACKUP_DIR: {self._kept} is no folder that can be written; make it, "
                             "or mount its disk")
        own = folder / "backup-id"
        try:
            private_file(own)
            if not re.fullmatch("[0-9a-f]{8}", own.read_text()):
                own.write_text(secrets.token_hex(4))
            self._prefix = f"panguard-{own.read_text()}-"  # other managers may use the same folder
        except (OSError, UnicodeError) as error:
            raise StartError(f"{own} cannot be used ({error}); remove it to get a new one") from None

    def _made(self) -> list[Path]:
        """The backups of this data folder, oldest first, and no other files."""
        of_one = re.compile(re.escape(self._prefix) + r"\d{8}T\d{6}Z\.backup")
        return sorted(path for path in self._kept.glob("panguard-*.backup")
                      if of_one.fullmatch(path.name) and path.is_file() and not path.is_symlink())

    def _progress(self, part: float) -> None:
        if self.over.is_set():
            raise Unavailable("the manager is stopping")

    def make(self) -> None:
        """Make a backup, and remove the oldest that are too many. Raises ManagerError, OSError."""
        for path in self._kept.glob(".panguard-*"):  # of a run that was killed
            if time.time() - path.stat().st_mtime > 86_400:
                shutil.rmtree(path)
        name = f"{self._prefix}{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.backup"
        back_up(self._folder, self._kept / name, self._progress)
        if self._api.backups_failed:
            log.warning("backups work again, after %d that failed", self._api.backups_failed)
        self._api.proved_s, self._api.backups_failed = time.time(), 0
        others = [path for path in self._made() if path.name != name]
        for path in others[:max(0, len(others) - self._config.backup_keep + 1)]:
            path.unlink()

    def run(self) -> None:
        """Make one at every interval; the first one interval after the newest that is there."""
        every_s = self._config.backup_every_ms / 1000
        ages_s = [time.time() - path.stat().st_mtime for path in self._made()]
        newest_s = min((age_s for age_s in ages_s if age_s >= 0), default=math.inf)
        due_s = time.monotonic() + max(0.0, every_s - newest_s)
        while not self.over.wait(max(0.05, due_s - time.monotonic())):
            due_s = time.monotonic() + every_s
            try:
                self.make()
            except Exception as error:
                self._api.backups_failed += not self.over.is_set()
                if self._api.backups_failed == 1:
                    log.error("no backup could be made: %s", error)


_SeenT = TypeVar("_SeenT", Entry, Exchange)
_SEED: Table = {
    "agents": need(number(0, 10_000_000, whole=True)), "threats": need(number(0, 10_000_000, whole=True)),
    "tags": may(_TAGS)}
_SEED_SYSTEMS, _SEED_TYPES = ("linux", "darwin", "windows"), ("port_scan", "brute_force", "malware")
_LATEST = 20  # so many a timeout lists
_WAIT: Table = {
    "type": may(one_of(*ENTRY_TYPES)), "route": may(ROUTE), "agent_id": may(_KEY),
    "after": may(number(0, _EXACT, whole=True)), "timeout_s": need(REAL_S)}


class Waits(Generic[_SeenT]):
    """Waits for a journal entry, or a request: for the first that fits after a number.

    `read(after=…, limit=…, order=…, **wanted)` returns those that fit. `given` is the number of the one that
    was returned last; the next wait begins after it. It stays if a wait is cancelled or finds none.
    """

    def __init__(self, server: Server[Any], read: Callable[..., Sequence[_SeenT]]) -> None:
        self._server = server
        self._read: Callable[..., Sequence[_SeenT]] = read
        self.given = 0

    def wait(self, after: int | None, timeout_s: float, **wanted: Any) -> _SeenT:
        """The next one. Raises Invalid, TimeoutError, and Unavailable if the server is stopped."""
        look = self._search(after, timeout_s, wanted)
        grown, deadline_s = threading.Event(), time.monotonic() + timeout_s
        with self._server.waking(grown.set):
            in_time = True
            while (found := look(in_time)) is None:
                grown.wait(max(0.0, deadline_s - time.monotonic()))
                grown.clear()
                in_time = time.monotonic() < deadline_s
        return found

    async def wait_async(self, after: int | None, timeout_s: float, **wanted: Any) -> _SeenT:
        """As wait(), without a thread."""
        import asyncio  # here, since a manager that serves does without it and its 2 MB

        look, loop = self._search(after, timeout_s, wanted), asyncio.get_running_loop()
        grown, late = asyncio.Event(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(grown.set)

        def expire() -> None:
            late.set()
            grown.set()

        timer = loop.call_later(timeout_s, expire)
        try:
            with self._server.waking(wake):
                while (found := look(not late.is_set())) is None:
                    await grown.wait()
                    grown.clear()
        finally:
            timer.cancel()
        return found

    def _search(self, after: int | None, timeout_s: float,
                wanted: Mapping[str, Any]) -> Callable[[bool], _SeenT | None]:
        """A function that returns the next one, or else None; if not `in_time`, it raises TimeoutError."""
        clean_arguments(_WAIT, {"after": after, "timeout_s": timeout_s, **wanted})
        manager, first = self._server.manager, self.given if after is None else after
        asked = ", ".join(f"{name} {value!r}" for name, value in wanted.items() if value is not None)

        def look(in_time: bool) -> _SeenT | None:
            self._server.require_running(manager)
            found = next(iter(self._read(after=first, limit=1, **wanted)), None)
            self.given = found.seq if found else self.given
            if found or in_time:
                return found
            whose = ", the one given last," if first and after is None else ""
            raise TimeoutError(f"nothing with {asked or 'any value'} came after number {first}{whose} within "
                               f"{timeout_s} s; " + "; ".join(self._instead(first, wanted)))
        return look

    def _instead(self, after: int, wanted: Mapping[str, Any]) -> Iterator[str]:
        """For a TimeoutError: what came instead, and why the one that was wanted may be missing."""
        latest = self._read(after=after, limit=_LATEST, order="desc")[::-1]
        others = latest[0].seq - after - 1 if latest else 0
        yield f"{others} others came, then:" if others else "these came:" if latest else "nothing else came"
        yield from map(_summary, latest)
        for before in self._read(limit=1, order="desc", **wanted):
            yield f"number {before.seq} fits and came before; after=0 begins with the first again"
        if agent_id := wanted["agent_id"]:
            try:
                self._server.manager.agent(agent_id)
            except NotFound as error:
                yield str(error)


def _summary(seen: Entry | Exchange) -> str:
    if isinstance(seen, Entry):
        return f"{seen.seq} {seen.type} {seen.agent_id}"
    return f"{seen.seq} {seen.method} {seen.path} {seen.status}"


_ClockT = TypeVar("_ClockT", bound=Clock)


class Server(Generic[_ClockT]):
    """A manager on a port: `with Server(port=0) as server: …`.

    Takes a Config, or its settings as keywords; without `data_dir` it uses a temporary folder and plaintext.
    Once started it has `url`, `token` (an admin's), `manager`, `clock` and `faults`. It may be started again
    after a stop. Raises TypeError for a keyword that is no setting, SettingError and StartError. If the
    serving thread fails, `on_death` is called, and `stop()` raises the error.
    """

    url: str
    token: str
    manager: Manager
    clock: _ClockT
    faults: Faults

    @overload
    def __init__(self: Server[SystemClock], config: Config | None = None, *, clock: None = None,
                 **settings: Unpack[Settings]): ...

    @overload
    def __init__(self, config: Config | None = None, *, clock: _ClockT, **settings: Unpack[Settings]): ...

    def __init__(self, config: Config | None = None, *, clock: Any = None, **settings: Any) -> None:
        if config and settings:
            raise SettingError("a Server takes a Config or settings, not both")
        if unknown := sorted(settings.keys() - Config.__dataclass_fields__.keys()):
            raise TypeError(f"{unknown[0]!r} is no setting; they are "
                            f"{', '.join(Config.__dataclass_fields__)}")
        if clock is not None and (isinstance(clock, type) or not hasattr(clock, "stalled_ms")):
            raise TypeError(f"clock is {clock!r} and must be a clock, such as ManualClock()")
        self.config = config or Config(**{"data_dir": None, **settings})
        self.clock = cast("_ClockT", clock or SystemClock())
        self.notes: list[str] = []
        self.on_death: Callable[[], None] = lambda: None
        self._own_pair: OwnCertificate | None = None
        self._renewal_tick_ms = -sys.maxsize
        self._undo = contextlib.ExitStack()
        self._running = False
        self._seeded = 0  # the number in the name of the last agent that seed() made
        self._wakes: list[Callable[[], None]] = []  # of the waits there are
        self._entries, self._arrivals = Waits(self, self._read_entries), Waits(self, self._read_requests)
        self._exchanges: deque[Exchange] = deque(maxlen=1000)
        self._exchanges_lock = threading.Lock()

    if not typing.TYPE_CHECKING:  # or type checkers would accept any name
        def __getattr__(self, name: str) -> Any:
            early = "; start() it first" if name in Server.__annotations__ else ""
            raise AttributeError(f"this Server has no attribute {name!r}{early}")

    def __enter__(self) -> Server[_ClockT]:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @enough_memory()
    def start(self) -> None:
        """Bind, then serve in threads; the port accepts when this returns."""
        if self._running:
            raise StartError("this server has been started already; stop it first")
        require_libraries()
        self.notes.clear()
        if not self.config.data_dir:  # a new temporary folder has a new journal
            self._entries.given = self._seeded = 0
        place = self.config.data_dir or Path(tempfile.gettempdir())
        with refused_start(place), contextlib.ExitStack() as undo:
            folder = self.config.data_dir or Path(undo.enter_context(
                tempfile.TemporaryDirectory(prefix="panguard-manager-")))
            store = Store(folder)
            undo.callback(store.close)
            store.listeners.append(self._wake)
            if store.is_new and (folder / "url").exists():  # which a start writes
                self.notes.append(
                    f"Warning: {folder} was in use before, but its manager.db is gone, so a new one was "
                    "made; to go back, stop and run: panguard-manager restore FILE")
            tokens = self.config.auth_token or (self._own_token(folder),)
            self.token = tokens[0]
            self.manager = Manager(self.config, self.clock, store)
            self._note_run("manager_started")
            if (most_bytes := self.manager.most_bytes) < self.config.max_db_bytes:
                self.notes.append(f"Warning: the database on the disk of {folder} may take {most_bytes} "
                                  "bytes, less than MANAGER_MAX_DB_BYTES; above that the oldest threats "
                                  "and entries are removed early")
            undo.callback(self._record_stop)
            app = create_app(self.manager, tokens)
            self._api: Api = app.api
            self.faults = self._api.faults
            if self.config.data_dir is None or isinstance(self.clock, ManualClock):  # a test's server
                self._api.on_exchange = self._keep_exchange
            self._api.streams = self._streams = Streams(self.manager)
            self._notifier = self._api.notifier = Notifier(self.manager)
            for receiver in self._notifier.receivers:
                undo.callback(run_thread("panguard-notify", receiver.run, receiver.stop))
            undo.callback(self._notifier.stop)  # all of them, before any is waited for
            backups = Backups(self.config, folder, self._api) if self.config.backup_dir else None
            self._listen(app, folder, undo)
            undo.callback(self.faults.over.set)
            self._api.certificate_end_s = lambda: getattr(self._web.tls_context, "end_s", 0.0)
            interval_s = max(0.05, min(1.0, self.config.heartbeat_timeout_ms / 10_000))
            undo.callback(self.clock.every(interval_s, self._tick))
            self._check_daily(store, undo)
            if backups:
                undo.callback(run_thread("panguard-backup", backups.run, backups.over.set))
            self._undo = undo.pop_all()
        self._running = True

    def stop(self) -> None:
        """Finish what is in flight, then let go of the port, the threads and the files."""
        self._running = False
        self._wake()
        self._undo.close()

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Within it, `wake` is called when the journal or `requests` has grown, and at the stop."""
        self._wakes.append(wake)
        try:
            yield
        finally:
            self._wakes.remove(wake)

    def _wake(self) -> None:
        for wake in tuple(self._wakes):
            wake()

    def require_running(self, manager: Manager) -> None:
        """Raises Unavailable if the server was stopped since `manager` was its manager."""
        if not self._running or self.manager is not manager:
            raise Unavailable("the server was stopped")

    @property
    def requests(self) -> list[Exchange]:
        """The latest 1,000 requests that were answered or dropped, oldest first; also those before a restart.

        They are kept only without a `data_dir` or with a ManualClock; otherwise the list is empty.
        """
        return list(self._exchanges)

    def seed(self, agents: int = 100, *, threats: int = 0, tags: Sequence[str] = ()) -> list[Registration]:
        """Register agents host-1, host-2 and so on, and report threat events as theirs, in one transaction.

        The agents differ in os, version and ip, and the events in type, severity and source address. A second
        call goes on counting. Returns the registrations, with tokens. Raises Conflict if the fleet may not
        have so many agents, and Invalid, a ValueError, for events without an agent.
        """
        clean_arguments(_SEED, {"agents": agents, "threats": threats, "tags": tags})
        if threats and not agents:
            raise Invalid("threats: must be 0 if agents is 0")
        first = self._seeded + 1
        with self.manager.store.transaction(durable=False):
            made = [self.manager.register(
                f"host-{number}", _SEED_SYSTEMS[number % 3], f"1.{number % 4}.0", tags=tags,
                ip=str(ipaddress.ip_address(0x0A000000 + number % 2**24)))
                for number in range(first, first + agents)]
            for number, each in enumerate(made[:threats]):
                events = [{
                    "type": _SEED_TYPES[index % 3], "severity": SEVERITIES[index % len(SEVERITIES)],
                    "details": {"sourceIp": f"203.0.113.{index % 20}", "port": index}}
                    for index in range(number, threats, agents)]
                for start in range(0, len(events), 1000):
                    self.manager.report_events(each.agent.id, events[start:start + 1000])
        self._seeded += agents
        return made

    def wait_for(self, *, type: str | None = None, agent_id: str | None = None, after: int | None = None,
                 timeout_s: float = 5.0) -> Entry:
        """The first journal entry of that type and agent after `after`, or else after the one given last, as
        soon as there is one. With a `data_dir`, the next wait after a restart continues from there.

        Raises Invalid, a ValueError, for a type that no entry has; Unavailable when the server is stopped;
        TimeoutError, with the latest entries, when `timeout_s` (real seconds) have passed.
        """
        return self._entries.wait(after, timeout_s, type=type, agent_id=agent_id)

    async def wait_for_async(self, *, type: str | None = None, agent_id: str | None = None,
                             after: int | None = None, timeout_s: float = 5.0) -> Entry:
        """As wait_for(), for a coroutine: it holds no thread and may be cancelled."""
        return await self._entries.wait_async(after, timeout_s, type=type, agent_id=agent_id)

    def wait_for_request(self, *, route: str | None = None, agent_id: str | None = None,
                         after: int | None = None, timeout_s: float = 5.0) -> Exchange:
        """The first of `requests` to that route, with the agent's token or its id in the path, after number
        `after`, or else after the one given last; otherwise as wait_for()."""
        return self._arrivals.wait(after, timeout_s, route=route, agent_id=agent_id)

    async def wait_for_request_async(self, *, route: str | None = None, agent_id: str | None = None,
                                     after: int | None = None, timeout_s: float = 5.0) -> Exchange:
        """As wait_for_request(), for a coroutine."""
        return await self._arrivals.wait_async(after, timeout_s, route=route, agent_id=agent_id)

    def _read_entries(self, **wanted: Any) -> list[Entry]:
        return self.manager.journal(**wanted)

    def _read_requests(self, *, limit: int, after: int = 0, order: str = "asc", route: str | None = None,
                       agent_id: str | None = None) -> list[Exchange]:
        if self._api.on_exchange is None:
            raise Invalid("requests are kept by a server without data_dir or with a ManualClock")
        found = [each for each in self.requests if each.seq > after and route in (None, each.route)
                 and (agent_id is None or each.is_of(agent_id))]
        return (found if order == "asc" else found[::-1])[:limit]

    def _keep_exchange(self, exchange: Exchange) -> None:
        with self._exchanges_lock:
            last_seq = self._exchanges[-1].seq if self._exchanges else 0
            self._exchanges.append(exchange._replace(seq=last_seq + 1))
        self._wake()

    def reload_certificate(self) -> None:
        """Use the certificate as it is on the disk now for new connections; keep the old one if it is bad."""
        if self._web.tls_context is not None:
            try:
                self._web.tls_context = tls_context(*self._pair)
                log.info("the certificate was read again")
            except StartError as error:
                log.error("%s; the former one stays in use", error)

    def _record_stop(self) -> None:
        with contextlib.suppress(Unavailable):
            self.manager.follow_clock(record=True)
            self._note_run("manager_stopped")

    def _note_run(self, type: str) -> None:
        if self.config.data_dir:  # a temporary folder has no entries of an earlier run
            self.manager.note_run(type)

    def _tick(self) -> bool:
        manager = self.manager
        manager.store.check_files()
        with contextlib.suppress(Unavailable):  # noted by the store
            manager.store.checkpoint()
        if manager.store.failed:
            manager.check_health()
        try:
            manager.forgive_suspend()
            manager.forgive_outage()
            manager.journal_forgiven()
            manager.follow_clock()
            manager.sweep()
        finally:
            if not manager.store.failed:
                manager.check_health()  # after the sweep, which leaves few agents to look at
        self._streams.keep_alive()
        self._renew_certificate()
        manager.prune()
        self._notifier.compose()
        return self.manager.purge()

    @staticmethod
    def _check_daily(store: Store, undo: contextlib.ExitStack) -> None:
        """Look for damage once a day, and at once after a stop that was not clean."""
        over = threading.Event()

        def check() -> None:
            wait_s = _CHECK_EVERY_S if store.checked else 0.0
            while not over.wait(wait_s):
                with contextlib.suppress(Unavailable):  # noted by the store
                    store.check(over.is_set)
                wait_s = _CHECK_EVERY_S

        undo.callback(run_thread("panguard-check", check, over.set))

    def _warn_of_readers(self, path: Path) -> None:
        if path.exists() and path.stat().st_mode & 0o077:
            self.notes.append(f"Warning: {path} can be read by others; chmod 600 it")

    def _own_token(self, folder: Path) -> str:
        path = folder / "token"
        try:
            if path.exists():
                self._warn_of_readers(path)
                return str(_TOKEN.parse(path.read_text("ascii").strip()))
            token = secrets.token_urlsafe(32)
            new = path.with_suffix(".new")
            new.unlink(missing_ok=True)
            private_file(new)
            new.write_text(token + "\n")
            sync_path(new)
            new.replace(path)
            sync_path(folder)
        except ValueError as error:
            raise StartError(f"the admin's token in {path} cannot be used "
                             f"({str(error) or 'it is malformed'}); "
                             "remove the file to get a new one") from None
        self.notes.append("token made")
        return token

    def _listen(self, app: bottle.Bottle, folder: Path, undo: contextlib.ExitStack) -> None:
        """Serve streams and the port, each in a thread, until `undo` ends them, and publish the address."""
        config = self.config
        over = threading.Event()

        def follow() -> None:
            while not over.is_set():
                self._streams.wake.clear()
                try:
                    behind = self._streams.pump()
                except Unavailable:
                    behind = True
                except Exception:
                    log.exception("the event streams failed")
                    behind = False  # the next entry tries again
                self._streams.wake.wait(0.01 if behind else None)

        def end() -> None:
            over.set()
            self._streams.wake.set()

        try:
            self._web = WebServer(self, app, self._api)  # looks the host up
            self._web.bind()
        except (OSError, ValueError) as error:
            advice = "); choose another with --host or --port"
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                advice = "); end what listens there, or choose another with --host or --port"
            raise StartError(f"cannot listen on {config.host} port {config.port} ({error}{advice}") from None
        undo.callback(self._web.stop)
        self._web.tls_context = self._tls(folder)  # after bind(): a start that fails replaces no certificate
        undo.callback(run_thread("panguard-streams", follow, end))
        self._web.start()
        host = _ANY_HOST.get(config.host, config.host)
        if self._web.tls_context and host in ("127.0.0.1", "::1"):
            host = "localhost"
        self.url = self._url_of(host)
        if config.data_dir:  # where the commands look for it
            with contextlib.suppress(OSError):
                private_file(folder / "url")
                (folder / "url").write_text(f"{self.url}\n{self.outer_url or ''}\n")

    def _url_of(self, host: str) -> str:
        scheme = "https" if self._web.tls_context else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._web.port}"

    @property
    def outer_url(self) -> str | None:
        """The URL for other hosts: with the first MANAGER_TLS_NAME, else its address; None on loopback."""
        config = self.config
        if _is_loopback(config.host):
            return None
        own = (outer_address() or socket.gethostname()) if config.host in _ANY_HOST else config.host
        return self._url_of([*config.tls_name, own][0])

    def _tls(self, folder: Path) -> ssl.SSLContext | None:
        config, local = self.config, _is_loopback(self.config.host)
        temporary = config.data_dir is None and not config.tls_cert and local
        if config.tls == "off" or (config.tls == "auto" and temporary):
            return None
        if config.tls_cert and config.tls_key:
            self._pair = (config.tls_cert, config.tls_key)
        else:
            self._own_pair = OwnCertificate(config, folder)
            self._pair = self._own_pair.pair
            try:
                if reason := self._own_pair.fault(self.clock.now().wall_ms):
                    self._own_pair.make(self.clock.now().wall_ms)
                    if reason != "missing":
                        self.notes.append(f"Warning: the former certificate {reason}, so a new one was made; "
                                          f"whoever trusts the former one needs it ({_KEPT_PAIR})")
            except StartError as error:
                if not all(path.exists() for path in self._pair):
                    advice = (f"no certificate could be made ({error}); install openssl, or set "
                              "MANAGER_TLS_CERT and MANAGER_TLS_KEY")
                    if config.tls == "require" or not local:
                        raise StartError(
                            f"{advice}, or have plaintext for everybody with --tls off") from None
                    self.notes.append(f"Warning: {advice}; until then this port speaks plaintext, to this "
                                      "machine only")
                    return None
                self.notes.append(f"Warning: the certificate {self._pair[0]} could not be checked ({error})")
        self._warn_of_readers(self._pair[1])
        return tls_context(*self._pair)

    def _renew_certificate(self) -> None:
        now = self.clock.now()
        if self._own_pair is None or now.tick_ms < self._renewal_tick_ms:
            return
        if self._own_pair.is_current(now.wall_ms):
            return
        self._renewal_tick_ms = now.tick_ms + _RENEWAL_RETRY_MS
        try:
            self._own_pair.make(now.wall_ms)
            self._web.tls_context = tls_context(*self._pair)
            log.warning("the certificate %s was renewed; whoever trusts the former one needs it (%s)",
                        self._pair[0], _KEPT_PAIR)
        except StartError as error:
            log.error("the certificate %s must be renewed, which failed: %s", self._pair[0], error)

    @property
    def certificate(self) -> tuple[Path, str] | None:
        """Where the certificate in use is, and its SHA-256 fingerprint; None in plaintext."""
        if self._web.tls_context is None:
            return None
        chain = self._pair[0].read_text()
        start, end = chain.index(ssl.PEM_HEADER), chain.index(ssl.PEM_FOOTER)
        der = ssl.PEM_cert_to_DER_cert(chain[start:end] + ssl.PEM_FOOTER)
        return self._pair[0], hashlib.sha256(der).digest().hex(":").upper()


_CHECK_EVERY_S = 86_400.0


def _is_loopback(host: str) -> bool:
    address = _as_ip(host)
    return host == "localhost" if address is None else address.is_loopback


def _openssl(*arguments: str, stdin: str = "") -> str:
    """What the openssl command writes. Raises StartError."""
    try:
        done = subprocess.run(
            ["openssl", *arguments], input=stdin, capture_output=True, text=True, timeout=10)
    except FileNotFoundError:
        raise StartError("the openssl command is missing") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise StartError(str(error)) from None
    if done.returncode:
        raise StartError("openssl says " + (done.stderr.strip().splitlines() or ["nothing"])[-1])
    return done.stdout


def outer_address() -> str | None:
    """The address by which this machine reaches others, if it has a route. Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return None


def _interface_addresses() -> list[str]:
    """The addresses of all interfaces, as far as the system tells them; none that hold on one link only."""
    found: list[str] = []
    with contextlib.suppress(OSError, UnicodeError):  # the name may be none
        found += [str(address[0]) for *_, address in socket.getaddrinfo(socket.gethostname(), None)]
    with contextlib.suppress(OSError):
        found += re.findall(r"\|-- (\S+)\n +/32 host LOCAL", Path("/proc/net/fib_trie").read_text())
        found += [str(ipaddress.IPv6Address(bytes.fromhex(line[:32])))
                  for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    return sorted(name for name in set(found) if not name.startswith("fe80:"))


_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # with the address by which this machine reaches it
_RENEWAL_MS = 30 * _DAY_MS  # before its end a certificate is replaced
_RENEWAL_RETRY_MS = 3_600_000
_MOST_NAMES = 100  # in a certificate
_KEPT_PAIR = "the former files are kept, as cert.pem.former and key.pem.former"
_REQUEST = """[req]
distinguished_name = subject
x509_extensions = extensions
prompt = no
[subject]
CN = Panguard Manager
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
subjectAltName = """


class OwnCertificate:
    """The self-signed certificate in the data folder. One that an operator put there is never replaced."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.pair = folder / "cert.pem", folder / "key.pem"
        self._starts_s, self._ends_s = 0, sys.maxsize
        own_names = [socket.gethostname(), outer_address() or "", "localhost"]
        hosts = own_names if config.host in _ANY_HOST else [config.host]
        self._needed = self._fit([*config.tls_name, *hosts])

    @staticmethod
    def _fit(names: Iterable[str]) -> list[str]:
        """The names that may stand in a certificate, each once, addresses in their canonical form."""
        fit: dict[str, None] = {}
        for name in names:
            with contextlib.suppress(ValueError):
                fit[str(_as_ip(name) or _DNS_NAME.parse(name))] = None
        return list(fit)

    def is_current(self, wall_ms: int) -> bool:
        """Whether the certificate holds for 30 days to come."""
        return not self._is_early() and wall_ms + _RENEWAL_MS < self._ends_s * 1000

    def _is_early(self) -> bool:
        """Whether it begins a minute from now or later: the clock that openssl uses was set back."""
        return self._starts_s > time.time() + 60

    def fault(self, wall_ms: int) -> str:
        """Why a new one must be made: "missing", or what was wrong with it; else "". Raises StartError."""
        try:
            whole = [path.exists() and bool(path.read_bytes()) for path in self.pair]
            if not all(whole):
                left = any(path.exists() for path in self.pair)
                return "was empty or without its key" if left else "missing"
        except OSError as error:
            raise StartError(str(error)) from None
        text = _openssl("x509", "-in", str(self.pair[0]), "-noout", "-text")
        if not re.search("Subject: CN ?= ?Panguard Manager\n", text):
            return ""
        self._starts_s, self._ends_s = (ssl.cert_time_to_seconds(instant) for instant in re.findall(
            r"Not (?:Before|After) ?: (.+ GMT)", text))
        if not self.is_current(wall_ms):
            if self._is_early():
                return "was not valid yet (the clock was set back)"
            return "had less than 30 days left"
        names = self._fit(re.findall(r"(?:DNS|IP Address):([^,\s]+)", text))
        if missing := set(self._needed) - set(names):
            return f"did not name {', '.join(sorted(missing))}"
        with contextlib.suppress(StartError):
            tls_context(*self.pair)
            return ""
        return "did not belong to its key"

    def make(self, wall_ms: int) -> None:
        """Make a new pair in the place of the former. Raises StartError."""
        names = self._fit([*self._needed, "localhost", "127.0.0.1", "::1", socket.gethostname(),
                           socket.getfqdn(), outer_address() or "", *_interface_addresses()])[:_MOST_NAMES]
        subjects = ",".join(("IP:" if _as_ip(name) else "DNS:") + name for name in names)
        made = [path.with_suffix(".new") for path in self.pair]
        try:
            for path in made:
                path.unlink(missing_ok=True)
                private_file(path)
            _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                     "-sha256", "-days", "365", "-config", "/dev/stdin", "-out", str(made[0]),
                     "-keyout", str(made[1]), stdin=f"{_REQUEST}{subjects}\n")
            for path in made:
                sync_path(path)
            for path, new in zip(self.pair, made, strict=True):
                if path.exists():
                    path.replace(f"{path}.former")
                new.replace(path)
            sync_path(self.pair[0].parent)
        except OSError as error:
            raise StartError(str(error)) from None
        self._starts_s, self._ends_s = int(time.time()), wall_ms // 1000 + 365 * 86_400


class TlsContext(ssl.SSLContext):
    """A context that knows when its certificate ends, in s since 1970; 0 if that is not known."""

    end_s = 0.0


def tls_context(certificate: Path, key: Path) -> TlsContext:
    """A context that serves a certificate over TLS 1.2 or newer. Raises StartError."""
    context = TlsContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise StartError(f"the certificate {certificate} with the key {key} cannot be used ({error}); both "
                         "must be PEM files that belong together, the key without a password") from None
    with contextlib.suppress(StartError, ValueError):
        end = _openssl("x509", "-in", str(certificate), "-noout", "-enddate")
        context.end_s = float(ssl.cert_time_to_seconds(end.strip().partition("=")[2]))
    return context


########################################################################################################
# 9  Command line ######################################################################################
########################################################################################################


class JsonLines(logging.Formatter):
    """A log record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """`at`, `level`, `logger`, `message`, and the traceback as `error` if there is one."""
        line = {"at": iso(round(record.created * 1000)), "level": record.levelname, "logger": record.name,
                "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def serve(argv: Sequence[str]) -> int:
    """Run a manager until SIGTERM or SIGINT; 0 after a clean stop. Raises SettingError, StartError."""
    commands = "".join(f"  {each.name:<16}{each.summary}\n" for each in COMMANDS.values())
    config = Config.load(argv, os.environ, (
        f"commands, in the place of these options, each with a --help of its own:\n{commands}\nexit status "
        "of a command: 0 done, 1 failed, 2 wrong usage, 3 nothing matched, or something is wrong\n\n"))
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if config.log_format == "json" else logging.Formatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=config.log_level, handlers=[handler])
    for sentence in Config.advice(argv, os.environ):
        log.warning("%s", sentence)
    server = Server(config)
    os.umask(0o077)
    server.on_death = lambda: os.kill(os.getpid(), signal.SIGTERM)
    # Waited for, not handled: a handler may interrupt itself and then wait for its own lock.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        server.start()
        tell_systemd("READY=1")
        with contextlib.suppress(OSError):  # nobody need be reading
            for line in _greeting(server):
                if config.log_format == "json" and line.startswith("Warning: "):
                    log.warning("%s", line.removeprefix("Warning: "))
                else:
                    print(line, flush=True)
        while signal.sigwait(signals) == signal.SIGHUP:
            server.reload_certificate()
        tell_systemd("STOPPING=1")
        server.stop()
    except StartError as error:
        if config.log_format == "text":
            raise
        log.critical("%s", error)
        return 1
    except Exception:
        log.critical("the serving thread died", exc_info=True)
        return 1
    finally:
        while again := signal.sigpending() & signals:  # asked twice is not asked to die
            signal.sigwait(again)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _greeting(server: Server[Any]) -> Iterator[str]:
    config = server.config
    assert config.data_dir is not None
    trust = ""
    yield f"Panguard Manager {__version__} listens on {server.url}"
    if server.outer_url not in (None, server.url):
        yield f"Other hosts reach it at {server.outer_url}"
    yield f"Data directory: {config.data_dir}"
    if server.certificate:
        path, fingerprint = server.certificate
        yield f"Certificate: {path} (SHA-256 {fingerprint})"
        if not config.tls_cert:
            trust = f"--cacert {shlex.quote(str(path))} "
    if config.auth_token:
        yield f"Admin token: as set\nTry: curl {trust}{server.url}/health"
    else:
        path = config.data_dir / "token"
        shown = f" ({server.token})" if "token made" in server.notes and sys.stdout.isatty() else ""
        header = f'-H "Authorization: Bearer $(cat {shlex.quote(str(path))})"'
        yield f"Admin token: in {path}{shown}\nTry: curl {trust}{header} {server.url}/api/agents"
    if config.open_enrollment:
        yield "Open enrolment is on: anyone who reaches this port may register an agent"
    yield from (note for note in server.notes if note.startswith("Warning"))
    if not server.certificate and not _is_loopback(config.host):
        yield ("Warning: tokens cross the network in plaintext; set MANAGER_TLS=auto, or put a TLS proxy in "
               "front")


class CommandError(Exception):
    """A command cannot be done; the text says why and what to do. `status` is the exit status."""

    def __init__(self, text: str, status: int = 1):
        super().__init__(text)
        self.status = status


class Option:
    """An argument of a command, as argparse's `add_argument` takes it."""

    def __init__(self, *names: str, **how: Any) -> None:
        self.names, self.how = names, how


Columns = Mapping[str, "str | Callable[[Any], Any]"]
"""The columns of a table: for each heading the name of a field, or a function of the item."""


class Command(NamedTuple):
    """One command: the parser, `--help`, the README and the shells' completion are made from it.

    `run` returns the exit status, or the data to show: an object, or a list as a table of `columns`.
    """

    run: Callable[[Cli], Any]
    name: str
    summary: str
    example: str
    columns: Columns
    options: tuple[Option, ...]


COMMANDS: dict[str, Command] = {}


def command(name: str, summary: str, *options: Option, example: str,
            columns: Columns | None = None) -> Callable[[Callable[[Cli], Any]], Any]:
    """Add a command; a name of two words is one of a group."""
    def add(run: Callable[[Cli], Any]) -> Callable[[Cli], Any]:
        COMMANDS[name] = Command(run, name, summary, example, columns or {}, options)
        return run
    return add


def duration_ms(text: str) -> int:
    """The ms of a duration such as 30d, 12h, 5m or 90s. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number and its unit, such as 90s, 5m, 12h or 30d")
    return int(match[1]) * {"s": 1000, "m": 60_000, "h": _HOUR_MS, "d": _DAY_MS}[match[2]]


def printable(value: Any) -> str:
    """A value as a terminal may show it: characters that control it are replaced."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(printable, value))
    return _plain("-" if value is None else to_json(value) if isinstance(value, bool) else value)


def display_width(text: str) -> int:
    """The columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF")
               for each in text)


def fitted(text: str, width: int) -> str:
    """The text with blanks after it up to a display width, or cut to it."""
    text = text[:4 * width]
    while display_width(text) > width:
        text = text[:-2] + "…"
    return text + " " * (width - display_width(text))


def counted(number: int) -> str:
    return f"{number} agent" + "s" * (number != 1)


def ago(instant: str) -> str:
    """How long ago an instant of the API was, in words."""
    passed_s = max(0, int(time.time() - instant_ms(instant) / 1000))
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if passed_s >= 2 * unit_s:
            return f"{passed_s // unit_s} {unit} ago"
    return f"{passed_s} s ago"


_COLOURS = {"online": 32, "stale": 33, "offline": 31, "critical": 35, "high": 31, "medium": 33}
_CONNECT_S = 30.0


class Cli:
    """One command being run: its options, and the manager that it asks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        folder = options.data_dir or os.environ.get("MANAGER_DATA_DIR") or "~/.panguard-manager"
        try:
            self.folder = _parse_path(folder)
        except ValueError:
            shown = printable(folder)
            raise CommandError(f"{shown} cannot be a data folder; name one with --data-dir", 2) from None
        self.terminal = bool(sys.stdout) and sys.stdout.isatty()

    def given(self, *names: str) -> dict[str, Any]:
        """The options of these names that were given, by name. Empty text counts as given: it may come from a
        shell variable that is not set. The manager refuses it, and must not take all agents instead."""
        return {name: value for name in names if (value := getattr(self.options, name)) is not None}

    def database(self) -> Path:
        """The data folder's database. Raises CommandError if there is none."""
        path = self.folder / "manager.db"
        if not path.exists():
            raise CommandError(f"there is no manager.db in {self.folder}; name its folder with --data-dir", 2)
        return path

    # Asking the manager

    def _file(self, name: str | Path, *, needed: bool = False) -> str | None:
        """The text of a file in the data folder, or of any other; None if it is missing and not `needed`."""
        try:
            return (self.folder / name).read_text(errors="replace").strip() or None
        except OSError as error:
            if needed or not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise CommandError(*_explained(error)) from None
            return None

    @property
    def url(self) -> str:
        return self._urls()[0].rstrip("/")

    @property
    def outer_url(self) -> str | None:
        """The manager's address for other hosts; None if it listens on this machine only."""
        outer = self._urls()[1:]
        return outer[0].rstrip("/") if outer else None

    def _urls(self) -> list[str]:
        """The manager's address for this machine, and that for others if there is one."""
        given = self.options.url or os.environ.get("MANAGER_URL")
        return [given, given] if given else (self._file("url") or "https://localhost:8443").split()

    @contextlib.contextmanager
    def open(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None,
             timeout_s: float = _CONNECT_S) -> Iterator[http.client.HTTPResponse]:
        """The manager's answer. Raises CommandError if there is none, or it is not 2xx."""
        token = self._token()
        if not re.fullmatch("[!-~]+", token):
            raise CommandError("no token is known: use --token-file, --token, MANAGER_AUTH_TOKEN_FILE, "
                               "MANAGER_AUTH_TOKEN, or --data-dir of a manager here", 2)
        with contextlib.closing(self._connection(timeout_s)) as connection:
            try:
                connection.request(method, path, None if body is None else json.dumps(body).encode(), {
                    "Authorization": f"Bearer {token}", "Content-Type": "application/json",
                    "Connection": "close", **(headers or {})})
                answer = connection.getresponse()
            except ssl.SSLCertVerificationError as error:
                advice = "name its file with --cacert"
                if error.verify_code in (9, 10):  # not yet, or no longer valid
                    advice = "check the clocks here and there"
                elif "mismatch" in error.verify_message:
                    advice = ("use a name that is in it, or start the manager with "
                              f"--tls-name {urlsplit(self.url).hostname}")
                raise CommandError(f"the certificate of {self.url} is not trusted ({error.verify_message}); "
                                   + advice) from None
            except ConnectionRefusedError:
                raise CommandError(f"nothing listens at {self.url}; start the manager, or name its address "
                                   "with --url") from None
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                reason = error or type(error).__name__
                raise CommandError(f"{self.url} cannot be asked ({reason}); check --url") from None
            if answer.status >= 300:
                self._refused(answer)
            with answer:
                yield answer

    def _token(self) -> str:
        given = os.environ.get("MANAGER_AUTH_TOKEN")
        file = self.options.token_file or (None if given else os.environ.get("MANAGER_AUTH_TOKEN_FILE"))
        if file and not self.options.token:
            given = self._file(Path(file).expanduser().absolute(), needed=True)
        return (self.options.token or given or self._file("token") or "").strip().partition(",")[0]

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        with contextlib.suppress(ValueError, http.client.InvalidURL):
            target = urlsplit(self.url)
            host, port = target.hostname or "", target.port
            plain = target.netloc and not (target.username or target.path)
            if plain and target.scheme == "http":
                return http.client.HTTPConnection(host, port, timeout=timeout_s)
            if plain and target.scheme == "https":
                return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._trust())
        raise CommandError("this is no manager's address; --url takes one such as https://localhost:8443", 2)

    @property
    def cacert(self) -> str | None:
        """The file of certificates to trust, if it is not the system's."""
        own = str(self.folder / "cert.pem")
        given = self.options.cacert or os.environ.get("MANAGER_CACERT")
        return given or (own if os.path.exists(own) and not self.options.url else None)

    def _trust(self) -> ssl.SSLContext:
        path = self.cacert
        try:
            return ssl.create_default_context(cafile=path)
        except (OSError, ValueError) as error:
            raise CommandError(f"the certificates in {path} cannot be used ({error}); name a PEM file with "
                               "--cacert", 2) from None

    def _refused(self, answer: http.client.HTTPResponse) -> NoReturn:
        try:
            refusal = json.loads(answer.read())
            reason = str(refusal["error"])
            if (refusal.get("data") or {}).get("status") == "unhealthy":
                reason = f"the manager is unhealthy: {reason}"
        except (ValueError, KeyError, TypeError, OSError, RecursionError, http.client.HTTPException):
            reason = f"it answers {answer.status} {answer.reason}; is it a Panguard Manager?"
        if answer.status == 401:
            reason = "the token is wrong; name the file of the manager's with --token-file"
        raise CommandError(f"{self.url}: {printable(reason)}", 2 if answer.status == 400 else 1)

    def ask(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """The `data` of the manager's answer; values of `query` that are None are left out."""
        given = {name: "true" if value is True else value
                 for name, value in query.items() if value is not None}
        try:
            with self.open(method, path + "?" * bool(given) + urlencode(given, doseq=True), body) as answer:
                return json.loads(answer.read())["data"]
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise CommandError(f"{self.url} broke off its answer ({error}); try again") from None

    def agent(self, name: str) -> Any:
        """The agent, in detail, that has this id or hostname, or alone begins so. Raises CommandError."""
        found = self.ask("GET", "/api/agents", q=name, detail=True) if name else []
        for fits in (str.__eq__, str.startswith):
            matching = [each for each in found if fits(each["id"], name) or fits(each["hostname"], name)]
            if len(matching) == 1:
                return matching[0]
            if matching:
                raise CommandError(f"{name!r} means {len(matching)} agents: " + printable(
                    [f"{each['id']} ({each['hostname']})" for each in matching[:5]]), 3)
        raise CommandError(f"no agent is called {name!r}; `agents` lists them", 3)

    def agent_id(self) -> str | None:
        """The id of the agent that the option --agent names, or None without it."""
        return None if self.options.agent is None else str(self.agent(self.options.agent)["id"])

    # Telling the caller

    def say(self, text: str = "") -> None:
        print(text, flush=True)

    def coloured(self, text: str) -> str:
        """The text in the colour of its first word, on a terminal."""
        colour = _COLOURS.get(text.strip())
        if not colour or not self.terminal or os.environ.get("NO_COLOR"):
            return text
        return f"\033[{colour}m{text}\033[0m"

    def show(self, data: Any, columns: Columns) -> int:
        """Show data as JSON with `--json`, the ids of a list with `-q`, else a list as a table, and an object
        as a line for each field. Returns the exit status, 3 for an empty list."""
        if self.options.json:  # escaped where it could control a terminal
            self.say(json.dumps(data, indent=2, ensure_ascii=self.terminal))
        elif isinstance(data, dict):
            width = max(map(len, data), default=0)
            for name, value in data.items():
                if dict in map(type, value if isinstance(value, list) else [value]):
                    value = to_json(value)
                self.say(f"{name:<{width}}  {self.coloured(printable(value))}")
        elif self.options.quiet:
            for each in data:
                self.say(printable(next(iter(each.values()))))
        else:
            self._table(data, columns)
        return 0 if data or isinstance(data, dict) else 3

    def _table(self, data: Sequence[Any], columns: Columns) -> None:
        rows = [list(columns)]
        for each in data:
            values = (each[read] if isinstance(read, str) else read(each) for read in columns.values())
            rows.append(list(map(printable, values)))
        widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
        most = shutil.get_terminal_size().columns - 2 * (len(widths) - 1) if self.terminal else sum(widths)
        while sum(widths) > most and max(widths) > 8:
            widths[widths.index(max(widths))] -= 1
        for row in rows:
            cells = [self.coloured(fitted(cell, width)) for cell, width in zip(row, widths, strict=True)]
            self.say("  ".join(cells).rstrip())

    def confirm(self, question: str) -> bool:
        """Whether to do it: `--yes`, or the answer at a terminal. Raises CommandError without a terminal."""
        if self.options.yes:
            return True
        if not sys.stdin.isatty():
            raise CommandError(f"{question} Add --yes: there is no terminal to ask at", 2)
        print(question + " [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def progress(self, part: float) -> None:
        """Say on a terminal how much of a long work is done."""
        if sys.stderr.isatty():
            print(f"\r{part:4.0%}", end="\n" if part >= 1 else "", file=sys.stderr, flush=True)


_FILTERS = (
    Option("--status", choices=[str(status) for status in Status], help="agents of this status"),
    Option("--tag", action="append", help="agents with this tag; may be repeated: with all of them"),
    Option("--org-id", help="agents of this organization"), Option("--os", help="agents with this system"),
    Option("--version", help="agents of this version"),
    Option("--find", metavar="TEXT", dest="q", help="text in hostname, id, address or a tag"),
    Option("--silent", metavar="TIME", type=duration_ms, dest="silent_ms",
           help="agents silent for at least this long, such as 90s, 5m, 12h or 30d"))
_FILTER_NAMES = ("status", "tag", "org_id", "os", "version", "q", "silent_ms")
_AGENTS = Option("agent", nargs="*", help="id or hostname, the beginning of one if no other agent begins so, "
                                          "or a pattern of hostnames such as 'web-*'")
_DRY_RUN = Option("--dry-run", action="store_true", help="only say what would change")
_AGENT_ARGUMENT = Option("agent", help="id or hostname of an agent, or the beginning of one")
_YES = Option("--yes", action="store_true", help="do not ask")


@command("status", "totals, silent agents, threats and the policy; 3 if an agent is silent", example="status")
def _status_command(cli: Cli) -> int:
    cli.ask("GET", "/health")
    overview = cli.ask("GET", "/api/overview")
    offline, stale = (cli.ask("GET", "/api/agents", status=status) for status in ("offline", "stale"))
    silent = [*offline, *stale]
    if cli.options.json or cli.options.quiet:
        cli.show({**overview, "silent": silent} if cli.options.json else silent, {})
        return 3 if silent else 0
    cli.say(f"{counted(overview['totalAgents'])}: " + ", ".join(
        f"{overview[status + 'Agents']} {status}" for status in ("online", "stale", "offline")))
    for each in silent:
        cli.say(f"  {cli.coloured(each['status'])}  {printable(each['hostname'])} ({each['id']}), last seen "
                f"{ago(each['lastHeartbeat'])}")
    day = overview["threatSummary"]["last24h"]
    by_severity = ", ".join(f"{day[severity]} {severity}" for severity in SEVERITIES)
    cli.say(f"{day['total']} threats in 24 h: {by_severity}")
    if overview["activePolicyVersion"]:
        agents = cli.ask("GET", "/api/agents", detail=True)
        have = sum(each["pendingPolicies"] == 0 for each in agents)
        cli.say(f"policy {overview['activePolicyVersion']} (acknowledged by {have} of {len(agents)})")
    return 3 if silent else 0


def _policy_state(agent: Mapping[str, Any]) -> str | None:
    version: str | None = agent["activePolicyVersion"]
    return f"{version or 'none'}, {agent['pendingPolicies']} pending" if agent["pendingPolicies"] else version


_AGENT_COLUMNS: Columns = {
    "STATUS": "status", "HOSTNAME": "hostname", "ID": "id", "TAGS": lambda agent: agent["tags"] or None,
    "OS": "os", "VERSION": "version", "ADDRESS": "ip", "POLICY": _policy_state,
    "LAST SEEN": lambda agent: ago(agent["lastHeartbeat"])}


@command("agents", "list agents; 3 if there is none", *_FILTERS,
         Option("--sort", choices=[sign + name for name in SORTS for sign in ("", "-")], metavar="FIELD",
                help=f"one of {', '.join(SORTS)}; --sort=-cpu begins with the highest"),
         Option("--watch", action="store_true", help="show them again every two seconds, until Ctrl-C"),
         example="agents --status offline --sort lastHeartbeat")
def _agents_command(cli: Cli) -> int:
    while True:
        found = cli.ask("GET", "/api/agents", detail=True, **cli.given("sort", *_FILTER_NAMES))
        if cli.options.watch and cli.terminal:
            cli.say("\033[H\033[2J")
        status = cli.show(found, _AGENT_COLUMNS)
        if not cli.options.watch:
            return status
        time.sleep(2)


command("agent", "show one agent, and why it has its status", _AGENT_ARGUMENT, example="agent web-1")(
    lambda cli: cli.agent(cli.options.agent))


def _named(cli: Cli, names: Sequence[str]) -> list[str]:
    """The ids of the agents that names or patterns of hostnames mean."""
    ids: list[str] = []
    for name in names:
        if set("*?[") & set(name):
            agents = cli.ask("GET", "/api/agents")
            ids += [each["id"] for each in agents if fnmatch.fnmatchcase(each["hostname"], name)]
        else:
            ids.append(cli.agent(name)["id"])
    if names and not ids:
        raise CommandError(f"no hostname is like {printable(names)}", 3)
    return list(dict.fromkeys(ids))


def _change_agents(cli: Cli, question: str, done: str, change: Mapping[str, Any]) -> int:
    filters = cli.given(*_FILTER_NAMES)
    if bool(cli.options.agent) == bool(filters):
        raise CommandError("name either agents or at least one filter such as --tag or --silent, not both", 2)
    ids = _named(cli, cli.options.agent)
    parts: list[dict[str, Any]] = [{"ids": ids[at:at + 1000]} for at in range(0, len(ids), 1000)]
    names = {each["id"]: each["hostname"] for each in cli.ask("GET", "/api/agents")}

    def bulk(dry_run: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"matched": 0, "changed": 0, "ids": []}
        for part in parts or [{"filter": filters}]:
            answer = cli.ask("POST", "/api/agents/bulk", {**part, **change, "dryRun": dry_run})
            found = {name: found[name] + answer[name] for name in found}
        return found

    found = bulk(True)
    shown = printable(", ".join(names.get(each, each) for each in found["ids"][:20]))
    shown += ", …" if found["changed"] > 20 else ""
    if found["changed"] and not cli.options.dry_run:
        if not cli.confirm(f"{question} {counted(found['changed'])} ({shown})?"):
            return 1
        found = bulk(False)
    if cli.options.json:
        cli.show(found, {})
    elif not found["changed"]:
        cli.say(f"{counted(found['matched'])} found, and none to change")
    else:
        cli.say(f"{counted(found['changed'])} {'would be ' * cli.options.dry_run}{done}: {shown}")
    return 0 if found["matched"] else 3


@command("tag", "add tags to agents, or remove tags", _AGENTS, *_FILTERS,
         Option("--add", action="append", metavar="TAG",
                help="tag to add, may be repeated; not with --remove"),
         Option("--remove", action="append", metavar="TAG", help="tag to remove, may be repeated"),
         _DRY_RUN, _YES, example="tag 'web-*' --add production --yes")
def _tag_command(cli: Cli) -> int:
    if (cli.options.add is None) == (cli.options.remove is None):
        raise CommandError("give either --add or --remove", 2)
    if cli.options.add:
        return _change_agents(cli, "Add tags to", "tagged", {"addTags": cli.options.add})
    return _change_agents(cli, "Remove tags of", "untagged", {"removeTags": cli.options.remove})


command("deregister", "remove agents from the fleet", _AGENTS, *_FILTERS, _DRY_RUN, _YES,
        example="deregister --silent 30d --yes")(
    lambda cli: _change_agents(cli, "Deregister", "deregistered", {"deregister": True}))

_FOLLOW = (
    Option("--follow", action="store_true", help="show new ones as they come, until Ctrl-C"),
    Option("--exec", metavar="PROGRAM", help="with --follow: run this program for each instead of showing "
                                             "it, without a shell; its standard input is the JSON"))


@command("threats", "list threat events, the newest first; 3 if there is none",
         Option("--severity", choices=SEVERITIES, help="severity"), Option("--type", help="type"),
         Option("--agent", help="id or hostname of an agent"),
         Option("--org-id", help="organization"), Option("--source-ip", help="address that they came from"),
         Option("--file-hash", help="hash of the file they are about"),
         Option("--state", choices=THREAT_STATES, help="state"),
         Option("--limit", type=int, default=50, help="most events to show, up to 200"),
         Option("--summary", action="store_true", help="sum up the last 24 hours instead"), *_FOLLOW,
         example="threats --severity critical",
         columns={"RECEIVED": "receivedAt", "SEVERITY": "severity", "TYPE": "type", "HOSTNAME": "hostname",
                  "ID": "id", "SOURCE": lambda threat: source_address(threat["details"]), "STATE": "state",
                  "NOTE": "note"})
def _threats_command(cli: Cli) -> Any:
    if cli.options.summary:
        return cli.ask("GET", "/api/threats/summary", **cli.given("org_id"))
    wanted = cli.given("severity", "type", "org_id", "source_ip", "file_hash", "state")
    wanted["agent_id"] = cli.agent_id()
    _follow(cli, _new_threats(cli, wanted), lambda threat: "  ".join((
        threat["receivedAt"], threat["severity"], threat["type"], threat["hostname"], threat["id"],
        source_address(threat["details"]) or "-")))
    return cli.ask("GET", "/api/threats", limit=cli.options.limit, **wanted)


command("threat", "set the state of a threat event, or its note", Option("id", help="id of the event"),
        Option("--state", choices=THREAT_STATES, help="state to set"), Option("--note", help="note to set"),
        example="threat evt_000000000001 --state acknowledged --note 'seen by Lin'")(
    lambda cli: cli.ask("PATCH", "/api/threats/" + quote(cli.options.id, safe=""),
                        cli.given("state", "note")))


def _new_threats(cli: Cli, wanted: Mapping[str, Any]) -> Iterator[Any]:
    """Threat events as they are reported, without end."""
    last = next((each["id"] for each in cli.ask("GET", "/api/threats", limit=1)), "")
    for _ in _followed(cli, {"type": "threats_reported"}):
        new: list[Any] = []
        page = cli.ask("GET", "/api/threats", limit=200, **wanted)
        while page and page[-1]["id"] > last:
            new += page
            page = cli.ask("GET", "/api/threats", limit=200, before=page[-1]["id"], **wanted)
        new += [each for each in page if each["id"] > last]
        yield from reversed(new)
        last = new[0]["id"] if new else last


def _follow(cli: Cli, items: Iterator[Any], line: Callable[[Any], str]) -> None:
    """With --follow: show each item as it comes, without end, or give it to the program of --exec. Raises
    CommandError unless the program can be run."""
    try:
        program = shlex.split(cli.options.exec or "")
    except ValueError:
        program = []
    runs = program and cli.options.follow and shutil.which(program[0])
    if cli.options.exec is not None and not runs:
        raise CommandError("--exec needs --follow, and names a program that can be run, without a shell", 2)
    for each in items if cli.options.follow else ():
        if program:
            done = subprocess.run(program, input=json.dumps(each) + "\n", text=True)
            if done.returncode:
                print(f"panguard-manager: {program[0]} ended with {done.returncode}", file=sys.stderr)
        else:
            as_json = cli.options.json
            cli.say(json.dumps(each, ensure_ascii=cli.terminal) if as_json else printable(line(each)))


def _followed(cli: Cli, wanted: Mapping[str, Any]) -> Iterator[Any]:
    """Entries as they are written, without end; a stream that ends is resumed after the last one received."""
    last, path = "", "/api/events/stream?" + urlencode(wanted, doseq=True)
    while True:
        headers = {"Last-Event-ID": last} if last else {}
        try:
            with cli.open("GET", path, headers=headers, timeout_s=60) as stream:
                while line := stream.readline(2**21):
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    last = value if name == "id" else last
                    if name == "data" and (entry := json.loads(value))["type"] != "connected":
                        yield entry
        except (OSError, http.client.HTTPException):
            pass
        except CommandError:
            if not last:  # nothing was received yet
                raise
        if not last:
            raise CommandError(f"{cli.url} broke off its stream; is it a Panguard Manager?")
        print(f"panguard-manager: the stream of {cli.url} ended; trying again", file=sys.stderr)
        time.sleep(1)


command("policy list", "list the policies that were issued, the newest first", example="policy list",
        columns={"VERSION": "version", "NAME": "name",
                 "FOR": lambda policy: policy.get("agent_id") or policy.get("org_id") or "all agents",
                 "RULES": lambda policy: len(policy["rules"]), "ISSUED": "createdAt", "ID": "id"})(
    lambda cli: cli.ask("GET", "/api/policy"))


def _policy_of(cli: Cli, version: str) -> Any:
    for each in cli.ask("GET", "/api/policy"):
        if version in (each["version"], each["version"][1:], each["id"]):
            return each
    raise CommandError(f"no policy has the version {version!r}; `policy list` lists them", 3)


@command("policy show", "show a policy, and which agents have not acknowledged it",
         Option("version", nargs="?", help="its version; without it, the one for all"),
         example="policy show v1")
def _policy_show_command(cli: Cli) -> Any:
    version = cli.options.version
    policy = _policy_of(cli, version) if version else cli.ask("GET", "/api/policy/active")
    if policy is None:
        raise CommandError("no policy is in force for all agents; `policy list` lists those issued", 3)
    agent_id, org_id = policy.get("agent_id"), policy.get("org_id")
    agents = [each for each in cli.ask("GET", "/api/agents", detail=True)
              if agent_id in (None, each["id"]) and org_id in (None, each["org_id"])]
    waiting = [each["hostname"] for each in agents
               if int((each["activePolicyVersion"] or "v0")[1:]) < int(policy["version"][1:])]
    return {**policy, "acknowledgedBy": f"{len(agents) - len(waiting)} of {len(agents)}", "waiting": waiting}


@command("policy push", "issue a policy",
         Option("file", help="JSON with `name` and `rules`; - is standard input"),
         Option("--org-id", help="for the agents of this organization"),
         Option("--agent", help="for this agent"), _DRY_RUN, _YES, example="policy push policy.json --yes")
def _policy_push_command(cli: Cli) -> Any:
    try:
        raw = sys.stdin.buffer.read() if cli.options.file == "-" else Path(cli.options.file).read_bytes()
        if len(raw) > _MOST_BYTES:
            raise Invalid(f"it must have at most {_MOST_BYTES} bytes")
        body = parse_object(raw.removeprefix("\ufeff".encode()))
    except (OSError, Invalid) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"the policy in {cli.options.file} cannot be used ({reason})", 2) from None
    agent_id = cli.agent_id()
    scope = cli.given("org_id") if agent_id is None else {"agent_id": agent_id, **cli.given("org_id")}
    policy = {**body, **scope}
    dry_run = body.get("dryRun") or cli.options.dry_run
    if not dry_run and policy.get("agent_id") is policy.get("org_id") is None:
        effect = cli.ask("POST", "/api/policy", {**policy, "dryRun": True})
        if not cli.confirm(f"Issue this policy for all agents ({effect['agents']} now)?"):
            return 1
    return cli.ask("POST", "/api/policy", {**policy, "dryRun": dry_run})


@command("policy drop", "drop the policy of one agent", _AGENT_ARGUMENT, _YES,
         example="policy drop web-1 --yes")
def _policy_drop_command(cli: Cli) -> Any:
    agent = cli.agent(cli.options.agent)
    if not cli.confirm(f"Drop the policy of {agent['hostname']} ({agent['id']})?"):
        return 1
    return cli.ask("DELETE", f"/api/policy/agent/{agent['id']}")


@command("policy diff", "show what differs between the rules of two versions",
         Option("old", help="a version"), Option("new", help="another version"), example="policy diff v1 v2")
def _policy_diff_command(cli: Cli) -> Any:
    old, new = (_policy_of(cli, version)["rules"] for version in (cli.options.old, cli.options.new))
    removed, added = [rule for rule in old if rule not in new], [rule for rule in new if rule not in old]
    if cli.options.json:
        return {"removed": removed, "added": added}
    for sign, rules in (("-", removed), ("+", added)):
        for rule in rules:
            cli.say(f"{sign} {printable(to_json(rule))}")
    if not removed and not added:
        cli.say("no difference")
    return 0


def _what(entry: Mapping[str, Any]) -> str:
    """The fields of an entry that not all entries have, as text."""
    common = {"seq", "at", "type", "agentId", "org_id", "actor", "hostname"}
    return " ".join(f"{name}={value if isinstance(value, (str, int)) else to_json(value)}"
                    for name, value in entry.items() if name not in common)


@command("events", "show the journal, or follow it",
         Option("--type", action="append", choices=ENTRY_TYPES, metavar="TYPE",
                help=f"type of entry, may be repeated: {', '.join(ENTRY_TYPES)}"),
         Option("--agent", help="id or hostname of an agent"),
         Option("--limit", type=int, default=50, help="most entries to show, up to 200"), *_FOLLOW,
         example="events --type agent_offline --type agent_online",
         columns={"SEQ": "seq", "AT": "at", "TYPE": "type",
                  "AGENT": lambda entry: entry.get("hostname") or entry["agentId"],
                  "WHO": lambda entry: list(entry["actor"].values()),
                  "WHAT": _what})
def _events_command(cli: Cli) -> Any:
    wanted = cli.given("type")
    if agent_id := cli.agent_id():
        wanted["agent_id"] = agent_id
    _follow(cli, _followed(cli, wanted), lambda entry: "  ".join((
        str(entry["seq"]), entry["at"], entry["type"], entry.get("hostname") or entry["agentId"] or "-",
        _what(entry))))
    return cli.ask("GET", "/api/events", limit=cli.options.limit, order="desc", **wanted)[::-1]


@command("enroll issue", "issue a token that registers agents",
         Option("--ttl", type=duration_ms, default=_DAY_MS, metavar="TIME", dest="ttlMs",
                help="how long it holds, at most 90d: 12h, 7d"),
         Option("--uses", type=int, default=1, dest="maxUses", metavar="USES",
                help="how many agents it registers"),
         Option("--org-id", help="organization of these agents"), Option("--note", help="what it is for"),
         Option("--tag", action="append", dest="tags", metavar="TAG",
                help="tag of these agents, may be repeated"),
         example="enroll issue --uses 10 --ttl 7d --tag web")
def _enroll_issue_command(cli: Cli) -> Any:
    if not 0 < cli.options.ttlMs <= 90 * _DAY_MS:
        raise CommandError("--ttl must be at least 1s and at most 90d", 2)
    issued = cli.ask("POST", "/api/enroll-tokens", cli.given("ttlMs", "maxUses", "org_id", "note", "tags"))
    if cli.options.json:
        return issued
    if cli.options.quiet:
        cli.say(issued["token"])
        return 0
    if not cli.outer_url:
        cli.say(f"No other host reaches {cli.url}: start the manager with --host 0.0.0.0, or put its proxy's "
                "address into this line.")
    url = cli.outer_url or cli.url
    trust = "--cacert manager.pem " if cli.cacert and url.startswith("https:") else ""
    cli.say(f"Token {issued['id']} registers {counted(issued['maxUses'])} until {issued['expiresAt']}. "
            f"On the agent's host{', which has the certificate as manager.pem' if trust else ''}:")
    cli.say(f"curl {trust}-X POST {url}/api/agents/register -H 'Authorization: Bearer {issued['token']}' "
            "-H 'Content-Type: application/json' -d "
            "'{\"hostname\": \"'$(hostname)'\", \"os\": \"linux\", \"version\": \"1.2.0\"}'")
    return 0


command("enroll list", "list the tokens that register agents", example="enroll list", columns={
    "ID": "id", "EXPIRES": "expiresAt", "USES": lambda token: f"{token['uses']} of {token['maxUses']}",
    "ORG": "org_id", "TAGS": lambda token: token["tags"] or None, "NOTE": "note"})(
    lambda cli: cli.ask("GET", "/api/enroll-tokens"))
command("enroll revoke", "revoke a token that registers agents", Option("id", help="id of the token"),
        example="enroll revoke enr_000000000000")(
    lambda cli: cli.ask("DELETE", f"/api/enroll-tokens/{quote(cli.options.id, safe='')}"))


@command("notify test",
         "send a notification to every receiver, and show what each answers; 3 if one does not take it",
         example="notify test")
def _notify_test_command(cli: Cli) -> int:
    answers = cli.ask("POST", "/api/notify/test")
    cli.show(answers, {"RECEIVER": "receiver", "DELIVERED": "delivered", "ANSWER": "answer"})
    return 0 if all(each["delivered"] for each in answers) else 3


# What an entry of the journal means for the agent it is about, and what to do: for `doctor`.
_ADVICE = {
    "agent_refused": "its requests are refused ({reason}): give it the token of its own registration, or "
                     "register it again",
    "identity_conflict": "another agent, {otherAgentId}, has the same machine_id: a cloned machine; give one "
                         "a new one",
    "agent_reregistered": "it registered again, formerly as {formerHostname} from {formerIp}: nothing to do "
                          "if that was intended",
    "agent_offline": "it went offline, last seen {lastSeen}",
    "agent_stale": "it missed a heartbeat, last seen {lastSeen}",
    "agent_updated": "it changed to version {version}", "agent_online": "it came back, from {ip}",
    "threats_reported": "it reported {count} threats, the worst {maxSeverity}"}


@command("doctor", "say why an agent is silent or troubled, and what to do; 3 if one is",
         Option("agent", nargs="*",
                help="id or hostname, or the beginning of one; without one, all silent agents"),
         example="doctor web-1")
def _doctor_command(cli: Cli) -> int:
    cli.ask("GET", "/health")
    agents = [cli.agent(name) for name in cli.options.agent] or [
        each for each in cli.ask("GET", "/api/agents", detail=True) if each["status"] != "online"]
    common = Counter(each["version"] for each in cli.ask("GET", "/api/agents")).most_common(1)
    found = [_examined_agent(cli, agent, common) for agent in agents]
    if cli.options.json:
        cli.show([shown for shown, _ in found], {})
    for shown, _ in [] if cli.options.json else found:
        cli.say(printable(f"{shown['hostname']} ({shown['id']})"))
        for each in shown["findings"]:
            cli.say(f"  {each['at']}  {printable(each['finding'])}")
    if not agents:
        cli.say("no agent is silent")
    return 3 if any(troubled for _, troubled in found) else 0


def _advice(entry: Mapping[str, Any]) -> str:
    text = _ADVICE[entry["type"]].format_map(defaultdict(lambda: "?", entry))
    if "suppressed" in entry:
        text += f" ({entry['suppressed']} entries were suppressed before it: it changes too often)"
    return text


def _cause(cli: Cli, agent: Mapping[str, Any], refused: Sequence[Mapping[str, Any]]) -> str:
    """Why an agent has its status, and what to do.

    `refused` are its entries `agent_refused` since it was last heard, the newest first."""
    reason = f"{agent['status']}: {agent['statusReason']}"
    if agent["lastHeartbeat"] == agent["registeredAt"]:
        reason = reason.replace("last heartbeat", "not heard since it registered at")
    if agent["status"] == "online":
        return f"{reason}; silence makes it stale at {agent['staleAt']}"
    if refused:
        return f"{reason}; since {refused[-1]['at']} " + _advice(refused[0])
    return (f"{reason}: see whether the machine runs, the agent on it is started, and it reaches "
            f"{cli.outer_url or cli.url}")


def _examined_agent(cli: Cli, agent: Mapping[str, Any],
                    common: Sequence[tuple[str, int]]) -> tuple[dict[str, Any], bool]:
    """The findings about an agent, as `doctor --json` shows them, and whether something is wrong with it.

    The cause of its status comes first, then what is newest. `common` is the version that most agents run,
    with the number of these agents."""
    findings: list[dict[str, str]] = []

    def tell(at: str, finding: str) -> None:
        findings.append({"at": at, "finding": finding})
    now = iso(round(time.time() * 1000))
    entries = [entry for entry in cli.ask("GET", "/api/events", agent_id=agent["id"], order="desc", limit=200)
               if entry["type"] != "agent_updated" or "version" in entry]
    refused = [entry for entry in entries
               if entry["type"] == "agent_refused" and entry["at"] >= agent["lastHeartbeat"]]
    first = {"at": agent["statusSince"], "finding": _cause(cli, agent, refused)}
    if agent["pendingPolicies"]:
        tell(now, f"it has policy {agent['activePolicyVersion'] or 'none'}, and "
             f"{agent['pendingPolicies']} newer ones wait for it: see the agent's log")
    for version, number in common:
        if number > 1 and agent["version"] != version:
            tell(now, f"it runs version {agent['version']}, {counted(number)} run "
                 f"{version}: upgrade it, or the others")
    for event in cli.ask("GET", "/api/threats", agent_id=agent["id"], limit=1):
        skew_ms = instant_ms(event["timestamp"] or event["receivedAt"]) - instant_ms(event["receivedAt"])
        if abs(skew_ms) > 120_000:
            tell(event["receivedAt"], f"its clock or delivery is off by {skew_ms // 1000} s: set its clock")
    newest: dict[str, Any] = {}
    for entry in entries:
        is_newest = newest.setdefault(entry["type"], entry) is entry and entry["type"] in _ADVICE
        if is_newest and not (entry in refused and agent["status"] != "online"):  # _cause() names it
            tell(entry["at"], _advice(entry))
    findings.sort(key=lambda each: each["at"], reverse=True)
    shown = {"id": agent["id"], "hostname": agent["hostname"], "findings": [first, *findings]}
    return shown, agent["status"] != "online" or "agent_refused" in newest


@command("backup", "write a checked backup of the data folder, also while the manager runs",
         Option("file", help="file to write, mode 0600"),
         Option("--db-only", action="store_true", help="without the token and the certificate"),
         example="backup panguard.backup")
def _backup_command(cli: Cli) -> Any:
    target, db_only = Path(cli.options.file), cli.options.db_only
    held = back_up(cli.database().parent, target, cli.progress, db_only=db_only)
    names = [] if db_only else [name for name in _KEPT[:-1] if (cli.folder / name).exists()]
    return {"file": str(target.resolve()), "holds": ["manager.db", *names], **held}


@command("restore", "put a backup in the place of the data folder's files, which are kept in a folder in it",
         Option("file", help="a backup"), _YES, example="restore panguard.backup --yes")
def _restore_command(cli: Cli) -> Any:
    if not cli.confirm(f"Put {cli.options.file} in the place of what {cli.folder} holds?"):
        return 1
    held, kept = restore(Path(cli.options.file), cli.folder)
    return {**held, "formerFiles": str(kept)} if kept else held


@command("check", "look for damage in the data folder's database, or in a backup; 3 if there is some",
         Option("file", type=Path, nargs="?", help="the backup to look at"), example="check")
def _check_command(cli: Cli) -> Any:
    backup = cli.options.file
    try:
        if backup is None:
            held = examine(cli.database())
        else:
            beside = backup.parent if os.access(backup.parent, os.W_OK) else None
            with tempfile.TemporaryDirectory(prefix=".panguard-", dir=beside) as work:
                held = unpack(backup, Path(work))
    except Unavailable as error:
        raise CommandError(str(error), 3) from None
    if cli.options.json:
        return held
    cli.say("sound: " + ", ".join(f"{name} {count}" for name, count in held.items()))
    return 0


@command("demo", "run a manager with 40 simulated agents, until Ctrl-C",
         Option("--port", type=int, default=0, help="port to listen on; 0 takes a free one"),
         example="demo --port 8080")
def _demo_command(cli: Cli) -> NoReturn:
    with Server(port=cli.options.port, heartbeat_timeout_ms=10_000) as server:
        demo = Demo(server.manager)
        cli.say(f"Open {server.url} and sign in with the token {server.token}; Ctrl-C ends it, and all is "
                "forgotten")
        while True:
            demo.step()
            time.sleep(1)


class Demo:
    """A fleet of 40 agents with a life of its own; each step() is a second of it."""

    def __init__(self, manager: Manager, seed: int = 1) -> None:
        self.manager = manager
        self.chance = random.Random(seed)
        self.second = 0
        self.silent_until: dict[str, int] = {}
        self.agents: list[str] = []
        for number in range(40):
            role = ("web", "db", "mail", "office", "build")[number % 5]
            system = ("linux", "linux", "darwin", "win32")[number % 4]
            tags = [role, "production"] if number % 3 else [role]
            self.agents.append(manager.register(
                f"{role}-{number // 5 + 1}", system, "1.2.0" if number % 7 else "1.1.4", org_id="acme",
                ip=f"10.0.{number % 5}.{10 + number}", tags=tags).agent.id)
        manager.create_policy("Baseline", [{"type": "block_ip", "config": {"ip": "198.51.100.7"}},
                                           {"type": "alert_threshold", "config": {"severity": "high"}}])

    def step(self) -> None:
        """A second passes: some agents send heartbeats; at times one falls silent, or an attack comes."""
        self.second += 1
        for number, agent in enumerate(self.agents):
            if (self.second + number) % 3 == 0 and self.silent_until.get(agent, 0) <= self.second:
                cpu, memory = (round(self.chance.uniform(*bounds), 1) for bounds in ((2, 60), (30, 70)))
                self.manager.heartbeat(agent, cpu=cpu, memory=memory, uptime=3600.0 + self.second)
                if self.second > 5 and number % 9:
                    self.manager.agent_policy(agent)
        if self.second % 15 == 5:
            silent = self.chance.choice(self.agents)
            self.silent_until[silent] = self.second + self.chance.choice([20, 40, 90])
        if self.second % 20 == 8:
            kind, severity = self.chance.choice([("brute_force", "high"), ("port_scan", "medium"),
                                                 ("malware", "critical"), ("suspicious_login", "low")])
            address = f"203.0.113.{self.chance.randrange(1, 250)}"
            event = {"type": kind, "severity": severity, "details": {"sourceIp": address}}
            for agent in self.chance.sample(self.agents, self.chance.choice([1, 2, 4])):
                self.manager.report_events(agent, [event])


# The parser and the shells' completion


_COMMON = (
    Option("--url", help="address of the manager (MANAGER_URL, else that of the data folder's)"),
    Option("--token", help="a token (MANAGER_AUTH_TOKEN, else the data folder's)"),
    Option("--token-file", metavar="FILE", help="a file that holds a token (MANAGER_AUTH_TOKEN_FILE)"),
    Option("--cacert", metavar="FILE", help="certificates to trust (MANAGER_CACERT, else the data "
                                               "folder's)"),
    Option("--data-dir", metavar="FOLDER", help="data folder of a manager here (MANAGER_DATA_DIR)"),
    Option("--json", action="store_true", help="write the API's own data as JSON"),
    Option("-q", "--quiet", action="store_true", help="write ids alone"))


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands but `serve`, from the table of them."""
    parser = argparse.ArgumentParser(prog="panguard-manager", allow_abbrev=False)
    groups = {"": parser.add_subparsers(dest="command", required=True)}
    for each in COMMANDS.values():
        group, _, name = each.name.rpartition(" ")
        if group not in groups:
            members = groups[""].add_parser(group, allow_abbrev=False)
            groups[group] = members.add_subparsers(dest="one", metavar="COMMAND", required=True)
        added = groups[group].add_parser(
            name, help=each.summary, description=each.summary[0].upper() + each.summary[1:] + ".",
            epilog=f"example: panguard-manager {each.example}", allow_abbrev=False)
        where = added.add_argument_group("where and how")
        for one in _COMMON:
            where.add_argument(*one.names, **one.how)
        for one in each.options:
            added.add_argument(*one.names, **one.how)
        added.set_defaults(of=each)
    return parser


_COMPLETIONS = {
    "bash": 'complete -W "{words}" -o default panguard-manager\n',
    "zsh": "#compdef panguard-manager\n_arguments '*: :({words})'\n",
    "fish": "complete -c panguard-manager -a '{words}'\n"}


def completion(shell: str) -> str:
    """What a shell evaluates to complete the words of the commands and their options."""
    words = {word for name in ("serve", *COMMANDS) for word in name.split()}
    of_commands = (name for each in COMMANDS.values() for one in each.options for name in one.names)
    options = {name for name in of_commands if name[0] == "-"}
    options |= {each.metadata["option"] for each in fields(Config) if each.metadata["option"]}
    return _COMPLETIONS[shell].format(words=" ".join([*sorted(words), *sorted(options), "--help", "--json"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or the manager: the first word says which, `serve` unless it is the name of another.

    The exit status is 0 when it is done, 1 when it failed, 2 for wrong usage, 3 when nothing matched or
    something is wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a hostname that the terminal cannot show stops no command
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(words)
    except BrokenPipeError:  # who read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 0 if {"--follow", "--watch", "demo"} & set(words) else 130
    except Exception as error:
        text, status = _explained(error)
        print(f"panguard-manager: {printable(text)}", file=sys.stderr)
        return status


def _run(words: Sequence[str]) -> int:
    if words[:1] == ["--completion"]:
        if len(words) != 2 or words[1] not in _COMPLETIONS:
            raise CommandError(f"--completion takes one of {', '.join(_COMPLETIONS)}", 2)
        print(completion(words[1]), end="", flush=True)
        return 0
    known = {"serve", *(name.partition(" ")[0] for name in COMMANDS)}
    if words and words[0] not in known and not words[0].startswith("-"):
        raise CommandError(f"there is no command {words[0]!r}; {did_you_mean(words[0], sorted(known))}", 2)
    if not words or words[0] not in known - {"serve"}:
        return serve(words[1:] if words[:1] == ["serve"] else words)
    options = _parser().parse_args(words)
    cli = Cli(options)
    found = options.of.run(cli)
    return found if isinstance(found, int) else cli.show(found, options.of.columns)


def _explained(error: Exception) -> tuple[str, int]:
    """What to say of an error that ended a command, and the exit status."""
    if isinstance(error, CommandError):
        return str(error), error.status
    if isinstance(error, (SettingError, ManagerError)):
        return str(error), 2 if isinstance(error, SettingError) else 1
    if isinstance(error, PermissionError):
        return (f"this user may not use {error.filename or 'the output'}; run the command as the owner of "
                "the data folder, such as with sudo"), 1
    if isinstance(error, OSError):
        return f"{error.filename or 'the output'}: {error.strerror or error}", 1
    log.debug("a command failed", exc_info=True)
    return f"the answer is not as expected ({error!r:.80}); is it a Panguard Manager of this version?", 1


########################################################################################################
# 10  Dashboard ########################################################################################
########################################################################################################

# One page without a library or a build step. What came from an agent goes in as text nodes only.
_STYLE = r""":root{color-scheme:light dark;--bg:light-dark(#f5f6f8,#0e1216);--card:light-dark(#fff,#151a20);
--text:light-dark(#1a2027,#e2e7ec);--soft:light-dark(#586370,#98a4b0);--line:light-dark(#dde1e6,#29313a);
--hover:light-dark(#f0f3f7,#1b222a);--accent:light-dark(#0a5cc2,#74b3ff);--edge:light-dark(#b9c1ca,#3d4854);
--green:light-dark(#18733a,#52c77a);--amber:light-dark(#8f5200,#e3a53f);--red:light-dark(#bd1e2c,#ff7f7c);
--rose:light-dark(#98103f,#ff6fa0);--blue:light-dark(#4a6076,#93abc3);
font:14px/1.45 system-ui,"Noto Sans CJK TC","PingFang TC",sans-serif}
*{box-sizing:border-box}
[hidden]{display:none!important}
body{margin:0;background:var(--bg);color:var(--text);font-variant-numeric:tabular-nums}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--accent);outline-offset:1px;border-radius:3px}
header{display:flex;align-items:center;gap:0 14px;padding:0 20px;background:var(--card);
border-bottom:1px solid var(--line);position:sticky;top:0;z-index:2}
.name{font-weight:650;white-space:nowrap;display:flex;gap:9px;align-items:center;color:inherit}
.mark{flex:none;width:26px}
nav{display:flex;flex:1;overflow-x:auto;scrollbar-width:none;gap:2px}
nav a{padding:14px 10px 11px;color:var(--soft);white-space:nowrap;border-bottom:3px solid transparent;
outline-offset:-3px!important}
nav [aria-current=page]{color:var(--text);border-color:var(--accent);font-weight:600}
.tools,.lamp,.bar,.counts button,.state{display:flex;align-items:center;gap:6px}
.lamp{white-space:nowrap;color:var(--soft)}
.lamp i{width:9px;height:9px;border-radius:50%;background:var(--green)}
.lamp .reconnecting{background:none;border:2px solid var(--amber)}
main{max-width:1560px;margin:auto;padding:16px 20px 48px;outline:0}
h1{font-size:20px;margin:0 auto 0 0;overflow-wrap:anywhere}
h2{font-size:14px;margin:0 0 8px}
.bar{flex-wrap:wrap;gap:8px;margin:0 0 12px}
.card,.scroll,dialog{background:var(--card);border:1px solid var(--line);border-radius:8px;min-width:0}
.card{padding:14px 16px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:12px;
margin-bottom:12px}.wide{grid-column:1/-1}
button,input,select,textarea,.menu>summary{font:inherit;color:inherit;background:var(--card);
border:1px solid var(--edge);border-radius:6px;padding:4px 10px;min-height:32px}
button{cursor:pointer;white-space:nowrap}
button:hover,tbody tr:hover,tr:focus-within{background:var(--hover)}
button:disabled{opacity:.5;cursor:default}
button.main{background:var(--accent);color:var(--card);border-color:var(--accent);font-weight:600}
button.danger,.error{color:var(--red)}
button.plain,th button{border:0;background:none;padding:4px 7px;color:var(--soft);min-height:0}
th button{padding:0;font-weight:600}
[type=checkbox]{min-height:0;width:15px;height:15px;margin:0}
[type=search]{width:250px}
.bar input:not([type]){width:116px}
textarea{width:100%;min-height:190px}
.counts{display:flex;flex-wrap:wrap;gap:8px;margin-bottom:12px}
.counts button{gap:8px;padding:7px 14px;border-color:var(--line);border-radius:8px}
.counts b{font-size:20px;line-height:1.2}
.counts [aria-pressed=true]{border-color:var(--accent);box-shadow:inset 0 0 0 1px var(--accent)}
.scroll{overflow-x:auto}
.card .scroll{border:0}
table{border-collapse:collapse;width:100%}
th{text-align:left;font-size:12.5px;color:var(--soft);white-space:nowrap}
th,td{padding:6px 10px;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
td{overflow-wrap:break-word;max-width:420px}time{white-space:nowrap}
.n{text-align:right;white-space:nowrap}
.host{font-weight:600;min-width:90px;display:inline-block}
.nowrap,.state{white-space:nowrap;overflow-wrap:normal}
.soft,dt,summary,.empty{color:var(--soft)}
.state{display:inline-flex;font-weight:600}
.state svg{width:11px;height:11px;fill:currentColor}
.state+.soft{margin-left:6px;font-size:12.5px;white-space:nowrap}
.online{color:var(--green)}.stale,.medium{color:var(--amber)}.offline,.high{color:var(--red)}
.critical{color:var(--rose)}.low{color:var(--blue)}
.tag{display:inline-block;background:var(--hover);border:1px solid var(--line);border-radius:4px;
padding:0 6px;margin:1px 4px 1px 0;font-size:12.5px;max-width:190px;overflow:hidden;text-overflow:ellipsis;
white-space:nowrap;vertical-align:middle}
.meter{display:inline-block;width:40px;height:6px;background:var(--line);margin-right:7px;vertical-align:1px}
.meter i,.hbar{display:block;height:100%;background:var(--blue)}
.hbar{height:4px}
.chart{width:100%;height:90px;fill:currentColor}.strip{height:12px;margin-bottom:12px}
.changed{animation:fade 1.6s}
@keyframes fade{from{background:light-dark(#fff2c4,#3a3316)}}
.bulk{position:sticky;bottom:8px;margin:8px 0;border-color:var(--accent)}
.empty{padding:36px 20px;text-align:center}
.empty b{display:block;color:var(--text);font-size:16px}
pre,code,textarea{font:12px/1.55 ui-monospace,monospace}
pre{background:var(--bg);border:1px solid var(--line);border-radius:6px;padding:9px 11px;margin:8px 0;
white-space:pre-wrap;overflow-wrap:anywhere;text-align:left}
dl{display:grid;grid-template-columns:max-content 1fr;gap:5px 18px;margin:0}
dd{margin:0;overflow-wrap:anywhere;min-width:0}
summary{cursor:pointer;padding:4px 0}
.foot{margin-top:14px}
.menu>div{position:absolute;z-index:3;display:grid;gap:5px;translate:-40px}
dialog{color:inherit;padding:20px;max-width:min(600px,94vw);max-height:84vh}
.signin,.signin label{display:grid;gap:9px}
.signin{max-width:380px;margin:12vh auto;padding:28px}

.toast{position:fixed;left:50%;bottom:20px;transform:translateX(-50%);background:var(--text);color:var(--bg);
border-radius:8px;padding:9px 16px;max-width:92vw;z-index:5}
.toast:empty{display:none}
.ends{display:flex;justify-content:space-between;gap:8px}
@media(prefers-reduced-motion:reduce){.changed{animation:none}}
@media(max-width:1180px){.c-ip,.c-org_id,.c-os{display:none}}
@media(max-width:980px){header{flex-wrap:wrap;padding:6px 12px 0}.tools{margin-left:auto}
nav{order:3;flex:1 0 100%}nav a{padding:7px 9px 6px}main{padding:12px 12px 40px}
.c-policy,.c-memory{display:none}}
@media(max-width:640px){.c-tags,.c-version,.c-cpu,.c-recentThreats,.roomy{display:none}th,td{padding:6px 7px}
[type=search]{width:100%}.host{min-width:0}.counts{display:grid;grid-template-columns:1fr 1fr}
.c-status .state+.soft{display:block;margin-left:17px}}
p a{text-decoration:underline}"""

SCRIPT = r""""use strict";
const root = document.documentElement;
const MONTH_MS = 2592000000;
let zh = (localStorage.lang || navigator.language).startsWith("zh");
let theme = localStorage.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
let token = sessionStorage.token || "";
let role = "admin";
let paths = {};      // what the manager offers, from its OpenAPI document
let overview = {};
let skewMs = 0;      // the manager's clock less the reader's
let lastSeq = 0;     // number of the latest journal entry heard
let view = {};       // name, id, load(live)
let shownMs = 0;     // when what is shown was read

// The text in the reader's language; each %s is replaced by an argument.
const t = (text, ...args) => (zh && ZH[text] || text).replace(/%s/g, () => args.shift());

// An element, "tag.class". Every text goes in as a text node, never as HTML.
function h(what, props, ...kids) {
  const [tag, name] = what.split(".");
  const svg = /^(svg|path|rect|circle|title)$/.test(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  if (props?.constructor !== Object) [props, kids] = [{}, [props, ...kids]];
  node.append(...kids.flat(3).filter((kid) => kid || kid === 0));
  if (name) node.setAttribute("class", name);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked") node[key] = value;
    else if (value || value === 0) node.setAttribute(key, value === true ? "" : value);
  }
  return node;
}
const btn = (text, onclick, kind = "", more = {}) => h("button." + kind, {onclick, ...more}, text);
const card = (title, ...kids) => h("section.card", h("h2", title), kids);
const tag = (text, ...more) => h("span.tag", text, more);
const head = (title, ...kids) => h("div.bar", h("h1", t(title)), kids);
const to = (text, name, query) => h("a", {href: link(name, query)}, text);
const box = (checked, change, more) => h("input",
  {type: "checkbox", checked, onchange: ({target}) => change(target.checked), ...more});
const named = (label) => ({"aria-label": t(label), placeholder: t(label), maxlength: 64});
const put = (node, ...kids) => node?.replaceChildren(...kids);
const $ = (selector) => document.querySelector(selector);
const fact = (label, ...value) => [h("dt", t(label)), h("dd", value)];
const empty = (title, ...rest) => h("div.empty", h("b", title), rest);
const row = (...cells) => h("tr", cells.map((cell) => h("td", cell)));
const table = (heads, rows, more = {}) => h("div.scroll",
  h("table", more, h("thead", h("tr", heads.map((head) => h("th", {scope: "col"}, t(head))))),
    h("tbody", rows)));

const now = () => Date.now() + skewMs;
const locale = () => zh ? "zh-Hant" : "en-GB";
const number = (value) => (value || 0).toLocaleString(locale());
function span(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  return s < 60 ? t("%s s", s) : s < 3600 ? t("%s min", s / 60 | 0) : s < 172800 ? t("%s h", s / 3600 | 0)
    : t("%s d", s / 86400 | 0);
}
// An instant in the reader's zone, with the UTC one on hover.
const time = (iso, text, more) => iso ? h("time", {datetime: iso, title: iso, ...more}, text) : "–";
const stamp = (iso) => time(iso,
  new Date(iso).toLocaleString(locale(), {dateStyle: "short", timeStyle: "medium"}));
// How long ago, kept up to date by tick(). Heartbeats are not in the journal: `capMs` is the most it can be.
const living = (iso, form, capMs) => time(iso, age(iso, form, capMs), {"data-form": form,
  "data-cap": capMs});
function age(iso, form, capMs) {
  const ms = now() - Date.parse(iso);
  return t(form, capMs && ms > capMs ? "< " + span(capMs) : span(ms));
}
const shape = (...kids) => h("svg", {viewBox: "0 0 12 12", "aria-hidden": "true"}, kids);
const SHAPES = {online: "M6 0a6 6 0 1 0 0 12a6 6 0 1 0 0-12", stale: "M6 0L12 12H0z",
  offline: "M0 0H12V12H0z"};
const state = (status) => h("span", {class: "state " + status},
  shape(h("path", {d: SHAPES[status]})), t(status));
const mark = (bad) => h("svg.mark",
  {viewBox: "0 0 32 32", "aria-hidden": "true", xmlns: "http://www.w3.org/2000/svg"},
  h("path", {d: "M3 14a13 13 0 0 1 26 0l-13-5zM3 18l13 5 13-5a13 13 0 0 1-26 0z", fill: "#2f7fe0"}),
  bad && h("circle", {cx: 23, cy: 9, r: 9, fill: "#d3212f"}));

// The API

const may = (method, path) => paths[path]?.[method] && (role === "admin" || method === "get");
const takes = (path, name) => paths[path].get.parameters.find((each) => each.name === name)?.schema;
function address(path, query) {
  const given = new URLSearchParams(Object.entries(query || {})
    .filter(([, value]) => value || value === 0 || value === false));
  return path + (given.size ? "?" + given : "");
}
async function api(method, path, body) {
  const answer = await fetch(path, {method, cache: "no-store", body: body && JSON.stringify(body), headers: {
    Authorization: "Bearer " + token, ...body && {"Content-Type": "application/json"}}}).catch(() => {
    throw new Error(t("The manager does not answer. Is it running?"));
  });
  const json = await answer.json();
  if (answer.status === 401) signOut(t("The token is wrong or no longer valid."));
  if (!json.ok) throw new Error(json.error);
  return {data: json.data, total: json.pagination?.total, caller: answer.headers.get("X-Caller")};
}
const get = async (path, query) => (await api("GET", address(path, query))).data;
const one = (path, id) => path + encodeURIComponent(id);

async function getOverview() {
  const {data, caller} = await api("GET", "/api/overview");
  overview = data;
  role = caller || "admin";
  skewMs = Date.parse(data.updatedAt) - Date.now();
  const bad = data.offlineAgents;
  document.title = (bad ? t("%s offline", bad) + " – " : "") + "Panguard Manager";
  $("link").href = "data:image/svg+xml,"
    + encodeURIComponent(new XMLSerializer().serializeToString(mark(bad)));
}

const latest = (filter, limit) => get("/api/events", {...filter, order: "desc", limit});

// Live: one stream a browser, held by the tab that has the lock and shared with the others

const tabs = new BroadcastChannel("panguard-manager");
let lamp = "reconnecting";
let leading = false;
let session = null;

function setLamp(to) {
  if (lamp !== to && to === "live") soon();
  lamp = to;
  if (leading) tabs.postMessage({lamp, lastSeq});
  tick();
}
function hear(entry) {
  if (entry.seq <= lastSeq) return;
  lastSeq = entry.seq;
  if (leading) tabs.postMessage({entry});
  soon();
}
tabs.onmessage = ({data}) => {
  if (leading && data.hello) setLamp(lamp);
  if (leading || !session) return;
  if (data.lamp) {
    lastSeq ||= data.lastSeq;
    setLamp(data.lamp);
  }
  if (data.entry) hear(data.entry);
};

function follow() {
  session = new AbortController();
  const {signal} = session;
  const lead = async () => {
    leading = true;
    await stream(signal);
    leading = false;
  };
  if (!navigator.locks) return lead(); // plain HTTP from another machine has none: each tab has its stream
  tabs.postMessage({hello: true});
  return navigator.locks.request("panguard-manager", {signal}, lead).catch(() => {});
}

async function stream(signal) {
  for (let tries = 0; !signal.aborted; tries++) {
    const once = new AbortController();
    const stop = () => once.abort();
    signal.addEventListener("abort", stop);
    let silence = setTimeout(stop, 20000);
    try {
      const answer = await fetch("/api/events/stream", {signal: once.signal, cache: "no-store", headers: {
        Authorization: "Bearer " + token, ...lastSeq && {"Last-Event-ID": lastSeq}}});
      if (answer.status === 401) signOut(t("The token is wrong or no longer valid."));
      if (!answer.ok) throw answer;
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let text = "", part; !(part = await reader.read()).done;) {
        clearTimeout(silence);
        silence = setTimeout(stop, 40000); // a keepalive comes every 15 s
        const events = (text + part.value).split("\n\n");
        text = events.pop();
        for (const event of events) {
          const field = (name) => new RegExp("^" + name + ": (.*)$", "m").exec(event)?.[1];
          if (field("event") === "connected") lastSeq ||= +field("id");
          else if (field("data")) hear(JSON.parse(field("data")));
        }
        tries = 0;
        if (lamp !== "live") setLamp("live");
      }
    } catch {
      // lost: try again below
    }
    clearTimeout(silence);
    if (signal.aborted) return;
    setLamp("reconnecting");
    await new Promise((done) => setTimeout(done,
      Math.min(15000, 500 * 2 ** tries) * (1 + Math.random()) / 2));
  }
}

// Read again what is shown: at most every 2 s, and only while somebody looks at it.
let timer = 0;
function soon() {
  if (timer || !view.load || document.hidden) return;
  timer = setTimeout(refresh, Math.max(200, shownMs + 2000 - Date.now()));
}
async function refresh() {
  clearTimeout(timer);
  timer = 0;
  await attempt(async () => {
    await getOverview();
    await view.load?.(true);
    shownMs = Date.now();
  });
}
document.addEventListener("visibilitychange", soon);

function tick() {
  for (const each of document.querySelectorAll("[data-form]")) {
    const text = age(each.dateTime, each.dataset.form, +each.dataset.cap);
    if (each.textContent !== text) each.textContent = text;
  }
  const live = lamp === "live";
  put($(".lamp"), h("i", {class: lamp}), t(live ? "Live" : "Reconnecting"), live ? ""
    : h("span.roomy", t("as of %s ago", span(Date.now() - shownMs))));
}
setInterval(tick, 1000);

// The frame: sign-in, views, dialogs, keys

function say(text) {
  const toast = $(".toast");
  toast.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => put(toast), 8000);
}
// Do something; what fails, or what it gives, is shown as a message.
async function attempt(work) {
  try {
    const done = await work();
    if (done) say(done);
    return done;
  } catch (error) {
    return token && say(error.message);
  }
}
const act = async (work) => await attempt(work) && refresh();

function frame(...content) {
  root.lang = locale();
  root.style.colorScheme = theme;
  put(document.body, ...content, h("div.toast", {role: "status"}));
}
const switches = () => [
  btn(zh ? "English" : "中文", () => {
    zh = !zh;
    localStorage.lang = locale();
    start();
  }, "plain", {lang: zh ? "en" : "zh-Hant"}),
  btn(t(theme === "dark" ? "Light" : "Dark"), () => {
    localStorage.theme = theme = theme === "dark" ? "light" : "dark";
    start();
  }, "plain")];

function signOut(message) {
  token = "";
  sessionStorage.removeItem("token");
  session?.abort();
  session = null;
  lastSeq = 0;
  start(message);
}

function signIn(message = "") {
  const field = h("input", {type: "password", id: "token", autocomplete: "current-password", required: true});
  const problem = h("div.error", {role: "alert"}, message);
  frame(h("main", h("form.card signin", {onsubmit: async (event) => {
    event.preventDefault();
    token = field.value.trim();
    try {
      await getOverview();
      sessionStorage.token = token;
      start();
    } catch (error) {
      token = "";
      $(".error").textContent ||= error.message;
    }
  }}, h("div.name", mark(), h("h1", "Panguard Manager")), h("label", {for: "token"}, t("Token"), field),
  problem, h("button.main", t("Sign in")), h("div.soft", t("An admin's or a viewer's token.")),
  h("div", switches()))));
  field.focus();
}

async function start(message) {
  view = {};
  if (!token) return signIn(message);
  try {
    await getOverview();
    paths = (await (await fetch("/openapi.json")).json()).paths;
  } catch (error) {
    if (!token) return undefined;
    frame(h("main", empty(error.message)));
    return setTimeout(start, 3000);
  }
  frame(h("header",
    h("a.name", {href: "#fleet", "aria-label": "Panguard Manager"}, mark(), h("span.roomy", "Panguard")),
    h("nav", {"aria-label": t("Views")}, Object.entries(VIEWS).filter(([, [title]]) => title)
      .map(([name, [title]]) => h("a", {href: "#" + name}, t(title)))),
    h("div.tools", h("span.lamp"), role !== "admin" && tag(t(role)), switches(),
      btn(t("Sign out"), () => signOut(), "plain"))),
  h("main", {tabindex: -1}));
  tick();
  if (!session) follow();
  return show();
}

// The address's #… is `view/id?filters`.
function where() {
  const [path, query] = location.hash.slice(1).split("?");
  const [name, id] = path.split("/");
  return {name: VIEWS[name] ? name : "fleet", id, params: new URLSearchParams(query)};
}
const link = (name, query, id) => address("#" + name + (id ? one("/", id) : ""), query);
const param = (name) => where().params.get(name) || "";
function setParams(changes, replace) {
  const {name, id, params} = where();
  const target = link(name, {...Object.fromEntries(params), page: "", ...changes},
    id && decodeURIComponent(id));
  if (!replace) location.hash = target;
  else {
    history.replaceState(null, "", target);
    show();
  }
}
const show = () => token && attempt(async () => {
  const {name, id} = where();
  for (const each of document.querySelectorAll("nav a")) {
    each.setAttribute("aria-current",
      each.hash === "#" + (name === "agent" ? "fleet" : name) ? "page" : "false");
  }
  const main = $("main");
  main.ariaBusy = true;
  if (view.name !== name || view.id !== id) {
    const place = h("div"); // its own: what a view that was left still reads is drawn nowhere
    put(main, place);
    view = {name, id};
    VIEWS[name][1](view, place, id && decodeURIComponent(id));
  }
  await view.load();
  for (const each of main.querySelectorAll("[data-param]")) {
    const value = param(each.dataset.param);
    const missing = each.options && ![...each.options].some((option) => option.value === value);
    if (missing) each.append(h("option", value));
    if (each.options || each !== document.activeElement) each.value = value;
  }
  shownMs = Date.now();
  main.ariaBusy = false;
});
addEventListener("hashchange", show);

// Ask before something is done. Gives whether the person agrees.
const ask = (title, body, yes, kind = "main") => new Promise((resolve) => {
  const dialog = h("dialog", {"aria-label": title, onclose: () => {
    resolve(dialog.returnValue === "yes");
    dialog.remove();
  }}, h("h2", title), body, h("div.bar foot", yes && btn(yes, () => dialog.close("yes"), kind),
    btn(t(yes ? "Cancel" : "Close"), () => dialog.close(""))));
  document.body.append(dialog);
  dialog.showModal();
});

const KEYS = {"/": "Find", j: "Next row", k: "Former row", x: "Tick the row", "?": "Show the keys"};
addEventListener("keydown", (event) => {
  const {key, target} = event;
  if (!KEYS[key] || event.ctrlKey || event.metaKey || event.altKey || $("dialog")) return;
  if (target.matches("input:not([type=checkbox]), textarea, select")) return;
  const rows = [...document.querySelectorAll("main tbody tr")];
  const at = rows.findIndex((row) => row.contains(target));
  event.preventDefault();
  if (key === "/") $("[type=search], [data-param]")?.focus();
  else if (key === "x") rows[at]?.querySelector("[type=checkbox]")?.click();
  else if (key === "?") {
    ask(t("Keys"), h("dl", Object.entries(KEYS).map(([each, what]) => fact(each, t(what)))));
  } else rows[Math.max(0, Math.min(rows.length - 1, at + (key === "j" ? 1 : -1)))]
    ?.querySelector("a, button")?.focus();
});

// Parts that several views use

// A control bound to a parameter of the address. Typing replaces the address, choosing adds to the history.
function filter(name, label, choices) {
  const path = {fleet: "agents", threats: "threats", journal: "events"}[view.name];
  if (name !== "period" && !takes("/api/" + path, name)) return "";
  const bound = {"aria-label": t(label), "data-param": name};
  if (choices) {
    return h("select", {...bound, onchange: (event) => setParams({[name]: event.target.value})},
      h("option", {value: ""}, t(label)), choices.map(([value, text]) => h("option", {value}, text)));
  }
  return h("input", {...bound, type: name === "q" && "search", placeholder: t(label), oninput: ({target}) => {
    clearTimeout(filter.timer);
    filter.timer = setTimeout(() => setParams({[name]: target.value.trim()}, true), 250);
  }});
}
const agentLink = (id, hostname) => id ? h("a.host", {href: link("agent", {}, id)}, hostname || id) : "–";
const quoted = (text) => "'" + text.replaceAll("'", "'\\''") + "'";
const asCurl = (path, method, body) => ["curl", method && "-X " + method,
  '-H "Authorization: Bearer $TOKEN"',
  body && "-H 'Content-Type: application/json' -d " + quoted(JSON.stringify(body)),
  quoted(location.origin + path)].filter(Boolean).join(" ");
const asCommand = (words, options = {}) => ["panguard-manager " + words,
  ...Object.entries(options).filter(([, value]) => value).map(([name, value]) =>
    "--" + name.replace("q", "find").replace("_ms", "").replace("_", "-") + "="
    + quoted(name === "silent_ms" ? value / 1000 + "s" : value + ""))].join(" ");
const trust = () => location.protocol === "https:" && h("p.soft", t("If self-signed: --cacert cert.pem"));
const foot = (...lines) => h("details.foot", h("summary", t("As curl, as command")),
  lines.map((line) => h("pre", line)), trust());
const pager = (page, total) => total > LIMIT && h("div.bar",
  btn(t("Former page"), () => setParams({page: page - 1}), "", {disabled: page < 2}),
  t("Page %s of %s", page, Math.ceil(total / LIMIT)),
  btn(t("Next page"), () => setParams({page: page + 1}), "", {disabled: page * LIMIT >= total}));
const registerLine = (credential) => asCurl("/api/agents/register", "POST", {hostname: "HOST", os: "linux",
  version: "1.2.0"}).replace("$TOKEN", credential).replace("HOST", "'\"$(hostname)\"'");
// Fleet

const LIMIT = 100;
const hidden = new Set((localStorage.hidden || "").split(","));
const selected = new Map(); // id: hostname
let newest = "";            // the newest version in the fleet

function meter(value) {
  if (typeof value !== "number") return "–";
  const fill = h("i");
  fill.style.width = value + "%";
  return [h("span.meter", fill), Math.round(value) + " %"];
}
const beatCap = (a) => a.status === "online" && a.staleAt
  ? Date.parse(a.staleAt) - Date.parse(a.lastHeartbeat) : 0;
const policyState = (a) => a.pendingPolicies ? h("span.stale", t("%s pending", a.pendingPolicies))
  : a.activePolicyVersion ? a.activePolicyVersion + " ✓" : h("span.soft", t("none"));
// name (also the key to sort by), heading, cell, whether it is a number
const COLUMNS = [
  ["status", "Status", (a) => [state(a.status),
    a.statusSince && h("span.soft", living(a.statusSince, "for %s"))]],
  ["hostname", "Hostname", (a) => agentLink(a.id, a.hostname)],
  ["tags", "Tags", (a) => a.tags.map((each) => tag(each))], ["os", "OS", (a) => a.os],
  ["version", "Version", (a) => a.version === newest ? a.version
    : h("span.stale", {title: t("The newest in the fleet is %s", newest)}, a.version + " ↑")],
  ["ip", "Address", (a) => h("span.nowrap", a.ip)], ["policy", "Policy", policyState],
  ["recentThreats", "Threats 24 h", (a) => a.recentThreats
    ? to(number(a.recentThreats), "threats", {agent_id: a.id}) : a.recentThreats ?? "–", true],
  ["cpu", "CPU", (a) => meter(a.cpu), true], ["memory", "Memory", (a) => meter(a.memory), true],
  ["lastHeartbeat", "Last heartbeat", (a) => living(a.lastHeartbeat, "%s ago", beatCap(a)), true],
  ["org_id", "Org", (a) => a.org_id || "–"]];
const SORTS = ["hostname", "lastHeartbeat", "status", "version", "recentThreats", "cpu", "memory"];
const fleetFilter = () => Object.fromEntries(["status", "tag", "os", "version", "org_id", "q", "silent_ms"]
  .map((name) => [name, param(name)]).filter(([, value]) => value));

function buildFleet(view, main) {
  const counts = h("div.counts");
  const body = h("div");
  const bulk = h("div.card bar bulk");
  const [name, every] = [h("input", named("New tag")), box()];
  const end = h("div");
  const changes = btn("", () => draw());
  let rows = new Map(); // by agent's id: what was drawn
  let [items, total, layout] = [[], 0, ""];
  const columns = COLUMNS.slice(2).map(([name, label]) => h("label", box(!hidden.has(name), (on) => {
    hidden[on ? "delete" : "add"](name);
    localStorage.hidden = [...hidden];
    draw();
  }), " ", t(label)));
  main.append(head("Fleet", changes, filter("q", "Find hostname, id, address or tag"),
    filter("tag", "Tag"), filter("os", "OS", Object.keys(overview.agentsByOs).map((os) => [os, os])),
    filter("version", "Version"), filter("org_id", "Org"),
    h("details.menu roomy", h("summary", t("Columns")), h("div.card", columns)),
    btn(t("Export CSV"), () => exportCsv())), counts, body, bulk, end);

  function pick(id, hostname, on) {
    if (on) selected.set(id, hostname);
    else selected.delete(id);
    const ticked = rows.get(id)?.node.querySelector("input");
    if (ticked) ticked.checked = on;
    drawBulk();
  }

  function draw() {
    changes.hidden = true;
    const [sort, page] = [param("sort") || "status", +param("page") || 1];
    const bulky = may("post", "/api/agents/bulk");
    const shown = COLUMNS.filter(([name]) => !hidden.has(name)
      && (name !== "org_id" || items.some((a) => a.org_id)));
    const kept = layout === (layout = shown.join() + newest) ? rows : new Map();
    rows = new Map(items.map((a) => {
      const text = JSON.stringify(a);
      const old = kept.get(a.id);
      return [a.id, old?.text === text ? old : {text, node: h("tr", {class: old && "changed"},
        bulky && h("td", box(selected.has(a.id), (on) => pick(a.id, a.hostname, on),
          {"aria-label": t("Select %s", a.hostname)})),
        shown.map(([name, , cell, numeric]) =>
          h("td", {class: "c-" + name + (numeric ? " n" : "")}, cell(a))))}];
    }));
    const heads = shown.map(([name, label, , numeric]) => {
      const way = sort === name ? "ascending" : sort === "-" + name && "descending";
      return h("th", {scope: "col", class: "c-" + name + (numeric ? " n" : ""), "aria-sort": way},
        SORTS.includes(name) && takes("/api/agents", "sort")
          ? btn(t(label) + (way ? way === "ascending" ? " ▲" : " ▼" : ""),
            () => setParams({sort: (way === "ascending" ? "-" : "") + name})) : t(label));
    });
    const all = box(items.every((a) => selected.has(a.id)),
      (on) => items.forEach((a) => pick(a.id, a.hostname, on)), {"aria-label": t("Select this page")});
    const {activeElement} = document;
    if (!items.length) {
      put(body, location.hash.includes("?")
        ? empty(t("No agent matches."), h("a", {href: "#fleet"}, t("Show all")))
        : empty(t("No agents yet"), t("Register the first one. On its machine, run:"),
          h("pre", registerLine("TOKEN"))));
    } else {
      if (!body.querySelector("tbody")) {
        put(body, table([], [], {"aria-label": t("Fleet"),
          onmouseleave: () => changes.hidden || draw()}), h("div"));
      }
      const [top, rest] = body.querySelectorAll("thead, tbody");
      put(top, h("tr", bulky && h("th", {scope: "col"}, all), heads));
      const nodes = [...rows.values()].map((row) => row.node);
      if (nodes.length !== rest.children.length || nodes.some((node, at) => node !== rest.children[at])) {
        put(rest, ...nodes);
      }
      put(body.lastChild, h("p.soft", t("%s agents", number(total))), pager(page, total) || "");
    }
    if (activeElement !== document.activeElement) { // it was moved or drawn anew
      const label = activeElement.getAttribute("aria-label") || activeElement.textContent;
      [...body.querySelectorAll("a, button, input")].find((each) =>
        (each.getAttribute("aria-label") || each.textContent) === label)?.focus();
    }
    drawBulk();
  }

  function drawBulk() {
    bulk.hidden = !selected.size;
    const title = t("%s selected", selected.size);
    if (bulk.contains(document.activeElement)) return put(bulk.firstChild, title);
    const tagging = (label, field) => btn(t(label), () => name.value.trim() ? change(every.checked,
      t(label) + ": " + name.value.trim(), {[field]: [name.value.trim()]}) : name.focus());
    return put(bulk, h("b", title), total > items.length && h("label", every, " ",
      t("all %s that match", number(total))) || "", name, tagging("Add tag", "addTags"),
    tagging("Remove tag", "removeTags"),
    btn(t("Deregister") + "…", () => change(every.checked, t("Deregister"), {deregister: true}), "danger"),
    btn(t("Clear"), () => {
      selected.clear();
      layout = "";
      draw();
    }, "plain"));
  }

  const change = (every, title, what) => act(async () => {
    const given = fleetFilter();
    if (given.tag) given.tag = [given.tag];
    if (given.silent_ms) given.silent_ms = +given.silent_ms;
    const which = every ? {filter: Object.keys(given).length ? given : {all: true}}
      : {ids: [...selected.keys()]};
    const {data} = await api("POST", "/api/agents/bulk", {...which, ...what, dryRun: true});
    const names = new Map([...items.map((a) => [a.id, a.hostname]), ...selected]);
    if (!await ask(title, [h("p", t("%s match, %s would change.", data.matched, data.changed)),
      h("p", data.ids.slice(0, 20).map((id) => tag(names.get(id) || id)), data.ids.length > 20 && "…")],
    title, what.deregister && "danger")) return "";
    const done = (await api("POST", "/api/agents/bulk", {...which, ...what})).data;
    if (what.deregister) selected.clear();
    return t("Done: %s of %s changed.", done.changed, done.matched);
  });

  const exportCsv = () => attempt(async () => {
    const all = await get("/api/agents", {...fleetFilter(), detail: true});
    const names = Object.keys(all[0] || {});
    // A cell that begins like a formula would be run by a spreadsheet.
    const cell = (value) => '"'
      + String(value ?? "").replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""') + '"';
    const lines = [names, ...all.map((a) => names.map((name) => a[name]))]
      .map((row) => row.map(cell).join() + "\r\n");
    const href = URL.createObjectURL(new Blob(["\ufeff", ...lines], {type: "text/csv"}));
    h("a", {href, download: "fleet.csv"}).click();
    setTimeout(() => URL.revokeObjectURL(href), 9999);
    return t("%s agents", number(all.length));
  });

  view.load = async (live) => {
    const turn = view.turn = {};
    const path = address("/api/agents", {...fleetFilter(), sort: param("sort") || "status",
      page: +param("page") || 1, limit: LIMIT, detail: true});
    const [answer, silent, [top]] = await Promise.all([api("GET", path),
      api("GET", "/api/agents?limit=1&silent_ms=" + MONTH_MS),
      get("/api/agents", {sort: "-version", limit: 1})]);
    if (turn !== view.turn) return;
    newest = top?.version;
    const count = (label, value, filters) => btn([label, h("b", number(value))],
      () => setParams({status: "", silent_ms: "", ...filters}), "", {"aria-pressed": String(
        ["status", "silent_ms"].every((name) => param(name) === (filters[name] || "")))});
    const at = [...counts.children].indexOf(document.activeElement);
    put(counts, count(t("All"), overview.totalAgents, {}),
      ...["online", "stale", "offline"].map((status) =>
        count(state(status), overview[status + "Agents"], {status})),
      takes("/api/agents", "silent_ms")
        ? count(t("Silent 30 days"), silent.total, {silent_ms: MONTH_MS + ""}) : "");
    counts.children[at]?.focus();
    put(end, foot(asCurl(path), asCommand("agents", {...fleetFilter(), sort: param("sort") || "status"})));
    const changed = answer.data.filter((a, at) =>
      a.id !== items[at]?.id || JSON.stringify(a) !== rows.get(a.id)?.text);
    [items, total] = [answer.data, answer.total];
    // Rows do not move away under the pointer.
    if (live && changed.length && matchMedia("(hover: hover)").matches && body.querySelector("table:hover")) {
      changes.hidden = false;
      changes.textContent = t("%s changed", changed.length);
    } else draw();
  };
}

// Agent

function buildAgent(view, main, id) {
  const path = one("/api/agents/", id);
  const name = h("input", named("New tag"));
  const retag = (change) => act(async () => {
    await api("PATCH", path, change);
    name.value = "";
    return t("Saved.");
  });
  const adding = h("form.bar", {onsubmit: (event) => {
    event.preventDefault();
    if (name.value.trim()) retag({addTags: [name.value.trim()]});
  }}, name, h("button", t("Add tag")));

  view.load = async () => {
    const a = await get(path).catch((error) => put(main, h("h1", id), empty(error.message,
      h("a", {href: link("threats", {agent_id: id})}, t("Threats")))));
    if (!a) return;
    const [threats, policy, policies, entries, day] = await Promise.all([
      get("/api/threats", {agent_id: id, limit: 10}), get(one("/api/policy/agent/", id), {ack: false}),
      get("/api/policy", {limit: 200}), latest({agent_id: id}, 30), get("/api/timeline", {agent_id: id})]);
    const second = (iso) => (Date.parse(iso) - Date.parse(day.hours[0].at)) / 1000;
    const edits = may("patch", "/api/agents/{id}");
    const refused = entries.filter((e) => e.type === "agent_refused" && e.at >= a.lastHeartbeat);
    const [falls, next] = {online: [a.staleAt, "stale"], stale: [a.offlineAt, "offline"]}[a.status] || [];
    const open = main.querySelector("details")?.open;
    const typing = document.activeElement === name;
    put(main, h("div.bar", h("h1", a.hostname), state(a.status), edits && btn(t("Deregister") + "…", () =>
      act(async () => {
        if (!await ask(t("Deregister %s?", a.hostname), t("Its token stops working. Its threats are kept."),
          t("Deregister"), "danger")) return "";
        await api("DELETE", path);
        location.hash = "#fleet";
        return t("%s is deregistered.", a.hostname);
      }), "danger")),
    h("svg.chart strip", {viewBox: "0 0 " + (second(day.intervals.at(-1)?.until) || 1) + " 9",
      preserveAspectRatio: "none", role: "img", "aria-label": t("24 hours")},
    day.intervals.map((each) => h("rect", {class: each.status,
      x: second(each.from), y: 0, width: second(each.until) - second(each.from), height: 9},
    h("title", t(each.status) + " " + each.from)))),
    h("div.cards",
      card(t("Why it is %s", t(a.status)), h("dl",
        fact("Since", stamp(a.statusSince), ", ", living(a.statusSince, "for %s")),
        fact("Last heartbeat", stamp(a.lastHeartbeat), ", ", living(a.lastHeartbeat, "%s ago", beatCap(a))),
        fact("Due by", stamp(a.staleAt)),
        refused[0] && fact("Refused since", stamp(refused.at(-1).at), h("div.error", refused[0].reason)),
        falls && fact("Next", t("%s, without a further heartbeat, at", t(next)), " ", stamp(falls)))),
      card(t("Machine"), h("dl", fact("Id", h("code", a.id)), fact("OS", a.os, " ", a.arch),
        fact("Version", a.version), fact("Address", a.ip), fact("Org", a.org_id || "–"),
        fact("Machine id", a.machine_id || "–"), fact("CPU", meter(a.cpu)), fact("Memory", meter(a.memory)),
        fact("Uptime", a.uptime === null ? "–" : span(a.uptime * 1000)),
        fact("Registered", stamp(a.registeredAt)))),
      card(t("Tags"), h("p", a.tags.map((each) => tag(each, edits && btn("×",
        () => retag({removeTags: [each]}), "plain", {"aria-label": t("Remove tag %s", each)}))),
      !a.tags.length && t("none")), edits && adding),
      card(t("Policy"), h("p", policyState(a)), policy.rules.length ? table(["Rule", "From", "Settings"],
        policy.rules.map((rule) => {
          const from = scopesOf(a, policies).find((p) => p.rules.some(({type}) => type === rule.type));
          return row(rule.type, from && [from.version, ", ", scopeName(from)],
            h("code", JSON.stringify(rule.config)));
        })) : t("No rules.")),
      h("section.card wide", h("h2", t("Threats")), threats.length
        ? table(["Severity", "Type", "Source", "When"], threats.map((e) =>
          row(severity(e.severity), to(e.type, "threats", {agent_id: id, type: e.type}),
            indicator(e), stamp(e.receivedAt)))) : t("none")),
      h("section.card wide", h("h2", t("Journal")), journalTable(entries)),
      h("details.wide", {open}, h("summary", t("Raw JSON")), h("pre", JSON.stringify(a, null, 2)))),
    foot(asCurl(path), asCommand("agent " + id), asCommand("doctor " + id)));
    if (typing) name.focus();
  };
}

// Whom a policy is for, and the newest one of each scope that reaches an agent, the narrowest first.
const scopeName = (p) => p.agent_id ? agentLink(p.agent_id) : p.org_id || t("all agents");
const scopesOf = (a, policies) => [(p) => p.agent_id === a.id, (p) => p.org_id && p.org_id === a.org_id,
  (p) => !p.agent_id && !p.org_id].map((fits) => policies.find(fits)).filter(Boolean);

// Threats

const SEVERITIES = ["critical", "high", "medium", "low"];
const STATES = {open: "Open", acknowledged: "Acknowledged", false_positive: "False positive"};
const detail = (...keys) => (threat) => keys.map((key) => threat.details[key])
  .find((value) => value && typeof value === "string");
const source = detail("sourceIp", "sourceIP", "source_ip", "src_ip", "remoteAddress", "attacker_ip",
  "client_ip");
const fileOf = detail("sha256", "sha1", "md5", "fileHash", "hash", "malwareHash");
const severity = (name) => h("span", {class: "state " + name}, shape([9, 6, 3, 0]
  .slice(0, 4 - SEVERITIES.indexOf(name))
  .map((y, at) => h("rect", {x: at * 3, y, width: 2, height: 12 - y}))), t(name));
const indicator = (e) => source(e)
  ? h("a", {href: link("threats", {source_ip: source(e)}), title: t("Same source")}, source(e))
  : fileOf(e) && takes("/api/threats", "file_hash") ? h("a", {href: link("threats", {file_hash: fileOf(e)}),
    title: t("Same file")}, fileOf(e).slice(0, 12) + "…") : fileOf(e) || "–";
const choices = (words) => Object.entries(words).map(([value, text]) => [value, t(text)]);

function buildThreats(view, main) {
  const body = h("div");
  main.append(head("Threats", filter("severity", "Severity", SEVERITIES.map((each) => [each, t(each)])),
    filter("type", "Type"), filter("agent_id", "Agent id"), filter("source_ip", "Source"),
    filter("file_hash", "File hash"), filter("state", "State", choices(STATES)), filter("period", "Any time",
      choices({3600000: "1 h", 86400000: "24 h", 604800000: "7 d"}))), body);
  view.load = async () => {
    const page = +param("page") || 1;
    const query = {page, limit: LIMIT};
    for (const name of ["severity", "type", "agent_id", "source_ip", "file_hash", "state"]) {
      query[name] = param(name);
    }
    if (param("period")) query.since = new Date(now() - param("period")).toISOString();
    const path = address("/api/threats", query);
    const {data, total} = await api("GET", path);
    const groups = Map.groupBy(data, (e) => JSON.stringify([e.type, e.agentId, source(e), e.state]));
    put(body, ...attacks(data), data.length ? table(["Severity", "Type", "Agent", "Source", "Count", "Latest",
      "State", "Details"], [...groups.values()].map(threatRow)) : location.hash.includes("?")
      ? empty(t("No threat matches."), h("a", {href: "#threats"}, t("Show all")))
      : empty(t("No threats reported"), t("When an agent reports one, it appears here by itself.")),
    h("p.soft", t("%s threats", number(total))), pager(page, total) || "", foot(asCurl(path),
      asCommand("threats", {...query, page: 0, agent_id: 0, since: 0, agent: query.agent_id})));
  };
}

// Threats of several agents that the manager has correlated, by the source or file that they share.
const attacks = (threats) => [...Map.groupBy(threats.filter((e) => e.correlatedWith.length),
  (e) => source(e) || fileOf(e)).values()].slice(0, 3).map((group) => {
  const hosts = new Map(group.map((e) => [e.agentId, e.hostname]));
  return h("p.card", h("b", t("Correlated attack on %s agents", hosts.size)), " ", indicator(group[0]), " · ",
    severity(SEVERITIES.find((name) => group.some((e) => e.severity === name))), " ",
    [...new Set(group.map((e) => e.type))].join(", "), " · ", living(group[0].receivedAt, "%s ago"), h("br"),
    [...hosts].map(([id, name]) => tag(agentLink(id, name))));
});

function threatRow(group) {
  const [e] = group;
  const word = t(STATES[e.state || "open"]);
  return row(severity(e.severity), [to(e.type, "threats", {type: e.type}), e.note && h("div.soft", e.note)],
    agentLink(e.agentId, e.hostname), indicator(e), number(group.length), living(e.receivedAt, "%s ago"),
    may("patch", "/api/threats/{id}") ? btn(word, () => triage(group)) : word,
    btn(t("Details"), () => ask(e.type, [h("p", e.hostname, " · ", stamp(e.receivedAt)),
      h("pre", JSON.stringify(e, null, 2))]), "plain"));
}
function triage(group) {
  const choice = h("select", {"aria-label": t("State"), value: group[0].state},
    choices(STATES).map(([value, text]) => h("option", {value}, text)));
  const note = h("input", {...named("Note"), value: group[0].note || ""});
  return act(async () => {
    if (!await ask(t("State of %s threats", group.length), h("div.bar", choice, note), t("Save"))) return "";
    const given = {state: choice.value, note: note.value || null};
    for (const {id} of group) await api("PATCH", one("/api/threats/", id), given);
    return t("Saved.");
  });
}
// Overview

// Hours as bars, each a stack of the counts that `of` gives by key.
function chart(title, hours, keys, of) {
  const all = (hour) => keys.reduce((sum, key) => sum + of(hour)[key], 0);
  const most = Math.max(1, ...hours.map(all));
  return h("section.card wide",
    h("div.bar", h("h2", t(title)), keys.map((key) => h("span", {class: key}, "■ ", t(key)))),
    h("svg.chart", {viewBox: "0 0 " + hours.length * 9 + " 60", preserveAspectRatio: "none", role: "img",
      "aria-label": t(title) + ": " + hours.map(all)}, hours.map((hour, at) => {
      let y = 60;
      return keys.map((key) => {
        const height = 60 * of(hour)[key] / most;
        return height && h("rect", {class: key, x: at * 9, y: y -= height, width: 8, height},
          h("title", hour.at + " " + t(key) + ": " + of(hour)[key]));
      });
    })), h("div.ends soft", stamp(hours[0].at), "≤\u00a0" + number(most), stamp(hours.at(-1).at)));
}

const hbars = (title, rows) => card(title, rows.length ? rows.map(([label, count]) => {
  const fill = h("i.hbar");
  fill.style.width = 100 * count / Math.max(...rows.map((row) => row[1])) + "%";
  return h("div", h("div.ends", h("span", label), number(count)), fill);
}) : t("none"));

function buildOverview(view, main) {
  view.load = async () => {
    const [summary, agents, {hours}] = await Promise.all([
      get("/api/threats/summary"), everyAgent(), get("/api/timeline")]);
    const behind = agents.filter((a) => a.pendingPolicies).length;
    put(main, head("Overview"), h("div.cards",
      chart("Threats per hour", hours, SEVERITIES.toReversed(), (hour) => hour.threats),
      chart("Agents per hour", hours, ["online", "stale", "offline"], (hour) => hour),
      card(t("Policy"), overview.activePolicyVersion ? h("p", h("b", overview.activePolicyVersion), " ", t(
        "%s of %s agents have what holds for them", number(agents.length - behind), number(agents.length)))
        : t("none")),
      hbars(t("Severity"), SEVERITIES.map((key) => [severity(key), summary.bySeverity[key]])),
      hbars(t("Type"), Object.entries(summary.byType).map(([type, count]) => [to(type, "threats", {type}),
        count])),
      hbars(t("Source"), summary.topSourceIps.map(({ip, count}) => [to(ip, "threats", {source_ip: ip}),
        count])),
      hbars(t("Agent"), summary.topAgents.map((each) =>
        [agentLink(each.agentId, each.hostname), each.count])),
      ...["version", "os"].map((key) => hbars(t(key === "os" ? "OS" : "Version"),
        [...Map.groupBy(agents, (a) => a[key])]
          .map(([name, list]) => [to(name, "fleet", {[key]: name}), list.length])
          .sort((one, other) => other[1] - one[1]).slice(0, 10)))),
    foot(asCurl("/api/overview"), asCommand("status")));
  };
}
// All agents in detail, at most once in half a minute: the fleet may be large.
async function everyAgent() {
  if (!(now() - everyAgent.at < 30000)) {
    everyAgent.list = await get("/api/agents", {detail: true});
    everyAgent.at = now();
  }
  return everyAgent.list;
}

// Policies

function buildPolicies(view, main) {
  const body = h("div");
  const text = h("textarea", {"aria-label": t("Policy as JSON"), spellcheck: "false", oninput: check,
    value: JSON.stringify(
      {name: "Block an address", rules: [{type: "block_ip", config: {ip: "203.0.113.9"}}]}, null, 2)});
  const verdict = h("span", {role: "status"});
  const issue = btn(t("Issue") + "…", () => act(async () => {
    const policy = JSON.parse(text.value);
    const scope = policy.agent_id || policy.org_id || t("all agents");
    const {data: effect} = await api("POST", "/api/policy", {...policy, dryRun: true});
    if (!await ask(t("Issue %s?", policy.name), [
      h("p", t("%s rules for %s", policy.rules.length, scope), ", ", t("%s agents", effect.agents)),
      difference(effect.removed, effect.added)], t("Issue"))) return "";
    const {data} = await api("POST", "/api/policy", policy);
    return t("Issued %s; %s agents online get it now.", data.version, data.broadcastedTo);
  }), "main");
  function check() {
    let problem = "";
    try {
      const {name, rules} = JSON.parse(text.value);
      if (!name || !rules?.length) problem = "name, rules: …";
    } catch (error) {
      problem = error.message;
    }
    issue.disabled = problem;
    verdict.className = problem && "error";
    verdict.textContent = problem;
  }
  check();
  main.append(head("Policies"), body, may("post", "/api/policy") ? h("details.card foot",
    h("summary", t("Issue a policy")), text, h("div.bar", issue, verdict)) : "",
  foot(asCurl("/api/policy"), asCommand("policy list")));
  view.load = async () => {
    const [policies, agents] = await Promise.all([get("/api/policy", {limit: 200}), everyAgent()]);
    const sameScope = (p) => (each) => each.org_id === p.org_id && each.agent_id === p.agent_id;
    put(body, policies.length ? table(
      ["Version", "Name", "For", "Rules", "Issued", "Acknowledged", "Actions"], policies.map((p, at) => {
        const inForce = !policies.slice(0, at).some(sameScope(p));
        const scope = agents.filter((a) =>
          p.agent_id ? a.id === p.agent_id : !p.org_id || a.org_id === p.org_id);
        const has = (a) => +(a.activePolicyVersion || "v0").slice(1) >= +p.version.slice(1);
        return row(h("b", p.version), p.name, scopeName(p), p.rules.length,
          stamp(p.createdAt), inForce ? btn(t("%s of %s", scope.filter(has).length, scope.length), () => ask(
            t("Not acknowledged: %s", p.version), h("p", scope.filter((a) => !has(a)).slice(0, 100).map((a) =>
              tag(a.hostname)))), "plain") : h("span.soft", t("replaced")),
          [btn(t("Changes"), () => ask(p.name + " " + p.version,
            changes(p, policies.slice(at + 1).find(sameScope(p)))), "plain"),
            inForce && p.agent_id && p.rules[0] && may("delete", "/api/policy/agent/{id}")
              && btn(t("Drop") + "…", () => act(async () => {
                if (!await ask(t("Drop the override of %s?", p.agent_id), "", t("Drop"), "danger")) return "";
                await api("DELETE", one("/api/policy/agent/", p.agent_id));
                return t("Saved.");
              }), "plain danger")]);
      })) : empty(t("No policy yet"), t("Issue the first one below.")));
  };
}
function changes(policy, former) {
  const without = (one, other) => (one?.rules || []).filter((rule) => !(other?.rules || []).some((each) =>
    JSON.stringify(each) === JSON.stringify(rule)));
  return [h("p.soft", policy.description, " ", former ? t("Compared with %s", former.version) : ""),
    difference(without(former, policy), without(policy, former))];
}
const difference = (gone, come) => h("pre", gone.map((rule) => h("div.offline", "− " + JSON.stringify(rule))),
  come.map((rule) => h("div.online", "+ " + JSON.stringify(rule))));

// Journal

const entryTypes = () => takes("/api/events", "type").items.enum;
const journalTable = (entries) => entries.length
  ? table(["No.", "When", "Type", "Agent", "What"], entries.map(journalRow)) : t("none");
function journalRow({seq, at, type, agentId, hostname, actor, ...fields}) {
  const what = Object.entries(fields).filter(([, value]) => value !== null && value !== "")
    .map(([name, value]) => name + ": " + (typeof value === "object" ? JSON.stringify(value) : value))
    .join(", ");
  return row(seq, stamp(at), t(type), agentLink(agentId, hostname),
    [what, h("div.soft", Object.values(actor).join(" "))]);
}
function buildJournal(view, main) {
  const body = h("div");
  let shown = null; // number of the latest entry shown while paused
  const pause = btn(t("Pause"), () => {
    shown = shown === null ? lastSeq : null;
    view.load();
  });
  main.append(head("Journal", filter("type", "Type", entryTypes().map((each) => [each, t(each)])),
    filter("agent_id", "Agent id"), pause), body);
  view.load = async () => {
    pause.textContent = shown === null ? t("Pause") : t("Go on (%s new)", lastSeq - shown);
    if (shown !== null && body.firstChild) return;
    const given = {type: param("type"), agent_id: param("agent_id")};
    put(body, h("div.card", journalTable(await latest(given, 100))),
      foot(asCurl(address("/api/events", given)),
        asCommand("events", {type: given.type, agent: given.agent_id})));
  };
}

// Add agents

function buildEnroll(view, main) {
  const field = (name, label, value) => h("label", t(label), " ", h("input", {name, value}));
  const path = "/api/enroll-tokens";
  const made = h("div");
  const list = h("div");
  const form = h("form.bar", {onsubmit: (event) => {
    event.preventDefault();
    const given = Object.fromEntries(new FormData(form));
    act(async () => {
      const {data} = await api("POST", path, {maxUses: +given.uses, ttlMs: given.hours * 3600000,
        org_id: given.org_id || null, tags: given.tags.split(/[\s,]+/).filter(Boolean)});
      put(made, h("p", t("The token is shown this once. Run on each machine:")),
        h("pre", registerLine(data.token)), trust() || "");
      return t("Saved.");
    });
  }}, field("uses", "Uses", 1), field("hours", "Hours", 24), field("org_id", "Org", ""),
  field("tags", "Tags", ""), h("button.main", t("Issue a token")));
  main.append(head("Add agents"), may("post", path) ? h("div.card", form, made) : h("div.card",
    t("Give each machine the enrolment token and run there:"), h("pre", registerLine("ENROLL_TOKEN"))), list);
  view.load = async () => {
    const tokens = paths[path] ? await get(path) : [];
    const gone = (await latest({type: "agent_deregistered"}, 200)).map((e) => e.agentId);
    const news = (await latest({type: "agent_registered"}, 5)).filter((e) => !gone.includes(e.agentId));
    put(list, h("div.foot", tokens.length
      ? table(["Token", "Uses", "Expires", "Org", "Tags", "Actions"], tokens.map((each) => row(
        each.id, each.uses + " / " + each.maxUses, stamp(each.expiresAt), each.org_id || "–",
        each.tags.map((name) => tag(name)),
        may("delete", path + "/{id}") && btn(t("Revoke"), () => act(async () => {
          await api("DELETE", one(path + "/", each.id));
          return t("Saved.");
        }), "plain danger")))) : ""),
    h("section.card foot", h("h2", t("Registered lately")), journalTable(news)));
  };
}

// System

function buildSystem(view, main) {
  view.load = async () => {
    const health = (await (await fetch("/health")).json()).data;
    const text = await (await fetch("/metrics", {headers: {Authorization: "Bearer " + token}})).text();
    const rows = [...Object.entries(health).flatMap(([name, value]) => value instanceof Object
      ? Object.entries(value).map(([key, each]) => [name + " " + key, each]) : [[name, value]]),
    ...[...text.matchAll(/^panguard_(\w+)\s(\S+)$/gm)].map(([, name, value]) =>
      [name.replaceAll("_", " "), number(+value)])];
    put(main, head("System"), card(t("Manager"), h("dl", rows.map((each) => fact(...each)))),
      foot(asCurl("/health"), asCurl("/metrics")));
  };
}

// The views, in their order: title of the link, and what builds one

const VIEWS = {
  fleet: ["Fleet", buildFleet], agent: ["", buildAgent], threats: ["Threats", buildThreats],
  overview: ["Overview", buildOverview], policies: ["Policies", buildPolicies],
  journal: ["Journal", buildJournal], enroll: ["Add agents", buildEnroll], system: ["System", buildSystem]};

const ZH = Object.fromEntries(`Fleet=機群
Threats=威脅
Overview=總覽
Threats per hour=每小時威脅
Agents per hour=每小時代理
24 hours=24 小時
Policies=策略
Journal=日誌
Add agents=新增代理
System=系統
Token=權杖
Sign in=登入
Sign out=登出
Live=即時
Reconnecting=重新連線中
as of %s ago=%s前的資料
Light=淺色
Dark=深色
viewer=檢視者
online=在線
stale=逾時
offline=離線
%s offline=%s 台離線
%s s=%s 秒
%s min=%s 分鐘
%s h=%s 小時
%s d=%s 天
for %s=已 %s
%s ago=%s前
now=現在
All=全部
Silent 30 days=靜默 30 天
Status=狀態
Hostname=主機名稱
Tags=標籤
Tag=標籤
New tag=新標籤
Add tag=加上標籤
Remove tag=移除標籤
Remove tag %s=移除標籤 %s
OS=作業系統
Version=版本
Address=位址
Policy=策略
Threats 24 h=24 小時威脅
Memory=記憶體
Last heartbeat=最後心跳
Org=組織
Agent=代理
Agent id=代理 ID
Columns=欄位
Export CSV=匯出 CSV
Find hostname, id, address or tag=搜尋主機名稱、ID、位址或標籤
%s pending=%s 項待套用
none=無
The newest in the fleet is %s=機群中最新的是 %s
%s agents=%s 個代理
%s selected=已選 %s 個
all %s that match=所有符合的 %s 個
%s changed=%s 項變更
Deregister=取消註冊
Deregister %s?=取消註冊 %s?
%s is deregistered.=%s 已取消註冊。
Its token stops working. Its threats are kept.=其權杖將失效,威脅資料會保留。
Clear=清除
%s match, %s would change.=%s 個符合,%s 個會變更。
Done: %s of %s changed.=完成:已變更 %s / %s。
No agent matches.=沒有符合的代理。
Show all=顯示全部
No agents yet=尚無代理
Register the first one. On its machine, run:=請在主機上執行以註冊第一個代理:
Former page=上一頁
Next page=下一頁
Page %s of %s=第 %s / %s 頁
Why it is %s=為何%s
If self-signed: --cacert cert.pem=自簽憑證:--cacert cert.pem
Due by=應於
Refused since=請求遭拒自
Since=自
Next=接著
%s, without a further heartbeat, at=若無心跳將%s:
Machine=主機
Uptime=運行時間
Registered=註冊時間
Rule=規則
From=來自
Settings=設定
all agents=所有代理
Severity=嚴重程度
critical=嚴重
high=高
medium=中
low=低
Type=類型
Source=來源
File hash=檔案雜湊
State=狀態
Count=次數
Latest=最近
When=時間
What=內容
Details=詳情
Open=未處理
Acknowledged=已確認
False positive=誤報
Note=備註
Correlated attack on %s agents=針對 %s 個代理的關聯攻擊
No threat matches.=沒有符合的威脅。
No threats reported=尚無威脅
When an agent reports one, it appears here by itself.=代理回報後會自動顯示於此。
%s threats=%s 筆威脅
State of %s threats=%s 筆威脅的狀態
Save=儲存
Saved.=已儲存。
Cancel=取消
As curl, as command=以 curl 或指令取得
An admin's or a viewer's token.=管理員或檢視者的權杖。
The token is wrong or no longer valid.=權杖錯誤或已失效。
The manager does not answer. Is it running?=Manager 沒有回應,是否正在執行?
%s of %s agents have what holds for them=%s / %s 個代理已套用
Name=名稱
For=對象
Issued=發布時間
Actions=操作
%s of %s=%s / %s
replaced=已取代
Changes=變更
Not acknowledged: %s=尚未確認:%s
Drop=移除
Drop the override of %s?=移除 %s 的專屬策略?
Issue=發布
Issue a policy=發布策略
Issue %s?=發布 %s?
%s rules for %s=%s 條規則,對象:%s
Issued %s; %s agents online get it now.=已發布 %s,%s 個在線代理將套用。
No policy yet=尚無策略
Pause=暫停
Go on (%s new)=繼續(%s 筆新)
Uses=次數
Hours=小時
Issue a token=發出權杖
Expires=到期
Revoke=撤銷`.split("\n").map((line) => line.split(/=(.*)/)));

start();"""  # noqa: RUF001
# What a browser does not need: comments, and white space outside of texts. Each `const` becomes `let`.
_SPARE = re.compile(
    r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`[^`]*`)"""  # texts, kept
    r"""|//[^\n]*|;\s*(?=\})|\s*([{}()[\],;:?=<>+*&|!-])\s*|\b(const)\b|\s+""")
_WORD = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`[^`]*`"""  # texts
                   r"""|(?<=[(,=!&|?:])/(?:\\.|[^/\\\n])+/)|([A-Za-z]\w+)""")


def _shorter(script: str) -> str:
    """The script with short names for what it declares, where a name is never that of a property as well."""
    declared = set(re.findall(r"\b(?:function |let )([A-Za-z]\w{3,})", script))
    properties = {*re.findall(r"(?<!\.\.)\.(\w+)", script), *re.findall(r"(\w+):", script)}
    names = sorted(declared - properties, key=lambda name: (-len(re.findall(rf"\b{name}\b", script)), name))
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    short = {name: "$" + (letters[at:at + 1] or str(at)) for at, name in enumerate(names)}
    return _WORD.sub(lambda found: found[1] or short.get(found[2], found[2]), script)


_SENT = {"style": _STYLE.replace("\n", ""), "script": _shorter(_SPARE.sub(
    lambda found: found[1] or found[2] or ("let" if found[3] else " " if found[0].isspace() else ""),
    SCRIPT))}


def _source(name: str) -> str:
    """The source expression that lets the page run this inline style or script only (CSP Level 3, 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(_SENT[name].encode()).digest()).decode()}'"


DASHBOARD = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Panguard Manager</title>
<link rel="icon" href="data:,">
<style>{_SENT['style']}</style>
</head>
<body>
<noscript>The dashboard needs JavaScript. The API and the command line work without it.</noscript>
<script>{_SENT['script']}</script>
</body>
</html>
""".encode()
# Trusted types keep text out of every way that would read it as HTML.
_PAGE_HEADERS = tuple((name, (
    f"default-src 'none'; style-src {_source('style')}; script-src {_source('script')}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types"
    if name == "Content-Security-Policy" else value)) for name, value in _COMMON_HEADERS)


@endpoint("GET", "/", "Show the dashboard", public=True, media="text/html; charset=utf-8")
def _dashboard(call: Call) -> Reply:
    return Reply(200, DASHBOARD, (("Content-Type", call.route.media),), common=_PAGE_HEADERS)


if __name__ == "__main__":
    sys.exit(main())
