"""Models under the modes and wrappers of their framework: every public function works, or says in one line why not."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support.models import TINY, random_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import gpt_jax
import gpt_jax.loss
import gpt_torch
import gpt_torch.loss
import gpt_torch.notebook
from gpt_jax.train import Trainer
from parity import interpret
from parity.errors import InputError
from parity.training.settings import recipe

INPUTS, TARGETS = random_batch(TINY)
IDS, TARGET_IDS = torch.from_numpy(INPUTS).long(), torch.from_numpy(TARGETS).long()
SAMPLING = {
    "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "stop": [[1, 2]],
    "eos_id": 4, "samples": 2,
}  # fmt: skip


def model_of(package, **options):
    return package.GPTModel(TINY, seed=1, **options)


# Torch: the public functions of a model, each with a result that can be compared.
FUNCTIONS = {
    "cast": lambda model: dict(gpt_torch.cast(model, "bfloat16").named_parameters()),
    "export_weights": gpt_torch.export_weights,
    "generate": lambda model: gpt_torch.generate(model, [[1, 2], [3]], 30, **SAMPLING),
    "generate_text_simple": lambda model: gpt_torch.generate_text_simple(model, IDS, 3, 24).tolist(),
    "stream": lambda model: list(gpt_torch.stream(model, [[1, 2]], 4)),
    "run_with_cache": lambda model: gpt_torch.run_with_cache(model, IDS)[1],
    "run_with_patches": lambda model: {"logits": gpt_torch.run_with_patches(model, IDS, {"embed": np.ones(20)})},
    "calc_loss": lambda model: {"loss": gpt_torch.loss.calc_loss(model, IDS, TARGET_IDS)},
    "summed_loss": lambda model: {"loss": gpt_torch.loss.summed_loss(model, IDS, TARGET_IDS)},
    "calc_loss_batch": lambda model: {"loss": gpt_torch.notebook.calc_loss_batch(IDS, TARGET_IDS, model)},
}
WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": torch.nn.DataParallel,
    "compiled in DataParallel": lambda model: torch.nn.DataParallel(torch.compile(model, backend="eager")),
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


def assert_same(result, expected):
    if not isinstance(expected, dict):
        assert result == expected
        return
    assert result.keys() == expected.keys()
    for name in expected:
        assert torch.equal(torch.as_tensor(result[name]), torch.as_tensor(expected[name])), name


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_torch_models_go_through_every_function(wrapper, tmp_path):
    model = model_of(gpt_torch)
    wrapped = WRAPPERS[wrapper](model)
    for function in FUNCTIONS.values():
        assert_same(function(wrapped), function(model))
    weights = gpt_torch.export_weights(gpt_torch.GPTModel(TINY, seed=2))
    gpt_torch.load_weights(wrapped, weights)
    gpt_torch.save_pretrained(wrapped, tmp_path)
    assert_same(gpt_torch.export_weights(gpt_torch.load_pretrained(tmp_path)), weights)


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_what_is_no_model_is_refused_by_its_class(package):
    for wrong in (None, torch.nn.Linear(2, 2), jax.random.key(0)):
        for function in (
            lambda model: package.generate(model, [[1]], 1),
            lambda model: package.run_with_cache(model, INPUTS),
            package.export_weights,
            package.merge,
            lambda model: package.cast(model, "float32"),
            lambda model: package.classify(model, [[1]]),
            lambda model: package.save_classifier(model, "folder"),
            lambda model: package.save_adapter(model, "folder"),
            lambda model: package.save_pretrained(model, "folder"),
        ):
            with pytest.raises(
                InputError, match=rf"a {package.__name__}.GPTModel is needed, got .*{type(wrong).__name__}"
            ):
                function(wrong)


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
@pytest.mark.parametrize("dtype", [None, "int8", "float31", 3])
def test_a_model_has_a_dtype_of_floating_point_numbers(package, dtype):
    with jax.enable_x64(True), pytest.raises(InputError, match=f"dtype '?{dtype}"):
        package.cast(model_of(package), dtype)


class Reads(TorchDispatchMode):
    """Counts the single numbers that are read from a tensor, for each of which the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_forward_pass_reads_its_ids_in_one_transfer():
    model = model_of(gpt_torch)
    with Reads() as reads:
        model(IDS)
        assert reads.count == 0
        IDS.max().item()
        assert reads.count == 1


