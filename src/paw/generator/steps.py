"""Steps of this part, and what a task that generates reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from omegaconf import MISSING

from paw.data.config import DatasetConfig
from paw.data.steps import split
from paw.errors import ConfigError, DataError
from paw.evaluation.steps import evaluate
from paw.generator.analyze import STAGE as ANALYZE
from paw.generator.analyze import AnalyzeStage
from paw.generator.checkpoints import contents, find_checkpoints
from paw.generator.config import GeneratorConfig
from paw.generator.generate import GENERATED, OWN, GenerateStage
from paw.generator.generate import STAGE as GENERATE
from paw.generator.generator import ABOUT, GeneratorStage
from paw.generator.generator import STAGE as GENERATOR
from paw.generator.groups import ALL, GroupsStage, roles
from paw.generator.groups import STAGE as GROUPS
from paw.generator.judge import BASE, JudgeStage
from paw.generator.judge import STAGE as JUDGE
from paw.generator.pairings import pairing_named
from paw.generator.rehearse import STAGE as REHEARSE
from paw.generator.texts import STAGE as TEXTS
from paw.generator.texts import TextsStage
from paw.generator.tokens import STAGE as TOKENS
from paw.generator.tokens import TokensStage
from paw.graph import Check, Node, Source, Step, View
from paw.models.config import ModelConfig
from paw.models.load import resolve_runtime
from paw.models.steps import Base, attached, base, given, inside, model_named
from paw.store import Input, Store, digest
from paw.text import file_name
from paw.training.steps import Trains, train

MADE = 50
COMMON = "common"  # of a folder of tasks: the data that their common start is trained on


@dataclass
class Generates(Trains):
    """What a task that generates reads."""

    source: ModelConfig = MISSING
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


C = TypeVar("C", bound=Generates)


@dataclass(frozen=True)
class Chain(Generic[C]):
    """The steps from prompts and adapters to generated ones, for one seed of what is held out."""

    c: C
    seed: int

    @property
    def g(self) -> GeneratorConfig:
        return self.c.generator

    @property
    def count(self) -> int:
        """Adapters that are made here."""
        return self.g.count or MADE

    @cached_property
    def base(self) -> Base:
        return base(self.c, self.c.source)

    @cached_property
    def encoder(self) -> Base:
        return base(self.c, model_named(self.g.encoder))

    # ---- data ------------------------------------------------------------------------------------

    @cached_property
    def tasks(self) -> dict[str, DatasetConfig]:
        """The data set of every task; without tasks the one there is."""
        if not self.g.tasks:
            return {self.c.dataset.name: self.c.dataset}
        found = {f.name: f for f in _folder("generator.tasks", self.g.tasks).iterdir()}
        names = sorted(name for name, f in found.items() if f.is_dir() and name != COMMON)
        if len(names) < 4:
            raise ConfigError(
                f"generator.tasks={self.g.tasks}: holds {len(names)} folders with a data set. "
                "At least 4 are needed: some to learn from, one to validate, one to test."
            )
        return {n: replace(self.c.dataset, name=n, path=str(found[n])) for n in names}

    @cached_property
    def roles(self) -> dict[str, str]:
        """Of whole tasks; without tasks prompts have roles of their own."""
        if not self.g.tasks:
            return {}
        names = list(self.tasks)
        return dict(zip(names, roles(len(names), self.g.test_ratio, self.seed), strict=True))

    @cached_property
    def held(self) -> list[str]:
        """The tasks that are tested."""
        return [t for t, role in self.roles.items() if role == "test"] or list(self.tasks)

    def on(self, dataset: DatasetConfig, steps: int | None = None) -> C:
        """The configuration for a task's data, and so many steps of training."""
        c = replace(self.c, dataset=dataset)
        return c if steps is None else replace(c, train=replace(c.train, max_steps=steps))

    @cached_property
    def groups(self) -> Node:
        """Prompts: a prepared folder, or groups of the data's examples."""
        g, c = self.g, self.c
        if g.prompts:
            return Source.at("generator.prompts", _folder("generator.prompts", g.prompts), True)
        inputs: dict[str, Node | View] = {}
        if g.tasks:
            for name, dataset in self.tasks.items():
                inputs[f"task {name}"] = split(c, dataset, dataset.train_split)
        else:
            inputs["data"] = split(c, c.dataset, c.dataset.train_split)
        if g.pairing == "order" and not g.checkpoints:
            inputs["trail"] = self.trail
        config = GroupsStage(
            dataset=replace(c.dataset, path=None),
            split=c.dataset.train_split,
            task="" if g.tasks else c.dataset.name,
            samples=g.samples_per_prompt,
            ratio=g.test_ratio,
            text=g.text,
            labelled=g.labelled,
            roles=self.roles,
            most=g.most if g.pairing != "branch" else self.count,
            seed=self.seed,
        )
        return Step(stage=GROUPS, name="prompts", config=config, inputs=inputs)

    @cached_property
    def texts(self) -> Step[Any]:
        return Step(
            stage=TEXTS,
            name=f"encode prompts by {self.encoder.name}",
            config=TextsStage(runtime=resolve_runtime(self.c.hardware)),
            inputs={"groups": self.groups, "encoder": self.encoder.node},
        )

    # ---- adapters --------------------------------------------------------------------------------

    @cached_property
    def trail(self) -> Step[Any]:
        """One training that keeps its adapter every so many steps."""
        g, c = self.g, self.c
        steps = self.count * g.every
        kept = replace(c.train, max_steps=steps, epochs=None, keep_every=g.every)
        return train(replace(c, train=kept), self.base, name=f"train {self.base.name}, kept")

    @cached_property
    def start(self) -> Step[Any] | None:
        """What branches, or tasks, have in common; None of the trail of one training."""
        data = self.c.dataset
        if self.g.checkpoints or pairing_named(self.g.pairing).collects == "trail":
            return None
        if self.g.tasks:
            folder = Path(self.g.tasks).expanduser() / COMMON
            if not folder.is_dir():
                return None
            data = replace(data, name=COMMON, path=str(folder))
        if not self.g.warm_steps:
            return None
        return train(self.on(data, self.g.warm_steps), self.base, name="train the common start")

    @cached_property
    def branches(self) -> dict[str, Step[Any]]:
        """A short training for each prompt, or for each task."""
        g, c = self.g, self.c
        if g.tasks:
            return {
                name: train(
                    self.on(dataset, g.every), self.base, start=self.start, name=f"train {name}"
                )
                for name, dataset in self.tasks.items()
            }
        lines = View(self.groups, "groups", _lines)
        return {
            f"branch_{i:04d}": train(
                self.on(c.dataset, g.every),
                self.base,
                start=self.start,
                only=(lines, i),
                name=f"train branch {i}",
            )
            for i in range(self.count)
        }

    @cached_property
    def tokens(self) -> Step[Any]:
        """All adapters as one array."""
        g, lora = self.g, self.c.adapter
        collects = pairing_named(g.pairing).collects
        inputs: dict[str, Node | View] = {"model": self.base.node}
        names: list[str] = []
        if g.checkpoints:
            folder = _adapters("generator.checkpoints", g.checkpoints)
            inputs["folder"] = View(folder, "adapters", _held_in)
        elif collects == "trail":
            inputs["trail"] = self.trail
        else:
            names = list(self.branches)
            inputs |= {name: attached(step) for name, step in self.branches.items()}
        config = TokensStage(
            tokens=g.tokens,
            count=None if names else g.count if g.checkpoints else self.count,
            skip_damaged=g.skip_damaged,
            names=names,
            grouped=collects == "branches" and bool(names),
            r=getattr(lora, "r", None),
            alpha=getattr(lora, "alpha", None),
        )
        return Step(stage=TOKENS, name="adapters as tokens", config=config, inputs=inputs)

    @property
    def analysis(self) -> Step[Any]:
        return Step(
            stage=ANALYZE,
            name="statistics of adapters",
            config=AnalyzeStage(),
            inputs={"tokens": self.tokens},
        )

    # ---- the network -----------------------------------------------------------------------------

    @cached_property
    def fitted(self) -> Node:
        """The network: trained here, or one from elsewhere."""
        if self.g.path:
            folder = _folder("generator.path", self.g.path)
            if not (folder / ABOUT).is_file():
                raise ConfigError(
                    f"generator.path: {folder} is no generator: it has no {ABOUT}. Give what "
                    "task=generator_train has left, as outputs/runs/…/generator_0."
                )
            return Source.at("generator.path", folder, folder=True)
        inputs: dict[str, Node | View] = {
            "texts": self.texts,
            "tokens": self.tokens,
            "model": self.base.node,
        }
        g = self.g
        dry = g.dry_run
        if dry and self.c.task != "generator_train":
            raise ConfigError(
                "generator.dry_run: trains nothing, so there is nothing to generate with. It is "
                "for task=generator_train."
            )
        config = GeneratorStage(
            pairing=g.pairing,
            ratio=g.test_ratio,
            network=g.network,
            fit=replace(g.fit, seed=g.fit.seed + self.seed),
            runtime=resolve_runtime(self.c.hardware),
            seed=self.seed,
        )
        name = f"generator, seed {self.seed}" if len(g.seeds) > 1 else "generator"
        return Step(stage=REHEARSE if dry else GENERATOR, name=name, config=config, inputs=inputs)

    def generated(self, how: str) -> Step[Any]:
        """Adapters of the held-out tasks, or of what stands beside them."""
        inputs: dict[str, Node | View] = {
            "generator": self.fitted,
            "texts": self.texts,
            "tokens": self.tokens,
        }
        if how == "strings":
            inputs["encoder"] = self.encoder.node
        config = GenerateStage(
            how=how,
            tasks=self.held,
            seed=self.seed,
            runtime=resolve_runtime(self.c.hardware),
        )
        return Step(stage=GENERATE, name=f"{how} adapters", config=config, inputs=inputs)

    def asked(self) -> Step[Any]:
        """Adapters of a user's prompts.

        Raises:
            ConfigError: where there are none.
        """
        g = self.g
        inputs: dict[str, Node | View] = {
            "generator": self.fitted,
            "encoder": self.encoder.node,
            "model": self.base.node,
        }
        form = ""
        if g.input:
            path = Path(g.input).expanduser()
            if not path.is_file():
                raise ConfigError(
                    f"generator.input: {path} is no file. Give a text with a prompt a line, or "
                    "rows of texts (.jsonl)."
                )
            inputs["prompts"] = Source.at("generator.input", path)
            form = "jsonl" if path.suffix == ".jsonl" else "lines"
        elif g.prompt is None:
            raise ConfigError(
                "task=generator_generate: name a prompt, generator.prompt=TEXT, or a file of them, "
                "generator.input=FILE."
            )
        runtime = resolve_runtime(self.c.hardware)
        config = GenerateStage(prompt=g.prompt, form=form, runtime=runtime)
        return Step(stage=GENERATE, name="generated adapters", config=config, inputs=inputs)

    # ---- what they are worth ---------------------------------------------------------------------

    @property
    def own(self) -> dict[str, Node]:
        """Of each held-out task the adapter that was trained for it: the ceiling."""
        c = self.c
        if self.g.tasks:
            return {t: self.branches[t] for t in self.held}
        [task] = self.tasks
        if c.adapter.path:
            return {task: given(c.adapter.path, self.base)}
        collects = pairing_named(self.g.pairing).collects
        trailed = collects == "trail" and not self.g.checkpoints
        return {task: self.trail if trailed else train(c, self.base)}

    def evaluations(self) -> dict[tuple[str, str], Step[Any]]:
        """By system and task."""
        found: dict[tuple[str, str], Step[Any]] = {}
        for task in self.held:
            c = self.on(self.tasks[task])
            adapters: Mapping[str, Node | View | None] = {
                BASE: None,
                OWN: self.own[task],
                **({"start": self.start} if self.start is not None else {}),
                **{how: inside(step, file_name(task)) for how, step in self.made.items()},
            }
            for system, adapter in adapters.items():
                found[system, task] = evaluate(c, self.base, adapter, f"{system}, {task}")
        return found

    @property
    def _controls(self) -> list[str]:
        """Of tasks, and of branches, no checkpoint is the last."""
        wanted = dict.fromkeys(("mean", *self.g.controls))
        trail = self.start is None and not self.g.tasks
        return [how for how in wanted if how != "last" or trail]

    @cached_property
    def made(self) -> dict[str, Step[Any]]:
        """By how they come about: generated, and every control."""
        return {how: self.generated(how) for how in (GENERATED, *self._controls)}


