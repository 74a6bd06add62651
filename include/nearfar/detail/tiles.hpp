#pragma once

#include <nearfar/context.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Tokens [first, first + count) of one sequence.
struct Tile {
  Index sequence = 0;
  Index first = 0;
  Index count = 0;
};

/// The queries of a packed batch cut into tiles of at most `rows` tokens, none across two sequences, numbered
/// throughout. They are the tasks that threads share out; their cut does not depend on how many threads there are.
class Tiles {
 public:
  template <class Scalar>
  Tiles(Work& work, const Inputs<Scalar>& inputs, Index rows)
      : rows_(rows), sequences_(sequence_count(inputs)), first_tile_(work.take<Index>(2 * sequences_ + 1)) {
    Index* length = first_tile_ + sequences_ + 1;
    first_tile_[0] = 0;
    for (Index b = 0; b < sequences_; ++b) {
      length[b] = nearfar::sequence(inputs, b).query_count;
      first_tile_[b + 1] = first_tile_[b] + (length[b] + rows - 1) / rows;
    }
  }

  Index count() const { return first_tile_[sequences_]; }

  Tile operator[](Index number) const {
    const Index b = std::upper_bound(first_tile_, first_tile_ + sequences_ + 1, number) - first_tile_ - 1;
    const Index first = (number - first_tile_[b]) * rows_;
    return {b, first, std::min(rows_, first_tile_[sequences_ + 1 + b] - first)};
  }

 private:
  Index rows_;
  Index sequences_;
  Index* first_tile_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
