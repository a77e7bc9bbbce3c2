"""Sweeps on a real Slurm, started on loopback: two virtual nodes with two fake GPUs each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conftest import QUICK, Launch, Paw
from minislurm import MiniSlurm, missing
from paw.store import journal
from paw.sweeps.folder import Sweep, read

pytestmark = pytest.mark.slow
CLUSTER = [
    "hardware=slurm_cpu",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
    "hydra.launcher.timeout_min=60",
    "hydra.launcher.signal_delay_s=5",
]
SMALL = [*QUICK, "train.max_steps=5", "evaluate.limit=10"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    if gone := missing():
        if os.environ.get("CI"):  # there a skip would hide that nothing was tried
            pytest.fail(f"Slurm's programs are missing: {gone}")
        pytest.skip(f"needs {', '.join(gone)}: apt-get install slurmctld slurmd slurm-client munge")
    with MiniSlurm(tmp_path_factory.mktemp("slurm"), nodes=2, gpus=2) as cluster:
        yield cluster


@pytest.fixture
def env(slurm: MiniSlurm) -> dict[str, str]:
    return {**slurm.env(), "OMP_NUM_THREADS": "1"}


def start(folder: Path, env: dict[str, str], *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "paw.run", *CLUSTER, *args],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def sweep_in(folder: Path) -> Sweep:
    [found] = (folder / "outputs" / "sweeps").iterdir()
    return read(found)


def made(folder: Path) -> Counter[str]:
    """How often each artifact was made, by stage and key."""
    notes = journal.read(folder / "outputs" / "artifacts")
    return Counter(f"{n['stage']}/{n['key']}" for n in notes if n["what"] == "made")


def of(stage: str, counts: Counter[str]) -> int:
    return sum(key.startswith(f"{stage}/") for key in counts)


def queue(env: dict[str, str], form: str) -> list[list[str]]:
    """What Slurm says of all jobs there were, a list each."""
    command = ["squeue", "--noheader", "--states=all", "--array", f"--format={form}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def until(condition: object, seconds: float = 120) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_sweep_of_8_jobs_makes_each_shared_stage_once(
    paw: Paw, tmp_path: Path, env: dict[str, str]
) -> None:
    """2 sources × 2 thresholds × 2 methods, in arrays, a fake GPU each. Both thresholds let the
    same modules through, so what follows is shared, too."""
    asked = [
        *SMALL,
        "model@source=tiny_llama,tiny_qwen2",
        "transfer=procrustes,ridge",
        "transfer.similarity_threshold=1e-4,2e-4",
    ]
    done = paw(*CLUSTER, "hydra.launcher.gpus_per_node=1", *asked, env=env)
    sweep, counts = sweep_in(tmp_path), made(tmp_path)
    assert [job.state and job.state.state for job in sweep.jobs] == ["done"] * 8
    assert set(counts.values()) == {1}, "nothing was made twice"
    assert of("train", counts) == 2  # a source's adapter is the target's own, too
    assert of("transfer", counts) == 2 * 2
    assert of("gate", counts) == 2 * 2 * 2
    moved = {  # evaluated: by pair, method, and which modules passed
        (c["source"]["name"], c["target"]["name"], c["transfer"]["method"], passed(job.folder))
        for job in sweep.jobs
        for c in [job.config]
    }
    assert of("evaluate", counts) == 2 + 2 + len(moved), "both bases, each with its own adapter"
    assert len(moved) == 4
    states = [job.state for job in sweep.jobs if job.state]
    assert {s.host for s in states} == {"n1", "n2"}
    assert all(s.devices in ("0", "1") for s in states)
    assert len({(job.id or "").partition("_")[0] for job in sweep.jobs}) == 2, "an array per pair"
    names = {name for identity, name in queue(env, "%i %j") if "_" in identity}
    assert "paw_tiny_llama-tiny_qwen2" in names
    assert all(os.path.relpath(str(job.log), tmp_path) in done.stdout for job in sweep.jobs)
    page = (sweep.folder / "summary.md").read_text()
    assert "8 done" in page
    assert {"sweep.json", "sweep.csv"} <= {f.name for f in sweep.folder.iterdir()}
    assert list(sweep.folder.glob("*.png"))
    again = paw(*CLUSTER, *asked, "plan=true", env=env).stdout
    assert "8 jobs" in again
    assert all(line.rstrip(" |").endswith("–") for line in again.splitlines() if "train" in line)


def passed(run: Path) -> tuple[str, ...]:
    """The modules that a run's gate let through."""
    [report] = [f for f in run.glob("adapters/target_*/report.json") if "own" not in f.parent.name]
    rows = json.loads(report.read_text())["modules"]
    return tuple(row["target"] for row in rows if row["transferred"])


