"""Texts of any size and kind are tokenized in linear time and constant memory, and cuts change no token."""

import hashlib
import json

import numpy as np
import pytest

from parity.data import cuts, documents
from parity.data.corpora import load_corpus
from parity.data.cuts import cut, split_documents
from parity.data.shards import prepare_shards
from parity.data.token_files import read_bin
from parity.data.tokenizer import _LONG_RUN, END_OF_TEXT, WHITE_SPACE, ByteTokenizer, GPT2Tokenizer
from parity.errors import InputError

# Every kind of character that GPT-2's pattern distinguishes, and those about which Python and Rust disagree: for
# Python, U+001C to U+001F are white space.
ALPHABET = [
    *WHITE_SPACE, "\x1c", "\x1f", "\u200b", "\u180e", "\ufeff", "a", "Z", "\xdf", "\u4e00", "\u0e01", "1", "\xb2",
    "\u0665", "\u2167", ".", ",", "!", "'", "\u3002", "\uff0c", "_", "<", "\u0301", "\U0001f642", "'s", "'ll",
    "ab", "  ", " \n", "\n\n", "\n \n",
]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(vocab_bpe):
    return GPT2Tokenizer(vocab_bpe)


def random_texts(count, length, seed=0):
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(ALPHABET, length)) for _ in range(count)]


def test_no_token_crosses_a_cut(gpt2):
    """Also for the tokenizer itself: the white space that it leaves to the pattern is the pattern's."""
    assert all(gpt2.encode(f"a{space} b") == gpt2.encode("a") + gpt2.encode(f"{space} b") for space in WHITE_SPACE)
    places = 0
    for text in random_texts(1500, 12):
        whole = gpt2.encode(text)
        for place in {cuts._last_place(text[:end], 0) for end in range(1, len(text))}:
            assert gpt2.encode(text[:place]) + gpt2.encode(text[place:]) == whole, (text, place)
            places += place > 0
    assert places > 1500


@pytest.mark.parametrize("size", [1, 2, 7, 13, 50])
def test_blocks_of_any_size_give_the_same_documents(gpt2, size):
    text = END_OF_TEXT.join([*random_texts(20, 40, seed=size), "", "<|endof", "text|>", "a<|endoftext|"]) + END_OF_TEXT
    blocks = [text[begin : begin + size] for begin in range(0, len(text), size)]
    assert "".join(block + END_OF_TEXT * ends for block, ends in split_documents(blocks)) == text + END_OF_TEXT
    for anywhere in (False, True):
        pieces = list(cut(split_documents(blocks), anywhere))
        assert "".join(piece + END_OF_TEXT * ends for piece, ends in pieces) == text + END_OF_TEXT
        tokenizer = ByteTokenizer() if anywhere else gpt2
        ids = [id for piece, ends in pieces for id in [*tokenizer.encode(piece), *[tokenizer.eos_id] * ends]]
        assert ids == [*tokenizer.encode(text, "all"), tokenizer.eos_id]


