"""What predict reads, writes and goes on with; and what is refused before anything is evaluated."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Silent
from paw.cli.compose import compose_config
from paw.errors import AdapterError, ConfigError, DataError, PawError
from paw.evaluation import checks
from paw.evaluation.config import EvaluateConfig, PredictConfig
from paw.evaluation.devices import Engines
from paw.evaluation.evaluate import EvaluateStage, evaluate
from paw.evaluation.model import Model
from paw.evaluation.predict import Asked, Prediction, read
from paw.evaluation.records import read_records
from paw.models.load import Runtime
from paw.paths import embedded
from paw.store import Context, Input

LLAMA = Input(embedded("tiny_llama"), "tiny_llama")
FACTS = embedded("facts")


def texts(file: Path, content: str) -> list[Asked]:
    file.write_text(content)
    return read(PredictConfig(file=str(file)))


def test_texts_are_read_from_all_that_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = read(PredictConfig(text="a"))
    assert (one.id, one.shown) == ("1", "a")
    found = texts(tmp_path / "asked.txt", "a\n\nb\n")
    assert [(a.id, a.shown) for a in found] == [("1", "a"), ("3", "b")]
    rows = '{"id": 7, "question": "a"}\n{"messages": []}\n'
    found = texts(tmp_path / "asked.jsonl", rows)
    assert [(a.id, a.shown) for a in found] == [("7", "a"), ("2", '{"messages": []}')]
    monkeypatch.setattr(sys, "stdin", io.StringIO(rows))
    assert [(a.id, a.row) for a in read(PredictConfig(file="-"))] == [(a.id, a.row) for a in found]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("\n", "holds no text"),
        ("{\n", "line 1: is not JSON"),
        ("[1]\n", "line 1: is not an object"),
        ('{"id": 2}\n{"id": 1}\n{}\n{"id": 1}', "line 4: the id '1' occurs twice"),
    ],
)
def test_what_cannot_be_read_is_named(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        texts(tmp_path / "asked.jsonl", content)


def prediction(output: Path | None, mode: str = "likelihood", **more: Any) -> Prediction:
    model = Model(
        base=LLAMA,
        adapter=None,
        runtime=Runtime("float32"),
        trust_remote_code=False,
        engines=Engines(),
        watch=Silent(),
    )
    config = PredictConfig(output=str(output) if output else None, **{"max_new_tokens": 4} | more)
    dataset = compose_config(["dataset=facts"]).dataset
    return Prediction(model=model, mode=mode, dataset=dataset, config=config)


def test_a_file_that_was_cut_off_is_continued(tmp_path: Path) -> None:
    asked = read(PredictConfig(file=str(FACTS / "test.jsonl")))[:20]
    file = tmp_path / "new" / "out.jsonl"
    lines = prediction(file).run(asked)
    whole = file.read_text()
    assert whole == "".join(lines)
    assert [json.loads(line)["id"] for line in lines] == [a.id for a in asked]
    assert prediction(None).run(asked) == lines
    file.write_text(whole[: len(whole) // 2])
    again = prediction(file)
    left = again.run(asked)
    assert 0 < len(left) < 20
    assert set(left) < set(lines)
    assert file.read_text() == whole
    assert isinstance(again.model.watch, Silent)
    assert again.model.watch.said == [f"{file}: goes on after {20 - len(left)} of 20 texts"]
    assert prediction(file).run(asked) == []
    with pytest.raises(DataError, match=r"line 1 of .* answers none of these texts"):
        prediction(file).run(asked[1:])
    assert file.read_text() == whole


def test_what_is_predicted_is_what_an_evaluation_has_written(tmp_path: Path) -> None:
    """Also where its questions stand in other batches."""
    c = compose_config(["dataset=facts", "evaluate.mode=generate", "evaluate.max_new_tokens=4"])
    c.dataset.letter_prompt = c.dataset.prompt
    stage = EvaluateStage(
        dataset=c.dataset, split="test", evaluate=c.evaluate, runtime=Runtime("float32")
    )
    inputs = {"model": LLAMA, "data": Input(FACTS / "test.jsonl", "data")}
    evaluate(stage, inputs, tmp_path, Context(Silent()))
    asked = read(PredictConfig(file=str(FACTS / "test.jsonl")))
    found = [json.loads(line) for line in prediction(None, batch_size=7).run(asked)]
    wanted = [(r["id"], r["text"].strip()) for r in read_records(tmp_path)]
    assert [(r["id"], r["output"]) for r in found] == wanted


def test_texts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    asked = texts(tmp_path / "asked.txt", "short\n" + "long " * 3000)
    with pytest.raises(DataError, match=r"line 2: needs \d+ tokens, the model has room for 256"):
        prediction(None).run(asked)
    row = [Asked("1", {"text": "a"}, "here")]
    with pytest.raises(DataError, match=r"here: has no field 'question', which dataset.prompt"):
        prediction(None).run(row)
    assert len(prediction(None, raw=True).run(row)) == 1


def adapter(folder: Path, stamp: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "paw.json").write_text(json.dumps(stamp))
    return folder


def test_what_can_be_known_before_a_run_is_said(tmp_path: Path) -> None:
    own, text = (
        compose_config(["task=train", f"dataset={n}"]).dataset for n in ("own", "own_text")
    )
    head = adapter(tmp_path / "head", {"classes": ["a", "b"]})
    plain = adapter(tmp_path / "plain", {})
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))

    def asked(mode: str, shots: int = 0) -> EvaluateConfig:
        return EvaluateConfig(mode=mode, num_fewshot=shots)

    nowhere = PredictConfig(file=str(tmp_path / "none"))
    refused: list[tuple[type[PawError], str, Any, tuple[Any, ...]]] = [
        (ConfigError, "own_text has no choices", checks.check_mode, (asked("letter"), text)),
        (ConfigError, "needs a data set with labels", checks.check_mode, (asked("classify"), text)),
        (ConfigError, "takes no shots", checks.check_mode, (asked("classify", 2), own)),
        (ConfigError, "encoder is an encoder", checks.check_model, ("generate", encoder)),
        (ConfigError, "say what is asked", checks.check_asked, (PredictConfig(),)),
        (ConfigError, "say what is", checks.check_asked, (PredictConfig(text="a", file="-"),)),
        (ConfigError, "none is no file", checks.check_asked, (nowhere,)),
        (ConfigError, "a base has no head", checks.check_predictor, ("classify", None)),
        (ConfigError, "is a classifier", checks.check_predictor, ("letter", head)),
        (AdapterError, "which classes its head", checks.check_predictor, ("classify", plain)),
    ]
    for error, said, check, given in refused:
        with pytest.raises(error, match=said):
            check(*given)
    for mode in ("likelihood", "letter", "generate", "classify"):
        checks.check_mode(asked(mode), own)
    checks.check_mode(asked("generate", 2), text)
    checks.check_model("classify", encoder)
    checks.check_model("generate", LLAMA.path)
    checks.check_asked(PredictConfig(file="-"))
    for mode, folder in (("classify", head), ("letter", plain), ("likelihood", None)):
        checks.check_predictor(mode, folder)


def test_a_mode_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a package that is not paw's."""
    folder = tmp_path / "guesses" / "evaluation" / "modes"
    folder.mkdir(parents=True)
    (tmp_path / "guesses" / "__init__.py").write_text("")
    (folder / "last.py").write_text(
        "from paw.evaluation.modes import likelihood\n"
        "from paw.evaluation.modes.letter import form, metrics\n"
        "def answer(asking):\n"
        "    n = len(likelihood.encoded(asking)[1][0])\n"
        "    return [likelihood.record(q, list(range(n)), [1] * n) for q in asking.questions]\n"
    )
    with pytest.raises(ConfigError, match="classify, generate, letter, likelihood"):
        EvaluateConfig(mode="last")
    monkeypatch.setenv("PAW_PLUGINS", str(tmp_path / "guesses"))
    c = compose_config(["dataset=facts", "evaluate.mode=last", "evaluate.limit=9"])
    assert (c.evaluate.form("question"), EvaluateConfig(mode="generate").form("chat")) == (
        "letter",
        "likelihood",
    )
    stage = EvaluateStage(
        dataset=c.dataset, split="test", evaluate=c.evaluate, runtime=Runtime("float32")
    )
    inputs = {"model": LLAMA, "data": Input(FACTS / "test.jsonl", "data")}
    result = evaluate(stage, inputs, tmp_path, Context(Silent()))
    assert (result.n, [r["prediction"] for r in read_records(tmp_path)]) == (9, [7] * 9)


def test_the_stage_is_known_without_anything_heavy() -> None:
    code = (
        "import sys; from paw.evaluation.evaluate import STAGE; import paw.evaluation.predict;"
        "print({'torch', 'transformers', 'peft', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
