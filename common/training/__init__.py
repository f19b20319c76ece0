"""The training loop, and what is trained by it: blocks, whole models, all variants jointly, and models from scratch."""
