"""What a transfer needs is known of its configuration; the rest its stages find in their inputs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Silent, move
from paw.cli.compose import compose_config
from paw.errors import ConfigError, TransferError
from paw.models.adapters import read_adapter
from paw.store import Input, Store, content
from paw.transfer import calibrate, configs, gate, match, spoil, transfer
from paw.transfer.checks import check_calibration, check_controls, check_transfer
from paw.transfer.config import TransferConfig
from paw.transfer.controls import methods, real_method, shuffle_of, transfer_named
from paw.transfer.evidence import MOMENTS, Moments, Text, WeightsOnly, evidence
from paw.transfer.gate import GateStage
from paw.transfer.model_pair import calibration_file
from test_transfer import RUNTIME, TEXT, TINY, models, random_adapter, text


def config(*ask: str) -> TransferConfig:
    return compose_config(ask).transfer


def test_moments_that_do_not_fit_are_not_kept_and_the_text_is_run_again(tmp_path: Path) -> None:
    random_adapter("tiny_llama", tmp_path / "adapter")
    inputs = models("tiny_llama", "tiny_qwen2") | TEXT
    inputs["adapter"] = Input(tmp_path / "adapter", "adapter")
    c, found = config("transfer.positions=300"), []
    for memory, kind in ((8.0, Moments), (0.003, Text)):
        out, moved = tmp_path / f"moments{memory}", tmp_path / f"out{memory}"
        out.mkdir()
        moved.mkdir()
        stage = calibrate.CalibrateStage(text=text(300), memory_gb=memory)
        said = calibrate.calibrate(stage, inputs, out, Silent())
        assert said.kept is (out / MOMENTS).is_file() is (kind is Moments)
        assert ("none are kept" in str(said)) is not said.kept
        assert content(out, tmp_path / "memo")  # a store keeps either
        known = inputs | {"moments": Input(out, "moments")}
        less = replace(c, memory_gb=memory)
        seen = evidence(text(300), known, memory_gb=memory, device="cpu", watch=Silent())
        assert type(seen) is kind
        what = transfer.TransferStage(transfer=less, text=text(300), runtime=RUNTIME)
        move(what, known, moved)
        found.append(read_adapter(moved))
    for name, one in found[0].items():
        two = found[1][name]
        assert torch.allclose(one.b @ one.a, two.b @ two.a, atol=1e-4), name


def test_a_method_that_runs_the_models_needs_a_text() -> None:
    inputs = models("tiny_llama", "tiny_qwen2")
    none = evidence(None, inputs, memory_gb=8.0, device="cpu", watch=Silent())
    assert isinstance(none, WeightsOnly)
    with pytest.raises(TransferError, match="needs activations"):
        none.models()


NEEDS = {  # text, moments, match
    (): (True, True, False),
    ("transfer=cross_lora",): (True, True, False),  # for the gain
    ("transfer=cross_lora", "transfer.gain=weight"): (False, False, False),
    ("transfer=cross_lora", "transfer.gain=1", "transfer.layers=cka"): (True, False, True),
    ("transfer.layers=similarity",): (True, True, True),
    ("transfer=shift",): (True, False, False),
}


@pytest.mark.parametrize("ask", NEEDS)
def test_what_goes_before_a_transfer_is_known_of_its_configuration(ask: tuple[str, ...]) -> None:
    """Nothing that it names is there."""
    c = config(*ask)
    assert (configs.needs_text(c), configs.needs_moments(c), configs.needs_match(c)) == NEEDS[ask]
    said = configs.text_config(c, RUNTIME, (True, False), shuffle=3)
    assert (said.positions, said.shuffle) == (c.positions, 3)
    moved = configs.transfer_config(c, said, bases=None)
    assert moved.text == (said if c.uses_text else None)
    assert moved.trust == (True, False)
    gated = configs.gate_config(replace(c, similarity_threshold=0.5), name="owner/name")
    assert (gated.name, gated.transfer.similarity_threshold) == ("owner/name", 0.5)
    assert moved.transfer == configs.transfer_config(gated.transfer, said, bases=None).transfer
    matched = configs.match_config(c, said, bases=None)
    assert (matched.text is None) is (c.layers == "similarity")
    if matched.text is not None:
        assert (matched.text.positions, matched.text.shuffle) == (512, None)


def test_a_method_stands_before_its_controls_and_their_draws() -> None:
    ask = ["transfer.draws=2", "transfer.controls=[ridge,random,shuffled,negated,procrustes]"]
    chosen = config(*ask)
    found = methods(chosen, seed=7)
    assert [(c.method, getattr(c, "seed", None), shuffle_of(c)) for c in found] == [
        ("procrustes", None, None),
        ("ridge", None, None),
        ("random", 7, None),
        ("random", 1007, None),
        ("shuffled", 7, 7),
        ("shuffled", 1007, 1007),
        ("negated", 7, None),
    ]
    assert [real_method(c, chosen).method for c in found] == ["procrustes", "ridge"] + 5 * [
        "procrustes"
    ]


def test_the_text_is_the_users_or_the_data_sets_or_paws() -> None:
    bare = replace(compose_config(["dataset=arc_easy"]).dataset, calibration=None)
    ones_own = replace(bare, calibration="b.txt")
    assert calibration_file(config("transfer.calibration=a.txt"), ones_own) == Path("a.txt")
    assert calibration_file(config(), ones_own) == Path("b.txt")
    lines = calibration_file(config(), bare).read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines))
    assert all(len(line.split()) > 4 for line in lines)
    assert sum(len(line.split()) for line in lines) > config().positions


def test_what_is_wrong_is_said_before_a_run(tmp_path: Path) -> None:
    dataset = compose_config([]).dataset
    for key, c, d in (
        ("transfer", config("transfer.calibration=/nowhere"), dataset),
        ("dataset", config(), replace(dataset, calibration="/nowhere")),
    ):
        with pytest.raises(ConfigError, match=rf"{key}\.calibration: /nowhere is no file"):
            check_calibration(c, d)
    check_calibration(config(), replace(dataset, calibration=str(TEXT["calibration"].path)))
    with pytest.raises(ConfigError, match=r"transfer=shuffled: cross_lora looks at no text"):
        check_controls(config("transfer=cross_lora", "transfer.controls=[shuffled]"))
    with pytest.raises(ConfigError, match="transfer=shuffled: copy looks at no text"):
        check_controls(config("transfer=shuffled", "transfer.reference=copy"))
    check_controls(config("transfer=shift", "transfer.controls=[shuffled,sign_random]"))
    random_adapter("tiny_qwen2", tmp_path / "adapter")
    qwen, llama = TINY["tiny_qwen2"], TINY["tiny_llama"]
    check_transfer(tmp_path / "adapter", qwen, llama, [])
    with pytest.raises(TransferError, match="does not fit the source"):
        check_transfer(tmp_path / "adapter", llama, qwen, [])


def test_a_package_elsewhere_adds_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A placebo of its own with a schema of its own, by new files only."""
    root = tmp_path / "elsewhere"
    (root / "transfer" / "methods").mkdir(parents=True)
    (root / "conf" / "transfer").mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "conf" / "transfer" / "halved.yaml").write_text("method: halved\nseed: ${seed}\n")
    (root / "transfer" / "methods" / "halved.py").write_text(
        "from paw.transfer.methods import Placebo\n"
        "METHOD = Placebo(spoil=lambda a, b, _: (a, b / 2), drawn=False,\n"
        "                 applies=lambda real: real.method == 'ridge')\n"
    )
    monkeypatch.setenv("PAW_PLUGINS", str(root))
    assert "halved" not in config("transfer.controls=standard").controls
    chosen = config("transfer=ridge", "transfer.controls=standard")
    assert "halved" in chosen.controls
    c: Any = transfer_named("halved", chosen, 3)
    assert (c.reference, c.seed) == ("ridge", 3)


