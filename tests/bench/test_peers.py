"""The peers' lists: everything pinned, nothing that pulls another torch."""

from __future__ import annotations

import re

import pytest

from bench.contestants import ENTRIES
from bench.peers import HERE, PEERS, PLOT

LISTS = (*(peer.environment for peer in PEERS if not peer.cannot), PLOT)


@pytest.mark.parametrize("name", LISTS)
def test_every_line_names_one_version_and_none_is_torch_or_cuda(name: str) -> None:
    lines = (HERE / f"{name}.txt").read_text().splitlines()

    assert lines
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)] == []
    assert [line for line in lines if re.match(r"torch==|torchvision==|torchaudio==|nvidia-(?!ml-py)", line)] == []


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.environment)
def test_a_peer_has_a_program_or_a_reason(peer: object) -> None:
    from bench.peers import Peer

    assert isinstance(peer, Peer)
    assert bool(peer.cannot) != (ENTRIES / peer.program).is_file()
