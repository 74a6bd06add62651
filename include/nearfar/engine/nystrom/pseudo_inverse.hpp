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

/// The largest entry, by its absolute value, of the rows and columns from k on, and where it stands. `most` has that of
/// each of these columns.
template <class T>
T find_pivot(Tokens<T> a, Index k, const T* most, Index& pivot_row, Index& pivot_col) {
  pivot_col = std::max_element(most + k, most + a.cols()) - most;
  pivot_row = k;
  const T largest = most[pivot_col];
  while (pivot_row + 1 < a.rows() && std::abs(a(pivot_row, pivot_col)) != largest) ++pivot_row;
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

/// a_i += factor_i a_pivot for all other rows, and the largest entry, by its absolute value, of each column below.
template <class T>
void add_multiples(Tokens<T> a, Index pivot, const T* factor, T* most) {
  for_each_column_block<4, T>(a.cols(), [&](auto by, auto packets, Index first) {
    using V = typename decltype(by)::template Of<T>;
    constexpr int several = decltype(packets)::value;
    constexpr Index width = Index{sizeof(V) / sizeof(T)};
    V of_pivot[several], largest[several];
    NEARFAR_UNROLL for (int p = 0; p < several; ++p) {
      of_pivot[p] = ploadu<V>(a.row(pivot) + first + p * width);
      largest[p] = pset1<V>(T(0));
    }
    const auto add_to = [&](Index i, auto&& take) {
      const V multiple = pset1<V>(factor[i]);
      T* const row = a.row(i) + first;
      NEARFAR_UNROLL for (int p = 0; p < several; ++p) {
        const V sum = pmadd(multiple, of_pivot[p], ploadu<V>(row + p * width));
        pstoreu(row + p * width, sum);
        take(p, sum);
      }
    };
    for (Index i = 0; i < pivot; ++i) add_to(i, [](int, const V&) {});
    for (Index i = pivot + 1; i < a.rows(); ++i) {
      add_to(i, [&](int p, const V& sum) { largest[p] = pmax(largest[p], V(pabs(sum))); });
    }
    NEARFAR_UNROLL for (int p = 0; p < several; ++p) pstoreu(most + first + p * width, largest[p]);
  });
}

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
  if (size == 0) return pivots;
  const T nothing = T(0) * a.matrix().sum();
  if (nothing != T(0)) {
    for (Index i = 0; i < size; ++i) std::fill_n(a.row(i), size, nothing);
    for (Index* of : {pivots.row, pivots.col}) std::iota(of, of + size, Index{0});
    pivots.rank = size;
    return pivots;
  }
  T* const factor = scratch.take<T>(size);
  T* const most = scratch.take<T>(size);
  RowArray<T>(most, size) = a.matrix().cwiseAbs().colwise().maxCoeff();
  T threshold = 0;
  for (Index& k = pivots.rank; k < size; ++k) {
    const T largest = find_pivot(a, k, most, pivots.row[k], pivots.col[k]);
    if (k == 0) threshold = tolerance * largest;
    if (largest <= threshold) break;
    pivots.exchange(a, k);
    a.matrix().row(k) *= 1 / std::exchange(a(k, k), T(1));
    for (Index i = 0; i < size; ++i) {
      if (i != k) factor[i] = -std::exchange(a(i, k), T(0));
    }
    add_multiples(a, k, factor, most);
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
