"""Every method of PEFT on the same few steps: does it beat its own start on held-out examples, and
what does it cost?

    python benchmarks/peft_methods.py answers DATA --steps 8
        SmolLM2-135M on questions and worked answers
    python benchmarks/peft_methods.py classes --steps 60
        MiniLM on VADER's words, negative or positive

DATA is a file of {question, answer} rows: its last 24 are held out. Each method trains with its own
defaults, in a process of its own. The fields are those of PEFT's method comparison: trained
parameters, loss before and after, time, memory, file size.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from paw.text import markdown_table

METHODS = [
    "lora",
    "rslora",
    "dora",
    "qlora",
    "lora_8bit",
    "adalora",
    "ia3",
    "prompt_tuning",
    "prefix_tuning",
    "p_tuning",
]
HELD_OUT = 24


def answers(work: Path, data: Path) -> list[str]:
    opener = gzip.open if data.suffix == ".gz" else open
    with opener(data, "rt", encoding="utf-8") as f:
        rows = [{k: json.loads(line)[k] for k in ("question", "answer")} for line in f]
    for split, part in (
        ("train", rows[:-HELD_OUT]),
        ("validation", rows[-HELD_OUT:]),
        ("test", rows[-1:]),
    ):
        (work / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return ["model@source=smollm2_135m", "dataset=own_text", "train.max_length=400"]


def classes(work: Path) -> list[str]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import words

    words.write(work)
    return [
        f"source.path={words.encoder()}",
        "source.name=minilm",
        "dataset=own",
        "evaluate.mode=classify",
        "train.batch_size=32",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["answers", "classes"])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    asked = parser.parse_args()
    table = [
        [
            "adapter",
            "parameters",
            "loss at the start",
            "best, at step",
            "seconds",
            "tokens a second",
            "RAM MiB",
            "file MiB",
        ]
    ]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        ask = answers(work, asked.data) if asked.what == "answers" else classes(work)
        common = [
            f"dataset.path={work}",
            "dataset.val_split=validation",
            "evaluate.limit=1",
            "hardware=cpu",
            f"paths.outputs={work / 'outputs'}",
            f"train.max_steps={asked.steps}",
            f"train.val_every={asked.steps // 2}",
        ]
        for method in asked.methods:
            more = [f"adapter.every={max(1, asked.steps // 4)}"] if method == "adalora" else []
            if asked.what == "answers":
                more.append("train.batch_size=8")
            command = [
                sys.executable,
                "-m",
                "paw.run",
                "task=train",
                f"adapter={method}",
                f"name={method}",
                *ask,
                *common,
                *more,
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=work)
            (run,) = (work / "outputs" / "runs").glob(f"*_{method}")
            system = json.loads((run / "results.json").read_text())["systems"][-1]
            stage = json.loads((Path(system["artifacts"]["train"]) / "stage.json").read_text())
            r, cost = stage["result"], stage["cost"]
            size = (
                run / "adapters" / "source" / "adapter_model.safetensors"
            ).stat().st_size / 2**20
            best, speed = f"{r['val_best']:.4f}, {r['best_step']}", f"{r['tokens_per_second']:.0f}"
            memory, seconds = f"{cost['ram_mib']:.0f}", f"{cost['seconds']:.0f}"
            table.append(
                [
                    method,
                    f"{r['trainable']:,}",
                    f"{r['val_start']:.4f}",
                    best,
                    seconds,
                    speed,
                    memory,
                    f"{size:.1f}",
                ]
            )
            print(" | ".join(table[-1]), file=sys.stderr, flush=True)
    print(markdown_table(table))


if __name__ == "__main__":
    main()
