"""The two-map engine: directions, exactness, invariances, placebos; and a real transfer on the embedded pair."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Silent
from paw.config.compose import compose_config, transfer_named
from paw.config.schema import TransferConfig
from paw.errors import TransferError
from paw.models.adapters import Factors, read_adapter, write_adapter
from paw.models.layout import Part
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.models.tensors import Weights, linear_shapes
from paw.paths import embedded
from paw.store import Input
from paw.transfer import activations, calibrate, linalg
from paw.transfer import stage as transferring
from paw.transfer.activations import PairedText, pair_texts, seen
from paw.transfer.maps import Eye, Product
from paw.transfer.methods import Placebo, method_named
from paw.transfer.modules import ROLES, Layers, by_index, by_layer, layer_of, pair_names, proportional
from paw.transfer.pairing import Pair, Side, Site

TINY = {name: embedded(name) for name in ("tiny_llama", "tiny_qwen2")}


def orthogonal(n: int, seed: int) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def site(x_s: torch.Tensor, x_t: torch.Tensor) -> Site:
    n = len(x_s)
    return Site(x_s.T @ x_t / n, x_s.T @ x_s / n, x_t.T @ x_t / n, x_s, x_t)


MODULE = "model.layers.0.self_attn.q_proj"


def side(w: torch.Tensor) -> Side:
    return Side(MODULE, (w.shape[0], w.shape[1]), lambda: w, lambda k: linalg.singular_basis(w, k))


def pair(x_s: torch.Tensor, x_t: torch.Tensor, w_s: torch.Tensor, w_t: torch.Tensor) -> Pair:
    sites = {ROLES["q_proj"].reads: site(x_s, x_t), ROLES["q_proj"].writes: site(x_s @ w_s.T, x_t @ w_t.T)}
    return Pair(side(w_s), side(w_t), sites)


# ---- matrix functions -------------------------------------------------------------------------------


def test_procrustes_points_the_right_way() -> None:
    """x_s = Q x_t is recovered as T_in with x_s ≈ T_in x_t; the transpose would be the inverse map."""
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
    assert torch.allclose((u.T @ w @ v).diagonal(), full.S[:k].float(), rtol=1e-3, atol=1e-3)  # signs of both sides agree
    assert torch.allclose(found.values, full.S[:k].float(), rtol=1e-3, atol=1e-3)
    again = linalg.singular_basis(w.clone(), k).u
    assert torch.equal(u, again)


def test_random_subspaces_overlap_at_chance() -> None:
    found = [linalg.overlap(orthogonal(60, i)[:, :15], orthogonal(60, 1000 + i)[:, :15]) for i in range(40)]
    assert np.mean(found) == pytest.approx(15 / 60, abs=0.01)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_eye_is_the_identity_cut_or_filled(rows: int, columns: int, r: int) -> None:
    dense = torch.eye(rows, columns)
    a, b = torch.randn(r, rows), torch.randn(columns, r)
    assert torch.equal(Eye(rows, columns).right(a), a @ dense)
    assert torch.equal(Eye(rows, columns).left(b), dense @ b)
    assert torch.equal(Product((dense,)).left(b), dense @ b)


# ---- methods ----------------------------------------------------------------------------------------


@cache
def defaults() -> TransferConfig:
    return compose_config(["transfer=procrustes"]).transfer


def moved(method: str, p: Pair, factors: Factors, **changes: object) -> Factors:
    """By a method; or by procrustes, then spoilt."""
    found = method_named(method)
    if isinstance(found, Placebo):
        real = moved("procrustes", p, factors, **changes)
        return Factors(*found.spoil(real.a, real.b, torch.Generator().manual_seed(0)))
    config = replace(transfer_named(method, defaults()), **changes)  # type: ignore[arg-type]
    return transferring._move(p, factors, found, config)[0]  # type: ignore[arg-type]


def factors(out: int, into: int, r: int = 3, seed: int = 5) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(r, into, generator=generator), torch.randn(out, r, generator=generator))


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
    for method, changes in (("procrustes", {}), ("ridge", {"penalty": 0.0}), ("pad_truncate", {}), ("copy", {}), ("pro_lora", {})):
        found = moved(method, p, f, gain="activation", **changes)
        assert torch.allclose(found.b @ found.a, f.b @ f.a, atol=1e-4), method


def test_projections_keep_what_lies_in_the_targets_subspaces() -> None:
    """Of a model to itself lora_x and frobenius keep one part of an adapter; of a rotated one anchored finds that part."""
    generator = torch.Generator().manual_seed(0)
    q_in, q_out, w_s = orthogonal(12, 1), orthogonal(8, 2), torch.randn(8, 12, generator=generator)
    x_s, f = torch.randn(500, 12, generator=generator), factors(8, 12)
    own, turned = pair(x_s, x_s, w_s, w_s), pair(x_s, x_s @ q_in, w_s, q_out @ w_s @ q_in)
    for method, p, whole in (("lora_x", own, f.b @ f.a), ("frobenius", own, f.b @ f.a), ("anchored", turned, q_out @ f.b @ f.a @ q_in)):
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
        turned = replace(b, u=b.u @ orthogonal(p.k, seed + 2 * i + 1), v=b.v @ orthogonal(p.k, seed + 2 * i + 2))
        one_side.__dict__["basis"] = turned
    two, other = moved("anchored", p, f), moved("cross_lora", p, f)
    assert torch.allclose(one.b @ one.a, two.b @ two.a, atol=1e-3 * float((one.b @ one.a).abs().max() + 1))
    assert not torch.allclose(crossed.b @ crossed.a, other.b @ other.a, atol=1e-2)


def test_signs_are_a_choice_and_negation_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    w_s, w_t = torch.randn(40, 30, generator=generator), torch.randn(36, 50, generator=generator)
    p, f = pair(torch.randn(99, 30), torch.randn(99, 50), w_s, w_t), factors(40, 30)
    fixed, drawn = moved("cross_lora", p, f, gain="none"), [moved("sign_random", p, f, gain="none", seed=s) for s in (0, 1, 1)]
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
    p = pair(torch.randn(99, 6), torch.randn(99, 7), torch.randn(5, 6, generator=generator), torch.randn(5, 7, generator=generator))
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
    for method in ("procrustes", "ridge", "cross_lora", "pad_truncate", "frobenius", "anchored", "negated", "sign_random"):
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
    cosine = float(((real.b @ real.a) * (placebo.b @ placebo.a)).sum() / real.norm() / placebo.norm())
    assert abs(cosine) < 0.5


def test_gains() -> None:
    generator = torch.Generator().manual_seed(0)
    w_s, w_t = torch.randn(8, 12, generator=generator), torch.randn(10, 16, generator=generator) * 3
    x_s, x_t = torch.randn(300, 12, generator=generator), torch.randn(300, 16, generator=generator) * 2
    p, f = pair(x_s, x_t, w_s, w_t), factors(8, 12)

    def share(x: torch.Tensor, new: Factors, w: torch.Tensor) -> float:
        return float((x @ (new.b @ new.a).T).norm() / (x @ w.T).norm())

    by_output, by_weight, twice, once = (moved("procrustes", p, f, gain=g) for g in ("activation", "weight", "2", "none"))
    assert share(x_t, by_output, w_t) == pytest.approx(share(x_s, f, w_s), rel=1e-3)
    assert by_weight.norm() / w_t.norm() == pytest.approx(float(f.norm() / w_s.norm()), rel=1e-3)
    assert twice.norm() == pytest.approx(2 * once.norm(), rel=1e-4)


# ---- pairing ----------------------------------------------------------------------------------------


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


# ---- a real transfer --------------------------------------------------------------------------------


def random_adapter(model: str, folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (out, into) in linear_shapes(TINY[model]).items():
        if ".layers." in name:
            modules[name] = Factors(torch.randn(4, into, generator=generator) * 0.1, torch.randn(out, 4, generator=generator) * 0.1)
    folder.mkdir()
    write_adapter(folder, modules, None)
    return folder


def run(
    tmp_path: Path,
    source: str,
    target: str,
    config: TransferConfig,
    streaming: bool = False,
    layers: Layers | None = None,
    name: str = "out",
    shuffle: int | None = None,
) -> tuple[Path, dict[str, Any]]:
    runtime, text = Runtime("float32"), {"calibration": Input(embedded("facts") / "calibration.txt", "text")}
    models = {"source": Input(TINY[source], source), "target": Input(TINY[target], target)}
    layers = layers or proportional(*(len(by_layer(linear_shapes(TINY[name]))) for name in (source, target)))
    seen = calibrate.CalibrateStage(runtime, list(layers), config.positions, shuffle)
    known = text
    if not streaming:
        moments = tmp_path / "moments"
        moments.mkdir(exist_ok=True)
        calibrate.calibrate(seen, models | text, moments, Silent())
        known = {"moments": Input(moments, "moments")}
    out = tmp_path / f"{name}{streaming}"
    out.mkdir()
    stage = transferring.TransferStage(config, list(layers), seen if streaming else None, runtime)
    return out, transferring.transfer(stage, models | known | {"adapter": Input(tmp_path / "adapter", "adapter")}, out, Silent())


QUICK = {"positions": 2000}


@pytest.mark.parametrize("method", ["procrustes", "pad_truncate"])
def test_self_transfer_of_a_real_model_is_the_identity(tmp_path: Path, method: str) -> None:
    """For any adapter, also outside the span that the text shows (a regression can only be right inside it)."""
    random_adapter("tiny_llama", tmp_path / "adapter")
    config = replace(transfer_named(method, compose_config([]).transfer), **QUICK)  # type: ignore[arg-type]
    out, result = run(tmp_path, "tiny_llama", "tiny_llama", config)
    assert result["coverage"] == 1.0
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
        run(tmp_path, "tiny_llama", "tiny_qwen2", replace(config, workers=1 + 2 * s), streaming=s) for s in (False, True)
    )
    assert report["target_modules"] == 35
    one, two = read_adapter(kept), read_adapter(streamed)
    for name in one:
        assert torch.allclose(one[name].b @ one[name].a, two[name].b @ two[name].a, atol=1e-4), name


def test_report_and_gate(tmp_path: Path) -> None:
    random_adapter("tiny_llama", tmp_path / "adapter")
    config = replace(compose_config([]).transfer, similarity="excess", similarity_threshold=0.1, **QUICK)  # type: ignore[arg-type]
    out, result = run(tmp_path, "tiny_llama", "tiny_qwen2", config)
    rows = json.loads((out / "report.json").read_text())["modules"]
    assert len(rows) == 35
    passed = {r["target"] for r in rows if r["excess"] >= 0.1}
    assert 0 < len(passed) < 35
    assert set(read_adapter(out)) == passed == {r["target"] for r in rows if r["transferred"]}
    assert result["target_modules"] == len(passed)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "adapter").symlink_to(tmp_path / "adapter")
    with pytest.raises(TransferError, match="lets no module through"):
        run(tmp_path / "again", "tiny_llama", "tiny_qwen2", replace(config, similarity_threshold=0.99))


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


# ---- what a method's number means -------------------------------------------------------------------


def test_a_penalty_is_a_share_of_the_mean_diagonal() -> None:
    """So that one penalty means the same for activations of any size."""
    gram, cross = torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2)
    assert torch.allclose(linalg.ridge(cross, gram, 0.5), torch.diag(torch.tensor([1 / 2, 1 / 4])))  # λ = .5 × 2
    generator = torch.Generator().manual_seed(0)
    x_s, x_t = torch.randn(50, 6, generator=generator), torch.randn(50, 8, generator=generator)
    for way in ("ridge_to_source", "ridge_to_target"):
        small, large = (getattr(site(c * x_s, c * x_t), way)(0.3) for c in (1.0, 100.0))
        assert torch.allclose(small, large, atol=1e-5), way


def test_shuffled_positions_come_from_all_texts() -> None:
    """Texts of one word each, known by it. Turned round inside batches of four, a quarter would still meet their own text."""
    model = load_model(TINY["tiny_llama"], Runtime("float32"))
    texts, each = 40, 10
    paired = [PairedText([20 + i] * each, [20 + i] * each, [(j, j) for j in range(each)]) for i in range(texts)]
    space = (0, ROLES["q_proj"].reads)
    places = {space: Part("model.layers.0.self_attn.q_proj")}
    words = torch.cat([now[0][space][::each] for now in seen((model, model), (places, places), paired, 1, (0, 0))])

    def met(seed: int) -> list[list[int]]:
        rows = list(activations._mispaired((model, model), (places, places), paired, 4, (0, 0), seed))
        return [torch.cdist(torch.cat([row[side][space] for row in rows]), words).argmin(1).tolist() for side in (0, 1)]

    source, target = met(0)
    assert sorted(source) == sorted(target) == sorted(list(range(texts)) * each)  # every position once
    assert sum(s == t for s, t in zip(source, target, strict=True)) < 2.5 * each  # one in forty by chance: ten
    assert met(0) == [source, target]
    assert met(1)[1] != target
