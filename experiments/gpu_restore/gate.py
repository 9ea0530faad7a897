"""Whether what is restored is right, before anything is timed.

A model of the real shape with few layers, by the rules of `mii_hcache.tools.limits`. The same tokens run through the
same engine in different batches: what any two of these runs differ by at most is the engine's noise. A history that was
saved, evicted and restored may differ by so much and the half of it, teacher forced over an answer, and must give the
same token wherever the best two logits are clearly apart. What lay in the store as K and V must be the same bits, and
what was projected from hidden states within the rounding of that product, whatever the logits say. Blocks that are free
hold NaN all the time. Noise that is not finite fails, for it would allow anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from experiments.gpu_restore.ledger import GateFailed, Number
from experiments.gpu_restore.rig import History, Rig
from experiments.gpu_restore.scales import Model, Scale
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime.policy import RestoreChoice
from mii_hcache.tools.limits import Agreement, Limits, noise_of

ANSWER_TOKENS = 16
SPLITS = (64, 200, 256)
"""Pieces in which the history is run again for the noise, besides whole batches."""


def ways(num_layers: int, num_tokens: int) -> dict[str, tuple[StoragePlan, int, int]]:
    """Storage, leading tokens and leading layers that are computed again: every piece that a method is made of.
    `num_layers`: three at least, or one of them would store nothing."""
    if num_layers < 3:
        raise ValueError(f"the gate wants three layers at least, got {num_layers}")
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
        noise = 0.0  # of the longest, which is the first, at least: few tokens in two batches may agree by chance
        for num_tokens in (scale.gate_tokens, *scale.gate_ragged):
            for number in _check_length(rig, dtype, num_tokens, noise):
                noise = max(noise, number.y or 0.0) if number.series.endswith(" noise") else noise
                yield number
    finally:
        rig.close()


def _forced(rig: Rig, uid: int, answer: list[int], first: torch.Tensor) -> torch.Tensor:
    """Logits of every token of the answer, `[num_tokens, vocab]`, float32, on the host."""
    rows = [first.float().cpu()]
    rows += [rig.step([uid], [[token]])[0].float().cpu() for token in answer[:-1]]
    return torch.stack(rows)


def _check_length(rig: Rig, dtype: str, num_tokens: int, least_noise: float) -> Iterator[Number]:
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
    noise = max(least_noise, noise_of([whole, *_other_runs(rig, token_ids, answer)]))
    if not math.isfinite(noise):  # it would allow anything
        raise GateFailed(f"{series}, {num_tokens} tokens: the engine's own logits are not finite")
    limits = Limits(dtype=rig.engine.dtype, scale=float(whole.abs().max()), noise=noise)
    yield Number(panel="gate", series=f"{series} noise", x=num_tokens, y=noise, unit="logit")
    best = whole.topk(2, dim=-1).values
    clear = float((best[:, 0] - best[:, 1] > 2 * limits.logits).float().mean())
    yield Number(
        panel="gate.clear", series=series, x=num_tokens, y=clear, unit="ratio", note="tokens that are compared"
    )
    for name, (_, recompute_tokens, recompute_layers) in chosen.items():
        if num_whole == 0:
            break
        choice = RestoreChoice(
            recompute_tokens=recompute_tokens, recompute_layers=recompute_layers, tiers=("memory",), plan=None
        )
        restored, apart = _restored(rig, histories[name], choice, token_ids, answer, kept)
        agreement = Agreement()
        difference = agreement.add(restored, whole)
        complaints = agreement.complaints(limits, None)
        for kind, value in apart.items():
            if not value <= limits.kv(kind):  # NaN must not pass
                what = "the same bits" if kind is ChunkKind.KV else f"within {limits.kv(kind):.3g} of the largest"
                complaints.append(f"K and V that came back as {kind.value} are not {what}, but {value:.3g} apart")
        if complaints:
            raise GateFailed(f"{series}, {num_tokens} tokens, {name}: {'; '.join(complaints)}")
        yield Number(panel="gate", series=f"{series} {name}", x=num_tokens, y=difference, unit="logit")
        if ChunkKind.HIDDEN in apart:
            note = f"of a layer's largest, in K and V projected; {limits.kv(ChunkKind.HIDDEN):.3g} are allowed"
            yield Number(
                panel="gate.kv",
                series=f"{series} {name}",
                x=num_tokens,
                y=apart[ChunkKind.HIDDEN],
                unit="ratio",
                note=note,
            )
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
    kept: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, Mapping[ChunkKind, float]]:
    """Logits behind a restored history, and how far its K and V are from those of before (`_apart`)."""
    uid = rig.new_uid()
    rig.restore(uid, history, choice)
    apart = _apart(rig, uid, history, choice.recompute_tokens, kept)
    rest = token_ids[history.num_tokens :]
    # A whole history leaves no token to run: its last one is run again, as a server does with a resident's.
    if not rest:
        rig.engine.truncate(uid, history.num_tokens - 1)
        rest = token_ids[-1:]
    logits = _forced(rig, uid, answer, rig.prefill(uid, rest))
    rig.engine.evict(uid)
    return logits, apart


def _apart(
    rig: Rig, uid: int, history: History, first_token: int, kept: Sequence[torch.Tensor]
) -> Mapping[ChunkKind, float]:
    """By the kind in which they were stored: the largest difference of K and V from `first_token` on, over the layer's
    largest value. What was computed again is not among them."""
    found: dict[ChunkKind, float] = {}
    for layer_idx, (kind, before) in enumerate(zip(history.storage.kinds, kept, strict=True)):
        if kind is None:
            continue
        one, other = (kv[first_token:].float() for kv in (_kv(rig, uid, layer_idx, history.num_tokens), before))
        difference = float((one - other).abs().max() / other.abs().max())
        found[kind] = max(found.get(kind, 0.0), difference if math.isfinite(difference) else math.inf)
    return found


def _kv(rig: Rig, uid: int, layer_idx: int, num_tokens: int) -> torch.Tensor:
    """`[num_tokens, 2, num_kv_heads, head_size]` where the engine computes."""
    geometry = rig.geometry
    shape = (num_tokens, 2, geometry.num_kv_heads, geometry.head_size)
    out = torch.empty(shape, dtype=rig.engine.dtype, device=rig.engine.device)
    if num_tokens:
        rig.engine.target(uid).read_kv(layer_idx, 0, out)
    return out
