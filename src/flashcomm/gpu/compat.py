"""Private names of Triton, in one place, and the one way in which this package launches kernels.

Read in Triton 3.6 and 3.7.1:

| what                                               | used for                                                    |
|----------------------------------------------------|-------------------------------------------------------------|
| `triton.compiler.ASTSource`, `triton.compile`      | a kernel compiled for given types, before any tensor exists |
| `CompiledKernel.__getitem__(grid)`                 | a launcher that takes addresses; tuples stay nested         |
| `[["tt.divisibility", 16]]`                        | the attribute of a pointer that is 16-byte aligned          |
| `triton.knobs.runtime.interpret`                   | whether kernels run in Triton's interpreter                 |

Kernels take their arguments in three kinds, in this order: pointers; run-time numbers, single or in `NamedTuple`s;
constants, each one a `NamedTuple` and annotated `tl.constexpr`. A new value of a number compiles nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from flashcomm.compat import current_stream_handle
from flashcomm.errors import InputError

INTERPRETED: bool = triton.knobs.runtime.interpret
Start = Callable[..., None]  # from the addresses that a kernel's pointers get

_Bundle = TypeVar("_Bundle", bound=tuple[Any, ...])
_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_C_TYPES = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}
_compiled: dict[Any, Any] = {}


class Int64(int):
    """A run-time number that a kernel holds in 64 bits, however small it is. A plain int gets 32 bits if it fits."""


def constants(bundle: _Bundle) -> _Bundle:
    """A `NamedTuple` of constants as kernels take it.

    Its members become `tl.constexpr`s, except in Triton's interpreter, whose kernels compute with plain values.
    """
    if INTERPRETED:
        return bundle
    members = (constants(m) if isinstance(m, tuple) else tl.constexpr(m) for m in bundle)
    return type(bundle)(*members)


def launcher(
    kernel: Any,
    grid: int,
    pointers: Sequence[torch.dtype],
    numbers: Sequence[Any],
    bundles: Sequence[tuple[Any, ...]],
    *,
    num_warps: int,
    device: int,
    aligned: bool = True,
    may_capture: bool = True,
) -> Start:
    """A launch of a kernel on the current stream, which takes the addresses of its pointers.

    Args:
        kernel: a `triton.jit` function; see the module's docstring for the order of its arguments.
        grid: number of programs.
        pointers: the dtype that each pointer points to.
        numbers: ints, floats and `NamedTuple`s of ints and of tensors, which are pointers of no known alignment.
        bundles: `NamedTuple`s of plain constants.
        num_warps: warps of a program.
        device: index of the GPU; not used in the interpreter.
        aligned: whether all addresses will be multiples of 16 bytes.
        may_capture: whether to compile while a CUDA graph is being captured.

    Raises:
        InputError: the kernel has to be compiled, a CUDA graph is being captured, and `may_capture` is False.
    """
    if INTERPRETED:
        return _interpreted(kernel, grid, pointers, numbers, bundles)
    types = types_of(numbers)
    key = (kernel, device, *pointers, types, *bundles, num_warps, aligned)
    if key not in _compiled:
        if not may_capture and torch.cuda.is_current_stream_capturing():
            raise InputError(
                "cannot compile a kernel during CUDA graph capture: make one call with this dtype and format, of about "
                "the same size, before capturing"
            )
        _compiled[key] = compile_kernel(kernel, pointers, types, bundles, num_warps, aligned)
    start = _compiled[key][(grid, 1, 1)]  # loads it
    rest = (*map(_bare, numbers), *(None for _ in bundles))

    def launch(*addresses: int) -> None:
        start(*addresses, *rest, stream=current_stream_handle(device))

    return launch


def n_compiled() -> int:
    """How many kernels `launcher` has compiled in this process."""
    return len(_compiled)


def compile_kernel(
    kernel: Any,
    pointers: Sequence[torch.dtype],
    types: Sequence[Any],
    bundles: Sequence[tuple[Any, ...]],
    num_warps: int,
    aligned: bool = True,
    target: Any = None,
) -> Any:
    """A kernel compiled for these types; without `target` for the current GPU. It needs no GPU if there is a target.

    Fused multiply-adds are off: they would change bits.
    """
    signature = [*(f"*{_NAMES[dtype]}" for dtype in pointers), *types, *("constexpr" for _ in bundles)]
    first = len(signature) - len(bundles)
    source = ASTSource(
        kernel,
        dict(zip(kernel.arg_names, signature, strict=True)),
        {(first + i,): constants(bundle) for i, bundle in enumerate(bundles)},
        {(i,): [["tt.divisibility", 16]] for i in range(len(pointers) if aligned else 0)},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def types_of(numbers: Sequence[Any]) -> tuple[Any, ...]:
    """Triton's names of the types of run-time numbers; of a tuple the same tuple of names."""
    return tuple(map(_type_of, numbers))


def _type_of(number: Any) -> Any:
    if isinstance(number, tuple):
        types = [_type_of(member) for member in number]
        return type(number)(*types) if hasattr(number, "_fields") else tuple(types)
    if isinstance(number, Tensor):
        return f"*{_NAMES[number.dtype]}"
    if isinstance(number, float):
        return "fp32"
    return "i64" if isinstance(number, Int64) or not -(1 << 31) <= number < 1 << 31 else "i32"


def _bare(number: Any) -> Any:
    """The same with addresses in place of tensors."""
    if isinstance(number, tuple):
        return tuple(map(_bare, number))
    return number.data_ptr() if isinstance(number, Tensor) else number


def _interpreted(
    kernel: Any,
    grid: int,
    pointers: Sequence[torch.dtype],
    numbers: Sequence[Any],
    bundles: Sequence[tuple[Any, ...]],
) -> Start:
    def launch(*addresses: int) -> None:
        tensors = [_tensor_at(a, dtype) for a, dtype in zip(addresses, pointers, strict=True)]
        kernel[(grid,)](*tensors, *numbers, *bundles)

    return launch


def _tensor_at(address: int, dtype: torch.dtype) -> Tensor:
    """A tensor of one value at an address: the interpreter takes no bare addresses."""
    return torch.frombuffer((_C_TYPES[dtype.itemsize] * 1).from_address(address), dtype=dtype)
