"""A relative of a model that lacks some of its layers, as a target for its adapters.

python benchmarks/prune.py MODEL OUT 20 21 22      MODEL a folder; its layers 20 to 22 left out
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def prune(model: Path, out: Path, dropped: Sequence[int]) -> None:
    """Writes the model without those layers, counted from 0, and its tokenizer.

    Raises:
        SystemExit: for a layer that the model has not.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    config, layers = found.config, found.model.layers
    if missing := [i for i in dropped if not 0 <= i < len(layers)]:
        raise SystemExit(f"{model} has layers 0 to {len(layers) - 1}, and not {missing}.")
    kept = [i for i in range(len(layers)) if i not in set(dropped)]
    found.model.layers = torch.nn.ModuleList(layers[i] for i in kept)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    found.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("dropped", type=int, nargs="+")
    given = parser.parse_args()
    prune(given.model, given.out, given.dropped)
    print(f"{given.out}: {given.model.name} without layers {given.dropped}")


if __name__ == "__main__":
    main()
