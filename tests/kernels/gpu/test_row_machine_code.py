"""What the row and elementwise kernels claim of their machine code, beyond what every kernel must show."""

import pytest

from gpu import apart

SCRIPT = """
import json
from horsepower.kernels.gpu import activation, add_rms_norm, silu_mul
from horsepower.kernels.gpu.launch import compiled
from horsepower.kernels.gpu.machine_code import machine_code
from horsepower.kernels import ops
from horsepower.kernels.registry import OPS

found = {}
for module, wanted in (
    (activation, "swiglu7"),
    (add_rms_norm, "5120 columns, 3 experts, 3 of a post-norm"),
    (silu_mul, "two halves"),
):
    name = module.__name__.rpartition(".")[2]
    (given,) = (inputs for label, inputs in module.examples() if label == wanted)
    outputs = OPS[name].outputs(*given)
    (kernel,) = compiled("sm_90", lambda: module.run(outputs, None, *given))
    code = machine_code(kernel)
    names = ("LDG", "LDG.E.128", "LDG.E.64", "STG", "STG.E.128", "STG.E.64", "SHFL", "STS", "LDS")
    found[name] = {each: code.count(each) for each in names} | {"faults": code.faults("sm_90")}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def code():
    return apart(SCRIPT)


def test_interleaved_columns_are_parted_without_leaving_a_thread(code):
    found = code["activation"]
    assert (found["SHFL"], found["STS"], found["LDS"], found["faults"]) == (0, 0, 0, [])
    assert found["LDG"] == found["LDG.E.128"] == 4  # the 4096 columns of a program, 8 an access, 128 threads
    assert found["STG"] == found["STG.E.64"] == 4


def test_rows_that_are_8_bytes_aligned_are_read_8_bytes_at_a_time(code):
    found = code["silu_mul"]
    assert (found["STS"], found["faults"]) == (0, [])
    assert found["LDG"] == found["LDG.E.64"] == 2 * 4
    assert found["STG"] == found["STG.E.64"] == 4


def test_a_row_is_read_once_for_two_reductions_and_stays_in_registers(code):
    found = code["add_rms_norm"]
    assert found["faults"] == []  # no spill
    assert (found["LDG.E.128"], found["LDG.E.64"]) == (
        5,
        5,
    )  # residual and branch: 1024 columns an access of 256 threads
    assert found["LDG"] == 5 + 5 + 2 * 5  # and the two gains
    assert (found["STG.E.128"], found["STG.E.64"], found["STG"]) == (5, 5, 10)
