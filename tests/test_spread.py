"""A base that is spread over devices computes what it computes on one.

The devices are the pretended one and the CPU, so that a tensor that stayed behind is found, or the
CPU twice. Nothing here says anything of memory, speed or copies between GPUs.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import Silent
from paw.cli.compose import compose_config
from paw.errors import ConfigError, ModelError
from paw.evaluation import classify, engine
from paw.evaluation.devices import Engines
from paw.evaluation.engine import Engine, Job
from paw.evaluation.plan import plan_scoring, plan_writing
from paw.models import load
from paw.models.load import (
    Runtime,
    load_classifier,
    load_model,
    load_tokenizer,
    resolve_runtime,
    spread_over,
    spreads,
)
from paw.models.tensors import weight_bytes
from paw.transfer import match as matching
from paw.transfer import model_pair
from paw.transfer.evidence import MOMENTS
from pretend import DEVICE, pretending
from test_devices import (
    ASKED,
    HEAD,
    LLAMA,
    PAIR,
    PROMPTS,
    QWEN,
    TEXT,
    close,
    run,
    same,
    seen,
    text,
    windowed,
)
from test_engine import job, made, packed

WHOLE = Runtime("float32")
SPREAD = Runtime("float32", devices=2, spread="always")
HERE, THERE = "cpu", f"{DEVICE}:0"
# the first is what most is tested on; by each of the others once
PLACES = {
    "device and CPU": [THERE, HERE],
    "CPU and device": [HERE, THERE],
    "CPU twice": [HERE, HERE],
}
GIB = 2**30

__all__ = ["windowed"]  # a fixture


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    gc.freeze()
    with pretending():
        yield
    gc.unfreeze()


@pytest.fixture
def places(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices of the profile, in order."""
    found = PLACES[getattr(request, "param", "device and CPU")]
    monkeypatch.setattr(load, "_places", lambda runtime: found)
    return found


everywhere = pytest.mark.parametrize("places", PLACES, indirect=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of random weights whose head is not its embedding, so that it is on the last
    device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=440,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("untied")
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(LLAMA.path).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(request: pytest.FixtureRequest, untied: Path, windowed: Path) -> Callable[[str], Path]:
    known = {"untied": untied, "windowed": windowed, "tiny_llama": LLAMA.path}
    return known.__getitem__


def devices_of(model: Any) -> set[str]:
    return {str(x.device) for x in (*model.parameters(), *model.buffers())}


# ---- where a base goes -------------------------------------------------------------------------

TABLE = [
    # spread, devices, GiB of the base, GiB of a device, whether it is spread
    ("auto", 2, 26.0, 24.0, True),
    ("auto", 2, 22.0, 24.0, True),  # its weights alone leave no room to run it
    ("auto", 2, 16.0, 24.0, False),
    ("auto", 1, 26.0, 24.0, False),
    ("auto", 2, 26.0, None, False),  # a CPU
    ("always", 2, 1.0, 24.0, True),
    ("always", 2, 1.0, None, True),
    ("always", 1, 26.0, 24.0, False),
    ("never", 2, 26.0, 24.0, False),
]


@pytest.mark.parametrize(("spread", "devices", "needed", "room", "expected"), TABLE)
def test_a_base_is_spread_where_one_device_cannot_hold_it(
    spread: str,
    devices: int,
    needed: float,
    room: float | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "weight_bytes", lambda folder, size: needed * GIB)
    monkeypatch.setattr(load, "_memory", lambda runtime: room and room * GIB)
    runtime = Runtime("float32", "cuda", devices, spread=spread)
    assert spreads(runtime, LLAMA.path) is expected
    found = spread_over(replace(runtime, spread=spread), LLAMA.path)
    assert found == (["cuda:0", "cuda:1"] if expected else [])


def test_two_bases_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "weight_bytes", lambda folder, size: 15 * GIB)
    monkeypatch.setattr(load, "_memory", lambda runtime: 24 * GIB)
    runtime = Runtime("bfloat16", "cuda", 2)
    assert spreads(runtime, LLAMA.path, QWEN.path)
    assert not spreads(runtime, LLAMA.path)


