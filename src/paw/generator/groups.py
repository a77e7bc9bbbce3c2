"""Stage `groups`: examples in random groups that do not overlap, each of which is a prompt."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paw.data.config import DatasetConfig
from paw.data.example import words
from paw.data.load import examples
from paw.errors import DataError
from paw.store import Input, Stage, Watch, write_text
from paw.training.train import SEEN

TRAIN, VAL, TEST = "train", "val", "test"
ROLES = (TRAIN, VAL, TEST)
ALL = "groups.jsonl"  # of every role, in the order of their numbers
FILES = {role: f"{role}_prompts.jsonl" for role in ROLES}


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt: a few examples of a task."""

    task: str
    role: str
    texts: tuple[str, ...]
    examples: tuple[str, ...] = ()  # their ids
    step: int | None = None  # of the checkpoint that had just seen them


@dataclass(kw_only=True)
class GroupsStage:
    dataset: DatasetConfig
    split: str
    samples: int
    ratio: float
    text: str | None = None
    labelled: bool = True
    task: str = ""  # what its groups are of, where there are no tasks
    roles: dict[str, str] = field(default_factory=dict)  # of whole tasks
    most: int | None = None  # groups of a task
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GroupsResult:
    train: int
    val: int
    test: int
    tasks: int = 1

    def __str__(self) -> str:
        of = f" of {self.tasks} tasks" if self.tasks > 1 else ""
        return (
            f"{self.train} prompts{of} to learn from, {self.val} to validate, {self.test} to test"
        )


STAGE = Stage("groups", "1", "paw.generator.groups:groups", config=GroupsStage, result=GroupsResult)


