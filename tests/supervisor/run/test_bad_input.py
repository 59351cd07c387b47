"""Bad input gets one clear error before any heavy work, and nothing is written to the target."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hub.server import LocalHub
from tests.parity import models
from tests.security.damage import rewrite_header
from tests.supervisor.run.conftest import TARGET, Action, Result

Damage = Callable[[Path], None]
WEIGHTS = "adapter_model.safetensors"


def _edit_config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def _cut(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-100])

    return damage


def _pointer(name: str) -> Damage:
    def damage(folder: Path) -> None:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
        (folder / name).write_text(text)

    return damage


def _pickled_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def _remove_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].bfloat16()
    tensors[name][0, 0] = float("-inf")


def _foreign_key(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 48)


def _one_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def _wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.zeros(4, 64)


BAD_ADAPTERS: dict[str, tuple[Damage, int, str]] = {
    "no config": (_remove_config, 4, "adapter_config.json"),
    "pickled weights only": (_pickled_only, 4, "adapter_model.bin"),
    "config is no JSON": (_broken_config, 4, "JSON"),
    "truncated weights": (_cut(WEIGHTS), 4, "not a sound safetensors file"),
    "NaN": (_edit_tensors(_nan), 4, "NaN or Inf"),
    "Inf in bfloat16": (_edit_tensors(_infinite), 4, "NaN or Inf"),
    "a tensor that nothing takes": (_edit_tensors(_foreign_key), 4, "layers.99"),
    "a tensor is missing": (_edit_tensors(_one_missing), 4, "lora_B"),
    "made for another width": (_edit_tensors(_wrong_shape), 4, "size mismatch"),
    "prompt learning": (_edit_config(peft_type="PREFIX_TUNING"), 4, "PREFIX_TUNING"),
    "unknown method": (_edit_config(peft_type="NOVELTY"), 4, "NOVELTY"),
    "unknown field": (_edit_config(use_novelty=True), 4, "use_novelty"),
    "replicated layers": (_edit_config(layer_replication=[[0, 2], [0, 2]]), 4, "layer_replication"),
    "weights that git left as a pointer": (_pointer(WEIGHTS), 4, "Git LFS pointer"),
    "config that git left as a pointer": (_pointer("adapter_config.json"), 4, "Git LFS pointer"),
    "a task without its head": (_edit_config(task_type="SEQ_CLS"), 4, "ForSequenceClassification"),
    "targets that are not in the base": (_edit_config(target_modules=["w_pack"]), 4, "w_pack"),
}


def _header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite_header(min(folder.glob("model-*.safetensors")), change)


def _lying_offsets(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        entry = next(value for key, value in header.items() if key != "__metadata__")
        entry["data_offsets"][1] += 2

    _header(folder, change)


def _lying_shape(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        entry = next(value for key, value in header.items() if key != "__metadata__")
        entry["shape"] = [1, *entry["shape"]]

    _header(folder, change)


def _outside_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../../secrets.safetensors"
    path.write_text(json.dumps(index))


def _missing_shard(folder: Path) -> None:
    max(folder.glob("model-*.safetensors")).unlink()


def _pickled_base(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def _quantised_base(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    stem = "model.layers.0.self_attn.q_proj"
    packed = {f"{stem}.weight": torch.zeros(48, 12).to(torch.uint32), f"{stem}.scales": torch.ones(48, 1)}
    save_file(packed, folder / "model.safetensors")
    _base_config(quantization={"group_size": 48, "bits": 8})(folder)


def _adapter_base(folder: Path) -> None:
    for path in (*folder.glob("model*"), folder / "config.json"):
        path.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/theirs"}')
    (folder / "training_args.bin").write_bytes(b"\x80\x04")


def _only(name: str) -> Damage:
    def damage(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        (folder / name).write_bytes(b"GGUF")

    return damage


def _unindexed(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def _base_config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _cut_shard(folder: Path) -> None:
    _cut(min(folder.glob("model-*.safetensors")).name)(folder)


def _pointer_shard(folder: Path) -> None:
    _pointer(min(folder.glob("model-*.safetensors")).name)(folder)


BAD_BASES: dict[str, tuple[Damage, int, str]] = {
    "truncated shard": (_cut_shard, 5, "not a sound safetensors file"),
    "offsets that lie": (_lying_offsets, 5, "not a sound safetensors file"),
    "shape that lies": (_lying_shape, 5, "config.json asks for"),
    "index leads outside": (_outside_index, 5, "../../secrets.safetensors"),
    "missing shard": (_missing_shard, 5, "model-0000"),
    "pickled weights only": (_pickled_base, 5, "pytorch_model.bin"),
    "config of another size": (_base_config(hidden_size=64), 5, "config.json asks for"),
    "quantised": (_quantised_base, 5, "The base is quantised (mlx, 8 bits)"),
    "called quantised": (_base_config(quantization_config={"quant_method": "gptq"}), 5, "no tensor is quantised"),
    "an adapter": (_adapter_base, 5, "is an adapter, of the base 'someone/theirs', not a base model"),
    "GGUF only": (_only("model-Q4_K_M.gguf"), 5, "GGUF, the format of llama.cpp (model-Q4_K_M.gguf)"),
    "a variant only": (_only("model.fp16.safetensors"), 5, "only the variant 'fp16' of its weights"),
    "shards without their index": (_unindexed, 5, "and no model.safetensors.index.json"),
    "a shard that git left as a pointer": (_pointer_shard, 5, "Git LFS pointer"),
    "a tokenizer that git left as a pointer": (_pointer("tokenizer.json"), 5, "tokenizer.json is a Git LFS pointer"),
    "unknown architecture": (_base_config(architectures=["NoveltyForCausalLM"]), 5, "NoveltyForCausalLM"),
}


def _refused(result: Result, code: int, text: str, hub: LocalHub) -> None:
    assert result.code == code, result.log
    assert text in result.log
    assert "Traceback" not in result.log
    (problem,) = result.report["problems"]
    assert all(problem[part] for part in ("what", "why", "fix"))
    assert result.outputs["verified"] == "skipped"
    assert hub.repo(TARGET) is None


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_refuses_a_bad_adapter(name: str, action: Action, base: Path, adapter: Path, tmp_path: Path) -> None:
    damage, code, text = BAD_ADAPTERS[name]
    bad = shutil.copytree(adapter, tmp_path / "bad")
    damage(bad)

    _refused(action.publish(base, bad), code, text, action.hub)


@pytest.mark.parametrize("name", BAD_BASES)
def test_refuses_a_bad_base(name: str, action: Action, base: Path, adapter: Path, tmp_path: Path) -> None:
    damage, code, text = BAD_BASES[name]
    bad = shutil.copytree(base, tmp_path / "bad")
    damage(bad)

    _refused(action.publish(bad, adapter), code, text, action.hub)


def test_refuses_an_adapter_of_another_architecture(action: Action, adapter: Path, tmp_path: Path) -> None:
    other = models.save_base(models.gpt2(), tmp_path / "gpt2", dtype=torch.bfloat16)

    _refused(action.publish(other, adapter), 4, "q_proj", action.hub)


def test_tells_all_input_errors_at_once(action: Action) -> None:
    result = action.run("--dtype", "int3", "--mode", "publsh", "--adaptor-path", "x")

    assert result.code == 2, result.log
    for text in ("int3", "publsh", "adaptor-path", "adapter-path"):
        assert text in result.log


def test_refuses_a_token_that_may_only_read(action: Action, base: Path, adapter: Path) -> None:
    token = action.hub.add_token("alice", role="read")

    result = action.publish(base, adapter, token=token)

    _refused(result, 3, "read", action.hub)
    assert token not in result.log


def test_refuses_a_wrong_token(action: Action, base: Path, adapter: Path) -> None:
    wrong = "hf_" + "x" * 34

    result = action.publish(base, adapter, token=wrong)

    _refused(result, 3, "token", action.hub)
    assert wrong not in result.log
    assert wrong not in json.dumps(result.report)


def test_refuses_an_absent_repo_in_a_foreign_namespace(action: Action, base: Path, adapter: Path) -> None:
    result = action.run(
        "--adapter-path", str(adapter), "--base-model", str(base), "--target-repo", "bob/merged", "--tag", "v1"
    )

    assert result.code == 3, result.log
    assert "bob" in result.log
    assert action.hub.repo("bob/merged") is None


def test_refuses_cuda_without_a_gpu(action: Action, base: Path, adapter: Path) -> None:
    _refused(action.publish(base, adapter, "--device", "cuda"), 7, "no GPU", action.hub)


def test_refuses_when_the_disk_is_too_small(action: Action, base: Path, adapter: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        _refused(action.publish(base, adapter, "--work-dir", str(small)), 6, "work-dir", action.hub)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_refuses_an_adapter_whose_base_is_a_path(action: Action, adapter: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(adapter, tmp_path / "bad")
    _edit_config(base_model_name_or_path="/home/someone/llama")(bad)

    result = action.run("--adapter-path", str(bad), "--target-repo", TARGET, "--tag", "v1")

    _refused(result, 2, "/home/someone/llama", action.hub)
