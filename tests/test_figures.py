"""Every number and every sentence that a user reads is what it says it is, held against theory or
against plain arithmetic."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest, pearsonr, spearmanr

from conftest import Silent
from paw.cli.compose import compose_config
from paw.data.encode import Rows, write_rows
from paw.data.example import Example
from paw.data.load import examples, sample
from paw.data.tokenise import Encoded
from paw.errors import AdapterError, DataError, StageError
from paw.evaluation import answers
from paw.evaluation.classify import batches, class_logits
from paw.evaluation.devices import Engines
from paw.evaluation.engine import Engine, Job
from paw.evaluation.evaluate import EvaluateStage, evaluate
from paw.evaluation.modes import classify, generate
from paw.evaluation.modes.likelihood import metrics
from paw.evaluation.modes.likelihood import record as asked_record
from paw.evaluation.plan import Scoring, Writing, plan_scoring, plan_writing
from paw.evaluation.records import read_records
from paw.evaluation.result import EvaluateResult
from paw.evaluation.steps import Evaluates
from paw.evaluation.trees import tree
from paw.models.adapters import stamp
from paw.models.load import Runtime, load_classifier, load_model, load_tokenizer
from paw.paths import embedded
from paw.store import Context, Input
from paw.training.batches import Micro, Share, Validation, per_epoch, training_steps
from paw.training.objectives import Answers

# ---- scores of questions ------------------------------------------------------------------------


def test_a_question_is_answered_by_its_likeliest_choice_and_by_the_likeliest_a_character() -> None:
    question = Example("q", ("c",) * 3, (" ab", " abcd", " a"), 1)
    found = asked_record(question, [-4.0, -6.0, -4.0], [1, 2, 1])
    assert (found["prediction"], found["prediction_norm"], found["correct"]) == (
        0,
        1,
        False,
    )  # −2, −1.5, −4 a character
    assert (found["gold"], found["tokens"], found["loglikelihoods"]) == (
        1,
        [1, 2, 1],
        [-4.0, -6.0, -4.0],
    )
    assert asked_record(question, [-4.0, -3.0, -4.0], [1, 2, 1])["correct"] is True
    assert (
        asked_record(replace(question, continuations=(" ab",), gold=0), [-4.0], [1])["correct"]
        is None
    )


def test_figures_of_questions() -> None:
    """Loss is that of all tokens, not a mean of means; F1 is the named choice's."""
    answers = [
        (0, 0, 0, -1.0, 1),
        (0, 1, 0, -6.0, 2),
        (1, 1, 1, -2.0, 4),
        (1, 0, 1, -3.0, 1),
        (1, 1, 0, -4.0, 2),
    ]
    rows: list[dict[str, Any]] = [
        {
            "gold": g,
            "prediction": p,
            "prediction_norm": n,
            "correct": g == p,
            "loglikelihoods": [x, x],
            "tokens": [t, t],
        }
        for g, p, n, x, t in answers
    ]
    found = metrics(rows, positive=1)
    assert (found.n, found.accuracy, found.acc_norm, found.loss) == (5, 0.6, 0.8, 1.6)
    assert found.perplexity == pytest.approx(math.exp(1.6))
    assert found.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    wilson = tuple(binomtest(3, 5).proportion_ci(0.95, method="wilson"))
    assert (found.low, found.high) == pytest.approx(wilson, abs=1e-12)
    assert found.f1 == pytest.approx(2 * 2 / (3 + 3))
    assert found.unparsed is None
    assert metrics(rows).f1 is None
    for i, row in enumerate(rows):
        row |= {"text": "x", "parsed": i > 1, "correct_flexible": i > 2}
    written = generate.metrics(rows)
    assert (written.unparsed, written.accuracy_flexible) == (2, 0.4)
    assert replace(written, unparsed=None, accuracy_flexible=None) == metrics(rows)
    endless = metrics([{**rows[0], "loglikelihoods": [-1e5]}])
    assert (endless.perplexity, endless.acc_norm) == (math.exp(700), None)


