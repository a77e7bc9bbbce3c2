"""Pages in headless Chromium: what a script in one finds, and what the browser says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def document(url: str, profile: Path, *options: str, wait: float = 3) -> tuple[str, str]:
    """A page as it stands after so many of its own seconds, and what the browser complained of."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--allow-file-access-from-files", f"--virtual-time-budget={wait * 1000:.0f}",
            "--window-size=1280,1000", f"--user-data-dir={profile}",
            *options, "--dump-dom", url,
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def opened(file: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the page wrote as JSON into its element `probe`, and what the browser complained of."""
    text, said = document(file.as_uri(), file.parent / "profile", *options)
    probe = re.search(r'<pre id="probe">(.*?)</pre>', text, re.DOTALL)
    assert probe, text[-2000:] + said
    found: dict[str, Any] = json.loads(probe[1].replace("&quot;", '"').replace("&amp;", "&"))
    return found, said
