"""Plans on disk: found without tracing, and never believed without reason."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import horsepower
from horsepower.graph import key, passes
from horsepower.runtime import cache, compiled
from horsepower.runtime.fused import FusedDiT
from horsepower.runtime.models import dit
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL
from models import DYNAMIC, TINY, random_inputs, random_model, variant
from recordings import relative_error

INPUTS = (*random_inputs(TINY, 3, 2, 5, 4), 3)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "plans"))
    return tmp_path / "plans"


def made(model, **options):
    return horsepower.compile(model, INPUTS, dynamic_shapes=DYNAMIC, **options)


def check(run, model):
    inputs = (*random_inputs(TINY, 2, 5, 3, 6), 2)
    with torch.no_grad():
        assert max(map(relative_error, run(*inputs), model(*inputs))) < 0.02


def test_three_blocks_are_traced_and_none_when_the_plan_is_kept(monkeypatch):
    model = DiT(FOAL, device="meta")
    first = FusedDiT(model).compiled
    assert (first.found, first.plan.traced) == (False, 3)
    monkeypatch.setattr(compiled, "capture", None)
    again = FusedDiT(model).compiled
    assert again.found
    assert str(again.plan) == str(first.plan)


def test_a_kept_plan_is_the_plan(monkeypatch):
    model = random_model(TINY)
    first = made(model)
    monkeypatch.setattr(compiled, "capture", None)
    second = made(model)
    assert str(second.plan) == str(first.plan)
    assert second.plan.sites == first.plan.sites
    inputs = (*random_inputs(TINY, 2, 5, 3, 6), 2)
    assert all(torch.equal(a, b) for a, b in zip(first(*inputs), second(*inputs), strict=True))
    other = random_model(TINY, seed=1)  # a plan knows no weights
    check(made(other), other)
    with pytest.raises(ValueError, match="expect: got 5 sites of fuse_add_norm, allowed: 6"):
        made(model, expect={"fuse_add_norm": 6})


def test_another_process_finds_it(folder):
    code = (
        "from horsepower.runtime.fused import FusedDiT; from horsepower.runtime.models.dit import DiT;"
        "from horsepower.runtime.presets import FOAL; from dataclasses import replace;"
        "print(FusedDiT(DiT(replace(FOAL, num_layers=5, mm_layers=(0,), gelu7_layers=(0,)))).compiled.found)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]
    assert runs == [["False"], ["True"]]
    assert len(list(folder.iterdir())) == 1


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A file of a plan: its name, its text, and the structure of the inputs."""
    place = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.FOLDER, str(place))
        run = made(random_model(TINY))
    (file,) = place.iterdir()
    return file.name, file.read_text(), run.plan.contract.spec


def _rewritten(change):
    """A file with a plan that was changed and its digest made right again."""

    def damage(file):
        head, _, body = file.read_text().partition("\n")
        body = json.dumps(change(json.loads(body)))
        digest = hashlib.sha256(body.encode()).hexdigest()
        file.write_text(json.dumps({**json.loads(head), "sha256": digest}) + "\n" + body)

    return damage


def _set(call, **values):
    def change(plan):
        plan["calls"][call].update(values)
        return plan

    return change


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


