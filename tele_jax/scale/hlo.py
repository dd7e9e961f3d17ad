"""The text of a compiled XLA program as instructions: shapes, operands, trip counts of loops, groups of devices.

    %dot.3 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}

Only what costs.py needs is understood. An array whose layout ends in S(n) lies in memory space n: 0, which is not
written, is HBM, 1 the fast memory on the chip, 5 the host.
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
_END = re.compile(r"^\}(, [a-z_]+=.*)?$")  # what runs on a SparseCore says so behind its brace
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*index=\d+\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: element type, dimensions, memory space."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def bytes(self) -> int:
        """Bytes of its elements; the padding of tiles is not counted."""
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
    """One instruction. `attributes` is the rest of its line, `literal` what stands in the parentheses."""

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


def parse(text: str) -> Module:
    """Reads the text that jax.stages.Compiled.as_text() gives.

    Raises:
      ValueError: there is no entry computation: the text could not be read back, as with a libtpu that jax is not for.
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
    """Lines, with an instruction that is broken by newlines inside a string put together again."""
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
    """Where the parenthesis that opens at `start` is closed, one past."""
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
    """A constant may hold strings with parentheses; what follows it starts with ", " or nothing."""
    match = re.search(r"\)(?=, [a-z_]+=|$)", rest[opens:])
    return opens + match.end()


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape or of a tuple of shapes, in order."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else HBM))
    return tuple(found)


# ---------------------------------------------------------------------------------------------------- loops and groups


def trip_count(module: Module, loop: Instruction, within: Computation) -> int:
    """How often a while loop runs, read from its condition: a counter compared with a constant.

    Raises:
      ValueError: the condition is of another form, so that the loop's length is not known when compiling.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called("condition")]
    compare = condition.root
    while compare.opcode in ("fusion", "call", "bitcast", "copy"):
        if compare.opcode == "fusion":
            condition = module.computations[compare.called("calls")]
            compare = condition.root
        else:
            compare = condition.instructions[compare.operands[0]]
    bound = _constants(module.computations[loop.called("condition")], module)
    direction = compare.attribute("direction")
    start = _start(module, loop, within)
    if compare.opcode != "compare" or direction not in ("LT", "LE", "NE", "GT", "GE") or len(bound) != 1:
        raise ValueError(f"the length of the loop {loop.name} is not in the compiled program")
    count = bound[0] - start if direction in ("LT", "NE") else bound[0] - start + 1
    return abs(count) if direction in ("GT", "GE") else count


def _constants(condition: Computation, module: Module) -> list[int]:
    """The integer constants that a condition compares with, those inside its fusions included."""
    found = []
    for instruction in condition.instructions.values():
        if instruction.opcode == "constant" and instruction.shape[0].dtype in ("s32", "u32", "s64", "u64"):
            found.append(int(instruction.literal))
        elif instruction.opcode == "fusion":
            found += _constants(module.computations[instruction.called("calls")], module)
    return found


def _start(module: Module, loop: Instruction, within: Computation) -> int:
    """What the counter starts from: the element of the initial tuple that the condition reads, if it is a constant."""
    condition = module.computations[loop.called("condition")]
    reads = [i for i in condition.instructions.values() if i.opcode == "get-tuple-element"]
    initial = within.instructions[loop.operands[0]]
    if len(reads) != 1 or initial.opcode != "tuple":
        return 0
    value = within.instructions[initial.operands[int(reads[0].attribute("index"))]]
    while value.opcode in ("copy", "bitcast") and value.operands:
        value = within.instructions[value.operands[0]]
    return int(value.literal) if value.opcode == "constant" else 0


def device_groups(instruction: Instruction) -> np.ndarray:
    """Which devices (positions in the mesh, flat) a collective connects: int[groups, members].

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
    """How many slices a transfer between them connects: two where it names pairs, else those before the x.

    {1,2}x{0:3} and {1:4}x{0:15}: slices 1 and 2, or 1 to 4, and devices 0 to 3, or 0 to 15, of each.
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
