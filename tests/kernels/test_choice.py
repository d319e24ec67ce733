"""What is predicted without a table, what a table changes, and what no table may say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import horsepower.kernels.ops  # noqa: F401  (every operator is registered now)
from horsepower.kernels import tables
from horsepower.kernels.choice import candidates, choose, predicted
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.rates import OF_TARGET
from horsepower.kernels.registry import OPS, Kernel
from horsepower.kernels.tables import PARTS, Candidate, Point, Site, Table, Timed
from horsepower.kernels.transpose_to_codes import turned

BF16 = torch.bfloat16
SM_90 = {"gpu": "a GPU", "date": "2026-01-01"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where tables are read instead of the package."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    return tmp_path


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def up(tokens=4096, width=1024, depth=512, experts=1):
    """Of linear_activation."""
    counts = [tokens - 2, 1, 1]
    return meta(tokens, depth), meta(experts * width, depth), experts, counts, "silu", BF16


def down(tokens=4096, depth=1024, columns=512):
    """Of linear_add_rms_norm."""
    residual, gain = meta(tokens, columns, dtype=torch.float32), meta(columns, dtype=torch.float32)
    return meta(tokens, depth), meta(columns, depth), 1, residual, None, gain, [], 1e-6, BF16


def attention(tokens=64, window=-1):
    q, k, v = (meta(tokens, heads, 128) for heads in (2, 1, 1))
    return q, k, v, None, 1, [], 4, tokens // 2, window


def point(tokens, **us):
    """Times of candidates by their kernels; of Triton's configurations in their order."""
    timed = []
    for kernel, times in us.items():
        names = tables.configs("linear_activation", "sm_90") if kernel == "triton" else (None,)
        medians = times if isinstance(times, tuple) else (times,)
        timed += [
            Timed(Candidate(kernel, name), failed="out of resources")
            if t is None
            else Timed(Candidate(kernel, name), (t, t, t))
            for name, t in zip(names, medians, strict=False)
        ]
    return Point(tokens, tuple(timed))


def store(folder, op, inputs, *points):
    tables.write(Table(op, "sm_90", SM_90, {Site.of(OPS[op], inputs).key: points}), folder)


def test_a_site_does_not_change_with_the_prompt():
    op = OPS["linear_activation"]
    first, second = Site.of(op, up(4096, experts=3)), Site.of(op, up(77, experts=3))
    assert first.key == second.key
    assert (first.tokens, second.tokens) == (4096, 77)
    changed = [up(width=1032), up(depth=520), up(experts=3), (*up()[:4], "gelu7", BF16), (*up()[:5], torch.float32)]
    assert len({Site.of(op, inputs).key for inputs in (up(), *changed)}) == 6
    windows = {Site.of(OPS["attention"], attention(window=window)).key for window in (-1, 11)}
    assert len(windows) == 2
    codes = {Site.of(OPS["attention"], attention_of_codes(tokens)).key for tokens in (64, 65, 80)}
    assert len(codes) == 1
    assert not codes & windows


def attention_of_codes(tokens):
    q, k, _, *rest = attention(tokens)
    q, k = (torch.empty(x.shape, dtype=E4M3, device="meta") for x in (q, k))
    return q, k, torch.empty(turned(k.shape), dtype=E4M3, device="meta"), *rest, None, torch.empty(2, device="meta")


def test_a_prediction_is_the_roofline():
    """By hand: 512 x 1024 products, then 1024 columns read and written in bfloat16."""
    rates, tokens = OF_TARGET["sm_80"].reached, 4096
    product = 2 * tokens * 1024 * 512
    read, written = tokens * 512 * 2 + 1024 * 512 * 2, tokens * 1024 * 2
    assert predicted(OPS["linear_activation"], up(), "sm_80", "triton") == pytest.approx(
        max(product / rates.matrix / OF_TARGET["sm_80"].triton, (read + written) / rates.memory)
    )
    assert predicted(OPS["linear_activation"], up(), "sm_80", PARTS) == pytest.approx(
        max(product / rates.matrix, (read + written) / rates.memory) + 2 * written / rates.memory
    )
    # a norm after a projection is a second launch: the sum is read once more
    fused = predicted(OPS["linear_add_rms_norm"], down(), "sm_80", "triton")
    moved = tokens * 1024 * 2 + 512 * 1024 * 2 + tokens * 512 * 4 + 512 * 4
    results = tokens * 512 * (4 + 2)
    assert fused == pytest.approx(
        max(product / rates.matrix, (moved + results) / rates.memory) + results / rates.memory
    )


