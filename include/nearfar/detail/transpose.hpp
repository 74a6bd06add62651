#pragma once

#include <nearfar/detail/stores.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// to(c, r) = scale * from(r, c) for one square block of as many rows as a packet has lanes.
template <class P, class T>
NEARFAR_INLINE void transpose_block(const T* from, Index from_stride, const P& scale, T* to, Index to_stride,
                                    KeepOrPastCaches store) {
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  Eigen::internal::PacketBlock<P, width> block;
  for (int i = 0; i < width; ++i) block.packet[i] = pmul(ploadu<P>(from + i * from_stride), scale);
  if constexpr (width > 1) ptranspose(block);
  const auto store_rows = [&](auto store_row) {
    for (int i = 0; i < width; ++i) store_row(to + i * to_stride, block.packet[i]);
  };
  store.past ? store_rows(PastCaches{}) : store_rows(Keep{});
}

/// to(c, r) = factor * from(r, c) for a rows x cols matrix, and times factors[c] unless these are null.
template <class T>
NEARFAR_NO_INLINE void transpose(const T* from, Index from_stride, Index rows, Index cols, T factor, T* to,
                                 Index to_stride, KeepOrPastCaches store = {}, const T* factors = nullptr) {
  constexpr Index width = lanes<T>;
  const Packet<T> scale = pset1<Packet<T>>(factor);
  for (Index r = 0; r < rows; r += width) {
    Index c = 0;
    if (r + width <= rows) {
      for (; c + width <= cols; c += width) {
        const Packet<T> scales = factors == nullptr ? scale : pmul(scale, ploadu<Packet<T>>(factors + c));
        transpose_block(from + r * from_stride + c, from_stride, scales, to + c * to_stride + r, to_stride, store);
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
