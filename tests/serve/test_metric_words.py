"""Every metric has a sentence, and every sentence a metric. Read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mii_hcache.runtime.generation import FinishReason, GenerationService
from mii_hcache.serve.metric_words import WORDS
from mii_hcache.serve.metrics import ServiceCollector

PACKAGE = Path(__file__).resolve().parents[2] / "mii_hcache"
GAUGES_OF = {"metrics", "gauges", "pinned_gauges"}
"""Functions that return metrics by name."""


def _names() -> Iterator[str]:
    for room in ("runtime", "engine"):
        for path in (PACKAGE / room).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            for name in re.findall(r'counters\s*\.\s*add\(\s*f?"([^"]+)"', source):
                yield from (re.sub(r"{.*}", reason.value, name) for reason in FinishReason)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef) and node.name in GAUGES_OF:
                    for part in ast.walk(node):
                        if isinstance(part, ast.Dict):
                            yield from (key.value for key in part.keys if isinstance(key, ast.Constant))


def test_every_metric_is_told_and_nothing_else():
    names = set(_names())
    assert len(names) > 50
    assert names == set(WORDS)
    assert all(words[0].isupper() and words[-1] not in ".,;" for words in WORDS.values())


def test_counters_are_there_before_they_count():
    class Service(GenerationService):
        def metrics(self) -> dict[str, float]:
            return {"restores_total": 3.0, "blocks": 7.0, "something_new": 1.0}

    Service.__abstractmethods__ = frozenset()
    found = {family.name: family for family in ServiceCollector(Service()).collect()}
    values = {name: family.samples[0].value for name, family in found.items()}
    assert (values["mii_hcache_restores"], values["mii_hcache_saved_spans"], values["mii_hcache_blocks"]) == (3, 0, 7)
    assert "mii_hcache_blocks_free" not in values, "a size that nobody tells is not 0"
    assert found["mii_hcache_saved_spans"].documentation == WORDS["saved_spans_total"]
    assert found["mii_hcache_something_new"].documentation == "something new"
