"""The adapter for lm-evaluation-harness: its own model of transformers is the oracle, and its command line runs."""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import eval_harness
import lm_eval.evaluator
import lm_eval.tasks
import numpy as np
import pytest
import transformers
import yaml
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM
from sqlitedict import SqliteDict
from support.models import probing_weights
from support.runs import ROOT, run_script
from support.tolerances import LOGITS_ATOL

import gpt_jax
import gpt_torch
import parity
from parity.config import GPTConfig
from parity.data.tokenizer import END_OF_TEXT, GPT2Tokenizer
from parity.errors import InputError
from parity.evaluation import harness, hellaswag, lambada, stream
from parity.evaluation import protocol as protocols
from parity.evaluation.catalog import find
from parity.evaluation.continuations import continue_texts
from parity.evaluation.data import read
from parity.evaluation.estimates import estimate
from parity.evaluation.protocol import Task
from parity.evaluation.run import items_of, records_of
from parity.evaluation.scorer import Request, windows
from parity.hub import save_model
from parity.weights import n_params

GUIDE = ROOT / "docs/guides/harness.md"
PACKAGES = {"torch": gpt_torch, "jax": gpt_jax}
CONFIG = GPTConfig(n_ctx=32, n_embd=16, n_head=2, n_layer=2)
REPLACING = {50256: 6384, 198: 12013, 8582: 49713}
"""{token: another that the random model generates often, in whose place the model generates it}: the end of text, a
newline, and half a character."""
LONG = "The quick brown fox jumps over the lazy dog. " * 6
PAIRS = [
    ("Hello", " world"),
    ("Hello", " there"),  # the oracle computes these two together
    ("", "Hello world"),
    ("", "<|endoftext|>Hello"),
    ("One document<|endoftext|>", "Another one<|endoftext|>"),
    ("two spaces at the end  ", "word"),
    ("tea", "m spirit is"),  # which merges with the end of the context
    ("日本語 \N{GRINNING FACE}", "\N{ROCKET} é\u0301"),
    ("a\n\n", "\nb\u2028c"),
    (LONG, " The end"),
    ("x", " y" * CONFIG.n_ctx),
]
TEXTS = ["", "a short text", "<|endoftext|>begins and ends<|endoftext|>", LONG, "\N{ROCKET}é " * 20]
PROMPTS = ["Hello", LONG, "Caf\u00e9 <|endoftext|>", "A", "The ", "one two three", "\n\n", "日本語"]


