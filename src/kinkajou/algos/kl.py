"""Estimators of KL(policy || reference) from tokens that the policy drew, in nats per token.

With d = logp - ref_logp (Schulman 2020, "Approximating KL divergence"): k1 and k3 are unbiased, k1 may be
negative on a sample, k3 never is; k2 is biased with the gradient of the exact KL.
"""

from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "abs"]
Gradient = Literal["plain", "k2", "ratio"]


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d (Schulman 2020).  Any shape."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d^2 / 2 (Schulman 2020).  Any shape."""
    return (logp - ref_logp) ** 2 / 2


def k3(logp: Tensor, ref_logp: Tensor, *, input_clamp: float = 0.0, output_clamp: float = 0.0) -> Tensor:
    """exp(-d) - 1 + d (Schulman 2020).  Any shape.  The clamps, on d and on the value, are verl's (Sheng 2024)."""
    difference = bounded(logp - ref_logp, input_clamp)
    return bounded((-difference).exp() - 1 + difference, output_clamp)


def distance(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """|d|: neither unbiased nor a KL, offered by verl (Sheng 2024).  Any shape."""
    return (logp - ref_logp).abs()


def bounded(x: Tensor, limit: float) -> Tensor:
    """x within [-limit, limit]; a limit of 0 is none."""
    return x.clamp(-limit, limit) if limit else x


def estimate(
    logp: Tensor,
    ref_logp: Tensor,
    name: Estimator,
    *,
    clamp: float = 0.0,
    k3_input_clamp: float = 0.0,
    k3_output_clamp: float = 0.0,
) -> Tensor:
    """The named estimator (Schulman 2020), within [-clamp, clamp] (OpenRLHF, Hu 2024); `abs` is |d|.  Any shape."""
    if name == "k3":
        value = k3(logp, ref_logp, input_clamp=k3_input_clamp, output_clamp=k3_output_clamp)
    else:
        value = {"k1": k1, "k2": k2, "abs": distance}[name](logp, ref_logp)
    return bounded(value, clamp)


def with_gradient(value: Tensor, logp: Tensor, ref_logp: Tensor, ratio: Tensor, how: Gradient) -> Tensor:
    """The same numbers as a loss term, with one of three gradients.  Any shape.

    `plain` differentiates the estimator: for k1 the expected gradient is then 0, for k3 it is biased.  `k2` puts
    k2's gradient, d x grad logp, under the value; on-policy its mean is the gradient of the exact KL (Tang 2025, "On
    a few pitfalls in KL divergence gradient estimation for RL").  `ratio` weighs the estimator by the probability
    ratio and differentiates both, unbiased off-policy too (Tang 2025; DeepSeek-AI 2025, V3.2).
    """
    if how == "k2":
        under = k2(logp, ref_logp)
        return value.detach() + (under - under.detach())  # in this order nothing is rounded
    return ratio * value if how == "ratio" else value


def adapted_coefficient(coefficient: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """The KL coefficient after a step that measured `kl` (Ziegler 2019, section 2.2).

    error = clip(kl / target - 1, -0.2, 0.2); coefficient x (1 + error x samples / horizon).  `kl` and `target` in
    nats an answer.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * samples / horizon)
