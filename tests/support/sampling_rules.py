"""Cases for the rules of sampling that the page has in JavaScript, and what they must give."""

import functools

import numpy as np

from parity.data.tokenizer import ByteTokenizer
from parity.serving import display
from support import numpy_oracle


@functools.cache
def rule_cases():
    """Random logits, some with ties, with options, random numbers and ids that are in the text already."""
    generator = np.random.default_rng(0)
    cases = []
    for number in range(60):
        logits = (generator.normal(size=40) * 3).astype(np.float32).astype(float)
        if number % 3 == 0:
            logits = np.round(logits)
        options = {"temperature": [0.0, 0.3, 1.0, 2.5][number % 4]}
        if number % 2:
            options["top_k"] = int(generator.integers(1, 41))
        if number % 5 < 3:
            options["top_p"] = float(generator.uniform(0.05, 1))
        if number % 7 < 3:
            options["min_p"] = float(generator.uniform(0, 0.5))
        if number % 4 == 1:
            options["repetition_penalty"] = float(generator.uniform(0.5, 2))
        seen = [int(id) for id in generator.integers(0, 40, 5)]
        cases.append({"logits": logits.tolist(), "seen": seen, "options": options, "u": float(generator.random())})
    cases.append({"logits": [0.0] * 8, "seen": [], "options": {"top_p": 0.5}, "u": 0.0})
    return cases


RULES = """(cases, {distribution, choose, largest}) => cases.map(({logits, seen, options, u}) => {
  const names = {top_k: "topK", top_p: "topP", min_p: "minP", repetition_penalty: "repetitionPenalty"};
  const renamed = Object.fromEntries(Object.entries(options).map(([name, value]) => [names[name] ?? name, value]));
  const probs = distribution(logits, new Set(seen), renamed);
  return {probs: [...probs], ...choose(probs, u), largest: largest(logits, 5)};
})"""


def check_rules(results):
    for case, result in zip(rule_cases(), results, strict=True):
        logits = np.array(case["logits"])
        expected = numpy_oracle.keep(logits.copy(), case["seen"], **case["options"]).astype(float)
        probs = np.array(result["probs"])
        assert np.array_equal(probs > 0, expected > 0), case
        assert np.allclose(probs, expected, rtol=1e-12, atol=0), case
        assert result["id"] == numpy_oracle.choose(logits.copy(), case["u"], case["seen"], **case["options"]), case
        assert result["margin"] >= 0
        assert result["largest"] == [entry["id"] for entry in display.most_likely(logits, ByteTokenizer(), 5)]
