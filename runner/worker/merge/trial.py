"""PEFT's merge of one unit, and a trial of it without values: what stops a merge stops its plan.

Whether PEFT can merge a layer depends on its class, its options and its shapes, and PEFT says so only when it is asked
to. So every kind of unit that PEFT merges is merged once on the meta device, where nothing is read or computed. What
fails there may only need values; it is merged again on a base of zeros, and that failure counts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.oft.layer import Conv2d as RotatedConv2d
from torch import nn

from runner.protocol.errors import UnsupportedAdapter
from runner.worker.merge.units import Unit, is_plain
from runner.worker.model.attach import Attached

_FAILURES = (NotImplementedError, ValueError, RuntimeError, TypeError)


def check_merges(attached: Attached, units: Mapping[str, Unit]) -> None:
    """Refuse what PEFT cannot merge, before a weight of the base is read.

    Raises:
        UnsupportedAdapter: with the first such layer's path.
    """
    tried: set[str] = set()
    for unit in units.values():
        _check_rotation(unit)
        if type(unit.module) is LoraLinear and is_plain(unit.module) and type(unit.module.base_layer) is nn.Linear:
            continue
        kind = repr(unit.module)  # its classes, sizes and options; not its values
        if kind not in tried and not _merges(unit.module, attached, torch.device("meta")):
            unload(unit.path, _twin(unit.module, attached, torch.device("cpu")))
        tried.add(kind)


def _check_rotation(unit: Unit) -> None:
    """Refuse OFT on convolutions wider than 1: PEFT trains a rotation of patches, and merges another one."""
    for name, module in unit.module.named_modules():
        if isinstance(module, RotatedConv2d) and max(module.get_base_layer().kernel_size) > 1:
            path = f"{unit.path}.{name}" if name else unit.path
            raise UnsupportedAdapter(
                f"PEFT's own merge of {path!r} is not the trained model: OFT on a convolution wider than 1.",
                why="What PEFT computes for such a layer and what it merges into it differ.",
                fix="Release the adapter unmerged, or train it without OFT on that layer.",
            )


def unload(path: str, module: Any) -> nn.Module:
    """Return the base's module with the adapter merged into it, as PEFT's `_unload_and_optionally_merge` does for one.

    Args:
        path: of the module, for the error.
        module: PEFT's wrapper; its base layer is changed in place.

    Raises:
        UnsupportedAdapter: PEFT has no merge for this layer.
    """
    try:
        with torch.no_grad():
            if hasattr(module, "unload_and_optionally_merge_module"):
                merged: nn.Module = module.unload_and_optionally_merge_module(
                    merge=True, safe_merge=False, adapter_names=None
                )
            else:
                module.merge(safe_merge=False, adapter_names=None)
                merged = module.get_base_layer()
    except _FAILURES as error:
        raise UnsupportedAdapter(
            f"PEFT cannot merge {path!r}: {str(error).strip()[:300]}",
            why=f"{type(module).__name__} has no merge for these options.",
            fix="Release the adapter unmerged, or train it without the option that the message names.",
        ) from error
    return merged


def _merges(module: Any, attached: Attached, device: torch.device) -> bool:
    try:
        unload("", _twin(module, attached, device))
    except UnsupportedAdapter:
        return False
    return True


def _twin(module: Any, attached: Attached, device: torch.device) -> Any:
    """Return a copy of a unit on the device: without any values, or with those of the adapter and zeros for the base's.

    Where the method needs the base's values, they are in memory, and copied as well.
    """
    base = {id(tensor) for tensor in attached.parameters.values()} if attached.is_lazy else set()
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if device.type == "meta" or id(tensor) in base:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            empty = torch.zeros(tensor.shape, dtype=dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(module, memo)
