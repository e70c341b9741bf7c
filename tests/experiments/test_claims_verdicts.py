"""Every verdict on made-up data: each can come out in more than one way."""

import json

import pytest

from experiments.claims.catalogue import claims

HOLDS, ONLY_IF, FAILS, OPEN = (
    "holds",
    "holds only if",
    "does not hold",
    "cannot be decided here",
)


def around(center, spread=0.01, count=8):
    """Values whose mean is the centre."""
    return [center + spread * (2 * n / (count - 1) - 1) for n in range(count)]


def of_39(drawn, trained):
    return {"depths": [4, 16], "drawn": [around(1.0), around(drawn)], "trained": around(trained)}


def of_40(entropy, trace, scaled=0.9):
    return {
        "depths": [4, 1024],
        "found": {
            "entropy / log n, dot": [around(0.9), around(entropy)],
            "trace of Jacobian, dot": [around(0.9), around(trace)],
            "entropy / log n, scaled_dot": [around(0.9), around(scaled)],
            "trace of Jacobian, scaled_dot": [around(0.9), around(scaled)],
        },
    }


def of_42(moved, additive=1.0):
    entropy = {"additive": [[0.9], around(additive, 1e-4)], "scaled dot": [[0.9], [0.0]]}
    return {"sizes": [1, 1000], "entropy": entropy, "moved": around(moved, 0.001)}


def of_43(odd, distance):
    found = {"odd_without_bias": odd, "odd_with_bias": 0.6, "even_dot": 0.0}
    return {**found, "gains": [1.0], "distance": [distance]}


def of_44(breach):
    names = ("dot", "scaled_dot", "bilinear", "low_rank_bilinear")
    return {"breach": dict.fromkeys(names, breach) | {"normalized_additive": 1.0, "cosine": 1.0}}


def of_46(variance):
    names = ("cosine, times d", "entropy", "entropy, temperature 1/sqrt(d)")
    return {"depths": [4], "unit keys": [around(variance)], **{n: [around(1)] for n in names}}


def of_47(cosine, same):
    return {
        "spreads": [0.0, 1.0],
        "correlation with cosine": [around(1.0, 0.001), around(cosine)],
        "|dot| with length of key": [around(0.0), around(0.7)],
        "same largest key": [around(1.0), around(same)],
    }


def of_48(logit, before, behind):
    return {
        "gains": [1.0, 64.0],
        "largest logit": [around(4), around(9000)],
        "largest logit, norm": [around(4), around(logit)],
        "tanh, norm": [around(0.1), around(before)],
        "tanh, gain behind the norm": [around(0.1), around(behind)],
    }


def of_49(share):
    asymmetry = {"logits": 0.0, "weights": 0.9}
    return {"share": {"a": around(1.0), "b": share}, "separate": [0.1], "asymmetry": asymmetry}


def of_54(plain, scaled):
    variance = {"dot": [around(256), around(plain)], "scaled_dot": [around(1), around(scaled)]}
    return {"heads": [1, 64], "variance": variance}


def of_58(bound, right, random):
    spectra = {"bound": [[bound], [bound]], "right": [around(right), around(0.9)]}
    data = {"ranks": [8, 32], "saved": [0.5, -1.0]}
    return data | {
        "trained": {**spectra, "error": [[0.1], [0.0]]},
        "random": {**spectra, "error": [around(random), [0.0]]},
    }


def of_59(parameters):
    names = ("additive, textbook", "dot, dense", "additive, tiled", "dot, tiled")
    held = dict(zip(names, (101.0, 1.0, 1.0, 1.0), strict=True))
    return {"length": 9, "parameters": parameters, "temporaries": held}


def of_60(future, finite=True):
    return {"cases": {"a": {"future": future, "past": 0.1, "finite": finite, "size": [[1.0]]}}}


def of_63(none, rotary, alibi):
    ratio = {"none": around(none, 0.05), "rotary": around(rotary), "alibi": around(alibi)}
    return {"from": [1], "weights": {}, "ratio": ratio}


