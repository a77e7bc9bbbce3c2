"""paw beside TRL's SFTTrainer and the plain Trainer with PEFT: the same model, examples, LoRA and
precision, turn about.

    python benchmarks/training.py DATA.jsonl[.gz] --model smollm2_135m --steps 10 --rounds 3
    python benchmarks/training.py DATA --device cuda --dtype bfloat16

DATA has rows of {question, answer}; a folder is looked into for gsm8k/train.jsonl[.gz], else GSM8K
is fetched from the hub. Each contender trains in a process of its own, one at a time, in every
round; a step is 8 examples, in the same order for all but TRL's packing, which chooses its own.
Printed are tokens a second (real ones, without the first step, the median of the rounds), the ratio
to paw in the same round, the largest difference of a step's loss, and the peak of resident memory,
or on a GPU of what torch takes there. Without --micro TRL computes what was fastest on two cores,
two examples at a time, and on a GPU the whole step at once; there it packs a step into one row,
too. The packages trl and datasets are needed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paw.cli.compose import compose_config
from paw.console import Console
from paw.data.load import split_file
from paw.data.tokenise import encode
from paw.models.load import load_tokenizer
from paw.models.locate import locate
from paw.text import markdown_table
from paw.training.batches import order

BATCH, LR, R, ALPHA = 8, 2e-4, 16, 32


def peers(device: str, micro: int | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: which trainer, and what is set for it: what was fastest on two cores; on a GPU as
    much at once as there is."""
    micro = micro or (2 if device == "cpu" else BATCH)
    packed = (
        ("TRL, packed in rows of 512", {"row_len": 512})
        if device == "cpu"
        else ("TRL, packed, a row a step", {})
    )
    return {
        "TRL, same batches": ("trl", {"trl_mode": "same_batches", "micro_batch": micro}),
        packed[0]: ("trl", {"trl_mode": "packed", **packed[1]}),
        "Trainer + PEFT": ("hf", {}),
    }


def watched(command: list[str], cwd: Path, device: str) -> float:
    """Runs a command; the peak of its resident memory in MiB, which the kernel keeps."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GOMP")}
    # Trainers take every GPU that they see: all contenders get the same one, or none.
    env["CUDA_VISIBLE_DEVICES"] = (
        os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if device == "cuda" else ""
    )
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
    )
    peak = 0.0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, *(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM")))
        except (OSError, TypeError):
            pass
        time.sleep(0.1)
    assert process.returncode == 0, process.stderr.read() if process.stderr else ""
    return peak


def command_line(data: Path, model: str, steps: int, device: str, dtype: str) -> list[str]:
    """What paw is asked."""
    train = {
        "max_steps": steps,
        "batch_size": BATCH,
        "lr": LR,
        "schedule": "constant",
        "warmup_ratio": 0,
        "grad_clip": 0,
        "max_length": 4096,
    }
    adapter = {"r": R, "alpha": ALPHA, "dropout": 0}
    return [
        "task=train",
        f"model@source={model}",
        "dataset=own_text",
        f"dataset.path={data}",
        "dataset.eval_split=test",
        "evaluate.limit=1",
        f"hardware.device={device}",
        f"hardware.precision={dtype}",
        *(f"train.{k}={v}" for k, v in train.items()),
        *(f"adapter.{k}={v}" for k, v in adapter.items()),
    ]


def ours(ask: list[str], device: str, work: Path) -> dict[str, Any]:
    peak = watched([sys.executable, "-m", "paw.run", *ask], work, device)
    (stage,) = (work / "outputs" / "artifacts" / "train").glob("*/stage.json")
    losses = [
        json.loads(line)["loss"] for line in (stage.parent / "curve.jsonl").read_text().splitlines()
    ]
    if device == "cuda":
        peak = json.loads(stage.read_text())["cost"]["gpu_mib"]
    times = [line.split(",") for line in (stage.parent / "times.csv").read_text().splitlines()[1:]]
    return {
        "losses": losses,
        "seconds": [float(t[2]) for t in times],
        "tokens": [int(t[1]) for t in times],
        "peak": peak,
    }


def peer(which: str, spec: dict[str, Any], work: Path) -> dict[str, Any]:
    (work / "spec.json").write_text(json.dumps(spec))
    peak = watched(
        [
            sys.executable,
            str(Path(__file__).with_name("training_peers.py")),
            which,
            "spec.json",
            "out.json",
        ],
        work,
        spec["device"],
    )
    found: dict[str, Any] = json.loads((work / "out.json").read_text())
    return found | {"peak": peak if found["gpu_mib"] is None else found["gpu_mib"]}


def speed(run: dict[str, Any]) -> float:
    """Tokens a second, without the first step, which touches its memory for the first time."""
    return float(sum(run["tokens"][1:]) / sum(run["seconds"][1:]))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--micro", type=int, help="examples that TRL computes at a time on the same batches"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser


def rows_file(data: Path, watch: Console) -> Path:
    """A file as it stands, or GSM8K's training split in a folder, else from the hub."""
    if data.is_file():
        return data
    return split_file(
        compose_config(["task=train", "model@source=tiny_llama", "dataset=gsm8k"]).dataset,
        "train",
        str(data),
        watch,
    )


