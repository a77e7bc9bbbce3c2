"""Steps of this part."""

from __future__ import annotations

from dataclasses import replace

from paw.config.common import RunConfig
from paw.errors import need
from paw.export import compress as compressing
from paw.export import merge as merging
from paw.export.config import CompressConfig, MergeConfig
from paw.graph import Check, Source, Step
from paw.models.load import resolve_runtime
from paw.models.steps import Base
from paw.store import Store


def merge(c: RunConfig, base: Base, adapter: Source, how: MergeConfig) -> Base:
    """An adapter in its base."""

    def look(store: Store) -> str:
        merging.check_mergeable(adapter.path)
        return "can be merged"

    device = resolve_runtime(c.hardware).device
    step = Step(
        stage=merging.STAGE,
        name=f"merge {adapter.name} into {base.name}",
        config=merging.MergeStage(
            merge=how, device=device, trust_remote_code=base.config.trust_remote_code
        ),
        inputs={"model": base.node, "adapter": adapter},
        checks=[Check(name=f"merge {adapter.name}", look=look)],
    )
    return Base(replace(base.config, name=f"{base.name}_merged", hub=None), step)


def compress(c: RunConfig, base: Base, how: CompressConfig) -> Base:
    """A base with its linear layers quantised."""

    def look(store: Store) -> str:
        need("bitsandbytes", "quantise", "task=compress")
        return "bitsandbytes is installed"

    runtime = resolve_runtime(c.hardware)
    step = Step(
        stage=compressing.STAGE,
        name=f"compress {base.name} to {how.scheme}",
        config=compressing.CompressStage(
            compress=how, runtime=runtime, trust_remote_code=base.config.trust_remote_code
        ),
        inputs={"model": base.node},
        checks=[Check(name="task=compress", look=look)],
    )
    return Base(replace(base.config, name=f"{base.name}, {how.scheme}", hub=None), step)
