import sys

import numpy as np
import pytest
import tiktoken

from parity.data.tokenizer import END_OF_TEXT, ByteTokenizer, GPT2Tokenizer, encode_prompt, load_tokenizer, stream_text
from parity.errors import InputError

# Token ids by OpenAI's encoder, published in many places.
KNOWN = {
    "Hello, I am": [15496, 11, 314, 716],
    "Every effort moves you": [6109, 3626, 6100, 345],
    "The dog": [464, 3290],
}


@pytest.fixture(params=["bytes", "gpt2"])
def tokenizer(request):
    if request.param == "bytes":
        return load_tokenizer("bytes")
    return load_tokenizer("gpt2", request.getfixturevalue("vocab_bpe"))


def test_known_ids(vocab_bpe):
    gpt2 = GPT2Tokenizer(vocab_bpe)
    for text, ids in KNOWN.items():
        assert gpt2.encode(text) == ids
    assert gpt2.n_vocab == 50257
    assert gpt2.decode(range(50257)).endswith(END_OF_TEXT)


def test_equal_to_tiktokens_own_gpt2(vocab_bpe, tmp_path, monkeypatch):
    """tiktoken needs no network: its cache is filled beforehand, under the SHA-1 of the file's address."""
    encoder = vocab_bpe.with_name("encoder.json")
    (tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes(vocab_bpe.read_bytes())
    (tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6").write_bytes(encoder.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    theirs, ours = tiktoken.get_encoding("gpt2"), GPT2Tokenizer(vocab_bpe)
    generator = np.random.default_rng(0)
    texts = ["".join(map(chr, generator.integers(32, 0x2FFF, 50))) for _ in range(200)]
    texts += ["we've  done\n\n\tit's   1234 ok!?  ", "naïve café 東京 🙂"]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text)


def test_round_trip_of_any_text(tokenizer):
    points = np.random.default_rng(1).integers(0, sys.maxunicode + 1, 3000)
    text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_explicit(tokenizer):
    text = f"a{END_OF_TEXT}b"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    special = tokenizer.encode(text, {END_OF_TEXT})
    assert special.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(special) == text
    assert tokenizer.encode(text, "all") == tokenizer.encode(text, [END_OF_TEXT]) == special


def test_special_tokens_that_do_not_exist_are_refused(tokenizer):
    for wrong in (END_OF_TEXT, "none", ""):
        with pytest.raises(InputError, match=r'allowed_special must be "all" or a collection of special tokens'):
            tokenizer.encode("a", wrong)
    with pytest.raises(InputError, match=r"unknown special tokens \['<pad>'\]; the only one is"):
        tokenizer.encode("a", {"<pad>", END_OF_TEXT})


def test_partial_characters(tokenizer):
    ids = tokenizer.encode("日🙂")
    for cut in range(len(ids) + 1):
        assert isinstance(tokenizer.decode(ids[:cut]), str)
    assert tokenizer.decode(ids[:-1]).endswith("\ufffd")
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == "日🙂"
    assert "\ufffd" not in "".join(pieces)


def test_ids_out_of_range(tokenizer):
    for bad in (-1, tokenizer.n_vocab):
        with pytest.raises(InputError, match="outside the vocabulary"):
            tokenizer.decode([bad])


def test_empty_prompt_is_end_of_text():
    assert encode_prompt(ByteTokenizer(), "") == [256]


def test_missing_or_damaged_vocabulary(vocab_bpe, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path))
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    with pytest.raises(InputError, match=r"--vocab-bpe PATH.*downloads are forbidden"):
        load_tokenizer("gpt2")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer("gpt2", tmp_path / "none.bpe")
    damaged = tmp_path / "vocab.bpe"
    damaged.write_bytes(vocab_bpe.read_bytes()[:-9])
    with pytest.raises(InputError, match="sha256 differs"):
        load_tokenizer("gpt2")
    damaged.write_bytes(vocab_bpe.read_bytes())
    assert load_tokenizer("gpt2").encode("The dog") == [464, 3290]
    with pytest.raises(InputError, match="unknown tokenizer"):
        load_tokenizer("word")


def test_surrogates_are_replaced_alike(tokenizer):
    """By encode and encode_array: pairs are one character, and others become U+FFFD."""
    for text, valid in [
        ("a\ud800b", "a\ufffdb"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\udce9 ", "\ufffd "),
        ("\ude00\ud83d", "\ufffd\ufffd"),
    ]:
        ids = tokenizer.encode(valid)
        assert tokenizer.encode(text) == tokenizer.encode_array(text).tolist() == ids
        assert tokenizer.encode(f"{text}{END_OF_TEXT}", "all") == [*ids, tokenizer.eos_id]
