"""The network's training: from pairs of prompts and adapters to weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from paw.errors import StageError
from paw.generator.config import FitConfig, NetworkConfig
from paw.generator.groups import TRAIN, VAL
from paw.generator.layout import Layout, sides
from paw.generator.network import Network, padded
from paw.generator.pairings import Pair
from paw.generator.texts import Prompts
from paw.generator.tokens import Checkpoints
from paw.models.load import Runtime
from paw.store import Preempted, Watch, replacing, stop
from paw.training.batches import order, per_epoch
from paw.training.optimizer import scheduled

LAST = "last.ckpt"
PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
FLOOR = 1e-12
APART = 100003  # between seeds, so that no epoch of one has the order of another's


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What tokens are measured by."""

    mean: torch.Tensor  # of the training checkpoints (tokens × dim)
    spread: torch.Tensor  # around it, a figure for each tensor (tokens × 1)
    weight: torch.Tensor  # 1 where a token's place holds a value, else 0 (tokens × dim)

    def to(self, device: Any) -> Scale:
        return Scale(
            mean=self.mean.to(device),
            spread=self.spread.to(device),
            weight=self.weight.to(device),
        )

    @classmethod
    def of(cls, checkpoints: Checkpoints, numbers: Sequence[int]) -> Scale:
        """
        Args:
            numbers: of the training checkpoints.
        """
        mean, spread = checkpoints.mean_and_spread(numbers)
        weight = torch.from_numpy(checkpoints.layout.places).float()
        squares, counts = (spread**2 * weight).sum(1), weight.sum(1)
        out, at = torch.zeros(len(mean), 1), 0
        for row in checkpoints.layout.rows:
            mine = slice(at, at + row.tokens)
            out[mine] = (squares[mine].sum() / counts[mine].sum().clamp_min(1)).sqrt()
            at += row.tokens
        return cls(mean=mean, spread=out.clamp_min(FLOOR), weight=weight)


@dataclass(frozen=True, kw_only=True)
class Plan:
    prompts: Prompts
    checkpoints: Checkpoints
    pairs: Sequence[Pair]
    network: NetworkConfig
    fit: FitConfig
    runtime: Runtime
    scale: Scale
    folder: Path  # where an interrupted training goes on from


@dataclass(frozen=True, kw_only=True)
class Fitted:
    best: Mapping[str, torch.Tensor]
    last: Mapping[str, torch.Tensor]
    best_epoch: int
    steps: int
    curve: list[dict[str, float]]  # of the validation after every epoch, 0 first
    steps_per_second: float


def values(raw: torch.Tensor, scale: Scale, config: NetworkConfig) -> torch.Tensor:
    """What the network says as values of an adapter (… × tokens × dim)."""
    raw = raw.float()
    return scale.mean + scale.spread * raw if config.residual else raw


