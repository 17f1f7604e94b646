"""A project that uses the installed module: mypy and pyright must refuse exactly the lines marked `error`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import panguard_manager
from panguard_manager import Config, Entry, Exchange, ManualClock, Registration, Server, Settings, Status


@pytest.fixture
def guard_manager() -> Iterator[Server[ManualClock]]:
    with Server(port=0, clock=ManualClock(), heartbeat_timeout_ms=30_000) as server:
        yield server


def test_right(guard_manager: Server[ManualClock], tmp_path: Path) -> None:
    guard_manager.clock.advance(67)
    made: list[Registration] = guard_manager.seed(10, threats=3, tags=["lab"])
    assert guard_manager.manager.agent(made[0].agent.id).status is Status.STALE
    entry: Entry = guard_manager.wait_for(type="agent_stale", agent_id=made[0].agent.id, timeout_s=1.0)
    fault = guard_manager.faults.add(route="POST /api/agents/register", drop="after", times=2)
    sent: list[Exchange] = guard_manager.requests
    beat: Exchange = guard_manager.wait_for_request(route="POST /api/agents/:id/heartbeat", timeout_s=0)
    print(beat.caller and beat.caller.role, beat.headers.get("user-agent"))
    settings: Settings = {"heartbeat_timeout_ms": 1000}
    with Server(**settings), Server(port=0, data_dir=tmp_path, auth_token="mine",
                                    tls_name=["a", "b"]) as server:
        clock: panguard_manager.SystemClock = server.clock
    print(entry.seq, fault.hits, sent[0].body["hostname"], clock.now(),
          Config(port=0, notify_on="offline").port)


def test_wrong(guard_manager: Server[ManualClock]) -> None:
    Server(prot=0)  # error
    Server(port=0, clock=ManualClock(), prot=0)  # error
    Server(port="http")  # error
    Server(port=0).clock.advance(1)  # error
    Server(port=0, clock=1)  # error
    Config(prot=0)  # error
    Server(tls="of")  # error
    guard_manager.faults.add(sttus=3)  # error
    guard_manager.faults.add(drop="befor")  # error
    guard_manager.wait_for(typ="agent_stale")  # error
    guard_manager.seed(agent=1)  # error
    guard_manager.wait_for_request(type="agent_stale")  # error
    print(guard_manager.request)  # error
