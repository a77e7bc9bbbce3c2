"""Lightning's Fabric as a training needs it: devices, precision, and how a model is copied to, or
sharded over, several of them."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, TorchCheckpointIO
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.precision import FSDPPrecision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.deepspeed import DeepSpeedStrategy
from lightning_fabric.strategies.fsdp import FSDPStrategy
from lightning_fabric.strategies.strategy import Strategy
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from paw.models.load import Runtime

PRECISION: dict[str, Any] = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def launched(runtime: Runtime, model: Any, accumulate: int, grad_clip: float) -> Fabric:
    """A Fabric that is ready in this process.

    Args:
        model: with its adapter; FSDP wants to know which of its layers to shard one by one.
        accumulate, grad_clip: what DeepSpeed must know, since it does these itself.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    autocast = _autocast(runtime)
    fabric = Fabric(
        accelerator="cuda" if runtime.device == "cuda" else "cpu",
        devices=runtime.devices // runtime.nodes,
        num_nodes=runtime.nodes,
        strategy=_strategy(runtime, model, accumulate, grad_clip),
        precision=None if autocast else PRECISION[runtime.precision],
        # paw starts its processes itself, under Slurm too
        plugins=[LightningEnvironment(), *autocast],
    )
    fabric.launch()
    return fabric


def _autocast(runtime: Runtime) -> list[Any]:
    """The plugin for 16 bits over float32 adapters, of the runtime's own device and precision: from
    a name alone Lightning would make bfloat16 of float16 on a CPU. Empty in float32, and where
    DeepSpeed casts."""
    name = PRECISION[runtime.precision]
    if runtime.precision == "float32" or runtime.strategy == "deepspeed":
        return []
    if runtime.strategy == "fsdp":
        sharded = FSDPPrecision(name)
        # Lightning's own is for CUDA, and without it scales nothing and says nothing
        if runtime.precision == "float16":
            sharded.scaler = ShardedGradScaler(device=runtime.device)
        return [sharded]
    scaler = torch.amp.GradScaler(runtime.device) if runtime.precision == "float16" else None
    return [MixedPrecision(name, runtime.device, scaler)]


def _strategy(runtime: Runtime, model: Any, accumulate: int, grad_clip: float) -> Any:
    name = runtime.strategy
    if name == "fsdp":
        whole = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
        layers = {type(m) for m in model.modules() if type(m).__name__ in whole}
        return Sharded(auto_wrap_policy=layers, state_dict_type="full")
    if name == "deepspeed":
        own = runtime.deepspeed or Path(__file__).with_name("zero2.json")
        config = {"gradient_clipping": grad_clip, **json.loads(Path(own).read_text())}
        config["gradient_accumulation_steps"] = accumulate
        return DeepSpeedStrategy(config=config, exclude_frozen_parameters=True)
    if runtime.devices == 1:
        return "auto"
    backend = "nccl" if runtime.device == "cuda" else "gloo"
    # every buffer is the same from the start
    return DDPStrategy(process_group_backend=backend, broadcast_buffers=False)


class Sharded(FSDPStrategy):  # type: ignore[misc]
    """FSDP on GPUs, and over gloo on a CPU: slow there, and the one way to see on any machine what
    sharding does to a training. Checkpoints are one file, as other strategies write it."""

    checkpoint_io = TorchCheckpointIO()
    save_checkpoint = Strategy.save_checkpoint

    def setup_module(self, module: torch.nn.Module) -> torch.nn.Module:
        # Lightning would leave a CPU unnamed, which torch takes for "the accelerator there is"
        self._root = FullyShardedDataParallel(
            module,
            device_id=self.root_device,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self._fsdp_kwargs,
        )
        return self._root

    def get_module_state_dict(self, module: torch.nn.Module) -> dict[str, Any]:
        """The whole model, in the RAM of the first process."""
        with self._whole():
            return self._root.state_dict()

    def get_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        with self._whole():
            return FullyShardedDataParallel.optim_state_dict(self._root, optimizer)

    def _whole(self) -> AbstractContextManager[Any]:
        """State dicts of all shards. On a CPU in all processes: "moving" one to the CPU would copy
        nothing, and the memory behind it is freed with the shards or used for the next tensor."""
        moved = self.root_device.type != "cpu"
        return FullyShardedDataParallel.state_dict_type(
            self._root,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=moved, rank0_only=moved),
            FullOptimStateDictConfig(offload_to_cpu=moved, rank0_only=moved),
        )
