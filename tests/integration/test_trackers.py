"""What trackers hold of a run: its curve, its configuration, its figures and its summary, and no
key."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from browser import answered, document
from conftest import PRECISION
from minislurm import free_ports

pytestmark = pytest.mark.slow
KEYS = {
    "SWANLAB_API_KEY": "a-key-for-swanlab",
    "WANDB_API_KEY": "b" * 40,
    "HF_TOKEN": "hf_a-token-for-the-hub",
}
# W&B's own process has 30 s to start, which a machine busy with other tests may need
PATIENCE = {"WANDB_X_SERVICE_WAIT": "300"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a training ran that four trackers were told of, with keys in its environment."""
    folder = tmp_path_factory.mktemp("tracked")
    command = [
        sys.executable, "-m", "paw.run", PRECISION, "task=train", "experiment=demo",
        "train.max_steps=5", "evaluate.limit=10",
        "tracker=[swanlab,wandb,tensorboard,csv]", "tracker.swanlab.mode=local",
        "tracker.swanlab.experiment=five steps", "tracker.wandb.mode=offline",
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder / "home"), **KEYS, **PATIENCE}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on without it" not in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    [folder] = (place / "outputs" / "runs").iterdir()
    return folder


def test_every_tracker_holds_the_run(run: Path, place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with (run / "metrics.csv").open(encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    loss = {int(x["step"]): float(x["value"]) for x in lines if x["name"].endswith("/loss")}
    [name] = {x["name"] for x in lines if x["name"].startswith("train") and "/loss" in x["name"]}
    curve = [(int(x["step"]), float(x["value"])) for x in lines if x["name"] == name]
    [trained] = (place / "outputs" / "artifacts" / "train").iterdir()
    kept = [json.loads(line) for line in (trained / "curve.jsonl").read_text().splitlines()]
    assert curve == [(x["step"], x["loss"]) for x in kept]
    assert loss

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars(name)]
    assert [step for step, _ in found] == [step for step, _ in curve]
    assert np.allclose([x for _, x in found], [x for _, x in curve], rtol=1e-6)
    tensors = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in ("config/text_summary", "summary/text_summary")
    }
    assert "max_steps: 5" in tensors["config/text_summary"]
    assert tensors["summary/text_summary"] == (run / "summary.md").read_text()
    figures = dict(re.findall(r"!\[(.*?)\]\((.*?)\)", (run / "summary.md").read_text()))
    assert {"Training", "Where the time went"} <= figures.keys()
    shown = events.Images("Training")[0]
    drawn = imread(run / figures["Training"])
    assert (shown.height, shown.width) == drawn.shape[:2]

    [swan] = (run / "swanlog").glob("run-*")
    assert len({file.read_bytes() for file in swan.rglob("*.png")}) == len(figures)
    [offline] = (run / "wandb").rglob("*.wandb")
    assert offline.stat().st_size > 0
    assert len(list((run / "wandb").rglob("media/images/*.png"))) == len(figures)

    for file in (p for p in place.rglob("*") if p.is_file()):
        held = file.read_bytes()
        assert not [k for k, key in KEYS.items() if key.encode() in held], file


def test_swanlabs_dashboard_shows_it(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("swanboard")
    [port] = free_ports(1)
    command = [sys.executable, "-m", "swanlab", "watch", str(run / "swanlog"), "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asked = json.loads(answered(f"http://127.0.0.1:{port}/api/v1/project", server))
        [experiment] = asked["data"]["experiments"]
        assert experiment["name"] == "five steps"
        charts = f"http://127.0.0.1:{port}/experiment/{experiment['id']}/chart"
        text, _ = document(charts, tmp_path / "profile", wait=15)
        assert "five steps" in text
        assert re.search(r"train [^<]*/loss", text)
        assert "canvas" in text or "<svg" in text
    finally:
        server.terminate()
        server.wait()
