"""The store says what is used by which run; what is removed is what no run uses, whole or not at
all, and only where that is asked."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import Launch, Paw, Silent
from paw.cli.compose import compose_config
from paw.errors import ConfigError, StageError
from paw.graph import Step, View
from paw.launch.outline import Outline
from paw.launch.run import Finished
from paw.launch.run import run as launch_run
from paw.store import Artifact, Claims, Context, Input, Stage, Store
from paw.store.fingerprint import stamp
from paw.store.inventory import inventory, users
from paw.tasks import artifacts as task


@dataclass
class Config:
    value: str = "x"
    size: int = 5000


@dataclass(frozen=True)
class Result:
    read: int


def work(config: Config, inputs: Mapping[str, Input], out: Path, context: Context) -> Result:
    (out / "value.bin").write_bytes((config.value * config.size).encode()[: config.size])
    (out / "below").mkdir()
    (out / "below" / "note.txt").write_text(config.value)
    return Result(len(inputs))


def going_on(config: Config, inputs: Mapping[str, Input], out: Path, context: Context) -> Result:
    (context.unfinished / "checkpoint.bin").write_bytes(b"c" * 100)
    raise StageError("stopped")


STAGE = Stage("work", "1", "test_artifacts:work", config=Config, result=Result)
OTHER = Stage("other", "1", "test_artifacts:work", config=Config, result=Result)
TRAINED = Stage("long", "1", "test_artifacts:going_on", config=Config, result=Result, resumes=True)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return Store(tmp_path / "outputs" / "artifacts")


def step(value: str, *needs: Step, stage: Stage = STAGE, **config: Any) -> Step:
    inputs = {f"in{i}": node for i, node in enumerate(needs)}
    return Step(stage=stage, name=value, config=Config(value, **config), inputs=inputs)


def ran(*steps: Step, name: str = "one") -> Finished:
    """A real run of a graph, in the outputs of the working folder."""
    c = compose_config(["task=artifacts", f"name={name}", "hardware=cpu"])
    return launch_run(c, Outline(label=name, first=steps), [], None)


def unused(store: Store, value: str = "unused", hours: float = 5.0) -> Artifact:
    """An artifact that no run names, finished hours ago."""
    made = store.run(STAGE, Config(value), {}, Silent())
    old(made.path, hours)
    return made


def old(path: Path, hours: float) -> None:
    for file in [path, *path.rglob("*")]:
        os.utime(file, (time.time() - hours * 3600,) * 2)


def names(store: Store) -> list[str]:
    return sorted(f"{p.parent.name}/{p.name}" for p in store.root.glob("*/*") if p.is_dir())


def name_of(made: Artifact) -> str:
    return f"{made.stage}/{made.path.name}"


def state(root: Path) -> dict[str, bytes]:
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and ".content" not in p.parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def table(said: str) -> dict[str, list[str]]:
    """The lines of the table, by their first cell."""
    rows = [[cell.strip() for cell in x.split("|")[1:-1]] for x in said.splitlines() if "|" in x]
    return {row[0]: row[1:] for row in rows}


# ---- what uses what ---------------------------------------------------------------------------


def test_a_run_says_which_artifacts_its_steps_are(store: Store) -> None:
    done = ran(end := step("end", first := step("first")))
    (file,) = Path("outputs/runs").glob("*/results.json")
    found = {s["name"]: s["artifact"] for s in json.loads(file.read_text())["steps"]}
    assert found == {s.name: name_of(done.execution[s]) for s in (first, end)}
    bad = Stage("work", "1", "test_artifacts:no_such", config=Config, result=Result)
    with pytest.raises(AttributeError):
        ran(step("fine"), step("bad", stage=bad), name="two")
    (file,) = Path("outputs/runs").glob("*_two/results.json")
    states = {s["name"]: (s["state"], s["artifact"]) for s in json.loads(file.read_text())["steps"]}
    assert states["bad"] == ("failed", None)


def test_the_table_counts_what_is_used_and_what_is_not(
    store: Store, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = ran(shared := step("shared"), step("end", step("shared"), stage=OTHER))
    ran(step("shared"), name="two")
    old(done.execution[shared].path, 3.0)
    unused(store, hours=72.0)
    launch("task=artifacts", "details=true")
    said = capsys.readouterr().out
    assert "2 runs below outputs." in said
    rows = table(said.partition("| stage | key")[0])
    assert rows["work"][0] == "2"
    assert rows["work"][2:6] == ["3 d", "3 h", "2 runs", "1"]
    assert (rows["other"][0], rows["other"][4:6]) == ("1", ["1 run", "0"])
    assert rows["all"][0] == "3"
    details = [x for x in said.splitlines() if x.startswith("| work") and x.count("|") == 7]
    assert sorted(x.split("|")[-2].count("runs/") for x in details) == [0, 2]


def test_what_a_used_artifact_was_made_from_is_used(store: Store) -> None:
    """By content, wherever that is; and by place, where an input was known by a part of its
    content only."""
    first, copy = unused(store, "first"), store.run(OTHER, Config("first"), {}, Silent())
    seen = unused(store, "seen")
    inputs = {"a": first.as_input(), "b": Input(seen.path, "a part")}
    second = store.run(STAGE, Config("second"), inputs, Silent())
    third = store.run(STAGE, Config("third"), {"in": second.as_input()}, Silent())
    alone = unused(store, "alone")
    assert first.content == copy.content
    found = users(inventory(store.root), {"run": [name_of(third), "work/0123456789abcdef"]})
    used = {name_of(made) for made in (first, copy, seen, second, third)}
    assert {name for name, runs in found.items() if runs == ["run"]} == used
    assert {name for name, runs in found.items() if not runs} == {name_of(alone)}


@pytest.mark.parametrize("sweep", [False, True])
def test_runs_from_before_are_known_by_their_systems(
    store: Store, launch: Launch, sweep: bool
) -> None:
    """Their steps name no artifacts; a model that one made is a link in its folder."""
    first = unused(store, "first")
    end = store.run(STAGE, Config("end"), {"in": first.as_input()}, Silent())
    merged, alone = unused(store, "merged"), unused(store, "alone")
    old(end.path, 5.0)
    folder = Path("outputs/sweeps/today/0_a-b" if sweep else "outputs/runs/before")
    folder.mkdir(parents=True)
    system = {"system": "s", "artifacts": {"work": str(end.path.relative_to(Path.cwd()))}}
    steps = [{"name": "first", "stage": "work", "state": "computed"}]
    (folder / "results.json").write_text(json.dumps({"systems": [system], "steps": steps}))
    (folder / "merged").symlink_to(merged.path.resolve(), target_is_directory=True)
    launch("task=artifacts", "prune=true")
    assert names(store) == sorted(name_of(made) for made in (first, end, merged))
    assert not alone.path.exists()


def test_an_adapter_that_was_read_by_a_part_of_its_content_stays(
    store: Store, launch: Launch
) -> None:
    def known(store: Store, folder: Path) -> Input:
        return Input(folder, "a part")

    first = step("first")
    end = Step(
        stage=STAGE, name="end", config=Config("end"), inputs={"in": View(first, "p", known)}
    )
    done = ran(end)
    for made in (first, end):
        old(done.execution[made].path, 5.0)
    launch("task=artifacts", "prune=true")
    assert len(names(store)) == 2


# ---- what is removed --------------------------------------------------------------------------


def test_nothing_changes_unless_it_is_asked(
    store: Store, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(step("used"))
    made = unused(store, hours=10_000.0)
    for left in ("tmp-host-1", "damaged-20260101-000000-1", "unfinished"):
        shutil.copytree(made.path, made.path.with_name(f"{made.path.name}.{left}"))
    made.path.with_name("0123456789abcdef.claim").write_text("{")
    before = state(store.root)
    launch("task=artifacts", "details=true")
    launch("task=artifacts", "verify=true", "min_age_hours=0")
    assert state(store.root) == before
    said = capsys.readouterr().out
    assert "Unfinished trainings: 1" in said
    assert "Set aside as damaged: 1" in said


def test_prune_says_what_goes_and_removes_it(
    store: Store, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = ran(used := step("used"))
    made, more = unused(store), unused(store, "more")
    old(done.execution[used].path, 5.0)
    left = made.path.with_name(f"{made.path.name}.damaged-20260101-000000-1")
    shutil.copytree(made.path, left)
    launch("task=artifacts", "prune=true")
    said = capsys.readouterr().out
    assert "Prune removes 3, " in said
    assert "work 2 (" in said
    assert ", damaged 1 (" in said
    assert "Removed 3 of 3" in said
    assert names(store) == [name_of(done.execution[used])]
    assert not list(store.root.glob("*/*.claim*"))
    assert not Store(store.root).run(STAGE, Config("more"), {}, Silent()).reused
    assert more.path.exists()


def test_what_is_young_stays(
    store: Store, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run in progress says what it used only at its end."""
    ran(step("used"))
    made = unused(store, hours=0.9)
    launch("task=artifacts", "prune=true")
    assert "1 unused" in capsys.readouterr().out
    assert made.path.exists()
    launch("task=artifacts", "prune=true", "min_age_hours=0.5")
    assert not made.path.exists()


