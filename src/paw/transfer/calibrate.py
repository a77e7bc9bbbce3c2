"""Stage `calibrate`: what two models do on the same text, as second moments, shared by all adapters and methods.

The moments are an artifact where they fit into `transfer.memory_gb`; where they do not, `transfer` streams them in groups
of layers and keeps none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.schema import DatasetConfig, transient
from paw.data.load import examples
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.store import Input, Stage, Watch
from paw.transfer.modules import Place, Space, all_pairs, by_layer, layer_of, moments_bytes, shared_spaces

if TYPE_CHECKING:
    from paw.transfer.activations import PairedText
    from paw.transfer.pairing import Site

MOMENTS = "moments.safetensors"
STAGE = Stage("calibrate", "1", "paw.transfer.calibrate:calibrate")

Names = Sequence[tuple[str, str]]
Shapes = Mapping[str, Sequence[int]]
Group = tuple[Names, "dict[tuple[Space, Space], Site]"]


@dataclass
class CalibrateStage:
    dataset: DatasetConfig
    split: str
    runtime: Runtime
    layers: str
    positions: int
    batch_size: int = transient(32)
    trust_remote_code: bool = transient(False)


def calibrate(config: CalibrateStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> dict[str, Any]:
    """One pass of both models over the calibration text.

    Args:
        inputs: `source`, `target`; `calibration` (a text file, a document a line) or `data` (rows of the train split).

    Writes the moments of every space that two modules of matched layers share, float32.
    """
    from safetensors.torch import save_file

    run = Calibration(config, inputs)
    names = all_pairs(by_layer(run.linears(run.source)), by_layer(run.linears(run.target)), config.layers)
    tensors = {}
    for (s, t), site in run.see(names, watch).items():
        for part in ("cross", "gram_s", "gram_t"):
            tensors[f"{_key(s)} {_key(t)} {part}"] = getattr(site, part).cpu().contiguous()
    save_file(tensors, out / MOMENTS)
    return {"positions": run.positions, "texts": len(run.texts), "mib": round(sum(x.nbytes for x in tensors.values()) / 2**20, 1)}


class Calibration:
    """Both models on their device, and the calibration text in both's tokens."""

    def __init__(self, config: CalibrateStage, inputs: Mapping[str, Input]) -> None:
        from paw.transfer.activations import pair_texts

        self.config = config
        paths = [inputs[n].path for n in ("source", "target")]
        tokenizers = [load_tokenizer(p, config.trust_remote_code) for p in paths]
        self.texts: list[PairedText] = pair_texts(_texts(config, inputs), tokenizers[0], tokenizers[1], config.positions)
        self.positions = sum(len(t.positions) for t in self.texts)
        self.pads = (tokenizers[0].pad_token_id, tokenizers[1].pad_token_id)
        self.source, self.target = (load_model(p, config.runtime, config.trust_remote_code) for p in paths)

    @staticmethod
    def linears(model: Any) -> list[str]:
        return [name for name, module in model.named_modules() if hasattr(module, "in_features")]

    def see(self, names: Names, watch: Watch) -> dict[tuple[Space, Space], Site]:
        from paw.transfer.activations import second_moments

        places = [by_layer(self.linears(m)) for m in (self.source, self.target)]
        wanted = shared_spaces(names)
        at = [{pair[side]: places[side][pair[side][0]][pair[side][1].role] for pair in wanted} for side in (0, 1)]
        models = (self.source, self.target)
        return second_moments(models, (at[0], at[1]), wanted, self.texts, self.config.batch_size, self.pads, watch)


def stored(folder: Path, names: Names, device: str) -> Iterator[Group]:
    """Groups of one target layer, their moments read from an artifact."""
    from safetensors import safe_open

    from paw.transfer.pairing import Site

    with safe_open(folder / MOMENTS, framework="pt", device=device) as file:
        for group in _groups(names, 1):
            yield (
                group,
                {
                    (s, t): Site(*(file.get_tensor(f"{_key(s)} {_key(t)} {part}") for part in ("cross", "gram_s", "gram_t")))
                    for s, t in shared_spaces(group)
                },
            )


def streamed(
    config: CalibrateStage, inputs: Mapping[str, Input], names: Names, shapes: tuple[Shapes, Shapes], memory_gb: float, watch: Watch
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
    """The calibration text, a document a line; else the train split's questions, each with one of its choices in turn,
    so that no label is used."""
    if "calibration" in inputs:
        return [line for line in inputs["calibration"].path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = examples(inputs["data"].path, config.dataset, config.split)
    return [e.contexts[i % len(e.contexts)] + e.continuations[i % len(e.contexts)] for i, e in enumerate(found)]
