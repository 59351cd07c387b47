"""What the judge asks of transformers and PEFT wherever it uses them: class of a folder, PEFT's own merge, silence."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from runner.architecture.building import BUILD_ERRORS, bounded_build
from runner.protocol.errors import BrokenCheckpoint
from runner.protocol.syntax import parse_json

# What transformers, safetensors and torch raise for a folder that they cannot load.
LOAD_ERRORS = (*BUILD_ERRORS, EOFError, SafetensorError)


# transformers puts an adapter that lies in a model's folder on the model without being asked; it looks for it here.
NO_ADAPTER = {"subfolder": "no-adapter-is-wanted"}


def load_model(root: Path) -> PreTrainedModel:
    """Return the folder's model in memory, in float32, as plain transformers loads it; raises what that raises."""
    with bounded_build(root), quiet():
        model: PreTrainedModel = model_class(root).from_pretrained(
            str(root),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            adapter_kwargs=NO_ADAPTER,
        )
    return model.eval().requires_grad_(False)


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


def own_modules(unit: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base's module inside a unit and all below it, by their path in it; wrappers inside are seen through."""
    module = bare(unit)
    yield "", module
    for name, child in module.named_children():
        for path, inner in own_modules(child):
            yield f"{name}.{path}".rstrip("."), inner


def own_state(unit: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and stored buffers of the base's module inside a unit, by their names in it."""
    state: dict[str, torch.Tensor] = {}
    for path, module in own_modules(unit):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                state[f"{path}.{name}".lstrip(".")] = tensor.detach()
    return state


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
