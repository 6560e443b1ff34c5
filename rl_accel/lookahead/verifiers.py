"""The verifiers by name: checked without a server, made with one.

`exact` is lossless. `numbers`, `likelihood`, `hidden` and `judge` let in the draft's words where they find them as
good; `random` and `always` are controls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rl_accel.config import unknown
from rl_accel.errors import ConfigError
from rl_accel.lookahead.step import Verifier

if TYPE_CHECKING:
    import aiohttp

VERIFIERS = ("exact", "numbers", "likelihood", "hidden", "judge", "random", "always")
LOSSLESS = ("exact",)
NEED_URL = ("hidden", "judge")
THRESHOLDS = {
    "likelihood": ("nats that a draft may be less likely", 0.0, 1e9),
    "hidden": ("least cosine", -1.0, 1.0),
    "random": ("probability", 0.0, 1.0),
}
"""Verifier -> what its threshold is, and its range."""
PROBABILITY = 0.5
"""Of `random` without a threshold."""


def check_verifier(name: str, verifier_url: str | None = None, threshold: float | None = None) -> None:
    """Check settings of a verifier before there is a session; imports no client.

    Raises:
        ConfigError: for an unknown name, a value that is missing or out of range, or one that the verifier ignores.
    """
    if name not in VERIFIERS:
        raise ConfigError(unknown("verifier", name, VERIFIERS))
    if name in NEED_URL and not verifier_url:
        raise ConfigError(f"verifier={name} asks a server; set verifier_url (the command: --verifier-url)")
    if name not in NEED_URL and verifier_url:
        raise ConfigError(f"verifier={name} asks no server of its own; leave verifier_url={verifier_url} out")
    if verifier_url and not verifier_url.startswith(("http://", "https://")):
        raise ConfigError(f"verifier_url={verifier_url} must begin with http:// or https://")
    if threshold is None:
        return
    if name not in THRESHOLDS:
        raise ConfigError(f"verifier={name} has no threshold; leave threshold={threshold} out")
    meaning, low, high = THRESHOLDS[name]
    if not low <= threshold <= high:
        raise ConfigError(f"threshold={threshold}: of verifier={name} it is the {meaning}, {low:g} to {high:g}")


def make_verifier(
    name: str,
    *,
    session: aiohttp.ClientSession,
    target_url: str,
    sampling: Mapping[str, Any],
    decode: Callable[[Sequence[int]], str],
    verifier_url: str | None = None,
    verifier_model: str | None = None,
    threshold: float | None = None,
    api_key: str | None = None,
) -> Verifier:
    """Return a verifier. One serves many texts, and should: its cost, its limit of requests and its seed are its own.

    Args:
        target_url: of the server that writes the target's steps, without a path.
        sampling: of the target, as JSON; texts that differ in it: `for_sampling`.
        decode: from token ids to text.
        verifier_url: of the server that `hidden` or `judge` asks, without a path.
        verifier_model: its model's name.
        threshold: `likelihood`: margin in nats; `hidden`: cosine; `random`: probability. None: the default.
        api_key: of the server at `verifier_url`.

    Raises:
        ConfigError: as `check_verifier`.
    """
    check_verifier(name, verifier_url, threshold)
    url = verifier_url or ""
    if name == "likelihood":
        from rl_accel.lookahead import likelihood

        margin = likelihood.MARGIN if threshold is None else threshold
        return likelihood.Likelihood(session, target_url, sampling, margin)
    if name == "hidden":
        from rl_accel.lookahead import hidden

        cosine = hidden.THRESHOLD if threshold is None else threshold
        return hidden.Hidden(session, url, cosine, model=verifier_model, api_key=api_key)
    if name == "judge":
        from rl_accel.lookahead.judge import Judge

        return Judge(session, url, verifier_model, decode, api_key)
    from rl_accel.lookahead import verify

    if name == "random":
        return verify.Random(PROBABILITY if threshold is None else threshold)
    if name == "numbers":
        return verify.Numbers(decode)
    return verify.Exact() if name == "exact" else verify.Always()


def for_sampling(verifier: Verifier, sampling: Mapping[str, Any]) -> Verifier:
    """Return the verifier for a text of these sampling parameters, which all but `likelihood` do not look at."""
    other = getattr(verifier, "with_sampling", None)
    return verifier if other is None else other(sampling)
