"""What we say, read by the rules of the runner that hears it."""

from __future__ import annotations

import io
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.protocol.errors import Problem, RunnerError
from runner.supervisor.github.commands import MAX_SUMMARY_BYTES, GitHub
from tests.contract.runner_emulator import ROOT, Event, Runner
from tests.contract.runner_grammar import Log, parse_entries

PROBLEM = Problem(what="`tag` is 'a,b:c%'.", why="Because\nof two lines.", fix="Do 100%25.")
# Text made of what commands are made of finds more than text made of all characters.
HOSTILE = st.lists(st.sampled_from([*"::##[]\r\n %=,;\t\u2028\x0b\x85\x1c", "error", "add-mask", "::", "##["])).map(
    "".join
)


def speak(*, active: bool = True) -> tuple[GitHub, io.StringIO]:
    out = io.StringIO()
    return GitHub({"GITHUB_ACTIONS": "true"} if active else {}, out), out


def heard(out: io.StringIO) -> Log:
    log = Log()
    log.read(out.getvalue())
    log.finish()
    return log


@given(HOSTILE)
def test_no_text_becomes_a_command(text: str) -> None:
    github, out = speak()

    github.info(text)

    log = heard(out)
    assert (log.annotations, log.violations, log.secrets, log.depth) == ([], [], set(), 0)
    assert log.raw_lines == log.lines  # nothing was swallowed
    assert "##[" not in out.getvalue()
    assert not any(line.lstrip().startswith("::") for line in out.getvalue().splitlines())


@pytest.mark.parametrize("line", ["::error::x", "  ::add-mask::x", "a ##[error]x", "x\r::error::y", "\x0b::error::y"])
def test_a_command_in_foreign_text_is_shown_as_text(line: str) -> None:
    github, out = speak()

    github.info(line)

    log = heard(out)
    assert "x" in out.getvalue()
    assert (log.annotations, log.secrets) == ([], set())
    assert log.raw_lines == log.lines


@given(HOSTILE, HOSTILE)
def test_annotations_arrive_as_they_were_meant(title: str, text: str) -> None:
    github, out = speak()

    github.warning(f"t{title}", f"x{text}")

    (annotation,) = heard(out).annotations
    assert heard(out).violations == []
    assert annotation.kind == "warning"
    assert annotation.title.split() == f"t{title}".split()


def test_an_error_tells_what_why_and_fix() -> None:
    github, out = speak()

    github.error(PROBLEM)

    (annotation,) = heard(out).annotations
    assert annotation.title == PROBLEM.what
    assert annotation.message == f"{PROBLEM.what}\nWhy: {PROBLEM.why}\nFix: {PROBLEM.fix}"


def test_annotations_keep_the_runners_limits() -> None:
    github, out = speak()

    for number in range(12):
        github.error(Problem(what=f"problem {number} " + "x" * 5000, why="w", fix="f"))

    log = heard(out)
    assert log.violations == []
    assert len(log.annotations) == 10
    assert "problem 11" in log.lines[-3]


def test_groups_fold_and_close_after_an_error() -> None:
    github, out = speak()

    with pytest.raises(KeyError), github.group("merge\n::error::x"):
        raise KeyError

    assert heard(out).violations == []
    assert out.getvalue().splitlines() == ["::group::merge ::error::x", "::endgroup::"]


