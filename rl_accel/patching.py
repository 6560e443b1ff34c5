"""One base for everything that is replaced in a host: what, why, in which versions, and whether it is in place."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

from rl_accel.errors import RLAccelError


class HostPatch:
    """A symbol of a host and what replaces it. The docstring of a subclass says why. Not instantiated.

    `apply` may be called once in a process. Subclasses implement `replace`, and `is_live` where the symbol itself is
    not what is replaced.
    """

    target: str
    """ "module:symbol" of the host."""
    issue: str = ""
    """The host's own issue or pull request, where there is one."""
    versions: str = "verl 0.9.1"
    """Where it was found to be needed."""
    parameters: tuple[str, ...] = ()
    """First parameters of the symbol as the patch expects them; () for what is no function."""

    @classmethod
    def module_name(cls) -> str:
        return cls.target.partition(":")[0]

    @classmethod
    def find(cls, module: ModuleType | None = None) -> Any:
        """Return the symbol as it is now.

        Raises:
            RLAccelError: if the host no longer has it.
        """
        found: Any = module or importlib.import_module(cls.module_name())
        for name in cls.target.partition(":")[2].split("."):
            try:
                found = getattr(found, name)
            except AttributeError:
                raise RLAccelError(f"{cls.__name__}: {cls.target} is not there in the installed version") from None
        return found

    @classmethod
    def apply(cls, owner: Any) -> None:
        """Put the replacement in place.

        Args:
            owner: the module of the host, or an instance of its class where only that shall be changed.

        Raises:
            RLAccelError: if this or another patch replaced it before, or the symbol is not the one that was tested.
        """
        applied = vars(owner).setdefault("_rl_accel_patches", {})
        if holder := applied.get(cls.target):
            raise RLAccelError(f"{cls.target} is replaced by {holder} already; {cls.__name__} would replace it again")
        cls.check_signature(owner if isinstance(owner, ModuleType) else None)
        cls.replace(owner)
        applied[cls.target] = cls.__name__

    @classmethod
    def check_signature(cls, module: ModuleType | None = None) -> None:
        """Raise RLAccelError if the symbol is gone or takes other parameters than those that were tested."""
        found = cls.find(module)
        if not cls.parameters:
            return
        actual = tuple(inspect.signature(inspect.unwrap(found)).parameters)[: len(cls.parameters)]
        if actual != cls.parameters:
            raise RLAccelError(
                f"{cls.__name__}: {cls.target} takes {', '.join(actual)} in the installed version; tested was "
                f"{', '.join(cls.parameters)}"
            )

    @classmethod
    def replace(cls, owner: Any) -> None:
        raise NotImplementedError

    @classmethod
    def is_live(cls, module: ModuleType) -> bool:
        """Whether the symbol is ours: a function defined in the module of the patch, or in one of its closures."""
        found = cls.find(module)
        code = getattr(found, "__globals__", {}).get("__name__")
        return cls.__module__ in (code, getattr(found, "__module__", None))
