"""Models as transformers and PEFT build them from folders, always in float32, never with code from a folder.

Everything here is an ordinary call of those libraries: the judge's reference is what a user of them gets.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from runner.errors import AdapterMismatch, BrokenCheckpoint
from runner.syntax import parse_json

# What transformers, safetensors and torch raise for a folder that they cannot load.
LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    SafetensorError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model from a folder, float32, in evaluation mode.

    Attributes:
        model: the model.
        missing: keys that the loader had to invent values for.
        unexpected: stored tensors that the loader had no place for.
        mismatched: keys whose stored shape does not fit.
    """

    model: PreTrainedModel
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmerged:
    """The base with the adapter on it: the reference.

    Attributes:
        base: what loading the base reported.
        model: PEFT's model, float32 base, the adapter in float32 (which holds every stored adapter dtype exactly).
        units: outermost modules that PEFT put in place of the base's, by their path in the base model.
        unplaced: adapter tensors that PEFT has no place for.
        altered: adapter tensors whose values in the model are not those in the file.
    """

    base: Loaded
    model: PeftModel
    units: Mapping[str, nn.Module]
    unplaced: tuple[str, ...]
    altered: tuple[str, ...]


def load_base(root: Path, rows: int | None, *, wanted: Any = None, labels: int | None = None) -> Loaded:
    """Return the base in float32; what it does not store is zero, and named in `missing` or `mismatched`.

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
        values = loaded.model.state_dict()
        for key in (*loaded.missing, *loaded.mismatched):  # otherwise random, and no two verdicts would be the same
            values[key].zero_()
        if rows is not None:
            loaded.model.resize_token_embeddings(rows, mean_resizing=False)
    except LOAD_ERRORS as error:
        raise unbuildable(error) from error
    return loaded


def load_folder(root: Path, wanted: Any = None, **options: Any) -> Loaded:
    """Return the folder as plain transformers loads it, in float32. Raises whatever it raises (`LOAD_ERRORS`).

    Args:
        root: a checkpoint.
        wanted: the class to load it as; by default the one that its config.json names.
        options: for `from_pretrained`.
    """
    with quiet():
        model, info = (wanted or model_class(root)).from_pretrained(
            str(root),
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    return Loaded(
        model=model.eval().requires_grad_(False),
        missing=tuple(sorted(map(str, info["missing_keys"]))),
        unexpected=tuple(sorted(map(str, info["unexpected_keys"]))),
        mismatched=tuple(sorted(str(entry[0]) for entry in info["mismatched_keys"])),
    )


def load_unmerged(base: Loaded, adapter: Path, redundant: Sequence[str]) -> Unmerged:
    """Return the adapter on the base (which becomes part of it), as PEFT loads it.

    Args:
        base: on the CPU.
        adapter: the adapter's folder.
        redundant: adapter tensors that only repeat others, which PEFT may leave aside.

    Raises:
        AdapterMismatch: PEFT cannot put it on this base.
    """
    try:
        with quiet():
            model = PeftModel.from_pretrained(base.model, str(adapter), low_cpu_mem_usage=False, torch_device="cpu")
            weights = load_peft_weights(str(adapter), device="cpu")
            # PEFT does not hand out what it could not place, so it is asked once more; this changes no value.
            result = set_peft_model_state_dict(model, weights)
            placed = get_peft_model_state_dict(model, save_embedding_layers=False)
    except LOAD_ERRORS as error:
        raise AdapterMismatch(
            f"PEFT cannot put the adapter on the base: {first_line(error)}",
            why="Its tensors have other names or shapes than this base's, or its config is not that of its tensors.",
            fix="Set `base-model` to the model that the adapter was trained on.",
        ) from error
    model.eval().requires_grad_(False)
    unexpected = {key.replace(".default.", ".").removesuffix(".default") for key in result.unexpected_keys}
    altered = [
        name
        for name, tensor in weights.items()
        if name in placed and not _holds(name, placed[name].to(torch.float64), tensor.to(torch.float64))
    ]
    return Unmerged(
        base=base,
        model=model,
        units=_units(model),
        unplaced=tuple(sorted(unexpected - set(redundant))),
        altered=tuple(sorted(altered)),
    )


def _holds(name: str, placed: torch.Tensor, stored: torch.Tensor) -> bool:
    if name.endswith("_topk_weights"):  # VB-LoRA holds their logarithms, and gives them back in float32
        return torch.allclose(placed, stored, rtol=2.0**-20, atol=0.0)
    return torch.equal(placed, stored)


def base_values(unmerged: Unmerged) -> dict[str, torch.Tensor]:
    """Return the base's own parameters inside the unmerged model, by key of the base's state dict."""
    inner = unmerged.model.get_base_model()
    values: dict[str, torch.Tensor] = {}
    for path, unit in unmerged.units.items():
        values |= {f"{path}.{name}": tensor for name, tensor in bare(unit).state_dict().items()}
    under = tuple(f"{path}." for path in unmerged.units)
    values |= {key: tensor for key, tensor in inner.state_dict().items() if not key.startswith(under)}
    return values


def bare(unit: nn.Module) -> nn.Module:
    """Return the base's module inside a unit."""
    module = unit
    while True:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def merged_copy(unit: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return what PEFT's own merge makes of a copy of the unit, computed in `dtype`; the unit stays as it is.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: PEFT has no merge for it, or not in `dtype`.
    """
    twin = copy.deepcopy(unit).to(dtype)
    if hasattr(twin, "unload_and_optionally_merge_module"):
        unload: Any = twin.unload_and_optionally_merge_module
        merged: nn.Module = unload(merge=True, safe_merge=False, adapter_names=None)
        return merged
    if not isinstance(twin, BaseTunerLayer):
        raise NotImplementedError(type(unit).__name__)
    twin.merge(safe_merge=False)
    base: nn.Module = twin.get_base_layer()
    return base


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module stores its weight as (in, out), as GPT-2's Conv1D does."""
    return isinstance(module, transformers.pytorch_utils.Conv1D)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 300 characters, or its class where it has none."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' warnings and progress bars out of the log; what matters in them is checked, not read."""
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _units(model: PeftModel) -> dict[str, nn.Module]:
    units: dict[str, nn.Module] = {}
    for path, module in model.get_base_model().named_modules():
        if any(path.startswith(f"{outer}.") for outer in units):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            units[path] = module
    return units


def model_class(root: Path) -> Any:
    """Return the class that config.json names, where transformers has it; else the one for causal models."""
    config = parse_json((root / "config.json").read_bytes())
    name = next(iter(config.get("architectures") or ()), "")
    found = getattr(transformers, str(name), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model else AutoModelForCausalLM


def unbuildable(error: BaseException) -> BrokenCheckpoint:
    """Return the error for a base that transformers refused with `error`."""
    return BrokenCheckpoint(
        f"transformers cannot load the base: {first_line(error)}",
        why="Its config.json and weights do not make a model that this version of transformers knows.",
        fix="Check `base-model` (and `base-revision`): it must be a whole transformers checkpoint.",
    )
