"""Download the seven files of one of OpenAI's GPT-2 models, verify them, and print their folder.

python scripts/download_gpt2.py 124M
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from parity.cli import parse
from parity.errors import exit_with_message
from parity.weights.openai_files import download_model


@dataclasses.dataclass(frozen=True)
class Args:
    size: tyro.conf.Positional[Literal["124M", "355M", "774M", "1558M"]]
    """Number of parameters of the model."""
    folder: Path | None = None
    """Folder for the files; by default models/SIZE in the cache folder (GPT_PARITY_CACHE)."""
    base_url: tuple[str, ...] = ()
    """Addresses of folders that hold SIZE/NAME, in the order to try; by default OpenAI's and a mirror."""
    offline: bool = False
    """Only check whether the files are there; an error if one is missing."""


def main() -> None:
    args = parse(Args, __doc__)
    folder = download_model(args.size, args.folder, args.base_url, args.offline or None)
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    with exit_with_message():
        main()
