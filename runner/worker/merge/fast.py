"""The fast path: plain LoRA on a linear layer or an expert, row block by row block, in the reader's own buffer.

Same operations in the same order as PEFT (`lora.Linear.get_delta_weight`, then the sum in float32, then one rounding),
so the same bits, at about five times the speed: PEFT materialises the product, its scaled copy and a mixed-dtype sum
for the whole matrix, here they stay in the cache. On one thread the product of four rows or more equals those rows of
the whole product (of fewer it may not: they are summed in another order, so none is ever cut off that small).
`runner.worker.merge.job` checks one unit of every run against PEFT, and the smallest block of every shape (`is_same`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from runner.protocol.errors import UnsupportedAdapter
from runner.protocol.rounding import Rounding
from runner.worker.merge.experts import Panel
from runner.worker.merge.stochastic import Rounder
from runner.worker.merge.units import Unit
from runner.worker.model.attach import ADAPTER_NAME, Attached
from runner.worker.plan import TensorPlan
from runner.worker.tensors.reader import FLOATS, TORCH_DTYPES, Reader, tensor_bytes
from runner.worker.tensors.writer import Buffer, ShardWriter

SUM_BYTES = 256 << 10  # of the output: block, product and sum stay in the second-level cache; a third less time
MIN_ROWS = 8  # of a block, so that none has fewer than half of them
LEAST_ROWS = (
    MIN_ROWS // 2
)  # measured: one row has other bits than in the whole, on some processors (an EPYC) up to three
_CHECKED_ROWS = 64


def is_fast(attached: Attached, unit: Unit, tensor: TensorPlan) -> bool:
    """Return whether the fast path makes `tensor`: plain LoRA on a plain `nn.Linear`, stored as it is."""
    module = unit.module
    key = f"{unit.path}.weight"
    return (
        attached.is_lazy
        and type(module) is LoraLinear
        and type(module.get_base_layer()) is nn.Linear
        and tensor.change is not None
        and tensor.change.parameter == "weight"
        and key not in attached.replaced
        and tensor.source.dtype in FLOATS
        and list(module.active_adapters) == [ADAPTER_NAME]
        and set(module.lora_A) == {ADAPTER_NAME}
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and not module.fan_in_fan_out
        and all(
            part.weight.dtype is torch.float32 for part in (module.lora_A[ADAPTER_NAME], module.lora_B[ADAPTER_NAME])
        )
    )


def linear_panel(unit: Unit) -> Panel:
    """Return what is added to the weight of a plain `lora.Linear`."""
    module = unit.module
    return Panel(
        left=module.lora_B[ADAPTER_NAME].weight.detach(),
        right=module.lora_A[ADAPTER_NAME].weight.detach(),
        scaling=module.scaling[ADAPTER_NAME],
    )


class LinearMerger:
    """Merges low-rank products in blocks; holds one block of the sum in float32 and one of the input."""

    def __init__(self, reader: Reader, block_bytes: int, rounder: Rounder | None = None) -> None:
        self._reader = reader
        self._rounder = rounder or Rounder(Rounding())
        self._block_bytes = block_bytes
        self._input = torch.empty(block_bytes, dtype=torch.uint8)
        self._scratch = torch.empty(0)

    def blocks(self, panels: Iterable[Panel], tensor: TensorPlan, writer: ShardWriter) -> Iterator[tuple[Buffer, int]]:
        """Yield (buffer, filled bytes) with the merged rows in the output dtype, in order.

        Raises:
            UnsupportedAdapter: a merged value does not fit float16.
        """
        columns = tensor.shape[-1]
        source = TORCH_DTYPES[tensor.source.dtype]
        output = TORCH_DTYPES[tensor.dtype]
        row_bytes = columns * max(source.itemsize, output.itemsize)
        done = 0
        for panel in panels:
            for first, last in row_blocks(panel.left.shape[0], self._block_bytes // row_bytes):
                count = last - first
                buffer = writer.borrow()
                filled = count * columns * output.itemsize
                merged = buffer.raw[:filled].view(output).view(count, columns)
                raw = buffer.raw if source is output else self._input
                base = raw[: count * columns * source.itemsize].view(source).view(count, columns)
                offset = (done + first) * columns * source.itemsize
                self._reader.read_into(tensor_bytes(base), tensor.source, offset)
                for start, end in row_blocks(count, max(MIN_ROWS, SUM_BYTES // row_bytes)):
                    block = self._room((end - start) * columns).view(end - start, columns)
                    torch.mm(panel.left[first + start : first + end], panel.right, out=block)
                    block.mul_(panel.scaling).add_(base[start:end])
                    index = (done + first + start) * columns
                    self._rounder.into(merged[start:end], block, tensor.name, index)
                    if output is torch.float16:
                        check_range(merged[start:end], block, tensor.name)
                yield buffer, filled
            done += panel.left.shape[0]

    def _room(self, elements: int) -> torch.Tensor:
        if self._scratch.numel() < elements:
            self._scratch = torch.empty(elements, dtype=torch.float32)
        return self._scratch[:elements]


def row_blocks(rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of blocks of at most `most` rows, all of about the same size; `most` is at least `MIN_ROWS`.

    No block has fewer than `LEAST_ROWS` where that can be helped: torch multiplies one row, or up to three, by another
    routine, which sums in another order and gives other last bits.
    """
    count = -(-rows // max(1, most))
    for number in range(count):
        yield rows * number // count, rows * (number + 1) // count


def is_same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether the smallest block of a product has the bits that its rows have in a larger one.

    Args:
        left: (rows, rank) float32; its first rows are multiplied.
        right: (rank, columns) float32.
    """
    larger = torch.mm(left[:_CHECKED_ROWS], right)
    return torch.equal(torch.mm(left[:LEAST_ROWS], right), larger[:LEAST_ROWS])


def check_range(rounded: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """Refuse a finite value that the output dtype turned into Inf.

    Raises:
        UnsupportedAdapter: with the tensor's name and the value.
    """
    overflow = torch.isinf(rounded) & torch.isfinite(exact)
    if bool(overflow.any()):
        worst = float(exact[overflow].abs().max())
        raise UnsupportedAdapter(
            f"{name!r} holds {worst:g}, which {rounded.dtype} cannot hold.",
            why="The range of float16 ends at 65504; the value would become Inf.",
            fix="Set `dtype` to bfloat16 or float32.",
        )
