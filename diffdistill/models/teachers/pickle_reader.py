"""Pickles read as data: a machine for the opcodes that containers, numbers, texts and tensors need. It runs nothing.

It is no subclass of pickle's: it has no way to import or to call what a file names. A global is a name; a call of one
is looked up in the reader's own table, and what is not there is refused by its name.  Opcodes: CPython's pickletools.
"""

import io
import mmap
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from diffdistill.settings.reading import check_regular
from diffdistill.settings.schema import UserError

MAX_OPCODES = 1_000_000
MAX_STACK = 100_000
MAX_NUMBER_BYTES = 64
MAX_TEXT_BYTES = 2**24
MAX_BYTES = 8 * 2**30
MADE_BYTES = 2**24  # may be made beside four times its size: a number is read as bytes, storage and tensor

OTHER_KINDS = {
    b"PK\x03\x04": "a zip, as torch.save writes it. Beside EDM's training-state-*.pt, which this may be, lies "
    "network-snapshot-*.pkl: give that",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"<": "a web page, of a download that went wrong, say",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself: git lfs pull",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j": "what torch.save wrote before PyTorch 1.6; give EDM's network-snapshot-*.pkl",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}
"""By how a file begins, what it is in place of a pickle of EDM's."""
LONGEST_MAGIC = 32

Build = Callable[..., Any]


class Refused(UserError):  # noqa: N818
    """The pickle holds what is not read."""


