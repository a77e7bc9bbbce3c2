"""A training in one process, or the same in several that see each other."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.adapters import AdapterConfig
from paw.data.encode import Rows
from paw.errors import ConfigError, PawError, StageError
from paw.models.load import (
    Runtime,
    load_classifier,
    load_model,
    load_tokenizer,
    out_of_memory,
    tells_pairs,
)
from paw.store import Watch, peak_gpu, tell_gpu
from paw.training.adapters import Setting, method_named
from paw.training.batches import Share, Steps, Validation, loader, per_epoch
from paw.training.config import TrainConfig
from paw.training.objectives import Answers, Classes, Objective

if TYPE_CHECKING:
    from paw.training.module import Training

PRECISION: dict[str, Any] = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
SLACK = {
    "float32": 1e-3,
    "bfloat16": 0.25,
    "float16": 0.05,
}  # nats a token: rounding, where contamination is more
FACTS = "facts.json"
TEXT = 8192  # tokens of the training data that a method may start from


class OutOfMemory(Exception):
    """The micro-batch does not fit."""


@dataclass(frozen=True)
class Plan:
    """All that a process needs to take its part. Plain values: it is sent to other processes."""

    model: Path
    name: str | None  # the base's, written into adapter_config.json
    trust_remote_code: bool
    runtime: Runtime
    adapter: AdapterConfig
    train: TrainConfig
    rows: Path
    val_rows: Path | None
    classify: bool
    classes: tuple[str, ...] | None  # None: a value is to be found
    steps: int
    accumulate: int
    gradient_checkpointing: bool
    folder: Path  # what is kept until all is done
    checkpoint: Path | None  # where to go on from, and the step it holds
    done: int


def fit(plan: Plan, watch: Watch) -> None:
    """Trains from the plan's checkpoint to its end. What is left in the plan's folder: `last` and perhaps `best`, each a PEFT
    folder; the curve; and facts about how it was done.

    Raises:
        OutOfMemory: where a micro-batch did not fit.
        PawError: for what the user can mend.
    """
    if plan.runtime.devices == 1:
        _work(plan, 0, watch)
    else:
        _spawn(plan, watch)


def steps_of(train: TrainConfig, rows: int, devices: int) -> int:
    """Optimiser steps of a training."""
    if train.epochs is None:
        return train.max_steps
    return max(1, round(train.epochs * per_epoch(rows, min(train.batch_size * devices, rows))))


# ---- one process ------------------------------------------------------------------------------------


def _work(plan: Plan, rank: int, watch: Watch) -> None:
    import torch

    from paw.training.module import CURVE, LAST, Training

    rows, share = Rows(plan.rows), Share(rank, plan.runtime.devices, plan.accumulate)
    device = f"cuda:{rank}" if plan.runtime.device == "cuda" else plan.runtime.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.train.seed)
        try:
            model = _adapted(plan, rows, device)
            objective = _objective(plan, model, rows, device)
            if plan.train.compile:
                base = (
                    model.get_base_model()
                )  # its body: the output projection is hooked to read labelled positions only
                getattr(base, base.base_model_prefix, base).compile(dynamic=True)
            module = Training(
                model,
                method_named(plan.adapter.method),
                objective,
                plan.train,
                plan.steps,
                share,
                plan.folder,
                watch,
            )
            size = min(plan.train.batch_size * share.world, len(rows))
            train_data = loader(Steps(rows, objective, size, plan.train.seed, share, plan.done))
            val_data = _validation(plan, objective, share, module)
            trainer = _trainer(plan, model)
            _run(trainer, module, train_data, val_data, plan)
        except (RuntimeError, MemoryError) as e:
            if out_of_memory(e):
                raise OutOfMemory from None
            raise
        if len(module.history.losses) < plan.steps and not trainer.should_stop:
            raise StageError(
                f"train: stopped after {len(module.history.losses)} of {plan.steps} steps."
            )
        module.write_adapter(plan.folder / LAST)
        if rank == 0:
            history = module.history
            history.write(plan.folder / CURVE)
            steady = slice(
                1 if history.step > 1 else 0, None
            )  # the first step touches its memory for the first time
            facts = {
                "steps": history.step,
                "packed": objective.packed,
                "accumulate": plan.accumulate,
                "gradient_checkpointing": plan.gradient_checkpointing,
                "strategy": plan.runtime.strategy,
                "devices": share.world,
                "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "tokens": sum(history.tokens),
                "tokens_per_second": round(
                    sum(history.tokens[steady]) / sum(history.seconds[steady]), 1
                ),
                "validations": history.validations,
                "skipped": history.skipped,
            }
            (plan.folder / FACTS).write_text(json.dumps(facts))
        trainer.strategy.barrier()


def _adapted(plan: Plan, rows: Rows, device: str) -> Any:
    """The base with a fresh adapter on it."""
    from peft import get_peft_model

    from paw.training import fused

    quantise = plan.adapter.quantise
    # A quantised base is made where it will stay; another is moved by Lightning. Sharding wants one dtype in a layer.
    precision = "float32" if plan.runtime.strategy == "fsdp" else plan.runtime.precision
    runtime = replace(
        plan.runtime, device=device if quantise != "none" else "cpu", precision=precision
    )
    head: list[str] = []
    if plan.classify:
        base, head = load_classifier(
            plan.model, runtime, plan.classes, plan.trust_remote_code, quantise
        )
    else:
        base = load_model(plan.model, runtime, plan.trust_remote_code, quantise)
    if plan.train.liger:
        _liger(base)
    text = [token for i in range(min(len(rows), 64)) for token in rows[i].ids][:TEXT]
    setting = Setting(
        base, plan.model.name, "SEQ_CLS" if plan.classify else "CAUSAL_LM", plan.steps, head, text
    )
    method = method_named(plan.adapter.method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, method.config(plan.adapter, setting))
    model.peft_config["default"].base_model_name_or_path = plan.name
    method.prepare(model, setting)
    if (
        plan.runtime.precision != "float32"
    ):  # autocast does it, without a float32 copy of every input
        for layer in model.modules():
            if hasattr(layer, "cast_input_dtype_enabled"):  # IA³'s layers cast nothing
                layer.cast_input_dtype_enabled = False
    if plan.runtime.precision == "float32" and plan.runtime.strategy in ("auto", "ddp"):
        fused.use(model)
    if plan.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _objective(plan: Plan, model: Any, rows: Rows, device: str) -> Objective:
    """What is minimised, and whether rows are packed: where the method, the model and a trial of it allow that.

    Raises:
        ConfigError: where packing is asked for and not possible.
    """
    import torch

    from paw.training import packing

    tokenizer, base = load_tokenizer(plan.model, plan.trust_remote_code), model.get_base_model()
    if plan.classify:
        return Classes(tokenizer.pad_token_id, plan.classes is None, tells_pairs(base, tokenizer))
    packed = (
        plan.train.packing is not False
        and not model.active_peft_config.is_prompt_learning
        and not plan.train.compile
    )
    packed = packed and packing.use(base)
    if packed:
        few = sorted((rows[i] for i in range(min(len(rows), 16))), key=lambda r: len(r.ids))[:3]
        model.eval().to(device)
        with torch.autocast(
            plan.runtime.device, plan.runtime.dtype, enabled=plan.runtime.precision != "float32"
        ):
            packed = packing.agrees(
                model, few, tokenizer.pad_token_id, SLACK[plan.runtime.precision]
            )
        if not packed:
            packing.undo(base)
    if plan.train.packing and not packed:
        raise ConfigError(
            f"train.packing=true: {plan.adapter.method} on {plan.model.name} does not take packed rows. Leave it out."
        )
    return Answers(tokenizer.pad_token_id, packed)


def _validation(plan: Plan, objective: Objective, share: Share, module: Training) -> Any:
    if plan.val_rows is None:
        return None
    data = Validation(
        Rows(plan.val_rows), objective, max(1, plan.train.batch_size // plan.accumulate), share
    )
    module.counted = data.counted
    return loader(data)


def _trainer(plan: Plan, model: Any) -> Any:
    import pytorch_lightning as pl
    from pytorch_lightning.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]

    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    c, runtime = plan.train, plan.runtime
    autocast = _autocast(runtime)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on log intervals
        return pl.Trainer(
            max_steps=plan.steps - plan.done,
            accelerator="gpu" if runtime.device == "cuda" else "cpu",
            devices=runtime.devices,
            strategy=_strategy(plan, model),
            gradient_clip_val=c.grad_clip or None,
            accumulate_grad_batches=plan.accumulate,
            val_check_interval=c.val_every * plan.accumulate if c.val_every else None,
            check_val_every_n_epoch=None if c.val_every else 1,
            num_sanity_val_steps=-1
            if c.val_every and not plan.done
            else 0,  # where it starts from is known, too
            precision=None if autocast else PRECISION[runtime.precision],
            plugins=[
                LightningEnvironment(),
                *autocast,
            ],  # under Slurm too, one task starts its own processes
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(plan.folder),
        )


def _autocast(runtime: Runtime) -> list[Any]:
    """Lightning's plugin for 16 bits over float32 adapters, of the runtime's own device and precision: from a name alone
    Lightning would make bfloat16 of float16 on a CPU. Empty in float32, and where DeepSpeed casts."""
    import torch
    from pytorch_lightning.plugins.precision import FSDPPrecision, MixedPrecision
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    name = PRECISION[runtime.precision]
    if runtime.precision == "float32" or runtime.strategy == "deepspeed":
        return []
    if runtime.strategy == "fsdp":
        sharded = FSDPPrecision(name)
        if (
            runtime.precision == "float16"
        ):  # Lightning's own is for CUDA, and without it scales nothing and says nothing
            sharded.scaler = ShardedGradScaler(device=runtime.device)
        return [sharded]
    scaler = torch.amp.GradScaler(runtime.device) if runtime.precision == "float16" else None
    return [MixedPrecision(name, runtime.device, scaler)]


def _strategy(plan: Plan, model: Any) -> Any:
    """Lightning's own, by name."""
    from pytorch_lightning import strategies

    name = plan.runtime.strategy
    if plan.runtime.devices == 1 and name in ("auto", "ddp"):
        return "auto"
    if name in ("auto", "ddp"):  # every buffer is the same from the start
        return strategies.DDPStrategy(
            process_group_backend="nccl" if plan.runtime.device == "cuda" else "gloo",
            broadcast_buffers=False,
        )
    if name == "fsdp":
        whole = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
        layers = {type(m) for m in model.modules() if type(m).__name__ in whole}
        from paw.training.sharded import OnCpu

        strategy = strategies.FSDPStrategy if plan.runtime.device == "cuda" else OnCpu
        return strategy(auto_wrap_policy=layers, state_dict_type="full")
    own = plan.runtime.deepspeed or str(Path(__file__).with_name("zero2.json"))
    return strategies.DeepSpeedStrategy(config=own, exclude_frozen_parameters=True)


