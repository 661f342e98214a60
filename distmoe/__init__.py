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
    "MoELayer": "distmoe.moe.layer",
    "DenseMoE": "distmoe.moe.mixtures",
    "Conv1dMoE": "distmoe.moe.mixtures",
    "Conv2dMoE": "distmoe.moe.mixtures",
    "Conv3dMoE": "distmoe.moe.mixtures",
    "Routing": "distmoe.moe.routing",
    "Gate": "distmoe.moe.gates.base",
    "TokenChoiceGate": "distmoe.moe.gates.token_choice",
    "DenseGate": "distmoe.moe.gates.dense",
    "UniformGate": "distmoe.moe.gates.dense",
    "TopKGate": "distmoe.moe.gates.topk",
    "SwitchGate": "distmoe.moe.gates.topk",
    "NoisyTopKGate": "distmoe.moe.gates.noisy",
    "CosineGate": "distmoe.moe.gates.cosine",
    "CosineHead": "distmoe.moe.gates.cosine",
    "SigmoidGate": "distmoe.moe.gates.sigmoid",
    "ExpertChoiceGate": "distmoe.moe.gates.expert_choice",
    "SoftGate": "distmoe.moe.gates.soft",
    "AttentiveGate": "distmoe.moe.gates.attentive",
    "HashGate": "distmoe.moe.gates.hashed",
    "FilterGate": "distmoe.moe.gates.filters",
    "Balancer": "distmoe.moe.balance",
    "Dispatcher": "distmoe.moe.dispatch",
    "LocalDispatcher": "distmoe.moe.dispatch",
    "Placement": "distmoe.moe.dispatch",
    "Experts": "distmoe.moe.experts",
    "MLPExperts": "distmoe.moe.experts",
    "ModuleExperts": "distmoe.moe.experts",
    "ConvExperts": "distmoe.moe.convolutions",
    "LinearExperts": "distmoe.moe.convolutions",
    "LoadBalanceLoss": "distmoe.moe.losses",
    "ImportanceLoss": "distmoe.moe.losses",
    "LoadLoss": "distmoe.moe.losses",
    "ZLoss": "distmoe.moe.losses",
    "SimilarityLoss": "distmoe.moe.losses",
    "AuxiliaryLoss": "distmoe.moe.losses",
    "Reducer": "distmoe.moe.sums",
    "mixture_log_probs": "distmoe.moe.objectives",
    "cooperative_error": "distmoe.moe.objectives",
    "competitive_error": "distmoe.moe.objectives",
    "gaussian_mixture_error": "distmoe.moe.objectives",
    "sampled_error": "distmoe.moe.objectives",
    "routing_sums": "distmoe.moe.measures",
    "describe_routing": "distmoe.moe.measures",
    "FrozenExperts": "distmoe.moe.growing",
    "grown": "distmoe.moe.growing",
    "take_weights": "distmoe.moe.growing",
    "upcycled": "distmoe.moe.growing",
    "build_model": "distmoe.models",
    "initialize_parameters": "distmoe.models.initial",
    "Mesh": "distmoe.parallel.mesh",
    "Communicators": "distmoe.parallel.collectives",
    "SumReducer": "distmoe.parallel.collectives",
    "AllToAllDispatcher": "distmoe.parallel.expert_parallel",
    "expert_placement": "distmoe.parallel.expert_parallel",
    "share_batch_statistics": "distmoe.parallel.batch_norm",
    "reduce_gradients": "distmoe.parallel.gradients",
    "clip_gradients": "distmoe.parallel.gradients",
    "load_model": "distmoe.training.loading",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'distmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
