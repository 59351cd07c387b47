"""The table of faults: what the Hub does at which step of a publish, and how the run has to end.

Every case is run over LFS and over Xet. Steps that the two protocols do differently have the same name here: `ask`
(the LFS batch; a Xet token), `send` (PUT; a xorb), `confirm` (verification; a shard).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tests.hub.faults import FOREVER, Kind, Rule

Protocol = Literal["LFS", "Xet"]
Ends = Literal["released", "refused", "unfinished"]
PROTOCOLS: tuple[Protocol, ...] = ("LFS", "Xet")

# A step's endpoint in each protocol; all other steps are named as their endpoint.
STEPS: Mapping[str, Mapping[Protocol, str]] = {
    "ask": {"LFS": "lfs-batch", "Xet": "xet-write-token"},
    "send": {"LFS": "lfs-put", "Xet": "xet-put"},
    "confirm": {"LFS": "lfs-verify", "Xet": "xet-shard"},
    "part": {"LFS": "lfs-part", "Xet": "xet-chunk"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One fault.

    Attributes:
        step: where; a key of `STEPS`, or an endpoint of the Hub.
        fault: what happens, for people.
        rule: without its endpoint.
        ends: `released` (the run itself survives the fault), `refused` (an error, and no tag) or `unfinished` (the
            release is whole; an error says what comes after it and is missing).
        says: must be in what is told of a refusal.
        existing: whether the target is there before.
        new_token: whether the rerun needs another token.
        flags: more inputs of both runs.
        keyless: whether the job has an identity instead of a token.
        commits: that both runs make together.
        spare_commit: whether a commit that must not be used stays on the branch.
        resends: how often the weights may be taken by the Hub in both runs together.
        why: of anything that is not the rule: no tag, one commit, every byte once.
        only: of these protocols.
    """

    step: str
    fault: str
    rule: Rule
    ends: Ends | Mapping[Protocol, Ends]
    says: str = ""
    existing: bool = False
    new_token: bool = False
    flags: tuple[str, ...] = ()
    keyless: bool = False
    commits: int = 1
    spare_commit: bool = False
    resends: Mapping[Protocol, float] = field(default_factory=dict)
    why: str = ""
    only: tuple[Protocol, ...] = PROTOCOLS

    @property
    def name(self) -> str:
        """Step and fault."""
        return f"{self.step}: {self.fault}"

    def ends_with(self, protocol: Protocol) -> Ends:
        """Return how the run with the fault has to end."""
        return self.ends if isinstance(self.ends, str) else self.ends[protocol]

    def rule_for(self, protocol: Protocol) -> Rule:
        """Return the rule with its endpoint."""
        return replace(self.rule, endpoint=STEPS.get(self.step, {}).get(protocol, self.step))


def _case(step: str, fault: str, ends: Ends | Mapping[Protocol, Ends], says: str = "", **more: Any) -> Case:
    of_case = {name for name in Case.__dataclass_fields__ if name in more}
    rule = Rule(endpoint=step, **{"kind": Kind.STATUS, **{name: more[name] for name in more if name not in of_case}})
    return Case(step=step, fault=fault, ends=ends, says=says, rule=rule, **{name: more[name] for name in of_case})


def _status(step: str, status: int, ends: Ends | Mapping[Protocol, Ends], says: str = "", **more: Any) -> Case:
    fault = f"{status}" if more.get("times") == FOREVER else f"{status} once"
    if status == 429:
        fault += ", with Retry-After"
    return _case(step, fault, ends, says, status=status, **more)


_KEPT: Mapping[Protocol, Ends] = {"LFS": "released", "Xet": "refused"}
_LOST = "over Xet, bytes that no shard has named cannot be found again, so the next run sends them again"
_STORED = f"over LFS the bytes are there already, and the next attempt needs no verification; {_LOST}"

