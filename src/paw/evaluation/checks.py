"""What can be known to be wrong before anything is evaluated or predicted."""

from __future__ import annotations

from pathlib import Path

from paw.data.config import DatasetConfig
from paw.data.kinds import kind_named
from paw.errors import AdapterError, ConfigError
from paw.evaluation.config import EvaluateConfig, PredictConfig
from paw.models.adapters import birth
from paw.models.load import is_encoder


def check_mode(evaluate: EvaluateConfig, dataset: DatasetConfig) -> None:
    """
    Raises:
        ConfigError: where evaluate.mode cannot be used on this kind of data.
    """
    choices = not kind_named(dataset.kind).written
    if evaluate.mode == "letter" and not choices:
        raise ConfigError(
            f"evaluate.mode=letter: {dataset.name} has no choices to put under letters. "
            "Use likelihood or generate."
        )
    if evaluate.mode == "classify" and (not choices or evaluate.num_fewshot):
        raise ConfigError(
            "evaluate.mode=classify: needs a data set with labels (kind question or glue), and "
            "takes no shots."
        )


def check_model(mode: str, folder: Path) -> None:
    """
    Raises:
        ConfigError: where a base model cannot be used as evaluate.mode says.
    """
    if is_encoder(folder) and mode != "classify":
        raise ConfigError(
            f"evaluate.mode={mode}: {folder.name} is an encoder and cannot generate text. "
            "Set evaluate.mode=classify."
        )


def check_asked(config: PredictConfig) -> None:
    """
    Raises:
        ConfigError: where task=predict is asked nothing or two things, or a file that is not there.
    """
    if (config.text is None) == (config.file is None):
        raise ConfigError(
            "task=predict: say what is asked: predict.text=TEXT, or predict.file=FILE (- is stdin)."
        )
    file = None if config.file in (None, "-") else Path(str(config.file)).expanduser()
    if file is not None and not file.is_file():
        raise ConfigError(f"predict.file: {file} is no file.")


def check_predictor(mode: str, adapter: Path | None) -> None:
    """
    Args:
        adapter: its folder, or None for the base alone.

    Raises:
        ConfigError: where task=predict cannot use an adapter, or none, as evaluate.mode says.
        AdapterError: where it is not known which classes a head knows.
    """
    classifier = adapter is not None and "classes" in birth(adapter)
    if mode != "classify":
        if classifier:
            raise ConfigError(
                f"adapter.path: {adapter} is a classifier. Set evaluate.mode=classify."
            )
    elif adapter is None:
        raise ConfigError(
            "task=predict evaluate.mode=classify: a base has no head. Name an adapter that was "
            "trained with one: adapter.path=DIR."
        )
    elif not classifier:
        raise AdapterError(
            f"{adapter}: does not say which classes its head knows ({adapter}/paw.json). Train it "
            "with paw."
        )
