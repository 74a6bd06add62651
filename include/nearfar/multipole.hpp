#pragma once

#include <nearfar/checks.hpp>
#include <nearfar/engine/multipole/backward.hpp>
#include <nearfar/engine/multipole/pooled_queries.hpp>
#include <nearfar/engine/multipole/stream.hpp>

#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

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
    each(*this, visit);
  }
  template <class Visit>
  void for_each(Visit&& visit) const {
    each(*this, visit);
  }

 private:
  static void each(auto& p, auto& visit) {
    for (std::size_t l = 0; l < p.key.size(); ++l) {
      const auto visit_level = [&](const char* of, auto& matrix) {
        const std::string name = of + std::to_string(l + 1);
        visit(name, matrix);
      };
      visit_level("conv_k_w_", p.key[l].weight);
      visit_level("conv_k_b_", p.key[l].bias);
      visit_level("conv_v_w_", p.value[l].weight);
      visit_level("conv_v_b_", p.value[l].bias);
    }
  }
};

/// Fast multipole attention: near keys one by one, far keys pooled in groups that double with distance, one softmax.
///
///   out_i = ( sum_{j near i} w_ij v_j + sum_{l, c in I_l(i)} W_ic V_c ) / ( sum_{j near i} w_ij + sum_{l, c} W_ic )
///
///   w_ij = exp(scale * q_i . k_j)        W_ic = M_c exp(scale * q_i . K_c)        for each head
///
/// Near field: the keys of query i's own block of `block` tokens and of the two beside it.
/// Levels l = 1 .. L: groups of block * 2^(l-1) tokens, L = max(0, ceil(log2(n / block)) - 1).
/// Interaction list I_l(i): the `rank` pooled keys K_c and values V_c of each group that is no neighbour of i's group,
/// but whose parent is i's group's parent or a neighbour of it. Every token is near or in one list, once.
/// Mass M_c: how many tokens c stands for, or 1 without mass_scaling.
/// Pooled queries: at level l, q_i is the mean of the queries of i's sub-block of block * 2^(l-1) / rank tokens.
///
/// Shapes: query and out n x (heads.query * dim), key and value n x (heads.key_value * dim); n of any length, a last
/// block or group may be ragged. Causal: near keys j <= i, and only groups before i's.
/// Time: 4 n (3 block + 3 rank L) dim flops a head, so n log n; with pooled queries 4 n (3 block + O(rank^2 / block))
/// dim, linear in n. Learned pooling adds 4 n rank dim flops a key/value head, once a level for the grouped form. The
/// backward pass takes 2.5 times as much.
/// Memory beside inputs and out, for the longest sequence of each thread: O(n rank / block) pooled rows of each head,
/// and a copy of the learned pooling's weights; backward O(n) rows. A second call of the same shapes allocates nothing.
/// Streams (causal) remember near keys and values of at most two blocks, in room for up to three times as many, and at
/// most 4 rank pooled rows a level: which groups a query sees, and what they hold, is in its place alone. Masked keys
/// enter no near field, mean, mass or convolution, and sub-blocks (groups, where pooling is learned) without a token
/// are skipped. A query that sees no key gets a zero row and log-sum-exp -infinity.
///
/// Source: Kang, Tran and De Sterck, Fast Multipole Attention, arXiv 2310.11960, and its authors' code, whose
/// scale_attn is the mass; upward pass, interaction list and downward pass are those of Greengard and Rokhlin, A Fast
/// Algorithm for Particle Simulations, 1987. The hierarchical convolution is nearfar's own.
template <class T>
class Multipole {
 public:
  using Scalar = T;
  using Options = MultipoleOptions;
  using Parameters = MultipoleParameters<T>;

  /// log_sum_exp: heads.query x n, over near and pooled keys, masses included. Backward pools keys and values again.
  struct Saved {
    Matrix<double> log_sum_exp;
  };

  /// What a stream remembers: near keys and values of at most two blocks, and O(rank log n) pooled rows of each head.
  using State = detail::MultipoleState<T>;

