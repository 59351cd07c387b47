"""Containers of runs that are over: found by their labels and removed. Doing it twice does nothing the second time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping

from runner.protocol.errors import LaunchError
from runner.supervisor.launch.engine import Engine, translated
from runner.supervisor.launch.identity import has_engine
from runner.supervisor.launch.sibling import SUPERVISOR_LABEL


def run_label(environ: Mapping[str, str]) -> str:
    """Return what names this run, and no other, on the engine: the job of the workflow, else this process."""
    parts = [environ.get(f"GITHUB_{name}", "") for name in ("RUN_ID", "RUN_ATTEMPT", "JOB")]
    return "-".join(parts) if parts[0] else f"local-{os.getpid()}"


def reap(engine: Engine, say: Callable[[str], None]) -> int:
    """Remove every container of ours whose supervisor is gone, whoever's run it was; return how many."""
    removed, again = 0, True
    with contextlib.suppress(LaunchError), translated("remove what earlier runs left"):  # no run fails for another's
        while again:  # what a removed one has started is without a supervisor now
            again = False
            for found in engine.labelled(SUPERVISOR_LABEL):
                supervisor = found["Labels"][SUPERVISOR_LABEL]
                if not engine.is_running(supervisor) and engine.remove(found["Id"]):
                    removed, again = removed + 1, True
                    say(f"Removed the container {found['Id'][:12]}: the run that started it is over.")
    return removed


def remove_run(environ: Mapping[str, str], supervisor: str, say: Callable[[str], None]) -> None:
    """Remove what is left of a step on the engine: its own container if that still runs, and its workers.

    Not by the label of the run: the jobs of a matrix share it, and may share the engine.

    Args:
        environ: of the post step.
        supervisor: id of the step's container; "" where it was in none.
        say: is told what was removed.
    """
    if not has_engine(environ):
        return
    with contextlib.suppress(LaunchError), translated("clean up"):  # no engine any more: nothing is left on it
        engine = Engine.connect(environ)
        if supervisor and engine.is_running(supervisor) and engine.remove(supervisor):
            say(f"Removed the step's own container {supervisor[:12]}, which still ran.")
        reap(engine, say)
