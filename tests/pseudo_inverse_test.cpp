#include <nearfar/engine/nystrom/pseudo_inverse.hpp>

#include "support/compare.hpp"
#include "support/random.hpp"

#include <gtest/gtest.h>

#include <limits>

namespace nearfar::test {
namespace {

Matrix<double> inverse_of(Matrix<double> matrix, Index expected_rank, double tolerance = 1e-12) {
  detail::Scratch scratch;
  EXPECT_EQ(detail::pseudo_invert(Tokens<double>(matrix), tolerance, scratch), expected_rank);
  return matrix;
}

TEST(PseudoInverse, OfAFullMatrixIsTheInverse) {
  for (const Index size : {1, 2, 3, 8, 17, 64}) {
    const auto matrix = Random(static_cast<std::uint64_t>(size)).matrix<double>(size, size);
    const Matrix<double> product = matrix * inverse_of(matrix, size);
    EXPECT_TRUE(close(product, Matrix<double>::Identity(size, size), 1e-11)) << size;
  }
}

TEST(PseudoInverse, MeetsTheFourConditionsOfPenroseAtEveryRank) {
  for (const Index size : {1, 2, 5, 12}) {
    for (Index rank = 0; rank <= size; ++rank) {
      Random random(static_cast<std::uint64_t>(100 * size + rank));
      const Matrix<double> a = random.matrix<double>(size, rank) * random.matrix<double>(rank, size);
      const Matrix<double> p = inverse_of(a, rank);
      const Matrix<double> ap = a * p, pa = p * a, apa = ap * a, pap = pa * p;
      EXPECT_TRUE(close(apa, a, 1e-11)) << rank << " of " << size;
      EXPECT_TRUE(close(pap, p, 1e-11)) << rank << " of " << size;
      EXPECT_TRUE(close(ap, Matrix<double>(ap.transpose()), 1e-11)) << rank << " of " << size;
      EXPECT_TRUE(close(pa, Matrix<double>(pa.transpose()), 1e-11)) << rank << " of " << size;
    }
  }
}

TEST(PseudoInverse, DropsWhatTheToleranceCallsZero) {
  Matrix<double> a = Matrix<double>::Zero(3, 3);
  a.diagonal() << 4, 2, 1e-6;
  Matrix<double> expected = Matrix<double>::Zero(3, 3);
  expected.diagonal() << 0.25, 0.5, 0;
  EXPECT_TRUE(close(inverse_of(a, 2, 1e-5), expected, 0));
  expected(2, 2) = 1e6;
  EXPECT_TRUE(close(inverse_of(a, 3, 1e-7), expected, 1e-15));
}

TEST(PseudoInverse, HasTheGradientOfWhatItFindsAlsoWhereItDropsPivots) {
  detail::Scratch scratch;
  int dropping = 0;
  for (const double tolerance : {0.0, 0.02, 0.1, 0.3, 0.99}) {
    for (const Index size : {1, 3, 8, 17}) {
      Random random(static_cast<std::uint64_t>(size));
      const Matrix<double> a = random.matrix<double>(size, size).array().exp();
      const Matrix<double> grad = random.matrix<double>(size, size), direction = random.matrix<double>(size, size);
      Index rank = 0;
      const auto invert = [&](Matrix<double> matrix) {
        rank = detail::pseudo_invert(Tokens<double>(matrix), tolerance, scratch);
        return matrix;
      };
      const auto difference = [&](double step) {
        const Matrix<double> above = invert(a + step * direction), below = invert(a - step * direction);
        return (above - below).cwiseProduct(grad).sum() / (2 * step);
      };
      const double expected = (4 * difference(1e-6) - difference(2e-6)) / 3;
      const Matrix<double> inverse = invert(a);
      if (rank < size) ++dropping;
      const Matrix<double> actual =
          detail::take_pseudo_inverse_gradient<double>(scratch, a, inverse, grad, tolerance).matrix();
      EXPECT_NEAR(actual.cwiseProduct(direction).sum(), expected, 1e-6 * actual.norm() * direction.norm())
          << size << " of rank " << rank << ", tolerance " << tolerance;
    }
  }
  EXPECT_GE(dropping, 5);
}

TEST(PseudoInverse, PassesNaNOn) {
  auto matrix = Random(1).matrix<double>(4, 4);
  matrix(2, 1) = std::numeric_limits<double>::quiet_NaN();
  detail::Scratch scratch;
  detail::pseudo_invert(Tokens<double>(matrix), 1e-12, scratch);
  EXPECT_TRUE(matrix.array().isNaN().all());
}

}  // namespace
}  // namespace nearfar::test
