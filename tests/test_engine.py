"""Packed questions score what single rows score, whatever is shared, adapted, shuffled, split or
done on several devices."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT, Silent
from paw.cli.compose import compose_config
from paw.data.tokenise import Encoded
from paw.errors import AdapterError, DataError, ModelError, StageError
from paw.evaluation import answers, engine
from paw.evaluation.engine import Engine, Job
from paw.evaluation.evaluate import STAGE, EvaluateStage, evaluate
from paw.evaluation.likelihood import label_logprobs
from paw.evaluation.plan import Scoring, plan_scoring, plan_writing
from paw.evaluation.records import read_records
from paw.evaluation.trees import pack, shared_prefix, tree, visible
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.paths import embedded
from paw.store import Context, Input, Kept

RUNTIME = Runtime("float32")
BASES = ("tiny_llama", "tiny_qwen2")
FAMILIES = (*BASES, "gemma3", "mistral")  # the last two made here, with windows of 8 tokens

token = st.integers(5, 200)
choices = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=5)


@st.composite
def questions(draw: st.DrawFn, prefix: int = 0) -> list[list[Encoded]]:
    """Questions whose rows share any stretch: contexts of a few tokens, choices that may be equal
    or begin alike."""
    head, out = draw(st.lists(token, min_size=prefix, max_size=prefix)), []
    for _ in range(draw(st.integers(1, 4))):
        context = draw(st.lists(token, min_size=1, max_size=12))
        rows = []
        for choice in draw(choices):
            cut = draw(
                st.integers(1, len(context))
            )  # as with partial contexts, which differ between choices
            ids = (*head, *context[:cut], *choice)
            rows.append(Encoded(ids, len(head) + cut))
        out.append(rows)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small bases of several families, random where none is shipped; windows shorter than the
    texts."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("families")
    size: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    gemma = Gemma3TextConfig(
        **size, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
    )
    Gemma3ForCausalLM(gemma).save_pretrained(root / "gemma3")
    MistralForCausalLM(MistralConfig(**size, sliding_window=8)).save_pretrained(root / "mistral")
    for name in ("gemma3", "mistral"):
        load_tokenizer(embedded("tiny_llama")).save_pretrained(root / name)
    return {
        **{b: embedded(b) for b in BASES},
        "gemma3": root / "gemma3",
        "mistral": root / "mistral",
    }


@pytest.fixture(scope="module")
def held() -> dict[str, Engine]:
    return {}


def job(folder: Path, name: str, prefix: tuple[int, ...] = (), adapter: Path | None = None) -> Job:
    return Job(
        base=Input(folder, name),
        adapter=Input(adapter, str(adapter)) if adapter else None,
        runtime=RUNTIME,
        pad_id=0,
        prefix=prefix,
    )


def packed(
    held: Engine, about: Job, rows: list[list[Encoded]], tokens: int = 256
) -> list[list[float]]:
    plan, order = plan_scoring(rows, len(about.prefix), tokens, 10**6)
    assert sorted(order) == list(range(len(rows)))
    out: list[Any] = [None] * len(rows)
    for i, result in zip(order, [x for batch in plan for x in held.run(about, batch)], strict=True):
        out[i] = result
    return out


def alone(model: Any, rows: list[list[Encoded]]) -> list[list[float]]:
    with torch.inference_mode():
        return [[float(label_logprobs(model, [r], 0).sum()) for r in q] for q in rows]


def close(a: list[list[float]], b: list[list[float]], tolerance: float = 1e-4) -> bool:
    return all(
        abs(x - y) <= tolerance * max(1, abs(y))
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p, q, strict=True)
    )


# ---- trees ---------------------------------------------------------------------------------------


@given(questions())
def test_a_tree_holds_every_row_once(asked: list[list[Encoded]]) -> None:
    for rows in asked:
        t = tree(rows)
        assert len(t) == len(
            {r.ids[:n] for r in rows for n in range(1, len(r.ids))}
        )  # no prefix twice, no last token
        for pairs, row in zip(t.scored, rows, strict=True):
            path = t.path(pairs[-1][0])
            assert tuple(t.ids[n] for n in path) == row.ids[:-1]
            assert tuple(t.depth[n] for n in path) == tuple(range(len(row.ids) - 1))
            assert [n for n, _ in pairs] == path[row.start - 1 :]
            assert tuple(token for _, token in pairs) == row.ids[row.start :]


@given(questions(), st.integers(0, 3), st.sampled_from([None, 1, 4]))
def test_a_token_sees_its_ancestors_and_the_past(
    asked: list[list[Encoded]], past: int, window: int | None
) -> None:
    trees = [tree(q) for q in asked]
    seen = visible(pack([trees, trees[:1]], 0, "cpu"), past, window)[:, 0]
    offset = 0
    for t in trees:
        for i in range(len(t)):
            below = t.depth[: i + 1]  # an ancestor is the last node before i at its depth
            ancestors = {
                max(j for j in range(i + 1) if below[j] == d) for d in range(t.depth[i] + 1)
            }
            wanted = {
                a + past + offset
                for a in ancestors
                if window is None or t.depth[i] - t.depth[a] < window
            }
            wanted |= {p for p in range(past) if window is None or t.depth[i] + past - p < window}
            assert set(seen[0, offset + i].nonzero()[:, 0].tolist()) == wanted
        offset += len(t)
    assert bool(seen.any(-1).all())  # no row of the attention is empty


@given(questions(prefix=5))
def test_the_shared_prefix_is_shared_and_leaves_a_token(asked: list[list[Encoded]]) -> None:
    found = shared_prefix(asked)
    rows = [r for q in asked for r in q]
    assert all(r.ids[: len(found)] == found and r.start > len(found) for r in rows)
    longer = {r.ids[: len(found) + 1] for r in rows}
    assert len(longer) > 1 or min(r.start for r in rows) == len(found) + 1


# ---- scores --------------------------------------------------------------------------------------


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(asked=questions(), tokens=st.sampled_from([1, 64, 1024]))
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_equals_one_by_one(
    folders: Any, held: dict[str, Engine], family: str, asked: list[list[Encoded]], tokens: int
) -> None:
    own = held.setdefault(family, Engine())
    found = packed(own, job(folders[family], family), asked, tokens)
    assert own._trees
    assert close(found, alone(own._model, asked))


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(asked=questions(prefix=20))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_prefix_changes_nothing(
    folders: Any, held: dict[str, Engine], family: str, asked: list[list[Encoded]]
) -> None:
    own = held.setdefault(family, Engine())
    prefix = shared_prefix(asked)
    assert len(prefix) >= 20
    found = packed(own, job(folders[family], family, prefix), asked)
    assert close(found, alone(own._model, asked))


ADAPTERS = [
    "lora",
    "rslora",
    "dora",
    "adalora",
    "ia3",
    "prefix_tuning",
    "prompt_tuning",
    "p_tuning",
    "bias",
]


def made(kind: str, folder: Path, out: Path) -> Path:
    """An adapter of that type with random values, so that it changes scores."""
    import peft

    names = ["q_proj", "v_proj", "down_proj"]
    lora: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
    }
    prompt: dict[str, Any] = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(**lora),
        "rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "bias": lambda: peft.LoraConfig(**lora, bias="all"),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM", total_step=10
        ),
        "ia3": lambda: peft.IA3Config(
            target_modules=names, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(**prompt),
        "prompt_tuning": lambda: peft.PromptTuningConfig(**prompt),
        "p_tuning": lambda: peft.PromptEncoderConfig(**prompt, encoder_hidden_size=16),
    }[kind]()
    torch.manual_seed(1)
    model = peft.get_peft_model(load_model(folder, RUNTIME), config)
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data += torch.randn_like(p) * 0.2
    model.save_pretrained(str(out / kind), save_embedding_layers=False)
    return out / kind


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["tiny_llama", "gemma3"])
def test_every_adapter_type_scores_as_peft_does(
    folders: Any, tmp_path: Path, family: str, kind: str
) -> None:
    """Also after the adapter is taken off again, the base is what it was."""
    from peft import PeftModel

    adapter = made(kind, folders[family], tmp_path)
    rng = random.Random(0)
    head = [rng.randrange(5, 200) for _ in range(12)]
    asked = [
        [
            Encoded((*head, *(rng.randrange(5, 200) for _ in range(n)), *c), 12 + n)
            for c in ([7, 8], [7, 9], [11])
        ]
        for n in (1, 3, 9, 12)
    ]
    own = Engine()
    base = packed(own, job(folders[family], family), asked)
    wrapped = PeftModel.from_pretrained(load_model(folders[family], RUNTIME), str(adapter)).eval()
    wanted = alone(wrapped, asked)
    assert not close(base, wanted, 1e-3)
    for prefix in ((), shared_prefix(asked)):
        found = packed(own, job(folders[family], family, prefix, adapter), asked)
        assert own._trees
        assert close(found, wanted)

    @settings(max_examples=5, deadline=None)
    @given(drawn=questions())
    def any_trees(drawn: list[list[Encoded]]) -> None:
        assert close(
            packed(own, job(folders[family], family, (), adapter), drawn), alone(wrapped, drawn)
        )

    any_trees()
    assert packed(own, job(folders[family], family), asked) == base


def test_what_a_model_does_not_pack_is_scored_in_rows_of_its_own(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that is told to ignore masks, as one with a running state would."""
    asked = [
        [Encoded((5, 6, 7, 8), 2), Encoded((5, 6, 9, 10), 2)],
        [Encoded((5, 6, 7, 11, 12), 3), Encoded((5, 6, 7, 13, 14), 3)],
    ]
    own = Engine()
    about = replace(job(folders["tiny_llama"], "tiny_llama"), check=tuple(asked[0]))
    monkeypatch.setattr(Engine, "_masks", lambda self, seen: None)
    found = packed(own, about, asked)
    assert not own._trees
    assert any("row of its own" in note for note in own.notes)
    assert close(found, alone(own._model, asked), 1e-6)


