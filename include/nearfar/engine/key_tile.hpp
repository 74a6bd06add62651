#pragma once

#include <nearfar/detail/scratch.hpp>
#include <nearfar/engine/microkernel.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Up to `capacity` keys and their values, copied side by side out of wherever they lie.
///
/// The copy takes the rows of one head, which lie far apart and would crowd into a fraction of the cache sets; it
/// leaves out masked keys, so that nothing of theirs is ever read; and it is where a narrower storage type would be
/// widened. `bias` is what a key's scores start from, in units of log 2: 0, or log2 of the mass of a pooled key.
template <class T>
class KeyTile {
 public:
  static constexpr Index capacity = 128;

  KeyTile(Scratch& scratch, Index dim, Index value_dim)
      : dim_(dim),
        value_dim_(value_dim),
        key_(scratch.take<T>(capacity * dim)),
        value_(scratch.take<T>(capacity * value_dim)),
        bias_(scratch.take<T>(capacity)),
        position_(scratch.take<Index>(capacity)) {}

  Index count() const { return count_; }
  bool full() const { return count_ == capacity; }

  void clear() { count_ = 0; }

  /// Keeps the first `count` keys.
  void truncate(Index count) { count_ = count; }

  /// Copies one more key, which stands at `position` in its sequence. Positions increase from key to key.
  template <class Storage>
  void append(const Storage* key, const Storage* value, Index position, T bias = T(0)) {
    copy(key, dim_, key_ + count_ * dim_);
    copy(value, value_dim_, value_ + count_ * value_dim_);
    bias_[count_] = bias;
    position_[count_] = position;
    ++count_;
  }

  /// The keys that stand in a range of positions, as a range of places in this tile.
  Range within(Range positions) const {
    const Index* begin = position_;
    const Index* end = begin + count_;
    return {std::lower_bound(begin, end, positions.first) - begin, std::lower_bound(begin, end, positions.end) - begin};
  }

  /// The keys and values from place `first` on, key by key or feature by feature.
  Broadcast<T> key(Index first) const { return {key_ + first * dim_, dim_, 1}; }
  Broadcast<T> key_transposed(Index first) const { return {key_ + first * dim_, 1, dim_}; }
  Broadcast<T> value(Index first) const { return {value_ + first * value_dim_, value_dim_, 1}; }
  Broadcast<T> value_transposed(Index first) const { return {value_ + first * value_dim_, 1, value_dim_}; }

  T bias(Index j) const { return bias_[j]; }
  Index position(Index j) const { return position_[j]; }

 private:
  template <class Storage>
  NEARFAR_INLINE static void copy(const Storage* from, Index count, T* to) {
    Index c = 0;
    if constexpr (std::is_same_v<Storage, T>) {
      for (; c + lanes<T> <= count; c += lanes<T>) pstoreu(to + c, ploadu<Packet<T>>(from + c));
    }
    for (; c < count; ++c) to[c] = T(from[c]);
  }

  Index dim_;
  Index value_dim_;
  T* key_;
  T* value_;
  T* bias_;
  Index* position_;
  Index count_ = 0;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
