"""How many faults the quick tests see:

    python benchmarks/mutation.py [--mutants 300] [--seed 0] [--again FILE] OUT.jsonl

Mutants are those of cosmic-ray's operators (pip install cosmic-ray pytest-cov), drawn at random: of
every file a share by its size, of every place in it one. Each is written into a copy of the
repository, and a process forked from one that has torch imported already runs the quick tests that
reach its lines, fastest first, up to the first that fails. Which tests reach which lines is
measured first, on code without a fault, and kept beside OUT. With --again the mutants of FILE that
survived are tried once more, after tests were added. Annotations are left alone, and so are the
tests of the command line, the configuration and the data, which start processes of their own: a
fault that only those see counts as unseen.

OUT has a line a mutant: where, what, and killed, survived, timeout, or unreached where no quick
test comes by.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parso
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).resolve().parent.parent
CODE = ("evaluation", "transfer", "store", "report", "training/batches.py")  # under src/paw
LEFT_OUT = (
    "test_config.py",
    "test_console.py",
    "test_data.py",
    "test_models.py",
    "test_architecture.py",
)
WARM = (
    "torch",
    "pytest",
    "hypothesis",
    "hydra",
    "peft",
    "lightning_fabric",
    "matplotlib.figure",
    "scipy.stats",
    "scipy.linalg",
    "statsmodels.stats.multitest",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.gemma3.modeling_gemma3",
)
LEAST = 3  # mutants of a file, at least, where it has so many places

Mutant = dict[str, Any]
Reach = dict[str, Any]  # lines: file to line to tests; seconds: test to how long it takes


# ---- which mutants -------------------------------------------------------------------------------


def places(code: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """Every mutation (operator, occurrence) by the place it is made at; none in an annotation."""
    skip = [
        ((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0))
        for node in ast.walk(ast.parse(code))
        for n in (
            getattr(node, "annotation", None),
            getattr(node, "returns", None),
            _typing_only(node),
        )
        if n is not None
    ]
    nodes, found = list(_nodes(parso.parse(code))), defaultdict(list)
    for name in OperatorProvider():
        if name in ("VariableReplacer", "VariableInserter"):
            continue  # they ask for a name
        operator = OperatorProvider()[name]()
        at = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(at):
            if not any(low <= start < high for low, high in skip):
                found[start].append((name, occurrence))
    return found


def _typing_only(node: ast.AST) -> ast.AST | None:
    """The condition of `if TYPE_CHECKING:`."""
    test = getattr(node, "test", None)
    return test if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING" else None


def _nodes(node: Any) -> Iterator[Any]:
    """In the order in which cosmic-ray's visitor counts."""
    yield node
    for child in getattr(node, "children", ()):
        yield from _nodes(child)


def drawn(count: int, seed: int) -> list[Mutant]:
    """So many mutants of CODE, one a place; every file has a share by its size, and a few at
    least."""
    files = [
        f
        for part in CODE
        for f in sorted([ROOT / "src/paw" / part, *(ROOT / "src/paw" / part).rglob("*.py")])
        if f.is_file()
    ]
    known = {file: places(file.read_text(encoding="utf-8")) for file in files}
    total, random_ = sum(map(len, known.values())), random.Random(seed)
    out = []
    for file, here in known.items():
        share = min(len(here), max(LEAST, round(count * len(here) / total)))
        for line, column in sorted(random_.sample(sorted(here), share)):
            operator, occurrence = random_.choice(here[line, column])
            out.append(
                {
                    "file": str(file.relative_to(ROOT)),
                    "line": line,
                    "operator": operator,
                    "occurrence": occurrence,
                }
            )
    return out


# ---- which tests ---------------------------------------------------------------------------------


