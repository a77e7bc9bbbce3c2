"""Many processes, one store: what is shared is made once, whoever is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from paw.store import MANIFEST, journal

ROUNDS = 20


@pytest.mark.slow
def test_processes_that_are_killed_leave_every_artifact_made_once(tmp_path: Path) -> None:
    """Sixteen processes, twenty rounds, 24 kills at random moments in each."""
    lost = 0  # makings whose process was killed
    for seed in range(ROUNDS):
        store = tmp_path / f"store{seed}"
        command = [sys.executable, str(Path(__file__).with_name("race.py")), str(store), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"round {seed}: {done.stderr}"
        results = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(results) == 16
        assert all(one == results[0] for one in results)
        assert results[0]["2.0"] == 100 + (10 + 1 + 2) + (11 + 2 + 3)
        notes = journal.read(store)
        made = Counter(note["key"] for note in notes if note["what"] == "made")
        assert set(made.values()) == {1}, f"round {seed}: made twice"
        finished = {n["key"]: n["time"] for n in notes if n["what"] == "made"}
        began = [n for n in notes if n["what"] == "began"]
        assert all(n["time"] <= finished.get(n["key"], n["time"]) for n in began)
        lost += len(began) - len(made)
        folders = [f for f in (store / "add").iterdir() if f.is_dir()]
        assert len(folders) == 12, f"round {seed}: {[f.name for f in folders]}"
        assert all(
            (f / MANIFEST).is_file()
            and (f / "again.txt").read_text() == (f / "sum.txt").read_text()
            for f in folders
        )
    assert lost > 3 * ROUNDS
