"""A kernel's machine code as cuobjdump prints it: its instructions, and which of them make up a loop."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LEAVES = (
    "BRA",
    "BRX",
    "JMP",
    "JMX",
    "EXIT",
    "RET",
)  # what the instruction after them does not follow, unless predicated


class Instruction(NamedTuple):
    address: int
    opcode: str
    target: int | None = None  # of a branch or call that says where it goes
    conditional: bool = False

    @property
    def stem(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def reads_memory(self) -> bool:
        return self.stem in ("LDG", "LDGSTS")


def kernels(sass: str) -> dict[str, list[Instruction]]:
    """By mangled name, every instruction but the NOPs that fill up."""
    return {part.split()[0]: instructions(part) for part in sass.split("Function : ")[1:]}


def instructions(sass: str) -> list[Instruction]:
    found = []
    for address, predicate, opcode, operands in _LINE.findall(sass):
        jumps = opcode.startswith(("BRA", "JMP", "CALL"))
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if jumps else None
        conditional = bool(predicate) or (jumps and "," in operands)
        if opcode != "NOP":
            found.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None, conditional))
    return found


def loops(program: Sequence[Instruction]) -> list[list[Instruction]]:
    """Every loop: what can come round to its head without having left it, branches that are hardly ever taken too.

    A branch back is a loop only if there is no way to it that misses where it leads: code that is kept out of the way,
    behind the kernel's end, branches back as well. A subroutine is not part of the loop that calls it.
    """
    after = _successors(program)
    before: dict[int, list[int]] = defaultdict(list)
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    bodies: dict[int, set[int]] = {}
    for tail in _reached([0], after.__getitem__):
        for head in after[tail]:
            if head <= tail and tail not in _reached([0], after.__getitem__, without=head):
                body = _reached([tail], before.__getitem__, without=head)
                bodies[head] = bodies.get(head, {head}) | body
    return [[program[i] for i in sorted(body)] for body in bodies.values()]


def hot_loop(program: Sequence[Instruction]) -> list[Instruction]:
    """The largest loop that reads global memory, or nothing."""
    return max((loop for loop in loops(program) if any(i.reads_memory for i in loop)), key=len, default=[])


def _successors(program: Sequence[Instruction]) -> list[list[int]]:
    place = {instruction.address: i for i, instruction in enumerate(program)}
    after: list[list[int]] = []
    for i, (_, _, target, conditional) in enumerate(program):
        stem = program[i].stem
        following = [i + 1] if i + 1 < len(program) and (conditional or stem not in _LEAVES) else []
        if target is not None and stem != "CALL":
            following.append(_at_or_after(target, place, program))
        after.append(following)
    # A branch through a table may lead wherever nothing else does.
    named = {j for following in after for j in following}
    named |= {_at_or_after(i.target, place, program) for i in program if i.target is not None}
    unnamed = [i for i in range(1, len(program)) if i not in named]
    for i, instruction in enumerate(program):
        if instruction.stem in ("BRX", "JMX"):
            after[i] = after[i] + unnamed
    return after


def _at_or_after(address: int, place: dict[int, int], program: Sequence[Instruction]) -> int:
    """Where a branch leads: NOPs are not in the program."""
    found = place.get(address)
    return found if found is not None else next(i for i, at in enumerate(program) if at.address > address)


def _reached(start: Iterable[int], following: Callable[[int], Iterable[int]], without: int | None = None) -> set[int]:
    seen = {i for i in start if i != without}
    queue = deque(seen)
    while queue:
        for j in following(queue.popleft()):
            if j not in seen and j != without:
                seen.add(j)
                queue.append(j)
    return seen
