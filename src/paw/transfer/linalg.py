"""The few matrix functions the methods share; all exact, none randomised."""

from __future__ import annotations

import torch
from torch import Tensor

SEEN = 1e-6  # of the largest singular value: sums in float32 say no more
SMALL = 1024  # up to this size in float64: it costs little and saves digits


def _work(m: Tensor) -> Tensor:
    return m.double() if max(m.shape) <= SMALL else m.float()


def polar(m: Tensor) -> Tensor:
    """The orthogonal factor X·Yᵀ of the thin SVD m = X S Yᵀ: the solution of orthogonal Procrustes for m = aᵀb.

    Directions the samples never showed (singular values at rounding error) are left to an SVD's whim; they are paired here
    as the identity pairs them, so that the result does not depend on the library and a model maps to itself as itself.
    """
    u, s, vh = torch.linalg.svd(_work(m), full_matrices=False)
    seen = int((s > SEEN * s[0]).sum())
    rotation: Tensor = u[:, :seen] @ vh[:seen]
    if seen < len(s):
        rest_u = torch.linalg.qr(u[:, :seen], mode="complete")[0][:, seen:]  # orthonormal bases of what was not seen
        rest_v = torch.linalg.qr(vh[:seen].T, mode="complete")[0][:, seen:]
        x, _, yh = torch.linalg.svd(rest_u.T @ torch.eye(*m.shape, dtype=u.dtype, device=u.device) @ rest_v, full_matrices=False)
        rotation = rotation + rest_u @ (x @ yh) @ rest_v.T
    return rotation.to(m.dtype)


def ridge(cross: Tensor, gram: Tensor, penalty: float) -> Tensor:
    """cross·(gram + λI)⁻¹ with λ = penalty × the mean diagonal of gram.

    cross: p×n, gram: n×n, both second moments of the same samples: the map y ≈ T·x minimising E‖y − T x‖² + λ‖T‖².
    """
    g = _work(gram)
    g = g + penalty * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype, device=g.device)
    solved: Tensor = torch.linalg.solve(g, cross.to(g.dtype).T)
    return solved.T.to(cross.dtype)


def singular_basis(w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The top k left (m×k) and right (n×k) singular vectors of w (m×n), from the Gram matrix on its smaller side.

    Spectra of language models' weights are flat: a randomised SVD finds another subspace. Signs are fixed by making the
    largest entry of each left vector positive, so that the same weights always give the same basis.
    """
    a = _work(w)
    flip = a.shape[0] > a.shape[1]
    a = a.T if flip else a
    values, vectors = torch.linalg.eigh(a @ a.T)
    left = vectors[:, -k:].flip(1)
    right = a.T @ left / values[-k:].flip(0).clamp_min(torch.finfo(a.dtype).tiny).sqrt()
    u, v = (right, left) if flip else (left, right)
    largest = u.abs().argmax(dim=0)
    sign = u[largest, torch.arange(u.shape[1], device=u.device)].sign()
    return (u * sign).to(w.dtype), (v * sign).to(w.dtype)


def overlap(a: Tensor, b: Tensor) -> float:
    """Φ = ‖QᵀB‖²_F/k of the span of a (d×k) with an orthonormal b (d×k); two random subspaces have k/d."""
    q, _ = torch.linalg.qr(_work(a))
    return float((q.T @ b.to(q.dtype)).square().sum() / b.shape[1])
