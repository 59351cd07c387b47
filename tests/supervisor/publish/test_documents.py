"""What is added to a merged folder (checksums, signature) goes with its release, and never outlives it."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from runner.protocol.digests import FileDigest
from runner.protocol.errors import PublishError
from runner.supervisor.documents.provenance import CHECKSUMS, MANIFEST, SIGNATURE, checksums, release_digests
from tests.supervisor.publish.test_faults import is_released
from tests.supervisor.publish.world import World, origin

KEY, OTHER = "1" * 64, "2" * 64


def _interrupt(world: World, signature: bytes | None, signed_by: str | None) -> None:
    """Leave a commit without its tag."""
    world.hub.fail("create-tag", times=100)
    added = {SIGNATURE: signature} if signature else {}
    with pytest.raises(PublishError):
        world.publish(pictures=added, signed_by=signed_by)
    world.hub.heal()


def test_a_signature_of_an_earlier_release_goes_with_the_next_one(world: World) -> None:
    world.publish(pictures={SIGNATURE: b"signed", CHECKSUMS: b"sums"}, signed_by=KEY)
    world.origin = origin("b" * 64)

    world.publish(tag="v2.0.0")

    assert {SIGNATURE, CHECKSUMS} <= world.paths("v1.0.0")
    assert not {SIGNATURE, CHECKSUMS} & world.paths("v2.0.0")
    assert world.commits() == 2


def test_a_commit_without_its_tag_is_adopted_though_the_signature_has_another_random_part(world: World) -> None:
    _interrupt(world, b"signed once", KEY)

    world.publish(pictures={SIGNATURE: b"signed twice"}, signed_by=KEY)

    assert world.commits() == 1
    assert is_released(world)


@pytest.mark.parametrize(
    "signature, signed_by", [(b"signed", OTHER), (None, None), (b"signed", None)], ids=["another key", "none", "unsaid"]
)
def test_a_commit_that_is_signed_otherwise_is_not_adopted(
    signature: bytes | None, signed_by: str | None, world: World
) -> None:
    _interrupt(world, signature, signed_by)

    world.publish(pictures={SIGNATURE: b"mine"}, signed_by=KEY)

    assert world.commits() == 2
    assert is_released(world)
    repo = world.hub.repo("alice/model")
    assert repo is not None
    assert repo.read(SIGNATURE, "v1.0.0") == b"mine"


def test_a_signed_commit_is_not_adopted_by_a_release_without_a_signature(world: World) -> None:
    _interrupt(world, b"signed", KEY)

    world.publish()

    assert SIGNATURE not in world.paths("v1.0.0")
    assert is_released(world)


def test_the_same_inputs_under_the_same_tag_are_found_whatever_signs(world: World) -> None:
    first = world.publish(pictures={SIGNATURE: b"signed"}, signed_by=KEY)

    again = world.publish(pictures={SIGNATURE: b"mine"}, signed_by=OTHER)

    assert again == replace(first, created=False)


@pytest.mark.parametrize("name", ["plain.json", "with space.txt", "back\\slash.txt", "line\nbreak.txt", "größe.txt"])
def test_sha256sum_reads_every_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"content")
    digest = FileDigest(path=name, size_bytes=7, sha256=hashlib.sha256(b"content").hexdigest())
    sums = checksums(release_digests([digest], {MANIFEST: b"{}"}))
    (tmp_path / MANIFEST).write_bytes(b"{}")

    def check() -> int:
        command = ["sha256sum", "--check", "--strict", "-"]
        return subprocess.run(command, cwd=tmp_path, input=sums, capture_output=True, check=False).returncode

    assert sums.count(b"\n") == 2
    assert check() == 0
    (tmp_path / name).write_bytes(b"changed")
    assert check() == 1
