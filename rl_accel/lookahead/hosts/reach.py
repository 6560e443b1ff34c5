"""Whether a server writes tokens by the endpoint that lookahead uses."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from rl_accel.lookahead.endpoint import PATH

TIMEOUT_S = 120.0


def missing(url: str) -> str:
    """Return why a server does not write a token after a prompt of one; "" if it does."""
    body = {"request_id": "lookahead-live", "token_ids": [0], "sampling_params": {"max_tokens": 1, "temperature": 0.0}}
    request = urllib.request.Request(
        url.rstrip("/") + PATH, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found = json.load(answer)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read()[:200].decode(errors='replace')}"
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if len(found) == 1 else f"{len(found)} tokens for one"
