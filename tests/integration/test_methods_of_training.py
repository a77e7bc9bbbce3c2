"""Every method of PEFT on answers and on classes: each learns, loads in stock PEFT, merges where it
can, and says why where not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import words
from conftest import ADAPTERS, Launch
from paw.errors import AdapterError
from paw.models.load import Runtime, load_classifier, load_model
from paw.paths import embedded

pytestmark = pytest.mark.slow
METHODS = ["tiny", *ADAPTERS]
VIRTUAL = ("prompt_tuning", "prefix_tuning", "p_tuning")


def train(launch: Launch, *args: str) -> tuple[Path, dict[str, Any]]:
    """The adapter's folder in the run, and what its training says of itself."""
    launch("task=train", *args)
    run = max(Path("outputs/runs").iterdir(), key=lambda p: p.stat().st_mtime)
    systems = json.loads((run / "results.json").read_text())["systems"]
    stage = json.loads((Path(systems[-1]["artifacts"]["train"]) / "stage.json").read_text())
    return run / "adapters" / "source", stage["result"] | {"systems": systems}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the trainings: what they have in common is made once."""
    return f"paths.artifacts={tmp_path_factory.mktemp('store')}"


@pytest.mark.parametrize("method", METHODS)
def test_on_answers(method: str, launch: Launch, tmp_path: Path, shared: str) -> None:
    steps = 80 if method in ("adalora", "dora") else 40
    adapter, found = train(
        launch,
        shared,
        f"adapter={method}",
        f"train.max_steps={steps}",
        "train.val_every=20",
        "evaluate.limit=60",
    )
    assert found["val_best"] < 0.97 * found["val_start"]
    assert found["packed"] == (method not in VIRTUAL and method != "lora_8bit")
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
        "paw.json",
    } <= {p.name for p in adapter.iterdir()}

    # stock PEFT, on the base that it was evaluated on, gives the loss that paw reports
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        load_model(embedded("tiny_llama"), Runtime("float32")), str(adapter)
    )
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    record = json.loads(
        (tmp_path / found["systems"][-1]["artifacts"]["evaluate"] / "records.jsonl")
        .read_text()
        .splitlines()[0]
    )
    rows = [
        json.loads(line) for line in (embedded("facts") / "test.jsonl").read_text().splitlines()
    ]
    row = next(r for r in rows if r["id"] == record["id"])
    context = tokenizer(f"question : {row['question']} answer :").input_ids
    for choice, expected in list(zip(row["choices"], record["loglikelihoods"], strict=True))[:3]:
        ids = context + tokenizer(f" {choice}", add_special_tokens=False).input_ids
        logits = model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)
        ).logits[0]
        logprobs = logits[-len(ids) :].log_softmax(-1)
        assert sum(
            logprobs[i - 1, ids[i]].item() for i in range(len(context), len(ids))
        ) == pytest.approx(expected, abs=2e-4)

    if method in VIRTUAL:
        with pytest.raises(AdapterError, match="virtual tokens"):
            launch("task=merge", f"adapter.path={adapter}")
        return
    launch("task=merge", f"adapter.path={adapter}", "name=merged")
    merged = AutoModelForCausalLM.from_pretrained(
        str(next((tmp_path / "outputs" / "runs").glob("*_merged")) / "model")
    )
    result = json.loads(
        next((tmp_path / "outputs" / "artifacts" / "merge").glob("*/stage.json")).read_text()
    )["result"]
    assert result["merged"] < 1e-3 * result["largest_logit"]
    ids = torch.tensor([context])
    difference = float((merged(ids).logits - model(ids).logits).abs().max().detach())
    # merged into the base that it was trained on: that of 4 or 8 bits, dequantised
    if method in ("qlora", "lora_8bit"):
        assert 0 < result["dequantised"] < 0.2 * result["largest_logit"]
        assert difference > 1e-2
    else:
        assert difference < 1e-3 * result["largest_logit"]


@pytest.mark.parametrize("method", METHODS)
def test_in_sixteen_bits(method: str, launch: Launch, shared: str) -> None:
    """As in 32, but for rounding: where it starts, and what the adapter is worth on questions that
    were not trained."""
    steps = 20 if method == "adalora" else 6
    # int8 takes outliers by rows, and so packs in one precision and not in another: other examples
    # in a step
    more = ["train.packing=false"] if method == "lora_8bit" else []
    # at its own learning rate p-tuning jumps about on this model, where rounding decides which way
    more += ["train.lr=1e-4"] if method == "p_tuning" else []
    found = {}
    # float16 differs from bfloat16 by the scale of gradients alone, which plain LoRA shows, and
    # p-tuning where they overflow
    halves = {"bfloat16": 0.02} | ({"float16": 0.01} if method in ("tiny", "p_tuning") else {})
    for precision in ("float32", *halves):
        ask = [
            shared,
            f"adapter={method}",
            f"train.max_steps={steps}",
            "train.batch_size=8",
            "evaluate.limit=12",
            *more,
        ]
        _, result = train(
            launch, "hardware=cpu", f"hardware.precision={precision}", f"name={precision}", *ask
        )
        curve = Path(result["systems"][-1]["artifacts"]["train"]) / "curve.jsonl"
        found[precision] = (
            json.loads(curve.read_text().splitlines()[0])["loss"],
            result["systems"][-1]["loss"],
        )
    for precision, slack in halves.items():
        # p-tuning's gradients overflow at the scale that float16 starts with, and such steps are
        # left out
        kept = 1 if (method, precision) == ("p_tuning", "float16") else 2
        assert found[precision][:kept] == pytest.approx(found["float32"][:kept], rel=slack), (
            precision
        )


def test_adalora_allots_its_ranks(launch: Launch, tmp_path: Path) -> None:
    adapter, _ = train(
        launch,
        "adapter=adalora",
        "adapter.r=4",
        "adapter.init_r=8",
        "train.max_steps=60",
        "evaluate.limit=1",
    )
    shapes = {
        k: v.shape[0]
        for k, v in load_file(adapter / "adapter_model.safetensors").items()
        if "lora_A" in k
    }
    assert set(Counter(shapes.values())) != {8}
    assert len(set(shapes.values())) > 1  # more where it matters more
    assert sum(shapes.values()) == 4 * len(shapes)  # the budget
    pattern = json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
    assert {sum(map(bool, kept)) for kept in pattern.values()} == set(shapes.values())


@pytest.fixture(scope="module")
def lexicon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words.write(tmp_path_factory.mktemp("words") / "classes")


def classify(*args: str) -> list[str]:
    model = [f"source.path={words.encoder()}", "source.name=minilm"]
    train = ["train.batch_size=16", "train.val_limit=100"]
    return [
        "evaluate.mode=classify",
        "dataset=own",
        "dataset.val_split=validation",
        *train,
        *model,
        *args,
    ]


# A head trains with all that `test_on_answers` trains; rsLoRA and 8 bits are LoRA to it.
@pytest.mark.parametrize("method", ["lora", *sorted({*ADAPTERS} - {"rslora", "lora_8bit"})])
def test_on_classes(
    method: str, launch: Launch, tmp_path: Path, lexicon: Path, shared: str
) -> None:
    steps = 20 if method in ("dora", "adalora", "ia3", "prefix_tuning") else 60  # that it takes
    ask = classify(
        shared,
        f"adapter={method}",
        f"dataset.path={lexicon}",
        f"train.max_steps={steps}",
        f"train.val_every={steps // 2}",
        "evaluate.limit=150",
    )
    adapter, found = train(launch, *ask)
    blind, system = found["systems"]
    assert blind["system"] == "majority-class baseline"
    assert found["val_best"] < found["val_start"]
    assert system["loss"] < blind["loss"]
    if method in ("lora", "qlora"):
        assert system["versus"][0]["low"] > 0.1
        assert {"f1", "precision", "recall", "mcc"} <= system.keys()
    # stock PEFT on the library's own classifier, its head taken from the adapter
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        load_classifier(Path(words.encoder()), Runtime("float32"), ["negative", "positive"])[0],
        str(adapter),
    )
    tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    records = (
        (tmp_path / system["artifacts"]["evaluate"] / "records.jsonl").read_text().splitlines()
    )
    rows = [json.loads(line)["text"] for line in (lexicon / "test.jsonl").read_text().splitlines()]
    for record in map(json.loads, records[:5]):
        logits = (
            model(**tokenizer(rows[int(record["id"]) - 1], return_tensors="pt"))
            .logits[0]
            .log_softmax(-1)
        )
        assert logits.tolist() == pytest.approx(record["loglikelihoods"], abs=1e-4)


def test_a_classifier_merges_predicts_and_refuses_other_classes(
    launch: Launch, tmp_path: Path, lexicon: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = classify(
        "adapter=lora", f"dataset.path={lexicon}", "train.max_steps=60", "evaluate.limit=100"
    )
    adapter, _ = train(launch, *ask)
    launch("task=merge", f"adapter.path={adapter}", "name=merged", *ask)
    merged = next((tmp_path / "outputs" / "runs").glob("*_merged")) / "model"
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(str(merged)),
        AutoTokenizer.from_pretrained(str(merged)),
    )
    assert model.config.id2label == {0: "negative", 1: "positive"}
    (tmp_path / "asked.txt").write_text(
        "horrible\nwonderful\n\nthe worst thing that I have ever seen\n"
    )
    capsys.readouterr()
    launch("task=predict", f"adapter.path={adapter}", "predict.file=asked.txt", *ask)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["id"], r["output"]) for r in found] == [
        ("1", "negative"),
        ("2", "positive"),
        ("4", "negative"),
    ]
    for row in found:
        p = model(**tokenizer(row["input"], return_tensors="pt")).logits.softmax(-1)[0].tolist()
        assert list(row["scores"].values()) == pytest.approx(p, abs=1e-4)

    three = [
        {**json.loads(line), "choices": ["a", "b", "c"], "labels": ["n", "p", "x"]}
        for line in (lexicon / "test.jsonl").read_text().splitlines()
    ]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in three))
    with pytest.raises(AdapterError, match=r"2 classes \(negative, positive\), the data has 3"):
        launch(
            "task=evaluate",
            *ask,
            f"adapters=[{adapter}]",
            "dataset.path=three.jsonl",
            "target.path=" + words.encoder(),
        )


def test_values_are_found_by_regression(launch: Launch, tmp_path: Path) -> None:
    folder = words.write(tmp_path / "values", values=True)
    _, found = train(
        launch,
        *classify(
            "adapter=lora", f"dataset.path={folder}", "train.max_steps=80", "evaluate.limit=300"
        ),
    )
    blind, system = found["systems"]
    assert (blind["pearson"], blind["accuracy"]) == (0.0, None)
    assert system["spearman"] > 0.5
    assert system["loss"] < 0.7 * blind["loss"]  # mean squared error against that of the mean


def test_a_decoder_classifies(launch: Launch, tmp_path: Path) -> None:
    """Is a fact's question about a colour? Its words are the model's own."""
    for split in ("train", "test", "validation"):
        rows = [
            json.loads(line)
            for line in (embedded("facts") / f"{split}.jsonl").read_text().splitlines()
        ]
        with open(tmp_path / f"{split}.jsonl", "w") as f:
            for r in rows:
                kind = {
                    "labels": ["0", "1"],
                    "choices": ["other", "colour"],
                    "answer": str(int(" color " in r["question"])),
                }
                f.write(json.dumps({"id": r["id"], "question": r["question"], **kind}) + "\n")
    ask = [
        "model@source=tiny_llama",
        "adapter=tiny",
        "dataset=own",
        f"dataset.path={tmp_path}",
        "evaluate.mode=classify",
    ]
    _, found = train(
        launch,
        *ask,
        "dataset.val_split=validation",
        "train.max_steps=60",
        "train.val_every=30",
        "train.batch_size=16",
    )
    assert found["val_best"] < 0.5 * found["val_start"]
    assert found["systems"][1]["accuracy"] > 0.95
