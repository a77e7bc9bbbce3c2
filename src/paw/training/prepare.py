"""What a training begins with: the base with a fresh adapter on it, and what is minimised."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from paw.data.encode import Rows
from paw.errors import ConfigError
from paw.models.load import load_classifier, load_model, load_tokenizer, tells_pairs
from paw.training import fused, packing
from paw.training.adapters import Setting, method_named
from paw.training.objectives import Answers, Classes, Objective

if TYPE_CHECKING:
    from paw.training.fit import Plan

# nats a token: rounding is less, contamination is more
SLACK = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
TEXT = 8192  # tokens of the training data that a method may start from


def adapted(plan: Plan, rows: Rows, device: str) -> Any:
    """The base with a fresh adapter on it, or with the one that the plan starts from.

    Args:
        device: of this process. A quantised base is made where it will stay; another is on the CPU.
    """
    from peft import PeftModel, get_peft_model

    quantise, sharded = plan.adapter.quantise, plan.runtime.strategy == "fsdp"
    runtime = replace(
        plan.runtime,
        device=device if quantise != "none" else "cpu",
        # sharding wants one dtype in a layer
        precision="float32" if sharded else plan.runtime.precision,
    )
    trust, head = plan.trust_remote_code, list[str]()
    if plan.classify:
        base, head = load_classifier(plan.model, runtime, rows.classes, trust, quantise)
    else:
        base = load_model(plan.model, runtime, trust, quantise)
    if plan.train.liger:
        _liger(base)
    setting = Setting(
        model=base,
        name=plan.model.name,
        task_type="SEQ_CLS" if plan.classify else "CAUSAL_LM",
        steps=plan.steps,
        head=head,
        text=[token for i in range(min(len(rows), 64)) for token in rows[i].ids][:TEXT],
    )
    method = method_named(plan.adapter.method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if plan.start is None:
            model = get_peft_model(base, method.config(plan.adapter, setting))
        else:
            model = PeftModel.from_pretrained(base, str(plan.start), is_trainable=True)
    model.peft_config["default"].base_model_name_or_path = plan.name
    method.prepare(model, setting)
    if plan.runtime.precision != "float32":
        # autocast does it, without a float32 copy of every input; IA³'s layers cast nothing
        for layer in model.modules():
            if hasattr(layer, "cast_input_dtype_enabled"):
                layer.cast_input_dtype_enabled = False
    elif not sharded and plan.runtime.strategy != "deepspeed":
        fused.use(model)
    if plan.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def objective_of(plan: Plan, model: Any, rows: Rows, device: str) -> Objective:
    """What is minimised, and whether rows are packed: where the method, the model and a trial of it
    allow that.

    Raises:
        ConfigError: where packing is asked for and not possible.
    """
    tokenizer = load_tokenizer(plan.model, plan.trust_remote_code)
    if plan.classify:
        pairs = tells_pairs(model.get_base_model(), tokenizer)
        return Classes(tokenizer.pad_token_id, rows.classes is None, pairs)
    packed = _packs(plan, model, rows, device, tokenizer.pad_token_id)
    if plan.train.packing and not packed:
        raise ConfigError(
            f"train.packing=true: {plan.adapter.method} on {plan.model.name} does not take packed "
            "rows. Leave it out."
        )
    return Answers(tokenizer.pad_token_id, packed)


def _packs(plan: Plan, model: Any, rows: Rows, device: str, pad_id: int) -> bool:
    """Whether rows are packed. The model's attention is set to it then."""
    import torch

    c, runtime, base = plan.train, plan.runtime, model.get_base_model()
    if c.packing is False or c.compile or model.active_peft_config.is_prompt_learning:
        return False
    if not packing.use(base):
        return False
    few = sorted((rows[i] for i in range(min(len(rows), 16))), key=lambda r: len(r.ids))[:3]
    model.eval().to(device)
    autocast = runtime.precision != "float32"
    with torch.autocast(runtime.device, runtime.dtype, enabled=autocast):
        packed = packing.agrees(model, few, pad_id, SLACK[runtime.precision])
    if not packed:
        packing.undo(base)
    return packed


def _liger(model: Any) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
