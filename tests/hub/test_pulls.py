"""Pull requests, discussions, history, protected references, and copies between branches, with the real client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.community import DiscussionComment, DiscussionCommit, DiscussionStatusChange
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from tests.hub.conftest import FILES, LARGE, REPO, commit_files, head_of
from tests.hub.server import LocalHub

MakeClient = Callable[..., HfApi]


@pytest.fixture
def public(hub: LocalHub, alice: HfApi) -> str:
    """Return the first release of a repository that everybody sees."""
    hub.add_user("bob")
    alice.create_repo(REPO)
    return commit_files(alice, FILES)


def _pull(api: HfApi, files: dict[str, bytes], **more: Any) -> Any:
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(REPO, operations, commit_message="Improve", create_pr=True, **more)


def _status(caught: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return int(caught.value.response.status_code)


@pytest.mark.parametrize("xet", [False, True], ids=["LFS", "Xet"])
def test_a_reader_opens_a_pull_request_and_the_owner_merges_it(
    hub: LocalHub, client: MakeClient, alice: HfApi, public: str, request: pytest.FixtureRequest, xet: bool
) -> None:
    if xet:
        request.getfixturevalue("fresh_client")
    bob = client("bob")
    made = _pull(bob, {"new.safetensors": bytes(range(200)), "config.json": b"{}"}, commit_description="why")
    assert (made.pr_revision, made.pr_num) == ("refs/pr/1", 1)
    assert made.pr_url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert head_of(alice) == public
    assert alice.repo_info(REPO, revision="refs/pr/1").sha == made.oid
    assert [commit.commit_id for commit in alice.list_repo_commits(REPO, revision="refs/pr/1")][:2] == [
        made.oid,
        public,
    ]
    listed = alice.list_repo_refs(REPO, include_pull_requests=True).pull_requests or []
    assert [(ref.ref, ref.target_commit) for ref in listed] == [("refs/pr/1", made.oid)]
    more = bob.create_commit(
        REPO,
        [CommitOperationAdd("more.txt", b"1")],
        commit_message="More",
        revision="refs/pr/1",
        parent_commit=made.oid,
    )
    with pytest.raises(HfHubHTTPError) as caught:
        bob.merge_pull_request(REPO, 1)
    assert _status(caught) == 403
    alice.merge_pull_request(REPO, 1)
    view = hub.repo(REPO)
    assert view is not None
    assert view.read("config.json") == b"{}"
    assert view.read("new.safetensors") == bytes(range(200))
    assert view.read(LARGE) == FILES[LARGE]
    details = alice.get_discussion_details(REPO, 1)
    assert (details.status, details.author, details.merge_commit_oid) == ("merged", "bob", head_of(alice))
    assert [(type(event), getattr(event, "oid", None)) for event in details.events] == [
        (DiscussionComment, None),
        (DiscussionCommit, made.oid),
        (DiscussionCommit, more.oid),
        (DiscussionStatusChange, None),
    ]
    assert all(exchange.routed for exchange in hub.exchanges())


def test_a_pull_request_that_main_has_overtaken_is_merged_file_by_file(
    hub: LocalHub, client: MakeClient, alice: HfApi, public: str
) -> None:
    _pull(client("bob"), {"a.txt": b"bob"})
    _pull(client("bob"), {"config.json": b'{"by": "bob"}'})
    commit_files(alice, {"config.json": b'{"by": "alice"}'})
    alice.merge_pull_request(REPO, 1)
    assert alice.get_discussion_details(REPO, 2).conflicting_files == ["config.json"]
    with pytest.raises(HfHubHTTPError, match=r"conflict in config\.json"):
        alice.merge_pull_request(REPO, 2)
    view = hub.repo(REPO)
    assert view is not None
    assert (view.read("a.txt"), view.read("config.json")) == (b"bob", b'{"by": "alice"}')


def test_a_pull_request_deletes_files(hub: LocalHub, alice: HfApi, public: str) -> None:
    operations = [CommitOperationDelete("config.json")]
    alice.create_commit(REPO, operations, commit_message="Remove", create_pr=True)
    alice.merge_pull_request(REPO, 1)
    view = hub.repo(REPO)
    assert view is not None
    assert "config.json" not in view.tree()


def test_a_pull_request_starts_where_it_is_told_to(alice: HfApi, public: str) -> None:
    newer = commit_files(alice, {"a.txt": b"1"})
    made = _pull(alice, {"b.txt": b"2"}, parent_commit=public)
    assert [commit.commit_id for commit in alice.list_repo_commits(REPO, revision="refs/pr/1")][1] == public != newer
    assert made.pr_num == 1


def test_only_its_author_and_writers_push_to_a_pull_request(
    hub: LocalHub, client: MakeClient, alice: HfApi, public: str
) -> None:
    hub.add_user("carl")
    _pull(client("bob"), {"a.txt": b"1"})

    def push(api: HfApi, ref: str) -> None:
        api.create_commit(REPO, [CommitOperationAdd("a.txt", b"2")], commit_message="x", revision=ref)

    with pytest.raises(HfHubHTTPError) as caught:
        push(client("carl"), "refs/pr/1")
    assert _status(caught) == 403
    push(alice, "refs/pr/1")
    with pytest.raises(RevisionNotFoundError):
        push(alice, "refs/pr/2")


@pytest.mark.parametrize(
    "permissions, status", [(["repo.content.read"], 403), (["discussion.write"], 200), (["repo.write"], 200)]
)
def test_a_fine_grained_token_needs_a_right_to_open_one(
    client: MakeClient, public: str, permissions: list[str], status: int
) -> None:
    api = client("alice", "fineGrained", [("model", REPO, permissions)])
    try:
        _pull(api, {"a.txt": b"1"})
        got = 200
    except HfHubHTTPError as error:
        got = error.response.status_code
    assert got == status


def test_discussions_are_opened_commented_closed_and_listed(client: MakeClient, alice: HfApi, public: str) -> None:
    bob = client("bob")
    opened = bob.create_discussion(REPO, "A question", description="What is it?")
    assert (opened.num, opened.status, opened.is_pull_request) == (1, "open", False)
    assert alice.comment_discussion(REPO, 1, "A model").content == "A model"
    draft = bob.create_pull_request(REPO, "A draft")
    assert (draft.num, draft.status, draft.git_reference) == (2, "draft", "refs/pr/2")
    assert bob.change_discussion_status(REPO, 1, "closed").new_status == "closed"
    assert [event.type for event in alice.get_discussion_details(REPO, 1).events] == [
        "comment",
        "comment",
        "status-change",
    ]
    assert [found.num for found in alice.get_repo_discussions(REPO)] == [2, 1]
    assert [found.num for found in alice.get_repo_discussions(REPO, discussion_type="pull_request")] == [2]
    assert [found.num for found in alice.get_repo_discussions(REPO, discussion_status="closed")] == [1]
    assert [found.num for found in alice.get_repo_discussions(REPO, author="alice")] == []
    for number in range(3, 8):  # more than a page
        alice.create_discussion(REPO, f"Number {number}")
    assert [found.num for found in alice.get_repo_discussions(REPO)] == [7, 6, 5, 4, 3, 2, 1]
    with pytest.raises(HfHubHTTPError):
        alice.get_discussion_details(REPO, 99)


def test_discussions_outlive_a_restart(hub: LocalHub, client: MakeClient, alice: HfApi, public: str) -> None:
    made = _pull(client("bob"), {"a.txt": b"1"})
    hub.stop()
    with LocalHub.start(hub.root) as again:
        api = HfApi(endpoint=again.endpoint, token=alice.token)
        assert api.repo_info(REPO, revision="refs/pr/1").sha == made.oid
        api.merge_pull_request(REPO, 1)
        assert api.get_discussion_details(REPO, 1).status == "merged"


def test_a_release_is_staged_and_promoted_by_copying_pointers(hub: LocalHub, alice: HfApi, public: str) -> None:
    alice.create_branch(REPO, branch="staging/v2", revision=public)
    files = {"model-00002.safetensors": b"\0new weights" * 100, "config.json": b'{"v": 2}'}
    staged = commit_files(alice, files, branch="staging/v2", parent=public)
    alice.create_tag(REPO, tag="v2", revision=staged)
    assert head_of(alice) == public
    hub.forget_requests()
    copies = [CommitOperationCopy(path, path, src_revision=staged) for path in files]
    promoted = alice.create_commit(REPO, copies, commit_message="Promote v2", parent_commit=public).oid
    sent = sum(exchange.received_bytes for exchange in hub.exchanges())
    assert sent < 3000
    alice.delete_branch(REPO, branch="staging/v2")
    view = hub.repo(REPO)
    assert view is not None
    assert {path: view.read(path) for path in files} == files
    assert view.commit(promoted).tree == view.commit(staged).tree
    assert view.tags == {"v2": staged}


@pytest.mark.usefixtures("fresh_client")
def test_files_are_copied_from_another_repository_without_being_sent(hub: LocalHub, alice: HfApi, public: str) -> None:
    commit_files(alice, {"weights.safetensors": FILES[LARGE]})
    alice.create_repo("alice/copy")
    hub.forget_requests()
    copy = CommitOperationCopy("weights.safetensors", "copied.safetensors", src_repo_id=REPO, src_repo_type="model")
    alice.create_commit("alice/copy", [copy], commit_message="Copy")
    view = hub.repo("alice/copy")
    assert view is not None
    assert view.read("copied.safetensors") == FILES[LARGE]
    assert sum(exchange.received_bytes for exchange in hub.exchanges()) < 3000


def test_protected_references_cannot_be_changed(hub: LocalHub, alice: HfApi, public: str) -> None:
    alice.create_tag(REPO, tag="v1", revision=public)
    alice.create_tag(REPO, tag="latest", revision=public)
    alice.create_branch(REPO, branch="stable")
    hub.protect(REPO, "refs/tags/v*", "refs/heads/stable")
    refused: list[Callable[[], object]] = [
        lambda: alice.delete_tag(REPO, tag="v1"),
        lambda: alice.delete_branch(REPO, branch="stable"),
        lambda: commit_files(alice, {"a.txt": b"1"}, branch="stable"),
    ]
    for change in refused:
        with pytest.raises(HfHubHTTPError, match="is protected") as caught:
            change()
        assert _status(caught) == 403
    alice.delete_tag(REPO, tag="latest")
    hub.protect(REPO)
    alice.delete_tag(REPO, tag="v1")


def test_history_is_listed_newest_first_with_authors(alice: HfApi, public: str) -> None:
    oids = [public, *(commit_files(alice, {"a.txt": bytes([65 + number])}) for number in range(4))]
    listed = alice.list_repo_commits(REPO)
    assert [commit.commit_id for commit in listed][:5] == oids[::-1]
    assert {commit.title for commit in listed} == {"Release", "initial commit"}
    assert all(commit.authors == ["alice"] for commit in listed)
