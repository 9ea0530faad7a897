"""A rank is lost at whatever moment: the server ends, and the operator hears it once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mii_hcache.errors import RankLostError
from mii_hcache.serve import loss as loss_module
from mii_hcache.serve.loss import Loss

GONE = RankLostError("rank 1 of 2 was killed")


@pytest.fixture
def timers(monkeypatch) -> list[Any]:
    """What would be done after a while. None of it is, for it ends the process."""
    set_up: list[Any] = []
    monkeypatch.setattr(loss_module, "_in", lambda seconds, then: set_up.append(then))
    return set_up


@pytest.mark.parametrize("is_serving", [True, False], ids=["while it serves", "before it does"])
def test_the_server_ends(timers, is_serving):
    told: list[str] = []
    loss, server = Loss(told.append, 3), SimpleNamespace(should_exit=False, force_exit=False)
    steps = [lambda: loss.take(server), lambda: loss.note(GONE)]
    for step in steps if is_serving else reversed(steps):
        step()
    assert server.should_exit and not server.force_exit, "soon, and in order"
    end, close_connections = timers
    assert end == loss._end_now
    close_connections()
    assert server.force_exit
    for _ in range(2):
        loss.tell(GONE)
    assert len(told) == 1 and told[0].startswith(str(GONE))


def test_without_a_loss_it_goes_on(timers):
    loss, server = Loss(print, 3), SimpleNamespace(should_exit=False, force_exit=False)
    loss.take(server)
    assert not server.should_exit and loss.error is None and not timers
