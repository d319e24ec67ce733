"""The count of live memory, on programs whose peak is known."""

import pytest
import torch

from horsepower.bench.live import allocated_peak, live_peak
from models import random_inputs, random_model, variant

UNIT = 4 * 1000  # bytes of a float32 tensor of 1000
BEFORE = torch.ones(1000)


def chain():
    x = BEFORE + 1
    for _ in range(5):
        x = x * 2  # the new one is made before the old one goes
    return x


def freed():
    x = BEFORE + 1
    del x
    return BEFORE + 2


def kept():
    return [BEFORE + i for i in range(3)]


def views():
    x = BEFORE + 1
    parts = [*x.split(250), x.reshape(10, 100).T, x[::2], x.unbind()[0]]
    del x
    return parts, BEFORE.double()  # the views hold the storage


def in_place():
    x = BEFORE + 1
    x.add_(1).mul_(2)
    x[:10] = 0
    torch.sin(x, out=x)
    return x


def aliases_of_inputs():
    parts = BEFORE.split(10)
    same = BEFORE.to(torch.float32)
    BEFORE.mul_(1)
    return parts, same.view(10, 100), same.contiguous(), same.detach()


def several_outputs():
    values, indices = BEFORE.sort()  # float32 and int64
    return values, indices, torch._foreach_add([BEFORE, BEFORE], 1)


def swapped():
    x = BEFORE + 1
    y = x * 2
    x = y
    del y
    return x + 1


def resized():
    x = torch.empty(0)
    torch.add(BEFORE, 1, out=x)
    return x


@pytest.mark.parametrize(
    ("run", "units"),
    [
        (chain, 2),
        (freed, 1),
        (kept, 3),
        (views, 3),
        (in_place, 1),
        (aliases_of_inputs, 0),
        (several_outputs, 5),
        (swapped, 2),
        (resized, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_known_programs(run, units):
    with torch.no_grad():
        assert live_peak(run) == units * UNIT


def test_what_stays_alive_after_a_run_is_not_in_the_next():
    kept_alive = []
    for _ in range(2):
        assert live_peak(lambda: kept_alive.append(BEFORE + 1)) == UNIT
    assert live_peak(lambda: kept_alive[0] + 1) == UNIT
    assert live_peak(lambda: kept_alive[0].view(-1)) == 0


def test_both_counts_agree_on_a_model():
    model = random_model(variant("default"))
    video, audio, text, coords = random_inputs(model.config, 4, 300, 200, 100)
    with torch.no_grad():
        condition = model.condition(text, coords)
        counts = [count(lambda: model.velocity(video, audio, condition, 4)) for count in (live_peak, allocated_peak)]
    assert counts[0] == pytest.approx(counts[1], rel=0.01)
    assert counts[0] > 1500 * 64 * 4  # the residual stream alone


def test_the_allocator_sees_what_is_made_inside_one_operator():
    q = torch.ones(1, 1, 64, 8)
    mask = torch.ones(64, 64)

    def math():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    with torch.no_grad():
        assert allocated_peak(math) >= 64 * 64 * 4  # the scores
        assert allocated_peak(lambda: BEFORE.view(-1)) == 0


def test_an_error_passes_through_and_ends_the_watch():
    with pytest.raises(ZeroDivisionError):
        live_peak(lambda: 1 / 0)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
