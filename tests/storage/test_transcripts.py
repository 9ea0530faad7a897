"""The longest remembered text that a text begins with, and the ids that it was generated as."""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from array import array
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.storage.rolling import STEP_CHARS, RollingText
from mii_hcache.storage.transcripts import Transcripts
from tests.storage.storage_kit import wait_until


def ids_of(text: str) -> list[int]:
    """Ids that follow from the text, one for every three characters or so."""
    rng = random.Random(text.encode("utf-8", "surrogatepass"))
    return [rng.randrange(1 << 32) for _ in range(len(text) // 3 + 1)]


def brute_force(known: dict[tuple[bytes, str], list[int]], tenant: bytes, text: str):
    found = [said for who, said in known if who == tenant and text.startswith(said)]
    longest = max(found, key=len, default=None)
    return None if longest is None else (len(longest), known[tenant, longest])


pieces = st.one_of(
    st.text(alphabet="ab", max_size=3),
    st.integers(0, 3).map(lambda num: "x" * (STEP_CHARS * num)),
    st.integers(STEP_CHARS - 2, STEP_CHARS + 2).map(lambda num: "y" * num),
    st.sampled_from(["é", "日本", "😀", "\ud800", "\0"]),
)
texts = st.lists(pieces, max_size=5).map("".join)


@settings(max_examples=300)
@given(
    said=st.lists(st.tuples(st.sampled_from([b"", b"t"]), texts), max_size=8),
    asked=st.lists(st.tuples(st.sampled_from([b"", b"t"]), texts), max_size=8),
)
def test_finds_what_brute_force_finds(said, asked):
    transcripts = Transcripts(None)
    known: dict[tuple[bytes, str], list[int]] = {}
    for tenant, text in said:
        known.setdefault((tenant, text), ids_of(text))
        transcripts.remember(tenant, text, ids_of(text))
    for tenant, text in [*asked, *[(tenant, text + "more") for tenant, text in said], *said]:
        assert transcripts.longest_prefix(tenant, text) == brute_force(known, tenant, text)
    assert len(transcripts) == len(known)


def conversation(num_turns: int, seed: int = 0) -> list[tuple[str, list[int]]]:
    """Text and ids at the end of each answer: each begins with the one before."""
    rng = random.Random(seed)
    text, ids, turns = "", [], []
    for turn_idx in range(num_turns):
        text += f"user {turn_idx}: " + "".join(rng.choices("abcdef ", k=rng.randrange(20, 900)))
        ids = ids + [rng.randrange(50_000) for _ in range(rng.randrange(5, 250))]
        turns.append((text, ids))
    return turns


def test_a_long_conversation_is_stored_in_linear_space(tmp_path):
    turns = conversation(300)
    transcripts = Transcripts(tmp_path / "t.sqlite", flush_interval_s=None)
    for text, ids in turns:
        transcripts.remember(b"t", text, ids)
    transcripts.flush()
    ids_bytes = 4 * len(turns[-1][1])
    assert transcripts.num_bytes < ids_bytes + 300 * 300
    transcripts.close()
    assert (tmp_path / "t.sqlite").stat().st_size < 2 * ids_bytes + 300 * 600
    transcripts = Transcripts(tmp_path / "t.sqlite")
    for text, ids in random.Random(1).sample(turns, 20):
        assert transcripts.longest_prefix(b"t", text + "x") == (len(text), ids)
    transcripts.close()


def test_look_up_in_a_long_text_among_many_is_fast():
    transcripts = Transcripts(None)
    for idx in range(3000):  # many short texts with a common beginning
        transcripts.remember(b"t", "system prompt " * 200 + f"question {idx}", [1, 2, idx])
    text = "".join(random.Random(0).choices("abcdef ", k=400_000))
    transcripts.remember(b"t", text[:300_000], list(range(1000)))
    best_s = 1e9
    for _ in range(3):
        started_s = time.thread_time()
        assert transcripts.longest_prefix(b"t", text) == (300_000, list(range(1000)))
        assert transcripts.longest_prefix(b"t", "system prompt " * 200 + "question 77!") is not None
        best_s = min(best_s, time.thread_time() - started_s)
    assert best_s < 0.25


def test_tenants_do_not_see_each_other():
    transcripts = Transcripts(None)
    transcripts.remember(b"a", "bc", [1])
    assert transcripts.longest_prefix(b"a", "bc") == (2, [1])
    for tenant, text in ((b"b", "bc"), (b"", "bc"), (b"", "abc"), (b"ab", "c"), (b"a\0", "bc")):
        assert transcripts.longest_prefix(tenant, text) is None
    transcripts.remember(b"b", "bc", [2])
    assert transcripts.longest_prefix(b"a", "bc") == (2, [1])
    assert transcripts.longest_prefix(b"b", "bcd") == (2, [2])


def test_a_text_keeps_its_first_ids():
    transcripts = Transcripts(None)
    transcripts.remember(b"", "ab", [1, 2])
    transcripts.remember(b"", "abc", [1, 2, 3])
    transcripts.remember(b"", "ab", [7])
    assert transcripts.longest_prefix(b"", "ab") == (2, [1, 2])
    assert transcripts.longest_prefix(b"", "abc") == (3, [1, 2, 3])


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 9, 3, 4], [9, 9, 9], [1, 2, 3, 4, 5]])
def test_ids_need_not_go_on_from_those_of_the_shorter_text(ids):
    transcripts = Transcripts(None)
    transcripts.remember(b"", "ab", [1, 2, 3])
    transcripts.remember(b"", "abc", ids)
    transcripts.remember(b"", "abcd", [*ids, 5])
    assert transcripts.longest_prefix(b"", "ab") == (2, [1, 2, 3])
    assert transcripts.longest_prefix(b"", "abc!") == (3, ids)
    assert transcripts.longest_prefix(b"", "abcd") == (4, [*ids, 5])


