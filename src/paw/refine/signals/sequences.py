"""What the source model writes: its greedy answer, or several that it draws, each as often as it
is drawn. Sequence-level distillation (arXiv 1606.07947)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from paw.refine.config import TeachStage
from paw.refine.signals import Lesson, Prompt, Signal, Teacher


def teach(teacher: Teacher, prompts: Sequence[Prompt], c: TeachStage) -> list[Lesson]:
    lessons = []
    written = teacher.answers(prompts, c.samples, c.temperature)
    for prompt, answers in zip(prompts, written, strict=True):
        # an answer that was taught to end and does not has gone astray
        kept = Counter(a.text for a in answers if a.text and (a.ended or not teacher.closes))
        if kept:
            weights = tuple(n / kept.total() for n in kept.values())
            lessons.append(
                Lesson(id=prompt.id, context=prompt.context, answers=tuple(kept), weights=weights)
            )
    return lessons


SIGNAL = Signal(teach=teach)
