"""Train, test and use semi-supervised segmentation networks.

python main.py --training | --testing | --predict PATH...

Flags come from the parser's defaults (the paper's), config/<dataset>.toml, --config FILE and the
command line; later ones override earlier ones.
"""

if __name__ == "__main__":  # importing torch takes seconds; handle signals from the start
    from engine import signals

    signals.install()

import sys
from pathlib import Path

import torch

import utils
from data_utils import Data, load_split, open_data, training_batches, validation_batches
from datasets import labels
from datasets.spec import ORIENTATIONS, DatasetSpec, load_spec
from engine import predict, program, signals, trained
from engine.flags import Flags, parse_args
from engine.folder import open_folder
from engine.run import Run
from engine.train import evaluate, train_one_epoch
from model import METHODS, Method, distribute, move
from utils import InputError

# Training


def train(args: Flags) -> int:
    """--training: start a run, or resume an interrupted one."""
    device, spec = connect(args), load_spec(args.dataset)
    model = build_model(args, spec, device)
    with open_folder(args, spec) as folder:
        split = load_split(args, spec, folder.split_hash, model.uses_unlabeled)
        if message := folder.finished(args.epochs):
            print(message)
            return 0
        data = open_data(args, spec, split)
        describe(args, spec, data, device, folder.path)
        check_masks(spec, data)
        with Run(args, spec, data, model, folder) as run:  # begins the folder or restores last.pt
            distribute_and_compile(model, args, device)
            train_batches = training_batches(data, args, spec, device, args.workers)
            val_batches = validation_batches(data, args, device, args.workers)
            while not run.ended:
                if run.evaluation_due:
                    run.record(evaluate(model, val_batches))
                else:
                    train_one_epoch(model, train_batches.of(run.begin_epoch()), run)
            return run.end()


def connect(args: Flags) -> torch.device:
    """Pick the device and connect the processes; InputError if they cannot share a batch evenly."""
    device = utils.pick_device(args.device, args.precision)
    if args.batch_size % utils.world_size():
        processes = f"{utils.world_size()} processes"
        raise InputError(f"--batch-size {args.batch_size} cannot be divided among {processes}")
    if utils.world_size() > 1:
        with signals.unhandled():  # it waits for the others
            utils.join_processes(device)
    return device


def build_model(args: Flags, spec: DatasetSpec, device: torch.device) -> Method:
    """The method with initial weights that are the same in every process."""
    utils.seed_everything(args.seed, args.deterministic)
    model = move(METHODS[args.method].from_args(spec, args), device)
    if utils.rank():  # dropout and pools differ between processes
        torch.manual_seed(args.seed + 2**33 * utils.rank())  # no other run's seed
    return model


def distribute_and_compile(model: Method, args: Flags, device: torch.device) -> None:
    """Prepare the networks for several processes and for --compile."""
    if utils.world_size() > 1:
        distribute(model, device)
    if args.compile:
        utils.compile_networks(model)


def describe(
    args: Flags, spec: DatasetSpec, data: Data, device: torch.device, folder: Path
) -> None:
    """Print a summary of the run."""
    expected, found = args.rule.n_expected(spec, data.split.val), data.n_groups
    if expected is not None and expected != found:
        effects = {"standard": "all are used", "image": "85% are for training"}
        effect = effects.get(args.split, "split in the same proportions")
        counts = f"{found} images or exams with masks instead of {spec.name}'s {expected}"
        print(f"{args.data_root}: {counts}: {effect}")
    machine = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    processes = f"{utils.world_size()} processes, each on " if utils.world_size() > 1 else ""
    height, width = args.size
    n_steps = data.train.n_steps(args.batch_size)
    length = f"{utils.counted(args.epochs, 'epoch')} of {utils.counted(n_steps, 'step')}"
    print(f"method:  {args.method}, {args.rule.flag}, seed {args.seed}, {length}")
    print(f"data:    {spec.name} in {args.data_root}: {data.split.summary(args.rule.unit)}")
    if len(data.axes) > 1:
        print(f"axes:    {', '.join(data.axes)}: slices of volumes are not reoriented")
    if args.augment:
        turns = f'{ORIENTATIONS[spec.orientation]} (orientation = "{spec.orientation}")'
        print(f"augment: {turns}, contrast, brightness")
    print(f"network: {height}x{width} pixels, ngf {args.ngf}, batches of {args.batch_size}")
    print(f"device:  {processes}{machine}, {args.precision}")
    print(f"files:   {folder}", flush=True)


def check_masks(spec: DatasetSpec, data: Data) -> None:
    """Print what is unusual in the masks.

    InputError if the labeled or the validation masks contain fewer than two classes, or if masks
    follow two conventions.
    """
    labels.check_classes(data.labeled.cached_masks(), spec, data.labeled.ignored_class)
    labels.check_ignored(data.masks(), spec, data.unlabeled.samples)
    advice = "choose images that have objects, with --split FILE or another --seed"
    labels.check_classes(data.val.cached_masks(), spec, role="validation", advice=advice)


# The command line


def command(argv: list[str]) -> int:
    """Run a command line of this program."""
    args = parse_args(argv)
    if args.training:
        return train(args)
    run = trained.load(args)
    return predict.score(run) if args.testing else predict.predict(run)


def main(argv: list[str] | None = None) -> int:
    """Run `argv`, by default sys.argv[1:]; return the exit code and print errors as one line."""
    return program.execute(command, argv)


if __name__ == "__main__":
    sys.exit(main())
