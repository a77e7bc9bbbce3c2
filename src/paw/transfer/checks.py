"""What can be wrong with a transfer and is known before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paw.data.config import DatasetConfig
from paw.errors import ConfigError, TransferError
from paw.models.tensors import linear_shapes, module_parts
from paw.transfer.config import TransferConfig
from paw.transfer.controls import methods, real_method
from paw.transfer.layers import layers_of, proportional, spread
from paw.transfer.methods import Placebo, method_named
from paw.transfer.model_pair import calibration_file
from paw.transfer.modules import Layers, Names, pair_names

if TYPE_CHECKING:
    from paw.models.adapters import Factors


def check_calibration(c: TransferConfig, dataset: DatasetConfig) -> None:
    """
    Raises:
        ConfigError: where the text that is asked for is no file.
    """
    file = calibration_file(c, dataset)
    if not file.is_file():
        key = "transfer.calibration" if c.calibration else "dataset.calibration"
        raise ConfigError(f"{key}: {file} is no file. Give a text file with a document a line.")


def check_controls(chosen: TransferConfig) -> None:
    """
    Raises:
        ConfigError: for a control that is no method, and for a placebo that says nothing of the
            method it would spoil.
    """
    for c in methods(chosen, seed=0):
        placebo, real = method_named(c.method), real_method(c, chosen)
        if real is not c and isinstance(placebo, Placebo) and not placebo.applies(real):
            raise ConfigError(
                f"transfer={c.method}: {real.method} {placebo.otherwise}. Use another placebo, "
                "such as random."
            )


def check_transfer(adapter: Path, source: Path, target: Path, roles: Sequence[str]) -> None:
    """Whether an adapter can be moved at all, whichever layers are matched.

    Args:
        roles: transfer.modules.

    Raises:
        AdapterError, ModelError, TransferError: as `plan`.
    """
    depths = [len(layers_of(folder)) for folder in (source, target)]
    plan(adapter, source, target, spread(proportional(*depths), *depths), roles)


def plan(
    adapter: Path, source: Path, target: Path, layers: Layers, roles: Sequence[str] = ()
) -> tuple[Mapping[str, Factors], Names]:
    """The adapter's factors, fused modules as their parts, and the pairs of modules that they are
    moved between.

    Raises:
        AdapterError, ModelError: for damaged files.
        TransferError: where the adapter does not fit the source, or no module of it has a twin.
    """
    found = check_fits(adapter, source, "source")
    return found, pair_names(found, layers_of(target), layers, roles)


def check_fits(adapter: Path, base: Path, side: str) -> Mapping[str, Factors]:
    """An adapter's factors by module, fused modules as their parts.

    Args:
        side: source or target, for messages.

    Raises:
        TransferError: where they do not fit the base's weights.
    """
    from paw.models.adapters import read_adapter, unfused

    found = unfused(read_adapter(adapter, magnitudes=True), module_parts(base))
    shapes = linear_shapes(base)
    for name, factors in found.items():
        if name not in shapes:
            raise TransferError(
                f"{adapter}: the {side}'s files have no weight called {name}. Was the adapter "
                "trained on another base?"
            )
        if shapes[name] != (factors.b.shape[0], factors.a.shape[1]):
            raise TransferError(
                f"{adapter}: {name} of the adapter does not fit the {side} model. Was it trained "
                "on another base?"
            )
    return found
