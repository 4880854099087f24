"""Reads Triton's intermediate code and finds pointer offsets whose arithmetic could leave 32 bits.

An offset must be 64 bits wide, and so must every sum and product on the way to it, except where constants bound the
32-bit result: a column of a tile among a fixed number of channels is exact. Bounds follow from constants, ranges,
remainders and loop limits; a number that the kernel is passed has none. One exception: what divides a program id counts
programs, and CUDA starts at most 2^31 - 1 of them.
"""

import re
from typing import NamedTuple

VALUE = r"%[\w$.-]+(?:#\d+)?"
PROGRAM_ID = "tt.get_program_id"
SAME_VALUES = {
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
    "arith.extsi",
    "arith.index_cast",
}
ARITHMETIC = {"arith.addi", "arith.subi", "arith.muli", "arith.shli"}
DIVISIONS = {"arith.divsi", "arith.remsi"}
LEAVES = {"arith.cmpi", "tt.load", PROGRAM_ID}  # their operands are no part of an offset's arithmetic

Bounds = tuple[int, int]


class Op(NamedTuple):
    name: str
    operands: list[str]
    text: str
    width: int  # bits of an element of the result; 64 for what is no integer, and so no offset


def narrow_offsets(ttir: str) -> list[str]:
    """Every offset that is not 64-bit, and every narrower sum or product in one that could overflow, as its code."""
    code = Code(ttir)
    problems = []
    for op in list(code.ops.values()):
        if op.name == "tt.addptr":
            width = element_width(op.text)
            if width < 64 and code.bounds(op.operands[1]) == full(width):
                problems.append(f"offset is not 64-bit: {op.text}")
            problems += [f"offset may overflow: {text}" for text in code.overflows(op.operands[1])]
    return list(dict.fromkeys(problems))


def element_width(kind: str) -> int:
    """Bits of the integers of a type, or of the last type in a line: i32, tensor<128x64xi64>."""
    match = re.search(r"(?:\b|x)i(\d+)>?$", kind)
    return int(match[1]) if match else 64


def full(width: int) -> Bounds:
    return -(1 << (width - 1)), (1 << (width - 1)) - 1


def within(bounds: Bounds, width: int) -> bool:
    low, high = full(width)
    return low <= bounds[0] and bounds[1] <= high


