"""Who may do what, as the client sees it: status and exception of each refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from tests.hub.server import LocalHub

MakeClient = Callable[..., HfApi]
Who = tuple[str, str, list[object]]
REPO = "alice/model"
WRITE = ["repo.write"]
READ = ["repo.content.read"]


@pytest.fixture(autouse=True)
def world(hub: LocalHub, tmp_path: Path) -> None:
    """One organisation, and private repositories of it and of alice."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text("{}")
    hub.add_user("bob")
    hub.add_org("acme", members={"alice": "write", "bob": "read", "carl": "contributor"})
    hub.add_user("carl")
    for repo in (REPO, "alice/other", "acme/model"):
        hub.add_model(repo, tmp_path / "files", private=True)


def _answers(action: Callable[[], object]) -> int:
    try:
        action()
    except HfHubHTTPError as error:
        return int(error.response.status_code)
    return 200


def _commit(api: HfApi, repo: str) -> object:
    return api.create_commit(repo, [CommitOperationAdd("a.txt", b"1")], commit_message="Change")


@pytest.mark.parametrize(
    "who,repo,read,write",
    [
        (("alice", "write", []), REPO, 200, 200),
        (("alice", "read", []), REPO, 200, 403),
        (("alice", "fineGrained", [("model", REPO, WRITE)]), REPO, 200, 200),
        (("alice", "fineGrained", [("model", REPO, READ)]), REPO, 200, 403),
        (("alice", "fineGrained", [("model", REPO, WRITE)]), "alice/other", 404, 404),
        (("alice", "fineGrained", [("user", "alice", WRITE)]), "alice/other", 200, 200),
        (("alice", "fineGrained", [("user", "alice", WRITE)]), "acme/model", 404, 404),
        (("alice", "fineGrained", [("org", "acme", WRITE)]), "acme/model", 200, 200),
        (("alice", "write", []), "acme/model", 200, 200),
        (("bob", "write", []), "acme/model", 200, 403),
        (("carl", "write", []), "acme/model", 200, 403),
        (("bob", "write", []), REPO, 404, 404),
        (("bob", "fineGrained", [("model", REPO, WRITE)]), REPO, 404, 404),
        (("alice", "write", []), "alice/absent", 404, 404),
    ],
)
def test_grants_what_token_and_membership_allow(client: MakeClient, who: Who, repo: str, read: int, write: int) -> None:
    api = client(*who)
    assert _answers(lambda: api.auth_check(repo)) == read
    assert _answers(lambda: api.repo_info(repo)) == read
    assert _answers(lambda: api.auth_check(repo, write=True)) == write
    assert _answers(lambda: _commit(api, repo)) == write
    assert _answers(lambda: api.create_tag(repo, tag="v1")) == write


@pytest.mark.parametrize(
    "who,repo,status",
    [
        (("alice", "write", []), "alice/new", 200),
        (("alice", "write", []), "acme/new", 200),
        (("carl", "write", []), "acme/new", 200),
        (("alice", "read", []), "alice/new", 403),
        (("bob", "write", []), "acme/new", 403),
        (("bob", "write", []), "alice/new", 403),
        (("bob", "write", []), "nobody/new", 403),
        (("alice", "fineGrained", [("user", "alice", WRITE)]), "alice/new", 200),
        (("alice", "fineGrained", [("user", "alice", WRITE)]), "acme/new", 403),
        (("alice", "fineGrained", [("model", REPO, WRITE)]), "alice/new", 403),
        (("alice", "write", []), "alice/bad..name", 400),
        (("alice", "write", []), REPO, 409),
    ],
)
def test_creates_only_where_the_token_may(hub: LocalHub, client: MakeClient, who: Who, repo: str, status: int) -> None:
    def create() -> None:
        # The client checks names itself, so the one that is wrong goes past it.
        api = client(*who)
        HfApi.create_repo.__wrapped__(api, repo, private=True)

    assert _answers(create) == status
    view = hub.repo(repo)
    assert (view is not None) == (status in (200, 409))
    assert view is None or view.private


