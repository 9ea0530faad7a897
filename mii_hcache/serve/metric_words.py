"""What each of the engine's metrics says, for people who meet it at `/metrics`."""

from __future__ import annotations

WORDS = {
    # requests
    "requests_waiting": "Requests that wait for a place",
    "requests_restoring": "Requests whose history is coming back",
    "requests_running": "Requests that are being answered",
    "requests_refused_total": "Requests refused because too many were waiting",
    "requests_stop_total": "Answers that ended by themselves, at a stop token or a stop sequence",
    "requests_length_total": "Answers that ended at their length or at that of the context",
    "requests_cancelled_total": "Answers that nobody wanted any more",
    "requests_error_total": "Answers that failed",
    "preemptions_total": "Running requests set back for want of KV blocks; they are restored and go on",
    # steps
    "steps_total": "Forward passes of the engine",
    "step_errors_total": "Forward passes that failed, with all their requests",
    "prefill_tokens_total": "Prompt tokens computed",
    "generated_tokens_total": "Tokens generated",
    # KV blocks
    "blocks": "KV blocks in the pool",
    "blocks_free": "KV blocks that nobody holds",
    "block_tokens": "Tokens of a KV block",
    "resident_contexts": "Finished conversations whose KV blocks are still in place",
    "resident_tokens_total": "Prompt tokens found in KV blocks that were still in place",
    "evicted_residents_total": "Finished conversations whose KV blocks were taken for others",
    # restoring
    "restores_total": "Restores that brought something back",
    "restored_tokens_total": "Tokens brought back from saved state",
    "recomputed_tokens_total": "Tokens computed again while others were read",
    "restored_bytes_total": "Bytes of saved state that restores read",
    "restore_seconds_total": "Time from a request's admission to its restore's end",
    "restore_io_seconds_total": "Time in which restores were reading",
    "restore_compute_seconds_total": "Time in which restores were computing",
    "restore_bubble_seconds_total": "Time in which the busier of reading and computing idled within restores",
    "restore_cuts_total": "Restores that ended early: something was damaged, gone, or did not arrive in time",
    "restore_errors_total": "Restores that failed; their prompts were computed",
    "restores_not_worth_it_total": "Histories computed although saved, because that was planned to be faster",
    "regretted_restores_total": "Restores that took longer than computing would have; plans learn from them",
    "plan_errors_total": "Plans that could not be made or learnt from; the answer is right all the same",
    # saving
    "saved_spans_total": "Spans of 64 tokens that were saved",
    "saved_bytes_total": "Bytes that were saved",
    "saved_bytes_per_restored_token": "Bytes saved for each token that came back: what saving costs for its use",
    "spans_pending": "Spans accepted for saving that are not in the store yet",
    "save_wait_seconds_total": "Time that prefill steps waited for room to save their state",
    "save_errors_total": "Snapshots, spans or steps that could not be saved because of an error; see the log",
    "dropped_rows_total": "Token rows not snapshot, for want of room",
    "dropped_spans_total": "Spans that were snapshot and found no room in the store",
    "healed_spans_total": "Spans that had been dropped, and were read from the KV blocks before these went",
    "unhealed_spans_total": "Spans that were dropped and are lost; the next turn computes from there on",
    "unsaved_spans_total": "Spans given up at the end because a disk hung",
    # the store
    "store_spans": "Spans that are saved",
    "store_bytes": "Bytes of saved state",
    "store_capacity_bytes": "Most that saved state may take on disk",
    "store_put_bytes_total": "Bytes put into the store",
    "store_read_bytes_total": "Bytes read from the store",
    "store_evicted_spans_total": "Spans evicted for others",
    "store_evicted_ahead_spans_total": "Of the evicted spans, those that nobody waited for",
    "store_put_waits_total": "Times that a put had to wait for an eviction",
    "store_dropped_spans_total": "Spans refused for want of room or because of an I/O error",
    "store_corrupt_chunks_total": "Chunks that were read and were not what was written; they are forgotten",
    "store_unavailable_total": "Batches of reads or writes that failed because a disk did, or was away",
    "store_devices_away": "Disks that are missing, failing or hanging now",
    # host memory
    "host_pinned_bytes": "Host memory that a GPU copies from and to directly",
    "host_not_pinned_bytes": "Host memory that should be pinned and is not; copies are slower",
    # several ranks
    "shard_read_bytes_total": "Bytes that rank 0 read of its own share",
    "shard_written_bytes_total": "Bytes that rank 0 wrote of its own share",
    "lost_parts_total": "Shares of spans that a rank could not write, or did not have any more",
}
"""By the engine's name, without the prefix. Counters end in `_total`; other names are gauges."""
