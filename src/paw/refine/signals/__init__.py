"""One file per signal, found by its name: it sets SIGNAL. What the source model says about prompts
becomes lessons, which are text, so that the two models need no common tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paw import plugins
from paw.refine.config import SIGNALS, TeachStage
from paw.refine.prompts import Prompt
from paw.refine.teacher import Lesson, Teacher

__all__ = ["Lesson", "Prompt", "Signal", "Teacher", "shares", "signal_named"]


@dataclass(frozen=True, kw_only=True)
class Signal:
    """
    Attributes:
        teach: lessons of prompts; those without one are left out.
        compares: prompts must have choices.
        reads_target: the target base is asked, too.
    """

    teach: Callable[[Teacher, Sequence[Prompt], TeachStage], list[Lesson]]
    compares: bool = False
    reads_target: bool = False


def signal_named(name: str) -> Signal:
    """
    Raises:
        ConfigError: where no file has that name.
    """
    found: Signal = plugins.load(SIGNALS, name, "refine.signal").SIGNAL
    return found


def shares(scores: Sequence[float]) -> tuple[float, ...]:
    """Softmax of log-likelihoods."""
    most = max(scores)
    found = [math.exp(s - most) for s in scores]
    return tuple(x / sum(found) for x in found)
