"""Stage `refine`: an adapter trained on lessons, from a transferred one or from a fresh one."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.config.checks import transient
from paw.data.config import DatasetConfig
from paw.data.encode import Rows, write_rows
from paw.data.kinds import kind_named
from paw.data.tokenise import Encoded, encode
from paw.data.vocabulary import by_bytes
from paw.errors import DataError
from paw.models.adapters import (
    CONFIG,
    WEIGHTS,
    Factors,
    birth,
    read_adapter,
    read_config,
    stamp,
    write_adapter,
)
from paw.models.load import Runtime, load_tokenizer, room
from paw.refine.align import Vocabulary
from paw.refine.fold import folded
from paw.refine.teach import about, read_lessons
from paw.refine.teacher import Lesson
from paw.store import Context, Input, Stage, Watch, free_memory
from paw.training.adapters import AdapterConfig
from paw.training.adapters.lora import LoraConfig
from paw.training.config import TrainConfig
from paw.training.files import BEST, recover
from paw.training.history import CURVE
from paw.training.train import TrainResult, accumulated, fitted

if TYPE_CHECKING:
    from paw.training.fit import Plan

START, ROWS, HELD = "start", "rows", "held"
RARE = 1e-3  # answers that count less are left out


@dataclass(kw_only=True)
class RefineStage:
    dataset: DatasetConfig
    adapter: AdapterConfig  # of one that begins fresh
    learn: list[str]
    steps: int
    lr: float
    gain_steps: int
    gain_lr: float
    batch_size: int
    val_every: int
    patience: int
    held: int
    max_length: int
    seed: int
    shuffle: bool = False  # the control whose answers belong to other prompts
    runtime: Runtime
    devices: int = 1
    name: str | None = transient(None)  # the base's on the hub
    trust_remote_code: bool = transient(False)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """With the source and its adapter, on prompts that were held out."""

    answers: float  # share of prompts with the same greedy answer, or the same favourite choice
    loss: float  # nats a token of its answers


@dataclass(frozen=True, kw_only=True)
class RefineResult:
    start: str  # what it began with: the method's name, or fresh
    lessons: int
    held: int  # of them
    steps: int  # that were done
    best_step: int  # counted from the start of the first phase; 0 where nothing helped
    # nats a token of the held-out answers: at the start, with the gains, with the best adapter
    loss_start: float
    loss_gains: float | None = None
    loss_best: float
    # share of held-out prompts on which the target does what the source with its adapter does
    agreement_base: float
    agreement_start: float
    agreement: float
    loss_base: float
    tokens: int = 0  # trained on
    written: int = 0  # tokens that the source wrote
    coverage: float | None = None  # of the transferred adapter

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, the best after {self.best_step}; held-out loss "
            f"{self.loss_base:.3f} of the base, {self.loss_start:.3f} at the start, "
            f"{self.loss_best:.3f} at last"
        )

    @property
    def said(self) -> str:
        """One paragraph in plain words."""
        kept = "" if self.best_step else " No step was better than the start, which is kept."
        return (
            f"Refinement from {self.start}: on {self.held} prompts that were held out, the target "
            "does what the source with its adapter does on "
            f"{self.agreement_base:.0%} of them without an adapter, {self.agreement_start:.0%} "
            f"with the start and {self.agreement:.0%} at last; the source's answers cost it "
            f"{self.loss_base:.2f}, {self.loss_start:.2f} and {self.loss_best:.2f} nats a token."
            f"{kept} It took {self.steps} steps on {self.tokens} tokens, after the source had "
            f"written {self.written}. Agreement is no accuracy: the source may be wrong, and "
            "where a few labelled examples are at hand, evaluate on them (task=pipeline)."
        )


STAGE = Stage(
    "refine",
    "2",
    "paw.refine.refine:refine",
    config=RefineStage,
    result=RefineResult,
    resumes=True,
    devices="all",
)


def refine(
    config: RefineStage, inputs: Mapping[str, Input], out: Path, context: Context
) -> RefineResult:
    """Trains an adapter on the lessons, until those held out say that it is enough.

    First only a gain for each rank direction, then the factors; each phase begins with the best of
    the one before. Where no step is better than the start, the start itself is the result.

    Args:
        inputs: `model`, the target; `lessons`, a finished stage `teach`; `start`, an adapter of
            the target, unless it begins fresh.

    Writes a PEFT folder and the losses of every step, `curve_gains.jsonl` and
    `curve_factors.jsonl`.

    Raises:
        DataError: where the lessons do not fit into the model.
        StageError: where a loss is not finite, or a single example does not fit into memory.
    """
    folder, given = context.unfinished, inputs.get("start")
    lessons, held = _encoded(config, inputs, folder)
    start = _balanced(given.path, folder / START) if given else None
    begun, phases = start, list[tuple[str, TrainResult, Path]]()
    for what in config.learn:
        if what == "gains" and begun is None:
            continue
        plan = _plan(config, inputs["model"].path, lessons - len(held), what, begun, folder)
        result = fitted(plan, len(Rows(plan.rows)), context)
        phases.append((what, result, plan.folder))
        begun = plan.folder / BEST
    assert begun is not None
    free_memory()
    done, best = _best(phases)
    base, first, last = _agreements(config, inputs["model"], held, start, begun, context)
    if given is not None and best == 0:
        _copy(given.path, out)
    else:
        shutil.copytree(begun, out, dirs_exist_ok=True)
    for what, _, where in phases:
        shutil.copyfile(where / CURVE, out / f"curve_{what}.jsonl")
    taught, said = about(inputs["lessons"].path), birth(given.path) if given else {}
    figures = said.get("figures", {})
    stamp(
        out,
        inputs["model"].fingerprint,
        made_by="refine",
        lessons=inputs["lessons"].fingerprint,
        start=given.fingerprint if given else None,
        figures=figures,
    )
    gains = next((r for what, r, _ in phases if what == "gains"), None)
    return RefineResult(
        start=figures.get("method", "a given adapter") if given else "a fresh adapter",
        lessons=lessons,
        held=len(held),
        steps=done,
        best_step=best,
        loss_start=_figure(phases[0][1].val_start),
        loss_gains=gains.val_best if gains else None,
        loss_best=_figure(phases[-1][1].val_best),
        loss_base=base.loss,
        agreement_base=base.answers,
        agreement_start=first.answers,
        agreement=last.answers,
        tokens=sum(result.tokens for _, result, _ in phases),
        written=taught.written,
        coverage=figures.get("coverage"),
    )


# ---- lessons as tokens of the target -------------------------------------------------------------


def _encoded(
    config: RefineStage, inputs: Mapping[str, Input], folder: Path
) -> tuple[int, list[list[Encoded]]]:
    """Writes the rows that are trained on, and those held out.

    Returns:
        How many lessons there are, and the rows of those held out, a list a lesson.

    Raises:
        DataError: where too few fit into the model.
    """
    model, lessons = inputs["model"].path, read_lessons(inputs["lessons"].path)
    if config.shuffle:
        lessons = _shuffled(lessons, config.seed)
    tokenizer = load_tokenizer(model, config.trust_remote_code)
    close = kind_named(config.dataset.kind).written
    pairs = [pair for lesson in lessons for pair in lesson.pairs]
    flat = iter(encode(tokenizer, pairs, config.dataset.chat, close))
    longest, rows = min(config.max_length, room(model) or 10**9), list[list[Encoded]]()
    told = any(lesson.places for lesson in lessons)
    vocabulary = Vocabulary(by_bytes(tokenizer) if told else {})
    for lesson in lessons:
        mine = [replace(next(flat), weight=weight) for weight in lesson.weights]
        if lesson.places:
            each = zip(mine, lesson.answers, lesson.places, strict=True)
            mine = [replace(row, soft=vocabulary.soft(row, a, said)) for row, a, said in each]
        # the first stays first: agreement is with the answer that counts most
        mine.sort(key=lambda row: -row.weight)
        if max(len(row.ids) for row in mine) <= longest:
            rows.append([row for row in mine if row.weight >= RARE])
    count = min(config.held, len(rows) // 5)
    if count < 1:
        raise DataError(
            f"refine: {len(rows)} lessons of at most {longest} tokens are too few to hold some "
            "out. Give at least 5 prompts, or raise refine.max_length."
        )
    order = random.Random(config.seed).sample(range(len(rows)), len(rows))
    held = [rows[i] for i in sorted(order[:count])]
    learnt = [rows[i] for i in sorted(order[count:])]
    for name, some in ((ROWS, learnt), (HELD, held)):
        (folder / name).mkdir(exist_ok=True)
        few = [one if told else folded(one) for one in some]
        write_rows(folder / name, [row for mine in few for row in mine])
    return len(rows), held


def _shuffled(lessons: Sequence[Lesson], seed: int) -> list[Lesson]:
    """Every prompt with the answers of another."""
    order = random.Random(seed).sample(range(len(lessons)), len(lessons))
    given = {i: lessons[j] for i, j in zip(order, [*order[1:], order[0]], strict=True)}
    return [
        replace(
            one,
            answers=given[i].answers,
            weights=given[i].weights,
            contexts=(),
            places=given[i].places,
        )
        for i, one in enumerate(lessons)
    ]


# ---- phases --------------------------------------------------------------------------------------


def _plan(
    config: RefineStage, model: Path, prompts: int, what: str, start: Path | None, folder: Path
) -> Plan:
    from paw.training.fit import Plan

    gains, mine = what == "gains", folder / what
    mine.mkdir(exist_ok=True)
    recover(mine)
    rows, adapter = Rows(folder / ROWS), config.adapter
    if gains:
        adapter = AdapterConfig(method="gains")
    elif isinstance(adapter, LoraConfig):
        adapter = replace(adapter, dropout=0.0)  # as a transferred one has
    train = TrainConfig(
        lr=config.gain_lr if gains else config.lr,
        max_steps=config.gain_steps if gains else config.steps,
        batch_size=round(config.batch_size * len(rows) / prompts),
        schedule="linear",
        warmup_ratio=0.0,
        val_every=config.val_every,
        patience=config.patience,
        seed=config.seed,
    )
    return Plan(
        model=model,
        name=config.name or str(model),
        trust_remote_code=config.trust_remote_code,
        runtime=replace(config.runtime, devices=config.devices),
        adapter=adapter,
        train=train,
        rows=folder / ROWS,
        val_rows=folder / HELD,
        classify=False,
        steps=train.max_steps,
        accumulate=accumulated(train, config.runtime, config.devices, rows),
        gradient_checkpointing=False,
        folder=mine,
        start=start,
    )


def _balanced(adapter: Path, folder: Path) -> Path:
    """A transferred adapter with A as large as that of a fresh one of scale 2 (the usual α = 2r),
    so that a learning rate means the same for both. By powers of 2: the product is the same to the
    bit."""
    factors = {}
    for name, f in read_adapter(adapter).items():
        wanted, there = 2 * math.sqrt(f.rank / 3), float(f.a.norm())
        c = 2.0 ** round(math.log2(wanted / there)) if there > 0 else 1.0
        factors[name] = Factors(f.a * c, f.b / c)
    folder.mkdir(exist_ok=True)
    write_adapter(folder, factors, read_config(adapter).get("base_model_name_or_path"))
    return folder


def _best(phases: Sequence[tuple[str, TrainResult, Path]]) -> tuple[int, int]:
    """Steps that were done, and after how many the result was there."""
    done = best = 0
    for _, result, _ in phases:
        if result.best_step:
            best = done + result.best_step
        done += result.steps
    return done, best


def _figure(value: float | None) -> float:
    assert value is not None, "every phase is validated"
    return value


def _copy(adapter: Path, out: Path) -> None:
    """The start as it is, so that what was evaluated of it holds."""
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(adapter / name, out / name)


# ---- agreement -----------------------------------------------------------------------------------


def _agreements(
    config: RefineStage,
    model: Input,
    held: Sequence[Sequence[Encoded]],
    start: Path | None,
    best: Path,
    watch: Watch,
) -> list[Agreement]:
    """Of the base, of the start (which is the base's where it was fresh) and of the result."""
    import torch

    from paw.models.adapters import attach, detach
    from paw.models.load import load_model

    base: Any = load_model(model.path, config.runtime, config.trust_remote_code)
    pad = load_tokenizer(model.path, config.trust_remote_code).pad_token_id
    found = list[Agreement]()
    with torch.inference_mode():
        for adapter in (None, start, best):
            if adapter is None:
                found.append(found[0] if found else _agreement(base, held, pad))
                continue
            wrapped = attach(base, adapter, model.fingerprint)
            found.append(_agreement(wrapped, held, pad))
            detach(wrapped, adapter)
    return found


def _agreement(model: Any, held: Sequence[Sequence[Encoded]], pad: int) -> Agreement:
    """Where answers are compared, the one that counts most must be the likeliest; where there is
    one, each of its tokens: then greedy writing gives exactly it."""
    import torch

    from paw.evaluation.likelihood import label_logits

    same, loss, tokens = 0, 0.0, 0.0
    for rows in held:
        logits, labels = label_logits(model, rows, pad)
        nats = logits.logsumexp(-1) - logits.gather(-1, labels[:, None])[:, 0]
        each = torch.split(nats, [len(r.ids) - r.start for r in rows])
        sums = [float(x.sum()) for x in each]
        alone = len(rows) == 1 and bool((logits.argmax(-1) == labels).all())
        same += alone if len(rows) == 1 else sums.index(min(sums)) == 0
        loss += sum(r.weight * s for r, s in zip(rows, sums, strict=True))
        tokens += sum(r.weight * len(x) for r, x in zip(rows, each, strict=True))
    return Agreement(answers=same / len(held), loss=loss / tokens)
