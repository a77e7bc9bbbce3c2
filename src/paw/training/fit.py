"""A training from its first step to its last, in one process, or alike in several that see each
other."""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.strategies.deepspeed import DeepSpeedStrategy

from paw.data.encode import Rows
from paw.errors import PawError, StageError
from paw.models.load import Runtime, out_of_memory
from paw.store import Preempted, Watch, stop
from paw.training import files, processes
from paw.training.adapters import AdapterConfig, Method, method_named
from paw.training.batches import Micro, Share, Validation, training_steps
from paw.training.config import TrainConfig
from paw.training.devices import Sharded, launched
from paw.training.flops import device_name, utilisation
from paw.training.history import History
from paw.training.objectives import Objective
from paw.training.optimizer import learning_rate, optimizer_of
from paw.training.prepare import adapted, objective_of
from paw.training.train import TrainResult

RESULT = "result.json"


class OutOfMemory(PawError):
    """The micro-batch does not fit."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a process needs to take its part. Plain values: it is sent to other processes."""

    model: Path
    name: str  # the base's, written into adapter_config.json
    trust_remote_code: bool
    runtime: Runtime  # its devices are those of all nodes
    adapter: AdapterConfig
    train: TrainConfig
    rows: Path
    val_rows: Path | None
    classify: bool
    steps: int
    accumulate: int
    gradient_checkpointing: bool
    folder: Path  # what is kept until all is done; a checkpoint in it is where it goes on from
    start: Path | None = None  # an adapter that it begins with, instead of a fresh one


def fit(plan: Plan, watch: Watch) -> None:
    """Trains to the plan's end. What is left in its folder: `last` and perhaps `best`, each a PEFT
    folder; the curve and the times; and a TrainResult.

    Raises:
        OutOfMemory: where a micro-batch did not fit.
        PawError: for what the user can mend.
        Preempted: where it was asked to end; its checkpoint is of its last step then.
    """
    with stop.patiently():
        if plan.runtime.devices == 1:
            _fit(plan, watch, 0)
        else:
            runtime = plan.runtime
            world, nodes = runtime.devices, runtime.nodes
            processes.run(partial(_fit, plan), world, runtime.device, watch, nodes)


def _fit(plan: Plan, watch: Watch, rank: int) -> None:
    """This process's part."""
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice of the libraries
            torch.manual_seed(plan.train.seed)
            training = Training(plan, watch, rank)
            training.run()
    except (RuntimeError, MemoryError) as e:
        if out_of_memory(e):
            raise OutOfMemory from None
        raise


