"""The folder of one run: resolved config, log, results, adapters."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from paw.report import records
from paw.report.card import write_card
from paw.report.files import Report, row, write
from paw.report.model import System
from paw.report.page import PAGE, write_page
from paw.report.tables import table
from paw.store import MANIFEST
from paw.text import WIDTH, first_line
from paw.tracking import Left

log = logging.getLogger("paw")


def new_folder(root: Path, label: str) -> Path:
    """<time>_<label>, with a number where another process had the same second."""
    root.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{label.replace('/', '_')[:100]}"
    for number in range(1, 1000):
        folder = root / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(str(root / name))


def fill(
    folder: Path,
    report: Report,
    *,
    form: str,
    adapters: Mapping[str, Path],
    models: Mapping[str, Path],
) -> None:
    """Writes what a run found, whether it ended or not.

    Args:
        form: jsonl or parquet, of the records per question.
        adapters: copied: what a user does to them must not change the artifact.
        models: too large to be copied: links.
    """
    write(folder, report)
    if report.systems:
        records.publish(folder, report.systems, form)
    for name, path in adapters.items():
        ignored = shutil.ignore_patterns(MANIFEST)
        shutil.copytree(path, folder / "adapters" / name, dirs_exist_ok=True, ignore=ignored)
    for name, path in models.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(path.resolve(), target_is_directory=True)


def card(folder: Path, name: str, report: Report, systems: Sequence[System]) -> None:
    """The model card of an adapter in a run folder, with what was found of it."""
    rows = [row(system, report.claims) for system in systems]
    about = {**report.about, "command": report.command}
    write_card(folder / "adapters" / name, name=name, about=about, rows=rows)


def draw(folder: Path, store: Path) -> dict[str, str] | None:
    """Writes the page and its figures, and returns these as files within the folder by their
    titles; None where it cannot be drawn, which costs a run nothing else."""
    try:
        return write_page(folder, store)
    except Exception as e:  # whatever a drawing library raises
        log.warning("      report.html could not be drawn (%s)", first_line(e)[:200])
        return None


def left(folder: Path, figures: Mapping[str, str]) -> Left:
    """What is in a run folder for trackers to show."""
    page = folder / PAGE
    return Left(
        summary=(folder / "summary.md").read_text(encoding="utf-8"),
        figures={title: folder / file for title, file in figures.items()},
        page=page if page.is_file() else None,
    )


def tell(folder: Path, report: Report, *, seconds: float, kept: Sequence[str], whole: bool) -> None:
    """The verdict, then its details, on the screen; and where they lie.

    Args:
        kept: what lies in the folder beside the report, by name.
        whole: with every column of the table, however wide.
    """
    said = report.verdict
    if report.systems and said:  # where there is no table, the details begin with it
        log.info("\n%s", said)
    if report.systems:
        log.info("\n%s", table(report.systems, report.claims, None if whole else WIDTH))
    if details := [text for text in report.said if text != said]:
        log.info("\n%s", "\n".join(details))
    where = [f"Results: {folder / 'summary.md'}", *(f"{name}: {folder / name}" for name in kept)]
    log.info("\n%.1f s in all. %s", seconds, ", ".join(where))
