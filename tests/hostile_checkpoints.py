"""Checkpoints that are damaged, lie or want to run code, drawn at random from sound ones."""

import io
import json
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from sdr.checkpoint import digest

# what a file of a stranger must not lead to: names of Python's audit events
WATCHED = (
    "open",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "os.remove",
)
NUMBERS = (0, 1, -1, 3, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**12, 1.5, float("nan"), float("inf"), -1e300)
ODD = (*NUMBERS, None, True, "", "3", "a\nb", "\x1b[2J", "x" * 5000, [], [0], [2**62, 0], [2**32, 2**32], {}, {"a": 1})
KINDS = ("F64", "F32", "F16", "BF16", "I64", "I32", "U32", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F4", "X", "", 3)


def pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    """Bits flipped, cut off, bytes put in or doubled."""
    out = bytearray(data)
    kind, place = rng.integers(5), int(rng.integers(len(data)))
    if kind == 0:
        for at in rng.integers(len(out), size=int(rng.integers(1, 9))):
            out[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del out[place:]
    elif kind == 2:
        out[place:place] = rng.bytes(int(rng.integers(1, 64)))
    elif kind == 3:
        del out[place : place + int(rng.integers(1, 64))]
    else:  # near the beginning, where the sizes are
        at = int(rng.integers(min(len(out), 400)))
        out[at : at + 4] = pick(rng, (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", rng.bytes(4)))
    return bytes(out)


def safetensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file with a right hash, whatever it says."""
    return save(dict(tensors), {**metadata, "sha256": digest(tensors, metadata)})


def mutate_weights(rng: np.random.Generator, tensors: Mapping, metadata: Mapping) -> bytes:
    """A safetensors file: damaged, with a header that lies, or sound with other content and a right hash."""
    kind = rng.integers(3)
    if kind == 0:
        return damage(rng, safetensors(tensors, metadata))
    if kind == 1:
        return lie(rng, safetensors(tensors, metadata))
    tensors, metadata = dict(tensors), dict(metadata)
    for _ in range(int(rng.integers(1, 3))):
        pick(rng, (change_tensor, change_metadata))(rng, tensors, metadata)
    return safetensors(tensors, metadata)


def change_tensor(rng: np.random.Generator, tensors: dict, metadata: dict) -> None:
    if not tensors:
        return
    name = pick(rng, sorted(tensors))
    value, kind = tensors[name], rng.integers(7)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        names = ("extra", "", "a\nb", "x" * 3000, "\x1b[2J", "__metadata", "é" * 9, name + "\n")
        tensors[pick(rng, names)] = value.clone()
    elif kind == 2:
        tensors[name] = value.reshape(-1)[: int(rng.integers(value.numel() + 1))].clone()
    elif kind == 3:
        dtypes = (torch.int64, torch.bool, torch.float16, torch.complex64, torch.float8_e4m3fn, torch.float64)
        tensors[name] = value.to(pick(rng, dtypes))
    elif kind == 4 and value.is_floating_point() and value.numel():
        flat = value.clone().reshape(-1)
        flat[int(rng.integers(flat.numel()))] = pick(rng, (float("nan"), float("inf"), -float("inf"), 1e30))
        tensors[name] = flat.reshape(value.shape)
    elif kind == 5:
        tensors[name] = value[None].clone()
    else:
        tensors |= {f"{name}.{i}": torch.zeros(0) for i in range(int(rng.integers(3000)))}


def change_metadata(rng: np.random.Generator, tensors: dict, metadata: dict) -> None:
    if not metadata:
        return
    name, kind = pick(rng, sorted(metadata)), rng.integers(4)
    try:
        content = json.loads(metadata[name])
    except (ValueError, RecursionError):  # of an earlier change
        content = None
    if kind == 0:
        del metadata[name]
    elif kind == 1 or not isinstance(content, dict) or not content:
        texts = ("", "null", "[]", "{", "[" * 50_000, '{"a":' * 50_000, "1" * 9000, "SDRModel", "FTCN", "é\n", "{}")
        metadata[name] = pick(rng, texts)
    elif kind == 2:
        content[pick(rng, sorted(content))] = pick(rng, ODD)
        metadata[name] = json.dumps(content)
    else:
        content[pick(rng, ("extra", "a\nb", "self", "__class__", "x" * 3000))] = pick(rng, ODD)
        metadata[name] = json.dumps(content)


def lie(rng: np.random.Generator, data: bytes) -> bytes:
    """Another header before the same tensors."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = pick(rng, sorted(set(header) - {"__metadata__"}))
    entry, kind = header[name], rng.integers(8)
    if kind == 0:
        wrong = (0, 1, 2**63, 2**64 - 1, 100 << 20, size + 8, size - 8, len(data), len(data) - 8)
        return pick(rng, wrong).to_bytes(8, "little") + data[8:]
    if kind == 1:
        entry["shape"] = pick(
            rng, ([], [2**62], [2**62, 0], [-1], ["3"], [1.5], None, [2**64], [2**32, 2**32], [1] * 999)
        )
    elif kind == 2:
        begin, end = entry["data_offsets"]
        wrong = ([0, end], [begin, begin], [end, begin], [-1, end], [begin, 2**63], [begin + 4, end + 4], [begin], "no")
        entry["data_offsets"] = pick(rng, wrong)
    elif kind == 3:
        entry["dtype"] = pick(rng, KINDS)
    elif kind == 4:  # two tensors on the same bytes
        other = pick(rng, sorted(set(header) - {"__metadata__"}))
        header[name] = header[other]
    elif kind == 5:
        header[name] = pick(rng, (None, [], {}, 1, {**entry, "more": 1}, {"dtype": "F32"}))
    elif kind == 6:
        header["__metadata__"] = pick(
            rng, (None, [], {"format": 1}, {"format": None}, {"format": ["sdr-1"]}, "sdr-1", {})
        )
    text = json.dumps(header)
    if kind == 7:
        deep = '{"a":' * 100_000
        many = "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(20_000)) + "}"
        twice = text[:-1] + f", {json.dumps(name)}: {json.dumps(pick(rng, (entry, header[name], 1)))}}}"
        text = pick(
            rng, (deep, "[" * 100_000, "", "\0" * 64, '"', many, twice, text + " " * 99, text + "\n\t", "1" * 9999)
        )
    return len(text.encode()).to_bytes(8, "little") + text.encode() + body


class Global(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str


class Call(NamedTuple):
    """What a pickle calls, with what."""

    function: object
    arguments: object


class Persistent(NamedTuple):
    """What a pickle leaves to who reads it."""

    content: object


class Raw(NamedTuple):
    """Instructions of a pickle as they are."""

    code: bytes


def encode(value: object) -> bytes:
    """The instructions that make a value, without PROTO and STOP."""
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return encode(value.function) + encode(value.arguments) + b"R"
    if isinstance(value, Persistent):
        return encode(value.content) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(encode(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, bool) or value is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    if isinstance(value, int):
        return b"\x8a" + bytes([16]) + value.to_bytes(16, "little", signed=True)
    if isinstance(value, float):
        return b"G" + np.array(value, ">f8").tobytes()
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, Call]:
    """A state_dict as torch.save has it in its pickle; each tensor in a storage of its own, 0, 1, .."""
    kinds = {torch.float32: "FloatStorage", torch.int64: "LongStorage"}
    out = {}
    for number, (name, value) in enumerate(tensors.items()):
        kind = Global("torch", kinds[value.dtype])
        storage = Persistent(("storage", kind, str(number), "cpu", value.numel()))
        shape = (tuple(value.shape), tuple(value.stride()))
        hooks = Call(Global("collections", "OrderedDict"), ())
        out[name] = Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, *shape, False, hooks))
    return out


EVIL = (  # what runs code, takes all memory or opens files in one loader or another
    ("os", "system", ("touch canary",)),
    ("builtins", "eval", ("open('canary', 'w')",)),
    ("builtins", "exec", ("open('canary', 'w')",)),
    ("builtins", "open", ("canary", "w")),
    ("builtins", "getattr", ("a", "join")),
    ("builtins", "bytearray", (10**12,)),
    ("builtins", "__import__", ("antigravity",)),
    ("subprocess", "Popen", (["touch", "canary"],)),
    ("torch", "load", ("canary",)),
    ("torch.jit", "load", ("canary",)),
    ("torch.hub", "load", ("a/b", "c")),
    ("torch.storage", "_load_from_bytes", ("canary",)),
    ("torch._utils", "_rebuild_sparse_tensor", (0, (0, 0, (10**6, 10**6)))),
    ("torch._utils", "_rebuild_qtensor", (None, 0, (10**12,), (1,), (0, 1.0, 0), False, None)),
    ("torch._utils", "_rebuild_meta_tensor_no_storage", (0, (10**12,), (1,), False)),
    ("torch._utils", "_rebuild_wrapper_subclass", (0, 0, (10**12,), (1,), 0, 0, 0, False)),
    ("torch._tensor", "_rebuild_from_type_v2", (0, 0, (), {})),
    ("_codecs", "encode", ("canary", "zip")),
    ("numpy.core.multiarray", "_reconstruct", (0, (10**12,), "b")),
    ("collections", "Counter", ("canary",)),
    ("torch", "zeros", (10**12,)),
    ("torch.serialization", "_get_layout", ("x",)),
)
DEEP = b"N" + b"\x85" * 20_000
DOUBLED = b"N\x85" + b"".join(
    b"q%ch%c\x86" % (i, i) for i in range(120)
)  # 2^120 when it is hashed: (x, x) of (x, x) ..
PROGRAMS = (
    b"}" + DEEP + b"Ns",
    b"}" + DOUBLED + b"Ns",
    b"}N" + b"r\xff\xff\xff\xff",
    b"X\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 8,
    b"(" * 200_000,
    b"]" * 200_000,
    b"0" * 99,
    b"u",
    b"}h\x07",
    b"}Nb",
    b"\x8b\xff\xff\xff\x7f",
    b"I" + b"9" * 100_000 + b"\n",
    b"cos\nsystem\nX\x0c\0\0\0touch canary\x85R",
    b"(X\x0c\0\0\0touch canaryios\nsystem\n",
    b"(cos\nsystem\nX\x0c\0\0\0touch canaryo",
    b"X\x02\0\0\0osX\x06\0\0\0system\x93X\x0c\0\0\0touch canary\x85R",
    b"Pcanary\n",
    b"\x82\x01",
)


def mutate_program(rng: np.random.Generator, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The pickle of a state_dict in which something is as it should not be."""
    content = describe(tensors)
    name = pick(rng, sorted(content))
    storage, offset, shape, stride, grad, hooks = content[name].arguments
    kind = rng.integers(9)
    if kind == 0:
        content[name] = Call(Global(*(evil := pick(rng, EVIL))[:2]), evil[2])
    elif kind == 1:
        return b"\x80\x02" + pick(rng, PROGRAMS) + b"."
    elif kind == 2:  # far more elements than are stored
        shape, stride = pick(
            rng, (((10**12,), (0,)), ((10**6, 10**6), (0, 0)), ((2**40, 0), (1, 1)), ((1,) * 99, (1,) * 99))
        )
    elif kind == 3:
        offset = pick(rng, NUMBERS)
    elif kind == 4:
        shape = tuple(pick(rng, ODD) if rng.random() < 0.5 else n for n in shape)
    elif kind == 5:
        stride = tuple(pick(rng, NUMBERS) for _ in stride)
    elif kind == 6:
        parts = list(storage.content)
        parts[int(rng.integers(5))] = pick(
            rng, (*NUMBERS, "storage", "../0", "/etc/passwd", "0", "1", Global("os", "system"), ())
        )
        storage = Persistent(
            pick(rng, (tuple(parts), tuple(parts), (*parts, None), (*parts, ("0", 0, 1)), parts, "0", None))
        )
    elif kind == 7:
        content[pick(rng, ("extra", "a\nb", 3, None, (1, 2), name + ".x"))] = pick(rng, (content[name], 3, {}, [], "x"))
    else:
        del content[name]
        content = pick(rng, (content, content, [content], {"state_dict": content}, None, 3, tuple(content.values())))
    if isinstance(content, dict) and 2 <= kind <= 6:
        content[name] = Call(content[name].function, (storage, offset, shape, stride, grad, hooks))
    return b"\x80\x02" + encode(content) + b"."


def mutate_torch_file(rng: np.random.Generator, tensors: Mapping[str, torch.Tensor], *, legacy: bool) -> bytes:
    """A file of torch.save: damaged, another object's, with a pickle or a zip directory that lies."""
    kind = rng.integers(4)
    if kind == 0:
        return damage(rng, saved(tensors, legacy=legacy))
    if kind == 1:
        return saved(odd_object(rng, tensors), legacy=legacy)
    program = mutate_program(rng, tensors)
    if not legacy:
        return pack(program, tensors, rng if kind == 2 else None)
    head = b"".join(b"\x80\x02" + encode(v) + b"." for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    keys = [str(number) for number in range(len(tensors))]
    data = b"".join(v.numel().to_bytes(8, "little") + v.contiguous().numpy().tobytes() for v in tensors.values())
    if kind == 2:
        program, keys = (
            b"\x80\x02" + encode(describe(tensors)) + b".",
            pick(rng, (keys[::-1], keys[1:], keys * 2, [3], {}, keys)),
        )
        data = pick(rng, (data, b"\xff" * 8 + data[8:], data[:-9]))
    return head + program + b"\x80\x02" + encode(keys) + b"." + data


def saved(value: object, *, legacy: bool) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def odd_object(rng: np.random.Generator, tensors: Mapping[str, torch.Tensor]) -> object:
    """Something that torch.save can write, and that is no sound state_dict."""
    name = pick(rng, sorted(tensors))
    value = tensors[name]
    noted = torch.nn.Parameter(value.float())
    noted.note = 3  # which is saved with it
    others = (
        value.new_zeros(1).expand(10**12),
        value.new_zeros(()).expand(value.shape),
        torch.imag(torch.tensor([1 + 2j, 3 - 4j]).conj()),
        noted,
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(1, device="meta"),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2).to(torch.float8_e4m3fn),
        torch.full_like(value, float("nan")) if value.is_floating_point() else value.float(),
        value.long() if value.is_floating_point() else value.double(),
        value[None],
        torch.nn.Parameter(value.float()),
        next(iter(tensors.values())),
        {"a": value},
        [value],
        {1, 2},
        bytearray(9),
        np.zeros(3),
        torch.float32,
        torch.Size([3]),
        3,
    )
    return dict(tensors) | {name: pick(rng, others)}


def pack(program: bytes, tensors: Mapping[str, torch.Tensor], rng: np.random.Generator | None) -> bytes:
    """The zip of a pickle and its storages; with ``rng`` something of the zip itself is as it should not be."""
    members = {"x/data.pkl": program, "x/byteorder": b"little"}
    members |= {f"x/data/{i}": v.contiguous().numpy().tobytes() for i, v in enumerate(tensors.values())}
    kind = None if rng is None else rng.integers(8)
    if kind is not None:
        members["x/data.pkl"] = b"\x80\x02" + encode(describe(tensors)) + b"."
    if kind == 0:
        members["x/data/0"] = bytes(64 << 20)
    elif kind == 1:
        members[pick(rng, ("/etc/passwd", "../../canary", "y/data.pkl", "x/../x/data.pkl", "a\nb"))] = b"x"
    elif kind == 2:
        del members[pick(rng, sorted(members))]
    elif kind == 3:
        members["x/byteorder"] = pick(rng, (b"big", b"", b"little" * 99))
    elif kind == 4:
        members |= {f"x/none/{i}": b"" for i in range(30_000)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if kind in (0, 5) else zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if kind == 6:  # a second member of one name; zipfile would warn of it
            archive.filelist.append(archive.filelist[int(rng.integers(len(members)))])
    data = bytearray(buffer.getvalue())
    if kind == 7:  # sizes and places in the directory
        entry = data.rindex(b"PK\x01\x02")
        at = entry + pick(rng, (8, 10, 16, 20, 24, 42))
        data[at : at + 4] = pick(rng, (b"\xff" * 4, b"\xfe\xff\xff\xff", b"\0\0\0\x10", b"\0" * 4))
    return bytes(data)
