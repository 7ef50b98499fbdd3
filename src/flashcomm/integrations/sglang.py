"""Deprecated: the plugin for SGLang is now `flashcomm.contrib.sglang`."""

import warnings

from flashcomm.contrib.sglang import QuickReduce, communicators, disable, main, plugin, why_not

__all__ = ["QuickReduce", "communicators", "disable", "main", "plugin", "why_not"]

warnings.warn("flashcomm.integrations.sglang is now flashcomm.contrib.sglang", DeprecationWarning, stacklevel=2)

if __name__ == "__main__":
    raise SystemExit(main())
