"""The demo tokenizer, and transcripts in a dict."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from serve_kit import DictTexts

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
