"""The form of the merged model: its class, its labels and its vocabulary, which are the base's or the adapter's.

Decided from configs, headers and tensor names; no weight is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from runner.adapter.folder import Adapter
from runner.checkpoint.formats import check_plain
from runner.checkpoint.layout import Checkpoint
from runner.checkpoint.names import StoredNames, map_names
from runner.checkpoint.view import view
from runner.companions.files import read_config
from runner.errors import BrokenCheckpoint, UnsupportedCheckpoint
from runner.model.heads import choose_class, find_labels
from runner.model.vocabulary import resized_config

# What transformers and torch say of a config that makes no sense.
_BUILD_ERRORS = (ValueError, OSError, TypeError, AttributeError, KeyError, ArithmeticError, RuntimeError, MemoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What the adapter makes of the base, besides its weights.

    Attributes:
        checkpoint: the base as the merged model's class sees it.
        model: of that class, on the meta device, in evaluation mode.
        names: where each stored tensor goes in it.
        config_edits: keys of config.json with their new values.
        notes: what the user should know, one sentence each.
        is_resized: whether the vocabulary is not the base's.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    names: StoredNames
    config_edits: Mapping[str, Any]
    notes: tuple[str, ...]
    is_resized: bool


def decide_form(checkpoint: Checkpoint, adapter: Adapter) -> Form:
    """Return the form of the merge of `adapter` into `checkpoint`.

    Raises:
        BrokenCheckpoint: config.json is incomplete or of another model.
        UnsupportedCheckpoint: quantised, or of a class that transformers does not have.
        UnsupportedAdapter: transformers has no class for the adapter's task.
        AdapterMismatch: the adapter's own embeddings contradict each other.
    """
    own_class, config = _own_class(checkpoint)
    model_class = choose_class(own_class, config, adapter)
    model = empty_model(model_class, config)
    labels = find_labels(model, adapter)
    edits = dict(labels.edits) if labels else {}
    if labels is not None and labels.count != config.num_labels:
        config.num_labels = labels.count
        model = empty_model(model_class, config)
    notes: list[str] = []
    if model_class is not own_class:
        edits["architectures"] = [model_class.__name__]
        left_out = _heads_of(own_class, config, map_names(model, checkpoint.tensors).unknown, checkpoint)
        checkpoint = view(checkpoint, dropped=left_out)
        notes.append(_departure(own_class, model_class, left_out))
    names = map_names(model, checkpoint.tensors)
    resized = resized_config(model, adapter)
    if resized is not None:
        rows = resized.get_text_config().vocab_size
        notes.append(f"The vocabulary has {rows} rows as in the adapter, not {config.get_text_config().vocab_size}.")
        edits["vocab_size"] = rows
        model = empty_model(model_class, resized)
        checkpoint = view(checkpoint, cut=_cut(model, checkpoint, names))
    return Form(
        checkpoint=checkpoint,
        model=model,
        names=names,
        config_edits=edits,
        notes=tuple(notes),
        is_resized=resized is not None,
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, for use in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def grows(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether a stored shape becomes the wanted one by growing in one dimension."""
    pairs = list(zip(stored, wanted, strict=False))
    return len(stored) == len(wanted) and sum(a < b for a, b in pairs) == 1 and all(a <= b for a, b in pairs)


def _own_class(checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    raw = read_config(checkpoint.root)
    architecture = next(iter(raw.get("architectures") or ()), None)
    model_class = getattr(transformers, str(architecture), None)
    check_plain(raw, checkpoint.tensors)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise UnsupportedCheckpoint(
            f"The base's architecture is {architecture!r}, which this transformers has no class for.",
            why="Code that comes with a model is never run.",
            fix="Use a base whose architecture is part of transformers, or a newer release of this action.",
        )
    try:
        return model_class, AutoConfig.from_pretrained(str(checkpoint.root), trust_remote_code=False)
    except _BUILD_ERRORS as error:
        raise _unbuildable(model_class, error) from error


def empty_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device, in evaluation mode.

    Raises:
        BrokenCheckpoint: the class cannot be built from `config`.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: PreTrainedModel = model_class._from_config(config)
    except _BUILD_ERRORS as error:
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
    mine = map_names(empty_model(own_class, config), checkpoint.tensors)
    known = {*mine.renamed.values(), *(name for names in mine.converted.values() for name in names)}
    return tuple(name for name in unknown if name in known)


def _departure(own: type[PreTrainedModel], new: type[PreTrainedModel], left_out: tuple[str, ...]) -> str:
    text = f"The adapter was trained on a {new.__name__}: that is what the release is, not a {own.__name__}"
    if not left_out:
        return text + "."
    more = f" and {len(left_out) - 1} more tensors" if left_out[1:] else ""
    return f"{text}; the base's {left_out[0]}{more} of its own head are left out."


def _cut(model: PreTrainedModel, checkpoint: Checkpoint, names: StoredNames) -> dict[str, tuple[int, ...]]:
    """Return the new shapes of the stored tensors that lose their last rows."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    cut = {}
    for key, stored in names.renamed.items():
        before, after = checkpoint.tensors[stored].shape, shapes[key]
        # Only then are the rows that stay the first bytes: (V, …), or the bias (1, V) of an encoder-decoder.
        is_prefix = before[1:] == after[1:] or (len(before) == 2 and before[0] == after[0] == 1)
        if before != after and is_prefix and grows(after, before):
            cut[stored] = after
    return cut
