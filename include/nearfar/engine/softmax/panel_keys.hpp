#pragma once

#include <nearfar/detail/function_ref.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/engine/softmax/key_tile.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The keys of a tile that a panel of queries meets, in whole groups.
class PanelKeys {
 public:
  /// Of the `count` queries from number `query` on.
  template <class T, Visibility B>
  PanelKeys(const KeyTile<T>& keys, const B& band, Index query, Index count)
      : PanelKeys(
            keys, [&](Index first, Index queries) { return band.seen_by_any(first, queries); },
            [&](Index first, Index queries) { return band.seen_by_all(first, queries); }, query, count) {}

  /// The keys that some query of a vector sees, and the others of their groups: all that the vector meets.
  Range any(int vector) const { return any_[static_cast<std::size_t>(vector)]; }

  /// Calls visit(std::integral_constant<int, count>, vector, keys, all) for stretches of keys that meet the same
  /// `count` vectors, from `vector` on, and those of them that every query of these sees: there no mask is needed.
  template <class Visit>
  void for_each_stretch(Visit&& visit) const {
    constexpr Index none = std::numeric_limits<Index>::max();
    for (Index place = 0, next; place != none; place = next) {
      next = none;
      int first = panel_vectors, end = 0;
      Range all{place, none};
      for (int v = 0; v < panel_vectors; ++v) {
        const Range keys = any(v);
        if (keys.count() == 0 || keys.end <= place) continue;
        if (keys.first > place) {
          next = std::min(next, keys.first);
          continue;
        }
        next = std::min(next, keys.end);
        first = std::min(first, v);
        end = v + 1;
        all = {std::max(all.first, all_[static_cast<std::size_t>(v)].first),
               std::min(all.end, all_[static_cast<std::size_t>(v)].end)};
      }
      const Range keys{place, next};
      all = {std::min(all.first, next), std::min(all.end, next)};
      if (all.count() == 0) all = {next, next};
      if (end - first == 1) visit(std::integral_constant<int, 1>{}, first, keys, all);
      if (end - first == 2) visit(std::integral_constant<int, 2>{}, first, keys, all);
      if (end - first == 3) visit(std::integral_constant<int, 3>{}, first, keys, all);
    }
  }

 private:
  static_assert(panel_vectors == 3, "for_each_stretch names each number of vectors.");

  // Compiled once for all bands.
  using Seen = FunctionRef<Range(Index, Index)>;
  template <class T>
  PanelKeys(const KeyTile<T>& keys, Seen seen_by_any, Seen seen_by_all, Index query, Index count) {
    if (keys.within(seen_by_any(query, count)).count() == 0) return;
    for (Index first = 0; first < count; first += lanes<T>) {
      const Index queries = std::min<Index>(lanes<T>, count - first);
      const Range any = keys.within(seen_by_any(query + first, queries));
      const Range all = keys.within(seen_by_all(query + first, queries));
      const auto vector = static_cast<std::size_t>(first / lanes<T>);
      // Where a vector sees nothing between two others that meet one group, it meets that group with them.
      any_[vector] = {down(any.first), up(std::max(any.first, any.end))};
      all_[vector] = {up(all.first), all.end == keys.count() ? up(all.end) : down(all.end)};
    }
  }

  static Index down(Index place) { return place / group_rows * group_rows; }
  static Index up(Index place) { return round_up(place, group_rows); }

  std::array<Range, panel_vectors> any_{};
  std::array<Range, panel_vectors> all_{};  // in whole groups
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
