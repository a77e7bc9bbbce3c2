"""Second moments of both models' activations at the same text positions, streamed: activations are never kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paw.data.encode import pad
from paw.errors import TransferError
from paw.store import Watch
from paw.transfer.modules import Space
from paw.transfer.pairing import Site

MAX_TOKENS = 512  # of a text; the rest of a longer one is not looked at


@dataclass(frozen=True)
class PairedText:
    """A text as both models' tokens, and the token positions (source, target) of common word ends."""

    source: list[int]
    target: list[int]
    positions: list[tuple[int, int]]


def pair_texts(texts: Sequence[str], source: Any, target: Any, limit: int) -> list[PairedText]:
    """Texts until `limit` positions are found. Positions of two tokenizers are paired where both end a token at the same
    character and a blank or the end of the text follows; special tokens have no characters and drop out.

    Raises:
        TransferError: if the tokenizers have no position in common.
    """
    out, found = [], 0
    for text in texts:
        (ids_s, ends_s), (ids_t, ends_t) = _word_ends(source, text), _word_ends(target, text)
        positions = [(ends_s[c], ends_t[c]) for c in sorted(set(ends_s) & set(ends_t))]
        if positions:
            out.append(PairedText(ids_s, ids_t, positions[: limit - found]))
            found += len(out[-1].positions)
        if found >= limit:
            break
    if not found:
        raise TransferError(
            "the two tokenizers end no word of the calibration text at the same place. Give other text: transfer.calibration."
        )
    return out


def _word_ends(tokenizer: Any, text: str) -> tuple[list[int], dict[int, int]]:
    encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=MAX_TOKENS)
    ends = {end: i for i, (start, end) in enumerate(encoded.offset_mapping) if end > start}
    return encoded.input_ids, {c: i for c, i in ends.items() if c == len(text) or text[c].isspace()}


@torch.no_grad()
def second_moments(
    models: tuple[Any, Any],
    places: tuple[dict[Space, str], dict[Space, str]],
    wanted: Sequence[tuple[Space, Space]],
    texts: Sequence[PairedText],
    batch_size: int,
    pads: tuple[int, int],
    watch: Watch,
) -> dict[tuple[Space, Space], Site]:
    """One pass of both models over the texts; activations are summed up and dropped batch by batch.

    Args:
        models: source and target; places: the module at which each of their spaces is seen.
        wanted: pairs of spaces (source, target).
        pads: both tokenizers' padding ids.

    Returns:
        A Site for each wanted pair, divided by the number of positions.
    """
    cross: dict[tuple[Space, Space], Tensor] = {}
    grams: tuple[dict[Space, Tensor], dict[Space, Tensor]] = ({}, {})
    order, count = sorted(texts, key=lambda t: len(t.source)), 0
    with _Recorder(models[0], places[0]) as seen_s, _Recorder(models[1], places[1]) as seen_t:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [row for row, text in enumerate(batch) for _ in text.positions]
            for side, recorder in enumerate((seen_s, seen_t)):
                columns = [position[side] for text in batch for position in text.positions]
                recorder.run([text.target if side else text.source for text in batch], pads[side], rows, columns)
                for space, x in recorder.now.items():
                    _add(grams[side], space, x, x)
            for s, t in wanted:
                _add(cross, (s, t), seen_s.now[s], seen_t.now[t])
            count += len(rows)
            watch.progress(min(start + batch_size, len(order)), len(order), "calibration texts")
    return {(s, t): Site(cross[s, t] / count, grams[0][s] / count, grams[1][t] / count) for s, t in wanted}


def _add(sums: dict[Any, Tensor], key: Any, x: Tensor, y: Tensor) -> None:
    """sums[key] += xᵀy, in place."""
    if key in sums:
        sums[key].addmm_(x.T, y.to(x.device))
    else:
        sums[key] = x.T @ y.to(x.device)


class _Recorder:
    """Hooks that hold the kept positions (float32, positions × width) of the latest forward pass."""

    def __init__(self, model: Any, places: dict[Space, str]) -> None:
        self.model, self.places = model, places
        self.now: dict[Space, Tensor] = {}
        self._rows, self._columns = torch.empty(0), torch.empty(0)

    def __enter__(self) -> _Recorder:
        self.hooks = [self.model.get_submodule(name).register_forward_hook(self._record(space)) for space, name in self.places.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def run(self, ids: list[list[int]], pad_id: int, rows: list[int], columns: list[int]) -> None:
        device = self.model.device
        self._rows, self._columns = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
        mask = pad([[1] * len(i) for i in ids], 0).to(device)
        self.model(input_ids=pad(ids, pad_id).to(device), attention_mask=mask, logits_to_keep=1, use_cache=False)

    def _record(self, space: Space) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0] if space[1].side == "in" else output
            self.now[space] = x[self._rows, self._columns].float()

        return hook
