"""Which layer goes to which, what is kept, and what the figures say of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Silent
from paw.cli.compose import compose_config
from paw.errors import TransferError
from paw.models.adapters import read_adapter
from paw.transfer import linalg
from paw.transfer import match as matching
from paw.transfer.bases import Bases
from paw.transfer.layers import aligned, by_index, proportional, spread
from paw.transfer.verdict import feasibility
from test_transfer import QUICK, TEXT, models, random_adapter, run, text


@given(st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_alignment_is_the_best_that_keeps_the_order(similarity: list[list[float]]) -> None:
    found = aligned(similarity)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(found))
    best = 0.0
    for n in range(1, min(len(similarity), 3) + 1):
        for ts in itertools.combinations(range(len(similarity)), n):
            for ss in itertools.combinations(range(3), n):
                best = max(best, sum(similarity[t][s] for t, s in zip(ts, ss, strict=True)))
    assert sum(similarity[t][s] for s, t in found) == pytest.approx(best, abs=1e-9)


def test_spread_leaves_no_layer_out() -> None:
    assert spread(by_index(2, 4), 2, 4) == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert spread(proportional(5, 2), 5, 2) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)]
    assert spread(proportional(3, 3), 3, 3) == [(0, 0), (1, 1), (2, 2)]


def test_a_model_is_most_like_itself_layer_by_layer(tmp_path: Path) -> None:
    cka, weights = (matching.MatchStage(text=t) for t in (text(512), None))
    for stage in (cka, weights):
        known = models("tiny_llama", "tiny_llama") | (TEXT if stage.text else {})
        result = matching.match(stage, known, tmp_path, Silent())
        found = torch.tensor(result.similarity)
        assert (found.shape, str(result)) == ((4, 4), f"4 × 4 by {result.by}")
        assert torch.equal(found.argmax(dim=1), torch.arange(4))
    known = models("tiny_llama", "tiny_qwen2")
    other = torch.tensor(matching.match(cka, known | TEXT, tmp_path, Silent()).similarity)
    assert other.shape == (5, 4)
    assert other.abs().max() <= 1
    with pytest.raises(TransferError, match=r"128 and 160 wide.*transfer\.layers=cka"):
        matching.match(weights, known, tmp_path, Silent())


def test_unrelated_samples_have_no_cka() -> None:
    """The plain estimator gives about d/n to independent samples; the unbiased one 0."""
    g = torch.Generator().manual_seed(0)
    values = []
    for _ in range(20):
        k, other = (matching._gram([torch.randn(100, 60, generator=g)]) for _ in range(2))
        values.append(
            matching._hsic(k, other) / (matching._hsic(k, k) * matching._hsic(other, other)) ** 0.5
        )
    assert abs(sum(values) / len(values)) < 0.02
    x = torch.randn(100, 60, generator=g)
    k, turned = (
        matching._gram([x]),
        matching._gram([x @ torch.linalg.qr(torch.randn(60, 60, generator=g))[0]]),
    )
    assert matching._hsic(k, turned) == pytest.approx(matching._hsic(k, k), rel=1e-4)


# ---- what is kept
# -----------------------------------------------------------------------------------


def test_keep_top_keeps_whole_layers(tmp_path: Path) -> None:
    random_adapter("tiny_llama", tmp_path / "adapter")
    config = replace(compose_config([]).transfer, keep_top=0.3, **QUICK)  # type: ignore[arg-type]
    out, result = run(tmp_path, "tiny_llama", "tiny_qwen2", config)
    rows = json.loads((out / "report.json").read_text())["modules"]
    by_layer: dict[str, list[float]] = {}
    for row in rows:
        by_layer.setdefault(row["target"].split(".")[2], []).append(row["similarity"])
    best = sorted(by_layer, key=lambda layer: -sum(by_layer[layer]))[
        :2
    ]  # 30 % of five layers, rounded up
    assert {name.split(".")[2] for name in read_adapter(out)} == set(best)
    assert result.target_modules == 14


def test_spread_adds_up_and_divides(tmp_path: Path) -> None:
    random_adapter("tiny_qwen2", tmp_path / "adapter")
    config = replace(compose_config([]).transfer, spread=True, gain="none", **QUICK)  # type: ignore[arg-type]
    out, result = run(tmp_path, "tiny_qwen2", "tiny_llama", config)
    assert result.coverage == 1.0
    after = read_adapter(out)
    assert {f.rank for f in after.values()} == {
        4
    }  # what came from two layers is cut to the rank of one
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "adapter").mkdir()
    folder = random_adapter("tiny_llama", tmp_path / "again" / "own")
    folder.rename(tmp_path / "again" / "adapter")
    plain, divided = (
        run(
            tmp_path / "again",
            "tiny_llama",
            "tiny_qwen2",
            replace(config, spread=s),
            name=str(s),
        )[0]
        for s in (False, True)
    )
    one, half = (
        read_adapter(folder)["model.layers.3.self_attn.q_proj"] for folder in (plain, divided)
    )
    assert half.norm() == pytest.approx(
        one.norm() / 2, rel=1e-4
    )  # source layer 2 goes to target layers 2 and 3


@given(st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_recompression_is_the_best_of_its_rank(r: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(8, 12, generator=g), torch.randn(10, 8, generator=g)
    new_a, new_b = linalg.recompress(a, b, r)
    u, s, vh = torch.linalg.svd((b @ a).double(), full_matrices=False)
    assert new_a.shape == (r, 12)
    assert torch.allclose((new_b @ new_a).double(), (u[:, :r] * s[:r]) @ vh[:r], atol=1e-4)


@given(st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_overlap_is_that_of_the_spans(k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(12, k, generator=g), torch.linalg.qr(torch.randn(12, k, generator=g))[0]
    q = torch.linalg.qr(a.double())[0]
    assert linalg.overlap(a, b) == pytest.approx(
        float((q.T @ b.double()).square().sum() / k), abs=1e-5
    )


# ---- bases on the disk
# ------------------------------------------------------------------------------


def test_bases_are_computed_once_and_cut(tmp_path: Path) -> None:
    w = torch.randn(1100, 200, generator=torch.Generator().manual_seed(0))
    reads: list[int] = []

    def weight() -> torch.Tensor:
        reads.append(1)
        return w

    bases, shape = Bases(tmp_path, "content"), (1100, 200)
    first = bases.of("m", shape, 20, weight, "cpu")
    second, fewer = bases.of("m", shape, 20, weight, "cpu"), bases.of("m", shape, 7, weight, "cpu")
    assert len(reads) == 1
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.v[:, :7], fewer.v)
    assert second.norm == pytest.approx(float(w.norm()), rel=1e-6)
    assert bases.of("m", shape, 30, weight, "cpu").u.shape == (1100, 30)  # more than is kept
    assert Bases(tmp_path, "other content").of("m", shape, 5, weight, "cpu").u.shape[1] == 5
    assert len(reads) == 3
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])  # a disk that was full
    assert torch.allclose(bases.of("m", shape, 20, weight, "cpu").u, first.u, atol=1e-4)
    assert len(reads) == 4


def test_a_part_of_a_large_spectrum_is_the_whole_ones() -> None:
    """LAPACK's partial solver, which only large weights take, against the full one."""
    w = torch.randn(1200, 1100, generator=torch.Generator().manual_seed(0))
    part, whole = linalg.singular_basis(w, 100), linalg.singular_basis(w, 600)
    assert linalg.overlap(part.u, whole.u[:, :100]) == pytest.approx(1, abs=1e-4)
    assert torch.allclose(part.values, whole.values[:100], rtol=1e-4)


# ---- the verdict
# ------------------------------------------------------------------------------------


def test_feasibility_in_plain_words() -> None:
    related = {"phi": 0.9, "chance": 0.2, "r2_in": None, "r2_out": None}
    mapped = {"phi": None, "chance": 0.2, "r2_in": 0.7, "r2_out": 0.5}
    assert feasibility([related])[0] == "copy"
    assert feasibility([mapped])[0] == "align"
    assert feasibility([mapped | {"r2_out": 0.05}])[0] == "retrain"
    assert feasibility([mapped | {"r2_in": None, "r2_out": None}])[0] == "unknown"
    word, why = feasibility([related | {"phi": 0.21, "r2_in": 0.6, "r2_out": 0.4}])
    assert word == "align"
    assert "0.21 where chance is 0.20" in why
    assert "0.60" in why
