#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/engine/softmax/key_tile.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The gradients of keys and values on a walk over the keys: which rows it comes to first, so that it may write these
/// instead of adding to them. No further pass over memory sets them to zero.
template <class Scalar>
class FreshGradients {
 public:
  FreshGradients(Tokens<Scalar> key, Tokens<Scalar> value, Range rows)
      : key_(key), value_(value), reached_(rows.first), end_(rows.end) {}

  /// The walk comes to the rows before `end`, and meets these keys. Gives the places of those whose gradients hold
  /// nothing yet; rows that have no key among them become zero.
  template <class T>
  Range reach(const KeyTile<T>& keys, Index end) {
    const Range rows{reached_, std::min(end, end_)};
    if (rows.count() == 0) return {};
    const Range fresh = keys.within(rows);
    if (fresh.count() < rows.count()) set_zero(rows);
    reached_ = rows.end;
    return fresh;
  }

  /// It comes to no others: these become zero.
  void finish() { set_zero({reached_, end_}); }

  /// It will come to those before `end`.
  void announce(Lookahead& ahead, Index end) const {
    const Index count = std::min(end, end_) - reached_;
    ahead.add(key_.middle_rows(reached_, count));
    ahead.add(value_.middle_rows(reached_, count));
  }

 private:
  void set_zero(Range rows) const {
    key_.middle_rows(rows.first, rows.count()).matrix().setZero();
    value_.middle_rows(rows.first, rows.count()).matrix().setZero();
  }

  Tokens<Scalar> key_;
  Tokens<Scalar> value_;
  Index reached_;
  Index end_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
