"""One chat-template builder for all requests; each would encode its boundary tokens anew."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from rl_accel.patching import HostPatch


class ReuseTokenBuilder(HostPatch):
    """Every request makes a `ContinuousTokenBuilder`, and the ones for text keep nothing of a request."""

    target = "verl.experimental.agent_loop.agent_loop:create_continuous_token_builder"

    @classmethod
    def replace(cls, module: Any) -> None:
        create = module.create_continuous_token_builder
        made: list[tuple[Any, dict[str, Any], Any]] = []

        def reuse(tokenizer: Any, **kwargs: Any) -> Any:
            if kwargs.get("processor") is not None:
                return create(tokenizer, **kwargs)
            for of_tokenizer, of_kwargs, builder in made:
                if of_tokenizer is tokenizer and of_kwargs == kwargs:
                    return builder
            builder = create(tokenizer, **kwargs)
            made.append((tokenizer, kwargs, builder))
            return builder

        reuse.__module__ = __name__
        module.create_continuous_token_builder = reuse

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        return module.create_continuous_token_builder.__module__ == __name__