def held(claim: Path, ready: Any) -> None:
    assert Claims().take(claim) is not None
    ready.set()
    time.sleep(60)


def test_what_a_living_process_makes_stays_and_what_a_killed_one_left_goes(
    store: Store, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(step("used"))
    made = unused(store)
    left = [f"{made.path.name}.{x}" for x in ("tmp-host-1", "tmp-old", "damaged-20260101-000000-1")]
    for name in left:
        shutil.copytree(made.path, made.path.with_name(name))
    claim = made.path.with_name(f"{made.path.name}.claim")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=held, args=(claim, ready))
    process.start()
    assert ready.wait(10)
    before = names(store)
    launch("task=artifacts", "prune=true")
    assert names(store) == before
    said = capsys.readouterr().out
    assert f"Being made: {name_of(made)}, by process {process.pid}" in said
    assert "5 stay: another process is at them" in said
    process.kill()
    process.join()
    launch("task=artifacts", "prune=true")
    assert len(names(store)) == 1
    assert not claim.exists()


@pytest.mark.parametrize("forced", [False, True])
def test_what_another_process_takes_meanwhile_stays(
    forced: bool, store: Store, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the claim: it makes the artifact now, or has made it anew."""
    ran(step("used"))
    made, take = unused(store), Claims.take

    def late(claims: Claims, file: Path) -> Any:
        if file.name.startswith(made.path.name) and not forced:
            return None
        os.utime(made.path / "stage.json")
        return take(claims, file)

    monkeypatch.setattr(Claims, "take", late)
    launch("task=artifacts", "prune=true")
    assert made.path.exists()


def killed(prune: Callable[[], object], when: str) -> None:
    """Runs in a process of its own, and dies at a rename or at the first file that goes."""
    rename, rmtree = Path.rename, shutil.rmtree

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def renamed(path: Path, target: Path) -> None:
        rename(path, target)
        die()

    def torn(path: Path) -> None:
        (path / "value.bin").unlink()
        die()

    if when == "torn":
        shutil.rmtree = torn  # type: ignore[assignment]
    else:
        Path.rename = die if when == "before" else renamed  # type: ignore[assignment, method-assign]
    prune()
    shutil.rmtree = rmtree


@pytest.mark.parametrize("when", ["before", "after", "torn"])
def test_a_killed_prune_leaves_nothing_half_there(when: str, store: Store, launch: Launch) -> None:
    ran(step("used"))
    made = unused(store)
    ask = ["task=artifacts", "prune=true"]
    process = multiprocessing.get_context("fork").Process(
        target=killed, args=(lambda: launch(*ask), when)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = Store(store.root).run(STAGE, Config("unused"), {}, Silent())
    assert again.reused == (when == "before")
    assert (again.path / "value.bin").stat().st_size == 5000
    assert len(names(store)) == 2, "the next maker sweeps what was left"
    if when != "before":
        shutil.rmtree(again.path)
        half = again.path.with_name(f"{again.path.name}.tmp-removed-1")
        (half / "below").mkdir(parents=True)
    else:
        old(made.path, 5.0)
    launch(*ask)
    assert len(names(store)) == 1, "and so does the next prune"


def test_an_unfinished_training_goes_after_thirty_days(store: Store, launch: Launch) -> None:
    with pytest.raises(StageError, match="stopped"):
        store.run(TRAINED, Config(), {}, Silent())
    (folder,) = store.root.glob("long/*.unfinished")
    old(folder, 29 * 24.0)
    launch("task=artifacts", "prune=true", "min_age_hours=0")
    assert folder.exists()
    for newest in ("begun.json", "checkpoint.bin"):
        old(folder, 31 * 24.0)
        os.utime(folder / newest)
        launch("task=artifacts", "prune=true", "min_age_hours=0")
        assert folder.exists()
    old(folder, 31 * 24.0)
    launch("task=artifacts", "prune=true", "min_age_hours=0")
    assert not folder.exists()


def test_what_is_not_the_stores_stays(store: Store, launch: Launch) -> None:
    ran(step("used"))
    made = unused(store)
    mine = [
        store.root / "work" / "my_notes" / "a.txt",
        store.root / "work" / f"{made.path.name}_copy" / "stage.json",
        store.root / "work" / "0123456789abcdef" / "a.txt",  # has no manifest
        store.root / "bases" / "0123456789abcdef.safetensors",
        store.root / "bases" / "0123456789abcdef" / "stage.json",
        store.root / ".journal" / "0123456789abcdef" / "stage.json",
        store.root / "readme.txt",
    ]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    launch("task=artifacts", "prune=true", "min_age_hours=0")
    assert not made.path.exists()
    assert all(file.exists() for file in mine)


def test_it_is_refused_where_nothing_says_what_is_used(store: Store, launch: Launch) -> None:
    """Outputs that are elsewhere, or results that cannot be read, make everything look unused."""
    made = unused(store)
    with pytest.raises(ConfigError, match="no run was found below elsewhere"):
        launch(
            "task=artifacts",
            "prune=true",
            "paths.outputs=elsewhere",
            f"paths.artifacts={store.root}",
        )
    ran(step("used"))
    (file,) = Path("outputs/runs").glob("*/results.json")
    file.write_text("{")
    with pytest.raises(StageError, match=r"results.json: cannot be read"):
        launch("task=artifacts", "prune=true")
    assert made.path.exists()


def test_a_run_that_has_not_ended_is_named(
    store: Store, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(step("used"))
    ran(step("more"), name="killed")
    (file,) = Path("outputs/runs").glob("*_killed/results.json")
    file.unlink()
    launch("task=artifacts")
    said = capsys.readouterr().out
    assert "1 run without results.json" in said
    assert f"({file.parent.name})" in said


# ---- what is read in full ---------------------------------------------------------------------


def test_a_damaged_artifact_is_set_aside_and_the_exit_code_is_2(store: Store, paw: Paw) -> None:
    ran(step("used"))
    made = unused(store, hours=0.0)
    file = made.path / "below" / "note.txt"
    file.write_text("other!")
    done = paw("task=artifacts", "verify=true", ok=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"1 of 2 artifacts were damaged ({name_of(made)})" in done.stderr
    assert "is damaged (below/note.txt)" in done.stdout
    assert not made.path.exists()
    (aside,) = made.path.parent.glob("*.damaged-*")
    assert (aside / "below" / "note.txt").read_text() == "other!"
    assert not Store(store.root).run(STAGE, Config("unused"), {}, Silent()).reused
    assert "Verified 2 artifacts" in paw("task=artifacts", "verify=true").stdout


def test_verify_reads_all_bytes_and_prune_goes_first(store: Store, launch: Launch) -> None:
    """A disk that flips a bit changes no time, so that what is remembered of a file holds. What
    goes anyway is not read; what is set aside stays until the next prune."""
    done = ran(used := step("used"))
    made, gone = done.execution[used], unused(store)
    for path in (made.path, gone.path):
        file = path / "value.bin"
        known = store.content(file)
        file.write_bytes(b"!" + file.read_bytes()[1:])
        (store.root / ".content" / stamp(file)).write_text(known)
    with pytest.raises(StageError, match=rf"1 of 1 artifacts were damaged \({name_of(made)}\)"):
        launch("task=artifacts", "verify=true", "prune=true")
    (aside,) = store.root.glob("*/*.damaged-*")
    assert names(store) == [f"work/{aside.name}"]
    launch("task=artifacts", "prune=true")
    assert names(store) == []


def test_an_artifact_that_cannot_be_read_is_not_a_crash(store: Store, launch: Launch) -> None:
    ran(step("used"))
    made = unused(store)
    (made.path / "stage.json").write_text("{")
    old(made.path, 5.0)
    launch("task=artifacts", "details=true")
    with pytest.raises(StageError, match="1 of 2 artifacts were damaged"):
        launch("task=artifacts", "verify=true")


# ---- the figures ------------------------------------------------------------------------------


def test_sizes_add_up_to_what_du_says(store: Store, launch: Launch) -> None:
    ran(step("used"), step("end", step("used"), stage=OTHER))
    made = unused(store)
    shutil.copytree(made.path, made.path.with_name(f"{made.path.name}.tmp-old"))
    with pytest.raises(StageError, match="stopped"):
        store.run(TRAINED, Config(), {}, Silent())
    (store.root / "bases" / ".content").mkdir(parents=True)
    (store.root / "bases" / ".content" / "a").write_text("hash")
    (store.root / "bases" / "b.safetensors").write_bytes(b"b" * 12345)
    (made.path / "link").symlink_to("value.bin")
    found = inventory(store.root)
    ask = ["du", "--apparent-size", "--block-size=1", "--all", str(store.root)]
    said = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    lines = [line.split("\t") for line in said.splitlines()]
    files = [(int(n), Path(p)) for n, p in lines if Path(p).is_symlink() or Path(p).is_file()]
    kept = [(n, p.relative_to(store.root)) for n, p in files]
    assert found.size == sum(n for n, p in kept if not p.parts[0].startswith("."))
    assert found.bases == 12345 + 4
    (entry,) = (e for e in found.of("artifact") if e.path == made.path)
    assert entry.size == sum(n for n, p in kept if p.parts[1] == made.path.name)
    assert entry.seconds == made.cost["seconds"]


@pytest.mark.parametrize("made", [False, True])
def test_an_empty_store_is_said_and_not_made(
    made: bool, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "outputs" / "artifacts"
    if made:
        root.mkdir(parents=True)
    launch("task=artifacts", "prune=true", "verify=true", "details=true")
    assert capsys.readouterr().out == "outputs/artifacts holds no artifacts.\n"
    assert root.exists() == made
    with pytest.raises(ConfigError, match=r"min_age_hours: -1\.0 is outside"):
        compose_config(["task=artifacts", "min_age_hours=-1"])
    with pytest.raises(ConfigError, match="prune: only task=artifacts takes it"):
        compose_config(["task=train", "prune=true"])


def test_words_for_sizes_and_times() -> None:
    sizes = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 5 * 2**20: "5.0 MiB", 2**41: "2048.0 GiB"}
    assert {n: task._size(n) for n in sizes} == sizes
    times = {0.4: "0 s", 119: "119 s", 120: "2 min", 7200: "2 h", 3 * 86400: "3 d", -5: "0 s"}
    assert {s: task._time(s) for s in times} == times
