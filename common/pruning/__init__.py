"""Which parts of a block go, and the closed form that solves what is left."""
