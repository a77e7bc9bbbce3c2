"""Answers, or classes, for one text, a file or what comes through a pipe: JSON lines, continued
where they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paw.data.config import DatasetConfig
from paw.data.example import Turns
from paw.data.fields import sentences
from paw.data.tokenise import encode_for_head, encode_prompts
from paw.errors import DataError
from paw.evaluation import classify
from paw.evaluation.config import PredictConfig
from paw.evaluation.model import Model
from paw.evaluation.modes.generate import continued
from paw.models.adapters import classes_of
from paw.models.load import is_encoder
from paw.store import write_text


@dataclass(frozen=True)
class Asked:
    """One text: its id in the output, its fields, and where it stands for messages."""

    id: str
    row: dict[str, Any]
    place: str

    @property
    def shown(self) -> str:
        """What is repeated in the output, so that a continued file is known to belong to its
        input."""
        said = self.row.get("question") or self.row.get("text")
        return str(said) if said is not None else json.dumps(self.row, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is asked of a model, and how."""

    model: Model
    mode: str  # evaluate.mode: classify has a head answer, any other has the model write
    dataset: DatasetConfig
    config: PredictConfig

    def run(self, asked: Sequence[Asked]) -> list[str]:
        """Answers what predict.output does not hold yet, and writes it there.

        Returns:
            What was answered now, as lines of JSON, in the order of what was asked.

        Raises:
            DataError: for an output that holds other answers; for a text that lacks a field or is
                too long.
            AdapterError: for an adapter that does not fit.
            StageError: where memory does not suffice.
        """
        output = Path(self.config.output).expanduser() if self.config.output else None
        done = answered(output, asked) if output else set()
        left = [a for a in asked if a.id not in done]
        if done:
            self.model.watch.say(f"{output}: goes on after {len(done)} of {len(asked)} texts")
        lines = {}
        with open(output, "a", encoding="utf-8") if output else nullcontext() as file:
            for question, answer in self.answers(left):  # the longest first
                row = {"id": question.id, "input": question.shown, **answer}
                lines[question.id] = json.dumps(row, ensure_ascii=False) + "\n"
                if file is not None:
                    file.write(lines[question.id])
                    file.flush()
        if output is not None:
            _sort(output, asked)
        return [lines[a.id] for a in left]

    def answers(self, asked: Sequence[Asked]) -> Iterator[tuple[Asked, dict[str, Any]]]:
        """Every text with its answer, as it is done."""
        if not asked:
            return
        answers = self._classes(asked) if self.mode == "classify" else self._texts(asked)
        for place, answer in answers:
            yield asked[place], answer

    def _texts(self, asked: Sequence[Asked]) -> Iterator[tuple[int, dict[str, Any]]]:
        c, dataset, model = self.config, self.dataset, self.model
        prompts = [self._prompt(a) for a in asked]
        ids = encode_prompts(model.tokenizer, prompts, dataset.chat)
        self._refuse_long(asked, [len(p) + c.max_new_tokens for p in ids], "predict.max_new_tokens")
        longest = max(map(len, ids)) + c.max_new_tokens
        for place, written in continued(
            model,
            model.job(),
            ids,
            tokens=c.batch_size * longest,
            limit=c.max_new_tokens,
            stop=dataset.stop,
        ):
            yield place, {"output": written.text.strip()}

    def _classes(self, asked: Sequence[Asked]) -> Iterator[tuple[int, dict[str, Any]]]:
        model = self.model
        assert model.adapter is not None, "a base has no head"
        classes, encoder = classes_of(model.adapter.path), is_encoder(model.base.path)
        rows = encode_for_head(
            model.tokenizer,
            [self._sentences(a) for a in asked] if encoder else [],
            [] if encoder else [self._prompt(a) for a in asked],
            encoder,
            self.dataset.chat,
        )
        self._refuse_long(asked, [len(r.ids) for r in rows], "the text")
        tokens = classify.TOKENS[model.device]
        for place, output in classify.outputs(model, rows, classes, tokens):
            if classes is None:
                yield place, {"output": float(output[0])}
                continue
            p = np.exp(output.astype(np.float64) - output.max())
            p /= p.sum()
            scores = {k: round(float(x), 6) for k, x in zip(classes, p, strict=True)}
            yield place, {"output": classes[int(p.argmax())], "scores": scores}

    def _prompt(self, question: Asked) -> str | Turns:
        return prompt_of(question, self.dataset, self.config.raw, "predict.raw")

    def _sentences(self, question: Asked) -> tuple[str, ...]:
        """A sentence or a pair, as an encoder was trained on them."""
        if found := sentences(question.row, self.dataset.fields):
            return found
        prompt = self._prompt(question)
        assert isinstance(prompt, str)
        return (prompt,)

    def _refuse_long(self, asked: Sequence[Asked], lengths: Sequence[int], what: str) -> None:
        most = self.model.limits.positions
        for question, length in zip(asked, lengths, strict=True):
            if most is not None and length > most:
                raise DataError(
                    f"{question.place}: needs {length} tokens, the model has room for {most}. "
                    f"Shorten {what}."
                )


