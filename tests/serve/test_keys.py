"""API keys: where they come from, whom they let in, and that no two of them share state."""

import hashlib

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_kit import ASK, MODEL, DictTexts, FakeService, live_server

from mii_hcache.config import environment_api_keys
from mii_hcache.errors import ConfigError
from mii_hcache.serve.access import Access
from mii_hcache.serve.keys import ANYBODY, KeyRing, collect_keys
from mii_hcache.serve.options import parse_options

KEYS = ("sk-alice", "sk-bob")


@pytest.fixture(scope="module")
def guarded(tokenizer):
    """A server with keys: its service and URL."""
    from mii_hcache.serve.app import create_app

    service = FakeService()
    app = create_app(service, tokenizer, DictTexts(), MODEL, access=Access(keys=KeyRing(KEYS)))
    with live_server(app) as url:
        yield service, url
    service.close()


@pytest.fixture
def service(guarded):
    guarded[0].reset()
    return guarded[0]


@pytest.fixture
def url(guarded, service):
    return guarded[1]


def _client(url, key):
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=30)


def test_a_key_lets_in(url):
    with _client(url, KEYS[1]) as client:
        assert client.models.list().data[0].id == MODEL
        assert client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=3).choices


@pytest.mark.parametrize("key", ["wrong", "sk-alice ", "sk-alic", "sk-alicee", "SK-ALICE"])
def test_a_wrong_key_does_not(url, service, key):
    response = httpx.get(url + "/v1/models", headers={"Authorization": f"Bearer {key}x"}, timeout=30)
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    with _client(url, key + "x") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK)
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
    assert service.submitted == []


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "sk-alice")],
        [("Authorization", "Basic sk-alice")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer sk-alice"), ("Authorization", "Bearer sk-bob")],
        [("Authorization", b"Bearer sk-alice\xff")],
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing", "/health/"])
def test_no_proper_key_no_answer(url, headers, path):
    response = httpx.get(url + path, headers=headers, timeout=30)
    error = response.json()["error"]
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert set(error) == {"message", "type", "param", "code"} and "sk-alice" not in response.text


def test_health_needs_no_key_and_metrics_do(url):
    assert httpx.get(url + "/health", timeout=30).status_code == 200
    answer = httpx.get(url + "/metrics", headers={"Authorization": "bearer sk-alice"}, timeout=30)
    assert answer.status_code == 200


def test_two_keys_never_share_state(url, service):
    """Neither blocks nor saved state (the salt in the engine), nor the ids of a text (transcripts)."""
    messages, hits = list(ASK), []
    for key, salt in ((0, None), (0, None), (1, None), (1, None), (0, "x"), (1, "x"), (0, "x")):
        with _client(url, KEYS[key]) as client:
            body = {"ignore_eos": True} if salt is None else {"ignore_eos": True, "cache_salt": salt}
            reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9, extra_body=body)
            hits.append(reply.hcache["resident_tokens"] > 0)
            if len(hits) == 1:
                answer = reply.choices[0].message.content
    assert hits == [False, True, False, True, False, False, True]
    assert len({request.tenant_salt for request in service.submitted}) == 4
    turns = [*ASK, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    reasons = []
    for key in KEYS:
        service.sequences.clear()
        with _client(url, key) as client:
            reply = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=1)
            reasons.append(reply.hcache["miss_reason"])
    assert reasons[0] is None


@given(
    keys=st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1), min_size=2, unique=True),
    salts=st.lists(st.text(max_size=5), min_size=1, unique=True),
)
def test_salts_differ_by_key_and_by_cache_salt(keys, salts):
    ring = KeyRing(keys)
    made = [ring.tenant_of(key.encode()).salt(salt) for key in keys for salt in salts]
    assert len(set(made)) == len(made)
    assert not set(made) & {ANYBODY.salt(salt) for salt in salts}
    assert KeyRing(keys[:1]).tenant_of(keys[0].encode()).salt(None) == ring.tenant_of(keys[0].encode()).salt(None)


def test_the_salt_says_nothing_of_the_key():
    """It goes into the names of files; a plain hash of a weak key could be guessed from there."""
    key = b"sk-alice"
    salt = KeyRing([key.decode()]).tenant_of(key).salt(None)
    plain = {hashlib.blake2b(key, digest_size=32).digest(), hashlib.sha256(key).digest()}
    assert len(salt) == 32 and key not in salt and salt not in plain


def test_without_keys_the_salt_is_the_clients():
    """State that was saved before there were salts or keys is still found."""
    assert (ANYBODY.salt(None), ANYBODY.salt(""), ANYBODY.salt("a")) == (b"", b"", b"a")


def test_where_keys_come_from(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# for the team\n\n  sk-file \nsk-#2\n")
    monkeypatch.setenv("MII_HCACHE_API_KEY", "sk-env, sk-env2\n")
    assert environment_api_keys() == ["sk-env", "sk-env2"]
    keys = parse_options(["--api-key", "sk-given", "--api-key-file", str(file)]).access.keys
    assert len(keys) == 5
    for key in (b"sk-given", b"sk-file", b"sk-#2", b"sk-env", b"sk-env2"):
        assert keys.tenant_of(key) is not None
    for key in (b"", b"# for the team", b"sk-env,"):
        assert keys.tenant_of(key) is None


def test_an_empty_variable_is_no_key(monkeypatch):
    monkeypatch.setenv("MII_HCACHE_API_KEY", "")
    assert len(parse_options([]).access.keys) == 0


@pytest.mark.parametrize("key", ["", " ", "sk-sécret", "sk secret", "sk,secret", "sk-secret\n"])
def test_a_key_that_no_client_can_send_is_refused_and_not_said(key):
    with pytest.raises(ConfigError, match="--api-key") as caught:
        collect_keys([key], [], [])
    assert "secret" not in str(caught.value) and "sécret" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe", None])
def test_a_file_without_keys_is_refused(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="--api-key-file"):
        collect_keys([], [str(file)], [])


def test_keys_are_not_shown():
    assert "sk-alice" not in repr(parse_options(["--api-key", "sk-alice"]))
