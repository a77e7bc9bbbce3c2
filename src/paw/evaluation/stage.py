"""Stage `evaluate`: one base, with or without an adapter, on one split."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paw.config.schema import DatasetConfig, EvaluateConfig, transient
from paw.data.encode import encode
from paw.data.example import Example
from paw.data.load import examples, sample
from paw.errors import StageError
from paw.evaluation.statistics import standard_error
from paw.models.load import Runtime
from paw.store import Input, Stage, Watch

RECORDS = "records.jsonl"
STAGE = Stage("evaluate", "1", "paw.evaluation.stage:evaluate")


@dataclass
class EvaluateStage:
    dataset: DatasetConfig
    split: str
    evaluate: EvaluateConfig
    runtime: Runtime
    trust_remote_code: bool = transient(False)


def evaluate(config: EvaluateStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> dict[str, Any]:
    """Scores every choice of every question by the sum of its tokens' log-probabilities; the largest is the answer.

    Args:
        inputs: `model` and `data`; `adapter` if one is to be attached.

    Writes records.jsonl, one line a question, so that any two evaluations can be compared pairwise.
    """
    import torch

    from paw.evaluation.likelihood import batches, token_logprobs
    from paw.models.adapters import attach
    from paw.models.load import load_model, load_tokenizer

    base = inputs["model"]
    found = examples(inputs["data"].path, config.dataset, config.split)
    questions = sample(found, config.evaluate.sample_ratio, config.evaluate.limit, config.evaluate.seed)
    tokenizer = load_tokenizer(base.path, config.trust_remote_code)
    pairs = [p for q in questions for p in zip(q.contexts, q.continuations, strict=True)]
    rows = encode(tokenizer, pairs, config.dataset.chat)
    model = load_model(base.path, config.runtime, config.trust_remote_code)
    _refuse_too_long(max(len(r.ids) for r in rows), model, config.dataset.name)
    if "adapter" in inputs:
        model = attach(model, inputs["adapter"].path, base.fingerprint)

    sums, tokens, done = [0.0] * len(rows), [0] * len(rows), 0
    choices = max(len(q.continuations) for q in questions)
    with torch.inference_mode():
        for batch in batches(rows, config.evaluate.batch_size * choices, model.config.get_text_config().vocab_size):
            logprobs, mask = token_logprobs(model, [rows[i] for i in batch], tokenizer.pad_token_id)
            for i, total, count in zip(batch, logprobs.sum(-1).tolist(), mask.sum(-1).tolist(), strict=True):
                sums[i], tokens[i] = total, count
            done += len(batch)
            watch.progress(done, len(rows), "choices")
    if not all(map(math.isfinite, sums)):
        raise StageError(f"evaluate: {sum(not math.isfinite(s) for s in sums)} of {len(sums)} scores are not finite. "
                         "The adapter or the precision is broken: try hardware.precision=float32.")  # fmt: skip

    records, at = [], 0
    for q in questions:
        n = len(q.continuations)
        records.append(_record(q, sums[at : at + n], tokens[at : at + n]))
        at += n
    with open(out / RECORDS, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    return metrics(records)


def _record(question: Example, sums: list[float], tokens: list[int]) -> dict[str, Any]:
    lengths = [len(c) - 1 for c in question.continuations]  # characters without the leading blank
    return {
        "id": question.id,
        "gold": question.gold,
        "prediction": int(np.argmax(sums)),  # ties go to the lowest index
        "prediction_norm": int(np.argmax([s / max(n, 1) for s, n in zip(sums, lengths, strict=True)])),
        "loglikelihoods": sums,
        "tokens": tokens,
    }


def metrics(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy (plain, and by characters), its standard error; loss in nats per token of the gold answers, perplexity.

    Accuracy is None where questions have one choice only: a likelihood is all that can be scored.
    """
    gold = [(r["loglikelihoods"][r["gold"]], r["tokens"][r["gold"]]) for r in records]
    loss = -sum(s for s, _ in gold) / sum(n for _, n in gold)
    out: dict[str, Any] = {"n": len(records), "accuracy": None, "stderr": None, "acc_norm": None, "loss": loss,
                           "perplexity": math.exp(min(loss, 700))}  # fmt: skip
    if any(len(r["loglikelihoods"]) > 1 for r in records):
        right = [float(r["prediction"] == r["gold"]) for r in records]
        out |= {"accuracy": float(np.mean(right)), "stderr": standard_error(right),
                "acc_norm": float(np.mean([r["prediction_norm"] == r["gold"] for r in records]))}  # fmt: skip
    return out


def read_records(artifact: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact / RECORDS).read_text(encoding="utf-8").splitlines()]


def _refuse_too_long(longest: int, model: Any, dataset: str) -> None:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room and longest > room:
        raise StageError(f"{dataset}: its longest question has {longest} tokens, the model has room for {room}. Choose another model.")
