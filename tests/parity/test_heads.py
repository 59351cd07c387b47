"""Adapters with a head of their own: the output is the task's class, holds the head, and equals PEFT's merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from runner.judge.judge import judge
from runner.protocol.errors import AdapterMismatch, BrokenCheckpoint
from runner.protocol.verdict import Outcome
from runner.worker.merge.prepare import prepare
from tests.parity import heads, models, oracle, structures
from tests.parity.heads import Trained
from tests.parity.pipeline import run_merge

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Case:
    """One adapter with a head on one base.

    Attributes:
        build: the base.
        trained: how the adapter was.
        dropped: the base's tensors whose place the adapter's own head takes.
        kept: the base's tensors that the adapter's class does not know.
    """

    build: Callable[[], PreTrainedModel]
    trained: Trained
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def _llama() -> PreTrainedModel:
    return models.llama(tied=False)


def _tied() -> PreTrainedModel:
    return models.llama(tied=True)


CASES = {
    "seq_cls_5_labels": Case(_llama, Trained(task="SEQ_CLS", labels=5, options=ATTENTION), ("lm_head.weight",)),
    "seq_cls_2_labels": Case(_llama, Trained(task="SEQ_CLS", options=ATTENTION), ("lm_head.weight",)),
    "seq_cls_regression": Case(_tied, Trained(task="SEQ_CLS", labels=1, options=ATTENTION)),
    "seq_cls_tied": Case(_tied, Trained(task="SEQ_CLS", labels=3, options={"target_modules": "all-linear"})),
    "seq_cls_qwen2": Case(
        models.qwen2, Trained(task="SEQ_CLS", labels=4, options={**ATTENTION, "bias": "all"}), ("lm_head.weight",)
    ),
    "seq_cls_conv1d": Case(
        models.gpt2, Trained(task="SEQ_CLS", labels=3, options={"target_modules": ["c_attn"], "fan_in_fan_out": True})
    ),
    "seq_cls_embeddings": Case(
        _llama,
        Trained(task="SEQ_CLS", labels=3, options={"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
        ("lm_head.weight",),
    ),
    "token_cls": Case(_llama, Trained(task="TOKEN_CLS", labels=7, options=ATTENTION), ("lm_head.weight",)),
    "features": Case(_llama, Trained(task="FEATURE_EXTRACTION", options=ATTENTION), kept=("lm_head.weight",)),
    "features_plain": Case(
        _llama, Trained(task=None, model_class=transformers.AutoModel, options=ATTENTION), kept=("lm_head.weight",)
    ),
}


def test_what_of_the_body_a_class_does_not_know_stays(tmp_path: Path) -> None:
    model = structures.build("BertForPreTraining", structures.ENCODERS["BertModel"])
    base = models.save_base(model, tmp_path / "base", dtype=torch.bfloat16)
    trained = Trained(task="TOKEN_CLS", labels=3, options={"target_modules": ["query", "value"]})
    adapter = heads.save_adapter(base, tmp_path / "adapter", trained)

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    left_out = oracle.read_folder(base).keys() - oracle.read_folder(merged.root).keys()
    assert left_out == {name for name in oracle.read_folder(base) if name.startswith("cls.")}
    assert "bert.pooler.dense.weight" in oracle.read_folder(merged.root)
    assert judge(base=base, adapter=adapter, merged=merged.root, dtype="auto").failures == ()
    tensors = {name: tensor for name, tensor in oracle.read_folder(merged.root).items() if "pooler" not in name}
    (merged.root / "model.safetensors.index.json").unlink(missing_ok=True)
    for path in merged.root.glob("*.safetensors"):
        path.unlink()
    save_file(tensors, merged.root / "model.safetensors", metadata={"format": "pt"})
    assert not judge(base=base, adapter=adapter, merged=merged.root, dtype="auto").passed


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_merge_equals_peft_and_the_judge_agrees(name: str, dtype: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = models.save_base(case.build(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = heads.save_adapter(base, tmp_path / "adapter", case.trained)

    plan, merged = run_merge(base, adapter, tmp_path / "merged", dtype=dtype)

    before, after = oracle.read_folder(base), oracle.read_folder(merged.root)
    expected = heads.peft_merge(base, adapter, case.trained) | {key: before[key] for key in case.kept}
    assert after.keys() == expected.keys()
    for key, tensor in after.items():
        assert torch.equal(tensor, expected[key].to(tensor.dtype)), key
    assert before.keys() - after.keys() == set(case.dropped)
    model = case.trained.load(base)
    config = json.loads((merged.root / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert transformers.AutoConfig.from_pretrained(merged.root).num_labels == model.config.num_labels
    assert any(type(model).__name__ in note for note in plan.summary.notes)
    assert all(any(key in note for note in plan.summary.notes) for key in (*case.dropped, *case.kept))
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype=dtype)
    assert verdict.failures == ()
    assert verdict.passed
    assert not any(check.outcome is Outcome.SKIPPED for check in verdict.checks)
    assert verdict.quality is not None
    assert verdict.quality.kl_mean_nats is None
    assert verdict.continuations == ()


def test_labels_that_lie_beside_the_adapter_come_along(tmp_path: Path) -> None:
    base = models.save_base(_llama(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = heads.save_adapter(base, tmp_path / "adapter", Trained(task="SEQ_CLS", labels=3, options=ATTENTION))
    labels = {"0": "bad", "1": "fair", "2": "good"}
    own = {"id2label": labels, "pad_token_id": 2, "problem_type": "single_label_classification", "hidden_size": 9}
    (adapter / "config.json").write_text(json.dumps(own))

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    config = json.loads((merged.root / "config.json").read_text())
    assert (config["id2label"], config["label2id"]) == (labels, {"bad": 0, "fair": 1, "good": 2})
    assert (config["pad_token_id"], config["problem_type"]) == (2, "single_label_classification")
    assert config["hidden_size"] == 48
    assert judge(base=base, adapter=adapter, merged=merged.root, dtype="auto").failures == ()


def test_refuses_a_class_that_transformers_cannot_load_from_this_base(tmp_path: Path) -> None:
    # LlamaForQuestionAnswering calls its body `transformer`, so that transformers finds none of the base's tensors.
    base = models.save_base(_llama(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = heads.save_adapter(base, tmp_path / "adapter", Trained(task="QUESTION_ANS", options=ATTENTION))

    with pytest.raises(BrokenCheckpoint, match=r"transformer\."):
        prepare(base, adapter, dtype="auto")


def test_refuses_an_adapter_without_its_head(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = models.save_base(_llama(), tmp_path / "base", dtype=torch.bfloat16)
    adapter = heads.save_adapter(base, tmp_path / "adapter", Trained(task="SEQ_CLS", labels=3, options=ATTENTION))
    weights = load_file(adapter / "adapter_model.safetensors")
    head = next(key for key in weights if "score" in key)
    save_file({key: value for key, value in weights.items() if key != head}, adapter / "adapter_model.safetensors")

    with pytest.raises(AdapterMismatch, match="score"):
        prepare(base, adapter, dtype="auto")
    with pytest.raises(AdapterMismatch, match="score"):
        judge(base=base, adapter=adapter, merged=base, dtype="auto")
