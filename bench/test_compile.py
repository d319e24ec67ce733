"""What compiling costs: the preset's 40 layers, and the released model of 15 B parameters without its weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from horsepower.bench.measure import machine
from horsepower.kernels.native_library import ISAS

pytestmark = pytest.mark.benchmark

# In a process of its own: nothing is traced, imported or allocated before. VmHWM, unlike ru_maxrss, starts at zero.
SCRIPT = """
import json, pathlib, sys, time
start = time.perf_counter()
from horsepower.runtime.foal import generate
from horsepower.runtime.fused import compile_velocity, expected_fusions
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL_MODELS, MODELS

family, name = sys.argv[1:]
if family == "foal":
    model = DiT(FOAL_MODELS[name])
    generate(model, name)
else:
    model = DiT(MODELS[name], device="meta")
ready = time.perf_counter()
expect = expected_fusions(model.config)
compiled = compile_velocity(model.eval(), expect=expect, cache=False)
end = time.perf_counter()
compile_velocity(model, expect=expect)
kept = time.perf_counter()
again = compile_velocity(model, expect=expect)
found = time.perf_counter() - kept
assert again.found
sizes = {"video_0": 65024, "audio_0": 640, "condition_text_0": 336, "frames": 32}  # 66,000 tokens
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "parameters": sum(x.numel() for x in model.parameters()),
    "traced": compiled.plan.traced,
    "calls": len(compiled.plan.calls),
    "import and build": ready - start,
    "compile": end - ready,
    "found": found,
    "weights": compiled.plan.weight_bytes,
    "activations": compiled.plan.at(sizes).peak,
    "peak": int(status["VmHWM"].split()[0]) * 1024,
}))
"""


@pytest.mark.parametrize(
    ("family", "name"), [("foal", "distill"), ("foal", "1080p_sr"), ("released", "distill"), ("released", "1080p_sr")]
)
def test_compile(family: str, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Seconds are printed; memory has a limit: tracing must not need the weights."""
    environment = {**os.environ, "HORSEPOWER_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, family, name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(
            f"\n{machine()}\n{family} {name}: {found['parameters'] / 1e9:.3g} B parameters, "
            f"{found['traced']} blocks traced, {found['calls']} calls; compiled in {found['compile']:.1f} s "
            f"after {found['import and build']:.1f} s of imports and building, "
            f"found on disk in {found['found']:.2f} s, peak memory {found['peak'] / 2**30:.2f} GiB; "
            f"the plan states {found['weights'] / 2**30:.2f} GiB of weights and {found['activations'] / 2**30:.2f} GiB "
            f"of activations for 66,000 tokens, instruction set {ISAS[0]}"
        )
    assert found["peak"] < 4e9
    assert found["traced"] < 10
    if family == "released":
        assert found["parameters"] > 15e9
