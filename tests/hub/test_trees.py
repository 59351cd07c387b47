"""What the server shows of commits: ids as git makes them, listings in pages, files whole and in ranges."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from tests.hub.conftest import FILES, LARGE, REPO, commit_files
from tests.hub.disk import git_blob_oid
from tests.hub.server import LocalHub


def test_tree_shows_sha256_of_large_and_git_ids_of_small_files(hub: LocalHub, alice: HfApi, released: str) -> None:
    tree = {file.path: file for file in alice.list_repo_tree(REPO, recursive=True, revision=released)}
    for path, content in FILES.items():
        if path.endswith(".safetensors"):
            assert tree[path].lfs.sha256 == hashlib.sha256(content).hexdigest()
            assert tree[path].lfs.size == tree[path].size == len(content)
        else:
            assert tree[path].lfs is None
            assert tree[path].blob_id == git_blob_oid(content)
    # The .gitattributes of a new repository on the Hub, known from many public listings.
    assert tree[".gitattributes"].blob_id == "a6344aac8c09253b3b630fb776ae94478aa0275b"
    assert (
        alice.verify_repo_checksums(
            REPO,
            revision=released,
            local_dir=snapshot_download(REPO, revision=released, endpoint=hub.endpoint, token=alice.token),
        ).checked_count
        == len(tree) - 2
    )


def test_names_trees_as_git_does(hub: LocalHub, alice: HfApi, released: str, tmp_path: Path) -> None:
    view = hub.repo(REPO)
    assert view is not None
    for path in view.tree(released):
        content = view.read(path, released)
        if path.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n"
            content = text.encode()
        (tmp_path / "work" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / path).write_bytes(content)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
    for command in (["init", "-q"], ["-c", "filter.lfs.clean=", "add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path / "work", env=env, check=True)
    tree = subprocess.run(["git", "write-tree"], cwd=tmp_path / "work", env=env, check=True, capture_output=True)
    assert tree.stdout.decode().strip() == view.commit(released).tree


def test_lists_in_pages(hub: LocalHub, alice: HfApi, released: str) -> None:
    many = {f"n/{number:03d}.txt": b"%d" % number for number in range(90)}
    newer = commit_files(alice, many)
    hub.forget_requests()
    below = [entry.path for entry in alice.list_repo_tree(REPO, "n", revision=newer)]
    assert below == sorted(many)
    assert len(hub.requests()) == 3
    top = {entry.path: entry for entry in alice.list_repo_tree(REPO, expand=True)}
    assert (top["n"].last_commit.oid, top["README.md"].last_commit.oid) == (newer, released)
    assert len(top) == 7
    assert [commit.commit_id for commit in alice.list_repo_commits(REPO)][:2] == [newer, released]
    found = alice.get_paths_info(REPO, ["absent", "n/001.txt", "sub"])
    assert [entry.path for entry in found] == ["n/001.txt", "sub"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(alice.list_repo_tree(REPO, "absent"))


def test_adds_attributes_for_large_files_without_a_rule(hub: LocalHub, alice: HfApi, released: str) -> None:
    commit_files(alice, {"blob.dat": b"\0binary"})
    view = hub.repo(REPO)
    assert view is not None
    assert view.tree()["blob.dat"] == hashlib.sha256(b"\0binary").hexdigest()
    assert view.read(".gitattributes").endswith(b"blob.dat filter=lfs diff=lfs merge=lfs -text\n")


def test_reads_ranges_without_a_token_on_the_blob_host(hub: LocalHub, alice: HfApi, released: str) -> None:
    url = f"{hub.endpoint}/{REPO}/resolve/{released}/{LARGE}"
    auth = {"Authorization": f"Bearer {alice.token}"}
    redirect = httpx2.head(url, headers=auth)
    assert redirect.status_code == 302
    assert redirect.headers["x-repo-commit"] == released
    assert redirect.headers["x-linked-etag"] == f'"{hashlib.sha256(FILES[LARGE]).hexdigest()}"'
    assert redirect.headers["x-linked-size"] == str(len(FILES[LARGE]))
    target = redirect.headers["location"]
    assert target.startswith("http://127.0.0.1:")
    for wanted, expected in (
        ("bytes=10-19", FILES[LARGE][10:20]),
        ("bytes=1279990-", FILES[LARGE][-10:]),
        ("bytes=-7", FILES[LARGE][-7:]),
    ):
        part = httpx2.get(target, headers={"Range": wanted})
        assert (part.status_code, part.content) == (206, expected)
    assert httpx2.get(target, headers={"Range": "bytes=1280000-"}).status_code == 416
    assert httpx2.get(target, headers=auth).status_code == 400
    assert httpx2.get(target.replace("signature=", "signature=0")).status_code == 403
    # The client's own partial reads.
    files = HfFileSystem(endpoint=hub.endpoint, token=alice.token)
    with files.open(f"{REPO}@{released}/{LARGE}", block_size=1000) as file:
        file.seek(700_000)
        assert file.read(50) == FILES[LARGE][700_000:700_050]


def test_same_changes_give_the_same_commit_ids(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "sub" / "model.safetensors").write_bytes(b"weights")
    made = []
    for name in ("one", "two"):
        with LocalHub.start(tmp_path / name) as hub:
            commit = hub.add_model("bob/base", source)
            view = hub.repo("bob/base")
            assert view is not None
            made.append((commit, view.tree(), view.read("sub/model.safetensors")))
    assert made[0] == made[1]
