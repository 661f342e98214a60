"""``moe``: the mixture; gates and their networks are tagged unions on ``name``, one class each."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distmoe.config.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Widths


class LinearNetwork(Section):
    """One linear layer without bias on the flattened token."""

    name: Literal["linear"] = "linear"
    """Network."""


class MLPNetwork(Section):
    """Hidden layers with ReLU on the flattened token, then a linear layer."""

    name: Literal["mlp"] = "mlp"
    """Network."""
    hidden: Widths = (64,)
    """Widths of the hidden layers."""


class CNNNetwork(Section):
    """Convolutions, each with a 2x2 max-pool, then a hidden and a linear layer; for gates that see whole images."""

    name: Literal["cnn"] = "cnn"
    """Network."""
    channels: Widths = (16, 32)
    """Channels of the convolutions."""
    hidden: PositiveInt = 32
    """Width of the hidden layer."""


class CosineNetwork(Section):
    """Cosines of the flattened token with one learned direction an output, over a learned temperature."""

    name: Literal["cosine"] = "cosine"
    """Network."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """At the start of training."""


AnyNetwork = Annotated[LinearNetwork | MLPNetwork | CNNNetwork | CosineNetwork, Field(discriminator="name")]
RoutingGroup = Literal["image", "batch"] | PositiveInt


class GateSection(Section):
    """What gates that learn have in common."""

    network: AnyNetwork | None = None
    """What the gate sees a token through; null: the model's own choice."""

    def training_problem(self) -> str | None:
        """Why these settings are for evaluation only, and what to do; None where they can be trained."""
        k, renormalize = getattr(self, "k", None), getattr(self, "renormalize", False)
        if k == 1 and renormalize:
            return (
                "moe.gate.renormalize must be false for moe.gate.k=1: the one weight would always be 1, "
                "and the gate would get no gradient from the task"
            )
        return None


class TokenChoiceSection(GateSection):
    """What gates in which a token chooses its experts have in common."""

    capacity_factor: PositiveFloat | None = None
    """Rows an expert takes from a routing group, as a multiple of the even share; null: dropless."""
    group: RoutingGroup = "image"
    """Routing group inside which capacity acts: one image, that many images, or the micro-batch."""
    priority: Literal["position", "score"] = "position"
    """Who is served first under capacity: tokens as they come, or those surest of their first choice."""


class DenseGateSection(GateSection):
    """Softmax over all experts: every expert sees every token."""

    name: Literal["dense"] = "dense"
    """Gate."""
    k: PositiveInt | None = None
    """In evaluation, only the k most probable experts of each token; null: all."""
    margin: NonNegativeFloat | None = None
    """In training, an expert whose summed weight is ahead of the mean by more than this gets none; null: no limit."""
    constraint_steps: PositiveInt | None = None
    """Optimizer steps after which ``margin`` is lifted; null: never."""

    def training_problem(self) -> str | None:
        """See :class:`GateSection`."""
        return None if self.k is None else "moe.gate.k of a dense gate is for evaluation: to train with k, use topk"


class TopKGateSection(TokenChoiceSection):
    """Every token goes to its k most probable experts."""

    name: Literal["topk"] = "topk"
    """Gate."""
    k: PositiveInt = 2
    """Experts a token."""
    renormalize: bool = True
    """Divide the chosen probabilities by their sum. Not to train k=1 with: the gate would get no task gradient."""


class NoisyTopKGateSection(TokenChoiceSection):
    """Top-k on noisy logits, with an estimate of the load for ``moe.loss_weights.load``."""

    name: Literal["noisy_topk"] = "noisy_topk"
    """Gate."""
    k: PositiveInt = 2
    """Experts a token."""
    noise_std: PositiveFloat | None = None
    """Standard deviation of the noise; null: learned, for each token and expert."""

    def training_problem(self) -> str | None:
        """See :class:`GateSection`."""
        return None if self.k > 1 else "moe.gate.k must be 2 or more for noisy_topk, whose weights always sum to 1"


class SwitchGateSection(TokenChoiceSection):
    """Top-1, weighted by its probability, with jitter on the token in training."""

    name: Literal["switch"] = "switch"
    """Gate."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Each value the gate sees is multiplied by a draw from [1 - jitter, 1 + jitter]."""


class CosineGateSection(TokenChoiceSection):
    """Top-k on cosines with one learned direction an expert, over a learned temperature."""

    name: Literal["cosine"] = "cosine"
    """Gate."""
    k: PositiveInt = 2
    """Experts a token."""
    projection: PositiveInt = 64
    """Width in which cosines are taken."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 0.3
    """At the start of training."""
    renormalize: bool = True
    """As for topk."""


class SigmoidGateSection(TokenChoiceSection):
    """Sigmoid scores, balanced by a bias on the choice instead of a loss."""

    name: Literal["sigmoid"] = "sigmoid"
    """Gate."""
    k: PositiveInt = 2
    """Experts a token."""
    bias_rate: NonNegativeFloat = 1e-3
    """How far an optimizer step moves an expert's bias towards an even load; 0: off."""
    renormalize: bool = True
    """As for topk."""
    scale: PositiveFloat = 1.0
    """Factor on all weights."""


class ExpertChoiceGateSection(GateSection):
    """Every expert takes the tokens it scores highest in each routing group."""

    name: Literal["expert_choice"] = "expert_choice"
    """Gate."""
    capacity_factor: PositiveFloat = 2.0
    """Experts a token gets on average."""
    group: RoutingGroup = "image"
    """Tokens among which an expert chooses: of one image, that many images, or the micro-batch."""


