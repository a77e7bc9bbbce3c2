"""Sentence-BERT (arXiv 1908.10084): a text as one vector. It is frozen, and never part of what is
trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paw.errors import ModelError
from paw.models.load import load_tokenizer
from paw.store import Watch
from paw.text import first_line

BATCH = 64


class Encoder:
    """The mean over tokens, of length 1, as all-MiniLM-L6-v2 has it.

    Raises:
        ModelError: for a folder that cannot be read.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import torch
        from transformers import AutoModel

        self.tokenizer: Any = load_tokenizer(folder)
        try:
            model: Any = AutoModel.from_pretrained(str(folder), dtype=torch.float32)
        except Exception as e:  # damaged files make the reader fail anywhere
            raise ModelError(f"{folder}: cannot be read as an encoder ({first_line(e)}).") from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.longest = _longest(folder, self.model.config.max_position_embeddings)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def encode(self, texts: Sequence[str], watch: Watch | None = None) -> NDArray[np.float32]:
        """(texts × width). A text over the encoder's length is cut into parts of that length, and
        the parts are averaged; `parts` has their number.

        Args:
            texts: not empty.
        """
        import torch

        pieces = [self._pieces(text) for text in texts]
        flat = [ids for parts in pieces for ids in parts]
        order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
        vectors = np.zeros((len(flat), self.width), dtype=np.float32)
        with torch.inference_mode():
            for at in range(0, len(order), BATCH):
                chosen = order[at : at + BATCH]
                batch = self.tokenizer.pad(
                    {"input_ids": [flat[i] for i in chosen]}, return_tensors="pt"
                ).to(self.device)
                hidden = self.model(**batch)[0]
                weight = batch["attention_mask"][..., None].float()
                mean = (hidden * weight).sum(1) / weight.sum(1)
                vectors[chosen] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
                if watch is not None:
                    watch.progress(at + len(chosen), len(order), "texts")
        ends = np.cumsum([0, *map(len, pieces)])
        means = [vectors[low:high].mean(0) for low, high in pairwise(ends)]
        return np.stack([v / max(float(np.linalg.norm(v)), 1e-12) for v in means])

    def parts(self, text: str) -> int:
        """How many parts a text is cut into."""
        return len(self._pieces(text))

    def _pieces(self, text: str) -> list[list[int]]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.longest - self.tokenizer.num_special_tokens_to_add()
        cut = [ids[at : at + room] for at in range(0, max(1, len(ids)), room)]
        around: list[int] = self.tokenizer("", verbose=False)["input_ids"]  # [CLS] [SEP]
        return [[*around[:1], *part, *around[1:]] for part in cut]


def _longest(folder: Path, places: int) -> int:
    """Tokens of a text at most, as the encoder's own configuration has it."""
    file = folder / "sentence_bert_config.json"
    said = json.loads(file.read_text()).get("max_seq_length") if file.is_file() else None
    return min(said or places, places)
