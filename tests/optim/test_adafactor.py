import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.optim.adafactor import Factored, scale_by_factored_rms
from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.optimizers import Adafactor, make_optimizer
from jaxinfra.optim.schedules import Constant

LR = 0.1
RULE = Adafactor(min_factored_dim=8, weight_decay=0.0)


def reference(param_RC, grads):
    """The paper's Algorithm 4 for one matrix, in float64."""
    rows, cols = np.zeros(param_RC.shape[0]), np.zeros(param_RC.shape[1])
    for t, g_RC in enumerate(grads, start=1):
        decay = 1 - t**-0.8
        square = g_RC**2 + 1e-30
        rows = decay * rows + (1 - decay) * square.sum(1)
        cols = decay * cols + (1 - decay) * square.sum(0)
        u = g_RC / np.sqrt(np.outer(rows, cols) / rows.sum())
        u = u / max(1.0, np.sqrt((u**2).mean()))
        param_RC = param_RC - LR * max(1e-3, np.sqrt((param_RC**2).mean())) * u
    return param_RC


def matrices(tree):
    """Layer 1 of the stacked projections and the unstacked parameters, each as rows x columns in float64."""
    return {
        "q": np.asarray(tree["blocks"]["q"][1], np.float64).reshape(8, 16),
        "o": np.asarray(tree["blocks"]["o"][1], np.float64).reshape(16, 8),
        "embedding": np.asarray(tree["embedding"], np.float64),
        "head": np.asarray(tree["head"], np.float64),
    }


def test_stacked_matrices_are_factored_separately(specs, draw, train):
    optim = OptimConfig(optimizer=RULE, schedule=Constant(), peak_lr=LR)
    params, _ = train(make_optimizer(optim, steps=3, specs=specs), 3)
    start, *grads = (matrices(draw(seed)) for seed in range(4))
    for name, got in matrices(params).items():
        want = reference(start[name], [g[name] for g in grads])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6, err_msg=name)


def test_small_and_one_dimensional_parameters_are_not_factored(specs, draw):
    params = draw(0)
    tx = scale_by_factored_rms(specs, decay_power=0.8, min_factored_dim=9, clip_rms=None)
    _, state = tx.update(params, tx.init(params))
    assert not any(isinstance(leaf, Factored) for leaf in jax.tree.leaves(state.second, is_leaf=is_factored))
    # The first update has decay 0: the moment is the squared gradient, so every element changes by 1.
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_allclose(updates["blocks"]["scale"], np.sign(params["blocks"]["scale"]), rtol=1e-5)


def is_factored(leaf):
    return isinstance(leaf, Factored)


def test_zero_gradients_change_nothing(specs, draw):
    params = draw(0)
    tx = make_optimizer(OptimConfig(optimizer=RULE, schedule=Constant(), peak_lr=LR), steps=1, specs=specs)
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
