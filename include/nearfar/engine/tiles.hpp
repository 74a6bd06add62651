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

/// The tokens of a packed batch cut into tiles, none across two sequences, numbered throughout. They are the tasks that
/// threads share out; their cut does not depend on how many threads there are.
class Tiles {
 public:
  /// Of sequence b all tokens(b), rows(b) a tile; the last may have fewer.
  template <class TokensOf, class RowsOf>
  Tiles(Work& work, Index sequences, TokensOf&& tokens, RowsOf&& rows)
      : sequences_(sequences), cut_(work.take<Cut>(sequences + 1)) {
    cut_[0].first_tile = 0;
    for (Index b = 0; b < sequences; ++b) {
      cut_[b].tokens = tokens(b);
      cut_[b].rows = rows(b);
      cut_[b + 1].first_tile = cut_[b].first_tile + ceil_div(cut_[b].tokens, cut_[b].rows);
    }
  }

  /// Of the queries.
  template <class Scalar>
  Tiles(Work& work, const Inputs<Scalar>& inputs, Index rows)
      : Tiles(
            work, sequence_count(inputs), [&](Index b) { return sequence(inputs, b).query_count; },
            [rows](Index) { return rows; }) {}

  Index count() const { return cut_[sequences_].first_tile; }
  Index sequences() const { return sequences_; }

  /// The tiles of sequence b.
  Range of(Index b) const { return {cut_[b].first_tile, cut_[b + 1].first_tile}; }

  Tile operator[](Index number) const {
    const auto before = [](Index tile, const Cut& cut) { return tile < cut.first_tile; };
    const Index b = std::upper_bound(cut_, cut_ + sequences_ + 1, number, before) - cut_ - 1;
    const Index first = (number - cut_[b].first_tile) * cut_[b].rows;
    return {b, first, std::min(cut_[b].rows, cut_[b].tokens - first)};
  }

 private:
  struct Cut {
    Index first_tile;
    Index tokens;
    Index rows;
  };

  Index sequences_;
  Cut* cut_;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
