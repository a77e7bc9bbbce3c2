"""Splits are found, broken files are named by line, tokens are cut where the context ends."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Silent
from paw.cli.compose import compose_config
from paw.data import encode as tokens
from paw.data.config import DatasetConfig
from paw.data.example import Example
from paw.data.load import examples, sample, split_file
from paw.data.tokenise import encode
from paw.errors import DataError, ModelError
from paw.models.load import load_tokenizer
from paw.paths import embedded
from paw.store import Input

ROW = {"id": "a", "question": "Why?", "choices": ["yes", "no"], "labels": ["A", "B"], "answer": "B"}


def test_the_hub_is_read_from_a_folder_in_its_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` reads a local folder as it reads a repository: parquet files by split."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("PAW_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "id": str(i),
            "question": "Why?",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "A",
        }
        for i in range(3)
    ]
    (tmp_path / "ai2_arc" / "ARC-Easy").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(
        str(tmp_path / "ai2_arc" / "ARC-Easy" / "test-00000-of-00001.parquet")
    )
    files = "  data_files:\n  - split: test\n    path: ARC-Easy/test-*\n"
    card = f"---\nconfigs:\n- config_name: ARC-Easy\n{files}---\n"
    (tmp_path / "ai2_arc" / "README.md").write_text(card)
    config = compose_config(["dataset=arc_easy", f"dataset.hub={tmp_path / 'ai2_arc'}"]).dataset
    file = split_file(config, "test", None, Silent())
    assert [e.id for e in examples(file, config, "test")] == ["0", "1", "2"]
    with pytest.raises(DataError, match="train"):
        split_file(config, "train", None, Silent())


def test_a_local_folder_comes_before_the_hub(tmp_path: Path) -> None:
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    config = DatasetConfig(name="arc_easy", hub="allenai/ai2_arc")
    assert split_file(config, "test", str(tmp_path), Silent()).parent.name == "arc_easy"
    with pytest.raises(DataError, match=r"has no split 'train'.*test\.jsonl"):
        split_file(config, "train", str(tmp_path), Silent())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: is not JSON"),
        (["[1]"], "line 1: is not an object"),
        ([json.dumps(ROW), json.dumps(ROW)], "line 2: the id 'a' occurs twice"),
        ([json.dumps(ROW | {"answer": "C"})], "line 1: the answer 'C' is not among the labels"),
        ([json.dumps(ROW | {"answer": None})], "line 1: the answer None"),
        ([json.dumps({"id": "a", "question": "Why?"})], "line 1: has no field 'choices'"),
        ([json.dumps(ROW | {"choices": None})], "line 1: is not of the form"),
        (
            [json.dumps(ROW | {"choices": ["yes"]})],
            "line 1: has 1 choices, but the answer is number 2",
        ),
        ([""], "has no usable rows"),
        ([json.dumps(ROW | {"choices": ["yes", " "]})], "line 1: choice 2 is empty"),
    ],
)
def test_broken_files_are_named_by_line(tmp_path: Path, lines: list[str], message: str) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        examples(file, DatasetConfig(name="own"), "test")


def test_bad_rows_are_left_out_and_counted_where_that_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    lines = [
        "{",
        json.dumps(ROW),
        json.dumps(ROW),
        json.dumps(ROW | {"id": "b", "answer": None}),
        json.dumps(ROW | {"id": "c"}),
    ]
    file.write_text("\n".join(lines) + "\n")
    skipped: Counter[str] = Counter()
    found = examples(file, DatasetConfig(name="own", bad_rows="skip"), "test", skipped=skipped)
    assert [(e.id, e.line) for e in found] == [("a", 2), ("c", 5)]
    assert skipped == {"not JSON": 1, "a second time the same id": 1, "no gold label": 1}


def test_a_file_may_hold_the_hubs_own_rows(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    row = {
        "id": "q",
        "question": "Why?",
        "choices": {"text": ["yes", "no"], "label": ["1", "2"]},
        "answerKey": "2",
    }
    file.write_text(json.dumps(row) + "\n")
    assert examples(file, compose_config(["dataset=arc_easy"]).dataset, "test")[
        0
    ].continuations == (" yes", " no")


def test_options_under_letters(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(ROW | {"labels": ["1", "2"], "answer": "2"}) + "\n")
    found = examples(file, DatasetConfig(name="own"), "test", form="letter")[0]
    assert found == Example("a", ("Question: Why?\nA. yes\nB. no\nAnswer:",) * 2, (" A", " B"), 1)
    assert found.solved().endswith("Answer: B")


def test_percentages_cut_a_split(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(ROW | {"id": str(i)}) + "\n" for i in range(10)))
    config = DatasetConfig(name="own")
    low, high = examples(file, config, "train[:90%]"), examples(file, config, "train[90%:]")
    assert [e.id for e in low + high] == [str(i) for i in range(10)]
    assert len(high) == 1


def test_samples_are_seeded_ordered_and_nested_in_the_split() -> None:
    found = [Example(str(i), ("c",), ("x",), 0) for i in range(40)]
    some = sample(found, 0.25, None, 0)
    assert len(some) == 10
    assert some == sample(found, 0.25, None, 0) != sample(found, 0.25, None, 1)
    assert [int(e.id) for e in some] == sorted(int(e.id) for e in some)
    assert len(sample(found, 1.0, 7, 0)) == 7
    assert sample(found, 0.001, None, 0)


def test_the_cut_is_where_the_context_ends(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    context, continuation = "question : what is the color of bovin ? answer :", " red"
    (row,) = encode(tokenizer, [(context, continuation)], chat=False)
    assert tokenizer.decode(row.ids[row.start :]) == continuation
    assert row.ids[0] == tokenizer.bos_token_id
    with pytest.raises(DataError, match="empty choice"):
        encode(tokenizer, [(context, " ")], chat=False)
    with pytest.raises(DataError, match="no chat template"):
        encode(tokenizer, [(context, continuation)], chat=True)


def test_a_chat_template_writes_its_own_special_tokens(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }} : {{ m['content'] }}{% endfor %} answer :"
    )
    (row,) = encode(tokenizer, [("why", " red")], chat=True)
    assert tokenizer.decode(row.ids) == "<s>user : why answer :red"
    assert list(row.ids).count(tokenizer.bos_token_id) == 1


def test_the_embedded_questions_share_no_entity_between_splits() -> None:
    config = compose_config(["dataset=facts"]).dataset
    entities = {}
    for split in ("train", "validation", "test"):
        found = examples(embedded("facts") / f"{split}.jsonl", config, split)
        entities[split] = {e.contexts[0].split()[7] for e in found}
    assert {k: len(v) for k, v in entities.items()} == {"train": 32, "validation": 8, "test": 56}
    assert not entities["train"] & entities["test"]
    assert not entities["train"] & entities["validation"]


def test_a_classifier_needs_the_same_classes_in_every_row(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    rows = [
        {"question": "a", "choices": c, "labels": ["x", "y"], "answer": "x"}
        for c in (["one", "two"], ["three", "four"])
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(
        DataError, match="line 2: its classes three, four are not those of the first row, one, two"
    ):
        examples(file, DatasetConfig(name="own"), "test", "classify")


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_conversations_end_as_the_template_ends_a_turn(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(embedded("tiny_llama"))
    tokenizer.add_special_tokens(
        {
            "eos_token": "</s>",
            "additional_special_tokens": ["<|assistant|>", "<|user|>", "<|system|>"],
        }
    )
    tokenizer.chat_template = TEMPLATE
    file = tmp_path / "train.jsonl"
    said = [
        ("system", "short"),
        ("user", "color"),
        ("assistant", "red"),
        ("user", "food"),
        ("assistant", "rice"),
    ]
    file.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in said]}) + "\n")
    (example,) = examples(file, compose_config(["dataset=own_chat"]).dataset, "train")
    (row,) = encode(
        tokenizer, [(example.contexts[0], example.continuations[0])], chat=False, close=True
    )
    end = tokenizer.eos_token
    assert tokenizer.decode(row.ids[row.start :]).replace(" ", "") == f"rice{end}"
    before = tokenizer.decode(row.ids[: row.start]).replace(" ", "")
    assert before.endswith("<|user|>food" + end + "<|assistant|>")
    assert "<|system|>short" in before
    assert "<|assistant|>red" in before
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode(tokenizer, [(example.contexts[0], example.continuations[0])], chat=False)


def test_closed_answers_end_with_the_end_token() -> None:
    tokenizer = load_tokenizer(embedded("tiny_llama"))
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    pair = ("question : what is the color of bovin ? answer :", " red")
    open_, closed = (
        encode(tokenizer, [pair], chat=False, close=close)[0] for close in (False, True)
    )
    assert closed.ids == (*open_.ids, tokenizer.eos_token_id)
    assert closed.start == open_.start


def test_rows_come_back_as_they_were_encoded(tmp_path: Path, watch: Any) -> None:
    config = compose_config(["dataset=facts"])
    stage = tokens.EncodeStage(
        dataset=config.dataset, split="train", form="likelihood", max_length=16
    )
    inputs = {
        "data": Input(embedded("facts") / "train.jsonl", "d"),
        "tokenizer": Input(embedded("tiny_llama"), "t"),
    }
    result = tokens.encode(stage, inputs, tmp_path, watch)
    found = examples(embedded("facts") / "train.jsonl", config.dataset, "train")
    plain = encode(
        load_tokenizer(embedded("tiny_llama")),
        [(e.contexts[e.gold], e.continuations[e.gold]) for e in found],
        False,
    )
    rows = tokens.Rows(tmp_path)
    short = [r for r in plain if len(r.ids) <= 16]
    assert 0 < len(short) < len(plain)
    assert [(rows[i].ids, rows[i].start) for i in range(len(rows))] == [
        (r.ids, r.start) for r in short
    ]
    assert result.left_out == {"more than 16 tokens": len(plain) - len(short)}
    assert "left out" in watch.said[0]
    with pytest.raises(DataError, match=r"all 128 examples are longer than 3 tokens"):
        tokens.encode(replace(stage, max_length=3), inputs, tmp_path, watch)


def test_an_example_has_the_places_that_virtual_tokens_leave(tmp_path: Path, watch: Any) -> None:
    """What the model has room for is known by its own files."""
    folder = tmp_path / "model"
    shutil.copytree(embedded("tiny_llama"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 20}
    (folder / "config.json").write_text(json.dumps(config))
    dataset = compose_config(["dataset=facts"]).dataset
    inputs = {
        "data": Input(embedded("facts") / "train.jsonl", "d"),
        "tokenizer": Input(folder, "t"),
    }
    stage = tokens.EncodeStage(dataset=dataset, split="train", form="likelihood")
    assert 16 < tokens.encode(stage, inputs, tmp_path, watch).longest <= 20
    stage = replace(stage, virtual=4)
    assert tokens.encode(stage, inputs, tmp_path, watch).longest == 16


def test_tokens_beyond_the_model_are_one_line_before_a_training(tmp_path: Path) -> None:
    """The embedded Qwen's library default for an end token is one that it has no embedding for."""
    (tmp_path / "data.jsonl").write_text('{"id": "a", "question": "Why?", "answer": "So."}\n')
    config = tokens.EncodeStage(
        dataset=DatasetConfig(name="own", kind="text"), split="data", form="likelihood", close=True
    )
    inputs = {
        "data": Input(tmp_path / "data.jsonl", "d"), "tokenizer": Input(embedded("tiny_qwen2"), "t")
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"has tokens beyond the model's 520"):
        tokens.encode(config, inputs, tmp_path, Silent())