def test_a_job_that_fails_is_failed_and_leaves_the_others(
    paw: Paw, tmp_path: Path, env: dict[str, str]
) -> None:
    asked = [*SMALL, "transfer.similarity_threshold=1e-4,0.999"]
    done = paw(*CLUSTER, *asked, env=env, ok=False)
    assert done.returncode == 2
    assert "1 of 2 jobs failed" in done.stderr
    assert "lets no module through" in done.stderr
    assert "Traceback" not in done.stderr
    good, bad = sweep_in(tmp_path).jobs
    assert good.state
    assert good.state.state == "done"
    assert bad.state
    assert bad.state.state == "failed"

    def ended() -> bool:
        """A job has written its last word a moment before Slurm calls it ended."""
        states = dict(row for row in queue(env, "%i %T") if len(row) == 2)
        return (states[str(good.id)], states[str(bad.id)]) == ("COMPLETED", "FAILED")

    until(ended, 60)
    log = Path(str(bad.log)).with_name(Path(str(bad.log)).name.replace("_log.out", "_log.err"))
    assert "Traceback" in log.read_text()
    assert "lets no module through" in (sweep_in(tmp_path).folder / "summary.md").read_text()
    before = made(tmp_path)
    paw(*CLUSTER, *asked, env=env, ok=False)  # the same again makes only what is missing: nothing
    assert made(tmp_path) == before


def test_what_a_killed_job_made_is_taken_over(tmp_path: Path, env: dict[str, str]) -> None:
    """Both jobs need both trainings; one is killed in the middle of one."""
    asked = [*SMALL, "train.max_steps=150", "train.save_every=5", "transfer=procrustes,ridge"]
    both = start(tmp_path, env, *asked)
    store = tmp_path / "outputs" / "artifacts"
    until(lambda: list(store.glob("train/*.unfinished/last.ckpt")))
    begun = next(store.glob("train/*.unfinished/last.ckpt")).parent  # the other job may train, too
    holder = json.loads(begun.with_suffix(".claim").read_text())["pid"]
    os.kill(holder, signal.SIGKILL)
    text, _ = both.communicate(timeout=400)
    assert both.returncode == 2, text
    assert "1 of 2 jobs failed" in text
    assert "killed" in text
    killed, other = sorted(
        sweep_in(tmp_path).jobs, key=lambda job: bool(job.state and job.state.state == "done")
    )
    assert killed.state
    assert killed.state.state == "failed"
    assert killed.state.pid == holder
    assert "goes on after step" in Path(str(other.log)).read_text()
    assert set(made(tmp_path).values()) == {1}
    assert not list(store.glob("*/*.tmp-*"))


