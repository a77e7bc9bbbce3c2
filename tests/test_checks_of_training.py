"""What is known of a training before its model loads, and what its stages read from inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Silent
from paw import plugins
from paw.cli.compose import compose_config
from paw.data.encode import ABOUT, EncodeStage, Rows, encode
from paw.errors import AdapterError, ConfigError, DataError
from paw.models.load import Runtime
from paw.paths import embedded
from paw.store import BEGUN, Context, Input, write_text
from paw.training import adapters
from paw.training.checks import check_adapter, check_prefer, check_training
from paw.training.config import TrainConfig
from paw.training.history import History
from paw.training.optimizer import learning_rate
from paw.training.train import TrainResult, TrainStage, train

CPU, LLAMA = Runtime("float32"), embedded("tiny_llama")
NAMES = sorted(plugins.modules(adapters.FOLDER))


def adapter(*ask: str) -> adapters.AdapterConfig:
    return compose_config(["task=train", "model@source=tiny_llama", *ask]).adapter


def encoded(out: Path, **more: Any) -> Rows:
    """Facts as tokens of the embedded Llama, which has 256 places."""
    dataset = compose_config(["dataset=facts"]).dataset
    config = EncodeStage(dataset=dataset, split="train", form="likelihood", **more)
    data = Input(embedded("facts") / "train.jsonl", "data")
    out.mkdir(exist_ok=True)
    encode(config, {"data": data, "tokenizer": Input(LLAMA, "llama")}, out, Silent())
    return Rows(out)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_owns_its_schema(name: str) -> None:
    method = adapters.method_named(name)
    config = method.schema(method=name)
    assert (config.virtual_tokens == 20) == ("virtual_tokens" in vars(config))
    assert config.transferable == (name in ("lora", "adalora"))


def test_a_method_from_outside_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "flips" / "training" / "adapters"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "flip.py").write_text(
        "from paw.training.adapters import AdapterConfig, Method\n"
        "METHOD = Method(schema=AdapterConfig, config=lambda c, setting: None)\n"
    )
    monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "flips"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert adapters.method_named("flip").schema is adapters.AdapterConfig
    with pytest.raises(ConfigError, match=r"adapter.method: .*Did you mean flip"):
        adapters.method_named("flipp")


def test_what_is_no_product_of_factors_is_not_transferred() -> None:
    kinds = ("rslora", "dora", "adalora", "ia3", "prefix_tuning")
    found = [adapter(f"adapter={name}").transferable for name in kinds]
    assert found == [True, True, True, False, False]


WRONG: dict[str, tuple[list[str], dict[str, Any], Runtime]] = {
    "keeps a cache": (
        ["adapter=prefix_tuning"],
        {"gradient_checkpointing": True},
        CPU,
    ),
    "holds no unfinished training": ([], {"resume": "nowhere"}, CPU),
    "liger": ([], {"liger": True}, CPU),
    "hardware.strategy=fsdp": (["adapter=adalora"], {}, Runtime("float32", strategy="fsdp")),
    "unquantised base": (["adapter=qlora"], {}, Runtime("float32", strategy="fsdp")),
    "deepspeed": ([], {}, Runtime("float32", strategy="deepspeed")),
    "is not JSON": ([], {}, Runtime("float32", strategy="deepspeed", deepspeed=__file__)),
    "cannot be read": ([], {}, Runtime("float32", strategy="deepspeed", deepspeed="nowhere")),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_training_does_not_take(what: str) -> None:
    ask, given, runtime = WRONG[what]
    with pytest.raises(ConfigError, match=what):
        check_training(TrainConfig(**given), adapter(*ask), runtime)


def test_what_a_training_takes(tmp_path: Path) -> None:
    (tmp_path / BEGUN).touch()
    given = TrainConfig(gradient_checkpointing=True, resume=str(tmp_path))
    check_training(given, adapter("adapter=ia3"), Runtime("float32", strategy="fsdp"))


@pytest.mark.parametrize(
    ("what", "ask", "given", "devices"),
    [
        ("Use adapter=lora", "adapter=ia3", {}, 1),
        ("Use adapter=lora", "adapter=qlora", {}, 1),
        ("train.val_every: task=prefer", "adapter=lora", {"val_every": 1}, 1),
        ("train.packing: task=prefer", "adapter=lora", {"packing": True}, 1),
        ("does not resume", "adapter=lora", {"resume": "never"}, 1),
        ("train.accumulate=3: must divide", "adapter=lora", {"accumulate": 3}, 1),
        ("Set hardware.devices=1", "adapter=lora", {}, 2),
    ],
)
def test_what_prefer_does_not_take(
    what: str, ask: str, given: dict[str, Any], devices: int
) -> None:
    with pytest.raises(ConfigError, match=what):
        check_prefer(TrainConfig(**given), adapter(ask), devices)


def test_modules_that_the_model_has_not() -> None:
    assert check_adapter(adapter("adapter=lora"), LLAMA) == "lora on its own choice of modules"
    named = adapter("adapter=lora", "adapter.target_modules=[q_proj,up_proj]")
    assert check_adapter(named, LLAMA) == "lora on q_proj, up_proj"
    with pytest.raises(AdapterError, match=r"no module 'q_prj'\. Did you mean q_proj"):
        check_adapter(adapter("adapter=lora", "adapter.target_modules=[q_prj]"), LLAMA)


def test_nothing_would_be_validated() -> None:
    TrainConfig(max_steps=5, val_every=5)
    TrainConfig(max_steps=5, epochs=1, val_every=6).check_validated(6)
    for steps in (5, 3):
        with pytest.raises(ConfigError, match=f"there are {steps} steps, so nothing"):
            TrainConfig(epochs=1, val_every=6).check_validated(steps)
    with pytest.raises(ConfigError, match="there are 5 steps"):
        TrainConfig(max_steps=5, val_every=6)


def test_rows_leave_room_for_virtual_tokens(tmp_path: Path) -> None:
    """The model's places are read from its own folder; rows of classes carry their names."""
    places = json.loads((LLAMA / "config.json").read_text())["max_position_embeddings"]
    lengths = encoded(tmp_path / "all", limit=200).lengths
    longest = int(max(lengths))
    fits = encoded(tmp_path / "fits", limit=200, virtual=places - longest)
    assert fits.lengths.tolist() == lengths.tolist()
    shorter = [n for n in lengths if n < longest]
    assert 0 < len(shorter) < 200
    for name, more in (("virtual", places - longest + 1), ("max_length", longest - 1)):
        assert encoded(tmp_path / name, limit=200, **{name: more}).lengths.tolist() == shorter
    with pytest.raises(DataError, match="all 8 examples are longer than 2 tokens"):
        encoded(tmp_path / "none", limit=8, max_length=2)
    assert fits.classes is None


