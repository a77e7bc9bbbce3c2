"""Splits of a data set, as a graph has them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from paw.config.common import RunConfig
from paw.data.config import DatasetConfig
from paw.data.load import check_apart, examples, find_split, split_file, unused
from paw.graph import Absent, Check, Source
from paw.store import Store


def split(c: RunConfig, dataset: DatasetConfig, name: str, form: str = "likelihood") -> Source:
    """A split's file of normalised rows.

    Args:
        form: what a row becomes, of `examples`: task=validate reads them all.
    """
    find = partial(find_split, dataset, name, c.paths.data_dir)

    def rows(store: Store) -> str:
        return f"{len(examples(_found(find()), dataset, name, form))} examples in {find()}"

    def strangers(store: Store) -> str:
        file = _found(find())
        fields = ", ".join(unused(file, dataset))
        return fields and (
            f"{file}: nothing reads the field {fields} of its rows. Name it in dataset.prompt to "
            "ask it."
        )

    return Source(
        name=f"{dataset.name}, split {name}",
        described=["split", dataset.name, dataset.path, dataset.hub, dataset.subset, name],
        finder=find,
        getter=partial(split_file, dataset, name, c.paths.data_dir),
        checks=[
            Check(name=f"dataset, split {name}", look=rows, thorough=True),
            Check(name=f"fields of split {name}", look=strangers, warns=True),
        ],
    )


def apart(train: Source, test: Source, train_split: str, test_split: str) -> Check:
    """That nothing is tested on what it was trained on."""

    def look(store: Store) -> str:
        check_apart(train.path, train_split, test.path, test_split)
        return "trained on one, tested on the other"

    return Check(name="splits", look=look)


def _found(file: Path | None) -> Path:
    if file is None:
        raise Absent("the split is not on this machine yet")
    return file
