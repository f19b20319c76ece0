"""What a variant costs a model: the loss when that one block is replaced, in few passes over the data.

All variants of a block share the computation up to it. A batch goes through the model once, and every block's output is
kept; for each variant the model then runs again, with the blocks before it answering at once from what was kept. So a
variant of a block in the middle costs half a pass, one of the last block little more than the head. With V variants of
each block, that is (1 + V / 2) / V passes a variant, about.

This works on the blocks' own modules, whatever the family: what runs between them (norms, residual sums, embeddings) is
run again, and is small.
"""

import contextlib

import torch
from torch.func import functional_call

from common.data import evaluation_batches


class Replaceable:
    """A model whose blocks can be replaced for one run, and skipped up to there."""

    def __init__(self, model, blocks):
        """`blocks`: {name: Block}, all of the model's."""
        self.model, self.blocks = model, blocks
        self.outputs = {}  # {block name: what its module returned}, in the order of execution
        self.keeping = False  # whether `outputs` is being filled
        self.skipped = ()  # names of blocks that answer from it
        self.replaced = {}  # {block name: tensors in the place of its own}

    @contextlib.contextmanager
    def opened(self):
        """While this is open, the model's blocks are under control."""
        modules = {name: self.model.get_submodule(name) for name in self.blocks}
        for name, module in modules.items():
            module.forward = self._forward(name, module, module.forward)
        try:
            yield self
        finally:
            for module in modules.values():
                del module.forward  # of the instance; its class's shows again
            self.outputs.clear()

    def _forward(self, name, module, forward):
        def run(*args, **kwargs):
            if name in self.skipped:
                return self.outputs[name]
            tensors = self.replaced.pop(name, None)  # popped: functional_call comes here again
            if tensors is not None:
                return functional_call(module, tensors, args, kwargs)
            output = forward(*args, **kwargs)
            if self.keeping:
                self.outputs[name] = output
            return output

        return run

    def run(self, batch):
        """One whole run, keeping every block's output."""
        self.outputs.clear()
        self.keeping = True
        try:
            return self.model(**batch)
        finally:
            self.keeping = False

    def run_with(self, name, tensors, batch):
        """A run on the same batch with other tensors in one block; those before it are not computed again."""
        order = list(self.outputs)
        self.skipped, self.replaced = set(order[: order.index(name)]), {name: tensors}
        try:
            return self.model(**batch)
        finally:
            self.skipped, self.replaced = (), {}


@torch.no_grad()
def score_block(model, teacher, blocks, name, variants, examples, *, batch_size, device, talk):
    """What each variant of one block does to a model that is otherwise left alone.

    Args:
        model: the original, or one composed of its variants.
        teacher: the original; may be the same.
        blocks: {name: Block}, all of the model's.
        variants: {variant: {"q.weight": tensor}}, on the device.
        examples: `data.Examples` with targets.
    Returns:
        {variant or None: {"loss": mean task loss, "kl": mean KL(teacher || model)}}, over tokens or examples, in nats.
        None is the model as it is.
    """
    model.eval()
    teacher.eval()
    sums = {variant: torch.zeros(2, dtype=torch.float64) for variant in (None, *variants)}
    total = 0
    with Replaceable(model, blocks).opened() as replaceable:
        for positions in talk.progress(evaluation_batches(examples, batch_size), name or "model"):
            batch = examples.batch(positions, device)
            real = batch["labels"] != -100  # (batch,) or (batch, length)
            count = int(real.sum())
            own = replaceable.run(batch)
            wanted = (own if teacher is model else teacher(**batch)).logits[real].float().log_softmax(-1)
            for variant in sums:
                output = own if variant is None else replaceable.run_with(name, variants[variant], batch)
                found = output.logits[real].float().log_softmax(-1)  # (tokens, classes)
                divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
                sums[variant] += torch.stack([output.loss.float(), divergence]).cpu().double() * count
            total += count
    return {variant: dict(zip(("loss", "kl"), (each / total).tolist())) for variant, each in sums.items()}
