"""The training loop against hand-written loops, hand-computed losses and scripted validation losses."""

import copy
import csv
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import RUNTIME, build_model, padded_batch, recipe

from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors, parameter_masks
from common.composing.scheme import Pair
from common.data.examples import Examples
from common.data.tasks import TASKS
from common.pruning.prune_block import prune_block
from common.runtime.errors import UserError
from common.runtime.progress import Talk
from common.runtime.records import content_digest
from common.training.block_level.teacher import BlockObjective
from common.training.checkpoints import Checkpoint
from common.training.learner import Learner, schedule
from common.training.loop import Measure, fit, steps_of
from common.training.losses import Loss, ModelObjective
from common.training.stats import Epoch, EpochSeconds, check_stats, read_stats, write_stats, write_variant_stats

CPU, QUIET = torch.device("cpu"), Talk(quiet=True)
ATTENTION, FORWARD = "decoder.block.1.layer.0.SelfAttention", "encoder.block.1.layer.1.DenseReluDense"


def examples(size=10, seed=0):
    """Random translation examples of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens():
        return torch.randint(2, 64, (int(torch.randint(3, 10, (), generator=generator)),), generator=generator).tolist()

    return Examples(TASKS["translation"], [tokens() for _ in range(size)], [tokens() for _ in range(size)], [], 0)


def learner_of(model, name, removed, plan, total_steps):
    """A learner for one variant of one block, and its masks."""
    block = find_blocks(model)[name]
    (_, pruned, keeps), _ = prune_block(block, block_tensors(model, block), removed)
    parameters = {key: tensor.requires_grad_() for key, tensor in pruned.items()}
    return Learner(parameters, parameter_masks(block, keeps), plan, total_steps)


VARIANTS = {
    Pair(ATTENTION, "a"): {"heads": 1, "weights": {"o": 100}},
    Pair(ATTENTION, "b"): {"heads": 2, "weights": {"o": 9}},
    Pair(FORWARD, "a"): {"heads": 0, "weights": {"wi": 700, "wo": 500}},
}


def block_learners(model, plan, data, names=VARIANTS):
    return {name: learner_of(model, name[0], VARIANTS[name], plan, steps_of(data, plan)) for name in names}


def fit_blocks(names, plan, path, **options):
    """Fine-tune some of VARIANTS against the tiny T5: (learners, rows)."""
    model, data = build_model("t5"), examples()
    learners = block_learners(model, plan, data, names)
    objective = BlockObjective(model, find_blocks(model), plan)
    checkpoint = Checkpoint(path, dict.fromkeys(names, "k"), QUIET)
    rows = fit(learners, objective, data, examples(6, seed=1), plan, RUNTIME, checkpoint, **options)
    return learners, rows


def weights(learner):
    return {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- schedule and step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, warmup, factors",
    [
        (10, 0.2, [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (4, 0.0, [1, 3 / 4, 2 / 4, 1 / 4]),
        (3, 1.0, [1 / 4, 2 / 4, 3 / 4]),
        (1, 0.1, [1 / 1.1]),
        (1, 0.0, [1]),
    ],
)
def test_schedule_by_hand(total, warmup, factors):
    assert [schedule(step, total, warmup) for step in range(total)] == pytest.approx(factors)


def test_steps_of_a_run_by_hand():
    assert steps_of(examples(10), recipe(epochs=3, batch_size=4)) == 9  # 4 + 4 + 2 examples an epoch
    assert steps_of(examples(10), recipe(epochs=3, batch_size=4, epoch_size=5)) == 6  # 4 + 1
    assert steps_of(examples(10), recipe(epochs=3, batch_size=4, epoch_size=99)) == 9


@pytest.mark.parametrize("share", [1.0, 3.0, 0.0])
def test_a_learners_step_is_that_of_a_hand_written_adamw_loop(share):
    torch.manual_seed(0)
    start = {"w": torch.randn(6, 5), "b": torch.randn(6)}
    mask = torch.rand(6, 5) > 0.5
    start["w"] *= mask
    inputs, target = torch.randn(8, 5), torch.randn(8, 6)

    def loss_of(parameters):
        return (inputs @ parameters["w"].T + parameters["b"] - target).pow(2).mean()

    plan = recipe(lr=0.05, weight_decay=0.1, clip=0.5, warmup=0.2)
    learner = Learner(
        {name: t.clone().requires_grad_() for name, t in start.items()}, {"w": mask}, plan, 20, {"b": share}
    )
    for _ in range(20):
        learner.step(loss_of(learner.parameters))

    mine = {name: t.clone().requires_grad_() for name, t in start.items()}
    betas = learner.optimizer.defaults["betas"]
    groups = [{"params": [tensor]} for tensor in mine.values()]
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=betas, weight_decay=0.1, fused=True)
    for step in range(20):
        for group, factor in zip(optimizer.param_groups, (1.0, share)):
            group["lr"] = factor * 0.05 * ((step + 1) / 5 if step < 4 else (20 - step) / 16)
        loss = loss_of(mine)
        optimizer.zero_grad()
        loss.backward()
        mine["w"].grad[~mask] = 0
        torch.nn.utils.clip_grad_norm_(mine.values(), 0.5)
        optimizer.step()
        with torch.no_grad():
            mine["w"][~mask] = 0
    assert same(weights(learner), {name: t.detach() for name, t in mine.items()})
    assert torch.equal(learner.parameters["w"] == 0, ~mask)


# --- block batches -------------------------------------------------------------------------------------------------


def block_losses(model, learners, batch):
    """What every learner loses on one batch, without training: {name: (loss, weight)}."""
    objective = BlockObjective(model, find_blocks(model), recipe())
    found = list(objective.losses(batch, learners, training=False))
    assert len(found) == len({loss.learner for loss in found})
    return {loss.learner: (float(loss.value), float(loss.weight)) for loss in found}


def nmse_by_hand(model, name, tensors, batch):
    """Error of a block with other tensors over the teacher's power, summed token by token over real tokens."""
    module = model.get_submodule(name)
    twin, calls = copy.deepcopy(module), []
    twin.load_state_dict(twin.state_dict() | tensors)
    handle = module.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
        handle.remove()
        ((args, kwargs, output),) = calls
        other = twin(*args, **kwargs)
    output, other = ((o[0] if isinstance(o, tuple) else o).double() for o in (output, other))
    error = power = 0.0
    for row in range(len(output)):
        ids = batch["labels"][row] if name.startswith("decoder") else batch["attention_mask"][row]
        length = int((ids > 0).sum())  # neither -100 nor a mask of 0
        error += (other[row, :length] - output[row, :length]).pow(2).sum().item()
        power += output[row, :length].pow(2).sum().item()
    return error / power, power


