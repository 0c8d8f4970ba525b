import hashlib
import itertools
import math
import re

import numpy as np
import pytest

from parity.config import IGNORE_INDEX
from parity.data import corpora
from parity.data.corpora import load_corpus
from parity.data.shards import prepare_shards
from parity.data.token_files import TokenFile, read_bin
from parity.data.tokenizer import END_OF_TEXT, ByteTokenizer
from parity.data.windows import Windows
from parity.errors import InputError
from parity.storage.download import RemoteFile
from parity.training.bigram import bigram_loss
from parity.training.schedule import learning_rate


def windows(lengths=(100, 57), n_ctx=8, **options):
    """Return windows over shards that count upward, so that a window shows where it comes from."""
    starts = np.cumsum([0, *lengths])
    shards = [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(starts)]
    return Windows(shards, n_ctx, 1000, **options)


def write_llmc(path, tokens, announced=None, version=1):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, version, len(tokens) if announced is None else announced
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())
    return path


@pytest.mark.parametrize("stride", [8, 3])
def test_every_window_once_per_epoch_for_any_batch_size(stride):
    data = windows(stride=stride)
    for size in (1, 5, 7, len(data) + 3):
        seen = []
        for step in range(math.ceil(2 * len(data) / size)):
            inputs, targets = data.batch(0, step, size)
            assert inputs.dtype == targets.dtype == np.int32
            assert inputs.shape == (size, 8)
            assert np.array_equal(inputs[:, 1:], targets[:, :-1])
            assert (targets == inputs + 1).all()  # shifted by one, and inside one shard
            seen += inputs[:, 0].tolist()
        epochs = [seen[i * len(data) : (i + 1) * len(data)] for i in range(2)]
        assert len(set(epochs[0])) == len(data)
        assert set(epochs[0]) == set(epochs[1])
        assert epochs[0] != epochs[1]


def test_batch_is_a_pure_function():
    a, b = windows(), windows()
    expected = [a.batch(3, step, 4)[0] for step in range(20)]
    for step in (17, 2, 2, 9):
        assert np.array_equal(b.batch(3, step, 4)[0], expected[step])
    assert not np.array_equal(a.batch(4, 0, 4)[0], expected[0])


@pytest.mark.parametrize("lengths", [(100, 57), (9,), (17, 2, 30)])
def test_in_order_has_every_target_once(lengths):
    data = windows(lengths)
    targets = [t for _, batch in data.in_order(3) for t in batch.flatten() if t != IGNORE_INDEX]
    first = np.cumsum([0, *lengths[:-1]])
    assert targets == [i for i in range(sum(lengths)) if i not in first]


def test_bins_are_mapped_in_both_layouts(tmp_path):
    ids = np.arange(40, dtype=np.uint16)
    ids.tofile(tmp_path / "train.bin")
    write_llmc(tmp_path / "val.bin", ids)
    for name in ("train.bin", "val.bin"):
        assert isinstance(read_bin(tmp_path / name), np.memmap)
        assert np.array_equal(read_bin(tmp_path / name), ids)
    corpus = load_corpus(str(tmp_path), ByteTokenizer())
    assert np.array_equal(corpus.train[0][5:9], ids[5:9])
    assert [len(s) for s in corpus.train + corpus.validation] == [40, 40]


def test_bin_without_validation_is_split(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "all.bin")
    corpus = load_corpus(str(tmp_path / "all.bin"), ByteTokenizer(), 0.2)
    assert [len(s) for s in corpus.train + corpus.validation] == [40, 10]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b""), "0 bytes"),
        (lambda p: p.write_bytes(b"abc"), "3 bytes"),
        (lambda p: write_llmc(p, [1, 2], announced=5), "truncated or damaged"),
        (lambda p: write_llmc(p, [1, 2], announced=-1), "truncated or damaged"),
        (lambda p: write_llmc(p, []), "no tokens"),
        (lambda p: write_llmc(p, [1], version=2), "version 2"),
        (lambda p: None, "missing"),
    ],
)
def test_bad_bins(tmp_path, make, message):
    path = tmp_path / "x.bin"
    make(path)
    with pytest.raises(InputError, match=message) as caught:
        read_bin(path)
    assert str(path) in str(caught.value)


