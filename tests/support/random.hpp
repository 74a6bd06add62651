#pragma once

#include <nearfar/tokens.hpp>

#include <cstdint>
#include <random>
#include <vector>

namespace nearfar::test {

/// Reproducible random numbers, the same with every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  /// Uniform in [0, 1).
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

  /// Uniform in [first, last].
  Index integer(Index first, Index last) {
    return first + static_cast<Index>(engine_() % static_cast<std::uint64_t>(last - first + 1));
  }

  /// Entries of mean 0 and variance size^2, exact in float, so that a float and a double case can be the same case.
  template <class T>
  Matrix<T> matrix(Index rows, Index cols, double size = 1) {
    Matrix<T> result(rows, cols);
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < cols; ++j) {
        result(i, j) = static_cast<T>(static_cast<float>(size * 1.7320508 * (2 * unit() - 1)));
      }
    }
    return result;
  }

  /// One byte a key, each 0 with the given probability.
  std::vector<std::uint8_t> mask(Index count, double hidden) {
    std::vector<std::uint8_t> result(static_cast<std::size_t>(count));
    for (std::uint8_t& visible : result) visible = unit() < hidden ? 0 : 1;
    return result;
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace nearfar::test
