"""FSDP over gloo on a CPU: slow, and the one way to see on any machine what sharding does to a training.

Lightning's strategy takes GPUs only. What differs here is what torch wants of a CPU: its device named, and a whole state
dict that is not "moved to the CPU" first, since that move copies nothing and the memory behind it is freed with the shards.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType


class OnCpu(FSDPStrategy):
    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return FullyShardedDataParallel(
            model,
            device_id=self.root_device,
            mixed_precision=self.mixed_precision_config,
            **self.kwargs,
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert isinstance(self.model, FullyShardedDataParallel)
        whole = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(
            self.model, StateDictType.FULL_STATE_DICT, whole
        ):
            return self.model.state_dict()
