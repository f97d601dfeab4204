"""The exact diagonal of the empirical Fisher, and what is made of it.

For N samples and the log-likelihood log p of a model with parameters θ

    F_i = 1/N Σ_n (∂ log p(y_n | x_n) / ∂θ_i)²

The square is taken per sample, before the mean: squaring a batch's mean gradient is another and
smaller quantity. One forward and one backward serve a whole batch. The backward of the summed loss
hands every layer the output gradients g of all samples at once; with the layer's own input a they
give each sample's parameter gradient, which is squared and summed tile by tile in registers
(:mod:`bdu.fisher_ops`) and never kept. So autograd computes no parameter gradient at all, and
nothing before the first selected layer is differentiated.

Every parameter whose use no layer's formula fits takes `torch.func.vmap(grad)`: as exact, slower,
and named in a warning.

Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks";
Kunstner et al. 2019, "Limitations of the empirical Fisher approximation".
"""

from bdu.fisher.combine import contrastive, scale_to_unit_mean
from bdu.fisher.diagonal import FisherAccumulator, fisher_diagonal
from bdu.fisher.files import load_fisher, save_fisher
from bdu.fisher.likelihood import target_log_odds

__all__ = [
    "FisherAccumulator",
    "contrastive",
    "fisher_diagonal",
    "load_fisher",
    "save_fisher",
    "scale_to_unit_mean",
    "target_log_odds",
]
