"""Methods that look at more than two modules' moments: embeddings, heads, running models; and
placebos of the evidence."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from conftest import Silent
from paw.cli.compose import compose_config
from paw.data.vocabulary import shared_tokens
from paw.errors import TransferError
from paw.models.adapters import Factors, made_for, read_adapter
from paw.models.layout import heads
from paw.models.load import load_tokenizer
from paw.models.tensors import Weights, linear_shapes
from paw.paths import embedded
from paw.store import Input
from paw.transfer import calibrate, evidence
from paw.transfer.activations import hold_out, pair_texts, seen
from paw.transfer.anchors import embedding_site
from paw.transfer.config import TransferConfig
from paw.transfer.controls import transfer_named
from paw.transfer.linalg import best_penalty, explained
from paw.transfer.methods import shift
from paw.transfer.model_pair import ModelPair
from paw.transfer.modules import by_layer
from paw.transfer.spoil import SpoilStage, spoil
from test_transfer import QUICK, TEXT, TINY, models, random_adapter, run, text


def method(name: str, **changes: object) -> TransferConfig:
    return replace(transfer_named(name, compose_config([]).transfer), **QUICK | changes)  # type: ignore[arg-type]


# ---- embeddings
# -------------------------------------------------------------------------------------


def test_shared_tokens_are_the_same_bytes() -> None:
    s, t = (load_tokenizer(TINY[name]) for name in TINY)
    shared = shared_tokens(s, t)
    assert len(shared) > 100
    for i, j in shared:
        assert s.decode([i]) == t.decode([j])
        assert {i, j}.isdisjoint({*s.all_special_ids} & {*t.all_special_ids})
    assert shared_tokens(s, s) == [(i, i) for i, _ in shared_tokens(s, s)]


def test_a_blank_is_a_blank_in_both_kinds_of_vocabulary() -> None:
    class Vocabulary:
        def __init__(self, tokens: list[str]) -> None:
            self.tokens, self.all_special_ids = tokens, [0]

        def get_vocab(self) -> dict[str, int]:
            return {t: i for i, t in enumerate(self.tokens)}

    bytelevel = Vocabulary(["<s>", "Ġthe", "the", "Ã©", "Ċ"])
    pieces = Vocabulary(["<s>", "▁the", "the", "é", "\n", "<0x0A>", "<unused7>"])
    assert shared_tokens(bytelevel, pieces) == [(4, 4), (1, 1), (2, 2), (3, 3)]
    with pytest.raises(TransferError, match="share no token"):
        embedding_site(
            torch.zeros(9, 2),
            torch.zeros(9, 2),
            shared_tokens(Vocabulary(["<s>", "a"]), Vocabulary(["<s>", "b"])),
        )


def test_embeddings_find_a_rotation() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(16, 16, generator=g))[0]
    source, order = torch.randn(80, 16, generator=g), torch.randperm(80, generator=g)
    target = (source @ q)[order] * 3 + 1
    shared = [(int(order[j]), j) for j in range(80)]
    target[5] = 1e-6  # a token that was never trained
    assert torch.allclose(embedding_site(source, target, shared).procrustes, q, atol=0.02)


@pytest.mark.parametrize("name", ["embedding", "per_head"])
def test_self_transfer_of_a_real_model(tmp_path: Path, name: str) -> None:
    before = read_adapter(random_adapter("tiny_llama", tmp_path / "adapter"))
    after = read_adapter(run(tmp_path, "tiny_llama", "tiny_llama", method(name))[0])
    for module, old in before.items():
        assert (after[module].b @ after[module].a - old.b @ old.a).norm() < 5e-3 * old.norm(), (
            module
        )


# ---- heads
# ------------------------------------------------------------------------------------------


def test_heads_are_read_from_the_config(tmp_path: Path) -> None:
    found = heads(TINY["tiny_qwen2"])
    shapes = Weights(TINY["tiny_qwen2"], "cpu")["model.layers.0.self_attn.k_proj"].shape
    assert found.keyvalue * found.dim == shapes[0]
    (tmp_path / "config.json").write_text(
        '{"text_config": {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5e5}}'
    )
    assert (heads(tmp_path).dim, heads(tmp_path).keyvalue, heads(tmp_path).theta) == (16, 4, 5e5)


def test_queries_and_keys_are_mapped_by_maps_that_commute_with_rotation(tmp_path: Path) -> None:
    from paw.transfer.methods import per_head
    from paw.transfer.pairing import Pair, Side

    config, inputs = method("per_head"), models("tiny_llama", "tiny_qwen2") | TEXT
    calibrate.calibrate(calibrate.CalibrateStage(text=text(2000)), inputs, tmp_path, Silent())
    name = "model.layers.0.self_attn.q_proj"
    names = [(name.replace("q_", f"{r}_"),) * 2 for r in "qkvo"]
    [(_, sites)] = evidence.stored(tmp_path, names, "cpu")
    both = (heads(TINY["tiny_llama"]), heads(TINY["tiny_qwen2"]))
    sides = [
        Side(name, w.shape, lambda w=w: w, lambda k: None)
        for w in (Weights(TINY[m], "cpu")[name] for m in TINY)
    ]  # type: ignore[misc]
    t_out = per_head.maps(
        Pair(sides[0], sides[1], {t[1]: site for (_, t), site in sites.items()}, heads=both), config
    ).t_out

    def turn(x: torch.Tensor, h: object, angle: float) -> torch.Tensor:
        """Every pair (i, i + dim/2) of every head turned by one angle, as a rotation common to all
        frequencies."""
        y = x.reshape(-1, 2, h.dim // 2)  # type: ignore[attr-defined]
        c, s = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
        return torch.stack([y[:, 0] * c - y[:, 1] * s, y[:, 0] * s + y[:, 1] * c], dim=1).reshape(
            -1
        )

    x = torch.randn(sides[0].shape[0], generator=torch.Generator().manual_seed(0))
    one = turn(t_out.left(x[:, None])[:, 0], both[1], 0.7)
    other = t_out.left(turn(x, both[0], 0.7)[:, None])[:, 0]
    assert one.norm() > 0.1
    assert torch.allclose(one, other, atol=1e-4)


# ---- running models
# ---------------------------------------------------------------------------------


def test_shift_gives_the_stream_most_of_what_the_adapter_gave_the_source(tmp_path: Path) -> None:
    """On the same model, so that what the stream should do is known exactly; on text that the fit
    has not seen."""
    factors = read_adapter(random_adapter("tiny_llama", tmp_path / "adapter"))
    factors = {name: Factors(f.a * 0.3, f.b) for name, f in factors.items()}
    known = ModelPair(text(4000), models("tiny_llama", "tiny_llama") | TEXT)
    layers = [(i, i) for i in range(4)]
    config = method("shift", map_penalty=1e-6, penalty=1e-6)
    found = shift.fit(factors, known, layers, config, Silent())  # type: ignore[arg-type]
    assert {name.split(".")[-1] for name in found} == {"o_proj", "down_proj"}
    assert {f.rank for f in found.values()} == {4}
    places = shift._streams(known.target, by_layer(known.parts[1]))
    plain = shift._capture(known, 1, places, known.held)
    ends = []
    for adapted in (factors, found):
        with shift.adapted(known.target, known.parts[1], adapted):
            ends.append(
                {
                    space: x - plain[space]
                    for space, x in shift._capture(known, 1, places, known.held).items()
                }
            )
    last = max(places, key=lambda space: (space[0], space[1].side == "out"))
    assert explained(ends[0][last], ends[1][last]) > 0.5
    with shift.adapted(known.target, known.parts[1], {}):
        assert torch.equal(shift._capture(known, 1, places, known.held)[last], plain[last])


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    """A Gemma 3 of random weights: a norm stands behind o_proj and down_proj, and those of its
    weights are far apart."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(load_tokenizer(TINY["tiny_llama"])),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model, folder = AutoModelForCausalLM.from_config(config), tmp_path / "gemma"
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            torch.nn.init.uniform_(weight, -0.8, 0.5)  # counted from 1
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY["tiny_llama"] / file, folder / file)
    return folder


