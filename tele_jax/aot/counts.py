"""Counts of one execution of a compiled program on one device: FLOPs, bytes of HBM, collectives, loops multiplied out.

    counts = count(hlo.parse(compiled.as_text()))

XLA's own analysis counts the body of a loop once, and so takes a model of 64 layers for one layer.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

from tele_jax.aot import flops, hlo
from tele_jax.aot.hlo import Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Opcodes that move nothing: they stand for a value that another instruction has made, or name one.
_NAMES = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id")
_DONE = ("copy", "slice", "async", "call", "all-gather", "all-reduce", "collective-permute", "send", "recv")
_FREE = frozenset(
    (*_NAMES, "opt-barrier", "optimization-barrier", "domain", "iota", "async-update", *(f"{op}-done" for op in _DONE))
)
_CALLS = ("while", "conditional", "call", "async-start", "call-start")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation; bytes are those of one device and one execution.

    group: positions in the mesh of the devices that the first group connects. source: the operation of the model that
    asked for it. channel: its number in the program. slices: how many slices it connects over the network between them;
    each device then exchanges with those in its place in the other slices, and group only numbers the slices.
    overlapped: the schedule lets other work run meanwhile; otherwise the device waits.
    """

    kind: str
    times: float
    operand_bytes: int
    result_bytes: int
    group: tuple[int, ...]
    source: str
    channel: str | None
    slices: int = 1
    overlapped: bool = False

    @property
    def received_bytes(self) -> float:
        """Bytes that each device receives in one execution, by the algorithm that receives least (a ring)."""
        n = max(len(self.group), 1)
        if self.kind == "collective-permute":
            return self.result_bytes if n > 1 else 0.0
        if self.kind == "all-reduce":
            return 2 * self.result_bytes * (n - 1) / n
        of = self.operand_bytes if self.kind == "reduce-scatter" else self.result_bytes
        return of * (n - 1) / n


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of one device and one execution.

    work: (FLOPs, HBM bytes, times) of the instructions that run one after another, as the schedule has them. Copies
    and collectives that the schedule overlaps with others are not among them.
    """

    matmul_flops: float  # of dots and convolutions
    kernel_flops: float  # of attention kernels
    hbm_bytes: float  # read and written
    host_bytes: float  # moved to and from the host's memory
    saved_bytes: int  # kept by the loop over layers for the backward pass
    collectives: tuple[Collective, ...]
    loops: tuple[tuple[str, int], ...]
    work: tuple[tuple[float, float, float], ...] = ()
    padding_flops: float = 0.0  # that the matrix units spend on the padding of dimensions narrower than they are

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.kernel_flops

    @property
    def collective_bytes(self) -> float:
        """Sum of the results of all collectives, the measure by which programs are compared."""
        return sum(c.times * c.result_bytes for c in self.collectives)

    @property
    def received_bytes(self) -> float:
        """Sum of what the device receives in all collectives."""
        return sum(c.times * c.received_bytes for c in self.collectives)


def count(module: Module, matrix_unit: int = 1) -> Counts:
    """Counts a parsed program. matrix_unit: rows and columns of a matrix unit, for the padding; 1: none is counted.

    Raises:
      ValueError: a loop whose length is not in the program.
    """
    counter = _Counter(module, matrix_unit)
    total = counter.computation(module.entry)
    return Counts(
        matmul_flops=total.matmul,
        kernel_flops=total.kernel,
        hbm_bytes=total.hbm,
        host_bytes=total.host,
        saved_bytes=_saved(module),
        collectives=tuple(sorted(total.collectives.values(), key=lambda c: -c.times * c.result_bytes)),
        loops=tuple(counter.loops),
        work=tuple((done, size, times) for (done, size), times in total.work.items()),
        padding_flops=total.padding,
    )


@dataclasses.dataclass
class _Sum:
    matmul: float = 0.0
    kernel: float = 0.0
    padding: float = 0.0
    hbm: float = 0.0
    host: float = 0.0
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    work: dict[tuple[float, float], float] = dataclasses.field(default_factory=dict)  # (FLOPs, HBM bytes) -> times

    def add(self, other: "_Sum", times: float = 1.0, *, own: str = "") -> None:
        """Adds `other`, executed `times` times. `own` is a prefix that keeps the names of its collectives apart."""
        for name in ("matmul", "kernel", "padding", "hbm", "host"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for piece, count in other.work.items():
            self.work[piece] = self.work.get(piece, 0.0) + times * count
        for key, collective in other.collectives.items():
            new = dataclasses.replace(collective, times=collective.times * times)
            old = self.collectives.get(own + key)
            if old is None or old.times * old.result_bytes < new.times * new.result_bytes:
                self.collectives[own + key] = new


def _overlapped(i: Instruction) -> bool:
    """Tells whether an instruction only starts something that runs beside the next ones until another ends it."""
    return i.opcode.endswith("-start") or i.opcode in ("send", "recv")


def _by_channel(collectives: Mapping[str, Collective]) -> dict[str, Collective]:
    """Names collectives by their work: one that overlaps with many fusions is written in each of them, and counts once.

    Channels alone do not tell them apart: those that shard_map wrote may all have the same.
    """
    return {f"{c.kind}/{c.channel}/{c.source}/{c.group}/{c.operand_bytes}": c for c in collectives.values()}


class _Counter:
    """Walks the computations of a module; each is counted once and used wherever it is called."""

    def __init__(self, module: Module, matrix_unit: int):
        self.module, self.loops, self.matrix_unit = module, [], matrix_unit
        self.computation = functools.lru_cache(maxsize=None)(self._computation)

    def _computation(self, name: str) -> _Sum:
        computation, total = self.module.computations[name], _Sum()
        for instruction in computation.instructions.values():
            if instruction.opcode in _CALLS:
                self._call(computation, instruction, total)
            else:
                own = _Sum()
                self._instruction(computation, instruction, own)
                # Where a device waits for a collective, the collective's own time stands for it.
                waits = any(not collective.overlapped for collective in own.collectives.values())
                if (own.matmul or own.kernel or own.hbm) and not waits and not _overlapped(instruction):
                    own.work = {(own.matmul + own.kernel + own.padding, own.hbm): 1.0}
                total.add(own)
        return total

    def _call(self, computation: Computation, i: Instruction, total: _Sum) -> None:
        """Adds what a loop, a branch or a call runs: its computation's instructions, one after another."""
        if i.opcode == "while":
            trips = hlo.trip_count(self.module, i, computation)
            self.loops.append((i.name, trips))
            total.add(self.computation(i.called("body")), trips, own=f"{i.name}/")
            return
        if i.opcode == "conditional":
            branches = [self.computation(name) for name in _branches(i)]
            total.add(max(branches, key=lambda branch: (branch.matmul, branch.hbm)))
            return
        inner = self.computation(i.called("to_apply") or i.called("calls"))
        if _overlapped(i):
            collectives = {key: dataclasses.replace(c, overlapped=True) for key, c in inner.collectives.items()}
            inner = dataclasses.replace(inner, collectives=collectives, work={})
        total.add(inner, own=f"{i.name}/")

    def _instruction(self, computation: Computation, i: Instruction, total: _Sum) -> None:
        if i.opcode == "fusion":
            inner = self.computation(i.called("calls"))
            # A fusion that multiplies and exchanges in one does both at the same time.
            both = inner.matmul + inner.kernel > 0
            own = _by_channel(inner.collectives).items()
            collectives = {key: dataclasses.replace(c, overlapped=c.overlapped or both) for key, c in own}
            total.add(dataclasses.replace(inner, hbm=0.0, host=0.0, collectives=collectives, work={}))
        self._arithmetic(computation, i, total)
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            found = dataclasses.replace(self._collective(computation, i, kind), overlapped=_overlapped(i))
            total.add(_Sum(collectives={i.name: found}))
        elif i.opcode == "send" and "xla_megascale_runtime" in i.attributes:
            total.add(_Sum(collectives={i.name: _between_slices(computation, i)}))
        if i.opcode not in _FREE:
            self._memory(computation, i, total)

    def _arithmetic(self, computation: Computation, i: Instruction, total: _Sum) -> None:
        if i.opcode in ("dot", "convolution"):
            left, right = (computation.instructions[name].shape[0] for name in i.operands[:2])
            done = flops.dot_flops(i, left) if i.opcode == "dot" else flops.convolution_flops(i, left, right)
            sizes = flops.dot_sizes(i, left, right) if i.opcode == "dot" else flops.convolution_sizes(i, left, right)
            total.matmul += done
            total.padding += done * (flops.padded(*sizes, self.matrix_unit) - 1) if sizes else 0.0
        elif i.opcode == "custom-call":
            done, head_dim = flops.attention_flops(i, [computation.instructions[name] for name in i.operands])
            total.kernel += done
            # Of each product the head size is the contracted dimension, or one side of the result.
            total.padding += done * (-(-head_dim // self.matrix_unit) * self.matrix_unit / head_dim - 1)

    def _collective(self, computation: Computation, i: Instruction, kind: str) -> Collective:
        operand = sum(computation.instructions[name].bytes for name in i.operands)
        arrays = [a for a in i.shape if a.dtype not in ("u32", "s32") or a.dims]
        if i.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :]  # (operands, results)
        result = sum(array.bytes for array in arrays)
        if kind == "all-reduce" and self._only_sliced(computation, i):
            # A TPU program writes a reduce-scatter so: reduce, and keep one's own part.
            kind = "reduce-scatter"
            result = sum(user.bytes for user in self._slices_of(computation, i))
        group = hlo.device_groups(i)
        name = re.search(r'op_name="([^"]*)"', i.attributes)
        members = tuple(int(d) for d in group[0]) if len(group) else ()
        return Collective(kind, 1.0, operand, result, members, name[1] if name else "", i.attribute("channel_id"))

    def _slices_of(self, computation: Computation, i: Instruction) -> list[Instruction]:
        found = []
        for user in computation.users[i.name]:
            through = user.opcode in ("get-tuple-element", "bitcast")
            found += self._slices_of(computation, user) if through else [user]
        return found

    def _only_sliced(self, computation: Computation, i: Instruction) -> bool:
        users = self._slices_of(computation, i)
        sliced = all(user.opcode == "dynamic-slice" and user.bytes < i.bytes for user in users)
        return bool(users) and sliced and "all-reduce-scatter" in computation.name

    def _memory(self, computation: Computation, i: Instruction, total: _Sum) -> None:
        """Adds the bytes of operands and results in HBM. An array that is only sliced counts by its slices, one that is
        updated in place by the update.
        """
        inner = self.module.called(i, "calls") if i.opcode == "fusion" else None
        operands = [computation.instructions[name] for name in i.operands]
        if i.opcode.endswith("-start") and i.opcode.removesuffix("-start") in ("copy", "slice"):
            moved = [i.shape[0], operands[0].shape[0]]
            size = min(array.bytes for array in moved)
            total.hbm += sum(size for array in moved if array.space == hlo.HBM)
            total.host += size if any(array.space == hlo.HOST for array in moved) else 0
            return
        for position, operand in enumerate(operands):
            if any(array.space == hlo.HBM for array in operand.shape):
                whole = sum(array.bytes for array in operand.shape if array.space == hlo.HBM)
                read = _read_by(i, position) if inner is None else self._read(inner, position)
                total.hbm += whole if read is None else min(read, whole)
        results = [array for array in i.shape if array.space == hlo.HBM]
        if results:
            total.hbm += _written(computation, i, results) if inner is None else _written(inner, inner.root, results)

    def _read(self, inner: Computation, position: int) -> int | None:
        """Bytes of its parameter that a fused computation reads; None for all of them."""
        parameter = inner.parameters[position].name if position in inner.parameters else ""
        total = 0
        for user in inner.users.get(parameter, ()):
            for at, name in enumerate(user.operands):
                if name != parameter:
                    continue
                fused = self.module.called(user, "calls") if user.opcode == "fusion" else None
                part = _read_by(user, at) if fused is None else self._read(fused, at)
                if part is None:
                    return None
                total += part
        return total


def _between_slices(computation: Computation, i: Instruction) -> Collective:
    """A collective between slices: a TPU program sends a device's part to the hosts, and receives the result."""
    name = re.findall(r'_xla_host_transfer_rendezvous="([^"]*)"', i.attributes)[0]
    kind = re.findall(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)[0].lower().replace("_", "-")
    receive = next(r for r in computation.instructions.values() if r.opcode == "recv" and f'"{name}"' in r.attributes)
    kind, slices = "collective-permute" if kind == "one-to-one" else kind, hlo.slices_of(i)
    sizes, group = (i.shape[0].bytes, receive.shape[0].bytes), tuple(range(slices))
    return Collective(kind, 1.0, *sizes, group, name, i.attribute("channel_id"), slices, overlapped=True)


def _written(computation: Computation, root: Instruction, results: Iterable[hlo.Array]) -> int:
    """Bytes written for a result; an update in place writes the update alone."""
    whole = sum(array.bytes for array in results)
    parts = [computation.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    saved = 0
    for part in parts:
        while part.opcode == "bitcast":
            part = computation.instructions[part.operands[0]]
        if part.opcode == "dynamic-update-slice" and part.shape[0].space == hlo.HBM:
            saved += part.bytes - computation.instructions[part.operands[1]].bytes
    return max(whole - saved, 0)


def _read_by(i: Instruction, position: int) -> int | None:
    """Bytes of its operand at `position` that an instruction reads; None for all of them."""
    if position == 0 and i.opcode in _SLICES:
        return i.bytes
    return 0 if position == 0 and i.opcode == "dynamic-update-slice" else None


def _branches(i: Instruction) -> list[str]:
    if listed := i.attribute("branch_computations"):
        return re.findall(r"%?([\w.\-]+)", listed)
    return [name for key in ("true_computation", "false_computation") if (name := i.called(key))]


def _saved(module: Module) -> int:
    """Bytes that the forward pass saves for the backward pass: loops fill them slice by slice, and a later loop of the
    computation reads them. With microbatches, that computation is the body of their loop.
    """
    return max((_saved_within(module, computation) for computation in module.computations.values()), default=0)


def _saved_within(module: Module, outer: Computation) -> int:
    filled = {}
    order = {name: at for at, name in enumerate(outer.instructions)}
    for loop in (i for i in outer.instructions.values() if i.opcode == "while"):
        body = module.called(loop, "body")
        trips = hlo.trip_count(module, loop, outer)
        for index, name in enumerate(body.root.operands):
            value, array = body.instructions[name], loop.shape[index]
            passed = value.opcode == "get-tuple-element" and value.operands[0] == body.parameters[0].name
            if not passed and array.dims[:1] == (trips,) and len(array.dims) > 1 and array.space in (hlo.HBM, hlo.HOST):
                filled[(loop.name, index)] = array.bytes
    total = 0
    for (name, index), size in filled.items():
        reads = [u for u in outer.users[name] if u.opcode == "get-tuple-element" and u.attribute("index") == str(index)]
        used = {u for r in reads for u in _reach(outer, r)}
        if any(outer.instructions[u].opcode == "while" and order[u] > order[name] for u in used):
            total += size
    return total


def _reach(outer: Computation, i: Instruction) -> set[str]:
    """Names of the loops that a value enters unchanged, through tuples and other names of the value."""
    found = set()
    for user in outer.users[i.name]:
        if user.opcode == "while":
            found.add(user.name)
        elif user.opcode in ("tuple", "bitcast", "copy", "copy-start", "copy-done", "opt-barrier"):
            found |= _reach(outer, user)
    return found
