"""Who is let in: requests that are meant for this server, from where it is used, with a key of its own.

A page of any web site can make a browser send requests to a server on the same machine, and can read the answers once
it has its own name resolve to that machine (DNS rebinding). So a server on loopback is not private by itself: requests
must name it by a name that it is known by (`Host`), and those made by a page (`Origin`) must come from its own or from
one that was allowed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mii_hcache.serve.access import ANY, Access, host_name
from mii_hcache.serve.errors import ApiError, answer_to
from mii_hcache.serve.keys import KeyRing, Tenant

TENANT = "mii_hcache.tenant"
"""Key of the scope under which `NeedsKey` leaves the `Tenant`."""
_OPEN_PATHS = frozenset({"/health"})
"""Need no key: probes have none, and it says nothing that is anybody's."""
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class KnownHosts:
    """ASGI middleware: 403 for requests under a foreign name, or made by a foreign page."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in access.hosts)
        self._origins = frozenset(origin.lower().rstrip("/") for origin in access.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; other scopes pass."""
        app = self._app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._check(headers.getlist("host"), headers.getlist("origin"), scope.get("server"))
            except ApiError as error:
                app = answer_to(error)
        await app(scope, receive, send)

    def _check(self, hosts: list[str], origins: list[str], address: Sequence[object] | None) -> None:
        if len(hosts) != 1 or len(origins) > 1:
            raise ApiError(400, "A request must have one Host header and at most one Origin.", code="invalid_headers")
        host = hosts[0].lower()
        if ANY not in self._hosts and not self._is_ours(host, address):
            raise ApiError(
                403,
                f"This server does not go by the name {host[:200]!r}. If it should, start it with --allowed-host.",
                code="host_not_allowed",
            )
        if origins and ANY not in self._origins:
            origin = origins[0].lower()
            if origin not in self._origins and not _is_same(origin, host):
                raise ApiError(
                    403,
                    f"Pages of {origin[:200]!r} may not use this server. If they should, start it with "
                    "--allowed-origin.",
                    code="origin_not_allowed",
                )

    def _is_ours(self, host: str, address: Sequence[object] | None) -> bool:
        """`address`: where the connection came in. Names can be rebound, addresses cannot."""
        name = host_name(host)
        if name is None:
            return False
        if name == "localhost" or host in self._hosts or name in self._hosts:
            return True
        ip = _address(name.strip("[]"))
        return ip is not None and (ip.is_loopback or (address is not None and ip == _address(str(address[0]))))


class NeedsKey:
    """ASGI middleware: 401 without a key, where there are keys; leaves the tenant in the scope."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; other scopes pass."""
        app = self._app
        if len(self._keys) and scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            try:
                scope[TENANT] = self._tenant_of(Headers(scope=scope).getlist("authorization"))
            except ApiError as error:
                app = answer_to(error)
        await app(scope, receive, send)

    def _tenant_of(self, headers: list[str]) -> Tenant:
        scheme, _, key = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("You didn't provide an API key: send it as Authorization: Bearer YOUR_KEY.", None)
        tenant = self._keys.tenant_of(key.strip().encode("latin-1"))
        if tenant is None:
            raise _unauthorized("Incorrect API key provided.", "invalid_api_key")
        return tenant


def _unauthorized(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})


def _is_same(origin: str, host: str) -> bool:
    """Whether a page of `origin` came from `host`."""
    scheme, _, rest = origin.partition("://")
    port = _DEFAULT_PORTS.get(scheme)
    return port is not None and rest.removesuffix(f":{port}") == host.removesuffix(f":{port}")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for names."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip  # a socket for both kinds sees the older one so
