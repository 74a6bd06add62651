#pragma once

#include <nearfar/engine/key_tile.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <array>
#include <cstddef>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The mask of a panel whose queries all see all keys at hand: scores stay as they are.
struct AllSeen {
  template <class P>
  NEARFAR_INLINE P operator()(Index, int, const P& score) const {
    return score;
  }
};

/// -infinity, then infinity, then -infinity, a vector each: loaded from some place on, it says which lanes of a vector
/// lie before, within or after a range.
template <class T>
inline constexpr auto lane_limits = [] {
  std::array<T, 3 * lanes<T>> limits{};
  for (std::size_t i = 0; i < limits.size(); ++i) limits[i] = i / lanes<T> == 1 ? infinity<T> : -infinity<T>;
  return limits;
}();

/// The mask of a panel that the edges of a band cross: the score of key j of a tile becomes -infinity on the lanes
/// whose queries do not see it. Lane 0 holds query `first`.
template <class T, class Band>
struct LaneMask {
  const Band& band;
  const KeyTile<T>& keys;
  Index first;

  NEARFAR_INLINE Packet<T> operator()(Index j, int v, const Packet<T>& score) const {
    constexpr Index width = lanes<T>;
    const Range seeing = band.seeing(keys.position(j));
    const Index lane = first + v * width;
    const Index from = std::clamp<Index>(seeing.first - lane, 0, width);
    const Index end = std::clamp<Index>(seeing.end - lane, 0, width);
    // The smaller of a score and infinity is the score; of two operands, one of them NaN, pmin gives the first.
    const T* limits = lane_limits<T>.data();
    return pmin(ploadu<Packet<T>>(limits + width - from), pmin(ploadu<Packet<T>>(limits + 2 * width - end), score));
  }
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
