"""Refinement from the command line: no label is read, a bare adapter suffices, and the table says
what did it."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path

import pytest

from browser import looked_at
from conftest import QUICK, Launch, Paw
from paw.paths import embedded

pytestmark = pytest.mark.slow
REVERSE = ["model@source=tiny_qwen2", "model@target=tiny_llama"]
SMALL = ["refine.count=80", "refine.steps=10", "refine.gain_steps=6", "refine.held=12"]


def run_folder(root: Path) -> Path:
    return sorted((root / "outputs" / "runs").iterdir())[-1]


def table(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "results.csv") as f:
        return {row["system"]: row for row in csv.DictReader(f)}


def trained(launch: Launch, tmp_path: Path) -> Path:
    """An adapter of the source, as somebody would hand it over."""
    launch(
        "task=train", "model@source=tiny_qwen2", *QUICK[:1], "train.max_steps=60",
        "evaluate.limit=10",
    )  # fmt: skip
    bare = tmp_path / "bare"
    shutil.copytree(run_folder(tmp_path) / "adapters" / "source", bare)
    return bare


def data(folder: Path, labelled: bool) -> Path:
    """The embedded questions, with their answers or without."""
    folder.mkdir()
    for file in embedded("facts").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [row if labelled else {**row, "answer": None} for row in rows]
        (folder / file.name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


def test_no_label_is_read(launch: Launch, tmp_path: Path) -> None:
    """The whole of task=transfer, from calibration to the refined adapter, on the same questions
    with their answers and without: the same bytes."""
    bare, found = trained(launch, tmp_path), []
    for labelled in (True, False):
        folder = data(tmp_path / f"data_{labelled}", labelled)
        launch(
            "task=transfer", *REVERSE, "experiment=demo", f"adapter.path={bare}",
            "refine=sequences", "transfer.controls=[]", "transfer.positions=2000",
            f"dataset.path={folder}",
            *SMALL, f"paths.outputs={tmp_path / str(labelled)}",
        )  # fmt: skip
        [run] = (tmp_path / str(labelled) / "runs").iterdir()
        refined = run / "adapters" / "target_procrustes_refined" / "adapter_model.safetensors"
        moved = run / "adapters" / "target_procrustes" / "adapter_model.safetensors"
        found.append((refined.read_bytes(), moved.read_bytes()))
        assert found[-1][0] != found[-1][1]
    assert found[0] == found[1]


def test_the_table_says_what_did_it(launch: Launch, tmp_path: Path) -> None:
    launch(
        "experiment=refined_transfer", *REVERSE, "transfer.controls=[]", "train.max_steps=150",
        "evaluate.limit=120", "transfer.positions=4096",
    )  # fmt: skip
    folder = run_folder(tmp_path)
    rows = table(folder)
    gap = {
        name.removeprefix("target + "): float(row["gap_recovered"])
        for name, row in rows.items()
        if row["gap_recovered"]
    }
    refined = gap.pop("procrustes, refined")
    assert refined > 0.9
    assert refined > gap["procrustes, gains only"] > gap["procrustes"] > 0.2
    assert gap["procrustes, refined on the base's answers"] < 0.2
    assert gap["procrustes, refined on shuffled answers"] < 0.6
    assert {"fresh, refined", "own adapter, as many steps"} <= set(gap)
    said = (folder / "summary.md").read_text()
    assert said.split("\n\n")[1].startswith("**procrustes, refined recovers ")
    assert "Refinement from procrustes: on 25 prompts that were held out" in said
    assert "target + procrustes, refined is above target + procrustes:" in said
    assert "<h2>Refinement</h2>" in (folder / "report.html").read_text()
    assert len(looked_at(folder, tmp_path)["figures"]) >= 4


def test_prompts_of_ones_own_and_a_bare_adapter_suffice(paw: Paw, tmp_path: Path) -> None:
    """No data set: an adapter's folder, and a file of prompts."""
    launch_folder = tmp_path / "made"
    launch_folder.mkdir()
    paw(
        "task=train", "model@source=tiny_qwen2", *QUICK[:1], "train.max_steps=60",
        "evaluate.limit=10", cwd=launch_folder,
    )  # fmt: skip
    bare = run_folder(launch_folder) / "adapters" / "source"
    rows = (embedded("facts") / "train.jsonl").read_text().splitlines()
    asked = [f"question : {json.loads(row)['question']} answer :" for row in rows[:40]]
    (tmp_path / "asked.txt").write_text("\n".join(asked))
    done = paw(
        "task=transfer", *REVERSE, f"adapter.path={bare}", "refine=sequences",
        "refine.prompts=asked.txt", "refine.raw=true", "transfer.calibration=asked.txt",
        "refine.max_new_tokens=4", "refine.steps=4", "refine.gain_steps=4", "refine.lr=1e-3",
    )  # fmt: skip
    assert "on 8 prompts that were held out" in done.stdout
    assert "Agreement is no accuracy" in done.stdout
    again = paw(
        "task=transfer", *REVERSE, f"adapter.path={bare}", "refine=sequences",
        "refine.prompts=asked.txt", "refine.raw=true", "transfer.calibration=asked.txt",
        "refine.max_new_tokens=4", "refine.steps=4", "refine.gain_steps=4", "refine.lr=1e-3",
    )  # fmt: skip
    assert "computed" not in again.stdout
    missing = paw(
        "task=transfer", *REVERSE, f"adapter.path={bare}", "refine=sequences",
        "refine.prompts=nothing.txt", "transfer.calibration=asked.txt", ok=False,
    )  # fmt: skip
    assert missing.returncode == 2
    assert "refine.prompts: nothing.txt is no file" in missing.stderr


