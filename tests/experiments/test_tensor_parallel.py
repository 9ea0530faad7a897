"""The experiment on ranks, small: what a row says of bytes and tokens is true."""

from __future__ import annotations

import json
import sys
from unittest import mock

from experiments.tensor_parallel import run
from tests.engine.parallel.forked import ForkedRank


def test_ranks_read_their_shares_and_say_the_same(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    small = ["--ranks", "1,2", "--methods", "kv,hidden", "--tokens", "256", "--mb-per-s", "200", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["run", *small, "--out", str(out)])
    with mock.patch("mii_hcache.engine.parallel.followers.subprocess.Popen", ForkedRank):
        run.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["method"], row["num_ranks"]) for row in rows] == [("kv", 1), ("kv", 2), ("hidden", 1), ("hidden", 2)]
    assert all(row["same_tokens"] and row["kind"] == "emulated" for row in rows)
    for alone, shared in ((rows[0], rows[1]), (rows[2], rows[3])):
        (num_bytes,) = alone["read_bytes_by_rank"]
        assert shared["read_bytes_by_rank"] == [num_bytes // 2] * 2 and num_bytes > 0
    assert len(capsys.readouterr().out.splitlines()) == 4
