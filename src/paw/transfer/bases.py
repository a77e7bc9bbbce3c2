"""Singular bases of weights, kept on the disk by the content of their model: the second transfer between two models reads
what the first computed. The largest k that was asked for is kept, and cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from paw.store import digest, replacing
from paw.transfer.linalg import SMALL, Basis, singular_basis

VERSION = "1"  # of what linalg.singular_basis computes: raise it when that changes


@dataclass(frozen=True)
class Bases:
    """Of one model's weights, by module name. `root` None keeps nothing."""

    root: str | Path | None
    model: str  # the fingerprint of its content

    def of(self, module: str, shape: tuple[int, int], k: int, weight: Callable[[], Tensor], device: str) -> Basis:
        """The top k singular vectors of a module's weight (out×in), float32; the weight is read only if they must be computed."""
        if self.root is None or max(shape) <= SMALL:  # small ones are computed as fast as read
            return singular_basis(weight(), k)
        file = Path(self.root) / f"{digest([VERSION, self.model, module])[:24]}.safetensors"
        found = _read(file, k, device)
        if found is None:
            found = singular_basis(weight(), k)
            _write(file, found)
        return found


def _read(file: Path, k: int, device: str) -> Basis | None:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="pt", device=device) as f:
        u, v, values = (f.get_tensor(name) for name in ("u", "v", "values"))
        if len(values) >= k:
            return Basis(u[:, :k], v[:, :k], values[:k], float(f.metadata()["norm"]))
    return None


def _write(file: Path, basis: Basis) -> None:
    """Two processes that compute the same write the same."""
    from safetensors.torch import save_file

    tensors = {"u": basis.u, "v": basis.v, "values": basis.values}
    with replacing(file) as beside:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, beside, metadata={"norm": repr(basis.norm)})
