"""Traces of an assembler's mistakes in its machine code: what `benchmarks.kernel_resources` looks for in every kernel.

NVIDIA's `ptxas` has been seen to make two of them on Hopper, both in products by tensor cores (`HGMMA`), whose operands
lie in shared memory, at an address in uniform registers, or in registers. On a card the first gave addresses that are
not the matrix's, the second another matrix. Both searches read the code from its top to its end, as text: they find no
register that holds an older value in place of the one it should have, and a kernel without a trace need not be right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>\S+)\s*(?P<operands>[^;]*);")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_PRODUCT = "HGMMA"
# Registers of a product's left operand, from the one that is named.
_OPERAND = 4
_WITHOUT_RESULT = ("ST", "RED.", "REDG", "BAR", "BRA")
# Registers of a result, by a part of the opcode; one for others.
_WIDTHS = {
    ".128": 4, "88.4": 4, "HMMA": 4, "CS2R.32": 1, "CS2R": 2, ".64": 2, "WIDE": 2, "88.2": 2,
}  # fmt: skip


@dataclass(frozen=True)
class _Instruction:
    address: str
    opcode: str
    operands: list[str]

    @property
    def width(self) -> int:
        """Registers of a result."""
        if self.opcode.startswith(_PRODUCT):
            return int(self.opcode.split(".")[1].split("x")[1]) // 2
        return next((width for part, width in _WIDTHS.items() if part in self.opcode), 1)

    def results(self, kind: str) -> set[int]:
        """The registers, of `kind` R or UR, that it writes; results stand first, a predicate perhaps before them."""
        if self.opcode.startswith(_WITHOUT_RESULT):
            return set()
        first = next((x for x in self.operands[:2] if not re.match(r"!?U?P", x)), "")
        found = re.match(rf"{kind}(\d+)\b", first)
        return set(range(int(found[1]), int(found[1]) + self.width)) if found else set()

    @property
    def multiplied(self) -> set[int]:
        """The registers that hold a product's left operand."""
        found = re.match(r"R(\d+)\b", self.operands[1]) if self.opcode.startswith(_PRODUCT) else None
        return set(range(int(found[1]), int(found[1]) + _OPERAND)) if found else set()

    @property
    def uniform_sources(self) -> set[int]:
        if self.opcode.startswith(_PRODUCT):
            # Two addresses of 64 bits, of which the first is not used if the left operand is in registers.
            found = re.search(r"gdesc\[UR(\d+)\]", " ".join(self.operands))
            return set(range(int(found[1]) + (2 if self.multiplied else 0), int(found[1]) + 4)) if found else set()
        sources = " ".join(self.operands[1:] if self.results("UR") else self.operands)
        found = {int(x) for x in re.findall(r"\bUR(\d+)\b", sources)}
        of_64_bits = r"\bUR(\d+)\b" if self.opcode.startswith("UIADD3.64") else r"desc\[UR(\d+)\]"
        return found | {int(x) + 1 for x in re.findall(of_64_bits, sources)}


def _parse(text: str) -> tuple[list[_Instruction], dict[str, int]]:
    """The instructions, and for every label the place of the one that it stands before."""
    instructions: list[_Instruction] = []
    labels = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            operands = [x.strip() for x in found["operands"].split(",")]
            instructions.append(_Instruction(found["address"], found["opcode"], operands))
    return instructions, labels


def unwritten(text: str) -> list[str]:
    """Where a uniform register is read that nothing above has written, as sentences.

    Args:
        text: of one kernel, as `nvdisasm -c` prints it.
    """
    written: set[int] = set()
    found = []
    for x in _parse(text)[0]:
        found += [f"UR{n} is read at {x.address} before it is written" for n in sorted(x.uniform_sources - written)]
        written |= x.results("UR")
    return found


def overwritten(text: str) -> list[str]:
    """Where a loop's product multiplies with registers that the loop writes after it and not before, as sentences.

    What is multiplied is then right on the first trip alone, unless it is meant to change from trip to trip, as in a
    loop that loads ahead: none of the kernels here has such an operand in registers.

    Args:
        text: of one kernel, as `nvdisasm -c` prints it.
    """
    instructions, labels = _parse(text)
    found = []
    for end, jump in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", " ".join(jump.operands)) if jump.opcode.startswith("BRA") else None
        start = labels.get(target[0], end) if target else end
        body = instructions[start:end]
        results = [x.results("R") for x in body]
        for at, x in enumerate(body):
            if not x.multiplied:
                continue
            before, after = set[int]().union(*results[:at]), set[int]().union(*results[at + 1 :])
            found += [
                f"R{n}, multiplied at {x.address}, is written later in its loop and not before"
                for n in sorted(x.multiplied & after - before)
            ]
    return found
