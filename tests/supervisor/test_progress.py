"""Where a run is: groups in a workflow, one line now and then in a log, whether there is news or not."""

from __future__ import annotations

import io
import threading
import time

import pytest

from runner.protocol.errors import Problem
from runner.protocol.events import Progress
from runner.supervisor.console.progress import Pace, Showing, span
from runner.supervisor.github.commands import GitHub
from tests.contract.runner_grammar import Log

WORKFLOW = {"GITHUB_ACTIONS": "true"}


def event(done: float, total: float = 1e9, doing: str = "") -> Progress:
    return Progress(phase="merge", done=done, total=total, doing=doing)


def wait_for(out: io.StringIO, text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in out.getvalue():
        assert time.monotonic() < deadline, out.getvalue()
        time.sleep(0.01)


def heard(out: io.StringIO) -> Log:
    log = Log(secrets=set())
    log.read(out.getvalue())
    log.finish()
    return log


@pytest.mark.parametrize(
    "last, elapsed_s, line",
    [
        (None, 31.0, "31 s so far"),
        (event(0), 3.0, "3 s so far"),
        (event(0, doing="waiting"), 3.0, "3 s so far (waiting)"),
        (event(2.5e8), 10.0, "25 % of 1000 MB, 25 MB/s, about 30 s left"),
        (event(2.5e8, doing="uploading"), 1000.0, "25 % of 1000 MB, 0 MB/s, about 50 min left (uploading)"),
        (event(0.5, total=1.0, doing="storage"), 8.0, "50 %, about 8 s left (storage)"),
        (event(2e9), 10.0, "100 % of 1000 MB, 200 MB/s, about 0 s left"),
    ],
)
def test_a_line_says_share_rate_and_rest(last: Progress | None, elapsed_s: float, line: str) -> None:
    pace = Pace(100.0)
    if last is not None:
        pace.take(last, 100.0 + elapsed_s)

    assert pace.line(100.0 + elapsed_s) == line


def test_what_is_counted_anew_has_a_rate_of_its_own() -> None:
    pace = Pace(0.0)
    pace.take(event(1e9), 100.0)
    pace.take(event(1e8, total=2e9, doing="checking"), 100.0)
    assert pace.line(100.0) == "5 % of 2000 MB (checking)"

    pace.take(event(1.1e9, total=2e9, doing="checking"), 110.0)

    assert pace.line(110.0) == "55 % of 2000 MB, 100 MB/s, about 9 s left (checking)"


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (99.4, "99 s"), (125, "2 min"), (5900, "98 min"), (6000, "1 h 40 min")]
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_plain_log_names_each_phase_and_goes_on_without_news() -> None:
    out = io.StringIO()

    with Showing(GitHub({}, out), every_s=0.05) as showing:
        showing.begin("merge")
        showing.advance(event(5e8))
        wait_for(out, "merge: 50 %")
        showing.begin("verify")
        wait_for(out, "verify: 0 s so far\nverify: 0 s so far")
        showing.end()
        said = out.getvalue()
        time.sleep(0.2)  # between the phases nothing runs

    assert out.getvalue() == said
    assert said.startswith("Merge …\nmerge: 50 %")
    assert "\r" not in said


def test_a_quick_phase_says_nothing_more() -> None:
    out = io.StringIO()

    with Showing(GitHub({}, out)) as showing:
        for phase in ("plan", "merge"):
            showing.begin(phase)
            showing.advance(event(1e9))

    assert out.getvalue() == "Plan …\nMerge …\n"


def test_a_workflow_folds_each_phase_and_closes_the_last_whatever_happens() -> None:
    out = io.StringIO()

    def run() -> None:
        with Showing(GitHub(WORKFLOW, out)) as showing:
            showing.begin("plan")
            showing.begin("merge")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        run()

    assert out.getvalue() == "::group::Plan\n::endgroup::\n::group::Merge\n::endgroup::\n"
    assert heard(out).violations == []


def test_a_phase_that_is_stuck_can_be_closed_by_another_thread_and_nothing_opens_after_it() -> None:
    out = io.StringIO()
    github = GitHub(WORKFLOW, out)
    with Showing(github, every_s=0.05) as showing:
        showing.begin("download")
        other = threading.Thread(target=showing.close)
        other.start()
        other.join(5)
        github.error(Problem(what="Cancelled.", why="w", fix="f"))
        showing.begin("plan")  # a library that swallows the exception of a signal
        showing.advance(event(1))
        time.sleep(0.2)

    assert out.getvalue().startswith("::group::Download\n::endgroup::\n::error ")
    assert len(out.getvalue().splitlines()) == 3


def test_an_annotation_is_never_folded_away() -> None:
    out = io.StringIO()
    github = GitHub(WORKFLOW, out)
    with Showing(github) as showing:
        showing.begin("verify")
        for _ in range(12):  # those above the runner's limit are lines
            github.warning("The disk", "It is nearly full.")
        github.info("inside")

    depth = 0
    for line in out.getvalue().splitlines():
        depth += {"::group": 1, "::endgr": -1}.get(line[:7], 0)
        assert depth == (1 if line == "inside" or line.startswith("::group::") else 0), line
    assert "::group::Verify (continued)\ninside\n::endgroup::" in out.getvalue()
    assert "(continued) (continued)" not in out.getvalue()
    assert heard(out).violations == []