def _run(trainer: Any, module: Training, train_data: Any, val_data: Any, plan: Plan) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(
                module,
                train_data,
                val_data,
                ckpt_path=str(plan.checkpoint) if plan.checkpoint else None,
                weights_only=True,
            )
        except SystemExit:  # what Lightning makes of Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None


def _liger(model: Any) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)


# ---- several processes ------------------------------------------------------------------------------


class _Told:
    """A Watch that tells the process that started this one."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def progress(self, done: int, total: int, note: str = "") -> None:
        self._queue.put(("progress", (done, total, note)))

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._queue.put(("metrics", (dict(values), step)))

    def say(self, text: str) -> None:
        self._queue.put(("say", (text,)))


def _spawn(plan: Plan, watch: Watch) -> None:
    mp: Any = import_module("torch.multiprocessing")

    world = plan.runtime.devices
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.start_processes(
        _process, (plan, queue, _free_port()), nprocs=world, join=False, start_method="spawn"
    )
    wrong: Exception | None = None
    try:
        while True:
            try:
                ended = context.join(timeout=0.2)
            except mp.ProcessRaisedException as e:
                ended, wrong = True, wrong or e
            except mp.ProcessExitedException as e:
                ended, wrong = (
                    True,
                    wrong
                    or StageError(
                        f"train: a process was ended from outside ({str(e).splitlines()[0]})."
                    ),
                )
            while not queue.empty():
                kind, what = queue.get()
                if kind == "wrong":
                    wrong = what
                elif kind == "gpu":
                    tell_gpu(*what)
                else:
                    getattr(watch, kind)(*what)
            if ended:
                break
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    if wrong is not None:
        raise wrong


def _process(rank: int, plan: Plan, queue: Any, port: int) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it says when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if plan.runtime.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // plan.runtime.devices))
    try:
        _work(plan, rank, _Told(queue))
        queue.put(("gpu", (f"cuda:{rank}", peak_gpu())))
    except (PawError, OutOfMemory) as e:
        queue.put(("wrong", e))
        raise


def _end_with_parent() -> None:
    """A process whose parent was killed must not go on: the next run of the same training would meet it in the same folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
