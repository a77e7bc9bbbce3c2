"""One device, or several that a base is spread over: the base in memory, an adapter on it, and
batches of trees scored or prompts continued."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paw.data.tokenise import Encoded
from paw.errors import StageError
from paw.evaluation.plan import Batch, Likeliest, Scoring, Writing
from paw.evaluation.trees import Packed, Tree, behind_past, chain, pack, tree, visible
from paw.models.load import (
    Runtime,
    load_model,
    load_tokenizer,
    ordinary_attention,
    out_of_memory,
    spread_over,
)
from paw.store import Input, free_memory

if TYPE_CHECKING:
    import torch

    from paw.evaluation.past import Layers


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides what a batch's numbers are."""

    base: Input
    adapter: Input | None = None
    runtime: Runtime
    trust_remote_code: bool = False
    pad_id: int
    prefix: tuple[int, ...] = ()  # tokens that all rows begin with, put into a cache
    check: tuple[Encoded, ...] = ()  # one question, scored both ways before anything is


class Engine:
    """What is loaded stays until something else is asked for: many adapters cost one load of their
    base."""

    def __init__(self) -> None:
        self._held: tuple[Any, ...] = ()  # what the model is
        self.places: list[str] = []  # the devices that it is spread over, if it is
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
        loaded = self._model is not None
        self._held, self._past, self.places = (), [], []
        self._model = self._job = self._adapted = self._most = None
        if loaded:
            free_memory()

    def run(self, job: Job, batch: Batch) -> list[Any]:
        """The results of a batch, in its order: of scoring the log-likelihoods in nats of each
        question's choices, of writing the tokens. What does not fit into memory is halved, and so
        are all later batches.

        Raises:
            StageError: where the model or one question alone does not fit.
        """
        import torch

        device = job.runtime.device
        with torch.inference_mode():
            if job != self._job:
                try:
                    self._prepare(job)
                except (RuntimeError, MemoryError) as e:
                    if out_of_memory(e):
                        where = f"{len(self.places)} devices" if self.places else device
                        raise StageError(
                            f"evaluate: the model does not fit into the memory of {where}."
                        ) from None
                    raise
            return self._fitting(batch)

    def _fitting(self, batch: Batch) -> list[Any]:
        if self._most is None or batch.tokens() <= self._most or not batch.halves():
            try:
                return self._results(batch)
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e):
                    raise
                if not batch.halves():
                    raise StageError(
                        f"evaluate: one question of {batch.tokens()} tokens does not fit into "
                        "memory. Use a device with more of it, or fewer shots."
                    ) from None
            self._most = batch.tokens() // 2
            self.notes.append(
                f"out of memory: batches of at most {self._most} tokens from here "
                "(evaluate.batch_tokens sets it)"
            )
            free_memory()
        return [x for half in batch.halves() for x in self._fitting(half)]

    def _results(self, batch: Batch) -> list[Any]:
        if isinstance(batch, Scoring):
            return self._score(batch)
        return self._write(batch) if isinstance(batch, Writing) else self._likeliest(batch)

    # ---- a base with an adapter on it

    def _prepare(self, job: Job) -> None:
        from paw.evaluation.past import virtual_tokens
        from paw.models.adapters import attach, detach

        self._job, self._past = None, []
        if self._adapted is not None and not detach(*self._adapted):
            self._held = ()
        self._adapted = None
        trust, places = job.trust_remote_code, spread_over(job.runtime, job.base.path)
        held = (job.base.fingerprint, replace(job.runtime, devices=1), trust, *places)
        if held != self._held:
            self.release()
            self._model = load_model(job.base.path, job.runtime, trust, "none", places)
            self.places = places
            self._tokenizer = load_tokenizer(job.base.path, trust)
            self._held = held
        if job.adapter is not None:
            self._held = ()  # until it is on whole
            wrapped = attach(self._model, job.adapter.path, job.base.fingerprint)
            self._adapted, self._held = (wrapped, job.adapter.path), held
            self._past = virtual_tokens(wrapped)
        self._trees = ordinary_attention(self._model) and (not job.check or self._agrees(job))
        if job.prefix and self._trees:
            self._past = self._extended(job.prefix)
        self._job = job

    def _extended(self, prefix: tuple[int, ...]) -> Any:
        """The past with the tokens of a prefix behind it."""
        from paw.evaluation.past import growing, taken

        cache = growing(self._past)
        packed = pack([[chain(prefix)]], 0, self._model.device)
        self._forward(packed, cache)
        return taken(cache)

    def _agrees(self, job: Job) -> bool:
        """One question both ways: trees are only trusted where they give what single rows give."""
        plain = [self._alone(row) for row in job.check]
        try:
            packed = self._packed_scores([[tree(job.check)]])[0]
        except (RuntimeError, ValueError, TypeError, KeyError) as e:
            if out_of_memory(e):
                raise
            packed = [float("nan")] * len(plain)
        loose = job.runtime.precision != "float32"
        slack = [0.5 + 0.05 * abs(p) if loose else 1e-3 + 1e-4 * abs(p) for p in plain]
        if all(abs(a - b) <= s for a, b, s in zip(packed, plain, slack, strict=True)):
            return True
        if any(p != p for p in plain):
            return True  # not the packing's fault: the caller refuses scores that are not finite
        self.notes.append(
            "this model does not take packed questions: every choice is scored in a row of its "
            "own, more slowly"
        )
        return False

    # ---- scoring

    def _score(self, batch: Scoring) -> list[list[float]]:
        if self._trees:
            return self._packed_scores(batch.rows)
        prefix = self._job.prefix if self._job else ()
        return [
            [self._alone(_row(t, i, prefix)) for i in range(len(t.scored))]
            for row in batch.rows
            for t in row
        ]

    def _alone(self, row: Encoded) -> float:
        """One row without any filling, through the adapter's own forward pass."""
        from paw.evaluation.likelihood import label_logprobs

        # PEFT's, that virtual tokens take no position ids: without filling they need none
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(label_logprobs(self._whole(), [row], 0).sum())

    def _whole(self) -> Any:
        """The model as its adapter wraps it."""
        return self._adapted[0] if self._adapted else self._model

    def _packed_scores(self, rows: Sequence[Sequence[Tree]]) -> list[list[float]]:
        from paw.evaluation.past import borrowed

        packed = pack(rows, self._job.pad_id if self._job else 0, self._model.device)
        logits = self._forward(packed, borrowed(self._past) if self._past else None)
        at, token = packed.asked.unbind(-1)
        found = (logits[at, token] - logits.logsumexp(-1)[at]).double().tolist()
        return [[sum(found[i] for i in nodes) for nodes in choices] for choices in packed.sums]

    def _forward(self, packed: Packed, cache: Any) -> torch.Tensor:
        """Logits at the positions that are read (n × vocabulary), float32."""
        from paw.evaluation.likelihood import picked, projecting
        from paw.evaluation.past import length

        past, (row, place) = length(self._past), packed.reads.unbind(-1)
        # Of virtual tokens all is in the past: the base goes without the wrapper. Other adapters
        # live in its layers.
        with projecting(self._model, lambda hidden: picked(hidden, row, place)):
            out = self._model(
                input_ids=packed.ids,
                attention_mask=self._masks(partial(visible, packed, past)),
                position_ids=packed.depth + past,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def _masks(self, seen: Callable[[int | None], torch.Tensor]) -> Any:
        """Additive masks of what is seen within a window, in the form that the model takes: one,
        or one for each type of its layers."""
        import torch

        config, dtype = self._model.config.get_text_config(), self._model.dtype

        def additive(window: int | None) -> torch.Tensor:
            found = seen(window)
            mask = torch.zeros(found.shape, dtype=dtype, device=found.device)
            return mask.masked_fill_(~found, torch.finfo(dtype).min)

        types = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if "sliding_attention" not in types:
            return additive(None if types else window)
        return {t: additive(window if t == "sliding_attention" else None) for t in types}

    def _likeliest(self, batch: Likeliest) -> list[list[list[tuple[int, float]]]]:
        from paw.evaluation.likelihood import label_logits

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pad = self._job.pad_id if self._job else 0
            logits, _ = label_logits(self._whole(), batch.rows, pad)
        found = logits.softmax(-1).topk(min(batch.top, logits.shape[-1]), dim=-1)
        each = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        pairs = iter([list(zip(ids, shares, strict=True)) for ids, shares in each])
        return [[next(pairs) for _ in range(r.start, len(r.ids))] for r in batch.rows]

    # ---- writing

    def _write(self, batch: Writing) -> list[list[int]]:
        """Continuation with a cache: rows are filled on the left, and leave the batch when they are
        done."""
        import torch

        from paw.evaluation.past import going_on, growing, length

        if not self._trees:
            return [self._write_alone(i, batch) for i in range(len(batch.prompts))]
        device, tokenizer, ends = self._model.device, self._tokenizer, self._ends()
        past, n = length(self._past), len(batch.prompts)
        width = max(map(len, batch.prompts))
        filled = torch.tensor([width - len(p) for p in batch.prompts], device=device)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in batch.prompts], device=device)
        cache = growing(self._past, n)
        draws = [random.Random(seed) for seed in batch.seeds]
        rows, out, step = list(range(n)), [list[int]() for _ in range(n)], 0
        while rows:
            # where the new tokens stand
            query = torch.arange(width + step - ids.shape[1], width + step, device=device)
            position = (query - filled[:, None]).clamp_min(0) + past
            mask = self._masks(partial(_behind, past, query, filled, position))
            logits = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = _chosen(logits, batch.temperature, [draws[row] for row in rows if draws])
            step += 1
            going = []
            for k, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                out[row].append(token)
                tail = tokenizer.decode(out[row][-32:])
                stopped = token in ends or any(s in tail for s in batch.stop)
                if not stopped and len(out[row]) < batch.limit:
                    going.append(k)
            if len(going) < len(rows):
                keep = torch.tensor(going, dtype=torch.long, device=device)
                going_on(cache, keep)
                filled = filled[keep]
                rows = [rows[k] for k in going]
            ids = torch.tensor([[chosen[k]] for k in going], device=device)
        return out

    def _write_alone(self, number: int, batch: Writing) -> list[int]:
        """The library's own generation, a prompt at a time, for models that the loop above does not
        know."""
        import torch

        assert self._job is not None
        prompt = (*self._job.prefix, *batch.prompts[number])
        ids, how = torch.tensor([prompt], device=self._model.device), dict[str, Any]()
        if batch.temperature:
            torch.manual_seed(batch.seeds[number])
            how = {"temperature": batch.temperature, "top_k": 0, "top_p": 1.0}
        done = self._whole().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=batch.limit,
            do_sample=bool(batch.temperature),
            **how,
            stop_strings=list(batch.stop) or None,
            tokenizer=self._tokenizer,
            pad_token_id=self._job.pad_id,
        )
        return list(done[0, ids.shape[1] :].tolist())

    def _ends(self) -> set[int]:
        """The tokens that end a text, as the model's own generation settings and its tokenizer name
        them."""
        named = getattr(self._model.generation_config, "eos_token_id", None)
        found = set(named if isinstance(named, list) else [named]) | {self._tokenizer.eos_token_id}
        return {x for x in found if x is not None}


