"""Models that are trained on the spot: the demos, on data in `data/demo`, and encoder-decoders of your own."""
