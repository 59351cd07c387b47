from __future__ import annotations

from pathlib import Path

import pytest

from runner.supervisor.inputs.read import RepoRef
from tests.contract.test_inputs import only_problem, read


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "workspace"
    root.mkdir()
    monkeypatch.chdir(root)
    return root


def test_a_reference_is_a_folder_if_it_looks_like_one_or_is_one(workspace: Path) -> None:
    (workspace / "out" / "adapter").mkdir(parents=True)

    assert read({"adapter-path": "out/adapter"}).adapters[0] == RepoRef(path=workspace / "out/adapter")
    assert read({"adapter-path": "./out/adapter"}).adapters[0].path == workspace / "out/adapter"
    assert read({"adapter-path": str(workspace / "out")}).adapters[0].path == workspace / "out"
    assert (
        read({"adapter-path": "~/adapter"}, HOME=str(workspace / "out")).adapters[0].path == workspace / "out/adapter"
    )
    assert read({"adapter-path": "out/other"}).adapters[0] == RepoRef(repo_id="out/other")
    assert read({"adapter-path": "out/other@v1/x"}).adapters[0] == RepoRef(repo_id="out/other", revision="v1/x")
    assert read({"adapter-path": "out/other@v1/x"}).adapters[0].display == "out/other@v1/x"


@pytest.mark.parametrize("value", ["./missing", "/missing/folder", "~/missing", "../missing"])
def test_refuses_a_folder_that_is_missing(value: str, tmp_path: Path) -> None:
    problem = only_problem({"adapter-path": value}, HOME=str(tmp_path))

    assert "`adapter-path`" in problem
    assert "missing" in problem


def test_refuses_a_file_in_place_of_a_folder(workspace: Path) -> None:
    (workspace / "adapter_model.safetensors").touch()

    assert "is a file" in only_problem({"adapter-path": "adapter_model.safetensors"})
    assert "is a file" in only_problem({"work-dir": "adapter_model.safetensors"})


@pytest.mark.parametrize(
    "value",
    ["gpt2", "a/b/c", "a/", "/", "a//b", "a/b--c", "a/..b", "a/b.git", "-a/b", "a/" + "b" * 95, "a b/c", "ä/b", "a/b@"],
)
def test_refuses_what_is_neither_folder_nor_repository(value: str) -> None:
    if value == "/":
        assert read({"base-model": value}).base == RepoRef(path=Path("/"))
    elif value == "a/b@":
        assert "revision" in only_problem({"base-model": value})
    else:
        assert "neither a folder nor a repository" in only_problem({"base-model": value})


def test_refuses_a_path_that_cannot_be_followed(workspace: Path) -> None:
    (workspace / "loop").symlink_to("loop")

    assert "cannot be followed" in only_problem({"adapter-path": "./" + "x" * 300})
    assert "`adapter-path`" in only_problem({"adapter-path": "./loop"})
    assert "another user" in only_problem({"adapter-path": "~root/x"})


@pytest.mark.parametrize(
    "name", ["adapter-path", "base-model", "work-dir", "report-dir", "cache-dir", "verify-prompts"]
)
@pytest.mark.parametrize("value", ["../outside", "link", "{workspace}/../outside", "./link"])
def test_in_a_workflow_no_path_leads_out_of_the_workspace(workspace: Path, name: str, value: str) -> None:
    outside = workspace.parent / "outside"
    outside.mkdir()
    (outside / "prompts.txt").write_text("secret")
    (workspace / "link").symlink_to(outside)
    text = value.format(workspace=workspace) + ("/prompts.txt" if name == "verify-prompts" else "")

    problem = only_problem({name: text}, GITHUB_ACTIONS="true", GITHUB_WORKSPACE=str(workspace))

    assert "out of the workspace" in problem
    assert read({name: text})  # on one's own machine any path may be named


def test_in_a_workflow_other_mounts_may_be_named(workspace: Path) -> None:
    cache = workspace.parent / "runner_temp"
    inputs = read({"cache-dir": str(cache)}, GITHUB_ACTIONS="true", GITHUB_WORKSPACE=str(workspace))

    assert inputs.cache_dir == cache
    assert inputs.public()["cache-dir"] == str(cache)
    assert inputs.public()["report-dir"] == "lora-merge-report"
