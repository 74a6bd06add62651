#pragma once

#include <nearfar/detail/scratch.hpp>
#include <nearfar/engine/chunked_state.hpp>
#include <nearfar/feature_map.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>

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
};

/// Rows [first, first + count) of tokens, from column `col` on.
template <class T>
TokenRows<T> token_rows(Tokens<T> tokens, Index first, Index count, Index col, bool reversed) {
  if (reversed) return {tokens.row(first + count - 1) + col, -tokens.stride()};
  return {tokens.row(first) + col, tokens.stride()};
}

/// The key mask of one sequence, in the order of its TokenRows. Without a mask every key is visible.
struct VisibleKeys {
  const std::uint8_t* mask = nullptr;
  Index step = 1;

  VisibleKeys() = default;
  template <class T>
  VisibleKeys(const Inputs<T>& inputs, const Sequence& sequence, bool reversed) : mask(key_mask(inputs, sequence)) {
    if (mask == nullptr || !reversed) return;
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

/// Up to chunk_tokens rows of one head, side by side: rows that lie far apart would crowd into a fraction of the cache
/// sets. Rows are padded with zeros to whole vectors.
template <class T>
class TokenTile {
 public:
  TokenTile(Scratch& scratch, Index dim)
      : dim_(dim),
        stride_(round_up(dim, lanes<T>)),
        data_(scratch.take<T>(chunk_tokens * stride_)),
        share_(scratch.take<T>(chunk_tokens)) {
    clear();
  }

  T* data() const { return data_; }
  Index stride() const { return stride_; }
  auto row(Index i) const { return Eigen::Map<Eigen::Array<T, 1, Eigen::Dynamic>>(data_ + i * stride_, dim_); }

  void clear() { std::fill_n(data_, chunk_tokens * stride_, T(0)); }

  /// Takes `count` rows; those of invisible keys become zero, whatever stands in them.
  void load(TokenRows<const T> from, Index count, const VisibleKeys& visible = {}) {
    for (Index i = 0; i < count; ++i) std::copy_n(from.row(i), dim_, data_ + i * stride_);
    hide(count, visible);
  }

  /// Takes the features of `count` rows: phi(x), divided by the sum of its entries if `normalize`.
  void load(TokenRows<const T> from, Index count, const VisibleKeys& visible, const AnyFeatureMap& map,
            bool normalize) {
    map.value(from.data, from.stride, count, dim_, data_, stride_);
    for (Index i = 0; i < count && normalize; ++i) {
      const T total = row(i).sum();
      share_[i] = total == T(0) ? T(0) : T(1) / total;
      row(i) *= share_[i];
    }
    hide(count, visible);
  }

  /// Turns gradients of the features that `load` took into gradients of the rows they were taken of.
  void chain(TokenRows<const T> from, Index count, const AnyFeatureMap& map, bool normalize,
             TokenTile& gradient) const {
    for (Index i = 0; i < count && normalize; ++i) {
      gradient.row(i) = share_[i] * (gradient.row(i) - (gradient.row(i) * row(i)).sum());
    }
    map.chain(from.data, from.stride, count, dim_, gradient.data_, stride_);
  }

  void hide(Index count, const VisibleKeys& visible) {
    for (Index i = 0; i < count && visible.mask != nullptr; ++i) {
      if (!visible(i)) row(i).setZero();
    }
  }

  /// Writes the rows to `to`, or adds them to what is there.
  void store(TokenRows<T> to, Index count, bool add) const {
    for (Index i = 0; i < count; ++i) {
      Eigen::Map<Eigen::Array<T, 1, Eigen::Dynamic>> target(to.row(i), dim_);
      if (add) {
        target += row(i);
      } else {
        target = row(i);
      }
    }
  }

  /// Lays `count` rows on the vector lanes: dim x chunk_tokens.
  void transpose_into(T* on_lanes, Index count) const {
    transpose(data_, stride_, count, dim_, T(1), on_lanes, chunk_tokens);
  }

 private:
  Index dim_;
  Index stride_;
  T* data_;
  T* share_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
