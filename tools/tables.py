"""Write the tables of docs/ and the report's schema from what they describe.

    python -m tools.tables           rewrite them
    python -m tools.tables --check   say which is out of date, and fail

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`; its sources are action.yml,
runner/protocol/errors.py, every message of runner/ (see `tools.troubleshooting`), tests/records/faults.json (of `python
-m bench.faults`), tests/records/cold-start.json (of `python -m bench.cold_start`) and tests/records/mutants.json (of
`python -m tools.mutants`). docs/report.schema.json is written whole, see `tools.schema`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from bench.cold_start import rows
from bench.faults.report import fault_rows, margin_rows, other_rows, right_rows
from runner.protocol.errors import EXIT_CANCELLED, EXIT_INTERNAL, EXIT_VERDICT_FAILED, RunnerError
from tools.mutants import CLASSES, MODULES, kind_of, results
from tools.mutations import mutants
from tools.schema import render_schema
from tools.troubleshooting import render_messages

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "docs/report.schema.json"
FILES = (
    "docs/inputs.md",
    "docs/errors.md",
    "docs/troubleshooting.md",
    "docs/image.md",
    "docs/verification.md",
    SCHEMA,
)
BLOCK = re.compile(r"(?P<open><!-- table: (?P<name>[a-z-]+) -->\n).*?(?P<close><!-- end table -->)", re.DOTALL)


def main(arguments: list[str]) -> int:
    """Rewrite or check every file; return the exit code."""
    stale = [name for name in FILES if (text := (ROOT / name).read_text("utf-8")) != wanted(name, text)]
    if arguments == ["--check"]:
        for name in stale:
            print(f"{name} is out of date; run `make fix`")
        return 1 if stale else 0
    for name in stale:
        path = ROOT / name
        path.write_text(wanted(name, path.read_text("utf-8")), "utf-8")
        print(f"{name}: rewritten")
    return 0


def wanted(name: str, text: str) -> str:
    """Return what the file `name`, which holds `text` now, is to hold."""
    if name == SCHEMA:
        return render_schema()
    return render(text)


def render(text: str) -> str:
    """Return `text` with every table in it written anew.

    Raises:
        KeyError: a table of a name that nobody makes.
    """
    tables = {
        "inputs": input_table,
        "outputs": output_table,
        "exit-codes": exit_code_table,
        "errors": error_table,
        "messages": render_messages,
        "cold-start": cold_start_table,
        "faults": fault_table,
        "margins": margin_table,
        "right-merges": right_table,
        "others": other_table,
        "mutants": mutant_table,
    }
    return BLOCK.sub(lambda match: match["open"] + tables[match["name"]]() + match["close"], text)


def input_table() -> str:
    """Return the inputs of action.yml as a Markdown table."""
    inputs = read_action()["inputs"]
    rows = (
        (f"`{name}`", "**required**" if spec["required"] else f"`{spec['default']}`" if spec["default"] else "", spec)
        for name, spec in inputs.items()
    )
    return table(("Input", "Default", "What it is"), ((name, default, text_of(spec)) for name, default, spec in rows))


def output_table() -> str:
    """Return the outputs of action.yml as a Markdown table."""
    outputs = read_action()["outputs"]
    return table(("Output", "What it is"), ((f"`{name}`", text_of(spec)) for name, spec in outputs.items()))


def exit_code_table() -> str:
    """Return the exit codes, one row for each family of errors, as a Markdown table."""
    rows = {
        0: "Done: published, already published with the same content, verified, or planned.",
        RunnerError.exit_code: "What fits no other code, such as a folder that cannot be written to.",
        EXIT_VERDICT_FAILED: "The merge was judged, and the verdict did not pass. Nothing was published.",
        EXIT_INTERNAL: "An error that nobody foresaw: our bug. Please open an issue with the log.",
        EXIT_CANCELLED: "Cancelled.",
    }
    for family in RunnerError.__subclasses__():
        rows[family.exit_code] = first_line(family)
    return table(("Code", "Meaning"), ((str(code), rows[code]) for code in sorted(rows)))


def error_table() -> str:
    """Return every error class as a Markdown table, each family followed by its members."""
    return table(
        ("Exit code", "Error", "Meaning"), (row for family in RunnerError.__subclasses__() for row in tree(family))
    )


def fault_table() -> str:
    """Return every kind of wrong merge of the fault suite as a Markdown table."""
    return table(("Wrong merge", "Diagnosis", "Caught", "Named rightly"), fault_rows())


def cold_start_table() -> str:
    """Return size and start of each image that was measured, a Markdown table for each."""
    results: dict[str, dict[str, Any]] = json.loads((ROOT / "tests" / "records" / "cold-start.json").read_bytes())
    return "\n".join(table((f"Image for the {name.upper()}", ""), rows(found)) for name, found in results.items())


def margin_table() -> str:
    """Return the margins on both sides of every limit as a Markdown table."""
    return table(("Criterion", "Worst right merge", "Least wrong one", "Limit"), margin_rows())


def mutant_table() -> str:
    """Return what became of the mutants of each module of the judge as a Markdown table."""
    known = results()
    found = {
        module: [kind_of(known[one.name]) if one.name in known else "not asked" for one in mutants(module)]
        for module in sorted(MODULES)
    }
    kinds = ("killed", *CLASSES, "unexplained", "not asked")
    rows = [
        (name, str(len(all_)), _share(all_.count("killed"), len(all_)), *(str(all_.count(kind)) for kind in kinds[1:]))
        for name, all_ in {
            **{f"`{module}`": all_ for module, all_ in found.items()},
            "all": [kind for all_ in found.values() for kind in all_],
        }.items()
    ]
    return table(("Module", "Mutants", *(kind.capitalize() for kind in kinds)), rows)


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else "0"


def other_table() -> str:
    """Return what is said of merges that others made as a Markdown table."""
    return table(("Made by", "Verdict", "Diagnosis"), other_rows())


def right_table() -> str:
    """Return how right merges were judged as a Markdown table."""
    return table(("Right merges", ""), right_rows())


def tree(family: type[RunnerError]) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of a class and of all below it."""
    yield str(family.exit_code), f"`{family.__name__}`", first_line(family)
    for member in family.__subclasses__():
        yield from tree(member)


def first_line(family: type[RunnerError]) -> str:
    """Return the first line of a class's docstring."""
    return (family.__doc__ or "").strip().partition("\n")[0]


def text_of(spec: dict[str, str]) -> str:
    """Return a description as one table cell."""
    return " ".join(spec["description"].split()).replace("|", "\\|")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def read_action() -> dict[str, dict[str, dict[str, str]]]:
    """Return action.yml."""
    action: dict[str, dict[str, dict[str, str]]] = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    return action


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
