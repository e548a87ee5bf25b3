"""What every span method does, written down again from its paper, one pair of positions at a time.

Each function gives the relative angle of pair `i` of a query at `m` and a key at `n`, in radians; `None` if the query
does not see the key; and `nan` if this pair does not count there.
"""

import math


def theta(i, width, base):
    return base ** (-2 * i / width)


def sliding_window(m, n, i, t, L0, window, num_sinks=0):
    return (m - n) * t if m - n < window or n < num_sinks else None


def lm_infinite(m, n, i, t, L0, window, num_sinks):
    if m - n < window:
        return (m - n) * t
    return window * t if n < num_sinks else None


def streaming(m, n, i, t, L0, window, num_sinks):
    # What the cache holds, in order; a token's position is its place in it.
    kept = [j for j in range(m + 1) if j < num_sinks or m - j < window]
    return (len(kept) - 1 - kept.index(n)) * t if n in kept else None


def rerope(m, n, i, t, L0, window):
    return min(m - n, window) * t


def leaky_rerope(m, n, i, t, L0, window, slope):
    D = m - n
    return (D if window > D else window + (D - window) / slope) * t


def self_extend(m, n, i, t, L0, window, group_size):
    D = m - n
    return (D if window > D else m // group_size - n // group_size + window - window // group_size) * t


def dual_chunk(m, n, i, t, L0, chunk_size, local_size):
    size = chunk_size - local_size
    a, k = m % size, n % size
    back = m // size - n // size
    if back == 0:
        return (a - k) * t
    if back == 1:
        return (min(a + size, chunk_size) - k) * t
    return (min(2 * size - 1, chunk_size) - k) * t


def string(m, n, i, t, L0, shift, window):
    D = m - n
    return (D if shift > D else D - shift + window) * t


def angle_clip(m, n, i, t, L0, saturation_length=None, max_angle=None):
    D = m - n
    if max_angle is not None:
        return min(D * t, max_angle)
    slow = 2 * math.pi / t > saturation_length
    return min(D, saturation_length) * t if slow else D * t


def waveprune(m, n, i, t, L0, alpha=1.0):
    D = m - n
    return D * t if D * t <= 2 * math.pi * alpha else math.nan


def dynamic_linear(m, n, i, t, L0, steps):
    factor = next(step for step in steps if m + 1 <= round(L0 * step) or step == steps[-1])
    return (m - n) * t / factor


def dynamic_ntk(m, n, i, t, L0, steps, width, base):
    factor = next(step for step in steps if m + 1 <= round(L0 * step) or step == steps[-1])
    return (m - n) * theta(i, width, base * factor ** (width / (width - 2)))
