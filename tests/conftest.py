"""Plans that tests make are kept apart from the user's; without a GPU, Triton's kernels are interpreted."""

import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    from interpreter import use_exact_narrow_floats

    use_exact_narrow_floats()

PLANS = pytest.StashKey[tempfile.TemporaryDirectory]()


def pytest_configure(config):
    """One folder for all processes of a run, which inherit its name: what one plans the others find."""
    if not hasattr(config, "workerinput"):
        config.stash[PLANS] = tempfile.TemporaryDirectory()
        os.environ["HORSEPOWER_CACHE"] = config.stash[PLANS].name


def pytest_unconfigure(config):
    if PLANS in config.stash:
        config.stash[PLANS].cleanup()
