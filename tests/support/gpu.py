"""Whether programs can be compiled for GPUs here."""

from importlib.metadata import PackageNotFoundError, version


def has_cuda_plugin():
    """Whether the extra cuda13 is installed; it needs no GPU."""
    try:
        return bool(version("jax-cuda13-plugin"))
    except PackageNotFoundError:
        return False
