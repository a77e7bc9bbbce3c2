"""The table of a sweep: a row per configuration and transferred method, seeds and draws folded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from paw.errors import ConfigError
from paw.refine.config import OF_BASE, SHUFFLED
from paw.sweeps.folder import Job, Sweep
from paw.transfer.config import PlaceboConfig
from paw.transfer.methods import Placebo, method_named

BASE, OWN, ON_TARGET = "target base", "target + own adapter", "target + "
# Overrides that have a column of their own, or that say what stands beside a method and not how it
# works: they tell no configurations apart.
APART = {"model@source", "model@target", "dataset", "transfer", "seed"}
APART |= {"transfer.controls", "transfer.draws"}
WAITING = ("running", "queued", "preempted", "failed")  # the first of them that a seed's jobs have
UNKNOWN = "?"

Figures = dict[str, Any]  # a system of results.json
Cells = dict[str, str]  # a row that is shown, by its columns


@dataclass(frozen=True, kw_only=True)
class Share:
    """Gap recovered: of one system with its interval over questions; of several (seeds, draws)
    their mean, the lowest and the highest."""

    mean: float | None = None
    low: float | None = None  # None where the interval has no end
    high: float | None = None
    eligible: int = 0  # systems that have a gap to recover
    of: int = 0  # systems that were measured

    @property
    def plain(self) -> float | str | None:
        """For a file: the mean, or why there is none."""
        return "not eligible" if self.of and self.mean is None else self.mean

    def __str__(self) -> str:
        if self.mean is None:
            return "not eligible" if self.of else "–"
        if self.of == 1:
            low = "-∞" if self.low is None else f"{self.low:+.2f}"
            high = "+∞" if self.high is None else f"{self.high:+.2f}"
            return f"{self.mean:+.2f} [{low}, {high}]"
        some = "" if self.eligible == self.of else f", {self.eligible} of {self.of} eligible"
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f}){some}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A transferred system of one job, beside the systems that it is measured against."""

    seed: int
    draw: int  # of a placebo
    job: Job
    system: Figures
    base: Figures | None
    own: Figures | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one configuration and method did, over all seeds and draws."""

    source: str
    target: str
    dataset: str
    keys: dict[str, Any]  # what else differs between the jobs of the sweep
    method: str  # as results.json has it: target + ridge
    placebo: bool
    spoils: str | None  # of a placebo the method that it spoils, where it spoils one
    jobs: list[int]
    seeds: list[int]  # also those that are not there yet
    state: str
    measured: list[Measured]

    @property
    def pair(self) -> tuple[str, str, str]:
        return self.source, self.target, self.dataset

    @property
    def short(self) -> str:
        name = self.method.removeprefix(ON_TARGET)
        return f"{name} of {self.spoils}" if self.spoils else name

    @property
    def name(self) -> str:
        """The method with what tells its configuration from others."""
        keys = ", ".join(f"{last(key)}={shown(value)}" for key, value in self.keys.items())
        return f"{self.short} ({keys})" if keys else self.short

    @property
    def share(self) -> Share:
        return _share([m.system["gap"] for m in self.measured])

    @property
    def by_likelihood(self) -> Share:
        return _share([m.system["gap_by_likelihood"] for m in self.measured])

    @property
    def calibrated(self) -> Share:
        """With every answer given as often as it is right. Runs of before have none."""
        return _share([m.system.get("calibrated") for m in self.measured])

    @property
    def draws(self) -> int:
        return 1 + max((m.draw for m in self.measured), default=0)

    @property
    def base_accuracy(self) -> float | None:
        return _mean(_accuracy(m.base) for m in self.measured)

    @property
    def accuracy(self) -> float | None:
        return _mean(_accuracy(m.system) for m in self.measured)

    @property
    def own_accuracy(self) -> float | None:
        return _mean(_accuracy(m.own) for m in self.measured)

    @property
    def coverage(self) -> float | None:
        return _mean(m.system["coverage"] for m in self.measured)

    @property
    def seconds(self) -> float | None:
        """Of all stages of all seeds and draws, when they ran."""
        found = [m.system["seconds"] for m in self.measured]
        return sum(found) if found else None

    def of_draw(self, draw: int) -> dict[int, Measured]:
        """The systems of one draw by seed."""
        return {m.seed: m for m in self.measured if m.draw == draw}

    def plain(self) -> dict[str, Any]:
        """A line of sweep.csv."""
        gap, gold, told = self.share, self.by_likelihood, self.calibrated
        several = [f"{len(self.seeds)} seeds"][: len(self.seeds) > 1]
        several += [f"{self.draws} draws"][: self.draws > 1]
        return {
            "jobs": numbers(self.jobs),
            "source": self.source,
            "target": self.target,
            "dataset": self.dataset,
            **self.keys,
            "method": self.method,
            "placebo_of": self.spoils,
            "placebo": self.placebo,
            "state": self.state,
            "seeds": " ".join(map(str, self.seeds)),
            "draws": self.draws,
            "accuracy_base": self.base_accuracy,
            "accuracy": self.accuracy,
            "accuracy_own": self.own_accuracy,
            "gap_recovered": gap.plain,
            "gap_low": gap.low,
            "gap_high": gap.high,
            "gap_by_likelihood": gold.plain,
            "gap_by_likelihood_low": gold.low,
            "gap_by_likelihood_high": gold.high,
            "gap_calibrated": told.plain,
            "gap_calibrated_low": told.low,
            "gap_calibrated_high": told.high,
            "low_and_high": "range over " + ", ".join(several) if several else "95 % interval",
            "coverage": self.coverage,
            "seconds": self.seconds,
        }


def rows(sweep: Sweep) -> list[Row]:
    """Pairs in the order of the jobs; of a pair the real methods before the placebos."""
    entries: dict[tuple[Any, ...], list[_Described]] = {}
    for same in _configurations(_described(sweep)):
        for method in _methods(same):
            found = same[0]
            key = (*found.pair, _text(found.keys), method, _spoils(method, found.method))
            entries.setdefault(key, []).extend(same)
    made = [_row(key[4], key[5], jobs) for key, jobs in entries.items()]
    pairs = list(dict.fromkeys(row.pair for row in made))
    return sorted(made, key=lambda row: (pairs.index(row.pair), row.placebo))


def state_of(job: Job) -> str:
    return job.state.state if job.state else "queued"


def varied(sweep: Sweep) -> list[str]:
    """The keys by which the configurations of a sweep differ."""
    said = [_overrides(job) for job in sweep.jobs]
    known = dict.fromkeys(key for overrides in said for key in overrides if key not in APART)
    return [key for key in known if len({overrides.get(key) for overrides in said}) > 1]


def last(key: str) -> str:
    """The part of a dotted key that says most."""
    return key.rpartition(".")[2]


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def numbers(found: Sequence[int]) -> str:
    """Numbers of jobs with runs drawn together: 0-2,5."""
    out: list[list[int]] = []
    for n in sorted(found):
        if out and n == out[-1][-1] + 1:
            out[-1].append(n)
        else:
            out.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in out)


# ---- jobs, described ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Described:
    job: Job
    source: str
    target: str
    dataset: str
    method: str  # that it is configured with, not those beside it
    seed: int
    keys: dict[str, Any]

    @property
    def pair(self) -> tuple[str, str, str]:
        return self.source, self.target, self.dataset


def _described(sweep: Sweep) -> list[_Described]:
    def text(key: str, override: str) -> list[str]:
        return [str(value) for value in values(sweep, key, override, UNKNOWN)]

    keys = {key: values(sweep, key, key, "default") for key in varied(sweep)}
    seeds = values(sweep, "seed", "seed", 0)
    return [
        _Described(
            job=job,
            source=source,
            target=target,
            dataset=dataset,
            method=method,
            seed=int(seed),
            keys={key: values[i] for key, values in keys.items()},
        )
        for i, (job, source, target, dataset, method, seed) in enumerate(
            zip(
                sweep.jobs,
                text("source.name", "model@source"),
                text("target.name", "model@target"),
                text("dataset.name", "dataset"),
                text("transfer.method", "transfer"),
                seeds,
                strict=True,
            )
        )
    ]


def values(sweep: Sweep, key: str, override: str, otherwise: Any) -> list[Any]:
    """A key's value in every job: as its config.yaml has it; of a job without one, as in the jobs
    that were asked for the same; else as it was asked for."""
    asked = [_overrides(job).get(override) for job in sweep.jobs]
    found = [_at(job.config, key) for job in sweep.jobs]
    known: dict[str | None, set[Any]] = {}
    for text, value in zip(asked, found, strict=True):
        if value is not None:
            known.setdefault(text, set()).add(value)
    out = []
    for text, value in zip(asked, found, strict=True):
        alike = known.get(text, set())
        if value is None and len(alike) == 1:
            value = next(iter(alike))
        if value is None:
            value = otherwise if text is None else _parsed(text)
        out.append(value)
    return out


def _overrides(job: Job) -> dict[str, str]:
    pairs = (text.lstrip("+~").partition("=") for text in job.overrides)
    return {key: value.strip("'\"") for key, _, value in pairs}


def _at(config: dict[str, Any], key: str) -> Any:
    """The plain value under a dotted key; None where there is none, or a whole group."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return None if isinstance(value, dict) else value


