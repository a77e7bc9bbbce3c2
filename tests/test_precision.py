"""Training in 16 bits: GPU profiles ask for it, and a CPU can show what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from conftest import ADAPTERS, Silent
from paw.cli.compose import compose_config
from paw.data.encode import STAGE as ENCODE
from paw.data.encode import EncodeStage
from paw.models.adapters import WEIGHTS
from paw.models.load import Runtime
from paw.paths import embedded
from paw.store import BEGUN, Context, Input, Store, write_text
from paw.training.history import curve
from paw.training.train import TrainResult, TrainStage, train

STEPS, KILLED = 8, 5
# In float16 a base in 4 bits, ranks that change, and gradients that overflow; the others differ
# from bfloat16 by the scale alone, as plain LoRA does.
OTHERS = ["qlora", "adalora", "p_tuning"]
OPTIONS = {
    "tiny": ["adapter.dropout=0.2"],
    "adalora": ["adapter.every=2", "train.accumulate=1"],  # it takes more steps than the others
}


class Killed(Silent):
    """Ends a training as Ctrl-C does, when it has come to a step."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        if done == KILLED:
            raise KeyboardInterrupt


class Training:
    """One training of the embedded Llama, the stage itself in this process."""

    def __init__(self, root: Path, precision: str, *overrides: str, steps: int = STEPS) -> None:
        size = [
            f"train.max_steps={steps}",
            "train.batch_size=8",
            "train.accumulate=2",
            "train.save_every=2",
        ]
        c = compose_config(["task=train", "experiment=demo", *size, *overrides])
        self.config = TrainStage(adapter=c.adapter, train=c.train, runtime=Runtime(precision))
        data, model = embedded("facts") / "train.jsonl", embedded("tiny_llama")
        store = Store(root / "store")
        encode = EncodeStage(dataset=c.dataset, split="train", form="likelihood", max_length=64)
        inputs = {"data": store.file(data), "tokenizer": Input(model, "llama's tokenizer")}
        rows = store.run(ENCODE, encode, inputs, Silent()).as_input()
        self.inputs = {"model": Input(model, "llama"), "rows": rows}
        self.root = root

    def run(self, name: str, watch: Silent | None = None) -> tuple[Path, TrainResult]:
        """The finished adapter's folder, and its result. The same name goes on where it was
        stopped."""
        out, unfinished = self.root / name, self.root / f"{name}.unfinished"
        for folder in (out, unfinished):
            folder.mkdir(exist_ok=True)
        write_text(unfinished / BEGUN, "{}")
        context = Context(watch or Silent(), unfinished)
        return out, train(self.config, self.inputs, out, context)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_gradients_are_clipped_before_the_step(precision: str, tmp_path: Path) -> None:
    """Seen by the optimizer itself: unscaled gradients, of the norm that was asked for and no
    larger."""
    norms: list[float] = []

    def seen(optimizer: torch.optim.Optimizer, *_: object) -> None:
        grads = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    hook = register_optimizer_step_post_hook(seen)
    try:
        Training(tmp_path, precision, "train.grad_clip=0.1").run("clipped")
        clipped = norms.copy()
        norms.clear()
        Training(tmp_path, precision, "train.grad_clip=0").run("free")
    finally:
        hook.remove()
    assert len(clipped) == len(norms) == STEPS
    assert clipped[0] == pytest.approx(0.1, rel=1e-3)
    assert max(clipped) < 0.1 * 1.001
    assert 0.1 < norms[0] < 100, "gradients keep a scale that is not theirs"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("how", ["plain", "train.gradient_checkpointing=true"])
def test_sixteen_bits_learn_what_float32_learns(precision: str, how: str, tmp_path: Path) -> None:
    more = [how] if "=" in how else []
    wanted = curve(Training(tmp_path, "float32").run("float32")[0] / "curve.jsonl")["loss"]
    found = curve(Training(tmp_path, precision, *more).run(precision)[0] / "curve.jsonl")["loss"]
    rounding = 0.01 if precision == "bfloat16" else 0.002
    assert found == pytest.approx(wanted, rel=rounding)


@pytest.mark.parametrize(
    ("precision", "method"),
    [
        ("bfloat16", "tiny"),
        ("float16", "tiny"),
        *(
            pytest.param(p, m, marks=pytest.mark.slow)
            for p, methods in (("bfloat16", ADAPTERS), ("float16", OTHERS))
            for m in methods
        ),
    ],
)
def test_a_stopped_training_goes_on_to_the_byte(
    precision: str, method: str, tmp_path: Path
) -> None:
    """float16 also keeps the scale of its gradients in the checkpoint."""
    more = [f"adapter={method}", *OPTIONS.get(method, [])]
    training = Training(tmp_path, precision, *more, steps=14 if method == "adalora" else STEPS)
    whole, _ = training.run("whole")
    with pytest.raises(KeyboardInterrupt):
        training.run("broken", Killed())
    watch = Silent()
    broken, _ = training.run("broken", watch)
    assert any("goes on after step 4" in said for said in watch.said)
    assert (broken / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_steps_that_float16_leaves_out_are_counted(tmp_path: Path) -> None:
    """The gradients of p-tuning's network overflow at the scale that torch starts with: seen by the
    optimizer itself."""
    taken: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    try:
        _, result = Training(tmp_path, "float16", "adapter=p_tuning").run("out")
    finally:
        hook.remove()
    assert 0 < result.skipped == STEPS - len(taken)
    assert result.steps == STEPS
