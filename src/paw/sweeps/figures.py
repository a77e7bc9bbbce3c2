"""Pictures of a sweep: pairs as heat maps, what a number changes, and what seeds differ by."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from paw.report.drawn import png
from paw.sweeps.best import ACCURACY, measure, share_by
from paw.sweeps.table import Row, last, shown

COLUMNS = 4  # of panels
NARROW = 3.6  # inches of a panel at least
GREY = "0.85"
Line = list[Row]  # along one key, everything else equal


def draw(folder: Path, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Draws what there is to draw.

    Returns:
        What each picture shows, and its file within the folder.
    """
    found = [row for row in rows if row.measured]
    by = measure(found)
    made = [_heat(folder, found, by), *_lines(folder, found, by), _seeds(folder, found, by)]
    return [one for one in made if one is not None]


def _save(folder: Path, name: str, figure: Any) -> str:
    png(figure, folder / name, dpi=110)
    return name


# ---- pairs ----------------------------------------------------------------------------------


def _heat(folder: Path, rows: Sequence[Row], by: str) -> tuple[str, str] | None:
    """Source by target, a panel per method; where a method has several configurations of a pair,
    its best one."""
    sources = list(dict.fromkeys(row.source for row in rows))
    targets = list(dict.fromkeys(row.target for row in rows))
    methods = list(dict.fromkeys((row.short, row.dataset) for row in rows))
    shares = [s for row in rows if (s := share_by(row, by).mean) is not None]
    if max(len(sources), len(targets)) < 2 or not shares:
        return None
    from matplotlib.figure import Figure

    across = min(COLUMNS, len(methods))
    down = math.ceil(len(methods) / across)
    width = max(NARROW, 1.0 * len(targets) + 0.09 * max(map(len, sources)) + 0.5)
    height = 0.7 * len(sources) + 0.07 * max(map(len, targets)) + 0.9
    figure = Figure(figsize=(width * across + 1.2, height * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    one_data_set = len({row.dataset for row in rows}) == 1
    image: Any = None
    for ax, (method, dataset) in zip(panels.flat, methods, strict=False):
        mine = [row for row in rows if (row.short, row.dataset) == (method, dataset)]
        image = _panel(ax, mine, sources, targets, by)
        ax.set_title(method if one_data_set else f"{method}\n{dataset}", fontsize=10)
    for ax in panels.flat[len(methods) :]:
        ax.set_visible(False)
    for ax in panels[:, 0]:
        ax.set_ylabel("source")
    for column in range(across):
        there = [panels[i, column] for i in range(down) if panels[i, column].get_visible()]
        there[-1].set_xlabel("target")
    figure.colorbar(image, ax=panels, label=by, fraction=0.04, extend="both")
    several = len({(row.pair, row.short) for row in rows}) < len(rows)
    best = "; of several configurations the best" if several else ""
    title = f"{_upper(by)} by source and target (grey: missing or not eligible{best})"
    return title, _save(folder, "pairs.png", figure)


def _panel(
    ax: Any, rows: Sequence[Row], sources: Sequence[str], targets: Sequence[str], by: str
) -> Any:
    values = [[math.nan] * len(targets) for _ in sources]
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            here = [row for row in rows if (row.source, row.target) == (source, target)]
            found = [s for row in here if (s := share_by(row, by).mean) is not None]
            values[i][j] = max(found, default=math.nan)
            said = f"{values[i][j]:+.2f}" if found else "not\neligible" if here else ""
            dark = bool(found) and abs(values[i][j]) > 0.6
            ink = "white" if dark else "black"
            ax.text(j, i, said, ha="center", va="center", color=ink, fontsize=9 if found else 7)
    ax.set_facecolor(GREY)
    ax.set_xticks(range(len(targets)), targets, rotation=30, ha="right", fontsize=8)
    ax.set_yticks(range(len(sources)), sources, fontsize=8)
    return ax.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")


# ---- what a number changes ------------------------------------------------------------------


def _lines(folder: Path, rows: Sequence[Row], by: str) -> list[tuple[str, str]]:
    made = []
    for key in dict.fromkeys(key for row in rows for key in row.keys):
        there = [row for row in rows if share_by(row, by).mean is not None]
        numeric = [row for row in there if _is_number(row.keys[key])]
        if len({row.keys[key] for row in numeric}) >= 2:
            made.append(_along(folder, key, _grouped(numeric, partial(_others, key)), by))
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _others(key: str, row: Row) -> tuple[Any, ...]:
    rest = {k: v for k, v in row.keys.items() if k != key}
    return (*row.pair, row.short, str(rest))


def _grouped(rows: Sequence[Row], of: Callable[[Row], tuple[Any, ...]]) -> list[Line]:
    found: dict[tuple[Any, ...], Line] = {}
    for row in rows:
        found.setdefault(of(row), []).append(row)
    return list(found.values())


def _along(folder: Path, key: str, lines: Sequence[Line], by: str) -> tuple[str, str]:
    """A panel per pair; a colour per method, placebos grey."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels: dict[tuple[str, str, str], list[tuple[str, Line]]] = {}
    for line, label in zip(lines, _labels([line[0] for line in lines], key), strict=True):
        panels.setdefault(line[0].pair, []).append((label, line))
    labels = dict.fromkeys(label for panel in panels.values() for label, _ in panel)
    styles = dict(zip(labels, map(_style, range(len(labels))), strict=True))
    across = min(3, math.ceil(math.sqrt(len(panels))))
    down = math.ceil(len(panels) / across)
    beside = 0.075 * max(map(len, labels)) + 0.6
    height = max(3.4 * down, 0.19 * len(labels) + 1.0)
    figure = Figure(figsize=(4.6 * across + beside, height), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    values = sorted({row.keys[key] for line in lines for row in line})
    for ax, (pair, panel) in zip(axes.flat, panels.items(), strict=False):
        _lines_of(ax, key, panel, values, styles, by)
        ax.set_title(f"{pair[0]} → {pair[1]}, {pair[2]}", fontsize=10)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    placebos = {label for panel in panels.values() for label, line in panel if line[0].placebo}
    handles: list[Any] = [
        Line2D(
            [],
            [],
            label=label,
            marker=styles[label][1],
            ms=4,
            ls="-" if solid else ":",
            color=styles[label][0] if solid else "0.5",
        )
        for label in labels
        for solid in [label not in placebos]
    ]
    handles.append(Line2D([], [], ls="--", color="0.4", label="coverage"))
    figure.legend(handles=handles, fontsize=8, loc="outside right upper", frameon=False)
    file = f"over_{re.sub(r'[^A-Za-z0-9]+', '_', key).strip('_')}.png"
    said = f"{_upper(by)} (bars: interval or range) and coverage (dashed) over {key}"
    return said, _save(folder, file, figure)


def _style(number: int) -> tuple[str, str]:
    return f"C{number % 10}", "os^Dv"[number // 10 % 5]


def _lines_of(
    ax: Any,
    key: str,
    panel: Sequence[tuple[str, Line]],
    values: Sequence[float],
    styles: dict[str, tuple[str, str]],
    by: str,
) -> None:
    log = values[0] > 0 and values[-1] / values[0] >= 10
    if log:
        ax.set_xscale("log")
    coverage = ax.twinx()
    shift = _shifts(values, len(panel), log)
    for i, (label, line) in enumerate(panel):
        line = sorted(line, key=lambda row: row.keys[key])
        color, mark = styles[label]
        color, form = ("0.5", ":") if line[0].placebo else (color, "-")
        x = [shift(row.keys[key], i) for row in line]
        shares = [share_by(row, by) for row in line]
        y: list[Any] = [share.mean for share in shares]
        ax.plot(x, y, mark + form, color=color, ms=4, lw=1.3)
        for at, share in zip(x, shares, strict=True):
            if share.low is not None and share.high is not None:
                ax.vlines(at, share.low, share.high, color=color, lw=1)
        covered = [row.coverage for row in line]
        if not line[0].placebo and None not in covered:
            coverage.plot(x, covered, "--", color=color, lw=1, alpha=0.6)
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    ax.set(xlabel=key, ylabel=by)
    ticks = _apart_enough(values, log)
    ax.set_xticks(ticks, [shown(v) for v in ticks])
    ax.minorticks_off()
    if len(ticks) > 5:
        ax.tick_params("x", rotation=60, labelsize=8)
    coverage.set(ylabel="coverage", ylim=(-0.05, 1.05))


def _shifts(values: Sequence[float], lines: int, log: bool) -> Callable[[float, int], float]:
    """Lines a little beside each other, so that their bars can be told apart."""
    scale: Callable[[float], float] = math.log10 if log else float
    steps = [scale(b) - scale(a) for a, b in pairwise(values)]
    step = min(0.3 * min(steps) / lines, 0.03 * sum(steps))

    def shifted(value: float, line: int) -> float:
        at = scale(value) + (line - (lines - 1) / 2) * step
        return 10**at if log else at

    return shifted


def _apart_enough(values: Sequence[float], log: bool) -> list[float]:
    """The values that an axis has room to name."""
    scale: Callable[[float], float] = math.log10 if log else float
    room = 0.06 * (scale(values[-1]) - scale(values[0]))
    out = [values[0]]
    for value in values[1:]:
        if scale(value) - scale(out[-1]) >= room:
            out.append(value)
    return out


def _labels(rows: Sequence[Row], key: str) -> list[str]:
    """The method, with what else tells one line from another of its pair."""
    rest = [k for k in rows[0].keys if k != key and len({str(r.keys[k]) for r in rows}) > 1]
    return [
        ", ".join([row.short, *(f"{last(k)}={shown(row.keys[k])}" for k in rest)]) for row in rows
    ]


# ---- seeds ----------------------------------------------------------------------------------


def _seeds(folder: Path, rows: Sequence[Row], by: str) -> tuple[str, str] | None:
    """A point per seed (of draws: per seed and draw), a column per method; a panel per pair."""
    several = [row for row in rows if len(_points(row, by)) > 1 and len(row.seeds) > 1]
    if not several:
        return None
    from matplotlib.figure import Figure

    panels = _grouped(several, lambda row: row.pair)
    names = [_labels(panel, "") for panel in panels]
    most = max(map(len, panels))
    longest = max(len(name) for panel in names for name in panel)
    height = 2.6 + 0.065 * longest
    size = (max(5.0, 0.45 * most + 2.2), height * len(panels) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharey=True)[:, 0]
    seeds = sorted({seed for row in several for seed in row.seeds})
    for ax, panel, labels in zip(axes, panels, names, strict=True):
        for i, row in enumerate(panel):
            _column(ax, i, row, by, seeds)
        ax.axhline(0, color="0.6", lw=0.8, zorder=0)
        ax.set_xticks(range(len(panel)), labels, rotation=60, ha="right", fontsize=8)
        ax.set(xlim=(-0.6, len(panel) - 0.4), ylabel=by)
        source, target, dataset = panel[0].pair
        ax.set_title(f"{source} → {target}, {dataset}", fontsize=10)
    handles, said = axes[0].get_legend_handles_labels()
    first = dict(zip(said, handles, strict=True))
    order = [f"seed {s}" for s in seeds if f"seed {s}" in first]
    figure.legend(
        [first[s] for s in order], order, fontsize=8, loc="outside right upper", frameon=False
    )
    return f"{_upper(by)} by seed (bars: the mean)", _save(folder, "seeds.png", figure)


def _column(ax: Any, x: int, row: Row, by: str, seeds: Sequence[int]) -> None:
    points = _points(row, by)
    for seed, value in points:
        n = seeds.index(seed)
        beside = 0.4 * (n - (len(seeds) - 1) / 2) / len(seeds)
        ax.plot(x + beside, value, "o", color=f"C{n % 10}", ms=4, alpha=0.7, label=f"seed {seed}")
    mean = sum(value for _, value in points) / len(points)
    ax.hlines(mean, x - 0.3, x + 0.3, color="0.3", lw=1)


def _points(row: Row, by: str) -> list[tuple[int, float]]:
    """The seed and the gap recovered of every system that has one."""
    key = "gap" if by == ACCURACY else "gap_by_likelihood"
    gaps = [(m.seed, m.system[key]) for m in row.measured]
    return [(seed, gap["recovered"]) for seed, gap in gaps if gap and gap["eligible"]]


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]
