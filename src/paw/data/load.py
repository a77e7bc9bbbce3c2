"""A split of a data set as a local file of normalised rows, and its rows as examples."""

from __future__ import annotations

import gzip
import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from string import Formatter
from typing import TypeVar

from filelock import FileLock

from paw.data.config import DatasetConfig
from paw.data.example import Example, Row
from paw.data.kinds import Kind, kind_named, question
from paw.errors import DataError
from paw.paths import cache_dir
from paw.store import Watch, digest, replacing
from paw.text import some

T = TypeVar("T")
NORMALISED = "2"  # raise it when a kind reads the hub's rows differently
SPLIT = re.compile(r"(?P<base>[\w.-]+)(\[(?P<low>\d+%)?:(?P<high>\d+%)?\])?")


def split_file(dataset: DatasetConfig, split: str, data_dir: str | None, watch: Watch) -> Path:
    """The file with a split's normalised rows: dataset.path, data_dir/<name>, or the hub (kept in the cache).

    Raises:
        DataError: naming the places that were tried.
    """
    base = _parts(split)[0]
    folders = [Path(dataset.path).expanduser()] if dataset.path else []
    if data_dir and not dataset.path:
        folders.append(Path(data_dir).expanduser() / dataset.name)
    for folder in folders:
        if folder.is_file():
            return folder
        for ending in (".jsonl", ".jsonl.gz"):
            if (folder / f"{base}{ending}").is_file():
                return folder / f"{base}{ending}"
        if folder.is_dir():
            have = ", ".join(sorted(p.name for p in folder.glob("*.jsonl*"))) or "no .jsonl files"
            raise DataError(
                f"{dataset.name}: {folder} has no split {base!r} ({base}.jsonl or .jsonl.gz); it has {have}."
            )
    if dataset.path:
        raise DataError(f"{dataset.name}: dataset.path {dataset.path} does not exist.")
    if not dataset.hub:
        raise DataError(
            f"{dataset.name}: has neither path nor hub, and is not in {data_dir or 'paths.data_dir (not set)'}. "
            "Set dataset.path=FILE_OR_FOLDER."
        )
    return _from_hub(dataset, base, folders, watch)


def examples(
    file: Path,
    dataset: DatasetConfig,
    split: str,
    form: str = "likelihood",
    skipped: Counter[str] | None = None,
) -> list[Example]:
    """The rows of a split, rendered. Percentages as in `train[:99%]` are taken of the file's good rows in order.

    Args:
        form: likelihood as the kind has it; letter puts the options into the prompt under letters, and answers with the
            letter; classify makes texts of a class, the same classes for all rows.
        skipped: where dataset.bad_rows=skip, counts what was left out by its reason.

    Raises:
        DataError: naming file and line, for a row that is broken, has no gold label or lacks what the prompt names.
    """
    kind, out, seen = kind_named(dataset.kind), [], set[str]()
    render = {"letter": question.lettered, "classify": question.classified}.get(form, kind.render)
    classes: tuple[str, ...] | None = None
    for line, text in _lines(file):
        try:
            example = _example(line, text, kind, render, dataset)
            if example.id in seen:
                raise _Bad(
                    "a second time the same id",
                    f"the id {example.id!r} occurs twice. Give every row its own.",
                )
            if form == "classify" and example.continuations != (classes or example.continuations):
                said = f"its classes {some(example.continuations)} are not those of the first row, {some(classes or ())}."
                raise _Bad(
                    "other classes",
                    f"{said} A classifier needs the same for all; compare such choices with evaluate.mode=likelihood.",
                )
        except _Bad as bad:
            if dataset.bad_rows == "refuse":
                raise DataError(
                    f"{file}, line {line}: {bad.text} Fix the row, or leave such rows out: dataset.bad_rows=skip."
                ) from None
            if skipped is not None:
                skipped[bad.reason] += 1
            continue
        seen.add(example.id)
        classes = example.continuations
        out.append(example)
    return _part(out, split, file, dataset)


READ = {
    "id",
    "question",
    "choices",
    "labels",
    "answer",
    "text",
    "pair",
    "messages",
}  # of a row, whatever the prompt


def unused(file: Path, dataset: DatasetConfig) -> list[str]:
    """Fields with text in the first row of a user's own file that neither the prompt nor the kind reads: a `context` beside the
    question would otherwise be left out in silence."""
    kind = kind_named(dataset.kind)
    line = next(_lines(file), None)
    if (
        line is None
        or getattr(kind, "render", None) is not question.render
        or cache_dir() in file.parents
    ):
        return []
    try:
        row = json.loads(line[1])
    except ValueError:
        return []  # a broken row is told with its place when it is read
    if not isinstance(row, dict) or "labels" not in row:  # the hub's own rows are the kind's affair
        return []
    reads: set[str] = getattr(kind, "READS", set())
    named = {
        name
        for prompt in (dataset.prompt, dataset.letter_prompt)
        for _, name, _, _ in Formatter().parse(prompt)
        if name
    }
    return sorted(
        key
        for key, value in row.items()
        if isinstance(value, str) and key not in READ | named | reads
    )