def ask(model, kind, arguments):
    """Return a model's answers to requests of a kind."""
    requests = [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


def save(folder, arrays, vocab_bpe):
    save_model(folder, CONFIG, arrays, GPT2Tokenizer(vocab_bpe))
    return folder


def models_of(folder, vocab_bpe):
    tokenizer = GPT2Tokenizer(vocab_bpe)
    return {
        name: harness.HarnessModel(package, package.load_pretrained(folder), tokenizer, batch_size=4)
        for name, package in PACKAGES.items()
    }


def oracle_of(folder):
    """The harness's own model, with the same weights and a tokenizer of transformers."""
    from lm_eval.models.huggingface import HFLM

    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def arrays():
    arrays = probing_weights(CONFIG, np.float32)
    embeddings = arrays["wte.weight"]
    for id, replaced in REPLACING.items():
        embeddings[id] = 1.02 * embeddings[replaced]
    return arrays


@pytest.fixture(scope="module")
def folder(arrays, vocab_bpe, tmp_path_factory):
    return save(tmp_path_factory.mktemp("harness"), arrays, vocab_bpe)


@pytest.fixture(scope="module")
def models(folder, vocab_bpe):
    return models_of(folder, vocab_bpe)


@pytest.fixture(scope="module")
def oracle(folder):
    return oracle_of(folder)


@pytest.fixture(scope="module")
def answers(oracle):
    """{kind of request: (arguments, the oracle's answers)}."""
    likely = ask(oracle, "generate_until", [(prompt, {"max_gen_toks": 1}) for prompt in PROMPTS])
    pairs = [*PAIRS, *((prompt, text) for prompt, text in zip(PROMPTS, likely, strict=True) if text and prompt.strip())]
    likelihoods = ask(oracle, "loglikelihood", pairs)
    assert {is_greedy for _, is_greedy in likelihoods} == {True, False}

    generate = [(prompt, {"until": [], "max_gen_toks": 10}) for prompt in PROMPTS]
    texts = ask(oracle, "generate_until", generate)
    assert any(oracle.tokenizer.decode(198) in text for text in texts)
    assert any("\ufffd" in text for text in texts)
    ends = [len(oracle.tokenizer(text)["input_ids"]) for text in texts]
    assert min(ends) < 10 == max(ends)
    inside = texts[3].index("authorize") + 4
    generate += [
        (
            "A",
            {"until": ["never", texts[3][inside : inside + 9]], "max_gen_toks": 10},
        ),  # begins and ends inside of tokens
        ("Hello", {"until": "\n", "max_new_tokens": 6, "do_sample": False, "temperature": 0.7}),
        ("日本語", {"until": ["\n", "Owen"], "max_gen_toks": 12, "temperature": 0}),
    ]
    # One at a time: in a batch the oracle goes on until all rows have ended, and may find other stop strings first.
    texts = [ask(oracle, "generate_until", [args])[0] for args in generate]
    rolling = [(text,) for text in TEXTS]
    return {
        "loglikelihood": (pairs, likelihoods),
        "loglikelihood_rolling": (rolling, ask(oracle, "loglikelihood_rolling", rolling)),
        "generate_until": (generate, texts),
    }


def check(model, kind, answers):
    """Raise AssertionError unless the model gives the oracle's answers.

    A log-probability differs by the errors of its logit and of the logarithm of the sum, each at most LOGITS_ATOL.
    """
    arguments, expected = answers[kind]
    results = ask(model, kind, arguments)
    assert len(results) == len(expected)
    for args, result, right in zip(arguments, results, expected, strict=True):
        assert type(result) is (float if kind == "loglikelihood_rolling" else type(right)), args
        if kind == "generate_until":
            assert result == right, args
            continue
        if kind == "loglikelihood":
            assert result[1] is right[1], args
            result, right = result[0], right[0]
        n_tokens = len(model.tok_encode(args[-1])) + 1
        assert result == pytest.approx(right, rel=0, abs=2 * LOGITS_ATOL[np.float32] * n_tokens), args


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
@pytest.mark.parametrize("name", PACKAGES)
def test_the_harness_s_own_model_gives_the_same_answers(models, answers, name, kind):
    check(models[name], kind, answers)


@pytest.mark.parametrize("name", PACKAGES)
def test_of_tokens_that_tie_the_first_is_the_most_likely(arrays, vocab_bpe, tmp_path, name):
    zeros = {key: np.zeros_like(array) for key, array in arrays.items() if key.startswith("ln_f")}
    folder = save(tmp_path, arrays | zeros, vocab_bpe)
    pairs = [("Hello", "!"), ("Hello", '"')]
    results = ask(models_of(folder, vocab_bpe)[name], "loglikelihood", pairs)
    assert [is_greedy for _, is_greedy in results] == [True, False]  # the ids are 0 and 1
    assert results == [pytest.approx(right) for right in ask(oracle_of(folder), "loglikelihood", pairs)]


def as_ordinary_text(model, text, **_):
    return model.text_tokenizer.encode(text)


def after_end_of_text(model, text, **_):
    return [model.eot_token_id, *model.text_tokenizer.encode(text, "all")]


def apart(model, context, continuation):
    return model.tok_encode(context), model.tok_encode(continuation)


def without_stop_strings(*args):
    *first, _, rows, options = args
    return continue_texts(*first, [], rows, options)


ADAPTER = harness.HarnessModel
PLANTED = {
    "the literal end of text is ordinary text": ("loglikelihood", ADAPTER, "tok_encode", as_ordinary_text),
    "an end of text before each text": ("loglikelihood", ADAPTER, "tok_encode", after_end_of_text),
    "continuations encoded apart": ("loglikelihood", ADAPTER, "_encode_pair", apart),
    "another token before the text": ("loglikelihood_rolling", ADAPTER, "prefix_token_id", 198),
    "windows shorter than the context": ("loglikelihood_rolling", ADAPTER, "max_length", CONFIG.n_ctx - 1),
    "prompts too short by a token": ("generate_until", ADAPTER, "max_length", CONFIG.n_ctx - 1),
    "stop strings ignored": ("generate_until", harness, "continue_texts", without_stop_strings),
    "another token ends the text": ("generate_until", GPT2Tokenizer, "eos_id", 198),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_caught(models, answers, monkeypatch, error):
    kind, owner, name, wrong = PLANTED[error]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        check(models["torch"], kind, answers)


def test_sampled_texts_are_equal_in_both_backends_and_in_any_batch(models):
    sampled = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 5, "max_gen_toks": 10}
    arguments = [(prompt, sampled) for prompt in PROMPTS[2:5]]
    texts = ask(models["torch"], "generate_until", arguments)
    assert ask(models["jax"], "generate_until", arguments) == texts
    assert ask(models["torch"], "generate_until", arguments[:0:-1]) == texts[:0:-1]
    repeated = ask(models["torch"], "generate_until", [arguments[0]] * 3)
    assert repeated[0] == texts[0]
    assert len(set(repeated)) == 3
    other_seed = [(prompt, {**sampled, "seed": 6}) for prompt, _ in arguments]
    assert ask(models["torch"], "generate_until", other_seed) != texts


def test_a_context_of_white_space_is_the_end_of_text(models):
    """The oracle refuses it; its space belongs to the continuation."""
    same = ask(models["torch"], "loglikelihood", [(" ", "word"), ("", " word"), ("<|endoftext|>", " word")])
    assert same[0] == same[1] == same[2]
    assert ask(models["torch"], "generate_until", [("", {"max_gen_toks": 5}), ("<|endoftext|>", {"max_gen_toks": 5})])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("", ""), "the continuation '' of the context '' has no tokens of its own"),
        ("loglikelihood", ("tea", "m"), "the continuation 'm' of the context 'tea' has no tokens of its own"),
        ("loglikelihood", ("x", " y" * 33), "has 33 tokens, more than the model's context of 32"),
        ("generate_until", ("x", {"max_gen_toks": 32}), "max_gen_toks=32 must be at least 1 and leave room"),
        ("generate_until", ("x", {}), "max_gen_toks=256 .* pass --gen_kwargs max_gen_toks=N"),
        ("generate_until", ("x", {"max_gen_toks": 0}), "max_gen_toks=0 must be at least 1"),
        ("generate_until", ("x", {"num_beams": 4, "max_gen_toks": 5}), "num_beams is not supported; these models"),
        ("generate_until", ("x", {"typical_p": 0.5, "max_gen_toks": 5}), "typical_p is not supported"),
        ("generate_until", ("x", {"do_sample": True, "max_gen_toks": 5}), "do_sample=True needs a temperature above 0"),
        ("generate_until", ("x", {"top_k": -1, "max_gen_toks": 5}), "top_k"),
    ],
)  # fmt: skip
def test_bad_requests(models, kind, arguments, message):
    with pytest.raises(InputError, match=message):
        ask(models["torch"], kind, [arguments])


