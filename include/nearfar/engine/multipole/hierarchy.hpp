#pragma once

#include <nearfar/mask.hpp>

#include <array>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// One level of far groups.
struct Level {
  Index width = 0;        ///< tokens a group: block * 2^(l-1) at level l
  Index groups = 0;       ///< groups that hold a token; the last may be ragged
  Index first_row = 0;    ///< where the pooled rows of group 0 begin, or would begin, among those of all levels
  Index first_group = 0;  ///< those before it have no rows
};

/// The pooled rows that one group sees at its own level, before and after it.
struct InteractionList {
  Range left;
  Range right;
};

/// The tree of the multipole method over the tokens of one sequence.
///
/// Blocks of `block` tokens are the leaves; level l = 1 .. levels() has groups of block * 2^(l-1) tokens, so that group
/// g of level l is the parent of groups 2g and 2g + 1 of level l - 1, and the groups of level 1 are the blocks. A group
/// is pooled to `rank` rows. There are as many levels as it takes until at most four groups are left, none of which is
/// too far to be in an interaction list:
///
///   levels = max(0, ceil(log2(tokens / block)) - 1)
///
/// Row r of group g of level l is row first_row + g * rank + r of all pooled rows, of which there are
/// about 2 * tokens * rank / block.
///
/// A stream that has come to block `first_block` has no need of the whole tree: of the groups before, at most three a
/// level are in interaction lists or have a parent to come, the others have no rows. It has the levels that it will
/// need later too, `least_levels` or more.
class Hierarchy {
 public:
  Hierarchy(Index tokens, Index block, Index rank, Index first_block = 0, Index least_levels = 0)
      : tokens_(tokens), block_(block), rank_(rank), first_block_(first_block) {
    Index groups = blocks();
    for (Index width = block; groups > 2 || levels_ < least_levels; width *= 2, groups = (groups + 1) / 2) {
      const Index first = std::max<Index>(first_block / 2 - 1, 0) * 2;
      level_[static_cast<std::size_t>(++levels_)] = {width, groups, rows_ - first * rank, first};
      // A last group without a sibling is given one that holds no token: every parent has two children.
      rows_ += (groups + groups % 2 - first) * rank;
      first_block /= 2;
    }
  }

  Index tokens() const { return tokens_; }
  Index block() const { return block_; }
  Index rank() const { return rank_; }
  Index blocks() const { return tokens_ == 0 ? 0 : (tokens_ - 1) / block_ + 1; }
  Index levels() const { return levels_; }

  /// The first token that is at hand itself: the near field of the first block begins with it.
  Index first_token() const { return std::max<Index>(first_block_ - 1, 0) * block_; }

  /// The tokens that are yet to be pooled, and the groups of a level that hold some of them.
  Range new_tokens() const { return {first_block_ * block_, tokens_}; }
  Range new_groups(Index l) const {
    const Index shift = l - 1;
    return {first_block_ >> shift, blocks() > first_block_ ? ((blocks() - 1) >> shift) + 1 : 0};
  }

  /// The pooled rows of all levels.
  Index rows() const { return rows_; }

  const Level& level(Index l) const { return level_[static_cast<std::size_t>(l)]; }

  /// Tokens of a sub-block, the share of a group for which one of its `rank` rows stands.
  Index sub_block(Index l) const { return level(l).width / rank_; }

  /// The rows of a tile of at most `capacity` queries: whole blocks where they fit, whose queries share their keys.
  Index rows_of_blocks(Index capacity) const { return block_ < capacity ? capacity / block_ * block_ : capacity; }

  /// The tokens of sub-block `row` of level 1.
  Range sub_block_tokens(Index row) const {
    const Index width = sub_block(1);
    return {std::min(row * width, tokens_), std::min((row + 1) * width, tokens_)};
  }

