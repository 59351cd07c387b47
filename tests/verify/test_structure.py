"""Each rule on the folder's form: what it passes and what it fails, on folders of a few bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from runner.checkpoint.layout import INDEX_FILE, SINGLE_FILE, read_checkpoint
from runner.verify.structure import Form, Wanted, config_problems, judge_structure
from runner.verify.verdict import Outcome

CONFIG = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "vocab_size": 8}
TENSORS = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
WANTED = {"a": Wanted(dtype="F32", shape=(2, 3)), "b": Wanted(dtype="F32", shape=(4,))}


def _form(**fields: Any) -> Form:
    usual = {
        "required": WANTED, "optional": {}, "dtype": "auto", "is_untied": False, "may_untie": False, "rows": None,
        "config": {},
    }  # fmt: skip
    return Form(**{**usual, **fields})


def _folder(
    root: Path, tensors: dict[str, torch.Tensor] | None = None, files: Mapping[str, str | None] | None = None
) -> Path:
    """Write a checkpoint; None leaves a file out."""
    root.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS if tensors is None else tensors, root / SINGLE_FILE)
    for name, text in {"config.json": json.dumps(CONFIG), **(files or {})}.items():
        if text is not None:
            (root / name).write_text(text)
    return root


def _index(root: Path, total: int | None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a checkpoint of one shard with an index that tells a total, or none."""
    _folder(root, tensors)
    shard = root / "model-00001-of-00001.safetensors"
    (root / SINGLE_FILE).rename(shard)
    metadata = {} if total is None else {"total_size": total}
    names = dict.fromkeys(tensors or TENSORS, shard.name)
    (root / INDEX_FILE).write_text(json.dumps({"metadata": metadata, "weight_map": names}))
    return root


def _problems(base: Path, merged: Path, form: Form | None = None, adapter: Path | None = None) -> list[str]:
    """Return the details of the checks that fail."""
    checks = list(
        judge_structure(
            base=read_checkpoint(base), adapter=adapter or base / "none", merged=read_checkpoint(merged),
            form=form or _form(),
        )
    )  # fmt: skip
    assert len(checks) == 7
    return [check.detail for check in checks if check.outcome is Outcome.FAIL]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _folder(tmp_path / "base")


@pytest.mark.parametrize(
    "tensors, problem",
    [
        ({}, None),
        ({"c": torch.zeros(1)}, None),  # optional
        ({"a": None}, "a is missing."),
        ({"a": None, "b": None, "c": torch.zeros(1)}, "a is missing (and 1 more)."),
        ({"d": torch.zeros(1)}, "d is not expected."),
        ({"a": torch.zeros(3, 2)}, "a has shape [3, 2], expected [2, 3]."),
        ({"b": torch.zeros(4).half()}, "b is F16, expected F32."),
        ({"c": torch.zeros(1).half()}, "c is F16, expected F32."),
    ],
)
def test_tensors(base: Path, tmp_path: Path, tensors: dict[str, torch.Tensor | None], problem: str | None) -> None:
    held = {name: value for name, value in {**TENSORS, **tensors}.items() if value is not None}
    form = _form(optional={"c": Wanted(dtype="F32", shape=(1,))})
    merged = _folder(tmp_path / "merged", held)
    assert _problems(base, merged, form) == ([problem] if problem else [])
    count = next(
        judge_structure(base=read_checkpoint(base), adapter=base, merged=read_checkpoint(merged), form=form)
    )  # the first check counts
    assert count.limit == 0
    assert (count.value == 0) is (problem is None)


@pytest.mark.parametrize(
    "base_total, total, is_right",
    [(40, 40, True), (40, None, True), (40, 41, False), (41, 41, True), (41, 42, False), (None, 41, False)],
)
def test_totals(tmp_path: Path, base_total: int | None, total: int | None, is_right: bool) -> None:
    base, merged = _index(tmp_path / "base", base_total), _index(tmp_path / "merged", total)
    said = f"{INDEX_FILE} says total_size {total}, the tensors have 40 bytes."
    assert _problems(base, merged) == ([] if is_right else [said])


def test_a_wrong_total_is_inherited_only_with_the_same_bytes(tmp_path: Path, base: Path) -> None:
    larger = _index(tmp_path / "larger", 41, {**TENSORS, "c": torch.zeros(1)})
    merged = _index(tmp_path / "merged", 41)
    for other in (base, larger):
        assert len(_problems(other, merged)) == 1


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "other.safetensors", "model.pt"])
def test_strays(base: Path, tmp_path: Path, name: str) -> None:
    merged = _index(tmp_path / "merged", 40)
    assert _problems(base, merged) == []
    (merged / name).write_bytes(b"{}")
    said = f"{name} lies in the folder; a loader may take it for weights or an adapter."
    assert _problems(base, merged) == [said]


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
    assert list(config_problems(before, after, _form(**fields), "")) == said


