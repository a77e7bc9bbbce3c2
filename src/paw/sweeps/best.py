"""The best method of each pair of a sweep, and what it is significantly better than.

All comparisons are paired, on the same questions by their records, and Holm's adjustment is for all
of them at once: every real method with the target base, and the best one of a pair with every other
and with every draw of the placebos beside it. With several seeds a question's score is its mean
over the seeds that asked it of both sides: with evaluate.limit, seeds ask different ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from paw.errors import DataError
from paw.evaluation.records import Record
from paw.evaluation.statistics import FEW, RESAMPLES, Vector, mcnemar, paired_t, resampled_means
from paw.report.compare import LEVEL, Comparison, adjust, likelihoods, scores
from paw.report.records import Recorded, paired, read_run
from paw.report.sentences import EVEN
from paw.sweeps.table import BASE, Figures, Measured, Row, Share, records_of

ACCURACY, LIKELIHOOD = "gap recovered", "gap recovered by log-likelihood"
Files = dict[int, Path]  # the records of one system, by seed


@dataclass(frozen=True, kw_only=True)
class Against:
    """The best configuration of a pair beside another one, or beside a draw of a placebo."""

    row: Row
    versus: Comparison


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is best for one pair of models on one data set."""

    source: str
    target: str
    dataset: str
    rows: Sequence[Row]
    by: str = ACCURACY
    best: Row | None = None  # None: nothing has been measured, or there is no gap to recover
    versus_base: list[tuple[Row, Comparison]] = field(default_factory=list)  # real methods
    against: list[Against] = field(default_factory=list)  # real methods
    placebos: list[Against] = field(default_factory=list)  # a draw each
    equal: list[str] = field(default_factory=list)  # to the best, question by question
    notes: list[str] = field(default_factory=list)  # what limits what is said

    @property
    def share(self) -> Share:
        assert self.best is not None
        return share_by(self.best, self.by)

    @property
    def base(self) -> Comparison | None:
        """The best one beside the target base; None where it is equal to it."""
        return next((c for row, c in self.versus_base if row is self.best), None)

    def plain(self) -> dict[str, Any]:
        """For sweep.json."""
        return {
            "source": self.source,
            "target": self.target,
            "dataset": self.dataset,
            "by": self.by,
            "best": self.best and self.best.plain(),
            "versus_base": [{"method": r.name, **_plain(c)} for r, c in self.versus_base],
            "versus_methods": [_plain(a.versus) for a in self.against],
            "versus_placebos": [_plain(a.versus) for a in self.placebos],
            "equal": self.equal,
            "notes": self.notes,
        }


def share_by(row: Row, by: str) -> Share:
    return row.share if by == ACCURACY else row.by_likelihood


def measure(rows: Sequence[Row]) -> str:
    """By what methods are ranked: by accuracy where any of them has a gap to recover."""
    return ACCURACY if any(row.share.mean is not None for row in rows) else LIKELIHOOD


def answers(rows: Sequence[Row]) -> list[Answer]:
    """One per pair, in the order of the rows."""
    comparing = _Comparing()
    pairs: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        pairs.setdefault(row.pair, []).append(row)
    found = [_answer(several, comparing) for several in pairs.values()]
    settled = iter(comparing.settled())
    return [
        replace(
            a,
            versus_base=[(row, next(settled)) for row, _ in a.versus_base],
            against=[replace(x, versus=next(settled)) for x in a.against],
            placebos=[replace(x, versus=next(settled)) for x in a.placebos],
        )
        for a in found
    ]


# ---- one pair -------------------------------------------------------------------------------


def _answer(rows: Sequence[Row], comparing: _Comparing) -> Answer:
    source, target, dataset = rows[0].pair
    real = [row for row in rows if not row.placebo]
    by = measure(real)
    ranked = sorted((r for r in real if share_by(r, by).mean is not None), key=_rank(by))
    answer = Answer(source=source, target=target, dataset=dataset, rows=rows, by=by)
    if not ranked:
        return answer
    best, *others = ranked
    missing: list[str] = []

    def compared(
        row: Row, after: Files, before: Files, name: str, shown: bool
    ) -> Comparison | None:
        """None, with a sentence why, where there is nothing to compare."""
        try:
            return comparing.add(after, before, name, by == LIKELIHOOD, shown)
        except DataError as e:
            missing.append(f"{row.name} is not compared with {name}: {e}")
            return None

    answer = replace(answer, best=best)
    for row, equal in _distinct(ranked, comparing):
        before = _files(row.of_draw(0), lambda m: m.base)
        same = comparing.equal(_moved(row), before)
        if same:
            missing.append(f"{row.name} is equal to the target base, question by question.")
        elif c := compared(row, _moved(row), before, BASE, row is best):
            answer.versus_base.append((row, c))
        if equal and row is not best:
            missing.append(f"Equal, question by question: {'; '.join([row.name, *equal])}.")
    for row, _ in _distinct(others, comparing):
        if comparing.equal(_moved(best), _moved(row)):
            continue
        if c := compared(best, _moved(best), _moved(row), row.name, True):
            answer.against.append(Against(row=row, versus=c))
    answer.equal.extend(r.name for r in others if comparing.equal(_moved(best), _moved(r)))
    for row in _beside(best, rows):
        for draw in range(row.draws):
            name = row.name if row.draws == 1 else f"{row.name}, draw {draw + 1}"
            drawn = _moved(row, draw)
            if comparing.equal(_moved(best), drawn):
                missing.append(f"{best.name} is equal to {name}, question by question.")
            elif c := compared(best, _moved(best), drawn, name, True):
                answer.placebos.append(Against(row=row, versus=c))
    answer.notes.extend([*_limits(best, ranked, real, rows, by, comparing), *missing])
    return answer


