"""Process 1: reads the inputs, checks everything, starts the worker, publishes, and tells what happened.

It alone holds tokens and talks to GitHub. Whatever happens, it ends with a report, outputs, and one of the exit
codes of `runner.errors`; this is the one place that catches everything.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from runner.errors import EXIT_CANCELLED, EXIT_INTERNAL, EXIT_VERDICT_FAILED, Problem, RunnerError
from runner.event import read_event
from runner.github import GitHub
from runner.inputs import given_secrets, parse, usage, wants_help
from runner.record import Record
from runner.story import Story
from runner.work import work_folder


class Cancelled(BaseException):
    """The runner, the user or the machine asked this process to stop."""


def main(environ: Mapping[str, str], argv: Sequence[str]) -> int:
    """Run the action and return its exit code.

    Args:
        environ: the process's environment.
        argv: arguments without the program's name.
    """
    if wants_help(argv):
        print(usage())
        return 0
    github = GitHub(environ, sys.stdout)
    for secret in given_secrets(environ):
        github.mask(secret)
    record = Record()
    with _signals():
        try:
            with github.relayed_stderr():  # what libraries print may quote a server, and must not be a command
                code = _run(environ, argv, github, record)
        except RunnerError as error:
            record.problems = error.problems
            code = error.exit_code
        except (Cancelled, KeyboardInterrupt):
            record.problems = (_cancelled(record),)
            code = EXIT_CANCELLED
        except Exception:  # noqa: BLE001  (the edge: whatever nobody foresaw ends here, named as our fault)
            record.problems = (_unforeseen(github),)
            code = EXIT_INTERNAL
    return _tell(github, record, code)


def _run(environ: Mapping[str, str], argv: Sequence[str], github: GitHub, record: Record) -> int:
    event = read_event(environ)
    inputs = parse(environ, argv, event_tag=event.tag, event_problems=event.problems)
    for secret in inputs.secrets:
        github.mask(secret)
    record.inputs = inputs
    temporary = Path(environ.get("RUNNER_TEMP") or tempfile.gettempdir())
    with work_folder(inputs.work_dir, temporary, github.info) as work:
        os.environ.setdefault("HF_HOME", str(work.path / "hf"))  # huggingface_hub reads it when it is imported
        Story(inputs=inputs, environ=environ, github=github, record=record, work=work).run()
    failed = record.verdict is not None and not record.verdict.passed and record.release is None
    return EXIT_VERDICT_FAILED if failed else 0


def _tell(github: GitHub, record: Record, code: int) -> int:
    for problem in record.problems:
        github.error(problem)
    report = record.report()
    try:
        outputs = report.outputs()
        if record.inputs is not None:
            outputs["report-path"] = record.inputs.workspace.show(report.write(record.inputs.report_dir))
        github.append_summary(report.to_markdown())
        github.set_outputs(outputs)
    except RunnerError as error:
        github.error(error.problem)
        return code or error.exit_code
    return code


@contextmanager
def _signals() -> Iterator[None]:
    def stop(number: int, _frame: FrameType | None) -> None:
        for again in (signal.SIGINT, signal.SIGTERM):  # a second one must not interrupt the clean-up
            signal.signal(again, signal.SIG_IGN)
        raise Cancelled(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cancelled(record: Record) -> Problem:
    return Problem(
        what=f"The run was cancelled in the phase `{record.phase}`.",
        why="The process got SIGINT or SIGTERM: a cancelled job, a timeout, or Ctrl-C.",
        fix="Run again: what is on the Hub already is found and not written twice. " + record.standing(),
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
