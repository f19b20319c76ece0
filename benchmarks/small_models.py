"""The small BERT and the small Marian of the studies, trained here.

- bert: a classifier of reviews out of a DistilBERT classifier (`--start`). The layers of the two are the same, and
  their weights are carried over. BERT adds embeddings of token types, which are zero here, and has a tanh where
  DistilBERT has a ReLU, between the two Linears of the head. So the model is fine-tuned, its head at a higher rate.
- marian: an English-German translator from scratch, 3 + 3 layers of width 128 with 8 heads, with any subword tokenizer
  that has a padding and an end token (`--tokenizer`).

The model folder holds its tokenizer. An interrupted run goes on where it last saved its state.
"""

import sys

from measure import cli

from common.errors import UserError
from common.files import check_writable
from common.records import digest, make_record

NAME = "small_models.py"  # in records
DEFAULTS = {  # epochs, batch size and peak rate
    "bert": (1, 16, 2e-5),
    "marian": (10, 64, 2e-3),
}
HEAD_SHARE = 10.0  # the rate of BERT's head, as a multiple of the rest's


def build_parser():
    parser = cli.build_parser(__doc__.partition("\n\n")[0], overwrite=True)
    parser.add_argument("family", choices=list(DEFAULTS))
    parser.add_argument("--start", metavar="MODEL", help="bert: the DistilBERT classifier to begin with, a folder")
    parser.add_argument("-o", "--output", required=True, help="folder of the model and its tokenizer")
    cli.add_data_flags(parser, batch_size=None)
    cli.add_training_flags(parser, epochs=None, early_stop=0, stats="none is written")
    return parser


def bert_from(distilbert):
    """A `BertForSequenceClassification` with the weights of a `DistilBertForSequenceClassification`.

    The token types' embeddings are zero, and the pooler's Linear is DistilBERT's `pre_classifier`.
    """
    import transformers

    old = distilbert.config
    config = transformers.BertConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.dim,
        num_hidden_layers=old.n_layers,
        num_attention_heads=old.n_heads,
        intermediate_size=old.hidden_dim,
        hidden_act=old.activation,
        hidden_dropout_prob=old.dropout,
        attention_probs_dropout_prob=old.attention_dropout,
        classifier_dropout=old.seq_classif_dropout,
        max_position_embeddings=old.max_position_embeddings,
        pad_token_id=old.pad_token_id,
        id2label=old.id2label,
        label2id=old.label2id,
    )
    model = transformers.BertForSequenceClassification(config)
    body, head = distilbert.distilbert, "bert.pooler.dense"
    modules = {"classifier": distilbert.classifier, head: distilbert.pre_classifier}
    for name in ("word_embeddings", "position_embeddings", "LayerNorm"):
        modules[f"bert.embeddings.{name}"] = body.embeddings.get_submodule(name)
    for i, layer in enumerate(body.transformer.layer):
        for name, place in {
            "attention.q_lin": "attention.self.query",
            "attention.k_lin": "attention.self.key",
            "attention.v_lin": "attention.self.value",
            "attention.out_lin": "attention.output.dense",
            "sa_layer_norm": "attention.output.LayerNorm",
            "ffn.lin1": "intermediate.dense",
            "ffn.lin2": "output.dense",
            "output_layer_norm": "output.LayerNorm",
        }.items():
            modules[f"bert.encoder.layer.{i}.{place}"] = layer.get_submodule(name)
    state = {
        f"{place}.{name}": tensor for place, module in modules.items() for name, tensor in module.state_dict().items()
    }
    state["bert.embeddings.token_type_embeddings.weight"] = model.bert.embeddings.token_type_embeddings.weight * 0
    model.load_state_dict(state)
    return model


def new_marian(tokenizer):
    """A Marian with random weights for a tokenizer's vocabulary; source and target share it.

    Initial weights are drawn with 1/sqrt(width): embeddings, which are multiplied by sqrt(width), are then as large as
    the sinusoids of the positions, and so are the first logits.
    """
    import transformers

    width = 128
    config = transformers.MarianConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_position_embeddings=128,
        activation_function="swish",
        scale_embedding=True,
        dropout=0.1,
        init_std=width**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
    )
    return transformers.MarianMTModel(config)


def run(args):
    import torch

    from common.checkpoints import Checkpoint
    from common.data import load_examples
    from common.devices import Runtime, resolve_device
    from common.evaluation import parameter_counts, quality
    from common.inputs import recipe_from
    from common.models import is_made, load_model, load_tokenizer, reference, save_model
    from common.studies import usual_task
    from common.tasks import TASKS
    from common.training import Learner, ModelObjective, fit, steps_of

    if args.data is None or (args.family == "bert") != (args.start is not None):
        raise UserError("--data is needed, and for bert --start")
    if args.family == "marian" and args.tokenizer is None:
        raise UserError("--tokenizer is needed for marian")
    check_writable(args.output)
    epochs, batch_size, lr = DEFAULTS[args.family]
    args.epochs = epochs if args.epochs is None else args.epochs
    args.batch_size = args.batch_size or batch_size
    task, talk, device = TASKS[usual_task(args.family)], cli.Talk(args.quiet), resolve_device(args.device)
    torch.manual_seed(args.seed)
    shares = {}
    if args.family == "bert":
        start = load_model(args.start)
        tokenizer = load_tokenizer(args.tokenizer, start)
        model = bert_from(start.model)
        shares = dict.fromkeys(
            (name for name, _ in model.named_parameters() if name.startswith(("bert.pooler", "classifier"))), HEAD_SHARE
        )
        origin = start.identity
    else:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer, local_files_only=True)
        model, origin = new_marian(tokenizer), None
    model.to(device)
    positions = model.config.max_position_embeddings
    train, validation = (
        load_examples(
            args.data, split, tokenizer, task, positions=positions, max_length=args.max_length, limit=args.limit
        )
        for split in ("train", "validation")
    )
    recipe = recipe_from(args, lr, dropout=True)
    made_from = {
        "family": args.family,
        "start": origin,
        "data": [train.fingerprint(), validation.fingerprint()],
        "recipe": recipe.to_json(),
    }
    if is_made(args.output, made_from, args.overwrite, NAME):
        talk.say(f"{args.output}: is there already")
        return {"model": args.output, "skipped": True}
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    learner = Learner(parameters, {}, recipe, steps_of(train, recipe), shares)
    key = digest(made_from)
    checkpoint = Checkpoint(args.output, key, {"model": key}, 60 * args.save_every, talk)
    runtime = Runtime(device, args.batch_size, talk)
    progress = fit({"model": learner}, ModelObjective(model, recipe), train, validation, recipe, runtime, checkpoint)
    measured = {
        "val_loss": learner.best_loss,
        "best_epoch": learner.best_epoch,
        f"validation_{task.metric}": quality(model.eval(), tokenizer, validation, runtime, max_new_tokens=60),
        "train_seconds": round(sum(row.train for row in progress.rows), 1),
        "threads": torch.get_num_threads(),
    }
    record = make_record(
        NAME,
        made_from,
        model_type=args.family,
        task=task.name,
        measured=measured,
        data=reference(args.data, args.output),
    )
    save_model(args.output, model, record, tokenizer=tokenizer)
    checkpoint.remove()
    return {"model": args.output, "skipped": False, **measured, **parameter_counts(model)}


def main(argv=None):
    return cli.launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
