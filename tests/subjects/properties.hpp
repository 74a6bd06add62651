#pragma once

#include "subjects/subject.hpp"
#include "support/compare.hpp"

#include <gtest/gtest.h>

namespace nearfar::test {

/// What the tests of properties share: TEST_P(Suite, ...) of a suite derived from this runs for every configuration.
class Property : public ::testing::TestWithParam<SubjectCase> {
 protected:
  static bool causal() { return GetParam().causal; }
  static bool any_shape() { return GetParam().any_shape; }

  /// Two query heads a key/value head, an odd width, and another width of values where that may be.
  static Heads grouped_heads() { return {.query = 4, .key_value = 2, .dim = 5, .value_dim = any_shape() ? 3 : 0}; }

  template <class T>
  static std::unique_ptr<Subject<T>> make(const Heads& heads = grouped_heads()) {
    return GetParam().template make<T>(heads);
  }

  /// Head widths on both sides of what vectors and register tiles hold, primes between, and all the small ones.
  static constexpr Index widths[] = {1,  2,  3,  4,  5,  6,  7,   8,   9,   10,  11,  12,  13,  14,  15,  16, 17,
                                     18, 19, 20, 21, 22, 23, 24,  25,  29,  31,  32,  33,  37,  47,  48,  49, 63,
                                     64, 65, 79, 80, 96, 97, 100, 127, 128, 129, 191, 192, 193, 251, 255, 256};

  /// A random sequence with about a third of its keys masked.
  template <class T>
  static Sample<T> masked_sample(Index n, std::uint64_t seed) {
    auto sample = random_sample<T>(grouped_heads(), n, seed);
    sample.key_mask = Random(seed + 1000).mask(n, 0.3);
    return sample;
  }

  template <class T>
  static double tolerance() {
    return std::is_same_v<T, double> ? GetParam().tolerance : GetParam().float_tolerance;
  }
};

/// Calls visit(T{}) for double and float.
template <class Visit>
void in_each_scalar(Visit&& visit) {
  {
    SCOPED_TRACE("double");
    visit(double{});
  }
  {
    SCOPED_TRACE("float");
    visit(float{});
  }
}

}  // namespace nearfar::test
