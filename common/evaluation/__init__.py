"""What a model answers, what it scores and costs, and pictures of that."""
