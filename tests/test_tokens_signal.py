"""Signal `tokens`: what the source finds likely at each place of an answer, in the target's own
tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from paw.data.encode import Rows, write_rows
from paw.data.tokenise import Encoded, encode
from paw.data.vocabulary import by_bytes, offsets
from paw.evaluation import plan
from paw.models.load import load_model, load_tokenizer
from paw.refine.align import Vocabulary
from paw.refine.signals import signal_named
from paw.refine.teach import read_lessons
from paw.training.objectives import Answers, shared_nats
from test_refine import LLAMA, RUNTIME, lora, model, some_prompts, taught, teacher

QWEN = LLAMA.with_name("tiny_qwen2")
WORDS = {b" a": 1, b" ab": 2, b"b": 3, b" c": 4, b" x": 5, b"c": 6}


def row(*ids: int) -> Encoded:
    return Encoded((9, *ids), 1)


# ---- what the source says ------------------------------------------------------------------------


def test_the_likeliest_tokens_are_the_models_own(tmp_path: Path) -> None:
    who = teacher(tmp_path, top=5)
    lessons = signal_named("tokens").teach(who, some_prompts(), who.c)
    wrapped = peft.PeftModel.from_pretrained(
        load_model(LLAMA, RUNTIME), str(tmp_path / "adapter")
    ).eval()
    tokenizer = who.speaker.tokenizer
    for lesson in lessons:
        [both] = encode(tokenizer, lesson.pairs, False)
        with torch.inference_mode():
            shares = wrapped(torch.tensor([both.ids])).logits[0].double().softmax(-1)
        [places] = lesson.places
        assert len(places) == len(both.ids) - both.start
        for (at, said), n in zip(places, range(both.start, len(both.ids)), strict=True):
            assert (
                lesson.answers[0].encode()[at:].startswith(tokenizer.decode(both.ids[n]).encode())
            )
            values, ids = shares[n - 1].topk(5)
            texts = [tokenizer.decode(i) for i in ids]
            wanted = {t: float(p) for t, p in zip(texts, values, strict=True) if "\ufffd" not in t}
            assert dict(said) == pytest.approx(wanted, abs=1e-5)  # without pieces of characters


def test_no_batch_changes_them(tmp_path: Path) -> None:
    who = model(adapter=lora(tmp_path / "adapter", size=0.3))
    pairs = [(p.context, c) for p in some_prompts(4) for c in p.choices]
    rows = encode(who.tokenizer, pairs, False)
    found = []
    for tokens in (1, 60, 10**6):
        batches = plan.plan_likeliest(rows, tokens, 10**6, 3)
        said = dict(who.run(who.job(), *batches))
        found.append([said[i] for i in range(len(rows))])
    assert len(plan.plan_likeliest(rows, 1, 10**6, 3)[0]) == len(rows)
    flat = [[p for row in each for place in row for _, p in place] for each in found]
    assert flat[0] == pytest.approx(flat[1], abs=1e-5)
    assert flat[0] == pytest.approx(flat[2], abs=1e-5)


def test_lessons_are_read_as_they_were_written(tmp_path: Path) -> None:
    _, out = taught(
        tmp_path, some_prompts(), lora(tmp_path / "adapter", size=0.3), signal="tokens", top=3
    )
    for lesson in read_lessons(out):
        assert len(lesson.places) == len(lesson.answers) == 1
        for at, said in lesson.places[0]:
            assert isinstance(at, int)
            assert 0 <= sum(p for _, p in said) < 1 + 1e-6
        assert sum(len(said) for _, said in lesson.places[0]) > 2


# ---- in the target's tokens ----------------------------------------------------------------------


def test_places_are_counted_in_bytes() -> None:
    tokenizer = load_tokenizer(LLAMA)
    texts = {token: text for text, token in by_bytes(tokenizer).items()}
    [both] = encode(tokenizer, [("the color of bovin is", " pink and red .")], False)
    found = offsets(both, " pink and red .", texts)
    lengths = [len(texts[token]) for token in both.ids[both.start :]]
    assert found == [sum(lengths[:i]) for i in range(len(lengths))]
    ended = replace(both, ids=(*both.ids, tokenizer.pad_token_id))
    assert offsets(ended, " pink and red .", texts) == found  # an end has no place
    assert offsets(both, " pink and blue .", texts) == []


def test_equal_vocabularies_take_it_as_it_is() -> None:
    said = ((0, ((" ab", 0.5), (" a", 0.3), (" x", 0.1))),)
    [shares] = Vocabulary(WORDS).soft(row(2), " ab", said)
    assert dict(shares) == pytest.approx({2: 5 / 9, 1: 3 / 9, 5: 1 / 9})


def test_the_same_text_in_other_tokens_counts_for_the_token_that_stands_here() -> None:
    """The source writes " abc" in one token, the target in two."""
    said = ((0, ((" abc", 0.6), (" x", 0.3))),)
    first, second = Vocabulary(WORDS).soft(row(2, 6), " abc", said)
    assert dict(first) == pytest.approx({2: 2 / 3, 5: 1 / 3})
    assert second == ()  # the source begins no token there


def test_what_the_target_cannot_say_leaves_the_token_itself() -> None:
    vocabulary = Vocabulary(WORDS)
    assert vocabulary.soft(row(4), " c", ((0, ((" zebra", 0.8), (" c", 0.1))),)) == ((),)
    [shares] = vocabulary.soft(row(4), " c", ((0, ((" zebra", 0.3), (" c", 0.6))),))
    assert shares == ((4, 1.0),)
    # a continuation whose tokens are not its own text, and the end behind one
    assert vocabulary.soft(row(1, 6), " c", ((0, ((" c", 1.0),)),)) == ((), ())
    assert vocabulary.soft(row(4, 8), " c", ((0, ((" c", 1.0),)),)) == (((4, 1.0),), ())


def test_two_real_tokenizers_meet_where_both_begin_a_token(tmp_path: Path) -> None:
    who = teacher(tmp_path, top=8)
    lessons = signal_named("tokens").teach(who, some_prompts(20), who.c)
    for base in (LLAMA, QWEN):
        tokenizer = load_tokenizer(base)
        vocabulary = Vocabulary(by_bytes(tokenizer))
        soft = 0
        for lesson in lessons:
            [both] = encode(tokenizer, lesson.pairs, False)
            [answer], [places] = lesson.answers, lesson.places
            found = vocabulary.soft(both, answer, places)
            assert len(found) == len(both.ids) - both.start
            soft += sum(map(bool, found))
            for shares in filter(None, found):
                assert sum(p for _, p in shares) == pytest.approx(1)
        assert soft > len(lessons)


# ---- how it is learnt ----------------------------------------------------------------------------


def test_rows_keep_what_is_learnt_in_the_place_of_tokens(tmp_path: Path) -> None:
    rows = [
        Encoded((1, 2, 3), 1, soft=(((2, 0.75), (7, 0.25)), ())),
        Encoded((4, 5), 1),
        Encoded((6, 7, 8), 2, weight=0.5, soft=(((8, 1.0),),)),
    ]
    write_rows(tmp_path, rows)
    read = Rows(tmp_path)
    assert read[0] == rows[0]
    assert read[2] == rows[2]
    assert not any(read[1].soft)
    (tmp_path / "plain").mkdir()
    write_rows(tmp_path / "plain", [rows[1]])
    assert Rows(tmp_path / "plain")[0] == rows[1]


def test_the_loss_is_the_cross_entropy_to_what_the_source_finds_likely() -> None:
    logits = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    rows = [Encoded((1, 2, 3), 1, soft=(((2, 0.75), (7, 0.25)), ())), Encoded((4, 5), 1)]
    labels = torch.tensor([2, 3, 5])
    wanted = torch.zeros(3, 10, dtype=torch.float64)
    wanted[0, 2], wanted[0, 7], wanted[1, 3], wanted[2, 5] = 0.75, 0.25, 1, 1
    nats = shared_nats(logits, labels, rows)
    assert torch.allclose(nats, -(wanted * logits.log_softmax(-1)).sum(-1))
    [slope] = torch.autograd.grad(nats.sum(), logits)
    assert torch.allclose(slope, logits.softmax(-1) - wanted)


def test_an_answer_that_is_certain_is_learnt_as_text_is() -> None:
    base, objective = load_model(LLAMA, RUNTIME), Answers(0, False)
    plain = [Encoded((5, 6, 7, 8), 2, weight=0.5), Encoded((5, 9, 10), 1)]
    certain = [
        Encoded(r.ids, r.start, weight=r.weight, soft=tuple(((t, 1.0),) for t in r.ids[r.start :]))
        for r in plain
    ]
    with torch.no_grad():
        both = [float(objective.total(base, rows)) for rows in (plain, certain)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)
    assert math.isfinite(both[0])