@pytest.mark.parametrize("text", [None, "[]", "{", "7"])
def test_a_config_that_is_none(base: Path, tmp_path: Path, text: str | None) -> None:
    merged = _folder(tmp_path / "merged", files={"config.json": text})
    assert _problems(base, merged)[0] == "config.json is missing or not a JSON object."


def test_the_config_names_what_the_task_needs(base: Path, tmp_path: Path) -> None:
    merged = _folder(tmp_path / "merged")
    assert _problems(base, merged, _form(config={"architectures": ["LlamaForCausalLM"]})) == []
    assert _problems(base, merged, _form(config={"num_labels": 3})) == ["num_labels is absent, expected 3."]


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
    base = _folder(tmp_path / "base", files={"config.json": json.dumps(before)})
    merged = _folder(tmp_path / "merged", files={"config.json": json.dumps(after)})
    assert _problems(base, merged, _form(**fields)) == said


OURS = {"tokenizer.json": "ours", "chat_template.jinja": "our template"}
THEIRS = {"tokenizer.json": "theirs", "added_tokens.json": "{}", "chat_template.jinja": "their template"}


@pytest.mark.parametrize(
    "adapter, merged, rows, said",
    [
        ({}, OURS, None, []),
        ({}, {}, None, ["chat_template.jinja is missing (and 1 more)."]),
        ({}, {**OURS, "tokenizer.json": "x"}, None, ["tokenizer.json is changed."]),
        ({}, {**OURS, "vocab.json": "x"}, None, ["vocab.json is not expected."]),
        (THEIRS, THEIRS, None, []),
        (THEIRS, OURS, None, []),
        (THEIRS, THEIRS, 9, []),
        (THEIRS, OURS, 9, ["they are the base's, which do not know the tokens that the adapter adds."]),
        (OURS, OURS, 9, []),
        ({}, OURS, 9, []),
        (
            THEIRS,
            {**THEIRS, "tokenizer.json": "ours"},
            None,
            ["half of the tokenizer's files are the base's and half are the adapter's."],
        ),
        (THEIRS, {**THEIRS, "tokenizer.json": "x"}, None, ["added_tokens.json is not expected (and 2 more)."]),
        ({"chat_template.jinja": "their template"}, {**OURS, "chat_template.jinja": "their template"}, None, []),
        ({"chat_template.jinja": "their template"}, OURS, None, []),
        (
            {"chat_template.jinja": "their template"},
            {**OURS, "chat_template.jinja": "x"},
            None,
            ["chat_template.jinja is changed."],
        ),
        (
            {"tokenizer_config.json": "{}"},
            {**OURS, "tokenizer_config.json": "{}"},
            None,
            ["tokenizer_config.json is not expected."],
        ),
    ],
)
def test_tokenizer(
    tmp_path: Path, adapter: dict[str, str], merged: dict[str, str], rows: int | None, said: list[str]
) -> None:
    ours, theirs = _folder(tmp_path / "base", files=OURS), _folder(tmp_path / "adapter", files=adapter)
    form = _form(rows=rows)
    found = _folder(
        tmp_path / "merged", files={"config.json": json.dumps({**CONFIG, "vocab_size": rows or 8}), **merged}
    )
    assert _problems(ours, found, form, theirs) == said


@pytest.mark.parametrize(
    "ours, theirs, found, said",
    [
        (None, None, None, []),
        ("1", None, "1", []),
        ("1", "2", "1", []),
        ("1", "2", "2", []),
        (None, "2", "2", []),
        (None, "2", None, []),
        ("1", None, None, ["generation_config.json is missing."]),
        ("1", "2", "3", ["generation_config.json is neither the base's nor the adapter's."]),
        (None, None, "3", ["generation_config.json is neither the base's nor the adapter's."]),
    ],
)
def test_generation_config(
    tmp_path: Path, ours: str | None, theirs: str | None, found: str | None, said: list[str]
) -> None:
    folders = [
        _folder(tmp_path / name, files={"generation_config.json": text})
        for name, text in (("base", ours), ("adapter", theirs), ("merged", found))
    ]
    assert _problems(folders[0], folders[2], adapter=folders[1]) == said
