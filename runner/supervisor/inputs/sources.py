"""Where input values come from: flags, `INPUT_*` variables, defaults. Raw text in, raw text out.

A flag beats a variable, a variable beats the default, and empty is the same as not given (GitHub sets the
variable of every declared input, empty ones too). A secret is never taken from a flag: every process on the
machine can read the arguments of every other.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from runner.protocol.errors import Problem
from runner.supervisor.inputs.declared import InputSpec
from runner.supervisor.inputs.former import FORMER, former

_OF_THE_RUNNER = ("entrypoint", "args")  # inputs that every container action has
_TOKEN_LIKE = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def collect(
    specs: Sequence[InputSpec], environ: Mapping[str, str], argv: Sequence[str], *, in_github: bool
) -> tuple[dict[str, str], list[Problem]]:
    """Return the value of every input by name ("" for none), and everything that is wrong with how they were given.

    An input whose value is among the problems has no entry.

    Args:
        specs: the inputs that exist.
        environ: the process's environment.
        argv: arguments without the program's name.
        in_github: GitHub's own warning tells about an unknown `INPUT_*` there, so nothing is said of it here.
    """
    by_name = {spec.name: spec for spec in specs}
    flags, problems = _read_flags(argv, by_name)
    problems += _former_variables(environ)
    if not in_github:
        problems += _misspelt_variables(environ, by_name)
    values: dict[str, str] = {}
    for spec in specs:
        given = [flags.get(spec.name, ""), *(environ.get(variable, "") for variable in spec.variables)]
        value = next((text.strip() for text in given if text.strip()), spec.default)
        if problem := _unusable(spec, value):
            problems.append(problem)
        else:
            values[spec.name] = value
    return values, problems


def usage(specs: Sequence[InputSpec]) -> str:
    """Return the text of `--help`."""
    lines = [
        "usage: entrypoint.py --adapter-path ADAPTER --target-repo OWNER/NAME --tag TAG [--NAME VALUE ...]",
        "",
        "Merges an adapter into its base model, verifies the merge and publishes it as a tagged revision.",
        "Every input is a flag or an environment variable INPUT_<NAME>; secrets are variables only.",
        "--check-gpu alone says whether this machine gives the worker a GPU, and what to do if not.",
        "",
    ]
    for spec in specs:
        lines.append(f"  {' or '.join(spec.variables)}" if spec.secret else f"  --{spec.name} VALUE")
        choices = f" One of: {', '.join(spec.choices)}." if spec.choices else ""
        default = f" Default: {spec.default}." if spec.default else ""
        lines.append(f"      {spec.description}{choices}{default}")
    return "\n".join(lines)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that `word` is probably meant to be, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _read_flags(argv: Sequence[str], known: Mapping[str, InputSpec]) -> tuple[dict[str, str], list[Problem]]:
    flags: dict[str, str] = {}
    problems: list[Problem] = []
    pending = list(argv)
    while pending:
        argument = pending.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            problems.append(_not_a_flag(argument))
            continue
        if not equals and pending and not pending[0].startswith("--"):
            value, equals = pending.pop(0), "="
        if name not in known:
            problems.append(_unknown_flag(name, known))
        elif known[name].secret:
            problems.append(_secret_flag(known[name]))
        elif not equals:
            problems.append(
                Problem(
                    what=f"`--{name}` has no value.",
                    why="Every flag takes one; a value that starts with `--` must be joined to it.",
                    fix=f"Write `--{name} VALUE` or `--{name}=VALUE`.",
                )
            )
        elif name in flags:
            problems.append(
                Problem(
                    what=f"`--{name}` is given twice.", why="Only one value can be meant.", fix="Remove one of the two."
                )
            )
        else:
            flags[name] = value
    return flags, problems


def _not_a_flag(argument: str) -> Problem:
    shown = "an argument that holds a token" if _TOKEN_LIKE.search(argument) else repr(argument)
    return Problem(
        what=f"{shown} is not a flag.",
        why="All values are given by name; there are no positional arguments.",
        fix="Write `--NAME VALUE`; `--help` lists the names.",
    )


def _unknown_flag(name: str, known: Mapping[str, InputSpec]) -> Problem:
    shown = "A flag that holds a token" if _TOKEN_LIKE.search(name) else f"`--{name}`"
    match = nearest(name.lower().replace("_", "-"), known)
    if name in FORMER:
        return former(f"`--{name}`", name)
    return Problem(
        what=f"{shown} is not an input.",
        why="A misspelt input would be ignored, and the run would do something else than you asked for.",
        fix=f"Did you mean `--{match}`?" if match else "`--help` lists the inputs.",
    )


def _secret_flag(spec: InputSpec) -> Problem:
    variables = " or ".join(f"`{variable}`" for variable in spec.variables)
    return Problem(
        what=f"`--{spec.name}` is given as a flag.",
        why="Every process on the machine can read the arguments of a program, so the token must be taken as known.",
        fix=f"Revoke that token, and pass a new one in the environment: {variables}.",
    )


def _former_variables(environ: Mapping[str, str]) -> list[Problem]:
    given = {variable: variable[len("INPUT_") :].lower() for variable in sorted(environ) if environ[variable].strip()}
    return [
        former(f"`{variable}`", name)
        for variable, name in given.items()
        if variable.startswith("INPUT_") and name in FORMER
    ]


def _misspelt_variables(environ: Mapping[str, str], known: Mapping[str, InputSpec]) -> list[Problem]:
    # Only names close to an input are spoken of: a desktop has an INPUT_METHOD that is none of our business.
    variables = {spec.variable for spec in known.values()}
    problems = []
    for variable in sorted(environ):
        name = variable[len("INPUT_") :].lower().replace("_", "-")
        if not variable.upper().startswith("INPUT_") or variable in variables or name in _OF_THE_RUNNER:
            continue
        if name in FORMER:
            continue
        if match := difflib.get_close_matches(name, list(known), n=1, cutoff=0.8):
            meant = known[match[0]].variable
            problems.append(
                Problem(
                    what=f"`{variable}` is not an input.",
                    why="The name of the variable is `INPUT_` and the input's name in capitals, with its hyphens.",
                    fix=f"Did you mean `{meant}`? Pass it as `docker run -e '{meant}=…'`, or as a flag.",
                )
            )
    return problems


def _unusable(spec: InputSpec, value: str) -> Problem | None:
    if spec.secret and spec.multiline:
        return None  # a key, which whoever reads it checks
    if spec.secret:
        if all("!" <= character <= "~" for character in value):
            return None
        return Problem(
            what=f"The value of `{spec.name}` is not a token.",
            why="A token is one word of visible ASCII characters; this has a space, a line break or something else.",
            fix="Paste the token into the secret again, without quotes or line breaks.",
        )
    if _TOKEN_LIKE.search(value):
        return Problem(
            what=f"The value of `{spec.name}` holds what looks like a Hugging Face token.",
            why="This value is shown in logs and reports.",
            fix="Revoke that token. Pass the new one as `hf-token`, from a secret.",
        )
    allowed = "\n\t\r" if spec.multiline else ""
    bad = [character for character in value if not character.isprintable() and character not in allowed]
    if not bad:
        return None
    return Problem(
        what=f"The value of `{spec.name}` holds {bad[0]!r}.",
        why="It may hold printable characters only" + (" and line breaks." if spec.multiline else ", in one line."),
        fix=f"Write `{spec.name}` as plain text" + ("." if spec.multiline else ", without tabs and line breaks."),
    )
