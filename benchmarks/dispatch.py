"""GPU-seconds that a sweep asks of a cluster, and what it uses of them, dispatched in three ways.

python benchmarks/dispatch.py [--steps 20]

24 jobs of the embedded pair (2 sources × 2 targets × 3 thresholds × 2 methods) on a Slurm of two
virtual nodes with two fake GPUs each, started on loopback (slurmctld, slurmd, munge):

- jobs that wait: in its graph's order, each job waits for whatever another one makes
- jobs: each goes on with what is ready (what paw does)
- steps: a job per distinct step (dispatch=steps)

Asked is the sum of what every job had, GPUs × seconds, by Slurm; used is what stages took that run
on a device, by the store's journal. Starting Python and loading torch is asked, and not used.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from minislurm import MiniSlurm
from paw.store import journal
from paw.text import markdown_table

ASK = [
    *("-m", "hardware=slurm_cpu", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"),
    *("hydra.launcher.gpus_per_node=1", "hydra.launcher.signal_delay_s=5", "experiment=demo"),
    *("model@source=tiny_llama,tiny_qwen2", "model@target=tiny_llama,tiny_qwen2"),
    *("transfer=procrustes,ridge", "transfer.similarity_threshold=1e-4,2e-4,0.3"),
    *("transfer.controls=[]", "evaluate.limit=20"),
]
BARE = ("encode", "gate", "spoil")  # stages that use no device
# What jobs did before they went on with what is ready: every process reads this at its start.
WAITING = """
import time
from importlib import import_module
e = import_module("paw.graph.execute")  # the package gives its function this name
settle = e._settle
def waits(execution, step, *more):
    while not settle(execution, step, *more):
        if not execution.ready(step):
            return False
        time.sleep(e.POLL)
    return True
e._settle = waits
"""


def gpu_seconds(env: dict[str, str]) -> float:
    """GPUs × seconds of all jobs that the cluster has had."""
    show = ["scontrol", "show", "job", "--oneliner"]
    text = subprocess.run(show, env=env, capture_output=True, text=True, check=True).stdout
    total = 0.0
    for line in text.splitlines():
        gpus = re.search(r"TresPerNode=gres:gpu:(\d+)", line)
        used = re.search(r"RunTime=(?:(\d+)-)?(\d+):(\d+):(\d+)", line)
        if gpus and used:
            days, hours, minutes, seconds = (int(x or 0) for x in used.groups())
            total += int(gpus[1]) * (((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    return total


def one(way: str, steps: int) -> list[str]:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "waiting").mkdir()
        (folder / "waiting" / "sitecustomize.py").write_text(WAITING)
        with MiniSlurm(folder / "slurm", nodes=2, gpus=2) as cluster:
            env = {**cluster.env(), "OMP_NUM_THREADS": "1"}
            if way == "jobs that wait":
                env["PYTHONPATH"] = str(folder / "waiting")
            more = ["dispatch=steps"] if way == "steps" else []
            command = [sys.executable, "-m", "paw.run", *ASK, f"train.max_steps={steps}", *more]
            began = time.monotonic()
            subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
            took, asked = time.monotonic() - began, gpu_seconds(env)
        notes = [n for n in journal.read(folder / "outputs" / "artifacts") if n["what"] == "made"]
        used = sum(n["seconds"] for n in notes if n["stage"] not in BARE)
    share = f"{used / asked:.0%}"
    return [way, str(len(notes)), f"{took:.0f}", f"{asked:.0f}", f"{used:.0f}", share]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    steps = parser.parse_args().steps
    head = ["dispatched as", "stages made", "seconds", "GPU-seconds asked", "used", "share"]
    print(f"{os.cpu_count()} cores", flush=True)
    rows = []
    for way in ("jobs that wait", "jobs", "steps"):
        rows.append(one(way, steps))
        print(*rows[-1], flush=True)
    print(markdown_table([head, *rows]))


if __name__ == "__main__":
    main()