def preferences(file: Path, dataset: DatasetConfig, split: str) -> list[Row]:
    """Rows of a chosen and a rejected answer to a prompt: {prompt, chosen, rejected}, or `dataset.prompt` over other fields.

    Raises:
        DataError: naming file and line, for a row that lacks one, or has two equal answers.
    """
    out = []
    for line, text in _lines(file):
        try:
            row = json.loads(text)
            prompt = str(row["prompt"]) if "prompt" in row else dataset.prompt.format(**row)
            found = {
                "prompt": prompt,
                "chosen": str(row["chosen"]),
                "rejected": str(row["rejected"]),
            }
        except ValueError:
            raise DataError(f"{file}, line {line}: is not JSON.") from None
        except (KeyError, TypeError) as e:
            raise DataError(
                f"{file}, line {line}: has no field {e}; a preference is {{prompt, chosen, rejected}}."
            ) from None
        if found["chosen"].strip() == found["rejected"].strip():
            raise DataError(
                f"{file}, line {line}: both answers are the same, so neither is to be preferred. Leave the row out."
            )
        out.append(found)
    return _part(out, split, file, dataset)


class _Bad(Exception):
    """A row that cannot be used: why, in words that are counted, and in a sentence of its own."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason, self.text = reason, text


def _example(
    line: int,
    text: str,
    kind: Kind,
    render: Callable[[Row, DatasetConfig], Example],
    dataset: DatasetConfig,
) -> Example:
    try:
        row = json.loads(text)
    except ValueError:
        raise _Bad("not JSON", "is not JSON.") from None
    if not isinstance(row, dict):
        raise _Bad("not an object", "is not an object with fields.")
    try:
        if "labels" not in row:  # files may hold the hub's own rows
            row = {"id": line, **kind.normalise(row)}
        elif hasattr(kind, "own"):
            row = kind.own(row)
        row["id"] = str(row.get("id", line))
        example = replace(render(row, dataset), line=line)
    except KeyError as e:
        raise _Bad(
            "a missing field",
            f"has no field {e}, which {dataset.name} needs (its prompt and kind name it).",
        ) from None
    except ValueError:
        said = f"the answer {row.get('answer')!r} is not among the labels {row.get('labels')}. Use a split that has gold labels."
        raise _Bad("no gold label", said) from None
    except (TypeError, AttributeError, IndexError) as e:
        raise _Bad(
            "another form", f"is not of the form that kind {dataset.kind!r} reads ({e})."
        ) from None
    if example.gold >= len(example.continuations):
        raise _Bad(
            "fewer choices than labels",
            f"has {len(example.continuations)} choices, but the answer is number {example.gold + 1}.",
        )
    for i, choice in enumerate(example.continuations):
        if not choice.strip():
            raise _Bad("an empty choice", f"choice {i + 1} is empty, so there is nothing to score.")
    return example


def _part(rows: list[T], split: str, file: Path, dataset: DatasetConfig) -> list[T]:
    """The percentages that a split asks for, of good rows in order."""
    _, low, high = _parts(split)
    found = rows[int(len(rows) * low) : int(len(rows) * high)]
    if not found:
        raise DataError(f"{file}: split {split} of {dataset.name} has no usable rows.")
    return found


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


def _from_hub(dataset: DatasetConfig, base: str, tried: list[Path], watch: Watch) -> Path:
    """The hub's split in normalised form, made once per machine. `dataset.hub` may be a folder in the hub's layout."""
    hub = dataset.hub or ""
    parts = [hub, dataset.subset or "", dataset.revision or "", dataset.kind, NORMALISED]
    if Path(hub).is_dir():  # a folder may change; the hub's revisions are its own affair
        parts += [
            f"{p.relative_to(hub)} {p.stat().st_size} {p.stat().st_mtime_ns}"
            for p in sorted(Path(hub).rglob("*"))
            if p.is_file()
        ]
    name = re.sub(r"[^\w.-]+", "_", hub.rstrip("/").split("/")[-1])
    out = cache_dir() / "data" / f"{name}-{digest(parts)[:12]}" / f"{base}.jsonl"
    if out.is_file():
        return out
    try:
        import datasets
    except ImportError:
        raise DataError(
            f'{dataset.name}: reading from the hub needs the package datasets. Install it: pip install "paw[hub]".'
        ) from None
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries are not the user's to read
    watch.say(f"{dataset.name}: fetching split {base} of {dataset.hub}")
    try:
        rows = datasets.load_dataset(
            dataset.hub, dataset.subset, split=base, revision=dataset.revision
        )
    except Exception as e:  # whatever the library raises, the user needs one line
        places = ", ".join([*map(str, tried), f"the hub ({dataset.hub})"])
        reason = (str(e).splitlines() or [type(e).__name__])[0][:160]
        raise DataError(
            f"{dataset.name}: split {base} is not in {places}: {reason} Put {base}.jsonl into "
            f"paths.data_dir/{dataset.name}, or set dataset.path."
        ) from None
    kind = kind_named(dataset.kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(f"{out}.lock"),
        replacing(out) as beside,
        open(beside, "w", encoding="utf-8") as f,
    ):
        for i, row in enumerate(rows):
            f.write(
                json.dumps({"id": f"{base}-{i}", **kind.normalise(dict(row))}, ensure_ascii=False)
                + "\n"
            )
    return out
