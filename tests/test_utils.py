"""The learning rate, devices, and files."""

import os

import pytest
import torch

import utils
from utils import InputError, TrainingError, linear_decay

# Training


def test_learning_rate_is_constant_then_falls_linearly_to_zero():
    factors = {0: 1, 100: 1, 101.9: 299 / 300, 250: 1 / 2, 399: 1 / 300, 400: 0, 401: 0}
    factor = linear_decay(400, decay_epoch=100)
    assert {epoch: factor(epoch) for epoch in factors} == pytest.approx(factors)
    assert linear_decay(4, decay_epoch=4)(4) == 0


def test_deterministic_kernels_are_a_choice():
    try:
        for deterministic in True, False:
            utils.seed_everything(0, deterministic)
            assert torch.backends.cudnn.benchmark != deterministic
            assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.utils.deterministic.fill_uninitialized_memory  # costs 600 operations
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_gpu_is_the_default_and_that_of_the_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(torch, "empty", lambda _size, device: None)
    utils.pick_device(None, "fp32")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    utils.pick_device("cuda", "fp32")
    assert chosen == ["cuda:0", "cuda:3"]


def test_a_device_without_values_is_refused():
    with pytest.raises(InputError, match="--device meta: "):
        utils.pick_device("meta", "fp32")


def test_tf32_is_a_choice():
    for precision, expected in ("tf32", ("high", True)), ("fp32", ("highest", False)):
        utils.pick_device("cpu", precision)
        found = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        assert found == expected


# Files


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch, step):
    path = tmp_path / "last.pt"
    utils.write_atomically(path, b"older")
    utils.write_atomically(path, "Süd")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(TrainingError, match="last.pt: .*No space.* MiB are needed"):
        utils.write_atomically(path, b"second")
    assert path.read_bytes() == "Süd".encode()
    assert [*tmp_path.iterdir()] == [path]


def test_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / ("a" * 255), []

    def fsync(file):
        seen.append((os.fstat(file).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    utils.write_atomically(path, b"xyz")
    assert seen == [(3, False)]


def test_two_processes_that_write_a_file_at_once_leave_one_whole(tmp_path, monkeypatch):
    path, fsync = tmp_path / "a", os.fsync

    def meanwhile(file):
        monkeypatch.setattr(os, "fsync", fsync)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            utils.write_atomically(path, b"other")

    monkeypatch.setattr(os, "fsync", meanwhile)
    utils.write_atomically(path, b"own")
    assert path.read_bytes() == b"own"
    assert [*tmp_path.iterdir()] == [path]


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
    assert utils.first_ten("abcdefghij") == "a; b; c; d; e; f; g; h; i; j"
    assert utils.first_ten(iter("abcdefghijk")) == "a; b; c; d; e; f; g; h; i; j; and 1 more"


def test_a_rank_counts_only_among_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (utils.rank(), utils.local_rank()) == (0, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (utils.rank(), utils.local_rank()) == (1, 1)


def test_the_folder_of_an_output_is_made_and_a_folder_in_its_place_is_an_error(tmp_path):
    utils.check_output(tmp_path / "new" / "a.png", "--out")
    assert [*tmp_path.iterdir()] == [tmp_path / "new"]
    with pytest.raises(InputError, match="--out .*new: is a folder; give the name of a file"):
        utils.check_output(tmp_path / "new", "--out")


def test_reading_a_pipe_is_an_error_and_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="pipe.txt: not a regular file"):
        utils.read_text(tmp_path / "pipe.txt")
