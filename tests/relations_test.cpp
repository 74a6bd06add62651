#include <nearfar/banded.hpp>
#include <nearfar/fmm.hpp>
#include <nearfar/multipole.hpp>
#include <nearfar/nystrom.hpp>
#include <nearfar/softmax.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

// Where one mechanism's options make it another.

namespace nearfar::test {
namespace {

const Heads heads{.query = 4, .key_value = 2, .dim = 7};

Sample<double> masked_sample(Index n) {
  auto sample = random_sample<double>(heads, n, 1);
  sample.key_mask = Random(2).mask(n, 0.2);
  return sample;
}

Matrix<double> softmax(const Sample<double>& sample, bool causal) {
  return run_forward(Softmax<double>(heads, {.causal = causal}), sample);
}

/// Rows whose heads have `to` features instead of `from`: the last ones left out, or zeros behind them.
template <class T>
Matrix<T> with_dim(const Matrix<T>& rows, Index from, Index to) {
  const Index count = rows.cols() / from, shared = std::min(from, to);
  Matrix<T> result = Matrix<T>::Zero(rows.rows(), count * to);
  for (Index h = 0; h < count; ++h) result.middleCols(h * to, shared) = rows.middleCols(h * from, shared);
  return result;
}

class Relations : public ::testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Both, Relations, ::testing::Bool(),
                         [](const auto& causal) { return causal.param ? "causal" : "bidirectional"; });

TEST_P(Relations, BandedIsSoftmaxWhereTheWindowHoldsTheSequence) {
  for (const Index n : {1, 2, 40, 131}) {
    const auto sample = masked_sample(n);
    for (const Index side : {n - 1, n, 5 * n, Window::unlimited}) {
      const Banded<double> banded(heads, {.window = {side, side}, .causal = GetParam()});
      EXPECT_TRUE(close(run_forward(banded, sample), softmax(sample, GetParam()), 1e-13)) << n << ", " << side;
    }
  }
}

// Heads of at least one vector have a way of their own through narrow windows, a few queries at a time.
TEST_P(Relations, BandedSavesTheLogSumExpOfEachQueryOfANarrowWindow) {
  const Heads wide{.query = 2, .key_value = 1, .dim = 16};
  for (const Index n : {7, 9, 10, 12, 131}) {
    const auto sample = random_sample<float>(wide, n, 1);
    const Banded<float> banded(wide, {.window = {3, 2}, .causal = GetParam()});
    Banded<float>::Saved saved;
    Matrix<float> out(n, wide.out_cols());
    banded.forward(sample.inputs(), out, saved);
    Matrix<double> expected = Matrix<double>::Zero(wide.query, n);
    for (Index h = 0; h < wide.query; ++h) {
      for (Index i = 0; i < n; ++i) {
        const auto query = sample.query.row(i).segment(h * wide.dim, wide.dim).cast<double>();
        double sum = 0;
        for (Index j = std::max<Index>(i - 3, 0); j <= std::min(GetParam() ? i : i + 2, n - 1); ++j) {
          sum += std::exp(query.dot(sample.key.row(j).cast<double>()) / 4);
        }
        expected(h, i) = std::log(sum);
      }
    }
    EXPECT_TRUE(close(saved.log_sum_exp, expected, 1e-6)) << n;
  }
}

// Heads of at least one vector have a way of their own back through narrow windows too, which those with a feature less
// do not take. Of more than one vector they need not be whole ones.
class NarrowBackward : public testing::TestWithParam<std::tuple<bool, Index>> {};

INSTANTIATE_TEST_SUITE_P(, NarrowBackward,
                         testing::Combine(testing::Bool(),
                                          testing::Values(detail::lanes<float>, detail::lanes<float> + 1,
                                                          3 * detail::lanes<float> - 1)));

TEST_P(NarrowBackward, IsAsThatOfAnyOtherWindow) {
  // Not a structured binding, which clang 14 does not let a lambda capture.
  const bool causal = std::get<0>(GetParam());
  const Index dim = std::get<1>(GetParam());
  constexpr Index fewer = detail::lanes<float> - 1;
  if (fewer == 0) GTEST_SKIP() << "Without vectors no head has fewer features than one.";
  const Heads heads_by_rows{.query = 4, .key_value = 2, .dim = dim}, others{.query = 4, .key_value = 2, .dim = fewer};
  for (const Window window : {Window{0, 0}, Window{1, 0}, Window{0, 3}, Window{4, 4}, Window{9, 6}, Window{29, 29}}) {
    const BandedOptions options{.window = window, .causal = causal, .scale = 0.3};
    for (const Index n : {1, 5, 64, 131}) {
      auto first = random_sample<float>(others, n, 3), second = random_sample<float>(others, 70, 4);
      first.key_mask = Random(5).mask(n, 0.3);
      const std::array<Sample<float>, 2> both{first, second};
      auto sample = pack<float>(both);
      poison_masked_keys(sample);
      const auto grad_out = Random(6).matrix<float>(sample.query.rows(), others.out_cols());
      auto wider = sample;
      for (auto* rows : {&wider.query, &wider.key, &wider.value}) *rows = with_dim<float>(*rows, fewer, dim);
      const auto expected = run_backward(Banded<float>(others, options), sample, grad_out);
      const auto found =
          run_backward(Banded<float>(heads_by_rows, options), wider, with_dim<float>(grad_out, fewer, dim));
      const auto expect_same = [&](const Matrix<float>& found_rows, const Matrix<float>& expected_rows) {
        EXPECT_TRUE(close(with_dim<float>(found_rows, dim, fewer), expected_rows, 2e-5))
            << n << " tokens, window " << window.left << ", " << window.right;
      };
      expect_same(found.query, expected.query);
      expect_same(found.key, expected.key);
      expect_same(found.value, expected.value);
    }
  }
}

TEST_P(Relations, MultipoleIsSoftmaxWhereABlockHoldsTheSequence) {
  for (const Index n : {1, 5, 64}) {
    const auto sample = masked_sample(n);
    for (const Index block : {n, n + 1, 4 * n}) {
      const Multipole<double> multipole(heads, {.block = block, .rank = 1, .causal = GetParam()});
      EXPECT_TRUE(close(run_forward(multipole, sample), softmax(sample, GetParam()), 1e-13)) << n << ", " << block;
    }
  }
}

// Two or four blocks have at most one level, whose groups are blocks, whose pooled keys at full rank are the keys.
TEST_P(Relations, MultipoleIsSoftmaxWhereOneLevelHasFullRank) {
  for (const Index n : {17, 30, 32}) {
    const auto sample = masked_sample(n);
    const Multipole<double> multipole(heads, {.block = 8, .rank = 8, .causal = GetParam()});
    EXPECT_TRUE(close(run_forward(multipole, sample), softmax(sample, GetParam()), 1e-13)) << n;
  }
}

TEST_P(Relations, FmmWithoutFarFieldIsBanded) {
  const Window window{3, 6};
  Fmm<double> fmm(heads, {.window = window, .causal = GetParam(), .gate = Gate::identity});
  fmm.parameters().near.setOnes();
  fmm.parameters().far[0].setZero();
  const Banded<double> banded(heads, {.window = window, .causal = GetParam()});
  for (const Index n : {1, 2, 40, 131}) {
    const auto sample = masked_sample(n);
    EXPECT_TRUE(close(run_forward(fmm, sample), run_forward(banded, sample), 1e-13)) << n;
  }
}

TEST_P(Relations, FmmWithoutNearFieldIsLinear) {
  Fmm<double> fmm(heads, {.causal = GetParam(), .gate = Gate::identity});
  fmm.parameters().near.setZero();
  const Linear<double> linear(heads, {.causal = GetParam()});
  for (const Index n : {1, 2, 40, 131}) {
    const auto sample = masked_sample(n);
    EXPECT_TRUE(close(run_forward(fmm, sample), run_forward(linear, sample), 1e-13)) << n;
  }
}

TEST(Relations, AKeyThatWeighsNothingAddsNothing) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  for (const auto& [grouped, queries] :
       {std::pair<Heads, Index>{{4, 2, 20}, 1}, {{4, 2, 20}, 6}, {{4, 2, 20}, 7}, {{4, 2, 20}, 30}, {{8, 2, 64}, 1}}) {
    auto sample = random_sample<double>(grouped, queries, 71, 30);
    sample.query = sample.query.cwiseAbs().array() + 0.1;
    sample.key_mask.assign(30, 1);
    sample.key_mask[13] = 0;
    const auto run = [&](const Sample<double>& of) {
      return std::array{run_forward(Softmax<double>(grouped), of),
                        run_forward(Banded<double>(grouped, {.window = {20, 20}}), of)};
    };
    const auto hidden = run(sample);
    sample.key_mask[13] = 1;
    sample.key.row(13).setConstant(-infinity);
    sample.value.row(13).setConstant(infinity);
    const auto weightless = run(sample);
    for (std::size_t i = 0; i < hidden.size(); ++i) EXPECT_TRUE(close(weightless[i], hidden[i], 1e-12)) << queries;
  }
}