def test_exist_ok_finds_the_repository_that_is_there(client: MakeClient) -> None:
    assert client("alice").create_repo(REPO, private=True, exist_ok=True).repo_id == REPO


def test_contributors_change_what_they_created(client: MakeClient) -> None:
    carl = client("carl")
    carl.create_repo("acme/new", private=True)
    assert _answers(lambda: _commit(carl, "acme/new")) == 200


def test_whoami_tells_role_scopes_and_orgs(client: MakeClient) -> None:
    told = client("alice", "fineGrained", [("model", REPO, WRITE)]).whoami()
    assert [(org["name"], org["roleInOrg"]) for org in told["orgs"]] == [("acme", "write")]
    access = told["auth"]["accessToken"]
    assert access["role"] == "fineGrained"
    (scope,) = access["fineGrained"]["scoped"]
    assert (scope["entity"]["type"], scope["entity"]["name"], scope["permissions"]) == ("model", REPO, WRITE)
    assert client("bob", "read").whoami()["auth"]["accessToken"]["role"] == "read"


def test_an_unknown_token_is_refused_even_where_none_is_needed(
    hub: LocalHub, client: MakeClient, tmp_path: Path
) -> None:
    hub.add_model("alice/public", tmp_path / "files")
    bogus = HfApi(endpoint=hub.endpoint, token="hf_" + "x" * 34)
    alice = client("alice")
    assert isinstance(alice.token, str)
    hub.revoke(alice.token)
    for api in (bogus, alice):
        for action in (api.whoami, lambda api=api: api.repo_info("alice/public"), lambda api=api: _commit(api, REPO)):
            with pytest.raises(HfHubHTTPError, match=r"Invalid (credentials|user token)") as caught:
                action()
            assert caught.value.response.status_code == 401
            assert not isinstance(caught.value, RepositoryNotFoundError)


def test_without_a_token_only_public_files_are_seen(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_model("alice/public", tmp_path / "files")
    nobody = HfApi(endpoint=hub.endpoint, token=False)
    assert Path(snapshot_download("alice/public", endpoint=hub.endpoint, token=False), "config.json").exists()
    for repo in (REPO, "alice/absent"):
        with pytest.raises(RepositoryNotFoundError) as caught:
            nobody.repo_info(repo)
        assert caught.value.response.status_code == 401
    assert _answers(lambda: _commit(nobody, "alice/public")) == 401


def test_gated_files_go_to_members_only(hub: LocalHub, client: MakeClient, tmp_path: Path) -> None:
    hub.add_model("alice/gated", tmp_path / "files")
    hub.gate("alice/gated")
    assert client("bob").repo_info("alice/gated").gated == "manual"
    with pytest.raises(GatedRepoError):
        client("bob").auth_check("alice/gated")
    for token, allowed in ((client("bob").token, False), (False, False), (client("alice").token, True)):
        if allowed:
            assert hf_hub_download("alice/gated", "config.json", endpoint=hub.endpoint, token=token)
        else:
            with pytest.raises(GatedRepoError):
                hf_hub_download("alice/gated", "config.json", endpoint=hub.endpoint, token=token)


def test_keeps_no_token_on_disk(hub: LocalHub, client: MakeClient) -> None:
    token = client("alice").token
    assert isinstance(token, str)
    kept = [path for path in hub.root.rglob("*") if path.is_file()]
    assert kept
    assert not any(token.encode() in path.read_bytes() for path in kept)


def test_deletes_only_for_writers(hub: LocalHub, client: MakeClient) -> None:
    assert _answers(lambda: client("alice", "read").delete_repo(REPO)) == 403
    assert hub.repo(REPO) is not None
    client("alice").delete_repo(REPO)
    assert hub.repo(REPO) is None
    assert _answers(lambda: client("alice").repo_info(REPO)) == 404
