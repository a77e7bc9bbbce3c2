"""Everything about a graph that can be known before it runs."""

from __future__ import annotations

from collections.abc import Iterator

from paw.config.common import RunConfig
from paw.errors import ConfigError
from paw.graph import Check, plan, sources_of, steps_of
from paw.launch.outline import Outline
from paw.models.load import check_hardware
from paw.store import Store, Watch

HARDWARE = "hardware"


def checks_of(c: RunConfig, outline: Outline) -> Iterator[Check]:
    """All checks of a graph's sources and steps, and of the machine, each once."""
    yield Check(name=HARDWARE, look=lambda store: check_hardware(c.hardware))
    told = set()
    parts = [("", outline.checks), *((n.identity, n.checks) for n in sources_of(outline.nodes))]
    parts += [("", step.checks) for step in steps_of(outline.nodes)]
    for source, check in ((source, check) for source, checks in parts for check in checks):
        which = (check.name, source or check.of)
        if which not in told:
            told.add(which)
            yield check


def prepare(c: RunConfig, outline: Outline, store: Store, watch: Watch) -> list[str]:
    """Fetches what a graph reads, and makes all quick checks.

    Returns:
        What the user is warned of.

    Raises:
        PawError: the first thing that is missing or wrong.
    """
    warnings, lacking = [], False
    try:
        check_hardware(c.hardware)
    except ConfigError:
        if _needs_devices(outline, store):
            raise
        lacking = True
    for source in sources_of(outline.nodes):
        source.get(watch)
    for check in checks_of(c, outline):
        if not check.thorough and not (lacking and check.name == HARDWARE):
            found = check.look(store)
            warnings += [found] if check.warns and found else []
    return list(dict.fromkeys(warnings))


def _needs_devices(outline: Outline, store: Store) -> bool:
    """Whether anything is left to make on a device: what a cluster has made is reported on any
    machine."""
    left = (p.step for p in plan(outline.nodes, store) if p.state != "there")
    return any(step.stage.devices != "none" for step in left)
