"""Singular bases of weights, kept on the disk by the content of their model: the second transfer
between two models reads what the first computed. The largest k that was asked for is kept, and
cut."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from paw.store import content, digest, replacing, write_text
from paw.transfer.linalg import Basis, singular_basis
from paw.transfer.modules import SMALL

VERSION = "1"  # of what linalg.singular_basis computes: raise it when that changes
HASH = ".sha256"


@dataclass(frozen=True)
class Bases:
    """Of one model's weights, by module name. `root` None keeps nothing."""

    root: str | Path | None
    model: str  # the fingerprint of its content

    def of(
        self, module: str, shape: tuple[int, int], k: int, weight: Callable[[], Tensor], device: str
    ) -> Basis:
        """The top k singular vectors of a module's weight (out×in), float32; the weight is read
        only if they must be computed."""
        if self.root is None or max(shape) <= SMALL:  # small ones are computed as fast as read
            return singular_basis(weight(), k)
        file = Path(self.root) / f"{digest([VERSION, self.model, module])[:24]}.safetensors"
        found = _read(file, k, device)
        if found is None:
            found = singular_basis(weight(), k)
            _write(file, found)
        return found


def _read(file: Path, k: int, device: str) -> Basis | None:
    """A kept basis; None where it is not there, has fewer vectors, or is not what was written."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file() or _hash(file) != _said(file):
        return None
    with (
        contextlib.suppress(SafetensorError, OSError),
        safe_open(file, framework="pt", device=device) as f,
    ):
        u, v, values = (f.get_tensor(name) for name in ("u", "v", "values"))
        if len(values) >= k:
            return Basis(u[:, :k], v[:, :k], values[:k], float(f.metadata()["norm"]))
    return None


def _write(file: Path, basis: Basis) -> None:
    """Two processes that compute the same write the same."""
    from safetensors.torch import save_file

    tensors = {"u": basis.u, "v": basis.v, "values": basis.values}
    with replacing(file) as beside:
        save_file(
            {name: t.contiguous().cpu() for name, t in tensors.items()},
            beside,
            metadata={"norm": repr(basis.norm)},
        )
    write_text(file.with_suffix(HASH), _hash(file))


def _hash(file: Path) -> str:
    return content(file, file.parent / ".content")


def _said(file: Path) -> str | None:
    """The hash that was written beside a basis; of one kept before hashes were, its own."""
    beside = file.with_suffix(HASH)
    return beside.read_text() if beside.is_file() else _hash(file)
