"""One line a method: what the shared tests call it with. A new method earns the whole suite by a line here."""

from references import formulas


LONG_FACTORS = [1.0 + 0.25 * i for i in range(64)]


def long_factors(num_pairs):
    """Factors that rise with the pair, one a pair."""
    return LONG_FACTORS[:num_pairs]


# method: (arguments apart from the factor, whether it takes a factor)
METHOD_CASES = {
    "linear": ({}, True),
    "ntk": ({}, True),
    "ntk_mixed": ({}, True),
    "ntk_by_parts": ({}, True),
    "yarn": ({}, True),
    "mrrope_uni": ({}, True),
    "mrrope_pro": ({}, True),
    "llama3": ({}, True),
    "longrope": ({"long_factor": long_factors}, True),
    "abf": ({}, True),
    "power": ({}, True),
    "truncated": ({}, False),
    "resonance": ({"wrapped": "yarn"}, True),
    "clipped_frequency": ({}, False),
    "p_rope": ({}, False),
    "drope": ({}, False),
}

# Further settings of a method, for its formula alone.
FORMULA_VARIANTS = [
    ("ntk_mixed", {"factor": 12.0, "exponent": 0.625}),
    ("ntk_by_parts", {"factor": 4.0, "ntk_factor": 0.5, "extrapolation_factor": 0.25}),
    ("yarn", {"factor": 4.0, "beta_fast": 128.0, "beta_slow": 2.0}),
    ("yarn", {"factor": 4.0, "truncate": False}),
    ("yarn", {"factor": 16.0, "revised": True}),
    ("yarn", {"factor": 4.0, "attention_factor": 1.0}),
    ("yarn", {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}),
    ("llama3", {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0}),
    ("llama3", {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}),
    ("abf", {"rope_theta": 5e5}),
    ("power", {"exponent": 0.1}),
    ("truncated", {"cutoff_length": 1024}),
    ("clipped_frequency", {"soft": False}),
    ("clipped_frequency", {"num_pairs": 1}),
    ("p_rope", {"partial_rotary_factor": 0.3}),
    ("drope", {"attention_factor": 1.1}),
]

# Rotary width, base, trained length: usual models, a small head, and a trained length at which YaRN's upper end is
# clamped.
GEOMETRIES = {
    "llama2": (128, 1e4, 4096),
    "llama3": (128, 5e5, 8192),
    "smollm2": (64, 1e5, 8192),
    "demo": (64, 1e4, 256),
    "phi-2": (32, 1e4, 2048),
    "clamped": (16, 1e4, 262144),
    "short": (64, 1e4, 64),
}


def reference(name, geometry, arguments):
    """Frequencies and attention factor by the plain formula."""
    arguments = {key: value for key, value in arguments.items() if key != "wrapped"}
    if "factor" in arguments:
        arguments["s"] = arguments.pop("factor")
    return getattr(formulas, name)(*geometry, **arguments)


def arguments_of(name, num_pairs, factor=4.0):
    """What to call `make_method` or `patch` with."""
    given, takes_factor = METHOD_CASES[name]
    arguments = {key: value(num_pairs) if callable(value) else value for key, value in given.items()}
    return arguments | ({"factor": factor} if takes_factor else {})
