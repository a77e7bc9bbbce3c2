"""Per-example records: copied into a run's folder, and read again from any run."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paw.errors import ConfigError, DataError
from paw.evaluation.records import RECORDS, Record
from paw.report.model import System
from paw.text import file_name

FOLDER = "records"


@dataclass(frozen=True)
class Recorded:
    """A system as a run has left it."""

    name: str
    records: list[Record]


def publish(folder: Path, systems: Sequence[System], form: str) -> list[str]:
    """Copies records into a run folder, where they outlive the artifacts; to file_names()."""
    (folder / FOLDER).mkdir(exist_ok=True)
    names = file_names(systems, form)
    for system, name in zip(systems, names, strict=True):
        if form == "jsonl":
            shutil.copyfile(system.evaluation.path / RECORDS, folder / name)
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(system.records), folder / name)
    return names


def file_names(systems: Sequence[System], form: str) -> list[str]:
    """records/<system>.<form> for each; numbered where two names give the same.

    Args:
        form: jsonl or parquet.
    """
    names: list[str] = []
    for system in systems:
        stem = f"{FOLDER}/{file_name(system.name) or 'system'}"
        numbered = (f"{stem}-{n}.{form}" if n > 1 else f"{stem}.{form}" for n in itertools.count(1))
        names.append(next(name for name in numbered if name not in names))
    return names


def read_run(path: str) -> list[Recorded]:
    """The systems of a run.

    Args:
        path: a run folder; or, for one system, a file of records or an evaluation's artifact.

    Raises:
        ConfigError: where it is none of these.
        DataError: where records are missing, or a line is broken.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [Recorded(place.stem, _read(place))]
    if (place / RECORDS).is_file():
        return [Recorded(place.name, _read(place / RECORDS))]
    if (place / "results.json").is_file():
        systems = json.loads((place / "results.json").read_text(encoding="utf-8"))["systems"]
        return [
            Recorded(s["system"], _read(place / s["records"])) for s in systems if s.get("records")
        ]
    raise ConfigError(
        f"runs: {path} is no run folder (it has no results.json) and no file of records."
    )


def paired(after: Recorded, before: Recorded) -> tuple[Recorded, Recorded]:
    """Both systems cut to the questions they share, in one order.

    Raises:
        DataError: if they share none, or disagree about a question's answer.
    """
    known = {r["id"]: r for r in before.records}
    both = [(r, known[r["id"]]) for r in after.records if r["id"] in known]
    if not both:
        raise DataError(
            f"runs: {after.name} and {before.name} have no question in common. "
            "Compare runs on one data set."
        )
    for a, b in both:
        if a["gold"] != b["gold"] or len(a["loglikelihoods"]) != len(b["loglikelihoods"]):
            raise DataError(
                f"runs: {after.name} and {before.name} have other choices or another answer for "
                f"question {a['id']}. Compare runs on one data set."
            )
    return Recorded(after.name, [a for a, _ in both]), Recorded(before.name, [b for _, b in both])


def _read(file: Path) -> list[Record]:
    if not file.is_file():
        raise DataError(f"{file}: does not exist; the run's records have been removed.")
    if file.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[Record] = pyarrow.parquet.read_table(file).to_pylist()
        return rows
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            for key in ("id", "gold", "loglikelihoods", "correct", "tokens"):
                record[key]
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{file}, line {number}: is no record of an evaluation.") from None
        out.append(record)
    if not out:
        raise DataError(f"{file}: has no records.")
    return out
