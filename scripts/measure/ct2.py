"""Greedy decoding by CTranslate2, an inference engine in C++: a peer of `benchmark.py generate`."""

import tempfile

from measure.peers import transformers_model
from measure.timing import Workload, peak_resident
from parity.config import GPTConfig


def generation(config: GPTConfig, prompts: list[list[int]], n_new: int, threads: int) -> Workload:
    """The weights are those of a model of transformers, converted to a temporary folder; float32."""
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader

    spec = GPT2Loader().get_model_spec(transformers_model(config).eval())
    names = [str(number) for number in range(config.n_vocab)]  # this model has no tokenizer: tokens are named by number
    spec.register_vocabulary(names)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = names[-1]
    spec.validate()
    spec.optimize(quantization=None)
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        generator = ctranslate2.Generator(folder, device="cpu", compute_type="float32", intra_threads=threads)
    rows = [[str(number) for number in prompt] for prompt in prompts]
    limits = {"max_length": n_new, "min_length": n_new, "sampling_topk": 1, "end_token": []}

    def call() -> list[list[int]]:
        results = generator.generate_batch(rows, include_prompt_in_result=False, **limits)
        return [result.sequences_ids[0] for result in results]

    return Workload(call, peak_resident, "cpu")
