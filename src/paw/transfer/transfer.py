"""Stage `transfer`: an adapter of the source as an adapter of the target, by two maps a module.

    A_t = A_s·T_in        B_t = gain · T_out·B_s

The result has exactly the source's rank and ΔW is never formed. Which maps, a method decides (paw/transfer/methods).
No model is built: weights are read tensor by tensor, activations are known by their moments (paw/transfer/calibrate).
Only methods that correct themselves along the depth run the models.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.checks import transient
from paw.errors import TransferError
from paw.models.adapters import Factors, fused, read_adapter, stamp, unfused, write_adapter
from paw.models.layout import heads
from paw.models.load import Runtime, load_tokenizer
from paw.models.tensors import Weights, linear_shapes, module_parts
from paw.store import Input, Stage, Watch
from paw.transfer import calibrate
from paw.transfer.config import TransferConfig
from paw.transfer.modules import ROLES, by_layer, layer_of, pair_names
from paw.transfer.report import write_report
from paw.transfer.verdict import feasibility, mean

if TYPE_CHECKING:
    from paw.transfer.maps import Maps
    from paw.transfer.methods import Fit, Method
    from paw.transfer.pairing import Pair, Side, Site

EMBEDDINGS = "model.embed_tokens"
STAGE = Stage("transfer", "3", "paw.transfer.transfer:transfer")

Row = dict[str, Any]
Moved = Iterator[tuple[Factors, Row]]


@dataclass
class TransferStage:
    transfer: TransferConfig
    layers: list[tuple[int, int]]  # matched ones: source, target
    text: (
        calibrate.CalibrateStage | None
    )  # where moments are not kept but streamed, or the models are run
    runtime: Runtime
    base_name: str | None = transient(None)
    bases: str | None = transient(None)  # where singular bases are kept
    trust: tuple[bool, bool] = transient(
        (False, False)
    )  # code of the source's, of the target's folder


def transfer(
    config: TransferStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> dict[str, Any]:
    """Moves every module that has a twin and passes the gate.

    Args:
        inputs: `adapter`, `source` and `target`; and what is known of activations: `moments`, or a text to run
            (`calibration` or `data`), or nothing where weights are enough; `match` for the report's picture.

    Writes the adapter as a PEFT folder stamped with where it comes from, and a report: report.json with a row a module,
    report.md and report.png.

    Raises:
        TransferError: if the adapter does not fit the source, nothing has a twin or nothing passes the gate.
    """
    c = config.transfer
    adapter, names = plan(inputs, config.layers, c.modules)
    found = list(_moved(adapter, names, config, inputs, watch))
    rows = [row for _, row in found]
    left = _gate(rows, c)
    used, parts = set(), dict[str, list[Factors]]()
    for factors, row in found:
        if row["transferred"]:
            used.add(row["source"])
            parts.setdefault(row["target"], []).append(factors)
    joined = {name: _joined(several) for name, several in parts.items()}
    write_adapter(out, fused(joined, module_parts(inputs["target"].path)), config.base_name)
    word, why = feasibility(rows)
    linears = layers_of(inputs["target"].path)
    result = {
        "method": c.method,
        "coverage": len(used & adapter.keys()) / len(adapter),  # of the source adapter's modules
        "target_modules": len(joined),
        "target_coverage": len(joined) / sum(map(len, linears.values())),
        **{
            key: mean(rows, key)
            for key in ("similarity", "chance", "weights", "kept_energy", "r2_in", "r2_out")
        },
        "left": left,
        "feasibility": word,
        "why": why,
    }
    origin = {
        name: {"fingerprint": i.fingerprint, "path": str(i.path)}
        for name, i in inputs.items()
        if name in ("source", "target", "adapter")
    }
    stamp(
        out,
        inputs["target"].fingerprint,
        made_by="transfer",
        config=asdict(c),
        **origin,
        figures=result,
    )
    write_report(out, rows, result, config.layers, inputs.get("match"))
    return result


def plan(
    inputs: Mapping[str, Input], layers: Sequence[tuple[int, int]], roles: Sequence[str] = ()
) -> tuple[dict[str, Factors], calibrate.Names]:
    """The adapter's factors, fused modules as their parts, and the pairs of modules that they are moved between. All that
    can be wrong with an adapter and two models is found here, before anything is computed.

    Raises:
        AdapterError, ModelError: for damaged files.
        TransferError: where the adapter does not fit the source, or no module of it has a twin.
    """
    source, target, folder = inputs["source"].path, inputs["target"].path, inputs["adapter"].path
    adapter = fitting(folder, source, "source")
    return adapter, pair_names(adapter, layers_of(target), layers, roles)


def fitting(folder: Path, base: Path, side: str) -> dict[str, Factors]:
    """An adapter's factors by module, fused modules as their parts.

    Args:
        side: source or target, for messages.

    Raises:
        TransferError: where they do not fit the base's weights.
    """
    adapter, shapes = unfused(read_adapter(folder), module_parts(base)), linear_shapes(base)
    for name, factors in adapter.items():
        if name not in shapes:
            raise TransferError(
                f"{folder}: the {side}'s files have no weight called {name}. Was the adapter trained on another base?"
            )
        if shapes[name] != (factors.b.shape[0], factors.a.shape[1]):
            raise TransferError(
                f"{folder}: {name} of the adapter does not fit the {side} model. Was it trained on another base?"
            )
    return adapter


def layers_of(folder: Path) -> dict[int, dict[str, str]]:
    """A model's modules by layer and role.

    Raises:
        TransferError: for an architecture that has none which is known here.
    """
    found = by_layer(linear_shapes(folder))
    if not found:
        raise TransferError(
            f"{folder}: none of its weights is a {', '.join(ROLES)} of a layer; this architecture is not known here."
        )
    return found


def _moved(
    adapter: Mapping[str, Factors],
    names: calibrate.Names,
    config: TransferStage,
    inputs: Mapping[str, Input],
    watch: Watch,
) -> Moved:
    """Factors on the target with their rows of the report, by the method's maps or by its own fit."""
    from paw.transfer.methods import Fit, Method, method_named

    method = method_named(config.transfer.method)
    if isinstance(method, Fit):
        return _fitted(adapter, method, config, inputs, watch)
    assert isinstance(method, Method)
    return _mapped(adapter, names, method, config, inputs, watch)


