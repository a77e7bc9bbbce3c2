"""Makes src/paw/embedded/general.txt, what a transfer is calibrated on where nobody gives a text:

    python scripts/general_text.py DATA > src/paw/embedded/general.txt

Questions of training splits without their answers, mixed: how to do things at home (PIQA), who did
what to whom (WinoGrande; the first of the two names stands where one is asked for, right or not),
and stories with numbers (GSM8K). DATA has <name>/<split>.jsonl.gz.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

TAKEN = {"piqa/train": 500, "winogrande/train_xl": 450, "gsm8k/train": 120}


def text_of(row: dict[str, Any]) -> str:
    first = row.get("choices", ["_"])[0]
    return " ".join(row["question"].replace("_", first).split())


def main(data: Path) -> None:
    draw, texts = random.Random(0), set[str]()
    for name, count in TAKEN.items():
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as rows:
            found = sorted({text_of(json.loads(row)) for row in rows})
        texts |= set(draw.sample([text for text in found if text.count(" ") >= 4], count))
    lines = sorted(texts)
    draw.shuffle(lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
