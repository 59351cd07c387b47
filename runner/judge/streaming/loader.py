"""A folder as plain transformers loads it, in float32, whose weights come into memory only where they are asked for.

The model is made by `from_pretrained` itself, on the meta device: renamings, conversions, ties, missing and unexpected
keys are what a user of transformers gets. What `Loaded.read` returns was put into that model by the function with which
`from_pretrained` loads a whole checkpoint, given only the stored tensors that are needed. So a model larger than memory
is judged by the very loader that will load it.

That function and the two that fill buffers are semi-private, hence the exact pin and a test against a whole
`from_pretrained` for every architecture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from runner.architecture.building import bounded_build
from runner.architecture.conversion import Conversion
from runner.architecture.names import map_names
from runner.files.layout import Checkpoint, read_checkpoint
from runner.judge.streaming.models import NO_ADAPTER, model_class, quiet
from runner.judge.streaming.slots import place_of, value_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model of a folder, in evaluation mode: parameters without values, and the buffers that no file holds.

    Attributes:
        model: all parameters on the meta device, as float32.
        checkpoint: the folder's headers.
        missing: keys that the loader would have to invent values for; `read` gives zeros.
        unexpected: stored tensors that the loader has no place for.
        mismatched: keys whose stored shape does not fit; `read` gives zeros.
        renamed: key → the one stored tensor that it is.
        computed: key → the stored tensors that transformers computes it from.
        tied: key → the other key whose parameter it is, where nothing is stored for itself.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    renamed: Mapping[str, str]
    computed: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, str]

    def read(self, keys: Iterable[str], device: str = "cpu") -> dict[str, torch.Tensor]:
        """Return values of parameters and stored buffers by key, floats in float32; tied keys share one tensor.

        They may be views of the file: nobody may write into them.

        Raises:
            OSError, SafetensorError, RuntimeError, ValueError: a file is broken, or cannot be converted.
        """
        wanted = {key: self.tied.get(key, key) for key in keys}
        if not wanted:  # what follows walks the whole model
            return {}
        lost = {*self.missing, *self.mismatched}
        stored = {key: self._stored(key) for key in dict.fromkeys(wanted.values()) if key not in lost}
        made = self._load({name for names in stored.values() for name in names}, device)
        for key in dict.fromkeys(wanted.values()):
            if key not in made:
                empty = value_at(place_of(self.model, key))
                made[key] = torch.zeros(empty.shape, dtype=empty.dtype, device=device)
        return {key: made[origin] for key, origin in wanted.items()}

    def _stored(self, key: str) -> tuple[str, ...]:
        return (self.renamed[key],) if key in self.renamed else self.computed.get(key, ())

    def _load(self, names: set[str], device: str) -> dict[str, torch.Tensor]:
        """Have transformers put the stored tensors into the model; take them out again, and return them by key."""
        by_file = defaultdict(list)
        for name in names:
            by_file[self.checkpoint.tensors[name].file].append(name)
        touched = [key for key in (*self.renamed, *self.computed) if not names.isdisjoint(self._stored(key))]
        before = {key: place_of(self.model, key) for key in touched}
        empty = {key: value_at(place) for key, place in before.items()}
        with ExitStack() as stack, quiet():
            slices: dict[str, Any] = {}
            for file, inside in by_file.items():
                handle = stack.enter_context(safe_open(str(self.checkpoint.root / file), framework="pt", device="cpu"))
                slices |= {name: handle.get_slice(name) for name in inside}
            if not slices:
                return {}
            load_checkpoint_tensors(self.model, slices, device)
        made: dict[str, torch.Tensor] = {}
        for key, (module, name) in before.items():
            if (value := getattr(module, name)) is not empty[key]:
                made[key] = value.detach()
                setattr(module, name, empty[key])
        return made


def load_checkpoint_tensors(model: PreTrainedModel, stored: Mapping[str, Any], device: str) -> None:
    """Put stored tensors (or slices of a safetensors file) into the model, by the loader of `from_pretrained`."""
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=torch.float32,
        dtype_plan=model._get_dtype_plan(torch.float32),
        weight_mapping=get_model_conversion_mapping(model),
        ignore_mismatched_sizes=True,
    )
    info, _ = convert_and_load_state_dict_in_model(model=model, state_dict=dict(stored), load_config=config)
    if info.conversion_errors:
        raise RuntimeError(next(iter(info.conversion_errors.values())).strip().splitlines()[-1])


def load_folder(root: Path, wanted: Any = None, **options: Any) -> Loaded:
    """Return the folder as plain transformers loads it, in float32. Raises whatever it raises (`LOAD_ERRORS`).

    Args:
        root: a checkpoint.
        wanted: the class to load it as; by default the one that its config.json names.
        options: for `from_pretrained`.
    """
    with bounded_build(root, models=2), quiet():
        model, info = (wanted or model_class(root)).from_pretrained(
            str(root),
            dtype=torch.float32,
            device_map={"": "meta"},
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            adapter_kwargs=NO_ADAPTER,
            **options,
        )
        model = model.eval().requires_grad_(False)
        _fill_buffers(model)
    checkpoint = read_checkpoint(root)
    names = map_names(model, checkpoint.tensors)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    conversion = Conversion(names, shapes, lambda: model)
    computed = {key: group.sources for key, group in conversion.groups.items()}
    return Loaded(
        model=model,
        checkpoint=checkpoint,
        missing=tuple(sorted(map(str, info["missing_keys"]))),
        unexpected=tuple(sorted(map(str, info["unexpected_keys"]))),
        mismatched=tuple(sorted(str(entry[0]) for entry in info["mismatched_keys"])),
        renamed=dict(names.renamed),
        computed=computed,
        tied=_tied(model, {*names.renamed, *computed}),
    )


def _fill_buffers(model: PreTrainedModel) -> None:
    """Give the buffers that no file holds (rotary frequencies, masks) their values, as `from_pretrained` does.

    The module that has a buffer fills it, or one that it is in (Falcon-H1's multipliers).
    """
    for key, _ in model.named_non_persistent_buffers():
        parts = key.split(".")[:-1]
        for count in range(len(parts) + 1):
            module = model.get_submodule(".".join(parts[:count]))
            module.__dict__.pop("_is_hf_initialized", None)  # set on the meta device, where nothing is filled
    model._move_missing_keys_from_meta_to_device(set(), {"": "cpu"}, None, None)
    model._initialize_missing_keys(False)


def _tied(model: PreTrainedModel, filled: set[str]) -> dict[str, str]:
    """Return key → filled key of the same parameter, for keys that nothing is stored for."""
    same: dict[int, list[str]] = defaultdict(list)
    for key, parameter in model.named_parameters(remove_duplicate=False):
        same[id(parameter)].append(key)
    tied: dict[str, str] = {}
    for keys in same.values():
        origin = next((key for key in keys if key in filled), keys[0])
        tied |= {key: origin for key in keys if key not in filled and key != origin}
    return tied
