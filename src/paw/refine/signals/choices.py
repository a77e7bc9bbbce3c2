"""How likely the source model finds each of the choices that a prompt offers: all are learnt, each
as much as its probability among them. The cross-entropy to the source's distribution over whole
sequences, cut to those that are offered (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paw.refine.config import TeachStage
from paw.refine.signals import Lesson, Prompt, Signal, Teacher, shares


def teach(teacher: Teacher, prompts: Sequence[Prompt], c: TeachStage) -> list[Lesson]:
    blank = [Lesson.offered(prompt) for prompt in prompts]
    scores = iter(teacher.scores(teacher.speaker, [pair for one in blank for pair in one.pairs]))
    return [replace(one, weights=shares([next(scores)[0] for _ in one.answers])) for one in blank]


SIGNAL = Signal(teach=teach, compares=True)
