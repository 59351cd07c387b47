"""The process that reads pickled weights: on its own, with nothing that is secret, and only as long as it takes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from runner.protocol.errors import LaunchError, NotEnoughMemory, rebuild
from runner.protocol.events import Failed, decode
from runner.supervisor.launch.environment import worker_environment
from runner.supervisor.launch.inline import ROOT


def unpickle(source: Path, target: Path, weights: str, *, environ: Mapping[str, str], home: Path) -> None:
    """Write the pickled weights in `source` to `target` as safetensors, in a process of its own.

    Args:
        source: the folder.
        target: the folder to make.
        weights: the file that holds them, or their index.
        environ: the supervisor's; only harmless variables are passed on.
        home: a folder for caches.

    Raises:
        CheckpointError: a pickle is damaged, or holds more than tensors.
        NotEnoughMemory, LaunchError: the process died.
    """
    done = subprocess.run(
        [sys.executable, "-m", "runner.worker.unpickle", str(source), str(target), weights],
        cwd=ROOT,
        env=worker_environment(environ, home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if not done.returncode:
        return
    failed = decode(done.stdout) if done.stdout.strip() else None
    if isinstance(failed, Failed):
        raise rebuild(failed.family, failed.problem)
    if done.returncode == -signal.SIGKILL:
        raise NotEnoughMemory(
            "The process that converts pickled weights was killed (SIGKILL).",
            why="Files that torch before 1.6 wrote cannot be mapped, and are held in memory as a whole.",
            fix="Give the job more memory, or use a revision with safetensors.",
        )
    raise LaunchError(
        f"The process that converts pickled weights died (exit code {done.returncode}).",
        why=f"Its last words: {next(reversed(done.stderr.strip().splitlines()), 'nothing')[:300]}",
        fix="If this is not about your machine, report it with the log.",
    )
