#pragma once

#include <nearfar/engine/nystrom/small_matrix.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <utility>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The largest entry, by its absolute value, of the rows and columns from k on, and where it stands.
template <class T>
T find_pivot(Tokens<T> a, Index k, Index& pivot_row, Index& pivot_col) {
  T largest = -1;
  for (Index i = k; i < a.rows(); ++i) {
    const T* const row = a.row(i) + k;
    const Index count = a.cols() - k;
    Packet<T> most = pset1<Packet<T>>(T(0));
    T of_row = 0;
    for_each_packet<T>(count, [&](auto by, Index c) {
      using V = typename decltype(by)::template Of<T>;
      const V size = pabs(ploadu<V>(row + c));
      if constexpr (sizeof(V) == sizeof(Packet<T>)) {
        most = pmax(most, size);
      } else {
        of_row = std::max(of_row, T(predux_max(size)));
      }
    });
    of_row = std::max(of_row, predux_max(most));
    if (of_row <= largest) continue;
    largest = of_row;
    pivot_row = i;
    pivot_col = k + (std::find_if(row, row + count, [&](T x) { return std::abs(x) == of_row; }) - row);
  }
  return largest;
}

/// The pivots of an elimination in their order: step k exchanges row k with row[k] and column k with col[k].
struct Pivots {
  Index* row;
  Index* col;
  Index rank = 0;

  /// Takes a matrix to the order of its pivots, and back. Its rows are those of A, its columns A's columns; of the
  /// inverse, and what has its shape, it is the other way round (transposed).
  template <class T>
  void order(Tokens<T> a, bool transposed = false) const {
    for (Index k = 0; k < rank; ++k) exchange(a, k, transposed);
  }
  template <class T>
  void restore(Tokens<T> a, bool transposed = false) const {
    for (Index k = rank; k-- > 0;) exchange(a, k, transposed);
  }

  template <class T>
  void exchange(Tokens<T> a, Index k, bool transposed = false) const {
    const Index i = (transposed ? col : row)[k], c = (transposed ? row : col)[k];
    if (i != k) std::swap_ranges(a.row(i), a.row(i) + a.cols(), a.row(k));
    if (c == k) return;
    for (Index r = 0; r < a.rows(); ++r) std::swap(a(r, c), a(r, k));
  }
};

/// Gauss-Jordan elimination with complete pivoting, in place: it ends, at the rank k, when no pivot above `tolerance`
/// times the first is left. With rows and columns in the order of their pivots it has then turned
///
///   A = [A11 A12; A21 A22]      into      [A11^-1  Y; -X  S],      X = A21 A11^-1,  Y = A11^-1 A12,
///
/// where S = A22 - A21 Y is what remains. A matrix with NaN or an infinity becomes NaN, of full rank.
template <class T>
Pivots eliminate(Tokens<T> a, std::type_identity_t<T> tolerance, Scratch& scratch) {
  const Index size = a.rows();
  Pivots pivots{scratch.take<Index>(size), scratch.take<Index>(size)};
  T nothing = 0;
  for (Index i = 0; i < size; ++i) nothing += T(0) * std::accumulate(a.row(i), a.row(i) + size, T(0));
  if (nothing != T(0)) {
    for (Index i = 0; i < size; ++i) std::fill_n(a.row(i), size, nothing);
    for (Index* of : {pivots.row, pivots.col}) std::iota(of, of + size, Index{0});
    pivots.rank = size;
    return pivots;
  }
  T threshold = 0;
  for (Index& k = pivots.rank; k < size; ++k) {
    const T largest = find_pivot(a, k, pivots.row[k], pivots.col[k]);
    if (k == 0) threshold = tolerance * largest;
    if (largest <= threshold) break;
    pivots.exchange(a, k);
    const T inverse = 1 / a(k, k);
    a(k, k) = 1;
    T* const pivot = a.row(k);
    for (Index c = 0; c < size; ++c) pivot[c] *= inverse;
    for (Index i = 0; i < size; ++i) {
      if (i == k) continue;
      T* const row = a.row(i);
      const T factor = -std::exchange(row[k], T(0));
      for_each_packet<T>(size, [&](auto by, Index c) {
        using V = typename decltype(by)::template Of<T>;
        pstoreu(row + c, pmadd(pset1<V>(factor), ploadu<V>(pivot + c), ploadu<V>(row + c)));
      });
    }
  }
  return pivots;
}

/// The parts of a matrix in the order of its pivots.
template <class T>
Tokens<T> block_of(Tokens<T> a, Index row, Index rows, Index col, Index cols) {
  return a.middle_rows(row, rows).middle_cols(col, cols);
}

