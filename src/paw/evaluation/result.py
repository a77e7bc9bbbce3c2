"""What an evaluation found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The figures of one system on one split, in the order in which results.json has them.

    None where a figure does not apply.
    """

    n: int  # questions
    accuracy: float | None = None
    stderr: float | None = None
    low: float | None = None  # of the 95 % interval
    high: float | None = None
    acc_norm: float | None = None  # choices weighed by their characters
    loss: float  # nats per token of the gold answers; of values the mean squared error
    perplexity: float | None = None
    # every choice given as often as it is right, where all questions have the same
    acc_calibrated: float | None = None
    unparsed: int | None = None  # written answers that could not be parsed
    accuracy_flexible: float | None = None  # by the last number of a written answer
    precision: float | None = None
    recall: float | None = None
    f1_macro: float | None = None
    mcc: float | None = None  # Matthews' correlation
    f1: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    left_out: dict[str, int] = field(default_factory=dict)  # rows by the reason they were left out

    def __str__(self) -> str:
        said = [f"loss {self.loss:.3f}, n = {self.n}"]
        if self.accuracy is not None:
            said.insert(0, f"accuracy {self.accuracy:.3f} ± {self.stderr:.3f}")
        if self.unparsed:
            said.append(f"{self.unparsed} answers could not be parsed")
        return ", ".join(said)
