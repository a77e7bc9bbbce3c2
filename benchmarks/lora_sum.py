"""A training step with PEFT's LoRA layers and with the sum inside the product
(paw/training/fused.py), turn about, and how much of it is matrix products:

    python benchmarks/lora_sum.py DATA.jsonl[.gz] --rounds 8

SmolLM2-135M in float32, LoRA r 16 on all linear layers without dropout, micro-batches of three
packed GSM8K rows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
from pathlib import Path

import peft
import torch

from paw.cli.compose import compose_config
from paw.console import Console
from paw.data.tokenise import Encoded, encode
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.models.locate import locate
from paw.training import fused, packing
from paw.training.objectives import Answers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args()
    with (gzip.open if asked.data.suffix == ".gz" else open)(
        asked.data, "rt", encoding="utf-8"
    ) as f:
        rows = [json.loads(line) for line in f][: 3 * asked.rounds]
    folder = locate(compose_config(["model@source=smollm2_135m"]).source, None, Console(sys.stderr))
    found = encode(
        load_tokenizer(folder),
        [(f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in rows],
        False,
        close=True,
    )
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    models = []
    for ours in (False, True):
        base = load_model(folder, Runtime("float32"))
        packing.use(base)
        models.append(peft.get_peft_model(base, config).train())
        if ours:
            fused.use(models[-1])

    def step(model: object, batch: list[Encoded]) -> float:
        began = time.perf_counter()
        Answers(0, True).total(model, batch).backward()
        return time.perf_counter() - began

    for model in models:
        step(model, found[:3])
    ratios, spent = [], 0.0
    for i in range(asked.rounds):
        times = [
            step(model, found[3 * i : 3 * i + 3])
            for model in (models if i % 2 else reversed(models))
        ]
        theirs, ours = times if i % 2 else reversed(times)
        ratios.append(theirs / ours)
        spent += ours
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(models[1], found[:3])
    events = profile.key_averages()
    products = sum(
        e.self_cpu_time_total
        for e in events
        if e.key in ("aten::mm", "aten::addmm", "aten::addmm_")
    )
    share = products / sum(e.self_cpu_time_total for e in events)
    tokens = sum(len(r.ids) for r in found[: 3 * asked.rounds])
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    print(
        f"PEFT's time over ours: {ratio}; ours {tokens / spent:.0f} tokens a second, of which "
        f"{share:.0%} are matrix products"
    )


if __name__ == "__main__":
    main()