class SoftGateSection(GateSection):
    """Soft MoE: experts work on slots, weighted averages of the tokens of a routing group."""

    name: Literal["soft"] = "soft"
    """Gate."""
    slots_per_expert: PositiveInt = 1
    """Slots of each expert in a routing group."""
    group: RoutingGroup = "image"
    """Tokens that share slots: of one image, that many images, or the micro-batch."""


class AttentiveGateSection(GateSection):
    """Weighs all experts by how their hidden states answer the gate's query."""

    name: Literal["attentive"] = "attentive"
    """Gate."""
    width: PositiveInt = 32
    """Width of query and key."""
    k: PositiveInt | None = None
    """In evaluation, only the k best answers of each token; null: all."""

    def training_problem(self) -> str | None:
        """See :class:`GateSection`."""
        return None if self.k is None else "moe.gate.k of an attentive gate is for evaluation: all experts are trained"


class FixedGateSection(Section):
    """What gates that learn nothing have in common."""

    def training_problem(self) -> str | None:
        """None: there is nothing to train."""
        return None


class HashGateSection(FixedGateSection):
    """k experts by a hash of the token's identity: a control that learns no gate."""

    name: Literal["hash"] = "hash"
    """Gate."""
    k: PositiveInt = 1
    """Experts a token."""
    by: Literal["token", "sample", "position"] = "token"
    """What is hashed: sample and position in it, the sample, or the position."""
    capacity_factor: PositiveFloat | None = None
    """As for topk."""
    group: RoutingGroup = "image"
    """As for topk."""


class UniformGateSection(FixedGateSection):
    """Every expert with the weight 1/E: a control that learns no gate."""

    name: Literal["uniform"] = "uniform"
    """Gate."""


AnyGate = Annotated[
    DenseGateSection
    | TopKGateSection
    | NoisyTopKGateSection
    | SwitchGateSection
    | CosineGateSection
    | SigmoidGateSection
    | ExpertChoiceGateSection
    | SoftGateSection
    | AttentiveGateSection
    | HashGateSection
    | UniformGateSection,
    Field(discriminator="name"),
]


class LossWeights(Section):
    """Weights of the auxiliary losses, applied in one place, the training step. 0 is off."""

    load_balance: NonNegativeFloat = 0.0
    """Switch/GShard load balance: share of assignments times mean probability."""
    importance: NonNegativeFloat = 0.0
    """Squared coefficient of variation of the summed probabilities."""
    load: NonNegativeFloat = 0.0
    """Squared coefficient of variation of a noisy gate's estimated load."""
    z: NonNegativeFloat = 0.0
    """Mean squared log-sum-exp of the gate's logits."""
    similarity_within: NonNegativeFloat = 0.0
    """How far apart the samples of one expert are: beta_s of the sample-similarity loss."""
    similarity_between: NonNegativeFloat = 0.0
    """Minus how far apart the samples of different experts are: beta_d of the sample-similarity loss."""

    def problem(self, gate: AnyGate) -> str | None:
        """Which weight means nothing to this gate, and what to do; None where all have a meaning."""
        if isinstance(gate, FixedGateSection) and any(self.model_dump().values()):
            return f"moe.loss_weights must be 0 for moe.gate.name={gate.name}, a gate that learns nothing"
        if self.load > 0 and not isinstance(gate, NoisyTopKGateSection):
            return f"moe.loss_weights.load ({self.load}) needs moe.gate.name=noisy_topk: no other gate estimates it"
        return None


class SimilaritySection(Section):
    """What the sample-similarity losses compare. For weights of them, see ``loss_weights``."""

    form: Literal["paper", "authors"] = "paper"
    """Squared distances, averaged over pairs; or the authors' code: distances over the batch's largest one, summed."""
    distance: Literal["pixels", "tokens"] = "pixels"
    """Between the samples' images, as augmented, in units of their range; or between what the gate sees."""


class MoESection(Section):
    """The mixture: how many experts, which gate, which auxiliary losses."""

    num_experts: PositiveInt = 8
    """Experts of each layer."""
    gate: AnyGate = TopKGateSection()
    """Gate of each layer."""
    shared_hidden: NonNegativeInt = 0
    """Hidden width of an expert that works on every token beside the chosen ones; 0: none."""
    objective: Literal["likelihood", "cooperative", "competitive", "gaussian_mixture", "root_likelihood", "sampled"] = (
        "likelihood"
    )
    """What a mixture of class probabilities is trained for; see ``distmoe.moe.objectives``."""
    loss_weights: LossWeights = LossWeights()
    """Weights of the auxiliary losses."""
    similarity: SimilaritySection = SimilaritySection()
    """Of the two sample-similarity losses."""

    @model_validator(mode="after")
    def _check(self) -> "MoESection":
        problem = self.loss_weights.problem(self.gate)
        if problem is not None:
            raise ValueError(problem)
        k = getattr(self.gate, "k", None)
        if k is not None and k > self.num_experts:
            raise ValueError(f"moe.gate.k ({k}) must be at most moe.num_experts ({self.num_experts})")
        if isinstance(self.gate, ExpertChoiceGateSection) and self.gate.capacity_factor > self.num_experts:
            raise ValueError(
                f"moe.gate.capacity_factor ({self.gate.capacity_factor}) must be at most "
                f"moe.num_experts ({self.num_experts})"
            )
        if isinstance(self.gate, DenseGateSection) and self.gate.margin is None and self.gate.constraint_steps:
            raise ValueError("moe.gate.constraint_steps needs moe.gate.margin")
        return self
