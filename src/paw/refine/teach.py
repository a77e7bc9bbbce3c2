"""Stage `teach`: what the source model with its adapter says about prompts, as lessons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from paw.data.example import context_of
from paw.data.load import listed
from paw.data.tokenise import encode_prompts
from paw.errors import ConfigError, DataError, TransferError
from paw.evaluation.devices import Engines
from paw.evaluation.model import Model
from paw.refine.config import TeachStage
from paw.refine.prompts import Prompt, read_prompts
from paw.refine.signals import Lesson, Teacher, signal_named
from paw.store import Context, Input, Stage, write_text

LESSONS, ABOUT = "lessons.jsonl", "about.json"
NOTHING = 1e-3  # nats an answer's token: what an adapter changes at least


@dataclass(frozen=True, kw_only=True)
class TeachResult:
    lessons: int
    answers: int
    written: int  # tokens
    # log-likelihood ratio of adapter to base, nats per token of the answers; None for a base
    changed: float | None = None
    # of prompts that were written, those whose ratio is at least that of some example
    accepted: float | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        said = f"{self.lessons} lessons of {self.answers} answers, {self.written} tokens written"
        if self.changed is not None:
            said += f"; the adapter changed {self.changed:+.2f} nats a token"
        if self.accepted is not None:
            said += f"; {self.accepted:.0%} of the written prompts accepted"
        return said


STAGE = Stage(
    "teach",
    "2",
    "paw.refine.teach:teach",
    config=TeachStage,
    result=TeachResult,
    keeps=True,
    devices="one",
)


def teach(
    config: TeachStage, inputs: Mapping[str, Input], out: Path, context: Context
) -> TeachResult:
    """Writes lessons as `read_lessons` reads them.

    Args:
        inputs: `prompts`; `model`, the source; its `adapter`, but for the control that learns from
            the base; `target` for a signal that asks it.

    Raises:
        ConfigError: for a signal that compares choices, on prompts without.
        DataError: where nothing is left to learn.
        TransferError: for an adapter that changes nothing.
    """
    signal, left_out = signal_named(config.signal), Counter[str]()
    teacher = _teacher(config, inputs, context)
    asked = _fitting(read_prompts(inputs["prompts"].path), teacher, config, left_out)
    if signal.compares and not all(p.choices for p in asked):
        raise ConfigError(
            f"refine.signal={config.signal}: weighs the choices of a question, and not all of "
            "these prompts have any (those that are written have what all examples share). Use "
            "refine=sequences."
        )
    lessons = signal.teach(teacher, asked, config)
    if empty := len(asked) - len(lessons):
        left_out["an answer that is empty or does not end"] = empty
    changed = accepted = None
    if lessons and "adapter" in inputs:
        ratios = _changed(teacher, lessons)
        if max(map(abs, ratios)) < NOTHING:
            raise TransferError(
                "refine: nothing to transfer: the source adapter gives all "
                f"{len(lessons)} answers the likelihood that its base gives them."
            )
        lessons, ratios, accepted = _accepted(asked, lessons, ratios, left_out)
        changed = sum(ratios) / max(1, len(ratios))
    if len(lessons) < 4:
        why = f" ({listed(left_out)})" if left_out else ""
        raise DataError(
            f"refine: of {len(asked)} prompts, {len(lessons)} are left with an answer{why}. Give "
            "more prompts, or raise refine.max_new_tokens."
        )
    if left_out:
        context.say(f"left out: {listed(left_out)}")
    text = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in lessons)
    write_text(out / LESSONS, text)
    result = TeachResult(
        lessons=len(lessons),
        answers=sum(len(one.answers) for one in lessons),
        written=teacher.written,
        changed=changed,
        accepted=accepted,
        left_out=dict(left_out),
    )
    write_text(out / ABOUT, json.dumps(asdict(result)))
    return result


def read_lessons(folder: Path) -> list[Lesson]:
    text = (folder / LESSONS).read_text(encoding="utf-8")
    out = []
    for row in map(json.loads, text.splitlines()):
        found = {key: tuple(row[key]) for key in ("answers", "weights", "contexts")}
        places = tuple(
            tuple((at, tuple((text, p) for text, p in said)) for at, said in each)
            for each in row["places"]
        )
        context = context_of(row["context"])
        out.append(Lesson(id=row["id"], context=context, places=places, **found))
    return out


def about(folder: Path) -> TeachResult:
    return STAGE.restored(json.loads((folder / ABOUT).read_text()))


def _teacher(config: TeachStage, inputs: Mapping[str, Input], context: Context) -> Teacher:
    def model(side: str, adapter: str | None, trust: bool) -> Model:
        return Model(
            base=inputs[side],
            adapter=inputs.get(adapter) if adapter else None,
            runtime=config.runtime,
            trust_remote_code=trust,
            engines=context.kept.get(Engines),
            watch=context,
        )

    source, target = config.trust_remote_code
    return Teacher(
        model("model", "adapter", source),
        model("model", None, source),
        model("target", None, target) if "target" in inputs else None,
        config,
    )


def _fitting(
    prompts: Sequence[Prompt], teacher: Teacher, config: TeachStage, left_out: Counter[str]
) -> list[Prompt]:
    """The prompts that the source has room for, with an answer."""
    most = teacher.speaker.limits.positions
    ids = encode_prompts(
        teacher.speaker.tokenizer, [p.context for p in prompts], config.dataset.chat
    )
    room = (most or 10**9) - config.max_new_tokens
    kept = [p for p, tokens in zip(prompts, ids, strict=True) if len(tokens) <= room]
    if len(kept) < len(prompts):
        left_out["more tokens than the source has room for"] = len(prompts) - len(kept)
    return kept


def _changed(teacher: Teacher, lessons: Sequence[Lesson]) -> list[float]:
    """Of each lesson's first answer the log-likelihood ratio of adapter to base, nats a token."""
    pairs = [lesson.pairs[lesson.best] for lesson in lessons]
    adapted, base = teacher.scores(teacher.speaker, pairs), teacher.scores(teacher.base, pairs)
    return [(a - b) / n for (a, n), (b, _) in zip(adapted, base, strict=True)]


def _accepted(
    asked: Sequence[Prompt],
    lessons: Sequence[Lesson],
    ratios: Sequence[float],
    left_out: Counter[str],
) -> tuple[list[Lesson], list[float], float | None]:
    """Of prompts that were written, those to which the adapter says something of its own: as much
    as to the examples that they were written after. Trans-LoRA trains a discriminator for that
    (arXiv 2405.17258); here the adapter itself is asked."""
    origin = {p.id: p.origin for p in asked}
    examples = [r for one, r in zip(lessons, ratios, strict=True) if origin[one.id] == "seed"]
    if not examples:
        return list(lessons), list(ratios), None
    least = min(examples)
    both = [(one, r) for one, r in zip(lessons, ratios, strict=True) if origin[one.id] != "seed"]
    kept = [(one, r) for one, r in both if r >= least]
    if len(kept) < len(both):
        left_out["less that the adapter changes than in any example"] = len(both) - len(kept)
    share = len(kept) / max(1, len(both))
    return [one for one, _ in kept], [r for _, r in kept], share
