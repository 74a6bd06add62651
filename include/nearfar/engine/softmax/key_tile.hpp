#pragma once

#include <nearfar/detail/scratch.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/mask.hpp>
#include <nearfar/online_softmax.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Up to `capacity` keys and their values, copied side by side out of wherever they lie.
///
/// The copy takes the rows of one head, which lie far apart and would crowd into a fraction of the cache sets; it
/// leaves out masked keys, so that nothing of theirs is ever read; and it is where a narrower storage type would be
/// widened. `bias` is what a key's scores start from, in units of log 2: 0, or log2 of the mass of a pooled key.
///
/// Register tiles hold group_rows keys, or features: zeros fill up the features of a row, and `complete` the last group
/// with keys that nobody sees.
template <class T>
class KeyTile {
 public:
  static constexpr Index capacity = 128 / group_rows * group_rows;
  static_assert(group_rows % weights_at_once == 0, "The weights of a group are taken together.");

  NEARFAR_NO_INLINE KeyTile(Scratch& scratch, Index dim, Index value_dim)
      : dim_(dim),
        value_dim_(value_dim),
        key_(scratch.take<T>(capacity * key_stride())),
        value_(scratch.take<T>(capacity * value_stride())),
        bias_(scratch.take<T>(capacity)),
        position_(scratch.take<Index>(capacity)) {
    const auto fill_up = [](T* rows, Index cols, Index stride) {
      for (Index j = 0; j < capacity && cols < stride; ++j) std::fill_n(rows + j * stride + cols, stride - cols, T(0));
    };
    fill_up(key_, dim, key_stride());
    fill_up(value_, value_dim, value_stride());
  }

  Index count() const { return count_; }
  bool full() const { return count_ == capacity; }

  /// The numbers of a row, those that fill it up included.
  Index key_stride() const { return round_up(dim_, group_rows); }
  Index value_stride() const { return round_up(value_dim_, group_rows); }

  void clear() { truncate(0); }

  /// Keeps the first `count` keys.
  void truncate(Index count) {
    count_ = count;
    if (count == 0) zeros_ = pset1<Packet<T>>(T(0));
  }

  /// Copies one more key, which stands at `position` in its sequence. Positions increase from key to key.
  template <class Storage>
  void append(const Storage* key, const Storage* value, Index position, T bias = T(0)) {
    copy(key, dim_, key_ + count_ * key_stride());
    zeros_ = por(zeros_, copy(value, value_dim_, value_ + count_ * value_stride()));
    bias_[count_] = bias;
    position_[count_] = position;
    ++count_;
  }

  /// Copies the keys of `rows` that the mask, unless it is null, does not hide, until the tile holds `most`. Returns
  /// the row after the last. Row j stands at position j + offset of its sequence.
  template <class Storage>
  NEARFAR_NO_INLINE Index take(Tokens<const Storage> key, Tokens<const Storage> value, const std::uint8_t* mask,
                               Range rows, Index offset = 0, Index most = capacity) {
    const Index before = count_;
    Index row = rows.first;
    for (; row < rows.end && count_ < most; ++row) {
      if (mask == nullptr || mask[row] != 0) position_[count_++] = row + offset;
    }
    const auto copy_rows = [places = position_, offset, first = before, end = count_](Tokens<const Storage> from,
                                                                                      Index cols, T* to, Index stride) {
      Packet<T> zeros = pset1<Packet<T>>(T(0));
      for (Index j = first; j < end; ++j) {
        zeros = por(zeros, copy(from.row(places[j] - offset), cols, to + j * stride));
      }
      return zeros;
    };
    copy_rows(key, dim_, key_, key_stride());
    zeros_ = por(zeros_, copy_rows(value, value_dim_, value_, value_stride()));
    std::fill(bias_ + before, bias_ + count_, T(0));
    return row;
  }

  /// Fills up the last group with keys whose scores are -infinity.
  void complete() {
    const Index missing = round_up(count_, group_rows) - count_;
    std::fill_n(key_ + count_ * key_stride(), missing * key_stride(), T(0));
    std::fill_n(value_ + count_ * value_stride(), missing * value_stride(), T(0));
    std::fill_n(bias_ + count_, missing, -infinity<T>);
    std::fill_n(position_ + count_, missing, Index(0));
  }

  /// Whether all values are finite that the tile has taken since it was empty: else a weight of zero times a value may
  /// not be zero.
  bool values_are_finite() const { return all_finite(zeros_); }

  /// The keys that stand in a range of positions, as a range of places in this tile.
  NEARFAR_NO_INLINE Range within(Range positions) const {
    if (count_ == 0) return {};
    return {place_of(positions.first), place_of(positions.end)};
  }

  /// The keys and values from place `first` on, key by key or feature by feature.
  Broadcast<T> key(Index first) const { return {key_ + first * key_stride(), key_stride(), 1}; }
  Broadcast<T> key_transposed(Index first) const { return {key_ + first * key_stride(), 1, key_stride()}; }
  Broadcast<T> value(Index first) const { return {value_ + first * value_stride(), value_stride(), 1}; }
  Broadcast<T> value_transposed(Index first) const { return {value_ + first * value_stride(), 1, value_stride()}; }

  T bias(Index j) const { return bias_[j]; }
  Index position(Index j) const { return position_[j]; }

 private:
  // Gives zeros, with NaN among them if any number is not finite.
  template <class Storage>
  NEARFAR_INLINE static Packet<T> copy(const Storage* from, Index count, T* to) {
    Packet<T> zeros = pset1<Packet<T>>(T(0));
    Index c = 0;
    if constexpr (std::is_same_v<Storage, T>) {
      for (; c + lanes<T> <= count; c += lanes<T>) {
        const Packet<T> numbers = ploadu<Packet<T>>(from + c);
        zeros = por(zeros, zero_if_finite(numbers));
        pstoreu(to + c, numbers);
      }
    }
    if (c == count) return zeros;
    T rest = 0;
    for (; c < count; ++c) rest += zero_if_finite(to[c] = T(from[c]));
    return por(zeros, pset1<Packet<T>>(rest));
  }

  // The place of the first key that does not stand before `position`.
  Index place_of(Index position) const {
    const bool gapless = position_[count_ - 1] - position_[0] == count_ - 1;
    if (gapless) return std::clamp<Index>(position - position_[0], 0, count_);
    return std::lower_bound(position_, position_ + count_, position) - position_;
  }

  Index dim_;
  Index value_dim_;
  T* key_;
  T* value_;
  T* bias_;
  Index* position_;
  Packet<T> zeros_ = pset1<Packet<T>>(T(0));
  Index count_ = 0;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
