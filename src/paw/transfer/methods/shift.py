"""Residual-shift matching: at every half layer of the target, what its residual stream still lacks
of the shift that the adapter gives the source's, seen through a map of the streams, is regressed on
the inputs of the module that writes next.

Wanted at half layer h: n(r_t') − n(r_t) ≈ T_h (n(r_s') − n(r_s)), n the division by the root mean
square that the next layer's norm begins with, T_h by ridge from n(r_s) to n(r_t), its λ chosen on
held-out positions. Positions whose stream is far longer than the others' (attention sinks) are left
out. The half layers are fitted in order, the target carrying what was fitted so far, so each
corrects what the earlier ones missed; how far each goes is what serves held-out positions best,
between nothing and all of it. Adapts o_proj and down_proj only, at the source adapter's rank, by
reduced-rank regression. No labels and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from paw.config.checks import within
from paw.errors import TransferError
from paw.models.adapters import Factors
from paw.models.layout import Part
from paw.transfer.methods import Fit, TransferConfig
from paw.transfer.modules import Layers, Place, Space, by_layer, layer_module

if TYPE_CHECKING:
    from torch import Tensor

    from paw.store import Watch
    from paw.transfer.activations import PairedText
    from paw.transfer.model_pair import ModelPair

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

# Of a layer: the stream between its halves, and after it.
MIDDLE, END = Place("gate_proj", "stream"), Place("layer", "out")
WRITERS = ((MIDDLE, "o_proj"), (END, "down_proj"))
SINK = 10  # times the median length of a stream's positions


@dataclass
class ShiftConfig(TransferConfig):
    """Its gain is what the regression finds: `transfer.gain` is not used."""

    # λ of the map between residual streams, in units of the mean diagonal of the Gram matrix; null
    # chooses it on held-out positions.
    map_penalty: Optional[float] = None
    penalty: float = 0.1  # λ of the regression on what enters a module

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map_penalty is not None:
            within("transfer.map_penalty", self.map_penalty, 0, 1e6)
        within("transfer.penalty", self.penalty, 0, 1e6)


def fit(
    adapter: Mapping[str, Factors],
    run: ModelPair,
    layers: Layers,
    config: ShiftConfig,
    watch: Watch,
) -> dict[str, Factors]:
    """The target's factors by module, fitted half layer after half layer.

    Raises:
        TransferError: where the streams that are kept do not fit into memory, or an architecture
            has no norm between attention and MLP that is known here.
    """
    twins = {t: s for s, t in layers}
    roles = [by_layer(parts) for parts in run.parts]
    streams = [_streams(run.models[side], roles[side]) for side in (0, 1)]
    _refuse_too_much(run, streams, config.memory_gb)
    rank = max(factors.rank for factors in adapter.values())

    texts = (run.fit, run.held)
    plain = [_capture(run, 1, streams[1], each) for each in texts]
    before, after = _of_source(adapter, run, streams[0])
    out: dict[str, Factors] = {}
    steps = [(layer, *writer) for layer in sorted(twins) for writer in WRITERS]
    for done, (layer, half, role) in enumerate(steps, 1):
        stream, twin, module = (layer, half), (twins[layer], half), roles[1][layer][role]
        entering = (layer, Place(role, "in"))
        seen = {stream: streams[1][stream], entering: run.parts[1][module]}
        with adapted(run.target, run.parts[1], out):
            now = [_capture(run, 1, seen, each) for each in texts]
        fit, held = (
            Half.of(
                before[i][twin],
                after[i][twin],
                plain[i][stream],
                now[i][stream],
                now[i][entering],
            )
            for i in (0, 1)
        )
        t = _map(fit, held, config.map_penalty)
        a, b = reduced_rank(fit.x, fit.lacking(t), config.penalty, rank)
        out[module] = Factors(a.cpu(), (b * _step(held, t, a, b)).cpu())
        watch.progress(done, len(steps), "half layers")
    return out


@dataclass(frozen=True)
class Half:
    """One half layer at N positions, its streams as the next layer's norm leaves them."""

    source: Tensor  # N×d_s, without the adapter
    shift: Tensor  # N×d_s, what the adapter adds
    target: Tensor  # N×d_t, without one
    done: Tensor  # N×d_t, what was fitted so far adds
    x: Tensor  # N×n, what enters the module, divided like the stream that it adds to

    @classmethod
    def of(cls, before: Tensor, after: Tensor, plain: Tensor, now: Tensor, x: Tensor) -> Half:
        """Of streams (N×width) as they are, and what enters the module (N×n)."""
        lengths = [_rms(each) for each in (before, after, plain, now)]
        kept = _usual(lengths[0]) & _usual(lengths[2])
        s, s2, t, t2 = (
            (each / length)[kept]
            for each, length in zip((before, after, plain, now), lengths, strict=True)
        )
        return cls(s, s2 - s, t, t2 - t, (x / lengths[3])[kept])

    def lacking(self, t: Tensor) -> Tensor:
        return self.shift @ t.T - self.done


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)


def _usual(lengths: Tensor) -> Tensor:
    found: Tensor = lengths[:, 0] <= SINK * lengths.median() if len(lengths) else lengths[:, 0] > 0
    return found


