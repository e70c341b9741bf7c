"""Buckets hold every pair once with little padding; schedules are fair, shuffled and resumable."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import EOS, PAD, DataError, Pair, Sizes, Vocabulary, load
from experiments.data.batches import bucket, choose_widths, pad, schedule, sweep


@pytest.fixture(scope="module")
def corpus():
    return load("grammar", sizes=Sizes(train=3000, valid=100, test=100))


@pytest.fixture(scope="module")
def buckets(corpus):
    return make(corpus, corpus.train)


def make(corpus, pairs, batch_size=64, **options):
    return bucket(
        pairs, corpus.source_vocabulary, corpus.target_vocabulary, batch_size=batch_size, **options
    )


def test_every_pair_is_in_one_bucket_with_its_eos_and_padding(corpus, buckets):
    index = np.concatenate([b.index for b in buckets.members])
    assert sorted(index.tolist()) == list(range(len(corpus.train)))
    for members in buckets.members:
        assert members.source.dtype == members.target.dtype == members.index.dtype == np.int32
        for source, target, at in zip(*members, strict=True):
            pair = corpus.train[at]
            assert corpus.source_vocabulary.decode(source.tolist()) == pair.source
            assert corpus.target_vocabulary.decode(target.tolist()) == pair.target
            for row, length in ((source, len(pair.source)), (target, len(pair.target))):
                assert row[length] == EOS
                assert (row[length + 1 :] == PAD).all()


def test_pad():
    rows = pad([[5], [], [6, 7, 8]], 4)
    assert rows.tolist() == [[5, 2, 0, 0], [2, 0, 0, 0], [6, 7, 8, 2]]
    assert rows.dtype == np.int32


def test_buckets_raise_the_share_of_real_tokens(corpus):
    shares = [make(corpus, corpus.train, num_buckets=n).occupancy for n in (1, 2, 3, 4)]
    assert shares == sorted(shares)
    tokens = sum(len(pair.source) + len(pair.target) + 2 for pair in corpus.train)
    assert shares[0] == pytest.approx(tokens / (len(corpus.train) * 2 * 22))
    assert shares[0] < 0.6 and shares[2] > 0.8


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=30),
    st.integers(1, 3),
    st.integers(1, 8),
)
def test_widths_are_the_best_of_all_chains(lengths, count, minimum):
    """Against trying every chain of widths that holds all pairs."""
    lengths = np.array(lengths)

    def cost(widths):
        fits = (lengths[:, None, :] <= np.array(widths)[None, :, :]).all(axis=-1)
        members = np.bincount(fits.argmax(axis=1), minlength=len(widths))
        if len(widths) > 1 and members.min() < minimum:
            return np.inf
        return float((members * np.array(widths).sum(axis=1)).sum())

    widest = tuple(lengths.max(axis=0).tolist())
    candidates = list(itertools.product(range(1, widest[0] + 1), range(1, widest[1] + 1)))
    chains = (
        (*chain, widest)
        for size in range(count)
        for chain in itertools.combinations(candidates, size)
        if all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise((*chain, widest)))
    )
    best = min(map(cost, chains))
    chosen = choose_widths(lengths, count, minimum)
    assert len(chosen) <= count and chosen[-1] == widest
    assert cost(chosen) == best


def test_many_different_lengths_are_thinned_to_quantiles():
    lengths = np.random.default_rng(0).integers(1, 400, (2000, 2))
    widths = choose_widths(lengths, 3)
    assert len(widths) == 3 and widths[-1] == tuple(lengths.max(axis=0))


def test_no_bucket_is_smaller_than_a_batch(corpus):
    for batch_size in (1, 64, 700, 1600):
        assert min(make(corpus, corpus.train, batch_size).sizes) >= batch_size
    assert make(corpus, corpus.train, 10_000).widths == ((22, 22),)


def test_widths_are_shared_and_extended(corpus, buckets):
    valid = make(corpus, corpus.valid, widths=buckets.widths)
    assert set(valid.widths) <= set(buckets.widths)
    assert sum(valid.sizes) == len(corpus.valid)
    longer = make(corpus, corpus.valid + corpus.extra["long"], widths=buckets.widths)
    assert longer.widths[:-1] == buckets.widths
    assert longer.widths[-1] == (
        max(len(pair.source) for pair in corpus.extra["long"]) + 1,
        max(len(pair.target) for pair in corpus.extra["long"]) + 1,
    )
    assert sum(longer.sizes) == len(corpus.valid) + len(corpus.extra["long"])


def test_an_unknown_word_is_unk():
    vocabulary = Vocabulary(["a"])
    only = bucket([Pair(("a", "b"), ("c",))], vocabulary, vocabulary, batch_size=1)
    assert only.members[0].source.tolist() == [[4, 3, 2]]
    assert only.members[0].target.tolist() == [[3, 2]]
    assert only.occupancy == 1.0


def test_schedule_has_fixed_shapes_and_valid_rows(buckets):
    plan = schedule(buckets, 500, 64, seed=0, chunk=10)
    assert plan.bucket.shape == (50,) and plan.rows.shape == (50, 10, 64)
    assert plan.bucket.dtype == plan.rows.dtype == np.int32
    for number, rows in zip(plan.bucket, plan.rows, strict=True):
        assert rows.min() >= 0 and rows.max() < buckets.sizes[number]


@pytest.mark.parametrize("chunk", [1, 7, 25])
def test_every_pair_is_used_about_equally_often(buckets, chunk):
    steps = 700
    plan = schedule(buckets, steps, 64, seed=0, chunk=chunk)
    expected = steps * 64 / sum(buckets.sizes)
    for number, size in enumerate(buckets.sizes):
        rows = plan.rows[plan.bucket == number]
        uses = np.bincount(rows.reshape(-1), minlength=size)
        assert uses.max() - uses.min() <= 1
        # A bucket is at most one window of chunks before or behind its share.
        assert abs(uses.mean() - expected) <= 2 * chunk * 64 / size + 1


def test_rows_come_once_in_each_round(buckets):
    plan = schedule(buckets, 400, 64, seed=0, chunk=5)
    for number, size in enumerate(buckets.sizes):
        stream = plan.rows[plan.bucket == number].reshape(-1)
        rounds = [stream[start : start + size] for start in range(0, len(stream) - size, size)]
        assert len(rounds) >= 2
        assert all(len(np.unique(part)) == size for part in rounds)
        assert not np.array_equal(rounds[0], rounds[1])


@pytest.mark.parametrize("chunk", [1, 5, 25])
def test_a_shorter_schedule_begins_a_longer_one(buckets, chunk):
    long = schedule(buckets, 50 * chunk, 32, seed=3, chunk=chunk)
    for chunks in (1, 15, 16, 17, 49):
        short = schedule(buckets, chunks * chunk, 32, seed=3, chunk=chunk)
        assert np.array_equal(short.bucket, long.bucket[:chunks])
        assert np.array_equal(short.rows, long.rows[:chunks])


def test_seeds_share_the_order_of_buckets_but_not_of_rows(buckets):
    first, second = (schedule(buckets, 200, 64, seed=seed) for seed in (0, 1))
    assert np.array_equal(first.bucket, second.bucket)
    assert not np.array_equal(first.rows, second.rows)


def test_the_order_of_buckets_is_mixed_and_proportional(buckets):
    order = schedule(buckets, 1600, 64, seed=0, chunk=10).bucket
    shares = np.bincount(order) / len(order)
    assert np.allclose(shares, np.array(buckets.sizes) / sum(buckets.sizes), atol=1 / len(order))
    assert len({tuple(order[start : start + 16]) for start in range(0, 160, 16)}) > 5


def test_the_schedule_of_a_seed_is_pinned():
    """A resumed run depends on these numbers, whatever the version of numpy."""
    vocabulary = Vocabulary(["a"])
    pairs = [Pair(("a",) * n, ("a",) * n) for n in (1, 1, 1, 5, 5)]
    buckets = bucket(pairs, vocabulary, vocabulary, batch_size=2, num_buckets=2)
    plan = schedule(buckets, 6, 2, seed=0, chunk=1)
    assert plan.bucket.tolist() == [1, 0, 1, 1, 0, 0]
    assert plan.rows[:, 0].tolist() == [[1, 0], [2, 1], [1, 0], [1, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 5000])
def test_sweep_visits_every_row_once_in_full_batches(buckets, batch_size):
    seen = []
    for batch in sweep(buckets, batch_size):
        assert batch.rows.shape == batch.real.shape == (batch_size,)
        assert batch.rows.dtype == np.int32 and batch.real.dtype == bool
        assert batch.real.any() and batch.rows.max() < buckets.sizes[batch.bucket]
        seen += [(batch.bucket, row) for row in batch.rows[batch.real].tolist()]
    expected = [(n, row) for n, size in enumerate(buckets.sizes) for row in range(size)]
    assert seen == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 0, 0), DataError, "batch_size is 0, but at least 1 pair is needed."),
        (
            (10, 4000, 0),
            DataError,
            "batch_size is 4000, but there are only 3000 pairs to train on; set a smaller "
            "batch_size.",
        ),
        ((10, 64, -1), DataError, "seed is -1, but it must be 0 or greater."),
        (
            (11, 64, 0),
            ValueError,
            "schedule: expected steps to be a positive multiple of chunk, got steps=11 and "
            "chunk=5; round steps up.",
        ),
    ],
)
def test_schedules_that_cannot_be(buckets, arguments, error, message):
    with pytest.raises(error) as caught:
        schedule(buckets, *arguments, chunk=5)
    assert str(caught.value) == message


def test_nothing_to_batch(buckets):
    with pytest.raises(DataError, match=r"^There are no pairs to put into batches; give at least "):
        bucket([], Vocabulary([]), Vocabulary([]), batch_size=1)
    with pytest.raises(DataError, match=r"^batch_size is 0, but at least 1 pair is needed\.$"):
        next(sweep(buckets, 0))