def test_secrets_are_masked_for_the_runner_and_for_ourselves(tmp_path: Path) -> None:
    summary, output = tmp_path / "summary", tmp_path / "output"
    out = io.StringIO()
    github = GitHub({"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output)}, out)

    github.mask("hf_alphabet")
    github.mask("hf_alphabet_long\nsecond-line")
    github.mask(" ")
    github.info("hf_alphabet_long hf_alphabet second-line")
    github.error(Problem(what="hf_alphabet", why="second-line", fix="f"))
    github.append_summary("hf_alphabet_long")
    github.set_outputs({"tag": "hf_alphabet"})
    with github.group("hf_alphabet"):
        pass

    log = heard(out)
    assert {"hf_alphabet", "hf_alphabet_long", "second-line"} <= log.secrets
    assert log.violations == []
    assert "*** *** ***" in log.raw_lines
    assert "hf_alphabet" not in "".join(log.raw_lines) + summary.read_text() + output.read_text()


def test_secrets_are_hidden_outside_github_too() -> None:
    github, out = speak(active=False)

    github.mask("hf_alphabet")
    github.info("token hf_alphabet")

    assert out.getvalue() == "token ***\n"


@given(
    st.dictionaries(
        st.text(alphabet=string.ascii_lowercase, min_size=1, max_size=3),
        st.lists(st.sampled_from([*"a=\n\r<>", "<<", "ghadelimiter_", "\u2028", "é"])).map("".join),
    )
)
def test_outputs_arrive_unchanged(tmp_path_factory: pytest.TempPathFactory, outputs: dict[str, str]) -> None:
    file = tmp_path_factory.mktemp("out") / "output"
    github = GitHub({"GITHUB_ACTIONS": "true", "GITHUB_OUTPUT": str(file)}, io.StringIO())

    github.set_outputs(outputs)

    text = file.read_bytes().decode() if file.exists() else ""
    assert parse_entries(text) == outputs


def test_state_goes_to_its_own_file(tmp_path: Path) -> None:
    github = GitHub({"GITHUB_ACTIONS": "true", "GITHUB_STATE": str(tmp_path / "state")}, io.StringIO())

    github.save_state({"worker": "abc"})

    assert parse_entries((tmp_path / "state").read_text()) == {"worker": "abc"}


@pytest.mark.parametrize("name", ["", "a b", "a=b", "a<<b", "a\nb", "1a"])
def test_refuses_a_name_that_no_output_can_have(name: str, tmp_path: Path) -> None:
    github = GitHub({"GITHUB_ACTIONS": "true", "GITHUB_OUTPUT": str(tmp_path / "output")}, io.StringIO())

    with pytest.raises(ValueError, match="entry"):
        github.set_outputs({name: "x"})


def test_tells_when_the_runners_file_cannot_be_written(tmp_path: Path) -> None:
    github = GitHub({"GITHUB_ACTIONS": "true", "GITHUB_OUTPUT": str(tmp_path / "no" / "output")}, io.StringIO())

    with pytest.raises(RunnerError, match="cannot be written"):
        github.set_outputs({"tag": "x"})


def test_a_summary_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / ("x" * 300)
    github = GitHub({"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(file)}, io.StringIO())

    with pytest.raises(RunnerError, match="cannot be written"):
        github.append_summary("text")


def test_a_summary_stays_below_the_limit_and_closes_what_it_opened(tmp_path: Path) -> None:
    file = tmp_path / "summary"
    github = GitHub({"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(file)}, io.StringIO())

    github.append_summary("# first")
    github.append_summary("<details><summary>x</summary>\n\n<pre>\n" + "äöü line\n" * 200_000 + "</pre>\n</details>")
    size = file.stat().st_size
    github.append_summary("more\n" * 5_000)

    text = file.read_text()
    assert text.startswith("# first\n")
    assert text.count("<details>") == text.count("</details>")
    assert text.count("<pre>") == text.count("</pre>")
    assert "was cut here" in text
    assert MAX_SUMMARY_BYTES - 8192 < size <= MAX_SUMMARY_BYTES
    assert file.stat().st_size <= MAX_SUMMARY_BYTES


def test_outside_github_there_are_only_plain_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    github = GitHub({"GITHUB_OUTPUT": str(tmp_path / "o"), "GITHUB_STEP_SUMMARY": str(tmp_path / "s")}, out)

    with github.group("merge"):
        github.info("a line")
    github.error(PROBLEM)
    github.warning("title", "text")
    github.set_outputs({"tag": "v1"})
    github.append_summary("# no")
    github.save_state({"a": "b"})

    assert "::" not in out.getvalue()
    assert "tag: v1" in out.getvalue()
    assert "Fix: Do 100%25." in out.getvalue()
    assert list(tmp_path.iterdir()) == []


LIBRARY = """
import logging, os, sys, warnings
sys.path.insert(0, {root!r})
from runner.supervisor.github.commands import GitHub
github = GitHub(os.environ, sys.stdout)
github.mask(os.environ["INPUT_HF-TOKEN"])
with github.relayed_stderr():
    warnings.warn("the card says\\n::error::x ##[error]y " + os.environ["INPUT_HF-TOKEN"])
    logging.getLogger("a.library").error("::warning::z")
    sys.stderr.write("no line break")
    kept = sys.stderr
kept.write("late\\n")
"""


def test_what_libraries_write_to_stderr_is_text(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LIBRARY.format(root=str(ROOT)))

    result = Runner(tmp_path).run({"adapter-path": "x", "hf-token": "hf_alphabet"}, Event.dispatch(), program=program)

    assert result.annotations == ()
    for text in ("| ::error::x ## [error]y ***", "| ::warning::z", "no line break", "late"):
        assert text in result.log.splitlines()


def test_text_that_is_not_unicode_does_no_harm() -> None:
    github, out = speak()

    github.info("a\udcffb")

    assert out.getvalue().encode()
