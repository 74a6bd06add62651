#include <nearfar/additive.hpp>
#include <nearfar/banded.hpp>
#include <nearfar/linear.hpp>
#include <nearfar/multipole.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <array>
#include <cstdint>
#include <vector>

// Rows of 16 MiB and more are stored past the caches, if they are aligned to cache lines.

namespace nearfar::test {
namespace {

const Heads heads{8, 8, 64};

/// The numbers from `data` on to the next cache line.
Index to_next_line(const float* data) {
  constexpr std::uintptr_t line = detail::cache_line;
  return static_cast<Index>((line - reinterpret_cast<std::uintptr_t>(data) % line) % line / sizeof(float));
}

/// What attention gives forward and backward where every seventh key is masked, in rows that begin `margin` numbers
/// after a cache line.
template <class A>
std::array<Matrix<float>, 4> train(const A& attention, const Sample<float>& sample, Index margin) {
  const Index n = sample.query.rows(), cols = sample.query.cols();
  std::array<Matrix<float>, 4> results;
  for (Matrix<float>& result : results) result.setZero(n, cols + 2 * detail::cache_line / Index{sizeof(float)});
  const auto rows = [&](std::size_t i) {
    return Tokens<float>(results[i]).middle_cols(to_next_line(results[i].data()) + margin, cols);
  };
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(n), 1);
  for (std::size_t i = 3; i < mask.size(); i += 7) mask[i] = 0;
  Inputs<float> inputs = sample.inputs();
  inputs.key_mask = mask;
  typename A::Saved saved;
  auto gradients = attention.parameters();
  attention.forward(inputs, rows(0), saved);
  attention.backward(inputs, rows(0), saved, sample.query, {rows(1), rows(2), rows(3)}, gradients);
  for (std::size_t i = 0; i < results.size(); ++i) results[i] = rows(i).matrix().eval();
  return results;
}

template <class A>
void expect_large_matrices_stored_as_small_ones(const A& attention) {
  const Index n = (Index{17} << 20) / Index{sizeof(float)} / heads.query_cols();
  const auto sample = random_sample<float>(heads, n, 31);
  const auto aligned = train(attention, sample, 0);
  // Within a line, whole vectors are aligned and numbers are not.
  for (const Index margin : {Index{detail::lanes<float>}, Index{1}}) {
    const auto other = train(attention, sample, margin);
    for (std::size_t i = 0; i < aligned.size(); ++i)
      EXPECT_TRUE(same_bits(aligned[i], other[i])) << i << ", " << margin;
  }
}

TEST(Stores, PastTheCachesGoWholeLinesOfLargeMatrices) {
  constexpr Index line = detail::cache_line / Index{sizeof(float)};
  constexpr Index vector = detail::lanes<float>;
  Matrix<float> memory(9000, heads.query_cols() + 2 * line);
  const auto rows = [&](Index count, Index margin) {
    return Tokens<float>(memory).middle_rows(0, count).middle_cols(to_next_line(memory.data()) + margin,
                                                                   heads.query_cols());
  };
  EXPECT_TRUE(detail::past_caches(rows(9000, 0), 64));
  EXPECT_TRUE(detail::rows_past_caches(rows(9000, vector), 64));
  EXPECT_EQ(detail::columns_past_caches(rows(9000, 0), 64), vector == line);
  for (const auto past : {detail::past_caches<float>, detail::rows_past_caches<float>}) {
    EXPECT_FALSE(past(rows(8000, 0), 64));
    EXPECT_FALSE(past(rows(9000, 1), 64));
    EXPECT_FALSE(past(rows(9000, 0), 65));
  }
  EXPECT_EQ(detail::past_caches(rows(9000, vector), 64), vector == line);
}

TEST(Stores, LinearStoresLargeMatricesAsSmallOnes) {
  for (const bool causal : {false, true}) {
    expect_large_matrices_stored_as_small_ones(Linear<float>(heads, {.causal = causal}));
  }
}

TEST(Stores, BandedStoresLargeMatricesAsSmallOnes) {
  for (const Window window : {Window{3, 2}, Window{100, 90}}) {
    expect_large_matrices_stored_as_small_ones(Banded<float>(heads, {.window = window}));
  }
}

TEST(Stores, MultipoleStoresLargeMatricesAsSmallOnes) {
  for (const bool causal : {false, true}) {
    expect_large_matrices_stored_as_small_ones(Multipole<float>(heads, {.block = 16, .rank = 2, .causal = causal}));
  }
}

TEST(Stores, AdditiveStoresLargeMatricesAsSmallOnes) {
  for (const bool causal : {false, true}) {
    for (const bool per_head : {false, true}) {
      Additive<float> additive(heads, {.causal = causal, .per_head_weights = per_head, .transform = false});
      additive.parameters().w_q.setRandom();
      additive.parameters().w_k.setRandom();
      expect_large_matrices_stored_as_small_ones(additive);
    }
  }
}

}  // namespace
}  // namespace nearfar::test
