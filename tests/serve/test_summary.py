"""What a server says of itself when it is ready is what it does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mii_hcache.serve.options import parse_options
from mii_hcache.serve.summary import Summary


def _summary(*arguments: str) -> Summary:
    opened: Any = SimpleNamespace(
        service=SimpleNamespace(geometry=None), storage=SimpleNamespace(bytes_per_token=lambda geometry: 1024)
    )
    return Summary(options=parse_options(arguments), opened=opened, url="", is_loopback=True, seconds=1.0)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_memory_is_room_only_where_state_is_kept_in_it(num_ranks):
    summary = _summary("--state-capacity", "1GiB", "--dram-capacity", "64MiB", "--tensor-parallel", str(num_ranks))
    room = "for 1,048,576 tokens on disk (1GiB)"
    assert summary._room() == (f"{room}, 65,536 of them in memory as well (64MiB)" if num_ranks == 1 else room)
