"""From LLVM's assembly to a function pointer, for the machine this process runs on.

A kernel compiles in some 0.05 s, so nothing is kept on disk: no stale machine code after an update or on another
node's CPU, no cache files that starting ranks fight over.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import llvmlite.binding as llvm

_LOCK = threading.RLock()  # LLVM's global context serves one thread at a time
Made = TypeVar("Made")


def once(make: Callable[..., Made]) -> Callable[..., Made]:
    """make, called once for each list of arguments, also when several threads ask for the same at the same time."""
    made: dict[Any, Made] = {}

    @wraps(make)
    def kept(*key: Any) -> Made:
        if key not in made:
            with _LOCK:
                if key not in made:
                    made[key] = make(*key)
        return made[key]

    return kept


def compile_function(assembly: str, name: str, kinds: Sequence[Any]) -> Callable[..., None]:
    """The function `name` of an LLVM module; arguments are the ctypes `kinds`, nothing is returned.

    The GIL is released while it runs.
    """
    with _LOCK:
        module, machine = llvm.parse_assembly(assembly), _machine()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        options.loop_vectorization = options.slp_vectorization = False  # what we hand over is vectors already
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
    kernel: Any = ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(name))
    kernel.engine = engine  # owns the machine code
    return kernel  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def has_half() -> bool:
    """Whether the CPU converts float16; where it cannot (x86 before 2012) LLVM would call a library we may lack."""
    return platform.machine() not in ("x86_64", "AMD64") or bool(cpu()[1].get("f16c", False))


@lru_cache(maxsize=1)
def cpu() -> tuple[str, Any]:
    """LLVM's name of this CPU and its features (a mapping to bools)."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features()


def _machine() -> Any:
    """A fresh one each time: a compiler takes ownership of what it is given."""
    _initialize()
    name, features = cpu()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features.flatten(), opt=2, jit=True)


@lru_cache(maxsize=1)
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
