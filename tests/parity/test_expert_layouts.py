"""Expert factors in every layout that programs have written: merged as what they mean, and judged; or refused by name.

The adapters here are written by hand, expert by expert, from factors that the test draws; the oracle is
W[e] + s·B_e·A_e of those factors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from runner.judge.judge import judge
from runner.protocol.errors import BrokenAdapter, UnsupportedAdapter
from runner.protocol.verdict import Status
from runner.worker.merge.prepare import prepare
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

RANK, SCALING = 8, 2.0
PREFIX = "base_model.model.model.layers"
WEIGHTS = "adapter_model.safetensors"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# The factors that mean something: by layer and parameter, B (experts, m, rank) and A (experts, rank, n).
Factors = Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One way to write the factors.

    Attributes:
        architecture: of the base.
        width: of an expert's inner layer; the hidden size is 32.
        transposed: whether A and B are the other way round.
        grouped: whether the columns of B are grouped by expert.
        rank: of each expert's factors.
        fields: of adapter_config.json.
        parameters: that the adapter targets.
    """

    architecture: str = "Qwen3MoeForCausalLM"
    width: int = 24
    transposed: bool = False
    grouped: bool = False
    rank: int = RANK
    fields: Mapping[str, Any] = field(default_factory=lambda: {"peft_version": "0.21.2"})
    parameters: tuple[str, ...] = tuple(BOTH)


_GROUPED = {"lora_B_layout": "grouped_by_expert", "peft_version": "0.18.1"}
_GROUPED_NOW = {"lora_B_layout": "grouped_by_expert", "peft_version": "0.21.2"}
_OLD = {"peft_version": "0.18.1"}
_SQUARE = (BOTH[0],)
CASES = {
    "as_peft_writes_them": Case(),
    "rank_major_marker": Case(fields={"lora_B_layout": "rank_major", "peft_version": "0.21.2"}),
    "rank_major_marker_unsloth": Case(
        fields={"lora_B_layout": "rank_major", "peft_version": "0.21.2", "auto_mapping": {"unsloth_fixed": True}}
    ),
    "grouped": Case(grouped=True, fields={**_GROUPED, "peft_version": "0.21.2"}),
    "grouped_rank_is_experts": Case(grouped=True, rank=4, fields={**_GROUPED, "peft_version": "0.21.2"}),
    "grouped_mixtral": Case(
        architecture="MixtralForCausalLM", grouped=True, fields={**_GROUPED, "peft_version": "0.21.2"}
    ),
    "grouped_gpt_oss": Case(architecture="GptOssForCausalLM", transposed=True, grouped=True, fields=_GROUPED),
    "peft_0_18": Case(transposed=True, fields=_OLD),
    "peft_0_18_grouped": Case(transposed=True, grouped=True, fields=_GROUPED),
    "peft_0_18_narrow": Case(width=8, transposed=True, fields=_OLD),
    "peft_0_18_down_is_square": Case(width=32, transposed=True, fields=_OLD),
    "peft_0_18_gate_up_is_square": Case(width=16, transposed=True, fields=_OLD),
    "peft_0_18_only_square": Case(width=16, transposed=True, fields=_OLD, parameters=_SQUARE),
    "peft_0_19_0_only_square": Case(width=16, transposed=True, fields={"peft_version": "0.19.0"}, parameters=_SQUARE),
    "peft_0_19_1_only_square": Case(width=16, fields={"peft_version": "0.19.1"}, parameters=_SQUARE),
    "gpt_oss": Case(architecture="GptOssForCausalLM", transposed=True, fields=_OLD),
    "gpt_oss_peft_0_19_0": Case(architecture="GptOssForCausalLM", fields={"peft_version": "0.19.0"}),
    "gpt_oss_down_is_square": Case(architecture="GptOssForCausalLM", width=32, fields={"peft_version": "0.19.1"}),
    "no_version": Case(transposed=True, fields={}),
}


def _build(case: Case) -> PreTrainedModel:
    fields = dict(structures.TEXT_MODELS[case.architecture])
    inner = "moe_intermediate_size" if "Qwen" in case.architecture else "intermediate_size"
    model_class = getattr(transformers, case.architecture)
    torch.manual_seed(7)
    return model_class(model_class.config_class(**{**fields, inner: case.width})).eval()


def _write(case: Case, model: PreTrainedModel, folder: Path) -> Factors:
    """Write the adapter of the case, and return what its factors mean."""
    torch.manual_seed(3)
    meant: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for parameter in case.parameters:
            leaf = parameter.rpartition(".")[2]
            experts, m, n = model.get_parameter(f"model.layers.{layer}.{parameter}").shape
            b, a = torch.randn(experts, m, case.rank) * 0.1, torch.randn(experts, case.rank, n) * 0.1
            meant[layer, leaf] = b, a
            inside = ".base_layer" if leaf == "gate_up_proj" and len(case.parameters) > 1 else ""
            under = f"{PREFIX}.{layer}.mlp.experts{inside}"
            first, second = (b.transpose(1, 2), a.transpose(1, 2)) if case.transposed else (a, b)
            columns = torch.empty(second.shape[1], experts * case.rank)
            for expert in range(experts):
                at = (
                    slice(expert * case.rank, (expert + 1) * case.rank)
                    if case.grouped
                    else slice(expert, None, experts)
                )
                columns[:, at] = second[expert]
            tensors[f"{under}.lora_A.weight"] = torch.cat(list(first)).contiguous()
            tensors[f"{under}.lora_B.weight"] = columns
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": case.rank, "lora_alpha": case.rank * SCALING,
        "target_modules": [], "target_parameters": list(case.parameters), **case.fields,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return meant


