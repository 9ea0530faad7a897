"""The demo model: the same bytes everywhere, loadable offline, and useful as a guinea pig."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mii_hcache.engine.demo_model import ensure_demo_model  # noqa: E402


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def model(path: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def _digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def _greedy(model, prompt: list[int], num_tokens: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[0, len(prompt) :].tolist()


def test_another_process_makes_the_same_bytes(path, tmp_path):
    script = (
        "import sys; from pathlib import Path; from mii_hcache.engine.demo_model import ensure_demo_model as e;"
        "print(e(Path(sys.argv[1])))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True, timeout=120
    )
    assert _digests(Path(out.stdout.strip())) == _digests(path)


def test_weights_are_those_of_this_revision(path):
    """Changed on purpose? Then raise `_REVISION`, or old folders keep serving the old model."""
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert digest.startswith("7dc0f496bd8e")


def test_made_once_and_whole(path):
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert ensure_demo_model(path.parent) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no staging folder left behind


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("mii_hcache.engine.demo_model._weights", lambda eos_token_id: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shape_is_llama_2(model):
    config = model.config
    assert config.model_type == "llama" and not config.tie_word_embeddings
    assert config.num_attention_heads == config.num_key_value_heads == 8
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (4, 256, 2048)
    assert config.max_position_embeddings == 4096


def test_greedy_text_varies_and_does_not_end_at_once(path, model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for question in ("Hello!", "What is a river?", "Tell me about lighthouses."):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = _greedy(model, tokenizer.encode(text, add_special_tokens=False), 120)
        assert len(set(ids)) > 80, "loops"
        assert len(set(ids[-30:])) > 15, "falls into a loop"
        assert tokenizer.eos_token_id not in ids[:8]


def test_an_early_token_changes_the_answer(model):
    """Wrongly restored state of an early token must be visible, or equality checks on this model prove nothing."""
    prompt = [1, *range(300, 420)]
    changed = [1, 1999, *range(301, 420)]
    assert _greedy(model, prompt, 40) != _greedy(model, changed, 40)


def test_text_of_random_ids_does_not_round_trip(path):
    """The reason for transcripts; a demo that round-tripped would hide their absence."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = torch.randint(6, 2048, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids
