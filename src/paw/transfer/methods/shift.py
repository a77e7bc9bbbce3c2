"""Residual-shift matching: at every half layer of the target, what its residual stream still lacks
of the shift that the adapter gives the source's, seen through a map of the streams, is regressed on
the inputs of the module that writes next.

Wanted at half layer h: n(r_t') − n(r_t) ≈ T_h (n(r_s') − n(r_s)), n the division by the root mean
square that the next layer's norm begins with, T_h by ridge from n(r_s) to n(r_t), its λ chosen on
held-out positions. Positions whose stream is far longer than the others' (attention sinks) are left
out. The half layers are fitted in order, the target carrying what was fitted so far, so each
corrects what the earlier ones missed; it goes as far, between nothing and all of it, as leaves the
least lacking at positions held out, so that none makes it worse there. Adapts o_proj and down_proj
only, at the source adapter's rank, by reduced-rank regression. No labels and no gradient.
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
STEPS = (1.0, 0.5, 0.25)  # of a correction; or none


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

    fit, held = _known(adapter, run, streams)
    out: dict[str, Factors] = {}
    steps = [(layer, *writer) for layer in sorted(twins) for writer in WRITERS]
    for done, (layer, half, role) in enumerate(steps, 1):
        module, stream = roles[1][layer][role], (layer, half)
        at = Writer(
            module=module,
            stream=stream,
            twin=(twins[layer], half),
            role=role,
            seen=streams[1][stream],
        )
        seen, judge = at.half(run, fit, out), at.half(run, held, out)
        t = _map(seen, judge, config.map_penalty)
        a, b = reduced_rank(seen.x, seen.lacking(t), config.penalty, rank)
        left = {
            step: float(at.half(run, held, out | {module: Factors(a, step * b)}).lacking(t).norm())
            for step in STEPS
        } | {0.0: float(judge.lacking(t).norm())}
        # the first of equals: where no position is held out it goes all the way
        out[module] = Factors(a.cpu(), min(left, key=left.__getitem__) * b.cpu())
        watch.progress(done, len(steps), "half layers")
    return out


@dataclass(frozen=True)
class Known:
    """A text, and the streams (positions × width, by space) that no fit changes."""

    texts: Sequence[PairedText]
    before: Mapping[Space, Tensor]  # the source's without its adapter
    after: Mapping[Space, Tensor]  # with it
    plain: Mapping[Space, Tensor]  # the target's without one


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A module of the target that writes to the stream, and the half layer that ends with it."""

    module: str
    stream: Space
    twin: Space  # the source's
    role: str
    seen: Part  # where the stream is seen

    def half(self, run: ModelPair, known: Known, found: Mapping[str, Factors]) -> Half:
        """The half layer on a text, the target with what was found so far."""
        entering = (self.stream[0], Place(self.role, "in"))
        places = {self.stream: self.seen, entering: run.parts[1][self.module]}
        with adapted(run.target, run.parts[1], found):
            now = _capture(run, 1, places, known.texts)
        each = (known.before[self.twin], known.after[self.twin], known.plain[self.stream])
        return Half.of(*each, now[self.stream], now[entering])


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


def _known(
    adapter: Mapping[str, Factors], run: ModelPair, streams: Sequence[Mapping[Space, Part]]
) -> list[Known]:
    """Of the text that is fitted on, and of what is held out. The source's positions are in random
    order for the placebo of a right pairing."""
    import torch

    texts = (run.fit, run.held)
    before = [_capture(run, 0, streams[0], each) for each in texts]
    with adapted(run.source, run.parts[0], adapter):
        after = [_capture(run, 0, streams[0], each) for each in texts]
    if run.config.shuffle is not None:
        generator = torch.Generator().manual_seed(run.config.shuffle)
        for both in zip(before, after, strict=True):
            positions = len(next(iter(both[0].values())))
            order = torch.randperm(positions, generator=generator).to(run.target.device)
            for found in both:
                found.update({space: x[order] for space, x in found.items()})
    plain = [_capture(run, 1, streams[1], each) for each in texts]
    return [Known(*each) for each in zip(texts, before, after, plain, strict=True)]


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
