"""Gap recovered by every transferred system of a sweep, a column per run.

python benchmarks/seeds.py [--likelihood] SWEEP_DIR [SWEEP_DIR …]

With --likelihood by the gold answers' log-likelihood, which needs fewer questions than accuracy.
Draws of a placebo are folded: mean (lowest to highest) in a run, over all runs under "mean".
docs/methods.md has the commands that make the sweeps.
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from paw.text import markdown_table

System = dict[str, Any]


def main(folders: list[str], key: str) -> None:
    for folder in folders:
        runs = [json.loads(f.read_text()) for f in sorted(Path(folder).glob("*/results.json"))]
        systems = [{s["system"]: s for s in run["systems"]} for run in runs]
        print(f"\n{runs[0]['title']}, {runs[0]['dataset']}\n")
        rows = [["system", *(f"seed {run['seed']}" for run in runs), "mean"]]
        for name in ("source base", "source + own adapter", "target base", "target + own adapter"):
            for what in ("accuracy", "loss"):
                values = [s[name][what] for s in systems]
                rows.append(
                    [f"{name}, {what}", *(f"{v:.3f}" for v in values), f"{mean(values):.3f}"]
                )
        for group in dict.fromkeys(s["draw_of"] for s in systems[0].values() if s[key]):
            draws = [[s for s in found.values() if s["draw_of"] == group] for found in systems]
            label = group if len(draws[0]) == 1 else f"{group}, {len(draws[0])} draws"
            rows.append([label, *(cell(several, key) for several in draws), total(draws, key)])
        print(markdown_table(rows))
        for run, found in zip(runs, systems, strict=True):
            if said := beaten(found):
                print(f"\nseed {run['seed']}: {said}")


def cell(several: list[System], key: str) -> str:
    gaps = [s[key] for s in several]
    if not all(g["eligible"] for g in gaps):
        return "not eligible"
    if len(gaps) == 1:
        return f"{gaps[0]['recovered']:+.2f} [{gaps[0]['low']:+.2f}, {gaps[0]['high']:+.2f}]"
    return spread([g["recovered"] for g in gaps])


def total(draws: list[list[System]], key: str) -> str:
    gaps = [s[key] for several in draws for s in several if s[key]["eligible"]]
    if not gaps:
        return "–"
    values = [g["recovered"] for g in gaps]
    return spread(values) if len(draws[0]) > 1 else f"{mean(values):+.2f}"


def spread(values: list[float]) -> str:
    return f"{mean(values):+.2f} ({min(values):+.2f} to {max(values):+.2f})"


def beaten(found: dict[str, System]) -> str:
    """Of the first method's comparisons on the same questions, how many show it above, by group."""
    first = next(s for s in found.values() if s["gap"])
    groups: dict[str, list[System]] = {}
    for versus in first["versus"][1:]:
        groups.setdefault(found[versus["versus"]]["draw_of"], []).append(versus)
    said = []
    for group, several in groups.items():
        above = sum(v["low"] > 0 and v["p_holm"] < 0.05 for v in several)
        lowest = min(v["low"] for v in several)
        name = group.removeprefix("target + ")
        said.append(f"{name} {above}/{len(several)} (from {lowest:+.3f})")
    return f"{first['system']} is above " + ", ".join(said) if said else ""


if __name__ == "__main__":
    by = "gap_by_likelihood" if "--likelihood" in sys.argv else "gap"
    given = [a for a in sys.argv[1:] if not a.startswith("--")]
    main(given or sys.exit(__doc__), by)
