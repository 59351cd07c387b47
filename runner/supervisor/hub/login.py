"""Which token a Hub is used with: one that was given, or none at all.

A login is asked for its token before every request, so that one that renews itself can be put in its place.
"""

from __future__ import annotations

from typing import Protocol


class Login(Protocol):
    """What gives a token."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """Every text that must not be shown."""
        ...

    @property
    def is_keyless(self) -> bool:
        """Whether its tokens are made for this job, and good for the one repository."""
        ...

    def token(self) -> str | bool:
        """Return the token to send now; False for none (and none that lies around on the machine)."""
        ...

    def forget(self) -> None:
        """Make the next token a new one, where that can be."""
        ...

    def renew(self) -> bool:
        """Forget the token after the Hub refused it; return whether there will be another one."""
        ...


class Given:
    """A token that the user gave, or none."""

    is_keyless = False

    def __init__(self, token: str | None) -> None:
        self._token = token

    @property
    def secrets(self) -> tuple[str, ...]:
        """The token."""
        return (self._token,) if self._token else ()

    def token(self) -> str | bool:
        """Return the token, or False."""
        return self._token or False

    def forget(self) -> None:
        """Do nothing: there is no other."""

    def renew(self) -> bool:
        """Return False: there is no other."""
        return False
