"""Closed-form block-level fine-tuning. The ways in are `reconstruct` and `reconstruct_in_sequence`."""

from common.closed_form.in_sequence import reconstruct_in_sequence
from common.closed_form.reconstruction import OVERSAMPLING, reconstruct

__all__ = ["OVERSAMPLING", "reconstruct", "reconstruct_in_sequence"]
