"""Ask a real Hub what the tests can only assume, on a repository that may be written to, and leave nothing behind.

    HF_TOKEN=… python -m tools.smoke OWNER/NAME --tag TAG --commit COMMIT

TAG is a release that the action has just published, on COMMIT. Branches and tags that this program makes are named
`smoke-…` and removed again. Prints one line for each answer; the exit code is 1 where one is not what the publisher and
the test Hub take for granted.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi
from huggingface_hub.errors import HfHubHTTPError

from runner.supervisor.documents.provenance import CHECKSUMS
from runner.supervisor.publish.contents import SERVER_OWNED


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What is looked at, with the client and a name for what is made on the way."""

    api: HfApi
    repo_id: str
    tag: str
    commit: str
    made: str


def main(arguments: Sequence[str]) -> int:
    """Ask everything; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.smoke")
    parser.add_argument("repo_id")
    parser.add_argument("--tag", required=True)
    parser.add_argument("--commit", required=True)
    asked = parser.parse_args(arguments)
    api = HfApi(token=os.environ["HF_TOKEN"])
    made = f"smoke-{uuid.uuid4().hex[:12]}"
    release = Release(api=api, repo_id=asked.repo_id, tag=asked.tag, commit=asked.commit, made=made)
    failed = 0
    for question in QUESTIONS:
        sentence = (question.__doc__ or "").partition("\n")[0]
        try:
            detail = question(release)
            print(f"yes  {sentence} {detail}".rstrip())
        except (AssertionError, HfHubHTTPError, OSError, ValueError) as error:
            failed += 1
            print(f"NO   {sentence} {type(error).__name__}: {error}")
    print(f"{len(QUESTIONS) - failed} of {len(QUESTIONS)} as the publisher takes for granted")
    return 1 if failed else 0


def tag_is_there(release: Release) -> str:
    """The tag points to the commit that the action named."""
    found = tags(release).get(release.tag)
    _expect(found == release.commit, f"it points to {found}")
    return ""


def bytes_are_right(release: Release) -> str:
    """Every downloaded file has the sha256 that checksums.txt says."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(
            release.api.snapshot_download(
                release.repo_id, revision=release.tag, local_dir=folder, token=release.api.token
            )
        )
        lines = (root / CHECKSUMS).read_text("utf-8").splitlines()
        for line in lines:
            sha256, _, path = line.partition("  ")
            found = hashlib.sha256((root / path).read_bytes()).hexdigest()
            _expect(found == sha256, f"{path} has the sha256 {found}")
    return f"({len(lines)} files)"


def stale_parent_is_refused(release: Release) -> str:
    """A commit on a head that is no longer the head is refused with 412, and makes nothing."""
    api, branch = release.api, _branch(release)
    try:
        addition = CommitOperationAdd("smoke.txt", release.made.encode())
        api.create_commit(release.repo_id, [addition], commit_message="Smoke", revision=branch)
        head = branches(release)[branch]
        addition = CommitOperationAdd("smoke.txt", b"later")
        status = _status(
            lambda: api.create_commit(
                release.repo_id, [addition], commit_message="Smoke", revision=branch, parent_commit=release.commit
            )
        )
        _expect(status == 412, f"the answer was {status}")
        _expect(branches(release)[branch] == head, "the branch moved")
    finally:
        api.delete_branch(release.repo_id, branch=branch)
    return ""


def second_tag_is_refused(release: Release) -> str:
    """A tag that exists is not made again, not even on another commit: 409, and it stays where it is."""
    parent = release.api.list_repo_commits(release.repo_id, revision=release.commit)[1].commit_id
    status = _status(lambda: release.api.create_tag(release.repo_id, tag=release.tag, revision=parent))
    _expect(status == 409, f"the answer was {status}")
    _expect(tags(release)[release.tag] == release.commit, "the tag was moved")
    return ""


def tag_outlives_branch(release: Release) -> str:
    """A tag on a commit of a branch still resolves when the branch is deleted."""
    api, branch = release.api, _branch(release)
    tag = f"{branch}-tag"
    try:
        addition = CommitOperationAdd("smoke.txt", release.made.encode())
        commit = api.create_commit(release.repo_id, [addition], commit_message="Smoke", revision=branch).oid
        api.create_tag(release.repo_id, tag=tag, revision=commit)
    finally:
        api.delete_branch(release.repo_id, branch=branch)
    try:
        _expect(api.model_info(release.repo_id, revision=tag).sha == commit, "it resolves to another commit")
    finally:
        api.delete_tag(release.repo_id, tag=tag)
    return ""


def pointers_are_copied(release: Release) -> str:
    """Files of another revision are put on a branch by name, without an upload, and are the same there."""
    api, branch = release.api, _branch(release)
    try:
        before = _digests(release, release.commit)
        path = max(path for path in before if path.endswith(".safetensors"))
        addition = CommitOperationAdd("smoke.txt", b"x")
        api.create_commit(release.repo_id, [addition], commit_message="Smoke", revision=branch)
        copy = CommitOperationCopy(path, f"smoke/{path}", src_revision=release.commit)
        made = api.create_commit(release.repo_id, [copy], commit_message="Smoke", revision=branch).oid
        _expect(_digests(release, made)[f"smoke/{path}"] == before[path], "the copy is other content")
    finally:
        api.delete_branch(release.repo_id, branch=branch)
    return ""


def writes_are_read_at_once(release: Release) -> str:
    """A tag that was made is read back within ten seconds."""
    tag = f"{release.made}-now"
    begin_s = time.monotonic()
    release.api.create_tag(release.repo_id, tag=tag, revision=release.commit)
    try:
        while tags(release).get(tag) != release.commit:
            _expect(time.monotonic() - begin_s < 10, "it was not")
            time.sleep(0.1)
    finally:
        release.api.delete_tag(release.repo_id, tag=tag)
    return f"({time.monotonic() - begin_s:.1f} s)"


QUESTIONS: tuple[Callable[[Release], str], ...] = (
    tag_is_there,
    bytes_are_right,
    stale_parent_is_refused,
    second_tag_is_refused,
    tag_outlives_branch,
    pointers_are_copied,
    writes_are_read_at_once,
)


def tags(release: Release) -> dict[str, str]:
    """Return the tags of the repository, each with its commit."""
    return {ref.name: ref.target_commit for ref in release.api.list_repo_refs(release.repo_id).tags}


def branches(release: Release) -> dict[str, str]:
    """Return the branches of the repository, each with its head."""
    return {ref.name: ref.target_commit for ref in release.api.list_repo_refs(release.repo_id).branches}


def _branch(release: Release) -> str:
    """Make a branch at the release, and return its name."""
    name = f"{release.made}-{uuid.uuid4().hex[:6]}"
    release.api.create_branch(release.repo_id, branch=name, revision=release.commit)
    return name


def _digests(release: Release, revision: str) -> dict[str, str]:
    entries = release.api.list_repo_tree(release.repo_id, recursive=True, revision=revision)
    return {entry.path: entry.blob_id for entry in entries if hasattr(entry, "blob_id") and entry.path != SERVER_OWNED}


def _status(call: Callable[[], object]) -> int:
    try:
        call()
    except HfHubHTTPError as error:
        return int(error.response.status_code)
    return 200


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise AssertionError(otherwise)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
