"""Residual-shift matching: at every half layer of the target, what its residual stream still lacks of the shift that the
adapter gives the source's, seen through a map of the streams, is regressed on the inputs of the module that writes next.

Wanted at half layer h: r_t' − r_t ≈ T_h (r_s' − r_s), T_h by ridge from r_s to r_t, its λ chosen on held-out positions. The
half layers are fitted in order, the target carrying what was fitted so far, so each corrects what the earlier ones missed.
Adapts o_proj and down_proj only, at the source adapter's rank, by reduced-rank regression. No labels and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from paw.errors import TransferError
from paw.models.adapters import Factors
from paw.models.layout import Part
from paw.store import Watch
from paw.transfer.activations import PairedText, by_length, seen_by
from paw.transfer.calibrate import Calibration
from paw.transfer.config import ShiftConfig
from paw.transfer.linalg import best_penalty, ridge
from paw.transfer.methods import Fit
from paw.transfer.modules import Layers, Place, Space, by_layer, layer_module

MIDDLE, END = (
    Place("gate_proj", "stream"),
    Place("layer", "out"),
)  # of a layer: the stream between its halves, and after it
WRITERS = ((MIDDLE, "o_proj"), (END, "down_proj"))


def fit(
    adapter: Mapping[str, Factors],
    run: Calibration,
    layers: Layers,
    config: ShiftConfig,
    watch: Watch,
) -> dict[str, Factors]:
    twins = {t: s for s, t in layers}
    roles = [by_layer(parts) for parts in run.parts]
    streams = [_streams(run.models[side], roles[side]) for side in (0, 1)]
    _refuse_too_much(run, streams, config.memory_gb)
    rank = max(factors.rank for factors in adapter.values())

    plain, plain_held = (_capture(run, 1, streams[1], texts) for texts in (run.fit, run.held))
    before, before_held = (_capture(run, 0, streams[0], texts) for texts in (run.fit, run.held))
    with adapted(run.source, run.parts[0], adapter):
        shift = {
            space: x - before[space] for space, x in _capture(run, 0, streams[0], run.fit).items()
        }
    if run.config.shuffle is not None:
        order = torch.randperm(
            len(plain[0, END]), generator=torch.Generator().manual_seed(run.config.shuffle)
        ).to(run.target.device)
        before, shift = (
            {space: x[order] for space, x in sides.items()} for sides in (before, shift)
        )

    out: dict[str, Factors] = {}
    for done, (layer, (half, role)) in enumerate(
        ((layer, w) for layer in sorted(twins) for w in WRITERS), 1
    ):
        stream, twin, module = (layer, half), (twins[layer], half), roles[1][layer][role]
        x_s, x_t, n = before[twin], plain[stream], len(plain[stream])
        cross, gram = x_t.T @ x_s / n, x_s.T @ x_s / n
        penalty = config.map_penalty
        if penalty is None:
            penalty = best_penalty(cross, gram, before_held[twin], plain_held[stream])
        wanted = shift[twin] @ ridge(cross, gram, penalty).T
        entering = (layer, Place(role, "in"))
        with adapted(run.target, run.parts[1], out):
            now = _capture(
                run, 1, {stream: streams[1][stream], entering: run.parts[1][module]}, run.fit
            )
        lacking = wanted - (now[stream] - x_t)
        out[module] = Factors(
            *(m.cpu() for m in reduced_rank(now[entering], lacking, config.penalty, rank))
        )
        watch.progress(done, len(twins) * len(WRITERS), "half layers")
    return out


@contextmanager
def adapted(
    model: Any, parts: Mapping[str, Part], factors: Mapping[str, Factors]
) -> Iterator[None]:
    """The model with B·A added to its modules for as long as the block lasts."""
    hooks = []
    for name, f in factors.items():
        a, b, rows = (
            f.a.to(model.device, model.dtype),
            f.b.to(model.device, model.dtype),
            parts[name].rows or slice(None),
        )

        def add(
            _: Any,
            inputs: tuple[Tensor, ...],
            output: Tensor,
            a: Tensor = a,
            b: Tensor = b,
            rows: slice = rows,
        ) -> None:
            output[..., rows] += inputs[0] @ a.T @ b.T

        hooks.append(model.get_submodule(parts[name].module).register_forward_hook(add))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def reduced_rank(x: Tensor, wanted: Tensor, penalty: float, rank: int) -> tuple[Tensor, Tensor]:
    """The best (A: rank×n, B: m×rank) with wanted (N×m) ≈ x Aᵀ Bᵀ (x: N×n), ridge-regularised: the full solution cut in the
    metric of x (Izenman 1975)."""
    gram, cross = (x.T @ x / len(x)).double(), (x.T @ wanted / len(x)).double()
    gram = gram + penalty * gram.diagonal().mean() * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )
    root = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(
        torch.linalg.solve_triangular(root, cross, upper=False), full_matrices=False
    )
    a = torch.linalg.solve_triangular(root.T, u[:, :rank] * s[:rank], upper=True).T
    return a.float(), vh[:rank].T.float()


def _streams(model: Any, roles: Mapping[int, Mapping[str, str]]) -> dict[Space, Part]:
    """Where the residual stream is seen in the middle and at the end of every layer: before the norm of the second half
    (which some families call post-attention, though it is not after but before), and at the layer's output."""
    out: dict[Space, Part] = {}
    for layer, names in roles.items():
        root = layer_module(names["down_proj"])
        held = dict(model.get_submodule(root).named_children())
        norm = next(
            (n for n in ("pre_feedforward_layernorm", "post_attention_layernorm") if n in held),
            None,
        )
        if norm is None:
            raise TransferError(
                f"transfer=shift: {root} has no norm between attention and MLP that is known here. Use procrustes."
            )
        out[layer, MIDDLE], out[layer, END] = Part(f"{root}.{norm}"), Part(root)
    return out


def _capture(
    run: Calibration, side: int, places: Mapping[Space, Part], texts: Sequence[PairedText]
) -> dict[Space, Tensor]:
    """Positions × width by space, on the target's device."""
    batches = list(
        seen_by(
            run.models[side], places, by_length(texts), side, run.config.batch_size, run.pads[side]
        )
    )
    device = run.target.device
    return {
        space: torch.cat(
            [now[space].to(device) for now in batches] or [torch.empty(0, 1, device=device)]
        )
        for space in places
    }


def _refuse_too_much(run: Calibration, streams: list[dict[Space, Part]], memory_gb: float) -> None:
    positions = sum(len(t.positions) for t in run.fit)
    widths = [model.config.get_text_config().hidden_size for model in run.models]
    needed = 4 * positions * (2 * len(streams[0]) * widths[0] + len(streams[1]) * widths[1]) / 2**30
    if needed > memory_gb:
        raise TransferError(
            f"transfer=shift keeps the residual streams of {positions} positions, {needed:.1f} GiB, more than "
            f"transfer.memory_gb={memory_gb:g}. Raise it, or lower transfer.positions."
        )


METHOD = Fit(fit)
