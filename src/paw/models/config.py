"""The schema of group model: a base model and where it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING

# ruff: noqa: UP045 - OmegaConf 2.3 wants Optional spelt out


@dataclass
class PackageConfig:
    """A model that a Python package carries: a file, perhaps in parts; or a folder as the hub's."""

    files: list[str] = field(default_factory=list)  # relative to site-packages, in order
    sha256: str = ""  # of the parts joined
    folder: Optional[str] = None  # instead of files
    install: str = MISSING  # the command that brings it


@dataclass
class ModelConfig:
    """A base model. It is looked for in this order: path, models_dir (by name or hub id), package,
    the hub's cache, the hub."""

    name: str = MISSING
    path: Optional[str] = None  # a folder in the hub's layout, or a .gguf file
    hub: Optional[str] = None  # owner/name
    revision: Optional[str] = None
    package: Optional[PackageConfig] = None
    trust_remote_code: bool = False
