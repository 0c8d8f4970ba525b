"""Real clients of the server: the openai package, and lm-evaluation-harness's model of an API."""

import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from lm_eval.api.instance import Instance
from support.models import probing_weights
from support.runs import ROOT
from support.served import engines_of, new_engine, serving, tiny_model

import gpt_jax
import gpt_torch
from parity.config import GPTConfig
from parity.data.tokenizer import ByteTokenizer, GPT2Tokenizer, stream_text
from parity.evaluation.harness import HarnessModel
from parity.hub import save_model
from parity.serving import chat
from parity.serving.completions import OPTIONS
from parity.serving.options import LACKING

KEY = "a key"
EOS = ByteTokenizer.eos_id


@pytest.fixture(scope="module")
def address():
    with engines_of("torch", max_waiting=8) as engines, serving(engines, api_key=KEY) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def generated(prompt, n_new, **options):
    backend, model = tiny_model("torch")
    rows = backend.generate(model, [list(prompt.encode())], n_new, eos_id=EOS, **options)
    new = (row[len(prompt) :] for row in rows)
    return ["".join(stream_text(ByteTokenizer(), (id for id in ids if id != EOS))) for ids in new]


def test_openai_completions(client):
    assert [model.id for model in client.models.list()] == ["tiny-torch"]
    found = client.completions.create(
        model="tiny-torch",
        prompt="Hello",
        max_tokens=10,
        n=3,
        seed=4,
        temperature=0.8,
        top_p=0.9,
        logprobs=2,
        echo=True,
    )
    expected = generated("Hello", 10, samples=3, seed=4, temperature=0.8, top_p=0.9)
    assert [choice.text for choice in found.choices] == ["Hello" + text for text in expected]
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 3
    logprobs = found.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 15
    assert all(2 <= len(entries) <= 3 for entries in logprobs.top_logprobs[1:])
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (5, 30)


def test_openai_streams(client):
    options = {"model": "tiny-torch", "prompt": "Hello", "max_tokens": 12, "seed": 4, "stream": True}
    parts = list(client.completions.create(**options, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts[:-1]) == generated("Hello", 12, seed=4)[0]
    assert parts[-1].usage.total_tokens == 17
    stopped = list(client.completions.create(**options, stop=[generated("Hello", 12, seed=4)[0][3:5]]))
    assert "".join(part.choices[0].text for part in stopped) == generated("Hello", 12, seed=4)[0][:3]
    assert stopped[-1].choices[0].finish_reason == "stop"


def test_our_own_sampling_options_in_the_body(client):
    options = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.5}
    found = client.completions.create(model="tiny-torch", prompt="a", max_tokens=9, seed=1, extra_body=options)
    assert found.choices[0].text == generated("a", 9, seed=1, **options)[0]


def test_openai_errors(client, address):
    options = {"model": "tiny-torch", "prompt": "a", "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="does not have the option best_of") as caught:
        client.completions.create(**options, best_of=4)
    assert (caught.value.param, caught.value.type) == ("best_of", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(**options, presence_penalty=0.5)
    with pytest.raises(openai.NotFoundError, match="model must be one of tiny-torch") as caught:
        client.completions.create(model="gpt-5", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="was not tuned on instructions"):
        client.chat.completions.create(model="tiny-torch", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="more were requested, but the model's context has 64"):
        client.completions.create(**options | {"max_tokens": 500})
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="another", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="send the header Authorization"),
    ):
        stranger.models.list()


