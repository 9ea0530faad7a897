"""What the engine's tests share: tiny models, poisoned engines, a synchronous way to talk to a service."""

from __future__ import annotations

import itertools
import queue
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mii_hcache.config import HCacheConfig
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.methods import METHODS
from mii_hcache.engine.ragged_engine import HCacheEngine, build_engine, token_tensors
from mii_hcache.engine.service import EngineService
from mii_hcache.errors import HCacheError
from mii_hcache.runtime.generation import GenerationRequest, GenerationResult, SamplingParams
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.memory import MemoryStore

VOCAB = 1000
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def _tiny_config(name: str, **changes: Any) -> Any:
    """Odd shapes on purpose: heads that do not add up to the hidden size, 2 kv heads, tied heads, small windows."""
    import transformers as hf

    if name == "opt":
        opt = {
            "vocab_size": VOCAB,
            "hidden_size": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        return hf.OPTConfig(**{**opt, **changes})
    kind, own = {
        "llama": (hf.LlamaConfig, {"num_key_value_heads": 8}),
        "llama-gqa": (hf.LlamaConfig, {"num_key_value_heads": 2}),
        "llama-tied": (hf.LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 24}),
        "llama3-rope": (hf.LlamaConfig, {"num_key_value_heads": 4, "rope_parameters": _LLAMA3_ROPE}),
        "mistral": (hf.MistralConfig, {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 32}),
        "mistral-window": (hf.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 40, "head_dim": 16}),
        "mixtral": (
            hf.MixtralConfig,
            {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        ),
        "qwen2": (hf.Qwen2Config, {"num_key_value_heads": 2}),
        "qwen2-window": (
            hf.Qwen2Config,
            {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
        ),
        "qwen3": (hf.Qwen3Config, {"num_key_value_heads": 4, "head_dim": 40, "tie_word_embeddings": True}),
        "phi3": (hf.Phi3Config, {"num_key_value_heads": 4, "pad_token_id": 0, "sliding_window": 50}),
        "gemma": (
            hf.GemmaConfig,
            {"num_key_value_heads": 8, "head_dim": 32, "tie_word_embeddings": True, "pad_token_id": 0},
        ),
    }[name]
    return kind(**{**_LLAMA, "tie_word_embeddings": False, **own, **changes})


ALL_MODELS = (
    "llama",
    "llama-gqa",
    "llama-tied",
    "llama3-rope",
    "mistral",
    "mistral-window",
    "mixtral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "phi3",
    "gemma",
    "opt",
)


def tiny_hf_model(name: str, **changes: Any) -> Any:
    """A seeded Hugging Face model, with `changes` to its config. The weights are scaled up, so that greedy tokens vary
    and near-ties are rare; norms and biases are not what they are initialised to."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_tiny_config(name, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(1.0 if name == "gemma" and "embed" in parameter_name else 3.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save_tiny_model(name: str, path: Path, **changes: Any) -> None:
    """Write `tiny_hf_model(name, **changes)` as a checkpoint."""
    tiny_hf_model(name, **changes).save_pretrained(path)


def poisoned_engine(model_dir: Path, *, dtype: str = "float32", num_blocks: int = 400, **kwargs: Any) -> HCacheEngine:
    """An engine whose free blocks hold NaN: whoever reads what it did not write, or what was freed, gives nonsense."""
    engine = build_engine(str(model_dir), dtype=dtype, num_blocks=num_blocks, **kwargs)
    engine.poison_free_blocks()
    return engine


class ToldTap:
    """A tap that wants no rows, and calls `told(layer_idx, hidden)`."""

    def __init__(self, told: Callable[[int, torch.Tensor], None]) -> None:
        self.tap = told

    def rows_for(self, layer_idx: int, num_tokens: int) -> None:
        return None


_request_ids = itertools.count()


@dataclass
class Client:
    """Talks to a service and waits for answers."""

    service: EngineService

    def send(self, prompt: Sequence[int], num_tokens: int, **kwargs: Any) -> queue.SimpleQueue[GenerationResult]:
        """Submit a prompt; the result arrives in the queue."""
        results: queue.SimpleQueue[GenerationResult] = queue.SimpleQueue()
        then = kwargs.pop("on_token", lambda token_id: False)
        streamed: list[int] = []

        def on_token(token_id: int) -> bool:
            streamed.append(token_id)
            return bool(then(token_id))

        def on_finish(result: GenerationResult) -> None:
            if result.error is None and tuple(streamed) != result.token_ids:
                error = HCacheError(f"streamed {streamed}, finished with {result.token_ids}")
                result = replace(result, error=error)
            results.put(result)

        salt = kwargs.pop("tenant_salt", b"")
        self.service.submit(
            GenerationRequest(
                request_id=str(next(_request_ids)),
                prompt_token_ids=list(prompt),
                sampling=SamplingParams(max_new_tokens=num_tokens, **kwargs),
                on_finish=on_finish,
                on_token=on_token,
                tenant_salt=salt,
            )
        )
        return results

    def at_once(self) -> AbstractContextManager[Any]:
        """What is sent within the block reaches the engine together, whenever this thread gets to run."""
        return self.service._changed

    def ask(self, prompt: Sequence[int], num_tokens: int, **kwargs: Any) -> GenerationResult:
        """Submit and wait."""
        result = self.send(prompt, num_tokens, **kwargs).get(timeout=120)
        assert result.error is None, result.error
        return result


def open_client(
    engine: HCacheEngine,
    *,
    store: ChunkStore | None = None,
    method: str = "hidden",
    costs: Mapping[str, LayerCost] | None = None,
    **settings: Any,
) -> Client:
    """A service over an engine; the store is DRAM unless given. A prefill waits for room to save its state, however
    busy the machine is."""
    return Client(
        EngineService(
            engine=engine,
            store=store or MemoryStore(1 << 30),
            method=METHODS[method],
            fingerprint=b"test",
            config=HCacheConfig(method=method, **{"save_wait": 10.0, **settings}),
            costs=costs,
        )
    )


@dataclass
class Turn:
    """One turn of a conversation, as it went."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    report: Any


@dataclass
class Conversation:
    """Token ids that grow turn by turn."""

    seed: int
    token_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def next_prompt(self, num_new: int) -> list[int]:
        """The history and a new seeded message of `num_new` tokens."""
        chooser = random.Random(f"{self.seed}/{len(self.turns)}")
        return self.token_ids + [chooser.randrange(3, VOCAB) for _ in range(num_new)]

    def take(self, prompt: list[int], result: GenerationResult) -> None:
        """The answer becomes history."""
        assert result.error is None, result.error
        self.turns.append(Turn(len(prompt), result.token_ids, result.report))
        self.token_ids = prompt + list(result.token_ids)


def interleave(
    client: Client, num_conversations: int, num_turns: int, *, first_seed: int = 0, num_tokens: int = 20
) -> list[Conversation]:
    """Several conversations, turn by turn at the same time; lengths differ by conversation and turn."""
    conversations = [Conversation(first_seed + idx) for idx in range(num_conversations)]
    for turn in range(num_turns):
        sent = []
        with client.at_once():
            for idx, conversation in enumerate(conversations):
                prompt = conversation.next_prompt(17 + 53 * ((idx + turn) % 4))
                sent.append((conversation, prompt, client.send(prompt, num_tokens + 7 * idx)))
        for conversation, prompt, results in sent:
            conversation.take(prompt, results.get(timeout=120))
    return conversations


def answers(conversations: list[Conversation]) -> list[list[tuple[int, ...]]]:
    """Generated tokens of every turn."""
    return [[turn.token_ids for turn in conversation.turns] for conversation in conversations]


def restorable(turn: Turn) -> int:
    """Tokens that the turn after this one must restore: the last generated token was never run."""
    return 64 * ((turn.prompt_tokens + len(turn.token_ids) - 1) // 64)


def greedy(
    engine: HCacheEngine, uid: int, prompt: Sequence[int], num_tokens: int, chunk: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens by bare `put` calls of at most `chunk` tokens, and the logits `[num_tokens, vocab]` behind them."""
    logits = torch.empty(0)
    for start in range(0, len(prompt), chunk):
        logits = engine.put([uid], token_tensors([prompt[start : start + chunk]]))
    tokens, rows = [], []
    for _ in range(num_tokens):
        rows.append(logits[0].float())
        tokens.append(int(logits[0].argmax()))
        logits = engine.put([uid], token_tensors([[tokens[-1]]]))
    return tokens, torch.stack(rows)
