"""What a signal may ask: the source with its adapter, the source base, and the target base."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from paw.data.example import Turns
from paw.data.kinds import kind_named
from paw.data.tokenise import encode, encode_prompts
from paw.data.vocabulary import by_bytes, offsets
from paw.errors import DataError
from paw.evaluation import plan
from paw.evaluation.model import Model
from paw.evaluation.modes.generate import Written, continued
from paw.evaluation.modes.likelihood import choice_sums
from paw.refine.config import TeachStage
from paw.refine.prompts import Prompt

Pair = tuple["str | Turns", str]  # a context and its continuation
# Where in an answer, in bytes, a token begins, and how likely each is there, by its text.
Places = tuple[tuple[int, tuple[tuple[str, float], ...]], ...]


@dataclass(frozen=True)
class Lesson:
    """A prompt with what the source says about it: answers, and how much each counts (1 in all)."""

    id: str
    context: str | Turns
    answers: tuple[str, ...]
    weights: tuple[float, ...]
    contexts: tuple[str, ...] = ()  # of each answer, where they differ
    # Of each answer what might have stood in the place of its tokens; empty where nobody said.
    places: tuple[Places, ...] = ()

    @classmethod
    def offered(cls, prompt: Prompt) -> Lesson:
        """The choices of a prompt, which nobody has weighed yet."""
        answers = prompt.choices
        return cls(prompt.id, prompt.context, answers, (), prompt.contexts)

    @property
    def pairs(self) -> list[Pair]:
        before = self.contexts or (self.context,) * len(self.answers)
        return list(zip(before, self.answers, strict=True))

    @property
    def best(self) -> int:
        """The answer that counts most."""
        return self.weights.index(max(self.weights))


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
        self._scores: dict[tuple[str, ...], dict[Pair, tuple[float, int]]] = {}

    @cached_property
    def closes(self) -> bool:
        """Whether answers of this kind of data end with the model's end token."""
        return kind_named(self.c.dataset.kind).written

    def answers(
        self, prompts: Sequence[Prompt], samples: int, temperature: float
    ) -> list[list[Written]]:
        """What the speaker writes about each prompt.

        Args:
            samples: answers a prompt; one is greedy, several are drawn at the temperature.
        """
        c, model = self.c, self.speaker
        for prompt in prompts:
            if prompt.contexts:
                raise DataError(
                    f"refine.signal: the questions of {c.dataset.name} are told apart by what "
                    "stands before the answer, so that there is none to write. Use "
                    "refine=choices."
                )
        ids = encode_prompts(model.tokenizer, [p.context for p in prompts], c.dataset.chat)
        draws = [(p, k) for p in prompts for k in range(samples)]
        written = continued(
            model,
            model.job(),
            [one for one in ids for _ in range(samples)],
            tokens=8 * plan.TOKENS[model.device],
            limit=c.max_new_tokens,
            # one line, where answers were not taught to end
            stop=[*c.dataset.stop, *([] if self.closes else ["\n"])],
            temperature=0.0 if samples == 1 else temperature,
            seeds=[random.Random(f"{c.seed} {p.id} {k}").getrandbits(48) for p, k in draws],
        )
        found = dict(written)
        self.written += sum(answer.tokens for answer in found.values())
        flat = [found[i] for i in range(len(draws))]
        return [flat[i * samples : (i + 1) * samples] for i in range(len(prompts))]

    def lessons(self, prompts: Sequence[Prompt], samples: int, temperature: float) -> list[Lesson]:
        """The same as lessons, each answer as often as it came; prompts without are left out."""
        out = []
        written = self.answers(prompts, samples, temperature)
        for prompt, answers in zip(prompts, written, strict=True):
            # an answer that was taught to end and does not has gone astray
            texts = [a.text.strip() for a in answers if a.ended or not self.closes]
            kept = Counter(f" {text}" for text in texts if text)
            if kept:
                weights = tuple(n / kept.total() for n in kept.values())
                one = Lesson(
                    id=prompt.id, context=prompt.context, answers=tuple(kept), weights=weights
                )
                out.append(one)
        return out

    def likeliest(self, pairs: Sequence[Pair]) -> list[Places]:
        """What the speaker finds likely at each token of continuations: texts of tokens, with
        probabilities that add up to less than 1. Nothing for a continuation whose bytes are not
        those of its tokens, as where a token reaches into the context."""
        model = self.speaker
        texts = {token: text for text, token in by_bytes(model.tokenizer).items()}
        rows = encode(model.tokenizer, pairs, self.c.dataset.chat)
        reads = plan.LOGITS[model.device] // len(model.tokenizer)
        batches = plan.plan_likeliest(rows, plan.TOKENS[model.device], reads, self.c.top)
        found = dict(model.run(model.job(), *batches))
        out = list[Places]()
        for i, (row, (_, answer)) in enumerate(zip(rows, pairs, strict=True)):
            starts = offsets(row, answer, texts)
            out.append(
                tuple(
                    (at, tuple((text, p) for token, p in shares if (text := _text(texts, token))))
                    for at, shares in zip(starts, found[i], strict=bool(starts))
                )
            )
        return out

    def scores(self, model: Model, pairs: Sequence[Pair]) -> list[tuple[float, int]]:
        """Log-likelihood in nats of each continuation, and its tokens."""
        key = (model.base.fingerprint, model.adapter.fingerprint if model.adapter else "")
        known = self._scores.setdefault(key, {})
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
            for i, sums in choice_sums(model, questions).items():
                for pair, score in zip(each[i], sums, strict=True):
                    known[pair] = (score, len(rows[pair].ids) - rows[pair].start)
        return [known[pair] for pair in pairs]


def _text(texts: Mapping[int, bytes], token: int) -> str:
    """What a token stands for; nothing for a piece of a character."""
    try:
        return texts.get(token, b"").decode()
    except UnicodeDecodeError:
        return ""
