"""Stage `calibrate`: what two models do on the same text, as second moments, shared by all adapters
and methods.

The moments are kept where they fit into `transfer.memory_gb`; where they do not, `transfer` streams
them in groups of layers, and the artifact says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from paw.models.tensors import linear_shapes
from paw.store import Input, Stage, Watch, write_text
from paw.transfer.evidence import keep
from paw.transfer.layers import matched_layers
from paw.transfer.model_pair import ModelPair, TextConfig
from paw.transfer.modules import all_pairs, by_layer, moments_bytes

NOTE = "calibration.json"  # of moments that are not kept


@dataclass(kw_only=True)
class CalibrateStage:
    text: TextConfig
    layers: str = "proportional"
    spread: bool = True
    # It decides what is kept, and so it is known by: a larger one keeps what a smaller did not.
    memory_gb: float = 8.0


@dataclass(frozen=True, kw_only=True)
class CalibrateResult:
    mib: float  # of the moments
    kept: bool = True
    positions: int = 0  # of the text, in both models' tokens
    held: int = 0  # of those, kept out of the fit
    texts: int = 0
    at_random: bool = False  # positions are paired wrongly, for the placebo

    def __str__(self) -> str:
        if not self.kept:
            return (
                f"{self.mib} MiB of moments are more than transfer.memory_gb: none are kept, each "
                "transfer runs the text"
            )
        paired = ", paired at random" if self.at_random else ""
        return f"{self.positions} positions of {self.texts} texts{paired}, {self.mib} MiB"


def calibrate(
    config: CalibrateStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> CalibrateResult:
    """One pass of both models over the calibration text.

    Args:
        inputs: `source`, `target` and `calibration` as of ModelPair; `match` where layers are
            matched by similarity.

    Writes the moments of every space that two modules of matched layers share; where they do not
    fit, a note.
    """
    shapes = [linear_shapes(inputs[side].path) for side in ("source", "target")]
    layers = matched_layers(config.layers, config.spread, inputs)
    names = all_pairs(by_layer(shapes[0]), by_layer(shapes[1]), layers)
    size = moments_bytes(names, *shapes)
    if size > config.memory_gb * 2**30:
        result = CalibrateResult(mib=round(size / 2**20, 1), kept=False)
        write_text(out / NOTE, json.dumps(asdict(result)))
        return result
    run = ModelPair(config.text, inputs)
    mib = keep(run.see(names, watch), out)
    return CalibrateResult(
        mib=round(mib, 1),
        positions=run.positions,
        held=sum(len(t.positions) for t in run.held),
        texts=len(run.texts),
        at_random=config.text.shuffle is not None,
    )


STAGE = Stage(
    "calibrate",
    "3",
    "paw.transfer.calibrate:calibrate",
    config=CalibrateStage,
    result=CalibrateResult,
    devices="one",
)
