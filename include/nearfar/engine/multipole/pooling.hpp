#pragma once

#include <nearfar/context.hpp>
#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/simd.hpp>
#include <nearfar/engine/multipole/hierarchy.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Rows of `dim` features for each of several heads: packed side by side as tokens are, or one head after another as
/// pooled rows are, whose walks then read memory in order.
template <class T>
struct HeadRows {
  T* data = nullptr;
  Index row_stride = 0;
  Index head_stride = 0;
  Index heads = 0;
  Index dim = 0;

  T* row(Index head, Index i) const { return data + head * head_stride + i * row_stride; }

  /// The features of row i of one head.
  RowArray<T> features(Index head, Index i) const { return {row(head, i), dim}; }

  /// `count` rows of one head as tokens of one head.
  Tokens<T> tokens(Index head, Index first, Index count) const { return {row(head, first), count, dim, row_stride}; }

  void set_zero(Index i) const {
    for (Index head = 0; head < heads; ++head) std::fill_n(row(head, i), dim, T(0));
  }

  operator HeadRows<const T>() const requires(!std::is_const_v<T>) {
    return {data, row_stride, head_stride, heads, dim};
  }
};

/// Tokens seen as rows of `heads` heads.
template <class T>
HeadRows<T> head_rows(Tokens<T> tokens, Index heads) {
  const Index dim = tokens.cols() / heads;
  return {tokens.data(), tokens.stride(), dim, heads, dim};
}

/// Room for `rows` rows of each head, one head after another.
template <class T>
HeadRows<T> take_head_rows(Work& work, Index rows, Index heads, Index dim) {
  return {work.take<T>(heads * rows * dim), dim, rows * dim, heads, dim};
}

/// The same, all zero: where gradients are summed.
template <class T>
HeadRows<T> take_zero_head_rows(Work& work, Index rows, Index heads, Index dim) {
  const HeadRows<T> zero = take_head_rows<T>(work, rows, heads, dim);
  std::fill_n(zero.data, heads * rows * dim, T(0));
  return zero;
}

/// How many tokens each pooled row of a hierarchy stands for: of its sub-block, those that exist and are not masked.
/// Leaves the rows of groups without new tokens as they are. `mask` begins with the tree's first token.
template <class T>
void count_tokens(const Hierarchy& tree, const std::uint8_t* mask, T* count) {
  for (Index l = 1; l <= tree.levels(); ++l) {
    const Level& level = tree.level(l);
    const Range groups = tree.new_groups(l);
    const Index end = level.groups + level.groups % 2;
    std::fill(count + (level.first_row + groups.first * tree.rank()), count + (level.first_row + end * tree.rank()),
              T(0));
    for (Index row = groups.first * tree.rank(); row < groups.end * tree.rank(); ++row) {
      T& seen = count[level.first_row + row];
      if (l > 1) {
        const Index child = tree.level(l - 1).first_row + 2 * row;
        seen = count[child] + count[child + 1];
      } else {
        const Range tokens = tree.sub_block_tokens(row);
        Index present = tokens.count();
        for (Index i = tokens.first; mask != nullptr && i < tokens.end; ++i) {
          present -= mask[i - tree.first_token()] == 0;
        }
        seen = static_cast<T>(present);
      }
    }
  }
}

/// Gives all rows of a group an equal share of its tokens, as learned pooling has it, where every row pools them all.
template <class T>
void share_mass(const Hierarchy& tree, T* mass) {
  for (Index l = 1; l <= tree.levels(); ++l) {
    const Range groups = tree.new_groups(l);
    for (Index g = groups.first; g < groups.end; ++g) {
      T* const group = mass + (tree.level(l).first_row + g * tree.rank());
      const T share = std::accumulate(group, group + tree.rank(), T(0)) / static_cast<T>(tree.rank());
      std::fill(group, group + tree.rank(), share);
    }
  }
}

/// The walk of a hierarchy from its leaves to its root and back, over the threads: trees of some levels are one task
/// each, whose rows stay in the cache from level to level, and the few rows above them are the caller's.
///
/// `visit(l, rows)` handles the pooled rows [rows.first, rows.end) of level l, counted within the level: those of
/// groups that hold new tokens.
class TreeWalk {
 public:
  explicit TreeWalk(const Hierarchy& tree) : tree_(tree) {
    while (levels_ < tree.levels() && (levels_ == 0 || tree.level(levels_ + 1).width <= task_tokens)) ++levels_;
    if (levels_ > 0) subtrees_ = tree.new_groups(levels_);
  }

  /// Children before their parents: the upward pass.
  template <class Visit>
  void upward(Work& work, Visit&& visit) const {
    work.for_each(subtrees_.count(), [&](Index subtree, Scratch&) {
      for (Index l = 1; l <= levels_; ++l) visit(l, rows(subtree, l));
    });
    for (Index l = levels_ + 1; l <= tree_.levels(); ++l) visit(l, rows(l, tree_.new_groups(l)));
  }

  /// Parents before their children: the downward pass.
  template <class Visit>
  void downward(Work& work, Visit&& visit) const {
    for (Index l = tree_.levels(); l > levels_; --l) visit(l, rows(l, tree_.new_groups(l)));
    work.for_each(subtrees_.count(), [&](Index subtree, Scratch&) {
      for (Index l = levels_; l >= 1; --l) visit(l, rows(subtree, l));
    });
  }

 private:
  static constexpr Index task_tokens = 1024;

  Range rows(Index subtree, Index l) const {
    const Index groups = Index{1} << (levels_ - l);
    const Index first = (subtrees_.first + subtree) * groups;
    return rows(l, {first, first + groups});
  }

