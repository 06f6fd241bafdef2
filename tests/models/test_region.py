"""Boxes of tensors, against indexing a tensor of places."""

import pytest
import torch

from dscoder.models.region import Region, whole_region

BOXES = [
    ((6,), (2,), (3,)),
    ((4, 6), (1, 0), (2, 6)),
    ((4, 6), (1, 2), (3, 3)),
    ((3, 4, 5), (1, 0, 0), (1, 4, 5)),
    ((3, 4, 5), (0, 2, 0), (3, 2, 5)),
    ((3, 4, 5), (1, 1, 1), (2, 3, 4)),
    ((3, 4, 5), (3, 0, 0), (0, 4, 5)),
    ((), (), ()),
]


@pytest.mark.parametrize(("whole_shape", "start", "shape"), BOXES)
def test_the_runs_of_a_box_are_its_elements_in_order(whole_shape, start, shape):
    region = Region(whole_shape=whole_shape, start=start, shape=shape)
    whole = whole_region(whole_shape)
    places = torch.arange(whole.num_elements).view(whole_shape)
    wanted = places[region.slices(whole)].flatten().tolist()
    got = [run.whole + i for run in region.runs() for i in range(run.length)]
    assert got == wanted
    inside = [run.inside + i for run in region.runs() for i in range(run.length)]
    assert inside == list(range(region.num_elements))


def test_what_is_cut_in_the_first_dimension_alone_is_one_run():
    region = Region(whole_shape=(8, 3, 5), start=(2, 0, 0), shape=(4, 3, 5))
    assert [(run.inside, run.whole, run.length) for run in region.runs()] == [(0, 30, 60)]


def test_two_boxes_meet_in_what_both_have():
    one = Region(whole_shape=(6, 6), start=(0, 1), shape=(4, 3))
    other = Region(whole_shape=(6, 6), start=(2, 0), shape=(4, 2))
    both = one.overlap(other)
    assert both == Region(whole_shape=(6, 6), start=(2, 1), shape=(2, 1))
    assert both.slices(one) == (slice(2, 4), slice(0, 1))
    assert both.slices(other) == (slice(0, 2), slice(1, 2))


def test_boxes_apart_meet_in_nothing():
    one = Region(whole_shape=(6,), start=(0,), shape=(2,))
    other = Region(whole_shape=(6,), start=(4,), shape=(2,))
    assert one.overlap(other).num_elements == 0
    assert list(one.overlap(other).runs()) == []
