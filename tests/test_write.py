"""Text that a base writes, where nobody gave one to calibrate on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import Silent
from paw.cli.compose import compose_config
from paw.errors import TransferError
from paw.models.load import Runtime, load_tokenizer
from paw.paths import embedded
from paw.store import Context, Input
from paw.tasks import transfer
from paw.transfer import write
from paw.transfer.model_pair import ModelPair, TextConfig

LLAMA, QWEN, RUNTIME = embedded("tiny_llama"), embedded("tiny_qwen2"), Runtime("float32")


def written(model: Path, out: Path, positions: int) -> list[str]:
    out.mkdir()
    config = write.WriteStage(positions=positions, runtime=RUNTIME)
    result = write.write(config, {"model": Input(model, "model")}, out, Context(Silent()))
    texts = (out / write.FILE).read_text().splitlines()
    assert result == write.WriteResult(texts=len(texts), words=len(" ".join(texts).split()))
    return texts


def test_it_writes_what_it_has_learnt_each_text_once(tmp_path: Path) -> None:
    texts = written(LLAMA, tmp_path / "some", 2000)
    assert len(texts) == len(set(texts))
    assert 2000 <= len(" ".join(texts).split()) < 2000 + write.ROUND * write.LENGTH
    known = {w for line in (embedded("facts") / "calibration.txt").open() for w in line.split()}
    words = " ".join(texts).split()
    assert sum(word in known for word in words) > 0.9 * len(words)
    assert sum("the color of" in text for text in texts) > 10
    more = written(LLAMA, tmp_path / "more", 9000)
    assert more[: len(texts)] == texts, "a text depends on nothing but its number"


def test_both_models_are_run_on_it(tmp_path: Path) -> None:
    texts = written(QWEN, tmp_path / "text", 300)
    known = ModelPair(
        TextConfig(runtime=RUNTIME, positions=300),
        {
            "source": Input(LLAMA, "source"),
            "target": Input(QWEN, "target"),
            "calibration": Input(tmp_path / "text", "text"),
        },
    )
    assert known.positions == 300
    first = load_tokenizer(LLAMA)(texts[0], truncation=True, max_length=512).input_ids
    assert known.texts[0].source == first


def test_the_source_writes_where_there_is_no_text() -> None:
    def steps(*asked: str) -> list[str]:
        c = compose_config(["task=transfer", "dataset=facts", "adapter.path=/nowhere", *asked])
        moved = transfer.build(c).first[0]
        found = [moved.inputs["moved"].inputs["calibration"]]  # type: ignore[union-attr]
        return [node.name for node in found]

    assert steps() == [f"text {embedded('facts')}/calibration.txt"]
    assert steps("dataset.calibration=null") == ["text that tiny_llama writes"]
    assert steps("dataset.calibration=null", "transfer.calibration=a.txt") == ["text a.txt"]


def test_a_base_that_cannot_begin_or_go_on_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute = tmp_path / "mute"
    shutil.copytree(LLAMA, mute)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (mute / name).is_file():
            kept = json.loads((mute / name).read_text())
            (mute / name).write_text(
                json.dumps({k: v for k, v in kept.items() if k not in ("bos_token", "eos_token")})
            )
    with pytest.raises(TransferError, match=r"no token that begins a text.*calibration=FILE"):
        written(mute, tmp_path / "none", 10)
    monkeypatch.setattr(write, "LENGTH", 1)  # of its words it has a few hundred
    with pytest.raises(TransferError, match=r"are empty or there already.*calibration=FILE"):
        written(LLAMA, tmp_path / "few", 10**6)
