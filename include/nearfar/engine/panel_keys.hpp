#pragma once

#include <nearfar/engine/key_tile.hpp>
#include <nearfar/engine/microkernel.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The keys of a tile that a panel of queries meets, in whole groups.
struct PanelKeys {
  /// Those that some query of each vector sees, and the others of their groups.
  std::array<Range, panel_vectors> any{};
  /// Those of groups that every query sees: no mask is needed there.
  Range all = nowhere;

  PanelKeys() = default;

  /// Of the `count` queries from number `query` on.
  template <class T, class Band>
  PanelKeys(const KeyTile<T>& keys, const Band& band, Index query, Index count) {
    for (Index first = 0; first < count; first += lanes<T>) {
      const Range seen = keys.within(band.seen_by_any(query + first, std::min<Index>(lanes<T>, count - first)));
      if (seen.count() == 0) continue;
      any[static_cast<std::size_t>(first / lanes<T>)] = {seen.first / group_rows * group_rows,
                                                         round_up(seen.end, group_rows)};
    }
    const Range seen = keys.within(band.seen_by_all(query, count));
    const Index end = seen.end == keys.count() ? round_up(seen.end, group_rows) : seen.end / group_rows * group_rows;
    if (round_up(seen.first, group_rows) < end) all = {round_up(seen.first, group_rows), end};
  }

  /// The vectors [first, end) that meet the group at `place`.
  Range vectors_at(Index place) const {
    Range vectors{panel_vectors, 0};
    for (int v = 0; v < panel_vectors; ++v) {
      if (!holds(v, place)) continue;
      vectors = {std::min<Index>(vectors.first, v), v + 1};
    }
    return vectors;
  }

  /// Calls visit(std::integral_constant<int, count>, vector, keys) for stretches of keys that meet the same `count`
  /// vectors, from `vector` on.
  template <class Visit>
  void for_each_stretch(Visit&& visit) const {
    for (Index place = 0, next; place != nowhere.first; place = next) {
      next = nowhere.first;
      for (const Range& keys : any) {
        if (keys.count() > 0 && keys.first > place) next = std::min(next, keys.first);
        if (keys.end > place) next = std::min(next, keys.end);
      }
      const Range vectors = vectors_at(place);
      const Range keys{place, next};
      if (vectors.count() == 1) visit(std::integral_constant<int, 1>{}, vectors.first, keys);
      if (vectors.count() == 2) visit(std::integral_constant<int, 2>{}, vectors.first, keys);
      if (vectors.count() == 3) visit(std::integral_constant<int, 3>{}, vectors.first, keys);
    }
  }

  /// Calls visit(key) for the keys of a vector that a mask must look at.
  template <class Visit>
  void for_each_edge(int vector, Visit&& visit) const {
    const Range& keys = any[static_cast<std::size_t>(vector)];
    for (Index j = keys.first; j < std::min(all.first, keys.end); ++j) visit(j);
    for (Index j = std::max(all.end, keys.first); j < keys.end; ++j) visit(j);
  }

 private:
  static_assert(panel_vectors == 3, "for_each_stretch names each number of vectors.");
  static constexpr Range nowhere{std::numeric_limits<Index>::max(), std::numeric_limits<Index>::max()};

  bool holds(int vector, Index place) const {
    const Range& keys = any[static_cast<std::size_t>(vector)];
    return keys.first <= place && place < keys.end;
  }
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