class Loss(torch.nn.Module):
    """The loss as a module, of which torch.func differentiates."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, targets):
        return gpt_torch.loss.calc_loss(self.model, inputs, targets)


def test_torch_func():
    """Gradients per sample are those of each sample alone; a bad id in one sample is named."""
    module = Loss(model_of(gpt_torch))
    parameters = dict(module.named_parameters())

    def loss(parameters, inputs, targets):
        return functional_call(module, parameters, (inputs[None], targets[None]))

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, IDS, TARGET_IDS)
    for row in range(len(IDS)):
        alone = torch.autograd.grad(loss(parameters, IDS[row], TARGET_IDS[row]), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            assert torch.allclose(gradients[name][row], gradient, atol=1e-6), name
    logits = vmap(lambda ids: gpt_torch.run_with_cache(module.model, ids[None])[1]["logits"][0])(IDS)
    assert torch.allclose(logits, module.model(IDS), atol=1e-5)
    _, slope = torch.func.jvp(lambda p: loss(p, IDS[0], TARGET_IDS[0]), (parameters,), (parameters,))
    expected = sum((gradients[name][0] * p).sum() for name, p in parameters.items())
    assert slope.detach().item() == pytest.approx(float(expected.detach()), rel=1e-4)
    bad = IDS.clone()
    bad[1, 5] = 97
    with pytest.raises(InputError, match="token id 97 is outside"):
        vmap(lambda ids: module.model(ids[None]))(bad)
    with pytest.raises(InputError, match="target 97 is outside"):
        vmap(lambda targets: gpt_torch.loss.calc_loss(module.model, IDS[:1], targets[None]))(bad)


def fake():
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), fake], ids=["meta", "fake"])
def test_torch_models_without_values(mode, tmp_path):
    """Shapes are computed; what needs values is refused, and never silently left undone."""
    weights = gpt_torch.export_weights(model_of(gpt_torch))
    with mode():
        model = gpt_torch.GPTModel(TINY)
        ids = torch.zeros(2, 12, dtype=torch.int64)
        logits, cache = gpt_torch.run_with_cache(model, ids)
        assert logits.shape == model(ids).shape == (2, 12, 97)
        assert cache["blocks.2.attn.pattern"].shape == (2, 4, 12, 12)
        assert gpt_torch.loss.calc_loss(model, ids, ids).shape == ()
        assert gpt_torch.cast(model, "bfloat16").tok_emb.weight.dtype == torch.bfloat16
        for function in (
            lambda: gpt_torch.generate(model, [[1]], 3),
            lambda: gpt_torch.export_weights(model),
            lambda: gpt_torch.save_pretrained(model, tmp_path / "never"),
            lambda: gpt_torch.load_weights(model, weights),
        ):
            with pytest.raises(InputError, match=r"parameter tok_emb.weight has no values"):
                function()


def test_models_of_inference_mode_are_not_loaded_into_outside_of_it():
    weights = gpt_torch.export_weights(model_of(gpt_torch))
    with torch.inference_mode():
        model = gpt_torch.GPTModel(TINY)
        gpt_torch.load_weights(model, weights)
    assert gpt_torch.generate(model, [[1]], 3) == gpt_torch.generate(model_of(gpt_torch), [[1]], 3)
    with pytest.raises(InputError, match=r"made under torch.inference_mode"):
        gpt_torch.load_weights(model, weights)


def test_generation_leaves_the_mode_of_each_module_also_midway_and_after_errors():
    model = gpt_torch.GPTModel(dataclasses.replace(TINY, drop_rate=0.5))
    model.train()
    model.drop_emb.eval()
    modes = [module.training for module in model.modules()]
    stream = gpt_torch.stream(model, [[1, 2]], 3)
    for _ in stream:
        assert [module.training for module in model.modules()] == modes
    gpt_torch.notebook.evaluate_model(model, [], [])
    with torch.no_grad():
        model.tok_emb.weight[0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        gpt_torch.generate(model, [[0]], 3)
    with pytest.raises(ZeroDivisionError):
        gpt_torch.notebook.evaluate_model(model, Failing(), [])
    assert [module.training for module in model.modules()] == modes


class Failing:
    """A loader whose batches cannot be read."""

    def __len__(self):
        return 1

    def __iter__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_cast_copies(package):
    model = model_of(package)
    if package is gpt_torch:
        model.pos_emb.weight.requires_grad_(False)
    before = package.export_weights(model)
    for dtype in ("bfloat16", "float16", "float32"):
        copy = package.cast(model, dtype)
        package.load_weights(copy, package.export_weights(package.GPTModel(TINY, seed=2)))
        after = package.export_weights(model)
        assert all(np.array_equal(after[name], before[name]) for name in before)
        assert {str(array.dtype) for array in package.export_weights(copy).values()} == {dtype}
    if package is gpt_torch:
        assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in model.parameters()]
    for wrong in ("int8", "complex64", "single precision", None):
        with pytest.raises(InputError, match=r"dtype .*float32"):
            package.cast(model, wrong)
    if package is gpt_jax:
        with pytest.raises(InputError, match="float64 needs jax_enable_x64"):
            package.cast(model, "float64")


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_interpretation_of_caches_with_gradients_and_short_dtypes(package, tmp_path):
    """The caches of a model in bfloat16 are those of a float32 model with the same weights, within its rounding."""
    ids = IDS if package is gpt_torch else jnp.asarray(INPUTS)
    short = package.cast(model_of(package), "bfloat16")
    results = []
    for model in (short, package.cast(short, "float32")):
        _, cache = package.run_with_cache(model, ids)
        if package is gpt_torch:
            assert cache["embed"].requires_grad
        weights = package.export_weights(model)

        def run(patches, model=model):
            return package.run_with_patches(model, ids, patches)

        names = ["embed", "blocks.1.attn.z"]
        sweep = interpret.patching_sweep(run, cache, cache, names, lambda logits: float(logits.sum()))
        results.append(
            {
                "lens": interpret.logit_lens(TINY, weights, cache)["embed"],
                "parts": interpret.direct_logit_attribution(TINY, weights, cache, 3)["blocks.1.mlp.out"],
                "scores": interpret.induction_scores(TINY, cache, 4),
                "sweep": sweep["embed"] / run({}).sum().item(),
            }
        )
        picture = interpret.plot_attention(tmp_path / "a.png", cache["blocks.0.attn.pattern"][0])
        assert picture.read_bytes().startswith(b"\x89PNG")
    for name, expected in results[1].items():
        assert np.abs(results[0][name] - expected).max() < 0.03 * max(1, np.abs(expected).max()), name


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_patches_of_any_kind(package):
    model, ids = model_of(package), IDS if package is gpt_torch else jnp.asarray(INPUTS)

    def logits(patch):
        return np.asarray(package.run_with_patches(model, ids, {"embed": patch}).tolist())

    expected = logits(np.full(20, 0.5, np.float32))
    for patch in (
        0.5,
        [0.5] * 20,
        np.full(20, 0.5),
        jnp.full(20, 0.5, jnp.bfloat16),
        torch.full((20,), 0.5, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.full((20,), 0.5)),
        lambda x: np.full(20, 0.5),
    ):
        assert np.array_equal(logits(patch), expected)
    with pytest.raises(InputError, match="patch of embed is None"):
        logits(lambda x: None)
    with pytest.raises(InputError, match=r"patch of embed: shape \[3\]"):
        logits(lambda x: [0.5] * 3)


# JAX


@contextlib.contextmanager
def strict():
    """All of JAX's modes that refuse something."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.checking_leaks(),
        jax.enable_x64(True),
    ):
        yield


