from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.protocol.syntax import is_commit, repo_id_problem, revision_problem, tag_problem


@pytest.mark.parametrize(
    "tag", ["v1.0.0", "1.0", "pkg/v1.2", "v1.0.0+build.1", "release-2024", "a@b", "ä", "maintenance"]
)
def test_takes_tags(tag: str) -> None:
    assert tag_problem(tag) is None


@pytest.mark.parametrize(
    "tag",
    [
        *("", "main", "Main", "HEAD", "head", "refs/tags/v1", "deadbeef", "1234567", "f" * 40),
        *("a b", "a..b", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a@{b", "@", "a//b"),
        *("-a", "/a", "a/", "a.", ".a", "a/.b", "a.lock", "a.lock/b", "x" * 201, "a\x7fb", "a\u200bb", "a\tb"),
    ],
)
def test_refuses_tags(tag: str) -> None:
    assert tag_problem(tag)


@pytest.mark.parametrize("revision", ["main", "HEAD", "refs/pr/1", "f" * 40, "abcdef1"])
def test_takes_as_a_revision_what_is_no_tag(revision: str) -> None:
    assert revision_problem(revision) is None
    assert tag_problem(revision)


@given(st.lists(st.sampled_from([*"ab/.-@{~^:?*[\\ \t", ".lock"]), min_size=1, max_size=6).map("".join))
def test_what_we_take_git_takes_too(name: str) -> None:
    if revision_problem(name) is None:
        assert subprocess.run(["git", "check-ref-format", f"refs/tags/{name}"], check=False).returncode == 0


@pytest.mark.parametrize("repo_id", ["a/b", "openai-community/gpt2", "Qwen/Qwen2.5-0.5B", "a_b/c.d-e", "1/2"])
def test_takes_repositories(repo_id: str) -> None:
    assert repo_id_problem(repo_id) is None


@pytest.mark.parametrize(
    "repo_id",
    [
        "",
        "a",
        "a/b/c",
        "/a",
        "a/",
        "a/b--c",
        "a/b..c",
        "a/-b",
        "a/b.",
        "a/b.git",
        "a/b c",
        "a/" + "b" * 95,
        "a/ä",
        "a/b\n",
    ],
)
def test_refuses_repositories(repo_id: str) -> None:
    assert repo_id_problem(repo_id)


def test_a_repository_that_we_take_the_client_takes_too() -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    @given(st.text(alphabet="ab/.-_", min_size=3, max_size=9))
    def check(repo_id: str) -> None:
        if repo_id_problem(repo_id) is None:
            try:
                validate_repo_id(repo_id)
            except HFValidationError as error:
                pytest.fail(str(error))

    check()


def test_a_commit_is_forty_digits() -> None:
    assert is_commit("0" * 40)
    assert not is_commit("0" * 39)
    assert not is_commit("A" * 40)
