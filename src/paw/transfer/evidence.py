"""What a transfer knows of two models beside their weights: nothing, moments that were kept, or a
text that both are run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from paw.errors import TransferError
from paw.models.tensors import linear_shapes
from paw.store import Input, Watch
from paw.transfer.model_pair import ModelPair, TextConfig
from paw.transfer.modules import Names, Place, Space, layer_of, moments_bytes, shared_spaces
from paw.transfer.pairing import Site

Sites = dict[tuple[Space, Space], Site]
Groups = Iterator[tuple[Names, Sites]]

MOMENTS = "moments.safetensors"
PARTS = ("cross", "gram_s", "gram_t", "held_s", "held_t")  # of a Site


class WeightsOnly:
    """No text was run, and none is needed."""

    def groups(self, names: Names) -> Groups:
        yield names, {}

    def models(self) -> ModelPair:
        """
        Raises:
            TransferError: always; a method that runs the models looks at text.
        """
        raise TransferError(
            "transfer.evidence: this method needs activations. Remove the transfer.evidence "
            "override."
        )


@dataclass(frozen=True)
class Text:
    """A text that is run when it is looked at."""

    config: TextConfig
    inputs: Mapping[str, Input]
    memory_gb: float
    watch: Watch

    def groups(self, names: Names) -> Groups:
        """Groups of as many target layers as fit into memory, one pass over the text each."""
        shapes = [linear_shapes(self.inputs[side].path) for side in ("source", "target")]
        run = self.models()
        largest = max(moments_bytes(group, *shapes) for group in _groups(names, 1))
        for group in _groups(names, max(1, int(self.memory_gb * 2**30 / largest))):
            yield group, run.see(group, self.watch)

    def models(self) -> ModelPair:
        return ModelPair(self.config, self.inputs)


@dataclass(frozen=True)
class Moments(Text):
    """The same text, of which stage `calibrate` has kept the moments."""

    folder: Path
    device: str

    def groups(self, names: Names) -> Groups:
        """Groups of one target layer."""
        return stored(self.folder, names, self.device)


Evidence = WeightsOnly | Text


def evidence(
    text: TextConfig | None,
    inputs: Mapping[str, Input],
    *,
    memory_gb: float,
    device: str,
    watch: Watch,
) -> Evidence:
    """
    Args:
        text: None where weights are enough.
        inputs: as of stage `transfer`. Of `moments` that did not fit into memory the artifact holds
            none, and the text is run again.
    """
    if text is None:
        return WeightsOnly()
    if "moments" in inputs and (inputs["moments"].path / MOMENTS).is_file():
        return Moments(text, inputs, memory_gb, watch, inputs["moments"].path, device)
    return Text(text, inputs, memory_gb, watch)


def keep(sites: Sites, folder: Path) -> float:
    """Writes moments. Returns their size in MiB."""
    from safetensors.torch import save_file

    tensors = {
        f"{_key(s)} {_key(t)} {part}": getattr(site, part).contiguous().cpu()
        for (s, t), site in sites.items()
        for part in PARTS
    }
    save_file(tensors, folder / MOMENTS)
    return float(sum(x.nbytes for x in tensors.values()) / 2**20)


def stored(folder: Path, names: Names, device: str) -> Groups:
    """Groups of one target layer, their moments read from an artifact."""
    from safetensors import safe_open

    with safe_open(folder / MOMENTS, framework="pt", device=device) as file:
        for group in _groups(names, 1):
            sites = {}
            for s, t in shared_spaces(group):
                found = (file.get_tensor(f"{_key(s)} {_key(t)} {part}") for part in PARTS)
                sites[s, t] = Site(*found)
            yield group, sites


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
