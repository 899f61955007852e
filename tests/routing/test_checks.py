"""What a config may not say, in one line that names the field and the mend."""

import pytest

from moejax.errors import UserError
from moejax.routing import ROUTERS, check_router, check_router_loss, check_score

FIELD = "model.moe.router.options."


def message(name, options, experts=8, causal=False):
    with pytest.raises(UserError) as error:
        check_router(name, options, experts, causal)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, options, start, part",
    [
        ("tpo_k", {}, "model.moe.router.name:", "did you mean 'top_k'?"),
        ("top_k", {"norm": "softmax"}, FIELD + "norm:", "no such option"),
        ("top_k", {"nosie": "gumbel"}, FIELD + "nosie:", "did you mean 'noise'?"),
        ("top_k", {"renormalise": 1}, FIELD + "renormalise:", "expected bool"),
        ("top_k", {"top_k": 2.5}, "model.moe.router.options.top_k:", "expected int"),
        ("top_k", {"top_k": 9}, "model.moe.top_k:", "9 experts of 8"),
        ("top_k", {"top_k": 0}, "model.moe.top_k:", "at least 1"),
        ("top_k", {"normalise": "softplus"}, FIELD + "normalise:", "'softmax', 'sigmoid'"),
        ("top_k", {"noise": "uniform"}, FIELD + "noise:", "'gaussian', 'gumbel', 'logistic'"),
        ("top_k", {"noise_scale": -1.0}, FIELD + "noise_scale:", "at least 0"),
        ("top_k", {"scale": 0.0}, FIELD + "scale:", "positive"),
        ("top_k", {"num_groups": 3}, FIELD + "num_groups:", "choose a divisor"),
        (
            "top_k",
            {"num_groups": 4, "top_groups": 5},
            FIELD + "top_groups:",
            "from 1 to num_groups=4",
        ),
        (
            "top_k",
            {"top_k": 4, "num_groups": 4},
            FIELD + "top_groups:",
            "fewer than top_k=4; raise it",
        ),
        (
            "top_k",
            {"normalise": "identity", "renormalise": True},
            FIELD + "renormalise:",
            "may be negative",
        ),
        (
            "expert_choice",
            {"normalise": "identity", "weights": "share"},
            FIELD + "weights:",
            "choose 'scores'",
        ),
        ("top_k", {"group_score": "mean"}, FIELD + "group_score:", "'max', 'top2'"),
        (
            "top_k",
            {"normalise": "sigmoid", "normalise_first": False},
            FIELD + "normalise_first:",
            "leave it True",
        ),
        (
            "top_k",
            {"top_k": 1, "random_second": True},
            FIELD + "random_second:",
            "model.moe.top_k=2",
        ),
        ("expert_choice", {"capacity_factor": 0.0}, FIELD + "capacity_factor:", "positive"),
        ("expert_choice", {"capacity_factor": 9.0}, FIELD + "capacity_factor:", "there are 8"),
        ("expert_choice", {"rounding": "even"}, FIELD + "rounding:", "'up', 'down'"),
        ("expert_choice", {"causal_rule": "aux"}, FIELD + "causal_rule:", "'aux_router'"),
        ("top_p", {"top_p": 1.5}, FIELD + "top_p:", "from 0 to 1"),
        ("top_p", {"top_k": 9}, "model.moe.top_k:", "9 experts of 8"),
        ("top_p", {"estimator": "reinforce"}, FIELD + "estimator:", "'sparsemixer'"),
        ("top_p", {"gap": -0.1}, FIELD + "gap:", "at least 0"),
        ("threshold", {"threshold": 1.0}, FIELD + "threshold:", "below 1"),
        ("sinkhorn", {"temperature": 0.0}, FIELD + "temperature:", "positive"),
        ("sinkhorn", {"iterations": 0}, FIELD + "iterations:", "at least 1"),
        ("soft", {"slots": 0}, FIELD + "slots:", "at least 1"),
    ],
)
def test_impossible_options(name, options, start, part):
    text = message(name, options)
    assert text.startswith(start) and part in text, text


@pytest.mark.parametrize("name", [n for n in ROUTERS if not ROUTERS.get(n).causal])
def test_a_decoder_needs_a_causal_rule(name):
    text = message(name, {}, causal=True)
    rules = ROUTERS.get(name).causal_rules
    if not rules:
        assert text.startswith("model.moe.router.name:") and "another router" in text
    else:
        assert text.startswith(FIELD + "causal_rule:") and all(rule in text for rule in rules)
    check_router(name, {}, 8, causal_model=False)


def test_numbers_may_be_written_without_a_point():
    check_router("top_k", {"scale": 2}, 8, causal_model=True)


def test_scores_and_losses_have_checked_options_too():
    check_score("mlp", {"hidden": 32, "activation": "gelu"})
    check_router_loss("gshard", {"per": "batch", "counted": "all"}, "model.moe.losses[0]")
    for call, text in (
        (lambda: check_score("liner", {}), "model.moe.score.name: no score 'liner'.*'linear'"),
        (lambda: check_score("mlp", {"activation": "relu"}), "score.options.activation: 'relu'"),
        (lambda: check_score("linear", {"hidden": 3}), "score.options.hidden: score 'linear'"),
        (
            lambda: check_router_loss("swich", {}, "model.moe.losses[1]"),
            r"model.moe.losses\[1\].name: no router loss 'swich'.*'switch'",
        ),
        (
            lambda: check_router_loss("switch", {"per": "row"}, "model.moe.losses[1]"),
            r"model.moe.losses\[1\].options.per: 'row' is none of batch, group",
        ),
        (
            lambda: check_router_loss("entropy_global", {"tau": 1.0}, "model.moe.losses[1]"),
            r"options.tau: router loss 'entropy_global' has no such option",
        ),
    ):
        with pytest.raises(UserError, match=text):
            call()
