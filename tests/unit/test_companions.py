"""What comes along: bytes of one side, edits only where the plan says so."""

from __future__ import annotations

import json
from pathlib import Path

from runner.companions import copy_companion, edit_json, find_companions


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


BASE = {
    "config.json": '{"b": 1,  "tie_word_embeddings": true}',
    "generation_config.json": '{"do_sample": false, "temperature": 0.9}',
    "tokenizer.json": "base",
    "tokenizer_config.json": "base",
    "chat_template.jinja": "base",
    "LICENSE": "text",
    "preprocessor_config.json": "{}",
    "1_Pooling/config.json": "{}",
    "modeling_novel.py": "raise SystemExit",
    "README.md": "card",
    "model.safetensors": "weights",
    "model.safetensors.index.json": "{}",
    "pytorch_model.bin": "weights",
    "pytorch_model.bin.index.json": "{}",
    ".git/config": "x",
}


def test_everything_but_weights_and_card_comes_from_the_base(tmp_path: Path) -> None:
    base = _write(tmp_path / "base", BASE)
    adapter = _write(tmp_path / "adapter", {"adapter_config.json": "{}", "README.md": "x", "training_args.bin": "x"})

    found = find_companions(base, adapter, {})

    assert [companion.path for companion in found] == sorted(
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "LICENSE", "preprocessor_config.json", "1_Pooling/config.json", "modeling_novel.py"]
    )  # fmt: skip
    out = tmp_path / "out"
    for companion in found:
        assert copy_companion(companion, out) == (out / companion.path).read_bytes() == BASE[companion.path].encode()


def test_the_adapters_tokenizer_replaces_the_whole_of_the_bases(tmp_path: Path) -> None:
    base = _write(tmp_path / "base", BASE)
    adapter = _write(tmp_path / "adapter", {"tokenizer.json": "mine", "tokenizer_config.json": "mine"})

    found = {companion.path: companion for companion in find_companions(base, adapter, {})}

    assert found["tokenizer.json"].source == adapter / "tokenizer.json"
    assert "chat_template.jinja" not in found  # half of each would be a third tokenizer


def test_a_tokenizer_config_without_a_vocabulary_is_not_a_tokenizer(tmp_path: Path) -> None:
    base = _write(tmp_path / "base", BASE)
    adapter = _write(tmp_path / "adapter", {"tokenizer_config.json": "mine"})

    found = {companion.path: companion for companion in find_companions(base, adapter, {})}

    assert found["tokenizer.json"].source == base / "tokenizer.json"
    assert found["tokenizer_config.json"].source == base / "tokenizer_config.json"


def test_edits_keep_order_and_everything_else() -> None:
    content = b'{"z": 1, "tie_word_embeddings": true, "text_config": {"tie_word_embeddings": true, "a": 2}}'

    edited = json.loads(edit_json(content, {"tie_word_embeddings": False, "new": 3}))

    assert list(edited) == ["z", "tie_word_embeddings", "text_config", "new"]
    assert edited["text_config"] == {"tie_word_embeddings": False, "a": 2}
    assert edited["tie_word_embeddings"] is False