def test_permuting_choices_permutes_scores(folders: Any) -> None:
    row = [Encoded((9, 10, 11, *c), 3) for c in ([5, 6], [5, 7, 8], [20])]
    own = Engine()
    straight, back = (
        packed(own, job(folders["tiny_llama"], "l"), [row]),
        packed(own, job(folders["tiny_llama"], "l"), [row[::-1]]),
    )
    assert straight[0] == pytest.approx(back[0][::-1], abs=1e-5)


def test_rows_are_nearly_full_and_batches_within_their_budget() -> None:
    rng = random.Random(0)
    asked = [
        [Encoded(tuple(rng.randrange(5, 99) for _ in range(rng.randrange(4, 90))), 2)]
        for _ in range(300)
    ]
    plan, order = plan_scoring(asked, 0, 512, 10**6)
    assert sorted(order) == list(range(300))
    assert all(b.tokens() <= 512 for b in plan)
    assert sum(len(q[0].ids) - 1 for q in asked) / sum(b.tokens() for b in plan) > 0.95
    plan, _ = plan_scoring(asked, 0, 1, 1)
    assert len(plan) == sum(len(b.rows) for b in plan)  # a row alone is never refused


# ---- the stage -----------------------------------------------------------------------------------


def stage(*overrides: str, split: str = "test", **more: Any) -> EvaluateStage:
    c = compose_config(["dataset=facts", *overrides])
    return EvaluateStage(
        dataset=c.dataset, split=split, evaluate=c.evaluate, runtime=RUNTIME, **more
    )


