"""Models that draw at random in evaluation, too: every variant draws the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig

from runner.judge.judge import judge
from runner.protocol.verdict import Layer, Status
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from tests.parity import models

REFORMER: Mapping[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "attention_head_size": 8, "num_attention_heads": 4, "feed_forward_size": 48,
    "num_hidden_layers": 2, "attn_layers": ["lsh", "local"], "is_decoder": True, "num_hashes": 2, "num_buckets": 4,
    "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "max_position_embeddings": 256, "axial_pos_embds": False,
    "tie_word_embeddings": False, "hash_seed": None,
}  # fmt: skip
VIT_MAE: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 48,
}  # fmt: skip
CASES: Mapping[str, tuple[Mapping[str, Any], list[str]]] = {
    "ReformerModelWithLMHead": (REFORMER, ["query_key", "value"]),
    "ViTMAEForPreTraining": (VIT_MAE, ["q_proj", "v_proj", "query", "value"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_draws_at_random_is_judged(name: str, tmp_path: Path) -> None:
    fields, modules = CASES[name]
    model_class = getattr(transformers, name)
    torch.manual_seed(7)
    model = model_class(model_class.config_class(**fields)).eval()
    base = models.save_base(model, tmp_path / "base", dtype=torch.bfloat16, shard="1GB")
    adapter = models.save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=modules))
    merged = merge(prepare(base, adapter, dtype="auto"), into=tmp_path / "merged").root

    right = judge(base=base, adapter=adapter, merged=merged, dtype="auto")
    wrong = judge(base=base, adapter=adapter, merged=base, dtype="auto")

    assert right.status is Status.PASS, right.failures
    assert wrong.quality is not None
    assert wrong.quality.effect > 1e-3
    assert Layer.STORAGE in {check.layer for check in wrong.failures}
