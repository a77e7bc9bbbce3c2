"""What a signal may ask: the source with its adapter, the source base, and the target base."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from paw.data.example import Turns
from paw.data.kinds import kind_named
from paw.data.tokenise import encode, encode_prompts
from paw.errors import DataError
from paw.evaluation import plan
from paw.evaluation.answers import until
from paw.evaluation.model import Model
from paw.refine.config import TeachStage
from paw.refine.prompts import Prompt

Pair = tuple["str | Turns", str]  # a context and its continuation


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A prompt with what the source says about it: answers, and how much each counts (1 in all)."""

    id: str
    context: str | Turns
    answers: tuple[str, ...]
    weights: tuple[float, ...]
    contexts: tuple[str, ...] = ()  # of each answer, where they differ

    @property
    def pairs(self) -> list[Pair]:
        before = self.contexts or (self.context,) * len(self.answers)
        return list(zip(before, self.answers, strict=True))

    @property
    def best(self) -> int:
        """The answer that counts most."""
        return self.weights.index(max(self.weights))


@dataclass(frozen=True)
class Answer:
    text: str  # as the prompt is continued, its blank included
    ended: bool  # by itself
    tokens: int


class Teacher:
    """Answers are written, and scored, by the project's own engine.

    Args:
        speaker: the source model, with its adapter; without it for the control that learns from
            the base.
        base: the source model without it.
        target: the target base.
        c: a TeachStage.
    """

    def __init__(self, speaker: Model, base: Model, target: Model | None, c: TeachStage) -> None:
        self.speaker, self.base, self.target, self.c = speaker, base, target, c
        self.written = 0  # tokens
        self._scores: dict[int, dict[Pair, tuple[float, int]]] = {}

    @cached_property
    def closes(self) -> bool:
        """Whether answers of this kind of data end with the model's end token."""
        return kind_named(self.c.dataset.kind).written

    def answers(
        self, prompts: Sequence[Prompt], samples: int, temperature: float
    ) -> list[list[Answer]]:
        """What the speaker writes about each prompt.

        Args:
            samples: answers a prompt; one is greedy, several are drawn at the temperature.
        """
        c, model = self.c, self.speaker
        dataset, limit = c.dataset, c.max_new_tokens
        for prompt in prompts:
            if prompt.contexts:
                raise DataError(
                    f"refine.signal: the questions of {dataset.name} are told apart by what "
                    "stands before the answer, so that there is none to write. Use "
                    "refine=choices."
                )
        # one line, where answers were not taught to end
        stop = [*dataset.stop, *([] if self.closes else ["\n"])]
        ids = encode_prompts(model.tokenizer, [p.context for p in prompts], dataset.chat)
        greedy = samples == 1
        each = [one for one in ids for _ in range(samples)]
        seeds = [
            random.Random(f"{c.seed} {p.id} {k}").getrandbits(48)
            for p in prompts
            for k in range(samples)
        ]
        planned = plan.plan_writing(
            each,
            0,
            8 * plan.TOKENS[model.device],
            limit,
            stop,
            0.0 if greedy else temperature,
            seeds,
        )
        found: list[Answer | None] = [None] * len(each)
        for i, tokens in model.run(model.job(), *planned):
            self.written += len(tokens)
            whole = model.tokenizer.decode(tokens, skip_special_tokens=True)
            text = until(whole, stop).strip()
            ended = len(tokens) < limit or any(s in whole for s in stop)
            found[i] = Answer(f" {text}" if text else "", ended, len(tokens))
        flat = iter(found)
        return [[a for _ in range(samples) if (a := next(flat))] for _ in prompts]

    def scores(self, model: Model, pairs: Sequence[Pair]) -> list[tuple[float, int]]:
        """Log-likelihood in nats of each continuation, and its tokens."""
        known = self._scores.setdefault(id(model), {})
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        if new:
            dataset = self.c.dataset
            rows = dict(zip(new, encode(model.tokenizer, new, dataset.chat), strict=True))
            # answers to one prompt share its computation
            asked: dict[str | Turns, list[Pair]] = {}
            for pair in new:
                asked.setdefault(pair[0], []).append(pair)
            each = list(asked.values())
            questions = [[rows[pair] for pair in mine] for mine in each]
            job = model.job(questions)
            reads = plan.LOGITS[model.device] // len(model.tokenizer)
            budget = plan.TOKENS[model.device]
            batches = plan.plan_scoring(questions, len(job.prefix), budget, reads)
            for i, sums in model.run(job, *batches):
                for pair, score in zip(each[i], sums, strict=True):
                    known[pair] = (score, len(rows[pair].ids) - rows[pair].start)
        return [known[pair] for pair in pairs]
