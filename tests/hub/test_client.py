"""The unmodified client against the local Hub: everything that a release needs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RevisionNotFoundError,
)

from tests.hub.conftest import CARD, FILES, LARGE, PART_BYTES, REPO, commit_files, head_of
from tests.hub.server import LocalHub


def _status(caught: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return int(caught.value.response.status_code)


def test_publishes_in_one_commit_and_serves_the_same_bytes_at_the_tag(
    hub: LocalHub, alice: HfApi, tmp_path: Path
) -> None:
    assert alice.whoami()["name"] == "alice"
    assert alice.create_repo(REPO, private=True).repo_id == REPO
    alice.auth_check(REPO, write=True)
    head = head_of(alice)
    operations = [CommitOperationAdd(path, content) for path, content in FILES.items()]
    alice.preupload_lfs_files(REPO, operations)
    hub.forget_requests()
    oid = alice.create_commit(REPO, operations, commit_message="Release", parent_commit=head).oid
    assert [path for method, path in hub.requests() if method == "PUT"] == []
    assert sum("/commit/" in path for _, path in hub.requests()) == 1
    alice.create_tag(REPO, tag="v1.0.0", revision=oid, tag_message="first")
    commit_files(alice, {"config.json": b"broken"}, parent=oid)

    folder = snapshot_download(
        REPO, revision="v1.0.0", endpoint=hub.endpoint, token=alice.token, local_dir=tmp_path / "down"
    )
    assert {path: Path(folder, path).read_bytes() for path in FILES} == FILES
    assert {ref.name: ref.target_commit for ref in alice.list_repo_refs(REPO).tags} == {"v1.0.0": oid}
    view = hub.repo(REPO)
    assert view is not None
    assert view.private
    assert view.tag_messages == {"v1.0.0": "first"}
    assert view.commits[:2] == [head, oid]
    assert all(exchange.routed for exchange in hub.exchanges())


def test_uploads_large_files_in_parts(hub: LocalHub, alice: HfApi, released: str) -> None:
    parts = [exchange for exchange in hub.exchanges() if "/parts/" in exchange.path]
    assert [part.received_bytes for part in parts] == [PART_BYTES] * 4 + [1_280_000 - 4 * PART_BYTES]
    assert not any(part.signed_in for part in parts)
    view = hub.repo(REPO)
    assert view is not None
    assert view.read(LARGE) == FILES[LARGE]


def test_sends_no_blob_twice(hub: LocalHub, alice: HfApi, released: str) -> None:
    hub.forget_requests()
    alice.preupload_lfs_files(REPO, [CommitOperationAdd("again.safetensors", FILES[LARGE])])
    assert [path for method, path in hub.requests() if method == "PUT"] == []


@pytest.mark.parametrize("size", [1000, 1_200_000], ids=["basic", "multipart"])
def test_refuses_bytes_that_do_not_match_their_digest(hub: LocalHub, alice: HfApi, released: str, size: int) -> None:
    operation = CommitOperationAdd("x.safetensors", os.urandom(size))
    operation.upload_info.sha256 = hashlib.sha256(b"other").digest()
    with pytest.raises(RuntimeError, match="Error while uploading") as caught:
        alice.preupload_lfs_files(REPO, [operation])
    assert "do not match" in str(caught.value.__cause__)
    blobs = [path for path in hub.root.glob("blobs/lfs/*/*") if path.is_file()]
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in blobs)


def test_refuses_a_pointer_to_an_absent_blob(hub: LocalHub, alice: HfApi, released: str) -> None:
    operation = CommitOperationAdd("x.safetensors", b"never sent")
    operation._upload_mode, operation._is_uploaded = "lfs", True
    operation._should_ignore, operation._remote_oid = False, None
    with pytest.raises(BadRequestError, match="pointed to a file that does not exist"):
        alice.create_commit(REPO, [operation], commit_message="crash")
    assert head_of(alice) == released


def test_refuses_a_commit_on_a_stale_parent(hub: LocalHub, alice: HfApi, released: str) -> None:
    newer = commit_files(alice, {"a.txt": b"1"}, parent=released)
    with pytest.raises(HfHubHTTPError) as caught:
        commit_files(alice, {"a.txt": b"2"}, parent=released)
    assert _status(caught) == 412
    assert head_of(alice) == newer


def test_refuses_a_taken_tag_even_on_the_samecommit_files(hub: LocalHub, alice: HfApi, released: str) -> None:
    alice.create_tag(REPO, tag="v1", revision=released)
    with pytest.raises(HfHubHTTPError) as caught:
        alice.create_tag(REPO, tag="v1", revision=released)
    assert _status(caught) == 409
    alice.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        alice.delete_tag(REPO, tag="v1")


@pytest.mark.parametrize("tag", ["pkg/v1.2", "v1.2.0+build.7", "v1%2F2", "versión"])
def test_keeps_odd_tag_names(hub: LocalHub, alice: HfApi, released: str, tag: str) -> None:
    alice.create_tag(REPO, tag=tag, revision=released)
    assert [ref.name for ref in alice.list_repo_refs(REPO).tags] == [tag]
    assert alice.repo_info(REPO, revision=tag).sha == released
    path = hf_hub_download(REPO, "config.json", revision=tag, endpoint=hub.endpoint, token=alice.token)
    assert Path(path).read_bytes() == FILES["config.json"]
    alice.delete_tag(REPO, tag=tag)


@pytest.mark.parametrize("tag", ["a b", "a..b", "a~1", "x.lock", "-x", "a//b", ""])
def test_refuses_tag_names_that_git_refuses(hub: LocalHub, alice: HfApi, released: str, tag: str) -> None:
    with pytest.raises(BadRequestError):
        alice.create_tag(REPO, tag=tag, revision=released)


def test_a_tag_outlives_its_branch(hub: LocalHub, alice: HfApi, released: str) -> None:
    alice.create_branch(REPO, branch="staging/v1", revision=released)
    with pytest.raises(HfHubHTTPError) as caught:
        alice.create_branch(REPO, branch="staging/v1")
    assert _status(caught) == 409
    staged = commit_files(alice, {"a.txt": b"1"}, parent=released, branch="staging/v1")
    alice.create_tag(REPO, tag="v1", revision="staging/v1")
    alice.delete_branch(REPO, branch="staging/v1")
    assert head_of(alice) == released
    assert alice.repo_info(REPO, revision="v1").sha == staged


def test_deletes_and_copies(hub: LocalHub, alice: HfApi, released: str) -> None:
    operations: list[Any] = [
        CommitOperationDelete("config.json"),
        CommitOperationDelete("sub/"),
        CommitOperationCopy(LARGE, "copied.safetensors"),
        CommitOperationCopy("README.md", "copied.md"),
    ]
    alice.create_commit(REPO, operations, commit_message="move")
    view = hub.repo(REPO)
    assert view is not None
    assert view.read("copied.safetensors") == FILES[LARGE]
    assert view.read("copied.md") == CARD
    assert {"config.json", "sub/folder/notes.txt"}.isdisjoint(view.tree())
    with pytest.raises(EntryNotFoundError):
        alice.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="again")


def test_refuses_a_card_with_wrong_metadata_before_anything_is_sent(hub: LocalHub, alice: HfApi, released: str) -> None:
    hub.forget_requests()
    for card in (b"---\nlicense: [mit\n---\n", b"---\nbase_model_relation: cousin\nlicense: mit\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            commit_files(alice, {"README.md": card})
    assert {path for _, path in hub.requests()} == {"/api/validate-yaml"}
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit_files(alice, {"README.md": b"# no front matter\n"})
    assert alice.repo_info(REPO, revision=released).card_data.base_model == "acme/base"


def test_keeps_everything_over_a_restart(alice: HfApi, hub: LocalHub, released: str) -> None:
    hub.stop()
    with LocalHub.start(hub.root) as again:
        api = HfApi(endpoint=again.endpoint, token=alice.token)
        assert api.repo_info(REPO).sha == released
        path = hf_hub_download(REPO, LARGE, endpoint=again.endpoint, token=alice.token)
        assert Path(path).read_bytes() == FILES[LARGE]


def test_a_model_loads_at_its_tag_in_another_process(hub: LocalHub, alice: HfApi, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    alice.create_repo(REPO, private=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    oid = commit_files(alice, files)
    alice.create_tag(REPO, tag="v1.0.0", revision=oid)
    commit_files(alice, {"config.json": b"broken on main"})
    program = (
        "import hashlib, sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({REPO!r}, revision='v1.0.0')\n"
        "digest = hashlib.sha256()\n"
        "for _, tensor in sorted(model.state_dict().items()): digest.update(tensor.numpy().tobytes())\n"
        "print(digest.hexdigest())\n"
    )
    env = {"PATH": os.environ["PATH"], **hub.env(alice.token, home=tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest.hexdigest()
    assert all(exchange.routed for exchange in hub.exchanges())
