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

PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
SLACK = 1e-3  # of the largest logit, in float32: rounding, where a wrong merge is off by units
TEXT = (
    "The river was high after the rain, and the bridge had been closed since Monday. "
    "How many days is that? 3 + 4 = 7."
)


@dataclass(kw_only=True)
class MergeStage:
    merge: MergeConfig
    device: str = transient("cpu")
    trust_remote_code: bool = transient(False)


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    quantise: str  # how the base was held while the adapter was trained
    precision: str  # of the written weights
    largest_logit: float
    merged: float  # the largest difference of a logit, float32, to base and adapter
    rounded: float  # to the same, by rounding to the precision
    dequantised: float | None = None  # to the quantised base with the adapter
    shards: int
    gib: float

    def __str__(self) -> str:
        drift = ""
        if self.dequantised is not None:
            drift = f"; {self.dequantised:.2g} from the quantised base it was trained on"
        return (
            f"{self.gib} GiB in {self.shards} files, {self.precision}; logits (to "
            f"{self.largest_logit:.0f}) differ by {self.merged:.1g} merged and "
            f"{self.rounded:.1g} rounded{drift}"
        )


STAGE = Stage("merge", "1", "paw.export.merge:merge", config=MergeStage, result=MergeResult)


def check_mergeable(adapter: Path) -> None:
    """
    Raises:
        AdapterError: for virtual tokens, which stand before a text and in no weight.
    """
    kind = read_config(adapter)["peft_type"]
    if kind in PROMPTS:
        raise AdapterError(
            f"{adapter}: {kind} puts virtual tokens before a text, which no weight of the base can "
            "hold. Keep the adapter beside its base."
        )


def merge(config: MergeStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> MergeResult:
    """W + ΔW in float32, checked by logits before it is rounded and written as sharded safetensors
    with the tokenizer.

    An adapter that was trained on a quantised base is merged into that base dequantised, which is
    what it was trained to correct; what that changes beside the quantised base is reported.

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

    def loaded(how: str) -> Any:
        if "classes" in known:
            return load_classifier(base.path, runtime, classes, config.trust_remote_code, how)[0]
        return load_model(base.path, runtime, config.trust_remote_code, how)

    model, quantised = loaded(quantise), None
    if quantise != "none":
        quantised = _logits(attach(model, adapter.path, base.fingerprint), ids)
        model = loaded(quantise).dequantize().float()
        model.config.__dict__.pop("quantization_config", None)
    adapted = attach(model, adapter.path, base.fingerprint)
    before = _logits(adapted, ids)
    model = adapted.merge_and_unload(safe_merge=True)
    after, scale = _logits(model, ids), float(before.abs().max())
    merged = float((after - before).abs().max())
    if merged > SLACK * max(scale, 1):
        raise StageError(
            f"merge: logits differ by {merged:.3g} from those of base and adapter, which is more "
            "than rounding. Keep the adapter beside its base."
        )
    precision = config.merge.precision
    dtype = _own_dtype(base.path) if precision == "auto" else precision
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    rounded = float((_logits(model, ids) - after).abs().max())
    model.save_pretrained(str(out), max_shard_size=f"{config.merge.shard_gb}GB")
    copy_tokenizer(base.path, out)
    sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
    return MergeResult(
        quantise=quantise,
        precision=dtype,
        largest_logit=scale,
        merged=merged,
        rounded=rounded,
        dequantised=None if quantised is None else float((after - quantised).abs().max()),
        shards=len(sizes),
        gib=round(sum(sizes) / 2**30, 3),
    )


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
