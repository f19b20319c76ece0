"""Closed-form block-level fine-tuning. The way in is `reconstruct`."""

from common.closed_form.reconstruction import OVERSAMPLING, reconstruct

__all__ = ["OVERSAMPLING", "reconstruct"]