def test_a_tokenizer_with_more_tokens_than_the_model(vocab_bpe):
    with pytest.raises(InputError, match="the gpt2 tokenizer has 50257 tokens, but the model has only 97"):
        harness.HarnessModel(gpt_torch, gpt_torch.GPTModel("tiny"), GPT2Tokenizer(vocab_bpe))


def test_a_cache_serves_one_backend_with_one_set_of_weights(models, arrays, folder, vocab_bpe, tmp_path, monkeypatch):
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS[:3])]

    def ask_through_cache(model):
        return CachingLM(model, str(tmp_path / "answers.db")).loglikelihood(requests)

    first = ask_through_cache(models["torch"])
    assert first == ask(models["torch"], "loglikelihood", PAIRS[:3])
    again = models_of(folder, vocab_bpe)
    monkeypatch.setattr(ADAPTER, "loglikelihood", None)
    assert ask_through_cache(again["torch"]) == first
    changed = save(tmp_path / "changed", arrays | {"ln_f.bias": arrays["ln_f.bias"] + 1}, vocab_bpe)
    for other in (again["jax"], models_of(changed, vocab_bpe)["torch"]):
        with pytest.raises(InputError, match=r"--use_cache: .*answers.db has answers of another .*\(gpt_torch, gpt2,"):
            ask_through_cache(other)
    SqliteDict(tmp_path / "foreign.db", autocommit=True)["key"] = (1.0, True)
    with pytest.raises(InputError, match=r"has answers of another model \(unknown\)"):
        CachingLM(again["jax"], str(tmp_path / "foreign.db"))
    ADAPTER.set_cache_hook(models["torch"], CacheHook(None))


