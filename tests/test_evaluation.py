"""Scores equal a plain forward pass whatever the batch; statistics equal their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from paw.config.compose import compose_config
from paw.data.encode import Encoded, encode
from paw.data.load import examples
from paw.evaluation.likelihood import batches, token_logprobs
from paw.evaluation.stage import metrics
from paw.evaluation.statistics import gap_recovered, mcnemar, resampled_means, standard_error
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.paths import embedded


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen2"])
def scored(request: pytest.FixtureRequest) -> tuple[object, list[Encoded], int]:
    folder = embedded(request.param)
    tokenizer = load_tokenizer(folder)
    found = examples(embedded("facts") / "test.jsonl", compose_config(["dataset=facts"]).dataset, "test")[:6]
    pairs = [p for e in found for p in zip(e.contexts, e.continuations, strict=True)] + [("the color", " of bovin is red and blue .")]
    return load_model(folder, Runtime("float32")), encode(tokenizer, pairs, chat=False), tokenizer.pad_token_id


def test_a_batch_scores_as_one_by_one(scored: tuple[object, list[Encoded], int]) -> None:
    model, rows, pad_id = scored
    with torch.inference_mode():
        together, mask = token_logprobs(model, rows, pad_id)
        for i, row in enumerate(rows):
            logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)  # type: ignore[operator]
            plain = sum(logits[j - 1, row.ids[j]].item() for j in range(row.start, len(row.ids)))
            assert together[i].sum().item() == pytest.approx(plain, abs=2e-5)
            assert int(mask[i].sum()) == len(row.ids) - row.start


def test_batches_hold_every_row_once(scored: tuple[object, list[Encoded], int]) -> None:
    _, rows, _ = scored
    for size, vocabulary in ((1, 100), (7, 100), (1000, 100), (1000, 2**26)):
        found = batches(rows, size, vocabulary)
        assert sorted(i for b in found for i in b) == list(range(len(rows)))
        assert max(map(len, found)) <= size
    assert len(batches(rows, 1000, 2**28)) == len(rows)  # a row alone is never refused


def test_metrics_are_their_definitions() -> None:
    records = [
        {"gold": 0, "prediction": 0, "prediction_norm": 1, "loglikelihoods": [-1.0, -2.0], "tokens": [1, 1]},
        {"gold": 1, "prediction": 0, "prediction_norm": 1, "loglikelihoods": [-1.0, -3.0], "tokens": [1, 3]},
    ]
    found = metrics(records)
    assert (found["accuracy"], found["acc_norm"], found["loss"]) == (0.5, 0.5, 1.0)
    assert found["perplexity"] == pytest.approx(math.e)
    assert found["stderr"] == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    single = metrics([{"gold": 0, "prediction": 0, "prediction_norm": 0, "loglikelihoods": [-1.0], "tokens": [2]}])
    assert (single["accuracy"], single["stderr"], single["loss"]) == (None, None, 0.5)


def test_standard_error_and_mcnemar() -> None:
    assert standard_error([1.0, 0.0, 1.0, 1.0]) == pytest.approx(0.25)
    before, after = [True, True, False, False, False, False], [True, False, True, True, True, False]
    assert mcnemar(before, after) == (3, 1, binomtest(3, 4).pvalue)
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


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Nominal 95 %; 300 simulations put the estimate within ±3 % with near certainty."""
    rng, inside = np.random.default_rng(0), 0
    for i in range(300):
        base = (rng.random(200) < 0.3).astype(float)
        own = np.maximum(base, (rng.random(200) < 0.8).astype(float))
        part = np.where(rng.random(200) < 0.6, own, base)  # truth: .6
        means = resampled_means(np.stack([own - base, part - base], axis=1), seed=i, resamples=1000)
        low, high = np.percentile(means[:, 1] / means[:, 0], [2.5, 97.5])
        inside += low <= 0.6 <= high
    assert 0.91 <= inside / 300 <= 0.985


def test_permuting_choices_permutes_scores(tiny_llama: Path) -> None:
    tokenizer, model = load_tokenizer(tiny_llama), load_model(tiny_llama, Runtime("float32"))
    context = "question : what is the home of lupup ? answer :"
    choices = [" cave", " river", " forest", " valley"]
    with torch.inference_mode():
        straight, _ = token_logprobs(model, encode(tokenizer, [(context, c) for c in choices], False), tokenizer.pad_token_id)
        reverse, _ = token_logprobs(model, encode(tokenizer, [(context, c) for c in choices[::-1]], False), tokenizer.pad_token_id)
    assert torch.allclose(straight.sum(-1), reverse.sum(-1).flip(0), atol=1e-5)


def test_a_gap_that_some_resamples_lack_has_an_interval_without_nan() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        base = (rng.random(60) < 0.5).astype(float)
        own, part = base.copy(), base.copy()
        own[rng.choice(60, 6, replace=False)] = 1.0
        part[rng.choice(60, 6, replace=False)] = 1.0
        found = gap_recovered(base, own, part, "accuracy")
        assert not found.eligible or not (math.isnan(found.low or 0.0) or math.isnan(found.high or 0.0))
