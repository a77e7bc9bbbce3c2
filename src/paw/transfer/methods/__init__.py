"""One file per method, which sets METHOD and needs torch only when it runs.

A method supplies two maps for a pair of modules and never builds an adapter itself; the few that
correct themselves along the depth fit the target's factors instead. A new method is one file here
(or in a plugin's transfer/methods) and one yaml in conf/transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paw.models.adapters import Factors
from paw.plugins import load
from paw.store import Watch
from paw.transfer.config import PlaceboConfig, TransferConfig
from paw.transfer.maps import Eye, Maps, Product
from paw.transfer.model_pair import ModelPair
from paw.transfer.modules import Layers
from paw.transfer.pairing import Pair

if TYPE_CHECKING:
    from torch import Generator, Tensor

    MapsOf = Callable[[Pair, Any], Maps]
    FitOf = Callable[[Mapping[str, Factors], ModelPair, Layers, Any, Watch], dict[str, Factors]]
    Spoil = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]

__all__ = [
    "Eye",
    "Fit",
    "Maps",
    "Method",
    "Pair",
    "Placebo",
    "Product",
    "TransferConfig",
    "method_named",
]
METHODS = "transfer/methods"


@dataclass(frozen=True)
class Method:
    """`maps` gives T_in and T_out for a pair, and gets the method's configuration. It is shown the
    spaces of the pair's own two modules, and those of the roles in `also` in the same layers, which
    the adapter need not hold."""

    maps: MapsOf
    schema: type[TransferConfig] = TransferConfig
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fit:
    """A method that supplies no maps: `fit` gives the target's factors by module, from running
    both models on text."""

    fit: FitOf
    schema: type[TransferConfig] = TransferConfig


@dataclass(frozen=True, kw_only=True)
class Placebo:
    """A control that does what a method does but for what it spoils: the finished factors of each
    module (`spoil`, of A: r×n and B: m×r), the pairing of the text's positions (`shuffles`), or
    the maps (`maps`)."""

    drawn: bool  # differs from draw to draw
    spoil: Spoil | None = None
    shuffles: bool = False
    maps: MapsOf | None = None
    # Whether it says anything of a method, and why not of the others.
    applies: Callable[[TransferConfig], bool] = lambda real: True
    otherwise: str = ""
    schema: type[TransferConfig] = PlaceboConfig


def method_named(name: str) -> Method | Fit | Placebo:
    """
    Raises:
        ConfigError: where there is no file of that name.
    """
    found: Method | Fit | Placebo = load(METHODS, name, "transfer.method").METHOD
    return found
