"""The tables of summary.md and of the console: systems, and steps."""

from __future__ import annotations

from collections.abc import Sequence

from paw.evaluation.statistics import Gap
from paw.report.claims import Claim, Recovered, recovered_by
from paw.report.model import Draws, StepRow, System, draws
from paw.text import figure, table_within

# Figures of heads and of marked choices: columns where any system has them.
EXTRA = {"f1": "F1", "f1_macro": "F1 macro", "precision": "precision", "recall": "recall"}
EXTRA |= {"mcc": "MCC", "pearson": "Pearson", "spearman": "Spearman"}

# Columns that go first where a table is too wide: all are in summary.md and results.csv.
SPARE = ("GPU MiB", "RAM MiB", "stages", "perplexity", "seconds", "coverage", "loss", "calibrated")

NOTES = (
    "± is one standard error, brackets are 95 % intervals; of several draws of a placebo, "
    "the mean and (lowest to highest). Loss is nats per token of the gold answers; "
    "perplexity is its exponential. "
    "Gap recovered is (transferred − base)/(own − base) with a paired bootstrap interval. "
    "p is that of the exact McNemar test (of log-likelihoods, of the paired t-test), "
    "and after Holm it is adjusted for all comparisons made here. "
    "Seconds are those of the stages when they ran."
)
CALIBRATED = (
    "Calibrated is the gap recovered by accuracy with every answer given as often as it is right, "
    "by a constant for each: what a system tells apart, without how often it gives each answer."
)


def table(systems: Sequence[System], claims: Sequence[Claim], width: int | None = None) -> str:
    """The systems as an aligned Markdown table, the draws of a placebo in one row.

    Of several draws a row has means, with their ranges in parentheses; peaks of memory are the
    largest, and seconds are those of all draws.

    Args:
        width: characters that a line may have; columns without figures are left out then, and
            those that say less.
    """
    extra = {
        k: v for k, v in EXTRA.items() if any(getattr(s.result, k) is not None for s in systems)
    }
    rows = [_cells(several, extra, claims) for several in draws(systems, lambda s: s)]
    columns = [c for c in rows[0] if width is None or any(row[c] != "–" for row in rows)]
    return table_within(rows, width, SPARE, columns)


def notes(claims: Sequence[Claim]) -> str:
    """What the columns of the table are."""
    return f"{NOTES} {CALIBRATED}" if _calibrated(claims) else NOTES


def _calibrated(claims: Sequence[Claim]) -> bool:
    """Whether all questions have the same choices."""
    return any(isinstance(c, Recovered) and c.calibrated is not None for c in claims)


def _cells(
    several: Draws[System], extra: dict[str, str], claims: Sequence[Claim]
) -> dict[str, str]:
    systems, result = several.found, several.found[0].result
    accuracy, coverage = _spread(_figures(several, "accuracy"), ".3f"), systems[0].coverage
    if len(systems) == 1 and result.accuracy is not None:
        accuracy += f" ± {result.stderr:.3f} [{result.low:.3f}, {result.high:.3f}]"
    gpu = [s.gpu_mib for s in systems if s.gpu_mib is not None]
    recovered = [found for s in systems if (found := recovered_by(s, claims)) is not None]
    told = _calibrated(claims)
    states = {"reused" if a.reused else "computed" for s in systems for a in s.stages}
    return {
        "system": several.label,
        "accuracy": accuracy,
        **{name: _spread(_figures(several, key), ".3f") for key, name in extra.items()},
        "loss": _mean(_figures(several, "loss"), ".3f"),
        "perplexity": _mean(_figures(several, "perplexity"), ".3g"),
        "seconds": f"{sum(s.seconds for s in systems):.1f}",
        "RAM MiB": f"{max(s.ram_mib for s in systems):.0f}",
        "GPU MiB": f"{max(gpu):.0f}" if gpu else "–",
        "coverage": "–" if coverage is None else f"{coverage:.0%}",
        "gap recovered": _gap([r.gap for r in recovered]),
        **({"calibrated": _gap([r.calibrated for r in recovered if r.calibrated])} if told else {}),
        "stages": states.pop() if len(states) == 1 else "partly reused",
    }


def _gap(gaps: Sequence[Gap]) -> str:
    found = [g.recovered for g in gaps if g.recovered is not None]
    if gaps and not found:
        return "not eligible"
    interval = f" [{gaps[0].low:+.2f}, {gaps[0].high:+.2f}]" if len(gaps) == 1 else ""
    return _spread(found, "+.2f") + interval


def _figures(several: Draws[System], key: str) -> list[float]:
    """A figure of every draw that has it."""
    values = (getattr(s.result, key) for s in several.found)
    return [float(value) for value in values if value is not None]


def _mean(values: Sequence[float], form: str) -> str:
    return f"{sum(values) / len(values):{form}}" if values else "–"


def _spread(values: Sequence[float], form: str) -> str:
    """One value; or the mean of several, with the lowest and the highest."""
    mean = _mean(values, form)
    return mean if len(values) < 2 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def steps_section(steps: Sequence[StepRow]) -> str:
    """What did not work and why; every step with those it read; and what was spent and saved."""
    wrong = [f"- {s.state}: {s.name}: {s.text}" for s in steps if s.state in ("failed", "left out")]
    rows = [
        {
            "step": s.name,
            "from": ", ".join(s.needs) or "–",
            "state": s.state,
            "seconds": figure(s.seconds, ".1f"),
            "RAM MiB": figure(s.ram_mib, ".0f"),
            "GPU MiB": figure(s.gpu_mib, ".0f"),
            "CPU %": figure(s.cpu_percent, ".0f"),
            "GPU %": figure(s.gpu_percent, ".0f"),
        }
        for s in steps
    ]
    computed, reused = (
        [s.seconds or 0 for s in steps if s.state == state] for state in ("computed", "reused")
    )
    spent = f"Computed now: {sum(computed):.1f} s in {_steps(computed)}"
    saved = f"; reused: {_steps(reused)} that had cost {sum(reused):.1f} s" if reused else ""
    parts = ["\n".join(wrong), table_within(rows, None, ()), f"{spent}{saved}."]
    return "\n\n".join(filter(None, parts))


def _steps(seconds: Sequence[float]) -> str:
    return f"{len(seconds)} step{'' if len(seconds) == 1 else 's'}"
