"""Pages in headless Chromium: what a script in one finds, and what the browser says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

# Put at the end of a copy of the page; what it finds is read from the document it leaves.
PROBE = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable"), seen = {};
  if (table) {
    const column = () => [...table.tBodies[0].rows].map(r => +r.cells[1].dataset.value);
    const head = table.querySelectorAll("th button")[1];
    head.click(); seen.up = column();
    head.click(); seen.down = column();
  }
  const figures = [...document.querySelectorAll("figure svg")];
  seen.figures = figures.map(s => s.getBoundingClientRect().height > 50);
  seen.images = [...document.images].map(i => i.naturalWidth > 0);
  seen.back = getComputedStyle(document.body).backgroundColor;
  seen.ink = getComputedStyle(document.body).color;
  const text = document.querySelector("figure svg text");
  seen.text = text && getComputedStyle(text).fill;
  seen.title = document.title;
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(seen);
  document.body.append(out);
});
</script>
"""
FRAME = """<!doctype html>
<iframe src="page.html" style="width:390px;height:800px;border:0"></iframe><pre id="probe"></pre>
<script>
addEventListener("load", () => {
  const found = document.querySelector("iframe").contentDocument.documentElement;
  const seen = {wide: found.scrollWidth, room: found.clientWidth};
  document.querySelector("#probe").textContent = JSON.stringify(seen);
});
</script>"""


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


def looked_at(run: Path, beside: Path) -> dict[str, Any]:
    """What the page of a run looks like in light, dark and on a narrow screen; nothing in it may
    complain, ask another machine, stay empty or be wider than the screen.

    Args:
        beside: a folder for copies of it.
    """
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    page = beside / "page.html"
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    light, said = opened(page, "--blink-settings=preferredColorScheme=1")
    assert said == ""
    assert all(light["figures"])
    assert all(light["images"])
    assert light["text"] in (None, light["ink"])
    dark, said = opened(page, "--blink-settings=preferredColorScheme=0")
    assert said == ""
    assert dark["back"] != light["back"]
    assert dark["text"] in (None, dark["ink"])
    assert dark["ink"] != light["ink"]
    frame = beside / "frame.html"
    frame.write_text(FRAME, encoding="utf-8")
    narrow, said = opened(frame)
    assert said == ""
    assert narrow["wide"] <= narrow["room"]
    return light


def answered(url: str, server: subprocess.Popen[Any]) -> bytes:
    """What a server answers, as soon as it does."""
    for _ in range(200):
        assert server.poll() is None, "it has ended"
        try:
            with urllib.request.urlopen(url) as answer:
                return bytes(answer.read())
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"nobody answers at {url}")
