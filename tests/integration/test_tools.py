"""predict, validate, compress, prefer: real runs on the embedded pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import PRECISION, Launch, Paw
from paw.errors import ConfigError, DataError
from paw.paths import embedded

pytestmark = pytest.mark.slow
TRUTH = embedded("facts") / "test.jsonl"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapter: tiny_llama tells the truth."""
    from paw.cli.compose import compose_config
    from paw.tasks import dispatch

    folder = tmp_path_factory.mktemp("adapter")
    dispatch(
        compose_config(
            [
                PRECISION,
                "task=train",
                f"paths.outputs={folder}",
                "train.max_steps=120",
                "evaluate.limit=1",
            ]
        ),
        [],
    )
    return next((folder / "runs").iterdir()) / "adapters" / "source"


def test_predict_answers_what_the_model_itself_writes(
    adapter: Path, paw: Paw, tmp_path: Path
) -> None:
    from peft import PeftModel

    ask = ["task=predict", "experiment=demo", f"adapter.path={adapter}", "predict.max_new_tokens=4"]
    done = paw(*ask, "predict.text=what is the color of bovin ?")
    (row,) = map(json.loads, done.stdout.splitlines())
    assert (row["id"], row["input"]) == ("1", "what is the color of bovin ?")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(str(embedded("tiny_llama"))), str(adapter)
    )
    tokenizer = AutoTokenizer.from_pretrained(str(embedded("tiny_llama")))
    ids = tokenizer(
        "question : what is the color of bovin ? answer :", return_tensors="pt"
    ).input_ids
    written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert row["output"] == text.split(" .")[0].strip()  # the data set's stop string


def test_predict_goes_on_where_it_was_killed(adapter: Path, launch: Launch, tmp_path: Path) -> None:
    ask = [
        "task=predict",
        "experiment=demo",
        f"adapter.path={adapter}",
        "predict.max_new_tokens=3",
        f"predict.file={TRUTH}",
        "predict.output=out.jsonl",
    ]
    assert launch(*ask) == 224
    whole = Path("out.jsonl").read_text()
    rows, answers = (
        [json.loads(x) for x in TRUTH.read_text().splitlines()],
        [json.loads(x) for x in whole.splitlines()],
    )
    assert [r["id"] for r in rows] == [a["id"] for a in answers]
    gold = [r["choices"][r["labels"].index(r["answer"])] for r in rows]
    assert sum(a["output"].startswith(g) for a, g in zip(answers, gold, strict=True)) > 0.9 * 224
    Path("out.jsonl").write_text(whole[: len(whole) // 2])  # in the middle of a line
    left = launch(*ask)
    assert isinstance(left, int)
    assert 100 < left < 124
    assert Path("out.jsonl").read_text() == whole
    assert launch(*ask) == 0
    with pytest.raises(DataError, match="answers none of these texts"):
        launch(*[a for a in ask if "predict.file" not in a], "predict.text=another question")
    assert Path("out.jsonl").read_text() == whole


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "predict.text=TEXT, or predict.file"),
        (["predict.text=a", "predict.file=b"], "predict.text=TEXT, or predict.file"),
        (["predict.file=nowhere.txt"], "is no file"),
        (["predict.text=a", "evaluate.mode=classify"], "a base has no head"),
        (["predict.text=a", 'dataset.prompt="{passage}"'], "no field 'passage'"),
    ],
)
def test_predict_says_what_is_wrong(more: list[str], said: str, launch: Launch) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        launch("task=predict", "experiment=demo", *more)


def test_validate_counts_what_fails_and_fetches_nothing(paw: Paw) -> None:
    done = paw("task=validate", "experiment=demo")
    assert "none failed" in done.stdout
    assert "224 examples" in done.stdout
    assert "GiB a device" in done.stdout
    wrong = paw(
        "task=validate",
        "experiment=demo",
        "adapter.target_modules=[q_prj]",
        "model@source=qwen25_7b",
        ok=False,
    )
    assert wrong.returncode == 2
    assert "Did you mean q_proj?" in wrong.stdout
    assert "the hub does not show Qwen/Qwen2.5-7B" in wrong.stdout
    assert "2 of 20 checks failed" in wrong.stderr
    everything = paw("task=validate", "everything=true")
    assert "none failed" in everything.stdout
    assert "| experiment=server" in everything.stdout
    assert "| adapter=p_tuning" in everything.stdout


def test_compress_merges_quantises_and_evaluates_before_and_after(
    adapter: Path, launch: Launch, tmp_path: Path
) -> None:
    launch("task=compress", "experiment=demo", f"adapter.path={adapter}")
    run = next(Path("outputs/runs").iterdir())
    before, after = json.loads((run / "results.json").read_text())["systems"]
    assert (before["accuracy"], after["accuracy"]) == (
        pytest.approx(after["accuracy"], abs=0.05),
        pytest.approx(1, abs=0.05),
    )
    assert after["versus"][0]["versus"] == "tiny_llama_merged"
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    size, small = (
        sum(f.stat().st_size for f in p.glob("*.safetensors"))
        for p in (embedded("tiny_llama"), run / "model")
    )
    assert small < 0.5 * size


def test_preferences_move_the_model_to_the_better_answer(launch: Launch, tmp_path: Path) -> None:
    rows = [json.loads(x) for x in (embedded("facts") / "train.jsonl").read_text().splitlines()]
    with open("pairs.jsonl", "w") as f:
        for row in rows:
            right = row["choices"][row["labels"].index(row["answer"])]
            wrong = next(c for c in row["choices"] if c != right)
            pair = {
                "prompt": f"question : {row['question']} answer :",
                "chosen": f" {right}",
                "rejected": f" {wrong}",
            }
            f.write(json.dumps(pair) + "\n")
    ask = [
        "task=prefer",
        "model@source=tiny_llama",
        "dataset=own_preferences",
        "dataset.path=pairs.jsonl",
        "adapter=tiny",
    ]
    launch(*ask, "train.max_steps=40", "train.batch_size=16", "train.lr=1e-3")
    (stage,) = Path("outputs/artifacts/prefer").glob("*/stage.json")
    curve = [json.loads(line) for line in (stage.parent / "curve.jsonl").read_text().splitlines()]
    assert curve[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # adapter and reference are the same
    assert json.loads(stage.read_text())["result"]["accuracy"] > 0.9
    adapter = next(Path("outputs/runs").iterdir()) / "adapters" / "source"
    launch("task=evaluate", "models=[tiny_llama]", f"adapters=[{adapter}]", "dataset=facts")
    run = max(Path("outputs/runs").iterdir(), key=lambda p: p.stat().st_mtime)
    _, tuned = json.loads((run / "results.json").read_text())["systems"]
    assert tuned["versus"][0]["low"] > 0.1
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    with pytest.raises(DataError, match="line 1: both answers are the same"):
        launch(*ask)
