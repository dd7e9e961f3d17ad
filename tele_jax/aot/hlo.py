"""Reads the text of a compiled XLA program as instructions: shapes, operands, trip counts of loops, device groups.

    %dot.3 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}

The parser understands as much as counts.py needs. An array whose layout ends in S(n) lies in memory space n: 0, which
is not written, is HBM, 1 the fast memory on the chip, 5 the host.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

HBM, HOST = 0, 5

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_END = re.compile(r"^\}(, [a-z_]+=.*)?$")  # a computation on a SparseCore says so behind its brace
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*index=\d+\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape, in a memory space."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def bytes(self) -> int:
        """Bytes of the elements; the padding of tiles is not counted."""
        return int(math.prod(self.dims) * _element_bytes(self.dtype))


@functools.lru_cache(maxsize=64)
def _element_bytes(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)  # bf16, f32, s8, f8e4m3fn, c64
    if bits is None:
        raise ValueError(f"unknown element type {dtype!r} in the program")
    return int(bits[0]) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. `literal` is the text in its parentheses, `attributes` the rest of its line."""

    name: str
    opcode: str
    shape: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.shape)

    def attribute(self, key: str) -> str | None:
        """The text of key=value, where value is a name, a number, or something in braces."""
        match = re.search(rf"[ ,]{key}=(\{{[^{{}}]*\}}|[^ ,{{]+)", self.attributes)
        return match and match[1]

    def called(self, key: str) -> str | None:
        value = self.attribute(key)
        return value and value.lstrip("%")


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str

    def called(self, i: Instruction, *keys: str) -> Computation:
        """The computation that an instruction calls by the first of these attributes that it has."""
        return self.computations[next(name for key in keys if (name := i.called(key)))]


