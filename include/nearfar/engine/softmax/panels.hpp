#pragma once

#include <nearfar/detail/scratch.hpp>
#include <nearfar/engine/microkernel.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// The queries of a tile cut into panels, which lie on the vector lanes side by side: at most `width` of them a panel.
///
/// A panel whose queries see different keys meets those of each with few of its vectors. So where the queries of a
/// `block` see alike, no panel holds queries of two blocks: a block is cut as evenly as whole vectors allow, and blocks
/// smaller than a panel share one.
template <class T>
class Panels {
 public:
  static constexpr Index width = panel_vectors * lanes<T>;

  /// Room for `most` panels.
  Panels(Scratch& scratch, Index most) : begin_(scratch.take<Index>(most + 1)) {}

  /// The panels of `count` queries, the first of them number `first` of its sequence.
  Panels(Scratch& scratch, Index first, Index count, Index block)
      : Panels(scratch, count / width + count / alike(block) + 2) {
    cut(first, count, block);
  }

  void cut(Index first, Index count, Index block) {
    count_ = 0;
    for (Index at = 0; at < count; at += size_at(first + at, block)) begin_[count_++] = at;
    begin_[count_] = count;
  }

  Index count() const { return count_; }
  Index queries() const { return begin_[count_]; }

  /// The first query of panel p, counted from the tile's first; of the panel after the last, how many queries there
  /// are.
  Index begin(Index p) const { return begin_[p]; }
  Index size(Index p) const { return begin_[p + 1] - begin_[p]; }

  /// How many queries, from number `first` on, to take into at most `panels` of them: whole blocks if one fits, where
  /// `first` begins a block; else none of a further block.
  static Index fitting(Index panels, Index first, Index block) {
    const Index together = ceil_div(alike(block), width);
    return together <= panels ? panels / together * alike(block) : std::min(panels * width, block - first % block);
  }

 private:
  // So many queries are cut into panels together: a block, or the blocks that fit one panel.
  static Index alike(Index block) { return block < width ? width / block * block : block; }

  // The queries of a panel that begins with number `query`.
  static Index size_at(Index query, Index block) {
    const Index left = alike(block) - query % block;
    const Index panels = ceil_div(left, width);
    return std::min(left, round_up(ceil_div(left, panels), lanes<T>));
  }

  Index* begin_;
  Index count_ = 0;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
