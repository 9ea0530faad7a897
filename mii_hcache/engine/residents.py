"""Finished contexts whose K and V are still in GPU memory, least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A finished sequence that was not evicted."""

    uid: int
    seed: bytes
    """Root of its tenant's chain: other tenants never see it."""
    token_ids: npt.NDArray[np.uint32]
    """Tokens in its blocks."""


def common_prefix(first: npt.NDArray[np.uint32], second: npt.NDArray[np.uint32]) -> int:
    """Leading elements in which two arrays agree."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


class Residents:
    """The host cannot share blocks, so a resident is handed to exactly one request."""

    def __init__(self) -> None:
        self._by_uid: OrderedDict[int, Resident] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_uid)

    @property
    def uids(self) -> list[int]:
        """Least recently used first."""
        return list(self._by_uid)

    def add(self, uid: int, seed: bytes, token_ids: Sequence[int]) -> None:
        """A context finished; it is the most recently used one."""
        self._by_uid[uid] = Resident(uid=uid, seed=seed, token_ids=np.asarray(token_ids, dtype=np.uint32))

    def best(self, seed: bytes, token_ids: Sequence[int], max_tokens: int) -> tuple[Resident, int] | None:
        """The resident of this tenant that shares the longest prefix, and the tokens shared (at most `max_tokens`).

        One that would lose more than half of itself is not offered: cutting a long conversation down to a common
        greeting costs more than it saves.
        """
        prompt = np.asarray(token_ids[:max_tokens], dtype=np.uint32)
        best: tuple[Resident, int] | None = None
        for resident in self._by_uid.values():
            if resident.seed != seed:
                continue
            shared = common_prefix(resident.token_ids, prompt)
            if shared * 2 >= len(resident.token_ids) and shared > (best[1] if best else 0):
                best = resident, shared
        return best

    def take(self, uid: int) -> Resident:
        """Hand a resident over; it is no longer one."""
        return self._by_uid.pop(uid)

    def oldest(self, but: int | None = None) -> int | None:
        """Uid of the least recently used resident other than `but`."""
        return next((uid for uid in self._by_uid if uid != but), None)
