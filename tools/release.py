"""Make a release of this action: the steps that `.github/workflows/release.yml` takes, each one a command.

    python -m tools.release check 1.2.0                       version, changelog and tags agree
    python -m tools.release notes 1.2.0                       the changelog's section
    python -m tools.release commit 1.2.0 --image NAME@sha256:…   a commit that runs that image, tagged v1.2.0 (and v1)
    python -m tools.release commit 1.2.0 --image … --variant cpu   the same for v1.2.0-cpu (and v1-cpu)

The commit is no part of the branch: on the branch `action.yml` builds the Dockerfile, so that a pull request tests
itself; at a tag it names the image by its digest, so that a tag always runs the same bytes. `v1.2.0` is made once
and never moved; `v1` moves to the newest release of its major version. Nothing is pushed here.

The image without a variant has the CUDA build of torch; the variant `cpu` is a fraction of its size.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(-[0-9A-Za-z.]+)?")
IMAGE = re.compile(r"[a-z0-9]+(?:[._:/-][a-z0-9]+)*@sha256:[0-9a-f]{64}")
BUILT = "  image: Dockerfile\n"


class ReleaseError(Exception):
    """What is not as a release needs it."""


def main(arguments: list[str]) -> int:
    """Run one step; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("check", "notes", "commit"))
    parser.add_argument("version", help="such as 1.2.0 or 1.2.0-rc.1")
    parser.add_argument("--image", default="", help="for `commit`: the image with its digest")
    parser.add_argument("--variant", default="", choices=("", "cpu"), help="for `commit`: of the image")
    parser.add_argument("--root", type=Path, default=Path(), help="of the checkout")
    given = parser.parse_args(arguments)
    try:
        if given.step == "notes":
            print(notes(given.root, given.version))
        elif given.step == "check":
            check(given.root, given.version)
        else:
            for tag in commit(given.root, given.version, given.image, variant=given.variant):
                print(tag)
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


def check(root: Path, version: str, *, variant: str = "") -> None:
    """Check that this checkout can become `version`, in this variant.

    Raises:
        ReleaseError: the version is no version, is not the code's, has no notes, or exists already.
    """
    if not VERSION.fullmatch(version):
        raise ReleaseError(f"{version!r} is no version: write MAJOR.MINOR.PATCH, as in 1.2.0")
    found = re.search(r'__version__ = "([^"]+)"', (root / "runner/__init__.py").read_text("utf-8"))
    if found is None or found[1] != version:
        raise ReleaseError(f"runner.__version__ is {found[1] if found else 'missing'!r}, not {version!r}")
    notes(root, version)
    if (tag := named(version, variant)) in tags(root):
        raise ReleaseError(f"the tag {tag} exists: a release is made once; choose the next version")


def named(version: str, variant: str) -> str:
    """Return the tag of a release, or of a major version."""
    return f"v{version}-{variant}" if variant else f"v{version}"


def notes(root: Path, version: str) -> str:
    """Return the section of CHANGELOG.md on `version`, without its heading.

    Raises:
        ReleaseError: there is none, or it is empty.
    """
    text = (root / "CHANGELOG.md").read_text("utf-8")
    found = re.search(rf"^## \[?{re.escape(version)}\]?[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        raise ReleaseError(f"CHANGELOG.md has no notes on {version}: rename its `Unreleased` section")
    return found[1].strip()


def commit(root: Path, version: str, image: str, *, variant: str = "") -> list[str]:
    """Commit an action.yml that runs `image` on top of HEAD, tag it, and return the tags to push.

    The branch and the files of the checkout are as before.

    Raises:
        ReleaseError: as `check`; or the image is not named by its digest; or action.yml is not what is expected.
    """
    check(root, version, variant=variant)
    if not IMAGE.fullmatch(image):
        raise ReleaseError(f"{image!r} does not name an image by its digest (NAME@sha256:64 hex digits)")
    metadata = git(root, "show", "HEAD:action.yml")
    if metadata.count(BUILT) != 1:
        raise ReleaseError("action.yml does not build the Dockerfile, so this is not the branch to release from")
    blob = git(root, "hash-object", "-w", "--stdin", text=metadata.replace(BUILT, f"  image: docker://{image}\n"))
    tree = git(root, "ls-tree", "HEAD").replace(
        git(root, "rev-parse", "HEAD:action.yml") + "\taction.yml", f"{blob}\taction.yml"
    )
    tag = named(version, variant)
    message = f"Release {tag}\n\naction.yml runs {image}.\n"
    made = git(root, "commit-tree", git(root, "mktree", text=tree), "-p", "HEAD", text=message)
    is_newest = newest(tags(root), version)
    git(root, "tag", "-a", tag, made, "-m", tag)
    if not is_newest:
        return [tag]
    moving = named(version.partition(".")[0], variant)
    git(root, "tag", "-f", moving, made)
    return [tag, moving]


def newest(existing: list[str], version: str) -> bool:
    """Return whether no tagged release of its major version is above `version`; a pre-release never is the newest."""
    ours = order(version)
    if ours is None:
        return False
    others = [found for tag in existing if (found := order(tag.removeprefix("v"))) is not None]
    return all(other <= ours for other in others if other[0] == ours[0])


def order(version: str) -> tuple[int, int, int] | None:
    """Return what versions are compared by; None for a pre-release and for what is no version."""
    found = VERSION.fullmatch(version)
    return None if found is None or found[4] else (int(found[1]), int(found[2]), int(found[3]))


def tags(root: Path) -> list[str]:
    """Return all tags of the checkout."""
    return git(root, "tag", "--list").split()


def git(root: Path, *arguments: str, text: str | None = None) -> str:
    """Return what git prints, without its last line feed.

    Raises:
        ReleaseError: git failed.
    """
    done = subprocess.run(["git", "-C", str(root), *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
