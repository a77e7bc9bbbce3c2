"""Placebo: another method's adapter turned in random directions, module by module, at equal norm
and spectrum.

B·A becomes Q_out·B·A·Q_in with Haar-random orthogonal Q: every singular value of ΔW is kept, only
where it points is chance. What this placebo recovers, a method recovers without knowing anything of
the two models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paw.transfer.methods import Placebo

if TYPE_CHECKING:
    from torch import Generator, Tensor


def spoil(a: Tensor, b: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """A Haar rotation applied to one thin matrix moves its column space to a random frame and keeps
    coordinates in it: so only the frame is drawn, not the d×d rotation."""
    import torch

    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    return (_frame(q_a, generator) @ r_a).T, _frame(q_b, generator) @ r_b


def _frame(like: Tensor, generator: Generator) -> Tensor:
    """A random orthonormal frame (d×r), uniformly distributed."""
    import torch

    q, r = torch.linalg.qr(torch.randn(like.shape, generator=generator, dtype=torch.float64))
    frame: Tensor = q * r.diagonal().sign()
    return frame.to(like)


METHOD = Placebo(spoil=spoil, drawn=True)
