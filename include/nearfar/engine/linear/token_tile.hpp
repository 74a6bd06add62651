#pragma once

#include <nearfar/detail/scratch.hpp>
#include <nearfar/detail/stores.hpp>
#include <nearfar/detail/transpose.hpp>
#include <nearfar/engine/linear/chunked_state.hpp>
#include <nearfar/feature_map.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The rows of one head in one sequence, in order of time or, with a negative stride, in reverse.
template <class T>
struct TokenRows {
  T* data;
  Index stride;

  T* row(Index i) const { return data + i * stride; }
  TokenRows from(Index i) const { return {row(i), stride}; }

  void announce(Lookahead& ahead, Index count, Index cols) const { ahead.add(data, stride, count, cols); }
};

/// Rows [first, first + count) of tokens, from column `col` on.
template <class T>
TokenRows<T> token_rows(Tokens<T> tokens, Index first, Index count, Index col, bool reversed) {
  if (reversed && count > 0) return {tokens.row(first + count - 1) + col, -tokens.stride()};
  return {tokens.row(first) + col, tokens.stride()};
}

/// The key mask of one sequence, in the order of its TokenRows. Without a mask every key is visible.
struct VisibleKeys {
  const std::uint8_t* mask = nullptr;
  Index step = 1;

  VisibleKeys() = default;
  template <class T>
  VisibleKeys(const Inputs<T>& inputs, const Sequence& sequence, bool reversed) : mask(key_mask(inputs, sequence)) {
    if (mask == nullptr || !reversed || sequence.key_count == 0) return;
    mask += sequence.key_count - 1;
    step = -1;
  }

  VisibleKeys from(Index i) const {
    VisibleKeys rest = *this;
    if (mask != nullptr) rest.mask += i * step;
    return rest;
  }

  bool operator()(Index i) const { return mask == nullptr || mask[i * step] != 0; }
};

/// How rows are written.
enum class Writes { anew, past_caches, added };

/// Up to chunk_tokens rows of one head, taken out of wherever they lie: rows that lie far apart would crowd into a
/// fraction of the cache sets.
template <class T>
class TokenTile : public PaddedRows<T> {
 public:
  using PaddedRows<T>::data;
  using PaddedRows<T>::dim;
  using PaddedRows<T>::stride;
  using PaddedRows<T>::row;

  TokenTile(Scratch& scratch, Index features)
      : PaddedRows<T>{scratch.take<T>(chunk_tokens * round_up(features, lanes<T>) + state_rows), features},
        lanes_{scratch.take<T>(chunk_tokens * features), features, 0},
        share_(scratch.take<T>(chunk_tokens)) {
    // A product that takes features in whole groups reads a little over the last row.
    std::fill_n(data, chunk_tokens * stride + state_rows, T(0));
  }

  void clear() { std::fill_n(data, chunk_tokens * stride, T(0)); }

  /// Row i without its padding.
  RowArray<T> entries(Index i) const { return {row(i), dim}; }

  /// Takes `count` rows; those of invisible keys become zero, whatever stands in them.
  void load(TokenRows<const T> from, Index count, const VisibleKeys& visible = {}) {
    for (Index i = 0; i < count; ++i) {
      for_each_packet<T>(dim, [target = row(i), source = from.row(i)](auto by, Index c) {
        pstoreu(target + c, ploadu<typename decltype(by)::template Of<T>>(source + c));
      });
    }
    hide(count, visible);
  }

  /// Takes the features of `count` rows: phi(x), divided by the sum of its entries if `normalize`.
  void load(TokenRows<const T> from, Index count, const VisibleKeys& visible, const AnyFeatureMap& map,
            bool normalize) {
    map.value(from.data, from.stride, count, dim, data, stride);
    for (Index i = 0; i < count && normalize; ++i) {
      Packet<T> sum = pset1<Packet<T>>(T(0));
      for (Index c = 0; c < stride; c += lanes<T>) sum = padd(sum, ploadu<Packet<T>>(row(i) + c));
      const T total = predux(sum);
      // Below the smallest normal number the inverse overflows, and the features have no digits left.
      share_[i] = std::abs(total) < std::numeric_limits<T>::min() ? T(0) : T(1) / total;
      combine(
          dim, row(i), [share = share_[i]]<class V>(const V& x) { return pmul(x, pset1<V>(share)); }, row(i));
    }
    hide(count, visible);
  }

  /// Turns gradients of the features that `load` took into gradients of the rows they were taken of.
  void chain(TokenRows<const T> from, Index count, const AnyFeatureMap& map, bool normalize,
             TokenTile& gradient) const {
    for (Index i = 0; i < count && normalize; ++i) {
      const T inner = (gradient.entries(i) * entries(i)).sum();
      gradient.entries(i) = share_[i] * (gradient.entries(i) - inner);
    }
    map.chain(from.data, from.stride, count, dim, gradient.data, stride);
  }

  /// Sets the rows of invisible keys to zero.
  void hide(Index count, const VisibleKeys& visible) {
    for (Index i = 0; i < count && visible.mask != nullptr; ++i) {
      if (!visible(i)) std::fill_n(row(i), dim, T(0));
    }
  }

  /// The first `count` rows on the vector lanes, until the next call.
  const LaneRows<T>& on_lanes(Index count) {
    // Bidirectional attention never asks.
    if (lanes_.count == 0) std::fill_n(lanes_.data, chunk_tokens * dim, T(0));
    transpose(data, stride, count, dim, T(1), lanes_.data, chunk_tokens);
    lanes_.count = count;
    return lanes_;
  }

  /// Writes the rows, each times its scale and each feature times its weight unless these are null, to `to`, or adds
  /// them to what is there.
  void store(TokenRows<T> to, Index count, const T* scale, const T* weight, Writes writes) const {
    const auto store_rows = [&](auto store) {
      for (Index i = 0; i < count; ++i) {
        const T factor = scale == nullptr ? T(1) : scale[i];
        for_each_packet<T>(dim, [&, source = row(i), target = to.row(i)](auto by, Index c) {
          using V = typename decltype(by)::template Of<T>;
          V numbers = pmul(ploadu<V>(source + c), pset1<V>(factor));
          if (weight != nullptr) numbers = pmul(numbers, ploadu<V>(weight + c));
          if (writes == Writes::added) numbers = padd(numbers, ploadu<V>(target + c));
          store(target + c, numbers);
        });
      }
    };
    writes == Writes::past_caches ? store_rows(PastCaches{}) : store_rows(Keep{});
  }

 private:
  LaneRows<T> lanes_;
  T* share_;
};

/// Attention of the first `count` rows of a tile to the state of all earlier keys and to the first `keys` keys beside
/// them in the chunk: chunk_scores, for which the queries must lie on the lanes, and chunk_attend, which may then as
/// well take them from there.
template <class T>
void attend_chunk(TokenTile<T>& query, Index count, const T* state, const PaddedRows<T>& key,
                  const PaddedRows<T>& value, Index keys, T* scores, T* row_sum, const PaddedRows<T>& out, bool add,
                  Pace<Lookahead> fetch) {
  Broadcast<T> rows = query.rows();
  if (keys > 0) {
    const LaneRows<T>& on_lanes = query.on_lanes(count);
    chunk_scores(on_lanes, key, keys, scores, row_sum, fetch);
    rows = on_lanes.rows();
  }
  chunk_attend<T>(rows, query.dim, count, state, scores, value, keys, out, add, fetch);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
