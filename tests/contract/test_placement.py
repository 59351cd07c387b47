"""Where and how a release appears: the inputs about publishing, one by one and against each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.protocol.syntax import endpoint_problem, tag_problem
from runner.supervisor.inputs.placement import Placement, branch_problem
from runner.supervisor.inputs.read import Inputs, parse
from tests.contract.test_inputs import GOOD, TOKEN, only_problem, problems_of, read, variables, workspace

__all__ = ["workspace"]  # the fixture of the other module, used by every test here

IDENTITY = {"ACTIONS_ID_TOKEN_REQUEST_URL": "https://id.example/token", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "secret-word"}


def placed(**values: str) -> Placement:
    return read({name.replace("_", "-"): value for name, value in values.items()}).placement


def parse_as(values: Mapping[str, str], environ: Mapping[str, str]) -> Inputs:
    return parse({**variables({**GOOD, **values}), **environ}, [])


def test_the_defaults_are_one_commit_on_main_of_a_repository() -> None:
    where = placed()
    assert (where.repo_id, where.folder, where.endpoint, where.branch) == ("owner/merged", None, None, "main")
    assert (where.also_tags, where.protected_tags) == ((), ())
    assert not any((where.is_staged, where.create_pr, where.archives_adapter))


def test_every_input_about_it_is_shown_under_its_own_name() -> None:
    values = {
        "target-revision": "next", "also-tags": "latest\nv1", "protected-tags": "v*.*", "staging": "true",
        "archive-adapter": "true",
        "hub-endpoint": "https://hub.example/models",
    }  # fmt: skip
    shown = read(values).public()
    assert {name: str(shown[name]).lower() for name in values} == values


def test_several_tags_are_one_a_line_or_with_commas() -> None:
    assert placed(also_tags="latest, v1\n\nstable\nlatest").also_tags == ("latest", "v1", "stable")


@pytest.mark.parametrize("alias", ["main", "a..b", "deadbeef", "refs/tags/x"])
def test_an_alias_must_be_a_tags_name(alias: str) -> None:
    assert f"{alias!r}, which is not a name for a tag" in only_problem({"also-tags": f"latest, {alias}"})


def test_an_alias_is_neither_the_tag_itself_nor_protected() -> None:
    assert "is the tag of the release" in only_problem({"also-tags": "v1.0.0"})
    assert "`protected-tags` covers" in only_problem({"also-tags": "v1", "protected-tags": "v*"})
    assert placed(also_tags="latest", protected_tags="v*").is_protected("v1.0.0")


@pytest.mark.parametrize("branch", ["refs/heads/x", "staging/v1", "HEAD", "abcdef0", "a b", "-x"])
def test_refuses_what_cannot_be_the_branch_of_a_release(branch: str) -> None:
    assert "`target-revision`" in only_problem({"target-revision": branch})


@pytest.mark.parametrize("other", [{"staging": "true"}, {"target-revision": "next"}])
def test_a_pull_request_is_for_main_and_not_staged(other: dict[str, str]) -> None:
    assert "`create-pr`" in only_problem({"create-pr": "true", **other})


@pytest.mark.parametrize("text", ["dir:///srv/models", "dir:/srv/models"])
def test_a_folder_needs_no_token(text: str) -> None:
    inputs = read({"target-repo": text, "hf-token": ""})
    assert inputs.placement.folder == Path("/srv/models")
    assert inputs.placement.repo_id is None
    assert inputs.public()["target-repo"] == "dir:/srv/models"


def test_a_folder_of_the_workspace(workspace: Path) -> None:
    assert placed(target_repo="dir:models/mine").folder == workspace / "models" / "mine"
    assert read({"target-repo": "dir:models/mine"}).public()["target-repo"] == "dir:models/mine"


@pytest.mark.parametrize("text", ["dir://host/models", "dir:///", "dir://"])
def test_a_folder_has_a_path_and_no_machine(text: str) -> None:
    assert "names no folder" in problems_of({"target-repo": text})[0]


@pytest.mark.parametrize("other", [{"staging": "true"}, {"create-pr": "true"}, {"target-revision": "next"}])
def test_a_folder_has_no_branches(other: dict[str, str]) -> None:
    assert "`target-repo` is a folder" in only_problem({"target-repo": "dir:models", **other})


def test_a_folder_inside_what_it_is_made_from_is_refused(workspace: Path) -> None:
    (workspace / "adapter").mkdir()
    values = {"adapter-path": "adapter", "target-repo": "dir:adapter/out"}
    assert "lies in the folder of `adapter-path`" in only_problem(values)
    assert read({**values, "allow": "same-repo"}).placement.folder == workspace / "adapter" / "out"


def test_the_repository_of_the_adapter_only_when_told_so() -> None:
    assert "allow: same-repo" in only_problem({"target-repo": "owner/adapter"})
    assert placed(target_repo="owner/adapter", allow="same-repo").repo_id == "owner/adapter"


@pytest.mark.parametrize(
    "address",
    ["https://hub.example", "https://hub.example:8443/", "https://hub.example/artifactory/api/hf", "http://localhost:80",
     "http://127.0.0.1:4321", "http://127.3.2.1", "http://[::1]:80"],
)  # fmt: skip
def test_takes_an_address_of_a_hub(address: str) -> None:
    assert placed(hub_endpoint=address).endpoint == address.rstrip("/")


@pytest.mark.parametrize(
    "address",
    ["http://hub.example", "ftp://hub.example", "hub.example", "https://", "https://hub.example?x=1",
     "https://hub.example#x", "http://127.0.0.1.example", "http://localhost.example", "https://[::1",
     "https://hub.example:99999", "https://hub .example"],
)  # fmt: skip
def test_refuses_what_is_no_address_or_sends_the_token_unencrypted(address: str) -> None:
    assert "`hub-endpoint`" in only_problem({"hub-endpoint": address})


def test_a_password_in_an_address_is_refused_and_not_shown() -> None:
    problem = only_problem({"hub-endpoint": "https://user:geheim@hub.example"})
    assert "holds a user or a password" in problem
    assert "geheim" not in problem


def test_the_variable_of_the_client_counts_and_is_checked() -> None:
    assert read(HF_ENDPOINT="https://hub.example").placement.endpoint == "https://hub.example"
    assert "`hub-endpoint`" in only_problem(HF_ENDPOINT="http://hub.example")


def test_a_job_with_an_identity_needs_no_token() -> None:
    inputs = parse_as({"hf-token": ""}, IDENTITY)
    assert (inputs.is_keyless, inputs.hf_token, inputs.base_token) == (True, None, None)
    with_both = parse_as({}, IDENTITY)
    assert (with_both.is_keyless, with_both.hf_token) == (False, TOKEN)
    assert "id-token: write" in only_problem({"hf-token": ""})
    assert "secret-word" not in repr(inputs) + str(inputs.public())


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_judged_without_a_crash(text: str) -> None:
    for problem in (branch_problem, endpoint_problem, tag_problem):
        reason = problem(text)
        assert reason is None or reason
