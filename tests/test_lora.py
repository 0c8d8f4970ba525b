"""LoRA: the adapted model, its gradients and updates, against NumPy; and the trained part of a model in general."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import numpy_oracle as oracle
from support.models import BACKENDS, TINY, probing_weights, random_batch
from support.tolerances import LOGITS_ATOL
from support.trained import full_precision, train_steps

import gpt_jax
import gpt_jax.lora
import gpt_jax.train
import gpt_jax.train_step
import gpt_torch
import gpt_torch.lora
import gpt_torch.train
from parity.comparison.compare import compare
from parity.config import IGNORE_INDEX, PRESETS
from parity.errors import InputError
from parity.training import optimizer_state
from parity.training.settings import recipe
from parity.weights import adapters, initial_weights, peft_files, rows
from parity.weights.adapters import LoraConfig, initial_adapter, n_adapter_params

LORA = {"torch": gpt_torch.lora, "jax": gpt_jax.lora}
TRAINER = {"torch": gpt_torch.train.Trainer, "jax": gpt_jax.train.Trainer}
D, PREFIX = TINY.n_embd, "base_model.model.transformer."
OPTIONS = {
    "all": LoraConfig(rank=3, alpha=7.0),
    "q and v": LoraConfig(rank=3, alpha=7.0, targets=("q", "v")),
    "k and a matrix": LoraConfig(rank=2, alpha=5.0, targets=("k", "v", "mlp.in"), rslora=True),
    "square": LoraConfig(rank=D, alpha=9.0, targets=("attn.out",)),
}
names = pytest.mark.parametrize("name", BACKENDS)
# Some steps are clipped and others are not; decay and learning rate are large enough to matter.
SETTINGS = dataclasses.replace(
    recipe("tiny").settings, steps=100, batch_size=4, accumulate=2, weight_decay=0.3, dtype="float64"
)
LR = 1e-3
# The last two layers and the final norm, as in a classifier.
LAST_LAYERS = [
    dataclasses.replace(row, layers=(1, 2)) if row.per_layer else row
    for row in rows(TINY)
    if row.per_layer or row.huggingface.startswith("ln_f")
]
KINDS = {
    "all": {"lora": OPTIONS["all"]},
    "q and v": {"lora": OPTIONS["q and v"]},
    "last layers": {"table": LAST_LAYERS},
}


CLIP = {"all": 0.15, "q and v": 0.03, "last layers": 0.55}


def settings_of(kind):
    return dataclasses.replace(SETTINGS, clip=CLIP[kind])


def probing_adapter(lora, seed=0):
    """Draw an adapter in which nothing is zero but the outputs of q, k and v that the columns of B do not adapt."""
    generator = np.random.default_rng(seed)
    parts = [part for part in "qkv" if part in lora.targets]
    arrays = {}
    for name, zeros in initial_adapter(TINY, lora, 0, np.float64).items():
        arrays[name] = array = generator.normal(size=zeros.shape) * 0.3
        if parts and "c_attn.lora_B" in name:
            for column in range(array.shape[1]):
                own = "qkv".index(parts[column // lora.rank])
                array[: own * D, column] = array[(own + 1) * D :, column] = 0
    return arrays


def scale_of(lora):
    return lora.alpha / (np.sqrt(lora.rank) if lora.rslora else lora.rank)


def weight_of(name):
    return name.removeprefix(PREFIX).replace(".lora_A.", ".")


def merged(weights, arrays, scale):
    """W + scale * (B A), as peft defines it for transformers' transposed matrices."""
    result = dict(weights)
    for name, a in arrays.items():
        if "lora_A" in name:
            result[weight_of(name)] = weights[weight_of(name)] + scale * (arrays[name.replace("_A", "_B")] @ a).T
    return result


def adapted_model(name, lora, weights, arrays, folder):
    peft_files.write(folder, TINY, peft_files.Adapter(lora, arrays))
    model = BACKENDS[name].build(TINY, weights)
    LORA[name].load_adapter(model, folder)
    return model


def logits_of(name, model, tokens):
    if name == "torch":
        with torch.inference_mode():
            return model(torch.from_numpy(tokens).long()).numpy()
    return np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens)))


# The adapted model