class Losses:
    """Between generated and true tokens; places without a value count nothing. All but `delta` are
    in units of the checkpoints' spread, squared for mse."""

    def __init__(self, layout: Layout, scale: Scale, config: FitConfig) -> None:
        self.scale, self.config = scale, config
        self.count = float(scale.weight.sum())
        self.spans, at = list[tuple[int, int, int]](), 0
        for row in layout.rows:
            self.spans.append((at, at + row.tokens, row.values))
            at += row.tokens
        shapes = [e.shape for e in layout.entries]
        pairs = sides(layout.entries).values() if layout.count is None else ()
        self.factors = [
            (p["lora_A"], p["lora_B"], shapes[p["lora_A"]], shapes[p["lora_B"]]) for p in pairs
        ]
        if config.delta and not self.factors:
            raise StageError("generator.fit.delta: these adapters are no pairs of factors.")

    def __call__(self, made: torch.Tensor, true: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            made, true: values (batch × tokens × dim), float32.
        """
        error = (made - true) / self.scale.spread * self.scale.weight
        n = self.count * len(made)
        found = {"mse": error.square().sum() / n, "l1": error.abs().sum() / n}
        total = self.config.mse * found["mse"] + self.config.l1 * found["l1"]
        if self.config.delta:
            found["delta"] = self.delta(made, true)
            total = total + self.config.delta * found["delta"]
        return found | {"loss": total}

    def delta(self, made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        """‖B'A' − BA‖²/‖BA‖² over all modules, from r×r products: ΔW is never built."""
        off = torch.zeros(len(made), device=made.device)
        norm = torch.zeros_like(off)
        for a, b, shape_a, shape_b in self.factors:
            (a1, b1), (a0, b0) = (
                (self._factor(x, a, shape_a), self._factor(x, b, shape_b)) for x in (made, true)
            )
            cross = _inner(b1, a1, b0, a0)
            own = _inner(b0, a0, b0, a0)
            off = off + _inner(b1, a1, b1, a1) - 2 * cross + own
            norm = norm + own
        return (off / norm.clamp_min(FLOOR)).mean()

    def _factor(self, x: torch.Tensor, row: int, shape: tuple[int, ...]) -> torch.Tensor:
        low, high, size = self.spans[row]
        return x[:, low:high].reshape(len(x), -1)[:, :size].view(len(x), *shape)


def _inner(b1: torch.Tensor, a1: torch.Tensor, b0: torch.Tensor, a0: torch.Tensor) -> torch.Tensor:
    """⟨B₁A₁, B₀A₀⟩ = Σ (B₁ᵀB₀)∘(A₁A₀ᵀ), of each of a batch."""
    return ((b1.transpose(1, 2) @ b0) * (a1 @ a0.transpose(1, 2))).sum((1, 2))


def fit(plan: Plan, watch: Watch) -> Fitted:
    """Trains on the pairs to learn from, and keeps what is best on those to validate.

    Which pairs a step sees and what its dropout draws follow from the seed and the step's number,
    so that a stopped training goes on exactly.

    Raises:
        StageError: where the loss is not finite.
        Preempted: where it was asked to end; an epoch that was begun is begun again.
    """
    with stop.patiently(), torch.random.fork_rng(devices=[]):
        return _Training(plan, watch).run()


class _Training:
    def __init__(self, plan: Plan, watch: Watch) -> None:
        self.plan, self.watch, c = plan, watch, plan.fit
        device = "cuda" if plan.runtime.device == "cuda" else "cpu"
        # weights are float32 in any case; a CPU's autocast knows bfloat16 only
        half = plan.runtime.precision != "float16" or device == "cuda"
        precision: Any = PRECISION[plan.runtime.precision] if half else PRECISION["float32"]
        self.fabric = Fabric(accelerator=device, devices=1, precision=precision)
        torch.manual_seed(c.seed)
        network = Network(plan.checkpoints.layout, plan.network, plan.prompts.width)
        self.average = None
        if network.whitening is not None:
            learnt = sorted({p.group for p in plan.pairs if p.role == TRAIN})
            pooled = torch.stack([torch.from_numpy(plan.prompts[g].mean(0)) for g in learnt])
            assert plan.network.whiten is not None
            network.whitening.fit(pooled, plan.network.whiten)
        optimizer = torch.optim.AdamW(network.parameters(), lr=c.lr, weight_decay=c.weight_decay)
        self.network, self.optimizer = self.fabric.setup(network, optimizer)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if c.ema:
            averaged = get_ema_multi_avg_fn(c.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(network, multi_avg_fn=averaged)
        self.raw = network
        self.scale = plan.scale.to(self.fabric.device)
        self.losses = Losses(plan.checkpoints.layout, self.scale, c)
        self.train = [p for p in plan.pairs if p.role == TRAIN]
        self.val = [p for p in plan.pairs if p.role == VAL]
        self.size = min(c.batch_size, len(self.train))
        self.per_epoch = per_epoch(len(self.train), self.size)
        self.truth = {
            j: plan.checkpoints[j] for j in {p.checkpoint for p in (*self.train, *self.val)}
        }
        self.epoch, self.best_epoch = 0, 0
        self.best: dict[str, torch.Tensor] = {}
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0

    def run(self) -> Fitted:
        import time

        self._resume()
        if not self.curve:
            self._validate()
        while self.epoch < self.plan.fit.epochs:
            began = time.perf_counter()
            for step, chosen in enumerate(self._order()):
                self._step(self.epoch * self.per_epoch + step, chosen)
                if stop.asked():
                    raise Preempted
            self.seconds += time.perf_counter() - began
            self.epoch += 1
            self._validate()
            self._save()
        steps = self.epoch * self.per_epoch
        return Fitted(
            best=self.best,
            last=_held(self._shown()),
            best_epoch=self.best_epoch,
            steps=steps,
            curve=self.curve,
            steps_per_second=steps / max(self.seconds, 1e-9),
        )

    def _order(self) -> list[list[Pair]]:
        """An epoch's batches."""
        shuffled = order(len(self.train), self.plan.fit.seed * APART, self.epoch)
        return [
            [self.train[i] for i in shuffled[at * self.size : (at + 1) * self.size]]
            for at in range(self.per_epoch)
        ]

    def _step(self, number: int, chosen: Sequence[Pair]) -> None:
        c, total = self.plan.fit, self.plan.fit.epochs * self.per_epoch
        rate = c.lr * scheduled("cosine", c.warmup_ratio, number, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(hash((c.seed, number)) & 0x7FFFFFFF)  # what dropout draws
        self.network.train()
        losses = self._losses(self.network, chosen)
        self.fabric.backward(losses["loss"])
        if c.grad_clip:
            self.fabric.clip_gradients(self.network, self.optimizer, max_norm=c.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.raw)
        figures = {key: float(value.detach()) for key, value in losses.items()}
        loss = figures["loss"]
        if not math.isfinite(loss):
            raise StageError(
                f"generator: the loss is not finite at step {number + 1}. Lower generator.fit.lr, "
                "or use hardware.precision=float32."
            )
        self.watch.progress(number + 1, total, f"loss {loss:.3f}")
        told = {f"generator/{k}": v for k, v in figures.items()}
        more = {"generator/lr": rate, "generator/epoch": number / self.per_epoch}
        self.watch.metrics(told | more, number + 1)

    def _losses(self, network: Any, chosen: Sequence[Pair]) -> dict[str, torch.Tensor]:
        made, true = self._made(network, chosen)
        return self.losses(made, true)

    def _made(self, network: Any, chosen: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.fabric.device
        vectors, there = padded([self.plan.prompts[p.group] for p in chosen])
        true = torch.stack([self.truth[p.checkpoint] for p in chosen]).to(device)
        raw = network(vectors.to(device), there.to(device))
        return values(raw, self.scale, self.plan.network), true

    def _shown(self) -> Any:
        """What is kept: the average of the weights over the steps, where there is one."""
        return self.raw if self.average is None else self.average.module

    def _validate(self) -> None:
        """Every pair once; the network is kept where it is the best until now."""
        network = self._shown().eval()
        sums = dict.fromkeys(("loss", "mse", "l1", "mae", "square", "norm"), 0.0)
        with torch.no_grad(), self.fabric.autocast():
            for at in range(0, len(self.val), 16):
                made, true = self._made(network, self.val[at : at + 16])
                weight = self.scale.weight
                off, n = (made - true) * weight, len(made) / len(self.val)
                for key, value in self.losses(made, true).items():
                    sums[key] = sums.get(key, 0.0) + float(value) * n
                sums["mae"] += float(off.abs().sum() / weight.sum()) / len(self.val)
                sums["square"] += float(off.square().sum() / weight.sum()) / len(self.val)
                sums["norm"] += float((true * weight).square().sum() / weight.sum()) / len(self.val)
        square, norm = sums.pop("square"), sums.pop("norm")
        sums |= {"rmse": square**0.5, "relative": (square / max(norm, FLOOR)) ** 0.5}
        self.curve.append({"epoch": float(self.epoch), **sums})
        step = self.epoch * self.per_epoch
        self.watch.metrics({f"generator_val/{k}": v for k, v in sums.items()}, step)
        if sums["loss"] == min(line["loss"] for line in self.curve):
            self.best_epoch, self.best = self.epoch, _held(network)

    # ---- going on --------------------------------------------------------------------------------

    def _save(self) -> None:
        state = {
            "network": self.raw.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "best": self.best,
            "counts": {"epoch": self.epoch, "best_epoch": self.best_epoch},
            "curve": self.curve,
            "seconds": self.seconds,
        }
        with replacing(self.plan.folder / LAST) as beside:
            torch.save(state, beside)

    def _resume(self) -> None:
        file = self.plan.folder / LAST
        if not file.is_file():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.raw.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_epoch = state["counts"]["epoch"], state["counts"]["best_epoch"]
        self.best, self.curve = state["best"], state["curve"]
        self.seconds = state["seconds"]
        self.watch.say(f"goes on after epoch {self.epoch}, where it was stopped")


def _held(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