def _rank(by: str) -> Callable[[Row], tuple[float, float]]:
    """The highest first; of equally high ones the highest by likelihood."""

    def key(row: Row) -> tuple[float, float]:
        first, second = share_by(row, by).mean, row.by_likelihood.mean
        return -(first or 0.0), -(second or 0.0)

    return key


def _beside(best: Row, rows: Sequence[Row]) -> list[Row]:
    """The placebos of the best one's own configuration that spoil its method; where it was only
    measured beside another method, those of that one."""
    mine = [r for r in rows if r.placebo and r.keys == best.keys and r.measured]
    return [r for r in mine if r.spoils in (None, best.short)] or mine


def _limits(
    best: Row,
    ranked: Sequence[Row],
    real: Sequence[Row],
    rows: Sequence[Row],
    by: str,
    comparing: _Comparing,
) -> list[str]:
    said = []
    if by == LIKELIHOOD:
        said.append("By accuracy there is no gap to recover; methods are ranked by log-likelihood.")
    unranked = [r for r in real if r.measured and r not in ranked]
    if unranked:
        names = ", ".join(r.name for r in unranked)
        said.append(f"Not ranked, since there is no gap to recover or it is not known: {names}.")
    if by == ACCURACY and best.calibrated.of:
        shares = f"gap recovered by {best.name} is {best.calibrated}"
        none = "there is no gap to recover"
        eligible = best.calibrated.mean is not None
        said.append(f"{EVEN.capitalize()}, {shares if eligible else none}.")
    if not _beside(best, rows):
        said.append("No placebo was measured beside the best one (transfer.controls=standard).")
    if any(r.state != "done" for r in real):
        said.append("Not all jobs of this pair are done: this is what is known so far.")
    if len({len({m.seed for m in r.measured}) for r in ranked}) > 1:
        said.append("Methods have different numbers of seeds; comparisons are on those they share.")
    by_seed: dict[int, set[str]] = {}
    for row in ranked:
        for seed, file in _files(row.of_draw(0), lambda m: m.own).items():
            if digest := comparing.digest(file):
                by_seed.setdefault(seed, set()).add(digest)
    if any(len(found) > 1 for found in by_seed.values()):
        said.append(
            "The target's own adapters differ between configurations, and gap recovered is relative"
            " to each configuration's own: compare accuracies too."
        )
    return said


def _moved(row: Row, draw: int = 0) -> Files:
    return _files(row.of_draw(draw), lambda m: m.system)


def _files(measured: dict[int, Measured], system: Callable[[Measured], Figures | None]) -> Files:
    found = {seed: (m, system(m)) for seed, m in measured.items()}
    return {seed: records_of(m, s) for seed, (m, s) in found.items() if s}


def _distinct(rows: Sequence[Row], comparing: _Comparing) -> list[tuple[Row, list[str]]]:
    """Rows of different records; with each the names of those that are equal to it."""
    found: dict[object, tuple[Row, list[str]]] = {}
    for row in rows:
        digests = {seed: comparing.digest(file) for seed, file in _moved(row).items()}
        key: object = row.name if None in digests.values() else tuple(sorted(digests.items()))
        if key in found:
            found[key][1].append(row.name)
        else:
            found[key] = row, []
    return list(found.values())


# ---- comparisons ----------------------------------------------------------------------------