def inputs(base: str = "tiny_llama", **more: Path) -> dict[str, Input]:
    files = {
        "model": embedded(base),
        "data": embedded("facts") / "test.jsonl",
        "shots": embedded("facts") / "train.jsonl",
        **more,
    }
    return {name: Input(path, str(path)) for name, path in files.items()}


def test_neither_batch_nor_devices_change_a_score(tmp_path: Path, watch: Silent) -> None:
    """Two processes give the very bits of one: batches do not depend on their number."""
    found = []
    for i, (tokens, devices) in enumerate([(2048, 1), (2048, 2), (130, 1)]):
        out = tmp_path / str(i)
        out.mkdir()
        config = stage("evaluate.limit=40", f"evaluate.batch_tokens={tokens}")
        config.runtime = replace(RUNTIME, devices=devices)
        context = Context(watch)
        evaluate(config, inputs(), out, context)
        context.kept.release()
        found.append([r["loglikelihoods"] for r in read_records(out)])
    one, two, small = found
    assert close(
        two, one, 1e-6 if torch.get_num_threads() > 1 else 0.0
    )  # each process has half of the threads
    assert close(small, one, 1e-5)


def test_shots_are_the_same_for_all_and_never_asked(tmp_path: Path, watch: Silent) -> None:
    config = stage("evaluate.num_fewshot=3", "evaluate.limit=20")
    result = evaluate(config, inputs(), tmp_path, Context(watch))
    assert result.n == 20
    own = stage("evaluate.num_fewshot=3")
    own.fewshot_split = "test"
    result = evaluate(own, inputs(shots=embedded("facts") / "test.jsonl"), tmp_path, Context(watch))
    assert result.n == 221
    assert result.left_out == {"a place among the shots": 3}
    with pytest.raises(DataError, match="has 224 rows only"):
        evaluate(
            stage("evaluate.num_fewshot=300"),
            inputs(shots=embedded("facts") / "test.jsonl"),
            tmp_path,
            Context(watch),
        )


