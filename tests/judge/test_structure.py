"""Each rule on the folder's form: what it passes and what it fails, on folders of a few bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from runner.files.layout import INDEX_FILE, read_checkpoint
from runner.judge.structure import Wanted, judge_structure
from tests.judge.forms import CONFIG, TENSORS, form_of, problems, write_folder, write_indexed


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "base")


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
    form = form_of(optional={"c": Wanted(dtype="F32", shape=(1,))})
    merged = write_folder(tmp_path / "merged", held)
    assert problems(base, merged, form) == ([problem] if problem else [])
    count = next(
        judge_structure(base=read_checkpoint(base), merged=read_checkpoint(merged), form=form)
    )  # the first check counts
    assert count.limit == 0
    assert (count.value == 0) is (problem is None)


@pytest.mark.parametrize(
    "base_total, total, is_right",
    [(40, 40, True), (40, None, True), (40, 41, False), (41, 41, True), (41, 42, False), (None, 41, False)],
)
def test_totals(tmp_path: Path, base_total: int | None, total: int | None, is_right: bool) -> None:
    base, merged = write_indexed(tmp_path / "base", base_total), write_indexed(tmp_path / "merged", total)
    said = f"{INDEX_FILE} says total_size {total}, the tensors have 40 bytes."
    assert problems(base, merged) == ([] if is_right else [said])


def test_a_wrong_total_is_inherited_only_with_the_same_bytes(tmp_path: Path, base: Path) -> None:
    larger = write_indexed(tmp_path / "larger", 41, {**TENSORS, "c": torch.zeros(1)})
    merged = write_indexed(tmp_path / "merged", 41)
    for other in (base, larger):
        assert len(problems(other, merged)) == 1


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "other.safetensors", "model.pt"])
def test_strays(base: Path, tmp_path: Path, name: str) -> None:
    merged = write_indexed(tmp_path / "merged", 40)
    assert problems(base, merged) == []
    (merged / name).write_bytes(b"{}")
    said = f"{name} lies in the folder; a loader may take it for weights or an adapter."
    assert problems(base, merged) == [said]


OURS = {"tokenizer.json": "ours", "chat_template.jinja": "our template"}
OF_THE_BASE = (
    "the tokenizer's files are the base's, which do not know what the adapter's adds or changes: "
    "chat_template.jinja, tokenizer.json."
)
THEIRS = {"tokenizer.json": "theirs", "added_tokens.json": "{}", "chat_template.jinja": "their template"}


@pytest.mark.parametrize(
    "adapter, merged, rows, said",
    [
        ({}, OURS, None, []),
        ({}, {}, None, ["chat_template.jinja is missing; tokenizer.json is missing."]),
        ({}, {**OURS, "tokenizer.json": "x"}, None, ["tokenizer.json is neither the base's nor the adapter's."]),
        ({}, {**OURS, "vocab.json": "x"}, None, ["vocab.json is not expected."]),
        (THEIRS, THEIRS, None, []),
        (THEIRS, OURS, None, [f"added_tokens.json is missing; {OF_THE_BASE}"]),
        (THEIRS, THEIRS, 9, []),
        (THEIRS, OURS, 9, [f"added_tokens.json is missing; {OF_THE_BASE}"]),
        (OURS, OURS, 9, []),
        ({}, OURS, 9, []),
        (
            THEIRS,
            {**THEIRS, "tokenizer.json": "ours"},
            None,
            ["half of the tokenizer's files are the base's and half are the adapter's: tokenizer.json."],
        ),
        (THEIRS, {**THEIRS, "tokenizer.json": "x"}, None, ["tokenizer.json is neither the base's nor the adapter's."]),
        ({"chat_template.jinja": "their template"}, {**OURS, "chat_template.jinja": "their template"}, None, []),
        ({"chat_template.jinja": "their template"}, OURS, None, []),
        (
            {"chat_template.jinja": "their template"},
            {**OURS, "chat_template.jinja": "x"},
            None,
            ["chat_template.jinja is neither the base's nor the adapter's."],
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
    ours, theirs = write_folder(tmp_path / "base", files=OURS), write_folder(tmp_path / "adapter", files=adapter)
    form = form_of(rows=rows)
    found = write_folder(
        tmp_path / "merged", files={"config.json": json.dumps({**CONFIG, "vocab_size": rows or 8}), **merged}
    )
    assert problems(ours, found, form, theirs) == said


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
        write_folder(tmp_path / name, files={"generation_config.json": text})
        for name, text in (("base", ours), ("adapter", theirs), ("merged", found))
    ]
    assert problems(folders[0], folders[2], adapter=folders[1]) == said
