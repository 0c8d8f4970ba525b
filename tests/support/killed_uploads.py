"""Upload checkpoints in processes that can be killed.

    python killed_uploads.py

For each line "FOLDER ADDRESS STEP" on standard input, a child process uploads the checkpoint of the run, and deletes
the older ones there. Its number is printed when it begins, and "end STATUS" when it ends.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from parity.storage.remote import open_remote
from parity.training.mirrored import MirroredRun
from parity.training.runs import RunFolder


class Uploader:
    """The process that forks, which has imported what the children need."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, __file__], **pipes)

    def start(self, run, address, step):
        """Begin an upload; return the number of its process."""
        print(run.path, address, step, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def wait(self):
        """Return the exit status of the upload: 0, or -SIGKILL if it was killed."""
        return int(self._process.stdout.readline().split()[1])

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def main():
    for line in sys.stdin:
        path, address, step = line.split()
        if (child := os.fork()) == 0:
            print(os.getpid(), flush=True)
            mirrored = MirroredRun(open_remote(address))
            names = mirrored.push(RunFolder(Path(path)), int(step), {}, lambda: None)
            mirrored.retain(names, int(step), 1, None, None, lambda: None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("end", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
