#include <nearfar/detail/exp.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

// The exponential that every softmax is made of.

namespace nearfar::test {
namespace {

template <class T>
T exp2_of(T x) {
  T results[detail::lanes<T>];
  detail::pstoreu(results, detail::exp2<T>(detail::pset1<detail::Packet<T>>(x)));
  for (const T& result : results) EXPECT_TRUE(result == results[0] || (result != result && x != x)) << x;
  return results[0];
}

/// How many units in the last place of `expected` lie between the two.
template <class T>
double units_apart(T actual, long double expected) {
  const T rounded = static_cast<T>(expected);
  const T next = std::nextafter(rounded, std::numeric_limits<T>::infinity());
  return static_cast<double>(std::abs(static_cast<long double>(actual) - expected) /
                             (static_cast<long double>(next) - static_cast<long double>(rounded)));
}

template <class T>
struct Exp2 : ::testing::Test {};
using Scalars = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Exp2, Scalars);

TYPED_TEST(Exp2, IsWithinTwoUnitsInTheLastPlaceOverItsRange) {
  using T = TypeParam;
  const T lowest = static_cast<T>(std::numeric_limits<T>::min_exponent - 1);
  const T highest = std::nextafter(static_cast<T>(std::numeric_limits<T>::max_exponent), T(0));
  double worst = 0;
  T worst_at = 0;
  const auto check = [&](T x) {
    const double error = units_apart(exp2_of(x), std::exp2(static_cast<long double>(x)));
    if (error > worst) worst = error, worst_at = x;
  };
  // Evenly over the range, then towards 0 from both sides, where 2^x is near 1.
  const int steps = 200'000;
  for (int i = 0; i <= steps; ++i) check(lowest + (highest - lowest) * (static_cast<T>(i) / steps));
  for (T x = 1; x > std::numeric_limits<T>::epsilon() / 8; x *= static_cast<T>(0.999)) {
    check(x);
    check(-x);
  }
  // Where the reduced argument changes sign.
  for (T half = lowest + static_cast<T>(0.5); half < highest; half += 1) {
    check(half);
    check(std::nextafter(half, highest));
    check(std::nextafter(half, lowest));
  }
  EXPECT_LE(worst, 2.0) << "at " << worst_at;
}

TYPED_TEST(Exp2, IsExactWhereSoftmaxReliesOnIt) {
  using T = TypeParam;
  const T infinity = std::numeric_limits<T>::infinity();
  EXPECT_EQ(exp2_of(T(0)), T(1));
  EXPECT_EQ(exp2_of(-infinity), T(0));
  EXPECT_TRUE(std::isnan(exp2_of(std::numeric_limits<T>::quiet_NaN())));
  for (int whole = std::numeric_limits<T>::min_exponent - 1; whole < std::numeric_limits<T>::max_exponent; ++whole) {
    EXPECT_EQ(exp2_of(static_cast<T>(whole)), std::ldexp(T(1), whole));
  }
}

TYPED_TEST(Exp2, BelowTheNormalNumbersIsNoMoreThanTheSmallestOfThem) {
  using T = TypeParam;
  for (T x = static_cast<T>(std::numeric_limits<T>::min_exponent - 1); x > static_cast<T>(-1e6);
       x *= static_cast<T>(1.01)) {
    EXPECT_GE(exp2_of(x), T(0)) << x;
    EXPECT_LE(exp2_of(x), std::numeric_limits<T>::min()) << x;
  }
}

}  // namespace
}  // namespace nearfar::test
