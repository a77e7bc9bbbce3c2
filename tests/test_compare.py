"""Any two runs side by side: their questions matched, their differences judged with every comparison counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Paw
from paw.errors import ConfigError, DataError
from paw.report.compare import adjust, compare, difference, verdict
from paw.report.records import Recorded, file_names, paired, read_run


def records(right: list[bool], shift: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            "id": str(i),
            "gold": 0,
            "correct": r,
            "loglikelihoods": [-1.0 + shift * (i % 3), -2.0],
            "tokens": [1, 1],
        }
        for i, r in enumerate(right)
    ]


def test_a_difference_that_one_test_shows_and_many_do_not() -> None:
    """30 wins and 14 losses: p = .02 alone, nothing among five comparisons."""
    before = Recorded("base", records([False] * 30 + [True] * 14 + [True] * 56))
    after = Recorded("adapter", records([True] * 30 + [False] * 14 + [True] * 56))
    one = compare(after, before)
    assert (one["gained"], one["lost"], one["of"]) == (30, 14, "accuracy")
    assert one["low"] > 0
    assert 0.01 < one["p"] < 0.05
    adjust([one])
    assert verdict(one) == 1
    assert "after Holm" not in difference(one)
    many = [dict(one) for _ in range(5)]
    adjust(many)
    assert {verdict(m) for m in many} == {0}
    assert "after Holm" in difference(many[0])


def test_harm_and_likelihood() -> None:
    before, after = (
        Recorded("base", records([True] * 60)),
        Recorded("adapter", records([False] * 60, shift=-0.5)),
    )
    found = [compare(after, before), compare(after, before, by_likelihood=True)]
    adjust(found)
    assert [verdict(f) for f in found] == [-1, -1]
    assert [f["of"] for f in found] == ["accuracy", "log-likelihood"]
    assert found[1]["difference"] == pytest.approx(-0.5)
    same = compare(before, before)
    adjust([same])
    assert (same["difference"], same["p"], verdict(same)) == (0.0, 1.0, 0)


def test_only_shared_questions_are_compared() -> None:
    a, b = Recorded("a", records([True] * 5)), Recorded("b", records([True] * 8)[::-1])
    x, y = paired(a, b)
    assert [r["id"] for r in x.records] == [r["id"] for r in y.records] == list("01234")
    with pytest.raises(DataError, match="no question in common"):
        paired(a, Recorded("c", [r | {"id": "x" + r["id"]} for r in b.records]))
    with pytest.raises(DataError, match="another answer for question 0"):
        paired(a, Recorded("c", [r | {"gold": 1} for r in b.records]))


def test_files_of_records(tmp_path: Path) -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    names = ["target + random", "target/random", "é"]
    assert file_names([Named(n) for n in names], "jsonl") == [  # type: ignore[arg-type]
        "records/target_random.jsonl",
        "records/target_random-2.jsonl",
        "records/system.jsonl",
    ]
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: is no record"):
        read_run(str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match="no run folder"):
        read_run(str(tmp_path))


@pytest.mark.slow
def test_two_runs_compared_from_the_command_line(paw: Paw, tmp_path: Path) -> None:
    common = ["task=evaluate", "dataset=facts", "evaluate.limit=60"]
    paw(*common, "models=[tiny_llama]", "name=a", "evaluate.records=parquet")
    paw(*common, "models=[tiny_qwen2]", "name=b")
    paw(
        *common,
        "models=[tiny_qwen2]",
        'dataset.prompt="truth : question : {question} answer :"',
        "name=c",
    )
    a, b, c = (str(next((tmp_path / "outputs" / "runs").glob(f"*_{n}"))) for n in "abc")
    assert (Path(a) / "records" / "tiny_llama.parquet").is_file()
    assert len((Path(b) / "records" / "tiny_qwen2.jsonl").read_text().splitlines()) == 60
    said = paw("task=compare", f"runs=[{a},{b}]").stdout
    assert "no significant difference" in said
    said = paw("task=compare", f"runs=[{b},{c}]", "name=d").stdout
    assert "| above" in said
    found = json.loads(next((tmp_path / "outputs" / "runs").glob("*_d/compare.json")).read_text())
    assert [f["of"] for f in found] == ["accuracy", "log-likelihood"]
    assert found[0]["low"] > 0.3
    assert found[0]["p"] < 1e-6
    assert np.isfinite(found[1]["difference"])
    wrong = paw("task=compare", f"runs=[{a}]", ok=False)
    assert wrong.returncode == 2
    assert "one system only" in wrong.stderr
    wrong = paw("task=compare", ok=False)
    assert wrong.returncode == 2
    assert "runs=[RUN_A,RUN_B]" in wrong.stderr
