"""Both models' activations at the same text positions, batch by batch, and their second moments:
only positions held out of the fit are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paw.data.tokenise import pad
from paw.errors import TransferError
from paw.models.layout import Part
from paw.store import Watch
from paw.transfer.modules import SMALL, Space
from paw.transfer.pairing import Site

MAX_TOKENS = 512  # of a text; the rest of a longer one is not looked at


@dataclass(frozen=True)
class PairedText:
    """A text as both models' tokens, and the token positions (source, target) of common word
    ends."""

    source: list[int]
    target: list[int]
    positions: list[tuple[int, int]]


def pair_texts(texts: Sequence[str], source: Any, target: Any, limit: int) -> list[PairedText]:
    """Texts until `limit` positions are found. Positions of two tokenizers are paired where both
    end a token at the same character and a blank or the end of the text follows; special tokens
    have no characters and drop out.

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
            "the two tokenizers share no word boundary in the calibration text. Give other text: "
            "transfer.calibration."
        )
    return out


def _word_ends(tokenizer: Any, text: str) -> tuple[list[int], dict[int, int]]:
    encoded = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=MAX_TOKENS)
    ends = {end: i for i, (start, end) in enumerate(encoded.offset_mapping) if end > start}
    return encoded.input_ids, {c: i for c, i in ends.items() if c == len(text) or text[c].isspace()}