def test_without_a_table_the_shorter_prediction_is_chosen(folder, monkeypatch):
    op = OPS["linear_activation"]
    fused = choose(op, up(), "sm_90")
    assert fused.source == "predicted"
    assert not fused.parts
    assert fused.candidate == candidates(op, "sm_90")[0]
    times = [f"{1e3 * predicted(op, up(), 'sm_90', name):.3g} ms" for name in (PARTS, "triton")]
    assert fused.why == f"parts {times[0]}, fused {times[1]}"
    slow = replace(OF_TARGET["sm_90"], triton=0.01)
    monkeypatch.setitem(OF_TARGET, "sm_90", slow)
    assert choose(op, up(), "sm_90").parts
    assert not choose(op, up(), "sm_90", whole=True).parts
    assert choose(OPS["rms_norm"], (meta(4, 8), None, 1, [], 1e-6, BF16), "sm_90").why == "the only kernel"
    assert "flash_attention_3, triton" in choose(OPS["attention"], attention(), "sm_90").why
    assert choose(OPS["attention"], [x.float() if torch.is_tensor(x) else x for x in attention()], "sm_90") is None


def test_what_was_measured_decides_and_the_nearest_tokens_do(folder):
    op = OPS["linear_activation"]
    store(folder, op.name, up(), point(4096, triton=(5.0, 4.0), parts=3.0), point(64, triton=(1.0, 2.0), parts=3.0))
    large, small = choose(op, up(9000), "sm_90"), choose(op, up(100), "sm_90")
    assert large.parts
    assert choose(op, up(9000), "sm_90", whole=True).candidate == candidates(op, "sm_90")[1]
    assert str(large) == "measured: triton 0.004 ms, parts 0.003 ms at 4096 tokens"
    assert small.candidate == Candidate("triton", next(iter(tables.configs(op.name, "sm_90"))))
    assert choose(op, up(500), "sm_90").candidate.kernel == "triton"  # 7.8 times 64; 4096 is 8.2 times as much
    assert choose(op, up(525), "sm_90").parts
    assert choose(op, up(0), "sm_90").candidate == small.candidate
    assert choose(op, up(width=1032), "sm_90").source == "predicted"
    assert choose(op, up(), "sm_80").source == "predicted"


def test_what_failed_is_never_chosen(folder):
    op = OPS["linear_activation"]
    store(folder, op.name, up(), point(4096, triton=(None, 4.0), parts=5.0))
    assert choose(op, up(), "sm_90").candidate == Candidate("triton", list(tables.configs(op.name, "sm_90"))[1])
    store(folder, op.name, up(), point(4096, triton=(None, None), parts=None))
    assert choose(op, up(), "sm_90").source == "predicted"


def on(device, monkeypatch):
    """Let tensors count as lying on a GPU."""
    monkeypatch.setattr(tables, "_arch_of", lambda inputs: device)


def test_a_kernel_is_called_in_the_fastest_configuration(folder, monkeypatch):
    op, ran = OPS["linear_activation"], []
    from horsepower.kernels.gpu import linear_activation as twin

    monkeypatch.setattr(twin, "run", lambda *_, config: ran.append(config))
    on("sm_90", monkeypatch)
    kernel = op.kernels[0]
    kernel.run((), None, *up())
    store(folder, op.name, up(), point(4096, triton=(5.0, 4.0), parts=3.0))
    kernel.run((), None, *up())
    assert ran == [None, twin.CONFIGS["sm_90"][1]]


def test_kernels_are_asked_in_the_order_of_their_times(folder, monkeypatch):
    def kernel(name, refused=None):
        return Kernel(name, lambda *_: refused, lambda *_: None, devices=("cuda",))

    op = replace(OPS["attention"], kernels=tuple(map(kernel, ("flash_attention_3", "cudnn", "torch_flash"))))
    store(folder, "attention", attention(window=11), point(64, torch_flash=1.0, cudnn=2.0, flash_attention_3=None))
    assert op.kernel(*attention(window=11)).name == "flash_attention_3"  # not on a GPU: as it is predicted
    on("sm_90", monkeypatch)
    tables._READ.clear()
    assert op.kernel(*attention(window=11)).name == "torch_flash"
    assert op.kernel(*attention()).name == "flash_attention_3"
    refusing = replace(op, kernels=(*op.kernels[:2], kernel("torch_flash", "not this one")))
    assert refusing.kernel(*attention(window=11)).name == "cudnn"


