"""Hidden states as bytes: exact where the type is the teacher's own, and within a stated error in 8 bits."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.cache.state_codec import BLOCK, DTYPES, StateCodec, StoredStates, TokenStates


def states_of(tokens: int, width: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """States in which some channels are far larger than the others, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, width)[torch.randperm(width, generator=generator)]
    return (torch.randn(tokens, width, generator=generator) * sizes).to(dtype)


def stored(codec: StateCodec, states: TokenStates) -> StoredStates:
    blob = codec.encode(states)
    # The bytes of a row lie within others.
    return codec.decode(memoryview(b"before" + blob + b"behind")[6 : 6 + len(blob)], len(states))


@settings(deadline=None)
@given(st.integers(0, 3 * BLOCK), st.integers(1, 5), st.sampled_from(list(DTYPES)), st.integers(0, 7))
def test_states_come_back(tokens: int, width: int, dtype: str, visual: int) -> None:
    hidden = states_of(tokens + visual, width)
    found = stored(StateCodec(dtype, width, 300, visual=True), TokenStates(hidden, visual))
    assert (len(found), found.visual) == (tokens, visual)
    if dtype == "int8":
        # Half a step of the block's scale, which is itself rounded to bfloat16.
        peaks = torch.stack([block.abs().amax(0) for block in hidden.split(BLOCK)]) if len(hidden) else hidden
        bound = peaks.repeat_interleave(BLOCK, 0)[: len(hidden)] / 127
        # A scale that rounds down cuts off the peak: 127 steps, each short by 2**-9 of itself.
        assert ((found.hidden - hidden).abs() <= 0.76 * bound).all()
    else:
        torch.testing.assert_close(found.hidden, hidden.to(DTYPES[dtype]), rtol=0, atol=0)


def test_a_teacher_in_half_precision_is_kept_exactly() -> None:
    for dtype in ("bfloat16", "float16"):
        hidden = states_of(50, dtype=DTYPES[dtype])
        assert torch.equal(stored(StateCodec(dtype, 24, 300), TokenStates(hidden)).hidden, hidden)


def test_a_channel_of_zeros_stays_one() -> None:
    hidden = states_of(10)
    hidden[:, 3] = 0
    found = stored(StateCodec("int8", 24, 300), TokenStates(hidden)).hidden
    assert (found[:, 3] == 0).all()
    assert found.isfinite().all()


def test_what_is_too_large_for_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="too large for float16"):
        StateCodec("float16", 24, 300).encode(TokenStates(torch.full((2, 24), 1e5)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_that_are_cut_short_never_decode(dtype: str) -> None:
    codec = StateCodec(dtype, 24, 300)
    blob = codec.encode(TokenStates(states_of(20)))
    for length in range(0, len(blob), 7):
        with pytest.raises((struct.error, ValueError, OSError)):
            codec.decode(blob[:length], 20)
    for tokens in (0, 19, 21, 40):
        with pytest.raises((struct.error, ValueError, OSError)):
            codec.decode(blob, tokens)


def test_smooth_channels_take_less_room() -> None:
    """A plane runs along a channel, so that its equal high bytes stand side by side."""
    hidden = states_of(200)
    sizes = {dtype: len(StateCodec(dtype, 24, 300).encode(TokenStates(hidden))) / hidden.numel() for dtype in DTYPES}
    assert sizes["int8"] < 1.1 < sizes["bfloat16"] < 1.6 < sizes["float16"] < 2.1 < sizes["float32"] < 4
