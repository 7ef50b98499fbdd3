"""Compile LLVM assembly to a function, for the CPU that this process runs on.

A kernel compiles in some 0.05 s, so nothing is cached on disk. There is no stale machine code after an update or on a
node with another CPU, and ranks that start at the same time do not compete for cache files.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import llvmlite.binding as llvm

MAX_KERNELS = 32  # of each kind: encoders, decoders, adders
_LOCK = threading.RLock()  # LLVM's global context serves one thread at a time
Kernel = TypeVar("Kernel")


def once(build: Callable[..., Kernel]) -> Callable[..., Kernel]:
    """Decorate `build` to run once for each list of arguments, also when several threads ask at the same time.

    The MAX_KERNELS results that were used last are kept. A kernel takes 1.8 MB, and there is one for each remainder of
    a row by the group size. So without a limit, messages of many row lengths would fill the memory.
    """
    built: OrderedDict[Any, Kernel] = OrderedDict()

    @wraps(build)
    def get(*key: Any) -> Kernel:
        with _LOCK:
            if key not in built:
                built[key] = build(*key)
            built.move_to_end(key)
            kernel = built[key]
            while len(built) > MAX_KERNELS:
                built.popitem(last=False)  # a caller that still runs the kernel has a reference to it
        return kernel

    return get


def compile_function(assembly: str, name: str, kinds: Sequence[Any]) -> Callable[..., None]:
    """Return the function `name` of an LLVM module. It takes the ctypes `kinds`, and releases the GIL while it runs."""
    with _LOCK:
        module, machine = llvm.parse_assembly(assembly), _machine()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = False  # the assembly is vectors already
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
    kernel: Any = ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(name))
    kernel.engine = engine  # owns the machine code
    return kernel  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def has_half() -> bool:
    """Return whether the CPU converts float16. If not (x86 before 2012), LLVM calls a library that may be missing."""
    return platform.machine() not in ("x86_64", "AMD64") or bool(cpu()[1].get("f16c", False))


@lru_cache(maxsize=1)
def cpu() -> tuple[str, Any]:
    """Return LLVM's name of this CPU, and its features as a mapping to bools."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features()


def _machine() -> Any:
    """A new target machine. Each compiler takes ownership of its own."""
    _initialize()
    name, features = cpu()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features.flatten(), opt=2, jit=True)


@lru_cache(maxsize=1)
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
