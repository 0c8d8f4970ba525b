"""Reading and writing OpenAI's checkpoints with NumPy, and loading them into both models."""

import dataclasses
import json
import struct
import sys

import google_crc32c
import numpy as np
import pytest
from support.models import BACKENDS, TINY, probing_weights, random_batch

import gpt_jax
import gpt_torch
from parity import weights as table
from parity.comparison.compare import compare
from parity.config import PRESETS, GPTConfig
from parity.errors import InputError
from parity.weights import leveldb, openai, tensor_bundle
from parity.weights.tensor_bundle import _message_field, _varint_field


def openai_weights(config=TINY):
    return dict(table.convert(probing_weights(config, np.float32), "huggingface", "openai", config))


@pytest.fixture
def folder(tmp_path):
    openai.write(tmp_path, TINY, openai_weights())
    return tmp_path


def index_of(folder):
    return folder / "model.ckpt.index"


def data_of(folder):
    return folder / "model.ckpt.data-00000-of-00001"


def rewrite_index(folder, change):
    """Change the entries {name: bytes} of the index and write them with valid checksums."""
    entries = dict(leveldb.read_table(index_of(folder).read_bytes()))
    change(entries)
    index_of(folder).write_bytes(leveldb.write_table(sorted(entries.items())))


def test_round_trip_is_exact(folder):
    config, tensors = openai.read(folder)
    expected = openai_weights()
    assert config == TINY
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert tensors[name].shape == array.shape
        assert np.array_equal(np.asarray(tensors[name]), array)
    assert data_of(folder).stat().st_size == 4 * table.n_params(TINY)


def test_names_of_124m_share_prefixes_and_restarts():
    entries = [(name.encode(), b"v" * 40) for name in sorted(table.shapes(PRESETS["124M"], "openai"))]
    assert len(entries) == 148
    written = leveldb.write_table(entries)
    assert list(leveldb.read_table(written)) == entries
    assert written.count(b"model/h") < 30  # prefix-compressed


def test_several_shards_and_other_dtypes(tmp_path):
    """A bundle in two shards: each entry names its shard."""
    tensor_bundle.write_bundle(tmp_path / "model.ckpt", {"a": np.arange(4.0), "b": np.arange(6, dtype=np.float16)})
    data = data_of(tmp_path).read_bytes()
    for shard, part in enumerate((data[:32], data[32:])):
        (tmp_path / f"model.ckpt.data-{shard:05d}-of-00002").write_bytes(part)

    def two_shards(entries):
        entries[b""] = _varint_field(1, 2)
        fields = _varint_field(1, 19) + _message_field(2, _message_field(2, _varint_field(1, 6)))
        fields += _varint_field(3, 1) + _varint_field(5, 12)
        crc = struct.pack("<I", leveldb.masked_crc(data[32:]))
        entries[b"b"] = fields + bytes([6 << 3 | 5]) + crc

    rewrite_index(tmp_path, two_shards)
    tensors = tensor_bundle.read_bundle(tmp_path / "model.ckpt")
    assert np.asarray(tensors["a"]).tolist() == [0, 1, 2, 3]
    assert np.asarray(tensors["b"]).dtype == np.float16
    assert np.asarray(tensors["b"]).tolist() == [0, 1, 2, 3, 4, 5]


def test_both_backends_load_the_folder(folder):
    tokens = random_batch(TINY)[0]
    expected = BACKENDS["torch"].logits(TINY, probing_weights(TINY, np.float32), tokens)
    for name, package in (("torch", gpt_torch), ("jax", gpt_jax)):
        model = package.load_pretrained(folder)
        got = BACKENDS[name].logits(model.config, package.export_weights(model), tokens)
        result = compare(name, got, expected, 2e-5)
        assert result.ok, str(result)


