from __future__ import annotations

import argparse

import pytest

from mii_hcache.core.amounts import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("90m", 5400), (" 12 H", 43_200), ("30d", 2_592_000), ("2w", 1_209_600), ("1.5", 1.5)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1d", "1y", "1d2h", "nan"])
def test_what_is_no_duration(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no time"):
        parse_duration(text)
