"""A small world for the speculator: a policy whose next token follows from the last two, seen through hidden states."""

from __future__ import annotations

import numpy as np

from rl_accel.speculator.eagle import EagleShape
from rl_accel.speculator.head import HeadShape
from rl_accel.speculator.traces import TOP_K, RowLayout

VOCAB, HIDDEN, NUM_AUX, HISTORY = 24, 16, 2, 2
SHAPE = HeadShape(VOCAB, HIDDEN, NUM_AUX, 32, 48, HISTORY)
EAGLE = EagleShape(VOCAB, HIDDEN, (1, 2), 32, 64, 4, 2, 8, 10000.0, 512)
LAYOUT = RowLayout(NUM_AUX * HIDDEN, HISTORY + 1, VOCAB)


def rows_of(num_requests: int, length: int, seed: int = 0, layout: RowLayout = LAYOUT, first: int = 0, **values):
    """Traces of requests whose texts are a Markov chain of second order with sharp distributions."""
    rng = np.random.default_rng(seed)
    law = np.random.default_rng(99).normal(size=(VOCAB, VOCAB, layout.vocab_size)) * 4.0
    code = np.random.default_rng(98).normal(size=(VOCAB, layout.num_features))
    found: dict[str, list] = {name: [] for name in layout.fields()}
    for request in range(first, first + num_requests):
        text = list(rng.integers(0, VOCAB, layout.num_tokens + 1))
        for position in range(length):
            logits = law[text[-2] % VOCAB, text[-1] % VOCAB]
            token = int((logits + rng.gumbel(size=len(logits))).argmax())
            hidden = code[text[-1] % VOCAB] + np.roll(code[text[-2] % VOCAB], 1)
            text.append(token)
            row = {
                "request": (request + 1) * 0x9E3779B97F4A7C15 % (1 << 62),
                "position": layout.num_tokens + position,
                "policy": 0,
                "draft": 1,
                "drafted": -1,
                "accepted": -1,
                "temperature": 1.0,
                "tokens": text[: -layout.num_tokens - 1 : -1],
                "aux": hidden / np.sqrt((hidden**2).mean()),
            }
            if layout.dense:
                row["target"] = logits
            else:
                best = np.argsort(-logits)[:TOP_K]
                row |= {"target": logits[best] - logits[best[0]], "target_ids": best}
            for name, value in {**row, **values}.items():
                found[name].append(value)
    return {name: np.array(found[name], dtype) for name, (dtype, _) in layout.fields().items()}
