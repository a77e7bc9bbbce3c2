"""report.html of a run, opened in a real browser: no errors, no request to anywhere, figures, heads
that sort, nothing wider than a narrow screen, light and dark, and text of data sets escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from browser import opened
from conftest import QUICK, Launch
from paw.errors import ConfigError
from paw.paths import embedded
from paw.report.card import CARD

pytestmark = pytest.mark.slow
TRICK = "<img src=x onerror=document.title='run'>"
# Put at the end of a copy of the page; what it finds is read from the document it leaves.
PROBE = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable"), seen = {};
  const column = () => [...table.tBodies[0].rows].map(r => +r.cells[1].dataset.value);
  const head = table.querySelectorAll("th button")[1];
  head.click(); seen.up = column();
  head.click(); seen.down = column();
  const figures = [...document.querySelectorAll("figure svg")];
  seen.figures = figures.map(s => s.getBoundingClientRect().height > 50);
  seen.images = [...document.images].map(i => i.naturalWidth > 0);
  seen.back = getComputedStyle(document.body).backgroundColor;
  seen.ink = getComputedStyle(document.body).color;
  seen.text = getComputedStyle(document.querySelector("figure svg text")).fill;
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


def test_the_page_of_a_run(launch: Launch, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in embedded("facts").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{**row, "question": f"{row['question']} {TRICK}"} for row in rows]
        (data / file.name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    launch(
        *QUICK[:1], "transfer.controls=[random]", "transfer.draws=2", "train.max_steps=20",
        "evaluate.limit=40", f"dataset.path={data}",
    )  # fmt: skip
    [run] = (tmp_path / "outputs" / "runs").iterdir()
    text = (run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text.replace("http-equiv", ""))
    assert TRICK not in text
    assert "&lt;img src=x" in text  # among the examples that changed
    assert "Right with target + procrustes, wrong with target base" in text
    results = json.loads((run / "results.json").read_text())
    gap = next(s for s in results["systems"] if s["system"] == "target + procrustes")["gap"]
    if gap["eligible"]:
        assert f"procrustes recovers {gap['recovered']:.0%}".replace("%", " %") in text
    moved = next(s for s in results["systems"] if s["system"] == "target + procrustes")
    for name, accuracy in (("target_procrustes", moved["accuracy"]), ("source", None)):
        card = ModelCard.load(run / "adapters" / name / "README.md")
        assert card.data.library_name == "peft"
        assert card.data.base_model
        assert card.text.count("## Evaluation") == 1
        assert accuracy is None or f"{accuracy:.3f}" in card.text
    assert "transfer=procrustes" in (run / "adapters" / "target_procrustes" / CARD).read_text()
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", PROBE + "</body>"))
    light, said = opened(page, "--blink-settings=preferredColorScheme=1")
    assert said == ""
    assert light["up"] == sorted(light["up"])
    assert light["down"] == sorted(light["up"], reverse=True)
    assert len(set(light["up"])) > 1
    assert len(light["figures"]) >= 3
    assert all(light["figures"])
    assert all(light["images"])
    assert light["title"] == results["title"]  # no text of the data has run
    assert light["text"] == light["ink"]
    dark, said = opened(page, "--blink-settings=preferredColorScheme=0")
    assert said == ""
    assert dark["back"] != light["back"]
    assert dark["text"] == dark["ink"] != light["ink"]
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME)
    narrow, said = opened(frame)
    assert said == ""
    assert narrow["wide"] <= narrow["room"]


def test_a_page_is_made_anew_of_any_run(launch: Launch, tmp_path: Path) -> None:
    launch("task=evaluate", "models=[tiny_llama]", "dataset=facts", "evaluate.limit=10")
    [run] = (tmp_path / "outputs" / "runs").iterdir()
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    launch("task=report", f"run={run}")
    assert (run / "report.html").read_text() == before
    with pytest.raises(ConfigError, match=r"is no run folder: it has no results.json"):
        launch("task=report", f"run={tmp_path}")
