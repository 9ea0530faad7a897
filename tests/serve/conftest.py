"""The demo tokenizer, transcripts in a dict, and a server over a fake engine with its clients."""

from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest
from serve_kit import MODEL, DictTexts, FakeService, live_server

if TYPE_CHECKING:
    from mii_hcache.engine.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def demo_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from mii_hcache.engine.demo_model import ensure_demo_model

    return ensure_demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def tokenizer(demo_path: Path) -> "Tokenizer":
    from mii_hcache.engine.tokenizer import Tokenizer

    return Tokenizer(demo_path)


@pytest.fixture
def known_texts() -> DictTexts:
    return DictTexts()


@pytest.fixture(scope="module")
def live(tokenizer):
    from mii_hcache.serve.app import create_app

    service = FakeService()
    known_texts = DictTexts()
    app = create_app(service, tokenizer, known_texts, MODEL, max_body_bytes=100_000)
    with live_server(app) as url:
        yield app, service, known_texts, url
    service.close()


@pytest.fixture
def service(live):
    app, service, known_texts, _ = live
    service.reset()
    known_texts.texts.clear()
    yield service
    app.state.answering.draining = False


@pytest.fixture
def known(live, service):
    return live[2]


@pytest.fixture
def http(live, service):
    with httpx.Client(base_url=live[3], timeout=30) as http:
        yield http


@pytest.fixture
def client(live, service):
    with openai.OpenAI(base_url=live[3] + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client
