"""The base model's class with its parameters as views of the mapped checkpoint: nothing is read, nothing is copied.

Covered: every architecture that transformers has a class for, sharded or not, tied as transformers v5 would tie it.
Not covered: quantised bases and code that comes with a model (both refused); parameters that transformers computes
from several stored tensors get an empty placeholder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from runner.checkpoint.layout import Checkpoint
from runner.checkpoint.names import StoredNames, map_names
from runner.companions import read_config
from runner.errors import BrokenCheckpoint, UnsupportedCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model whose weights are still on disk.

    Attributes:
        model: of the class that config.json names, in evaluation mode.
        names: where each stored tensor went.
        ties: state-dict key → key of the parameter that it shares.
    """

    model: PreTrainedModel
    names: StoredNames
    ties: Mapping[str, str]


def open_base(checkpoint: Checkpoint, *, in_memory: bool) -> Base:
    """Return the base model of `checkpoint`.

    Args:
        checkpoint: on disk.
        in_memory: read all weights into memory as float32 instead of mapping them.

    Raises:
        BrokenCheckpoint: config.json and weights contradict each other.
        UnsupportedCheckpoint: a base that this version cannot merge exactly.
    """
    model = _empty_model(checkpoint)
    names = map_names(model, checkpoint.tensors)
    _fill(model, checkpoint, names, in_memory=in_memory)
    return Base(model=model, names=names, ties=_tie(model, names))


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, for use in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    raw = read_config(checkpoint.root)
    architecture = next(iter(raw.get("architectures") or ()), None)
    model_class = getattr(transformers, str(architecture), None)
    if raw.get("quantization_config"):
        raise UnsupportedCheckpoint(
            "The base is quantised (its config.json has `quantization_config`).",
            why="A delta added to quantised weights does not survive quantising them again.",
            fix="Set `base-model` to the 16-bit model that it was made from.",
        )
    if model_class is None or not issubclass(model_class, PreTrainedModel):
        raise UnsupportedCheckpoint(
            f"The base's architecture is {architecture!r}, which this transformers has no class for.",
            why="Code that comes with a model is never run.",
            fix="Use a base whose architecture is part of transformers, or a newer release of this action.",
        )
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.root), trust_remote_code=False)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: PreTrainedModel = model_class._from_config(config)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(
            f"The model class {architecture} cannot be built from config.json: {first_line(error)}",
            why="config.json is incomplete, or was written for other code.",
            fix="Download the base again, or use the revision that its authors name.",
        ) from error
    return model.eval()


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, names: StoredNames, *, in_memory: bool) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    by_file: dict[str, list[tuple[str, str]]] = {}
    for key, stored in names.renamed.items():
        info = checkpoint.tensors[stored]
        if info.shape != shapes[key]:
            raise BrokenCheckpoint(
                f"{stored!r} is stored as {list(info.shape)}, but config.json asks for {list(shapes[key])}.",
                why="config.json and weights are of different models.",
                fix="Download the base again, all files at one revision.",
            )
        by_file.setdefault(info.file, []).append((key, stored))
    for file, entries in by_file.items():
        with safe_open(str(checkpoint.root / file), framework="pt", device="cpu") as handle:
            for key, stored in entries:
                view = handle.get_tensor(stored)  # a view of the mapping, which lives as long as the tensor
                _assign(model, key, view.float() if in_memory and view.is_floating_point() else view)
    for key in names.converted:
        _assign(model, key, torch.zeros((), dtype=torch.bfloat16).expand(shapes[key]))


def _assign(model: nn.Module, key: str, tensor: torch.Tensor) -> None:
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def _tie(model: PreTrainedModel, names: StoredNames) -> dict[str, str]:
    # As transformers v5 does on loading: a target that is stored, too, and differs from its source is not tied.
    ties: dict[str, str] = {}
    stored = names.renamed
    for target, source in model.all_tied_weights_keys.items():
        if target in stored and source in stored:
            if not torch.equal(model.get_parameter(target), model.get_parameter(source)):
                continue
            first, second = target, source
        elif source in stored:
            first, second = target, source
        else:
            first, second = source, target
        if second in stored:
            path, _, name = first.rpartition(".")
            model.get_submodule(path)._parameters[name] = model.get_parameter(second)
            ties[first] = second
    missing = sorted(key for key, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise BrokenCheckpoint(
            f"The base lacks {missing[0]!r}" + (f" and {len(missing) - 1} more tensors." if len(missing) > 1 else "."),
            why=f"{type(model).__name__} needs it, and transformers would fill it with random numbers.",
            fix="Use a complete checkpoint of this architecture as `base-model`.",
        )
    return ties
