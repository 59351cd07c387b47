"""What the documents say is what the files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from runner.protocol.errors import families
from tools import tables

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("demo/**/*.md"), *ROOT.glob("examples/*.md")]
)


@pytest.mark.parametrize("name", tables.FILES)
def test_tables_are_those_of_the_code(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")

    assert tables.wanted(name, text) == text, "run `make fix`"


def test_a_changed_table_is_noticed() -> None:
    text = (ROOT / "docs" / "inputs.md").read_text("utf-8")
    damaged = text.replace("| `adapter-path` |", "| `adapter` |", 1)

    assert damaged != text
    assert tables.render(damaged) == text


@pytest.mark.parametrize("page, names", [("inputs", {"inputs", "outputs"}), ("errors", {"exit-codes", "errors"})])
def test_a_page_has_its_tables(page: str, names: set[str]) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")

    assert {match["name"] for match in tables.BLOCK.finditer(text)} == names


def test_readme_can_be_read_in_five_minutes_and_names_inputs_that_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(
        r"^\| `([a-z-]+)` \|", text[text.index("## The inputs") : text.index("## What is verified")], re.MULTILINE
    )

    assert len(text.split()) <= 1200
    assert len(rows) == 8
    assert set(rows) <= set(tables.read_action()["inputs"])
    assert text.index("make demo") < text.index("make test") < text.index("uses: ")


def test_errors_page_explains_every_class() -> None:
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")

    missing = [family.__name__ for family in families() if f"`{family.__name__}`" not in text]

    assert missing == []


def test_workflows_in_the_documents_use_inputs_that_exist() -> None:
    known = set(tables.read_action()["inputs"])
    used: dict[str, set[str]] = {}
    for document in DOCUMENTS:
        for block in re.findall(r"```yaml\n(.*?)```", document.read_text("utf-8"), re.DOTALL):
            for step in _steps(yaml.safe_load(block)):
                used.setdefault(document.name, set()).update(step.get("with", {}))

    for example in ROOT.glob("examples/*.yml"):
        for step in _steps(yaml.safe_load(example.read_text("utf-8"))):
            used.setdefault(example.name, set()).update(step.get("with", {}))

    assert "README.md" in used
    assert "release.yml" in used
    assert {name: sorted(inputs - known) for name, inputs in used.items() if inputs - known} == {}


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text("utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)} -> {target}")

    assert broken == []


def test_the_index_of_docs_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}

    assert sorted(name for name in pages if f"({name})" not in index) == []


def test_the_tree_has_a_phrase_for_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    tree = text[text.index("## The tree") :]
    rooms = {
        path.name for path in (ROOT / "runner").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }

    missing = sorted(
        name for name in rooms - {"__init__.py"} if not re.search(rf"^  {re.escape(name)}", tree, re.MULTILINE)
    )

    assert missing == []


def _steps(document: object) -> list[dict[str, dict[str, object]]]:
    """Return the steps in a workflow, or in a part of one, that use this action."""
    found: list[dict[str, dict[str, object]]] = []
    if isinstance(document, dict):
        if "lora-merge-action@" in str(document.get("uses", "")):
            found.append(document)
        for value in document.values():
            found.extend(_steps(value))
    elif isinstance(document, list):
        for value in document:
            found.extend(_steps(value))
    return found
