"""The command line: what is said in `arguments`, done in `commands`, and answered in `terminal`."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from horsepower.arguments import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it succeeded, 1 for a fault that it looked for and found, 2 for what the user has to mend."""
    arguments = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    _prepare_process()
    try:
        return command(arguments)
    except ValueError as error:
        print(f"horsepower: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads what is printed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        return 1
    except KeyboardInterrupt:
        print("horsepower: interrupted", file=sys.stderr)
        return 130


def _prepare_process() -> None:
    """What must be set before torch and others are imported, in a process that is ours alone."""
    # Threads that wait by spinning slow a shared machine down tenfold; sleeping ones cost an idle one a fifth.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler says on stderr when it starts and stops

    # What diffusers and transformers say of themselves is not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