def test_methods_and_stages_are_read_without_torch() -> None:
    code = (
        "import sys; from paw.plugins import modules; from paw.transfer import checks, configs;"
        "from paw.transfer.methods import METHODS, method_named;"
        "[method_named(name).schema for name in modules(METHODS)];"
        "print({'torch', 'transformers', 'numpy', 'peft', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_result_is_a_line_and_is_restored(tmp_path: Path) -> None:
    random_adapter("tiny_llama", tmp_path / "adapter")
    c = config("transfer=cross_lora", "transfer.gain=weight", "transfer.similarity=weights")
    store = Store(tmp_path / "store")
    inputs = {side: store.file(input.path) for side, input in models(*TINY).items()}
    inputs["adapter"] = store.file(tmp_path / "adapter")
    what = transfer.TransferStage(transfer=c, text=None, runtime=RUNTIME)
    moved, again = (store.run(transfer.STAGE, what, inputs, Silent()) for _ in range(2))
    assert (moved.reused, again.reused, moved.result) == (False, True, again.result)
    assert str(moved.result).startswith("35 pairs of modules; similarity 1.")
    gated = inputs | {"moved": moved.as_input()}
    made, again = (store.run(gate.STAGE, GateStage(transfer=c), gated, Silent()) for _ in range(2))
    assert (made.reused, again.reused, made.result) == (False, True, again.result)
    assert str(made.result).startswith("35 modules, 100% of the adapter; modules left by threshold")
    assert ": 35 at 0.0001, " in str(made.result)
    spoilt = store.run(
        spoil.STAGE,
        spoil.SpoilStage(method="negated", seed=0),
        {"adapter": made.as_input()},
        Silent(),
    )
    assert (spoilt.result.coverage, spoilt.result.of) == (1.0, "cross_lora")
    for stage in (match.STAGE, calibrate.STAGE, transfer.STAGE, gate.STAGE, spoil.STAGE):
        module, _, name = stage.function.partition(":")
        assert callable(getattr(sys.modules[module], name))
    explained = replace(moved.result, r2_in=0.5, r2_out=0.25)
    assert "; maps explain 0.50 in, 0.25 out" in str(explained)
