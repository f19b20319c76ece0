"""What taking out removed heads and neurons is worth: a compact model against the original, and against the masked one.

On models of T5-small's or DistilBERT's size with random weights: seconds of a forward pass and of a generated token,
compact by original, beside what the multiply-adds of the same run promise; and of a training step, compact by masked.
"""

import copy
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

from common import report, training
from common.batching import training_batches
from common.compact import make_compact
from common.devices import resolve_device
from common.models import LoadedModel


def parser():
    flags = build_parser(__doc__.partition("\n\n")[0])
    flags.add_argument("--model-type", choices=sorted(SIZES), default="t5", help="of the random model")
    flags.add_argument("--attention", type=cli.rate, default=0.5, help="fraction of the heads removed")
    flags.add_argument("--feed-forward", type=cli.rate, default=0.5, help="fraction of the neurons removed")
    flags.set_defaults(rounds=9)
    return flags


def run(args):
    device = resolve_device(args.device)
    original = random_model(args.model_type, args.seed, device)
    masked = LoadedModel(copy.deepcopy(original.model), original.path)
    masks = prune(masked.model, {"attention": args.attention, "linear": 0, "feed_forward": args.feed_forward})
    model, kept_masks = make_compact(masked.model, masks)
    compact = LoadedModel(model, original.path)
    emit(
        model=str(original.path),
        attention=args.attention,
        feed_forward=args.feed_forward,
        rounds=args.rounds,
        input=report.stated_input(original),
        parameters={
            name: sum(p.numel() for p in each.model.parameters())
            for name, each in (("compact", compact), ("original", original))
        },
        **machine(device),
    )

    ways = {name: report.ways_to_run(each) for name, each in (("original", original), ("compact", compact))}
    for figure in ways["original"]:
        seconds = in_turn({name: each[figure][0] for name, each in ways.items()}, args.rounds, device)
        speed_up = ratio(seconds["original"], seconds["compact"])
        counts = {name: report.count_products(each[figure][0]) for name, each in ways.items()}
        promised = counts["original"] / counts["compact"]
        emit(
            figure=figure,
            speed_up=speed_up,
            multiply_adds=counts,
            promised_speed_up=round(promised, 4),
            share_of_promise=round(speed_up["median"] / promised, 4),
        )

    batch_size, length = SIZES[args.model_type]
    examples = random_examples(original, (args.rounds + 1) * batch_size, length, args.seed)
    batches = training_batches(examples, batch_size, args.seed, epoch=1)
    recipe, steps = model_recipe(original, batch_size, args.seed), {}
    for way, (own, held) in {"masked": (masked.model, masks), "compact": (model, kept_masks)}.items():
        learner = training.Learner(dict(own.named_parameters()), held, recipe, 2 * args.rounds + 1)
        steps[way] = stepper(training.ModelObjective(own, recipe), learner, examples, batches, device)
    seconds = in_turn(steps, args.rounds, device)
    return {
        "figure": "training step, compact by masked",
        "batch_size": batch_size,
        "ratio": ratio(seconds["compact"], seconds["masked"]),
    }


def main(argv=None):
    return cli.launch(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
