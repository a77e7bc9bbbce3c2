"""Loading a base model and its tokenizer from a local folder, with what its own config asks for."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.checks import transient
from paw.config.common import HardwareConfig
from paw.errors import ConfigError, ModelError, need
from paw.models.tensors import weight_bytes
from paw.text import first_line, some

if TYPE_CHECKING:
    import torch

BERTS = ("Bert", "Roberta", "Albert", "DistilBert", "XLMRoberta", "ModernBert")
ENCODERS = (*BERTS, "Electra", "Deberta", "MPNet")
# What is read at last stays exact, and a head is trained.
HEADS = ["lm_head", "score", "classifier", "pre_classifier", "pooler"]
GIB = 2**30
# Of the bytes of a base's weights: what running it takes at least.
RUNNING = 1.1


@dataclass(frozen=True)
class Runtime:
    """A hardware profile resolved on this machine. Precision changes results; where and how fast
    does not."""

    precision: str
    device: str = transient("cpu")
    devices: int = transient(1)
    strategy: str = transient("auto")
    # a configuration of the user's own, known by its content
    deepspeed: str | None = transient(None)
    spread: str = transient("auto")
    memory_gb: float | None = transient(None)  # of one device, where the profile says it
    nodes: int = transient(1)  # that a training spans

    @property
    def dtype(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.precision)
        return found


def resolve_runtime(hardware: HardwareConfig) -> Runtime:
    """`auto` by capability: a GPU if there is one, bfloat16 where it is fast there; float32 on a
    CPU, where bfloat16 without special instructions is some thirty times slower. A GPU that a
    profile names is not looked for, so that a plan can be made where there is none."""
    if hardware.threads:  # before torch is imported
        os.environ["OMP_NUM_THREADS"] = str(hardware.threads)
    device, precision, count = hardware.device, hardware.precision, _gpus(hardware)
    if device == "auto":
        device = "cuda" if count else "cpu"
    if precision == "auto":
        precision = "float32"
        if device == "cuda":
            precision = "bfloat16" if not count or _takes_bfloat16() else "float16"
    own = str(Path(hardware.deepspeed).expanduser()) if hardware.deepspeed else None
    return Runtime(
        precision,
        device,
        hardware.devices,
        hardware.strategy,
        own,
        hardware.spread,
        hardware.memory_gb,
        hardware.nodes,
    )


def check_hardware(hardware: HardwareConfig) -> str:
    """What a profile is on this machine.

    Raises:
        ConfigError: if a GPU is asked for and there is none, or fewer than asked for.
    """
    runtime, count = resolve_runtime(hardware), _gpus(hardware)
    if runtime.device == "cuda" and count < hardware.devices:
        raise ConfigError(
            f"hardware.devices: the profile asks for {hardware.devices} GPU(s), this machine has "
            f"{count}. Choose hardware=auto or hardware=cpu."
        )
    return f"{runtime.devices} × {runtime.device}, {runtime.precision}"


def _gpus(hardware: HardwareConfig) -> int:
    """GPUs of this machine. torch is only asked where there may be one and it matters."""
    if hardware.device == "cpu" or not has_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def _takes_bfloat16() -> bool:
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def has_driver() -> bool:
    """Whether there may be an NVIDIA GPU: cheap, and torch is not imported."""
    return os.name == "nt" or Path("/dev/nvidia0").exists() or bool(shutil.which("nvidia-smi"))


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    _quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as e:  # damaged files make the reader fail anywhere
        raise ModelError(f"{folder}: its tokenizer cannot be read ({first_line(e)}).") from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder}: has only a slow tokenizer, without character offsets. Convert it to "
            "tokenizer.json."
        )
    if tokenizer.pad_token_id is None:  # padding is always masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _json(file: Path) -> dict[str, Any]:
    """Of a model's small files, without importing anything that could read them better."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    except (OSError, ValueError):
        raise ModelError(f"{file}: cannot be read as JSON.") from None


def room(folder: Path) -> int | None:
    """The most tokens that a model has places for; None where it names none. Some encoders number
    their places from 2: what their tokenizer names counts."""
    config, names = _json(folder / "config.json"), folder / "tokenizer_config.json"
    found = [(config.get("text_config") or config).get("max_position_embeddings")]
    if names.is_file() and is_encoder(folder):
        found.append(_json(names).get("model_max_length"))
    known = [int(n) for n in found if n is not None and n < 10**9]
    return min(known) if known else None


def is_encoder(folder: Path) -> bool:
    """Whether a model reads both ways (BERT and its like): it classifies, and writes nothing."""
    kinds = _json(folder / "config.json").get("architectures") or []
    return any(k.endswith("ForMaskedLM") or k.startswith(ENCODERS) for k in kinds)


