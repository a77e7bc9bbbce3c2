"""Figures of a run: as SVG whose ink is the page's own, readable in light and in dark; as PNG on
white."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.store import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # replaced by the page's colour of text
COLOURS = ("#2f7ed8", "#e0812b", "#3a9d5d", "#c0456b", "#7d5fc2", "#8a8d91")
WIDE = 7.6  # inches
LONG = 42  # characters of a row's label
SHOWN = 40  # rows of a figure at most
Json = Mapping[str, Any]


def forest(systems: Sequence[Json]) -> Figure | None:
    """Every system's accuracy and share of the gap, with intervals. Where there are too many, the
    draws of placebos are left out, which the table has."""
    rows = [s for s in systems if s.get("accuracy") is not None]
    if len(rows) > SHOWN:
        rows = [s for s in rows if s.get("draw_of") in (None, s["system"])][:SHOWN]
    if not rows:
        return None
    gaps = any(s.get("gap_recovered") is not None for s in rows)
    figure, axes = _figure(1 + gaps, 0.26 * len(rows) + 0.9)
    places = range(len(rows) - 1, -1, -1)
    for ax, keys, title in (
        (axes[0], ("accuracy", "low", "high"), "accuracy"),
        (axes[-1], ("gap_recovered", "gap_low", "gap_high"), "gap recovered"),
    )[: 1 + gaps]:
        for place, row in zip(places, rows, strict=True):
            value, low, high = (row.get(k) for k in keys)
            if value is None:
                continue
            colour = COLOURS[0] if row.get("draw_of") in (None, row["system"]) else COLOURS[5]
            ends = [value if x is None else x for x in (low, high)]
            ax.plot(ends, [place, place], color=colour, lw=2)
            for end, marker in ((low, "<"), (high, ">")):
                if end is None:  # it ends nowhere
                    ax.annotate(
                        "", (0 if marker == "<" else 1, place), (value, place),
                        xycoords=("axes fraction", "data"), textcoords="data",
                        arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.5},
                    )  # fmt: skip
            ax.plot([value], [place], "o", color=colour, ms=4.5)
        ax.set_xlabel(title)
        ax.grid(axis="x", alpha=0.2, color=INK)
    if gaps:
        for line in (0, 1):
            axes[-1].axvline(line, color=INK, lw=0.7, ls=":")
    axes[0].set_yticks(list(places), [_label(row["system"]) for row in rows])
    axes[0].set_ylim(-0.7, len(rows) - 0.3)
    if gaps:
        axes[-1].sharey(axes[0])
        axes[-1].tick_params(labelleft=False)
    return figure


def curves(found: Mapping[str, Sequence[Json]], x: str, y: str) -> Figure | None:
    """A line for each, over its steps or epochs."""
    there = {name: rows for name, rows in found.items() if any(y in row for row in rows)}
    if not there:
        return None
    figure, [ax] = _figure(1, 3.0)
    for i, (name, rows) in enumerate(there.items()):
        points = [(row.get(x, n), row[y]) for n, row in enumerate(rows) if row.get(y) is not None]
        style = ("-", "--", ":")[i // len(COLOURS) % 3]
        ax.plot(*zip(*points, strict=True), color=COLOURS[i % len(COLOURS)], ls=style, label=name)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.2, color=INK)
    ax.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure


def costs(steps: Sequence[Json]) -> Figure | None:
    """Seconds of the steps that cost most."""
    found = sorted((s for s in steps if s.get("seconds")), key=lambda s: -s["seconds"])[:12]
    if not found:
        return None
    figure, [ax] = _figure(1, 0.26 * len(found) + 0.8)
    for place, step in enumerate(reversed(found)):
        fresh = step["state"] == "computed"
        ax.barh(place, step["seconds"], color=COLOURS[0] if fresh else COLOURS[5], height=0.6)
    ax.set_yticks(range(len(found)), [_label(s["name"]) for s in reversed(found)])
    ax.set_xlabel("seconds (grey: reused, when it ran)")
    ax.grid(axis="x", alpha=0.2, color=INK)
    return figure


def _label(name: str) -> str:
    """Of a row, short enough to leave room for what it is a label of."""
    return name if len(name) <= LONG else f"{name[: LONG - 1]}…"


def _figure(columns: int, height: float) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        ax.tick_params(colors=INK, labelsize=8.5)
        ax.xaxis.label.set_color(INK)
        ax.yaxis.label.set_color(INK)
        ax.set_facecolor("none")
        for name, spine in ax.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(INK)
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure alone, as wide as its place."""
    import matplotlib as mpl

    text = io.StringIO()
    settings = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "paw"}
    with mpl.rc_context(settings):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    figure.set_layout_engine("none")  # it has its layout; another form of it has the same
    found = text.getvalue()
    found = found[found.index("<svg") :].replace(INK, "currentColor")
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
    width = math.ceil(WIDE * 96)
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 style="width:100%;max-width:{width}px" role="img">',
        found,
        count=1,
    )


def png(figure: Figure, file: Path, dpi: int = 140) -> None:
    with replacing(file) as part:
        figure.savefig(part, format="png", dpi=dpi, facecolor="white")