def main() -> None:
    asked = parser().parse_args()
    file = rows_file(asked.data, Console(sys.stderr))
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f][: BATCH * asked.steps]
    folder = locate(
        compose_config([f"model@source={asked.model}"]).source, None, Console(sys.stderr)
    )
    found = encode(
        load_tokenizer(folder),
        [(f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in rows],
        False,
        close=True,
    )
    spec = {
        "model": str(folder),
        "rows": [[list(found[i].ids), found[i].start] for i in order(len(rows), 0, 0)],
        "batch": BATCH,
        "steps": asked.steps,
        "lr": LR,
        "r": R,
        "alpha": ALPHA,
        "dropout": 0.0,
        "seed": 0,
        "device": asked.device,
        "dtype": asked.dtype,
    }
    beside = peers(asked.device, asked.micro)
    runs: dict[str, list[dict[str, Any]]] = {"paw": [], **{name: [] for name in beside}}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        data.mkdir()
        (data / "train.jsonl").write_text(
            "".join(
                json.dumps({"question": r["question"], "answer": r["answer"]}) + "\n" for r in rows
            )
        )
        (data / "test.jsonl").write_text(
            json.dumps({"question": rows[0]["question"], "answer": rows[0]["answer"]}) + "\n"
        )
        for turn in range(asked.rounds):
            names = list(runs) if turn % 2 == 0 else list(reversed(runs))
            for who in names:
                work = Path(name) / f"{turn}_{names.index(who)}"
                work.mkdir()
                if who == "paw":
                    ask = command_line(data, asked.model, asked.steps, asked.device, asked.dtype)
                    runs[who].append(ours(ask, asked.device, work))
                else:
                    which, more = beside[who]
                    runs[who].append(peer(which, spec | more, work))
                print(
                    f"round {turn + 1}: {who}, {speed(runs[who][-1]):.0f} tokens a second",
                    file=sys.stderr,
                    flush=True,
                )
    table = [
        [
            "",
            "tokens a second",
            "paw is faster by",
            "largest difference of a step's loss",
            "peak MiB" if asked.device == "cpu" else "peak GPU MiB",
        ]
    ]
    for who, several in runs.items():
        ratios = [speed(a) / speed(b) for a, b in zip(runs["paw"], several, strict=True)]
        apart = max(
            abs(a - b) / b
            for a, b in zip(runs["paw"][0]["losses"], several[0]["losses"], strict=False)
        )
        table.append(
            [
                who,
                f"{statistics.median(map(speed, several)):.0f}",
                "–"
                if who == "paw"
                else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                "–" if who == "paw" else "other examples" if "packed" in who else f"{apart:.2%}",
                f"{statistics.median(r['peak'] for r in several):.0f}",
            ]
        )
    tokens = sum(runs["paw"][0]["tokens"])
    said = (
        f"{asked.model}, {asked.dtype} on {asked.device}, {asked.steps} steps of {BATCH} examples"
    )
    print(f"{said}, {tokens} tokens, {asked.rounds} rounds\n\n{markdown_table(table)}")


if __name__ == "__main__":
    main()
