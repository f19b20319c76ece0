"""Smaller vocabularies: the tokens that a data set needs, a tokenizer that knows these alone, and a model for it.

What stays beside the tokens of the data: special and added tokens (T5's sentinels among them), those that the model's
configs name, and what any other text is spelt with: single bytes if the tokenizer falls back on them, else single
characters. Tokens keep their order. What no tokenizer makes, such as the rows that pad a T5's vocabulary, goes.

A text whose tokens all stay is tokenized as before. Of a Unigram's segmentations the best one is still there, and as
likely as before. The longest piece that a WordPiece finds is still the longest. Of a BPE's merges those stay that make
a token that stays, so that the first one that fits is still the first.

Sources: TextPruner (Yang et al., ACL 2022, arXiv 2203.15996); vocabulary trimming (Ushio et al., arXiv 2305.15020).
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch

from common.data.examples import Examples
from common.models.checks import TOKEN_IDS, skeleton_of
from common.models.tokenizer import PairedTokenizer, read_tokenizer
from common.runtime.errors import UserError, as_user_error
from common.runtime.files import temporary_folder
from common.runtime.records import digest
from common.runtime.schema import shown

DATA = "data"  # in place of a number of tokens: all that the data need
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a piece that stands for one byte


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that stay.

    `asked`: their number, at most, or DATA; `tokenizer`: one that knows no others;
    `kept`: the numbers that they had, in the order of those that they have now: the source's and the target's, which
    are the same ones unless there are two tokenizers;
    `figures`: what it makes of texts, see `growth`.
    """

    asked: int | str
    tokenizer: object
    kept: tuple[list[int], list[int]]
    figures: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Its part of what a model is made from."""
        return {"vocabulary": self.asked, "vocabulary_tokens": digest(self.kept)}

    @torch.no_grad()
    def trim(self, model: torch.nn.Module) -> torch.nn.Module:
        """A model without the other tokens' embeddings and logits, which shares all other memory with `model`."""
        config, generation = copy.deepcopy(model.config), copy.deepcopy(getattr(model, "generation_config", None))
        for settings in (config, generation) if model.can_generate() else (config,):
            for name, value in named_tokens(settings).items():
                setattr(settings, name, self._renumbered(name, value))
        config.vocab_size = len(self.kept[0])
        if getattr(config, "decoder_vocab_size", None):
            config.decoder_vocab_size = len(self.kept[1])
        state, skeleton = model.state_dict(), skeleton_of(type(model), config).state_dict()
        for name, tensor in state.items():
            kept = self.kept[0 if "encoder" in name.split(".") else 1]
            for dimension, size in enumerate(skeleton[name].shape):
                if tensor.shape[dimension] != size:
                    index = torch.tensor(kept, device=tensor.device)
                    state[name] = tensor = tensor.index_select(dimension, index)
        smaller = type(model).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
        )
        parameters = dict(model.named_parameters())
        for name, parameter in smaller.named_parameters():
            parameter.requires_grad_(parameters[name].requires_grad)  # loading makes all of them trainable
        if model.can_generate():
            smaller.generation_config = generation
        return smaller.to(model.device).train(model.training)

    def _renumbered(self, name, value):
        if isinstance(value, list):
            return [self._renumbered(name, item) for item in value]
        source, target = (kept.index(value) for kept in self.kept)
        if source != target:
            raise UserError(f"--vocabulary: {name!r} would be another token for the source than for the target")
        return source


