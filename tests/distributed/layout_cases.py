"""What is trained, in which layouts: the cases of the layout-invariance tests, and how few of them cover all pairs.

A *case* is a training: model, gate, losses, optimizer, samples. A *layout* is the processes it runs on. Each case of
the covering set runs in at most one layout of each world size; together, every two settings that can meet have met.
"""

import itertools
import random
from collections import Counter
from collections.abc import KeysView, Mapping
from dataclasses import asdict, dataclass, fields
from heapq import nlargest
from typing import Any, Literal

from distmoe.config import RunConfig, parse_config
from distmoe.contracts import DataSpec
from distmoe.moe.gates import GATES

SPEC = DataSpec("little", (3, 8, 8), 4, tuple("abcd"), (120.0,) * 3, (60.0,) * 3)
NUM_EXPERTS, BATCH_SIZE = 4, 16
WORLDS = (1, 2, 4)

Engine = Literal["replicas", "zero 0", "zero 1", "zero 2"]


@dataclass(frozen=True)
class Layout:
    """Processes and engine; ``loop`` is the gradient rule written out, without an engine's library."""

    world: int = 1
    expert_parallel: int = 1
    engine: Engine | Literal["loop"] = "replicas"

    def __str__(self) -> str:
        return f"world {self.world}, EP {self.expert_parallel}, {self.engine}"

    @property
    def section(self) -> dict[str, Any]:
        """The ``parallel`` section."""
        section: dict[str, Any] = {"expert_parallel_size": self.expert_parallel, "backend": "replicas"}
        if self.engine.startswith("zero"):
            section |= {"backend": "deepspeed", "zero_stage": int(self.engine[-1])}
        return section


ENGINES: tuple[Engine, ...] = ("replicas", "zero 0", "zero 1", "zero 2")
LAYOUTS = tuple(
    Layout(world, size, engine)
    for world in WORLDS
    for size in WORLDS
    for engine in ENGINES
    if size <= world and not (engine == "replicas" and (size > 1 or world == 1))
)
REFERENCE = Layout()  # what all others are compared with


# What each gate can be asked for; 0 where it has no k.
KS = {
    "topk": (1, 2, NUM_EXPERTS),
    "noisy_topk": (2, NUM_EXPERTS),
    "switch": (1,),
    "cosine": (1, 2, NUM_EXPERTS),
    "sigmoid": (1, 2, NUM_EXPERTS),
    "hash": (1, 2, NUM_EXPERTS),
}
STEERED = ("topk", "noisy_topk", "switch", "cosine", "sigmoid")  # gates whose choice can be forced
COMPETING = ("expert_choice", "soft")  # gates whose tokens always compete
NOT_OF_CLASSES = ("switch", "expert_choice", "soft")  # gates that do not mix class probabilities
LAST_SIZES = {"even": (BATCH_SIZE,), "uneven": (13, 7)}  # samples of an epoch's last step, epoch by epoch


@dataclass(frozen=True)
class Case:
    """One training, small enough to run hundreds of times.

    Attributes:
        model: With batch norm and stacked experts for positions, or experts of any module for images.
        gate: Key of ``GATES``.
        k: Experts a token; 0 where the gate has none.
        group: Routing group; of gates in which a token chooses, capacity acts inside it.
        lopsided: One expert is the first choice of every token, one is chosen by none.
        samples: Of a step: as many as there are places, or also 13, so that ranks have different numbers, and 7, so
            that some have none.
        shared: With an expert for every token.
        optimizer: With momentum or moments.
        clipping: To a norm that is always exceeded.
        balanced: With balance and z loss, and those a gate is made for.
        accumulation: Micro-batches of a step.
    """

    model: Literal["convnet", "tutorial"] = "convnet"
    gate: str = "topk"
    k: int = 2
    group: Literal["none", "image", "two images", "batch"] = "none"
    lopsided: bool = False
    samples: Literal["even", "uneven"] = "even"
    shared: bool = False
    optimizer: Literal["sgd", "adamw"] = "sgd"
    clipping: bool = True
    balanced: bool = True
    accumulation: Literal[1, 2] = 1

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    @property
    def possible(self) -> bool:
        """Whether it can be trained, and says something that no other case says."""
        grouped = self.group != "none"
        of_classes = self.model == "tutorial"
        return self.k in KS.get(self.gate, (0,)) and not any(
            (
                grouped and self.gate not in (*KS, *COMPETING),
                not grouped and self.gate in COMPETING,
                self.lopsided and (self.gate not in STEERED or self.k == NUM_EXPERTS),
                self.balanced and self.gate in ("hash", "uniform"),
                of_classes and (grouped or self.lopsided or self.shared or self.gate in NOT_OF_CLASSES),
                of_classes and self.k == 1 and self.gate != "hash",
            )
        )

    def config(self, layout: Layout, **sections: dict[str, Any]) -> RunConfig:
        """The run, with other sections than its own."""
        moe = {"num_experts": NUM_EXPERTS, "gate": self._gate, "loss_weights": self._weights}
        values: dict[str, Any] = {
            "data": {"batch_size": BATCH_SIZE},
            "model": _MODELS[self.model],
            "moe": moe | ({"shared_hidden": 5} if self.shared else {}),
            "optim": _OPTIMIZERS[self.optimizer],
            "train": {"clip_norm": 0.05 if self.clipping else None, "accumulation": self.accumulation},
            "parallel": layout.section,
        }
        return parse_config({**values, **sections}, str(self))

    @property
    def _gate(self) -> dict[str, Any]:
        gate: dict[str, Any] = {"name": self.gate, **_SETTINGS.get(self.gate, {})}
        if self.gate in KS and self.gate != "switch":
            gate["k"] = self.k
        if self.k == 1 and self.gate in ("topk", "cosine", "sigmoid"):
            gate["renormalize"] = False
        if self.group != "none":
            gate["group"] = 2 if self.group == "two images" else self.group
            gate["capacity_factor"] = 0.75
        if self.gate == "soft":
            del gate["capacity_factor"]
        return gate

    @property
    def _weights(self) -> dict[str, float]:
        if not self.balanced:
            return {}
        special = {"noisy_topk": {"load": 0.1}, "dense": {"importance": 0.1}, "attentive": {"importance": 0.1}}
        return {"load_balance": 0.1, "z": 0.01, **special.get(self.gate, {})}


