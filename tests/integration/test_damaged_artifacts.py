"""Every kind of artifact, damaged: the same command names it and ends with the numbers of an
undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Launch
from test_damage import flip, truncate

pytestmark = pytest.mark.slow
PIPELINE = [
    "experiment=demo",
    "hardware=cpu",
    "train.max_steps=20",
    "evaluate.limit=20",
    "transfer.layers=cka",
    "transfer.controls=[random]",
    "transfer.draws=1",
    "transfer.positions=2000",
]


def numbers() -> list[dict[str, Any]]:
    """What the last run reports of its systems, but for what it cost and where it lies."""
    run = max(Path("outputs/runs").iterdir(), key=lambda p: (p.stat().st_mtime_ns, p.name))
    systems = json.loads((run / "results.json").read_text())["systems"]
    costs = {"seconds", "ram_mib", "gpu_mib", "made", "artifacts"}
    return [{k: v for k, v in s.items() if k not in costs} for s in systems]


def test_the_same_numbers_and_the_damage_named(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every other one with a byte that is flipped, and cut."""
    launch(*PIPELINE)
    wanted, made = numbers(), set(Path("outputs/artifacts").glob("*/*/stage.json"))
    (adapter,) = Path("outputs/artifacts/spoil").glob("*/stage.json")
    tools = [
        [
            "task=merge",
            f"adapter.path={adapter.parent}",
            "model@source=tiny_qwen2",
            "experiment=demo",
            "hardware=cpu",
        ],
        [
            "task=compress",
            "model@source=tiny_qwen2",
            "experiment=demo",
            "hardware=cpu",
            "evaluate.limit=5",
        ],
    ]
    for tool in tools:
        launch(*tool)
    seen = set()
    made |= {
        m
        for stage in ("merge", "compress")
        for m in Path("outputs/artifacts", stage).glob("*/stage.json")
    }
    for manifest in sorted(made):
        stage = manifest.parent.parent.name
        if stage in seen:
            continue
        seen.add(stage)
        files = [p for p in manifest.parent.iterdir() if p.is_file() and p.name != "stage.json"]
        largest = max(files, key=lambda p: p.stat().st_size)
        content = largest.read_bytes()
        (flip, truncate)[len(seen) % 2](largest)
        capsys.readouterr()
        for command in {"merge": tools[:1], "compress": tools[1:]}.get(stage, [PIPELINE]):
            launch(*command)
        said = capsys.readouterr().out
        assert f"damaged ({largest.name})" in said, stage
        assert largest.read_bytes() == content, stage
        if stage not in ("merge", "compress"):
            assert numbers() == wanted, stage
    assert seen == {
        "encode",
        "train",
        "evaluate",
        "calibrate",
        "match",
        "transfer",
        "gate",
        "spoil",
        "merge",
        "compress",
    }