def test_ids_beyond_the_vocabulary():
    shard = np.full(50, 300, np.uint16)
    with pytest.raises(InputError, match=r"mine\.bin contains token id 300"):
        Windows([shard], 8, 257, name="mine.bin")
    data = Windows([np.zeros(50, np.uint16)], 8, 257, name="mine.bin")
    data.shards = [shard]  # as if the id came after those that are checked on opening
    for read in (lambda: data.batch(0, 0, 2), lambda: list(data.in_order(2))):
        with pytest.raises(InputError, match=r"mine\.bin contains token id 300"):
            read()


class Counted(np.ndarray):
    """Token ids that count how many of them are read."""

    n_read = 0

    def __getitem__(self, part):
        ids = np.asarray(self)[part]
        Counted.n_read += len(ids)
        return ids


@pytest.mark.parametrize(("limit", "n_read"), [(None, 2000), (257, 2000), (256, 0), (100, 0)])
def test_ids_of_prepared_shards_are_not_read_at_the_start(monkeypatch, limit, n_read):
    """Their tokenizer is known, unless it has more tokens than the model."""
    monkeypatch.setattr(Counted, "n_read", 0)
    shards = [np.full(1000, value, np.uint16).view(Counted) for value in (99, 98)]
    for shard in shards:
        shard.id_limit = limit
    data = Windows(shards, 8, 256)
    assert Counted.n_read == n_read
    assert data.batch(0, 0, 4)[0].shape == (4, 8)


def test_altered_ids_of_prepared_shards_are_refused_in_their_batch():
    shard = np.full(100, 300, np.uint16).view(Counted)
    shard.id_limit = 256
    with pytest.raises(InputError, match="token id 300, outside the vocabulary"):
        Windows([shard], 8, 256).batch(0, 0, 1)


def test_shorter_than_a_window():
    with pytest.raises(InputError, match="fewer than one window"):
        windows((8,))
    assert len(windows((9,))) == 1
    with pytest.raises(InputError, match="stride"):
        windows(stride=0)


def test_text_files_folders_and_python_docs(tmp_path):
    (tmp_path / "b.txt").write_text("world" * 20)
    (tmp_path / "a.txt").write_text("hello" * 20)
    folder = load_corpus(str(tmp_path), ByteTokenizer(), 0.1)
    text = ByteTokenizer().decode(np.concatenate(folder.train + folder.validation).tolist())
    assert text == "hello" * 20 + END_OF_TEXT + "world" * 20 + END_OF_TEXT
    assert len(load_corpus(str(tmp_path / "a.txt"), ByteTokenizer()).validation[0]) == 10 + 1
    docs = load_corpus("python-docs", ByteTokenizer())
    assert len(docs.train[0]) > 300_000


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9 au lait", "not UTF-8")]
)
def test_bad_text(tmp_path, content, message):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(str(path), ByteTokenizer())
    assert str(path) in str(caught.value)


def test_unknown_corpus_and_empty_folder(tmp_path):
    with pytest.raises(InputError, match="not a file or folder"):
        load_corpus("shakespear", ByteTokenizer())
    with pytest.raises(InputError, match="holds no file"):
        load_corpus(str(tmp_path), ByteTokenizer())


def test_downloaded_corpora_are_checked_and_clear_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path))
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    with pytest.raises(InputError, match="use the embedded python-docs"):
        load_corpus("the-verdict", ByteTokenizer())
    text = b"text " * 9
    remote_file = RemoteFile("the-verdict.txt", len(text), hashlib.sha256(text).hexdigest())
    monkeypatch.setitem(corpora.DOWNLOADS, "the-verdict", ("http://127.0.0.1:9/", remote_file))
    (tmp_path / "the-verdict.txt").write_bytes(text)
    assert len(load_corpus("the-verdict", ByteTokenizer()).train[0]) == 40
    (tmp_path / "the-verdict.txt").write_bytes(b"TEXT " * 9)
    with pytest.raises(InputError, match="damaged"):
        load_corpus("the-verdict", ByteTokenizer())


