"""Stage `spoil`: a transferred adapter made a placebo, by a method that spoils results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paw.models.adapters import Factors, birth, read_adapter, read_config, stamp, write_adapter
from paw.store import Input, Stage, Watch
from paw.transfer.methods import Placebo, method_named


@dataclass(kw_only=True)
class SpoilStage:
    method: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class SpoilResult:
    method: str
    target_modules: int
    of: str = ""  # the method whose result is spoilt
    coverage: float | None = None  # of that: share of the source adapter's modules that were used

    def __str__(self) -> str:
        return f"{self.target_modules} modules"


def spoil(config: SpoilStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> SpoilResult:
    """
    Args:
        inputs: `adapter`, which a real method moved to the target.

    Writes the adapter spoilt, module by module, as a PEFT folder for the same base.
    """
    import torch

    placebo, real = method_named(config.method), inputs["adapter"]
    assert isinstance(placebo, Placebo)
    assert placebo.spoil is not None
    generator = torch.Generator().manual_seed(config.seed)
    modules = {
        name: Factors(*placebo.spoil(f.a, f.b, generator))
        for name, f in sorted(read_adapter(real.path).items())
    }
    write_adapter(out, modules, read_config(real.path).get("base_model_name_or_path"))
    said = birth(real.path)
    stamp(
        out,
        said["base"],
        made_by="spoil",
        method=config.method,
        seed=config.seed,
        adapter=real.fingerprint,
    )
    return SpoilResult(
        method=config.method,
        target_modules=len(modules),
        of=said["figures"]["method"],
        coverage=said["figures"]["coverage"],
    )


STAGE = Stage("spoil", "2", "paw.transfer.spoil:spoil", config=SpoilStage, result=SpoilResult)
