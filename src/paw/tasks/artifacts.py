"""task=artifacts: what lies in the store, what it cost and which runs use it. prune=true removes
what no run uses, verify=true reads all of it; without them nothing is changed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paw.config.checks import within
from paw.config.common import RunConfig
from paw.console import Console
from paw.errors import ConfigError, StageError
from paw.store import Store
from paw.store.inventory import Entry, Inventory, inventory, look, name_of, total, users
from paw.text import markdown_table, some

log = logging.getLogger("paw")
HOUR, DAY = 3600.0, 86400.0
FORGOTTEN = 30 * DAY  # a training that nobody went on with for so long may go


@dataclass
class Config(RunConfig):
    details: bool = False  # a line for each artifact
    prune: bool = False  # remove what no run uses
    # what is younger stays: a run in progress says what it used only at its end
    min_age_hours: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("min_age_hours", self.min_age_hours, 0, 1e6)


def run(c: Config, overrides: Sequence[str], run_dir: str | None = None) -> Inventory:
    """
    Returns:
        The store as it was found.

    Raises:
        StageError: where an artifact was damaged, or something could not be read or removed.
        ConfigError: where nothing says what is used.
    """
    console, root, outputs = Console(c.verbosity), Path(c.paths.artifacts), Path(c.paths.outputs)
    found = inventory(root)
    if not found.entries and not found.bases:
        log.info("%s holds no artifacts.", root)
        return found
    store, runs = Store(root, verify=True), dict(_runs(outputs))
    using = users(found, runs)
    log.info("%s", "\n".join(["", _table(found, using), "", *_rest(store, found)]))
    log.info("%s", "\n".join(_sources(outputs, runs)))
    if c.details:
        log.info("\n%s", _details(found, using))
    if c.prune:
        _prune(store, found, using, c, bool(runs))
    if c.verify:
        _verify(store, console)
    return found


# ---- which runs use what ----------------------------------------------------------------------


def _folders(outputs: Path) -> list[Path]:
    found = [*outputs.glob("runs/*/"), *outputs.glob("sweeps/*/*/")]
    return sorted(folder for folder in found if folder.is_dir())


def _runs(outputs: Path) -> Iterator[tuple[str, set[str]]]:
    """Every run that has ended, and the artifacts that it names."""
    for folder in _folders(outputs):
        file = folder / "results.json"
        if not file.is_file():
            continue
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            steps = [step.get("artifact") for step in said.get("steps", [])]
            systems = [path for s in said["systems"] for path in s["artifacts"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise StageError(
                f"{file}: cannot be read, so that nobody knows which artifacts this run uses. "
                "Restore it, or remove its folder."
            ) from None
        # Runs of before have only what their systems are of; a model made by one is a link
        places = [Path(path) for path in systems]
        places += [path.resolve() for path in folder.iterdir() if path.is_symlink()]
        yield str(folder.relative_to(outputs)), {*filter(None, steps), *map(name_of, places)}


def _sources(outputs: Path, runs: Mapping[str, object]) -> list[str]:
    """Who was asked, and who could not be."""
    folders = [folder for folder in _folders(outputs) if (folder / "config.yaml").is_file()]
    silent = [f for f in folders if str(f.relative_to(outputs)) not in runs]
    lines = [f"{_count(len(runs), 'run')} below {outputs}."]
    if silent:
        lines.append(
            f"{_count(len(silent), 'run')} without results.json, in progress or killed: what only "
            f"such a run uses counts as unused ({some([f.name for f in silent])})."
        )
    return lines


# ---- what is shown ----------------------------------------------------------------------------


def _table(found: Inventory, using: Mapping[str, list[str]]) -> str:
    head = ["stage", "artifacts", "size", "oldest", "newest", "used by", "unused", "unused size"]
    made = found.of("artifact")
    stages = sorted({entry.stage for entry in made})
    rows = [_row(stage, [e for e in made if e.stage == stage], using) for stage in stages]
    return markdown_table([head, *rows, _row("all", made, using)])


def _row(name: str, made: Sequence[Entry], using: Mapping[str, list[str]]) -> list[str]:
    ages = [time.time() - entry.changed for entry in made]
    unused = [entry for entry in made if not using[entry.name]]
    runs = {run for entry in made for run in using[entry.name]}
    return [
        name,
        str(len(made)),
        _size(total(made)),
        _time(max(ages)) if ages else "–",
        _time(min(ages)) if ages else "–",
        _count(len(runs), "run"),
        str(len(unused)),
        _size(total(unused)),
    ]


def _details(found: Inventory, using: Mapping[str, list[str]]) -> str:
    """A line for each artifact, the largest of a stage first."""
    made = sorted(found.of("artifact"), key=lambda e: (e.stage, -e.size, e.key))
    rows = [
        [
            entry.stage,
            entry.key,
            _size(entry.size),
            _time(time.time() - entry.changed),
            "–" if entry.seconds is None else _time(entry.seconds),
            some(using[entry.name]) or "none",
        ]
        for entry in made
    ]
    return markdown_table([["stage", "key", "size", "age", "cost", "used by"], *rows])


def _rest(store: Store, found: Inventory) -> Iterator[str]:
    """What lies beside the artifacts, where there is any."""
    holders = {entry.claim: store.claims.holder(entry.claim) for entry in found.of("claim")}
    for claim, holder in holders.items():
        if holder is not None:
            yield f"Being made: {claim.parent.name}/{claim.stem}, by {holder}."
    going = {claim for claim, holder in holders.items() if holder is not None}
    temporary = [e for e in found.of("temporary", "claim") if e.claim not in going]
    for name, entries in (
        ("Unfinished trainings", found.of("unfinished")),
        ("Left by killed processes", temporary),
        ("Set aside as damaged", found.of("damaged")),
    ):
        if entries:
            last = _time(time.time() - max(entry.changed for entry in entries))
            yield f"{name}: {len(entries)}, {_size(total(entries))}, the newest {last} old."
    if found.bases:
        yield f"Singular bases of models, which every transfer shares: {_size(found.bases)}."
    yield f"In all {_size(found.size)} in {found.root}."


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _size(n: float) -> str:
    if n < 1024:
        return f"{n:.0f} B"
    for unit, length in (("KiB", 2**10), ("MiB", 2**20)):
        if n < 1024 * length:
            return f"{n / length:.1f} {unit}"
    return f"{n / 2**30:.1f} GiB"


def _time(seconds: float) -> str:
    for unit, length in (("d", DAY), ("h", HOUR), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


# ---- what is removed --------------------------------------------------------------------------


def _prune(
    store: Store, found: Inventory, using: Mapping[str, list[str]], c: Config, runs: bool
) -> None:
    """Says what goes, then removes it, each thing while its claim is held."""
    unused = [e for e in found.of("artifact") if not using[e.name]]
    now = time.time()
    old = [e for e in unused if now - e.changed >= c.min_age_hours * HOUR]
    if old and not runs:
        raise ConfigError(
            f"prune: no run was found below {c.paths.outputs}, so that all artifacts would go. Set "
            f"paths.outputs to where the runs are; or remove {store.root}, if that is meant."
        )
    forgotten = [e for e in found.of("unfinished") if now - e.changed >= FORGOTTEN]
    left = found.of("temporary", "damaged", "claim")
    asked = [*old, *forgotten, *left]
    going = [e for e in asked if store.claims.holder(e.claim) is None]
    log.info("\nPrune removes %s.", _listed(going))
    if len(unused) > len(old):
        young = total(unused) - total(old)
        log.info(
            "%d unused, %s, stay: they are younger than min_age_hours=%g.",
            len(unused) - len(old),
            _size(young),
            c.min_age_hours,
        )
    if len(asked) > len(going):
        log.info("%d stay: another process is at them.", len(asked) - len(going))
    gone = [entry for entry in going if _remove(store, entry)]
    if going:
        log.info("Removed %d of %d, %s.", len(gone), len(going), _size(total(gone)))


def _listed(entries: Sequence[Entry]) -> str:
    """How many of which, and how large."""
    made = [e for e in entries if e.kind == "artifact"]
    parts = []
    for stage in sorted({e.stage for e in made}):
        of = [e for e in made if e.stage == stage]
        cost = _time(sum(e.seconds or 0 for e in of))
        parts.append(f"{stage} {len(of)} ({_size(total(of))}, had cost {cost})")
    for kind, name in (
        ("unfinished", "unfinished trainings"),
        ("temporary", "half-written"),
        ("damaged", "damaged"),
        ("claim", "claims of killed processes"),
    ):
        of = [e for e in entries if e.kind == kind]
        if of:
            parts.append(f"{name} {len(of)} ({_size(total(of))})")
    return f"{len(entries)}, {_size(total(entries))}: {', '.join(parts)}" if parts else "nothing"


def _remove(store: Store, entry: Entry) -> bool:
    """False where another process came first: it makes this artifact, has made it anew, or has
    removed it."""
    try:
        claim = store.claims.take(entry.claim)
        if claim is None:
            return False
        try:
            if entry.kind == "claim":  # the claim itself goes when it is given back
                if entry.path != entry.claim:
                    entry.path.unlink(missing_ok=True)
                return True
            if look(entry.path) != entry:
                return False
            store.remove(entry.path)
            return True
        finally:
            claim.release()
    except OSError as e:
        raise StageError(
            f"{entry.path}: cannot be removed: {e.strerror}. Prune as a user who may write there."
        ) from None


# ---- what is read in full ---------------------------------------------------------------------


def _verify(store: Store, console: Console) -> None:
    """
    Raises:
        StageError: where artifacts were damaged. They are set aside.
    """
    made, damaged = inventory(store.root).of("artifact"), []
    console.start("verify")
    for number, entry in enumerate(made):
        console.progress(number, len(made), entry.name)
        if store.damaged(entry.path) and (said := _set_aside(store, entry)):
            console.say(said)
            damaged.append(entry.name)
    console.close()
    unknown = sum(entry.content is not None and not entry.hashed for entry in made)
    more = f" {unknown} of them are from before hashes were kept, and are as they are."
    log.info("Verified %d artifacts, %s.%s", len(made), _size(total(made)), more if unknown else "")
    if damaged:
        raise StageError(
            f"verify: {len(damaged)} of {len(made)} artifacts were damaged ({some(damaged)}) and "
            "are set aside. Repeat the commands that made them, and they are made anew."
        )


def _set_aside(store: Store, entry: Entry) -> str | None:
    """What is said of a damaged artifact; None where another process replaced it while it was
    read."""
    claim = store.claims.take(entry.claim)
    if claim is None:
        return None
    try:
        if not entry.path.exists():
            return None
        files = store.damaged(entry.path)
        if not files:
            return None
        aside = store.set_aside(entry.path)
        return f"{entry.name} is damaged ({some(files)}): set aside as {aside.name}"
    finally:
        claim.release()
