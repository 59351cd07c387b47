"""A link in a checked-out folder cannot bring the runner's own files into a release."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.protocol.errors import InputError
from runner.supervisor.inputs.reference import read_reference
from runner.supervisor.inputs.workspace import Workspace


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """Return a runner's folder: a workspace with a base in it, and a secret beside it."""
    base = tmp_path / "workspace" / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (tmp_path / "secret").write_text("a key")
    return tmp_path


def workspace(runner: Path, *, in_github: bool = True) -> Workspace:
    return Workspace(root=runner / "workspace", home=None, is_walled=in_github)


@pytest.mark.parametrize(
    "name, target",
    [("LICENSE", "../../secret"), ("NOTICE", "/etc/passwd"), ("deep/x/NOTICE", "../../../../secret"), ("all", "/")],
)
def test_a_link_out_of_the_workspace_is_refused(runner: Path, name: str, target: str) -> None:
    link = runner / "workspace" / "base" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)

    with pytest.raises(InputError, match="holds the link") as caught:
        read_reference("base-model", "base", workspace(runner))

    assert repr(name) in str(caught.value)


def test_a_chain_of_links_is_followed_to_its_end(runner: Path) -> None:
    (runner / "workspace" / "inside").symlink_to(runner / "secret")
    (runner / "workspace" / "base" / "LICENSE").symlink_to("../inside")

    with pytest.raises(InputError, match="secret"):
        read_reference("base-model", "base", workspace(runner))


def test_links_inside_the_workspace_and_to_nowhere_are_none_of_our_business(runner: Path) -> None:
    (runner / "workspace" / "shared.json").write_text("{}")
    base = runner / "workspace" / "base"
    (base / "tokenizer.json").symlink_to("../shared.json")
    (base / "dangling").symlink_to("nothing")
    (base / "loop").symlink_to("loop")

    assert read_reference("base-model", "base", workspace(runner)).path == base


def test_the_cache_of_the_hubs_client_may_link_to_its_blobs(runner: Path) -> None:
    blobs, snapshot = runner / "cache" / "blobs", runner / "cache" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to(os.path.relpath(blobs / "abc", snapshot))

    assert read_reference("base-model", str(snapshot), workspace(runner)).path == snapshot

    (snapshot / "LICENSE").symlink_to(runner / "secret")
    with pytest.raises(InputError, match="LICENSE"):
        read_reference("base-model", str(snapshot), workspace(runner))


def test_on_a_machine_of_ones_own_links_may_lead_anywhere(runner: Path) -> None:
    (runner / "workspace" / "base" / "LICENSE").symlink_to("../../secret")

    assert read_reference("base-model", "base", workspace(runner, in_github=False)).path is not None
