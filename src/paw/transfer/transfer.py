"""Stage `transfer`: every module of the source's adapter on its twin in the target, by two maps.

    A_t = A_s·T_in        B_t = gain · T_out·B_s

The result has exactly the source's rank (of DoRA twice that) and ΔW is never formed. Which maps, a
method decides (paw/transfer/methods). No model is built: weights are read tensor by tensor,
activations are known by their moments (paw/transfer/evidence). Only methods that correct themselves
along the depth run the models. Which of the modules are used, stage `gate` decides, so that a sweep
over thresholds computes the maps once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.checks import transient
from paw.errors import TransferError
from paw.models.adapters import Factors, has_magnitudes
from paw.models.load import Runtime
from paw.models.tensors import Weights, module_parts
from paw.store import Input, Stage, Watch
from paw.transfer.checks import plan
from paw.transfer.config import TransferConfig
from paw.transfer.dora import folded
from paw.transfer.evidence import Evidence, evidence
from paw.transfer.figures import Row, measured, norms
from paw.transfer.gain import gain_of
from paw.transfer.layers import matched_layers
from paw.transfer.methods import Fit, method_named
from paw.transfer.model_pair import TextConfig
from paw.transfer.modules import Layers, Names, by_layer, layer_of
from paw.transfer.moved import Moved, write_moved
from paw.transfer.pairing import Pair
from paw.transfer.prefetch import ahead, module_pairs
from paw.transfer.verdict import feasibility, mean

if TYPE_CHECKING:
    from paw.transfer.methods import MapsOf


Pairs = Iterator[tuple[Factors, Row]]


@dataclass(kw_only=True)
class TransferStage:
    transfer: TransferConfig  # with the gate's fields at their defaults
    text: TextConfig | None  # None where weights are enough
    runtime: Runtime
    bases: str | None = transient(None)  # where singular bases are kept
    # Whether code of the source's, of the target's folder is run.
    trust: tuple[bool, bool] = transient((False, False))


@dataclass(frozen=True, kw_only=True)
class TransferResult:
    """Figures that are None were not measured: by a method without maps, or where no text was run.
    Means are over pairs of modules."""

    method: str
    pairs: int  # of a module of the source and one of the target
    similarity: float | None = None
    chance: float | None = None  # of the similarity
    r2_in: float | None = None
    r2_out: float | None = None
    feasibility: str = "unknown"
    why: str = ""
    # of a DoRA adapter: the share of its change's energy that its factors do not hold
    left_of_magnitudes: float | None = None

    def __str__(self) -> str:
        said = f"{self.pairs} pairs of modules"
        if self.similarity is not None:
            said += f"; similarity {self.similarity:.3f} (chance {self.chance:.3f})"
        if self.r2_in is not None:
            said += f"; maps explain {self.r2_in:.2f} in, {self.r2_out:.2f} out"
        if self.left_of_magnitudes is not None:
            said += f"; DoRA folded, {self.left_of_magnitudes:.0%} left out"
        return said

    @property
    def said(self) -> str:
        """What that says of its chances."""
        return f"Feasibility: {self.feasibility}. {self.why}"


def transfer(
    config: TransferStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> TransferResult:
    """Moves every module that has a twin.

    Args:
        inputs: `adapter`, `source` and `target`; where a text is used `calibration`, and
            `moments`, the artifact of stage `calibrate`, for methods that do not run the models;
            `match` where layers are matched by similarity.

    Writes what stage `gate` reads: the factors of every pair, and a row of figures for each.

    Raises:
        TransferError: if the adapter does not fit the source, or nothing has a twin.
    """
    c = config.transfer
    layers = matched_layers(c.layers, c.spread, inputs)
    adapter, names = plan(
        inputs["adapter"].path, inputs["source"].path, inputs["target"].path, layers, c.modules
    )
    lost = None
    if has_magnitudes(inputs["adapter"].path):
        weights = Weights(inputs["source"].path, config.runtime.device)
        parts = module_parts(inputs["source"].path)
        adapter, lost = folded(inputs["adapter"].path, adapter, weights, parts)
        watch.say(
            f"DoRA's magnitudes folded into factors of twice the rank, which leave out {lost:.0%} "
            "of what it changes"
        )
    known = evidence(
        config.text, inputs, memory_gb=c.memory_gb, device=config.runtime.device, watch=watch
    )
    method = method_named(c.method)
    if isinstance(method, Fit):
        moved = _fitted(adapter, method, known, layers, config, inputs, watch)
    else:
        assert method.maps is not None, f"transfer={c.method} spoils the result of another method"
        moved = _mapped(adapter, names, method.maps, known, config, inputs, watch)
    found = list(moved)
    if not found:
        raise TransferError(
            f"transfer.modules={c.modules}: transfer={c.method} adapts none of these. Leave it out."
        )
    rows = [row for _, row in found]
    write_moved(out, Moved(found=found, layers=layers, modules=list(adapter)))
    word, why = feasibility(rows)
    figures: dict[str, Any] = {
        key: mean(rows, key) for key in ("similarity", "chance", "r2_in", "r2_out")
    }
    return TransferResult(
        method=c.method,
        pairs=len(rows),
        feasibility=word,
        why=why,
        left_of_magnitudes=lost,
        **figures,
    )


STAGE = Stage(
    "transfer",
    "6",
    "paw.transfer.transfer:transfer",
    config=TransferStage,
    result=TransferResult,
    devices="one",
)


def _mapped(
    adapter: Mapping[str, Factors],
    names: Names,
    maps_of: MapsOf,
    known: Evidence,
    config: TransferStage,
    inputs: Mapping[str, Input],
    watch: Watch,
) -> Pairs:
    """Factors on the target with their rows of the report, by a method's maps."""
    targets, c = Counter(source for source, _ in names), config.transfer
    pairs = ahead(module_pairs(adapter, names, known, config, inputs), c.workers)
    for done, pair in enumerate(pairs, 1):
        share = 1 / targets[pair.source.name] if c.spread else 1.0
        yield _move(pair, adapter[pair.source.name], maps_of, c, share)
        watch.progress(done, len(names), "modules")


