"""The engine: a base held in memory, an adapter on it, and batches of trees scored or prompts continued.

Batches are planned before any of them runs and do not depend on the number of devices, so that several devices give the
very numbers of one.
"""

from __future__ import annotations

import bisect
import gc
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from paw.data.encode import Encoded
from paw.errors import StageError
from paw.evaluation.trees import Packed, Tree, pack, shared_prefix, tree, visible
from paw.models.load import Runtime, load_model, load_tokenizer
from paw.store import Input, Watch

if TYPE_CHECKING:
    import torch

    from paw.evaluation.past import Layers

WORTH = 48  # shared tokens from which a cache pays
ROW = 128  # tokens of a row: short questions stand together in one, so that little is filled up
BATCH = {"cpu": 1024, "cuda": 16384}  # tokens
READS = {"cpu": 2**26, "cuda": 2**28}  # float32 logits a batch: a quarter of a GiB, and one
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """All that decides what a batch's numbers are."""

    base: Input
    adapter: Input | None
    runtime: Runtime
    trust_remote_code: bool
    pad_id: int
    prefix: tuple[int, ...] = ()  # tokens that all rows begin with, put into a cache
    check: tuple[Encoded, ...] = ()  # one question, scored both ways before anything is


@dataclass(frozen=True)
class Scoring:
    """Rows of trees, to be scored: a list of sums a tree."""

    rows: tuple[tuple[Tree, ...], ...]

    def halves(self) -> list[Scoring]:
        rows = self.rows if len(self.rows) > 1 else tuple((t,) for t in self.rows[0])
        return [Scoring(rows[: len(rows) // 2]), Scoring(rows[len(rows) // 2 :])] if len(rows) > 1 else []

    def tokens(self) -> int:
        return len(self.rows) * max(sum(map(len, row)) for row in self.rows)

    def __len__(self) -> int:
        return sum(map(len, self.rows))


@dataclass(frozen=True)
class Writing:
    """Prompts (after the prefix), to be continued greedily: a list of tokens a prompt."""

    prompts: tuple[tuple[int, ...], ...]
    limit: int
    stop: tuple[str, ...]

    def halves(self) -> list[Writing]:
        half, n = len(self.prompts) // 2, len(self.prompts)
        return [replace(self, prompts=self.prompts[:half]), replace(self, prompts=self.prompts[half:])] if n > 1 else []

    def tokens(self) -> int:
        return len(self.prompts) * (max(map(len, self.prompts)) + self.limit)

    def __len__(self) -> int:
        return len(self.prompts)


Batch = Scoring | Writing


# ---- planning -----------------------------------------------------------------------------------------


def prefix_of(questions: Sequence[Sequence[Encoded]]) -> tuple[int, ...]:
    """What is worth keeping in a cache: few shots, a long system prompt; nothing if it is short."""
    found = shared_prefix(questions)
    return found if len(found) >= WORTH and len(questions) > 1 else ()


def plan_scoring(questions: Sequence[Sequence[Encoded]], prefix: int, tokens: int, reads: int) -> tuple[list[Scoring], list[int]]:
    """Questions as batches of full rows, and the order in which their scores will come.

    Args:
        prefix: tokens at the front of every row that a cache holds.
        tokens, reads: at most so many tokens and read positions a batch; one question alone is never refused.
    """
    trees = [tree(q, prefix) for q in questions]
    batches: list[list[list[int]]] = []
    width = read = 0
    for row in _rows([len(t) for t in trees], max(ROW, *map(len, trees))):
        length, needs = sum(len(trees[i]) for i in row), sum(trees[i].reads for i in row)
        width = max(width, length)
        if not batches or (len(batches[-1]) + 1) * width > tokens or read + needs > reads:
            batches.append([])
            width, read = length, 0
        batches[-1].append(row)
        read += needs
    plan = [Scoring(tuple(tuple(trees[i] for i in row) for row in batch)) for batch in batches]
    return plan, [i for batch in batches for row in batch for i in row]


def _rows(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Items in rows of at most `most`, the longest rows first: each, from the longest on, goes where least is left over."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # what is left of each row, in order
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(left, (lengths[i], -1))
        room, row = left.pop(at) if at < len(left) else (most, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(left, (room - lengths[i], row))
    return sorted(rows, key=lambda row: (-sum(lengths[i] for i in row), row))


def plan_writing(
    prompts: Sequence[tuple[int, ...]], prefix: int, tokens: int, limit: int, stop: Sequence[str]
) -> tuple[list[Writing], list[int]]:
    """Prompts as batches of like length, and the order in which their continuations will come."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * (len(prompts[batches[-1][0]]) - prefix + limit) > tokens:
            batches.append([])
        batches[-1].append(i)
    plan = [Writing(tuple(prompts[i][prefix:] for i in batch), limit, tuple(stop)) for batch in batches]
    return plan, [i for batch in batches for i in batch]


# ---- one device ---------------------------------------------------------------------------------------


class Engine:
    """One device. What is loaded stays until something else is asked for: many adapters cost one load of their base."""

    def __init__(self) -> None:
        self._held: tuple[Any, ...] = ()  # what the model is
        self._model: Any = None  # the base, with the adapter's layers in it if it has any
        self._tokenizer: Any = None
        self._job: Job | None = None
        self._adapted: tuple[Any, Path] | None = None  # the adapter's wrapper, and its folder
        self._past: Layers = []
        self._trees = True  # whether the model takes packed questions
        self._most: int | None = None  # tokens a batch may have, once memory has run out
        self.notes: list[str] = []

    def release(self) -> None:
        """Gives the memory back."""
        self._held, self._model, self._job, self._adapted, self._past, self._most = (), None, None, None, [], None
        _free()

    def run(self, job: Job, batch: Batch) -> list[Any]:
        """The results of a batch, in its order. A batch that does not fit into memory is halved, and so are all later ones."""
        import torch

        with torch.inference_mode():
            if job != self._job:
                self._prepare(job)
            return self._fitting(batch)

    def _fitting(self, batch: Batch) -> list[Any]:
        if self._most is None or batch.tokens() <= self._most or not batch.halves():
            try:
                return self._score(batch) if isinstance(batch, Scoring) else self._write(batch)
            except (RuntimeError, MemoryError) as e:
                if not _out_of_memory(e):
                    raise
                if not batch.halves():
                    raise StageError(f"evaluate: one question of {batch.tokens()} tokens does not fit into memory. "
                                     "Use a device with more of it, or fewer shots.") from None  # fmt: skip
            self._most = batch.tokens() // 2
            self.notes.append(f"out of memory: batches of at most {self._most} tokens from here (evaluate.batch_tokens sets it)")
            _free()
        return [x for half in batch.halves() for x in self._fitting(half)]

    # ---- a base with an adapter on it

    def _prepare(self, job: Job) -> None:
        from paw.evaluation.past import virtual_tokens
        from paw.models.adapters import attach, detach

        self._job, self._past = None, []
        if self._adapted is not None and not detach(*self._adapted):
            self._held = ()
        self._adapted = None
        held = (job.base.fingerprint, replace(job.runtime, devices=1), job.trust_remote_code)
        if held != self._held:
            self.release()
            self._model = load_model(job.base.path, job.runtime, job.trust_remote_code)
            self._tokenizer = load_tokenizer(job.base.path, job.trust_remote_code)
            self._held = held
        if job.adapter is not None:
            self._held = ()  # until it is on whole
            wrapped = attach(self._model, job.adapter.path, job.base.fingerprint)
            self._adapted, self._held = (wrapped, job.adapter.path), held
            self._past = virtual_tokens(wrapped)
        self._trees = self._may_pack() and (not job.check or self._agrees(job))
        if job.prefix and self._trees:
            self._past = self._extended(job.prefix)
        self._job = job

    def _extended(self, prefix: tuple[int, ...]) -> Any:
        """The past with the tokens of a prefix behind it."""
        from paw.evaluation.past import growing, taken

        cache = growing(self._past)
        chain = tree([Encoded((*prefix, 0), len(prefix))])
        packed = pack([[replace(chain, ids=chain.ids[:-1], depth=chain.depth[:-1], parent=chain.parent[:-1],
                                end=tuple(len(prefix) for _ in prefix), scored=((len(prefix) - 1,),))]], 0, self._model.device)  # fmt: skip
        self._forward(packed, cache, packed.reads)
        return taken(cache)

    def _may_pack(self) -> bool:
        """Attention of every layer must be ordinary or windowed: a state that runs through all tokens cannot be masked."""
        types = set(getattr(self._model.config.get_text_config(), "layer_types", None) or ())
        return types <= {"full_attention", "sliding_attention"}

    def _agrees(self, job: Job) -> bool:
        """One question both ways: trees are only trusted where they give what single rows give."""
        plain = [self._alone(row) for row in job.check]
        try:
            packed = self._packed_scores([[tree(job.check)]])[0]
        except (RuntimeError, ValueError, TypeError, KeyError) as e:
            if _out_of_memory(e):
                raise
            packed = [float("nan")] * len(plain)
        loose = job.runtime.precision != "float32"
        slack = [0.5 + 0.05 * abs(p) if loose else 1e-3 + 1e-4 * abs(p) for p in plain]
        if all(abs(a - b) <= s for a, b, s in zip(packed, plain, slack, strict=True)):
            return True
        if any(p != p for p in plain):
            return True  # not the packing's fault: the caller refuses scores that are not finite
        self.notes.append("this model does not take packed questions: every choice is scored in a row of its own, more slowly")
        return False

    # ---- scoring

    def _score(self, batch: Scoring) -> list[list[float]]:
        if self._trees:
            return self._packed_scores(batch.rows)
        prefix = self._job.prefix if self._job else ()
        return [[self._alone(_row(t, i, prefix)) for i in range(len(t.scored))] for row in batch.rows for t in row]

    def _alone(self, row: Encoded) -> float:
        """One row without any filling, through the adapter's own forward pass."""
        from paw.evaluation.likelihood import token_logprobs

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, that virtual tokens take no position ids: without filling they need none
            return float(token_logprobs(self._whole(), [row], 0)[0].sum())

    def _whole(self) -> Any:
        """The model as its adapter wraps it."""
        return self._adapted[0] if self._adapted else self._model

    def _packed_scores(self, rows: Sequence[Sequence[Tree]]) -> list[list[float]]:
        from paw.evaluation.past import borrowed

        packed = pack(rows, self._job.pad_id if self._job else 0, self._model.device)
        logits = self._forward(packed, borrowed(self._past) if self._past else None, packed.reads)
        at, token = packed.asked.unbind(-1)
        found = (logits[at, token] - logits.logsumexp(-1)[at]).double().tolist()
        return [[sum(found[i] for i in nodes) for nodes in choices] for choices in packed.sums]

    def _forward(self, packed: Packed, cache: Any, reads: torch.Tensor) -> torch.Tensor:
        """Logits at the positions that are read (n × vocabulary), float32."""
        past = int(self._past[0][0].shape[-2]) if self._past else 0

        def pick(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (args[0][reads[:, 0], reads[:, 1]][None],)

        # Of virtual tokens all is in the past: the base goes without the wrapper. Other adapters live in its layers.
        hook = self._model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            out = self._model(
                input_ids=packed.ids,
                attention_mask=self._masks(partial(visible, packed, past)),
                position_ids=packed.depth + past,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        finally:
            hook.remove()
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def _masks(self, seen: Callable[[int | None], torch.Tensor]) -> Any:
        """Additive masks of what is seen within a window, in the form that the model takes: one, or one for each type of its
        layers."""
        import torch

        config, dtype = self._model.config.get_text_config(), self._model.dtype

        def additive(window: int | None) -> torch.Tensor:
            found = seen(window)
            return torch.zeros(found.shape, dtype=dtype, device=found.device).masked_fill_(~found, torch.finfo(dtype).min)

        types, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
        if "sliding_attention" not in types:
            return additive(None if types else window)
        return {t: additive(window if t == "sliding_attention" else None) for t in types}

    # ---- writing

    def _write(self, batch: Writing) -> list[list[int]]:
        """Greedy continuation with a cache: rows are filled on the left, and leave the batch when they are done."""
        import torch

        from paw.evaluation.past import growing

        device, tokenizer = self._model.device, self._tokenizer
        if not self._trees:
            return [self._write_alone(p, batch) for p in batch.prompts]
        past, n = int(self._past[0][0].shape[-2]) if self._past else 0, len(batch.prompts)
        width = max(map(len, batch.prompts))
        filled = torch.tensor([width - len(p) for p in batch.prompts], device=device)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in batch.prompts], device=device)
        cache = growing(self._past, n)
        rows, out, step = list(range(n)), [list[int]() for _ in range(n)], 0
        while rows:
            first, length = width + step - ids.shape[1], ids.shape[1]  # where the new tokens stand, how many they are
            query = torch.arange(first, first + length, device=device)
            position = (query - filled[:, None]).clamp_min(0) + past
            mask = self._masks(partial(_behind, past, query, filled, position))
            logits = self._model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                                 use_cache=True, logits_to_keep=1).logits[:, -1]  # fmt: skip
            chosen = logits.argmax(-1).tolist()
            step += 1
            going = []
            for k, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                out[row].append(token)
                tail = tokenizer.decode(out[row][-32:])
                if token not in self._ends() and len(out[row]) < batch.limit and not any(s in tail for s in batch.stop):
                    going.append(k)
            if len(going) < len(rows):
                keep = torch.tensor(going, dtype=torch.long, device=device)
                cache.batch_select_indices(keep)
                filled = filled[keep]
                rows = [rows[k] for k in going]
            ids = torch.tensor([[chosen[k]] for k in going], device=device)
        return out

    def _write_alone(self, prompt: tuple[int, ...], batch: Writing) -> list[int]:
        """The library's own generation, a prompt at a time, for models that the loop above does not know."""
        import torch

        assert self._job is not None
        ids = torch.tensor([[*self._job.prefix, *prompt]], device=self._model.device)
        done = self._whole().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=batch.limit, do_sample=False,
            stop_strings=list(batch.stop), tokenizer=self._tokenizer, pad_token_id=self._job.pad_id,
        )  # fmt: skip
        return list(done[0, ids.shape[1] :].tolist())

    def _ends(self) -> set[int]:
        """The tokens that end a text, as the model's own generation settings and its tokenizer name them."""
        named = getattr(self._model.generation_config, "eos_token_id", None)
        found = set(named if isinstance(named, list) else [named]) | {self._tokenizer.eos_token_id}
        return {x for x in found if x is not None}


def _behind(past: int, query: torch.Tensor, filled: torch.Tensor, position: torch.Tensor, window: int | None) -> torch.Tensor:
    """What tokens at places `query` of left-filled rows see: the past, and what stands before them and is no filling."""
    import torch

    key = torch.arange(int(query[-1]) + 1, device=query.device)
    seen = (key[None, :] <= query[:, None])[None] & ((key >= filled[:, None])[:, None] | (key[None, :] == query[:, None])[None])
    old = torch.ones(*seen.shape[:2], past, dtype=torch.bool, device=query.device)
    if window is not None:
        seen = seen & (query[:, None] - key < window)
        old = position[:, :, None] - torch.arange(past, device=query.device) < window
    return torch.cat([old, seen], dim=-1)[:, None]


def _row(t: Tree, choice: int, prefix: tuple[int, ...]) -> Encoded:
    """A choice of a tree as a row again."""
    nodes = list(t.scored[choice])
    first = len(nodes)
    while t.parent[nodes[0]] >= 0:
        nodes.insert(0, t.parent[nodes[0]])
    return Encoded((*prefix, *(t.ids[n] for n in nodes)), len(prefix) + len(nodes) - first)


def _out_of_memory(e: Exception) -> bool:
    import torch

    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e)


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- all devices of a profile -------------------------------------------------------------------------


@dataclass
class Engines:
    """The devices of a hardware profile: the first in this process, or with several each in its own."""

    _one: Engine = field(default_factory=Engine)
    _workers: list[ProcessPoolExecutor] = field(default_factory=list)

    def run(self, job: Job, batches: Sequence[Batch], watch: Watch) -> Iterator[tuple[int, list[Any]]]:
        """Every batch's number and results, as they are done."""
        total, done, told = sum(map(len, batches)), 0, set[str]()
        for i, results, notes in self._results(job, batches):
            for note in notes:
                if note not in told:
                    told.add(note)
                    watch.say(note)
            done += len(results)
            watch.progress(done, total, "questions")
            yield i, results

    def release(self) -> None:
        """Gives the memory back, before something else needs it."""
        for worker in self._workers:
            worker.shutdown()
        self._workers.clear()
        if self._one._held:
            self._one.release()

    def _results(self, job: Job, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Any], list[str]]]:
        count = min(job.runtime.devices, len(batches))
        if count <= 1:
            for i, batch in enumerate(batches):
                yield i, self._one.run(job, batch), self._one.notes
                self._one.notes = []
            return
        self._start(job.runtime)
        futures: dict[Future[tuple[list[Any], list[str]]], int] = {}
        for i, batch in enumerate(batches):
            futures[self._workers[i % count].submit(_in_worker, job, batch)] = i
        try:
            for future in as_completed(futures):
                results, notes = future.result()
                yield futures[future], results, notes
        except BrokenProcessPool:
            self._workers.clear()
            raise StageError("evaluate: the process of one device died, perhaps for want of memory. "
                             "Set evaluate.batch_tokens lower, or hardware.devices=1.") from None  # fmt: skip
        finally:
            for future in futures:
                future.cancel()

    def _start(self, runtime: Runtime) -> None:
        from multiprocessing import get_context

        while len(self._workers) < runtime.devices:
            device = f"cuda:{len(self._workers)}" if runtime.device == "cuda" else runtime.device
            threads = max(1, (os.cpu_count() or 1) // runtime.devices)
            self._workers.append(ProcessPoolExecutor(1, get_context("spawn"), _begin, (device, threads)))


_ENGINE = Engine()  # of a worker process
_DEVICE = "cpu"


def _begin(device: str, threads: int) -> None:
    """A worker's start: its device, and its share of the processor."""
    import torch

    global _DEVICE
    _DEVICE = device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it says when to stop
    if device == "cpu":
        torch.set_num_threads(threads)


def _in_worker(job: Job, batch: Batch) -> tuple[list[Any], list[str]]:
    job = replace(job, runtime=replace(job.runtime, device=_DEVICE, devices=1))
    results, notes = _ENGINE.run(job, batch), _ENGINE.notes
    _ENGINE.notes = []
    return results, notes
