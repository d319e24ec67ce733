"""`horsepower kernels`: what each GPU kernel needs and does, read from machine code that is compiled here and now."""

import time
from collections.abc import Sequence
from importlib.metadata import version

from horsepower.bench.measure import machine
from horsepower.bench.report import Cell, Paragraph, Report, Table
from horsepower.kernels.gate import Gated, gate

NAME = ("op", "example", "configuration", "kernel")
COUNTED = {
    "HGMMA, QGMMA": ("HGMMA", "QGMMA"),
    "HMMA": ("HMMA",),
    "UTMALDG": ("UTMALDG",),
    "LDGSTS": ("LDGSTS",),
    "LDG.128": ("LDG.E.128",),
    "STG.128": ("STG.E.128",),
}


def gate_kernels(arch: str, ops: Sequence[str] = ()) -> tuple[bool, Report]:
    """Compile the kernels of these operators, or of all, for `arch`; whether none has a fault, and the table.

    Raises ValueError for an architecture or operator that is not there.
    """
    start = time.perf_counter()
    found = gate(arch, ops)
    faulty = [each for each in found if each.faults]
    verdict = f"{len(faulty)} have faults" if faulty else "no spills, no serialised wgmma, memory within limits"
    summary = f"{len(found)} kernels by Triton {version('triton')} in {time.perf_counter() - start:.0f} s: {verdict}."
    columns = (*NAME, "registers", "shared KiB", *COUNTED, "instructions")
    note = (
        "Registers of a thread; shared memory of a block. HGMMA, QGMMA: wgmma; HMMA: mma; UTMALDG: loads by the tensor "
        "memory accelerator; LDGSTS: asynchronous copies to shared memory; LDG.128 and STG.128: 16-byte accesses."
    )
    tables = [Table(f"Kernels for {arch}", columns, tuple(_row(each) for each in found), note)]
    if faulty:
        rows = tuple(
            (each.op, each.example, each.config, each.kernel, fault) for each in faulty for fault in each.faults
        )
        tables.append(Table("Faults", ("op", "example", "configuration", "kernel", "fault"), rows))
    return not faulty, Report(f"GPU kernels for {arch}", machine(), (Paragraph(summary), *tables))


def _row(each: Gated) -> tuple[Cell, ...]:
    code = each.code
    if code is None:
        return (*_name(each), None, None, *(None for _ in COUNTED), None)
    counts = (code.count(*names) for names in COUNTED.values())
    return (*_name(each), code.registers, code.shared / 1024, *counts, len(code.instructions))


def _name(each: Gated) -> tuple[str, ...]:
    return each.op, each.example, each.config, each.kernel
