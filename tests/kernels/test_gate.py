"""The gate: what it finds in machine code, and that it finds it in kernels as they are compiled."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from horsepower.cli import main
from horsepower.kernels.gate import gate, twins
from horsepower.kernels.gpu.machine_code import MachineCode

GOOD = MachineCode(168, 180_000, 0, 0, ("UTMALDG.2D", "HGMMA.64x256x16.F32.BF16", "HGMMA.64x256x16.F32.BF16"), ())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shared": 232_449}, "232449 bytes of shared memory, allowed: 232448"),
        ({"stack": 8}, "spills: 8 bytes of stack, 0 local loads and stores"),
        ({"instructions": (*GOOD.instructions, "STL.64")}, "spills: 0 bytes of stack, 1 local loads and stores"),
        ({"instructions": GOOD.instructions[1:]}, "no UTMALDG"),
        ({"instructions": ("UTMALDG.2D", "HMMA.16816.F32.BF16")}, "no HGMMA|QGMMA"),
        ({"instructions": (*GOOD.instructions, "HMMA.16816.F32.BF16")}, "some products do without wgmma"),
        (
            {"instructions": (*GOOD.instructions, "WARPGROUP.DEPBAR.LE", GOOD.instructions[-1], "WARPGROUP.DEPBAR.LE")},
            "serialised wgmma: 1 waits between 3 products",
        ),
        ({"warnings": ("Potential Performance Loss",)}, "Potential Performance Loss"),
    ],
)
def test_each_fault_is_named(change, fault):
    claims = ("HGMMA|QGMMA", "UTMALDG")
    assert GOOD.faults("sm_90", claims) == []
    assert replace(GOOD, **change).faults("sm_90", claims) == [fault]


def test_fp8_has_a_product_of_its_own():
    """And waits for each four of 32 values, to add their sums up in float32."""
    four, wait = ("QGMMA.64x128x32.F32.E4M3.E4M3",) * 4, ("WARPGROUP.DEPBAR.LE",)
    claims = ("HGMMA", "UTMALDG")
    assert GOOD.faults("sm_90", claims, "fp8") == ["no QGMMA"]
    fp8 = replace(GOOD, instructions=("UTMALDG.2D", *four, *wait, *four, *wait, *wait))
    assert fp8.faults("sm_90", claims, "fp8") == []
    assert fp8.faults("sm_90", claims) == ["no HGMMA"]


def test_less_shared_memory_on_sm_80():
    assert GOOD.faults("sm_80") == ["180000 bytes of shared memory, allowed: 166912"]


def test_every_operator_with_work_to_do_has_a_kernel():
    wanted = {"activation", "add_rms_norm", "attention", "layer_norm", "qk_norm_rope", "rms_norm", "silu_mul"}
    products = {"linear", "linear_activation", "linear_add_rms_norm", "linear_qk_norm_rope"}
    quantisers = {
        "quantise",
        "to_codes",
        "transpose_to_codes",
        "rms_norm_quantise",
        "add_rms_norm_quantise",
        "linear_add_rms_norm_quantise",
    }
    assert set(twins()) == wanted | products | quantisers


def test_kernels_are_compiled_for_either_architecture():
    for arch in ("sm_80", "sm_90"):
        found = gate(arch, ["rms_norm"])
        assert {each.kernel for each in found} == {"rms_norm_kernel"}
        assert all(each.code.registers > 16 and len(each.code.instructions) > 50 for each in found)
        assert [each.faults for each in found] == [()] * len(found)


BAD = """
import json
from horsepower.kernels.gate import _gate
from horsepower.kernels.gpu import linear
from horsepower.kernels.gpu.launch import Config

tiles = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "TMA": 1}
linear.CONFIGS = {"sm_90": (Config(4, 3, tiles), Config(8, 4, {**tiles, "BK": 128}), Config(8, 3, {**tiles, "BN": 96}))}
linear.CLAIMS = {"sm_90": {"linear_kernel": ("QGMMA",)}}
print(json.dumps([each.faults for each in _gate("sm_90", "linear")[:3]]))
"""


def test_bad_configurations_of_a_real_kernel_are_found():
    """Too few warps spill, deep tiles do not fit, and 96 is no power of two; no product is FP8."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", BAD], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    spills, large, wrong = json.loads(done.stdout)
    assert any("spills" in fault for fault in spills)
    assert "no QGMMA" in spills
    assert any("shared memory" in fault for fault in large)
    assert wrong[0].startswith("does not compile")


def test_the_command(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    assert main(["kernels", "--arch", "sm_80", "--op", "silu_mul", "--json", str(file)]) == 0
    assert "no spills" in capsys.readouterr().out
    (table,) = json.loads(file.read_text())["tables"]
    assert {row["op"] for row in table["rows"]} == {"silu_mul"}
    assert all(row["registers"] > 16 for row in table["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_70"], "arch: got 'sm_70', allowed: sm_80, sm_90"),
        (["--op", "rope"], "op: got 'rope', allowed: activation, add_rms_norm"),
        (["--json", "nowhere/at/all"], "file: got"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err
