"""Stage `transfer`: an adapter of the source as an adapter of the target, by two maps a module.

    A_t = A_s·T_in        B_t = gain · T_out·B_s

The result has exactly the source's rank and ΔW is never formed. Which maps, a method decides (paw/transfer/methods).
No model is built: weights are read tensor by tensor, activations are known by their moments (paw/transfer/calibrate).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.schema import PlaceboConfig, TransferConfig, transient
from paw.errors import TransferError
from paw.models.adapters import Factors, read_adapter, stamp, write_adapter
from paw.models.load import Runtime
from paw.models.tensors import Weights, linear_shapes
from paw.store import Input, Stage, Watch, write_text
from paw.transfer import calibrate
from paw.transfer.modules import ROLES, by_layer, layer_of, matched_layers, pair_names

if TYPE_CHECKING:
    from paw.transfer.maps import Maps
    from paw.transfer.pairing import Pair

REPORT = "report.json"
STAGE = Stage("transfer", "1", "paw.transfer.stage:transfer")


@dataclass
class TransferStage:
    transfer: TransferConfig
    reference: TransferConfig | None  # of a placebo: the method whose result it spoils
    text: calibrate.CalibrateStage | None  # where moments are not kept but streamed
    runtime: Runtime
    base_name: str | None = transient(None)


def transfer(config: TransferStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> dict[str, Any]:
    """Moves every module that has a twin and passes the gate.

    Args:
        inputs: `adapter`, `source` and `target`; and what is known of activations: `moments`, or a text to stream
            (`calibration` or `data`), or nothing where weights are enough.

    Writes the adapter as a PEFT folder stamped with the target's fingerprint, and report.json with a row a module.

    Raises:
        TransferError: if the adapter does not fit the source, nothing has a twin or nothing passes the gate.
    """
    c = config.transfer
    recipe = Recipe.of(c, config.reference)
    adapter = read_adapter(inputs["adapter"].path)
    shapes_s, shapes_t = linear_shapes(inputs["source"].path), linear_shapes(inputs["target"].path)
    _refuse_misfit(adapter, shapes_s, inputs["adapter"].path)
    layers_s, layers_t = by_layer(shapes_s), by_layer(shapes_t)
    names = pair_names(adapter, layers_t, matched_layers(c.layers, len(layers_s), len(layers_t)))

    moved: dict[str, Factors] = {}
    rows: list[dict[str, Any]] = []
    for pair in _pairs(names, config, inputs, (shapes_s, shapes_t), watch):
        factors, row = _move(pair, adapter[pair.source], recipe)
        rows.append(row)
        if row["transferred"]:
            moved[pair.target] = factors
        watch.progress(len(rows), len(names), "modules")
    if not moved:
        best = max(row[_scale(c)] for row in rows)
        raise TransferError(
            f"transfer.similarity_threshold={c.similarity_threshold:g} lets no module through "
            f"(the largest {c.similarity} similarity is {best:.4f}). Lower it."
        )

    write_adapter(out, moved, config.base_name)
    origin = {"source": inputs["source"].fingerprint, "adapter": inputs["adapter"].fingerprint}
    stamp(out, inputs["target"].fingerprint, made_by="transfer", method=c.method, **origin)
    write_text(out / REPORT, json.dumps(rows, indent=1))
    used = {row["source"] for row in rows if row["transferred"]}
    return {
        "method": c.method,
        "coverage": len(used) / len(adapter),  # of the source adapter's modules
        "target_modules": len(moved),
        "target_coverage": len(moved) / sum(map(len, layers_t.values())),
        "similarity": sum(r["similarity"] for r in rows) / len(rows),
        "chance": sum(r["chance"] for r in rows) / len(rows),
    }


def _pairs(
    names: calibrate.Names,
    config: TransferStage,
    inputs: Mapping[str, Input],
    shapes: tuple[calibrate.Shapes, calibrate.Shapes],
    watch: Watch,
) -> Iterator[Pair]:
    """Pairs with their weights, and with what was seen of them on text."""
    from paw.transfer.pairing import Pair

    c, device = config.transfer, config.runtime.device
    groups: Iterator[calibrate.Group]
    if "moments" in inputs:
        groups = calibrate.stored(inputs["moments"].path, names, device)
    elif config.text is not None:
        groups = calibrate.streamed(config.text, inputs, names, shapes, c.memory_gb, watch)
    else:
        groups = iter([(names, {})])
    source, target = Weights(inputs["source"].path, device), Weights(inputs["target"].path, device)
    for group, sites in groups:
        for name_s, name_t in group:
            (layer_s, role), (layer_t, _) = layer_of(name_s), layer_of(name_t)
            reads, writes = (sites.get(((layer_s, place), (layer_t, place))) for place in (ROLES[role].reads, ROLES[role].writes))
            yield Pair(name_s, name_t, source[name_s], target[name_t], reads, writes, c.basis)


@dataclass(frozen=True)
class Recipe:
    """What happens to every module: a method's maps with its configuration, and for a placebo how the result is spoilt."""

    config: TransferConfig
    maps: Callable[[Pair], Maps]
    spoil: Callable[[Any, Any], tuple[Any, Any]] | None = None

    @staticmethod
    def of(config: TransferConfig, reference: TransferConfig | None) -> Recipe:
        import torch

        from paw.transfer.methods import Method, method_named

        found = method_named(config.method)
        if isinstance(found, Method):
            return Recipe(config, lambda pair: found.maps(pair, config))
        assert isinstance(config, PlaceboConfig)
        assert reference is not None
        generator = torch.Generator().manual_seed(config.seed)
        return Recipe(config, Recipe.of(reference, None).maps, lambda a, b: found.spoil(a, b, generator))


