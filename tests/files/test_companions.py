"""What comes along: bytes of one side, edits only where the plan says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.files.sidecars.files import copy_companion, edit_json, find_companions, read_config, trace
from runner.files.sidecars.notes import check_tokenizer, companion_notes
from runner.protocol.errors import AdapterMismatch, BrokenCheckpoint, UnsupportedCheckpoint

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


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


def _notes(base: Path, adapter: Path) -> list[str]:
    return list(companion_notes(base, adapter, trace(base, adapter, find_companions(base, adapter, {}), WEIGHTS)))


def _sources(base: Path, adapter: Path) -> dict[str, Path]:
    return {companion.path: companion.source for companion in find_companions(base, adapter, {})}


@pytest.mark.parametrize("template", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_of_the_adapters_own_is_taken_without_a_tokenizer(template: str, tmp_path: Path) -> None:
    base = _write(tmp_path / "base", {**BASE, "additional_chat_templates/tool.jinja": "base"})
    adapter = _write(tmp_path / "adapter", {template: "mine", "special_tokens_map.json": "mine"})

    found = _sources(base, adapter)

    assert found[template] == adapter / template
    assert found["tokenizer.json"] == base / "tokenizer.json"
    assert "special_tokens_map.json" not in found
    assert not [path for path in found if path.startswith("additional_chat_templates/")]
    assert [path for path in found if path.startswith("chat_template")] == [template]
    said = _notes(base, adapter)
    assert any(f"The chat template comes from the adapter ({template})" in note for note in said)
    assert any("special_tokens_map.json is left out" in note for note in said)


def test_processor_and_generation_config_come_from_the_adapter_that_has_them(tmp_path: Path) -> None:
    base = _write(tmp_path / "base", {**BASE, "processor_config.json": "base"})
    adapter = _write(tmp_path / "adapter", {"preprocessor_config.json": "mine", "generation_config.json": "{}"})

    found = _sources(base, adapter)

    assert found["preprocessor_config.json"] == adapter / "preprocessor_config.json"
    assert found["processor_config.json"] == base / "processor_config.json"  # what the adapter does not replace
    assert found["generation_config.json"] == adapter / "generation_config.json"
    assert found["tokenizer.json"] == base / "tokenizer.json"
    said = _notes(base, adapter)
    assert "The processor comes from the adapter (preprocessor_config.json)." in said
    assert "The generation config comes from the adapter (generation_config.json)." in said


def test_no_licence_is_lost(tmp_path: Path) -> None:
    base = _write(tmp_path / "base", {**BASE, "NOTICE": "same"})
    adapter = _write(tmp_path / "adapter", {"LICENSE": "other words", "NOTICE": "same", "USE_POLICY.md": "be good"})

    found = _sources(base, adapter)

    assert found["LICENSE"] == base / "LICENSE"
    assert found["adapter-LICENSE"] == adapter / "LICENSE"
    assert found["USE_POLICY.md"] == adapter / "USE_POLICY.md"
    assert "adapter-NOTICE" not in found


def test_the_modules_of_sentence_transformers_come_along_with_their_weights(tmp_path: Path) -> None:
    modules = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Old"}])
    files = {
        "modules.json": modules, "sentence_bert_config.json": "{}", "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": "w", "3_Old/config.json": "{}", "3_Old/pytorch_model.bin": "w",
        "onnx/model.safetensors": "w",
    }  # fmt: skip
    base = _write(tmp_path / "base", {**BASE, **files})

    adapter = _write(tmp_path / "adapter", {"adapter_config.json": "{}"})
    with pytest.raises(UnsupportedCheckpoint, match=r"3_Old/pytorch_model\.bin of the base is a pickle"):
        find_companions(base, adapter, {})
    found = {companion.path for companion in find_companions(base, adapter, {}, pickles=True)}

    assert {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"} <= found
    assert "3_Old/pytorch_model.bin" in found
    assert "onnx/model.safetensors" not in found
    _write(base, {"3_Old/model.safetensors": "w"})
    assert "3_Old/pytorch_model.bin" not in _sources(base, adapter)  # twice the same


@pytest.mark.parametrize("text", ["[1", "3", '[{"path": "../x"}, {"path": ".git"}, 7]'])
def test_strange_modules_json_names_no_folder(text: str, tmp_path: Path) -> None:
    base = _write(tmp_path / "base", {**BASE, "modules.json": text, "x/model.safetensors": "w"})

    assert "x/model.safetensors" not in _sources(base, _write(tmp_path / "adapter", {"a": ""}))


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "1_Pooling/config.json"])
def test_a_git_lfs_pointer_is_never_carried_over(name: str, tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
    base = _write(tmp_path / "base", {**BASE, name: pointer})

    with pytest.raises(BrokenCheckpoint, match=f"{name} is a Git LFS pointer"):
        find_companions(base, _write(tmp_path / "adapter", {"a": ""}), {})


def _tokenizer(tokens: list[str], *, added: tuple[str, ...] = (), kind: str = "BPE") -> str:
    vocab = [[token, 0.0] for token in tokens] if kind == "Unigram" else {t: n for n, t in enumerate(tokens)}
    more = [{"id": len(tokens) + n, "content": token} for n, token in enumerate(added)]
    return json.dumps({"model": {"type": kind, "vocab": vocab}, "added_tokens": more})


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_what_differs_between_the_tokenizers_is_told(kind: str, tmp_path: Path) -> None:
    base = _write(
        tmp_path / "base",
        {
            "tokenizer.json": _tokenizer(["a", "b", "c"], kind=kind),
            "tokenizer_config.json": '{"eos_token": "</s>", "pad_token": {"content": "a"}}',
            "chat_template.jinja": "base",
        },
    )
    adapter = _write(
        tmp_path / "adapter",
        {
            "tokenizer.json": _tokenizer(["a", "c", "b"], added=("<new>",), kind=kind),
            "tokenizer_config.json": '{"eos_token": "<new>", "pad_token": "a"}',
        },
    )

    said = " ".join(_notes(base, adapter))

    assert "differs from the base's in chat_template.jinja, tokenizer.json, tokenizer_config.json." in said
    assert "1 are new, 0 of the base's are gone, and 2 have another id (such as 'b')" in said
    assert "Its eos_token is '<new>', the base's '</s>'." in said
    assert "pad_token" not in said


def test_a_tokenizer_that_is_the_bases_is_not_spoken_of(tmp_path: Path) -> None:
    base = _write(tmp_path / "base", {"tokenizer.json": "{}", "generation_config.json": "{}"})
    adapter = _write(tmp_path / "adapter", {"tokenizer.json": "{}"})

    assert _notes(base, adapter) == []


def test_tokens_beyond_the_embeddings_are_refused(tmp_path: Path) -> None:
    base = _write(tmp_path / "base", {"tokenizer.json": _tokenizer(["a", "b", "c"])})
    adapter = _write(tmp_path / "adapter", {"tokenizer.json": _tokenizer(["a", "b", "c"], added=("<x>", "<y>"))})

    check_tokenizer(base, adapter, 5)
    check_tokenizer(base, adapter, None)
    check_tokenizer(adapter, adapter, 4)  # the base has that fault already
    with pytest.raises(AdapterMismatch, match="gives the id 4 to '<y>', and the merged embeddings have 4 rows"):
        check_tokenizer(base, adapter, 4)


def test_an_invalid_generation_config_is_carried_and_told(tmp_path: Path) -> None:
    base = _write(tmp_path / "base", BASE)
    adapter = _write(tmp_path / "adapter", {"adapter_config.json": "{}"})

    found = {companion.path: companion for companion in find_companions(base, adapter, {})}

    assert copy_companion(found["generation_config.json"], tmp_path / "out") == BASE["generation_config.json"].encode()
    assert any("`temperature` with `do_sample: false`" in note for note in _notes(base, adapter))


@pytest.mark.parametrize(
    "text, problem", [(None, "cannot be read"), ("{", "cannot be read"), ("[1]", "not a JSON object")]
)
def test_a_base_without_a_config_is_refused(text: str | None, problem: str, tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=problem):
        read_config(_write(tmp_path, {"config.json": text} if text is not None else {}))
