"""What a sweep's report says, held against sweeps whose numbers are known."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_rel
from statsmodels.stats.multitest import multipletests

from browser import opened
from conftest import Paw
from paw.errors import ConfigError
from paw.evaluation.statistics import resampled_means
from paw.report.claims import judge
from paw.report.compare import compare
from paw.report.files import Report, write
from paw.report.model import System
from paw.report.records import Recorded, file_names, publish, read_run
from paw.sweeps import best, table
from paw.sweeps.best import LIKELIHOOD, Answer, answers
from paw.sweeps.folder import Job, State, read, set_state, write_jobs
from paw.sweeps.report import report
from paw.sweeps.table import Row, numbers, rows
from paw.tasks import report as task
from test_report import cells, system

N = 200  # questions
BASE, OWN = 40, 140  # of them right: the gap is 100 questions, .5 of accuracy
KEY = "transfer.similarity_threshold"


# ---- sweeps that are made up ----------------------------------------------------------------


def questions(right: int, log: float = 0.0) -> list[dict[str, Any]]:
    """The first `right` questions right; the gold answer's log-likelihood follows, about `log`
    higher."""
    return [
        {
            "id": f"q{i}",
            "gold": 0,
            "prediction": 0,
            "correct": i < right,
            "loglikelihoods": [(-1.0 if i < right else -2.0) + log * (1 + i % 2 / 10), -1.5],
            "tokens": [1, 1],
        }
        for i in range(N)
    ]


def job(
    folder: Path,
    number: int,
    *,
    pair: str = "a b",
    method: str = "procrustes",
    seed: int = 0,
    more: Sequence[str] = (),
) -> Job:
    """As it is launched."""
    source, target = pair.split()
    asked = [f"model@source={source}", f"model@target={target}", "dataset=facts"]
    asked += [f"transfer={method}", f"seed={seed}", *more]
    return Job(number=number, overrides=asked, folder=folder / f"{number}_{source}-{target}")


def measure(
    job: Job,
    moved: dict[str, list[dict[str, Any]]],
    *,
    base: list[dict[str, Any]] | None = None,
    own: list[dict[str, Any]] | None = None,
    scratch: Path,
) -> None:
    """What a run of task=pipeline leaves, by the functions that a run leaves it by.

    Args:
        moved: records by the name of the system; draws of a placebo are numbered.
    """
    asked = dict(text.split("=", 1) for text in job.overrides)
    scratch = scratch / job.folder.parent.name / str(job.number)
    scratch.mkdir(parents=True)
    job.folder.mkdir(parents=True, exist_ok=True)

    def made(name: str, records: list[dict[str, Any]], **rest: Any) -> System:
        return system(scratch, name, records, **rest)

    bare = made("target base", base or questions(BASE))
    own_adapter = made("target + own adapter", own or questions(OWN))
    others = []
    for name, records in moved.items():
        group = f"target + {name.rstrip(' 0123456789')}"
        others.append(made(f"target + {name}", records, draw_of=group, coverage=0.75))
    systems = [bare, *others, own_adapter]
    found = Report(
        title="pipeline",
        command="python -m paw.run",
        about={"seed": int(asked["seed"])},
        systems=systems,
        records=file_names(systems, "jsonl"),
        claims=judge(others, base=bare, own=own_adapter),
    )
    write(job.folder, found)
    publish(job.folder, systems, "jsonl")
    config: dict[str, Any] = {
        "seed": int(asked["seed"]),
        "source": {"name": asked["model@source"]},
        "target": {"name": asked["model@target"]},
        "dataset": {"name": "facts"},
        "transfer": {"method": asked["transfer"], "similarity_threshold": 1e-4},
    }
    if KEY in asked:
        config["transfer"]["similarity_threshold"] = float(asked[KEY])
    (job.folder / "config.yaml").write_text(yaml.safe_dump(config))
    set_state(job.folder, State(state="done"))


def launched(folder: Path, jobs: Sequence[Job]) -> Path:
    write_jobs(folder, "python -m paw.run -m …", "in this process", jobs)
    return folder


RIGHT = {  # questions right by pair, method and threshold, at seeds 0, 1 and 2
    ("a b", "procrustes", "0.1"): (90, 100, 110),
    ("a b", "procrustes", "0.2"): (90, 100, 110),  # the same adapters: this gate closes nothing
    ("a b", "ridge", "0.1"): (60, 70, 80),
    ("a b", "ridge", "0.2"): (50, 50, 50),
    ("b a", "procrustes", "0.1"): (41, 41, 42),
    ("b a", "procrustes", "0.2"): (41, 41, 41),
    ("b a", "ridge", "0.1"): (40, 41, 40),
    ("b a", "ridge", "0.2"): (),  # failed, queued and running
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs, two methods with three draws of a placebo, two thresholds, three seeds; of one
    configuration a job failed, one waits and one runs."""
    root = tmp_path_factory.mktemp("made")
    folder, jobs = root / "sweep", []
    for (pair, method, threshold), right in RIGHT.items():
        for seed in range(3):
            more = [f"{KEY}={threshold}"]
            one = job(folder, len(jobs), pair=pair, method=method, seed=seed, more=more)
            jobs.append(one)
            if right:
                drawn = {f"random {d + 1}": questions(BASE + d) for d in range(3)}
                found = {method: questions(right[seed]), **drawn}
                measure(one, found, scratch=root / "scratch")
    failed, _, runs = jobs[-3:]
    set_state(failed.folder, State(state="failed", error="out of memory: 3 GB are missing"))
    lines = [f"line {i}" for i in range(40)]
    (failed.folder / "run.log").write_text("\n".join(lines))
    set_state(runs.folder, State(state="running"))
    return launched(folder, jobs)


