#pragma once

#include <nearfar/detail/checks.hpp>
#include <nearfar/detail/tiles.hpp>
#include <nearfar/engine/pooling_convolution.hpp>
#include <nearfar/engine/query_tile.hpp>

#include <optional>
#include <string>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// How a group of tokens becomes `rank` pooled keys and values.
enum class Pooling {
  average,                   ///< the mean of each of its `rank` sub-blocks
  grouped_convolution,       ///< the authors' learned pooling: every level pools the tokens
  hierarchical_convolution,  ///< learned, each level from the pooled rows of the level below: linear in n
};

/// Which tokens of a sub-block enter its pooled query.
enum class QueryPooling {
  unmasked,  ///< those that the key mask lets be seen; a sub-block without any has the query zero
  all,       ///< all of them
};

struct MultipoleOptions {
  /// Tokens a block. A query sees its own block and the two beside it token by token.
  Index block = 64;
  /// Pooled vectors a group. It divides block.
  Index rank = 4;
  bool causal = false;
  /// Whether a pooled key weighs as much as the tokens it stands for.
  bool mass_scaling = true;
  Pooling pooling = Pooling::average;
  /// Whether far groups are seen by the mean of a sub-block's queries instead of by each query. Not causal.
  bool pooled_queries = false;
  QueryPooling query_pooling = QueryPooling::unmasked;
  /// What query . key is multiplied by; 1 / sqrt(dim) unless given.
  std::optional<double> scale = {};
  /// Levels for which learned pooling has parameters: sequences of up to block * 2^(levels + 1) tokens. Average pooling
  /// needs none.
  Index levels = 0;
};

/// The parameters of learned pooling, level l = 1, 2, ... at index l - 1. Empty for average pooling.
template <class T>
struct MultipoleParameters {
  std::vector<PoolingConvolution<T>> key;
  std::vector<PoolingConvolution<T>> value;

  template <class Visit>
  void for_each(Visit&& visit) {
    for (std::size_t l = 0; l < key.size(); ++l) {
      const std::string level = std::to_string(l + 1);
      visit("conv_k_w_" + level, key[l].weight);
      visit("conv_k_b_" + level, key[l].bias);
      visit("conv_v_w_" + level, value[l].weight);
      visit("conv_v_b_" + level, value[l].bias);
    }
  }
};

/// Fast multipole attention: near keys one by one, far keys pooled in groups that double with distance, one softmax.
///
///   out_i = ( sum_{j near} e^{s q_i.k_j} v_j + sum_l sum_{c in I_l(i)} M_c e^{s q_i.K_c} V_c ) / (the same without v,
///   V)
///
/// Near are the keys of query i's own block of `block` tokens and of the two beside it. At level l = 1 .. L, groups are
/// block * 2^(l-1) tokens wide, and I_l(i), the interaction list, holds the `rank` pooled keys K_c and values V_c of
/// each group that is no neighbour of i's group but whose parent is one of its parent's (or that parent). Every token
/// is in exactly one of these. M_c is the mass, the number of tokens that c stands for (1 without mass_scaling). With
/// pooled queries, q_i at level l is the mean of the queries of i's sub-block of block * 2^(l-1) / rank tokens.
///
/// Shapes: query and out n x (heads.query * dim), key and value n x (heads.key_value * dim). Causal: keys j <= i, and
/// groups before i's alone. Time: n (3 block + 3 rank L) dim a head with L = log2(n / block) - 1, so n log n; with
/// pooled queries n (3 block + O(rank^2 / block)) dim, linear. Memory beside inputs and out: O(n rank / block) pooled
/// rows; a second call of the same shapes allocates nothing. Masked keys enter no near list, mean, mass or convolution,
/// and groups or sub-blocks without a token are skipped. A query that sees no key gets a zero row and log-sum-exp
/// -infinity.
///
/// Source: Kang, Tran and De Sterck, Fast Multipole Attention, arXiv 2310.11960: levels and interaction lists of
/// section 3, pooling by equation 5; the average, the hierarchical convolution and the mean of pooled queries are the
/// multipole method's own upward and downward passes (Greengard and Rokhlin 1987).
template <class T>
class Multipole {
 public:
  using Scalar = T;
  using Options = MultipoleOptions;
  using Parameters = MultipoleParameters<T>;

  /// log_sum_exp: heads.query x n, over all columns that a query sees, masses included.
  struct Saved {
    Matrix<T> log_sum_exp;
  };