def logits_comparison(name, lora, folder):
    weights, arrays, tokens = probing_weights(TINY), probing_adapter(lora), random_batch(TINY)[0]
    expected = oracle.logits(TINY, merged(weights, arrays, scale_of(lora)), tokens)
    with full_precision():
        got = logits_of(name, adapted_model(name, lora, weights, arrays, folder), tokens)
    return compare("logits", got, expected, LOGITS_ATOL[np.float64])


@names
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_are_those_of_the_sum(name, options, tmp_path):
    result = logits_comparison(name, OPTIONS[options], tmp_path)
    assert result.ok, str(result)


@names
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_new_adapter_does_not_change_the_logits(name, dtype):
    weights, tokens = probing_weights(TINY, dtype), random_batch(TINY)[0]
    with full_precision():
        model = BACKENDS[name].build(TINY, weights)
        before = logits_of(name, model, tokens)
        LORA[name].add_lora(model, OPTIONS["all"])
        np.testing.assert_array_equal(logits_of(name, model, tokens), before)


def test_initial_adapters_are_the_same_and_uniform():
    models = {"torch": gpt_torch.GPTModel(TINY), "jax": gpt_jax.GPTModel(TINY)}
    for name, model in models.items():
        LORA[name].add_lora(model, OPTIONS["all"], seed=5)
    ours, theirs = (LORA[name].export_adapter(models[name]) for name in models)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
        if "lora_A" in name:  # kaiming_uniform with a = sqrt(5): a bound of 1 / sqrt(in), which few draws approach
            assert 0.9 < np.abs(array).max() * np.sqrt(array.shape[1]) <= 1
            assert abs(array.mean()) * np.sqrt(array.shape[1]) < 0.3
        else:
            assert not array.any()
    assert not np.array_equal(
        ours[f"{PREFIX}h.0.attn.c_attn.lora_A.weight"], ours[f"{PREFIX}h.1.attn.c_attn.lora_A.weight"]
    )


@names
@pytest.mark.parametrize("options", ["all", "k and a matrix"])
def test_merge_is_the_sum_and_leaves_the_model(name, options, tmp_path):
    lora, weights, tokens = OPTIONS[options], probing_weights(TINY), random_batch(TINY)[0]
    arrays = probing_adapter(lora)
    with full_precision():
        model = adapted_model(name, lora, weights, arrays, tmp_path)
        before = logits_of(name, model, tokens)
        plain = LORA[name].merge(model)
        expected = merged(weights, arrays, scale_of(lora))
        for parameter, array in (gpt_torch if name == "torch" else gpt_jax).export_weights(plain).items():
            np.testing.assert_allclose(array, expected[parameter], rtol=0, atol=1e-14)
        np.testing.assert_array_equal(logits_of(name, model, tokens), before)
        if name == "jax":
            assert jax.tree.structure(plain) == jax.tree.structure(BACKENDS[name].build(TINY, weights))
        else:
            assert [type(m) for m in plain.modules()] == [type(m) for m in gpt_torch.GPTModel(TINY).modules()]
            assert all(parameter.requires_grad for parameter in plain.parameters())


@names
def test_generation_uses_the_adapter(name, tmp_path):
    """Merged or not, greedy tokens are those of the merged weights, and others than the base's."""
    lora, weights = OPTIONS["all"], probing_weights(TINY, np.float32)
    arrays = {n: a.astype(np.float32) for n, a in probing_adapter(lora).items()}
    package = gpt_torch if name == "torch" else gpt_jax
    model = adapted_model(name, lora, weights, arrays, tmp_path)
    plain = BACKENDS[name].build(TINY, merged(weights, arrays, np.float32(scale_of(lora))))
    got, expected, base = (
        package.generate(m, [[1, 2, 3]], 12, temperature=0) for m in (model, plain, BACKENDS[name].build(TINY, weights))
    )
    assert got == expected
    assert got != base


# Dropout


