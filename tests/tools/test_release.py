"""A release: a commit beside the branch that runs an image by its digest, a tag that stays and one that moves."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from tools import release

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "registry.example/org/lora-merge-action@sha256:" + "ab" * 32
CHANGELOG = "# Changelog\n\n## Unreleased\n\n## 1.2.0\n\n### Added\n\n- A thing.\n\n## 1.1.0\n\n- Another.\n"


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a real repository with this action's own metadata, at version 1.2.0."""
    root = tmp_path / "checkout"
    (root / "runner").mkdir(parents=True)
    (root / "action.yml").write_bytes((ROOT / "action.yml").read_bytes())
    (root / "run.sh").write_text("true\n")
    (root / "run.sh").chmod(0o755)
    (root / "CHANGELOG.md").write_text(CHANGELOG)
    (root / "runner" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    git(root.parent, "init", "-q", "-b", "main", str(root))
    for name, value in (("user.name", "t"), ("user.email", "t@example.org")):
        git(root, "config", name, value)
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def test_a_tag_runs_the_image_by_its_digest_and_the_branch_builds_it(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")

    assert release.commit(checkout, "1.2.0", IMAGE) == ["v1.2.0", "v1"]

    runs = yaml.safe_load(git(checkout, "show", "v1.2.0:action.yml"))["runs"]
    assert runs == {**yaml.safe_load((ROOT / "action.yml").read_text())["runs"], "image": f"docker://{IMAGE}"}
    assert git(checkout, "rev-parse", "v1.2.0^{commit}") == git(checkout, "rev-parse", "v1^{commit}")
    assert git(checkout, "rev-parse", "v1.2.0^{commit}^") == head == git(checkout, "rev-parse", "HEAD")
    assert git(checkout, "diff", "--name-only", "HEAD", "v1.2.0").split() == ["action.yml"]
    assert git(checkout, "status", "--porcelain") == ""


def test_the_cpu_image_has_tags_of_its_own(checkout: Path) -> None:
    cpu = IMAGE.replace("ab", "cd")

    assert release.commit(checkout, "1.2.0", IMAGE) == ["v1.2.0", "v1"]
    assert release.commit(checkout, "1.2.0", cpu, variant="cpu") == ["v1.2.0-cpu", "v1-cpu"]

    assert f"docker://{cpu}" in git(checkout, "show", "v1-cpu:action.yml")
    assert f"docker://{IMAGE}" in git(checkout, "show", "v1:action.yml")


def test_the_changelog_gives_the_notes(checkout: Path) -> None:
    assert release.notes(checkout, "1.2.0") == "### Added\n\n- A thing."
    assert release.notes(checkout, "1.1.0") == "- Another."


def test_the_major_tag_moves_forward_only(checkout: Path) -> None:
    release.commit(checkout, "1.2.0", IMAGE)
    (checkout / "runner" / "__init__.py").write_text('__version__ = "1.1.0"\n')

    assert release.commit(checkout, "1.1.0", IMAGE) == ["v1.1.0"]
    assert git(checkout, "rev-parse", "v1^{commit}") == git(checkout, "rev-parse", "v1.2.0^{commit}")


@pytest.mark.parametrize(
    "existing, version, expected",
    [
        (["v1.2.0"], "1.10.0", True),
        (["v1.2.0", "v2.0.0"], "1.3.0", True),
        (["v1.2.0"], "1.2.0-rc.1", False),
        (["v1.3.0-rc.1", "v1", "latest"], "1.3.0", True),
        (["v1.3.1"], "1.3.0", False),
    ],
)
def test_the_newest_is_known(existing: list[str], version: str, expected: bool) -> None:
    assert release.newest(existing, version) is expected


@pytest.mark.parametrize(
    "version, image, words",
    [
        ("1.3.0", IMAGE, "runner.__version__"),
        ("1.2", IMAGE, "no version"),
        ("1.2.0", IMAGE.partition("@")[0], "digest"),
        ("1.2.0", IMAGE + "\n  x: y", "digest"),
    ],
)
def test_refuses_what_is_no_release(
    checkout: Path, capsys: pytest.CaptureFixture[str], version: str, image: str, words: str
) -> None:
    assert release.main(["commit", version, "--image", image, "--root", str(checkout)]) == 1
    assert words in capsys.readouterr().err
    assert release.tags(checkout) == []


def test_refuses_a_release_that_exists(checkout: Path) -> None:
    release.commit(checkout, "1.2.0", IMAGE)

    with pytest.raises(release.ReleaseError, match="exists"):
        release.commit(checkout, "1.2.0", IMAGE)


def test_refuses_a_version_without_notes(checkout: Path) -> None:
    (checkout / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n")

    with pytest.raises(release.ReleaseError, match="no notes"):
        release.check(checkout, "1.2.0")


def test_refuses_to_release_a_release(checkout: Path) -> None:
    release.commit(checkout, "1.2.0", IMAGE)
    git(checkout, "checkout", "-q", "v1.2.0")
    (checkout / "runner" / "__init__.py").write_text('__version__ = "1.1.0"\n')

    with pytest.raises(release.ReleaseError, match="does not build"):
        release.commit(checkout, "1.1.0", IMAGE)


def test_this_checkout_can_be_released_from() -> None:
    assert (ROOT / "action.yml").read_text("utf-8").count(release.BUILT) == 1