def groups(
    config: GroupsStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> GroupsResult:
    """Writes train_prompts.jsonl, val_prompts.jsonl and test_prompts.jsonl: {task, texts, examples}
    a line; and groups.jsonl with all of them.

    Args:
        inputs: `data`, a split; or one for each task, `task <name>`; with it `trail`, a training
            that kept adapters, whose examples are grouped as they were seen.

    Raises:
        DataError: for rows that cannot be used, or too few for three roles.
    """
    found: list[Group] = []
    tasks = {n.removeprefix("task "): i for n, i in inputs.items() if n.startswith("task ")}
    for task, data in (tasks or {config.task: inputs["data"]}).items():
        texts = _texts(config, data.path)
        if "trail" in inputs:
            chunks = list(_seen(inputs["trail"].path, config, texts, task))
        else:
            chunks = list(_drawn(config, texts, task))
        if len(chunks) < (1 if task in config.roles else 3):
            raise DataError(
                f"{data.path}: {len(texts)} examples in groups of {config.samples} are "
                f"{len(chunks)} prompts, too few to hold some out. Lower "
                "generator.samples_per_prompt."
            )
        found += _with_roles(chunks, config, task)
    found = _apart(found, watch)
    write_groups(out, found)
    counts = {role: sum(g.role == role for g in found) for role in ROLES}
    return GroupsResult(**counts, tasks=max(1, len(tasks)))


def write_groups(folder: Path, found: Sequence[Group]) -> None:
    def lines(some: Sequence[Group]) -> str:
        return "".join(json.dumps(vars(g), ensure_ascii=False) + "\n" for g in some)

    for role, name in FILES.items():
        write_text(folder / name, lines([g for g in found if g.role == role]))
    write_text(folder / ALL, lines(found))


def read_groups(folder: Path) -> list[Group]:
    """All groups in the order of their numbers, of a finished stage or of a user's own folder with
    train_prompts.jsonl and val_prompts.jsonl.

    Raises:
        DataError: naming file and line, for what is no group of texts.
    """
    if (folder / ALL).is_file():
        return read_rows(folder / ALL, TRAIN)
    found = [g for role in ROLES if (folder / FILES[role]).is_file() for g in _of(folder, role)]
    if not any(g.role == TRAIN for g in found) or not any(g.role == VAL for g in found):
        raise DataError(
            f"{folder}: needs {FILES[TRAIN]} and {FILES[VAL]}, each with at least one prompt. "
            "task=generator_prepare writes them."
        )
    return found


def _of(folder: Path, role: str) -> list[Group]:
    return [replace(g, role=role) for g in read_rows(folder / FILES[role], role)]


def _is_text(found: Any) -> bool:
    return isinstance(found, str) and bool(found.strip())


def lines_of(file: Path) -> list[str]:
    """
    Raises:
        DataError: for a file that is no text.
    """
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: is no text in UTF-8 ({e}).") from None


def read_rows(file: Path, role: str) -> list[Group]:
    """The groups of a file, a row a line.

    Raises:
        DataError: naming file and line, for what is no group of texts.
    """
    out = []
    for number, line in enumerate(lines_of(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = row.get("texts") or [row.get("prompt") or row["text"]]
            if not isinstance(texts, list) or not all(map(_is_text, texts)):
                raise ValueError("texts are a list of texts that are not empty")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise DataError(
                f'{file}, line {number}: is no prompt ({e}). Write {{"texts": [...]}}, or '
                '{"prompt": "..."}.'
            ) from None
        out.append(
            Group(
                task=str(row.get("task", "")),
                role=str(row.get("role", role)),
                texts=tuple(texts),
                examples=tuple(map(str, row.get("examples", ()))),
                step=row.get("step"),
            )
        )
    return out


def _texts(config: GroupsStage, file: Path) -> dict[str, str]:
    """Examples as the encoder reads them, by id."""
    dataset = config.dataset
    if config.text is not None:
        dataset = replace(dataset, prompt=config.text)
    found = examples(file, dataset, config.split)
    out = {}
    for e in found:
        asked = words(e.contexts[e.gold])
        out[e.id] = (asked + e.continuations[e.gold] if config.labelled else asked).strip()
    return out


def _drawn(config: GroupsStage, texts: Mapping[str, str], task: str) -> Iterator[Group]:
    names = list(texts)
    random.Random(f"{config.seed} {task}").shuffle(names)
    whole = len(names) // config.samples  # what is left over is no group
    for number in range(min(whole, config.most or whole)):
        chosen = names[number * config.samples : (number + 1) * config.samples]
        yield _group(task, chosen, texts)


def _seen(trail: Path, config: GroupsStage, texts: Mapping[str, str], task: str) -> Iterator[Group]:
    """What each kept adapter has seen since the one before it."""
    for line in map(json.loads, (trail / "trail" / SEEN).read_text().splitlines()):
        names = list(dict.fromkeys(line["examples"]))
        for at in range(0, len(names) - config.samples + 1, config.samples):
            chosen = names[at : at + config.samples]
            yield replace(_group(task, chosen, texts), step=line["step"])


def _group(task: str, names: Sequence[str], texts: Mapping[str, str]) -> Group:
    return Group(task=task, role=TRAIN, texts=tuple(texts[n] for n in names), examples=tuple(names))


def _with_roles(chunks: Sequence[Group], config: GroupsStage, task: str) -> list[Group]:
    """All of a task have its role; without tasks a share of them is held out, and with a trail all
    that one adapter had seen."""
    if task in config.roles:
        return [replace(g, role=config.roles[task]) for g in chunks]
    units = list(dict.fromkeys(_unit(g, i) for i, g in enumerate(chunks)))
    of = dict(zip(units, roles(len(units), config.ratio, config.seed), strict=True))
    return [replace(g, role=of[_unit(g, i)]) for i, g in enumerate(chunks)]


def roles(count: int, ratio: float, seed: int) -> list[str]:
    """Roles of so many things: a share to test, half as many to validate, the rest to learn
    from."""
    order = random.Random(f"roles {seed}").sample(range(count), count)
    test, val = max(1, math.ceil(count * ratio)), max(1, math.ceil(count * ratio / 2))
    of = dict.fromkeys(order[:test], TEST) | dict.fromkeys(order[test : test + val], VAL)
    return [of.get(i, TRAIN) for i in range(count)]


def _apart(found: Sequence[Group], watch: Watch) -> list[Group]:
    """Without prompts that share an example with those that are held out from them: a training of
    more than one epoch sees examples again.

    Raises:
        DataError: where none is left to learn from, or to validate.
    """
    used: dict[tuple[str, str], set[str]] = {}
    for g in found:
        used.setdefault((g.task, g.role), set()).update(g.examples)
    before = {VAL: (TEST,), TRAIN: (TEST, VAL), TEST: ()}
    kept = [
        g
        for g in found
        if not any(used.get((g.task, r), set()) & set(g.examples) for r in before[g.role])
    ]
    if len(kept) < len(found):
        watch.say(f"{len(found) - len(kept)} prompts share examples with held-out ones: left out")
    for role in (TRAIN, VAL):
        if not any(g.role == role for g in kept):
            raise DataError(
                "generator: after prompts that share examples with held-out ones were left out "
                f"there are none of role {role}. Train for less than an epoch (lower "
                "generator.count or generator.every), or use generator.pairing=branch."
            )
    return kept


def _unit(group: Group, number: int) -> int:
    return number if group.step is None else group.step
