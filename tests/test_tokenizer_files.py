"""Tokenizers beside a model: GPT-2's is used, any other is refused by name; what is exported opens in transformers."""

import json
import shutil

import pytest
import transformers
from support.models import TINY

import gpt_jax
import gpt_torch
from parity.config import GPTConfig
from parity.data.tokenizer import ByteTokenizer, GPT2Tokenizer, load_tokenizer
from parity.data.tokenizer_files import own_vocabulary, write_tokenizer
from parity.errors import InputError
from parity.loading import load_model_and_tokenizer

TEXT = "Hello  world, it's\n\n 3.14 naïve 漢字\t!"
SMALL = {"n_ctx": 16, "n_embd": 4, "n_head": 1, "n_layer": 1}


@pytest.fixture
def exported(tmp_path, vocab_bpe):
    """A folder with the tokenizer's files as we write them."""
    write_tokenizer(tmp_path, GPT2Tokenizer(vocab_bpe), 1024)
    return tmp_path


@pytest.fixture
def saved_by_transformers(tmp_path, vocab_bpe):
    """A folder with tokenizer.json, as transformers writes it."""
    (tmp_path / "in").mkdir()
    write_tokenizer(tmp_path / "in", GPT2Tokenizer(vocab_bpe), 1024)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def change(path, entries):
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **entries}), encoding="utf-8")


def test_exported_files_are_the_same_tokenizer_in_transformers(exported, vocab_bpe):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = GPT2Tokenizer(vocab_bpe)
    assert theirs.encode(TEXT) == ours.encode(TEXT)
    assert theirs.encode("a<|endoftext|>") == ours.encode("a<|endoftext|>", "all")
    assert theirs.eos_token_id == ours.eos_id
    assert own_vocabulary(exported) == exported / "merges.txt"


def test_files_of_transformers_are_used(saved_by_transformers, vocab_bpe):
    assert (saved_by_transformers / "tokenizer.json").is_file()
    path = own_vocabulary(saved_by_transformers)
    assert load_tokenizer("gpt2", path).encode(TEXT) == GPT2Tokenizer(vocab_bpe).encode(TEXT)


@pytest.mark.parametrize("change_text", [
    lambda text: text.replace("#version: 0.2", "#version: 0.2 - Trained by `huggingface/tokenizers`"),
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.removesuffix("\n"),
])  # fmt: skip
def test_the_same_merges_in_another_file(tmp_path, vocab_bpe, change_text):
    text = change_text(vocab_bpe.read_text(encoding="utf-8"))
    (tmp_path / "merges.txt").write_bytes(text.encode("utf-8"))
    assert load_tokenizer("gpt2", own_vocabulary(tmp_path)).encode(TEXT) == GPT2Tokenizer(vocab_bpe).encode(TEXT)


def swap_merges(path):
    first, second, third, *others = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([first, third, second, *others]), encoding="utf-8")


def swap_ids(path):
    ids = json.loads(path.read_text(encoding="utf-8"))
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(ids), encoding="utf-8")


FOREIGN = {
    "merges in another order": lambda f: swap_merges(f / "merges.txt"),
    "merges of bytes": lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"),
    "other ids": lambda f: swap_ids(f / "vocab.json"),
    "WordPiece": lambda f: (f / "vocab.txt").write_text("[PAD]\n"),
    "SentencePiece": lambda f: (f / "spiece.model").write_bytes(b"\n"),
    "class": lambda f: change(f / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}),
    "space": lambda f: change(f / "tokenizer_config.json", {"add_prefix_space": True}),
    "begin": lambda f: change(f / "tokenizer_config.json", {"add_bos_token": True}),
    "JSON": lambda f: (f / "tokenizer_config.json").write_text("[" * 100_000),
    "list": lambda f: (f / "vocab.json").write_text("[]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_tokenizers_of_their_own_are_refused(exported, vocab_bpe, kind):
    """Also where a vocabulary is given: the model does not have its tokens."""
    FOREIGN[kind](exported)
    gpt_torch.save_pretrained(gpt_torch.GPTModel(GPTConfig(**SMALL)), exported)
    for package in (gpt_torch, gpt_jax):
        with pytest.raises(InputError, match=str(exported)):
            load_model_and_tokenizer(package, model=str(exported), vocab_bpe=vocab_bpe)


@pytest.mark.parametrize("entries", [
    {"normalizer": {"type": "Lowercase"}},
    {"pre_tokenizer": {"type": "Whitespace"}},
    {"pre_tokenizer": None},
    {"model": {"type": "BPE", "merges": []}},
    {"model": None},
])  # fmt: skip
def test_other_tokenizers_in_tokenizer_json(saved_by_transformers, entries):
    change(saved_by_transformers / "tokenizer.json", entries)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        own_vocabulary(saved_by_transformers)


def test_added_tokens_are_named(exported):
    (exported / "added_tokens.json").write_text('{"[PAD]": 50257}')
    with pytest.warns(UserWarning, match=r"the added tokens \(\[PAD\]\) are not recognized"):
        assert own_vocabulary(exported) is not None


def test_a_folder_without_tokenizer(tmp_path):
    assert own_vocabulary(tmp_path) is None


@pytest.mark.parametrize(("n_vocab", "eos_id"), [
    (97, None), (256, None), (257, 256), (304, None), (50256, None), (50257, 50256), (50258, 50256), (50304, 50256),
])  # fmt: skip
@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_the_end_of_text_of_exported_models(tmp_path, package, n_vocab, eos_id):
    """It does not depend on padding and added tokens; transformers stops there, and nowhere else."""
    model = package.GPTModel({"n_vocab": n_vocab, **SMALL})
    package.save_pretrained(model, tmp_path / "a")
    package.save_pretrained(package.load_pretrained(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "generation_config.json"):
        for folder in "ab":
            entries = json.loads((tmp_path / folder / name).read_text())
            assert entries["eos_token_id"] == entries["bos_token_id"] == eos_id
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert theirs.generation_config.eos_token_id == eos_id


def test_what_is_saved_is_complete(tmp_path, vocab_bpe):
    for package in (gpt_torch, gpt_jax):
        folder = tmp_path / package.__name__
        package.save_pretrained(package.GPTModel(GPTConfig(**SMALL)), folder, GPT2Tokenizer(vocab_bpe))
        assert {path.name for path in folder.iterdir()} == {
            "config.json", "model.safetensors", "generation_config.json", "README.md", "merges.txt", "vocab.json",
            "tokenizer_config.json",
        }  # fmt: skip
        card = (folder / "README.md").read_text()
        assert "AutoTokenizer" in card
        (folder / "README.md").write_text("mine")
        package.save_pretrained(package.GPTModel(GPTConfig(**SMALL)), folder, GPT2Tokenizer(vocab_bpe))
        assert (folder / "README.md").read_text() == "mine"
        _, tokenizer, _ = load_model_and_tokenizer(package, model=str(folder))
        assert tokenizer.encode(TEXT) == GPT2Tokenizer(vocab_bpe).encode(TEXT)
        shutil.rmtree(folder)
        package.save_pretrained(package.GPTModel({**TINY.to_dict(), "n_vocab": 304}), folder, ByteTokenizer())
        for name in ("config.json", "generation_config.json"):
            assert json.loads((folder / name).read_text())["eos_token_id"] == 256
