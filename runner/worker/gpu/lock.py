"""Whose turn it is on a GPU: the free memory, as the driver's own program tells it, and a lock beside the cache.

Two runs on one host that share `cache-dir` never take one GPU at a time, whatever containers they are in: the lock is
the kernel's (flock), and gone with the process that holds it, however that ends. No torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.protocol.errors import LaunchError, NotEnoughMemory, RunnerError
from runner.protocol.gpu_wish import GpuWish

ASK_EVERY_S = 2.0
TELL_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A GPU that this process may use until it ends.

    Attributes:
        uuid: of the GPU.
        lock: descriptor that holds it; None without a folder for locks.
    """

    uuid: str
    lock: int | None


def take_turn(wish: GpuWish, uuids: Sequence[str], say: Callable[[str], None]) -> Turn:
    """Wait for one of the GPUs, take it, and return it: the one with the most free memory.

    Args:
        wish: what has to be free, and how long to wait.
        uuids: the GPUs that torch can use.
        say: is told each minute what is waited for.

    Raises:
        NotEnoughMemory: no GPU has enough free memory after that time.
        LaunchError: other runs hold all of them after that time, or the driver's program does not answer.
    """
    started = time.monotonic()
    told = -TELL_EVERY_S
    while True:
        free = free_bytes() if wish.min_free_bytes or len(uuids) > 1 else {}
        turn, obstacles = _try_each(wish, uuids, free)
        if turn is not None:
            return turn
        waited = time.monotonic() - started
        if waited >= wish.wait_s:
            raise _in_vain(obstacles, waited)
        if waited - told >= TELL_EVERY_S:
            told = waited
            say(f"Waiting for a GPU, {waited:.0f} of {wish.wait_s:.0f} s: {'; '.join(obstacles)}.")
        time.sleep(min(ASK_EVERY_S, wish.wait_s - waited))


def free_bytes() -> dict[str, int]:
    """Return the free memory of every GPU by its UUID; empty where nvidia-smi is not there or says nothing of use."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"],  # noqa: S607
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {uuid: int(mebibytes) << 20 for uuid, mebibytes in re.findall(r"^(\S+), (\d+)$", done.stdout, re.MULTILINE)}


def _try_each(wish: GpuWish, uuids: Sequence[str], free: dict[str, int]) -> tuple[Turn | None, list[str]]:
    obstacles = []
    for uuid in sorted(uuids, key=lambda uuid: -free.get(uuid, 0)):
        room = free.get(uuid)
        if wish.min_free_bytes and room is None:
            obstacles.append(f"{uuid}: its free memory is not known, because nvidia-smi does not tell it")
        elif room is not None and room < wish.min_free_bytes:
            obstacles.append(f"{uuid}: {room / 1e9:.1f} of {wish.min_free_bytes / 1e9:.1f} GB are free{_users(uuid)}")
        elif wish.locks is None:
            return Turn(uuid=uuid, lock=None), []
        else:
            lock, holder = _lock(wish.locks / f"gpu-{_safe(uuid)}.lock", wish.holder)
            if lock is not None:
                return Turn(uuid=uuid, lock=lock), []
            obstacles.append(f"{uuid}: used by {holder}")
    return None, obstacles


def _lock(path: Path, holder: str) -> tuple[int | None, str]:
    """Return a descriptor that holds `path`, or None and who holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        known = os.pread(descriptor, 4096, 0).decode("utf-8", "replace")
        os.close(descriptor)
        return None, _holder(known)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"holder": holder, "since_unix_s": int(time.time())}).encode(), 0)
    return descriptor, ""


def _holder(text: str) -> str:
    try:
        noted = json.loads(text)
        return f"{noted['holder']}, since {int(time.time() - noted['since_unix_s'])} s"
    except (ValueError, KeyError, TypeError):
        return "another run"


def _users(uuid: str) -> str:
    """Return who uses the GPU, in brackets, as far as the driver tells it; processes of other containers are hidden."""
    query = "--query-compute-apps=pid,process_name,used_memory"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={uuid}", query, "--format=csv,noheader"],  # noqa: S607
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()] if not done.returncode else []
    return f" ({'; '.join(lines[:3])})" if lines else ""


def _safe(uuid: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "_", uuid) or "unknown"


def _in_vain(obstacles: Sequence[str], waited_s: float) -> RunnerError:
    what = f"No GPU became free in {waited_s:.0f} s: {'; '.join(obstacles)}."
    fix = "Let the run wait longer (`gpu-wait-timeout`), ask for less (`min-free-vram`), or set `device: cpu`."
    if any("used by" in obstacle for obstacle in obstacles):
        return LaunchError(what, why="Runs that share `cache-dir` take turns on a GPU.", fix=fix)
    return NotEnoughMemory(what, why="`min-free-vram` asks for more than is free; others use the GPU.", fix=fix)
