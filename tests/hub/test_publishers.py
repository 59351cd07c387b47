"""Trusted publishers: the unmodified client exchanges an id token and publishes without a stored secret."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub._oidc import exchange_oidc_token, oidc_login
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OIDCError, RepositoryNotFoundError
from huggingface_hub.utils import _auth, get_token

from tests.hub.conftest import FILES, REPO, commit_files
from tests.hub.identity import IdentityProvider
from tests.hub.jwt import Key, sign
from tests.hub.server import LocalHub
from tests.hub.state import Limits

SOURCE = "acme/training"
CLAIMS = {"repository": SOURCE, "branch": "main", "workflow": "publish.yml"}


@pytest.fixture(scope="module")
def provider() -> Iterator[IdentityProvider]:
    with IdentityProvider.start(SOURCE) as running:
        yield running


@pytest.fixture(autouse=True)
def _job(provider: IdentityProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in provider.env().items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)


@pytest.fixture
def trusted(hub: LocalHub, alice: HfApi, provider: IdentityProvider) -> str:
    alice.create_repo(REPO, private=True)
    alice.create_repo("alice/other", private=True)
    hub.trust(REPO, provider.issuer, **CLAIMS)
    return REPO


def _exchanged(hub: LocalHub, resource: str = REPO) -> HfApi:
    told = oidc_login(resource=resource, endpoint=hub.endpoint)
    return HfApi(endpoint=hub.endpoint, token=told["access_token"])


def test_a_job_publishes_to_the_one_repository_that_trusts_it(hub: LocalHub, alice: HfApi, trusted: str) -> None:
    told = oidc_login(resource=REPO, endpoint=hub.endpoint)
    assert told["access_token"].startswith("hf_jwt_")
    assert (told["token_type"], told["expires_in"]) == ("bearer", 3600)
    api = HfApi(endpoint=hub.endpoint, token=told["access_token"])
    api.auth_check(REPO, write=True)
    oid = commit_files(api, FILES)
    api.create_tag(REPO, tag="v1", revision=oid)
    assert alice.list_repo_commits(REPO)[0].authors == ["[OIDC]"]
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("alice/other")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("alice/new")
    assert caught.value.response.status_code == 403


def test_the_client_does_it_by_itself_and_renews_before_the_end(
    hub: LocalHub, trusted: str, provider: IdentityProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_OIDC_RESOURCE", REPO)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    minted = provider.minted
    commit_files(HfApi(endpoint=hub.endpoint), FILES)
    first = get_token()
    assert first == get_token()
    assert provider.minted == minted + 1
    cached = _auth._OIDC_TOKEN_CACHE
    assert cached is not None
    monkeypatch.setitem(cached, "expires_at", time.monotonic() - 1)
    assert get_token() != first


def test_an_exchanged_token_expires(tmp_path: Path, provider: IdentityProvider) -> None:
    with LocalHub.start(tmp_path / "quick", limits=Limits(publisher_token_s=0.5)) as hub:
        hub.add_user("alice")
        HfApi(endpoint=hub.endpoint, token=hub.add_token("alice")).create_repo(REPO, private=True)
        hub.trust(REPO, provider.issuer, **CLAIMS)
        api = _exchanged(hub)
        api.auth_check(REPO, write=True)
        time.sleep(0.5)
        with pytest.raises(HfHubHTTPError) as caught:
            api.auth_check(REPO, write=True)
        assert caught.value.response.status_code == 401
        _exchanged(hub).auth_check(REPO, write=True)


def _forged(provider: IdentityProvider, hub: LocalHub) -> str:
    claims = {"iss": provider.issuer, "aud": hub.endpoint, "exp": time.time() + 60, "nbf": 0, **provider.claims}
    return sign(claims, Key.make())


@pytest.mark.parametrize(
    "token, says",
    [
        (lambda provider, hub: provider.mint(hub.endpoint, repository="mallory/training"), "claims"),
        (lambda provider, hub: provider.mint(hub.endpoint, ref="refs/heads/other"), "claims"),
        (lambda provider, hub: provider.mint(hub.endpoint, ref="refs/tags/main"), "claims"),
        (
            lambda provider, hub: provider.mint(
                hub.endpoint, workflow_ref=f"{SOURCE}/.github/workflows/test.yml@refs/heads/main"
            ),
            "claims",
        ),
        (lambda provider, hub: provider.mint("https://huggingface.co"), "audience"),
        (lambda provider, hub: provider.mint(hub.endpoint, exp=int(time.time()) - 1), "expired"),
        (lambda provider, hub: provider.mint(hub.endpoint, nbf=int(time.time()) + 60), "expired"),
        (lambda provider, hub: provider.mint(hub.endpoint, iss="http://127.0.0.1:9"), "issuer"),
        (_forged, "signature"),
        (lambda provider, hub: provider.mint(hub.endpoint)[:-8] + "AAAAAAAA", "signature"),
        (lambda provider, hub: "no.token", "JSON Web Token"),
    ],
    ids=["repo", "branch", "tag", "workflow", "audience", "expired", "early", "issuer", "key", "signature", "text"],
)
def test_an_id_token_that_is_not_right_gets_nothing(
    hub: LocalHub,
    trusted: str,
    provider: IdentityProvider,
    token: Callable[[IdentityProvider, LocalHub], str],
    says: str,
) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        exchange_oidc_token(subject_token=token(provider, hub), resource=REPO, endpoint=hub.endpoint)
    answered = caught.value.response
    assert (answered.status_code, answered.json()["error"]) == (400, "invalid_grant")
    assert says in answered.json()["error_description"]


@pytest.mark.parametrize(
    "resource, error", [("alice/other", "invalid_grant"), ("alice", "invalid_grant"), ("a/b/c", "invalid_request")]
)
def test_a_resource_that_trusts_nobody_gives_nothing(hub: LocalHub, trusted: str, resource: str, error: str) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        oidc_login(resource=resource, endpoint=hub.endpoint)
    assert caught.value.response.json()["error"] == error


def test_a_repository_must_exist(hub: LocalHub, provider: IdentityProvider) -> None:
    hub.trust("alice/absent", provider.issuer, **CLAIMS)
    with pytest.raises(HfHubHTTPError, match="No trusted publisher for alice/absent"):
        oidc_login(resource="alice/absent", endpoint=hub.endpoint)


def test_a_user_publisher_reads_gated_files_and_nothing_private(
    hub: LocalHub, alice: HfApi, trusted: str, provider: IdentityProvider
) -> None:
    hub.add_user("bob")
    alice.create_repo("alice/gated")
    hub.gate("alice/gated")
    hub.trust("bob", provider.issuer, repository=SOURCE)
    hub.trust("alice", provider.issuer, repository=SOURCE)
    bob, owner = _exchanged(hub, "bob"), _exchanged(hub, "alice")
    assert str(bob.token).startswith("hf_oauth_")
    with pytest.raises(GatedRepoError):
        bob.auth_check("alice/gated")
    alice.grant_access("alice/gated", "bob")
    for api in (bob, owner):
        assert hf_hub_download("alice/gated", ".gitattributes", endpoint=hub.endpoint, token=api.token)
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info(REPO)
        with pytest.raises(HfHubHTTPError) as caught:
            api.auth_check("alice/gated", write=True)
        assert caught.value.response.status_code == 403


def test_a_job_without_the_permission_is_told_so(hub: LocalHub, trusted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACTIONS_ID_TOKEN_REQUEST_URL")
    with pytest.raises(OIDCError, match="id-token: write"):
        oidc_login(resource=REPO, endpoint=hub.endpoint)


def test_the_provider_knows_its_jobs(hub: LocalHub, trusted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "wrong")
    with pytest.raises(HfHubHTTPError) as caught:
        oidc_login(resource=REPO, endpoint=hub.endpoint)
    assert caught.value.response.status_code == 401
