"""evaluate.mode=generate: the model writes, the letter of an option or a worked answer whose
number counts. The choices' log-likelihoods are taken, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from paw.data.example import Example
from paw.data.kinds import kind_named
from paw.data.tokenise import encode_prompts
from paw.errors import DataError
from paw.evaluation import answers, plan
from paw.evaluation.engine import Job
from paw.evaluation.model import Model
from paw.evaluation.modes import Asking, likelihood
from paw.evaluation.records import Record
from paw.evaluation.result import EvaluateResult


def form(kind: str) -> str:
    return "likelihood" if kind_named(kind).written else "letter"


def answer(asking: Asking) -> list[Record]:
    """
    Raises:
        DataError: for a gold answer that a written one cannot be compared with.
    """
    c, dataset, model = asking.config.evaluate, asking.config.dataset, asking.model
    lettered = form(dataset.kind) == "letter"
    questions, rows = likelihood.encoded(asking, c.max_new_tokens)
    if not lettered:
        _refuse_unjudgeable(questions, asking.inputs["data"].path)
    records = likelihood.scored(asking, questions, rows)
    prompts = encode_prompts(model.tokenizer, [q.contexts[q.gold] for q in questions], dataset.chat)
    texts = dict(
        continued(
            model,
            model.job(rows),
            prompts,
            tokens=8 * (c.batch_tokens or plan.TOKENS[model.device]),
            limit=c.max_new_tokens,
            stop=dataset.stop,
        )
    )
    read = read_letter if lettered else read_number
    return [
        r | read(q, texts[i].text) for i, (q, r) in enumerate(zip(questions, records, strict=True))
    ]


@dataclass(frozen=True)
class Written:
    text: str
    ended: bool  # by itself, or at a stop
    tokens: int


def continued(
    model: Model,
    job: Job,
    prompts: Sequence[tuple[int, ...]],
    *,
    tokens: int,
    limit: int,
    stop: Sequence[str],
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
) -> Iterator[tuple[int, Written]]:
    """Prompts continued, the longest first: number and text of each, as it is done.

    Args:
        tokens: of a batch.
        limit: tokens that are written at most.
        stop: texts that end an answer; they are cut off.
        temperature, seeds: 0 writes greedily; else what is drawn for each prompt has its seed.
    """
    planned = plan.plan_writing(prompts, len(job.prefix), tokens, limit, stop, temperature, seeds)
    for i, ids in model.run(job, *planned):
        whole = model.tokenizer.decode(ids, skip_special_tokens=True)
        ended = len(ids) < limit or any(s in whole for s in stop)
        yield i, Written(answers.until(whole, stop), ended, len(ids))


def read_letter(question: Example, text: str) -> Record:
    """What a written answer says, and whether it is right."""
    said = answers.letter(text, ascii_uppercase[: len(question.continuations)])
    return {
        "text": text,
        "prediction": said,
        "correct": said == question.gold,
        "parsed": said is not None,
    }


def read_number(question: Example, text: str) -> Record:
    """What a written answer says after ####, and whether that, or its last number, is right."""
    gold = answers.plain(question.continuations[0].strip())
    found, loose = answers.strict(text), answers.flexible(text)
    return {
        "text": text,
        "prediction": found,
        "correct": found is not None and answers.plain(found) == gold,
        "correct_flexible": loose is not None and answers.plain(loose) == gold,
        "parsed": found is not None,
    }


def _refuse_unjudgeable(questions: Sequence[Example], file: Path) -> None:
    """The gold answer must be a number, or end with one after ####."""
    for question in questions:
        gold = answers.plain(question.continuations[0].strip())
        if len(gold.split()) != 1 or not any(ch.isdigit() for ch in gold):
            raise DataError(
                f"{file}, line {question.line}: the answer is no number and does not end with "
                "'#### NUMBER', so that a written answer cannot be judged by it. Use "
                "evaluate.mode=likelihood."
            )


def metrics(records: Sequence[Record], positive: int | None = None) -> EvaluateResult:
    found = replace(
        likelihood.metrics(records, positive), unparsed=sum(not r["parsed"] for r in records)
    )
    if "correct_flexible" not in records[0]:
        return found
    flexible = float(np.mean([r["correct_flexible"] for r in records]))
    return replace(found, accuracy_flexible=flexible)