def _chosen(logits: torch.Tensor, temperature: float, draws: Sequence[random.Random]) -> list[int]:
    """The next token of each row (rows × vocabulary): the likeliest, or one that is drawn."""
    import torch

    if not temperature:
        return list(logits.argmax(-1).tolist())
    below = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    # of the whole, which rounding leaves a little beside 1
    drawn = torch.tensor([d.random() for d in draws], dtype=below.dtype, device=below.device)
    found = torch.searchsorted(below, drawn[:, None] * below[:, -1:], right=True)
    return list(found[:, 0].clamp_max(below.shape[1] - 1).tolist())


def _behind(
    past: int, query: torch.Tensor, filled: torch.Tensor, position: torch.Tensor, window: int | None
) -> torch.Tensor:
    """What tokens at places `query` of left-filled rows see: the past, and what stands before them
    and is no filling."""
    import torch

    key = torch.arange(int(query[-1]) + 1, device=query.device)
    before, itself = (key <= query[:, None])[None], (key == query[:, None])[None]
    seen = before & ((key >= filled[:, None])[:, None] | itself)
    if window is not None:
        seen = seen & (query[:, None] - key < window)
    return behind_past(seen, position, past, window)


def _row(t: Tree, choice: int, prefix: tuple[int, ...]) -> Encoded:
    """A choice of a tree as a row again."""
    pairs = t.scored[choice]
    context = (*prefix, *(t.ids[n] for n in t.path(pairs[0][0])))
    return Encoded((*context, *(token for _, token in pairs)), len(context))