def test_figures_of_classes() -> None:
    """Means over the classes that occur, counted one by one; Matthews' correlation as the
    correlation of indicators."""
    rng = np.random.default_rng(0)
    for n, there in ((2, 2), (4, 3)):
        gold = [int(k) for k in rng.integers(0, there, 60)]
        found = [g if rng.random() < 0.5 else int(rng.integers(0, there)) for g in gold]
        one = classify.by_class(gold, found, n)
        hits = [sum(g == f == k for g, f in zip(gold, found, strict=True)) for k in range(there)]
        precision, recall = ([h / x.count(k) for k, h in enumerate(hits)] for x in (found, gold))
        assert one["precision"] == pytest.approx(np.mean(precision))
        assert one["recall"] == pytest.approx(np.mean(recall))
        f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
        assert one["f1_macro"] == pytest.approx(np.mean(f1))
        x, y = np.eye(n)[gold], np.eye(n)[found]
        x, y = x - x.mean(0), y - y.mean(0)
        assert one["mcc"] == pytest.approx((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))
        assert one.get("f1") == (pytest.approx(f1[1]) if n == 2 else None)
    assert (
        classify.by_class([0, 1, 1], [1, 1, 1], 2)["mcc"] == 0.0
    )  # one answer to all says nothing
    assert classify.by_class([0, 1, 1], [1, 1, 1], 2)["recall"] == 0.5
    assert classify.by_class([0, 1, 1], [2, 1, 1], 3)["recall"] == pytest.approx(
        1 / 3
    )  # what is only said has none
    assert classify.by_class([0, 0, 1], [0, 0, 0], 3)["precision"] == pytest.approx((2 / 3 + 0) / 2)


def test_a_record_of_a_head_has_the_classes_log_probabilities() -> None:
    question = Example("q", ("c",), ("a", "b", "c"), 2)
    found = classify.record(question, np.array([1.0, 3.0, 2.0], dtype=np.float32))
    total = sum(math.exp(x) for x in (1, 3, 2))
    assert found["loglikelihoods"] == pytest.approx(
        [math.log(math.exp(x) / total) for x in (1, 3, 2)]
    )
    assert (
        found["id"],
        found["gold"],
        found["prediction"],
        found["prediction_norm"],
        found["correct"],
    ) == ("q", 2, 1, 1, False)
    assert found["tokens"] == [1, 1, 1]
    assert classify.record(question, np.array([1.0, 2.0, 3.0]))["correct"] is True
    value = classify.record(
        replace(question, continuations=("value",), gold=0, value=2.5), np.array([4.0])
    )
    assert (value["prediction"], value["value"], value["loglikelihoods"], value["tokens"]) == (
        4.0,
        2.5,
        [-2.25],
        [1],
    )
    assert (value["correct"], value["gold"]) == (None, 0)


def test_figures_of_heads() -> None:
    logs = [[-0.1, -2.4], [-0.5, -0.9], [-1.2, -0.4], [-0.7, -0.7]]
    rows = [
        classify.record(Example("q", ("c",), ("n", "p"), g), np.array(x))
        for x, g in zip(logs, (0, 1, 1, 0), strict=True)
    ]
    found = classify.metrics(rows)
    assert (found.n, found.accuracy, found.acc_norm) == (4, 0.75, None)
    assert found.loss == pytest.approx(-np.mean([r["loglikelihoods"][r["gold"]] for r in rows]))
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.stderr == pytest.approx(0.25)
    wilson = tuple(binomtest(3, 4).proportion_ci(0.95, method="wilson"))
    assert (found.low, found.high) == pytest.approx(wilson, abs=1e-12)
    assert found.f1 == pytest.approx(2 / 3)
    for r in rows:
        r["loglikelihoods"] = [-1e4, -1e4]
    assert classify.metrics(rows).perplexity == math.exp(700)


def valued(gold: float, said: float) -> dict[str, Any]:
    return classify.record(Example("q", ("c",), ("value",), 0, value=gold), np.array([said]))


