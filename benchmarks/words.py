"""Two real tasks small enough for models of 135 M and 270 M parameters on two cores, of single
words:

    nouns     what kind of thing a noun names (WordNet 3.0: the lexicographer's file of its most
              frequent sense, as Debian's package wordnet-base has it)
    valence   whether a word is negative or positive (the lexicon of vaderSentiment: the mean of
              what ten people said)

    python benchmarks/words.py DATA        writes DATA/nouns and DATA/valence
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

NOUNS = Path("/usr/share/wordnet")
# wninput(5WN) and lexnames(5WN): the files of nouns
FILES = (
    *("top", "act", "animal", "artifact", "attribute", "body", "cognition", "communication"),
    *("event", "feeling", "food", "group", "location", "motive", "object", "person"),
    *("phenomenon", "plant", "possession", "process", "quantity", "relation", "shape", "state"),
    *("substance", "time"),
)
LEAST = 200  # nouns of a kind
SPLITS = {"train": (0, 1600), "validation": (1600, 1900), "test": (1900, 2400)}

Pair = tuple[str, str]  # a word and its class


def nouns(folder: Path = NOUNS) -> list[Pair]:
    """Single words that WordNet's tagged texts have, with the kind of their most frequent sense;
    kinds of at least LEAST words."""
    kind = {}
    for line in _lines(folder / "data.noun"):
        offset, file, *_ = line.split()
        kind[offset] = FILES[int(file) - 3]
    found = []
    for line in _lines(folder / "index.noun"):
        lemma, _, _, pointers, *rest = line.split()
        _, tagged, first = rest[int(pointers) :][:3]
        if lemma.isalpha() and int(tagged):
            found.append((lemma, kind[first]))
    many = {kind for kind, n in Counter(kind for _, kind in found).items() if n >= LEAST}
    return [pair for pair in found if pair[1] in many]


def lexicon() -> list[tuple[str, float]]:
    """Single words with their valence, from -4 to 4."""
    spec = find_spec("vaderSentiment")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("words: the lexicon is not there: pip install --no-deps vaderSentiment")
    file = Path(spec.submodule_search_locations[0]) / "vader_lexicon.txt"
    rows = [line.split("\t")[:2] for line in file.read_text(encoding="utf-8").splitlines()]
    return [(word, float(valence)) for word, valence in rows if word.isalpha()]


def valence() -> list[Pair]:
    return [(word, "positive" if v > 0 else "negative") for word, v in lexicon()]


def write(folder: Path, pairs: Sequence[Pair]) -> None:
    drawn = random.Random(0).sample(pairs, max(high for _, high in SPLITS.values()))
    choices = sorted({answer for _, answer in pairs})
    folder.mkdir(parents=True, exist_ok=True)
    for split, (low, high) in SPLITS.items():
        rows = [
            {"question": w, "choices": choices, "labels": choices, "answer": a}
            for w, a in drawn[low:high]
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    print(folder, Counter(answer for _, answer in drawn).most_common())


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise SystemExit(f"words: {path} is not there: apt-get install wordnet-base")
    return [x for x in path.read_text("utf-8").splitlines() if not x.startswith("  ")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--wordnet", type=Path, default=NOUNS)
    asked = parser.parse_args()
    write(asked.data / "nouns", nouns(asked.wordnet))
    write(asked.data / "valence", valence())
