"""Runs of one host take turns on a GPU: real locks and processes; `nvidia-smi` is a script that prints a table."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from runner.protocol.errors import LaunchError, NotEnoughMemory
from runner.protocol.gpu_wish import GpuWish
from runner.worker.gpu.lock import free_bytes, take_turn

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from runner.worker.gpu.lock import take_turn
from runner.protocol.gpu_wish import GpuWish
take_turn(GpuWish(min_free_bytes=0, wait_s=0, locks=Path(sys.argv[1]), holder="octo/other 17 merge"), ["GPU-a"], print)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def wish(tmp_path: Path) -> GpuWish:
    locks = tmp_path / "locks"
    locks.mkdir()
    return GpuWish(min_free_bytes=0, wait_s=0, locks=locks, holder="octo/models 12 merge")


@pytest.fixture
def free_mebibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file from which the stand-in of nvidia-smi tells the free memory."""
    tools, table = tmp_path / "tools", tmp_path / "table"
    tools.mkdir()
    program = tools / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\ncase \"$*\" in *compute-apps*) echo '411, python, 9000 MiB';; *) cat '{table}';; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    table.write_text("GPU-a, 1000\nGPU-b, 5000\n")
    return table


def test_the_gpu_with_the_most_free_memory_is_taken(wish: GpuWish, free_mebibytes: Path) -> None:
    assert free_bytes() == {"GPU-a": 1000 << 20, "GPU-b": 5000 << 20}
    turn = take_turn(wish, ["GPU-a", "GPU-b"], print)

    assert turn.uuid == "GPU-b"
    assert take_turn(wish, ["GPU-a", "GPU-b"], print).uuid == "GPU-a"  # the other is taken
    with pytest.raises(LaunchError, match="used by octo/models 12 merge"):
        take_turn(wish, ["GPU-a", "GPU-b"], print)


def test_too_little_free_memory_is_told_with_who_uses_it(wish: GpuWish, free_mebibytes: Path) -> None:
    with pytest.raises(NotEnoughMemory, match=r"GPU-b: 5\.2 of 6\.0 GB are free \(411, python, 9000 MiB\)"):
        take_turn(replace(wish, min_free_bytes=6 * 10**9), ["GPU-b"], print)


def test_it_waits_until_there_is_enough(wish: GpuWish, free_mebibytes: Path) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        free_mebibytes.write_text("GPU-a, 9000\n")  # somebody has ended meanwhile

    turn = take_turn(replace(wish, min_free_bytes=8 * 10**9, wait_s=20), ["GPU-a"], say)

    assert turn.uuid == "GPU-a"
    assert "Waiting for a GPU" in said[0]
    assert len(said) == 1


def test_unknown_memory_is_not_taken_for_enough(wish: GpuWish, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(NotEnoughMemory, match="not known"):
        take_turn(replace(wish, min_free_bytes=1), ["GPU-a"], print)
    assert take_turn(wish, ["GPU-a"], print).uuid == "GPU-a"  # nothing was asked for


def test_another_process_holds_it_until_it_ends_however_that_is(wish: GpuWish) -> None:
    command = [sys.executable, "-c", HOLD, str(wish.locks)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LaunchError, match="used by octo/other 17 merge"):
            take_turn(wish, ["GPU-a"], print)

        other.kill()
        started = time.monotonic()
        turn = take_turn(replace(wish, wait_s=20), ["GPU-a"], print)

        assert turn.lock is not None
        assert time.monotonic() - started < 10


def test_a_link_in_the_folder_of_the_locks_is_not_followed(wish: GpuWish, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    assert wish.locks is not None
    (wish.locks / "gpu-GPU-a.lock").symlink_to(victim)

    with pytest.raises(OSError, match="symbolic"):
        take_turn(wish, ["GPU-a"], print)
    assert victim.read_text() == "mine"
