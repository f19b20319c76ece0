"""Models and tokenizers on disk: checked, loaded, downloaded, made compact, saved and pushed."""
