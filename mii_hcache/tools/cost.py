"""What a stretch of work takes: seconds, and CPU seconds of all who did it."""

from __future__ import annotations

import mmap
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a pass took."""

    num_bytes: int
    wall_s: float
    cpu_s: float
    """User and system, of all threads and of children that have ended. Not of the kernel's own threads, which write
    pages back for everybody."""

    @property
    def bytes_per_s(self) -> float:
        """Throughput."""
        return self.num_bytes / self.wall_s

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds for 10^9 bytes."""
        return self.cpu_s / (self.num_bytes / 1e9)

    def row(self) -> dict[str, float]:
        """For lines of JSON."""
        return {
            "gb_per_s": round(self.bytes_per_s / 1e9, 4),
            "cpu_s_per_gb": round(self.cpu_s_per_gb, 5),
            "num_bytes": self.num_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Median:
    """Several passes of one kind. Medians, each of its own: the machine is not equally busy in all of them."""

    gb_per_s: float
    cpu_s_per_gb: float
    passes: int
    spread: float
    """Fastest pass over slowest."""

    @staticmethod
    def of(costs: Sequence[Cost]) -> Median:
        """Of at least one pass."""
        rates = [cost.bytes_per_s / 1e9 for cost in costs]
        return Median(
            gb_per_s=statistics.median(rates),
            cpu_s_per_gb=statistics.median(cost.cpu_s_per_gb for cost in costs),
            passes=len(costs),
            spread=max(rates) / min(rates),
        )


def measured(job: Callable[[], int]) -> Cost:
    """Run `job`, which says how many bytes it moved."""
    cpu_before_s, start_s = _cpu_s(), time.perf_counter()
    num_bytes = job()
    wall_s = time.perf_counter() - start_s
    return Cost(num_bytes=num_bytes, wall_s=wall_s, cpu_s=_cpu_s() - cpu_before_s)


def aligned(num_bytes: int, fill: int = 0) -> memoryview:
    """Page-aligned memory whose pages are there."""
    memory = memoryview(mmap.mmap(-1, num_bytes))
    step = bytes([fill]) * min(num_bytes, 1 << 20)
    for start in range(0, num_bytes, len(step)):
        memory[start : start + len(step)] = step[: num_bytes - start]
    return memory


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