# ---- by maps ----------------------------------------------------------------------------------------


def _mapped(
    adapter: Mapping[str, Factors],
    names: calibrate.Names,
    method: Method,
    config: TransferStage,
    inputs: Mapping[str, Input],
    watch: Watch,
) -> Moved:
    targets = Counter(source for source, _ in names)
    for done, pair in enumerate(_pairs(adapter, names, config, inputs, watch), 1):
        share = 1 / targets[pair.source.name] if config.transfer.spread else 1.0
        yield _move(pair, adapter[pair.source.name], method, config.transfer, share)
        watch.progress(done, len(names), "modules")


def _pairs(
    adapter: Mapping[str, Factors],
    names: calibrate.Names,
    config: TransferStage,
    inputs: Mapping[str, Input],
    watch: Watch,
) -> Iterator[Pair]:
    """Pairs with what was seen of them on text; weights are read and decomposed `workers` pairs ahead."""
    from paw.transfer.pairing import Pair

    c, device, models = config.transfer, config.runtime.device, (inputs["source"], inputs["target"])
    source, target = (Weights(model.path, device) for model in models)
    groups: Iterator[calibrate.Group]
    if "moments" in inputs:
        groups = calibrate.stored(inputs["moments"].path, names, device)
    elif config.text is not None:
        groups = calibrate.streamed(
            config.text, inputs, names, (source.shapes, target.shapes), c.memory_gb, watch
        )
    else:
        groups = iter([(names, {})])
    sides = [
        _sides(weights, model, config)
        for weights, model in zip((source, target), models, strict=True)
    ]
    residual = _residual((source, target), models, config) if c.evidence == "embeddings" else None
    attention = (heads(models[0].path), heads(models[1].path))

    def ready(pair: Pair) -> Pair:
        _ = pair.source.basis, pair.target.basis
        return pair

    ahead: deque[Future[Pair]] = deque()
    with ThreadPoolExecutor(c.workers) as pool:
        for group, sites in groups:
            for name_s, name_t in group:
                (layer_s, _), (layer_t, _) = layer_of(name_s), layer_of(name_t)
                shared = {
                    t[1]: site
                    for (s, t), site in sites.items()
                    if (s[0], t[0]) == (layer_s, layer_t)
                }
                pair = Pair(
                    sides[0](name_s),
                    sides[1](name_t),
                    shared,
                    c.basis,
                    attention,
                    residual,
                    adapter[name_s],
                )
                ahead.append(pool.submit(ready, pair))
                if len(ahead) > c.workers:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _sides(weights: Weights, model: Input, config: TransferStage) -> Callable[[str], Side]:
    """Modules of one model by name; weights and bases are found when asked for."""
    from paw.transfer.bases import Bases
    from paw.transfer.pairing import Side

    bases, device = Bases(config.bases, model.fingerprint), config.runtime.device

    def side(name: str) -> Side:
        read, shape = partial(weights.__getitem__, name), weights.shapes[name]
        return Side(name, shape, read, lambda k: bases.of(name, shape, k, read, device))

    return side


