"""The plan of a comparison: arms, budgets, and what is refused before anything is trained."""

import pytest

from moejax.analysis.compare.arms import Budget, arms_of, parse_arm, parse_budget
from moejax.analysis.compare.plan import make_plan, token_mix
from moejax.analysis.compare.results import choose_rate
from moejax.analysis.flops import flops_by_modality, flops_per_token
from moejax.config import load_config
from moejax.errors import UserError

TINY = [
    "model.num_layers=2",
    "model.d_model=16",
    "model.num_heads=2",
    "model.ffn_hidden=(32,)",
    "data.batch_size=4",
]


def plan(configs: str, budget: str, *arms: str, overrides=(), **options):
    specs = arms_of(configs, arms)
    return make_plan(specs, parse_budget(budget), overrides=[*TINY, *overrides], **options)


def test_arms():
    assert parse_arm("wide=mot,model.d_model=64,model.ffn_hidden=(8,16)").overrides == (
        "model.d_model=64",
        "model.ffn_hidden=(8,16)",
    )
    assert parse_arm("x=moma,model.moe.allowed=((0,1),(2,3))").overrides == (
        "model.moe.allowed=((0,1),(2,3))",
    )
    assert [arm.name for arm in arms_of("mot,mot", ["x=mot"])] == ["mot", "mot_2", "x"]
    for configs, arms, message in [
        ("mot", [], "--configs: name at least two"),
        ("mot", ["mot:7b"], "--arm mot:7b: write --arm NAME=CONFIG"),
    ]:
        with pytest.raises(UserError, match=message):
            arms_of(configs, arms)


@pytest.mark.parametrize("text", ["3e12", "flops=", "flops=-1", "flops=inf", "hours=3"])
def test_budgets_that_are_none(text):
    with pytest.raises(UserError, match="--budget .*write flops=3e12"):
        parse_budget(text)


def test_equal_flops_are_fewer_steps_of_a_dearer_arm():
    got = plan("quickstart:dense", "flops=2e10", "deep=quickstart:dense,model.num_layers=4")
    first, deep = got.arms
    config = first.config
    positions = config.data.batch_size * config.data.sequence_length
    assert first.flops_per_step == 3 * flops_per_token(config) * positions
    assert deep.flops_per_step > first.flops_per_step
    assert first.flops == pytest.approx(2e10, rel=0.02) == deep.flops
    assert deep.steps < first.steps
    by_tokens = plan(
        "quickstart:dense", "flops=2e10", "deep=quickstart:dense,model.num_layers=4", match="tokens"
    )
    assert [arm.steps for arm in by_tokens.arms] == [first.steps, first.steps]
    by_tokens = plan("quickstart:dense,quickstart", "tokens=25600")
    assert [arm.steps for arm in by_tokens.arms] == [25600 / positions] * 2


def test_all_arms_can_be_widened_in_proportion():
    got = plan("quickstart:dense,quickstart", "steps=9", width=48)
    for arm in got.arms:
        model = arm.config.model
        assert (model.d_model, model.num_heads, model.ffn_hidden) == (48, 6, (96,))
    with pytest.raises(UserError, match="--width: 50 is no multiple of the head size 8"):
        plan("quickstart:dense,quickstart", "steps=9", width=50)


def test_modalities_that_cost_more_count_by_their_tokens():
    """A text tower of another width: the budget is of the tokens that there are."""
    got = plan("quickstart", "flops=2e10", "wide=quickstart,model.ffn_hidden=(32,320)")
    wide = got.arms[1]
    costs, mix = flops_by_modality(wide.config), token_mix(wide.config)
    assert costs["image"].forward > costs["text"].forward and 0.5 < mix["image"] < 1
    mean = sum(mix[name] * cost.forward for name, cost in costs.items())
    positions = wide.config.data.batch_size * wide.config.data.sequence_length
    assert wide.flops_per_step == pytest.approx(3 * mean * positions)


