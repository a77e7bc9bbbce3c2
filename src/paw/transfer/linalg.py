"""The few matrix functions the methods share; all exact, none randomised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paw.transfer.modules import SMALL

# Of the largest singular value of second moments: less is what rounding left. In float64 it is the
# rounding of the activations themselves, squared.
SEEN = {torch.float32: 1e-6, torch.float64: 1e-12}


def _work(m: Tensor) -> Tensor:
    return m.double() if max(m.shape) <= SMALL else m.float()


def polar(m: Tensor) -> Tensor:
    """The orthogonal factor X·Yᵀ of the thin SVD m = X S Yᵀ: the solution of orthogonal Procrustes
    for m = aᵀb (float32 or float64; the factor is float32).

    Directions the samples never showed (singular values at rounding error) are left to an SVD's
    whim; they are paired here as the identity pairs them, so that the result does not depend on the
    library and a model maps to itself as itself."""
    u, s, vh = torch.linalg.svd(_work(m), full_matrices=False)
    seen = int((s > SEEN[m.dtype] * s[0]).sum())
    rotation: Tensor = u[:, :seen] @ vh[:seen]
    if seen < len(s):
        rest_u = torch.linalg.qr(u[:, :seen], mode="complete")[0][
            :, seen:
        ]  # orthonormal bases of what was not seen
        rest_v = torch.linalg.qr(vh[:seen].T, mode="complete")[0][:, seen:]
        x, _, yh = torch.linalg.svd(
            rest_u.T @ torch.eye(*m.shape, dtype=u.dtype, device=u.device) @ rest_v,
            full_matrices=False,
        )
        rotation = rotation + rest_u @ (x @ yh) @ rest_v.T
    return rotation.float()


def ridge(cross: Tensor, gram: Tensor, penalty: float) -> Tensor:
    """cross·(gram + λI)⁻¹ with λ = penalty × the mean diagonal of gram.

    cross: p×n, gram: n×n, both second moments of the same samples: the map y ≈ T·x minimising E‖y −
    T x‖² + λ‖T‖², float32."""
    g = _work(gram)
    g = g + penalty * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype, device=g.device)
    solved: Tensor = torch.linalg.solve(g, cross.to(g.dtype).T)
    return solved.T.float()


PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4)


def best_penalty(cross: Tensor, gram: Tensor, x: Tensor, y: Tensor) -> float:
    """Of PENALTIES, the one whose ridge map explains the most of y (N×p) from x (N×n), positions
    that were held out; the middle of them where none were."""
    if len(x) < 2:
        return 0.1
    return max(PENALTIES, key=lambda penalty: explained(y, x @ ridge(cross, gram, penalty).T))


@dataclass(frozen=True)
class Basis:
    """The top singular vectors of a weight (m×n): u m×k, v n×k, values k (descending), and the norm
    of the whole weight."""

    u: Tensor
    v: Tensor
    values: Tensor
    norm: float


def singular_basis(w: Tensor, k: int) -> Basis:
    """The top k singular vectors of w (m×n), from the Gram matrix on its smaller side.

    Spectra of language models' weights are flat: a randomised SVD finds another subspace. Signs are
    fixed by making the largest entry of each left vector positive, so that the same weights always
    give the same basis."""
    a = _work(w)
    flip = a.shape[0] > a.shape[1]
    a = a.T if flip else a
    values, left = _top(a, k)
    values = values.clamp_min(torch.finfo(a.dtype).tiny).sqrt()
    right = a.T @ left / values
    u, v = (right, left) if flip else (left, right)
    largest = u.abs().argmax(dim=0)
    sign = u[largest, torch.arange(k, device=u.device)].sign()
    u, v = u * sign, v * sign
    return Basis(u.to(w.dtype), v.to(w.dtype), values.to(w.dtype), float(w.norm()))


def _top(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of a·aᵀ, descending, and their vectors.

    On a CPU a large Gram matrix is computed as the triangle it is, and LAPACK finds a part of its
    spectrum: less than half of the time of the whole of both."""
    if a.device.type == "cpu" and len(a) > SMALL and k <= len(a) // 4:
        from scipy.linalg import eigh
        from scipy.linalg.blas import ssyrk

        gram = ssyrk(
            1.0, a.contiguous().numpy().T, trans=1, lower=0
        )  # the upper triangle; .T is the view that BLAS wants
        part = (len(a) - k, len(a) - 1)
        found = eigh(
            gram,
            lower=False,
            subset_by_index=part,
            driver="evr",
            overwrite_a=True,
            check_finite=False,
        )
        values, vectors = (torch.from_numpy(x) for x in found)
    else:
        values, vectors = torch.linalg.eigh(a @ a.T)
    return values[-k:].flip(0), vectors[:, -k:].flip(1)


def recompress(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best rank-r (A: r×n, B: m×r) of b·a (a: R×n, b: m×R), by QR of both factors and an SVD of
    the R×R core."""
    q_b, r_b = torch.linalg.qr(_work(b))
    q_a, r_a = torch.linalg.qr(_work(a).T)
    u, s, vh = torch.linalg.svd(r_b.to(q_b.dtype) @ r_a.to(q_b.dtype).T, full_matrices=False)
    root = s[:r].sqrt()
    return ((q_a.to(q_b.dtype) @ vh[:r].T) * root).T.to(a.dtype), ((q_b @ u[:, :r]) * root).to(
        b.dtype
    )


def overlap(a: Tensor, b: Tensor) -> float:
    """Φ = ‖QᵀB‖²_F/k for Q an orthonormal basis of the span of a (d×k) and b orthonormal (d×k); of
    two random subspaces k/d.

    From the Gram matrix of a, whose k×k parts cost far less than a QR of a."""
    a, b = _work(a), _work(b)
    values, vectors = torch.linalg.eigh((a.T @ a).double())
    seen = values > 1e-10 * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    inside = (vectors[:, seen] / values[seen].sqrt()).T @ (a.T @ b.to(a.dtype)).double()
    return float(inside.square().sum() / b.shape[1])


def explained(actual: Tensor, mapped: Tensor) -> float:
    """R² of `mapped` (N×d) for `actual` (N×d) on the same samples, both centred and the best scalar
    allowed: the squared correlation, 0 at chance. A scalar is what the gain decides."""
    x, y = actual.double() - actual.double().mean(0), mapped.double() - mapped.double().mean(0)
    return float(
        (x * y).sum().clamp_min(0).square()
        / (x.square().sum() * y.square().sum()).clamp_min(1e-300)
    )
