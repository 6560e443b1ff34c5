"""The launcher of the proxy: step-level speculation for any client of the OpenAI API.

    python -m rl_accel.lookahead.serve --target URL --draft URL --tokenizer FOLDER

Both servers are plain `vllm serve` processes; with exact sampling in both,
`--additional-config '{"rl_accel": {"sampling": {"exact": true, "seed": 0}}}'`, answers are those of the target alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial

from rl_accel.errors import ConfigError, RLAccelError
from rl_accel.lookahead.verifiers import LOSSLESS, THRESHOLDS, VERIFIERS, check_verifier, make_verifier

KEY_ENV = "RL_ACCEL_LOOKAHEAD_KEY"
VERIFIER_KEY_ENV = "RL_ACCEL_LOOKAHEAD_VERIFIER_KEY"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m rl_accel.lookahead.serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
        epilog=f"Environment: {KEY_ENV}, a key that clients must send; {VERIFIER_KEY_ENV}, the key of --verifier-url.",
    )  # fmt: skip
    found.add_argument("--target", required=True, help="URL of the vLLM server whose answers are wanted")
    found.add_argument("--draft", required=True, help="URL of the vLLM server that writes ahead")
    found.add_argument("--tokenizer", required=True, help="folder or name of the tokenizer that both have")
    found.add_argument("--model", help="the name for clients (default: that of the tokenizer)")
    found.add_argument("--delimiter", default="\n", help="text that ends a step (default: a line break)")
    found.add_argument("--verifier", choices=VERIFIERS, default="exact",
                       help="exact: the target's own answers; others: lossy, see --allow-lossy")  # fmt: skip
    found.add_argument("--verifier-url", help="hidden: a vLLM pooling server; judge: a server of the OpenAI API")
    found.add_argument("--verifier-model", help="its model (default: not sent)")
    found.add_argument("--threshold", type=float,
                       help="; ".join(f"{name}: {meaning}" for name, (meaning, *_) in THRESHOLDS.items()))  # fmt: skip
    found.add_argument("--allow-lossy", action="store_true", help="serve answers that the target would not give")
    found.add_argument("--depth", type=int, default=8, help="target steps of a text at a time, at most (default: 8)")
    found.add_argument("--width", type=int, default=1, help="drafts of the next step (default: 1)")
    found.add_argument(
        "--hint",
        action="store_true",
        help="give the target each draft as its token draft; it drafts by das, head, auto or ahead",
    )
    found.add_argument("--always", action="store_true", help="drafts for every text, measured faster or not")
    found.add_argument("--max-tokens", type=int, default=4096, help="of an answer (default: 4096)")
    found.add_argument("--max-requests", type=int, default=64, help="at a time (default: 64)")
    found.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    found.add_argument("--port", type=int, default=8100)
    return found


def main(arguments: Sequence[str]) -> int:
    """Serve until the process is told to end."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        return serve(args)
    except RLAccelError as error:
        print(f"rl_accel: {error}", file=sys.stderr)
        return 2


def serve(args: argparse.Namespace) -> int:
    """
    Raises:
        ConfigError: for options that do not fit together, or a tokenizer that is not there.
    """
    import uvicorn
    from transformers import AutoTokenizer

    from rl_accel.lookahead.proxy import Proxy, Settings
    from rl_accel.lookahead.switch import Switch
    from rl_accel.lookahead.text import delimiter_ids
    from rl_accel.quickstart.deep import shipped_policy

    check_verifier(args.verifier, args.verifier_url, args.threshold)
    if args.verifier not in LOSSLESS and not args.allow_lossy:
        raise ConfigError(f"--verifier {args.verifier} changes answers; it needs --allow-lossy")
    for name in ("depth", "width", "max_tokens", "max_requests"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    try:
        tokenizer = AutoTokenizer.from_pretrained(shipped_policy(args.tokenizer))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokenizer {args.tokenizer}: {error}") from None
    delimiters = delimiter_ids(tokenizer, args.delimiter)
    if not delimiters:
        raise ConfigError(f"--delimiter {args.delimiter!r}: no token holds it, so steps would never end")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"--tokenizer {args.tokenizer} has no end token")
    make = partial(
        make_verifier, args.verifier, target_url=args.target, sampling={}, verifier_url=args.verifier_url,
        decode=partial(tokenizer.decode, skip_special_tokens=True), verifier_model=args.verifier_model,
        threshold=args.threshold, api_key=os.environ.get(VERIFIER_KEY_ENV),
    )  # fmt: skip
    settings = Settings(
        args.target, args.draft, args.model or args.tokenizer, tuple(delimiters), (tokenizer.eos_token_id,),
        max_tokens=args.max_tokens, max_requests=args.max_requests, width=args.width, hint=args.hint,
        api_key=os.environ.get(KEY_ENV, ""),
    )  # fmt: skip
    app = Proxy(settings, tokenizer, make, Switch(args.depth, args.always)).app()
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
