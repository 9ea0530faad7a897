"""What a restore did when: the record from which overlap and bubbles are computed, and traces are written."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.errors import ConfigError
from mii_hcache.runtime import streams
from mii_hcache.runtime.work import Tile

_log = logging.getLogger(__name__)

Activity = Literal["read", "load", "project", "place", "fill", "wait"]
"""`read`: bytes come from the store. `load`: they are copied to a device, K and V straight to where they belong. The
others are the engine's, on its device if it has one: K and V are projected from hidden states, or placed as they are,
or filled by a forward; or the engine thread waits for a read."""


@dataclass(frozen=True, slots=True)
class Event:
    """One piece of work. Times are `time.perf_counter`'s."""

    activity: Activity
    start_s: float
    stop_s: float
    first_layer: int = 0
    num_layers: int = 1
    start: int = 0
    """First token."""
    num_tokens: int = 0
    num_bytes: int = 0


class RestoreTimeline:
    """Events of one restore. `add` and `add_tile` may be called from any thread, the rest from the engine's."""

    def __init__(self) -> None:
        self.started_s = time.perf_counter()
        self.stopped_s = self.started_s
        self.events: list[Event] = []
        self._is_over = False
        self._work: dict[Activity, deque[tuple[streams.Event, streams.Event, dict[str, int]]]] = {}
        """By activity: each has a stream to itself, where things end in order."""

    def add(self, activity: Activity, start_s: float, **what: int) -> None:
        """Something that began at `start_s` has just ended."""
        self.events.append(Event(activity, start_s, time.perf_counter(), **what))

    def add_tile(self, activity: Activity, start_s: float, tile: Tile, num_bytes: int) -> None:
        """`add`, of a tile."""
        self.add(activity, start_s, **_about(tile, num_bytes))

    def add_work(self, activity: Activity, began: streams.Event, ended: streams.Event, **what: int) -> None:
        """Something was launched between two timed events. It is noted when it is done."""
        self._work.setdefault(activity, deque()).append((began, ended, what))
        self.settle()

    def add_tile_work(
        self, activity: Activity, began: streams.Event, ended: streams.Event, tile: Tile, num_bytes: int
    ) -> None:
        """`add_work`, of a tile."""
        self.add_work(activity, began, ended, **_about(tile, num_bytes))

    def settle(self) -> bool:
        """Note what was launched and is done by now. True: that is all of it, and the timeline tells the truth. Does
        not block."""
        for activity, pieces in self._work.items():
            while pieces and pieces[0][1].is_done:
                began, ended, what = pieces.popleft()
                self.events.append(Event(activity, began.passed_s, ended.passed_s, **what))
                if self._is_over:
                    self.stopped_s = max(self.stopped_s, ended.passed_s)
        return not any(self._work.values())

    def finish(self) -> None:
        """The restore is over: nothing is launched any more. It ends when all that was launched is done."""
        self.stopped_s = max([time.perf_counter(), *(event.stop_s for event in self.events)])
        self._is_over = True
        self.settle()

    def busy_s(self, *activities: Activity) -> float:
        """Time in which at least one of these was going on."""
        return union_s((event.start_s, event.stop_s) for event in self.events if event.activity in activities)

    @property
    def io_s(self) -> float:
        """Time in which something was being read, or copied to the device."""
        return self.busy_s("read", "load")

    @property
    def compute_s(self) -> float:
        """Time in which the engine worked for this restore."""
        return self.busy_s("project", "place", "fill")

    @property
    def makespan_s(self) -> float:
        """From the start to the end, with whatever the engine did in between."""
        return self.stopped_s - self.started_s

    @property
    def bubble_s(self) -> float:
        """Time in which the busier of the two resources was idle."""
        return max(0.0, self.makespan_s - max(self.io_s, self.compute_s))


def union_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total = 0.0
    reached = float("-inf")
    for start, stop in sorted(intervals):
        if stop > reached:
            total += stop - max(start, reached)
            reached = stop
    return total


_LOAD_ROW = 99
"""Behind those of the reads."""


class TraceFile:
    """Timelines as a Chrome trace (open it in Perfetto). Any thread; every write leaves a file that can be opened."""

    def __init__(self, path: Path) -> None:
        """Starts a new file. Raises ConfigError."""
        self._path = path
        self._lock = threading.Lock()
        self._zero_s = time.perf_counter()
        self._num = 0
        self._is_broken = False
        try:
            path.write_text("[]\n")
        except OSError as error:
            raise ConfigError(f"trace {path} cannot be written ({error.strerror}); choose another file") from error

    def write(self, name: str, timeline: RestoreTimeline, about: dict[str, Any]) -> None:
        """Append one restore: a process of its own, a row for reads and one for the engine thread. A file that cannot
        be written any more is given up, and said so once: restores go on."""
        with self._lock:
            if not self._is_broken:
                try:
                    self._append(name, timeline, about)
                except OSError as error:
                    self._is_broken = True
                    _log.error("the trace %s cannot be written (%s); it ends here", self._path, error)

    def _append(self, name: str, timeline: RestoreTimeline, about: dict[str, Any]) -> None:
        self._num += 1
        entries = _chrome_events(self._num, name, timeline, about, self._zero_s)
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        with self._path.open("r+") as file:
            file.seek(max(1, self._path.stat().st_size - 2))  # over the closing bracket
            file.write(f"{',' if self._num > 1 else ''}\n{lines}]\n")


def _about(tile: Tile, num_bytes: int) -> dict[str, int]:
    return {
        "first_layer": tile.layer_idx,
        "start": tile.first_span * SPAN_TOKENS,
        "num_tokens": tile.num_spans * SPAN_TOKENS,
        "num_bytes": num_bytes,
    }


def _chrome_events(
    number: int, name: str, timeline: RestoreTimeline, about: dict[str, Any], zero_s: float
) -> Sequence[dict[str, Any]]:
    def entry(title: str, row: int, start_s: float, stop_s: float, args: dict[str, Any]) -> dict[str, Any]:
        micros = {"ts": round(1e6 * (start_s - zero_s), 1), "dur": round(1e6 * (stop_s - start_s), 1)}
        return {"ph": "X", "pid": number, "tid": row, "name": title, **micros, "args": args}

    rows = {0: "restore", 1: "engine"}
    entries = [{"ph": "M", "pid": number, "name": "process_name", "args": {"name": name}}]
    entries.append(entry("restore", 0, timeline.started_s, timeline.stopped_s, about))
    ends: list[float] = []
    for event in sorted(timeline.events, key=lambda event: event.start_s):
        if event.activity == "read":  # reads overlap: each goes to the first row that is free
            lane = next((idx for idx, stop_s in enumerate(ends) if stop_s <= event.start_s), len(ends))
            ends[lane:] = [event.stop_s, *ends[lane + 1 :]]
            row = 2 + lane
            rows[row] = f"read {lane}"
        elif event.activity == "load":
            row = _LOAD_ROW
            rows[row] = "copy to the device"
        else:
            row = 1
        last = event.first_layer + event.num_layers - 1
        layers = f"layer {last}" if event.num_layers == 1 else f"layers {event.first_layer}-{last}"
        what = {"tokens": f"{event.start}-{event.start + event.num_tokens}", "bytes": event.num_bytes}
        entries.append(entry(f"{event.activity} {layers}", row, event.start_s, event.stop_s, what))
    for row, title in rows.items():
        entries.append({"ph": "M", "pid": number, "tid": row, "name": "thread_name", "args": {"name": title}})
    return entries
