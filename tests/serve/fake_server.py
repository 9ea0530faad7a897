"""`python fake_server.py ...`: the server's command over a fake engine and bytes for tokens; starts in a second."""

import logging
import os
import socket
import sys
import time
import types
from collections.abc import Callable

from serve_kit import DictTexts, FakeService

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.methods import METHODS
from mii_hcache.core.plans import uniform_storage
from mii_hcache.serve import listening


class ByteTokenizer:
    """Tokens are bytes, six up; `Tokenizer` as far as the server uses it."""

    stop_token_ids = frozenset({2})
    has_chat_template = True

    def fingerprint(self) -> bytes:
        return b"bytes"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [byte + 6 for byte in text.encode()]

    def encode_continuation(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_id - 6 for token_id in token_ids if 6 <= token_id < 262).decode(errors="replace")

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def stand_still() -> None:
    """While the file is there that $HOLD names."""
    while os.path.exists(os.environ.get("HOLD", "")):
        time.sleep(0.01)


class Opened:
    """Stands in for `mii_hcache.engine.open.OpenedService`."""

    model_name = "demo"
    notes = ("a note",)
    method = METHODS["hidden"]
    why_method = "chosen by --method"
    storage = uniform_storage(FakeService().geometry, ChunkKind.HIDDEN)

    def __init__(self) -> None:
        self.service = FakeService()
        self.service.max_context_tokens = 10_000
        self.service.step_s = 0.01
        self.service.before_step = stand_still
        self.service.values |= {"blocks": 100.0, "block_tokens": 16.0, "store_spans": 3.0}
        self.tokenizer = ByteTokenizer()
        self.transcripts = DictTexts()

    def close(self, drain: bool = True) -> None:
        if drain:
            print("closed with drain", file=sys.stderr, flush=True)
        self.service.close(drain=drain)


def open_service(config: object, progress: Callable[[str, int, int], None], on_lost: object) -> Opened:
    """As the engine's, in no time."""
    logging.getLogger("DeepSpeed").warning("noise of a library")
    progress("reading weights", 1, 2)
    progress("reading weights", 2, 2)
    progress("looking around", 0, 0)
    return Opened()


def noisy_logger() -> None:
    """DeepSpeed's: it writes to stdout whatever the root logger is set to."""
    logger = logging.getLogger("DeepSpeed")
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(logging.StreamHandler(sys.stdout))


def stay_on_this_machine() -> None:
    """`--host 0.0.0.0` means what it says to the server, but what listens in tests is reached from here only."""
    bind, is_loopback = listening.bind, listening.is_loopback
    said_open = []

    def bind_here(host: str, port: int) -> socket.socket:
        sock = bind("127.0.0.1" if host == "0.0.0.0" else host, port)
        if host == "0.0.0.0":
            said_open.append(sock)
        return sock

    listening.bind = bind_here
    listening.is_loopback = lambda sock: sock not in said_open and is_loopback(sock)


fake_open = types.ModuleType("mii_hcache.engine.open")
fake_open.open_service = open_service
sys.modules["mii_hcache.engine.open"] = fake_open
noisy_logger()
stay_on_this_machine()

from mii_hcache.serve.__main__ import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
