"""The emulator is a checker, so it is shown to fail: each program here does one thing that GitHub would punish."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.contract.runner_emulator import RUNTIME_TOKEN, ContractViolation, Event, Runner, RunResult
from tests.contract.runner_grammar import InvalidFile, Log, parse_entries

TOKEN = "hf_localtokenlocaltoken"


def run_program(tmp_path: Path, code: str, **inputs: str) -> RunResult:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "def put(name, text):\n"
        "    open(os.environ['GITHUB_' + name], 'a').write(text)\n" + textwrap.dedent(code)
    )
    given = {"adapter-path": "adapter", "hf-token": TOKEN, **inputs}
    return Runner(tmp_path).run(given, Event.release("v1.0.0"), program=program)


FAULTS = {
    "an output line without =": ("put('OUTPUT', 'tag\\n')", "invalid format"),
    "an output without a name": ("put('OUTPUT', '=v1\\n')", "invalid format"),
    "a heredoc that is not closed": ("put('OUTPUT', 'tag<<E\\nv1\\n')", "delimiter not found"),
    "a heredoc whose last line has no break": ("put('OUTPUT', 'tag<<E\\nv1')", "line break"),
    "a heredoc without a delimiter": ("put('OUTPUT', 'tag<<\\nv1\\n')", "must not be empty"),
    "a state line without =": ("put('STATE', 'x\\n')", "GITHUB_STATE"),
    "an output that action.yml lacks": ("put('OUTPUT', 'tga=v1\\n')", "no output 'tga'"),
    "a value that smuggles an output in": ("put('OUTPUT', 'tag=v1\\nevil=1\\n')", "no output 'evil'"),
    "a secret in an output": ("put('OUTPUT', 'repo-url=https://x/' + os.environ['INPUT_HF-TOKEN'] + '\\n')", "skipped"),
    "a secret in the log": ("print('using', os.environ['INPUT_HF-TOKEN'])", "a secret is in the log"),
    "the runtime token in the log": ("print(os.environ['ACTIONS_RUNTIME_TOKEN'])", "a secret is in the log"),
    "a secret in the summary": ("put('STEP_SUMMARY', os.environ['INPUT_HF-TOKEN'])", "a secret is in the summary"),
    "a summary above 1 MiB": ("put('STEP_SUMMARY', 'x' * (1 << 20) + 'x')", "1 MiB"),
    "a write to GITHUB_ENV": ("put('ENV', 'LD_PRELOAD=/x\\n')", "GITHUB_ENV was written"),
    "a deprecated command": ("print('::set-output name=tag::v1')", "deprecated"),
    "a disabled command in the old form": ("print('the model says ##[set-env name=A]b')", "deprecated"),
    "a title that is not escaped": ("print('::error title=a,b=c::text')", "properties"),
    "a mask of nothing": ("print('::add-mask::')", "add-mask of nothing"),
    "a group that stays open": ("print('::group::merge')", "not closed"),
    "an end without a group": ("print('::endgroup::')", "without a group"),
    "commands that stay stopped": ("print('::stop-commands::abc')", "never resumed"),
    "a message above 4096 characters": ("print('::error::' + 'x' * 5000)", "4096"),
    "eleven errors": ("[print('::error::x') for _ in range(11)]", "more than 10"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refuses(tmp_path: Path, fault: str) -> None:
    code, message = FAULTS[fault]

    with pytest.raises(ContractViolation, match=message):
        run_program(tmp_path, code)


def test_refuses_an_input_that_action_yml_lacks(tmp_path: Path) -> None:
    with pytest.raises(ContractViolation, match="no input 'adapter_path'"):
        run_program(tmp_path, "", adapter_path="x")


def test_reads_outputs_state_summary_and_commands(tmp_path: Path) -> None:
    result = run_program(
        tmp_path,
        """
        put('OUTPUT', 'tag=v1=2\\n\\nrepo-url<<E\\na=b\\n<<\\nE\\n')
        put('STATE', 'id<<E\\nE\\n')
        put('STEP_SUMMARY', '# done')
        print('::add-mask::s3cret')
        print('  ::error title=a%2Cb%3A%25::one%0Atwo s3cret')
        print('a\\r##[warning]old form\\r\\nlast s3cret')
        print('::unknown::stays text')
        sys.exit(8)
        """,
    )

    assert result.exit_code == 8
    assert result.outputs == {"tag": "v1=2", "repo-url": "a=b\n<<"}
    assert result.state == {"id": ""}
    assert result.summary == "# done"
    assert [(one.kind, one.title, one.message) for one in result.annotations] == [
        ("error", "a,b:%", "one\ntwo ***"),
        ("warning", "", "old form"),
    ]
    assert "last ***" in result.log
    assert "::unknown::stays text" in result.log


def test_commands_are_text_while_they_are_stopped() -> None:
    log = Log()

    log.read("::stop-commands::t0k3n\n::error::no\n##[error]no\n::T0K3N::\n::error::yes\n")
    log.finish()

    assert [one.message for one in log.annotations] == ["yes"]
    assert log.violations == []


def test_hides_the_forms_that_a_secret_takes() -> None:
    log = Log(secrets={'pass"word+1'})

    log.read('pass"word+1 pass\\"word+1 pass%22word%2B1 cGFzcyJ3b3JkKzE=\n')

    assert log.lines == ["*** *** *** ***="]


def test_the_last_of_two_entries_wins_and_a_carriage_return_is_kept() -> None:
    assert parse_entries("a=1\na=2\nb=x\r\n") == {"a": "2", "b": "x\r"}


def test_a_delimiter_must_be_the_whole_line() -> None:
    with pytest.raises(InvalidFile):
        parse_entries("a<<E\nvalue\n E\nE \n")


def test_gives_the_variables_of_the_runner(tmp_path: Path) -> None:
    result = run_program(
        tmp_path,
        """
        import json
        names = ['INPUT_ADAPTER-PATH', 'INPUT_MODE', 'INPUT_TAG', 'GITHUB_REF_NAME', 'GITHUB_REF_TYPE', 'CI']
        print(json.dumps([os.environ[name] for name in names]))
        print(os.getcwd() == os.environ['GITHUB_WORKSPACE'], 'GITHUB_TOKEN' in os.environ, sys.stdin.read() == '')
        """,
    )

    assert '["adapter", "publish", "", "v1.0.0", "tag", "true"]' in result.log
    assert "True False True" in result.log
    assert RUNTIME_TOKEN not in result.log


def test_cancels_as_the_runner_does(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('cancelled'), sys.exit(130)))\n"
        "print('working', flush=True)\n"
        "time.sleep(60)\n"
    )

    result = Runner(tmp_path).run({"adapter-path": "x"}, Event.dispatch(), program=program, cancel_when="working")

    assert result.exit_code == 130
    assert "cancelled" in result.log
