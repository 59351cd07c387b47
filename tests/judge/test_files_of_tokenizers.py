"""Whose tokenizer a merged folder must have: the adapter's where it says something else than the base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.judge.test_files import told, warned, write
from tests.judge.tiny import tokenizer


def test_a_tokenizer_that_a_newer_library_wrote_again(tmp_path: Path) -> None:
    base, adapter, merged = (write(tmp_path / name, {}) for name in ("base", "adapter", "merged"))
    (adapter / "model.safetensors").unlink()
    made = tokenizer()
    for folder in (base, merged):
        made.save_pretrained(folder)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    again = {"is_local": True, **settings, "bos_token": {"content": "<s>", "__type": "AddedToken"}}
    (merged / "tokenizer_config.json").write_text(json.dumps(again, indent=4))
    content = json.loads((base / "tokenizer.json").read_text())
    (merged / "tokenizer.json").write_text(json.dumps({**content, "padding": None}))
    assert told(base, adapter, merged) == {}
    assert warned(base, adapter, merged) == {"tokenizer_config.json", "tokenizer.json"}
    for key, value in (
        ("eos_token", "<s>"),
        ("model_max_length", 7),
        ("padding_side", "left"),
        ("tokenizer_class", "float8"),
    ):
        (merged / "tokenizer_config.json").write_text(json.dumps({**again, key: value}))
        assert list(told(base, adapter, merged)) == ["tokenizer_config.json"]
    shutil.copy(base / "tokenizer_config.json", merged)
    for part in ("decoder", "pre_tokenizer", "added_tokens"):
        (merged / "tokenizer.json").write_text(json.dumps({**content, part: [] if part == "added_tokens" else None}))
        assert list(told(base, adapter, merged)) == ["tokenizer.json"]


@pytest.mark.parametrize(
    "change, base_is_right, adapter_is_right",
    [
        (lambda made: None, True, True),
        (lambda made: made.add_tokens(["<new>"]), False, True),
        (lambda made: setattr(made, "pad_token", "</s>"), False, True),
        (lambda made: setattr(made, "chat_template", "{{ 1 }}"), True, True),
    ],
)
def test_the_adapters_tokenizer_is_needed_where_it_says_something_else(
    tmp_path: Path, change: Callable[[object], None], base_is_right: bool, adapter_is_right: bool
) -> None:
    base = write(tmp_path / "base", {"vocab.json": "{}"})
    adapter = tmp_path / "adapter"
    made = tokenizer()
    made.save_pretrained(base)
    change(made)
    made.save_pretrained(adapter)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**settings, "is_local": True}))
    as_base = Path(shutil.copytree(base, tmp_path / "as base"))
    as_adapter = Path(shutil.copytree(base, tmp_path / "as adapter"))
    shutil.copytree(adapter, as_adapter, dirs_exist_ok=True)
    if not base_is_right:  # the base's map names the base's special tokens alone
        assert told(write(base, {"special_tokens_map.json": "{}"}), adapter, as_adapter) == {}
        (base / "special_tokens_map.json").unlink()
    assert (told(base, adapter, as_base) == {}) is base_is_right
    assert (told(base, adapter, as_adapter) == {}) is adapter_is_right
    (as_adapter / "vocab.json").unlink()  # which the adapter does not replace
    assert list(told(base, adapter, as_adapter)) == ["vocab.json"]
