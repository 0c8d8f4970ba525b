"""Text as it was before a corpus was cut into words, as far as others' programs restore it.

Published numbers depend on these rules, so they are kept with their errors: none of them can be inverted, and some
change or join words. The order matters. They are those of Megatron-LM (tasks/zeroshot_gpt/detokenizer.py) and
lm-evaluation-harness.
"""

import re
from collections.abc import Sequence


def _replaced(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


_SPACES_AROUND_LINES = ((" \n", "\n"), ("\n ", "\n"))


def wikitext(text: str) -> str:
    """Restore the text of WikiText.

    Errors that are kept: apostrophes count as quotation marks and lose the spaces inside, ` N ` becomes ` 1 `, and the
    rule for years such as '90 never applies, because it contains slashes.
    """
    text = text.replace("s '", "s'")
    text = re.sub("/' [0-9]/", "/'[0-9]/", text)
    text = _replaced(text, [(f" @{mark}@ ", mark) for mark in "-,."])
    text = _replaced(text, [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"])
    for opening, closing in ("()", "[]", "{}", '""', "''"):
        inside = rf"{re.escape(opening)}\s*([^{re.escape(closing)}]*?)\s*{re.escape(closing)}"
        text = re.sub(inside, rf"{opening}\1{closing}", text)
    text = _replaced(
        text, [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}")]
    )
    return _replaced(text, [*_SPACES_AROUND_LINES, (" N ", " 1 "), (" 's", "'s")])


def ptb(text: str) -> str:
    """Restore the text of the Penn Treebank.

    Errors that are kept: ` N ` becomes `1 ` and joins the word before it.
    """
    rules = [(" '", "'"), *_SPACES_AROUND_LINES, (" n't", "n't"), (" N ", "1 "), ("$ 1", "$1"), ("# 1", "#1")]
    return _replaced(text, rules)


def cbt(text: str) -> str:
    """Restore the text of the Children's Book Test."""
    quotes = [("`` ", '"'), ("''", '"')]
    marks = [(f" {mark}", mark) for mark in ":;!?,."]
    return _replaced(text, [(" '", "'"), *_SPACES_AROUND_LINES, (" n't", "n't"), *quotes, *marks])