@dataclass(frozen=True)
class Global:
    """The name of a class or a function; never the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Record:
    """An object as data: the name of its class, and its state."""

    kind: Global
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """Where a list of items begins on the stack."""


def read_pickle(file: FilePath, *, calls: Mapping[tuple[str, str], Build], records: frozenset[tuple[str, str]]) -> Any:
    """What a pickle holds.

    calls: what stands for the call of a global, by module and name.  records: classes whose objects become Records.
    Raises Refused on anything else, by its name; on a damaged file; and on one that is too large.
    """
    try:
        size = check_regular(file)
        with file.open("rb") as handle:
            if not 0 < size <= MAX_BYTES:
                raise Refused(f"{file}: {size:,} bytes; pickles of 1 byte to {MAX_BYTES // 2**30} GiB are read")
            if kind := other_kind(handle.read(LONGEST_MAGIC)):
                raise Refused(f"{file}: no bare pickle but {kind}")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Machine(str(file), calls, records, budget=4 * size + MADE_BYTES).run(content)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def other_kind(head: bytes) -> str | None:
    """What a file is that is taken for a pickle, by its first bytes; None where they do not say."""
    if head[8:10] == b'{"' and not head.startswith(b"\x80"):
        return "a safetensors file"
    return next((kind for magic, kind in OTHER_KINDS.items() if head.startswith(magic)), None)


class _Machine:
    def __init__(
        self, origin: str, calls: Mapping[tuple[str, str], Build], records: frozenset[tuple[str, str]], *, budget: int
    ) -> None:
        """budget: the bytes that all values made by calls may take together."""
        self.origin, self.calls, self.records, self.budget = origin, calls, records, budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: Any) -> Any:
        steps = 0
        try:
            for opcode, argument, _ in pickletools.genops(content):
                steps += 1
                if steps > MAX_OPCODES or len(self.stack) > MAX_STACK:
                    raise self.refused("it is too long, or too deep")
                if opcode.name == "STOP":
                    (found,) = self.stack
                    return found
                self.step(opcode.name, argument)
        except Refused:
            raise
        except (ValueError, IndexError, TypeError, KeyError, EOFError, OverflowError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise Refused(f"{self.origin}: not a whole pickle: {type(error).__name__}: {reason}") from None
        raise self.refused("it has no end")

    def refused(self, what: str) -> Refused:
        return Refused(f"{self.origin}: {what}; refused, and nothing was run")

    def step(self, name: str, argument: Any) -> None:
        if name in IGNORED:
            return
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in NUMBERS:
            if isinstance(argument, int) and argument.bit_length() > 8 * MAX_NUMBER_BYTES:
                raise self.refused("it holds a number of too many digits")
            self.stack.append(argument)
        elif name in TEXTS:
            if len(argument) > MAX_TEXT_BYTES:
                raise self.refused(f"it holds a text of {len(argument):,} characters")
            self.stack.append(argument)
        elif name in BYTES:
            self.stack.append(argument)
        elif name in PUTS:
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in GETS:
            self.stack.append(self.memo[argument])
        else:
            action = getattr(self, f"do_{name.lower()}", None)
            if action is None:
                raise self.refused(f"opcode {name}, which is not read")
            action(argument)

    def items(self) -> list[Any]:
        """What stands above the last mark; both go."""
        for place in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[place], Mark):
                found = self.stack[place + 1 :]
                del self.stack[place:]
                return found
        raise self.refused("a list without a beginning")

    def top(self, kind: type) -> Any:
        """What is on the stack's top, which must be of this type."""
        if type(self.stack[-1]) is not kind:
            raise self.refused(f"items for a {kind.__name__} that is a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def fill(self, pairs: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int, bool):
                raise self.refused(f"a key that is a {type(key).__name__}")
            target[key] = value

    def do_mark(self, _: Any) -> None:
        self.stack.append(Mark())

    def do_pop(self, _: Any) -> None:
        self.stack.pop()

    def do_pop_mark(self, _: Any) -> None:
        self.items()

    def do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.items()))

    def do_tuple1(self, _: Any) -> None:
        self.pack(1)

    def do_tuple2(self, _: Any) -> None:
        self.pack(2)

    def do_tuple3(self, _: Any) -> None:
        self.pack(3)

    def pack(self, count: int) -> None:
        if len(self.stack) < count:
            raise self.refused("a tuple of more than there is")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def do_list(self, _: Any) -> None:
        self.stack.append(self.items())

    def do_dict(self, _: Any) -> None:
        pairs = self.items()
        self.stack.append({})
        self.fill(pairs)

    def do_append(self, _: Any) -> None:
        value = self.stack.pop()
        self.top(list).append(value)

    def do_appends(self, _: Any) -> None:
        values = self.items()
        self.top(list).extend(values)

    def do_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key, value])

    def do_setitems(self, _: Any) -> None:
        self.fill(self.items())

    def do_additems(self, _: Any) -> None:
        values = self.items()
        if not all(type(value) in (str, int) for value in values):
            raise self.refused("a set of other things than texts and numbers")
        self.top(set).update(values)

    def do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.push_global(module, name)

    def do_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_global(module, name)

    def push_global(self, module: Any, name: Any) -> None:
        if (module, name) not in self.calls and (module, name) not in self.records:
            raise self.refused(f"names {module}.{name}, which is not read")
        self.stack.append(Global(module, name))

    def do_reduce(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(called, arguments))

    def do_newobj(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if isinstance(called, Global) and (called.module, called.name) in self.records and arguments == ():
            self.stack.append(Record(called))
        else:
            self.stack.append(self.call(called, arguments))

    def call(self, called: Any, arguments: Any) -> Any:
        build = self.calls.get((called.module, called.name)) if isinstance(called, Global) else None
        if build is None or type(arguments) is not tuple:
            raise self.refused(f"a call of {called}, which is not made")
        try:
            self.spend(sum(map(size_of, arguments)))  # before: what is made is never much larger
            return build(*arguments)
        except Refused as error:
            raise self.refused(str(error)) from None
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            raise self.refused(f"{called}: {' '.join(str(error).split())[:200]}") from None

    def spend(self, count: int) -> None:
        """Raise Refused where the pickle has things made that are out of all proportion to it."""
        self.budget -= count
        if self.budget < 0:
            raise Refused("it has far more made than it holds")

    def do_build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record) and type(state) is dict and not target.state:
            target.state.update(state)
        elif isinstance(target, NumberType) and type(state) is tuple:
            target.set_state(state)
        else:
            raise self.refused(f"a state for a {type(target).__name__}")


