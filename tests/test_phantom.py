"""The drawn dataset: the same images each time, and all classes."""

import numpy as np
import pytest

from datasets.files import read_sample
from datasets.phantom import draw_phantom
from datasets.spec import Sample, load_spec


def test_phantoms_are_bytes_and_twenty_show_every_class():
    seen = set()
    for number in range(20):
        image, mask = draw_phantom(number)
        assert (image.dtype, mask.dtype) == (np.uint8, np.uint8)
        assert (image.shape, mask.shape) == ((96, 96), (96, 96))
        assert np.ptp(image) > 50
        seen |= {*np.unique(mask).tolist()}
    assert seen == {0, 1, 2, 3}
    assert not np.array_equal(mask, draw_phantom(0)[1])


def test_phantom_7_is_the_one_that_recorded_results_were_measured_on():
    image, mask = draw_phantom(7)
    assert np.bincount(mask.ravel()).tolist() == [8245, 365, 432, 174]
    assert int(image.sum()) == pytest.approx(572962, abs=100)  # exp and cos differ by machine


def test_a_phantoms_sample_is_its_drawing():
    image, mask = read_sample(Sample("a", "a", 6, 6), load_spec("phantom"))
    assert np.array_equal([image, mask], draw_phantom(6))
