"""The two-map engine: directions, exactness, invariances, placebos; and a real transfer on the
embedded pair."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Silent, move
from paw.cli.compose import compose_config
from paw.data import vocabulary
from paw.errors import ConfigError, TransferError
from paw.models.adapters import Factors, read_adapter, write_adapter
from paw.models.layout import Heads, Part, heads
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.models.tensors import Weights, linear_shapes
from paw.paths import embedded
from paw.plugins import modules
from paw.store import Input
from paw.transfer import activations, anchors, calibrate, evidence, figures, linalg
from paw.transfer import match as matching
from paw.transfer import transfer as transferring
from paw.transfer.activations import PairedText, pair_texts, seen
from paw.transfer.config import TransferConfig
from paw.transfer.controls import transfer_named
from paw.transfer.gate import GateResult, _joined, mark
from paw.transfer.layers import by_index, proportional, spread
from paw.transfer.maps import Eye, Product
from paw.transfer.methods import METHODS, Method, copy, method_named, per_head, ridge, shift
from paw.transfer.model_pair import ModelPair, TextConfig
from paw.transfer.modules import (
    ROLES,
    UPDATE,
    Layers,
    Place,
    by_layer,
    layer_of,
    moments_bytes,
    pair_names,
)
from paw.transfer.pairing import Pair, Side, Site
from paw.transfer.prefetch import module_pairs
from paw.transfer.report import _bars, _draw, write_report
from paw.transfer.verdict import feasibility, mean

TINY = {name: embedded(name) for name in ("tiny_llama", "tiny_qwen2")}
TEXT = {"calibration": Input(embedded("facts") / "calibration.txt", "text")}
RUNTIME = Runtime("float32")


def models(source: str, target: str) -> dict[str, Input]:
    return {"source": Input(TINY[source], source), "target": Input(TINY[target], target)}


def text(positions: int, **changes: Any) -> TextConfig:
    return TextConfig(runtime=RUNTIME, positions=positions, **changes)


def orthogonal(n: int, seed: int) -> torch.Tensor:
    q, r = torch.linalg.qr(
        torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    return (q * r.diagonal().sign()).float()


def site(x_s: torch.Tensor, x_t: torch.Tensor) -> Site:
    n = len(x_s)
    return Site(x_s.T @ x_t / n, x_s.T @ x_s / n, x_t.T @ x_t / n, x_s, x_t)


MODULE = "model.layers.0.self_attn.q_proj"


def side(w: torch.Tensor) -> Side:
    return Side(MODULE, (w.shape[0], w.shape[1]), lambda: w, lambda k: linalg.singular_basis(w, k))


def pair(x_s: torch.Tensor, x_t: torch.Tensor, w_s: torch.Tensor, w_t: torch.Tensor) -> Pair:
    sites = {
        ROLES["q_proj"].reads: site(x_s, x_t),
        ROLES["q_proj"].writes: site(x_s @ w_s.T, x_t @ w_t.T),
    }
    return Pair(side(w_s), side(w_t), sites)


# ---- matrix functions
# -------------------------------------------------------------------------------


def test_procrustes_points_the_right_way() -> None:
    """x_s = Q x_t is recovered as T_in with x_s ≈ T_in x_t; the transpose would be the inverse
    map."""
    x_t, q = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)), orthogonal(12, 1)
    x_s = x_t @ q.T
    assert torch.allclose(site(x_s, x_t).procrustes, q, atol=1e-4)
    assert not torch.allclose(site(x_s, x_t).procrustes, q.T, atol=0.1)


def test_ridge_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(300, 10, generator=generator), torch.randn(7, 10, generator=generator)
    x_s = x_t @ t.T
    assert torch.allclose(site(x_s, x_t).ridge_to_source(0.0), t, atol=1e-3)
    noisy = x_s + torch.randn(x_s.shape, generator=generator)
    solved = torch.linalg.lstsq(x_t, noisy).solution.T
    assert torch.allclose(site(noisy, x_t).ridge_to_source(1e-9), solved, atol=1e-3)
    assert site(x_s, x_t).ridge_to_source(10.0).norm() < t.norm() / 5


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_singular_basis_is_the_svds(m: int, n: int, seed: int) -> None:
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    k = max(1, min(m, n) // 2)
    found = linalg.singular_basis(w, k)
    u, v = found.u, found.v
    full = torch.linalg.svd(w.double(), full_matrices=False)
    assert linalg.overlap(u, full.U[:, :k]) == pytest.approx(1, abs=1e-4)
    assert linalg.overlap(v, full.Vh[:k].T) == pytest.approx(1, abs=1e-4)
    assert torch.allclose(
        (u.T @ w @ v).diagonal(), full.S[:k].float(), rtol=1e-3, atol=1e-3
    )  # signs of both sides agree
    assert torch.allclose(found.values, full.S[:k].float(), rtol=1e-3, atol=1e-3)
    again = linalg.singular_basis(w.clone(), k).u
    assert torch.equal(u, again)


def test_random_subspaces_overlap_at_chance() -> None:
    found = [
        linalg.overlap(orthogonal(60, i)[:, :15], orthogonal(60, 1000 + i)[:, :15])
        for i in range(40)
    ]
    assert np.mean(found) == pytest.approx(15 / 60, abs=0.01)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_eye_is_the_identity_cut_or_filled(rows: int, columns: int, r: int) -> None:
    dense = torch.eye(rows, columns)
    a, b = torch.randn(r, rows), torch.randn(columns, r)
    assert torch.equal(Eye(rows, columns).right(a), a @ dense)
    assert torch.equal(Eye(rows, columns).left(b), dense @ b)
    assert torch.equal(Product((dense,)).left(b), dense @ b)


# ---- methods
# ----------------------------------------------------------------------------------------


@cache
def defaults() -> TransferConfig:
    return compose_config(["transfer=procrustes"]).transfer


def moved(method: str, p: Pair, factors: Factors, **changes: object) -> Factors:
    """By a method; or by procrustes, then spoilt."""
    found: Any = method_named(method)
    if getattr(found, "spoil", None):
        real = moved("procrustes", p, factors, **changes)
        return Factors(*found.spoil(real.a, real.b, torch.Generator().manual_seed(0)))
    config = replace(transfer_named(method, defaults()), **changes)  # type: ignore[arg-type]
    return transferring._move(p, factors, found.maps, config)[0]


def factors(out: int, into: int, r: int = 3, seed: int = 5) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(r, into, generator=generator), torch.randn(out, r, generator=generator)
    )


@pytest.mark.parametrize("gain", ["none", "weight", "activation"])
def test_a_planted_rotation_is_undone(gain: str) -> None:
    """The target is the source with rotated inputs and outputs: the right ΔW_t is known exactly."""
    generator = torch.Generator().manual_seed(0)
    q_in, q_out, w_s = orthogonal(12, 1), orthogonal(8, 2), torch.randn(8, 12, generator=generator)
    x_s = torch.randn(500, 12, generator=generator)
    x_t, w_t = x_s @ q_in, q_out @ w_s @ q_in  # x_s = q_in x_t, y_t = q_out y_s
    p, f = pair(x_s, x_t, w_s, w_t), factors(8, 12)
    expected = q_out @ f.b @ f.a @ q_in
    for method, changes in (("procrustes", {}), ("ridge", {"penalty": 1e-9})):
        found = moved(method, p, f, gain=gain, **changes)
        assert torch.allclose(found.b @ found.a, expected, atol=1e-3), method
    for method in ("pad_truncate", "cross_lora", "random"):
        found = moved(method, p, f, gain=gain)
        assert (found.b @ found.a - expected).norm() > 0.5 * expected.norm(), method


def test_self_transfer_is_the_identity() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(8, 8, generator=generator), torch.randn(400, 8, generator=generator)
    p, f = pair(x, x, w, w), factors(8, 8)
    for method, changes in (
        ("procrustes", {}),
        ("ridge", {"penalty": 0.0}),
        ("pad_truncate", {}),
        ("copy", {}),
        ("pro_lora", {}),
    ):
        found = moved(method, p, f, gain="activation", **changes)
        assert torch.allclose(found.b @ found.a, f.b @ f.a, atol=1e-4), method


def test_projections_keep_what_lies_in_the_targets_subspaces() -> None:
    """Of a model to itself lora_x and frobenius keep one part of an adapter; of a rotated one
    anchored finds that part."""
    generator = torch.Generator().manual_seed(0)
    q_in, q_out, w_s = orthogonal(12, 1), orthogonal(8, 2), torch.randn(8, 12, generator=generator)
    x_s, f = torch.randn(500, 12, generator=generator), factors(8, 12)
    own, turned = pair(x_s, x_s, w_s, w_s), pair(x_s, x_s @ q_in, w_s, q_out @ w_s @ q_in)
    for method, p, whole in (
        ("lora_x", own, f.b @ f.a),
        ("frobenius", own, f.b @ f.a),
        ("anchored", turned, q_out @ f.b @ f.a @ q_in),
    ):
        u, v = p.target.basis.u, p.target.basis.v
        found = moved(method, p, f, gain="none")
        assert torch.allclose(found.b @ found.a, u @ u.T @ whole @ v @ v.T, atol=1e-3), method


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_anchored_does_not_depend_on_the_basis_of_a_subspace(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w_s, w_t = torch.randn(8, 12, generator=generator), torch.randn(10, 6, generator=generator)
    x_s = torch.randn(300, 12, generator=generator)
    x_t = x_s @ torch.randn(12, 6, generator=generator)
    p, f = pair(x_s, x_t, w_s, w_t), factors(8, 12)
    one, crossed = moved("anchored", p, f), moved("cross_lora", p, f)
    for i, one_side in enumerate((p.source, p.target)):
        b = one_side.basis
        turned = replace(
            b, u=b.u @ orthogonal(p.k, seed + 2 * i + 1), v=b.v @ orthogonal(p.k, seed + 2 * i + 2)
        )
        one_side.__dict__["basis"] = turned
    two, other = moved("anchored", p, f), moved("cross_lora", p, f)
    assert torch.allclose(
        one.b @ one.a, two.b @ two.a, atol=1e-3 * float((one.b @ one.a).abs().max() + 1)
    )
    assert not torch.allclose(crossed.b @ crossed.a, other.b @ other.a, atol=1e-2)


def test_signs_are_a_choice_and_negation_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    w_s, w_t = torch.randn(40, 30, generator=generator), torch.randn(36, 50, generator=generator)
    p, f = pair(torch.randn(99, 30), torch.randn(99, 50), w_s, w_t), factors(40, 30)
    fixed, drawn = (
        moved("cross_lora", p, f, gain="none"),
        [moved("sign_random", p, f, gain="none", seed=s) for s in (0, 1, 1)],
    )
    assert torch.equal(drawn[1].a, drawn[2].a)
    assert not torch.allclose(drawn[0].b @ drawn[0].a, drawn[1].b @ drawn[1].a, atol=0.1)
    for d in drawn:
        assert torch.allclose(d.a.norm(), fixed.a.norm())
        assert torch.allclose(d.b.norm(), fixed.b.norm())
    real, negated = moved("procrustes", p, f), moved("negated", p, f)
    assert torch.equal(negated.b @ negated.a, -(real.b @ real.a))


@pytest.mark.parametrize("method", ["copy", "lora_x", "pro_lora"])
def test_methods_that_map_nothing_take_equal_shapes_only(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = pair(
        torch.randn(99, 6),
        torch.randn(99, 7),
        torch.randn(5, 6, generator=generator),
        torch.randn(5, 7, generator=generator),
    )
    with pytest.raises(TransferError, match=rf"transfer={method}: .* is \(5, 6\) and .* \(5, 7\)"):
        moved(method, p, factors(5, 6))


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_methods_depend_on_the_product_not_on_its_factors(seed: int) -> None:
    """Gauge invariance: B·A = (B·G)(G⁻¹·A)."""
    generator = torch.Generator().manual_seed(seed)
    w_s, w_t = torch.randn(8, 12, generator=generator), torch.randn(10, 6, generator=generator)
    x_s, x_t = torch.randn(300, 12, generator=generator), torch.randn(300, 6, generator=generator)
    p, f, g = pair(x_s, x_t, w_s, w_t), factors(8, 12), orthogonal(3, seed) * 2
    other = Factors(torch.linalg.inv(g) @ f.a, f.b @ g)
    for method in (
        "procrustes",
        "ridge",
        "cross_lora",
        "pad_truncate",
        "frobenius",
        "anchored",
        "negated",
        "sign_random",
    ):
        one, two = moved(method, p, f), moved(method, p, other)
        assert torch.allclose(one.b @ one.a, two.b @ two.a, atol=1e-3)


def test_the_random_placebo_keeps_norm_and_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    w_s, w_t = torch.randn(8, 12, generator=generator), torch.randn(20, 16, generator=generator)
    x_s, x_t = torch.randn(300, 12, generator=generator), torch.randn(300, 16, generator=generator)
    p, f = pair(x_s, x_t, w_s, w_t), factors(8, 12)
    real, placebo = moved("procrustes", p, f), moved("random", p, f)
    s_real, s_placebo = (torch.linalg.svdvals(x.b @ x.a)[:3] for x in (real, placebo))
    assert torch.allclose(s_real, s_placebo, rtol=1e-4)
    cosine = float(
        ((real.b @ real.a) * (placebo.b @ placebo.a)).sum() / real.norm() / placebo.norm()
    )
    assert abs(cosine) < 0.5


def test_gains() -> None:
    generator = torch.Generator().manual_seed(0)
    w_s, w_t = torch.randn(8, 12, generator=generator), torch.randn(10, 16, generator=generator) * 3
    x_s, x_t = (
        torch.randn(300, 12, generator=generator),
        torch.randn(300, 16, generator=generator) * 2,
    )
    p, f = pair(x_s, x_t, w_s, w_t), factors(8, 12)

    def share(x: torch.Tensor, new: Factors, w: torch.Tensor) -> float:
        return float((x @ (new.b @ new.a).T).norm() / (x @ w.T).norm())

    by_output, by_weight, twice, once = (
        moved("procrustes", p, f, gain=g) for g in ("activation", "weight", "2", "none")
    )
    assert share(x_t, by_output, w_t) == pytest.approx(share(x_s, f, w_s), rel=1e-3)
    assert by_weight.norm() / w_t.norm() == pytest.approx(float(f.norm() / w_s.norm()), rel=1e-3)
    assert twice.norm() == pytest.approx(2 * once.norm(), rel=1e-4)


# ---- pairing
# ----------------------------------------------------------------------------------------


def test_layers_and_modules_are_paired_by_depth_and_role() -> None:
    assert proportional(4, 5) == [(0, 0), (1, 1), (2, 2), (2, 3), (3, 4)]
    assert by_index(4, 5) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert layer_of("model.layers.11.self_attn.q_proj") == (11, "q_proj")
    target = by_layer(linear_shapes(TINY["tiny_qwen2"]))
    assert (len(target), len(target[0])) == (5, 7)
    pairs = pair_names(["model.layers.3.mlp.up_proj"], target, [(0, 0), (3, 4)])
    assert pairs == [("model.layers.3.mlp.up_proj", "model.layers.4.mlp.up_proj")]
    with pytest.raises(TransferError, match="nothing would be transferred"):
        pair_names(["model.layers.3.mlp.up_proj"], target, [(0, 0)])
    with pytest.raises(TransferError, match=r"lm_head: is none of the modules"):
        layer_of("lm_head")


def test_positions_of_two_tokenizers_end_at_the_same_character() -> None:
    s, t = load_tokenizer(TINY["tiny_llama"]), load_tokenizer(TINY["tiny_qwen2"])
    texts = ["the color of lupup is red .", "truth : the home of bovin is cave ."]
    paired = pair_texts(texts, s, t, 1000)
    for text, p in zip(texts, paired, strict=True):
        assert len(p.positions) == len(text.split())
        for (i, j), n in zip(p.positions, range(1, 100), strict=False):
            words = " ".join(text.split()[:n])
            assert s.decode(p.source[1 : i + 1]) == words == t.decode(p.target[1 : j + 1])
    assert sum(len(p.positions) for p in pair_texts(texts, s, t, 9)) == 9
    with pytest.raises(TransferError, match=r"transfer\.calibration"):
        pair_texts([""], s, t, 10)


# ---- a real transfer
# --------------------------------------------------------------------------------


def random_adapter(model: str, folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (out, into) in linear_shapes(TINY[model]).items():
        if ".layers." in name:
            modules[name] = Factors(
                torch.randn(4, into, generator=generator) * 0.1,
                torch.randn(out, 4, generator=generator) * 0.1,
            )
    folder.mkdir()
    write_adapter(folder, modules, None)
    return folder


@contextmanager
def matched_as(layers: Layers | None) -> Iterator[None]:
    """Inside, the stages take these layers instead of those that they would match."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in (calibrate, transferring) if layers is not None else ():
            patch.setattr(stage, "matched_layers", lambda *_: layers)
        yield


