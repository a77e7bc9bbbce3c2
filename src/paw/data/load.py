"""A split of a data set as a local file of normalised rows, and its rows as examples."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from paw.data import hub
from paw.data.config import DatasetConfig
from paw.data.example import BadRow, Example, Row
from paw.data.fields import asked, names
from paw.data.kinds import kind_named, normalised, question
from paw.errors import DataError
from paw.paths import cache_dir
from paw.store import Watch
from paw.text import some

SPLIT = re.compile(r"(?P<base>[\w.-]+)(\[(?P<low>\d+%)?:(?P<high>\d+%)?\])?")
HIDDEN = "-"  # in the place of an answer that nobody may see
# what is read of a row, whatever the prompt
READ = {"id", "question", "choices", "labels", "answer", "text", "pair", "messages"}


def find_split(dataset: DatasetConfig, split: str, data_dir: str | None) -> Path | None:
    """The file with a split's rows: in dataset.path, data_dir/<name>, or the cache of the hub.

    None where it is still to be fetched from the hub.

    Raises:
        DataError: where it is in none of them, naming the places that were tried.
    """
    base = _parts(split)[0]
    place = dataset.path or (f"{data_dir}/{dataset.name}" if data_dir else None)
    folder = Path(place).expanduser() if place else None
    if folder and folder.is_file():
        return folder
    if folder and folder.is_dir():
        for ending in (".jsonl", ".jsonl.gz"):
            if (folder / f"{base}{ending}").is_file():
                return folder / f"{base}{ending}"
        have = ", ".join(sorted(p.name for p in folder.glob("*.jsonl*"))) or "no .jsonl files"
        raise DataError(
            f"{dataset.name}: {folder} has no split {base!r} ({base}.jsonl or .jsonl.gz); "
            f"it has {have}."
        )
    if dataset.path:
        raise DataError(f"{dataset.name}: dataset.path {dataset.path} does not exist.")
    if not dataset.hub:
        raise DataError(
            f"{dataset.name}: has neither path nor hub, and is not in "
            f"{data_dir or 'paths.data_dir (not set)'}. Set dataset.path=FILE_OR_FOLDER."
        )
    kept = hub.cached(dataset, base)
    return kept if kept.is_file() else None


def split_file(dataset: DatasetConfig, split: str, data_dir: str | None, watch: Watch) -> Path:
    """The same file, fetched from the hub where it is still to be. Raises the same."""
    found = find_split(dataset, split, data_dir)
    return found or hub.fetch(dataset, _parts(split)[0], watch)


def check_apart(train: Path, train_split: str, test: Path, test_split: str) -> None:
    """
    Raises:
        DataError: for one file as both splits, unless parts of it are asked for.
    """
    if train == test and not ("[" in train_split and "[" in test_split):
        raise DataError(
            f"{train}: one file for both splits would be tested on what was trained. Give parts "
            "of it: 'dataset.train_split=\"train[:80%]\"' 'dataset.eval_split=\"train[80%:]\"'."
        )


def examples(
    file: Path,
    dataset: DatasetConfig,
    split: str,
    form: str = "likelihood",
    skipped: Counter[str] | None = None,
    blind: bool = False,
) -> list[Example]:
    """The rows of a split, rendered. Percentages as in `train[:99%]` are taken of the file's good
    rows in order.

    Args:
        form: likelihood as the kind has it; letter puts the options into the prompt under letters,
            and answers with the letter; classify makes texts of a class, the same for all rows.
        skipped: where dataset.bad_rows=skip, counts what was left out by its reason.
        blind: see `unlabelled`.

    Raises:
        DataError: naming file and line, for a row that is broken, has no gold label or lacks what
            the prompt names.
    """
    kind, out, seen = kind_named(dataset.kind), [], set[str]()
    render = {"letter": question.lettered, "classify": question.classified}.get(form, kind.render)
    classes: tuple[str, ...] | None = None
    for line, text in _lines(file):
        try:
            example = _example(line, text, render, dataset, blind)
            if example.id in seen:
                said = f"the id {example.id!r} occurs twice. Give every row its own."
                raise BadRow("a second time the same id", said)
            if form == "classify" and example.continuations != (classes or example.continuations):
                raise BadRow("other classes", _other_classes(example.continuations, classes or ()))
        except BadRow as bad:
            if dataset.bad_rows == "refuse":
                raise DataError(
                    f"{file}, line {line}: {bad.text} "
                    "Fix the row, or leave such rows out: dataset.bad_rows=skip."
                ) from None
            if skipped is not None:
                skipped[bad.reason] += 1
            continue
        seen.add(example.id)
        classes = example.continuations
        out.append(example)
    _, low, high = _parts(split)
    found = out[int(len(out) * low) : int(len(out) * high)]
    if not found:
        raise DataError(f"{file}: split {split} of {dataset.name} has no usable rows.")
    return found


def unlabelled(file: Path, dataset: DatasetConfig, split: str) -> list[Example]:
    """The rows of a split without their answers: contexts, and choices where there are any. The
    answers are put out of sight before a row is rendered, so that nothing later can depend on them:
    `gold` is 0, and a written answer is a dash.

    Raises:
        DataError: as `examples`, but for an answer that is missing.
    """
    return examples(file, dataset, split, blind=True)


def preferences(file: Path, dataset: DatasetConfig, split: str) -> list[Row]:
    """Pairs of answers to a prompt as {prompt, chosen, rejected}, whatever kind is configured.

    Raises:
        DataError: naming file and line, for a row that lacks one, or has two equal answers.
    """
    found = examples(file, replace(dataset, kind="preference"), split)
    return [
        {"prompt": e.contexts[0], "chosen": e.continuations[0], "rejected": e.continuations[1]}
        for e in found
    ]


def unused(file: Path, dataset: DatasetConfig) -> list[str]:
    """Fields with text in the first row of a user's own file that neither the prompt nor the kind
    reads: a `context` beside the question would otherwise be left out in silence."""
    special = kind_named(dataset.kind).render is not question.render
    line = next(_lines(file), None)
    if line is None or special or cache_dir() in file.parents:
        return []
    try:
        row = json.loads(line[1])
    except ValueError:
        return []  # a broken row is told with its place when it is read
    if not isinstance(row, dict) or "labels" not in row:  # the hub's own rows are the kind's affair
        return []
    templates = (dataset.prompt, dataset.letter_prompt, dataset.fields.asked)
    read = READ.union(*(names("dataset.prompt", text) for text in templates))
    return sorted(key for key, value in row.items() if isinstance(value, str) and key not in read)


def _example(
    line: int,
    text: str,
    render: Callable[[Row, DatasetConfig], Example],
    dataset: DatasetConfig,
    blind: bool,
) -> Example:
    try:
        row = json.loads(text)
    except ValueError:
        raise BadRow("not JSON", "is not JSON.") from None
    if not isinstance(row, dict):
        raise BadRow("not an object", "is not an object with fields.")
    try:
        if blind:
            row = _blinded(row)
        # files may hold the hub's own rows
        if "labels" not in row:
            row = {"id": line, **normalised(row, dataset)}
        if blind:
            row["answer"] = row["labels"][0] if row.get("labels") else HIDDEN
        row = asked(row, dataset.fields)
        row["id"] = str(row.get("id", line))
        example = replace(render(row, dataset), line=line)
    except KeyError as e:
        said = f"has no field {e}, which {dataset.name} needs (its prompt, fields or kind name it)."
        raise BadRow("a missing field", said) from None
    except ValueError:
        said = f"the answer {row.get('answer')!r} is not among the labels {row.get('labels')}. "
        raise BadRow("no gold label", said + "Use a split that has gold labels.") from None
    except (TypeError, AttributeError, IndexError) as e:
        said = f"is not of the form that kind {dataset.kind!r} reads ({e})."
        raise BadRow("another form", said) from None
    choices = example.continuations
    if example.gold >= len(choices):
        said = f"has {len(choices)} choices, but the answer is number {example.gold + 1}."
        raise BadRow("fewer choices than labels", said)
    for i, choice in enumerate(choices, 1):
        if not choice.strip():
            said = f"choice {i} is empty, so there is nothing to score."
            raise BadRow("an empty choice", said)
    return example


def _blinded(row: Row) -> Row:
    """A conversation as far as the answer that is asked for."""
    if "messages" not in row:
        return row
    said = list(row["messages"])
    last = max((i for i, m in enumerate(said) if m["role"] == "assistant"), default=len(said))
    return row | {"messages": [*said[:last], {"role": "assistant", "content": HIDDEN}]}


def _other_classes(classes: tuple[str, ...], first: tuple[str, ...]) -> str:
    return (
        f"its classes {some(classes)} are not those of the first row, {some(first)}. A classifier "
        "needs the same for all; compare such choices with evaluate.mode=likelihood."
    )


def listed(left_out: Counter[str]) -> str:
    """Why rows were left out, in words."""
    return ", ".join(f"{n} with {reason}" for reason, n in left_out.most_common())


def sample(found: list[Example], ratio: float, limit: int | None, seed: int) -> list[Example]:
    """A seeded sample in the file's order: ceil(ratio·n) examples, at most `limit`."""
    count = min(math.ceil(len(found) * ratio), limit or len(found))
    if count >= len(found):
        return found
    chosen = sorted(random.Random(seed).sample(range(len(found)), count))
    return [found[i] for i in chosen]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as f:
            yield from ((number, text) for number, text in enumerate(f, 1) if text.strip())
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise DataError(f"{file}: cannot be read ({e}).") from None


def _parts(split: str) -> tuple[str, float, float]:
    match = SPLIT.fullmatch(split)
    if not match:
        raise DataError(
            f"split {split!r}: write a name, or a name with percentages such as train[:99%]."
        )
    low, high = match["low"] or "0%", match["high"] or "100%"
    return match["base"], int(low[:-1]) / 100, int(high[:-1]) / 100
