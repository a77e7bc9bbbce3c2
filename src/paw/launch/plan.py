"""plan=true: what one command, or all jobs of a sweep, would run and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence

from paw.graph import Planned
from paw.text import markdown_table

STATES = ("there", "being made", "missing")


def shown(planned: Sequence[Planned], jobs: int, gpus: int) -> str:
    """
    Args:
        planned: every distinct step.
        jobs: how many graphs they are of.
        gpus: of the hardware profile; 0 where it has none.
    """
    head = ["stage", "steps", *STATES, "expected", *["GPU hours"][:gpus]]
    stages = list(dict.fromkeys(p.step.stage.name for p in planned))
    rows = [
        _row(stage, [p for p in planned if p.step.stage.name == stage], gpus) for stage in stages
    ]
    steps = markdown_table(
        [["step", "state", "expected"], *([p.step.name, p.state, _cost([p])] for p in planned)]
    )
    of = f"{jobs} jobs" if jobs > 1 else "one job"
    table = markdown_table([head, *rows, _row("all", planned, gpus)])
    said = (
        f"{len(planned)} distinct steps for {of}. Expected is what the same stage took before in "
        "this store, the median over those with the most inputs in common; ? where it never ran. "
        "Steps whose inputs turn out equal are made once."
    )
    if gpus:
        said += " GPU hours are those of the devices that a stage uses."
    return "\n\n".join([table, *([steps] if jobs == 1 else []), said])


def _row(name: str, planned: Sequence[Planned], gpus: int) -> list[str]:
    counts = [sum(p.state == state for p in planned) for state in STATES]
    hours = [_hours(planned, gpus)][:gpus]
    return [name, str(len(planned)), *map(str, counts), _cost(planned), *hours]


def _hours(planned: Sequence[Planned], gpus: int) -> str:
    used = {"none": 0, "one": 1, "all": gpus}
    found = [(used[p.step.stage.devices], p.seconds) for p in planned if p.state != "there"]
    known = [devices * seconds / 3600 for devices, seconds in found if seconds is not None]
    unknown = sum(seconds is None and devices > 0 for devices, seconds in found)
    more = [f"{unknown} × ?"] if unknown else []
    return " + ".join([*([f"{sum(known):.2f}"] if known or not more else []), *more])


def _cost(planned: Sequence[Planned]) -> str:
    todo = [p.seconds for p in planned if p.state != "there"]
    known = [s for s in todo if s is not None]
    if not todo:
        return "–"
    unknown = len(todo) - len(known)
    more = f" + {unknown} × ?" if known else f"{unknown} × ?"
    return (f"{sum(known):.1f} s" if known else "") + (more if unknown else "")
