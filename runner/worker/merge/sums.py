"""The fast path's sums on a GPU, where they have the CPU's bits: blocks go through pinned buffers, two at a time.

A block is read into one of the writer's own buffers, which are pinned then; copied to the device, summed, rounded and
copied back into the same buffer by one of two lanes (a stream with device memory of its own), while the other lane
works on the block before and the next one is read.

The bits are the same on every device, so that one merge has one digest: product and sum are single operations of
IEEE 754 in a given order. On the CPU the product of a rank that its library does not split is, for each element, a
chain of fused multiplications and additions from the first rank to the last; here the chain is written out, one
`addcmul` for each rank. No matrix product of the GPU's library takes part, so TF32 does not either. `GpuMerger.takes`
compares the products of both devices once for every shape, and where a bit differs the CPU sums.

Covered: plain LoRA on linear layers and experts, in the stored dtype. Not covered: a change of dtype, ranks whose
product the CPU splits (beyond 200 or so), and units that are merged whole through PEFT; these stay on the CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch

from runner.worker.merge.experts import Panel
from runner.worker.merge.fast import LinearMerger, check_range, row_blocks
from runner.worker.plan import TensorPlan
from runner.worker.tensors.reader import TORCH_DTYPES, Reader, tensor_bytes
from runner.worker.tensors.writer import Buffer, ShardWriter

LANES = 2
_CHECKED_ROWS = 64


class Sums:
    """The fast path on the device that was asked for, as far as its bits are the CPU's; else on the CPU."""

    def __init__(self, cpu: LinearMerger, gpu: GpuMerger | None) -> None:
        self._cpu = cpu
        self._gpu = gpu
        self._has_failed = False

    @property
    def uses_gpu(self) -> bool:
        """Whether any sum may be made on a GPU."""
        return self._gpu is not None

    @property
    def note(self) -> str:
        """What the user should know of the GPU, or an empty text."""
        if self._has_failed:
            return "All sums are made on the CPU: the GPU gave other bits than PEFT."
        return self._gpu.note if self._gpu is not None else ""

    def leave_gpu(self) -> None:
        """Make all sums on the CPU from now on: what came from the GPU was not what PEFT gives."""
        self._gpu, self._has_failed = None, True

    def blocks(self, panels: Iterable[Panel], tensor: TensorPlan, writer: ShardWriter) -> Iterator[tuple[Buffer, int]]:
        """Yield (buffer, filled bytes) with the merged rows in the output dtype, in order.

        Raises:
            UnsupportedAdapter: a merged value does not fit float16.
        """
        rest = iter(panels)
        first = next(rest)
        gpu = self._gpu
        merger = gpu if gpu is not None and gpu.takes(tensor, first) else self._cpu
        return merger.blocks(chain((first,), rest), tensor, writer)


class GpuMerger:
    """Merges low-rank products on one device; holds two blocks there, each in the stored dtype and in float32."""

    def __init__(self, reader: Reader, block_bytes: int, device: torch.device) -> None:
        """Take the device; `cpu` works too and is what the tests compare with.

        Args:
            reader: of the base.
            block_bytes: of the writer's buffers.
            device: where the sums are made.
        """
        self._reader = reader
        self._block_bytes = block_bytes
        self._device = device
        self._lanes = [_Lane(device, block_bytes) for _ in range(LANES)]
        self._known: dict[tuple[int, ...], bool] = {}

    @property
    def note(self) -> str:
        """What is left to the CPU because its bits differ, in a sentence, or an empty text."""
        refused = sorted({rank for (_, rank, _), agrees in self._known.items() if not agrees})
        ranks = ", ".join(str(rank) for rank in refused)
        return f"Sums of rank {ranks} are made on the CPU: the GPU would give other last bits." if refused else ""

    def takes(self, tensor: TensorPlan, panel: Panel) -> bool:
        """Return whether `tensor`, whose first panel is given, is merged here with the bits of the CPU."""
        if tensor.dtype != tensor.source.dtype:
            return False
        left = panel.left[:_CHECKED_ROWS]
        shape = (left.shape[0], *panel.right.shape)
        if shape not in self._known:
            product = torch.zeros((left.shape[0], panel.right.shape[1]), device=self._device)
            multiply(left.to(self._device), panel.right.to(self._device), out=product)
            self._known[shape] = torch.equal(product.cpu(), torch.mm(left, panel.right))
        return self._known[shape]

    def blocks(self, panels: Iterable[Panel], tensor: TensorPlan, writer: ShardWriter) -> Iterator[tuple[Buffer, int]]:
        """Yield (buffer, filled bytes) with the merged rows, in order, as `LinearMerger.blocks` does.

        Raises:
            UnsupportedAdapter: a merged value does not fit float16.
        """
        columns, dtype = tensor.shape[-1], TORCH_DTYPES[tensor.dtype]
        row_bytes = columns * dtype.itemsize
        done = 0
        for panel in panels:
            left, right = panel.left.to(self._device), panel.right.to(self._device)
            busy: deque[tuple[_Lane, Buffer, int]] = deque()
            for number, (first, last) in enumerate(row_blocks(left.shape[0], self._block_bytes // row_bytes)):
                if len(busy) == LANES:
                    yield _finished(*busy.popleft(), tensor)
                buffer, filled = writer.borrow(), (last - first) * row_bytes
                block = buffer.raw[:filled].view(dtype).view(-1, columns)
                self._reader.read_into(tensor_bytes(block), tensor.source, (done + first) * row_bytes)
                lane = self._lanes[number % LANES]
                lane.merge(block, left[first:last], right, panel.scaling)
                busy.append((lane, buffer, filled))
            while busy:  # before the panel's factors go
                yield _finished(*busy.popleft(), tensor)
            done += left.shape[0]


class _Lane:
    """A stream, and room for one block on the device."""

    def __init__(self, device: torch.device, block_bytes: int) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stored = torch.empty(block_bytes, dtype=torch.uint8, device=device)
        self._sum = torch.empty(block_bytes // 2, dtype=torch.float32, device=device)
        self.overflows = torch.zeros((), dtype=torch.bool, device=device)

    def merge(self, block: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        """Begin to merge `block` in place, after what is queued on the caller's stream; `wait` ends it."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with self._queue():
            stored = self._stored[: block.nbytes].view(block.dtype).view(block.shape)
            summed = self._sum[: block.numel()].view(block.shape)
            stored.copy_(block, non_blocking=True)
            multiply(left, right, out=summed.zero_())
            summed.mul_(scaling).add_(stored)
            stored.copy_(summed)
            if block.dtype is torch.float16:
                self.overflows = (torch.isinf(stored) & torch.isfinite(summed)).any()
            block.copy_(stored, non_blocking=True)

    def wait(self) -> torch.Tensor:
        """Wait for the block; return the sums in float32, on the device."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._sum

    def _queue(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def multiply(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Add left·right to `out`, (rows, columns) float32: one fused multiplication and addition after the other.

    Args:
        left: (rows, rank) float32.
        right: (rank, columns) float32.
        out: zeros.
    """
    for rank in range(left.shape[1]):
        out.addcmul_(left[:, rank : rank + 1], right[rank : rank + 1])
    return out


def _finished(lane: _Lane, buffer: Buffer, filled: int, tensor: TensorPlan) -> tuple[Buffer, int]:
    summed = lane.wait()
    if bool(lane.overflows):
        merged = buffer.raw[:filled].view(torch.float16)
        check_range(merged, summed[: merged.numel()].cpu(), tensor.name)
    return buffer, filled