@pytest.mark.parametrize("bad", [-1, 2**32])
def test_impossible_ids_are_refused(bad):
    transcripts = Transcripts(None)
    with pytest.raises(OverflowError):
        transcripts.remember(b"", "ab", [1, bad])
    assert transcripts.longest_prefix(b"", "ab") is None


def test_restart_and_the_text_itself_is_not_stored(tmp_path):
    path = tmp_path / "t.sqlite"
    transcripts = Transcripts(path)
    text = "my secret is forty-two, tell nobody"
    transcripts.remember(b"tenant-name", text, [4, 2])
    transcripts.close()
    transcripts.close()
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"secret" not in data
    assert b"tenant-name" not in data
    transcripts = Transcripts(path)
    assert transcripts.longest_prefix(b"tenant-name", text) == (len(text), [4, 2])
    assert transcripts.note is None
    transcripts.close()


def test_durable_soon_without_a_flush(tmp_path):
    transcripts = Transcripts(tmp_path / "t.sqlite", flush_interval_s=0.05)
    transcripts.remember(b"", "ab", [1])

    def num_rows() -> int:
        with closing(sqlite3.connect(tmp_path / "t.sqlite")) as connection:
            return connection.execute("SELECT count(*) FROM transcript").fetchone()[0]

    wait_until(lambda: num_rows() == 1)
    transcripts.close()


def test_a_crash_keeps_what_was_flushed(tmp_path):
    (tmp_path / "a").mkdir()
    transcripts = Transcripts(tmp_path / "a" / "t.sqlite", flush_interval_s=None)
    turns = conversation(6)
    for text, ids in turns[:4]:
        transcripts.remember(b"", text, ids)
    transcripts.flush()
    for text, ids in turns[4:]:
        transcripts.remember(b"", text, ids)
    assert transcripts.longest_prefix(b"", turns[5][0]) == (len(turns[5][0]), turns[5][1])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    crashed = Transcripts(tmp_path / "b" / "t.sqlite")
    assert crashed.longest_prefix(b"", turns[5][0]) == (len(turns[3][0]), turns[3][1])
    crashed.close()
    transcripts.close()


