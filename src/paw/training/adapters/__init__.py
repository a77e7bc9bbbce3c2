"""One file per method of PEFT, found by its name: how it is configured, and what it needs while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from paw.errors import AdapterError, nearest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Setting:
    """What a method may want to know of the training it is for."""

    model: Any
    name: str  # of the base, for messages
    task_type: str  # PEFT's: CAUSAL_LM or SEQ_CLS
    steps: int
    head: Sequence[str]  # modules that start at random and are trained and kept whole
    text: Sequence[int]  # tokens of the training data, some thousands


def nothing(*args: Any) -> None:
    return None


@dataclass(frozen=True)
class Method:
    config: Callable[[Any, Setting], Any]  # (adapter's config, setting) -> PeftConfig
    prepare: Callable[[Any, Setting], None] = nothing  # (adapted model, setting): a better start
    after_step: Callable[[Any, int], None] = (
        nothing  # (adapted model, step), while the step's gradients are there
    )
    penalty: Callable[[Any], torch.Tensor | None] = nothing  # added to the loss
    state: Callable[[Any], Mapping[str, Any] | None] = (
        nothing  # beyond parameters, what resuming needs
    )
    restore: Callable[[Any, Mapping[str, Any]], None] = nothing


def method_named(name: str) -> Method:
    """The method in the file of that name, which the schema has checked."""
    return cast(Method, import_module(f"paw.training.adapters.{name}").METHOD)


def targets(wanted: Sequence[str], setting: Setting) -> str | list[str]:
    """`all-linear`, or the named modules.

    Raises:
        AdapterError: for a name that no linear module ends with.
    """
    if list(wanted) == ["all-linear"]:
        return "all-linear"
    linears = [
        name for name, module in setting.model.named_modules() if hasattr(module, "in_features")
    ]
    for name in wanted:
        if not any(module == name or module.endswith(f".{name}") for module in linears):
            have = {module.rsplit(".", 1)[-1] for module in linears}
            raise AdapterError(
                f"adapter.target_modules: {setting.name} has no module {name!r}."
                + nearest(name, have)
            )
    return list(wanted)
