"""Process 1: reads the inputs, checks everything, starts the worker, publishes, and tells what happened.

It alone holds tokens and talks to GitHub. Whatever happens, it ends with a report, outputs, and one of the exit
codes of `runner.protocol.errors`; this is the one place that catches everything.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.protocol.errors import (
    EXIT_CANCELLED,
    EXIT_INTERNAL,
    EXIT_VERDICT_FAILED,
    PhaseTimeout,
    Problem,
    RunnerError,
    disk_full,
)
from runner.supervisor.check_gpu import check_gpu
from runner.supervisor.console.progress import Showing
from runner.supervisor.github.commands import GitHub
from runner.supervisor.github.event import read_event
from runner.supervisor.inputs.read import Inputs, given_secrets, parse, usage, wants_help
from runner.supervisor.launch import has_engine, is_mounted, own_ids
from runner.supervisor.owner import give_back
from runner.supervisor.report.record import Record
from runner.supervisor.run import Story
from runner.supervisor.stop import PhaseTimedOut, Stopped, Stops
from runner.supervisor.work import work_folder

if TYPE_CHECKING:
    from runner.supervisor.console.screen import LiveScreen
    from runner.supervisor.launch.again import Again

END_S = 7.0  # for the second container to end, which has its own clock


def main(environ: Mapping[str, str], argv: Sequence[str]) -> int:
    """Run the action and return its exit code.

    Args:
        environ: the process's environment.
        argv: arguments without the program's name.
    """
    if wants_help(argv):
        print(usage())
        return 0
    screen = _screen(environ)
    github = GitHub(environ, screen or sys.stdout)
    if "--check-gpu" in argv:
        return check_gpu(environ, github)
    for secret in given_secrets(environ):
        github.mask(secret)
    record = Record()
    showing = Showing(github, screen)

    def tell_stopped(stopped: Stopped) -> int:
        if record.is_elsewhere:
            return EXIT_CANCELLED
        showing.close()  # the main thread may be stuck in a phase
        error = _timed_out(record) if isinstance(stopped, PhaseTimedOut) else None
        record.problems = (error.problem,) if error else (_cancelled(record),)
        return _tell(github, record, error.exit_code if error else EXIT_CANCELLED)

    with Stops(tell_stopped) as stops:
        try:
            # What libraries print may quote a server, and must not be a command.
            with showing, github.relayed_stderr():
                code = _run(environ, argv, github, record, stops, showing)
            if record.is_elsewhere:
                return code
        except (Stopped, Exception) as error:  # noqa: BLE001  (the edge: whatever nobody foresaw ends here)
            # What goes wrong while a stopped run is left does not change why it ends.
            stopped = stops.stopped
            if stopped is not None:
                told = stops.tell_once(stopped)
                if told is None:  # the other thread does, and ends this process
                    threading.Event().wait()
                return told or 0
            code = _note(error, github, record)
    return _tell(github, record, code)


def _note(error: BaseException, github: GitHub, record: Record) -> int:
    """Note in the record why the run ended, and return the exit code."""
    known = disk_full(error) if isinstance(error, OSError) else error
    if isinstance(known, RunnerError):
        record.problems = known.problems
        return known.exit_code
    record.problems = (_unforeseen(github),)
    return EXIT_INTERNAL


def _screen(environ: Mapping[str, str]) -> LiveScreen | None:
    """Return a live display where a person looks at a terminal, else None."""
    if not sys.stdout.isatty():
        return None
    from runner.supervisor.console.screen import open_screen  # rich takes a moment, for those who see it

    return open_screen(sys.stdout, environ)


def _run(
    environ: Mapping[str, str], argv: Sequence[str], github: GitHub, record: Record, stops: Stops, showing: Showing
) -> int:
    event = read_event(environ)
    inputs = parse(environ, argv, event_tag=event.tag, event_problems=event.problems)
    for secret in inputs.secrets:
        github.mask(secret)
    record.inputs = inputs
    again = _start_again(environ, inputs, github)
    if again is not None:
        stops.unwind_s = END_S
        stops.at_once(again.interrupt)
        record.is_elsewhere = True
        return again.relay()
    stops.limit_phases(inputs.machine.phase_timeout_s)
    temporary = Path(environ.get("RUNNER_TEMP") or tempfile.gettempdir())
    try:
        with work_folder(inputs.work_dir, temporary, github.info) as work:
            os.environ.update(library_settings(inputs, work.path, os.environ))  # read when huggingface_hub is imported
            if work.lock is None:  # one below `work-dir` stays for the next run
                stops.at_last(lambda: shutil.rmtree(work.path, ignore_errors=True))
            github.save_state({"container": next(iter(own_ids()), ""), "work": str(work.path)})
            Story(
                inputs=inputs, environ=environ, github=github, record=record, work=work, stops=stops, showing=showing
            ).run()
    finally:
        for folder, is_ours in ((inputs.cache_dir, True), (inputs.work_dir, False)):
            if folder is not None:
                give_back(folder, inputs.workspace.root, whole=is_ours)
    failed = record.verdict is not None and not record.verdict.passed and record.release is None
    return EXIT_VERDICT_FAILED if failed else 0


def _start_again(environ: Mapping[str, str], inputs: Inputs, github: GitHub) -> Again | None:
    """Return the container that can reach `cache-dir`, where this one cannot; None to go on here."""
    if inputs.cache_dir is None or not own_ids() or inputs.cache_dir.is_relative_to(inputs.workspace.root):
        return None
    if inputs.machine.executor != "inline" and has_engine(environ):
        from runner.supervisor.launch.again import start_again  # the Docker SDK takes a moment, for those who need it

        return start_again(environ, inputs.cache_dir, github.info)
    if not is_mounted(inputs.cache_dir):
        github.warning(
            "`cache-dir` keeps nothing",
            f"{inputs.cache_dir} lies in this container, and is gone with it. A folder of the host needs the Docker "
            "socket and `executor: auto`, or `docker run -v`.",
        )
    return None


def library_settings(inputs: Inputs, work: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that huggingface_hub is to find: its address, and where it keeps what it knows."""
    settings = {"HF_HOME": environ.get("HF_HOME") or str(work / "hf")}
    if inputs.placement.endpoint is not None:
        settings["HF_ENDPOINT"] = inputs.placement.endpoint
    if inputs.cache_dir is not None:  # what was sent over Xet, so that a rerun need not send it again
        settings["HF_XET_CACHE"] = environ.get("HF_XET_CACHE") or str(inputs.cache_dir / "xet")
    return settings