def test_a_question_longer_than_the_context(tmp_path: Path, watch: Silent) -> None:
    row = json.loads((embedded("facts") / "test.jsonl").read_text().splitlines()[0])
    file = tmp_path / "test.jsonl"
    file.write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"id": "long", "question": "what " * 3000}) + "\n"
    )
    with pytest.raises(
        DataError,
        match=r"test\.jsonl, line 2: the question needs \d+ tokens, the model has room for",
    ):
        evaluate(stage(), inputs(data=file), tmp_path, Context(watch))
    result = evaluate(stage("dataset.bad_rows=skip"), inputs(data=file), tmp_path, Context(watch))
    assert (result.n, result.left_out) == (1, {"more tokens than the model has room for": 1})
    long = stage("evaluate.mode=generate", "evaluate.max_new_tokens=250")  # of 256 places
    with pytest.raises(DataError, match=r"line 1: the question needs \d+ tokens, the model has"):
        evaluate(long, inputs(), tmp_path, Context(watch))


def test_a_tokenizer_of_another_model(tmp_path: Path, watch: Silent) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in embedded("tiny_llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ModelError, match="do not belong together"):
        evaluate(stage(), inputs(model=folder), tmp_path, Context(watch))


def test_scores_that_are_not_finite_stop_the_run(tmp_path: Path, watch: Silent) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for file in embedded("tiny_llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        StageError, match=r"224 of 224 questions are not finite.*hardware\.precision"
    ):
        evaluate(stage(), inputs(model=folder), tmp_path, Context(watch))


def test_a_damaged_adapter_is_refused(tmp_path: Path, watch: Silent) -> None:
    adapter = made("lora", embedded("tiny_llama"), tmp_path)
    with pytest.raises(AdapterError, match="belongs to another base"):
        evaluate(
            stage("evaluate.limit=2"),
            inputs("tiny_qwen2", adapter=adapter),
            tmp_path,
            Context(watch),
        )


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "lora", "prompt_tuning"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2", "gemma3"])
def test_writing_equals_the_librarys_generation(
    folders: Any, tmp_path: Path, family: str, kind: str | None
) -> None:
    """Prompts of different length in one batch, with and without a cached prefix; the library takes
    them one by one."""
    from peft import PeftModel

    adapter = made(kind, folders[family], tmp_path) if kind else None
    rng = random.Random(0)
    head = tuple(rng.randrange(5, 200) for _ in range(9))
    prompts = [(*head, *(rng.randrange(5, 200) for _ in range(n))) for n in (1, 4, 7, 15)]
    base = load_model(folders[family], RUNTIME)
    model = PeftModel.from_pretrained(base, str(adapter)).eval() if adapter else base
    wanted = []
    for p in prompts:
        ids = torch.tensor([p])
        with torch.inference_mode():
            out = ids
            for _ in range(12):  # greedy without any cache
                step = model(input_ids=out).logits[:, -1].argmax(-1, keepdim=True)
                out = torch.cat([out, step], dim=1)
        wanted.append(out[0, ids.shape[1] :].tolist())
    own = Engine()
    ends = {base.generation_config.eos_token_id, load_tokenizer(folders[family]).eos_token_id}
    wanted = [w[: next((i + 1 for i, t in enumerate(w) if t in ends), len(w))] for w in wanted]
    for prefix in ((), head):
        plan, order = plan_writing(prompts, len(prefix), 10**6, 12, ())
        found = [x for b in plan for x in own.run(job(folders[family], family, prefix, adapter), b)]
        assert [wanted[i] for i in order] == found


def test_written_answers_stop_and_are_counted(tmp_path: Path, watch: Silent) -> None:
    """The tiny model writes answers of its world; the letters that are asked of it, it does not
    know."""
    result = evaluate(
        stage("evaluate.mode=generate", "evaluate.limit=8", "evaluate.max_new_tokens=6"),
        inputs(),
        tmp_path,
        Context(watch),
    )
    records = read_records(tmp_path)
    assert result.unparsed == sum(r["prediction"] is None for r in records) == 8
    assert result.accuracy == 0.0
    assert all(r["text"] and not r["correct"] for r in records)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" B", 1),
        ("(C).", 2),
        (" The answer is A.", 0),
        ("answer: d", 3),
        ("B. because", 1),
        (" A cat", None),
        ("Z.", None),
        ("", None),
    ],
)
def test_letters_are_read_and_never_guessed(text: str, said: int | None) -> None:
    assert answers.letter(text, "ABCD") == said


