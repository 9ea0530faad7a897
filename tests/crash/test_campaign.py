"""A short slice of the campaign, and proof that it can fail. The long one: `python -m tests.crash --help`."""

from __future__ import annotations

import pytest

from mii_hcache.storage.native import why_no_uring
from tests.crash import tripwires
from tests.crash.campaign import Plan, run_campaign
from tests.crash.kinds import KINDS

IOS = ["threads"] + ([] if why_no_uring() else ["uring"])


@pytest.mark.parametrize("io", IOS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_cases_of_every_kind(kind, io, tmp_path):
    report = run_campaign(Plan(kinds=[kind], ios=[io], paths=[1], seed=20, num_cases=2), keep=tmp_path)
    if report.skipped:
        pytest.skip(str(report.skipped))
    assert report.failures == []
    (counts,) = report.counts.values()
    assert counts["cases"] == 2
    assert counts["chunks verified"] > 0


@pytest.mark.parametrize("tripwire", tripwires.TRIPWIRES)
def test_tripwires_are_on_functions_that_exist(tripwire):
    if tripwire.startswith("uring") and len(IOS) == 1:
        pytest.skip(why_no_uring())
    tripwires.find(tripwire)
