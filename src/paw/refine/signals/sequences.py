"""What the source model writes: its greedy answer, or several that it draws, each as often as it
is drawn. Sequence-level distillation (arXiv 1606.07947)."""

from __future__ import annotations

from collections.abc import Sequence

from paw.refine.config import TeachStage
from paw.refine.signals import Lesson, Prompt, Signal, Teacher


def teach(teacher: Teacher, prompts: Sequence[Prompt], c: TeachStage) -> list[Lesson]:
    return teacher.lessons(prompts, c.samples, c.temperature)


SIGNAL = Signal(teach=teach)