class Code:
    """A function in static single assignment form: the operation that defines each value, and bounds of values."""

    def __init__(self, ttir: str) -> None:
        self.ops: dict[str, Op] = {}
        self._bounds: dict[str, Bounds] = {}
        regions: list[list[Op]] = []  # of each open brace, the operations that its yield feeds
        for line in ttir.splitlines():
            text = re.sub(r" ?loc\((?:[^()]|\([^()]*\))*\)", "", line).strip()
            if text.startswith("#"):
                continue
            closed = regions.pop() if text.startswith("}") else []
            fed = self._read(text, regions[-1] if regions else [])
            if text.endswith("{"):
                regions.append(fed or closed)  # closed: the else of an if

    def _read(self, text: str, yields_to: list[Op]) -> list[Op]:
        """Record one line; returns the operations that the yield of a region that it opens will feed."""
        match = re.match(rf'(?:({VALUE})(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)', text)
        if not match:
            return []
        result, count, name = match.groups()
        results = [f"{result}#{i}" for i in range(int(count))] if count else [result] if result else []
        operands = re.findall(VALUE, text[match.end() :])
        if name == "tt.func":
            for argument, kind in re.findall(rf"({VALUE}): ([^ ,)]+)", text):
                self.ops[argument] = Op("argument", [], text, element_width(kind))
        elif name == "scf.yield":
            for op, value in zip(yields_to, operands, strict=True):
                op.operands.append(value)
        elif name in ("scf.while", "tt.call"):
            raise ValueError(f"the audit cannot follow an offset through {name}: {text}")
        elif name == "scf.for":
            return self._read_loop(text, results, operands)
        elif name == "scf.if":
            fed = [Op("either", [], text, 64) for _ in results]
            self.ops.update(zip(results, fed, strict=True))
            return fed
        else:
            self.ops.update({value: Op(name, operands, text, element_width(text)) for value in results})
        return []

    def _read_loop(self, text: str, results: list[str], operands: list[str]) -> list[Op]:
        counter, first, end, _step, *carried = operands
        self.ops[counter] = Op("counter", [first, end], text, int(re.search(r": i(\d+) \{$", text)[1]))
        fed = [Op("carried", [initial], text, 64) for initial in carried[1::2]]
        self.ops.update(zip(results, fed, strict=True))
        self.ops.update(zip(carried[::2], fed, strict=True))
        return fed

    def overflows(self, value: str) -> list[str]:
        """The narrow sums and products that ``value`` is computed from and that nothing bounds."""
        found, seen, waiting = [], set(), [value]
        while waiting:
            value = waiting.pop()
            if value in seen or value not in self.ops:
                continue
            seen.add(value)
            op = self.ops[value]
            if op.name in ARITHMETIC and op.width < 64 and not within(self._exact(op), op.width):
                found.append(op.text)
            waiting += self._followed(op)
        return found

    def _followed(self, op: Op) -> list[str]:
        if op.name in LEAVES:
            return []
        counts_programs = op.name in DIVISIONS and self._reaches_program_id(op.operands[0])
        return op.operands[:1] if counts_programs or op.name == "counter" else op.operands

    def _reaches_program_id(self, value: str) -> bool:
        while value in self.ops and self.ops[value].operands:
            value = self.ops[value].operands[0]
        return value in self.ops and self.ops[value].name == PROGRAM_ID

    def bounds(self, value: str) -> Bounds:
        """The least and the largest that an integer can be, as far as constants tell."""
        if value not in self._bounds:
            op = self.ops.get(value, Op("unknown", [], "", 64))
            self._bounds[value] = full(op.width)  # what a value that depends on itself is taken for
            bounds = self._bounds_of(op)
            self._bounds[value] = bounds if within(bounds, op.width) else full(op.width)
        return self._bounds[value]

    def _bounds_of(self, op: Op) -> Bounds:
        if op.name == "arith.constant" and (match := re.search(r"(?:constant|dense<)\s*(-?\d+)\b(?!\.)", op.text)):
            return int(match[1]), int(match[1])
        if op.name == "tt.make_range":
            start, end = (int(re.search(rf"{name} = (\d+)", op.text)[1]) for name in ("start", "end"))
            return start, end - 1
        if op.name in (PROGRAM_ID, "tt.get_num_programs"):
            return 0, full(32)[1]
        if op.name in SAME_VALUES:
            return self.bounds(op.operands[0])
        if op.name in ARITHMETIC:
            return self._exact(op)
        if op.name in DIVISIONS:
            return self._quotient(op)
        if op.name == "counter":
            (low, _), (_, end) = (self.bounds(value) for value in op.operands)
            return low, max(low, end - 1)
        if op.name in ("arith.select", "either", "arith.minsi", "arith.maxsi"):
            lows, highs = zip(*(self.bounds(value) for value in op.operands[op.name == "arith.select" :]), strict=True)
            pick = {"arith.minsi": (min, min), "arith.maxsi": (max, max)}.get(op.name, (min, max))
            return pick[0](lows), pick[1](highs)
        return full(op.width)

    def _exact(self, op: Op) -> Bounds:
        """What a sum or product would be with any number of bits."""
        a, b = (self.bounds(value) for value in op.operands)
        if op.name == "arith.addi":
            return a[0] + b[0], a[1] + b[1]
        if op.name == "arith.subi":
            return a[0] - b[1], a[1] - b[0]
        if op.name == "arith.shli":
            b = (1, 1 << min(max(b[1], 0), 64))
        products = [x * y for x in a for y in b]
        return min(products), max(products)

    def _quotient(self, op: Op) -> Bounds:
        """Of a division or its remainder, both rounded to zero: no larger than the dividend, and of its sign."""
        (low, high), divisor = (self.bounds(value) for value in op.operands)
        if op.name == "arith.remsi":
            largest = max(abs(divisor[0]), abs(divisor[1])) - 1
            return max(min(low, 0), -largest), min(max(high, 0), largest)
        smallest = max(divisor[0], 1)
        if divisor[0] < 0:  # the sign may turn
            largest = max(abs(low), abs(high))
            return -largest, largest
        return -(max(-low, 0) // smallest), max(high, 0) // smallest
