"""A real browser without a window: what a page is once its scripts have run, and what they complained about."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "google-chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--v=0",
    "--window-size=1280,2400",
)
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n')


@dataclass(frozen=True)
class Page:
    """The document as it stands at the end, and the lines of its console."""

    dom: str
    console: list[str]

    @property
    def facts(self) -> dict[str, str]:
        """The data attributes of the body."""
        body = re.search(r"<body([^>]*)>", self.dom)
        assert body, self.dom[:500]
        return {name: html.unescape(value) for name, value in re.findall(r'data-(\w+)="([^"]*)"', body[1])}


def program() -> str | None:
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


def lacking() -> str | None:
    """Why no page can be looked at; None if one can."""
    found = program()
    if found is None:
        return f"{' or '.join(PROGRAMS)} not installed (`make browser-install` on Debian)"
    works = subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0
    return None if works else f"{found} does not start"


def look(page: Path, profile: Path) -> Page:
    """Open the page in a browser that has never been used."""
    found = program()
    assert found
    command = [found, *OPTIONS, f"--user-data-dir={profile}", "--dump-dom", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return Page(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def probe(page: Path, script: str, profile: Path) -> Any:
    """Run `script`, a function's body, on a copy of the page without its policy; what it returns, through JSON."""
    text, removed = POLICY.subn("", page.read_text(encoding="utf-8"))
    assert removed == 1
    asking = f"<script>document.body.dataset.probe = JSON.stringify((() => {{ {script} }})())</script>\n</body>"
    copy = page.with_name("probed.html")
    copy.write_text(asking.join(text.rsplit("</body>", 1)), encoding="utf-8")
    seen = look(copy, profile)
    assert seen.console == []
    return json.loads(seen.facts["probe"])
