"""The documents: every command in them composes, every link leads somewhere, and what is made of
the code is what the code says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm
from conftest import ROOT
from paw.cli.compose import check, with_demo
from paw.errors import PawError

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"(?:python -m paw\.run|^ *(?:\$ )?paw)(?= |$|`)(?P<rest>[^`\n]*)", re.MULTILINE
)
# What a reader puts something else in the place of.
LEFT_OUT = re.compile(r"…|\$|GROUP=|KEY=|\[RUN|=a,b|-m model@source=a|--")
NAMES = ("DIR", "DATA", "FILE", "TEXT")


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every command of a document that can be read as it stands."""
    joined = re.sub(r"\\\n\s*", "", text)
    for match in COMMAND.finditer(joined):
        rest = re.split(r"\s#\s|\s#$|; | && |\\\|", match["rest"])[0].strip()
        if not LEFT_OUT.search(rest):
            try:
                yield shlex.split(rest)
            except ValueError:
                continue  # a sentence about it


def found() -> list[tuple[str, str]]:
    out = []
    for file in DOCUMENTS:
        # scripts/gpu.py and scripts/transcripts.py run the commands of these
        if file.name not in ("gpu.md", "tasks.md"):
            for arguments in commands(file.read_text(encoding="utf-8")):
                out.append((file.name, shlex.join(arguments)))
    return list(dict.fromkeys(out))


def test_there_are_commands_to_look_at() -> None:
    names = {name for name, _ in found()}
    assert {"README.md", "guide.md", "training.md", "generator.md", "refinement.md"} <= names
    assert len(found()) > 30


@pytest.mark.parametrize(("name", "command"), found())
def test_every_command_composes(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for placeholder in NAMES:
        (tmp_path / placeholder).mkdir()
    command = command.replace("=NAME", "=tiny_llama")
    arguments = [a for a in shlex.split(command) if a not in ("-m", "--multirun")]
    if any(a.startswith("hydra/sweeper=") for a in arguments):
        pytest.skip("Optuna's own sweep is not composed here")
    check(with_demo(arguments), sweep="-m" in command.split())


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("experiment=demmo", "demmo"),
        ("train.stepps=3", "stepps"),
        ("generator.pairing=any", "any"),
    ],
)
def test_a_broken_command_would_be_found(broken: str, says: str) -> None:
    [arguments] = commands(f"    python -m paw.run {broken}   # a comment")
    with pytest.raises(PawError, match=says):
        check(with_demo(arguments))


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.name)
def test_every_link_leads_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = file if not path else file.parent / path
        assert there.exists(), f"{file.name}: {target}"
        if anchor and there.suffix == ".md":
            heads = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}
            assert anchor in known, f"{file.name}: {target}"


def test_the_reference_of_keys_is_made_of_the_code() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "reference.py")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    held = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert held == made, "python scripts/reference.py > docs/configuration.md"
    for key in ("train.lr", "transfer.method", "hardware.precision", "tracker.csv.file"):
        assert f"| `{key}` " in made
    # words of a comment beside a field, of one above it, and what its class allows
    assert "examples per step and device" in made
    assert "passes over the data; decides instead of max_steps" in made
    assert "`auto`, `float32`, `bfloat16`, `float16`" in made


@pytest.mark.slow
def test_every_command_of_the_tasks_page_runs(tmp_path: Path) -> None:
    """In their order, in one folder; what they print is not compared: times are in it."""
    from transcripts import bash, ran

    def run(before: str, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        words = command.removeprefix("python -m paw.run ")
        if words == command or "||" in words:
            return bash(before, command, folder)
        asked = bash(before, f"printf '%s\\0' {words}", folder).stdout.split("\0")[:-1]
        done = warm.run(asked, folder)
        done.stdout += done.stderr
        return done

    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert list(ran(page, tmp_path, run))


def test_the_tasks_page_shows_what_was_printed() -> None:
    from transcripts import BLOCK, commands

    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    blocks = [found[1] for found in BLOCK.finditer(text)]
    assert len(blocks) > 15
    for block in blocks:
        assert len(block.splitlines()) > len(commands(block)), block
    assert "/tmp/" not in text


def test_a_transcript_is_made_of_what_is_run(tmp_path: Path) -> None:
    from transcripts import ran

    text = "before\n```console\n$ A=three\n$ echo $A; seq 40\nold\n```\nafter\n"
    [(before, now)] = ran(text, tmp_path)
    assert before in text
    lines = now.splitlines()
    assert lines[:5] == ["```console", "$ A=three", "$ echo $A; seq 40", "three", "1"]
    assert "…" in lines
    assert "old" not in lines
    assert lines[-2:] == ["40", "```"]
    with pytest.raises(RuntimeError, match="false"):
        list(ran("```console\n$ false\n```\n", tmp_path))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.read(ROOT / "examples" / "move_an_adapter.ipynb", as_version=4)
    client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": tmp_path}})
    client.execute()
    drawn = [o for cell in book.cells for o in cell.get("outputs", []) if "image/png" in str(o)]
    assert len(drawn) == 2
