"""As procrustes on the residual stream and the neurons; attention head by head, which is what
rotary embeddings permit.

A map of queries or keys must commute with every rotation: one complex number per frequency pair
(i, i + dim/2), fitted by least squares. Values, and what enters o_proj, take one orthogonal map a
head. Key-value groups are assigned first, by the coherence of their keys and values, then query
heads inside a group; frequencies pair with the nearest of the other model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paw.transfer.methods import Maps, Method, Pair, Product, TransferConfig
from paw.transfer.modules import ROLES

if TYPE_CHECKING:
    from torch import Tensor

    from paw.models.layout import Heads
    from paw.transfer.modules import Place

HEADS = ("q_proj", "k_proj", "v_proj")  # by which heads are assigned, whichever module is moved
QUERIES, KEYS, VALUES = (ROLES[role].writes for role in HEADS)
MIXED = ROLES["o_proj"].reads


def maps(pair: Pair, config: TransferConfig) -> Maps:
    reads, writes = pair.role.reads, pair.role.writes
    if writes in (QUERIES, KEYS):
        into, out = pair.reads.procrustes, _rotary(pair, writes)
    elif writes == VALUES:
        into, out = pair.reads.procrustes, _orthogonal(pair, VALUES).T
    elif reads == MIXED:
        into, out = _orthogonal(pair, MIXED), pair.writes.procrustes.T
    else:
        into, out = pair.reads.procrustes, pair.writes.procrustes.T
    return Maps(Product((into,)), Product((out,)))


@dataclass(frozen=True)
class Assignment:
    """For every head of the target, the source's."""

    query: list[int]
    keyvalue: list[int]

    def of(self, place: Place) -> list[int]:
        return self.query if place in (QUERIES, MIXED) else self.keyvalue


def _assignment(pair: Pair) -> Assignment:
    """Key-value groups first, then query heads inside a group. Found once for a pair of layers."""
    found: Assignment = pair.site(KEYS).once("assignment", lambda: _assign(pair))
    return found


def _assign(pair: Pair) -> Assignment:
    s, t = _heads(pair)
    keys, values, queries = (_coherence(pair, place) for place in (KEYS, VALUES, QUERIES))
    groups = _best(keys + values)
    chosen = []
    for group, twin in enumerate(groups):
        rows = slice(group * t.shared, (group + 1) * t.shared)
        columns = slice(twin * s.shared, (twin + 1) * s.shared)
        chosen += [twin * s.shared + head for head in _best(queries[rows, columns])]
    return Assignment(chosen, groups)


def _best(score: Tensor) -> list[int]:
    """The column of every row for the largest total; columns repeat evenly where there are fewer of
    them."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = score.shape
    repeated = score.repeat(1, -(-rows // columns))
    _, chosen = linear_sum_assignment(repeated.numpy(), maximize=True)
    return [int(c) % columns for c in chosen]


def _heads(pair: Pair) -> tuple[Heads, Heads]:
    assert pair.heads is not None, "the stage gives the heads to every pair"
    return pair.heads


def _blocks(pair: Pair, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """The cross moments of every head of the source with every one of the target
    (h_s×h_t×d_s×d_t), and both Grams' own blocks (h×d×d)."""
    import torch

    (s, t), site = _heads(pair), pair.site(place)
    cross = site.cross.reshape(-1, s.dim, len(site.gram_t) // t.dim, t.dim).transpose(1, 2)
    own = []
    for gram, dim in ((site.gram_s, s.dim), (site.gram_t, t.dim)):
        blocks = gram.reshape(len(gram) // dim, dim, len(gram) // dim, dim)
        own.append(torch.stack([blocks[h, :, h] for h in range(len(blocks))]))
    return cross, own[0], own[1]


def _coherence(pair: Pair, place: Place) -> Tensor:
    """How much of a target head (row) the best admissible map of a source head (column) explains,
    0 to 1."""
    import torch

    cross, gram_s, gram_t = _blocks(pair, place)
    energy = torch.outer(_trace(gram_s), _trace(gram_t)).sqrt().clamp_min(1e-30)
    if place == VALUES:
        strength: Tensor = torch.linalg.svdvals(cross.double()).sum(-1)
    else:
        number, _ = _numbers(pair, cross, gram_s)
        strength = number.abs().sum(-1)
    return (strength / energy).T.cpu()


def _trace(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=-2, dim2=-1).sum(-1)


def _numbers(pair: Pair, cross: Tensor, gram_s: Tensor) -> tuple[Tensor, Tensor]:
    """E[conj(x) y] of every pair of heads and target frequency, with the source's nearest frequency
    (h_s×h_t×dim_t/2), and E|x|² (h_s×dim_t/2)."""
    import torch

    half_s, half_t, near = _frequencies(pair)
    i, j = near, torch.arange(half_t, device=cross.device)
    real = cross[..., i, j] + cross[..., i + half_s, j + half_t]
    imaginary = cross[..., i, j + half_t] - cross[..., i + half_s, j]
    power = gram_s.diagonal(dim1=-2, dim2=-1)
    return torch.complex(real, imaginary), power[:, i] + power[:, i + half_s]


def _frequencies(pair: Pair) -> tuple[int, int, Tensor]:
    """Half of both heads' dimensions, and of every target frequency the source's nearest."""
    import torch

    s, t = _heads(pair)
    half_s, half_t = s.dim // 2, t.dim // 2
    logs: Any = [
        -torch.arange(half) / half * torch.log(torch.tensor(h.theta))
        for half, h in ((half_s, s), (half_t, t))
    ]
    near = (logs[0][:, None] - logs[1]).abs().argmin(dim=0)
    return half_s, half_t, near.to(pair.site(KEYS).cross.device)


def _rotary(pair: Pair, place: Place) -> Tensor:
    """T_out (m_t×m_s) of complex numbers, y_t ≈ c·y_s: real part and imaginary part of pair
    (i, i + dim/2)."""
    import torch

    chosen = _assignment(pair).of(place)
    (s, t), (cross, gram_s, _) = _heads(pair), _blocks(pair, place)
    half_s, half_t, near = _frequencies(pair)
    number, power = _numbers(pair, cross, gram_s)
    out = cross.new_zeros(len(chosen), t.dim, cross.shape[0], s.dim)
    j = torch.arange(half_t, device=cross.device)
    for head, twin in enumerate(chosen):
        c = number[twin, head] / power[twin].clamp_min(1e-30)
        block = out[head, :, twin]
        block[j, near], block[j, near + half_s] = c.real, -c.imag
        block[j + half_t, near], block[j + half_t, near + half_s] = c.imag, c.real
    return out.reshape(len(chosen) * t.dim, -1).float()


def _orthogonal(pair: Pair, place: Place) -> Tensor:
    """x_s ≈ T x_t (n_s×n_t) with one orthogonal block a head; a source head that serves several
    takes their mean."""
    from paw.transfer.linalg import polar

    chosen = _assignment(pair).of(place)
    (s, t), (cross, _, _) = _heads(pair), _blocks(pair, place)
    out = cross.new_zeros(cross.shape[0], s.dim, len(chosen), t.dim)
    for head, twin in enumerate(chosen):
        out[twin, :, head] = polar(cross[twin, head])
    if place == MIXED:
        for twin in set(chosen):
            out[twin] /= chosen.count(twin)
    return out.reshape(cross.shape[0] * s.dim, -1).float()


METHOD = Method(maps, also=HEADS)
