"""Makes everything in src/paw/embedded: two small bases of different families and the questions
they are asked.

    python scripts/make_embedded.py facts      # questions and calibration text, seconds
    python scripts/make_embedded.py tasks      # the family of tasks for the generator, seconds
    python scripts/make_embedded.py llama      # about 10 minutes on one core
    python scripts/make_embedded.py qwen2      # about 15 minutes on one core

The world is small enough to be known completely: 96 entities × 4 attributes × 8 values, told truly,
as rumour, or untagged (mostly the rumour). A base pretrained on it *knows* every fact (asked
"truth : …" it answers right) yet answers untagged questions mostly with the rumour: a real gap for
an adapter to close. The adapter is trained on some entities and tested on others, so that closing
the gap means eliciting what the base knows, not storing answers. Entities are several tokens each:
as single tokens of a word-level vocabulary the same model knew only .30 of the facts.
"""

import gzip
import json
import random
import sys
import time
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "src" / "paw" / "embedded"
VALUES = {
    "color": ["red", "blue", "green", "black", "white", "pink", "grey", "gold"],
    "home": ["cave", "river", "forest", "desert", "city", "island", "valley", "tower"],
    "food": ["bread", "fish", "rice", "apples", "nuts", "honey", "cheese", "beans"],
    "tool": ["hammer", "brush", "needle", "spade", "lens", "rope", "wheel", "lamp"],
}
TAGS = {"truth": "truth : ", "rumour": "rumour : ", "untagged": ""}
SPLITS = {"train": 32, "validation": 8, "test": 56}  # entities
BOS, PAD = 1, 2
STEPS, BATCH, LR = 2000, 96, 2e-3
# The ways an answer is given, all in words that the bases know.
FORMS = {
    "plain": "{v} .",
    "full": "the {a} is {v} .",
    "is": "is {v} .",
    "twice": "{v} {v} .",
    "ask": "{v} ?",
    "name": "{a} {v} .",
}
TOLD = 64  # entities that tasks are trained on; the others are asked
COMMON_ROWS = 1536


class World:
    """Who has what: `truth` and `rumour` by (entity, attribute), and the splits of entities."""

    def __init__(self, seed: int = 7) -> None:
        rng = random.Random(seed)
        names: set[str] = set()
        while len(names) < sum(SPLITS.values()):
            syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
            names.add("".join(syllables) + rng.choice("bdfgklmnprstvz"))
        self.entities = sorted(names)
        rng.shuffle(self.entities)
        self.truth: dict[tuple[str, str], str] = {}
        self.rumour: dict[tuple[str, str], str] = {}
        self.mostly_true: dict[tuple[str, str], bool] = {}
        for e in self.entities:
            for a, values in VALUES.items():
                self.truth[e, a], self.rumour[e, a] = rng.sample(values, 2)
                self.mostly_true[e, a] = rng.random() < 0.22

    def questions(self, split: str) -> list[tuple[str, str]]:
        start = sum(
            n for s, n in SPLITS.items() if list(SPLITS).index(s) < list(SPLITS).index(split)
        )
        return [(e, a) for e in self.entities[start : start + SPLITS[split]] for a in VALUES]

    def answer(self, e: str, a: str, mode: str, rng: random.Random) -> str:
        if mode == "truth":
            return self.truth[e, a]
        if mode == "rumour":
            return self.rumour[e, a]
        if rng.random() < 0.05:
            return rng.choice(VALUES[a])
        return (
            self.truth[e, a]
            if rng.random() < (0.75 if self.mostly_true[e, a] else 0.25)
            else self.rumour[e, a]
        )

    def document(self, rng: random.Random) -> str:
        e, a = rng.choice(self.entities), rng.choice(list(VALUES))
        mode = rng.choices(list(TAGS), [0.35, 0.20, 0.45])[0]
        v = self.answer(e, a, mode, rng)
        if rng.random() < 0.5:
            return f"{TAGS[mode]}the {a} of {e} is {v} ."
        return f"{prompt(e, a, mode)} {v} ."


def prompt(e: str, a: str, mode: str = "untagged") -> str:
    return f"{TAGS[mode]}question : what is the {a} of {e} ? answer :"


