"""What a person sees who runs the action on a terminal: a live display, the log above it, and a sane terminal after."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Literal

import pytest

from tests.contract.runner_emulator import ROOT, Runner
from tests.e2e.terminal import CTRL_C, Terminal
from tests.hub.faults import FOREVER, Kind
from tests.hub.server import LocalHub

Start = Callable[..., Terminal]


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def start(request: pytest.FixtureRequest, runner: Runner, hub: LocalHub) -> Start:
    """Return what starts the action on a terminal, as a process or by `docker run -it`."""
    how: Literal["process", "docker"] = request.param
    image = request.getfixturevalue("image") if how == "docker" else ""

    def begin(*flags: str, **more: str) -> Terminal:
        given = hub.env() | more
        if how == "process":
            command = [sys.executable, str(ROOT / "entrypoint.py")]
        else:
            command = ["docker", "run", "--rm", "-it", "--network", "host"]
            command += ["-v", f"{runner.workspace}:/github/workspace"]
            command += [part for name in given for part in ("-e", name)] + [image]
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "DOCKER_HOST") if name in os.environ}
        return Terminal([*command, *flags, "--device", "cpu"], {**kept, **given}, runner.workspace)

    return begin


def test_a_terminal_shows_each_phase_live_and_keeps_the_log(start: Start) -> None:
    with start("--adapter-path", "adapter", "--base-model", "base", "--mode", "plan") as terminal:
        terminal.finish()

        assert terminal.code == 0, terminal.text
        assert terminal.hid_cursor
        assert terminal.is_sane
    for phase in ("Preflight", "Download", "Worker", "Plan"):
        assert f"✓ {phase}" in terminal.text
    assert "✗" not in terminal.text
    lines = terminal.text.splitlines()
    assert "Adapter: a local folder, LORA, 8 tensors." in lines  # above the bars, and whole
    assert "verified: skipped" in lines
    assert "::" not in terminal.text
    assert "Plan …" not in terminal.text


def test_ctrl_c_in_the_middle_leaves_a_sane_terminal(start: Start, hub: LocalHub, runner: Runner) -> None:
    hub.add_model("alice/base", runner.workspace / "base")
    hub.fail("resolve", Kind.SLOW, delay_s=60, times=FOREVER, where="safetensors")  # its thread cannot be interrupted
    with start(
        "--adapter-path", "adapter", "--base-model", "alice/base", "--mode", "verify", "--merged-path", "base"
    ) as terminal:
        terminal.read_until("Download")

        terminal.press(CTRL_C)
        terminal.finish(timeout_s=20)

        hub.heal()
        assert terminal.code == 130, terminal.text
        assert terminal.hid_cursor
        assert terminal.is_sane
    assert "✗ Download" in terminal.text
    assert "✓ Download" not in terminal.text
    assert "error: The run was cancelled in the phase `download`." in terminal.text.splitlines()


def test_a_terminal_without_a_cursor_gets_plain_lines(start: Start) -> None:
    with start("--adapter-path", "missing", "--mode", "plan", TERM="dumb") as terminal:
        terminal.finish()

    assert terminal.code == 2, terminal.text
    assert "\x1b" not in terminal.said
