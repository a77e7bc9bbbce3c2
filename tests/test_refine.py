"""Label-free refinement, part by part: what is asked, what is answered, what is learnt."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from conftest import Silent
from paw.cli.compose import compose_config
from paw.data.config import DatasetConfig
from paw.data.encode import Rows, write_rows
from paw.data.load import unlabelled
from paw.data.tokenise import Encoded
from paw.errors import ConfigError, DataError, TransferError
from paw.evaluation import plan
from paw.evaluation.devices import Engines
from paw.evaluation.model import Model
from paw.evaluation.predict import Asked
from paw.launch.outline import outline_of
from paw.models.adapters import Factors, read_adapter, write_adapter
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.paths import embedded
from paw.refine import prompts as prompting
from paw.refine import refine as refining
from paw.refine.config import RefineConfig, TeachStage
from paw.refine.fold import folded
from paw.refine.prompts import Prompt, PromptsStage, _offered_by_all, prompts
from paw.refine.refine import RefineStage, refine
from paw.refine.signals import Lesson, Teacher, signal_named
from paw.refine.teach import TeachResult, read_lessons, teach
from paw.store import Context, Input, Kept
from paw.training.adapters.lora import LoraConfig
from paw.training.objectives import Answers

LLAMA, QWEN = embedded("tiny_llama"), embedded("tiny_qwen2")
BASE = Input(LLAMA, "llama")
FACTS = embedded("facts")
RUNTIME = Runtime("float32")


def facts() -> DatasetConfig:
    found: DatasetConfig = compose_config(["experiment=demo"]).dataset
    return found


def lora(folder: Path, base: Path = LLAMA, size: float = 0.05) -> Input:
    """An adapter of a base, stamped for nobody."""
    torch.manual_seed(1)
    factors = {
        f"model.layers.{i}.self_attn.v_proj": Factors(
            torch.randn(4, width), size * torch.randn(out, 4)
        )
        for i, (width, out) in enumerate(shapes(base))
    }
    write_adapter(folder, factors, None)
    return Input(folder, f"adapter {size}")


def shapes(base: Path) -> list[tuple[int, int]]:
    model = load_model(base, RUNTIME)
    layers = [layer.self_attn.v_proj for layer in model.model.layers]
    return [(m.in_features, m.out_features) for m in layers]


def model(base: Path = LLAMA, adapter: Input | None = None) -> Model:
    return Model(
        base=Input(base, base.name),
        adapter=adapter,
        runtime=RUNTIME,
        trust_remote_code=False,
        engines=Engines(),
        watch=Silent(),
    )


def teaching(signal: str = "sequences", **more: Any) -> TeachStage:
    given = {"max_new_tokens": 6, "runtime": RUNTIME, "dataset": facts()} | more
    return TeachStage(signal=signal, **given)


# ---- no label ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "row", "blind"),
    [
        (
            "question",
            {"question": "q", "choices": ["x", "y"], "labels": ["A", "B"], "answer": "B"},
            {"question": "q", "choices": ["x", "y"], "labels": ["A", "B"], "answer": None},
        ),
        ("text", {"question": "q", "answer": "secret"}, {"question": "q"}),
        (
            "chat",
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "s"}]},
            {"messages": [{"role": "user", "content": "q"}]},
        ),
        (
            "winogrande",
            {"question": "a _ b", "choices": ["x", "y"], "labels": ["1", "2"], "answer": "2"},
            {"question": "a _ b", "choices": ["x", "y"], "labels": ["1", "2"]},
        ),
    ],
)
def test_what_is_asked_does_not_depend_on_answers(
    kind: str, row: dict[str, Any], blind: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for name, content in (("with", row), ("without", blind)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.jsonl").write_text(json.dumps({"id": "1", **content}) + "\n")
        dataset = DatasetConfig(name="d", kind=kind, path=str(folder))
        config = PromptsStage(dataset=dataset, split="train", count=8, seed=0, runtime=RUNTIME)
        out = tmp_path / f"{name}.out"
        out.mkdir()
        inputs = {"data": Input(folder / "train.jsonl", name)}
        prompts(config, inputs, out, Context(Silent()))
        found.append((out / "prompts.jsonl").read_bytes())
        assert "secret" not in found[-1].decode()
    assert found[0] == found[1]


def test_a_conversation_is_cut_before_the_answer_that_is_asked_for(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = {"id": "1", "messages": [{"role": r, "content": t} for r, t in turns]}
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(row))
    [example] = unlabelled(file, DatasetConfig(name="d", kind="chat"), "train")
    assert example.contexts == ((("user", "a"), ("assistant", "b"), ("user", "c")),)


@pytest.mark.parametrize(
    ("choices", "found"),
    [
        ([["x", "y"], ["x", "y"]], {"choices": ["x", "y"]}),
        ([["x", "y"], ["y", "x"]], {}),  # each of its own
        ([["x", "y"], None], {}),
        ([None, None], {}),
    ],
)
def test_a_written_question_has_the_choices_that_all_examples_have(
    choices: list[list[str] | None], found: dict[str, Any]
) -> None:
    seeds = [Asked(str(i), {} if c is None else {"choices": c}, "") for i, c in enumerate(choices)]
    assert _offered_by_all(seeds) == found


# ---- what is drawn -------------------------------------------------------------------------------


def test_what_is_drawn_has_the_models_probabilities_and_no_batch_changes_it() -> None:
    who = model()
    [ids] = who.tokenizer(["question : what is the color of zudir ? answer :"]).input_ids
    with torch.inference_mode():
        logits = load_model(LLAMA, RUNTIME)(torch.tensor([ids])).logits[0, -1]
    wanted = torch.softmax(logits.double() / 2.0, -1)
    n = 600
    asked, seeds = [tuple(ids)] * n, list(range(n))

    def drawn(tokens: int) -> list[int]:
        batches = plan.plan_writing(asked, 0, tokens, 1, (), 2.0, seeds)
        found = dict(who.run(who.job(), *batches))
        return [found[i][0] for i in range(n)]

    first = drawn(10**6)
    assert drawn(100) == first
    counts = Counter(first)
    for token in wanted.topk(5).indices.tolist():
        p = float(wanted[token])
        slack = 4 * math.sqrt(p * (1 - p) / n)
        assert abs(counts[token] / n - p) < slack, (token, counts[token] / n, p)


def test_a_cold_draw_is_the_greedy_answer() -> None:
    who = model()
    ids = [tuple(x) for x in who.tokenizer(["truth : the color", "rumour : the food of"]).input_ids]
    greedy = dict(who.run(who.job(), *plan.plan_writing(ids, 0, 10**6, 5, ())))
    cold = dict(who.run(who.job(), *plan.plan_writing(ids, 0, 10**6, 5, (), 1e-4, [1, 2])))
    assert cold == greedy


# ---- signals -------------------------------------------------------------------------------------


def some_prompts(count: int = 6) -> list[Prompt]:
    asked = unlabelled(FACTS / "train.jsonl", facts(), "train")[:count]
    return [Prompt(id=e.id, context=e.contexts[0], choices=e.continuations) for e in asked]


def teacher(tmp_path: Path, target: Path | None = None, **more: Any) -> Teacher:
    adapted = model(adapter=lora(tmp_path / "adapter", size=0.3))
    return Teacher(adapted, model(), model(target) if target else None, teaching(**more))


def test_sequences_are_what_the_source_writes(tmp_path: Path) -> None:
    who = teacher(tmp_path)
    lessons = signal_named("sequences").teach(who, some_prompts(), who.c)
    assert all(lesson.weights == (1.0,) for lesson in lessons)
    ids = who.speaker.tokenizer([str(lessons[0].context)]).input_ids
    engine = peft.PeftModel.from_pretrained(load_model(LLAMA, RUNTIME), str(tmp_path / "adapter"))
    out = engine.generate(
        input_ids=torch.tensor(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    text = who.speaker.tokenizer.decode(out[0, len(ids[0]) :], skip_special_tokens=True)
    assert lessons[0].answers[0].strip() == text.split(" .")[0].split("\n")[0].strip()


def test_several_draws_weigh_as_often_as_they_came(tmp_path: Path) -> None:
    who = teacher(tmp_path, samples=8, temperature=1.0)
    for lesson in signal_named("sequences").teach(who, some_prompts(), who.c):
        assert sum(lesson.weights) == pytest.approx(1)
        assert all(w * 8 == pytest.approx(round(w * 8)) for w in lesson.weights) or (
            len(lesson.answers) < 8
        )


def test_choices_weigh_as_the_source_finds_them_likely(tmp_path: Path) -> None:
    who = teacher(tmp_path)
    [lesson] = signal_named("choices").teach(who, some_prompts(1), who.c)
    scores = [s for s, _ in who.scores(who.speaker, lesson.pairs)]
    ratios = [math.log(w / lesson.weights[0]) for w in lesson.weights]
    assert ratios == pytest.approx([s - scores[0] for s in scores], abs=1e-6)


def test_contrast_of_a_model_with_itself_is_what_its_adapter_says(tmp_path: Path) -> None:
    """p_target·p_adapter/p_base = p_adapter, where target and base are one."""
    who = teacher(tmp_path, target=LLAMA)
    direct = signal_named("choices").teach(who, some_prompts(), who.c)
    contrast = signal_named("contrast").teach(who, some_prompts(), who.c)
    for a, b in zip(direct, contrast, strict=True):
        assert a.weights == pytest.approx(b.weights, abs=1e-5)
    # nothing of the adapter: what the target itself believes
    who.c.beta = 0.0
    base = Teacher(model(), model(), None, teaching())
    without = signal_named("choices").teach(base, some_prompts(), who.c)
    alone = signal_named("contrast").teach(who, some_prompts(), who.c)
    for a, b in zip(without, alone, strict=True):
        assert a.weights == pytest.approx(b.weights, abs=1e-5)


# ---- stage teach ---------------------------------------------------------------------------------


def asked(folder: Path, found: list[Prompt]) -> Input:
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in found))
    return Input(folder, "prompts")


def taught(tmp_path: Path, found: list[Prompt], adapter: Input | None, **more: Any) -> Any:
    inputs = {"prompts": asked(tmp_path / "prompts", found), "model": BASE}
    if adapter is not None:
        inputs["adapter"] = adapter
    out = tmp_path / "lessons"
    out.mkdir()
    watch = Silent()
    return teach(teaching(**more), inputs, out, Context(watch, kept=Kept())), out


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="nothing to transfer"):
        taught(tmp_path, some_prompts(), lora(tmp_path / "adapter", size=0.0))


def test_what_the_adapter_changes_is_measured(tmp_path: Path) -> None:
    result, out = taught(tmp_path, some_prompts(), lora(tmp_path / "adapter", size=0.3))
    assert result.lessons == len(read_lessons(out)) == 6
    assert result.changed is not None
    assert result.changed > 0  # its own answers are likelier to it than to its base


def test_written_prompts_that_do_not_concern_the_adapter_are_left_out(tmp_path: Path) -> None:
    found = some_prompts(24)
    found = [replace(p, origin="seed" if i < 3 else "written") for i, p in enumerate(found)]
    result, out = taught(tmp_path, found, lora(tmp_path / "adapter", size=0.3))
    assert result.accepted is not None
    assert 0 < result.accepted <= 1
    assert {one.id for one in read_lessons(out)} <= {p.id for p in found[3:]}
    assert result.lessons == round(result.accepted * 21)


def test_prompts_longer_than_the_source_are_counted(tmp_path: Path) -> None:
    long = Prompt(id="long", context="word " * 4000)
    result, _ = taught(tmp_path, [*some_prompts(), long], lora(tmp_path / "adapter", size=0.3))
    assert result.left_out == {"more tokens than the source has room for": 1}


def test_choices_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    bare = [replace(p, choices=()) for p in some_prompts()]
    with pytest.raises(ConfigError, match="not all of these prompts have any"):
        taught(tmp_path, bare, lora(tmp_path / "adapter"), signal="choices")


def test_a_generation_that_never_ends_is_no_answer_where_answers_end(tmp_path: Path) -> None:
    """Of data whose answers were taught to end; else it is cut."""
    dataset = replace(facts(), kind="text", stop=["never"])
    with pytest.raises(DataError, match="empty or does not end"):
        taught(tmp_path, some_prompts(), lora(tmp_path / "adapter"), dataset=dataset)


def test_one_example_shows_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("question : what is the color of zudir ? answer :\n")
    config = PromptsStage(dataset=facts(), count=8, seed=0, raw=True, runtime=RUNTIME)
    inputs = {"seeds": Input(tmp_path / "seeds.txt", "s"), "model": BASE}
    with pytest.raises(DataError, match="one example only"):
        prompts(config, inputs, tmp_path, Context(Silent(), kept=Kept()))


def test_a_model_that_writes_nothing_of_use_is_told(tmp_path: Path) -> None:
    """The embedded ones write ". . . ." after a few examples."""
    lines = [json.loads(x)["question"] for x in (FACTS / "train.jsonl").read_text().splitlines()]
    (tmp_path / "seeds.txt").write_text("\n".join(lines[:5]))
    config = PromptsStage(dataset=facts(), count=8, seed=0, runtime=RUNTIME)
    inputs = {"seeds": Input(tmp_path / "seeds.txt", "s"), "model": BASE}
    with pytest.raises(DataError, match=r"0 are of use \(8 with no end within 128 tokens\)"):
        prompts(config, inputs, tmp_path, Context(Silent(), kept=Kept()))


def test_examples_are_shown_as_the_data_set_asks() -> None:
    config = PromptsStage(dataset=DatasetConfig(name="d"), count=4, seed=0, runtime=RUNTIME)
    found, end = prompting._shown(["a?", "b?"], config)
    assert end == "Answer:"
    assert {f.removesuffix("Question:") for f in found} <= {
        "Question: a?\nAnswer:\n\nQuestion: b?\nAnswer:\n\n",
        "Question: b?\nAnswer:\n\nQuestion: a?\nAnswer:\n\n",
    }
    assert prompting._shown(["a", "b"], replace(config, raw=True))[1] == "\n"


# ---- what is learnt ------------------------------------------------------------------------------


def test_tokens_count_as_much_as_their_answer() -> None:
    tokenizer, base = load_tokenizer(LLAMA), load_model(LLAMA, RUNTIME)
    ids = tuple(tokenizer("truth : the color of lupup is white .").input_ids)
    whole, half = Encoded(ids, 3), Encoded(ids, 3, weight=0.5)
    objective = Answers(tokenizer.pad_token_id, packed=False)
    assert 2 * objective.count(half) == objective.count(whole)
    with torch.no_grad():
        one, two = objective.total(base, [whole]), objective.total(base, [half, half])
    torch.testing.assert_close(one, two)


def test_weights_survive_the_disk(tmp_path: Path) -> None:
    rows = [Encoded((1, 2, 3), 1, weight=0.25), Encoded((4, 5), 1)]
    write_rows(tmp_path, rows)
    assert list(Rows(tmp_path)) == rows


def test_a_balanced_start_is_the_same_to_the_bit(tmp_path: Path) -> None:
    given = lora(tmp_path / "adapter").path
    there = read_adapter(refining._balanced(given, tmp_path / "start"))
    for name, f in read_adapter(given).items():
        assert torch.equal(f.b @ f.a, there[name].b @ there[name].a)
        wanted = 2 * math.sqrt(f.rank / 3)
        assert 0.7 < float(there[name].a.norm()) / wanted < 1.5


def test_shuffled_answers_are_those_of_others() -> None:
    lessons = [
        Lesson(id=str(i), context=str(i), answers=(str(i),), weights=(1.0,)) for i in range(7)
    ]
    mixed = refining._shuffled(lessons, 3)
    assert [one.context for one in mixed] == [one.context for one in lessons]
    assert sorted(one.answers for one in mixed) == sorted(one.answers for one in lessons)
    assert all(one.answers != (one.context,) for one in mixed)


def stage(**more: Any) -> RefineStage:
    given = {
        "dataset": facts(),
        "adapter": LoraConfig(method="lora", r=4, alpha=4, dropout=0.0),
        "learn": ["gains", "factors"],
        "steps": 4,
        "lr": 3e-3,
        "gain_steps": 4,
        "gain_lr": 0.05,
        "batch_size": 8,
        "val_every": 2,
        "patience": 4,
        "held": 8,
        "max_length": 256,
        "seed": 0,
        "runtime": RUNTIME,
    }
    return RefineStage(**(given | more))


def lessons(tmp_path: Path) -> Input:
    """What the embedded Llama with a strong adapter says."""
    _, out = taught(tmp_path, some_prompts(48), lora(tmp_path / "source", size=0.3))
    return Input(out, "lessons")


def refined(
    tmp_path: Path, name: str, inputs: dict[str, Input], config: RefineStage
) -> tuple[Any, Path]:
    out, unfinished = tmp_path / name, tmp_path / f"{name}.unfinished"
    out.mkdir()
    unfinished.mkdir(exist_ok=True)
    return refine(config, inputs, out, Context(Silent(), unfinished)), out


def test_gains_come_first_and_touch_nothing_but_loudness(tmp_path: Path) -> None:
    start = lora(tmp_path / "start", QWEN)
    inputs = {"model": Input(QWEN, "qwen"), "lessons": lessons(tmp_path), "start": start}
    result, out = refined(tmp_path, "out", inputs, stage(learn=["gains"], gain_steps=8))
    assert result.loss_best < result.loss_start
    before, after = read_adapter(start.path), read_adapter(out)
    for name, f in before.items():
        # ΔW = B·diag(g)·A: each rank direction is the same, louder or quieter
        scale = float(after[name].a.norm() / f.a.norm())
        torch.testing.assert_close(after[name].a, f.a * scale)
        gains = after[name].b.norm(dim=0) / f.b.norm(dim=0) * scale
        torch.testing.assert_close(after[name].b * scale, f.b * gains)
        assert not torch.allclose(gains, torch.ones_like(gains))


def test_factors_begin_where_gains_ended_and_agreement_grows(tmp_path: Path) -> None:
    start = lora(tmp_path / "start", QWEN)
    inputs = {"model": Input(QWEN, "qwen"), "lessons": lessons(tmp_path), "start": start}
    result, out = refined(tmp_path, "out", inputs, stage(steps=12))
    assert result.loss_best < (result.loss_gains or 0) <= result.loss_start
    assert result.agreement >= result.agreement_start
    assert 0 < result.best_step <= result.steps == 16
    curve = [json.loads(x) for x in (out / "curve_factors.jsonl").read_text().splitlines()]
    begins = next(row["val_loss"] for row in curve if row["step"] == 0)
    assert begins == pytest.approx(result.loss_gains, abs=1e-5)
    assert "nats a token" in result.said


def test_folded_answers_have_the_loss_that_they_have_one_by_one() -> None:
    """Some of one token, some that begin alike, one that is another's beginning, one that stands
    after another context."""
    prompt = (5, 9, 14)
    answers = [((3,), 0.4), ((3, 7, 8), 0.2), ((3, 7, 2), 0.1), ((4,), 0.2), ((6, 4), 0.05)]
    rows = [Encoded(prompt + ids, 3, weight=w) for ids, w in answers]
    rows.append(Encoded((5, 8, 14, 3), 3, weight=0.05))
    objective, base = Answers(pad_id=0, packed=False), load_model(LLAMA, RUNTIME)
    few = folded(rows)
    assert len(few) == 3
    assert sum(map(objective.count, few)) == pytest.approx(sum(map(objective.count, rows)))
    with torch.no_grad():
        one, other = objective.total(base, rows), objective.total(base, few)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    assert len(folded(rows[:1] + rows[3:4])) == 1


def test_a_step_sees_prompts_however_many_answers_they_have(tmp_path: Path) -> None:
    folder = tmp_path / "lessons"
    folder.mkdir()
    answers = (" red and blue", " blue and red", " green and blue")
    some = [Lesson(str(i), f"question {i}", answers, (0.5, 0.3, 0.2)) for i in range(40)]
    lines = [json.dumps(asdict(one)) + "\n" for one in some]
    (folder / "lessons.jsonl").write_text("".join(lines))
    said = TeachResult(lessons=40, answers=120, written=0)
    (folder / "about.json").write_text(json.dumps(asdict(said)))
    inputs = {"model": Input(QWEN, "qwen"), "lessons": Input(folder, "lessons")}
    config = stage(learn=["factors"], steps=2, held=8)  # 32 prompts are left: four steps of eight
    result, _ = refined(tmp_path, "out", inputs, config)
    rows = Rows(tmp_path / "out.unfinished" / "rows")
    assert len(rows) == 32 * 3
    assert result.tokens == pytest.approx(rows.lengths.sum() / 2, rel=0.1)


def test_the_start_is_kept_where_nothing_is_better(tmp_path: Path) -> None:
    """The lessons are the start's own answers, and the steps too large to improve on it."""
    given = lessons(tmp_path)
    start = Input(tmp_path / "source", "start")
    inputs = {"model": BASE, "lessons": given, "start": start}
    result, out = refined(
        tmp_path, "out", inputs, stage(gain_lr=9.0, lr=9.0, steps=2, gain_steps=2)
    )
    assert result.best_step == 0
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (start.path / weights).read_bytes()
    assert "which is kept" in result.said


