"""Plan → MergedCheckpoint: every shard in order, every tensor in the order of its bytes, one unit in memory.

Each output element is the un-rounded float32 sum that PEFT computes, rounded once to the output dtype. Untouched
tensors are copied as bytes. A folder that is not complete never has its final name, and what a killed run finished
is taken over (`runner.worker.merge.resume`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from runner.files.layout import INDEX_FILE
from runner.files.sidecars.files import copy_companion
from runner.protocol.digests import FileDigest, MergedCheckpoint
from runner.protocol.errors import RunnerError
from runner.worker.merge.experts import Panel, Stack, agrees, panels, stack_of
from runner.worker.merge.fast import MIN_ROWS, LinearMerger, check_range, is_fast, is_same, linear_panel
from runner.worker.merge.prepare import Prepared
from runner.worker.merge.resume import Standing, check_space, take_up
from runner.worker.merge.stochastic import Rounder
from runner.worker.merge.sums import GpuMerger, Sums
from runner.worker.merge.whole import UnitMerger
from runner.worker.plan import Action, Plan, ShardPlan, TensorPlan
from runner.worker.tensors.reader import TORCH_DTYPES, Reader, tensor_bytes
from runner.worker.tensors.writer import BUFFER_BYTES, ShardWriter

Progress = Callable[[int, int], None]
OnShard = Callable[[Path, FileDigest], None]


def merge(
    prepared: Prepared,
    *,
    into: Path,
    on_progress: Progress | None = None,
    on_shard: OnShard | None = None,
    device: str = "cpu",
) -> MergedCheckpoint:
    """Carry out the plan and return the finished folder `into`.

    Args:
        prepared: base and adapter attached, and the plan; used once.
        into: appears by rename when everything is written. `<into>.partial` and `<into>.journal.json` stand beside it
            until then; the journal stays. It may exist as the result of an earlier merge, whose shards are then kept.
        on_progress: called with (bytes written, bytes in all) after every tensor.
        on_shard: called with (folder, digest) of every shard that is finished, those of an earlier run first.
        device: "cpu", or "cuda" to sum on the GPU what has the same bits there (`runner.worker.merge.sums`).

    Raises:
        RunnerError: the disk is full, a file is damaged, or PEFT refuses a layer; `into` does not exist then, and
            the next call goes on from the shards that are finished.
        ValueError: `prepared` is only good for its plan.
    """
    if prepared.is_only_planned:
        raise ValueError("prepared with only_plans")
    started = time.monotonic()
    torch.set_num_threads(1)  # one thread merges, one writes, one hashes; more only contend (and change last bits)
    standing = take_up(prepared, into)
    plan, attached = prepared.plan, prepared.attached
    check_space(plan.summary.disk_bytes, standing)
    with Reader(attached.checkpoint) as reader, torch.inference_mode():
        job = _Job(prepared, reader, standing, on_progress, torch.device(device))
        job.check_fast_path()
        files = job.write_shards(on_shard)
        read_bytes = reader.read_bytes
        notes = (standing.note, job.note)
    files += _write_rest(plan, standing.partial)
    standing.partial.rename(into)
    summary = plan.summary
    return MergedCheckpoint(
        root=into,
        files=tuple(sorted(files, key=lambda file: file.path)),
        tensors_merged=summary.tensors_merged,
        tensors_copied=summary.tensors_copied,
        tensors_cast=summary.tensors_cast,
        read_bytes=read_bytes + sum(adapter.data_bytes for adapter in attached.adapters),
        written_bytes=sum(file.size_bytes for file in files),
        wall_s=time.monotonic() - started,
        shards_resumed=len(standing.kept),
        note=" ".join(note for note in notes if note),
    )


class _Job:
    """One merge under way: what is needed for every tensor, and the parts of units that are still to be written."""

    def __init__(
        self,
        prepared: Prepared,
        reader: Reader,
        standing: Standing,
        on_progress: Progress | None,
        device: torch.device,
    ) -> None:
        plan = prepared.plan
        self._shards = tuple(shard for shard in plan.shards if shard.file not in standing.kept)
        self._standing = standing
        self._attached = prepared.attached
        self._units = prepared.units
        self._reader = reader
        self._on_progress = on_progress
        self._unit_merger = UnitMerger(prepared.attached, prepared.units, reader)
        widest = max((row_bytes(tensor) for shard in self._shards for tensor in shard.tensors), default=0)
        self._block_bytes = max(BUFFER_BYTES, MIN_ROWS * widest)
        self._rounder = Rounder(prepared.rounding, prepared.attached.twins)
        is_on_cpu = device.type == "cpu" or prepared.rounding.is_stochastic  # only the CPU draws
        gpu = None if is_on_cpu else GpuMerger(reader, self._block_bytes, device)
        self._sums = Sums(LinearMerger(reader, self._block_bytes, self._rounder), gpu)
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._uses = _count_uses(self._shards)

    @property
    def note(self) -> str:
        """What the user should know of the device, or an empty text."""
        return self._sums.note

    def write_shards(self, on_shard: OnShard | None) -> list[FileDigest]:
        """Write what is not kept; return the digests of all shards."""
        journal = self._standing.journal
        files = list(journal.files)
        tell = on_shard or (lambda _folder, _file: None)
        for file in files:
            tell(self._standing.partial, file)
        written = sum(file.size_bytes for file in files)
        total = written + sum(shard.size_bytes for shard in self._shards)
        with self._writer() as writer:
            for shard in self._shards:
                writer.begin(shard.file, shard.header, shard.size_bytes)
                for tensor in shard.tensors:
                    self._write(tensor, writer)
                    written += tensor.size_bytes
                    if self._on_progress is not None:
                        self._on_progress(written, total)
                files.append(writer.finish())
                replace(journal, files=tuple(files)).write(self._standing.journal_path)
                tell(self._standing.partial, files[-1])
        return files

    def check_fast_path(self) -> None:
        """Merge the smallest fast unit by both paths; the bytes must be equal.

        Raises:
            RunnerError: they are not: this build of torch sums in another order, and nothing may be published.
        """
        stacks = [stack for shard in self._shards for tensor in shard.tensors if (stack := self._stack(tensor))]
        if stacks and not agrees(stacks[0]):
            raise RunnerError(
                f"The fast path and PEFT disagree on an expert of {stacks[0].shape[1]} rows.",
                why="This build of torch multiplies one expert differently from a batch of them.",
                fix="Use the image of this action as it is published, and report the versions in the log.",
            )
        fast = [tensor for shard in self._shards for tensor in shard.tensors if self._is_fast(tensor)]
        if not fast:
            return
        self._check_blocks(fast)
        tensor = min(fast, key=lambda candidate: candidate.size_bytes)
        whole = self._unit_merger.merge(tensor.change.unit if tensor.change else "")["weight"]
        rounded = self._rounder.round(whole, TORCH_DTYPES[tensor.dtype], tensor.name)
        right = hashlib.sha256(tensor_bytes(rounded)).hexdigest()
        if self._sums.uses_gpu and self._digest(tensor) != right:
            self._sums.leave_gpu()
        if self._digest(tensor) != right:
            raise _disagreement(tensor)

    def _digest(self, tensor: TensorPlan) -> str:
        """Return the sha256 of a tensor as the fast path merges it; it is written, and removed."""
        with self._writer() as writer:
            writer.begin("check", b"", tensor.size_bytes)
            self._write_fast(tensor, writer)
            digest = writer.finish().sha256
        (self._standing.partial / "check").unlink()
        return digest

    def _writer(self) -> ShardWriter:
        root, is_pinned = self._standing.partial, self._sums.uses_gpu
        return ShardWriter(root, buffer_bytes=self._block_bytes, is_pinned=is_pinned)

    def _check_blocks(self, fast: list[TensorPlan]) -> None:
        checked = set()
        for tensor in fast:
            panel = self._panel(tensor)
            shape = panel.right.shape
            if shape not in checked and not is_same(panel.left, panel.right):
                raise _disagreement(tensor)
            checked.add(shape)

    def _is_fast(self, tensor: TensorPlan) -> bool:
        unit = self._units.get(tensor.change.unit) if tensor.change else None
        return unit is not None and is_fast(self._attached, unit, tensor)

    def _stack(self, tensor: TensorPlan) -> Stack | None:
        unit = self._units.get(tensor.change.unit) if tensor.change else None
        if unit is None or tensor.change is None:
            return None
        return stack_of(self._attached, unit.path, unit.module, tensor.change.parameter)

    def _write(self, tensor: TensorPlan, writer: ShardWriter) -> None:
        if tensor.action is Action.MERGE:
            stack = self._stack(tensor)
            if stack is not None:
                self._write_panels(panels(stack), tensor, writer)
            elif self._is_fast(tensor):
                self._write_fast(tensor, writer)
            else:
                self._write_unit(tensor, writer)
        elif tensor.action is Action.COPY:
            source = tensor.source
            writer.copy(self._reader.lend(source), source.start, source.size_bytes)
        else:
            self._cast(tensor, writer)

    def _panel(self, tensor: TensorPlan) -> Panel:
        assert tensor.change is not None  # noqa: S101  (is_fast)
        return linear_panel(self._units[tensor.change.unit])

    def _write_fast(self, tensor: TensorPlan, writer: ShardWriter) -> None:
        self._write_panels([self._panel(tensor)], tensor, writer)

    def _write_panels(self, parts: Iterable[Panel], tensor: TensorPlan, writer: ShardWriter) -> None:
        for buffer, filled in self._sums.blocks(parts, tensor, writer):
            writer.put(tensor_bytes(buffer.raw[:filled]), buffer)

    def _write_unit(self, tensor: TensorPlan, writer: ShardWriter) -> None:
        assert tensor.change is not None  # noqa: S101  (Action.MERGE)
        unit, parameter = tensor.change.unit, tensor.change.parameter
        if unit not in self._waiting:
            self._waiting[unit] = self._unit_merger.merge(unit)
        exact = self._waiting[unit][parameter]
        self._uses[unit] -= 1
        if not self._uses[unit]:
            del self._waiting[unit]
        if tuple(exact.shape) != tensor.shape:
            raise RunnerError(
                f"The unit {unit!r} gives {tensor.name!r} the shape {list(exact.shape)}, not {list(tensor.shape)}.",
                why="The plan has the shapes of model and adapter; this PEFT makes something else of them.",
                fix="Use the image of this action as it is published, and report the adapter's config.",
            )
        rounded = self._rounder.round(exact, TORCH_DTYPES[tensor.dtype], tensor.name)
        if rounded.dtype is torch.float16:
            check_range(rounded, exact, tensor.name)
        writer.put(tensor_bytes(rounded))

    def _cast(self, tensor: TensorPlan, writer: ShardWriter) -> None:
        stored = self._reader.read(tensor.source)
        rounded = stored.to(TORCH_DTYPES[tensor.dtype])
        if rounded.dtype is torch.float16:
            check_range(rounded, stored, tensor.name)
        writer.put(tensor_bytes(rounded))


def _disagreement(tensor: TensorPlan) -> RunnerError:
    return RunnerError(
        f"The fast path and PEFT disagree on {tensor.name!r}.",
        why="This build of torch multiplies blocks of rows differently from the whole matrix.",
        fix="Use the image of this action as it is published, and report the versions in the log.",
    )


def row_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of one row (of the last dimension) in the wider of input and output dtype."""
    rows = prod(tensor.shape[:-1])
    return max(tensor.size_bytes, tensor.source.size_bytes) // max(rows, 1) if len(tensor.shape) > 1 else 0


def _count_uses(shards: tuple[ShardPlan, ...]) -> dict[str, int]:
    uses: dict[str, int] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.change is not None:
                uses[tensor.change.unit] = uses.get(tensor.change.unit, 0) + 1
    return uses


def _write_rest(plan: Plan, root: Path) -> list[FileDigest]:
    files = []
    for companion in plan.companions:
        content = copy_companion(companion, root)
        files.append(_digest(companion.path, content))
    if plan.index is not None:
        (root / INDEX_FILE).write_bytes(plan.index)
        files.append(_digest(INDEX_FILE, plan.index))
    return files


def _digest(path: str, content: bytes) -> FileDigest:
    return FileDigest(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