def test_tensorflow_reads_what_we_write_and_we_what_it_writes(folder, tmp_path):
    tf = pytest.importorskip("tensorflow", reason="the extra tf is not installed")
    expected = openai_weights()
    reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
    assert reader.get_variable_to_shape_map().keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(reader.get_tensor(name), array)
    config, arrays = openai.read(folder, reader="tensorflow")
    assert config == TINY
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    theirs = tmp_path / "theirs" / "model.ckpt"
    theirs.parent.mkdir()
    names = list(expected)
    tf.raw_ops.SaveV2(
        prefix=str(theirs), tensor_names=names, shape_and_slices=[""] * len(names), tensors=[expected[n] for n in names]
    )
    tensors = tensor_bundle.read_bundle(theirs)
    assert all(np.array_equal(np.asarray(tensors[name]), expected[name]) for name in names)
    index_of(folder).write_bytes(index_of(folder).read_bytes()[:-9])
    with pytest.raises(InputError, match="TensorFlow cannot read it"):
        openai.read(folder, reader="tensorflow")


def test_tensorflow_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(InputError, match="extra tf"):
        openai.read(folder, reader="tensorflow")


def test_crc_of_a_known_vector():
    """RFC 3720, appendix B.4: 32 zero bytes."""
    assert google_crc32c.value(bytes(32)) == 0x8A9136AA


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: b"", "fewer than its footer"),
        (lambda d: d[: len(d) // 2], "does not end with the magic number"),
        (lambda d: d[:20] + bytes([d[20] ^ 1]) + d[21:], "crc32c"),
        (lambda d: b"\x80\x02}q\x00." * 20, "does not end with the magic number"),
        (lambda d: d[:-48] + b"\xff" * 40 + d[-8:], "integer does not end"),
        (lambda d: d[:-48] + (b"\x00\x00" + b"\xff\xff\xff\xff\x0f\x04").ljust(40, b"\0") + d[-8:], "outside the file"),
    ],
)
def test_damaged_index(folder, damage, message):
    path = index_of(folder)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        openai.read(folder)
    assert str(path) in str(caught.value)


def entry(dtype=1, dims=(4,), shard=0, offset=0, size=16, crc=b"abcd"):
    shape = b"".join(_message_field(2, _varint_field(1, dim)) for dim in dims)
    numbers = (_varint_field(n, v) for n, v in ((3, shard), (4, offset), (5, size)))
    return _varint_field(1, dtype) + _message_field(2, shape) + b"".join(numbers) + bytes([53]) + crc


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (entry(offset=10**6), "ends at byte"),
        (entry(dims=(2**39,), size=2**41), "ends at byte"),
        (entry(dims=(2**62,), size=2**64 - 1), "absurd shape"),
        (entry(dims=(1,) * 9, size=4), "absurd shape"),
        (entry(size=12), "has 12 bytes"),
        (entry(dtype=7), "model/wte has dtype"),
        (entry(shard=3), "shard 3 of 1"),
        (b"\x0f", "wire type"),
        (b"\x0a\xff\x01ab", "longer than its message"),
    ],
)
def test_hostile_entries(folder, value, message):
    rewrite_index(folder, lambda entries: entries.update({b"model/wte": value}))
    with pytest.raises(InputError, match=message):
        openai.read(folder)


@pytest.mark.parametrize("names", [(b"a", b"a"), (b"b", b"a")])
def test_repeated_and_unsorted_names_are_refused(names):
    table_bytes = leveldb.write_table([(name, b"value") for name in names])
    with pytest.raises(leveldb.DamageError, match=repr(names[1])):
        list(leveldb.read_table(table_bytes))


def test_names_never_become_paths(folder):
    rewrite_index(folder, lambda entries: entries.update({b"../../etc/passwd": entries.pop(b"model/wte")}))
    with pytest.warns(UserWarning, match=r"left beside them: \.\./\.\./etc/passwd"):
        _, tensors = openai.read(folder)
    assert "../../etc/passwd" not in tensors
    assert {entry.path for entry in tensor_bundle.read_index(folder / "model.ckpt").values()} == {data_of(folder)}
    with pytest.raises(InputError, match="missing model/wte"), pytest.warns(UserWarning, match="etc/passwd"):
        gpt_torch.load_pretrained(folder)


