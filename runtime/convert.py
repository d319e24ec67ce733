"""Published pickles to safetensors. The only place that reads a pickle, and it does so in a child process."""

import os
import subprocess
import sys
from pathlib import Path

MESSAGE_LENGTH = 500
CANNOT_WRITE = 3  # the child's exit status when the target is at fault


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str] | None = None) -> Path:
    """Convert a torch checkpoint (.ckpt, .pth, .pt) to safetensors, beside it unless `target` is given.

    Of a training checkpoint the averaged weights (`ema_state_dict`) are taken, or `state_dict`; a leading `module.` of
    keys goes. The pickle is read with `weights_only=True` in a child process, and the target appears whole or not at
    all. Raises ValueError for a file that is no checkpoint of tensors.
    """
    source = Path(source)
    target = source.with_suffix(".safetensors") if target is None else Path(target)
    if not source.is_file():
        raise ValueError(f"source: got {str(source)!r}, allowed: a checkpoint file")
    if target.suffix != ".safetensors":
        raise ValueError(f"target: got {str(target)!r}, allowed: a path that ends in .safetensors")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ValueError(f"target: got {str(target)!r}, allowed: a path in a folder that can be written to")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        child = subprocess.run(
            [sys.executable, "-m", "horsepower.runtime.convert", str(source), str(partial)],
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            said = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1][:MESSAGE_LENGTH]
            if child.returncode == CANNOT_WRITE:
                raise ValueError(f"target: got {str(target)!r} ({said}), allowed: a path with room for the tensors")
            raise ValueError(f"source: got {str(source)!r} ({said}), allowed: a checkpoint that holds tensors only")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _child(source: str, target: str) -> None:
    import zipfile

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Files from before torch 1.6 are no archives and cannot be mapped.
    values = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    for name in ("ema_state_dict", "state_dict"):
        if isinstance(values, dict) and name in values:
            values = values[name]
            break
    if not isinstance(values, dict):
        raise ValueError(f"got {type(values).__name__}, allowed: a dictionary of tensors")
    tensors = {
        str(key).removeprefix("module."): value.contiguous().clone()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise ValueError("got no tensors, allowed: a dictionary of tensors")
    try:
        save_file(tensors, target)
    except (OSError, SafetensorError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(CANNOT_WRITE)


if __name__ == "__main__":
    try:
        _child(*sys.argv[1:])
    except Exception as error:  # whatever the unpickler makes of a hostile file; the parent names the file
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
