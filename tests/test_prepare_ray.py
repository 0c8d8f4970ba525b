"""A Ray cluster with two working nodes prepares the same bytes as one process, whatever dies meanwhile."""

import os
import sys

import pytest
from support.corpora import (
    SETTINGS,
    KilledInFirstPass,
    KilledInSecondPass,
    NodeKilledInFirstPass,
    NodeKilledInSecondPass,
    prepared_files,
    write_mixed,
)
from support.runs import ROOT, run_program, run_script

from parity.data.engines import RayCluster
from parity.data.shards import prepare_shards
from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError

pytestmark = [
    pytest.mark.clusters,
    # Ray starts its processes by fork, about which JAX warns if another test has imported it.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore:os.fork:RuntimeWarning"),
]
BYTES = ByteTokenizer()
NODE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    """A head, and two nodes with a CPU each, on which all work is done."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed; see the extra clusters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")  # workers import support.corpora
        started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **NODE})
        try:
            for _ in range(2):
                started.add_node(num_cpus=1, **NODE)
            started.wait_for_nodes()
            yield started
        finally:
            started.shutdown()


@pytest.fixture(scope="module")
def engine(cluster):
    with RayCluster(cluster.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "in"
    write_mixed(folder)
    return folder


def check(tmp_path, mixed, engine, options, tokenizer=BYTES):
    index = prepare_shards([mixed], tmp_path / "ray", tokenizer, **options, engine=engine)
    assert prepare_shards([mixed], tmp_path / "whole", BYTES, **options) == index
    assert prepared_files(tmp_path / "ray") == prepared_files(tmp_path / "whole")


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_nodes_give_the_same_bytes(tmp_path, mixed, engine, setting):
    check(tmp_path, mixed, engine, SETTINGS[setting])


@pytest.mark.parametrize(("tokenizer", "use"), [(KilledInFirstPass, 4), (KilledInSecondPass, 1)])
def test_a_killed_worker_is_replaced(tmp_path, mixed, engine, tokenizer, use):
    options = SETTINGS["shards larger than files"]
    check(tmp_path, mixed, engine, options, tokenizer(tmp_path / "killed", use))
    assert (tmp_path / "killed").exists()


@pytest.mark.parametrize(("tokenizer", "use"), [(NodeKilledInFirstPass, 4), (NodeKilledInSecondPass, 1)])
def test_the_work_of_a_killed_node_is_done_by_the_other(tmp_path, mixed, cluster, engine, tokenizer, use):
    options = SETTINGS["shards larger than files"]
    check(tmp_path, mixed, engine, options, tokenizer(tmp_path / "killed", use))
    assert (tmp_path / "killed").exists()
    cluster.add_node(num_cpus=1, **NODE)


def test_the_first_bad_file_is_reported_in_one_line(tmp_path, engine):
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_text("nonsense" if number in (2, 3) else '{"text": "x"}')
    files = [tmp_path / f"{number}.jsonl" for number in range(6)]
    with pytest.raises(InputError, match=r"^\S*2\.jsonl, line 1 is not valid JSON"):
        prepare_shards(files, tmp_path / "out", BYTES, engine=engine)


_STATISTICS = """
import os
from parity.data.engines import RayCluster
with RayCluster("local") as cluster:
    from ray._common.usage.usage_lib import usage_stats_enabled
    print(usage_stats_enabled(), *cluster.map(os.getenv, [("RAY_USAGE_STATS_ENABLED",)]))
"""


def test_a_cluster_of_its_own_sends_no_usage_statistics():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_USAGE_STATS_ENABLED"}
    result = run_program([sys.executable, "-c", _STATISTICS], env={**environment, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "False 0"


def test_the_script_starts_a_cluster_of_its_own(tmp_path, mixed):
    arguments = (mixed, "--tokenizer", "bytes", "--shard-tokens", "2000", "--out")
    result = run_script("prepare_data.py", *arguments, tmp_path / "ray", "--ray", "local", env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    prepare_shards([mixed], tmp_path / "whole", BYTES, shard_tokens=2000)
    assert prepared_files(tmp_path / "ray") == prepared_files(tmp_path / "whole")