SPEC = {"shape": [1], "strides": [1], "dtype": "float32", "device": "cpu"}
DAMAGE = {
    "cut off": lambda file: file.write_text(file.read_text()[:1000]),
    "empty": lambda file: file.write_text(""),
    "a bit": _flip,
    "no text": lambda file: file.write_bytes(b"\xff\x00" * 100),
    "another key": lambda file: file.write_text(file.read_text().replace(file.stem, "0" * 64, 1)),
    "no plan": _rewritten(lambda plan: [plan]),
    "a list of calls": _rewritten(lambda plan: {**plan, "calls": 3}),
    "unknown operator": _rewritten(_set(0, target="aten.no_such_thing.default")),
    "a python function": _rewritten(_set(0, target="os.system")),
    "a builtin": _rewritten(_set(0, target="torch.load")),
    "in place": _rewritten(_set(0, target="aten.add_.Tensor")),
    "out of order": _rewritten(_set(0, args=[{"ref": "linear_9999"}])),
    "odd dtype": _rewritten(_set(0, args=[{"dtype": "load"}])),
    "odd size": _rewritten(
        _set(0, spec={"shape": ["__import__('os')"], "strides": [1], "dtype": "float32", "device": "cpu"})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_damaged_or_foreign_is_reported(folder, caplog, kept, damage):
    name, good, spec = kept
    folder.mkdir()
    file = folder / name
    file.write_text(good)
    assert cache.find(file.stem, spec) is not None
    damage(file)
    with caplog.at_level(logging.WARNING, "horsepower"):
        assert cache.find(file.stem, spec) is None
    assert "cannot be used and is made anew" in caplog.text


def test_a_damaged_file_is_made_anew(folder, kept):
    name, good, _ = kept
    folder.mkdir()
    (folder / name).write_text(good[:-100])
    model = random_model(TINY)
    run = made(model)
    assert not run.found
    check(run, model)
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [(name, good)]


def test_weights_of_another_shape_in_the_file_raise(folder):
    model = random_model(TINY)
    made(model)
    (file,) = folder.iterdir()

    def change(plan):
        plan["weights"][0][2]["shape"][0] += 1
        return plan

    _rewritten(change)(file)
    with pytest.raises(ValueError, match="weight: got .* allowed"):
        made(model)


def _no_gate(self, o, per_token, counts):
    return o


CHANGES = {
    "torch": lambda patch: patch.setattr(torch, "__version__", "9.9.9"),
    "kernel source": lambda patch: patch.setattr(key, "_own_sources", lambda: "another"),
    "instruction set": lambda patch: patch.setattr(key, "ISAS", ("mmx",)),
    "constant": lambda patch: patch.setattr(dit, "EPS", 1e-3),
    "method": lambda patch: patch.setattr(dit.Attention, "gated", _no_gate),
    "function": lambda patch: patch.setattr(dit, "rotate", lambda x, rope: x),
    "default dtype": lambda patch: patch.setattr(torch, "get_default_dtype", lambda: torch.float64),
}


def key_now(model, **options):
    given = {"shapes": DYNAMIC, "method": "forward", "only": passes.PASSES, "inputs": INPUTS, **options}
    return key.key_of(model, given["inputs"], {}, given["shapes"], given["method"], given["only"])


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_plan_changes_the_key(monkeypatch, change):
    model = random_model(TINY)
    before = key_now(model)
    assert key_now(random_model(TINY, seed=1)) == before
    change(monkeypatch)
    assert key_now(model) != before


def test_a_method_replaced_later_is_what_runs(monkeypatch):
    model = random_model(TINY)
    made(model)
    monkeypatch.setattr(dit.Attention, "gated", _no_gate)
    run = made(model)
    assert not run.found
    check(run, model)


def test_other_attributes_shapes_and_inputs_are_other_plans():
    model, local = random_model(TINY), random_model(TINY)
    local.block.layers[1].attention.local = True
    tied = random_model(TINY)
    tied.block.layers[1].mlp.pre_norm.weight = tied.block.layers[1].attention.pre_norm.weight
    keys = [
        *map(key_now, (model, local, tied, random_model(TINY, torch.float32), random_model(TINY).train())),
        *(key_now(random_model(c)) for c in (variant("windowed"), variant("post_norm"), replace(TINY, head_dim=32))),
        key_now(model, shapes=None),
        key_now(model, method="velocity"),
        key_now(model, only=passes.PASSES[:2]),
        key_now(model, inputs=(*INPUTS[:4], 4)),
        key_now(model, inputs=(INPUTS[0][1:], *INPUTS[1:])),
        key_now(model, inputs=(INPUTS[0].double(), *INPUTS[1:])),
    ]
    assert len(set(keys)) == len(keys)


def test_the_cache_can_be_left_alone(folder):
    x = torch.ones(3)
    assert not horsepower.compile(nn.Identity(), (x,), cache=False).found
    assert not folder.exists()


def test_what_has_no_key_is_compiled_and_not_kept(folder, caplog):
    class Odd(nn.Module):
        def __init__(self, what):
            super().__init__()
            self.what = what

        def forward(self, x):
            return x * 2

    x = torch.ones(3)
    hooked = Odd(1)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    inner = nn.Linear(3, 3)
    lambda_of_a_module = Odd(lambda x: inner(x))
    with caplog.at_level(logging.INFO, "horsepower"):
        assert horsepower.compile(Odd(object), (x,))(x).tolist() == [2, 2, 2]
        assert len(list(folder.iterdir())) == 1
        assert horsepower.compile(hooked, (x,))(x).tolist() == [3, 3, 3]
        horsepower.compile(Odd(nn.Linear), (x,), only=(lambda graph: None,))
        horsepower.compile(lambda_of_a_module, (x,))
    assert len(list(folder.iterdir())) == 1
    assert caplog.text.count("neither looked for nor kept") == 3
    assert "forward hooks" in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(cache.FOLDER, str(blocked))
    model = random_model(TINY)
    with caplog.at_level(logging.INFO, "horsepower"):
        check(made(model), model)
    assert "is not kept" in caplog.text
    assert blocked.read_text() == ""


def test_the_oldest_plans_go(folder, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 2)

    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    x = torch.ones(3)
    for i, factor in enumerate((1, 2, 1, 3)):
        horsepower.compile(Scaled(factor), (x,))
        for file in folder.iterdir():  # the clock of a file system is coarse
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
        assert len(list(folder.iterdir())) == min(i + 1, 2)
    assert horsepower.compile(Scaled(1), (x,)).found
    assert len(list(folder.iterdir())) == 2
