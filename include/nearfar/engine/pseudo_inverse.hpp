#pragma once

#include <nearfar/detail/scratch.hpp>

#include <Eigen/Core>

#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// A square matrix of numbers that somebody else holds, one row after another.
template <class Real>
using Square = Eigen::Map<Matrix<Real>>;

/// Replaces A by its Moore-Penrose inverse, in place, and returns the rank it was given.
///
/// Gauss-Jordan elimination with complete pivoting: it ends, at the rank k, when no pivot above `tolerance` times the
/// first is left. With rows and columns in the order of their pivots it has then turned
///
///   A = [A11 A12; A21 A22]      into      [A11^-1  Y; -X  S],      X = A21 A11^-1,  Y = A11^-1 A12,
///
/// and the remainder S, too small to be told from rounding, counts as zero. What is left factors as
/// A = [I; X] A11 [I Y], all of rank k, hence (MacDuffee's formula for a factorisation of full rank)
///
///   A^+ = [I; Y^T] (I + Y Y^T)^-1 A11^-1 (I + X^T X)^-1 [I X^T],
///
/// which is A^-1 = A11^-1 where k is the size of A. Time r^3 multiply-adds for an r x r matrix of full rank; allocates
/// nothing beside scratch. A matrix with NaN gives NaN.
template <class Real>
Index pseudo_invert(Square<Real> a, std::type_identity_t<Real> tolerance, Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  const Index size = a.rows();
  Index* pivot_row = scratch.take<Index>(size);
  Index* pivot_col = scratch.take<Index>(size);
  Real threshold = 0;
  Index rank = 0;
  for (; rank < size; ++rank) {
    const Index k = rank;
    const Real largest = a.bottomRightCorner(size - k, size - k).cwiseAbs().maxCoeff(&pivot_row[k], &pivot_col[k]);
    if (k == 0) threshold = tolerance * largest;
    if (largest <= threshold) break;
    a.row(k).swap(a.row(pivot_row[k] += k));
    a.col(k).swap(a.col(pivot_col[k] += k));
    const Real inverse = 1 / a(k, k);
    a(k, k) = 1;
    a.row(k) *= inverse;
    for (Index i = 0; i < size; ++i) {
      if (i == k) continue;
      const Real factor = a(i, k);
      a(i, k) = 0;
      a.row(i) -= factor * a.row(k);
    }
  }
  const Index rest = size - rank;
  if (rest > 0) {
    const auto square = [&] { return Square<Real>(scratch.take<Real>(rank * rank), rank, rank); };
    const auto y = a.topRightCorner(rank, rest);
    const auto minus_x = a.bottomLeftCorner(rest, rank);
    Square<Real> rows = square(), cols = square(), half = square();
    rows = y.lazyProduct(y.transpose());
    cols = minus_x.transpose().lazyProduct(minus_x);
    for (Square<Real>* gram : {&rows, &cols}) {
      gram->diagonal().array() += 1;
      pseudo_invert(*gram, 0, scratch);
    }
    half = rows.lazyProduct(a.topLeftCorner(rank, rank));
    a.topLeftCorner(rank, rank) = half.lazyProduct(cols);
    // Y and X stand where their products belong: those wait until nothing reads Y and X any more.
    half = a.topLeftCorner(rank, rank);
    Eigen::Map<Matrix<Real>> below(scratch.take<Real>(rest * rank), rest, rank);
    Eigen::Map<Matrix<Real>> beside(scratch.take<Real>(rank * rest), rank, rest);
    below = y.transpose().lazyProduct(half);
    beside = -half.lazyProduct(minus_x.transpose());
    a.bottomRightCorner(rest, rest) = -below.lazyProduct(minus_x.transpose());
    a.bottomLeftCorner(rest, rank) = below;
    a.topRightCorner(rank, rest) = beside;
  }
  for (Index k = rank; k-- > 0;) {
    a.row(k).swap(a.row(pivot_col[k]));
    a.col(k).swap(a.col(pivot_row[k]));
  }
  return rank;
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
