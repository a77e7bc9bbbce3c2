"""What a step is: packed rows equal to padded ones, shares that add up, LoRA's fused sum equal to
PEFT's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
)

from conftest import Launch
from paw.cli.compose import compose_config
from paw.data.tokenise import Encoded
from paw.models.load import Runtime, load_model
from paw.paths import embedded
from paw.training import fit as fitting
from paw.training import fused, packing
from paw.training.batches import Share, micro_batches, per_epoch, step_rows
from paw.training.flops import device_name, utilisation
from paw.training.objectives import Answers

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
    "gemma2": Gemma2Config(
        **SMALL, sliding_window=4, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=4),
}


def adapted(family: str) -> Any:
    """A model of random weights with LoRA on it, in float64, so that rounding hides nothing."""
    torch.manual_seed(0)
    config = FAMILIES[family]
    base = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if family == "gemma2" else "sdpa"
    ).double()
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        ),
    )
    return model.double().eval()


def rows_of(lengths: list[tuple[int, int]], words: int = 99) -> list[Encoded]:
    """(context, continuation) lengths as random tokens."""
    draw = torch.Generator().manual_seed(sum(a * 31 + b for a, b in lengths))
    return [
        Encoded(tuple(torch.randint(1, words, (a + b,), generator=draw).tolist()), a)
        for a, b in lengths
    ]


def gradients(
    model: Any, rows: list[Encoded], packed: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    packing.use(model.get_base_model()) if packed else packing.undo(model.get_base_model())
    # filled up in float64, Gemma 2's own mask overflows where a window holds nothing but filling:
    # its rows go one by one
    alone = not packed and model.config.model_type == "gemma2"
    loss = sum(
        Answers(0, packed).total(model, part) for part in ([[r] for r in rows] if alone else [rows])
    )
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_packing_equals_padding_in_loss_and_gradients(
    family: str, lengths: list[tuple[int, int]]
) -> None:
    model, rows = adapted(family), rows_of(lengths)
    (padded, a), (packed, b) = gradients(model, rows, False), gradients(model, rows, True)
    assert packed == pytest.approx(padded, rel=1e-5)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(
            a[name], b[name], rtol=1e-5, atol=1e-5 * float(a[name].abs().max())
        ), name


def test_packing_that_leaks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = adapted("llama"), rows_of([(3, 4), (5, 2), (2, 6)])
    assert packing.use(model.get_base_model())
    assert packing.agrees(model, rows, 0, 1e-3)
    whole = packing.attend
    monkeypatch.setattr(
        packing, "attend", lambda *args, segments=None, **kwargs: whole(*args, **kwargs)
    )  # rows see each other
    packing.use(model.get_base_model())
    assert not packing.agrees(model, rows, 0, 1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_fused_sum_is_lora(dropout: float) -> None:
    base = load_model(
        embedded("tiny_qwen2"), Runtime("float32")
    )  # whose queries and keys have biases
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=dropout,
        target_modules="all-linear",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config).train()
    ids = torch.arange(40).reshape(2, 20)

    def once() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(3)
        logits = model(input_ids=ids).logits
        logits.pow(2).mean().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, theirs = once()
    fused.use(model)
    sums = [
        m
        for m in model.modules()
        if getattr(getattr(m, "forward", None), "__func__", None) is fused._forward
    ]
    assert len(sums) == 7 * len(base.model.layers)
    ours, grads = once()
    assert torch.allclose(plain, ours, atol=1e-5)
    assert len(theirs) == len(grads) > 0
    for a, b in zip(theirs, grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6 + 1e-4 * float(a.abs().max()))
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids).logits, ours, atol=1e-3)


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    size=st.integers(1, 12),
    world=st.integers(1, 3),
    accumulate=st.integers(1, 4),
    packed=st.booleans(),
)
def test_shares_of_a_step_add_up_to_its_mean(
    lengths: list[int], size: int, world: int, accumulate: int, packed: bool
) -> None:
    rows = [Encoded(tuple(range(n)), n // 2) for n in lengths]
    size = min(size * world, len(rows))
    if size < world:
        return
    accumulate = min(accumulate, size // world)
    objective = Answers(0, packed)
    for step, picked in itertools.islice(enumerate(step_rows(lengths, size, 7, not packed)), 3):
        parts = [
            m
            for rank in range(world)
            for m in micro_batches(rows, picked, Share(rank, world, accumulate), objective, step)
        ]
        assert all(part.rows for part in parts)
        assert sorted(len(r.ids) for m in parts for r in m.rows) == sorted(
            lengths[i] for i in picked
        )
        # a step takes the mean over micro-batches, gradients are averaged over processes: what is
        # left is a mean over all tokens
        weight = sum(
            m.weight / accumulate / world * sum(map(objective.count, m.rows)) for m in parts
        )
        assert weight == pytest.approx(1.0)


@pytest.mark.parametrize("bucketed", [False, True])
def test_an_epoch_sees_every_example_once_in_an_order_of_its_own(bucketed: bool) -> None:
    lengths = [3 + i % 17 for i in range(64)]
    steps = per_epoch(64, 8)
    stream = step_rows(lengths, 8, 0, bucketed)
    first, second = ([next(stream) for _ in range(steps)] for _ in range(2))
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(64))
    assert first != second
    assert first == list(itertools.islice(step_rows(lengths, 8, 0, bucketed), steps))
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first)
    assert (spread < 30) == bucketed


def test_every_method_has_a_learning_rate_of_its_own_and_of_its_task() -> None:
    assert compose_config(["adapter=ia3", "task=train"]).train.lr == 5e-3
    assert compose_config(["adapter=lora", "model@source=smollm2_135m"]).train.lr == 2e-4
    assert (
        compose_config(
            ["adapter=lora", "model@source=bert_base", "task=train", "evaluate.mode=classify"]
        ).train.lr
        == 4e-4
    )
    assert compose_config(["adapter=ia3", "task=train", "train.lr=1"]).train.lr == 1
    assert compose_config(["experiment=server"]).train.lr == 1.5e-5
    small, large = (compose_config([f"adapter={x}_data"]).adapter for x in ("small", "large"))
    assert (small.r, small.alpha, large.r, large.alpha) == (8, 16, 32, 64)  # type: ignore[attr-defined]


def test_a_base_is_left_as_it_was(tmp_path: Path) -> None:
    """Packing changes how attention is computed: undone, the model is the library's again."""
    model = load_model(embedded("tiny_llama"), Runtime("float32"))
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    assert packing.use(model)
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, before, atol=1e-5)
    packing.undo(model)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_utilisation_is_of_the_peak_of_all_devices() -> None:
    known: dict[str, Any] = {
        "parameters": 7_000_000_000, "trainable": 40_000_000, "tokens_per_second": 6000.0
    }  # fmt: skip
    found = utilisation(**known, device="NVIDIA A800-SXM4-80GB", devices=1)
    assert found == pytest.approx((4 * 7e9 + 2 * 4e7) * 6000 / 312e12)
    four = utilisation(**known, device="NVIDIA A800-SXM4-80GB", devices=4)
    assert four == pytest.approx(found / 4)
    for device, peak in {
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-PCIE-40GB": 312e12,
    }.items():
        share = utilisation(**known, device=device, devices=1)
        assert share == pytest.approx(found * 312e12 / peak)
    for device in (
        "NVIDIA GeForce GTX 970", "NVIDIA GeForce RTX 4090 D", "NVIDIA RTX A1000", "NVIDIA GB200",
        "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ):  # fmt: skip
        assert utilisation(**known, device=device, devices=1) is None
    assert device_name(torch.device("cpu")) is None


def test_a_training_tells_it_where_the_peak_is_known(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "device_name", lambda device: "NVIDIA GeForce RTX 4090")
    found = {}
    for bits in ("float32", "bfloat16"):
        ask = ["task=train", "experiment=demo", "train.max_steps=3", "evaluate.limit=5"]
        launch(*ask, f"hardware.precision={bits}", f"paths.outputs={bits}")
        [file] = (tmp_path / bits / "artifacts" / "train").glob("*/stage.json")
        found[bits] = json.loads(file.read_text())["result"]
    assert found["float32"]["mfu"] is None  # the peak is that of 16 bits
    result = found["bfloat16"]
    base = load_model(embedded("tiny_llama"), Runtime("float32"))
    tables = base.get_input_embeddings().weight.numel()
    few = sum(p.numel() for p in base.parameters()) - tables
    # PEFT's factors are counted beside the layers that they are on
    factors = result["trainable"]
    needed = (4 * (few + factors) + 2 * factors) * result["tokens_per_second"]
    assert result["mfu"] == pytest.approx(needed / 165.2e12, rel=1e-6)
