"""What a process that is to be killed does: open, work, close, and say so."""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from mii_hcache.storage import trouble
from tests.crash import mutations, tripwires
from tests.crash.contest import Contest
from tests.crash.opened import StoreSpec, open_store
from tests.crash.workload import Say, Workload

RAISED = 17
"""Exit status of a child whose job raised; it was said."""


def make_job(spec: StoreSpec, workload: Workload | None, events: Path, **more: Any) -> dict[str, Any]:
    """A job: open, work (not at all for None), close. `more`: `tripwire` (see `tripwires.lay`), `mutate`, `device`
    (see `preloaded`)."""
    return {"spec": asdict(spec), "workload": workload and asdict(workload), "events": str(events), **more}


def run_and_exit(job: dict[str, Any]) -> NoReturn:
    """In a forked child."""
    status = RAISED
    try:
        os.close(0)
        os.dup2(os.open(job["events"] + ".stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
        os.dup2(2, 1)  # the zygote's answers are not ours to write
        faulthandler.dump_traceback_later(100)  # of a hang, shortly before the parent loses patience
        fd = os.open(job["events"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if "call" in job:
            module, _, name = job["call"].partition(":")
            with mutations.mutated(job.get("mutate")):
                getattr(importlib.import_module(module), name)(lambda line: _append(fd, line), **job["arguments"])
        else:
            run(job, lambda line: _append(fd, line))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(job: dict[str, Any], say: Say) -> None:
    """Do a job; what it raises is said."""
    spec = StoreSpec(**{**job["spec"], "paths": tuple(job["spec"]["paths"])})
    trouble._SILENCE_S = 0.0  # of a case that failed, all that was logged is of interest
    with mutations.mutated(job.get("mutate")):
        if job.get("tripwire"):
            tripwires.lay(**job["tripwire"])
        device = None
        if job.get("device"):
            from tests.crash.preloaded import Device

            device = Device(job["device"])
            say = device.begin(say)
        try:
            opened = open_store(spec)
            say("opened")
            if device is not None:
                device.opened(opened)
            work = _work_of(job)
            if work is not None:
                work.run(opened, say)
                if device is not None:
                    say(f"struck {device.num_done}")
                is_well = device is not None and device.end(opened)
                if is_well:
                    say("healthy")
                if is_well or job.get("contest"):
                    work.after_trouble(opened, say)
            opened.close()
            say("closed")
        except Exception as error:
            say(f"raised {type(error).__name__}: {error}".replace("\n", " "))
            raise


def _work_of(job: dict[str, Any]) -> Workload | Contest | None:
    if job.get("contest"):
        return Contest(**job["contest"])
    return Workload(**job["workload"]) if job["workload"] else None


def _append(fd: int, line: str) -> None:
    os.write(fd, line.encode() + b"\n")
