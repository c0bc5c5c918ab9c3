"""A real browser without a display, where one is installed: what a page holds once its scripts ran, and what it asked for."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

BROWSER = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing leaves this machine
)
NOBODY = "not an origin"
needs_browser = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")


class Page(NamedTuple):
    """The document, what its scripts said on the console, the http addresses that were asked for, and a picture of it (PNG)."""

    document: str
    console: list[str]
    requests: set[str]
    picture: bytes


def look_at(address: str, folder: Path, *, seconds: int = 5, height: int = 1600) -> Page:
    """Open an address, let so many seconds of the page's time pass, and look."""
    assert BROWSER is not None
    folder.mkdir(parents=True, exist_ok=True)
    log, picture = folder / "net.json", folder / "page.png"
    words = [
        BROWSER,
        *QUIET,
        f"--user-data-dir={folder}/profile",
        f"--window-size=1400,{height}",
        "--enable-logging=stderr",
        f"--virtual-time-budget={1000 * seconds}",
    ]
    shown = subprocess.run(
        [*words, f"--log-net-log={log}", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    subprocess.run([*words, f"--screenshot={picture}", address], capture_output=True, timeout=120, check=True)
    events = json.loads(log.read_text())["events"]
    # What the browser asks for by itself has no page that it comes from, nor has the address that was given.
    jobs = [event["params"] for event in events if "url" in event.get("params", {})]
    asked = {str(job["url"]) for job in jobs if job.get("initiator", NOBODY) != NOBODY}
    console = [line for line in shown.stderr.splitlines() if ":CONSOLE" in line]
    return Page(shown.stdout, console, {url for url in asked if url.startswith("http")}, picture.read_bytes())
