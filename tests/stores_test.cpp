#include <nearfar/banded.hpp>
#include <nearfar/linear.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <array>

// Rows of 16 MiB and more are stored past the caches, if they are aligned to vectors.

namespace nearfar::test {
namespace {

const Heads heads{8, 8, 64};

/// What attention gives forward and backward, in matrices that begin `margin` numbers before the rows themselves.
template <class A>
std::array<Matrix<float>, 4> train(const A& attention, const Sample<float>& sample, Index margin) {
  const Index n = sample.query.rows(), cols = sample.query.cols();
  std::array<Matrix<float>, 4> results;
  for (Matrix<float>& result : results) result.setZero(n, cols + margin);
  const auto rows = [&](std::size_t i) { return Tokens<float>(results[i]).middle_cols(margin, cols); };
  typename A::Saved saved;
  auto gradients = attention.parameters();
  attention.forward(sample.inputs(), rows(0), saved);
  attention.backward(sample.inputs(), rows(0), saved, sample.query, {rows(1), rows(2), rows(3)}, gradients);
  for (Matrix<float>& result : results) result = result.rightCols(cols).eval();
  return results;
}

template <class A>
void expect_large_matrices_stored_as_small_ones(const A& attention) {
  const Index n = (Index{33} << 20) / Index{sizeof(float)} / heads.query_cols();
  const auto sample = random_sample<float>(heads, n, 31);
  const auto aligned = train(attention, sample, 0);
  const auto unaligned = train(attention, sample, 1);
  for (std::size_t i = 0; i < aligned.size(); ++i) EXPECT_TRUE(same_bits(aligned[i], unaligned[i])) << i;
}

TEST(Stores, LinearStoresLargeMatricesAsSmallOnes) {
  for (const bool causal : {false, true}) {
    expect_large_matrices_stored_as_small_ones(Linear<float>(heads, {.causal = causal}));
  }
}

TEST(Stores, BandedStoresLargeMatricesAsSmallOnes) {
  expect_large_matrices_stored_as_small_ones(Banded<float>(heads, {.window = {3, 2}}));
}

}  // namespace
}  // namespace nearfar::test