  /// Throws std::invalid_argument on options that contradict each other. Learned pooling starts as the average.
  explicit Multipole(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_equal_widths(name, heads);
    detail::check_scale<T>(name, options.scale);
    detail::require(options.block >= 1, name, "block must be at least 1, but is ", options.block, ".");
    detail::require(options.rank >= 1, name, "rank must be at least 1, but is ", options.rank, ".");
    detail::require(options.block % options.rank == 0, name, "rank must divide block, but ", options.rank,
                    " does not divide ", options.block, ".");
    detail::require(options.block <= most_tokens / 4, name, "block must be at most ", most_tokens / 4, ", but is ",
                    options.block, ".");
    detail::require(options.levels >= 0, name, "levels must be 0 or more, but is ", options.levels, ".");
    detail::require(options.levels < most_levels && options.block <= most_tokens >> (options.levels + 1), name,
                    "levels must leave block * 2^(levels + 1) at most ", most_tokens, ", but block is ", options.block,
                    " and levels is ", options.levels, ".");
    detail::require(!(options.causal && options.pooled_queries), name,
                    "pooled_queries cannot be causal, because the mean of a sub-block's queries depends on later "
                    "tokens, but causal and pooled_queries are both true.");
    if (options.pooling == Pooling::average) return;
    for (Index l = 1; l <= options.levels; ++l) {
      parameters_.key.push_back(detail::averaging_convolution<T>(heads.dim, options.rank, window(l)));
      parameters_.value.push_back(parameters_.key.back());
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

  void backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                const InputGradients<T>& grad_inputs, Parameters& grad_parameters,
                Context& context = default_context()) const {
    check(inputs, out);
    detail::check_gradients<T>(name, heads_, inputs, out, grad_out, grad_inputs);
    detail::check_saved(name, "log_sum_exp", saved.log_sum_exp, heads_.query, inputs.query.rows());
    check_parameters(grad_parameters, "the gradient of ");
    detail::check_apart(name, parameters_, grad_parameters);
    detail::Work work(context);
    const Index stride = inputs.query.rows();
    T* delta = work.take<T>(heads_.query * stride);
    detail::softmax_delta(work, heads_, out, grad_out, delta);
    // All sequences add to the gradients of learned pooling, in their order.
    for_each_sequence(work, inputs, options_.pooling == Pooling::average, [&](detail::Work& own, const Sequence& rows) {
      if (rows.query_count == 0) return;
      const auto part = [&](const auto& tokens) { return tokens.middle_rows(rows.query_begin, rows.query_count); };
      backward_sequence(own, detail::middle_tokens(inputs, rows.query_begin, rows.query_count), part(grad_out),
                        saved.log_sum_exp.data() + rows.query_begin, delta + rows.query_begin, stride,
                        {part(grad_inputs.query), part(grad_inputs.key), part(grad_inputs.value)}, grad_parameters);
    });
  }

  /// A stream that has seen nothing, with room for `room` tokens as in Softmax. The attention must be causal.
  State start(Index room = 0) const {
    detail::check_streams(name, options_.causal);
    State state{detail::start_window<T>(name, heads_, 2 * options_.block, room), {}, {}, {}, {}};
    state.make_room(heads_, stream_tree(0, room / options_.block).levels(), options_.rank);
    return state;
  }

  /// Appends tokens, with as many queries as keys, to a stream and writes their rows of out. The parameters must not
  /// change meanwhile. Takes as long as forward for these queries; for one O((block + rank log n) dim) a head, and each
  /// block-th token pools a block: O(block dim), or O(block rank log n dim) for the authors' learned pooling.
  void extend(State& state, const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    detail::check_streams(name, options_.causal);
    detail::check_stream_inputs<T>(name, heads_, inputs, out);
    check_parameters(parameters_, "");
    detail::check_state(name, heads_, stream_tree(state.tokens / options_.block, state.tokens / options_.block), state);
    check_levels(state.tokens + inputs.query.rows());
    detail::Work work(context);
    detail::extend_blocks(
        state.near, options_.block, state.tokens, inputs, out,
        [&](Index block, const Inputs<T>& seen, Tokens<T> rows) { extend(work, state, block, seen, rows); });
  }

 private:
  static constexpr std::string_view name = "Multipole";
  static constexpr Index most_tokens = Window::unlimited;
  static constexpr Index most_levels = std::numeric_limits<Index>::digits - 1;  // by so many bits it may be shifted

  // Rows of one head lie far apart and crowd into few sets of the second-level cache: a small tile stays there beside
  // the next head's. From memory, keys that two tiles read are better read once.
  static Index queries_a_tile(const Tokens<T>& out) { return detail::larger_than_caches(out) ? 576 : 192; }

  void check(const Inputs<T>& inputs, Tokens<const T> out) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::equal);
    check_parameters(parameters_, "");
    for (Index b = 0; b < sequence_count(inputs); ++b) check_levels(sequence(inputs, b).key_count);
  }

  void check_levels(Index tokens) const {
    if (options_.pooling == Pooling::average) return;
    const Index levels = tree(tokens).levels();
    detail::require(levels <= options_.levels, name, "a sequence of ", tokens, " tokens needs pooling parameters for ",
                    levels, " levels, but options.levels is ", options_.levels, ".");
  }

  void check_parameters(const Parameters& p, std::string_view of) const {
    const Index levels = options_.pooling == Pooling::average ? 0 : options_.levels;
    const Index rows = heads_.dim * options_.rank;
    const auto cols = [&](Index l) { return window(l); };
    detail::check_convolutions<T>(name, of, "conv_k", p.key, levels, rows, cols);
    detail::check_convolutions<T>(name, of, "conv_v", p.value, levels, rows, cols);
  }

  detail::Hierarchy tree(Index tokens) const { return {tokens, options_.block, options_.rank}; }
  double scale() const { return detail::scale_or_default(options_.scale, heads_); }

  // How many children a group of level l pools by learned weights.
  Index window(Index l) const {
    const bool of_tokens = l == 1 || options_.pooling == Pooling::grouped_convolution;
    return of_tokens ? options_.block << (l - 1) : 2 * options_.rank;
  }

  const std::uint8_t* query_mask(const Inputs<T>& inputs) const {
    return options_.query_pooling == QueryPooling::all ? nullptr : key_mask(inputs);
  }

  void attend(const Inputs<T>& inputs, Tokens<T> out, double* log_sum_exp, Context& context) const {
    detail::Work work(context);
    for_each_sequence(work, inputs, true, [&](detail::Work& own, const Sequence& rows) {
      attend_sequence(own, detail::middle_tokens(inputs, rows.query_begin, rows.query_count),
                      out.middle_rows(rows.query_begin, rows.query_count),
                      log_sum_exp == nullptr ? nullptr : log_sum_exp + rows.query_begin, inputs.query.rows());
    });
  }

  // Calls visit(work, rows) for each sequence: for long ones in turn, by all threads; for those that are less than a
  // thread's share, if they are `independent`, side by side.
  template <class Visit>
  static void for_each_sequence(detail::Work& work, const Inputs<T>& inputs, bool independent, Visit&& visit) {
    const Index sequences = sequence_count(inputs);
    const auto by_all = [&](Index b) {
      return !independent || sequence(inputs, b).query_count * work.threads() >= inputs.query.rows();
    };
    for (Index b = 0; b < sequences; ++b) {
      const detail::Work::Scope scope(work);
      if (by_all(b)) visit(work, sequence(inputs, b));
    }
    work.for_each(sequences, [&](Index b, detail::Scratch& scratch) {
      if (by_all(b)) return;
      detail::Work own(scratch);
      visit(own, sequence(inputs, b));
    });
  }

  void attend_sequence(detail::Work& work, const Inputs<T>& inputs, Tokens<T> out, double* log_sum_exp,
                       Index stride) const {
    const detail::Hierarchy tree = this->tree(inputs.query.rows());
    const detail::FarField<T> far = detail::take_far_field<T>(work, tree, heads_);
    pooling(work, tree, inputs).upward(far);
    const detail::MultipoleWalk<T> walk(tree, inputs, far, heads_.dim, options_.causal);
    std::optional<detail::PooledQueries<T>> pooled;
    if (options_.pooled_queries && tree.levels() > 0) {
      pooled.emplace(work, tree, heads_, scale(), inputs.query, query_mask(inputs));
      pooled->attend(walk);
    }
    attend_tiles(work, tree, walk, pooled ? &*pooled : nullptr, inputs, 0, out, log_sum_exp, stride);
  }

  // The whole blocks of a stream up to block `end`, of which those from `first` on are new. A level of average pooling
  // has rows from when its first group is whole; one of learned pooling, from when it holds a token.
  detail::Hierarchy stream_tree(Index first, Index end) const {
    Index levels = options_.levels;
    if (options_.pooling == Pooling::average) {
      for (levels = 0; end >> levels > 0;) ++levels;
    }
    return {end * options_.block, options_.block, options_.rank, first, levels};
  }

  // Goes on with a stream, from queries of `first_block` on. The keys are those from the tree's first token on.
  void extend(detail::Work& work, State& state, Index first_block, const Inputs<T>& inputs, Tokens<T> out) const {
    const Index begin = state.tokens;
    const Index end = begin + inputs.query.rows();
    const detail::Hierarchy tree = stream_tree(first_block, end / options_.block);
    detail::FarField<T> far = state.far(heads_.key_value);
    if (tree.blocks() > first_block) {
      far = detail::take_far_field<T>(work, tree, heads_);
      detail::copy_groups(stream_tree(first_block, first_block), state.far(heads_.key_value), tree, far);
      pooling(work, tree, inputs).upward(far);
    }
    const detail::MultipoleWalk<T> walk(tree, inputs, far, heads_.dim, true);
    attend_tiles(work, tree, walk, nullptr, inputs, begin, out, nullptr, 0);
    if (tree.blocks() > first_block) {
      const detail::Hierarchy rest = stream_tree(tree.blocks(), tree.blocks());
      state.make_room(heads_, rest.levels(), options_.rank);
      detail::copy_groups(tree, far, rest, state.far(heads_.key_value));
    }
    state.tokens = end;
  }

  // `first` is the place of the first query.
  void attend_tiles(detail::Work& work, const detail::Hierarchy& tree, const detail::MultipoleWalk<T>& walk,
                    const detail::PooledQueries<T>* pooled, const Inputs<T>& inputs, Index first, Tokens<T> out,
                    double* log_sum_exp, Index stride) const {
    const Index dim = heads_.dim;
    const detail::Tiles tiles(work, inputs, tree.rows_of_blocks(queries_a_tile(out)));
    work.for_each(tiles.count() * heads_.query, [&](Index task, detail::Scratch& scratch) {
      const detail::Tile tile = tiles[task / heads_.query];
      const Index head = task % heads_.query;
      const Index key_head = head / heads_.group();
      const detail::Tile place{0, first + tile.first, tile.count};
      const Tokens<const T> query = inputs.query.middle_rows(tile.first, tile.count).head(head, dim);
      const Tokens<T> result = out.middle_rows(tile.first, tile.count).head(head, dim);
      detail::QueryTile<T> queries(scratch, place.first, tile.count, dim, dim, options_.block);
      detail::KeyTile<T> keys(scratch, dim, dim);
      const auto visit = [&](const auto& band) { queries.visit(keys, band); };

      const bool past = detail::columns_past_caches(out, dim);
      detail::Lookahead later;
      if (!past) later.add(result);
      // Tasks are numbered head by head within a tile.
      const Index next_head = work.likely_next(head);
      if (next_head < heads_.query) {
        later.add(query.data() + (next_head - head) * dim, query.stride(), tile.count, dim);
        walk.announce(place, next_head / heads_.group(), later);
      }
      queries.load(query.data(), query.stride(), detail::log2_scale<T>(scale()));
      if (pooled != nullptr) pooled->hand_down(head, queries);
      queries.lookahead().and_then(&later);
      walk.near_field(place, key_head, keys, queries.lookahead(), visit);
      if (pooled == nullptr) walk.far_field(place, key_head, keys, visit);
      detail::with_store(past, [&](detail::KeepOrPastCaches store) {
        queries.finish(result.data(), result.stride(),
                       log_sum_exp == nullptr ? nullptr : log_sum_exp + head * stride + tile.first, nullptr, store);
      });
    });
  }

  void backward_sequence(detail::Work& work, const Inputs<T>& inputs, Tokens<const T> grad_out,
                         const double* log_sum_exp, const T* delta, Index stride, const InputGradients<T>& gradients,
                         Parameters& grad_parameters) const {
    const detail::Hierarchy tree = this->tree(inputs.query.rows());
    const detail::FarField<T> far = detail::take_far_field<T>(work, tree, heads_);
    const detail::FarFieldPooling<T> pooling = this->pooling(work, tree, inputs);
    pooling.upward(far);
    const detail::MultipoleWalk<T> walk(tree, inputs, far, heads_.dim, options_.causal);
    const detail::FarField<T> grad_far{detail::take_zero_head_rows<T>(work, tree.rows(), heads_.key_value, heads_.dim),
                                       detail::take_zero_head_rows<T>(work, tree.rows(), heads_.key_value, heads_.dim)};
    const bool pooled_queries = options_.pooled_queries && tree.levels() > 0;
    detail::MultipoleBackward<T>(work, tree, heads_, gradients, grad_far)
        .backward(walk, !pooled_queries, scale(), inputs, grad_out, log_sum_exp, delta, stride);
    if (pooled_queries) {
      detail::PooledQueries<T>(work, tree, heads_, scale(), inputs.query, query_mask(inputs))
          .backward(walk, grad_out, log_sum_exp, delta, stride, grad_far, gradients.query);
    }
    pooling.downward(far, grad_far, gradients, grad_parameters.key, grad_parameters.value);
  }

  detail::FarFieldPooling<T> pooling(detail::Work& work, const detail::Hierarchy& tree, const Inputs<T>& inputs) const {
    return {work, tree, heads_, inputs, options_.pooling, options_.mass_scaling, parameters_.key, parameters_.value};
  }

  Heads heads_;
  Options options_;
  Parameters parameters_;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