def test_five_examples_are_enough(paw: Paw, tmp_path: Path) -> None:
    """On a model that can write: SmolLM2, from its package, onto itself by a plain copy."""
    pytest.importorskip("gguf")  # comes with the packaged models
    examples = [
        "What is the capital of France?",
        "Which gas do plants take in from the air?",
        "How many legs does a spider have?",
        "What do bees make?",
        "Which planet is nearest to the sun?",
    ]
    rows = [
        {"id": str(i), "question": q, "answer": a}
        for i, (q, a) in enumerate(
            zip(examples, ["PARIS", "CO2", "EIGHT", "HONEY", "MERCURY"], strict=True)
        )
    ]
    for split in ("train", "test"):
        with gzip.open(tmp_path / f"{split}.jsonl.gz", "wt") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    model = ["model@source=smollm2_135m", "dataset=own_text", f"dataset.path={tmp_path}"]
    paw(
        "task=train", *model, "train.max_steps=8", "train.lr=2e-3", "adapter.r=4",
        "train.batch_size=5", "adapter.alpha=8", "adapter.target_modules=[v_proj,o_proj,down_proj]",
    )  # fmt: skip
    bare = run_folder(tmp_path) / "adapters" / "source"
    offered = [row["answer"] for row in rows]
    (tmp_path / "seeds.jsonl").write_text(
        "".join(json.dumps({"question": q, "choices": offered}) + "\n" for q in examples)
    )
    done = paw(
        "task=transfer", *model, "model@target=smollm2_135m", f"adapter.path={bare}",
        "transfer=copy", "transfer.gain=none", "refine=seeds", "refine.seeds=seeds.jsonl",
        "refine.count=24", "refine.steps=2", "refine.gain_steps=2", "refine.max_new_tokens=12",
        "refine.lr=1e-4",
    )  # fmt: skip
    assert "of 24 that were written" in done.stdout
    assert len(looked_at(run_folder(tmp_path), tmp_path)["figures"]) >= 2  # of real models
    assert "of the written prompts accepted" in done.stdout
    assert "Refinement from copy" in done.stdout
    [file] = (tmp_path / "outputs/artifacts/prompts").glob("*/prompts.jsonl")
    asked = [json.loads(line) for line in file.read_text().splitlines()]
    # what is written offers what all examples offer
    assert all(one["choices"] == [f" {each}" for each in offered] for one in asked)
    assert {one["origin"] for one in asked} == {"seed", "written"}
