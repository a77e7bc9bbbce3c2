"""Two systems on the same questions: what a difference, and a gap recovered, allow to be said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_rel
from statsmodels.stats.multitest import multipletests

from conftest import Launch
from paw.errors import ConfigError, DataError
from paw.evaluation.statistics import gap_recovered, holm, interval, mcnemar, paired_t
from paw.report.compare import adjust, compare
from paw.report.records import Recorded, file_names, paired, read_run

Z95 = 1.959964  # standard errors on either side of a mean that hold 95 % of a normal


def records(logs: Any, correct: Any = None, tokens: int = 1) -> list[dict[str, Any]]:
    """Questions of one answer each, with the log-likelihoods given; or right and wrong."""
    found = [None] * len(logs) if correct is None else [bool(c) for c in correct]
    rest = {"gold": 0, "prediction": 0, "tokens": [tokens]}
    return [
        {"id": str(i), "correct": c, "loglikelihoods": [float(x)], **rest}
        for i, (x, c) in enumerate(zip(logs, found, strict=True))
    ]


def answered(correct: list[bool]) -> list[dict[str, Any]]:
    return records([-1.0] * len(correct), correct)


def test_a_difference_that_one_test_shows_and_many_do_not() -> None:
    """30 wins and 14 losses: p = .02 alone, nothing among five comparisons."""
    before = Recorded("base", answered([False] * 30 + [True] * 14 + [True] * 56))
    after = Recorded("adapter", answered([True] * 30 + [False] * 14 + [True] * 56))
    one = compare(after, before)
    assert (one.gained, one.lost, one.of) == (30, 14, "accuracy")
    assert one.low > 0
    assert 0.01 < one.p < 0.05
    assert adjust([one]) == [one]
    assert one.verdict == 1
    assert "after Holm" not in str(one)
    many = adjust([one] * 5)
    assert {m.verdict for m in many} == {0}
    assert "after Holm" in str(many[0])
    assert one.verdict == 1, "what is adjusted is a new comparison"


def test_a_difference_has_the_interval_of_95_percent() -> None:
    """That of theory, mean ± 1.96 standard errors; one of 90 % would be a sixth narrower."""
    rng = np.random.default_rng(0)
    before = rng.normal(-2.0, 1.0, 400)
    after = before + rng.normal(0.2, 0.5, 400)
    found = compare(Recorded("after", records(after)), Recorded("before", records(before)))
    error = (after - before).std() / math.sqrt(400)
    assert found.difference == pytest.approx((after - before).mean())
    assert found.difference - found.low == pytest.approx(Z95 * error, rel=0.05)
    assert found.high - found.difference == pytest.approx(Z95 * error, rel=0.05)


def test_a_difference_that_touches_0_or_a_p_of_5_percent_tells_nothing() -> None:
    one = compare(Recorded("a", answered([True])), Recorded("b", answered([True])))
    clear = replace(one, low=0.01, high=0.2, p_holm=0.049)
    assert clear.verdict == 1
    assert replace(clear, low=-0.2, high=-0.01).verdict == -1
    for low, high, p in ((0.0, 0.2, 0), (0.01, 0.2, 0.05), (-0.2, 0.0, 0), (-0.1, 0.2, 0)):
        assert replace(clear, low=low, high=high, p_holm=p).verdict == 0


def test_likelihoods_are_per_token_and_stand_in_where_one_side_has_no_accuracy() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(-6, 1, 50), rng.normal(-4, 1, 50)
    judged = Recorded("a", records(after, [True] * 50, tokens=4))
    found = compare(judged, Recorded("b", records(before, tokens=2)))
    assert (found.of, found.versus, found.n) == ("log-likelihood", "b", 50)
    assert found.difference == pytest.approx((after / 4 - before / 2).mean())
    assert list(found.plain()) == ["versus", "of", "n", "difference", "low", "high", "p", "p_holm"]
    some = Recorded("b", records(before, [True] * 50))
    some.records[7]["correct"] = None  # one question without choices: no accuracy of the whole
    assert compare(judged, some).of == "log-likelihood"
    assert str(found) == (
        f"{found.difference:+.3f} log-likelihood [{found.low:+.3f}, {found.high:+.3f}], "
        f"p = {found.p:.2g}"
    )


def test_a_gap_recovered_has_the_interval_of_95_percent() -> None:
    """That of theory for a ratio of means of paired samples (delta method)."""
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


def test_a_gap_under_three_points_is_none_however_sure_it_is() -> None:
    """Of 3000 questions 60 more right is sure, and two points; 120 are four.

    A likelihood has no such limit.
    """
    base = np.zeros(3000)
    for more, eligible in ((60, False), (120, True)):
        own = (np.arange(3000) < more).astype(float)
        found = gap_recovered(base, own, own, "accuracy")
        assert found.eligible is eligible
        assert found.reason == ("" if eligible else "own − base is +0.020, under 0.03")
        assert gap_recovered(base, own, own, "log-likelihood").eligible


def test_harm_and_likelihood() -> None:
    before = Recorded("base", answered([True] * 60))
    after = Recorded("adapter", records([-1.0 - 0.5 * (i % 3) for i in range(60)], [False] * 60))
    found = adjust([compare(after, before), compare(after, before, by_likelihood=True)])
    assert [f.verdict for f in found] == [-1, -1]
    assert [f.of for f in found] == ["accuracy", "log-likelihood"]
    assert found[1].difference == pytest.approx(-0.5)
    same = compare(before, before)
    assert (same.difference, same.p, same.verdict) == (0.0, 1.0, 0)


def test_only_shared_questions_are_compared() -> None:
    a, b = Recorded("a", answered([True] * 5)), Recorded("b", answered([True] * 8)[::-1])
    x, y = paired(a, b)
    assert [r["id"] for r in x.records] == [r["id"] for r in y.records] == list("01234")
    with pytest.raises(DataError, match="no question in common"):
        paired(a, Recorded("c", [r | {"id": "x" + r["id"]} for r in b.records]))
    with pytest.raises(DataError, match="another answer for question 0"):
        paired(a, Recorded("c", [r | {"gold": 1} for r in b.records]))


def test_files_of_records(tmp_path: Path) -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    names = ["target + random", "target/random", "é"]
    assert file_names([Named(n) for n in names], "jsonl") == [  # type: ignore[arg-type]
        "records/target_random.jsonl",
        "records/target_random-2.jsonl",
        "records/system.jsonl",
    ]
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: is no record"):
        read_run(str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match="no run folder"):
        read_run(str(tmp_path))


@pytest.mark.slow
def test_two_runs_compared_from_the_command_line(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["task=evaluate", "dataset=facts", "evaluate.limit=60"]
    launch(*common, "models=[tiny_llama]", "name=a", "evaluate.records=parquet")
    launch(*common, "models=[tiny_qwen2]", "name=b")
    prompt = 'dataset.prompt="truth : question : {question} answer :"'
    launch(*common, "models=[tiny_qwen2]", prompt, "name=c")
    a, b, c = (str(next((tmp_path / "outputs" / "runs").glob(f"*_{n}"))) for n in "abc")
    assert (Path(a) / "records" / "tiny_llama.parquet").is_file()
    assert len((Path(b) / "records" / "tiny_qwen2.jsonl").read_text().splitlines()) == 60
    capsys.readouterr()
    launch("task=compare", f"runs=[{a},{b}]")
    assert "no significant difference" in capsys.readouterr().out
    launch("task=compare", f"runs=[{b},{c}]", "name=d")
    assert "| above" in capsys.readouterr().out
    found = json.loads(next((tmp_path / "outputs" / "runs").glob("*_d/compare.json")).read_text())
    assert [f["of"] for f in found] == ["accuracy", "log-likelihood"]
    assert found[0]["low"] > 0.3
    assert found[0]["p"] < 1e-6
    assert np.isfinite(found[1]["difference"])
    with pytest.raises(ConfigError, match="one system only"):
        launch("task=compare", f"runs=[{a}]")
    with pytest.raises(ConfigError, match=r"runs=\[RUN_A,RUN_B\]"):
        launch("task=compare")


@given(st.integers(1, 500), st.data())
def test_intervals_and_exact_tests_are_scipys(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert interval(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    before = [False] * right + [True] * (n - right)
    gained, lost, p = mcnemar(before, [not x for x in before])
    assert (gained, lost) == (right, n - right)
    assert p == pytest.approx(binomtest(right, n).pvalue, rel=1e-9)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=60), st.floats(0.01, 1))
def test_the_paired_t_test_is_scipys(values: list[float], size: float) -> None:
    before = np.asarray(values)
    after = before + size * np.sin(np.arange(len(values)))
    assert paired_t(before, after) == pytest.approx(ttest_rel(after, before).pvalue, rel=1e-6)


@settings(max_examples=20)  # statsmodels takes a tenth of a second each time
@given(st.lists(st.floats(0, 1), max_size=30))
def test_holms_adjustment_is_statsmodels(values: list[float]) -> None:
    expected = list(multipletests(values, method="holm")[1]) if values else []
    assert holm(values) == pytest.approx(expected, abs=1e-12)