  /// Parameters of learned pooling start as the average.
  explicit Multipole(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_equal_widths(name, heads);
    detail::check_scale(name, options.scale);
    detail::require(options.block >= 1, name, "block must be at least 1, but is ", options.block, ".");
    detail::require(options.rank >= 1, name, "rank must be at least 1, but is ", options.rank, ".");
    detail::require(options.block % options.rank == 0, name, "rank must divide block, but ", options.rank,
                    " does not divide ", options.block, ".");
    detail::require(options.levels >= 0, name, "levels must be 0 or more, but is ", options.levels, ".");
    detail::require(!(options.causal && options.pooled_queries), name,
                    "pooled_queries cannot be causal, because the mean of a sub-block's queries depends on later "
                    "tokens, but causal and pooled_queries are both true.");
    if (options.pooling == Pooling::average) return;
    for (Index l = 1; l <= options.levels; ++l) {
      parameters_.key.push_back(averaging_convolution(l));
      parameters_.value.push_back(averaging_convolution(l));
    }
  }

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    check(inputs, out);
    attend(inputs, out, nullptr, context);
  }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Saved& saved, Context& context = default_context()) const {
    check(inputs, out);
    saved.log_sum_exp.resize(heads_.query, inputs.query.rows());
    attend(inputs, out, saved.log_sum_exp.data(), context);
  }

 private:
  static constexpr const char* name = "Multipole";
  static constexpr int vectors = 2;
  static constexpr Index queries_a_tile = 256;
  static constexpr Index coarse_queries_a_tile = 64;

  /// What stands for the far tokens: the pooled keys and values of all levels, and what their scores start from, log2
  /// of their mass, or -infinity for one that stands for no token.
  struct FarField {
    detail::HeadRows<T> key;
    detail::HeadRows<T> value;
    T* bias = nullptr;
  };

  /// Attention of the pooled queries to the far field, all levels from their own up: rows of normalised values and,
  /// head by head, log-sum-exps.
  struct CoarseResult {
    detail::HeadRows<T> out;
    T* log_sum_exp = nullptr;
  };

  void check(const Inputs<T>& inputs, Tokens<const T> out) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::equal);
    if (options_.pooling == Pooling::average) return;
    for (Index b = 0; b < sequence_count(inputs); ++b) {
      const Index tokens = sequence(inputs, b).key_count;
      const Index levels = tree(tokens).levels();
      detail::require(levels <= options_.levels, name, "a sequence of ", tokens,
                      " tokens needs pooling parameters for ", levels, " levels, but options.levels is ",
                      options_.levels, ".");
    }
  }

  detail::Hierarchy tree(Index tokens) const { return {tokens, options_.block, options_.rank}; }

  PoolingConvolution<T> averaging_convolution(Index l) const {
    const Index rank = options_.rank;
    const bool of_tokens = l == 1 || options_.pooling == Pooling::grouped_convolution;
    const Index window = of_tokens ? options_.block << (l - 1) : 2 * rank;
    const Index share = window / rank;
    PoolingConvolution<T> level{Matrix<T>::Zero(heads_.dim * rank, window), Matrix<T>::Zero(1, heads_.dim * rank)};
    for (Index row = 0; row < level.weight.rows(); ++row) {
      level.weight.row(row).segment(row % rank * share, share).setConstant(T(1) / static_cast<T>(share));
    }
    return level;
  }

  void attend(const Inputs<T>& inputs, Tokens<T> out, T* log_sum_exp, Context& context) const {
    detail::Work work(context);
    for (Index b = 0; b < sequence_count(inputs); ++b) {
      const Sequence rows = sequence(inputs, b);
      attend_sequence(work, sequence_inputs(inputs, rows), out.middle_rows(rows.query_begin, rows.query_count),
                      log_sum_exp == nullptr ? nullptr : log_sum_exp + rows.query_begin, inputs.query.rows());
    }
  }

  static Inputs<T> sequence_inputs(const Inputs<T>& inputs, const Sequence& rows) {
    Inputs<T> one{inputs.query.middle_rows(rows.query_begin, rows.query_count),
                  inputs.key.middle_rows(rows.key_begin, rows.key_count),
                  inputs.value.middle_rows(rows.key_begin, rows.key_count)};
    if (!inputs.key_mask.empty()) {
      one.key_mask =
          inputs.key_mask.subspan(static_cast<std::size_t>(rows.key_begin), static_cast<std::size_t>(rows.key_count));
    }
    return one;
  }

  void attend_sequence(detail::Work& work, const Inputs<T>& inputs, Tokens<T> out, T* log_sum_exp,
                       Index log_sum_exp_stride) const {
    const detail::Hierarchy tree = this->tree(inputs.query.rows());
    const FarField far = pool(work, tree, inputs);
    const bool pooled_queries = options_.pooled_queries && tree.levels() > 0;
    const CoarseResult coarse = pooled_queries ? attend_coarse(work, tree, inputs, far) : CoarseResult{};

    const detail::Tiles tiles(work, inputs, queries_a_tile_of_blocks());
    work.for_each(tiles.count() * heads_.query, [&](Index task, detail::Scratch& scratch) {
      const detail::Tile tile = tiles[task / heads_.query];
      const Index head = task % heads_.query;
      const Index key_head = head / heads_.group();
      detail::QueryTile<T, vectors> queries(scratch, tile.count, heads_.dim, heads_.dim);
      detail::KeyTile<T> keys(scratch, heads_.dim, heads_.dim);
      queries.load(inputs.query.row(tile.first) + head * heads_.dim, inputs.query.stride(), tile.first, tile.count,
                   score_factor());
      if (pooled_queries) {
        queries.start_from(coarse.out.row(head, 0), coarse.out.row_stride, coarse.log_sum_exp + head * tree.rows(),
                           tree.sub_block(1));
      }
      visit_near_field(tree, inputs, key_head, tile, queries, keys);
      if (!pooled_queries) visit_far_field(tree, far, key_head, tile, queries, keys);
      queries.finish(out.row(tile.first) + head * heads_.dim, out.stride(),
                     log_sum_exp == nullptr ? nullptr : log_sum_exp + head * log_sum_exp_stride + tile.first);
    });
  }

  /// A tile holds whole blocks where it can, so that few of its panels straddle two.
  Index queries_a_tile_of_blocks() const {
    return options_.block < queries_a_tile ? queries_a_tile / options_.block * options_.block : queries_a_tile;
  }

  T score_factor() const {
    return static_cast<T>(detail::scale_or_default(options_.scale, heads_)) * detail::log2_e<T>;
  }

  /// The upward pass: pooled keys, values and masses of all levels.
  FarField pool(detail::Work& work, const detail::Hierarchy& tree, const Inputs<T>& inputs) const {
    const FarField far{detail::take_head_rows<T>(work, tree.rows(), heads_.key_value, heads_.dim),
                       detail::take_head_rows<T>(work, tree.rows(), heads_.key_value, heads_.dim),
                       work.take<T>(tree.rows())};
    const std::uint8_t* mask = inputs.key_mask.empty() ? nullptr : inputs.key_mask.data();
    T* mass = work.take<T>(tree.rows());
    detail::count_tokens(tree, mask, mass);
    const auto key = detail::head_rows(inputs.key, heads_.key_value);
    const auto value = detail::head_rows(inputs.value, heads_.key_value);
    if (options_.pooling == Pooling::average) {
      detail::pool_average<T>(work, tree, key, mask, mass, far.key);
      detail::pool_average<T>(work, tree, value, mask, mass, far.value);
    } else {
      detail::share_mass(tree, mass);
      const bool hierarchical = options_.pooling == Pooling::hierarchical_convolution;
      detail::ConvolutionPooling<T>(work, tree, hierarchical, parameters_.key, heads_.dim, mask, mass)
          .forward(key, far.key);
      detail::ConvolutionPooling<T>(work, tree, hierarchical, parameters_.value, heads_.dim, mask, mass)
          .forward(value, far.value);
    }
    for (Index row = 0; row < tree.rows(); ++row) {
      far.bias[row] = options_.mass_scaling || mass[row] == T(0) ? std::log2(mass[row]) : T(0);
    }
    return far;
  }

  void visit_near_field(const detail::Hierarchy& tree, const Inputs<T>& inputs, Index key_head,
                        const detail::Tile& tile, detail::QueryTile<T, vectors>& queries,
                        detail::KeyTile<T>& keys) const {
    const detail::NearField near(tree, options_.causal);
    const Range seen = near.seen_by_any(tile.first, tile.count);
    for (Index j = seen.first; j < seen.end; ++j) {
      if (inputs.key_mask.empty() || inputs.key_mask[static_cast<std::size_t>(j)] != 0) {
        keys.append(inputs.key.row(j) + key_head * heads_.dim, inputs.value.row(j) + key_head * heads_.dim, j);
      }
      if (keys.full()) visit(queries, keys, near);
    }
    visit(queries, keys, near);
  }

  /// The interaction lists of each block of the tile, at all levels.
  void visit_far_field(const detail::Hierarchy& tree, const FarField& far, Index key_head, const detail::Tile& tile,
                       detail::QueryTile<T, vectors>& queries, detail::KeyTile<T>& keys) const {
    const Index last = (tile.first + tile.count - 1) / tree.block();
    for (Index block = tile.first / tree.block(); block <= last; ++block) {
      const detail::OfGroup group({block * tree.block(), (block + 1) * tree.block()});
      for (Index l = 1; l <= tree.levels(); ++l) {
        const detail::InteractionList list = tree.interaction_list(l, block >> (l - 1), options_.causal);
        for (const Range& rows : {list.left, list.right}) append(far, key_head, rows, 0, queries, keys, group);
      }
      visit(queries, keys, group);
    }
  }

  /// Pooled queries: the downward pass. Each level sees its own interaction lists, starting from what its parents saw.
  CoarseResult attend_coarse(detail::Work& work, const detail::Hierarchy& tree, const Inputs<T>& inputs,
                             const FarField& far) const {
    const CoarseResult coarse{detail::take_head_rows<T>(work, tree.rows(), heads_.query, heads_.dim),
                              work.take<T>(heads_.query * tree.rows())};
    const detail::HeadRows<T> query = detail::take_head_rows<T>(work, tree.rows(), heads_.query, heads_.dim);
    const bool all = options_.query_pooling == QueryPooling::all || inputs.key_mask.empty();
    const std::uint8_t* mask = all ? nullptr : inputs.key_mask.data();
    T* count = work.take<T>(tree.rows());
    detail::count_tokens(tree, mask, count);
    detail::pool_average<T>(work, tree, detail::head_rows(inputs.query, heads_.query), mask, count, query);

    for (Index l = tree.levels(); l >= 1; --l) {
      const Index first_row = tree.level(l).first_row;
      const Index rows = tree.level(l).groups * tree.rank();
      const Index tiles = (rows - 1) / coarse_queries_a_tile + 1;
      work.for_each(tiles * heads_.query, [&](Index task, detail::Scratch& scratch) {
        const Index head = task % heads_.query;
        const Index first = task / heads_.query * coarse_queries_a_tile;
        const Index queried = std::min(coarse_queries_a_tile, rows - first);
        detail::QueryTile<T, vectors> queries(scratch, queried, heads_.dim, heads_.dim);
        detail::KeyTile<T> keys(scratch, heads_.dim, heads_.dim);
        queries.load(query.row(head, first_row + first), query.row_stride, first, queried, score_factor());
        if (l < tree.levels()) {
          const Index above = tree.level(l + 1).first_row;
          queries.start_from(coarse.out.row(head, above), coarse.out.row_stride,
                             coarse.log_sum_exp + head * tree.rows() + above, 2);
        }
        for (const bool right : {false, true}) {
          const detail::InteractionSide side(tree, l, right);
          const Range seen = side.seen_by_any(first, queried);
          append(far, head / heads_.group(), {first_row + seen.first, first_row + seen.end}, first_row, queries, keys,
                 side);
          visit(queries, keys, side);
        }
        queries.finish(coarse.out.row(head, first_row + first), coarse.out.row_stride,
                       coarse.log_sum_exp + head * tree.rows() + first_row + first);
      });
    }
    return coarse;
  }

  /// Pooled keys join the tile under positions counted from `origin`; a full tile is visited.
  template <class Mask>
  static void append(const FarField& far, Index key_head, Range rows, Index origin,
                     detail::QueryTile<T, vectors>& queries, detail::KeyTile<T>& keys, const Mask& mask) {
    for (Index row = rows.first; row < rows.end; ++row) {
      if (far.bias[row] == -detail::infinity<T>) continue;
      keys.append(far.key.row(key_head, row), far.value.row(key_head, row), row - origin, far.bias[row]);
      if (keys.full()) visit(queries, keys, mask);
    }
  }

  template <class Mask>
  static void visit(detail::QueryTile<T, vectors>& queries, detail::KeyTile<T>& keys, const Mask& mask) {
    if (keys.count() > 0) queries.visit(keys, mask);
    keys.clear();
  }

  Heads heads_;
  Options options_;
  Parameters parameters_;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