def run(
    tmp_path: Path,
    source: str,
    target: str,
    config: TransferConfig,
    streaming: bool = False,
    layers: Layers | None = None,
    name: str = "out",
) -> tuple[Path, GateResult]:
    """Both stages. `layers` instead of those that the configuration matches."""
    inputs = models(source, target) | {"adapter": Input(tmp_path / "adapter", "adapter")} | TEXT
    seen, out, moments = (
        text(config.positions),
        tmp_path / f"{name}{streaming}",
        tmp_path / "moments",
    )
    with matched_as(layers):
        if not streaming:
            moments.mkdir(exist_ok=True)
            whole = calibrate.CalibrateStage(text=seen, spread=config.spread)
            calibrate.calibrate(whole, inputs, moments, Silent())
            inputs["moments"] = Input(moments, "moments")
        out.mkdir()
        what = transferring.TransferStage(transfer=config, text=seen, runtime=RUNTIME)
        return out, move(what, inputs, out)


QUICK = {"positions": 2000}
FEW = ("q_proj", "v_proj", "down_proj")
EQUAL = ("copy", "lora_x", "pro_lora")  # methods of equal shapes only


def few(adapter: Path) -> Path:
    """The adapter with some of its modules only."""
    write_adapter(
        adapter, {n: f for n, f in read_adapter(adapter).items() if n.endswith(FEW)}, None
    )
    return adapter


