"""`--check-gpu`: whether this runner gives the worker a GPU, and if not, why and what to do. Nothing is merged."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from runner.protocol.errors import LaunchError, RunnerError
from runner.supervisor.github.commands import GitHub
from runner.supervisor.inputs.gpus import Gpus
from runner.supervisor.launch import Wish, launch


def check_gpu(environ: Mapping[str, str], github: GitHub) -> int:
    """Start a worker as a run with `device: cuda` would, tell what it sees, and return the exit code."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            _check(environ, github, Path(folder))
    except RunnerError as error:
        for problem in error.problems:
            github.error(problem)
        return error.exit_code
    return 0


def _check(environ: Mapping[str, str], github: GitHub, folder: Path) -> None:
    wish = Wish(
        executor="auto",
        device="cuda",
        gpus=Gpus(),
        environ=environ,
        work=folder,
        lock=None,
        reads=(),
        writes=(),
        owner=(os.geteuid(), os.getegid()),
    )
    with launch(wish, log=github.info, say=github.info) as worker:
        ready = worker.wait_until_ready()
    problem = ready.cuda_problem
    if problem is not None:
        raise LaunchError(f"There is no GPU to compute on: {problem.what}.", why=problem.why, fix=problem.fix)
    for name, version in ready.versions.items():
        github.info(f"{name}: {version}")
    github.info("A run with `device: cuda` finds this GPU.")
