"""report.html of a run, opened in a real browser: no errors, no request to anywhere, figures, heads
that sort, nothing wider than a narrow screen, light and dark, and text of data sets escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from browser import looked_at
from conftest import QUICK, Launch
from paw.errors import ConfigError
from paw.paths import embedded
from paw.report.card import CARD

pytestmark = pytest.mark.slow
TRICK = "<img src=x onerror=document.title='run'>"


def test_the_page_of_a_run(launch: Launch, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in embedded("facts").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{**row, "question": f"{row['question']} {TRICK}"} for row in rows]
        (data / file.name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    launch(
        *QUICK[:1], "transfer.controls=[random]", "transfer.draws=2", "train.max_steps=20",
        "transfer.positions=2000", "evaluate.limit=40", f"dataset.path={data}",
    )  # fmt: skip
    [run] = (tmp_path / "outputs" / "runs").iterdir()
    text = (run / "report.html").read_text()
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
    seen = looked_at(run, tmp_path)
    assert seen["up"] == sorted(seen["up"])
    assert seen["down"] == sorted(seen["up"], reverse=True)
    assert len(set(seen["up"])) > 1
    assert len(seen["figures"]) >= 3
    assert seen["images"]
    assert seen["title"] == results["title"]  # no text of the data has run


def test_a_page_is_made_anew_of_any_run(launch: Launch, tmp_path: Path) -> None:
    launch("task=evaluate", "models=[tiny_llama]", "dataset=facts", "evaluate.limit=10")
    [run] = (tmp_path / "outputs" / "runs").iterdir()
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    launch("task=report", f"run={run}")
    assert (run / "report.html").read_text() == before
    with pytest.raises(ConfigError, match=r"is no run folder: it has no results.json"):
        launch("task=report", f"run={tmp_path}")