def test_figures_of_values() -> None:
    gold, said = [1.0, 2.0, 3.0, 5.0], [1.5, 1.0, 4.0, 5.5]
    rows = [valued(g, s) for g, s in zip(gold, said, strict=True)]
    found = classify.metrics(rows)
    assert found.pearson == pytest.approx(pearsonr(gold, said)[0])
    assert found.spearman == pytest.approx(spearmanr(gold, said)[0]) == pytest.approx(0.8)
    assert found.loss == pytest.approx((0.25 + 1 + 1 + 0.25) / 4)
    assert (found.accuracy, found.perplexity, found.n) == (None, None, 4)
    for still in (gold, [3.0] * 4):  # where one of the two does not move there is no correlation
        answers = said if still != gold else [3.0] * 4
        flat = [valued(g, s) for g, s in zip(still, answers, strict=True)]
        assert (classify.metrics(flat).pearson, classify.metrics(flat).spearman) == (0.0, 0.0)


def test_one_that_reads_nothing_knows_how_often_a_class_occurs() -> None:
    """One more of each class than was seen, so that none is impossible."""
    train = [Example(str(i), ("c",), ("a", "b", "c"), k) for i, k in enumerate([0, 0, 0, 1])]
    assert np.exp(classify.majority(train)) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    values = [
        Example(str(i), ("c",), ("value",), 0, value=v) for i, v in enumerate([1.0, 2.0, 6.0])
    ]
    assert classify.majority(values) == pytest.approx([3.0])


def test_batches_of_a_head_are_full_and_hold_every_row() -> None:
    lengths = [5, 9, 3, 9, 1, 4, 30, 2]
    found = list(batches(lengths, 20))
    assert sorted(i for batch in found for i in batch) == list(range(8))
    assert found == [
        [6],
        [1, 3],
        [0, 5, 2, 7],
        [4],
    ]  # 9 + 9, 5 × 4; one that is longer than all stands alone


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Facts of two classes, three to one in the training split."""
    for split, n in (("train", 8), ("test", 12)):
        lines = (embedded("facts") / f"{split}.jsonl").read_text().splitlines()[:n]
        with open(tmp_path / f"{split}.jsonl", "w") as f:
            for i, r in enumerate(map(json.loads, lines)):
                kind = {
                    "labels": ["0", "1"],
                    "choices": ["other", "colour"],
                    "answer": str(int(i % 4 == 0)),
                }
                f.write(json.dumps({"id": r["id"], "question": r["question"], **kind}) + "\n")
    return tmp_path


def put(
    c: Evaluates, files: Mapping[str, Path], out: Path, context: Context | None = None, **more: Any
) -> EvaluateResult:
    """A configuration's questions, in float32 if nothing else is said."""
    how: dict[str, Any] = {"runtime": Runtime("float32"), **more}
    stage = EvaluateStage(dataset=c.dataset, split="test", evaluate=c.evaluate, **how)
    inputs = {name: Input(path, str(path)) for name, path in files.items()}
    return evaluate(stage, inputs, out, context or Context(Silent()))


def test_calibrated_answers_where_all_questions_have_the_same_choices(
    classes: Path, tmp_path: Path
) -> None:
    def asked(folder: Path, *more: str) -> tuple[EvaluateResult, list[dict[str, Any]]]:
        c = compose_config(["task=train", "dataset=own", f"dataset.path={folder}", *more])
        out = tmp_path / f"out {len(list(tmp_path.iterdir()))}"
        out.mkdir()
        files = {"model": embedded("tiny_llama"), "data": folder / "test.jsonl"}
        return put(c, files, out), read_records(out)

    result, rows = asked(classes)
    told = [r["prediction_calibrated"] for r in rows]
    assert sum(told) == sum(r["gold"] for r in rows)
    assert told != [r["prediction"] for r in rows]
    right = [r["gold"] == best for r, best in zip(rows, told, strict=True)]
    assert result.acc_calibrated == pytest.approx(np.mean(right))
    # what is written is another answer, and these questions have choices of their own
    _, written = asked(classes, "evaluate.mode=generate", "evaluate.max_new_tokens=2")
    result, own = asked(embedded("facts"), "evaluate.limit=20")
    assert not any("prediction_calibrated" in r for r in [*written, *own])
    assert result.acc_calibrated is None


