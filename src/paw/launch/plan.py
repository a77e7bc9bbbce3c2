"""plan=true: what one command, or all jobs of a sweep, would run and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence

from paw.graph import Planned
from paw.text import markdown_table

STATES = ("there", "being made", "missing")


def shown(planned: Sequence[Planned], jobs: int) -> str:
    """
    Args:
        planned: every distinct step.
        jobs: how many graphs they are of.
    """
    head = ["stage", "steps", *STATES, "expected"]
    stages = list(dict.fromkeys(p.step.stage.name for p in planned))
    rows = [_row(stage, [p for p in planned if p.step.stage.name == stage]) for stage in stages]
    steps = markdown_table(
        [["step", "state", "expected"], *([p.step.name, p.state, _cost([p])] for p in planned)]
    )
    of = f"{jobs} jobs" if jobs > 1 else "one job"
    table = markdown_table([head, *rows, _row("all", planned)])
    said = (
        f"{len(planned)} distinct steps for {of}. Expected is what the same stage took before in "
        "this store, the median over those with the most inputs in common; ? where it never ran."
    )
    return "\n\n".join([table, *([steps] if jobs == 1 else []), said])


def _row(name: str, planned: Sequence[Planned]) -> list[str]:
    counts = [sum(p.state == state for p in planned) for state in STATES]
    return [name, str(len(planned)), *map(str, counts), _cost(planned)]


def _cost(planned: Sequence[Planned]) -> str:
    todo = [p.seconds for p in planned if p.state != "there"]
    known = [s for s in todo if s is not None]
    if not todo:
        return "–"
    unknown = len(todo) - len(known)
    more = f" + {unknown} × ?" if known else f"{unknown} × ?"
    return (f"{sum(known):.1f} s" if known else "") + (more if unknown else "")