def train_step(config, dtype):
    settings = dataclasses.replace(recipe("tiny").settings, dtype=dtype, batch_size=2, accumulate=2)
    trainer = Trainer(config, settings)
    batch = trainer.to_device(INPUTS[:, None], TARGETS[:, None])
    return trainer.train_step(batch, 1e-3, 0)


NOTEBOOK = dataclasses.replace(TINY, tied_head=False, qkv_bias=False, drop_rate=0.1)
JAX_FUNCTIONS = {
    "loss": lambda model: jax.value_and_grad(gpt_jax.loss.calc_loss)(model, INPUTS, TARGETS),
    "generate": lambda model: gpt_jax.generate(model, [[1, 2], [3]], 30, **SAMPLING),
    "probe": lambda model: gpt_jax.run_with_cache(model, jnp.asarray(INPUTS), patches={"embed": np.ones(20)}),
    "trainer": lambda _: train_step(NOTEBOOK, "bfloat16"),
    "float64": lambda model: gpt_jax.generate(
        gpt_jax.cast(model, "float64"), [[1, 2]], 3, temperature=0.9, top_k=3, return_logprobs=True
    ),
}


@pytest.mark.parametrize("name", JAX_FUNCTIONS)
def test_the_strict_modes_of_jax(name):
    with strict():
        result = JAX_FUNCTIONS[name](model_of(gpt_jax))
        numbers = [leaf for leaf in jax.tree.leaves(result) if not isinstance(leaf, int)]
        assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in numbers)


