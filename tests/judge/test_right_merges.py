"""No false alarms: right merges of every kind of adapter, in every output dtype, pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.judge.judge import judge
from runner.judge.quality import continuations
from runner.protocol.verdict import Outcome, Status
from tests.judge.conftest import Maker
from tests.judge.merges import save_merge
from tests.judge.tiny import BASES, lora, save_adapter, save_base
from tests.judge.variants import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_a_right_merge_in_the_base_dtype(right_merge: Maker, variant: str) -> None:
    base, adapter, merged = right_merge(variant)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert verdict.failures == ()
    assert verdict.passed
    assert not any(check.outcome is Outcome.SKIPPED for check in verdict.checks)
    assert verdict.modules


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("variant", ["lora", "high_rank", "bias_all", "conv1d", "tied_head", "dora", "oft", "pissa"])
def test_passes_a_right_merge_in_a_requested_dtype(right_merge: Maker, variant: str, dtype: str) -> None:
    base, adapter, merged = right_merge(variant, dtype)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype=dtype)
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_passes_whatever_dtypes_base_and_adapter_are_stored_in(
    tmp_path: Path, base_dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", "qwen2", dtype=base_dtype)
    adapter = save_adapter(tmp_path / "adapter", base, lora(bias="all"), dtype=adapter_dtype)
    for dtype in ("auto", "bfloat16"):
        merged = save_merge(tmp_path / dtype, base, adapter, dtype=dtype)
        verdict = judge(base=base, adapter=adapter, merged=merged, dtype=dtype)
        assert verdict.failures == ()


@pytest.mark.parametrize("seed", range(4))
def test_passes_for_any_seed_of_weights_and_probes(tmp_path: Path, seed: int) -> None:
    base = save_base(tmp_path / "base", list(BASES)[seed], seed=seed)
    targets = ["c_attn", "c_fc"] if seed == 2 else "all-linear"
    adapter = save_adapter(tmp_path / "adapter", base, lora(target_modules=targets), seed=100 + seed)
    merged = save_merge(tmp_path / "merged", base, adapter)
    assert judge(base=base, adapter=adapter, merged=merged, dtype="auto", seed=seed).passed


def test_passes_a_vocabulary_that_the_adapter_enlarges(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "tied")
    adapter = save_adapter(tmp_path / "adapter", base, lora(modules_to_save=["embed_tokens", "lm_head"]), rows=326)
    merged = save_merge(tmp_path / "merged", base, adapter, rows=326)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert verdict.failures == ()
    assert verdict.passed


def test_passes_without_a_tokenizer(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / file).unlink()
    adapter = save_adapter(tmp_path / "adapter", base, lora())
    merged = save_merge(tmp_path / "merged", base, adapter)
    verdict = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    assert verdict.status is Status.PASS
    assert verdict.quality is not None
    assert verdict.quality.tokens > 0


def test_reports_what_the_adapter_does_and_what_rounding_costs(
    right_merge: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "NEW_TOKENS", 24)  # four random ones may have no text
    base, adapter, merged = right_merge("lora")
    said: list[tuple[str, float]] = []
    verdict = judge(
        base=base,
        adapter=adapter,
        merged=merged,
        dtype="auto",
        prompts=["One, two,", '{"messages":[{"role":"user","content":"Hello?"}]}'],
        on_progress=lambda what, share: said.append((what, share)),
    )
    quality = verdict.quality
    assert quality is not None
    assert 0.9 < quality.retention < 1.1
    assert (quality.kl_base_mean_nats or 0) > 100 * (quality.kl_mean_nats or 0) > 0
    assert quality.effect > 0.01 > quality.effect_error * quality.effect
    assert [spoken.prompt for spoken in verdict.continuations][:2] == ["One, two,", "Hello?"]
    assert all(spoken.merged and spoken.base for spoken in verdict.continuations)
    assert len(verdict.modules) == 14
    assert all(row.probe_error is not None and row.probe_error < 1e-9 < row.delta_ratio for row in verdict.modules)
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_gives_the_same_verdict_twice(right_merge: Maker) -> None:
    base, adapter, merged = right_merge("patterns")
    first, second = (judge(base=base, adapter=adapter, merged=merged, dtype="auto", seed=5) for _ in range(2))
    assert first.checks == second.checks
    assert first.modules == second.modules
    assert first.quality == second.quality
