"""Gated repositories, visibility, storage limits and expiring tokens, as the real client sees them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from tests.hub.conftest import FILES, REPO, commit_files
from tests.hub.server import LocalHub

MakeClient = Callable[..., HfApi]


@pytest.fixture
def gated(hub: LocalHub, alice: HfApi) -> str:
    """Return a public repository whose files are for accepted users."""
    for user in ("bob", "carl"):
        hub.add_user(user)
    alice.create_repo(REPO)
    commit_files(alice, FILES)
    hub.gate(REPO, mode="manual")
    return REPO


def _get(hub: LocalHub, token: str | bool | None) -> bytes:
    return Path(hf_hub_download(REPO, "config.json", endpoint=hub.endpoint, token=token)).read_bytes()


def test_access_is_asked_for_and_decided_by_hand(hub: LocalHub, client: MakeClient, alice: HfApi, gated: str) -> None:
    bob = client("bob")
    steps = []
    for step in (
        lambda: None,
        lambda: hub.ask_access(REPO, "bob"),
        lambda: alice.reject_access_request(REPO, "bob", rejection_reason="no"),
        lambda: alice.accept_access_request(REPO, "bob"),
        lambda: alice.cancel_access_request(REPO, "bob"),
    ):
        step()
        try:
            bob.auth_check(REPO)
            steps.append("may")
        except GatedRepoError as error:
            steps.append(f"{error.response.status_code} {error}")
    assert [step[:3] for step in steps] == ["403", "403", "403", "may", "403"]
    assert "not in the authorized list" in steps[0]
    assert "awaiting a review" in steps[1]
    assert "rejected" in steps[2]
    assert steps[3] == "may"
    assert "awaiting a review" in steps[4]
    assert [request.username for request in alice.list_pending_access_requests(REPO)] == ["bob"]
    alice.grant_access(REPO, "carl")
    assert [request.username for request in alice.list_accepted_access_requests(REPO)] == ["carl"]
    assert _get(hub, client("carl").token) == FILES["config.json"]
    with pytest.raises(HfHubHTTPError) as caught:
        bob.grant_access(REPO, "bob")
    assert caught.value.response.status_code == 403


def test_automatic_gates_open_for_whoever_asks(hub: LocalHub, client: MakeClient, alice: HfApi, gated: str) -> None:
    alice.update_repo_settings(REPO, gated="auto")
    bob = client("bob")
    assert bob.repo_info(REPO).gated == "auto"
    with pytest.raises(GatedRepoError):
        _get(hub, bob.token)
    assert hub.ask_access(REPO, "bob") == "accepted"
    assert _get(hub, bob.token) == FILES["config.json"]
    alice.update_repo_settings(REPO, gated=False)
    assert _get(hub, False) == FILES["config.json"]


def test_strangers_without_a_token_are_told_to_log_in(hub: LocalHub, gated: str) -> None:
    with pytest.raises(GatedRepoError, match="Please log in") as caught:
        HfApi(endpoint=hub.endpoint, token=False).auth_check(REPO)
    assert caught.value.response.status_code == 401


def test_a_fine_grained_token_reads_gated_files_only_where_it_says_so(
    hub: LocalHub, client: MakeClient, gated: str
) -> None:
    hub.ask_access(REPO, "bob")
    client("alice").accept_access_request(REPO, "bob")
    narrow, wide = client("bob", "fineGrained"), client("bob", "fineGrained", reads_gated=True)
    assert narrow.whoami()["auth"]["accessToken"]["fineGrained"]["canReadGatedRepos"] is False
    assert wide.whoami()["auth"]["accessToken"]["fineGrained"]["canReadGatedRepos"] is True
    with pytest.raises(GatedRepoError, match="fine-grained token settings"):
        narrow.auth_check(REPO)
    wide.auth_check(REPO)


def test_a_repository_becomes_private(client: MakeClient, alice: HfApi, gated: str) -> None:
    bob = client("bob")
    assert bob.repo_info(REPO).private is False
    alice.update_repo_settings(REPO, private=True)
    with pytest.raises(RepositoryNotFoundError):
        bob.repo_info(REPO)


@pytest.mark.parametrize("xet", [False, True], ids=["LFS", "Xet"])
def test_a_full_namespace_takes_no_more(hub: LocalHub, alice: HfApi, request: pytest.FixtureRequest, xet: bool) -> None:
    if xet:
        request.getfixturevalue("fresh_client")
    alice.create_repo(REPO)
    hub.limit_storage("alice", 150_000)
    commit_files(alice, {"a.safetensors": bytes(range(250)) * 400})
    with pytest.raises(Exception, match="403" if xet else "storage limit reached"):
        commit_files(alice, {"b.safetensors": bytes(range(249)) * 400})
    commit_files(alice, {"again.safetensors": bytes(range(250)) * 400})  # is here already
    alice.delete_repo(REPO)
    alice.create_repo(REPO)
    commit_files(alice, {"b.safetensors": bytes(range(249)) * 400})


def test_a_token_expires_by_itself(hub: LocalHub, client: MakeClient) -> None:
    api = client("alice", expires_in_s=0.5)
    api.create_repo(REPO)
    time.sleep(0.5)
    with pytest.raises(HfHubHTTPError) as caught:
        api.auth_check(REPO)
    assert caught.value.response.status_code == 401
