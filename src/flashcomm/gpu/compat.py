"""Compile and launch Triton kernels. Private names of Triton are used only here.

These names were checked in Triton 3.6, 3.7.1 and 3.9.0:

| what                                               | used for                                                    |
|----------------------------------------------------|-------------------------------------------------------------|
| `triton.compiler.ASTSource`, `triton.compile`      | compiling a kernel for given types, without any tensor      |
| `CompiledKernel.__getitem__(grid)`                 | a launcher that takes addresses; tuples stay nested         |
| `[["tt.divisibility", 16]]`                        | the attribute of a pointer that is 16-byte aligned          |
| `triton.knobs.runtime.interpret`                   | finding out whether kernels run in Triton's interpreter     |
| `triton.runtime.interpreter._patch_lang_tensor`    | mending 3.6's interpreter for NumPy 2.4                     |
| `InterpreterBuilder.create_splat`                  | mending 3.9's interpreter for masks from run-time numbers   |
| `triton.runtime.interpreter._implicit_cvt`         | holding `Int64` in 64 bits in the interpreter, too          |

Kernels take three kinds of arguments, in this order:

 1. pointers,
 2. run-time numbers, single or in `NamedTuple`s: a new value compiles nothing,
 3. constants, in `NamedTuple`s that are annotated `tl.constexpr`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from flashcomm.compat import current_stream_handle
from flashcomm.errors import InputError

INTERPRETED: bool = triton.knobs.runtime.interpret
Start = Callable[..., None]  # takes the address for each of a kernel's pointers

_Bundle = TypeVar("_Bundle", bound=tuple[Any, ...])
_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_C_TYPES = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}
_compiled: dict[Any, Any] = {}


def _convert_values_of_one_element() -> None:
    """Let loops of interpreted kernels end at computed values, with Triton 3.6 and NumPy 2.4.

    The interpreter holds a number as an array of one element. NumPy 2.4 converts only arrays without dimensions to int.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_convert(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_convert


def _splat_conditions_as_bool() -> None:
    """Let interpreted kernels use a condition on a run-time number in a mask, with Triton 3.9.

    Its loads and stores accept masks of bool only. The interpreter records the result of a comparison under the type of
    the values compared, so a splat of it became int32.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    splat = InterpreterBuilder.create_splat

    def create_splat(self: Any, block: Any, value: Any) -> Any:
        result = splat(self, block, value)
        result.data = result.data.astype(value.data.dtype)
        return result

    InterpreterBuilder.create_splat = create_splat


class Int64(int):
    """A run-time number that kernels always hold in 64 bits. A plain int gets 32 bits if it fits."""


def _hold_int64() -> None:
    """Let interpreted kernels hold an `Int64` in 64 bits, such as an address below 2 GB: NumPy widens no bitcast."""
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_and_hold(arg: Any) -> Any:
        if not isinstance(arg, Int64):
            return convert(arg)
        return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.int64), tl.int64), tl.int64)

    interpreter._implicit_cvt = convert_and_hold


if INTERPRETED and triton.__version__.startswith("3.6."):
    _convert_values_of_one_element()
if INTERPRETED:
    _splat_conditions_as_bool()
    _hold_int64()


def constants(bundle: _Bundle) -> _Bundle:
    """Return a `NamedTuple` of constants in the form that kernels take.

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
    """Return a function that launches a kernel on the current stream. It takes the address for each pointer.

    Args:
        kernel: a `triton.jit` function; see the module's docstring for the order of its arguments.
        grid: the number of programs.
        pointers: the dtype that each pointer points to.
        numbers: ints, floats and `NamedTuple`s of ints and tensors. Tensors become pointers of unknown alignment.
        bundles: `NamedTuple`s of plain constants.
        num_warps: the number of warps of a program.
        device: the index of the GPU; not used in the interpreter.
        aligned: whether all addresses will be multiples of 16 bytes.
        may_capture: whether the kernel may be compiled during CUDA graph capture.

    Raises:
        InputError: `may_capture` is False, and the kernel would have to be compiled during CUDA graph capture.
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
    start = _compiled[key][(grid, 1, 1)]  # this also loads the kernel
    rest = (*map(_bare, numbers), *(None for _ in bundles))

    def launch(*addresses: int) -> None:
        start(*addresses, *rest, stream=current_stream_handle(device))

    return launch


def n_compiled() -> int:
    """Return how many kernels `launcher` has compiled in this process."""
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
    """Return a kernel compiled for these types. Fused multiply-adds are off, because they would change bits.

    Args:
        kernel: see `launcher`.
        pointers: see `launcher`.
        types: the types of the run-time numbers, see `types_of`.
        bundles: see `launcher`.
        num_warps: see `launcher`.
        aligned: see `launcher`.
        target: a `triton.backends.compiler.GPUTarget`, for which no GPU is needed. None stands for the current GPU.
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
    """Return Triton's names of the types of run-time numbers. For a tuple that is a tuple of names."""
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
    """The number or tuple, with addresses in place of tensors."""
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
    """A tensor of one value at an address, because the interpreter takes no bare addresses."""
    return torch.frombuffer((_C_TYPES[dtype.itemsize] * 1).from_address(address), dtype=dtype)