def outputs_with_dropout(name, rate=0.5, rank=1):
    """Return what one adapter with A = B = 1 adds to each output, [B, T, D], in training."""
    lora = LoraConfig(rank=rank, alpha=1.0, dropout=rate, targets=("attn.out",))
    model = (gpt_torch if name == "torch" else gpt_jax).GPTModel(TINY)
    LORA[name].add_lora(model, lora)
    if name == "torch":
        linear = model.trf_blocks[0].att.out_proj.train()
        torch.nn.init.ones_(linear.lora_A), torch.nn.init.ones_(linear.lora_B)
        torch.nn.init.zeros_(linear.weight)
        torch.manual_seed(0)
        with torch.no_grad():
            return linear(torch.ones(8, 16, D)).numpy()
    model = gpt_jax.lora.with_dropout(model, jax.random.key(0))
    linear = jax.tree.map(lambda leaf: leaf[0], model.trf_blocks.att.out_proj)
    linear.lora_A[...], linear.lora_B[...] = jnp.ones_like(linear.lora_A[...]), jnp.ones_like(linear.lora_B[...])
    linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    return np.asarray(linear(jnp.ones((8, 16, TINY.n_head, TINY.head_width))))


def assert_input_is_dropped(outputs):
    """Every output is twice the number of kept inputs, and their number is binomial with half of D as its mean."""
    assert (outputs == outputs[..., :1]).all()
    kept = outputs[..., 0] / 2
    np.testing.assert_allclose(kept, kept.round(), atol=1e-5)
    assert len(set(kept.round().flatten().tolist())) > 5
    assert abs(kept.mean() - D / 2) < 4 * np.sqrt(D / 4 / kept.size)


@names
def test_dropout_is_of_the_adapters_input(name):
    assert_input_is_dropped(outputs_with_dropout(name))


def dropout_of_the_result(name, monkeypatch):
    if name == "torch":

        def forward(self, x):
            h = torch.nn.functional.linear(x, self.lora_A)
            h = torch.nn.functional.dropout(h, self.drop_rate, self.training)
            return torch.nn.Linear.forward(self, x) + self.scale * torch.nn.functional.linear(h, self.lora_B)

        monkeypatch.setattr(gpt_torch.lora.LoraLinear, "forward", forward)
    else:

        def call(self, x):
            h = gpt_jax.lora.dropout(jnp.tensordot(x, self.lora_A[...], 2), self.drop_rate, self.key)
            return super(gpt_jax.lora.LoraLinear, self).__call__(x) + self.scale * jnp.tensordot(h, self.lora_B[...], 1)

        monkeypatch.setattr(gpt_jax.lora.LoraLinear, "__call__", call)


@names
def test_dropout_of_the_result_is_caught(name, monkeypatch):
    dropout_of_the_result(name, monkeypatch)
    with pytest.raises(AssertionError):
        assert_input_is_dropped(outputs_with_dropout(name))


@names
def test_dropout_is_a_function_of_the_step_and_off_in_evaluation(name):
    lora = dataclasses.replace(OPTIONS["q and v"], dropout=0.5)
    trainer = TRAINER[name](TINY, dataclasses.replace(SETTINGS, dtype="float32"), lora=lora)
    trainer.train_step(trainer.to_device(*batch(0)), 0.1, 0)  # B is no longer zero

    def losses(step):  # a learning rate of 0 changes nothing
        evaluated = float(trainer.evaluate_batch(trainer.to_device(*(part[0] for part in batch(1)))))
        return evaluated, float(trainer.train_step(trainer.to_device(*batch(1)), 0.0, step)["loss"])

    first, again, other = losses(1), losses(1), losses(2)
    assert first == again
    assert first[0] == other[0]
    assert first[1] != other[1]


# Training


def batch(step):
    """Return inputs and targets int32 [A, B, T], whose micro-batches have unequal numbers of targets."""
    inputs, targets = random_batch(TINY, 4, seed=step)
    targets = targets.copy()
    targets[0, : step % 20] = IGNORE_INDEX
    return inputs.reshape(2, 2, -1), targets.reshape(2, 2, -1)


def train(name, kind, steps, change=lambda trainer: None):
    """Train, and return ([(loss, norm)], [trained arrays before and after each step]), and check the frozen ones."""
    with full_precision():
        trainer = TRAINER[name](TINY, settings_of(kind), **KINDS[kind])
        change(trainer)
        return train_steps(name, trainer, map(batch, range(steps)), LR)


