"""Module extraction: where a model's blocks are, their tensors, and what goes in and out of them."""