@pytest.fixture
def sweep(made: Path, tmp_path: Path) -> Path:
    """One's own copy."""
    return shutil.copytree(made, tmp_path / "sweep")


def single(folder: Path, moved: dict[str, list[dict[str, Any]]], **more: Any) -> Path:
    """A sweep of one job."""
    one = job(folder, 0)
    measure(one, moved, scratch=folder.parent / "scratch", **more)
    return launched(folder, [one])


def row(found: Sequence[Row], pair: str, name: str, threshold: float | None = None) -> Row:
    (one,) = (
        r
        for r in found
        if f"{r.source} {r.target}" == pair
        and r.short == name
        and threshold in (None, r.keys.get(KEY))
    )
    return one


def said(folder: Path) -> str:
    report(folder)
    return (folder / "summary.md").read_text()


# ---- rows -----------------------------------------------------------------------------------


def test_a_row_per_configuration_and_method_seeds_folded(made: Path) -> None:
    found = rows(read(made))
    # methods and the placebo of each, by pair and threshold; of the failed one the method alone
    assert len(found) == 2 * 2 * 2 * 2 - 1
    one = row(found, "a b", "procrustes", 0.1)
    assert (one.method, one.placebo, one.state) == ("target + procrustes", False, "done")
    assert (one.jobs, one.seeds, one.keys) == ([0, 1, 2], [0, 1, 2], {KEY: 0.1})
    assert str(one.share) == "+0.60 (+0.50 to +0.70)"
    assert one.base_accuracy == pytest.approx(BASE / N)
    assert one.accuracy == pytest.approx(100 / N)
    assert one.own_accuracy == pytest.approx(OWN / N)
    assert one.coverage == pytest.approx(0.75)
    assert one.seconds == pytest.approx(3 * 3.0)
    assert one.by_likelihood.mean == pytest.approx(0.6)


def test_draws_of_a_placebo_are_one_row_that_says_what_it_spoils(made: Path) -> None:
    found = rows(read(made))
    one = row(found, "a b", "random of ridge", 0.2)
    assert (one.placebo, one.spoils, one.draws, len(one.measured)) == (True, "ridge", 3, 9)
    assert str(one.share) == "+0.01 (+0.00 to +0.02)"
    placebos = [r.placebo for r in found if r.source == "a"]
    assert placebos == sorted(placebos), "real methods come first"


