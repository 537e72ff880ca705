"""What is logged of a model, against the same numbers by hand."""

import torch
from stable_baselines3.common.logger import Logger

from totalprop.agents.trials.metrics import record_gp, record_model_fit
from totalprop.world_models.gp_dynamics import GPDynamics

F64 = torch.float64


def fitted(**how):
    """A model of 12 transitions of a state of 3 entries, whose hyper-parameters are set."""
    source = torch.Generator().manual_seed(0)
    model = GPDynamics(3, 1, **how)
    n = len(model.predicted_dims)
    inputs = torch.randn(12, 4, generator=source, dtype=F64)
    model.gp.set_data(inputs, torch.randn(12, n, generator=source, dtype=F64))
    with torch.no_grad():
        model.gp.log_noise.copy_(torch.tensor([0.3, 0.5, 0.7][:n], dtype=F64).log())
        model.gp.log_signal.copy_(torch.tensor([2.0, 3.0, 4.0][:n], dtype=F64).log())
    return model


def test_the_errors_of_a_trial_by_hand():
    model, logger = fitted(integrated_dims=((0, 2),), time_step=0.5), Logger(None, [])
    source = torch.Generator().manual_seed(1)
    states, following = (torch.randn(5, 3, generator=source, dtype=F64) for _ in range(2))
    controls = torch.randn(5, 1, generator=source, dtype=F64)
    record_model_fit(logger, model, states, controls, following)
    with torch.no_grad():
        found = model.gp.posterior(torch.cat((states, controls), -1))
    squares, deviations = [], []
    for i in range(5):
        for e, d in enumerate((1, 2)):  # 0 is integrated from 2
            error = float(following[i, d] - states[i, d] - found.mean[i, e])
            variance = float(found.variance[i, e]) + (0.3, 0.5)[e] ** 2
            squares.append(error**2 / variance)
            deviations.append((e, error**2))
    told = logger.name_to_value
    expected = torch.tensor(squares).mean().sqrt().item()
    assert abs(told["model_fit/standardised_error"] - expected) < 1e-6
    for e in range(2):
        rmse = torch.tensor([square for at, square in deviations if at == e]).mean().sqrt().item()
        assert abs(told[f"model_fit/rmse_{e}"] - rmse) < 1e-6
    assert "model_fit/rmse_2" not in told


def test_the_hyper_parameters_are_deviations_and_lengths():
    model, logger = fitted(), Logger(None, [])
    lengths = torch.arange(1.0, 13.0, dtype=F64).view(3, 4)
    with torch.no_grad():
        model.gp.log_lengthscale.copy_(lengths.log())
    record_gp(logger, model, torch.tensor([1.0, 2.0, 6.0]))
    told = logger.name_to_value
    assert told["gp/negative_log_likelihood"] == 3.0 and told["gp/data"] == 12
    for e in range(3):
        assert abs(told[f"gp/noise_{e}"] - (0.3, 0.5, 0.7)[e]) < 1e-9
        assert abs(told[f"gp/signal_{e}"] - (2, 3, 4)[e]) < 1e-9
        for d in range(4):
            assert abs(told[f"gp/lengthscale_{e}_{d}"] - float(lengths[e, d])) < 1e-9
