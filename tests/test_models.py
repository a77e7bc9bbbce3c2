"""A model is found in the order the documents give; GGUF and packages become folders; adapters are
checked and load in PEFT."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import Silent
from paw.cli.compose import compose_config
from paw.config.common import HardwareConfig
from paw.errors import AdapterError, ConfigError, ModelError
from paw.models.adapters import Factors, attach, read_adapter, stamp, write_adapter
from paw.models.config import ModelConfig, PackageConfig
from paw.models.load import Runtime, check_hardware, load_model, load_tokenizer, resolve_runtime
from paw.models.locate import locate
from paw.models.steps import model_named

CPU = Runtime("float32")


# ---- where a model is ---------------------------------------------------------------------------


def test_a_path_comes_first_then_the_models_folder(
    tmp_path: Path, tiny_llama: Path, tiny_qwen2: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tiny_qwen2, models / "mine")
    assert (
        locate(ModelConfig(name="mine", path=str(tiny_llama)), str(models), Silent()) == tiny_llama
    )
    assert (
        locate(ModelConfig(name="mine", hub="owner/mine"), str(models), Silent()) == models / "mine"
    )
    shutil.move(models / "mine", models / "Some-Model")
    assert (
        locate(ModelConfig(name="other", hub="owner/Some-Model"), str(models), Silent())
        == models / "Some-Model"
    )


def test_the_hubs_cache_is_read_without_network(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as huggingface_hub lays it out: blobs, a snapshot of links, a reference."""
    from huggingface_hub import constants

    cache, commit = tmp_path / "hub", "0" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    root = cache / "models--owner--some-model"
    for folder in ("blobs", f"snapshots/{commit}", "refs"):
        (root / folder).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for file in tiny_llama.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (root / "snapshots" / commit / file.name).symlink_to(blob)
    found = locate(ModelConfig(name="some", hub="owner/some-model"), None, Silent())
    assert load_tokenizer(found)("red").input_ids == load_tokenizer(tiny_llama)("red").input_ids
    assert torch.equal(
        load_model(found, CPU).lm_head.weight, load_model(tiny_llama, CPU).lm_head.weight
    )
    with pytest.raises(ModelError, match=r"hub cannot be reached.*paths\.models_dir"):
        locate(ModelConfig(name="other", hub="owner/other"), None, Silent())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "model.safetensors").unlink(), "no .safetensors"),
    ],
)
def test_an_incomplete_folder_is_named(
    tmp_path: Path, tiny_llama: Path, spoil: object, message: str
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        locate(ModelConfig(name="m", path=str(folder)), None, Silent())


def test_damaged_weights_and_encoders_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, CPU)
    config = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is an encoder"):
        load_model(folder, CPU)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_llama, folder)
    found = load_file(folder / "model.safetensors")
    del found["model.layers.2.mlp.down_proj.weight"]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors.*layers\.2\.mlp\.down_proj"):
        load_model(folder, CPU)


def test_a_package_in_parts_is_joined_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "carrier").mkdir()
    (tmp_path / "carrier" / "a").write_bytes(b"GGUF")
    (tmp_path / "carrier" / "b").write_bytes(b"rest")
    joined = hashlib.sha256(b"GGUFrest").hexdigest()
    package = PackageConfig(
        files=["carrier/a", "carrier/b"], sha256=joined, install="pip install carrier"
    )
    with pytest.raises(
        ModelError, match="cannot be read as a GGUF model"
    ):  # joined and verified, but no model
        locate(ModelConfig(name="m", package=package), None, Silent())
    assert (tmp_path / "cache" / "gguf" / f"{package.sha256[:16]}.gguf").read_bytes() == b"GGUFrest"
    package.sha256 = "0" * 64
    with pytest.raises(ModelError, match=r"checksum.*pip install carrier"):
        locate(ModelConfig(name="m", package=package), None, Silent())
    package.files = ["no_such_package/x"]
    with pytest.raises(ModelError, match="not installed"):
        locate(ModelConfig(name="m", package=package), None, Silent())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prompt", "answer", "special"),
    [
        ("smollm2_135m", "The capital of France is", " Paris", 0),
        ("gemma3_270m", "Paris is the capital of", " France", 1),
    ],
)
def test_the_packaged_models_are_real(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    prompt: str,
    answer: str,
    special: int,
) -> None:
    """From GGUF, whole or in four parts: parsed and dequantised once, with the family's own special
    tokens, and they know where Paris is."""
    gguf, parsed = pytest.importorskip("gguf"), []
    parse = gguf.GGUFReader.__init__

    def counted(*args: object, **more: object) -> None:
        parsed.append(args[1])
        parse(*args, **more)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    monkeypatch.setenv("PAW_CACHE", str(tmp_path))
    watch = Silent()
    folder = locate(model_named(name), None, watch)
    assert locate(model_named(name), None, watch) == folder
    assert len(watch.said) == len(parsed) == 1
    tokenizer, model = load_tokenizer(folder), load_model(folder, CPU)
    ids = tokenizer(prompt, return_tensors="pt")
    assert sum(int(i) in tokenizer.all_special_ids for i in ids.input_ids[0]) == special
    # Instruct has one, the pretrained Gemma none
    assert bool(tokenizer.chat_template) == (name == "smollm2_135m")
    with torch.inference_mode():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == answer


