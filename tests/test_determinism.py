"""The same command gives the same bytes: every method in two processes that hash differently."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from conftest import Silent, move
from paw.cli.compose import compose_config
from paw.errors import TransferError
from paw.plugins import modules
from paw.store import Input
from paw.transfer import calibrate, configs, match, spoil
from paw.transfer.controls import real_method, shuffle_of, transfer_named
from paw.transfer.methods import METHODS
from test_transfer import RUNTIME, TEXT, few, models, random_adapter


def adapters(folder: Path) -> dict[str, str]:
    """The hash of every file of every method's adapter, figures and stamp."""
    # CKA and joined layers, so that these are compared, too.
    settings = ["transfer.layers=cka", "transfer.positions=200"]
    config = compose_config(settings)
    base = config.transfer
    adapter = {"adapter": Input(few(random_adapter("tiny_llama", folder / "adapter")), "adapter")}

    def made(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    @cache
    def seen(target: str, shuffle: int | None) -> dict[str, Input]:
        """Both models with what is known of them."""
        inputs, at = models("tiny_llama", target) | TEXT, f"{target}_{shuffle}"
        text = configs.text_config(base, RUNTIME, (False, False), shuffle)
        matched, moments = made(f"match_{at}"), made(f"moments_{at}")
        match.match(configs.match_config(base, text, None), inputs, matched, Silent())
        inputs["match"] = Input(matched, "match")
        stage = configs.calibrate_config(base, text)
        calibrate.calibrate(stage, inputs, moments, Silent())
        return inputs | {"moments": Input(moments, "moments")}

    @cache
    def moved(name: str, target: str) -> Path:
        c, out = transfer_named(name, base, seed=1), made(f"{name}_{target}")
        real, shuffle = real_method(c, base), shuffle_of(c)
        if real is not c and shuffle is None:
            spoilt = {"adapter": Input(moved(real.method, target), "moved")}
            spoil.spoil(configs.spoil_config(c), spoilt, out, Silent())  # type: ignore[arg-type]
            return out
        text = configs.text_config(real, RUNTIME, (False, False), shuffle)
        stage = configs.transfer_config(real, text, bases=None)
        move(stage, seen(target, shuffle) | adapter, out)
        return out

    found = {}
    for name in modules(METHODS):
        try:
            found[name] = moved(name, "tiny_qwen2")
        except TransferError:  # it takes equal shapes only
            found[name] = moved(name, "tiny_llama")
    return {
        f"{name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for name, out in found.items()
        for file in sorted(out.iterdir())
        if file.name != "paw.json"  # it names folders
    }


@pytest.mark.slow
def test_every_method_gives_the_same_bytes_again(tmp_path: Path) -> None:
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, __file__, str(folder)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert {key.split("/")[0] for key in found[0]} == set(modules(METHODS))
    assert [key for key, value in found[0].items() if found[1].get(key) != value] == []
    made = {v for key, v in found[0].items() if key.endswith("model.safetensors")}
    # Where no widths agree, frobenius is cross_lora; all others differ.
    assert len(made) == len(modules(METHODS)) - 1


if __name__ == "__main__":
    print(json.dumps(adapters(Path(sys.argv[1]))))
