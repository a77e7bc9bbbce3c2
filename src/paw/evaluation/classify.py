"""Texts put into classes by a trained head, or given a value; and what is right without reading them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from paw.data.example import Example
from paw.data.tokenise import Encoded, pad
from paw.errors import AdapterError
from paw.evaluation.statistics import interval, standard_error
from paw.models.load import Runtime, load_classifier, load_tokenizer, tells_pairs
from paw.store import Input
from paw.text import some

Record = dict[str, Any]
TOKENS = {"cpu": 2048, "cuda": 32768}  # of a batch


def outputs(
    rows: Sequence[Encoded],
    model: Input,
    adapter: Input,
    classes: Sequence[str] | None,
    runtime: Runtime,
    trust_remote_code: bool,
    tokens: int,
) -> Iterator[tuple[list[int], np.ndarray[Any, Any]]]:
    """Batches of like lengths: places of their rows, and what the head says of each (rows × outputs, float32).

    Raises:
        AdapterError: where the adapter's head has other classes.
    """
    import torch

    from paw.models.adapters import attach, classes_of

    known = classes_of(adapter.path)
    if known is not None and classes is not None and list(known) != list(classes):
        raise AdapterError(
            f"{adapter.path}: its head knows {len(known)} classes ({some(known)}), the data has {len(classes)} "
            f"({some(classes)}). Use the data set it was trained on."
        )
    base, _ = load_classifier(model.path, runtime, classes, trust_remote_code)
    ready, tokenizer = (
        attach(base, adapter.path, model.fingerprint),
        load_tokenizer(model.path, trust_remote_code),
    )
    pairs = tells_pairs(base, tokenizer)
    with torch.inference_mode():
        for places in batches([len(r.ids) for r in rows], tokens):
            yield (
                places,
                class_logits(ready, [rows[i] for i in places], tokenizer.pad_token_id, pairs)
                .cpu()
                .numpy(),
            )


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows of like lengths together, at most so many tokens with what is filled up."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def class_logits(model: Any, rows: Sequence[Encoded], pad_id: int, pairs: bool) -> Any:
    """What the head says of each row: rows × outputs, float32. Rows are filled up on the right."""
    device = next(model.parameters()).device
    ask = {
        "input_ids": pad([r.ids for r in rows], pad_id).to(device),
        "attention_mask": pad([[1] * len(r.ids) for r in rows], 0).to(device),
    }
    if pairs:
        ask["token_type_ids"] = pad(
            [[0] * r.start + [1] * (len(r.ids) - r.start) for r in rows], 0
        ).to(device)
    return model(**ask).logits.float()


def blind(train: Sequence[Example]) -> np.ndarray[Any, Any]:
    """The outputs of the majority-class baseline: the training split's frequencies as log-probabilities (one more of each), or its
    mean."""
    if train[0].value is not None:
        return np.array([np.mean([e.value for e in train])])
    counts = Counter(e.gold for e in train)
    n = len(train[0].continuations)
    return np.log([(counts[k] + 1) / (len(train) + n) for k in range(n)])


def record(question: Example, output: np.ndarray[Any, Any]) -> Record:
    """One record a question, of the form that other modes have: log-probabilities of the classes; or of a value the negative
    squared error, so that systems are compared by it."""
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


def metrics(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy with its error, and over the classes the means of precision, recall and F1, and Matthews' correlation (Gorodkin's
    for more than two classes); of values Pearson's and Spearman's correlation. Loss is nats, or the mean squared error."""
    loss = -float(np.mean([r["loglikelihoods"][r["gold"]] for r in records]))
    out: dict[str, Any] = {
        "n": len(records),
        "accuracy": None,
        "stderr": None,
        "low": None,
        "high": None,
        "acc_norm": None,
        "loss": loss,
    }
    if "value" in records[0]:
        from scipy.stats import pearsonr, spearmanr

        gold, found = ([r[key] for r in records] for key in ("value", "prediction"))
        moves = len(set(found)) > 1 and len(set(gold)) > 1
        return out | {
            "perplexity": None,
            "pearson": float(pearsonr(gold, found)[0]) if moves else 0.0,
            "spearman": float(spearmanr(gold, found)[0]) if moves else 0.0,
        }
    right = [float(r["correct"]) for r in records]
    low, high = interval(int(sum(right)), len(right))
    out |= {
        "accuracy": float(np.mean(right)),
        "stderr": standard_error(right),
        "low": low,
        "high": high,
        "perplexity": math.exp(min(loss, 700)),
    }
    return out | by_class(
        [r["gold"] for r in records],
        [r["prediction"] for r in records],
        len(records[0]["loglikelihoods"]),
    )


def by_class(gold: Sequence[int], found: Sequence[int], n: int) -> dict[str, float]:
    """Means over the classes that occur; of two classes, also the second's, which GLUE reports."""
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