_MODELS: dict[str, dict[str, Any]] = {
    "convnet": {"name": "convnet", "widths": [6], "ffn_stages": [1], "ffn_hidden": 7},
    "tutorial": {"name": "tutorial", "channels": [4], "hidden": 6, "gate_channels": [3], "gate_hidden": 5},
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"margin": 0.5},
    "switch": {"jitter": 0.1},
    "cosine": {"projection": 8},
    "attentive": {"width": 4},
    "soft": {"slots_per_expert": 2},
    "sigmoid": {"bias_rate": 0.002},
}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adamw": {"name": "adamw", "lr": 0.003, "weight_decay": 0.1},
}

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("convnet", "tutorial"),
    "gate": tuple(GATES),
    "k": (0, 1, 2, NUM_EXPERTS),
    "group": ("none", "image", "two images", "batch"),
    "lopsided": (False, True),
    "samples": ("even", "uneven"),
    "shared": (False, True),
    "optimizer": ("sgd", "adamw"),
    "clipping": (False, True),
    "balanced": (False, True),
    "accumulation": (1, 2),
}
assert list(FACTORS) == [field.name for field in fields(Case)]

Setting = tuple[str, Any]
Pairs = dict[tuple[Setting, Setting], None]  # a set with an order of its own, the same in every process


@dataclass(frozen=True)
class Row:
    """A case, and the layouts that it runs in, at most one of each world."""

    case: Case
    layouts: tuple[Layout, ...]


def pairs_inside(case: Case) -> Pairs:
    """Every two settings that a case brings together."""
    return dict.fromkeys(itertools.combinations(_settings(case), 2))


def pairs_with(case: Case, layout: Layout) -> Pairs:
    """Every setting of a case beside the layout's engine, and beside its shape (world, EP)."""
    shape, engine = ("shape", (layout.world, layout.expert_parallel)), ("engine", layout.engine)
    return dict.fromkeys([(shape, engine), *itertools.product(_settings(case), (shape, engine))])


def possible_cases() -> list[Case]:
    """All combinations that can be trained."""
    return [case for values in itertools.product(*FACTORS.values()) if (case := Case(*values)).possible]


def covering_rows(random_seed: int = 38, num_tries: int = 100) -> list[Row]:
    """Rows that bring together every two settings which some possible row brings together; the same each time.

    Greedy: of some random cases that have a pair which is still missing, the one that has the most such pairs, in the
    layouts that add the most.
    """
    draw = random.Random(random_seed)
    cases_of: dict[Any, list[Case]] = {}  # by pair of settings, and by setting
    for case in possible_cases():
        for met in (*pairs_inside(case), *_settings(case)):
            cases_of.setdefault(met, []).append(case)
    inside = dict.fromkeys(met for met in cases_of if isinstance(met[0], tuple))
    of_layouts = {
        pair: setting
        for setting in cases_of
        if setting not in inside
        for layout in LAYOUTS
        for pair in pairs_with(cases_of[setting][0], layout)
    }
    rows: list[Row] = []
    missing = inside | of_layouts
    while missing:
        wanted, setting = next(iter(missing.items()))
        fitting = cases_of[setting or wanted]
        used = Counter(layout for row in rows for layout in row.layouts)
        tries = [draw.choice(fitting) for _ in range(num_tries)]
        best = nlargest(10, tries, key=lambda case: len(pairs_inside(case).keys() & missing.keys()))
        found = [_best_layouts(case, missing.keys(), used) for case in best]
        rows.append(max(found, key=lambda row: len(_pairs(row).keys() & missing.keys())))
        for pair in _pairs(rows[-1]):
            missing.pop(pair, None)
    return rows


def _settings(case: Case) -> list[Setting]:
    return [(name, getattr(case, name)) for name in FACTORS]


def _pairs(row: Row) -> Pairs:
    return pairs_inside(row.case) | {pair: None for layout in row.layouts for pair in pairs_with(row.case, layout)}


def _best_layouts(case: Case, missing: KeysView[Any], used: Mapping[Layout, int]) -> Row:
    """Of each world the layout that adds the most pairs, if one does; among equals the least used."""

    def added(layout: Layout) -> int:
        return len(pairs_with(case, layout).keys() & missing)

    best = [
        max((layout for layout in LAYOUTS if layout.world == world), key=lambda layout: (added(layout), -used[layout]))
        for world in WORLDS
    ]
    adding = tuple(layout for layout in best if added(layout))
    return Row(case, adding or (min(best, key=lambda layout: used[layout]),))
