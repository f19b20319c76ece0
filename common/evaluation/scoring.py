"""What a variant costs a model: the loss when that one block is replaced, in few passes over the data.

A batch goes through the model once, and every block's output is kept; for each variant the model then runs again, with
the blocks before it answering at once from what was kept. With V variants of each block, that is (1 + V / 2) / V passes
a variant, about.

An attention block is skipped by its root module. A feed-forward block may share its root with other things, so it is
skipped by its Linears: the inner ones answer with a single neuron, which keeps what lies between them next to nothing.
"""

import contextlib

import torch
from torch.func import functional_call
from torch.nn.functional import linear as apply_linear

from common.blocks.find import Block
from common.data.batching import evaluation_batches
from common.data.examples import Examples, rows_of
from common.runtime.devices import Runtime, computing

VERSION = 1  # part of the key of every output; raise it when results change


class Replaceable:
    """A model whose blocks can be replaced for one run, and skipped up to there."""

    def __init__(self, model: torch.nn.Module, blocks: dict[str, Block]):
        self.model, self.blocks = model, blocks
        self.outputs = {}  # {block name: what its root or output Linear returned}, in the order of execution
        self.keeping = False  # whether `outputs` is being filled
        self.skipped = ()  # names of blocks that answer from it
        self.replaced = {}  # {block name: tensors in the place of its own}

    @contextlib.contextmanager
    def opened(self):
        """While this is open, the model's blocks are under control."""
        modules = []
        for name, block in self.blocks.items():
            root = self.model.get_submodule(block.root)
            if block.kind == "attention":
                root.forward = self._attention(name, root, root.forward)
                modules.append(root)
                continue
            for linear in block.linears:
                module = root.get_submodule(linear)
                module.forward = self._linear(name, linear, block, module.forward)
                modules.append(module)
        try:
            yield self
        finally:
            for module in modules:
                del module.forward  # of the instance; its class's shows again
            self.outputs.clear()

    def _attention(self, name, root, forward):
        def run(*args, **kwargs):
            if name in self.skipped:
                return self.outputs[name]
            tensors = self.replaced.pop(name, None)  # popped: functional_call comes here again
            if tensors is not None:
                return functional_call(root, tensors, args, kwargs)
            output = forward(*args, **kwargs)
            if self.keeping:
                self.outputs[name] = output
            return output

        return run

    def _linear(self, name, linear, block, forward):
        is_output = linear == block.output

        def run(rows):
            if name in self.skipped:
                return self.outputs[name] if is_output else rows[..., : block.folds]
            tensors = self.replaced.get(name)
            if tensors is not None:
                return apply_linear(rows, tensors[f"{linear}.weight"], tensors.get(f"{linear}.bias"))
            output = forward(rows)
            if self.keeping and is_output:
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

    def run_with(self, name: str, tensors: dict[str, torch.Tensor], batch):
        """A run on the same batch with other tensors in one block; those before it are not computed again."""
        order = list(self.outputs)
        self.skipped, self.replaced = set(order[: order.index(name)]), {name: tensors}
        try:
            return self.model(**batch)
        finally:
            self.skipped, self.replaced = (), {}


@torch.no_grad()
def score_block(
    model: torch.nn.Module,
    teacher: torch.nn.Module,
    blocks: dict[str, Block],
    name: str | None,
    variants: dict[str, dict[str, torch.Tensor]],
    examples: Examples,
    runtime: Runtime,
) -> dict:
    """What each variant of one block does to a model that is otherwise left alone.

    Args:
        model: the original (`teacher`), or one composed of its variants.
        name: of the block; None to measure the model as it is, without variants.
        variants: {variant: {"q.weight": tensor}}, on the device.
    Returns:
        {variant or None: {"loss": mean task loss, "kl": mean KL(teacher || model)}}, over tokens or examples, in nats.
        None is the model as it is.
    """
    model.eval()
    teacher.eval()
    order, sums_of_batches = runtime.processes.share(evaluation_batches(examples, runtime.batch_size)), []
    with Replaceable(model, blocks).opened() as replaceable, computing(runtime.device, runtime.precision):
        for positions in runtime.talk.progress(order, name or "model"):
            batch = examples.batch(positions, runtime.device)
            real, rows = batch.labelled(), []
            unchanged = replaceable.run(batch)
            wanted = (unchanged if teacher is model else teacher(**batch)).logits
            wanted = rows_of(wanted, real).float().log_softmax(-1)
            for variant in (None, *variants):
                output = unchanged if variant is None else replaceable.run_with(name, variants[variant], batch)
                given = rows_of(output.logits, real).float().log_softmax(-1)  # (tokens, classes)
                divergence = (wanted.exp() * (wanted - given)).sum(-1).mean()
                rows.append(torch.stack([output.loss.float(), divergence]))
            sums_of_batches.append((torch.stack(rows), len(real)))  # read at the end: nothing waits here
    sums, total = torch.zeros(1 + len(variants), 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for rows, count in sums_of_batches:
        sums += rows.cpu().double() * count
        total += count
    runtime.processes.add([sums, total])
    means = (sums / total).tolist()
    return {variant: {"loss": loss, "kl": kl} for variant, (loss, kl) in zip((None, *variants), means)}