def measured(copy: Path, memo: Path) -> Reach:
    """Which quick tests reach which lines, and how long they take, from a run under coverage."""
    if memo.is_file():
        return dict(json.loads(memo.read_text()))
    import coverage

    data = copy / "reach.data"
    (copy / "reach.ini").write_text(f"[run]\nsource = {copy}/src/paw\ndata_file = {data}\n")
    ignored = [f"--ignore=tests/{name}" for name in LEFT_OUT]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "not slow",
        "-vv",
        "--durations=0",
        "--durations-min=0",
        *ignored,
    ]
    command += ["--cov", f"--cov-config={copy}/reach.ini", "--cov-context=test", "--cov-report="]
    done = subprocess.run(
        command, cwd=copy, env={**os.environ, **_environment(copy)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return _read_reach(coverage.CoverageData(str(data)), done.stdout, copy, memo)


def _read_reach(data: Any, said: str, copy: Path, memo: Path) -> Reach:
    """What a fixture of a module reaches, every test of the file may have reached."""
    data.read()
    seconds: dict[str, float] = defaultdict(float)
    for line in said.splitlines():
        words = line.split(maxsplit=2)
        if len(words) == 3 and words[0].endswith("s") and words[1] in ("call", "setup"):
            seconds[words[2].strip()] += float(words[0][:-1])
    by_file = defaultdict(list)
    for test in seconds:
        by_file[test.partition("::")[0]].append(test)
    lines: dict[str, dict[str, list[str]]] = {}
    for file in data.measured_files():
        here = lines[str(Path(file).relative_to(copy))] = {}
        for number, contexts in data.contexts_by_lineno(file).items():
            tests = set()
            for test, _, phase in (c.rpartition("|") for c in contexts if c):
                tests.update([test] if phase == "run" else by_file[test.partition("::")[0]])
            here[str(number)] = sorted(tests)
    found = {"lines": lines, "seconds": seconds}
    memo.write_text(json.dumps(found))
    return found


def reaching(mutant: Mutant, reach: Reach) -> list[str]:
    """The tests that reach the statement of a mutant, fastest first; of one outside all functions
    those of its file."""
    here, seconds = reach["lines"].get(mutant["file"], {}), reach["seconds"]
    low, high, inside = _statement(
        (ROOT / mutant["file"]).read_text(encoding="utf-8"), mutant["line"]
    )
    wanted = range(low, high + 1) if inside else map(int, here)
    return sorted(
        {test for n in wanted for test in here.get(str(n), ())},
        key=lambda test: (seconds[test], test),
    )


def quickest(tests: list[str], reach: Reach, most: float) -> list[str]:
    """As many of them as take so many seconds; one at least."""
    total = list(itertools.accumulate(reach["seconds"][test] for test in tests))
    return [test for i, test in enumerate(tests) if i == 0 or total[i] <= most]


def _statement(code: str, line: int) -> tuple[int, int, bool]:
    """First and last line of the statement (of a compound one, of its head), and whether it runs
    only when called."""
    low, high, inside = line, line, False
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= (node.end_lineno or 0):
            continue
        body = getattr(node, "body", None)
        end = body[0].lineno - 1 if body else node.end_lineno or line
        if isinstance(node, ast.FunctionDef):
            inside |= bool(body) and line >= body[0].lineno
        if line <= max(end, node.lineno):
            low, high = node.lineno, max(end, node.lineno)
    return low, high, inside


# ---- tried ---------------------------------------------------------------------------------------


def tried(mutant: Mutant, tests: list[str], copy: Path, budget: float) -> Mutant:
    """What the tests say of a mutant, and how its lines read."""
    file, source = copy / mutant["file"], (ROOT / mutant["file"]).read_text(encoding="utf-8")
    code = MutationVisitor.mutate_code(
        source, OperatorProvider()[mutant["operator"]](), mutant["occurrence"]
    )
    changed = [
        i
        for i, (a, b) in enumerate(zip(source.splitlines(), code.splitlines(), strict=False))
        if a != b
    ]
    mutant = (
        {
            **mutant,
            "was": source.splitlines()[changed[0]].strip(),
            "is": code.splitlines()[changed[0]].strip(),
        }
        if changed
        else mutant
    )
    if not tests:
        return {**mutant, "outcome": "unreached"}
    file.write_text(code, encoding="utf-8")
    began = time.monotonic()
    try:
        outcome = _forked(tests, copy, budget)
    finally:
        file.write_text(source, encoding="utf-8")
    return {
        **mutant,
        "outcome": outcome,
        "tests": len(tests),
        "seconds": round(time.monotonic() - began, 1),
    }


def _forked(tests: list[str], copy: Path, budget: float) -> str:
    """killed, survived or timeout."""
    child = os.fork()
    if child == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        import pytest

        os.chdir(copy)
        sys.path[:0] = [str(copy / "src"), str(copy / "tests")]
        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:cov", "--tb=no", *tests]
        )
        os._exit(int(code))
    until = time.monotonic() + budget
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _environment(copy: Path) -> dict[str, str]:
    """No stale bytecode of a mutant, and one thread: a fork may not inherit a pool of them."""
    path = os.pathsep.join([str(copy / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def table(found: list[Mutant]) -> str:
    """Killed of all by part of the package; a mutant that never ends counts as killed."""
    groups = defaultdict(Counter)
    for m in found:
        for name in (
            "/".join(m["file"].split("/")[2:4])
            if "batches" in m["file"]
            else m["file"].split("/")[2],
            "all",
        ):
            groups[name][m["outcome"]] += 1
    lines = []
    for name, c in groups.items():
        dead = c["killed"] + c["timeout"]
        lines.append(f"{name:24} {dead:4} of {c.total():4}  {dead / c.total():.0%}  {dict(c)}")
    return "\n".join(sorted(lines, key=lambda line: line.startswith("all ")))


def main() -> None:
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("out", type=Path)
    ask.add_argument("--mutants", type=int, default=300)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument(
        "--again",
        type=Path,
        help="results of before: their survivors are tried again, the killed are kept",
    )
    ask.add_argument(
        "--most", type=float, default=60.0, help="seconds of tests a mutant, the fastest first"
    )
    said = ask.parse_args()
    before = (
        [json.loads(line) for line in said.again.read_text().splitlines()]
        if said.again
        else drawn(said.mutants, said.seed)
    )
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "paw"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__", ".*", "outputs"))
        reach = measured(copy, said.out.with_suffix(".reach.json"))
        os.environ |= _environment(copy)
        for name in WARM:
            importlib.import_module(name)
        from hypothesis import settings

        settings.register_profile("mutation", derandomize=True, deadline=None)
        settings.load_profile("mutation")
        gc.freeze()
        every = sorted(reach["seconds"], key=reach["seconds"].__getitem__)
        assert _forked(quickest(every, reach, said.most), copy, 600) == "survived", (
            "the tests fail without any fault"
        )
        found = []
        with open(said.out, "w", encoding="utf-8") as f:
            for n, mutant in enumerate(before, 1):
                if mutant.get("outcome") not in ("killed", "timeout"):
                    mutant = tried(
                        mutant,
                        quickest(reaching(mutant, reach), reach, said.most),
                        copy,
                        30 + 3 * said.most,
                    )
                found.append(mutant)
                f.write(json.dumps(mutant) + "\n")
                f.flush()
                print(
                    f"{n}/{len(before)} {mutant['outcome']:9} {mutant['file']}:{mutant['line']} "
                    f"{mutant.get('is', '')}",
                    flush=True,
                )
    print(table(found))


if __name__ == "__main__":
    main()