def test_bounded_the_least_recently_used_go_first_and_chains_from_their_end(tmp_path):
    transcripts = Transcripts(tmp_path / "t.sqlite", capacity_bytes=8000, flush_interval_s=None)
    first, second = conversation(3, 1), conversation(3, 2)
    for idx, (text, ids) in enumerate([*first, *second]):
        transcripts.remember(b"", text, ids[: 5 * (idx + 1)])
    assert transcripts.longest_prefix(b"", first[0][0]) is not None
    gone = []
    for idx in range(40):
        transcripts.remember(b"", f"other {idx}", [idx] * 10)
        assert transcripts.num_bytes <= 8000
        assert len(transcripts) <= 8000 // 256
        for name, turns in (("first", first), ("second", second)):
            for turn_idx, (text, _) in reversed([*enumerate(turns)]):
                if not _is_remembered(transcripts, text) and (name, turn_idx) not in gone:
                    gone.append((name, turn_idx))
    assert gone == [("first", 2), ("first", 1), ("second", 2), ("second", 1), ("second", 0), ("first", 0)]
    transcripts.remember(b"", "too large", list(range(3000)))
    assert transcripts.longest_prefix(b"", "too large") is None
    assert len(transcripts) > 10
    transcripts.close()
    transcripts = Transcripts(tmp_path / "t.sqlite", capacity_bytes=2000)
    assert 0 < transcripts.num_bytes <= 2000
    assert transcripts.longest_prefix(b"", "other 39") == (8, [39] * 10)
    transcripts.close()


def _is_remembered(transcripts: Transcripts, text: str) -> bool:
    """Whether there is a row of exactly this text; asking does not count as use."""
    return RollingText(b"", text).whole()[0] in transcripts._rows


def test_forget_takes_a_conversation_but_not_what_others_share(tmp_path):
    transcripts = Transcripts(tmp_path / "t.sqlite", flush_interval_s=None)
    for text in ("ab", "abcd", "abcdef", "abXY"):
        transcripts.remember(b"", text, list(map(ord, text)))
    transcripts.flush()
    assert transcripts.forget(b"u", "abcdef") == 0
    assert transcripts.forget(b"", "abcdef and more") == 2
    assert transcripts.longest_prefix(b"", "abcdef") == (2, [97, 98])
    assert transcripts.longest_prefix(b"", "abXY") == (4, [97, 98, 88, 89])
    assert transcripts.forget(b"", "abXY") == 2
    assert len(transcripts) == 0
    transcripts.close()
    assert array("I", map(ord, "ef")).tobytes() not in (tmp_path / "t.sqlite").read_bytes()
    transcripts = Transcripts(tmp_path / "t.sqlite")
    assert len(transcripts) == 0
    transcripts.close()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE transcript SET delta = zeroblob(length(delta)) WHERE rowid = 2",
        "UPDATE transcript SET delta = substr(delta, 5) WHERE rowid = 2",
        "UPDATE transcript SET delta = substr(delta, 2) WHERE rowid = 2",
        "UPDATE transcript SET num_kept = num_kept - 1 WHERE rowid = 2",
        "UPDATE transcript SET parent = NULL WHERE rowid = 2",
        "UPDATE transcript SET parent = key WHERE rowid = 2",
        "UPDATE transcript SET parent = (SELECT key FROM transcript WHERE rowid = 3) WHERE rowid = 2",
        "UPDATE transcript SET parent = randomblob(32) WHERE rowid = 2",
        "UPDATE transcript SET seal = randomblob(16) WHERE rowid = 2",
        "UPDATE transcript SET num_chars = num_chars + 1 WHERE rowid = 2",
        "UPDATE transcript SET anchor = randomblob(32) WHERE rowid = 2",
        "UPDATE transcript SET key = randomblob(32) WHERE rowid = 2",
        "UPDATE transcript SET key = x'' WHERE rowid = 2",
        "DELETE FROM transcript WHERE rowid = 2",
        """UPDATE transcript SET (delta, seal, parent, num_kept) =
            (SELECT delta, seal, parent, num_kept FROM transcript WHERE rowid = 1) WHERE rowid = 2""",
    ],
)
def test_a_damaged_row_is_a_miss_and_can_be_remembered_anew(tmp_path, sql):
    turns = conversation(3)
    transcripts = Transcripts(tmp_path / "t.sqlite")
    for text, ids in turns:
        transcripts.remember(b"", text, ids)
    transcripts.close()
    connection = sqlite3.connect(tmp_path / "t.sqlite")
    connection.execute(sql)
    connection.commit()
    connection.close()
    transcripts = Transcripts(tmp_path / "t.sqlite")
    assert transcripts.note is None
    known = {(b"", text): ids for text, ids in turns}
    for text, _ in turns:
        found = transcripts.longest_prefix(b"", text)
        assert found is None or found in [brute_force(known, b"", text[:num]) for num in range(len(text) + 1)]
    assert transcripts.longest_prefix(b"", turns[1][0]) == (len(turns[0][0]), turns[0][1])
    for text, ids in turns:
        transcripts.remember(b"", text, ids)
    for text, ids in turns:
        assert transcripts.longest_prefix(b"", text) == (len(text), ids)
    transcripts.close()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE transcript SET num_chars = 'many'",
        "UPDATE transcript SET num_chars = -1",
        "UPDATE transcript SET num_kept = -1",
        "UPDATE transcript SET delta = 7",
        "DROP TABLE transcript",
        "PRAGMA user_version = 9",
    ],
)
def test_a_database_that_makes_no_sense_is_set_aside(tmp_path, sql):
    transcripts = Transcripts(tmp_path / "transcripts.sqlite")
    transcripts.remember(b"", "ab", [1])
    transcripts.close()
    connection = sqlite3.connect(tmp_path / "transcripts.sqlite")
    connection.execute(sql)
    connection.commit()
    connection.close()
    transcripts = Transcripts(tmp_path / "transcripts.sqlite")
    assert "set aside as transcripts.damaged-1.sqlite" in transcripts.note
    assert len(transcripts) == 0
    transcripts.remember(b"", "ab", [1])
    transcripts.close()
    transcripts = Transcripts(tmp_path / "transcripts.sqlite")
    assert transcripts.note is None
    assert transcripts.longest_prefix(b"", "ab") == (2, [1])
    transcripts.close()


