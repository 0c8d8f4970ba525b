"""Show what this project has cached on this machine, with its size, and delete it.

    python scripts/cache.py                     # every kind of cache, with its size
    python scripts/cache.py --clear corpora     # delete the downloaded corpora, after asking
    python scripts/cache.py --clear all --yes   # delete everything without asking

The compiled programs are those that JAX keeps for the next start, also in a folder of JAX_COMPILATION_CACHE_DIR.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Literal

from rich.prompt import Confirm
from rich.table import Table

from parity.cli import parse
from parity.console import PlainConsole
from parity.data.corpora import DOWNLOADS
from parity.data.shard_cache import corpora_folder
from parity.errors import InputError, exit_with_message
from parity.storage.paths import cache_folder
from parity.training.remote_runs import runs_folder


@dataclasses.dataclass(frozen=True)
class Args:
    clear: Literal["models", "vocabulary", "corpora", "evaluation", "runs", "compiled", "all"] | None = None
    """Delete this kind of cache, or all of them; by default nothing is deleted."""
    yes: bool = False
    """With --clear, delete without asking."""


def main() -> None:
    args, console = parse(Args, __doc__), PlainConsole(width=None if sys.stdout.isatty() else 200)
    if args.yes and args.clear is None:
        raise InputError("--yes is for --clear, which names what to delete")
    caches = cached_paths()
    table = Table("cache", "files", "size", "where")
    for kind, paths in caches.items():
        files = [file for path in paths for file in _files(path)]
        size = sum(file.lstat().st_size for file in files)
        table.add_row(kind, str(len(files)), f"{size / 1e6:,.1f} MB", ", ".join(map(str, paths)))
    console.print(table)
    if args.clear is None:
        return
    chosen = [path for kind, paths in caches.items() if args.clear in (kind, "all") for path in paths]
    if not chosen:
        console.print(f"there is nothing to delete ({args.clear})")
        return
    if not args.yes:
        if not sys.stdin.isatty():
            raise InputError(f"--clear {args.clear} asks before it deletes; add --yes to delete without confirmation")
        if not Confirm.ask(f"Delete {', '.join(map(str, chosen))}?", console=console, default=False):
            return
    for path in chosen:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    console.print(f"deleted {len(chosen)} files and folders")


def cached_paths() -> dict[str, list[Path]]:
    """Return the existing files and folders of each kind of cache; nothing else is ever deleted."""
    cache, compiled = cache_folder(), os.environ.get("JAX_COMPILATION_CACHE_DIR")
    kinds = {
        "models": [cache / "models"],
        "vocabulary": sorted(cache.glob("vocab.bpe*")),
        "corpora": [
            corpora_folder(),
            *(path for _, file in DOWNLOADS.values() for path in sorted(cache.glob(f"{file.name}*"))),
        ],
        "evaluation": [cache / "evaluation"],
        "runs": [runs_folder()],
        "compiled": [cache / "compiled", *([Path(compiled)] if compiled else [])],
    }
    return {kind: [path for path in paths if path.exists() or path.is_symlink()] for kind, paths in kinds.items()}


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


if __name__ == "__main__":
    with exit_with_message():
        main()
