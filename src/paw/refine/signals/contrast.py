"""What the adapter changed, and not what its base knew: p ∝ p_target · (p_adapter / p_base)^β over
the choices that a prompt offers, or over answers that the source draws. Log-likelihoods of whole
answers, so that tokenizers need not agree; on tokens it is proxy tuning (arXiv 2401.08565)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paw.refine.config import TeachStage
from paw.refine.signals import Lesson, Prompt, Signal, Teacher, shares


def teach(teacher: Teacher, prompts: Sequence[Prompt], c: TeachStage) -> list[Lesson]:
    assert teacher.target is not None
    lessons = [Lesson.offered(p) for p in prompts if p.choices]
    if rest := [p for p in prompts if not p.choices]:
        lessons += teacher.lessons(rest, max(c.samples, 2), c.temperature)
    pairs = [pair for lesson in lessons for pair in lesson.pairs]
    models = (teacher.target, teacher.speaker, teacher.base)
    target, adapted, base = (iter(teacher.scores(model, pairs)) for model in models)
    out = []
    for lesson in lessons:
        found, drawn = [], lesson.weights  # how often each was drawn; of choices nothing is said
        for _ in lesson.answers:
            of_target, of_adapted, of_base = next(target)[0], next(adapted)[0], next(base)[0]
            score = of_target + c.beta * (of_adapted - of_base)
            # what is drawn comes as often as the source finds it likely: that is taken off
            found.append(score - of_adapted if drawn else score)
        weights = shares(found)
        if drawn:
            both = [w * n for w, n in zip(weights, drawn, strict=True)]
            weights = tuple(w / sum(both) for w in both)
        out.append(replace(lesson, weights=weights))
    return out


SIGNAL = Signal(teach=teach, reads_target=True)
