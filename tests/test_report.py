"""What a run's folder says: every number and sentence is held against plain arithmetic."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from paw.errors import DataError
from paw.evaluation.modes.likelihood import calibrated
from paw.evaluation.result import EvaluateResult
from paw.evaluation.statistics import Gap, interval, standard_error
from paw.report.claims import Claim, Effect, Recovered, beside, comparisons_of, judge, recovered_by
from paw.report.compare import compare
from paw.report.files import Report, row, summarise, write
from paw.report.model import StepRow, System
from paw.report.records import file_names, publish, read_run
from paw.report.sentences import sentences
from paw.report.tables import EXTRA, steps_section, table
from paw.store import Artifact
from test_compare import Z95, records


def artifact(
    stage: str,
    seconds: float | None,
    ram: float | None,
    gpu: float | None = None,
    reused: bool = False,
    path: Path = Path("none"),
    result: Any = None,
) -> Artifact[Any]:
    cost = {"seconds": seconds, "ram_mib": ram, "gpu_mib": gpu}
    return Artifact(path, "key", "content", result, cost, reused, stage)


def figures(rows: list[dict[str, Any]]) -> EvaluateResult:
    loss = -sum(r["loglikelihoods"][0] for r in rows) / sum(r["tokens"][0] for r in rows)
    more: dict[str, Any] = {}
    if rows[0]["correct"] is not None:
        right = [float(r["correct"]) for r in rows]
        low, high = interval(int(sum(right)), len(rows))
        more = {"accuracy": np.mean(right), "stderr": standard_error(right)}
        more |= {"low": low, "high": high}
    return EvaluateResult(n=len(rows), loss=loss, perplexity=math.exp(loss), **more)


def system(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> System:
    """A system whose evaluation lies on the disk, its result computed from its records."""
    path = folder / name.replace(" ", "_")
    path.mkdir()
    (path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = artifact("evaluate", 3.0, 100.0, path=path, result=figures(rows))
    return System(name=name, model="tiny", evaluation=done, **more)


def right(
    folder: Path, name: str, count: int, log: Sequence[float] | None = None, **more: Any
) -> System:
    """The first `count` of 200 questions right."""
    logs = [-1.0] * 200 if log is None else log
    return system(folder, name, records(logs, [i < count for i in range(200)]), **more)


def recovered(system: System, share: float | None, low: float = 0, high: float = 1) -> Recovered:
    gap = Gap("accuracy", share is not None, "", share, low, high)
    return Recovered(system, gap, replace(gap, of="log-likelihood"))


def cells(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, by its head."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


# ---- sentences --------------------------------------------------------------------------------


def test_what_is_said_of_methods_and_draws(tmp_path: Path) -> None:
    """70 more right than the base is a gain, 40 fewer a harm, 2 fewer nothing shown.

    own − base is .5, of which .35 is .7.
    """
    base, own = right(tmp_path, "base", 60), right(tmp_path, "own", 160)
    method, worse = right(tmp_path, "method", 130), right(tmp_path, "worse", 100)
    draws = [
        right(tmp_path, f"random {i}", n, draw_of="random")
        for i, n in enumerate((58, 20, 90, 150, 62))
    ]
    claims = judge([method, worse, *draws], base=base, own=own)
    said = sentences(claims)
    low, high = (0.35 + sign * Z95 * math.sqrt(0.35 * 0.65 / 200) for sign in (-1, 1))
    first, *others = comparisons_of(method, claims)
    assert (first.difference, first.gained, first.lost) == (pytest.approx(0.35), 70, 0)
    assert first.p / binomtest(70, 70).pvalue == pytest.approx(1)
    assert (first.low, first.high) == (
        pytest.approx(low, abs=0.006),
        pytest.approx(high, abs=0.006),
    )
    assert said[0] == f"method: a gain over base, {first}."
    assert said[1] == f"worse: a gain over base, {comparisons_of(worse, claims)[0]}."
    assert said[2] == (
        "random, 5 draws: accuracy -0.200 to +0.450 against base; "
        "2 a gain, 1 harm, 2 no significant effect."
    )
    assert said[3] == f"method is above worse: {others[0]}."
    lowest = min(v.low for v in others[1:])
    assert lowest == pytest.approx(-0.1 - Z95 * math.sqrt(0.1 * 0.9 / 200), abs=0.006)
    assert said[4] == (
        "method is above 4 and below 1 of 5 draws of random: accuracy -0.100 to +0.550, "
        f"the lowest interval begins at {lowest:+.3f}."
    )
    assert len(said) == 5
    assert [v.versus for v in others] == ["worse", *(f"random {i}" for i in range(5))]
    found = recovered_by(method, claims)
    assert found is not None
    assert (found.gap.eligible, found.gap.recovered) == (True, pytest.approx(0.7))
    assert recovered_by(base, claims) is None
    # all thirteen comparisons count in Holm's adjustment: the clearest is multiplied by thirteen
    every = [v for s in (method, worse, *draws) for v in comparisons_of(s, claims)]
    clearest = min(every, key=lambda v: v.p)
    assert (len(every), first.versus) == (13, "base")
    assert clearest.p_holm / clearest.p == pytest.approx(13)


def two_classes(folder: Path, name: str, told: float, prior: float, **more: Any) -> System:
    """200 questions, half of each of two answers: by `told` nats a question's own answer is ahead
    of the other, but for noise, and by `prior` the second is everywhere."""
    noise = np.random.default_rng(5).normal(0, 1, 200)
    gold = [i % 2 for i in range(200)]
    margins = [told * (2 * g - 1) + prior + e for g, e in zip(gold, noise, strict=True)]
    logs = [[-2.0, -2.0 + margin] for margin in margins]
    rows = [
        {
            "id": str(i), "gold": g, "correct": int(np.argmax(both)) == g, "tokens": [1, 1],
            "loglikelihoods": both, "prediction_calibrated": best,
        }
        for i, (g, both, best) in enumerate(zip(gold, logs, calibrated(logs, gold), strict=True))
    ]  # fmt: skip
    return system(folder, name, rows, **more)


def test_a_gain_by_how_often_an_answer_is_given_is_called_that(tmp_path: Path) -> None:
    """The base says one answer only; a method that says both gains by accuracy, though it tells no
    more of them apart."""
    base, own = two_classes(tmp_path, "base", 0.6, 3), two_classes(tmp_path, "own", 3, 0)
    prior = two_classes(tmp_path, "prior", 0.6, 0, draw_of="prior")  # as a pipeline names it
    real = two_classes(tmp_path, "real", 2, 0, draw_of="real")
    drawn = two_classes(tmp_path, "drawn 1", 0.6, 0.1, draw_of="drawn")
    claims = judge([prior, real, drawn], base=base, own=own)
    found = [recovered_by(s, claims) for s in (prior, real)]
    assert found[0] is not None
    assert found[0].gap.recovered is not None
    assert found[0].gap.recovered > 0.3
    assert share_of(found[0]) == 0
    said = [s for s in sentences(claims) if "as often" in s]
    assert said == [
        "Of what prior gains nothing is shown to remain with every answer given as often as it is "
        "right: +0.00 of the gap [+0.00, +0.00]."
    ]
    report = Report(
        title="t", command="c", about={"dataset": "d"}, systems=[base, prior, real, own],
        records=["a", "b", "c", "d"], claims=claims,
    )  # fmt: skip
    assert report.verdict.endswith(
        "of the gap; with every answer given as often as it is right 0 % [0 %, 0 %]."
    )
    shown = cells(table(report.systems, claims))
    assert [c["calibrated"][:5] for c in shown] == ["–", "+0.00", f"{share_of(found[1]):+.2f}", "–"]
    summarise(tmp_path, report, {})
    assert "Calibrated is the gap recovered" in (tmp_path / "summary.md").read_text()
    write(tmp_path, report)
    lines = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    (line,) = [x for x in lines if x["system"] == "real"]
    assert float(line["gap_calibrated"]) == share_of(found[1])
    # an own adapter that gains so, too, leaves nothing to recover
    claims = judge([prior], base=base, own=two_classes(tmp_path, "other", 0.6, 0.2))
    assert any(
        s.startswith("With every answer given as often as it is right, there is no gap")
        for s in sentences(claims)
    )
    report = replace(report, systems=[prior], records=["a"], claims=claims)
    assert report.verdict.endswith(
        "with every answer given as often as it is right there is no gap."
    )
    # where questions have choices of their own there is no such column
    plain = [right(tmp_path, name, n) for name, n in (("b", 60), ("m", 130), ("o", 160))]
    others = judge(plain[1:2], base=plain[0], own=plain[2])
    assert "calibrated" not in cells(table(plain, others))[0]


def share_of(found: Recovered | None) -> float:
    assert found is not None
    assert found.calibrated is not None
    assert found.calibrated.recovered is not None
    return found.calibrated.recovered


def test_what_is_said_where_accuracy_has_no_gap(tmp_path: Path) -> None:
    """Then the gold answers' likelihood decides.

    Of a gap of 1 nat half is recovered, by draws −.1 and .2 of it.
    """
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
    claims = judge([method, twin, best, *draws], base=base, own=own)
    said = sentences(claims)
    assert said[0] == (
        "Not eligible: by accuracy there is no gap to recover "
        "(own − base is +0.000, interval [+0.000, +0.000])."
    )
    assert said[1].startswith("method: no significant effect versus base, +0.000 accuracy")
    found = recovered_by(method, claims)
    assert found is not None
    gap, share = found.by_likelihood, 0.5 + noise.mean()
    assert gap.recovered == pytest.approx(share)
    by_likelihood = "By the gold answers' log-likelihood per token,"
    recovers = f"{share:+.2f} of the gap [{gap.low:+.2f}, {gap.high:+.2f}]."
    assert f"{by_likelihood} method recovers {recovers}" in said
    assert f"{by_likelihood} random, 2 draws, recover -0.10 to +0.20 of the gap." in said
    assert {v.of for v in comparisons_of(method, claims)[1:]} == {"log-likelihood"}
    assert said[-3].startswith(
        "method is not significantly different from twin: +0.000 log-likelihood"
    )
    assert said[-2].startswith("method is below best: -0.300 log-likelihood")
    assert said[-1].startswith(
        "method is above 2 and below 0 of 2 draws of random: log-likelihood +"
    )
    # a base that is better already has none by likelihood either
    assert sentences(judge([best], base=method, own=best))[0].startswith("Not eligible")
    nothing = sentences(judge([twin, *draws], base=base, own=base))
    assert f"{by_likelihood} twin has no gap to recover." in nothing
    assert f"{by_likelihood} random has no gap to recover." in nothing
    assert judge([], base=base, own=own) == []


def test_adapters_beside_their_base(tmp_path: Path) -> None:
    base = right(tmp_path, "base", 100)
    found = [right(tmp_path, "good", 150), right(tmp_path, "bad", 60), right(tmp_path, "same", 100)]
    claims = beside(base, found)
    good, bad, same = (c for s in found for c in comparisons_of(s, claims))
    assert sentences(claims) == [
        f"good: a gain over base, {good}.",
        f"bad: harm to base, {bad}.",
        f"same: no significant effect versus base, {same}.",
    ]
    assert [v.difference for v in (good, bad, same)] == pytest.approx([0.25, -0.2, 0.0])
    assert bad.p_holm / bad.p == pytest.approx(2)


# ---- tables and files -------------------------------------------------------------------------


def test_a_row_has_what_all_of_its_stages_cost(tmp_path: Path) -> None:
    made = [artifact("train", 10.5, 900.0, 50.0, reused=True), artifact("transfer", None, None)]
    one = right(tmp_path, "one", 90, made=made, coverage=0.5)
    found = row(one, [])
    costs = (found["seconds"], found["ram_mib"], found["gpu_mib"], found["coverage"])
    assert costs == (13.5, 900.0, 50.0, 0.5)
    assert found["made"] == "train:reused transfer:computed evaluate:computed"
    names = (found["system"], found["draw_of"], found["accuracy"], found["n"])
    assert names == ("one", "one", 0.45, 200)
    assert (found["gap_recovered"], found["gap_low"], found["gap_high"]) == (None, None, None)
    one = replace(one, draw_of="some")
    found = row(one, [recovered(one, 0.6, 0.4, math.inf)])
    gap = (found["gap_recovered"], found["gap_low"], found["gap_high"], found["draw_of"])
    assert gap == (0.6, 0.4, math.inf, "some")
    assert row(right(tmp_path, "two", 90), [])["gpu_mib"] is None
    zero = right(tmp_path, "three", 90, made=[artifact("train", 1.0, 1.0, 0.0)])
    assert row(zero, [])["gpu_mib"] == 0.0


def test_figures_that_do_not_apply_are_absent_or_empty(tmp_path: Path) -> None:
    """Eight are always there; the others come after them, in one order."""
    one = right(tmp_path, "one", 90)
    always = ["n", "accuracy", "stderr", "low", "high", "acc_norm", "loss", "perplexity"]
    assert list(row(one, []))[3:-8] == always
    more: dict[str, Any] = {"acc_calibrated": 0.7, "unparsed": 0, "accuracy_flexible": 0.5}
    more |= {"precision": 0.0}
    more |= {"recall": 0.1, "f1_macro": 0.2, "mcc": 0.3, "f1": 0.4, "pearson": 0.5}
    more |= {"spearman": 0.6, "left_out": {"too long": 2}}
    full = replace(one, evaluation=replace(one.evaluation, result=replace(one.result, **more)))
    found = row(full, [])
    assert list(found)[3:-8] == [*always, *more]
    assert {key: found[key] for key in more} == more
    assert set(asdict(one.result)) == {*always, *more}


def test_the_table_has_the_numbers(tmp_path: Path) -> None:
    made = [artifact("train", 10.5, 900.0, 50.0, reused=True)]
    one = right(tmp_path, "one", 90, log=[-0.5] * 200, made=made, coverage=0.5)
    bare = system(tmp_path, "bare", records([-2.0] * 200, tokens=4))
    draws = [
        right(tmp_path, f"draw {i}", n, log=[x] * 200, draw_of="draw")
        for i, (n, x) in enumerate(((20, -1.0), (80, -2.0)))
    ]
    claims: list[Claim] = [recovered(one, 0.6, 0.4, 0.8), recovered(bare, None)]
    claims += [recovered(draw, x) for draw, x in zip(draws, (-0.1, 0.3), strict=True)]
    first, second, folded = cells(table([one, bare, *draws], claims))
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
    assert (second["accuracy"], second["loss"], second["GPU MiB"]) == ("–", "0.500", "–")
    assert second["gap recovered"] == "not eligible"
    assert (second["coverage"], second["stages"]) == ("–", "computed")
    assert (folded["system"], folded["accuracy"]) == ("draw, 2 draws", "0.250 (0.100 to 0.400)")
    assert (folded["loss"], folded["seconds"]) == ("1.500", "6.0")
    assert folded["perplexity"] == f"{(math.e + math.e**2) / 2:.3g}"
    assert folded["gap recovered"] == "+0.10 (-0.10 to +0.30)"
    assert cells(table([one], claims))[0]["gap recovered"] == first["gap recovered"]
    assert cells(table([one], []))[0]["gap recovered"] == "–"


def test_the_table_has_what_a_head_is_judged_by(tmp_path: Path) -> None:
    keys = ("f1", "f1_macro", "precision", "recall", "mcc")
    head = {key: 0.1 + 0.1 * i for i, key in enumerate(keys)}
    one, other = right(tmp_path, "one", 80), right(tmp_path, "other", 90)
    one = replace(one, evaluation=replace(one.evaluation, result=replace(one.result, **head)))
    first, second = cells(table([one, other], []))
    names = ["F1", "F1 macro", "precision", "recall", "MCC"]
    assert list(first)[:8] == ["system", "accuracy", *names, "loss"]
    for key, name in EXTRA.items():
        if name in first:
            assert first[name] == f"{head[key]:.3f}"
            assert second[name] == "–"
    assert "Pearson" not in first


def test_a_row_of_several_draws_is_of_all_of_them(tmp_path: Path) -> None:
    """The note under the table says: the mean, and the lowest to the highest."""
    one, other = (right(tmp_path, f"draw {i}", 90, draw_of="draw") for i in range(2))
    draws = [
        replace(
            draw,
            evaluation=replace(
                draw.evaluation,
                result=replace(draw.result, f1=f1),
                cost=draw.evaluation.cost | {"ram_mib": ram},
                reused=reused,
            ),
        )
        for draw, f1, ram, reused in ((one, 0.2, 100.0, False), (other, 0.4, 300.0, True))
    ]
    [found] = cells(table(draws, []))
    assert found["F1"] == "0.300 (0.200 to 0.400)"
    assert found["RAM MiB"] == "300"
    assert found["stages"] == "partly reused"


OWN = StepRow(
    name="own",
    stage="train",
    state="computed",
    seconds=10.25,
    ram_mib=900.0,
    gpu_mib=64.0,
    cpu_percent=180.0,
    gpu_percent=92.0,
    needs=["rows", "base"],
)
STEPS = [
    StepRow(name="rows", stage="encode", state="reused", seconds=2.0, ram_mib=50.4, text="3 rows"),
    OWN,
    StepRow(name="moved", stage="transfer", state="failed", needs=["own"], text="does not fit"),
    StepRow(name="scores", stage="evaluate", state="left out", needs=["moved"], text="no moved"),
    StepRow(name="alone", stage="evaluate", state="computed", seconds=1.0, ram_mib=10.0),
]


def test_steps_show_the_flow_and_what_was_saved() -> None:
    wrong, found, total = steps_section(STEPS).split("\n\n")
    assert wrong == "- failed: moved: does not fit\n- left out: scores: no moved"
    rows, own, moved, scores, alone = cells(found)
    assert own == {
        "step": "own",
        "from": "rows, base",
        "state": "computed",
        "seconds": "10.2",
        "RAM MiB": "900",
        "GPU MiB": "64",
        "CPU %": "180",
        "GPU %": "92",
    }
    assert (rows["from"], rows["state"], rows["RAM MiB"]) == ("–", "reused", "50")
    assert (moved["state"], moved["seconds"], scores["state"]) == ("failed", "–", "left out")
    assert (alone["GPU MiB"], alone["CPU %"], alone["GPU %"]) == ("–", "–", "–")
    assert total == "Computed now: 11.2 s in 2 steps; reused: 1 step that had cost 2.0 s."
    well = steps_section([OWN])
    assert well.startswith("| step")
    assert well.endswith("\n\nComputed now: 10.2 s in 1 step.")


def test_what_is_written_is_what_was_found(tmp_path: Path) -> None:
    one, other = right(tmp_path, "one", 90), right(tmp_path, "other", 30)
    claims = [recovered(one, 0.6, -math.inf, math.inf), Effect(one, compare(one, other))]
    report = Report(
        title="t",
        command="paw x=1",
        about={"seed": 7},
        systems=[one, other],
        records=["records/one.jsonl", "records/other.jsonl"],
        claims=claims,
        warnings=["mind"],
        remarks=["Unfinished: no room."],
        steps=STEPS,
    )
    write(tmp_path, report)
    summarise(tmp_path, report, {"Systems": "figures/systems.png"})
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == ["title", "command", "seed", "method", "said", "systems", "steps"]
    said = ["Warning: mind", "Unfinished: no room.", *sentences(claims)]
    assert (found["said"], found["seed"], len(said)) == (said, 7, 3)
    first, second = found["systems"]
    gap = {"of": "accuracy", "eligible": True, "reason": "", "recovered": 0.6}
    assert first["gap"] == {**gap, "low": None, "high": None}
    assert first["gap_by_likelihood"]["of"] == "log-likelihood"
    assert (second["gap"], second["gap_by_likelihood"], second["versus"]) == (None, None, [])
    assert (first["gap_low"], first["gap_recovered"]) == (None, 0.6)
    assert first["versus"] == [compare(one, other).plain()]
    assert first["versus"][0]["difference"] == pytest.approx(0.3)
    assert (first["accuracy"], second["accuracy"]) == (0.45, 0.15)
    assert second["records"] == "records/other.jsonl"
    assert first["artifacts"] == {"evaluate": str(one.evaluation.path)}
    assert found["steps"] == [{**asdict(s), "needs": list(s.needs)} for s in STEPS]
    with open(tmp_path / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["system"], float(r["accuracy"])) for r in rows] == [("one", 0.45), ("other", 0.15)]
    text = (tmp_path / "summary.md").read_text()
    head = "# t\n\n**Unfinished: no room.**\n\n    paw x=1\n\n- seed: 7\n\n| system"
    assert text.startswith(head)
    assert "\n\n## Figures\n\n![Systems](figures/systems.png)\n\n" in text
    assert table([one, other], claims) in text
    assert "\n- Warning: mind\n- Unfinished: no room.\n- one: a gain over other," in text
    assert text.endswith(f"\n\n## Steps\n\n{steps_section(STEPS)}\n")


def test_a_run_without_systems_has_its_steps(tmp_path: Path) -> None:
    report = Report(title="transfer", command="c", about={}, steps=STEPS)
    write(tmp_path, report)
    summarise(tmp_path, report, {})
    assert (tmp_path / "summary.md").read_text().startswith("# transfer\n\n    c\n\n## Steps\n\n")
    assert json.loads((tmp_path / "results.json").read_text())["systems"] == []
    assert not (tmp_path / "results.csv").exists()


def test_the_verdict_is_one_sentence_with_its_interval(tmp_path: Path) -> None:
    one, other = right(tmp_path, "target + one", 90), right(tmp_path, "other", 30)
    claims = [recovered(one, 0.6, 0.5, 0.75), Effect(one, compare(one, other))]

    def said(*claims: Claim, remarks: Sequence[str] = ()) -> str:
        return Report(
            title="t", command="c", about={}, systems=[other, one], records=["a", "b"],
            claims=claims, remarks=remarks,
        ).verdict  # fmt: skip

    assert said(*claims) == "one recovers 60 % [50 %, 75 %] of the gap."
    assert said(*claims, remarks=["Unfinished: no room."]) == "Unfinished: no room."
    two = replace(recovered(other, 0.2, 0.1, 0.3))
    assert said(two, *claims).startswith("other recovers 20 %")  # what is judged first
    assert said(claims[1]).startswith("target + one: a gain over other, +0.300 accuracy")
    assert said(remarks=["It merged. And more."]) == "It merged."
    assert said() == ""


def test_a_table_leaves_out_what_says_least_where_it_is_too_wide(tmp_path: Path) -> None:
    found = [right(tmp_path, "one", 90), right(tmp_path, "other", 30)]
    whole, narrow = table(found, []), table(found, [], 100)
    heads = [cell.strip() for cell in narrow.partition("\n")[0].strip("|").split("|")]
    assert max(map(len, narrow.splitlines())) <= 100 < len(whole.partition("\n")[0])
    assert heads[:2] == ["system", "accuracy"]
    assert "GPU MiB" not in heads
    assert "gap recovered" not in heads  # nobody has one
    judged = table(found, [recovered(found[0], 0.6, 0.5, 0.75)], 100)
    assert "| gap recovered" in judged


def test_records_come_back_from_a_run(tmp_path: Path) -> None:
    found = [right(tmp_path, "one", 90), right(tmp_path, "other", 30)]
    run = tmp_path / "run"
    run.mkdir()
    for form in ("jsonl", "parquet"):
        files = publish(run, found, form)
        assert files == [f"records/{s.name}.{form}" for s in found]
        write(run, Report(title="t", command="c", about={}, systems=found, records=files))
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


def test_every_system_has_a_file_of_its_own() -> None:
    done = artifact("evaluate", 1.0, 1.0)
    for several in (["a1", "a1"], ["x", "x", "x-2"], ["pair/7", "pair 7"]):
        found = [System(name=name, model="tiny", evaluation=done) for name in several]
        assert len(set(file_names(found, "jsonl"))) == len(several)
