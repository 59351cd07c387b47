"""From a reference on the Hub to a folder at one commit, with exactly the files that are needed, each checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runner.files.sidecars import files as companion_files
from runner.files.sidecars.leftovers import check_leftovers
from runner.files.sidecars.names import is_weights
from runner.protocol.errors import (
    AccessDenied,
    BrokenAdapter,
    BrokenCheckpoint,
    HubError,
    NotEnoughDisk,
    RepoNotFound,
    UnsupportedAdapter,
    UnsupportedCheckpoint,
)
from runner.protocol.repo_ref import RepoRef
from runner.supervisor.hub import RemoteFile, connect, snapshot
from tests.supervisor.publish.world import World

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write(root: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def base_files() -> dict[str, str | bytes]:
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})
    return {
        "config.json": "{}",
        "generation_config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer.model": b"\x00\x01",
        "merges.txt": "a b",
        "chat_template.jinja": "{{ x }}",
        "additional_chat_templates/tool.jinja": "{{ y }}",
        "modeling_custom.py": "raise SystemExit",
        "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
        "source.spm": b"\x00\x02",
        "tekken.json": "{}",
        "bpe.codes": "a b",
        "nested/kernels/code.py": "raise SystemExit",
        "images/plot.png": b"png",
        "1_Pooling/config.json": "{}",
        "2_Dense/model.safetensors": b"d" * 100,
        "LICENSE": "as is",
        "USE_POLICY.md": "be good",
        "README.md": "---\nlicense: mit\n---\n",
        "model.safetensors.index.json": index,
        SHARDS[0]: b"s" * 1000,
        SHARDS[1]: b"t" * 2000,
    }


def unwanted_files() -> dict[str, str | bytes]:
    return {
        "model-00003-of-00003.safetensors": b"of another layout",
        "pytorch_model.bin": b"pickle",
        "pytorch_model.bin.index.json": "{}",
        "original/consolidated.00.pth": b"pickle",
        "original/params.json": "{}",
        "consolidated.safetensors": b"twice",
        "onnx/model.onnx": b"onnx",
        "model.gguf": b"gguf",
        "adapter_config.json": "{}",
        "adapter_model.safetensors": b"of an adapter beside the model",
        "3_Old/pytorch_model.bin": b"pickle",
        "checkpoint-10/config.json": "{}",
        "training_args.bin": b"pickle",
    }


def names(root: Path) -> set[str]:
    """Return what was downloaded; what is only seen by its name is an empty file."""
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.stat().st_size}


def seen(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - names(root)


def fetch(world: World, tmp_path: Path, kind: str = "base", revision: str | None = None) -> Path:
    ref = RepoRef(repo_id="acme/base", revision=revision)
    return world.connect().snapshot(ref, kind=kind, cache_dir=tmp_path / "cache").root  # type: ignore[arg-type]


def test_a_base_comes_with_its_shards_and_companions_and_nothing_else(world: World, tmp_path: Path) -> None:
    commit = world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files(), **unwanted_files()))
    ref = RepoRef(repo_id="acme/base")
    snap = world.connect().snapshot(ref, kind="base", cache_dir=tmp_path / "cache")
    assert (snap.ref, snap.repo_id, snap.commit) == (ref, "acme/base", commit)
    assert names(snap.root) == set(base_files())
    assert seen(snap.root) == set(unwanted_files())  # left out, and told
    for name, content in base_files().items():
        assert (snap.root / name).read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_the_single_file_wins_over_an_index_as_in_transformers(world: World, tmp_path: Path) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files(), **{"model.safetensors": b"w" * 50}))
    found = names(fetch(world, tmp_path))
    assert "model.safetensors" in found
    assert not found & {*SHARDS, "model.safetensors.index.json"}


def test_what_another_tool_left_in_the_cache_does_not_come_along(world: World, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files(), **unwanted_files()))
    snapshot_download("acme/base", endpoint=world.hub.endpoint, cache_dir=tmp_path / "cache", token=world.token)
    assert names(fetch(world, tmp_path)) == set(base_files())


def test_a_branch_is_resolved_once_and_a_commit_stays(world: World, tmp_path: Path) -> None:
    first = world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files()))
    api = world.connect()._api
    api.upload_file(path_or_fileobj=b'{"new": 1}', path_in_repo="config.json", repo_id="acme/base")
    assert (fetch(world, tmp_path) / "config.json").read_text() == '{"new": 1}'
    assert (fetch(world, tmp_path, revision=first) / "config.json").read_text() == "{}"
    assert (fetch(world, tmp_path, revision="main") / "config.json").read_text() == '{"new": 1}'


def test_an_adapter_comes_without_checkpoints_and_without_a_model_beside_it(world: World, tmp_path: Path) -> None:
    adapter: dict[str, str | bytes] = {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": b"a" * 100,
        "tokenizer.json": "{}",
        "README.md": "hello",
    }
    more: dict[str, str | bytes] = {
        "checkpoint-10/adapter_model.safetensors": b"old",
        "model.safetensors": b"m" * 10,
        "optimizer.pt": b"o",
    }
    world.hub.add_model("acme/base", write(tmp_path / "seed", **adapter, **more))
    root = fetch(world, tmp_path, "adapter")
    assert names(root) == set(adapter)
    assert seen(root) == set(more)
    check_leftovers(with_config(root), ())


def with_config(root: Path) -> Path:
    """Make the model beside an adapter a whole one."""
    (root / "config.json").write_text("{}")
    return root


def test_trained_state_in_an_adapters_repository_is_seen_and_refused(world: World, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"adapter_config.json": "{}", "adapter_model.safetensors": b"a" * 100}
    files |= {"non_lora_trainables.bin": b"p" * 9}
    world.hub.add_model("acme/base", write(tmp_path / "seed", **files))
    with pytest.raises(UnsupportedAdapter, match=r"non_lora_trainables\.bin"):
        check_leftovers(fetch(world, tmp_path, "adapter"), ())
    assert world.sent("GET", "non_lora_trainables.bin") == 0


def test_the_modules_of_an_adapter_come_with_it(world: World, tmp_path: Path) -> None:
    found: dict[str, str | bytes] = {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": b"a" * 100,
        "modules.json": '[{"path": ""}, {"path": "2_Dense"}]',
        "config_sentence_transformers.json": "{}",
        "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": b"d" * 100,
    }
    world.hub.add_model("acme/base", write(tmp_path / "seed", **found))
    assert names(fetch(world, tmp_path, "adapter")) == set(found)


def test_a_merged_model_is_judged_by_its_full_listing(world: World, tmp_path: Path) -> None:
    files = {**base_files(), **unwanted_files(), ".hidden": b"x", "adapter/adapter_model.safetensors": b"kept"}
    world.hub.add_model("acme/base", write(tmp_path / "seed", **files))
    root = fetch(world, tmp_path, "merged")
    assert names(root) | seen(root) >= set(files)
    weights = {path for path in unwanted_files() if is_weights(path)}
    assert seen(root) == weights
    assert (root / "adapter/adapter_model.safetensors").read_bytes() == b"kept"
    assert sorted(Path(path).name for path in weights if world.sent("GET", f"/resolve/{path}")) == []


def test_a_file_too_large_to_be_carried_stops_the_download(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companion_files, "MAX_COMPANION_BYTES", 1500)
    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files(), **{"corpus.txt": b"c" * 1600}))
    with pytest.raises(UnsupportedCheckpoint, match=r"corpus\.txt has 0 MB"):
        fetch(world, tmp_path)
    assert world.sent("GET", SHARDS[0]) == 0


@pytest.mark.parametrize(
    "files, family, says",
    [
        ({"adapter_config.json": "{}", "adapter_model.bin": b"p"}, UnsupportedAdapter, "pickled weights only"),
        ({"adapter_config.json": "{}"}, BrokenAdapter, "has no adapter_model.safetensors"),
        ({"config.json": "{}"}, BrokenAdapter, "has no adapter_config.json: it holds a whole model"),
        ({"README.md": "Nothing yet"}, BrokenAdapter, r"has no adapter_config.json\."),
    ],
)
def test_a_repository_that_is_no_safe_adapter_is_refused_before_the_download(
    world: World, tmp_path: Path, files: dict[str, str | bytes], family: type[Exception], says: str
) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **files))
    with pytest.raises(family, match=says):
        fetch(world, tmp_path, "adapter")
    assert world.sent("GET", "/resolve/") == 0


@pytest.mark.parametrize(
    "files, family, says",
    [
        ({"config.json": "{}", "pytorch_model.bin": b"p"}, UnsupportedCheckpoint, "pickled weights only"),
        ({"config.json": "{}"}, BrokenCheckpoint, "has neither"),
        ({"model.safetensors": b"a"}, BrokenCheckpoint, r"has no config\.json"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": b"a"}, UnsupportedCheckpoint, "is an adapter"),
        ({"config.json": "{}", "model-Q4_K_M.gguf": b"GGUF"}, UnsupportedCheckpoint, "holds GGUF, the format of llama"),
        ({"config.json": "{}", "weights.npz": b"PK"}, UnsupportedCheckpoint, "mlx's older format"),
        ({"params.json": "{}", "consolidated.00.pth": b"PK"}, UnsupportedCheckpoint, "the authors' own layout"),
        ({"config.json": "{}", "model.fp16.safetensors": b"a"}, UnsupportedCheckpoint, "only the variant 'fp16'"),
        ({"config.json": "{}", SHARDS[0]: b"a", SHARDS[1]: b"a"}, BrokenCheckpoint, "has shards"),
        (
            {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "../../etc/passwd"}}'},
            BrokenCheckpoint,
            "names the file",
        ),
        (
            {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "gone.safetensors"}}'},
            BrokenCheckpoint,
            r"has no gone\.safetensors",
        ),
    ],
)
def test_a_repository_that_is_no_safe_base_is_refused_before_weights_are_downloaded(
    world: World, tmp_path: Path, files: dict[str, str | bytes], family: type[Exception], says: str
) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **files))
    with pytest.raises(family, match=says):
        fetch(world, tmp_path)


@pytest.mark.parametrize("name", ["config.json", SHARDS[1]])
def test_bytes_that_rotted_in_the_cache_are_fetched_again(world: World, tmp_path: Path, name: str) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files()))
    stored = (fetch(world, tmp_path) / name).resolve()
    good = stored.read_bytes()
    stored.write_bytes(b"X" + good[1:])
    assert (fetch(world, tmp_path) / name).read_bytes() == good


def test_a_cached_base_is_not_fetched_and_not_hashed_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files()))
    fetch(world, tmp_path)
    world.hub.forget_requests()
    hashed: list[Path] = []
    original = snapshot.content_digest

    def watch(path: Path, file: RemoteFile) -> str:
        hashed.append(path)
        return original(path, file)

    monkeypatch.setattr(snapshot, "content_digest", watch)
    fetch(world, tmp_path)
    assert world.sent("GET", "/resolve/") == 0
    assert hashed == []


def test_bytes_that_are_not_what_the_hub_lists_are_refused(world: World, tmp_path: Path) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files()))
    blobs = [path for path in (tmp_path / "hub" / "blobs").rglob("*") if path.is_file()]
    for blob in blobs:
        content = blob.read_bytes()
        if content == b"t" * 2000:
            blob.write_bytes(b"u" * 2000)
    with pytest.raises(HubError, match=r"model-00002-of-00002\.safetensors of acme/base.* is not what the Hub lists"):
        fetch(world, tmp_path)


def test_too_little_disk_is_told_before_the_download(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(NotEnoughDisk, match="needs"):
        fetch(world, tmp_path)
    assert world.sent("GET", SHARDS[0]) == 0


def test_a_download_goes_on_when_the_hub_hiccups(world: World, tmp_path: Path) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files()))
    world.hub.fail("resolve", where=SHARDS[0])
    world.hub.fail("tree")
    world.hub.fail("info")
    assert names(fetch(world, tmp_path)) == set(base_files())


@pytest.mark.parametrize("revision", [None, "nowhere", "f" * 40])
def test_an_unknown_repository_or_revision_is_not_found(world: World, tmp_path: Path, revision: str | None) -> None:
    if revision:
        world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files()))
    with pytest.raises(RepoNotFound):
        fetch(world, tmp_path, revision=revision)


def test_a_gated_base_names_the_terms_and_the_base_token(world: World, tmp_path: Path) -> None:
    world.hub.add_model("secret/base", write(tmp_path / "seed", **base_files()))
    world.hub.gate("secret/base")
    with pytest.raises(AccessDenied, match="gated") as caught:
        world.connect().snapshot(RepoRef(repo_id="secret/base"), kind="base", cache_dir=tmp_path / "cache")
    assert "base-token" in str(caught.value)


def test_a_public_base_needs_no_token(world: World, tmp_path: Path) -> None:
    world.hub.add_model("acme/base", write(tmp_path / "seed", **base_files()))
    hub = connect(world.hub.endpoint, token=None, patience=world.patience)
    snap = hub.snapshot(RepoRef(repo_id="acme/base"), kind="base", cache_dir=tmp_path / "cache")
    assert names(snap.root) == set(base_files())


def test_a_local_folder_is_taken_as_it_is(world: World, tmp_path: Path) -> None:
    snap = world.connect().snapshot(RepoRef(path=tmp_path), kind="base", cache_dir=tmp_path / "cache")
    assert (snap.root, snap.commit, snap.repo_id) == (tmp_path, None, None)
    assert world.hub.requests() == []
