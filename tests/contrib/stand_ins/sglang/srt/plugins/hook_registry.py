"""Hooks by dotted path, put in place once by apply_hooks, which logs what it cannot do and goes on."""

import enum
import functools
import logging
import pkgutil
import sys
import types
from typing import ClassVar

logger = logging.getLogger("sglang")


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    _hooks: ClassVar[dict] = {}
    _patched: ClassVar[set] = set()

    @classmethod
    def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
        assert hook_type is HookType.AROUND, "the stand-in knows no others"
        cls._hooks.setdefault(target, []).append((hook_type, hook, source))

    @classmethod
    def apply_hooks(cls):
        for target in sorted(cls._hooks):
            if target not in cls._patched:
                try:
                    cls._apply(target)
                    cls._patched.add(target)
                except Exception:
                    logger.exception("no hooks for %s", target)

    @classmethod
    def _apply(cls, target):
        path, _, name = target.rpartition(".")
        owner = pkgutil.resolve_name(path)
        original = hooked = getattr(owner, name)
        for _, hook, _ in cls._hooks[target]:
            hooked = _around(hook, hooked)
        setattr(owner, name, hooked)
        for module in list(sys.modules.values()):  # who imported the original by name gets the hooked one too
            if isinstance(module, types.ModuleType):
                for key, value in list(vars(module).items()):
                    if value is original:
                        setattr(module, key, hooked)


def _around(hook, inner):
    @functools.wraps(inner)
    def hooked(*args, **kwargs):
        return hook(inner, *args, **kwargs)

    return hooked
