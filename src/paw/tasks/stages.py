"""The stages a task wires together: each call is one memoised unit of work, told to the console as it goes."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paw.cli.compose import transfer_named
from paw.cli.schema import PawConfig
from paw.console import Console
from paw.data import encode as tokens
from paw.data.load import split_file, unused
from paw.errors import AdapterError, ConfigError, DataError, nearest, need
from paw.evaluation import evaluate as evaluation
from paw.evaluation.devices import Engines
from paw.export import compress as compressing
from paw.export import merge as merging
from paw.models.adapters import check_base, find_adapter, made_for, other_base, read_config
from paw.models.config import ModelConfig
from paw.models.load import Runtime, is_encoder, resolve_runtime, room
from paw.models.locate import locate
from paw.models.tensors import linear_shapes
from paw.report.results import System
from paw.store import BEGUN, Artifact, Input, Stage, Store
from paw.training import prefer as preferring
from paw.training import train as training
from paw.transfer import calibrate as calibrating
from paw.transfer import match as matching
from paw.transfer import spoil as spoiling
from paw.transfer import transfer as transferring
from paw.transfer.config import DRAWN, PlaceboConfig, TransferConfig
from paw.transfer.modules import (
    BASIS,
    HELD,
    aligned,
    all_pairs,
    by_index,
    by_layer,
    moments_bytes,
    proportional,
    spread,
)

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
        if config.evaluate.records == "parquet":
            need("pyarrow", "hub", "evaluate.records=parquet")
        self.store = Store(Path(config.paths.artifacts), config.force, config.verify)
        self.engines = Engines()  # a base stays in memory from one evaluation to the next
        self.warnings: list[str] = []
        self._told: set[str] = set()
        self._moved: dict[
            tuple[str, str, int | None], Adapter
        ] = {}  # what several placebos spoil is asked for once

    # ---- inputs ----------------------------------------------------------------------------------------

    def base(self, model: ModelConfig) -> Base:
        return Base(
            model, self.store.file(locate(model, self.config.paths.models_dir, self.console))
        )

    def data(self, split: str) -> Input:
        return self.store.file(
            split_file(self.config.dataset, split, self.config.paths.data_dir, self.console)
        )

    def find(self, train: bool = False, evaluate: bool = False, transfer: bool = False) -> None:
        """Finds (or fetches) what the stages of a task will read, so that a missing file stops it before any of them."""
        splits = [self.config.dataset.train_split] * train + [self.eval_split] * evaluate
        files = [self.data(split).path for split in splits]
        if train:
            check_training(self.config, self.runtime)
            if self.config.train.val_every is not None:
                self.data(self.val_split)
        if evaluate and self.config.evaluate.num_fewshot:
            self.data(self.fewshot_split)
        if evaluate and self.config.evaluate.mode == "classify":
            self.data(self.config.dataset.train_split)
        if len(files) == 2 and files[0] == files[1] and not all("[" in split for split in splits):
            raise DataError(
                f"{files[0]}: one file for both splits would be tested on what was trained. Give parts of it: "
                "'dataset.train_split=\"train[:80%]\"' 'dataset.eval_split=\"train[80%:]\"'."
            )
        for file in dict.fromkeys(files):
            if fields := unused(file, self.config.dataset):
                self.warn(
                    f"{file}: nothing reads the field {', '.join(fields)} of its rows. Name it in dataset.prompt to ask it."
                )
        for c in self.methods() if transfer else []:
            if _needs_text(self._real(c)):
                self._calibration(c)

    def given_adapter(self, path: str, base: Base) -> Adapter:
        """An adapter from elsewhere; one that is stamped for another base is refused, and one that only says so by a name is
        warned of: nothing else would show that an adapter of Llama-3 sits on Llama-3-Instruct."""
        folder = find_adapter(path)
        read_config(folder)
        check_base(folder, base.input.fingerprint)
        known = [
            base.name,
            str(base.input.path),
            str(base.input.path.resolve()),
            *filter(None, [base.config.hub]),
        ]
        said = other_base(folder, known) if made_for(folder) is None else None
        if said is not None:
            self.warn(
                f"{folder} says that it was trained on {said}, and is used on {base.config.hub or base.input.path}. "
                "A base and its Instruct model have equal shapes, so nothing else shows it."
            )
        return Adapter(self.store.file(folder))

    def warn(self, text: str) -> None:
        """Said at once, and again at the head of the run's results."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.console.say(f"Warning: {text}")

    @property
    def eval_split(self) -> str:
        return self.config.evaluate.split or self.config.dataset.eval_split

    @property
    def val_split(self) -> str:
        """
        Raises:
            ConfigError: where the data set names none.
        """
        split = self.config.dataset.val_split
        if split is None:
            name = self.config.dataset.name
            raise ConfigError(
                f"train.val_every: {name} has no split for validation that is neither trained on nor tested. Set one aside: "
                "'dataset.train_split=\"train[:95%]\"' 'dataset.val_split=\"train[95%:]\"'."
            )
        return split

    @property
    def fewshot_split(self) -> str:
        return self.config.evaluate.fewshot_split or self.config.dataset.train_split

    # ---- stages ----------------------------------------------------------------------------------------

    def evaluate(
        self, name: str, base: Base, adapter: Adapter | None = None, draw_of: str | None = None
    ) -> System:
        """One base on the evaluation split, with an adapter or without; `draw_of` names what several draws have in common."""
        how = self.config.evaluate
        if how.sample_ratio == 1 and how.limit is None and not how.num_fewshot:
            how = replace(how, seed=0)  # nothing is drawn
        config = evaluation.EvaluateStage(
            self.config.dataset,
            self.eval_split,
            how,
            self.runtime,
            self.fewshot_split,
            base.config.trust_remote_code,
            self.engines,
        )
        inputs = {"model": base.input, "data": self.data(self.eval_split)}
        if how.mode == "classify" and adapter is None:
            config.train_split = self.config.dataset.train_split
            inputs["train"] = self.data(self.config.dataset.train_split)
        if how.num_fewshot:
            inputs["shots"] = self.data(self.fewshot_split)
        if adapter is not None:
            check_base(adapter.path, base.input.fingerprint)
            inputs["adapter"] = adapter.input
        done = self._run(evaluation.STAGE, config, inputs, name)
        r = done.result
        accuracy = (
            "" if r["accuracy"] is None else f"accuracy {r['accuracy']:.3f} ± {r['stderr']:.3f}, "
        )
        unparsed = f", {r['unparsed']} answers could not be parsed" if r.get("unparsed") else ""
        self._tell(done, f"{name}: {accuracy}loss {r['loss']:.3f}, n = {r['n']}{unparsed}")
        coverage = (
            next((a.result["coverage"] for a in adapter.made if "coverage" in a.result), None)
            if adapter
            else None
        )
        return System(
            name, base.name, done, list(adapter.made) if adapter else [], coverage, draw_of
        )

    def train(self, base: Base) -> Adapter:
        """A base's own adapter on the training split."""
        c = self.config
        rows = self._encode(base, c.dataset.train_split)
        inputs = {"model": base.input, "rows": rows.as_input()}
        if self.runtime.deepspeed is not None:
            inputs["deepspeed"] = self.store.file(Path(self.runtime.deepspeed))
        if c.train.val_every is not None:
            inputs["val_rows"] = self._encode(
                base, self.val_split, c.train.val_limit, rows.result["classes"]
            ).as_input()
        classify, classes = c.evaluate.mode == "classify", rows.result["classes"]
        config = training.TrainStage(
            replace(c.adapter, path=None),
            c.train,
            self.runtime,
            self.runtime.devices,
            classify,
            tuple(classes) if classes else None,
            base.config.hub or str(base.input.path),
            c.dataset.name,
            base.config.trust_remote_code,
        )
        done = self._run(training.STAGE, config, inputs, f"train {base.name}")
        r = done.result
        best = (
            f"; validated: {r['val_start']:.3f} at the start, {r['val_best']:.3f} at step {r['best_step']}"
            if "val_best" in r
            else ""
        )
        how = "packed" if r["packed"] else "padded"
        if r["skipped"]:
            best += f"; {r['skipped']} steps left out, their float16 gradients overflowed"
        self._tell(
            done,
            f"{r['steps']} steps, loss {r['train_loss']:.3f} at the end{best}; {r['tokens_per_second']:.0f} tokens a second, {how}",
        )
        return Adapter(done.as_input(), (rows, done))

    def prefer(self, base: Base) -> Adapter:
        """A base's adapter by direct preference optimisation on the training split."""
        c = self.config
        config = preferring.PreferStage(
            c.dataset,
            c.dataset.train_split,
            replace(c.adapter, path=None),
            c.train,
            c.prefer,
            self.runtime,
            base.config.hub or str(base.input.path),
            base.config.trust_remote_code,
        )
        inputs = {"model": base.input, "data": self.data(c.dataset.train_split)}
        done = self._run(preferring.STAGE, config, inputs, f"prefer {base.name}")
        r = done.result
        self._tell(
            done,
            f"{r['steps']} steps, loss {r['train_loss']:.3f}, the chosen answer preferred in {r['accuracy']:.0%} at the end",
        )
        return Adapter(done.as_input(), (done,))

    def merge(self, base: Base, adapter: Adapter) -> Artifact:
        """An adapter into its base."""
        config = merging.MergeStage(
            self.config.merge, self.runtime.device, base.config.trust_remote_code
        )
        done = self._run(
            merging.STAGE,
            config,
            {"model": base.input, "adapter": adapter.input},
            f"merge into {base.name}",
        )
        r = done.result
        drift = (
            f"; {r['dequantised']:.2g} from the quantised base it was trained on"
            if "dequantised" in r
            else ""
        )
        self._tell(
            done,
            f"{r['gib']} GiB in {r['shards']} files, {r['precision']}; logits (to {r['largest_logit']:.0f}) differ by "
            f"{r['merged']:.1g} merged and {r['rounded']:.1g} rounded{drift}",
        )
        return done

    def compress(self, base: Base) -> Artifact:
        """A base with its linear layers quantised."""
        config = compressing.CompressStage(
            self.config.compress, self.runtime, base.config.trust_remote_code
        )
        done = self._run(compressing.STAGE, config, {"model": base.input}, f"compress {base.name}")
        self._tell(done, f"{done.result['gib_before']} GiB to {done.result['gib']} GiB")
        return done

    def _encode(
        self, base: Base, split: str, limit: int | None = None, classes: list[str] | None = None
    ) -> Artifact:
        """A split as tokens of a base."""
        c, dataset = self.config, self.config.dataset
        form = c.evaluate.form(dataset.kind)
        virtual = getattr(c.adapter, "virtual_tokens", 0)  # they take places of their own
        longest = min(c.train.max_length, (room(base.input.path) or 10**9) - virtual)
        config = tokens.EncodeStage(
            dataset,
            split,
            form,
            form == "classify" and is_encoder(base.input.path),
            dataset.kind in ("text", "chat"),
            longest,
            limit,
            base.config.trust_remote_code,
        )
        inputs = {"data": self.data(split), "tokenizer": self.store.tokenizer(base.input.path)}
        done = self._run(tokens.STAGE, config, inputs, f"encode {split} for {base.name}")
        self._tell_once(
            done, f"{split}: {done.result['rows']} examples, {done.result['tokens']} tokens"
        )
        if classes is not None and done.result["classes"] != classes:
            raise DataError(
                f"{dataset.name}: split {split} has the classes {done.result['classes']}, the training split {classes}."
            )
        return done

    def check_mode(self, *bases: Base) -> None:
        """
        Raises:
            ConfigError: where a model cannot be used as evaluate.mode says.
        """
        for base in bases:
            check_mode(self.config, base.input.path)

    def methods(self) -> list[TransferConfig]:
        """The configured method first, then what stands beside it; of a placebo that is drawn by chance, every draw."""
        chosen = self.config.transfer
        out = [chosen]
        for name in dict.fromkeys(n for n in chosen.controls if n != chosen.method):
            draws = chosen.draws if name in DRAWN else 1
            out += [transfer_named(name, chosen, self.config.seed + 1000 * i) for i in range(draws)]
        for c in out:
            real = self._real(c)
            if c.method == "shuffled" and real.evidence not in ("text", "models"):
                raise ConfigError(
                    f"transfer=shuffled: {real.method} looks at no text, so there is no pairing to shuffle. Use random."
                )
        return out

    def _real(self, c: TransferConfig) -> TransferConfig:
        """Of a placebo the method that it spoils; else the method itself."""
        return (
            transfer_named(c.reference, self.config.transfer) if isinstance(c, PlaceboConfig) else c
        )

    def check_transfer(self, adapter: Adapter, source: Base, target: Base) -> None:
        """What an adapter from elsewhere may have wrong is said before anything is computed."""
        inputs = {"adapter": adapter.input, "source": source.input, "target": target.input}
        depths = [len(transferring.layers_of(base.input.path)) for base in (source, target)]
        transferring.plan(
            inputs, spread(proportional(*depths), *depths), self.config.transfer.modules
        )

    def _match(self, c: TransferConfig, source: Base, target: Base) -> Artifact | None:
        """The similarity of all layers to all: by weights if asked for, else wherever a text is run."""
        by_weights = c.layers == "similarity"
        if not by_weights and not _needs_text(c) and c.layers != "cka":
            return None
        text = (
            None if by_weights else replace(self._calibrate(c, source, target, []), positions=HELD)
        )
        config = matching.MatchStage(text, c.basis or BASIS, self.runtime.device, self._bases)
        inputs = {
            "source": source.input,
            "target": target.input,
            **({} if by_weights else self._calibration(c)),
        }
        done = self._run(
            matching.STAGE, config, inputs, f"compare the layers of {source.name} and {target.name}"
        )
        matrix = done.result["similarity"]
        self._tell_once(
            done, f"layers: {len(matrix)} × {len(matrix[0])} compared by {done.result['by']}"
        )
        return done

    def transfer(self, adapter: Adapter, source: Base, target: Base, c: TransferConfig) -> Adapter:
        """The source's adapter on the target by one method; by a placebo, what that leaves of the method it spoils."""
        check_base(adapter.path, source.input.fingerprint)
        if not isinstance(c, PlaceboConfig):
            return self._transfer(adapter, source, target, c)
        if c.method == "shuffled":
            return self._transfer(adapter, source, target, self._real(c), shuffle=c.seed)
        moved = self._transfer(adapter, source, target, self._real(c))
        done = self._run(
            spoiling.STAGE,
            spoiling.SpoilStage(c.method, c.seed),
            {"adapter": moved.input},
            f"spoil by {c.method}",
        )
        self._tell(done, f"{c.method} of {c.reference}: {done.result['target_modules']} modules")
        return Adapter(done.as_input(), (*moved.made, done))

    def _transfer(
        self,
        adapter: Adapter,
        source: Base,
        target: Base,
        c: TransferConfig,
        shuffle: int | None = None,
    ) -> Adapter:
        known = (adapter.input.fingerprint, repr(c), shuffle)
        if known in self._moved:
            return self._moved[known]
        inputs = {"adapter": adapter.input, "source": source.input, "target": target.input}
        text, matched = None, self._match(c, source, target)
        if matched is not None:
            inputs["match"] = matched.as_input()
        layers = self._layers(c, source, target, matched)
        if _needs_text(c):
            text = replace(self._calibrate(c, source, target, layers), shuffle=shuffle)
            if c.evidence == "models" or not self._moments_fit(c, source, target, layers):
                inputs |= self._calibration(c)
            else:
                inputs["moments"] = self._moments(c, source, target, text)
                text = None
        trust = (source.config.trust_remote_code, target.config.trust_remote_code)
        name = target.config.hub or str(target.input.path)
        config = transferring.TransferStage(c, layers, text, self.runtime, name, self._bases, trust)
        done = self._run(transferring.STAGE, config, inputs, f"transfer by {c.method}")
        r = done.result
        similarity = (
            ""
            if r["similarity"] is None
            else f"; similarity {r['similarity']:.3f} (chance {r['chance']:.3f})"
        )
        fit = (
            ""
            if r["r2_in"] is None
            else f"; maps explain {r['r2_in']:.2f} in, {r['r2_out']:.2f} out"
        )
        paired = "" if shuffle is None else ", fitted on positions paired at random"
        said = f"{c.method}{paired}: {r['target_modules']} modules, {r['coverage']:.0%} of the adapter{similarity}{fit}"
        if c.similarity == "weights" and r["left"]:
            said += "; modules left by threshold: " + ", ".join(
                f"{n} at {t}" for t, n in r["left"].items()
            )
        self._tell(done, said)
        self._moved[known] = Adapter(done.as_input(), (*adapter.made, done))
        return self._moved[known]

    @staticmethod
    def feasibility(moved: Adapter) -> str:
        """What a transfer says of its own chances."""
        r = next(a.result for a in moved.made if "feasibility" in a.result)
        return f"Feasibility: {r['feasibility']}. {r['why']}"

    @property
    def _bases(self) -> str:
        return str(self.store.root / "bases")

    def _layers(
        self, c: TransferConfig, source: Base, target: Base, matched: Artifact | None
    ) -> list[tuple[int, int]]:
        """Matched layers (source, target)."""
        depths = [len(transferring.layers_of(base.input.path)) for base in (source, target)]
        if c.layers in ("proportional", "index"):
            layers = (proportional if c.layers == "proportional" else by_index)(*depths)
        else:
            assert matched is not None
            layers = aligned(matched.result["similarity"])
        return list(spread(layers, *depths) if c.spread else layers)

    def _calibrate(
        self, c: TransferConfig, source: Base, target: Base, layers: list[tuple[int, int]]
    ) -> calibrating.CalibrateStage:
        """The text that both models see: a file, or the questions of the train split."""
        rows = "data" in self._calibration(c)
        return calibrating.CalibrateStage(
            self.runtime,
            layers,
            c.positions,
            None,
            self.config.dataset if rows else None,
            self.config.dataset.train_split if rows else None,
            c.batch_size,
            (source.config.trust_remote_code, target.config.trust_remote_code),
        )

    def _moments_fit(
        self, c: TransferConfig, source: Base, target: Base, layers: list[tuple[int, int]]
    ) -> bool:
        shapes = [linear_shapes(base.input.path) for base in (source, target)]
        pairs = all_pairs(by_layer(shapes[0]), by_layer(shapes[1]), layers)
        return moments_bytes(pairs, shapes[0], shapes[1]) <= c.memory_gb * 2**30

    def _moments(
        self, c: TransferConfig, source: Base, target: Base, text: calibrating.CalibrateStage
    ) -> Input:
        """What both models do on the calibration text."""
        inputs = {"source": source.input, "target": target.input, **self._calibration(c)}
        done = self._run(
            calibrating.STAGE, text, inputs, f"calibrate {source.name} and {target.name}"
        )
        r, paired = done.result, "" if text.shuffle is None else ", paired at random"
        self._tell_once(
            done,
            f"calibrate: {r['positions']} positions of {r['texts']} texts{paired}, {r['mib']} MiB",
        )
        return done.as_input()

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

    def _tell_once(self, done: Artifact, text: str) -> None:
        if done.key not in self._told:
            self._told.add(done.key)
            self._tell(done, text)

    def _tell(self, done: Artifact, text: str) -> None:
        self.console.close()
        log.info(
            "      %-9s %s  (%.1f s%s)",
            "reused" if done.reused else "computed",
            text,
            done.cost["seconds"] or 0,
            " when it ran" if done.reused else "",
        )


