"""Progress never floods a log; trackers never ask, never stop a run."""

from __future__ import annotations

import csv
import io
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from paw import console as consoles
from paw.cli.compose import compose_config
from paw.config.trackers import (
    CsvConfig,
    SwanLabConfig,
    TensorBoardConfig,
    TrackerConfig,
    WandbConfig,
)
from paw.console import Console
from paw.errors import ConfigError
from paw.graph import Step
from paw.tracking import Left, open_trackers


def test_a_log_gets_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(consoles.time, "monotonic", lambda: now[0])
    console = Console()
    console.live = False
    console.keep(tmp_path / "run.log")
    console.start("train")
    for step in range(10_000):
        now[0] += 0.01  # a hundred seconds in all
        console.progress(step + 1, 10_000, "loss 1.0")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert len(lines) == 3
    assert "train: 3000 of 10000, 30 %, about 70 s left (loss 1.0)" in lines[0]


def test_a_failure_is_in_the_log_with_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console()
    console.keep(tmp_path / "run.log")
    try:
        raise ValueError("broken")
    except ValueError as e:
        console.note_failure(e)
    assert "Traceback" in (tmp_path / "run.log").read_text()
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [
        ("quiet", {"warning", "failed", "result"}),
        ("normal", {"warning", "failed", "result", "step"}),
        ("verbose", {"warning", "failed", "result", "step", "Traceback", "deprecated"}),
    ],
)
def test_a_quiet_one_says_less_and_a_verbose_one_more(
    verbosity: str, shown: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(verbosity)
    console.keep(tmp_path / "run.log")
    step = SimpleNamespace(name="train")
    console.say("a step")
    console.warn("a warning")
    logging.getLogger("paw").info("a result")
    logging.getLogger("py.warnings").warning("deprecated")  # as logging.captureWarnings does
    try:
        raise ValueError("broken")
    except ValueError as e:
        console.failed(cast("Step[Any]", step), e)
    everything = {"warning", "failed", "result", "step", "Traceback", "deprecated"}
    text, kept = capsys.readouterr().out, (tmp_path / "run.log").read_text()
    assert {word for word in everything if word in text} == shown
    assert all(word in kept for word in everything)
    assert pickle.loads(pickle.dumps(console)).verbosity == verbosity


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_states_have_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(stream: io.StringIO) -> str:
        Console(stream=stream).warn("computed elsewhere")
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert said(Terminal()) == "      \033[33mWarning\033[0m: computed elsewhere\n"
    assert said(io.StringIO()) == "      Warning: computed elsewhere\n"
    monkeypatch.setenv("NO_COLOR", "")
    assert said(Terminal()) == "      Warning: computed elsewhere\n"


def test_swanlab_is_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = open_trackers(TrackerConfig(swanlab=SwanLabConfig()), tmp_path / "run", {"a": 1})
    assert tracker is not None
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    assert any(p.is_file() for p in (tmp_path / "run" / "swanlog").rglob("*"))


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_trackers(TrackerConfig(tensorboard=TensorBoardConfig()), tmp_path, {})
    assert tracker is not None
    tracker.log({"train/loss": 0.5}, 3)
    tracker.finish()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    (event,) = found.Scalars("train/loss")
    assert (event.step, event.value) == (3, 0.5)


def test_a_tracker_that_fails_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("paw").propagate = True
    (tmp_path / "file").write_text("")
    tracker = open_trackers(
        TrackerConfig(tensorboard=TensorBoardConfig(dir=str(tmp_path / "file" / "below"))),
        tmp_path,
        {},
    )
    assert tracker is None
    assert "goes on without it" in caplog.text
    with pytest.raises(ConfigError):
        SwanLabConfig(mode="cloudy")


def test_wandb_is_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tracker = open_trackers(TrackerConfig(wandb=WandbConfig()), tmp_path / "run", {"a": 1})
    assert tracker is not None
    tracker.log({"train/loss": 1.0}, 5)
    tracker.log({"train/loss": 2.0}, 1)  # a second training begins anew
    tracker.finish()
    (file,) = (tmp_path / "run" / "wandb").rglob("*.wandb")
    assert file.stat().st_size > 0


def test_several_trackers_get_the_same_and_what_the_machine_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("SWANLAB_PROJ_NAME", "SWANLAB_PROJECT", "SWANLAB_WORKSPACE")
    monkeypatch.setenv("SWANLAB_PROJECT", "second choice")
    assert compose_config(["tracker=swanlab"]).tracker.swanlab == SwanLabConfig(
        project="second choice"
    )
    for name in names:
        monkeypatch.setenv(name, name.lower())
    c = compose_config(["tracker=[swanlab,tensorboard]", "tracker.swanlab.experiment=mine"]).tracker
    assert c.swanlab == SwanLabConfig(
        project="swanlab_proj_name", workspace="swanlab_workspace", experiment="mine"
    )
    console = Console()
    console.tracker = open_trackers(c, tmp_path / "run", {})
    console.start("train")
    console.metrics({"loss": 0.5}, 3)
    assert console.tracker is not None
    console.tracker.finish()
    assert any(p.is_file() for p in (tmp_path / "run" / "swanlog").rglob("*"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 0.5
    assert events.Scalars("system/ram_mib")[0].value > 50


def test_a_csv_goes_on_where_its_run_comes_back(tmp_path: Path) -> None:
    for step in (1, 2):
        tracker = open_trackers(TrackerConfig(csv=CsvConfig()), tmp_path, {})
        assert tracker is not None
        tracker.log({"train/loss": 0.5 / step}, step)
        tracker.finish()
    with (tmp_path / "metrics.csv").open() as f:
        lines = list(csv.DictReader(f))
    assert [(x["name"], x["step"], x["value"]) for x in lines] == [
        ("train/loss", "1", "0.5"), ("train/loss", "2", "0.25")
    ]  # fmt: skip


def test_what_was_told_before_a_failure_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Console()
    tracker = open_trackers(TrackerConfig(tensorboard=TensorBoardConfig()), tmp_path, {})
    assert tracker is not None
    tracker.log({"train/loss": 0.5}, 3)
    tracker.keep(Left("said", {"a figure": tmp_path / "absent.png"}, None))
    tracker.log({"train/loss": 0.1}, 4)
    tracker.finish()
    assert capsys.readouterr().out.count("tensorboard failed") == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [3]