def _tell(github: GitHub, record: Record, code: int) -> int:
    for problem in record.problems:
        github.error(problem)
    report = record.report()
    outputs = report.outputs()
    failures = []

    def try_to(do: Callable[[], None]) -> None:  # one that fails (a full disk) must not take the others with it
        try:
            do()
        except RunnerError as error:
            github.error(error.problem)
            failures.append(error.exit_code)

    def write_report() -> None:
        outputs["report-path"] = ""
        if record.inputs is not None:
            outputs["report-path"] = record.inputs.workspace.show(report.write(record.inputs.report_dir, github.redact))

    try_to(write_report)
    try_to(lambda: github.append_summary(report.to_markdown()))
    try_to(lambda: github.set_outputs(outputs))
    return code or next(iter(failures), 0)


def _cancelled(record: Record) -> Problem:
    return Problem(
        what=f"The run was cancelled in the phase `{record.phase}`.",
        why="The process got SIGINT or SIGTERM: a cancelled job, a timeout, or Ctrl-C.",
        fix="Run again: what is on the Hub already is found and not written twice. " + record.standing(),
    )


def _timed_out(record: Record) -> PhaseTimeout:
    limit_s = (record.inputs.machine.phase_timeout_s if record.inputs else None) or 0
    return PhaseTimeout(
        f"The phase `{record.phase}` took longer than {limit_s / 60:g} minutes.",
        why="`phase-timeout-minutes` ends a phase that hangs, so that there is time left to clean up.",
        fix="If the phase needs more time, set `phase-timeout-minutes` higher; the log says how far it was. "
        + record.standing(),
    )


def _unforeseen(github: GitHub) -> Problem:
    with github.group("Traceback"):
        github.info(traceback.format_exc())
    kind = sys.exc_info()[0]
    return Problem(
        what=f"An error that nobody foresaw: {kind.__name__ if kind else 'unknown'}.",
        why="This is a bug of lora-merge-action, not of your inputs.",
        fix="Please report it with the traceback in the log.",
    )
