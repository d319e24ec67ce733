"""How kernels are started: on which device."""

from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from horsepower.kernels.gpu.launch import Config, launch


def test_a_kernel_starts_on_the_device_of_its_operands(monkeypatch):
    """Triton starts it on the current one, whatever pointers it is given."""
    devices = [0]

    def exchange(device):
        devices.append(device)
        return devices[-2]

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: devices.append("start")

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:1")
    for operand in (x, SimpleNamespace(base=x)):
        launch(Kernel(), (1,), operand, config=Config(1))
    assert devices == [0, *2 * [1, "start", 0]]