def _map(fit: Half, held: Half, penalty: float | None) -> Tensor:
    """T_h: d_t×d_s."""
    from paw.transfer.linalg import best_penalty, ridge

    n = len(fit.source)
    cross, gram = fit.target.T @ fit.source / n, fit.source.T @ fit.source / n
    if penalty is None:
        penalty = best_penalty(cross, gram, held.source, held.target)
    return ridge(cross, gram, penalty)


def _step(held: Half, t: Tensor, a: Tensor, b: Tensor) -> float:
    """The share of a correction, from 0 to 1, that leaves the least lacking at positions held out;
    all of it where none are."""
    if len(held.x) < 2:
        return 1.0
    change = held.x @ a.T @ b.T
    energy = float(change.square().sum())
    wanted = float((held.lacking(t) * change).sum())
    return min(1.0, max(0.0, wanted / energy)) if energy > 0 else 0.0


def _of_source(
    adapter: Mapping[str, Factors], run: ModelPair, streams: Mapping[Space, Part]
) -> tuple[list[dict[Space, Tensor]], list[dict[Space, Tensor]]]:
    """The source's residual streams (positions × width, by space) without its adapter and with it,
    where it is fitted and where it is held out; in random order for the placebo of a right
    pairing."""
    import torch

    texts = (run.fit, run.held)
    before = [_capture(run, 0, streams, each) for each in texts]
    with adapted(run.source, run.parts[0], adapter):
        after = [_capture(run, 0, streams, each) for each in texts]
    if run.config.shuffle is not None:
        generator = torch.Generator().manual_seed(run.config.shuffle)
        for both in zip(before, after, strict=True):
            positions = len(next(iter(both[0].values())))
            order = torch.randperm(positions, generator=generator).to(run.target.device)
            for found in both:
                found.update({space: x[order] for space, x in found.items()})
    return before, after


@contextmanager
def adapted(
    model: Any, parts: Mapping[str, Part], factors: Mapping[str, Factors]
) -> Iterator[None]:
    """The model with B·A added to its modules for as long as the block lasts."""
    hooks = []
    for name, f in factors.items():
        module = model.get_submodule(parts[name].module)
        a, b = (m.to(module.weight.device, model.dtype) for m in (f.a, f.b))
        hook = _adding(a, b, parts[name].rows or slice(None))
        hooks.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(a: Tensor, b: Tensor, rows: slice) -> Any:
    def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output[..., rows] += inputs[0] @ a.T @ b.T

    return add


def reduced_rank(x: Tensor, wanted: Tensor, penalty: float, rank: int) -> tuple[Tensor, Tensor]:
    """The best (A: rank×n, B: m×rank) with wanted (N×m) ≈ x Aᵀ Bᵀ (x: N×n), ridge-regularised: the
    full solution cut in the metric of x (Izenman 1975)."""
    import torch
    from torch.linalg import solve_triangular

    gram, cross = (x.T @ x / len(x)).double(), (x.T @ wanted / len(x)).double()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky(gram + penalty * gram.diagonal().mean() * eye)
    solved = solve_triangular(root, cross, upper=False)
    u, s, vh = torch.linalg.svd(solved, full_matrices=False)
    a = solve_triangular(root.T, u[:, :rank] * s[:rank], upper=True).T
    return a.float(), vh[:rank].T.float()


def _streams(model: Any, roles: Mapping[int, Mapping[str, str]]) -> dict[Space, Part]:
    """Where the residual stream is seen in the middle and at the end of every layer: before the
    norm of the second half (which some families call post-attention, though it is not after but
    before), and at the layer's output."""
    out: dict[Space, Part] = {}
    for layer, names in roles.items():
        root = layer_module(names["down_proj"])
        held = dict(model.get_submodule(root).named_children())
        known = ("pre_feedforward_layernorm", "post_attention_layernorm")
        norm = next((name for name in known if name in held), None)
        if norm is None:
            raise TransferError(
                f"transfer=shift: {root} has no norm between attention and MLP that is known "
                "here. Use procrustes."
            )
        out[layer, MIDDLE], out[layer, END] = Part(f"{root}.{norm}"), Part(root)
    return out


def _capture(
    run: ModelPair, side: int, places: Mapping[Space, Part], texts: Sequence[PairedText]
) -> dict[Space, Tensor]:
    """Positions × width by space, on the target's device."""
    import torch

    from paw.transfer.activations import by_length, seen_by

    size, pad = run.config.batch_size, run.pads[side]
    batches = list(seen_by(run.models[side], places, by_length(texts), side, size, pad))
    device = run.target.device
    none = [torch.empty(0, 1, device=device)]
    return {
        space: torch.cat([now[space].to(device) for now in batches] or none) for space in places
    }


def _refuse_too_much(run: ModelPair, streams: list[dict[Space, Part]], memory_gb: float) -> None:
    positions = sum(len(t.positions) for t in run.fit)
    widths = [model.config.get_text_config().hidden_size for model in run.models]
    numbers = 2 * len(streams[0]) * widths[0] + len(streams[1]) * widths[1]
    needed = 4 * positions * numbers / 2**30
    if needed > memory_gb:
        raise TransferError(
            f"transfer=shift keeps the residual streams of {positions} positions, {needed:.1f} GiB,"
            f" more than transfer.memory_gb={memory_gb:g}. Raise it, or lower transfer.positions."
        )


METHOD = Fit(fit, ShiftConfig)