def _move(
    pair: Pair, factors: Factors, maps_of: MapsOf, c: TransferConfig, share: float = 1.0
) -> tuple[Factors, Row]:
    """The pair's factors on the target, and its row of the report.

    Args:
        share: of the source module's update, where it goes to several modules of the target.
    """
    maps, device = maps_of(pair, c), pair.target.basis.u.device
    a, b = maps.t_in.right(factors.a.to(device)), maps.t_out.left(factors.b.to(device))
    mapped = Factors(a, b)
    b = b * (share * gain_of(pair, factors, mapped, c.gain))
    new = Factors(a.float().cpu(), b.float().cpu())
    if not math.isfinite(new.norm()):
        raise TransferError(
            f"{pair.target.name}: its factors are not finite. Is the calibration text of one kind "
            "only, or a penalty 0?"
        )
    return new, {
        "source": pair.source.name,
        "target": pair.target.name,
        **norms((factors, pair.source.basis.norm), (new, pair.target.basis.norm)),
        **measured(pair, maps, factors, mapped),
    }


def _fitted(
    adapter: Mapping[str, Factors],
    method: Fit,
    known: Evidence,
    layers: Layers,
    config: TransferStage,
    inputs: Mapping[str, Input],
    watch: Watch,
) -> Pairs:
    """The same by a method's own fit. It may adapt other modules than the source's."""
    found = method.fit(adapter, known.models(), layers, config.transfer, watch)
    source, target = (
        Weights(inputs[name].path, config.runtime.device) for name in ("source", "target")
    )
    twins, roles = {t: s for s, t in layers}, by_layer(source.shapes)
    for name, fitted in found.items():
        layer, role = layer_of(name)
        if config.transfer.modules and role not in config.transfer.modules:
            continue
        twin = roles[twins[layer]][role]
        before = adapter.get(twin, Factors(fitted.a[:0], fitted.b[:, :0]))
        each = (before, float(source[twin].norm())), (fitted, float(target[name].norm()))
        yield fitted, {"source": twin, "target": name, **norms(*each)}
