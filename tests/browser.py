"""Pages in headless Chromium: what a script in one finds, and what the browser says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def opened(file: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the page wrote as JSON into its element `probe`, and what the browser complained of."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--allow-file-access-from-files", "--virtual-time-budget=3000",
            "--window-size=1280,1000", f"--user-data-dir={file.parent / 'profile'}",
            *options, "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert probe, done.stdout[-2000:] + done.stderr[-2000:]
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    found: dict[str, Any] = json.loads(probe[1].replace("&quot;", '"').replace("&amp;", "&"))
    return found, said
