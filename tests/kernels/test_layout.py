import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sltt_ext.kernels.layout import is_dense, same_layout


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    stride_of_ones=st.integers(0, 50),
)
def test_any_permutation_of_a_contiguous_tensor_is_dense(shape, order, stride_of_ones):
    dimensions = list(range(len(shape)))
    order.shuffle(dimensions)
    tensor = torch.empty(shape).permute(dimensions)
    stride = [stride_of_ones if size == 1 else step for size, step in zip(tensor.shape, tensor.stride())]
    assert is_dense(tensor.shape, stride)


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4), st.lists(st.integers(0, 12), min_size=4, max_size=4)
)
def test_dense_means_that_every_place_is_used_once(shape, stride):
    stride = stride[: len(shape)]
    places = [0]
    for size, step in zip(shape, stride):
        places = [place + k * step for place in places for k in range(size)]
    assert is_dense(shape, stride) == (sorted(places) == list(range(len(places))))


STEP = torch.empty(2, 3, 4, 5)
LAST = STEP.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("step", "sequence", "expected"),
    [
        (STEP, torch.empty(6, *STEP.shape), True),
        (STEP, torch.empty(12, *STEP.shape)[::2], False),
        (STEP, torch.empty(*STEP.shape, 6).movedim(-1, 0), False),
        (STEP, STEP.expand(6, *STEP.shape), False),
        (STEP, LAST.unsqueeze(0), False),
        (LAST, torch.empty_strided((6, *LAST.shape), (LAST.numel(), *LAST.stride())), True),
        (LAST, torch.empty(6, *LAST.shape), False),
        (LAST, LAST.unsqueeze(0), True),
        (LAST, LAST.expand(6, *LAST.shape), False),
        (LAST, torch.empty(0, *LAST.shape), True),
        (STEP[:, ::2], torch.empty(6, *STEP[:, ::2].shape), False),
    ],
)
def test_same_layout(step, sequence, expected):
    assert same_layout(step, sequence) == expected
    assert same_layout(step, sequence, sequence) == expected
