"""Stage `match`: which layer of the source is most like which of the target, by what they do or by
their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from paw.config.checks import transient
from paw.errors import TransferError
from paw.models.layout import Part
from paw.models.tensors import Weights
from paw.store import Input, Stage, Watch, write_text
from paw.transfer.layers import MATRIX
from paw.transfer.model_pair import ModelPair, TextConfig
from paw.transfer.modules import BASIS, ROLES, UPDATE, basis_size, by_layer, layer_module

if TYPE_CHECKING:
    from torch import Tensor

    from paw.transfer.bases import Bases


@dataclass(kw_only=True)
class MatchStage:
    text: TextConfig | None  # for CKA, on this text; None compares weights
    basis: int = BASIS
    device: str = transient("cpu")
    bases: str | None = transient(None)  # where singular bases are kept


@dataclass(frozen=True, kw_only=True)
class MatchResult:
    by: str  # cka or weights
    similarity: list[list[float]]  # target layers × source layers, 0 at chance

    def __str__(self) -> str:
        rows, columns = len(self.similarity), len(self.similarity[0])
        return f"{rows} × {columns} by {self.by}"


def match(config: MatchStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> MatchResult:
    """The similarity of every layer of the target (row) to every one of the source (column), above
    chance.

    Args:
        inputs: `source` and `target`; for CKA also the text, as of stage `calibrate`.

    Raises:
        TransferError: if weights are compared whose residual streams are of different width.
    """
    matrix = _by_text(config.text, inputs) if config.text else _by_weights(config, inputs, watch)
    result = MatchResult(
        by="cka" if config.text else "weights",
        similarity=[[round(x, 6) for x in row] for row in matrix],
    )
    write_text(out / MATRIX, json.dumps(asdict(result)))
    return result


STAGE = Stage(
    "match", "1", "paw.transfer.match:match", config=MatchStage, result=MatchResult, devices="one"
)


def _by_text(config: TextConfig, inputs: Mapping[str, Input]) -> list[list[float]]:
    """Linear CKA (Kornblith et al. 2019) of what layers add to the residual stream, by the unbiased
    estimator of HSIC (Song et al. 2012), so that unrelated layers are at 0. Of updates and not of
    the stream itself, which changes little from layer to layer."""
    from paw.transfer.activations import seen

    run = ModelPair(config, inputs)
    places = [
        {
            (layer, UPDATE): Part(layer_module(next(iter(roles.values()))))
            for layer, roles in by_layer(parts).items()
        }
        for parts in run.parts
    ]
    batches = list(seen(run.models, (places[0], places[1]), run.texts, config.batch_size, run.pads))
    grams = [
        [
            _gram([now[side][space] for now in batches])
            for space in sorted(places[side], key=lambda s: s[0])
        ]
        for side in (0, 1)
    ]
    own = [[_hsic(k, k) for k in side] for side in grams]
    return [
        [
            _hsic(k, g) / max(float(a * b), 1e-30) ** 0.5
            for g, b in zip(grams[0], own[0], strict=True)
        ]
        for k, a in zip(grams[1], own[1], strict=True)
    ]


def _gram(chunks: Sequence[Tensor]) -> Tensor:
    import torch

    x = torch.cat(list(chunks)).double()
    k = x @ x.T
    return k.fill_diagonal_(0)


def _hsic(k: Tensor, other: Tensor) -> float:
    """HSIC₁ of two Gram matrices with empty diagonals (Song et al. 2012, equation 5)."""
    n = len(k)
    total = (
        (k * other).sum()
        + k.sum() * other.sum() / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (k.sum(0) * other.sum(0)).sum()
    )
    return float(total / (n * (n - 3)))


def _by_weights(config: MatchStage, inputs: Mapping[str, Input], watch: Watch) -> list[list[float]]:
    """Φ above chance of the top singular subspaces on the residual stream's side of every weight,
    mean over roles."""
    from paw.transfer.bases import Bases

    sides = []
    for name in ("source", "target"):
        bases = Bases(config.bases, inputs[name].fingerprint)
        weights = Weights(inputs[name].path, config.device)
        layers = by_layer(weights.shapes)
        sides.append([_streams(layers[i], weights, bases, config) for i in sorted(layers)])
        watch.progress(len(sides), 2, "models")
    (width, other) = (next(iter(side[0].values())).shape[0] for side in sides)
    if width != other:
        raise TransferError(
            f"transfer.layers=similarity: the residual streams are {width} and {other} wide, and "
            "weights of different widths do not compare. Use transfer.layers=cka, which compares "
            "what layers do."
        )
    return [[_excess(s, t) for s in sides[0]] for t in sides[1]]


def _streams(
    roles: Mapping[str, str], weights: Weights, bases: Bases, config: MatchStage
) -> dict[str, Tensor]:
    """By role, the basis of the subspace of the residual stream that a module reads from or writes
    to."""
    out = {}
    for role, name in roles.items():
        shape, read = weights.shapes[name], partial(weights.__getitem__, name)
        basis = bases.of(name, shape, basis_size(min(shape), config.basis), read, config.device)
        out[role] = basis.u if ROLES[role].onto_stream else basis.v
    return out


def _excess(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> float:
    found = []
    for role in [role for role in source if role in target]:
        a, b = source[role], target[role]
        overlap = float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1])
        found.append(overlap - max(a.shape[1], b.shape[1]) / len(a))
    return sum(found) / len(found)