def test_block_loss_is_the_nmse_over_real_tokens():
    model, batch = build_model("t5"), padded_batch("t5")
    learners = block_learners(model, recipe(), examples())
    found = block_losses(model, learners, batch)
    assert found.keys() == VARIANTS.keys()
    for name, learner in learners.items():
        assert found[name] == pytest.approx(nmse_by_hand(model, name[0], weights(learner), batch), rel=1e-4)
        assert found[name][0] > 1e-3  # these variants are not the teacher's block


def test_training_blocks_leaves_the_teacher_as_it_was():
    model, plan, data = build_model("t5").train(), recipe(epochs=1), examples()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learners = block_learners(model, plan, data)
    start = {name: weights(learner) for name, learner in learners.items()}
    objective = BlockObjective(model, find_blocks(model), plan)
    for name, loss, *_ in objective.losses(padded_batch("t5"), learners, training=True):
        learners[name].step(loss)
    assert not any(same(weights(learner), start[name]) for name, learner in learners.items())
    assert same(model.state_dict(), before) and not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_teacher_pass_a_batch_however_many_variants():
    """Oracle: how often the embeddings of the source and the target are looked up."""
    model = build_model("t5")
    lookups = []
    for side in ("encoder", "decoder"):
        embedding = model.get_submodule(side).embed_tokens
        embedding.register_forward_hook(lambda *_, side=side: lookups.append(side))
    block_losses(model, block_learners(model, recipe(), examples()), padded_batch("t5"))
    assert lookups == ["encoder", "decoder"]


