"""Stage `evaluate`: one base, with or without an adapter, on one split."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from paw.config.checks import transient
from paw.data.config import DatasetConfig
from paw.data.example import Example
from paw.data.load import examples, listed, sample
from paw.data.tokenise import Encoded, encode, encode_for_head, encode_prompts
from paw.errors import DataError, ModelError, StageError
from paw.evaluation import answers, classify, plan
from paw.evaluation.config import EvaluateConfig
from paw.evaluation.devices import Engines
from paw.evaluation.engine import Job
from paw.evaluation.statistics import f1, interval, standard_error
from paw.models.load import Runtime, is_encoder, limits, load_tokenizer
from paw.store import Input, Stage, Watch

RECORDS = "records.jsonl"
STAGE = Stage("evaluate", "2", "paw.evaluation.evaluate:evaluate")
Record = dict[str, Any]


@dataclass
class EvaluateStage:
    dataset: DatasetConfig
    split: str
    evaluate: EvaluateConfig
    runtime: Runtime
    fewshot_split: str = transient("train")  # its file and the seed are in the key
    trust_remote_code: bool = transient(False)
    engines: Engines = field(default_factory=Engines, metadata={"transient": True})
    train_split: str | None = None  # whose frequencies a head is compared with


def evaluate(
    config: EvaluateStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> dict[str, Any]:
    """Puts every question as evaluate.mode says and scores it; every mode also has the choices' log-likelihoods.

    Args:
        inputs: `model` and `data`; `adapter` if one is to be attached; `shots` where there are any; `train` to classify without
            an adapter.

    Writes records.jsonl, one line a question, so that any two evaluations can be compared pairwise.
    """
    c, dataset = config.evaluate, config.dataset
    left_out: Counter[str] = Counter()
    questions = _questions(config, inputs, left_out)
    if c.mode == "classify":
        return _classified(questions, config, inputs, out, left_out, watch)
    tokenizer = load_tokenizer(inputs["model"].path, config.trust_remote_code)
    questions, rows = _encoded(questions, tokenizer, config, inputs, left_out)
    if c.mode == "generate" and not c.lettered(dataset.kind):
        _refuse_unjudgeable(questions, inputs["data"].path)
    if left_out:
        watch.say(f"left out: {listed(left_out)}")

    prefix = plan.prefix_of(rows)
    shortest = min(rows, key=lambda q: sum(len(r.ids) for r in q))
    check = tuple(Encoded(r.ids[len(prefix) :], r.start - len(prefix)) for r in shortest)
    job = Job(
        inputs["model"],
        inputs.get("adapter"),
        config.runtime,
        config.trust_remote_code,
        tokenizer.pad_token_id,
        prefix,
        check,
    )
    device = "cuda" if config.runtime.device == "cuda" else "cpu"
    tokens = c.batch_tokens or plan.TOKENS[device]
    reads = plan.LOGITS[device] // len(tokenizer)
    sums = _ordered(config, job, plan.plan_scoring(rows, len(prefix), tokens, reads), watch)
    if not all(math.isfinite(s) for q in sums for s in q):
        bad = [q.id for q, s in zip(questions, sums, strict=True) if not all(map(math.isfinite, s))]
        raise StageError(
            f"evaluate: the scores of {len(bad)} of {len(sums)} questions are not finite (the first: {bad[0]}). "
            "The adapter or the precision is broken: try hardware.precision=float32."
        )
    records = [
        _record(q, s, [len(r.ids) - r.start for r in e])
        for q, s, e in zip(questions, sums, rows, strict=True)
    ]

    if c.mode == "generate":
        lettered = c.lettered(dataset.kind)
        prompts = encode_prompts(tokenizer, [q.contexts[q.gold] for q in questions], dataset.chat)
        batches = plan.plan_writing(
            prompts, len(prefix), 8 * tokens, c.max_new_tokens, dataset.stop
        )
        for question, record, ids in zip(
            questions, records, _ordered(config, job, batches, watch), strict=True
        ):
            text = answers.until(tokenizer.decode(ids, skip_special_tokens=True), dataset.stop)
            record |= _read(question, text, lettered)
    _write(out, records)
    return metrics(records, dataset.f1) | ({"left_out": dict(left_out)} if left_out else {})


def _classified(
    questions: list[Example],
    config: EvaluateStage,
    inputs: Mapping[str, Input],
    out: Path,
    left_out: Counter[str],
    watch: Watch,
) -> dict[str, Any]:
    """By the adapter's head; without an adapter by the majority-class baseline."""
    model, device = inputs["model"], "cuda" if config.runtime.device == "cuda" else "cpu"
    classes = None if questions[0].value is not None else questions[0].continuations
    if "adapter" in inputs:
        tokenizer = load_tokenizer(model.path, config.trust_remote_code)
        texts, prompts = [q.texts for q in questions], [q.contexts[0] for q in questions]
        rows = encode_for_head(
            tokenizer, texts, prompts, is_encoder(model.path), config.dataset.chat
        )
        kept = _fitting(
            [(q, [r]) for q, r in zip(questions, rows, strict=True)], config, inputs, left_out
        )
        questions, rows = [q for q, _ in kept], [r for _, (r,) in kept]
        found: list[Any] = [None] * len(rows)
        tokens, done = config.evaluate.batch_tokens or classify.TOKENS[device], 0
        for places, values in classify.outputs(
            rows,
            model,
            inputs["adapter"],
            classes,
            config.runtime,
            config.trust_remote_code,
            tokens,
        ):
            for place, value in zip(places, values, strict=True):
                found[place] = value
            done += len(places)
            watch.progress(done, len(rows))
    else:
        assert config.train_split is not None
        train = examples(
            inputs["train"].path, config.dataset, config.train_split, "classify", Counter()
        )
        found = [classify.blind(train)] * len(questions)
    if left_out:
        watch.say(f"left out: {listed(left_out)}")
    records = [classify.record(q, output) for q, output in zip(questions, found, strict=True)]
    if not all(math.isfinite(x) for r in records for x in r["loglikelihoods"]):
        raise StageError(
            "evaluate: what the head says is not finite. The adapter or the precision is broken: try hardware.precision=float32."
        )
    _write(out, records)
    return classify.metrics(records) | ({"left_out": dict(left_out)} if left_out else {})


