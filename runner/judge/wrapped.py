"""Semantics of parameters that PEFT changes in place (`target_parameters`): E against its unmerged forward, in float64.

PEFT's wrapper does not replace a forward: while the module runs, it adds to the parameter's matrices the product of
the two factors that `get_delta_factors` gives (for one matrix alone, B·A as in any layer). So for every matrix M of
the parameter, one for each expert, and K = 4 seeded vectors of ±1:

    error = ‖E x − (M x + s·L(R x))‖ / max(‖s·L(R x)‖, 1e-8·‖M x‖)

with norms over all matrices of the parameter. E is put together from the stored tensors, M is what transformers
loaded: a stored tensor taken for another expert, or for another half of one, is off by as much as M itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from runner.judge.expected.experts import wrappers

PROBES = 4
_FLOOR = 1e-8
Matrix = Callable[[str, int], torch.Tensor]


def probe_parameters(path: str, unit: torch.nn.Module, exact: Matrix, generator: torch.Generator) -> tuple[float, str]:
    """Return the largest error over the unit's targeted parameters, and the key of that parameter.

    Args:
        path: of the unit.
        unit: PEFT's outermost wrapper, the base below it in float32.
        exact: (key, expert) → that matrix of E in float64; a parameter of two dimensions is expert 0 alone.
        generator: of the vectors.
    """
    worst, where = 0.0, ""
    for parameter, wrapper, _ in wrappers(unit):
        key = f"{path}.{parameter}"
        error = _error(wrapper, partial(exact, key), generator)
        if not error <= worst:
            worst, where = error, key
    return worst, where


def _error(wrapper: Any, exact: Callable[[int], torch.Tensor], generator: torch.Generator) -> float:
    parameter = wrapper.get_param().detach()
    stack = parameter if parameter.ndim == 3 else parameter[None]
    name = wrapper.active_adapters[0]
    distance = effect = plain = 0.0
    left, right, scaling = _factors(wrapper, name)
    for expert in range(stack.shape[0]):
        x = torch.randint(0, 2, (stack.shape[2], PROBES), generator=generator).double() * 2 - 1
        loaded = stack[expert].double() @ x
        delta = scaling * (left[expert].double() @ (right[expert].double() @ x))
        made = exact(expert) @ x
        distance += float((made - (loaded + delta)).square().sum())
        effect += float(delta.square().sum())
        plain += float(loaded.square().sum())
    if distance == 0.0:
        return 0.0
    scale = max(effect**0.5, _FLOOR * plain**0.5)
    return distance**0.5 / scale if scale > 0 else float("inf")


def _factors(wrapper: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    if wrapper.num_experts == 1:
        a, b = (half[name].weight.detach()[None] for half in (wrapper.lora_A, wrapper.lora_B))
        return b, a, float(wrapper.scaling[name])
    left, right, scaling = wrapper.get_delta_factors(name)
    return left.detach(), right.detach(), float(scaling)
