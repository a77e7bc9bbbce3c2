"""Prefix tuning (arXiv 2101.00190): learnt keys and values before every text, which start as those
of a real text.

From a random start the prefix only disturbs at first; from the keys and values that the model
itself has for the beginning of the training data it starts as a real context (GSM8K 19 to 42 % in
PEFT's comparison).
"""

from __future__ import annotations

from typing import Any

from paw.errors import AdapterError
from paw.training.adapters import Method, Setting, VirtualTokensConfig


def config(c: VirtualTokensConfig, setting: Setting) -> Any:
    import peft

    if setting.task_type == "SEQ_CLS" and not _takes_a_past(setting.model):
        kind = setting.model.config.model_type
        raise AdapterError(
            f"adapter=prefix_tuning: models of type {kind!r} take no keys and values from before. "
            "Choose prompt_tuning."
        )
    return peft.PrefixTuningConfig(
        task_type=setting.task_type,
        num_virtual_tokens=c.virtual_tokens,
        modules_to_save=list(setting.head) or None,
    )


def prepare(model: Any, setting: Setting) -> None:
    import torch
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    if setting.task_type == "SEQ_CLS":
        # an encoder has no cache to start from: small values disturb little
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.mul_(0.02)
        return
    n = model.peft_config["default"].num_virtual_tokens
    ids = torch.tensor([[*setting.text] * (n // max(1, len(setting.text)) + 1)])[:, :n].to(
        model.device
    )
    with torch.no_grad(), model.disable_adapter():
        past = model.get_base_model()(input_ids=ids, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=past)


def _takes_a_past(model: Any) -> bool:
    import inspect

    inner = getattr(model, model.base_model_prefix, model)
    return any("past_key_values" in inspect.signature(m.forward).parameters for m in (model, inner))


# recomputing activations would fill the cache that holds the prefix a second time
METHOD = Method(schema=VirtualTokensConfig, config=config, prepare=prepare, recomputes=False)
