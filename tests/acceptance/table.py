"""One case of the table of faults, run and judged: the run with the fault, and a rerun without it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.action import (
    TAG,
    Stage,
    a_hub,
    accepted_bytes,
    commits,
    identity,
    large_bytes,
    problems_of,
    tags,
    wrong_in_release,
)
from tests.acceptance.cases import Case, Ends, Protocol

OVERHEAD = 1.02  # a xorb has a footer


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a case.

    Attributes:
        case: the case.
        protocol: how the weights were sent.
        code: exit code of the run with the fault.
        told: what it told the user, one line.
        sent: bytes of weights that the Hub took in both runs, over their size.
        wrong: everything that is not as it must be; empty for a case that holds.
    """

    case: Case
    protocol: Protocol
    code: int
    told: str
    sent: float
    wrong: tuple[str, ...]


def run_case(stage: Stage, case: Case, protocol: Protocol, folder: Path, merged_digest: str) -> Outcome:
    """Run a case in a Hub and folders of its own below `folder`, which is removed afterwards.

    Args:
        stage: what runs share.
        case: the fault.
        protocol: how weights are sent.
        folder: does not exist.
        merged_digest: of the merge, from a run without faults.
    """
    xet = protocol == "Xet"
    folder.mkdir(parents=True)
    with a_hub(folder / "hub", existing=case.existing) as (hub, token):
        before = commits(hub)
        hub.inject(case.rule_for(protocol))
        aliases = ("latest",) if "latest" in case.flags else ()
        staged = "--staging" in case.flags
        with identity(hub, wanted=case.keyless) as environ:
            first = stage.run(hub, token, folder / "first", *case.flags, xet=xet, environ=environ)
        wrong = problems_of(first, [token])
        wrong += _wrong_in_first(case, case.ends_with(protocol), first.code, first.told, tags(hub))
        if not hub.fired():
            wrong.append("the fault did not happen")
        if case.ends_with(protocol) == "released":
            wrong += wrong_in_release(hub, merged_digest, aliases, staged=staged)
        hub.heal()
        again = hub.add_token("alice") if case.new_token else token
        with identity(hub, wanted=case.keyless) as environ:
            second = stage.run(hub, again, folder / "second", *case.flags, xet=xet, environ=environ)
        wrong += problems_of(second, [token, again])
        if second.code:
            wrong.append(f"the rerun ends with {second.code}: {second.told}")
        wrong += wrong_in_release(hub, merged_digest, aliases, staged=staged)
        made = commits(hub) - (before or 1)
        if made != case.commits + case.spare_commit:
            wrong.append(f"{made} commits were made")
        sent = accepted_bytes(hub) / large_bytes(hub) if not wrong else 0.0
    if sent > case.resends.get(protocol, 1.0) * OVERHEAD:
        wrong.append(f"the weights were taken {sent:.2f} times")
    shutil.rmtree(folder)
    return Outcome(
        case=case, protocol=protocol, code=first.code, told=_one_line(first.told), sent=sent, wrong=tuple(wrong)
    )


def _wrong_in_first(case: Case, ends: Ends, code: int, told: str, tagged: dict[str, str]) -> list[str]:
    if ends == "unfinished" and TAG not in tagged:
        return ["there is no tag"]
    if ends == "released":
        return [f"it ends with {code}: {told}"] if code else []
    found = [] if code else ["it ends well, though it cannot"]
    if not re.search(case.says, told):
        found.append(f"it does not say {case.says!r}: {told}")
    if tagged and ends == "refused":
        found.append(f"there is a tag: {tagged}")
    return found


def _one_line(told: str) -> str:
    return " ".join(re.sub(r"\b[0-9a-f]{40}\b", "…", re.sub(r"localhost:\d+", "hub", told)).split())