def test_a_job_without_results_has_a_row_with_its_state(made: Path) -> None:
    found = rows(read(made))
    assert row(found, "b a", "ridge", 0.2).state == "running"
    assert row(found, "b a", "ridge", 0.2).jobs == [21, 22, 23]
    assert str(row(found, "b a", "ridge", 0.2).share) == "–"


def test_some_seeds_done_are_partial(sweep: Path) -> None:
    shutil.rmtree(sweep / "1_a-b")
    one = row(rows(read(sweep)), "a b", "procrustes", 0.1)
    assert (one.state, one.jobs, one.seeds) == ("partial", [0, 1, 2], [0, 1, 2])
    assert str(one.share) == "+0.60 (+0.50 to +0.70)"
    assert [m.seed for m in one.measured] == [0, 2]
    assert row(rows(read(sweep)), "a b", "random of procrustes", 0.1).state == "partial"


def test_a_job_that_has_not_begun_is_described_as_those_asked_for_the_same(tmp_path: Path) -> None:
    """config.yaml has names, which need not be those of the choices."""
    folder = tmp_path / "sweep"
    first, second = job(folder, 0), job(folder, 1, seed=1)
    measure(first, {"procrustes": questions(90)}, scratch=tmp_path)
    config = yaml.safe_load((first.folder / "config.yaml").read_text())
    config["source"]["name"] = "A-1.5B"
    (first.folder / "config.yaml").write_text(yaml.safe_dump(config))
    (one,) = rows(read(launched(folder, [first, second])))
    assert (one.source, one.state, one.seeds) == ("A-1.5B", "partial", [0, 1])


