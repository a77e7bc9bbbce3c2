"""report.html: a run on one page that works offline, in light and in dark.

It is made of the run's folder and of what its steps left in the store, so that it can be made anew
of any run (`task=report run=DIR`).
"""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from paw.config.common import read_as
from paw.data.config import DatasetConfig
from paw.data.example import Example, words
from paw.data.load import examples, find_split
from paw.errors import ConfigError, PawError
from paw.report import drawn
from paw.report.records import read_run
from paw.report.verdict import transferred, verdict
from paw.store import write_text

PAGE = "report.html"
FLIPS = 8  # examples that are shown in each direction
FOREST = "Accuracy and the gap recovered, with intervals of 95 %"
VALIDATED = "The generator, validated"
PICTURES = 6  # of transferred adapters
Json = Mapping[str, Any]


def write_page(folder: Path, store: Path) -> dict[str, str]:
    """Writes report.html into a run's folder, and its figures as PNG beside it.

    Args:
        store: the folder of artifacts, for curves.

    Returns:
        The figures' files within the folder, by their titles.

    Raises:
        ConfigError: where a folder is none of a run.
    """
    run = Run(folder, store)
    write_text(folder / PAGE, rendered("run.html", run=run, python=platform.python_version()))
    for figure in run.figures:
        drawn.png(figure.drawn, folder / figure.file)
    return {figure.title: figure.file for figure in run.figures}


def rendered(template: str, **shown: Any) -> str:
    """A page of report/templates. Whatever is shown is escaped."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("paw", "report/templates")
    made = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return made.get_template(template).render(**shown)


def data_url(file: Path) -> str:
    """A PNG file as a part of a page."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


@dataclass(frozen=True)
class Figure:
    name: str  # of its file
    title: str
    drawn: Any  # matplotlib's Figure

    @property
    def file(self) -> str:
        """Within the run's folder."""
        return f"figures/{self.name}.png"

    @property
    def svg(self) -> str:
        return drawn.svg(self.drawn)


@dataclass(frozen=True)
class Flip:
    """A question that one system has right and the other wrong."""

    question: str
    before: str
    after: str
    gold: str


