"""Watching a run and telling about it."""

from bdu.monitor.attention import attention_entropy, attribution_share, tar
from bdu.monitor.gradcam import grad_cam
from bdu.monitor.live import AttentionMonitor

__all__ = [
    "AttentionMonitor",
    "attention_entropy",
    "attribution_share",
    "grad_cam",
    "tar",
]
