"""The tensors of a model folder, one at a time from its safetensors shards: no model is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from paw.errors import ModelError
from paw.models.layout import Part, parts

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, int]]
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names what is loaded in one precision


def module_parts(folder: Path) -> dict[str, Part]:
    """Where every two-dimensional weight of a folder lies, by the name of its module; fused ones as
    their parts."""
    return parts(_headers(folder)[0], folder)


def linear_shapes(folder: Path) -> Shapes:
    """(out, in) of every two-dimensional weight by module name, from the shards' headers; fused
    ones as their parts."""
    shapes, _ = _headers(folder)
    return _of_parts(shapes, parts(shapes, folder))


def _of_parts(shapes: Shapes, where: Mapping[str, Part]) -> Shapes:
    out = {}
    for name, part in where.items():
        rows, columns = shapes[part.module]
        out[name] = (part.rows.stop - part.rows.start if part.rows else rows, columns)
    return out


def _headers(folder: Path) -> tuple[Shapes, dict[str, Path]]:
    """Shape and file of every two-dimensional weight, by module name."""
    from safetensors import SafetensorError, safe_open

    shapes, files = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as shard:
                for key in shard.keys():  # noqa: SIM118 - not a dictionary
                    shape, module = shard.get_slice(key).get_shape(), key.removesuffix(".weight")
                    if len(shape) == 2 and module != key:
                        shapes[module], files[module] = (shape[0], shape[1]), file
        except SafetensorError as e:
            raise ModelError(f"{file}: is damaged ({e}). Fetch it again.") from None
    return shapes, files


def weight_bytes(folder: Path, size: int) -> int:
    """What a folder's weights take in memory, from the shards' headers.

    Args:
        size: bytes of a float once it is loaded. Quantised values stay as they are in the file.
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        for shape, dtype in _kinds(file):
            bits = re.search(r"\d+", dtype)  # F32, BF16, I8, F8_E4M3, BOOL
            stored = int(bits[0]) // 8 if bits else 1
            total += prod(shape) * (size if dtype in FLOATS else stored)
    return total


def _kinds(file: Path) -> list[tuple[list[int], str]]:
    """Shape and type of every tensor of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as shard:
            slices = [shard.get_slice(key) for key in shard.keys()]  # noqa: SIM118
            return [(x.get_shape(), str(x.get_dtype())) for x in slices]
    except SafetensorError as e:
        raise ModelError(f"{file}: is damaged ({e}). Fetch it again.") from None


class Weights:
    """A model's weights by module name, float32 (out×in) on a device, each read when it is asked
    for; `shapes` are known before."""

    def __init__(self, folder: Path, device: str) -> None:
        whole, self._files = _headers(folder)
        self._parts, self._device = parts(whole, folder), device
        self.shapes = _of_parts(whole, self._parts)

    def __getitem__(self, module: str) -> Tensor:
        """Opened and closed each time: a mapped file counts as resident memory while it is open.

        Raises:
            ModelError: for values that are quantised or not finite.
        """
        from safetensors import safe_open

        part = self._parts[module]
        with safe_open(self._files[part.module], framework="pt", device=self._device) as shard:
            weight: Tensor = shard.get_tensor(f"{part.module}.weight")
        if weight.dtype.itemsize < 2 or not weight.is_floating_point():
            raise ModelError(
                f"{module}: its weights are quantised ({weight.dtype}); transfer reads plain ones. "
                "Give the original model."
            )
        weight = (weight if part.rows is None else weight[part.rows]).float()
        if not weight.isfinite().all():
            raise ModelError(
                f"{self._files[part.module]}: {module} has values that are not finite. Fetch the "
                "model again."
            )
        return weight
