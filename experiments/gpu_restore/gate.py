"""Whether what is restored is right, before anything is timed.

A model of the real shape with few layers. The same tokens run through the same engine in different batches give logits
that differ by rounding: the most that any two of these runs differ is the bound. A history that was saved, evicted and
restored must stay within it, teacher forced over an answer, and give the same token wherever the best two logits are
further apart than twice what is allowed. What came back as K and V must be the same bits. Blocks that are free hold NaN
all the time.

The bound is the most that happened in a few runs, and one more run of the same kind exceeds it now and then. So half as
much again is allowed; both numbers are in the rows. What a gate is for, a row in the wrong place or a read that came
too early, differs by whole logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch

from experiments.gpu_restore.ledger import GateFailed, Number
from experiments.gpu_restore.rig import History, Rig
from experiments.gpu_restore.scales import Model, Scale
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime.policy import RestoreChoice

ANSWER_TOKENS = 16
SPLITS = (64, 200, 256)
"""Pieces in which the history is run again for the bound, besides whole batches."""
SLACK = 1.5


def ways(num_layers: int, num_tokens: int) -> dict[str, tuple[StoragePlan, int, int]]:
    """Storage, leading tokens and leading layers that are computed again: every piece that a method is made of."""
    hidden, kv = ChunkKind.HIDDEN, ChunkKind.KV
    half = num_tokens // SPAN_TOKENS // 2 * SPAN_TOKENS

    def plan(*kinds: ChunkKind | None) -> StoragePlan:
        return StoragePlan(method="gate", kinds=kinds)

    rest = num_layers - 2
    return {
        "hidden": (plan(None, *(hidden,) * (num_layers - 1)), 0, 1),
        "kv": (plan(*(kv,) * num_layers), 0, 0),
        "hidden and kv": (plan(None, *(hidden,) * rest, kv), 0, 1),
        "hidden and kv, half the tokens computed": (plan(None, *(hidden,) * rest, kv), half, 1),
        "kv, half the tokens computed": (plan(*(kv,) * num_layers), half, 0),
        "two layers computed, then hidden": (plan(None, None, *(hidden,) * rest), 0, 2),
    }


def check(model: Model, scale: Scale, dtype: str) -> Iterator[Number]:
    """Raises GateFailed."""
    rig = Rig(model, scale, num_layers=model.gate_layers, dtype=dtype)
    try:
        bound = 0.0  # of the longest, which is the first, at least: few tokens in two batches may agree by chance
        for num_tokens in (scale.gate_tokens, *scale.gate_ragged):
            for number in _check_length(rig, dtype, num_tokens, bound):
                bound = max(bound, number.y or 0.0) if number.series.endswith(" bound") else bound
                yield number
    finally:
        rig.close()


def _forced(rig: Rig, uid: int, answer: list[int], first: torch.Tensor) -> torch.Tensor:
    """Logits of every token of the answer, `[num_tokens, vocab]`, float32, on the host."""
    rows = [first.float().cpu()]
    rows += [rig.step([uid], [[token]])[0].float().cpu() for token in answer[:-1]]
    return torch.stack(rows)


def _check_length(rig: Rig, dtype: str, num_tokens: int, least_bound: float) -> Iterator[Number]:
    """`num_tokens`: of the history; what of it makes no whole span is prefilled behind the restored part."""
    series = f"{rig.name} {dtype}"
    token_ids = rig.tokens(num_tokens, f"gate/{num_tokens}")
    answer = rig.tokens(ANSWER_TOKENS, f"answer/{num_tokens}")
    chosen = ways(rig.geometry.num_layers, num_tokens)
    uid = rig.new_uid()
    storages = {name: storage for name, (storage, _, _) in chosen.items()}
    histories, logits = rig.save(uid, token_ids, storages)
    num_whole = num_tokens // SPAN_TOKENS * SPAN_TOKENS
    kept = [_kv(rig, uid, layer_idx, num_whole) for layer_idx in range(rig.geometry.num_layers)]
    whole = _forced(rig, uid, answer, logits)
    rig.engine.evict(uid)
    runs = [whole, *_other_runs(rig, token_ids, answer)]
    bound = max(least_bound, *(float((one - other).abs().max()) for one, other in combinations(runs, 2)))
    allowed = SLACK * bound
    if not torch.isfinite(whole).all():
        raise GateFailed(f"{series}, {num_tokens} tokens: the engine's own logits are not finite")
    yield Number(panel="gate", series=f"{series} bound", x=num_tokens, y=bound, unit="logit")
    best = whole.topk(2, dim=-1).values
    is_clear = best[:, 0] - best[:, 1] > 2 * allowed
    clear = float(is_clear.float().mean())
    yield Number(
        panel="gate.clear", series=series, x=num_tokens, y=clear, unit="ratio", note="tokens that are compared"
    )
    for name, (_, recompute_tokens, recompute_layers) in chosen.items():
        if num_whole == 0:
            break
        choice = RestoreChoice(
            recompute_tokens=recompute_tokens, recompute_layers=recompute_layers, tiers=("memory",), plan=None
        )
        restored, is_same = _restored(rig, histories[name], choice, token_ids, answer, kept)
        difference = float((restored - whole).abs().max())
        yield Number(panel="gate", series=f"{series} {name}", x=num_tokens, y=difference, unit="logit")
        place = f"{series}, {num_tokens} tokens, {name}"
        if not difference <= allowed:  # NaN must not pass
            raise GateFailed(f"{place}: logits differ by {difference:g}, two batch splits by {bound:g}")
        if not torch.equal(restored.argmax(-1)[is_clear], whole.argmax(-1)[is_clear]):
            raise GateFailed(f"{place}: other tokens, though the best two are more than {2 * allowed:g} apart")
        if name == "kv" and not is_same:
            raise GateFailed(f"{place}: K and V are not the same bits")
    rig.forget(histories)


def _other_runs(rig: Rig, token_ids: list[int], answer: list[int]) -> Iterator[torch.Tensor]:
    """Logits of the answer, of the same tokens in other batches."""
    for chunk in SPLITS:
        uid = rig.new_uid()
        yield _forced(rig, uid, answer, rig.prefill(uid, token_ids, chunk=chunk))
        rig.engine.evict(uid)
    uid = rig.new_uid()  # the last token by itself, as it runs behind a history that was restored whole
    rig.prefill(uid, token_ids)
    rig.engine.truncate(uid, len(token_ids) - 1)
    yield _forced(rig, uid, answer, rig.prefill(uid, token_ids[-1:]))
    rig.engine.evict(uid)


def _restored(
    rig: Rig,
    history: History,
    choice: RestoreChoice,
    token_ids: list[int],
    answer: list[int],
    kept: list[torch.Tensor],
) -> tuple[torch.Tensor, bool]:
    """Logits behind a restored history, and whether its K and V are those of before."""
    uid = rig.new_uid()
    rig.restore(uid, history, choice)
    is_same = all(
        torch.equal(_kv(rig, uid, layer_idx, history.num_tokens), before) for layer_idx, before in enumerate(kept)
    )
    rest = token_ids[history.num_tokens :]
    # A whole history leaves no token to run: its last one is run again, as a server does with a resident's.
    if not rest:
        rig.engine.truncate(uid, history.num_tokens - 1)
        rest = token_ids[-1:]
    logits = _forced(rig, uid, answer, rig.prefill(uid, rest))
    rig.engine.evict(uid)
    return logits, is_same


def _kv(rig: Rig, uid: int, layer_idx: int, num_tokens: int) -> torch.Tensor:
    """`[num_tokens, 2, num_kv_heads, head_size]` on the host."""
    geometry = rig.geometry
    shape = (num_tokens, 2, geometry.num_kv_heads, geometry.head_size)
    out = torch.empty(shape, dtype=rig.engine.dtype, pin_memory=rig.clock.is_cuda)
    if num_tokens:
        rig.engine.target(uid).read_kv(layer_idx, 0, out)
        rig.clock.settle()
    return out
