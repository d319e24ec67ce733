"""What a compiled kernel needs and does, read from its machine code: registers, memory, instructions."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448}  # bytes that a block can have
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclass(frozen=True)
class MachineCode:
    """Of one kernel. Registers are of a thread; sizes are bytes, shared memory of a block, the others of a thread."""

    registers: int
    shared: int
    stack: int
    spilled: int
    instructions: tuple[str, ...]  # with their modifiers, in order
    warnings: tuple[str, ...]  # of the assembler

    def count(self, *names: str) -> int:
        """Instructions whose name is one of these, or begins with one and a dot."""
        return sum(each.startswith(tuple(f"{name}." for name in names)) or each in names for each in self.instructions)

    def faults(self, arch: str, claims: Sequence[str] = (), form: str = "") -> list[str]:
        """Why a kernel may not be shipped; `claims` are instructions that must be there, alternatives by `|`.

        form: of its operands, see `tables.form_of`; in FP8, QGMMA takes the place of HGMMA.
        """
        found = list(self.warnings)
        if self.shared > SHARED_LIMIT[arch]:
            found.append(f"{self.shared} bytes of shared memory, allowed: {SHARED_LIMIT[arch]}")
        if self.stack or self.spilled or self.count("STL", "LDL"):
            found.append(f"spills: {self.stack} bytes of stack, {self.count('STL', 'LDL')} local loads and stores")
        claims = [claim.replace("HGMMA", "QGMMA") if form == "fp8" else claim for claim in claims]
        found += [f"no {claim}" for claim in claims if not self.count(*claim.split("|"))]
        if arch == "sm_90":
            products, waits = self._products()
            if products and self.count("HMMA"):
                found.append("some products do without wgmma")
            if 2 * (waits + 1) > products > 1:
                found.append(f"serialised wgmma: {waits} waits between {products} products")
        return found

    def _products(self) -> tuple[int, int]:
        """How many wgmma there are, and waits between the first and the last of them.

        FP8 waits for every four, whose sums are added up in float32: those of 32 products each.
        """
        order = [name[1] for name in self.instructions if name.startswith(("HGMMA.", "QGMMA.", "WARPGROUP.DEPBAR"))]
        kinds = "".join("w" if letter == "A" else "p" for letter in order)
        return kinds.count("p"), kinds.strip("w").count("w")


def machine_code(kernel: Any) -> MachineCode:
    """Of a kernel that Triton compiled; its assembly is assembled again to hear what the assembler says."""
    capability = kernel.metadata.target.arch
    name = f"sm_{capability}{'a' if capability >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.asm["ptx"])
        said = _tool(get_ptxas(capability).path, "--verbose", f"--gpu-name={name}", source, "--output-file", binary)
        listing = _tool(DISASSEMBLER, "--no-dataflow", binary)
    numbers = {
        name: int(found[1]) if (found := re.search(pattern, said)) else 0
        for name, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("stack", r"(\d+) bytes stack frame"),
            ("spilled", r"(\d+) bytes spill stores"),
        )
    }
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    warnings = tuple(line.strip() for line in said.splitlines() if "Potential Performance Loss" in line)
    return MachineCode(shared=kernel.metadata.shared, instructions=tuple(instructions), warnings=warnings, **numbers)


def _tool(path: str | Path, *arguments: str | Path) -> str:
    """What one of the tools in Triton's wheel prints. Raises RuntimeError if it fails."""
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(path).name}: {done.stderr.strip()}")
    return done.stdout + done.stderr
