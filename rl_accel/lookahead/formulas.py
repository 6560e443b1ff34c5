"""Speed-ups in closed form: what lookahead and token speculation gain over plain decoding, in the target's time.

    a   share of steps, or tokens, whose draft is accepted
    c   time of a draft's step, or token, over the target's
    k   target steps at a time (1: plain); for tokens, positions verified in a step of the engine

`core.py` on the virtual clock agrees within 2 % where these hold: endless chains, steps of equal length, an engine in
which requests beside each other are free. What else there is, is a parameter of `asynchronous`, or is simulated.

Source: Lookahead Reasoning (arXiv 2506.19830) §4 and appendix; differs: chains that end, judges, overhead per step, and
token speculation under a draft that is not sped up with the target.
"""

from __future__ import annotations

import math


def token(a: float, c: float, k: int) -> float:
    """Return g, the speed-up of token speculation with k - 1 drafts."""
    return _expected(a, k) / (1 - c + c * k)


def synchronous(a: float, c: float, k: int) -> float:
    """Return f, of drafts first and target steps afterwards."""
    return _expected(a, k) / (1 - c + c * k)


def asynchronous(
    a: float, c: float, k: int, *, steps: float = math.inf, judge: float = 0.0, overhead: float = 0.0,
    draft_overhead: float = 0.0,
) -> float:  # fmt: skip
    """Return the speed-up of `core.py`.

    Args:
        steps: in a text.
        judge: time of a verdict in target steps, one after the other.
        overhead, draft_overhead: of a request beside its tokens, in target steps.
    """
    if k <= 1:
        return 1.0
    own = 1.0 + overhead
    draft = c + draft_overhead
    if k >= full_depth(draft / own):
        endless = 1.0 / ((1 - a) * (own + judge) + a * max(draft, judge))
    else:
        ratio = draft / own
        if a >= 1.0:
            endless = k / own
        else:
            phi = a**k / (1 - a**k)
            endless = 1 / (1 - a) / (1 + phi + ratio * (a / (1 - a) - k * phi)) / own
    if math.isinf(steps):
        return endless
    return steps / (own + judge + (steps - 1) / endless)


def over_token(a: float, c: float, k: int, g_target: float, g_draft: float = 1.0, **others: float) -> float:
    """Return the speed-up over plain decoding where the target's steps are g times as fast by token speculation."""
    return g_target * asynchronous(a, c * g_target / g_draft, k, **others)


def full_depth(c: float) -> int:
    """Return the number of target steps at a time beyond which nothing is gained."""
    return max(1, math.ceil(1 / c - 1e-9)) if c > 0 else 1 << 16


def target_steps(a: float, c: float, k: int) -> float:
    """Return target steps begun per step of the answer: what a busy engine loses."""
    return a + (1 - a) * min(k, full_depth(c))


def _expected(a: float, k: int) -> float:
    return float(k) if a >= 1.0 else (1 - a**k) / (1 - a)