  Range rows(Index l, Range groups) const {
    const Range all = tree_.new_groups(l);
    return {std::max(groups.first, all.first) * tree_.rank(), std::min(groups.end, all.end) * tree_.rank()};
  }

  const Hierarchy& tree_;
  Index levels_ = 0;  // of a subtree
  Range subtrees_;
};

/// Adds up to four rows of one head to a sum: four at once, and in the same order, because the sum is then read and
/// written less often.
template <class T>
void add_rows(const HeadRows<const T>& rows, Index head, const Index* row, Index count, T* sum) {
  if (count == 4) {
    const auto add_in_turn = [](const auto& so_far, const auto&... next) {
      auto total = so_far;
      ((total = padd(total, next)), ...);
      return total;
    };
    return combine(rows.dim, sum, add_in_turn, sum, rows.row(head, row[0]), rows.row(head, row[1]),
                   rows.row(head, row[2]), rows.row(head, row[3]));
  }
  for (Index i = 0; i < count; ++i) add_row(rows.dim, sum, rows.row(head, row[i]));
}

/// Fetches the tokens of row r of level 1, unless that is `end`, over so many calls.
template <class T>
Spread fetch_sub_block(const Hierarchy& tree, HeadRows<T> tokens, Index r, Index end, Index calls) {
  Lookahead ahead;
  if (r < end) {
    const Range members = tree.sub_block_tokens(r);
    ahead.add(tokens.row(0, members.first - tree.first_token()), tokens.row_stride, members.count(),
              tokens.heads * tokens.dim);
  }
  return Spread(ahead, calls);
}

/// The upward pass of average pooling: the mean of each sub-block of every level, over the tokens that `count` counts.
/// `tokens` and `mask` begin with the tree's first token; groups without new tokens are left as they are.
///
/// Level 1 reads the tokens, whole rows one after another; a row of a level above is the mean of its two children
/// weighted by their counts, which is the mean of all its tokens. Rows that count no token are zero. The order of all
/// sums is fixed by the hierarchy. Time O(n d), memory O(n d rank / block) for the result.
template <class T>
void pool_average(Work& work, const Hierarchy& tree, HeadRows<const T> tokens, const std::uint8_t* mask, const T* count,
                  HeadRows<T> pooled) {
  for (Index row = 0; row < tree.rows(); ++row) {
    if (count[row] == T(0)) pooled.set_zero(row);
  }
  TreeWalk(tree).upward(work, [&](Index l, Range rows) {
    for (Index r = rows.first; r < rows.end; ++r) {
      const Index parent = tree.level(l).first_row + r;
      if (count[parent] == T(0)) continue;
      if (l == 1) {
        const Range members = tree.sub_block_tokens(r);
        pooled.set_zero(parent);
        Spread fetch = fetch_sub_block(tree, tokens, r + 1, rows.end, (members.count() + 3) / 4 * pooled.heads);
        std::array<Index, 4> seen;
        for (Index i = members.first, n = 0; i < members.end; ++i) {
          const Index row = i - tree.first_token();
          if (mask == nullptr || mask[row] != 0) seen[static_cast<std::size_t>(n++)] = row;
          if (n < 4 && i + 1 < members.end) continue;
          for (Index h = 0; h < pooled.heads; ++h) {
            fetch();
            add_rows(tokens, h, seen.data(), n, pooled.row(h, parent));
          }
          n = 0;
        }
        const T share = T(1) / count[parent];
        for (Index h = 0; h < pooled.heads; ++h) {
          for (Index c = 0; c < pooled.dim; ++c) pooled.row(h, parent)[c] *= share;
        }
      } else {
        const Index child = tree.level(l - 1).first_row + 2 * r;
        const T share = count[child] / count[parent];
        for (Index h = 0; h < pooled.heads; ++h) {
          const auto mean = [share]<class V>(const V& a, const V& b) {
            return padd(pmul(pset1<V>(share), a), pmul(pset1<V>(T(1) - share), b));
          };
          combine(pooled.dim, pooled.row(h, parent), mean, pooled.row(h, child), pooled.row(h, child + 1));
        }
      }
    }
  });
}

/// The gradient of `pool_average`: the downward pass. Each row's gradient is shared out among its children by their
/// counts and reaches the tokens, to whose gradient it is added. On return `grad_pooled` holds for each row also what
/// came from above.
template <class T>
void pool_average_backward(Work& work, const Hierarchy& tree, const std::uint8_t* mask, const T* count,
                           HeadRows<T> grad_pooled, HeadRows<T> grad_tokens) {
  TreeWalk(tree).downward(work, [&](Index l, Range rows) {
    for (Index r = rows.first; r < rows.end; ++r) {
      const Index parent = tree.level(l).first_row + r;
      if (count[parent] == T(0)) continue;
      if (l == 1) {
        const Range members = tree.sub_block_tokens(r);
        const T share = T(1) / count[parent];
        Spread fetch = fetch_sub_block(tree, grad_tokens, r + 1, rows.end, members.count() * grad_pooled.heads);
        for (Index i = members.first; i < members.end; ++i) {
          if (mask != nullptr && mask[i] == 0) continue;
          for (Index h = 0; h < grad_pooled.heads; ++h) {
            fetch();
            grad_tokens.features(h, i) += share * grad_pooled.features(h, parent);
          }
        }
      } else {
        const Index child = tree.level(l - 1).first_row + 2 * r;
        const T share = count[child] / count[parent];
        for (Index h = 0; h < grad_pooled.heads; ++h) {
          grad_pooled.features(h, child) += share * grad_pooled.features(h, parent);
          grad_pooled.features(h, child + 1) += (T(1) - share) * grad_pooled.features(h, parent);
        }
      }
    }
  });
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
