"""make gpu: does everything of paw run on this machine's NVIDIA GPUs, how exactly and how fast?

    python scripts/gpu.py [--write [FILE]]

Runs the steps below in turn, each with a limit of its own and all of them within BUDGET; what each
prints is kept in outputs/gpu, the results in docs/gpu.md. A step that fails does not stop the
others; the exit code is 1 then. Without a GPU the steps are only named, and nothing is written
unless --write asks for it. In commands DATA is the folder in PAW_DATA_DIR; where that is not set it
is a folder that does not exist, so that rows come from the hub.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import torch

from paw.cli.compose import compose_config, groups
from paw.config.common import HardwareConfig
from paw.text import markdown_table

Figures = Callable[[Path, str], str]
Needs = Callable[[], str]
ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "gpu.md"
WORK = "outputs/gpu"  # in ROOT, where all commands run
DATA = os.environ.get("PAW_DATA_DIR") or f"{WORK}/no_data"
BUDGET = 2400  # seconds for all steps
ACCURACY, GAP = 0.05, 0.15  # how far a demo may be from the CPU's in float32
LEARNT = 0.2  # of accuracy, that a training must add to its base
APART = 1e-3  # of the loss, that a base on several GPUs may be from what it is on one
ABSENT = "no NVIDIA GPU"
PACKAGES = ["torch", "transformers", "peft", "pytorch-lightning", "bitsandbytes", "trl"]
PACKAGES += ["lm_eval", "deepspeed", "liger_kernel"]
HARNESS, TRL = "lm-evaluation-harness", "TRL and the Trainer"
SIZE = "Transfer at the size of 8B models"
SPREAD = "A base on several GPUs"
NOTES = {  # what stands above a section's table
    "Demo": "The embedded pair by every profile in `conf/hardware`, beside the CPU's in float32: "
    f"at most {ACCURACY} of accuracy and {GAP} of the gap may lie between them.",
    "Training": f"The embedded model; a training must add {LEARNT} of accuracy.",
    SPREAD: "The embedded model, evaluated in float32 with a copy on each GPU and with its layers "
    f"on all of them: at most {APART} of the loss may lie between the two.",
    HARNESS: "SmolLM2-135M, ARC-Easy. `DATA` is the folder in `PAW_DATA_DIR`; where that is not "
    f"set it is one that does not exist ({WORK}/no_data), and rows are the hub's.",
    TRL: "SmolLM2-135M, LoRA on all linear layers, GSM8K.",
    SIZE: "Random weights of the shapes of Llama-3-8B and Qwen2.5-7B; a second run keeps bases.",
}


class Wrong(Exception):
    """A step ran, but its figures are not what they should be."""


@dataclass(frozen=True)
class Step:
    section: str
    name: str
    command: str  # as one types it in ROOT
    limit: int  # seconds
    figures: Figures  # from its folder, and from what it printed
    needs: Needs = str  # why it cannot be run; nothing where it can

    @property
    def folder(self) -> Path:
        return ROOT / folder(self.section, self.name)


@dataclass
class Row:
    step: Step
    result: str  # ok, or failed or skipped and why
    seconds: float = 0
    figures: str = "not measured"
    tail: str = ""  # the last lines of what failed


# ---- the steps --------------------------------------------------------------------------------


def steps(gpus: int) -> list[Step]:
    """Everything for a machine with so many GPUs."""
    on = "--device cuda --dtype bfloat16"
    arc_easy = f"--data DATA --model smollm2_135m --tasks arc_easy {on}"
    parity = f"python benchmarks/harness.py parity {arc_easy} --rows 100"
    speed = f"python benchmarks/harness.py speed {arc_easy} --rows 200 --rounds 2 --batches 32 128"
    train = f"python benchmarks/training.py DATA --steps 20 --rounds 2 {on}"
    scale = f"python benchmarks/scale.py {{}} {WORK}/scale 4 --device cuda"
    exact = ("harness to float64 there", "paw to float64 there")
    same = columns("largest difference", *exact, "same prediction")
    faster = columns("harness s (its best batch)", "paw s", "ratio, median of 2")
    tokens = columns("tokens a second", "paw is faster by", "peak GPU MiB")
    costs = columns("seconds", "peak resident GiB", "peak GPU GiB")
    asked = partial(rows, "lm_eval", "arc_easy", "test")
    taught = partial(rows, "trl", "gsm8k", "train")
    return [
        Step("Tests", "all", "python -m pytest -n 4 --dist loadfile", 1200, last_line),
        *demos(gpus),
        *trainings(gpus),
        *spreads(gpus),
        Step(HARNESS, "parity", parity, 180, same, asked),
        Step(HARNESS, "speed", speed, 240, faster, asked),
        Step(TRL, "training", train, 300, tokens, taught),
        Step(SIZE, "four layers of each", scale.format("write"), 120, lambda *_: "3.6 GB", room),
        Step(SIZE, "transfer twice", scale.format("transfer"), 120, costs, room),
    ]


def demos(gpus: int) -> Iterator[Step]:
    """The demo by every hardware profile in 16 bits, on as many of its devices as there are."""
    yield paw("Demo", "cpu, float32", "hardware=cpu hardware.precision=float32", demo)
    for name in groups()["hardware"]:
        wanted = profile(name).devices
        devices = max(1, min(wanted, gpus))
        more = f" hardware.devices={devices}" if devices < wanted else ""
        if devices > 1:  # a batch is a device's, and all tables are of 32 examples a step
            more += f" train.batch_size={max(1, 32 // devices)}"
        for bits in ("bfloat16", "float16"):
            ask = f"hardware={name} hardware.precision={bits}{more}"
            yield paw("Demo", f"{name}, {bits}", ask, demo)


@cache
def profile(name: str) -> HardwareConfig:
    return compose_config([f"hardware={name}"]).hardware


def trainings(gpus: int) -> Iterator[Step]:
    """Strategies on all GPUs (sharding goes its own way on one, too), and what needs a GPU."""
    every = f"hardware.devices={max(1, gpus)} train.batch_size={max(1, 32 // max(1, gpus))}"
    alone = "one GPU: there are no processes to divide a step among" if gpus < 2 else ""
    eight = partial(package, "bitsandbytes")
    chosen: list[tuple[str, str, Needs]] = [
        ("ddp", f"hardware.strategy=ddp {every}", lambda: alone),
        ("fsdp", f"hardware.strategy=fsdp {every}", str),
        ("deepspeed", f"hardware.strategy=deepspeed {every}", partial(package, "deepspeed")),
        ("qlora", "adapter=qlora adapter.lr=3e-3", eight),
        ("lora_8bit", "adapter=lora_8bit adapter.lr=3e-3", eight),
        ("liger", "train.liger=true", partial(package, "liger_kernel")),
        ("compile", "train.compile=true", str),
        ("8-bit AdamW", "train.optimizer=adamw_8bit", eight),
        ("paged 8-bit AdamW", "train.optimizer=paged_adamw_8bit", eight),
    ]
    for name, ask, needs in chosen:
        yield paw("Training", name, f"experiment=demo task=train {ask}", trained, needs)


def spreads(gpus: int) -> Iterator[Step]:
    """A base on each of the GPUs, and one on all of them."""
    alone = "one GPU: there is nothing to spread a base over" if gpus < 2 else ""
    ask = f"task=evaluate models=[tiny_llama] dataset=facts hardware.devices={max(2, gpus)}"
    ask += " hardware.precision=float32 hardware.spread="
    yield paw(SPREAD, "never", f"{ask}never", scored, lambda: alone)
    yield paw(SPREAD, "always", f"{ask}always", spread, lambda: alone)


def paw(section: str, name: str, ask: str, figures: Figures, needs: Needs = str) -> Step:
    """With outputs of its own: a run that computes what another did would reuse it."""
    command = f"python -m paw.run {ask} paths.outputs={folder(section, name)}"
    return Step(section, name, command, 240, figures, needs)


def folder(section: str, name: str) -> str:
    return f"{WORK}/" + re.sub(r"\W+", "_", f"{section} {name}").lower()


# ---- what they need ---------------------------------------------------------------------------


def package(name: str) -> str:
    return "" if find_spec(name) else f"{name} is not installed"


def room() -> str:
    free = shutil.disk_usage(ROOT).free / 2**30
    return "" if free > 8 else f"{free:.0f} GiB of disk are free, 8 are needed"


@cache
def rows(peer: str, dataset: str, split: str) -> str:
    """What paw says of the model and of a split, which it fetches where it is not at hand."""
    if missing := package(peer):
        return missing
    ask = f"task=validate model@source=smollm2_135m hardware=cpu dataset={dataset}"
    ask += f" paths.data_dir={DATA} dataset.train_split={split} dataset.eval_split={split}"
    command = [sys.executable, "-m", "paw.run", *ask.split(), "dataset.val_split=null"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return f"{dataset}: not fetched within 90 s"
    return done.stderr.strip().rpartition("the first is ")[2] if done.returncode else ""


# ---- what they found --------------------------------------------------------------------------


def last_line(folder: Path, said: str) -> str:
    return said.strip().splitlines()[-1].strip("= ")


def columns(*names: str) -> Figures:
    """Of the table that is printed, a row after the other."""

    def read(folder: Path, said: str) -> str:
        lines = [x.strip("|").split("|") for x in said.splitlines() if re.match(r"\|(?!--)", x)]
        head, *found = ([cell.strip() for cell in line] for line in lines)
        cells = [dict(zip(head, row, strict=True)) for row in found]
        return "; ".join(f"{c[head[0]]}: " + ", ".join(f"{n} {c[n]}" for n in names) for c in cells)

    return read


def systems(folder: Path) -> dict[str, dict[str, float]]:
    (file,) = folder.glob("runs/*/results.json")
    return {s["system"]: s for s in json.loads(file.read_text())["systems"]}


def demo(out: Path, said: str) -> str:
    """
    Raises:
        Wrong: where it is further from the CPU's than it may be.
    """
    found = []
    for table in (systems(out), systems(ROOT / folder("Demo", "cpu, float32"))):
        gap = table["target + procrustes"]["gap_recovered"]
        found.append((table["source + own adapter"]["accuracy"], -9 if gap is None else gap))
    (own, gap), (own_cpu, gap_cpu) = found
    text = f"source + own adapter {own:.3f}, gap recovered {gap:+.2f}"
    if abs(own - own_cpu) > ACCURACY or abs(gap - gap_cpu) > GAP:
        raise Wrong(f"{text}, but {own_cpu:.3f} and {gap_cpu:+.2f} on the CPU")
    return text


def trained(out: Path, said: str) -> str:
    """
    Raises:
        Wrong: where nothing was learnt.
    """
    table = systems(out)
    base, own = (table[name]["accuracy"] for name in ("source base", "source + own adapter"))
    (stage,) = out.glob("artifacts/train/*/stage.json")
    made = json.loads(stage.read_text())
    cost = f"{made['result']['tokens_per_second']:.0f} tokens a second"
    text = f"accuracy {base:.3f} to {own:.3f}, {cost}, {made['cost']['gpu_mib'] or 0:.0f} GPU MiB"
    if own < base + LEARNT:
        raise Wrong(text)
    return text


def scored(out: Path, said: str) -> str:
    found = systems(out)["tiny_llama"]
    return f"accuracy {found['accuracy']:.3f}, loss {found['loss']:.5f}"


def spread(out: Path, said: str) -> str:
    """
    Raises:
        Wrong: where it is further from the one on each GPU than it may be.
    """
    text, whole = scored(out, said), ROOT / folder(SPREAD, "never")
    losses = [systems(x)["tiny_llama"]["loss"] for x in (out, whole)]
    if abs(losses[0] - losses[1]) > APART:
        raise Wrong(f"{text}, but {scored(whole, said)} with a copy on each")
    return text


# ---- running and writing ----------------------------------------------------------------------


def run(step: Step, end: float) -> Row:
    """Runs a step in its time and what is left of all; what it started ends with it."""
    if why := "the time for all is over" if time.monotonic() >= end else step.needs():
        return Row(step, f"skipped: {why}")
    log, limit = step.folder.with_suffix(".log"), min(step.limit, end - time.monotonic())
    log.parent.mkdir(parents=True, exist_ok=True)
    words = {"python": sys.executable, "DATA": DATA}
    command = [words.get(word, word) for word in step.command.split()]
    began, wrong = time.monotonic(), ""
    with log.open("w") as out:
        # a session of its own is a group that can be ended whole
        child = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        try:
            code = child.wait(limit)
            wrong = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            wrong = f"stopped after {limit:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    row, said = Row(step, "ok", time.monotonic() - began), log.read_text(errors="replace")
    try:
        row.figures = row.figures if wrong else step.figures(step.folder, said)
    except Wrong as e:
        wrong = str(e)
    except Exception as e:  # it printed something else than expected: this step's failure alone
        wrong = f"no figures ({type(e).__name__}: {e})"
    if wrong:
        tail = said.strip().splitlines()[-12:]
        row.result, row.tail = f"failed: {wrong}", "\n".join(tail)
    return row


def machine() -> tuple[int, str, list[list[str]]]:
    """How many GPUs torch can use, why none, and what the document says of the machine."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    asked = subprocess.run(ask, capture_output=True, text=True) if shutil.which(ask[0]) else None
    driver = asked.stdout.partition("\n")[0] if asked and not asked.returncode else ""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    why = "" if gpus else ABSENT
    if not gpus and driver and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        why = f"torch {torch.__version__} cannot use the GPU: install a CUDA build of it"
    names = "; ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in gpus)
    facts = [["devices", names], ["driver", driver], ["CUDA", torch.version.cuda or ""]]
    have = {d.metadata["Name"].replace("_", "-"): d.version for d in distributions()}
    facts += [[name, have.get(name.replace("_", "-"), "")] for name in PACKAGES]
    return len(gpus), why, [[what, found or "none"] for what, found in facts]