/// Replaces A by the Moore-Penrose inverse of A_k, in place, and returns the rank k that it was given. A_k is A but for
/// the remainder S of its elimination, which counts as zero: too small to be told from rounding, or to be trusted. It
/// factors as A_k = [I; X] A11 [I Y], all of rank k, hence (MacDuffee's formula for a factorisation of full rank)
///
///   A_k^+ = [I; Y^T] (I + Y Y^T)^-1 A11^-1 (I + X^T X)^-1 [I X^T],
///
/// which is A^-1 = A11^-1 where k is the size of A. Time r^3 multiply-adds for an r x r matrix of full rank; allocates
/// nothing beside scratch. A matrix with NaN or an infinity gives NaN.
template <class T>
Index pseudo_invert(Tokens<T> a, std::type_identity_t<T> tolerance, Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  const Pivots pivots = eliminate(a, tolerance, scratch);
  const Index size = a.rows(), rank = pivots.rank, rest = size - rank;
  if (rest > 0) {
    const auto copy = [&](Tokens<const T> part) { return copy_small<T>(scratch, part); };
    const Tokens<T> a11 = copy(block_of(a, 0, rank, 0, rank));
    const Tokens<T> y = copy(block_of(a, 0, rank, rank, rest)), y_transposed = transpose_small(scratch, y);
    const Tokens<T> minus_x = copy(block_of(a, rank, rest, 0, rank));
    const Tokens<T> minus_x_transposed = transpose_small(scratch, minus_x);
    const Tokens<T> rows = take_product(scratch, rows_of(y), rank, y_transposed);
    const Tokens<T> cols = take_product(scratch, cols_of(minus_x), rank, minus_x);
    for (const Tokens<T>& gram : {rows, cols}) {
      for (Index i = 0; i < rank; ++i) gram(i, i) += 1;
      pseudo_invert(gram, 0, scratch);
    }
    const Tokens<T> half = take_product(scratch, rows_of(rows), rank, a11);
    const Tokens<T> core = take_product(scratch, rows_of(half), rank, cols);
    const Tokens<T> below = take_product(scratch, cols_of(y), rest, core);
    const auto write = [](Tokens<const T> part, Tokens<T> to) { copy_entries(part, to); };
    write(core, block_of(a, 0, rank, 0, rank));
    write(below, block_of(a, rank, rest, 0, rank));
    write(take_product(scratch, rows_of(core), rank, minus_x_transposed, -1), block_of(a, 0, rank, rank, rest));
    write(take_product(scratch, rows_of(below), rest, minus_x_transposed, -1), block_of(a, rank, rest, rank, rest));
  }
  pivots.restore(a, true);
  return rank;
}

/// The gradient of A from G, that of P = A_k^+ as pseudo_invert finds it with this tolerance. That of A_k is
///
///   H = -P^T G P^T + (I - A_k P) G^T P P^T + P^T P G^T (I - P A_k)
///
/// (Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973, for a constant rank); where A is of full rank it has only the
/// first term, and is that of A. Else A22 does not enter A_k = [A11 A12; A21 A21 A11^-1 A12], and that of A is
///
///   [H11 - X^T H22 Y^T   H12 + X^T H22; H21 + H22 Y^T   0].
template <class T>
Tokens<T> take_pseudo_inverse_gradient(Scratch& scratch, Tokens<const T> a, Tokens<const T> p, Tokens<const T> g,
                                       std::type_identity_t<T> tolerance) {
  const Index size = a.rows();
  const auto product = [&](Broadcast<T> x, Tokens<T> y, T factor = 1) {
    return take_product(scratch, x, size, y, factor);
  };
  const auto copy = [&](Tokens<const T> from) { return copy_small<T>(scratch, from); };
  const Tokens<T> eliminated = copy(a), a_k = copy(a), inverse = copy(p), grad_inverse = copy(g);
  const Pivots pivots = eliminate(eliminated, tolerance, scratch);
  const Index rank = pivots.rank, rest = size - rank;
  const bool full = rest == 0;
  if (!full) {
    pivots.order(a_k);
    pivots.order(inverse, true);
    pivots.order(grad_inverse, true);
  }
  const Tokens<T> inverse_transposed = transpose_small(scratch, inverse);
  const Tokens<T> grad = product(rows_of(product(cols_of(inverse), grad_inverse)), inverse_transposed, -1);
  if (full) return grad;

  const Tokens<T> y_transposed = transpose_small(scratch, copy(block_of(eliminated, 0, rank, rank, rest)));
  const Tokens<T> minus_x = copy(block_of(eliminated, rank, rest, 0, rank));
  const Tokens<T> a12 = copy(block_of(a_k, 0, rank, rank, rest));
  copy_entries(Tokens<const T>(take_product(scratch, rows_of(minus_x), rest, a12, -1)),
               block_of(a_k, rank, rest, rank, rest));
  const auto complement = [&](Tokens<T> x, Tokens<T> y) {
    const Tokens<T> projector = product(rows_of(x), y, -1);
    for (Index i = 0; i < size; ++i) projector(i, i) += 1;
    return projector;
  };
  const Tokens<T> left = product(rows_of(complement(a_k, inverse)), transpose_small(scratch, grad_inverse));
  add_product(rows_of(left), product(rows_of(inverse), inverse_transposed), grad);
  const Tokens<T> right = product(cols_of(grad_inverse), complement(inverse, a_k));
  add_product(rows_of(product(cols_of(inverse), inverse)), right, grad);

  const Tokens<T> h22 = copy(block_of(grad, rank, rest, rank, rest));
  const Tokens<T> below = take_product(scratch, rows_of(h22), rest, y_transposed);
  const auto add = [](Tokens<T> part, Tokens<T> to) { to.matrix() += part.matrix(); };
  add(take_product(scratch, cols_of(minus_x), rank, below), block_of(grad, 0, rank, 0, rank));
  add(take_product(scratch, cols_of(minus_x), rank, h22, -1), block_of(grad, 0, rank, rank, rest));
  add(below, block_of(grad, rank, rest, 0, rank));
  block_of(grad, rank, rest, rank, rest).matrix().setZero();
  pivots.restore(grad);
  return grad;
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