def classified(
    folder: Path, *more: str, **inputs: Path
) -> tuple[EvaluateResult, list[dict[str, Any]]]:
    c = compose_config(
        ["task=train", "dataset=own", f"dataset.path={folder}", "evaluate.mode=classify", *more]
    )
    files = {
        "model": embedded("tiny_llama"),
        "data": folder / "test.jsonl",
        "train": folder / "train.jsonl",
        **inputs,
    }
    out = folder / f"out{len(inputs)}{len(more)}"
    out.mkdir()
    return put(c, files, out, train_split="train"), read_records(out)


def test_classes_without_an_adapter_are_guessed_from_the_training_split(classes: Path) -> None:
    result, rows = classified(classes)
    for r in rows:
        assert np.exp(r["loglikelihoods"]) == pytest.approx([7 / 10, 3 / 10])
    assert (result.n, result.accuracy) == (12, 0.75)
    assert result.loss == pytest.approx(-(9 * math.log(0.7) + 3 * math.log(0.3)) / 12)


def test_classes_by_a_head_are_what_the_model_itself_says(classes: Path) -> None:
    """Of rows in batches of like lengths, each where it belongs."""
    import peft

    base, _ = load_classifier(embedded("tiny_llama"), Runtime("float32"), ["other", "colour"])
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    model = peft.get_peft_model(base, config)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(str(classes / "adapter"))
    stamp(classes / "adapter", str(embedded("tiny_llama")), classes=["other", "colour"])
    model.eval()
    tokenizer = load_tokenizer(embedded("tiny_llama"))
    for tokens in (64, 4096):
        result, rows = classified(
            classes,
            f"evaluate.batch_tokens={tokens}",
            *["seed=0"][: tokens > 64],
            adapter=classes / "adapter",
        )
        questions = [json.loads(line) for line in (classes / "test.jsonl").read_text().splitlines()]
        for r, q in zip(rows, questions, strict=True):
            prompt = compose_config(["dataset=own"]).dataset.prompt.replace(
                "{question}", q["question"]
            )
            with torch.inference_mode():
                logits = model(**tokenizer(prompt.rstrip(), return_tensors="pt")).logits[0].double()
            assert r["id"] == q["id"]
            assert r["loglikelihoods"] == pytest.approx(logits.log_softmax(-1).tolist(), abs=1e-4)
            assert r["gold"] == int(q["answer"])
        assert result.accuracy == pytest.approx(
            np.mean([r["prediction"] == r["gold"] for r in rows])
        )


# ---- from questions to scores --------------------------------------------------------------------


def asked(
    out: Path, *overrides: str, **more: Any
) -> tuple[Evaluates, EvaluateResult, Engine, Silent]:
    """The embedded facts, put to the tiny model."""
    c, watch = compose_config(["dataset=facts", *overrides]), Silent()
    context = Context(watch)
    facts = embedded("facts")
    files = {
        "model": embedded("tiny_llama"),
        "data": facts / "test.jsonl",
        "shots": facts / "train.jsonl",
    }
    result = put(c, files, out, context, **more)
    return c, result, context.kept.get(Engines)._one, watch


