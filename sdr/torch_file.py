"""Tensors out of a file that torch.save wrote, without unpickling it.

A pickle is a program. One that may run no code can still ask for all memory, and one that only nests can overflow the
stack. So the program is not run: the few instructions that a state_dict of dense tensors is made of are followed, and
give descriptions, which the caller compares with what is expected before anything is read or allocated.
"""

import io
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from sdr.errors import SDRError, escape
from sdr.files import ZIP_DAMAGE, BoundedFile

PROGRAM_BYTES = 2 << 20  # of the pickle, about 20,000 tensors; FTCN's takes 40 kB
PIECE_BYTES = 1 << 20  # read at once
MAX_DIMENSIONS = 16
DTYPES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
ORDERED_DICT, PARAMETER, TENSOR = (
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
)
KNOWN = {*DTYPES, ORDERED_DICT, PARAMETER, TENSOR}  # all that a program may name
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
CRC_HINT = "damaged, or saved after torch.serialization.set_crc32_options(False): save it again without that"
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files before torch 1.6 begin


class Name(str):
    """Of a class or function, out of a pickle; never looked up."""


class Storage(NamedTuple):
    """Numbers in the file: key, type and count."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Stored(NamedTuple):
    """A tensor in the file, not read yet."""

    storage: Storage
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype


class TorchFile:
    """An open file of torch.save; ``tensors`` describes what it holds, by name. Made by :func:`open_torch_file`."""

    def __init__(self, tensors: Mapping[str, Stored], archive: "Archive | Legacy") -> None:
        self.tensors, self._archive = tensors, archive

    def read(self) -> dict[str, Tensor]:
        """All tensors, contiguous copies; takes their size and that of the largest storage."""
        found: dict[str, Tensor] = {}
        users: dict[Storage, list[str]] = {}
        for name, stored in self.tensors.items():
            users.setdefault(stored.storage, []).append(name)
        for storage, names in users.items():  # one at a time, since a storage may be many tensors'
            data = self._archive.read(storage)
            flat = torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
            for name in names:
                _, offset, shape, stride = self.tensors[name]
                found[name] = flat.as_strided(shape, stride, offset).clone(memory_format=torch.contiguous_format)
        return {name: found[name] for name in self.tensors}


@contextmanager
def open_torch_file(path: str | os.PathLike) -> Iterator[TorchFile]:
    """The file that torch.save wrote, zip or legacy, as descriptions of a bare state_dict's tensors.

    Raises:
        SDRError: unreadable, damaged, compressed, or more than a bare state_dict of dense tensors; from within the
            block too, for what is found damaged when it is read.
    """
    try:
        with BoundedFile(path, PROGRAM_BYTES) as file:
            archive = (Archive if file.read(2) == b"PK" else Legacy)(file)
            yield TorchFile(state_dict(archive.content), archive)
    except ZIP_DAMAGE as error:
        hint = CRC_HINT if str(error).startswith("Bad CRC-32") else ""
        raise SDRError(path, f"is not a readable checkpoint: {escape(str(error)[:200])}", hint) from error
    except ForeignError as error:
        raise SDRError(path, f"is not a bare state_dict of dense tensors: {escape(str(error)[:200])}") from error


class ForeignError(Exception):
    """More in a file than is read."""


class Archive:
    """The zip that torch.save writes: members are stored as they are, so none is larger than the file."""

    def __init__(self, file: BoundedFile) -> None:
        self._zip, size = zipfile.ZipFile(file), os.fstat(file.fileno()).st_size
        self._members = {info.filename: info for info in self._zip.infolist()}
        if len(self._members) < len(self._zip.infolist()):
            raise ValueError("it has two members of one name")
        for info in self._members.values():
            stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
            if not stored or info.header_offset + info.file_size > size:
                raise ValueError(f"its member {info.filename} is compressed, or larger than the file")
        programs = [name for name in self._members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(programs) != 1:
            raise ValueError(f"it has {len(programs)} members data.pkl instead of one")
        self._folder = programs[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in self._members and self._member("byteorder", 6) != b"little":
            raise ValueError("its numbers are not little-endian")
        self.content = follow(io.BytesIO(self._member("data.pkl")))

    def _member(self, name: str, size: int | None = None) -> bytearray:
        """A member's bytes, its checksum compared; raises ValueError where they are not ``size``."""
        info = self._members[self._folder + name]
        most = PROGRAM_BYTES if size is None else size
        if info.file_size > most or info.file_size < (size or 0):
            raise ValueError(f"its member {info.filename} has {info.file_size} bytes, not {most}")
        data = bytearray()
        with self._zip.open(info) as member:
            while piece := member.read(PIECE_BYTES):
                data += piece
        return data

    def read(self, storage: Storage) -> bytearray:
        return self._member(f"data/{storage.key}", storage.nbytes)


