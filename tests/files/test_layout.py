"""Headers and indexes as data: what is written is read, and every lie is named."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from runner.files.layout import (
    INDEX_FILE,
    SINGLE_FILE,
    build_header,
    read_checkpoint,
    read_tensor_file,
    read_weight_map,
)  # fmt: skip
from runner.protocol.errors import BrokenCheckpoint, UnsupportedCheckpoint

TENSORS = st.lists(
    st.tuples(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20),
        st.sampled_from(["BF16", "F16", "F32", "I64", "U8"]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda entry: entry[0],
).filter(lambda entries: all(name != "__metadata__" for name, _, _ in entries))
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U8": 1}


@settings(max_examples=60, deadline=None)
@given(tensors=TENSORS, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_a_header_that_is_built_is_read_back(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("header")
    data_bytes = sum(prod(shape) * SIZES[dtype] for _, dtype, shape in tensors)
    header = build_header(tensors, metadata)
    (folder / SINGLE_FILE).write_bytes(header + bytes(data_bytes))

    file = read_tensor_file(folder, SINGLE_FILE)

    assert sorted((t.name, t.dtype, t.shape) for t in file.tensors) == sorted(tensors)
    assert (file.header, dict(file.metadata)) == (header, metadata)
    assert len(header) % 8 == 0
    if all(prod(shape) for _, _, shape in tensors):
        assert {name: tuple(value.shape) for name, value in load_file(folder / SINGLE_FILE).items()} == {
            name: shape for name, _, shape in tensors
        }


def _save(folder: Path) -> Path:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, folder / SINGLE_FILE)
    return folder / SINGLE_FILE


def _rewrite(path: Path, change: str, to: str) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].decode().rstrip().replace(change, to).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


LIES = {
    "overlap": ('"data_offsets":[24,40]', '"data_offsets":[20,36]'),
    "hole": ('"data_offsets":[24,40]', '"data_offsets":[32,48]'),
    "shape": ('"shape":[2,3]', '"shape":[2,4]'),
    "negative": ('"shape":[4]', '"shape":[-4]'),
    "fraction": ('"shape":[4]', '"shape":[4.0]'),
    "not JSON": ("{", "["),
    "twice": ('"b":', '"a":'),
}


def test_a_dtype_that_is_not_known_is_named_and_not_called_a_cut_download(tmp_path: Path) -> None:
    _rewrite(_save(tmp_path), '"dtype":"F32"', '"dtype":"F33"')

    with pytest.raises(UnsupportedCheckpoint, match="in the dtype 'F33', which this version does not know"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu])
def test_every_float8_that_safetensors_writes_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=torch.uint8).view(dtype)}, tmp_path / SINGLE_FILE)

    assert read_checkpoint(tmp_path).tensors["a"].shape == (2, 3)


@pytest.mark.parametrize("lie", LIES)
def test_refuses_a_header_that_lies(lie: str, tmp_path: Path) -> None:
    path = _save(tmp_path)
    _rewrite(path, *LIES[lie])

    with pytest.raises(BrokenCheckpoint, match="not a sound safetensors file"):
        read_checkpoint(tmp_path)


NONSENSE = {
    "[]": "not a JSON object",
    '{"__metadata__":{"a":1}}': "not a map from text to text",
    '{"a":{"dtype":"F32","shape":[]}}': "lacks dtype, shape or data_offsets",
    '{"a":7}': "lacks dtype, shape or data_offsets",
}


@pytest.mark.parametrize("header", NONSENSE)
def test_refuses_a_header_that_is_json_and_nonsense(header: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header.encode())

    with pytest.raises(BrokenCheckpoint, match=NONSENSE[header]):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}"])
def test_refuses_a_file_that_is_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)

    with pytest.raises(BrokenCheckpoint):
        read_checkpoint(tmp_path)


def test_refuses_a_file_that_was_cut_or_grew(tmp_path: Path) -> None:
    path = _save(tmp_path)
    content = path.read_bytes()

    for other in (content[:-1], content + b"\0"):
        path.write_bytes(other)
        with pytest.raises(BrokenCheckpoint):
            read_checkpoint(tmp_path)


def _index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin", "..\\x.safetensors"]
)
def test_refuses_an_index_that_leads_elsewhere(file: str, tmp_path: Path) -> None:
    _index(tmp_path, {"a": file})

    with pytest.raises(BrokenCheckpoint, match="names the file"):
        read_weight_map(tmp_path / INDEX_FILE)


def test_refuses_an_index_that_contradicts_the_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors")

    for weight_map in ({"a": "x.safetensors"}, {"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors"}):
        _index(tmp_path, weight_map)
        with pytest.raises(BrokenCheckpoint):
            read_checkpoint(tmp_path)


def test_refuses_a_tensor_that_two_shards_hold(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.ones(1), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    _index(tmp_path, {"a": "x.safetensors", "x": "x.safetensors", "y": "y.safetensors"})

    with pytest.raises(BrokenCheckpoint, match=r"'a' is also in x\.safetensors"):
        read_checkpoint(tmp_path)


def test_refuses_a_folder_without_weights_and_an_index_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="has neither"):
        read_checkpoint(tmp_path)

    _index(tmp_path, ["a"])
    with pytest.raises(BrokenCheckpoint, match="is not a weight index"):
        read_checkpoint(tmp_path)


def test_stale_shards_beside_the_index_are_ignored(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    _index(tmp_path, {"a": "model-00001-of-00001.safetensors"})

    checkpoint = read_checkpoint(tmp_path)

    assert [file.name for file in checkpoint.files] == ["model-00001-of-00001.safetensors"]


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(UnsupportedCheckpoint, match="pickled"):
        read_checkpoint(tmp_path)
