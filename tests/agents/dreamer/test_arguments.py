"""What DreamerTPX's constructor takes, and the one sentence it gives for what it does not."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

import totalprop.envs  # noqa: F401
from totalprop import estimators
from totalprop.agents import DreamerTPX
from totalprop.agents.dreamer.policy import SIZES, DreamerPolicy
from totalprop.agents.dreamer.presets import PRESETS
from totalprop.world_models.latent.networks import ImageEncoder, VectorEncoder

TINY = {
    "policy_kwargs": {"deter": 8, "hidden": 8, "width": 8, "stoch": 4, "conv_depth": 2},
    "sequence_length": 5,
    "batch_size": 3,
    "horizon": 3,
    "gradient_steps": 1,
    "buffer_size": 500,
    "device": "cpu",
}
VECTOR = spaces.Box(-1, 1, (4,), np.float32)


class SpaceEnv(gym.Env):
    """Samples of its observation space, for ever."""

    def __init__(self, observation=VECTOR, action=None):
        self.observation_space = observation
        self.action_space = action or spaces.Box(-2, 4, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def make(env=None, policy="DreamerPolicy", **changes):
    return DreamerTPX(policy, SpaceEnv() if env is None else env, **{**TINY, **changes})


def image(height, width, channels, dtype=np.uint8, high=255):
    return spaces.Box(0, high, (height, width, channels), dtype)


# What is taken


@pytest.mark.parametrize(
    ("env", "n_envs"),
    [("Pendulum-v1", 1), (SpaceEnv(), 1), (DummyVecEnv([SpaceEnv] * 2), 2)],
    ids=["id", "instance", "VecEnv"],
)
def test_environment_may_be_an_id_an_instance_or_a_vec_env(env, n_envs):
    agent = make(env)
    assert agent.get_env().num_envs == n_envs
    observations = np.stack([agent.observation_space.sample() for _ in range(n_envs)])
    actions, _ = agent.predict(observations)
    assert actions.shape == (n_envs, *agent.action_space.shape)


def test_policy_may_be_a_name_or_a_subclass():
    class Mine(DreamerPolicy):
        pass

    assert type(make().policy) is DreamerPolicy and type(make(policy=Mine).policy) is Mine


def test_policy_kwargs_reach_the_networks():
    policy = make(policy_kwargs={"deter": 7, "stoch": 3, "width": 5, "hidden": 6}).policy
    rssm = policy.model.rssm
    assert (rssm.deter_size, rssm.stoch_size) == (7, 3)
    assert policy.actor.out.in_features == 5 and rssm.input_layer.out_features == 6


@pytest.mark.parametrize("size", SIZES)
def test_a_size_sets_all_numbers_that_are_not_given(size):
    policy = make(policy_kwargs={"size": size, "deter": 7}).policy
    numbers = {**SIZES[size], "deter": 7}
    assert {name: policy.sizes[name] for name in numbers} == numbers
    assert policy.critic[0].in_features == numbers["stoch"] + 7
    assert policy.critic[0].out_features == numbers["width"]


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"^size must be one of s, m, l, got 'xl'$"):
        make(policy_kwargs={"size": "xl"})


def test_the_default_size_is_dreamer_v1s():
    assert DreamerTPX("DreamerPolicy", SpaceEnv()).policy.sizes["width"] == 400


@pytest.mark.parametrize("name", PRESETS)
def test_presets_construct(name):
    agent = DreamerTPX("DreamerPolicy", SpaceEnv(), **PRESETS[name], device="cpu")
    for key, value in PRESETS[name].items():
        assert getattr(agent, key) == value


def test_defaults_are_dreamer_v1s():
    """The numbers of danijar/dreamer are the constructor's, estimator and discount head apart."""
    agent, preset = DreamerTPX("DreamerPolicy", SpaceEnv()), PRESETS["dreamer2020"]
    different = [key for key, value in preset.items() if getattr(agent, key) != value]
    assert different == ["estimator", "discount_head"]