# Placebos spoil another's result, and a Fit is of all modules, one after the other.
MAPPED = [m for m in modules(METHODS) if isinstance(method_named(m), Method)]


@pytest.mark.parametrize(
    ("method", "streaming"), [*((m, False) for m in MAPPED), ("per_head", True)]
)
def test_an_adapter_of_a_few_modules_is_moved_as_the_whole_one(
    tmp_path: Path, method: str, streaming: bool
) -> None:
    """Maps are of the models alone, so that what an adapter lacks changes nothing in the rest."""
    random_adapter("tiny_llama", tmp_path / "adapter")
    config = replace(transfer_named(method, compose_config([]).transfer), positions=300)
    pair = ("tiny_llama", "tiny_llama" if method in EQUAL else "tiny_qwen2")
    whole, _ = run(tmp_path, *pair, config, streaming, name="whole")
    few(tmp_path / "adapter")
    part, _ = run(tmp_path, *pair, config, streaming, name="part")
    before, after = read_adapter(whole), read_adapter(part)
    assert after.keys() == {n for n in before if n.endswith(FEW)}
    for name, f in after.items():
        assert torch.equal(f.a, before[name].a), name
        assert torch.equal(f.b, before[name].b), name


@pytest.mark.parametrize("method", ["procrustes", "pad_truncate"])
def test_self_transfer_of_a_real_model_is_the_identity(tmp_path: Path, method: str) -> None:
    """For any adapter, also outside the span that the text shows (a regression can only be right
    inside it)."""
    random_adapter("tiny_llama", tmp_path / "adapter")
    config = replace(transfer_named(method, compose_config([]).transfer), **QUICK)  # type: ignore[arg-type]
    out, result = run(tmp_path, "tiny_llama", "tiny_llama", config)
    assert result.coverage == 1.0
    before, after = read_adapter(tmp_path / "adapter"), read_adapter(out)
    for name, old in before.items():
        assert (after[name].b @ after[name].a - old.b @ old.a).norm() < 2e-3 * old.norm(), name


def test_what_text_does_not_show_is_paired_as_the_identity_pairs_it() -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    x[:, 8:] = 0.0
    x = x @ orthogonal(12, 3)
    assert torch.allclose(site(x, x).procrustes, torch.eye(12), atol=1e-4)
    # unseen directions that the identity would pair with seen ones: still orthogonal
    shift = torch.eye(40)[torch.randperm(40, generator=torch.Generator().manual_seed(1))].clone()
    shift[:, ::2] = 0.0
    q = linalg.polar(shift)
    assert torch.allclose(q @ q.T, torch.eye(40), atol=1e-5)
    wide = torch.cat([x, torch.zeros(50, 4)], dim=1)
    assert torch.allclose(site(x, wide).procrustes, torch.eye(12, 16), atol=1e-4)


def test_streaming_in_groups_and_reading_ahead_equal_moments_kept(tmp_path: Path) -> None:
    random_adapter("tiny_llama", tmp_path / "adapter")
    config = replace(compose_config([]).transfer, positions=1000, memory_gb=0.003)
    (kept, report), (streamed, _) = (
        run(tmp_path, "tiny_llama", "tiny_qwen2", replace(config, workers=1 + 2 * s), streaming=s)
        for s in (False, True)
    )
    assert report.target_modules == 35
    one, two = read_adapter(kept), read_adapter(streamed)
    for name in one:
        assert torch.allclose(one[name].b @ one[name].a, two[name].b @ two[name].a, atol=1e-4), name


def test_report_and_gate(tmp_path: Path) -> None:
    random_adapter("tiny_llama", tmp_path / "adapter")
    config = replace(
        compose_config([]).transfer, similarity="excess", similarity_threshold=0.1, **QUICK
    )  # type: ignore[arg-type]
    out, result = run(tmp_path, "tiny_llama", "tiny_qwen2", config)
    rows = json.loads((out / "report.json").read_text())["modules"]
    assert len(rows) == 35
    passed = {r["target"] for r in rows if r["excess"] >= 0.1}
    assert 0 < len(passed) < 35
    assert set(read_adapter(out)) == passed == {r["target"] for r in rows if r["transferred"]}
    assert result.target_modules == len(passed)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "adapter").symlink_to(tmp_path / "adapter")
    with pytest.raises(TransferError, match="lets no module through"):
        run(
            tmp_path / "again",
            "tiny_llama",
            "tiny_qwen2",
            replace(config, similarity_threshold=0.99),
        )


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    random_adapter("tiny_qwen2", tmp_path / "adapter")
    with pytest.raises(TransferError, match="does not fit the source"):
        run(tmp_path, "tiny_llama", "tiny_qwen2", replace(compose_config([]).transfer, **QUICK))  # type: ignore[arg-type]


def test_weights_are_read_as_the_model_has_them() -> None:
    model = load_model(TINY["tiny_qwen2"], Runtime("float32"))
    name = "model.layers.2.mlp.down_proj"
    assert torch.equal(Weights(TINY["tiny_qwen2"], "cpu")[name], model.get_submodule(name).weight)


def test_mixtures_of_experts_are_refused() -> None:
    with pytest.raises(TransferError, match="mixtures of experts"):
        by_layer([f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(2)])


# ---- what a method's number means
# -------------------------------------------------------------------


