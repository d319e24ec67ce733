"""The command line, in a process of its own where that matters."""

import json
import subprocess
import sys

import av
import pytest

from horsepower import cli, doctor


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
    skipped = ("whole", "regional", "plan", "fuse_gate", "fuse_qkv", "fuse_activation")
    files = ("--json", str(tmp_path / "bench.json"), "--html", str(tmp_path / "bench.html"))
    done = run("bench", *size, *(word for name in skipped for word in ("--skip", name)), *files)
    assert (done.returncode, done.stderr) == (0, "")
    assert "OMP_WAIT_POLICY PASSIVE" in done.stdout
    (table,) = json.loads((tmp_path / "bench.json").read_text())["tables"]
    assert [row["rung"] for row in table["rows"]] == ["eager", "+ fuse_add_norm (all)"]
    assert all(row["rung"] in done.stdout for row in table["rows"])
    assert "</svg>" in (tmp_path / "bench.html").read_text()


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
        cli._show(Progress("base", step, 2))
    shown = capsys.readouterr().err
    assert shown.count("\r") == 3
    assert shown.count("\n") == 1
    assert shown.endswith("2/2\n")


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for part in ("torch", "gpu", "driver", "triton", "native kernels", "diffusers"):
        assert part in said
    missing = doctor._package("no-such-package", "nothing", "nothing is lost")
    assert (missing.found, missing.means) == ("", "nothing is lost")