def _move(pair: Pair, factors: Factors, recipe: Recipe) -> tuple[Factors, dict[str, Any]]:
    """The pair's factors on the target, and its row of the report."""
    c, maps, device = recipe.config, recipe.maps(pair), pair.w_t.device
    a, b = maps.t_in.right(factors.a.to(device)), maps.t_out.left(factors.b.to(device))
    b = b * _gain(pair, factors, Factors(a, b), c.gain)
    if recipe.spoil:
        a, b = recipe.spoil(a, b)
    new = Factors(a.float().cpu(), b.float().cpu())
    similarity, chance = _similarity(pair, maps)
    row: dict[str, Any] = {
        "source": pair.source,
        "target": pair.target,
        "similarity": similarity,
        "chance": chance,
        "excess": similarity - chance,
        "norm_before": factors.norm(),
        "norm_after": new.norm(),
        "relative_before": factors.norm() / float(pair.w_s.norm()),
        "relative_after": new.norm() / float(pair.w_t.norm()),
    }
    row["transferred"] = row[_scale(c)] >= c.similarity_threshold
    return new, row


def _scale(c: TransferConfig) -> str:
    return "similarity" if c.similarity == "raw" else "excess"


def _similarity(pair: Pair, maps: Maps) -> tuple[float, float]:
    """How much of the target's top singular subspaces the source's fill once mapped, mean of both sides; and its chance
    level. For equal shapes and the identity this is Φ of the weights; for cross_lora it is 1 by construction."""
    from paw.transfer.linalg import overlap

    (u_s, v_s), (u_t, v_t) = pair.basis_s, pair.basis_t
    out, into = overlap(maps.t_out.left(u_s), u_t), overlap(maps.t_in.right(v_s.T).T, v_t)
    return (out + into) / 2, (pair.k / len(u_t) + pair.k / len(v_t)) / 2


def _gain(pair: Pair, old: Factors, new: Factors, gain: str) -> float:
    """The factor on ΔW_t.

    `activation`: its output has the share of the module's own output energy that ΔW_s has, on the same text:
    tr((BᵀB)(A C Aᵀ)) / tr(W C Wᵀ), C the second moment of the module's input. `weight`: ‖ΔW‖/‖W‖ is kept.
    """
    if gain == "none":
        return 1.0
    if gain == "weight":
        return (old.norm() / float(pair.w_s.norm())) / max(new.norm() / float(pair.w_t.norm()), 1e-30)
    if gain != "activation":
        return float(gain)
    reads, _ = pair.seen()
    share_s = _energy(old.a.to(pair.w_s.device), old.b.to(pair.w_s.device), reads.gram_s, pair.w_s)
    share_t = _energy(new.a, new.b, reads.gram_t, pair.w_t)
    return float((share_s / max(share_t, 1e-30)) ** 0.5)


def _energy(a: Any, b: Any, gram: Any, w: Any) -> float:
    return float(((b.T @ b) * (a @ gram @ a.T)).sum().clamp_min(0) / ((w @ gram) * w).sum())


def _refuse_misfit(adapter: Mapping[str, Factors], shapes: calibrate.Shapes, folder: Path) -> None:
    for name, factors in adapter.items():
        if name not in shapes:
            raise TransferError(f"{folder}: the source's files have no weight called {name}. Was the adapter trained on another base?")
        if tuple(shapes[name]) != (factors.b.shape[0], factors.a.shape[1]):
            raise TransferError(f"{folder}: {name} of the adapter does not fit the source model. Was it trained on another base?")
