"""Which codec pays: against every choice tried by hand."""

from hypothesis import given
from hypothesis import strategies as st

from cairn.plan import Coded, choose_codec

#: As they are; without loss; fine; coarse. Decoded at 0.8 GB/s.
RAW, LOSSLESS, FINE, COARSE = Coded(1, 0), Coded(0.66, 1.25e-9), Coded(0.34, 1.25e-9), Coded(0.22, 1.25e-9)
LADDER = [RAW, LOSSLESS, FINE, COARSE]
SIZE = 32 << 20


def link(bytes_per_s: float, latency_s: float = 0.001):  # type: ignore[no-untyped-def]
    return lambda size: latency_s + size / bytes_per_s


def test_nothing_is_compressed_where_the_way_is_faster_than_decoding() -> None:
    assert choose_codec(LADDER, SIZE, link(5e9)) == 0
    assert choose_codec(LADDER, SIZE, link(1e8)) == 3


def test_of_what_loads_as_fast_the_most_exact_is_taken() -> None:
    assert choose_codec(LADDER, SIZE, link(1e12, latency_s=1.0)) == 0
    assert choose_codec([FINE, COARSE._replace(share=0.33)], SIZE, link(1e8)) == 0


def test_a_deadline_spares_loss() -> None:
    slow = link(1e8)
    assert choose_codec(LADDER, SIZE, slow, within_s=1.0) == 0
    assert choose_codec(LADDER, SIZE, slow, within_s=0.3) == 1
    assert choose_codec(LADDER, SIZE, slow, within_s=0.2) == 2
    assert choose_codec(LADDER, SIZE, slow, within_s=0.01) == 3


costs = st.builds(Coded, st.floats(0.1, 1), st.floats(0, 1e-8))


@given(st.lists(costs, min_size=1, max_size=6), st.integers(1, 1 << 30), st.floats(1e6, 1e11), st.floats(0, 1))
def test_no_choice_is_slower_than_it_need_be(
    choices: list[Coded], size: int, bytes_per_s: float, within_s: float
) -> None:
    transfer = link(bytes_per_s)
    seconds = [transfer(round(size * one.share)) + size * one.decode_s for one in choices]
    chosen = choose_codec(choices, size, transfer, within_s=within_s)
    allowed = max(within_s, 1.05 * min(seconds))
    assert seconds[chosen] <= allowed
    assert all(taken > allowed for taken in seconds[:chosen])
