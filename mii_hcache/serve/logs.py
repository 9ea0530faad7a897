"""What the server writes while it runs: what is wrong, and more only when it is asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

import huggingface_hub.utils.logging as _hub

from mii_hcache.config import quiet_libraries

REQUESTS = "mii_hcache.serve.requests"
"""Logger of finished requests: those of OpenAI's routes at INFO, others (probes, scrapes) at DEBUG."""
_OWN_WRITERS = ("DeepSpeed", "DS-Inference", "MII")
"""Libraries' loggers that bring a handler of their own, which writes to stdout."""


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, and what it has under `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


class _OurWay(logging.Filter):
    """On a logger that writes by itself: its records take the way of all others instead."""

    def filter(self, record: logging.LogRecord) -> bool:
        root = logging.getLogger()
        if record.levelno >= root.level:
            root.handle(record)
        return False


def set_up_logging(*, verbose: bool, as_json: bool) -> None:
    """To be called before the engine's libraries are imported. Everything goes to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if verbose else logging.ERROR)  # other people's
    logging.captureWarnings(True)
    logging.getLogger(_hub.__name__.partition(".")[0]).handlers.clear()  # it hands its records on as well
    for name in _OWN_WRITERS:
        logging.getLogger(name).addFilter(_OurWay())
    if not verbose:
        quiet_libraries()
    ours = logging.DEBUG if verbose else logging.WARNING
    logging.getLogger("mii_hcache").setLevel(ours)
    logging.getLogger(REQUESTS).setLevel(min(ours, logging.INFO) if as_json else ours)
    logging.getLogger("mii_hcache.serve.start").setLevel(logging.INFO if as_json else ours)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO if verbose else logging.WARNING)
