"""Stage `spoil`: a transferred adapter made a placebo, by one of the methods that are none (random, negated)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paw.models.adapters import Factors, made_for, read_adapter, read_config, stamp, write_adapter
from paw.store import Input, Stage, Watch

STAGE = Stage("spoil", "1", "paw.transfer.spoil:spoil")


@dataclass
class SpoilStage:
    method: str
    seed: int


def spoil(
    config: SpoilStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> dict[str, Any]:
    """
    Args:
        inputs: `adapter`, which a real method moved to the target.

    Writes the adapter spoilt, module by module, as a PEFT folder for the same base.
    """
    import torch

    from paw.transfer.methods import Placebo, method_named

    placebo, real = method_named(config.method), inputs["adapter"]
    assert isinstance(placebo, Placebo)
    generator = torch.Generator().manual_seed(config.seed)
    modules = {
        name: Factors(*placebo.spoil(f.a, f.b, generator))
        for name, f in sorted(read_adapter(real.path).items())
    }
    write_adapter(out, modules, read_config(real.path).get("base_model_name_or_path"))
    stamp(
        out,
        made_for(real.path) or "",
        made_by="spoil",
        method=config.method,
        seed=config.seed,
        adapter=real.fingerprint,
    )
    return {"method": config.method, "target_modules": len(modules)}
