#include <nearfar/additive.hpp>
#include <nearfar/banded.hpp>
#include <nearfar/fmm.hpp>
#include <nearfar/linear.hpp>
#include <nearfar/multipole.hpp>
#include <nearfar/softmax.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <utility>

// What a stream holds of the tokens it has seen, however many they are, and what it refuses. That its rows are those
// of forward is tested for all mechanisms at once, in properties_streams_test.cpp.

namespace nearfar::test {
namespace {

static_assert(StreamingAttention<Softmax<float>> && StreamingAttention<Banded<double>>);
static_assert(StreamingAttention<Fmm<float>> && StreamingAttention<Multipole<double>>);

constexpr Heads heads{.query = 2, .key_value = 1, .dim = 4};

template <class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

/// Extends a stream by the tokens of a sample, `count` at a time, and calls after_each() after each call.
template <class A, class AfterEach>
void extend_by(const A& attention, typename A::State& state, const Sample<float>& sample, Index count,
               AfterEach&& after_each) {
  Matrix<float> out(count, heads.out_cols());
  for (Index i = 0; i + count <= sample.query.rows(); i += count) {
    attention.extend(
        state, {sample.query.middleRows(i, count), sample.key.middleRows(i, count), sample.value.middleRows(i, count)},
        out);
    after_each();
  }
}

TEST(Streams, OfSoftmaxMakeRoomByDoubling) {
  const Softmax<float> attention(heads, {.causal = true});
  auto state = attention.start();
  Index moves = 0;
  const float* stands = state.key.data();
  extend_by(attention, state, random_sample<float>(heads, 2000, 1), 1, [&] {
    moves += state.key.data() != stands;
    stands = state.key.data();
  });
  EXPECT_EQ(state.count, 2000);
  EXPECT_LE(state.room(), 2 * 2000 + 1);
  EXPECT_LE(moves, 11);
}

TEST(Streams, OfSoftmaxStayWhereRoomWasMade) {
  const Softmax<float> attention(heads, {.causal = true});
  auto state = attention.start(500);
  const float* const stands = state.key.data();
  extend_by(attention, state, random_sample<float>(heads, 500, 2), 5, [] {});
  EXPECT_EQ(state.key.data(), stands);
  EXPECT_EQ(state.room(), 500);
}

TEST(Streams, OfBandedHoldAWindowAndStayWhereTheyAre) {
  const Banded<float> attention(heads, {.window = {20, 0}, .causal = true});
  for (const Index count : {1, 7, 200}) {
    auto state = attention.start();
    const auto sample = random_sample<float>(heads, 1000, 3);
    extend_by(attention, state, sample, count, [&] { EXPECT_LE(state.room(), 3 * 20); });
    const float* const stands = state.key.data();
    extend_by(attention, state, sample, count, [&] { EXPECT_EQ(state.key.data(), stands); });
  }
  auto state = attention.start(1000000);
  EXPECT_LE(state.room(), 2 * 20 + 1);
  const Banded<float> to_itself(heads, {.window = {0, 0}});
  state = to_itself.start();
  extend_by(to_itself, state, random_sample<float>(heads, 100, 4), 1, [&] { EXPECT_EQ(state.room(), 0); });
}

// Plainly added to the sum of all before, each token would lose a bit more than the one before it.
TEST(Streams, OfLinearLoseNothingOfTokensThatComeOneByOne) {
  const Linear<float> attention(heads, {.causal = true});
  const Linear<double> exact(heads, {.causal = true});
  auto state = attention.start();
  auto exact_state = exact.start();
  const auto sample = random_sample<float>(heads, 500, 9);
  const auto exact_sample = cast<double>(sample);
  Matrix<float> out(1, heads.out_cols());
  Matrix<double> exact_out(500, heads.out_cols());
  for (int round = 0; round < 200; ++round) {
    exact.extend(exact_state, exact_sample.inputs(), exact_out);
    for (Index i = 0; i < 500; ++i) {
      attention.extend(
          state, {sample.query.middleRows(i, 1), sample.key.middleRows(i, 1), sample.value.middleRows(i, 1)}, out);
    }
  }
  EXPECT_LE((out.cast<double>() - exact_out.bottomRows(1)).cwiseAbs().maxCoeff(),
            5e-7 * exact_out.bottomRows(1).cwiseAbs().maxCoeff());
}

TEST(Streams, OfFmmHoldWhatItsPartsHold) {
  const Fmm<float> attention(heads, {.window = {20, 0}, .causal = true});
  auto state = attention.start();
  const std::size_t sums = state.far.sums.size();
  extend_by(attention, state, random_sample<float>(heads, 1000, 5), 10, [&] {
    EXPECT_LE(state.near.room(), 3 * 20);
    EXPECT_EQ(state.far.sums.size(), sums);
  });
}

TEST(Streams, OfMultipoleHoldTwoBlocksAndFewGroupsALevel) {
  const Index block = 8, rank = 2, n = 4096;
  for (const Pooling pooling : {Pooling::average, Pooling::hierarchical_convolution}) {
    const Multipole<float> attention(heads,
                                     {.block = block, .rank = rank, .causal = true, .pooling = pooling, .levels = 10});
    for (const Index count : {1, 64, 2048}) {
      auto state = attention.start();
      extend_by(attention, state, random_sample<float>(heads, n, 6), count, [&] {
        EXPECT_LE(state.near.room(), 6 * block);
        EXPECT_LE(state.key.rows(), 10 * 4 * rank);
      });
      EXPECT_EQ(state.tokens, n);
    }
  }
}

TEST(Streams, AreRefusedWhereAQueryMaySeeLaterKeys) {
  EXPECT_EQ(error_of([] { Softmax<float>(heads).start(); }),
            "nearfar::Softmax: a stream needs causal attention, but causal is false.");
  EXPECT_EQ(error_of([] {
              Banded<float>(heads, {.window = {4, 5}}).start();
            }),
            "nearfar::Banded: a stream needs causal attention or window.right 0, but causal is false and window.right "
            "is 5.");
  EXPECT_EQ(error_of([] { Banded<float>(heads, {.window = {4, 0}}).start(); }), "no error");
  EXPECT_EQ(error_of([] {
              Fmm<float>(heads, {.window = {4, 0}}).start();
            }),
            "nearfar::Fmm: a stream needs causal attention, but causal is false.");
  EXPECT_EQ(error_of([] { Fmm<float>(heads, {.causal = true, .normalizer = Normalizer::sqrt_length}).start(); }),
            "nearfar::Fmm: a stream needs normalizer row_sum, but normalizer is sqrt_length.");
  EXPECT_EQ(error_of([] { Multipole<float>(heads).start(); }),
            "nearfar::Multipole: a stream needs causal attention, but causal is false.");
}

/// What an attention that has no streams says of tokens for one that has the state of `causal`.
template <class A>
std::string error_of_extending(const A& attention, const A& causal) {
  auto state = causal.start();
  const auto sample = random_sample<float>(heads, 3, 9);
  Matrix<float> out(3, heads.out_cols());
  return error_of([&] { attention.extend(state, sample.inputs(), out); });
}

TEST(Streams, AreNotExtendedByWhatHasNone) {
  const auto without_causality = [](const std::string& name) {
    return "nearfar::" + name + ": a stream needs causal attention, but causal is false.";
  };
  EXPECT_EQ(error_of_extending(Softmax<float>(heads), Softmax<float>(heads, {.causal = true})),
            without_causality("Softmax"));
  EXPECT_EQ(error_of_extending(Linear<float>(heads), Linear<float>(heads, {.causal = true})),
            without_causality("Linear"));
  EXPECT_EQ(error_of_extending(Fmm<float>(heads), Fmm<float>(heads, {.causal = true})), without_causality("Fmm"));
  EXPECT_EQ(error_of_extending(Additive<float>(heads), Additive<float>(heads, {.causal = true})),
            without_causality("Additive"));
  EXPECT_EQ(error_of_extending(Multipole<float>(heads), Multipole<float>(heads, {.causal = true})),
            without_causality("Multipole"));
  EXPECT_EQ(error_of_extending(Banded<float>(heads, {.window = {4, 5}}), Banded<float>(heads, {.window = {4, 0}})),
            "nearfar::Banded: a stream needs causal attention or window.right 0, but causal is false and window.right "
            "is 5.");
}

TEST(Streams, OfSoftmaxGoOnFromWhereTheyAreRewoundTo) {
  const Softmax<float> attention(heads, {.causal = true});
  const auto sample = random_sample<float>(heads, 300, 11);
  Matrix<float> whole(300, heads.out_cols()), out = whole;
  attention.forward(sample.inputs(), whole);
  auto state = attention.start();
  attention.extend(state, random_sample<float>(heads, 200, 12).inputs(), out.topRows(200));
  attention.rewind(state, 0);
  Index next = 0;
  for (const auto& [count, back] : {std::pair<Index, Index>{250, 100}, {1, 0}, {99, 40}, {90, 90}, {90, 0}}) {
    attention.extend(state,
                     {sample.query.middleRows(next, count), sample.key.middleRows(next, count),
                      sample.value.middleRows(next, count)},
                     out.middleRows(next, count));
    next += count - back;
    attention.rewind(state, next);
    EXPECT_EQ(state.tokens, next);
  }
  EXPECT_EQ(next, 300);
  EXPECT_TRUE(close(out, whole, 2e-6));
}

TEST(Streams, OfAWindowAreRewoundAsFarAsTheyHoldKeys) {
  const Banded<float> attention(heads, {.window = {5, 0}});
  const auto sample = random_sample<float>(heads, 60, 13);
  Matrix<float> whole(60, heads.out_cols()), out = whole;
  attention.forward(sample.inputs(), whole);
  auto state = attention.start();
  Index rewound = 0;
  for (Index i = 0; i < 60; ++i) {
    const auto extend = [&](const Sample<float>& from, Index at) {
      attention.extend(state, {from.query.middleRows(at, 1), from.key.middleRows(at, 1), from.value.middleRows(at, 1)},
                       out.middleRows(i, 1));
    };
    extend(sample, 59 - i);
    const Index held = state.tokens - state.count;
    if (held <= std::max<Index>(i - 5, 0)) {
      attention.rewind(state, i);
      extend(sample, i);
      ++rewound;
    } else {
      EXPECT_EQ(error_of([&] { attention.rewind(state, i); }),
                "nearfar::Banded: rewound to " + std::to_string(i) + " tokens a stream needs its keys from " +
                    std::to_string(i - 5) + " on, but holds them from " + std::to_string(held) +
                    " on: keep a copy of the state.");
      return;
    }
    EXPECT_TRUE(close(out.row(i), whole.row(i), 2e-6)) << i;
  }
  EXPECT_EQ(rewound, 60);
}

TEST(Streams, RefuseBadArgumentsInPlainSentences) {
  const Softmax<float> softmax(heads, {.causal = true});
  const Fmm<float> fmm(heads, {.causal = true});
  EXPECT_EQ(error_of([&] { softmax.start(-1); }), "nearfar::Softmax: room must be 0 or more, but is -1.");
  EXPECT_EQ(error_of([&] { fmm.start(-1); }), "nearfar::Fmm: room must be 0 or more, but is -1.");
  EXPECT_EQ(error_of([] { Multipole<float>(heads, {.causal = true}).start(-2); }),
            "nearfar::Multipole: room must be 0 or more, but is -2.");

  const auto sample = random_sample<float>(heads, 10, 7);
  Matrix<float> out(10, heads.out_cols());
  Softmax<float>::State nothing;
  EXPECT_EQ(
      error_of([&] { softmax.extend(nothing, sample.inputs(), out); }),
      "nearfar::Softmax: this state holds keys and values of 0 and 0 columns, but its heads need 4 and 4: take it "
      "from start().");
  auto state = fmm.start();
  state.far.sums.pop_back();
  EXPECT_TRUE(error_of([&] {
                fmm.extend(state, sample.inputs(), out);
              }).starts_with("nearfar::Fmm: this state holds " + std::to_string(state.far.sums.size()) + " sums"));
  const Additive<float> additive(heads, {.causal = true});
  Additive<float>::State no_pools;
  EXPECT_TRUE(error_of([&] {
                additive.extend(no_pools, sample.inputs(), out);
              }).starts_with("nearfar::Additive: this state holds 0 numbers, but its heads need "));
  // As many numbers, of other heads.
  const Heads wide{.query = 2, .key_value = 2, .dim = 4}, many{.query = 4, .key_value = 2, .dim = 4};
  const auto of_many = random_sample<float>(many, 3, 14);
  Matrix<float> out_of_many(3, many.out_cols());
  auto of_wide = Linear<float>(wide, {.causal = true}).start();
  EXPECT_EQ(
      error_of([&] { Linear<float>(many, {.causal = true}).extend(of_wide, of_many.inputs(), out_of_many); }),
      "nearfar::Linear: this state is of 2 query and 2 key/value heads of 4 and 4 features, but these are 4 and 2 "
      "of 4 and 4: take it from start().");
  auto of_narrow = Additive<float>({.query = 8, .key_value = 2, .dim = 2}, {.causal = true}).start();
  const Additive<float> additive_of_many(many, {.causal = true});
  EXPECT_TRUE(error_of([&] {
                additive_of_many.extend(of_narrow, of_many.inputs(), out_of_many);
              }).starts_with("nearfar::Additive: this state "));
  EXPECT_EQ(error_of([&] {
              auto rewound = softmax.start();
              softmax.rewind(rewound, 1);
            }),
            "nearfar::Softmax: a stream of 0 tokens cannot be rewound to 1.");
  const Multipole<float> multipole(heads, {.block = 4, .rank = 2, .causal = true});
  auto of_other_rank = Multipole<float>(heads, {.block = 4, .rank = 1, .causal = true}).start();
  of_other_rank.tokens = 10;
  EXPECT_EQ(
      error_of([&] { multipole.extend(of_other_rank, sample.inputs(), out); }),
      "nearfar::Multipole: this state holds 0 near tokens and 0 pooled rows, but its options need 6 and 8: take it "
      "from start().");
  // States of the same shapes.
  auto of_other_block = Multipole<float>(heads, {.block = 2, .rank = 2, .causal = true}).start();
  EXPECT_EQ(error_of([&] { multipole.extend(of_other_block, sample.inputs(), out); }),
            "nearfar::Multipole: this state is of queries that see 4 tokens before their own, but here they see 8: "
            "take it from start().");
  auto of_other_window = Banded<float>(heads, {.window = {3, 0}}).start();
  EXPECT_EQ(error_of([&] {
              Banded<float>(heads, {.window = {9, 0}}).extend(of_other_window, sample.inputs(), out);
            }),
            "nearfar::Banded: this state is of queries that see 3 tokens before their own, but here they see 9: take "
            "it from start().");
  // What has moved to another state leaves its count behind.
  auto busy = softmax.start();
  auto idle = softmax.start();
  softmax.extend(busy, sample.inputs(), out);
  idle = std::move(busy);
  EXPECT_EQ(error_of([&] { softmax.extend(busy, sample.inputs(), out); }),
            "nearfar::Softmax: this state holds 10 tokens, but has room for 0: take it from start().");
  auto good = softmax.start();
  auto inputs = sample.inputs();
  const std::vector<Index> offsets{0, 4, 10};
  inputs.query_offsets = offsets;
  EXPECT_EQ(error_of([&] { softmax.extend(good, inputs, out); }),
            "nearfar::Softmax: a stream is one sequence, but query_offsets has 3 numbers.");
}

TEST(Streams, OfLearnedPoolingEndWhereItsLevelsEnd) {
  const Multipole<float> attention(
      heads, {.block = 4, .rank = 2, .causal = true, .pooling = Pooling::grouped_convolution, .levels = 1});
  const auto sample = random_sample<float>(heads, 17, 8);
  Matrix<float> out = Matrix<float>::Zero(17, heads.out_cols());
  auto state = attention.start();
  extend_by(attention, state, sample, 4, [] {});
  EXPECT_EQ(state.tokens, 16);
  EXPECT_EQ(error_of([&] {
              attention.extend(state,
                               {sample.query.bottomRows(1), sample.key.bottomRows(1), sample.value.bottomRows(1)},
                               out.bottomRows(1));
            }),
            "nearfar::Multipole: a sequence of 17 tokens needs pooling parameters for 2 levels, but options.levels is "
            "1.");
  EXPECT_TRUE(out.isZero());
}

}  // namespace
}  // namespace nearfar::test
