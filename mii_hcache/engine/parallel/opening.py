"""From a checkpoint to an engine over several ranks, all of them started by this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mii_hcache.engine.parallel.engine import ParallelEngine
from mii_hcache.engine.parallel.followers import Followers
from mii_hcache.engine.parallel.group import RankGroup
from mii_hcache.engine.ragged_engine import build_engine
from mii_hcache.errors import ConfigError, RankLostError
from mii_hcache.runtime.machine import num_usable_cpus

MEET_END_S = 1.0
"""Longest that the thread which meets the other ranks takes to notice that one is gone. Until then the place where they
meet must be there: in native code it would wait for it to come."""


def device_of(rank: int) -> torch.device:
    """Where a rank computes: a GPU of its own, where there are any."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def share_threads(size: int) -> None:
    """Leave the other ranks their part of this machine's cores."""
    torch.set_num_threads(max(1, min(torch.get_num_threads(), num_usable_cpus() // size)))


def check_devices(size: int) -> None:
    """Raises ConfigError when there are GPUs, but too few."""
    if torch.cuda.is_available() and torch.cuda.device_count() < size:
        raise ConfigError(
            f"tensor_parallel is {size}, and this machine has {torch.cuda.device_count()} GPUs: each rank needs one"
        )


def open_parallel_engine(
    model_path: str,
    size: int,
    *,
    on_lost: Callable[[RankLostError], None],
    progress: Callable[[str, int, int], None],
    **settings: Any,
) -> ParallelEngine:
    """Start `size - 1` other ranks and load the model with them; `settings` are those of `build_engine`. Blocks until
    all are ready; `ParallelEngine.close` ends them.

    Raises what `build_engine` raises, ConfigError when there are too few GPUs, RankLostError when a rank ends meanwhile
    (then `on_lost` is called, too, as it is whenever a rank is lost later).
    """
    check_devices(size)
    share_threads(size)
    followers = Followers(size, on_lost)
    group: RankGroup | None = None
    try:
        progress(f"starting {size} ranks", 0, 0)
        local_path = _local(model_path)
        followers.wait_for("imported", lambda num_there: progress(f"starting {size} ranks", 1 + num_there, size))
        followers.send_settings({"engine": {**settings, "model_path": local_path}})
        group = _meet(followers, size)
        followers.wake_with(group.abort)
        progress(f"loading the model on {size} ranks", 0, 0)
        engine = build_engine(local_path, **settings, group=group, engine_class=ParallelEngine)
        assert isinstance(engine, ParallelEngine)
        followers.wait_for(
            "ready", lambda num_there: progress(f"loading the model on {size} ranks", 1 + num_there, size)
        )
    except RankLostError as error:
        lost = followers.lose(str(error), error)
        _end(followers, group)
        raise lost from error
    except BaseException:
        _end(followers, group)
        raise
    engine.lead(followers)
    return engine


def _end(followers: Followers, group: RankGroup | None) -> None:
    followers.end()
    if group is not None:
        group.close()


def _local(model_path: str) -> str:
    """The folder of a checkpoint; fetched here, once, when it is a hub id."""
    if Path(model_path).is_dir():
        return model_path
    from mii_hcache.engine.ragged_engine import open_checkpoint

    return str(open_checkpoint(model_path)._local_checkpoint_dir)


def _meet(followers: Followers, size: int) -> RankGroup:
    """Rank 0's place in the group. The last step of joining cannot be interrupted, so a thread of its own does it: it
    is left to its time limit when a rank ends just then."""
    met: list[RankGroup | BaseException] = []

    def join() -> None:
        try:
            met.append(RankGroup.join(followers.meeting, 0, size, device_of(0), check=followers.check))
        except BaseException as error:
            met.append(error)

    thread = threading.Thread(target=join, name="hcache-meet", daemon=True)
    thread.start()
    while thread.is_alive():
        try:
            followers.check()
        except RankLostError:
            thread.join(MEET_END_S)
            raise
        thread.join(0.05)
    if isinstance(met[0], BaseException):
        raise met[0]
    return met[0]
