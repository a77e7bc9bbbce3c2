"""What a transfer did, module by module: report.json, report.md and report.png beside the
adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paw.store import Input, write_text
from paw.text import markdown_table
from paw.transfer.layers import similarities
from paw.transfer.modules import ROLES, layer_of
from paw.transfer.verdict import mean

REPORT = ("report.json", "report.md", "report.png")
COLUMNS = {
    "similarity": "similarity",
    "chance": "chance",
    "phi": "Φ",
    "weights": "of weights",
    "weights_chance": "its chance",
    "kept_energy": "energy kept",
    "r2_in": "R² in",
    "r2_out": "R² out",
    "relative_before": "‖ΔW‖/‖W‖ before",
    "relative_after": "after",
}


def write_report(
    out: Path,
    rows: Sequence[dict[str, Any]],
    result: dict[str, Any],
    layers: Sequence[tuple[int, int]],
    match: Input | None,
) -> None:
    """
    Args:
        rows: a module each.
        result: the figures of the whole.
        layers: matched ones (source, target).
        match: the similarity of all layers to all, where it is known.
    """
    data, text, picture = (out / name for name in REPORT)
    write_text(data, json.dumps({**result, "modules": rows}, indent=1))
    drawn = _draw(picture, rows, similarities(match) if match else None, layers)
    by_role = {role: [r for r in rows if layer_of(r["target"])[1] == role] for role in ROLES}
    cells = [
        [role, str(len(found)), *(_cell(mean(found, key)) for key in COLUMNS)]
        for role, found in by_role.items()
        if found
    ]
    left = [r["target"] for r in rows if not r["transferred"]]
    gate = [f"Not transferred, by the gate: {', '.join(left)}."] if left else []
    said = [
        f"# Transfer by {result['method']}",
        f"**{result['feasibility']}**: {result['why']}",
        f"{result['target_modules']} modules, {result['coverage']:.0%} of the adapter's and "
        f"{result['target_coverage']:.0%} of the target's. Means of the modules of a role:",
        markdown_table([["role", "modules", *COLUMNS.values()], *cells]),
        *gate,
        *_left(result["left"]),
        *([f"![layers and modules]({picture.name})"] if drawn else []),
        NOTES,
    ]
    write_text(text, "\n\n".join(said) + "\n")


def _left(left: Mapping[str, int]) -> list[str]:
    counts = ", ".join(f"{n} at {threshold}" for threshold, n in left.items())
    return (
        [f"Modules that a threshold leaves: {counts} (transfer.similarity_threshold)."]
        if left
        else []
    )


NOTES = (
    "Similarity: how much of the target's top singular subspaces the source's fill once mapped "
    "(1 by construction where singular vectors are paired with each other); Φ: the same of the "
    "weights as they are, where shapes agree; of weights: ‖U_sᵀU_t‖²/k², the smaller width filled "
    "up with zeros. Energy kept: ‖T_out ΔW T_in‖² / ‖ΔW‖², before the gain. R²: variance explained "
    "by the maps on positions held out of the fit, the best scalar allowed; 0 is chance. "
    "A row a module: report.json."
)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 0.01 else f"{value:.2f}"


def _draw(
    file: Path,
    rows: Sequence[dict[str, Any]],
    matrix: dict[str, Any] | None,
    layers: Sequence[tuple[int, int]],
) -> bool:
    """The similarity of all layers above chance with the matched ones marked; energy kept, and R²
    of the maps, by module. False where a method has none of it to show."""
    from matplotlib.figure import Figure

    shown = [key for key in ("kept_energy", "r2_in", "r2_out") if mean(rows, key) is not None]
    depth = len({layer_of(r["target"])[0] for r in rows})
    widths = [5.0] * bool(matrix) + [max(5.0, 0.5 * depth + 2)] * bool(shown)
    if not widths:
        return False
    figure = Figure(figsize=(sum(widths), 4.2), layout="constrained")
    axes = iter(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    if matrix:
        ax, values = next(axes), matrix["similarity"]
        limit = max(max(map(abs, row)) for row in values) or 1.0
        image = ax.imshow(
            values, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto"
        )
        ax.plot(*zip(*layers, strict=True), "o", mfc="none", mec="black", ms=7, ls="")
        what = (
            "unbiased CKA of what layers add"
            if matrix["by"] == "cka"
            else "Φ of weights above chance"
        )
        ax.set(
            xlabel="source layer",
            ylabel="target layer",
            title=f"{what}\n(0 is chance; circles: matched)",
        )
        ax.locator_params(integer=True)
        figure.colorbar(image, ax=ax)
    if shown:
        ax = next(axes)
        _bars(ax, rows, shown)
    figure.savefig(file, dpi=110)
    return True


def _bars(ax: Any, rows: Sequence[dict[str, Any]], shown: Sequence[str]) -> None:
    """Energy kept as bars, a colour a role; R² of the module's maps as marks on them."""
    roles = [role for role in ROLES if any(layer_of(r["target"])[1] == role for r in rows)]
    width = 0.8 / len(roles)
    for i, role in enumerate(roles):
        mine = [r for r in rows if layer_of(r["target"])[1] == role]
        x = [layer_of(r["target"])[0] + (i - (len(roles) - 1) / 2) * width for r in mine]
        ax.bar(
            x, [r["kept_energy"] for r in mine], width * 0.92, label=role, color=f"C{i}", alpha=0.55
        )
        for key, mark in (("r2_in", "v"), ("r2_out", "^")):
            if key in shown:
                ax.plot(x, [r[key] for r in mine], mark, color=f"C{i}", ms=4, mec="black", mew=0.3)
    ax.locator_params("x", integer=True)
    marks = "; ▾ R² in, ▴ R² out" if "r2_in" in shown else ""
    ax.set(
        xlabel="target layer",
        title=f"energy kept (bars){marks}",
        ylim=(min(0, ax.get_ylim()[0]), None),
    )
    ax.figure.legend(ncols=len(roles), fontsize=8, loc="outside lower center", frameon=False)
