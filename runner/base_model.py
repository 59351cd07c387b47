"""The base model's class with its parameters as views of the mapped checkpoint: nothing is read, nothing is copied.

Covered: every architecture that transformers has a class for, sharded or not, tied as transformers v5 would tie it;
adapters that make it another class with a head of their own (`runner.heads`): what only the adapter has gets a
placeholder, and what that class has no place for is left out of the checkpoint's view.
Not covered: quantised bases and code that comes with a model (both refused); parameters that transformers computes
from several stored tensors get an empty placeholder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from runner.adapter import Adapter
from runner.checkpoint.layout import Checkpoint
from runner.checkpoint.names import StoredNames, map_names
from runner.checkpoint.view import view
from runner.companions import read_config
from runner.errors import BrokenCheckpoint, UnsupportedCheckpoint
from runner.heads import adapter_keys, choose_class, find_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model whose weights are still on disk.

    Attributes:
        checkpoint: the base as the merged model's class sees it.
        model: of the class that config.json names, or of the adapter's task, in evaluation mode.
        names: where each stored tensor went.
        ties: state-dict key → key of the parameter that it shares.
        own: state-dict keys whose values only the adapter has; placeholders until it is attached.
        config_edits: keys of config.json with their new values, where the class or its labels are not the base's.
        notes: what the user should know of it, one sentence each.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    names: StoredNames
    ties: Mapping[str, str]
    own: frozenset[str]
    config_edits: Mapping[str, Any]
    notes: tuple[str, ...]


def open_base(checkpoint: Checkpoint, adapter: Adapter, *, in_memory: bool) -> Base:
    """Return the base model of `checkpoint`, in the form that `adapter` was trained on.

    Args:
        checkpoint: on disk.
        adapter: says which class and how many labels; nothing of it is loaded.
        in_memory: read all weights into memory as float32 instead of mapping them.

    Raises:
        BrokenCheckpoint: config.json and weights contradict each other.
        UnsupportedCheckpoint: a base that this version cannot merge exactly.
        UnsupportedAdapter: transformers has no class for the adapter's task.
    """
    own_class, config = _own_class(checkpoint)
    model_class = choose_class(own_class, config, adapter)
    model = _empty_model(model_class, config)
    labels = find_labels(model, adapter)
    edits = dict(labels.edits) if labels else {}
    if labels is not None and labels.count != config.num_labels:
        config.num_labels = labels.count
        model = _empty_model(model_class, config)
    notes: list[str] = []
    if model_class is not own_class:
        edits["architectures"] = [model_class.__name__]
        left_out = _heads_of(own_class, config, map_names(model, checkpoint.tensors).unknown, checkpoint)
        checkpoint = view(checkpoint, dropped=left_out)
        notes.append(_departure(own_class, model_class, left_out))
    names = map_names(model, checkpoint.tensors)
    own = _fill(model, checkpoint, names, adapter_keys(adapter), in_memory=in_memory)
    ties = _tie(model, names)
    own |= _hold_places(model, adapter_keys(adapter))
    _check_whole(model)
    return Base(
        checkpoint=checkpoint,
        model=model,
        names=names,
        ties=ties,
        own=frozenset(own),
        config_edits=edits,
        notes=tuple(notes),
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, for use in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _own_class(checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], PretrainedConfig]:
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
        return model_class, AutoConfig.from_pretrained(str(checkpoint.root), trust_remote_code=False)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise _unbuildable(model_class, error) from error


def _empty_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: PreTrainedModel = model_class._from_config(config)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise _unbuildable(model_class, error) from error
    return model.eval()


def _unbuildable(model_class: type[PreTrainedModel], error: Exception) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"The model class {model_class.__name__} cannot be built from config.json: {first_line(error)}",
        why="config.json is incomplete, or was written for other code.",
        fix="Download the base again, or use the revision that its authors name.",
    )


def _heads_of(
    own_class: type[PreTrainedModel], config: PretrainedConfig, unknown: tuple[str, ...], checkpoint: Checkpoint
) -> tuple[str, ...]:
    """Return which of the `unknown` tensors belong to the base's own class; what no class knows is kept."""
    mine = map_names(_empty_model(own_class, config), checkpoint.tensors)
    known = {*mine.renamed.values(), *(name for names in mine.converted.values() for name in names)}
    return tuple(name for name in unknown if name in known)


def _departure(own: type[PreTrainedModel], new: type[PreTrainedModel], left_out: tuple[str, ...]) -> str:
    text = f"The adapter was trained on a {new.__name__}: that is what the release is, not a {own.__name__}"
    if not left_out:
        return text + "."
    more = f" and {len(left_out) - 1} more tensors" if left_out[1:] else ""
    return f"{text}; the base's {left_out[0]}{more} of its own head are left out."


def _fill(
    model: PreTrainedModel, checkpoint: Checkpoint, names: StoredNames, given: Mapping[str, tuple[int, ...]], *,
    in_memory: bool,
) -> set[str]:  # fmt: skip
    """Put views of the stored tensors in place; return the keys that the adapter gives in another shape."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    by_file: dict[str, list[tuple[str, str]]] = {}
    own: set[str] = set()
    for key, stored in names.renamed.items():
        info = checkpoint.tensors[stored]
        if info.shape != shapes[key] and given.get(key) == shapes[key]:
            own.add(key)
            continue
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
    return own


def _hold_places(model: PreTrainedModel, given: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Give zeros to what the base does not store and the adapter brings; return its keys."""
    empty = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_meta and key in given}
    for key, tensor in empty.items():
        _assign(model, key, torch.zeros(tensor.shape, dtype=torch.float32))
    return set(empty)


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
    return ties


def _check_whole(model: PreTrainedModel) -> None:
    missing = sorted(key for key, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise BrokenCheckpoint(
            f"The base lacks {missing[0]!r}" + (f" and {len(missing) - 1} more tensors." if len(missing) > 1 else "."),
            why=f"{type(model).__name__} needs it, the adapter does not bring it, and transformers would fill it with "
            "random numbers.",
            fix="Use a complete checkpoint of this architecture as `base-model`.",
        )