def test_a_preempted_training_is_requeued_and_ends_as_an_unbroken_one(
    paw: Paw, tmp_path: Path, env: dict[str, str]
) -> None:
    """It keeps the very step at which the signal found it: checkpoints are further apart."""
    asked = ["task=train", *SMALL, "train.max_steps=200", "train.save_every=1000"]
    asked += ["hydra.launcher.partition=main"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for folder in (broken, whole):
        folder.mkdir()
    one = start(broken, env, *asked)
    store = broken / "outputs" / "artifacts"
    until(lambda: list(store.glob("train/*.unfinished/begun.json")))
    time.sleep(6)  # into its steps
    urgent = ["srun", "-Q", "-p", "urgent", "-N2", "--exclusive", "-t1", "true"]
    subprocess.run(urgent, env=env, check=True, timeout=120)
    assert list(store.glob("train/*.unfinished/last.ckpt"))
    text, _ = one.communicate(timeout=400)
    assert one.returncode == 0, text
    [job] = sweep_in(broken).jobs
    log = Path(str(job.log)).read_text()
    assert "this job is preempted" in log
    [step] = [int(x.split("step ")[1].split(",")[0]) for x in log.splitlines() if "goes on" in x]
    assert 0 < step < 200
    assert [n["what"] for n in journal.read(store) if n["stage"] == "train"] == [
        "began",
        "preempted",
        "began",
        "made",
    ]
    paw(*CLUSTER, *asked, cwd=whole, env=env)
    files = [
        next((folder / "outputs" / "artifacts" / "train").glob(f"*/{name}")).read_bytes()
        for name in ("adapter_model.safetensors", "curve.jsonl")
        for folder in (broken, whole)
    ]
    assert files[0] == files[1]
    assert files[2] == files[3]


NODES = ["hardware.nodes=2", "hydra.launcher.nodes=2", "hardware.strategy=fsdp"]


def test_a_training_over_two_nodes_is_that_of_two_processes(
    paw: Paw, tmp_path: Path, env: dict[str, str]
) -> None:
    asked = ["task=train", *SMALL, "train.max_steps=6"]
    cluster, here = tmp_path / "cluster", tmp_path / "here"
    for folder in (cluster, here):
        folder.mkdir()
    # virtual nodes have one host name, which says nothing of loopback
    paw(*CLUSTER, *NODES, *asked, cwd=cluster, env={**env, "MASTER_ADDR": "127.0.0.1"})
    alone = ["hardware=cpu", "hardware.devices=2", "hardware.strategy=fsdp", "hardware.threads=1"]
    paw(*alone, *asked, cwd=here)
    for name in ("adapter_model.safetensors", "curve.jsonl"):
        one, two = (
            next((folder / "outputs" / "artifacts" / "train").glob(f"*/{name}")).read_bytes()
            for folder in (cluster, here)
        )
        assert one == two
    [job] = sweep_in(cluster).jobs
    logs = sorted(Path(str(job.log)).parent.glob("*_log.out"))
    assert len(logs) == 2
    assert "paw " not in logs[1].read_text(), "the second node only follows"


def test_a_node_that_is_lost_ends_the_training(tmp_path: Path, env: dict[str, str]) -> None:
    """With a line, and at once: the other node's processes would wait for it."""
    env = {**env, "MASTER_ADDR": "127.0.0.1"}
    one = start(tmp_path, env, *NODES, "task=train", *SMALL, "train.max_steps=5000")
    store = tmp_path / "outputs" / "artifacts"
    until(lambda: list(store.glob("train/*.unfinished/begun.json")))
    [job] = sweep_in(tmp_path).jobs

    def second() -> list[psutil.Process]:
        """The training's processes on the second node."""
        mine = {"SLURM_PROCID": "1", "SLURM_JOB_ID": str(job.id)}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if mine.items() <= process.environ().items():
                    found += [c for c in process.children() if "spawn_main" in str(c.cmdline())]
        return found

    until(second)
    time.sleep(8)  # into its steps
    for process in second():
        process.kill()
    text, _ = one.communicate(timeout=120)
    assert one.returncode == 2, text
    assert "a process was ended from outside" in text
    assert not list(store.glob("train/*.claim"))


def test_what_the_cluster_refuses_is_one_line(paw: Paw, env: dict[str, str]) -> None:
    done = paw(*CLUSTER, *SMALL, "hydra.launcher.gpus_per_node=9", env=env, ok=False)
    assert done.returncode == 2
    assert "the cluster refuses the job: sbatch: error:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any("made" in line for line in done.stdout.splitlines())


def test_a_job_per_step_asks_for_what_its_step_needs(
    paw: Paw, launch: Launch, tmp_path: Path, env: dict[str, str]
) -> None:
    """What runs on no device gets no (fake) GPU."""
    launch("task=train", *SMALL, "paths.outputs=made")
    [bare] = (tmp_path / "made" / "runs").glob("*/adapters/source")
    asked = ["task=transfer", *SMALL, f"adapter.path={bare}", "hydra.launcher.gpus_per_node=1"]
    asked += ["transfer.similarity_threshold=1e-4,2e-4"]
    done = paw(*CLUSTER, *asked, "dispatch=steps", env=env)
    counts, sweep = made(tmp_path), sweep_in(tmp_path)
    assert set(counts.values()) == {1}
    assert {stage: of(stage, counts) for stage in ("match", "calibrate", "transfer", "gate")} == {
        "match": 1, "calibrate": 1, "transfer": 1, "gate": 2,
    }  # fmt: skip
    assert all(job.state and job.state.state == "done" for job in sweep.jobs)
    submitted = re.findall(r"^  job (\d+): ", done.stdout, re.MULTILINE)
    assert len(submitted) == sum(counts.values()) == 5
    mine = {*submitted, *(str(job.id) for job in sweep.jobs)}
    assert len(mine) == 7
    finished = dict(row for row in queue(env, "%i %T") if len(row) == 2)
    assert {finished[identity] for identity in mine} == {"COMPLETED"}
    given = {row[1]: row[2] for row in queue(env, "%i %j %b") if row[0] in mine}
    for name, gpus in given.items():
        bare_job = name.startswith(("paw_gate", "paw_0_", "paw_1_"))
        assert gpus == ("N/A" if bare_job else "gres:gpu:1"), name
    again = paw(*CLUSTER, *asked, "dispatch=steps", env=env)
    assert "\n  job " not in again.stdout, "nothing is missing: only reports are submitted"
    assert made(tmp_path) == counts
