"""The order of windows that needs no table is a permutation, stays the same for ever, and old runs keep theirs."""

import json
import tracemalloc

import numpy as np
import pytest

from parity.data.window_order import keyed_order, order
from parity.data.windows import Windows
from parity.errors import InputError
from parity.training.args import JobArgs, parse_job_args
from parity.training.job import load_job
from parity.training.runs import RunFolder


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_it_is_a_permutation(seed):
    for count in [*range(1, 70), 1000, 2**16 - 1, 2**16, 2**16 + 1]:
        for epoch in (0, 3):
            whole = keyed_order(seed, epoch, count, np.arange(count))
            assert whole.dtype == np.int64
            assert np.array_equal(np.sort(whole), np.arange(count)), count


def test_a_billion_windows_need_no_memory():
    """Of 400,000 numbers drawn from 10^9 about 80 would be equal; those of a permutation never are."""
    count, places = 10**9, np.random.default_rng(0).choice(10**9, 400_000, shuffle=False, replace=False)
    tracemalloc.start()
    windows = keyed_order(1, 2, count, places)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(places)) == len(np.unique(windows)) == len(places)
    assert windows.min() >= 0
    assert windows.max() < count
    assert peak < 100e6
    counts = np.bincount(windows * 100 // count, minlength=100)  # 4,000 in each hundredth, with a deviation of 63
    assert abs(counts - 4000).max() < 5 * 63
    neighbours = keyed_order(1, 2, count, np.arange(100_000))
    steps = np.diff(neighbours)
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.016  # 5 deviations of 1 / sqrt(100,000)
    assert len(np.unique(steps)) > 99_900  # no pattern of distances


def test_every_window_is_equally_likely_at_every_place():
    count, epochs = 12, 2000
    table = np.array([keyed_order(5, epoch, count, np.arange(count)) for epoch in range(epochs)])
    for place in range(count):
        counts = np.bincount(table[:, place], minlength=count)
        expected = epochs / count
        assert ((counts - expected) ** 2 / expected).sum() < 45  # chi squared with 11 degrees of freedom; p = 5e-6


def test_the_orders_never_change():
    """Runs that were begun with an earlier version are resumed in the same order."""
    assert keyed_order(0, 0, 1000, np.arange(8)).tolist() == [589, 548, 858, 304, 500, 315, 209, 504]
    assert keyed_order(7, 3, 10**9, np.arange(3)).tolist() == [850363650, 982932289, 825192537]
    assert order(0, 0, 1000)[:8].tolist() == [748, 911, 2, 893, 354, 751, 62, 418]


def test_batches_hold_every_window_once_per_epoch():
    data = Windows([np.arange(a, a + 90, dtype=np.uint16) for a in (0, 100)], 8, 300, order="keyed")
    windows = [window for step in range(2 * len(data)) for window in data.batch_windows(3, step, 7)]
    epochs = [windows[i * len(data) : (i + 1) * len(data)] for i in range(14)]
    assert all(sorted(epoch) == list(range(len(data))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    inputs, targets = data.batch(3, 5, 7)
    assert (targets == inputs + 1).all()
    assert np.array_equal(inputs[[4, 1]], data.batch(3, 5, 7, [4, 1])[0])
    shuffled = Windows(data.shards, 8, 300)
    assert shuffled.batch_windows(3, 0, 7) != windows[:7]
    assert shuffled.batch_windows(3, 0, len(data)) == order(3, 0, len(data)).tolist()


def _parse(*arguments):
    return parse_job_args(JobArgs, None, list(map(str, arguments)))


def test_a_run_keeps_its_order(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    options = ("--preset", "tiny", "--corpus", text, "--run", tmp_path / "run")
    old, new = (load_job(_parse(*options, *more)) for more in ((), ("--window-order", "keyed")))
    assert (old.train.order, new.train.order) == ("shuffled", "keyed")
    run = RunFolder(tmp_path / "run")
    entries = {"preset": "tiny", "init_from": None, "model": new.config.to_dict(), "train": new.settings.__dict__}
    run.create(entries)
    run.unlock()
    assert load_job(_parse("--run", run.path, "--resume")).train.order == "keyed"
    resumed = load_job(_parse("--run", run.path, "--resume", "--window-order", "shuffled"))
    with pytest.raises(InputError, match=r"train.window_order was 'keyed' and is now 'shuffled'"):
        run.update({**entries, "train": resumed.settings.__dict__})


def test_a_run_that_is_older_than_the_setting_is_the_same_run(tmp_path):
    """Its checkpoints record a hash of the settings it had."""
    run, hashes = RunFolder(tmp_path), {}
    for order_of_windows in (None, "shuffled", "keyed"):
        train = {"seed": 0, **({"window_order": order_of_windows} if order_of_windows else {})}
        (tmp_path / "config.json").write_text(json.dumps({"id": "x", "model": {"n_ctx": 8}, "train": train}))
        hashes[order_of_windows] = run.identity().settings
    # What version 0.2 computed for these settings before there was a choice of orders.
    assert hashes[None] == hashes["shuffled"] == "375f03f743acf3ea5634f1a02c241d9c537cfa3182f2e7b4edc2da036730f973"
    assert hashes["keyed"] != hashes["shuffled"]
