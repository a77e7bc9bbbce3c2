"""Every number and every sentence that a user reads is what it says it is, held against theory or against plain arithmetic."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest, pearsonr, spearmanr

from conftest import Silent
from paw.cli.compose import compose_config
from paw.data.encode import BOUNDS, IDS, LABELS, STARTS, Rows
from paw.data.example import Example
from paw.data.load import examples, sample
from paw.data.tokenise import Encoded
from paw.errors import AdapterError, DataError, StageError
from paw.evaluation import answers, classify
from paw.evaluation.engine import Engine, Job
from paw.evaluation.evaluate import RECORDS, EvaluateStage, evaluate, metrics, read_records
from paw.evaluation.evaluate import _read as read_answer
from paw.evaluation.evaluate import _record as asked_record
from paw.evaluation.plan import Scoring, Writing, plan_scoring, plan_writing
from paw.evaluation.statistics import Gap, gap_recovered
from paw.evaluation.trees import tree
from paw.models.adapters import stamp
from paw.models.load import Runtime, load_classifier, load_model, load_tokenizer
from paw.paths import embedded
from paw.report import results
from paw.report.compare import adjust, compare, difference, verdict
from paw.report.records import Recorded, file_names, publish, read_run
from paw.report.results import System, beside, judge, table, write
from paw.store import Artifact, Input
from paw.training.batches import Micro, Share, Steps, Validation, loader, per_epoch
from paw.training.objectives import Answers

Z95 = 1.959964  # standard errors on either side of a mean that hold 95 % of a normal


def records(loglikelihoods: Any, correct: Any = None, tokens: int = 1) -> list[dict[str, Any]]:
    """Questions of one answer each, with the log-likelihoods given; or right and wrong."""
    found = [None] * len(loglikelihoods) if correct is None else [bool(c) for c in correct]
    return [
        {
            "id": str(i),
            "gold": 0,
            "prediction": 0,
            "correct": c,
            "loglikelihoods": [float(x)],
            "tokens": [tokens],
        }
        for i, (x, c) in enumerate(zip(loglikelihoods, found, strict=True))
    ]


def cost(
    seconds: float | None, ram: float | None, gpu: float | None = None
) -> dict[str, float | None]:
    return {"seconds": seconds, "ram_mib": ram, "gpu_mib": gpu}


def artifact(
    path: Path,
    stage: str,
    paid: dict[str, float | None],
    reused: bool = False,
    result: dict[str, Any] | None = None,
) -> Artifact:
    return Artifact(path, "key", "content", result or {}, paid, reused, stage)


def system(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> System:
    """A system whose evaluation lies on the disk, its result computed from its records."""
    path = folder / name.replace(" ", "_")
    path.mkdir()
    (path / RECORDS).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return System(
        name, "tiny", artifact(path, "evaluate", cost(3.0, 100.0), result=metrics(rows)), **more
    )


def right(
    folder: Path,
    name: str,
    count: int,
    n: int = 200,
    log: Sequence[float] | None = None,
    **more: Any,
) -> System:
    """The first `count` of n questions right."""
    return system(
        folder,
        name,
        records([-1.0] * n if log is None else log, [i < count for i in range(n)]),
        **more,
    )


def cells(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, by its head."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


# ---- intervals --------------------------------------------------------------------------------------


def test_a_difference_has_the_interval_of_95_percent() -> None:
    """That of theory, mean ± 1.96 standard errors; one of 90 % would be a sixth narrower."""
    rng = np.random.default_rng(0)
    before = rng.normal(-2.0, 1.0, 400)
    after = before + rng.normal(0.2, 0.5, 400)
    found = compare(Recorded("after", records(after)), Recorded("before", records(before)))
    error = (after - before).std() / math.sqrt(400)
    assert found["difference"] == pytest.approx((after - before).mean())
    assert found["difference"] - found["low"] == pytest.approx(Z95 * error, rel=0.05)
    assert found["high"] - found["difference"] == pytest.approx(Z95 * error, rel=0.05)


def test_a_gap_recovered_has_the_interval_of_95_percent() -> None:
    """That of theory for a ratio of means of paired samples (the delta method, Fieller's to first order)."""
    rng = np.random.default_rng(0)
    gap = rng.normal(1.0, 0.5, 600)
    moved = 0.6 * gap + rng.normal(0.0, 0.3, 600)
    found = gap_recovered(np.zeros(600), gap, moved, "log-likelihood")
    share = moved.mean() / gap.mean()
    error = (moved - share * gap).std() / math.sqrt(600) / gap.mean()
    assert found.recovered == pytest.approx(share)
    assert found.low == pytest.approx(share - Z95 * error, abs=0.1 * error)
    assert found.high == pytest.approx(share + Z95 * error, abs=0.1 * error)


@pytest.mark.parametrize(("errors", "eligible"), [(1.75, False), (2.2, True), (-2.2, False)])
def test_a_gap_is_one_where_its_interval_of_95_percent_excludes_0(
    errors: float, eligible: bool
) -> None:
    """1.75 standard errors would do at 90 %; below 0 there is no gap, however clear the loss."""
    spread = np.random.default_rng(0).normal(size=500)
    spread = (spread - spread.mean()) / spread.std()
    gap = spread + errors / math.sqrt(500)
    assert gap_recovered(np.zeros(500), gap, gap, "log-likelihood").eligible is eligible


def test_a_difference_that_touches_0_or_a_p_of_5_percent_tells_nothing() -> None:
    clear = {"low": 0.01, "high": 0.2, "p_holm": 0.049}
    assert verdict(clear) == 1
    assert verdict({"low": -0.2, "high": -0.01, "p_holm": 0.049}) == -1
    for change in ({"low": 0.0}, {"p_holm": 0.05}, {"low": -0.2, "high": 0.0}, {"low": -0.1}):
        assert verdict(clear | change) == 0


def test_likelihoods_are_per_token_and_stand_in_where_one_side_has_no_accuracy() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(-6, 1, 50), rng.normal(-4, 1, 50)
    judged, plain = (
        Recorded("a", records(after, [True] * 50, tokens=4)),
        Recorded("b", records(before, tokens=2)),
    )
    found = compare(judged, plain)
    assert (found["of"], found["versus"], found["n"]) == ("log-likelihood", "b", 50)
    assert found["difference"] == pytest.approx((after / 4 - before / 2).mean())
    assert "gained" not in found
    some = Recorded("b", records(before, [True] * 50))
    some.records[7]["correct"] = None  # one question without choices: no accuracy of the whole
    assert compare(judged, some)["of"] == "log-likelihood"
    adjust([found])
    assert difference(found) == (
        f"{found['difference']:+.3f} log-likelihood [{found['low']:+.3f}, {found['high']:+.3f}], p = {found['p']:.2g}"
    )


# ---- sentences --------------------------------------------------------------------------------------


def test_what_is_said_of_methods_and_draws(tmp_path: Path) -> None:
    """70 more right than the base is a gain, 40 fewer a harm, 2 fewer nothing shown; own − base is .5, of which .35 is .7."""
    base, own = right(tmp_path, "base", 60), right(tmp_path, "own", 160)
    method, worse = right(tmp_path, "method", 130), right(tmp_path, "worse", 100)
    draws = [
        right(tmp_path, f"random {i}", n, draw_of="random")
        for i, n in enumerate((58, 20, 90, 150, 62))
    ]
    said = judge([method, worse, *draws], base, own)
    p = binomtest(70, 70).pvalue
    low, high = (0.35 + sign * Z95 * math.sqrt(0.35 * 0.65 / 200) for sign in (-1, 1))
    first = method.versus[0]
    assert (first["difference"], first["gained"], first["lost"]) == (pytest.approx(0.35), 70, 0)
    assert first["p"] == pytest.approx(p)
    assert (first["low"], first["high"]) == (
        pytest.approx(low, abs=0.006),
        pytest.approx(high, abs=0.006),
    )
    assert said[0] == f"method: a gain over base, {difference(first)}."
    assert said[1] == f"worse: a gain over base, {difference(worse.versus[0])}."
    assert (
        said[2]
        == "random, 5 draws: accuracy -0.200 to +0.450 against base; 2 a gain, 1 harm, 2 no significant effect."
    )
    assert said[3] == f"method is above worse: {difference(method.versus[1])}."
    lowest = min(v["low"] for v in method.versus[2:])
    assert lowest == pytest.approx(-0.1 - Z95 * math.sqrt(0.1 * 0.9 / 200), abs=0.006)
    assert said[4] == (
        f"method is above 4 and below 1 of 5 draws of random: accuracy -0.100 to +0.550, the lowest interval begins at {lowest:+.3f}."
    )
    assert len(said) == 5
    assert [v["versus"] for v in method.versus] == [
        "base",
        "worse",
        *(f"random {i}" for i in range(5)),
    ]
    assert method.gap is not None
    assert (method.gap.eligible, method.gap.recovered) == (True, pytest.approx(0.7))
    # all thirteen comparisons count in Holm's adjustment: the clearest is multiplied by thirteen
    every = [v for s in (method, worse, *draws) for v in s.versus]
    clearest = min(every, key=lambda v: v["p"])
    assert len(every) == 13
    assert clearest["p_holm"] == pytest.approx(13 * clearest["p"])


def test_what_is_said_where_accuracy_has_no_gap(tmp_path: Path) -> None:
    """Then the gold answers' likelihood decides: of a gap of 1 nat half is recovered, by draws −.1 and .2 of it."""
    noise = np.random.default_rng(0).normal(0, 0.1, 200)
    base, own = (
        right(tmp_path, "base", 100, log=noise - 3),
        right(tmp_path, "own", 100, log=noise - 2),
    )
    at = {"method": -2.5, "twin": -2.5, "best": -2.2}
    method, twin, best = (
        right(tmp_path, n, 100, log=noise * x / -2.5 + x + noise[::-1]) for n, x in at.items()
    )
    draws = [
        right(tmp_path, f"random {i}", 100, log=noise * 0.99 + x, draw_of="random")
        for i, x in enumerate((-3.1, -2.8))
    ]
    said = judge([method, twin, best, *draws], base, own)
    assert (
        said[0]
        == "Not eligible: by accuracy there is no gap to recover (own − base is +0.000, interval [+0.000, +0.000])."
    )
    assert said[1].startswith("method: no significant effect versus base, +0.000 accuracy")
    gap = method.gap_by_likelihood
    assert gap is not None
    share = 0.5 + noise.mean()
    assert gap.recovered == pytest.approx(share)
    by_likelihood = "By the gold answers' log-likelihood per token,"
    recovers = f"{share:+.2f} of the gap [{gap.low:+.2f}, {gap.high:+.2f}]."
    assert f"{by_likelihood} method recovers {recovers}" in said
    assert f"{by_likelihood} random, 2 draws, recover -0.10 to +0.20 of the gap." in said
    assert {v["of"] for v in method.versus[1:]} == {"log-likelihood"}
    assert said[-3].startswith(
        "method is not significantly different from twin: +0.000 log-likelihood"
    )
    assert said[-2].startswith("method is below best: -0.300 log-likelihood")
    assert said[-1].startswith(
        "method is above 2 and below 0 of 2 draws of random: log-likelihood +"
    )
    under = judge(
        [best], method, best
    )  # a base that is better already has none by likelihood either
    assert under[0].startswith("Not eligible")
    nothing = judge([twin, *draws], base, base)
    assert f"{by_likelihood} twin has no gap to recover." in nothing
    assert f"{by_likelihood} random has no gap to recover." in nothing


def test_a_gap_under_three_points_is_none_however_sure_it_is() -> None:
    """Of 3000 questions 60 more right is sure, and two points; 120 are four. A likelihood has no such limit."""
    base = np.zeros(3000)
    for more, eligible in ((60, False), (120, True)):
        own = (np.arange(3000) < more).astype(float)
        found = gap_recovered(base, own, own, "accuracy")
        assert found.eligible is eligible
        assert found.reason == ("" if eligible else "own − base is +0.020, under 0.03")
        assert gap_recovered(base, own, own, "log-likelihood").eligible


def test_adapters_beside_their_base(tmp_path: Path) -> None:
    base = right(tmp_path, "base", 100)
    found = [right(tmp_path, "good", 150), right(tmp_path, "bad", 60), right(tmp_path, "same", 100)]
    said = beside(base, found)
    assert said == [
        f"good: a gain over base, {difference(found[0].versus[0])}.",
        f"bad: harm to base, {difference(found[1].versus[0])}.",
        f"same: no significant effect versus base, {difference(found[2].versus[0])}.",
    ]
    assert [v["difference"] for s in found for v in s.versus] == pytest.approx([0.25, -0.2, 0.0])
    assert found[1].versus[0]["p_holm"] == pytest.approx(2 * found[1].versus[0]["p"])


# ---- tables and files -------------------------------------------------------------------------------


def test_a_row_has_what_all_of_its_stages_cost(tmp_path: Path) -> None:
    made = [
        artifact(tmp_path, "train", cost(10.5, 900.0, 50.0), reused=True),
        artifact(tmp_path, "transfer", cost(None, None)),
    ]
    one = right(tmp_path, "one", 90, made=made, coverage=0.5)
    row = one.row()
    assert (row["seconds"], row["ram_mib"], row["gpu_mib"], row["coverage"]) == (
        13.5,
        900.0,
        50.0,
        0.5,
    )
    assert row["made"] == "train:reused transfer:computed evaluate:computed"
    assert (row["system"], row["draw_of"], row["accuracy"], row["n"]) == ("one", "one", 0.45, 200)
    assert (row["gap_recovered"], row["gap_low"], row["gap_high"]) == (None, None, None)
    one.gap, one.draw_of = Gap("accuracy", True, "", 0.6, 0.4, math.inf), "some"
    row = one.row()
    assert (row["gap_recovered"], row["gap_low"], row["gap_high"], row["draw_of"]) == (
        0.6,
        0.4,
        math.inf,
        "some",
    )
    assert right(tmp_path, "two", 90).row()["gpu_mib"] is None
    zero = right(tmp_path, "three", 90, made=[artifact(tmp_path, "train", cost(1.0, 1.0, 0.0))])
    assert zero.row()["gpu_mib"] == 0.0


def test_the_table_has_the_numbers(tmp_path: Path) -> None:
    made = [artifact(tmp_path, "train", cost(10.5, 900.0, 50.0), reused=True)]
    one = right(tmp_path, "one", 90, log=[-0.5] * 200, made=made, coverage=0.5)
    one.gap = Gap("accuracy", True, "", 0.6, 0.4, 0.8)
    bare = system(tmp_path, "bare", records([-2.0] * 200, tokens=4))
    bare.gap = Gap("accuracy", False, "small", None, None, None)
    draws = [
        right(tmp_path, f"draw {i}", n, log=[x] * 200, draw_of="draw")
        for i, (n, x) in enumerate(((20, -1.0), (80, -2.0)))
    ]
    draws[0].gap, draws[1].gap = (Gap("accuracy", True, "", x, 0.0, 1.0) for x in (-0.1, 0.3))
    first, second, folded = cells(table([one, bare, *draws]))
    low, high = binomtest(90, 200).proportion_ci(0.95, method="wilson")
    error = math.sqrt(0.45 * 0.55 / 199)
    assert first == {
        "system": "one",
        "accuracy": f"0.450 ± {error:.3f} [{low:.3f}, {high:.3f}]",
        "loss": "0.500",
        "perplexity": "1.65",
        "seconds": "13.5",
        "RAM MiB": "900",
        "GPU MiB": "50",
        "coverage": "50%",
        "gap recovered": "+0.60 [+0.40, +0.80]",
        "stages": "partly reused",
    }
    assert (second["accuracy"], second["loss"], second["gap recovered"], second["GPU MiB"]) == (
        "–",
        "0.500",
        "not eligible",
        "–",
    )
    assert (second["coverage"], second["stages"]) == ("–", "computed")
    assert (folded["system"], folded["accuracy"]) == ("draw, 2 draws", "0.250 (0.100 to 0.400)")
    assert (folded["loss"], folded["perplexity"], folded["seconds"]) == (
        "1.500",
        f"{(math.e + math.e**2) / 2:.3g}",
        "6.0",
    )
    assert folded["gap recovered"] == "+0.10 (-0.10 to +0.30)"
    assert cells(table([one]))[0]["gap recovered"] == first["gap recovered"]
    one.gap = None
    assert cells(table([one]))[0]["gap recovered"] == "–"


def test_the_table_has_what_a_head_is_judged_by(tmp_path: Path) -> None:
    rows = [
        classify.record(Example(str(i), ("x",), ("n", "p"), i % 2), np.array([i % 3 - 1.0, 0.0]))
        for i in range(12)
    ]
    one = system(tmp_path, "one", rows)
    one.evaluation.result.update(classify.metrics(rows))
    other = right(tmp_path, "other", 90)
    first, second = cells(table([one, other]))
    assert list(first)[:8] == [
        "system",
        "accuracy",
        "F1",
        "F1 macro",
        "precision",
        "recall",
        "MCC",
        "loss",
    ]
    for key, name in results.EXTRA.items():
        if name in first:
            assert first[name] == f"{one.result[key]:.3f}"
            assert second[name] == "–"
    assert "Pearson" not in first


def test_what_is_written_is_what_was_found(tmp_path: Path) -> None:
    one, other = right(tmp_path, "one", 90), right(tmp_path, "other", 30)
    one.gap = Gap("accuracy", True, "", 0.6, -math.inf, math.inf)
    one.versus = [compare(one, other)]
    said, about = ["one is above other."], {"title": "t", "command": "paw x=1", "seed": 7}
    write(tmp_path, [one, other], said, about, ["records/one.jsonl", "records/other.jsonl"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["said"], found["seed"]) == (said, 7)
    first, second = found["systems"]
    assert first["gap"] == {
        "of": "accuracy",
        "eligible": True,
        "reason": "",
        "recovered": 0.6,
        "low": None,
        "high": None,
    }
    assert (
        first["gap_by_likelihood"],
        second["gap"],
        first["gap_low"],
        first["gap_recovered"],
    ) == (None, None, None, 0.6)
    assert first["versus"][0]["difference"] == pytest.approx(0.3)
    assert (first["accuracy"], second["accuracy"], second["records"]) == (
        0.45,
        0.15,
        "records/other.jsonl",
    )
    assert first["artifacts"] == {"evaluate": str(one.evaluation.path)}
    with open(tmp_path / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["system"], float(r["accuracy"])) for r in rows] == [("one", 0.45), ("other", 0.15)]
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("# t\n\n    paw x=1\n\n- title: t\n- seed: 7\n\n| system")
    assert table([one, other]) in text
    assert "\n- one is above other.\n" in text


def test_records_come_back_from_a_run(tmp_path: Path) -> None:
    found = [right(tmp_path, "one", 90), right(tmp_path, "other", 30)]
    run = tmp_path / "run"
    run.mkdir()
    for form in ("jsonl", "parquet"):
        publish(run, found, form)
        write(
            run,
            found,
            [],
            {"title": "t", "command": "c"},
            [f"records/{s.name}.{form}" for s in found],
        )
        assert [(s.name, s.records) for s in read_run(str(run))] == [
            (s.name, s.records) for s in found
        ]
    (alone,) = read_run(str(found[0].evaluation.path))
    assert (alone.name, alone.records) == ("one", found[0].records)
    (alone,) = read_run(str(run / "records" / "other.jsonl"))
    assert (alone.name, alone.records) == ("other", found[1].records)
    (run / "records" / "one.parquet").unlink()
    with pytest.raises(DataError, match=r"one\.parquet: does not exist"):
        read_run(str(run))
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="has no records"):
        read_run(str(tmp_path / "none.jsonl"))


