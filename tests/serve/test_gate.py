"""Which requests are let in: a server on loopback must not serve the pages of any web site (DNS rebinding)."""

import asyncio
import json
import socket

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from serve_kit import MODEL, DictTexts, FakeService

from mii_hcache.serve.access import Access
from mii_hcache.serve.app import create_app
from mii_hcache.serve.gate import KnownHosts
from mii_hcache.serve.keys import KeyRing

OURS = ["localhost", "LocalHost:8000", "localhost.", "127.0.0.1", "127.0.0.1:1", "127.8.9.1:80", "[::1]", "[::1]:8000"]
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1",
           "[::2]", "0.0.0.0:8000", "evillocalhost", "localhost@evil.example", "127.0.0.1:8000:9", "[::1", "",
           "a b"]  # fmt: skip


@pytest.fixture
def service():
    service = FakeService()
    yield service
    service.close()


def _refusal(access, headers, address=("127.0.0.1", 8000)):
    """What becomes of a request that came in at `address`: status and error, (200, None) when it is let in."""
    sent = []

    async def inside(scope, receive, send):
        pass

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": headers, "server": address}
    asyncio.run(KnownHosts(inside, access=access)(scope, None, send))
    return (sent[0]["status"], json.loads(sent[1]["body"])["error"]) if sent else (200, None)


def _status(access, headers, address=("127.0.0.1", 8000)):
    return _refusal(access, headers, address)[0]


def _host(host, **settings):
    return _status(Access(**settings), [(b"host", host.encode())])


@pytest.mark.parametrize("host", OURS)
def test_names_of_loopback(host):
    assert _host(host) == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_names(host):
    assert _host(host) == 403


def test_the_refusal_says_what_to_do():
    _, error = _refusal(Access(), [(b"host", b"evil.example")])
    assert error["code"] == "host_not_allowed" and "--allowed-host" in error["message"]


def test_allowed_names():
    assert _host("llm.example:8000", hosts=["LLM.example"]) == 200
    assert _host("llm.example", hosts=["llm.example:8000"]) == 403
    assert _host("llm.example:8000", hosts=["llm.example:8000"]) == 200
    assert _host("a.llm.example", hosts=["llm.example"]) == 403
    assert _host("evil.example", hosts=["*"]) == 200


@pytest.mark.parametrize("address", ["192.168.1.5", "::ffff:192.168.1.5"])
def test_the_address_that_was_reached_is_a_name(address):
    for host, status in (("192.168.1.5:8000", 200), ("192.168.1.6:8000", 403)):
        assert _status(Access(), [(b"host", host.encode())], (address, 8000)) == status
    assert _status(Access(), [(b"host", b"[fe80::1]:8000")], ("fe80:0::1", 8000)) == 200


@pytest.mark.parametrize(
    "headers",
    [
        [(b"accept", b"*/*")],
        [(b"host", b"localhost"), (b"host", b"evil.example")],
        [(b"host", b"localhost"), (b"origin", b"http://localhost"), (b"origin", b"http://evil.example")],
    ],
)
def test_headers_that_are_missing_or_there_twice(headers):
    assert _status(Access(), headers) == 400


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", "http://localhost:8000", 200),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", 200),
        ("localhost", "http://localhost:80", 200),
        ("localhost:443", "https://localhost", 200),
        ("localhost:8000", "http://localhost:3000", 403),
        ("localhost:8000", "http://evil.example", 403),
        ("localhost:8000", "http://localhost:8000.evil.example", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "", 403),
        ("localhost:8000", "file://", 403),
        ("localhost:8000", "http://[", 403),
        ("evil.example", "http://evil.example", 403),  # what rebinding looks like
    ],
)
def test_origins(host, origin, status):
    assert _status(Access(), [(b"host", host.encode()), (b"origin", origin.encode())]) == status


def test_allowed_origins():
    for origins in (["https://Chat.example/"], ["*"]):
        headers = [(b"host", b"localhost"), (b"origin", b"https://chat.example")]
        assert _status(Access(origins=origins), headers) == 200


# --- the whole application ------------------------------------------------------------------------------------------


def _application(service, tokenizer, **settings):
    app = create_app(service, tokenizer, DictTexts(), MODEL, access=Access(**settings))
    return TestClient(app, base_url="http://localhost:8000")


def test_by_default_no_page_may_ask_or_read(service, tokenizer):
    client = _application(service, tokenizer)
    for path in ("/v1/models", "/health", "/metrics", "/openapi.json"):
        assert client.get(path).status_code == 200
        assert client.get(path, headers={"Host": "evil.example"}).status_code == 403
        answer = client.get(path, headers={"Origin": "http://evil.example"})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = client.options("/v1/chat/completions", headers=preflight)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    body = {"prompt": [5], "max_tokens": 1}
    assert client.post("/v1/completions", json=body, headers={"Origin": "http://evil.example"}).status_code == 403
    assert service.submitted == []


def test_pages_of_an_allowed_origin_ask_and_read(service, tokenizer):
    """A browser asks first without the key; the answer that there is no such key must be readable, too."""
    client = _application(service, tokenizer, origins=["https://chat.example"], keys=KeyRing(["sk-alice"]))
    page = {"Origin": "https://chat.example"}
    asks = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = client.options("/v1/completions", headers=asks)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    for key, status in (("sk-alice", 200), ("wrong", 401)):
        headers = {**page, "Authorization": f"Bearer {key}"}
        answer = client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1}, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "https://chat.example")
    assert client.get("/v1/models", headers={"Origin": "https://other.example"}).status_code == 403


def test_openais_client_says_what_it_is(live):
    headers = {"Origin": "http://evil.example"}
    with (
        openai.OpenAI(base_url=live[3] + "/v1", api_key="none", max_retries=0, default_headers=headers) as client,
        pytest.raises(openai.PermissionDeniedError, match="may not use this server") as caught,
    ):
        client.models.list()
    assert caught.value.code == "origin_not_allowed"


def test_over_a_socket(live):
    url = httpx.URL(live[3])
    answers = []
    for head in ("GET /health HTTP/1.1\r\nHost: evil.example\r\n", "GET /health HTTP/1.0\r\n"):
        with socket.create_connection((url.host, url.port), timeout=30) as sock:
            sock.sendall(f"{head}Connection: close\r\n\r\n".encode())
            answers.append(sock.recv(1000).split()[1])
    assert answers == [b"403", b"400"]
