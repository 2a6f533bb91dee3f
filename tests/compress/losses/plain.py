"""The losses as their formulas are written, on whole logits: what the chunked ones are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logits(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, cap: float | None) -> Tensor:
    z_PV = (hidden_PH @ weight_VH.t() + (0 if bias_V is None else bias_V)) * scale
    return z_PV if cap is None else cap * torch.tanh(z_PV / cap)


def divergence(z_PV: Tensor, t_PV: Tensor, kind: str, temperature: float, beta: float) -> Tensor:
    log_q, log_p = (z_PV / temperature).log_softmax(-1), (t_PV / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward-kl":
        value = p * (log_p - log_q)
    elif kind == "reverse-kl":
        value = q * (log_q - log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        value = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    return value.sum(-1) * temperature**2
