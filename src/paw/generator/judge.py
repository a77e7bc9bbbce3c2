"""Stage `judge`: what generated adapters are worth, beside all that needs no generator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paw.evaluation.records import read_records
from paw.evaluation.statistics import RESAMPLES, Vector, holm, mcnemar, resampled_means
from paw.generator.config import CONTROLS
from paw.generator.generate import FIGURES, GENERATED, OWN
from paw.store import Input, Stage, Watch, write_text
from paw.text import markdown_table

BASE, MEAN = "base", "mean"
TABLE = "table.json"
LEVEL = 0.05
FEW = 12  # differences whose signs are all flipped
NAMES = {
    BASE: "base",
    OWN: "the tasks' own adapters",
    GENERATED: "generated from held-out prompts",
    "mean": "mean checkpoint",
    "last": "last checkpoint",
    "start": "common start",
    "nearest": "nearest checkpoint",
    "gaussian": "per-weight Gaussian",
    "shuffled": "generated, prompts shuffled",
    "strings": "generated, random strings",
}
ORDER = [BASE, OWN, *(k for k in NAMES if k not in (BASE, OWN, GENERATED)), GENERATED]
assert CONTROLS.keys() <= NAMES.keys()


@dataclass(kw_only=True)
class JudgeStage:
    """Each input's place in the table. An evaluation is of a system, a task and a seed; `made` are
    finished stages `generate`, of a system and a seed."""

    evaluated: dict[str, list[str]]  # input: [system, task, seed]
    made: dict[str, list[str]] = field(default_factory=dict)  # input: [system, seed]


@dataclass(frozen=True, kw_only=True)
class JudgeResult:
    tasks: int  # held out, over all seeds
    questions: int
    seeds: int
    eligible: bool  # whether the own adapters beat the base and the mean
    recovered: float | None  # of what own adapters gain beyond the mean
    low: float | None
    high: float | None
    verdict: int  # of generated against the mean: 1 above, −1 below, 0 no significant difference
    table: str = ""
    text: str = ""

    def __str__(self) -> str:
        if not self.eligible:
            return f"not eligible, over {self.questions} questions of {self.tasks} tasks"
        return (
            f"{self.recovered:+.2f} [{self.low:.2f}, {self.high:.2f}] of the gain beyond the mean "
            f"checkpoint, over {self.questions} questions of {self.tasks} tasks"
        )

    @property
    def said(self) -> str:
        return f"{self.table}\n\n{self.text}"


STAGE = Stage("judge", "2", "paw.generator.judge:judge", config=JudgeStage, result=JudgeResult)


class System:
    """How often each question is right, over the seeds that asked it, in the order of tasks. What
    is resampled together is a task, whose questions share their adapters; of one task a
    question."""

    def __init__(self, by_task: Mapping[str, Mapping[str, Sequence[bool]]]) -> None:
        found = [(i, np.mean(x)) for i, t in enumerate(by_task) for x in by_task[t].values()]
        self.right: Vector = np.array([x for _, x in found])
        of_task = np.array([i for i, _ in found])
        self.cluster = of_task if len(by_task) > 1 else np.arange(len(found))


def judge(config: JudgeStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> JudgeResult:
    """Pools the held-out tasks of all seeds into one table: accuracy of every system with an
    interval that resamples tasks, its share of what own adapters gain beyond the mean checkpoint,
    and a paired test against the mean, adjusted after Holm.

    Writes table.json.
    """
    found: dict[str, dict[str, dict[str, list[bool]]]] = {}
    for key, (who, task, _) in sorted(config.evaluated.items()):
        records = read_records(inputs[key].path)
        mine = found.setdefault(who, {}).setdefault(task, {})
        for record in records:
            mine.setdefault(record["id"], []).append(bool(record["correct"]))
    tasks = sorted(found[GENERATED])
    systems = {s: System({t: found[s][t] for t in tasks}) for s in ORDER if s in found}
    seeds = len({seed for _, _, seed in config.evaluated.values()})
    drawn = _drawn(systems)
    base, own, mean = (systems[s].right for s in (BASE, OWN, MEAN))
    gap_low = np.percentile(drawn[OWN] - drawn[BASE], 2.5)
    beyond = drawn[OWN] - drawn[MEAN]
    eligible = bool(gap_low > 0 and np.percentile(beyond, 2.5) > 0)
    others = [s for s in systems if s not in (MEAN, BASE)]
    tests = {s: _test(systems[MEAN], systems[s]) for s in others}
    adjusted = dict(zip(others, holm([tests[s][2] for s in others]), strict=True))
    figures = _figures(config, inputs)
    rows: dict[str, dict[str, Any]] = {}
    for name, system in systems.items():
        low, high = np.percentile(drawn[name], [2.5, 97.5])
        row: dict[str, Any] = {"accuracy": float(system.right.mean()), "low": low, "high": high}
        if eligible and name not in (BASE, OWN, MEAN):
            share = (system.right.mean() - mean.mean()) / (own.mean() - mean.mean())
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.where(beyond > 0, (drawn[name] - drawn[MEAN]) / beyond, np.nan)
            row |= {"share": float(share), "share_low": float(np.nanpercentile(ratios, 2.5))}
            row["share_high"] = float(np.nanpercentile(ratios, 97.5))
        if name in tests:
            gained, lost, p = tests[name]
            row |= {"gained": gained, "lost": lost, "p": p, "p_holm": adjusted[name]}
        rows[name] = {k: float(v) for k, v in row.items()} | figures.get(name, {})
    write_text(out / TABLE, json.dumps(rows, indent=1))
    made = rows[GENERATED]
    low, high = np.percentile(drawn[GENERATED] - drawn[MEAN], [2.5, 97.5])
    told_apart = adjusted[GENERATED] < LEVEL and not low <= 0 <= high
    verdict = 0 if not told_apart else 1 if low > 0 else -1
    questions = len(base)
    return JudgeResult(
        tasks=len(tasks),
        questions=questions,
        seeds=seeds,
        eligible=eligible,
        recovered=made.get("share"),
        low=made.get("share_low"),
        high=made.get("share_high"),
        verdict=verdict,
        table=_table(rows),
        text=_text(rows, eligible, verdict, len(tasks), questions, seeds),
    )


def _test(mean: System, other: System) -> tuple[int, int, float]:
    """Questions gained and lost against the mean checkpoint, and the p-value: of the exact McNemar
    test where there is one task and one seed; else the differences of tasks (of one task, of
    questions) have their signs flipped at random, all of them where they are few."""
    off = other.right - mean.right
    gained, lost = int((off > 0).sum()), int((off < 0).sum())
    whole = set(np.unique(np.concatenate([mean.right, other.right]))) <= {0.0, 1.0}
    alone = len(np.unique(mean.cluster)) == len(off)
    if alone and whole:
        return mcnemar(mean.right, other.right)
    difference = np.bincount(mean.cluster, off).astype(np.float64)
    if len(difference) <= FEW:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(difference))))
        return gained, lost, float((_flipped(signs, difference)).mean())
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (RESAMPLES, len(difference)))
    return gained, lost, float((_flipped(signs, difference).sum() + 1) / (RESAMPLES + 1))


def _flipped(signs: Vector, difference: Vector) -> NDArray[np.bool_]:
    """Whether flipped differences are as far from 0 as they are."""
    found: NDArray[np.bool_] = np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9
    return found


def _drawn(systems: Mapping[str, System]) -> dict[str, Vector]:
    """Bootstrap means of all systems, resampled together: of each cluster its sum and its size."""
    sums = [np.bincount(s.cluster, s.right) for s in systems.values()]
    sizes = np.bincount(next(iter(systems.values())).cluster)
    means = resampled_means(np.stack([*sums, sizes.astype(np.float64)], axis=1))
    return {name: means[:, i] / means[:, -1] for i, name in enumerate(systems)}


def _figures(config: JudgeStage, inputs: Mapping[str, Input]) -> dict[str, dict[str, float]]:
    """Means over adapters, by system: skill, distance to the mean and to the nearest."""
    every: dict[str, list[dict[str, Any]]] = {}
    for name, (system, _) in sorted(config.made.items()):
        held = json.loads((inputs[name].path / FIGURES).read_text())
        every.setdefault(system, []).extend(held.values())
    return {
        system: {
            key: float(np.mean([one[key] for one in rows]))
            for key in ("skill", "to_mean", "to_nearest")
            if all(key in one for one in rows)
        }
        for system, rows in every.items()
    }


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    head = ["system", "accuracy", "share of the gain beyond the mean", "against the mean", "skill"]
    lines = [head]
    for name, row in rows.items():
        share = against = "–"
        if "share" in row:
            share = f"{row['share']:+.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}]"
        if "p" in row:
            against = f"{row['gained']:.0f} gained, {row['lost']:.0f} lost, p = {row['p_holm']:.2g}"
        skill = f"{row['skill']:+.2f}" if "skill" in row else "–"
        accuracy = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        lines.append([NAMES[name], accuracy, share, against, skill])
    return markdown_table(lines)


def _text(
    rows: Mapping[str, Mapping[str, float]],
    eligible: bool,
    verdict: int,
    tasks: int,
    questions: int,
    seeds: int,
) -> str:
    made, own, mean = (rows[n] for n in (GENERATED, OWN, MEAN))
    over = f"{questions} questions of {tasks} held-out {'tasks' if tasks > 1 else 'task'}"
    over += f", {seeds} seeds" if seeds > 1 else ""
    notes = (
        "Intervals of 95 % resample tasks (questions, where there is one task); p is that of "
        "tasks' differences with their signs flipped (of one task and one seed, of the exact "
        "McNemar test over questions), adjusted after Holm. Questions that several seeds asked "
        "count once. Skill is 1 − mse/mse of the mean checkpoint, of weights."
    )
    if not eligible:
        return (
            f"Not eligible, over {over}: own adapters have {own['accuracy']:.3f}, the base "
            f"{rows[BASE]['accuracy']:.3f}, the mean checkpoint {mean['accuracy']:.3f}, so there "
            f"is nothing beyond the mean to recover and nothing is claimed. {notes}"
        )
    said = {
        1: "more than the mean checkpoint does",
        -1: "less than the mean checkpoint does",
        0: "not significantly more than the mean checkpoint does",
    }[verdict]
    others = [
        f"{NAMES[n]} {rows[n]['share']:+.2f} [{rows[n]['share_low']:.2f}, "
        f"{rows[n]['share_high']:.2f}]"
        for n in ("shuffled", "strings", "nearest")
        if n in rows
    ]
    return (
        f"Generated adapters recover {made['share']:+.2f} [{made['share_low']:.2f}, "
        f"{made['share_high']:.2f}] of what own adapters gain beyond the mean checkpoint, over "
        f"{over}: {said}. Beside them: {'; '.join(others)}. {notes}"
    )