IGNORED = frozenset({"PROTO", "FRAME"})
CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
NUMBERS = frozenset({"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "BINFLOAT", "FLOAT"})
TEXTS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"})
BYTES = frozenset({"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"})
PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})


class NumberType:
    """A dtype of NumPy's: of plain numbers, in either order of bytes."""

    KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")

    def __init__(self, code: str, *_: Any) -> None:
        if code not in self.KINDS:
            raise Refused(f"numbers of the type {code!r}")
        self.code, self.order = code, "<"

    def set_state(self, state: tuple[Any, ...]) -> None:
        """The second entry is the order of bytes; the others of a plain type say nothing."""
        self.order = ">" if len(state) > 1 and state[1] == ">" else "<"

    def number(self, content: bytes) -> float | int | bool:
        """One number from its bytes."""
        import numpy as np

        (value,) = np.frombuffer(content, np.dtype(self.order + self.code))
        return value.item()


def size_of(value: Any) -> int:
    """About the bytes of what a call makes of a value."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return 64 * len(value) if isinstance(value, (list, set, dict, tuple)) else 0


def read_storage(content: bytes) -> Tensor:
    """A storage's bytes, as torch's own restricted reader reads them: flat, uint8, with its type as `dtype`."""
    try:
        storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own
        raise Refused(f"a storage that cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(storage, torch.storage.TypedStorage):
        raise Refused(f"a storage that is a {type(storage).__name__}")
    return torch.tensor([], dtype=storage.dtype).set_(storage._untyped_storage)


def read_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage, which must hold all of it: no number is repeated."""
    if not isinstance(storage, Tensor) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise Refused("a tensor of no storage")
    count = 1
    for side in size:
        count *= side
        if count > storage.numel():
            raise Refused(f"a tensor of the shape {size}, whose storage holds {storage.numel():,} numbers")
    return storage.as_strided(size, stride, offset).clone()


def read_parameter(data: Tensor, *_: Any) -> Tensor:
    """A parameter's tensor."""
    if not isinstance(data, Tensor):
        raise Refused("a parameter that is no tensor")
    return data


def read_scalar(kind: NumberType, content: bytes) -> float | int | bool:
    """A number of NumPy's."""
    if not isinstance(kind, NumberType) or not isinstance(content, bytes):
        raise Refused("a number of no type")
    return kind.number(content)


def read_dict(*arguments: Any) -> dict[str, Any]:
    """An empty dict of any kind; the items come behind it."""
    if arguments:
        raise Refused("a dict made of arguments")
    return {}


def read_set(values: Any = ()) -> set[Any]:
    """A set, as protocols 2 and 3 write it: made of a list."""
    if type(values) not in (list, tuple) or not all(type(value) in (str, int) for value in values):
        raise Refused("a set of other things than texts and numbers")
    return set(values)


def read_bytes(text: str, encoding: str) -> bytes:
    """Bytes, as protocol 2 writes them."""
    if encoding != "latin1":
        raise Refused(f"bytes as a text in {encoding!r}")
    return text.encode("latin1")


PLAIN_CALLS: Mapping[tuple[str, str], Build] = {
    ("collections", "OrderedDict"): read_dict,
    ("builtins", "set"): read_set,
    ("__builtin__", "set"): read_set,
    ("_codecs", "encode"): read_bytes,
    ("torch._utils", "_rebuild_tensor_v2"): read_tensor,
    ("torch._utils", "_rebuild_parameter"): read_parameter,
    ("torch.storage", "_load_from_bytes"): read_storage,
    ("numpy", "dtype"): NumberType,
    ("numpy.core.multiarray", "scalar"): read_scalar,
    ("numpy._core.multiarray", "scalar"): read_scalar,
}
"""What stands for the calls that tensors and NumPy's numbers are pickled as."""
