"""Train, test and use semi-supervised segmentation networks.

python main.py --training | --testing | --predict PATH...

A TOML is a command line written down: parser defaults (the paper's) < config/<dataset>.toml <
--config FILE < command line.
"""

if __name__ == "__main__":  # before the slow imports, so that a signal during them is heard
    from engine import signals

    signals.install()

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import data_utils
import utils
from data_utils import Data, load_data, load_part
from datasets import labels
from datasets.spec import DatasetSpec, load_spec
from datasets.splits import ByFile
from engine import predict, program, trained
from engine.flags import Flags, parse_args
from engine.folder import open_folder
from engine.run import Run
from engine.signals import stop
from engine.train import evaluate, train_one_epoch
from model import METHODS, Method, distribute
from utils import InputError

# Training


def train(args: Flags) -> int:
    """--training: start a run, or resume an interrupted one."""
    device = utils.pick_device(args.device, args.precision)
    spec = load_spec(args.dataset)
    if args.batch_size % utils.world_size():
        processes = f"{utils.world_size()} processes"
        raise InputError(f"--batch-size {args.batch_size} cannot be divided among {processes}")
    utils.join_processes(device)
    batches = make_batches(args, device)
    model = build_model(args, spec, device)
    with open_folder(args, spec) as folder:
        data = load_data(args, spec, folder.split_hash, model.uses_unlabeled)
        if message := folder.finished(args.epochs):
            print(message)
            return 0
        describe(args, spec, data, device, folder.path)
        with Run(args, spec, data, model, folder) as run:
            distribute_and_compile(model, args, device)
            orientation = spec.orientation if args.augment else None
            train_batches = batches(data.train, orientation=orientation)
            val_batches = batches(data.val)
            while not run.ended:
                if run.evaluation_due:
                    images = itertools.takewhile(lambda _: not stop.signum, val_batches)
                    run.record(evaluate(model, images, len(spec.classes)))
                else:
                    train_one_epoch(model, train_batches.of(run.rest_of_epoch()), run)
            return run.end()


def make_batches(args: Flags, device: torch.device) -> Callable:
    """The function from a dataset to its batches on the device, as the flags say."""
    return functools.partial(
        data_utils.Batches,
        batch_size=args.batch_size,
        device=device,
        workers=args.workers,
        normalization=args.normalization,
    )


def build_model(args: Flags, spec: DatasetSpec, device: torch.device) -> Method:
    """The method with initial weights that are the same in every process."""
    utils.seed_everything(args.seed, args.deterministic)
    model = METHODS[args.method].from_args(spec, args).to(device)
    if device.type == "cpu":  # convolutions are faster so, most of all backward
        model.to(memory_format=torch.channels_last)
    if utils.rank():  # dropout and pools differ between processes
        torch.manual_seed(args.seed + 2**33 * utils.rank())
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
    """Print a summary of the run, with warnings about data that look incomplete.

    InputError if labeled masks contain fewer than two classes, or if masks follow two conventions.
    """
    expected, found = args.rule.n_expected(spec, data.split.val), data.n_groups
    if expected not in (None, found):
        used = "all are used" if args.split == "standard" else "split in the same proportions"
        about = f"{found} images or exams with masks instead of {spec.name}'s {expected}"
        print(f"{args.data_root}: {about}: {used}")
    unit = data.split.unit() if isinstance(args.rule, ByFile) else args.rule.unit
    cuda = device.type == "cuda"
    machine = f"CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(device) if cuda else machine
    processes = f"{utils.world_size()} processes, each on " if utils.world_size() > 1 else ""
    height, width = args.size
    length = f"{args.epochs} epochs of {data.train.n_steps(args.batch_size)} steps"
    print(f"method:  {args.method}, {args.rule.flag}, seed {args.seed}, {length}")
    print(f"data:    {spec.name} in {args.data_root}: {data.split.summary(unit)}")
    print(f"network: {height}x{width} pixels, ngf {args.ngf}, batches of {args.batch_size}")
    print(f"device:  {processes}{machine}, {args.precision}")
    print(f"files:   {folder}", flush=True)
    labels.check_classes(data.labeled.masks(), spec, data.labeled.ignored_class)
    labels.check_ignored([*data.labeled.masks(), *data.val.masks()], spec, data.unlabeled.samples)


# Testing


def test(args: Flags) -> int:
    """--testing: score a checkpoint on the validation images of its split, or on --part."""
    best = trained.load(args)
    if args.part:
        data = load_part(best.args, best.spec)
    else:
        data = load_data(best.args, best.spec, best.state["split"])
    return predict.score(best, data, make_batches(best.args, best.device))


def command(argv: list[str]) -> int:
    """Run a command line of this program."""
    args = parse_args(argv)
    if args.training:
        return train(args)
    if utils.world_size() > 1:
        raise InputError("--testing and --predict run in one process; start them without torchrun")
    return test(args) if args.testing else predict.predict(trained.load(args))


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the program's own; the exit code, errors as one line."""
    return program.execute(command, argv)


if __name__ == "__main__":
    sys.exit(main())
