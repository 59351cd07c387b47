"""Merges rounded by chance: judged right with their seed, and anything else than the chosen neighbour is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoKrConfig

from runner.judge.judge import judge
from runner.protocol.digests import MergedCheckpoint
from runner.protocol.rounding import STOCHASTIC, Rounding
from runner.protocol.verdict import Layer, Status, Verdict
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from tests.judge.faults import damage_mantissa_bit, damage_scale
from tests.judge.tiny import lora, save_adapter

SEED = Rounding(kind=STOCHASTIC, seed=11)
Merged = tuple[Path, Path, Path]


def _merge(base: Path, adapter: Path, into: Path, rounding: Rounding = SEED, dtype: str = "auto") -> MergedCheckpoint:
    return merge(prepare(base, adapter, dtype=dtype, rounding=rounding), into=into)


def _judge(base: Path, adapter: Path, merged: Path, rounding: Rounding = SEED, dtype: str = "auto") -> Verdict:
    return judge(base=base, adapter=adapter, merged=merged, dtype=dtype, rounding=rounding)


@pytest.fixture(scope="module")
def drawn(weak: Merged, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    base, adapter, _ = weak
    merged = tmp_path_factory.mktemp("drawn") / "merged"
    _merge(base, adapter, merged)
    return base, adapter, merged


def test_a_weak_adapter_survives_and_passes(drawn: Merged) -> None:
    verdict = _judge(*drawn)
    assert verdict.status is Status.PASS
    assert verdict.quality is not None
    assert 0.9 < verdict.quality.retention < 1.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_and_tuners_pass_too(bases: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    config = LoKrConfig(r=4, alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], config)
    _merge(bases["llama"], adapter, tmp_path / "merged", dtype=dtype)
    assert _judge(bases["llama"], adapter, tmp_path / "merged", dtype=dtype).passed


def test_equal_seeds_give_equal_bytes_and_others_do_not(drawn: Merged, tmp_path: Path) -> None:
    base, adapter, merged = drawn
    again = _merge(base, adapter, tmp_path / "again")
    other = _merge(base, adapter, tmp_path / "other", Rounding(kind=STOCHASTIC, seed=12))
    for file in again.files:
        assert (tmp_path / "again" / file.path).read_bytes() == (merged / file.path).read_bytes()
    assert again.digest != other.digest


@pytest.mark.parametrize("rounding", [Rounding(), Rounding(kind=STOCHASTIC, seed=12)])
def test_another_rounding_than_the_one_asked_for_fails(drawn: Merged, rounding: Rounding) -> None:
    verdict = _judge(*drawn, rounding)
    assert verdict.status is Status.FAIL
    assert any(check.layer is Layer.STORAGE and "ulp off" in check.detail for check in verdict.failures)


def test_without_its_seed_every_neighbour_passes_and_nothing_else(
    drawn: Merged, copy_of: Callable[[Path], Path]
) -> None:
    base, adapter, merged = drawn
    unknown = Rounding(kind=STOCHASTIC, seed=None)
    assert _judge(base, adapter, merged, unknown).status is Status.PASS
    damaged = copy_of(merged)
    damage_mantissa_bit(damaged, base, adapter)
    assert _judge(base, adapter, damaged, unknown).status is Status.FAIL


def test_a_nearest_merge_is_not_taken_for_one_by_chance(weak: Merged) -> None:
    assert _judge(*weak).status is Status.FAIL


def test_a_wrong_scale_is_caught(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases["llama"], lora())
    _merge(bases["llama"], adapter, tmp_path / "merged")
    damage_scale(tmp_path / "merged", bases["llama"], adapter)
    assert _judge(bases["llama"], adapter, tmp_path / "merged").status is Status.FAIL
