"""A package outside paw adds a method, a PEFT method, data and a stage with its task, by new files
only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import ROOT, Paw
from paw import plugins
from paw.errors import ConfigError

PLUGIN = ROOT / "tests" / "plugin" / "flips"
USED = {"PAW_PLUGINS": str(PLUGIN)}


def test_its_choices_stand_beside_paws_own(paw: Paw) -> None:
    shown = paw("--help", env=USED).stdout
    for choice in ("flipped", "narrow", "backwards", "riddles", "census"):
        assert choice in shown, choice
        assert choice not in paw("--help").stdout
    wrong = paw("transfer=fliped", env=USED, ok=False).stderr
    assert "Did you mean flipped?" in wrong


@pytest.mark.slow
def test_one_of_each_is_used_without_a_list_being_edited(paw: Paw, tmp_path: Path) -> None:
    """A method and a PEFT method in a pipeline, a kind of data, and a stage with its task."""
    quick = ["train.max_steps=5", "evaluate.limit=10", "transfer.controls=[]"]
    paw("experiment=demo", "transfer=flipped", "adapter=narrow", *quick, env=USED)
    [run] = (tmp_path / "outputs" / "runs").iterdir()
    adapter = json.loads((run / "adapters" / "target_flipped" / "adapter_config.json").read_text())
    assert adapter["r"] == 1
    configured = json.loads((run / "adapters" / "target_flipped" / "paw.json").read_text())
    assert configured["config"]["shrink"] == 0.5

    done = paw("task=census", "dataset=backwards", "name=census", env=USED)
    assert "computed  count facts: 224 rows," in done.stdout
    again = paw("task=census", "dataset=backwards", env=USED)
    assert "reused    count facts" in again.stdout
    other = paw("task=census", "dataset=facts", "census.letters=z", env=USED)
    assert "computed  count facts" in other.stdout
    text = "".join(
        file.read_text()
        for file in (tmp_path / "outputs" / "artifacts" / "count").glob("*/text.txt")
    )
    assert "is what" in text
    wrong = paw("task=train", "census.letters=x", env=USED, ok=False)
    assert "census: only task=census takes it" in wrong.stderr
    forced = paw("task=census", "dataset=facts", "census.letters=z", "force=[count]", env=USED)
    assert "computed  count facts" in forced.stdout


@pytest.mark.slow
def test_a_data_set_is_a_yaml_alone(paw: Paw, tmp_path: Path) -> None:
    (tmp_path / "data" / "riddles").mkdir(parents=True)
    row = {"riddle": "what is wet ?", "first": "water", "second": "fire", "solution": "a"}
    (tmp_path / "data" / "riddles" / "test.jsonl").write_text(json.dumps(row) + "\n")
    ask = ["task=evaluate", "models=[tiny_llama]", "dataset=riddles", "paths.data_dir=data"]
    paw(*ask, env=USED)
    [run] = (tmp_path / "outputs" / "runs").iterdir()
    [records] = (run / "records").iterdir()
    assert len(json.loads(records.read_text())["loglikelihoods"]) == 2


def test_what_is_no_package_is_said(paw: Paw, tmp_path: Path) -> None:
    wrong = paw("seed=1", env={"PAW_PLUGINS": str(tmp_path)}, ok=False)
    assert wrong.returncode == 2
    assert "is no package: it has no __init__.py" in wrong.stderr


def test_a_plugins_file_goes_before_paws_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = tmp_path / "mine" / "data" / "kinds"
    kinds.mkdir(parents=True)
    (tmp_path / "mine" / "__init__.py").touch()
    (kinds / "winogrande.py").touch()
    monkeypatch.setenv("PAW_PLUGINS", str(tmp_path / "mine"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugins.modules("data/kinds")["winogrande"] == "mine.data.kinds.winogrande"
    monkeypatch.delenv("PAW_PLUGINS")
    assert plugins.modules("data/kinds")["winogrande"] == "paw.data.kinds.winogrande"
    with pytest.raises(ConfigError, match="Did you mean winogrande"):
        plugins.load("data/kinds", "winogrand", "dataset.kind")
