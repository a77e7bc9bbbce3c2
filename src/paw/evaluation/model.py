"""What texts are put to: a base model, with an adapter or without, on its devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from paw.data.tokenise import Encoded
from paw.evaluation.devices import Engines
from paw.evaluation.engine import Job
from paw.evaluation.plan import Batch, prefix_of
from paw.models.load import Limits, Runtime, limits, load_tokenizer
from paw.store import Input, Watch


@dataclass(frozen=True, kw_only=True)
class Model:
    base: Input
    adapter: Input | None
    runtime: Runtime
    trust_remote_code: bool
    engines: Engines
    watch: Watch

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base.path, self.trust_remote_code)

    @cached_property
    def limits(self) -> Limits:
        return limits(self.base.path, self.trust_remote_code)

    @property
    def device(self) -> str:
        """cuda or cpu: budgets of batches go by it."""
        return "cuda" if self.runtime.device == "cuda" else "cpu"

    def job(self, questions: Sequence[Sequence[Encoded]] = ()) -> Job:
        """
        Args:
            questions: rows that will be scored, a list a question: what all of them begin with
                goes into a cache, and the shortest question is scored both ways at first.
        """
        prefix = prefix_of(questions)
        shortest = min(questions, key=lambda q: sum(len(r.ids) for r in q), default=())
        check = tuple(Encoded(r.ids[len(prefix) :], r.start - len(prefix)) for r in shortest)
        return Job(
            base=self.base,
            adapter=self.adapter,
            runtime=self.runtime,
            trust_remote_code=self.trust_remote_code,
            pad_id=self.tokenizer.pad_token_id,
            prefix=prefix,
            check=check,
        )

    def run(
        self, job: Job, batches: Sequence[Batch], order: Sequence[int]
    ) -> Iterator[tuple[int, Any]]:
        """Every question's number and result, batch by batch as they are done.

        Args:
            batches, order: as `paw.evaluation.plan` gives them.
        """
        ends = [0, *accumulate(map(len, batches))]
        for i, results in self.engines.run(job, batches, self.watch):
            yield from zip(order[ends[i] : ends[i + 1]], results, strict=True)
