"""The base model's class with its parameters as views of the mapped checkpoint: nothing is read, nothing is copied.

Covered: every architecture that transformers has a class for, sharded or not, tied as transformers v5 would tie it;
adapters that make it another class with a head of their own (`runner.worker.model.heads`): what only the adapter has
gets a placeholder, and what that class has no place for is left out of the checkpoint's view. Not covered: quantised
bases and code that comes with a model (both refused). Parameters that transformers computes from other stored tensors
get an empty placeholder (`Base.conversion` makes them when they are merged), or their values where the whole base is
read into memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from runner.architecture.building import bounded_build
from runner.architecture.conversion import Conversion, Group
from runner.architecture.names import StoredNames
from runner.files.adapter.folder import Adapter
from runner.files.layout import Checkpoint
from runner.protocol.errors import AdapterMismatch, BrokenCheckpoint, CheckpointError, UnsupportedCheckpoint
from runner.worker.model.empty import empty_model
from runner.worker.model.forms import decide_form, grows
from runner.worker.model.vocabulary import given_shapes, zero_padded
from runner.worker.tensors.reader import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model whose weights are still on disk.

    Attributes:
        checkpoint: the base as the merged model's class sees it.
        model: of the class that config.json names, or of the adapter's task, in evaluation mode.
        names: where each stored tensor went.
        conversion: how the parameters that are no stored tensor are computed from some.
        ties: state-dict key → key of the parameter that it shares.
        own: state-dict keys whose values only the adapter has; placeholders until it is attached.
        padded: parameters and buffers of a grown vocabulary whose added rows are zeros, by key, in memory.
        config_edits: keys of config.json with their new values, where class, labels or vocabulary are not the base's.
        notes: what the user should know of it, one sentence each.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    names: StoredNames
    conversion: Conversion
    ties: Mapping[str, str]
    own: frozenset[str]
    padded: Mapping[str, torch.Tensor]
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
        AdapterMismatch: the task needs a head, and the adapter has none.
        UnsupportedAdapter: transformers has no class for the adapter's task.
    """
    _check_gathered(checkpoint)
    with bounded_build(checkpoint.root, models=16):
        form = decide_form(checkpoint, adapter)
    model, checkpoint, adapter, names = form.model, form.checkpoint, form.adapter, form.names
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    conversion = Conversion(names, shapes, lambda: empty_model(type(model), model.config))
    own = _fill(model, checkpoint, names, given_shapes(adapter), in_memory=in_memory, is_resized=form.is_resized)
    _fill_computed(model, checkpoint, conversion, in_memory=in_memory)
    padded = _pad(model, checkpoint, names, own, adapter)
    _hold_places(model, own)
    ties = _tie(model, names)
    own |= _hold_places(model, given_shapes(adapter))
    _check_whole(model, is_own="architectures" not in form.config_edits)
    return Base(
        checkpoint=checkpoint,
        model=model,
        names=names,
        conversion=conversion,
        ties=ties,
        own=frozenset(own),
        padded=padded,
        config_edits=form.config_edits,
        notes=form.notes,
    )


def _check_gathered(checkpoint: Checkpoint) -> None:
    empty = [name for name, info in checkpoint.tensors.items() if info.shape == (0,)]
    if empty:
        raise BrokenCheckpoint(
            f"{len(empty)} of the base's {len(checkpoint.tensors)} tensors are empty, of shape [0]; the first is "
            f"{empty[0]!r}.",
            why="They were saved under DeepSpeed ZeRO-3 without gathering: their values are not in these files.",
            fix="Set `base-model` to the model that the training started from, or save the base again, gathered.",
        )


