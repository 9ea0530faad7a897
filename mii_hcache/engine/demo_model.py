"""A small Llama-2-shaped model with random weights, made on the spot. It talks gibberish.

It exists to exercise the machinery without a download: it has what a real model has (rotary attention, a byte-level BPE
tokenizer, a chat template, an end token that comes up now and then) and its next token depends on all of its context,
so that wrongly restored state changes the answer.

The bytes are the same on every machine: weights come from SHAKE-128 streams named after their tensors, not from a
library's random generator, and the tokenizer is trained on text composed from the words below.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

_REVISION = 1
"""Part of the folder's name; raise it whenever anything below changes the files."""
_SEED = "mii_hcache demo model 1"
_VOCAB_SIZE = 2048
_HIDDEN_SIZE = 256
_NUM_LAYERS = 4
_NUM_HEADS = 8
_INTERMEDIATE_SIZE = 512
_MAX_CONTEXT_TOKENS = 4096

_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
_SPECIAL_TOKENS = [_PAD, _BOS, _EOS, "<|system|>", "<|user|>", "<|assistant|>"]
_EOS_LOGIT_SCALE = 1.45
"""Row norm of the end token against the others: about one token in a hundred is an end."""

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

_NOUNS = """
answer apple architect autumn bakery balance basket battery beach bicycle bird boat book border bottle branch bread
bridge builder building butter cabin camera candle captain carpenter castle chair chapter child circle city climate
clock cloud coast coffee colour column company compass computer concert conversation corner country course crystal
daughter decision desert device diagram dictionary doctor document door dream driver dust eagle earth edge engine
evening example experiment factory family farmer feather festival field figure finger fire flower forest fountain
friend future garden gate ghost glass grandmother grass guitar hammer harbour harvest history holiday horizon horse
hospital hour house idea island journey juice keyboard kitchen knife ladder lake lamp language laughter layer leader
leaf lecture lemon letter library light lighthouse machine magazine market material meadow meaning measure medicine
memory message meter midnight mirror model moment money month moon morning mountain museum music mystery needle
neighbour network newspaper night notebook number ocean office onion opinion orange orchestra organ oven page painter
paper parent passenger pattern pencil people pepper person philosopher picture pilot planet plant platform pocket poem
police potato power president prince problem programme promise prompt question rabbit radio railway rain reader reason
recipe record restaurant result river road rocket roof room root sailor sand school science season secret sentence
shadow shelter ship shoulder signal silence sister sky smoke snow soldier song sound spring square stair star station
stone storage story stranger street student summer sunlight surface system table teacher telephone temperature theatre
theory thunder ticket token tomorrow tower town traffic train traveller treasure tree truth tunnel umbrella uncle
valley vector vehicle village violin visitor voice wagon water weather week whisper wind window winter wisdom witness
wolf woman wonder word workshop writer year yesterday
"""
_VERBS = """
accepts admires answers arranges asks balances becomes begins believes borrows breaks brings builds calculates carries
catches changes chooses cleans climbs collects compares completes computes connects considers contains continues copies
counts covers creates crosses decides delivers describes discovers divides draws drives explains explores finds follows
forgets gathers gives grows guards guesses hears helps hides holds imagines improves invents joins keeps knows learns
leaves listens loses loves measures meets mentions moves needs notices observes offers opens orders paints passes plans
prepares presses produces protects proves pulls pushes reads receives recognises records remembers repairs repeats
replaces restores returns reveals saves searches sees sells sends separates shares shows sings sleeps solves speaks
stores studies suggests supports surprises teaches tells thinks touches translates travels trusts turns understands
uses visits waits walks wants warns washes watches wears whispers wins wishes works writes
"""
_ADJECTIVES = """
ancient angry beautiful bitter black blue brave brief bright broken brown calm careful cheap clean clear clever cold
common complete curious dangerous dark deep different difficult distant double early eastern empty equal fair famous
fast final first forgotten foreign free fresh friendly gentle golden good great green grey happy heavy hidden high
honest hungry important impossible large late lazy light little lonely long loud lucky modern narrow natural nervous
new northern old open ordinary patient perfect plain polite poor possible private proud public quick quiet random rare
ready real red rich round sad second secret serious sharp short silent silver simple sleepy slow small smooth soft
southern special steady strange strong sudden sweet tall thick thin tired true unknown useful usual warm weak western
wet white whole wide wild wise wooden wrong yellow young
"""
_REMARKS = [
    "What do you mean by that?", "I don't know yet; let's find out.", "Could you explain it once more, please?",
    "Yes, of course!", "No, not today.", "It's a matter of time.", "We've been here before, haven't we?",
    "In other words: the state is saved and comes back.", "Der Zug nach Zürich fährt über München.",
    "Le café était fermé, voilà tout.", "El niño corrió mañana por la montaña.", "日本語の文章です。東京は大きい。",
    "Привет, как дела? Хорошо, спасибо.", "def add(a, b):\n    return a + b", "for i in range(10):\n    print(i)",
    '{"name": "value", "items": [1, 2, 3]}', "The price is 42.50 euros, or 3 for 120.",
    "Temperature: -7 °C, wind 15 km/h.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "# Heading\n\n* one\n* two\n* three\n",
    "It costs €5 — a bargain… 🙂 👍",
]  # fmt: skip


