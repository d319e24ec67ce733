"""A bound that nothing exceeds, and that the worst rows come near."""

import pytest
import torch

from horsepower.kernels.ops import ops


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("gains", [0, 1, 3])
@pytest.mark.parametrize("codes", [None, "by channel", "by expert"])
def test_no_normed_row_exceeds_it(experts, gains, codes):
    """Not the worst there is: the row that lies along the longest product of weight and gain."""
    if gains > experts:
        pytest.skip("gains by modality come with weights by modality")
    weight, scale = normal(experts * 24, 48), None
    gain = normal(gains * 48) if gains else None
    exact = weight
    if codes:
        weight, scale = ops.quantise(weight) if codes == "by channel" else ops.quantise_tensor(weight, experts)
        exact = weight.float() * scale.repeat_interleave(weight.shape[0] // scale.shape[0], 0)
    (bound,) = ops.value_bound(weight, scale, gain, experts, 8, 10).tolist()
    own = exact.unflatten(0, (experts, 24))[:, 8:18] * (1 if gain is None else gain.view(-1, 1, 48))
    worst = own * (48**0.5 / own.norm(dim=-1, keepdim=True))  # a normed row for each output
    values = (worst * own).sum(-1)
    assert 448 * bound / 2.2 < values.max() <= 448 * bound
    assert bound == 2.0 ** round(torch.tensor(bound).log2().item())


@pytest.mark.parametrize("gain", [2.0**-80, 2.0**90])
def test_squares_beyond_float32(gain):
    """The bound is that of ordinary gains, times theirs."""
    weight, ordinary = normal(24, 48), normal(48)
    one, other = (ops.value_bound(weight, None, each, 1, 0, 24) for each in (ordinary, ordinary * gain))
    assert torch.equal(other, one * gain)


def test_gains_of_float64_give_a_bound_in_float32():
    gain = normal(48).double()
    assert torch.equal(*(ops.value_bound(normal(24, 48), None, each, 1, 0, 24) for each in (gain, gain.float())))


def test_what_does_not_belong_together():
    weight = normal(24, 48)
    for experts, first, rows in ((1, 20, 5), (1, -1, 3), (1, 3, 0), (5, 0, 1), (0, 0, 1)):
        with pytest.raises(ValueError, match=r"weight: got \[24, 48\]"):
            ops.value_bound(weight, None, None, experts, first, rows)
    with pytest.raises(ValueError, match=r"weight_scale: got \[2, 1\], allowed: \[24, 1\] or \[3, 1\]"):
        ops.value_bound(weight, normal(2, 1), None, 3, 0, 1)
    with pytest.raises(ValueError, match=r"gain: got \[47\], allowed: \[C\] or \[1 C\] with C = 48"):
        ops.value_bound(weight, None, normal(47), 1, 0, 1)
