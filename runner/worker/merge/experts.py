"""Fused experts, one matrix at a time: which factors of a `target_parameters` adapter change which stored tensor.

PEFT adds to a stack of experts W (experts, m, n) for each expert e the product of rank r

    ΔW[e] = s · B_e·A_e          (m, r)·(r, n)
    ΔW[e] = s · (B_e·A_e)ᵀ       where the model stores its experts as (in, out): PEFT's `_did_swap_in_out_features`

with A_e rows e·r … e·r + r − 1 of `lora_A`, and B_e every `experts`-th column of `lora_B`, from column e on (PEFT
packs `lora_B` with the expert index running fastest). So each expert, and each stored matrix inside one, is merged
alone: nothing of the size of the whole stack is ever in memory.

PEFT computes all experts in one batched product. One expert's product alone gives the same bits, except below 400
multiplications, where torch's batched product is a plain loop: `stack_of` leaves such experts to PEFT as a whole.
Source: PEFT `lora.layer.ParamWrapper.get_delta_weight`; docs/decisions/0005.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from runner.architecture.conversion import Part
from runner.worker.model.attach import ADAPTER_NAME, Attached

_MIN_PRODUCTS = 4096  # of one expert; ten times what torch's batched product needs to be a matrix product
_CHECKED_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Rows of a stored matrix, and the low-rank product that is added to them.

    Attributes:
        left: (rows, rank) float32, contiguous.
        right: (rank, columns) float32, contiguous.
        scaling: factor of the product.
    """

    left: torch.Tensor
    right: torch.Tensor
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A stack of experts that is merged expert by expert, or one matrix in it.

    Attributes:
        wrapper: PEFT's, of this parameter.
        shape: (experts, rows, columns) of the parameter.
        part: which matrix; None for all of them, stored as one tensor.
    """

    wrapper: Any
    shape: tuple[int, ...]
    part: Part | None


def wrappers(module: Any) -> dict[str, Any]:
    """Return PEFT's nested wrappers of one module's parameters by the parameter's name, the outermost first."""
    found: dict[str, Any] = {}
    while isinstance(module, ParamWrapper):
        found[module.parameter_name] = module
        module = module.base_layer
    return found


def stack_of(attached: Attached, path: str, module: Any, parameter: str) -> Stack | None:
    """Return the stack of experts that a unit's tensor belongs to, or None where it is not merged expert by expert.

    Args:
        attached: base and adapter.
        path: of the unit.
        module: the unit's outermost wrapper.
        parameter: the tensor's name inside the unit, or its stored name where a conversion makes it.
    """
    part = attached.conversion.part(parameter)
    key = part.key if part is not None else f"{path}.{parameter}"
    wrapper = wrappers(module).get(key.removeprefix(f"{path}."))
    if wrapper is None or key not in attached.parameters or not attached.is_lazy:
        return None
    shape = tuple(attached.parameters[key].shape)
    is_sliced = (
        len(shape) == 3
        and wrapper.num_experts == shape[0] > 1
        and key not in attached.replaced
        and list(wrapper.active_adapters) == [ADAPTER_NAME]
        and set(wrapper.lora_A) == {ADAPTER_NAME}
        and all(part[ADAPTER_NAME].weight.dtype is torch.float32 for part in (wrapper.lora_A, wrapper.lora_B))
        and wrapper.r[ADAPTER_NAME] * shape[1] * shape[2] >= _MIN_PRODUCTS
    )
    return Stack(wrapper=wrapper, shape=shape, part=part) if is_sliced else None


def panels(stack: Stack) -> Iterator[Panel]:
    """Yield what is added to the stored tensor, from its first row to its last; one expert is in memory at a time."""
    if stack.part is not None:
        yield _panel(stack.wrapper, stack.part.expert, stack.part.start, stack.part.rows)
        return
    for expert in range(stack.shape[0]):
        yield _panel(stack.wrapper, expert, 0, stack.shape[1])


def through_peft(stack: Stack, *, rows: int) -> torch.Tensor:
    """Return PEFT's own delta of the first `rows` rows of `panels(stack)`'s first panel: (rows, columns) float32.

    Two experts go through PEFT together, because one alone would take another path there.
    """
    wrapper, first = stack.wrapper, stack.part.start if stack.part is not None else 0
    expert = stack.part.expert if stack.part is not None else 0
    experts = [expert, (expert + 1) % stack.shape[0]]
    count = wrapper.num_experts
    a = wrapper.lora_A[ADAPTER_NAME].weight.detach()
    b = wrapper.lora_B[ADAPTER_NAME].weight.detach()
    a = a.reshape(count, -1, a.shape[1])[experts]
    b = b.reshape(b.shape[0], -1, count)[:, :, experts]
    if wrapper._did_swap_in_out_features:
        b = b[first : first + rows]
    else:
        a = a[:, :, first : first + rows]
    # A wrapper of fewer experts, as far as PEFT's method looks at one.
    slice_of = SimpleNamespace(
        num_experts=len(experts),
        lora_A={ADAPTER_NAME: SimpleNamespace(weight=a.reshape(-1, a.shape[2]))},
        lora_B={ADAPTER_NAME: SimpleNamespace(weight=b.reshape(b.shape[0], -1))},
        scaling=wrapper.scaling,
        _did_swap_in_out_features=wrapper._did_swap_in_out_features,
        get_param=lambda: torch.empty(0, dtype=torch.float32),
    )
    delta: torch.Tensor = ParamWrapper.get_delta_weight(slice_of, ADAPTER_NAME)
    return delta[0]


def agrees(stack: Stack) -> bool:
    """Return whether one expert's rows, multiplied alone, have the bits that PEFT's batched product gives them."""
    panel = next(panels(stack))
    rows = min(_CHECKED_ROWS, panel.left.shape[0])
    alone = torch.mm(panel.left[:rows], panel.right).mul_(panel.scaling)
    return torch.equal(alone, through_peft(stack, rows=rows))


def expert_bytes(stack: Stack) -> int:
    """Return the bytes that merging one expert takes beside the writer's buffers: its factors, twice."""
    _, rows, columns = stack.shape
    return 2 * 4 * int(stack.wrapper.r[ADAPTER_NAME]) * (rows + columns)


def _panel(wrapper: Any, expert: int, start: int, rows: int) -> Panel:
    a = wrapper.lora_A[ADAPTER_NAME].weight.detach()
    b = wrapper.lora_B[ADAPTER_NAME].weight.detach()
    a = a.reshape(wrapper.num_experts, -1, a.shape[1])[expert]  # (rank, in)
    b = b.reshape(b.shape[0], -1, wrapper.num_experts)[:, :, expert]  # (out, rank)
    left, right = (b, a) if wrapper._did_swap_in_out_features else (a.T, b.T)
    return Panel(
        left=left[start : start + rows].contiguous(),
        right=right.contiguous(),
        scaling=wrapper.scaling[ADAPTER_NAME],
    )