@pytest.fixture(scope="module")
def runs():
    return {(name, kind): train(name, kind, 100) for name in BACKENDS for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_update_of_a_hundred_steps(runs, kind):
    """Rounding is some 1e-16, which a hundred steps let grow: measured 1e-12 of the largest update of a parameter."""
    (metrics, trail), (other_metrics, other_trail) = runs["torch", kind], runs["jax", kind]
    np.testing.assert_allclose(other_metrics, metrics, rtol=1e-12)
    assert 5 < (metrics[:, 1] > CLIP[kind]).sum() < 95
    for step in range(100):
        for name in trail[0]:
            update = trail[step + 1][name] - trail[step][name]
            other = other_trail[step + 1][name] - other_trail[step][name]
            result = compare(f"step {step} {name}", other, update, 1e-10 * np.abs(update).max() + 1e-300)
            assert result.ok, str(result)


def oracle_gradients(arrays, weights, step, kind):
    """The gradients of the trained arrays, from those of whole weights and the chain rule."""
    inputs, targets = (part.reshape(4, -1) for part in batch(step))
    if "table" in KINDS[kind]:
        loss, gradients = BACKENDS["torch"].loss_and_gradients(TINY, {**weights, **arrays}, inputs, targets)
        return loss, {name: gradients[name] for name in arrays}
    lora = KINDS[kind]["lora"]
    scale, result = scale_of(lora), {}
    loss, gradients = BACKENDS["torch"].loss_and_gradients(TINY, merged(weights, arrays, scale), inputs, targets)
    for name, a in arrays.items():
        if "lora_A" in name:
            b_name, gradient = name.replace("_A", "_B"), gradients[weight_of(name)].T
            result[name] = scale * arrays[b_name].T @ gradient
            result[b_name] = scale * gradient @ a.T
            if lora.targets == ("q", "v"):
                result[b_name][:D, 3:] = result[b_name][D : 2 * D] = result[b_name][2 * D :, :3] = 0
    return loss, result


def assert_steps_are_the_oracles(run, kind, steps=6):
    metrics, trail = run
    weights = initial_weights(TINY, SETTINGS.seed, np.float64)
    moments, table = {}, KINDS[kind].get("table", [])
    decayed = {n for row in table if row.decayed for n in row.names("huggingface", TINY)}
    decayed |= {name for name in trail[0] if "lora_" in name}  # the paper decays A and B
    for step in range(steps):
        arrays = trail[step]
        loss, gradients = oracle_gradients(arrays, weights, step, kind)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        np.testing.assert_allclose(metrics[step], (loss, norm), rtol=1e-10)
        expected = oracle.adamw(settings_of(kind), decayed, arrays, gradients, moments, step + 1, LR)
        assert expected.keys() == trail[step + 1].keys()
        for name in expected:
            update = expected[name] - arrays[name]
            result = compare(f"step {step} {name}", trail[step + 1][name] - arrays[name], update,
                             1e-8 * np.abs(update).max() + 1e-300)  # fmt: skip
            assert result.ok, str(result)


@names
@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_the_oracle(runs, name, kind):
    assert_steps_are_the_oracles(runs[name, kind], kind)


@names
def test_the_first_gradient_of_A_is_zero(runs, name):
    """B is zero, so at first A only decays."""
    _, trail = runs[name, "all"]
    for parameter, before in trail[0].items():
        moved = trail[1][parameter] - before
        if "lora_A" in parameter:
            np.testing.assert_allclose(moved, -LR * SETTINGS.weight_decay * before, rtol=1e-10)
        else:
            assert np.abs(moved).max() > LR / 2


@names
def test_the_optimizer_holds_the_adapters_alone(name):
    lora = OPTIONS["q and v"]
    trainer = TRAINER[name](TINY, dataclasses.replace(SETTINGS, dtype="float32"), lora=lora)
    trainer.train_step(trainer.to_device(*batch(0)), LR, 0)
    # B has 3 D outputs for 2 * 3 columns, of which a third in each column is trained.
    n_held = TINY.n_layer * (6 * D + 3 * D * 6)
    assert n_adapter_params(TINY, lora) == TINY.n_layer * 4 * 3 * D
    if name == "torch":
        state = trainer.optimizer.state_dict()["state"].values()
        moments = sum(value.numel() for entry in state for key, value in entry.items() if key != "step")
        assert all(p.grad is None for p in trainer.model.parameters() if not p.requires_grad)
    else:
        moments = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.opt_state)) - 1
        assert sum(leaf.size for leaf in jax.tree.leaves(trainer.state.model)) == n_held
    assert moments == 2 * n_held


