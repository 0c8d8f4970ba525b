"""Parts of a work: together they are the whole, and a wrong --part is refused."""

import pytest

from parity.errors import InputError
from parity.parts import Part, parse_part


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_parts_are_the_whole_in_order_and_of_equal_size(n, count):
    parts = [Part(index, count).of(n) for index in range(count)]
    assert [number for part in parts for number in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_names_are_in_the_order_of_the_parts():
    assert parse_part("2/12") == Part(2, 12)
    assert str(parse_part("2/12")) == "2/12"
    assert Part(2, 12).label == "00002-of-00012"
    labels = [Part(index, 12).label for index in range(12)]
    assert sorted(labels) == labels


@pytest.mark.parametrize(
    "text", ["", "1", "3/3", "-1/3", "1/0", "0/0", "1/3/5", "a/b", "1 / 3", "1/1e3", "\u0660/\u0663", "0/100001"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(InputError, match=r"--part .*give k/n"):
        parse_part(text)
