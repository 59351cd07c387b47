"""E of experts, whether they are stored one by one or as a stack, against PEFT's own merge in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from runner.files.layout import SINGLE_FILE, read_checkpoint
from runner.judge.case import open_case
from runner.judge.expected.elements import Stored
from runner.judge.expected.exact import UNIT, ExactLowRank
from runner.judge.expected.experts import ExactExperts, ExpertRule, factors
from runner.judge.expected.fused import ExactConverted
from runner.judge.expected.recipe import Recipe
from tests.parity import models, oracle, structures

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Built = tuple[Callable[[], PreTrainedModel], dict[str, Any], type]  # the last: how E of an expert is made
CASES: dict[str, Built] = {
    "mixtral": (models.mixtral, {"target_parameters": BOTH, "target_modules": ["q_proj"]}, ExactLowRank),
    "mixtral, the router too": (
        models.mixtral,
        {"target_parameters": [*BOTH, "mlp.gate.weight"], "use_rslora": True},
        ExactLowRank,
    ),
    "mixtral, whole experts": (
        models.mixtral,
        {"modules_to_save": ["experts"], "target_modules": ["q_proj"]},
        ExactConverted,
    ),
    "qwen3": (partial(structures.build, "Qwen3MoeForCausalLM"), {"target_parameters": BOTH[1:]}, ExactLowRank),
    "gpt-oss": (
        partial(structures.build, "GptOssForCausalLM"),
        {"target_parameters": BOTH, "lora_alpha": 3},
        ExactExperts,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_expert_is_what_peft_merges_within_the_bound(name: str, tmp_path: Path) -> None:
    build, fields, kind = CASES[name]
    base = models.save_base(build(), tmp_path / "base", dtype=torch.bfloat16)
    config = LoraConfig(**{"r": 3, "lora_alpha": 8, "target_modules": [], "task_type": "CAUSAL_LM", **fields})
    adapter = models.save_adapter(base, tmp_path / "adapter", config)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {stored: tensor.clone() for stored, tensor in oracle.reverted(plain).items()}
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload(safe_merge=False)
    after, fused = oracle.reverted(merged), merged.state_dict()

    with open_case(base, adapter, dtype="auto") as case:
        assert case.targets.unmapped == ()
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert changed == {target.stored for target in case.targets.touched}
        for target in case.targets.touched:
            exact = case.sources.exact_of(target.key, target.base)
            assert exact.shape == target.shape == tuple(after[target.stored].shape)
            rows = exact.rows(0, target.shape[0])
            error = (after[target.stored].double() - rows).abs()
            single, half = (exact.noise(0, target.shape[0], output_is_float32=is_32) for is_32 in (True, False))
            assert bool((error <= single + UNIT * rows.abs()).all())
            assert bool((single < 2e-6).all())
            assert bool((single <= half).all())
            assert torch.allclose(exact.rows(1, 3), rows[1:3], rtol=0.0, atol=1e-13)
            assert torch.allclose(exact.noise(1, 3, output_is_float32=False), half[1:3], rtol=1e-12, atol=0.0)
            assert "experts" not in target.stored or type(exact) is kind
            if isinstance(exact, ExactExperts):
                assert bool((half - single - UNIT * rows.abs() < 1e-12).all())
        for key in case.sources.keys:
            if fused[key].ndim == 3:
                for expert in range(len(fused[key])):
                    difference = case.sources.matrix(key, expert) - fused[key][expert].double()
                    assert float(difference.abs().max()) < 1e-6


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_grouped", [False, True])
def test_the_factors_of_an_expert_by_every_packing(tmp_path: Path, is_transposed: bool, is_grouped: bool) -> None:
    experts, rank, rows, columns = 3, 2, 5, 4
    generator = torch.Generator().manual_seed(6)
    lefts = [torch.randn(rows, rank, generator=generator) for _ in range(experts)]
    rights = [torch.randn(rank, columns, generator=generator) for _ in range(experts)]
    first, second = ([r.T for r in lefts], [r.T for r in rights]) if is_transposed else (rights, lefts)
    packed = torch.empty(second[0].shape[0], experts * rank)
    for expert, factor in enumerate(second):
        for number in range(rank):
            packed[:, expert * rank + number if is_grouped else number * experts + expert] = factor[:, number]
    stack = torch.randn(experts, rows, columns, generator=generator)
    save_file({"a": torch.cat(first), "b": packed, "w": stack}, tmp_path / SINGLE_FILE)
    tensors = read_checkpoint(tmp_path).tensors
    rule = ExpertRule(
        a="a", b="b", scaling=0.5, experts=experts, is_transposed=is_transposed, is_grouped=is_grouped
    )  # fmt: skip
    recipe = Recipe(
        root=tmp_path, peft_type="LORA", config={}, tensors=tensors, rules={}, stored={}, others=(), redundant=()
    )
    exact = ExactExperts(Stored(root=tmp_path, info=tensors["w"]), rule, recipe)

    for expert, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        assert all(map(torch.equal, factors(rule, recipe, expert), (left, right)))
    products = torch.stack([b.double() @ a.double() for b, a in zip(lefts, rights, strict=True)])
    sizes = torch.stack([b.double().abs() @ a.double().abs() for b, a in zip(lefts, rights, strict=True)])
    whole = stack.double() + 0.5 * products
    assert torch.allclose(exact.rows(1, 3), whole[1:], rtol=0.0, atol=1e-14)
    for is_float32 in (False, True):
        bound = UNIT * ((rank + 2) * 0.5 * sizes + (0 if is_float32 else whole.abs()))
        assert torch.allclose(exact.noise(1, 3, output_is_float32=is_float32), bound[1:], rtol=1e-12, atol=0.0)
