"""The unmodified client with the unmodified hf_xet: uploads, downloads, what is sent twice and what is refused."""

from __future__ import annotations

import array
import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import BadRequestError

from tests.hub.conftest import REPO, commit_files, head_of
from tests.hub.faults import FOREVER, Kind
from tests.hub.server import LocalHub
from tests.hub.state import Limits
from tests.hub.xorbs import chunks_of

RANDOM = random.Random(0)
NOISE = RANDOM.randbytes(3_000_000)
WEIGHTS = array.array("f", [RANDOM.gauss(0, 0.02) for _ in range(200_000)]).tobytes()
TEXT = b"the same words again and again " * 40_000
FILES = {"noise.safetensors": NOISE, "weights.safetensors": WEIGHTS, "text.bin": TEXT, "tiny.bin": b"\0tiny"}
FRESH = Callable[[], None]
pytestmark = pytest.mark.usefixtures("fresh_client")


def _fetched(hub: LocalHub, api: HfApi, path: str) -> bytes:
    return Path(hf_hub_download(REPO, path, endpoint=hub.endpoint, token=api.token)).read_bytes()


def _sent_bytes(hub: LocalHub) -> int:
    return sum(exchange.received_bytes for exchange in hub.exchanges() if exchange.endpoint == "xet-put")


def _calls(hub: LocalHub, endpoint: str) -> int:
    return sum(exchange.endpoint == endpoint for exchange in hub.exchanges())


def test_what_was_uploaded_is_what_is_downloaded(hub: LocalHub, alice: HfApi, repo: str, fresh_client: FRESH) -> None:
    oid = commit_files(alice, FILES)
    view = hub.repo(REPO)
    assert view is not None
    assert {path: view.tree()[path] for path in FILES} == {
        path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()
    }
    xorbs = [path.read_bytes() for path in (hub.root / "xet" / "xorbs").iterdir()]
    assert {chunk.scheme for xorb in xorbs for chunk in chunks_of(xorb)} == {0, 1, 2}  # plain, LZ4, grouped LZ4
    fresh_client()
    hub.forget_requests()
    assert {path: _fetched(hub, alice, path) for path in FILES} == FILES
    assert _calls(hub, "xet-get") >= len(FILES)
    assert _calls(hub, "blob") == 0
    assert all(exchange.routed for exchange in hub.exchanges())
    for entry in alice.get_paths_info(REPO, list(FILES), revision=oid):
        assert len(entry.xet_hash) == 64