@pytest.mark.parametrize("kind", ["q and v", "last layers"])
def test_runs_resume_in_either_framework(kind, tmp_path):
    """The losses after a resume are exactly those without it, and as near as rounding in the other framework."""
    options, losses = KINDS[kind], {}

    def go_on(name, trainer, first, last):
        return [float(trainer.train_step(trainer.to_device(*batch(s)), LR, s)["loss"]) for s in range(first, last)]

    for name in BACKENDS:
        with full_precision():
            trainer = TRAINER[name](TINY, SETTINGS, **options)
            go_on(name, trainer, 0, 3)
            (tmp_path / name).mkdir()
            trainer.save(tmp_path / name)
            losses[name] = go_on(name, trainer, 3, 6)
    for saved in BACKENDS:
        optimizer_state.read_back(tmp_path / saved, TINY, trainer.stored)
        for name in BACKENDS:
            with full_precision():
                # Another seed: what is not restored would differ, except for a base, which is the run's.
                settings = SETTINGS if "lora" in options else dataclasses.replace(SETTINGS, seed=1)
                trainer = TRAINER[name](TINY, settings, **options)
                trainer.restore(tmp_path / saved)
                resumed = go_on(name, trainer, 3, 6)
            if saved == name:
                assert resumed == losses[saved]
            np.testing.assert_allclose(resumed, losses[saved], rtol=1e-12)


