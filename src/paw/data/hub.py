"""Splits from the hub, normalised once per machine: from then on they are files like any other."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from filelock import FileLock

from paw.data.config import DatasetConfig
from paw.data.kinds import kind_named, normalised
from paw.errors import DataError
from paw.paths import cache_dir
from paw.store import Watch, digest, plain, replacing
from paw.text import first_line


def cached(dataset: DatasetConfig, split: str) -> Path:
    """Where a split of `dataset.hub` is kept, whether it is there or not.

    `dataset.hub` may be a folder in the hub's layout. Its files are part of the name, since they
    may change; the hub's revisions are its own affair.
    """
    hub = dataset.hub or ""
    how = [dataset.kind, kind_named(dataset.kind).version, plain(dataset.fields), dataset.classes]
    parts = [hub, dataset.subset, dataset.revision, *how]
    if Path(hub).is_dir():
        parts += [
            [str(p.relative_to(hub)), p.stat().st_size, p.stat().st_mtime_ns]
            for p in sorted(Path(hub).rglob("*"))
            if p.is_file()
        ]
    name = re.sub(r"[^\w.-]+", "_", hub.rstrip("/").split("/")[-1])
    return cache_dir() / "data" / f"{name}-{digest(parts)[:12]}" / f"{split}.jsonl"


def fetch(dataset: DatasetConfig, split: str, watch: Watch) -> Path:
    """Makes that file.

    Raises:
        DataError: for a split that is not there, and where the package datasets is missing.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{dataset.name}: reading from the hub needs the package datasets. "
            'Install it: pip install "paw[hub]".'
        ) from None
    datasets.disable_progress_bars()
    # its retries are not the user's to read
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    watch.say(f"{dataset.name}: fetching split {split} of {dataset.hub}")
    try:
        rows = datasets.load_dataset(
            dataset.hub, dataset.subset, split=split, revision=dataset.revision
        )
    except Exception as e:  # whatever the library raises, the user needs one line
        reason = first_line(e)[:160]
        raise DataError(
            f"{dataset.name}: split {split} cannot be fetched from the hub ({dataset.hub}): "
            f"{reason} Put {split}.jsonl into paths.data_dir/{dataset.name}, or set dataset.path."
        ) from None
    out = cached(dataset, split)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(f"{out}.lock"),
        replacing(out) as beside,
        open(beside, "w", encoding="utf-8") as f,
    ):
        for i, row in enumerate(rows):
            found = {"id": f"{split}-{i}", **normalised(dict(row), dataset)}
            f.write(json.dumps(found, ensure_ascii=False) + "\n")
    return out
