"""Rows of the hub become what the harness would score: by dataset.fields, or by a kind's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Silent
from paw.cli.compose import compose_config
from paw.data import hub
from paw.data.config import DatasetConfig
from paw.data.example import Example
from paw.data.fields import FieldsConfig, sentences
from paw.data.kinds import Kind, kind_named, normalised, question
from paw.data.load import check_apart, examples, find_split, preferences, split_file
from paw.errors import ConfigError, DataError
from paw.store import plain

ARC = {"text": ["yes", "no"], "label": ["1", "2"]}
PAIR = {"sentence1": "A b. ", "sentence2": "C d.", "idx": 3}
SAID = "Sentence 1: A b. \nSentence 2: C d.\nQuestion: "
PROMPT = "Question: {}\nAnswer:"
# A data set, a row as the hub has it, and its example: id, context, continuations, gold.
ROWS: list[tuple[str, dict[str, Any], tuple[str, str, tuple[str, ...], int]]] = [
    (
        "arc_easy",
        {"id": "q", "question": "Why? ", "choices": ARC, "answerKey": "2"},
        ("q", PROMPT.format("Why? "), (" yes", " no"), 1),
    ),
    (
        "arc_challenge",
        {"id": "q", "question": "Why?", "choices": ARC, "answerKey": "1"},
        ("q", PROMPT.format("Why?"), (" yes", " no"), 0),
    ),
    (
        "commonsense_qa",
        {"id": "q", "question": " Why? ", "choices": ARC, "answerKey": "1"},
        ("q", PROMPT.format("Why?"), (" yes", " no"), 0),
    ),
    (
        "openbookqa",
        {"id": "q", "question_stem": "Fire is", "choices": ARC, "answerKey": "2 "},
        ("q", "Fire is", (" yes", " no"), 1),
    ),
    (
        "piqa",
        {"goal": "Open it", "sol1": "pull", "sol2": "push ", "label": 1},
        ("1", PROMPT.format("Open it"), (" pull", " push "), 1),
    ),
    (
        "boolq",
        {"passage": "P -- p.", "question": "is it", "answer": True},
        ("1", "P -- p.\nQuestion: is it?\nAnswer:", (" no", " yes"), 1),
    ),
    (
        "boolq",
        {"passage": "p", "question": "is it", "idx": 4, "label": 0},
        ("1", "p\nQuestion: is it?\nAnswer:", (" no", " yes"), 0),
    ),
    (
        "social_iqa",
        {"context": "Al ran.", "question": "Why?", "label": "3\n"}
        | {f"answer{x}": x.lower() for x in "ABC"},
        ("1", "Q: Al ran. Why?\nA:", (" a", " b", " c"), 2),
    ),
    (
        "hellaswag",
        {"activity_label": "Cooking", "ctx_a": "A man [x]stirs.", "ctx_b": "he", "label": "1"}
        | {"endings": ["eats [title] Then [step] rests  .", "goes"]},
        ("1", "Cooking: A man stirs. He", (" eats. Then rests .", " goes"), 1),
    ),
    ("gsm8k", {"question": "1+1?", "answer": "2"}, ("1", PROMPT.format("1+1?"), (" 2",), 0)),
    ("metamath_qa", {"query": "1+1?", "response": "2"}, ("1", PROMPT.format("1+1?"), (" 2",), 0)),
    (
        "code_feedback",
        {"id": 7, "messages": [{"role": r, "content": r[0]} for r in ("user", "assistant", "x")]},
        ("7", "u\n", (" a",), 0),
    ),
    (
        "mrpc",
        PAIR | {"label": 1},
        ("3", f"{SAID}Do both sentences mean the same thing?\nAnswer:", (" no", " yes"), 1),
    ),
    (
        "rte",
        PAIR | {"label": 0},
        ("3", "A b. \nQuestion: C d. True or False?\nAnswer:", (" True", " False"), 0),
    ),
    (
        "qqp",
        {"question1": "A?", "question2": "B?", "label": 0, "idx": 3},
        (
            "3",
            "Question 1: A?\nQuestion 2: B?\nQuestion: Do both questions ask the same thing?\n"
            "Answer:",
            (" no", " yes"),
            0,
        ),
    ),
    (
        "sst2",
        {"sentence": "fine film ", "label": 1, "idx": 3},
        (
            "3",
            "fine film\nQuestion: Is this sentence positive or negative?\nAnswer:",
            (" negative", " positive"),
            1,
        ),
    ),
    (
        "cola",
        {"sentence": "Him goes.", "label": 0, "idx": 3},
        (
            "3",
            "Him goes.\nQuestion: Does this sentence make sense?\nAnswer:",
            (" no", " yes"),
            0,
        ),
    ),
    (
        "qnli",
        {"question": "Who?", "sentence": "He did.", "label": 0, "idx": 3},
        (
            "3",
            "Who?\nHe did.\nQuestion: Does this response answer the question?\nAnswer:",
            (" yes", " no"),
            0,
        ),
    ),
    (
        "mnli",
        {"premise": "A b.", "hypothesis": "C d.", "label": 1, "idx": 3},
        (
            "3",
            "A b.\nQuestion: C d. True, False or Neither?\nAnswer:",
            (" True", " Neither", " False"),
            1,
        ),
    ),
]


def read(folder: Path, dataset: DatasetConfig, row: dict[str, Any], form: str) -> Example:
    """What a file with one row holds."""
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return examples(folder / "rows.jsonl", dataset, "rows", form)[0]


@pytest.mark.parametrize(("name", "row", "said"), ROWS)
def test_rows_of_the_hub(
    name: str, row: dict[str, Any], said: tuple[str, str, tuple[str, ...], int], tmp_path: Path
) -> None:
    dataset = compose_config([f"dataset={name}"]).dataset
    id_, context, continuations, gold = said
    expected = Example(id_, (context,) * len(continuations), continuations, gold)
    assert read(tmp_path, dataset, row, "likelihood") == expected
    # as the cache has it
    assert (
        read(tmp_path, dataset, {"id": "1", **normalised(row, dataset)}, "likelihood") == expected
    )


def test_winogrande_scores_the_rest_of_the_sentence(tmp_path: Path) -> None:
    row = {"sentence": "Ann met Eve because _ helped her.", "option1": "Ann", "option2": "Eve"}
    dataset = compose_config(["dataset=winogrande"]).dataset
    assert read(tmp_path, dataset, row | {"answer": "2"}, "likelihood") == Example(
        "1", ("Ann met Eve because Ann", "Ann met Eve because Eve"), (" helped her.",) * 2, 1
    )


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("mrpc", ("A b.", "C d.")),
        ("rte", ("A b.", "C d.")),
        ("qqp", ("A?", "B?")),
        ("sst2", ("fine film",)),
        ("cola", ("Him goes.",)),
        ("qnli", ("Who?", "He did.")),
        ("mnli", ("A b.", "C d.")),
    ],
)
def test_glue_is_classes_for_an_encoder(name: str, texts: tuple[str, ...], tmp_path: Path) -> None:
    row, (_, _, choices, gold) = next((row, said) for known, row, said in ROWS if known == name)
    dataset = compose_config([f"dataset={name}", "task=train"]).dataset
    found = read(tmp_path, dataset, row, "classify")
    assert (found.texts, found.gold) == (texts, gold)
    assert found.continuations == tuple(choice.strip() for choice in choices)
    assert sentences({k: v for k, v in row.items() if k != "label"}, dataset.fields) == texts


def test_stsb_is_a_value(tmp_path: Path) -> None:
    dataset = compose_config(["dataset=stsb", "task=train"]).dataset
    found = read(tmp_path, dataset, PAIR | {"label": 2.200000047683716}, "classify")
    assert (found.texts, found.value) == (("A b.", "C d."), 2.200000047683716)
    assert found.continuations == ("value",)


def test_an_encoder_reads_text_and_pair_of_any_data_set() -> None:
    assert sentences({"text": "a", "pair": "b"}, FieldsConfig()) == ("a", "b")
    assert sentences({"question": "a"}, FieldsConfig()) == ()


def test_letters_stand_before_the_classes_of_the_data_set(tmp_path: Path) -> None:
    row = next(row for name, row, _ in ROWS if name == "qnli")
    found = read(tmp_path, compose_config(["dataset=qnli"]).dataset, row, "letter")
    assert found.contexts[found.gold] == "Question: Who?\nA. yes\nB. no\nAnswer:"
    assert found.gold == 0


# ---- fields of one's own -------------------------------------------------------------


def test_a_data_set_is_a_yaml_and_nothing_else(tmp_path: Path) -> None:
    """Nested fields, numbers, an answer in words, and a field that only the prompt names."""
    dataset = DatasetConfig(
        name="mine",
        prompt="{year}: {question}",
        fields=FieldsConfig(
            id="{meta.key}",
            question="{body|title:strip}",
            choices=["{options}", "none"],
            labels=["0", "1", "2"],
            answer="{right}",
            answers={"first": "0", "neither": "2"},
        ),
    )
    row = {"meta": {"key": 7}, "title": " T ", "year": 1999, "options": ["a", "b"]}
    found = read(tmp_path, dataset, row | {"right": "neither"}, "likelihood")
    assert found == Example("7", ("1999: T",) * 3, (" a", " b", " none"), 2)
    for answer in ("second", None):
        with pytest.raises(DataError, match="line 1: the answer None is not among the labels"):
            read(tmp_path, dataset, row | {"right": answer}, "likelihood")
    with pytest.raises(DataError, match="has no field 'body or title', which mine needs"):
        read(tmp_path, dataset, {"year": 1999, "options": [], "right": "first"}, "likelihood")


def test_written_answers_have_fields_too(tmp_path: Path) -> None:
    fields = FieldsConfig(question="{instruction}", answer="{output}")
    dataset = DatasetConfig(name="mine", kind="text", fields=fields)
    row = {"instruction": "Why?", "output": "So."}
    for form in (row, {"id": "1", **normalised(row, dataset)}):
        found = read(tmp_path, dataset, form, "likelihood")
        assert found == Example("1", ("Question: Why?\nAnswer:",), (" So.",), 0)
    with pytest.raises(DataError, match="line 1: its answer is null"):
        read(tmp_path, dataset, row | {"output": None}, "likelihood")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("questions", "x", "questions: no such key"),
        ("answer", "''", "answer: is missing. Name the field, as {label}."),
        ("choices", "x", "choices: "),
        ("question", "'{}'", "question: a field has no name. Write fields as {question}."),
        ("question", "'{goal'", "question: expected '}' before end of string. Write"),
        ("choices", "['{a:upper}']", "choices: only :strip may follow a field's name"),
        ("question", "'{goal!r}'", "question: only :strip may follow a field's name: {goal:strip}"),
    ],
)
def test_a_wrong_template_is_one_line(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config(["dataset=piqa", f"dataset.fields.{key}={value}"])
    assert str(error.value).startswith(f"dataset.fields.{message}")
    assert "\n" not in str(error.value)


def test_fields_are_part_of_a_key_only_where_they_are_given() -> None:
    assert "fields" not in plain(DatasetConfig(name="own"))
    assert plain(compose_config(["dataset=piqa"]).dataset)["fields"]["question"] == "{goal}"


def test_the_cache_is_made_anew_for_other_fields_and_other_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = compose_config(["dataset=piqa"]).dataset
    before = hub.cached(dataset, "train")
    dataset.fields.question = "{goal:strip}"
    other = hub.cached(dataset, "train")
    monkeypatch.setattr(question, "KIND", Kind(render=question.render, version="2"))
    assert len({before, other, hub.cached(dataset, "train")}) == 3


def test_a_split_is_looked_for_without_fetching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "fetch", lambda *args: pytest.fail("fetched"))
    dataset = compose_config(["dataset=piqa"]).dataset
    assert find_split(dataset, "train[:50%]", None) is None
    kept = hub.cached(dataset, "train")
    kept.parent.mkdir(parents=True)
    kept.write_text("{}\n")
    assert find_split(dataset, "train[:50%]", None) == kept
    assert split_file(dataset, "train", None, Silent()) == kept
    dataset.path = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_split(dataset, "train", None)


def test_one_file_is_not_both_trained_on_and_tested(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    check_apart(one, "train", other, "test")
    check_apart(one, "train[:80%]", one, "train[80%:]")
    with pytest.raises(DataError, match="one file for both splits"):
        check_apart(one, "train", one, "train[80%:]")


# ---- kinds ---------------------------------------------------------------------------


def test_preferences_are_a_kind(tmp_path: Path) -> None:
    dataset = compose_config(["dataset=own_preferences"]).dataset
    rows = [{"id": "p", "prompt": "a", "chosen": "b", "rejected": x} for x in "cd"]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert examples(file, dataset, "pairs") == [
        Example("1", ("a", "a"), ("b", "c"), 0),
        Example("2", ("a", "a"), ("b", "d"), 0),
    ]
    pairs = [{"prompt": "a", "chosen": "b", "rejected": x} for x in "cd"]
    assert preferences(file, DatasetConfig(name="own"), "pairs") == pairs
    file.write_text(json.dumps({"question": "why", "chosen": "b", "rejected": "c"}) + "\n")
    assert preferences(file, dataset, "pairs")[0]["prompt"] == "Question: why\nAnswer:"
    with pytest.raises(DataError, match="line 1: both answers are the same"):
        read(tmp_path, dataset, {"prompt": "a", "chosen": "b", "rejected": "b "}, "likelihood")
    with pytest.raises(DataError, match="line 1: has no field 'rejected'"):
        read(tmp_path, dataset, {"prompt": "a", "chosen": "b"}, "likelihood")


def test_a_package_adds_a_kind_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "riddles" / "data" / "kinds"
    folder.mkdir(parents=True)
    (tmp_path / "riddles" / "__init__.py").write_text("")
    (folder / "riddle.py").write_text(
        "from paw.data.example import Example\n"
        "from paw.data.kinds import Kind\n"
        "KIND = Kind(render=lambda row, c: Example(row['id'], (row['riddle'],), (' x',), 0))\n"
    )
    with pytest.raises(ConfigError, match=r"dataset\.kind: 'riddle' is not allowed"):
        DatasetConfig(name="mine", kind="riddle")
    monkeypatch.setenv("PAW_PLUGINS", str(tmp_path / "riddles"))
    dataset = DatasetConfig(name="mine", kind="riddle")
    assert read(tmp_path, dataset, {"riddle": "?"}, "likelihood").contexts == ("?",)
    assert not kind_named("riddle").written
