"""The demo tokenizer, and transcripts in a dict."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mii_hcache.engine.tokenizer import Tokenizer


class DictTexts:
    """`KnownTexts` by brute force."""

    def __init__(self) -> None:
        self.texts: dict[tuple[bytes, str], list[int]] = {}

    def remember(self, tenant: bytes, text: str, token_ids: Sequence[int]) -> None:
        self.texts[tenant, text] = list(token_ids)

    def longest_prefix(self, tenant: bytes, text: str) -> tuple[int, list[int]] | None:
        known = [key for key in self.texts if key[0] == tenant and text.startswith(key[1])]
        if not known:
            return None
        key = max(known, key=lambda key: len(key[1]))
        return len(key[1]), list(self.texts[key])


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
