"""distmoe: a training system for Mixture-of-Experts image classifiers.

The public names are imported when they are first used, so that ``import distmoe`` stays fast and light.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Context": "distmoe.contracts",
    "DataSpec": "distmoe.contracts",
    "UserError": "distmoe.contracts",
    "RunConfig": "distmoe.config",
    "load_config": "distmoe.config",
    "Gate": "distmoe.moe.gates.base",
    "DenseGate": "distmoe.moe.gates.dense",
    "TopKGate": "distmoe.moe.gates.topk",
    "MLPExperts": "distmoe.moe.experts",
    "ModuleExperts": "distmoe.moe.experts",
    "MoELayer": "distmoe.moe.layer",
    "Routing": "distmoe.moe.routing",
    "LoadBalanceLoss": "distmoe.moe.losses",
    "ImportanceLoss": "distmoe.moe.losses",
    "ZLoss": "distmoe.moe.losses",
    "build_model": "distmoe.models",
    "load_model": "distmoe.training.loading",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'distmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
