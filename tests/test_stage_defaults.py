"""A changed default is a changed stage."""

from __future__ import annotations

import json

from stage_defaults import FILE, declared, now


def test_a_default_changes_with_its_stages_version_only() -> None:
    kept, found = json.loads(FILE.read_text()), now()
    for stage, fields in found.items():
        assert stage in kept, f"{stage} is new: python tests/stage_defaults.py"
        for name, value in fields.items():
            assert name in kept[stage], f"{name} is new: python tests/stage_defaults.py"
            assert kept[stage][name] == value, (
                f"{name} was {kept[stage][name]!r}, is {value!r}: results of before have the key "
                "of now. Raise the stage's version, then python tests/stage_defaults.py"
            )


def test_a_stage_stands_in_the_file_of_its_name() -> None:
    stages = declared()
    assert len(stages) == 22
    for stage in stages:
        assert stage.function.endswith(f".{stage.name}:{stage.name}")
