"""Settings that name one of a few ways are refused where they are given."""

from functools import partial

import pytest
from torch import nn

from distmoe.moe.gates import GATES
from distmoe.moe.gates.base import Gate
from distmoe.moe.losses import SimilarityLoss
from tests.unit.moe.gate_forms import NUM_EXPERTS


def with_group(name: str, group: object) -> Gate:
    return GATES[name](*([] if name == "hash" else [nn.Identity()]), NUM_EXPERTS, group=group)


GROUPED = ["topk", "noisy_topk", "switch", "cosine", "sigmoid", "expert_choice", "soft", "hash"]


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_that_is_none_is_refused_when_a_gate_is_made(name):
    for group in ("imgae", 0, -1, 1.5, True):
        with pytest.raises(ValueError, match=rf"group \({group!r}\) must be image, batch, or a number of images"):
            with_group(name, group)
    assert [with_group(name, group).group for group in ("image", "batch", 3)] == ["image", "batch", 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(GATES["topk"], None, 4, priority="scores"), "priority 'scores' is not one of position, score"),
        (partial(GATES["noisy_topk"], None, 4, priority=""), "priority '' is not one of position, score"),
        (partial(GATES["switch"], None, 4, priority=None), "priority None is not one of position, score"),
        (partial(GATES["cosine"], None, 4, priority="Score"), "priority 'Score' is not one of position, score"),
        (partial(GATES["sigmoid"], None, 4, priority="first"), "priority 'first' is not one of position, score"),
        (partial(GATES["hash"], 4, by="tokens"), "by 'tokens' is not one of token, sample, position"),
        (partial(SimilarityLoss, "inside"), "pairs 'inside' is not one of within, between"),
        (partial(SimilarityLoss, "within", "papers"), "form 'papers' is not one of paper, authors"),
        (partial(SimilarityLoss, "within", "paper", "pixel"), "distance 'pixel' is not one of pixels, tokens"),
    ],
)
def test_a_misspelt_choice_is_refused_where_it_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()
