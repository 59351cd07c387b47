from __future__ import annotations

from pathlib import Path

import pytest

from runner.protocol.errors import InputError
from runner.supervisor.inputs.prompts import MAX_FILE_BYTES, MAX_PROMPT_CHARS, MAX_PROMPTS, read_prompts
from runner.supervisor.inputs.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(root=tmp_path.resolve(), home=None, is_walled=False)


def refusal(text: str, workspace: Workspace) -> str:
    with pytest.raises(InputError) as caught:
        read_prompts("verify-prompts", text, workspace)
    return str(caught.value)


def test_typed_lines_are_prompts(workspace: Workspace) -> None:
    assert read_prompts("verify-prompts", "  What is it?\n\n~ why\n", workspace) == ("What is it?", "~ why")
    assert read_prompts("verify-prompts", "~ why?", workspace) == ("~ why?",)
    assert read_prompts("verify-prompts", "\n", workspace) == ()
    assert read_prompts("verify-prompts", "x" * 300, workspace) == ("x" * 300,)


def test_one_line_may_name_a_text_file(workspace: Workspace) -> None:
    (workspace.root / "mine.txt").write_bytes("\ufeffeins\r\n\nzwei\u2028drei\n".encode())
    (workspace.root / "README").write_text("four\n")

    assert read_prompts("verify-prompts", "mine.txt", workspace) == ("eins", "zwei\u2028drei")
    assert read_prompts("verify-prompts", "README", workspace) == ("four",)


def test_json_lines_hold_prompts_and_chats(workspace: Workspace) -> None:
    (workspace.root / "p.jsonl").write_text(
        '{"prompt": " a\\nb ", "id": 1}\n\n{"messages": [{"role": "user", "content": "hé", "x": 1}], "id": 2}\n'
    )

    assert read_prompts("verify-prompts", "./p.jsonl", workspace) == (
        "a\nb",
        '{"messages":[{"role":"user","content":"hé"}]}',
    )


@pytest.mark.parametrize(
    "line",
    [
        *("", "[]", "{}", "{", "NaN", "[" * 100_000),
        *('{"prompt": 1}', '{"prompt": " "}', '{"messages": []}', '{"messages": ["x"]}'),
        *('{"messages": [{"role": "root", "content": "x"}]}', '{"messages": [{"role": "user"}]}'),
    ],
)
def test_refuses_json_lines_without_a_prompt(workspace: Workspace, line: str) -> None:
    (workspace.root / "p.jsonl").write_text(f'{{"prompt": "good"}}\n{line or "x"}\n')

    assert "line 2 of 'p.jsonl'" in refusal("p.jsonl", workspace)


def test_refuses_files_that_cannot_be_prompts(workspace: Workspace) -> None:
    (workspace.root / "large.txt").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    (workspace.root / "latin.txt").write_bytes(b"\xfc\n")
    (workspace.root / "empty.txt").write_text("\n \n")
    (workspace.root / "folder.txt").mkdir()

    assert "does not exist" in refusal("missing.txt", workspace)
    assert "does not exist" in refusal("./missing", workspace)
    assert "does not exist" in refusal("folder.txt", workspace)
    assert "larger than" in refusal("large.txt", workspace)
    assert "not UTF-8" in refusal("latin.txt", workspace)
    assert "no prompt" in refusal("empty.txt", workspace)
    assert "cannot be read" in refusal("/proc/self/mem", workspace)
    assert "`HOME` is not set" in refusal("~/prompts.txt", workspace)


def test_refuses_too_many_and_too_long(workspace: Workspace) -> None:
    assert f"{MAX_PROMPTS + 1} prompts" in refusal("x\n" * (MAX_PROMPTS + 1), workspace)
    assert "number 2" in refusal("x\n" + "y" * (MAX_PROMPT_CHARS + 1), workspace)