def check_mode(config: PawConfig, folder: Path) -> None:
    mode = config.evaluate.mode
    if is_encoder(folder) and mode != "classify":
        raise ConfigError(
            f"evaluate.mode={mode}: {folder.name} is an encoder and cannot generate text. Set evaluate.mode=classify."
        )


def check_adapter(config: PawConfig, folder: Path) -> str:
    """What will be trained of a model, in words.

    Raises:
        PawError: for modules that the model has not, packages that are missing, an encoder that should write.
    """
    c = config.adapter
    if c.quantise != "none":
        need("bitsandbytes", "quantise", f"adapter.quantise={c.quantise}")
    check_mode(config, folder)
    wanted = [name for name in getattr(c, "target_modules", None) or [] if name != "all-linear"]
    names = [name for name in linear_shapes(folder) if "embed" not in name]
    for name in wanted:
        if not any(module == name or module.endswith(f".{name}") for module in names):
            raise AdapterError(
                f"adapter.target_modules: {folder.name} has no module {name!r}."
                + nearest(name, {module.rsplit(".", 1)[-1] for module in names})
            )
    return f"{c.method} on {', '.join(wanted) or 'its own choice of modules'}"


def check_training(config: PawConfig, runtime: Runtime) -> None:
    """What can be known of a training before its model loads."""
    t = config.train
    if t.resume not in ("auto", "never") and not (Path(t.resume).expanduser() / BEGUN).is_file():
        raise ConfigError(
            f"train.resume: {t.resume} holds no unfinished training. Leave it out: paw finds interrupted runs."
        )
    if t.optimizer != "adamw":
        need("bitsandbytes", "quantise", f"train.optimizer={t.optimizer}")
    if t.liger:
        need("liger_kernel", "liger", "train.liger")
        if runtime.device != "cuda":
            raise ConfigError("train.liger: its kernels run on CUDA only. Set train.liger=false.")
    if runtime.strategy == "deepspeed":
        if runtime.deepspeed is not None:
            _check_json("hardware.deepspeed", Path(runtime.deepspeed))
        need("deepspeed", "deepspeed", "hardware.strategy=deepspeed")
    if runtime.strategy == "deepspeed" and runtime.device != "cuda":
        raise ConfigError(
            "hardware.strategy=deepspeed: needs GPUs, and there are none. Choose ddp or fsdp."
        )
    if runtime.strategy == "fsdp" and (
        config.adapter.method not in ("lora", "ia3") or config.adapter.quantise != "none"
    ):
        raise ConfigError(
            "hardware.strategy=fsdp: shards what adapter=lora and ia3 train on an unquantised base only. Choose ddp."
        )


def _check_json(key: str, file: Path) -> None:
    try:
        if not isinstance(json.loads(file.read_text()), dict):
            raise ConfigError(f"{key}: {file} holds no object with keys.")
    except OSError as e:
        raise ConfigError(
            f"{key}: {file} cannot be read ({e.strerror}). Give a JSON file."
        ) from None
    except ValueError as e:
        raise ConfigError(f"{key}: {file} is not JSON ({e}).") from None


def numbered(names: Sequence[str]) -> list[str]:
    """Names that occur several times get their draw's number."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(f"{name} {seen[name]}" if names.count(name) > 1 else name)
    return out


def _needs_text(c: TransferConfig) -> bool:
    return c.evidence in ("text", "models") or c.gain == "activation"
