#pragma once

#include <nearfar/checks.hpp>
#include <nearfar/detail/function_ref.hpp>
#include <nearfar/detail/transpose.hpp>
#include <nearfar/engine/multipole/pooling.hpp>

#include <algorithm>
#include <string_view>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// The learned pooling of one level: a depthwise convolution whose window and step are one group.
///
///   weight  (dim * rank) x window    row c * rank + r: what channel c of the group's pooled row r takes of each child
///   bias    1 x (dim * rank)
///
/// The children of a group are its tokens, or the 2 * rank pooled rows of its two child groups. All key/value heads
/// share the weights.
template <class T>
struct PoolingConvolution {
  Matrix<T> weight;
  Matrix<T> bias;
};

namespace detail {

/// That the convolutions `which`, conv_k or conv_v (`of` may say: the gradient of), have `rows` rows at each of
/// `levels` levels, and window(l) columns.
template <class T>
void check_convolutions(std::string_view mechanism, std::string_view of, std::string_view which,
                        const std::vector<PoolingConvolution<T>>& convolutions, Index levels, Index rows,
                        FunctionRef<Index(Index)> window) {
  const Index count = static_cast<Index>(convolutions.size());
  require(count == levels, mechanism, of, which, " must have ", levels, " levels, but has ", count, ".");
  for (Index l = 1; l <= levels; ++l) {
    const PoolingConvolution<T>& level = convolutions[static_cast<std::size_t>(l - 1)];
    check_parameter(mechanism, level.weight, rows, window(l), of, which, "_w_", l);
    check_parameter(mechanism, level.bias, 1, rows, of, which, "_b_", l);
  }
}

/// The convolution that is the average: each row of a group that of its own share of the children.
template <class T>
PoolingConvolution<T> averaging_convolution(Index dim, Index rank, Index window) {
  const Index share = window / rank;
  PoolingConvolution<T> level{Matrix<T>::Zero(dim * rank, window), Matrix<T>::Zero(1, dim * rank)};
  for (Index row = 0; row < level.weight.rows(); ++row) {
    std::fill_n(&level.weight(row, row % rank * share), share, T(1) / static_cast<T>(share));
  }
  return level;
}

/// What the groups of one level pool. Of the children those in `all` are at hand; the others of a group, before them,
/// have been pooled already.
template <class T>
struct Children {
  HeadRows<T> rows;
  Index first_row;  ///< where child 0 stands, or would stand, among the rows
  Index window;     ///< children a group: the last group's may be fewer
  Range all;
  const std::uint8_t* mask;  ///< of the rows; null: none is masked

  Range of(Index group) const { return {std::max(group * window, all.first), std::min((group + 1) * window, all.end)}; }
  auto* row(Index head, Index child) const { return rows.row(head, first_row + child); }
  auto features(Index head, Index child) const { return rows.features(head, first_row + child); }
  bool masked(Index child) const { return mask != nullptr && mask[first_row + child] == 0; }
};

/// The learned pooling of a sequence: its upward pass and the gradient's downward pass.
///
///   grouped:       K_l[g p + r] = b_l[r] + sum_t  w_l[r, t] * k[g m_l + t]             every level pools the tokens
///   hierarchical:  K_l[g p + r] = b_l[r] + sum_s  w_l[r, s] * K_{l-1}[2 g p + s]       for l >= 2, s < 2 p
///
/// with products feature by feature, and m_l tokens a group of level l. Tokens that are masked or past the end enter as
/// zeros, and so do child groups without a token. Groups without a token are skipped: their rows are zero. Time O(n d
/// rank) a level for the grouped form; for the hierarchical one that of level 1 and O(n d rank^2 / block) for all
/// others. Tokens and mask begin with the tree's first token; n are the new tokens, which are added to the rows of
/// groups that hold others.
template <class T>
class ConvolutionPooling {
 public:
  /// `mass` is zero in all rows of a group without a token, and only there.
  ConvolutionPooling(Work& work, const Hierarchy& tree, bool hierarchical,
                     const std::vector<PoolingConvolution<T>>& levels, Index dim, const std::uint8_t* mask,
                     const T* mass)
      : work_(work), tree_(tree), hierarchical_(hierarchical), levels_(levels), dim_(dim), mask_(mask), mass_(mass) {
    for (Index l = 1; l <= tree.levels(); ++l) taps_[static_cast<std::size_t>(l)] = transpose_taps(l);
  }