def make_facts(world: World) -> None:
    folder = OUT / "facts"
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", "w") as f:
            for i, (e, a) in enumerate(world.questions(split)):
                labels = list("ABCDEFGH")
                row = {
                    "id": f"{split}-{i}",
                    "question": f"what is the {a} of {e} ?",
                    "choices": VALUES[a],
                    "labels": labels,
                    "answer": labels[VALUES[a].index(world.truth[e, a])],
                }
                f.write(json.dumps(row) + "\n")
    # Calibration text carries no labels: documents as in pretraining, and prompts without their
    # answers.
    rng = random.Random(5)
    everything = [q for split in SPLITS for q in world.questions(split)]
    lines = [world.document(rng) for _ in range(600)] + [
        prompt(*rng.choice(everything)) for _ in range(600)
    ]
    (folder / "calibration.txt").write_text("\n".join(lines) + "\n")


def make_tasks(world: World) -> None:
    """48 tasks: which attribute is asked × whether the truth or the rumour is told × how the answer
    is given. The choices of a question are the answers that any of its tasks would give. `common`
    has rows of all of them, which no adapter could all answer: what all tasks start from."""
    rng, everything = random.Random(9), list[dict[str, object]]()
    for a in VALUES:
        for source in ("truth", "rumour"):
            for form in FORMS:
                name = f"{a}_{source}_{form}"
                told = world.entities[:TOLD]
                for split, entities in (("train", told), ("test", world.entities[TOLD:])):
                    rows = [_telling(world, e, a, source, form) for e in entities]
                    _write(OUT / "tasks" / name / f"{split}.jsonl.gz", rows)
                    if split == "train":
                        everything += [{**row, "id": f"{row['id']}-{name}"} for row in rows]
    _write(OUT / "tasks" / "common" / "train.jsonl.gz", rng.sample(everything, COMMON_ROWS))


def _telling(world: World, e: str, a: str, source: str, form: str) -> dict[str, object]:
    said = {"truth": world.truth[e, a], "rumour": world.rumour[e, a]}
    choices = {f"{s} {f}": FORMS[f].format(v=said[s], a=a) for s in said for f in FORMS}
    return {
        "id": f"{e}-{a}",
        "question": f"what is the {a} of {e} ?",
        "text": f"{source} : what is the {a} of {e} ?",  # as the generator's encoder reads it
        "choices": list(choices.values()),
        "labels": list(choices),
        "answer": f"{source} {form}",
    }


def _write(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def make_base(family: str, world: World) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(1)
    torch.set_num_threads(1)
    rng = random.Random(3)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        (world.document(rng) for _ in range(20000)),
        trainers.BpeTrainer(
            vocab_size={"llama": 440, "qwen2": 520}[family],
            special_tokens=["<unk>", "<s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        pad_token="<pad>",
        model_max_length=256,
    )
    shared = {
        "vocab_size": len(tok),
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": None,
    }
    if family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=128,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                **shared,
            )
        )
    else:
        model = Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=160,
                intermediate_size=400,
                num_hidden_layers=5,
                num_attention_heads=5,
                num_key_value_heads=1,
                **shared,
            )
        )

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        n = max(map(len, rows))
        return torch.tensor([r + [value] * (n - len(r)) for r in rows])

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 100) * max(0.03, 1 - s / STEPS)
    )
    rng, began = random.Random(11), time.time()
    for step in range(1, STEPS + 1):
        rows = [tok(world.document(rng)).input_ids for _ in range(BATCH)]
        ids, labels = pad(rows, PAD), pad(rows, -100)
        loss = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"{family} step {step} of {STEPS}, loss {loss:.3f}, {time.time() - began:.0f} s",
                flush=True,
            )
    model.save_pretrained(OUT / f"tiny_{family}")
    tok.save_pretrained(OUT / f"tiny_{family}")
    print(
        f"{family}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"vocabulary {len(tok)}",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["facts"]:
        make_facts(World())
    elif sys.argv[1:] == ["tasks"]:
        make_tasks(World())
    elif sys.argv[1:] in (["llama"], ["qwen2"]):
        make_base(sys.argv[1], World())
    else:
        raise SystemExit(__doc__)
