"""What a trained head says of texts: the counterpart of `likelihood` for classifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from paw.data.tokenise import Encoded, pad
from paw.errors import AdapterError
from paw.evaluation.model import Model
from paw.models.load import load_classifier, spread_over, tells_pairs
from paw.store import free_memory
from paw.text import some

TOKENS = {"cpu": 2048, "cuda": 32768}  # of a batch


def outputs(
    model: Model, rows: Sequence[Encoded], classes: Sequence[str] | None, tokens: int
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """What the head of the model's adapter says of each row, batch by batch as they are done.

    Args:
        classes: those of the data, in the order of the outputs; None for a value.
        tokens: of a batch.

    Returns:
        Numbers of rows, and their outputs: one a class, or the value, float32.

    Raises:
        AdapterError: where the adapter's head has other classes.
    """
    import torch

    from paw.models.adapters import attach, classes_of

    assert model.adapter is not None, "a base has no head"
    folder = model.adapter.path
    known = classes_of(folder)
    if known is not None and classes is not None and list(known) != list(classes):
        raise AdapterError(
            f"{folder}: its head knows {len(known)} classes ({some(known)}), the data has "
            f"{len(classes)} ({some(classes)}). Use the data set it was trained on."
        )
    spread = spread_over(model.runtime, model.base.path)
    trust = model.trust_remote_code
    base, _ = load_classifier(model.base.path, model.runtime, classes, trust, places=spread)
    ready, pad_id = attach(base, folder, model.base.fingerprint), model.tokenizer.pad_token_id
    pairs, done = tells_pairs(base, model.tokenizer), 0
    try:
        with torch.inference_mode():
            for places in batches([len(r.ids) for r in rows], tokens):
                logits = class_logits(ready, [rows[i] for i in places], pad_id, pairs).cpu().numpy()
                done += len(places)
                model.watch.progress(done, len(rows), "texts")
                yield from zip(places, logits, strict=True)
    finally:  # it is no engine's, which would give its memory back
        del base, ready
        free_memory()


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows of like lengths together, at most so many tokens with what is filled up."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def class_logits(model: Any, rows: Sequence[Encoded], pad_id: int, pairs: bool) -> Any:
    """What the head says of each row: rows × outputs, float32. Rows are filled up on the right.

    Args:
        pairs: whether the model tells the second of two sentences by token types.
    """
    device = next(model.parameters()).device
    ask = {
        "input_ids": pad([r.ids for r in rows], pad_id).to(device),
        "attention_mask": pad([[1] * len(r.ids) for r in rows], 0).to(device),
    }
    if pairs:
        types = [[0] * r.start + [1] * (len(r.ids) - r.start) for r in rows]
        ask["token_type_ids"] = pad(types, 0).to(device)
    return model(**ask).logits.float()