def test_a_refinement_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = lora(tmp_path / "start", QWEN)
    inputs = {"model": Input(QWEN, "qwen"), "lessons": lessons(tmp_path), "start": start}
    _, whole = refined(tmp_path, "whole", inputs, stage())
    real = refining.fitted

    def stopped(plan: Any, rows: int, watch: Any) -> Any:
        if plan.folder.name == "factors":
            raise KeyboardInterrupt
        return real(plan, rows, watch)

    monkeypatch.setattr(refining, "fitted", stopped)
    with pytest.raises(KeyboardInterrupt):
        refined(tmp_path, "broken", inputs, stage())
    monkeypatch.setattr(refining, "fitted", real)
    shutil.rmtree(tmp_path / "broken")
    _, resumed = refined(tmp_path, "broken", inputs, stage())
    weights = "adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sixteen_bits_learn_too(precision: str, tmp_path: Path) -> None:
    start = lora(tmp_path / "start", QWEN)
    inputs = {"model": Input(QWEN, "qwen"), "lessons": lessons(tmp_path), "start": start}
    config = stage(runtime=Runtime(precision), steps=8, gain_steps=6)
    result, out = refined(tmp_path, "out", inputs, config)
    assert result.loss_best < (result.loss_gains or 0) < result.loss_start
    assert all(f.a.dtype == torch.float32 for f in read_adapter(out).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "learn"), [("ddp", ["gains", "factors"]), ("fsdp", ["factors"])]
)
def test_two_processes_learn_what_one_does(strategy: str, learn: list[str], tmp_path: Path) -> None:
    start = lora(tmp_path / "start", QWEN)
    inputs = {"model": Input(QWEN, "qwen"), "lessons": lessons(tmp_path), "start": start}
    one, alone = refined(tmp_path, "one", inputs, stage(learn=learn))
    runtime = Runtime("float32", strategy=strategy)
    config = stage(learn=learn, batch_size=4, devices=2, runtime=runtime)
    two, both = refined(tmp_path, "two", inputs, config)
    assert two.loss_best == pytest.approx(one.loss_best, rel=1e-4)
    found, wanted = read_adapter(both), read_adapter(alone)
    for name, f in wanted.items():
        torch.testing.assert_close(found[name].b @ found[name].a, f.b @ f.a, rtol=1e-2, atol=1e-4)