def test_a_control_that_is_also_configured_is_one_row(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    first, second = job(folder, 0), job(folder, 1, method="ridge")
    measure(first, {"procrustes": questions(90), "ridge": questions(60)}, scratch=tmp_path)
    measure(second, {"ridge": questions(60)}, scratch=tmp_path)
    found = rows(read(launched(folder, [first, second])))
    assert [(r.short, r.jobs, len(r.measured)) for r in found] == [
        ("procrustes", [0], 1),
        ("ridge", [1], 1),
    ]


def test_one_seed_has_its_interval_and_csv_says_what_low_and_high_are(tmp_path: Path) -> None:
    folder = single(tmp_path / "sweep", {"procrustes": questions(90)})
    report(folder)
    gap = json.loads((folder / "0_a-b" / "results.json").read_text())["systems"][1]["gap"]
    (line,) = csv.DictReader((folder / "sweep.csv").open())
    assert float(line["gap_recovered"]) == pytest.approx(0.5)
    assert (float(line["gap_low"]), float(line["gap_high"])) == (gap["low"], gap["high"])
    assert line["low_and_high"] == "95 % interval"
    (one,) = rows(read(folder))
    assert str(one.share) == f"+0.50 [{gap['low']:+.2f}, {gap['high']:+.2f}]"


def test_csv_has_keys_methods_and_ranges(sweep: Path) -> None:
    report(sweep)
    lines = list(csv.DictReader((sweep / "sweep.csv").open()))
    found = {(r["source"], r["method"], r["placebo_of"], r[KEY]): r for r in lines}
    assert len(found) == len(lines) == 15
    one = found["a", "target + random", "ridge", "0.2"]
    assert (one["low_and_high"], one["seeds"]) == ("range over 3 seeds, 3 draws", "0 1 2")
    assert float(one["gap_high"]) == pytest.approx(0.02)
    assert found["b", "target + ridge", "", "0.2"]["gap_recovered"] == ""


def test_numbers_of_jobs_are_drawn_together() -> None:
    assert numbers([7, 0, 1, 2, 5]) == "0-2,5,7"


# ---- the best -------------------------------------------------------------------------------


def test_the_best_method_and_what_it_is_better_than(made: Path) -> None:
    first, second = answers(rows(read(made)))
    assert first.best is not None
    assert (first.source, first.best.name) == ("a", "procrustes (similarity_threshold=0.1)")
    assert first.base is not None
    assert first.base.difference == pytest.approx(60 / N)
    assert first.base.verdict == 1
    assert {(a.row.name, a.versus.verdict) for a in first.against} == {
        ("ridge (similarity_threshold=0.1)", 1),
        ("ridge (similarity_threshold=0.2)", 1),
    }
    assert [a.versus.verdict for a in first.placebos] == [1, 1, 1]
    assert second.best is not None
    assert second.best.short == "procrustes"
    assert all(c.verdict == 0 for _, c in second.versus_base)


def test_no_method_above_the_target_base_is_a_result(sweep: Path) -> None:
    page = report(sweep)
    first, second = page.split("b → a, facts")
    assert "No method is significantly above the target base." in second
    assert "Not significantly above the target base" in second
    assert "not significantly above a placebo: random of procrustes" in second
    assert "No method is" not in first
    assert "Placebos: above all 3 draws of the placebo random of procrustes." in first


def test_equal_records_are_said_to_be_equal_and_are_no_comparison(sweep: Path) -> None:
    (first, _) = answers(rows(read(sweep)))
    twin = "procrustes (similarity_threshold=0.2)"
    assert first.equal == [twin]
    assert twin not in {a.row.name for a in first.against}
    assert twin not in {r.name for r, _ in first.versus_base}
    assert f"Equal to it, question by question: {twin}." in said(sweep)


def test_records_equal_to_the_base_are_no_comparison(tmp_path: Path) -> None:
    folder = single(tmp_path / "sweep", {"procrustes": questions(BASE)})
    (one,) = answers(rows(read(folder)))
    assert one.versus_base == []
    assert any("procrustes is equal to the target base" in note for note in one.notes)


def all_comparisons(found: Sequence[Answer]) -> list[Any]:
    return [
        c
        for a in found
        for c in (
            *(c for _, c in a.versus_base),
            *(x.versus for x in a.against),
            *(x.versus for x in a.placebos),
        )
    ]


def test_holm_is_over_all_comparisons_of_the_sweep(made: Path) -> None:
    """p by hand: the paired t-test of each question's mean over seeds."""

    def mean(right: Sequence[int]) -> Any:
        return np.mean([[i < r for i in range(N)] for r in right], axis=0)

    def p(after: Sequence[int], before: Sequence[int]) -> float:
        return float(ttest_rel(mean(after), mean(before)).pvalue)

    one = RIGHT["a b", "procrustes", "0.1"]
    ridge = [RIGHT["a b", "ridge", t] for t in ("0.1", "0.2")]
    base = [BASE] * 3
    other = RIGHT["b a", "procrustes", "0.1"]
    # with the base; the best with the others; the best with each draw (the first is the base)
    expected = [p(r, base) for r in (one, *ridge)]
    expected += [p(one, r) for r in ridge] + [p(one, [BASE + d] * 3) for d in range(3)]
    back = [RIGHT["b a", "procrustes", "0.2"], RIGHT["b a", "ridge", "0.1"]]
    expected += [p(r, base) for r in (other, *back)] + [p(other, r) for r in back]
    expected += [p(other, [BASE + d] * 3) for d in range(3)]
    found = all_comparisons(answers(rows(read(made))))
    assert len(found) == len(expected) == 16
    assert sorted(c.p for c in found) == pytest.approx(sorted(expected))
    holm = multipletests([c.p for c in found], method="holm")[1]
    assert [c.p_holm for c in found] == pytest.approx(list(holm))
    assert max(c.p_holm / c.p for c in found) > 8, "not of one pair alone"


def test_one_seed_is_compared_as_compare_does(tmp_path: Path) -> None:
    folder = single(
        tmp_path / "sweep",
        {"procrustes": questions(52), "ridge": questions(45), "shift": questions(40)},
    )
    (one,) = answers(rows(read(folder)))
    systems = {s.name: s for s in read_run(str(folder / "0_a-b"))}
    moved, base = systems["target + procrustes"], systems["target base"]
    assert one.base is not None
    plain = compare(moved, base)
    assert replace(one.base, p_holm=plain.p) == plain
    assert one.base.p_holm > plain.p
    against = {a.row.short: a.versus for a in one.against}
    ridge = compare(moved, Recorded("ridge", systems["target + ridge"].records))
    assert replace(against["ridge"], p_holm=ridge.p) == ridge


def test_intervals_of_many_values_are_those_of_compare() -> None:
    """Resampled together they are what each is alone, from the same samples."""
    rng = np.random.default_rng(0)
    many = [rng.normal(0.1, 1, 300) for _ in range(2)]
    columns = [many[0], rng.integers(0, 2, 300).astype(float), many[1]]
    alone = [np.percentile(resampled_means(x[:, None]), [2.5, 97.5]) for x in columns]
    for found, expected in zip(best._intervals(columns), alone, strict=True):
        assert found == pytest.approx(tuple(expected), abs=1e-12)


def test_seeds_that_ask_other_questions_are_all_used(tmp_path: Path) -> None:
    """With evaluate.limit each seed draws its own: a question counts by the seeds that asked it."""
    folder = tmp_path / "sweep"
    jobs = [job(folder, seed, seed=seed) for seed in range(2)]
    for seed, one in enumerate(jobs):
        part = slice(50 * seed, 50 * seed + 150)
        kept = [questions(n)[part] for n in (90, BASE, OWN)]
        measure(one, {"procrustes": kept[0]}, base=kept[1], own=kept[2], scratch=tmp_path)
    (found,) = answers(rows(read(launched(folder, jobs))))
    assert found.base is not None
    assert (found.base.n, found.base.difference) == (200, pytest.approx(50 / 200))


def test_where_accuracy_is_not_eligible_likelihood_ranks(tmp_path: Path) -> None:
    folder = single(
        tmp_path / "sweep",
        {"procrustes": questions(BASE, 0.1), "ridge": questions(BASE, 0.3)},
        own=questions(BASE, 0.5),
    )
    (one,) = answers(rows(read(folder)))
    assert one.best is not None
    assert (one.by, one.best.short) == (LIKELIHOOD, "ridge")
    assert one.share.mean == pytest.approx(0.6)
    assert one.base is not None
    assert one.base.of == "log-likelihood"
    text = said(folder)
    assert "gap recovered not eligible" in text
    assert "By accuracy there is no gap to recover" in text
    lines = list(csv.DictReader((folder / "sweep.csv").open()))
    assert {line["gap_recovered"] for line in lines} == {"not eligible"}


def test_where_there_is_no_gap_at_all_there_is_no_best(tmp_path: Path) -> None:
    folder = single(tmp_path / "sweep", {"procrustes": questions(90)}, own=questions(BASE))
    (one,) = answers(rows(read(folder)))
    assert one.best is None
    assert "Not eligible: there is no gap to recover (own − base is +0.000" in said(folder)


def test_of_equally_high_gaps_the_likelier_is_best(tmp_path: Path) -> None:
    moved = {"procrustes": questions(90), "ridge": questions(90, 0.1)}
    (one,) = answers(rows(read(single(tmp_path / "sweep", moved))))
    assert one.best is not None
    assert one.best.short == "ridge"


def test_a_placebo_is_never_the_best(tmp_path: Path) -> None:
    moved = {"procrustes": questions(50), "random": questions(120), "negated": questions(130)}
    folder = single(tmp_path / "sweep", moved)
    (one,) = answers(rows(read(folder)))
    assert one.best is not None
    assert one.best.short == "procrustes"
    assert [a.versus.verdict for a in one.placebos] == [-1, -1]
    assert "not significantly above a placebo" in said(folder)


def test_own_adapters_that_differ_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    jobs = [job(folder, i, more=[f"train.lr={lr}"]) for i, lr in enumerate((0.1, 0.2))]
    for i, one in enumerate(jobs):
        measure(one, {"procrustes": questions(90)}, own=questions(OWN + i), scratch=tmp_path)
    (found,) = answers(rows(read(launched(folder, jobs))))
    assert any("own adapters differ" in note for note in found.notes)


# ---- files ----------------------------------------------------------------------------------


def test_summary_and_json_of_a_sweep_that_is_not_done(sweep: Path) -> None:
    text = said(sweep)
    assert text.startswith("# Sweep of 24 jobs: 21 done, 1 running, 1 queued, 1 failed")
    assert "out of memory: 3 GB are missing" in text
    assert "line 39" in text
    assert "line 20" in text
    assert "line 19\n" not in text, "the last 20 lines"
    assert "Not all jobs of this pair are done" in text.split("b → a")[1]
    found = json.loads((sweep / "sweep.json").read_text())
    assert found["jobs"] == {"done": 21, "running": 1, "queued": 1, "failed": 1}
    assert len(found["rows"]) == 15
    assert found["answers"][0]["best"]["method"] == "target + procrustes"
    assert found["answers"][0]["equal"] == ["procrustes (similarity_threshold=0.2)"]


def test_the_page_fits_a_terminal_and_leaves_out_what_is_constant(sweep: Path) -> None:
    page = report(sweep)
    where = str(sweep / "summary.md")
    assert max(len(line) for line in page.replace(where, "").splitlines()) <= 100
    table = cells("\n".join(line for line in page.splitlines() if line.startswith("|")))
    assert len(table) == 15
    assert "dataset" not in table[0]
    assert "dataset facts" in page
    assert table[0]["similarity_threshold"] == "0.1"
    assert page.index("Best: procrustes") < page.index("| source")
    assert page.endswith(where)


def test_nothing_has_been_measured_yet(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    launched(folder, [job(folder, 0), job(folder, 1, method="ridge")])
    page = report(folder)
    assert "Nothing has been measured yet." in page
    assert "2 jobs: 2 queued" in page
    assert not list(folder.glob("*.png"))


def test_a_job_that_stopped_before_its_own_adapter_is_partial(tmp_path: Path) -> None:
    folder = single(tmp_path / "sweep", {"procrustes": questions(90)})
    file = folder / "0_a-b" / "results.json"
    found = json.loads(file.read_text())
    for one in found["systems"]:
        one["gap"] = one["gap_by_likelihood"] = None
    found["systems"] = found["systems"][:-1]
    file.write_text(json.dumps(found))
    set_state(folder / "0_a-b", State(state="failed", error="no memory"))
    (one,) = rows(read(folder))
    assert (one.state, one.accuracy, one.own_accuracy) == ("partial", 0.45, None)
    assert "Gap recovered is not known: a base or an own adapter is missing." in report(folder)


def test_what_is_told_apart_has_a_column(tmp_path: Path) -> None:
    """Accuracy recovers half of the gap; of what is told apart, a tenth."""

    def told(right: int, calibrated: int) -> list[dict[str, Any]]:
        return [
            {**q, "prediction_calibrated": int(i >= calibrated)}
            for i, q in enumerate(questions(right))
        ]

    folder = single(
        tmp_path / "sweep", {"procrustes": told(90, 70)}, base=told(BASE, 60), own=told(OWN, 160)
    )
    text = said(folder)
    assert "is right, gap recovered by procrustes is +0.10 [" in text
    (shown,) = cells(text[text.index("| jobs") :].partition("\n\n")[0])
    assert shown["calibrated"].startswith("+0.10 [")
    assert shown["gap recovered"].startswith("+0.50 [")
    assert "Calibrated is" in text
    # where questions have choices of their own, and in runs of before
    plain = single(tmp_path / "plain" / "sweep", {"procrustes": questions(90)})
    assert "alibrated" not in said(plain)
    file = folder / "0_a-b" / "results.json"
    found = json.loads(file.read_text())
    for one in found["systems"]:
        del one["calibrated"]
    file.write_text(json.dumps(found))
    assert "alibrated" not in said(folder)


def test_removed_records_leave_out_a_comparison_and_say_so(sweep: Path) -> None:
    for number in (6, 7, 8):  # ridge at the first threshold
        (sweep / f"{number}_a-b" / "records" / "target_ridge.jsonl").unlink()
    text = said(sweep)
    (first, _) = answers(rows(read(sweep)))
    assert [a.row.name for a in first.against] == ["ridge (similarity_threshold=0.2)"]
    assert "is not compared with ridge (similarity_threshold=0.1): records/target_ridge" in text
    assert first.base is not None
    shutil.rmtree(sweep / "0_a-b" / "records")
    assert "was removed" in said(sweep)


def test_records_as_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    folder = single(tmp_path / "sweep", {"procrustes": questions(90)})
    place = folder / "0_a-b"
    found = json.loads((place / "results.json").read_text())
    for one in found["systems"]:
        file = place / one["records"]
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        one["records"] = str(Path(one["records"]).with_suffix(".parquet"))
        parquet.write_table(pyarrow.Table.from_pylist(lines), place / one["records"])
        file.unlink()
    (place / "results.json").write_text(json.dumps(found))
    (one,) = answers(rows(read(folder)))
    assert one.base is not None
    assert one.base.difference == pytest.approx(0.25)


def test_pictures_where_there_is_something_to_draw(sweep: Path, tmp_path: Path) -> None:
    report(sweep)
    names = {"pairs.png", "seeds.png", "over_transfer_similarity_threshold.png"}
    assert {f.name for f in sweep.glob("*.png")} == names
    for file in sweep.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    text = (sweep / "summary.md").read_text()
    assert all(f"]({name})" in text for name in names)
    assert not list(sweep.glob(".*")), "no temporary files stay"
    folder = single(tmp_path / "one", {"procrustes": questions(90)})
    report(folder)
    assert not list(folder.glob("*.png"))


def test_fifty_jobs_take_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 questions, a method with five draws, by likelihood: its bootstrap is the slow one."""
    folder = single(
        tmp_path / "sweep",
        {
            "procrustes": questions(BASE, 0.3),
            **{f"random {d + 1}": questions(BASE, 0.01 * d) for d in range(5)},
        },
        own=questions(BASE, 0.5),
    )
    first, rng, like = folder / "0_a-b", np.random.default_rng(0), questions(0)[0]
    jobs = []
    for n in range(50):
        one = job(folder, n, more=[f"{KEY}={n / 100}"])
        jobs.append(one)
        if n:
            shutil.copytree(first, one.folder)
            config = yaml.safe_load((one.folder / "config.yaml").read_text())
            config["transfer"]["similarity_threshold"] = n / 100
            (one.folder / "config.yaml").write_text(yaml.safe_dump(config))
        for file in (one.folder / "records").glob("*.jsonl"):
            known = file.stem in ("target_base", "target_own_adapter")
            noise = np.random.default_rng(1) if known else rng
            level = {"target_base": -2.0, "target_own_adapter": -1.0}.get(file.stem, -1.5)
            logs = noise.normal(level, 0.5, 1000)
            lines = [
                {**like, "id": str(i), "loglikelihoods": [float(x), -1.0]}
                for i, x in enumerate(logs)
            ]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    launched(folder, jobs)
    seen: Counter[Path] = Counter()
    whole = Path.read_bytes

    def counted(file: Path) -> bytes:
        seen[file] += 1
        return whole(file)

    monkeypatch.setattr(Path, "read_bytes", counted)
    began = time.process_time()
    report(folder)
    assert time.process_time() - began < 10
    assert len(seen) >= 100
    assert set(seen.values()) == {1}, "each file of records once"


# ---- the task -------------------------------------------------------------------------------


def test_without_a_sweep_the_newest_is_named(made: Path, tmp_path: Path) -> None:
    c = task.Config(task="report")
    c.paths.outputs = str(tmp_path)
    with pytest.raises(ConfigError, match="There is none in"):
        task.run(c, [])
    for n, name in enumerate(("newer", "older")):
        shutil.copytree(made, tmp_path / "sweeps" / name)
        file = tmp_path / "sweeps" / name / "jobs.json"
        os.utime(file, (1000 - n, 1000 - n))
    with pytest.raises(ConfigError, match=r"The newest is sweep=.*newer\."):
        task.run(c, [])


@pytest.mark.parametrize("ended", [("22_b-a", "23_b-a"), ("23_b-a", "22_b-a")])
def test_watching_ends_with_the_last_job(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, ended: tuple[str, str]
) -> None:
    """One of them is queued and one runs."""
    looks = 0

    def ends(seconds: float) -> None:
        nonlocal looks
        set_state(sweep / ended[looks], State(state="failed", error="x"))
        looks += 1
        assert seconds == 3

    monkeypatch.setattr(time, "sleep", ends)
    page = task.run(task.Config(task="report", sweep=str(sweep), watch=True, every=3.0), [])
    assert looks == 2
    assert "24 jobs: 21 done, 3 failed" in page
    assert task.run(task.Config(task="report", sweep=str(sweep)), []) == page


def test_ctrl_c_ends_watching(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    assert "1 running" in task.run(task.Config(task="report", sweep=str(sweep), watch=True), [])


def test_on_the_command_line(paw: Paw, sweep: Path) -> None:
    done = paw("task=report", f"sweep={sweep}")
    assert "a → b, facts" in done.stdout
    assert (sweep / "summary.md").is_file()
    wrong = paw("task=report", "sweep=nowhere", ok=False)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "paw: error: sweep: nowhere has no jobs.json" in wrong.stderr


@pytest.mark.parametrize(
    ("system", "moved", "placebo"),
    [
        ("target + ridge, refined", True, False),
        ("target + fresh, refined", True, False),
        ("target + ridge, gains only", True, False),
        ("target + ridge, refined on the base's answers", True, True),
        ("target + ridge, refined on shuffled answers", True, True),
        ("target + own adapter, as many steps", False, False),
        ("target + own adapter", False, False),
        ("target + random", True, True),
    ],
)
def test_refined_systems_are_methods_or_placebos(system: str, moved: bool, placebo: bool) -> None:
    """The target's own adapter is neither, of however many steps: it saw labels."""
    assert table._is_moved({"system": system}) == moved
    assert table._kind(system)[0] == placebo


SEARCH = """
<script>
addEventListener("load", () => {
  const box = document.querySelector("input[type=search]");
  const rows = [...document.querySelectorAll("#all tbody tr")];
  const shown = () => rows.filter(r => !r.hidden).length, seen = {all: shown()};
  box.value = "ridge"; box.dispatchEvent(new Event("input")); seen.some = shown();
  box.value = ""; box.dispatchEvent(new Event("input")); seen.again = shown();
  seen.pictures = [...document.images].map(i => i.naturalWidth > 0);
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(seen); document.body.append(out);
});
</script>
"""


def test_the_page_is_one_file_that_filters(sweep: Path) -> None:
    report(sweep)
    text = (sweep / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    found = rows(read(sweep))
    assert text.count("<tr>") == len(found) + 1
    page = sweep / "probed.html"
    page.write_text(text.replace("</body>", SEARCH + "</body>"))
    seen, said = opened(page)
    assert said == ""
    assert seen["all"] == seen["again"] == len(found)
    assert 0 < seen["some"] < seen["all"]
    assert seen["pictures"]
    assert all(seen["pictures"])
