"""What may differ between the base's config and the merged one's, and what the tie flag must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.judge.structure import config_problems
from tests.judge.forms import form_of, problems, write_folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "base")


@pytest.mark.parametrize(
    "before, after, fields, said",
    [
        ({"x": 1}, {"x": 1}, {}, []),
        ({"x": 1}, {"x": 2}, {}, ["x is 2, expected 1"]),
        ({"x": 1}, {}, {}, ["x is absent, expected 1"]),
        ({}, {"x": 1}, {}, ["x is 1, expected absent"]),
        ({"transformers_version": "4"}, {"_name_or_path": "a"}, {}, []),
        ({"text_config": {"x": 1}}, {"text_config": {"x": 1}}, {}, []),
        ({"text_config": {"x": 1}}, {"text_config": {"x": 2}}, {}, ["text_config.x is 2, expected 1"]),
        ({"llm_config": {"x": 1}}, {"llm_config": {}}, {}, ["llm_config.x is absent, expected 1"]),
        ({"text_config": {"x": 1}}, {}, {}, ['text_config is absent, expected {"x": 1}']),
        ({"other": {"x": 1}}, {"other": {"x": 2}}, {}, ['other is {"x": 2}, expected {"x": 1}']),
        ({"vocab_size": 8}, {"vocab_size": 9}, {}, ["vocab_size is 9, expected 8"]),
        ({"vocab_size": 8}, {"vocab_size": 9}, {"rows": 9}, []),
        ({"vocab_size": 8}, {"vocab_size": 8}, {"rows": 9}, ["vocab_size is 8, expected 9"]),
        ({"vocab_size": 8}, {"vocab_size": 7}, {"rows": 9}, ["vocab_size is 7, expected 9"]),
        ({"vocab_size": 8, "x": 1}, {"vocab_size": 9, "x": 9}, {"rows": 9}, ["x is 9, expected 1"]),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"may_untie": True}, []),
        (
            {"tie_word_embeddings": True},
            {"tie_word_embeddings": False},
            {},
            ["tie_word_embeddings is false, expected true"],
        ),
        (
            {"tie_word_embeddings": False},
            {"tie_word_embeddings": True},
            {"may_untie": True},
            ["tie_word_embeddings is true, expected false"],
        ),
        ({"x": True}, {"x": False}, {"may_untie": True}, ["x is false, expected true"]),
        ({"x": ""}, {"x": "y" * 200}, {}, [f'x is "{"y" * 79}, expected ""']),  # 80 characters at most
        ({"quantization_config": {}}, {}, {}, []),
        ({"quantization_config": {}}, {"quantization_config": 1}, {}, ["quantization_config is 1, expected {}"]),
        ({}, {"quantization_config": 1}, {}, ["quantization_config is 1, expected absent"]),
        ({"dtype": "float16"}, {"torch_dtype": "torch.float16"}, {}, []),
        ({"dtype": None, "torch_dtype": "float16"}, {"dtype": "float16"}, {}, []),
        (
            {"dtype": "float16"},
            {"dtype": "float32"},
            {},
            ['dtype is "float32", expected "float16"; loaders cast to what it says'],
        ),
        ({"dtype": "float16"}, {}, {}, ['dtype is null, expected "float16"; loaders cast to what it says']),
        ({}, {"dtype": "float16"}, {}, ['dtype is "float16", expected null; loaders cast to what it says']),
        ({"dtype": "float16"}, {"dtype": "float32"}, {"dtype": "float32"}, []),
        (
            {"dtype": "float16"},
            {"dtype": "float16"},
            {"dtype": "float32"},
            ['dtype is "float16", expected "float32"; loaders cast to what it says'],
        ),
        ({}, {}, {"dtype": "float32"}, []),
        (
            {"dtype": "float16"},
            {},
            {"dtype": "float32"},
            ['dtype is null, expected "float32"; loaders cast to what it says'],
        ),
    ],
)
def test_config(before: dict[str, Any], after: dict[str, Any], fields: dict[str, Any], said: list[str]) -> None:
    assert list(config_problems(before, after, form_of(**fields), "")) == said


@pytest.mark.parametrize("text", [None, "[]", "{", "7"])
def test_a_config_that_is_none(base: Path, tmp_path: Path, text: str | None) -> None:
    merged = write_folder(tmp_path / "merged", files={"config.json": text})
    assert problems(base, merged)[0] == "config.json is missing or not a JSON object."


def test_the_config_names_what_the_task_needs(base: Path, tmp_path: Path) -> None:
    merged = write_folder(tmp_path / "merged")
    assert problems(base, merged, form_of(config={"architectures": ["LlamaForCausalLM"]})) == []
    assert problems(base, merged, form_of(config={"num_labels": 3})) == ["num_labels is absent, expected 3."]


UNTIED = {"is_untied": True, "may_untie": True}
DIFFER = "but the two embeddings must differ."
CHANGED = "tie_word_embeddings is not the base's, and the adapter unties nothing."


@pytest.mark.parametrize(
    "before, after, fields, said",
    [
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}, {}, []),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}, {"may_untie": True}, []),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, UNTIED, []),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"may_untie": True}, []),
        (
            {"tie_word_embeddings": True},
            {"tie_word_embeddings": True},
            UNTIED,
            [f"tie_word_embeddings is true, {DIFFER}"],
        ),
        ({}, {}, UNTIED, ["tie_word_embeddings must be false, because the two embeddings must differ."]),
        (
            {"text_config": {"tie_word_embeddings": True}},
            {"text_config": {"tie_word_embeddings": True}},
            UNTIED,
            [f"text_config.tie_word_embeddings is true, {DIFFER}"],
        ),
        ({"text_config": {"tie_word_embeddings": True}}, {"text_config": {"tie_word_embeddings": False}}, UNTIED, []),
        (
            {"tie_word_embeddings": True},
            {"tie_word_embeddings": False},
            {},
            ["tie_word_embeddings is false, expected true.", CHANGED],
        ),
        (
            {"tie_word_embeddings": False},
            {"tie_word_embeddings": True},
            {"may_untie": True},
            ["tie_word_embeddings is true, expected false.", CHANGED],
        ),
    ],
)
def test_tie_flag(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], fields: dict[str, Any], said: list[str]
) -> None:
    base = write_folder(tmp_path / "base", files={"config.json": json.dumps(before)})
    merged = write_folder(tmp_path / "merged", files={"config.json": json.dumps(after)})
    assert problems(base, merged, form_of(**fields)) == said