def load_model(
    folder: Path,
    runtime: Runtime,
    trust_remote_code: bool = False,
    quantise: str = "none",
    places: Sequence[str] = (),
) -> Any:
    """A causal language model in eval mode on its device, parameters frozen.

    Args:
        quantise: hold its linear layers in nf4 (4 bit, double quantisation) or int8, by
            bitsandbytes.
        places: the devices that it is spread over, as `spread_over` gives them; else it is whole
            on the runtime's device. A spread model is run, not trained.

    Raises:
        ModelError: for an encoder, an unknown architecture or damaged weights.
    """
    from transformers import AutoModelForCausalLM

    if is_encoder(folder):
        raise ModelError(
            f"{folder}: is an encoder; this task needs a causal language model. An encoder takes "
            "evaluate.mode=classify."
        )
    model, lacking = _loaded(
        AutoModelForCausalLM, folder, runtime, trust_remote_code, quantise, places
    )
    if lacking:  # transformers would fill them at random
        raise ModelError(
            f"{folder}: its weights lack {len(lacking)} tensors or have them in another shape "
            f"({lacking[0]}). Fetch it again."
        )
    return model


def load_classifier(
    folder: Path,
    runtime: Runtime,
    classes: Sequence[str] | None,
    trust_remote_code: bool = False,
    quantise: str = "none",
    places: Sequence[str] = (),
) -> tuple[Any, list[str]]:
    """A model with a head: one output per class, or one value where classes are None.

    Args:
        quantise, places: as of `load_model`.

    Returns:
        The model, and the names of the modules that its weights lack and that start at random: the
            head.
    """
    from transformers import AutoModelForSequenceClassification

    names = dict(enumerate(classes)) if classes else {0: "value"}
    numbers, auto = {v: k for k, v in names.items()}, AutoModelForSequenceClassification
    head = {"num_labels": len(names), "id2label": names, "label2id": numbers}
    model, lacking = _loaded(auto, folder, runtime, trust_remote_code, quantise, places, **head)
    text = model.config.get_text_config()
    if text.pad_token_id is None:  # what ends a text is told by its filling
        text.pad_token_id = load_tokenizer(folder, trust_remote_code).pad_token_id
    model.config.pad_token_id = text.pad_token_id
    fresh = sorted({key.rpartition(".")[0] for key in lacking})
    body = [name for name in fresh if re.search(r"\.\d+\.", name)]  # a numbered layer is no head
    if body:
        raise ModelError(
            f"{folder}: its weights lack {body[0]} or have it in another shape. Fetch it again."
        )
    return model, fresh


def _loaded(
    auto: Any,
    folder: Path,
    runtime: Runtime,
    trust_remote_code: bool,
    quantise: str,
    places: Sequence[str],
    **more: Any,
) -> tuple[Any, list[str]]:
    """The model, and the names of tensors that the files lack or have in another shape."""
    from transformers import AutoConfig

    _quiet()
    if quantise != "none":
        more["quantization_config"] = _quantisation(quantise, runtime)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        # Capped attention scores (Gemma 2) are computed only by the plain implementation.
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
        if len(places) > 1:
            more["device_map"] = _placed(auto, config, places, trust_remote_code)
        elif quantise != "none" or getattr(config, "quantization_config", None):
            more["device_map"] = {"": runtime.device}  # such weights are made where they stay
        model, info = auto.from_pretrained(
            str(folder),
            dtype=runtime.dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **more,
        )
    except Exception as e:  # damaged files make the reader fail anywhere
        if places and out_of_memory(e):
            raise ModelError(
                f"{folder}: does not fit into what is free of {len(places)} devices."
            ) from None
        raise ModelError(f"{folder}: cannot be loaded ({first_line(e)}).") from None
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if len(places) > 1:
        _dispatch(model, more["device_map"])
    elif not getattr(model, "quantization_method", None):
        model = model.to(runtime.device)
    for layer in model.modules():
        # On CPUs with bfloat16 instructions bitsandbytes repacks a 4-bit weight at the first
        # forward pass in eval mode. No gradient passes through that form, it stays until a state
        # dict is asked for, and some widths it cannot hold.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model.eval().requires_grad_(False), lacking


def _quantisation(quantise: str, runtime: Runtime) -> Any:
    """
    Raises:
        ConfigError: where bitsandbytes is not installed.
    """
    need("bitsandbytes", "quantise", f"adapter.quantise={quantise}")
    from transformers import BitsAndBytesConfig

    if quantise == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=HEADS,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=runtime.dtype,
    )


# ---- a base on several devices


def spreads(runtime: Runtime, *folders: Path) -> bool:
    """Whether bases that are in memory together are spread over the profile's devices: by
    `hardware.spread=auto` only where one device cannot hold them."""
    if runtime.devices == 1 or runtime.spread == "never":
        return False
    if runtime.spread == "always":
        return True
    room = _memory(runtime)
    return room is not None and RUNNING * _weights(runtime, folders) > room


