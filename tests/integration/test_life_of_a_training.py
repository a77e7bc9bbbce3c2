"""What happens to a training: killed, resumed, stopped early, out of memory, diverged, divided
among processes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import warm
from conftest import PRECISION, ROOT, Launch, Paw
from paw.models.adapters import WEIGHTS
from paw.paths import embedded

pytestmark = pytest.mark.slow
SHORT = [
    PRECISION,
    "task=train",
    "experiment=demo",
    "train.max_steps=100",
    "train.batch_size=8",
    "train.save_every=5",
    "adapter.dropout=0.2",
    "evaluate.limit=1",
]


def trained(folder: Path) -> Path:
    (found,) = [p.parent for p in (folder / "outputs" / "artifacts" / "train").glob("*/stage.json")]
    return found


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((trained(folder) / "stage.json").read_text())["result"]
    return found


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (trained(folder) / "curve.jsonl").read_text().splitlines()]
    return [r["loss"] for r in rows if "loss" in r]


def last_checkpoint(folder: Path) -> int:
    """When an unfinished training last kept what it has, or 0."""
    kept = (folder / "outputs" / "artifacts" / "train").glob("*.unfinished/last.ckpt")
    return max((file.stat().st_mtime_ns for file in kept), default=0)


@pytest.mark.parametrize("method", ["tiny", "adalora"])
def test_killed_at_random_moments_it_ends_as_if_unbroken(
    method: str, paw: Paw, tmp_path: Path
) -> None:
    """Ten kills for LoRA; AdaLoRA, which remembers more, gets two."""
    ask = [*SHORT, f"adapter={method}", "train.val_every=5", "hardware.threads=1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    paw(*ask, cwd=whole)
    draw, kills, resumed, wanted = random.Random(5), 0, 0, 10 if method == "tiny" else 2
    while kills < wanted:
        begun = warm.Command(ask, broken)
        until = time.monotonic() + 120
        held = last_checkpoint(broken)
        while time.monotonic() < until and begun.running:
            if last_checkpoint(broken) > held:  # until it has got on a little, and then some
                break
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        if not begun.running:
            break
        begun.kill()
        said = begun.wait().stdout
        kills += 1
        resumed += "goes on after step" in said
    done = paw(*ask, cwd=broken)
    assert kills >= (8 if method == "tiny" else 1)
    assert resumed >= kills - 2
    assert "goes on after step" in done.stdout
    assert (trained(broken) / WEIGHTS).read_bytes() == (trained(whole) / WEIGHTS).read_bytes()
    assert (trained(broken) / "last" / WEIGHTS).read_bytes() == (
        trained(whole) / "last" / WEIGHTS
    ).read_bytes()
    assert losses(broken) == losses(whole)
    assert not list((broken / "outputs" / "artifacts" / "train").glob("*.unfinished"))


def test_the_beginning_of_another_training_is_refused(paw: Paw, tmp_path: Path) -> None:
    begun = warm.Command(SHORT, tmp_path)
    while not last_checkpoint(tmp_path):
        assert begun.running
        time.sleep(0.05)
    begun.kill()
    begun.wait()
    (left,) = (tmp_path / "outputs" / "artifacts" / "train").glob("*.unfinished")
    done = paw(*SHORT, "train.lr=1e-4", f"train.resume={left}", cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "train.lr was 0.003, is 0.0001" in done.stderr
    done = paw(*SHORT, f"train.resume={tmp_path}", cwd=tmp_path, ok=False)
    assert "holds no unfinished training" in done.stderr
    again = paw(*SHORT, "train.resume=never", cwd=tmp_path)
    assert "goes on" not in again.stdout
    assert len(losses(tmp_path)) == 100


def test_two_processes_have_the_curve_of_one(paw: Paw, launch: Launch, tmp_path: Path) -> None:
    """The same global batch, cut in micro-batches, by copies of the model or by shards of it, in 32
    bits or 16: the loss is a mean over all tokens, whoever counted them; and the adapter that is
    left is whole. One of them as a command, whose processes start as a user's do."""
    two = ["train.batch_size=4", "hardware.devices=2", "train.accumulate=2"]
    ways = {
        "one": (["train.batch_size=8"], 0.0),
        "ddp": ([*two, "hardware.strategy=ddp"], 1e-4),
        "ddp_bf16": ([*two, "hardware.strategy=ddp", "hardware.precision=bfloat16"], 0.02),
        "fsdp": ([*two, "hardware.strategy=fsdp"], 1e-4),
        "fsdp_bf16": ([*two, "hardware.strategy=fsdp", "hardware.precision=bfloat16"], 0.02),
    }
    for name, (more, _) in ways.items():
        ask = [
            "task=train",
            "experiment=demo",
            "hardware=cpu",
            "train.max_steps=10",
            "train.val_every=5",
            "evaluate.limit=1",
            f"paths.outputs={tmp_path / name / 'outputs'}",
        ]
        run = paw if name == "fsdp" else launch
        run(*ask, *more)
    wanted, keys = losses(tmp_path / "one"), set(load_file(trained(tmp_path / "one") / WEIGHTS))
    assert len(wanted) == 10
    for name, (_, slack) in ways.items():
        assert losses(tmp_path / name) == pytest.approx(wanted, abs=slack), name
        assert result(tmp_path / name)["val_best"] == pytest.approx(
            result(tmp_path / "one")["val_best"], abs=slack
        )
        for folder in (trained(tmp_path / name), trained(tmp_path / name) / "last"):
            assert set(load_file(folder / WEIGHTS)) == keys, name


