"""What the whole suite shares: warm workers, and the order of the files.

Files that take longest come first, so that no worker of pytest is left alone with one at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.acceptance.warmth import Warmth, warmed

# Most expensive first. Files of no such mark follow, the one with the most tests first.
_EXPENSIVE = ("slow", "docker", "real_model")


@pytest.fixture(scope="session")
def warmth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warmth]:
    """Return what gives a supervisor workers whose libraries are imported already."""
    with warmed(tmp_path_factory.mktemp("warm")) as warmth:
        yield warmth


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files, and keep the order of the tests in each: `make test` hands out whole files in this order."""
    marks: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    for item in items:
        file = _file(item)
        marks.setdefault(file, set()).update(mark.name for mark in item.iter_markers())
        counts[file] = counts.get(file, 0) + 1
    items.sort(key=lambda item: _rank(marks[_file(item)], counts[_file(item)]))


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _rank(marks: set[str], tests: int) -> tuple[tuple[bool, ...], int]:
    return tuple(name not in marks for name in _EXPENSIVE), -tests
