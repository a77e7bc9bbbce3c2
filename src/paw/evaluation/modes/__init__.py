"""One file for each way to put questions and to judge answers, found by the file's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from paw.data.example import Example
from paw.data.load import listed
from paw.data.tokenise import Encoded
from paw.errors import DataError
from paw.evaluation.config import MODES
from paw.evaluation.model import Model
from paw.evaluation.records import Record
from paw.evaluation.result import EvaluateResult
from paw.models.load import check_tokens
from paw.plugins import load
from paw.store import Input

if TYPE_CHECKING:
    from paw.evaluation.evaluate import EvaluateStage


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Questions, how they are put, and to what."""

    questions: list[Example]
    config: EvaluateStage
    inputs: Mapping[str, Input]  # of the stage
    model: Model
    left_out: Counter[str]  # questions that are not asked, by the reason

    def fitting(
        self, rows: Sequence[list[Encoded]], writes: int = 0
    ) -> tuple[list[Example], list[list[Encoded]]]:
        """The questions that the model has room for, and their rows; the others are left out.

        Args:
            rows: of each question.
            writes: tokens that will be written after the context of the gold answer.

        Raises:
            ModelError: for tokens that the model does not know.
            DataError: for a question without room, unless dataset.bad_rows=skip; where none fits.
        """
        base, file, reach = self.model.base.path, self.inputs["data"].path, self.model.limits
        most, known = reach.positions, reach.vocabulary
        check_tokens(base, max(max(r.ids) for choices in rows for r in choices), known)
        kept = []
        for question, choices in zip(self.questions, rows, strict=True):
            needs = max(len(r.ids) for r in choices)
            if writes:
                needs = max(needs, choices[question.gold].start + writes)
            if most is None or needs <= most:
                kept.append((question, choices))
            elif self.config.dataset.bad_rows == "refuse":
                raise DataError(
                    f"{file}, line {question.line}: the question needs {needs} tokens, the "
                    f"model has room for {most}. Leave such rows out (dataset.bad_rows=skip), "
                    "show fewer shots, or choose another model."
                )
            else:
                self.left_out["more tokens than the model has room for"] += 1
        if not kept:
            raise DataError(
                f"{file}: no question fits into the model's {most} tokens. Show fewer shots, "
                "or choose another model."
            )
        self.tell()
        return [q for q, _ in kept], [r for _, r in kept]

    def tell(self) -> None:
        """Says which questions are not asked."""
        if self.left_out:
            self.model.watch.say(f"left out: {listed(self.left_out)}")


class Mode(Protocol):
    def form(self, kind: str) -> str:
        """What becomes of a row of a kind of data: see `EvaluateConfig.form`."""

    def answer(self, asking: Asking) -> list[Record]:
        """Puts the questions: a record of each that is asked, in their order."""

    def metrics(self, records: Sequence[Record], positive: int | None = None) -> EvaluateResult:
        """
        Args:
            positive: the choice whose F1 is reported.
        """


def mode_named(name: str) -> Mode:
    return cast(Mode, load(MODES, name, "evaluate.mode"))
