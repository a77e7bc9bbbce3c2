"""Stage `texts`: the texts of prompts as vectors, computed once for all trainings on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paw.generator.encoder import Encoder
from paw.generator.groups import ALL, Group, read_groups, write_groups
from paw.models.load import Runtime
from paw.store import Input, Stage, Watch, write_text

VECTORS, INDEX, ABOUT = "vectors.npy", "index.json", "about.json"


@dataclass(kw_only=True)
class TextsStage:
    runtime: Runtime


@dataclass(frozen=True, kw_only=True)
class TextsResult:
    texts: int  # different ones
    width: int
    pooled: int  # that are longer than the encoder reads at once

    def __str__(self) -> str:
        more = f", {self.pooled} longer than the encoder reads at once" if self.pooled else ""
        return f"{self.texts} texts as vectors of {self.width}{more}"


STAGE = Stage(
    "texts",
    "1",
    "paw.generator.texts:texts",
    config=TextsStage,
    result=TextsResult,
    devices="one",
)


def texts(config: TextsStage, inputs: Mapping[str, Input], out: Path, watch: Watch) -> TextsResult:
    """Writes the groups, the vectors of their different texts, and which group has which.

    Args:
        inputs: `groups`, a finished stage or a user's folder; `encoder`.

    Raises:
        DataError: for a line that is no prompt.
    """
    groups = read_groups(inputs["groups"].path)
    distinct = list(dict.fromkeys(text for g in groups for text in g.texts))
    encoder = Encoder(inputs["encoder"].path, config.runtime.device)
    np.save(out / VECTORS, encoder.encode(distinct, watch))
    number = {text: i for i, text in enumerate(distinct)}
    write_text(out / INDEX, json.dumps([[number[t] for t in g.texts] for g in groups]))
    if (inputs["groups"].path / ALL).is_file():
        shutil.copyfile(inputs["groups"].path / ALL, out / ALL)
    else:
        write_groups(out, groups)
    write_text(out / ABOUT, json.dumps({"encoder": inputs["encoder"].fingerprint}))
    pooled = sum(encoder.parts(text) > 1 for text in distinct)
    if pooled:
        watch.say(
            f"{pooled} texts are longer than {encoder.longest} tokens: their parts are averaged"
        )
    return TextsResult(texts=len(distinct), width=encoder.width, pooled=pooled)


class Prompts:
    """The groups that `texts` wrote, with their vectors."""

    def __init__(self, folder: Path) -> None:
        self.groups: list[Group] = read_groups(folder)
        self._vectors = np.load(folder / VECTORS)
        self._index = json.loads((folder / INDEX).read_text())
        self.encoder: str = json.loads((folder / ABOUT).read_text())["encoder"]  # its fingerprint

    @property
    def width(self) -> int:
        return int(self._vectors.shape[1])

    def __getitem__(self, number: int) -> NDArray[np.float32]:
        """The vectors of a group's examples (examples × width)."""
        found: NDArray[np.float32] = self._vectors[self._index[number]]
        return found
