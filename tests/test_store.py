"""A stage runs once per config, inputs and version; failures and killed processes leave nothing that looks finished."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import Silent
from paw.config.checks import transient
from paw.errors import StageError
from paw.store import BEGUN, Artifact, Input, Stage, Store

STAGE = Stage("work", "1", "test_store:work")


@dataclass
class Config:
    lr: float = 0.1
    steps: int = 3
    workers: int = transient(2)


@dataclass
class Grown(Config):
    added: str = "default"


def work(config: Config, inputs: Mapping[str, Input], out: Path, watch: Silent) -> dict[str, Any]:
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
    return {"loss": config.lr}


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
    assert second.result == {"loss": 0.1}
    assert second.cost == first.cost
    assert (first.cost["ram_mib"] or 0) > 10


def test_transient_fields_and_new_defaults_keep_the_key(store: Store) -> None:
    assert go(store).key == go(store, Config(workers=9)).key == go(store, Grown()).key
    assert calls(store) == 1


def test_config_and_version_change_it(store: Store) -> None:
    version = Stage("work", "2", "test_store:work")
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
    """The same key with other content (mended code, another GPU): whatever reads it runs again; equal content is reused."""
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
    processes = [
        multiprocessing.get_context("fork").Process(target=go, args=(store, Config(lr=0.7)))
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
    """Numbers of processes come again, above all in containers: what lies there may bear the very name that is needed."""
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
        {"loss": 0.7},
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
    """Larger than what is read at once; a file's name counts, and so do folders below; a hub client's notes do not."""
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


def go_on(
    config: Config, inputs: Mapping[str, Input], out: Path, watch: Silent, unfinished: Path
) -> dict[str, Any]:
    """A stage that resumes: every attempt counts what those before it have left."""
    (out / "weights.bin").write_bytes(b"w")
    found = [p.name for p in unfinished.glob("try*")]
    (unfinished / f"try{len(found)}").write_text("x")
    if len(found) < 2:
        raise ValueError("not yet")
    return {"before": len(found)}


def test_what_a_stage_goes_on_with_survives_failures_and_goes_with_success(store: Store) -> None:
    stage = Stage("work", "1", "test_store:go_on", resumes=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="not yet"):
            go(store, stage=stage)
        [left] = [p for p in (store.root / "work").iterdir() if p.is_dir()]
        assert json.loads((left / BEGUN).read_text())["stage"] == "work"
    assert go(store, stage=stage).result == {"before": 2}
    assert len(artifacts(store)) == 1


def test_a_tokenizer_is_known_by_its_files_alone(store: Store, tmp_path: Path) -> None:
    found = []
    for name, tokens, weights in (("a", "x", "1"), ("b", "x", "2"), ("c", "y", "1")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(tokens)
        (folder / "model.safetensors").write_text(weights)
        found.append(store.tokenizer(folder).fingerprint)
    assert found[0] == found[1] != found[2]


def test_who_waits_for_another_process_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLEEP", "1.5")
    process = multiprocessing.get_context("fork").Process(target=go, args=(store,))
    process.start()
    while not (store.root / "work" / "calls").is_file():
        time.sleep(0.01)
    watch = Silent()
    done = store.run(STAGE, Config(), {}, watch)
    process.join()
    assert done.reused
    assert calls(store) == 1
    assert watch.said == ["another process is making this; waiting for it"]


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
