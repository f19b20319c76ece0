"""What holding removed weights at zero adds to a model-level training step.

Two copies of a pruned model take the same batches in turn, step by step: one with its masks, one with none. The ratio
of the two is taken round by round. Rates of 0 compare two steps without masks: that is the noise. Where it is more than
the masks cost, on a shared machine, go by their share of a masked step, timed within it.
"""

import copy
import statistics
import sys

from measure import (
    SIZES,
    build_parser,
    cli,
    emit,
    in_turn,
    machine,
    model_recipe,
    prune,
    random_examples,
    random_model,
    ratio,
    stepper,
)

from common import training
from common.batching import training_batches
from common.data import load_examples
from common.devices import now, resolve_device
from common.models import data_source, load_model, load_tokenizer


def parser():
    flags = build_parser(__doc__)
    flags.add_argument("-m", "--model", help="folder or .pth; without it one of the study's size, with random weights")
    flags.add_argument("--model-type", choices=sorted(SIZES), default="t5", help="of the random model")
    flags.add_argument("--attention", type=cli.rate, default=0.5, help="pruning rate of the attention modules")
    flags.add_argument("--linear", type=cli.rate, default=0.5, help="pruning rate of the Linears")
    cli.add_data_flags(flags, batch_size=None)
    flags.set_defaults(rounds=20)
    return flags


def shares(step, held, rounds, device):
    """Fraction of the seconds of `rounds` steps that each of a HeldMasks' two methods takes: {name: fraction}."""
    spent = {"mask_gradients": 0.0, "apply": 0.0}

    def timed(name, method):
        def call():
            started = now(device)
            method()
            spent[name] += now(device) - started

        return call

    for name in spent:
        setattr(held, name, timed(name, getattr(held, name)))
    started = now(device)
    for _ in range(rounds):
        step()
    total = now(device) - started
    return {name: round(seconds / total, 5) for name, seconds in spent.items()}


def run(args):
    device = resolve_device(args.device)
    loaded = load_model(args.model, device) if args.model else random_model(args.model_type, args.seed, device)
    model = loaded.model
    batch_size, length = SIZES[model.config.model_type]
    batch_size = args.batch_size or batch_size
    if args.model:
        source = data_source(args.data, loaded)
        examples = load_examples(
            source,
            "train",
            load_tokenizer(args.tokenizer, loaded),
            loaded.task,
            prefix=loaded.prefix(source),
            label2id=loaded.label2id,
            max_length=args.max_length,
            limit=args.limit,
        )
    else:
        examples = random_examples(loaded, (args.rounds + 1) * batch_size, length, args.seed)
    batches = training_batches(examples, batch_size, args.seed, epoch=1)
    recipe = model_recipe(loaded, batch_size, args.seed)
    masks = prune(model, {"attention": args.attention, "linear": args.linear})
    emit(**machine(device))

    learners, steps = {}, {}
    for way, held in {"dense": {}, "masked": masks}.items():
        own = copy.deepcopy(model)
        learners[way] = training.Learner(dict(own.named_parameters()), held, recipe, 2 * args.rounds + 1)
        steps[way] = stepper(training.ModelObjective(own, recipe), learners[way], examples, batches, device)
    seconds = in_turn(steps, args.rounds, device)
    if not learners["masked"].held.intact():
        raise RuntimeError("a removed weight is not zero")
    return {
        "model": str(loaded.path),
        "batch_size": batch_size,
        "rounds": args.rounds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "masked_parameters": sum(mask.numel() for mask in masks.values()),
        "removed": sum(int((~mask).sum()) for mask in masks.values()),
        "dense_seconds": round(statistics.median(seconds["dense"]), 4),
        "masked_over_dense": ratio(seconds["masked"], seconds["dense"]),
        "shares": shares(steps["masked"], learners["masked"].held, args.rounds, device),
    }


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
