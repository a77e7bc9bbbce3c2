"""Planted truth: a target that computes what the source computes, in another basis. The right
transfer is known exactly, and source + adapter must equal target + transferred adapter in every
logit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Phi3Config, Qwen2Config

from conftest import Silent, move
from conftest import logits as said
from paw.cli.compose import compose_config
from paw.models.adapters import Factors, fused, read_adapter, write_adapter
from paw.models.load import Runtime, load_tokenizer
from paw.models.tensors import linear_shapes, module_parts
from paw.paths import embedded
from paw.store import Input
from paw.transfer import calibrate
from paw.transfer import match as matching
from paw.transfer import transfer as transferring
from paw.transfer.controls import transfer_named
from paw.transfer.model_pair import TextConfig
from paw.transfer.spoil import SpoilStage, spoil

KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma": GemmaConfig}
D, FF, HEADS, GROUPS, DIM, LAYERS = 32, 64, 4, 2, 8, 3
CONDITION = 100  # of every weight: sums in float32 do not show all directions
TOKENIZER = embedded("tiny_llama")


@dataclass
class Shape:
    """What the target has that the source has not."""

    width: int = D
    neurons: int = FF
    groups: int = GROUPS
    deeper: int = 0  # layers that do nothing, one before each of the first
    orthogonal: bool = (
        True  # or maps that stretch: norms folded, heads scaled, values mixed by any invertible map
    )


def built(kind: str, width: int, neurons: int, groups: int, depth: int, eps: float = 1e-6) -> Any:
    config = KINDS[kind](
        vocab_size=len(load_tokenizer(TOKENIZER)),
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        num_key_value_heads=groups,
        head_dim=DIM,
        rms_norm_eps=eps,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        use_sliding_window=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


def saved(model: Any, folder: Path) -> Path:
    model.float().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    return folder


def rotation(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns (rows×columns)."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def graded(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """rows×columns, singular values from 1 to 1 / CONDITION."""
    n = min(rows, columns)
    values = torch.logspace(0, -math.log10(CONDITION), n, dtype=torch.float64)
    return rotation(rows, n, generator) * values @ rotation(columns, n, generator).T


def blocks(parts: list[Tensor]) -> Tensor:
    return torch.block_diag(*parts)


@torch.no_grad()
def planted(kind: str, tmp: Path, shape: Shape, seed: int = 7) -> tuple[Path, Path]:
    """Folders of a random source, and of a target that equals it in function."""
    g = torch.Generator().manual_seed(seed)
    source = built(kind, D, FF, GROUPS, LAYERS)
    for name, p in source.named_parameters():
        if p.ndim == 2:
            p.copy_(3 * graded(*p.shape, g))
        elif "norm" in name:
            p.fill_(0.0 if kind == "gemma" else 1.0)
            if not shape.orthogonal:
                p += 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype)
        else:
            p.normal_(0, 0.1, generator=g)
    target = built(
        kind,
        shape.width,
        shape.neurons,
        shape.groups,
        LAYERS + shape.deeper,
        1e-6 * D / shape.width,
    )
    one = 1.0 if kind == "gemma" else 0.0  # Gemma's norms multiply by 1 + γ
    for name, p in target.named_parameters():
        p.fill_(1.0 - one if "norm" in name else 0.0)

    q, c = (
        rotation(shape.width, D, g),
        (shape.width / D) ** 0.5,
    )  # r_t = q r_s, and normed c times as long
    scaled = (
        D**0.5 / shape.width**0.5 if kind == "gemma" else 1.0
    )  # Gemma multiplies embeddings by √width
    target.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight @ q.T * scaled)
    target.lm_head.weight.copy_(source.lm_head.weight * (one + source.model.norm.weight) @ q.T / c)
    for i, ours in enumerate(source.model.layers):
        theirs = target.model.layers[min(2 * i + 1, i + shape.deeper) if shape.deeper else i]
        into = [
            ((one + n.weight).diag() @ q.T / c)
            for n in (ours.input_layernorm, ours.post_attention_layernorm)
        ]
        t_q, t_k, t_v, t_mixed = attention(shape, g)
        for name, t in (("q_proj", t_q), ("k_proj", t_k), ("v_proj", t_v)):
            a, b = getattr(ours.self_attn, name), getattr(theirs.self_attn, name)
            b.weight.copy_(t @ a.weight @ into[0])
            if a.bias is not None:
                b.bias.copy_(t @ a.bias)
        theirs.self_attn.o_proj.weight.copy_(
            q @ ours.self_attn.o_proj.weight @ torch.linalg.inv(t_mixed)
        )
        order = torch.eye(shape.neurons, dtype=torch.float64)[
            torch.randperm(shape.neurons, generator=g)
        ][:, :FF]
        for name in ("gate_proj", "up_proj"):
            getattr(theirs.mlp, name).weight.copy_(order @ getattr(ours.mlp, name).weight @ into[1])
        theirs.mlp.down_proj.weight.copy_(q @ ours.mlp.down_proj.weight @ order.T)
    tmp.mkdir(exist_ok=True)
    return saved(source, tmp / "source"), saved(target, tmp / "target")


def attention(shape: Shape, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maps of queries, keys, values, and of what enters o_proj. Heads are permuted, groups as
    wholes; queries and keys are turned by one complex number a frequency; with more groups the keys
    and values of a group stand there twice."""
    order = torch.randperm(GROUPS, generator=g).tolist()
    shared = HEADS // GROUPS
    heads = [
        group * shared + h for group in order for h in torch.randperm(shared, generator=g).tolist()
    ]
    phases = torch.rand(GROUPS, DIM // 2, generator=g, dtype=torch.float64) * 6.28
    sizes = (
        torch.ones_like(phases)
        if shape.orthogonal
        else torch.rand(phases.shape, generator=g, dtype=torch.float64) + 0.5
    )

    def turned(group: int, invert: bool) -> Tensor:
        c = torch.polar(1 / sizes[group] if invert else sizes[group], phases[group])
        return torch.cat(
            [
                torch.cat([c.real.diag(), -c.imag.diag()], 1),
                torch.cat([c.imag.diag(), c.real.diag()], 1),
            ]
        )

    mixes = [rotation(DIM, DIM, g) for _ in range(GROUPS)]
    if not shape.orthogonal:
        mixes = [m + 0.2 * torch.randn(DIM, DIM, generator=g, dtype=torch.float64) for m in mixes]

    def placed(twins: list[int], block: Callable[[int], Tensor], count: int) -> Tensor:
        out = torch.zeros(len(twins) * DIM, count * DIM, dtype=torch.float64)
        for i, twin in enumerate(twins):
            out[i * DIM : (i + 1) * DIM, twin * DIM : (twin + 1) * DIM] = block(twin)
        return out

    groups = [group for group in order for _ in range(shape.groups // GROUPS)]
    t_q = placed(heads, lambda h: turned(h // shared, False), HEADS)
    t_k = placed(groups, lambda group: turned(group, True), GROUPS)
    t_v = placed(groups, lambda group: mixes[group], GROUPS)
    return t_q, t_k, t_v, placed(heads, lambda h: mixes[h // shared], HEADS)


def adapter(model: Path, folder: Path, seed: int = 0, size: float = 0.1) -> Path:
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (out, into) in linear_shapes(model).items():
        if ".layers." in name:
            modules[name] = Factors(
                torch.randn(4, into, generator=g) * size, torch.randn(out, 4, generator=g) * size
            )
    folder.mkdir()
    write_adapter(folder, fused(modules, module_parts(model)), None)
    return folder


def varied_text(file: Path) -> Path:
    """Words at random: text of one kind shows a model of random weights few directions."""
    g = torch.Generator().manual_seed(3)
    words = sorted(set((embedded("facts") / "calibration.txt").read_text().split()))
    picked = [[words[i] for i in torch.randint(len(words), (12,), generator=g)] for _ in range(500)]
    file.write_text("\n".join(" ".join(p) for p in picked))
    return file


def transferred(tmp: Path, method: str, by: str = "index", **changes: Any) -> Path:
    """The stages as a run wires them, on calibration text without labels."""
    spoilt, method = method, "procrustes" if method in ("random", "negated") else method
    config = replace(transfer_named(method, compose_config([]).transfer), layers=by, **changes)
    inputs = {name: Input(tmp / name, name) for name in ("source", "target", "adapter")}
    inputs["calibration"] = Input(varied_text(tmp / "text.txt"), "text")
    text = TextConfig(runtime=Runtime("float32"), positions=4000)
    if by == "cka":
        matching.match(matching.MatchStage(text=text), inputs, tmp, Silent())
        inputs["match"] = Input(tmp, "match")
    moments, folder = tmp / f"moments_{by}", tmp / f"{method}_{by}"
    folder.mkdir(exist_ok=True)
    if not moments.exists():  # shared by methods
        moments.mkdir()
        stage = calibrate.CalibrateStage(text=text, layers=by, spread=config.spread)
        calibrate.calibrate(stage, inputs, moments, Silent())
    inputs["moments"] = Input(moments, "moments")
    what = transferring.TransferStage(transfer=config, text=text, runtime=Runtime("float32"))
    move(what, inputs, folder)
    if method != spoilt:
        out = tmp / f"{spoilt}_of_{method}_{by}"
        out.mkdir()
        spoil(SpoilStage(method=spoilt, seed=0), {"adapter": Input(folder, "a")}, out, Silent())
        return out
    return folder


def logits(model: Path, folder: Path | None = None) -> Tensor:
    texts = ["the color of lupup is red .", "truth : the home of bovin is cave ."]
    return said(model, texts, folder)


def effect(tmp: Path, source: Path, target: Path) -> tuple[Tensor, float]:
    """The logits of source + adapter, and how far the adapter moves them. The planted truth is one
    without it."""
    plain, wanted = logits(source), logits(source, adapter(source, tmp / "adapter"))
    assert torch.allclose(plain, logits(target), atol=1e-5)
    return wanted, float((wanted - plain).abs().max())


SHAPES = {"equal": Shape(), "wider": Shape(width=48, neurons=96)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_turned_model_is_reached_by_the_maps_that_can(
    tmp_path: Path, kind: str, shape: str
) -> None:
    """Stream turned (and widened), neurons and heads permuted, values mixed, queries and keys
    turned by frequency."""
    source, target = planted(kind, tmp_path, SHAPES[shape])
    wanted, moved = effect(tmp_path, source, target)
    assert moved > 0.1

    def miss(method: str, **changes: Any) -> float:
        return float(
            (logits(target, transferred(tmp_path, method, **changes)) - wanted).abs().max()
        )

    for method, changes in (
        ("procrustes", {}),
        ("per_head", {}),
        ("ridge", {"penalty": 1e-12, "gain": "none"}),
    ):
        assert miss(method, **changes) < 1e-4, method
    for method in (
        "pad_truncate",
        "cross_lora",
        "sign_random",
        "random",
        *["copy"] * (shape == "equal"),
    ):
        assert miss(method) > 0.2 * moved, method


@pytest.mark.parametrize("kind", KINDS)
def test_stretched_spaces_and_repeated_keys_need_regression(tmp_path: Path, kind: str) -> None:
    """Norm weights, heads scaled, values mixed by any invertible map, and a key-value group that
    stands there twice."""
    source, target = planted(kind, tmp_path, Shape(groups=HEADS, orthogonal=False))
    wanted, moved = effect(tmp_path, source, target)
    ridge, procrustes = (
        transferred(tmp_path, m, **c)
        for m, c in (("ridge", {"penalty": 1e-12, "gain": "none"}), ("procrustes", {}))
    )
    assert (logits(target, ridge) - wanted).abs().max() < 1e-4
    assert (logits(target, procrustes) - wanted).abs().max() > 0.02 * moved


def test_layers_that_do_nothing_are_found_by_what_layers_do(tmp_path: Path) -> None:
    """The target is twice as deep; every other layer adds nothing, and is to get nothing."""
    source, target = planted("llama", tmp_path, Shape(deeper=LAYERS))
    wanted, moved = effect(tmp_path, source, target)
    assert (
        logits(target, transferred(tmp_path, "procrustes", by="cka", spread=False)) - wanted
    ).abs().max() < 1e-4
    assert (logits(target, transferred(tmp_path, "procrustes")) - wanted).abs().max() > 0.2 * moved


def test_fused_projections_are_split_and_joined(tmp_path: Path) -> None:
    """Phi-3 is Llama with q, k, v in one weight and gate, up in another."""
    _, source = planted("llama", tmp_path, Shape())
    source.rename(tmp_path / "plain")
    shutil.move(tmp_path / "source", tmp_path / "other")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float64)
    c = plain.config
    config = Phi3Config(
        vocab_size=c.vocab_size,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).double()
    state = plain.state_dict()
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        state[f"{at}self_attn.qkv_proj.weight"] = torch.cat(
            [state.pop(f"{at}self_attn.{n}_proj.weight") for n in "qkv"]
        )
        state[f"{at}mlp.gate_up_proj.weight"] = torch.cat(
            [state.pop(f"{at}mlp.{n}_proj.weight") for n in ("gate", "up")]
        )
    model.load_state_dict(state)
    fused_model = saved(model, tmp_path / "fused")
    there, back = tmp_path / "there", tmp_path / "back"
    for folder, source_model, target_model in (
        (there, tmp_path / "plain", fused_model),
        (back, fused_model, tmp_path / "plain"),
    ):
        folder.mkdir()
        (folder / "source").symlink_to(source_model)
        (folder / "target").symlink_to(target_model)
        wanted, moved = effect(folder, folder / "source", folder / "target")
        assert (
            logits(folder / "target", transferred(folder, "procrustes")) - wanted
        ).abs().max() < 1e-4
        assert moved > 0.05
    ranks = json.loads((there / "procrustes_index" / "adapter_config.json").read_text())
    assert ranks["r"] == 12  # factors of their own for q, k and v: ranks add up, exactly
    assert {v for k, v in ranks["rank_pattern"].items() if "qkv" not in k} == {4, 8}


def test_self_transfer_is_the_identity(tmp_path: Path) -> None:
    """To 1e-5 of ΔW. `anchored` keeps what lies in the span of a weight: everything, where the
    weight has full rank there."""
    source, _ = planted("llama", tmp_path, Shape())
    shutil.rmtree(tmp_path / "target")
    shutil.copytree(source, tmp_path / "target")
    before = read_adapter(adapter(source, tmp_path / "adapter"))
    for method, changes in (
        ("copy", {}),
        ("pro_lora", {}),
        ("procrustes", {}),
        ("ridge", {"penalty": 1e-12}),
        ("anchored", {"basis": D}),
    ):
        after = read_adapter(transferred(tmp_path, method, **changes))
        assert after.keys() == before.keys()
        for name, old in before.items():
            out, into = linear_shapes(source)[name]
            if method == "anchored" and out != into:
                continue
            new, whole = after[name].b @ after[name].a, old.b @ old.a
            assert (new - whole).norm() < 1e-5 * whole.norm(), (method, name)


def test_weights_of_unrelated_models_overlap_by_chance(tmp_path: Path) -> None:
    planted("llama", tmp_path, Shape())
    one, _ = planted("qwen2", tmp_path / "more", Shape(), seed=8)
    shutil.rmtree(tmp_path / "target")
    shutil.copytree(one, tmp_path / "target")
    adapter(tmp_path / "source", tmp_path / "adapter")
    found = json.loads((transferred(tmp_path, "copy", gain="none") / "report.json").read_text())
    excess = [row["phi"] - row["chance"] for row in found["modules"]]
    assert len(excess) == 7 * LAYERS
    assert abs(sum(excess) / len(excess)) < 0.02
    assert found["feasibility"] != "copy"
    assert [row["phi"] for row in found["modules"]] == pytest.approx(
        [row["similarity"] for row in found["modules"]], abs=1e-5
    )