def _residual(
    weights: tuple[Weights, Weights], models: tuple[Input, Input], config: TransferStage
) -> Site:
    from paw.transfer.anchors import embedding_site, shared_tokens

    for each, model in zip(weights, models, strict=True):
        if EMBEDDINGS not in each.shapes:
            raise TransferError(
                f"{model.path}: has no {EMBEDDINGS}, which transfer=embedding looks at. Use another method."
            )
    source, target = (
        load_tokenizer(model.path, trust) for model, trust in zip(models, config.trust, strict=True)
    )
    return embedding_site(
        weights[0][EMBEDDINGS], weights[1][EMBEDDINGS], shared_tokens(source, target)
    )


def _move(
    pair: Pair, factors: Factors, method: Method, c: TransferConfig, share: float = 1.0
) -> tuple[Factors, Row]:
    """The pair's factors on the target, and its row of the report."""
    maps, device = method.maps(pair, c), pair.target.basis.u.device
    a, b = maps.t_in.right(factors.a.to(device)), maps.t_out.left(factors.b.to(device))
    mapped = Factors(a, b).norm()
    b = b * (share * _gain(pair, factors, Factors(a, b), c.gain))
    new = Factors(a.float().cpu(), b.float().cpu())
    if not math.isfinite(new.norm()):
        raise TransferError(
            f"{pair.target.name}: its factors are not finite. Is the calibration text of one kind only, or a penalty 0?"
        )
    similarity, chance = _similarity(pair, maps)
    r2_in, r2_out = _explained(pair, maps)
    return new, {
        "source": pair.source.name,
        "target": pair.target.name,
        **_norms((factors, pair.source.basis.norm), (new, pair.target.basis.norm)),
        "similarity": similarity,
        "chance": chance,
        "excess": similarity - chance,
        "phi": _phi(pair),
        "weights": _weights(pair),
        "weights_chance": 1 / max(pair.source.shape[0], pair.target.shape[0]),
        "kept_energy": (mapped / max(factors.norm(), 1e-30)) ** 2,
        "r2_in": r2_in,
        "r2_out": r2_out,
    }


def _norms(before: tuple[Factors, float], after: tuple[Factors, float]) -> Row:
    """‖ΔW‖, and beside the norm of its weight."""
    row: Row = {}
    for when, (factors, weight) in (("before", before), ("after", after)):
        row |= {
            f"norm_{when}": factors.norm(),
            f"relative_{when}": factors.norm() / max(weight, 1e-30),
        }
    return row


def _similarity(pair: Pair, maps: Maps) -> tuple[float, float]:
    """How much of the target's top singular subspaces the source's fill once mapped, mean of both sides; and its chance
    level. For equal shapes and the identity this is Φ of the weights; for cross_lora it is 1 by construction."""
    from paw.transfer.linalg import overlap

    s, t = pair.source.basis, pair.target.basis
    out, into = overlap(maps.t_out.left(s.u), t.u), overlap(maps.t_in.right(s.v.T).T, t.v)
    return (out + into) / 2, (pair.k / len(t.u) + pair.k / len(t.v)) / 2


def _phi(pair: Pair) -> float | None:
    """Φ = ‖U_sᵀU_t‖²_F/k of the weights as they are, mean of both sides; None for different shapes."""
    s, t = pair.source.basis, pair.target.basis
    if pair.source.shape != pair.target.shape:
        return None
    return float((s.u.T @ t.u).square().sum() + (s.v.T @ t.v).square().sum()) / (2 * pair.k)


def _weights(pair: Pair) -> float:
    """‖U_sᵀU_t‖²_F/k² of the two weights' top left singular subspaces, the source systems' measure. Of different widths the
    smaller is filled up with zeros, so that two random subspaces have 1 in the larger width."""
    s, t = pair.source.basis.u, pair.target.basis.u
    width = min(len(s), len(t))
    return float((s[:width].T @ t[:width]).square().sum()) / pair.k**2


def _explained(pair: Pair, maps: Maps) -> tuple[float | None, float | None]:
    """R² of both maps on the positions held out, x_s ≈ T_in x_t and y_t ≈ T_out y_s; None where no text was run."""
    from paw.transfer.linalg import explained

    if not {pair.role.reads, pair.role.writes} <= pair.sites.keys() or len(pair.reads.held_s) < 2:
        return None, None
    reads, writes = pair.reads, pair.writes
    return explained(reads.held_s, maps.t_in.left(reads.held_t.T).T), explained(
        writes.held_t, maps.t_out.left(writes.held_s.T).T
    )


