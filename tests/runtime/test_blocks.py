"""Blocks are counted right, found by what they hold, and given away in the right order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.runtime.blocks import BlockPool, KvRoom, content_key


def test_room() -> None:
    room = KvRoom(10, block_tokens=4)
    assert room.num_tokens == 40
    assert [room.blocks_for(tokens) for tokens in (0, 1, 4, 5, 40)] == [0, 1, 1, 2, 10]


def test_a_key_stands_for_all_tokens_up_to_the_end_of_its_block() -> None:
    first = content_key(b"", [1, 2])
    assert first == content_key(b"", (1, 2)) != content_key(b"", [2, 1])
    assert content_key(first, [1, 2]) not in (first, content_key(content_key(b"", [2, 1]), [1, 2]))


def test_low_numbers_first_and_never_touched_ones_last() -> None:
    pool = BlockPool(4)
    assert [pool.take() for _ in range(2)] == [0, 1]
    pool.release([0, 1])
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="all blocks"):
        pool.take()


def test_what_was_used_longest_ago_is_given_away_first_and_the_end_of_a_sequence_before_its_beginning() -> None:
    pool = BlockPool(5)
    first, second = [pool.take() for _ in range(2)], [pool.take() for _ in range(2)]
    for name, block in zip("abcd", first + second, strict=True):
        pool.publish(block, name.encode())
    pool.release(second)
    pool.release(first)
    assert (pool.num_cached, pool.num_available) == (4, 5)
    found = pool.find(b"c")
    assert found == second[0]
    pool.share(found)
    assert [pool.take() for _ in range(4)] == [4, second[1], first[1], first[0]]
    assert pool.find(b"d") is pool.find(b"a") is None and pool.find(b"c") == found
    assert pool.num_available == 0


def test_a_shared_block_is_free_once_nobody_uses_it() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.publish(block, b"a")
    pool.share(block)
    pool.release([block])
    assert (pool.num_available, pool.references(block)) == (0, 1)
    pool.release([block])
    assert (pool.num_available, pool.num_cached) == (1, 1)


def test_of_equal_contents_the_first_is_found() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.find(b"a") == first
    pool.release([first, second])
    assert (pool.num_cached, pool.num_available) == (1, 2)


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "publish", "release"]), st.integers(0, 9)), max_size=80))
def test_every_block_is_in_use_cached_or_unused(actions: list[tuple[str, int]]) -> None:
    """Against a model that is as simple as can be: who holds what, and what was published."""
    pool, held, content = BlockPool(4), [], {}
    for action, number in actions:
        key = str(number).encode()
        if action == "take" and pool.num_available:
            block = pool.take()
            assert block not in held
            content.pop(block, None)
            held.append(block)
        elif action == "share":
            found = pool.find(key)
            assert found == next((block for block, name in content.items() if name == key), None)
            if found is not None:
                pool.share(found)
                held.append(found)
        elif action == "publish" and held and held[number % len(held)] not in content:
            block = held[number % len(held)]
            pool.publish(block, key)
            if key not in content.values():
                content[block] = key
        elif action == "release" and held:
            pool.release([held.pop(number % len(held))])
        assert [pool.references(block) for block in range(4)] == [held.count(block) for block in range(4)]
        assert pool.num_available == 4 - len(set(held))
        assert pool.num_cached == len(set(content) - set(held))
