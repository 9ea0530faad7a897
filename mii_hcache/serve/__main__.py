"""`python -m mii_hcache.serve`: from the command line to a server, and back to the shell in order."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mii_hcache import __version__
from mii_hcache.errors import ConfigError, HCacheError, RankLostError
from mii_hcache.serve.options import Options, as_options, parse_options
from mii_hcache.serve.saying import say

if TYPE_CHECKING:
    from mii_hcache.engine.open import OpenedService
    from mii_hcache.serve.listening import Server
    from mii_hcache.serve.loading import Loading
    from mii_hcache.serve.loss import Loss

_EXIT_FORCED = 1
_EXIT_REFUSED = 2
EXIT_LOST = 3
_EXIT_INTERRUPTED = 130

_log = logging.getLogger("mii_hcache.serve.start")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 after an orderly end, 1 after a forced one, 2 when the server cannot start (one line says
    why), 3 when a rank of a model over several was lost."""
    options = None
    try:
        options = parse_options(arguments)
        return _serve(options)
    except HCacheError as error:
        if options is not None and options.verbose:
            raise
        _complain(options, as_options(str(error)))
        return _EXIT_REFUSED
    except KeyboardInterrupt:  # while the model was loading
        return _EXIT_INTERRUPTED


def _serve(options: Options) -> int:
    from mii_hcache.serve.listening import bind, is_loopback  # imports here, so that `--help` answers at once
    from mii_hcache.serve.loading import Loading
    from mii_hcache.serve.logs import set_up_logging
    from mii_hcache.serve.loss import Loss
    from mii_hcache.storage.state_dir import refuse_busy

    set_up_logging(verbose=options.verbose, as_json=options.log_json)
    with bind(options.host, options.port) as sock:
        if not is_loopback(sock) and not len(options.access.keys) and not options.allow_no_key:
            raise ConfigError(
                f"--host {options.host} lets other machines in, and there is no key: set MII_HCACHE_API_KEY or give "
                "--api-key-file, or say --allow-no-key if everybody who can reach this machine may use it"
            )
        for directory in options.config.state_dirs:  # opening it would tell, too, but only when all is imported
            refuse_busy(Path(directory))
        loading, loss = Loading(as_json=options.log_json), Loss(lambda words: _complain(options, words), EXIT_LOST)
        _tell(options, f"mii_hcache {__version__}: loading {options.config.model or 'the demo model'}")
        try:
            opened = _open(options, loading, loss)
        except RankLostError as error:
            loss.tell(error)
            return EXIT_LOST
        drain = False
        try:
            server = _server_of(options, opened, sock, loading)
            loss.take(server)
            with server.taking_signals():
                server.run(sockets=[sock])
                drain = not server.forced
                opened.close(drain=drain)
        finally:
            opened.close(drain=False)
    if loss.error is not None:
        loss.tell(loss.error)
        return EXIT_LOST
    _tell(options, "Saved state is on disk. Good bye." if drain else "Stopped without waiting.")
    return 0 if drain else _EXIT_FORCED


def _open(options: Options, loading: Loading, loss: Loss) -> OpenedService:
    from mii_hcache.serve.loading import FETCHING

    with loading:
        loading.phase("starting")
        from mii_hcache.engine.open import open_service

        model = options.config.model
        is_here = model is None or Path(model).is_dir()
        loading.phase("loading the model and its saved state" if is_here else f"{FETCHING} and loading {model}")
        return open_service(options.config, progress=loading.phase, on_lost=loss.note)


def _server_of(options: Options, opened: OpenedService, sock: socket.socket, loading: Loading) -> Server:
    from mii_hcache.serve.app import create_app
    from mii_hcache.serve.listening import Server, is_loopback, url_of
    from mii_hcache.serve.summary import Summary

    def say_ready() -> None:
        summary = Summary(
            options=options,
            opened=opened,
            url=url_of(sock),
            is_loopback=is_loopback(sock),
            seconds=loading.seconds,
        )
        if options.log_json:
            _log.info("ready", extra={"fields": summary.fields()})
        else:
            say(summary.text(), sys.stdout)

    known_texts: Any = opened.transcripts
    app = create_app(opened.service, opened.tokenizer, known_texts, opened.model_name, access=options.access)
    stopping = "Stopping: running answers end, and state is written. Once more does not wait for them."
    return Server(app, on_started=say_ready, on_stopping=lambda: _tell(options, stopping))


def _complain(options: Options | None, words: str) -> None:
    if options is not None and options.log_json:
        _log.error("%s", words)
    else:
        say(f"mii_hcache.serve: {words}", sys.stderr)


def _tell(options: Options, words: str) -> None:
    if options.log_json:
        _log.info("%s", words)
    else:
        say(words, sys.stdout)


def _leave(status: int) -> NoReturn:
    """What still hangs after a rank was lost, in reads or in native code, must not hold the process up: all that is
    closed in order is closed by now."""
    if status == EXIT_LOST:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    _leave(main())
