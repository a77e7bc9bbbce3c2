"""The tensors of a model folder, one at a time from its safetensors shards: no model is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Module name to (out, in) of every two-dimensional weight, from the shards' headers."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as shard:
                for key in shard.keys():  # noqa: SIM118 - not a dictionary
                    shape = shard.get_slice(key).get_shape()
                    if len(shape) == 2 and key.endswith(".weight"):
                        shapes[key.removesuffix(".weight")] = (shape[0], shape[1])
        except SafetensorError as e:
            raise ModelError(f"{file}: is damaged ({e}). Fetch it again.") from None
    return shapes


class Weights:
    """A model's weights by module name, float32 (out×in) on a device; each is read when asked for."""

    def __init__(self, folder: Path, device: str) -> None:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            shard: Any = safe_open(file, framework="pt", device=device)
            self._files |= dict.fromkeys(shard.keys(), shard)

    def __getitem__(self, module: str) -> Tensor:
        weight: Tensor = self._files[f"{module}.weight"].get_tensor(f"{module}.weight")
        if weight.dtype.itemsize < 2 or not weight.is_floating_point():
            raise ModelError(f"{module}: its weights are quantised ({weight.dtype}); transfer reads plain ones. Give the original model.")
        return weight.float()
