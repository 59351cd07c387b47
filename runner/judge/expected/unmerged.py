"""The reference: the base with the adapter on it, as PEFT loads it, without the base in memory.

PEFT attaches the adapter to a model whose parameters are views of the mapped files, in their stored dtypes; what
transformers computes from several stored tensors (fused experts) is a placeholder that takes no memory. Whoever
computes with a part of the base has it brought in, in float32 (`Unmerged.values`, `Unmerged.in_memory`). The adapter is
in float32, which holds every stored dtype exactly, and every value of it is compared with the file afterwards.

Methods that derive something that stays from the base's values or dtype when they are attached (`holds_base`) get the
whole base in float32, in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from runner.judge.expected.recipe import read_adapter_config
from runner.judge.streaming.loader import Loaded, load_folder
from runner.judge.streaming.models import LOAD_ERRORS, first_line, quiet, unbuildable
from runner.judge.streaming.slots import Place, place_of, places_of, put, value_at
from runner.protocol.errors import AdapterMismatch

# Methods, LoRA initialisations and LoRA variants that make something of the base's values, or round to its dtype.
_BASE_METHODS = frozenset("OSF DELORA TINYLORA UNILORA PSOFT SUPERTUNING FROD".split())
_ROUNDED = frozenset({"VERA", "PVERA"})  # their random projections, unless the adapter brings them
_PLAIN_INITS = frozenset("true false none gaussian orthogonal eva mica".split())
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmerged:
    """The base with the adapter on it.

    Attributes:
        base: what loading the base reported; reads the base's own values.
        model: PEFT's model, on the CPU.
        units: outermost modules that PEFT put in place of the base's, by their path in the base model.
        unplaced: adapter tensors that PEFT has no place for.
        altered: adapter tensors whose values in the model are not those in the file.
        places: where each of the base's own parameters and stored buffers is in the model, by key of the base.
        tensors: what is there: views of the base's files, placeholders, or what the adapter made of them.
        on_disk: keys whose values are the base's, unchanged: views of its files, or placeholders.
        padded: values of keys whose vocabulary is the adapter's, before PEFT came.
    """

    base: Loaded
    model: PeftModel
    units: Mapping[str, nn.Module]
    unplaced: tuple[str, ...]
    altered: tuple[str, ...]
    places: Mapping[str, Place]
    tensors: Mapping[str, torch.Tensor]
    on_disk: frozenset[str]
    padded: Mapping[str, torch.Tensor]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of one of the base's own parameters in the unmerged model."""
        return tuple(self.tensors[key].shape)

    def value(self, key: str) -> torch.Tensor:
        """Return one of the base's own parameters as the unmerged model has it, in float32 or as stored."""
        if key in self.on_disk and key in self.base.computed:
            return self.base.read([key])[key]
        return self.tensors[key].detach()

    def values(self, keys: Iterable[str], device: str) -> dict[str, torch.Tensor]:
        """Return the base's own parameters as the unmerged model computes with them: floats in float32."""
        wanted = list(keys)
        values = self.base.read([key for key in wanted if key in self.on_disk], device)
        for key in wanted:
            if key not in values:
                held = self.tensors[key].detach()
                values[key] = held.to(device, torch.float32 if held.is_floating_point() else held.dtype)
        return values

    def base_values(self, keys: Iterable[str], device: str) -> dict[str, torch.Tensor]:
        """Return what plain transformers makes of the base, in the shapes that the adapter asks for; in float32."""
        wanted = list(keys)
        values = self.base.read([key for key in wanted if key not in self.padded], device)
        return values | {key: self.padded[key].to(device) for key in wanted if key in self.padded}

    @contextmanager
    def in_memory(self, path: str, *, single: bool = False) -> Iterator[None]:
        """Have the base's own values below `path` in the model for as long as this lasts, placeholders or not.

        Args:
            path: of a unit.
            single: floats in float32, and not as stored: PEFT rounds factors to the dtype of the parameter they change.
        """
        keys = [key for key in self.places if key.startswith(f"{path}.")]
        values = {key: self.tensors[key].detach() for key in keys}
        values |= self.base.read([key for key in keys if key in self.base.computed and key in self.on_disk])
        if single:
            values = {key: value.float() if value.is_floating_point() else value for key, value in values.items()}
        with put(self.places, values):
            yield


def holds_base(config: Mapping[str, Any]) -> bool:
    """Return whether an adapter with this adapter_config.json is only attached right to a base in float32."""
    method = config.get("peft_type")
    if method == "LORA":
        init = str(config.get("init_lora_weights", True)).lower()
        return init not in _PLAIN_INITS or bool(config.get("kasa_config"))
    return method in _BASE_METHODS or (method in _ROUNDED and not config.get("save_projection", True))


def load_base(root: Path, rows: int | None, *, wanted: Any = None, labels: int | None = None) -> Loaded:
    """Return the base; what it does not store is zero, and named in `missing` or `mismatched`.

    Args:
        root: the base's folder.
        wanted: the class to load it as; its own by default.
        labels: of that class's head, where they are not the base's.
        rows: the adapter's vocabulary size where it differs from the base's; else None.

    Raises:
        BrokenCheckpoint: transformers cannot load it.
    """
    try:
        options = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
        loaded = load_folder(root, wanted, **options)
        if rows is not None:
            loaded.model.resize_token_embeddings(rows, mean_resizing=False)
    except LOAD_ERRORS as error:
        raise unbuildable(error) from error
    return loaded


