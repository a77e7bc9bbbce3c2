"""One record a question, so that any two evaluations can be compared question by question."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paw.errors import StageError

RECORDS = "records.jsonl"
# id; gold, prediction and prediction_norm (by characters), numbers of choices, and where all
# questions have the same prediction_calibrated (each given as often as it is right); correct, None
# where there is one choice; loglikelihoods (nats) and tokens of all choices. Of a written answer
# also text, parsed and correct_flexible; of a value also value, and prediction is one.
Record = dict[str, Any]


def write_records(folder: Path, records: Sequence[Record]) -> None:
    with open(folder / RECORDS, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def read_records(folder: Path) -> list[Record]:
    lines = (folder / RECORDS).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def require_finite(records: Sequence[Record]) -> None:
    """
    Raises:
        StageError: where a log-likelihood is infinite or not a number.
    """
    bad = [r["id"] for r in records if not all(map(math.isfinite, r["loglikelihoods"]))]
    if bad:
        raise StageError(
            f"evaluate: the scores of {len(bad)} of {len(records)} questions are not finite (the "
            f"first: {bad[0]}). The adapter or the precision is broken: try "
            "hardware.precision=float32."
        )
