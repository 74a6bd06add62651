#pragma once

#include <nearfar/engine/multipole/walk.hpp>
#include <nearfar/engine/softmax/key_value_cache.hpp>

#include <algorithm>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// What a stream of multipole attention remembers.
///
/// A causal query sees its own block and the one before token by token, and of the levels only whole groups before
/// these, which no later token changes. So a stream keeps of a level at most three groups, those that are yet to be
/// seen or have a parent to come, and the one that is not yet whole; and the last two blocks token by token. A block is
/// pooled, into its groups of all levels, as soon as it is whole.
template <class T>
struct MultipoleState {
  KeyValueCache<T> near;  ///< the tokens of the block before that of the next token, and the tokens after it
  Matrix<T> key;          ///< pooled rows of all levels, at most 4 rank a level, x (heads.key_value * dim)
  Matrix<T> value;        ///< the same
  Matrix<T> mass;         ///< 1 x pooled rows
  Matrix<T> bias;         ///< 1 x pooled rows
  Index tokens = 0;       ///< seen so far

  FarField<T> far(Index heads) {
    return {head_rows(Tokens<T>(key), heads), head_rows(Tokens<T>(value), heads), mass.data(), bias.data()};
  }

  /// Room for the pooled rows of so many levels; what they hold is lost.
  void make_room(const Heads& heads, Index levels, Index rank) {
    const Index rows = 4 * rank * levels;
    if (key.rows() >= rows && key.cols() > 0) return;
    key.resize(rows, heads.key_cols());
    value.resize(rows, heads.key_cols());
    mass.resize(1, rows);
    bias.resize(1, rows);
  }
};

/// That a state comes from the attention whose tree this is, where the stream stands.
template <class T>
void check_state(std::string_view mechanism, const Heads& heads, const Hierarchy& tree,
                 const MultipoleState<T>& state) {
  check_cache(mechanism, heads, 2 * tree.block(), state.near);
  const Index near = state.tokens - tree.first_token();
  require(state.near.count >= near && state.key.rows() >= tree.rows(), mechanism, "this state holds ", state.near.count,
          " near tokens and ", state.key.rows(), " pooled rows, but its options need ", near, " and ", tree.rows(),
          ": take it from start().");
}

/// Copies the pooled rows that two trees of one stream have in common.
template <class T>
void copy_groups(const Hierarchy& from_tree, const FarField<T>& from, const Hierarchy& to_tree, const FarField<T>& to) {
  const Index rank = from_tree.rank();
  for (Index l = 1; l <= std::min(from_tree.levels(), to_tree.levels()); ++l) {
    const Level& source = from_tree.level(l);
    const Level& target = to_tree.level(l);
    const Range groups{std::max(source.first_group, target.first_group), std::min(source.groups, target.groups)};
    for (Index row = groups.first * rank; row < groups.end * rank; ++row) {
      const Index s = source.first_row + row, t = target.first_row + row;
      for (Index h = 0; h < to.key.heads; ++h) {
        std::copy_n(from.key.row(h, s), to.key.dim, to.key.row(h, t));
        std::copy_n(from.value.row(h, s), to.value.dim, to.value.row(h, t));
      }
      to.mass[t] = from.mass[s];
      to.bias[t] = from.bias[s];
    }
  }
}

/// Appends tokens to a stream that has seen `begin`. Calls attend(first_block, inputs, out) once or twice, with queries
/// from block first_block on and keys that begin with the block before.
template <class T, class Attend>
void extend_blocks(KeyValueCache<T>& cache, Index block, Index begin, const Inputs<T>& inputs, Tokens<T> out,
                   Attend&& attend) {
  const Index count = inputs.query.rows();
  const auto near_since = [&](Index token) { return std::max<Index>(token / block - 1, 0) * block; };
  // The first queries see blocks of which some tokens came before this call: they meet them in the cache. What the
  // others see token by token came with them.
  const Index joined = begin == 0 ? 0 : std::min(count, ((begin - 1) / block + 2) * block - begin);
  if (joined > 0) {
    const Index before = begin - near_since(begin);
    cache.append(middle_tokens(inputs, 0, joined), before);
    attend(begin / block, cache.inputs(inputs.query.middle_rows(0, joined), before + joined),
           out.middle_rows(0, joined));
  }
  if (joined == count) return;
  const Index first = near_since(begin + joined) - begin;
  Inputs<T> others = middle_tokens(inputs, first, count - first);
  others.query = inputs.query.middle_rows(joined, count - joined);
  attend((begin + joined) / block, others, out.middle_rows(joined, count - joined));
  const Index last = near_since(begin + count) - begin;
  cache.count = 0;
  cache.append(middle_tokens(inputs, last, count - last), 0);
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