@dataclass(frozen=True)
class Run:
    """What the page shows, read from files."""

    folder: Path
    store: Path

    @cached_property
    def found(self) -> Json:
        file = self.folder / "results.json"
        if not file.is_file():
            raise ConfigError(
                f"run: {self.folder} is no run folder: it has no results.json. Give one of "
                "outputs/runs."
            )
        held: Json = json.loads(file.read_text(encoding="utf-8"))
        if not {"systems", "said", "steps"} <= set(held):
            raise ConfigError(f"run: {file} is not one that paw wrote. Give a folder of its runs.")
        return held

    @cached_property
    def config(self) -> str:
        file = self.folder / "config.yaml"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    # ---- what it says ----------------------------------------------------------------------------

    @property
    def systems(self) -> Sequence[Json]:
        found: Sequence[Json] = self.found["systems"]
        return found

    @property
    def verdict(self) -> str:
        return verdict(self.found)

    @property
    def said(self) -> list[str]:
        """Sentences, without tables."""
        parts = [part for text in self.found["said"] for part in text.split("\n\n")]
        return [part for part in parts if not part.lstrip().startswith("|")]

    @property
    def tables(self) -> list[list[list[str]]]:
        """Tables that steps say of themselves: rows of cells, the head first."""
        parts = [part for text in self.found["said"] for part in text.split("\n\n")]
        return [_cells(part) for part in parts if part.lstrip().startswith("|")]

    # ---- figures ---------------------------------------------------------------------------------

    @cached_property
    def figures(self) -> list[Figure]:
        made = [
            ("systems", FOREST, drawn.forest(self.systems)),
            ("training", "Training", self._curves("train", "curve.jsonl", "step")),
            ("refinement", "Refinement", drawn.curves(self._refined(), "step", "loss")),
            ("generator", VALIDATED, self._curves("generator", "curve.jsonl", "epoch")),
            ("time", "Where the time went", drawn.costs(self.found["steps"])),
        ]
        return [Figure(name, title, found) for name, title, found in made if found is not None]

    @cached_property
    def pictures(self) -> list[tuple[str, str]]:
        """What transfers drew of themselves, as data URLs: names and images."""
        files = sorted((self.folder / "adapters").glob("*/report.png"))[:PICTURES]
        files += sorted(self.folder.glob("analysis/*.png"))
        return [(f.parent.name, data_url(f)) for f in files]

    def _curves(self, stage: str, name: str, over: str) -> Any:
        return drawn.curves(self._lines(stage, name), over, "loss")

    def _lines(self, stage: str, name: str) -> dict[str, list[Json]]:
        """Lines of a file of every step of a stage."""
        steps = [s for s in self.found["steps"] if s["stage"] == stage and s.get("artifact")]
        return _read({s["name"]: self.store / s["artifact"] / name for s in steps[:12]})

    def _refined(self) -> dict[str, list[Json]]:
        found = {}
        for phase in ("gains", "factors"):
            for name, lines in self._lines("refine", f"curve_{phase}.jsonl").items():
                found[f"{name}: {phase}"] = lines
        return found

    # ---- steps -----------------------------------------------------------------------------------

    @cached_property
    def flow(self) -> list[list[Json]]:
        """Steps in columns: each stands right of all that it reads."""
        steps: Sequence[Json] = self.found["steps"]
        depth: dict[str, int] = {}
        for step in steps:
            needs = [depth[n] for n in step["needs"] if n in depth]
            depth[step["name"]] = max(needs, default=-1) + 1
        columns: list[list[Json]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
        for step in steps:
            columns[depth[step["name"]]].append(step)
        return columns

    @property
    def spent(self) -> str:
        def total(state: str) -> float:
            return sum(s["seconds"] or 0 for s in self.found["steps"] if s["state"] == state)

        return f"{total('computed'):.1f} s computed, {total('reused'):.1f} s reused"

    # ---- examples --------------------------------------------------------------------------------

    @cached_property
    def flips(self) -> list[tuple[str, list[Flip]]]:
        """Questions that the method, or the adapter, answers otherwise than its base."""
        pair = self._compared()
        if pair is None:
            return []
        try:
            recorded = {r.name: {x["id"]: x for x in r.records} for r in read_run(str(self.folder))}
        except PawError:
            return []
        before, after = (recorded.get(name, {}) for name in pair)
        texts = self._examples()
        ways: dict[str, list[Flip]] = {
            f"Right with {pair[1]}, wrong with {pair[0]}": [],
            f"Wrong with {pair[1]}, right with {pair[0]}": [],
        }
        gained, lost = ways
        for name in before.keys() & after.keys():
            a, b = before[name], after[name]
            if a["correct"] != b["correct"] and a["correct"] is not None:
                ways[gained if b["correct"] else lost].append(_flip(texts.get(name), name, a, b))
        return [(title, found[:FLIPS]) for title, found in ways.items() if found]

    def _compared(self) -> tuple[str, str] | None:
        """Base and adapted system, by name."""
        adapted = next((s for s in self.systems if s.get("versus")), None)
        after = transferred(self.found) or adapted
        return None if after is None else (after["versus"][0]["versus"], after["system"])

    def _examples(self) -> dict[str, Example]:
        """The questions' texts; none where the data are no longer there."""
        config = yaml.safe_load(self.config) or {}
        try:
            dataset = read_as(DatasetConfig, config["dataset"])
            split = config["evaluate"].get("split") or dataset.eval_split
            file = find_split(dataset, split, config["paths"].get("data_dir"))
            found = examples(file, dataset, split) if file is not None else []
        except (PawError, KeyError, TypeError):
            return {}
        return {e.id: e for e in found}


def _flip(example: Example | None, name: str, before: Json, after: Json) -> Flip:
    def said(record: Json) -> str:
        if record.get("text") is not None:
            return str(record["text"])
        if example is None or record.get("prediction") is None:
            return f"choice {record.get('prediction')}"
        return example.continuations[int(record["prediction"])].strip()

    asked = words(example.contexts[0]) if example is not None else name
    gold = example.continuations[example.gold].strip() if example is not None else "–"
    return Flip(question=asked, before=said(before), after=said(after), gold=gold)


def _cells(markdown: str) -> list[list[str]]:
    lines = [line.strip().strip("|").split("|") for line in markdown.strip().splitlines()]
    return [[cell.strip() for cell in line] for i, line in enumerate(lines) if i != 1]


def _read(files: Mapping[str, Path]) -> dict[str, list[Json]]:
    out = {}
    for name, file in files.items():
        if file.is_file():
            out[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return out
