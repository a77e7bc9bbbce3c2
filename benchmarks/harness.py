"""Parity with lm-evaluation-harness 0.4.13 and speed against it: same model, rows, dtype, machine;
each side in a process of its own, turn about.

    pip install lm-eval==0.4.13
    python benchmarks/harness.py parity --data DATA --model smollm2_135m --rows 200 \\
        [--adapter random] [--shots 5]
    python benchmarks/harness.py speed  --data DATA --model smollm2_135m --rows 100 --rounds 3 \\
        [--shots 25] --tasks arc_easy

DATA holds <task>/<split>.jsonl[.gz] in normalised rows. The harness runs its own task files,
pointed at these rows; its batch size is the best of those tried on the same task. Seconds are those
of scoring, without loading: for the harness its loglikelihood call alone, for paw the whole stage
(reading, tokenising, scoring, records).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TASKS = {
    "arc_challenge": "test",
    "arc_easy": "test",
    "piqa": "validation",
    "hellaswag": "validation",
    "winogrande": "validation",
}
WRITTEN = {"gsm8k": "test"}
FILES = {
    "arc_challenge": "arc/arc_challenge.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
SPLITS = TASKS | WRITTEN
BATCHES = (1, 2, 4, 8, 16, 32)


class Quiet:
    def progress(self, done: int, total: int, note: str = "") -> None: ...
    def metrics(self, values: Any, step: int) -> None: ...
    def say(self, text: str) -> None:
        print(text, file=sys.stderr)


@contextmanager
def peak() -> Iterator[dict[str, float]]:
    """Seconds, and the peak of resident memory in MiB, of what runs inside."""
    import psutil

    found, done, me = {"mib": 0.0, "seconds": 0.0}, threading.Event(), psutil.Process()

    def sample() -> None:
        while not done.wait(0.02):
            found["mib"] = max(found["mib"], me.memory_info().rss / 2**20)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    began = time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - began
    done.set()
    thread.join()


# ---- paw -----------------------------------------------------------------------------------------


def with_paw(c: argparse.Namespace) -> dict[str, Any]:
    from paw.cli.compose import compose_config
    from paw.data.load import split_file
    from paw.evaluation.evaluate import EvaluateStage, evaluate
    from paw.evaluation.records import read_records
    from paw.models.load import Runtime
    from paw.store import Context, Input

    config = compose_config(
        [
            f"dataset={c.task}",
            "model@source=tiny_llama",
            f"evaluate.num_fewshot={c.shots}",
            f"evaluate.limit={c.rows}",
        ]
    )
    source = "train_xl" if c.task == "winogrande" else "train"
    inputs = {"model": Input(Path(c.folder), "base"), "data": Input(rows_file(c), "rows")}
    if c.adapter:
        inputs["adapter"] = Input(Path(c.adapter), "adapter")
    if c.shots:
        inputs["shots"] = Input(split_file(config.dataset, source, c.data, Quiet()), "shots")
    context = Context(Quiet())
    stage = EvaluateStage(
        dataset=config.dataset,
        split=SPLITS[c.task],
        evaluate=config.evaluate,
        runtime=Runtime(c.dtype, c.device),
        fewshot_split=source,
    )
    with tempfile.TemporaryDirectory() as out:
        stage.evaluate.limit = 2
        evaluate(stage, inputs, Path(out), context)  # loads the base, which stays
        stage.evaluate.limit = c.rows
        with peak() as found:
            evaluate(stage, inputs, Path(out), context)
        records = read_records(Path(out))
    return {**found, "scores": {r["id"]: r.get("text", r["loglikelihoods"]) for r in records}}


def in_double(c: argparse.Namespace) -> dict[str, Any]:
    """What one choice scores in float64, one row, nothing filled: the truth that two float32
    programs round differently."""
    import torch

    from paw.cli.compose import compose_config
    from paw.data.load import examples, split_file
    from paw.data.tokenise import encode
    from paw.models.adapters import attach
    from paw.models.load import Runtime, load_model, load_tokenizer

    dataset = compose_config([f"dataset={c.task}", "model@source=tiny_llama"]).dataset
    example = next(e for e in examples(rows_file(c), dataset, "test") if e.id == c.id)
    if c.shots:
        solved = examples(
            split_file(dataset, "train_xl" if c.task == "winogrande" else "train", c.data, Quiet()),
            dataset,
            "train",
        )
        example = example.after(
            "".join(f"{s.solved()}\n\n" for s in random.Random(0).sample(solved, c.shots))
        )
    row = encode(
        load_tokenizer(Path(c.folder)),
        [(example.contexts[c.choice], example.continuations[c.choice])],
        False,
    )[0]
    model = load_model(Path(c.folder), Runtime("float32"))
    model = (attach(model, Path(c.adapter), "base") if c.adapter else model).double()
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return {
        "score": sum(float(found[i - 1, row.ids[i]]) for i in range(row.start, len(row.ids))),
        "tokens": len(row.ids) - row.start,
    }


def rows_file(c: argparse.Namespace) -> Path:
    """The first rows of the split, as a file of their own, so that both sides have the same."""
    from paw.cli.compose import compose_config
    from paw.data.load import _lines, split_file

    full = split_file(
        compose_config([f"dataset={c.task}", "model@source=tiny_llama"]).dataset,
        SPLITS[c.task],
        c.data,
        Quiet(),
    )
    out = Path(c.work) / f"{c.task}_{c.rows}.jsonl"
    out.write_text("".join(text for _, text in itertools.islice(_lines(full), c.rows)))
    return out


# ---- the harness ---------------------------------------------------------------------------------


def hub_row(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A normalised row in the form that the harness's task file reads."""
    if task.startswith("arc"):
        return {
            "id": row["id"],
            "question": row["question"],
            "choices": {"text": row["choices"], "label": row["labels"]},
            "answerKey": row["answer"],
        }
    if task == "gsm8k":
        return row
    if task == "piqa":
        return {
            "goal": row["question"],
            "sol1": row["choices"][0],
            "sol2": row["choices"][1],
            "label": int(row["answer"]),
        }
    if task == "winogrande":
        return {
            "sentence": row["question"],
            "option1": row["choices"][0],
            "option2": row["choices"][1],
            "answer": row["answer"],
        }
    label, _, rest = row["question"].partition(": ")
    return {
        "activity_label": label,
        "ctx_a": rest,
        "ctx_b": "",
        "endings": row["choices"],
        "label": row["answer"],
        "ind": 0,
    }


