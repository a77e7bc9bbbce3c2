"""What tests share: running the real command line, and the embedded models."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as paw.run does, before torch is imported
# No test may reach for the network; libraries read these while they are imported, and processes
# that tests start inherit them
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import gc
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import warm
from paw.graph import Step
from paw.paths import embedded
from paw.store import Artifact, Holder, Input
from paw.training import processes

ROOT = Path(__file__).resolve().parent.parent
Paw = Callable[..., "subprocess.CompletedProcess[str]"]
Launch = Callable[..., object]

# Many tests ask for float32's digits, on a GPU too, where `hardware=auto` would choose 16 bits:
# tests of those say so.
PRECISION = "hardware.precision=float32"

# Every adapter= that trains another way than plain LoRA.
ADAPTERS = [
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

# A small real run: as many steps as reach the answers, no controls, a seventh of the text.
QUICK = ["experiment=demo", "transfer.controls=[]", "transfer.positions=2000"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: two workers then end together."""
    items.sort(key=lambda item: item.path.parent.name != "integration")


@pytest.fixture(autouse=True)
def nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may find a key or a folder of this machine's user."""
    for name in ("PAW_MODELS_DIR", "PAW_DATA_DIR", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a training that a test begins by itself need not import all again; those of
    commands do."""
    monkeypatch.setattr(processes, "START", warm.START)


@pytest.fixture
def paw(tmp_path: Path) -> Paw:
    """`paw("train.lr=1")`: the command line in an empty folder, as a user runs it."""

    def run(
        *args: str, cwd: Path = tmp_path, env: Mapping[str, str] | None = None, ok: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = warm.run(in_precision(args), cwd, env)
        if ok:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def imported() -> None:
    """What commands import; stages collect garbage after each model, and then need not look through
    all of it each time."""
    for name in warm.IMPORTED:
        import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture
def launch(imported: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """`launch("train.lr=1")`: the same task in this process, which has imported everything already,
    in an empty folder."""
    from paw.cli.compose import compose_config
    from paw.tasks import dispatch

    monkeypatch.chdir(tmp_path)
    return lambda *args: dispatch(compose_config(in_precision(args)), list(args))


def in_precision(args: Sequence[str]) -> list[str]:
    """In float32, where the command itself says nothing of precision."""
    says = any(a.startswith(("hardware=", "hardware.precision=", "-")) for a in args)
    return [*args, *([] if says else [PRECISION])]


def script(folder: str, name: str) -> ModuleType:
    """A script of the project, as a module: `script("benchmarks", "words")`."""
    spec = spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    assert spec
    assert spec.loader
    found = module_from_spec(spec)
    sys.modules[spec.name] = found  # where dataclasses look for their module
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    return embedded("tiny_llama")


@pytest.fixture(scope="session")
def tiny_qwen2() -> Path:
    return embedded("tiny_qwen2")


class Silent:
    """A Watch that keeps what it is told; and what an execution tells of its steps."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def progress(self, done: int, total: int, note: str = "") -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def start(self, step: str) -> None: ...
    def say(self, text: str) -> None:
        self.said.append(text)

    def finished(self, step: Step, made: Artifact, number: int, of: int) -> None:
        self.said.append(f"{number}/{of} {'reused' if made.reused else 'computed'} {step.name}")

    def failed(self, step: Step, error: Exception) -> None:
        self.said.append(f"failed {step.name}: {error}")

    def waiting(self, step: Step, holder: Holder) -> None:
        self.said.append(f"waiting {step.name}")


@pytest.fixture
def watch() -> Silent:
    return Silent()


@torch.no_grad()
def logits(base: Path, texts: Sequence[str], adapter: Path | None = None) -> torch.Tensor:
    """What a base says of texts, with an adapter or without: tokens × vocabulary, float32."""
    from paw.models.adapters import attach, made_for
    from paw.models.load import Runtime, load_model, load_tokenizer

    model, tokenizer = load_model(base, Runtime("float32")), load_tokenizer(base)
    if adapter is not None:
        model = attach(model, adapter, made_for(adapter) or "")
    each = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    return torch.cat([model(input_ids=ids).logits[0] for ids in each])


def move(what: Any, inputs: Mapping[str, Input], out: Path) -> Any:
    """Both stages of a transfer, as a TransferStage asks: the maps beside `out`, the adapter in
    it."""
    from paw.transfer.gate import GateStage, gate
    from paw.transfer.transfer import transfer

    moved = out.with_name(f"{out.name}.moved")
    for folder in (moved, out):
        folder.mkdir(parents=True, exist_ok=True)
    transfer(what, inputs, moved, Silent())
    gated = GateStage(transfer=what.transfer)
    return gate(gated, {**inputs, "moved": Input(moved, "moved")}, out, Silent())
