"""The documents: every command in them composes, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

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
        if file.name != "gpu.md":  # scripts/gpu.py writes it, of commands that it runs
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
