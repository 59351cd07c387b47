"""A token that may do more than the run needs is told, in one sentence that says what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from runner.supervisor.hub.rights import wider_than_needed

REPO = "alice/model"


def who(role: str, *scoped: tuple[str, str, list[str]], everywhere: tuple[str, ...] = ()) -> Mapping[str, Any]:
    scopes = [{"entity": {"type": kind, "name": name}, "permissions": rights} for kind, name, rights in scoped]
    token = {"role": role, "fineGrained": {"global": list(everywhere), "scoped": scopes}}
    return {"name": "alice", "auth": {"type": "access_token", "accessToken": token}}


WRITE = ["repo.content.read", "repo.write"]


@pytest.mark.parametrize(
    "answer, exists",
    [
        (who("fineGrained", ("model", REPO, WRITE)), True),
        (who("fineGrained", ("user", "alice", WRITE)), False),
        (who("fineGrained", ("model", REPO, WRITE), ("model", "them/base", ["repo.content.read"])), True),
        (who("fineGrained", everywhere=("discussion.read",)), True),
        (who("read"), True),
        ({}, True),
        ({"auth": {"accessToken": {"role": "fineGrained"}}}, True),
        ({"auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [1, {"entity": 2}]}}}}, True),
    ],
)
def test_a_token_for_the_one_repository_is_not_spoken_of(answer: Mapping[str, Any], exists: bool) -> None:
    assert wider_than_needed(answer, REPO, exists=exists) == ()


@pytest.mark.parametrize(
    "answer, says",
    [
        (who("write"), "everything that alice may write to"),
        (who("fineGrained", ("user", "alice", WRITE)), "repo.write on user alice"),
        (who("fineGrained", ("model", REPO, WRITE), ("org", "acme", WRITE)), "repo.write on org acme"),
        (who("fineGrained", ("model", REPO, WRITE), ("model", "alice/other", WRITE)), "on model alice/other"),
        (who("fineGrained", everywhere=("discussion.write",)), "discussion.write everywhere"),
        (who("fineGrained", *(("model", f"alice/{number}", WRITE) for number in range(9))), "and 6 more"),
        (who("fineGrained", ("model", "a\n::error::hf_secretsecretsecret", WRITE)), "***"),
    ],
)
def test_what_a_token_may_do_beyond_is_named(answer: Mapping[str, Any], says: str) -> None:
    (note,) = wider_than_needed(answer, REPO, exists=True)
    assert says in note
    assert "is enough" in note
    assert "\n" not in note