# The harness's tasks and command line, on invented data


LAMBADA = [
    "Mira turned the dial of the old radio. Tom found a battery, and at once there was music from the radio",
    '"Is it far?" asked the girl. "Not far," he said, "only past the mill and the two bridges, and then along the '
    'river to the house with the green door." They went on for an hour, and at last they reached the mill',
    "Ann\nsaw the cat.  The cat saw Ann",
    "Tom found the road and went  home",
    "The caf\u00e9 was closed, so we went to another caf\u00e9",
]
SENTENCE = "cuts the bread slowly [step] and then holds up a caf\u00e9 sign [title] he sings to it with care"
PAGES = [
    ' = Radio = \n \n The radio has 1 @,@ 200 parts , " and more " ( or so ) . \n ',
    " = Mill = \n \n = = History = = \n \n The miller 's house was re @-@ built"
    + " ; it \n stands , and 3 @.@ 5 times a day it falls" * 6
    + " . \n",
]  # of WikiText, as the harness's data set divides it


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="module")
def data(models, tmp_path_factory):
    """Invented files in the formats of LAMBADA, HellaSwag and WikiText."""
    folder = tmp_path_factory.mktemp("data")
    ordinary = [prompt for prompt in PROMPTS if END_OF_TEXT not in prompt]  # which is ordinary text in our protocols
    likely = ask(models["torch"], "loglikelihood", [(prompt, " internationally") for prompt in ordinary])
    right = [f"{prompt} internationally" for prompt, (_, is_greedy) in zip(ordinary, likely, strict=True) if is_greedy]
    write_lines(folder / "lambada.jsonl", [{"text": text} for text in [*LAMBADA, *right]])
    generator = np.random.default_rng(0)
    words = [*SENTENCE.split(), ""]
    records = []
    for number in range(24):
        label, a, b, *endings = (" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(7))
        record = {"activity_label": label, "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}", "endings": endings}
        records.append(record | {"label": number % 4})
    write_lines(folder / "hellaswag.jsonl", records)
    write_lines(folder / "wikitext.jsonl", [{"page": page} for page in PAGES])
    (folder / "wiki.test.raw").write_text("\n".join([" ", *PAGES]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tasks(data, tmp_path_factory):
    """Task files: the harness's own, but for the data, as local_NAME; and one that generates text."""
    folder = tmp_path_factory.mktemp("tasks")
    [shown] = re.findall(r"^```yaml\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for file, split, unused in (
        ("lambada/lambada_openai.yaml", "test", []),
        ("hellaswag/hellaswag.yaml", "validation", ["training"]),
        ("wikitext/wikitext.yaml", "test", ["training", "validation"]),
    ):
        name = Path(file).parent.name
        task = yaml.safe_load(shown) | {"task": f"local_{name}"} | {f"{part}_split": None for part in unused}
        assert Path(task["include"]).is_relative_to("/path/to/site-packages/lm_eval")
        assert task["dataset_kwargs"] == {"data_files": {"test": "/path/to/lambada_test.jsonl"}}
        task["include"] = str(Path(lm_eval.__file__).parent / "tasks" / file)
        (folder / f"{name}.yaml").write_text(json.dumps(task | local(data / f"{name}.jsonl", split, folder)))
    task = {
        "task": "local_generation",
        **local(data / "lambada.jsonl", "test", folder),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text.split(' ')[:3]|join(' ')}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "generation.yaml").write_text(json.dumps(task))
    return folder


def local(file, split, folder):
    """The entries of a task file that name a local data set, whose cached copy is in the folder."""
    files = {"data_files": {split: str(file)}, "cache_dir": str(folder / "cache")}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}


@pytest.fixture
def offline(monkeypatch):
    """The harness without what takes seconds: indexing its own 12,000 tasks, and describing the machine."""
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    few_tasks = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few_tasks)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # of the standard errors
    method = multiprocessing.get_start_method(allow_none=True)
    yield
    multiprocessing.set_start_method(method, force=True)


