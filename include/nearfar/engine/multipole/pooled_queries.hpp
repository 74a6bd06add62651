#pragma once

#include <nearfar/engine/multipole/walk.hpp>
#include <nearfar/engine/softmax/gradient_tile.hpp>
#include <nearfar/engine/softmax/query_tile.hpp>

#include <algorithm>
#include <cmath>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Attention of pooled queries to the far field of one sequence.
///
/// At level l the tokens of a sub-block share one query, the mean of theirs, and so one partial softmax. The downward
/// pass takes the levels from the coarsest on: each starts from what its parent saw, adds its own interaction list, and
/// hands the result to its two children, those of level 1 to the tokens.
///
/// Backward, a pooled query stands for all tokens i below it, whose weights p_ij = e^(s_j - L_i) differ by a factor
/// alone. With any reference R these sum up before they meet a key:
///
///   sum_i p_ij grad_out_i = e^(s_j - R) G      G = sum_i e^(R - L_i) grad_out_i      (delta_i likewise)
///
/// so that the gradient's upward pass carries (R, G, delta) from children to parents, R the least L_i, and each level
/// then walks back as if it were a level of ordinary queries with log-sum-exp R. Time O(n rank^2 / block dim) a head,
/// memory O(n rank / block dim) a head.
template <class T>
class PooledQueries {
 public:
  /// Pools the queries of all levels; those of tokens that `mask` hides, unless it is null, enter no mean.
  PooledQueries(Work& work, const Hierarchy& tree, const Heads& heads, double scale, Tokens<const T> query,
                const std::uint8_t* mask)
      : work_(work),
        tree_(tree),
        heads_(heads),
        scale_(scale),
        mask_(mask),
        count_(work.take<T>(tree.rows())),
        query_(take_head_rows<T>(work, tree.rows(), heads.query, heads.dim)),
        result_(take_head_rows<T>(work, tree.rows(), heads.query, heads.dim)),
        log_sum_exp_(work.take<double>(heads.query * tree.rows())) {
    count_tokens(tree, mask, count_);
    pool_average<T>(work, tree, head_rows(query, heads.query), mask, count_, query_);
  }

  /// The downward pass.
  void attend(const MultipoleWalk<T>& walk) const {
    for (Index l = tree_.levels(); l >= 1; --l) {
      const Index origin = tree_.level(l).first_row;
      const Index rows = tree_.level(l).groups * tree_.rank();
      work_.for_each(((rows - 1) / queries_a_tile + 1) * heads_.query, [&](Index task, Scratch& scratch) {
        const Index head = task % heads_.query;
        const Index first = task / heads_.query * queries_a_tile;
        const Index count = std::min(queries_a_tile, rows - first);
        QueryTile<T> queries(scratch, first, count, heads_.dim, heads_.dim);
        KeyTile<T> keys(scratch, heads_.dim, heads_.dim);
        queries.load(query_.row(head, origin + first), query_.row_stride, log2_scale<T>(scale_));
        if (l < tree_.levels()) hand_down(l + 1, head, 2, queries);
        walk.far_level(l, first, count, head / heads_.group(), keys,
                       [&](const auto& band) { queries.visit(keys, band); });
        queries.finish(result_.row(head, origin + first), result_.row_stride, log_sum_exp(head, origin + first));
      });
    }
  }

  /// Starts the tokens of a tile from what their sub-blocks of level 1 saw.
  void hand_down(Index head, QueryTile<T>& queries) const { hand_down(1, head, tree_.sub_block(1), queries); }