def test_clients_without_xet_read_the_same_files(
    hub: LocalHub, alice: HfApi, repo: str, fresh_client: FRESH, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_files(alice, FILES)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.forget_requests()
    assert {path: _fetched(hub, alice, path) for path in FILES} == FILES
    assert _calls(hub, "blob") == len(FILES)


@pytest.mark.parametrize("knows", [True, False])
def test_another_machine_sends_only_what_the_hub_does_not_tell_of(
    tmp_path: Path, fresh_client: FRESH, knows: bool
) -> None:
    with LocalHub.start(tmp_path / "other", limits=Limits(xet_knows_chunks=knows)) as hub:
        hub.add_user("alice")
        api = HfApi(endpoint=hub.endpoint, token=hub.add_token("alice"))
        api.create_repo(REPO)
        commit_files(api, {"a.safetensors": NOISE})
        assert _sent_bytes(hub) > len(NOISE)
        fresh_client()
        hub.forget_requests()
        commit_files(api, {"b.safetensors": NOISE})
        assert _sent_bytes(hub) == 0 if knows else _sent_bytes(hub) > len(NOISE)
        view = hub.repo(REPO)
        assert view is not None
        assert view.read("b.safetensors") == NOISE


def test_a_changed_middle_is_sent_alone(hub: LocalHub, alice: HfApi, repo: str) -> None:
    commit_files(alice, {"a.safetensors": NOISE})
    hub.forget_requests()
    changed = NOISE[:1_500_000] + b"changed" + NOISE[1_500_000:]
    commit_files(alice, {"a.safetensors": changed})
    assert 0 < _sent_bytes(hub) < 500_000
    view = hub.repo(REPO)
    assert view is not None
    assert view.read("a.safetensors") == changed


def test_several_ranges_of_one_xorb_come_in_one_answer(
    hub: LocalHub, alice: HfApi, repo: str, fresh_client: FRESH
) -> None:
    commit_files(alice, {"a.safetensors": NOISE})
    parts = NOISE[:1_000_000] + NOISE[2_000_000:]
    commit_files(alice, {"b.safetensors": parts})
    fresh_client()
    hub.forget_requests()
    assert _fetched(hub, alice, "b.safetensors") == parts
    assert any(
        "," in exchange.query["X-Xet-Signed-Range"][0] for exchange in hub.exchanges() if exchange.endpoint == "xet-get"
    )


def test_an_old_storage_serves_the_old_calls(hub: LocalHub, alice: HfApi, repo: str, fresh_client: FRESH) -> None:
    for endpoint in ("xet-shard", "xet-file"):
        hub.fail(endpoint, status=404, times=FOREVER)
    commit_files(alice, FILES)
    fresh_client()
    assert {path: _fetched(hub, alice, path) for path in FILES} == FILES
    assert _calls(hub, "xet-shard-v1") == 1
    assert _calls(hub, "xet-file-v1") >= 1


def test_refuses_a_file_whose_digest_is_not_that_of_its_chunks(hub: LocalHub, alice: HfApi, repo: str) -> None:
    operation = CommitOperationAdd("a.safetensors", NOISE)
    operation.upload_info.sha256 = hashlib.sha256(b"other").digest()
    with pytest.raises(Exception, match="do not match"):
        alice.preupload_lfs_files(REPO, [operation])
    operation._upload_mode, operation._is_uploaded = "lfs", True
    operation._should_ignore, operation._remote_oid = False, None
    with pytest.raises(BadRequestError, match="pointed to a file that does not exist"):
        alice.create_commit(REPO, [operation], commit_message="crash")


def test_a_server_without_xet_refuses_clients_with_it(tmp_path: Path) -> None:
    with LocalHub.start(tmp_path / "plain", xet=False) as hub:
        hub.add_user("alice")
        api = HfApi(endpoint=hub.endpoint, token=hub.add_token("alice"))
        api.create_repo(REPO)
        with pytest.raises(Exception, match="404"):
            commit_files(api, {"a.safetensors": NOISE})
        assert _calls(hub, "lfs-batch") == 0  # the client has no way back to LFS
        assert head_of(api)


@pytest.mark.parametrize("endpoint", ["xet-put", "xet-shard", "xet-chunk"])
@pytest.mark.parametrize("kind", [Kind.STATUS, Kind.RESET_BEFORE, Kind.RESET_AFTER, Kind.APPLIED_RESET])
def test_the_client_goes_on_after_a_failure_of_the_storage(
    hub: LocalHub, alice: HfApi, repo: str, endpoint: str, kind: Kind
) -> None:
    hub.fail(endpoint, kind)
    commit_files(alice, {"a.safetensors": NOISE})
    assert len(hub.fired()) == 1
    view = hub.repo(REPO)
    assert view is not None
    assert view.read("a.safetensors") == NOISE


def test_a_storage_that_stays_down_is_an_error(hub: LocalHub, alice: HfApi, repo: str) -> None:
    hub.fail("xet-put", times=FOREVER)
    with pytest.raises(Exception, match="503"):
        commit_files(alice, {"a.safetensors": NOISE})
    hub.heal()
    commit_files(alice, {"a.safetensors": NOISE})


def test_an_expired_url_is_renewed_by_the_client(hub: LocalHub, alice: HfApi, repo: str, fresh_client: FRESH) -> None:
    commit_files(alice, {"a.safetensors": NOISE})
    fresh_client()
    hub.fail("xet-get", Kind.EXPIRED)
    assert _fetched(hub, alice, "a.safetensors") == NOISE
    assert _calls(hub, "xet-file") == 2


def test_a_full_storage_is_told(hub: LocalHub, alice: HfApi, repo: str) -> None:
    hub.fail("xet-write-token", Kind.QUOTA, times=FOREVER)
    with pytest.raises(Exception, match="403"):
        commit_files(alice, {"a.safetensors": NOISE})


def test_stored_bytes_rot(hub: LocalHub, alice: HfApi, repo: str) -> None:
    hub.fail("xet-shard", Kind.DAMAGED)
    commit_files(alice, {"a.safetensors": NOISE})
    view = hub.repo(REPO)
    assert view is not None
    assert view.tree()["a.safetensors"] == hashlib.sha256(NOISE).hexdigest()
    assert view.read("a.safetensors") != NOISE


def test_the_storage_outlives_a_restart(hub: LocalHub, alice: HfApi, repo: str, fresh_client: FRESH) -> None:
    commit_files(alice, {"a.safetensors": NOISE})
    hub.stop()
    fresh_client()
    with LocalHub.start(hub.root) as again:
        api = HfApi(endpoint=again.endpoint, token=alice.token)
        assert _fetched(again, api, "a.safetensors") == NOISE
        commit_files(api, {"b.safetensors": NOISE})
        assert _sent_bytes(again) == 0


@pytest.mark.parametrize("endpoint", ["xet-put", "xet-shard"])
def test_a_token_of_the_storage_that_ends_too_early_is_not_renewed_until_the_next_call(
    hub: LocalHub, alice: HfApi, repo: str, endpoint: str
) -> None:
    hub.fail(endpoint, Kind.EXPIRED)
    with pytest.raises(ConnectionError, match="401"):
        commit_files(alice, {"a.safetensors": NOISE})
    commit_files(alice, {"a.safetensors": NOISE})
    assert _calls(hub, "xet-write-token") == 2


def test_the_client_renews_a_token_of_the_storage_by_the_time_that_it_was_told(
    tmp_path: Path, fresh_client: FRESH
) -> None:
    # hf_xet asks for a new one when less than half a minute is left, so here for every call.
    with LocalHub.start(tmp_path / "other", limits=Limits(xet_token_s=5)) as hub:
        hub.add_user("alice")
        api = HfApi(endpoint=hub.endpoint, token=hub.add_token("alice"))
        api.create_repo(REPO)
        commit_files(api, {"a.safetensors": NOISE})
        assert _calls(hub, "xet-write-token") > 1