def document(facts: list[list[str]], found: list[Row]) -> str:
    parts = [f"# On NVIDIA GPUs\n\n`make gpu` on {time.strftime('%Y-%m-%d')}:"]
    parts.append(markdown_table([["", ""], *facts]))
    for section in dict.fromkeys(row.step.section for row in found):
        mine = [row for row in found if row.step.section == section]
        table = [["what", "result", "seconds", "figures", "command"]]
        for row in mine:
            seconds = f"{row.seconds:.0f}" if row.seconds else "–"
            cells = [row.step.name, row.result, seconds, row.figures, f"`{row.step.command}`"]
            table.append([" ".join(cell.replace("|", "/").split()) for cell in cells])
        parts += [f"## {section}", *filter(None, [NOTES.get(section)]), markdown_table(table)]
        for row in mine:
            if row.tail:
                parts.append(f"{row.step.name}:\n\n    " + row.tail.replace("\n", "\n    "))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--write", nargs="?", type=Path, const=DOC)
    asked = parser.parse_args()
    gpus, why, facts = machine()
    print(markdown_table([["", ""], *facts]), flush=True)
    if not why:
        shutil.rmtree(ROOT / WORK, ignore_errors=True)  # an earlier run's stages would be reused
    end, found = time.monotonic() + BUDGET, list[Row]()
    for step in steps(gpus):
        print(f"\n{step.section}: {step.name}\n  {step.command}", flush=True)
        row = Row(step, f"skipped: {why}") if why else run(step, end)
        figures = f", {row.seconds:.0f} s: {row.figures}" if row.seconds else ""
        print("\n  | ".join([f"  {row.result}{figures}", *row.tail.splitlines()]), flush=True)
        found.append(row)
    if not why:
        shutil.rmtree(ROOT / WORK / "scale", ignore_errors=True)  # 3.6 GB
    file = asked.write or (None if why else DOC)
    if file:
        file.write_text(document(facts, found))
    failed = sum(row.result.startswith("failed") for row in found)
    said = f"{why}: nothing was run" if why else f"{failed} of {len(found)} steps failed"
    print(f"\n{said}; {f'written to {file}' if file else 'docs/gpu.md stays as it is'}.")
    return int(failed > 0 or why not in ("", ABSENT))


if __name__ == "__main__":
    sys.exit(main())