def test_random_bit_flips_never_give_wrong_ids(tmp_path):
    turns = conversation(8)
    known = {(b"", text): ids for text, ids in turns}
    transcripts = Transcripts(tmp_path / "t.sqlite")
    for text, ids in turns:
        transcripts.remember(b"", text, ids)
    transcripts.close()
    data = (tmp_path / "t.sqlite").read_bytes()
    rng = random.Random(3)
    num_hit = 0
    for round_idx in range(40):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 30])):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / str(round_idx)).mkdir()
        (tmp_path / str(round_idx) / "t.sqlite").write_bytes(damaged)
        transcripts = Transcripts(tmp_path / str(round_idx) / "t.sqlite")
        for text, _ in turns:
            found = transcripts.longest_prefix(b"", text)
            if found is not None:
                assert found == (found[0], known[b"", text[: found[0]]])
                num_hit += 1
        transcripts.close()
    assert num_hit > 20


def test_a_database_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch):
    transcripts = Transcripts(tmp_path / "t.sqlite", flush_interval_s=None)

    def refused(change, durable=True):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(transcripts._database, "transact", refused)
        transcripts.remember(b"", "ab", [1])
        transcripts.flush()
        assert transcripts.longest_prefix(b"", "ab") == (2, [1])
    transcripts.close()
    transcripts = Transcripts(tmp_path / "t.sqlite")
    assert transcripts.longest_prefix(b"", "ab") == (2, [1])
    transcripts.close()


def test_last_uses_that_cannot_be_written_are_tried_again(tmp_path, monkeypatch):
    """Or a text that is used every day would be forgotten as one that was not."""
    transcripts = Transcripts(tmp_path / "t.sqlite", flush_interval_s=None)
    for text in ("old", "young"):
        transcripts.remember(b"", text, [1])
    transcripts.flush()
    transcripts._ticks_due_s = 0.0  # as after half a minute
    transcripts._recency._clock = lambda: time.time() + 60.0
    assert transcripts.longest_prefix(b"", "old") == (3, [1])

    def refused(change, durable=True):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(transcripts._database, "transact", refused)
        transcripts.flush()
    transcripts.close()
    transcripts = Transcripts(tmp_path / "t.sqlite")
    assert transcripts.expire(time.time() + 30.0) == 1
    assert [transcripts.longest_prefix(b"", text) for text in ("old", "young")] == [(3, [1]), None]
    transcripts.close()


def test_threads(tmp_path):
    import threading

    transcripts = Transcripts(tmp_path / "t.sqlite", capacity_bytes=60_000, flush_interval_s=0.005)
    errors = []

    def work(seed: int) -> None:
        try:
            turns = conversation(12, seed % 2)
            for _ in range(3):
                for text, ids in turns:
                    transcripts.remember(b"", text, ids)
                    found = transcripts.longest_prefix(b"", text)
                    if found is not None:
                        assert found in [(len(said), said_ids) for said, said_ids in turns]
                transcripts.forget(b"", turns[5][0])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    transcripts.close()