def spread_over(runtime: Runtime, *folders: Path) -> list[str]:
    """The devices that such bases are spread over; none where they are not spread.

    Raises:
        ModelError: where all devices together cannot hold their weights.
    """
    if not spreads(runtime, *folders):
        return []
    places, room, needed = _places(runtime), _memory(runtime), _weights(runtime, folders)
    if room is not None and needed > len(places) * room:
        raise ModelError(
            f"{some([f.name for f in folders])}: needs {needed / GIB:.1f} GiB, {len(places)} "
            f"devices have {len(places) * room / GIB:.1f}. Set hardware.devices higher, or take a "
            "smaller model."
        )
    return places


def _weights(runtime: Runtime, folders: Sequence[Path]) -> int:
    size = 4 if runtime.precision == "float32" else 2
    return sum(weight_bytes(folder, size) for folder in folders)


def _places(runtime: Runtime) -> list[str]:
    """The devices of a profile; those of a CPU are one memory."""
    if runtime.device != "cuda":
        return [runtime.device]
    return [f"cuda:{i}" for i in range(runtime.devices)]


def _memory(runtime: Runtime) -> float | None:
    """Bytes of one device, the smallest of the profile: what it has, or less where the profile
    says so. None where neither is known, and of a CPU."""
    if runtime.device != "cuda":
        return None
    import torch

    count = min(runtime.devices, torch.cuda.device_count())
    found = [float(torch.cuda.get_device_properties(i).total_memory) for i in range(count)]
    if runtime.memory_gb is not None:
        found.append(runtime.memory_gb * GIB)
    return min(found, default=None)


def _placed(
    auto: Any, config: Any, places: Sequence[str], trust_remote_code: bool
) -> dict[str, torch.device]:
    """Where each part of a model goes: its layers in order, so that all places hold about as many
    parameters; what comes before them to the first place; norm and head to the last, together, or
    to the first where the head is the embedding.

    The places are torch's devices, not names: accelerate would take "cpu" as a store of weights
    that are computed elsewhere.
    """
    import torch

    with torch.device("meta"):  # shapes only
        model = auto.from_config(config, trust_remote_code=trust_remote_code)
    stem, layers = _layers(model)
    before, after = _beside(model, stem)
    tied, total = bool(model.all_tied_weights_keys), _size(model)
    first, last = torch.device(places[0]), torch.device(places[0 if tied else -1])
    found = dict.fromkeys(before, first)
    # what has no parameters (the rotary embedding) is asked before the layers
    found |= {name: last if _size(part) else first for name, part in after.items()}
    end = 0 if tied else sum(map(_size, after.values()))
    held = total - _size(layers) - end
    for i, layer in enumerate(layers):
        share = int((held + _size(layer) / 2) / total * len(places))
        found[f"{stem}.{i}"] = torch.device(places[min(share, len(places) - 1)])
        held += _size(layer)
    return found


def _layers(model: Any) -> tuple[str, Any]:
    """Name and content of the largest list of modules."""
    import torch

    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=lambda found: _size(found[1]))


def _beside(model: Any, stem: str) -> tuple[list[str], dict[str, Any]]:
    """The names of what a model holds before its layers, and what it holds after them by name."""
    before: list[str] = []
    after: dict[str, Any] = {}
    module, prefix = model, ""
    for name in stem.split("."):
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        parts = dict(module.named_children())
        at = list(parts).index(name)
        before += [prefix + n for n in (*dict(own), *list(parts)[:at])]
        after |= {prefix + n: parts[n] for n in list(parts)[at + 1 :]}
        module, prefix = parts[name], f"{prefix}{name}."
    return before, after


def _size(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _dispatch(model: Any, at: dict[str, torch.device]) -> None:
    """As transformers has done it before, but so that what is given to a model goes to the place of
    its embeddings, and what comes out is where that was: else it may be any of the places."""
    from accelerate import dispatch_model

    first, skipped = next(iter(at.values())), model._skip_keys_device_placement
    dispatch_model(model, at, main_device=first, skip_keys=skipped, force_hooks=True)


def tells_pairs(model: Any, tokenizer: Any) -> bool:
    """Whether a model tells the second of two sentences by token types."""
    types = getattr(model.config, "type_vocab_size", 0)
    return types > 1 and "token_type_ids" in tokenizer.model_input_names


def out_of_memory(e: Exception) -> bool:
    import torch

    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e)


def ordinary_attention(model: Any) -> bool:
    """Whether attention of every layer is full or windowed: a state that runs through all tokens
    cannot be masked."""
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return types <= {"full_attention", "sliding_attention"}


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
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    except Exception as e:  # damaged files make the reader fail anywhere
        raise ModelError(f"{folder}: its config cannot be read ({first_line(e)}).") from None
    return Limits(room(folder), vocabulary)


def check_tokens(folder: Path, highest: int, known: int | None) -> None:
    """
    Args:
        highest: of the tokens that are used.
        known: how many the model has; None where its config does not say.

    Raises:
        ModelError: for tokens that the model does not have.
    """
    if known and highest >= known:
        raise ModelError(
            f"{folder}: its tokenizer has tokens beyond the model's {known}. They do not belong "
            "together."
        )
