"""The stages a task wires together: each call is one memoised unit of work, told to the console as it goes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from paw.config.compose import transfer_named
from paw.config.schema import ModelConfig, PawConfig, PlaceboConfig, TransferConfig
from paw.console import Console
from paw.data.load import split_file
from paw.errors import AdapterError, ConfigError, DataError
from paw.evaluation import stage as evaluation
from paw.evaluation.devices import Engines
from paw.models.adapters import check_base, read_config
from paw.models.load import resolve_runtime
from paw.models.locate import locate
from paw.models.tensors import linear_shapes
from paw.report.results import System
from paw.store import Artifact, Input, Stage, Store
from paw.training import stage as training
from paw.transfer import calibrate as calibrating
from paw.transfer import stage as transferring
from paw.transfer.modules import all_pairs, by_layer, moments_bytes

log = logging.getLogger("paw")


@dataclass(frozen=True)
class Base:
    """A base model that was found: its configuration, and its folder with the fingerprint of its content."""

    config: ModelConfig
    input: Input

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, and the stages that made it (none for one from elsewhere)."""

    input: Input
    made: tuple[Artifact, ...] = ()

    @property
    def path(self) -> Path:
        return self.input.path


class Stages:
    """Everything is found before anything runs: models, data and adapter raise here, with no run folder yet."""

    def __init__(self, config: PawConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.runtime = resolve_runtime(config.hardware)
        if config.evaluate.records == "parquet" and find_spec("pyarrow") is None:
            raise ConfigError('evaluate.records=parquet needs the package pyarrow. Install it: pip install "paw[hub]".')
        self.store = Store(Path(config.paths.artifacts), config.force)
        self.engines = Engines()  # a base stays in memory from one evaluation to the next
        self._told: set[str] = set()

    # ---- inputs ----------------------------------------------------------------------------------------

    def base(self, model: ModelConfig) -> Base:
        return Base(model, self.store.file(locate(model, self.config.paths.models_dir, self.console)))

    def data(self, split: str) -> Input:
        return self.store.file(split_file(self.config.dataset, split, self.config.paths.data_dir, self.console))

    def find(self, train: bool = False, evaluate: bool = False, transfer: bool = False) -> None:
        """Finds (or fetches) what the stages of a task will read, so that a missing file stops it before any of them."""
        splits = [self.config.dataset.train_split] * train + [self.eval_split] * evaluate
        files = [self.data(split).path for split in splits]
        if evaluate and self.config.evaluate.num_fewshot:
            self.data(self.fewshot_split)
        if len(files) == 2 and files[0] == files[1] and not all("[" in split for split in splits):
            raise DataError(
                f"{files[0]}: one file for both splits would be tested on what was trained. Give parts of it: "
                "'dataset.train_split=train[:80%]' 'dataset.eval_split=train[80%:]'."
            )
        for c in map(self._method, self.methods() if transfer else []):
            if _needs_text(c):
                self._calibration(c)

    def given_adapter(self, path: str, base: Base) -> Adapter:
        """An adapter from elsewhere; one that is stamped for another base is refused."""
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise AdapterError(f"{path}: no such adapter folder.")
        read_config(folder)
        check_base(folder, base.input.fingerprint)
        return Adapter(self.store.file(folder))

    @property
    def eval_split(self) -> str:
        return self.config.evaluate.split or self.config.dataset.eval_split

    @property
    def fewshot_split(self) -> str:
        return self.config.evaluate.fewshot_split or self.config.dataset.train_split

    # ---- stages ----------------------------------------------------------------------------------------

    def evaluate(self, name: str, base: Base, adapter: Adapter | None = None) -> System:
        """One base on the evaluation split, with an adapter or without."""
        how = self.config.evaluate
        if how.sample_ratio == 1 and how.limit is None and not how.num_fewshot:
            how = replace(how, seed=0)  # nothing is drawn
        config = evaluation.EvaluateStage(
            self.config.dataset, self.eval_split, how, self.runtime, self.fewshot_split, base.config.trust_remote_code, self.engines
        )
        inputs = {"model": base.input, "data": self.data(self.eval_split)}
        if how.num_fewshot:
            inputs["shots"] = self.data(self.fewshot_split)
        if adapter is not None:
            check_base(adapter.path, base.input.fingerprint)
            inputs["adapter"] = adapter.input
        done = self._run(evaluation.STAGE, config, inputs, name)
        r = done.result
        accuracy = "" if r["accuracy"] is None else f"accuracy {r['accuracy']:.3f} ± {r['stderr']:.3f}, "
        unparsed = f", {r['unparsed']} answers say nothing that can be parsed" if r.get("unparsed") else ""
        self._tell(done, f"{name}: {accuracy}loss {r['loss']:.3f}, n = {r['n']}{unparsed}")
        coverage = next((a.result["coverage"] for a in adapter.made if "coverage" in a.result), None) if adapter else None
        return System(name, base.name, done, list(adapter.made) if adapter else [], coverage)

    def train(self, base: Base) -> Adapter:
        """A base's own adapter on the training split."""
        c = self.config
        config = training.TrainStage(
            c.dataset, c.dataset.train_split, replace(c.adapter, path=None), c.train, self.runtime, self.runtime.devices,
            c.evaluate.lettered(c.dataset.kind), base.config.hub or str(base.input.path), base.config.trust_remote_code,
        )  # fmt: skip
        inputs = {"model": base.input, "data": self.data(c.dataset.train_split)}
        done = self._run(training.STAGE, config, inputs, f"train {base.name}")
        self._tell(done, f"{done.result['steps']} steps, loss {done.result['train_loss']:.3f} at the end")
        return Adapter(done.as_input(), (done,))

    def methods(self) -> list[str]:
        """The configured method first, then what stands beside it."""
        return list(dict.fromkeys([self.config.transfer.method, *self.config.transfer.controls]))

    def transfer(self, adapter: Adapter, source: Base, target: Base, method: str) -> Adapter:
        """The source's adapter on the target, by the configured method or by another that stands beside it."""
        check_base(adapter.path, source.input.fingerprint)
        c = self._method(method)
        reference = self._method(c.reference) if isinstance(c, PlaceboConfig) else None
        inputs = {"adapter": adapter.input, "source": source.input, "target": target.input}
        text = None
        if _needs_text(c):
            known, text = self._moments(c, source, target)
            inputs |= known
        name = target.config.hub or str(target.input.path)
        config = transferring.TransferStage(c, reference, text, self.runtime, name)
        done = self._run(transferring.STAGE, config, inputs, f"transfer by {c.method}")
        r = done.result
        similarity = "" if reference else f"; similarity {r['similarity']:.3f} (chance {r['chance']:.3f})"
        self._tell(done, f"{c.method}: {r['target_modules']} modules, {r['coverage']:.0%} of the adapter{similarity}")
        return Adapter(done.as_input(), (*adapter.made, done))

    def _method(self, name: str) -> TransferConfig:
        return transfer_named(name, self.config.transfer, self.config.seed)

    def _moments(self, c: TransferConfig, source: Base, target: Base) -> tuple[dict[str, Input], calibrating.CalibrateStage | None]:
        """What both models do on the calibration text: an artifact if it fits into memory, else the text to stream."""
        text = self._calibration(c)
        shapes = [linear_shapes(base.input.path) for base in (source, target)]
        pairs = all_pairs(by_layer(shapes[0]), by_layer(shapes[1]), c.layers)
        rows = "data" in text
        trust = (source.config.trust_remote_code, target.config.trust_remote_code)
        config = calibrating.CalibrateStage(
            self.runtime,
            c.layers,
            c.positions,
            self.config.dataset if rows else None,
            self.config.dataset.train_split if rows else None,
            c.batch_size,
            trust,
        )
        if moments_bytes(pairs, shapes[0], shapes[1]) > c.memory_gb * 2**30:
            return text, config
        inputs = {"source": source.input, "target": target.input, **text}
        done = self._run(calibrating.STAGE, config, inputs, f"calibrate {source.name} and {target.name}")
        if done.key not in self._told:
            self._told.add(done.key)
            self._tell(done, f"calibrate: {done.result['positions']} positions of {done.result['texts']} texts, {done.result['mib']} MiB")
        return {"moments": done.as_input()}, None

    def _calibration(self, c: TransferConfig) -> dict[str, Input]:
        text = c.calibration or self.config.dataset.calibration
        if text is None:
            return {"data": self.data(self.config.dataset.train_split)}
        path = Path(text).expanduser()
        if not path.is_file():
            key = "transfer.calibration" if c.calibration else "dataset.calibration"
            raise ConfigError(f"{key}: {path} is no file. Give a text file with a document a line.")
        return {"calibration": self.store.file(path)}

    def _run(self, stage: Stage, config: object, inputs: dict[str, Input], label: str) -> Artifact:
        self.console.start(label)
        if stage is not evaluation.STAGE:
            self.engines.release()  # what comes needs the memory
        return self.store.run(stage, config, inputs, self.console)

    def _tell(self, done: Artifact, text: str) -> None:
        self.console.close()
        log.info("      %-9s %s  (%.1f s%s)", "reused" if done.reused else "computed", text, done.cost["seconds"] or 0,
                 " when it ran" if done.reused else "")  # fmt: skip


def _needs_text(c: TransferConfig) -> bool:
    return c.evidence == "text" or c.gain == "activation"
