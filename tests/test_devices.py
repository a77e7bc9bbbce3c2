"""Nothing is left on the CPU: paw's computations on a device that is none give what they give on the CPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, Gemma3ForCausalLM, Gemma3TextConfig

from conftest import Silent
from paw.config.compose import compose_config, transfer_named
from paw.data import tokens
from paw.data.encode import Encoded
from paw.evaluation import classify
from paw.evaluation.engine import Engine
from paw.evaluation.plan import plan_writing
from paw.models import merge as merging
from paw.models.adapters import read_adapter
from paw.models.load import Runtime, load_classifier, load_tokenizer
from paw.paths import embedded
from paw.store import Input
from paw.tasks import dispatch, stages
from paw.training import fit, packing
from paw.training.module import CHECKPOINT, CURVE, LAST, curve
from paw.transfer import calibrate, layers, linalg
from paw.transfer import stage as transferring
from paw.transfer.bases import Bases
from pretend import DEVICE, Backend, pretending
from test_engine import job, made, packed
from test_transfer import random_adapter

CPU, THERE = Runtime("float32"), Runtime("float32", DEVICE)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    gc.freeze()  # paw collects what models leave behind; what the libraries hold need not be looked through each time
    with pretending():
        yield
    gc.unfreeze()


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
    assert said["packed"] == other["packed"] == (method in ("lora", "dora", "adalora", "ia3"))  # a fault would only unpack
    for kind in ("loss", "val_loss"):
        assert close(losses[kind], here[kind]), kind
    assert adapter.keys() == wanted.keys()
    for name in wanted:
        assert close(adapter[name], wanted[name], 1e-3), name


@pytest.mark.parametrize("classes", [("no", "yes"), None])
def test_a_head_is_trained_and_says_the_same(classes: tuple[str, ...] | None, facts: Path, tmp_path: Path) -> None:
    ask = ["adapter=lora", "adapter.target_modules=[q_proj,down_proj]", "evaluate.mode=classify"]
    more: dict[str, Any] = {"classify": True, "classes": classes}
    (losses, adapter, _), (here, wanted, _) = (trained(r, facts, tmp_path, ask, **more) for r in (THERE, CPU))
    assert close(losses["loss"], here["loss"])
    assert any("score" in name for name in wanted)
    for name in wanted:
        assert close(adapter[name], wanted[name], 1e-3), name
    rows, base, made = list(tokens.Rows(facts)), Input(embedded("tiny_llama"), "base"), Input(tmp_path / "cpu" / LAST, "adapter")
    found, expected = (dict(_flat(classify.outputs(rows, base, made, classes, r, False, 200))) for r in (THERE, CPU))
    assert found.keys() == set(range(len(rows)))
    assert all(close(found[i], expected[i]) for i in found)


def _flat(batches: Any) -> Iterator[tuple[int, Any]]:
    for places, outputs in batches:
        yield from zip(places, outputs, strict=True)


def test_an_encoder_is_told_pairs() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    rows = [Encoded((5, 6, 7, 8), 2), Encoded((9, 10), 1)]
    with torch.no_grad():
        expected = classify.class_logits(model, rows, 0, pairs=True)
        assert close(classify.class_logits(model.to(DEVICE), rows, 0, pairs=True).cpu(), expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_attention_in_segments(window: int | None, cap: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    here, there = (
        packing.attend(None, *(x.to(d) for x in (q, k, v)), None, sliding_window=window, softcap=cap, segments=(5, 2, 2))[0]
        for d in ("cpu", DEVICE)
    )
    assert close(there.cpu(), here)


# ---- evaluation -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of random weights whose layers take turns in seeing all tokens and the last 8."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**sizes, head_dim=8, num_hidden_layers=2, sliding_window=8, layer_types=kinds)
    folder = tmp_path_factory.mktemp("windowed")
    Gemma3ForCausalLM(config).save_pretrained(folder)
    load_tokenizer(embedded("tiny_llama")).save_pretrained(folder)
    return folder


HEAD = tuple(range(20, 32))
ASKED = [[Encoded((*HEAD, *range(40, 40 + n), *c), 12 + n) for c in ([7, 8, 9], [7, 5, 6], [11])] for n in (1, 3, 12)]
WRITTEN = [HEAD + tuple(range(60, 60 + n)) for n in (1, 4, 9)]


def evaluated(runtime: Runtime, folder: Path, adapter: Path | None, prefix: tuple[int, ...], trees: bool) -> tuple[list[Any], ...]:
    """Scores of all choices, and what is written after some prompts."""
    own = Engine()
    check = tuple(Encoded(r.ids[len(prefix) :], r.start - len(prefix)) for r in ASKED[0])
    about = replace(job(folder, folder.name, prefix, adapter), runtime=runtime, check=check)
    scores = packed(own, about, ASKED)
    plan, _ = plan_writing(WRITTEN, len(prefix), 10**6, 5, ())
    written = [x for batch in plan for x in own.run(about, batch)]
    assert own._model.device.type == runtime.device
    assert own._trees == trees  # a fault in packed questions would only score them one by one
    return scores, written


# What is in the past is masked by windows whatever put it there: one kind of virtual tokens will do.
EVALUATED = [*(("tiny_llama", kind) for kind in (None, "lora", "prefix_tuning", "prompt_tuning")), ("windowed", "prompt_tuning")]


@pytest.mark.parametrize("prefix", [(), HEAD], ids=["whole", "cached"])
@pytest.mark.parametrize(("base", "kind"), EVALUATED)
def test_questions_are_scored_and_answers_written(
    base: str, kind: str | None, prefix: tuple[int, ...], windowed: Path, tmp_path: Path
) -> None:
    folder = windowed if base == "windowed" else embedded(base)
    adapter = made(kind, folder, tmp_path) if kind else None
    (scores, written), (expected, wanted) = (evaluated(r, folder, adapter, prefix, True) for r in (THERE, CPU))
    assert all(close(a, b) for a, b in zip(scores, expected, strict=True))
    assert written == wanted


def test_questions_in_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_masks", lambda self, seen: None)
    (scores, written), (expected, wanted) = (evaluated(r, embedded("tiny_llama"), None, (), False) for r in (THERE, CPU))
    assert all(close(a, b) for a, b in zip(scores, expected, strict=True))
    assert written == wanted


# ---- transfer ---------------------------------------------------------------------------------------

BOTH = {name: Input(embedded(path), path) for name, path in (("source", "tiny_llama"), ("target", "tiny_qwen2"))}
TEXT = {"calibration": Input(embedded("facts") / "calibration.txt", "text")}
LAYERS = [(1, 0)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Input:
    return Input(random_adapter("tiny_llama", tmp_path_factory.mktemp("random") / "adapter"), "adapter")


def text(runtime: Runtime, shuffle: int | None = None) -> calibrate.CalibrateStage:
    return calibrate.CalibrateStage(runtime, LAYERS, 300, shuffle)


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moments")
    calibrate.calibrate(text(CPU), BOTH | TEXT, out, Silent())
    return out


@pytest.mark.parametrize("shuffle", [None, 1])
def test_moments_are_the_same(shuffle: int | None, moments: Path, tmp_path: Path) -> None:
    calibrate.calibrate(text(THERE, shuffle), BOTH | TEXT, tmp_path, Silent())
    if shuffle is not None:
        moments = tmp_path / "here"
        moments.mkdir()
        calibrate.calibrate(text(CPU, shuffle), BOTH | TEXT, moments, Silent())
    found, expected = (load_file(folder / calibrate.MOMENTS) for folder in (tmp_path, moments))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert close(found[name], x, 1e-3), name


MAPPED = ["procrustes", "ridge", "cross_lora", "anchored", "per_head", "frobenius", "sign_random", "pad_truncate", "embedding"]


@pytest.mark.parametrize("method", MAPPED)
def test_an_adapter_is_moved_by_maps(method: str, moments: Path, adapter: Input, tmp_path: Path) -> None:
    compare(method, {"moments": Input(moments, "moments")}, None, adapter, tmp_path)


@pytest.mark.parametrize(("method", "shuffle"), [("procrustes", None), ("shift", None), ("shift", 1)])
def test_an_adapter_is_moved_by_running_both_models(method: str, shuffle: int | None, adapter: Input, tmp_path: Path) -> None:
    compare(method, TEXT, shuffle or 0, adapter, tmp_path)


def test_an_adapter_is_moved_between_equal_shapes(adapter: Input, tmp_path: Path) -> None:
    for method in ("copy", "lora_x", "pro_lora"):
        compare(method, {}, None, adapter, tmp_path / method, {"source": BOTH["source"], "target": BOTH["source"]}, gain="weight")


def compare(
    method: str, known: dict[str, Input], seed: int | None, adapter: Input, out: Path, models: dict[str, Input] = BOTH, **changes: Any
) -> None:
    """An adapter moved on the device and on the CPU: the same weights, and the same figures in the report.

    Args:
        seed: of a wrong pairing, 0 for the right one; None where no text is run.
    """
    config = replace(transfer_named(method, compose_config([]).transfer), basis=20, **changes)
    moved, figures = [], []
    for runtime in (THERE, CPU):
        stage = transferring.TransferStage(config, LAYERS, None if seed is None else text(runtime, seed or None), runtime)
        folder = out / runtime.device
        folder.mkdir(parents=True)
        figures.append(transferring.transfer(replace(stage, layers=layers_of(models)), models | known | {"adapter": adapter}, folder, Silent()))
        moved.append(read_adapter(folder))
    found, expected = moved
    assert found.keys() == expected.keys()
    for name, new in expected.items():
        assert (found[name].b @ found[name].a - new.b @ new.a).norm() <= 1e-2 * new.norm(), name
    for key in ("kept_energy", "similarity", "r2_in", "r2_out"):
        a, b = (f[key] for f in figures)
        assert a == b or close(a, b, 1e-3), key


def layers_of(models: dict[str, Input]) -> list[tuple[int, int]]:
    return [(1, 1)] if models["source"] == models["target"] else LAYERS


def test_a_head_is_loaded_to_its_device() -> None:
    assert load_classifier(embedded("tiny_llama"), THERE, ("no", "yes"))[0].device.type == DEVICE


def test_singular_bases_are_found_and_read_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "SMALL", 16)  # so that this weight is a large one, of which a CPU finds a part of the spectrum
    bases, w = Bases(tmp_path, "model"), torch.randn(1100, 20, generator=torch.Generator().manual_seed(0))
    first, again = (bases.of("m", (1100, 20), k, lambda: w.to(DEVICE), DEVICE) for k in (7, 5))
    assert first.u.device.type == again.u.device.type == again.v.device.type == again.values.device.type == DEVICE
    assert close((again.u.T @ (w.to(DEVICE) @ again.v)).diagonal().cpu(), again.values.cpu(), 1e-3)


@pytest.mark.parametrize("by", ["cka", "weights"])
def test_layers_are_matched(by: str, tmp_path: Path) -> None:
    models = BOTH if by == "cka" else BOTH | {"target": BOTH["source"]}
    found, expected = (
        layers.match(layers.MatchStage(text(r) if by == "cka" else None, 20, r.device), models | TEXT, tmp_path, Silent())["similarity"]
        for r in (THERE, CPU)
    )
    assert close(found, expected, 1e-3)


# ---- merging, and whole tasks -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_an_adapter_is_merged(kind: str, tmp_path: Path) -> None:
    inputs = {"model": BOTH["source"], "adapter": Input(made(kind, embedded("tiny_llama"), tmp_path), "adapter")}
    weights, config = [], compose_config([]).merge
    for device in (DEVICE, "cpu"):
        out = tmp_path / device
        out.mkdir()
        merging.merge(merging.MergeStage(config, device), inputs, out, Silent())
        weights.append(load_file(out / "model.safetensors"))
    found, expected = weights
    assert found.keys() == expected.keys()  # tied weights are written once
    for name, x in expected.items():
        assert close(found[name], x), name


def run(task: str, folder: Path, runtime: Runtime, *ask: str) -> dict[str, Any]:
    """A task from its command line, in a folder of its own: what its results say."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(stages, "resolve_runtime", lambda hardware: runtime)
        command = [f"task={task}", *ask]
        dispatch(compose_config(command), command)
    return json.loads(next(folder.glob("outputs/runs/*/results.json")).read_text())


@pytest.mark.slow
def test_a_pipeline_from_end_to_end(tmp_path: Path) -> None:
    few = ["train.max_steps=3", "evaluate.limit=6", "transfer.positions=200", "transfer.controls=[]"]
    there, here = (run("pipeline", tmp_path / r.device, r, "experiment=demo", *few)["systems"] for r in (THERE, CPU))
    assert [s["system"] for s in there] == [s["system"] for s in here]
    for a, b in zip(there, here, strict=True):
        assert close(a["loss"], b["loss"], 1e-3), a["system"]