def test_forward_mode_of_the_loss_agrees_with_its_gradient():
    model = gpt_jax.GPTModel(dataclasses.replace(TINY, n_layer=1), seed=1)

    def scaled_loss(factor):
        return gpt_jax.loss.summed_loss(jax.tree.map(lambda p: p * factor, model), INPUTS, TARGETS)

    forward, backward = (jax.jit(derivative(scaled_loss))(jnp.ones(())) for derivative in (jax.jacfwd, jax.grad))
    assert float(forward) == pytest.approx(float(backward), rel=1e-4)
    assert abs(float(forward)) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_mode_of_the_head(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 24, 20), dtype)
    head = jax.random.normal(jax.random.key(1), (97, 20), dtype)

    def loss(x, head):
        return gpt_jax.loss.head_loss(x, head, TARGETS)

    value, slope = jax.jvp(loss, (x, head), (x, head))
    gradients = jax.grad(loss, (0, 1))(x, head)
    expected = sum((np.float64(g) * np.float64(a)).sum() for g, a in zip(gradients, (x, head), strict=True))
    assert value == loss(x, head)
    assert slope.dtype == jnp.float32
    assert float(slope) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_differentiated_by_either_input_alone():
    """A frozen head or input has no tangent, and costs no product."""
    x, head = jax.random.normal(jax.random.key(0), (2, 24, 20)), jax.random.normal(jax.random.key(1), (97, 20))
    both = jax.grad(gpt_jax.loss.head_loss, (0, 1))(x, head, TARGETS)
    for argument in (0, 1):
        alone = jax.grad(gpt_jax.loss.head_loss, argument)(x, head, TARGETS)
        assert np.array_equal(alone, both[argument])


def test_jax_models_without_values_are_refused():
    abstract = jax.eval_shape(lambda: model_of(gpt_jax))
    for function, message in (
        (lambda model: gpt_jax.generate(model, [[1]], 3), "generation needs a model with values"),
        (gpt_jax.export_weights, "parameter .* has no values"),
    ):
        with pytest.raises(InputError, match=message):
            function(abstract)
        with pytest.raises(InputError, match=message):
            jax.jit(lambda model, function=function: function(model) and None)(model_of(gpt_jax))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, jax.disable_jit], ids=["jit", "disable_jit"])
def test_a_decoder_is_independent_of_its_model(mode):
    config, prompts = dataclasses.replace(TINY, n_layer=1), [[1, 2]]
    model = gpt_jax.GPTModel(config, seed=1)
    expected = gpt_jax.generate(model, prompts, 2)
    with mode():
        decoder = gpt_jax.for_decoding(model)
    before = gpt_jax.export_weights(model)
    assert gpt_jax.generate(decoder, prompts, 2) == expected
    after = gpt_jax.export_weights(model)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    gpt_jax.load_weights(model, {name: np.zeros_like(array) for name, array in before.items()})
    assert gpt_jax.generate(decoder, prompts, 2) == expected


def test_load_weights_keeps_the_device_of_a_model():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    model = jax.device_put(model_of(gpt_jax), sharding)
    gpt_jax.load_weights(model, gpt_jax.export_weights(gpt_jax.GPTModel(TINY, seed=2)))
    assert {leaf.sharding for leaf in jax.tree.leaves(model)} == {sharding}
    fresh = model_of(gpt_jax)
    assert not any(leaf.committed for leaf in jax.tree.leaves(fresh))
