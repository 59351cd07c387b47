"""A model class without weights, built from a config on the meta device."""

from __future__ import annotations

import warnings

import torch
from transformers import PretrainedConfig, PreTrainedModel

from runner.architecture.building import BUILD_ERRORS
from runner.protocol.errors import BrokenCheckpoint


def empty_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device, in evaluation mode.

    Raises:
        BrokenCheckpoint: the class cannot be built from `config`.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: PreTrainedModel = model_class._from_config(config)
    except BUILD_ERRORS as error:
        raise unbuildable(model_class, error) from error
    return model.eval()


def unbuildable(model_class: type[PreTrainedModel], error: Exception) -> BrokenCheckpoint:
    """Return the error for a config that transformers refused with `error`."""
    return BrokenCheckpoint(
        f"The model class {model_class.__name__} cannot be built from config.json: {first_line(error)}",
        why="config.json is incomplete, or was written for other code.",
        fix="Download the base again, or use the revision that its authors name.",
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, for use in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