def _fill(
    model: PreTrainedModel, checkpoint: Checkpoint, names: StoredNames, given: Mapping[str, tuple[int, ...]], *,
    in_memory: bool, is_resized: bool = False,
) -> set[str]:  # fmt: skip
    """Put views of the stored tensors in place; return the keys that the adapter gives in another shape.

    Keys of a vocabulary that grows are left out: `_pad` sees to them.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    by_file: dict[str, list[tuple[str, str]]] = {}
    own: set[str] = set()
    for key, stored in names.renamed.items():
        info = checkpoint.tensors[stored]
        if info.shape != shapes[key] and given.get(key) == shapes[key]:
            own.add(key)
            continue
        if grows(info.shape, shapes[key]) and is_resized:
            continue
        if info.shape != shapes[key]:
            raise _misshapen(checkpoint, stored, shapes[key])
        by_file.setdefault(info.file, []).append((key, stored))
    for file, entries in by_file.items():
        with safe_open(str(checkpoint.root / file), framework="pt", device="cpu") as handle:
            for key, stored in entries:
                # A view of the mapping, which lives as long as the tensor; shorter where the vocabulary was cut.
                mapped = handle.get_tensor(stored)
                mapped = mapped[tuple(slice(size) for size in shapes[key])]
                _assign(model, key, mapped.float() if in_memory and mapped.is_floating_point() else mapped)
    return own


def _misshapen(checkpoint: Checkpoint, stored: str, wanted: tuple[int, ...]) -> CheckpointError:
    shape = list(checkpoint.tensors[stored].shape)
    if any(file.metadata.get("format") == "mlx" for file in checkpoint.files):
        return UnsupportedCheckpoint(
            f"The base was written by mlx: {stored!r} is stored as {shape}, where transformers has {list(wanted)}.",
            why="mlx stores some tensors with their dimensions in another order.",
            fix="Set `base-model` to the transformers checkpoint that it was made from; its model card names it.",
        )
    return BrokenCheckpoint(
        f"{stored!r} is stored as {shape}, but config.json asks for {list(wanted)}.",
        why="config.json and weights are of different models.",
        fix="Download the base again, all files at one revision.",
    )


def _pad(
    model: PreTrainedModel, checkpoint: Checkpoint, names: StoredNames, own: set[str], adapter: Adapter
) -> dict[str, torch.Tensor]:
    """Give the tensors of a grown vocabulary that the adapter does not bring their new shape, and return them."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    padded = {}
    for key, stored in names.renamed.items():
        info = checkpoint.tensors[stored]
        if key not in own and info.shape != shapes[key]:
            with safe_open(str(checkpoint.root / info.file), framework="pt", device="cpu") as handle:
                padded[key] = zero_padded(model, key, handle.get_tensor(stored), adapter)
    for key, tensor in padded.items():
        _assign(model, key, tensor)
    return padded


def _fill_computed(model: nn.Module, checkpoint: Checkpoint, conversion: Conversion, *, in_memory: bool) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if not in_memory:
        for key in conversion.groups:
            if key in shapes:
                _assign(model, key, torch.zeros((), dtype=torch.bfloat16).expand(shapes[key]))
        return
    with Reader(checkpoint) as reader:
        for group in dict.fromkeys(conversion.groups.values()):
            if reason := conversion.problem(group):
                raise irreversible(group, reason)
            given = {name: reader.read(checkpoint.tensors[name]).float() for name in group.sources}
            for key, value in conversion.join(group, given).items():
                _assign(model, key, value)


def irreversible(group: Group, reason: str) -> UnsupportedCheckpoint:
    """Return the error for a group of stored tensors that transformers cannot convert there and back."""
    return UnsupportedCheckpoint(
        f"{group.key!r} is computed from {len(group.sources)} stored tensors (the first is {group.sources[0]!r}), "
        f"and transformers' conversion cannot be undone: {reason}.",
        why="The merged values must go back into the names and shapes of the base.",
        fix="Release the adapter unmerged.",
    )


def _hold_places(model: PreTrainedModel, given: Collection[str]) -> set[str]:
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
    """Tie the parameters as transformers v5 does on loading; return key → key of the stored tensor that it is.

    A target that is stored, too, and differs from its source is not tied. Where the source is not stored, any other
    key that is tied to it takes its place: T5 and BART are stored under any one of the names of their embeddings.
    """
    homes = {key: key for key in names.renamed}
    pairs = list(model.all_tied_weights_keys.items())
    ties: dict[str, str] = {}
    for number, (target, source) in enumerate(pairs):
        if source not in homes and target in homes:
            target, source = source, target  # noqa: PLW2901  (whichever is there)
        elif source not in homes:
            others = (key for key, origin in pairs[number + 1 :] if origin == source)
            source = next((key for key in others if key in homes), source)  # noqa: PLW2901
        home = homes.get(source)
        if home is None or homes.get(target) == home:
            continue
        if target in homes and not torch.equal(model.get_parameter(target), model.get_parameter(home)):
            continue
        path, _, name = target.rpartition(".")
        model.get_submodule(path)._parameters[name] = model.get_parameter(home)
        ties[target] = homes[target] = home
    return ties


def _check_whole(model: PreTrainedModel, *, is_own: bool) -> None:
    """Refuse a base that lacks a parameter, unless its class says that none need be stored (Marian's sinusoids)."""
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = []
    for key, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta and any(pattern.search(key) for pattern in optional):
            _assign(model, key, torch.zeros((), dtype=torch.float32).expand(tensor.shape))
        elif tensor.is_meta:
            missing.append(key)
    body = f"{model.base_model_prefix}."
    if missing and not is_own and not missing[0].startswith(body):
        raise AdapterMismatch(
            f"{missing[0]!r} is in neither the adapter nor the base.",
            why=f"The adapter's task makes the model a {type(model).__name__}; transformers would fill its head with "
            "random numbers.",
            fix="Save the adapter with its head (`modules_to_save`), or correct `task_type` in its config.",
        )
    if missing:
        raise BrokenCheckpoint(
            f"The base lacks {missing[0]!r}" + (f" and {len(missing) - 1} more tensors." if len(missing) > 1 else "."),
            why=f"{type(model).__name__} needs it, and transformers would fill it with random numbers.",
            fix="Use a complete checkpoint of this architecture as `base-model`.",
        )
