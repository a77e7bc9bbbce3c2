"""Stage `calibrate`: what two models do on the same text, as second moments, shared by all adapters and methods.

The moments are an artifact where they fit into `transfer.memory_gb`; where they do not, `transfer` streams them in groups
of layers and keeps none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.checks import transient
from paw.data.config import DatasetConfig
from paw.data.example import words
from paw.data.load import examples
from paw.errors import DataError
from paw.models.layout import parts
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.store import Input, Stage, Watch
from paw.transfer.modules import (
    HELD,
    Place,
    Space,
    all_pairs,
    by_layer,
    layer_of,
    moments_bytes,
    shared_spaces,
)

if TYPE_CHECKING:
    from paw.transfer.activations import PairedText
    from paw.transfer.pairing import Site

MOMENTS = "moments.safetensors"
PARTS = ("cross", "gram_s", "gram_t", "held_s", "held_t")  # of a Site
STAGE = Stage("calibrate", "2", "paw.transfer.calibrate:calibrate")

Names = Sequence[tuple[str, str]]
Shapes = Mapping[str, Sequence[int]]
Group = tuple[Names, "dict[tuple[Space, Space], Site]"]


@dataclass
class CalibrateStage:
    runtime: Runtime
    layers: list[tuple[int, int]]  # matched ones: source, target
    positions: int
    shuffle: int | None = None  # a seed by which positions are paired wrongly, for the placebo
    dataset: DatasetConfig | None = None  # where the text is the questions of a split
    split: str | None = None
    batch_size: int = transient(32)
    trust: tuple[bool, bool] = transient(
        (False, False)
    )  # code of the source's, of the target's folder


def calibrate(
    config: CalibrateStage, inputs: Mapping[str, Input], out: Path, watch: Watch
) -> dict[str, Any]:
    """One pass of both models over the calibration text.

    Args:
        inputs: `source`, `target`; `calibration` (a text file, a document a line) or `data` (rows of the train split).

    Writes the moments of every space that two modules of matched layers share, float32.
    """
    from safetensors.torch import save_file

    run = Calibration(config, inputs)
    names = all_pairs(by_layer(run.parts[0]), by_layer(run.parts[1]), config.layers)
    tensors = {}
    for (s, t), site in run.see(names, watch).items():
        for part in PARTS:
            tensors[f"{_key(s)} {_key(t)} {part}"] = getattr(site, part).contiguous().cpu()
    save_file(tensors, out / MOMENTS)
    mib = round(sum(x.nbytes for x in tensors.values()) / 2**20, 1)
    return {
        "positions": run.positions,
        "held": sum(len(t.positions) for t in run.held),
        "texts": len(run.texts),
        "mib": mib,
    }


class Calibration:
    """Both models on their device, and the calibration text in both's tokens."""

    def __init__(self, config: CalibrateStage, inputs: Mapping[str, Input]) -> None:
        from paw.transfer.activations import hold_out, pair_texts

        self.config = config
        each = [
            (inputs[name].path, trust)
            for name, trust in zip(("source", "target"), config.trust, strict=True)
        ]
        tokenizers = [load_tokenizer(path, trust) for path, trust in each]
        self.texts: list[PairedText] = pair_texts(
            _texts(config, inputs), tokenizers[0], tokenizers[1], config.positions
        )
        self.fit, self.held = hold_out(self.texts, HELD)
        self.positions = sum(len(t.positions) for t in self.texts)
        self.pads = (tokenizers[0].pad_token_id, tokenizers[1].pad_token_id)
        self.source, self.target = (load_model(path, config.runtime, trust) for path, trust in each)
        self.models = (self.source, self.target)
        self.parts = [
            parts(_linears(model), path) for model, (path, _) in zip(self.models, each, strict=True)
        ]

    def see(self, names: Names, watch: Watch) -> dict[tuple[Space, Space], Site]:
        """The moments of every space that these module pairs share."""
        from paw.transfer.activations import second_moments

        widest = max(model.config.get_text_config().intermediate_size for model in self.models)
        if self.positions < widest:
            watch.say(
                f"{self.positions} positions are few for spaces of {widest} dimensions: raise transfer.positions or give more text"
            )
        roles = [by_layer(parts) for parts in self.parts]
        wanted, c = shared_spaces(names), self.config
        source, target = (
            {
                pair[side]: self.parts[side][roles[side][pair[side][0]][pair[side][1].role]]
                for pair in wanted
            }
            for side in (0, 1)
        )
        return second_moments(
            self.models,
            (source, target),
            wanted,
            self.fit,
            self.held,
            c.batch_size,
            self.pads,
            c.shuffle,
            watch,
        )


def _linears(model: Any) -> dict[str, tuple[int, int]]:
    return {
        name: tuple(m.weight.shape)
        for name, m in model.named_modules()
        if hasattr(m, "in_features")
    }


def stored(folder: Path, names: Names, device: str) -> Iterator[Group]:
    """Groups of one target layer, their moments read from an artifact."""
    from safetensors import safe_open

    from paw.transfer.pairing import Site

    with safe_open(folder / MOMENTS, framework="pt", device=device) as file:
        for group in _groups(names, 1):
            yield (
                group,
                {
                    (s, t): Site(
                        *(file.get_tensor(f"{_key(s)} {_key(t)} {part}") for part in PARTS)
                    )
                    for s, t in shared_spaces(group)
                },
            )


def streamed(
    config: CalibrateStage,
    inputs: Mapping[str, Input],
    names: Names,
    shapes: tuple[Shapes, Shapes],
    memory_gb: float,
    watch: Watch,
) -> Iterator[Group]:
    """Groups of as many target layers as fit into memory, one pass over the text each."""
    run = Calibration(config, inputs)
    largest = max(moments_bytes(group, *shapes) for group in _groups(names, 1))
    for group in _groups(names, max(1, int(memory_gb * 2**30 / largest))):
        yield group, run.see(group, watch)


def _groups(names: Names, layers: int) -> Iterator[Names]:
    by_target: dict[int, list[tuple[str, str]]] = {}
    for source, target in names:
        by_target.setdefault(layer_of(target)[0], []).append((source, target))
    order = sorted(by_target)
    for start in range(0, len(order), layers):
        yield [pair for layer in order[start : start + layers] for pair in by_target[layer]]


def _key(space: Space) -> str:
    layer, place = space
    assert isinstance(place, Place)
    return f"{layer}.{place.role}.{place.side}"


def _texts(config: CalibrateStage, inputs: Mapping[str, Input]) -> list[str]:
    """The calibration text, a document a line; else a split's questions, each with one of its choices in turn, so that no
    label is used (and without, where the only choice is the answer)."""
    if "calibration" in inputs:
        file = inputs["calibration"].path
        try:
            return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as e:
            raise DataError(f"{file}: is not UTF-8 text ({e}).") from None
    assert config.dataset is not None
    assert config.split is not None
    found = examples(inputs["data"].path, config.dataset, config.split)
    picked = [(e, i % len(e.contexts)) for i, e in enumerate(found)]
    return [
        words(e.contexts[k]) + (e.continuations[k] if len(e.contexts) > 1 else "")
        for e, k in picked
    ]
