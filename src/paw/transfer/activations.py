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
from paw.transfer.pairing import Place, Site

# A space of a model: layer and place.
Space = tuple[int, Place]


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
    encoded = tokenizer(text, return_offsets_mapping=True)
    ends = {end: i for i, (start, end) in enumerate(encoded.offset_mapping) if end > start}
    return encoded.input_ids, {c: i for c, i in ends.items() if c == len(text) or text[c].isspace()}


@torch.no_grad()
def second_moments(
    source: Any, target: Any, names_s: dict[Space, str], names_t: dict[Space, str], wanted: Sequence[tuple[Space, Space]],
    texts: Sequence[PairedText], batch_size: int, pads: tuple[int, int], watch: Watch, note: str,
) -> dict[tuple[Space, Space], Site]:  # fmt: skip
    """One pass of both models over the texts.

    Args:
        names_s, names_t: the module at which a space is seen.
        wanted: pairs of spaces (source, target).

    Returns:
        A Site for each wanted pair, divided by the number of positions.
    """
    cross: dict[tuple[Space, Space], Tensor] = {}
    grams: tuple[dict[Space, Tensor], dict[Space, Tensor]] = ({}, {})
    spaces = ({s for s, _ in wanted}, {t for _, t in wanted})
    count = 0
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].source))
    with (
        _Recorder(source, {s: names_s[s] for s in spaces[0]}) as seen_s,
        _Recorder(target, {t: names_t[t] for t in spaces[1]}) as seen_t,
    ):
        for start in range(0, len(order), batch_size):
            batch = [texts[i] for i in order[start : start + batch_size]]
            row = [r for r, text in enumerate(batch) for _ in text.positions]
            for side, (model, recorder) in enumerate(((source, seen_s), (target, seen_t))):
                recorder.keep = (torch.tensor(row), torch.tensor([p[side] for text in batch for p in text.positions]))
                ids = [text.target if side else text.source for text in batch]
                mask = pad([[1] * len(i) for i in ids], 0).to(model.device)
                model(
                    input_ids=pad(ids, pads[side]).to(model.device),
                    attention_mask=mask,
                    logits_to_keep=1,
                    use_cache=False,
                )
                for space, x in recorder.now.items():
                    _add(grams[side], space, x.T @ x)
            for s, t in wanted:
                _add(cross, (s, t), seen_s.now[s].T @ seen_t.now[t])
            count += len(row)
            watch.progress(min(start + batch_size, len(order)), len(order), note)
    return {(s, t): Site(cross[s, t] / count, grams[0][s] / count, grams[1][t] / count) for s, t in wanted}


def _add(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


class _Recorder:
    """Hooks that hold the kept positions (float32, positions × width) of the latest forward pass."""

    def __init__(self, model: Any, places: dict[Space, str]) -> None:
        self.model, self.places = model, places
        self.now: dict[Space, Tensor] = {}
        self.keep: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def __enter__(self) -> _Recorder:
        self.hooks = [self.model.get_submodule(name).register_forward_hook(self._record(space)) for space, name in self.places.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _record(self, space: Space) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0] if space[1].side == "in" else output
            rows, columns = (k.to(x.device) for k in self.keep)
            self.now[space] = x[rows, columns].float()

        return hook
