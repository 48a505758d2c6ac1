"""Random order and random numbers, which any rank can compute independently for any part of a
range. NumPy only.

There is no state. A key names a purpose, such as ("matching", seed, epoch). The same key and index
give the same result on every rank, in any order and for any part of the range; different keys give
independent results.

`permute` is a Feistel network: an index below n is written as two digits (left, right) with left <
a, right < b and a * b barely above n; a is even, so that odd permutations are as likely as even
ones. Each round adds a hash of one digit to the other, modulo that digit's base, which can be
undone. A result of n or above is mapped again until it is below n ("cycle walking"), which keeps
the map one-to-one on [0, n). The hash is the finaliser of SplitMix64. For statistics, not for
secrets.
"""

from __future__ import annotations

import hashlib
import math
import operator

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
_Words = NDArray[np.uint64]

# Rounds, each of one digit. Measured: a range of 5 needs 24 before all 120 permutations are equally
# likely; ranges of 64 and more pass every test from 8 on.
_SHORT, _ROUNDS_SHORT, _ROUNDS = 1024, 32, 12
_BLOCK = 1 << 14  # indices at a time: the temporaries stay in the processor's cache
_MAX = 1 << 48


def permute(indices: Index, n: int, *key: int | str, tweak: Index | None = None) -> Index:
    """Returns the images of `indices` under the permutation of [0, n) that `key` selects.

    tweak: one number per index, which selects among permutations of the same key.
    """
    if not 0 <= n <= _MAX:
        raise ValueError(f"a range has between 0 and 2**48 indices, not {n}")
    start = np.asarray(indices)
    if start.size and not (start.min() >= 0 and start.max() < n):
        raise ValueError(f"indices must be in [0, {n}), got [{start.min()}, {start.max()}]")
    words = _words_of(key, 1 + (_ROUNDS_SHORT if n < _SHORT else _ROUNDS))
    flat = start.reshape(-1).astype(np.uint64)
    tweaks = (
        None
        if tweak is None
        else np.broadcast_to(np.asarray(tweak), start.shape).reshape(-1).astype(np.uint64)
    )
    for low in range(0, len(flat), _BLOCK):
        block = flat[low : low + _BLOCK]
        mixed = None if tweaks is None else _mix(tweaks[low : low + _BLOCK] + words[0])
        block[:] = _feistel(block, n, words[1:], mixed)
        while len(outside := np.flatnonzero(block >= n)):
            block[outside] = _feistel(
                block[outside], n, words[1:], None if mixed is None else mixed[outside]
            )
    return flat.astype(np.int64).reshape(start.shape)


def uniform(indices: Index, *key: int | str) -> NDArray[np.float64]:
    """Returns for every index its own number from the open interval (0, 1), on a grid of 2**-53."""
    first, second = _words_of(key, 2)
    words = _mix(_mix(np.asarray(indices).astype(np.uint64) + first) + second)
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def symmetric_beta(indices: Index, alpha: float, *key: int | str) -> NDArray[np.float64]:
    """Returns for every index its own draw from Beta(alpha, alpha), alpha > 0, in [0, 1].

    Exact, without rejection: (1 + T / sqrt(v + T^2)) / 2 has this law where T is Student's t with v
    = 2 alpha degrees of freedom, and Bailey's polar method gives T = sqrt(v (U^(-2/v) - 1)) cos(2
    pi V) for uniform U and V (Mathematics of Computation 62, 1994). Arranged so that nothing
    overflows and draws near 0 keep their relative precision.
    """
    if not alpha > 0 or math.isinf(alpha):
        raise ValueError(f"alpha must be positive and finite, not {alpha}")
    log_power = np.log(uniform(indices, "radius", *key)) / alpha
    cosine = np.cos(2 * np.pi * uniform(indices, "angle", *key))
    power = np.exp(log_power)  # U^(1/alpha)
    spread = -np.expm1(log_power) * cosine**2
    root = np.sqrt(spread / (power + spread))
    tail = power / (power + spread) / (2 * (1 + root))  # (1 - root) / 2 without cancellation
    return np.where(cosine < 0, tail, 1 - tail)


def _feistel(indices: _Words, n: int, words: _Words, tweak: _Words | None) -> _Words:
    a = math.isqrt(n - 1) + 1
    a += a % 2
    bases = (np.uint64(a), np.uint64(-(-n // a)))
    right = indices // bases[0]
    digits = [indices - right * bases[0], right]
    for step in range(len(words)):
        base, changed = bases[step % 2], step % 2
        word = digits[1 - changed] + words[step]
        if tweak is not None:
            word += tweak
        shift = ((_mix(word) >> np.uint64(32)) * base) >> np.uint64(32)  # below base
        moved = digits[changed] + shift
        # modulo base: where moved < base, moved - base wraps to a huge number
        digits[changed] = np.minimum(moved, moved - base)
    return digits[1] * bases[0] + digits[0]


def _mix(words: _Words) -> _Words:
    """Returns a hash of every 64-bit word, one to one (the finaliser of SplitMix64; Steele, Lea,
    Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _words_of(key: tuple[int | str, ...], count: int) -> _Words:
    # a NumPy integer prints differently
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in key)
    return np.frombuffer(
        hashlib.shake_128(repr(plain).encode()).digest(8 * count), dtype="<u8"
    ).astype(np.uint64)
