"""What happened in a training until now. A checkpoint carries it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paw.store import write_text

# Times differ from run to run: they lie in a file that an artifact's content leaves out.
CURVE, TIMES = "curve.jsonl", "times.csv"


@dataclass
class History:
    # of each step: the mean over all that it counts, in all processes (nats, or squared errors)
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss)
    seconds: list[float] = field(default_factory=list)  # of each step
    tokens: list[int] = field(default_factory=list)
    skipped: int = 0  # steps that float16's scaler left out, because their gradients overflowed

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def best(self) -> tuple[int, float]:
        """Step and loss of the best validation."""
        return min(self.validations, key=lambda v: v[1])

    def stale(self, patience: int | None) -> bool:
        """Whether as many validations were no better than the best one."""
        if patience is None or not self.validations:
            return False
        return len(self.validations) - 1 - self.validations.index(self.best) >= patience

    @property
    def final_loss(self) -> float:
        """The mean over the last tenth of the steps."""
        tail = self.losses[-max(1, self.step // 10) :]
        return sum(tail) / len(tail)

    @property
    def tokens_per_second(self) -> float:
        """Without the first step, which touches its memory for the first time."""
        steady = slice(1 if self.step > 1 else 0, None)
        return round(sum(self.tokens[steady]) / sum(self.seconds[steady]), 1)

    def write(self, folder: Path) -> None:
        """The curve and the times."""
        rows: list[dict[str, Any]] = [
            {"step": i, "loss": loss} for i, loss in enumerate(self.losses, 1)
        ]
        rows += [{"step": step, "val_loss": loss} for step, loss in self.validations]
        lines = [json.dumps(row) + "\n" for row in sorted(rows, key=lambda r: r["step"])]
        write_text(folder / CURVE, "".join(lines))
        each = enumerate(zip(self.tokens, self.seconds, strict=True), 1)
        times = [f"{i},{n},{s:.4f}\n" for i, (n, s) in each]
        write_text(folder / TIMES, "step,tokens,seconds\n" + "".join(times))


def curve(file: Path) -> Mapping[str, list[float]]:
    """The losses that a finished training left."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {key: [r[key] for r in rows if key in r] for key in ("loss", "val_loss")}
