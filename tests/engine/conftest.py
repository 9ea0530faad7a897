"""What an engine gives up after seconds, so that nobody waits for a slow disk, is waited for here: most of these tests
say what comes back when nothing was given up, also on a machine that stands still for seconds. Tests of giving up set
these times themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

PATIENCE_S = 60.0


@pytest.fixture(autouse=True, scope="module")
def patience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for waits in ("admission.PENDING_WAIT_S", "admission.HEAL_WAIT_S", "sequence_runner.PENDING_WAIT_S"):
            patch.setattr(f"mii_hcache.engine.{waits}", PATIENCE_S)
        yield
