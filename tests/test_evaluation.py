"""Scores equal a plain forward pass whatever the batch; statistics equal their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest

from paw.cli.compose import compose_config
from paw.data.load import examples
from paw.data.tokenise import Encoded, encode
from paw.evaluation.likelihood import label_logprobs
from paw.evaluation.modes.likelihood import calibrated, metrics
from paw.evaluation.statistics import (
    f1,
    gap_recovered,
    holm,
    interval,
    mcnemar,
    paired_t,
    resampled_means,
    standard_error,
)
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.paths import embedded


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen2"])
def scored(request: pytest.FixtureRequest) -> tuple[object, list[Encoded], int]:
    folder = embedded(request.param)
    tokenizer = load_tokenizer(folder)
    found = examples(
        embedded("facts") / "test.jsonl", compose_config(["dataset=facts"]).dataset, "test"
    )[:6]
    pairs = [p for e in found for p in zip(e.contexts, e.continuations, strict=True)] + [
        ("the color", " of bovin is red and blue .")
    ]
    return (
        load_model(folder, Runtime("float32")),
        encode(tokenizer, pairs, chat=False),
        tokenizer.pad_token_id,
    )


def test_a_batch_scores_as_one_by_one(scored: tuple[object, list[Encoded], int]) -> None:
    model, rows, pad_id = scored
    with torch.inference_mode():
        together = label_logprobs(model, rows, pad_id).split(
            [len(row.ids) - row.start for row in rows]
        )
        for i, row in enumerate(rows):
            logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)  # type: ignore[operator]
            plain = sum(logits[j - 1, row.ids[j]].item() for j in range(row.start, len(row.ids)))
            assert together[i].sum().item() == pytest.approx(plain, abs=2e-5)


def test_metrics_are_their_definitions() -> None:
    records = [
        {
            "gold": 0,
            "prediction": 0,
            "prediction_norm": 1,
            "correct": True,
            "loglikelihoods": [-1.0, -2.0],
            "tokens": [1, 1],
        },
        {
            "gold": 1,
            "prediction": 0,
            "prediction_norm": 1,
            "correct": False,
            "loglikelihoods": [-1.0, -3.0],
            "tokens": [1, 3],
        },
    ]
    found = metrics(records)
    assert (found.accuracy, found.acc_norm, found.loss) == (0.5, 0.5, 1.0)
    assert found.perplexity == pytest.approx(math.e)
    assert found.stderr == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    alone = {
        "gold": 0,
        "prediction": 0,
        "prediction_norm": 0,
        "correct": None,
        "loglikelihoods": [-1.0],
        "tokens": [2],
    }
    single = metrics([alone])
    assert (single.accuracy, single.stderr, single.loss) == (None, None, 0.5)


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.1], [0.6, 0.3, 0.1], [0.2] * 5])
def test_calibrated_answers_are_given_as_often_as_they_are_right(shares: list[float]) -> None:
    rng = np.random.default_rng(0)
    gold = rng.choice(len(shares), 400, p=shares)
    sums = rng.normal(size=(400, len(shares))) + np.eye(len(shares))[gold]
    told = calibrated(sums.tolist(), gold.tolist())
    assert np.bincount(told).tolist() == np.bincount(gold).tolist()
    # what only makes an answer likelier everywhere changes nothing
    shifted = sums + rng.normal(0, 9, len(shares))
    assert calibrated(shifted.tolist(), gold.tolist()) == told
    # of all answers with these counts they are the likeliest
    seats = np.repeat(np.arange(len(shares)), np.bincount(gold))
    rows, columns = linear_sum_assignment(-sums[:, seats])
    assert sums[rows, told].sum() == pytest.approx(sums[rows, seats[columns]].sum())


def test_a_base_that_says_one_answer_only_has_others_where_it_says_it_least() -> None:
    sums = [[-1.0, -2.0], [-1.0, -4.0], [-1.0, -2.1], [-1.0, -3.9]]
    assert calibrated(sums, [1, 0, 1, 0]) == [1, 0, 1, 0]
    assert calibrated(sums, [0, 1, 0, 0]) == [1, 0, 0, 0]
    assert calibrated(sums, [0, 0, 0, 0]) == [0, 0, 0, 0]
    assert calibrated(sums, [1, 1, 1, 1]) == [1, 1, 1, 1]


def test_standard_error_and_mcnemar() -> None:
    assert standard_error([1.0, 0.0, 1.0, 1.0]) == pytest.approx(0.25)
    before, after = [True, True, False, False, False, False], [True, False, True, True, True, False]
    gained, lost, p = mcnemar(before, after)
    assert (gained, lost) == (3, 1)
    assert p == pytest.approx(binomtest(3, 4).pvalue, abs=1e-12)
    assert mcnemar(before, before) == (0, 0, 1.0)


def test_bootstrap_has_the_mean_and_the_spread_of_theory() -> None:
    x = np.random.default_rng(0).normal(size=(500, 1))
    means = resampled_means(x, seed=1)
    assert means.shape == (10_000, 1)
    assert means.mean() == pytest.approx(x.mean(), abs=0.002)
    assert means.std() == pytest.approx(x.std() / math.sqrt(500), rel=0.05)


def test_gap_recovered() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.3).astype(float)
    own = np.maximum(base, (rng.random(400) < 0.9).astype(float))
    half = np.where(np.arange(400) % 2, own, base)
    found = gap_recovered(base, own, half, "accuracy")
    assert found.eligible
    assert found.recovered == pytest.approx((half - base).mean() / (own - base).mean())
    assert found.low is not None
    assert found.high is not None
    assert found.recovered is not None
    assert found.low < found.recovered < found.high
    assert gap_recovered(base, own, own, "accuracy").recovered == 1.0
    assert gap_recovered(base, own, base, "accuracy").recovered == 0.0


def test_without_a_gap_there_is_nothing_to_recover() -> None:
    base = np.tile([0.0, 1.0], 50)
    worse, small = np.zeros(100), base.copy()
    small[0] = 1.0
    for own in (base, worse, small):
        found = gap_recovered(base, own, np.ones(100), "accuracy")
        assert not found.eligible
        assert found.recovered is None


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Nominal 95 %. 4000 simulations: the estimate's own error is a third of a point."""
    rng, n, runs = np.random.default_rng(0), 200, 4000
    accuracy = (
        sum(
            low <= 0.7 <= high
            for low, high in (interval(int(k), n) for k in rng.binomial(n, 0.7, runs))
        )
        / runs
    )
    difference = ratio = 0
    for i in range(runs // 2):
        base = (rng.random(n) < 0.3).astype(float)
        own = np.maximum(base, (rng.random(n) < 0.8).astype(float))
        part = np.where(rng.random(n) < 0.6, own, base)  # truth: .6 of a gap of .56
        means = resampled_means(np.stack([own - base, part - base], axis=1), seed=i, resamples=1000)
        low, high = np.percentile(means[:, 1], [2.5, 97.5])
        difference += low <= 0.6 * 0.56 <= high
        low, high = np.percentile(means[:, 1] / means[:, 0], [2.5, 97.5])
        ratio += low <= 0.6 <= high
    for covered in (accuracy, difference / (runs // 2), ratio / (runs // 2)):
        assert 0.93 <= covered <= 0.97


def test_repeated_rows_are_resampled_as_any_others() -> None:
    """Right and wrong take the short way; the same values, made different, take the long one."""
    x = (np.random.default_rng(0).random((500, 1)) < 0.3).astype(float)
    short, long = (
        resampled_means(x, seed=1),
        resampled_means(x + np.arange(500)[:, None] * 1e-9, seed=1),
    )
    assert short.mean() == pytest.approx(long.mean(), abs=1e-3)
    assert np.percentile(short, [2.5, 97.5]) == pytest.approx(
        np.percentile(long, [2.5, 97.5]), abs=2e-3
    )


def test_f1_holm_and_the_paired_t() -> None:
    rng = np.random.default_rng(0)
    gold, said = rng.random(50) < 0.4, rng.random(50) < 0.5
    precision, recall = (gold & said).sum() / said.sum(), (gold & said).sum() / gold.sum()
    assert f1(list(gold), list(said)) == pytest.approx(
        2 * precision * recall / (precision + recall)
    )
    assert f1([False], [False]) == 0.0
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    x = rng.normal(size=30)
    assert paired_t(x, x + 1e-3) == 1.0 or paired_t(x, x + 1e-3) < 1e-6
    assert paired_t(x, x) == 1.0


def test_a_gap_that_some_resamples_lack_has_an_interval_without_nan() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        base = (rng.random(60) < 0.5).astype(float)
        own, part = base.copy(), base.copy()
        own[rng.choice(60, 6, replace=False)] = 1.0
        part[rng.choice(60, 6, replace=False)] = 1.0
        found = gap_recovered(base, own, part, "accuracy")
        assert not found.eligible or not (
            math.isnan(found.low or 0.0) or math.isnan(found.high or 0.0)
        )
