"""Files on disk and from the network: atomic writes and resumable, verified downloads."""
