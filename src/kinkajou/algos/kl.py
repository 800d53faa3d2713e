"""Estimators of KL(policy || reference) from tokens that the policy drew, in nats per token.

With d = logp - ref_logp (Schulman 2020, "Approximating KL divergence"): k1 and k3 are unbiased, k1 may be
negative on a sample, k3 never is; k2 is biased with the gradient of the exact KL.
"""

from torch import Tensor


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d (Schulman 2020).  Any shape."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d^2 / 2 (Schulman 2020).  Any shape."""
    return (logp - ref_logp) ** 2 / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(-d) - 1 + d (Schulman 2020).  Any shape."""
    difference = logp - ref_logp
    return (-difference).exp() - 1 + difference
