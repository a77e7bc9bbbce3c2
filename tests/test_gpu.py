"""What only an NVIDIA GPU shows: 16 bits, scores as on a CPU, several devices. `make gpu` runs
them, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import Paw

GPUS = torch.cuda.device_count()
one = pytest.mark.skipif(GPUS < 1, reason="no NVIDIA GPU")
two = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 NVIDIA GPUs, there are {GPUS}")
pytestmark = [pytest.mark.gpu, pytest.mark.slow]

TRAIN = ["task=train", "experiment=demo", "hardware.device=cuda", "evaluate.limit=1"]


def losses(folder: Path) -> list[float]:
    (curve,) = (folder / "outputs" / "artifacts" / "train").glob("*/curve.jsonl")
    return [json.loads(line)["loss"] for line in curve.read_text().splitlines()]


def trained(paw: Paw, folder: Path, *more: str) -> list[float]:
    folder.mkdir()
    paw(*TRAIN, "train.max_steps=30", *more, cwd=folder)
    return losses(folder)


@one
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_16_bits_learn_as_32_do(precision: str, paw: Paw, tmp_path: Path) -> None:
    """With clipping at a norm that steps reach: what float16 scales must be clipped as it is."""
    ask = ["train.grad_clip=0.1", "train.batch_size=16"]
    found = trained(paw, tmp_path / "found", *ask, f"hardware.precision={precision}")
    exact = trained(paw, tmp_path / "exact", *ask, "hardware.precision=float32")
    assert len(found) == 30
    assert found[-1] < 0.1 * found[0]
    assert found == pytest.approx(exact, abs=0.05)


@one
def test_training_is_the_same_as_on_a_cpu(paw: Paw, tmp_path: Path) -> None:
    gpu = trained(paw, tmp_path / "gpu", "hardware.precision=float32")
    cpu = trained(paw, tmp_path / "cpu", "hardware.device=cpu", "hardware.precision=float32")
    assert gpu == pytest.approx(cpu, abs=1e-2)


SLACK = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # as where training tries packing


@one
@pytest.mark.parametrize("precision", list(SLACK))
def test_scores_are_those_of_a_cpu(precision: str, paw: Paw, tmp_path: Path) -> None:
    scores = []
    for device, bits in (("cpu", "float32"), ("cuda", precision)):
        folder = tmp_path / device
        folder.mkdir()
        hardware = [f"hardware.device={device}", f"hardware.precision={bits}"]
        paw("task=evaluate", "models=[tiny_llama]", "dataset=facts", *hardware, cwd=folder)
        (file,) = (folder / "outputs" / "runs").glob("*/records/*.jsonl")
        found = [json.loads(line)["loglikelihoods"] for line in file.read_text().splitlines()]
        scores.append([x for row in found for x in row])
    assert scores[1] == pytest.approx(scores[0], abs=SLACK[precision])


@two
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_have_the_curve_of_one(strategy: str, paw: Paw, tmp_path: Path) -> None:
    ask = ["hardware.precision=float32", "train.batch_size=8"]
    alone = trained(paw, tmp_path / "one", *ask)
    more = ["train.batch_size=4", "hardware.devices=2", f"hardware.strategy={strategy}"]
    both = trained(paw, tmp_path / "two", ask[0], *more)
    assert both == pytest.approx(alone, abs=1e-2)


@one
def test_a_sharded_training_of_one_device_learns(paw: Paw, tmp_path: Path) -> None:
    found = trained(paw, tmp_path / "one", "hardware.strategy=fsdp", "train.batch_size=16")
    assert found[-1] < 0.1 * found[0]