def _expected(base: Path, meant: Factors) -> dict[str, torch.Tensor]:
    model = oracle.load(base)
    with torch.no_grad():
        for (layer, leaf), (b, a) in meant.items():
            parameter = model.get_parameter(f"model.layers.{layer}.mlp.experts.{leaf}")
            for expert in range(parameter.shape[0]):
                parameter[expert] += (b[expert].double() @ a[expert].double() * SCALING).float()
    return dict(oracle.reverted(model))


@pytest.mark.parametrize("name", CASES)
def test_every_layout_is_merged_as_what_it_means_and_judged(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = _build(case)
    meant = _write(case, model, tmp_path / "adapter")
    base = models.save_base(model, tmp_path / "base", dtype=torch.float32, shard="30KB")

    _, merged = run_merge(base, tmp_path / "adapter", tmp_path / "merged")

    expected, after = _expected(base, meant), oracle.read_folder(merged.root)
    before = oracle.read_folder(base)
    assert after.keys() == expected.keys()
    for key, tensor in after.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)
    assert sum(float((after[key] - before[key]).abs().max()) > 0.05 for key in after) >= 2 * len(case.parameters)
    verdict = judge(base=base, adapter=tmp_path / "adapter", merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


@pytest.mark.parametrize("name", ["grouped", "peft_0_18_only_square"])
def test_the_judge_fails_a_merge_of_the_other_layout(name: str, tmp_path: Path) -> None:
    model = _build(CASES[name])
    _write(CASES[name], model, tmp_path / "adapter")
    base = models.save_base(model, tmp_path / "base", dtype=torch.bfloat16, shard="30KB")
    config = tmp_path / "adapter" / "adapter_config.json"
    right = config.read_text()

    config.write_text(json.dumps({**json.loads(right), "lora_B_layout": "rank_major", "peft_version": "0.21.2"}))
    _, merged = run_merge(base, tmp_path / "adapter", tmp_path / "merged")
    config.write_text(right)
    verdict = judge(base=base, adapter=tmp_path / "adapter", merged=merged.root, dtype="auto")

    assert verdict.status is Status.FAIL


UNKNOWN: dict[str, tuple[Case, str]] = {
    "a marker that nobody knows": (Case(fields={"lora_B_layout": "shuffled", "peft_version": "0.21.2"}), "'shuffled'"),
    "square experts without a version": (Case(width=16, fields={}, parameters=_SQUARE), "names no PEFT version"),
    "square experts between versions": (
        Case(width=16, fields={"peft_version": "0.19.1.dev0@ab12"}, parameters=_SQUARE), r"0\.19\.1\.dev0@ab12",
    ),
    "Unsloth without a marker": (
        Case(fields={"peft_version": "0.18.1", "auto_mapping": {"unsloth_fixed": True}}, transposed=True), "Unsloth",
    ),
    "Unsloth's copy of a base without a marker": (
        Case(fields={"peft_version": "0.21.2", "base_model_name_or_path": "unsloth/Qwen3-30B-A3B"}), "Unsloth",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_layout_that_cannot_be_told_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case, text = UNKNOWN[name]
    model = _build(case)
    _write(case, model, tmp_path / "adapter")
    base = models.save_base(model, tmp_path / "base", dtype=torch.bfloat16, shard="30KB")

    with pytest.raises(UnsupportedAdapter, match=text):
        prepare(base, tmp_path / "adapter", dtype="auto")
    with pytest.raises(UnsupportedAdapter, match=text):
        judge(base=base, adapter=tmp_path / "adapter", merged=base, dtype="auto")


def _other_sizes(tensors: dict[str, torch.Tensor]) -> None:
    name = min(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()


def _both_ways(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = tensors[other].T.contiguous(), tensors[name].T.contiguous()


@pytest.mark.parametrize(
    ("damage", "text"), [(_other_sizes, "do not fit a stack"), (_both_ways, "the other way round")]
)
def test_factors_that_contradict_the_base_or_each_other_are_refused(damage: Any, text: str, tmp_path: Path) -> None:
    model = _build(CASES["as_peft_writes_them"])
    _write(CASES["as_peft_writes_them"], model, tmp_path / "adapter")
    base = models.save_base(model, tmp_path / "base", dtype=torch.bfloat16, shard="30KB")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)

    with pytest.raises(BrokenAdapter, match=text):
        prepare(base, tmp_path / "adapter", dtype="auto")
