"""evaluate.mode=classify: a trained head names the class, or the value; without an adapter, the
majority-class baseline answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from paw.data.example import Example
from paw.data.load import examples
from paw.data.tokenise import encode_for_head
from paw.evaluation.classify import TOKENS, outputs
from paw.evaluation.modes import Asking
from paw.evaluation.records import Record, require_finite
from paw.evaluation.result import EvaluateResult
from paw.evaluation.statistics import accuracy
from paw.models.load import is_encoder

Array = np.ndarray[Any, Any]


def form(kind: str) -> str:
    return "classify"


def answer(asking: Asking) -> list[Record]:
    """
    Raises:
        AdapterError: where the head knows other classes.
        StageError: for outputs that are not finite.
    """
    questions, model = asking.questions, asking.model
    if model.adapter is None:
        asking.tell()
        guess = majority(_train(asking))
        return [record(q, guess) for q in questions]
    rows = encode_for_head(
        model.tokenizer,
        [q.texts for q in questions],
        [q.contexts[0] for q in questions],
        is_encoder(model.base.path),
        asking.config.dataset.chat,
    )
    questions, fitting = asking.fitting([[r] for r in rows])
    classes = None if questions[0].value is not None else questions[0].continuations
    tokens = asking.config.evaluate.batch_tokens or TOKENS[model.device]
    found = dict(outputs(model, [r for (r,) in fitting], classes, tokens))
    records = [record(q, found[i]) for i, q in enumerate(questions)]
    require_finite(records)
    return records


def _train(asking: Asking) -> list[Example]:
    """What the baseline counts; bad rows of it are left out as of the questions."""
    c = asking.config
    assert c.train_split is not None, "the majority-class baseline needs a training split"
    return examples(asking.inputs["train"].path, c.dataset, c.train_split, "classify")


def majority(train: Sequence[Example]) -> Array:
    """The outputs of the majority-class baseline: the classes' frequencies in the training split as
    log-probabilities, one more of each; or the mean of its values."""
    if train[0].value is not None:
        return np.array([np.mean([e.value for e in train])])
    counts = Counter(e.gold for e in train)
    n = len(train[0].continuations)
    return np.log([(counts[k] + 1) / (len(train) + n) for k in range(n)])


def record(question: Example, output: Array) -> Record:
    """With log-probabilities of the classes; or with a value's negative squared error, so that
    systems are compared by it.

    Args:
        output: of the head, one number a class, or the value.
    """
    output = output.astype(np.float64)
    if question.value is not None:
        found = float(output[0])
        return {
            "id": question.id,
            "gold": 0,
            "value": question.value,
            "prediction": found,
            "prediction_norm": 0,
            "correct": None,
            "loglikelihoods": [-((found - question.value) ** 2)],
            "tokens": [1],
        }
    logs = output - output.max()
    logs = logs - math.log(np.exp(logs).sum())
    best = int(logs.argmax())
    return {
        "id": question.id,
        "gold": question.gold,
        "prediction": best,
        "prediction_norm": best,
        "correct": best == question.gold,
        "loglikelihoods": logs.tolist(),
        "tokens": [1] * len(logs),
    }


def metrics(records: Sequence[Record], positive: int | None = None) -> EvaluateResult:
    """Of values the correlations with the gold ones: 0 where one of the two is constant."""
    loss = -float(np.mean([r["loglikelihoods"][r["gold"]] for r in records]))
    if "value" in records[0]:
        from scipy.stats import pearsonr, spearmanr

        gold, found = ([r[key] for r in records] for key in ("value", "prediction"))
        moves = len(set(found)) > 1 and len(set(gold)) > 1
        return EvaluateResult(
            n=len(records),
            loss=loss,
            pearson=float(pearsonr(gold, found)[0]) if moves else 0.0,
            spearman=float(spearmanr(gold, found)[0]) if moves else 0.0,
        )
    gold, found = ([r[key] for r in records] for key in ("gold", "prediction"))
    return EvaluateResult(
        n=len(records),
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        **accuracy([r["correct"] for r in records]),
        **by_class(gold, found, len(records[0]["loglikelihoods"])),
    )


def by_class(gold: Sequence[int], found: Sequence[int], n: int) -> dict[str, Any]:
    """Means over the classes that occur, and Matthews' correlation, of more than two classes
    Gorodkin's (2004); of two classes also the second's F1, which GLUE reports."""
    table = np.zeros((n, n))
    for g, f in zip(gold, found, strict=True):
        table[g, f] += 1
    true, said, hit = table.sum(1), table.sum(0), table.diagonal()
    precision, recall = hit / np.maximum(said, 1), hit / np.maximum(true, 1)
    f1 = 2 * hit / np.maximum(true + said, 1)
    there = true + said > 0
    total = table.sum()
    spread = math.sqrt(float((total**2 - (said**2).sum()) * (total**2 - (true**2).sum())))
    out = {
        "precision": float(precision[there].mean()),
        "recall": float(recall[there].mean()),
        "f1_macro": float(f1[there].mean()),
        "mcc": float((hit.sum() * total - (true * said).sum()) / spread) if spread else 0.0,
    }
    return out | ({"f1": float(f1[1])} if n == 2 else {})
