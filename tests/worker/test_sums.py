"""Sums on another device: the same bytes as on the CPU, or the CPU makes them.

The lanes work on any device that torch has. Here they run on the CPU, which shows that cutting, ordering and summing
are right; what only a GPU can show is marked `gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import save_file

import runner.worker.merge.sums
from runner.files.layout import read_checkpoint
from runner.worker.merge.experts import Panel
from runner.worker.merge.fast import LinearMerger
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from runner.worker.merge.sums import GpuMerger, Sums
from runner.worker.plan import Action, TensorPlan
from runner.worker.tensors.reader import Reader, tensor_bytes
from runner.worker.tensors.writer import ShardWriter
from tests.parity import models

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
COLUMNS = 96
BLOCK_BYTES = 16 * 4 * COLUMNS
CPU = torch.device("cpu")


def _panel(rows: int, *, rank: int = 16, seed: int = 0) -> Panel:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, COLUMNS, generator=generator)
    return Panel(left=left * 0.01, right=right, scaling=1.7)


def _tensor(folder: Path, rows: int, dtype: str, *, scale: float = 0.02) -> tuple[Reader, TensorPlan]:
    torch.manual_seed(3)
    folder.mkdir(exist_ok=True)
    save_file({"w": torch.randn(rows, COLUMNS).mul_(scale).to(DTYPES[dtype])}, folder / "model.safetensors")
    checkpoint = read_checkpoint(folder)
    source = checkpoint.tensors["w"]
    plan = TensorPlan(name="w", dtype=dtype, shape=source.shape, action=Action.MERGE, source=source, change=None)
    return Reader(checkpoint), plan


def _merged(merger: GpuMerger | LinearMerger | Sums, panels: list[Panel], tensor: TensorPlan, folder: Path) -> bytes:
    with ShardWriter(folder, buffer_bytes=BLOCK_BYTES) as writer:
        writer.begin("merged", b"", tensor.size_bytes)
        for buffer, filled in merger.blocks(panels, tensor, writer):
            writer.put(tensor_bytes(buffer.raw[:filled]), buffer)
        writer.finish()
    return (folder / "merged").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(5,), (32,), (200,), (70, 9, 33)])
def test_two_lanes_have_the_bytes_of_the_fast_path(tmp_path: Path, dtype: str, rows: tuple[int, ...]) -> None:
    reader, tensor = _tensor(tmp_path / "base", sum(rows), dtype)
    panels = [_panel(count, seed=number) for number, count in enumerate(rows)]
    with reader:
        gpu = GpuMerger(reader, BLOCK_BYTES, CPU)
        expected = _merged(LinearMerger(reader, BLOCK_BYTES), panels, tensor, tmp_path)

        assert all(gpu.takes(tensor, panel) for panel in panels)
        assert _merged(gpu, panels, tensor, tmp_path) == expected


def test_a_product_in_another_order_is_left_to_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, tensor = _tensor(tmp_path / "base", 64, "F32")

    def backwards(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        for rank in reversed(range(left.shape[1])):
            out.addcmul_(left[:, rank : rank + 1], right[rank : rank + 1])
        return out

    with reader:
        cpu = LinearMerger(reader, BLOCK_BYTES)
        expected = _merged(cpu, [_panel(64)], tensor, tmp_path)
        monkeypatch.setattr(runner.worker.merge.sums, "multiply", backwards)
        gpu = GpuMerger(reader, BLOCK_BYTES, CPU)

        assert not gpu.takes(tensor, _panel(64))
        sums = Sums(cpu, gpu)
        assert _merged(sums, [_panel(64)], tensor, tmp_path) == expected
        assert sums.note == "Sums of rank 16 are made on the CPU: the GPU would give other last bits."


def test_another_dtype_is_left_to_the_cpu(tmp_path: Path) -> None:
    reader, tensor = _tensor(tmp_path / "base", 64, "BF16")
    wider = TensorPlan(
        name="w", dtype="F32", shape=tensor.shape, action=Action.MERGE, source=tensor.source, change=None
    )
    with reader:
        gpu = GpuMerger(reader, BLOCK_BYTES, CPU)

        assert not gpu.takes(wider, _panel(64))
        assert gpu.note == ""


def test_a_value_too_large_for_float16_is_refused_with_its_value(tmp_path: Path) -> None:
    from runner.protocol.errors import UnsupportedAdapter

    reader, tensor = _tensor(tmp_path / "base", 64, "F16")
    panel = Panel(left=torch.full((64, 2), 300.0), right=torch.full((2, COLUMNS), 200.0), scaling=1.0)
    with reader, pytest.raises(UnsupportedAdapter, match="holds 120000, which"):
        _merged(GpuMerger(reader, BLOCK_BYTES, CPU), [panel], tensor, tmp_path)


def _large(folder: Path) -> tuple[Path, Path]:
    config = transformers.LlamaConfig(**{**models.LLAMA_CONFIG, "hidden_size": 512, "intermediate_size": 1408})
    torch.manual_seed(0)
    base = models.save_base(transformers.LlamaForCausalLM(config), folder / "base", dtype=torch.bfloat16)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return base, models.save_adapter(base, folder / "adapter", lora)


def test_a_gpu_that_gives_other_bits_than_peft_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = _large(tmp_path)
    expected = merge(prepare(base, adapter, dtype="auto"), into=tmp_path / "cpu").digest

    class Faulty(GpuMerger):
        """Right products, and a sum that is off."""

        def __init__(self, reader: Reader, block_bytes: int, device: torch.device) -> None:
            assert device.type == "cuda"
            super().__init__(reader, block_bytes, CPU)

        def blocks(self, panels, tensor, writer):  # type: ignore[no-untyped-def]
            for buffer, filled in super().blocks(panels, tensor, writer):
                buffer.raw[0] ^= 1
                yield buffer, filled

    monkeypatch.setattr(runner.worker.merge.job, "GpuMerger", Faulty)
    monkeypatch.setattr(runner.worker.merge.job, "ShardWriter", lambda root, *, buffer_bytes, is_pinned: ShardWriter(
        root, buffer_bytes=buffer_bytes
    ))  # fmt: skip
    merged = merge(prepare(base, adapter, dtype="auto"), into=tmp_path / "gpu", device="cuda")

    assert merged.digest == expected
    assert merged.note == "All sums are made on the CPU: the GPU gave other bits than PEFT."


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none")
def test_a_merge_on_the_gpu_has_the_digest_of_one_on_the_cpu(tmp_path: Path) -> None:
    base, adapter = _large(tmp_path)
    expected = merge(prepare(base, adapter, dtype="auto"), into=tmp_path / "cpu")

    merged = merge(prepare(base, adapter, dtype="auto"), into=tmp_path / "gpu", device="cuda")

    assert merged.note == "", "the GPU's sums have other bits, and the CPU made them"
    assert merged.digest == expected.digest