@names
def test_checkpoints_hold_the_adapter_alone(name, tmp_path):
    trainer = TRAINER[name](TINY, dataclasses.replace(SETTINGS, dtype="float32"), lora=OPTIONS["all"])
    trainer.save(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    optimizer = {"torch": "optimizer.safetensors", "jax": "state"}[name]
    assert files == {"adapter_config.json", "adapter_model.safetensors", optimizer}
    adapter = peft_files.read(tmp_path)
    assert adapter.lora == OPTIONS["all"]
    assert sum(np.asarray(array).size for array in adapter.arrays.values()) == n_adapter_params(TINY, OPTIONS["all"])
    with pytest.raises(InputError, match="other options"):
        TRAINER[name](TINY, trainer.settings, lora=OPTIONS["q and v"]).restore(tmp_path)
    other = dataclasses.replace(trainer.settings, seed=1)
    with pytest.raises(InputError, match="trained on other weights"):
        TRAINER[name](TINY, other, lora=OPTIONS["all"]).restore(tmp_path)


@pytest.mark.parametrize(
    ("options", "counts"),
    {
        LoraConfig(rank=4, targets=("q", "v")): (147_456, 393_216, 737_280, 1_228_800),
        LoraConfig(rank=4, targets=("qkv",)): (147_456, 393_216, 737_280, 1_228_800),
        LoraConfig(rank=8, targets=("qkv",)): (294_912, 786_432, 1_474_560, 2_457_600),
        LoraConfig(rank=8, targets=("qkv", "attn.out")): (442_368, 1_179_648, 2_211_840, 3_686_400),
        LoraConfig(rank=8): (1_179_648, 3_145_728, 5_898_240, 9_830_400),
        LoraConfig(rank=16): (2_359_296, 6_291_456, 11_796_480, 19_660_800),
        # q, k and v apart, as the book's LinearWithLoRA has them.
        LoraConfig(rank=16, targets=("q", "k", "v", "attn.out", "mlp.in", "mlp.out")): (
            2_654_208, 7_077_888, 13_271_040, 22_118_400,
        ),
    }.items(),
    ids=lambda value: " ".join(value.targets) + f" rank {value.rank}" if isinstance(value, LoraConfig) else None,
)  # fmt: skip
def test_numbers_of_parameters(options, counts):
    """Hu et al.'s 0.35M for 355M is 393,216; the others are arithmetic over the shapes of GPT-2's matrices."""
    sizes = ("124M", "355M", "774M", "1558M")
    assert tuple(n_adapter_params(PRESETS[size], options) for size in sizes) == counts


# Planted errors of the function, in each backend


def alpha_without_rank(name, monkeypatch):
    monkeypatch.setattr(LoraConfig, "scale", property(lambda lora: lora.alpha))


def a_and_b_swapped(name, monkeypatch):
    right = adapters.AdaptedLinear.rows

    def swapped(linear):
        a, b = right.fget(linear)
        return dataclasses.replace(a, huggingface=b.huggingface), dataclasses.replace(b, huggingface=a.huggingface)

    monkeypatch.setattr(adapters.AdaptedLinear, "rows", property(swapped))


def key_for_query(name, monkeypatch):
    monkeypatch.setattr(adapters, "PARTS", ("k", "q", "v"))


def input_of_another_branch(name, monkeypatch):
    """The adapter reads the output of the linear layer in place of its input."""
    if name == "torch":

        def forward(self, x):
            y = torch.nn.Linear.forward(self, x)
            return y + self.scale * y @ self.lora_A.T @ self.lora_B.T

        monkeypatch.setattr(gpt_torch.lora.LoraLinear, "forward", forward)
    else:

        def call(self, x):
            y = super(gpt_jax.lora.LoraLinear, self).__call__(x)
            A = self.lora_A[...].reshape(D, -1)
            return y + self.scale * y @ A @ self.lora_B[...]

        monkeypatch.setattr(gpt_jax.lora.LoraLinear, "__call__", call)


@names
@pytest.mark.parametrize(
    ("plant", "options"),
    [
        (alpha_without_rank, "square"),
        (a_and_b_swapped, "square"),
        (key_for_query, "q and v"),
        (input_of_another_branch, "square"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_errors_of_the_function_are_caught(name, plant, options, monkeypatch, tmp_path):
    plant(name, monkeypatch)
    assert not logits_comparison(name, OPTIONS[options], tmp_path).ok


# Planted errors of training


def decay_of_frozen_weights(trainer):
    right = trainer.optimizer.step

    def step():
        right()
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if not parameter.requires_grad:
                    parameter.mul_(1 - LR * SETTINGS.weight_decay)

    trainer.optimizer.step = step


def base_inside_the_clip_norm(trainer):
    frozen = [parameter for parameter in trainer.model.parameters() if not parameter.requires_grad]
    right = trainer.train_step

    def train_step(*args):
        for parameter in frozen:
            parameter.requires_grad_(True)
        result = right(*args)
        for parameter in frozen:
            parameter.requires_grad_(False)  # so that train() compares it
            parameter.grad = None
        return result

    trainer.train_step = train_step


def blocks_of_B_not_masked(trainer):
    for module in trainer.model.modules():
        if isinstance(module, gpt_torch.lora.LoraLinear):
            module.blocks = None


def matrices_not_decayed(trainer):
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.0


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (decay_of_frozen_weights, "all"),
        (decay_of_frozen_weights, "last layers"),
        (base_inside_the_clip_norm, "all"),
        (blocks_of_B_not_masked, "q and v"),
        (matrices_not_decayed, "all"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_errors_of_training_are_caught(plant, kind):
    with pytest.raises(AssertionError):
        assert_steps_are_the_oracles(train("torch", kind, 3, plant), kind, steps=3)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank .* 1..65536, got 0"),
        ({"rank": 2.0}, "rank"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, r"dropout .* \[0, 1\)"),
        ({"targets": ()}, "needs targets; choose from all, qkv"),
        ({"targets": ("c_attn",)}, "'c_attn' is unknown; choose from all, qkv"),
        ({"targets": ("qkv", "q")}, "qkv, q name a matrix twice"),
        ({"targets": ("all", "mlp.in")}, "name a matrix twice"),
        ({"targets": "qkv"}, r'must be a tuple such as \("q", "v"\), got \'qkv\''),
        ({"targets": 3}, "must be a tuple .* got 3"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**options)


@names
def test_bad_models(name, tmp_path):
    package = gpt_torch if name == "torch" else gpt_jax
    model = package.GPTModel(TINY)
    for call in (LORA[name].merge, LORA[name].export_adapter):
        with pytest.raises(InputError, match="no adapter; give it one"):
            call(model)
    LORA[name].add_lora(model, OPTIONS["q and v"])
    with pytest.raises(InputError, match="has an adapter already"):
        LORA[name].add_lora(model, OPTIONS["q and v"])
    for call in (package.export_weights, lambda model: package.save_pretrained(model, tmp_path)):
        with pytest.raises(InputError, match=r"has an adapter: merge\(\) it first"):
            call(model)


def test_adapters_in_16_bits_are_not_merged_for_generation():
    model = gpt_jax.GPTModel(TINY)
    gpt_jax.lora.add_lora(model, OPTIONS["q and v"])
    with pytest.raises(InputError, match=r"merge\(\) before cast\(\)"):
        gpt_jax.generate(gpt_jax.cast(model, "bfloat16"), [[1]], 1)
