"""task=predict: answers, or classes, for one text, a file or what comes through a pipe: JSON lines, continued where they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paw.cli.schema import PawConfig
from paw.console import Console
from paw.data.example import Turns
from paw.data.kinds.glue import sentences
from paw.data.tokenise import encode_for_head, encode_prompts
from paw.errors import AdapterError, ConfigError, DataError
from paw.evaluation import answers, classify, plan
from paw.evaluation.engine import Job
from paw.models.adapters import birth, classes_of
from paw.models.load import is_encoder, limits, load_tokenizer
from paw.store import write_text
from paw.tasks.stages import Adapter, Base, Stages


@dataclass(frozen=True)
class Asked:
    """One text: its id in the output, its fields, and where it stands for messages."""

    id: str
    row: dict[str, Any]
    place: str

    @property
    def shown(self) -> str:
        """What is repeated in the output, so that a continued file is known to belong to its input."""
        said = self.row.get("question") or self.row.get("text")
        return str(said) if said is not None else json.dumps(self.row, ensure_ascii=False)


def run(config: PawConfig, overrides: list[str], run_dir: str | None = None) -> int:
    """Returns how many texts were answered now."""
    c = config.predict
    console = Console(sys.stderr)  # stdout carries answers only
    asked = _asked(c.text, c.file)
    stages = Stages(config, console)
    base = stages.base(config.source)
    stages.check_mode(base)
    adapter = stages.given_adapter(config.adapter.path, base) if config.adapter.path else None
    if config.evaluate.mode == "classify" and adapter is None:
        raise ConfigError(
            "task=predict evaluate.mode=classify: a base has no head. Name an adapter that was trained with one: adapter.path=DIR."
        )
    if (
        adapter is not None
        and config.evaluate.mode != "classify"
        and "classes" in birth(adapter.path)
    ):
        raise ConfigError(
            f"adapter.path: {adapter.path} is a classifier. Set evaluate.mode=classify."
        )
    output = Path(c.output).expanduser() if c.output else None
    done = _done(output, asked) if output else set()
    left = [a for a in asked if a.id not in done]
    if done:
        console.say(f"{output}: goes on after {len(done)} of {len(asked)} texts")
    if config.evaluate.mode == "classify" and adapter is not None:
        answered = _classes(left, base, adapter, stages)
    else:
        answered = _texts(left, base, adapter, stages)
    lines = {}
    with open(output, "a", encoding="utf-8") if output else nullcontext() as file:
        for n, (question, answer) in enumerate(answered, 1):  # the longest first
            lines[question.id] = (
                json.dumps(
                    {"id": question.id, "input": question.shown, **answer}, ensure_ascii=False
                )
                + "\n"
            )
            if file is not None:
                file.write(lines[question.id])
                file.flush()
            console.progress(n, len(left), "texts")
    console.close()
    if output is None:
        sys.stdout.writelines(lines[a.id] for a in asked)
    else:
        _sort(output, asked)
    return len(left)


def _sort(output: Path, asked: Sequence[Asked]) -> None:
    """A finished file in the order of what was asked."""
    lines = {
        json.loads(line)["id"]: line for line in output.read_text(encoding="utf-8").split("\n")[:-1]
    }
    write_text(output, "".join(lines[a.id] + "\n" for a in asked))


# ---- what is asked, and what was answered before ----------------------------------------------------


def _asked(text: str | None, file: str | None) -> list[Asked]:
    if (text is None) == (file is None):
        raise ConfigError(
            "task=predict: say what is asked: predict.text=TEXT, or predict.file=FILE (- is stdin)."
        )
    if text is not None:
        return [Asked("1", {"question": text, "text": text}, "predict.text")]
    assert file is not None
    path = Path(file).expanduser()
    if file != "-" and not path.is_file():
        raise ConfigError(f"predict.file: {path} is no file.")
    try:
        lines = (sys.stdin.read() if file == "-" else path.read_text(encoding="utf-8")).split("\n")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start}).") from None
    rows = path.suffix == ".jsonl" or (
        file == "-" and bool(lines) and lines[0].lstrip().startswith("{")
    )
    out, seen = [], set[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place, row = f"{file}, line {number}", {"question": line, "text": line}
        if rows:
            try:
                row = json.loads(line)
            except ValueError:
                raise DataError(f"{place}: is not JSON.") from None
            if not isinstance(row, dict):
                raise DataError(f"{place}: is not an object with fields.")
        found = Asked(str(row.get("id", number)), row, place)
        if found.id in seen:
            raise DataError(f"{place}: the id {found.id!r} occurs twice. Give every row its own.")
        seen.add(found.id)
        out.append(found)
    if not out:
        raise DataError(f"{file}: holds no text.")
    return out


def _done(output: Path, asked: Sequence[Asked]) -> set[str]:
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
                f"predict.output: line {number} of {output} answers none of these texts. Choose another file, or delete it."
            )
        found.add(row["id"])
    if whole != text:
        with open(output, "r+b") as f:
            f.truncate(len(whole.encode()))
    return found


# ---- answers ----------------------------------------------------------------------------------------


def _prompt(question: Asked, stages: Stages) -> str | Turns:
    c = stages.config
    if c.predict.raw:
        return question.shown
    try:
        if "messages" in question.row:
            return tuple((str(m["role"]), str(m["content"])) for m in question.row["messages"])
        if c.dataset.kind == "chat":
            return (("user", question.shown),)
        return c.dataset.prompt.format(**question.row)
    except (KeyError, IndexError, TypeError) as e:
        raise DataError(
            f"{question.place}: has no field {e}, which dataset.prompt names. Add it, or set predict.raw=true."
        ) from None


def _texts(
    left: Sequence[Asked], base: Base, adapter: Adapter | None, stages: Stages
) -> Iterator[tuple[Asked, dict[str, Any]]]:
    c, dataset, trust = stages.config.predict, stages.config.dataset, base.config.trust_remote_code
    if not left:
        return
    tokenizer = load_tokenizer(base.input.path, trust)
    prompts = encode_prompts(tokenizer, [_prompt(a, stages) for a in left], dataset.chat)
    _refuse_long(left, [len(p) + c.max_new_tokens for p in prompts], base, "predict.max_new_tokens")
    job = Job(
        base.input,
        adapter.input if adapter else None,
        stages.runtime,
        trust,
        tokenizer.pad_token_id,
    )
    longest = max(map(len, prompts)) + c.max_new_tokens
    batches, order = plan.plan_writing(
        prompts, 0, c.batch_size * longest, c.max_new_tokens, dataset.stop
    )
    starts = [sum(map(len, batches[:i])) for i in range(len(batches))]
    for i, results in stages.engines.run(job, batches, stages.console):
        for place, ids in zip(order[starts[i] :], results, strict=False):
            yield (
                left[place],
                {
                    "output": answers.until(
                        tokenizer.decode(ids, skip_special_tokens=True), dataset.stop
                    ).strip()
                },
            )


def _classes(
    left: Sequence[Asked], base: Base, adapter: Adapter, stages: Stages
) -> Iterator[tuple[Asked, dict[str, Any]]]:
    import numpy as np

    if not left:
        return
    trust, device = (
        base.config.trust_remote_code,
        "cuda" if stages.runtime.device == "cuda" else "cpu",
    )
    known = classes_of(adapter.path)
    if "classes" not in birth(adapter.path):
        raise AdapterError(
            f"{adapter.path}: does not say which classes its head knows ({adapter.path}/paw.json). Train it with paw."
        )
    tokenizer = load_tokenizer(base.input.path, trust)
    encoder = is_encoder(base.input.path)
    prompts = [] if encoder else [_prompt(a, stages) for a in left]
    rows = encode_for_head(
        tokenizer,
        [_sentences(a, stages) for a in left] if encoder else [],
        prompts,
        encoder,
        stages.config.dataset.chat,
    )
    _refuse_long(left, [len(r.ids) for r in rows], base, "the text")
    for places, outputs in classify.outputs(
        rows, base.input, adapter.input, known, stages.runtime, trust, classify.TOKENS[device]
    ):
        for place, output in zip(places, outputs, strict=True):
            if known is None:
                yield left[place], {"output": float(output[0])}
                continue
            p = np.exp(output.astype(np.float64) - output.max())
            p /= p.sum()
            yield (
                left[place],
                {
                    "output": known[int(p.argmax())],
                    "scores": {k: round(float(x), 6) for k, x in zip(known, p, strict=True)},
                },
            )


def _sentences(question: Asked, stages: Stages) -> tuple[str, ...]:
    """A sentence or a pair, as an encoder was trained on them."""
    if found := sentences(question.row):
        return found
    prompt = _prompt(question, stages)
    assert isinstance(prompt, str)
    return (prompt,)


def _refuse_long(left: Sequence[Asked], lengths: Sequence[int], base: Base, what: str) -> None:
    most = limits(base.input.path, base.config.trust_remote_code).positions
    for question, length in zip(left, lengths, strict=True):
        if most is not None and length > most:
            raise DataError(
                f"{question.place}: needs {length} tokens, {base.name} has room for {most}. Shorten {what}."
            )
