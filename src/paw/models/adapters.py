"""Adapters as plain PEFT folders: LoRA read with every check and written whole, any type attached
to its own base only."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.errors import AdapterError
from paw.models.layout import Part
from paw.store import write_text
from paw.text import first_line, some

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS, BIRTH = "adapter_config.json", "adapter_model.safetensors", "paw.json"
PICKLED = "adapter_model.bin"  # what older versions of PEFT wrote
# Initialisations that change the base: the adapter is relative to a residual of it.
RESIDUAL = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
PREFIX = "base_model.model."
MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.weight)?$")


@dataclass(frozen=True)
class Factors:
    """ΔW = B·A of one module, the scale baked into B. A: r×in, B: out×r, float32."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def norm(self) -> float:
        """‖BA‖_F from r×r products: tr((BᵀB)(AAᵀ))."""
        return float(((self.b.T @ self.b) * (self.a @ self.a.T)).sum().clamp_min(0).sqrt())


def find_adapter(path: str) -> Path:
    """The PEFT folder at a path, or the only one below it: layouts of older scripts, such as
    `runs/<dataset>/<model>/…/final_model`, are taken as they are.

    Raises:
        AdapterError: where there is none, or more than one.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise AdapterError(f"{path}: no such adapter folder.")
    if (folder / CONFIG).is_file():
        return folder
    found = sorted(p.parent for p in folder.rglob(CONFIG))
    found = [p for p in found if p.name == "final_model"] or found
    if not found:
        raise AdapterError(
            f"{folder}: has no {CONFIG}, nor has any folder below it. Give a PEFT adapter's folder."
        )
    if len(found) > 1:
        names = some([str(p) for p in found])
        raise AdapterError(f"{folder}: holds {len(found)} adapters. Name one: {names}.")
    return found[0]


def other_base(folder: Path, known: Sequence[str]) -> str | None:
    """What an adapter says it was trained on, where that is none of the names that its base goes
    by; None where it says nothing. Hub ids and paths are compared by their last part, `Owner_Name`
    and the hub's own cache folders as `Owner/Name`."""
    said = str(read_config(folder).get("base_model_name_or_path") or "")

    def names(name: str) -> set[str]:
        """What a hub id or a path calls a model: its name, also with its owner if there is one."""
        cached = re.search(r"models--(.+?)--([^/]+)", name)
        parts = [cached[1], cached[2]] if cached else name.rstrip("/").casefold().split("/")[-2:]
        last = parts[-1].casefold()
        return {last, last.partition("_")[2] or last, "_".join(parts).casefold()}

    mine = set().union(*map(names, known))
    return None if not said or names(said) & mine else said


def is_factors(folder: Path) -> bool:
    """Whether an adapter is nothing but pairs of factors: LoRA, or AdaLoRA, without magnitudes,
    biases and whole modules."""
    config = read_config(folder)
    more = config.get("use_dora") or config.get("modules_to_save")
    plain = not more and config.get("bias", "none") == "none"
    return config["peft_type"] in ("LORA", "ADALORA") and plain


def has_magnitudes(folder: Path) -> bool:
    """Whether an adapter is DoRA."""
    return bool(read_config(folder).get("use_dora"))


def check_plain(folder: Path) -> None:
    """
    Raises:
        AdapterError: where factors are relative to a base that their initialisation has changed.
    """
    name = _changes_its_base(folder)
    if name is None:
        return
    remedy = (
        "convert it on its own base with PEFT, model.save_pretrained(DIR, "
        "path_initial_model_for_weight_conversion=DIR_OF_THE_UNTRAINED_ADAPTER), and give DIR."
    )
    if name == "LoftQ":
        remedy = "PEFT has no conversion for it. Train it with init_lora_weights=true."
    raise AdapterError(
        f"{folder}: is a {name} adapter, relative to a base that its initialisation changed; "
        f"{remedy}"
    )


def _changes_its_base(folder: Path) -> str | None:
    """The name of an initialisation that takes its part out of the base's weights; None for one
    that does not."""
    how = str(read_config(folder).get("init_lora_weights", True)).lower()
    return next((name for key, name in RESIDUAL.items() if how.startswith(key)), None)


