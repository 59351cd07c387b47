"""The same release in a folder: whole or not at all, found again, never changed under its tag."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from runner.protocol.digests import digest_folder
from runner.protocol.errors import NotEnoughDisk, PublishConflict, PublishError, TagExists
from runner.protocol.verdict import Status, Verdict
from runner.supervisor.documents import provenance
from runner.supervisor.documents.provenance import Origin, manifest
from runner.supervisor.publish import FolderDestination, Release, ToPublish, Wanted
from runner.supervisor.publish import folder as room
from tests.supervisor.publish.world import CARD, FACTS, make_folder, origin, verdict

ROOT = Path(__file__).resolve().parents[3]


@dataclass(kw_only=True)
class Shelf:
    """One publisher into a folder."""

    root: Path
    folder: Path
    origin: Origin
    lines: list[str]

    def publish(self, tag: str = "v1.0.0", *, judged: Verdict | None = None, **wishes: Any) -> Release:
        destination = FolderDestination(root=self.root, wanted=Wanted(tag=tag, **wishes))
        destination.inspect(self.lines.append)
        found = destination.find(self.origin.input_digest(), self.lines.append)
        if found is not None:
            return found
        files = digest_folder(self.folder)
        judged = judged or verdict()
        documents: Mapping[str, bytes] = {
            provenance.CARD: CARD,
            provenance.MANIFEST: manifest(self.origin, FACTS, judged, files),
            "merge-report/retention.png": b"png",
        }
        return destination.publish(
            ToPublish(
                folder=self.folder,
                files=files,
                documents=documents,
                verdict=judged,
                input_digest=self.origin.input_digest(),
                sent={},
            ),
            say=self.lines.append,
            on_progress=lambda _done, _total: None,
        )

    def names(self) -> set[str]:
        return {path.name for path in self.root.iterdir()}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(root=tmp_path / "models" / "mine", folder=make_folder(tmp_path / "merged"), origin=origin(), lines=[])


def another(shelf: Shelf, tmp_path: Path) -> Shelf:
    return replace(shelf, folder=make_folder(tmp_path / "other", seed=1), origin=origin("b" * 64))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_a_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("x")


def test_a_release_is_a_sub_folder_with_the_files_of_the_merge_and_its_documents(shelf: Shelf) -> None:
    release = shelf.publish()
    place = shelf.root / "v1.0.0"
    made = contents(place)
    assert release.created
    assert (release.url, release.commit) == (str(place), "")
    assert {name: made[name] for name in contents(shelf.folder)} == contents(shelf.folder)
    assert set(made) - set(contents(shelf.folder)) == {"README.md", "merge-manifest.json", "merge-report/retention.png"}
    assert shelf.names() == {"v1.0.0"}


def test_the_same_again_is_found_and_changes_nothing(shelf: Shelf) -> None:
    first = shelf.publish()
    before = {path: path.stat().st_mtime_ns for path in shelf.root.rglob("*")}
    assert shelf.publish() == replace(first, created=False)
    assert {path: path.stat().st_mtime_ns for path in shelf.root.rglob("*")} == before


def test_other_content_under_the_same_tag_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish()
    with pytest.raises(TagExists, match="other inputs"):
        another(shelf, tmp_path).publish()
    assert not another(shelf, tmp_path / "again").publish(on_existing_tag="skip").created


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda place: (place / "config.json").write_text('{"model_type": "LLAMA"}'), "other content"),
        (lambda place: (place / "model-00001-of-00002.safetensors").unlink(), "is missing"),
        (lambda place: (place / "merge-manifest.json").unlink(), "something else put it there"),
        (put_a_file, "something else put it there"),
    ],
    ids=["changed", "missing", "no-manifest", "a-file"],
)
def test_a_release_that_is_not_what_its_manifest_says_is_refused(shelf: Shelf, damage: Any, says: str) -> None:
    shelf.publish()
    damage(shelf.root / "v1.0.0")
    with pytest.raises(TagExists, match=says):
        shelf.publish()


def test_replace_puts_the_new_release_in_its_place_and_tells_both_digests(shelf: Shelf, tmp_path: Path) -> None:
    first = shelf.publish()
    other = another(shelf, tmp_path)
    second = other.publish(on_existing_tag="replace")
    told = "\n".join(shelf.lines)
    assert contents(shelf.root / "v1.0.0")["config.json"] == contents(other.folder)["config.json"]
    assert shelf.names() == {"v1.0.0"}
    assert str(first.merged_digest) in told
    assert str(second.merged_digest) in told


def test_a_protected_tag_is_not_replaced(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish()
    with pytest.raises(TagExists, match="protected-tags"):
        another(shelf, tmp_path).publish(on_existing_tag="replace", is_protected=True)


def test_a_failed_verdict_writes_nothing(shelf: Shelf) -> None:
    with pytest.raises(PublishError, match="FAIL"):
        shelf.publish(judged=verdict(Status.FAIL))
    assert not shelf.root.exists()


def test_bytes_that_change_on_the_way_to_the_disk_never_get_the_name(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def rot(source: Path, made: Path) -> Any:
        copy(source, made)
        if made.name == "config.json":
            made.write_text('{"model_type": "LLAMA"}')

    monkeypatch.setattr(shutil, "copyfile", rot)
    with pytest.raises(PublishError, match=r"config\.json is not the file that was judged"):
        shelf.publish()
    assert shelf.names() == set()


def test_a_full_disk_is_told_and_leaves_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(shelf.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(NotEnoughDisk, match="are free in"):
        shelf.publish()
    assert shelf.names() == set()


def test_who_comes_second_is_told_and_replaces_nothing(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = another(shelf, tmp_path)
    check = room._check_space

    def meanwhile(*args: Any) -> None:
        monkeypatch.setattr(room, "_check_space", check)
        shelf.publish()

    monkeypatch.setattr(room, "_check_space", meanwhile)
    with pytest.raises(PublishConflict, match="Somebody else wrote"):
        other.publish()
    assert contents(shelf.root / "v1.0.0")["config.json"] == contents(shelf.folder)["config.json"]
    assert shelf.names() == {"v1.0.0"}


def test_aliases_are_links_that_move_forward_only(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish(also_tags=("latest", "v1"))
    other = another(shelf, tmp_path)
    other.publish("v2", also_tags=("latest",))
    assert (shelf.root / "latest").readlink() == Path("v2")
    assert (shelf.root / "v1").readlink() == Path("v1.0.0")
    shelf.publish(also_tags=("latest",))
    assert (shelf.root / "latest").readlink() == Path("v2")
    (shelf.root / "stable").mkdir()
    with pytest.raises(PublishError, match="is a folder"):
        other.publish("v2", also_tags=("stable",))


@pytest.mark.parametrize("tag", ["pkg/v1.2", "v1-ß", "v1.2.0+build.7", "a%2Fb"])
def test_a_tag_is_one_sub_folder_whatever_its_characters(shelf: Shelf, tag: str) -> None:
    release = shelf.publish(tag)
    assert Path(release.url).parent == shelf.root
    assert len(shelf.names()) == 1
    assert not shelf.publish(tag).created


def test_a_place_that_cannot_be_written_is_refused_before_any_work(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PublishError, match="no folder"):
        replace(shelf, root=tmp_path / "file" / "models").publish()


KILLED = """
import shutil, sys, time
from pathlib import Path
from tests.supervisor.publish.test_folder import Shelf
from tests.supervisor.publish.world import origin
copy = shutil.copyfile
def slow(source, made):
    copy(source, made)
    print("copied", flush=True)
    time.sleep(0.05)
shutil.copyfile = slow
Shelf(root=Path(sys.argv[1]), folder=Path(sys.argv[2]), origin=origin(), lines=[]).publish()
"""


def test_a_kill_at_any_copy_leaves_no_release_and_the_next_run_cleans_up(shelf: Shelf) -> None:
    for copies in (1, 3, 5):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(shelf.root), str(shelf.folder)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(copies):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert "v1.0.0" not in shelf.names()
    time.sleep(0.01)
    assert shelf.publish().created
    assert shelf.names() == {"v1.0.0"}