def with_harness(c: argparse.Namespace) -> dict[str, Any]:
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from paw.cli.compose import compose_config
    from paw.data.load import _lines, examples, split_file

    rows = [json.loads(line) for line in rows_file(c).read_text().splitlines()]
    work = Path(tempfile.mkdtemp(dir=c.work))
    files = {SPLITS[c.task]: str(work / "rows.jsonl")}
    (work / "rows.jsonl").write_text("".join(json.dumps(hub_row(c.task, r)) + "\n" for r in rows))
    extra: dict[str, Any] = {}
    if c.shots:  # the very shots that paw draws, in its order
        dataset = compose_config([f"dataset={c.task}", "model@source=tiny_llama"]).dataset
        full = split_file(
            dataset, "train_xl" if c.task == "winogrande" else "train", c.data, Quiet()
        )
        known = {r["id"]: r for r in (json.loads(text) for _, text in _lines(full))}
        shots = random.Random(0).sample(examples(full, dataset, "train"), c.shots)
        (work / "shots.jsonl").write_text(
            "".join(json.dumps(hub_row(c.task, known[s.id])) + "\n" for s in shots)
        )
        files["train"] = str(work / "shots.jsonl")
        extra = {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    own = Path(lm_eval.__file__).parent / "tasks" / FILES[c.task]
    if "train" not in files:
        extra |= {"training_split": None}
    if SPLITS[c.task] == "test":
        extra |= {"validation_split": None}
    task = {
        "include": str(own),
        "task": "rows",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **extra,
    }
    (work / "rows.yaml").write_text(yaml.safe_dump(task))
    lm = HFLM(
        pretrained=c.folder,
        peft=c.adapter or None,
        dtype=c.dtype,
        device=c.device,
        batch_size=c.batch,
    )
    kind = "generate_until" if c.task in WRITTEN else "loglikelihood"
    ask, seconds = timed(getattr(lm, kind))
    setattr(lm, kind, ask)
    with peak() as found:
        done = lm_eval.simple_evaluate(
            model=lm,
            tasks=["rows"],
            task_manager=TaskManager(include_path=str(work), include_defaults=False),
            num_fewshot=c.shots,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=0,
        )
    samples = done["samples"]["rows"]
    written = c.task in WRITTEN
    scores = {
        rows[s["doc_id"]]["id"]: s["resps"][0][0]
        if written
        else [float(r[0][0]) for r in s["resps"]]
        for s in samples
    }
    return {"seconds": seconds[0], "mib": found["mib"], "scores": scores}


def timed(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[float]]:
    seconds = [0.0]

    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[0] += time.perf_counter() - began

    return run, seconds


# ---- comparing -----------------------------------------------------------------------------------


def child(side: str, c: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    settings = vars(c) | changes
    with tempfile.TemporaryDirectory(dir=c.work) as folder:
        (Path(folder) / "settings.json").write_text(json.dumps(settings, default=str))
        done = subprocess.run(
            [sys.executable, __file__, "child", side, folder], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
        return found


def parity(c: argparse.Namespace) -> None:
    adapter = Path(c.adapter).name if c.adapter else "none"
    print(
        f"| {c.model}, {c.dtype}, {c.shots} shots, adapter {adapter} | rows | choices | "
        "largest difference | "
        "harness to float64 there | paw to float64 there | same prediction | harness s | paw s |\n"
        "|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for task in c.tasks:
        c.task = task
        theirs, ours = child("harness", c), child("paw", c)
        assert theirs["scores"].keys() == ours["scores"].keys()
        if task in WRITTEN:
            same = sum(
                theirs["scores"][i].strip() == ours["scores"][i].strip() for i in ours["scores"]
            )
            print(
                f"| {task} | {len(ours['scores'])} | | | | | {same} texts equal | "
                f"{theirs['seconds']:.1f} | {ours['seconds']:.1f} |",
                flush=True,
            )
            continue
        pairs = [(theirs["scores"][i], ours["scores"][i]) for i in ours["scores"]]
        far = {
            (i, k): abs(a - b)
            for i in ours["scores"]
            for k, (a, b) in enumerate(zip(theirs["scores"][i], ours["scores"][i], strict=True))
        }
        c.id, c.choice = max(far, key=lambda at: far[at])
        true, worst = child("truth", c), far[c.id, c.choice]
        errors = (
            f"{abs(side['scores'][c.id][c.choice] - true['score']):.0e}" for side in (theirs, ours)
        )
        same = sum(x.index(max(x)) == y.index(max(y)) for x, y in pairs)
        choices = sum(len(x) for x, _ in pairs)
        seconds = f"{theirs['seconds']:.1f} | {ours['seconds']:.1f}"
        print(
            f"| {task} | {len(pairs)} | {choices} | {worst:.1e} of {true['tokens']} tokens | "
            f"{' | '.join(errors)} | {same} of {len(pairs)} | {seconds} |",
            flush=True,
        )


def speed(c: argparse.Namespace) -> None:
    print(
        f"| {c.model}, {c.dtype}, {c.rows} rows, {c.shots} shots | harness s (its best batch) | "
        f"paw s | ratio, median of {c.rounds} | harness MiB | paw MiB |\n|---|---|---|---|---|---|"
    )
    for task in c.tasks:
        c.task = task
        tried = {b: child("harness", c, batch=b, rows=c.trial)["seconds"] for b in c.batches}
        best = min(tried, key=lambda b: tried[b])
        seconds = {b: round(s, 1) for b, s in tried.items()}
        print(f"  {task}: harness seconds by batch, {c.trial} rows: {seconds}", file=sys.stderr)
        rounds = [(child("harness", c, batch=best), child("paw", c)) for _ in range(c.rounds)]
        theirs, ours = [r[0] for r in rounds], [r[1] for r in rounds]
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in rounds)

        def shown(side: list[dict[str, Any]]) -> str:
            return " ".join(f"{x['seconds']:.1f}" for x in side)

        print(
            f"| {task} | {shown(theirs)} ({best}) | {shown(ours)} | {ratio:.2f} | "
            f"{max(x['mib'] for x in theirs):.0f} | {max(x['mib'] for x in ours):.0f} |",
            flush=True,
        )


def random_adapter(folder: str, work: str, seed: int = 0) -> str:
    """A LoRA on every linear module with random factors: it changes every score."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = get_peft_model(
        model,
        LoraConfig(
            r=8,
            lora_alpha=8,
            target_modules="all-linear",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    for name, p in found.named_parameters():
        if "lora_B" in name:
            p.data.mul_(0.2)
    out = Path(work) / "random"
    found.save_pretrained(str(out))
    return str(out)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=["parity", "speed"])
    p.add_argument("--data", required=True)
    p.add_argument("--model", required=True, help="a name in conf/model, or a folder")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(SPLITS))
    p.add_argument("--rows", type=int, default=200)
    p.add_argument("--shots", type=int, default=0)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--trial", type=int, default=24, help="rows on which the harness's batch size is found"
    )
    p.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    p.add_argument(
        "--batch", type=int, default=8, help="the harness's batch size in the parity run"
    )
    p.add_argument("--adapter", help="an adapter folder, or `random`")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device", default="cpu")
    return p


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        _, _, side, folder = sys.argv
        c = argparse.Namespace(**json.loads((Path(folder) / "settings.json").read_text()))
        found = {"paw": with_paw, "harness": with_harness, "truth": in_double}[side](c)
        (Path(folder) / "found.json").write_text(json.dumps(found))
        return
    c = parser().parse_args()
    c.data = str(Path(c.data).resolve())
    with tempfile.TemporaryDirectory() as work:
        from paw.models.locate import locate
        from paw.models.steps import model_named

        c.work, c.folder = work, str(locate(model_named(c.model), None, Quiet()))
        if c.adapter == "random":
            c.adapter = random_adapter(c.folder, work)
        (parity if c.what == "parity" else speed)(c)


if __name__ == "__main__":
    main()