def test_arms_differ_in_nothing_that_the_comparison_sets():
    got = plan("quickstart:dense,quickstart", "flops=2e10", evaluations=5, seeds=2)
    for arm in got.arms:
        assert arm.config.optim.schedule == "constant"
        assert arm.config.eval.every == -(-arm.steps // 5)
        runs = [arm.run(rate, seed) for rate in got.rates for seed in range(2)]
        assert len({run.folder for run in runs}) == len(runs)
        assert all(run.config.data.seed == run.config.train.seed == run.seed for run in runs)
    a, b = (arm.run(got.rates[0], 1).config for arm in got.arms)
    assert (a.data, a.optim, a.train, a.eval) == (b.data, b.optim, b.train, b.eval)


@pytest.mark.parametrize(
    ("configs", "budget", "arms", "options", "message"),
    [
        ("quickstart,quickstart:speech", "steps=9", [], {}, "quickstart:speech .*not of the same"),
        ("quickstart", "steps=9", ["b=quickstart,data.order=text_first"], {}, "data.order=random"),
        ("quickstart,tokenizer_fsq", "steps=9", [], {}, "compares models of modalities, not a fsq"),
        ("quickstart,mot", "steps=9", [], {"overrides": ["train.steps=3"]}, "see --budget"),
        ("quickstart", "steps=9", ["b=quickstart,data.seed=3"], {}, "see --seeds"),
        ("quickstart,quickstart", "steps=3", [], {}, "3 steps of quickstart, fewer than the 8"),
        ("quickstart,quickstart", "steps=9", [], {"rates": (1e-3, 2e-3)}, "at least three diff"),
        ("quickstart,quickstart", "steps=9", [], {"schedule": "cosine"}, "choose from: constant"),
        (
            *("quickstart,quickstart", "steps=9", []),
            {"schedule": "wsd", "overrides": ["optim.decay_fraction=0.8"]},
            "optim.decay_fraction: 0.8 leaves too few",
        ),
        ("quickstart,quickstart", "steps=9", [], {"match": "token"}, "did you mean 'tokens'"),
        ("quickstart", "steps=9", ["quickstart=mot"], {}, "two arms have that name"),
        ("quickstart", "steps=9", ["a b=mot", "a_b=mot"], {}, "the folder a_b"),
        ("quickstart", "steps=9", ["..=mot"], {}, "letters or digits"),
        ("quickstart", "steps=9", ["b=quickstart,eval.split=test"], {}, "eval.split=val, b test"),
        ("quickstart", "steps=9", ["b=quickstart,config.train.steps=3"], {}, "see --budget"),
        ("quickstart", "steps=9", ["b=quickstart,eval.metrics=()"], {}, "gives text/loss or image"),
        ("quickstart", "steps=9", ["b=quickstart,optim.decay_fraction=0.5"], {}, "decay_fraction"),
        ("quickstart,quickstart", "steps=9", [], {"seeds": 0}, "--seeds 0"),
        (
            "vit,vmoe",
            "steps=9",
            [],
            {"also": ("accuracy",)},
            "--also accuracy: no evaluator of vit",
        ),
        ("vit", "steps=9", ["b=vit,eval.metrics=()"], {}, "no evaluator of b gives image/loss"),
        ("quickstart,quickstart", "steps=9", [], {"evaluations": 1}, "needs at least 2"),
    ],
)
def test_refusals(configs, budget, arms, options, message):
    specs = arms_of(configs, arms)
    with pytest.raises(UserError, match=message):
        make_plan(specs, parse_budget(budget), **options)


def test_of_vision_models_pictures_are_counted():
    """A step of theirs is a batch of pictures, whatever data.sequence_length says."""
    specs = arms_of("vit,vmoe", [])
    got = make_plan(specs, parse_budget("flops=1e13"), also=("image/accuracy",))
    for arm in got.arms:
        batch = arm.config.data.batch_size
        assert arm.flops_per_step == 3 * flops_per_token(arm.config) * batch
        assert (arm.tokens, arm.unit) == (arm.steps * batch, "pictures")
    assert got.arms[1].steps < got.arms[0].steps
    assert got.modalities == ("image",) and got.document()["also"] == ["image/accuracy"]


FLOW = "objective.direction=to_noise,objective.times.distribution=logit_normal"


@pytest.mark.parametrize("arms", [[f"a=sit,{FLOW}", "b=promoe"], ["a=clip", "b=limoe"]])
def test_modalities_without_a_loss_of_their_own_are_not_compared(arms):
    """Pictures of which nothing is said, and the texts of pairs."""
    got = make_plan(arms_of("", arms), parse_budget("steps=20"))
    assert got.modalities == ("image",)
    assert [len(arm.config.model.modalities) for arm in got.arms] == [1, 2]


def test_a_budget_that_whole_steps_miss_is_refused():
    """9.4 steps: neither 9 nor 10 are within 2%; nor may two arms miss it to both sides."""
    one = plan("quickstart:dense,quickstart", "flops=2e10").arms[0].flops_per_step
    with pytest.raises(UserError, match="more than 2% from"):
        plan("quickstart:dense,quickstart", f"flops={9.4 * one}")
    assert plan("quickstart:dense,quickstart", f"flops={9.1 * one}").arms[0].steps == 9


def sweep(best: float, **options):
    """The sweep of an arm whose score is least at the rate ``best``."""
    got = plan("quickstart:dense,quickstart", "steps=9", **options)
    asked = []

    def score(run):
        asked.append(run.rate)
        return abs(run.rate / best - 1)

    tried, rate = choose_rate(got, got.arms[0], score)
    assert asked == [rate for rate, _ in sorted(tried, key=lambda pair: asked.index(pair[0]))]
    return [rate for rate, _ in tried], rate


def test_the_best_rate_is_not_left_at_an_end_of_the_sweep():
    rates = (1e-3, 2e-3, 4e-3)
    assert sweep(2e-3, rates=rates) == ([1e-3, 2e-3, 4e-3], 2e-3)
    assert sweep(8e-3, rates=rates) == ([1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 8e-3)
    assert sweep(5e-4, rates=rates) == ([2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3], 5e-4)
    # Seven are enough; the table then says that the best is at the edge.
    assert sweep(1.0, rates=rates)[1] == 64e-3
    assert sweep(1.0, rates=(1e-3,)) == ([1e-3], 1e-3), "one rate is taken as given"


def test_default_rates_lie_around_the_baselines():
    got = plan("quickstart:dense,quickstart", "steps=9")
    assert got.rates == (1.5e-3, 3e-3, 6e-3)
    assert got.budget == Budget("steps", 9) and got.match == "tokens"
    assert got.arms[0].config.model == load_config("quickstart:dense", TINY).model
