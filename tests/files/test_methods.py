"""The method table is complete: what PEFT knows has a row, so that a newer PEFT cannot add anything silently."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from runner.files.adapter.methods import LORA_INITS, LORA_VARIANTS, METHODS, REFUSED_FIELDS, find_refusal, reads_base
from tests.parity.cases import CASES

MERGED = sorted(name for name, method in METHODS.items() if not method.refusal)


def _field(name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(LoraConfig) if field.name == name)


def test_every_peft_method_has_one_row_and_no_row_is_of_another_method() -> None:
    assert set(METHODS) == {method.value for method in PeftType}


def test_no_merged_method_is_without_a_tuner_that_peft_can_merge() -> None:
    for name in MERGED:
        assert hasattr(PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name)], "merge_and_unload"), name


@pytest.mark.parametrize("name", MERGED)
def test_every_merged_method_has_a_parity_case(name: str) -> None:
    assert any(case.config.peft_type.value == name for case in CASES.values())


def test_every_lora_variant_of_peft_has_a_row() -> None:
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert known <= set(LORA_VARIANTS)
    assert set(_field("init_lora_weights").metadata["lora_variants"]) <= set(LORA_INITS)


def test_every_lora_initialisation_that_peft_names_has_a_row() -> None:
    names = re.findall(r"'(\w+?)(?:_niter_[^']*)?'", str(_field("init_lora_weights").type))
    assert {"pissa", "loftq"} <= set(names)  # the annotation still lists them
    assert set(names) <= set(LORA_INITS)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.refusal])
def test_a_method_without_a_merge_is_refused_with_its_reason(name: str) -> None:
    refusal = find_refusal({"peft_type": name})
    assert refusal is not None
    assert name in refusal.subject
    assert refusal.reason == METHODS[name].refusal


@pytest.mark.parametrize(
    ("config", "subject"),
    [
        ({"peft_type": "NOVELTY"}, "'NOVELTY'"),
        ({}, "'unknown'"),
        ({"peft_type": "LORA", "init_lora_weights": "novel"}, "'novel'"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16'"),
        ({"peft_type": "LORA", "init_lora_weights": "corda"}, "'corda'"),
        ({"peft_type": "LORA", "init_lora_weights": "lora_ga"}, "'lora_ga'"),
        ({"peft_type": "LORA", "init_lora_weights": "loftq"}, "'loftq'"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [1]}, "`alora_invocation_tokens`"),
        ({"peft_type": "LORA", "arrow_config": {"top_k": 2}}, "`arrow_config`"),
        ({"peft_type": "PVERA", "sample_at_inference": True}, "`sample_at_inference`"),
        *(({"peft_type": "LORA", field: ["x"]}, f"`{field}`") for field in REFUSED_FIELDS),
    ],
)
def test_an_option_without_a_merge_is_refused_and_named(config: dict[str, Any], subject: str) -> None:
    refusal = find_refusal(config)
    assert refusal is not None
    assert subject in refusal.subject
    assert refusal.reason


def test_the_base_is_held_in_float32_where_something_that_stays_is_derived_from_it() -> None:
    assert not reads_base({"peft_type": "LORA"})
    assert not reads_base({"peft_type": "LORA", "use_dora": True, "init_lora_weights": None})
    assert reads_base({"peft_type": "LORA", "init_lora_weights": "pissa"})
    assert reads_base({"peft_type": "LORA", "kasa_config": {"beta": 1.0}})
    assert reads_base({"peft_type": "OSF"})
    assert not reads_base({"peft_type": "VERA"})
    assert reads_base({"peft_type": "VERA", "save_projection": False})
