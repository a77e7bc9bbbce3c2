"""Where a base model is: its path, the models folder, a package, the hub's cache, the hub; always
as a local folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from paw.errors import ModelError
from paw.models.config import ModelConfig, PackageConfig
from paw.paths import cache_dir
from paw.store import Watch, replacing, sha256
from paw.text import first_line

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
HUB_LEFT_OUT = ["original/*", "onnx/*", "openvino/*", "runs/*"]
CHUNK = 1 << 20


def locate(config: ModelConfig, models_dir: str | None, watch: Watch) -> Path:
    """A folder in the hub's layout (config.json, safetensors, tokenizer) that holds the model.

    Raises:
        ModelError: naming the places that were tried and what to do.
    """
    found = find_model(config, models_dir)
    if found is not None:
        return found
    places = [Path(config.path)] if config.path else list(_in_models_dir(config, models_dir))
    for file in (place.expanduser() for place in places):
        if file.is_file():
            return _dequantised(file, sha256([file]), config.name, watch)
    if config.package and not config.package.folder:
        file = _from_package(config.package, config.name)
        return _dequantised(file, config.package.sha256, config.name, watch)
    if config.hub:
        if config.package and config.package.folder:
            places.append(Path(f"package {config.package.folder} ({config.package.install})"))
        return _from_hub(config, list(map(str, places)), watch)
    raise ModelError(
        f"{config.name}: has neither path, hub nor package, and is not in "
        f"{models_dir or 'a models_dir (none is set)'}."
    )


def find_model(config: ModelConfig, models_dir: str | None) -> Path | None:
    """The folder that `locate` would give, without fetching or making anything; None where it would
    have to.

    Raises:
        ModelError: for a path that is not there or holds no model.
    """
    if config.path:
        places = [Path(config.path).expanduser()]
    else:
        places = [place for place in _in_models_dir(config, models_dir) if place.exists()]
    if places:
        return _folder(places[0], config.name)
    if config.package and config.package.folder:
        return _site_file(config.package.folder) or (_cached(config) if config.hub else None)
    if config.package:
        made = _dequantised_folder(config.name, config.package.sha256)
        return made if (made / "config.json").is_file() else None
    return _cached(config) if config.hub else None


def at_hand(config: ModelConfig, models_dir: str | None) -> str | None:
    """Where a model is, or the package that it can be made from; None if neither is here."""
    found = find_model(config, models_dir)
    files = config.package.files if config.package else []
    if found is None and config.package and files and all(map(_site_file, files)):
        return f"package {files[0].split('/')[0]}"
    return None if found is None else str(found)


def on_hub(config: ModelConfig) -> str:
    """What the hub says it has, without fetching it.

    Raises:
        ModelError: where it has no such model, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(
            str(config.hub), revision=config.revision, timeout=10, files_metadata=True
        )
    except Exception as e:  # whatever the client raises
        raise ModelError(
            f"{config.name}: is not on this machine, and the hub does not show {config.hub} "
            f"({first_line(e)[:120]})."
        ) from None
    size = sum(f.size or 0 for f in found.siblings or [] if f.rfilename.endswith(".safetensors"))
    return f"{config.hub} on the hub, {size / 2**30:.1f} GiB to be fetched"


def _in_models_dir(config: ModelConfig, models_dir: str | None) -> Iterator[Path]:
    if models_dir:
        root = Path(models_dir).expanduser()
        hub = config.hub or ""
        others = [hub.split("/")[-1], hub, hub.replace("/", "_")] if hub else []
        yield from (root / name for name in (config.name, *others))
        yield root / f"{config.name}.gguf"


def _folder(path: Path, name: str) -> Path | None:
    """A model's folder; None for a GGUF file that was not dequantised yet."""
    if not path.exists():
        raise ModelError(
            f"{name}: path {path} does not exist. Correct it, or leave path out and give "
            "hub=owner/name."
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name}: {path} is neither a folder nor a .gguf file.")
        made = _dequantised_folder(name, sha256([path]))
        return made if (made / "config.json").is_file() else None
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{name}: {path} has no config.json, so it is no model in the hub's layout. Give the "
            "folder that has it."
        )
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{name}: {path} has no .safetensors weights. Convert it with transformers' "
            "save_pretrained."
        )
    return path


# ---- packages and GGUF ----------------------------------------------------------------------


def _from_package(package: PackageConfig, name: str) -> Path:
    """The package's parts joined into one file in the cache, its checksum verified; a file that is
    whole is used in place."""
    found = [p for p in map(_site_file, package.files) if p is not None]
    if len(found) < len(package.files):
        raise ModelError(
            f"{name}: its package is not installed ({package.files[0].split('/')[0]}). Install it: "
            f"{package.install}"
        )
    out = cache_dir() / "gguf" / f"{package.sha256[:16]}.gguf"
    if not out.is_file():
        actual = sha256(found)
        if actual != package.sha256:
            raise ModelError(
                f"{name}: the checksum of its package's files is {actual[:12]}…, not "
                f"{package.sha256[:12]}…: damaged or another version. Install it again: "
                f"{package.install}"
            )
        if len(found) == 1:
            return found[0]
        with replacing(out) as beside, open(beside, "wb") as joined:
            for part in found:
                with open(part, "rb") as f:
                    shutil.copyfileobj(f, joined, CHUNK)
    return out


def _site_file(relative: str) -> Path | None:
    """A file or folder of an installed package, found without importing the package."""
    from importlib.util import find_spec

    top, _, rest = relative.partition("/")
    spec = find_spec(top)
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / rest).exists():
            return Path(root) / rest
    return None


def _dequantised_folder(name: str, checksum: str) -> Path:
    return cache_dir() / "models" / f"{name}-{checksum[:16]}"


def _dequantised(gguf: Path, checksum: str, name: str, watch: Watch) -> Path:
    """A GGUF file as a float32 folder in the hub's layout, made once per machine."""
    out = _dequantised_folder(name, checksum)
    if (out / "config.json").is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not (out / "config.json").is_file():
            watch.say(f"{name}: dequantising {gguf.name} into {out}, once on this machine")
            work = out.with_name(f"{out.name}.tmp-{os.getpid()}")
            shutil.rmtree(work, ignore_errors=True)
            try:
                from paw.models.gguf import dequantise

                dequantise(gguf, work)
                work.rename(out)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return out


# ---- the hub --------------------------------------------------------------------------------


def _asked(config: ModelConfig) -> dict[str, Any]:
    which = {"repo_id": config.hub, "revision": config.revision}
    return {**which, "allow_patterns": HUB_FILES, "ignore_patterns": HUB_LEFT_OUT}


def _cached(config: ModelConfig) -> Path | None:
    """A model in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(**_asked(config), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return _folder(found, config.name) if any(found.glob("*.safetensors")) else None


def _from_hub(config: ModelConfig, tried: list[str], watch: Watch) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        watch.say(f"{config.name}: fetching {config.hub} from the hub")
        found = _folder(Path(snapshot_download(**_asked(config))), config.name)
        assert found is not None
        return found
    except GatedRepoError:
        raise ModelError(
            f"{config.name}: {config.hub} is gated. Accept its terms on the hub and run "
            "`hf auth login`."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"{config.name}: the hub has no model {config.hub}, or it is private. Check the name."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError):
        places = ", ".join([*tried, "the hub's cache"])
        raise ModelError(
            f"{config.name}: not in {places}, and the hub cannot be reached. Put the folder of "
            f"{config.hub} into paths.models_dir (or $PAW_MODELS_DIR) as {config.name}, or give "
            "its path."
        ) from None
