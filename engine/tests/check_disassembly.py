"""Fails where the inner loop of a tile kernel keeps a vector register on the stack.

    python engine/tests/check_disassembly.py build/native [--objdump aarch64-linux-gnu-objdump]

A tile kernel reaches the multiply-add rate only while all its sums stay in registers, and whether they do is the
compiler's choice: a change elsewhere, or another compiler, may undo it without any test failing.

The objects of the tiers under the folder are disassembled. Each function named below is split into basic blocks at its
jumps and their targets; an edge back to a block that dominates its source closes a natural loop, and a loop that holds
no other one is innermost. In those that multiply and add, no instruction may name both a vector register and memory at
the stack pointer, or at the frame pointer where the function has one. Every tier must have every kernel, each with such
a loop: a kernel that was renamed or inlined is a failure and not a pass.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

KERNELS = ("score_tile", "value_tile", "outer_tile")

FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>.+)>:$")
INSTRUCTION = re.compile(r"^\s*(?P<address>[0-9a-f]+):\t(?P<mnemonic>\S+)\s*(?P<operands>.*)$")
TARGET = re.compile(r"\b([0-9a-f]+) <")
JUMP = re.compile(r"^(j\w+|b|b\.\w+|cbn?z|tbn?z)$")
ALWAYS = re.compile(r"^(jmp|b|ret|retq|br)$")
VECTOR = re.compile(r"%[xyz]mm\d|\b[qv]\d+\b")
MULTIPLY_ADD = re.compile(r"^(vfn?madd|vdpbf16|mulp|vmulp|fmla|fmul)")
STACK = {"x86": r"\(%rsp", "arm": r"\[sp"}
FRAME = {"x86": r"\(%rbp", "arm": r"\[x29"}
HAS_FRAME = {"x86": re.compile(r"^%rsp,%rbp$"), "arm": re.compile(r"^x29, sp")}


@dataclass(frozen=True)
class Instruction:
    address: int
    mnemonic: str
    operands: str

    @property
    def target(self) -> int | None:
        found = TARGET.search(self.operands) if JUMP.match(self.mnemonic) else None
        return int(found[1], 16) if found else None


def functions(objdump: str, path: Path) -> dict[str, list[Instruction]]:
    """The instructions of each tile kernel of an object file, by its name with template arguments."""
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", "--wide", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if header := FUNCTION.match(line):
            name = header["name"].replace("heedful::", "").replace("(anonymous namespace)::", "").partition("(")[0]
            current = found.setdefault(name, []) if re.search(rf"::({'|'.join(KERNELS)})<", name) else None
        elif current is not None and (read := INSTRUCTION.match(line)):
            current.append(Instruction(int(read["address"], 16), read["mnemonic"], read["operands"]))
    return found


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The instructions of each natural loop that holds no other."""
    places = {instruction.address for instruction in code}
    starts = {code[0].address}
    for instruction, following in zip(code, [*code[1:], None], strict=True):
        if instruction.target in places:
            starts.add(instruction.target)
        if following is not None and (JUMP.match(instruction.mnemonic) or ALWAYS.match(instruction.mnemonic)):
            starts.add(following.address)
    order = sorted(starts)
    blocks: dict[int, list[Instruction]] = {start: [] for start in order}
    for instruction in code:
        blocks[max(start for start in order if start <= instruction.address)].append(instruction)
    edges: dict[int, set[int]] = {start: set() for start in order}
    for index, start in enumerate(order):
        last = blocks[start][-1]
        if last.target in places:
            edges[start].add(last.target)
        if not ALWAYS.match(last.mnemonic) and index + 1 < len(order):
            edges[start].add(order[index + 1])

    dominators = {start: set(order) for start in order}
    dominators[order[0]] = {order[0]}
    for changed in iter(lambda: _refine(order, edges, dominators), False):
        assert changed
    loops: dict[int, set[int]] = {}
    for source in order:
        for head in edges[source] & dominators[source]:
            body, waiting = loops.setdefault(head, {head}), [source]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting.extend(before for before in order if block in edges[before])
    inner = [body for head, body in loops.items() if not any(o in body for o in loops if o != head)]
    return [[i for start in sorted(body) for i in blocks[start]] for body in inner]


def _refine(order: list[int], edges: dict[int, set[int]], dominators: dict[int, set[int]]) -> bool:
    """One round of the usual iteration for dominators; whether it changed any."""
    changed = False
    for block in order[1:]:
        before = [dominators[source] for source in order if block in edges[source]]
        now = {block} | (set.intersection(*before) if before else set())
        changed |= now != dominators[block]
        dominators[block] = now
    return changed


def check(name: str, code: list[Instruction]) -> list[str]:
    """What is wrong with one kernel."""
    machine = "x86" if any("%" in instruction.operands for instruction in code) else "arm"
    framed = any(i.mnemonic == "mov" and HAS_FRAME[machine].match(i.operands) for i in code)
    stack = re.compile(f"{STACK[machine]}|{FRAME[machine]}" if framed else STACK[machine])
    loops = [loop for loop in innermost_loops(code) if any(MULTIPLY_ADD.match(i.mnemonic) for i in loop)]
    if not loops:
        return [f"{name}: no loop that multiplies and adds was found"]
    return [
        f"{name}: {i.address:x}: {i.mnemonic} {i.operands}"
        for loop in loops
        for i in loop
        if VECTOR.search(i.operands) and stack.search(i.operands)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Vector registers on the stack in the inner loops of tile kernels.")
    parser.add_argument("build", type=Path, help="the folder that CMake built in")
    parser.add_argument("--objdump", default="objdump")
    arguments = parser.parse_args()
    objects = sorted(arguments.build.glob("CMakeFiles/heedful_tier_*.dir/**/tier_*.o"))
    if not objects:
        print(f"no objects of tiers under {arguments.build}: build first")
        return 1
    failed = False
    for path in objects:
        kernels = functions(arguments.objdump, path)
        wrong = [line for name, code in kernels.items() for line in check(name, code)]
        wrong += [f"no {kernel}" for kernel in KERNELS if not any(f"::{kernel}<" in name for name in kernels)]
        tier = path.name.split(".")[0].removeprefix("tier_")
        print(f"{tier:12} {len(kernels):3} tile kernels, {len(wrong)} vector registers on the stack in their loops")
        for line in wrong:
            print(f"    {line}")
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
