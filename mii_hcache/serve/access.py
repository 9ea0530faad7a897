"""Who may ask a server, and what it may be called: settings, without the machinery that enforces them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mii_hcache.serve.keys import KeyRing

ANY = "*"
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(?::[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class Access:
    """What `gate.KnownHosts` and `gate.NeedsKey` let through."""

    keys: KeyRing = field(default_factory=KeyRing)
    hosts: Sequence[str] = ()
    """Names beside those of loopback, with a port or for all ports; `*`: any."""
    origins: Sequence[str] = ()
    """Pages that may ask, such as `https://chat.example`, beside those that the server sends itself; `*`: any."""


def host_name(host: str) -> str | None:
    """The name in a Host header, in small letters and without its port; None when it is malformed."""
    parts = _HOST.fullmatch(host.lower())
    return None if parts is None else parts[1].rstrip(".")