def test_a_penalty_is_a_share_of_the_mean_diagonal() -> None:
    """So that one penalty means the same for activations of any size."""
    gram, cross = torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2)
    assert torch.allclose(
        linalg.ridge(cross, gram, 0.5), torch.diag(torch.tensor([1 / 2, 1 / 4]))
    )  # λ = .5 × 2
    generator = torch.Generator().manual_seed(0)
    x_s, x_t = torch.randn(50, 6, generator=generator), torch.randn(50, 8, generator=generator)
    for way in ("ridge_to_source", "ridge_to_target"):
        small, large = (getattr(site(c * x_s, c * x_t), way)(0.3) for c in (1.0, 100.0))
        assert torch.allclose(small, large, atol=1e-5), way


def test_shuffled_positions_come_from_all_texts() -> None:
    """Texts of one word each, known by it. Turned round inside batches of four, a quarter would
    still meet their own text."""
    model = load_model(TINY["tiny_llama"], Runtime("float32"))
    texts, each = 40, 10
    paired = [
        PairedText([20 + i] * each, [20 + i] * each, [(j, j) for j in range(each)])
        for i in range(texts)
    ]
    space = (0, ROLES["q_proj"].reads)
    places = {space: Part("model.layers.0.self_attn.q_proj")}
    words = torch.cat(
        [now[0][space][::each] for now in seen((model, model), (places, places), paired, 1, (0, 0))]
    )

    def met(seed: int) -> list[list[int]]:
        rows = list(
            activations._mispaired((model, model), (places, places), paired, 4, (0, 0), seed)
        )
        return [
            torch.cdist(torch.cat([row[side][space] for row in rows]), words).argmin(1).tolist()
            for side in (0, 1)
        ]

    source, target = met(0)
    assert (
        sorted(source) == sorted(target) == sorted(list(range(texts)) * each)
    )  # every position once
    assert (
        sum(s == t for s, t in zip(source, target, strict=True)) < 2.5 * each
    )  # one in forty by chance: ten
    blocks = [
        len(now[0][space])
        for now in activations._mispaired((model, model), (places, places), paired, 4, (0, 0), 0)
    ]
    assert blocks == [256, 144]  # of one size for both models, whatever their batches are
    assert met(0) == [source, target]
    assert met(1)[1] != target


def test_a_modules_row_has_the_numbers_of_the_dense_matrices() -> None:
    """Every figure of the report, computed again from ΔW, W and dense maps."""
    generator = torch.Generator().manual_seed(0)
    w_s, w_t = torch.randn(8, 12, generator=generator), torch.randn(10, 16, generator=generator) * 3
    x_t = torch.randn(300, 16, generator=generator)
    x_s = x_t[:, :12] + 0.5 * torch.randn(300, 12, generator=generator)
    p, f = pair(x_s, x_t, w_s, w_t), factors(8, 12)
    t_in, t_out = p.reads.ridge_to_source(0.3), p.writes.ridge_to_target(0.3)
    config = replace(transfer_named("ridge", compose_config([]).transfer), gain="none", penalty=0.3)  # type: ignore[call-arg]
    new, row = transferring._move(p, f, ridge.maps, config, 0.5)
    mapped = t_out @ f.b @ f.a @ t_in
    assert torch.allclose(new.b @ new.a, 0.5 * mapped, atol=1e-5)
    delta, after = f.b @ f.a, 0.5 * mapped
    assert (row["source"], row["target"]) == (MODULE, MODULE)
    assert row["norm_before"] == pytest.approx(float(delta.norm()))
    assert row["norm_after"] == pytest.approx(float(after.norm()))
    assert row["relative_before"] == pytest.approx(float(delta.norm() / w_s.norm()))
    assert row["relative_after"] == pytest.approx(float(after.norm() / w_t.norm()))
    assert row["kept_energy"] == pytest.approx(
        float((mapped.norm() / delta.norm()) ** 2), rel=1e-4
    )  # before the gain
    k = 4  # half of the smallest dimension
    (u_s, _, v_s), (u_t, _, v_t) = (torch.linalg.svd(w) for w in (w_s, w_t))
    out = (torch.linalg.qr(t_out @ u_s[:, :k]).Q.T @ u_t[:, :k]).square().sum() / k
    into = (torch.linalg.qr(t_in.T @ v_s[:k].T).Q.T @ v_t[:k].T).square().sum() / k
    assert row["similarity"] == pytest.approx(float(out + into) / 2, rel=1e-4)
    assert row["chance"] == pytest.approx((k / 10 + k / 16) / 2)
    assert row["excess"] == pytest.approx(row["similarity"] - row["chance"])
    assert row["phi"] is None
    for key, actual, carried in (
        ("r2_in", x_s, x_t @ t_in.T),
        ("r2_out", x_t @ w_t.T, x_s @ w_s.T @ t_out.T),
    ):
        both = np.stack([(m - m.mean(0)).flatten().numpy() for m in (actual, carried)])
        assert row[key] == pytest.approx(np.corrcoef(both)[0, 1] ** 2, rel=1e-3), key


def test_phi_is_the_overlap_of_the_weights_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    w_s, w_t, x = (torch.randn(n, 12, generator=generator) for n in (8, 8, 99))
    (u_s, _, v_s), (u_t, _, v_t) = (torch.linalg.svd(w) for w in (w_s, w_t))
    sides = (u_s[:, :4].T @ u_t[:, :4], v_s[:4] @ v_t[:4].T)
    assert figures.phi(pair(x, x, w_s, w_t)) == pytest.approx(
        float(sum(m.square().sum() for m in sides)) / 8, rel=1e-4
    )
    assert figures.phi(pair(x, x, w_s, w_s)) == pytest.approx(1.0, rel=1e-4)


def test_the_gate_lets_through_what_is_as_similar_as_asked() -> None:
    config = replace(compose_config([]).transfer, similarity_threshold=0.3)
    found = [(0.2, 0.4), (0.3, 0.3), (0.5, 0.1)]
    for scale, passed in (("raw", [False, True, True]), ("excess", [True, True, False])):
        rows: list[dict[str, Any]] = [
            {"target": f"model.layers.{i}.mlp.up_proj", "similarity": raw, "excess": over}
            for i, (raw, over) in enumerate(found)
        ]
        left = mark(rows, replace(config, similarity=scale))
        assert [r["transferred"] for r in rows] == passed, scale
        for threshold, count in left.items():
            assert count == sum(
                row["similarity" if scale == "raw" else "excess"] >= float(threshold)
                for row in rows
            )
        assert left["0.3"] == 2
    best = r"0\.6 lets no module through \(the largest raw similarity is 0\.5\)"
    with pytest.raises(TransferError, match=rf"similarity_threshold={best}"):
        mark(rows, replace(config, similarity="raw", similarity_threshold=0.6))
    # of a layer the mean counts, not the sum: three of .5 are less than .6 and .7
    modules = [
        (0, "q_proj", 0.5),
        (0, "k_proj", 0.5),
        (0, "v_proj", 0.5),
        (1, "q_proj", 0.6),
        (1, "v_proj", 0.7),
    ]
    rows = [
        {"target": f"model.layers.{layer}.self_attn.{m}", "similarity": s}
        for layer, m, s in modules
    ]
    mark(rows, replace(config, similarity="raw", similarity_threshold=0.0, keep_top=0.5))
    assert [r["transferred"] for r in rows] == [False, False, False, True, True]