@pytest.mark.parametrize("shots", [0, 6])
def test_scores_are_those_of_whole_texts_run_alone(tmp_path: Path, shots: int) -> None:
    """Also where shots stand before all questions, and are computed once: a seeded draw, the same
    for all."""
    c, result, engine, watch = asked(
        tmp_path, f"evaluate.num_fewshot={shots}", "evaluate.limit=5", "evaluate.seed=3"
    )
    assert engine._trees
    assert bool(engine._past) is (shots > 0)
    assert not watch.said
    facts = embedded("facts")
    pool = examples(facts / "train.jsonl", c.dataset, "train")
    before = "".join(f"{s.solved()}\n\n" for s in random.Random(3).sample(pool, shots))
    questions = sample(examples(facts / "test.jsonl", c.dataset, "test"), 1.0, 5, 3)
    model, tokenizer = (
        load_model(embedded("tiny_llama"), Runtime("float32")),
        load_tokenizer(embedded("tiny_llama")),
    )
    rows = read_records(tmp_path)
    assert [r["id"] for r in rows] == [q.id for q in questions]
    for row, q in zip(rows, questions, strict=True):
        for context, continuation, said in zip(
            q.contexts, q.continuations, row["loglikelihoods"], strict=True
        ):
            start = len(tokenizer(before + str(context)).input_ids)
            ids = tokenizer(before + str(context) + continuation).input_ids
            with torch.inference_mode():
                logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            assert said == pytest.approx(
                sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids))), abs=1e-3
            )
    assert result.n == 5


def test_in_half_precision_packed_questions_are_trusted_too(tmp_path: Path) -> None:
    _, _, engine, watch = asked(tmp_path, "evaluate.limit=8", runtime=Runtime("bfloat16"))
    assert engine._trees
    assert not watch.said


def test_a_batch_that_is_halved_keeps_every_question_in_its_order() -> None:
    trees = [tree([Encoded((1, i, 2, 3), 2)]) for i in range(10, 17)]
    for rows in ([[0], [1]], [[0, 1], [2, 3]], [[0, 1, 2]], [[0], [1, 2], [3], [4, 5, 6]]):
        whole = Scoring(tuple(tuple(trees[i] for i in row) for row in rows))
        halves = whole.halves()
        assert len(halves) == 2
        assert [t for half in halves for row in half.rows for t in row] == [
            t for row in whole.rows for t in row
        ]
        assert sum(map(len, halves)) == len(whole) == sum(map(len, rows))
        assert whole.tokens() == len(rows) * max(3 * len(row) for row in rows)
    assert Scoring(((trees[0],),)).halves() == []
    prompts = Writing(tuple((1,) * n for n in (4, 3, 2)), 5, ())
    assert prompts.tokens() == 3 * (4 + 5)
    assert [p for half in prompts.halves() for p in half.prompts] == list(prompts.prompts)
    assert Writing(prompts.prompts[:1], 5, ()).halves() == []


# ---- what a training's steps and validation weigh -----------------------------------------------