# ---- scores of questions ----------------------------------------------------------------------------


def test_a_question_is_answered_by_its_likeliest_choice_and_by_the_likeliest_a_character() -> None:
    question = Example("q", ("c",) * 3, (" ab", " abcd", " a"), 1)
    found = asked_record(question, [-4.0, -6.0, -4.0], [1, 2, 1])
    assert (found["prediction"], found["prediction_norm"], found["correct"]) == (
        0,
        1,
        False,
    )  # −2, −1.5, −4 a character
    assert (found["gold"], found["tokens"], found["loglikelihoods"]) == (
        1,
        [1, 2, 1],
        [-4.0, -6.0, -4.0],
    )
    assert asked_record(question, [-4.0, -3.0, -4.0], [1, 2, 1])["correct"] is True
    assert (
        asked_record(replace(question, continuations=(" ab",), gold=0), [-4.0], [1])["correct"]
        is None
    )


def test_figures_of_questions() -> None:
    """Loss is that of all tokens, not a mean of means; F1 is the named choice's."""
    answers = [
        (0, 0, 0, -1.0, 1),
        (0, 1, 0, -6.0, 2),
        (1, 1, 1, -2.0, 4),
        (1, 0, 1, -3.0, 1),
        (1, 1, 0, -4.0, 2),
    ]
    rows: list[dict[str, Any]] = [
        {
            "gold": g,
            "prediction": p,
            "prediction_norm": n,
            "correct": g == p,
            "loglikelihoods": [x, x],
            "tokens": [t, t],
        }
        for g, p, n, x, t in answers
    ]
    found = metrics(rows, positive=1)
    assert (found["n"], found["accuracy"], found["acc_norm"], found["loss"]) == (5, 0.6, 0.8, 1.6)
    assert found["perplexity"] == pytest.approx(math.exp(1.6))
    assert found["stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert (found["low"], found["high"]) == tuple(
        binomtest(3, 5).proportion_ci(0.95, method="wilson")
    )
    assert found["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert "unparsed" not in found
    assert "f1" not in metrics(rows)
    for i, row in enumerate(rows):
        row |= {"text": "x", "parsed": i > 1, "correct_flexible": i > 2}
    found = metrics(rows)
    assert (found["unparsed"], found["accuracy_flexible"]) == (2, 0.4)
    endless = metrics([{**rows[0], "loglikelihoods": [-1e5]}])
    assert (endless["perplexity"], endless["acc_norm"]) == (math.exp(700), None)


def test_figures_of_classes() -> None:
    """Means over the classes that occur, counted one by one; Matthews' correlation as the correlation of indicators."""
    rng = np.random.default_rng(0)
    for n, there in ((2, 2), (4, 3)):
        gold = [int(k) for k in rng.integers(0, there, 60)]
        found = [g if rng.random() < 0.5 else int(rng.integers(0, there)) for g in gold]
        one = classify.by_class(gold, found, n)
        hits = [sum(g == f == k for g, f in zip(gold, found, strict=True)) for k in range(there)]
        precision, recall = ([h / x.count(k) for k, h in enumerate(hits)] for x in (found, gold))
        assert one["precision"] == pytest.approx(np.mean(precision))
        assert one["recall"] == pytest.approx(np.mean(recall))
        f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
        assert one["f1_macro"] == pytest.approx(np.mean(f1))
        x, y = np.eye(n)[gold], np.eye(n)[found]
        x, y = x - x.mean(0), y - y.mean(0)
        assert one["mcc"] == pytest.approx((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))
        assert one.get("f1") == (pytest.approx(f1[1]) if n == 2 else None)
    assert (
        classify.by_class([0, 1, 1], [1, 1, 1], 2)["mcc"] == 0.0
    )  # one answer to all says nothing
    assert classify.by_class([0, 1, 1], [1, 1, 1], 2)["recall"] == 0.5
    assert classify.by_class([0, 1, 1], [2, 1, 1], 3)["recall"] == pytest.approx(
        1 / 3
    )  # what is only said has none
    assert classify.by_class([0, 0, 1], [0, 0, 0], 3)["precision"] == pytest.approx((2 / 3 + 0) / 2)


def test_a_record_of_a_head_has_the_classes_log_probabilities() -> None:
    question = Example("q", ("c",), ("a", "b", "c"), 2)
    found = classify.record(question, np.array([1.0, 3.0, 2.0], dtype=np.float32))
    total = sum(math.exp(x) for x in (1, 3, 2))
    assert found["loglikelihoods"] == pytest.approx(
        [math.log(math.exp(x) / total) for x in (1, 3, 2)]
    )
    assert (
        found["id"],
        found["gold"],
        found["prediction"],
        found["prediction_norm"],
        found["correct"],
    ) == ("q", 2, 1, 1, False)
    assert found["tokens"] == [1, 1, 1]
    assert classify.record(question, np.array([1.0, 2.0, 3.0]))["correct"] is True
    value = classify.record(
        replace(question, continuations=("value",), gold=0, value=2.5), np.array([4.0])
    )
    assert (value["prediction"], value["value"], value["loglikelihoods"], value["tokens"]) == (
        4.0,
        2.5,
        [-2.25],
        [1],
    )
    assert (value["correct"], value["gold"]) == (None, 0)


def test_figures_of_heads() -> None:
    logs = [[-0.1, -2.4], [-0.5, -0.9], [-1.2, -0.4], [-0.7, -0.7]]
    rows = [
        classify.record(Example("q", ("c",), ("n", "p"), g), np.array(x))
        for x, g in zip(logs, (0, 1, 1, 0), strict=True)
    ]
    found = classify.metrics(rows)
    assert (found["n"], found["accuracy"], found["acc_norm"]) == (4, 0.75, None)
    assert found["loss"] == pytest.approx(-np.mean([r["loglikelihoods"][r["gold"]] for r in rows]))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["stderr"] == pytest.approx(0.25)
    assert (found["low"], found["high"]) == tuple(
        binomtest(3, 4).proportion_ci(0.95, method="wilson")
    )
    assert found["f1"] == pytest.approx(2 / 3)
    for r in rows:
        r["loglikelihoods"] = [-1e4, -1e4]
    assert classify.metrics(rows)["perplexity"] == math.exp(700)


def valued(gold: float, said: float) -> dict[str, Any]:
    return classify.record(Example("q", ("c",), ("value",), 0, value=gold), np.array([said]))


def test_figures_of_values() -> None:
    gold, said = [1.0, 2.0, 3.0, 5.0], [1.5, 1.0, 4.0, 5.5]
    rows = [valued(g, s) for g, s in zip(gold, said, strict=True)]
    found = classify.metrics(rows)
    assert found["pearson"] == pytest.approx(pearsonr(gold, said)[0])
    assert found["spearman"] == pytest.approx(spearmanr(gold, said)[0]) == pytest.approx(0.8)
    assert found["loss"] == pytest.approx((0.25 + 1 + 1 + 0.25) / 4)
    assert (found["accuracy"], found["perplexity"], found["n"]) == (None, None, 4)
    for still in (gold, [3.0] * 4):  # where one of the two does not move there is no correlation
        answers = said if still != gold else [3.0] * 4
        flat = [valued(g, s) for g, s in zip(still, answers, strict=True)]
        assert (classify.metrics(flat)["pearson"], classify.metrics(flat)["spearman"]) == (0.0, 0.0)


def test_one_that_reads_nothing_knows_how_often_a_class_occurs() -> None:
    """One more of each class than was seen, so that none is impossible."""
    train = [Example(str(i), ("c",), ("a", "b", "c"), k) for i, k in enumerate([0, 0, 0, 1])]
    assert np.exp(classify.blind(train)) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    values = [
        Example(str(i), ("c",), ("value",), 0, value=v) for i, v in enumerate([1.0, 2.0, 6.0])
    ]
    assert classify.blind(values) == pytest.approx([3.0])


def test_batches_of_a_head_are_full_and_hold_every_row() -> None:
    lengths = [5, 9, 3, 9, 1, 4, 30, 2]
    found = list(classify.batches(lengths, 20))
    assert sorted(i for batch in found for i in batch) == list(range(8))
    assert found == [
        [6],
        [1, 3],
        [0, 5, 2, 7],
        [4],
    ]  # 9 + 9, 5 × 4; one that is longer than all stands alone


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Facts of two classes, three to one in the training split."""
    for split, n in (("train", 8), ("test", 12)):
        lines = (embedded("facts") / f"{split}.jsonl").read_text().splitlines()[:n]
        with open(tmp_path / f"{split}.jsonl", "w") as f:
            for i, r in enumerate(map(json.loads, lines)):
                kind = {
                    "labels": ["0", "1"],
                    "choices": ["other", "colour"],
                    "answer": str(int(i % 4 == 0)),
                }
                f.write(json.dumps({"id": r["id"], "question": r["question"], **kind}) + "\n")
    return tmp_path


def classified(
    folder: Path, *more: str, **inputs: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    c = compose_config(
        ["task=train", "dataset=own", f"dataset.path={folder}", "evaluate.mode=classify", *more]
    )
    stage = EvaluateStage(c.dataset, "test", c.evaluate, Runtime("float32"), train_split="train")
    files = {
        "model": embedded("tiny_llama"),
        "data": folder / "test.jsonl",
        "train": folder / "train.jsonl",
        **inputs,
    }
    out = folder / f"out{len(inputs)}{len(more)}"
    out.mkdir()
    return evaluate(
        stage, {k: Input(v, str(v)) for k, v in files.items()}, out, Silent()
    ), read_records(out)


def test_classes_without_an_adapter_are_guessed_from_the_training_split(classes: Path) -> None:
    result, rows = classified(classes)
    for r in rows:
        assert np.exp(r["loglikelihoods"]) == pytest.approx([7 / 10, 3 / 10])
    assert (result["n"], result["accuracy"]) == (12, 0.75)
    assert result["loss"] == pytest.approx(-(9 * math.log(0.7) + 3 * math.log(0.3)) / 12)


def test_classes_by_a_head_are_what_the_model_itself_says(classes: Path) -> None:
    """Of rows in batches of like lengths, each where it belongs."""
    import peft

    base, _ = load_classifier(embedded("tiny_llama"), Runtime("float32"), ["other", "colour"])
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    model = peft.get_peft_model(base, config)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(str(classes / "adapter"))
    stamp(classes / "adapter", str(embedded("tiny_llama")), classes=["other", "colour"])
    model.eval()
    tokenizer = load_tokenizer(embedded("tiny_llama"))
    for tokens in (64, 4096):
        result, rows = classified(
            classes,
            f"evaluate.batch_tokens={tokens}",
            *["seed=0"][: tokens > 64],
            adapter=classes / "adapter",
        )
        questions = [json.loads(line) for line in (classes / "test.jsonl").read_text().splitlines()]
        for r, q in zip(rows, questions, strict=True):
            prompt = compose_config(["dataset=own"]).dataset.prompt.replace(
                "{question}", q["question"]
            )
            with torch.inference_mode():
                logits = model(**tokenizer(prompt.rstrip(), return_tensors="pt")).logits[0].double()
            assert r["id"] == q["id"]
            assert r["loglikelihoods"] == pytest.approx(logits.log_softmax(-1).tolist(), abs=1e-4)
            assert r["gold"] == int(q["answer"])
        assert result["accuracy"] == pytest.approx(
            np.mean([r["prediction"] == r["gold"] for r in rows])
        )


# ---- from questions to scores -----------------------------------------------------------------------


def asked(
    out: Path, *overrides: str, runtime: Runtime | None = None
) -> tuple[EvaluateStage, dict[str, Any], Silent]:
    """The embedded facts, put to the tiny model."""
    c, watch = compose_config(["dataset=facts", *overrides]), Silent()
    stage = EvaluateStage(c.dataset, "test", c.evaluate, runtime or Runtime("float32"))
    facts = embedded("facts")
    files = {
        "model": embedded("tiny_llama"),
        "data": facts / "test.jsonl",
        "shots": facts / "train.jsonl",
    }
    return (
        stage,
        evaluate(stage, {k: Input(v, str(v)) for k, v in files.items()}, out, watch),
        watch,
    )


@pytest.mark.parametrize("shots", [0, 6])
def test_scores_are_those_of_whole_texts_run_alone(tmp_path: Path, shots: int) -> None:
    """Also where shots stand before all questions, and are computed once: a seeded draw, the same for all."""
    stage, result, watch = asked(
        tmp_path, f"evaluate.num_fewshot={shots}", "evaluate.limit=5", "evaluate.seed=3"
    )
    assert stage.engines._one._trees
    assert bool(stage.engines._one._past) is (shots > 0)
    assert not watch.said
    facts = embedded("facts")
    pool = examples(facts / "train.jsonl", stage.dataset, "train")
    before = "".join(f"{s.solved()}\n\n" for s in random.Random(3).sample(pool, shots))
    questions = sample(examples(facts / "test.jsonl", stage.dataset, "test"), 1.0, 5, 3)
    model, tokenizer = (
        load_model(embedded("tiny_llama"), Runtime("float32")),
        load_tokenizer(embedded("tiny_llama")),
    )
    rows = read_records(tmp_path)
    assert [r["id"] for r in rows] == [q.id for q in questions]
    for row, q in zip(rows, questions, strict=True):
        for context, continuation, said in zip(
            q.contexts, q.continuations, row["loglikelihoods"], strict=True
        ):
            start = len(tokenizer(before + str(context)).input_ids)
            ids = tokenizer(before + str(context) + continuation).input_ids
            with torch.inference_mode():
                logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            assert said == pytest.approx(
                sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids))), abs=1e-3
            )
    assert result["n"] == 5


def test_in_half_precision_packed_questions_are_trusted_too(tmp_path: Path) -> None:
    stage, _, watch = asked(tmp_path, "evaluate.limit=8", runtime=Runtime("bfloat16"))
    assert stage.engines._one._trees
    assert not watch.said


def test_a_batch_that_is_halved_keeps_every_question_in_its_order() -> None:
    trees = [tree([Encoded((1, i, 2, 3), 2)]) for i in range(10, 17)]
    for rows in ([[0], [1]], [[0, 1], [2, 3]], [[0, 1, 2]], [[0], [1, 2], [3], [4, 5, 6]]):
        whole = Scoring(tuple(tuple(trees[i] for i in row) for row in rows))
        halves = whole.halves()
        assert len(halves) == 2
        assert [t for half in halves for row in half.rows for t in row] == [
            t for row in whole.rows for t in row
        ]
        assert sum(map(len, halves)) == len(whole) == sum(map(len, rows))
        assert whole.tokens() == len(rows) * max(3 * len(row) for row in rows)
    assert Scoring(((trees[0],),)).halves() == []
    prompts = Writing(tuple((1,) * n for n in (4, 3, 2)), 5, ())
    assert prompts.tokens() == 3 * (4 + 5)
    assert [p for half in prompts.halves() for p in half.prompts] == list(prompts.prompts)
    assert Writing(prompts.prompts[:1], 5, ()).halves() == []


# ---- what a training's steps and validation weigh ---------------------------------------------------


def encoded(folder: Path, lengths: Sequence[int]) -> Rows:
    """Rows of these lengths on the disk, a third of each an answer; every token of a row is its number."""
    np.save(
        folder / IDS, np.concatenate([np.full(n, i, dtype=np.int32) for i, n in enumerate(lengths)])
    )
    np.save(folder / BOUNDS, np.cumsum([0, *lengths]))
    np.save(folder / STARTS, np.array([n - n // 3 for n in lengths], dtype=np.int32))
    np.save(folder / LABELS, np.zeros(len(lengths), dtype=np.float32))
    return Rows(folder)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_validation_counts_every_row_once_however_many_processes_share_it(
    tmp_path: Path, world: int
) -> None:
    lengths = [9, 30, 12, 6, 21, 3, 15, 18, 27]
    rows = encoded(tmp_path, lengths)
    each = [Validation(rows, Answers(0, False), 2, Share(rank, world)) for rank in range(world)]
    assert {v.counted for v in each} == {sum(n // 3 for n in lengths)}
    batches = [list(loader(v)) for v in each]
    assert {len(b) for b in batches} == {
        math.ceil(5 / world)
    }  # or sharded models would wait for each other
    weighed = [m for b in batches for m in b if m.weight]
    assert {m.weight for m in weighed} == {1.0}
    assert sorted(r.ids[0] for m in weighed for r in m.rows) == list(range(9))
    ordered = sorted(([len(r.ids) for r in m.rows] for m in weighed), reverse=True)
    assert ordered == [[30, 27], [21, 18], [15, 12], [9, 6], [3]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_goes_on_with_the_very_step_it_stopped_before(
    tmp_path: Path, packed: bool
) -> None:
    lengths = [3 * (1 + i * 7 % 11) for i in range(26)]
    rows, objective, share = encoded(tmp_path, lengths), Answers(0, packed), Share(0, 1, 2)

    def steps(first: int, count: int) -> list[Micro]:
        return list(itertools.islice(loader(Steps(rows, objective, 4, 5, share, first)), 2 * count))

    whole = steps(0, 14)
    assert [m.step for m in whole] == [i // 2 for i in range(28)]
    parts = [
        [(m.rows, m.weight, m.step, m.tokens) for m in found] for found in (steps(9, 5), whole[18:])
    ]
    assert parts[0] == parts[1]
    for one, two in zip(whole[::2], whole[1::2], strict=True):
        found = [len(r.ids) for m in (one, two) for r in m.rows]
        assert (len(found), one.tokens, two.tokens) == (4, sum(found), sum(found))
        assert one.weight == two.weight == pytest.approx(2 / sum(n // 3 for n in found))
        if packed:  # the longest first, each to what has least
            sizes = sorted(found, reverse=True)
            assert (
                abs(sum(len(r.ids) for r in one.rows) - sum(len(r.ids) for r in two.rows))
                <= sizes[0]
            )
            assert [len(m.rows[0].ids) for m in (one, two)] == sizes[:2]
        else:
            assert found == sorted(found, reverse=True)
            assert len(one.rows) == len(two.rows) == 2
    epochs = [sorted(r.ids[0] for m in whole[at : at + 12] for r in m.rows) for at in (0, 12)]
    assert all(
        len(set(e)) == 24 for e in epochs
    )  # six whole steps of 26 examples; which two stay out, chance decides
    assert per_epoch(3, 4) == 1


def test_a_second_sentence_is_told_by_token_types() -> None:
    """Of an encoder with random weights: rows filled up in a batch are what each is alone."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **size)).eval()
    model.bert.embeddings.token_type_embeddings.weight.data *= 20
    rows = [Encoded((1, 2, 3, 4, 5), 3), Encoded((6, 7), 1), Encoded((8, 9, 10), 3)]
    with torch.inference_mode():
        for pairs in (True, False):
            found = classify.class_logits(model, rows, 0, pairs)
            for row, logits in zip(rows, found, strict=True):
                types = [int(pairs and i >= row.start) for i in range(len(row.ids))]
                alone = model(
                    input_ids=torch.tensor([row.ids]), token_type_ids=torch.tensor([types])
                ).logits[0]
                assert torch.allclose(logits, alone, atol=1e-5)


def test_scores_that_are_not_finite_are_not_blamed_on_packing(tmp_path: Path) -> None:
    folder, facts = tmp_path / "broken", embedded("facts")
    shutil.copytree(embedded("tiny_llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    c, watch = compose_config(["dataset=facts", "evaluate.limit=3"]), Silent()
    stage = EvaluateStage(c.dataset, "test", c.evaluate, Runtime("float32"))
    files = {"model": folder, "data": facts / "test.jsonl"}
    first = sample(examples(facts / "test.jsonl", c.dataset, "test"), 1.0, 3, c.evaluate.seed)[0].id
    with pytest.raises(
        StageError, match=rf"the scores of 3 of 3 questions are not finite \(the first: {first}\)"
    ):
        evaluate(stage, {k: Input(v, str(v)) for k, v in files.items()}, tmp_path, watch)
    assert not watch.said


def test_what_is_written_a_prompt_at_a_time_is_what_is_written_in_batches() -> None:
    """The library's own generation is for models that packing does not suit; both go on behind the same prefix."""
    folder = embedded("tiny_llama")
    tokenizer = load_tokenizer(folder)
    prompts = [
        tuple(tokenizer(f"question : what color is {x} ? answer :").input_ids)
        for x in ("lupup", "bovin", "a bovin")
    ]
    prefix = tuple(tokenizer("the color of lupup is red . ").input_ids)
    own = Engine()
    about = Job(
        Input(folder, "tiny"), None, Runtime("float32"), False, tokenizer.pad_token_id, prefix
    )
    batch = Writing(tuple(p[1:] for p in prompts), 6, (".",))
    together = own.run(about, batch)
    assert all(together)
    own._trees = False
    assert own.run(about, batch) == together


@pytest.mark.slow
def test_two_devices_give_the_scores_of_one_and_say_when_one_is_gone(tmp_path: Path) -> None:
    """Two processes on the CPU, and more batches than processes, or none of them would be started."""
    found, watch = [], Silent()
    facts = embedded("facts")
    files = {"model": embedded("tiny_llama"), "data": facts / "test.jsonl"}
    for devices in (1, 2):
        c = compose_config(["dataset=facts", "evaluate.limit=40", "evaluate.batch_tokens=256"])
        stage = EvaluateStage(
            c.dataset, "test", c.evaluate, replace(Runtime("float32"), devices=devices)
        )
        evaluate(stage, {k: Input(v, str(v)) for k, v in files.items()}, tmp_path, watch)
        found.append([r["loglikelihoods"] for r in read_records(tmp_path)])
        assert len(stage.engines._workers) == (2 if devices == 2 else 0)
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    for process in stage.engines._workers[0]._processes.values():
        process.kill()
    with pytest.raises(StageError, match=r"the process of one device died.*hardware\.devices=1"):
        evaluate(stage, {k: Input(v, str(v)) for k, v in files.items()}, tmp_path, watch)
    stage.engines.release()


def test_every_system_has_a_file_of_its_own(tmp_path: Path) -> None:
    for several in (["a1", "a1"], ["x", "x", "x-2"], ["pair/7", "pair 7"]):
        found = [
            System(name, "tiny", artifact(tmp_path, "evaluate", cost(1.0, 1.0))) for name in several
        ]
        assert len(set(file_names(found, "jsonl"))) == len(several)


def test_a_head_of_other_classes_is_refused(classes: Path) -> None:
    (classes / "adapter").mkdir()
    stamp(classes / "adapter", "tiny", classes=["no", "yes"])
    with pytest.raises(
        AdapterError,
        match=r"its head knows 2 classes \(no, yes\), the data has 2 \(other, colour\)",
    ):
        classified(classes, adapter=classes / "adapter")


def test_questions_without_room_are_counted_or_stop_a_run(tmp_path: Path) -> None:
    rows = [
        json.loads(line) for line in (embedded("facts") / "test.jsonl").read_text().splitlines()[:3]
    ]
    rows[1]["question"] = "what " * 3000
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    c, watch = compose_config(["dataset=facts", "dataset.bad_rows=skip"]), Silent()
    stage = EvaluateStage(c.dataset, "test", c.evaluate, Runtime("float32"))
    result = evaluate(
        stage,
        {"model": Input(embedded("tiny_llama"), "m"), "data": Input(file, "d")},
        tmp_path,
        watch,
    )
    assert (result["n"], result["left_out"]) == (2, {"more tokens than the model has room for": 1})
    assert [r["id"] for r in read_records(tmp_path)] == [rows[0]["id"], rows[2]["id"]]
    assert "1" in watch.said[0]
    file.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match=r"no question fits into the model's \d+ tokens"):
        evaluate(
            stage,
            {"model": Input(embedded("tiny_llama"), "m"), "data": Input(file, "d")},
            tmp_path,
            watch,
        )


def test_the_last_number_of_many_is_the_answer() -> None:
    """A longer number counts as one, a single digit as well, and what follows #### only where that is asked for."""
    assert answers.flexible("first 10, then 20, so 30 apples") == "30"
    assert answers.flexible("10 and 7") == "7"
    assert answers.flexible("-3 or $1,250.50") == "$1,250.50"
    assert answers.flexible("none") is None
    assert (answers.strict("20 #### 30 #### 40"), answers.strict("30")) == ("30", None)
    assert answers.plain("so\n#### 1,250.") == answers.plain("$1250") == "1250"
    assert answers.until("a\n\nb Q: c", ("Q:", "\n\n")) == "a"
    assert answers.until("a b", ("Q:",)) == "a b"


def test_a_row_of_several_draws_is_of_all_of_them(tmp_path: Path) -> None:
    """The note under the table says: the mean, and the lowest to the highest."""
    draws = [right(tmp_path, f"draw {i}", 90, draw_of="draw") for i in range(2)]
    for draw, f1, ram in zip(draws, (0.2, 0.4), (100.0, 300.0), strict=True):
        draw.evaluation.result["f1"] = f1
        draw.evaluation.cost["ram_mib"] = ram
    draws[1].evaluation = replace(draws[1].evaluation, reused=True)
    [row] = cells(table(draws))
    assert row["F1"].startswith("0.300")
    assert row["RAM MiB"] == "300"
    assert row["stages"] == "partly reused"


def test_a_written_answer_is_read_strictly_and_loosely() -> None:
    """Equal to the gold number as the harness compares: not larger, and not an answer that is not there."""
    question = Example("q", ("c",), (" so 5\n#### 42",), 0)
    for text, strictly, loosely, parsed in (
        ("#### 42", True, True, True),
        ("it is 42", False, True, False),
        ("#### 41", False, False, True),
        ("#### 43 or 42", False, True, True),
        ("9", False, False, False),
        ("none", False, False, False),
    ):
        found = read_answer(question, text, False)
        assert (found["correct"], found["correct_flexible"], found["parsed"], found["text"]) == (
            strictly,
            loosely,
            parsed,
            text,
        )
    lettered = replace(question, continuations=(" A", " B", " C"), gold=1)
    for text, said in (("B. because", 1), ("(c)", 2), ("D.", None), ("", None)):
        found = read_answer(lettered, text, True)
        assert (found["prediction"], found["correct"], found["parsed"]) == (
            said,
            said == 1,
            said is not None,
        )


def test_as_many_shots_as_there_are_rows_may_be_shown(tmp_path: Path) -> None:
    lines = (embedded("facts") / "train.jsonl").read_text().splitlines()[:2]
    (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    files = {
        "model": embedded("tiny_llama"),
        "data": embedded("facts") / "test.jsonl",
        "shots": tmp_path / "train.jsonl",
    }
    for shots in (2, 3):
        c = compose_config(["dataset=facts", "evaluate.limit=2", f"evaluate.num_fewshot={shots}"])
        stage = EvaluateStage(c.dataset, "test", c.evaluate, Runtime("float32"))
        if shots == 2:
            assert (
                evaluate(
                    stage, {k: Input(v, str(v)) for k, v in files.items()}, tmp_path, Silent()
                )["n"]
                == 2
            )
            continue
        with pytest.raises(DataError, match=r"num_fewshot=3: .* has 2 rows only"):
            evaluate(stage, {k: Input(v, str(v)) for k, v in files.items()}, tmp_path, Silent())


def test_batches_are_as_full_as_their_budget_allows() -> None:
    """Longest first, so that little is filled up; the next row would not have fitted any more."""
    rng = random.Random(0)
    prompts = [tuple(range(rng.randrange(3, 40))) for _ in range(60)]
    plan, order = plan_writing(prompts, 2, 300, 10, ("x",))
    assert [len(prompts[i]) for i in order] == sorted(map(len, prompts), reverse=True)
    assert [p for b in plan for p in b.prompts] == [prompts[i][2:] for i in order]
    assert {(b.limit, b.stop) for b in plan} == {(10, ("x",))}
    for one, longest in ((b, max(map(len, b.prompts)) + 2) for b in plan[:-1]):
        assert len(one) * (longest + 10) <= 300 < (len(one) + 1) * (longest + 10)
    asked = [
        [Encoded(tuple(rng.randrange(5, 99) for _ in range(rng.randrange(4, 90))), 2)]
        for _ in range(80)
    ]
    scoring, order = plan_scoring(asked, 0, 600, 10**6)
    assert sorted(order) == list(range(80))
    for batch in scoring[:-1]:
        width = max(sum(map(len, row)) for row in batch.rows)
        assert len(batch.rows) * width <= 600 < (len(batch.rows) + 1) * width
    reads = [
        sum(t.reads for row in batch.rows for t in row)
        for batch in plan_scoring(asked, 0, 10**6, 150)[0]
    ]
    assert max(reads) <= 150


class Narrow(Engine):
    """A device with memory for forty tokens, whose score of a question is its second token."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[int] = []

    def _score(self, batch: Scoring) -> list[list[float]]:
        self.tried.append(batch.tokens())
        if batch.tokens() > 40:
            raise MemoryError
        return [[float(t.ids[1])] for row in batch.rows for t in row]


def test_what_does_not_fit_is_halved_and_so_is_all_that_comes_later() -> None:
    own = Narrow()
    batch = Scoring(
        tuple((tree([Encoded((1, i, 2, 3, 4, 5, 6, 7, 8, 9, 10), 2)]),) for i in range(20, 36))
    )
    assert batch.tokens() == 160
    for notes in (2, 0):
        own.notes, own.tried = [], []
        assert own._fitting(batch) == [[float(i)] for i in range(20, 36)]
        assert own._most == 40
        assert own.tried == ([160, 80, 40, 40, 40, 40] if notes else [40] * 4)
        assert own.notes == [
            f"out of memory: batches of at most {n} tokens from here (evaluate.batch_tokens sets it)"
            for n in (80, 40)[:notes]
        ]
    long = tree([Encoded(tuple(range(60)), 2)])
    with pytest.raises(StageError, match="one question of 59 tokens does not fit into memory"):
        Narrow()._fitting(Scoring(((long,),)))


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "does not fit into the memory of cpu"), (RuntimeError("other"), "^other$")],
)
def test_only_a_lack_of_memory_is_called_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr("paw.evaluation.engine.load_model", load)
    about = Job(Input(embedded("tiny_llama"), "tiny"), None, Runtime("float32"), False, 0)
    with pytest.raises(type(error) if said == "^other$" else StageError, match=said):
        Engine().run(about, Scoring(((tree([Encoded((1, 2, 3), 2)]),),)))
