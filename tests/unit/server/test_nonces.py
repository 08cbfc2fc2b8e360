"""Nonces: once, not for ever, and never so many that memory ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from skerry_server.device_auth import Nonces


def test_a_nonce_is_good_once_and_for_its_life() -> None:
    nonces = Nonces(life_s=10, most=100)
    first, second = nonces.give(0), nonces.give(0)
    assert first != second
    assert nonces.take(first, 9_999)
    assert not nonces.take(first, 9_999)
    assert not nonces.take(second, 10_000)
    assert not nonces.take("invented", 0)


def test_of_two_that_take_it_at_once_one_gets_it() -> None:
    nonces = Nonces(life_s=10, most=100)
    given = [nonces.give(0) for _ in range(50)]
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda nonce: nonces.take(nonce, 1), given * 8))
    assert sum(taken) == 50


def test_asking_for_many_ends_the_oldest() -> None:
    nonces = Nonces(life_s=1000, most=10)
    given = [nonces.give(0) for _ in range(25)]
    assert [nonces.take(nonce, 0) for nonce in given] == [False] * 15 + [True] * 10
