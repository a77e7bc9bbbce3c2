"""Stage `merge`: an adapter into its base, a folder in the hub's layout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.checks import transient
from paw.errors import AdapterError, StageError
from paw.export.config import MergeConfig
from paw.export.tokenizer import copy_tokenizer
from paw.models.adapters import attach, birth, read_config
from paw.models.load import Runtime, load_classifier, load_model, load_tokenizer
from paw.store import Input, Stage, Watch

if TYPE_CHECKING:
    import torch

STAGE = Stage("merge", "1", "paw.export.merge:merge")
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
SLACK = 1e-3  # of the largest logit, in float32: rounding, where a wrong merge is off by units
TEXT = "The river was high after the rain, and the bridge had been closed since Monday. How many days is that? 3 + 4 = 7."


@dataclass
class MergeStage:
    merge: MergeConfig
    device: str = transient("cpu")
    trust_remote_code: bool = transient(False)


def check_mergeable(adapter: Path) -> None:
    """
    Raises:
        AdapterError: for virtual tokens, which stand before a text and in no weight.
    """
    kind = read_config(adapter)["peft_type"]
    if kind in PROMPTS:
        raise AdapterError(
            f"{adapter}: {kind} puts virtual tokens before a text, which no weight of the base can hold. "
            "Keep the adapter beside its base."
        )


def merge(
    config: MergeStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> dict[str, Any]:
    """W + ΔW in float32, checked by logits before it is rounded and written as sharded safetensors with the tokenizer.

    An adapter that was trained on a quantised base is merged into what that base is when it is dequantised, which is what it was
    trained to correct, and what that costs beside the quantised base is reported.

    Args:
        inputs: `model` and `adapter`.

    Raises:
        StageError: where merged logits are not those of base and adapter.
    """
    import torch

    base, adapter = inputs["model"], inputs["adapter"]
    check_mergeable(adapter.path)
    known, runtime = birth(adapter.path), Runtime("float32", config.device)
    quantise, classes = known.get("quantise", "none"), known.get("classes", ())
    tokenizer = load_tokenizer(base.path, config.trust_remote_code)
    ids = torch.tensor([tokenizer(TEXT).input_ids], device=runtime.device)
    result: dict[str, Any] = {"quantise": quantise}

    def loaded(how: str) -> Any:
        if "classes" in known:
            return load_classifier(base.path, runtime, classes, config.trust_remote_code, how)[0]
        return load_model(base.path, runtime, config.trust_remote_code, how)

    model = loaded(quantise)
    if quantise != "none":
        quantised = _logits(attach(model, adapter.path, base.fingerprint), ids)
        model = loaded(quantise).dequantize().float()
        model.config.__dict__.pop("quantization_config", None)
    adapted = attach(model, adapter.path, base.fingerprint)
    before = _logits(adapted, ids)
    merged = adapted.merge_and_unload(safe_merge=True)
    after, scale = _logits(merged, ids), float(before.abs().max())
    result |= {"largest_logit": scale, "merged": float((after - before).abs().max())}
    if result["merged"] > SLACK * max(scale, 1):
        raise StageError(
            f"merge: logits differ by {result['merged']:.3g} from those of base and adapter, which is more than rounding. "
            "Keep the adapter beside its base."
        )
    if quantise != "none":
        result["dequantised"] = float((after - quantised).abs().max())
    precision = config.merge.precision
    dtype = _own_dtype(base.path) if precision == "auto" else precision
    merged = merged.to(getattr(torch, dtype))
    merged.config.dtype = getattr(torch, dtype)
    result |= {"precision": dtype, "rounded": float((_logits(merged, ids) - after).abs().max())}
    merged.save_pretrained(str(out), max_shard_size=f"{config.merge.shard_gb}GB")
    copy_tokenizer(base.path, out)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    return result | {
        "shards": len(files),
        "gib": round(sum((out / f).stat().st_size for f in files) / 2**30, 3),
    }


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits.float()


def _own_dtype(folder: Path) -> str:
    """The precision that most of a model's weights have."""
    from safetensors import safe_open

    names, found = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}, Counter[str]()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            for key in f.keys():  # noqa: SIM118 - no mapping
                part = f.get_slice(key)
                found[names.get(part.get_dtype(), "float32")] += math.prod(part.get_shape())
    return found.most_common(1)[0][0]
