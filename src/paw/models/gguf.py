"""A GGUF file to a folder in the hub's layout, through transformers' own reader."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from paw.errors import ModelError
from paw.text import first_line


def dequantise(gguf: Path, out: Path) -> None:
    """Writes config.json, float32 safetensors and the tokenizer of a GGUF file to `out`.

    Raises:
        ModelError: where the file is damaged or of an architecture that transformers cannot read.
    """
    try:
        import gguf as _  # noqa: F401 - transformers needs it and says so less clearly
    except ImportError:
        raise ModelError(
            f"{gguf.name}: GGUF files are read with the package gguf. Install it: pip install gguf"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # On a terminal the reader's own bars show progress; in a log they would flood it.
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    folder, file = str(gguf.parent), gguf.name
    with contextlib.redirect_stderr(shown), _read_once():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, dtype=torch.float32
            )
        except Exception as e:  # damaged bytes make the reader fail anywhere
            raise ModelError(
                f"{gguf}: cannot be read as a GGUF model ({first_line(e)}). Check the file, or use "
                "the original folder."
            ) from None
        # What was read is no longer quantised, and transformers refuses to save what claims to be.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """transformers 5.23 parses the file for the tokenizer, the configuration and the weights, each
    anew, and builds the list of tensors' names for every submodule: half of the time, for the same
    answers."""
    import gguf

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, found in slow.items():
            setattr(gguf, name, cache(found))
        yield
    finally:
        for name, found in slow.items():
            setattr(gguf, name, found)
