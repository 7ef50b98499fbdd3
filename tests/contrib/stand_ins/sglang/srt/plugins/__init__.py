"""Plugins: every installed entry point of the group is called once a process; what it raises is only logged."""

import logging
import os
from importlib.metadata import entry_points

from sglang.srt.plugins.hook_registry import HookRegistry

logger = logging.getLogger("sglang")
_plugins_loaded = False


def load_plugins() -> None:
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    only = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()}
    for entry in entry_points(group="sglang.srt.plugins"):
        if only and entry.name not in only:
            continue
        try:
            entry.load()()
        except Exception:
            logger.exception("plugin %s failed", entry.name)
    HookRegistry.apply_hooks()
