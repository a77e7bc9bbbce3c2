"""Both models on their device or devices, and a text without labels in both's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.checks import transient
from paw.data.config import DatasetConfig
from paw.errors import DataError
from paw.models.layout import parts
from paw.models.load import Runtime, load_model, load_tokenizer, spread_over
from paw.paths import embedded
from paw.store import Input, Watch
from paw.transfer.config import TransferConfig
from paw.transfer.modules import HELD, Names, Space, by_layer, shared_spaces
from paw.transfer.pairing import Site

if TYPE_CHECKING:
    from paw.transfer.activations import PairedText


@dataclass(kw_only=True)
class TextConfig:
    """How both models are run on the text, and on how much of it."""

    runtime: Runtime
    positions: int
    shuffle: int | None = None  # a seed by which positions are paired wrongly, for the placebo
    batch_size: int = transient(32)
    # Whether code of the source's, of the target's folder is run.
    trust: tuple[bool, bool] = transient((False, False))


def calibration_file(c: TransferConfig, dataset: DatasetConfig) -> Path:
    """The text that both models see: the user's, the data set's own, or paw's. A task's questions
    are none: where they are alike, maps that are fitted on them carry no adapter
    (docs/methods.md)."""
    file = c.calibration or dataset.calibration
    return Path(file).expanduser() if file else embedded("general.txt")


class ModelPair:
    """Both models, and the text's positions that they have in common.

    Args:
        inputs: `source`, `target` and `calibration`, a text file with a document a line.
    """

    def __init__(self, config: TextConfig, inputs: Mapping[str, Input]) -> None:
        from paw.transfer.activations import hold_out, pair_texts

        self.config = config
        sides = zip((inputs["source"].path, inputs["target"].path), config.trust, strict=True)
        each = list(sides)
        tokenizers = [load_tokenizer(path, trust) for path, trust in each]
        self.texts: list[PairedText] = pair_texts(
            _texts(inputs["calibration"].path), tokenizers[0], tokenizers[1], config.positions
        )
        self.fit, self.held = hold_out(self.texts, HELD)
        self.positions = sum(len(t.positions) for t in self.texts)
        self.pads = (tokenizers[0].pad_token_id, tokenizers[1].pad_token_id)
        places = spread_over(config.runtime, *(path for path, _ in each))
        self.source, self.target = (
            load_model(path, config.runtime, trust, places=places) for path, trust in each
        )
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
                f"{self.positions} positions are few for spaces of {widest} dimensions: raise "
                "transfer.positions or give more text"
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
    linears = {name: m for name, m in model.named_modules() if hasattr(m, "in_features")}
    return {name: tuple(m.weight.shape) for name, m in linears.items()}


def _texts(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: is not UTF-8 text ({e}).") from None