  /// The gradients of `attend`: adds those of the pooled keys and values to `grad_far`, those of the tokens' queries to
  /// `grad_query`. log_sum_exp and delta are those of the tokens, head by head, `stride` apart.
  void backward(const MultipoleWalk<T>& walk, Tokens<const T> grad_out, const double* log_sum_exp, const T* delta,
                Index stride, const FarField<T>& grad_far, Tokens<T> grad_query) const {
    const Sums sums{take_head_rows<T>(work_, tree_.rows(), heads_.query, heads_.dim),
                    work_.take<double>(heads_.query * tree_.rows()), work_.take<T>(heads_.query * tree_.rows())};
    sum_upward(grad_out, log_sum_exp, delta, stride, sums);

    const HeadRows<T> grad_pooled = take_zero_head_rows<T>(work_, tree_.rows(), heads_.query, heads_.dim);
    // A level of one key/value head is a task: no other one writes the gradients of its keys.
    work_.for_each(tree_.levels() * heads_.key_value, [&](Index task, Scratch& scratch) {
      const Index l = task / heads_.key_value + 1;
      const Index key_head = task % heads_.key_value;
      const Index origin = tree_.level(l).first_row;
      const Index rows = tree_.level(l).groups * tree_.rank();
      GradientTile<T> queries(scratch, heads_.dim, heads_.dim);
      KeyTile<T> keys(scratch, heads_.dim, heads_.dim);
      const auto grad_key = [&](Index j) { return grad_far.key.row(key_head, origin + keys.position(j)); };
      const auto grad_value = [&](Index j) { return grad_far.value.row(key_head, origin + keys.position(j)); };
      for (Index head = key_head * heads_.group(); head < (key_head + 1) * heads_.group(); ++head) {
        for (Index first = 0; first < rows; first += queries_a_tile) {
          const Index count = std::min(queries_a_tile, rows - first);
          const Index place = head * tree_.rows() + origin + first;
          queries.template load<T>(query_.tokens(head, origin + first, count),
                                   sums.grad_out.tokens(head, origin + first, count), first, sums.reference + place,
                                   sums.delta + place, scale_);
          walk.far_level(l, first, count, key_head, keys,
                         [&](const auto& band) { queries.visit(keys, band, {}, grad_key, grad_value); });
          queries.finish(grad_pooled.tokens(head, origin + first, count));
        }
      }
    });
    pool_average_backward<T>(work_, tree_, mask_, count_, grad_pooled, head_rows(grad_query, heads_.query));
  }

 private:
  static constexpr Index queries_a_tile = 96;

  /// (G, R, delta) of the text above for each pooled query; R is -infinity where no token below sees a key.
  struct Sums {
    HeadRows<T> grad_out;
    double* reference;
    T* delta;
  };

  double* log_sum_exp(Index head, Index row) const { return log_sum_exp_ + head * tree_.rows() + row; }

  void hand_down(Index from, Index head, Index children, QueryTile<T>& queries) const {
    const Index origin = tree_.level(from).first_row;
    queries.start_from(result_.row(head, origin), result_.row_stride, log_sum_exp(head, origin), children);
  }

  void sum_upward(Tokens<const T> grad_out, const double* log_sum_exp, const T* delta, Index stride,
                  const Sums& sums) const {
    const HeadRows<const T> tokens = head_rows(grad_out, heads_.query);
    for (Index row = 0; row < tree_.rows(); ++row) {
      for (Index h = 0; h < heads_.query; ++h) sums.reference[h * tree_.rows() + row] = -infinity<double>;
    }
    TreeWalk(tree_).upward(work_, [&](Index l, Range rows) {
      const Index origin = tree_.level(l).first_row;
      for (Index r = rows.first; r < rows.end; ++r) {
        for (Index h = 0; h < heads_.query; ++h) {
          const Index place = h * tree_.rows();
          if (l == 1) {
            sum_children(tokens, log_sum_exp + h * stride, delta + h * stride, tree_.sub_block_tokens(r), h, origin + r,
                         sums);
          } else {
            const Index child = tree_.level(l - 1).first_row + 2 * r;
            sum_children(HeadRows<const T>(sums.grad_out), sums.reference + place, sums.delta + place,
                         {child, child + 2}, h, origin + r, sums);
          }
        }
      }
    });
  }

  void sum_children(const HeadRows<const T>& grad_out, const double* reference, const T* delta, Range children,
                    Index head, Index row, const Sums& sums) const {
    double least = infinity<double>;
    for (Index i = children.first; i < children.end; ++i) {
      if (reference[i] != -infinity<double>) least = std::min(least, reference[i]);
    }
    const Index place = head * tree_.rows() + row;
    sums.reference[place] = least == infinity<double> ? -infinity<double> : least;
    sums.delta[place] = T(0);
    auto sum = sums.grad_out.features(head, row);
    sum.setZero();
    for (Index i = children.first; i < children.end; ++i) {
      if (reference[i] == -infinity<double>) continue;
      const T factor = static_cast<T>(std::exp(least - reference[i]));
      sums.delta[place] += factor * delta[i];
      sum += factor * grad_out.features(head, i);
    }
  }

  Work& work_;
  const Hierarchy& tree_;
  const Heads& heads_;
  double scale_;
  const std::uint8_t* mask_;
  T* count_;
  HeadRows<T> query_;
  HeadRows<T> result_;
  double* log_sum_exp_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
