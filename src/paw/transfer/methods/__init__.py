"""One file per method. A method supplies two maps for a pair of modules and never builds an adapter itself; the few that
correct themselves along the depth fit the target's factors instead.

A new method is one file here that sets METHOD, and one yaml in conf/transfer; if it has parameters of its own, also a
dataclass in paw/cli/schema.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Generator, Tensor

from paw.errors import TransferError, nearest
from paw.models.adapters import Factors
from paw.store import Watch
from paw.transfer.calibrate import Calibration
from paw.transfer.maps import Maps
from paw.transfer.modules import Layers
from paw.transfer.pairing import Pair


@dataclass(frozen=True)
class Method:
    """`maps` gives T_in and T_out for a pair, and gets the method's configuration."""

    maps: Callable[[Pair, Any], Maps]


@dataclass(frozen=True)
class Fit:
    """A method that supplies no maps: `fit` gives the target's factors by module, from running both models on text."""

    fit: Callable[[Mapping[str, Factors], Calibration, Layers, Any, Watch], dict[str, Factors]]


@dataclass(frozen=True)
class Placebo:
    """What spoils another method's result: `spoil` destroys a module's finished factors (A: r×n, B: m×r) but for what it matches."""

    spoil: Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]


def method_named(name: str) -> Method | Fit | Placebo:
    known = [p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__"]
    if name not in known:
        raise TransferError(f"transfer.method: no method {name!r}." + nearest(name, known))
    found: Method | Fit | Placebo = import_module(f"paw.transfer.methods.{name}").METHOD
    return found