class _Comparing:
    """All comparisons of a sweep. A file of records is read once, and one of the same content as
    another is not taken apart again."""

    def __init__(self) -> None:
        self._digests: dict[Path, str | None] = {}
        self._records: dict[str, list[Record]] = {}
        self._made: list[tuple[Comparison, Vector, bool]] = []

    def digest(self, file: Path) -> str | None:
        """What a file holds; None where it has been removed."""
        if file not in self._digests:
            there = file.is_file()
            self._digests[file] = (
                hashlib.sha256(file.read_bytes()).hexdigest() + file.suffix if there else None
            )
        return self._digests[file]

    def equal(self, a: Files, b: Files) -> bool:
        """Whether two systems have the same records on all seeds that both have."""
        pairs = [(self.digest(a[seed]), self.digest(b[seed])) for seed in a.keys() & b.keys()]
        return bool(pairs) and all(x is not None and x == y for x, y in pairs)

    def add(
        self, after: Files, before: Files, name: str, by_likelihood: bool, shown: bool
    ) -> Comparison:
        """after − before on the seeds and questions that both have. p_holm, and the interval, are
        there once all are settled().

        Args:
            name: of `before`.
            shown: whether its interval is wanted also where it is not significant.

        Raises:
            DataError: where records have been removed, or there is nothing in common.
        """
        of, a, b = self._scores(after, before, by_likelihood)
        seeds = len(after.keys() & before.keys())
        exact = of == "accuracy" and seeds == 1
        gained, lost, p = mcnemar(b, a) if exact else (None, None, paired_t(b, a))
        made = Comparison(
            versus=name,
            of=of,
            n=len(a),
            difference=float((a - b).mean()),
            low=float("nan"),
            high=float("nan"),
            gained=gained,
            lost=lost,
            p=p,
            p_holm=p,
        )
        self._made.append((made, a - b, shown))
        return made

    def settled(self) -> list[Comparison]:
        """All that were added, in their order: p adjusted for all of them, and intervals where they
        are shown or decide something."""
        adjusted = adjust([made for made, *_ in self._made])
        wanted = [
            i
            for i, (c, (_, _, shown)) in enumerate(zip(adjusted, self._made, strict=True))
            if shown or c.p_holm < LEVEL
        ]
        bounds = _intervals([self._made[i][1] for i in wanted])
        for i, (low, high) in zip(wanted, bounds, strict=True):
            adjusted[i] = replace(adjusted[i], low=low, high=high)
        return adjusted

    def _read(self, file: Path) -> list[Record]:
        digest = self.digest(file)
        if digest is None:
            raise DataError(f"{file.parent.name}/{file.name} of {file.parent.parent} was removed.")
        if digest not in self._records:
            self._records[digest] = read_run(str(file))[0].records
        return self._records[digest]

    def _scores(
        self, after: Files, before: Files, by_likelihood: bool
    ) -> tuple[str, Vector, Vector]:
        """What is compared, and both sides' mean over seeds per question (n,)."""
        seeds = sorted(after.keys() & before.keys())
        if not seeds:
            raise DataError("there is no seed that both have.")
        pairs = [
            paired(Recorded("one", self._read(after[s])), Recorded("other", self._read(before[s])))
            for s in seeds
        ]
        kinds = {scores(side.records)[0] for pair in pairs for side in pair}
        by_accuracy = kinds == {"accuracy"} and not by_likelihood
        sides = [
            [scores(r.records)[1] if by_accuracy else likelihoods(r.records) for r in side]
            for side in zip(*pairs, strict=True)
        ]
        ids = [[r["id"] for r in a.records] for a, _ in pairs]
        means = [_mean_of(ids, values) for values in sides]
        return "accuracy" if by_accuracy else "log-likelihood", means[0], means[1]


def _mean_of(ids: Sequence[Sequence[str]], values: Sequence[Vector]) -> Vector:
    """Each question's mean over the seeds that asked it."""
    if all(found == ids[0] for found in ids):
        mean: Vector = np.mean(values, axis=0)
        return mean
    known: dict[str, list[float]] = {}
    for asked, scored in zip(ids, values, strict=True):
        for question, value in zip(asked, scored, strict=True):
            known.setdefault(question, []).append(float(value))
    return np.array([np.mean(found) for found in known.values()])


def _intervals(differences: Sequence[Vector], seed: int = 0) -> list[tuple[float, float]]:
    """The paired bootstrap interval of 95 % of each mean difference (n,), as compare() has it."""
    means: dict[int, Vector] = {}
    many: dict[int, list[int]] = {}
    for i, found in enumerate(differences):
        if len(np.unique(found)) <= FEW:
            means[i] = resampled_means(found[:, None], seed)[:, 0]
        else:
            many.setdefault(len(found), []).append(i)
    for several in many.values():
        drawn = _means(np.stack([differences[i] for i in several], axis=1), seed)
        means |= {i: drawn[:, column] for column, i in enumerate(several)}
    bounds: Iterable[Any] = (np.percentile(means[i], [2.5, 97.5]) for i in range(len(differences)))
    return [(float(low), float(high)) for low, high in bounds]


def _means(columns: Vector, seed: int, rows: int = 500) -> Vector:
    """resampled_means() with the same samples, by products of matrices: of a hundred comparisons
    (columns) it takes a tenth of the time.

    Args:
        columns: n × k.
        rows: resamples that are held at once.
    """
    rng, n = np.random.default_rng(seed), len(columns)
    kind = np.uint16 if n <= 2**16 else np.uint32
    out = []
    for _ in range(RESAMPLES // rows):
        drawn = [np.bincount(rng.integers(0, n, n, dtype=kind), minlength=n) for _ in range(rows)]
        out.append(np.array(drawn, dtype=np.float64) @ columns / n)
    return np.concatenate(out)


def _plain(comparison: Comparison) -> dict[str, Any]:
    """An interval that was not needed is absent."""
    return {k: v for k, v in comparison.plain().items() if v == v}
