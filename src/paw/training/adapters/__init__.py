"""One file per method of PEFT, found by its name: its schema, its PEFT configuration, and what it
needs while it is trained. A file's METHOD holds these; importing it imports neither torch nor PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional, cast

from omegaconf import MISSING

from paw import plugins
from paw.config.checks import one_of, transient, within
from paw.errors import AdapterError, ConfigError, nearest

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out

if TYPE_CHECKING:
    import torch

FOLDER = "training/adapters"


@dataclass
class AdapterConfig:
    """What all methods have. `train.lr` is the method's own `lr` unless it is set: how large a step
    should be depends far more on the method than on the data (a LoRA factor, an IA³ scale and a
    virtual token live on other scales)."""

    method: str = MISSING  # a file of this folder
    lr: float = transient(2e-4)  # of causal training
    lr_classify: float = transient(4e-4)  # of a classifier, whose head starts at random
    # the base while it is trained on: none, nf4 (4 bit, double quantisation) or int8
    quantise: str = "none"
    # an adapter of the source model from elsewhere: it is not trained then
    path: Optional[str] = None

    def __post_init__(self) -> None:
        one_of("adapter.quantise", self.quantise, ("none", "nf4", "int8"))

    @property
    def virtual_tokens(self) -> int:
        """Places of the model's context that the adapter takes."""
        return 0

    @property
    def transferable(self) -> bool:
        """Whether it is a LoRA, the product of two factors, which is all that is transferred."""
        return False


@dataclass
class TargetedConfig(AdapterConfig):
    """Sits on named modules."""

    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise ConfigError(
                "adapter.target_modules: the list is empty. Name modules, or [all-linear]."
            )


@dataclass
class VirtualTokensConfig(AdapterConfig):
    """Learnt tokens, or their keys and values, before every text."""

    virtual_tokens: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        within("adapter.virtual_tokens", self.virtual_tokens, 1, 10**5)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method may want to know of the training it is for."""

    model: Any
    name: str  # of the base, for messages
    task_type: str  # PEFT's: CAUSAL_LM or SEQ_CLS
    steps: int
    head: Sequence[str] = ()  # modules that start at random and are trained and kept whole
    text: Sequence[int] = ()  # tokens of the training data, some thousands


def nothing(*args: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Method:
    schema: type[AdapterConfig]
    config: Callable[[Any, Setting], Any]  # (adapter's config, setting) -> PeftConfig
    prepare: Callable[[Any, Setting], None] = nothing  # (adapted model, setting): a better start
    # (adapted model, step), while the step's gradients are there
    after_step: Callable[[Any, int], None] = nothing
    penalty: Callable[[Any], torch.Tensor | None] = nothing  # added to the loss
    # beyond parameters, what resuming needs
    state: Callable[[Any], Mapping[str, Any] | None] = nothing
    restore: Callable[[Any, Mapping[str, Any]], None] = nothing
    # (adapted model, trained tensors by name) -> the tensors that PEFT saves
    saved: Callable[[Any, Mapping[str, Any]], Mapping[str, Any]] = lambda model, tensors: tensors
    shards: bool = False  # whether FSDP can shard what it trains
    recomputes: bool = True  # whether activations can be recomputed (gradient checkpointing)


def method_named(name: str) -> Method:
    """
    Raises:
        ConfigError: where no file has that name.
    """
    return cast(Method, plugins.load(FOLDER, name, "adapter.method").METHOD)


def targets(wanted: Sequence[str], setting: Setting) -> str | list[str]:
    """`all-linear`, or the named modules.

    Raises:
        AdapterError: for a name that no linear module ends with.
    """
    if list(wanted) == ["all-linear"]:
        return "all-linear"
    modules = setting.model.named_modules()
    check_targets(wanted, [n for n, m in modules if hasattr(m, "in_features")], setting.name)
    return list(wanted)


def check_targets(wanted: Iterable[str], linears: Sequence[str], model: str) -> None:
    """
    Args:
        linears: dotted names of a model's linear modules.

    Raises:
        AdapterError: for a wanted name that none of them ends with.
    """
    last = {name.rpartition(".")[2] for name in linears}
    for name in wanted:
        if not any(module == name or module.endswith(f".{name}") for module in linears):
            raise AdapterError(
                f"adapter.target_modules: {model} has no module {name!r}." + nearest(name, last)
            )
