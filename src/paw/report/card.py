"""The model card of an adapter in a run's folder: what it is, of what it was made, and how it was
evaluated, in the form that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from paw.models.adapters import CONFIG, birth, read_config
from paw.store import write_text
from paw.text import figure, markdown_table

CARD = "README.md"
WHAT = {
    "train": "Trained on its base.",
    "prefer": "Trained on its base by preferences (DPO).",
    "refine": "Moved from another base and refined without labels, on what the source with its "
    "adapter says.",
    "generate": "Generated from a prompt.",
    "spoil": "A placebo: a transferred adapter made meaningless, to stand beside real ones.",
}


def write_card(folder: Path, *, name: str, about: Mapping[str, Any], rows: Sequence[Any]) -> None:
    """Writes README.md into an adapter's folder; a training's own card is kept, with what was
    found after it.

    Args:
        about: the run's data set, command and version.
        rows: lines of results.csv of the systems that have this adapter.
    """
    if not (folder / CONFIG).is_file():
        return  # prompts, or several adapters in one folder
    card, there = folder / CARD, ""
    if card.is_file():
        there = card.read_text(encoding="utf-8").partition("\n## Evaluation")[0].rstrip()
    parts = [there or _head(folder, name), _evaluation(rows, about) if rows else "", _made(about)]
    write_text(card, "\n\n".join(filter(None, parts)) + "\n")


def _head(folder: Path, name: str) -> str:
    config, said = read_config(folder), birth(folder)
    base, kind = config.get("base_model_name_or_path"), str(config.get("peft_type", "")).lower()
    facts = {"base_model": base, "library_name": "peft", "tags": ["paw", *[kind][: bool(kind)]]}
    front = yaml.safe_dump({k: v for k, v in facts.items() if v}, sort_keys=False)
    lines = [f"---\n{front}---\n\n# {name}", _what(said)]
    return "\n\n".join(lines)


def _what(said: Mapping[str, Any]) -> str:
    if (made := WHAT.get(said.get("made_by", ""))) is not None:
        more = f' The prompt: "{said["prompt"]}".' if said.get("prompt") else ""
        return made + more
    method = said.get("config", {}).get("method")
    if method is None:
        return "An adapter that paw was given."
    coverage = said.get("figures", {}).get("coverage")
    kept = "" if coverage is None else f" It carries {coverage:.0%} of the source's adapter."
    return (
        f"Moved to its base from another one by `transfer={method}`, without the data that it was "
        f"trained on.{kept} report.md has every module."
    )


def _evaluation(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    head = ["system", "questions", "accuracy", "95 %", "loss", "gap recovered", "95 %"]
    cells = [
        [
            row["system"],
            str(row["n"]),
            figure(row.get("accuracy"), ".3f"),
            _span(row, "low", "high", ".3f"),
            figure(row.get("loss"), ".3f"),
            figure(row.get("gap_recovered"), "+.2f"),
            _span(row, "gap_low", "gap_high", "+.2f"),
        ]
        for row in rows
    ]
    return f"## Evaluation\n\n{about['dataset']}.\n\n{markdown_table([head, *cells])}"


def _made(about: Mapping[str, Any]) -> str:
    return f"Made by paw {about['paw']}:\n\n    {about['command']}"


def _span(row: Mapping[str, Any], low: str, high: str, form: str) -> str:
    if row.get(low) is None:
        return "–"
    return f"{figure(row[low], form)} to {figure(row.get(high), form)}"
