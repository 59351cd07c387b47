"""The action's post step: removes what a step that was killed has left. It never fails the job.

GitHub runs it in a new container of the same image after the step, cancelled or not. Where the step ended in order,
there is nothing to do; doing it twice is the same as doing it once.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from runner.protocol.errors import RunnerError
from runner.supervisor.github.commands import GitHub
from runner.supervisor.launch.leftovers import remove_run
from runner.supervisor.work import PREFIX


def main(environ: Mapping[str, str]) -> int:
    """Clean up after the step whose state is in `environ`, and return 0."""
    github = GitHub(environ, sys.stdout)
    try:
        remove_run(environ, environ.get("STATE_container", ""), github.info)
        _remove_folder(environ, github)
    except (RunnerError, OSError) as error:
        github.warning("Clean-up after the merge", f"Something may be left on this runner: {error}")
    return 0


def _remove_folder(environ: Mapping[str, str], github: GitHub) -> None:
    """Remove the run's temporary folder; one below `work-dir` stays, because the next run goes on from it."""
    folder = Path(environ.get("STATE_work") or "/")
    temporary = Path(environ.get("RUNNER_TEMP") or tempfile.gettempdir())
    if folder.parent == temporary and folder.name.startswith(PREFIX) and folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
        github.info(f"Removed {folder.name}, which the step had left.")
