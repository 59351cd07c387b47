"""Trusted publishers: a job's identity instead of a secret, through the same publisher."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from runner.protocol.errors import AccessDenied, HubError, HubUnavailable, PublishError
from runner.supervisor.hub import Hub, Keyless, connect
from tests.hub.faults import ABORTED, FOREVER, Kind
from tests.hub.identity import IdentityProvider
from tests.supervisor.publish.test_faults import is_released
from tests.supervisor.publish.world import REPO, World, origin


@dataclass(kw_only=True)
class Job(World):
    """A publisher that has an identity and no token."""

    provider: IdentityProvider
    masked: list[str] = field(default_factory=list)

    def connect(self) -> Hub:
        told = self.provider.env()
        login = Keyless(
            endpoint=self.hub.endpoint,
            repo_id=REPO,
            identity_url=told["ACTIONS_ID_TOKEN_REQUEST_URL"],
            identity_token=told["ACTIONS_ID_TOKEN_REQUEST_TOKEN"],
            on_secret=self.masked.append,
            patience=self.patience,
        )
        return connect(self.hub.endpoint, login=login, timeout_s=self.timeout_s, patience=self.patience)


@pytest.fixture
def job(world: World) -> Iterator[Job]:
    world.connect().create_repo(REPO, private=True)
    with IdentityProvider.start("acme/training", ref="refs/tags/v1.0.0") as provider:
        world.hub.trust(REPO, provider.issuer, repository="acme/training", workflow="publish.yml")
        yield Job(
            hub=world.hub, token=None, folder=world.folder, patience=world.patience, origin=world.origin,
            provider=provider,
        )  # fmt: skip


def test_a_job_with_an_identity_publishes_without_a_secret(job: Job) -> None:
    assert job.publish().created
    assert is_released(job)
    assert job.commits() == 1
    assert job.calls("whoami") == 0


def test_every_token_is_told_to_the_masker_before_it_is_used_and_is_nowhere_else(job: Job, tmp_path: Path) -> None:
    before = dict(os.environ)
    lines: list[str] = []
    job.publish(log=lines.append)
    assert any(text.startswith("hf_jwt_") for text in job.masked)
    assert len(job.masked) == 2 * job.provider.minted
    assert dict(os.environ) == before
    told = "\n".join(lines) + repr(job.connect())
    assert not any(text in told for text in job.masked)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file())
    assert not any(text.encode() in stored for text in job.masked)


@pytest.mark.parametrize("claims", [{"repository": "mallory/fork"}, {"workflow_ref": "acme/training/.github/x.yml@r"}])
def test_another_workflow_gets_no_token_and_is_told_what_to_add(job: Job, claims: dict[str, str]) -> None:
    job.provider.claims |= claims
    with pytest.raises(AccessDenied, match="Trusted Publishers") as caught:
        job.publish(before=lambda: pytest.fail("worked"))
    assert "claims of the subject token do not match" in str(caught.value)
    assert job.commits() == 0


def test_a_repository_that_does_not_exist_is_refused_before_any_work(job: Job) -> None:
    job.hub.forget_requests()
    told = job.provider.env()
    login = Keyless(
        endpoint=job.hub.endpoint, repo_id="alice/other", on_secret=job.masked.append,
        identity_url=told["ACTIONS_ID_TOKEN_REQUEST_URL"], identity_token=told["ACTIONS_ID_TOKEN_REQUEST_TOKEN"],
    )  # fmt: skip
    hub = connect(job.hub.endpoint, login=login, patience=job.patience)
    with pytest.raises(AccessDenied, match="No trusted publisher for alice/other"):
        hub.inspect_target("alice/other", "v1")
    assert job.hub.repo("alice/other") is None


def test_a_repository_that_is_deleted_after_the_token_was_given_is_not_created_anew(job: Job, world: World) -> None:
    hub = job.connect()
    hub.inspect_target(REPO, "v1")
    HfApi(endpoint=job.hub.endpoint, token=world.token).delete_repo(REPO)

    with pytest.raises(AccessDenied, match="a job without `hf-token` cannot create it"):
        hub.inspect_target(REPO, "v1")
    assert job.hub.repo(REPO) is None


def test_a_job_that_may_not_ask_for_an_identity_is_told_the_permission(job: Job) -> None:
    job.provider._request_token = "another"
    told = job.provider.env() | {"ACTIONS_ID_TOKEN_REQUEST_TOKEN": "wrong-word"}
    login = Keyless(
        endpoint=job.hub.endpoint, repo_id=REPO, on_secret=job.masked.append,
        identity_url=told["ACTIONS_ID_TOKEN_REQUEST_URL"], identity_token=told["ACTIONS_ID_TOKEN_REQUEST_TOKEN"],
    )  # fmt: skip
    with pytest.raises(AccessDenied, match="id-token: write") as caught:
        connect(job.hub.endpoint, login=login).inspect_target(REPO, "v1")
    assert "wrong-word" not in str(caught.value)


def test_a_token_is_renewed_before_it_expires(job: Job) -> None:
    hub = job.connect()
    hub.refs(REPO)
    hub.refs(REPO)
    assert job.provider.minted == 1
    login = hub._login
    assert isinstance(login, Keyless)
    login._renew_at_s = 0.0  # the margin before the end has begun
    hub.refs(REPO)
    assert job.provider.minted == 2


@pytest.mark.parametrize("endpoint", ["refs", "preupload", "lfs-batch", "commit", "create-tag"])
def test_a_token_that_the_hub_forgets_is_replaced_by_another_and_the_run_goes_on(job: Job, endpoint: str) -> None:
    job.hub.fail(endpoint, Kind.EXPIRED)
    assert job.publish().created
    assert is_released(job)
    assert job.commits() == 1


def test_a_hub_that_refuses_every_token_ends_in_an_error(job: Job) -> None:
    job.hub.fail("commit", status=403, times=FOREVER)
    with pytest.raises(PublishError, match="this token may not"):
        job.publish()
    assert job.provider.minted < 10
    assert job.tags() == {}


@pytest.mark.parametrize("kind", [Kind.STATUS, Kind.RESET_AFTER, Kind.APPLIED_RESET])
def test_an_exchange_that_fails_is_tried_again(job: Job, kind: Kind) -> None:
    job.hub.fail("exchange", kind)
    assert job.publish().created
    assert is_released(job)


def _said(text: str, error: str = "invalid_grant") -> dict[str, object]:
    return {"error": error, "error_description": text}


@pytest.mark.parametrize(
    "status, body",
    [
        (400, ABORTED),
        (400, _said("The operation was aborted due to timeout")),
        (400, _said("Failed to fetch the keys of the issuer")),
        (400, _said("request to the issuer failed, reason: connect ETIMEDOUT")),
        (400, {"error": "temporarily_unavailable"}),
        (400, {"error": "server_error"}),
        (401, ABORTED),
        *[(status, {}) for status in (408, 425, 429, 500, 502, 503, 504)],
    ],
)
def test_an_exchange_that_the_hub_could_not_finish_is_asked_for_again(
    job: Job, status: int, body: dict[str, object]
) -> None:
    job.hub.fail("exchange", status=status, body=body, times=2)
    assert job.connect().refs(REPO)
    assert job.calls("exchange") == 3


def test_an_exchange_that_is_always_aborted_is_no_missing_publisher(job: Job) -> None:
    job.hub.fail("exchange", status=400, body=ABORTED, times=FOREVER)
    with pytest.raises(HubUnavailable, match=r"answered 400 \(This operation was aborted\)") as caught:
        job.publish(before=lambda: pytest.fail("worked"))
    assert "Trusted Publishers" not in str(caught.value)
    assert 1 < job.calls("exchange") <= job.patience.attempts


@pytest.mark.parametrize(
    "status, body", [(400, {}), (400, _said("Unknown", "unsupported_grant_type")), (404, {}), (405, {})]
)
def test_a_hub_that_knows_no_trusted_publishers_is_told_so(job: Job, status: int, body: dict[str, object]) -> None:
    job.hub.fail("exchange", status=status, body=body, times=FOREVER)
    with pytest.raises(HubError, match="made no token") as caught:
        job.publish(before=lambda: pytest.fail("worked"))
    assert "Set `hf-token`" in str(caught.value)
    assert job.calls("exchange") == 1


def test_a_refusal_is_not_asked_for_again(job: Job) -> None:
    job.provider.claims |= {"repository": "mallory/fork"}
    with pytest.raises(AccessDenied, match="Trusted Publishers"):
        job.connect().refs(REPO)
    assert job.calls("exchange") == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_github_that_is_busy_is_asked_again(job: Job, status: int) -> None:
    job.provider.refuse(status, times=2)
    assert job.connect().refs(REPO)


def test_github_that_stays_down_is_named(job: Job) -> None:
    job.provider.refuse(503, times=job.patience.attempts)
    with pytest.raises(HubUnavailable, match="GitHub answered 503"):
        job.publish()


def test_an_identity_provider_that_is_gone_ends_in_an_error(job: Job) -> None:
    job.provider.stop()
    with pytest.raises(HubUnavailable, match="id token from GitHub"):
        job.publish()


def test_the_next_release_takes_a_token_of_its_own_for_the_push(job: Job) -> None:
    job.publish()
    minted = job.provider.minted
    other = dataclasses.replace(job, origin=origin("b" * 64))
    other.publish(tag="v2")
    assert job.provider.minted > minted
    assert job.commits() == 2
