"""Nothing is left on the CPU: on a device that is none, paw computes what it computes there.

Each test runs the real code twice, on the CPU and on the device of `pretend`, which raises where a
GPU would. A tensor that a GPU takes from the CPU all the same (an index, a number, a mask that the
library moves) is no fault here either.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from conftest import Silent, move
from paw.cli.compose import compose_config
from paw.data import encode as tokens
from paw.data.tokenise import Encoded
from paw.evaluation import classify
from paw.evaluation.devices import Engines
from paw.evaluation.engine import Engine
from paw.evaluation.model import Model
from paw.evaluation.plan import plan_writing
from paw.export import merge as merging
from paw.generator.config import FitConfig, NetworkConfig
from paw.generator.fit import Losses, Scale, values
from paw.generator.network import Network, padded
from paw.models.adapters import read_adapter
from paw.models.load import (
    Runtime,
    load_classifier,
    load_model,
    load_tokenizer,
    resolve_runtime,
)
from paw.paths import embedded
from paw.store import Input
from paw.tasks import dispatch
from paw.training import adapters, fit, packing
from paw.training.files import LAST, held_steps
from paw.training.history import CURVE, curve
from paw.transfer import calibrate, linalg
from paw.transfer import match as matching
from paw.transfer import transfer as transferring
from paw.transfer.bases import Bases
from paw.transfer.controls import transfer_named
from paw.transfer.evidence import MOMENTS
from paw.transfer.model_pair import TextConfig
from pretend import DEVICE, Backend, pretending
from test_engine import job, made, packed
from test_generator import TINY
from test_transfer import TEXT, matched_as, random_adapter

CPU, THERE = Runtime("float32"), Runtime("float32", DEVICE)
BOTH = (THERE, CPU)
LLAMA = Input(embedded("tiny_llama"), "tiny_llama")
QWEN = Input(embedded("tiny_qwen2"), "tiny_qwen2")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    # paw collects what models leave behind; what the libraries hold need not be searched each time
    gc.freeze()
    with pretending():
        yield
    gc.unfreeze()


def close(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance))


def both(compute: Callable[[Runtime], Any]) -> tuple[Any, Any]:
    """What is computed on the device, and on the CPU."""
    return compute(THERE), compute(CPU)


def same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-3) -> bool:
    """Whether the same tensors have the same names."""
    alike = found.keys() == expected.keys()
    return alike and all(close(found[name], x, tolerance) for name, x in expected.items())


# ---- the pretence ------------------------------------------------------------------------------


def on(x: Any) -> torch.Tensor:
    return torch.tensor(x, device=DEVICE)


REFUSED: dict[str, Callable[[], Any]] = {
    "sum": lambda: on([1.0, 2.0]) + torch.ones(2),
    "product": lambda: torch.ones(1, 2) @ on([[1.0], [2.0]]),
    "joined": lambda: torch.cat([on([1.0]), torch.ones(1)]),
    "stacked numbers": lambda: torch.stack([on(1.0), torch.tensor(1.0)]),
    "table on the device": lambda: torch.nn.Embedding(5, 2).to(DEVICE)(torch.tensor([1])),
    "ids on the device": lambda: torch.nn.Embedding(5, 2)(on([1])),
    "index on the device": lambda: torch.ones(2)[on([0])],
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
    refused = pytest.raises((RuntimeError, TypeError), match=DEVICE)
    with torch.inference_mode(inference), refused:
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


@pytest.mark.parametrize("inference", [False, True])
def test_a_view_shares_memory_and_a_moved_copy_does_not(inference: bool) -> None:
    with torch.inference_mode(inference):
        x = on([[1.0, 2.0], [3.0, 4.0]])
        kept = x.to("cpu")
        x[0] += 1
        assert x.tolist() == [[2.0, 3.0], [3.0, 4.0]]
        assert kept.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_gradients_are_there() -> None:
    x = on([1.0, 2.0]).requires_grad_()
    (x.exp() * torch.tensor(3.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.device.type == DEVICE
    assert close(x.grad.cpu(), 3 * torch.tensor([1.0, 2.0]).exp())


def test_no_other_test_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.accelerator.is_available()
    monkeypatch.setattr(Backend, "there", False)
    assert not torch.accelerator.is_available()


# ---- training ----------------------------------------------------------------------------------

FEW = "adapter.target_modules=[q_proj,down_proj]"
METHODS = {
    "lora": ["adapter=tiny"],
    "dora": ["adapter=dora", FEW],
    "adalora": ["adapter=adalora", FEW, "adapter.every=1", "adapter.settle=0"],
    "ia3": ["adapter=ia3"],
    "prompt_tuning": ["adapter=prompt_tuning", "adapter.virtual_tokens=4"],
    "prefix_tuning": ["adapter=prefix_tuning", "adapter.virtual_tokens=4"],
    "p_tuning": ["adapter=p_tuning", "adapter.virtual_tokens=4"],
}
PACKED = ("lora", "dora", "adalora", "ia3")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of the embedded data, with labels that say nothing."""
    out = tmp_path_factory.mktemp("rows")
    dataset = compose_config(["dataset=facts"]).dataset
    config = tokens.EncodeStage(dataset=dataset, split="train", form="likelihood", limit=8)
    data = Input(embedded("facts") / "train.jsonl", "data")
    tokens.encode(config, {"data": data, "tokenizer": LLAMA}, out, Silent())
    np.save(out / tokens.LABELS, np.arange(8, dtype=np.float32) % 2)
    return out


