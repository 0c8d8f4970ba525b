"""The estimates of plan.py against arithmetic by hand and against the memory that XLA reports for compiled steps."""

import re
import sys

import plan
import pytest
from support.gpu import has_cuda_plugin
from support.runs import run_script

from gpt_jax.memory import communication_bytes, memory
from gpt_jax.sharding import MeshShape
from parity.config import PRESETS, GPTConfig
from parity.errors import InputError
from parity.training.flops import flops_per_token, peak_flops


def test_model_flops_by_hand():
    """6N + 12LDT, where N leaves out the position table and an embedding that is only looked up."""
    config = GPTConfig(n_vocab=100, n_ctx=8, n_embd=4, n_head=2, n_layer=3)
    block = 12 * 4 * 4 + 13 * 4
    N = 100 * 4 + 3 * block + 2 * 4
    assert flops_per_token(config) == 6 * N + 12 * 3 * 4 * 8
    untied = GPTConfig(n_vocab=100, n_ctx=8, n_embd=4, n_head=2, n_layer=3, tied_head=False)
    assert flops_per_token(untied) == flops_per_token(config)
    assert flops_per_token(GPTConfig(50304, 1024, 768, 12, 12)) == pytest.approx(0.855e9, rel=1e-3)


def test_peaks_by_the_names_that_gpus_give_themselves():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("a toaster") is None


def test_communication_by_hand():
    config = PRESETS["124M"]
    parameters = 124_439_808
    assert communication_bytes(config, MeshShape(), 8, 1, "float32") == {}
    [size] = communication_bytes(config, MeshShape(data=8), 8, 4, "float32").values()
    assert size == int(2 * 7 / 8 * parameters * 4 * 4)
    gathered, scattered = communication_bytes(config, MeshShape(fsdp=8), 8, 4, "bfloat16").values()
    assert gathered == int(2 * 7 / 8 * parameters * 2 * 4)
    assert scattered == int(7 / 8 * parameters * 2 * 4)
    assert communication_bytes(config, MeshShape(fsdp=8), 8, 4, "bfloat16", "cpu").popitem()[1] == 2 * scattered
    # Two sums forward and two backward in each of 12 layers, of [4, 1024, 768] in two bytes.
    size, head = communication_bytes(config, MeshShape(tensor=2), 4, 1, "bfloat16").values()
    assert size == 2 * 1 / 2 * 4 * 12 * 4 * 1024 * 768 * 2
    assert head == 50257 * 768 * 2


def test_memory_shrinks_as_it_should():
    config = PRESETS["1558M"]
    one, eight = (memory(config, MeshShape(fsdp=size), 8, "bfloat16") for size in (1, 8))
    assert one.moments == 2 * one.parameters == 2 * 4 * 1_557_611_200
    assert one.compute_copy == one.parameters // 2
    assert one.parameters / eight.parameters == pytest.approx(8, rel=0.01)
    assert one.activations == 8 * eight.activations
    kinds = [memory(config, MeshShape(), 8, "bfloat16", kind).activations for kind in ("none", "products", "all")]
    assert kinds == sorted(kinds, reverse=True)
    fused = memory(config, MeshShape(), 8, "bfloat16", attention="cudnn")
    assert fused.activations < memory(config, MeshShape(), 8, "bfloat16").activations / 2


@pytest.mark.parametrize(
    ("preset", "mesh", "more"),
    [
        ("124M", "data=1", ()),
        ("124M", "fsdp=8", ()),
        pytest.param("1558M", "fsdp=8", ("--remat", "products"), marks=pytest.mark.slow),
        pytest.param("124M", "data=2,fsdp=2,tensor=2", ("--remat", "all"), marks=pytest.mark.slow),
        pytest.param("355M", "data=8", ("--remat", "products"), marks=pytest.mark.slow),
    ],
)
def test_the_memory_model_against_xla(preset, mesh, more):
    """On a mesh where XLA gathers a batch, or stores what it should recompute, the estimate would be far off."""
    options = ("--preset", preset, "--mesh", mesh, "--dtype", "float32", "--accumulate", "30", "--compile")
    result = run_script("plan.py", *options, *more)
    assert result.returncode == 0, result.stderr
    sizes = re.search(r"XLA reports ([\d.]+) GB .* the estimate is ([\d.]+) GB", result.stdout)
    xla, estimate = map(float, sizes.groups())
    print(f"{preset} over {mesh} {' '.join(more)}: XLA {xla} GB, estimate {estimate} GB")
    assert 0.8 < estimate / xla < 1.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "toaster"), "--device toaster: its peak rate is unknown; give --tokens-per-s"),
        (
            ("--mesh", "fsdp=8", "--accumulate", "40"),
            "micro-batches of 12 windows are not divisible by data x fsdp = 8",
        ),
        (("--mfu", "0"), "--mfu must be between 0 and 1"),
        (("--mfu", "1.5"), "--mfu must be between 0 and 1"),
        (("--tokens", "nan"), "--tokens must be positive"),
        (("--memory-gb", "inf"), "--memory-gb must be positive"),
        (("--compile", "--unroll", "0"), "--unroll must be at least 1, got 0"),
        (("--unroll", "2"), "--unroll is for --compile and --compile-for"),
        (("--compile", "--hlo", "step.txt"), "--hlo is for --compile-for"),
        (("--mfu", "0.5", "--tokens-per-s", "1e5"), "--tokens-per-s replaces --mfu"),
        (("--preset", "9B"), "unknown preset '9B'"),
        (("--accumulate", "7"), "batch_size=480 is not divisible by accumulate=7"),
        (("--accumulate", "0"), "accumulate must be between 1 and"),
        (
            ("--preset", "shakespeare-char", "--mesh", "data=3"),
            "batches of 64 windows are not divisible by data",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py", *options])
    with pytest.raises(InputError, match=re.escape(message)):
        plan.main()


@pytest.mark.parametrize("unknown", [{"remat": "dots"}, {"attention": "sdpa"}], ids=str)
def test_estimates_of_unknown_implementations_are_refused(unknown):
    with pytest.raises(InputError, match=f"^{next(iter(unknown))} must be .*, got"):
        memory(PRESETS["tiny"], MeshShape(), 8, "float32", **unknown)


def test_by_default_the_micro_batch_is_the_largest_that_fits(monkeypatch, capsys):
    def printed(*options):
        monkeypatch.setattr(sys, "argv", ["plan.py", *options])
        plan.main()
        return capsys.readouterr().out

    assert "--accumulate 3: 160 windows" in printed("--preset", "124M")
    assert "--accumulate 2: 240 windows" in printed("--device", "H200")
    assert "--accumulate 40: 12 windows" in printed("--preset", "1558M")
    assert "--accumulate 3: 160 windows" in printed("--preset", "1558M", "--mesh", "fsdp=8")
    small = printed("--preset", "1558M", "--memory-gb", "24")
    assert "--accumulate 480: 1 windows" in small
    assert "This is more than fits the 75% that JAX reserves of 24 GB: raise --accumulate" in small


@pytest.mark.skipif(has_cuda_plugin(), reason="the extra cuda13 is installed")
def test_compiling_for_a_gpu_needs_the_extra(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--compile-for", "H100"])
    with pytest.raises(InputError, match=r"no program can be compiled for an H100 here .*the extra cuda13: .*-m pip"):
        plan.main()
