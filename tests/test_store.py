"""A stage runs once per config, inputs and version; failures and killed processes leave nothing
that looks finished."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Silent
from paw.config.checks import transient
from paw.errors import StageError
from paw.graph import Execution, Step, execute
from paw.store import BEGUN, Artifact, Busy, Claims, Context, Holder, Input, Stage, Store, claim


@dataclass
class Config:
    lr: float = 0.1
    steps: int = 3
    workers: int = transient(2)


@dataclass
class Grown(Config):
    added: str = "default"


@dataclass(frozen=True)
class Result:
    loss: float = 0.0
    before: int = 0


STAGE = Stage("work", "1", "test_store:work", config=Config, result=Result)


def work(config: Config, inputs: Mapping[str, Input], out: Path, context: Context) -> Result:
    with open(out.parent / "calls", "a") as f:
        f.write("x")
    time.sleep(float(os.environ.get("SLEEP", "0")))
    (out / "weights.bin").write_bytes(b"w" * config.steps)
    if os.environ.get("OTHER"):
        (out / "more.bin").write_bytes(b"other")
    if config.lr < 0:
        raise ValueError("diverged")
    if os.environ.get("KILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    return Result(loss=config.lr)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def go(store: Store, config: Any = None, stage: Stage = STAGE, **inputs: Path) -> Artifact:
    return store.run(
        stage, config or Config(), {k: store.file(v) for k, v in inputs.items()}, Silent()
    )


def calls(store: Store) -> int:
    return len((store.root / "work" / "calls").read_text())


def artifacts(store: Store) -> list[str]:
    return [p.name for p in (store.root / "work").iterdir() if p.is_dir()]


def test_runs_once_and_says_what_it_cost(store: Store) -> None:
    first, second = go(store), go(store)
    assert first.path == second.path
    assert (first.reused, second.reused, calls(store)) == (False, True, 1)
    assert second.result == Result(loss=0.1)
    assert second.cost == first.cost
    assert (first.cost["ram_mib"] or 0) > 10


def test_transient_fields_and_new_defaults_keep_the_key(store: Store) -> None:
    assert go(store).key == go(store, Config(workers=9)).key == go(store, Grown()).key
    assert calls(store) == 1


def test_config_and_version_change_it(store: Store) -> None:
    version = replace(STAGE, version="2")
    assert (
        len(
            {
                go(store).key,
                go(store, Config(lr=1.0)).key,
                go(store, stage=version).key,
                go(store, Grown(added="y")).key,
            }
        )
        == 4
    )


def test_inputs_count_by_content_not_by_path_or_time(store: Store, tmp_path: Path) -> None:
    file, moved = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("one")
    first = go(store, data=file)
    os.utime(file, (1, 1))
    assert go(store, data=file).reused
    file.rename(moved)
    assert go(store, data=moved).key == first.key
    moved.write_text("two")
    assert go(store, data=moved).key != first.key


def test_a_file_changed_in_place_is_seen(store: Store, tmp_path: Path) -> None:
    """Same size, new content: the shortcut by time stamps must not hide it."""
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = store.file(file).fingerprint
    time.sleep(0.02)
    file.write_text("two")
    assert store.file(file).fingerprint != first


def test_a_readme_beside_a_model_changes_nothing(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = store.file(folder).fingerprint
    (folder / "README.md").write_text("hello")
    assert store.file(folder).fingerprint == first
    (folder / "config.json").write_text('{"a": 1}')
    assert store.file(folder).fingerprint != first


def test_downstream_follows_upstream(store: Store) -> None:
    a, b = go(store), go(store, Config(steps=4))
    assert go(store, Config(steps=1), up=a.path).key != go(store, Config(steps=1), up=b.path).key


def test_a_failure_is_not_kept(store: Store) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="diverged"):
            go(store, Config(lr=-1.0))
    assert calls(store) == 2
    assert artifacts(store) == []


def test_force_runs_again_once_a_run_and_keeps_one_artifact(store: Store) -> None:
    first = go(store)
    forced = Store(store.root, force=["work"])
    assert not go(forced).reused
    assert go(forced).reused
    assert calls(store) == 2
    assert artifacts(store) == [first.path.name]


def test_what_a_forced_stage_makes_anew_is_seen_downstream(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same key with other content (mended code, another GPU): whatever reads it runs again;
    equal content is reused."""
    first = go(store)
    down = store.run(STAGE, Config(steps=1), {"up": first.as_input()}, Silent())
    same = go(Store(store.root, force=["work"]))
    assert store.run(STAGE, Config(steps=1), {"up": same.as_input()}, Silent()).path == down.path
    monkeypatch.setenv("OTHER", "1")
    other = go(Store(store.root, force=["work"]))
    assert other.key == first.key
    assert store.run(STAGE, Config(steps=1), {"up": other.as_input()}, Silent()).path != down.path


