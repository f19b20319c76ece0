"""The same results, found in another way, and the suite's own in the form that they are compared in."""

import numpy as np
import torch
from tiny import CPU, PREFIX, QUIET, padded_batch

from common.blocks.find import find_blocks
from common.blocks.tensors import Variant, block_tensors
from common.composing.scheme import Pair
from common.evaluation import answers as evaluation
from common.models.load import load_model
from common.pruning import closed_form
from common.pruning.prune_block import prune_block
from common.runtime.devices import Runtime


def only_removed_is_zero(weight, keep):
    """Whether all removed entries are zero, and no more of the kept ones than may come out as zero by chance: one."""
    weight, keep = torch.as_tensor(weight), torch.as_tensor(keep)
    return not bool(weight[~keep].any()) and int((weight[keep] == 0).sum()) <= 1


@torch.no_grad()
def loss_per_token(model, tokenizer, pairs):
    """Cross-entropy summed over the target tokens of one pair at a time, over their number: nothing is ever padded."""
    total = tokens = 0
    for english, german in pairs:
        source = torch.tensor([tokenizer(PREFIX + english)["input_ids"]])
        target = torch.tensor([tokenizer(text_target=german)["input_ids"]])
        logits = model(input_ids=source, decoder_input_ids=torch.cat([torch.tensor([[0]]), target[:, :-1]], 1)).logits
        total += torch.nn.functional.cross_entropy(logits[0].double(), target[0], reduction="sum").item()
        tokens += target.numel()
    return total / tokens


LIMIT = 20  # new tokens at most


class Ids:
    """A tokenizer whose text is all the token ids."""

    @staticmethod
    def batch_decode(rows, skip_special_tokens):
        return [" ".join(str(int(token)) for token in row) for row in rows]


def translated(model, examples, *, batch_size=8, beams=1, tokenizer=Ids):
    runtime = Runtime(CPU, batch_size, QUIET)
    return evaluation.translate(model, tokenizer, examples, runtime, beams=beams, max_new_tokens=LIMIT)[0]


def token_rows(model, examples, **settings):
    return [[int(token) for token in text.split()] for text in translated(model, examples, **settings)]


def same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def torch_mask(method, weight, **options):
    """The bool mask that a function of torch.nn.utils.prune makes for a weight."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight.clone())
    return method(module, "weight", **options).weight_mask.bool()


def pruned_variants(model, heads, rate):
    """{pair: variant} of every block, so many heads and a share of the weights removed."""
    variants = {}
    for name, block in find_blocks(model).items():
        tensors = {key: value.detach() for key, value in block_tensors(model, block).items()}
        linears = (block.output,) if block.kind == "attention" else block.linears
        removed = {
            "heads": heads if block.heads else 0,
            "weights": {linear: round(rate * tensors[f"{linear}.weight"].numel()) for linear in linears},
        }
        (_, pruned, keeps), _ = prune_block(block, tensors, removed)
        variants[Pair(name, "variant")] = Variant(block, pruned, keeps)
    return variants


def reconstruct(teacher, variants, examples, runtime, *, ridge):
    """The closed form with one ridge: {pair: all tensors of the block}."""
    solved = closed_form.reconstruct(teacher, variants, examples, runtime, ridges=[ridge])
    return {pair: tensors for pair, (tensors,) in solved.items()}


def least_squares(inputs, outputs, start, keep, ridge):
    """Oracle: numpy.linalg.lstsq on the kept columns of each row, the ridge as further equations."""
    damping = ridge * np.mean(np.sum(inputs**2, axis=0)[keep.any(axis=0)])
    solution = np.zeros_like(start)
    for row, kept in enumerate(keep):
        equations = np.vstack([inputs[:, kept], np.sqrt(damping) * np.eye(kept.sum())])
        values = np.concatenate([outputs[:, row], np.sqrt(damping) * start[row, kept]])
        solution[row, kept] = np.linalg.lstsq(equations, values, rcond=None)[0]
    return solution, damping


def objective(inputs, outputs, weights, start, damping, keep):
    return np.sum((inputs @ weights.T - outputs) ** 2) + damping * np.sum(((weights - start) * keep) ** 2)


@torch.no_grad()
def logits(path, kind):
    """What the model at `path` makes of the padded batch."""
    return load_model(path).model(**padded_batch(kind)).logits
