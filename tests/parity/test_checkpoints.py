"""Bases as people keep them: merged as PEFT merges them, what no class knows kept byte for byte, and judged.

The oracle is the merge of the same base before the folder was made untidy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.judge.judge import judge
from runner.protocol.errors import UnsupportedCheckpoint
from runner.protocol.verdict import Layer, Status
from runner.worker.merge.prepare import prepare
from tests.parity import models, oracle
from tests.parity.cases import lora
from tests.parity.pipeline import run_merge

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EXTRA = {
    "mtp.layers.0.proj.weight": torch.randn(5, 7).bfloat16(),
    "mtp.layers.0.norm.weight": torch.randn(7),
    "mtp.embed_tokens.weight": torch.randn(3, 7).half(),
    "mtp.fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "mtp.double": torch.randn(3).double(),
    "mtp.indices": torch.arange(4),
    "mtp.mask": torch.tensor([True, False]),
    "mtp.empty": torch.empty(0, 3),
    "mtp.scalar": torch.tensor(2.5),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(6),
}


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def _unknown_tensors(base: Path) -> None:
    path = max(base.glob("model-*.safetensors"))
    _write_shard(path, {**load_file(path), **EXTRA})
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(EXTRA, path.name)
    (base / INDEX).write_text(json.dumps(index))


def _single_file(base: Path) -> None:
    tensors = oracle.read_folder(base)
    for path in base.glob("model*"):
        path.unlink()
    _write_shard(base / SINGLE, tensors)


def _single_file_with_an_index(base: Path) -> None:
    _single_file(base)
    weight_map = dict.fromkeys(load_file(base / SINGLE), SINGLE)
    (base / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def _single_file_beside_old_shards(base: Path) -> None:
    old = {path.name: path.read_bytes() for path in base.glob("model*")}
    _single_file(base)
    for name, content in old.items():
        (base / name).write_bytes(content)
    first = min(base.glob("model-*.safetensors"))
    _write_shard(first, {name: torch.zeros_like(tensor) for name, tensor in load_file(first).items()})


def _one_shard_with_an_index(base: Path) -> None:
    _single_file(base)
    name = "model-00001-of-00001.safetensors"
    (base / SINGLE).rename(base / name)
    tensors = load_file(base / name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (base / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict.fromkeys(tensors, name)})
    )


def _stale_and_foreign_weights(base: Path) -> None:
    first = min(base.glob("model-*.safetensors"))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(first).items()}
    _write_shard(base / "model-00001-of-00099.safetensors", zeros)
    _write_shard(base / "consolidated.safetensors", zeros)
    (base / "consolidated.safetensors.index.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"never read")
    (base / "model.gguf").write_bytes(b"GGUF")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_bytes(b"never read")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_bytes(b"x")


def _an_adapter_beside(base: Path) -> None:
    config = lora(target_modules=["o_proj"], task_type="CAUSAL_LM")
    other = models.save_adapter(base, base.parent / "other", config, seed=9, scale=0.5)
    for path in other.iterdir():
        shutil.copy(path, base / path.name)


def _code_beside(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    (base / "config.json").write_text(json.dumps(config))
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        marker = base.parent / "ran"
        (base / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit(3)\n")


def _norms_in_float32(base: Path) -> None:
    for path in base.glob("model-*.safetensors"):
        tensors = load_file(path)
        wide = {
            name: tensor.float() for name, tensor in tensors.items() if "norm" in name or "layers.1.self_attn" in name
        }
        _write_shard(path, {**tensors, **wide})


def _invalid_generation_config(base: Path) -> None:
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9, "top_p": 0.5}')


@dataclass(frozen=True)
class Case:
    """One way to keep a base; `copied` files come along, `left` ones do not."""

    untidy: Callable[[Path], None]
    dtype: torch.dtype = torch.bfloat16
    copied: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


_FOREIGN = ("consolidated.safetensors", "consolidated.safetensors.index.json", "pytorch_model.bin", "model.gguf")
CASES = {
    "unknown tensors": Case(_unknown_tensors),
    "single file": Case(_single_file),
    "single file, fp16": Case(_single_file, torch.float16),
    "single file, fp32": Case(_single_file, torch.float32),
    "single file with an index": Case(_single_file_with_an_index, left=(INDEX,)),
    "single file beside old shards": Case(_single_file_beside_old_shards, left=(INDEX,)),
    "one shard with an index": Case(_one_shard_with_an_index, copied=(INDEX,)),
    "stale and foreign weights": Case(
        _stale_and_foreign_weights, left=(*_FOREIGN, "model-00001-of-00099.safetensors", "original", "onnx")
    ),
    "an adapter beside": Case(_an_adapter_beside, left=("adapter_config.json", "adapter_model.safetensors")),
    "code beside": Case(_code_beside, copied=("configuration_x.py", "modeling_x.py", "tokenization_x.py")),
    "norms in float32": Case(_norms_in_float32),
    "invalid generation config": Case(_invalid_generation_config, copied=("generation_config.json",)),
}


@pytest.mark.parametrize("name", CASES)
def test_an_untidy_base_is_merged_judged_and_loaded(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=case.dtype)
    config = lora(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapter = models.save_adapter(base, tmp_path / "adapter", config)
    expected = oracle.peft_merge(base, adapter)
    case.untidy(base)
    before = oracle.read_folder(base) if not (base / SINGLE).exists() else load_file(base / SINGLE)

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    after = load_file(merged.root / SINGLE) if (merged.root / SINGLE).exists() else oracle.read_folder(merged.root)
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        wanted = expected[key].to(tensor.dtype) if "q_proj" in key or "down_proj" in key else before[key]
        assert _bits(tensor) == _bits(wanted), key
    assert all((merged.root / path).read_bytes() == (base / path).read_bytes() for path in case.copied)
    assert not [path for path in case.left if (merged.root / path).exists()]
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS
    loaded = oracle.load(merged.root).state_dict()
    assert all(torch.equal(loaded[key], after[key].float()) for key in expected)
    assert not (tmp_path / "ran").exists(), "code of the base was run"


@pytest.mark.parametrize("lost", sorted(EXTRA))
def test_the_judge_fails_a_merge_that_lost_or_changed_a_tensor_that_no_class_knows(lost: str, tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16, shard="10MB")
    _write_shard(base / SINGLE, {**load_file(base / SINGLE), **EXTRA})
    adapter = models.save_adapter(base, tmp_path / "adapter", lora(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    _, merged = run_merge(base, adapter, tmp_path / "merged")
    tensors = load_file(merged.root / SINGLE)

    if tensors[lost].numel() and lost != "mtp.mask":
        tensors[lost] = tensors[lost].clone()
        tensors[lost].view(-1).view(torch.uint8)[0] ^= 1
    else:
        del tensors[lost]
    _write_shard(merged.root / SINGLE, tensors)
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")

    assert verdict.status is Status.FAIL
    assert {check.layer for check in verdict.failures} & {Layer.STRUCTURE, Layer.STORAGE}
    assert any(lost in check.detail for check in verdict.failures)


def test_a_base_that_needs_its_own_code_is_refused_and_not_run(tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16)
    adapter = models.save_adapter(base, tmp_path / "adapter", lora(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    _code_beside(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["XModel"], "model_type": "x"}))

    with pytest.raises(UnsupportedCheckpoint, match="'XModel'"):
        prepare(base, adapter, dtype="auto")
    assert not (tmp_path / "ran").exists()


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    raw = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.numpy().tobytes()
