"""What gpt_jax.hlo and gpt_jax.roofline read from compiled programs, against arithmetic by hand.

tests/support/step.hlo is a small program in the form that XLA writes for GPUs; test_gpu_program.py reads real ones.
"""

import collections
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gpt_jax import hlo, loss, model, roofline, train_step
from gpt_jax.gpu_targets import GPUS
from parity.training.flops import peak_flops

TEXT = (Path(__file__).parent / "support" / "step.hlo").read_text()
BANDWIDTH, PEAK = 0.85 * GPUS["H100"].bandwidth, peak_flops("H100")
LAUNCH = 1e-6


@pytest.fixture(scope="module")
def program():
    return hlo.parse(TEXT)


@pytest.fixture(scope="module")
def reading(program):
    return roofline.read(program, "H100", 8)


@pytest.fixture(scope="module")
def kernels(reading):
    return {kernel.operation.name: kernel for kernel in reading.kernels}


def test_operations_and_loops_are_read(program):
    assert program.entry == "main.9"
    assert [(loop.name, loop.trip_count) for loop in program.loops()] == [("loop", 8), ("tokens_loop", None)]
    gemm = program.computations["region_body"]["gemm"]
    assert (gemm.kind, gemm.operands, gemm.target) == ("custom-call", ("w", "w"), "__cublas$lt$matmul")
    assert hlo.n_bytes(gemm.shape) == 2 * 1024 * 1024  # without the scratch memory
    assert program.functions(gemm)[0] == "FeedForward.__call__"
    assert program.functions(gemm)[-1] == "make_train_step.<locals>.train_step"


def test_parents_of_stack_frames_may_be_counted_from_0_or_1():
    def with_parents(offset):
        return re.sub(r"parent_frame_id=(\d+)", lambda match: f"parent_frame_id={int(match[1]) - offset}", TEXT)

    plain = hlo.parse(with_parents(1)).callers
    assert hlo.parse(TEXT).callers == plain
    assert plain[4] == ("GELU.__call__", *plain[3])
    without = re.sub(r"FileNames.*?\n%", "\n%", TEXT, count=1, flags=re.DOTALL)
    assert hlo.parse(without).callers == {}


def test_products(kernels, reading):
    gemm, head = kernels["gemm"], kernels["head"]
    assert (gemm.times, gemm.category, gemm.flops) == (8, "products", 2 * 1024**3)
    assert gemm.nbytes == 3 * 2 * 1024**2
    assert gemm.seconds == pytest.approx(40.5e-6 + LAUNCH)  # as in XLA's table
    assert (head.times, head.category, head.flops) == (1, "loss: products", 2 * 100 * 64 * 32)
    assert head.nbytes == 2 * (100 * 64 + 64 * 32) + 4 * 100 * 32
    assert reading.products() == {"bf16 x bf16 -> bf16": 8, "bf16 x bf16 -> f32": 1}


def test_what_is_sliced_or_updated_in_place_counts_in_part(kernels):
    gelu, update = kernels["gelu"], kernels["update"]
    assert (gelu.category, gelu.flops, gelu.nbytes) == ("GELU", 0, (2 + 4) * 100 * 64 + 4)
    assert (update.category, update.nbytes) == ("sums over micro-batches", (2 + 4) * 100 * 64 + 4)
    assert update.seconds == pytest.approx(update.nbytes / BANDWIDTH + LAUNCH)


def test_fused_attention(kernels, reading):
    forward, backward = kernels["forward"], kernels["backward"]
    assert forward.flops == 2 * 4 * 12 * 128**2 * 64
    assert backward.flops == 5 * 4 * 12 * 128**2 * 64
    assert {forward.category, backward.category} == {"attention"}
    assert forward.seconds == pytest.approx(max(forward.flops / 0.35 / PEAK, forward.nbytes / BANDWIDTH) + LAUNCH)
    assert reading.calls(roofline.ATTENTION_FORWARD) == reading.calls(roofline.ATTENTION_BACKWARD) == 8


def test_messages(kernels, reading):
    gather, total = kernels["gather-start"], kernels["sum"]
    held = 2 * 1024 * 1024
    assert (gather.category, gather.nbytes) == ("all-gather", 3 * held)  # four devices
    assert (total.category, total.nbytes) == ("all-reduce", 2 * 7 / 8 * 2 * 8 * 100 * 64)
    assert total.seconds == pytest.approx(total.nbytes / 400e9 + 12e-6)
    assert reading.categories(messages=True) == ["all-gather", "all-reduce"]
    assert reading.total("all-gather", messages=True).calls == 8


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[2,4]T(1,0)", 4),
        ("mesh['a'=1,'b'=4,'c'=2] {'b'}", 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b'}", 8),
        ("{}", 16),
    ],
)
def test_groups_of_devices(groups, size):
    line = f"  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, replica_groups={groups}, to_apply=%add"
    [operation] = hlo.parse(f"ENTRY %main () -> f32[] {{\n{line}\n}}").computations["main"].values()
    assert hlo.group_size(operation, 16) == size


def test_messages_overlap_with_kernels_until_their_result_is_needed(kernels, reading):
    beside = sum(kernels[name].seconds for name in ("gemm", "gelu", "update", "forward", "backward"))
    message, synchronous = kernels["gather-start"].seconds, kernels["sum"].seconds
    expected = 8 * (max(message, beside) + synchronous) + kernels["head"].seconds + kernels["to_host"].seconds
    assert beside > message
    assert reading.seconds == pytest.approx(expected)


def test_what_waits_for_the_host_is_found(reading):
    assert reading.transfers == ["to_host"]
    assert reading.host_loops == ["tokens_loop"]


def test_the_functions_of_the_categories_exist():
    names = collections.Counter()
    for module in (loss, model, train_step):
        for line in inspect.getsource(module).splitlines():
            names.update(re.findall(r"(?:def|class) (\w+)", line))
    for function in roofline.CATEGORIES:
        for part in function.replace(".<locals>", "").split("."):
            assert part in names or part in ("Embed", "__call__"), function


def test_a_program_of_this_machine_can_be_read():
    def step(w, x):
        return jax.lax.fori_loop(0, 4, lambda _, y: jnp.tanh(y @ w), x).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (32, 64))]
    compiled = jax.jit(step).lower(*shapes).compile()
    program = hlo.parse(compiled.as_text())
    assert [loop.trip_count for loop in program.loops()] == [4]
    dots = [op for computation in program.computations.values() for op in computation.values() if op.kind == "dot"]
    assert len(dots) <= 1  # XLA may call a library instead
    assert roofline.read(program, "H100").total().calls > 4
