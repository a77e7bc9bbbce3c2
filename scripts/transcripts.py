"""What every task prints, for docs/tasks.md: python scripts/transcripts.py

Runs the commands of the document's ```console blocks, in their order, in one empty folder, and
writes what they print below them. A command that fails ends it with exit code 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "tasks.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Run = Callable[[str, str, Path], "subprocess.CompletedProcess[str]"]  # as `bash` does
LINES, TAIL = 26, 16  # of an output that are shown; of those, the last ones


def commands(block: str) -> list[str]:
    """The commands of a block: lines that begin with `$`."""
    return [line[2:] for line in block.splitlines() if line.startswith("$ ")]


def bash(before: str, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """
    Args:
        before: variables that earlier commands have set.
    """
    place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", f"{before}{command}"],
        cwd=folder, env={**os.environ, "PATH": place}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ran(document: str, folder: Path, run: Run = bash) -> Iterator[tuple[str, str]]:
    """Blocks as they stand in the document, and as they would stand now.

    Raises:
        RuntimeError: a command failed.
    """
    held = ""
    for found in BLOCK.finditer(document):
        text = ""
        for command in commands(found[1]):
            began = time.monotonic()
            done = run(held, command, folder)
            if done.returncode:
                raise RuntimeError(f"$ {command}\n{done.stdout}")
            if re.match(r"\w+=", command):
                held += f"{command}; "
            print(f"{time.monotonic() - began:6.1f} s  {command}", file=sys.stderr)
            text += f"$ {command}\n{_shown(done.stdout, folder)}"
        yield found[0], f"```console\n{text}```"


def _shown(output: str, folder: Path) -> str:
    """Without colours, without folders of this machine, and without the middle of what is long."""
    for place, name in ((folder, "."), (DOCUMENT.parent.parent, "paw"), (Path.home(), "~")):
        output = output.replace(str(place), name)
    lines = re.sub(r"\033\[\d*m", "", output).strip("\n").splitlines()
    if len(lines) > LINES:
        lines = [*lines[: LINES - TAIL], "…", *lines[-TAIL:]]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        try:
            for before, now in ran(text, Path(folder)):
                text = text.replace(before, now, 1)
        except RuntimeError as e:
            sys.exit(str(e))
        finally:  # what was run until a failure, too
            DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
