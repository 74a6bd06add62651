#pragma once

#include <nearfar/detail/scratch.hpp>
#include <nearfar/detail/transpose.hpp>
#include <nearfar/engine/microkernel.hpp>

#include <algorithm>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// Matrices that fit in a cache, one a landmark or so a side. Each has room up to whole register tiles, so that a
// product has one tile to compile, and either side of it may be a transpose; what stands there reaches no result.

inline constexpr int small_rows = 8;

/// A rows x cols matrix of zeros.
template <class T>
Tokens<T> take_small(Scratch& scratch, Index rows, Index cols) {
  constexpr Index step = std::max<Index>(small_rows, lanes<T>);
  const Index stride = round_up(cols, step);
  const Tokens<T> small(scratch.take<T>(round_up(rows, step) * stride), rows, cols, stride);
  std::fill_n(small.data(), round_up(rows, step) * stride, T(0));
  return small;
}

/// to = from, entry by entry.
template <class S, class T>
void copy_entries(Tokens<const S> from, Tokens<T> to) {
  for (Index i = 0; i < to.rows(); ++i) {
    for (Index c = 0; c < to.cols(); ++c) to(i, c) = static_cast<T>(from(i, c));
  }
}

/// A copy, and the transpose.
template <class T, class S>
Tokens<T> copy_small(Scratch& scratch, Tokens<const S> from) {
  const Tokens<T> copy = take_small<T>(scratch, from.rows(), from.cols());
  copy_entries(from, copy);
  return copy;
}
template <class T>
Tokens<T> transpose_small(Scratch& scratch, Tokens<T> from) {
  const Tokens<T> to = take_small<T>(scratch, from.cols(), from.rows());
  transpose(from.data(), from.stride(), from.rows(), from.cols(), T(1), to.data(), to.stride());
  return to;
}

/// A small matrix as the left side of a product, as it stands or transposed.
template <class T>
Broadcast<T> rows_of(Tokens<T> small) {
  return {small.data(), small.stride(), 1};
}
template <class T>
Broadcast<T> cols_of(Tokens<T> small) {
  return {small.data(), 1, small.stride()};
}

/// c += factor * a b, all of them small.
template <class T>
void add_product(Broadcast<T> a, Tokens<T> b, Tokens<T> c, std::type_identity_t<T> factor = 1) {
  for (Index col = 0; col < c.cols(); col += lanes<T>) {
    multiply_groups<small_rows, 1>(
        a, round_up(c.rows(), small_rows), b.data() + col, b.stride(), b.rows(),
        [](Index, int) { return pset1<Packet<T>>(T(0)); },
        [&](Index r, int, const Packet<T>& product) {
          T* const to = c.row(r) + col;
          pstoreu(to, pmadd(pset1<Packet<T>>(factor), product, ploadu<Packet<T>>(to)));
        });
  }
}

/// factor * a b.
template <class T>
Tokens<T> take_product(Scratch& scratch, Broadcast<T> a, Index rows, Tokens<T> b, std::type_identity_t<T> factor = 1) {
  const Tokens<T> c = take_small<T>(scratch, rows, b.cols());
  add_product(a, b, c, factor);
  return c;
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
