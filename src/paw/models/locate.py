"""Where a base model is: its path, the models folder, a package, the hub's cache, the hub; always as a local folder."""

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

HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
HUB_LEFT_OUT = ["original/*", "onnx/*", "openvino/*", "runs/*"]
CHUNK = 1 << 20


def locate(config: ModelConfig, models_dir: str | None, watch: Watch) -> Path:
    """A folder in the hub's layout (config.json, safetensors, tokenizer) that holds the model.

    Raises:
        ModelError: naming the places that were tried and what to do.
    """
    if config.path:
        path = Path(config.path).expanduser()
        if not path.exists():
            raise ModelError(
                f"{config.name}: path {path} does not exist. Correct it, or leave path out and give hub=owner/name."
            )
        return _folder(path, config.name, watch)
    tried = []
    for candidate in _in_models_dir(config, models_dir):
        if candidate.exists():
            return _folder(candidate, config.name, watch)
        tried.append(str(candidate))
    if config.package:
        return _dequantised(
            _from_package(config.package, config.name), config.package.sha256, config.name, watch
        )
    if config.hub:
        return _from_hub(config, tried, watch)
    raise ModelError(
        f"{config.name}: has neither path, hub nor package, and is not in {models_dir or 'a models_dir (none is set)'}."
    )


def at_hand(config: ModelConfig, models_dir: str | None) -> str | None:
    """Where a model is on this machine, without fetching or making anything; None if it is not."""
    folders = (
        [Path(config.path).expanduser()]
        if config.path
        else list(_in_models_dir(config, models_dir))
    )
    found = next((str(f) for f in folders if f.exists()), None)
    if found is None and config.package and all(_site_file(f) for f in config.package.files):
        found = f"package {config.package.files[0].split('/')[0]}"
    if found is None and config.hub:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.hub, "config.json", revision=config.revision)
        found = str(Path(cached).parent) if isinstance(cached, str) else None
    return found


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
        reason = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise ModelError(
            f"{config.name}: is not on this machine, and the hub does not show {config.hub} ({reason})."
        ) from None
    size = sum(f.size or 0 for f in found.siblings or [] if f.rfilename.endswith(".safetensors"))
    return f"{config.hub} on the hub, {size / 2**30:.1f} GiB to be fetched"


def _in_models_dir(config: ModelConfig, models_dir: str | None) -> Iterator[Path]:
    if models_dir:
        root = Path(models_dir).expanduser()
        hub = config.hub or ""
        names = [config.name, *([hub.split("/")[-1], hub, hub.replace("/", "_")] if hub else [])]
        yield from (root / n for n in names)
        yield root / f"{config.name}.gguf"


def _folder(path: Path, name: str, watch: Watch) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name}: {path} is neither a folder nor a .gguf file.")
        return _dequantised(path, sha256([path]), name, watch)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{name}: {path} has no config.json, so it is no model in the hub's layout. Give the folder that has it."
        )
    if not any(path.glob("*.safetensors")):
        raise ModelError(
            f"{name}: {path} has no .safetensors weights. Convert it with transformers' save_pretrained."
        )
    return path


# ---- packages and GGUF ------------------------------------------------------------------------------


def _from_package(package: PackageConfig, name: str) -> Path:
    """The package's parts joined into one file in the cache, its checksum verified; one whole file is used in place."""
    parts = [_site_file(f) for f in package.files]
    if any(p is None for p in parts):
        raise ModelError(
            f"{name}: its package is not installed ({package.files[0].split('/')[0]}). Install it: {package.install}"
        )
    found = [p for p in parts if p is not None]
    out = cache_dir() / "gguf" / f"{package.sha256[:16]}.gguf"
    if not out.is_file():
        actual = sha256(found)
        if actual != package.sha256:
            raise ModelError(
                f"{name}: the checksum of its package's files is {actual[:12]}…, not {package.sha256[:12]}…: "
                f"damaged or another version. Install again: {package.install}"
            )
        if len(found) == 1:
            return found[0]
        with replacing(out) as beside, open(beside, "wb") as joined:
            for part in found:
                with open(part, "rb") as f:
                    shutil.copyfileobj(f, joined, CHUNK)
    return out


def _site_file(relative: str) -> Path | None:
    """A file of an installed package, found without importing the package."""
    from importlib.util import find_spec

    top, _, rest = relative.partition("/")
    spec = find_spec(top)
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / rest).is_file():
            return Path(root) / rest
    return None


def _dequantised(gguf: Path, checksum: str, name: str, watch: Watch) -> Path:
    """A GGUF file as a float32 folder in the hub's layout, made once per machine."""
    out = cache_dir() / "models" / f"{name}-{checksum[:16]}"
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


# ---- the hub ----------------------------------------------------------------------------------------


def _from_hub(config: ModelConfig, tried: list[str], watch: Watch) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    assert config.hub is not None
    ask: dict[str, Any] = {
        "repo_id": config.hub,
        "revision": config.revision,
        "allow_patterns": HUB_FILES,
        "ignore_patterns": HUB_LEFT_OUT,
    }
    try:
        cached = Path(snapshot_download(**ask, local_files_only=True))
        if any(cached.glob("*.safetensors")):
            return _folder(cached, config.name, watch)
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        watch.say(f"{config.name}: fetching {config.hub} from the hub")
        return _folder(Path(snapshot_download(**ask)), config.name, watch)
    except GatedRepoError:
        raise ModelError(
            f"{config.name}: {config.hub} is gated. Accept its terms on the hub and run `hf auth login`."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"{config.name}: the hub has no model {config.hub}, or it is private. Check the name."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError):
        places = ", ".join([*tried, "the hub's cache"])
        raise ModelError(
            f"{config.name}: not in {places}, and the hub cannot be reached. Put the folder of {config.hub} into "
            f"paths.models_dir (or $PAW_MODELS_DIR) as {config.name}, or give its path."
        ) from None