def choose_vocabulary(asked: int | str, model: torch.nn.Module, tokenizer, train: Examples) -> Vocabulary:
    """The vocabulary for training examples: all that they need (DATA), or what is most frequent in them.

    Args:
        asked: DATA, or how many tokens, of either language if there are two tokenizers; they may be fewer.
        train: tokenized by `tokenizer`, without truncation.
    Raises:
        UserError: a tokenizer is none that can be rewritten, or so few tokens cannot be.
    """
    configs = (model.config, model.generation_config) if model.can_generate() else (model.config,)
    named = set(chain.from_iterable(_numbers(named_tokens(settings).values()) for settings in configs))
    if any("position" in name and getattr(module, "padding_idx", None) for name, module in model.named_modules()):
        named |= set(range(model.config.pad_token_id))  # RoBERTa's kin count positions from the padding token's number
    inputs, targets = train.inputs, [] if train.task.has_labels else train.targets
    if not isinstance(tokenizer, PairedTokenizer):
        kept, smaller = _trimmed(asked, tokenizer, chain(inputs, targets), named)
        return Vocabulary(asked, smaller, (kept, kept))
    sides = zip(_both(tokenizer), (inputs, targets))
    (source_kept, source), (target_kept, target) = (_trimmed(asked, *side, named) for side in sides)
    return Vocabulary(asked, PairedTokenizer(source, target), (source_kept, target_kept))


def check_same(before: Examples, after: Examples, vocabulary: Vocabulary) -> None:
    """Make sure that texts are tokenized as before, both sides.

    Raises:
        UserError: one is not.
    """
    sides = [(before.inputs, after.inputs), (before.targets, after.targets)][: 1 if before.task.has_labels else 2]
    for (old, new), kept in zip(sides, vocabulary.kept):
        for text, row, smaller in zip(before.texts, old, new):
            if row != [kept[token] for token in smaller]:
                raise UserError(
                    f"--vocabulary data: {shown(str(text))} would no longer be tokenized as before; give a number"
                )


def growth(before: Examples, after: Examples, old, new) -> dict[str, int]:
    """How much longer texts become; `old`, `new`: the tokenizers. Inputs and targets are counted together.

    Returns:
        {"vocabulary_before", "vocabulary_after"}: tokens that the tokenizers know;
        {"examples", "tokens_before", "tokens_after", "unknown_before", "unknown_after"}: of the texts.
    """
    figures = {"examples": len(before)}
    for when, examples, tokenizer in (("before", before, old), ("after", after, new)):
        sides = zip(_both(tokenizer), (examples.inputs, [] if examples.task.has_labels else examples.targets))
        rows = [(each.unk_token_id, row) for each, side in sides for row in side]
        figures[f"vocabulary_{when}"] = sum(map(len, {id(each): each for each in _both(tokenizer)}.values()))
        figures[f"tokens_{when}"] = sum(len(row) for _, row in rows)
        figures[f"unknown_{when}"] = sum(row.count(unknown) for unknown, row in rows)
    return figures


def _both(tokenizer):
    """The tokenizers of sources and of targets."""
    pair = isinstance(tokenizer, PairedTokenizer)
    return (tokenizer.source, tokenizer.target) if pair else (tokenizer, tokenizer)


def named_tokens(settings) -> dict[str, int | list]:
    """The settings of a config, or of a generation config, that name tokens: {name: number, or lists of them}."""
    named = settings.to_dict().items()
    return {name: value for name, value in named if name.endswith(TOKEN_IDS) and value is not None}


def _numbers(values: Iterable) -> Iterator[int]:
    """The numbers in nested lists."""
    for value in values:
        yield from _numbers(value) if isinstance(value, list) else (value,)


# --- tokenizers --------------------------------------------------------------------------------------------------


