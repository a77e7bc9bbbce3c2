"""task=evaluate: any models, each with the adapters that are for it, on one data set."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from paw.config.common import RunConfig
from paw.errors import AdapterError, ConfigError
from paw.evaluation.steps import Evaluates, evaluate
from paw.graph import Source
from paw.launch.outline import Beside, Outline, Row
from paw.launch.run import store_of
from paw.models.adapters import find_adapter, made_for
from paw.models.config import ModelConfig
from paw.models.steps import Base, base, given, model_named


@dataclass
class Config(Evaluates):
    source: ModelConfig = MISSING
    target: ModelConfig = MISSING
    # names in conf/model, folders or hub ids; without any, source and target
    models: list[str] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)  # adapter folders, one pass each

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            model_named(name)


def build(c: Config) -> Outline:
    wanted = [model_named(name) for name in c.models] or [c.source, c.target]
    bases = [base(c, model) for model in wanted]
    paths = list(dict.fromkeys(c.adapters))
    owners = {path: owner(c, path, bases) for path in paths}
    systems, comparisons = list[Row](), list[Beside]()
    for one in bases:
        alone = Row(evaluation=evaluate(c, one), model=one.name)
        adapted = []
        for path in (path for path in paths if owners[path] is one):
            adapter = given(path, one)
            step = evaluate(c, one, adapter, f"{one.name} + {short(path, paths)}")
            adapted.append(Row(evaluation=step, model=one.name, adapter=adapter))
        systems += [alone, *adapted]
        comparisons.append(Beside(base=alone, adapted=adapted))
    label = "evaluate_" + "+".join(one.name for one in bases)
    return Outline(label=label, systems=systems, comparisons=comparisons)


def owner(c: RunConfig, path: str, bases: list[Base]) -> Base:
    """The one of the models that an adapter is for: the only one there is, or as its stamp says."""
    if len(bases) == 1:
        return bases[0]
    stamp, store = made_for(find_adapter(path)), store_of(c)
    if stamp is None:
        raise ConfigError(
            f"adapters: {path} does not say which base it is for; name one: "
            f"models=[{bases[0].name}]."
        )
    absent = []
    for one in bases:
        here = one.node.find() if isinstance(one.node, Source) else None
        if here is None:
            absent.append(one)
        elif store.file(here).fingerprint == stamp:
            return one
    if len(absent) == 1:  # the only one that it can be for; that is checked when it is here
        return absent[0]
    raise AdapterError(
        f"{path}: was made for none of the models ({', '.join(b.name for b in bases)}) on this "
        "machine. Name its own base in models."
    )


def short(path: str, among: list[str]) -> str:
    """The folder's name, or the whole path where another has the same name."""
    name = path.rstrip("/").rsplit("/", 1)[-1]
    same = sum(other.rstrip("/").rsplit("/", 1)[-1] == name for other in among)
    return name if same == 1 else path