def hold_out(texts: Sequence[PairedText], limit: int) -> tuple[list[PairedText], list[PairedText]]:
    """The texts to fit on, and the last ones: up to `limit` positions of them, and a tenth of
    all."""
    room, cut = min(limit, sum(len(t.positions) for t in texts) // 10), len(texts)
    while cut > 1 and len(texts[cut - 1].positions) <= room:
        cut -= 1
        room -= len(texts[cut].positions)
    return list(texts[:cut]), list(texts[cut:])


def by_length(texts: Sequence[PairedText]) -> list[PairedText]:
    """In order of the source's length: little padding in a batch, and one order for both models."""
    return sorted(texts, key=lambda t: len(t.source))


Models = tuple[Any, Any]  # source and target
Places = tuple[dict[Space, Part], dict[Space, Part]]  # where each of their spaces is seen


def second_moments(
    models: Models,
    places: Places,
    wanted: Sequence[tuple[Space, Space]],
    texts: Sequence[PairedText],
    held: Sequence[PairedText],
    batch_size: int,
    pads: tuple[int, int],
    shuffle: int | None,
    watch: Watch,
) -> dict[tuple[Space, Space], Site]:
    """One pass of both models over the texts; activations are summed up and dropped batch by batch,
    but for those of `held`.

    Args:
        wanted: pairs of spaces (source, target).
        pads: both tokenizers' padding ids.
        shuffle: a seed by which source positions are paired with the target's at random: the
            placebo of a correct pairing.

    Returns:
        A Site for each wanted pair, divided by the number of positions.
    """
    exact = all(model.dtype == torch.float32 for model in models)
    cross: dict[tuple[Space, Space], Tensor] = {}
    grams: tuple[dict[Space, Tensor], dict[Space, Tensor]] = ({}, {})
    count, total = 0, sum(len(t.positions) for t in texts)
    paired = seen(models, places, texts, batch_size, pads)
    for now_s, now_t in (
        paired if shuffle is None else _mispaired(models, places, texts, batch_size, pads, shuffle)
    ):
        for sums, now in zip(grams, (now_s, now_t), strict=True):
            for space, x in now.items():
                _add(sums, space, x, x, exact)
        for s, t in wanted:
            _add(cross, (s, t), now_s[s], now_t[t], exact)
        count += len(next(iter(now_s.values())))
        watch.progress(count, total, "calibration positions")
    kept = list(seen(models, places, held, batch_size, pads))

    def apart(side: int, space: Space) -> Tensor:
        found = [now[side][space] for now in kept]
        gram = grams[side][space]
        return torch.cat(found) if found else torch.empty(0, len(gram), device=gram.device)

    return {
        (s, t): Site(
            cross[s, t] / count, grams[0][s] / count, grams[1][t] / count, apart(0, s), apart(1, t)
        )
        for s, t in wanted
    }


def seen(
    models: Models,
    places: Places,
    texts: Sequence[PairedText],
    batch_size: int,
    pads: tuple[int, int],
) -> Iterator[tuple[dict[Space, Tensor], dict[Space, Tensor]]]:
    """Batch by batch, what both models do at the paired positions: positions × width, float32, by
    space."""
    order = by_length(texts)
    return zip(
        *(
            seen_by(models[side], places[side], order, side, batch_size, pads[side])
            for side in (0, 1)
        ),
        strict=True,
    )


def _mispaired(
    models: Models,
    places: Places,
    texts: Sequence[PairedText],
    batch_size: int,
    pads: tuple[int, int],
    seed: int,
) -> Iterator[tuple[dict[Space, Tensor], dict[Space, Tensor]]]:
    """The same positions of both models, paired at random. Texts of both are run in orders of their
    own, and positions turned round inside a batch: batches of like texts beside each other would
    still be paired rightly on the whole."""
    generator = torch.Generator().manual_seed(seed)
    streams = []
    for side in (0, 1):
        order = [texts[i] for i in torch.randperm(len(texts), generator=generator)]
        streams.append(
            _rows(
                seen_by(models[side], places[side], order, side, batch_size, pads[side]), generator
            )
        )
    yield from zip(*streams, strict=True)


def _rows(
    batches: Iterator[dict[Space, Tensor]], generator: torch.Generator, size: int = 256
) -> Iterator[dict[Space, Tensor]]:
    """Batches of `size` positions (the last may be less), in random order inside the batch they
    come from."""
    left: dict[Space, Tensor] = {}
    for batch in batches:
        order = torch.randperm(len(next(iter(batch.values()))), generator=generator)
        left = {
            space: torch.cat([left[space], x[order]]) if left else x[order]
            for space, x in batch.items()
        }
        while len(next(iter(left.values()))) >= size:
            yield {space: x[:size] for space, x in left.items()}
            left = {space: x[size:] for space, x in left.items()}
    if left and len(next(iter(left.values()))):
        yield left


@torch.no_grad()
def seen_by(
    model: Any,
    places: Mapping[Space, Part],
    texts: Sequence[PairedText],
    side: int,
    batch_size: int,
    pad_id: int,
) -> Iterator[dict[Space, Tensor]]:
    """The same of one model (side 0 reads the texts as the source, 1 as the target)."""
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        rows = [row for row, text in enumerate(batch) for _ in text.positions]
        columns = [position[side] for text in batch for position in text.positions]
        with _Recorder(model, places, rows, columns) as recorder:
            ids = [text.target if side else text.source for text in batch]
            mask = pad([[1] * len(i) for i in ids], 0).to(model.device)
            model(
                input_ids=pad(ids, pad_id).to(model.device),
                attention_mask=mask,
                logits_to_keep=1,
                use_cache=False,
            )
        yield recorder.now


def _add(sums: dict[Any, Tensor], key: Any, x: Tensor, y: Tensor, exact: bool) -> None:
    """sums[key] += xᵀy, in place.

    Args:
        exact: the activations have float32's digits, of which squares need twice as many: in
            float32 directions are lost whose length is less than 1e-3 of the longest. Up to `SMALL`
            float64 costs little; activations in 16 bits have no more digits than float32 sums.
    """
    if exact and max(x.shape[1], y.shape[1]) <= SMALL:
        x, y = x.double(), y.double()
    if key in sums:
        sums[key].addmm_(x.T, y.to(x.device))
    else:
        sums[key] = x.T @ y.to(x.device)


class _Recorder:
    """Hooks that keep the wanted positions (float32, positions × width) of a forward pass, all on
    the model's device: that of its embeddings, where it is spread over several."""

    def __init__(
        self, model: Any, places: Mapping[Space, Part], rows: list[int], columns: list[int]
    ) -> None:
        self.model, self.places = model, places
        self.now: dict[Space, Tensor] = {}
        self._rows, self._columns = (torch.tensor(i, device=model.device) for i in (rows, columns))

    def __enter__(self) -> _Recorder:
        self.hooks = [
            self.model.get_submodule(part.module).register_forward_hook(self._record(space, part))
            for space, part in self.places.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _record(self, space: Space, part: Part) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            out: Tensor = output[0] if isinstance(output, tuple) else output
            if space[1].side in ("in", "stream"):
                x = inputs[0]
            elif space[1].side == "update":
                x = out - inputs[0].to(out.device)
            else:
                x = out if part.rows is None else out[..., part.rows]
            rows, columns = (i.to(x.device) for i in (self._rows, self._columns))
            self.now[space] = x[rows, columns].float().to(self._rows.device)

        return hook
