"""Which stages a transfer needs, and their configurations, of what the user configured alone."""

from __future__ import annotations

from dataclasses import replace

from paw.models.load import Runtime
from paw.transfer.calibrate import CalibrateStage
from paw.transfer.config import GATED, PlaceboConfig, TransferConfig
from paw.transfer.gate import GateStage
from paw.transfer.match import MatchStage
from paw.transfer.model_pair import TextConfig
from paw.transfer.modules import BASIS, HELD
from paw.transfer.spoil import SpoilStage
from paw.transfer.transfer import TransferStage


def needs_match(c: TransferConfig) -> bool:
    """Whether stage `match` goes before: layers are matched by similarity."""
    return c.layers in ("cka", "similarity")


def needs_moments(c: TransferConfig) -> bool:
    """Whether stage `calibrate` goes before. A method that runs the models needs none."""
    return c.uses_text and c.evidence != "models"


def needs_text(c: TransferConfig) -> bool:
    """Whether any of the stages runs both models on a text."""
    return c.uses_text or c.layers == "cka"


def text_config(
    c: TransferConfig,
    runtime: Runtime,
    trust: tuple[bool, bool],
    shuffle: int | None = None,
) -> TextConfig:
    """
    Args:
        trust: whether code of the source's, of the target's folder is run.
        shuffle: the seed of a placebo that pairs positions at random.
    """
    return TextConfig(
        runtime=runtime,
        positions=c.positions,
        shuffle=shuffle,
        batch_size=c.batch_size,
        trust=trust,
    )


def match_config(c: TransferConfig, text: TextConfig, bases: str | None) -> MatchStage:
    return MatchStage(
        text=None if c.layers == "similarity" else replace(text, positions=HELD, shuffle=None),
        basis=c.basis or BASIS,
        device=text.runtime.device,
        bases=bases,
    )


def calibrate_config(c: TransferConfig, text: TextConfig) -> CalibrateStage:
    return CalibrateStage(text=text, layers=c.layers, spread=c.spread, memory_gb=c.memory_gb)


def transfer_config(c: TransferConfig, text: TextConfig, bases: str | None) -> TransferStage:
    """
    Args:
        c: of a real method.
        bases: a folder where singular bases are kept.
    """
    return TransferStage(
        transfer=replace(c, **GATED),
        text=text if c.uses_text else None,
        runtime=text.runtime,
        bases=bases,
        trust=text.trust,
    )


def gate_config(c: TransferConfig, name: str | None) -> GateStage:
    """
    Args:
        name: the target's hub id, if it has one.
    """
    return GateStage(transfer=c, name=name)


def spoil_config(c: PlaceboConfig) -> SpoilStage:
    return SpoilStage(method=c.method, seed=c.seed)