def _parsed(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _text(keys: dict[str, Any]) -> str:
    return json.dumps(keys, sort_keys=True, default=str)


# ---- rows -----------------------------------------------------------------------------------


def _configurations(jobs: Iterable[_Described]) -> list[list[_Described]]:
    """Jobs that differ in their seed only."""
    found: dict[tuple[Any, ...], list[_Described]] = {}
    for d in jobs:
        found.setdefault((*d.pair, _text(d.keys), d.method), []).append(d)
    return list(found.values())


def _methods(same: Sequence[_Described]) -> list[str]:
    """The configured method, then what any of the jobs has beside it."""
    found = [s["draw_of"] for d in same for s in _systems(d.job) if _is_moved(s)]
    return list(dict.fromkeys([ON_TARGET + same[0].method, *found]))


def _systems(job: Job) -> list[Figures]:
    return job.results["systems"] if job.results else []


def _is_moved(system: Figures) -> bool:
    """Not the target's own adapter, of however many steps."""
    name = str(system["system"])
    return name.startswith(ON_TARGET) and not name.startswith(OWN)


def _row(method: str, spoils: str | None, jobs: Sequence[_Described]) -> Row:
    by_seed: dict[int, list[_Described]] = {}
    for d in jobs:
        by_seed.setdefault(d.seed, []).append(d)
    measured: list[Measured] = []
    used: list[int] = []
    states: list[str] = []
    seeds: list[int] = []
    for seed, several in sorted(by_seed.items()):
        found = _measured(method, several)
        if not found and all(_is_without(d, method) for d in several):
            continue
        # what is not measured yet waits for all jobs that may measure it
        used += [found[0].job.number] if found else [d.job.number for d in several]
        states.append(_state(found, several))
        measured += found
        seeds.append(seed)
    first = jobs[0]
    return Row(
        source=first.source,
        target=first.target,
        dataset=first.dataset,
        keys=first.keys,
        method=method,
        placebo=_kind(method)[0],
        spoils=spoils,
        jobs=sorted(set(used)),
        seeds=seeds,
        state=_together(states),
        measured=measured,
    )


def _is_without(d: _Described, method: str) -> bool:
    """Whether a job has ended and never had a method."""
    return state_of(d.job) == "done" and ON_TARGET + d.method != method


def _measured(method: str, jobs: Sequence[_Described]) -> list[Measured]:
    """All draws of a method of one seed. Of several jobs that have it, the one that is configured
    with it counts: beside another it is the same once more."""
    for d in sorted(jobs, key=lambda d: ON_TARGET + d.method != method):
        named = {s["system"]: s for s in _systems(d.job)}
        draws = [s for s in named.values() if s["draw_of"] == method and _is_moved(s)]
        if draws:
            base, own = named.get(BASE), named.get(OWN)
            return [
                Measured(seed=d.seed, draw=i, job=d.job, system=s, base=base, own=own)
                for i, s in enumerate(draws)
            ]
    return []


def _state(found: Sequence[Measured], jobs: Sequence[_Described]) -> str:
    """Of one seed. A job that stopped may have left a system without what it is measured by."""
    if found:
        return "done" if all(m.system["gap"] for m in found) else "partial"
    states = {state_of(d.job) for d in jobs}
    return next((s for s in WAITING if s in states), "done")


def _together(states: Sequence[str]) -> str:
    if len(set(states)) == 1:
        return states[0]
    if {"done", "partial"} & set(states):
        return "partial"
    return next(s for s in WAITING if s in states)


def _kind(method: str) -> tuple[bool, bool]:
    """Whether a method is a placebo, and whether it spoils the configured one."""
    if method.endswith((f" on {OF_BASE}", f" on {SHUFFLED}")):
        return True, False
    try:
        found = method_named(method.removeprefix(ON_TARGET))
    except ConfigError:  # of a plugin that is not here now
        return False, False
    return isinstance(found, Placebo), issubclass(found.schema, PlaceboConfig)


def _spoils(method: str, configured: str) -> str | None:
    return configured if _kind(method)[1] and method != ON_TARGET + configured else None


def _share(gaps: Sequence[dict[str, Any] | None]) -> Share:
    there = [g for g in gaps if g]
    found = [g for g in there if g["eligible"]]
    if not found:
        return Share(of=len(there))
    if len(there) == 1:
        one = found[0]
        low, high = one["low"], one["high"]
        return Share(mean=one["recovered"], low=low, high=high, eligible=1, of=1)
    values = [g["recovered"] for g in found]
    return Share(
        mean=mean(values), low=min(values), high=max(values), eligible=len(found), of=len(there)
    )


def _accuracy(system: Figures | None) -> float | None:
    return system["accuracy"] if system else None


def _mean(values: Iterable[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return mean(found) if found else None


def records_of(measured: Measured, system: Figures) -> Path:
    """The file of a system's records."""
    return measured.job.folder / str(system["records"])