def test_numbers_are_read_as_the_harness_reads_them() -> None:
    text = "She has 3 + 4 = 7.\n#### 1,007\nQuestion: next 9"
    assert answers.until(text, ["Question:", "</s>"]) == "She has 3 + 4 = 7.\n#### 1,007\n"
    assert answers.strict(text) == "1,007"
    assert answers.plain("so it is\n#### $1,007.") == "1007"
    assert answers.flexible("It costs $12.50 or 13") == "13"
    assert answers.strict("no number") is None
    assert answers.flexible("no number") is None


def test_gsm8k_is_judged_strictly_and_flexibly(tmp_path: Path, watch: Silent) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}) + "\n")
    c = compose_config(["dataset=gsm8k", "evaluate.max_new_tokens=5"])
    assert c.evaluate.mode == "generate"
    asked = EvaluateStage(dataset=c.dataset, split="test", evaluate=c.evaluate, runtime=RUNTIME)
    result = evaluate(asked, inputs(data=file), tmp_path, Context(watch))
    assert (result.accuracy, result.accuracy_flexible, result.unparsed) == (0.0, 0.0, 1)
    file.write_text(json.dumps({"question": "1+1?", "answer": "two"}) + "\n")
    with pytest.raises(DataError, match="cannot be judged"):
        evaluate(asked, inputs(data=file), tmp_path, Context(watch))


# ---- memory --------------------------------------------------------------------------------------

STARVED = """
import resource, sys
from pathlib import Path
import psutil, torch
from paw.data.tokenise import Encoded
from paw.evaluation import engine
from paw.evaluation.plan import plan_scoring
from paw.models.load import Runtime
from paw.store import Input
folder, room, budget = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
asked = [[Encoded(tuple(range(5, 5 + 100)) + (i % 90, c), 2) for c in (7, 8)] for i in range(800)]
job = engine.Job(base=Input(folder, "base"), runtime=Runtime("float32"), pad_id=0)
own = engine.Engine()
own.run(job, plan_scoring(asked[:1], 0, 64, 10**6)[0][0])
resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room * 2**20,) * 2)
plan, order = plan_scoring(asked, 0, budget, 10**9)
print(len([x for b in plan for x in own.run(job, b)]), own.notes)
"""


def test_batches_back_off_when_memory_runs_out() -> None:
    """The process may take 100 MiB more than a small batch needs; 800 questions in one batch need
    some five times as much, so that what the allocator still holds from the small batch (it differs
    between machines) decides nothing."""
    command = [sys.executable, "-c", STARVED, str(embedded("tiny_llama"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "100", str(10**6)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("800 ['out of memory: batches of at most"), done.stdout


def test_halves_hold_the_whole() -> None:
    rows = tuple((tree([Encoded((1, 2, i), 2)]),) for i in range(5))
    halves = Scoring(rows).halves()
    assert [r for h in halves for r in h.rows] == list(rows)
    assert Scoring(rows[:1]).halves() == []


def test_engines_hold_one_base_for_many_adapters(
    tmp_path: Path, watch: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    real = engine.load_model
    monkeypatch.setattr(engine, "load_model", lambda *a: loads.append(a) or real(*a))
    adapter = made("lora", embedded("tiny_llama"), tmp_path)
    assert STAGE.keeps
    kept = Kept()
    for extra in ({}, {"adapter": adapter}, {}):
        context = Context(watch, kept=kept)
        evaluate(stage("evaluate.limit=4"), inputs(**extra), tmp_path, context)
    assert len(loads) == 1
    kept.release()
    evaluate(stage("evaluate.limit=4"), inputs(), tmp_path, Context(watch, kept=kept))
    assert len(loads) == 2
