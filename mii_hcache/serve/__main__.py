"""`python -m mii_hcache.serve`: from the command line to a server, and back to the shell in order."""

from __future__ import annotations

import json
import logging
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mii_hcache import __version__
from mii_hcache.errors import HCacheError
from mii_hcache.serve.options import Options, format_size, parse_options

if TYPE_CHECKING:
    from mii_hcache.engine.open import OpenedService
    from mii_hcache.serve.listening import Server

_EXIT_FORCED = 1
_EXIT_REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 after an orderly end, 1 after a forced one, 2 when the server cannot start (one line says
    why)."""
    debug = False
    try:
        options = parse_options(arguments)
        debug = options.log_level == "debug"
        _set_up_logging(options.log_level)
        return _serve(options)
    except HCacheError as error:
        if debug:
            raise
        print(f"mii_hcache.serve: {error}", file=sys.stderr)
        return _EXIT_REFUSED
    except KeyboardInterrupt:  # while the model was loading
        return 130


def _serve(options: Options) -> int:
    from mii_hcache.serve.listening import bind  # imports here, so that `--help` answers at once

    with bind(options.host, options.port) as sock:
        print(f"mii_hcache {__version__}: loading {options.config.model or 'the demo model'} ...", flush=True)
        from mii_hcache.engine.open import open_service

        opened = open_service(options.config)
        drain = False
        try:
            server = _server_of(options, opened, sock)
            with server.taking_signals():
                server.run(sockets=[sock])
                drain = not server.forced
                opened.close(drain=drain)
        finally:
            opened.close(drain=False)
    print("Saved state is on disk. Good bye." if drain else "Stopped without waiting.", flush=True)
    return 0 if drain else _EXIT_FORCED


def _server_of(options: Options, opened: OpenedService, sock: socket.socket) -> Server:
    from mii_hcache.serve.app import create_app
    from mii_hcache.serve.listening import Server

    known_texts: Any = opened.transcripts
    return Server(
        create_app(opened.service, opened.tokenizer, known_texts, opened.model_name),
        on_started=lambda: print(_summary(options, opened, sock), flush=True),
        access_log=options.log_level in ("debug", "info"),
    )


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("mii_hcache").setLevel(level.upper())
    logging.getLogger("uvicorn.access").setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


def _summary(options: Options, opened: OpenedService, sock: socket.socket) -> str:
    from mii_hcache.config import default_state_dir
    from mii_hcache.serve.listening import is_loopback, url_of

    config = options.config
    notes = list(opened.notes)
    if not is_loopback(sock):
        notes.append("Other machines can reach this server, and it asks nobody for a password.")
    lines = [
        "",
        f"  model    {opened.model_name}, conversations up to {opened.service.max_context_tokens} tokens",
        f"  address  {url_of(sock)}  (OpenAI's API under /v1, /health, /metrics)",
        f"  state    {config.state_dir or default_state_dir()}, at most {format_size(config.state_capacity_bytes)}, "
        f"{format_size(config.dram_capacity_bytes)} of it in memory as well",
        *(f"  note     {note}" for note in notes),
        "",
        "Try it:",
        "",
        f"  {_curl_line(opened, url_of(sock))}",
        "",
    ]
    return "\n".join(lines)


def _curl_line(opened: OpenedService, url: str) -> str:
    if opened.tokenizer.has_chat_template:
        path = "chat/completions"
        body: dict[str, object] = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 50}
    else:  # a base model
        path, body = "completions", {"prompt": "Once upon a time", "max_tokens": 50}
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


if __name__ == "__main__":
    sys.exit(main())
