"""The live display by itself: where it is opened, and what it leaves on the terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from runner.protocol.events import Progress
from runner.supervisor.console.progress import Showing
from runner.supervisor.console.screen import LiveScreen, open_screen
from runner.supervisor.github.commands import GitHub


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "out, environ, is_opened",
    [
        (Tty(), {"TERM": "xterm"}, True),
        (Tty(), {"TERM": "dumb"}, False),
        (Tty(), {"TERM": "xterm", "GITHUB_ACTIONS": "true"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
        (io.StringIO(), {"TERM": "xterm", "FORCE_COLOR": "1"}, False),  # colours in a log are no cursor
    ],
)
def test_a_display_is_opened_only_where_somebody_looks(
    out: io.StringIO, environ: dict[str, str], is_opened: bool
) -> None:
    assert (open_screen(out, environ) is not None) is is_opened


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_bars_fit_on_one_line_each_and_the_log_stays_whole(width: int) -> None:
    out = Tty()
    screen = LiveScreen(Console(file=out, width=width, height=30, force_terminal=True, color_system=None))
    github = GitHub({}, screen)
    with Showing(github, screen) as showing:
        showing.begin("download")
        showing.advance(Progress(phase="download", done=3e9, total=7e9, doing="an-owner/a-model-with-a-long-name"))
        github.info("x" * 300 + " [red]not markup[/red]")
        showing.begin("verify")
        showing.advance(Progress(phase="verify", done=0.5, total=1.0, doing="end to end"))
        screen.refresh()
        shown = out.getvalue()[out.getvalue().rindex("Download") - 2 :]

    assert [len(line.rstrip()) <= width for line in shown.splitlines()] == [True, True]
    assert "✓ Download" in shown
    assert "50 %" in shown
    assert "x" * 300 + " [red]not markup[/red]\n" in out.getvalue()
    assert "✗ Verify" in out.getvalue()  # left by nobody's `end`
    assert "\x1b[?25h" in out.getvalue()[out.getvalue().rindex("✗ Verify") :]
