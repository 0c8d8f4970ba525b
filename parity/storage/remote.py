"""Objects in buckets and on web servers: one small interface for every kind of address.

An address is SCHEME://... It stands for a folder of objects, or for one object, whose name is then empty. Supported
are s3 (with the extra s3), gs (extra gcs), hf (datasets of the Hugging Face Hub, with the package huggingface_hub),
https and http (reading only), file, and memory, which lasts as long as the process. Credentials come from where the
client libraries look for them: their environment variables and files. An address that contains any is refused, and no
message shows them.
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from parity.storage.bucket import CLIENTS, Bucket
from parity.storage.folder import Folder
from parity.storage.paths import is_offline
from parity.storage.remote_base import DamagedError, Entry, MissingError, Remote, RemoteError
from parity.storage.web import Web

__all__ = [
    "DamagedError",
    "Entry",
    "MissingError",
    "Remote",
    "RemoteError",
    "is_address",
    "open_remote",
    "shown_address",
]

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WEB = ("https", "http")


def is_address(text: object) -> bool:
    """Return whether a text is an address (SCHEME://...) and not a path."""
    return isinstance(text, str) and _ADDRESS.match(text) is not None


def open_remote(address: str) -> Remote:
    """Return the objects at an address. No connection is made yet.

    Raises:
        RemoteError: For an unknown scheme, an address that contains credentials, a package that is not installed (the
            message names the extra), and any address of a network while GPT_PARITY_OFFLINE forbids connections.
    """
    shown = shown_address(address)
    try:
        parts = urlsplit(address)
        scheme = parts.scheme.lower()
        has_password = "@" in parts.netloc
    except ValueError:
        raise RemoteError(f"{shown} is not a valid address") from None
    known = (*CLIENTS, *_WEB, "file")
    if not _ADDRESS.match(address) or scheme not in known:
        raise RemoteError(f"{shown}: an address begins with one of {', '.join(f'{name}://' for name in known)}")
    if has_password:
        raise RemoteError(
            f"{shown} contains credentials; set them in the environment, and name the address without them"
        )
    if scheme not in ("file", "memory") and is_offline():
        raise RemoteError(f"{shown}: connections are forbidden (GPT_PARITY_OFFLINE)")
    if scheme == "file":
        return Folder(shown, Path(unquote(parts.path)), parts.netloc)
    if not parts.netloc and scheme != "memory":
        raise RemoteError(f"{shown}: the address names no {'server' if scheme in _WEB else 'bucket'}")
    return Web(shown, address) if scheme in _WEB else Bucket(shown, address, scheme)


def shown_address(address: str) -> str:
    """Return an address without user, password, query and fragment, any of which may hold a secret.

    In a bucket, "?" and "#" are characters of a name like any other.
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        return "the address"
    scheme, _, rest = address.partition("://")
    if scheme.lower() in CLIENTS:
        bucket, slash, name = rest.partition("/")
        return f"{scheme}://{bucket.rpartition('@')[2]}{slash}{name}"
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", "")) if host else address.partition("?")[0]