def test_flipped_or_cut_data(folder):
    path = data_of(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    for package in (gpt_torch, gpt_jax):
        with pytest.raises(InputError, match="is damaged"):
            package.load_pretrained(folder)
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="ends at byte"):
        openai.read(folder)
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        openai.read(folder)


@dataclasses.dataclass(frozen=True)
class LaterConfig(GPTConfig):
    """A configuration with a field that GPT-2's files cannot hold."""

    erf_gelu: bool = False


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (dataclasses.replace(TINY, qkv_bias=False, drop_rate=0.1), "qkv_bias=False;"),
        (dataclasses.replace(TINY, qkv_bias=False, tied_head=False), "qkv_bias=False, tied_head=False;"),
        (LaterConfig(**TINY.to_dict(), erf_gelu=True), "erf_gelu=True;"),
    ],
)
def test_configurations_that_hparams_cannot_hold_are_refused(config, lost, tmp_path):
    with pytest.raises(InputError, match=f"cannot hold {lost}"):
        openai.write(tmp_path / "out", config, {})
    assert not (tmp_path / "out").exists()


def test_the_dropout_rate_is_not_written(tmp_path):
    openai.write(tmp_path, dataclasses.replace(TINY, drop_rate=0.1), openai_weights())
    assert openai.read(tmp_path)[0] == TINY


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"n_vocab": 5}', '{"n_vocab": "a", "n_ctx": 1, "n_embd": 1, "n_head": 1, "n_layer": 1}']
)
def test_bad_hparams(folder, text):
    (folder / "hparams.json").write_text(text)
    with pytest.raises(InputError, match=r"hparams\.json"):
        openai.read(folder)


def test_wrong_hparams_missing_and_extra_layers(folder):
    entries = json.loads((folder / "hparams.json").read_text())
    for layers, message in ((2, "unknown model/h2/"), (4, "missing model/h3/")):
        (folder / "hparams.json").write_text(json.dumps({**entries, "n_layer": layers}))
        with pytest.raises(InputError, match=message):
            gpt_jax.load_pretrained(folder)


@pytest.mark.parametrize("count", [1_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_indexes_give_our_error_or_the_right_values(folder, count):
    """Random edits of an index; half of them get valid checksums, so that they reach the parser."""
    original = index_of(folder).read_bytes()
    original_entries = tensor_bundle.read_index(folder / "model.ckpt")
    generator = np.random.default_rng(0)
    block_size = next(iter(leveldb._handle(original[-48:], 0)))[0]  # the metaindex begins after block and trailer
    refused = 0
    for number in range(count):
        data = bytearray(original)
        for _ in range(int(generator.integers(1, 4))):
            place = int(generator.integers(len(data)))
            kind = generator.integers(3)
            if kind == 0:
                data[place] = int(generator.integers(256))
            elif kind == 1:
                del data[place : place + int(generator.integers(1, 9))]
            else:
                data[place:place] = generator.bytes(int(generator.integers(1, 9)))
        if number % 2 and len(data) == len(original):
            content = bytes(data[: block_size - 4])
            data[block_size - 4 : block_size] = struct.pack("<I", leveldb.masked_crc(content))
        index_of(folder).write_bytes(data)
        try:
            entries = tensor_bundle.read_index(folder / "model.ckpt")
            for name, entry in entries.items():
                array = tensor_bundle._read_tensor(entry)
                assert name not in original_entries or array.nbytes != 0
                if name in original_entries and entry != original_entries[name]:  # other bytes with their checksum
                    assert leveldb.masked_crc(array.tobytes()) == entry.crc
        except InputError:
            refused += 1
    assert refused > 0.75 * count