  /// The tokens of blocks b - 1, b and b + 1: the near field of block b, seen one by one.
  Range near_field(Index b) const {
    return {std::max<Index>(b - 1, 0) * block_, b + 2 >= blocks() ? tokens_ : (b + 2) * block_};
  }

  /// How many rows an interaction list has at most: of six children of neighbours, three are neighbours.
  Index longest_list() const { return 3 * rank_; }

  /// The interaction list of group g of level l: the children of its parent's neighbours, and of its parent, that are
  /// not its own neighbours. Over all levels these and the near field hold every token once. Causal: only those before.
  InteractionList interaction_list(Index l, Index g, bool causal) const {
    const Index parent = g / 2;
    const Range left{std::max<Index>(2 * (parent - 1), 0), g - 1};
    const Range right{g + 2, causal ? 0 : std::min(2 * (parent + 1) + 2, level(l).groups)};
    return {rows_of(l, left), rows_of(l, right)};
  }

 private:
  Range rows_of(Index l, Range groups) const {
    const Index first = level(l).first_row + groups.first * rank_;
    return {first, first + groups.count() * rank_};
  }

  Index tokens_;
  Index block_;
  Index rank_;
  Index first_block_;
  Index levels_ = 0;
  Index rows_ = 0;
  std::array<Level, 64> level_{};
};

/// Which keys of the near field each query of a sequence sees: those of its own block and of the two beside it.
class NearField {
 public:
  NearField(const Hierarchy& tree, bool causal) : tree_(tree), causal_(causal) {}

  Index first(Index query) const { return tree_.near_field(query / tree_.block()).first; }
  Index end(Index query) const { return causal_ ? query + 1 : tree_.near_field(query / tree_.block()).end; }

  Range seen_by_any(Index query, Index count) const { return {first(query), end(query + count - 1)}; }
  Range seen_by_all(Index query, Index count) const { return {first(query + count - 1), end(query)}; }
  /// They need not all exist.
  Range seeing(Index key) const {
    const Index block = key / tree_.block();
    return {causal_ ? key : tree_.near_field(block).first, (block + 2) * tree_.block()};
  }

 private:
  const Hierarchy& tree_;
  bool causal_;
};

/// Which keys of an interaction list each query sees: all of them if it belongs to the group whose list it is.
class OfGroup {
 public:
  explicit OfGroup(Range queries) : queries_(queries) {}

  Range seen_by_any(Index query, Index count) const {
    return query < queries_.end && queries_.first < query + count ? everything : Range{};
  }
  Range seen_by_all(Index query, Index count) const {
    return queries_.first <= query && query + count <= queries_.end ? everything : Range{};
  }
  Range seeing(Index) const { return queries_; }

 private:
  static constexpr Range everything{0, Window::unlimited};
  Range queries_;
};

/// Which pooled keys of a level each pooled query of the same level sees on one side: the halves of all interaction
/// lists at once. Queries and keys are counted by sub-blocks of the level.
class InteractionSide {
 public:
  InteractionSide(const Hierarchy& tree, Index l, bool right)
      : rank_(tree.rank()), rows_(tree.level(l).groups * tree.rank()), right_(right) {}

  Range seen_by_any(Index query, Index count) const { return {seen(query).first, seen(query + count - 1).end}; }
  Range seen_by_all(Index query, Index count) const { return {seen(query + count - 1).first, seen(query).end}; }
  Range seeing(Index key) const { return side(key / rank_, !right_); }

 private:
  Range seen(Index query) const {
    const Range all = side(query / rank_, right_);
    return {std::max<Index>(all.first, 0), std::min(all.end, rows_)};
  }

  // The relation is symmetric: what a group sees to the right sees it to the left.
  Range side(Index group, bool right) const {
    const Index parent = group / 2;
    return right ? Range{(group + 2) * rank_, (2 * parent + 4) * rank_}
                 : Range{(2 * parent - 2) * rank_, (group - 1) * rank_};
  }

  Index rank_;
  Index rows_;
  bool right_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
