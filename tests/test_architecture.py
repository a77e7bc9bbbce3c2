"""The house's directions: who may import whom, and that nothing heavy is imported before it is
needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import paw

PACKAGE = Path(paw.__file__).parent
LEAVES = {"errors", "paths", "plugins", "text"}
# Each part may import those left of it, and itself.
ORDER = [
    "config",
    "store",
    "graph",
    "models",
    "data",
    "evaluation",
    "training",
    "transfer",
    "refine",
    "generator",
    "export",
    "report",
    "tracking",
    "console",
    "launch",
    "cli",
    "sweeps",
    "serve",
    "tasks",
    "api",
    "run",
]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        found |= {n.split(".")[1] for n in names if n.startswith("paw.")}
    return found


def test_imports_point_one_way() -> None:
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in LEAVES:
            assert imports(file) <= LEAVES, file
        elif part in ORDER:
            allowed = LEAVES | set(ORDER[: ORDER.index(part) + 1])
            assert imports(file) <= allowed, f"{file} imports {imports(file) - allowed}"
        else:
            assert part == "__init__", f"{file} has no place in the order"


def test_checking_a_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys; from paw.run import checked; "
        "checked(['model@source=llama3_8b', 'model@target=qwen25_7b', 'hardware=a800x4']);"
        "print({'torch', 'transformers', 'lightning_fabric', 'peft', 'scipy'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


def test_no_file_names_a_machine() -> None:
    """No absolute path of somebody's machine in what is shipped."""
    for file in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent.parent / "conf").rglob("*.yaml")]:
        text = file.read_text()
        assert "/home/" not in text, file
        assert "/root/" not in text, file
