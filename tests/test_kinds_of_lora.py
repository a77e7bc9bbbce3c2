"""What is moved of AdaLoRA and DoRA: exactly what they do, or what of it factors can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from paw.errors import AdapterError
from paw.models.adapters import read_adapter
from paw.models.load import Runtime, load_model
from paw.models.tensors import Weights, module_parts
from paw.paths import embedded
from paw.transfer import dora


def adapted(config: Any, folder: Path) -> Any:
    """A base with an adapter that does something, saved to a folder."""
    torch.manual_seed(0)
    model = peft.get_peft_model(load_model(embedded("tiny_llama"), Runtime("float32")), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1 + 0.05 * torch.rand_like(p))
            elif "lora_" in name:
                p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(str(folder))
    return model.eval()


def change(model: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """What the adapter adds to the output of a module, by PEFT."""
    layer = model.base_model.model.get_submodule(name)
    with torch.no_grad():
        return layer(x) - layer.base_layer(x)  # type: ignore[no-any-return]


def test_adalora_is_read_exactly(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=6,
        target_r=3,
        lora_alpha=8,
        total_step=10,
        target_modules=["q_proj", "down_proj"],
    )
    adapted(config, tmp_path)
    model = peft.PeftModel.from_pretrained(
        load_model(embedded("tiny_llama"), Runtime("float32")), str(tmp_path)
    ).eval()
    factors = read_adapter(tmp_path)
    assert len(factors) == 8
    for name, f in factors.items():
        x = torch.randn(5, f.a.shape[1])
        torch.testing.assert_close(x @ f.a.T @ f.b.T, change(model, name, x), rtol=1e-4, atol=1e-5)


def test_dora_is_folded_at_an_error_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, target_modules=["v_proj"])
    model = adapted(config, tmp_path)
    with pytest.raises(AdapterError, match="DoRA"):
        read_adapter(tmp_path)
    found, base = read_adapter(tmp_path, magnitudes=True), embedded("tiny_llama")
    weights, parts = Weights(base, "cpu"), module_parts(base)
    some, lost = dora.folded(tmp_path, found, weights, parts)
    assert {f.rank for f in some.values()} == {8}
    assert 0 < lost < 1
    # of all ranks nothing is left out, and the change is PEFT's
    monkeypatch.setattr(dora, "MORE", 10**6)
    whole, nothing = dora.folded(tmp_path, found, weights, parts)
    assert nothing == pytest.approx(0, abs=1e-5)
    left = total = 0.0
    for name, f in whole.items():
        x = torch.randn(7, f.a.shape[1])
        torch.testing.assert_close(x @ f.a.T @ f.b.T, change(model, name, x), rtol=1e-3, atol=1e-4)
        dense, cut = f.b @ f.a, some[name].b @ some[name].a
        left, total = (
            left + float((dense - cut).square().sum()),
            total + float(dense.square().sum()),
        )
    assert lost == pytest.approx(left / total, rel=1e-3)
