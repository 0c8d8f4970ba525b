"""OpenAI's real 124M, where scripts/download_gpt2.py has put it."""

import hashlib

import pytest

import gpt_jax
import gpt_torch
from parity.download import cache_folder, model_files

FOLDER = cache_folder() / "models" / "124M"
pytestmark = [
    pytest.mark.pretrained,
    pytest.mark.skipif(
        not all((FOLDER / wanted.name).is_file() for wanted in model_files("124M")),
        reason=f"OpenAI's files are not in {FOLDER}: python scripts/download_gpt2.py 124M",
    ),
]


@pytest.mark.parametrize("wanted", model_files("124M"), ids=lambda wanted: wanted.name)
def test_sha256(wanted):
    with (FOLDER / wanted.name).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax], ids=lambda package: package.__name__)
def test_greedy_continuation(package):
    """The one that transformers' own integration test expects of these weights."""
    want = [
        464,
        3290,
        373,
        1043,
        287,
        257,
        2214,
        1474,
        262,
        16246,
        286,
        2688,
        290,
        2688,
        27262,
        13,
        198,
        198,
        464,
        3290,
    ]
    assert package.generate(package.load_pretrained("124M"), [[464, 3290]], 18, temperature=0) == [want]
