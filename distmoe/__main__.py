"""``python -m distmoe``, and the command ``distmoe``."""

import importlib
import os
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line.

    Of several processes each would print torch's C++ warnings, and a stack trace for every connection to a rank that is
    gone. torch reads this variable when it is imported, so nothing that imports it may be imported before.
    """
    if {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    importlib.import_module("distmoe.cli").main()
    raise AssertionError("the command line ends the process")


if __name__ == "__main__":
    main()
