#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The gradients of keys and values, zero from when a walk over the keys first comes to them: no further pass over
/// memory sets them so.
template <class Scalar>
class FreshGradients {
 public:
  FreshGradients(Tokens<Scalar> key, Tokens<Scalar> value, Range rows)
      : key_(key), value_(value), reached_(rows.first), end_(rows.end) {}

  /// The walk comes to the rows before `end`.
  void reach(Index end) {
    const Index count = std::min(end, end_) - reached_;
    if (count <= 0) return;
    key_.middle_rows(reached_, count).matrix().setZero();
    value_.middle_rows(reached_, count).matrix().setZero();
    reached_ += count;
  }

  /// It will come to those before `end`.
  void announce(Lookahead& ahead, Index end) const {
    const Index count = std::min(end, end_) - reached_;
    ahead.add(key_.middle_rows(reached_, count));
    ahead.add(value_.middle_rows(reached_, count));
  }

 private:
  Tokens<Scalar> key_;
  Tokens<Scalar> value_;
  Index reached_;
  Index end_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
