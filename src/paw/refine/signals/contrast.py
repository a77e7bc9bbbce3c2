"""What the adapter changed, and not what its base knew: p ∝ p_target · (p_adapter / p_base)^β over
the choices that a prompt offers, or over answers that the source draws. Log-likelihoods of whole
answers, so that tokenizers need not agree; on tokens it is proxy tuning (arXiv 2401.08565)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from paw.refine.config import TeachStage
from paw.refine.signals import Lesson, Prompt, Signal, Teacher, shares


def teach(teacher: Teacher, prompts: Sequence[Prompt], c: TeachStage) -> list[Lesson]:
    assert teacher.target is not None
    lessons = _candidates(teacher, prompts, c)
    pairs = [pair for lesson in lessons for pair in lesson.pairs]
    models = (teacher.target, teacher.speaker, teacher.base)
    target, adapted, base = (iter(teacher.scores(model, pairs)) for model in models)
    out = []
    for lesson in lessons:
        found = []
        for drawn in lesson.weights:  # how often it was drawn; 0 for choices
            of_target, of_adapted, of_base = next(target)[0], next(adapted)[0], next(base)[0]
            score = of_target + c.beta * (of_adapted - of_base)
            # what is drawn comes as often as the source finds it likely: that is taken off
            found.append(score - of_adapted if drawn else score)
        weights = shares(found)
        if any(lesson.weights):
            both = [w * n for w, n in zip(weights, lesson.weights, strict=True)]
            weights = tuple(w / sum(both) for w in both)
        out.append(replace(lesson, weights=weights))
    return out


def _candidates(teacher: Teacher, prompts: Sequence[Prompt], c: TeachStage) -> list[Lesson]:
    """Answers that are weighed: the choices, or what is drawn."""
    offered = [p for p in prompts if p.choices]
    lessons = [
        Lesson(
            id=p.id,
            context=p.context,
            answers=p.choices,
            contexts=p.contexts,
            weights=(0.0,) * len(p.choices),
        )
        for p in offered
    ]
    rest = [p for p in prompts if not p.choices]
    drawn = teacher.answers(rest, max(c.samples, 2), c.temperature) if rest else []
    for prompt, answers in zip(rest, drawn, strict=True):
        kept = Counter(a.text for a in answers if a.text and (a.ended or not teacher.closes))
        if kept:
            lessons.append(
                Lesson(
                    id=prompt.id,
                    context=prompt.context,
                    answers=tuple(kept),
                    weights=tuple(map(float, kept.values())),
                )
            )
    return lessons


SIGNAL = Signal(teach=teach, reads_target=True)
