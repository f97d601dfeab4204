"""bdu: backdoor unlearning with fused EWC, Fisher and gradient-ascent kernels."""

from bdu import fisher, optim
from bdu.dispatch import use_backend
from bdu.fisher import FisherAccumulator, fisher_diagonal
from bdu.memory import memory_plan
from bdu.trainer import unlearn

__version__ = "0.1.0"

__all__ = [
    "FisherAccumulator",
    "__version__",
    "fisher",
    "fisher_diagonal",
    "memory_plan",
    "optim",
    "unlearn",
    "use_backend",
]
