"""Cutting long texts into pieces that can be tokenized one by one: the tokens of the pieces are those of the text."""

import re
from collections.abc import Iterable, Iterator

from parity.data.tokenizer import END_OF_TEXT, WHITE_SPACE
from parity.errors import InputError

BLOCK = 2**20
"""Number of characters that are read at once; about the length of a piece."""
MOST_UNCUT = 2**24
"""Largest number of characters without a place to cut."""

# GPT-2's pattern never joins a letter or number to a punctuation mark that follows it.
_BEFORE_PUNCTUATION = re.compile(r"[^\W_](?=[.,;:!?\u2026\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")
_SPACES = " \n\t\u3000"  # these suffice: texts without any of them have no words


def split_documents(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Split a text at END_OF_TEXT: yield blocks, and whether each ends its document."""
    rest = ""
    for block in blocks:
        *ended, rest = (rest + block).split(END_OF_TEXT)
        for text in ended:
            yield text, True
        kept = len(rest) - len(END_OF_TEXT)  # what follows may be the beginning of END_OF_TEXT
        if kept > 0:
            yield rest[:kept], False
            rest = rest[kept:]
    yield rest, True


def split_blocks(text: str) -> Iterator[tuple[str, bool]]:
    """Yield one document in blocks, and whether each is the last."""
    for begin in range(0, len(text) or 1, BLOCK):
        yield text[begin : begin + BLOCK], begin + BLOCK >= len(text)


def cut(blocks: Iterable[tuple[str, bool]], anywhere: bool = False) -> Iterator[tuple[str, bool]]:
    """Move the ends of blocks to places where no token crosses them; takes linear time and constant memory.

    Args:
        blocks: Blocks of documents, and whether each ends its document.
        anywhere: Whether every place is one, as for the bytes tokenizer.

    Raises:
        InputError: If more than MOST_UNCUT characters have no such place.
    """
    buffer = ""
    for block, ends in blocks:
        searched = len(buffer)
        buffer += block
        if ends:
            yield buffer, True
            buffer = ""
        elif place := len(buffer) if anywhere else _last_place(buffer, searched):
            yield buffer[:place], False
            buffer = buffer[place:]
        elif len(buffer) > MOST_UNCUT:
            raise InputError(
                f"more than {MOST_UNCUT:,} characters without words or line ends; split the text, or use the bytes "
                "tokenizer"
            )


def _last_place(text: str, searched: int) -> int:
    """Return the last place to cut; 0 if there is none. The first `searched` characters have none.

    One place is between any other character and white space: nothing in GPT-2's pattern matches both, the pattern
    looks ahead only from white space, and it never looks back.
    """
    space = max(text.rfind(character, searched) for character in _SPACES)
    if place := len(text[: space + 1].rstrip(WHITE_SPACE)) if space >= 0 else 0:
        return place
    place = 0
    for match in _BEFORE_PUNCTUATION.finditer(text, max(searched - 1, 0)):
        place = match.end()
    return place
