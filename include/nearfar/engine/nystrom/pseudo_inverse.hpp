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
      if constexpr (sizeof(V) == sizeof(T)) {
        of_row = std::max(of_row, T(size));
      } else {
        most = pmax(most, size);
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
/// nothing beside scratch. A matrix with NaN or an infinity gives NaN.
template <class T>
Index pseudo_invert(Tokens<T> a, std::type_identity_t<T> tolerance, Scratch& scratch) {
  const Scratch::Scope scope(scratch);
  const Index size = a.rows();
  T nothing = 0;
  for (Index i = 0; i < size; ++i) nothing += T(0) * std::accumulate(a.row(i), a.row(i) + size, T(0));
  if (nothing != T(0)) {
    for (Index i = 0; i < size; ++i) std::fill_n(a.row(i), size, nothing);
    return size;
  }
  const auto swap_rows = [&](Index i, Index k) {
    if (i != k) std::swap_ranges(a.row(i), a.row(i) + size, a.row(k));
  };
  const auto swap_cols = [&](Index c, Index k) {
    for (Index i = 0; i < size; ++i) std::swap(a(i, c), a(i, k));
  };
  Index* pivot_row = scratch.take<Index>(size);
  Index* pivot_col = scratch.take<Index>(size);
  T threshold = 0;
  Index rank = 0;
  for (; rank < size; ++rank) {
    const Index k = rank;
    const T largest = find_pivot(a, k, pivot_row[k], pivot_col[k]);
    if (k == 0) threshold = tolerance * largest;
    if (largest <= threshold) break;
    swap_rows(k, pivot_row[k]);
    swap_cols(k, pivot_col[k]);
    const T inverse = 1 / a(k, k);
    a(k, k) = 1;
    T* const pivots = a.row(k);
    for (Index c = 0; c < size; ++c) pivots[c] *= inverse;
    for (Index i = 0; i < size; ++i) {
      if (i == k) continue;
      T* const row = a.row(i);
      const T factor = -std::exchange(row[k], T(0));
      for_each_packet<T>(size, [&](auto by, Index c) {
        using V = typename decltype(by)::template Of<T>;
        pstoreu(row + c, pmadd(pset1<V>(factor), ploadu<V>(pivots + c), ploadu<V>(row + c)));
      });
    }
  }
  if (rank < size) {
    const Index rest = size - rank;
    const auto block = [&](Index row, Index rows, Index col, Index cols) {
      return a.middle_rows(row, rows).middle_cols(col, cols);
    };
    const auto copy = [&](Tokens<const T> part) { return copy_small<T>(scratch, part); };
    const Tokens<T> a11 = copy(block(0, rank, 0, rank));
    const Tokens<T> y = copy(block(0, rank, rank, rest)), y_transposed = transpose_small(scratch, y);
    const Tokens<T> minus_x = copy(block(rank, rest, 0, rank)), minus_x_transposed = transpose_small(scratch, minus_x);
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
    write(core, block(0, rank, 0, rank));
    write(below, block(rank, rest, 0, rank));
    write(take_product(scratch, rows_of(core), rank, minus_x_transposed, -1), block(0, rank, rank, rest));
    write(take_product(scratch, rows_of(below), rest, minus_x_transposed, -1), block(rank, rest, rank, rest));
  }
  for (Index k = rank; k-- > 0;) {
    swap_rows(k, pivot_col[k]);
    swap_cols(k, pivot_row[k]);
  }
  return rank;
}

/// The gradient of A from G, that of P = A^+:
///
///   -P^T G P^T + (I - A P) G^T P P^T + P^T P G^T (I - P A)
///
/// (Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973, for A of constant rank); an A of full rank has only the first
/// term.
template <class T>
Tokens<T> take_pseudo_inverse_gradient(Scratch& scratch, Tokens<T> a, Tokens<T> p, Tokens<T> g) {
  const Index size = a.rows();
  const auto product = [&](Broadcast<T> x, Tokens<T> y, T factor = 1) {
    return take_product(scratch, x, size, y, factor);
  };
  const Tokens<T> p_transposed = transpose_small(scratch, p);
  const Tokens<T> grad = product(rows_of(product(cols_of(p), g)), p_transposed, -1);
  // The trace of the projector P A is the rank.
  T trace = 0;
  for (Index i = 0; i < size; ++i) {
    for (Index j = 0; j < size; ++j) trace += p(i, j) * a(j, i);
  }
  if (std::lround(trace) == size) return grad;
  const auto complement = [&](Tokens<T> x, Tokens<T> y) {
    const Tokens<T> projector = product(rows_of(x), y, -1);
    for (Index i = 0; i < size; ++i) projector(i, i) += 1;
    return projector;
  };
  const Tokens<T> left = product(rows_of(complement(a, p)), transpose_small(scratch, g));
  add_product(rows_of(left), product(rows_of(p), p_transposed), grad);
  const Tokens<T> right = product(cols_of(g), complement(p, a));
  add_product(rows_of(product(cols_of(p), p)), right, grad);
  return grad;
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
