"""Nothing is left on the CPU: paw's computations on a device that is none give what they give on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import Silent
from paw.config.compose import compose_config
from paw.data import tokens
from paw.models.load import Runtime
from paw.paths import embedded
from paw.store import Input
from paw.training import fit
from paw.training.module import CHECKPOINT, CURVE, LAST, curve
from pretend import DEVICE, Backend, pretending

CPU, THERE = Runtime("float32"), Runtime("float32", DEVICE)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with pretending():
        yield


def close(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance))


# ---- the pretence -----------------------------------------------------------------------------------


def on(x: Any) -> torch.Tensor:
    return torch.tensor(x, device=DEVICE)


REFUSED: dict[str, Callable[[], Any]] = {
    "sum": lambda: on([1.0, 2.0]) + torch.ones(2),
    "product": lambda: torch.ones(1, 2) @ on([[1.0], [2.0]]),
    "joined": lambda: torch.cat([on([1.0]), torch.ones(1)]),
    "stacked numbers": lambda: torch.stack([on(1.0), torch.tensor(1.0)]),
    "table": lambda: torch.nn.Embedding(5, 2).to(DEVICE)(torch.tensor([1])),
    "ids": lambda: torch.nn.Embedding(5, 2)(on([1])),
    "index on the device into the CPU": lambda: torch.ones(2)[on([0])],
    "values on the CPU": lambda: on([1.0, 2.0]).__setitem__(on([0, 1]), torch.ones(2)),
    "in place on the CPU": lambda: torch.ones(2).add_(on([1.0, 2.0])),
    "number in place on the CPU": lambda: torch.tensor(1.0).add_(on(1.0)),
    "mask": lambda: on([1.0, 2.0]).masked_fill(torch.tensor([True, False]), 0.0),
    "labels": lambda: torch.nn.functional.cross_entropy(on([[1.0, 2.0]]), torch.tensor([1])),
    "generator": lambda: torch.randn(2, device=DEVICE, generator=torch.Generator()),
    "numpy": lambda: on([1.0]).numpy(),
    "array": lambda: np.asarray(on([1.0])),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("inference", [False, True])
def test_what_a_gpu_refuses_is_refused(what: str, inference: bool) -> None:
    with torch.inference_mode(inference), pytest.raises((RuntimeError, TypeError), match="pretend"):
        REFUSED[what]()


ALLOWED: dict[str, tuple[Callable[[], torch.Tensor], Any]] = {
    "number": (lambda: on([1.0, 2.0]) * torch.tensor(2.0), [2.0, 4.0]),
    "index": (lambda: on([1.0, 2.0])[torch.tensor([1])], [2.0]),
    "mask as an index": (lambda: on([1.0, 2.0])[torch.tensor([True, False])], [1.0]),
    "copy": (lambda: on([1.0, 2.0]).copy_(torch.ones(2)), [1.0, 1.0]),
    "range": (lambda: torch.arange(3, device=DEVICE), [0, 1, 2]),
    "view": (lambda: on([[1, 2], [3, 4]])[:, 1].add_(1), [3, 5]),
    "like": (lambda: torch.ones_like(on([1, 2])), [1, 1]),
}


@pytest.mark.parametrize("what", ALLOWED)
@pytest.mark.parametrize("inference", [False, True])
def test_what_a_gpu_allows_is_allowed(what: str, inference: bool) -> None:
    compute, expected = ALLOWED[what]
    with torch.inference_mode(inference):
        found = compute()
        assert found.device.type == DEVICE
        assert found.cpu().device.type == "cpu"
        assert found.tolist() == expected


def test_a_view_shares_memory_and_a_moved_copy_does_not() -> None:
    for inference in (False, True):
        with torch.inference_mode(inference):
            x = on([[1.0, 2.0], [3.0, 4.0]])
            kept = x.to("cpu")
            x[0] += 1
            assert x.tolist() == [[2.0, 3.0], [3.0, 4.0]]
            assert kept.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_no_other_test_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.accelerator.is_available()
    monkeypatch.setattr(Backend, "there", False)
    assert not torch.accelerator.is_available()


# ---- training ---------------------------------------------------------------------------------------

METHODS = {
    "lora": ["adapter=tiny"],
    "dora": ["adapter=dora", "adapter.target_modules=[q_proj,down_proj]"],
    "adalora": ["adapter=adalora", "adapter.target_modules=[q_proj,down_proj]", "adapter.every=1", "adapter.settle=0"],
    "ia3": ["adapter=ia3"],
    "prompt_tuning": ["adapter=prompt_tuning", "adapter.virtual_tokens=4"],
    "prefix_tuning": ["adapter=prefix_tuning", "adapter.virtual_tokens=4"],
    "p_tuning": ["adapter=p_tuning", "adapter.virtual_tokens=4"],
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of the embedded data; the label of each is whether its answer is among the first."""
    out = tmp_path_factory.mktemp("rows")
    config = tokens.EncodeStage(compose_config(["dataset=facts"]).dataset, "train", "likelihood", limit=8)
    where = {"data": embedded("facts") / "train.jsonl", "tokenizer": embedded("tiny_llama")}
    tokens.tokens(config, {name: Input(path, name) for name, path in where.items()}, out, Silent())
    np.save(out / tokens.LABELS, np.arange(8, dtype=np.float32) % 2)
    return out


def trained(runtime: Runtime, rows: Path, out: Path, ask: list[str], **more: Any) -> tuple[dict[str, Any], ...]:
    """A training that goes on from its own checkpoint once it is done: its losses, its adapter, and what it says of itself."""
    c = compose_config(["task=train", "model@source=tiny_llama", *ask, "train.val_every=2", "train.max_steps=3", "train.lr=1e-2"])
    folder = out / runtime.device
    folder.mkdir(parents=True)
    plan = fit.Plan(
        embedded("tiny_llama"), None, False, runtime, c.adapter, c.train, rows, rows, False, None, 3, 2, False, folder, None, 0
    )
    plan = replace(plan, **more)
    fit.fit(plan, Silent())
    fit.fit(replace(plan, checkpoint=folder / CHECKPOINT, done=2), Silent())
    found = {"losses": curve(folder / CURVE), "adapter": load_file(folder / LAST / "adapter_model.safetensors")}
    return found["losses"], found["adapter"], json.loads((folder / fit.FACTS).read_text())


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_trained_and_goes_on(method: str, facts: Path, tmp_path: Path) -> None:
    (losses, adapter, said), (here, wanted, other) = (trained(r, facts, tmp_path, METHODS[method]) for r in (THERE, CPU))
    print(losses, here)
    assert said["packed"] == other["packed"] == (method in ("lora", "dora", "adalora", "ia3"))  # a fault would only unpack
    for kind in ("loss", "val_loss"):
        assert close(losses[kind], here[kind]), kind
    assert adapter.keys() == wanted.keys()
    for name in wanted:
        assert close(adapter[name], wanted[name], 1e-3), name