def _gain(pair: Pair, old: Factors, new: Factors, gain: str) -> float:
    """The factor on ΔW_t.

    `activation`: its output has the share of the module's own output energy that ΔW_s has, on the same text:
    tr((BᵀB)(A C Aᵀ)) / tr(W C Wᵀ), C the second moment of the module's input. `weight`: ‖ΔW‖/‖W‖ is kept.
    """
    if gain == "none":
        return 1.0
    if gain == "weight":
        return (old.norm() / max(pair.source.basis.norm, 1e-30)) / max(
            new.norm() / pair.target.basis.norm, 1e-30
        )
    if gain != "activation":
        return float(gain)
    device = pair.source.weight.device
    share_s = _energy(old.a.to(device), old.b.to(device), pair.reads.gram_s, pair.source.weight)
    share_t = _energy(new.a, new.b, pair.reads.gram_t, pair.target.weight)
    return float((share_s / max(share_t, 1e-30)) ** 0.5)


def _energy(a: Any, b: Any, gram: Any, w: Any) -> float:
    """Of a weight that puts nothing out the share is without bound, so the gain is 0: such a module gets nothing."""
    return float(
        ((b.T @ b) * (a @ gram @ a.T)).sum().clamp_min(0) / ((w @ gram) * w).sum().clamp_min(1e-30)
    )


# ---- by a fit of its own ----------------------------------------------------------------------------


def _fitted(
    adapter: Mapping[str, Factors],
    method: Fit,
    config: TransferStage,
    inputs: Mapping[str, Input],
    watch: Watch,
) -> Moved:
    assert config.text is not None
    found = method.fit(
        adapter, calibrate.Calibration(config.text, inputs), config.layers, config.transfer, watch
    )
    weights = [Weights(inputs[name].path, config.runtime.device) for name in ("source", "target")]
    twins, roles = {t: s for s, t in config.layers}, by_layer(weights[0].shapes)
    for name, fitted in found.items():
        layer, role = layer_of(name)
        if config.transfer.modules and role not in config.transfer.modules:
            continue
        twin = roles[twins[layer]][role]
        before = adapter.get(
            twin, Factors(fitted.a[:0], fitted.b[:, :0])
        )  # it may adapt other modules than the source's
        norms = _norms(
            (before, float(weights[0][twin].norm())), (fitted, float(weights[1][name].norm()))
        )
        yield fitted, {"source": twin, "target": name, **norms}


# ---- what is kept -----------------------------------------------------------------------------------


SCALES = {
    "raw": "similarity",
    "excess": "excess",
    "weights": "weights",
}  # where a row of the report has each
SHOWN = (1e-4, 1e-3, 1e-2)  # thresholds whose effect a report always shows


def _gate(rows: list[Row], c: TransferConfig) -> dict[str, int]:
    """Marks what is transferred: similar enough, and in one of the most similar layers.

    Returns:
        How many modules each of several thresholds leaves; nothing for a method that measures no similarity.

    Raises:
        TransferError: if nothing is transferred.
    """
    scale = SCALES[c.similarity]
    if not rows:
        raise TransferError(
            f"transfer.modules={c.modules}: transfer={c.method} adapts none of these. Leave it out."
        )
    for row in rows:
        row["transferred"] = scale not in row or row[scale] >= c.similarity_threshold
    if not any(row["transferred"] for row in rows):
        best = max(row[scale] for row in rows)
        raise TransferError(
            f"transfer.similarity_threshold={c.similarity_threshold:g} lets no module through "
            f"(the largest {c.similarity} similarity is {best:.4g}). Lower it."
        )
    left = {
        f"{threshold:g}": len({row["target"] for row in rows if row[scale] >= threshold})
        for threshold in sorted({*SHOWN, c.similarity_threshold})
        if scale in rows[0]
    }
    if c.keep_top < 1:
        by_target: dict[int, list[Row]] = {}
        for row in rows:
            by_target.setdefault(layer_of(row["target"])[0], []).append(row)
        if scale not in rows[0]:
            raise TransferError(
                f"transfer.keep_top: transfer={c.method} measures no similarity of layers. Leave it at 1."
            )
        order = sorted(
            by_target,
            key=lambda layer: -sum(r[scale] for r in by_target[layer]) / len(by_target[layer]),
        )
        for layer in order[math.ceil(c.keep_top * len(order)) :]:
            for row in by_target[layer]:
                row["transferred"] = False
    return left


def _joined(found: list[Factors]) -> Factors:
    """Several sources' factors on one target module: added up, and cut to the largest of their ranks."""
    if len(found) == 1:
        return found[0]
    import torch

    from paw.transfer.linalg import recompress

    a, b = torch.cat([f.a for f in found]), torch.cat([f.b for f in found], dim=1)
    return Factors(*recompress(a, b, max(f.rank for f in found)))
