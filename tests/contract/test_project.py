"""Rules about the project's own files that no linter knows."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 50

# One letter of each stands in brackets, so that this file does not name what it forbids.
FORBIDDEN = {
    "an image registry": r"docker\.i[o]/|hub\.docke[r]|ghcr\.i[o]|quay\.i[o]|nvcr\.i[o]|mcr\.microsof[t]|gcr\.i[o]",
    "an index of wheels": r"download\.pytorc[h]|pypi\.or[g]|pythonhoste[d]|pypi\.nvidi[a]",
    "a path of one machine": r"(?<![\w.-])/(wor[k]/(main|shared)|tmp/ven[v]|tmp/tea[m]|opt/pyp[i]|opt/wheel[s])",
    "a tool of one workplace": r"\bissues sho[w]\b|\bshared/(tool[s]|knowledg[e]|hook[s])|docker-engin[e]",
}
# The one place that may name the workplace's engine tool: it is how .ci/run gets an engine.
ALLOWED = {(".ci/run", "a tool of one workplace")}


def project_files() -> list[Path]:
    """Return every file that is, or would be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=False,
        capture_output=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_file_names_a_registry_or_a_machine() -> None:
    found = []
    for path in project_files():
        name = path.relative_to(ROOT).as_posix()
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        for what, pattern in FORBIDDEN.items():
            if (name, what) not in ALLOWED and (match := re.search(pattern, text)):
                found.append(f"{name} names {what}: {match[0]!r}")

    assert found == []


@pytest.mark.parametrize(
    "text, what",
    [
        ("FROM ghcr" + ".io/x/y", "an image registry"),
        ("https://download." + "pytorch.org/whl/cpu", "an index of wheels"),
        ("cd /work" + "/main", "a path of one machine"),
        ("../shared" + "/tools/x", "a tool of one workplace"),
    ],
)
def test_forbidden_names_are_found(text: str, what: str) -> None:
    assert re.search(FORBIDDEN[what], text)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function; those of its docstring are free, so that saying more costs nothing."""
    first = function.body[0]
    said = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    free = (first.end_lineno or first.lineno) - first.lineno + 1 if said else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - free


def test_a_function_that_is_too_long_is_found() -> None:
    body = "\n".join(["    x = 1"] * MAX_FUNCTION_LINES)
    function = ast.parse(f'def f():\n    """Say.\n\n    Much.\n    """\n{body}\n').body[0]

    assert isinstance(function, ast.FunctionDef)
    assert code_lines(function) == MAX_FUNCTION_LINES + 1


@pytest.mark.parametrize(
    "path", modules("runner", "tests", "demo", "bench", "tools"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_modules_and_functions_fit_on_a_screen(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    lengths = {node.name: code_lines(node) for node in functions(path)}
    long = {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}

    assert lines <= MAX_MODULE_LINES
    assert long == {}


# Where everything may be caught, and how often: the supervisor, and what runs a library for hostile tokenizers, which
# raises the bare Exception, and panics that are none.
CATCHERS = {
    "runner/supervisor/main.py": 1,
    "runner/judge/sidecars/tokenizer.py": 1,
    "runner/judge/sidecars/words.py": 3,
}


def test_only_the_edges_catch_everything() -> None:
    broad: Counter[str] = Counter()
    for path in modules("runner"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _raises_on(node):
                broad[path.relative_to(ROOT).as_posix()] += 1

    assert broad == CATCHERS


@pytest.mark.parametrize("code", ["except:", "except Exception:", "except (ValueError, BaseException):"])
def test_a_broad_except_is_recognised(code: str) -> None:
    handler = next(
        node for node in ast.walk(ast.parse(f"try:\n    ...\n{code}\n    ...")) if isinstance(node, ast.ExceptHandler)
    )

    assert _is_broad(handler.type)


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "types", "core", "base"}

    assert [path.name for path in modules("runner", "tests", "demo") if path.stem in drawers] == []


def test_only_the_edge_reads_the_environment() -> None:
    readers = [
        path.relative_to(ROOT).as_posix()
        for path in modules("runner")
        if re.search(r"\bos\.(environ|getenv)\b", path.read_text("utf-8"))
    ]

    assert [name for name in readers if name != "runner/supervisor/main.py"] == []


def test_only_github_speaks_workflow_commands() -> None:
    speech = r"""["']::|##\[|GITHUB_(OUTPUT|STATE|STEP_SUMMARY|ENV|PATH)\b"""

    speakers = [path for path in modules("runner") if re.search(speech, path.read_text("utf-8"))]

    assert [path for path in speakers if path != ROOT / "runner" / "supervisor" / "github" / "commands.py"] == []


def test_locks_hold_hashes_and_neither_torch_nor_cuda_nor_an_index() -> None:
    for lock in (ROOT / "requirements.lock", ROOT / "requirements-dev.lock"):
        text = lock.read_text("utf-8")
        pins = re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", text, re.MULTILINE)

        assert pins
        assert [name for name, _ in pins if re.match(r"torch|nvidia|cuda|triton", name)] == []
        assert re.search(r"://|--(extra-)?index|--find-links", text) is None
        for block in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
            assert "--hash=sha256:" in block


def test_both_locks_agree() -> None:
    runtime, dev = (
        dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", (ROOT / name).read_text("utf-8"), re.MULTILINE))
        for name in ("requirements.lock", "requirements-dev.lock")
    )

    assert {
        name: (runtime[name], dev[name]) for name in runtime.keys() & dev.keys() if runtime[name] != dev[name]
    } == {}


def test_the_lock_holds_what_torch_needs_besides_its_own_wheels() -> None:
    locked = set(
        re.findall(r"^([a-z0-9][a-z0-9._-]*)==", (ROOT / "requirements.lock").read_text("utf-8"), re.MULTILINE)
    )
    needed = set()
    for requirement in importlib.metadata.requires("torch") or []:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if "extra ==" not in requirement and not re.match(r"nvidia|cuda|triton", name):
            needed.add(name)

    assert needed
    assert needed - locked == set()


def _raises_on(handler: ast.ExceptHandler) -> bool:
    """Whether it only cleans up: its last statement is a bare `raise`."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def _is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(_is_broad(part) for part in caught.elts)
    return caught is None or (isinstance(caught, ast.Name) and caught.id in ("Exception", "BaseException"))
