"""A Hugging Face model that is loaded already, with saved state behind it: `mii_hcache.attach`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from mii_hcache.config import HCacheConfig
from mii_hcache.core.methods import default_method, method_named
from mii_hcache.engine.sequence_runner import SequenceRunner
from mii_hcache.engine.transformers_adapter import TransformersEngine, fingerprint_of
from mii_hcache.errors import ConfigError, RequestError
from mii_hcache.runtime.generation import (
    FinishReason,
    RestoreReport,
    SamplingParams,
)
from mii_hcache.runtime.span_memory import span_memory
from mii_hcache.storage.open import Directories, OpenedState, open_state

_log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | torch.Tensor
"""A text (when a tokenizer was given), token ids, or a tensor of them: `[num_tokens]` or `[1, num_tokens]`."""


@dataclass(frozen=True, kw_only=True)
class AttachedResult:
    """How a generation of an attached model ended."""

    token_ids: tuple[int, ...]
    """Every generated token, the stop token included. Append them to `prompt_token_ids` to go on."""
    prompt_token_ids: tuple[int, ...]
    text: str | None
    """Text of `token_ids` without special tokens; None without a tokenizer."""
    finish_reason: FinishReason
    hcache: RestoreReport


class AttachedModel:
    """A Hugging Face model whose conversations are saved and come back. Any thread may call; calls run one at a time.

    Prompts with different salts never share state. Give token ids, not text, to restore answers to their very end.
    """

    def __init__(self, *, runner: SequenceRunner, state: OpenedState, tokenizer: Any) -> None:
        """Takes `runner` and `state` over."""
        self._runner = runner
        self._state = state
        self._tokenizer = tokenizer

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop_token_ids: Collection[int] | None = None,
        tenant_salt: bytes = b"",
    ) -> AttachedResult:
        """Continue a prompt: what is saved of it is restored, the rest is prefilled, all of it is saved.

        `temperature` 0 is greedy. `stop_token_ids` None takes the model's own, an empty one ignores EOS. Raises
        RequestError for a prompt that does not fit the model.
        """
        if stop_token_ids is None:
            eos = getattr(self._runner.engine.model.generation_config, "eos_token_id", None)
            stop_token_ids = [eos] if isinstance(eos, int) else eos or ()
        sampling = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_token_ids=frozenset(stop_token_ids),
        )
        prompt_ids = self._ids_of(prompt, max_new_tokens)
        token_ids, report = self._runner.generate(prompt_ids, sampling, tenant_salt)
        return AttachedResult(
            token_ids=tuple(token_ids),
            prompt_token_ids=tuple(prompt_ids),
            text=None if self._tokenizer is None else self._tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=FinishReason.STOP if token_ids[-1] in sampling.stop_token_ids else FinishReason.LENGTH,
            hcache=report,
        )

    def save(self, prompt: Prompt, *, tenant_salt: bytes = b"") -> int:
        """Run a history through the model and save it; nothing is generated. Returns how many of its tokens are saved
        (whole spans of 64), durable when there is a state directory."""
        return self._runner.save(self._ids_of(prompt, 0), tenant_salt)

    def restorable_tokens(self, prompt: Prompt, *, tenant_salt: bytes = b"") -> int:
        """How many leading tokens `restore` and `generate` would bring back now: whole spans of 64, never the last
        token, which is left to run because it gives the next one."""
        token_ids = self._ids_of(prompt, 0)
        return self._runner.look_up(token_ids, tenant_salt, max_tokens=len(token_ids) - 1).num_tokens

    def restore(self, prompt: Prompt, *, tenant_salt: bytes = b"") -> DynamicCache:
        """A cache of the caller's own that holds the prompt's restorable tokens (perhaps none), for the model's
        `generate(prompt, past_key_values=cache)`. What that generates is not saved."""
        token_ids = self._ids_of(prompt, 0)
        with self._runner.sequence(token_ids, tenant_salt, max_restored=len(token_ids) - 1) as (uid, _):
            return self._runner.engine.target(uid).cache

    def close(self) -> None:
        """Make saved state durable, release the state directory, leave the model as it was found. Idempotent."""
        self._runner.close()
        self._state.close()

    def __enter__(self) -> AttachedModel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ids_of(self, prompt: Prompt, num_new: int) -> list[int]:
        """Token ids of a prompt that is checked to leave room for `num_new` more."""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ConfigError("a text needs a tokenizer: attach(model, tokenizer=...), or give token ids")
            prompt = self._tokenizer(prompt)["input_ids"]
        ids = torch.as_tensor(prompt)
        if ids.numel() != ids.shape[-1]:
            raise RequestError(f"one prompt at a time, got shape {list(ids.shape)}", param="prompt")
        token_ids = ids.reshape(-1).tolist()
        self._runner.engine.check(token_ids, num_new)
        return token_ids


def attach(
    hf_model: Any,
    state_dir: Directories | None = None,
    *,
    tokenizer: Any = None,
    method: str | None = None,
    state_capacity_bytes: int = HCacheConfig.state_capacity_bytes,
    dram_capacity_bytes: int = HCacheConfig.dram_capacity_bytes,
) -> AttachedModel:
    """Save and restore the conversations of a loaded Hugging Face causal LM. The model stays usable on its own.

    Without `state_dir` state lives in host memory (`dram_capacity_bytes`) and ends with the process. `tokenizer`: the
    model's, when prompts are texts. `method`: hidden, kv or recompute; None takes the smaller of hidden and kv.

    Reads all weights once for the fingerprint (see `fingerprint_of`); blocks on I/O. Raises UnsupportedModelError,
    ConfigError, StateDirBusyError.
    """
    config = HCacheConfig(
        method=method, state_capacity_bytes=state_capacity_bytes, dram_capacity_bytes=dram_capacity_bytes
    )
    engine = TransformersEngine(hf_model)
    chosen = method_named(config.method) if config.method else default_method(engine.geometry)
    fingerprint = fingerprint_of(hf_model)
    state = open_state(
        state_dir, config.state_capacity_bytes, config.dram_capacity_bytes, io=config.io, memory=span_memory()
    )
    for note in state.notes:
        _log.warning(note)
    runner = SequenceRunner(engine=engine, store=state.store, method=chosen, fingerprint=fingerprint)
    return AttachedModel(runner=runner, state=state, tokenizer=tokenizer)