def test_what_all_devices_cannot_hold_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "weight_bytes", lambda folder, size: 140.5 * GIB)
    monkeypatch.setattr(load, "_memory", lambda runtime: 24 * GIB)
    with pytest.raises(ModelError, match=r"needs 140\.5 GiB, 4 devices have 96\.0\.") as found:
        spread_over(Runtime("bfloat16", "cuda", 4), LLAMA.path)
    assert "\n" not in str(found.value)


def test_memory_that_runs_out_while_a_base_is_spread_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def out(*args: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", out)
    with pytest.raises(ModelError, match="what is free of 2 devices"):
        load_model(LLAMA.path, WHOLE, places=[THERE, HERE])


def test_the_smallest_device_counts_or_what_the_profile_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [80, 40, 8]  # the third is not the profile's
    about = [SimpleNamespace(total_memory=n * GIB) for n in sizes]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "get_device_properties", about.__getitem__)
    runtime = Runtime("float32", "cuda", 2)
    assert load._memory(runtime) == 40 * GIB
    assert load._memory(replace(runtime, memory_gb=24.0)) == 24 * GIB
    assert load._memory(replace(runtime, memory_gb=48.0)) == 40 * GIB
    assert load._memory(replace(runtime, device="cpu", memory_gb=1.0)) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert load._memory(replace(runtime, memory_gb=48.0)) == 48 * GIB


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_size_of_a_base_is_read_from_its_files(precision: str, untied: Path) -> None:
    for base in (LLAMA.path, untied):
        model = load_model(base, Runtime(precision))
        size = sum(p.nbytes for p in model.parameters())
        assert load._weights(Runtime(precision), [base]) == size


def test_quantised_values_keep_their_size(tmp_path: Path) -> None:
    kinds = (torch.int8, torch.float8_e4m3fn, torch.bool, torch.int32, torch.float16)
    tensors = {str(kind): torch.zeros(3, 5).to(kind) for kind in kinds}
    save_file(tensors, tmp_path / "model.safetensors")
    assert weight_bytes(tmp_path, 4) == 15 * (1 + 1 + 1 + 4 + 4)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"0" * 40)
    with pytest.raises(ModelError, match=r"model\.safetensors: is damaged"):
        weight_bytes(tmp_path, 4)


def test_a_profile_says_it() -> None:
    c = compose_config(["hardware=rtx4090", "hardware.devices=2", "hardware.spread=always"])
    found = resolve_runtime(c.hardware)
    assert (found.devices, found.spread, found.memory_gb) == (2, "always", 24)
    with pytest.raises(ConfigError, match=r"hardware\.spread"):
        compose_config(["hardware.spread=maybe"])


@everywhere
@pytest.mark.parametrize("base", ["tiny_llama", "untied", "windowed"])
def test_layers_stand_in_order_and_nothing_is_left_out(
    base: str, places: list[str], folder: Callable[[str], Path]
) -> None:
    model = load_model(folder(base), SPREAD, places=places)
    assert devices_of(model) == set(places)
    body = model.model
    at = [str(next(layer.parameters()).device) for layer in body.layers]
    assert at == sorted(at, key=places.index)
    # the norm stands beside the head: an adapter of the head reads what the norm has written
    first, last = str(body.embed_tokens.weight.device), str(model.lm_head.weight.device)
    assert str(body.norm.weight.device) == last
    tied = model.lm_head.weight is body.embed_tokens.weight
    assert tied == (base != "untied")
    assert (first, last) == (places[0], places[0 if tied else -1])
    assert model._hf_hook.execution_device == torch.device(places[0])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_are_alike(count: int) -> None:
    """As of a large base, of which a device that nothing is on holds nothing."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    from transformers import AutoModelForCausalLM

    names = [f"cuda:{i}" for i in range(count)]
    at = load._placed(AutoModelForCausalLM, config, names, False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = dict.fromkeys(names, 0)
    for name, place in at.items():
        sizes[str(place)] += load._size(model.get_submodule(name))
    total, layer = load._size(model), load._size(model.model.layers[0])
    assert sum(sizes.values()) == total
    assert all(abs(n - total / count) <= layer for n in sizes.values())


# ---- evaluation --------------------------------------------------------------------------------


def evaluated(
    runtime: Runtime, base: Path, adapter: Path | None, prefix: tuple[int, ...], trees: bool = True
) -> tuple[list[list[float]], list[list[int]]]:
    """Scores of all choices, and what is written after the prompts."""
    own = Engine()
    answers = answered(own, about(runtime, base, adapter, prefix))
    assert own._trees == trees
    expected = load._places(runtime) if runtime.spread == "always" else [HERE]
    assert devices_of(own._model) == set(expected)
    beside_their_layers(own._model)
    return answers


def about(
    runtime: Runtime, base: Path, adapter: Path | None = None, prefix: tuple[int, ...] = ()
) -> Job:
    check = tuple(
        replace(r, ids=r.ids[len(prefix) :], start=r.start - len(prefix)) for r in ASKED[0]
    )
    return replace(job(base, base.name, prefix, adapter), runtime=runtime, check=check)


def answered(own: Engine, what: Job) -> tuple[list[list[float]], list[list[int]]]:
    plan, _ = plan_writing(PROMPTS, len(what.prefix), 10**6, 5, ())
    return packed(own, what, ASKED), [x for batch in plan for x in own.run(what, batch)]


def beside_their_layers(model: Any) -> None:
    """Each module's tensors are on one device, those of an adapter too."""
    for layer in (*model.model.layers, model.lm_head, model.model.norm):
        assert len(devices_of(layer)) == 1


