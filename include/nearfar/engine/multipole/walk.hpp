#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/engine/multipole/far_field.hpp>
#include <nearfar/engine/softmax/key_tile.hpp>
#include <nearfar/engine/tiles.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The walk of a tile of queries of one head over all that it sees of one sequence: first the near field, token by
/// token, then the far field by its interaction lists. Keys and values are those from the tree's first token on.
///
/// What it meets it copies into a key tile, and calls visit(band) as often as that is full or the walk at an end:
/// forward and backward differ in this visit alone. Near keys stand at their token's place, pooled keys at their row's.
template <class T>
class MultipoleWalk {
 public:
  MultipoleWalk(const Hierarchy& tree, const Inputs<T>& inputs, const FarField<T>& far, Index dim, bool causal)
      : tree_(tree), inputs_(inputs), far_(far), dim_(dim), causal_(causal) {}

  /// `lookahead` is that of the tile of queries: each visit fetches what the next one reads.
  template <class Visit>
  void near_field(const Tile& tile, Index key_head, KeyTile<T>& keys, Lookahead& lookahead, Visit&& visit) const {
    const NearField near(tree_, causal_);
    const Tokens<const T> key = inputs_.key.head(key_head, dim_);
    const Tokens<const T> value = inputs_.value.head(key_head, dim_);
    const Range seen = near.seen_by_any(tile.first, tile.count);
    const std::uint8_t* mask = key_mask(inputs_);
    Range rows{seen.first - tree_.first_token(), seen.end - tree_.first_token()};
    while (rows.count() > 0) {
      rows.first = keys.take(key, value, mask, rows, tree_.first_token());
      const Index next = std::min(rows.count(), KeyTile<T>::capacity);
      lookahead.clear();
      lookahead.add(key.middle_rows(rows.first, next));
      lookahead.add(value.middle_rows(rows.first, next));
      if (keys.count() > 0) visit(near);
      keys.clear();
    }
  }

  /// The first keys that a tile of queries will read.
  void announce(const Tile& tile, Index key_head, Lookahead& lookahead) const {
    const Range seen = NearField(tree_, causal_).seen_by_any(tile.first, tile.count);
    const Index first = seen.first - tree_.first_token();
    const Index rows = std::min(seen.count(), KeyTile<T>::capacity);
    lookahead.add(inputs_.key.row(first) + key_head * dim_, inputs_.key.stride(), rows, dim_);
    lookahead.add(inputs_.value.row(first) + key_head * dim_, inputs_.value.stride(), rows, dim_);
  }

  /// The interaction lists of all levels. Several levels, from `top` down to `bottom`, share a visit.
  template <class Visit>
  void far_field(const Tile& tile, Index key_head, KeyTile<T>& keys, Visit&& visit) const {
    const Index levels_a_visit = std::max<Index>((KeyTile<T>::capacity - 1) / tree_.longest_list(), 1);
    for (Index top = tree_.levels(), bottom; top >= 1; top = bottom - 1) {
      bottom = std::max<Index>(top - levels_a_visit + 1, 1);
      const Index width = tree_.level(top).width;
      for (Index g = tile.first / width; g * width < tile.first + tile.count; ++g) {
        descend(top, bottom, g, tile, key_head, keys, visit);
      }
    }
  }

  /// What pooled queries [first, first + count) of level l see at their own level: of the same rows each visit takes
  /// what lies to the left of a query, then what lies to its right.
  template <class Visit>
  void far_level(Index l, Index first, Index count, Index key_head, KeyTile<T>& keys, Visit&& visit) const {
    const Index origin = tree_.level(l).first_row;
    const InteractionSide left(tree_, l, false);
    const InteractionSide right(tree_, l, true);
    const auto both = [&] {
      visit(left);
      visit(right);
    };
    append(key_head, {origin + left.seen_by_any(first, count).first, origin + right.seen_by_any(first, count).end},
           origin, keys, both);
    if (keys.count() > 0) both();
    keys.clear();
  }

 private:
  // What the queries of group g of level l see of the far field at this level and, going down to its children, at those
  // until `bottom`. A list is copied once for all groups that descend from the one whose list it is.
  template <class Visit>
  void descend(Index l, Index bottom, Index g, const Tile& tile, Index key_head, KeyTile<T>& keys,
               Visit&& visit) const {
    const Index width = tree_.level(l).width;
    const Range members{std::max(g * width, tile.first), std::min((g + 1) * width, tile.first + tile.count)};
    if (members.count() == 0) return;
    const OfGroup group(members);
    const Index inherited = keys.count();
    const InteractionList list = tree_.interaction_list(l, g, causal_);
    for (const Range& rows : {list.left, list.right}) append(key_head, rows, 0, keys, [&] { visit(group); });
    if (l > bottom) {
      descend(l - 1, bottom, 2 * g, tile, key_head, keys, visit);
      descend(l - 1, bottom, 2 * g + 1, tile, key_head, keys, visit);
    } else if (keys.count() > 0) {
      visit(group);
    }
    keys.truncate(inherited);
  }

  // Appends pooled rows, at places counted from `origin`; a tile that is full is emptied by `flush`.
  template <class Flush>
  void append(Index key_head, Range rows, Index origin, KeyTile<T>& keys, Flush&& flush) const {
    for (Index row = rows.first; row < rows.end; ++row) {
      if (far_.mass[row] == T(0)) continue;
      keys.append(far_.key.row(key_head, row), far_.value.row(key_head, row), row - origin, far_.bias[row]);
      if (!keys.full()) continue;
      flush();
      keys.clear();
    }
  }

  const Hierarchy& tree_;
  const Inputs<T>& inputs_;
  const FarField<T>& far_;
  Index dim_;
  bool causal_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
