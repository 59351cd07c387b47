"""Adapters of gpt-oss in 4 bits, with a layer for each expert, on the 16-bit base that stacks them.

They are written by hand; the oracle is W[i] + s·(B_i·A_i)ᵀ for each expert.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.judge.judge import judge
from runner.protocol.errors import AdapterMismatch, RunnerError, UnsupportedAdapter
from runner.protocol.verdict import Status
from runner.worker.merge.prepare import prepare
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

GPT_OSS = "GptOssForCausalLM"
# Square experts, too: there the shapes do not tell which way round a factor is.
SIZES = {"down is square": 32, "none is square": 24, "gate and up are square": 16}
EXPERTS, WIDTH, RANK = 4, 32, 4
TARGETS = ["q_proj", *(f"{name}.{expert}" for name in ("gate_up_projs", "down_projs") for expert in range(EXPERTS))]
# What "all-linear" leaves in the config of such a training: the last part of every path.
ALL_LINEAR = ["q_proj", *map(str, range(EXPERTS))]


def _base(folder: Path, size: int) -> Path:
    fields = {**structures.TEXT_MODELS[GPT_OSS], "intermediate_size": size}
    return models.save_base(structures.build(GPT_OSS, fields), folder, dtype=torch.bfloat16, shard="1GB")


def _write(base: Path, folder: Path, *, experts: range = range(EXPERTS), **config: Any) -> dict[str, torch.Tensor]:
    """Write the adapter, and return what the tensors that it changes must be, in float64."""
    torch.manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    scaling = 2 * RANK / RANK
    for name, weight in oracle.read_folder(base).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj", "q_proj.weight")):
            continue
        wanted[name] = weight.double()
        paths = [f"{name}s.{expert}" for expert in experts] if weight.ndim == 3 else [name.removesuffix(".weight")]
        for expert, path in zip(experts, paths, strict=False):
            rows, columns = weight.shape if weight.ndim == 2 else reversed(weight.shape[1:])
            a, b = torch.randn(RANK, columns) * 0.2, torch.randn(rows, RANK) * 0.2
            tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            delta = scaling * (b.double() @ a.double())
            if weight.ndim == 2:
                wanted[name] += delta
            else:
                wanted[name][expert] += delta.T
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.17.1", "r": RANK, "lora_alpha": 2 * RANK,
        "target_modules": TARGETS, "lora_dropout": 0.05, "base_model_name_or_path": "somebody/gpt-oss-20b-bnb-4bit",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return wanted


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    "targets", [TARGETS, ALL_LINEAR, r".*(q_proj|gate_up_projs\.\d+|down_projs\.\d+)"], ids=["list", "all", "pattern"]
)
@pytest.mark.parametrize("size", SIZES)
def test_each_expert_takes_what_its_layer_learnt(size: str, targets: Any, dtype: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", SIZES[size])
    wanted = _write(base, tmp_path / "adapter", target_modules=targets)

    plan, merged = run_merge(base, tmp_path / "adapter", tmp_path / "merged", dtype=dtype)

    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    for name, tensor in after.items():
        if name in wanted:
            assert not torch.equal(tensor.float(), before[name].float())
            torch.testing.assert_close(
                tensor.double(), wanted[name], rtol=2**-8 if dtype == "auto" else 1e-6, atol=1e-6
            )
        else:
            assert torch.equal(tensor.float(), before[name].float()), name
    assert any("a layer for each expert" in note for note in plan.summary.notes)
    verdict = judge(base=base, adapter=tmp_path / "adapter", merged=merged.root, dtype=dtype)
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


def test_an_expert_that_was_not_trained_stays_as_it_was(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 24)
    targets = [name for name in TARGETS if not name.endswith(("s.0", "s.3"))]
    wanted = _write(base, tmp_path / "adapter", experts=range(1, 3), target_modules=targets)

    _, merged = run_merge(base, tmp_path / "adapter", tmp_path / "merged")

    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    for name in wanted:
        torch.testing.assert_close(after[name].double(), wanted[name], rtol=2**-8, atol=1e-6)
        if after[name].ndim == 3:
            assert torch.equal(after[name][[0, 3]], before[name][[0, 3]])
    assert judge(base=base, adapter=tmp_path / "adapter", merged=merged.root, dtype="auto").passed


FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "experts that changed places": lambda before, after: after.roll(1, 0) - before.roll(1, 0) + before,
    "2 % too much": lambda before, after: before + 1.02 * (after - before),
    "one expert left out": lambda before, after: torch.cat([before[:1], after[1:]]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_stack_fails(fault: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 32)
    _write(base, tmp_path / "adapter")
    _, merged = run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    path, name = merged.root / "model.safetensors", "model.layers.1.mlp.experts.down_proj"
    tensors, before = load_file(path), oracle.read_folder(base)[name]
    wrong = FAULTS[fault](before.float(), tensors[name].float()).to(torch.bfloat16)
    save_file({**tensors, name: wrong.contiguous()}, path, {"format": "pt"})

    verdict = judge(base=base, adapter=tmp_path / "adapter", merged=merged.root, dtype="auto")
    assert any(name in check.detail for check in verdict.failures)


def test_an_expert_that_the_config_targets_and_the_file_lacks_is_refused(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 24)
    _write(base, tmp_path / "adapter", experts=range(1, 4))

    with pytest.raises(AdapterMismatch, match=r"has no tensor for '.*_projs\.0', which its config targets"):
        prepare(base, tmp_path / "adapter", dtype="auto")


def test_half_of_a_pair_is_refused(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 24)
    _write(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.0.mlp.experts.down_projs.2.lora_B.weight"]
    save_file(tensors, path)

    with pytest.raises(AdapterMismatch, match=r"has no tensor '.*down_projs\.2\.lora_B\.weight'"):
        prepare(base, tmp_path / "adapter", dtype="auto")


def test_experts_of_another_base_are_refused(tmp_path: Path) -> None:
    _write(_base(tmp_path / "other", 16), tmp_path / "adapter")
    base = _base(tmp_path / "base", 24)

    with pytest.raises(AdapterMismatch, match="and this base's experts need"):
        prepare(base, tmp_path / "adapter", dtype="auto")


def test_experts_that_are_scaled_differently_are_refused_by_both(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 24)
    _write(base, tmp_path / "adapter", alpha_pattern={r"down_projs\.1": 32})

    with pytest.raises(UnsupportedAdapter, match="have different alphas: 8 to 32"):
        prepare(base, tmp_path / "adapter", dtype="auto")
    with pytest.raises(RunnerError, match="scales the experts of"):
        judge(base=base, adapter=tmp_path / "adapter", merged=base, dtype="auto")


def test_a_pattern_of_all_experts_counts(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", 24)
    _write(base, tmp_path / "plain")
    _write(base, tmp_path / "adapter", alpha_pattern={r"experts\.down_projs\.\d+": 4 * RANK})

    _, plain = run_merge(base, tmp_path / "plain", tmp_path / "once", dtype="float32")
    _, merged = run_merge(base, tmp_path / "adapter", tmp_path / "twice", dtype="float32")

    name = "model.layers.0.mlp.experts.down_proj"
    before, once, twice = (oracle.read_folder(folder)[name].double() for folder in (base, plain.root, merged.root))
    torch.testing.assert_close(twice - before, 2 * (once - before), rtol=1e-4, atol=1e-6)
    assert judge(base=base, adapter=tmp_path / "adapter", merged=merged.root, dtype="float32").passed