def ensure_demo_model(folder: Path) -> Path:
    """Path of the demo model below `folder`, made first if it is not there (about two seconds, no network).

    Safe to call from several processes at once: the model appears whole, by one rename.
    """
    path = folder / f"demo-llama-v{_REVISION}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=folder))
    try:
        _write_demo_model(staging)
        os.chmod(staging, 0o755)
        try:
            os.rename(staging, path)
        except OSError:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def _write_demo_model(path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    tokenizer = _train_tokenizer()
    tokenizer.save_pretrained(path)
    token_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_VOCAB_SIZE,
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=_INTERMEDIATE_SIZE,
        num_hidden_layers=_NUM_LAYERS,
        num_attention_heads=_NUM_HEADS,
        num_key_value_heads=_NUM_HEADS,
        max_position_embeddings=_MAX_CONTEXT_TOKENS,
        tie_word_embeddings=False,
        dtype="float32",
        **token_ids,
    ).save_pretrained(path)
    GenerationConfig(**token_ids).save_pretrained(path)  # type: ignore[no-untyped-call]
    save_file(_weights(tokenizer.eos_token_id), path / "model.safetensors", metadata={"format": "pt"})


def _weights(eos_token_id: int) -> dict[str, torch.Tensor]:
    """Scales at which attention looks at particular tokens, each layer adds about as much as it is given, and the best
    logit is clear of the second: greedy text neither loops at once nor hangs on rounding."""
    square, up, down = (
        (_HIDDEN_SIZE, _HIDDEN_SIZE),
        (_INTERMEDIATE_SIZE, _HIDDEN_SIZE),
        (_HIDDEN_SIZE, _INTERMEDIATE_SIZE),
    )
    weights = {
        "model.embed_tokens.weight": _uniform("embed_tokens", (_VOCAB_SIZE, _HIDDEN_SIZE), std=1.0),
        "model.norm.weight": torch.ones(_HIDDEN_SIZE),
        "lm_head.weight": _uniform("lm_head", (_VOCAB_SIZE, _HIDDEN_SIZE), std=4.0 / math.sqrt(_HIDDEN_SIZE)),
    }
    for layer_idx in range(_NUM_LAYERS):
        layer = f"model.layers.{layer_idx}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{norm}.weight"] = torch.ones(_HIDDEN_SIZE)
        for part, shape, std in (
            ("self_attn.q_proj", square, 0.09),
            ("self_attn.k_proj", square, 0.09),
            ("self_attn.v_proj", square, 0.06),
            ("self_attn.o_proj", square, 0.09),
            ("mlp.gate_proj", up, 0.06),
            ("mlp.up_proj", up, 0.06),
            ("mlp.down_proj", down, 0.06),
        ):
            weights[f"{layer}.{part}.weight"] = _uniform(f"{layer}.{part}", shape, std=std)
    for token_id in range(len(_SPECIAL_TOKENS)):
        weights["lm_head.weight"][token_id] *= _EOS_LOGIT_SCALE if token_id == eos_token_id else 0.0
    return weights


def _uniform(name: str, shape: tuple[int, ...], *, std: float) -> torch.Tensor:
    """Evenly spread values of mean 0, float32, from a stream that the name selects."""
    stream = hashlib.shake_128(f"{_SEED}/{name}".encode()).digest(2 * math.prod(shape))
    integers = torch.frombuffer(bytearray(stream), dtype=torch.int16)
    return (integers.to(torch.float32) * (std * math.sqrt(3.0) / 2.0**15)).view(shape)


def _train_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer=trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS} $B", special_tokens=[(_BOS, bpe.token_to_id(_BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        extra_special_tokens=_SPECIAL_TOKENS[3:],
        model_max_length=_MAX_CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
    if len(tokenizer) != _VOCAB_SIZE:
        raise AssertionError(f"the demo corpus yields {len(tokenizer)} tokens, the model has {_VOCAB_SIZE}")
    return tokenizer


def _corpus() -> list[str]:
    """Sentences that use every word a few times, in an order that a seed fixes."""
    rng = random.Random(_SEED)
    sentences = []
    for _ in range(8):
        nouns, verbs, adjectives = (words.split() for words in (_NOUNS, _VERBS, _ADJECTIVES))
        for words in (nouns, verbs, adjectives):
            words.sort(key=lambda _word: rng.random())
        pairs = zip(itertools.cycle(adjectives), nouns, strict=False)
        for verb, first, second in zip(itertools.cycle(verbs), pairs, pairs, strict=False):
            sentence = f"The {' '.join(first)} {verb} a {' '.join(second)}."
            sentences.append(f"{sentence} {first[0].capitalize()} {second[1]}s!")
        sentences += _REMARKS
    return sentences