def test_variants_trained_together_are_bit_for_bit_those_trained_alone(tmp_path):
    """And come nearer to the original, with removed weights at zero."""
    together, _ = fit_blocks(VARIANTS, recipe(), tmp_path / "all")
    for name, learner in together.items():
        losses = [row[2] for row in learner.history]
        assert len(losses) == 4 and learner.best_loss == min(losses) < losses[0]
        held = learner.held.masks
        assert held and all(torch.equal(learner.parameters[key] == 0, mask == 0) for key, mask in held.items())
        alone, _ = fit_blocks([name], recipe(), tmp_path / "one")
        assert same(weights(learner), weights(alone[name])), name
        assert [row[1:3] for row in learner.history[1:]] == [row[1:3] for row in alone[name].history[1:]]
        saved(tmp_path / "one").unlink()


def test_bf16_keeps_weights_and_losses_in_float32_and_zeros_at_zero(tmp_path):
    """Oracle: the float32 run, to bfloat16's precision."""
    exact, _ = fit_blocks(VARIANTS, recipe(epochs=1), tmp_path / "fp32")
    narrow, _ = fit_blocks(VARIANTS, recipe(epochs=1, precision="bf16"), tmp_path / "bf16")
    for name, learner in narrow.items():
        assert all(parameter.dtype == torch.float32 for parameter in learner.parameters.values())
        assert learner.best_loss == pytest.approx(exact[name].best_loss, rel=0.05)
        assert all(
            torch.equal(parameter == 0, exact[name].parameters[key] == 0)
            for key, parameter in learner.parameters.items()
        )


# --- whole models --------------------------------------------------------------------------------------------------