// A few queries go along the keys by themselves; more are taken in tiles.
TEST(Relations, WeightsFoundAgainFromHugeScoresAreNoLargerThanOne) {
  // So few queries, or a window where queries and keys differ in number, have their scores summed in another order
  // forward than backward, and at such scores the last digit counts.
  const Heads one{.query = 1, .key_value = 1, .dim = 24};
  for (const auto& [left, queries] : {std::pair<Index, Index>{Window::unlimited, 5}, {9, 35}}) {
    auto sample = random_sample<float>(one, queries, 5, 40);
    sample.query *= 4e3f;
    sample.key *= 4e3f;
    const Banded<float> attention(one, {.window = {left, 3}});
    for (Index i = 0; i < queries; ++i) {
      // Of one query alone the gradients of the values are its weights.
      Matrix<float> grad_out = Matrix<float>::Zero(queries, one.out_cols());
      grad_out.row(i).setOnes();
      const auto gradients = run_backward(attention, sample.inputs(), grad_out);
      EXPECT_LE(gradients.value.maxCoeff(), 1) << i;
      EXPECT_GE(gradients.value.minCoeff(), 0) << i;
    }
  }
}

void expect_rows_as_among_many(const Heads& grouped, const Sample<float>& sample, const std::string& what) {
  for (const bool causal : {false, true}) {
    const Banded<float> banded(grouped, {.window = {1050, 1050}, .causal = causal});
    const Matrix<float> expected = run_forward(banded, sample);
    for (const Index few : {1, 2, 6}) {
      auto last = sample;
      last.query = sample.query.bottomRows(few);
      EXPECT_TRUE(rows_close(run_forward(banded, last), expected.bottomRows(few), 2e-6)) << what << " " << few;
      // Rows that do not lie end to end are fetched otherwise.
      Scattered<float> query(last.query), key(sample.key), value(sample.value);
      Matrix<float> out(few, grouped.out_cols());
      banded.forward({query.view(), key.view(), value.view(), sample.key_mask}, out);
      EXPECT_TRUE(same_bits(out, run_forward(banded, last))) << what << " " << few;
    }
  }
}

