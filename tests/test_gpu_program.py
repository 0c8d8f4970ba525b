"""The programs that H100s and H200s would run, compiled without a GPU: `make test-gpu-program`.

The claims of docs/results/gpu-program.md. Times are estimates from the programs; everything else is a fact of theirs.
"""

import dataclasses
import re
import sys
from typing import NamedTuple

import plan
import pytest
from support.gpu import compile_decoding, has_cuda_plugin

from gpt_jax import hlo, roofline
from gpt_jax.gpu_targets import COMPILER_OPTIONS, GPUS, target
from gpt_jax.lowering import StepOptions, lower_train_step, memory_bytes
from gpt_jax.memory import communication_bytes, memory
from gpt_jax.micro_batches import RESERVED, USABLE
from gpt_jax.sharding import MeshShape
from parity.config import PRESETS
from parity.training.flops import flops_per_token, peak_flops
from parity.training.settings import recipe

pytestmark = [
    pytest.mark.gpu_program,
    pytest.mark.optimized,
    pytest.mark.skipif(not has_cuda_plugin(), reason="compiling for a GPU needs the extra cuda13"),
]


class Case(NamedTuple):
    """A training step, and what it must not exceed: GB of memory, and seconds of the estimate."""

    preset: str
    gpu: str
    accumulate: int
    mesh: str = "data=1"
    most_gb: float = 1e9
    most_seconds: float = 1e9
    least_share: float = 0
    """Least fraction of the GPU's peak."""


CASES = [
    Case("124M", "H100", 8, most_gb=24, least_share=0.415),
    Case("124M", "H100", 3),
    Case("355M", "H100", 8),
    Case("774M", "H100", 16),
    Case("1558M", "H100", 40, most_gb=62, least_share=0.54),
    Case("124M", "H200", 2),
    Case("355M", "H200", 4),
    Case("774M", "H200", 8),
    Case("1558M", "H200", 16),
    Case("124M-fineweb-edu", "H100", 8, "data=8", most_seconds=0.16),
    Case("124M-fineweb-edu", "H100", 8, "fsdp=8", most_seconds=0.16),
    Case("124M-fineweb-edu", "H100", 8, "data=2,fsdp=2,tensor=2", most_seconds=0.22),
    Case("1558M", "H100", 5, "fsdp=8", most_seconds=1.45),
]


class Step(NamedTuple):
    case: Case
    needed: int
    """Bytes of memory on each device."""
    not_donated: int
    """Bytes of results that are not in the place of an argument."""
    program: hlo.Program
    reading: roofline.Reading


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case.preset} {case.mesh} {case.gpu} {case.accumulate}"
)
def step(request):
    case = request.param
    preset, shape = recipe(case.preset), MeshShape.parse(case.mesh)
    settings = dataclasses.replace(preset.settings, accumulate=case.accumulate)
    unroll, remat = preset.program(preset.model.n_layer, "gpu")
    options = StepOptions("cudnn", unroll, remat)
    compiled = lower_train_step(preset.model, settings, options, target(case.gpu, shape)).compile(COMPILER_OPTIONS)
    analysis, program = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    not_donated = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    reading = roofline.read(program, case.gpu, shape.size)
    return Step(case, memory_bytes(compiled), not_donated, program, reading)


def test_memory(step):
    case = step.case
    preset, shape = recipe(case.preset), MeshShape.parse(case.mesh)
    micro_size = preset.settings.batch_size // case.accumulate
    estimate = memory(preset.model, shape, micro_size, "bfloat16", "none", "cudnn").total
    print(f"{step.needed / 1e9:.2f} GB, estimate {estimate / 1e9:.2f} GB")
    assert estimate == pytest.approx(step.needed, rel=0.07)
    assert step.needed <= min(case.most_gb * 1e9, USABLE * RESERVED * GPUS[case.gpu].memory_bytes)
    assert step.not_donated < 1000, "all but the loss and the norm of the gradient is donated"


def test_products_and_attention_run_on_tensor_cores(step):
    """All products have factors of 16 bits. Only the gradient of the head, a sum over all chunks, is in float32."""
    n_calls = recipe(step.case.preset).model.n_layer * step.case.accumulate
    assert step.reading.calls(roofline.ATTENTION_FORWARD) == n_calls
    assert step.reading.calls(roofline.ATTENTION_BACKWARD) == n_calls
    assert set(step.reading.products()) == {"bf16 x bf16 -> bf16", "bf16 x bf16 -> f32"}
    assert {k.category for k in step.reading.kernels if k.dtypes.endswith("f32")} == {"loss: products"}


def test_gelu_is_computed_by_the_product_before_it(step):
    n_calls = recipe(step.case.preset).model.n_layer * step.case.accumulate
    assert sum(k.times for k in step.reading.kernels if '"BIAS_GELU_AUX"' in k.operation.attributes) == n_calls