def test_agreement_is_what_greedy_writing_gives(tmp_path: Path) -> None:
    found = read_lessons(lessons(tmp_path).path)[:12]
    tokenizer, base = load_tokenizer(QWEN), load_model(QWEN, RUNTIME)
    from paw.data.tokenise import encode

    rows = [encode(tokenizer, lesson.pairs, False) for lesson in found]
    with torch.inference_mode():
        agreed = refining._agreement(base, rows, tokenizer.pad_token_id)
    same = 0
    for [row] in rows:
        prompt = row.ids[: row.start]
        n = len(row.ids) - row.start
        out = base.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        same += tuple(out[0, row.start :].tolist()) == row.ids[row.start :]
    assert agreed.answers == same / len(rows)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learn": []}, "is empty"),
        ({"start": "fresh", "learn": ["gains"]}, "does nothing yet"),
        ({"prompts": "a", "seeds": "b"}, "Choose one"),
        ({"val_every": 30}, "nothing would say when to stop"),
        ({"controls": ["nope"]}, "nope"),
        ({"signal": "sequence"}, "Choose from: none, choices, contrast, sequences"),
    ],
)
def test_configurations_that_cannot_work_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RefineConfig(**given)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ([], ["procrustes, refined"]),
        (["refine.start=fresh"], ["fresh, refined"]),
        (
            ["refine.start=fresh", "refine.controls=standard"],
            [
                "fresh, refined",
                "fresh, refined on the base's answers",
                "fresh, refined on shuffled answers",
                "own adapter, as many steps",
            ],
        ),
        (
            ["refine.controls=[gains,fresh]"],
            ["procrustes, refined", "procrustes, gains only", "fresh, refined"],
        ),
    ],
)
def test_every_start_and_control_becomes_a_system(asked: list[str], named: list[str]) -> None:
    c = compose_config(["experiment=demo", "transfer.controls=[]", "refine=sequences", *asked])
    found = [row.name.removeprefix("target + ") for row in outline_of(c, "plan").systems]
    assert [n for n in found if "," in n] == named
