"""Adapters from elsewhere: PEFT folders, and Lightning's checkpoints, of which only the adapter's
tensors are read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.errors import AdapterError
from paw.models.adapters import (
    CONFIG,
    PICKLED,
    PREFIX,
    WEIGHTS,
    finite_tensors,
    made_for,
    read_config,
)
from paw.store import write_text
from paw.text import first_line, some

if TYPE_CHECKING:
    import torch

FILES = (".ckpt", ".pt", ".pth")
SHARED = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
ADAPTER = re.compile(r"\.(lora_|ia3_)")


@dataclass(frozen=True)
class Checkpoint:
    name: str
    path: Path
    task: str = ""
    step: int = 0
    group: int | None = None  # of the prompt that it was trained on


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """All adapters in or below a folder, in the order of the numbers in their names.

    Raises:
        AdapterError: where there is none.
    """
    found = [p.parent for p in folder.rglob(CONFIG)]
    inside = set(found)  # an adapter's folder may hold the state of its optimizer beside it
    found += [
        p
        for p in folder.rglob("*")
        if p.suffix in FILES and p.is_file() and not inside & set(p.parents)
    ]
    if not found:
        raise AdapterError(
            f"{folder}: holds no adapters. Give a folder with PEFT folders ({CONFIG}), or with "
            "Lightning's .ckpt files."
        )
    named = {str(path.relative_to(folder)) if path != folder else path.name: path for path in found}
    return [
        Checkpoint(name, path, step=_number(path.name))
        for name, path in sorted(named.items(), key=lambda item: (_number(item[0]), item[0]))
    ]


def _number(name: str) -> int:
    """The number after `step`, after `epoch`, or the last one of a name."""
    said = re.search(r"step[=_-]?(\d+)", name) or re.search(r"epoch[=_-]?(\d+)", name)
    said = said or re.search(r"(\d+)\D*$", name)
    return int(said[1]) if said else 0


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors by the names that PEFT saves them by; a file is mapped, so that a base's
    weights beside them are not read.

    Raises:
        AdapterError: for a file that is damaged, holds no adapter, or has values that are not
            finite.
    """
    found = dict(finite_tensors(path)) if path.is_dir() else _mapped(path)
    if not found:
        raise AdapterError(f"{path}: holds no adapter's tensors (lora_…).")
    return found


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    """Of one of Lightning's checkpoints the adapter's tensors alone."""
    import torch

    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        held = held.get("state_dict", held)
        found = {_saved(n): t.clone() for n, t in held.items() if ADAPTER.search(n)}
    except Exception as e:  # damaged bytes, or more than weights: nothing of it is run
        raise AdapterError(f"{file}: cannot be read ({first_line(e)[:160]}).") from None
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise AdapterError(f"{file}: {name} has values that are not finite.")
    return found


def _saved(name: str) -> str:
    """A parameter's name in a running model as PEFT saves it."""
    inner = name.partition(PREFIX)[2] or name.removeprefix("model.")
    return PREFIX + re.sub(r"\.default(?=\.|$)", "", inner)


def settings(paths: Sequence[Path], r: int | None, alpha: int | None) -> dict[str, Any]:
    """The adapter_config.json of adapters: their own, or one made from the rank and the names of
    Lightning's checkpoints.

    Args:
        r, alpha: configured, for checkpoints that do not say how they are scaled.

    Raises:
        AdapterError: where they differ in rank, scale or type.
    """
    given = {str(p): read_config(p) for p in paths if p.is_dir()}
    for name, config in given.items():
        first = next(iter(given.values()))
        for key in (
            "peft_type",
            "r",
            "lora_alpha",
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
        ):
            if config.get(key) != first.get(key):
                raise AdapterError(
                    f"{name}: has {key}={config.get(key)}, and {next(iter(given))} "
                    f"{first.get(key)}. A generator learns from adapters of one kind."
                )
    if given:
        return dict(next(iter(given.values())))
    tensors = read_tensors(paths[0])
    ranks = {t.shape[0] for n, t in tensors.items() if ".lora_A" in n}
    if ranks != {r}:
        raise AdapterError(
            f"{paths[0]}: has rank {some(sorted(map(str, ranks)))}, and no {CONFIG} says how it is "
            f"scaled. Set adapter.r and adapter.alpha as it was trained (now r={r})."
        )
    modules = {n.removeprefix(PREFIX).partition(".lora_")[0] for n in tensors}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "inference_mode": True,
    }


def contents(paths: Sequence[Path]) -> list[Path]:
    """The files that adapters are read from."""
    inside = [p / name for p in paths if p.is_dir() for name in (CONFIG, WEIGHTS, PICKLED)]
    return [file for file in (*inside, *paths) if file.is_file()]


def base_of(paths: Sequence[Path], base: str) -> None:
    """
    Args:
        base: the fingerprint of the base that is generated for.

    Raises:
        AdapterError: for adapters that are stamped for another base.
    """
    for path in paths:
        said = made_for(path) if path.is_dir() else None
        if said is not None and said != base:
            raise AdapterError(f"{path}: was trained on another base than model@source.")


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """A PEFT folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True)
    write_text(folder / CONFIG, text)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
