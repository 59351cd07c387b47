"""The parts of a model that its forward comes to one after the other, and that are in memory one at a time.

A stage is an element of a list of modules (a decoder or encoder layer, whatever its class), or else the smallest module
that holds parameters of its own: embeddings, the last norm, the head. What lies between them (masks, rotary angles, the
order of calls) needs no stored value and is left to the model's own code. A model with parameters outside of all stages
is one stage, as is one that has a stage in two places, or whose code turns out to use a stage's parameters from
outside.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

WHOLE = ("",)


def find_stages(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the stages in the order of the model's modules; `WHOLE` where it has to be one."""
    stages = tuple(_below("", model))
    keys = model.state_dict()
    covered = all(any(is_below(key, stage) for stage in stages) for key in keys)
    modules = {id(model.get_submodule(stage)) for stage in stages}
    is_once = len(modules) == len(stages)  # not T5's embeddings once they were resized: one module under three paths
    return stages if covered and is_once and stages else WHOLE


def is_below(key: str, stage: str) -> bool:
    """Return whether a key of the state dict belongs to a stage."""
    return not stage or key.startswith(f"{stage}.")


def _below(path: str, module: nn.Module) -> Iterator[str]:
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if not _holds_values(child):
            continue
        is_list = isinstance(child, nn.ModuleList | nn.ModuleDict)
        is_element = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if not is_list and (is_element or (_has_own(child) and not _has_list(child))):
            yield here
        else:
            yield from _below(here, child)


def _holds_values(module: nn.Module) -> bool:
    return bool(module.state_dict())


def _has_own(module: nn.Module) -> bool:
    buffers = module._buffers.keys() - module._non_persistent_buffers_set
    return any(tensor is not None for tensor in module._parameters.values()) or bool(buffers)


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.ModuleList) for inner in module.modules())
