"""Reading back all that a store has, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass, field

from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.transcripts import Transcripts
from tests.crash.ledger import ABSENT, Broken, Ledger
from tests.crash.spans import chunk_bytes, ids_of, make_record, reads_of, text_of, version_of


class WrongBytes(Broken):
    """A read said ok and brought other bytes than were written."""


@dataclass(kw_only=True)
class Findings:
    """What was there."""

    versions: dict[int, int] = field(default_factory=dict)
    """By name; ABSENT for a span that cannot be read whole."""
    num_chunks: int = 0
    """Compared, and right."""
    refused: list[str] = field(default_factory=list)
    """Spans that were found but could not be read, and why."""


def read_one(store: ChunkStore, name: int, scale: str, findings: Findings) -> int:
    """The version of a span that can be read whole, else ABSENT. Raises WrongBytes."""
    found = store.find(make_record(name, 1, scale).span_id)
    if found is None:
        return ABSENT
    version = version_of(found)
    if found != make_record(name, version, scale):
        raise WrongBytes(f"span {name}: the record is not the one that was put: {found}")
    reads = reads_of(found)
    outcome = store.get_into(reads)
    for chunk, read in zip(found.layout.chunks[: outcome.num_ok], reads, strict=False):
        if read.out != chunk_bytes(found, chunk):
            raise WrongBytes(f"span {name} version {version} layer {chunk.layer_idx} {chunk.kind}: wrong bytes served")
        findings.num_chunks += 1
    if outcome.num_ok < len(reads):
        findings.refused.append(f"span {name} version {version}: {outcome.reason}")
        return ABSENT
    return version


def read_forged(store: ChunkStore, ledger: Ledger, scale: str) -> int:
    """Every name, in a store whose rows may say anything: how many chunks were read, each of them as somebody put it
    for this very span, layer and kind. Raises WrongBytes."""
    num_chunks = 0
    for name in ledger.names:
        found = store.find(make_record(name, 1, scale).span_id)
        if found is None:
            continue
        reads = reads_of(found)
        outcome = store.get_into(reads)
        versions = [make_record(name, version, scale) for version in ledger.ever[name] if version != ABSENT]
        for chunk, read in zip(found.layout.chunks[: outcome.num_ok], reads, strict=False):
            if not any(
                (other.layer_idx, other.kind, other.shard) == (chunk.layer_idx, chunk.kind, chunk.shard)
                and read.out == chunk_bytes(version, other)
                for version in versions
                for other in version.layout.chunks
            ):
                raise WrongBytes(f"span {name} layer {chunk.layer_idx} {chunk.kind}: wrong bytes served")
            num_chunks += 1
    return num_chunks


def read_all(store: ChunkStore, ledger: Ledger, scale: str) -> Findings:
    """Every name. Raises WrongBytes, also for a version that nobody ever put."""
    findings = Findings()
    for name in ledger.names:
        version = findings.versions[name] = read_one(store, name, scale, findings)
        if version not in ledger.ever[name]:
            raise WrongBytes(f"span {name}: nobody put version {version}")
    return findings


def read_texts(transcripts: Transcripts, ledger: Ledger) -> set[int]:
    """The numbers of the texts that are remembered. Raises WrongBytes for ids of another text."""
    there = set()
    for number in sorted(ledger.texts):
        text = text_of(number)
        found = transcripts.longest_prefix(b"tenant", text)
        if found is None:
            continue
        num_chars, ids = found
        turns = [n for n in range(number - number % 8, number + 1) if len(text_of(n)) == num_chars]
        if len(turns) != 1 or ids != ids_of(turns[0]) or turns[0] not in ledger.texts:
            raise WrongBytes(f"text {number}: ids of another text")
        there.add(turns[0])
    return there