def test_a_model_under_a_hidden_cache_is_known_by_its_content(store: Store, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        folder = tmp_path / ".cache" / "paw" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(name)
        found.append(store.file(folder).fingerprint)
    assert found[0] != found[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(StageError, match="holds none"):
        store.file(tmp_path / "empty")


def test_a_killed_process_leaves_no_result_and_no_rubbish(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILL", "1")
    process = multiprocessing.get_context("fork").Process(target=go, args=(store,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [".tmp-" in name for name in artifacts(store)] == [True]
    monkeypatch.delenv("KILL")
    done = go(store)
    assert not done.reused
    assert artifacts(store) == [done.path.name]


def test_four_processes_compute_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEP", "1")
    step = Step(stage=STAGE, name="work", config=Config(lr=0.7), inputs={})
    processes = [
        multiprocessing.get_context("fork").Process(
            target=lambda: execute(Execution([step], store), Silent())
        )
        for _ in range(4)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * 4
    assert calls(store) == 1


def test_values_without_a_stable_text_are_refused(store: Store) -> None:
    with pytest.raises(TypeError, match="may not hold object"):
        go(store, {"x": object()})


def test_a_damaged_manifest_is_not_a_result(store: Store) -> None:
    done = go(store)
    (done.path / "stage.json").write_text("{")
    assert not go(store).reused


def test_what_a_killed_process_left_is_gone_before_and_after_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of processes come again, above all in containers: what lies there may bear the very
    name that is needed."""
    monkeypatch.setenv("KILL", "1")
    process = multiprocessing.get_context("fork").Process(target=go, args=(store,))
    process.start()
    process.join()
    [left] = [p for p in (store.root / "work").iterdir() if p.is_dir()]
    (left / "half.bin").write_bytes(b"half")
    mine = left.with_name(left.name.removesuffix(str(process.pid)) + str(os.getpid()))
    shutil.copytree(left, mine)
    shutil.copytree(
        left, left.with_name(left.name.partition(".")[0] + ".tmp-old")
    )  # killed while it replaced a forced one
    monkeypatch.delenv("KILL")
    done = go(store)
    assert artifacts(store) == [done.path.name]
    assert sorted(p.name for p in done.path.iterdir()) == ["stage.json", "weights.bin"]
    shutil.copytree(done.path, done.path.with_name(f"{done.path.name}.tmp-old"))
    again = go(Store(store.root, force=["work"]))
    assert artifacts(store) == [again.path.name]


def test_a_cost_is_the_time_and_the_memory_that_it_took(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak, not what is held at the end; of a GPU nothing is said where there is none."""
    import torch

    from paw.store.meter import Meter

    monkeypatch.setenv("SLEEP", "0.3")
    assert 0.3 <= (go(store).cost["seconds"] or 0) < 30
    with Meter() as meter:
        before = meter.cost()["ram_mib"] or 0
        held = bytearray(os.urandom(1 << 20) * 200)
        time.sleep(0.3)
        del held
    cost = meter.cost()
    assert 150 < (cost["ram_mib"] or 0) - before < 600
    assert 0.3 <= (cost["seconds"] or 0) < 30
    assert (cost["gpu_mib"] is None) == (not torch.cuda.is_available())


def test_a_manifest_says_what_made_the_artifact(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    done = go(store, Config(lr=0.7, workers=5), data=file)
    found = json.loads((done.path / "stage.json").read_text())
    assert (found["stage"], found["version"], found["config"], found["result"]) == (
        "work",
        "1",
        {"lr": 0.7},
        {"loss": 0.7, "before": 0},
    )
    assert found["inputs"] == {"data": hashlib.sha256(b"one").hexdigest()}
    assert found["paths"] == {"data": str(file)}
    assert (found["key"], found["content"], found["cost"]) == (done.key, done.content, done.cost)
    assert done.path.name == done.key[:16]
    again = go(store, Config(lr=0.7), data=file)
    assert (again.key, again.content, again.result, again.stage) == (
        done.key,
        done.content,
        done.result,
        "work",
    )
    assert done.stage == "work"


def test_a_content_is_all_bytes_of_all_files_that_count(store: Store, tmp_path: Path) -> None:
    """Larger than what is read at once; a file's name counts, and so do folders below; a hub
    client's notes do not."""
    big = b"0123456789abcdef" * 200_000
    file = tmp_path / "big.bin"
    file.write_bytes(big)
    assert store.file(file).fingerprint == hashlib.sha256(big).hexdigest()
    found = []
    for name, inner in (
        ("one", "a.json"),
        ("two", "b.json"),
        ("three", "sub/a.json"),
        ("four", "a.json"),
    ):
        folder = tmp_path / name
        (folder / inner).parent.mkdir(parents=True)
        (folder / inner).write_text("{}")
        (folder / ".cache").mkdir()
        (folder / ".cache" / "note.json").write_text(name)
        found.append(store.file(folder).fingerprint)
    assert len(set(found)) == 3
    assert found[0] == found[3]


def go_on(config: Config, inputs: Mapping[str, Input], out: Path, context: Context) -> Result:
    """A stage that resumes: every attempt counts what those before it have left."""
    (out / "weights.bin").write_bytes(b"w")
    found = [p.name for p in context.unfinished.glob("try*")]
    (context.unfinished / f"try{len(found)}").write_text("x")
    if len(found) < 2:
        raise ValueError("not yet")
    return Result(before=len(found))


def test_what_a_stage_goes_on_with_survives_failures_and_goes_with_success(store: Store) -> None:
    stage = replace(STAGE, function="test_store:go_on", resumes=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="not yet"):
            go(store, stage=stage)
        [left] = [p for p in (store.root / "work").iterdir() if p.is_dir()]
        assert json.loads((left / BEGUN).read_text())["stage"] == "work"
    assert go(store, stage=stage).result == Result(before=2)
    assert len(artifacts(store)) == 1


def test_who_asks_for_what_another_process_makes_is_told_who_it_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEEP", "1.5")
    process = multiprocessing.get_context("fork").Process(target=go, args=(store,))
    process.start()
    while not (store.root / "work" / "calls").is_file():
        time.sleep(0.01)
    with pytest.raises(Busy, match=f"process {process.pid} on {socket.gethostname()}"):
        store.run(STAGE, Config(), {}, Silent())
    process.join()
    assert store.run(STAGE, Config(), {}, Silent()).reused
    assert calls(store) == 1
    assert list((store.root / "work").glob("*.claim*")) == []


# ---- claims ---------------------------------------------------------------------------------


def holds(file: Path, beat: float, ready: Any) -> None:
    claim = Claims(beat=beat).take(file)
    assert claim is not None
    ready.set()
    time.sleep(60)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, multiprocessing.process.BaseProcess]]:
    """A claim that another process holds."""
    context, file = multiprocessing.get_context("fork"), tmp_path / "x.claim"
    ready = context.Event()
    process = context.Process(target=holds, args=(file, 0.2, ready))
    process.start()
    assert ready.wait(10)
    yield file, process
    process.kill()
    process.join()


def test_a_claim_has_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    mine = Claims().take(tmp_path / "x.claim")
    assert mine is not None
    assert Claims().take(tmp_path / "x.claim") is None
    mine.release()
    assert not (tmp_path / "x.claim").exists()
    assert Claims().take(tmp_path / "x.claim") is not None


def test_a_living_process_of_this_host_is_never_dead(held: Any) -> None:
    """However long it was silent: a stage may hold the interpreter for minutes."""
    file, process = held
    claims = Claims(timeout=0.0)
    os.kill(process.pid, signal.SIGSTOP)
    for _ in range(3):
        assert claims.take(file) is None
        time.sleep(0.3)
    os.kill(process.pid, signal.SIGCONT)


def test_a_killed_process_of_this_host_is_dead_at_once(held: Any) -> None:
    file, process = held
    assert Claims().holder(file) is not None
    process.kill()  # and not waited for: a zombie is dead, too
    began = time.monotonic()
    while (claim := Claims().take(file)) is None:
        assert time.monotonic() - began < 2
    claim.release()


def test_a_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    """In containers numbers come again: this very process has the dead one's."""
    file = tmp_path / "x.claim"
    holder = Holder(claim.place(), os.getpid(), 12345.0, "dead")
    file.write_text(json.dumps(asdict(holder)))
    assert Claims().take(file) is not None


@pytest.mark.parametrize("where", ["elsewhere/1", None])
def test_a_holder_elsewhere_is_dead_when_its_heart_has_not_beaten_for_the_time_out(
    where: str | None, tmp_path: Path
) -> None:
    """By the waiter's own clock, whatever that of the file system says; and so is one that died as
    it wrote its name."""
    file = tmp_path / "x.claim"
    holder = json.dumps(asdict(Holder(where or "", os.getpid(), 0.0, "token")))
    file.write_text(holder if where else holder[:20])
    os.utime(file, (0, 0))  # a clock that is fifty years slow
    claims, began = Claims(timeout=1.0), time.monotonic()
    while time.monotonic() - began < 2.0:  # as long as it beats
        os.utime(file, (time.monotonic(),) * 2)
        assert claims.take(file) is None
        time.sleep(0.1)
    silent = time.monotonic()
    while (mine := claims.take(file)) is None:
        time.sleep(0.05)
    assert 0.8 <= time.monotonic() - silent < 3.0  # it was last seen a moment before
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_take_over_one_has_it(tmp_path: Path) -> None:
    file = tmp_path / "x.claim"
    for _ in range(20):
        file.write_text(json.dumps(asdict(Holder(claim.place(), 2**30, 0.0, "dead"))))
        with ThreadPoolExecutor(16) as pool:
            taken = list(pool.map(lambda _: Claims().take(file), range(16)))
        assert sum(t is not None for t in taken) == 1
        for t in taken:
            if t is not None:
                t.release()


def test_a_holder_that_was_taken_over_does_not_give_back_what_is_no_longer_its(
    tmp_path: Path,
) -> None:
    file = tmp_path / "x.claim"
    first = Claims(beat=0.05).take(file)
    assert first is not None
    other = json.dumps(asdict(Holder("elsewhere/1", 1, 0.0, "other")))
    file.write_text(other)
    os.utime(file, (1, 1))
    time.sleep(0.3)
    assert file.stat().st_mtime == 1, "it must not keep another's claim alive"
    first.release()
    assert file.read_text() == other


def test_its_heart_beats(held: Any) -> None:
    file, _ = held
    before = file.stat().st_mtime_ns
    time.sleep(0.7)
    assert file.stat().st_mtime_ns > before


def test_lists_in_a_config_count_in_their_order(store: Store) -> None:
    keys = {go(store, Grown(added=value)).key for value in (["a", "b"], ["b", "a"], ["a"])}  # type: ignore[arg-type]
    assert len(keys) == 3


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        StageError, match=r"paths\.artifacts: .*file/store cannot be made: Not a directory"
    ):
        Store(tmp_path / "file" / "store")


def test_the_order_in_which_a_mapping_was_written_does_not_count(store: Store) -> None:
    keys = {go(store, Grown(added=value)).key for value in ({"a": 1, "b": 2}, {"b": 2, "a": 1})}  # type: ignore[arg-type]
    assert len(keys) == 1