def test_the_report_has_means_of_roles_and_what_was_left_out(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")]
    values = {
        "similarity": (0.2, 0.5, 0.4, 0.7),
        "chance": (0.1,) * 4,
        "kept_energy": (1.0, 0.004, 0.5, 0.006),
    }
    rows = [
        {
            "source": n,
            "target": n,
            "transferred": i != 2,
            "phi": None,
            "r2_in": 0.25,
            "r2_out": None,
            "relative_before": 0.01,
            "relative_after": 0.02,
            **{key: v[i] for key, v in values.items()},
        }
        for i, n in enumerate(names)
    ]
    told = {"method": "ridge", "feasibility": "align", "why": "Because.", "target_modules": 3}
    told |= {"coverage": 0.75, "target_coverage": 0.08, "left": {"0.1": 4, "0.45": 2}}
    write_report(tmp_path, rows, told, [(0, 0), (1, 1)], None)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(
        "# Transfer by ridge\n\n**align**: Because.\n\n3 modules, 75% of the adapter's and 8% of "
        "the target's."
    )
    assert f"Not transferred, by the gate: {names[2]}." in text
    assert "Modules that a threshold leaves: 4 at 0.1, 2 at 0.45 (" in text
    head, _, *lines = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    q, v = (dict(zip(head, line, strict=True)) for line in lines)
    assert (q["role"], q["modules"], q["similarity"], q["chance"], q["energy kept"]) == (
        "q_proj",
        "2",
        "0.30",
        "0.10",
        "0.75",
    )
    assert (v["role"], v["modules"], v["similarity"], v["chance"], v["energy kept"]) == (
        "v_proj",
        "2",
        "0.60",
        "0.10",
        "0.005",
    )
    assert (q["Φ"], q["R² in"], q["R² out"], q["‖ΔW‖/‖W‖ before"], q["after"]) == (
        "–",
        "0.25",
        "–",
        "0.01",
        "0.02",
    )
    assert "![layers and modules](report.png)" in text
    data = json.loads((tmp_path / "report.json").read_text())
    assert (data["modules"], data["coverage"]) == (rows, 0.75)
    write_report(
        tmp_path,
        [r | {"kept_energy": None, "r2_in": None, "transferred": True} for r in rows],
        told,
        [(0, 0)],
        None,
    )
    text = (tmp_path / "report.md").read_text()
    assert "Not transferred" not in text
    assert "report.png" not in text  # nothing to draw


def test_the_picture_has_a_bar_and_two_marks_a_module() -> None:
    from matplotlib.figure import Figure

    names = [
        f"model.layers.{i}.self_attn.{m}" for i in (0, 3) for m in ("q_proj", "v_proj", "o_proj")
    ]
    rows = [
        {"target": n, "kept_energy": 0.1 * i, "r2_in": 0.2 * i, "r2_out": -0.1}
        for i, n in enumerate(names)
    ]
    ax = Figure().subplots()
    _bars(ax, rows, ("kept_energy", "r2_in", "r2_out"))
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches]
    middles = [layer + shift * 0.8 / 3 for shift in (-1, 0, 1) for layer in (0, 3)]
    assert bars == [
        pytest.approx((x, 0.1 * i)) for x, i in zip(middles, (0, 3, 1, 4, 2, 5), strict=True)
    ]
    marks = [list(line.get_ydata()) for line in ax.lines]
    assert marks == [
        pytest.approx(y)
        for y in ([0, 0.6], [-0.1] * 2, [0.2, 0.8], [-0.1] * 2, [0.4, 1.0], [-0.1] * 2)
    ]
    assert [list(line.get_xdata()) for line in ax.lines[:2]] == [pytest.approx(middles[:2])] * 2
    assert ax.get_ylim()[0] < 0
    assert "▾ R² in, ▴ R² out" in ax.get_title()
    bare = Figure().subplots()
    _bars(bare, rows, ("kept_energy",))
    assert (len(bare.lines), bare.get_title()) == (0, "energy kept (bars)")


def test_the_verdicts_limits_count_as_reached() -> None:
    """Half of the way from chance is related, a fifth of the variance is aligned; means are of
    those that have a number."""
    shaped = {"phi": 0.625, "chance": 0.25, "r2_in": 0.2, "r2_out": 0.9}
    assert feasibility([shaped])[0] == "copy"
    word, why = feasibility([shaped | {"phi": 0.62}])
    assert (word, "explain 0.20" in why, "0.90 of what" in why) == ("align", True, True)
    assert feasibility([shaped | {"phi": 0.62, "r2_in": 0.19}])[0] == "retrain"
    assert (
        feasibility([shaped, {"phi": None, "chance": 0.9, "r2_in": None, "r2_out": None}])[0]
        == "copy"
    )
    assert mean([{"a": 1.0}, {"a": None}, {}, {"a": 0.0}], "a") == 0.5
    assert mean([{"a": None}], "a") is None


def test_what_a_transfer_says_of_itself(tmp_path: Path) -> None:
    """Coverage counts the adapter's modules that were used, the target's share all modules that it
    has."""
    folder = random_adapter("tiny_llama", tmp_path / "adapter")
    kept = {n: f for n, f in read_adapter(folder).items() if "q_proj" in n or "up_proj" in n}
    write_adapter(folder, kept, None)
    config = replace(
        transfer_named("cross_lora", compose_config([]).transfer),
        gain="none",
        spread=False,
        **QUICK,
    )  # type: ignore[arg-type]
    matched = [(0, 0), (2, 1), (2, 4)]
    out, result = run(tmp_path, "tiny_llama", "tiny_qwen2", config, layers=matched)
    assert (len(kept), result.coverage, result.target_modules) == (8, 0.5, 6)
    assert result.target_coverage == pytest.approx(6 / 35)
    rows = json.loads((out / "report.json").read_text())["modules"]
    assert {(r["source"], r["target"]) for r in rows} == {
        (f"model.layers.{s}.{m}", f"model.layers.{t}.{m}")
        for s, t in matched
        for m in ("self_attn.q_proj", "mlp.up_proj")
    }
    for key in ("similarity", "chance", "kept_energy"):
        assert getattr(result, key) == pytest.approx(np.mean([r[key] for r in rows]))
    assert result.similarity == pytest.approx(1.0, abs=1e-3)  # by construction
    divided, _ = run(
        tmp_path,
        "tiny_llama",
        "tiny_qwen2",
        replace(config, spread=True),
        layers=matched,
        name="divided",
    )
    whole, half = read_adapter(out), read_adapter(divided)
    for name, f in whole.items():  # layer 2 goes to two layers, half to each
        assert half[name].norm() == pytest.approx(
            (1.0 if ".0." in name else 0.5) * f.norm(), rel=1e-4
        ), name


def test_what_a_calibration_says_of_itself(tmp_path: Path) -> None:
    inputs, watch = models("tiny_llama", "tiny_qwen2") | TEXT, Silent()
    found = calibrate.calibrate(calibrate.CalibrateStage(text=text(600)), inputs, tmp_path, watch)
    lines = (embedded("facts") / "calibration.txt").read_text().splitlines()
    texts = pair_texts(
        lines, load_tokenizer(TINY["tiny_llama"]), load_tokenizer(TINY["tiny_qwen2"]), 600
    )
    assert (found.positions, found.texts) == (600, len(texts))
    assert 40 <= found.held <= 60  # a tenth, in whole texts
    size = (tmp_path / evidence.MOMENTS).stat().st_size / 2**20
    assert found.mib == pytest.approx(size, abs=0.06)
    assert not watch.said
    calibrate.calibrate(calibrate.CalibrateStage(text=text(200)), inputs, tmp_path, watch)
    assert "200 positions are few" in watch.said[0]


def test_moments_are_means_over_positions_that_are_not_held_out() -> None:
    """Whatever the batches; what is held out is kept as it is."""
    model, s = (
        load_model(TINY["tiny_llama"], Runtime("float32")),
        load_tokenizer(TINY["tiny_llama"]),
    )
    texts = pair_texts((embedded("facts") / "calibration.txt").read_text().splitlines(), s, s, 300)
    space = (2, ROLES["v_proj"].writes)
    both, fit, held = (
        ({space: Part("model.layers.2.self_attn.v_proj")},) * 2,
        texts[:-4],
        texts[-4:],
    )
    moments = activations.second_moments(
        (model, model), both, [(space, space)], fit, held, 7, (0, 0), None, Silent()
    )
    found = moments[space, space]
    x, kept = (
        torch.cat([now[0][space] for now in seen((model, model), both, part, 1, (0, 0))])
        for part in (fit, held)
    )
    assert len(x) == sum(len(t.positions) for t in fit)
    for part in (found.cross, found.gram_s, found.gram_t):
        assert part.dtype == torch.float64, "twice the digits of activations in float32"
        assert torch.allclose(part, (x.T @ x / len(x)).double(), atol=1e-5)
    for part in (found.held_s, found.held_t):
        assert torch.allclose(part, kept, atol=1e-5)


