"""The uploads of a run that is mirrored: on a thread of their own, which training never waits for.

Each checkpoint is requested when it is complete. While one is uploaded, a newer request replaces the one that waits, so
a bucket that is slower than the run gets fewer checkpoints. Whatever fails is reported, and repeated until it succeeds
or the run has ended.
"""

import contextlib
import json
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console

from parity.errors import InputError
from parity.storage.remote import open_remote
from parity.storage.retry import retrying
from parity.training.checkpoints import step_folder
from parity.training.lease import RENEWAL_SECONDS, Lease, SupersededError
from parity.training.mirror import check_id
from parity.training.mirrored import CONFIG, MirroredRun, complete_steps
from parity.training.runs import RunFolder
from parity.training.settings import TrainSettings

TRIES_AT_THE_END = 5
"""Number of failures, after the last step, after which the newest checkpoint is given up."""
LONGEST_PAUSE = 60
"""Largest number of seconds between two tries."""


class Upload(NamedTuple):
    """A checkpoint that is to be uploaded."""

    step: int
    best: int | None
    """The step with the lowest validation loss so far, whose checkpoint is kept."""
    sizes: dict[str, int]
    """Sizes in bytes of the files that grow."""


class Uploads:
    """The uploads of one run to one address. The thread runs while this is entered as a context.

    Args:
        address: Where the run is mirrored.
        run: The run folder.
        settings: Its settings, which say what is kept.
        console: Where to report.

    Raises:
        RemoteError: If the address cannot be written to.
    """

    def __init__(self, address: str, run: RunFolder, settings: TrainSettings, console: Console):
        self._mirrored = MirroredRun(open_remote(address))
        self._lease = Lease(self._mirrored.remote)
        self.address = self._mirrored.remote.address
        """The address, without anything secret."""
        self.safe: int | None = None
        """The newest step that is complete at the address."""
        self._run, self._settings, self._console = run, settings, console
        self._changed = threading.Condition()
        self._waiting: Upload | None = None
        self._running: Upload | None = None
        self._requested: int | None = None
        self._ending, self._problem = False, ""
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def claim(self, is_new: bool, damaged: Iterable[int] = ()) -> str:
        """Take the lease of the address for this run, and return what the summary of the run says about it.

        Args:
            is_new: Whether the run begins, so that the address may hold none.
            damaged: Steps whose checkpoints there are damaged. They are complete again when they are uploaded again.

        Raises:
            InputError: If the address holds another run, or a run at all if this one is new, or cannot be written.
        """
        present = retrying(self._mirrored.config)
        if is_new and present is not None:
            raise InputError(
                f"--mirror {self.address} already holds a run; continue it with --resume, or name another address"
            )
        check_id(self._run, present, self.address)
        if present is None and retrying(self._mirrored.steps):
            raise InputError(
                f"--mirror {self.address} holds checkpoints of a run whose {CONFIG} is missing; name another address"
            )
        former = retrying(self._lease.take)
        for step in damaged:
            self._mirrored.withdraw(step)
        if present is None:
            content = json.dumps(self._run.config(), indent=2).encode() + b"\n"
            with contextlib.suppress(FileExistsError):
                retrying(self._mirrored.remote.create, CONFIG, content)
            check_id(self._run, retrying(self._mirrored.config), self.address)
        if former is None or not former.is_active:
            return self.address
        return f"{self.address}; {former.owner} last wrote to it {former.age:.0f} s ago and can no longer write"

    def request(self, step: int) -> None:
        """Upload the checkpoint of a step, and the files of the run as they are now, as soon as possible."""
        files = (self._run.metrics_file, self._run.samples_file)
        sizes = {file.name: file.stat().st_size for file in files if file.exists()}
        with self._changed:
            self._waiting = Upload(step, self._run.metrics.best_step(), sizes)
            self._requested = step
            self._changed.notify_all()

    def held(self) -> set[int]:
        """Return the steps whose checkpoints must not be deleted now, because they are being uploaded or will be."""
        with self._changed:
            uploads = [upload for upload in (self._running, self._waiting) if upload is not None]
        return {step for upload in uploads for step in (upload.step, upload.best) if step is not None}

    def finished(self, seconds: float) -> bool:
        """Wait for the uploads, after the last request, and return whether they have ended or were given up."""
        with self._changed:
            if first := not self._ending:
                self._ending = True
                self._changed.notify_all()
        if first and self.safe != self._requested and self._thread.is_alive():
            self._report(f"{self._state()}; uploading step {self._requested}")
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the uploads, except after Ctrl-C, and report which step is safe."""
        try:
            while kind is not KeyboardInterrupt and not self.finished(60):
                pass
        finally:
            if self._requested is not None:
                lost = ""
                if self.safe != self._requested:
                    lost = (
                        f"; step {self._requested} is not ({self._problem or 'its upload was interrupted'}); to upload "
                        f"it, run --resume --run {self._run.path} --mirror {self.address}"
                    )
                self._report(self._state() + lost)

    def _work(self) -> None:
        """Upload until the end of the run; whatever goes wrong ends neither the run nor this thread in silence."""
        try:
            self._upload_requests()
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"
            self._report(f"{self._problem}; this process no longer uploads anything")

    def _upload_requests(self) -> None:
        """Upload what is requested, and renew the lease, until the end of the run."""
        failures = failures_at_the_end = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ending or self._waiting is not None, RENEWAL_SECONDS)
                if self._ending and self._waiting is None:
                    break
                self._running, self._waiting = self._waiting, None
                upload = self._running
            try:
                if upload is None:
                    self._lease.renew()
                else:
                    self._upload(upload)
            except SupersededError as error:
                self._problem = str(error)
                self._report(f"{error}; this process no longer uploads anything")
                with self._changed:
                    self._running = self._waiting = None
                return
            except Exception as error:  # training goes on, whatever happens to its mirror
                self._problem = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                failures += 1
                if failures == 1:
                    self._report(f"{self._problem}; training goes on, and the upload is tried again")
                with self._changed:
                    failures_at_the_end += self._ending
                    self._waiting, self._running = self._waiting or upload, None
                    if failures_at_the_end == TRIES_AT_THE_END:
                        return
                    self._changed.wait(min(LONGEST_PAUSE, 2.0 ** min(failures_at_the_end or failures, 6)))
                continue
            if failures:
                self._report("works again")
            failures, failures_at_the_end, self._problem, self._running = 0, 0, "", None
        with contextlib.suppress(InputError):
            self._lease.renew(ended=True)

    def _upload(self, upload: Upload) -> None:
        settings = self._settings
        names = self._mirrored.push(self._run, upload.step, upload.sizes, self._lease.check)
        if self.safe != upload.step:
            self.safe = upload.step
            if not self._ending:
                self._report(self._state())
        if upload.best not in (None, upload.step) and self._waiting is None:
            names = self._upload_best(upload, names)
        self._mirrored.retain(names, upload.step, settings.keep, settings.keep_every, upload.best, self._lease.check)
        self._lease.renew()

    def _upload_best(self, upload: Upload, names: list[str]) -> list[str]:
        """Upload the best checkpoint, if a newer one took its place while it waited; return the objects' names."""
        assert upload.best is not None
        is_local = step_folder(self._run.checkpoints, upload.best).is_dir()
        if is_local and upload.best not in complete_steps(names):
            return self._mirrored.push(self._run, upload.best, upload.sizes, self._lease.check)
        return names

    def _state(self) -> str:
        return f"{'no step' if self.safe is None else f'step {self.safe}'} is safe at {self.address}"

    def _report(self, text: str) -> None:
        self._console.print(f"{'mirror':<10} {text}", highlight=False, soft_wrap=True)
