"""Where the blocks of a model family are, and how to run one.

A family is one entry in `FAMILIES`; nothing else in the suite knows a model type by name.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.func import functional_call

from common.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The Linears of a block's module class. The last one is the output; before it stand q, k, v or the inputs."""

    kind: str  # "attention" or "feed_forward"
    linears: tuple
    heads: str | None = None  # the attribute that counts the heads


@dataclass(frozen=True)
class Family:
    """What the suite must know of a model type."""

    task: str  # "translation" or "classification"
    model_class: str  # in transformers
    compact_class: str  # in modeling_compact
    layouts: dict  # {module class name: Layout}
    run: Callable  # (model, batch): every block, but neither the head nor the loss
    data: str  # hub id of the study's data set
    checkpoint: str  # hub id of the study's model
    model_lr: float  # peak learning rate of whole models, see the README's studies
    dropout: bool  # whether fine-tuning a whole pruned model briefly is better with the model's own dropout
    block_lr: float  # of blocks of width 128; in inverse proportion to the width (μP, arXiv 2203.03466)
    calibration: int  # training examples that make a well-determined closed form
    prefix: str = ""  # in front of every input text


@dataclass(frozen=True)
class Block:
    """One attention or feed-forward sublayer."""

    name: str  # of its module, as in `model.named_modules()`
    kind: str  # "attention" or "feed_forward"
    linears: tuple  # names within the block; the last is the output
    heads: int  # 0 for a feed-forward block
    neurons: int  # 0 for an attention block
    side: str  # whose tokens flow through it: "encoder" or "decoder"
    has_bias: bool


def _run_t5(model, batch):
    encoded = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    # The causal mask alone keeps target padding, which is at the end, out of the real positions.
    model.decoder(
        input_ids=model._shift_right(batch["labels"]),
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=batch["attention_mask"],
        use_cache=False,
    )


def _run_distilbert(model, batch):
    model.distilbert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


COMPACT = "compact-"  # in front of a model type: heads and neurons are gone, see `modeling_compact`
FAMILIES = {
    "t5": Family(
        task="translation",
        model_class="T5ForConditionalGeneration",
        compact_class="CompactT5ForConditionalGeneration",
        layouts={
            "T5Attention": Layout("attention", ("q", "k", "v", "o"), heads="n_heads"),
            "T5DenseActDense": Layout("feed_forward", ("wi", "wo")),
            "T5DenseGatedActDense": Layout("feed_forward", ("wi_0", "wi_1", "wo")),
        },
        run=_run_t5,
        data="bentrevett/multi30k",
        checkpoint="google-t5/t5-small",
        model_lr=1e-3,
        dropout=False,
        block_lr=1e-2,
        calibration=2000,
        prefix="translate English to German: ",
    ),
    "distilbert": Family(
        task="classification",
        model_class="DistilBertForSequenceClassification",
        compact_class="CompactDistilBertForSequenceClassification",
        layouts={
            "DistilBertSelfAttention": Layout("attention", ("q_lin", "k_lin", "v_lin", "out_lin"), heads="n_heads"),
            "FFN": Layout("feed_forward", ("lin1", "lin2")),
        },
        run=_run_distilbert,
        data="stanfordnlp/imdb",
        checkpoint="lvwerra/distilbert-imdb",
        model_lr=2e-5,
        dropout=True,
        block_lr=3e-3,
        calibration=800,
    ),
}


def family_of(config):
    """The family of a transformers config, a compact model's or not.

    Raises:
        UserError: the suite does not know the model type.
    """
    family = FAMILIES.get(config.model_type.removeprefix(COMPACT))
    if family is None:
        raise UserError(f"model type {config.model_type!r} is not supported; known are {', '.join(FAMILIES)}")
    return family


def find_blocks(model):
    """All blocks of a model in the order of its modules: {name: Block}."""
    layouts = family_of(model.config).layouts
    blocks = {}
    for name, module in model.named_modules():
        layout = next((layouts[c.__name__] for c in type(module).__mro__ if c.__name__ in layouts), None)
        if layout:
            heads = getattr(module, layout.heads) if layout.heads else 0
            neurons = 0 if layout.heads else getattr(module, layout.linears[-1]).in_features
            has_bias = getattr(module, layout.linears[0]).bias is not None
            side = "decoder" if name.startswith("decoder.") else "encoder"
            blocks[name] = Block(name, layout.kind, layout.linears, heads, neurons, side, has_bias)
    return blocks


