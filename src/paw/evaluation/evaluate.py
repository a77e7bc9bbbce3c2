"""Stage `evaluate`: one base model, with an adapter or without, on one split."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from paw.config.checks import transient
from paw.data.config import DatasetConfig
from paw.data.example import Example
from paw.data.load import examples, sample
from paw.errors import DataError
from paw.evaluation.config import EvaluateConfig
from paw.evaluation.devices import Engines
from paw.evaluation.model import Model
from paw.evaluation.modes import Asking, mode_named
from paw.evaluation.records import write_records
from paw.evaluation.result import EvaluateResult
from paw.models.load import Runtime
from paw.store import Context, Input, Stage


@dataclass(kw_only=True)
class EvaluateStage:
    dataset: DatasetConfig
    split: str
    evaluate: EvaluateConfig
    runtime: Runtime
    fewshot_split: str = transient("train")  # its file and the seed are in the key
    trust_remote_code: bool = transient(False)
    train_split: str | None = None  # of the majority-class baseline


STAGE = Stage(
    "evaluate",
    "3",
    "paw.evaluation.evaluate:evaluate",
    config=EvaluateStage,
    result=EvaluateResult,
    keeps=True,
    devices="one",
)


def evaluate(
    config: EvaluateStage, inputs: Mapping[str, Input], out: Path, context: Context
) -> EvaluateResult:
    """Puts every question as evaluate.mode says, and writes a record of each: `records.jsonl`.

    Args:
        inputs: `model` and `data`; `adapter` if one is attached; `shots` where there are any;
            `train` for the majority-class baseline. The base stays in `context.kept`.

    Raises:
        DataError: for a split without usable questions, or with one that has to be left out where
            dataset.bad_rows=refuse.
        ModelError, AdapterError: for a model or an adapter that cannot be read or does not fit.
        StageError: for scores that are not finite, or where memory does not suffice.
    """
    left_out: Counter[str] = Counter()
    questions = _questions(config, inputs, left_out)
    model = Model(
        base=inputs["model"],
        adapter=inputs.get("adapter"),
        runtime=config.runtime,
        trust_remote_code=config.trust_remote_code,
        engines=context.kept.get(Engines),
        watch=context,
    )
    asking = Asking(
        questions=questions, config=config, inputs=inputs, model=model, left_out=left_out
    )
    mode = mode_named(config.evaluate.mode)
    records = mode.answer(asking)
    write_records(out, records)
    return replace(mode.metrics(records, config.dataset.f1), left_out=dict(left_out))


def _questions(
    config: EvaluateStage, inputs: Mapping[str, Input], left_out: Counter[str]
) -> list[Example]:
    """The questions that are asked, with the shots before them."""
    c, dataset, data = config.evaluate, config.dataset, inputs["data"]
    form = c.form(dataset.kind)
    split = examples(data.path, dataset, config.split, form, left_out)
    found = sample(split, c.sample_ratio, c.limit, c.seed)
    if not c.num_fewshot:
        return found
    pool = inputs["shots"]
    solved = examples(pool.path, dataset, config.fewshot_split, form)
    if len(solved) < c.num_fewshot:
        raise DataError(
            f"evaluate.num_fewshot={c.num_fewshot}: {pool.path} has {len(solved)} rows only."
        )
    shots = random.Random(c.seed).sample(solved, c.num_fewshot)
    if pool.fingerprint == data.fingerprint:  # what is shown solved is not asked
        shown = {s.id for s in shots}
        if n := sum(q.id in shown for q in found):
            left_out["a place among the shots"] += n
        found = [q for q in found if q.id not in shown]
    before = "".join(f"{s.solved()}\n\n" for s in shots)
    return [q.after(before) for q in found]
