"""Drop-in ``torch.optim`` optimizers with a fused EWC pull: :class:`EWCSGD` and :class:`EWCAdamW`.

Use them where ``torch.optim.SGD`` or ``AdamW`` stands. With ``ewc_lambda=0`` they are those; with a
Fisher attached they also pull every parameter towards its anchor, in the same pass over memory.
:func:`release_gradients` has them step inside the backward pass, without a full set of gradients.
"""

from bdu.optim.adamw import EWCAdamW
from bdu.optim.release import release_gradients
from bdu.optim.sgd import EWCSGD

__all__ = ["EWCSGD", "EWCAdamW", "release_gradients"]