CASES: tuple[Case, ...] = (
    _status("whoami", 401, "refused", "not accepted", times=FOREVER),
    _status("whoami", 403, "refused", "403", times=FOREVER),
    _status("whoami", 429, "released"),
    _status("whoami", 500, "refused", "500", times=FOREVER),
    _status("whoami", 503, "released"),
    _case("whoami", "silent once", "released", kind=Kind.SILENT),
    _case("whoami", "reset before the request is read", "released", kind=Kind.RESET_BEFORE),
    _case("whoami", "the token expires", "refused", "not accepted", kind=Kind.EXPIRED, new_token=True),
    _status("info", 502, "released", existing=True),
    _status("auth-check-write", 401, "refused", "not accepted", times=FOREVER, existing=True),
    _status("auth-check-write", 403, "refused", "403", times=FOREVER, existing=True),
    _status("auth-check-write", 404, "released", times=FOREVER, existing=True),
    _status("auth-check-write", 503, "released", existing=True),
    _status("refs", 403, "refused", "403", times=FOREVER, existing=True),
    _status("refs", 500, "released", existing=True),
    _case("refs", "stale once", "refused", "older than its last write", kind=Kind.STALE, nth=2, existing=True),
    _status("create-repo", 403, "refused", "403", times=FOREVER),
    _status("create-repo", 429, "released"),
    _case("create-repo", "made, then 500", "released", kind=Kind.APPLIED_STATUS, status=500),
    _case("create-repo", "made, the answer is lost", "released", kind=Kind.APPLIED_RESET),
    _case("create-repo", "reset before the body", "released", kind=Kind.RESET_BEFORE),
    _status("validate-yaml", 400, "refused", "", times=FOREVER),
    _status("validate-yaml", 503, "released"),
    _status("preupload", 413, "refused", "413", times=FOREVER),
    _status("preupload", 503, "released"),
    _case("preupload", "the token expires", "refused", "not accepted", kind=Kind.EXPIRED, new_token=True),
    _status("ask", 401, "refused", "not accepted", times=FOREVER),
    _status("ask", 403, "refused", "403", times=FOREVER),
    _status("ask", 404, "refused", "404", times=FOREVER),
    _status("ask", 429, "released"),
    _status("ask", 500, "released"),
    _case("ask", "silent once", "released", kind=Kind.SILENT),
    _case("ask", "the token expires", "refused", "not accepted", kind=Kind.EXPIRED, new_token=True),
    _status("part", 500, "released"),
    _case("part", "reset in the body", "released", kind=Kind.RESET_IN, after_bytes=100_000),
    _status("send", 403, "refused", "403", times=FOREVER),
    _status("send", 413, "refused", "413", times=FOREVER),
    _status("send", 500, "released"),
    _status("send", 503, "released"),
    _case("send", "slow", "released", kind=Kind.SLOW, delay_s=1.0),
    _case("send", "silent once", "released", kind=Kind.SILENT),
    _case("send", "reset before the body", "released", kind=Kind.RESET_BEFORE),
    _case("send", "reset in the body", "released", kind=Kind.RESET_IN, after_bytes=300_000),
    _case("send", "reset after the body", "released", kind=Kind.RESET_AFTER),
    _case("send", "taken, the answer is lost", "released", kind=Kind.APPLIED_RESET),
    _case("send", "the signed address, or the storage's token, expires", "released", kind=Kind.EXPIRED),
    _status("confirm", 403, _KEPT, "403", times=FOREVER, resends={"Xet": 2.0}, why=_STORED),
    _status("confirm", 500, "released"),
    _case("confirm", "done, the answer is lost", "released", kind=Kind.APPLIED_RESET),
    _case("confirm", "the storage is full", "refused", "storage", kind=Kind.QUOTA, times=FOREVER,
          resends={"Xet": 2.0}, why=_LOST),
    _status("commit", 401, "refused", "not accepted", times=FOREVER),
    _status("commit", 403, "refused", "403", times=FOREVER),
    _status("commit", 409, "released"),
    _status("commit", 412, "released"),
    _status("commit", 413, "refused", "413", times=FOREVER),
    _status("commit", 429, "released"),
    _status("commit", 500, "refused", "500", times=FOREVER),
    _status("commit", 502, "released"),
    _case("commit", "made, then 500", "released", kind=Kind.APPLIED_STATUS, status=500),
    _case("commit", "made, the answer is lost", "released", kind=Kind.APPLIED_RESET),
    _case("commit", "made, the answer breaks off", "released", kind=Kind.RESET_ANSWER),
    _case("commit", "made, after the client has given up", "released", kind=Kind.SLOW, delay_s=3.4),
    _case("commit", "silent once", "released", kind=Kind.SILENT),
    _case("commit", "reset in the body", "released", kind=Kind.RESET_IN, after_bytes=500),
    _case("commit", "reset after the body", "released", kind=Kind.RESET_AFTER),
    _case("commit", "the storage is full", "refused", "storage", kind=Kind.QUOTA, times=FOREVER),
    _case("commit", "the token expires", "refused", "not accepted", kind=Kind.EXPIRED, new_token=True),
    _case("commit", "weights are stored wrong", "refused", "does not hold what was sent", kind=Kind.DAMAGED,
          file="model-00001-of-00002.safetensors", spare_commit=True,
          why="the wrong commit stays in the history of the branch, untagged"),
    _case("commit", "a small file is stored wrong", "refused", "does not hold what was sent", kind=Kind.DAMAGED,
          file="config.json", spare_commit=True, why="the wrong commit stays in the history of the branch, untagged"),
    _status("tree", 500, "released"),
    _status("tree", 404, "refused", "404", nth=2, times=FOREVER),
    _case("tree", "reset in the answer", "released", kind=Kind.RESET_ANSWER, nth=2),
    _case("tree", "silent once", "released", kind=Kind.SILENT, nth=2),
    _status("create-tag", 403, "refused", "403", times=FOREVER),
    _status("create-tag", 409, "released"),
    _status("create-tag", 429, "released"),
    _status("create-tag", 500, "refused", "500", times=FOREVER),
    _status("create-tag", 503, "released"),
    _case("create-tag", "made, then 500", "released", kind=Kind.APPLIED_STATUS, status=500),
    _case("create-tag", "made, the answer is lost", "released", kind=Kind.APPLIED_RESET),
    _case("create-tag", "made, after the client has given up", "released", kind=Kind.SLOW, delay_s=3.4),
    _case("create-tag", "silent once", "released", kind=Kind.SILENT),
    _case("create-tag", "reset before the body", "released", kind=Kind.RESET_BEFORE),
    _case("create-tag", "the token expires", "refused", "not accepted", kind=Kind.EXPIRED, new_token=True),
)  # fmt: skip

