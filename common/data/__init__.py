"""Tasks and their metrics, where the texts of a split are, and the batches that are made of them."""
