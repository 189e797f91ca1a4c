"""What the proof that there were never two schedulers rests on."""

from __future__ import annotations

from schedulers import overlap_ms, presence

S = 1_000_000_000


def samples(*moments: tuple[float, int]) -> list[str]:
    return [f"{int(moment * S)} {there}" for moment, there in moments]


def test_presence_is_what_the_samples_say() -> None:
    found = presence(samples((1, 0), (1.5, 1), (2, 1), (2.5, 0), (3, 1)))
    assert found == [(1.5 * S, 2 * S), (3 * S, 3 * S)]


def test_a_machine_that_was_off_had_none() -> None:
    assert presence(samples((1, 1), (1.5, 1), (60, 1))) == [(S, 1.5 * S), (60 * S, 60 * S)]


def test_overlap_is_counted_in_milliseconds() -> None:
    assert overlap_ms([(0, 2 * S), (5 * S, 6 * S)], [(int(1.75 * S), 5 * S)]) == 250
    assert overlap_ms([(0, S)], [(2 * S, 3 * S)]) == 0
