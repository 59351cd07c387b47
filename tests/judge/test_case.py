"""What the judge knows before it sees a merged folder, and what it makes of the probes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LEDConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
)

from runner.files.layout import read_checkpoint
from runner.judge.case import UNREAD_IDS, Case, judge_semantics, open_case
from runner.judge.expected.unmerged import Unmerged
from runner.judge.judge import GATES, decide
from runner.judge.semantics import LIMIT, Probe
from runner.protocol.errors import AdapterMismatch
from runner.protocol.verdict import Check, Layer, Outcome, Status
from tests.judge.conftest import Maker
from tests.judge.tiny import VOCABULARY, llama
from tests.parity import heads, models
from tests.parity.heads import Trained

HELD = "PEFT holds the adapter exactly as stored"
CLAIM = "E does what PEFT's unmerged layer does"
JUDGED = "semantics was judged"
PLACES = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def case(right_merge: Maker) -> Iterator[Case]:
    base, adapter, _ = right_merge("lora")
    with open_case(base, adapter, dtype="auto") as case:
        yield case


def _semantics(*probes: Probe, altered: tuple[str, ...] = ()) -> dict[str, Check]:
    checks = judge_semantics(probes, cast("Unmerged", SimpleNamespace(altered=altered)))
    assert {check.layer for check in checks} == {Layer.SEMANTICS}
    return {check.name: check for check in checks}


def _status(*probes: Probe) -> Status:
    others = [Check(layer=layer, name="x", outcome=Outcome.PASS) for layer in GATES if layer is not Layer.SEMANTICS]
    return decide([*others, *_semantics(*probes).values()])


def _probe(error: float | None, module: str = "a", detail: str = "") -> Probe:
    return Probe(module=module, error=error, detail=detail)


def test_the_worst_module_decides_and_is_named() -> None:
    found = _semantics(_probe(1e-9), _probe(2e-3, "b", "It is late."), _probe(0.0, "c"))
    assert found.keys() == {HELD, CLAIM}
    check = found[CLAIM]
    assert (check.outcome, check.value, check.limit) == (Outcome.FAIL, 2e-3, LIMIT)
    assert check.detail == "The worst of 3 modules is b. It is late."


def test_an_error_at_the_limit_passes_and_one_above_does_not() -> None:
    check = _semantics(_probe(1e-9), _probe(LIMIT, "b"))[CLAIM]
    assert (check.outcome, check.value, check.detail) == (Outcome.PASS, LIMIT, "")
    assert _semantics(_probe(math.nextafter(LIMIT, 1.0)))[CLAIM].outcome is Outcome.FAIL


@pytest.mark.parametrize("order", [1, -1])
def test_an_error_that_is_no_number_is_the_worst(order: int) -> None:
    probes = [_probe(math.nan, "b"), _probe(0.5), _probe(0.0, "c")][::order]
    check = _semantics(*probes)[CLAIM]
    assert check.outcome is Outcome.FAIL
    assert check.detail == "The worst of 3 modules is b."


def test_a_module_that_was_not_probed_is_told_and_nothing_is_verified() -> None:
    blind = [_probe(None, "b", "no probe for it"), _probe(None, "c", "no other")]
    found = _semantics(_probe(1e-9), *blind)
    assert found[CLAIM].outcome is Outcome.PASS
    assert found[JUDGED].outcome is Outcome.SKIPPED
    assert found[JUDGED].detail == "2 modules were not probed; b: no probe for it."
    assert _status(_probe(1e-9), *blind) is Status.NOT_VERIFIED
    assert _status(*blind) is Status.NOT_VERIFIED
    assert CLAIM not in _semantics(*blind)
    assert _status(_probe(1e-9)) is Status.PASS


def test_without_a_module_nothing_is_verified() -> None:
    found = _semantics()
    assert found.keys() == {HELD, JUDGED}
    assert found[JUDGED].detail == "0 modules were not probed; PEFT touches no module."
    assert _status() is Status.NOT_VERIFIED


def test_an_adapter_that_peft_holds_otherwise_fails() -> None:
    found = _semantics(_probe(0.0), altered=("one.lora_A", "two.lora_B"))
    assert found[HELD].outcome is Outcome.FAIL
    assert found[HELD].detail == "one.lora_A has other values in PEFT's model than in the file."
    assert found[CLAIM].outcome is Outcome.PASS
    held = _semantics(_probe(0.0))[HELD]
    assert (held.outcome, held.detail) == (Outcome.PASS, "")


def test_a_tie_may_be_given_up_where_the_merge_does_or_where_both_sides_are_stored(right_merge: Maker) -> None:
    forms = {}
    for variant in ("lora", "tied_untouched", "tied_head"):
        base, adapter, merged = right_merge(variant)
        with open_case(base, adapter, dtype="auto") as case:
            folder = read_checkpoint(merged)
            forms[variant] = case.form(folder)
            if variant == "tied_untouched":
                copies = dict.fromkeys(case.targets.optional, folder.tensors["model.embed_tokens.weight"])
                forms["both"] = case.form(replace(folder, tensors={**folder.tensors, **copies}))
                forms["copies"] = case.form(replace(folder, tensors=copies))
                assert copies.keys() == {"lm_head.weight"}
    assert {name: (form.is_untied, form.may_untie) for name, form in forms.items()} == {
        "lora": (False, False),
        "tied_untouched": (False, False),
        "tied_head": (True, True),
        "both": (False, True),
        "copies": (False, True),
    }


@pytest.mark.parametrize(
    "build, rows",
    [
        (llama, VOCABULARY),
        (lambda: CLIPVisionModel(CLIPVisionConfig(**PLACES)), UNREAD_IDS),  # the table of its pictures has 4 dimensions
        (lambda: ViTModel(ViTConfig(**PLACES)), UNREAD_IDS),
        (
            lambda: Wav2Vec2Model(
                Wav2Vec2Config(
                    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, conv_dim=(4,),
                    conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
                )
            ),
            UNREAD_IDS,
        ),
    ],
    ids=["text", "pictures", "pixels", "sounds"],
)  # fmt: skip
def test_token_ids_are_those_of_the_embedding_where_a_model_reads_any(case: Case, build: Any, rows: int) -> None:
    model: PreTrainedModel = build()
    peft = SimpleNamespace(get_base_model=lambda: model)
    assert replace(case, unmerged=cast("Unmerged", SimpleNamespace(model=peft))).embedding_rows == rows


@pytest.mark.parametrize(
    "config, tokens",
    [
        (LlamaConfig(max_position_embeddings=160), 160),
        (LlamaConfig(max_position_embeddings=1), 1),
        (LlamaConfig(max_position_embeddings=0), 1 << 20),
        (MptConfig(max_seq_len=64), 64),
        (MambaConfig(), 1 << 20),
        (WhisperConfig(max_target_positions=48), 48),
        (LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32), 32),
    ],
    ids=["positions", "one", "none", "window", "recurrent", "targets", "two sides"],
)
def test_a_model_takes_as_many_tokens_as_its_config_says(case: Case, config: PretrainedConfig, tokens: int) -> None:
    base = SimpleNamespace(model=SimpleNamespace(config=config))
    assert replace(case, unmerged=cast("Unmerged", SimpleNamespace(base=base))).max_tokens == tokens


def test_an_adapter_without_its_head_is_refused(tmp_path: Path) -> None:
    base = models.save_base(models.llama(tied=False), tmp_path / "base", dtype=torch.bfloat16)
    options = {"target_modules": ["q_proj"]}
    adapter = heads.save_adapter(base, tmp_path / "adapter", Trained(task="SEQ_CLS", labels=3, options=options))
    path = adapter / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "score" not in name}, path)

    with (
        pytest.raises(AdapterMismatch, match=r"Neither the base nor the adapter has 'score\.weight'"),
        open_case(base, adapter, dtype="auto"),
    ):
        pass
