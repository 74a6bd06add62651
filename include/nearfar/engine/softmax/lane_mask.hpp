#pragma once

#include <nearfar/engine/softmax/key_tile.hpp>
#include <nearfar/online_softmax.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The mask of a vector of queries that the edges of a band cross: the score of key j of a tile becomes -infinity on
/// the lanes whose queries do not see it. Lane 0 holds query `first`.
template <class T, Visibility B>
struct LaneMask {
  const B& band;
  const KeyTile<T>& keys;
  Index first;

  NEARFAR_INLINE Packet<T> operator()(Index j, const Packet<T>& score) const {
    const Range seeing = band.seeing(keys.position(j));
    const Packet<T> lane = plset<Packet<T>>(T(0));
    const Packet<T> hidden = pset1<Packet<T>>(-infinity<T>);
    const auto place = [&](Index query) { return pset1<Packet<T>>(static_cast<T>(query - first)); };
    Packet<T> shown = score;
    if (seeing.end < first + lanes<T>) shown = select_less(lane, place(seeing.end), shown, hidden);
    if (seeing.first > first) shown = select_less(lane, place(seeing.first), hidden, shown);
    return shown;
  }
};

/// Hides the scores at `scores`, a row of `width` a key, of the keys that not `all` of the queries of a vector see;
/// take(masked) may look at what is left.
template <class T, Visibility B, class Take>
NEARFAR_INLINE void hide(const LaneMask<T, B>& mask, Range keys, Range all, T* scores, Index width, Take&& take) {
  for (const Range& edge : {Range{keys.first, all.first}, Range{all.end, keys.end}}) {
    for (Index j = edge.first; j < edge.end; ++j) {
      const Packet<T> masked = mask(j, ploadu<Packet<T>>(scores + j * width));
      pstoreu(scores + j * width, masked);
      take(masked);
    }
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
