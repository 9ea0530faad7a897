"""The engine itself beside others, on the same weights: our kernels, DeepSpeed's own, and plain transformers.

Restoring fast is worth little on an engine that serves slowly, and a comparison with recomputation is only as good as
the prefill that it is made of.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from experiments.common.random_weights import RandomCheckpoint, random_engine
from experiments.gpu_restore.ledger import Number
from experiments.gpu_restore.scales import Model, Scale, label
from experiments.gpu_restore.timing import Clock
from mii_hcache.engine.ragged_engine import HCacheEngine, token_tensors
from mii_hcache.errors import HCacheError

DECODED = 32
"""Tokens that are decoded one after the other; their time is taken as a whole."""
MOST_REPEATS = 3


def speeds(model: Model, scale: Scale, kernels: str) -> Iterator[Number]:
    """Of our engine with these kernels (`portable`, `stock`, `cuda`), or of `transformers`. A missing choice gives a
    row that says why."""
    name = label(model)
    longest = max(scale.speed_contexts) + DECODED + 64
    changes = {**(model.changes or {}), "max_position_embeddings": longest}
    try:
        if kernels == "transformers":
            run, close = _transformers(model, changes)
        else:
            run, close = _ours(model, scale, changes, kernels, longest)
    except (HCacheError, ImportError, RuntimeError) as error:
        note = f"not measured: {error}"[:400]
        yield Number(panel="speed.prefill", series=f"{name} {kernels}", x=0, y=None, unit="tokens/s", note=note)
        return
    clock = Clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"), scale.flush_bytes)
    try:
        for batch in (1, max(scale.decode_batches[:2])):
            for num_tokens in scale.speed_contexts:
                prompts = torch.randint(
                    3, 2000, (batch, num_tokens), generator=torch.Generator().manual_seed(num_tokens)
                )
                for stage, sample in run(clock, prompts, scale.repeats).items():
                    amount = batch * (num_tokens if stage == "prefill" else DECODED)
                    note = f"batch {batch}; {len(sample)} repetitions, median"
                    yield Number(
                        panel=f"speed.{stage}",
                        series=f"{name} {kernels}, batch {batch}",
                        x=num_tokens,
                        y=amount / sorted(sample)[len(sample) // 2],
                        unit="tokens/s",
                        note=note,
                    )
    finally:
        close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


Run = Callable[[Clock, torch.Tensor, int], dict[str, list[float]]]


def _repeats(clock: Clock, repeats: int, once: Callable[[], tuple[float, float]]) -> dict[str, list[float]]:
    """`once` gives seconds of a prefill and of the decoding behind it; the first time does not count."""
    found: dict[str, list[float]] = {"prefill": [], "decode": []}
    for turn in range(1 + min(repeats, MOST_REPEATS)):
        clock.flush()
        prefill_s, decode_s = once()
        if turn:
            found["prefill"].append(prefill_s)
            found["decode"].append(decode_s)
    return found


def _ours(
    model: Model, scale: Scale, changes: dict[str, Any], kernels: str, longest: int
) -> tuple[Run, Callable[[], None]]:
    size = max(scale.decode_batches[:2])
    engines: list[HCacheEngine] = [
        random_engine(
            model.shape,
            dtype=model.dtype,
            num_blocks=(size + 1) * -(-longest // scale.block_size),
            changes=changes,
            kernels=kernels,
            block_size=scale.block_size,
            max_batch_tokens=scale.max_batch_tokens,
        )
    ]

    def run(clock: Clock, prompts: torch.Tensor, repeats: int) -> dict[str, list[float]]:
        engine, uids = engines[0], list(range(len(prompts)))
        rows: Sequence[list[int]] = prompts.tolist()

        def prefill() -> list[int]:
            tokens = []
            for uid in uids:  # sequence by sequence, in the largest pieces
                for start in range(0, len(rows[uid]), engine.max_batch_tokens):
                    logits = engine.put([uid], token_tensors([rows[uid][start : start + engine.max_batch_tokens]]))
                tokens.append(logits[0].argmax())
            return [int(token) for token in tokens]

        def once() -> tuple[float, float]:
            tokens: list[int] = []
            prefill_s, _ = clock.once(lambda: tokens.extend(prefill()))

            def decode() -> None:
                last = tokens
                for _ in range(DECODED):
                    last = engine.put(uids, token_tensors([[token] for token in last])).argmax(-1).tolist()

            decode_s, _ = clock.once(decode)
            for uid in uids:
                engine.evict(uid)
            return prefill_s, decode_s

        return _repeats(clock, repeats, once)

    return run, engines.clear


def _transformers(model: Model, changes: dict[str, Any]) -> tuple[Run, Callable[[], None]]:
    from transformers import AutoModelForCausalLM

    from mii_hcache.engine.ragged_engine import DTYPES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = RandomCheckpoint(model.shape, 0, changes)
    checkpoint.model_config.dtype = DTYPES[model.dtype]
    with torch.device(device):
        built = AutoModelForCausalLM.from_config(checkpoint.model_config, dtype=DTYPES[model.dtype]).eval()
    built.load_state_dict(dict(checkpoint.parameters()))
    models: list[Any] = [built]

    @torch.inference_mode()
    def run(clock: Clock, prompts: torch.Tensor, repeats: int) -> dict[str, list[float]]:
        on_device = prompts.to(device)

        def once() -> tuple[float, float]:
            outputs: list[Any] = []
            prefill_s, _ = clock.once(
                lambda: (
                    outputs.append(models[0](on_device, use_cache=True, logits_to_keep=1))
                    or outputs[0].logits.argmax(-1).tolist()
                )
            )

            def decode() -> None:
                output = outputs[0]
                for _ in range(DECODED):
                    tokens = output.logits[:, -1].argmax(-1)[:, None]
                    output = models[0](tokens, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
                    output.logits[:, -1].argmax(-1).tolist()  # on the host after every step, as ours

            decode_s, _ = clock.once(decode)
            return prefill_s, decode_s

        return _repeats(clock, repeats, once)

    return run, models.clear