def test_names_paths_and_hub_ids_are_models(tmp_path: Path, tiny_llama: Path) -> None:
    assert model_named("qwen25_7b").hub == "Qwen/Qwen2.5-7B-Instruct"
    assert model_named(str(tiny_llama)).path == str(tiny_llama)
    assert model_named("owner/model").hub == "owner/model"
    with pytest.raises(ConfigError, match="tiny_llama"):
        model_named("tiny_lama")


def test_hardware_is_resolved_by_capability() -> None:
    found = resolve_runtime(HardwareConfig())
    if not torch.cuda.is_available():
        assert (found.device, found.precision) == ("cpu", "float32")
        with pytest.raises(ConfigError, match="hardware=cpu"):
            check_hardware(compose_config(["hardware=a800x4"]).hardware)


def test_a_profile_is_resolved_where_its_gpus_are_not() -> None:
    """So that a plan for a server can be made on a laptop."""
    found = resolve_runtime(compose_config(["hardware=a800x4"]).hardware)
    assert (found.device, found.devices, found.precision) == ("cuda", 4, "bfloat16")
    hardware = HardwareConfig(device="cuda", precision="auto")
    if not torch.cuda.is_available():
        assert resolve_runtime(hardware).precision == "bfloat16"


# ---- adapters -----------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path, tiny_llama: Path) -> Path:
    """What stock PEFT writes, with a rank and an alpha pattern."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 3},
    )
    model = get_peft_model(load_model(tiny_llama, CPU), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def logits(model: object) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([[1, 40, 50, 60]])).logits  # type: ignore[operator]
    return found


def test_what_peft_writes_is_read_and_written_back_with_equal_logits(
    adapter: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    found = read_adapter(adapter)
    assert {f.rank for f in found.values()} == {2, 4}
    (tmp_path / "again").mkdir()
    write_adapter(tmp_path / "again", found, None)
    stock = [
        logits(PeftModel.from_pretrained(load_model(tiny_llama, CPU), str(p)))
        for p in (adapter, tmp_path / "again")
    ]
    assert torch.allclose(stock[0], stock[1], atol=1e-5)
    assert torch.equal(logits(attach(load_model(tiny_llama, CPU), adapter, "any")), stock[0])
    assert not torch.allclose(logits(load_model(tiny_llama, CPU)), stock[0], atol=1e-2)


def test_norm_is_the_products() -> None:
    f = Factors(torch.randn(3, 7), torch.randn(5, 3))
    assert f.norm() == pytest.approx(float((f.b @ f.a).norm()), rel=1e-5)


def test_an_adapter_goes_to_its_own_base_only(
    adapter: Path, tiny_llama: Path, tiny_qwen2: Path
) -> None:
    with pytest.raises(AdapterError, match="another base"):
        attach(load_model(tiny_qwen2, CPU), adapter, "any")
    stamp(adapter, "fingerprint of llama")
    with pytest.raises(AdapterError, match="was made for another base"):
        attach(load_model(tiny_llama, CPU), adapter, "fingerprint of another")


def edit(adapter: Path, **changes: object) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))


def tensors(adapter: Path, change: object) -> None:
    file = adapter / "adapter_model.safetensors"
    found = load_file(file)
    change(found)  # type: ignore[operator]
    save_file(found, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda a: (a / "adapter_model.safetensors").unlink(), "does not exist"),
        (
            lambda a: (a / "adapter_model.safetensors").write_bytes(b"12345678901234567890"),
            "is damaged",
        ),
        (lambda a: edit(a, peft_type="IA3"), "IA3 adapter"),
        (lambda a: edit(a, use_dora=True), "DoRA"),
        (lambda a: edit(a, bias="all"), "biases"),
        (lambda a: edit(a, r=5), "not of rank 5"),
        (lambda a: edit(a, r=None), "has no rank"),
        (lambda a: (a / "adapter_config.json").write_text("[]"), "no peft_type"),
        (
            lambda a: tensors(a, lambda t: t.pop(next(k for k in t if "lora_A" in k))),
            "but not the other factor",
        ),
        (lambda a: tensors(a, lambda t: next(iter(t.values())).fill_(float("nan"))), "not finite"),
        (
            lambda a: tensors(a, lambda t: t.update({"base_model.model.x.weight": torch.zeros(1)})),
            "unexpected tensor",
        ),
    ],
)
def test_a_broken_adapter_is_refused(adapter: Path, spoil: object, message: str) -> None:
    spoil(adapter)  # type: ignore[operator]
    with pytest.raises(AdapterError, match=message):
        read_adapter(adapter)


def test_rslora_scales_by_the_root_of_the_rank(adapter: Path) -> None:
    plain = read_adapter(adapter)
    edit(adapter, use_rslora=True)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.allclose(read_adapter(adapter)[name].b, plain[name].b * 2)  # 8/√4 against 8/4
