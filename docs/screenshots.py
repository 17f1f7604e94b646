"""Makes the pictures in this folder: a manager with made-up agents, photographed in headless Chromium.

    .venv/bin/pip install -e '.[browser]' && .venv/bin/python docs/screenshots.py
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from manager import ManualClock, Server

HOUR_S = 3600
MACHINES = (("web", "linux", "web-tier"), ("db", "linux", "database"), ("edge", "linux", "edge"),
            ("mac", "darwin", "laptop"), ("win", "win32", "office"))
SILENT_S = {3: 240, 11: 9 * 60, 17: 11 * HOUR_S, 23: 100, 31: 130}  # machine's number: time of its silence
TYPES = ("brute_force", "port_scan", "malware_detected", "suspicious_process")
RULES = [{"type": "alert_threshold", "config": {"severity": "high", "count": 3}}]


def block(address: str) -> dict[str, Any]:
    """A rule that blocks an address."""
    return {"type": "block_ip", "config": {"ip": address}}


def fill(server: Server) -> str:
    """A day of 40 agents; the id of one that takes part in an attack."""
    chance = random.Random(7)
    manager, clock = server.manager, server.clock
    assert isinstance(clock, ManualClock)
    agents = []
    for number in range(40):
        name, system, role = MACHINES[number % 5]
        agents.append(manager.register(
            f"{name}-{number // 5 + 1}.taipei", system, "1.8.4" if chance.random() < 0.2 else "1.9.1",
            ip=f"10.0.{number % 5}.{number + 10}",
            tags=["production" if number % 4 else "staging", role]).agent)
    manager.create_policy("Base line", [block("203.0.113.9"), *RULES])
    for left_s in range(24 * HOUR_S, 0, -50):
        clock.advance(50)
        for number, agent in enumerate(agents):
            if SILENT_S.get(number, 0) < left_s:
                manager.heartbeat(agent.id, cpu=chance.uniform(1, 70), memory=chance.uniform(20, 95),
                                  uptime=90_000, policy_version=1)
        if left_s % 1800 == 0:
            manager.report_events(chance.choice(agents).id, [{
                "type": chance.choice(TYPES),
                "severity": chance.choice(("low", "low", "medium", "high", "critical")),
                "details": {"sourceIp": f"198.51.100.{chance.randrange(200)}"}} for _ in range(3)])
    for agent in agents[5:9]:
        manager.report_events(agent.id, [{"type": "brute_force", "severity": "high", "details": {
            "sourceIp": "203.0.113.66"}}])
    manager.create_policy("Block the attacker", [block("203.0.113.66"), *RULES])
    for number, agent in enumerate(agents):
        if number % 6 and number not in SILENT_S:
            manager.heartbeat(agent.id, policy_version=2)
    clock.advance(9)
    return agents[5].id


def main() -> None:
    """Write the pictures beside this file."""
    folder = Path(__file__).parent
    clock = ManualClock(time.time() - 24 * HOUR_S)
    with Server(port=0, clock=clock) as server, sync_playwright() as playwright:
        views = {"fleet": "fleet", "agent": f"agent/{fill(server)}", "threats": "threats",
                 "overview": "overview"}
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for theme in ("light", "dark"):
            context = browser.new_context(viewport={"width": 1400, "height": 860}, color_scheme=theme,
                                          locale="en-GB", timezone_id="Asia/Taipei")
            page = context.new_page()
            page.goto(server.url)
            page.get_by_label("Token").fill(server.token)
            page.get_by_role("button", name="Sign in").click()
            page.get_by_text("Live", exact=True).wait_for()
            for name, view in views.items():
                page.goto(f"{server.url}/#{view}")
                page.locator("main[aria-busy=false] h1").wait_for()
                page.mouse.move(1, 1)
                page.wait_for_timeout(1800)  # the fade of what has changed
                if theme == "light" or name == "fleet":
                    page.screenshot(path=folder / f"{name}{'-dark' * (theme == 'dark')}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