TEST(Relations, FewQueriesHaveTheRowsThatTheyHaveAmongMany) {
  constexpr Index lanes = detail::lanes<float>, keys = 1100, many = 20;
  for (const auto& [dim, value_dim] : {std::pair{4 * lanes, 4 * lanes}, std::pair{8 * lanes, lanes},
                                       std::pair{4 * lanes + 1, 12 * lanes}, std::pair{Index{3}, 4 * lanes + 3}}) {
    for (const Index query_heads : {2, 4, 8}) {
      const Heads grouped{.query = query_heads, .key_value = 2, .dim = dim, .value_dim = value_dim};
      const std::string what = std::to_string(query_heads) + " heads of " + std::to_string(dim);
      auto sample = random_sample<float>(grouped, many, 81, keys);
      sample.key_mask = Random(82).mask(keys, 0.2);
      sample.key_mask[600] = 1;
      poison_masked_keys(sample);
      expect_rows_as_among_many(grouped, sample, what);
      // Of heads that share a key one takes them all, and the others none but this or all but this.
      sample.query.middleCols(dim, dim).setZero();
      sample.key.row(600) *= 1e30f;
      expect_rows_as_among_many(grouped, sample, what + ", one key apart");
    }
  }
}

TEST(Relations, NystromIsSoftmaxWhereEveryTokenIsALandmark) {
  const auto sample = random_sample<double>(heads, 9, 3);
  const Nystrom<double> nystrom(heads, {.landmarks = 9, .scale = 3});
  const Softmax<double> exact(heads, {.scale = 3});
  EXPECT_TRUE(close(run_forward(nystrom, sample), run_forward(exact, sample), 1e-10));
}

}  // namespace
}  // namespace nearfar::test
