"""Attention of one sequence's queries over its blocks: two ways with one meaning.

`attend_gathered` copies the history together and masks it: any device, any option. `attend_in_place` (CPU) reads each
run of neighbouring blocks where it lies, and merges the runs by their log-sum-exp: nothing is copied, so a decode step
reads the history once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mii_hcache.engine.modules.batch_plan import BatchSequence

_flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

MAX_RUNS = 24
"""More runs of neighbours than this cost more than a copy."""


def can_attend_in_place(kv_cache: torch.Tensor, sequence: BatchSequence, window: int | None) -> bool:
    """Whether `attend_in_place` is possible and worth it. Several queries with a window see different histories."""
    if _flash is None or kv_cache.device.type != "cpu" or len(sequence.runs) > MAX_RUNS:
        return False
    return window is None or sequence.num_tokens == 1 or sequence.num_total <= window


def attend_in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    sequence: BatchSequence,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of a sequence's last tokens, which see everything before them (a single one: its window).

    q: `[num_tokens, num_heads, head_size]`; k, v: `[num_tokens, num_kv_heads, head_size]`, already in the blocks too.
    Returns the shape of q.
    """
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    rows = kv_cache.view(-1, 2, num_kv_heads, head_size)
    block_size = kv_cache.shape[1]
    # All queries of a kv head in one row of queries: history is visible to each of them, so no mask is needed.
    folded = q.view(num_tokens, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
    folded = folded.reshape(1, num_kv_heads, group * num_tokens, head_size)
    stop = sequence.num_total if num_tokens == 1 else sequence.num_seen
    start = max(0, stop - window) if num_tokens == 1 and window is not None else 0
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    at = 0  # first token of the run
    for first_block, num_blocks in sequence.runs:
        first, last = max(start, at), min(stop, at + num_blocks * block_size)
        if first < last:
            row = first_block * block_size - at
            history = rows[row + first : row + last]
            parts.append(_flash(folded, _heads_first(history[:, 0]), _heads_first(history[:, 1]), scale=scale))
        at += num_blocks * block_size
    if num_tokens > 1:
        out, log_sum = _flash(
            _heads_first(q),
            _heads_first(k.repeat_interleave(group, 1)),
            _heads_first(v.repeat_interleave(group, 1)),
            is_causal=True,
            scale=scale,
        )
        parts.append((out.reshape(folded.shape), log_sum.reshape(1, num_kv_heads, group * num_tokens)))
    merged = _merge(parts).to(q.dtype)
    return merged.reshape(num_kv_heads, group, num_tokens, head_size).permute(2, 0, 1, 3).reshape(q.shape)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """`[num_tokens, heads, head_size]` as `[1, heads, num_tokens, head_size]`; no copy."""
    return x.transpose(0, 1)[None]


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention over the union of key sets from attention over each: outputs weighted by their share of the sum."""
    if len(parts) == 1:
        return parts[0][0]
    log_sums = torch.stack([log_sum for _, log_sum in parts])
    weights = log_sums.softmax(0)[..., None]
    merged = weights[0] * parts[0][0]
    for weight, (out, _) in zip(weights[1:], parts[1:], strict=True):
        merged = merged + weight * out
    return merged


def attend_gathered(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    sequence: BatchSequence,
    positions: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """q: `[num_tokens, num_heads, head_size]` of one sequence; positions: of its queries, None when they are the
    sequence's last tokens in order. Returns the shape of q."""
    block_size, _, num_kv_heads, head_size = kv_cache.shape[1:]
    skipped = 0  # blocks that lie before every query's window
    if window is not None and positions is None:
        skipped = max(0, sequence.num_seen + 1 - window) // block_size
    first = skipped * block_size
    num_total = sequence.num_total - first
    kv = kv_cache[sequence.block_ids[skipped:]].view(-1, 2, num_kv_heads, head_size)[:num_total]
    keys, values = _heads_first(kv[:, 0]), _heads_first(kv[:, 1])
    queries = _heads_first(q)
    is_gqa = queries.shape[1] != num_kv_heads

    sees_all = positions is None and sequence.num_tokens == 1 and window is None
    is_whole_prompt = positions is None and sequence.num_seen == 0 and window is None
    mask = None
    if not sees_all and (softcap is not None or not is_whole_prompt):
        at = torch.arange(sequence.num_seen - first, num_total, device=q.device) if positions is None else positions
        mask = _causal_mask(at, num_total, window)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and not sees_all,
            scale=scale,
            enable_gqa=is_gqa,
        )
        return attended[0].transpose(0, 1)
    if is_gqa:
        group = queries.shape[1] // num_kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = softcap * torch.tanh((queries.float() @ keys.float().transpose(-1, -2)) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ values.float()).to(q.dtype)[0].transpose(0, 1)


def _causal_mask(positions: torch.Tensor, num_total: int, window: int | None) -> torch.Tensor:
    """`[num_queries, num_total]`: which keys each query may see."""
    key_positions = torch.arange(num_total, device=positions.device)
    mask = key_positions[None] <= positions[:, None]
    if window is not None:
        mask &= key_positions[None] > positions[:, None] - window
    return mask