@pytest.mark.parametrize("separator", ["\n\n", " \n \n ", " \n", " ", "\t", "\u3000", "\u3002", ",", "\r\n\r\n"])
def test_pieces_are_short_whatever_separates_the_words(tmp_path, monkeypatch, separator):
    """Short pieces of a text that is read once are linear time and constant memory."""
    monkeypatch.setattr(cuts, "BLOCK", 1000)
    text = ("paragraph" * 5 + separator) * 2000
    (tmp_path / "a.txt").write_text(text, newline="", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    for name in ("a.txt", "a.jsonl"):
        pieces = list(documents.pieces([tmp_path / name]))
        assert max(len(piece.text) for piece in pieces) < 2 * cuts.BLOCK
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_text_without_a_place_to_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(cuts, "BLOCK", 1000)
    monkeypatch.setattr(cuts, "MOST_UNCUT", 5000)
    for character in "a \n1.":
        for name, origin in (("a.txt", r"a\.txt, line [12]"), ("a.jsonl", r"a\.jsonl, line 2")):
            text = f"x\ny{character * 8000}"
            file = tmp_path / name
            file.write_text(text if name == "a.txt" else '{"text": "b"}\n' + json.dumps({"text": text}))
            with pytest.raises(InputError, match=f"{origin}: more than 5,000 characters without words"):
                list(documents.pieces([file]))
            pieces = list(documents.pieces([file], cut_anywhere=True))
            assert "".join(piece.text for piece in pieces).endswith(text)


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\u3000", " \n"])
def test_long_white_space_is_encoded_as_the_pattern_says(gpt2, space):
    """White space that tiktoken can still match shows what longer white space must give."""
    run = (space * 1500)[:1500]
    for text in (
        run,
        f"{run}a",
        f"a{run}",
        f"a{run}b {run}{run}.",
        f"a{run[:-1]}\n",
        f"{run}{END_OF_TEXT}a",
        f"{run}'s",
    ):
        assert _LONG_RUN.search(text)
        assert gpt2._encode_around_runs(text).tolist() == gpt2.encode(text)


def test_a_million_characters_of_white_space(gpt2, tmp_path):
    text = "x" + " " * 1_000_000 + "y"
    assert gpt2.encode_array(text).tolist() == [87, *[220] * 999_999, 331]
    assert gpt2.encode(f"{END_OF_TEXT}{text}", "all")[:3] == [gpt2.eos_id, 87, 220]


def test_other_refusals_of_the_tokenizer_name_the_document(tmp_path):
    class Refusing(ByteTokenizer):
        def encode_array(self, text):
            if text == "bad":
                raise ValueError("no")
            return super().encode_array(text)

    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "bad"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: the text cannot be tokenized \(no\)"):
        prepare_shards([tmp_path / "a.jsonl"], tmp_path / "out", Refusing())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_a_corpus_and_its_shards_have_the_same_tokens(tmp_path, gpt2, name):
    """The same files by --corpus and by prepare_data, ends of documents included."""
    tokenizer = {"bytes": ByteTokenizer(), "gpt2": gpt2}[name]
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text(f"A story of a cat.{END_OF_TEXT}A dog's story.\n{END_OF_TEXT}" * 30)
    (source / "b.TXT").write_text("\ufeffin capitals, with a mark", encoding="utf-8")
    (source / "c.jsonl").write_text('{"text": "one \\ud800"}\n{"text": null}\n{"text": "two"}\n')
    (source / "d.json").write_text('[{"text": "three"}, {"text": ""}]')
    for path in (source, *source.iterdir()):
        out = tmp_path / f"out-{path.name}"
        prepare_shards([path], out, tokenizer, validation_fraction=0)
        corpus = load_corpus(str(path), tokenizer, 0.3)
        ids = np.concatenate([*corpus.train, *corpus.validation])
        assert ids.tolist() == read_bin(out / "train_000000.bin").tolist()
        assert 0 < len(corpus.train[0]) < len(ids)
    assert np.count_nonzero(ids == tokenizer.eos_id) > 0


def test_one_document_keeps_its_hash_and_its_training_tokens(tmp_path):
    """Runs on a text that were begun before ends of documents were added can be resumed."""
    text = "What a run was begun with.\n" * 40
    (tmp_path / "a.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "a.txt"), ByteTokenizer())
    assert corpus.train[0].tolist() == list(text[: int(len(text) * 0.9)].encode())

    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "a.txt").write_text(text + END_OF_TEXT)
    (tmp_path / "b.txt").write_text(text + END_OF_TEXT + text)
    hashes = {load_corpus(str(tmp_path / name), ByteTokenizer()).sha256 for name in ("a.txt", "b.txt")}
    assert len(hashes | {hashlib.sha256((text + END_OF_TEXT + text).encode()).hexdigest()}) == 3
