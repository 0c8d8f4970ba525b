"""Program of test_scoring.py: one of the processes that score the same requests together.

    python shared_scores.py torch OUT                          # with torchrun's environment variables
    python shared_scores.py jax OUT DEVICES                    # DEVICES of one process
    python shared_scores.py jax OUT DEVICES ADDRESS COUNT INDEX

It writes, for each request in the order in which they were scored, its index and log-probabilities into OUT, as JSON.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

from parity.evaluation.scorer import Scorer
from support.models import TINY, probing_weights
from support.scored_requests import draw_requests


def main(name, out, n_devices=None, address=None, count=None, index=None):
    package = importlib.import_module(f"gpt_{name}")
    distributed = importlib.import_module(f"gpt_{name}.distributed")
    places = (False, address, int(count), int(index)) if address else (False,) if n_devices else ()
    with distributed.processes(*places) as these:
        mesh = None
        if n_devices:
            sharding = importlib.import_module("gpt_jax.sharding")
            mesh = sharding.make_mesh(sharding.MeshShape.parse(f"data={n_devices}"))
        adapter = importlib.import_module(f"gpt_{name}.adapter")
        model = adapter.build(TINY, probing_weights(TINY, np.float32))
        scorer = Scorer(package, model, batch_size=4, mesh=mesh)
        scores = scorer.score(draw_requests(TINY), top=2)
        result = [[i, s.token_logprobs.tolist(), s.is_greedy, s.margin, s.top_ids.tolist()] for i, s in scores]
        Path(f"{out}.{these.index}").write_text(json.dumps(result))
        these.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