def read_adapter(folder: Path, magnitudes: bool = False) -> dict[str, Factors]:
    """A LoRA folder as factors by module name (`model.layers.0.self_attn.q_proj`), on the CPU; of
    AdaLoRA the ranks that it kept, exactly.

    Args:
        magnitudes: leave DoRA's aside (`read_magnitudes` has them) instead of refusing it.

    Raises:
        AdapterError: where files are missing or damaged, A and B do not fit, values are not finite,
            or the adapter has what a pair of factors cannot say (DoRA, biases, whole modules,
            embeddings).
    """
    config = read_config(folder)
    if config["peft_type"] == "ADALORA":
        return _triplets(folder, config)
    if config["peft_type"] != "LORA":
        raise AdapterError(
            f"{folder}: is a {config['peft_type']} adapter; only LoRA is transferred. Train it "
            "with adapter=lora."
        )
    check_plain(folder)
    if not isinstance(config.get("r"), int):
        raise AdapterError(f"{folder / CONFIG}: has no rank r.")
    for key, none, name in (
        ("use_dora", magnitudes or False, "DoRA magnitudes"),
        ("bias", "none", "biases"),
        ("modules_to_save", None, "whole modules"),
    ):
        if config.get(key, none) not in (none, None, [], False):
            raise AdapterError(
                f"{folder}: has {name} ({key}={config[key]}), which two factors cannot hold. Train "
                "it without."
            )
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in finite_tensors(folder):
        if magnitudes and MAGNITUDE.search(key):
            continue
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if not match:
            raise AdapterError(
                f"{folder}: unexpected tensor {key}; only lora_A and lora_B weights are read."
            )
        pairs.setdefault(match[1], {})[match[2]] = value.float()
    if not pairs:
        raise AdapterError(f"{folder}: holds no LoRA weights.")
    out = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise AdapterError(
                f"{folder}: {module} has lora_{next(iter(pair))} but not the other factor."
            )
        rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
        if pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            a, b = tuple(pair["A"].shape), tuple(pair["B"].shape)
            raise AdapterError(f"{folder}: {module} has factors {a} and {b}, not of rank {rank}.")
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        out[module] = Factors(pair["A"], pair["B"] * scale)
    return out


def read_magnitudes(folder: Path) -> dict[str, torch.Tensor]:
    """Of DoRA the length of every row of W + ΔW (out, float32), by module name."""
    found = {key: value for key, value in finite_tensors(folder) if MAGNITUDE.search(key)}
    return {
        MAGNITUDE.sub("", key).removeprefix(PREFIX): value.float().flatten()
        for key, value in found.items()
    }


def _triplets(folder: Path, config: Mapping[str, Any]) -> dict[str, Factors]:
    """AdaLoRA's ΔW = α/r₀ · B·diag(E)·A, r₀ the rank that it began with (as PEFT scales it)."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in finite_tensors(folder):
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([ABE])", key)
        if not match:
            raise AdapterError(
                f"{folder}: unexpected tensor {key}; only lora_A, lora_B and lora_E are read."
            )
        parts.setdefault(match[1], {})[match[2]] = value.float()
    if not all(set(part) == {"A", "B", "E"} for part in parts.values()) or not parts:
        raise AdapterError(f"{folder}: lacks some of AdaLoRA's lora_A, lora_B and lora_E.")
    alpha, first = config.get("lora_alpha") or 0, config.get("init_r", 12)
    scale = (alpha if alpha > 0 else first) / (first + 1e-5)
    return {
        name: Factors(part["A"] * part["E"], part["B"] * scale)
        for name, part in parts.items()
        if part["A"].shape[0]
    }


def unfused(modules: Mapping[str, Factors], parts: Mapping[str, Part]) -> dict[str, Factors]:
    """Factors of fused modules as those of their parts: the same A, and the rows of B."""
    out: dict[str, Factors] = {}
    for name, factors in modules.items():
        mine = {part: p.rows for part, p in parts.items() if p.module == name and p.rows}
        split = {part: Factors(factors.a, factors.b[rows]) for part, rows in mine.items()}
        out |= split or {name: factors}
    return out


def fused(modules: Mapping[str, Factors], parts: Mapping[str, Part]) -> dict[str, Factors]:
    """The way back: parts that read by the same A keep its rank, others stand beside each other,
    exactly."""
    import torch

    out: dict[str, Factors] = {}
    groups: dict[str, list[str]] = {}
    for name in modules:
        groups.setdefault(parts[name].module, []).append(name)
    for module, names in groups.items():
        if parts[names[0]].rows is None:
            out[module] = modules[names[0]]
            continue
        height = max(p.rows.stop for p in parts.values() if p.module == module and p.rows)
        columns: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for name in names:
            f = modules[name]
            b = f.b.new_zeros(height, f.rank)
            b[parts[name].rows] = f.b
            same = next((i for i, a in enumerate(rows) if torch.equal(a, f.a)), None)
            if same is None:
                rows.append(f.a)
                columns.append(b)
            else:
                columns[same] += b
        out[module] = Factors(torch.cat(rows), torch.cat(columns, dim=1))
    return out


def write_adapter(folder: Path, modules: Mapping[str, Factors], base_name: str | None) -> None:
    """Factors as a PEFT folder with alpha = r, so that the scale is 1."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = max(factors.rank for factors in modules.values())
    others = {name: factors.rank for name, factors in modules.items() if factors.rank != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
        rank_pattern=others,
        alpha_pattern=others,
    )
    config.save_pretrained(str(folder))
    settle(folder)
    tensors = {}
    for name, factors in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.a.to(torch.float32).contiguous().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.b.to(torch.float32).contiguous().cpu()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def settle(folder: Path) -> None:
    """PEFT writes a set of module names in any order; sorted, the same adapter is always the same
    bytes."""
    config = read_config(folder)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True))


