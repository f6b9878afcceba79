"""The learning rate, devices, and files."""

import os

import pytest
import torch

import utils
from utils import InputError, TrainingError, linear_decay

# Training


@pytest.mark.parametrize(
    ("epochs", "decay_epoch", "factors"),
    [
        (400, 100, {0: 1, 100: 1, 101.9: 299 / 300, 250: 1 / 2, 399: 1 / 300, 400: 0}),
        (4, 0, {0: 1, 1: 3 / 4}),
        (4, 4, {3.9: 1, 4: 0, 5: 0}),
        (4, 400, {0: 1, 3.9: 1}),
    ],
)
def test_learning_rate_is_constant_then_falls_linearly_to_zero(epochs, decay_epoch, factors):
    factor = linear_decay(epochs, decay_epoch)
    assert {epoch: factor(epoch) for epoch in factors} == pytest.approx(factors)


def test_same_seed_gives_the_same_numbers():
    drawn = []
    for seed in 1, 1, 2:
        utils.seed_everything(seed)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_deterministic_kernels_are_a_choice():
    try:
        for deterministic in True, False:
            utils.seed_everything(0, deterministic)
            assert torch.backends.cudnn.benchmark != deterministic
            assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.utils.deterministic.fill_uninitialized_memory  # costs 600 operations
    finally:
        torch.use_deterministic_algorithms(False)


def test_wrong_device_is_named():
    for name in "nonsense", "cuda:99":
        with pytest.raises(InputError, match=f"--device {name}"):
            utils.pick_device(name, "fp32")


def test_default_device_is_the_gpu_where_there_is_one():
    assert utils.pick_device(None, "fp32").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert utils.pick_device("cpu", "fp32").type == "cpu"


def test_cuda_is_the_gpu_of_the_process(monkeypatch):
    set_device, chosen = torch.cuda.set_device, []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(torch, "empty", lambda _size, device: None)
    utils.pick_device("cuda", "fp32")
    monkeypatch.setenv("LOCAL_RANK", "3")
    utils.pick_device("cuda", "fp32")
    assert chosen == ["cuda:0", "cuda:3"]
    with pytest.raises(ValueError, match="index"):  # so a number is needed
        set_device(torch.device("cuda"))


def test_tf32_is_a_choice():
    for precision, expected in ("tf32", ("high", True)), ("fp32", ("highest", False)):
        utils.pick_device("cpu", precision)
        found = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        assert found == expected


def test_a_share_is_the_count_over_the_processes_and_of_at_least_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [utils.count_per_process(torch.tensor(count)) for count in (6, 0)] == [3, 1 / 2]


# Files


def test_write_creates_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    for content, expected in ("Süd", "Süd".encode()), (b"\0\n", b"\0\n"), ("", b""):
        utils.write_atomically(path, content)
        assert path.read_bytes() == expected
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch, step):
    path = tmp_path / "last.pt"
    utils.write_atomically(path, b"first")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(TrainingError, match="last.pt: .*No space.* MiB are needed"):
        utils.write_atomically(path, b"second")
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    steps = []
    for name in "fsync", "replace":
        step = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, step=step: (steps.append(name), step(*args))
        )
    utils.write_atomically(tmp_path / "a", b"x")
    assert steps == ["fsync", "replace"]


def test_folder_is_made_empty_with_its_parents_or_named_with_its_flag(tmp_path):
    utils.make_folder(tmp_path / "a" / "b", "--results")
    assert [*tmp_path.rglob("*")] == [tmp_path / "a", tmp_path / "a" / "b"]
    file = tmp_path / "a" / "b" / "file"
    file.write_text("in the way")
    for path in file, file / "c":
        with pytest.raises(InputError, match="--results") as caught:
            utils.make_folder(path, "--results")
        assert str(path) in str(caught.value)


def test_first_ten_names_ten_and_counts_the_rest():
    assert utils.first_ten(["a"]) == "a"
    assert utils.first_ten("abcdefghij") == "a; b; c; d; e; f; g; h; i; j"
    assert utils.first_ten(iter("abcdefghijk")) == "a; b; c; d; e; f; g; h; i; j; and 1 more"