@pytest.mark.parametrize(
    ("space", "encoder", "shape"),
    [
        (VECTOR, VectorEncoder, (4,)),
        (spaces.Box(-1, 1, (4,), np.float64), VectorEncoder, (4,)),
        (spaces.Box(0, 255, (9,), np.uint8), VectorEncoder, (9,)),
        (spaces.Box(-1, 1, (2, 3)), VectorEncoder, (6,)),
        (spaces.Box(-1, 1, ()), VectorEncoder, (1,)),
        (image(64, 64, 3), ImageEncoder, (3, 64, 64)),
        (image(64, 64, 1), ImageEncoder, (1, 64, 64)),
        (spaces.Box(0, 255, (9, 64, 64), np.uint8), ImageEncoder, (9, 64, 64)),
    ],
    ids=["vector", "float64", "bytes", "matrix", "number", "RGB", "grey", "stack"],
)
def test_box_observations_that_are_taken(space, encoder, shape):
    agent = make(SpaceEnv(space), learning_starts=8).learn(9)
    assert isinstance(agent.policy.model.encoder, encoder)
    assert agent.replay_buffer._arrays["observation"].shape[2:] == shape
    assert agent.predict(space.sample())[0].shape == (2,)


def test_the_readings_of_tpx_2023():
    """Sec. 6.2 says DreamerV1's hyperparameters; the code came from yusukeurakami's."""
    dreamer, paper, code = (PRESETS[n] for n in ("dreamer2020", "tpx2023", "tpx2023-urakami"))
    changed = {key: value for key, value in paper.items() if dreamer.get(key) != value}
    assert changed == {"estimator": "tpx-unclipped", "baseline": "mean", "discount_weights": False}
    assert paper["model_learning_rate"] == 6e-4 and code["model_learning_rate"] == 1e-3
    layers = [
        DreamerTPX("DreamerPolicy", SpaceEnv(), **preset, device="cpu").policy.critic[0]
        for preset in (paper, code)
    ]
    assert [layer.out_features for layer in layers] == [400, 200]


@pytest.mark.parametrize("name", ["leave-one-out", "mean", "critic"])
def test_baseline_reaches_the_estimator(name):
    settings = make(baseline=name, estimator="lr")._update.settings
    assert settings.estimator.baseline is estimators.baselines.BASELINES[name]


@pytest.mark.parametrize("name", ["first-order", "lax", "mvd"])
def test_leg_reaches_the_estimator(name):
    settings = make(leg=name)._update.settings
    assert settings.estimator.legs == (estimators.legs.LEGS[name],)


@pytest.mark.parametrize("leg", ["lax", "mvd"])
@pytest.mark.parametrize("name", ["tpx", "ivw"])  # of one pass, and of several
def test_legs_with_a_critic_are_for_gaussians(name, leg):
    with pytest.raises(ValueError, match=f"'{leg}_leg' needs a Gaussian node"):
        make(estimator=name, leg=leg, policy_kwargs={"latent": "categorical"})


def test_an_estimator_object_is_used_as_it_is():
    mine = estimators.make("tpx", cross_fit=True, baseline=estimators.baselines.mean)
    assert make(estimator=mine)._update.settings.estimator == mine


def test_a_registered_estimator_keeps_its_baseline(monkeypatch):
    mine = estimators.make("tpx", baseline=estimators.baselines.critic)
    monkeypatch.setitem(estimators.registry._REGISTRY, "mine", mine)
    assert make(estimator="mine")._update.settings.estimator == mine


@pytest.mark.parametrize("changes", [{}, {"baseline": "mean"}, {"leg": "first-order"}])
def test_auto_is_tpx_for_a_box_and_lr_with_a_critic_for_choices(changes):
    """Unless the choices are differentiated straight-through under every estimator."""

    def found(env, **own):
        return make(env, **own, **changes)._update.settings.estimator

    baseline = {} if "baseline" in changes else {"baseline": "critic"}
    choices = found("CartPole-v1", estimator="auto")
    assert choices == found("CartPole-v1", estimator="lr", **baseline)
    for env, node in (
        ("CartPole-v1", "latent"),
        ("Pendulum-v1", "auto"),
        ("Pendulum-v1", "action"),
    ):
        assert found(env, estimator="auto", node=node) == found(env, estimator="tpx", node=node)


def test_auto_entropy_scale_depends_on_the_actions():
    """It stays "auto" in the agent, and a number that is set later counts."""
    for env, scale in [("CartPole-v1", 3e-3), ("Pendulum-v1", 2e-3)]:
        agent = make(env, entropy_scale="auto")
        assert agent._update_settings().imagination.entropy_scale == scale
        assert agent.entropy_scale == "auto"
        agent.entropy_scale = 0.25
        assert agent._update_settings().imagination.entropy_scale == 0.25


