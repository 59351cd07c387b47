"""Whose tokenizer a release has: the base's where the adapter's only writes it down anew, else the adapter's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.files.sidecars.files import find_companions, trace
from runner.files.sidecars.notes import companion_notes
from runner.files.sidecars.tokenizers import Relation, relate

VOCAB = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def _fast(*, merges: list[Any], added: tuple[str, ...] = ("</s>",), **more: Any) -> str:
    tokens = [{"id": VOCAB.get(token, 4 + n), "content": token, **FLAGS} for n, token in enumerate(added)]
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, **more,
        "model": {"type": "BPE", "vocab": VOCAB, "merges": merges},
    })  # fmt: skip


def _write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def _base(tmp_path: Path, **more: str) -> Path:
    files = {
        "config.json": "{}",
        "tokenizer.json": _fast(merges=["a b"]),
        "vocab.json": json.dumps(VOCAB),
        "merges.txt": "#version: 0.2\na b\n",
        "special_tokens_map.json": '{"eos_token": "</s>"}',
        "tokenizer_config.json": '{"eos_token": "</s>", "chat_template": "{{ x }}", "padding_side": "right"}',
    }
    return _write(tmp_path / "base", **files | more)


def _rewritten(**more: Any) -> dict[str, str]:
    """Return the files of a library that writes pairs, a template apart, and no vocabulary of its own."""
    processor = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    options = {"merges": [["a", "b"]], "post_processor": processor, "padding": None} | more
    return {
        "tokenizer.json": _fast(**options),
        "tokenizer_config.json": '{"eos_token": {"content": "</s>"}, "backend": "tokenizers", "padding_side": "left"}',
        "chat_template.jinja": "{{ x }}",
    }


def _from_adapter(base: Path, adapter: Path) -> tuple[set[str], set[str], str]:
    found = find_companions(base, adapter, {})
    mine = {companion.path for companion in found if companion.is_adapters}
    notes = " ".join(companion_notes(base, adapter, trace(base, adapter, found, ())))
    return mine, {companion.path for companion in found} - mine, notes


def test_a_tokenizer_that_was_only_written_down_anew_stays_the_bases(tmp_path: Path) -> None:
    base, adapter = _base(tmp_path), _write(tmp_path / "adapter", **_rewritten())

    mine, ours, notes = _from_adapter(base, adapter)

    assert relate(base, adapter) is Relation.SAME
    assert mine == set()
    assert ours == {path.name for path in base.iterdir()}
    assert "says what the base's says, in other words: the base's stays" in notes
    assert "Its padding_side is 'left', the base's 'right'" in notes


def test_added_tokens_need_the_adapters_tokenizer_and_keep_the_bases_vocabulary(tmp_path: Path) -> None:
    base = _base(tmp_path)
    adapter = _write(tmp_path / "adapter", **_rewritten(added=("</s>", "<new>")))

    mine, ours, notes = _from_adapter(base, adapter)

    assert relate(base, adapter) is Relation.EXTENDED
    assert mine == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert ours == {"config.json", "vocab.json", "merges.txt", "special_tokens_map.json"}
    assert "1 are new" in notes
    assert "Left out" not in notes
    assert "is kept what the adapter does not replace: merges.txt, special_tokens_map.json, vocab.json" in notes


def test_another_special_token_needs_the_adapters_and_not_the_bases_map(tmp_path: Path) -> None:
    files = _rewritten() | {"tokenizer_config.json": '{"eos_token": "</s>", "pad_token": "</s>"}'}
    base, adapter = _base(tmp_path), _write(tmp_path / "adapter", **files)

    mine, ours, notes = _from_adapter(base, adapter)

    assert "tokenizer_config.json" in mine
    assert "special_tokens_map.json" not in ours
    assert "Its pad_token is '</s>', the base's None." in notes


def test_another_template_alone_leaves_the_tokenizer_the_bases(tmp_path: Path) -> None:
    base = _base(tmp_path)
    adapter = _write(tmp_path / "adapter", **_rewritten() | {"chat_template.jinja": "{{ y }}"})

    mine, ours, _ = _from_adapter(base, adapter)

    assert mine == {"chat_template.jinja"}
    assert "tokenizer.json" in ours


@pytest.mark.parametrize(
    "change, relation",
    [
        ({"merges": []}, Relation.OTHER),
        ({"normalizer": {"type": "NFC"}}, Relation.EXTENDED),
        ({"decoder": None}, Relation.EXTENDED),
        ({"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
         Relation.SAME),
    ],
)  # fmt: skip
def test_what_changes_the_ids_is_seen(change: dict[str, Any], relation: Relation, tmp_path: Path) -> None:
    base, adapter = _base(tmp_path), _write(tmp_path / "adapter", **_rewritten(**change))

    assert relate(base, adapter) is relation


def test_a_vocabulary_that_was_converted_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    base = _base(tmp_path)
    (base / "tokenizer.json").unlink()
    adapter = _write(tmp_path / "adapter", **_rewritten())

    _, ours, _ = _from_adapter(base, adapter)

    assert {"vocab.json", "merges.txt"} <= ours


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 1}', '{"model": {"type": "BPE", "vocab": {"a": -1}}}'])
def test_a_damaged_tokenizer_is_another_one(text: str, tmp_path: Path) -> None:
    base = _base(tmp_path)
    assert relate(base, _write(tmp_path / "adapter", **{"tokenizer.json": text})) is Relation.OTHER


@pytest.mark.parametrize("name", ["tekken.json", "source.spm", "tokenizer.model", "vocab.txt"])
def test_other_bytes_of_a_vocabulary_are_another_tokenizer(name: str, tmp_path: Path) -> None:
    base = _base(tmp_path, **{name: "1"})
    assert relate(base, _write(tmp_path / "adapter", **_rewritten() | {name: "2"})) is Relation.OTHER
