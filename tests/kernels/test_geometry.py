from hypothesis import given
from hypothesis import strategies as st

from sltt_ext.kernels.geometry import MAX_BLOCKS, THREADS, launch_geometry

ITEMSIZES = st.sampled_from([2, 4])
ADDRESSES = st.lists(st.integers(0, 2**40).map(lambda k: 4 * k), min_size=1, max_size=6)


def packs_of(geometry, packs):
    """The packs each thread handles, as the kernels step through them."""
    stride = geometry.blocks * THREADS
    for first in range(stride):
        yield range(first, packs, stride)


@given(
    elements=st.integers(1, 40_000),
    rows=st.integers(1, 5),
    itemsize=ITEMSIZES,
    addresses=ADDRESSES,
    max_blocks=st.sampled_from([1, 3, 1024, MAX_BLOCKS]),
)
def test_every_element_is_handled_exactly_once(elements, rows, itemsize, addresses, max_blocks):
    geometry = launch_geometry(elements, itemsize, addresses, rows, max_blocks)
    width = geometry.width
    assert elements % width == 0  # no pack reaches into the next row
    handled = [0] * (rows * elements)
    for packs in packs_of(geometry, rows * elements // width):
        for pack in packs:
            for element in range(pack * width, (pack + 1) * width):
                handled[element] += 1
    assert handled == [1] * (rows * elements)


@given(elements=st.integers(1, 2**45), rows=st.integers(1, 64), itemsize=ITEMSIZES, addresses=ADDRESSES)
def test_limits_hold_up_to_any_size(elements, rows, itemsize, addresses):
    geometry = launch_geometry(elements, itemsize, addresses, rows)
    packs = rows * elements // geometry.width
    assert 1 <= geometry.blocks <= MAX_BLOCKS
    assert geometry.blocks * THREADS >= packs or geometry.blocks == MAX_BLOCKS
    assert (geometry.blocks - 1) * THREADS < packs  # no block without work
    assert rows * elements + geometry.blocks * THREADS * geometry.width < 2**63  # what the kernels count with


@given(elements=st.integers(1, 2**40), rows=st.integers(1, 8), itemsize=ITEMSIZES, addresses=ADDRESSES)
def test_loads_are_aligned(elements, rows, itemsize, addresses):
    width = launch_geometry(elements, itemsize, addresses, rows).width
    assert width * itemsize <= 16
    for size in (itemsize, 4):  # the sequence and the float32 state
        bytes_at_once = min(16, width * size)
        assert all(address % bytes_at_once == 0 for address in addresses) or width == 1
        assert elements * size % bytes_at_once == 0 or width == 1


def test_large_aligned_tensors_load_16_bytes():
    for itemsize in (2, 4):
        assert launch_geometry(2**20, itemsize, [512, 1024]).width * itemsize == 16


def test_a_misaligned_array_or_an_odd_row_narrows_the_loads():
    assert launch_geometry(2**20, 4, [512, 8]).width == 2
    assert launch_geometry(2**20, 4, [512, 4]).width == 1
    assert launch_geometry(2**20, 2, [512, 8]).width == 2  # the state there is float32
    assert launch_geometry(2**20 + 4, 2, [512]).width == 4
    assert launch_geometry(2**20 + 1, 2, [512]).width == 1


def test_a_small_tensor_gets_more_threads_rather_than_wider_loads():
    assert launch_geometry(2**16, 4, [512]).width == 1
    assert launch_geometry(2**16, 4, [512], rows=4).width == 4


def test_beyond_32_bit_indices():
    geometry = launch_geometry(2**33, 4, [512], rows=4)
    assert geometry.blocks * THREADS * geometry.width == 2**35
