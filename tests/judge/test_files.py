"""Files beside the weights: the base's, the adapter's to bring, the release's own, or a named failure."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.files.layout import read_checkpoint
from runner.judge.sidecars.files import NAMES, find_files, judge_files
from runner.judge.sidecars.listing import MAX_FILES, list_folder
from runner.judge.sidecars.names import Kind, kind_of, must_come_along
from runner.protocol.verdict import Outcome
from tests.judge.forms import write_folder

MODULES = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
BASE = {
    "generation_config.json": '{"eos_token_id": 1}',
    "spm.model": "pieces",
    "sentencepiece.model": "pieces",
    "bpe.codes": "codes",
    "source.spm": "from",
    "target.spm": "to",
    "tekken.json": '{"config": {}}',
    "vocab.json": '{"a": 0, "b": 1}',
    "merges.txt": "a b",
    "normalizer.json": '{"colour": "color"}',
    "preprocessor_config.json": '{"size": {"height": 32}}',
    "processor_config.json": '{"image_seq_length": 4}',
    "video_preprocessor_config.json": '{"fps": 2}',
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "chat_template.jinja": "{{ messages }}",
    "modules.json": json.dumps(MODULES),
    "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    "2_Dense/config.json": '{"out_features": 8}',
    "2_Dense/model.safetensors": "weights of the head",
    "config_sentence_transformers.json": '{"prompts": {"query": "Q: "}}',
    "sentence_bert_config.json": '{"max_seq_length": 64}',
    "modeling_own.py": "class Own: ...",
    "layers/attention.py": "class Attention: ...",
    "LICENSE": "Apache",
    "vocabulary_of_sounds.dat": "sounds",
}
ASIDE = {
    "README.md": "a card",
    ".gitattributes": "*.bin",
    "pytorch_model.bin": "pickle",
    "model.gguf": "GGUF",
    "onnx/model.onnx": "onnx",
    "onnx/config.json": "{}",
    "original/consolidated.00.pth": "pickle",
    "original/params.json": "{}",
    "checkpoint-10/trainer_state.json": "{}",
    "adapter_config.json": "{}",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", BASE)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return write(tmp_path / "merged", BASE)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    return tmp_path / "adapter"


def write(root: Path, files: dict[str, str]) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    return write_folder(root, files=files)


def told(base: Path, adapter: Path, merged: Path, rows: int | None = None) -> dict[str, str]:
    """Return path → what is said of each file that fails."""
    found = find_files(base, (adapter,), read_checkpoint(merged), rows=rows)
    return {finding.path: finding.said for finding in found if not finding.is_warning}


def warned(base: Path, adapter: Path, merged: Path) -> set[str]:
    return {f.path for f in find_files(base, (adapter,), read_checkpoint(merged), rows=None) if f.is_warning}


def test_an_untouched_folder_is_right(base: Path, adapter: Path, merged: Path) -> None:
    checks = judge_files(base, (adapter,), read_checkpoint(merged), rows=None)
    assert [(check.name, check.outcome) for check in checks] == [(name, Outcome.PASS) for name in NAMES.values()]


@pytest.mark.parametrize("name", BASE)
def test_every_file_of_the_base_is_needed_as_it_is(base: Path, adapter: Path, merged: Path, name: str) -> None:
    (merged / name).write_text("[]")
    assert list(told(base, adapter, merged)) == [name]
    (merged / name).unlink()
    assert told(base, adapter, merged) == {name: f"{name} is missing"}


@pytest.mark.parametrize("name", ASIDE)
def test_what_no_release_carries_is_not_missed(tmp_path: Path, adapter: Path, merged: Path, name: str) -> None:
    assert told(write(tmp_path / "fuller", BASE | {name: ASIDE[name]}), adapter, merged) == {}


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "deep/model.pkl", "model.gguf", "deep/model.safetensors", "adapter_config.json",
        "adapter_model.safetensors", "model.safetensors.index.json", "onnx/model.onnx", "2_Dense/other.safetensors",
        "modeling_new.py", "layers/new.py", "tokenizer_config.json", "vocab.txt", "extra.spm", "notes.txt", "a.png",
        "adapter/adapter_config.json", "merge-report/x.svg", "checksums.txt", "model.sig", ".hidden", "NOTICE",
        "additional_chat_templates/other.jinja", "1_Pooling/more.json", "a folder/with  spaces\n.py",
    ],
)  # fmt: skip
def test_what_neither_side_has_is_named(base: Path, adapter: Path, merged: Path, name: str) -> None:
    (merged / name).parent.mkdir(parents=True, exist_ok=True)
    (merged / name).write_text("{}")
    said = told(base, adapter, merged)
    assert list(said) == [name]
    assert (name if name.isprintable() else ascii(name)) in said[name]


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".cache/huggingface/download/x.metadata"])
def test_bookkeeping_may_lie_beside(base: Path, adapter: Path, merged: Path, name: str) -> None:
    (merged / name).parent.mkdir(parents=True, exist_ok=True)
    (merged / name).write_text("anything")
    assert told(base, adapter, merged) == {}


@pytest.mark.parametrize("name", [name for name in BASE if name.endswith(".json")])
def test_other_spacing_is_a_warning(base: Path, adapter: Path, merged: Path, name: str) -> None:
    content = json.loads(BASE[name])
    again = dict(reversed(content.items())) if isinstance(content, dict) else content
    (merged / name).write_text(json.dumps(again, indent=7))
    assert told(base, adapter, merged) == {}
    assert warned(base, adapter, merged) == {name}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _unreadable_folder(path: Path) -> None:
    path.mkdir()
    path.rmdir()
    path.symlink_to("/")


@pytest.mark.parametrize(
    "make, what",
    [
        (_pipe, "a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a link to a device"),
        (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
        (_unreadable_folder, "a link to a folder"),
        (lambda path: path.symlink_to(path.name), "a link that leads nowhere"),
    ],
)
@pytest.mark.parametrize("name", ["spm.model", "modeling_own.py", "more"])
def test_what_is_no_file_is_named_and_not_opened(
    base: Path, adapter: Path, merged: Path, name: str, make: Callable[[Path], None], what: str
) -> None:
    checkpoint = read_checkpoint(merged)  # reading it again may refuse the folder as a whole
    (merged / name).unlink(missing_ok=True)
    make(merged / name)
    found = find_files(base, (adapter,), checkpoint, rows=None)
    assert any(what in finding.said and name in finding.said for finding in found)


def _all_said(base: Path, adapter: Path, merged: Path) -> list[str]:
    return [finding.said for finding in find_files(base, (adapter,), read_checkpoint(merged), rows=None)]


def test_a_link_to_the_right_bytes_is_right(base: Path, adapter: Path, merged: Path) -> None:
    (merged / "spm.model").rename(merged.parent / "blob")
    (merged / "spm.model").symlink_to(merged.parent / "blob")
    assert told(base, adapter, merged) == {}


def test_a_folder_of_very_many_files_is_not_read_to_its_end(base: Path, adapter: Path, merged: Path) -> None:
    (merged / "deep").mkdir()
    for number in range(MAX_FILES + 1):
        (merged / "deep" / str(number)).touch()
    assert any(f"more than {MAX_FILES} files" in said for said in _all_said(base, adapter, merged))


def test_a_deep_folder_is_read(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(200):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "x.py").touch()
    assert len(list_folder(tmp_path).sizes) == 1


@pytest.mark.parametrize("name", ["preprocessor_config.json", "generation_config.json"])
def test_the_adapter_may_bring_its_own(base: Path, adapter: Path, merged: Path, name: str) -> None:
    (adapter / name).write_text('{"of": "the adapter"}')
    for content, is_right in ((BASE[name], True), ('{"of": "the adapter"}', True), ('{"of": "nobody"}', False)):
        (merged / name).write_text(content)
        assert (told(base, adapter, merged) == {}) is is_right


@pytest.mark.parametrize("name", ["modeling_own.py", "new.py", "training_args.bin", "spm.model", "license.py"])
def test_the_adapter_may_not_bring_everything(base: Path, adapter: Path, merged: Path, name: str) -> None:
    for folder in (adapter, merged):
        (folder / name).write_text("of the adapter")
    if name == "spm.model":  # a vocabulary: then it is its to bring, and has to be there
        assert told(base, adapter, merged) == {}
        (merged / name).write_text(BASE[name])
    assert list(told(base, adapter, merged)) == [name]


def test_trained_modules_of_the_adapter_must_be_there(base: Path, adapter: Path, merged: Path) -> None:
    mine = {"modules.json": json.dumps(MODULES), "2_Dense/config.json": "{}", "2_Dense/model.safetensors": "trained"}
    for name, text in mine.items():
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text(text)
    assert set(told(base, adapter, merged)) == {"2_Dense/config.json", "2_Dense/model.safetensors"}
    for name, text in mine.items():
        (merged / name).write_text(text)
    assert told(base, adapter, merged) == {}
    for name in ("1_Pooling/config.json", "sentence_bert_config.json"):  # of the base's modules, which are replaced
        (merged / name).unlink()
    assert told(base, adapter, merged) == {}
    (merged / "2_Dense/model.safetensors").unlink()
    assert list(told(base, adapter, merged)) == ["2_Dense/model.safetensors"]


def test_prompts_of_the_adapter_must_be_there(base: Path, adapter: Path, merged: Path) -> None:
    name = "config_sentence_transformers.json"
    (adapter / name).write_text('{"prompts": {}}')
    assert list(told(base, adapter, merged)) == [name]
    (merged / name).write_text('{"prompts": {}}')
    assert told(base, adapter, merged) == {}


def test_both_licences_are_there(base: Path, adapter: Path, merged: Path) -> None:
    (adapter / "LICENSE").write_text("MIT")
    (adapter / "NOTICE").write_text("by me")
    assert set(told(base, adapter, merged)) == {"adapter-LICENSE", "NOTICE"}
    (merged / "adapter-LICENSE").write_text("MIT")
    (merged / "NOTICE").write_text("by me")
    assert told(base, adapter, merged) == {}
    (merged / "LICENSE").write_text("MIT")
    assert list(told(base, adapter, merged)) == ["LICENSE"]


def publish(folder: Path, adapter: Path, config: str = "{}") -> None:
    """Add what a release has on top: manifest, checksums, a picture, a card, and the archived adapter."""
    (adapter / "adapter_config.json").write_text(config)
    (folder / "adapter").mkdir()
    shutil.copy(adapter / "adapter_config.json", folder / "adapter")
    (folder / "merge-report").mkdir()
    (folder / "merge-report/heat.svg").write_text("<svg/>")
    (folder / "README.md").write_text("a card")
    (folder / "model.sig").write_text("signature")

    def entry(name: str) -> dict[str, object]:
        data = (folder / name).read_bytes()
        return {"path": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    manifest = {
        "files": [entry(name) for name in BASE],
        "archive": [entry("adapter/adapter_config.json")],
        "signed_by": "me",
    }
    (folder / "merge-manifest.json").write_text(json.dumps(manifest))
    names = [*BASE, "merge-manifest.json", "README.md", "merge-report/heat.svg", "adapter/adapter_config.json"]
    (folder / "checksums.txt").write_text("".join(f"{entry(name)['sha256']}  {name}\n" for name in names))


DOCUMENTS = (
    "merge-manifest.json", "checksums.txt", "model.sig", "merge-report/heat.svg", "adapter/adapter_config.json",
)  # fmt: skip


def test_a_published_release_is_right(base: Path, adapter: Path, merged: Path) -> None:
    publish(merged, adapter)
    assert told(base, adapter, merged) == {}
    (merged / "README.md").write_text("an edited card")
    assert told(base, adapter, merged) == {}


@pytest.mark.parametrize("name", ["merge-manifest.json", "merge-report/heat.svg", "adapter/adapter_config.json"])
def test_a_changed_document_of_a_release_is_named(base: Path, adapter: Path, merged: Path, name: str) -> None:
    publish(merged, adapter)
    (merged / name).write_bytes((merged / name).read_bytes() + b" ")
    assert name in told(base, adapter, merged)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_lost_document_of_a_release_is_named(base: Path, adapter: Path, merged: Path, name: str) -> None:
    publish(merged, adapter)
    (merged / name).unlink()
    is_needed = name in ("merge-manifest.json", "checksums.txt")
    assert bool(told(base, adapter, merged)) is is_needed
    assert (name in warned(base, adapter, merged)) is not is_needed


@pytest.mark.parametrize("name", ["adapter/other.json", "adapter/adapter_model.safetensors", "merge-report/x.svg"])
def test_what_a_release_does_not_list_is_named(base: Path, adapter: Path, merged: Path, name: str) -> None:
    publish(merged, adapter)
    (merged / name).write_text("{}")
    assert list(told(base, adapter, merged)) == [name]


def test_a_list_of_strangers_allows_no_code_and_no_weights(base: Path, adapter: Path, merged: Path) -> None:
    publish(merged, adapter)
    manifest = json.loads((merged / "merge-manifest.json").read_text())
    wrong = {"path": "x.py", "size_bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    manifest["files"].append(wrong)
    manifest["archive"] += [{**wrong, "path": name} for name in ("adapter/adapter_model.bin", "adapter/y.py")]
    (merged / "merge-manifest.json").write_text(json.dumps(manifest))
    for name in ("x.py", "adapter/adapter_model.bin", "adapter/y.py"):
        (merged / name).write_text("{}")
    assert {"x.py", "adapter/adapter_model.bin", "adapter/y.py"} <= told(base, adapter, merged).keys()


def test_a_base_that_is_a_release_itself(base: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    publish(base, tmp_path / "first", config='{"r": 8}')
    assert told(base, adapter, merged) == {}
    shutil.copy(base / "merge-manifest.json", merged)  # speaks of the base
    assert told(base, adapter, merged) == {}
    (merged / "merge-manifest.json").unlink()
    publish(merged, adapter)
    assert told(base, adapter, merged) == {}


@pytest.mark.parametrize("content", ["[]", "{", "null", '{"files": [1, {"path": 2}]}', "[" * 100_000])
def test_a_broken_manifest_lists_nothing(base: Path, adapter: Path, merged: Path, content: str) -> None:
    (merged / "merge-manifest.json").write_text(content)
    (merged / "x.py").write_text("")
    assert list(told(base, adapter, merged)) == ["x.py"]


def test_every_kind_of_file_is_told_by_its_own_check(base: Path, adapter: Path, merged: Path) -> None:
    for name in ("adapter_config.json", "vocab.json", "generation_config.json", "modeling_own.py"):
        (merged / name).write_text("[]")
    failed = judge_files(base, (adapter,), read_checkpoint(merged), rows=None)
    assert [check.outcome for check in failed] == [Outcome.FAIL] * 4
    for check, name in zip(
        failed, ("adapter_config.json", "vocab.json", "generation_config.json", "modeling_own.py"), strict=True
    ):
        assert name in check.detail


def test_the_table_knows_what_a_file_is_for() -> None:
    assert kind_of("2_Dense/model.safetensors", ("2_Dense/",)) is Kind.MODULE
    assert kind_of("2_Dense/model.safetensors") is Kind.WEIGHTS
    assert kind_of("license_check.py") is Kind.OTHER
    assert kind_of("LICENSE.txt") is Kind.NOTICE


def test_a_pickle_of_a_module_is_wanted_only_where_nothing_else_has_its_weights(tmp_path: Path) -> None:
    files = {"modules.json": json.dumps(MODULES), "2_Dense/pytorch_model.bin": "pickle", "2_Dense/config.json": "{}"}
    wanted = must_come_along(list_folder(write(tmp_path / "base", files)))
    assert set(wanted) == set(files)
    wanted = must_come_along(list_folder(write(tmp_path / "base", {"2_Dense/model.safetensors": "safe"})))
    assert set(wanted) == {*files, "2_Dense/model.safetensors"} - {"2_Dense/pytorch_model.bin"}
