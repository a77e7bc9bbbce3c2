"""Stage `generate`: adapters of prompts, or what stands beside them in their place."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paw.errors import AdapterError, DataError
from paw.generator.checkpoints import write_folder
from paw.generator.encoder import Encoder
from paw.generator.generator import Generator
from paw.generator.groups import TEST, TRAIN, Group, lines_of, read_rows
from paw.generator.texts import Prompts
from paw.generator.tokens import Checkpoints
from paw.models.adapters import stamp
from paw.models.load import Runtime
from paw.store import Input, Stage, Watch, write_text
from paw.text import file_name

if TYPE_CHECKING:
    import torch

# by name the vectors of a prompt, and its number among the groups
Wanted = dict[str, tuple[Any, int | None]]
FIGURES = "figures.json"
GENERATED, OWN = "generated", "own"


@dataclass(kw_only=True)
class GenerateStage:
    how: str = GENERATED  # or a control
    tasks: list[str] = field(default_factory=list)  # of held-out prompts: an adapter for each
    prompt: str | None = None
    form: str = ""  # of a user's file: lines or jsonl
    seed: int = 0
    runtime: Runtime


@dataclass(frozen=True, kw_only=True)
class GenerateResult:
    adapters: int
    seconds: float  # a prompt, encoder included

    def __str__(self) -> str:
        return f"{self.adapters} adapters, {self.seconds:.2f} s each"

    @property
    def said(self) -> str:
        return f"Generated: {self}."


STAGE = Stage(
    "generate",
    "1",
    "paw.generator.generate:generate",
    config=GenerateStage,
    result=GenerateResult,
    devices="one",
)


def generate(
    config: GenerateStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> GenerateResult:
    """Writes PEFT folders: one for every task, named after it, from its first held-out prompt; or
    one for every prompt of a user's file; or of a single prompt, the folder itself.

    Args:
        inputs: `generator`; `encoder` where texts are read here. Of held-out tasks: `texts`, and
            `tokens` for the controls that are checkpoints themselves. Of a user: `prompts`, a file.

    Raises:
        DataError: where there is no prompt.
    """
    import time

    made = Generator(inputs["generator"].path)
    began = time.perf_counter()
    _check(made, inputs)
    if config.prompt is not None or "prompts" in inputs:
        one = {"prompt": [config.prompt]} if config.prompt is not None else {}
        sets = one or _asked(inputs["prompts"].path, config.form)
        encoder = Encoder(inputs["encoder"].path, config.runtime.device)
        wanted: Wanted = {name: (encoder.encode(texts), None) for name, texts in sets.items()}
    else:
        wanted = _held(config, inputs)
    maker = _Maker(config, inputs, made)
    figures = dict[str, Any]()
    for number, (name, (vectors, group)) in enumerate(wanted.items()):
        tokens, of = maker.make(vectors, group)
        folder = out if config.prompt is not None else out / file_name(name)
        write_folder(folder, made.adapter, made.layout.unpack(tokens))
        stamp(
            folder,
            made.about["base"],
            made_by="generate",
            how=config.how,
            generator=inputs["generator"].fingerprint,
            prompt=config.prompt or name,
        )
        figures[name] = of
        watch.progress(number + 1, len(wanted), "adapters")
    seconds = (time.perf_counter() - began) / len(wanted)
    write_text(out / FIGURES, json.dumps(figures, indent=1))
    return GenerateResult(adapters=len(wanted), seconds=seconds)


def _check(made: Generator, inputs: Mapping[str, Input]) -> None:
    """
    Raises:
        AdapterError: for another base or another encoder than the generator was trained with.
    """
    for name, what in (("model", "base"), ("encoder", "encoder")):
        if name in inputs and inputs[name].fingerprint != made.about[what]:
            key = "model@source" if name == "model" else "generator.encoder"
            raise AdapterError(
                f"{inputs['generator'].path}: was trained with another {what} than {key}. Name "
                "the one that it was trained with."
            )


def _asked(file: Path, form: str) -> dict[str, list[str]]:
    """A user's prompts: a text with one a line, or .jsonl rows of texts or a prompt.

    Raises:
        DataError: for a file without any, or a row that is none.
    """
    if form == "jsonl":
        sets = [list(group.texts) for group in read_rows(file, TEST)]
    else:
        sets = [[line.strip()] for line in lines_of(file) if line.strip()]
    if not sets:
        raise DataError(f"{file}: holds no prompt. Write one a line.")
    return {f"prompt_{number:04d}": texts for number, texts in enumerate(sets)}


def _held(config: GenerateStage, inputs: Mapping[str, Input]) -> Wanted:
    """For every task the vectors that its adapter is made of, and the number of its prompt."""
    prompts = Prompts(inputs["texts"].path)
    first: dict[str, int] = {}
    for i, group in enumerate(prompts.groups):
        if group.role == TEST:
            first.setdefault(group.task, i)
    tasks = config.tasks
    if len(tasks) == 1 and first:  # prompts of one data set, whatever they call it
        first = {tasks[0]: first.get(tasks[0], next(iter(first.values())))}
    if missing := [t for t in tasks if t not in first]:
        raise DataError(
            f"{inputs['texts'].path}: task {missing[0]} has no held-out prompt. Give them as "
            "test_prompts.jsonl beside train_prompts.jsonl, or leave generator.prompts out."
        )
    if config.how == "strings":
        encoder = Encoder(inputs["encoder"].path, config.runtime.device)
        strings = {t: _strings(prompts.groups[first[t]], config.seed) for t in tasks}
        return {t: (encoder.encode(strings[t]), first[t]) for t in tasks}
    if config.how != "shuffled":
        return {t: (prompts[first[t]], first[t]) for t in tasks}
    if len(tasks) > 1:  # every task with the prompt of the next but some
        turn = 1 + random.Random(config.seed).randrange(len(tasks) - 1)
        other = {t: tasks[(i + turn) % len(tasks)] for i, t in enumerate(tasks)}
        return {t: (prompts[first[other[t]]], first[t]) for t in tasks}
    others = [i for i, g in enumerate(prompts.groups) if i != first[tasks[0]]]
    chosen = random.Random(config.seed).choice(others)
    return {tasks[0]: (prompts[chosen], first[tasks[0]])}


def _strings(like: Group, seed: int) -> list[str]:
    """Random letters, as long as the texts that they stand for."""
    rng = random.Random(f"{seed} {like.task}")
    return ["".join(rng.choice(string.ascii_lowercase + " ") for _ in text) for text in like.texts]


class _Maker:
    """Tokens of a prompt, or of a control that takes its place."""

    def __init__(self, config: GenerateStage, inputs: Mapping[str, Input], made: Generator) -> None:
        self.config, self.made = config, made
        self.learnt = sorted({p.checkpoint for p in made.pairs if p.role == TRAIN})
        self.checkpoints = Checkpoints(inputs["tokens"].path) if "tokens" in inputs else None
        self.prompts = Prompts(inputs["texts"].path) if "texts" in inputs else None

    def make(self, vectors: Any, group: int | None) -> tuple[torch.Tensor, dict[str, Any]]:
        """Tokens, and what is known of them: the distance to the mean of the training checkpoints
        and to the nearest of them, in units of their spread; and the skill, 1 − mse/mse of the
        mean, against the checkpoints that belong to the prompt."""
        import torch

        how, made = self.config.how, self.made
        if how == "mean":
            tokens = made.scale.mean
        elif how == "gaussian":
            draw = torch.Generator().manual_seed(self.config.seed)
            noise = torch.randn(made.scale.mean.shape, generator=draw)
            tokens = made.scale.mean + made.deviation * noise * made.scale.weight
        elif how == "last":
            tokens = self._checkpoint(max(self.learnt))
        elif how == "nearest":
            tokens = self._checkpoint(self._nearest(vectors))
        else:
            tokens = made.tokens(vectors)
        return tokens, self._figures(tokens, group)

    def _checkpoint(self, number: int) -> torch.Tensor:
        assert self.checkpoints is not None
        return self.checkpoints[number]

    def _nearest(self, vectors: Any) -> int:
        """The training checkpoint that belongs to the training prompt most alike by cosine."""
        assert self.prompts is not None
        pairs = [p for p in self.made.pairs if p.role == TRAIN]
        groups = sorted({p.group for p in pairs})
        means = np.stack([_unit(self.prompts[g].mean(0)) for g in groups])
        best = groups[int((means @ _unit(vectors.mean(0))).argmax())]
        return next(p.checkpoint for p in pairs if p.group == best)

    def _figures(self, tokens: torch.Tensor, group: int | None) -> dict[str, Any]:
        scale = self.made.scale

        def apart(one: torch.Tensor, other: torch.Tensor) -> float:
            off = (one - other) / scale.spread * scale.weight
            return float((off.square().sum() / scale.weight.sum()).sqrt())

        found: dict[str, Any] = {"to_mean": apart(tokens, scale.mean)}
        if self.checkpoints is not None:
            mine = {p.checkpoint for p in self.made.pairs if p.group == group}
            true = [self.checkpoints[j] for j in sorted(mine)]
            if true:
                off = sum(apart(tokens, t) ** 2 for t in true)
                mean = sum(apart(scale.mean, t) ** 2 for t in true)
                found["skill"] = 1 - off / max(mean, 1e-12)
            distances = {j: apart(tokens, self.checkpoints[j]) for j in self.learnt}
            near = min(distances, key=lambda j: distances[j])
            found |= {"to_nearest": distances[near], "nearest": self.checkpoints.all[near].name}
        return found


def _unit(vector: Any) -> Any:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