def test_arguments_reach_the_update():
    changes = {
        "gamma": 0.9, "lam": 0.8, "stop_grad_actor_input": False, "discount_weights": False,
        "entropy_scale": 0.1, "kl_scale": 0.2, "free_nats": 0.3, "free_nats_per_step": True,
        "discount_scale": 0.4, "horizon": 4, "imagination_starts": 5, "learning_rate": 0.6,
        "model_learning_rate": 0.7, "adam_eps": 0.8, "max_grad_norm": 0.9, "bf16": True,
        "decoded_share": 0.5, "scale_returns": True, "node": "both",
        "representation_scale": 0.25, "slow_critic_rate": 0.3, "slow_actor_rate": 0.15,
    }  # fmt: skip
    settings = make(**changes)._update.settings
    flat = {**vars(settings), **vars(settings.imagination), **settings.model._asdict()}
    assert {name: flat[name] for name in changes} == changes
    own = make(credit="own")._update.settings  # needs discount_weights
    assert own.imagination.credit == "own"


# What is refused


def test_unknown_policy_name_is_an_error():
    with pytest.raises(ValueError, match="MlpPolicy"):
        make(policy="MlpPolicy")


def test_constructor_without_an_environment_says_what_is_missing():
    with pytest.raises(ValueError, match=r"needs an environment.*pass env="):
        DreamerTPX("DreamerPolicy")