def _trimmed(asked, tokenizer, rows: Iterable[list[int]], named: set[int]) -> tuple[list[int], object]:
    """(the numbers of the tokens that stay, a tokenizer that knows these alone); `named`: numbers that must stay."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"--vocabulary: {type(tokenizer).__name__} has no tokenizer.json, and cannot be rewritten; leave it out"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = sorted(_chosen(asked, content, named | set(tokenizer.all_special_ids), Counter(chain.from_iterable(rows))))
    new = {number: place for place, number in enumerate(kept)}
    _renumber(content, new)
    with temporary_folder() as folder:
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        with as_user_error(f"--vocabulary {asked}", "the tokenizer without the other tokens cannot be used"):
            smaller = read_tokenizer(str(folder), len(kept))
    smaller.name_or_path = None  # the folder is gone
    for name in ("src_lang", "tgt_lang"):
        if hasattr(tokenizer, name):
            setattr(smaller, name, getattr(tokenizer, name))
    old = tokenizer.get_vocab()
    if any(new.get(old.get(token)) != number for token, number in smaller.get_vocab().items()):
        raise UserError(f"--vocabulary: {type(tokenizer).__name__} numbers its tokens itself, and cannot be rewritten")
    return kept, smaller


def _chosen(asked, content: dict, needed: set[int], counts: Counter) -> set[int]:
    """The numbers of the tokens that stay.

    Args:
        content: of tokenizer.json.
        needed: numbers that must stay; counts: {number: how often it is in the data}.
    """
    model = content["model"]
    tokens = _tokens(model)
    needed = (
        needed
        | {token["id"] for token in content["added_tokens"]}
        | {number for number in _numbers(_post_processed(content)) if isinstance(number, int)}
    )
    if model.get("byte_fallback"):
        needed |= {number for number, token in tokens.items() if BYTE.fullmatch(token)}
    else:
        prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        needed |= {i for i, token in tokens.items() if len(token.removeprefix(prefix).removesuffix(suffix)) == 1}
    if isinstance(model["vocab"], list):
        scores = [score for _, score in model["vocab"]]
        needed.add(scores.index(min(scores)))  # what is unknown is less likely than this one, by so much
        needed |= set() if model["unk_id"] is None else {model["unk_id"]}
    elif model.get("unk_token") in model["vocab"]:
        needed.add(model["vocab"][model["unk_token"]])
    parts = _parts(model, tokens)
    kept = _closed(needed, parts)
    if asked != DATA and len(kept) > asked:
        raise UserError(
            f"--vocabulary {asked}: {len(kept)} tokens stay in any case (special tokens, and single characters or "
            "bytes, which any text is spelt with); give more"
        )
    for number in sorted(counts, key=lambda number: (-counts[number], number)):
        more = _closed({number}, parts) - kept
        if asked == DATA or len(kept) + len(more) <= asked:
            kept |= more
    return kept


def _tokens(model: dict) -> dict[int, str]:
    """{number: token} of a model in tokenizer.json."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram's
        return {number: token for number, (token, _) in enumerate(vocabulary)}
    return {number: token for token, number in vocabulary.items()}


def _parts(model: dict, tokens: dict[int, str]) -> dict[int, set[int]]:
    """{number of a token: those of the tokens that a BPE merges it from, in one step}."""
    parts, vocabulary = {}, model["vocab"]
    for left, right, merged in _merges(model):
        parts.setdefault(vocabulary[merged], set()).update((vocabulary[left], vocabulary[right]))
    return parts


def _merges(model: dict) -> Iterator[tuple[str, str, str]]:
    """(left, right, what they become) of each merge; none of what is no BPE."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges", []):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right, left + right.removeprefix(prefix)


def _closed(numbers: set[int], parts: dict[int, set[int]]) -> set[int]:
    """The same tokens and all that they are merged from."""
    closed, open_ones = set(), list(numbers)
    while open_ones:
        number = open_ones.pop()
        if number not in closed:
            closed.add(number)
            open_ones += parts.get(number, ())
    return closed


def _post_processed(content: dict) -> Iterator[list]:
    """The lists that hold the numbers of tokens that a post-processor adds, and names beside them."""
    post = content["post_processor"] or {}
    for part in post.get("processors", [post]):
        yield from (part[name] for name in ("sep", "cls") if name in part)
        for entry in part.get("special_tokens", {}).values():
            yield entry["ids"]


def _renumber(content: dict, new: dict[int, int]) -> None:
    """Take the tokens that are not in `new`, {number: new number}, out of a tokenizer.json's content, in place."""
    model = content["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in new]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        if "merges" in model:
            known = {token for token, number in model["vocab"].items() if number in new}
            model["merges"] = [
                [left, right] for left, right, merged in _merges(model) if {left, right, merged} <= known
            ]
        ordered = sorted(model["vocab"].items(), key=lambda item: item[1])
        model["vocab"] = {token: new[number] for token, number in ordered if number in new}
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    for numbers in _post_processed(content):
        numbers[:] = [new[entry] if isinstance(entry, int) else entry for entry in numbers]
    if content["padding"]:
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