def test_a_validation_split_of_other_classes_is_refused(tmp_path: Path) -> None:
    inputs = {"model": Input(LLAMA, "llama")}
    for name, classes in (("rows", ["no", "yes"]), ("val_rows", ["no", "yes", "maybe"])):
        encoded(tmp_path / name, limit=8)
        (tmp_path / name / ABOUT).write_text(json.dumps({"classes": classes}))
        inputs[name] = Input(tmp_path / name, name)
    c = TrainConfig(max_steps=2, val_every=1)
    config = TrainStage(adapter=adapter(), train=c, runtime=CPU, classify=True, data_name="own")
    context = Context(Silent(), tmp_path / "unfinished")
    with pytest.raises(DataError, match=r"own: the validation split has the classes .*'maybe'"):
        train(config, inputs, tmp_path / "out", context)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_and_falls(schedule: str) -> None:
    c = TrainConfig(lr=2.0, schedule=schedule, warmup_ratio=0.25)
    rates = [learning_rate(c, step, 20) for step in range(20)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5] == 2.0
    half = learning_rate(replace(c, warmup_ratio=0.0), 10, 20)
    assert half == pytest.approx(2.0 if schedule == "constant" else 1.0)


def test_a_training_is_stale_after_so_many_validations_without_a_better_one() -> None:
    history = History(validations=[(0, 3.0), (5, 2.0), (10, 2.0), (15, 2.5)])
    assert [history.stale(n) for n in (None, 1, 2, 3)] == [False, True, True, False]
    assert history.best == (5, 2.0)
    assert not History().stale(1)


def test_what_a_training_says() -> None:
    result = TrainResult(
        steps=10,
        examples=40,
        train_loss=1.25,
        packed=True,
        accumulate=2,
        gradient_checkpointing=False,
        strategy="auto",
        devices=1,
        trainable=100,
        tokens=1000,
        tokens_per_second=99.6,
    )
    assert str(result) == "10 steps, loss 1.250 at the end; 100 tokens a second, packed"
    more = replace(result, packed=False, skipped=2, val_start=3.0, val_best=1.5, best_step=8)
    assert str(more) == (
        "10 steps, loss 1.250 at the end; validated: 3.000 at the start, 1.500 at step 8; 2 steps "
        "left out, their float16 gradients overflowed; 100 tokens a second, padded"
    )


class Killed(Silent):
    """Ends a training as Ctrl-C does, when it has come to step 5."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        if done == 5:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "precision"), [("ddp", "float32"), ("fsdp", "float16")])
def test_a_training_in_two_processes_goes_on_to_the_byte(
    strategy: str, precision: str, tmp_path: Path
) -> None:
    encoded(tmp_path / "rows", limit=8)
    inputs = {"model": Input(LLAMA, "llama"), "rows": Input(tmp_path / "rows", "rows")}
    c = TrainConfig(max_steps=6, batch_size=4, accumulate=2, save_every=2)
    runtime = Runtime(precision, devices=2, strategy=strategy)
    dropping = adapter("adapter=tiny", "adapter.dropout=0.2")
    config = TrainStage(adapter=dropping, train=c, runtime=runtime, devices=2)

    def run(name: str, watch: Silent) -> bytes:
        out, unfinished = tmp_path / name, tmp_path / f"{name}.unfinished"
        for folder in (out, unfinished):
            folder.mkdir(exist_ok=True)
        write_text(unfinished / BEGUN, "{}")
        train(config, inputs, out, Context(watch, unfinished))
        return (out / "adapter_model.safetensors").read_bytes()

    whole, watch = run("whole", Silent()), Silent()
    with pytest.raises(KeyboardInterrupt):
        run("broken", Killed())
    # the processes may have come to the next checkpoint before they were ended
    assert run("broken", watch) == whole
    assert any("goes on after step" in said for said in watch.said)


def test_stages_are_declared_without_torch() -> None:
    code = (
        "import sys, paw.data.encode, paw.training.train, paw.training.prefer, paw.training.checks;"
        "from paw import plugins; from paw.training import adapters;"
        "[adapters.method_named(name) for name in plugins.modules(adapters.FOLDER)];"
        "print({'torch', 'transformers', 'peft', 'trl', 'lightning_fabric'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
