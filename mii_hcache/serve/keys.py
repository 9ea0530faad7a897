"""API keys: who may ask, and whose state is whose."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mii_hcache.errors import ConfigError

_KEY = re.compile(r"[!-+\--~]+")
"""Visible ASCII without a comma: what the header can carry and the environment can list."""
_PERSON_KEY = b"hcache.apikey.v1"
_PERSON_TENANT = b"hcache.tenant.v1"


class Tenant:
    """Those who ask with the same key. Two tenants never share saved or resident state."""

    def __init__(self, secret: bytes = b"") -> None:
        """`secret`: made of the key; empty for those of a server without keys."""
        self._secret = secret

    def salt(self, cache_salt: str | None) -> bytes:
        """What sets a tenant's state apart; `cache_salt` divides it further, as the client likes."""
        own = (cache_salt or "").encode()
        if not self._secret:
            return own
        return hashlib.blake2b(own, key=self._secret, digest_size=32, person=_PERSON_TENANT).digest()


ANYBODY = Tenant()


class KeyRing:
    """The keys that open a server; without any, everybody may ask. The keys themselves are not kept."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._secrets = [_secret_of(key.encode()) for key in dict.fromkeys(keys)]

    def __len__(self) -> int:
        return len(self._secrets)

    def tenant_of(self, key: bytes) -> Tenant | None:
        """Whose key it is, None for nobody's. Takes the same time for every key."""
        presented, found = _secret_of(key), None
        for secret in self._secrets:
            if hmac.compare_digest(secret, presented):
                found = Tenant(secret)
        return found


def _secret_of(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=64, person=_PERSON_KEY).digest()


def collect_keys(given: Sequence[str], files: Sequence[str], listed: Sequence[str]) -> KeyRing:
    """Keys of the command line, of files (one a line; `#` starts a comment line) and of the environment.

    Raises ConfigError, which never says a key.
    """
    keys = [*_checked(given, "--api-key"), *_checked(listed, "MII_HCACHE_API_KEY")]
    for file in files:
        try:
            lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file!r} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"--api-key-file {file!r} has no key in it; write one a line")
        keys += _checked(found, f"--api-key-file {file!r}")
    return KeyRing(keys)


def _checked(keys: Sequence[str], source: str) -> Sequence[str]:
    if not all(_KEY.fullmatch(key) for key in keys):
        raise ConfigError(f"a key of {source} is empty or has characters other than visible ASCII without commas")
    return keys