def test_openai_waits_where_the_server_is_busy(address):
    """The client's own repetition after 429 and its Retry-After."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=10) as client:

        def request(seed):
            options = {"prompt": "a", "max_tokens": 30, "n": 8, "seed": seed}
            return [choice.text for choice in client.completions.create(model="tiny-torch", **options).choices]

        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(request, range(4)))
    assert answers == [generated("a", 30, samples=8, seed=seed) for seed in range(4)]


def test_openai_chat_completions():
    with (
        engines_of("torch", template="plain") as engines,
        serving(engines) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        options = {"model": "tiny-torch", "messages": [{"role": "user", "content": "a"}], "seed": 3, "max_tokens": 9}
        whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
        [choice] = whole.choices
        prompt = "### Instruction:\na\n\n### Response:\n"
        assert (choice.message.role, choice.message.content) == ("assistant", generated(prompt, 9, seed=3)[0])
        assert len(choice.logprobs.content) == 9
        assert len(choice.logprobs.content[0].top_logprobs) == 2
        parts = list(client.chat.completions.create(**options, stream=True))
        assert parts[0].choices[0].delta.role == "assistant"
        assert "".join(part.choices[0].delta.content or "" for part in parts) == choice.message.content
        with pytest.raises(openai.BadRequestError, match="does not have the option tools"):
            client.chat.completions.create(**options, tools=[{"type": "function", "function": {"name": "f"}}])


def test_the_guide_s_examples_run(capsys):
    """As shown, but for the address and the models, whose context is shorter."""
    guide = (ROOT / "docs/guides/server.md").read_text(encoding="utf-8")
    [program] = re.findall(r"^```py\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    [line] = re.findall(r"^```sh\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    with engines_of("torch") as torch, engines_of("torch") as twin:
        engines = {"124M-jax": torch["tiny-torch"], "124M-torch": twin["tiny-torch"]}
        with serving(engines) as address:
            namespace = {}
            exec(program.replace("http://127.0.0.1:8000", address), namespace)
            namespace["client"].close()
            whole, streamed, logprobs = re.fullmatch(
                r"(.*)\n(.*)(\[None, .*\])\n", capsys.readouterr().out, re.DOTALL
            ).groups()
            assert whole == streamed == generated("The meaning of life is", 20, seed=0)[0]
            assert len(json.loads(logprobs.replace("None", "null"))) == 5
            command, url, _, header, _, data = shlex.split(line)
            assert command == "curl"
            headers = dict([header.split(": ")])
            answer = httpx.post(url.replace("http://127.0.0.1:8000", address), content=data, headers=headers)
            assert answer.status_code == 200
            body = answer.json()
            assert body["choices"][0]["text"] == generated("The meaning of life is", 20, top_k=50, seed=body["seed"])[0]


def test_the_guide_s_table_of_options_is_complete():
    guide = (ROOT / "docs/guides/server.md").read_text(encoding="utf-8")
    tables = [re.findall(r"^\|(.*?)\|", table, re.MULTILINE) for table in guide.split("| option | meaning |")[1:]]
    own, of_chat = (set(re.findall(r"`([a-z_]+)`", "".join(names))) for names in tables)
    assert own == set(OPTIONS)
    assert own - {"prompt", "echo", "logprobs"} | of_chat == set(chat.OPTIONS)
    lacking = re.search(r"this server does not support \((.*?)\.\.\.\)", guide, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", lacking)) <= set(LACKING)


HARNESS_CONFIG = GPTConfig(n_ctx=32, n_embd=16, n_head=2, n_layer=2)
"""Of a model with GPT-2's vocabulary."""
PAIRS = [
    ("Hello", " world"),
    ("", "Hello world"),
    ("One document<|endoftext|>", "Another one"),
    ("two spaces at the end  ", "word"),
    ("tea", "m spirit is"),
    ("\u65e5\u672c\u8a9e", "\N{ROCKET} \u00e9"),
    ("The quick brown fox", " jumps over the lazy dog. The quick brown fox jumps"),
]
PROMPTS = ["Hello", "A", "The ", "one two three", "Caf\u00e9"]


def ask(model, kind, arguments):
    requests = [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


@pytest.mark.parametrize("name", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_the_harness_gets_the_adapter_s_results(name, vocab_bpe, tmp_path):
    """local-completions of lm-evaluation-harness, one request after another and several at the same time."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    package = {"torch": gpt_torch, "jax": gpt_jax}[name]
    tokenizer = GPT2Tokenizer(vocab_bpe)
    weights = probing_weights(HARNESS_CONFIG, np.float32)
    weights["wte.weight"][50256] = 1.02 * weights["wte.weight"][6384]  # so that the model ends some texts
    save_model(tmp_path, HARNESS_CONFIG, weights, tokenizer)
    model = package.load_pretrained(tmp_path)
    adapter = HarnessModel(package, model, tokenizer, batch_size=4)
    engine = new_engine(name, backend=package, model=model, tokenizer=tokenizer)
    generate = [(prompt, {"until": ["\n"], "max_gen_toks": 8, "temperature": 0}) for prompt in PROMPTS]
    texts = ask(adapter, "generate_until", generate)
    stop = next(text for text in texts if len(text) > 12)[5:9]  # which begins and ends inside of tokens
    generate += [(prompt, {"until": [stop], "max_gen_toks": 8, "temperature": 0}) for prompt in PROMPTS]
    expected = ask(adapter, "generate_until", generate)
    pairs = [*PAIRS, ("one two three", texts[3])]
    likelihoods = ask(adapter, "loglikelihood", pairs)
    rolling = [("a short text",), ("<|endoftext|>begins and ends<|endoftext|>",)]
    sums = ask(adapter, "loglikelihood_rolling", rolling)
    assert {is_greedy for _, is_greedy in likelihoods} == {True, False}
    with serving({engine.name: engine}) as address:
        for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_size": 2, "num_concurrent": 4}):
            client = LocalCompletionsAPI(
                base_url=f"{address}/v1/completions",
                model=engine.name,
                tokenizer=str(tmp_path),
                tokenizer_backend="huggingface",
                max_length=HARNESS_CONFIG.n_ctx + 1,
                max_retries=1,
                **options,
            )
            assert ask(client, "generate_until", generate) == expected
            found = ask(client, "loglikelihood", pairs)
            assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in likelihoods]
            for (logprob, _), (right, _) in zip(found, likelihoods, strict=True):
                assert logprob == pytest.approx(right, abs=1e-3)
            assert ask(client, "loglikelihood_rolling", rolling) == [pytest.approx(right, abs=1e-3) for right in sums]
