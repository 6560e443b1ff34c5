"""Which rollout a request of vLLM is.

Host symbols (vLLM 0.28.0): `CachedRequestState.{req_id,sampling_params}`.
"""

from __future__ import annotations

from typing import Any

from rl_accel.hosts.vllm.faults import MALFORMED, Faults
from rl_accel.identity import FIELD, RolloutIdentity


def identity_of(request: Any, faults: Faults) -> RolloutIdentity | None:
    """Return which rollout a vLLM request (`CachedRequestState`) is, read once and kept on it.

    None for anonymous requests, and for those whose identity cannot be read: a front end does not look into
    `extra_args`, and in here a refusal would end the engine for everybody. `faults` counts them.
    """
    try:
        return request.rl_accel_identity
    except AttributeError:
        identity = request.rl_accel_identity = _read(request, faults)
        return identity


def _read(request: Any, faults: Faults) -> RolloutIdentity | None:
    extra_args = getattr(request.sampling_params, "extra_args", None)
    value = extra_args.get(FIELD) if isinstance(extra_args, dict) else None
    if value is None:
        return None
    try:
        return RolloutIdentity.read(value)
    except ValueError as error:
        faults.note(
            MALFORMED, "request %.60s is served as anonymous: its extra_args[%r] is malformed: %s",
            ascii(request.req_id), FIELD, error,
        )  # fmt: skip
        return None
