"""LLVM vectors with Python's operators: a small language for writing functions.

A `Vec` is a value of a function under construction: a number, a vector of numbers or a pointer. `a * b + 1` *emits* a
multiplication and an addition of every lane. Nothing is computed until the function runs.

No flag lets LLVM reorder, contract or approximate: every floating-point operation is rounded once, as written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from flashcomm.cpu.jit import compile_function

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32, POINTER = ir.HalfType(), ir.FloatType(), ir.PointerType()

Numbers = int | float | Sequence[int]  # one for all lanes, or one per lane


def width(element: Any) -> int:
    """Return the bits of a number of this LLVM type."""
    return {F16: 16, F32: 32}.get(element) or int(element.width)


def _constant(kind: Any, numbers: Numbers) -> Any:
    if isinstance(kind, ir.VectorType):
        one_each = [numbers] * kind.count if isinstance(numbers, (int, float)) else numbers
        return ir.Constant(kind, [_constant(kind.element, x) for x in one_each])
    if isinstance(kind, ir.IntType):  # LLVM writes integers signed
        half = 1 << (kind.width - 1)
        return ir.Constant(kind, (int(numbers) + half) % (2 * half) - half)  # type: ignore[arg-type]
    return ir.Constant(kind, float(numbers))  # type: ignore[arg-type]


def _bitwise(instruction: str) -> Callable[[Vec, Vec | Numbers], Vec]:
    return lambda a, b: a._emit(instruction, a.like(b).value)


class Vec:
    """A number, a vector or a pointer. Operators work lane by lane. The other operand may be Python numbers."""

    def __init__(self, function: Function, value: Any) -> None:
        self.function, self.value = function, value

    @property
    def lanes(self) -> int:
        """Lanes of a vector, 0 of a single number."""
        return self.value.type.count if isinstance(self.value.type, ir.VectorType) else 0

    @property
    def element(self) -> Any:
        return self.value.type.element if self.lanes else self.value.type

    def like(self, other: Vec | Numbers) -> Vec:
        """Return `other` as a value of this one's type."""
        return other if isinstance(other, Vec) else Vec(self.function, _constant(self.value.type, other))

    def _emit(self, instruction: str, *operands: Any) -> Vec:
        return Vec(self.function, getattr(self.function.builder, instruction)(self.value, *operands))

    def _arithmetic(self, instruction: str, other: Vec | Numbers) -> Vec:
        return self._emit("f" + instruction if self.element == F32 else instruction, self.like(other).value)

    def __add__(self, other: Vec | Numbers) -> Vec:
        """Return the sum. A pointer moves by that many bytes."""
        if self.element == POINTER:
            return self._emit("gep", [self.function.number(0).like(other).value], False, "", I8)
        return self._arithmetic("add", other)

    def __sub__(self, other: Vec | Numbers) -> Vec:
        return self._arithmetic("sub", other)

    def __mul__(self, other: Vec | Numbers) -> Vec:
        return self._arithmetic("mul", other)

    def __truediv__(self, other: Vec | Numbers) -> Vec:
        return self._emit("fdiv", self.like(other).value)

    def __rtruediv__(self, other: Numbers) -> Vec:
        return self.like(other)._emit("fdiv", self.value)

    __and__, __or__, __xor__ = _bitwise("and_"), _bitwise("or_"), _bitwise("xor")
    __lshift__, __rshift__ = _bitwise("shl"), _bitwise("lshr")  # zeros come in
    sign_shift = _bitwise("ashr")  # to the right, copies of the sign come in

    def compare(self, operator: str, other: Vec | Numbers) -> Vec:
        """Return one bit per lane. Integers are signed. With NaN every comparison but "!=" is false."""
        order = "unordered" if operator == "!=" else "ordered"
        instruction = f"fcmp_{order}" if self.element == F32 else "icmp_signed"
        emit = getattr(self.function.builder, instruction)
        return Vec(self.function, emit(operator, self.value, self.like(other).value))

    def choose(self, yes: Vec | Numbers, no: Vec) -> Vec:
        """Return `yes` in the lanes where this vector of bits is set, else `no`."""
        return self._emit("select", no.like(yes).value, no.value)

    def minimum(self, other: Vec | Numbers) -> Vec:
        return self.compare("<", other)._emit("select", self.value, self.like(other).value)

    def maximum(self, other: Vec | Numbers) -> Vec:
        return self.compare(">", other)._emit("select", self.value, self.like(other).value)

    def intrinsic(self, name: str, *others: Vec, result: Any = None) -> Vec:
        """Return llvm.<name>(self, *others). The operands have one type, and so has the result unless it is given."""
        kind, element = self.value.type, self.element
        suffix = (f"v{self.lanes}" if self.lanes else "") + ("f" if element == F32 else "i") + str(width(element))
        callee = self.function.declare(f"llvm.{name}.{suffix}", [kind] * (1 + len(others)), result or kind)
        return Vec(self.function, self.function.builder.call(callee, [self.value, *(o.value for o in others)]))

    def view(self, element: Any) -> Vec:
        """Return the same bits as lanes of another type. The first lane is in the lowest bits."""
        kind = ir.VectorType(element, self.lanes * width(self.element) // width(element)) if self.lanes else element
        return self._emit("bitcast", kind)

    def to(self, element: Any, signed: bool = False) -> Vec:
        """Convert every lane. Integers are truncated or extended (by zeros unless signed), floats are rounded."""
        old, kind = self.element, ir.VectorType(element, self.lanes) if self.lanes else element
        if old in (F16, F32):
            return self._emit("fpext" if old == F16 else "fptrunc", kind)
        return self._emit("trunc" if width(element) < width(old) else "sext" if signed else "zext", kind)

    def shuffle(self, lanes: Sequence[int], other: Vec | None = None) -> Vec:
        """Return the lanes with these indices, from this vector followed by `other`."""
        mask = _constant(ir.VectorType(I32, len(lanes)), lanes)
        return self._emit("shuffle_vector", (other or self).value, mask)

    def splat(self, lanes: int) -> Vec:
        """Return a vector of copies of this number."""
        vector = ir.Constant(ir.VectorType(self.element, lanes), ir.Undefined)
        return Vec(self.function, self.function.builder.insert_element(vector, self.value, I32(0))).shuffle([0] * lanes)


class Variable:
    """A value that changes as the function runs. LLVM keeps it in registers."""

    def __init__(self, initial: Vec) -> None:
        self._kind, self._slot = initial.value.type, initial.function.scratch(initial.value.type)
        self.set(initial)

    def get(self) -> Vec:
        return self._slot._emit("load", "", None, self._kind)

    def set(self, value: Vec) -> None:
        value._emit("store", self._slot.value)


class Function:
    """A function under construction. It takes pointers, then integers, and returns nothing."""

    def __init__(self, name: str, pointers: int, integers: int) -> None:
        self._module, kinds = ir.Module(name), [POINTER] * pointers + [I64] * integers
        self._function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), kinds), name)
        self._entry = ir.IRBuilder(self._function.append_basic_block())  # scratch memory is reserved up here
        self._body = self._function.append_basic_block()
        self.builder = ir.IRBuilder(self._body)
        arguments = [Vec(self, a) for a in self._function.args]
        self.pointers, self.integers = arguments[:pointers], arguments[pointers:]

    def number(self, value: int) -> Vec:
        return Vec(self, I64(value))

    def vector(self, element: Any, lanes: int, numbers: Numbers) -> Vec:
        return Vec(self, _constant(ir.VectorType(element, lanes), numbers))

    def declare(self, name: str, kinds: Sequence[Any], result: Any) -> Any:
        known = self._module.globals.get(name)
        return known or ir.Function(self._module, ir.FunctionType(result, kinds), name)

    def scratch(self, kind: Any) -> Vec:
        """Return a pointer to memory on the function's stack, for one value of this LLVM type."""
        slot = self._entry.alloca(kind)
        slot.align = 64  # bytes of the widest register
        slot.type = POINTER
        return Vec(self, slot)

    def load(self, address: Vec, element: Any, lanes: int = 0) -> Vec:
        """Return the number or vector at an address. It need only be aligned for one element."""
        return address._emit("load", "", width(element) // 8, ir.VectorType(element, lanes) if lanes else element)

    def store(self, address: Vec, value: Vec) -> None:
        value._emit("store", address.value, width(value.element) // 8)

    @contextmanager
    def loop_while(self, condition: Callable[[], Vec]) -> Iterator[None]:
        """Emit `while condition():` with the body of the with statement."""
        test, body, done = (self._function.append_basic_block() for _ in range(3))
        self.builder.branch(test)
        self.builder.position_at_end(test)
        self.builder.cbranch(condition().value, body, done)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(test)
        self.builder.position_at_end(done)

    @contextmanager
    def loop(self, count: Vec) -> Iterator[Vec]:
        """Emit `for i in range(count):` with the body of the with statement, which gets i."""
        i = Variable(self.number(0))
        with self.loop_while(lambda: i.get().compare("<", count)):
            yield i.get()
            i.set(i.get() + 1)

    def compile(self) -> Callable[..., None]:
        """Return the compiled function: it takes addresses and integers, and releases the GIL while it runs."""
        self.builder.ret_void()
        self._entry.branch(self._body)
        kinds = [ctypes.c_void_p if a.type == POINTER else ctypes.c_int64 for a in self._function.args]
        return compile_function(str(self._module), self._function.name, kinds)