WRONG = [
    ("horizon", 1, "at least 2, a whole number"),
    ("horizon", 2.5, "at least 2, a whole number"),
    ("batch_size", 0, "at least 1, a whole number"),
    ("sequence_length", 1, "at least 2, a whole number"),
    ("imagination_starts", -1, "0 or at least 3, a whole number"),
    ("imagination_starts", 1, "0 or at least 3, a whole number"),
    ("imagination_starts", 2, "0 or at least 3, a whole number"),
    ("buffer_size", 1, "at least 2, a whole number"),
    ("learning_starts", 0, "at least 1, a whole number"),
    ("train_freq", 0, "at least 1, a whole number"),
    ("gradient_steps", 0, "at least 1, a whole number"),
    ("replay_ratio", -1.0, r"in \[0, 1e\+06\]"),
    ("replay_ratio", 1e7, r"in \[0, 1e\+06\]"),
    ("model_learning_rate", 0.0, "above 0"),
    ("adam_eps", -1.0, "above 0"),
    ("max_grad_norm", 0.0, "above 0"),
    ("discount_scale", 0.0, "above 0"),
    ("exploration_noise", -0.1, "at least 0"),
    ("hold_exponent", -1.0, "at least 0"),
    ("entropy_scale", -0.1, "at least 0"),
    ("kl_scale", -1.0, "at least 0"),
    ("free_nats", -3.0, "at least 0"),
    ("gamma", 1.1, r"in \[0, 1\]"),
    ("lam", -0.1, r"in \[0, 1\]"),
    ("baseline", "none", "one of leave-one-out, mean, critic"),
    ("leg", "biw", "one of score, first-order, lax, mvd"),
    ("storage", "gpu", "one of ram, disk, device"),
    ("learning_rate", -0.1, "at least 0"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_wrong_values_are_one_sentence_with_the_value_and_the_remedy(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name} must be {expected}, got {value!r}$") as error:
        make(**{name: value})
    assert "\n" not in str(error.value)


def test_unknown_estimator_lists_every_name_that_works():
    with pytest.raises(ValueError, match="unknown estimator 'tpxx': did you mean") as error:
        make(estimator="tpxx")
    assert str(error.value).split("choose one of ")[1].split(", ") == estimators.names()


def test_discount_head_is_not_a_policy_argument():
    with pytest.raises(ValueError, match="pass discount_head to DreamerTPX, not"):
        make(policy_kwargs={"discount_head": True})


def test_a_model_of_a_gpu_s_graph_loads_on_a_cpu(tmp_path):
    agent = make(cuda_graph=True, device="cpu")
    assert not agent._update.settings.cuda_graph
    agent.save(tmp_path / "model")
    assert DreamerTPX.load(tmp_path / "model", device="cpu").cuda_graph


def test_buffer_must_hold_a_sequence_of_every_environment():
    with pytest.raises(ValueError, match=r"buffer_size must .*at least 5 x 2, got 9$"):
        make(DummyVecEnv([SpaceEnv] * 2), buffer_size=9)
    make(DummyVecEnv([SpaceEnv] * 2), buffer_size=10)


@pytest.mark.parametrize("episode", [1, 5, 6, 7, 23])
def test_the_least_buffer_holds_a_window_at_every_round(episode):
    env = DummyVecEnv([lambda: TimeLimit(SpaceEnv(), episode)] * 2)
    settings = {"learning_starts": 20, "train_freq": 2, "sequence_length": 6, "buffer_size": 12}
    assert make(env, **settings).learn(100)._n_updates == 41


def test_inverted_pendulum_falls_before_a_sequence_is_over_and_is_learned():
    """With random actions its episodes last 5 to 20 steps; a sequence has 50 entries."""
    settings = {**TINY, "sequence_length": 50, "learning_starts": 100, "train_freq": 50}
    agent = DreamerTPX("DreamerPolicy", "InvertedPendulum-v5", **settings).learn(200)
    assert agent._n_updates == 3 and agent._has_terminated


@pytest.mark.parametrize(
    "space",
    [
        image(64, 64, 3, np.float32, 1.0),
        image(64, 64, 3, high=200),
        spaces.Box(0, 99, (64, 64), np.uint8),
        spaces.Box(0, 255, (4, 64, 64, 3), np.uint8),
    ],
    ids=["float", "200", "no channels, 99", "stack of frames"],
)
def test_pictures_in_another_form_are_not_taken_for_vectors(space):
    with pytest.raises(ValueError, match=r"^images must be uint8 in \[0, 255\].*FlattenObs"):
        make(SpaceEnv(space))


def test_unbounded_actions_are_refused():
    with pytest.raises(AssertionError, match="finite"):
        make(SpaceEnv(action=spaces.Box(-np.inf, np.inf, (2,))))


@pytest.mark.parametrize("wrap", [lambda e: e, VecMonitor], ids=["outermost", "below another"])
@pytest.mark.parametrize("space", [VECTOR, spaces.Box(0, 255, (64, 64, 3), np.uint8)])
def test_vec_normalize_is_refused_by_the_constructor(wrap, space):
    with pytest.raises(ValueError, match=r"VecNormalize.*pass the environment without"):
        make(wrap(VecNormalize(DummyVecEnv([lambda: SpaceEnv(space)]))))


def test_vec_normalize_is_refused_by_load(tmp_path):
    make().save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"VecNormalize.*pass the environment without"):
        DreamerTPX.load(tmp_path / "agent", env=VecNormalize(DummyVecEnv([SpaceEnv])))


@pytest.mark.parametrize("wrap", [lambda e: e, VecMonitor], ids=["outermost", "below another"])
def test_vec_normalize_is_refused_by_set_env(wrap):
    agent = make()
    before = agent.get_env()
    with pytest.raises(ValueError, match=r"VecNormalize.*pass the environment without"):
        agent.set_env(wrap(VecNormalize(DummyVecEnv([SpaceEnv]))))
    assert agent.get_env() is before


def test_an_estimator_object_brings_its_own_baseline():
    with pytest.raises(ValueError, match="brings its own baseline"):
        make(estimator=estimators.make("tpx"), baseline="critic")


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": estimators.make("lr", cross_fit=True), "imagination_starts": 3},
        {"batch_size": 1, "sequence_length": 2, "baseline": "critic"},
    ],
    ids=["halves", "critic of two"],
)
def test_what_cannot_estimate_is_refused_before_the_first_step(changes):
    with pytest.raises(ValueError, match=r"at least|cross_fit .* needs N >= 4"):
        make(**changes)


@pytest.mark.parametrize(
    ("name", "value"), [("gamma", "0.9"), ("gradient_steps", True), ("entropy_scale", None)]
)
def test_values_of_another_type_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make(**{name: value})


def test_numpys_numbers_are_numbers():
    assert make(horizon=np.int64(5), gamma=np.float64(0.9)).horizon == 5


@pytest.mark.parametrize("name", ["tp-guarded", "tpx-guarded", "tpg-guarded"])
def test_a_guard_with_a_blocked_state_is_a_warning(name, recwarn):
    """The means then differ by design."""
    with pytest.warns(UserWarning, match="pass stop_grad_actor_input=False"):
        make(estimator=name)
    recwarn.clear()
    make(estimator=name, stop_grad_actor_input=False)
    make(estimator=name.removesuffix("-guarded"))
    assert not [w for w in recwarn if "stop_grad" in str(w.message)]
