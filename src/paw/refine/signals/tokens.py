"""What the source model might have written at each place of what it writes: its likeliest tokens
with their probabilities, not the one token alone. Token-level distillation (arXiv 1503.02531) on
the source's own text (arXiv 2306.13649); across tokenizers by the text of tokens, where both begin
one (as FuseLLM's exact match, arXiv 2401.10491)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paw.refine.config import TeachStage
from paw.refine.signals import Lesson, Prompt, Signal, Teacher


def teach(teacher: Teacher, prompts: Sequence[Prompt], c: TeachStage) -> list[Lesson]:
    lessons = teacher.lessons(prompts, c.samples, c.temperature)
    places = iter(teacher.likeliest([pair for one in lessons for pair in one.pairs]))
    return [replace(one, places=tuple(next(places) for _ in one.answers)) for one in lessons]


SIGNAL = Signal(teach=teach)
