"""The tokenizer wrapper, over the demo tokenizer and one that puts a space before every text, as Llama 2's does."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from transformers import PreTrainedTokenizerFast  # noqa: E402

from mii_hcache.engine.demo_model import ensure_demo_model  # noqa: E402
from mii_hcache.engine.tokenizer import Tokenizer  # noqa: E402
from mii_hcache.errors import ConfigError, RequestError  # noqa: E402


@pytest.fixture(scope="module")
def demo_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> Tokenizer:
    return Tokenizer(demo_path)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Metaspace with a space before every fragment, bytes as a fallback, no chat template."""
    words = ["▁", "▁the", "▁cat", "the", "cat", "s", "\n", "|", "0"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocab |= {word: len(vocab) + idx for idx, word in enumerate(words)}
    merges = [("▁", "the"), ("▁", "cat"), ("t", "he"), ("c", "at"), ("h", "e"), ("a", "t")]
    vocab |= {piece: len(vocab) + idx for idx, piece in enumerate(["t", "he", "c", "at", "h", "e", "a"])}
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges[::-1], unk_token="<unk>", byte_fallback=True)
    )
    bpe.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    bpe.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.add_special_tokens(["<s>", "</s>", "<unk>"])
    path = tmp_path_factory.mktemp("spaced")
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return Tokenizer(path)


def test_special_tokens_only_where_asked(demo):
    assert demo.encode("Hello", add_special_tokens=True) == [
        demo.bos_token_id,
        *demo.encode("Hello", add_special_tokens=False),
    ]
    assert demo.bos_token_id == 1 and demo.eos_token_id == 2


@given(text=st.text())
@settings(deadline=None)
def test_ordinary_text_round_trips(demo, text):
    assert demo.decode(demo.encode(text, add_special_tokens=False)) == text or "<" in text


def test_the_template_writes_bos_itself(demo):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = demo.render_chat(messages, add_generation_prompt=True)
    assert text == "<s><|user|>\nHi</s>\n<|assistant|>\nHo</s>\n<|assistant|>\n"
    assert demo.encode(text, add_special_tokens=False).count(demo.bos_token_id) == 1
    assert demo.render_chat(messages, add_generation_prompt=False) == text.removesuffix("<|assistant|>\n")


def test_decode_leaves_out_special_and_unknown_ids(demo):
    ids = demo.encode("Hello world", add_special_tokens=True)
    assert demo.decode([*ids, demo.eos_token_id, 10**6]) == "Hello world"


def test_stop_tokens_join_tokenizer_and_generation_config(demo, demo_path, tmp_path):
    assert demo.stop_token_ids == {2}
    for file in demo_path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert Tokenizer(tmp_path).stop_token_ids == {2, 5}
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer(tmp_path).stop_token_ids == {2}


def test_fingerprint_is_that_of_the_vocabulary(demo, spaced, demo_path):
    assert demo.fingerprint() == Tokenizer(demo_path).fingerprint() != spaced.fingerprint()
    assert len(demo.fingerprint()) == 16


def test_stored_truncation_is_switched_off(demo_path, tmp_path):
    for file in demo_path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert len(tokenizer.encode("one two three four five six seven", add_special_tokens=False)) > 7
    assert len(tokenizer.encode("one", add_special_tokens=False)) < 5


def test_a_continuation_gets_no_space_of_its_own(spaced):
    whole = spaced.encode("the cats the cat", add_special_tokens=False)
    head = spaced.encode("the cat", add_special_tokens=False)
    assert head + spaced.encode_continuation("s the cat") == whole
    assert head + spaced.encode("s the cat", add_special_tokens=False) != whole  # what a plain encode would do
    assert spaced.encode_continuation("") == []


def test_a_continuation_is_plain_for_byte_level(demo):
    assert demo.encode_continuation(" the cat") == demo.encode(" the cat", add_special_tokens=False)


def test_no_chat_template_says_where_to_go(spaced):
    assert not spaced.has_chat_template
    with pytest.raises(RequestError, match="/v1/completions") as caught:
        spaced.render_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert caught.value.param == "messages"


def test_a_template_that_refuses_is_a_request_error(demo_path, tmp_path):
    for file in demo_path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        Tokenizer(tmp_path).render_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)


def test_a_missing_tokenizer_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        Tokenizer(tmp_path / "nothing")
