"""What of an adapter's tensors PEFT put where: exactly as stored, or the run fails."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from runner.protocol.errors import AdapterMismatch
from runner.worker.model.heads import PREFIX

TOKENS = ".token_adapter.trainable_tokens_delta"

BELOW = ".base_layer.weight"


def untrained(own: frozenset[str], placed: Iterable[str], name: str) -> list[str]:
    """Return the keys of `own` that no placed tensor gives a value: a head, or a part of one, that nobody trained.

    Args:
        own: state-dict keys whose values only the adapter has.
        placed: keys of the PEFT model that were loaded.
        name: the adapter's name in the model.
    """
    given = {
        key.removeprefix(PREFIX)
        .replace(f".modules_to_save.{name}.", ".")
        .replace(".token_adapter.", ".")
        .replace(".base_layer.", ".")
        for key in placed
    }
    return sorted(own - given)


def repeats(peft_model: PeftModel, key: str, tensor: torch.Tensor, name: str) -> bool:
    """Return whether an adapter's tensor only repeats the base's; `name` is the adapter's name in the model."""
    target = lookup(peft_model, key)
    return (
        target is not None
        and name not in key.split(".")
        and target.shape == tensor.shape
        and torch.equal(target.to(torch.float32), tensor.to(torch.float32))
    )


def check_copies(peft_model: PeftModel, tensors: Mapping[str, torch.Tensor], own: Container[str]) -> None:
    """Hold every copy of a base's weight that PEFT saved below a LoRA layer against this base's.

    Args:
        peft_model: before the adapter's tensors are loaded.
        tensors: of the adapter, by key of the PEFT model.
        own: the base's keys whose values this base does not have.

    Raises:
        AdapterMismatch: this base has other values there.
    """
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX).removesuffix(BELOW).removesuffix(".token_adapter")
        if not key.endswith(BELOW) or f"{path}.weight" in own:
            continue
        target = lookup(peft_model, key)
        if target is not None and target.shape == tensor.shape and not _is_copy(target, tensor):
            raise AdapterMismatch(
                f"The adapter tensor {key!r} is a copy of its base's weight, and this base has other values there.",
                why="The adapter was trained on another base, or on this one after its embeddings were changed.",
                fix="Set `base-model` to the very model that the adapter was trained on; if it is that already, set "
                "`base-revision` to the commit of the training.",
            )


def _is_copy(base: torch.Tensor, copy: torch.Tensor) -> bool:
    """Return whether `copy` is `base` as a training in another dtype held it."""
    return any(
        torch.equal(base.to(dtype).to(copy.dtype), copy) for dtype in (copy.dtype, torch.bfloat16, torch.float16)
    )


def is_repeated(key: str, weights: Mapping[str, torch.Tensor]) -> bool:
    """Return whether an adapter tensor that PEFT has no place for only repeats another that it has.

    Beside a resized vocabulary PEFT saves every saved module twice, and the tokens that a tied head shares.
    """
    for part in (".modules_to_save.", ".original_module."):
        twin = key.replace(part, ".")
        if part in key and twin in weights:
            return part == ".original_module." or torch.equal(weights[key], weights[twin])
    if not key.endswith(TOKENS):
        return False
    return any(name != key and name.endswith(TOKENS) and torch.equal(weights[key], weights[name]) for name in weights)


def widen(peft_model: PeftModel, placed: Mapping[str, torch.Tensor]) -> None:
    """Give what PEFT copied in the base's dtype (modules_to_save) the adapter's own values, un-rounded."""
    for key, tensor in placed.items():
        target = lookup(peft_model, key)
        if target is None or not target.is_floating_point() or target.dtype in (tensor.dtype, torch.float32):
            continue
        # float32 holds every stored dtype exactly; float16 and bfloat16 do not hold each other.
        target.data = tensor.to(torch.float32, copy=True)


def mark(tensor: torch.Tensor) -> tuple[int, int | bytes]:
    """Return what is another once somebody has given the tensor other values: where it lies, and its version.

    Of integers it is their content: loading into a batch norm writes its counter, with the value that it has.
    """
    return tensor.data_ptr(), tensor._version if tensor.is_floating_point() else tensor.numpy().tobytes()


def replaced(
    parameters: Mapping[str, torch.Tensor],
    before: Mapping[str, tuple[int, int | bytes]],
    peft_model: PeftModel,
    placed: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the base's parameters that the adapter, or PEFT when attaching it, gave new values, by key.

    Args:
        parameters: of the base, by state-dict key.
        before: the `mark` of each, before PEFT came.
        peft_model: with the adapter.
        placed: what was loaded, by key of the PEFT model.
    """
    by_id = {id(lookup(peft_model, key)): tensor for key, tensor in placed.items()}
    found: dict[str, torch.Tensor] = {}
    for key, parameter in parameters.items():
        if id(parameter) in by_id:
            found[key] = by_id[id(parameter)]
        elif mark(parameter) != before[key]:
            found[key] = parameter.data
    return found


def base_tensor(unit: nn.Module, name: str) -> torch.Tensor:
    """Return the base's own parameter or buffer inside a unit as the unit holds it now.

    Args:
        unit: PEFT's outermost wrapper of a module.
        name: of the parameter in the base's module, for example "out_proj.weight".
    """
    *path, last = name.split(".")
    module = _bare(unit)
    for part in path:
        module = _bare(module.get_submodule(part))
    found = module._parameters.get(last)
    return found if found is not None else module.get_buffer(last)


def is_wrapper(module: nn.Module) -> bool:
    """Return whether PEFT put the module in the place of one of the base's."""
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _bare(module: nn.Module) -> nn.Module:
    while is_wrapper(module):
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            module = module.get_submodule("original_module")
    return module


def lookup(module: nn.Module, key: str) -> torch.Tensor | None:
    """Return the parameter or buffer of that key, or None."""
    path, _, name = key.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None
    found = owner._parameters.get(name)
    return found if found is not None else owner._buffers.get(name)