def prompt_of(question: Asked, dataset: DatasetConfig, raw: bool, key: str) -> str | Turns:
    """A text as the data set asks it.

    Args:
        raw, key: whether the text is the whole prompt, and what sets it, for the message.

    Raises:
        DataError: for a text that lacks a field.
    """
    if raw:
        return question.shown
    try:
        if "messages" in question.row:
            return tuple((str(m["role"]), str(m["content"])) for m in question.row["messages"])
        if dataset.kind == "chat":
            return (("user", question.shown),)
        return dataset.prompt.format(**question.row)
    except (KeyError, IndexError, TypeError) as e:
        raise DataError(
            f"{question.place}: has no field {e}, which dataset.prompt names. Add it, or set "
            f"{key}=true."
        ) from None


def read(config: PredictConfig) -> list[Asked]:
    """The texts that are asked, as `paw.evaluation.checks.check_asked` lets them pass.

    Raises:
        DataError: for a file that is no text or no JSON, or has an id twice; for one without texts.
    """
    if config.text is not None:
        return [Asked("1", {"question": config.text, "text": config.text}, "predict.text")]
    return read_file(str(config.file))


def read_file(file: str) -> list[Asked]:
    """The texts of a file, a text each line or rows of a .jsonl file; of stdin, where it is `-`.
    Raises as `read`."""
    path = Path(file).expanduser()
    try:
        lines = (sys.stdin.read() if file == "-" else path.read_text(encoding="utf-8")).split("\n")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start}).") from None
    rows = path.suffix == ".jsonl" or (file == "-" and lines[0].lstrip().startswith("{"))
    out: dict[str, Asked] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place, row = f"{file}, line {number}", {"question": line, "text": line}
        if rows:
            row = _row(line, place)
        found = Asked(str(row.get("id", number)), row, place)
        if found.id in out:
            raise DataError(f"{place}: the id {found.id!r} occurs twice. Give every row its own.")
        out[found.id] = found
    if not out:
        raise DataError(f"{file}: holds no text.")
    return list(out.values())


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        raise DataError(f"{place}: is not JSON.") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: is not an object with fields.")
    return row


def answered(output: Path, asked: Sequence[Asked]) -> set[str]:
    """Ids that an earlier run answered; a line that it was killed in is taken away.

    Raises:
        DataError: for a file that holds other answers.
    """
    if not output.is_file():
        output.parent.mkdir(parents=True, exist_ok=True)
        return set()
    text = output.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    inputs, found = {a.id: a.shown for a in asked}, set()
    for number, line in enumerate(whole.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            same = inputs[row["id"]] == row["input"]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise DataError(
                f"predict.output: line {number} of {output} answers none of these texts. Choose "
                "another file, or delete it."
            )
        found.add(row["id"])
    if whole != text:
        with open(output, "r+b") as f:
            f.truncate(len(whole.encode()))
    return found


def _sort(output: Path, asked: Sequence[Asked]) -> None:
    """A finished file in the order of what was asked."""
    lines = output.read_text(encoding="utf-8").split("\n")[:-1]
    by_id = {json.loads(line)["id"]: line for line in lines}
    write_text(output, "".join(by_id[a.id] + "\n" for a in asked))
