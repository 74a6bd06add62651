#pragma once

#include <nearfar/engine/key_tile.hpp>
#include <nearfar/engine/microkernel.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The keys of a tile that a panel of two vectors meets: those that some query sees, from `shared` on for both vectors
/// at once, before it for the first vector alone and after it for the second, and those that every query sees.
///
/// Ends that would fall between register tiles of `step` keys move outward, to keys that a mask must hide, or inward.
struct PanelKeys {
  Range any;
  Range shared;
  Range all;

  PanelKeys() = default;

  template <class T, class Band>
  PanelKeys(const KeyTile<T>& keys, const Band& band, Index query, Index count, Index step) {
    constexpr Index full_step = tile_rows<2>;
    const auto down = [&](Index place) { return place / step * step; };
    const auto up = [&](Index place) { return std::min(round_up(place, step), keys.count()); };
    any = keys.within(band.seen_by_any(query, count));
    if (any.count() == 0) {
      any = {};
      return;
    }
    any = {down(any.first), up(any.end)};
    if (count <= lanes<T>) {
      shared = all = {any.end, any.end};
      return;
    }
    const Range first = keys.within(band.seen_by_any(query, lanes<T>));
    const Range last = keys.within(band.seen_by_any(query + lanes<T>, count - lanes<T>));
    shared = {std::clamp(down(last.first), any.first, any.end), std::clamp(up(first.end), any.first, any.end)};
    all = keys.within(band.seen_by_all(query, count));
    all = {std::min(round_up(all.first, full_step), shared.end),
           all.end == keys.count() ? all.end : all.end / full_step * full_step};
    if (all.count() == 0) all = {shared.end, shared.end};
  }

  Range before() const { return {any.first, shared.first}; }
  Range after() const { return {shared.end, any.end}; }
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