class Forward(torch.nn.Module):
    """One forward pass to the loss: what the strategies wrap."""

    def __init__(self, model: Any, method: Method, objective: Objective) -> None:
        super().__init__()
        self.model, self._method, self._objective = model, method, objective

    def forward(self, batch: Micro) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss, and what the method adds to it in training."""
        loss = self._objective.total(self.model, batch.rows) * batch.weight
        return loss, self._method.penalty(self.model) if self.training else None


class Training:
    """An adapter, what minimises it, and what has happened until now.

    Which examples a step sees and what its dropout draws follow from its number, so that is all
    that there is to go on from: no random states, no place in the data. That holds after a
    micro-batch was halved, too.
    """

    def __init__(self, plan: Plan, watch: Watch, rank: int) -> None:
        c, runtime = plan.train, plan.runtime
        self.plan, self.watch, self.history = plan, watch, History()
        self.ending = False  # whether any of the processes was asked to
        self.rows, self.share = Rows(plan.rows), Share(rank, runtime.devices, plan.accumulate)
        local = rank % (runtime.devices // runtime.nodes)
        device = f"cuda:{local}" if runtime.device == "cuda" else runtime.device
        self.model = adapted(plan, self.rows, device)
        self.method = method_named(plan.adapter.method)
        self.objective = objective_of(plan, self.model, self.rows, device)
        self.validation = None
        if plan.val_rows is not None:
            size = max(1, c.batch_size // plan.accumulate)
            self.validation = Validation.of(Rows(plan.val_rows), self.objective, size, self.share)
        if c.compile:
            # the body: the output projection is hooked to read labelled positions only
            base = self.model.get_base_model()
            getattr(base, base.base_model_prefix, base).compile(dynamic=True)
        self.names = {f"model.{name}" for name in files.adapter_names(self.model)}
        self.fabric = launched(runtime, self.model, plan.accumulate, c.grad_clip)
        self.deepspeed = isinstance(self.fabric.strategy, DeepSpeedStrategy)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # A fused optimizer takes float16's scale off its gradients itself: after they were clipped.
        optimizer = optimizer_of(c, parameters, fused=self.scaler is None)
        forward = Forward(self.model, self.method, self.objective)
        self.module, self.optimizer = self.fabric.setup(forward, optimizer)

    def run(self) -> None:
        """All steps that are left, then what is kept of them."""
        c, steps, history = self.plan.train, self.plan.steps, self._resumed()
        size = min(c.batch_size * self.share.world, len(self.rows))
        batches = training_steps(
            self.rows, self.objective, size, c.seed, self.share, first=history.step
        )
        self.module.train()
        self._check_dropout()
        if self.validation is not None and not history.validations:
            self._validate(self.validation)  # where it starts from is known, too
        for batch in islice(batches, steps - history.step):
            # before the step: it may have been killed at the very validation that ended it
            if history.stale(c.patience):
                break
            self._step(batch)
            if c.keep_every and history.step % c.keep_every == 0:
                self._write_adapter(self.plan.folder / files.TRAIL / f"step_{history.step:07d}")
            if self.validation is not None and c.val_every:
                if history.step % c.val_every == 0:
                    self._validate(self.validation)
                    self._save()
            elif history.step % c.save_every == 0 and history.step < steps:
                self._save()
            if self.ending and history.step < steps:
                self._save()
                raise Preempted
        self._write_adapter(self.plan.folder / files.LAST)
        if self.fabric.is_global_zero:
            history.write(self.plan.folder)
            (self.plan.folder / RESULT).write_text(json.dumps(asdict(self._result())))
        self.fabric.barrier()

    # ---- one step --------------------------------------------------------------------------------

    def _step(self, batch: list[Micro]) -> None:
        """Gradients of all micro-batches, then a step of the optimizer."""
        c, history, began = self.plan.train, self.history, time.perf_counter()
        step, scale = history.step, self._scale()
        rate = learning_rate(c, step, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros((), device=self.fabric.device)
        for i, micro in enumerate(batch):
            # what dropout draws
            torch.manual_seed(hash((c.seed, step, i, self.share.rank)) & 0x7FFFFFFF)
            loss = loss + self._backward(micro, len(batch), last=i + 1 == len(batch))
        if not self.deepspeed:
            if c.grad_clip:
                norm: dict[str, Any] = {"max_norm": c.grad_clip, "error_if_nonfinite": False}
                self.fabric.clip_gradients(self.module, self.optimizer, **norm)
            self.optimizer.step()
        # all processes end after the same step: they learn it with the loss that they share
        ending = torch.full_like(loss, float(stop.asked()))
        mean, ended = self._over_all(torch.stack([loss, ending]), "mean")
        self.ending = ended > 0
        if not math.isfinite(mean):
            raise StageError(
                f"train: the loss is not finite at step {step + 1}. Lower train.lr, or use "
                "hardware.precision=float32."
            )
        self.method.after_step(self.model, step + 1)
        if not self.deepspeed:
            self.optimizer.zero_grad()
        history.skipped += self._scale() < scale  # it falls after an overflow
        history.losses.append(mean)
        history.tokens.append(batch[0].tokens)
        history.seconds.append(time.perf_counter() - began)
        if self.fabric.is_global_zero:
            self.watch.progress(step + 1, self.plan.steps, f"loss {mean:.3f}")
            self.watch.metrics({"train/loss": mean, "train/lr": rate}, step + 1)

    def _backward(self, micro: Micro, parts: int, last: bool) -> torch.Tensor:
        """Adds a micro-batch's part of the step's gradients; they meet those of other processes at
        the last. DeepSpeed divides by the micro-batches, clips and steps by itself: it counts them.

        Returns:
            Its part of the step's loss.
        """
        with self.fabric.no_backward_sync(self.module, enabled=not last):
            loss, penalty = self.module(micro)
            whole = loss if penalty is None else loss + penalty
            self.fabric.backward(whole if self.deepspeed else whole / parts)
        if self.deepspeed:
            self.optimizer.step()
        found: torch.Tensor = loss.detach() / parts
        return found

    def _over_all(self, numbers: torch.Tensor, how: str) -> list[float]:
        """The means or sums of the processes' numbers."""
        reduced = self.fabric.all_reduce(numbers, reduce_op=how)
        assert isinstance(reduced, torch.Tensor)
        return [float(x) for x in reduced.tolist()]

    def _scale(self) -> float:
        """What float16's gradients are multiplied by."""
        return float(self.scaler.get_scale()) if self.scaler else 1.0

    def _check_dropout(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Dropout) and module.p > 0 and not module.training:
                raise StageError(
                    f"train: the dropout of {name} would not act. This is a bug of paw: please "
                    "report it."
                )

    # ---- validation ------------------------------------------------------------------------------

    def _validate(self, data: Validation) -> None:
        """The mean loss over all rows; the adapter is kept where it is the best until now."""
        self.module.eval()
        loss, step = torch.zeros((), device=self.fabric.device), self.history.step
        with torch.no_grad():
            for batch in data.batches:
                loss = loss + self.module(batch)[0]
        [total] = self._over_all(loss[None], "sum")
        mean = total / data.counted
        self.history.validations.append((step, mean))
        if self.fabric.is_global_zero:
            self.watch.metrics({"val/loss": mean}, step)
        if self.history.best[0] == step:
            self._write_adapter(self.plan.folder / files.BEST)
        self.module.train()

    # ---- what is kept ----------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.module,
            "optimizer": self.optimizer,
            "history": vars(self.history),
            "method": self.method.state(self.model),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def _save(self) -> None:
        """A checkpoint of the adapter and all that a next step depends on."""
        target = self.plan.folder / files.CHECKPOINT
        # DeepSpeed leaves out what is frozen by itself
        kept = None if self.deepspeed else {"model": lambda name, _: name in self.names}
        self.fabric.save(files.beside(target), self._state(), filter=kept)
        if self.fabric.is_global_zero:
            files.exchange(target)
        self.fabric.barrier()

    def _resumed(self) -> History:
        """What happened until now, by the checkpoint where there is one."""
        file = self.plan.folder / files.CHECKPOINT
        if file.exists():
            state = self._state()
            self.fabric.load(file, state, strict=False, weights_only=True)  # the base is not in it
            self.history = History(**state["history"])
            if state["method"] is not None:
                self.method.restore(self.model, state["method"])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
        return self.history

    def _write_adapter(self, folder: Path) -> None:
        """A PEFT folder, gathered from all processes and written by the first."""
        strategy = self.fabric.strategy
        state = strategy.get_module_state_dict(self.module)
        if self.fabric.is_global_zero:
            mine = {k.removeprefix("model."): v for k, v in state.items() if k in self.names}
            whole = self.method.saved(self.model, mine)
            files.write_adapter(self.model, whole, folder, isinstance(strategy, Sharded))

    def _result(self) -> TrainResult:
        plan, history = self.plan, self.history
        validated: dict[str, Any] = {}
        if history.validations:
            step, best = history.best
            validated = {"best_step": step, "val_best": best}
            validated["val_start"] = history.validations[0][1]
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return TrainResult(
            steps=history.step,
            examples=len(self.rows),
            train_loss=history.final_loss,
            packed=self.objective.packed,
            accumulate=plan.accumulate,
            gradient_checkpointing=plan.gradient_checkpointing,
            strategy=plan.runtime.strategy,
            devices=self.share.world,
            trainable=trainable,
            tokens=sum(history.tokens),
            tokens_per_second=history.tokens_per_second,
            mfu=self._utilisation(trainable),
            skipped=history.skipped,
            **validated,
        )

    def _utilisation(self, trainable: int) -> float | None:
        """None of shards, too: a process does not have all parameters."""
        name = device_name(self.fabric.device)
        if self.plan.runtime.precision == "float32":  # the peaks are those of 16 bits
            return None
        if name is None or self.deepspeed or isinstance(self.fabric.strategy, Sharded):
            return None
        base = self.model.get_base_model()
        return utilisation(
            parameters=base.num_parameters(exclude_embeddings=True),
            trainable=trainable,
            tokens_per_second=self.history.tokens_per_second,
            device=name,
            devices=self.share.world,
        )
