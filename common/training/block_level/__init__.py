"""Block-level fine-tuning: all variants jointly, in composed models, or each apart, against the original's block."""
