"""A base's tokenizer beside the weights that are made of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from paw.store import TOKENIZER


def copy_tokenizer(base: Path, out: Path) -> None:
    for name in (*TOKENIZER, "generation_config.json"):
        if (base / name).is_file() and not (out / name).exists():
            shutil.copyfile(base / name, out / name)
