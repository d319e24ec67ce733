"""Plans that tests make are kept apart from the user's; without a GPU, Triton's kernels are interpreted."""

import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    from interpreter import use_exact_narrow_floats

    use_exact_narrow_floats()


@pytest.fixture(scope="session", autouse=True)
def _own_plans():
    before = os.environ.get("HORSEPOWER_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HORSEPOWER_CACHE"] = folder
        yield
    os.environ.pop("HORSEPOWER_CACHE")
    if before is not None:
        os.environ["HORSEPOWER_CACHE"] = before
