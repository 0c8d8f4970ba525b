"""Read the text of a compiled XLA program: its operations, their shapes, FLOPs and bytes, and who asked for them."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ITEMSIZES = {
    "pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
    "s64": 8, "u64": 8, "c64": 8,
}  # fmt: skip
"""Bytes per value. s8 and u8 are left out: in these programs they are the scratch memory of library calls."""
_OPERATION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(((?:[^()]|\([^()]*\))*)\)(.*)")
_PARTIAL_READS = ("slice", "dynamic-slice", "gather")


class Operation(NamedTuple):
    """One line of a program."""

    name: str
    shape: str
    """The text of its result's shape: `bf16[8,768]{1,0}`, or several in parentheses."""
    kind: str
    """`fusion`, `custom-call`, `while`, ..."""
    operands: tuple[str, ...]
    """Names of the operations whose results it reads."""
    attributes: str
    """The rest of the line."""
    is_root: bool
    """Whether its result is that of its computation."""

    @property
    def called(self) -> str | None:
        """Name of the computation of a fusion, a call, or the body of a loop."""
        match = re.search(r"(?:body|calls|to_apply)=%([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def trip_count(self) -> int | None:
        """Number of iterations of a loop, if the compiler knows it; otherwise the host reads its condition."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def target(self) -> str:
        """The library function of a custom call, otherwise an empty text."""
        match = re.search(r'custom_call_target="([^"]+)"', self.attributes)
        return match[1] if match else ""


Computation = dict[str, Operation]
"""Operations by name, in the order of execution; they refer to earlier ones only."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    callers: dict[int, tuple[str, ...]]
    """{number of a stack frame: names of the Python functions that called each other, innermost first}"""

    def functions(self, operation: Operation) -> tuple[str, ...]:
        """Return the Python functions that asked for an operation, innermost first; empty if they are not recorded."""
        match = re.search(r"stack_frame_id=(\d+)", operation.attributes)
        return self.callers.get(int(match[1]), ()) if match else ()

    def loops(self, computation: str | None = None) -> Iterator[Operation]:
        """Yield the loops of a computation and of those that it calls, outer loops first."""
        for operation in self.computations[computation or self.entry].values():
            if operation.kind == "while":
                yield operation
            if operation.kind in ("while", "call", "conditional") and operation.called:
                yield from self.loops(operation.called)


def parse(text: str) -> Program:
    """Read the text of a compiled program, as compiled.as_text() returns it."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation = {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$", line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _OPERATION.match(line):
            operands = tuple(re.findall(r"%([\w.\-]+)", match[5]))
            current[match[2]] = Operation(match[2], match[3], match[4], operands, match[6], bool(match[1]))
    return Program(computations, entry, _callers(text))


def _callers(text: str) -> dict[int, tuple[str, ...]]:
    """Read the tables of stack frames at the top of a program's text."""
    functions = dict(re.findall(r'^(\d+) "(.*)"$', text.partition("\nFunctionNames\n")[2].partition("\n\n")[0], re.M))
    location = re.compile(r"^(\d+) \{file_name_id=\d+ function_name_id=(\d+)", re.M)
    names = {number: functions[function] for number, function in location.findall(text) if function in functions}
    frame = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", re.M)
    frames = {int(number): (names.get(place, ""), int(parent or 0)) for number, place, parent in frame.findall(text)}
    # In some versions of XLA the parents are counted from 1, where 1 means that there is none.
    offset = int(any(number == parent for number, (_, parent) in frames.items()))
    callers: dict[int, tuple[str, ...]] = {}
    for number, (name, parent) in sorted(frames.items()):
        callers[number] = (name, *callers.get(parent - offset, ()))
    return callers


class Shape(NamedTuple):
    dtype: str
    axes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _ITEMSIZES[self.dtype] * math.prod(self.axes)


@functools.cache
def shapes(text: str) -> list[Shape]:
    """Return the arrays of a shape's text, without scratch memory."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    return [Shape(dtype, tuple(int(n) for n in axes.split(",") if n)) for dtype, axes in found if dtype in _ITEMSIZES]


def n_bytes(*texts: str) -> int:
    """Return the bytes of the arrays of shapes' texts."""
    return sum(shape.nbytes for text in texts for shape in shapes(text))


def product_flops(computation: Computation, operation: Operation) -> int:
    """Return the FLOPs of a matrix product, which is a `dot` or a call of cuBLAS."""
    match = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([^\]}]*)', operation.attributes)
    summed = match[1].replace('"', "").split(",") if match else []
    left = shapes(computation[operation.operands[0]].shape)[0].axes
    return 2 * math.prod([*shapes(operation.shape)[0].axes, *(left[int(n)] for n in summed if n)])


def fusion_cost(computation: Computation) -> tuple[int, float]:
    """Return the FLOPs of the products in a fusion, and the bytes of memory that it reads and writes.

    Of an array that is sliced, gathered from, or updated in place, only that part counts.
    """
    moved = 0.0
    in_place = set()
    for output in _outputs(computation):
        while output.kind in ("bitcast", "copy"):
            output = computation[output.operands[0]]
        updates = {"dynamic-update-slice": 1, "scatter": 2}.get(output.kind)
        moved += n_bytes(computation[output.operands[updates]].shape if updates else output.shape)
        if updates:
            in_place.add((output.name, output.operands[0]))
    users: dict[str, list[Operation]] = {name: [] for name in computation}
    for operation in computation.values():
        for operand in dict.fromkeys(operation.operands):
            users[operand].append(operation)
    needed: dict[str, float] = {}  # fraction of each result that is used
    for name, operation in reversed(computation.items()):
        fraction = float(operation.is_root)
        for user in users[name]:
            if (user.name, name) in in_place:
                continue
            size = n_bytes(user.shape) / max(1, n_bytes(operation.shape))
            if user.kind in _PARTIAL_READS and user.operands[0] == name:
                part = fraction + size * needed[user.name]
            else:
                part = needed[user.name] if size >= 0.5 else 1.0
            fraction = min(1.0, max(fraction, part))
        needed[name] = fraction
        if operation.kind == "parameter":
            moved += fraction * n_bytes(operation.shape)
    dots = (operation for operation in computation.values() if operation.kind == "dot")
    return sum(product_flops(computation, operation) for operation in dots), moved


def _outputs(computation: Computation) -> list[Operation]:
    root = next(operation for operation in computation.values() if operation.is_root)
    return [computation[name] for name in root.operands] if root.kind == "tuple" else [root]


def group_size(operation: Operation, n_devices: int) -> int:
    """Return the number of devices that exchange a message with each other."""
    groups = operation.attributes.partition("replica_groups=")[2]
    if groups.startswith("mesh["):  # mesh['a'=2,'b'=4], device_ids=(...) {'a'}
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups.partition("]")[0]))
        axes = re.findall(r"'(\w+)'", groups.partition("{")[2].partition("}")[0])
        return math.prod(int(sizes[name]) for name in axes)
    if match := re.match(r"\[\d+,(\d+)\]", groups):
        return int(match[1])
    if match := re.match(r"\{\{([\d,]+)\}", groups):
        return len(match[1].split(","))
    return n_devices
