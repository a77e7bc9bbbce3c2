"""scripts/gpu.py where there is no GPU: what it would run is well formed, and its loop tells
failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, script
from paw.run import checked

gpu = script("scripts", "gpu")
Step, Row = gpu.Step, gpu.Row


def test_without_a_gpu_every_step_is_named_and_nothing_is_touched(tmp_path: Path) -> None:
    doc = ROOT / "docs" / "gpu.md"
    before = doc.read_bytes()
    command = [sys.executable, str(ROOT / "scripts" / "gpu.py")]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for step in gpu.steps(0):
        said = f"\n{step.section}: {step.name}\n  {step.command}\n  skipped: no NVIDIA GPU\n"
        assert said in done.stdout
    assert done.stdout.endswith("no NVIDIA GPU: nothing was run; docs/gpu.md stays as it is.\n")
    assert doc.read_bytes() == before


def test_every_command_line_is_well_formed() -> None:
    parsers = {name: script("benchmarks", name) for name in ("harness", "training", "scale")}
    steps = gpu.steps(1)
    assert len({step.folder for step in steps}) == len(steps)
    for command in {step.command for step in [*steps, *gpu.steps(4)]}:
        python, what, *words = command.split()
        assert python == "python"
        if what == "-m":
            module, *words = words
            assert module == "pytest" or (module == "paw.run" and checked(words))
        else:
            parsers[Path(what).stem].parser().parse_args(words)


def test_a_profile_of_four_devices_runs_on_those_that_there_are() -> None:
    def asked(gpus: int) -> str:
        step = next(s for s in gpu.steps(gpus) if s.name == "a800x4, float16")
        return str(step.command)

    assert "hardware.devices=1" in asked(1)
    assert "hardware.devices=2 train.batch_size=16" in asked(2)
    assert "hardware.devices" not in asked(8)
    assert "train.batch_size=8" in asked(8)


def test_a_base_on_several_gpus_is_compared_with_a_copy_on_each(work: Path) -> None:
    def steps(gpus: int) -> list[Any]:
        return [step for step in gpu.steps(gpus) if step.section == gpu.SPREAD]

    for step in steps(1):
        assert ran(step).result == "skipped: one GPU: there is nothing to spread a base over"
    whole, spread = steps(4)
    assert not whole.needs()
    assert not spread.needs()
    assert "hardware.devices=4" in spread.command
    for step, loss in ((whole, 1.2), (spread, 1.2005)):
        file = step.folder / "runs" / "one" / "results.json"
        file.parent.mkdir(parents=True)
        row = {"system": "tiny_llama", "accuracy": 0.25, "loss": loss}
        file.write_text(json.dumps({"systems": [row]}))
    assert spread.figures(spread.folder, "") == "accuracy 0.250, loss 1.20050"
    file.write_text(file.read_text().replace("1.2005", "1.3"))
    with pytest.raises(gpu.Wrong, match=r"loss 1\.30000, but accuracy 0\.250, loss 1\.20000"):
        spread.figures(spread.folder, "")


def test_all_contenders_of_the_training_benchmark_get_the_device_and_precision() -> None:
    training = script("benchmarks", "training")
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        ask = training.command_line(Path("data"), "smollm2_135m", 2, device, dtype)
        assert checked(ask)
        assert {f"hardware.device={device}", f"hardware.precision={dtype}"} <= set(ask)
    assert training.peers("cpu", None)["TRL, same batches"][1]["micro_batch"] == 2
    assert training.peers("cuda", None)["TRL, same batches"][1]["micro_batch"] == training.BATCH


def test_a_torch_without_cuda_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 550.54\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpus, why, facts = gpu.machine()
    assert (gpus, ["driver", "550.54"] in facts) == (0, True)
    assert "cannot use the GPU" in why
    assert gpu.main() == 1


# ---- the loop -----------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    return tmp_path


def step(code: str, limit: int = 60, **more: object) -> object:
    """A step that runs a line of Python."""
    (gpu.ROOT / "line.py").write_text(code)
    return Step("Demo", "a line", "python line.py", limit, **({"figures": gpu.last_line} | more))


def ran(step: object, left: float = 60) -> Any:
    return gpu.run(step, time.monotonic() + left)


def test_a_step_reports_its_figures(work: Path) -> None:
    row = ran(step("print('12 passed')"))
    assert (row.result, row.figures, row.tail) == ("ok", "12 passed", "")


def test_a_step_that_fails_reports_its_last_lines(work: Path) -> None:
    row = ran(step("print('begun'); raise SystemExit('paw: error: no room')"))
    assert (row.result, row.figures) == ("failed: exit code 1", "not measured")
    assert row.tail.splitlines() == ["begun", "paw: error: no room"]


def test_a_step_is_stopped_with_all_that_it_started(work: Path) -> None:
    child = "import time; time.sleep(3); open('late', 'w')"
    started = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    assert ran(step(started, limit=1)).result == "failed: stopped after 1 s"
    assert ran(step(started), 0.5).result == "failed: stopped after 0 s"
    assert ran(step(started), -1).result == "skipped: the time for all is over"
    time.sleep(3)
    assert not (work / "late").exists()


def test_figures_that_are_wrong_or_missing_are_a_failure(work: Path) -> None:
    def wrong(folder: Path, said: str) -> str:
        raise gpu.Wrong("0.2, but 1.0 on the CPU")

    assert ran(step("", figures=wrong)).result == "failed: 0.2, but 1.0 on the CPU"
    assert "failed: no figures" in ran(step("", figures=gpu.demo)).result
    assert ran(step("", needs=lambda: "no trl")).result == "skipped: no trl"


def test_a_table_is_read_by_its_columns() -> None:
    said = "loading\n|     | a second | MiB |\n|---|---|---|\n| paw | 345 | – |\n| TRL | 209 | 4 |"
    read = gpu.columns("a second", "MiB")
    assert read(Path(), said) == "paw: a second 345, MiB –; TRL: a second 209, MiB 4"


def test_the_document_shows_what_failed() -> None:
    made = Step("Demo", "auto, float16", "python -m paw.run", 60, gpu.demo)
    text = gpu.document([["devices", "one"]], [Row(made, "failed: exit code 1", 3.2, tail="a\nb")])
    row = next(line for line in text.splitlines() if line.startswith("| auto, float16"))
    assert [c.strip() for c in row.strip("|").split("|")] == [
        "auto, float16",
        "failed: exit code 1",
        "3",
        "not measured",
        "`python -m paw.run`",
    ]
    assert "auto, float16:\n\n    a\n    b\n" in text