def alike(found: Any, expected: Any) -> bool:
    scores = zip(found[0], expected[0], strict=True)
    return all(close(a, b) for a, b in scores) and found[1] == expected[1]


EVALUATED = [
    ("tiny_llama", None, "device and CPU"),
    ("tiny_llama", "lora", "device and CPU"),
    ("tiny_llama", "prefix_tuning", "device and CPU"),
    ("tiny_llama", "prompt_tuning", "device and CPU"),
    ("untied", "lora", "device and CPU"),
    ("untied", "prefix_tuning", "CPU twice"),
    ("windowed", "lora", "CPU and device"),
]


@pytest.mark.parametrize(("base", "kind", "places"), EVALUATED, indirect=["places"])
def test_questions_are_scored_and_answers_written(
    base: str,
    kind: str | None,
    places: list[str],
    folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    adapter = made(kind, folder(base), tmp_path) if kind else None
    for prefix in ((), HEAD):
        one, many = (evaluated(r, folder(base), adapter, prefix) for r in (WHOLE, SPREAD))
        assert alike(many, one)


def test_an_adapter_of_the_head(places: list[str], untied: Path, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["lm_head", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(untied, WHOLE), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    one, many = (evaluated(r, untied, tmp_path, HEAD) for r in (WHOLE, SPREAD))
    assert alike(many, one)
    assert not alike(one, evaluated(WHOLE, untied, None, HEAD))


def test_questions_in_rows_of_their_own(
    places: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As of a model that takes no masks of ours: by the library's own forward pass and loop."""
    monkeypatch.setattr(Engine, "_masks", lambda self, seen: None)
    adapter = made("lora", LLAMA.path, tmp_path)
    one, many = (evaluated(r, LLAMA.path, adapter, (), trees=False) for r in (WHOLE, SPREAD))
    assert alike(many, one)


def test_rows_leave_a_batch_that_is_written(places: list[str], untied: Path) -> None:
    """A text that is long enough ends, and its keys and values leave every device."""

    def written(runtime: Runtime) -> Any:
        own = Engine()
        own.run(about(runtime, untied), plan_scoring(ASKED, 0, 256, 10**6)[0][0])
        first = answered(own, about(runtime, untied))[1]
        own._tokenizer.eos_token_id = first[0][1]  # where one ends, others go on
        return answered(own, about(runtime, untied))[1]

    one, many = written(WHOLE), written(SPREAD)
    assert one == many
    assert len({len(answer) for answer in one}) > 1


def test_adapters_come_and_go_on_a_base_that_is_kept(
    places: list[str], untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = list[Path]()

    def counted(folder: Path, *args: Any, **more: Any) -> Any:
        loads.append(folder)
        return load_model(folder, *args, **more)

    monkeypatch.setattr(engine, "load_model", counted)
    own, whole = Engine(), Engine()
    kinds = (None, "dora", "prefix_tuning", None)
    adapters = [made(k, untied, tmp_path) if k else None for k in kinds]
    found = [answered(own, about(SPREAD, untied, a, HEAD)) for a in adapters]
    assert loads == [untied]
    assert found[0] == found[3]
    for adapter, one in zip(adapters, found, strict=True):
        assert alike(one, answered(whole, about(WHOLE, untied, adapter, HEAD)))
    assert not alike(found[0], found[1])


class Worker:
    """Of a device's process, what it says when it is told to stop."""

    stopped = False

    def shutdown(self) -> None:
        self.stopped = True


def test_a_spread_base_has_one_engine(
    places: list[str], untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = plan_scoring(ASKED * 6, 0, 1, 10**6)
    assert len(plan) > 1
    engines, before = Engines(), Worker()
    engines._workers.append(before)  # type: ignore[arg-type]
    found = dict(engines.run(about(SPREAD, untied), plan, Silent()))
    assert before.stopped
    assert not engines._workers
    expected = dict(Engines().run(about(WHOLE, untied), plan, Silent()))
    assert all(close(a, b) for i in expected for a, b in zip(found[i], expected[i], strict=True))
    assert devices_of(engines._one._model) == set(places)

    def start(self: Engines, runtime: Runtime) -> None:
        assert self._one._model is None  # its memory was given back before
        raise InterruptedError

    monkeypatch.setattr(Engines, "_start", start)
    with pytest.raises(InterruptedError):
        list(engines.run(about(replace(SPREAD, spread="never"), untied), plan, Silent()))


def test_a_head_says_the_same(places: list[str], untied: Path) -> None:
    rows, logits = [r for question in ASKED for r in question], []
    for at in ([], places):
        torch.manual_seed(0)  # the head
        model, fresh = load_classifier(untied, SPREAD, ("no", "yes"), places=at)
        assert fresh == ["score"]
        assert devices_of(model) == set(at or [HERE])
        with torch.inference_mode():
            logits.append(classify.class_logits(model, rows, 0, pairs=False).cpu())
    assert close(*logits)


# ---- calibration and prediction ----------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [None, 1], ids=["paired", "shuffled"])
def test_moments_are_the_same(shuffle: int | None, places: list[str], tmp_path: Path) -> None:
    one, many = (seen(r, tmp_path / r.spread, shuffle) / MOMENTS for r in (WHOLE, SPREAD))
    assert same(load_file(many), load_file(one))


def test_layers_are_matched(
    places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bases of which a device holds either, but not both."""
    either = max(load._weights(WHOLE, [base.path]) for base in PAIR.values())
    monkeypatch.setattr(load, "_memory", lambda runtime: 1.2 * either)
    models = list[Any]()

    def kept(*args: Any, **more: Any) -> Any:
        models.append(load_model(*args, **more))
        return models[-1]

    monkeypatch.setattr(model_pair, "load_model", kept)

    def matched(runtime: Runtime) -> Any:
        stage = matching.MatchStage(text=text(runtime), basis=20, device=runtime.device)
        return matching.match(stage, PAIR | TEXT, tmp_path, Silent()).similarity

    one, many = matched(WHOLE), matched(replace(SPREAD, spread="auto"))
    assert close(many, one, 1e-3)
    assert [devices_of(m) for m in models] == [{HERE}, {HERE}, set(places), set(places)]


def test_predictions_are_the_same(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = made("lora", LLAMA.path, tmp_path)
    (tmp_path / "asked.txt").write_text("the color of lupup is\nthe home of bovin is\n")
    ask = ["model@source=tiny_llama", f"adapter.path={adapter}", "predict.raw=true"]
    ask += [f"predict.file={tmp_path / 'asked.txt'}", "predict.max_new_tokens=5"]

    def predicted(runtime: Runtime) -> list[str]:
        capsys.readouterr()
        run(runtime, tmp_path / runtime.spread, "task=predict", *ask)
        return [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]

    one, many = predicted(WHOLE), predicted(SPREAD)
    assert one == many
    assert len(one) == 2
