"""The order of the examples, and how a batch is shared."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsso.errors import RecipeError
from dsso.tasks.data import IGNORE, global_batch, micro_batches, pad, token_positions
from dsso.tasks.evaluate import share


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 5), st.integers(0, 30))
def test_every_epoch_holds_every_example_once(n, size, seed, steps):
    stream = [index for step in range(steps) for index in global_batch(n, size, seed, step)]
    assert len(stream) == steps * size
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_the_order_is_a_function_of_its_arguments():
    assert global_batch(100, 8, 0, 7) == global_batch(100, 8, 0, 7)
    assert global_batch(100, 8, 0, 7) != global_batch(100, 8, 1, 7)
    # the same stream, cut otherwise
    coarse = global_batch(100, 16, 0, 0)
    assert coarse == global_batch(100, 8, 0, 0) + global_batch(100, 8, 0, 1)
    # each epoch has an order of its own
    assert global_batch(100, 100, 0, 0) != global_batch(100, 100, 0, 1)


def test_an_empty_training_set_is_refused():
    with pytest.raises(RecipeError, match="no training examples"):
        global_batch(0, 4, 0, 0)


@pytest.mark.parametrize(("world_size", "gas"), [(1, 1), (2, 1), (1, 4), (2, 4), (8, 1)])
def test_the_shares_of_all_ranks_make_up_the_batch(world_size, gas):
    indices = list(range(100, 116))
    shares = [micro_batches(indices, rank, world_size, gas) for rank in range(world_size)]
    assert all(len(one) == gas for one in shares)
    assert {len(micro) for one in shares for micro in one} == {16 // world_size // gas}
    assert Counter(index for one in shares for micro in one for index in micro) == Counter(indices)


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(RecipeError, match=r"multiples of 6") as caught:
        micro_batches(list(range(8)), 0, 2, 3)
    assert "2 ranks x 3 micro-batches" in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 8))
def test_evaluation_shares_are_disjoint_and_need_equally_many_passes(n, size, world_size):
    shares = [share(n, size, rank, world_size) for rank in range(world_size)]
    assert len({len(one) for one in shares}) == 1
    assert sorted(index for one in shares for part in one for index in part) == list(range(n))


def test_padding_and_positions():
    assert pad([[1, 2], [3]], 0).tolist() == [[1, 2], [3, 0]]
    assert pad([[1, 2], [3]], 0, left=True).tolist() == [[1, 2], [0, 3]]
    assert token_positions(pad([[IGNORE, 5], [6]], IGNORE)).tolist() == [1, 2]
