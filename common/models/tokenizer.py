"""Tokenizers on disk, read and checked; and two that count as one: a source's vocabulary and a target's."""

from pathlib import Path

import transformers
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from common.runtime.errors import UserError, as_user_error
from common.runtime.schema import shown

TARGET = "target"  # the folder of the target's tokenizer within the source's


class PairedTokenizer:
    """Inputs are tokenized by the source's tokenizer; targets are tokenized, and answers decoded, by the target's."""

    def __init__(self, source, target):
        self.source, self.target = source, target
        self.name_or_path, self.pad_token_id = source.name_or_path, source.pad_token_id
        self.unk_token_id = source.unk_token_id  # the target's too, where both were trained here
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


def vocabularies(config) -> tuple[int, int]:
    """How many tokens the source has, and the target: one vocabulary, unless it is a Marian with two."""
    return config.vocab_size, getattr(config, "decoder_vocab_size", None) or config.vocab_size


def tokenizer_in(path: Path, config):
    """The tokenizer of a folder, or the pair of a source's and, in a folder within it, a target's."""
    folders = [path, path / TARGET] if (path / TARGET / "tokenizer_config.json").is_file() else [path]
    sizes = vocabularies(config) if len(folders) > 1 else [min(vocabularies(config))]
    tokenizers = []
    for folder, vocabulary in zip(folders, sizes):
        with as_user_error(folder, "cannot be used as a tokenizer"):
            tokenizers.append(read_tokenizer(folder, vocabulary))
    return PairedTokenizer(*tokenizers) if len(tokenizers) > 1 else tokenizers[0]


def read_tokenizer(path: str | Path, vocabulary: int, local_only: bool = True):
    """The tokenizer in a folder, or of a hub id, as transformers reads it.

    `vocabulary`: how many tokens the model has; `local_only`: whether a hub id is looked for in the local cache alone.

    Raises:
        UserError: its class is none of transformers, it has tokens that the model lacks, or it has no padding token.
    """
    settings = get_tokenizer_config(path, local_files_only=local_only)
    name = settings.get("tokenizer_class")
    if "auto_map" in settings or (name and tokenizer_class_from_name(name) is None):
        name = shown(settings.get("auto_map", name))
        raise UserError(f"names a class of tokenizers that is none of transformers ({name}); other code is never run")
    if (settings.get("extra_ids") or 0) > vocabulary:  # each becomes a token
        raise UserError(f"'extra_ids': {shown(settings['extra_ids'])} where the model has {vocabulary} tokens")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=local_only, trust_remote_code=False)
    trial = tokenizer("a test")["input_ids"]
    tokens = 1 + max([len(tokenizer) - 1, *tokenizer.get_vocab().values(), *trial, *tokenizer.all_special_ids])
    if tokens > vocabulary:
        raise UserError(
            f"knows {tokens} tokens where the model has {vocabulary}; give the tokenizer that belongs to the model"
        )
    if tokenizer.pad_token_id is None:
        raise UserError("has no padding token; name one as 'pad_token' in its tokenizer_config.json")
    return tokenizer