def block_learning_rate(model):
    """A peak learning rate for fine-tuning a model's blocks."""
    return family_of(model.config).block_lr * 128 / model.config.hidden_size


def prunable_modules(model, neurons=False):
    """What a configuration can give a rate to, in the form of `conf.json`'s "modules".

    `neurons`: list the feed-forward modules too, whose neurons can be removed.
    """
    modules = {}
    for block in find_blocks(model).values():
        if block.kind == "attention":
            modules[block.name] = {"kind": "attention", "heads": block.heads}
        elif neurons:
            modules[block.name] = {"kind": "feed_forward", "neurons": block.neurons}
        for linear in block.linears[-1:] if block.kind == "attention" else block.linears:
            weight = model.get_submodule(f"{block.name}.{linear}").weight
            modules[f"{block.name}.{linear}"] = {"kind": "linear", "weights": weight.numel()}
    return modules


def block_tensors(model, block):
    """The parameters of a block's Linears by name within the block ("q.weight"), not copied."""
    module = model.get_submodule(block.name)
    return {
        f"{linear}.{name}": parameter
        for linear in block.linears
        for name, parameter in getattr(module, linear).named_parameters()
    }


@torch.no_grad()
def set_block(model, block, tensors):
    """Put tensors in the place of a block's own.

    Raises:
        UserError: the names or shapes are not the block's.
    """
    own = block_tensors(model, block)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != shapes:
        raise UserError(f"block {block.name}: holds tensors {given} where the model has {shapes}")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def token_mask(block, batch):
    """Which tokens of a block's output are real: bool (batch, length). Padding belongs in no loss or statistic."""
    return batch["labels"] != -100 if block.side == "decoder" else batch["attention_mask"].bool()


class BlockCall:
    """One call of a teacher's block: what went in, what came out, and the means to run it with other parameters.

    `inputs`: {Linear: what entered it, (batch, length, in)}; `output`: (batch, length, d_model); `probabilities`: of an
    attention block, (batch, heads, length, keys), or None where the attention implementation does not return them.
    """

    def __init__(self, module, args, kwargs, output, seen):
        self.module, self.args, self.kwargs, self.seen = module, args, kwargs, seen
        self.output = _hidden(output)
        self.inputs = dict(seen)
        self.probabilities = output[-1] if isinstance(output, tuple) else None

    def replay(self, tensors):
        """The block's output (batch, length, d_model) on the very same inputs, with `tensors` for its own."""
        return _hidden(functional_call(self.module, tensors, self.args, self.kwargs))

    def replay_inputs(self, tensors, linear):
        """What enters one of the block's Linears then: (batch, length, in)."""
        self.replay(tensors)
        return self.seen[linear]


def features(model, block, tensors, rows):
    """What enters a feed-forward block's output Linear, (tokens, neurons), for rows (tokens, d_model) and `tensors`."""
    calls, out = [], block.linears[-1]
    no_outputs = {name: tensors[name][:0] for name in (f"{out}.weight", f"{out}.bias") if name in tensors}
    with watched(model, [block], lambda block, call: calls.append(call)):
        functional_call(model.get_submodule(block.name), tensors | no_outputs, (rows[None],))
    return calls[0].inputs[out][0]


def _hidden(output):
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def watched(model, blocks, visit):
    """While this is open, `visit(block, call)` is called whenever a block of `model` has run.

    `call` (a `BlockCall`) holds the block's real arguments: hidden states, mask, position bias, cross-attention
    states. T5 needs all of them: without its position bias a block silently computes something else.
    """
    replaying = False
    seen = {}  # what last entered each Linear of the block that is running

    def note_input(linear):
        def hook(module, args):
            seen[linear] = args[0]

        return hook

    def hook_for(block):
        def hook(module, args, kwargs, output):
            nonlocal replaying
            if replaying:  # a replay runs the same module, and with it this hook
                return
            replaying = True
            try:
                visit(block, BlockCall(module, args, kwargs, output, seen))
            finally:
                replaying = False
                seen.clear()

        return hook

    handles = []
    for block in blocks:
        module = model.get_submodule(block.name)
        for linear in block.linears:
            handles.append(getattr(module, linear).register_forward_pre_hook(note_input(linear)))
        handles.append(module.register_forward_hook(hook_for(block), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
