"""Whether a token may create a repository, and whether it may do more than it must, judged from what `whoami` says.

Pure: nothing is asked or written.

The Hub has no question "may I create this?" without creating it, so an answer is "no" or "nothing speaks against it".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from runner.protocol.errors import AccessDenied
from runner.supervisor.hub.translate import clean

WRITING_ORG_ROLES = frozenset({"admin", "write", "contributor"})


def refuse_read_only(who: Mapping[str, Any], repo_id: str) -> None:
    """Raise `AccessDenied` for a token that can write nowhere."""
    if _role(who) == "read":
        raise AccessDenied(
            f"The token may only read, so nothing can be published to {repo_id}.",
            why=f"It belongs to {_name(who)} and has the role `read`.",
            fix="Use a token with the role `write`, or a fine-grained one with write access to the target.",
        )


def refuse_creation(who: Mapping[str, Any], repo_id: str) -> None:
    """Raise `AccessDenied` when `whoami` shows that the token cannot create `repo_id`.

    Args:
        who: the answer of `whoami-v2`.
        repo_id: `owner/name` of a repository that does not exist, or that the token does not see.
    """
    refuse_read_only(who, repo_id)
    owner = repo_id.split("/", maxsplit=1)[0]
    roles = {str(org.get("name")): org.get("roleInOrg") for org in _dicts(who.get("orgs"))}
    if owner != _name(who) and owner not in roles:
        raise AccessDenied(
            f"{repo_id} does not exist (or this token may not see it), and it cannot be created.",
            why=f"The token belongs to {_name(who)}, who is not a member of {owner}.",
            fix="Correct the owner in `target-repo`, or use a token of a member.",
        )
    if owner in roles and roles[owner] is not None and roles[owner] not in WRITING_ORG_ROLES:
        raise AccessDenied(
            f"{repo_id} does not exist, and this token may not create it.",
            why=f"{_name(who)} has the role `{roles[owner]}` in {owner}.",
            fix=f"Ask an admin of {owner} for the role `contributor` or `write`.",
        )
    if _role(who) == "fineGrained" and not _may_write_namespace(who, owner):
        raise AccessDenied(
            f"{repo_id} does not exist, and this fine-grained token may not create it.",
            why=f"It has no write permission on the whole namespace {owner}.",
            fix=f"Create the repository by hand and give the token write access to it, or to all of {owner}.",
        )


def wider_than_needed(who: Mapping[str, Any], repo_id: str, *, exists: bool) -> tuple[str, ...]:
    """Return what a token may do beyond writing to `repo_id`, one sentence; () where `whoami` says nothing of it.

    A leaked token does what it may, not what it was made for.

    Args:
        who: the answer of `whoami-v2`.
        repo_id: `owner/name`.
        exists: whether the repository is there; if not, the right to write to its whole namespace is needed.
    """
    owner = repo_id.split("/", maxsplit=1)[0]
    needed = f"{repo_id} alone" if exists else f"{owner} alone"
    advice = f"A fine-grained token with write access to {needed} is enough."
    role = _role(who)
    if role in ("write", "admin"):
        return (f"`hf-token` may write to everything that {clean(_name(who))} may write to. {advice}",)
    grants = _access_token(who).get("fineGrained")
    if role != "fineGrained" or not isinstance(grants, Mapping):
        return ()
    wider = [f"{right} everywhere" for right in sorted(_strings(grants.get("global"))) if right.endswith(".write")]
    for scope in _dicts(grants.get("scoped")):
        entity, rights = scope.get("entity"), sorted(_strings(scope.get("permissions")))
        if not isinstance(entity, Mapping) or not any(right.endswith(".write") for right in rights):
            continue
        kind, name = entity.get("type"), entity.get("name")
        if (kind, name) != ("model", repo_id) and (exists or kind not in ("user", "org") or name != owner):
            wider.append(f"{', '.join(rights)} on {kind} {name}")
    if not wider:
        return ()
    shown = "; ".join(wider[:3]) + (f" and {len(wider) - 3} more" if len(wider) > 3 else "")
    return (f"`hf-token` may do more than this run needs: {clean(shown)}. {advice}",)


def _may_write_namespace(who: Mapping[str, Any], owner: str) -> bool:
    grants = _access_token(who).get("fineGrained")
    if not isinstance(grants, Mapping):
        return True  # nothing is said, so nothing speaks against it
    if "repo.write" in _strings(grants.get("global")):
        return True
    for scope in _dicts(grants.get("scoped")):
        entity = scope.get("entity")
        if isinstance(entity, Mapping) and entity.get("type") in ("user", "org") and entity.get("name") == owner:
            return "repo.write" in _strings(scope.get("permissions"))
    return False


def _name(who: Mapping[str, Any]) -> str:
    return str(who.get("name", "nobody"))


def _role(who: Mapping[str, Any]) -> str | None:
    role = _access_token(who).get("role")
    return role if isinstance(role, str) else None


def _access_token(who: Mapping[str, Any]) -> Mapping[str, Any]:
    auth = who.get("auth")
    token = auth.get("accessToken") if isinstance(auth, Mapping) else None
    return token if isinstance(token, Mapping) else {}


def _dicts(value: Any) -> Iterable[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _strings(value: Any) -> set[str]:
    return {item for item in value if isinstance(item, str)} if isinstance(value, list) else set()
