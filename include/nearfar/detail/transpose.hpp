#pragma once

#include <nearfar/detail/simd.hpp>
#include <nearfar/detail/stores.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <utility>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

#if defined(NEARFAR_SHUFFLES)
/// The lanes of a and b in runs of `Run`: what b has in its even runs changes places with what a has in its odd ones.
template <int Run, class P, std::size_t... Lane>
NEARFAR_INLINE void exchange_runs(P& a, P& b, std::index_sequence<Lane...>) {
  typedef typename Eigen::internal::unpacket_traits<P>::type Lanes __attribute__((vector_size(sizeof(P))));
  constexpr int width = sizeof...(Lane);
  constexpr auto odd = [](int lane) { return lane / Run % 2 == 1; };
  const auto x = std::bit_cast<Lanes>(a);
  const auto y = std::bit_cast<Lanes>(b);
  a = std::bit_cast<P>(__builtin_shufflevector(x, y, (odd(int{Lane}) ? width + int{Lane} - Run : int{Lane})...));
  b = std::bit_cast<P>(__builtin_shufflevector(x, y, (odd(int{Lane}) ? width + int{Lane} : int{Lane} + Run)...));
}

/// Transposes both squares that stand side by side in `half` packets of twice as many lanes.
template <int Run, class P>
NEARFAR_INLINE void transpose_halves(P* packets) {
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  constexpr int half = width / 2;
  if constexpr (Run < half) {
    NEARFAR_UNROLL for (int i = 0; i < half; ++i) {
      if (i / Run % 2 == 0) exchange_runs<Run>(packets[i], packets[i + Run], std::make_index_sequence<width>{});
    }
    transpose_halves<2 * Run>(packets);
  }
}

template <class P, class Half, std::size_t... Lane>
NEARFAR_INLINE P join(const Half& low, const Half& high, std::index_sequence<Lane...>) {
  typedef typename Eigen::internal::unpacket_traits<P>::type Lanes __attribute__((vector_size(sizeof(Half))));
  return std::bit_cast<P>(__builtin_shufflevector(std::bit_cast<Lanes>(low), std::bit_cast<Lanes>(high), int{Lane}...));
}
#endif

/// The columns of a square block of as many rows as a packet has lanes.
template <class P, class T>
NEARFAR_INLINE void load_columns(const T* from, Index stride, P* columns) {
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
#if defined(NEARFAR_SHUFFLES)
  // Eigen's way with packets of 64 bytes takes twice as many shuffles, of which there is one a cycle.
  if constexpr (sizeof(P) == 64) {
    using Half = typename Eigen::internal::unpacket_traits<P>::half;
    constexpr int half = width / 2;
    const auto part = [&](int row, int column) { return ploadu<Half>(from + row * stride + column); };
    NEARFAR_UNROLL for (int i = 0; i < width; ++i) {
      const int row = i % half, column = i / half * half;
      columns[i] = join<P>(part(row, column), part(row + half, column), std::make_index_sequence<width>{});
    }
    transpose_halves<1>(columns);
    transpose_halves<1>(columns + half);
  } else
#endif
  {
    Eigen::internal::PacketBlock<P, width> block;
    NEARFAR_UNROLL for (int i = 0; i < width; ++i) block.packet[i] = ploadu<P>(from + i * stride);
    if constexpr (width > 1) ptranspose(block);
    std::copy_n(block.packet, width, columns);
  }
}

/// to(c, r) = factor * from(r, c) for such a block, and times factors[c] unless these are null.
template <class P, class T>
NEARFAR_INLINE void transpose_block(const T* from, Index from_stride, T factor, const T* factors, T* to,
                                    Index to_stride, KeepOrPastCaches store) {
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  P columns[width];
  load_columns(from, from_stride, columns);
  NEARFAR_UNROLL for (int c = 0; c < width; ++c) {
    columns[c] = pmul(columns[c], pset1<P>(factors == nullptr ? factor : factor * factors[c]));
  }
  const auto store_rows = [&](auto store_row) {
    NEARFAR_UNROLL for (int c = 0; c < width; ++c) store_row(to + c * to_stride, columns[c]);
  };
  store.past ? store_rows(PastCaches{}) : store_rows(Keep{});
}

/// to(c, r) = factor * from(r, c) for a rows x cols matrix, and times factors[c] unless these are null.
template <class T>
NEARFAR_NO_INLINE void transpose(const T* from, Index from_stride, Index rows, Index cols, T factor, T* to,
                                 Index to_stride, KeepOrPastCaches store = {}, const T* factors = nullptr) {
  constexpr Index width = lanes<T>;
  for (Index r = 0; r < rows; r += width) {
    Index c = 0;
    if (r + width <= rows) {
      for (; c + width <= cols; c += width) {
        transpose_block<Packet<T>>(from + r * from_stride + c, from_stride, factor,
                                   factors == nullptr ? nullptr : factors + c, to + c * to_stride + r, to_stride,
                                   store);
      }
    }
    for (Index i = r; i < std::min(r + width, rows); ++i) {
      for (Index j = c; j < cols; ++j) {
        const T scale_of_col = factors == nullptr ? factor : factor * factors[j];
        to[j * to_stride + i] = scale_of_col * from[i * from_stride + j];
      }
    }
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
