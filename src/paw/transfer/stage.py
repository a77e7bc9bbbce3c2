"""Stage `transfer`: an adapter of the source as an adapter of the target, by two maps a module.

    A_t = A_s·T_in        B_t = gain · T_out·B_s

The result has exactly the source's rank and ΔW is never formed. Which maps, a method decides (paw/transfer/methods).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.schema import DatasetConfig, TransferConfig, transient
from paw.data.load import examples
from paw.errors import TransferError
from paw.models.adapters import Factors, read_adapter, stamp, write_adapter
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.store import Input, Stage, Watch, write_text

if TYPE_CHECKING:
    from paw.transfer.activations import PairedText, Space
    from paw.transfer.methods import Method
    from paw.transfer.pairing import Pair, Site

REPORT = "report.json"
STAGE = Stage("transfer", "1", "paw.transfer.stage:transfer")


@dataclass
class TransferStage:
    transfer: TransferConfig
    dataset: DatasetConfig
    split: str
    runtime: Runtime
    base_name: str | None = transient(None)
    trust_remote_code: bool = transient(False)


@dataclass
class Models:
    """Both models on their device, their linear modules by layer and role, and the calibration text in both's tokens."""

    source: Any
    target: Any
    names_s: dict[int, dict[str, str]]
    names_t: dict[int, dict[str, str]]
    texts: list[PairedText]
    pads: tuple[int, int]