def judged(chains: list[Chain[C]]) -> Step[Any]:
    """The table over all seeds."""
    inputs: dict[str, Node | View] = {}
    evaluated, made = dict[str, list[str]](), dict[str, list[str]]()
    for chain in chains:
        for (system, task), step in chain.evaluations().items():
            name = f"{system} {task} {chain.seed}"
            inputs[name], evaluated[name] = step, [system, task, str(chain.seed)]
        for how, step in chain.made.items():
            name = f"made {how} {chain.seed}"
            inputs[name], made[name] = step, [how, str(chain.seed)]
    config = JudgeStage(evaluated=evaluated, made=made)
    return Step(stage=JUDGE, name="what generated adapters are worth", config=config, inputs=inputs)


def chains(c: C) -> list[Chain[C]]:
    return [Chain(c, seed) for seed in c.generator.seeds]


def _held_in(store: Store, folder: Path) -> Input:
    """A folder of adapters by the files that are read of it, whatever their endings."""
    files = contents([c.path for c in find_checkpoints(folder)])
    held = {str(f.relative_to(folder)): store.content(f) for f in files}
    return Input(folder, digest(held))


def _lines(store: Store, folder: Path) -> Input:
    """The file with a prompt a line, of a folder of groups."""
    file = folder / ALL
    if not file.is_file():
        raise DataError(
            f"{folder}: has no {ALL}, which says which examples a prompt has. Leave "
            "generator.prompts out, or let task=generator_prepare write it."
        )
    return store.file(file)


def _folder(key: str, text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{key}: {path} is no folder.")
    return path


def _adapters(key: str, text: str) -> Source:
    """A folder of adapters from elsewhere."""
    path = _folder(key, text)

    def look(store: Store) -> str:
        return f"{len(find_checkpoints(path))} adapters in {path}"

    return Source.at(key, path, folder=True, checks=[Check(name=key, look=look)])