def load_unmerged(base: Loaded, adapter: Path, redundant: Sequence[str]) -> Unmerged:
    """Return the adapter on the base, as PEFT loads it.

    Args:
        base: stays as it is.
        adapter: the adapter's folder.
        redundant: adapter tensors that only repeat others, which PEFT may leave aside.

    Raises:
        AdapterMismatch: PEFT cannot put it on this base.
        BrokenCheckpoint: the base's tensors cannot be read.
    """
    whole = holds_base(read_adapter_config(adapter))
    try:
        inner, padded = _mapped(base, whole=whole)
    except LOAD_ERRORS as error:
        raise unbuildable(error) from error
    places = places_of(inner)
    before = {key: _state(value_at(place)) for key, place in places.items()}
    own = {id(value_at(place)) for place in places.values()}
    try:
        with quiet():
            model = PeftModel.from_pretrained(inner, str(adapter), low_cpu_mem_usage=False, torch_device="cpu")
            changed = {key for key, place in places.items() if _state(value_at(place)) != before[key]}
            _widen(model, own - {id(value_at(places[key])) for key in changed})
            weights = load_peft_weights(str(adapter), device="cpu")
            # PEFT does not hand out what it could not place, so it is asked once more; now in float32.
            result = set_peft_model_state_dict(model, weights)
            placed = get_peft_model_state_dict(model, save_embedding_layers=False)
    except LOAD_ERRORS as error:
        raise AdapterMismatch(
            f"PEFT cannot put the adapter on the base: {first_line(error)}",
            why="Its tensors have other names or shapes than this base's, or its config is not that of its tensors.",
            fix="Set `base-model` to the model that the adapter was trained on; if it is that already, set "
            "`base-revision` to the commit of the training, or save the adapter again.",
        ) from error
    model.eval().requires_grad_(False)
    unexpected = {key.replace(".default.", ".").removesuffix(".default") for key in result.unexpected_keys}
    altered = [name for name, tensor in weights.items() if name in placed and not _holds(name, placed[name], tensor)]
    units = peft_units(model)
    places = places_of(model.get_base_model(), units)
    unchanged = {key for key, place in places.items() if _state(value_at(place)) == before.get(key)}
    return Unmerged(
        base=base,
        model=model,
        units=units,
        unplaced=tuple(sorted(unexpected - set(redundant))),
        altered=tuple(sorted(altered)),
        places=places,
        tensors={key: value_at(place) for key, place in places.items()},
        on_disk=frozenset() if whole else frozenset(unchanged - padded.keys()),
        padded=padded,
    )


def _mapped(base: Loaded, *, whole: bool) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Return a copy of the base's model with values, and those of its parameters that have another vocabulary."""
    model = copy.deepcopy(base.model)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    lost = {*base.missing, *base.mismatched}
    filled = {*base.renamed, *base.computed}
    padded: dict[str, torch.Tensor] = {}
    values = base.read([key for key in shapes if key not in base.tied]) if whole else {}
    for key, stored in base.renamed.items():
        info = base.checkpoint.tensors[stored]
        if key in lost:
            continue
        with safe_open(str(base.checkpoint.root / info.file), framework="pt", device="cpu") as handle:
            view = handle.get_tensor(stored)  # of the mapped file, which lives as long as the tensor
        if view.shape != shapes[key]:
            values[key] = padded[key] = _padded(view, shapes[key])
        elif not whole:
            values[key] = view
    for key, shape in shapes.items():
        if key not in values and key not in base.tied:
            empty = torch.zeros(())
            values[key] = empty.expand(shape) if key in base.computed and key not in lost else torch.zeros(shape)
    for key, value in values.items():
        module, name = place_of(model, key)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[name] = value
    with quiet():
        model.tie_weights(missing_keys=set(shapes) - filled, recompute_mapping=False)
    return model, padded | {key: padded[origin] for key, origin in base.tied.items() if origin in padded}


def _padded(stored: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    value = torch.zeros(shape)
    both = tuple(slice(min(pair)) for pair in zip(stored.shape, shape, strict=True))
    value[both] = stored[both].float()
    return value


def _state(tensor: torch.Tensor) -> tuple[int, int, torch.Size]:
    return tensor.data_ptr(), tensor._version, tensor.shape


def _widen(model: nn.Module, unchanged: set[int]) -> None:
    """Give float32 to all that is not the base's own, so that the adapter's tensors fit in as they are stored."""
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in unchanged and tensor.dtype in _HALVES:
            tensor.data = tensor.data.float()


def _holds(name: str, placed: torch.Tensor, stored: torch.Tensor) -> bool:
    dtype = torch.promote_types(placed.dtype, stored.dtype)
    placed, stored = placed.to(dtype), stored.to(dtype)
    if name.endswith("_topk_weights"):  # VB-LoRA holds their logarithms, and gives them back in float32
        return torch.allclose(placed, stored, rtol=2.0**-20, atol=0.0)
    return torch.equal(placed, stored)


def peft_units(model: PeftModel) -> dict[str, nn.Module]:
    """Return the outermost modules that PEFT put in place of the base's, by their path in the base model."""
    units: dict[str, nn.Module] = {}
    for path, module in model.get_base_model().named_modules():
        if any(path.startswith(f"{outer}.") for outer in units):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            units[path] = module
    return units
