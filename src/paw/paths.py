"""Where things are: conf/ of a checkout or of the wheel, the embedded models and data, the
machine's cache."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """conf/ of the source tree if we run from one, else the copy in the wheel."""
    tree = PACKAGE.parent.parent
    if (tree / "pyproject.toml").is_file() and (tree / "conf" / "config.yaml").is_file():
        return tree / "conf"
    return PACKAGE / "conf"


def embedded(name: str) -> Path:
    """A model or data set that is shipped inside the package."""
    return PACKAGE / "embedded" / name


def cache_dir() -> Path:
    """What is made once per machine (dequantised models, normalised hub data); $PAW_CACHE moves
    it."""
    return Path(os.environ.get("PAW_CACHE") or Path.home() / ".cache" / "paw")


def register_embedded() -> None:
    """In YAML files ${paw.embedded:NAME} is the folder that is shipped under that name."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("paw.embedded", lambda name: str(embedded(name)), replace=True)
