"""Every task in 16 bits, with what it does in 32 beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Launch
from paw.models.adapters import read_adapter

pytestmark = pytest.mark.slow
METHODS = ["per_head", "ridge", "anchored", "embedding", "cross_lora"]


def moved(found: Any, method: str) -> torch.Tensor:
    """ΔW of all modules of a transferred adapter, in one row."""
    factors = read_adapter(found.folder / "adapters" / f"target_{method}")
    return torch.cat([(f.b @ f.a).flatten() for _, f in sorted(factors.items())])


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


def test_a_transfer_points_where_it_does_in_float32(adapter: Path, launch: Launch) -> None:
    ask = [
        "task=transfer", "experiment=demo", "hardware=cpu", f"adapter.path={adapter}",
        "transfer.positions=600", "transfer.draws=1",
    ]  # fmt: skip
    found: dict[str, Any] = {}
    for bits in ("float32", "bfloat16", "float16"):
        # shift runs the models themselves
        for first, more in (("procrustes", METHODS), ("shift", ["random"])):
            controls = f"transfer.controls=[{','.join(more)}]"
            method = f"transfer={first}"
            found[bits, first] = launch(*ask, f"hardware.precision={bits}", method, controls)
    for precision in ("bfloat16", "float16"):
        for first, more in (("procrustes", METHODS), ("shift", [])):
            for method in (first, *more):
                a, b = (moved(found[bits, first], method) for bits in ("float32", precision))
                # .990 to .999 by processor; what shift regresses is a difference of two passes, of
                # which 16 bits leave fewer digits
                alike = 0.95 if method == "shift" else 0.98
                same = float(torch.cosine_similarity(a, b, dim=0))
                assert same > alike, (precision, method)


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