@pytest.fixture(scope="module")
def evaluated(models, tasks):
    """The harness's results of its tasks, and its records of their documents."""
    names = ["local_lambada", "local_hellaswag", "local_wikitext"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
        return lm_eval.simple_evaluate(models["torch"], tasks=names, task_manager=manager, bootstrap_iters=0)


def results_of(model, name, file):
    """Return a protocol's value of each metric, and its records, for a file."""
    protocol = find(name)
    task = Task(read(protocol.data, file), model.text_tokenizer, CONFIG.n_ctx)
    records = records_of(protocol, task, items_of(protocol, task), model.scorer, {})
    return {metric.name: estimate(metric, records).value for metric in protocol.metrics}, records


def check_protocol(model, evaluated, protocol, file, metrics):
    """Raise AssertionError unless a protocol gives the numbers of the harness's task, by document and as a whole."""
    values, records = results_of(model, protocol, file)
    task = f"local_{protocol.partition('/')[0].removesuffix('-openai')}"
    for record, sample in zip(records, evaluated["samples"][task], strict=True):
        responses = [response for [response] in sample["resps"]]
        likelihoods = [response if isinstance(response, float) else response[0] for response in responses]
        assert np.atleast_1d(record["logprob"]) == pytest.approx(likelihoods, rel=1e-6)
    for ours, theirs in metrics.items():
        assert values[ours] == pytest.approx(evaluated["results"][task][f"{theirs},none"], rel=1e-6)


PROTOCOLS = {
    "lambada-openai/last-word": ("lambada.jsonl", {"accuracy": "acc", "perplexity": "perplexity"}),
    "hellaswag/lm-eval": ("hellaswag.jsonl", {"accuracy": "acc", "accuracy_per_character": "acc_norm"}),
    "wikitext/lm-eval": ("wiki.test.raw", {name: name for name in ("word_perplexity", "bits_per_byte")}),
}


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_our_protocols_give_the_numbers_of_the_harness_s_tasks(models, evaluated, data, protocol, name):
    file, metrics = PROTOCOLS[protocol]
    check_protocol(models[name], evaluated, protocol, data / file, metrics)


def test_the_invented_data_distinguish_the_metrics(evaluated):
    results = evaluated["results"]
    lambada, hellaswag = results["local_lambada"], results["local_hellaswag"]
    shares = [lambada["acc,none"], hellaswag["acc,none"], hellaswag["acc_norm,none"]]
    assert 0 < min(shares) < max(shares) < 1
    assert len(set(shares)) == 3


def without_context(tokenizer, context, continuation):
    return Request([tokenizer.eos_id], tokenizer.encode(continuation))


PLANTED_IN_PROTOCOLS = {
    "encoded apart": ("lambada-openai/last-word", lambada, "joint", protocols.apart),
    "the context is not read": ("hellaswag/lm-eval", hellaswag, "joint", without_context),
    "marks of WikiHow are kept": ("hellaswag/lm-eval", hellaswag, "cleaned", str.strip),
    "one document": ("wikitext/lm-eval", stream, "articles", lambda text: [text]),
    "the text as it is": ("wikitext/lm-eval", stream.detokenizers, "wikitext", str),
    "windows that do not overlap": ("wikitext/lm-eval", stream, "windows", lambda *args, **_: windows(*args)),
}


@pytest.mark.parametrize("error", PLANTED_IN_PROTOCOLS)
def test_planted_errors_of_protocols_are_caught(models, evaluated, data, monkeypatch, error):
    protocol, module, name, wrong = PLANTED_IN_PROTOCOLS[error]
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises((AssertionError, ValueError)):
        check_protocol(models["torch"], evaluated, protocol, data / PROTOCOLS[protocol][0], PROTOCOLS[protocol][1])


def test_the_command_line(offline, folder, tasks, tmp_path, monkeypatch, capfd):
    results = {}
    for name in PACKAGES:
        out = tmp_path / name
        arguments = (
            f"--model gpt-parity-{name} --model_args model={folder},compilation_cache=False --include_path {tasks}"
        )
        arguments += f" --tasks local_lambada,local_generation --batch_size auto --log_samples --output_path {out}"
        monkeypatch.setattr(sys, "argv", ["eval_harness.py", *arguments.split()])
        eval_harness.main()
        [file] = out.rglob("results_*.json")
        results[name] = json.loads(file.read_text())
        assert results[name]["config"]["model_num_parameters"] == n_params(CONFIG)
        assert results[name]["config"]["model_backend"] == f"gpt_{name}"
        assert len(list(out.rglob("samples_*.jsonl"))) == 2
    assert "[cpu (" in capfd.readouterr().err
    torch, jax = results["torch"], results["jax"]
    assert torch["config"]["model_sha"] == jax["config"]["model_sha"]
    assert torch["results"].keys() == {"local_lambada", "local_generation"}
    assert torch["results"]["local_lambada"]["perplexity,none"] == pytest.approx(
        jax["results"]["local_lambada"]["perplexity,none"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": "gpt2"}, "--model_args: there is no pretrained; choose from run, checkpoint, model,"),
        ({"dtype": "float32"}, "--model_args: give either model=SIZE"),
        ({"model": "x", "run": "y"}, "--model_args: give either model=SIZE"),
        ({"model": "x", "batch_size": "many"}, "--batch_size many: give a number from 1 to 65536, or auto"),
        ({"model": "x", "batch_size": 0}, "--batch_size 0: give a number"),
        ({"run": "nowhere"}, "nowhere"),
    ],
)
def test_bad_arguments_of_the_command_line(arguments, message):
    with pytest.raises(InputError, match=message):
        eval_harness.constructor("torch")(**arguments)


def test_the_arguments_of_a_model(folder, monkeypatch):
    """Without --device the harness names one all the same, which then has no effect."""
    model = eval_harness.constructor("torch")(batch_size="auto:4", device="tpu", model=str(folder), dtype="bfloat16")
    assert model.batch_size is None
    assert model.get_model_info()["model_dtype"] == "bfloat16"
    monkeypatch.setattr(sys, "argv", ["eval_harness.py", "--device", "tpu"])
    with pytest.raises(InputError, match="--device tpu"):
        eval_harness.constructor("torch")(device="tpu", model=str(folder))


def test_chat_templates_are_refused(models):
    with pytest.raises(InputError, match="--apply_chat_template: these models have no chat template"):
        models["torch"].chat_template(True)
    assert models["torch"].chat_template() == ""


@pytest.mark.parametrize(("arguments", "text"), [([], "Available commands"), (["--help"], "lm-eval run --model hf")])
def test_help(offline, monkeypatch, capsys, arguments, text):
    monkeypatch.setattr(sys, "argv", ["eval_harness.py", *arguments])
    with pytest.raises(SystemExit) if arguments else contextlib.nullcontext():
        eval_harness.main()
    output = capsys.readouterr().out
    assert output.startswith(eval_harness.__doc__)
    assert text in output


def test_examples_parse(monkeypatch):
    examples = re.findall(r"^python scripts/(eval_harness.py .*)$", eval_harness.__doc__, re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        monkeypatch.setattr(sys, "argv", example.split())
        args = HarnessCLI().parse_args()
        if args.command == "run":
            assert args.model in eval_harness.MODELS
            assert eval_harness.parse_model_args(args.model_args).dtype == "float32"


def test_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval_harness.py", "--version"])
    with pytest.raises(SystemExit):
        eval_harness.main()
    assert capsys.readouterr().out.startswith(f"gpt-parity {parity.__version__}, Python 3.")


def test_an_absent_harness_names_its_extra():
    program = "import sys; sys.modules['lm_eval'] = None; sys.argv = ['eval_harness.py', 'ls', 'tasks']; "
    program += "import runpy; runpy.run_path('scripts/eval_harness.py', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert re.match(r"error: lm_eval\S* is not installed; install the extra eval: ", result.stderr)


@pytest.mark.slow
def test_the_command_line_as_a_user_runs_it(folder, tasks, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    listed = run_script("eval_harness.py", "ls", "tasks", env=environment)
    assert "|hellaswag" in listed.stdout, listed.stderr
    options = ("--model", "gpt-parity-jax", "--model_args", f"model={folder}", "--include_path", tasks)
    result = run_script("eval_harness.py", *options, "--tasks", "local_lambada", env=environment)
    assert result.returncode == 0, result.stderr
    assert "perplexity" in result.stdout
    assert "fork" not in result.stderr
    result = run_script("eval_harness.py", *options, "--tasks", "local_wikitext", "--device", "tpu", env=environment)
    assert result.returncode == 2
    assert "error: --device tpu" in result.stderr
    assert "Traceback" not in result.stderr