def stamp(folder: Path, base: str, **facts: Any) -> None:
    """Writes beside an adapter the fingerprint of the base it is for, and where it comes from."""
    write_text(folder / BIRTH, json.dumps({"base": base, **facts}, indent=1))


def attach(model: Any, folder: Path, base: str) -> Any:
    """The model with the adapter on it, of whatever type PEFT loads.

    Args:
        base: the fingerprint of the model's content; an adapter that was stamped for another base
            is refused.

    Raises:
        AdapterError: for another base, modules that the model lacks, shapes that differ, or values
            that are not finite.
    """
    from peft import PeftModel

    check_base(folder, base)
    read_config(folder)
    linears = {n: m for n, m in model.named_modules() if hasattr(m, "in_features")}
    for key, value in finite_tensors(folder):
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(\.weight)?", key)
        if not match or "embed" in match[1]:
            continue
        module = linears.get(match[1])
        if module is None:
            raise AdapterError(
                f"{folder}: the base has no linear module {match[1]}. It belongs to another base."
            )
        does, expected, actual = "reads", module.in_features, value.shape[-1]
        if match[2] == "B":
            does, expected, actual = "writes", module.out_features, value.shape[0]
        if expected != actual:
            raise AdapterError(
                f"{folder}: {match[1]} {does} {actual} values, the base's {expected}. It belongs "
                "to another base."
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # PEFT would leave what is missing as it starts.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as e:  # whatever PEFT raises, the adapter does not fit
        raise AdapterError(
            f"{folder}: PEFT cannot put it on this base ({first_line(e)[:200]})."
        ) from None


def detach(model: Any, folder: Path) -> bool:
    """Takes an adapter off its base again. False where it changed the base itself (biases, whole
    modules, an initialisation that takes its part out of the weights, which PEFT repeats on
    loading): then the base must be loaded anew."""
    if not model.active_peft_config.is_prompt_learning:
        model.unload()
    if _changes_its_base(folder):
        return False
    return all(re.search(r"\.(lora_|ia3_)|^prompt_embeddings$", key) for key in _names(folder))


def birth(folder: str | Path) -> dict[str, Any]:
    """What an adapter's stamp says; nothing of one from elsewhere."""
    file = Path(folder).expanduser() / BIRTH
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def made_for(folder: str | Path) -> str | None:
    """The fingerprint of the base that an adapter is stamped for; None where it has no stamp."""
    return birth(folder).get("base")


def classes_of(folder: Path) -> list[str] | None:
    """The classes that a trained head knows, if its stamp names them."""
    found = birth(folder).get("classes")
    return None if found is None else [str(x) for x in found]


def check_base(folder: Path, base: str) -> None:
    """Refuses an adapter that is stamped with another base's fingerprint."""
    if made_for(folder) not in (None, base):
        raise AdapterError(
            f"{folder}: was made for another base model. Evaluate it on its own base, or transfer "
            "it (task=transfer)."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(
            f"{folder}: has no {CONFIG}, so it is no PEFT adapter. Give the folder that has it."
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError:
        raise AdapterError(f"{folder / CONFIG}: is not JSON.") from None
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{folder / CONFIG}: has no peft_type, so it is no PEFT configuration.")
    return config


def finite_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """An adapter's tensors by name.

    Raises:
        AdapterError: at one whose values are not finite.
    """
    for key, value in _tensors(folder).items():
        if not value.isfinite().all():
            raise AdapterError(
                f"{folder}: {key} has values that are not finite. The training diverged; train it "
                "again."
            )
        yield key, value


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, pickled = folder / WEIGHTS, folder / PICKLED
    if not file.is_file() and pickled.is_file():
        import torch

        try:
            found: Any = torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as e:  # damaged bytes, or more than weights: nothing of it is run
            reason = first_line(e)[:160]
            raise AdapterError(
                f"{pickled}: is damaged, or holds more than weights ({reason})."
            ) from None
        if isinstance(found, dict) and all(isinstance(v, torch.Tensor) for v in found.values()):
            return found
        raise AdapterError(f"{pickled}: holds no tensors by name, so it is no PEFT adapter.")
    if not file.is_file():
        raise AdapterError(
            f"{file}: does not exist. An adapter folder needs {CONFIG} and {WEIGHTS}."
        )
    try:
        return dict(load_file(file))
    except SafetensorError as e:
        raise AdapterError(f"{file}: is damaged ({e}). Copy or train it again.") from None


def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    if not (folder / WEIGHTS).is_file():
        return list(_tensors(folder))
    with safe_open(folder / WEIGHTS, "pt") as f:
        return list(f.keys())


def _by_pattern(patterns: dict[str, int] | None, module: str, default: int) -> int:
    """PEFT's rank_pattern and alpha_pattern: the first pattern that the end of a module's name
    matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