class Legacy:
    """The file of older versions: five pickles, then each storage's count and numbers in the order of their keys."""

    def __init__(self, file: BoundedFile) -> None:
        self._file, size = file, os.fstat(file.fileno()).st_size
        file.seek(0)
        head = io.BytesIO(file.read(PROGRAM_BYTES))
        if (follow(head), follow(head)) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
            raise ValueError("it does not begin as one")
        if follow(head).get("little_endian") is not True:
            raise ValueError("its numbers are not little-endian")
        storages: dict[str, Storage] = {}
        self.content = follow(head, storages)
        self._places, place = {}, 0
        keys = follow(head)
        if not isinstance(keys, list) or sorted(keys) != sorted(storages):
            raise ValueError("its list of storages is another than that of its tensors")
        place = head.tell()
        for key in keys:
            self._places[key] = place
            place += 8 + storages[key].nbytes
        if place > size:
            raise EOFError(f"it ends after {size} bytes of {place}")

    def read(self, storage: Storage) -> bytearray:
        self._file.seek(self._places[storage.key])
        if int.from_bytes(self._file.read(8), "little") != storage.numel:
            raise ValueError(f"its storage {storage.key} has not the {storage.numel} numbers that it is said to have")
        data = bytearray()
        while len(data) < storage.nbytes:
            piece = self._file.read(min(PIECE_BYTES, storage.nbytes - len(data)))
            if not piece:
                raise EOFError("it was cut off while it was read")
            data += piece
        return data


def state_dict(content: object) -> dict[str, Stored]:
    """What a file holds, if that is tensors by name."""
    if not isinstance(content, dict):
        raise ForeignError(f"it holds one {type(content).__name__}")
    if other := [name for name, value in content.items() if not isinstance(value, Stored)]:
        raise ForeignError(f"{other[0][:80]} is no tensor")
    return content


def follow(program: BinaryIO, storages: dict[str, Storage] | None = None) -> object:
    """What a pickle makes, of dict, list, tuple, numbers, text, :class:`Name`, :class:`Storage`, :class:`Stored`.

    Args:
        program: read to the end of one pickle.
        storages: takes the storages that are named, by key.

    Raises:
        ForeignError: it names, or does, what a state_dict of dense tensors needs not.
        ValueError, LookupError, TypeError: it is damaged.
    """
    storages = {} if storages is None else storages
    stack: list = []
    marks: list[list] = []  # the stacks below each mark
    memo: dict[int, object] = {}
    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO":
                pass
            case name if name in VALUES:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in EMPTY:
                stack.append(EMPTY[name]())
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE":
                stack, items = marks.pop(), stack
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(take(stack, int(name[-1]))))
            case "APPEND" | "SETITEM" as name:
                items = take(stack, 1 if name == "APPEND" else 2)
                fill(stack[-1], items)
            case "APPENDS" | "SETITEMS":
                stack, items = marks.pop(), stack
                fill(stack[-1], items)
            case "GLOBAL":
                if argument not in KNOWN:
                    name = argument.replace(" ", ".")[:80]
                    if name.startswith("torch."):
                        raise ForeignError(f"it holds {name}, which is no dense tensor of a known type")
                    raise ForeignError(f"it asks for {name}, and no code of a file is run")
                stack.append(Name(argument))
            case "BINPERSID":
                storage = describe_storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"its storage {storage.key} is described in two ways")
                stack.append(storage)
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(build(function, arguments))
            case "BUILD":  # the versions of modules, which state_dict() leaves on its dict
                stack.pop()
            case "STOP":
                return stack.pop()
            case name:
                raise ForeignError(f"it has the instruction {name}")
    raise EOFError("it ends within its pickle")


def take(stack: list, count: int) -> list:
    """The last ``count`` of a stack, removed from it; not by a copy of the rest, which may be long."""
    if len(stack) < count:
        raise IndexError("it takes from an empty stack")
    items = stack[-count:]
    del stack[-count:]
    return items


def fill(target: object, items: list) -> None:
    """Append to a list, or set the pairs of a dict, whose keys are text: to hash others could take for ever."""
    if isinstance(target, list):
        target += items
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise TypeError(f"it sets items of one {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise ForeignError(f"it has a key that is no text but one {type(key).__name__}")
        target[key] = value


def build(function: object, arguments: object) -> object:
    """What one of the known functions gives."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise TypeError("it calls what is no function")
    if function == ORDERED_DICT and not arguments:
        return {}
    if function == PARAMETER and arguments and isinstance(arguments[0], Stored):
        return arguments[0]
    if function == TENSOR and len(arguments) in (6, 7) and not any(arguments[6:]):  # such as a sign to be turned
        return describe_tensor(*arguments[:4])
    raise ForeignError(f"it calls {function.replace(' ', '.')} in a way of its own")


def describe_storage(persistent: object) -> Storage:
    """A storage out of torch's persistent id, ("storage", type, key, device, count[, None])."""
    if not isinstance(persistent, tuple) or len(persistent) not in (5, 6) or persistent[5:] not in ((), (None,)):
        raise ForeignError("it has a persistent id that is no storage")
    tag, kind, key, _, numel = persistent[:5]
    sound = tag == "storage" and isinstance(kind, Name) and kind in DTYPES
    if not sound or type(key) is not str or not re.fullmatch(r"[0-9]{1,20}", key) or not is_size(numel):
        raise ForeignError("it has a storage of another kind")
    return Storage(key, DTYPES[kind], numel)


def describe_tensor(storage: object, offset: object, shape: object, stride: object) -> Stored:
    """A tensor, found to lie in its storage and to have no more elements than are stored."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise TypeError("it has a tensor of what is no storage")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS or not all(map(is_size, (offset, *shape, *stride))):
        raise ValueError("it has a tensor of a wrong shape")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise ValueError(f"its storage {storage.key} is smaller than its tensor of the shape {list(shape)}")
    if math.prod(shape) > storage.numel:
        raise ForeignError(f"it has a tensor of more elements than it stores: {list(shape)} of {storage.numel}")
    return Stored(storage, offset if 0 not in shape else 0, torch.Size(shape), stride)


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**40
