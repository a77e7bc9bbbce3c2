"""A changed default is a changed stage."""

from __future__ import annotations

import json
from importlib import import_module

from paw.cli.schema import STAGES as NAMES
from stage_defaults import FILE, STAGES, now


def test_a_default_changes_with_its_stages_version_only() -> None:
    kept, found = json.loads(FILE.read_text()), now()
    for stage, fields in found.items():
        assert stage in kept, f"{stage} is new: python tests/stage_defaults.py"
        for name, value in fields.items():
            assert name in kept[stage], f"{name} is new: python tests/stage_defaults.py"
            assert kept[stage][name] == value, (
                f"{name} was {kept[stage][name]!r}, is {value!r}: results of before have the key of now. "
                "Raise the stage's version, then python tests/stage_defaults.py"
            )


def test_every_stage_is_held_against_the_list() -> None:
    stages = {
        getattr(import_module(module), name).name
        for module, names in STAGES.items()
        for name in names
    }
    assert stages == set(NAMES)
