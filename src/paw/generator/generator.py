"""Stage `generator`: a network that makes adapters of prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.errors import DataError
from paw.generator.config import FitConfig, NetworkConfig
from paw.generator.groups import TRAIN, VAL
from paw.generator.layout import LAYOUT, Layout
from paw.generator.pairings import Pair, pairing_named
from paw.generator.texts import Prompts
from paw.generator.tokens import Checkpoints
from paw.models.adapters import CONFIG
from paw.models.load import Runtime
from paw.store import Context, Input, Stage, write_text

if TYPE_CHECKING:
    import torch

ABOUT, SCALE, LAST, CURVE = "generator.json", "scale.safetensors", "last.safetensors", "curve.jsonl"


@dataclass(kw_only=True)
class GeneratorStage:
    pairing: str
    ratio: float
    network: NetworkConfig
    fit: FitConfig
    runtime: Runtime
    seed: int = 0  # of what is held out
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class GeneratorResult:
    parameters: int
    pairs: int  # to learn from
    held: int  # to validate
    checkpoints: int  # to learn from
    steps: int
    best_epoch: int
    val_start: float  # loss of the mean checkpoint, where it is residual
    val_best: float
    skill: float  # 1 − mse/mse of the mean checkpoint, on the pairs to validate
    steps_per_second: float

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {self.pairs} pairs of {self.checkpoints} "
            f"adapters, {self.steps} steps; validated: loss {self.val_start:.3f} at the start, "
            f"{self.val_best:.3f} after epoch {self.best_epoch}, skill {self.skill:+.3f}"
        )


STAGE = Stage(
    "generator",
    "1",
    "paw.generator.generator:generator",
    config=GeneratorStage,
    result=GeneratorResult,
    resumes=True,
    devices="one",
)


def generator(
    config: GeneratorStage, inputs: Mapping[str, Input], out: Path, context: Context
) -> GeneratorResult:
    """Trains a network on pairs of prompts and adapters.

    Args:
        inputs: `texts` and `tokens`, finished stages; `model`, the base that the adapters are for.

    Writes the best weights by validation (`epoch=…-val_loss=….safetensors`), the last ones, the
    mean and the spread of the training adapters, and all that a generated adapter is made with.

    Raises:
        DataError: where no prompt has an adapter to learn from, or none is left to validate.
        StageError: where the loss is not finite.
    """
    from safetensors.torch import save_file

    from paw.generator.fit import Plan, Scale, fit
    from paw.generator.network import Network, parameters

    prompts, checkpoints = Prompts(inputs["texts"].path), Checkpoints(inputs["tokens"].path)
    pairs = pairs_of(config, prompts, checkpoints)
    learnt = sorted({p.checkpoint for p in pairs if p.role == TRAIN})
    scale = Scale.of(checkpoints, learnt)
    size = parameters(Network(checkpoints.layout, config.network, prompts.width))
    plan = Plan(
        prompts=prompts,
        checkpoints=checkpoints,
        pairs=pairs,
        network=config.network,
        fit=config.fit,
        runtime=config.runtime,
        scale=scale,
        folder=context.unfinished,
    )
    fitted = fit(plan, context)
    first, best = fitted.curve[0], fitted.curve[fitted.best_epoch]
    name = f"epoch={fitted.best_epoch:03d}-val_loss={best['loss']:.4f}.safetensors"
    save_file(dict(fitted.best), out / name)
    save_file(dict(fitted.last), out / LAST)
    spread = _spread(checkpoints, learnt)
    save_file({"mean": scale.mean, "spread": scale.spread, "deviation": spread}, out / SCALE)
    for file in (LAYOUT, CONFIG):
        shutil.copyfile(inputs["tokens"].path / file, out / file)
    about = {
        "base": inputs["model"].fingerprint,
        "network": asdict(config.network),
        "encoder": prompts.encoder,
        "width": prompts.width,
        "best": name,
        "pairs": [[p.group, p.checkpoint, p.role] for p in pairs],
    }
    write_text(out / ABOUT, json.dumps(about))
    write_text(out / CURVE, "".join(json.dumps(line) + "\n" for line in fitted.curve))
    return GeneratorResult(
        parameters=size,
        pairs=sum(p.role == TRAIN for p in pairs),
        held=sum(p.role == VAL for p in pairs),
        checkpoints=len(learnt),
        steps=fitted.steps,
        best_epoch=fitted.best_epoch,
        val_start=first["loss"],
        val_best=best["loss"],
        skill=1 - best["mse"] / _mean_mse(checkpoints, scale, pairs),
        steps_per_second=fitted.steps_per_second,
    )


def pairs_of(config: GeneratorStage, prompts: Prompts, checkpoints: Checkpoints) -> list[Pair]:
    """
    Raises:
        DataError: where there is nothing to learn from, or nothing to validate.
    """
    pairing = pairing_named(config.pairing)
    found = pairing.pairs(prompts.groups, checkpoints.all, config.ratio, config.seed)
    for role, what in ((TRAIN, "learn from"), (VAL, "validate")):
        if not any(p.role == role for p in found):
            raise DataError(
                f"generator.pairing={config.pairing}: no prompt has an adapter to {what}, among "
                f"{len(prompts.groups)} prompts and {len(checkpoints)} adapters. Give more of "
                "both, or choose another pairing: cross pairs anything."
            )
    return found


def _spread(checkpoints: Checkpoints, numbers: list[int]) -> torch.Tensor:
    return checkpoints.mean_and_spread(numbers)[1]


def _mean_mse(checkpoints: Checkpoints, scale: Any, pairs: list[Pair]) -> float:
    """Of the mean checkpoint, in the losses' units, on the pairs to validate."""
    total, held = 0.0, [p for p in pairs if p.role == VAL]
    for pair in held:
        off = (checkpoints[pair.checkpoint] - scale.mean) / scale.spread * scale.weight
        total += float(off.square().sum() / scale.weight.sum())
    return max(total / len(held), 1e-12)


class Generator:
    """What `generator` wrote."""

    def __init__(self, folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        from paw.generator.fit import Scale
        from paw.generator.network import Network

        self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        self.layout = Layout.read(folder)
        self.adapter: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        self.config = NetworkConfig(**self.about["network"])
        self.network = Network(self.layout, self.config, self.about["width"]).eval()
        self.network.load_state_dict(load_file(folder / self.about["best"]))
        held = load_file(folder / SCALE)
        self.deviation = held["deviation"]
        weight = torch.from_numpy(self.layout.places).float()
        self.scale = Scale(mean=held["mean"], spread=held["spread"], weight=weight)
        self.pairs = [Pair(*p) for p in self.about["pairs"]]

    def tokens(self, vectors: Any) -> torch.Tensor:
        """The adapter of a prompt (tokens × dim).

        Args:
            vectors: of its examples (examples × width).
        """
        import torch

        from paw.generator.fit import values
        from paw.generator.network import padded

        with torch.inference_mode():
            return values(self.network(*padded([vectors])), self.scale, self.config)[0]
