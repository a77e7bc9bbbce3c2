"""The adapters and checkpoints that a training writes: each takes the place of the last one at
once, or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.models.adapters import WEIGHTS, settle

if TYPE_CHECKING:
    import torch

BEST, LAST, CHECKPOINT = "best", "last", "last.ckpt"
TRAIL = "trail"  # adapters kept on the way, by step
ADAPTER = "default"  # PEFT's name for the one there is


def beside(target: Path) -> Path:
    """Where to write what then takes a file's or folder's place."""
    return target.with_name(f"{target.name}.new")


def exchange(target: Path) -> None:
    """What was written beside takes the target's place: a file at once; of a folder, which a
    sharded strategy writes, the old one lies beside for a moment."""
    if not target.is_dir():
        os.replace(beside(target), target)
        return
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    os.rename(beside(target), target)
    shutil.rmtree(old)


def recover(folder: Path) -> None:
    """Puts back what a kill left between the two renames of an exchange."""
    for old in folder.glob("*.old"):
        if not old.with_suffix("").exists():
            os.rename(old, old.with_suffix(""))


def held_steps(folder: Path) -> int:
    """The steps that the checkpoint of an unfinished training holds; 0 where there is none."""
    import torch

    file = folder / CHECKPOINT
    if file.is_dir():  # DeepSpeed's, with one file for what is not sharded
        file = next(file.rglob("mp_rank_00_model_states.pt"))
    if not file.exists():
        return 0
    held = torch.load(file, map_location="cpu", weights_only=True)
    return len(held["history"]["losses"])


def adapter_names(model: Any) -> set[str]:
    """Of the parameters that PEFT added to a model, the trained ones and those it keeps beside them
    (AdaLoRA's ranks)."""
    return {n for n, p in model.named_parameters() if p.requires_grad or "ranknum" in n}


def write_adapter(
    model: Any, tensors: Mapping[str, torch.Tensor], folder: Path, sharded: bool
) -> None:
    """Writes a PEFT folder.

    Args:
        tensors: the adapter's, whole, by their names in the model.
        sharded: whether the model's own modules are wrapped in shards.
    """
    config = model.peft_config[ADAPTER]
    ranks = getattr(config, "rank_pattern", None)
    target = beside(folder)
    shutil.rmtree(target, ignore_errors=True)
    if sharded:
        _save_sharded(config, tensors, target)
    else:
        # PEFT reads virtual tokens from the model
        more = {} if config.is_prompt_learning else {"state_dict": dict(tensors)}
        model.save_pretrained(str(target), save_embedding_layers=False, **more)
    # PEFT rewrites AdaLoRA's ranks for the file, and would go on with that
    if ranks is not None:
        config.rank_pattern = ranks
    settle(target)
    exchange(folder)


def _save_sharded(config: Any, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """An adapter under the names that PEFT saves it by. PEFT looks its tensors up by the names of
    the model's modules, which wrapping them in shards has changed: it would write an empty file."""
    from safetensors.torch import save_file

    folder.mkdir()
    named = {
        re.sub(rf"\.(modules_to_save\.)?{ADAPTER}\b", "", name): t.contiguous().cpu()
        for name, t in tensors.items()
    }
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    ready = copy(config)
    ready.inference_mode = True
    ready.save_pretrained(str(folder))
