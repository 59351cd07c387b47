"""An image's document is held against the lock: what is missing, or another version, is named."""

from __future__ import annotations

import pytest

from tools.sbom import LOCK, SbomError, locked, make_bom, missing

TEXT = """\
a-package==1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via b
b==2.1+local \\
    --hash=sha256:cc
windows-only==3 ; sys_platform == 'win32' \\
    --hash=sha256:dd
"""


def bom(**versions: str) -> dict[str, object]:
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    return {
        "components": [
            *({"name": name, "version": version, "purl": f"pkg:pypi/{name}"} for name, version in names.items()),
            {"name": "a-package", "version": "9", "purl": "pkg:deb/debian/a-package@9"},
        ]
    }


def test_a_lock_is_read_for_this_machine() -> None:
    assert locked(TEXT) == {"a-package": "1.0", "b": "2.1+local"}


def test_the_real_lock_is_read_whole() -> None:
    text = LOCK.read_text("utf-8")
    names = {line.partition("==")[0] for line in text.splitlines() if "==" in line and not line.startswith((" ", "#"))}

    assert len(locked(text)) > 40
    assert set(locked(text)) <= names
    assert {"transformers", "peft", "safetensors"} <= set(locked(text))


def test_an_image_with_everything_misses_nothing() -> None:
    assert missing(bom(A_package="1.0", b="2.1+local", torch="2.13.0", more="1"), TEXT) == []


@pytest.mark.parametrize(
    "versions, problem",
    [
        ({"b": "2.1+local", "torch": "2"}, "a-package 1.0 is locked and not in the image"),
        ({"a_package": "1.1", "b": "2.1+local", "torch": "2"}, "a-package is locked as 1.0, and the image has 1.1"),
        ({"a_package": "1.0", "b": "2.1+local"}, "torch is not in the image"),
    ],
)
def test_what_is_missing_is_named(versions: dict[str, str], problem: str) -> None:
    assert missing(bom(**versions), TEXT) == [problem]


def test_an_image_that_is_not_there_is_an_error() -> None:
    with pytest.raises((SbomError, FileNotFoundError)):
        make_bom("lora-merge-action:there-is-none")
