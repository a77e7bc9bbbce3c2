"""Stage `compress`: a model quantised after training, a folder in the hub's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paw.config.checks import transient
from paw.export.config import CompressConfig
from paw.export.tokenizer import copy_tokenizer
from paw.models.load import Runtime, load_model
from paw.store import Input, Stage, Watch


@dataclass(kw_only=True)
class CompressStage:
    compress: CompressConfig
    runtime: Runtime
    trust_remote_code: bool = transient(False)


@dataclass(frozen=True, kw_only=True)
class CompressResult:
    scheme: str
    gib_before: float
    gib: float

    def __str__(self) -> str:
        return f"{self.gib_before} GiB to {self.gib} GiB"


STAGE = Stage(
    "compress",
    "1",
    "paw.export.compress:compress",
    config=CompressStage,
    result=CompressResult,
    devices="one",
)


def compress(
    config: CompressStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> CompressResult:
    """Linear layers in 4 (NF4) or 8 bits; embeddings, norms and the output projection stay as they
    are.

    Args:
        inputs: `model`.
    """
    base = inputs["model"].path
    model = load_model(base, config.runtime, config.trust_remote_code, config.compress.scheme)
    model.save_pretrained(str(out))
    copy_tokenizer(base, out)
    before, after = _gib(base), _gib(out)
    return CompressResult(scheme=config.compress.scheme, gib_before=before, gib=after)


def _gib(folder: Path) -> float:
    return round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**30, 3)
