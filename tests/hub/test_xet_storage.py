"""The Xet storage as plain HTTP: ranges, tokens, and what is refused."""

from __future__ import annotations

import random

import httpx2
import pytest
from huggingface_hub import HfApi

from tests.hub.conftest import REPO, commit_files
from tests.hub.server import LocalHub

NOISE = random.Random(0).randbytes(3_000_000)
pytestmark = pytest.mark.usefixtures("fresh_client")


def _storage(hub: LocalHub, token: object, scope: str, repo: str = REPO) -> tuple[str, dict[str, str]]:
    headers = {"Authorization": f"Bearer {token}"}
    told = httpx2.get(f"{hub.endpoint}/api/models/{repo}/xet-{scope}-token/main", headers=headers)
    assert told.status_code == 200, told.text
    assert told.headers["x-xet-access-token"] == told.json()["accessToken"]
    return told.json()["casUrl"], {"Authorization": f"Bearer {told.json()['accessToken']}"}


@pytest.mark.parametrize("start, end", [(0, 10), (999_999, 1_700_000), (2_999_990, 2_999_999), (100, 5_000_000)])
def test_reads_a_range_of_a_file(hub: LocalHub, alice: HfApi, repo: str, start: int, end: int) -> None:
    commit_files(alice, {"a.safetensors": NOISE})  # does not compress, so chunks lie as they are behind 8 bytes each
    (entry,) = alice.get_paths_info(REPO, ["a.safetensors"])
    url, headers = _storage(hub, alice.token, "read")
    asked = {**headers, "Range": f"bytes={start}-{end}"}
    told = httpx2.get(f"{url}/v2/reconstructions/{entry.xet_hash}", headers=asked).json()
    length = sum(term["unpacked_length"] for term in told["terms"])
    content = b""
    for fetches in told["xorbs"].values():
        ((fetch,),) = [fetches]
        ((span,),) = [fetch["ranges"]]
        wanted = {"Range": f"bytes={span['bytes']['start']}-{span['bytes']['end']}"}
        body = httpx2.get(fetch["url"], headers=wanted).content
        assert httpx2.get(fetch["url"]).status_code == 403  # signed for this range alone
        while body:
            size = int.from_bytes(body[5:8], "little")
            content, body = content + body[8 : 8 + size], body[8 + size :]
    assert len(content) == length < end - start + 300_000
    skip = told["offset_into_first_range"]
    wanted_bytes = NOISE[start : end + 1]
    assert content[skip : skip + len(wanted_bytes)] == wanted_bytes


def test_a_range_behind_the_end_is_refused(hub: LocalHub, alice: HfApi, repo: str) -> None:
    commit_files(alice, {"a.safetensors": b"\0short"})
    (entry,) = alice.get_paths_info(REPO, ["a.safetensors"])
    url, headers = _storage(hub, alice.token, "read")
    asked = {**headers, "Range": "bytes=6-"}
    assert httpx2.get(f"{url}/v2/reconstructions/{entry.xet_hash}", headers=asked).status_code == 416


def test_tokens_of_the_storage_are_for_one_repository_and_one_purpose(hub: LocalHub, alice: HfApi, repo: str) -> None:
    commit_files(alice, {"a.safetensors": NOISE})
    (entry,) = alice.get_paths_info(REPO, ["a.safetensors"])
    alice.create_repo("alice/other")
    url, reading = _storage(hub, alice.token, "read")
    _, elsewhere = _storage(hub, alice.token, "read", "alice/other")
    file = f"{url}/v2/reconstructions/{entry.xet_hash}"
    assert httpx2.get(file, headers=reading).status_code == 200
    assert httpx2.get(file, headers=elsewhere).status_code == 404
    assert httpx2.get(file).status_code == 401
    assert httpx2.get(file, headers={"Authorization": f"Bearer {alice.token}"}).status_code == 401
    for path in ("/v1/xorbs/default/" + "0" * 64, "/v1/shards", "/v2/shards"):
        assert httpx2.post(url + path, headers=reading, content=b"x").status_code == 403
    reader = hub.add_token("alice", "read")
    refused = httpx2.get(
        f"{hub.endpoint}/api/models/{REPO}/xet-write-token/main", headers={"Authorization": f"Bearer {reader}"}
    )
    assert refused.status_code == 403


def test_refuses_what_is_no_xorb_and_no_shard(hub: LocalHub, alice: HfApi, repo: str) -> None:
    url, headers = _storage(hub, alice.token, "write")
    xorb = f"{url}/v1/xorbs/default/{'0' * 64}"
    for body in (b"", b"x", b"\0\xff\0\0\0\xff\0\0short", b"\0\x04\0\0\x01\x08\0\0none"):
        assert httpx2.post(xorb, headers=headers, content=body).status_code == 400
    assert httpx2.post(f"{url}/v1/shards", headers=headers, content=b"x" * 96).status_code == 400
    streamed = httpx2.post(f"{url}/v2/shards", headers=headers, content=b"x" * 96)
    assert (streamed.status_code, streamed.json()["type"]) == (200, "error")


def test_a_gated_repository_gives_no_token_to_strangers(hub: LocalHub, alice: HfApi, repo: str) -> None:
    alice.create_repo("alice/gated")
    hub.gate("alice/gated")
    hub.add_user("bob")
    headers = {"Authorization": f"Bearer {hub.add_token('bob')}"}
    refused = httpx2.get(f"{hub.endpoint}/api/models/alice/gated/xet-read-token/main", headers=headers)
    assert (refused.status_code, refused.headers["x-error-code"]) == (403, "GatedRepo")
