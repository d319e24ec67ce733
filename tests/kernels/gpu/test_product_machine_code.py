"""What products of codes claim of their machine code, beyond what every kernel must show."""

import pytest

from gpu import apart

SCRIPT = """
import json
from horsepower.kernels.gpu import linear
from horsepower.kernels.gpu.launch import compiled
from horsepower.kernels.gpu.machine_code import machine_code
from horsepower.kernels import ops
from horsepower.kernels.registry import OPS

found = {}
for arch, form in (("sm_90", ""), ("sm_90", "fp8"), ("sm_90", "w8a16"), ("sm_80", "w8a16")):
    label = f"13696 x 5120, 1 experts, {form}" if form else "5120 x 5120, 1 experts"
    (given,) = (inputs for name, inputs in linear.examples() if name == label)
    config = next(config for config in linear.CONFIGS[arch] if config.form == form)
    (kernel,) = compiled(arch, lambda: linear.run(OPS["linear"].outputs(*given), None, *given, config=config))
    code = machine_code(kernel)
    names = ("QGMMA", "HGMMA", "HMMA", "FADD", "HMUL2", "F2F", "F2FP.F16.E4M3", "UTMALDG", "LDGSTS")
    counts = {each: code.count(each) for each in names}
    found[f"{arch} {form}".strip()] = counts | {"halves": code.count("HMUL2", "HFMA2"), "faults": code.faults(arch)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def code():
    found = apart(SCRIPT)
    assert [counts["faults"] for counts in found.values()] == [[]] * len(found)
    return found


def test_every_128_products_are_added_up_in_float32(code):
    """Of two halves of 128 x 128: 64 sums a thread in each, after four products of 32."""
    found = code["sm_90 fp8"]
    assert (found["QGMMA"], found["HGMMA"], found["FADD"]) == (2 * 4, 0, 2 * 64)
    assert code["sm_90"]["FADD"] == 0


def test_codes_are_decoded_two_in_an_instruction_and_by_no_conversion(code):
    """On sm_90, 256 x 64 a step: 64 a thread."""
    found = code["sm_90 w8a16"]
    assert (found["HGMMA"], found["HMUL2"], found["F2F"], found["F2FP.F16.E4M3"]) == (4, 32, 0, 0)
    assert found["UTMALDG"] > 0
    found = code["sm_80 w8a16"]
    assert found["HMMA"] > 0
    assert found["LDGSTS"] > 0
    assert 0 < found["halves"] <= 32
    assert (found["F2F"], found["F2FP.F16.E4M3"]) == (0, 0)
