#pragma once

#include <nearfar/attention.hpp>
#include <nearfar/detail/simd.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Where queries meet few keys, rows are best multiplied as they stand, features on the lanes, so many at once: their
/// products are kept as [key][query].
inline constexpr Index queries_at_once = 4;
inline constexpr Index keys_at_once = vector_registers >= 32 ? 4 : 2;
inline constexpr Index products_at_once = queries_at_once * keys_at_once;

/// The vectors that hold them.
template <class T>
inline constexpr Index product_packets = ceil_div(products_at_once, lanes<T>);

/// How many vectors of features are summed up at once for each of four rows.
inline constexpr int feature_vectors = vector_registers >= 32 ? 4 : 2;

/// The most keys in a window that is narrow in this sense.
inline constexpr Index most_narrow_keys = 64;

/// Whether a window is narrow, and narrow enough for its heads: sums across the lanes cost the less the wider a head.
template <class T>
bool meets_by_rows(const Heads& heads, Window window) {
  const Index least = std::min(heads.dim, heads.value_width());
  const Index most = std::min(most_narrow_keys, round_up(least, lanes<T>) + lanes<T>);
  return lanes<T> % queries_at_once == 0 && least >= lanes<T> && window.left < most && window.right < most &&
         window.left + window.right < most;
}

/// Copies a row of at least one vector, the last vector maybe over a part of the one before. Gives zeros, with NaN
/// among them if any number of the row is not finite.
template <class T>
NEARFAR_INLINE Packet<T> copy_row(const T* from, Index width, T* to) {
  Packet<T> zeros = pset1<Packet<T>>(T(0));
  const auto copy_vector = [&](Index c) {
    const Packet<T> numbers = ploadu<Packet<T>>(from + c);
    zeros = por(zeros, zero_if_finite(numbers));
    pstoreu(to + c, numbers);
  };
  Index c = 0;
  for (; c + lanes<T> <= width; c += lanes<T>) copy_vector(c);
  if (c < width) copy_vector(width - lanes<T>);
  return zeros;
}

/// The same, and fills it up with zeros.
template <class T>
NEARFAR_INLINE Packet<T> copy_filled(const T* from, Index width, T* to) {
  const Index whole = width / lanes<T> * lanes<T>;
  if (whole < width) pstoreu(to + whole, pset1<Packet<T>>(T(0)));
  return copy_row(from, width, to);
}

/// The products of rows of `dim` numbers, filled up, each summed over the lanes of its accumulator.
template <class T>
NEARFAR_INLINE void multiply_rows(const T* const (&query)[queries_at_once], const T* const (&key)[keys_at_once],
                                  Index dim, Packet<T> (&products)[product_packets<T>]) {
  Packet<T> product[products_at_once];
  NEARFAR_UNROLL for (Index s = 0; s < products_at_once; ++s) product[s] = pset1<Packet<T>>(T(0));
  for (Index c = 0; c < dim; c += lanes<T>) {
    Packet<T> q[queries_at_once];
    NEARFAR_UNROLL for (Index i = 0; i < queries_at_once; ++i) q[i] = load_once<Packet<T>>(query[i] + c);
    NEARFAR_UNROLL for (Index k = 0; k < keys_at_once; ++k) {
      const Packet<T> features = load_once<Packet<T>>(key[k] + c);
      NEARFAR_UNROLL for (Index i = 0; i < queries_at_once; ++i) {
        product[k * queries_at_once + i] = pmadd(q[i], features, product[k * queries_at_once + i]);
      }
    }
  }
  NEARFAR_UNROLL for (Index p = 0; p < product_packets<T>; ++p) products[p] = sum_lanes(product + p * lanes<T>);
}

/// Calls visit(std::integral_constant<int, vectors>, c) for the columns of a row that is filled up.
template <class T, class Visit>
NEARFAR_INLINE void for_each_feature_block(Index dim, Visit&& visit) {
  Index c = 0;
  for (; c + feature_vectors * lanes<T> <= dim; c += feature_vectors * lanes<T>) {
    visit(std::integral_constant<int, feature_vectors>{}, c);
  }
  for (; c < dim; c += lanes<T>) visit(std::integral_constant<int, 1>{}, c);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
