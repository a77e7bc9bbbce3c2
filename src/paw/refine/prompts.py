"""Stage `prompts`: what the source model is asked, without any answer: a split's questions, a
user's file, or questions that a base writes after a few examples."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from paw.config.checks import transient
from paw.data.config import DatasetConfig
from paw.data.example import Turns, context_of
from paw.data.fields import names
from paw.data.kinds import kind_named
from paw.data.load import listed, unlabelled
from paw.errors import DataError
from paw.evaluation import plan
from paw.evaluation.devices import Engines
from paw.evaluation.model import Model
from paw.evaluation.modes.generate import continued
from paw.evaluation.predict import Asked, prompt_of, read_file
from paw.models.load import Runtime
from paw.store import Context, Input, Stage, write_text

FILE = "prompts.jsonl"
SHOWN = 5  # examples before a question that is written
LONGEST = 128  # tokens of one


@dataclass(kw_only=True)
class PromptsStage:
    dataset: DatasetConfig
    split: str | None = None  # whose questions they are; None for a file
    count: int
    seed: int
    raw: bool = False
    temperature: float = 1.0  # of what is written
    runtime: Runtime
    trust_remote_code: bool = transient(False)


@dataclass(frozen=True, kw_only=True)
class PromptsResult:
    prompts: int
    of: int  # that there were, or that were written
    written: bool = False
    left_out: dict[str, int] = field(default_factory=dict)  # of those written, by the reason

    def __str__(self) -> str:
        if not self.written:
            return f"{self.prompts} of {self.of} prompts"
        why = f"; left out {listed(Counter(self.left_out))}" if self.left_out else ""
        return f"{self.prompts} prompts of {self.of} that were written{why}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    id: str
    context: str | Turns
    choices: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()  # of each choice, where they differ
    origin: str = "given"  # or written, or seed: an example that others were written after


STAGE = Stage(
    "prompts",
    "2",
    "paw.refine.prompts:prompts",
    config=PromptsStage,
    result=PromptsResult,
    keeps=True,
    devices="one",
)


def prompts(
    config: PromptsStage, inputs: Mapping[str, Input], out: Path, context: Context
) -> PromptsResult:
    """Writes the prompts as `read_prompts` reads them. No answer is in them.

    Args:
        inputs: `data`, a split; or `file`, a user's; or `seeds`, a user's, with the `model` that
            writes.

    Raises:
        DataError: for a file without texts, or fewer than two examples to write after; where
            nothing of use was written.
    """
    if "seeds" in inputs:
        found, result = _written(config, inputs, context)
    else:
        there = _asked(config, inputs)
        count = min(config.count, len(there))
        chosen = sorted(random.Random(config.seed).sample(range(len(there)), count))
        found = [there[i] for i in chosen]
        result = PromptsResult(prompts=len(found), of=len(there))
    write_text(out / FILE, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in found))
    return result


def read_prompts(folder: Path) -> list[Prompt]:
    rows = [json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
    return [
        Prompt(
            id=row["id"],
            context=context_of(row["context"]),
            choices=tuple(row["choices"]),
            contexts=tuple(row["contexts"]),
            origin=row["origin"],
        )
        for row in rows
    ]


def _asked(config: PromptsStage, inputs: Mapping[str, Input]) -> list[Prompt]:
    if "file" in inputs:
        asked = read_file(str(inputs["file"].path))
        return [_of_file(a, config) for a in asked]
    assert config.split is not None
    found = unlabelled(inputs["data"].path, config.dataset, config.split)
    several = not kind_named(config.dataset.kind).written
    return [
        Prompt(
            id=e.id,
            context=e.contexts[0],
            choices=e.continuations if several else (),
            contexts=tuple(map(str, e.contexts)) if len(set(e.contexts)) > 1 else (),
        )
        for e in found
    ]


def _of_file(asked: Asked, config: PromptsStage, origin: str = "given") -> Prompt:
    context = prompt_of(asked, config.dataset, config.raw, "refine.raw")
    offered = asked.row.get("choices")
    choices = tuple(f" {choice}" for choice in offered) if isinstance(offered, list) else ()
    return Prompt(id=asked.id, context=context, choices=choices, origin=origin)


# ---- prompts that a base writes -------------------------------------------------------------


def _written(
    config: PromptsStage, inputs: Mapping[str, Input], context: Context
) -> tuple[list[Prompt], PromptsResult]:
    """New questions after the examples of a file, each once."""
    path = inputs["seeds"].path
    seeds = read_file(str(path))
    if len(seeds) < 2:
        raise DataError(
            f"refine.seeds: {path} has one example only, which shows no pattern. Give about five."
        )
    texts = [_line(a) for a in seeds]
    model = Model(
        base=inputs["model"],
        adapter=None,
        runtime=config.runtime,
        trust_remote_code=config.trust_remote_code,
        engines=context.kept.get(Engines),
        watch=context,
    )
    left_out, found = Counter[str](), dict[str, str]()
    known = {_plain(text) for text in texts}
    for text, ended in _continued(model, *_shown(texts, config), config):
        plain = _plain(text)
        if not plain:
            left_out["no text"] += 1
        elif not ended:
            left_out[f"no end within {LONGEST} tokens"] += 1
        elif plain in known or plain in found:
            left_out["a text that is there already"] += 1
        else:
            found[plain] = text
    if len(found) < 4:
        raise DataError(
            f"refine.seeds: of {config.count} prompts that the model wrote, {len(found)} are of "
            f"use ({listed(left_out)}). Let another write (refine.writer=source), or give prompts "
            "(refine.prompts=FILE)."
        )
    offered = _offered_by_all(seeds)
    new = [
        Asked(
            f"written {i}",
            {"question": text, "text": text, **offered},
            f"prompt {i} that was written",
        )
        for i, text in enumerate(found.values(), 1)
    ]
    result = PromptsResult(prompts=len(new), of=config.count, written=True, left_out=dict(left_out))
    return [
        *(_of_file(a, config, "seed") for a in seeds),
        *(_of_file(a, config, "written") for a in new),
    ], result


def _offered_by_all(seeds: Sequence[Asked]) -> dict[str, object]:
    """The choices that all examples share, if they do: they are the classes of a task, and what is
    written after them has them, too."""
    first, *others = (asked.row.get("choices") for asked in seeds)
    return {"choices": first} if first and all(each == first for each in others) else {}


def _line(asked: Asked) -> str:
    """An example in one line: a blank line ends one in the list that is shown."""
    return " ".join(asked.shown.split())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .?!")


def _shown(texts: Sequence[str], config: PromptsStage) -> tuple[list[str], str]:
    """What is continued, a few of the examples in an order of its own each time; and the text that
    ends a question: what the data set's prompt has behind it. Texts that are whole prompts stand in
    a list, and end with their line."""
    before, _, after = config.dataset.prompt.partition("{question}")
    asks = bool(after.strip()) and not config.raw and names("dataset.prompt", before + after) == []
    out = []
    for i in range(config.count):
        draw = random.Random(f"{config.seed} {i}")
        some = draw.sample(texts, min(SHOWN, len(texts)))
        if asks:
            shown = "".join(f"{before}{text}{after}\n\n" for text in some)
            out.append(shown + before.rstrip())
        else:
            shown = "".join(f"{k}. {text}\n\n" for k, text in enumerate(some, 1))
            out.append(f"{shown}{len(some) + 1}.")
    return out, after.strip() if asks else "\n"


def _continued(
    model: Model, shown: Sequence[str], end: str, config: PromptsStage
) -> list[tuple[str, bool]]:
    """Text of each, and whether it came to an end."""
    ids = [tuple(x) for x in model.tokenizer(list(shown)).input_ids]
    seeds = [random.Random(f"{config.seed} {i}").getrandbits(48) for i in range(len(ids))]
    written = continued(
        model,
        model.job(),
        ids,
        tokens=8 * plan.TOKENS[model.device],
        limit=LONGEST,
        stop=[end, "\n\n"],
        temperature=config.temperature,
        seeds=seeds,
    )
    found = dict(written)
    return [(" ".join(found[i].text.split()), found[i].ended) for i in range(len(ids))]