def cross_entropy_by_hand(model, batch):
    """Mean of -log p over the labels that are not ignored, one by one."""
    with torch.no_grad():
        logits = model(**batch).logits.double()
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    if batch["labels"].dim() == 1:
        losses = [-log_p[i, label].item() for i, label in enumerate(batch["labels"].tolist())]
    else:
        losses = [
            -log_p[i, j, label].item()
            for i, row in enumerate(batch["labels"].tolist())
            for j, label in enumerate(row)
            if label != -100
        ]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_model_loss_is_the_cross_entropy_over_real_labels(kind):
    model, batch = build_model(kind), padded_batch(kind)
    ((name, loss, weight, _),) = ModelObjective(model, recipe()).losses(batch, {"model": None}, training=False)
    expected, count = cross_entropy_by_hand(model, batch)
    assert (name, loss.item(), weight.item()) == ("model", pytest.approx(expected, rel=1e-5), count)


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_distillation_by_hand(kind):
    """Oracle: both cross-entropies summed label by label in double precision."""
    batch, teacher = padded_batch(kind), build_model(kind)
    model = build_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_({"t5": 1.5, "distilbert": 8}[kind])
    found = {}
    objective = ModelObjective(model, recipe(distill=0.25, dropout=False), teacher)
    for training in (True, False):
        ((_, loss, *_),) = objective.losses(batch, {"model": None}, training)
        found[training] = loss.item()
    assert not teacher.training
    task, count = cross_entropy_by_hand(model, batch)
    with torch.no_grad():
        p, q = (m.eval()(**batch).logits.double().softmax(-1) for m in (teacher, model))
    teachers = -(p * q.log()).sum(-1)[batch["labels"] != -100].sum().item() / count
    assert abs(teachers - task) > 1e-3
    assert found == {True: pytest.approx(0.75 * task + 0.25 * teachers, rel=1e-4), False: pytest.approx(task, rel=1e-5)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
def test_a_model_trains_with_dropout_if_asked_and_is_validated_without(training, dropout):
    model = build_model("t5").train(not training)
    list(ModelObjective(model, recipe(dropout=dropout)).losses(padded_batch("t5"), {"model": None}, training))
    assert all(module.training is (training and dropout) for module in model.modules())


def fit_model(path, plan, key="k", measure=None, **options):
    """Fine-tune the tiny T5, half of one weight removed: (learner, progress); `measure`: from the model."""
    model, data = build_model("t5"), examples()
    parameters = dict(model.named_parameters())
    name = f"{FORWARD}.wi.weight"
    mask = torch.rand(parameters[name].shape, generator=torch.Generator().manual_seed(3)) > 0.5
    with torch.no_grad():
        parameters[name] *= mask
    learner = Learner(parameters, {name: mask}, plan, steps_of(data, plan))
    objective, checkpoint = ModelObjective(model, plan), Checkpoint(path, {"model": key}, Talk())
    options["measure"] = measure and measure(model)
    rows = fit({"model": learner}, objective, data, examples(6, seed=1), plan, RUNTIME, checkpoint, **options)
    return learner, rows


# --- early stopping and best weights, on scripted losses -------------------------------------------------------------


def scripted_fit(tmp_path, script, plan, **options):
    """Fit learners of one number each; `script`: {name: validation losses, epoch by epoch}.

    Returns:
        (learners, rows, seen): seen[name] holds the number at each of the learner's validations.
    """
    learners = {name: Learner({"x": torch.zeros(1, requires_grad=True)}, {}, plan, 100) for name in script}
    seen = {name: [] for name in script}
    data = examples(4)

    class Scripted:
        def losses(self, batch, learners, training):
            for name, learner in learners.items():
                loss = learner.parameters["x"].sum()
                if not training:
                    seen[name].append(loss.item())
                    loss = torch.tensor(script[name][len(seen[name]) - 1])
                yield Loss(name, loss, torch.tensor(1.0))

    checkpoint = Checkpoint(tmp_path / "c", dict.fromkeys(script, "k"), QUIET)
    rows = fit(learners, Scripted(), data, data, plan, RUNTIME, checkpoint, **options)
    return learners, rows, seen


@pytest.mark.parametrize(
    "losses, early_stop, best, last",
    [
        ([5, 4, 3, 2], 2, 3, 3),  # better every epoch
        ([5, 3, 4, 4, 1], 2, 1, 3),  # two epochs without a better one: never sees the 1
        ([5, 3, 4, 2, 4, 4, 1], 2, 3, 5),  # the count begins again
        ([5, 6, 7], 1, 0, 1),  # training made it worse from the start
        ([5, 3, 3, 3], 2, 1, 3),  # equal is not better
        ([5, 6, 7, 4], 0, 3, 3),  # 0 never stops early
        ([5, math.nan, 4, math.nan, math.nan], 2, 2, 4),
    ],
    ids=str,
)
def test_early_stopping_and_the_best_weights_by_hand(tmp_path, losses, early_stop, best, last):
    epochs = 3 if early_stop == 0 else len(losses) - 1
    losses = [float(loss) for loss in losses]
    learners, rows, seen = scripted_fit(
        tmp_path, {"x": losses}, recipe(epochs=epochs, batch_size=4, early_stop=early_stop)
    )
    learner = learners["x"]
    assert rows[-1].epoch == last == len(learner.history) - 1 and learner.best_epoch == best
    assert learner.best_loss == losses[best] and learner.parameters["x"].item() == seen["x"][best]
    assert len(set(seen["x"])) == last + 1  # each epoch had weights of its own


@pytest.mark.parametrize(
    "metrics, early_stop, best, last",
    [
        ([1, 3, 2, 4], 0, 3, 3),  # whatever the loss says
        ([1, 3, 2, 2, 9], 2, 1, 3),  # two epochs without a better one
        ([4, 3, 2, 1], 0, 0, 3),
        ([0, 0, 0, 0], 0, 2, 3),  # of equal ones, the lowest loss
    ],
    ids=str,
)
def test_the_best_epoch_by_a_metric_by_hand(tmp_path, metrics, early_stop, best, last):
    losses, values = [5.0, 4.0, 2.0, 3.0, 1.0][: len(metrics)], iter(metrics)
    learners, rows, seen = scripted_fit(
        tmp_path,
        {"x": losses},
        recipe(epochs=len(metrics) - 1, batch_size=4, early_stop=early_stop),
        measure=Measure("bleu", lambda after_batch: float(next(values))),
    )
    learner = learners["x"]
    assert (rows[-1].epoch, learner.best_epoch) == (last, best)
    assert (learner.best_metric, learner.best_loss) == (metrics[best], losses[best])
    assert learner.parameters["x"].item() == seen["x"][best]
    assert [row.metric for row in learner.history] == metrics[: last + 1]


@pytest.mark.parametrize("losses, last", [([5, 3, 2, 1], 2), ([2, 1], 0), ([5, 4, 3], 2)], ids=str)
def test_a_target_loss_ends_the_run_as_soon_as_it_is_reached(tmp_path, losses, last):
    learners, rows, _ = scripted_fit(
        tmp_path, {"x": [float(loss) for loss in losses]}, recipe(epochs=len(losses) - 1, batch_size=4, target_loss=2.0)
    )
    assert rows[-1].epoch == last and learners["x"].best_loss == losses[last]


def test_a_learner_that_stops_is_handed_over_at_once_and_the_others_go_on(tmp_path):
    finished = []
    script = {"short": [2.0, 1.0, 3.0], "long": [4.0, 3.0, 2.0, 1.0]}
    learners, rows, seen = scripted_fit(
        tmp_path,
        script,
        recipe(epochs=3, batch_size=4, early_stop=1),
        on_epoch=lambda rows: finished.append(rows[-1].epoch),
        on_finished=lambda name, learner: finished.append((name, learner.parameters["x"].item())),
    )
    assert finished == [0, 1, 2, ("short", seen["short"][1]), 3, ("long", seen["long"][3])]
    assert learners["short"].steps == 2 and learners["long"].steps == 3 and rows[-1].epoch == 3


def test_losses_that_never_were_numbers_are_reported(tmp_path):
    with pytest.raises(UserError, match="the validation loss was never a number"):
        scripted_fit(tmp_path, {"x": [math.nan] * 4}, recipe())


@pytest.mark.parametrize(
    "before, after, taken", [(2.0, 1.0, 7.0), (1.0, 2.0, 0.0), (math.nan, 1.0, 7.0), (math.nan, math.nan, 7.0)]
)
def test_a_solution_is_gone_on_from_if_it_is_better(before, after, taken):
    """From the solution too where there is nothing that it could be compared with."""
    learner = Learner({"w": torch.zeros(2, requires_grad=True)}, {}, recipe(), 4)
    learner.restart_from({"w": torch.full((2,), 7.0)}, before, after)
    assert learner.parameters["w"].tolist() == [taken] * 2


# --- checkpoints ---------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for whatever ends a run."""


def kill_after(epoch):
    def on_epoch(rows):
        if rows[-1].epoch == epoch:
            raise Killed

    return on_epoch


def test_a_resumed_model_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    """With dropout on, and every epoch's order its own."""
    whole, whole_rows = fit_model(tmp_path / "whole", recipe())
    with pytest.raises(Killed):
        fit_model(tmp_path / "c", recipe(), on_epoch=kill_after(1))
    torch.manual_seed(99)  # another process starts with another state
    epochs = []
    resumed, rows = fit_model(tmp_path / "c", recipe(), on_epoch=lambda rows: epochs.append(rows[-1].epoch))
    assert epochs == [1, 2, 3]  # the epoch whose stats were being written is done again
    assert same(weights(resumed), weights(whole)) and resumed.steps == whole.steps == 9
    assert [row[1:3] for row in resumed.history][1:] == [row[1:3] for row in whole.history][1:]
    assert [row[0] for row in rows] == [row[0] for row in whole_rows] == [0, 1, 2, 3]


def saved(prefix):
    """Where a checkpoint lies."""
    return prefix.with_name(f"{prefix.name}.unfinished.checkpoint")


def spoil_key(path):
    content = torch.load(path, weights_only=True) | {"keys": {"model": "of other settings"}}
    content.pop("digest")
    torch.save(content | {"digest": content_digest(content)}, path)


def flip_a_bit(path):
    """In the last quarter, where the tensors are; zip's own checksums are not looked at there by torch."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (spoil_key, "of other settings or inputs,"),
        (lambda path: torch.save([1, 2], path), "damaged"),
        (flip_a_bit, "damaged"),
    ],
    ids=["other key", "foreign", "a bit"],
)
def test_a_checkpoint_of_something_else_is_not_used(tmp_path, capsys, spoil, reason):
    with pytest.raises(Killed):
        fit_model(tmp_path / "c", recipe(), on_epoch=kill_after(1))
    spoil(saved(tmp_path / "c"))
    epochs = []
    fit_model(tmp_path / "c", recipe(), on_epoch=lambda rows: epochs.append(rows[-1].epoch))
    assert epochs == [0, 1, 2, 3]
    assert capsys.readouterr().err == f"{saved(tmp_path / 'c')}: is {reason} and not used; starting over\n"


# --- stats ---------------------------------------------------------------------------------------------------------


def with_history(*rows):
    return SimpleNamespace(history=[Epoch(*row) for row in rows])


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.reader(handle))


def test_stats_by_hand(tmp_path):
    """Means over two learners, of which one stops after epoch 1 and counts with its last losses from then on."""
    learners = {
        "a": with_history((0, math.nan, 4.0), (1, 3.0, 2.0)),
        "b": with_history((0, math.nan, 6.0), (1, 5.0, 4.0), (2, 1.0, 0.1)),
    }
    write_stats(
        tmp_path / "s.csv",
        {name: learner.history for name, learner in learners.items()},
        [EpochSeconds(0, 0.0, 0.25), EpochSeconds(1, 1.23456, 0.5), EpochSeconds(2, 1.0, 0.5)],
        "abc",
    )
    assert read_csv(tmp_path / "s.csv") == [
        ["epoch", "train_loss", "val_loss", "train_seconds", "val_seconds", "run"],
        ["0", "", "5.0", "0.0", "0.25", "abc"],
        ["1", "4.0", "3.0", "1.235", "0.5", "abc"],
        ["2", "2.0", "1.05", "1.0", "0.5", "abc"],
    ]


def test_stats_of_a_run_with_a_metric_have_a_column_more(tmp_path):
    """A file from before there were metrics stays readable, and takes the column; another metric takes another one."""
    path = tmp_path / "s.csv"
    seconds = [EpochSeconds(0, 0.0, 0.25)]
    write_stats(path, {"a": [Epoch(0, math.nan, 4.0)]}, seconds, "one")
    write_stats(path, {"a": [Epoch(0, math.nan, 3.0, {}, 27.5)]}, seconds, "two", "bleu")
    write_stats(path, {"a": [Epoch(0, math.nan, 2.0, {}, 0.5)]}, seconds, "three", "f1")
    write_stats(path, {"a": [Epoch(0, math.nan, 1.0, {}, math.nan)]}, seconds, "two", "bleu")
    assert read_csv(path) == [
        ["epoch", "train_loss", "val_loss", "train_seconds", "val_seconds", "bleu", "f1", "run"],
        ["0", "", "4.0", "0.0", "0.25", "", "", "one"],
        ["0", "", "2.0", "0.0", "0.25", "", "0.5", "three"],
        ["0", "", "1.0", "0.0", "0.25", "", "", "two"],
    ]
    check_stats(path)
    assert [(row["val_loss"], row["f1"]) for row in read_stats(path, "three")] == [("2.0", "0.5")]


def test_variant_stats_by_hand_keep_the_rows_of_other_runs(tmp_path):
    path = tmp_path / "s.csv"
    first = {("ff", "a"): [Epoch(0, math.nan, 0.5), Epoch(1, 0.4, 1 / 3)], ("ff", "b"): [Epoch(0, math.nan, 9.0)]}
    write_variant_stats(path, {("ff", "a"): first["ff", "a"][:1]}, "one")  # replaced: the same run, further on
    write_variant_stats(path, first, "one")
    second = {("ff", "b"): [Epoch(0, math.nan, 0.75)], ("attn", "c"): [Epoch(0, math.nan, 0.125)]}
    write_variant_stats(path, second, "two")
    assert read_csv(path) == [
        ["block", "variant", "epoch", "train_loss", "val_loss", "run"],
        ["ff", "a", "0", "", "0.5", "one"],
        ["ff", "a", "1", "0.4", repr(1 / 3), "one"],
        ["ff", "b", "0", "", "9.0", "one"],
        ["ff", "b", "0", "", "0.75", "two"],
        ["attn", "c", "0", "", "0.125", "two"],
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\xff",
        b"epoch,train_loss,val_loss,train_seconds\n",
        b"epoch,train_loss,val_loss,train_seconds,val_seconds,mine,run\n",
    ],
    ids=["picture", "column missing", "another column"],
)
def test_a_foreign_file_is_no_stats(tmp_path, content):
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is there, and is no stats CSV"):
        check_stats(path)
    with pytest.raises(UserError):  # nor if it appeared since
        write_stats(path, {"a": [Epoch(0, math.nan, 4.0)]}, [EpochSeconds(0, 0.0, 0.25)], "abc")
    assert path.read_bytes() == content
