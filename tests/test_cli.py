"""The command line, in a process of its own where that matters."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch

from horsepower import cli, commands, doctor, terminal
from horsepower.bench import step as preset_step
from horsepower.kernels.registry import OPS, Kernel
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.released import ReleasedSizes
from models import TINY, random_model


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "horsepower.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


GENERATE = ("generate", "A horse galloping", "--resolution", "64x32", "--duration", "0.6", "--steps", "1")


def test_generate_writes_a_playable_clip(tmp_path):
    clip = tmp_path / "clip.mp4"
    done = run(*GENERATE, "-o", str(clip))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress where there is no terminal, no library chatter
    assert str(clip) in done.stdout
    assert "untrained weights" in done.stdout
    with av.open(str(clip)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.width, video.height, video.average_rate) == (64, 32, 25)
        assert (audio.channels, audio.rate) == (2, 44100)
        assert len(list(container.decode(video=0))) == 13
    with av.open(str(clip)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) >= 16 * 1764
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_quiet_says_nothing(tmp_path):
    done = run(*GENERATE, "-q", "-o", str(tmp_path / "clip.mp4"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("generate", ""), "prompt"),
        (("generate", "x", "--duration", "nan"), "duration"),
        (("generate", "x", "--steps", "0"), "num_inference_steps"),
        (("generate", "x", "--resolution", "8k"), "resolution"),
        (("generate", "x", "--resolution", "99999x99999"), "resolution"),
        (("generate", "x", "--speech", "hi", "--language", "xx"), "speech_language"),
        (("generate", "x", "--image", "missing.png"), "image"),
        (("generate", "x", "--audio", "missing.wav"), "audio"),
        (("generate", "x", "--guidance", "3"), "guidance"),
        (("generate", "x", "--model", "/nowhere"), "folder"),
        (("generate", "x", "--device", "tpu"), "device"),
        (("generate", "x", "-o", "/nowhere/clip.mp4"), "output"),
        (("generate", "x", "-o", "clip.avi"), "output"),
        (("convert", "missing.ckpt"), "source"),
        (("bench", "--tokens", "1,2"), "tokens"),
        (("bench", "--tokens", "1,2,x"), "tokens"),
        (("bench", "--tokens", "7,2,1", "--frames", "2"), "frames"),
        (("bench", "--hidden", "100"), "hidden"),
        (("bench", "--rounds", "1"), "rounds"),
        (("bench", "--skip", "eager"), "skip"),
        (("bench", "--html", "/nowhere/report.html"), "file"),
        (("bench", "--json", "."), "file"),
        (("bench", "--device", "cuda"), "device"),
        (("bench", "--resolution", "8k"), "resolution"),
        (("bench", "--resolution", "256p", "--layers", "4"), "layers"),
        (("bench", "--resolution", "256p", "--rounds", "0"), "rounds"),
        (("bench", "--resolution", "256p", "--device", "cpu"), "device"),
        (("bench", "--resolution", "256p", "--tokens", "4,3,2", "--tokens", "8,3,2"), "tokens"),
        (("quantize", "--scheme", "int4"), "scheme"),
        (("quantize", "--budget", "-1"), "budget"),
        (("quantize", "--latent-budget", "nan"), "latent_budget"),
        (("quantize", "--calibrate", "missing.txt"), "calibrate"),
        (("quantize", "--variant", "huge"), "variant"),
        (("quantize", "--device", "tpu"), "device"),
        (("quantize", "--model", "/nowhere"), "folder"),
        (("quantize", "-o", "."), "output"),
        (("quantize", "--html", "/nowhere/report.html"), "file"),
        (("verify", "--tokens", "446,26"), "tokens"),
        (("verify", "--tokens", "0,26,40"), "tokens"),
        (("verify", "--frames", "3"), "frames"),
        (("verify", "--device", "tpu"), "device"),
        (("verify", "--scheme", "fp8", "--device", "cpu"), "scheme"),
        (("explain", "--variant", "huge"), "variant"),
        (("explain", "--tokens", "4,-1,2"), "tokens"),
        (("explain", "--html", "/nowhere/report.html"), "file"),
        (("profile", "--rounds", "2"), "rounds"),
        (("profile", "--trace", "/nowhere/trace.json"), "file"),
        (("profile", "--trace", "trace.txt"), "trace"),
        (("profile", "--device", "tpu"), "device"),
        (("profile", "--variant", "huge", "--device", "cpu"), "variant"),
        (("profile", "--once", "--device", "cpu"), "once"),
        (("profile", "--steps", "3"), "steps"),
        (("profile", "x", "--rounds", "3"), "rounds"),
        (("profile", "x", "--duration", "0"), "duration"),
        (("profile", "x", "--model", "/nowhere"), "folder"),
        (("profile", "x", "--trace", "trace.txt"), "trace"),
        (("profile", "x", "--once", "--device", "cpu"), "once"),
        (("tune", "--resolution", "8k"), "resolution"),
        (("tune", "--op", "fft"), "op"),
        (("tune", "--arch", "sm_70"), "arch"),
        (("tune", "--output", "/nowhere"), "output"),
        (("roofline", "--gpu", "b1"), "gpu"),
        (("roofline", "--resolution", "8k"), "resolution"),
        (("roofline", "--tokens", "7,2,1", "--frames", "2"), "frames"),
        (("roofline", "--tokens", ""), "tokens"),
        (("roofline", "--frames", "2"), "frames"),
        (("memory", "--resolution", "8k"), "resolution"),
        (("memory", "--duration", "0"), "duration"),
        (("memory", "--target", "cpu"), "target"),
        (("memory", "--variant", "540p_sr"), "model"),
        (("memory", "--model", "/nowhere"), "folder"),
        (("memory", "--device-memory", "much"), "device_memory"),
        (("generate", "x", "--device-memory", "0GB"), "device_memory"),
        (("generate", "x", "--device-memory", "1MB"), "model distill"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, field, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"horsepower: {field}: got ")
    assert ", allowed: " in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("generate", "x", "--fast"), ("generate", "x", "--steps", "abc"), ("generate",), ("nonsense",), ()]
)
def test_what_cannot_be_parsed_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("horsepower: ")


def test_bench_reports_in_three_forms(tmp_path):
    size = ("--tokens", "4,3,2", "--hidden", "128", "--layers", "1", "--rounds", "3")
    skipped = ("whole", "regional", "plan", "fuse_gate", "fuse_qkv", "fuse_activation", "fp8-weights")
    files = ("--json", str(tmp_path / "bench.json"), "--html", str(tmp_path / "bench.html"))
    done = run("bench", *size, *(word for name in skipped for word in ("--skip", name)), *files)
    assert (done.returncode, done.stderr) == (0, "")
    assert "OMP_WAIT_POLICY PASSIVE" in done.stdout
    (table,) = json.loads((tmp_path / "bench.json").read_text())["tables"]
    assert [row["rung"] for row in table["rows"]] == ["eager", "+ fuse_add_norm (all)"]
    assert all(row["rung"] in done.stdout for row in table["rows"])
    assert "</svg>" in (tmp_path / "bench.html").read_text()


def test_bench_of_the_full_size_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preset_step, "released", lambda name: DiT(TINY, device="meta"))
    assert cli.main(("bench", "--resolution", "540p", "--tokens", "12,5,4", "--frames", "2")) == 0
    said = capsys.readouterr().out
    assert "Nothing was measured: this machine has no GPU." in said
    assert "540p_sr, 12,5,4 tokens in 2 frames, on one NVIDIA H100" in said
    assert "The ladder of a step" in said
    assert "The plan's kernels" not in said


def test_bench_of_the_full_size_on_a_gpu(monkeypatch, capsys):
    """Played: the CPU stands for the GPU."""
    from horsepower import measuring

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preset_step, "released", lambda name: DiT(TINY, device="meta"))
    monkeypatch.setattr(measuring, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(measuring, "indexed", lambda device: torch.device("cpu"))
    climb = measuring.full.climb

    def climbed(*arguments):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        return climb(*arguments)

    monkeypatch.setattr(measuring.full, "climb", climbed)
    words = ("--quick", "--tokens", "12,5,4", "--frames", "2", "--rounds", "3")
    assert cli.main(("bench", "--resolution", "1080p", "--device", "cuda", *words)) == 0
    said = capsys.readouterr().out
    assert "One velocity step of 1080p_sr at full size, 12,5,4 tokens in 2 frames" in said
    assert "+ fuse_add_norm (all)" in said
    assert "plan without fusion" not in said


def test_nobody_reads(tmp_path):
    """A closed pipe is not a traceback."""
    command = [sys.executable, "-m", "horsepower.cli", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_an_interrupt_leaves_nothing(tmp_path):
    arguments = [*GENERATE, "--steps", "3", "-o", str(tmp_path / "clip.mp4")]
    code = (
        "import sys, signal, horsepower.runtime.watch as w; from horsepower.cli import main; real = w.Watch.steps\n"
        "def steps(self, stage, count):\n"
        "    for i in real(self, stage, count):\n"
        "        if stage == 'base' and i == 1: signal.raise_signal(signal.SIGINT)\n"
        "        yield i\n"
        "w.Watch.steps = steps\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "horsepower: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_heavy():
    code = "import sys; from horsepower.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'av', 'PIL', 'diffusers', 'transformers') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "generate" in said
    assert said.endswith("[]\n")


def test_progress_is_one_line_a_stage(capsys):
    from horsepower import Progress

    for step in range(3):
        terminal.show(Progress("base", step, 2))
    shown = capsys.readouterr().err
    assert shown.count("\r") == 3
    assert shown.count("\n") == 1
    assert shown.endswith("2/2\n")


@pytest.fixture
def small(monkeypatch):
    """The preset's commands on a model of one layer."""
    config = replace(TINY, num_layers=1, mm_layers=(0,), gelu7_layers=())
    monkeypatch.setattr(preset_step, "preset", lambda name, device="cpu": random_model(config))