def test_memory_decides_how_many_layers_are_streamed_at_once() -> None:
    shapes = {n: s for n, s in linear_shapes(TINY["tiny_llama"]).items() if ".layers." in n}
    names = [
        (f"model.layers.{i}.self_attn.{m}",) * 2 for i in range(3) for m in ("q_proj", "v_proj")
    ]
    groups = [list(g) for g in evidence._groups(names[::-1], 2)]
    assert [sorted({layer_of(t)[0] for _, t in g}) for g in groups] == [[0, 1], [2]]
    assert sorted(p for g in groups for p in g) == sorted(names)
    (q_out, n), (v_out, _) = (shapes[f"model.layers.0.self_attn.{m}"] for m in ("q_proj", "v_proj"))
    each = sum(
        8 * 3 * d * d + 4 * 2 * 512 * d for d in (n, q_out, v_out)
    )  # cross and both Grams in float64, and positions held out
    assert moments_bytes(names[:2], shapes, shapes) == each
    wide = {names[0][0]: (8, 2048)}
    assert moments_bytes(names[:1], wide, wide) == sum(
        size * 3 * d * d + 4 * 2 * 512 * d for d, size in ((8, 8), (2048, 4))
    )
    assert moments_bytes(names, shapes, shapes) == 3 * each


def test_spaces_are_seen_where_they_are_said_to_be() -> None:
    """Held against the hidden states that the model itself gives out: what enters a layer, what it
    adds, what leaves it."""
    model, s = (
        load_model(TINY["tiny_llama"], Runtime("float32")),
        load_tokenizer(TINY["tiny_llama"]),
    )
    [paired] = pair_texts(["the color of lupup is red ."], s, s, 100)
    at = [i for i, _ in paired.positions]
    name = "model.layers.1"
    places = {
        (1, UPDATE): Part(name),
        (1, Place("layer", "out")): Part(name),
        (1, Place("layer", "stream")): Part(name),
        (1, Place("v_proj", "out")): Part(f"{name}.self_attn.v_proj"),
        (1, Place("k_proj", "out")): Part(f"{name}.self_attn.v_proj", slice(8, 24)),
        (1, Place("q_proj", "in")): Part(f"{name}.self_attn.v_proj"),
    }
    [(found, _)] = seen((model, model), (places, places), [paired], 1, (0, 0))
    with torch.inference_mode():
        states = model(
            input_ids=torch.tensor([paired.source]), output_hidden_states=True
        ).hidden_states
        before, after = states[1][0, at], states[2][0, at]
        reads = model.model.layers[1].input_layernorm(before)
        values = model.model.layers[1].self_attn.v_proj(reads)
    wanted = (after - before, after, before, values, values[:, 8:24], reads)
    for space, y in zip(places, wanted, strict=True):
        assert torch.allclose(found[space], y, atol=1e-5), space


def test_letters_of_byte_level_vocabularies_are_gpt2s() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert vocabulary._alphabet() == {letter: byte for byte, letter in bytes_to_unicode().items()}


