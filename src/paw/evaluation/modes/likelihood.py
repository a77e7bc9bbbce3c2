"""evaluate.mode=likelihood: the choice of the highest log-likelihood is the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from paw.data.example import Example
from paw.data.tokenise import Encoded, encode
from paw.evaluation import plan
from paw.evaluation.model import Model
from paw.evaluation.modes import Asking
from paw.evaluation.records import Record, require_finite
from paw.evaluation.result import EvaluateResult
from paw.evaluation.statistics import accuracy, f1

ROUNDS = 100  # through the choices, until each is given as often as it is right


def form(kind: str) -> str:
    return "likelihood"


def answer(asking: Asking) -> list[Record]:
    questions, rows = encoded(asking)
    records = scored(asking, questions, rows)
    several = len(questions) > 1 and len(questions[0].continuations) > 1
    if several and len({q.continuations for q in questions}) == 1:
        sums = [r["loglikelihoods"] for r in records]
        told = calibrated(sums, [r["gold"] for r in records])
        for found, choice in zip(records, told, strict=True):
            found["prediction_calibrated"] = choice
    return records


def encoded(asking: Asking, writes: int = 0) -> tuple[list[Example], list[list[Encoded]]]:
    """Questions that fit, each with a row of tokens for every choice.

    Args:
        writes: tokens that will be written, too.
    """
    questions = asking.questions
    pairs = [p for q in questions for p in zip(q.contexts, q.continuations, strict=True)]
    flat = iter(encode(asking.model.tokenizer, pairs, asking.config.dataset.chat))
    return asking.fitting([[next(flat) for _ in q.continuations] for q in questions], writes)


def scored(
    asking: Asking, questions: Sequence[Example], rows: Sequence[list[Encoded]]
) -> list[Record]:
    """
    Raises:
        StageError: for scores that are not finite.
    """
    sums = choice_sums(asking.model, rows, asking.config.evaluate.batch_tokens)
    records = [
        record(q, sums[i], [len(r.ids) - r.start for r in rows[i]]) for i, q in enumerate(questions)
    ]
    require_finite(records)
    return records


def calibrated(sums: Sequence[Sequence[float]], gold: Sequence[int]) -> list[int]:
    """The answers of questions that all have the same choices, each given as often as it is right:
    to the log-likelihoods of every choice a constant is added that makes it so. An adapter that
    only makes one answer likelier everywhere changes none of them. For two choices it is the
    break-even point of precision and recall.

    The constants are the dual prices of an assignment of the questions to the choices with these
    counts, found choice after choice as by an auction.

    Args:
        sums: log-likelihoods in nats, questions × choices.
        gold: the right choice of each.
    """
    found = np.array(sums, dtype=np.float64)
    found -= found.mean(0)  # where the rounds begin depends on no constant either
    wanted = np.bincount(gold, minlength=found.shape[1])
    for _ in range(ROUNDS):
        best = found.argmax(1)
        if (np.bincount(best, minlength=len(wanted)) == wanted).all():
            break
        for choice, count in enumerate(wanted):
            own = found[:, choice].copy()
            found[:, choice] = -np.inf
            lead = -np.sort(found.max(1) - own)  # over the best of the others, the largest first
            ends = np.concatenate([[lead[0] + 1], lead, [lead[-1] - 1]])
            found[:, choice] = own - (ends[count] + ends[count + 1]) / 2
    answers: list[int] = found.argmax(1).tolist()
    return answers


def choice_sums(
    model: Model, rows: Sequence[Sequence[Encoded]], tokens: int | None = None
) -> dict[int, list[float]]:
    """The log-likelihoods in nats of each question's choices, by its number.

    Args:
        rows: of each question.
        tokens: of a batch; else by device.
    """
    job, tokens = model.job(rows), tokens or plan.TOKENS[model.device]
    reads = plan.LOGITS[model.device] // len(model.tokenizer)
    return dict(model.run(job, *plan.plan_scoring(rows, len(job.prefix), tokens, reads)))


def record(question: Example, sums: list[float], tokens: list[int]) -> Record:
    """
    Args:
        sums, tokens: every choice's log-likelihood in nats, and its number of tokens.
    """
    # characters without the leading blank
    lengths = [max(len(c) - 1, 1) for c in question.continuations]
    best = int(np.argmax(sums))  # ties go to the lowest index
    by_character = [s / n for s, n in zip(sums, lengths, strict=True)]
    return {
        "id": question.id,
        "gold": question.gold,
        "prediction": best,
        "prediction_norm": int(np.argmax(by_character)),
        "correct": best == question.gold if len(sums) > 1 else None,
        "loglikelihoods": sums,
        "tokens": tokens,
    }


def metrics(records: Sequence[Record], positive: int | None = None) -> EvaluateResult:
    """Accuracy is None where questions have one choice only and nothing was written."""
    gold = [(r["loglikelihoods"][r["gold"]], r["tokens"][r["gold"]]) for r in records]
    loss = -sum(s for s, _ in gold) / sum(n for _, n in gold)
    found: dict[str, Any] = {}
    if any(len(r["loglikelihoods"]) > 1 for r in records):
        found["acc_norm"] = _share_right(records, "prediction_norm")
    if all("prediction_calibrated" in r for r in records):
        found["acc_calibrated"] = _share_right(records, "prediction_calibrated")
    if positive is not None:
        found["f1"] = f1(
            [r["gold"] == positive for r in records], [r["prediction"] == positive for r in records]
        )
    return EvaluateResult(
        n=len(records),
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        **accuracy([r["correct"] for r in records if r["correct"] is not None]),
        **found,
    )


def _share_right(records: Sequence[Record], prediction: str) -> float:
    return float(np.mean([r[prediction] == r["gold"] for r in records]))