_STAGED: Mapping[str, Any] = {
    "flags": ("--staging", "true"), "existing": True, "commits": 2,
    "why": "staged: the second commit brings the branch to the tag",
}  # fmt: skip
_ALIAS: Mapping[str, Any] = {"flags": ("--also-tags", "latest"), "existing": True}

CASES += (
    _case("create-branch", "503 once, staged", "released", **_STAGED),
    _case("create-branch", "made, the answer is lost, staged", "released", kind=Kind.APPLIED_RESET, **_STAGED),
    _case("commit", "made, the answer is lost, staged", "released", kind=Kind.APPLIED_RESET, **_STAGED),
    _case("commit", "503 after the tag, staged", "unfinished", "503", nth=2, times=FOREVER, **_STAGED),
    _case("commit", "the answer after the tag is lost, staged", "released", kind=Kind.APPLIED_RESET, nth=2, **_STAGED),
    _case("delete-branch", "503 once, staged", "released", **_STAGED),
    _case("delete-branch", "done, the answer is lost, staged", "released", kind=Kind.APPLIED_RESET, **_STAGED),
    _case("create-tag", "503 for the alias", "unfinished", "503", nth=2, times=FOREVER, **_ALIAS),
    _case("create-tag", "the answer for the alias is lost", "released", kind=Kind.APPLIED_RESET, nth=2, **_ALIAS),
    _case("exchange", "503 once, keyless", "released", keyless=True, existing=True),
    _case("exchange", "403, keyless", "refused", "403", status=403, times=FOREVER, keyless=True, existing=True),
    _case("commit", "the token expires, keyless", "released", kind=Kind.EXPIRED, keyless=True, existing=True),
    _case("create-tag", "the token expires, keyless", "released", kind=Kind.EXPIRED, keyless=True, existing=True),
)

# What the tests run; the program that writes docs/faults.md runs them all.
SAMPLE = (
    "ask: 403",
    "send: reset in the body",
    "commit: made, the answer is lost",
    "commit: weights are stored wrong",
)