FILES = ("--json", "report.json", "--html", "report.html")
REPORTS = ("--tokens", "12,5,3", "--frames", "3", *FILES)


def test_verify_passes_and_writes_its_reports(small, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(("verify", *REPORTS)) == 0
    said = capsys.readouterr().out
    assert re.search(r"all \d+ checks passed", said)
    assert re.search(r"fuse_gate +block\.layers\.0\.attention", said)
    assert re.search(r"End to end at 12,5,3 tokens: .*: passed", said)
    tables = {table["title"]: table["rows"] for table in json.loads(Path("report.json").read_text())["tables"]}
    assert tables.keys() == {"Sites", "Every check"}
    assert {row["inputs"] for row in tables["Every check"]} >= {"as in the model", "denormal", "zero rows"}
    assert all(row["passed"] is True for row in tables["Every check"])
    assert "fuse_qkv" in Path("report.html").read_text()


def test_verify_under_a_scheme_says_what_its_codes_cost(small, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(("verify", "--scheme", "fp8-weights", *REPORTS)) == 0
    assert re.search(r"a step +1 +output 0 .* 0\.1 +passed", capsys.readouterr().out)
    tables = {table["title"]: table["rows"] for table in json.loads(Path("report.json").read_text())["tables"]}
    distances = tables["Distance of fp8-weights from 16 bits"]
    assert sum(row["sites"] for row in distances if row["of"] != "a step") == 4
    assert all(row["16 bits"] < row["scheme"] <= row["budget"] for row in distances)


def test_verify_fails_with_exit_code_1_and_names_the_site(small, capsys, monkeypatch):
    def unclamped(out, scratch, u, kind, dtype):
        a, b = u.float()[:, 0::2], u.float()[:, 1::2]
        out[0].copy_(a * torch.sigmoid(1.702 * a) * (b + 1))

    op = OPS["activation"]
    wrong = Kernel("wrong", op.kernels[0].supports, unclamped)
    monkeypatch.setitem(OPS, "activation", replace(op, kernels=(wrong,)))
    assert cli.main(("verify", "--tokens", "12,5,3")) == 1
    said = capsys.readouterr().out
    assert re.search(r"\d of \d+ checks FAILED", said)
    failed = said[said.index("\nFailed\n") :]
    assert re.search(r"fuse_activation +block\.layers\.0\.mlp .* huge", failed)
    assert "attention" not in failed


def test_a_site_that_cannot_run_is_reported_without_an_error(small, capsys, tmp_path, monkeypatch):
    def broken(out, scratch, *inputs):
        if inputs[0].abs().max() < 1e-10:
            raise RuntimeError("too small")
        return out[0].fill_(torch.nan)

    op = OPS["rms_norm"]
    monkeypatch.setitem(OPS, "rms_norm", replace(op, kernels=(Kernel("wrong", lambda *_: None, broken),)))
    monkeypatch.chdir(tmp_path)
    assert cli.main(("verify", *REPORTS)) == 1
    assert re.search(r"End to end .*: FAILED", capsys.readouterr().out)
    report = json.loads(Path("report.json").read_text(), parse_constant=pytest.fail)  # JSON knows no infinity
    (rows,) = (table["rows"] for table in report["tables"] if table["title"] == "Every check")
    failed = {
        row["note"]: row["error(fused)"] for row in rows if not row["passed"] and row["rewrite"] == "raise_rms_norm"
    }
    assert failed == {"too small": None, "non-finite where eager is not": None}


def test_explain_says_what_is_fused_and_what_is_refused(small, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(("explain", *REPORTS)) == 0
    said = capsys.readouterr().out
    assert re.search(r"block\.layers 0 +fuse_qkv +1 +linear \+ qk_norm_rope +3 linear, ", said)
    assert re.search(r"raise_linear +it has a bias +2 +adapter\.video_embedder", said)
    assert json.loads(Path("report.json").read_text())["title"].endswith("at 12,5,3 tokens in 3 frames")
    page = Path("report.html").read_text()
    assert page.count("<svg") == 2
    assert "linear_qkv.weight" in page


def test_profile_says_where_a_step_spends_its_time(small, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(("profile", *REPORTS, "--rounds", "3", "--device", "cpu", "--trace", "trace.json")) == 0
    said = capsys.readouterr().out
    assert re.search(r"attention +1 ", said)
    assert "No telemetry of a GPU: " in said
    assert "--tokens 12,5,3 --frames 3" in said
    tables = {table["title"]: table["rows"] for table in json.loads(Path("report.json").read_text())["tables"]}
    assert {"attention", "activation", "(outside of entries)"} <= {row["entry"] for row in tables["By kind of entry"]}
    assert "block.layers.0" in {row["block"] for row in tables["By block"]}
    ranges = {event.get("name") for event in json.loads(Path("trace.json").read_text())["traceEvents"]}
    assert {row["entry"] for row in tables["The slowest entries"]} <= ranges
    assert Path("report.html").read_text().count("<svg") == 2


def test_profile_of_a_clip_says_what_each_phase_takes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = ("--resolution", "64x32", "--duration", "0.6", "--steps", "2", "--device", "cpu")
    assert cli.main(("profile", "A horse galloping", *clip, "--trace", "trace.json", *FILES)) == 0
    said = capsys.readouterr().out
    assert "profile of a clip of 0.6 s at 64x32" in said
    assert "No telemetry of a GPU: " in said
    assert "horsepower profile 'A horse galloping' --once --resolution 64x32" in said
    tables = {table["title"]: table["rows"] for table in json.loads(Path("report.json").read_text())["tables"]}
    phases = tables["Phases"]
    assert [row["phase"] for row in phases] == ["text", "base", "video", "audio", "mux", "(between them)"]
    assert [row["steps"] for row in phases] == [1, 2, 1, 1, 1, None]
    assert sum(row["% of the clip"] for row in phases) == pytest.approx(100)
    assert all(row["seconds"] > 0 and row["seconds with ranges"] > 0 for row in phases)
    kinds = tables["By kind of entry, base"]
    base = 1e3 * phases[1]["seconds with ranges"]
    assert 0 < sum(row["ms in 2 steps"] for row in kinds) <= base
    assert {row["entry"]: row["calls"] for row in kinds}["attention"] == 40
    events = [event for event in json.loads(Path("trace.json").read_text())["traceEvents"] if "dur" in event]
    clip, base = (next(event for event in events if event["name"] == name) for name in ("clip", "phase base"))
    phases = [event for event in events if event["name"].startswith("phase ")]
    assert {event["name"] for event in phases} >= {"phase text", "phase video", "phase audio", "phase mux"}
    assert all(_holds(clip, event) for event in phases)
    steps = [event for event in events if event["name"] == "denoising step"]
    entries = [event for event in events if event["name"] == tables["The slowest entries, base"][0]["entry"]]
    assert (len(steps), len(entries)) == (2, 2)
    assert all(_holds(base, step) and _holds(step, entry) for step, entry in zip(steps, entries, strict=True))
    assert Path("report.html").read_text().count("<svg") == 3


def _holds(outer, inner):
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_roofline_says_what_a_step_must_take_and_that_nothing_was_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preset_step, "released", lambda name: DiT(TINY, device="meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(("roofline", "--gpu", "a100", *REPORTS)) == 0
    said = capsys.readouterr().out
    assert "distill, 12,5,3 tokens in 3 frames, on one NVIDIA A100" in said
    assert "max(FLOPs / rate of its unit, bytes / bandwidth)" in said
    assert "Measured times are missing: this machine has no GPU" in said
    tables = {table["title"]: table["rows"] for table in json.loads(Path("report.json").read_text())["tables"]}
    rungs, kernels = tables["The ladder of a step"], tables["The plan's kernels"]
    names = ["eager", "chains fused", "parts", "plan", "plan, fp8-weights"]
    assert [rung["compiled so"] for rung in rungs] == names
    assert sum(row["runs"] for row in kernels) == rungs[3]["kernels"]
    assert sum(row["all of them ms"] for row in kernels) == pytest.approx(rungs[3]["predicted ms"])
    assert {row["measured us"] for row in kernels} == {None}
    assert Path("report.html").read_text().count("<svg") == 1


def test_memory_is_stated_phase_by_phase(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ReleasedSizes, "config", lambda self, name: TINY)
    assert cli.main(("memory", "--resolution", "540p", "--duration", "1", "--device-memory", "24GiB", *FILES)) == 0
    said = capsys.readouterr().out
    assert "Memory of a clip of 1 s at 896x512 on sm_90, as released" in said
    assert "within 25.8 GB, as asked for" in said
    (table,) = json.loads(Path("report.json").read_text())["tables"]
    assert [row["phase"] for row in table["rows"]] == ["text", "base", "super-resolution", "video", "audio"]
    assert all(0 < row["activations"] < row["sum"] < 25.8 for row in table["rows"])
    assert "GB in each phase" in Path("report.html").read_text()


@pytest.mark.parametrize(
    ("text", "size"), [("40GB", 40 * 10**9), ("37.5GiB", 75 * 2**29), ("7MB", 7_000_000), ("12", 12), (None, None)]
)
def test_sizes_with_units(text, size):
    assert commands._size(text) == size


def test_tune_without_a_gpu_says_what_it_would_measure_and_that_it_did_not(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preset_step, "released", lambda name: DiT(TINY, device="meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    where = ("--resolution", "256p", "--output", ".", "--arch", "sm_80", "--json", "report.json")
    assert cli.main(("tune", *where)) == 0
    assert "Nothing was measured and nothing written: this machine has no GPU" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    tables = {table["title"]: table["rows"] for table in json.loads(Path("report.json").read_text())["tables"]}
    assert {row["kernel"] for row in tables["Candidates"] if row["op"] == "linear_activation"} == {"triton", "parts"}
    assert {row["op"] for row in tables["Choices"]} >= {"linear_activation", "linear", "activation", "attention"}
    assert {row["chosen as"] for row in tables["Choices"]} <= {"predicted", ""}
    assert {row["tokens"] for row in tables["Choices"] if row["op"] == "attention"} == {4110}


def test_tune_writes_the_tables_of_what_ran(capsys, tmp_path, monkeypatch):
    """With the CPU in a GPU's place: Triton's kernels refuse it, the parts run."""
    from horsepower import tuning

    def on_the_cpu(jobs, arch, machine, folder, timer, say):
        said = tune(jobs, arch, machine, folder, lambda runs: {way: [1e-6, 2e-6, 3e-6] for way in runs}, "cpu", say)
        assert timer is tuning.cuda_timer
        return said

    tune = tuning.tune
    for name, stand_in in {
        "tune": on_the_cpu, "target_of": lambda device: "sm_90", "machine": lambda device: "a GPU",
        "_machine": lambda: {"gpu": "a GPU"},
    }.items():  # fmt: skip
        monkeypatch.setattr(tuning, name, stand_in)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preset_step, "released", lambda name: DiT(TINY, device="meta"))
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "tokens_of", lambda resolution: preset_step.Tokens(12, 5, 3, 3))
    where = ("--resolution", "256p", "--op", "linear_activation", "--output", ".", "--json", "report.json")
    assert cli.main(("tune", "--arch", "sm_80", *where)) == 2
    assert "arch: got 'sm_80', allowed: sm_90" in capsys.readouterr().err
    assert cli.main(("tune", *where)) == 0
    assert "Written to .: linear_activation.sm_90.json." in capsys.readouterr().out
    stored = json.loads(Path("linear_activation.sm_90.json").read_text())
    assert (stored["machine"], {point["tokens"] for points in stored["sites"].values() for point in points}) == (
        {"gpu": "a GPU"},
        {20},
    )
    (rows,) = (table["rows"] for table in json.loads(Path("report.json").read_text())["tables"])
    said = {(row["candidate"].split()[0], row["median us"], row[""]) for row in rows}
    assert said == {("parts", 2.0, "the fastest"), ("triton", None, "not on a GPU")}


def test_explain_for_a_gpu_says_how_each_site_was_chosen(small, capsys):
    assert cli.main(("explain", "--target", "sm_90", "--tokens", "12,5,3", "--frames", "3")) == 0
    said = capsys.readouterr().out
    choices = said[said.index("\nChoices\n") :]
    assert re.search(r"linear_activation +20 +1 +triton BM=.* predicted +parts .* ms, fused .* ms", choices)
    assert "parts  " not in choices  # what is a part now is listed by itself


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for part in ("torch", "gpu", "driver", "triton", "native kernels", "diffusers"):
        assert part in said
    missing = doctor._package("no-such-package", "nothing", "nothing is lost")
    assert (missing.found, missing.means) == ("", "nothing is lost")
