"""The tutorial system: CNN experts and a CNN gate on CIFAR-10, mixing class probabilities; and one expert alone.

Source: A. Helwan, "Showcasing Mixture of Experts on CIFAR-10" (2024). Its readable part says: three simple CNN experts
and a gate network, all see the image, the prediction is the gate-weighted combination. Layer sizes, loss and optimizer
are not known; ours are in ``configs/cifar10_tutorial.yaml``.
"""

from torch import Tensor

from distmoe.config import CNNNetwork, MoESection, TutorialCNN, TutorialModel
from distmoe.contracts import Context, DataSpec
from distmoe.models.mixture import ClassMixture
from distmoe.models.protocol import ModelOutput, Network, Normalize
from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import ModuleExperts
from distmoe.moe.gates import build_gate
from distmoe.moe.networks import PooledCNN, network_factory


class TutorialMixture(ClassMixture):
    """``p(c|x) = sum_e g_e(x) softmax(expert_e(x))_c`` with CNN experts and a CNN gate."""

    def __init__(
        self, section: TutorialModel, moe: MoESection, spec: DataSpec, normalize: str, placement: Placement
    ) -> None:
        shape, hidden = spec.input_shape, section.hidden
        default = CNNNetwork(channels=section.gate_channels, hidden=section.gate_hidden)
        network = getattr(moe.gate, "network", None) or default
        gate = build_gate(moe.gate, moe.num_experts, network_factory(network, shape), hidden)
        experts = ModuleExperts(
            placement.local_experts(moe.num_experts),
            lambda: PooledCNN(shape, section.channels, hidden, spec.num_classes, with_hidden=gate.needs_hidden),
        )
        super().__init__(gate, experts, moe, placement)
        self.normalize = Normalize(spec, normalize)

    def forward(self, images: Tensor, context: Context) -> ModelOutput:
        """See :class:`distmoe.models.protocol.Model`."""
        return self.mix(self.normalize(images), context)


class TutorialTwin(Network):
    """One expert's network alone, of any width."""

    def __init__(self, section: TutorialCNN, spec: DataSpec, normalize: str) -> None:
        super().__init__()
        self.normalize = Normalize(spec, normalize)
        self.network = PooledCNN(spec.input_shape, section.channels, section.hidden, spec.num_classes)

    def forward(self, images: Tensor, context: Context) -> ModelOutput:
        """See :class:`distmoe.models.protocol.Model`."""
        del context
        return ModelOutput(logits=self.network(self.normalize(images)))
