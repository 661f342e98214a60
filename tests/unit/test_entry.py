"""How the process begins: what torch reads when it is imported is set by then."""

import os
import subprocess
import sys

import pytest

STOP_AT_TORCH = """
import os, runpy, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("TORCH_CPP_LOG_LEVEL"))
            raise SystemExit(0)

sys.meta_path.insert(0, Stop())
sys.argv = ["distmoe", "--help"]
"""
STARTS = {
    "python -m distmoe": "runpy.run_module('distmoe', run_name='__main__')",
    "distmoe": "from distmoe.__main__ import main; main()",
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({}, "None"),
        ({"RANK": "1"}, "ERROR"),
        ({"SLURM_PROCID": "0"}, "ERROR"),
        ({"RANK": "1", "TORCH_CPP_LOG_LEVEL": "INFO"}, "INFO"),
    ],
)
def test_processes_of_a_launcher_keep_the_warnings_of_torch_to_themselves(start: str, variables: dict, level: str):
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "SLURM_PROCID")}
    kept.pop("TORCH_CPP_LOG_LEVEL", None)
    done = subprocess.run(
        [sys.executable, "-c", STOP_AT_TORCH + STARTS[start]],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{level}\n"