def parse(text: str) -> Module:
    """Reads the text that jax.stages.Compiled.as_text() gives.

    Raises:
      ValueError: the text has no entry computation, as with a libtpu that does not belong to this jax.
    """
    computations, entry, name, instructions = {}, None, None, {}
    for line in _logical_lines(text):
        if name is None:
            head = _HEAD.match(line)
            if head:
                name, instructions = head[1], {}
                entry = name if line.startswith("ENTRY") else entry
        elif _END.match(line):
            computations[name] = Computation(name, instructions)
            name = None
        elif " = " in line:
            instruction = _instruction(line.strip())
            instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the compiled program has no readable text; install the libtpu that this jax names")
    return Module(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
    """Yields lines; an instruction that newlines inside a string have broken is put together again."""
    held = ""
    for line in text.splitlines():
        starts = line.startswith(("  %", "  ROOT %", "%", "ENTRY ", "HloModule")) or bool(_END.match(line))
        if starts and held:
            yield held
            held = ""
        held += line if starts or held else ""
    if held:
        yield held


def _balanced(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _instruction(line: str) -> Instruction:
    line = _COMMENT.sub("", line)
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    opens = rest.index("(", end)
    closes = _balanced(rest, opens) if rest[end:opens].strip() != "constant" else _constant_end(rest, opens)
    literal = rest[opens + 1 : closes - 1]
    opcode = rest[end:opens].strip()
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(literal))
    return Instruction(name.lstrip("%"), opcode, arrays(rest[:end]), operands, literal, rest[closes:], is_root)


def _constant_end(rest: str, opens: int) -> int:
    """The position after a constant, which may hold strings with parentheses: then ", " follows, or nothing."""
    return opens + next(re.finditer(r"\)(?=, [a-z_]+=|$)", rest[opens:])).end()


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape or of a tuple of shapes, in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(found)


def trip_count(module: Module, loop: Instruction, within: Computation) -> int:
    """The number of times that a while loop runs, from its counter's start, bound and stride.

    The compiler widens some loops, so that an iteration does the work of two and the counter moves by two.

    Raises:
      ValueError: the loop is of another form, so that its length is not known when compiling.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    unknown = ValueError(f"the length of the loop {loop.name} is not in the compiled program")
    carried = _Carried(module, loop, within)
    found = carried.comparison()
    if found is None:
        raise unknown
    index, direction, bound = found
    start, stride = carried.start(index), carried.stride(index)
    if start is None or not stride:
        raise unknown
    if stride < 0:  # counts down: the same loop with all signs turned
        start, stride, bound = -start, -stride, -bound
        direction = _MIRRORED[direction]
    distance = bound - start
    if direction == "LT" or (direction == "NE" and distance % stride == 0):
        return max(-(-distance // stride), 0)
    if direction == "LE":
        return max(distance // stride + 1, 0)
    raise unknown  # it would not end, or only after the counter has overflowed


_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}


@dataclasses.dataclass(frozen=True)
class _Linear:
    """A value in a loop: `constant`, plus element `index` of the loop's state unless that is None."""

    constant: int
    index: int | None = None


@dataclasses.dataclass(frozen=True)
class _Scope:
    """A computation that a loop runs. `arguments` are the values of the parameters of a fused or called one; the body
    and the condition themselves have None, and the loop's state as their only parameter.
    """

    module: Module
    computation: Computation
    arguments: Sequence[_Linear | None] | None = None

    def inside(self, i: Instruction) -> "_Scope":
        """The scope of the computation that a fusion or call runs."""
        called = self.module.called(i, "calls", "to_apply")
        return _Scope(self.module, called, [self.linear(operand) for operand in i.operands])

    def linear(self, name: str) -> _Linear | None:
        """The integer that an instruction gives, in terms of the loop's state; None for a value of another form."""
        i = self.computation.instructions[name]
        if i.opcode == "constant":
            integer = i.shape[0].dtype in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64") and not i.shape[0].dims
            return _Linear(int(i.literal)) if integer else None
        if i.opcode == "parameter":
            return self.arguments[int(i.literal)] if self.arguments is not None else None
        if i.opcode in ("copy", "bitcast", "convert"):
            return self.linear(i.operands[0])
        if i.opcode == "get-tuple-element":
            return self._element(self.computation.instructions[i.operands[0]], int(i.attribute("index") or ""))
        if i.opcode in ("add", "subtract"):
            left, right = (self.linear(operand) for operand in i.operands)
            if left is None or right is None:
                return None
            if right.index is not None and (i.opcode == "subtract" or left.index is not None):
                return None
            sign = -1 if i.opcode == "subtract" else 1
            return _Linear(left.constant + sign * right.constant, right.index if left.index is None else left.index)
        if i.opcode in ("fusion", "call"):
            inner = self.inside(i)
            return inner.linear(inner.computation.root.name)
        return None

    def _element(self, i: Instruction, index: int) -> _Linear | None:
        """One element of the tuple that an instruction gives."""
        if i.opcode == "parameter" and self.arguments is None:
            return _Linear(0, index)
        if i.opcode not in ("fusion", "call"):
            return None
        inner = self.inside(i)
        root = inner.computation.root
        return inner.linear(root.operands[index]) if root.opcode == "tuple" else None


@dataclasses.dataclass(frozen=True)
class _Carried:
    """The integers that a loop carries from one iteration to the next."""

    module: Module
    loop: Instruction
    within: Computation

    def start(self, index: int) -> int | None:
        """The element of the initial state where that is a constant, else None."""
        value = self._linear(self.within, self.within.instructions[self.loop.operands[0]], index)
        return None if value is None or value.index is not None else value.constant

    def stride(self, index: int) -> int | None:
        """The constant that the body adds to the element: 0 where the body hands it on unchanged, None if unknown."""
        body = self.module.called(self.loop, "body")
        value = self._linear(body, body.root, index)
        return value.constant if value is not None and value.index == index else None

    def _linear(self, computation: Computation, state: Instruction, index: int) -> _Linear | None:
        return _Scope(self.module, computation).linear(state.operands[index]) if state.opcode == "tuple" else None

    def constant(self, value: _Linear | None) -> int | None:
        """The number behind a value that never changes: a constant, or an element that the body only hands on."""
        if value is None or value.index is None:
            return value and value.constant
        start = self.start(value.index)
        return None if start is None or self.stride(value.index) != 0 else start + value.constant

    def comparison(self) -> tuple[int, str, int] | None:
        """Reads the condition `counter direction bound` as (counter's index in the loop's state, direction, bound)."""
        scope = _Scope(self.module, self.module.called(self.loop, "condition"))
        compare = scope.computation.root
        while compare.opcode in ("fusion", "call", "bitcast", "copy"):
            if compare.opcode in ("fusion", "call"):
                scope = scope.inside(compare)
                compare = scope.computation.root
            else:
                compare = scope.computation.instructions[compare.operands[0]]
        direction = compare.attribute("direction")
        if compare.opcode != "compare" or direction not in _MIRRORED:
            return None
        left, right = (scope.linear(name) for name in compare.operands)
        for counter, other, turned in ((left, right, direction), (right, left, _MIRRORED[direction])):
            bound = self.constant(other)
            if counter is not None and counter.index is not None and bound is not None and self.stride(counter.index):
                return counter.index, turned, bound - counter.constant
        return None


def device_groups(instruction: Instruction) -> np.ndarray:
    """Groups of devices (flat positions in the mesh) that a collective connects: int[groups, members].

    Three spellings: {{0,2},{1,3}}; [2,2]<=[2,2]T(1,0), an iota that is transposed; mesh['a'=2,'b'=2] {'b'}, where the
    named axes vary within a group, of devices in order or, before {'b'}, of device_ids=([2,2]T(1,0)) or (0,2,1,3).
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    if pairs:
        found = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return np.array([pair for pair in found if pair[0] != pair[1]] or found[:1] or [(0, 0)])
    explicit = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    if explicit:
        groups = [[int(d) for d in group.split(",") if d] for group in re.findall(r"\{([\d,]*)\}", explicit[1])]
        return np.array(groups) if groups else np.zeros((0, 0), int)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _iota(_ints(iota[1]), _ints(iota[2]), _ints(iota[3]) if iota[3] else None)
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        axes = list(sizes)
        inner = re.findall(r"'([^']+)'", mesh[3])
        order = [axes.index(a) for a in axes if a not in inner] + [axes.index(a) for a in inner]
        members = math.prod(sizes[a] for a in inner)
        devices = _mesh_devices(mesh[2], tuple(sizes.values()))
        return devices.transpose(order).reshape(-1, members)
    raise ValueError(f"{instruction.name}: its groups of devices are written in a form that is not known: {text[:200]}")


def slices_of(transfer: Instruction) -> int:
    """The number of slices that a transfer between them connects: two where it names pairs, else those before the x.

    {1,2}x{0:3} means slices 1 and 2 and devices 0 to 3 of each, {1:4}x{0:15} slices 1 to 4 and devices 0 to 15.
    """
    listed = re.search(r'_xla_megascale_target="?\{([\d,:]+)\}x', transfer.attributes)
    if listed is None:
        return 2
    ends = [[int(end) for end in part.split(":")] for part in listed[1].split(",")]
    return sum(part[-1] - part[0] + 1 for part in ends)


def _mesh_devices(ids: str | None, shape: tuple[int, ...]) -> np.ndarray:
    iota = ids and re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)
    if iota:
        return _iota(shape, _ints(iota[1]), _ints(iota[2]) if iota[2] else None)
    return (np.array(_ints(ids)) if ids else np.arange(math.prod(shape))).reshape(shape)


def _iota(shape: Sequence[int], dims: Sequence[int], order: Sequence[int] | None) -> np.ndarray:
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers if order is None else numbers.transpose(order)).reshape(shape)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
