"""Loading a base model and its tokenizer from a local folder, with what its own config asks for."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.schema import HardwareConfig, transient
from paw.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Runtime:
    """A hardware profile resolved on this machine. Precision changes results; where and how fast does not."""

    precision: str
    device: str = transient("cpu")
    devices: int = transient(1)
    strategy: str = transient("auto")
    workers: int = transient(0)

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.precision]


def resolve_runtime(hardware: HardwareConfig) -> Runtime:
    """`auto` by capability: a GPU if there is one, bfloat16 where it is fast there; float32 on a CPU, where bfloat16
    without special instructions is some thirty times slower.

    Raises:
        ConfigError: if a GPU is asked for and there is none, or fewer than asked for.
    """
    if hardware.threads:
        os.environ["OMP_NUM_THREADS"] = str(hardware.threads)
    device, precision, count = hardware.device, hardware.precision, 0
    if device == "cuda" or (device == "auto" and _driver()):  # torch is only asked where a GPU may be
        import torch

        count = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device == "cuda" and count < hardware.devices:
        raise ConfigError(f"hardware.devices: the profile asks for {hardware.devices} GPU(s), this machine has {count}. "
                          "Choose hardware=auto or hardware=cpu.")  # fmt: skip
    if precision == "auto":
        precision = "float32"
        if device == "cuda":
            precision = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return Runtime(precision, device, hardware.devices, hardware.strategy, hardware.workers)


def _driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists() or os.name == "nt"


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as e:  # damaged files make the reader fail anywhere
        raise ModelError(f"{folder}: its tokenizer cannot be read ({(str(e).splitlines() or [type(e).__name__])[0]}).") from None
    if not tokenizer.is_fast:
        raise ModelError(f"{folder}: has only a slow tokenizer, without character offsets. Convert it to tokenizer.json.")
    if tokenizer.pad_token_id is None:  # padding is always masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(folder: Path, runtime: Runtime, trust_remote_code: bool = False) -> Any:
    """A causal language model in eval mode on its device, parameters frozen.

    Raises:
        ModelError: for an encoder, an unknown architecture or damaged weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet()
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        kinds = config.architectures or []
        if any(k.endswith("ForMaskedLM") for k in kinds):
            raise ModelError(f"{folder}: {kinds[0]} is an encoder; this task needs a causal language model.")
        # Capped attention scores (Gemma 2) are computed only by the plain implementation.
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=runtime.dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as e:  # damaged files make the reader fail anywhere
        raise ModelError(f"{folder}: cannot be loaded ({(str(e).splitlines() or [type(e).__name__])[0]}).") from None
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:  # transformers would fill them at random
        raise ModelError(f"{folder}: its weights lack {len(lacking)} tensors or have them in another shape ({lacking[0]}). Fetch it again.")
    return model.to(runtime.device).eval().requires_grad_(False)


def _quiet() -> None:
    """Progress and advice of the libraries belong to them; ours has one bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@dataclass(frozen=True)
class Limits:
    """What a model's config says of its reach; None where it says nothing."""

    positions: int | None
    vocabulary: int | None


def limits(folder: Path, trust_remote_code: bool = False) -> Limits:
    """The most tokens a text may have, and the number of tokens there are."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code).get_text_config()
    except Exception as e:  # damaged files make the reader fail anywhere
        raise ModelError(f"{folder}: its config cannot be read ({(str(e).splitlines() or [type(e).__name__])[0]}).") from None
    return Limits(getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None))
