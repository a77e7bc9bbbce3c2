"""Graphs of the embedded pair: planned, shared between processes, taken over, alike in every
process; and from Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import warm
from conftest import PRECISION, QUICK, Paw
from paw import api
from paw.errors import ConfigError

pytestmark = pytest.mark.slow
SWEEP = [
    "-m",
    "model@source=tiny_llama,tiny_qwen2",
    "model@target=tiny_qwen2",
    "dataset=facts",
    "adapter=tiny",
    "train.max_steps=3",
    "evaluate.limit=4",
    "transfer=cross_lora,ridge",
    "transfer.positions=600",
    PRECISION,
]
OVERLAP = [PRECISION, *QUICK, "train.max_steps=300"]


def steps(store: Path) -> int:
    return len(list(store.glob("*/*/stage.json")))


def test_a_plan_of_a_sweep_counts_what_the_run_then_makes(paw: Paw, tmp_path: Path) -> None:
    """2 sources × 2 methods: 4 jobs."""
    done = paw(*SWEEP, "plan=true")
    assert not (tmp_path / "outputs" / "sweeps").exists()
    [planned] = re.findall(r"(\d+) distinct steps for 4 jobs", done.stdout)
    assert "torch" not in done.stderr
    paw(*SWEEP)
    assert steps(tmp_path / "outputs" / "artifacts") == int(planned)
    again = paw(*SWEEP, "plan=true").stdout
    [counts] = re.findall(r"\| all +\| +(\d+) +\| (\d+) +\| 0 +\| 0 ", again)
    assert counts == (planned, planned)


def test_a_plan_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from paw.run import checked; print(checked(['plan=true']).plan());"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"
    assert "29 distinct steps for one job" in done.stdout


def test_two_processes_share_what_both_need(tmp_path: Path) -> None:
    """Overlapping graphs at once: each step once, and both have a part in the work that they share.
    How much sooner they end is benchmarks/overlap.py's to say: other tests run beside this one."""
    both = [
        warm.Command([*OVERLAP, f"transfer={method}"], tmp_path)
        for method in ("procrustes", "ridge")
    ]
    done = [one.wait() for one in both]
    assert [one.returncode for one in done] == [0, 0]
    texts = [one.stdout for one in done]
    made = [line for text in texts for line in text.splitlines() if "] computed" in line]
    assert len(made) == steps(tmp_path / "outputs" / "artifacts")
    assert all("] computed  train" in text for text in texts), "each trained one of the two"


def test_a_killed_runs_training_is_taken_over_by_one_that_waits(tmp_path: Path) -> None:
    """It goes on from the dead one's last checkpoint."""
    ask = [PRECISION, "task=train", "experiment=demo", "train.max_steps=600", "train.save_every=20"]
    first = warm.Command(ask, tmp_path)
    store = tmp_path / "outputs" / "artifacts" / "train"
    while not list(store.glob("*.unfinished/last.ckpt")):
        assert first.running
        time.sleep(0.05)
    second = warm.Command(ask, tmp_path)
    while f"process {first.pid} on" not in second.stdout():  # nothing else is left
        assert second.running
        time.sleep(0.05)
    assert first.running
    first.kill()
    killed = time.monotonic()
    first.wait()
    done = second.wait()
    assert done.returncode == 0
    assert "goes on after step" in done.stdout
    assert time.monotonic() - killed < 120


def test_two_runs_in_two_stores_are_alike_to_the_byte(tmp_path: Path) -> None:
    """From training to evaluation, in two processes that hash differently. Every method by itself:
    test_determinism."""
    files = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        ask = [*OVERLAP[:1], "experiment=demo", "train.max_steps=20", "evaluate.limit=4"]
        ask += ["transfer.positions=600", "transfer.draws=1", "transfer.controls=[random]"]
        subprocess.run(
            [sys.executable, "-m", "paw.run", *ask, "name=run"],
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
        [run] = (folder / "outputs" / "runs").iterdir()
        files.append(
            {
                str(f.relative_to(run)): f.read_bytes()
                for kind in ("*.safetensors", "records/*.jsonl")
                for f in run.rglob(kind)
            }
        )
    assert len([n for n in files[0] if n.startswith("adapters/target_")]) == 3
    assert files[0].keys() == files[1].keys()
    assert [n for n in files[0] if files[0][n] != files[1][n]] == []


def test_from_python_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    c = api.compose(*QUICK, PRECISION, "train.max_steps=100", "evaluate.limit=80")
    source, target = api.base(c, c.source), api.base(c, c.target)
    moved = api.transfer(c, api.train(c, source), source, target)
    before, after = api.results(c, api.evaluate(c, target), api.evaluate(c, target, moved))
    assert before.accuracy is not None
    assert before.accuracy < 0.4
    assert after.accuracy > 0.8
    assert not (tmp_path / "outputs" / "runs").exists()


def test_a_whole_task_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ask = ["task=evaluate", "models=[tiny_llama]", "dataset=facts", "evaluate.limit=10", PRECISION]
    finished = api.run(*ask)
    assert (finished.folder / "report.html").is_file()
    assert [s.name for s in finished.systems] == ["tiny_llama"]
    for more, says in (
        ("plan=true", "Leave plan out"),
        ("seed=0,1", "several values are a sweep"),
    ):
        with pytest.raises(ConfigError, match=says):
            api.run(*ask, more)
    with pytest.raises(ConfigError, match="task=artifacts has no steps"):
        api.run("task=artifacts", "prune=true")
    assert len(list((tmp_path / "outputs" / "runs").iterdir())) == 1
