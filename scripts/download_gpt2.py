"""Download the seven files of one of OpenAI's GPT-2 models, verify them, and print their folder.

python scripts/download_gpt2.py 124M
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from parity.cli import parse
from parity.config import Size
from parity.errors import InputError, exit_with_message
from parity.weights.openai_files import download_model


@dataclasses.dataclass(frozen=True)
class Args:
    size: tyro.conf.Positional[Size]
    """Size of the model, which is its number of parameters."""
    folder: Path | None = None
    """Folder for the files; by default models/SIZE in the cache folder, which GPT_PARITY_CACHE moves."""
    base_url: tuple[str, ...] = ()
    """Base URLs to try in this order; URL/SIZE/FILE is each file's address. By default OpenAI's and a mirror."""
    offline: bool = False
    """Open no connection: check the files that are present, and report an error if one is missing."""


def main() -> None:
    args = parse(Args, __doc__)
    if args.offline and args.base_url:
        raise InputError("--offline opens no connection; leave out --base-url")
    folder = download_model(args.size, args.folder, args.base_url, args.offline or None, recheck=True)
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    with exit_with_message():
        main()
