#include <nearfar/detail/transpose.hpp>

#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

// Queries go onto the vector lanes and results come back by one transposition.

namespace nearfar::test {
namespace {

template <class T>
struct Transpose : ::testing::Test {};
using Scalars = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Transpose, Scalars);

TYPED_TEST(Transpose, PutsEveryEntryInItsPlaceTimesItsFactors) {
  using T = TypeParam;
  constexpr Index width = detail::lanes<T>;
  for (const Index rows : {Index{1}, width - 1, width, width + 1, 3 * width}) {
    for (const Index cols : {Index{1}, width - 1, width, 2 * width + 3}) {
      if (rows < 1 || cols < 1) continue;
      Matrix<T> from(rows, cols + 5);
      for (Index i = 0; i < from.size(); ++i) from.data()[i] = static_cast<T>(i + 1);
      std::vector<T> factors;
      for (Index c = 0; c < cols; ++c) factors.push_back(static_cast<T>(c % 7) / 4);
      for (const bool with_factors : {false, true}) {
        Matrix<T> to = Matrix<T>::Constant(cols, rows + 2, T(-1));
        detail::transpose(from.data(), from.outerStride(), rows, cols, T(0.5), to.data(), to.outerStride(), {},
                          with_factors ? factors.data() : nullptr);
        for (Index c = 0; c < cols; ++c) {
          const T factor = with_factors ? factors[static_cast<std::size_t>(c)] / 2 : T(0.5);
          for (Index r = 0; r < rows; ++r) ASSERT_EQ(to(c, r), factor * from(r, c)) << rows << " x " << cols;
          for (Index r = rows; r < to.cols(); ++r) ASSERT_EQ(to(c, r), T(-1)) << rows << " x " << cols;
        }
      }
    }
  }
}

}  // namespace
}  // namespace nearfar::test
