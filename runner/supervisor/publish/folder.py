"""A release in a folder instead of a Hub, for machines that reach none: `<folder>/<tag>/` with the same files.

It is written beside its place, flushed to the disk, read back and compared with the digests that were judged, and then
renamed: `<tag>` is the whole release or is not there. An alias is a link to the sub-folder of a tag. A tag's name is
percent-encoded where it holds what a name of a folder cannot (`pkg/v1` is `pkg%2Fv1`).
Not covered: another program that changes the folder, and file systems that lose what they have confirmed.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runner.protocol.digests import digest_file
from runner.protocol.errors import NotEnoughDisk, PublishConflict, PublishError
from runner.protocol.syntax import parse_json
from runner.protocol.verdict import Status
from runner.supervisor.hub import MANIFEST
from runner.supervisor.publish.contents import Content, Contents, changed, listed
from runner.supervisor.publish.existing import Release, may_skip, other_inputs, recorded
from runner.supervisor.publish.run import Say
from runner.supervisor.publish.wanted import Wanted

SPARE_DISK_BYTES = 64 << 20


def place_of(root: Path, tag: str) -> Path:
    """Return the sub-folder of a tag."""
    return root / quote(tag, safe="+@=,")


def check_folder(root: Path) -> None:
    """Raise `PublishError` where no release can be written; nothing is left behind."""
    there = next(path for path in (root, *root.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PublishError(
            f"No release can be written to {str(root)!r}: {str(there)!r} is {_why_not(there)}.",
            why="A release is a sub-folder of it, made beside its place and renamed.",
            fix="Set `target-repo` to a folder that this user may write to.",
        )


def find_in_folder(root: Path, wanted: Wanted, input_digest: str) -> Release | None:
    """Return the release that makes a run unnecessary, or None when there is work to do; every byte is read.

    Raises:
        TagExists: the tag holds something else, and `on_existing_tag` is "fail".
    """
    place = place_of(root, wanted.tag)
    if not os.path.lexists(place):
        return None
    manifest = _manifest(place)
    reason = _difference(place, manifest) or other_inputs(manifest or {}, input_digest)
    found = _release(root, wanted, created=False)
    if reason is None:
        return replace(found, **recorded(manifest or {}))
    return found if may_skip(wanted, f"The folder {str(place)!r}", reason) else None


def write_release(
    root: Path,
    wanted: Wanted,
    contents: Contents,
    *,
    status: Status,
    say: Say,
    on_progress: Callable[[int, int], None],
) -> Release:
    """Return the release, after its sub-folder was read back and has its name.

    Raises:
        PublishConflict: somebody else made it meanwhile.
        PublishError: what was written is not what was judged, or could not be written.
        NotEnoughDisk: there is no room.
    """
    place = place_of(root, wanted.tag)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _beside(place) as partial:
            _check_space(root, contents)
            _write(partial, contents, on_progress)
            _rename(partial, place, replaces=wanted.on_existing_tag == "replace", say=say)
            _flush(root)
    except OSError as error:
        raise PublishError(
            f"The release could not be written to {str(place)!r}: {error.strerror}.",
            why="It appears as a whole or not at all; what was written beside it is removed.",
            fix="Check the disk and the rights on the folder, then run again.",
        ) from error
    return replace(_release(root, wanted, created=True), status=status, merged_digest=contents.merged_digest)


def link_aliases(root: Path, wanted: Wanted, say: Say, *, only_forward: bool) -> None:
    """Make every alias a link to the release, each by one rename.

    Raises:
        PublishError: something that is no link has the name of an alias, or it could not be written.
    """
    place = place_of(root, wanted.tag)
    for alias in wanted.also_tags:
        link = place_of(root, alias)
        if os.path.lexists(link) and not link.is_symlink():
            raise PublishError(
                f"The release is complete, but {str(link)!r} is a folder, so the alias {alias} cannot be a link there.",
                why="Only links are moved; a folder may be a release of its own.",
                fix=f"Remove {alias} from `also-tags`, or move that folder away.",
            )
        before = link.resolve() if link.is_symlink() else None
        if before == place.resolve():
            continue
        if before is not None and only_forward and not _is_older(before, place):
            say(f"The alias {alias} stays on {before.name!r}, which is not older than this release.")
            continue
        scratch = link.with_name(f".{link.name}.{os.getpid()}")
        with suppress(FileNotFoundError):
            scratch.unlink()
        scratch.symlink_to(place.name)
        scratch.replace(link)
        say(f"The alias {alias} is a link to {place.name!r} now.")


def _write(partial: Path, contents: Contents, on_progress: Callable[[int, int], None]) -> None:
    done, total = 0, contents.size_bytes
    on_progress(done, total)
    owner = partial.parent.stat()
    for path, content in contents.by_path.items():
        made = partial / path
        made.parent.mkdir(parents=True, exist_ok=True)
        _copy(content, made)
        done += content.file.size_bytes
        on_progress(done, total)
    for path, content in contents.by_path.items():
        if digest_file(partial, path) != content.file:
            raise changed(path)
    for entry in (*partial.rglob("*"), partial):
        entry.chmod(0o755 if entry.is_dir() else 0o644)
        if os.geteuid() == 0:
            os.chown(entry, owner.st_uid, owner.st_gid, follow_symlinks=False)
        if entry.is_dir():
            _flush(entry)


def _copy(content: Content, made: Path) -> None:
    if isinstance(content.source, bytes):
        made.write_bytes(content.source)
    else:
        shutil.copyfile(content.source, made)
    with made.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read back from the disk


def _rename(partial: Path, place: Path, *, replaces: bool, say: Say) -> None:
    old = None
    if replaces and os.path.lexists(place):
        old = place.with_name(f"{partial.name}.old")
        say(f"Replacing {str(place)!r}.")
        say(f"  merged digest before: {(recorded(_manifest(place) or {})).get('merged_digest') or 'not known'}")
        say(f"  merged digest now: {recorded(_manifest(partial) or {}).get('merged_digest')}")
        place.rename(old)
    try:
        partial.rename(place)  # refused where there is something already
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise PublishConflict(
            f"Somebody else wrote {str(place)!r} during this run.",
            why="It is not replaced, because it may be in use already.",
            fix="Find out who else releases this tag, then run again, or choose a new tag.",
        ) from error
    if old is not None and old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    elif old is not None:
        old.unlink()


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """Yield a new folder beside `place`, held by a lock; what killed runs have left there is removed."""
    prefix = f".{place.name}."
    for left in place.parent.glob(f"{glob.escape(prefix)}*"):
        _remove_if_dead(left)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield partial
    finally:
        os.close(descriptor)
        shutil.rmtree(partial, ignore_errors=True)


def _remove_if_dead(left: Path) -> None:
    if left.is_symlink() or not left.is_dir():
        return
    descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(left, ignore_errors=True)
    except BlockingIOError:
        pass  # another run is writing there
    finally:
        os.close(descriptor)


def _check_space(root: Path, contents: Contents) -> None:
    free = shutil.disk_usage(root).free
    if contents.size_bytes + SPARE_DISK_BYTES > free:
        raise NotEnoughDisk(
            f"The release has {contents.size_bytes / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free in {str(root)!r}.",
            why="It is written beside its place as a whole before it gets its name.",
            fix="Free space there, or name another folder.",
        )


def _difference(place: Path, manifest: dict[str, Any] | None) -> str | None:
    if manifest is None:
        return "it holds no merge-manifest.json, so something else put it there"
    files = listed(manifest)
    for path, (size_bytes, sha256) in files.items():
        local = place / path
        if ".." in Path(path).parts or not local.is_file():
            return f"it is not what its manifest says: {path} is missing"
        if local.stat().st_size != size_bytes or digest_file(place, path).sha256 != sha256:
            return f"it is not what its manifest says: {path} is other content"
    return None if files else "its manifest lists no files"


def _manifest(place: Path) -> dict[str, Any] | None:
    try:
        content = parse_json((place / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _release(root: Path, wanted: Wanted, *, created: bool) -> Release:
    return Release(repo_id=root.name, tag=wanted.tag, commit="", url=str(place_of(root, wanted.tag)), created=created)


def _is_older(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return (one / MANIFEST).stat().st_mtime_ns < (other / MANIFEST).stat().st_mtime_ns
    return True


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_not(path: Path) -> str:
    return "a folder that this user may not write to" if path.is_dir() else "no folder"
