"""How long the device and the host take, for work that runs on several streams.

Two clocks for each repetition. The host's: from a moment at which the device idles to the moment at which it idles
again, so that whatever ran on any stream is in it. The device's: between two events on the stream of the engine, the
second one behind everything that stream has to wait for. The host's counts; a device time that is much smaller says
that it was the host that was slow.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from experiments.gpu_restore.ledger import Number

WARM_UPS = 2
LONG_S = 0.3
"""What takes longer is warm after one run of it."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Repetitions of one thing, in seconds."""

    host_s: tuple[float, ...]
    device_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Of the host's."""
        return statistics.median(self.host_s)

    def numbers(
        self, panel: str, series: str, x: float | str, *, how: str = "measured", note: str = ""
    ) -> list[Number]:
        """Median, least, and the time that nine in ten do not exceed; the device's median."""
        found = {
            "": self.median_s,
            ".min": min(self.host_s),
            ".p90": quantile(self.host_s, 0.9),
            ".device": statistics.median(self.device_s),
        }
        note = f"{note}; {len(self.host_s)} repetitions" if note else f"{len(self.host_s)} repetitions"
        return [
            Number(panel=f"{panel}{statistic}", series=series, x=x, y=value, unit="s", how=how, note=note)
            for statistic, value in found.items()
        ]


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share does not exceed: one of them, no interpolation."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Clock:
    """Of one device. Engine thread only."""

    def __init__(self, device: torch.device, flush_bytes: int) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._chance = random.Random(0)
        self._on_device = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
        self._on_host = torch.empty(2 * flush_bytes, dtype=torch.uint8)

    def settle(self) -> None:
        """Wait until the device idles."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Have the caches of the device and of the host hold something else."""
        self._on_device.fill_(self._chance.randrange(256))
        self._on_host.fill_(self._chance.randrange(256))
        self.settle()

    def once(self, work: Callable[[], object]) -> tuple[float, float]:
        """Seconds by the host's clock and the device's (the same on a CPU)."""
        self.settle()
        begin, end = (self._event(), self._event())
        started_s = time.perf_counter()
        if begin is not None:
            begin.record()
        work()
        if end is not None:
            end.record()
        self.settle()
        host_s = time.perf_counter() - started_s
        return host_s, host_s if begin is None or end is None else begin.elapsed_time(end) / 1e3

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event(enable_timing=True) if self.is_cuda else None  # type: ignore[no-untyped-call]

    def sample(self, work: Callable[[], object], repeats: int, *, flushes: bool = True) -> Sample:
        """One thing by itself."""
        return self.race({"": work}, repeats, flushes=flushes)[""]

    def race(
        self,
        works: Mapping[str, Callable[[], object]],
        repeats: int,
        *,
        before: Callable[[str], object] = lambda name: None,
        after: Callable[[str], object] = lambda name: None,
        flushes: bool = True,
        most_s: float = 20.0,
    ) -> dict[str, Sample]:
        """Several things in turn, each round from another one on; `before` and `after` are not timed. Warm-ups first.
        What takes long is repeated less often: 5 times from 0.3 s on, 3 from 1 s on, and no more after `most_s` in all,
        but all of them equally often within a factor."""
        names = list(works)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for name in names:
            for _ in range(WARM_UPS):
                before(name)
                warm_s, _ = self.once(works[name])
                after(name)
                if warm_s > LONG_S:
                    break
        spent_s = 0.0
        for turn in range(repeats):
            for name in _from(names, turn):
                found = times[name]
                if turn >= min(repeats, _enough(found)) or (turn >= 3 and spent_s > most_s):
                    continue
                before(name)
                if flushes:
                    self.flush()
                found.append(self.once(works[name]))
                after(name)
                spent_s += found[-1][0]
        return {
            name: Sample(host_s=tuple(one for one, _ in found), device_s=tuple(one for _, one in found))
            for name, found in times.items()
        }


def _from(names: Sequence[str], turn: int) -> Iterator[str]:
    first = turn % len(names)
    yield from (*names[first:], *names[:first])


def _enough(found: Sequence[tuple[float, float]]) -> int:
    typical_s = statistics.median([host_s for host_s, _ in found]) if found else 0.0
    return 3 if typical_s > 1.0 else 5 if typical_s > 0.3 else 1 << 20
