"""Turn Xet on in the client of this process, which read its settings when it was imported."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _xet


def use_xet(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Make the client use Xet with short waits, and remember only what is below `home`."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    settings = {
        "HF_HOME": str(home),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3",
    }
    for name, text in settings.items():
        monkeypatch.setenv(name, text)
    _xet.abort_xet_session()
    _xet.XET_CONNECTION_INFO_CACHE.clear()
