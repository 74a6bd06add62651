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

/// The tokens of a packed batch cut into tiles of at most `rows`, none across two sequences, numbered throughout. They
/// are the tasks that threads share out; their cut does not depend on how many threads there are.
class Tiles {
 public:
  /// Of length(b) tokens of sequence b.
  template <class Length>
  Tiles(Work& work, Index sequences, Index rows, Length&& length)
      : rows_(rows), sequences_(sequences), first_tile_(work.take<Index>(2 * sequences + 1)) {
    Index* lengths = first_tile_ + sequences_ + 1;
    first_tile_[0] = 0;
    for (Index b = 0; b < sequences_; ++b) {
      lengths[b] = length(b);
      first_tile_[b + 1] = first_tile_[b] + (lengths[b] + rows - 1) / rows;
    }
  }

  /// Of the queries.
  template <class Scalar>
  Tiles(Work& work, const Inputs<Scalar>& inputs, Index rows)
      : Tiles(work, sequence_count(inputs), rows, [&](Index b) { return sequence(inputs, b).query_count; }) {}

  Index count() const { return first_tile_[sequences_]; }

  /// The tiles of sequence b.
  Range of(Index b) const { return {first_tile_[b], first_tile_[b + 1]}; }

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