  /// The pooled rows of all levels, from the tokens.
  void forward(HeadRows<const T> tokens, HeadRows<T> pooled) const {
    for (Index row = 0; row < tree_.rows(); ++row) {
      if (mass_[row] == T(0)) pooled.set_zero(row);
    }
    const auto pool = [&](Index l, Index group) {
      if (!absent(l, group)) convolve(l, group, children<const T>(l, tokens, pooled), pooled);
    };
    if (hierarchical_) {
      TreeWalk(tree_).upward(work_, [&](Index l, Range rows) {
        for (Index g = rows.first / tree_.rank(); g < rows.end / tree_.rank(); ++g) pool(l, g);
      });
    } else {
      // The largest groups first, so that none is left to one thread at the end.
      for (Index l = tree_.levels(); l >= 1; --l) {
        const Range groups = tree_.new_groups(l);
        work_.for_each(groups.count(), [&](Index g, Scratch&) { pool(l, groups.first + g); });
      }
    }
  }

  /// Adds to the gradients of the tokens, and to those of the parameters, what `grad_pooled` makes of them. On return
  /// grad_pooled holds for each row also what came from above.
  void backward(HeadRows<const T> tokens, HeadRows<const T> pooled, HeadRows<T> grad_pooled, HeadRows<T> grad_tokens,
                std::vector<PoolingConvolution<T>>& grad_levels) const {
    if (hierarchical_) {
      TreeWalk(tree_).downward(work_, [&](Index l, Range rows) {
        const Children<T> grad_children = children<T>(l, grad_tokens, grad_pooled);
        for (Index g = rows.first / tree_.rank(); g < rows.end / tree_.rank(); ++g) {
          if (!absent(l, g)) spread(l, g, grad_children.of(g), grad_pooled, grad_children);
        }
      });
    } else if (tree_.levels() > 0) {
      work_.for_each(tree_.level(1).groups, [&](Index block, Scratch&) {
        for (Index l = tree_.levels(); l >= 1; --l) {
          const Index g = block >> (l - 1);
          const Children<T> grad_children = children<T>(l, grad_tokens, grad_pooled);
          const Range members = children<T>(1, grad_tokens, grad_pooled).of(block);
          if (!absent(l, g)) spread(l, g, members, grad_pooled, grad_children);
        }
      });
    }
    for (Index l = 1; l <= tree_.levels(); ++l) {
      add_parameter_gradients(l, children<const T>(l, tokens, pooled), grad_pooled,
                              grad_levels[static_cast<std::size_t>(l - 1)]);
    }
  }

 private:
  static constexpr Index taps_a_task = 8;

  bool pools_tokens(Index l) const { return l == 1 || !hierarchical_; }
  Index window(Index l) const { return pools_tokens(l) ? tree_.level(l).width : 2 * tree_.rank(); }
  Index row(Index l, Index group) const { return tree_.level(l).first_row + group * tree_.rank(); }
  bool absent(Index l, Index group) const { return mass_[row(l, group)] == T(0); }

  /// What level l pools, be it their values or their gradients.
  template <class U>
  Children<U> children(Index l, HeadRows<U> tokens, HeadRows<U> pooled) const {
    if (pools_tokens(l)) return {tokens, -tree_.first_token(), window(l), tree_.new_tokens(), mask_};
    return {pooled, tree_.level(l - 1).first_row, window(l), {0, 2 * tree_.rank() * tree_.level(l).groups}, nullptr};
  }

  // The places in its window that a level's children have, if they are fewer than the window: a cyclic range.
  Range places(Index l) const {
    if (!pools_tokens(l)) return {0, window(l)};
    const Range tokens = tree_.new_tokens();
    const Index first = tokens.first % window(l);
    return {first, first + std::min(window(l), tokens.count())};
  }

  // Weights as the walk over children meets them: places x rank x dim, features innermost. The bias comes last.
  T* transpose_taps(Index l) {
    const PoolingConvolution<T>& level = levels_[static_cast<std::size_t>(l - 1)];
    const Index rank = tree_.rank();
    const Range range = places_[static_cast<std::size_t>(l)] = places(l);
    T* taps = work_.take<T>((range.count() + 1) * rank * dim_);
    const auto copy = [&](Index first, Index count, T* to) {
      for (Index r = 0; r < rank; ++r) {
        transpose(level.weight.data() + r * window(l) + first, rank * window(l), dim_, count, T(1), to + r * dim_,
                  rank * dim_);
      }
    };
    const Index until_end = std::min(range.end, window(l)) - range.first;
    copy(range.first, until_end, taps);
    copy(0, range.count() - until_end, taps + until_end * rank * dim_);
    transpose(level.bias.data(), rank, dim_, rank, T(1), taps + range.count() * rank * dim_, dim_);
    return taps;
  }