def encoded(folder: Path, lengths: Sequence[int]) -> Rows:
    """Rows of these lengths on the disk, a third of each an answer; every token of a row is its
    number."""
    write_rows(folder, [Encoded((i,) * n, n - n // 3) for i, n in enumerate(lengths)])
    return Rows(folder)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_validation_counts_every_row_once_however_many_processes_share_it(
    tmp_path: Path, world: int
) -> None:
    lengths = [9, 30, 12, 6, 21, 3, 15, 18, 27]
    rows = encoded(tmp_path, lengths)
    each = [Validation.of(rows, Answers(0, False), 2, Share(rank, world)) for rank in range(world)]
    assert {v.counted for v in each} == {sum(n // 3 for n in lengths)}
    batches = [v.batches for v in each]
    assert {len(b) for b in batches} == {
        math.ceil(5 / world)
    }  # or sharded models would wait for each other
    weighed = [m for b in batches for m in b if m.weight]
    assert {m.weight for m in weighed} == {1.0}
    assert sorted(r.ids[0] for m in weighed for r in m.rows) == list(range(9))
    ordered = sorted(([len(r.ids) for r in m.rows] for m in weighed), reverse=True)
    assert ordered == [[30, 27], [21, 18], [15, 12], [9, 6], [3]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_goes_on_with_the_very_step_it_stopped_before(
    tmp_path: Path, packed: bool
) -> None:
    lengths = [3 * (1 + i * 7 % 11) for i in range(26)]
    rows, objective, share = encoded(tmp_path, lengths), Answers(0, packed), Share(0, 1, 2)

    def steps(first: int, count: int) -> list[Micro]:
        each = list(itertools.islice(training_steps(rows, objective, 4, 5, share, first), count))
        assert {len(step) for step in each} == {2}
        return [micro for step in each for micro in step]

    whole = steps(0, 14)
    assert [m.step for m in whole] == [i // 2 for i in range(28)]
    parts = [
        [(m.rows, m.weight, m.step, m.tokens) for m in found] for found in (steps(9, 5), whole[18:])
    ]
    assert parts[0] == parts[1]
    for one, two in zip(whole[::2], whole[1::2], strict=True):
        found = [len(r.ids) for m in (one, two) for r in m.rows]
        assert (len(found), one.tokens, two.tokens) == (4, sum(found), sum(found))
        assert one.weight == two.weight == pytest.approx(2 / sum(n // 3 for n in found))
        if packed:  # the longest first, each to what has least
            sizes = sorted(found, reverse=True)
            assert (
                abs(sum(len(r.ids) for r in one.rows) - sum(len(r.ids) for r in two.rows))
                <= sizes[0]
            )
            assert [len(m.rows[0].ids) for m in (one, two)] == sizes[:2]
        else:
            assert found == sorted(found, reverse=True)
            assert len(one.rows) == len(two.rows) == 2
    epochs = [sorted(r.ids[0] for m in whole[at : at + 12] for r in m.rows) for at in (0, 12)]
    assert all(
        len(set(e)) == 24 for e in epochs
    )  # six whole steps of 26 examples; which two stay out, chance decides
    assert per_epoch(3, 4) == 1


def test_a_second_sentence_is_told_by_token_types() -> None:
    """Of an encoder with random weights: rows filled up in a batch are what each is alone."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **size)).eval()
    model.bert.embeddings.token_type_embeddings.weight.data *= 20
    rows = [Encoded((1, 2, 3, 4, 5), 3), Encoded((6, 7), 1), Encoded((8, 9, 10), 3)]
    with torch.inference_mode():
        for pairs in (True, False):
            found = class_logits(model, rows, 0, pairs)
            for row, logits in zip(rows, found, strict=True):
                types = [int(pairs and i >= row.start) for i in range(len(row.ids))]
                alone = model(
                    input_ids=torch.tensor([row.ids]), token_type_ids=torch.tensor([types])
                ).logits[0]
                assert torch.allclose(logits, alone, atol=1e-5)


def test_scores_that_are_not_finite_are_not_blamed_on_packing(tmp_path: Path) -> None:
    folder, facts = tmp_path / "broken", embedded("facts")
    shutil.copytree(embedded("tiny_llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    c, watch = compose_config(["dataset=facts", "evaluate.limit=3"]), Silent()
    files = {"model": folder, "data": facts / "test.jsonl"}
    first = sample(examples(facts / "test.jsonl", c.dataset, "test"), 1.0, 3, c.evaluate.seed)[0].id
    with pytest.raises(
        StageError, match=rf"the scores of 3 of 3 questions are not finite \(the first: {first}\)"
    ):
        put(c, files, tmp_path, Context(watch))
    assert not watch.said


def test_what_is_written_a_prompt_at_a_time_is_what_is_written_in_batches() -> None:
    """The library's own generation is for models that packing does not suit; both go on behind the
    same prefix."""
    folder = embedded("tiny_llama")
    tokenizer = load_tokenizer(folder)
    prompts = [
        tuple(tokenizer(f"question : what color is {x} ? answer :").input_ids)
        for x in ("lupup", "bovin", "a bovin")
    ]
    prefix = tuple(tokenizer("the color of lupup is red . ").input_ids)
    own = Engine()
    about = Job(
        base=Input(folder, "tiny"),
        runtime=Runtime("float32"),
        pad_id=tokenizer.pad_token_id,
        prefix=prefix,
    )
    batch = Writing(tuple(p[1:] for p in prompts), 6, (".",))
    together = own.run(about, batch)
    assert all(together)
    own._trees = False
    assert own.run(about, batch) == together


@pytest.mark.slow
def test_two_devices_give_the_scores_of_one_and_say_when_one_is_gone(tmp_path: Path) -> None:
    """Two processes on the CPU, and more batches than processes, or none of them would be
    started."""
    found = []
    facts = embedded("facts")
    files = {"model": embedded("tiny_llama"), "data": facts / "test.jsonl"}
    for devices in (1, 2):
        c = compose_config(["dataset=facts", "evaluate.limit=40", "evaluate.batch_tokens=256"])
        context, runtime = Context(Silent()), Runtime("float32", devices=devices)
        put(c, files, tmp_path, context, runtime=runtime)
        found.append([r["loglikelihoods"] for r in read_records(tmp_path)])
        engines = context.kept.get(Engines)
        assert len(engines._workers) == (2 if devices == 2 else 0)
    for one, two in zip(*found, strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    for process in engines._workers[0]._processes.values():
        process.kill()
    with pytest.raises(StageError, match=r"the process of one device died.*hardware\.devices=1"):
        put(c, files, tmp_path, context, runtime=runtime)
    context.kept.release()


def test_a_head_of_other_classes_is_refused(classes: Path) -> None:
    (classes / "adapter").mkdir()
    stamp(classes / "adapter", "tiny", classes=["no", "yes"])
    with pytest.raises(
        AdapterError,
        match=r"its head knows 2 classes \(no, yes\), the data has 2 \(other, colour\)",
    ):
        classified(classes, adapter=classes / "adapter")


def test_questions_without_room_are_counted_or_stop_a_run(tmp_path: Path) -> None:
    rows = [
        json.loads(line) for line in (embedded("facts") / "test.jsonl").read_text().splitlines()[:3]
    ]
    rows[1]["question"] = "what " * 3000
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    c, watch = compose_config(["dataset=facts", "dataset.bad_rows=skip"]), Silent()
    files = {"model": embedded("tiny_llama"), "data": file}
    result = put(c, files, tmp_path, Context(watch))
    assert (result.n, result.left_out) == (2, {"more tokens than the model has room for": 1})
    assert [r["id"] for r in read_records(tmp_path)] == [rows[0]["id"], rows[2]["id"]]
    assert "1" in watch.said[0]
    file.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match=r"no question fits into the model's \d+ tokens"):
        put(c, files, tmp_path)


def test_the_last_number_of_many_is_the_answer() -> None:
    """A longer number counts as one, a single digit as well, and what follows #### only where that
    is asked for."""
    assert answers.flexible("first 10, then 20, so 30 apples") == "30"
    assert answers.flexible("10 and 7") == "7"
    assert answers.flexible("-3 or $1,250.50") == "$1,250.50"
    assert answers.flexible("none") is None
    assert (answers.strict("20 #### 30 #### 40"), answers.strict("30")) == ("30", None)
    assert answers.plain("so\n#### 1,250.") == answers.plain("$1250") == "1250"
    assert answers.until("a\n\nb Q: c", ("Q:", "\n\n")) == "a"
    assert answers.until("a b", ("Q:",)) == "a b"


def test_a_written_answer_is_read_strictly_and_loosely() -> None:
    """Equal to the gold number as the harness compares: not larger, and not an answer that is not
    there."""
    question = Example("q", ("c",), (" so 5\n#### 42",), 0)
    for text, strictly, loosely, parsed in (
        ("#### 42", True, True, True),
        ("it is 42", False, True, False),
        ("#### 41", False, False, True),
        ("#### 43 or 42", False, True, True),
        ("9", False, False, False),
        ("none", False, False, False),
    ):
        found = generate.read_number(question, text)
        assert (found["correct"], found["correct_flexible"], found["parsed"], found["text"]) == (
            strictly,
            loosely,
            parsed,
            text,
        )
    lettered = replace(question, continuations=(" A", " B", " C"), gold=1)
    for text, said in (("B. because", 1), ("(c)", 2), ("D.", None), ("", None)):
        found = generate.read_letter(lettered, text)
        assert (found["prediction"], found["correct"], found["parsed"]) == (
            said,
            said == 1,
            said is not None,
        )


def test_as_many_shots_as_there_are_rows_may_be_shown(tmp_path: Path) -> None:
    lines = (embedded("facts") / "train.jsonl").read_text().splitlines()[:2]
    (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    files = {
        "model": embedded("tiny_llama"),
        "data": embedded("facts") / "test.jsonl",
        "shots": tmp_path / "train.jsonl",
    }
    for shots in (2, 3):
        c = compose_config(["dataset=facts", "evaluate.limit=2", f"evaluate.num_fewshot={shots}"])
        if shots == 2:
            assert put(c, files, tmp_path).n == 2
            continue
        with pytest.raises(DataError, match=r"num_fewshot=3: .* has 2 rows only"):
            put(c, files, tmp_path)


def test_batches_are_as_full_as_their_budget_allows() -> None:
    """Longest first, so that little is filled up; the next row would not have fitted any more."""
    rng = random.Random(0)
    prompts = [tuple(range(rng.randrange(3, 40))) for _ in range(60)]
    plan, order = plan_writing(prompts, 2, 300, 10, ("x",))
    assert [len(prompts[i]) for i in order] == sorted(map(len, prompts), reverse=True)
    assert [p for b in plan for p in b.prompts] == [prompts[i][2:] for i in order]
    assert {(b.limit, b.stop) for b in plan} == {(10, ("x",))}
    for one, longest in ((b, max(map(len, b.prompts)) + 2) for b in plan[:-1]):
        assert len(one) * (longest + 10) <= 300 < (len(one) + 1) * (longest + 10)
    asked = [
        [Encoded(tuple(rng.randrange(5, 99) for _ in range(rng.randrange(4, 90))), 2)]
        for _ in range(80)
    ]
    scoring, order = plan_scoring(asked, 0, 600, 10**6)
    assert sorted(order) == list(range(80))
    for batch in scoring[:-1]:
        width = max(sum(map(len, row)) for row in batch.rows)
        assert len(batch.rows) * width <= 600 < (len(batch.rows) + 1) * width
    reads = [
        sum(t.reads for row in batch.rows for t in row)
        for batch in plan_scoring(asked, 0, 10**6, 150)[0]
    ]
    assert max(reads) <= 150


class Narrow(Engine):
    """A device with memory for forty tokens, whose score of a question is its second token."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[int] = []

    def _score(self, batch: Scoring) -> list[list[float]]:
        self.tried.append(batch.tokens())
        if batch.tokens() > 40:
            raise MemoryError
        return [[float(t.ids[1])] for row in batch.rows for t in row]


def test_what_does_not_fit_is_halved_and_so_is_all_that_comes_later() -> None:
    own = Narrow()
    batch = Scoring(
        tuple((tree([Encoded((1, i, 2, 3, 4, 5, 6, 7, 8, 9, 10), 2)]),) for i in range(20, 36))
    )
    assert batch.tokens() == 160
    for notes in (2, 0):
        own.notes, own.tried = [], []
        assert own._fitting(batch) == [[float(i)] for i in range(20, 36)]
        assert own._most == 40
        assert own.tried == ([160, 80, 40, 40, 40, 40] if notes else [40] * 4)
        assert own.notes == [
            f"out of memory: batches of at most {n} tokens from here "
            "(evaluate.batch_tokens sets it)"
            for n in (80, 40)[:notes]
        ]
    long = tree([Encoded(tuple(range(60)), 2)])
    with pytest.raises(StageError, match="one question of 59 tokens does not fit into memory"):
        Narrow()._fitting(Scoring(((long,),)))


@pytest.mark.parametrize(
    ("error", "said"),
    [(MemoryError(), "does not fit into the memory of cpu"), (RuntimeError("other"), "^other$")],
)
def test_only_a_lack_of_memory_is_called_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr("paw.evaluation.engine.load_model", load)
    about = Job(base=Input(embedded("tiny_llama"), "t"), runtime=Runtime("float32"), pad_id=0)
    with pytest.raises(type(error) if said == "^other$" else StageError, match=said):
        Engine().run(about, Scoring(((tree([Encoded((1, 2, 3), 2)]),),)))
