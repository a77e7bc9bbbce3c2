"""What stands beside the configured method: other methods, and placebos with their draws."""

from __future__ import annotations

from dataclasses import fields

import yaml

from paw.errors import ConfigError, nearest
from paw.plugins import choices, modules
from paw.transfer.config import PlaceboConfig, TransferConfig
from paw.transfer.methods import METHODS, Placebo, method_named


def methods(chosen: TransferConfig, seed: int) -> list[TransferConfig]:
    """The configured method first, then its controls; of one that is drawn by chance, every draw.

    Args:
        seed: the run's; draw i has seed + 1000·i.

    Raises:
        ConfigError: for a control that is no method.
    """
    out = [chosen]
    for name in dict.fromkeys(n for n in chosen.controls if n != chosen.method):
        first = transfer_named(name, chosen, seed)
        found = method_named(first.method)
        draws = chosen.draws if isinstance(found, Placebo) and found.drawn else 1
        out += [first, *(transfer_named(name, chosen, seed + 1000 * i) for i in range(1, draws))]
    return out


def real_method(c: TransferConfig, chosen: TransferConfig) -> TransferConfig:
    """Of a placebo the method that it spoils; else the method itself."""
    return transfer_named(c.reference, chosen) if isinstance(c, PlaceboConfig) else c


def shuffle_of(c: TransferConfig) -> int | None:
    """Of a placebo that spoils the evidence the seed by which positions are paired; else None."""
    found = method_named(c.method)
    shuffles = isinstance(found, Placebo) and found.shuffles
    return c.seed if isinstance(c, PlaceboConfig) and shuffles else None


def transfer_named(name: str, like: TransferConfig, seed: int = 0) -> TransferConfig:
    """Another method with its own defaults, and all that is shared taken from `like`.

    Raises:
        ConfigError: where conf/transfer has none of that name.
    """
    known = choices("transfer")
    if name not in known:
        raise ConfigError(f"transfer.controls: no method {name!r}." + nearest(name, known))
    if name == like.method:
        return like
    chosen = {
        key: value
        for key, value in yaml.safe_load(known[name].read_text()).items()
        if key != "defaults" and not str(value).startswith("${")
    }
    own = method_named(chosen["method"]).schema
    shared = {f.name for f in fields(TransferConfig)} - {"evidence"}
    values = {key: getattr(like, key) for key in shared} | {"controls": []} | chosen
    if issubclass(own, PlaceboConfig):  # it looks at what the method looks at that it spoils
        values["reference"] = like.reference if isinstance(like, PlaceboConfig) else like.method
        values["evidence"] = like.evidence
    if "seed" in {f.name for f in fields(own)}:
        values["seed"] = seed
    return own(**values)


def standard(c: TransferConfig) -> list[str]:
    """Every placebo that applies to a method."""
    found = {name: method_named(name) for name in modules(METHODS)}
    return [name for name, m in found.items() if isinstance(m, Placebo) and m.applies(c)]


def real_methods() -> list[str]:
    """The methods that a placebo can spoil: all but those that spoil another."""
    return [n for n in modules(METHODS) if not issubclass(method_named(n).schema, PlaceboConfig)]
