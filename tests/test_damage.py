"""A damaged artifact is never a result: it is named, set aside and made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from conftest import Silent
from paw.errors import StageError
from paw.store import Artifact, Context, Input, Stage, Store
from paw.store.fingerprint import stamp
from paw.transfer.bases import Bases


@dataclass
class Config:
    size: int = 1000


@dataclass(frozen=True)
class Result:
    accuracy: float


STAGE = Stage("work", "1", "test_damage:work", config=Config, result=Result)


def work(config: Config, inputs: Mapping[str, Input], out: Path, context: Context) -> Result:
    (out / "weights.safetensors").write_bytes(bytes(range(250)) * (config.size // 250))
    (out / "report.png").write_bytes(b"a picture, which no later stage reads")
    return Result(accuracy=0.5)


def flip(file: Path, at: int = 7) -> None:
    """One bit of one byte."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def go(root: Path, watch: Silent, verify: bool = False) -> Artifact:
    """As a command of its own would ask."""
    return Store(root, verify=verify).run(STAGE, Config(), {}, watch)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "report.png"])
def test_it_is_named_set_aside_and_made_again(
    damage: Callable[[Path], None], name: str, tmp_path: Path, watch: Silent
) -> None:
    first = go(tmp_path, watch)
    before = (first.path / "weights.safetensors").read_bytes()
    assert go(tmp_path, watch).reused
    damage(first.path / name)
    again = go(tmp_path, watch)
    assert not again.reused
    assert (again.path, again.content) == (first.path, first.content)
    assert (again.path / "weights.safetensors").read_bytes() == before
    (said,) = watch.said
    assert f"damaged ({name})" in said
    assert str(first.path) in said
    (aside,) = first.path.parent.glob("*.damaged-*")
    assert aside.name in said
    assert go(tmp_path, watch).reused


def test_a_number_changed_in_a_manifest_is_seen(tmp_path: Path, watch: Silent) -> None:
    done = go(tmp_path, watch)
    manifest = done.path / "stage.json"
    manifest.write_text(manifest.read_text().replace('"accuracy": 0.5', '"accuracy": 0.9'))
    again = go(tmp_path, watch)
    assert not again.reused
    assert again.result == Result(accuracy=0.5)
    assert "damaged (stage.json)" in watch.said[0]


def test_a_disk_that_flips_a_bit_in_silence_is_caught_on_request(
    tmp_path: Path, watch: Silent
) -> None:
    """Neither size nor time says that anything happened: only reading all of it does."""
    done = go(tmp_path, watch)
    file = done.path / "weights.safetensors"
    assert go(tmp_path, watch).reused  # its content is remembered by now
    known = (tmp_path / ".content" / stamp(file)).read_text()
    flip(file)
    (tmp_path / ".content" / stamp(file)).write_text(
        known
    )  # no time can be set back: as if none had moved
    assert go(tmp_path, watch).reused
    assert not go(tmp_path, watch, verify=True).reused


def test_a_copied_store_is_whole(tmp_path: Path, watch: Silent) -> None:
    """New times and inodes: read once, and found to be the same."""
    import shutil

    go(tmp_path / "here", watch)
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy)
    assert go(tmp_path / "there", watch).reused
    assert not watch.said


def test_a_damaged_artifact_is_no_input(tmp_path: Path, watch: Silent) -> None:
    done = go(tmp_path, watch)
    flip(done.path / "weights.safetensors")
    with pytest.raises(StageError, match=r"is damaged \(weights.safetensors\)"):
        Store(tmp_path).file(done.path)


@pytest.mark.parametrize("damage", [lambda file: flip(file, -5), truncate])
def test_a_damaged_basis_is_computed_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    weight = torch.randn(40, 1100, generator=torch.Generator().manual_seed(0))
    bases = Bases(tmp_path, "model")
    first = bases.of("q_proj", (40, 1100), 8, lambda: weight, "cpu")
    (file,) = tmp_path.glob("*.safetensors")
    damage(file)
    again = bases.of("q_proj", (40, 1100), 8, lambda: weight, "cpu")
    assert torch.equal(again.v, first.v)
    assert torch.equal(again.u, first.u)


def test_another_file_in_the_place_of_one_is_another(tmp_path: Path) -> None:
    """Archives unpack files with the times that they had, and file systems use inodes again."""
    import os

    store, found = Store(tmp_path / "store"), set()
    for i in range(8):
        folder = tmp_path / f"adapter_{i}"
        folder.mkdir()
        file = folder / "adapter.safetensors"
        file.write_bytes(bytes([i]) * 4096)
        os.utime(file, ns=(10**18, 10**18))
        found.add(store.file(folder).fingerprint)
        file.unlink()
    assert len(found) == 8


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"key": 1}'])
def test_what_is_no_manifest_is_no_result_and_no_input(
    text: str, tmp_path: Path, watch: Silent
) -> None:
    done = go(tmp_path, watch)
    (done.path / "stage.json").write_text(text)
    with pytest.raises(StageError, match=r"is damaged \(stage.json\)"):
        Store(tmp_path).file(done.path)
    assert not go(tmp_path, watch).reused
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stage.json").write_text(text)  # somebody else's file of that name
    assert Store(tmp_path / "store").file(tmp_path / "mine").path == tmp_path / "mine"
