"""Torch's random functions on replicas: draws of the whole batch, of which each replica takes its rows.

On the CPU the draws of a step are shared (`fastdp.program.torch.shared_draws`): 1, 2 and 8 devices get the numbers that
plain torch draws for the whole batch. Functions that draw inside (attention, recurrent layers, `gumbel_softmax`) run in
a mode that shares the draws of the operations that they consist of. On GPUs dropout and uniform or normal numbers come
from a counter-based generator (`fastdp.tensors.random`), keyed by one number from torch's generator: the same on any
number of GPUs, but not those of one GPU in plain torch. What fused kernels draw there (attention, recurrent layers)
comes from each GPU's own generator: it repeats with the seed, and differs with the number of GPUs.

The trial of the module (`fastdp.program.torch.rows`) tells where the rows of a draw are. For torch's own modules, which
are not tried, and for a loss of each replica's rows, rows are the first axis if its length is a multiple of the
replica's rows; otherwise a mask of activations has them on the only other axis of such a length, and any other draw is
the same for all rows. In a loss a draw of which several axes may have the rows is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fastdp.program.torch.random.dropout import alpha_dropout, dropout
from fastdp.program.torch.random.inside import inside
from fastdp.program.torch.random.numbers import created, filled, randperm
from fastdp.program.torch.random.sampled import rrelu, sampled
from fastdp.tensors.function_mode import Handler
from fastdp.tensors.random_functions import RNNS

_INSIDE = (
    *RNNS,
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    F.gumbel_softmax,
    F.fractional_max_pool2d,
    F.fractional_max_pool3d,
)
_PER_ROW = (
    torch.bernoulli,
    torch.Tensor.bernoulli,
    torch.normal,
    torch.poisson,
    torch.multinomial,
    torch.Tensor.multinomial,
    torch.binomial,
    torch._standard_gamma,
    torch._sample_dirichlet,
)
_IN_PLACE = (
    torch.Tensor.bernoulli_,
    torch.Tensor.uniform_,
    torch.Tensor.normal_,
    torch.Tensor.random_,
    torch.Tensor.exponential_,
    torch.Tensor.geometric_,
    torch.Tensor.cauchy_,
    torch.Tensor.log_normal_,
)
_CREATING = (torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like, torch.randint_like)

HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout), dropout),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), alpha_dropout),
    **dict.fromkeys(_CREATING, created),
    **dict.fromkeys(_IN_PLACE, filled),
    **dict.fromkeys(_PER_ROW, sampled),
    **dict.fromkeys(_INSIDE, inside),
    **dict.fromkeys((F.rrelu, torch.rrelu, torch.rrelu_), rrelu),
    torch.randperm: randperm,
}