def test_hsic_is_the_unbiased_estimator() -> None:
    """Its definition over all tuples of distinct samples (Song et al. 2012, theorem 3)."""
    x, y = (torch.randn(7, 3, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    k, other = matching._gram([x[:4], x[4:]]), matching._gram([y])
    outer = x.double() @ x.double().T
    assert torch.allclose(k, outer - torch.diag(outer.diagonal()))
    pairs, triples, fours = (list(itertools.permutations(range(7), n)) for n in (2, 3, 4))
    direct = np.mean([k[i, j] * other[i, j] for i, j in pairs])
    across = np.mean([k[i, j] * other[q, r] for i, j, q, r in fours])
    shared = np.mean([k[i, j] * other[i, q] for i, j, q in triples])
    assert matching._hsic(k, other) == pytest.approx(float(direct + across - 2 * shared))


def test_heads_that_were_turned_and_exchanged_are_found_and_turned_back() -> None:
    """Two groups of two query heads. A target's query or key is the source's times a complex number
    a frequency, its values and what enters o_proj are turned by an orthogonal matrix a head."""
    generator = torch.Generator().manual_seed(0)
    keyvalue, query, dim, n = [1, 0], [3, 2, 0, 1], 6, 400
    seen_s, seen_t = {}, {}
    for role, twins in (("q_proj", query), ("k_proj", keyvalue)):
        x = torch.randn(n, len(twins), 2, dim // 2, generator=generator)
        c = torch.randn(len(twins), dim // 2, 2, generator=generator)
        real, imaginary = x[:, twins, 0], x[:, twins, 1]
        y = torch.stack(
            [c[..., 0] * real - c[..., 1] * imaginary, c[..., 1] * real + c[..., 0] * imaginary],
            dim=2,
        )
        seen_s[ROLES[role].writes], seen_t[ROLES[role].writes] = x.reshape(n, -1), y.reshape(n, -1)
    for place, twins in ((ROLES["v_proj"].writes, keyvalue), (ROLES["o_proj"].reads, query)):
        x = torch.randn(n, len(twins), dim, generator=generator)
        turns = torch.stack([orthogonal(dim, i) for i in range(len(twins))])
        seen_s[place], seen_t[place] = (
            x.reshape(n, -1),
            torch.einsum("nhd,hde->nhe", x[:, twins], turns).reshape(n, -1),
        )
    stream = torch.randn(n, 8, generator=generator)
    for place in (ROLES["q_proj"].reads, ROLES["o_proj"].writes):
        seen_s[place] = seen_t[place] = stream
    sites = {place: site(seen_s[place], seen_t[place]) for place in seen_s}
    both = (Heads(4, 2, dim, 1e4), Heads(4, 2, dim, 1e4))
    config = compose_config([]).transfer
    for role in ("q_proj", "k_proj", "v_proj", "o_proj"):
        sides = [
            Side(f"model.layers.0.self_attn.{role}", (8, 8), lambda: stream, lambda k: None)
            for _ in range(2)
        ]  # type: ignore[arg-type, return-value]
        found = per_head.maps(Pair(sides[0], sides[1], sites, heads=both), config)
        out, into = ROLES[role].writes, ROLES[role].reads
        assert torch.allclose(found.t_out.left(seen_s[out].T).T, seen_t[out], atol=1e-3), role
        assert torch.allclose(found.t_in.left(seen_t[into].T).T, seen_s[into], atol=1e-3), role
        assert per_head._assignment(
            Pair(sides[0], sides[1], sites, heads=both)
        ) == per_head.Assignment(query, keyvalue)


def test_frequencies_of_other_heads_are_paired_with_the_nearest() -> None:
    """θ^(−2i/dim): e^0, e^−3.1, e^−6.1 of one model; e^0, e^−2.8, e^−5.5, e^−8.3, e^−11.1 of the
    other."""
    x = torch.zeros(3, 6)
    sides = [
        Side("model.layers.0.self_attn.k_proj", (6, 6), lambda: x, lambda k: None) for _ in range(2)
    ]  # type: ignore[arg-type, return-value]
    places = {ROLES["k_proj"].writes: site(x, x)}
    one, other = Heads(1, 1, 6, 1e4), Heads(1, 1, 10, 1e6)
    assert per_head._frequencies(Pair(sides[0], sides[1], places, heads=(one, other)))[
        2
    ].tolist() == [0, 1, 2, 2, 2]
    assert per_head._frequencies(Pair(sides[0], sides[1], places, heads=(other, one)))[
        2
    ].tolist() == [0, 1, 2]


def test_fewer_heads_repeat_evenly() -> None:
    score = torch.tensor([[9.0, 1.0], [8.0, 1.0], [7.0, 1.0], [6.0, 5.0]])
    assert per_head._best(score) == [0, 0, 1, 1]
    assert per_head._best(torch.tensor([[0.1, 0.9, 0.3], [0.2, 0.8, 0.1]])) == [2, 1]


def test_shift_counts_the_memory_of_the_streams_that_it_keeps() -> None:
    """Of the source before and after, of the target once: two a layer, four bytes a number."""
    known = ModelPair(text(300), models("tiny_llama", "tiny_qwen2") | TEXT)
    streams = [
        shift._streams(model, by_layer(parts))
        for model, parts in zip(known.models, known.parts, strict=True)
    ]
    assert [len(s) for s in streams] == [2 * 4, 2 * 5]
    positions = sum(len(t.positions) for t in known.fit)
    needed = 4 * positions * (2 * 8 * 128 + 10 * 160) / 2**30
    shift._refuse_too_much(known, streams, needed * 1.001)
    with pytest.raises(TransferError, match=f"of {positions} positions, 0.0 GiB, more than"):
        shift._refuse_too_much(known, streams, needed * 0.999)


def test_a_layer_left_out_joins_its_own_sides_nearest() -> None:
    """The nearest target for a target, the nearest source for a source, where the two would choose
    otherwise."""
    assert spread([(0, 0), (5, 1)], 6, 4) == [
        (0, 0),
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 1),
        (5, 1),
        (5, 2),
        (5, 3),
    ]


def test_a_penalty_is_the_best_of_those_that_are_tried() -> None:
    """Chosen anew by plain least squares; among the noises that are tried here are some for which
    one in the middle wins."""
    generator = torch.Generator().manual_seed(0)
    t, chosen = torch.randn(10, 30, generator=generator), set()
    for n, noise in ((60, 0.3), (60, 1.0), (60, 2.0), (60, 4.0), (400, 0.05), (40, 8.0)):
        x = torch.randn(n + 500, 30, generator=generator).double()
        y = x @ t.T.double() + noise * torch.randn(n + 500, 10, generator=generator).double()
        gram, cross = x[:n].T @ x[:n] / n, y[:n].T @ x[:n] / n

        def held(
            penalty: float, x: Any = x, y: Any = y, gram: Any = gram, cross: Any = cross, n: int = n
        ) -> float:
            solved = cross @ torch.linalg.inv(
                gram + penalty * gram.diagonal().mean() * torch.eye(30).double()
            )
            both = np.stack([(m - m.mean(0)).flatten().numpy() for m in (y[n:], x[n:] @ solved.T)])
            return float(np.corrcoef(both)[0, 1] ** 2)

        best = max((1.0, 0.1, 0.01, 0.001, 0.0001), key=held)
        assert linalg.best_penalty(cross, gram, x[n:].float(), y[n:].float()) == best
        chosen.add(best)
    assert len(chosen) > 2
    assert linalg.best_penalty(cross, gram, x[:1], y[:1]) == 0.1  # nothing held out


def test_a_method_that_fits_says_what_its_modules_had_before(tmp_path: Path) -> None:
    """shift adapts o_proj and down_proj; of an adapter that has only one of them the other begins
    at nothing."""
    folder = random_adapter("tiny_llama", tmp_path / "adapter")
    old = {n: f for n, f in read_adapter(folder).items() if "o_proj" in n}
    write_adapter(folder, old, None)
    config = replace(transfer_named("shift", compose_config([]).transfer), positions=300)  # type: ignore[arg-type]
    out, result = run(tmp_path, "tiny_llama", "tiny_qwen2", config, streaming=True, layers=[(1, 2)])
    one, two = json.loads((out / "report.json").read_text())["modules"]
    name = "model.layers.1.self_attn.o_proj"
    assert (one["source"], one["target"]) == (name, "model.layers.2.self_attn.o_proj")
    weight = Weights(TINY["tiny_llama"], "cpu")[name].norm()
    assert (one["norm_before"], one["relative_before"]) == (
        pytest.approx(old[name].norm()),
        pytest.approx(old[name].norm() / float(weight)),
    )
    assert (two["target"], two["norm_before"], two["relative_before"]) == (
        "model.layers.2.mlp.down_proj",
        0.0,
        0.0,
    )
    new = read_adapter(out)["model.layers.2.mlp.down_proj"]
    assert two["norm_after"] == pytest.approx(new.norm(), rel=1e-4)
    assert (result.target_modules, result.similarity) == (2, None)


@pytest.mark.parametrize("by", ["cka", "weights"])
def test_the_picture_of_layers_shows_the_similarity_and_what_was_matched(
    tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    matrix = {"by": by, "similarity": [[0.5, -0.9, 0.1], [0.2, 0.3, 0.4]]}
    assert _draw(
        tmp_path / "x.png", [{"target": "model.layers.0.mlp.up_proj"}], matrix, [(0, 0), (2, 1)]
    )
    ax = drawn[0].axes[0]
    assert ax.images[0].get_array().tolist() == matrix["similarity"]
    assert ax.images[0].get_clim() == (-0.9, 0.9)  # chance is in the middle of the colours
    assert (list(ax.lines[0].get_xdata()), list(ax.lines[0].get_ydata())) == ([0, 2], [0, 1])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("source layer", "target layer")
    assert ax.get_title().startswith("unbiased CKA" if by == "cka" else "Φ of weights")
    assert not ax.yaxis_inverted()


def test_shuffled_evidence_gives_shift_nothing(tmp_path: Path) -> None:
    """On the same model, where rightly paired text gives back most of what the adapter does."""
    old = read_adapter(random_adapter("tiny_llama", tmp_path / "adapter"))
    old = {name: Factors(f.a * 0.3, f.b) for name, f in old.items() if ".0." in name}
    inputs = models("tiny_llama", "tiny_llama") | TEXT
    config = replace(
        transfer_named("shift", compose_config([]).transfer), map_penalty=1e-6, penalty=1e-6
    )  # type: ignore[call-arg]
    reached = []
    for seed in (None, 0):
        known = ModelPair(text(1000, shuffle=seed), inputs)
        found = shift.fit(old, known, [(0, 0)], config, Silent())  # type: ignore[arg-type]
        end = (0, Place("layer", "out"))
        places = {end: Part("model.layers.0")}
        plain = shift._capture(known, 1, places, known.held)[end]
        ends = []
        for adapter in (old, found):
            with shift.adapted(known.target, known.parts[1], adapter):
                ends.append(shift._capture(known, 1, places, known.held)[end] - plain)
        reached.append(linalg.explained(ends[0], ends[1]))
    assert reached[1] < 0.25 < 0.5 < reached[0]


def test_a_transfer_by_weights_alone_says_nothing_of_text(tmp_path: Path) -> None:
    random_adapter("tiny_llama", tmp_path / "adapter")
    config = replace(
        transfer_named("cross_lora", compose_config([]).transfer), gain="weight", spread=False
    )
    inputs = models("tiny_llama", "tiny_qwen2") | {"adapter": Input(tmp_path / "adapter", "a")}
    (tmp_path / "out").mkdir()
    stage = transferring.TransferStage(transfer=config, text=None, runtime=RUNTIME)
    result = move(stage, inputs, tmp_path / "out")
    assert (result.r2_in, result.r2_out, result.feasibility) == (None, None, "unknown")
    for row in json.loads((tmp_path / "out" / "report.json").read_text())["modules"]:
        assert row["relative_after"] == pytest.approx(row["relative_before"], rel=1e-3)
    stage = replace(stage, transfer=replace(config, gain="activation"))
    with pytest.raises(TransferError, match="needs activations"):
        transferring.transfer(stage, inputs, tmp_path / "out", Silent())
    rows = [{"target": MODULE, "source": MODULE}]
    with pytest.raises(TransferError, match="measures no similarity"):
        mark(rows, replace(config, keep_top=0.5))
    w = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    endless = Factors(torch.full((3, 12), float("inf")), torch.ones(8, 3))
    plain = replace(transfer_named("copy", config), gain="none")
    with pytest.raises(TransferError, match="its factors are not finite"):
        transferring._move(pair(w, w, w, w), endless, copy.maps, plain)


def test_what_several_layers_give_one_is_added_up() -> None:
    """And cut to the largest of their ranks: the best of that rank."""
    one, two, three = (factors(10, 7, r, seed) for r, seed in ((2, 0), (3, 1), (1, 2)))
    assert _joined([one]) is one
    found = _joined([one, two, three])
    u, s, vh = torch.linalg.svd(one.b @ one.a + two.b @ two.a + three.b @ three.a)
    assert found.rank == 3
    assert torch.allclose(found.b @ found.a, u[:, :3] * s[:3] @ vh[:3], atol=1e-4)


def test_each_model_reads_the_text_in_its_own_tokens() -> None:
    """The second vocabulary begins with the first: most lines are the same tokens of both, so the
    others are looked at."""
    lines = (embedded("facts") / "calibration.txt").read_text().splitlines()
    tokenizers = [load_tokenizer(TINY[m]) for m in ("tiny_llama", "tiny_qwen2")]
    known = ModelPair(text(200), models("tiny_llama", "tiny_qwen2") | TEXT)
    wanted = [tuple(t(line).input_ids for t in tokenizers) for line in lines[: len(known.texts)]]
    assert sum(s != t for s, t in wanted) > 3
    assert [(text.source, text.target) for text in known.texts] == wanted
    for model, name in zip(known.models, ("tiny_llama", "tiny_qwen2"), strict=True):
        assert torch.equal(
            model.get_input_embeddings().weight, Weights(TINY[name], "cpu")["model.embed_tokens"]
        )
    assert known.pads == tuple(t.pad_token_id for t in tokenizers)


def test_layers_weights_are_compared_above_chance() -> None:
    """The same subspace is 1 − k/d above it, an orthogonal one k/d below; the mean of roles that
    both have."""
    q = orthogonal(12, 0)
    one, other = (
        {"q_proj": q[:, :3], "v_proj": q[:, :3], "o_proj": q},
        {"q_proj": q[:, :3], "v_proj": q[:, 3:6]},
    )
    assert matching._excess(one, one | {"o_proj": q}) == pytest.approx(
        (2 * (1 - 3 / 12) + 0) / 3, abs=1e-5
    )
    assert matching._excess(one, other) == pytest.approx(
        ((1 - 3 / 12) + (0 - 3 / 12)) / 2, abs=1e-5
    )
    narrow = {
        "q_proj": q[:, :2]
    }  # of two sizes the smaller is what can be filled, the larger what fills it by chance
    assert matching._excess(one, narrow) == pytest.approx(1 - 3 / 12, abs=1e-5)


@pytest.mark.parametrize(("share", "counts"), [(0.01005, True), (0.00995, False)])
def test_tokens_that_were_hardly_trained_are_no_anchors(share: float, counts: bool) -> None:
    """Under a hundredth of the median norm, in either model."""
    generator = torch.Generator().manual_seed(0)
    source, target = (
        torch.nn.functional.normalize(torch.randn(9, 5, generator=generator)) for _ in range(2)
    )
    for spoilt in (0, 1):
        both = [source.clone(), target.clone()]
        both[spoilt][8] *= share
        every, without = (anchors.embedding_site(*both, [(i, i) for i in range(n)]) for n in (9, 8))
        assert torch.allclose(every.cross, without.cross, atol=1e-6) is not counts


def test_a_method_that_is_none_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"transfer\.method: .*'procrust'.*procrustes"):
        method_named("procrust")


def test_the_gain_is_the_same_for_a_faint_adapter_and_a_strong_one() -> None:
    """Ten thousand times less of an update is ten thousand times less of it, and one of nothing
    stays nothing."""
    generator = torch.Generator().manual_seed(0)
    w_s, w_t = torch.randn(8, 12, generator=generator), torch.randn(10, 16, generator=generator) * 3
    p, f = (
        pair(
            torch.randn(99, 12, generator=generator),
            torch.randn(99, 16, generator=generator),
            w_s,
            w_t,
        ),
        factors(8, 12),
    )
    for gain in ("activation", "weight", "none"):
        strong, faint, none = (
            moved("procrustes", p, Factors(f.a, c * f.b), gain=gain) for c in (1.0, 1e-4, 0.0)
        )
        assert torch.allclose(faint.b @ faint.a * 1e4, strong.b @ strong.a, rtol=1e-3, atol=1e-4), (
            gain
        )
        assert none.norm() == 0.0


def test_a_pair_of_modules_knows_the_heads_of_its_own_models() -> None:
    config = transfer_named("cross_lora", compose_config([]).transfer)
    stage = transferring.TransferStage(transfer=config, text=None, runtime=RUNTIME)
    inputs, known = models("tiny_llama", "tiny_qwen2"), evidence.WeightsOnly()
    [found] = module_pairs({MODULE: factors(1, 1)}, [(MODULE, MODULE)], known, stage, inputs)
    assert found.heads == tuple(heads(TINY[m]) for m in ("tiny_llama", "tiny_qwen2"))
    assert found.heads[0] != found.heads[1]
    for side_, m in ((found.source, "tiny_llama"), (found.target, "tiny_qwen2")):
        assert torch.equal(side_.weight, Weights(TINY[m], "cpu")[MODULE])
        assert side_.shape == linear_shapes(TINY[m])[MODULE]


def test_pro_lora_keeps_inside_what_was_inside_and_outside_what_was_outside() -> None:
    """P_s P_t + (I − P_s)(I − P_t), and the same of the outputs, as dense matrices."""
    generator = torch.Generator().manual_seed(0)
    w_s, w_t, x = (torch.randn(n, 12, generator=generator) for n in (8, 8, 99))
    p, f = pair(x, x, w_s, w_t), factors(8, 12)
    found = moved("pro_lora", p, f, gain="none")

    def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        one, other, eye = a @ a.T, b @ b.T, torch.eye(len(a))
        return one @ other + (eye - one) @ (eye - other)

    s, t = p.source.basis, p.target.basis
    assert torch.allclose(found.b @ found.a, both(t.u, s.u) @ f.b @ f.a @ both(s.v, t.v), atol=1e-4)


def test_frobenius_goes_through_both_subspaces_and_pairs_vectors_where_widths_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    w_s, w_t = torch.randn(8, 12, generator=generator), torch.randn(8, 16, generator=generator)
    p, f = (
        pair(
            torch.randn(99, 12, generator=generator),
            torch.randn(99, 16, generator=generator),
            w_s,
            w_t,
        ),
        factors(8, 12),
    )
    s, t = p.source.basis, p.target.basis
    found = moved("frobenius", p, f, gain="none")
    assert torch.allclose(
        found.b @ found.a, t.u @ t.u.T @ s.u @ s.u.T @ f.b @ f.a @ s.v @ t.v.T, atol=1e-4
    )
    crossed = moved("cross_lora", p, f, gain="none")
    assert torch.allclose(crossed.b @ crossed.a, t.u @ s.u.T @ f.b @ f.a @ s.v @ t.v.T, atol=1e-4)


def test_who_writes_to_the_residual_stream() -> None:
    assert [name for name, role in ROLES.items() if role.onto_stream is True] == [
        "o_proj",
        "down_proj",
    ]
    assert [name for name, role in ROLES.items() if role.onto_stream is False] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
    ]


def test_no_code_of_a_model_is_run_unless_that_is_asked() -> None:
    config = compose_config([]).transfer
    stage = transferring.TransferStage(transfer=config, text=None, runtime=RUNTIME)
    assert text(9).trust == stage.trust == (False, False)


def test_as_many_layers_are_streamed_at_once_as_memory_holds() -> None:
    names = [(f"model.layers.{i}.self_attn.q_proj",) * 2 for i in range(4)]
    shapes = linear_shapes(TINY["tiny_llama"])
    inputs = models("tiny_llama", "tiny_llama") | TEXT
    layer = moments_bytes(names[:1], shapes, shapes) / 2**30
    for held, sizes in ((0.5, [1, 1, 1, 1]), (2.1, [2, 2]), (3.1, [3, 1]), (9.0, [4])):
        groups = list(evidence.Text(text(60), inputs, held * layer, Silent()).groups(names))
        assert [len(group) for group, _ in groups] == sizes
        assert [len(sites) for _, sites in groups] == [2 * n for n in sizes]