def _write(out: Path, records: Sequence[Record]) -> None:
    with open(out / RECORDS, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def _questions(
    config: EvaluateStage, inputs: Mapping[str, Input], left_out: Counter[str]
) -> list[Example]:
    """The questions that are asked, the shots before them."""
    c, dataset = config.evaluate, config.dataset
    form = c.form(dataset.kind)
    found = sample(
        examples(inputs["data"].path, dataset, config.split, form, left_out),
        c.sample_ratio,
        c.limit,
        c.seed,
    )
    if not c.num_fewshot:
        return found
    solved = examples(inputs["shots"].path, dataset, config.fewshot_split, form)
    if len(solved) < c.num_fewshot:
        raise DataError(
            f"evaluate.num_fewshot={c.num_fewshot}: {inputs['shots'].path} has {len(solved)} rows only."
        )
    shots = random.Random(c.seed).sample(solved, c.num_fewshot)
    if (
        inputs["shots"].fingerprint == inputs["data"].fingerprint
    ):  # what is shown solved is not asked
        shown = {s.id for s in shots}
        left_out["a place among the shots"] += sum(q.id in shown for q in found)
        found = [q for q in found if q.id not in shown]
        left_out += Counter()  # drops what was counted zero times
    before = "".join(f"{s.solved()}\n\n" for s in shots)
    return [q.after(before) for q in found]


def _encoded(
    questions: Sequence[Example],
    tokenizer: Any,
    config: EvaluateStage,
    inputs: Mapping[str, Input],
    left_out: Counter[str],
) -> tuple[list[Example], list[list[Encoded]]]:
    """Questions with a row of tokens a choice; those that are longer than the model's context are refused, or left out."""
    flat = iter(
        encode(
            tokenizer,
            [p for q in questions for p in zip(q.contexts, q.continuations, strict=True)],
            config.dataset.chat,
        )
    )
    rows = [[next(flat) for _ in q.continuations] for q in questions]
    kept = _fitting(list(zip(questions, rows, strict=True)), config, inputs, left_out)
    return [q for q, _ in kept], [r for _, r in kept]


def _fitting(
    found: list[tuple[Example, list[Encoded]]],
    config: EvaluateStage,
    inputs: Mapping[str, Input],
    left_out: Counter[str],
) -> list[tuple[Example, list[Encoded]]]:
    """Those that the model has room and words for."""
    reach = limits(inputs["model"].path, config.trust_remote_code)
    most = reach.positions
    if reach.vocabulary and max(max(r.ids) for _, q in found for r in q) >= reach.vocabulary:
        raise ModelError(
            f"{inputs['model'].path}: its tokenizer has tokens beyond the model's {reach.vocabulary}. They do not belong together."
        )
    writes = config.evaluate.max_new_tokens if config.evaluate.mode == "generate" else 0
    kept = []
    for question, choices in found:
        longest = max(
            max(len(r.ids) for r in choices), writes and choices[question.gold].start + writes
        )
        if most is None or longest <= most:
            kept.append((question, choices))
        elif config.dataset.bad_rows == "refuse":
            raise DataError(
                f"{inputs['data'].path}, line {question.line}: the question needs {longest} tokens, the model has room for {most}. "
                "Leave such rows out (dataset.bad_rows=skip), show fewer shots, or choose another model."
            )
        else:
            left_out["more tokens than the model has room for"] += 1
    if not kept:
        raise DataError(
            f"{inputs['data'].path}: no question fits into the model's {most} tokens. Show fewer shots, or choose another model."
        )
    return kept


def _ordered(
    config: EvaluateStage, job: Job, planned: tuple[Sequence[plan.Batch], list[int]], watch: Watch
) -> list[Any]:
    """Results by question."""
    batches, order = planned
    by_batch = dict(config.engines.run(job, batches, watch))
    flat = [x for i in range(len(batches)) for x in by_batch[i]]
    out: list[Any] = [None] * len(order)
    for place, result in zip(order, flat, strict=True):
        out[place] = result
    return out


def _record(question: Example, sums: list[float], tokens: list[int]) -> Record:
    lengths = [len(c) - 1 for c in question.continuations]  # characters without the leading blank
    best = int(np.argmax(sums))  # ties go to the lowest index
    return {
        "id": question.id,
        "gold": question.gold,
        "prediction": best,
        "prediction_norm": int(
            np.argmax([s / max(n, 1) for s, n in zip(sums, lengths, strict=True)])
        ),
        "correct": best == question.gold if len(sums) > 1 else None,
        "loglikelihoods": sums,
        "tokens": tokens,
    }


def _read(question: Example, text: str, lettered: bool) -> Record:
    """What a written answer says, and whether it is right."""
    if lettered:
        said = answers.letter(text, ascii_uppercase[: len(question.continuations)])
        return {
            "text": text,
            "prediction": said,
            "correct": said == question.gold,
            "parsed": said is not None,
        }
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
    """A written answer is judged by its number: the gold answer must be one, or end with one after ####."""
    for question in questions:
        gold = answers.plain(question.continuations[0].strip())
        if len(gold.split()) != 1 or not any(ch.isdigit() for ch in gold):
            raise DataError(
                f"{file}, line {question.line}: the answer is no number and does not end with '#### NUMBER', so that a "
                "written answer cannot be judged by it. Use evaluate.mode=likelihood."
            )


def metrics(records: Sequence[Record], positive: int | None = None) -> dict[str, Any]:
    """Accuracy with its standard error and 95 % interval; loss in nats per token of the gold answers, and perplexity.

    Accuracy is None where questions have one choice only and nothing was written. `acc_norm` weighs choices by their
    characters; `accuracy_flexible` takes the last number of a written answer; `unparsed` counts answers that say nothing.

    Args:
        positive: the choice whose F1 is reported.
    """
    gold = [(r["loglikelihoods"][r["gold"]], r["tokens"][r["gold"]]) for r in records]
    loss = -sum(s for s, _ in gold) / sum(n for _, n in gold)
    out: dict[str, Any] = {
        "n": len(records),
        "accuracy": None,
        "stderr": None,
        "low": None,
        "high": None,
        "acc_norm": None,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
    }
    right = [float(r["correct"]) for r in records if r["correct"] is not None]
    if right:
        low, high = interval(int(sum(right)), len(right))
        out |= {
            "accuracy": float(np.mean(right)),
            "stderr": standard_error(right),
            "low": low,
            "high": high,
        }
    if any(len(r["loglikelihoods"]) > 1 for r in records):
        out["acc_norm"] = float(np.mean([r["prediction_norm"] == r["gold"] for r in records]))
    if "text" in records[0]:
        out["unparsed"] = sum(not r["parsed"] for r in records)
    if "correct_flexible" in records[0]:
        out["accuracy_flexible"] = float(np.mean([r["correct_flexible"] for r in records]))
    if positive is not None:
        out["f1"] = f1(
            [r["gold"] == positive for r in records], [r["prediction"] == positive for r in records]
        )
    return out


def read_records(artifact: Path) -> list[Record]:
    return [
        json.loads(line)
        for line in (artifact / RECORDS).read_text(encoding="utf-8").split("\n")
        if line
    ]
