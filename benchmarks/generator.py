"""The generator's costs: adapters to tokens, a prompt to an adapter, and training steps beside the
original stack.

    python benchmarks/generator.py tokens            # 50 checkpoints of 8.8 MB to one array
    python benchmarks/generator.py generate          # one prompt to a PEFT folder, encoder included
    python benchmarks/generator.py steps --rounds 5  # steps a second, in turn with the original's

`steps` builds both on a LoRA of rank 8 on v_proj of Qwen2.5-0.5B, which is 512 × 384 values, with
batches of 8. The original is hyperconv_paw and the dense expander, as large as it was (80.47 M),
and encodes its prompts in every step, as it did; ours reads vectors that were computed once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from paw.generator.config import FitConfig, NetworkConfig, TokensConfig
from paw.generator.encoder import Encoder
from paw.generator.fit import Losses, Scale
from paw.generator.generate import GenerateStage, generate
from paw.generator.generator import GeneratorStage, generator
from paw.generator.groups import Group, write_groups
from paw.generator.layout import Entry, Layout
from paw.generator.network import Network, parameters
from paw.generator.texts import TextsStage, texts
from paw.generator.tokens import TokensStage, tokens
from paw.models.load import Runtime
from paw.models.locate import locate
from paw.models.steps import model_named
from paw.store import Context, Input, Kept

RUNTIME = Runtime("float32")
BASE = Input(Path("."), "base")


class Quiet:
    def progress(self, done: int, total: int, note: str = "") -> None: ...
    def metrics(self, values: Any, step: int) -> None: ...
    def say(self, text: str) -> None: ...


def adapters(folder: Path, count: int, layers: int, shapes: dict[str, tuple[int, int]]) -> None:
    """PEFT folders of random factors."""
    rank = 8
    for i in range(count):
        torch.manual_seed(i)
        out = folder / f"step_{i:04d}"
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(shapes))
        config.save_pretrained(str(out))
        held = {}
        for layer in range(layers):
            for name, (width, height) in shapes.items():
                stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                held[f"{stem}.lora_A.weight"] = torch.randn(rank, width) / 100
                held[f"{stem}.lora_B.weight"] = torch.randn(height, rank) / 100
        save_file(held, out / "adapter_model.safetensors", metadata={"format": "pt"})


def context(folder: Path) -> Context:
    folder.mkdir(exist_ok=True)
    return Context(Quiet(), folder, Kept())


def tokenised(folder: Path, out: Path, dim: int = 384) -> Any:
    out.mkdir()
    inputs = {"folder": Input(folder, "f"), "model": BASE}
    work = context(out.with_name(out.name + "_work"))
    return tokens(TokensStage(tokens=TokensConfig(dim=dim)), inputs, out, work)


def time_tokens(root: Path) -> None:
    # of a Qwen2.5-0.5B: 2.2 M values, 8.8 MB in float32
    shapes = {
        "q_proj": (896, 896),
        "v_proj": (896, 128),
        "up_proj": (896, 4864),
        "k_proj": (896, 128),
        "o_proj": (896, 896),
    }
    adapters(root / "c", 50, 24, shapes)
    size = (root / "c" / "step_0000" / "adapter_model.safetensors").stat().st_size
    began = time.perf_counter()
    result = tokenised(root / "c", root / "t")
    print(
        f"{size / 1e6:.1f} MB each; {result}: {time.perf_counter() - began:.1f} s, proof included"
    )


def time_generate(root: Path) -> None:
    adapters(root / "c", 6, 24, {"v_proj": (896, 128)})
    tokenised(root / "c", root / "t")
    encoder = locate(model_named("minilm_l6"), None, Quiet())
    groups = [
        Group(task="", role="val" if i == 5 else "train", texts=(f"question {i}",), step=i)
        for i in range(6)
    ]
    (root / "p").mkdir()
    write_groups(root / "p", groups)
    (root / "v").mkdir()
    inputs = {"groups": Input(root / "p", "p"), "encoder": Input(encoder, "e")}
    texts(TextsStage(runtime=RUNTIME), inputs, root / "v", Quiet())
    (root / "g").mkdir()
    config = GeneratorStage(
        pairing="order",
        ratio=0.1,
        network=NetworkConfig(),
        fit=FitConfig(epochs=1),
        runtime=RUNTIME,
    )
    inputs = {"texts": Input(root / "v", "v"), "tokens": Input(root / "t", "t"), "model": BASE}
    print(generator(config, inputs, root / "g", context(root / "w")))
    made = {"generator": Input(root / "g", "g"), "encoder": Input(encoder, "e")}
    for i in range(4):
        out = root / f"out{i}"
        out.mkdir()
        began = time.perf_counter()
        result = generate(
            GenerateStage(prompt="how tall is it ?", runtime=RUNTIME), made, out, Quiet()
        )
        whole = time.perf_counter() - began
        print(
            f"one prompt: {whole:.2f} s with loading both models, {result.seconds:.3f} s of it to "
            "generate and write"
        )


def time_steps(rounds: int, hidden: int) -> None:
    rank, layers = 8, 24
    entries = [
        Entry(
            f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_{s}.weight", shape, "float32"
        )
        for i in range(layers)
        for s, shape in (("A", (rank, 896)), ("B", (128, rank)))
    ]
    whole, ours = Layout(tuple(entries), 384, 512), Layout(tuple(entries), 384)
    encoder = Encoder(locate(model_named("minilm_l6"), None, Quiet()))
    prompts = [[f"which of these is number {i} of {j} ?" for j in range(4)] for i in range(8)]
    vectors = torch.stack([torch.from_numpy(encoder.encode(p)) for p in prompts])
    there = torch.ones(8, 4, dtype=torch.bool)

    def built(layout: Layout, config: NetworkConfig, encodes: bool) -> Callable[[], None]:
        network = Network(layout, config, 384)
        print(
            f"{config.expander} + {config.decoder}, hidden {config.hidden}: "
            f"{parameters(network) / 1e6:.2f} M parameters"
        )
        scale = Scale(
            mean=torch.zeros(layout.tokens, 384),
            spread=torch.ones(layout.tokens, 1),
            weight=torch.from_numpy(layout.places).float(),
        )
        losses, true = Losses(layout, scale, FitConfig()), torch.randn(8, layout.tokens, 384) / 100
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

        def step() -> None:
            seen = vectors
            if encodes:
                seen = torch.stack([torch.from_numpy(encoder.encode(p)) for p in prompts])
            loss = losses(network(seen, there), true)["loss"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()

        return step

    literal = NetworkConfig(expander="dense", decoder="hyperconv_paw", residual=False, whiten=None)
    sides = {
        "original": built(whole, literal, True),
        "paw": built(ours, NetworkConfig(hidden=hidden), False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s a step, {1 / median:.2f} steps a second")
    ratios = [a / b for a, b in zip(seconds["original"], seconds["paw"], strict=True)]
    print(f"ratio: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("tokens", "generate", "steps"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=384)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.what == "tokens":
            time_tokens(Path(folder))
        elif asked.what == "generate":
            time_generate(Path(folder))
        else:
            time_steps(asked.rounds, asked.hidden)