def changed(path, *where, to):
    """Store a table with one value changed."""
    stored = json.loads(path.read_text())
    at = stored
    for step in where[:-1]:
        at = next(iter(at.values())) if step == "site" else at[step]
    at[where[-1]] = to
    path.write_text(json.dumps(stored))


CANDIDATE = ("sites", "site", 0, "candidates", 0)


@pytest.mark.parametrize(
    ("where", "value", "field"),
    [
        (("op",), "linear", "op"),
        (("arch",), "sm_80", "arch"),
        (("sites",), [], "sites"),
        (("machine",), "H100", "machine"),
        (("more",), 1, "fields"),
        (("sites", "site", 0, "tokens"), 0, "tokens"),
        (("sites", "site", 0, "tokens"), True, "tokens"),
        ((*CANDIDATE, "config"), "BM=7 warps=8 stages=1", "config"),
        ((*CANDIDATE, "config"), None, "config"),
        ((*CANDIDATE, "kernel"), "cutlass", "kernel"),
        ((*CANDIDATE, "us"), [3.0, 2.0, 4.0], "us"),
        ((*CANDIDATE, "us"), [1.0, 2.0], "us"),
        ((*CANDIDATE, "us"), [-1.0, 2.0, 3.0], "us"),
        ((*CANDIDATE, "failed"), "why", "candidate"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(folder, where, value, field):
    op = OPS["linear_activation"]
    store(folder, op.name, up(), point(4096, triton=(1.0, 2.0), parts=3.0))
    changed(folder / "linear_activation.sm_90.json", *where, to=value)
    said = rf"linear_activation\.sm_90\.json: {field}: got .*, allowed: .*; run `horsepower tune` again"
    with pytest.raises(ValueError, match=said):
        choose(op, up(), "sm_90")


def test_a_table_is_read_back_as_it_was_written(folder):
    op = OPS["linear_activation"]
    points = point(64, triton=(1.5, None), parts=2.0), point(4096, parts=2.0)
    store(folder, op.name, up(), *points)
    found = tables.table(op, "sm_90")
    assert found == Table(op.name, "sm_90", SM_90, {Site.of(op, up()).key: points})
    assert [path.name for path in folder.iterdir()] == ["linear_activation.sm_90.json"]
    (folder / "linear_activation.sm_90.json").write_text("{")
    tables._READ.clear()
    with pytest.raises(ValueError, match=r"linear_activation\.sm_90\.json: file: got .*, allowed: JSON"):
        tables.table(op, "sm_90")


def test_what_is_checked_in_fits_the_kernels():
    for path in (Path(tables.__file__).parent / "tuned").glob("*.json"):
        name, arch, _ = path.name.split(".")
        assert tables.parse(path.read_text(), OPS[name], arch, path.name).sites


def test_every_way_to_compute_an_operator():
    assert [str(each) for each in candidates(OPS["linear"], "sm_90")][:3] == [
        "library",
        "scaled_mm",
        f"triton {next(iter(tables.configs('linear', 'sm_90')))}",
    ]
    assert candidates(OPS["linear_qk_norm_rope"], "sm_80")[-1] == Candidate(PARTS)
    assert candidates(OPS["rope"], "sm_90") == ()
    codes = meta(4, 16).to(torch.float8_e4m3fn), meta(16, 16).to(torch.float8_e4m3fn)
    for inputs, form in ((codes, "fp8"), ((meta(4, 16), codes[1]), "w8a16"), ((meta(4, 16), meta(16, 16)), "BM=")):
        tried = [each.config for each in candidates(OPS["linear"], "sm_90", inputs) if each.config]
        assert tried
        assert all(config.startswith(form) for config in tried)
    assert candidates(OPS["quantise"], "sm_80") == ()
    assert choose(OPS["quantise"], (meta(4, 16),), "sm_80") is None
    assert {each.kernel for each in candidates(OPS["attention"], "sm_90")} == {
        kernel.name for kernel in OPS["attention"].kernels if "cuda" in kernel.devices
    }
