"""Keys and values that every row of a batch begins with, computed once: a long shared prompt, or
an adapter's virtual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# keys and values of every layer: (1 × heads × tokens × head size)
Layers = list[tuple["torch.Tensor", "torch.Tensor"]]


def borrowed(layers: Layers) -> Any:
    """A cache that puts these layers before what a forward pass adds, and keeps nothing of it: one
    layer's copy at a time instead of all."""
    import torch
    from transformers import DynamicCache

    class Borrowed(DynamicCache):  # type: ignore[misc]
        def update(
            self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
        ) -> Any:
            (keys, values), n = layers[layer_idx], len(key_states)
            return (
                torch.cat([keys.expand(n, -1, -1, -1), key_states], dim=-2),
                torch.cat([values.expand(n, -1, -1, -1), value_states], dim=-2),
            )

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return length(layers)

    return Borrowed()


def growing(layers: Layers, rows: int = 1) -> Any:
    """An ordinary cache that starts with these layers, once a row. All layers keep all tokens:
    windows are left to masks."""
    from transformers import DynamicCache

    if not layers:
        return DynamicCache()
    return DynamicCache(
        ddp_cache_data=[(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in layers]
    )


def going_on(cache: Any, rows: torch.Tensor) -> None:
    """Keeps these rows of a cache, whose layers may be on several devices."""
    for layer in cache.layers:
        layer.batch_select_indices(rows.to(layer.keys.device))


def length(layers: Layers) -> int:
    """Tokens in a past."""
    return int(layers[0][0].shape[-2]) if layers else 0


def taken(cache: Any) -> Layers:
    """The layers of a cache that a forward pass has filled."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def virtual_tokens(model: Any) -> Layers:
    """What a prompt-learning adapter (prefix, prompt or p-tuning) puts before every text; nothing
    for other adapters."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return []
    prompt = model.get_prompt(batch_size=1)
    if str(config.peft_type.value) == "PREFIX_TUNING":
        return taken(prompt)
    base = model.get_base_model()
    cache = growing([])
    base(
        inputs_embeds=prompt.to(next(base.parameters()).dtype),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return taken(cache)
