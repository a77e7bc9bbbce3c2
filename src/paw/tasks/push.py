"""task=push: an adapter (adapter.path) with its card, and its run's report, to the hub."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from paw.config.common import RunConfig
from paw.console import Console
from paw.errors import AdapterError, ConfigError
from paw.export.config import PushConfig
from paw.models.adapters import BIRTH, CONFIG, find_adapter, read_config
from paw.report.card import CARD
from paw.report.page import PAGE
from paw.text import first_line
from paw.training.adapters import AdapterConfig

log = logging.getLogger("paw")


@dataclass
class Config(RunConfig):
    adapter: AdapterConfig = MISSING
    push: PushConfig = field(default_factory=PushConfig)


def run(c: Config, overrides: Sequence[str], run_dir: str | None = None) -> str:
    """Returns the address of the repository.

    Raises:
        ConfigError: no adapter or repository is named, or the hub refuses.
        AdapterError: the adapter has no card: paw writes one in every run's folder.
    """
    Console(c.verbosity)
    if c.adapter.path is None or c.push.repo is None:
        raise ConfigError("task=push: name both: adapter.path=DIR push.repo=OWNER/NAME.")
    folder = find_adapter(c.adapter.path)
    read_config(folder)
    if not (folder / CARD).is_file():
        raise AdapterError(
            f"{folder}: has no model card ({CARD}). Those of a run (outputs/runs/…/adapters/…) "
            "have one; else write one that says what it is."
        )
    page = folder.parent.parent / PAGE
    address = _upload(c.push, folder, page if page.is_file() else None)
    log.info("%s", address)
    return address


def _upload(config: PushConfig, folder: Path, page: Path | None) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    files: dict[str, Path | bytes] = {p.name: p for p in sorted(folder.iterdir()) if p.is_file()}
    files[CARD] = _card(folder / CARD).encode()
    files[CONFIG] = json.dumps(_config(read_config(folder)), indent=1).encode()
    files.pop(BIRTH, None)  # of use with this store only; it names folders of this machine
    if page is not None:
        files[PAGE] = page
    added = [CommitOperationAdd(path_in_repo=k, path_or_fileobj=v) for k, v in files.items()]
    api = HfApi()
    try:
        repo = api.create_repo(str(config.repo), private=config.private, exist_ok=True)
        message = "Adapter, card and report by paw"
        api.create_commit(repo.repo_id, added, commit_message=message)  # all of it or nothing
    except Exception as e:  # whatever the client raises
        raise ConfigError(
            f"push.repo={config.repo}: could not be written ({first_line(e)[:200]}). Check the "
            "name and the network, and sign in with a token that may write: `hf auth login`, or "
            "HF_TOKEN."
        ) from None
    return str(repo)


def _card(file: Path) -> str:
    """A card, without its base where that is a folder: the hub knows its own models only."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(file)
    if not _on_hub(card.data.base_model):
        card.data.base_model = None
    return str(card)


def _config(found: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's configuration, likewise."""
    name = "base_model_name_or_path"
    return {**found, name: found.get(name) if _on_hub(found.get(name)) else None}


def _on_hub(name: object) -> bool:
    """Whether a base's name is one of the hub, by its form, and no folder's."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and not Path(str(name)).exists()