def test_bigram_loss_of_known_chains():
    generator = np.random.default_rng(0)
    fixed = np.tile(np.arange(5, dtype=np.uint16), 400)
    assert bigram_loss([fixed], [fixed], 5) < 0.01
    uniform = generator.integers(0, 8, 40_000).astype(np.uint16)
    assert bigram_loss([uniform[:30_000]], [uniform[30_000:]], 8) == pytest.approx(math.log(8), abs=0.01)


def test_schedule():
    rates = [learning_rate(step, 1.0, 0.1, 10, 100) for step in range(100)]
    assert rates[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1.0, 1.0, 0, 1) == 1.0


def test_a_corpus_may_have_more_shards_than_files_may_be_open(tmp_path):
    resource = pytest.importorskip("resource")
    for number in range(150):
        name = f"{'val' if number == 0 else 'train'}_{number:06d}.bin"
        write_llmc(tmp_path / name, np.full(30, number % 256))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with (tmp_path / "train_000001.bin").open("rb") as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 100, limits[1]))
    try:
        corpus = load_corpus(str(tmp_path), ByteTokenizer())
        data = Windows(corpus.train, 8, 257)
        assert {int(data.batch(0, step, 1)[0][0, 0]) for step in range(len(data))} == set(range(1, 150))
        assert len(list(data.in_order(3))) == math.ceil(149 * 4 / 3)
        assert bigram_loss(corpus.train, corpus.validation, 257) > 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_parts_of_a_token_file(tmp_path):
    file = write_llmc(tmp_path / "a.bin", range(100))
    part = TokenFile(file, slice(10, 60))
    assert len(part) == 50
    assert part[:3].tolist() == [10, 11, 12]
    assert part[45:99].tolist() == [55, 56, 57, 58, 59]
    assert part[-2:].tolist() == [58, 59]
    assert part[60:].tolist() == []


@pytest.mark.parametrize("name", ["meta.pkl", "meta.json", "tokenizer.model", "vocab.txt"])
def test_token_files_with_a_vocabulary_of_their_own(tmp_path, name):
    """A vocabulary beside the files is named; a pickle is never opened."""
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pickle-was-run'\ntR.")
    for path in (tmp_path, tmp_path / "train.bin"):
        with pytest.raises(InputError, match=re.escape(name)):
            load_corpus(str(path), ByteTokenizer())


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("val", "validation"),
        ("fineweb_val_000001", "validation"),
        ("Valid-03", "validation"),
        ("validation2", "validation"),
        ("carnival", "train"),
        ("medieval_000000", "train"),
        ("interval-train", "train"),
        ("test", None),
        ("train_val", None),
    ],
)
def test_the_split_of_a_token_file_is_a_word_of_its_name(tmp_path, name, split):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(40, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    if split is None:
        with pytest.raises(InputError, match="neither clearly for training nor for validation"):
            load_corpus(str(tmp_path), ByteTokenizer())
    else:
        assert 40 in map(len, getattr(load_corpus(str(tmp_path), ByteTokenizer(), 0.1), split)) or split == "train"
        assert len(load_corpus(str(tmp_path), ByteTokenizer(), 0.1).train) == 1 + (split == "train")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + bytes(100)), "array of NumPy"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "zip archive"),
        (lambda path: path.write_bytes(np.array([20240801, 7, 9, 0], np.int32).tobytes() + bytes(1100)), "Llama 3"),
        (lambda path: (path.write_bytes(bytes(100)), path.with_suffix(".idx").write_bytes(b"")), "has an index"),
    ],
)
def test_other_files_with_the_name_bin(tmp_path, write, message):
    write(tmp_path / "train.bin")
    with pytest.raises(InputError, match=message):
        load_corpus(str(tmp_path), ByteTokenizer())


def test_a_small_prepared_corpus_says_which_option_to_lower(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(200)))
    prepare_shards([tmp_path / "a.jsonl"], tmp_path / "out", ByteTokenizer())
    corpus = load_corpus(str(tmp_path / "out"), ByteTokenizer())
    assert {shard.id_limit for shard in corpus.train + corpus.validation} == {257}
    with pytest.raises(InputError, match=r"a larger --validation-fraction\), or lower --n-ctx"):
        Windows(corpus.validation, 1024, 257)