def of_64(exponent, spread=0.0):
    lengths = [1024, 2048, 4096]
    claimed = {"full": 2, "full, dense": 2, "cross": 1, "window": 1, "linear": 1}
    return {
        name: {
            "lengths": lengths,
            "milliseconds": [
                [n ** (of + (exponent if name == "window" else 0) + s) for s in around(0, spread)]
                for n in lengths
            ],
            "mebibytes": lengths,
        }
        for name, of in claimed.items()
    }


def of_65(window_2, dilated):
    reached = {"window 2": [0.1] * (window_2 - 1) + [1.0], "window 4": [0.1] * 15 + [1.0]}
    reached |= {"window 8": [0.1] * 7 + [1.0]}
    return {"reached": reached | {f"window 2, dilation {d}": [0.1, dilated] for d in (2, 4)}}


def of_66(recurrence):
    attention = [[0.1], [0.1], [1.0], [10.0]]
    lengths = [16, 64, 256, 1024]
    return {"lengths": lengths, "attention": attention, "recurrence": [[r] for r in recurrence]}


def of_68(neither, causal):
    breach = {"neither": around(neither, 0), "causal mask": around(causal), "sinusoids": [0.2]}
    return {"breach": breach}


def of_70(plain, stable, error=1.0):
    one = {"plain": [plain], "stable": [stable], "error": [error]}
    return {"sizes": [1.0], **dict.fromkeys(("float16", "bfloat16", "float32"), one)}


def of_75(first, second):
    shared = {"scale": 1.0, "size": None, "baseline": 0.7, "measured": 1.0, "theory": 1.0}
    rows = [{**shared, "name": name, "context": x} for name, x in (("a", first), ("b", second))]
    return {"rows": rows}


