"""Where parameters and stored buffers of a model are, and having other values there for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from runner.judge.streaming.models import own_modules

Place = tuple[nn.Module, str]  # a module, and the name of its parameter or buffer


def place_of(model: nn.Module, key: str) -> Place:
    """Return where the parameter or buffer of a key is; its module must exist."""
    path, _, name = key.rpartition(".")
    return model.get_submodule(path), name


class Absent(nn.Parameter):
    """A parameter or buffer without values, which says of itself that it is on the device that computes.

    Models ask for that before they call the module that has it: `ids.to(self.embed_tokens.weight.device)`. Everything
    else is done on the meta device, where using its values fails.
    """

    device_told: torch.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer the question for the device; let torch do the rest."""
        del types
        if func == _DEVICE:
            return args[0].device_told
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_DEVICE = torch.Tensor.device.__get__


@contextmanager
def emptied(places: Mapping[str, Place], device: str, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Have no values in these places for as long as this lasts: floats in `dtype`, see `Absent`.

    Code that looks at a parameter's dtype or device sees those that are computed with; code that uses its values fails.
    """
    absent: dict[str, Absent] = {}
    for key, place in places.items():
        held = value_at(place)
        kind = dtype if held.is_floating_point() else held.dtype
        empty = Absent(torch.empty(held.shape, dtype=kind, device="meta"), requires_grad=False)
        empty.device_told = torch.device(device)
        absent[key] = empty
    with put(places, absent):
        yield


@contextmanager
def put(places: Mapping[str, Place], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have `values` in their places for as long as this lasts; a value without a place is an error of the caller."""
    before = {key: value_at(places[key]) for key in values}
    for key, value in values.items():
        module, name = places[key]
        if name in module._parameters:
            made = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            module._parameters[name] = made
        else:
            module._buffers[name] = value
    try:
        yield
    finally:
        for key, held in before.items():
            module, name = places[key]
            home: Any = module._parameters if name in module._parameters else module._buffers
            home[name] = held


def places_of(model: nn.Module, units: Mapping[str, nn.Module] | None = None) -> dict[str, Place]:
    """Return where every parameter and stored buffer is, by key; inside PEFT's `units`, the base's own."""
    units = units or {}
    places: dict[str, Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path == outer or path.startswith(f"{outer}.") for outer in _outer(path, units)):
            continue
        places |= _own(path, module)
    for path, unit in units.items():
        for inner, module in own_modules(unit):
            places |= _own(f"{path}.{inner}".rstrip("."), module)
    return places


def _outer(path: str, units: Mapping[str, nn.Module]) -> list[str]:
    found = []
    while path:
        if path in units:
            found.append(path)
        path = path.rpartition(".")[0]
    return found


def _own(path: str, module: nn.Module) -> dict[str, Place]:
    names = [name for name, tensor in module._parameters.items() if tensor is not None]
    names += [
        name
        for name, tensor in module._buffers.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    ]
    return {f"{path}.{name}".lstrip("."): (module, name) for name in names}


def value_at(place: Place) -> torch.Tensor:
    """Return what is in a place."""
    module, name = place
    found = module._parameters.get(name)
    held = found if found is not None else module._buffers[name]
    assert held is not None  # noqa: S101  (only what is there has a place)
    return held
