"""Steps of this part, and what a task that evaluates reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from omegaconf import MISSING

from paw.config.common import RunConfig
from paw.data.config import DatasetConfig
from paw.data.steps import apart, split
from paw.errors import need
from paw.evaluation.checks import check_mode, check_model
from paw.evaluation.config import EvaluateConfig
from paw.evaluation.evaluate import STAGE, EvaluateStage
from paw.evaluation.result import EvaluateResult
from paw.graph import Check, Node, Source, Step, View, steps_of
from paw.models.load import resolve_runtime
from paw.models.steps import Base, attached
from paw.store import Store


@dataclass
class Evaluates(RunConfig):
    """What a task that evaluates reads."""

    dataset: DatasetConfig = MISSING
    evaluate: EvaluateConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.evaluate, self.dataset)

    @property
    def form(self) -> str:
        """What a row becomes: its choices, their letters, or a class."""
        return self.evaluate.form(self.dataset.kind)

    @property
    def eval_split(self) -> str:
        return self.evaluate.split or self.dataset.eval_split


def evaluate(
    c: Evaluates, base: Base, adapter: Node | View | None = None, name: str | None = None
) -> Step[EvaluateResult]:
    """A base on the evaluation split, with an adapter or without; of several in one folder a
    view."""
    how, dataset = c.evaluate, c.dataset
    if how.sample_ratio == 1 and how.limit is None and not how.num_fewshot:
        how = replace(how, seed=0)  # nothing is drawn, so every seed shares the result
    data = split(c, dataset, c.eval_split, c.form)
    inputs: dict[str, Node | View] = {"model": base.node, "data": data}
    checks = [usable(c, base), _records(c)]
    train = split(c, dataset, dataset.train_split, c.form)
    blind = how.mode == "classify" and adapter is None
    if blind:
        inputs["train"] = train
    fewshot_split = how.fewshot_split or dataset.train_split
    if how.num_fewshot:
        inputs["shots"] = split(c, dataset, fewshot_split, c.form)
    if adapter is not None:
        inputs["adapter"] = adapter if isinstance(adapter, View) else attached(adapter)
    if _trained(adapter.node if isinstance(adapter, View) else adapter, train):
        checks.append(apart(train, data, dataset.train_split, c.eval_split))
    config = EvaluateStage(
        dataset=dataset,
        split=c.eval_split,
        evaluate=how,
        runtime=resolve_runtime(c.hardware),
        fewshot_split=fewshot_split,
        trust_remote_code=base.config.trust_remote_code,
        train_split=dataset.train_split if blind else None,
    )
    return Step(stage=STAGE, name=name or base.name, config=config, inputs=inputs, checks=checks)


def _trained(adapter: Node | None, rows: Source) -> bool:
    """Whether an adapter is made of rows here."""
    made = steps_of([adapter]) if adapter is not None else []
    return any(
        step.stage.name in ("encode", "prefer") and node.identity == rows.identity
        for step in made
        for node in step.needs
    )


def usable(c: Evaluates, base: Base) -> Check:
    """That a model can be used as evaluate.mode says."""

    def look(store: Store) -> str:
        if isinstance(base.node, Source):
            check_model(c.evaluate.mode, base.node.path)
        return f"evaluate.mode={c.evaluate.mode}"

    return Check(name=f"use of {base.name}", look=look, of=base.node.identity)


def _records(c: Evaluates) -> Check:
    def look(store: Store) -> str:
        if c.evaluate.records == "parquet":
            need("pyarrow", "hub", "evaluate.records=parquet")
        return c.evaluate.records

    return Check(name="records", look=look)
