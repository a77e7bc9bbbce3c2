"""A graph is known before it runs; what is ready goes first; a step that fails costs no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import Silent
from paw.config.checks import transient
from paw.errors import StageError
from paw.graph import Execution, Source, Step, View, execute, plan, sources_of, steps_of
from paw.store import Context, Input, Stage, Store


@dataclass
class Config:
    value: str = "x"
    seconds: float = transient(0.0)
    fails: bool = transient(False)


@dataclass(frozen=True)
class Result:
    read: list[str]


def work(config: Config, inputs: Mapping[str, Input], out: Path, context: Context) -> Result:
    """Writes its value; what it reads does not change it."""
    with open(out.parent / "calls", "a") as f:
        f.write(f"{config.value} {os.getpid()} {time.monotonic()}\n")
    if config.value == "killed" and not (out.parent / "spared").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(config.seconds)
    if config.fails:
        raise StageError(f"{config.value} cannot be made")
    (out / "value.txt").write_text(config.value)
    return Result([(i.path / "value.txt").read_text() for i in inputs.values()])


STAGE = Stage("work", "1", "test_graph:work", config=Config, result=Result)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def step(value: str, *needs: Step | Source, **config: Any) -> Step[Result]:
    inputs = {f"in{i}": node for i, node in enumerate(needs)}
    return Step(stage=STAGE, name=value, config=Config(value, **config), inputs=inputs)


def calls(store: Store) -> list[str]:
    file = store.root / "work" / "calls"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def go(nodes: Sequence[Step], store: Store) -> Execution:
    execution = Execution(nodes, store)
    execute(execution, Silent())
    return execution


def test_what_is_needed_goes_first_and_a_step_that_two_need_is_one(store: Store) -> None:
    base, again = step("base"), step("base")
    ends = [step("left", base), step("right", again)]
    assert base.identity == again.identity
    done = go(ends, store)
    assert calls(store) == ["base", "left", "right"]
    assert [done[end].result for end in ends] == [Result(["base"]), Result(["base"])]
    assert done[again] is done[base]


def test_building_and_asking_what_a_graph_is_of_runs_nothing(store: Store) -> None:
    def never(*args: Any) -> Path:
        raise AssertionError("was looked for")

    source = Source(name="s", described=["s"], finder=never, getter=never)
    end = step("b", step("a", source))
    assert ([s.name for s in steps_of([end])], sources_of([end])) == (["a", "b"], [source])
    assert calls(store) == []


def test_identity_is_of_what_counts(store: Store) -> None:
    a, b = step("a"), step("b")
    same = [step("x", a), step("x", a, seconds=3.0)]
    others = [step("x"), step("x", b), step("x", a, a), step("y", a)]
    assert len({s.identity for s in same}) == 1
    assert len({s.identity for s in [same[0], *others]}) == 5


def test_equal_output_is_not_read_again(store: Store) -> None:
    """Early cut-off: another configuration that makes the same content."""
    go([step("end", step("same"))], store)
    other = Step(stage=STAGE, name="o", config=Config("same"), inputs={"in0": step("before")})
    go([step("end", other)], store)
    assert calls(store) == ["same", "end", "before", "same"]


def test_a_step_that_fails_costs_only_those_that_need_it(store: Store) -> None:
    bad = step("bad", fails=True)
    lost, fine = step("after", step("lost", bad)), step("fine")
    execution, show = Execution([lost, fine], store), Silent()
    with pytest.raises(StageError, match="bad cannot be made"):
        execute(execution, show)
    assert calls(store) == ["bad", "fine"]
    assert [s.name for s in execution.left_out.values()] == ["lost", "after"]
    assert execution[fine].result == Result([])
    assert "failed bad: bad cannot be made" in show.said


def test_a_mistake_of_ours_is_raised_as_it_is(store: Store) -> None:
    broken = Stage("work", "1", "test_graph:no_such", config=Config, result=Result)
    fine = step("fine")
    with pytest.raises(AttributeError, match="no_such"):
        go([Step(stage=broken, name="b", config=Config(), inputs={}), fine], store)
    assert calls(store) == ["fine"]


def test_a_view_is_shared_by_all_that_agree_in_it(store: Store, tmp_path: Path) -> None:
    def known(store: Store, folder: Path) -> Input:
        return Input(folder, (folder / "value.txt").read_text()[0])

    ends = [
        Step(
            stage=STAGE,
            name="end",
            config=Config("end"),
            inputs={"in0": View(step(value), "first letter", known)},
        )
        for value in ("apple", "ant", "bee")
    ]
    assert len({end.identity for end in ends}) == 3
    go(ends, store)
    assert calls(store).count("end") == 2


class Held:
    """A model in memory."""

    alive = 0

    def __init__(self) -> None:
        Held.alive += 1

    def release(self) -> None:
        Held.alive -= 1


def holds(config: Config, inputs: Mapping[str, Input], out: Path, context: Context) -> Result:
    """A stage that keeps a model, or says how many there are; or fails with one in its hands."""
    if config.value == "keeps":
        context.kept.get(Held)
    if config.value == "fails":
        model = Held()
        raise StageError(f"{model.alive} model")
    (out / "value.txt").write_text(config.value)
    return Result([str(Held.alive)])


def test_what_one_stage_keeps_is_given_back_before_another_that_keeps_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Held, "alive", 0)
    stage = Stage("hold", "1", "test_graph:holds", config=Config, result=Result)
    keeping = Stage("keep", "1", "test_graph:holds", config=Config, result=Result, keeps=True)
    first = Step(stage=keeping, name="a", config=Config("keeps"), inputs={})
    same = Step(stage=keeping, name="b", config=Config("b"), inputs={"in0": first})
    other = Step(stage=stage, name="c", config=Config("c"), inputs={"in0": same})
    done = go([other], store)
    assert (done[same].result.read, done[other].result.read) == (["1"], ["0"])


def test_a_failed_steps_model_is_gone_before_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Held, "alive", 0)
    monkeypatch.setattr(Held, "__del__", _forget, raising=False)
    stage = Stage("hold", "1", "test_graph:holds", config=Config, result=Result)
    bad = Step(stage=stage, name="bad", config=Config("fails"), inputs={})
    fine = Step(stage=stage, name="fine", config=Config("fine"), inputs={})
    execution = Execution([bad, fine], store)
    with pytest.raises(StageError, match="1 model"):
        execute(execution, Silent())
    assert execution[fine].result.read == ["0"]


def _forget(held: Held) -> None:
    Held.alive -= 1


# ---- several processes ----------------------------------------------------------------------


def process(nodes: Sequence[Step], store: Store) -> Any:
    found = multiprocessing.get_context("fork").Process(target=go, args=(nodes, store))
    found.start()
    return found


def test_two_processes_share_a_graph_and_neither_idles_while_something_is_ready(
    store: Store,
) -> None:
    """Four steps of two seconds each and their end."""
    parts = [step(f"part{i}", seconds=2.0) for i in range(4)]
    end = step("end", *parts)
    both = [process([end], store) for _ in range(2)]
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    assert sorted(calls(store)) == ["end", "part0", "part1", "part2", "part3"]
    lines = [line.split() for line in (store.root / "work" / "calls").read_text().splitlines()]
    assert len({maker for _, maker, _ in lines}) == 2
    first, second = (float(began) for _, _, began in lines[:2])
    assert second - first < 2, "the second began while the first was being made"


def test_a_dead_makers_step_is_taken_over(store: Store) -> None:
    end = step("end", step("killed"))
    dead = process([end], store)
    dead.join()
    assert dead.exitcode == -signal.SIGKILL
    assert len(list((store.root / "work").glob("*.claim"))) == 1
    (store.root / "work" / "spared").touch()
    began = time.monotonic()
    go([end], store)
    assert time.monotonic() - began < 5, "on its own host no time-out has to pass"
    assert calls(store) == ["killed", "killed", "end"]


def test_who_waits_is_told_once_for_whom(store: Store) -> None:
    slow = step("slow", seconds=2.0)
    other = process([slow], store)
    while not calls(store):
        time.sleep(0.02)
    execution, show = Execution([slow], store), Silent()
    execute(execution, show)
    other.join()
    assert show.said == ["waiting slow", "1/1 reused slow"]


# ---- plan -----------------------------------------------------------------------------------


def states(nodes: Sequence[Step], store: Store) -> dict[str, str]:
    return {p.step.name: p.state for p in plan(nodes, store)}


def test_a_plan_counts_the_steps_that_a_run_then_makes(store: Store) -> None:
    a = step("a")
    ends = [step("b", a), step("c", a), step("c", step("a"))]
    assert states(ends, store) == {"a": "missing", "b": "missing", "c": "missing"}
    assert calls(store) == []
    go([a], store)
    assert states(ends, store) == {"a": "there", "b": "missing", "c": "missing"}
    go(ends, store)
    assert len(calls(store)) == 3
    assert set(states(ends, store).values()) == {"there"}


def test_a_plan_sees_what_is_being_made(store: Store) -> None:
    slow = step("slow", seconds=1.5)
    other = process([slow], store)
    while not calls(store):
        time.sleep(0.02)
    assert states([step("end", slow)], store) == {"slow": "being made", "end": "missing"}
    other.join()


def test_a_plan_fetches_nothing(store: Store, tmp_path: Path) -> None:
    def never(watch: Any) -> Path:
        raise AssertionError("was fetched")

    away = Source(name="hub", described=["hub"], finder=lambda: None, getter=never)
    assert states([step("b", step("a", away))], store) == {"a": "missing", "b": "missing"}


def test_what_is_missing_costs_what_the_like_of_it_cost(store: Store, tmp_path: Path) -> None:
    """The median of those with the most inputs in common."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, seconds in ((one, 0.2), (two, 0.8)):
        folder.mkdir()
        (folder / "value.txt").write_text(folder.name)
        source = Source(
            name=folder.name,
            described=[folder.name],
            finder=lambda folder=folder: folder,
            getter=lambda watch, folder=folder: folder,
        )
        go([step(f"old {folder.name}", source, seconds=seconds)], store)
        [planned] = plan([step(f"new {folder.name}", source)], store)
        assert planned.seconds == pytest.approx(seconds, abs=0.15)
    unknown = Stage("other", "1", "test_graph:work", config=Config, result=Result)
    [planned] = plan([Step(stage=unknown, name="o", config=Config(), inputs={})], store)
    assert planned.seconds is None
