"""Measure Panguard Manager against bare waitress and itself: `python bench_manager.py [--quick] [NAME …]`.

`python bench_manager.py soak [SECONDS]` gives a manager ordinary work for ten minutes, or for SECONDS, and
measures its memory, files and latencies. It needs no wrk, and ends with status 1 if something fails or grows
beyond its bound.

Nor do `growth`, which draws docs/growth.svg unless --quick is given, and `small_box`.

Needs wrk (Debian: apt-get install wrk), Linux, and an open-file limit of 8,000. This script starts each
contender as a process. Contenders take turns; what is printed are medians of the rounds and ratios within the
run. wrk gets one core to itself, the contenders share the others.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import logging
import math
import os
import platform
import random
import re
import resource
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import manager

TOKEN = "bench-admin-token"
CORES = sorted(os.sched_getaffinity(0))
BODY = '{"uptime": 12345, "cpu": 12.5, "memory": 40.25, "version": "1.2.0"}'
LUA = f"""
local agents = {{}}
for line in io.lines(os.getenv("BENCH_AGENTS")) do
  local id, token = line:match("(%S+) (%S+)")
  local headers = {{
    ["Host"] = "bench", ["Authorization"] = "Bearer " .. token, ["Content-Type"] = "application/json"}}
  agents[#agents + 1] = wrk.format("POST", "/api/agents/" .. id .. "/heartbeat", headers, [[{BODY}]])
end
math.randomseed(7)
function request() return agents[math.random(#agents)] end
"""
# Reports of all agents about one address, `BENCH_BATCH` events each; and registrations.
REPORT_LUA = """
local event = [[{"type": "brute_force", "severity": "high", "sigmaRuleId": "ssh-1", "confidence": 0.9,
  "details": {"sourceIp": "203.0.113.9", "port": 22, "user": "root", "attempts": 31}}]]
local body = '{"events": [' .. string.rep(event .. ",", os.getenv("BENCH_BATCH") - 1) .. event .. "]}"
local agents = {}
for line in io.lines(os.getenv("BENCH_AGENTS")) do
  local id, token = line:match("(%S+) (%S+)")
  agents[#agents + 1] = {"/api/agents/" .. id .. "/events",
    {["Host"] = "bench", ["Authorization"] = "Bearer " .. token, ["Content-Type"] = "application/json"}}
end
math.randomseed(7)
function request()
  local agent = agents[math.random(#agents)]
  return wrk.format("POST", agent[1], agent[2], body)
end
"""
REGISTER_LUA = f"""
local headers = {{
  ["Host"] = "bench", ["Authorization"] = "Bearer {TOKEN}", ["Content-Type"] = "application/json"}}
function request() return wrk.format("POST", "/api/agents/register", headers,
  [[{{"hostname": "web-1", "os": "linux", "version": "1.2.0", "tags": ["production"]}}]]) end
"""


# Contenders: each runs in a process of its own and obeys commands on its standard input


def serve(kind: str, folder: Path) -> None:
    """Run a contender: say the port, then answer a line to each command."""
    logging.disable(logging.ERROR)
    os.sched_setaffinity(0, CORES[:-1] or CORES)
    if kind == "bare":
        serve_bare()
        return
    clock = manager.ManualClock(time.time()) if kind == "manual" else manager.SystemClock()
    began_s = time.perf_counter()
    with manager.Server(clock=clock, port=0, data_dir=folder, auth_token=TOKEN, max_agents=10**6,
                        heartbeat_timeout_ms=60_000 if kind == "manual" else 86_400_000,
                        connections_per_address=10**6,  # the load comes from one
                        threads=4 if kind == "threads" else 16,
                        tls="auto" if kind == "tls" else "off") as server:
        print(server.url.rpartition(":")[2], f"{time.perf_counter() - began_s:.3f}", flush=True)
        sweep, swept_s = server.manager.sweep, 0.0

        def timed() -> int:  # the timer has more to do than that
            nonlocal swept_s
            began_s = time.perf_counter()
            announced = sweep()
            swept_s = max(swept_s, time.perf_counter() - began_s)
            return announced
        server.manager.sweep = timed  # type: ignore[method-assign]
        for line in sys.stdin:
            command, *words = line.split()
            if command == "advance":
                clock.advance(float(words[0]))  # type: ignore[union-attr]
            print(f"{swept_s:.4f} {resident_mb():.1f} {time.process_time():.4f}", flush=True)


def serve_bare() -> None:
    """waitress with the same settings and as quiet a channel, answering a constant."""
    from waitress.channel import HTTPChannel
    from waitress.server import create_server

    class Quiet(HTTPChannel):  # type: ignore[misc]
        def writable(self) -> bool:
            if self.requests:
                return bool(self.will_close or self.total_outbufs_len >= self.adj.send_bytes)
            return bool(super().writable())

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", "11")])
        return [b'{"ok":true}']

    server = create_server(app, host="127.0.0.1", port=0, threads=4, ident=None, asyncore_use_poll=True,
                           send_bytes=65536, connection_limit=20_000, channel_timeout=120, cleanup_interval=5,
                           clear_untrusted_proxy_headers=False, max_request_body_size=2**20)
    server.channel_class = Quiet
    print(server.effective_port, 0, flush=True)
    server.run()


def resident_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


class Contender:
    """A process that serves."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", kind, str(folder)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout
        port, ready_s = self.process.stdout.readline().split()
        self.port, self.ready_s = int(port), float(ready_s)
        self.agents = folder / "agents.txt"

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()

    def tell(self, command: str) -> tuple[float, float, float]:
        """Have it do something: seconds its last sweep took, its resident MB, its CPU seconds so far."""
        assert self.process.stdin and self.process.stdout
        print(command, file=self.process.stdin, flush=True)
        seconds, mb, cpu_s = self.process.stdout.readline().split()
        return float(seconds), float(mb), float(cpu_s)

    def written_bytes(self) -> int:
        """What the process has had written to the disk so far, in whole pages of the file system."""
        return int(found(r"(?m)^write_bytes: (\d+)", Path(f"/proc/{self.process.pid}/io").read_text()))

    def beat(self, connections: int, seconds: float) -> tuple[float, float, float, str]:
        """Heartbeats for a while: rate, 99th percentile and maximum in ms, complaints."""
        return self.script("beat", connections, seconds)

    def script(self, name: str, connections: int, seconds: float,
               batch: int = 1) -> tuple[float, float, float, str]:
        """The same for the requests of a script; `batch` is the number of events in a report."""
        os.environ["BENCH_BATCH"] = str(batch)
        return self.wrk(connections, seconds, "-s", str(self.agents.with_name(f"{name}.lua")))

    def wrk(self, connections: int, seconds: float, *options: str,
            path: str = "") -> tuple[float, float, float, str]:
        scheme = "https" if self.kind == "tls" else "http"
        out = subprocess.run(
            ["taskset", "-c", str(CORES[-1]), "wrk", "-t1", f"-c{connections}",
             f"-d{max(1, round(seconds))}s", "--latency", *options,
             f"{scheme}://127.0.0.1:{self.port}{path}"],
            capture_output=True, text=True, env={**os.environ, "BENCH_AGENTS": str(self.agents)},
            check=True).stdout
        rate = float(found(r"Requests/sec:\s+([\d.]+)", out))
        p99_ms = milliseconds(found(r"99%\s+(\S+)", out))
        most_ms = milliseconds(found(r"Latency\s+\S+\s+\S+\s+(\S+)", out))
        return rate, p99_ms, most_ms, " ".join(re.findall(r"Socket errors.*|Non-2xx.*", out))

    def ask(self, path: str, body: bytes | None = None) -> bytes:
        """The body of a GET, or of a POST."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=body,
            headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return bytes(answer.read())


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if not match:
        raise SystemExit(f"wrk did not say {pattern!r}:\n{text}")
    return match[1]


def milliseconds(text: str) -> float:
    """wrk's '1.23ms' as a number of ms; not a number where it has none."""
    match = re.fullmatch(r"([\d.]+)(us|ms|s|m|h)", text)
    in_ms = {"us": 0.001, "ms": 1, "s": 1e3, "m": 6e4, "h": 3.6e6}
    return float(match[1]) * in_ms[match[2]] if match else math.nan


# Files to serve from


def fleet(folder: Path, agents: int, events: int = 0, age_ms: int = 0) -> Path:
    """A data folder with a fleet, its tokens beside it, and threat events received `age_ms` ago or before."""
    folder.mkdir()
    store = manager.Store(folder)
    fleet = manager.Manager(manager.Config(max_agents=10**6), manager.SystemClock(), store)
    made = []
    for start in range(0, agents, 10_000):
        with store.transaction():
            made += [fleet.register(f"host-{number}", "linux", "1.2.0", ip="192.0.2.1",
                                    tags=["production", f"rack-{number // 10}"])
                     for number in range(start, min(start + 10_000, agents))]
    (folder / "agents.txt").write_text("".join(f"{each.agent.id} {each.token}\n" for each in made))
    for name, text in (("beat", LUA), ("report", REPORT_LUA), ("register", REGISTER_LUA)):
        (folder / f"{name}.lua").write_text(text)
    store.close()
    if events:
        now_ms = time.time_ns() // 1_000_000 - age_ms
        ids = [each.agent.id for each in made]
        with contextlib.closing(sqlite3.connect(folder / "manager.db")) as db:
            db.executemany(
                "INSERT INTO threats (agent_id, hostname, type, severity, received_ms, source_ip, details) "
                "VALUES (?, 'host', ?, ?, ?, ?, '{\"port\": 22}')",
                ((ids[number % len(ids)], f"type-{number % 20}", manager.SEVERITIES[number % 4],
                  now_ms - (events - number) * (30 * 86_400_000 // events),
                  f"203.0.{number * 7919 // 256 % 256}.{number * 7919 % 256}") for number in range(events)))
            fill = re.search(r"INSERT INTO threat_totals.*?;", "".join(manager.MIGRATIONS), re.DOTALL)
            assert fill
            db.execute(fill[0])
            db.commit()
    return folder


# What is measured


class Bench:
    """The measurements; each public method is one that can be named on the command line."""

    def __init__(self, home: Path, quick: bool) -> None:
        self.home = home
        self.quick = quick
        self.rounds = 1 if quick else 3
        self.seconds = 1.0 if quick else 2.0

    def row(self, label: str, *values: str) -> None:
        print(f"  {label:<44}" + "".join(f"{value:>16}" for value in values), flush=True)

    def duel(self, label: str, one: Contender, other: Contender, connections: int,
             around: Callable[[Contender], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
             ) -> None:
        """Heartbeats of two contenders in turn; the ratio is the other's to the first one's."""
        results: dict[Contender, list[tuple[float, float, float, str]]] = {one: [], other: []}
        for _ in range(self.rounds):
            for contender, runs in results.items():
                with around(contender):
                    runs.append(contender.beat(connections, self.seconds))
        (rate, p99_ms), (other_rate, other_p99_ms) = (
            (statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs))
            for runs in results.values())
        complaints = {run[3] for runs in results.values() for run in runs if run[3]}
        self.row(label, f"{rate:.0f}/s", f"{other_rate:.0f}/s", f"{other_rate / rate:.2f}",
                 f"{p99_ms:.1f} ms", f"{other_p99_ms:.1f} ms", *complaints)

    def heartbeats(self) -> None:
        """durable heartbeats against bare waitress answering a constant: rates, ratio, 99th percentiles"""
        folder = fleet(self.home / "heartbeats", 1000)
        with Contender("bare", folder) as bare, Contender("manager", folder) as ours:
            for connections in (8, 64, 256, 1000):
                self.duel(f"{connections} connections, bare | ours", bare, ours, connections)

    def idle_connections(self) -> None:
        """heartbeats on 64 connections without and with 5,000 idle ones"""
        folder = fleet(self.home / "idle_connections", 1000)
        with Contender("manager", folder) as ours:
            before, after = [], []
            for _ in range(self.rounds):
                before.append(ours.beat(64, self.seconds)[0])
                with held(ours, 1000 if self.quick else 5000):
                    after.append(ours.beat(64, self.seconds)[0])
            self.row("without | with", *(f"{statistics.median(rates):.0f}/s" for rates in (before, after)),
                     f"{statistics.median(after) / statistics.median(before):.2f}")

    def large_fleet(self) -> None:
        """1,000 agents against 100,000: heartbeats, memory, start, and a sweep that expires all of them"""
        small = fleet(self.home / "small_fleet", 1000)
        many = 10_000 if self.quick else 100_000
        large = fleet(self.home / "large_fleet", many)
        with Contender("manager", small) as one, Contender("manager", large) as other:
            self.duel(f"1,000 | {many:,} agents", one, other, 64)
            _, mb, _ = other.tell("measure")
            self.row(f"{many:,} agents: resident, start", f"{mb:.0f} MB", f"{other.ready_s:.2f} s")
        # The agents that beat meanwhile are few, so that nearly all expire while they do.
        with Contender("manual", large) as other:
            other.agents.write_text("".join(other.agents.read_text().splitlines(keepends=True)[:100]))
            taken: list[float] = []
            beats: list[tuple[float, float, float, str]] = []
            beating = threading.Thread(target=lambda: beats.append(other.beat(16, 5)))
            beating.start()
            time.sleep(1)
            taken.append(other.tell("advance 67")[0])
            beating.join()
            self.row("all expire: sweep, longest heartbeat", f"{taken[0]:.2f} s", f"{beats[0][2]:.0f} ms")

    def busy_pool(self) -> None:
        """heartbeats while events are purged and the full list and a summary are asked for all the time"""
        many = 100_000 if self.quick else 1_000_000
        folder = fleet(self.home / "busy_pool", 10_000 if self.quick else 100_000, many,
                       age_ms=31 * 86_400_000)
        with Contender("manager", folder) as ours:
            over = threading.Event()

            def ask(path: str) -> None:
                while not over.is_set():
                    ours.ask(path)

            threads = [threading.Thread(target=ask, args=(path,))
                       for path in ("/api/agents", "/api/threats/summary?period=30d")]
            for thread in threads:
                thread.start()
            rate, p99_ms, most_ms, complaint = ours.beat(64, 10 if not self.quick else 3)
            over.set()
            for thread in threads:
                thread.join()
            left = int(found(r"panguard_threat_events_stored (\d+)", ours.ask("/metrics").decode()))
            self.row("rate, 99th percentile, longest", f"{rate:.0f}/s", f"{p99_ms:.0f} ms",
                     f"{most_ms:.0f} ms", f"{many - left:,} purged", complaint)

    def streams(self) -> None:
        """500 event streams open: GET /health meanwhile, and how soon an event has reached them all"""
        folder = fleet(self.home / "streams", 1000)
        with Contender("manager", folder) as ours, readers(ours, 500) as wait_for_all:
            rate, p99_ms, _, complaint = ours.wrk(8, self.seconds, path="/health")
            self.row("GET /health: rate, 99th percentile", f"{rate:.0f}/s", f"{p99_ms:.1f} ms", complaint)
            taken_ms = []
            for number in range(20):
                began_s = time.perf_counter()
                ours.ask("/api/policy", b'{"name": "p", "rules": [{"type": "custom", "config": {}}]}')
                wait_for_all(f'"version":"v{number + 1}"'.encode())
                taken_ms.append((time.perf_counter() - began_s) * 1000)
            self.row("an event reaches all: median, longest", f"{statistics.median(taken_ms):.0f} ms",
                     f"{max(taken_ms):.0f} ms")

    def tls(self) -> None:
        """heartbeats in plaintext against TLS, on 64 connections"""
        folder, other = fleet(self.home / "plain", 1000), fleet(self.home / "tls", 1000)
        with Contender("manager", folder) as plain, Contender("tls", other) as tls:
            self.duel("plaintext | TLS", plain, tls, 64)

    def dripping(self) -> None:
        """heartbeats without and with 1,000 clients that send a byte a second"""
        folder = fleet(self.home / "dripping", 1000)
        with Contender("manager", folder) as ours:
            alone = statistics.median(ours.beat(64, self.seconds)[0] for _ in range(self.rounds))
            with dripping(ours, 1000):
                beset = statistics.median(ours.beat(64, self.seconds)[0] for _ in range(self.rounds))
            self.row("without | with", f"{alone:.0f}/s", f"{beset:.0f}/s", f"{beset / alone:.2f}")

    def idle(self) -> None:
        """1,000 agents and nothing to do: memory and processor"""
        folder = fleet(self.home / "idle", 1000)
        with Contender("manager", folder) as ours:
            time.sleep(1)
            _, _, before_s = ours.tell("measure")
            seconds = 5 if self.quick else 20
            time.sleep(seconds)
            _, mb, after_s = ours.tell("measure")
            self.row("resident, share of a core", f"{mb:.0f} MB",
                     f"{100 * (after_s - before_s) / seconds:.2f} %")

    def small_box(self) -> None:
        """200 agents: bytes written to the disk by a request and by an idle minute, resident memory then"""
        def row(label: str, count: float, before_bytes: int) -> None:
            written = (ours.written_bytes() - before_bytes) / count
            self.row(label, f"{written / 1024:.1f} KiB", f"{ours.tell('measure')[1]:.0f} MB")

        with Contender("manager", fleet(self.home / "small", 200)) as ours:
            time.sleep(1)
            minutes, before = 0.1 if self.quick else 1.0, ours.written_bytes()
            time.sleep(60 * minutes)
            row("an idle minute", minutes, before)
            for name, count in (("heartbeat", 20_000), ("registration", 2000), ("report of 1 event", 2000),
                                ("report of 100 events", 200)):
                with OneClient(ours) as client:
                    count, before = count // (10 if self.quick else 1), ours.written_bytes()
                    for _ in range(count):
                        client.take_ms(name)
                    row(name, count, before)
            row("report of 1,000 events, 24 at once", 24, self._report_at_once(ours))
        with Contender("threads", self.home / "small") as ours:
            row("the same after a start with 4 threads", 24, self._report_at_once(ours))

    @staticmethod
    def _report_at_once(contender: Contender) -> int:
        """24 agents report 1,000 events each; the bytes written before that."""
        before = contender.written_bytes()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(OneClient(contender)) for _ in range(24)]
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(clients)))
            list(pool.map(lambda client: client.take_ms("report of 1000 events"), clients))
        return before

    def fleet_size(self) -> None:
        """100 agents against 10,000, in one process: a heartbeat, lists with a limit, an idle sweep"""
        fleets = [self._open(fleet(self.home / f"size-{agents}", agents)) for agents in (100, 10_000)]
        ids = [[line.split()[0] for line in (each.store.folder / "agents.txt").read_text().splitlines()]
               for each in fleets]
        acts: dict[str, Callable[[int], object]] = {
            "heartbeat": lambda which: fleets[which].heartbeat(ids[which][42], uptime=5, cpu=1.5, memory=3.0),
            "list: status=online&limit=50": lambda which: fleets[which].agents_json(
                status="online", limit=50),
            "list: tag=rack-3&limit=50": lambda which: fleets[which].agents_json(tag=["rack-3"], limit=50),
            "list: limit=50": lambda which: fleets[which].agents_json(limit=50),
            "sweep that finds nothing": lambda which: fleets[which].sweep()}
        for label, act in acts.items():
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(200 if self.quick else 2000):
                for which in (0, 1):
                    began_s = time.perf_counter()
                    act(which)
                    times[which].append(time.perf_counter() - began_s)
            few, many = statistics.median(times[0]) * 1e6, statistics.median(times[1]) * 1e6
            self.row(label, f"{few:.0f} µs", f"{many:.0f} µs", f"{many / few:.2f}")
        for each in fleets:
            each.store.close()

    def filters(self) -> None:
        """each filter and sort of a large fleet with limit=50, as a ratio to a plain page, in one process"""
        agents = 10_000 if self.quick else 100_000
        ours = self._open(fleet(self.home / "filters", agents))
        plain: dict[str, Any] = {}
        chosen = [{"status": "online"}, {"status": "stale"}, {"org_id": "none"}, {"tag": ["production"]},
                  {"tag": ["production", "rack-7"]}, {"os": "linux"}, {"version": "1.2.0"}, {"q": "host-77"},
                  {"silent_ms": 5}, *({"sort": name} for name in manager.SORTS)]
        for filters in (plain, *chosen):
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(10):
                for which, given in enumerate((plain, filters)):
                    began_s = time.perf_counter()
                    ours.agents_json(limit=50, **given)
                    times[which].append(time.perf_counter() - began_s)
            page, found = (statistics.median(each) * 1000 for each in times)
            self.row(" ".join(f"{name}={value}" for name, value in filters.items()) or "plain page",
                     f"{page:.2f} ms", f"{found:.2f} ms", f"{found / page:.2f}")
        ours.store.close()

    def backup(self) -> None:
        """heartbeats of 64 connections while backups are made one after another, and the last one's size"""
        folder = fleet(self.home / "backup", 10_000, 100_000 if self.quick else 1_000_000)
        target = self.home / "panguard.backup"
        with Contender("manager", folder) as ours:
            quiet = ours.beat(64, self.seconds)
            over, times = threading.Event(), []

            def back_up() -> None:
                while not over.is_set():
                    began_s = time.perf_counter()
                    manager.back_up(folder, target, lambda part: None)
                    times.append(time.perf_counter() - began_s)
            thread = threading.Thread(target=back_up)
            thread.start()
            busy = ours.beat(64, self.seconds)
            over.set()
            thread.join()
        self.row("rate and 99th percentile, without", f"{quiet[0]:.0f}/s", f"{quiet[1]:.1f} ms")
        self.row("rate and 99th percentile, beside backups", f"{busy[0]:.0f}/s", f"{busy[1]:.1f} ms",
                 f"{busy[0] / quiet[0]:.2f}", busy[3])
        self.row("a backup", f"{statistics.median(times):.1f} s", f"{target.stat().st_size / 2**20:.0f} MiB")

    def many_events(self) -> None:
        """a million threat events in the file: what the questions about them cost, over HTTP"""
        many = 100_000 if self.quick else 1_000_000
        folder = fleet(self.home / "many_events", 1000, many)
        with Contender("manager", folder) as ours:
            for path in ("/api/threats/summary", "/api/threats", "/api/threats?limit=50&page=3&severity=high",
                         "/api/threats?source_ip=203.0.113.9", "/api/overview"):
                times = []
                for _ in range(20):
                    began_s = time.perf_counter()
                    ours.ask(path)
                    times.append((time.perf_counter() - began_s) * 1000)
                self.row(path, f"{statistics.median(times):.1f} ms", f"{max(times):.1f} ms")
            rate, p99_ms, _, complaint = ours.beat(8, self.seconds)
            self.row("heartbeats: rate, 99th percentile", f"{rate:.0f}/s", f"{p99_ms:.1f} ms", complaint)

    def flood(self) -> None:
        """300 agents report one address: events a second, registrations, latencies of other requests"""
        folder = fleet(self.home / "flood", 300, 100_000 if self.quick else 1_000_000)
        bare = bare_inserts(self.home / "bare.db", self.seconds)
        with Contender("manager", folder) as ours:
            for batch, connections in ((100, 4), (1, 64)):
                rate, p99_ms, _, complaint = ours.script("report", connections, self.seconds, batch)
                self.row(f"events/s, {batch} a report; sqlite3, 100 a commit", f"{rate * batch:.0f}/s",
                         f"{bare:.0f}/s", f"{rate * batch / bare:.2f}", f"{p99_ms:.1f} ms", complaint)
            rate, p99_ms, _, complaint = ours.script("register", 64, self.seconds)
            self.row("registrations of 64 clients", f"{rate:.0f}/s", f"{p99_ms:.1f} ms", complaint)
            with flooding(ours) as flood:
                for name, path in (("heartbeats", ""), ("a page of threats", "/api/threats?limit=50"),
                                   ("overview", "/api/overview"), ("/livez", "/livez")):
                    p99_ms = one_client_p99_ms(ours, path, self.seconds)
                    self.row(f"meanwhile, p99 of {name}", f"{p99_ms:.1f} ms")
                self.row("meanwhile, events", f"{flood():.0f}/s")
            with contextlib.closing(sqlite3.connect(folder / "manager.db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                p99_ms = one_client_p99_ms(ours, "/livez", 1.0)
                other.execute("ROLLBACK")
            self.row("p99 of /livez while another program writes", f"{p99_ms:.1f} ms")

    def growth(self) -> None:
        """the median latency of requests, one at a time on one connection, by agents and by threat events"""
        axes = {"registered agents, with 1,000 threat events": [
                    (10**power, 1000) for power in range(2, 4 if self.quick else 6)],
                "stored threat events, with 1,000 agents": [
                    (1000, 10**power) for power in range(3, 5 if self.quick else 7)]}
        taken_ms: dict[tuple[int, int], dict[str, list[float]]] = {}
        with contextlib.ExitStack() as stack:
            contenders = {}
            for size in dict.fromkeys(itertools.chain(*axes.values())):
                folder = fleet(self.home / f"growth-{size[0]}-{size[1]}", *size)
                contenders[size] = stack.enter_context(Contender("manager", folder))
                taken_ms[size] = {name: [] for name in GROWTH}
            # A connection that sends no request is soon closed.
            clients = {size: stack.enter_context(OneClient(each)) for size, each in contenders.items()}
            os.sched_setaffinity(0, CORES[-1:])  # like wrk's
            stack.callback(os.sched_setaffinity, 0, CORES)
            for name, count in GROWTH.items():
                for _ in range(1 if self.quick else 11):
                    for size, client in clients.items():
                        taken_ms[size][name] += [client.take_ms(name) for _ in range(count)]
        panels: list[Panel] = [
            (caption, [size[which] for size in sizes],
             {name: [statistics.median(taken_ms[size][name]) for size in sizes] for name in GROWTH})
            for which, (caption, sizes) in enumerate(axes.items())]
        for caption, numbers, lines in panels:
            self.row(caption, *(f"{number:,}" for number in numbers), "last to first")
            for name, medians_ms in lines.items():
                self.row(name, *(f"{each:.2f} ms" for each in medians_ms),
                         f"{medians_ms[-1] / medians_ms[0]:.1f}")
        if not self.quick:
            GROWTH_CHART.write_text(chart(panels), "utf-8")
            print(f"  drawn: {GROWTH_CHART}")

    @staticmethod
    def _open(folder: Path) -> manager.Manager:
        return manager.Manager(manager.Config(max_agents=10**6), manager.SystemClock(), manager.Store(folder))


# One client

# What `growth` measures, and how often in a turn; last what adds events.
GROWTH = {"heartbeat": 100, "page of agents": 20, "page of threats": 20, "overview": 20,
          "intake of 100 events": 2}


class OneClient:
    """A client that sends one request at a time on one connection."""

    def __init__(self, contender: Contender) -> None:
        self.socket = socket.create_connection(("127.0.0.1", contender.port), timeout=60)
        self.answers = self.socket.makefile("rb")
        self.agents = [line.split() for line in contender.agents.read_text().splitlines()]
        self.chance = random.Random(7)

    def __enter__(self) -> OneClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.answers.close()
        self.socket.close()

    def take_ms(self, name: str) -> float:
        """How long the answer to a request takes. Each agent is as likely to be the sender."""
        agent, token = self.chance.choice(self.agents)
        if name == "heartbeat":
            return self._ask("POST", f"/api/agents/{agent}/heartbeat", token, BODY)
        if name == "registration":
            return self._ask("POST", "/api/agents/register", TOKEN, json.dumps(
                {"hostname": "web-1", "os": "linux", "version": "1.2.0", "tags": ["production"]}))
        if count := re.search(r"\d+(?= events?$)", name):
            events = [{"type": f"type-{number % 20}", "severity": manager.SEVERITIES[number % 4], "details": {
                "sourceIp": f"203.0.{self.chance.randrange(256)}.{self.chance.randrange(256)}", "port": 22}}
                for number in range(int(count[0]))]
            return self._ask("POST", f"/api/agents/{agent}/events", token, json.dumps({"events": events}))
        return self._ask("GET", {"page of agents": "/api/agents?limit=50", "overview": "/api/overview",
                                 "page of threats": "/api/threats?limit=50"}[name], TOKEN)

    def _ask(self, method: str, path: str, token: str, body: str = "") -> float:
        request = (f"{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {token}\r\n"
                   f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode()
        began_s = time.perf_counter()
        self.socket.sendall(request)
        head = b""
        while (line := self.answers.readline()).strip():
            head += line
        if not head.startswith(b"HTTP/1.1 2"):
            raise SystemExit(f"{method} {path}: {head.decode()}")
        self.answers.read(int(found(r"(?i)content-length: (\d+)", head.decode())))
        return (time.perf_counter() - began_s) * 1000


# A chart

GROWTH_CHART = Path(__file__).parent / "docs" / "growth.svg"
CHART_TITLE = "Median time of a request, one at a time on one connection"
CHART_STYLE = """
  text { font: 13px system-ui, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 } .last { font-size: 12px }
  .card, .open { fill: #fff } .card, .grid { stroke: #d0d7de }
  .line { fill: none; stroke: currentColor; stroke-width: 2.2 }
  .mark { stroke: currentColor; stroke-width: 1.5 } .full { fill: currentColor }
  .a { color: #0550ae } .b { color: #1a7f37 } .c { color: #953800 } .d { color: #8250df }
  .e { color: #bf3989 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .card, .open { fill: #0d1117 } .card, .grid { stroke: #30363d }
    .a { color: #58a6ff } .b { color: #3fb950 } .c { color: #f0883e } .d { color: #bc8cff }
    .e { color: #ff7bc1 }
  }"""
# Of each line the class of its colour, its dashes, and the class and the path of its marks.
LINES = (("a", "none", "full", "M-4.5 0A4.5 4.5 0 1 1 4.5 0A4.5 4.5 0 1 1 -4.5 0Z"),
         ("b", "8 4", "open", "M-4 -4H4V4H-4Z"), ("c", "2 4", "full", "M0 -5.5L5 4H-5Z"),
         ("d", "12 4 2 4", "open", "M0 -6L6 0L0 6L-6 0Z"), ("e", "5 3", "full", "M0 5.5L5 -4H-5Z"))
# The caption of the x axis, its numbers, and of each line the name and the times in ms at these numbers.
Panel = tuple[str, list[int], dict[str, list[float]]]


def svg_text(x: float, y: float, text: str, anchor: str = "start", look: str = "") -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def svg_line(which: int, points: list[tuple[float, float]], marked: list[tuple[float, float]]) -> list[str]:
    """Line `which` of LINES through the points, with its mark at those that are marked."""
    color, dashes, fill, mark = LINES[which]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return [f'<path class="{color} line" stroke-dasharray="{dashes}" d="{path}"/>',
            *(f'<path class="{color} mark {fill}" transform="translate({x:.1f} {y:.1f})" d="{mark}"/>'
              for x, y in marked)]


def chart(panels: list[Panel]) -> str:
    """An SVG picture, 800 px wide, of two panels with the same names of lines. All axes are logarithmic."""
    times_ms = [each for _, _, lines in panels for line in lines.values() for each in line]
    lowest, highest = math.floor(math.log10(min(times_ms))), math.ceil(math.log10(max(times_ms)))
    top, bottom, width = 86, 366, 268
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 430" width="800" height="430">',
             f"<title>{CHART_TITLE}</title><style>{CHART_STYLE}</style>",
             '<rect class="card" x=".5" y=".5" width="799" height="429" rx="8"/>',
             svg_text(20, 28, CHART_TITLE, look="title")]
    x = 20.0
    for which, name in enumerate(panels[0][2]):
        parts += [*svg_line(which, [(x, 54), (x + 34, 54)], [(x + 17, 54)]), svg_text(x + 41, 58.5, name)]
        x += 64 + 7 * len(name)

    def y_of(ms: float) -> float:
        return bottom - (math.log10(ms) - lowest) / (highest - lowest) * (bottom - top)

    for left, (caption, numbers, lines) in zip((66, 452), panels, strict=True):
        for tick_ms in (10.0**power for power in range(lowest, highest + 1)):
            parts += [f'<path class="grid" d="M{left} {y_of(tick_ms):.1f}h{width}"/>',
                      svg_text(left - 8, y_of(tick_ms) + 4.5, f"{tick_ms:g} ms", "end")]
        xs = [left + 10 + index * (width - 20) / (len(numbers) - 1) for index in range(len(numbers))]
        for x, number in zip(xs, numbers, strict=True):
            parts += [f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>',
                      svg_text(x, bottom + 20, f"{number:,}", "middle")]
        parts.append(svg_text(left + width / 2, bottom + 44, caption, "middle"))
        for which, line_ms in enumerate(lines.values()):
            points = [(x, y_of(ms)) for x, ms in zip(xs, line_ms, strict=True)]
            parts += svg_line(which, points, points)
        y = bottom + 14.0
        for ms in sorted(line_ms[-1] for line_ms in lines.values()):
            y = min(y_of(ms), y - 14)  # higher where it would cover the one below
            parts.append(svg_text(left + width + 1, y + 4, f"{ms:.{1 if ms >= 1 else 2}f} ms", look="last"))
    return "\n".join([*parts, "</svg>\n"])


# Crowds


@contextlib.contextmanager
def held(contender: Contender, count: int) -> Iterator[list[socket.socket]]:
    """Keep-alive connections that have been served once and stay open."""
    with contextlib.ExitStack() as crowd:
        sockets = [crowd.enter_context(socket.create_connection(("127.0.0.1", contender.port)))
                   for _ in range(count)]
        for each in sockets:
            each.sendall(b"GET /health HTTP/1.1\r\nHost: bench\r\n\r\n")
        for each in sockets:
            each.recv(4096)
        yield sockets


def bare_inserts(path: Path, seconds: float) -> float:
    """Events a second that a bare sqlite3 loop inserts: three indexes, synchronous=FULL, a commit for 100."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE threats (key INTEGER PRIMARY "
            "KEY, agent_id, hostname, type, severity, confidence, rule, received_ms, source_ip, details); "
            "CREATE INDEX a ON threats (received_ms); CREATE INDEX b ON threats (agent_id, received_ms); "
            "CREATE INDEX c ON threats (source_ip, received_ms)")
        count, until_s = 0, time.perf_counter() + seconds
        while time.perf_counter() < until_s:
            db.execute("BEGIN")
            for number in range(100):
                db.execute("INSERT INTO threats VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (
                    f"agent-{count // 100 % 300:08x}", "web-1", "brute_force", "high", 0.9, "ssh-1",
                    count + number, "203.0.113.9",
                    '{"sourceIp":"203.0.113.9","port":22,"user":"root","attempts":31}'))
            db.execute("COMMIT")
            count += 100
    return count / seconds


@contextlib.contextmanager
def flooding(contender: Contender) -> Iterator[Callable[[], float]]:
    """Reports of 100 events on four connections. The function ends them and returns events a second."""
    script = contender.agents.with_name("report.lua")
    process = subprocess.Popen(
        ["taskset", "-c", str(CORES[-1]), "wrk", "-t1", "-c4", "-d600s", "-s", str(script),
         f"http://127.0.0.1:{contender.port}"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "BENCH_AGENTS": str(contender.agents), "BENCH_BATCH": "100"})

    def rate() -> float:
        process.send_signal(signal.SIGINT)
        return float(found(r"Requests/sec:\s+([\d.]+)", process.communicate()[0])) * 100
    try:
        yield rate
    finally:
        process.kill()
        process.wait()


def one_client_p99_ms(contender: Contender, path: str, seconds: float) -> float:
    """The 99th percentile, in ms, of one client's GETs one after another; of heartbeats without a path."""
    agents = [line.split() for line in contender.agents.read_text().splitlines()]
    times_ms, until_s = [], time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        agent = agents[len(times_ms) % len(agents)][0]
        began_s = time.perf_counter()
        contender.ask(path or f"/api/agents/{agent}/heartbeat", None if path else BODY.encode())
        times_ms.append((time.perf_counter() - began_s) * 1000)
    return statistics.quantiles(times_ms, n=100)[98] if len(times_ms) > 1 else times_ms[0]


@contextlib.contextmanager
def dripping(contender: Contender, count: int) -> Iterator[None]:
    """Clients that send their request a byte a second."""
    over = threading.Event()
    with contextlib.ExitStack() as crowd:
        sockets = [crowd.enter_context(socket.create_connection(("127.0.0.1", contender.port)))
                   for _ in range(count)]

        def drip() -> None:
            text = b"POST /api/agents/register HTTP/1.1\r\nHost: bench\r\nX-Padding: " + b"x" * 600
            for byte in text:
                for each in sockets:
                    with contextlib.suppress(OSError):
                        each.send(bytes([byte]))
                if over.wait(1):
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextlib.contextmanager
def readers(contender: Contender, count: int) -> Iterator[Callable[[bytes], None]]:
    """Event streams; the function given waits until each of them has received some text."""
    with contextlib.ExitStack() as crowd, selectors.DefaultSelector() as selector:
        for _ in range(count):
            each = crowd.enter_context(socket.create_connection(("127.0.0.1", contender.port)))
            each.sendall(b"GET /api/events/stream HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %b\r\n\r\n"
                         % TOKEN.encode())
            selector.register(each, selectors.EVENT_READ)
        texts = dict.fromkeys((key.fileobj for key in selector.get_map().values()), b"")

        def wait_for_all(text: bytes) -> None:
            missing = set(texts)
            deadline_s = time.monotonic() + 30
            while missing:
                if time.monotonic() > deadline_s:
                    raise SystemExit(f"{len(missing)} of {count} streams never got {text!r}")
                for key, _ in selector.select(1):
                    each = key.fileobj
                    assert isinstance(each, socket.socket)
                    texts[each] = (texts[each] + each.recv(65536))[-4096:]
                    if text in texts[each]:
                        missing.discard(each)

        wait_for_all(b"event: connected")
        yield wait_for_all


# A soak

_SOAK_AGENTS = 2000
# The bounds after the first fifth of a soak, in which memory and files reach the size that the work needs.
_SOAK_BOUNDS: dict[str, Callable[[float], float]] = {
    "memory MB": lambda first: 1.2 * first + 16, "descriptors": lambda first: first + 16,
    "log MB": lambda first: 32.0}


class Soak:
    """A manager as users start it, with 2,000 agents that send a heartbeat each second, and with events,
    reads, streams and backups."""

    def __init__(self, home: Path, seconds: float) -> None:
        self.home, self.seconds = home, seconds
        self.folder = home / "data"
        self.taken_ms, self.taken_lately_ms = array.array("d"), array.array("d")
        self.requests, self.streamed, self.backups = 0, 0, 0
        self.errors: list[str] = []
        self.measured: list[dict[str, float]] = []
        self.agents: list[tuple[str, str]] = []

    def run(self) -> int:
        """Print what is measured at intervals; 0 unless something failed or grew beyond its bounds."""
        with (self.home / "log").open("w") as log, subprocess.Popen(
                [sys.executable, manager.__file__, "--port", "0", "--data-dir", str(self.folder),
                 "--tls", "off"],
                stdout=subprocess.PIPE, stderr=log, text=True) as self.process:
            assert self.process.stdout
            while "curl " not in (line := self.process.stdout.readline()):
                assert line, (self.home / "log").read_text()
            self.port = int((self.folder / "url").read_text().rpartition(":")[2])
            self.token = (self.folder / "token").read_text().strip()
            try:
                asyncio.run(self._work())
            finally:
                self.process.terminate()
        if self.process.returncode:
            self.errors.append(f"the manager ended with status {self.process.returncode}")
        print(f"in all: {self._latencies(self.taken_ms)}, {self.streamed} entries streamed, "
              f"{self.backups} backups, {len((self.home / 'log').read_text().splitlines())} lines of log")
        warm = self.measured[len(self.measured) // 5:]
        for name, bound in _SOAK_BOUNDS.items():
            first, most = warm[0][name], max(each[name] for each in warm)
            allowed = bound(first)
            print(f"{name}: {first:.0f} after the first fifth, {most:.0f} at most, {allowed:.0f} allowed")
            if most > allowed:
                self.errors.append(f"{name} grew")
        print(f"{len(self.errors)} errors" + "".join(f"; {each}" for each in self.errors[:5]))
        return bool(self.errors)

    async def _ask(self, wire: tuple[asyncio.StreamReader, asyncio.StreamWriter], method: str, path: str,
                   token: str, body: Any = None) -> Any:
        """The JSON of the answer. An answer that is no success is added to `errors`."""
        reader, writer = wire
        data = b"" if body is None else json.dumps(body).encode()
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {token}\r\n"
                     "Content-Type: application/json\r\n"
                     f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        head = await reader.readuntil(b"\r\n\r\n")
        answer = await reader.readexactly(int(found(r"(?i)content-length: (\d+)", head.decode())))
        self.requests += 1
        if head.split()[1] not in (b"200", b"201"):
            self.errors.append(f"{method} {path}: {head.split()[1].decode()} {answer[:200].decode()}")
        return json.loads(answer)

    def _open(self) -> Any:
        return asyncio.open_connection("127.0.0.1", self.port)

    async def _work(self) -> None:
        at_once = asyncio.Semaphore(50)

        async def register(number: int) -> tuple[Any, Any]:
            async with at_once:
                wire = await self._open()
                answer = await self._ask(wire, "POST", "/api/agents/register", self.token, {
                    "hostname": f"host-{number}", "os": "linux", "version": "1.2.0",
                    "machine_id": f"m-{number}"})
                return answer["data"], wire
        made = await asyncio.gather(*map(register, range(_SOAK_AGENTS)))
        self.agents = [(agent["id"], agent["token"]) for agent, _ in made]
        self.began_s = time.monotonic()
        self.end_s = self.began_s + self.seconds
        done = await asyncio.gather(
            *(self._beat(agent, wire) for agent, (_, wire) in zip(self.agents, made, strict=True)),
            *(self._stream() for _ in range(5)), self._report(), self._read(), self._back_up(), self._watch(),
            return_exceptions=True)
        self.errors += [repr(each) for each in done if each is not None]

    async def _beat(self, agent: tuple[str, str], wire: Any) -> None:
        due_s = time.monotonic() + random.random()
        while due_s < self.end_s:
            await asyncio.sleep(due_s - time.monotonic())
            began_s = time.perf_counter()
            await self._ask(wire, "POST", f"/api/agents/{agent[0]}/heartbeat", agent[1],
                            {"uptime": 5, "cpu": 12.5, "memory": 40.25})
            taken_ms = (time.perf_counter() - began_s) * 1000
            self.taken_ms.append(taken_ms)
            self.taken_lately_ms.append(taken_ms)
            due_s = max(due_s + 1, time.monotonic())

    async def _report(self) -> None:
        wire = await self._open()
        while time.monotonic() < self.end_s:
            agent_id, token = random.choice(self.agents)
            await self._ask(wire, "POST", f"/api/agents/{agent_id}/events", token, {"events": [
                {"type": "brute_force", "severity": "high",
                 "details": {"sourceIp": f"203.0.113.{random.randrange(250)}"}}] * 5})
            await asyncio.sleep(0.05)

    async def _read(self) -> None:
        wire = await self._open()
        while time.monotonic() < self.end_s:
            for path in ("/api/agents?limit=50", "/api/threats?limit=50", "/api/overview",
                         "/api/threats/summary", "/api/events?order=desc", "/api/timeline"):
                await self._ask(wire, "GET", path, self.token)
                await asyncio.sleep(0.1)

    async def _stream(self) -> None:
        reader, writer = await self._open()
        writer.write("GET /api/events/stream HTTP/1.1\r\nHost: soak\r\n"
                     f"Authorization: Bearer {self.token}\r\n\r\n".encode())
        with contextlib.suppress(asyncio.TimeoutError):
            while data := await asyncio.wait_for(reader.read(65536), self.end_s - time.monotonic()):
                self.streamed += data.count(b"\nevent: ")
            self.errors.append("a stream ended")

    async def _back_up(self) -> None:
        while time.monotonic() < self.end_s:
            command = await asyncio.create_subprocess_exec(
                sys.executable, manager.__file__, "backup", self.home / "backup", "--data-dir", self.folder,
                stdout=subprocess.DEVNULL)
            if await command.wait():
                self.errors.append("a backup failed")
            self.backups += 1
            await asyncio.sleep(5)

    async def _watch(self) -> None:
        every_s = max(1.0, self.seconds / 20)
        while (passed_s := time.monotonic() - self.began_s) < self.seconds - every_s / 2:
            await asyncio.sleep(every_s)
            proc = Path(f"/proc/{self.process.pid}")
            self.measured.append({
                "memory MB": int((proc / "statm").read_text().split()[1]) * resource.getpagesize() / 2**20,
                "descriptors": len(os.listdir(proc / "fd")),
                "log MB": (self.folder / "manager.db-wal").stat().st_size / 2**20})
            print(f"  {passed_s + every_s:5.0f} s: {self.requests} requests, {len(self.errors)} errors, "
                  f"{self._latencies(self.taken_lately_ms)}"
                  + "".join(f", {name} {value:.1f}" for name, value in self.measured[-1].items()), flush=True)
            del self.taken_lately_ms[:]

    @staticmethod
    def _latencies(taken_ms: array.array[float]) -> str:
        ordered = sorted(taken_ms) or [math.nan]
        return (f"{len(taken_ms)} heartbeats, p50 {ordered[len(ordered) // 2]:.1f}, "
                f"p99 {ordered[len(ordered) * 99 // 100]:.1f}, longest {ordered[-1]:.1f} ms")


def main() -> int:
    names = [name for name, value in vars(Bench).items() if not name.startswith("_") and value.__doc__
             and name not in ("row", "duel")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help="one of " + ", ".join(names) + "; all if none given; or soak [SECONDS]")
    parser.add_argument("--quick", action="store_true", help="one short round on smaller files")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]))
        return 0
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    print(f"Panguard Manager {manager.__version__}, Python {platform.python_version()}, SQLite "
          f"{sqlite3.sqlite_version}, {platform.system()} {platform.machine()}, {len(CORES)} cores",
          flush=True)
    if options.names[:1] == ["soak"]:
        with tempfile.TemporaryDirectory(prefix="panguard-soak-") as home:
            return Soak(Path(home), float((options.names[1:] or ["600"])[0])).run()
    if unknown := set(options.names) - set(names):
        parser.error(f"no measurement is called {', '.join(sorted(unknown))}")
    if not shutil.which("wrk") and not {*options.names} <= {"growth", "small_box"}:
        print("bench_manager.py needs wrk: apt-get install wrk", file=sys.stderr)
        return 1
    print("the client has one of the cores")
    with tempfile.TemporaryDirectory(prefix="panguard-bench-") as home:
        bench = Bench(Path(home), options.quick)
        for name in options.names or names:
            print(f"{name}: {getattr(Bench, name).__doc__}")
            getattr(bench, name)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
