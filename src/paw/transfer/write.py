"""Stage `write`: the text that both models are run on where nobody gave one, written by a base
itself, from the token that begins a text and without any prompt.

It shows what language models say of anything: maps that are fitted on a task's own few sentences
explain those, and carry no adapter (docs/methods.md). Self-written text has taken the place of real
text before, in quantisation (Liu et al. 2023, LLM-QAT) and pruning (Williams & Chrysostomou &
Aletras 2024).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paw.config.checks import transient
from paw.errors import TransferError
from paw.models.load import Runtime
from paw.store import Context, Input, Stage, write_text

FILE = "text.txt"  # a document a line
LENGTH = 32  # tokens of a document at most: rather more of them than longer ones
ROUND = 128  # documents that are begun before their words are counted


@dataclass(kw_only=True)
class WriteStage:
    positions: int  # word ends that are wanted
    runtime: Runtime
    trust_remote_code: bool = transient(False)


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    texts: int
    words: int

    def __str__(self) -> str:
        return f"{self.texts} texts of {self.words} words"


def write(
    config: WriteStage, inputs: Mapping[str, Input], out: Path, context: Context
) -> WriteResult:
    """Draws documents at temperature 1, each once, until they have as many words as positions are
    wanted. What is drawn depends on nothing but the base and the number of a document.

    Args:
        inputs: `model`, the base that writes.

    Raises:
        TransferError: for a base that no token begins a text of, or that repeats itself only.
    """
    from paw.evaluation import plan
    from paw.evaluation.devices import Engines
    from paw.evaluation.model import Model
    from paw.evaluation.modes.generate import continued

    model = Model(
        base=inputs["model"],
        adapter=None,
        runtime=config.runtime,
        trust_remote_code=config.trust_remote_code,
        engines=context.kept.get(Engines),
        watch=context,
    )
    first = model.tokenizer.bos_token_id
    first = model.tokenizer.eos_token_id if first is None else first  # as between documents
    if first is None:
        raise TransferError(
            f"{inputs['model'].path}: its tokenizer has no token that begins a text. Give one: "
            "transfer.calibration=FILE."
        )
    found: dict[str, None] = {}
    words = begun = 0
    while words < config.positions:
        seeds = [random.Random(f"text {begun + i}").getrandbits(48) for i in range(ROUND)]
        written = continued(
            model,
            model.job(),
            [(first,)] * ROUND,
            tokens=8 * plan.TOKENS[model.device],
            limit=LENGTH,
            stop=[],
            temperature=1.0,
            seeds=seeds,
        )
        texts = {i: " ".join(one.text.split()) for i, one in written}
        new = {texts[i]: None for i in sorted(texts) if texts[i] and texts[i] not in found}
        if not new:
            raise TransferError(
                f"{inputs['model'].path}: of {begun + ROUND} texts that it wrote, the last "
                f"{ROUND} are empty or there already. Give a text: transfer.calibration=FILE."
            )
        found |= new
        begun += ROUND
        words = sum(len(text.split()) for text in found)
        context.progress(min(words, config.positions), config.positions, "words")
    write_text(out / FILE, "".join(f"{text}\n" for text in found))
    return WriteResult(texts=len(found), words=words)


STAGE = Stage(
    "write",
    "1",
    "paw.transfer.write:write",
    config=WriteStage,
    result=WriteResult,
    keeps=True,
    devices="one",
)