CASES = [
    (39, of_39(1.0, 1.0), HOLDS),
    (39, of_39(1.0, 3.0), ONLY_IF),
    (39, of_39(2.0, 3.0), FAILS),
    (40, of_40(0.1, 0.1), HOLDS),
    (40, of_40(0.8, 0.1), FAILS),
    (40, of_40(0.1, 0.8), FAILS),
    (40, of_40(0.1, 0.1, scaled=0.3), OPEN),
    (41, {"share": [[0.5, 1.0]], "growth": around(1.0)}, HOLDS),
    (41, {"share": [[0.5, 1.0]], "growth": around(3.0)}, ONLY_IF),
    (41, {"share": [[0.5, 1.1]], "growth": around(3.0)}, FAILS),
    (42, of_42(0.01), HOLDS),
    (42, of_42(0.3), FAILS),
    (43, of_43(0.0, 0.5), HOLDS),
    (43, of_43(0.0, 0.001), ONLY_IF),
    (43, of_43(0.1, 0.001), FAILS),
    (44, of_44(1e-7), HOLDS),
    (44, of_44(0.1), FAILS),
    (45, {"distance": 0.0, "mixed": {"1": 0.0, "2": 0.0}}, HOLDS),
    (45, {"distance": 0.0, "mixed": {"1": 0.0, "2": 0.3}}, ONLY_IF),
    (45, {"distance": 0.1, "mixed": {"1": 0.0, "2": 0.3}}, FAILS),
    (46, of_46(1.0), HOLDS),
    (46, of_46(4.0), FAILS),
    (47, of_47(0.99, 1.0), HOLDS),
    (47, of_47(0.5, 0.2), ONLY_IF),
    (47, of_47(0.5, 1.0), FAILS),
    (48, of_48(4.0, 0.1, 0.1), HOLDS),
    (48, of_48(4.0, 0.1, 0.9), ONLY_IF),
    (48, of_48(9.0, 0.1, 0.1), FAILS),
    (49, of_49(around(0.99)), HOLDS),
    (49, of_49(around(0.2)), FAILS),
    (49, of_49(around(0.95, 0.04)), OPEN),
    (53, {"heads": [1, 2], "depth 256/h": [1, 2], "depth 64": [1, 2]}, HOLDS),
    (53, {"heads": [1, 2], "depth 256/h": [1, 1], "depth 64": [1, 2]}, ONLY_IF),
    (53, {"heads": [1, 2], "depth 256/h": [1, 1], "depth 64": [1, 1]}, FAILS),
    (54, of_54(4.0, 0.1), HOLDS),
    (54, of_54(4.0, 1.0), ONLY_IF),
    (54, of_54(256.0, 1.0), FAILS),
    (58, of_58(0.9, 0.9, 0.1), HOLDS),
    (58, of_58(0.9, 0.9, 0.7), ONLY_IF),
    (58, of_58(0.9, 0.5, 0.7), FAILS),
    (58, of_58(1.1, 0.9, 0.7), FAILS),
    (59, of_59(90.0), HOLDS),
    (59, of_59(1.0), FAILS),
    (59, of_59(30.0), OPEN),
    (60, of_60(0.0), HOLDS),
    (60, of_60(1e-30), FAILS),
    (60, of_60(0.0, finite=False), FAILS),
    (61, {"a": {"filled": True, "attend": True}}, HOLDS),
    (61, {"a": {"filled": False, "attend": True}}, FAILS),
    (63, of_63(1.0, 1.0, 1.0), HOLDS),
    (63, of_63(1.0, 0.5, 0.1), ONLY_IF),
    (63, of_63(0.5, 0.5, 0.1), FAILS),
    (64, of_64(0.0), HOLDS),
    (64, of_64(1.0), FAILS),
    (64, of_64(0.5, spread=0.4), OPEN),
    (65, of_65(32, 1.0), HOLDS),
    (65, of_65(32, 0.5), ONLY_IF),
    (65, of_65(31, 1.0), FAILS),
    (66, of_66([0.2, 0.1, 0.1, 0.1]), HOLDS),
    (66, of_66([1.0, 1.0, 2.0, 5.0]), ONLY_IF),
    (66, of_66([0.01, 0.02, 0.03, 0.04]), ONLY_IF),
    (66, of_66([1.0, 2.0, 20.0, 50.0]), FAILS),
    (67, {"lengths": [8], "breach": [[1e-7]], "parameters": 9}, FAILS),
    (67, {"lengths": [8], "breach": [[0.5]], "parameters": 9}, HOLDS),
    (68, of_68(0.0, 0.0), HOLDS),
    (68, of_68(0.0, 0.5), ONLY_IF),
    (68, of_68(0.1, 0.5), FAILS),
    (70, of_70(0.5, 1.0), HOLDS),
    (70, of_70(1.0, 1.0), OPEN),
    (70, of_70(0.5, 0.9), FAILS),
    (70, of_70(0.5, 1.0, error=100.0), FAILS),
    (73, {"a": 1e-7, "b": 1e-6}, HOLDS),
    (73, {"a": 1e-7, "b": 1e-2}, FAILS),
    (75, of_75(0.3, 0.9), HOLDS),
    (75, of_75(0.3, 0.001), OPEN),
    (75, of_75(0.001, 0.001), FAILS),
]


@pytest.mark.parametrize(("number", "data", "outcome"), CASES)
def test_verdicts_follow_from_data(number, data, outcome):
    verdict = claims()[number].load().verdict(json.loads(json.dumps(data)))
    assert verdict.outcome == outcome, verdict
    assert verdict.because.endswith(".") and bool(verdict.condition) == (outcome == ONLY_IF)


def test_every_verdict_can_come_out_in_more_than_one_way():
    ways = {}
    for number, _, outcome in CASES:
        ways.setdefault(number, set()).add(outcome)
    assert set(ways) == set(claims())
    assert {number for number, outcomes in ways.items() if len(outcomes) < 2} == set()
