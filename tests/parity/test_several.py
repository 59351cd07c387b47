"""Several adapters: the merge equals PEFT's `add_weighted_adapter` on the float32 base, merged and rounded once.

Beside PEFT as the oracle stand the definitions of the kinds, written once more in float64: PEFT's call is wrong
in some cases (each has a test that pins it), and there the definition decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from runner.protocol.combination import KINDS, RANDOM, Several
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from tests.parity import models, oracle
from tests.parity.pipeline import run_merge
from tests.parity.several import combination, defined, equals_peft, lora, peft_combination, save_all, sum_of_deltas


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_base(models.llama(tied=False), tmp_path_factory.mktemp("base") / "b", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return save_all(base, tmp_path_factory.mktemp("pair"), lora(), lora(lora_alpha=16))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_peft(kind: str, base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    several = Several(paths=pair, combination=combination(kind, 0.7, -0.4))

    plan, merged = run_merge(base, several, tmp_path / "merged")

    assert equals_peft(base, several, merged.root)
    assert any(kind in note for note in plan.summary.notes)


@pytest.mark.parametrize("kind", ["linear", "cat", "ties_svd"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_every_dtype_equals_peft(kind: str, stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=stored)
    config = lora(target_modules=["q_proj", "up_proj"])
    several = Several(paths=save_all(base, tmp_path, config, config), combination=combination(kind, 1.0, 0.5))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype=dtype)

    assert equals_peft(base, several, merged.root)


def _three() -> tuple[LoraConfig, ...]:
    return lora(), lora(target_modules=["q_proj"]), lora(target_modules=["up_proj", "v_proj"])


CASES: Mapping[str, tuple[Callable[[], tuple[LoraConfig, ...]], Sequence[str]]] = {
    "ranks": (lambda: (lora(r=2), lora(r=5)), ("cat", "svd", "ties_svd", "dare_linear_svd")),
    "modules": (lambda: (lora(target_modules=["q_proj"]), lora(target_modules=["v_proj", "q_proj"])), KINDS),
    "apart": (lambda: (lora(target_modules=["q_proj"]), lora(target_modules=["v_proj"])), ("linear", "cat", "svd")),
    "three": (_three, ("linear", "cat", "svd", "dare_ties")),
    "rank_pattern": (
        lambda: (lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}), lora(rank_pattern={"q_proj": 2})),
        ("linear", "cat", "ties"),
    ),
    "embeddings": (
        lambda: (lora(target_modules=["q_proj", "embed_tokens", "lm_head"]), lora(target_modules=["embed_tokens"])),
        ("linear", "cat", "svd"),
    ),
    "second_rslora": (lambda: (lora(), lora(use_rslora=True)), ("linear", "cat", "svd")),
    "expression": (
        lambda: (lora(target_modules=r".*\.0\..*q_proj"), lora(target_modules=r".*v_proj")),
        ("linear", "cat"),
    ),
}


@pytest.mark.parametrize("name, kind", [(name, kind) for name, (_, kinds) in CASES.items() for kind in kinds])
def test_every_shape_of_adapters_equals_peft(name: str, kind: str, base: Path, tmp_path: Path) -> None:
    adapters = save_all(base, tmp_path, *CASES[name][0]())
    weights = (0.7, -0.4, 1.5)[: len(adapters)]
    several = Several(paths=adapters, combination=combination(kind, *weights))

    _, merged = run_merge(base, several, tmp_path / "merged")

    assert equals_peft(base, several, merged.root)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "magnitude_prune"])
def test_conv1d_equals_peft(kind: str, tmp_path: Path) -> None:
    base = models.save_base(models.gpt2(), tmp_path / "base", dtype=torch.bfloat16)
    config = lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    several = Several(paths=save_all(base, tmp_path, config, config), combination=combination(kind, 0.7, -0.4))

    _, merged = run_merge(base, several, tmp_path / "merged")

    assert equals_peft(base, several, merged.root)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in RANDOM])
@pytest.mark.parametrize("weights", [(0.7, 0.4), (0.7, -0.4)], ids=str)
def test_every_kind_is_what_its_definition_says(
    kind: str, weights: tuple[float, float], base: Path, pair: tuple[Path, ...], tmp_path: Path
) -> None:
    several = Several(paths=pair, combination=combination(kind, *weights))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype="float32")

    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    for module, delta in defined(several, rank=4).items():
        found = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        assert float((found - delta).norm() / delta.norm()) < 1e-5, module


def test_only_cat_is_the_sum_of_the_deltas(base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    errors = {}
    for kind in ("cat", "linear", "svd"):
        several = Several(paths=pair, combination=combination(kind, 1.0, 1.0))
        _, merged = run_merge(base, several, tmp_path / kind, dtype="float32")
        before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
        errors[kind] = max(
            float((after[f"{module}.weight"].double() - before[f"{module}.weight"].double() - delta).norm())
            / float(delta.norm())
            for module, delta in sum_of_deltas(several).items()
        )

    assert errors["cat"] < 1e-5
    assert errors["linear"] > 0.5
    assert 0.01 < errors["svd"] < 0.9


def _check_sum(base: Path, several: Several, merged: Path) -> None:
    before, after = oracle.read_folder(base), oracle.read_folder(merged)
    wanted = sum_of_deltas(several)
    for name, tensor in before.items():
        found = after[name].double() - tensor.double()
        delta = wanted.pop(name.removesuffix(".weight"), torch.zeros_like(found))
        assert float((found - delta).norm()) <= 1e-5 * float(delta.norm()), name
    assert not wanted


def test_rslora_is_scaled_once_where_peft_scales_it_twice(base: Path, tmp_path: Path) -> None:
    adapters = save_all(base, tmp_path, lora(use_rslora=True), lora(use_rslora=True))
    several = Several(paths=adapters, combination=combination("cat", 1.0, 1.0))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype="float32")

    _check_sum(base, several, merged.root)
    assert not equals_peft(base, several, merged.root), "PEFT has repaired this: make it an equality"


@pytest.mark.parametrize(
    "first, second",
    [
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {"layers_to_transform": [1]}),
        ({"exclude_modules": ["v_proj"]}, {}),
    ],
)
def test_no_module_of_the_second_adapter_is_lost_where_peft_loses_it(
    first: dict[str, object], second: dict[str, object], base: Path, tmp_path: Path
) -> None:
    adapters = save_all(base, tmp_path, lora(**first), lora(**second))
    several = Several(paths=adapters, combination=combination("cat", 0.7, -0.4))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype="float32")

    _check_sum(base, several, merged.root)
    assert not equals_peft(base, several, merged.root), "PEFT has repaired this: make it an equality"


def test_lists_and_expressions_of_modules_are_combined_where_peft_refuses(base: Path, tmp_path: Path) -> None:
    adapters = save_all(base, tmp_path, lora(target_modules=r".*\.0\..*q_proj"), lora(target_modules=["v_proj"]))
    several = Several(paths=adapters, combination=combination("cat", 1.0, 1.0))

    _, merged = run_merge(base, several, tmp_path / "merged", dtype="float32")

    _check_sum(base, several, merged.root)
    with pytest.raises(ValueError, match="target modules type"):
        peft_combination(base, several)


@pytest.mark.parametrize("kind", RANDOM)
def test_dare_depends_on_its_seed_alone(kind: str, base: Path, pair: tuple[Path, ...], tmp_path: Path) -> None:
    digests = []
    for number, (seed, threads) in enumerate([(5, 1), (5, 2), (6, 1)]):
        torch.manual_seed(number)
        torch.set_num_threads(threads)
        several = Several(paths=pair, combination=combination(kind, 0.7, -0.4, seed=seed))
        digests.append(run_merge(base, several, tmp_path / str(number))[1].digest)

    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_the_same_without_the_work(
    kind: str, base: Path, pair: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = combination(kind, 0.7, -0.4)
    right = prepare(base, *pair, dtype="auto", combination=wanted).plan
    monkeypatch.delattr(torch.linalg, "svd")

    planned = prepare(base, *pair, dtype="auto", combination=wanted, only_plans=True)

    assert planned.plan == right
    with pytest.raises(ValueError, match="only_plans"):
        merge(planned, into=tmp_path / "merged")
