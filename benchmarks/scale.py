"""Transfer at the true shapes of Llama-3-8B and Qwen2.5-7B (random values, bf16), and the seeds'
way beside it.

python benchmarks/scale.py write DIR [4]
    both models' folders, 31 GB; or so many layers of each, .9 GB a layer
python benchmarks/scale.py transfer DIR [4]
    cross_lora, k = 320, of so many whole layers (or all), twice: seconds, peak memory
python benchmarks/scale.py svd DIR [ROLE ...]
    singular bases of layer 0 beside torch.linalg.svd; ROLE:default with square factors

With --device cuda all of it is computed on a GPU.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from paw.cli.compose import compose_config
from paw.models.adapters import Factors, write_adapter
from paw.models.load import Runtime
from paw.models.tensors import Weights, linear_shapes
from paw.store import Input, Store
from paw.text import markdown_table
from paw.transfer.controls import transfer_named
from paw.transfer.linalg import overlap, singular_basis
from paw.transfer.modules import by_layer
from paw.transfer.transfer import STAGE, TransferStage

K = 320
MODELS = {  # hidden, neurons, layers, query heads, key-value heads, vocabulary
    "llama3_8b": (4096, 14336, 32, 32, 8, 128256),
    "qwen25_7b": (3584, 18944, 28, 28, 4, 152064),
}


class Quiet:
    def progress(self, done: int, total: int, note: str = "") -> None:
        print(
            f"  {time.strftime('%H:%M:%S')} {done} of {total} {note}", flush=True
        ) if done % 7 == 0 else None

    def metrics(self, values: object, step: int) -> None: ...
    def say(self, text: str) -> None: ...


def write(root: Path, few: int | None, device: str) -> None:
    """All layers, or the first few; those without the embeddings, which no method looks at that is
    measured here."""
    for name, (d, ff, layers, heads, groups, vocabulary) in MODELS.items():
        folder, size = root / name, d // heads
        folder.mkdir(parents=True)
        config = {"hidden_size": d, "num_attention_heads": heads, "num_key_value_heads": groups}
        (folder / "config.json").write_text(json.dumps(config))
        rows = {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (groups * size, d),
            "self_attn.v_proj": (groups * size, d),
        }
        rows |= {
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (ff, d),
            "mlp.up_proj": (ff, d),
            "mlp.down_proj": (d, ff),
        }
        torch.manual_seed(0)
        for layer in range(few or layers):
            tensors = {
                f"model.layers.{layer}.{m}.weight": random(s, device) for m, s in rows.items()
            }
            save_file(tensors, folder / f"model-{layer:05}.safetensors")
        if few is None:
            ends = {
                f"{m}.weight": random((vocabulary, d), device)
                for m in ("model.embed_tokens", "lm_head")
            }
            save_file(ends, folder / "model-ends.safetensors")


def random(shape: tuple[int, int], device: str) -> torch.Tensor:
    return (torch.randn(shape, device=device) * 0.02).bfloat16().cpu()


def adapter(root: Path, layers: int | None) -> Path:
    folder = root / f"adapter_{layers or 'all'}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(1)
    modules = {}
    for roles in list(by_layer(shapes := linear_shapes(root / "llama3_8b")).values())[:layers]:
        modules |= {
            n: Factors(torch.randn(16, shapes[n][1]) * 0.01, torch.randn(shapes[n][0], 16) * 0.01)
            for n in roles.values()
        }
    write_adapter(folder, modules, None)
    return folder


def transfer(root: Path, layers: int | None, device: str) -> None:
    like = compose_config(
        [
            "transfer=cross_lora",
            f"transfer.basis={K}",
            "transfer.gain=weight",
            "transfer.controls=[]",
        ]
    ).transfer
    artifacts = root / f"artifacts_{layers or 'all'}"
    shutil.rmtree(artifacts, ignore_errors=True)
    inputs = {
        "source": Input(root / "llama3_8b", "s"),
        "target": Input(root / "qwen25_7b", "t"),
        "adapter": Input(adapter(root, layers), "a"),
    }
    config = TransferStage(
        transfer=transfer_named("cross_lora", like),
        text=None,
        runtime=Runtime("float32", device),
        bases=str(artifacts / "bases"),
    )
    before = psutil.Process().memory_info().rss / 2**30
    rows = [
        [
            "run",
            "pairs of modules",
            "seconds",
            "peak resident GiB",
            *(["peak GPU GiB"] if device == "cuda" else []),
        ]
    ]
    for run in ("first", "second, bases kept"):
        done = Store(artifacts, ["transfer"]).run(STAGE, config, inputs, Quiet())
        cost = done.cost
        memory = [
            f"{cost[key] / 1024:.2f}"
            for key in ("ram_mib", *(["gpu_mib"] if device == "cuda" else []))
        ]
        rows.append([run, str(done.result.pairs), f"{cost['seconds']:.1f}", *memory])
    kept = sum(f.stat().st_size for f in (artifacts / "bases").iterdir()) / 2**30
    print(markdown_table(rows))
    print(
        f"ratio {float(rows[1][2]) / float(rows[2][2]):.1f}, bases on the disk {kept:.2f} GiB, "
        f"resident before {before:.2f} GiB"
    )


def clock(device: str) -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def svd(root: Path, roles: list[str], device: str) -> None:
    """`ROLE` beside the thin SVD, `ROLE:default` beside torch.linalg.svd as it is called without
    arguments (square factors)."""
    rows = [
        [
            "module",
            "shape",
            "torch.linalg.svd s",
            "Gram and eigh s",
            "ratio",
            "overlap of u",
            "of v",
        ]
    ]
    total = [0.0, 0.0]
    for name in MODELS:
        weights = Weights(root / name, device)
        for role in roles or by_layer(weights.shapes)[0]:
            role, _, whole = role.partition(":")
            w = weights[by_layer(weights.shapes)[0][role]]
            began = clock(device)
            ours = singular_basis(w, K)
            between = clock(device)
            u, _, vh = torch.linalg.svd(w, full_matrices=bool(whole))
            seconds = (clock(device) - between, between - began)
            total = [t + s for t, s in zip(total, seconds, strict=True)]
            same = [overlap(a, b) for a, b in ((ours.u, u[:, :K]), (ours.v, vh[:K].T))]
            figures = [
                *(f"{s:.2f}" for s in seconds),
                f"{seconds[0] / seconds[1]:.1f}",
                *(f"{s:.6f}" for s in same),
            ]
            rows.append(
                [
                    f"{name} {role}{' (default)' if whole else ''}",
                    "×".join(map(str, w.shape)),
                    *figures,
                ]
            )
            print(rows[-1], flush=True)
    rows.append(["all", "", *(f"{t:.1f}" for t in total), f"{total[0] / total[1]:.1f}", "", ""])
    print(markdown_table(rows))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["write", "transfer", "svd"])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("rest", nargs="*", help="a number of layers, or roles")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser


if __name__ == "__main__":
    asked = parser().parse_args()
    if asked.what == "svd":
        svd(asked.folder, asked.rest, asked.device)
    else:
        run = {"write": write, "transfer": transfer}[asked.what]
        run(asked.folder, int(asked.rest[0]) if asked.rest else None, asked.device)