def test_activations_are_written_in_16_bits(step):
    """Large float32 arrays are parameters, their gradients, and the normalized inputs in LayerNorm's gradient."""
    preset, shape = recipe(step.case.preset), MeshShape.parse(step.case.mesh)
    tokens = preset.settings.batch_size // step.case.accumulate * preset.model.n_ctx // (shape.data * shape.fsdp)
    wide = {
        kernel.category
        for kernel in step.reading.kernels
        for array in hlo.shapes(kernel.operation.shape)
        if array.dtype == "f32" and array.nbytes >= 4 * tokens * preset.model.n_embd
    }
    assert wide <= {"LayerNorm", "loss", "loss: products", "optimizer", "sums over micro-batches", "other"}


def test_the_host_does_nothing(step):
    assert step.reading.transfers == []
    assert step.reading.host_loops == []


def test_messages(step):
    case = step.case
    preset, shape = recipe(case.preset), MeshShape.parse(case.mesh)
    micro_size = preset.settings.batch_size // case.accumulate
    estimate = sum(communication_bytes(preset.model, shape, micro_size, case.accumulate, "bfloat16").values())
    sent = step.reading.total(None, messages=True).nbytes
    print(f"{sent / 1e9:.2f} GB, estimate {estimate / 1e9:.2f} GB")
    assert sent <= 1.2 * estimate
    for loop in step.program.loops():
        if "head_loss" in step.program.functions(loop):
            inner = roofline.read(dataclasses.replace(step.program, entry=loop.called), case.gpu, shape.size)
            assert inner.categories(messages=True) == [], "the loss sends messages for each chunk"


def test_estimated_time(step):
    case = step.case
    preset, n_devices = recipe(case.preset), MeshShape.parse(case.mesh).size
    flops = flops_per_token(preset.model) * preset.settings.batch_size * preset.model.n_ctx / n_devices
    share = flops / step.reading.seconds / peak_flops(case.gpu)
    print(f"{step.reading.seconds:.3f} s, {share:.1%} of the peak")
    assert step.reading.seconds <= case.most_seconds
    assert share >= case.least_share


def test_every_kernel_is_attributed_to_a_part_of_the_step(step):
    assert step.reading.total("other").seconds < 0.06 * step.reading.total().seconds
    assert set(step.reading.categories()) - {"other", "products", "loss: products", "attention"} <= set(
        roofline.CATEGORIES.values()
    )


@pytest.mark.parametrize(
    ("batch_size", "n_prompt", "n_slots", "options", "most_gb"),
    [
        (1, 512, None, {"temperature": 0}, 0.30),
        (1, 512, None, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}, 0.31),
        # The weights and a cache of 512 slots are 0.85 GB, those of 640 slots, which a prompt of 512 needs, 1.0 GB.
        (32, 256, 512, {"temperature": 0}, 1.10),
        (32, 512, None, {"temperature": 0}, 1.25),
    ],
    ids=str,
)
def test_decoding_reads_the_weights_and_the_cache_once(batch_size, n_prompt, n_slots, options, most_gb):
    compiled = compile_decoding(PRESETS["124M"], batch_size, n_prompt, options, n_slots)
    analysis, program = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    assert analysis.output_size_in_bytes - analysis.alias_size_in_bytes < 1000, "the cache is written in place"
    whole = roofline.read(program, "H100")
    assert whole.transfers == []
    [loop] = [loop for loop in program.loops() if loop.trip_count is None]
    assert whole.host_loops == [loop.name], "the host waits once per token"
    token = roofline.read(dataclasses.replace(program, entry=loop.called), "H100")
    total = token.total()
    assert whole.total().calls == total.calls, "no weights are rearranged before the first token of each call"
    speed = batch_size / (token.seconds + 10e-6)  # and the time in which the host reads the condition of the loop
    print(f"{total.calls} kernels, {total.nbytes / 1e9:.3f} GB per token, {speed:,.0f} tokens/s")
    assert total.nbytes <= most_gb * 1e9


def test_plan_prints_the_program(monkeypatch, capsys, tmp_path):
    options = ("--preset", "shakespeare-char", "--attention", "explicit", "--compile-for", "H200")
    monkeypatch.setattr(sys, "argv", ["plan.py", *options, "--hlo", str(tmp_path / "step.txt")])
    monkeypatch.setenv("COLUMNS", "150")
    plan.main()
    output = capsys.readouterr().out
    assert "the step as compiled for 1 H200, per device" in output
    for pattern in (
        r"│ products +│ +[\d,]+ +│ +[\d.]+ +│ +[\d.]+ +│ +[\d.]+ +│",
        r"^compiled +in \d+ s by jax .*; explicit attention, unroll 6$",
        r"^memory +[\d.]+ GB; [\d.]+ GB estimated above; \d+ bytes of results",
        r"^attention +0 fused calls forward, 0 backward",
        r"^host +0 transfers, 0 loops",
        r"^step +[\d.]+ s, [\d,]+ tokens/s per device, [\d.]+% of the peak: an estimate",
    ):
        assert re.search(pattern, output, re.MULTILINE), pattern
    assert hlo.parse((tmp_path / "step.txt").read_text()).entry.startswith("main")