def classed(rows: Path, classes: tuple[str, ...] | None, folder: Path) -> Path:
    """The same rows, whose labels are classes of these names; or values."""
    out = Path(shutil.copytree(rows, folder / "classed"))
    (out / tokens.ABOUT).write_text(json.dumps({"classes": classes and list(classes)}))
    return out


@contextmanager
def training_on(device: str) -> Iterator[list[int]]:
    """The steps that are made inside, each with the model and its moments on the device."""
    own, made = fit.Training._step, list[int]()

    def step(self: fit.Training, batch: Any) -> None:
        made.append(self.history.step)
        own(self, batch)
        moments = [state["exp_avg"] for state in self.optimizer.state.values()]
        assert moments
        assert {x.device.type for x in [*self.model.parameters(), *moments]} == {device}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit.Training, "_step", step)
        yield made


def trained(
    runtime: Runtime,
    rows: Path,
    folder: Path,
    ask: list[str],
    **more: Any,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A training that, once done, does its last step again from the checkpoint it leaves.

    Returns:
        Its losses, its adapter, and what it says of itself.
    """
    how = ["train.max_steps=3", "train.val_every=2", "train.lr=1e-2"]
    c = compose_config(["task=train", "model@source=tiny_llama", *ask, *how])
    folder.mkdir(parents=True)
    plan = fit.Plan(
        model=LLAMA.path,
        name="tiny_llama",
        trust_remote_code=False,
        runtime=runtime,
        adapter=c.adapter,
        train=c.train,
        rows=rows,
        val_rows=rows,
        classify=False,
        steps=3,
        accumulate=2,
        gradient_checkpointing=False,
        folder=folder,
    )
    plan = replace(plan, **more)
    with training_on(runtime.device) as steps:
        fit.fit(plan, Silent())
        assert held_steps(folder) == 2
        fit.fit(plan, Silent())
    assert steps == [0, 1, 2, 2]
    adapter = load_file(folder / LAST / "adapter_model.safetensors")
    return curve(folder / CURVE), adapter, json.loads((folder / fit.RESULT).read_text())


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_trained_and_goes_on(method: str, facts: Path, tmp_path: Path) -> None:
    there, here = both(lambda r: trained(r, facts, tmp_path / r.device, METHODS[method]))
    (losses, adapter, said), (expected, wanted, known) = there, here
    # where packed rows fail they are filled up instead, silently: that would hide a fault
    assert said["packed"] == known["packed"] == (method in PACKED)
    assert close(losses["loss"], expected["loss"])
    assert close(losses["val_loss"], expected["val_loss"])
    assert same(adapter, wanted)


def test_a_prefix_starts_from_a_text() -> None:
    """As of a quantised base, which is on its device before anything is trained."""
    method = adapters.method_named("prefix_tuning")
    chosen = compose_config(["task=train", *METHODS["prefix_tuning"]]).adapter

    def started(runtime: Runtime) -> torch.Tensor:
        base = load_model(LLAMA.path, runtime)
        setting = adapters.Setting(
            model=base, name="tiny_llama", task_type="CAUSAL_LM", steps=3, text=HEAD
        )
        model = peft.get_peft_model(base, method.config(chosen, setting))
        method.prepare(model, setting)
        return model.prompt_encoder["default"].embedding.weight.detach()

    there, here = both(started)
    assert there.device.type == DEVICE
    assert close(there.cpu(), here)


@pytest.mark.parametrize("classes", [("no", "yes"), None], ids=["classes", "values"])
def test_a_head_is_trained_and_says_the_same(
    classes: tuple[str, ...] | None,
    facts: Path,
    tmp_path: Path,
) -> None:
    ask = ["adapter=lora", FEW, "evaluate.mode=classify"]
    data = classed(facts, classes, tmp_path)
    there, here = both(lambda r: trained(r, data, tmp_path / r.device, ask, classify=True))
    (losses, adapter, _), (expected, wanted, _) = there, here
    assert any("score" in name for name in wanted)
    assert close(losses["loss"], expected["loss"])
    assert same(adapter, wanted)

    rows, own = list(tokens.Rows(data)), Input(tmp_path / "cpu" / LAST, "adapter")

    def said_by(runtime: Runtime) -> list[Any]:
        model = Model(
            base=LLAMA,
            adapter=own,
            runtime=runtime,
            trust_remote_code=False,
            engines=Engines(),
            watch=Silent(),
        )
        return list(classify.outputs(model, rows, classes, 99))

    there, here = both(said_by)
    assert sorted(i for i, _ in here) == list(range(len(rows)))
    for (i, output), (wanted_i, wanted_output) in zip(there, here, strict=True):
        assert i == wanted_i
        assert close(output, wanted_output)


def test_an_encoder_is_told_pairs() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = BertForSequenceClassification(config).eval()
    rows = [Encoded((5, 6, 7, 8), 2), Encoded((9, 10), 1)]
    with torch.no_grad():
        expected = classify.class_logits(model, rows, 0, pairs=True)
        found = classify.class_logits(model.to(DEVICE), rows, 0, pairs=True)
    assert close(found.cpu(), expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_attention_in_segments(window: int | None, cap: float | None) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    limits: dict[str, Any] = {"sliding_window": window, "softcap": cap, "segments": (5, 2, 2)}

    def attended(runtime: Runtime) -> torch.Tensor:
        q, k, v = (x.to(runtime.device) for x in qkv)
        return packing.attend(None, q, k, v, None, **limits)[0]

    there, here = both(attended)
    assert close(there.cpu(), here)


def test_a_head_is_loaded_to_its_device() -> None:
    assert load_classifier(LLAMA.path, THERE, ("no", "yes"))[0].device.type == DEVICE


# ---- evaluation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of random weights, one layer seeing the last 8 tokens only, the other one all."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    folder = tmp_path_factory.mktemp("windowed")
    Gemma3ForCausalLM(config).save_pretrained(folder)
    load_tokenizer(LLAMA.path).save_pretrained(folder)
    return folder


HEAD = tuple(range(20, 32))
ENDS = ((7, 8, 9), (7, 5, 6), (11,))  # they part after a token, so that a tree has branches
CONTEXTS = [HEAD + tuple(range(40, 40 + n)) for n in (1, 3, 12)]
ASKED = [[Encoded(context + end, len(context)) for end in ENDS] for context in CONTEXTS]
PROMPTS = [HEAD + tuple(range(60, 60 + n)) for n in (1, 4, 9)]
# What is in the past is masked by windows whatever put it there: one kind will do for those.
EVALUATED = [
    ("tiny_llama", None),
    ("tiny_llama", "lora"),
    ("tiny_llama", "prefix_tuning"),
    ("tiny_llama", "prompt_tuning"),
    ("windowed", "prompt_tuning"),
]


def evaluated(
    runtime: Runtime,
    folder: Path,
    adapter: Path | None,
    prefix: tuple[int, ...],
    trees: bool,
) -> tuple[list[list[float]], list[list[int]]]:
    """Scores of all choices, and what is written after the prompts."""
    own = Engine()
    check = tuple(Encoded(r.ids[len(prefix) :], r.start - len(prefix)) for r in ASKED[0])
    about = replace(job(folder, folder.name, prefix, adapter), runtime=runtime, check=check)
    scores = packed(own, about, ASKED)
    plan, _ = plan_writing(PROMPTS, len(prefix), 10**6, 5, ())
    written = [x for batch in plan for x in own.run(about, batch)]
    assert own._model.device.type == runtime.device
    # where trees fail, choices are scored one by one and a note is left: that would hide a fault
    assert own._trees == trees
    return scores, written


@pytest.mark.parametrize("prefix", [(), HEAD], ids=["whole", "cached"])
@pytest.mark.parametrize(("base", "kind"), EVALUATED)
def test_questions_are_scored_and_answers_written(
    base: str,
    kind: str | None,
    prefix: tuple[int, ...],
    windowed: Path,
    tmp_path: Path,
) -> None:
    folder = windowed if base == "windowed" else embedded(base)
    adapter = made(kind, folder, tmp_path) if kind else None
    there, here = both(lambda r: evaluated(r, folder, adapter, prefix, trees=True))
    assert all(close(a, b) for a, b in zip(there[0], here[0], strict=True))
    assert there[1] == here[1]


def test_questions_in_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that takes no masks of ours."""
    monkeypatch.setattr(Engine, "_masks", lambda self, seen: None)
    there, here = both(lambda r: evaluated(r, LLAMA.path, None, (), trees=False))
    assert all(close(a, b) for a, b in zip(there[0], here[0], strict=True))
    assert there[1] == here[1]


# ---- transfer ----------------------------------------------------------------------------------

PAIR = {"source": LLAMA, "target": QWEN}
MATCHED = [(1, 0)]  # layers: one pair does all that many do
MAPPED = [
    "procrustes",
    "ridge",
    "cross_lora",
    "anchored",
    "per_head",
    "frobenius",
    "sign_random",
    "pad_truncate",
    "embedding",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Input:
    return Input(random_adapter("tiny_llama", tmp_path_factory.mktemp("random") / "it"), "adapter")


def text(runtime: Runtime, shuffle: int | None = None, positions: int = 300) -> TextConfig:
    return TextConfig(runtime=runtime, positions=positions, shuffle=shuffle)


def seen(runtime: Runtime, out: Path, shuffle: int | None = None) -> Path:
    """A folder with the moments of both models."""
    out.mkdir(parents=True)
    stage = calibrate.CalibrateStage(text=text(runtime, shuffle))
    with matched_as(MATCHED):
        calibrate.calibrate(stage, PAIR | TEXT, out, Silent())
    return out


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Input]:
    return {"moments": Input(seen(CPU, tmp_path_factory.mktemp("seen") / "here"), "moments")}


@pytest.mark.parametrize("shuffle", [None, 1], ids=["paired", "shuffled"])
def test_moments_are_the_same(shuffle: int | None, tmp_path: Path) -> None:
    there, here = both(lambda r: seen(r, tmp_path / r.device, shuffle) / MOMENTS)
    assert same(load_file(there), load_file(here))


def moved_alike(
    method: str,
    inputs: dict[str, Input],
    out: Path,
    shuffle: int | None = None,
    matched: list[tuple[int, int]] = MATCHED,
    positions: int = 300,
    **changes: Any,
) -> None:
    """Moves an adapter on both devices: the same weights, and the same figures in the report."""
    config = replace(transfer_named(method, compose_config([]).transfer), basis=20, **changes)
    moved, figures = [], []
    for runtime in BOTH:
        looks = {"calibration", "moments"} & inputs.keys()
        run = text(runtime, shuffle, positions) if looks else None
        stage = transferring.TransferStage(transfer=config, text=run, runtime=runtime)
        folder = out / runtime.device
        folder.mkdir(parents=True)
        with matched_as(matched):
            figures.append(move(stage, inputs, folder))
        moved.append(read_adapter(folder))
    found, expected = moved
    assert found.keys() == expected.keys()
    for name, new in expected.items():
        assert (found[name].b @ found[name].a - new.b @ new.a).norm() <= 1e-2 * new.norm(), name
    for key in ("kept_energy", "similarity", "r2_in", "r2_out"):
        a, b = (getattr(f, key) for f in figures)
        assert a == b or close(a, b, 1e-3), key


@pytest.mark.parametrize("method", MAPPED)
def test_an_adapter_is_moved_by_maps(
    method: str,
    moments: dict[str, Input],
    adapter: Input,
    tmp_path: Path,
) -> None:
    moved_alike(method, PAIR | moments | {"adapter": adapter}, tmp_path)


MODELS_RUN = [("procrustes", None), ("shift", None), ("shift", 1)]


@pytest.mark.parametrize(("method", "shuffle"), MODELS_RUN)
def test_an_adapter_is_moved_by_running_both_models(
    method: str,
    shuffle: int | None,
    adapter: Input,
    tmp_path: Path,
) -> None:
    # More positions than the widest space has directions: an orthogonal map of directions that were
    # hardly seen turns with the last digit of the activations.
    positions = 1500 if method == "procrustes" else 300
    inputs = PAIR | TEXT | {"adapter": adapter}
    moved_alike(method, inputs, tmp_path, shuffle, positions=positions)


@pytest.mark.parametrize("method", ["copy", "lora_x", "pro_lora"])
def test_an_adapter_is_moved_between_equals(method: str, adapter: Input, tmp_path: Path) -> None:
    inputs = {"source": LLAMA, "target": LLAMA, "adapter": adapter}
    moved_alike(method, inputs, tmp_path, matched=[(1, 1)], gain="weight")


def test_singular_bases_are_found_and_read_on_the_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # this weight counts as a large one: only a CPU has LAPACK find a part of the spectrum
    monkeypatch.setattr(linalg, "SMALL", 16)
    bases = Bases(tmp_path, "model")
    w = torch.randn(1100, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for k in (5, 4):  # computed and kept, then read
        found = bases.of("m", (1100, 20), k, lambda: w, DEVICE)
        assert {x.device.type for x in (found.u, found.v, found.values)} == {DEVICE}
        assert close((found.u.T @ w @ found.v).diagonal().cpu(), found.values.cpu(), 1e-3)


@pytest.mark.parametrize("by", ["cka", "weights"])
def test_layers_are_matched(by: str, tmp_path: Path) -> None:
    inputs = PAIR | TEXT if by == "cka" else {"source": LLAMA, "target": LLAMA}

    def matched(runtime: Runtime) -> Any:
        seen = text(runtime) if by == "cka" else None
        stage = matching.MatchStage(text=seen, basis=20, device=runtime.device)
        return matching.match(stage, inputs, tmp_path, Silent()).similarity

    there, here = both(matched)
    assert close(there, here, 1e-3)


# ---- merging, and all together -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_an_adapter_is_merged(kind: str, tmp_path: Path) -> None:
    own = Input(made(kind, LLAMA.path, tmp_path), "adapter")
    c, weights = compose_config(["task=merge", f"adapter.path={own.path}"]), []
    for runtime in BOTH:
        out = tmp_path / runtime.device
        out.mkdir()
        stage = merging.MergeStage(merge=c.merge, device=runtime.device)
        merging.merge(stage, {"model": LLAMA, "adapter": own}, out, Silent())
        weights.append(load_file(out / "model.safetensors"))
    assert same(*weights, tolerance=1e-4)


@pytest.mark.parametrize("decoder", ["hyperconv", "hyperconv_paw"])
def test_a_generators_step(decoder: str) -> None:
    """Its losses and their gradients; Fabric brings network and batch to the device."""
    torch.manual_seed(0)
    config = NetworkConfig(hidden=8, blocks=1, dropout=0.0, decoder=decoder, residual=False)
    start = Network(TINY, config, 12)
    vectors, present = padded([torch.randn(3, 12), torch.randn(2, 12)])
    true = torch.randn(2, TINY.tokens, TINY.dim)
    scale = Scale(
        mean=torch.randn(TINY.tokens, TINY.dim),
        spread=torch.ones(TINY.tokens, 1),
        weight=torch.from_numpy(TINY.places).float(),
    )

    def stepped(runtime: Runtime) -> dict[str, Any]:
        there, network = scale.to(runtime.device), deepcopy(start).to(runtime.device)
        raw = network(vectors.to(runtime.device), present.to(runtime.device))
        losses = Losses(TINY, there, FitConfig(delta=0.5))(
            values(raw, there, config), true.to(runtime.device)
        )
        losses["loss"].backward()
        gradients = {n: p.grad.cpu() for n, p in network.named_parameters() if p.grad is not None}
        return gradients | {n: x.detach().cpu() for n, x in losses.items()}

    assert same(*both(stepped))


RESOLVE = ["paw.models.load", "paw.training.memory", "paw.launch.run"]
RESOLVE += ["paw.tasks.predict", "paw.tasks.serve"]
PARTS = ["evaluation", "training", "transfer", "refine", "generator", "export"]
RESOLVE += [f"paw.{part}.steps" for part in PARTS]


def run(runtime: Runtime, folder: Path, *command: str) -> None:
    """A task from its command line, in a folder of its own."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module in map(import_module, RESOLVE):
            patch.setattr(module, "resolve_runtime", lambda hardware: runtime)
        dispatch(compose_config(command), list(command))
        # what is not named above would have run on the CPU, and nothing would have been seen
        loaded = [(name, m) for name, m in sys.modules.items() if name.startswith("paw.")]
        own = [name for name, m in loaded if vars(m).get("resolve_runtime") is resolve_runtime]
        assert not own


def test_predictions_are_the_same(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = made("lora", LLAMA.path, tmp_path)
    (tmp_path / "asked.txt").write_text("the color of lupup is\nthe home of bovin is\n")
    ask = ["model@source=tiny_llama", f"adapter.path={adapter}", "predict.raw=true"]
    ask += [f"predict.file={tmp_path / 'asked.txt'}", "predict.max_new_tokens=5"]

    def predicted(runtime: Runtime) -> list[str]:
        capsys.readouterr()
        run(runtime, tmp_path / runtime.device, "task=predict", *ask)
        return [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]

    there, here = both(predicted)
    assert there == here
    assert len(here) == 2


@pytest.mark.slow
def test_a_pipeline_from_end_to_end(tmp_path: Path) -> None:
    """With refinement: answers are written and learnt, and agreement is found."""
    few = ["train.max_steps=3", "evaluate.limit=6", "transfer.positions=200"]
    refined = ["refine=tokens", "refine.count=16", "refine.steps=2", "refine.gain_steps=2"]
    ask = ["task=pipeline", "experiment=demo", "transfer.controls=[]", *few, *refined]

    def systems(runtime: Runtime) -> Any:
        folder = tmp_path / runtime.device
        run(runtime, folder, *ask)
        (results,) = folder.glob("outputs/runs/*/results.json")
        return json.loads(results.read_text())["systems"]

    there, here = both(systems)
    assert [s["system"] for s in there] == [s["system"] for s in here]
    assert "target + procrustes, refined" in [s["system"] for s in here]
    for a, b in zip(there, here, strict=True):
        assert close(a["loss"], b["loss"], 1e-3), a["system"]
