"""A local Hub with people and tokens, and a merged folder that is ready to be published."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from runner.protocol.errors import RunnerError
from tests.hub.server import LocalHub
from tests.hub.state import Limits
from tests.supervisor.publish.world import PATIENCE, World, make_folder


@pytest.fixture(autouse=True)
def _lfs_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use the LFS protocol, and a cache that no other test has seen."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    limits = Limits(multipart_threshold_bytes=2 << 20, part_size_bytes=1 << 20)
    with LocalHub.start(tmp_path / "hub", limits=limits) as hub:
        hub.add_user("alice")
        hub.add_user("mallory")
        hub.add_org("acme", members={"alice": "write", "mallory": "read"})
        yield hub
        huggingface_hub.close_session()  # the server waits for open connections
    for thread in threading.enumerate():
        if thread.name == "early-upload":  # it would use, and close, the client of the next test
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def world(hub: LocalHub, tmp_path: Path) -> World:
    return World(hub=hub, token=hub.add_token("alice"), folder=make_folder(tmp_path / "merged"), patience=PATIENCE)


@pytest.fixture(autouse=True)
def _no_token_in_any_error(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Watch every error that a test sees: its text, and the traceback that a log would show, hold no token."""
    seen: list[RunnerError] = []
    init = RunnerError.__init__

    def watch(self: RunnerError, what: str, *, why: str, fix: str) -> None:
        seen.append(self)
        init(self, what, why=why, fix=fix)

    monkeypatch.setattr(RunnerError, "__init__", watch)
    yield
    for error in seen:
        shown = str(error) + repr(error) + "".join(traceback.format_exception(error))
        assert "hf_" not in shown.replace("hf_hub", "").replace("hf_raise", "")
        assert "X-Amz" not in shown
        assert "signature" not in shown.lower()
