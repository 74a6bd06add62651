#pragma once

#include <nearfar/tokens.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace nearfar::test {

/// How far two matrices are apart, and where most.
struct Distance {
  double error = 0;  ///< relative to a scale that the function which measured it names
  Index row = 0;
  Index col = 0;
};

namespace comparing {

template <class A, class B, class Scale>
Distance distance(const A& actual, const B& expected, Scale&& scale) {
  Distance worst;
  for (Index i = 0; i < expected.rows(); ++i) {
    for (Index j = 0; j < expected.cols(); ++j) {
      const double a = static_cast<double>(actual(i, j));
      const double e = static_cast<double>(expected(i, j));
      const double gap = std::abs(a - e);
      // Also a NaN on one side only is infinitely far.
      const double error = a == e ? 0 : (std::isnan(gap) ? std::numeric_limits<double>::infinity() : gap / scale(i));
      if (error > worst.error) worst = {error, i, j};
    }
  }
  return worst;
}

template <class B>
double largest_entry(const B& expected, Index first, Index count) {
  double largest = 0;
  for (Index i = first; i < first + count; ++i) {
    for (Index j = 0; j < expected.cols(); ++j) {
      largest = std::max(largest, std::abs(static_cast<double>(expected(i, j))));
    }
  }
  return largest;
}

template <class A, class B>
::testing::AssertionResult judge(const A& actual, const B& expected, const Distance& worst, double tolerance) {
  if (worst.error <= tolerance) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "relative error " << worst.error << " where " << tolerance
                                       << " is allowed: entry (" << worst.row << ", " << worst.col << ") is "
                                       << actual(worst.row, worst.col) << " and should be "
                                       << expected(worst.row, worst.col);
}

template <class A, class B>
::testing::AssertionResult same_shape(const A& actual, const B& expected) {
  if (actual.rows() == expected.rows() && actual.cols() == expected.cols()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "the shape is " << actual.rows() << " x " << actual.cols()
                                       << " and should be " << expected.rows() << " x " << expected.cols();
}

}  // namespace comparing

/// The largest |actual - expected|, relative to the largest |entry| of expected, but to no less than `floor`. A NaN
/// that is not expected is infinitely far.
template <class A, class B>
Distance relative_distance(const A& actual, const B& expected, double floor = 1) {
  const double scale = std::max(floor, comparing::largest_entry(expected, 0, expected.rows()));
  return comparing::distance(actual, expected, [scale](Index) { return scale; });
}

/// The same with each row relative to its own largest |entry|: the measure for float results, where a single entry may
/// be the difference of large ones.
template <class A, class B>
Distance relative_row_distance(const A& actual, const B& expected) {
  return comparing::distance(actual, expected, [&](Index i) {
    return std::max(std::numeric_limits<double>::min(), comparing::largest_entry(expected, i, 1));
  });
}

/// EXPECT_TRUE(close(actual, expected, 1e-12)): matrices or Tokens of any scalars, by `relative_distance`.
template <class A, class B>
::testing::AssertionResult close(const A& actual, const B& expected, double tolerance, double floor = 1) {
  if (const auto shape = comparing::same_shape(actual, expected); !shape) return shape;
  return comparing::judge(actual, expected, relative_distance(actual, expected, floor), tolerance);
}

/// EXPECT_TRUE(rows_close(actual, expected, 2e-6)), by `relative_row_distance`.
template <class A, class B>
::testing::AssertionResult rows_close(const A& actual, const B& expected, double tolerance) {
  if (const auto shape = comparing::same_shape(actual, expected); !shape) return shape;
  return comparing::judge(actual, expected, relative_row_distance(actual, expected), tolerance);
}

/// EXPECT_TRUE(same_bits(actual, expected)).
template <class A, class B>
::testing::AssertionResult same_bits(const A& actual, const B& expected) {
  if (const auto shape = comparing::same_shape(actual, expected); !shape) return shape;
  for (Index i = 0; i < expected.rows(); ++i) {
    for (Index j = 0; j < expected.cols(); ++j) {
      const auto a = actual(i, j);
      const auto e = expected(i, j);
      static_assert(sizeof(a) == sizeof(e));
      if (std::memcmp(&a, &e, sizeof(a)) != 0) {
        return ::testing::AssertionFailure()
               << "entry (" << i << ", " << j << ") is " << a << " and should be, to the bit, " << e;
      }
    }
  }
  return ::testing::AssertionSuccess();
}

/// EXPECT_TRUE(finite(out)): no infinity, no NaN.
template <class A>
::testing::AssertionResult finite(const A& matrix) {
  for (Index i = 0; i < matrix.rows(); ++i) {
    for (Index j = 0; j < matrix.cols(); ++j) {
      if (!std::isfinite(matrix(i, j))) {
        return ::testing::AssertionFailure() << "entry (" << i << ", " << j << ") is " << matrix(i, j);
      }
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace nearfar::test