def transfer(config: TransferStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> dict[str, Any]:
    """Moves every module that has a twin and passes the gate.

    Args:
        inputs: `adapter`, `source` and `target`; `calibration` (a text file) or `data` (rows of the train split).

    Writes the adapter as a PEFT folder stamped with the target's fingerprint, and report.json with a row a module.

    Raises:
        TransferError: if nothing has a twin or nothing passes the gate.
    """
    import torch

    from paw.transfer.methods import method_named
    from paw.transfer.pairing import matched_layers, pair_names

    c = config.transfer
    method = method_named(c.method)
    adapter = read_adapter(inputs["adapter"].path)
    needs_text = c.gain == "activation" or method.text or bool(method.spoil)
    models = _load(config, inputs, needs_text)
    layers = matched_layers(c.layers, len(models.names_s), len(models.names_t))
    names = pair_names(adapter, models.names_t, layers)
    _refuse_misfit(adapter, models.source, inputs["adapter"].path)

    generator = torch.Generator().manual_seed(c.seed)
    moved: dict[str, Factors] = {}
    rows: list[dict[str, Any]] = []
    for pair in _pairs(names, models, config, needs_text, watch):
        factors, row = _move(pair, adapter[pair.source], method, c, generator)
        rows.append(row)
        if row["transferred"]:
            moved[pair.target] = factors
        watch.progress(len(rows), len(names), "modules")
    if not moved:
        best = max(row[_scale(c)] for row in rows)
        raise TransferError(f"transfer.similarity_threshold={c.similarity_threshold:g} lets no module through "
                            f"(the largest {c.similarity} similarity is {best:.4f}). Lower it.")  # fmt: skip

    write_adapter(out, moved, config.base_name)
    stamp(out, inputs["target"].fingerprint, made_by="transfer", method=c.method, source=inputs["source"].fingerprint,
          adapter=inputs["adapter"].fingerprint)  # fmt: skip
    write_text(out / REPORT, json.dumps(rows, indent=1))
    used = {row["source"] for row in rows if row["transferred"]}
    return {
        "method": c.method,
        "coverage": len(used) / len(adapter),  # of the source adapter's modules
        "target_modules": len(moved),
        "target_coverage": len(moved) / sum(map(len, models.names_t.values())),
        "positions": sum(len(t.positions) for t in models.texts) or None,
        "similarity": sum(r["similarity"] for r in rows) / len(rows),
        "chance": sum(r["chance"] for r in rows) / len(rows),
    }


# ---- one module -------------------------------------------------------------------------------------


def _move(pair: Pair, factors: Factors, method: Method, c: TransferConfig, generator: Any) -> tuple[Factors, dict[str, Any]]:
    """The pair's factors on the target, and its row of the report."""
    maps = method.maps(pair, c)
    device = pair.w_t.device
    a, b = maps.t_in.right(factors.a.to(device)), maps.t_out.left(factors.b.to(device))
    b = b * _gain(pair, factors, Factors(a, b), c.gain)
    if method.spoil:
        a, b = method.spoil(a, b, generator)
    new = Factors(a.float().cpu(), b.float().cpu())
    similarity, chance = _similarity(pair, maps)
    row: dict[str, Any] = {
        "source": pair.source, "target": pair.target, "similarity": similarity, "chance": chance, "excess": similarity - chance,
        "norm_before": factors.norm(), "norm_after": new.norm(),
        "relative_before": factors.norm() / float(pair.w_s.norm()), "relative_after": new.norm() / float(pair.w_t.norm()),
    }  # fmt: skip
    row["transferred"] = row[_scale(c)] >= c.similarity_threshold
    return new, row


def _scale(c: TransferConfig) -> str:
    return "similarity" if c.similarity == "raw" else "excess"


def _similarity(pair: Pair, maps: Any) -> tuple[float, float]:
    """How much of the target's top singular subspaces the source's fill once mapped, mean of both sides; and its chance
    level. For equal shapes and the identity this is Φ of the weights."""
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
    assert pair.reads is not None
    share_s = _energy(old.a.to(pair.w_s.device), old.b.to(pair.w_s.device), pair.reads.gram_s, pair.w_s)
    share_t = _energy(new.a, new.b, pair.reads.gram_t, pair.w_t)
    return float((share_s / max(share_t, 1e-30)) ** 0.5)


def _energy(a: Any, b: Any, gram: Any, w: Any) -> float:
    return float(((b.T @ b) * (a @ gram @ a.T)).sum().clamp_min(0) / ((w @ gram) * w).sum())


# ---- both models ------------------------------------------------------------------------------------


def _load(config: TransferStage, inputs: Mapping[str, Input], needs_text: bool) -> Models:
    from paw.transfer.activations import pair_texts
    from paw.transfer.pairing import by_layer

    source, target = (load_model(inputs[n].path, config.runtime, config.trust_remote_code) for n in ("source", "target"))
    names = [by_layer(n for n, m in model.named_modules() if hasattr(m, "in_features")) for model in (source, target)]
    for model, name, found in zip((source, target), ("source", "target"), names, strict=True):
        if not found:
            raise TransferError(f"{inputs[name].path}: {type(model).__name__} has no layers of the known kind (q_proj … down_proj).")
    if not needs_text:
        return Models(source, target, names[0], names[1], [], (0, 0))
    tokenizers = [load_tokenizer(inputs[n].path, config.trust_remote_code) for n in ("source", "target")]
    texts = pair_texts(_texts(config, inputs), tokenizers[0], tokenizers[1], config.transfer.positions)
    return Models(source, target, names[0], names[1], texts, (tokenizers[0].pad_token_id, tokenizers[1].pad_token_id))


def _texts(config: TransferStage, inputs: Mapping[str, Input]) -> list[str]:
    """The calibration text, a document a line; else the train split's questions, each with one of its choices in turn,
    so that no label is used."""
    if "calibration" in inputs:
        return [line for line in inputs["calibration"].path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = examples(inputs["data"].path, config.dataset, config.split)
    return [e.contexts[i % len(e.contexts)] + e.continuations[i % len(e.contexts)] for i, e in enumerate(found)]


def _refuse_misfit(adapter: Mapping[str, Factors], source: Any, folder: Path) -> None:
    modules = dict(source.named_modules())
    for name, factors in adapter.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or tuple(weight.shape) != (factors.b.shape[0], factors.a.shape[1]):
            raise TransferError(f"{folder}: {name} of the adapter does not fit the source model. Was it trained on another base?")


def _pairs(names: Sequence[tuple[str, str]], models: Models, config: TransferStage, needs_text: bool, watch: Watch) -> Iterator[Pair]:
    """Pairs with what was seen of them on text, in groups of target layers whose statistics fit into memory."""
    from paw.transfer.pairing import ROLES, Pair, layer_of

    weights = [dict(m.named_modules()) for m in (models.source, models.target)]
    for group in _groups(names, models, config.transfer.memory_gb if needs_text else float("inf")):
        sites = _see(group, models, config, watch) if needs_text else {}
        for source, target in group:
            (layer_s, role), (layer_t, _) = layer_of(source), layer_of(target)
            spaces = [((layer_s, place), (layer_t, place)) for place in (ROLES[role].reads, ROLES[role].writes)]
            yield Pair(
                source, target, weights[0][source].weight.detach().float(), weights[1][target].weight.detach().float(),
                sites.get(spaces[0]), sites.get(spaces[1]), config.transfer.basis,
            )  # fmt: skip


def _groups(names: Sequence[tuple[str, str]], models: Models, memory_gb: float) -> Iterator[list[tuple[str, str]]]:
    from paw.transfer.pairing import layer_of

    by_target: dict[int, list[tuple[str, str]]] = {}
    for source, target in names:
        by_target.setdefault(layer_of(target)[0], []).append((source, target))
    widths = [max(max(m.weight.shape) for m in model.modules() if hasattr(m, "in_features") and m is not model.get_output_embeddings())
              for model in (models.source, models.target)]  # fmt: skip
    a_layer = 4 * 2 * (widths[0] ** 2 + widths[0] * widths[1] + widths[1] ** 2) / 2**30  # the widest space weighs most
    size = max(1, int(memory_gb / a_layer)) if memory_gb != float("inf") else len(by_target)
    layers = sorted(by_target)
    for start in range(0, len(layers), size):
        yield [pair for layer in layers[start : start + size] for pair in by_target[layer]]


def _see(group: Sequence[tuple[str, str]], models: Models, config: TransferStage, watch: Watch) -> dict[tuple[Space, Space], Site]:
    from paw.transfer.activations import second_moments
    from paw.transfer.pairing import ROLES, layer_of

    wanted: dict[tuple[Space, Space], None] = {}
    for source, target in group:
        (layer_s, role), (layer_t, _) = layer_of(source), layer_of(target)
        for place in (ROLES[role].reads, ROLES[role].writes):
            wanted[(layer_s, place), (layer_t, place)] = None
    names_s = {s: models.names_s[s[0]][s[1].role] for s, _ in wanted}
    names_t = {t: models.names_t[t[0]][t[1].role] for _, t in wanted}
    return second_moments(models.source, models.target, names_s, names_t, list(wanted), models.texts, config.transfer.batch_size,
                          models.pads, watch, "calibration texts")  # fmt: skip
