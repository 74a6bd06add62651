#pragma once

#include <nearfar/engine/multipole/walk.hpp>
#include <nearfar/engine/softmax/fresh_gradients.hpp>
#include <nearfar/engine/softmax/gradient_tile.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The walk of all queries of one sequence back over their near field and, unless queries are pooled, their interaction
/// lists: writes the gradients of query, key and value, as far as tokens are seen one by one, and adds those of the
/// pooled keys and values to `grad_far`.
///
/// A task is one key/value head of one segment of the queries, whole blocks. It writes the gradients of its own tokens'
/// keys at once; those of the block before and the block after go to strips, and those of pooled rows to an array a
/// segment, which are added in order when all tasks are done. How many segments there are depends on the shapes alone.
/// Memory O(n dim) for strips and arrays.
template <class T>
class MultipoleBackward {
 public:
  MultipoleBackward(Work& work, const Hierarchy& tree, const Heads& heads, const InputGradients<T>& gradients,
                    const FarField<T>& grad_far)
      : work_(work), tree_(tree), heads_(heads), gradients_(gradients) {
    const Index wanted = gradient_segments(tree.tokens(), heads.key_value);
    segment_blocks_ = (tree.blocks() - 1) / wanted + 1;
    segments_ = (tree.blocks() - 1) / segment_blocks_ + 1;
    block_ = std::min(tree.block(), tree.tokens());
    strips_ = work.take<T>(segments_ > 1 ? segments_ * strip_size() : 0);
    std::fill_n(strips_, segments_ > 1 ? segments_ * strip_size() : 0, T(0));
    grad_far_ = work.take<FarField<T>>(segments_);
    for (Index s = 0; s < segments_; ++s) {
      const auto zero = [&] { return take_zero_head_rows<T>(work, tree.rows(), heads.key_value, heads.dim); };
      grad_far_[s] = s == 0 ? grad_far : FarField<T>{zero(), zero()};
    }
  }

  /// delta and log_sum_exp are those of the sequence's queries, head by head, `stride` apart.
  void backward(const MultipoleWalk<T>& walk, bool far, double scale, const Inputs<T>& inputs, Tokens<const T> grad_out,
                const double* log_sum_exp, const T* delta, Index stride) {
    work_.for_each(segments_ * heads_.key_value, [&](Index task, Scratch& scratch) {
      const Index key_head = task % heads_.key_value;
      const Index s = task / heads_.key_value;
      const Range own = segment(s);
      const Index dim = heads_.dim;
      GradientTile<T> queries(scratch, dim, dim);
      KeyTile<T> keys(scratch, dim, dim);
      const auto near_key = [&](Index j) { return key_row(s, keys.position(j)) + key_head * dim; };
      const auto near_value = [&](Index j) { return value_row(s, keys.position(j)) + key_head * dim; };
      const auto far_key = [&](Index j) { return grad_far_[s].key.row(key_head, keys.position(j)); };
      const auto far_value = [&](Index j) { return grad_far_[s].value.row(key_head, keys.position(j)); };
      FreshGradients<T> fresh(gradients_.key.head(key_head, dim), gradients_.value.head(key_head, dim), own);
      for (Index head = key_head * heads_.group(); head < (key_head + 1) * heads_.group(); ++head) {
        const Tokens<const T> query = inputs.query.head(head, dim);
        const Tokens<const T> grad = grad_out.head(head, dim);
        const auto tile_at = [&](Index first) {
          return Tile{0, first, std::min(GradientTile<T>::fitting(first, tree_.block()), own.end - first)};
        };
        for (Index first = own.first; first < own.end;) {
          const Tile tile = tile_at(first);
          const Index next = tile_at(first + tile.count).count;
          Lookahead later;
          later.add(gradients_.query.row(first) + head * dim, gradients_.query.stride(), tile.count, dim);
          later.add(query.middle_rows(first + tile.count, next));
          later.add(grad.middle_rows(first + tile.count, next));
          if (next > 0) walk.announce({0, first + tile.count, next}, key_head, later);
          queries.load(query.middle_rows(first, tile.count), grad.middle_rows(first, tile.count), first,
                       log_sum_exp + head * stride + first, delta + head * stride + first, scale, tree_.block());
          queries.lookahead().and_then(&later);
          walk.near_field(tile, key_head, keys, queries.lookahead(), [&](const auto& band) {
            const Index end = keys.position(keys.count() - 1) + 1;
            const Range written = fresh.reach(keys, end);
            fresh.announce(queries.lookahead(), end + KeyTile<T>::capacity);
            queries.visit(keys, band, written, near_key, near_value);
          });
          if (far) {
            walk.far_field(tile, key_head, keys,
                           [&](const auto& band) { queries.visit(keys, band, {}, far_key, far_value); });
          }
          queries.finish(gradients_.query.middle_rows(first, tile.count).head(head, dim));
          first += tile.count;
        }
      }
      fresh.finish();
    });
    add_strips();
    add_far_fields();
  }

 private:
  Range segment(Index s) const {
    const Index width = segment_blocks_ * tree_.block();
    return {s * width, s + 1 == segments_ ? tree_.tokens() : (s + 1) * width};
  }

  Index strip_size() const { return 4 * block_ * heads_.key_cols(); }

  /// The gradients of the keys, or the values, of one block beside a segment.
  Tokens<T> strip(Index s, bool right, bool value) const {
    const Index number = 4 * s + 2 * right + value;
    return {strips_ + number * block_ * heads_.key_cols(), block_, heads_.key_cols(), heads_.key_cols()};
  }

  T* key_row(Index s, Index token) const { return row(s, token, gradients_.key, false); }
  T* value_row(Index s, Index token) const { return row(s, token, gradients_.value, true); }

  T* row(Index s, Index token, const Tokens<T>& gradient, bool value) const {
    const Range own = segment(s);
    if (token < own.first) return strip(s, false, value).row(token - (own.first - tree_.block()));
    if (token >= own.end) return strip(s, true, value).row(token - own.end);
    return gradient.row(token);
  }

  // A segment's tokens take what its neighbours' strips hold of them: of the segment before, then of the one after.
  void add_strips() const {
    work_.for_each(segments_, [&](Index s, Scratch&) {
      const Range own = segment(s);
      for (const bool value : {false, true}) {
        const Tokens<T> gradient = value ? gradients_.value : gradients_.key;
        const Index rows = std::min(block_, own.count());
        if (s > 0) {
          gradient.middle_rows(own.first, rows).matrix() += strip(s - 1, true, value).middle_rows(0, rows).matrix();
        }
        if (s + 1 < segments_)
          gradient.middle_rows(own.end - block_, block_).matrix() += strip(s + 1, false, value).matrix();
      }
    });
  }

  void add_far_fields() const {
    const Index size = heads_.key_cols() * tree_.rows();
    constexpr Index chunk = 1 << 14;
    work_.for_each(ceil_div(size, chunk), [&](Index task, Scratch&) {
      const Index count = std::min(chunk, size - task * chunk);
      for (Index s = 1; s < segments_; ++s) {
        for (HeadRows<T> FarField<T>::*rows : {&FarField<T>::key, &FarField<T>::value}) {
          RowArray<T>((grad_far_[0].*rows).data + task * chunk, count) +=
              RowArray<const T>((grad_far_[s].*rows).data + task * chunk, count);
        }
      }
    });
  }

  Work& work_;
  const Hierarchy& tree_;
  const Heads& heads_;
  const InputGradients<T>& gradients_;
  Index segment_blocks_;
  Index segments_;
  Index block_;
  T* strips_;
  FarField<T>* grad_far_;  // of each segment
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
