"""Two tokenizers that count as one: a source's vocabulary and a target's."""

from pathlib import Path

TARGET = "target"  # the folder of the target's tokenizer within the source's


class PairedTokenizer:
    """Inputs are tokenized by the source's tokenizer; targets are tokenized, and answers decoded, by the target's.

    Each lies in a folder of its own, as transformers reads it; the pair is made where these are loaded.
    """

    def __init__(self, source, target):
        """`source`, `target`: tokenizers of transformers."""
        self.source, self.target = source, target
        self.name_or_path, self.pad_token_id = source.name_or_path, source.pad_token_id
        self.model_max_length = min(source.model_max_length, target.model_max_length)

    def __call__(self, text=None, *, text_target=None, **settings):
        """What the source's tokenizer makes of `text`, or else the target's of `text_target`."""
        return self.target(text_target, **settings) if text is None else self.source(text, **settings)

    def batch_decode(self, sequences, **settings) -> list[str]:
        """The target's texts of several rows of token ids."""
        return self.target.batch_decode(sequences, **settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save both, so that `AutoTokenizer` reads each from its own folder."""
        self.source.save_pretrained(folder)
        self.target.save_pretrained(Path(folder) / TARGET)
