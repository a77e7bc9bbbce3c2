"""Every task in 16 bits, with what it does in 32 beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Launch, logits
from paw.paths import embedded

pytestmark = pytest.mark.slow
METHODS = ["per_head", "ridge", "anchored", "embedding", "cross_lora"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from paw.cli.compose import compose_config
    from paw.tasks import dispatch

    folder = tmp_path_factory.mktemp("adapter")
    ask = [
        "task=train",
        "hardware=cpu",
        f"paths.outputs={folder}",
        "train.max_steps=60",
        "evaluate.limit=1",
    ]
    dispatch(compose_config(ask), ask)
    return next((folder / "runs").iterdir()) / "adapters" / "source"


def test_a_transfer_does_what_it_does_in_float32(adapter: Path, launch: Launch) -> None:
    ask = [
        "task=transfer", "experiment=demo", "hardware=cpu", f"adapter.path={adapter}",
        "transfer.positions=600", "transfer.draws=1",
    ]  # fmt: skip
    # shift runs the models themselves
    asked = (("procrustes", METHODS), ("shift", ["random"]))
    found: dict[tuple[str, str], torch.Tensor] = {}
    target, rows = embedded("tiny_qwen2"), (embedded("facts") / "test.jsonl").read_text()
    unseen = [json.loads(row)["question"] for row in rows.splitlines()[:40]]
    plain = logits(target, unseen)
    for bits in ("float32", "bfloat16", "float16"):
        for first, more in asked:
            controls = f"transfer.controls=[{','.join(more)}]"
            run: Any = launch(*ask, f"hardware.precision={bits}", f"transfer={first}", controls)
            for method in {first, *more} - {"random"}:
                moved = run.folder / "adapters" / f"target_{method}"
                found[bits, method] = (logits(target, unseen, moved) - plain).flatten()
    # Of what the adapter does, not of its weights: directions that hardly any activation has are
    # seen with the digits of float32 only; the weights of procrustes themselves agree to .74.
    alike = {
        key: float(torch.cosine_similarity(does, found["float32", key[1]], dim=0))
        for key, does in found.items()
    }
    assert len(alike) == 3 * 7
    assert min(alike.values()) > 0.95, alike


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_tools(
    precision: str,
    adapter: Path,
    launch: Launch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ["model@source=tiny_llama", "experiment=demo", "hardware=cpu"]
    bits, given = f"hardware.precision={precision}", f"adapter.path={adapter}"
    launch("task=merge", *base, bits, given)
    merged = json.loads(
        next((tmp_path / "outputs" / "artifacts" / "merge").glob("*/stage.json")).read_text()
    )["result"]
    assert merged["merged"] < 1e-3 * merged["largest_logit"]

    capsys.readouterr()
    answers = []
    for how in (bits, "hardware.precision=float32"):
        launch(
            "task=predict",
            *base,
            how,
            given,
            "predict.text=what is the color of bovin ?",
            "predict.max_new_tokens=2",
        )
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1])["output"])
    assert answers[0] == answers[1]

    asked = ["models=[tiny_llama]", f"adapters=[{adapter}]", "evaluate.limit=20"]
    for more in (
        ["evaluate.num_fewshot=4"],
        ["evaluate.mode=generate", "evaluate.max_new_tokens=2"],
    ):
        losses = []
        for how in (bits, "hardware.precision=float32"):
            found: Any = launch("task=evaluate", *base, *asked, *more, how)
            losses.append([s.result.loss for s in found.systems])
        assert losses[0] == pytest.approx(losses[1], rel=0.02)

    small: Any = launch("task=compress", *base, bits, "evaluate.limit=10")
    before, after = (s.result.loss for s in small.systems)
    assert after == pytest.approx(before, rel=0.3)
    pairs = [
        {"prompt": f"question : {i} answer :", "chosen": " red", "rejected": " blue"}
        for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = ["dataset=own_preferences", f"dataset.path={tmp_path / 'pairs.jsonl'}"]
    better: Any = launch(
        "task=prefer", *base, *data, bits, "train.max_steps=8", "train.batch_size=4"
    )
    assert better.execution[better.execution.steps[-1]].result.accuracy == 1
    launch("task=validate", *base, bits)
