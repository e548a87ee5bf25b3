"""Each method's formula once more, from its paper, pair by pair, in plain Python and without the library's code.

`R` rotary width, `b` base, `L` trained length, `s` factor. Each returns (frequencies, attention factor).
"""

import math


def theta(i, R, b):
    return b ** (-2 * i / R)


def pairs(R):
    return range(R // 2)


def linear(R, b, L, s):
    return [theta(i, R, b) / s for i in pairs(R)], 1.0


def ntk(R, b, L, s):
    new_base = b * s ** (R / (R - 2))
    return [theta(i, R, new_base) for i in pairs(R)], 1.0


def ntk_mixed(R, b, L, s, exponent=0.75):
    e = exponent
    a = math.log(s) / (R / 2) ** e
    return [theta(i, R, b) * math.exp(-a * (i + 1) ** e) for i in pairs(R)], 1.0


def pair_with_turns(turns, R, b, L):
    # theta_i L / 2 pi = turns, solved for i.
    return R / 2 * math.log(L / (2 * math.pi * turns)) / math.log(b)


def ramp(i, fast, slow, R, b, L, truncate=True):
    low, high = pair_with_turns(fast, R, b, L), pair_with_turns(slow, R, b, L)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    if low == high:
        high += 0.001
    return min(max((i - low) / (high - low), 0.0), 1.0)


def ntk_by_parts(R, b, L, s, ntk_factor=1.0, extrapolation_factor=1.0):
    slowed, ntk_set = linear(R, b, L, s)[0], ntk(R, b, L, s)[0]
    result = []
    for i in pairs(R):
        m1 = (1 - ramp(i, 1.25, 0.75, R, b, L)) * ntk_factor
        x = slowed[i] * (1 - m1) + ntk_set[i] * m1
        m2 = (1 - ramp(i, 16, 2, R, b, L)) * extrapolation_factor
        result.append(x * (1 - m2) + theta(i, R, b) * m2)
    return result, 1.0


def yarn(
    R,
    b,
    L,
    s,
    beta_fast=32,
    beta_slow=1,
    truncate=True,
    revised=False,
    attention_factor=None,
    mscale=None,
    mscale_all_dim=None,
):
    result = []
    for i in pairs(R):
        r = ramp(i, beta_fast, beta_slow, R, b, L, truncate)
        t = theta(i, R, b)
        result.append(t / (1 - r + s * r) if revised else (1 - r) * t + r * t / s)
    gain = lambda m: 0.1 * m * math.log(s) + 1 if s > 1 else 1.0  # noqa: E731
    if attention_factor is None:
        attention_factor = gain(mscale) / gain(mscale_all_dim) if mscale and mscale_all_dim else gain(1)
    return result, attention_factor


def _mrrope(R, b, L, s, exponent):
    turns = [L * theta(i, R, b) / (2 * math.pi) for i in pairs(R)]
    low = max([i for i in pairs(R) if turns[i] > 32], default=-1)
    high = min([i for i in pairs(R) if turns[i] < 1], default=R // 2)
    n = max(high - low, 1)
    steps = [min(max(i - low, 0), n) for i in pairs(R)]
    return [theta(i, R, b) / s ** exponent(steps[i], n) for i in pairs(R)], 0.1 * math.log(s) + 1 if s > 1 else 1.0


def mrrope_uni(R, b, L, s):
    return _mrrope(R, b, L, s, lambda t, n: t / n)


def mrrope_pro(R, b, L, s):
    return _mrrope(R, b, L, s, lambda t, n: t * (t + 1) / (n * (n + 1)))


def llama3(R, b, L, s, low_freq_factor=1, high_freq_factor=4):
    result = []
    for i in pairs(R):
        t = theta(i, R, b)
        wavelength = 2 * math.pi / t
        if wavelength < L / high_freq_factor:
            result.append(t)
        elif wavelength > L / low_freq_factor:
            result.append(t / s)
        else:  # not reached if the two are equal
            smooth = (L / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            result.append((1 - smooth) * t / s + smooth * t)
    return result, 1.0


def longrope(R, b, L, s, long_factor=None, short_factor=None):
    factors = long_factor if s > 1 else short_factor or [1.0] * (R // 2)
    return [theta(i, R, b) / factors[i] for i in pairs(R)], math.sqrt(1 + math.log(s) / math.log(L))


def abf(R, b, L, s=None, rope_theta=None):
    # Critical base: b ** (log of the new length to base (old length / 2 pi)), lengths over 2 pi.
    new_base = rope_theta or b ** math.log(s * L / (2 * math.pi), L / (2 * math.pi))
    return [theta(i, R, new_base) for i in pairs(R)], 1.0


def power(R, b, L, s=None, exponent=None):
    k = exponent if exponent is not None else math.log(s) / math.log(R / 2)
    return [theta(i, R, b) * (1 - i / (R / 2)) ** k for i in pairs(R)], 1.0


def truncated(R, b, L, cutoff_length=None):
    T = cutoff_length or L
    c = 2 * math.pi / T
    result = []
    for i in pairs(R):
        t = theta(i, R, b)
        result.append(t if t >= c else 0.0 if t < c / 8 else 2 * math.pi / (16 * T))
    return result, 1.0


def resonance(R, b, L, s):
    inner, factor = yarn(R, b, L, s)
    # Python's round is half to even, as torch's.
    return [2 * math.pi / round(2 * math.pi / t) for t in inner], factor


def clipped_frequency(R, b, L, num_pairs=None, soft=True):
    n = num_pairs if num_pairs is not None else sum(2 * math.pi / theta(i, R, b) > L for i in pairs(R))
    result = [theta(i, R, b) for i in pairs(R)]
    for k in range(n):
        i = R // 2 - n + k
        t = k / (n - 1) if n > 1 else 1.0
        result[i] *= 0.5 * (1 + math.cos(math.pi * t)) if soft else 0.0
    return result, 1.0


def p_rope(R, b, L, partial_rotary_factor=0.75):
    k = math.floor(partial_rotary_factor * R / 2)
    return [theta(i, R, b) if i < k else 0.0 for i in pairs(R)], 1.0


def drope(R, b, L, attention_factor=1.0):
    return [0.0 for _ in pairs(R)], attention_factor
