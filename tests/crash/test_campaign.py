"""A short slice of the campaign, and proof that it can fail. The long one: `python -m tests.crash --help`."""

from __future__ import annotations

import pytest

from mii_hcache.storage.native import why_no_uring
from tests.crash import tripwires
from tests.crash.campaign import Plan, run_campaign
from tests.crash.kinds import KINDS
from tests.crash.mutations import MUTATIONS

SLOW = {"stall", "model"}
IOS = ["threads"] + ([] if why_no_uring() else ["uring"])


@pytest.mark.parametrize("io", IOS)
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"engine"}))  # tests/engine/test_restart.py is that one's slice
def test_a_few_cases_of_every_kind(kind, io, tmp_path):
    if kind in SLOW and io != IOS[-1]:
        pytest.skip("one backend is enough for the slice; the campaign runs it on all")
    num_cases = 3 if kind == "lost" else 1  # a power cut may leave nothing to verify
    report = run_campaign(Plan(kinds=[kind], ios=[io], paths=[1], seed=20, num_cases=num_cases), keep=tmp_path)
    if report.skipped:
        pytest.skip(str(report.skipped))
    assert report.failures == []
    (counts,) = report.counts.values()
    assert counts["cases"] == num_cases
    assert counts["chunks verified"] > 0


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_defect_is_found(mutation, tmp_path):
    _, kind = MUTATIONS[mutation]
    plan = Plan(kinds=[kind], ios=["threads"], paths=[1], seed=1, seconds=240, mutate=mutation, max_failures=1)
    report = run_campaign(plan)
    if report.skipped:
        pytest.skip(str(report.skipped))
    assert report.failures, "a campaign that cannot fail proves nothing"
    assert report.failures[0].error.startswith(("Broken", "WrongBytes")), "found by its own mistake"


@pytest.mark.parametrize("tripwire", tripwires.TRIPWIRES)
def test_tripwires_are_on_functions_that_exist(tripwire):
    if tripwire.startswith("uring") and len(IOS) == 1:
        pytest.skip(why_no_uring())
    tripwires.find(tripwire)