  /// Which of the transposed taps is that of a place in the window.
  Index tap_of(Index l, Index place) const {
    const Range range = places_[static_cast<std::size_t>(l)];
    return (place < range.first ? place + window(l) : place) - range.first;
  }
  RowArray<const T> tap(Index l, Index number, Index r) const {
    return {taps_[static_cast<std::size_t>(l)] + (number * tree_.rank() + r) * dim_, dim_};
  }
  RowArray<const T> bias(Index l, Index r) const { return tap(l, places_[static_cast<std::size_t>(l)].count(), r); }

  // Whether no child before these has been pooled into the group: they are all that its mass, of children a row,
  // counts.
  bool are_first(Index l, Index group, const Children<const T>& children, Range range) const {
    if (range.first == group * window(l)) return true;
    Index present = 0;
    for (Index child = range.first; child < range.end; ++child) present += !children.masked(child);
    return static_cast<T>(present) + T(0.5) > static_cast<T>(tree_.rank()) * mass_[row(l, group)];
  }

  void convolve(Index l, Index group, const Children<const T>& children, HeadRows<T> pooled) const {
    const Index first = row(l, group);
    const Range range = children.of(group);
    const bool from_bias = are_first(l, group, children, range);
    for (Index h = 0; h < pooled.heads && from_bias; ++h) {
      for (Index r = 0; r < tree_.rank(); ++r) std::copy_n(bias(l, r).data(), dim_, pooled.row(h, first + r));
    }
    for (Index child = range.first; child < range.end; ++child) {
      if (children.masked(child)) continue;
      const Index t = tap_of(l, child - group * window(l));
      for (Index h = 0; h < pooled.heads; ++h) {
        for (Index r = 0; r < tree_.rank(); ++r) {
          T* const sum = pooled.row(h, first + r);
          combine(
              dim_, sum, [](const auto& a, const auto& b, const auto& c) { return pmadd(a, b, c); },
              tap(l, t, r).data(), children.row(h, child), sum);
        }
      }
    }
  }

  // The gradient of `convolve` with respect to the children in `range`, all of one group.
  void spread(Index l, Index group, Range range, HeadRows<const T> grad_pooled,
              const Children<T>& grad_children) const {
    const Index first = row(l, group);
    for (Index child = range.first; child < range.end; ++child) {
      if (grad_children.masked(child)) continue;
      const Index t = tap_of(l, child - group * window(l));
      for (Index h = 0; h < grad_pooled.heads; ++h) {
        for (Index r = 0; r < tree_.rank(); ++r) {
          grad_children.features(h, child) += tap(l, t, r) * grad_pooled.features(h, first + r);
        }
      }
    }
  }

  // The gradient of `convolve` with respect to weight and bias: a task owns some taps and walks all groups and heads.
  void add_parameter_gradients(Index l, const Children<const T>& children, HeadRows<const T> grad_pooled,
                               PoolingConvolution<T>& grad) const {
    const Index rank = tree_.rank();
    work_.for_each(ceil_div(window(l), taps_a_task), [&](Index task, Scratch& scratch) {
      const Index first_tap = task * taps_a_task;
      const Index taps = std::min(taps_a_task, window(l) - first_tap);
      T* sums = scratch.template take<T>((taps + 1) * rank * dim_);
      std::fill(sums, sums + (taps + 1) * rank * dim_, T(0));
      const auto sum = [&](Index t, Index r) { return RowArray<T>(sums + (t * rank + r) * dim_, dim_); };
      for (Index g = 0; g < tree_.level(l).groups; ++g) {
        if (absent(l, g)) continue;
        for (Index r = 0; r < rank; ++r) {
          for (Index h = 0; h < grad_pooled.heads; ++h) {
            const auto grad_row = grad_pooled.features(h, row(l, g) + r);
            for (Index t = 0; t < taps; ++t) {
              const Index child = g * window(l) + first_tap + t;
              if (child >= children.all.end || children.masked(child)) continue;
              sum(t, r) += grad_row * children.features(h, child);
            }
            if (task == 0) sum(taps, r) += grad_row;
          }
        }
      }
      for (Index r = 0; r < rank; ++r) {
        for (Index c = 0; c < dim_; ++c) {
          for (Index t = 0; t < taps; ++t) grad.weight(c * rank + r, first_tap + t) += sum(t, r)(c);
          if (task == 0) grad.bias(0, c * rank + r) += sum(taps, r)(c);
        }
      }
    });
  }

  Work& work_;
  const Hierarchy& tree_;
  bool hierarchical_;
  const std::vector<PoolingConvolution<T>>& levels_;
  Index dim_;
  const std::uint8_t* mask_;
  const T* mass_;
  std::array<T*, 64> taps_{};
  std::array<Range, 64> places_{};
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