def test_shift_gets_through_a_norm_behind_a_module(gemma: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    factors = {
        name: Factors(
            torch.randn(4, into, generator=draw), 0.1 * torch.randn(out, 4, generator=draw)
        )
        for name, (out, into) in linear_shapes(gemma).items()
        if ".layers." in name
    }
    known = ModelPair(text(4000), {"source": Input(gemma, "g"), "target": Input(gemma, "g")} | TEXT)
    config = method("shift", map_penalty=1e-6, penalty=1e-6)
    found = shift.fit(factors, known, [(i, i) for i in range(3)], config, Silent())  # type: ignore[arg-type]
    places = shift._streams(known.target, by_layer(known.parts[1]))
    last = max(places, key=lambda space: (space[0], space[1].side == "out"))
    ends = []
    for adapter in ({}, factors, found):
        with shift.adapted(known.target, known.parts[1], adapter):
            stream = shift._capture(known, 1, {last: places[last]}, known.held)[last]
        ends.append(stream / shift._rms(stream))
    assert explained(ends[1] - ends[0], ends[2] - ends[0]) > 0.5


@pytest.mark.parametrize(("share", "kept"), [(-1.0, 0.0), (4.0, 0.25), (1.0, 1.0)])
def test_no_half_layer_makes_it_worse(
    share: float, kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A correction that points elsewhere is left out, and one that goes too far is cut."""
    factors = read_adapter(random_adapter("tiny_llama", tmp_path / "adapter"))
    fitted = shift.reduced_rank

    def astray(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = fitted(*args)
        return a, share * b

    known = ModelPair(text(3000), models("tiny_llama", "tiny_llama") | TEXT)
    config = method("shift", map_penalty=1e-6, penalty=1e-6)
    found = []
    for regression in (fitted, astray):
        monkeypatch.setattr(shift, "reduced_rank", regression)
        [(name, first), *_] = shift.fit(factors, known, [(0, 0)], config, Silent()).items()  # type: ignore[arg-type]
        assert name.endswith("0.self_attn.o_proj")
        found.append(first)
    assert torch.allclose(found[1].b, share * kept * found[0].b, rtol=1e-4, atol=1e-7)


def test_a_sink_does_not_decide_a_half_layer() -> None:
    """Streams are seen as the next norm leaves them, without positions that are far longer."""
    draw = torch.Generator().manual_seed(0)
    before, plain = torch.randn(20, 4, generator=draw), torch.randn(20, 6, generator=draw)
    after, now, x = before + 0.1, plain * 2, torch.randn(20, 3, generator=draw)
    seen = shift.Half.of(before, after, plain, now, x)
    for each in (seen.source, seen.target, seen.source + seen.shift, seen.target + seen.done):
        assert torch.allclose(each.square().mean(-1), torch.ones(20))
    assert torch.allclose(seen.done, torch.zeros(20, 6), atol=1e-6)  # a norm does not see a scale
    assert torch.allclose(seen.x * shift._rms(now), x)
    sinks = [torch.cat([each, 1000 * each[:1]]) for each in (before, after, plain, now, x)]
    assert torch.equal(shift.Half.of(*sinks).x, seen.x)


def test_shift_refuses_what_does_not_fit_into_memory(tmp_path: Path) -> None:
    random_adapter("tiny_llama", tmp_path / "adapter")
    with pytest.raises(TransferError, match=r"transfer=shift keeps .* transfer\.memory_gb=0\.001"):
        run(tmp_path, "tiny_llama", "tiny_qwen2", method("shift", memory_gb=0.001), streaming=True)


def test_a_penalty_is_chosen_on_positions_held_out() -> None:
    """Few samples of much noise want a large one, many without noise a small one."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(10, 30, generator=g)

    def chosen(n: int, noise: float) -> float:
        x = torch.randn(n + 500, 30, generator=g)
        y = x @ t.T + noise * torch.randn(n + 500, 10, generator=g)
        return best_penalty(y[:n].T @ x[:n] / n, x[:n].T @ x[:n] / n, x[n:], y[n:])

    assert chosen(5000, 0.0) == 1e-4
    assert chosen(40, 10.0) == 1.0


# ---- evidence spoilt, and held out
# ------------------------------------------------------------------


def test_shuffled_positions_keep_each_models_own_moments(tmp_path: Path) -> None:
    """The Grams are the same to rounding; the cross moments are those of independent samples: the
    product of the means."""
    inputs = models("tiny_llama", "tiny_qwen2") | TEXT
    names = [("model.layers.3.self_attn.v_proj",) * 2]
    found = {}
    for shuffle in (None, 0, 1):
        out = tmp_path / str(shuffle)
        out.mkdir()
        stage = calibrate.CalibrateStage(text=text(4000, shuffle=shuffle), layers="index")
        said = calibrate.calibrate(stage, inputs, out, Silent())
        assert ("paired at random" in str(said)) is (shuffle is not None)
        [(_, sites)] = evidence.stored(out, names, "cpu")
        found[shuffle] = sites
    for space, site in found[None].items():
        one, two = found[0][space], found[1][space]
        for gram in ("gram_s", "gram_t"):
            assert torch.allclose(getattr(one, gram), getattr(site, gram), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(one.cross, two.cross, rtol=1e-2)
        right = explained(site.held_s, site.held_t @ site.procrustes.T)
        wrong = explained(one.held_s, one.held_t @ one.procrustes.T)
        assert wrong < 0.1 < right


def test_held_out_texts_are_not_fitted_on() -> None:
    s, t = (load_tokenizer(TINY[name]) for name in TINY)
    lines = (embedded("facts") / "calibration.txt").read_text().splitlines()
    texts = pair_texts(lines, s, t, 3000)
    fit, held = hold_out(texts, 200)
    assert [*fit, *held] == texts
    assert 150 < sum(len(x.positions) for x in held) <= 200
    assert hold_out(texts[:1], 200) == (texts[:1], [])
    fit, held = hold_out(pair_texts(lines, s, t, 500), 512)
    assert sum(len(x.positions) for x in held) <= 50


def test_both_models_are_seen_at_the_same_positions() -> None:
    known = ModelPair(text(300, batch_size=7), models("tiny_llama", "tiny_llama") | TEXT)
    places = shift._streams(known.source, by_layer(known.parts[0]))
    for now_s, now_t in seen(known.models, (places, places), known.texts, 7, known.pads):
        for space in places:
            assert torch.equal(now_s[space], now_t[space])


def test_a_placebo_of_a_method_without_maps_is_spoilt_too(tmp_path: Path) -> None:
    random_adapter("tiny_llama", tmp_path / "adapter")
    config = method("shift", positions=1500)
    out, result = run(
        tmp_path, "tiny_llama", "tiny_qwen2", config, streaming=True, layers=[(0, 0), (3, 4)]
    )
    assert result.target_modules == 4
    real = read_adapter(out)
    for name in ("negated", "random"):
        (tmp_path / name).mkdir()
        spoilt = spoil(
            SpoilStage(method=name, seed=0), {"adapter": Input(out, "a")}, tmp_path / name, Silent()
        )
        assert (spoilt.target_modules, spoilt.coverage) == (4, result.coverage)
        assert str(spoilt) == "4 modules"
        assert made_for(tmp_path / name) == made_for(out) == "tiny_qwen2"
    for module, negated in read_adapter(tmp_path / "negated").items():
        assert torch.allclose(negated.b @ negated.a, -(real[module].b @ real[module].a), atol=1e-6)
    for module, turned in read_adapter(tmp_path / "random").items():
        assert turned.norm() == pytest.approx(real[module].norm(), rel=1e-4)