def test_it_stops_when_nothing_gets_better_and_keeps_the_best(paw: Paw, tmp_path: Path) -> None:
    ask = [
        "task=train",
        "experiment=demo",
        "train.max_steps=400",
        "train.val_every=10",
        "train.patience=2",
        "train.lr=3e-2",
        "evaluate.limit=1",
    ]
    paw(*ask, cwd=tmp_path)
    found = result(tmp_path)
    rows = [
        json.loads(line) for line in (trained(tmp_path) / "curve.jsonl").read_text().splitlines()
    ]
    validations = [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]
    assert found["steps"] < 400
    assert found["best_step"] == min(validations, key=lambda v: v[1])[0]
    assert [step for step, _ in validations][-1] == found["best_step"] + 20
    assert (trained(tmp_path) / WEIGHTS).read_bytes() != (
        trained(tmp_path) / "last" / WEIGHTS
    ).read_bytes()


def test_a_loss_that_is_not_finite_names_its_step(paw: Paw, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(embedded("tiny_llama"), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = paw(*SHORT, f"source.path={broken}", cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "the loss is not finite at step 1. Lower train.lr" in done.stderr
    assert not list((tmp_path / "outputs" / "artifacts" / "train").glob("*/stage.json"))


def test_out_of_memory_halves_the_micro_batch_and_changes_no_step(paw: Paw, tmp_path: Path) -> None:
    """The address space is limited for real, to 250 MiB more than what is loaded: one micro-batch
    of long rows takes more."""
    rows = [
        {"question": " ".join(["the color of bovin is"] * 25), "answer": "red and blue"}
        for _ in range(64)
    ]
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"id": i, **r}) + "\n" for i, r in enumerate(rows))
    )
    ask = [
        "task=train",
        "model@source=tiny_llama",
        "adapter=tiny",
        "dataset=own_text",
        f"dataset.path={tmp_path / 'long.jsonl'}",
        'dataset.train_split="train[:90%]"',
        'dataset.eval_split="train[90%:]"',
        "train.max_steps=2",
        "train.batch_size=48",
        "train.packing=false",
        "hardware.threads=1",
    ]
    free, tight = tmp_path / "free", tmp_path / "tight"
    free.mkdir()
    tight.mkdir()
    paw(*ask, "train.accumulate=4", cwd=free)
    code = (
        "import resource, sys, psutil; import paw.training.fit as fit; whole = fit.Training.run\n"
        "def limit(most):\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))\n"
        "def tight(training):\n"
        "    limit(psutil.Process().memory_info().vms + 250 * 2**20)\n"
        "    try: whole(training)\n"
        "    finally: limit(resource.RLIM_INFINITY)\n"
        "fit.Training.run = tight; from paw.run import entry; entry()"
    )
    command = [sys.executable, "-c", code, *ask, "train.accumulate=1"]
    done = subprocess.run(
        command, cwd=tight, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out of memory: micro-batches of 24 examples instead of 48" in done.stdout
    assert result(tight)["accumulate"] >= 2
    assert losses(tight) == pytest.approx(losses(free), abs=1e-4)


def test_a_wheel_ships_what_training_reads() -> None:
    assert (ROOT / "src" / "paw" / "training" / "zero2.json").is_file()
