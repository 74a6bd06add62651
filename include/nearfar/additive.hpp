#pragma once

#include <nearfar/attention.hpp>
#include <nearfar/detail/checks.hpp>
#include <nearfar/engine/packed_matrix.hpp>
#include <nearfar/engine/softmax_pooling.hpp>
#include <nearfar/mask.hpp>

#include <optional>
#include <string_view>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

struct AdditiveOptions {
  bool causal = false;               ///< the prefix form: token t pools the tokens up to t
  std::optional<double> scale = {};  ///< of the scores; 1 / sqrt(dim) unless given
  bool per_head_weights = false;     ///< a head's score sees its own features (the paper), not all (the authors' code)
  bool bias = true;                  ///< b_q, b_k and b_t exist
  bool transform = true;             ///< w_t and b_t exist; without them out_i = u_i + q_i
  bool add_query = true;             ///< q_i is added to out_i
};

/// What Additive learns, with D = heads.query * dim and D' = dim where weights are per head, else D. What the options
/// switch off is empty.
template <class T>
struct AdditiveParameters {
  Matrix<T> w_q;  ///< heads x D': row h scores the queries for head h
  Matrix<T> w_k;  ///< heads x D': row h scores p = gq * k for head h
  Matrix<T> b_q;  ///< 1 x heads
  Matrix<T> b_k;  ///< 1 x heads
  Matrix<T> w_t;  ///< D x D: row = output feature
  Matrix<T> b_t;  ///< 1 x D

  template <class Visit>
  void for_each(Visit&& visit) {
    visit("w_q", w_q);
    visit("w_k", w_k);
    visit("b_q", b_q);
    visit("b_k", b_k);
    visit("w_t", w_t);
    visit("b_t", b_t);
  }
};

/// Additive attention (Fastformer): one global query and one global key a head, each the softmax-weighted mean of all
/// tokens, take the place of pairwise scores.
///
///   alpha_i[h] = softmax over tokens i of  scale (w_q q_i + b_q)[h]        gq[h] = sum_i alpha_i[h] q_i[h]
///   p_i[h]     = gq[h] * k_i[h]                                            (element by element)
///   beta_i[h]  = softmax over tokens i of  scale (w_k p_i + b_k)[h]        gk[h] = sum_i beta_i[h] p_i[h]
///   u_i[h]     = gk[h] * v_i[h]                                            out_i = w_t u_i + b_t + q_i
///
/// x[h] are the features of head h; query head h reads the key and value head that it shares. Causal: the prefix form,
/// where token t has its own gq and gk, from softmaxes over the tokens i <= t (and p_i keeps the gq of its own token).
/// The published model has no value projection: pass the query's view as value.
///
/// Shapes: query and out n x (query heads * dim), key and value n x (key_value heads * dim); as many keys as queries,
/// values as wide as keys.
/// Time O(n H (heads + 1)) for H = heads.query * dim, and n H^2 for the transform. Memory beside inputs and out:
/// O(H heads) a few dozen times, bidirectional; O(n (heads + H / 128)), causal. A second call of the same shapes
/// allocates nothing.
///
/// The key mask takes tokens out of both softmaxes: their keys are not read, and their queries and values only for
/// their own rows of out, which follow the equation. Where no token is left (causal: none up to t) gk is zero and the
/// value is not read: out_i = b_t + q_i.
///
/// b_q and b_k shift all scores of a head alike, which a softmax over tokens does not see: they are kept because the
/// published model has them, are not read, and their gradient is zero.
///
/// Wu, Wu, Qi and Huang, "Fastformer: additive attention can be all you need", arXiv 2108.09084, equations 3 to 6, and
/// the authors' code. The causal form is nearfar's own.
template <class T>
class Additive {
 public:
  using Scalar = T;
  using Options = AdditiveOptions;
  using Parameters = AdditiveParameters<T>;

  /// What backward needs, O(n heads) numbers.
  struct Saved {
    Matrix<T> query_weights;  ///< alpha, n x padded heads; causal: what token t weighs in its own softmax
    Matrix<T> key_weights;    ///< beta, likewise
    Matrix<T> query_means;    ///< gq of each sequence; causal: at the start of each stretch
    Matrix<T> key_means;      ///< sum_i beta_i k_i of each sequence; causal: gk at the start of each stretch
  };

  /// Starts from w_q = w_k = 0 (every token weighs the same), zero biases and w_t the identity.
  explicit Additive(const Heads& heads, const Options& options = {}) : heads_(heads), options_(options) {
    detail::check_heads(name, heads);
    detail::check_equal_widths(name, heads);
    detail::check_scale(name, options.scale);
    const Index width = heads.query_cols();
    const Index seen = options.per_head_weights ? heads.dim : width;
    parameters_.w_q = Matrix<T>::Zero(heads.query, seen);
    parameters_.w_k = parameters_.w_q;
    if (options.bias) {
      parameters_.b_q = Matrix<T>::Zero(1, heads.query);
      parameters_.b_k = parameters_.b_q;
    }
    if (options.transform) parameters_.w_t = Matrix<T>::Identity(width, width);
    if (options.transform && options.bias) parameters_.b_t = Matrix<T>::Zero(1, width);
  }

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  /// Throws std::invalid_argument where shapes disagree, those of the parameters included.
  void forward(const Inputs<T>& inputs, Tokens<T> out, Context& context = default_context()) const {
    run(inputs, out, nullptr, context);
  }

  void forward(const Inputs<T>& inputs, Tokens<T> out, Saved& saved, Context& context = default_context()) const {
    run(inputs, out, &saved, context);
  }

  /// Writes the gradients of query, key and value, and adds those of the parameters. Where one view serves as query and
  /// value, the gradient of that view is the sum of both. Reads the parameters as forward saw them. Nothing of a masked
  /// token is read where its row of grad_out is zero. Time about three times forward's.
  ///
  /// Throws std::invalid_argument where shapes disagree, those of grad_parameters and of `saved` included.
  void backward(const Inputs<T>& inputs, Tokens<const T> out, const Saved& saved, Tokens<const T> grad_out,
                const InputGradients<T>& grad, Parameters& grad_parameters,
                Context& context = default_context()) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::equal);
    check_parameters(parameters_, "");
    check_gradients(inputs, grad_out, grad, grad_parameters);
    detail::Work work(context);
    Call call = prepare(inputs, work);
    check_saved(call, saved);
    BackwardCall back{saved,
                      grad_out,
                      grad,
                      grad_out,
                      work.take<T>(call.stretches.count() * query_shape().padded() * query_shape().cols()),
                      work.take<T>(call.stretches.count() * query_shape().padded() * query_shape().cols())};
    if (options_.transform) {
      // The gradient of u waits in the rows of grad.query until they are needed.
      const Index width = heads_.query_cols();
      detail::PackedMatrix<T> transform(work, width, width);
      transform.pack(work, [&](Index k, Index c) { return parameters_.w_t(k, c); });
      work.for_each(call.stretches.count(), [&](Index s, Scratch&) {
        const Stretch& stretch = call.stretches[s];
        const Tokens<T> rows = grad.query.middle_rows(stretch.first, stretch.count);
        rows.matrix().setZero();
        transform.multiply_add({grad_out.row(stretch.first), grad_out.stride(), 1}, rows);
      });
      back.grad_u = grad.query;
    }
    options_.causal ? backward_causal(call, back, grad_parameters)
                    : backward_bidirectional(call, back, grad_parameters);
  }

 private:
  static constexpr std::string_view name = "Additive";

  using Pool = detail::SoftmaxPool<T>;
  using Scratch = detail::Scratch;
  using Work = detail::Work;

  /// Tokens of one sequence that one task handles: the fixed division on which no result's order of sums depends but
  /// through the length of the sequence.
  struct Stretch {
    Index sequence;
    Index first;
    Index count;
  };

  struct Stretches {
    const Stretch* of;            // all sequences' stretches, in order
    const Index* sequence_first;  // where those of sequence b begin; one more number than sequences
    Index sequences;

    Index count() const { return sequence_first[sequences]; }
    const Stretch& operator[](Index s) const { return of[s]; }
  };

  /// One call: what its tasks share.
  struct Call {
    const Inputs<T>& inputs;
    Work& work;
    Stretches stretches;
    const T* w_q;  // packed, see pack_weights
    const T* w_k;
    Tokens<T> out = {};
    Saved* saved = nullptr;
    detail::PackedMatrix<T> transform = {};

    bool sees(Index token) const {
      return inputs.key_mask.empty() || inputs.key_mask[static_cast<std::size_t>(token)] != 0;
    }
  };

  static constexpr Index causal_stretch = 128;
  static constexpr Index most_stretches = 64;

  // Rows that lie far apart are read in turn, from as many strands as a score block has rows: memory gives a reader of
  // several streams half as much again as a reader of one.
  static constexpr Index strand = 128;

  // Rows that are transformed together: their u stay in the cache.
  static constexpr Index transform_rows = 128;

  detail::PoolingShape query_shape() const { return {heads_.query, heads_.dim, 1}; }
  detail::PoolingShape key_shape() const { return {heads_.query, heads_.dim, heads_.group()}; }

  void check_parameters(const Parameters& p, std::string_view of) const {
    const Index width = heads_.query_cols();
    const Index seen = options_.per_head_weights ? heads_.dim : width;
    const auto check = [&](std::string_view matrix, const Matrix<T>& m, bool present, Index rows, Index cols) {
      if (!present) rows = cols = 0;
      detail::require(m.rows() == rows && m.cols() == cols, name, of, matrix, " must be ", rows, " x ", cols,
                      ", but is ", m.rows(), " x ", m.cols(), ".");
    };
    check("w_q", p.w_q, true, heads_.query, seen);
    check("w_k", p.w_k, true, heads_.query, seen);
    check("b_q", p.b_q, options_.bias, 1, heads_.query);
    check("b_k", p.b_k, options_.bias, 1, heads_.query);
    check("w_t", p.w_t, options_.transform, width, width);
    check("b_t", p.b_t, options_.transform && options_.bias, 1, width);
  }

  Stretches divide(const Inputs<T>& inputs, Work& work) const {
    const auto length = [&](Index tokens) {
      return options_.causal ? causal_stretch
                             : std::max<Index>(causal_stretch, (tokens + most_stretches - 1) / most_stretches);
    };
    const Index sequences = sequence_count(inputs);
    Index* const first = work.take<Index>(sequences + 1);
    first[0] = 0;
    for (Index b = 0; b < sequences; ++b) {
      const Index tokens = sequence(inputs, b).query_count;
      first[b + 1] = first[b] + (tokens + length(tokens) - 1) / length(tokens);
    }
    Stretch* const stretches = work.take<Stretch>(first[sequences]);
    for (Index b = 0; b < sequences; ++b) {
      const Sequence rows = sequence(inputs, b);
      for (Index s = first[b], i = 0; s < first[b + 1]; ++s, i += length(rows.query_count)) {
        stretches[s] = {b, rows.query_begin + i, std::min(length(rows.query_count), rows.query_count - i)};
      }
    }
    return {stretches, first, sequences};
  }

  /// The weights times scale and log2 e, over all heads' features (per head they are a block diagonal), padded with
  /// zero rows to whole blocks of heads.
  const T* pack_weights(const Matrix<T>& weights, Work& work) const {
    const Index width = heads_.query_cols();
    const T factor = weight_factor();
    T* const packed = work.take<T>(query_shape().padded() * width);
    std::fill_n(packed, query_shape().padded() * width, T(0));
    for (Index h = 0; h < heads_.query; ++h) {
      const Index first = options_.per_head_weights ? h * heads_.dim : 0;
      for (Index c = 0; c < weights.cols(); ++c) packed[h * width + first + c] = factor * weights(h, c);
    }
    return packed;
  }

  T weight_factor() const { return T(detail::scale_or_default(options_.scale, heads_) * detail::log2_e<double>); }

  Call prepare(const Inputs<T>& inputs, Work& work) const {
    return {inputs, work, divide(inputs, work), pack_weights(parameters_.w_q, work),
            pack_weights(parameters_.w_k, work)};
  }

  void run(const Inputs<T>& inputs, Tokens<T> out, Saved* saved, Context& context) const {
    detail::check_inputs<T>(name, heads_, inputs, out, detail::Lengths::equal);
    check_parameters(parameters_, "");
    detail::Work work(context);
    Call call = prepare(inputs, work);
    call.out = out;
    call.saved = saved;
    if (options_.transform) {
      const Index width = heads_.query_cols();
      call.transform = detail::PackedMatrix<T>(work, width, width);
      call.transform.pack(work, [&](Index k, Index c) { return parameters_.w_t(c, k); });
    }
    if (saved != nullptr) {
      const Index means = options_.causal ? call.stretches.count() : call.stretches.sequences;
      for (Matrix<T>* weights : {&saved->query_weights, &saved->key_weights}) {
        weights->setZero(inputs.query.rows(), query_shape().padded());
      }
      saved->query_means.resize(means, heads_.query_cols());
      saved->key_means.resize(means, heads_.query_cols());
    }
    options_.causal ? forward_causal(call) : forward_bidirectional(call);
  }

  // ---- bidirectional
  // -------------------------------------------------------------------------------------------------

  /// With gq the same for all tokens, w_k p_i = (w_k gq) k_i and gk = gq * sum_i beta_i k_i: both poolings read their
  /// rows as they stand, the second with weights into which gq is folded.
  void forward_bidirectional(const Call& call) const {
    const Index width = heads_.query_cols();
    const T* const queries = pool_tokens(
        call, query_shape(), call.inputs.query, [&](Index, Scratch&) { return call.w_q; },
        call.saved ? &call.saved->query_weights : nullptr);
    const auto query_pool = [&](Index b) { return pool_of(queries, query_shape(), b); };
    const T* const keys = pool_tokens(
        call, key_shape(), call.inputs.key,
        [&](Index b, Scratch& scratch) { return fold(call.w_k, query_pool(b).mean, scratch); },
        call.saved ? &call.saved->key_weights : nullptr);
    const auto key_pool = [&](Index b) { return pool_of(keys, key_shape(), b); };

    call.work.for_each(call.stretches.count(), [&](Index s, Scratch& scratch) {
      const Stretch& stretch = call.stretches[s];
      const Pool query = query_pool(stretch.sequence);
      const Pool key = key_pool(stretch.sequence);
      T* const global_key = scratch.take<T>(width);
      for (Index c = 0; c < width; ++c) global_key[c] = query.mean[c] * key.mean[c];
      const bool seen = key.sum[0] != T(0);
      write_rows(call, stretch, scratch, [&](Index) { return seen ? global_key : nullptr; });
      if (call.saved != nullptr) {
        scores_to_weights(call, stretch, query, call.saved->query_weights);
        scores_to_weights(call, stretch, key, call.saved->key_weights);
      }
    });
    if (call.saved != nullptr) {
      for (Index b = 0; b < call.stretches.sequences; ++b) {
        std::copy_n(query_pool(b).mean, width, call.saved->query_means.row(b).data());
        std::copy_n(key_pool(b).mean, width, call.saved->key_means.row(b).data());
      }
    }
  }

  static Pool pool_of(const T* pools, const detail::PoolingShape& shape, Index b) {
    return Pool::at(const_cast<T*>(pools) + b * Pool::size(shape), shape);
  }

  /// The softmax pooling of each sequence's visible rows; `scores`, where given, keeps the scores.
  template <class WeightsOf>
  const T* pool_tokens(const Call& call, const detail::PoolingShape& shape, Tokens<const T> rows,
                       WeightsOf&& weights_of, Matrix<T>* scores) const {
    const Index size = Pool::size(shape);
    const Stretches& stretches = call.stretches;
    T* const parts = call.work.template take<T>(stretches.count() * size);
    T* const pools = call.work.template take<T>(stretches.sequences * size);
    call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
      const Stretch& stretch = stretches[s];
      const Pool part = pool_of(parts, shape, s);
      part.start(shape);
      const T* const weights = weights_of(stretch.sequence, scratch);
      for_each_block(call, stretch, true, detail::row_block * strand, scratch, [&](const Index* token, Index count) {
        const Scratch::Scope scope(scratch);
        T* const score = scratch.take<T>(shape.scores<T>(count));
        detail::pool<T>(shape, weights, {rows, token, count}, score, part, scratch);
        if (scores == nullptr) return;
        for (Index i = 0; i < count; ++i) {
          std::copy_n(score + i * shape.padded(), shape.padded(), scores->row(token[i]).data());
        }
      });
    });
    call.work.for_each(stretches.sequences, [&](Index b, Scratch&) {
      const Pool all = pool_of(pools, shape, b);
      all.start(shape);
      for (Index s = stretches.sequence_first[b]; s < stretches.sequence_first[b + 1]; ++s) {
        all.merge(pool_of(parts, shape, s), shape);
      }
    });
    return pools;
  }

  /// Calls visit(tokens, count) for the tokens of a stretch, `length` at a time, in the order of strands; only the
  /// visible ones, if so asked.
  template <class Visit>
  static void for_each_block(const Call& call, const Stretch& stretch, bool visible_only, Index length,
                             Scratch& scratch, Visit&& visit) {
    Index* const tokens = scratch.take<Index>(length);
    for (Index first = 0; first < stretch.count; first += length) {
      const Index count = std::min(length, stretch.count - first);
      const Index each = (count + detail::row_block - 1) / detail::row_block;
      Index listed = 0;
      for (Index i = 0; i < each; ++i) {
        for (Index j = i; j < count; j += each) {
          const Index token = stretch.first + first + j;
          if (!visible_only || call.sees(token)) tokens[listed++] = token;
        }
      }
      visit(static_cast<const Index*>(tokens), listed);
    }
  }

  /// The weights that score k as w_k scores p = gq * k, summed over the heads that share a key head.
  const T* fold(const T* w_k, const T* global_query, Scratch& scratch) const {
    const detail::PoolingShape shape = key_shape();
    const Index width = shape.width();
    T* const folded = scratch.take<T>(shape.padded() * shape.cols());
    std::fill_n(folded, shape.padded() * shape.cols(), T(0));
    for (Index row = 0; row < shape.heads; ++row) {
      for (Index h = 0; h < shape.heads; ++h) {
        for (Index c = 0; c < shape.dim; ++c) {
          folded[row * shape.cols() + shape.column(h) + c] +=
              w_k[row * width + h * shape.dim + c] * global_query[h * shape.dim + c];
        }
      }
    }
    return folded;
  }

  void scores_to_weights(const Call& call, const Stretch& stretch, const Pool& pool, Matrix<T>& weights) const {
    for (Index i = stretch.first; i < stretch.first + stretch.count; ++i) {
      if (!call.sees(i)) continue;
      for (Index h = 0; h < heads_.query; ++h) {
        weights(i, h) = detail::exp2_of_difference(weights(i, h), pool.max[h]) / pool.sum[h];
      }
    }
  }

  // ---- rows of out
  // ---------------------------------------------------------------------------------------------------

  /// out_i = w_t (gk * v_i) + b_t + q_i for the tokens of a stretch; global_key(i) is null where no token is seen.
  template <class GlobalKey>
  void write_rows(const Call& call, const Stretch& stretch, Scratch& scratch, GlobalKey&& global_key) const {
    const Index width = heads_.query_cols();
    const Inputs<T>& in = call.inputs;
    if (!options_.transform) {
      for_each_block(call, stretch, false, detail::row_block * strand, scratch, [&](const Index* token, Index count) {
        for (Index i = 0; i < count; ++i) {
          const Index later = token[std::min(i + detail::row_block, count - 1)];
          combine(global_key(token[i]), in.value.row(token[i]), options_.add_query ? in.query.row(token[i]) : nullptr,
                  call.out.row(token[i]), in.value.row(later), in.query.row(later));
        }
      });
      return;
    }
    T* const u = scratch.take<T>(transform_rows * width);
    for (Index first = 0; first < stretch.count; first += transform_rows) {
      const Index count = std::min(transform_rows, stretch.count - first);
      for (Index i = 0; i < count; ++i) {
        const Index token = stretch.first + first + i;
        combine(global_key(token), in.value.row(token), nullptr, u + i * width, in.value.row(token),
                in.query.row(token));
        T* const out = call.out.row(token);
        for (Index c = 0; c < width; ++c) {
          out[c] = (options_.bias ? parameters_.b_t(0, c) : T(0)) + (options_.add_query ? in.query(token, c) : T(0));
        }
      }
      call.transform.multiply_add({u, width, 1}, call.out.middle_rows(stretch.first + first, count));
    }
  }

  /// to = gk * v + q, where gk or q may be null (zero); asks for the rows that come later.
  void combine(const T* global_key, const T* value, const T* query, T* to, const T* later_value,
               const T* later_query) const {
    const Index group = heads_.group();
    const Index slices = group == 1 ? 1 : heads_.query;
    const Index length = heads_.query_cols() / slices;
    for (Index s = 0; s < slices; ++s) {
      const Index column = s * length;
      const Index shared = s / group * length;
      detail::for_each_packet<T>(length, [&](auto by, Index c) {
        using P = typename decltype(by)::template Of<T>;
        detail::prefetch_far(later_value + shared + c);
        detail::prefetch_far(later_query + column + c);
        P sum = query == nullptr ? detail::pset1<P>(T(0)) : detail::ploadu<P>(query + column + c);
        if (global_key != nullptr) {
          sum = detail::pmadd(detail::ploadu<P>(global_key + column + c), detail::ploadu<P>(value + shared + c), sum);
        }
        detail::pstoreu(to + column + c, sum);
      });
    }
  }

  // ---- causal
  // --------------------------------------------------------------------------------------------------------

  /// Three rounds over the stretches, each in parallel: the pooled queries of every stretch by itself, from which
  /// follows where each starts; then the same for the keys, whose p need the queries' prefix; then the rows of out.
  void forward_causal(const Call& call) const {
    const detail::PoolingShape shape = query_shape();
    const Stretches& stretches = call.stretches;
    const Index size = Pool::size(shape);
    T* const queries = call.work.template take<T>(stretches.count() * size);
    T* const keys = call.work.template take<T>(stretches.count() * size);
    // What the last stretch of a sequence pools, no other starts from.
    const auto in_rounds = [&](T* pools, auto&& pool_stretch) {
      call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
        const Pool pool = pool_of(pools, shape, s);
        pool.start(shape);
        if (s + 1 < stretches.sequence_first[stretches[s].sequence + 1]) pool_stretch(s, pool, scratch);
      });
      call.work.for_each(stretches.sequences, [&](Index b, Scratch& scratch) {
        start_stretches(pools, stretches.sequence_first[b], stretches.sequence_first[b + 1], scratch);
      });
    };
    in_rounds(queries, [&](Index s, const Pool& pool, Scratch& scratch) {
      Index* const tokens = scratch.take<Index>(causal_stretch);
      const Index count = list_visible(call, stretches[s].first, stretches[s].count, tokens);
      T* const scores = scratch.take<T>(shape.scores<T>(count));
      detail::pool<T>(shape, call.w_q, {call.inputs.query, tokens, count}, scores, pool, scratch);
    });
    in_rounds(keys, [&](Index s, const Pool& pool, Scratch& scratch) {
      walk(call, stretches[s], pool_of(queries, shape, s), pool, false, scratch);
    });
    call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
      const Pool query = pool_of(queries, shape, s);
      const Pool key = pool_of(keys, shape, s);
      if (call.saved != nullptr) {
        std::copy_n(query.mean, shape.width(), call.saved->query_means.row(s).data());
        std::copy_n(key.mean, shape.width(), call.saved->key_means.row(s).data());
      }
      walk(call, stretches[s], query, key, true, scratch);
    });
  }

  /// Turns what each stretch of a sequence pools into what it starts from: the poolings of all before it.
  void start_stretches(T* pools, Index first, Index end, Scratch& scratch) const {
    const detail::PoolingShape shape = query_shape();
    const Pool so_far = Pool::at(scratch.take<T>(Pool::size(shape)), shape);
    const Pool part = Pool::at(scratch.take<T>(Pool::size(shape)), shape);
    so_far.start(shape);
    for (Index s = first; s < end; ++s) {
      const Pool pool = pool_of(pools, shape, s);
      part.copy_from(pool, shape);
      pool.copy_from(so_far, shape);
      so_far.merge(part, shape);
    }
  }

  static Index list_visible(const Call& call, Index first, Index count, Index* tokens) {
    Index listed = 0;
    for (Index i = first; i < first + count; ++i) {
      if (call.sees(i)) tokens[listed++] = i;
    }
    return listed;
  }

  /// Goes through the tokens of a stretch in order, a few at a time, with the prefix form of the queries' pooling. To
  /// write out, the same for p; else p is pooled for what comes after the stretch.
  void walk(const Call& call, const Stretch& stretch, const Pool& query, const Pool& key, bool to_out,
            Scratch& scratch) const {
    constexpr Index tile = detail::pooling_tile;
    const detail::PoolingShape shape = query_shape();
    const Index width = shape.width();
    Index tokens[tile];
    Index rows[tile];
    bool visible[tile];
    T* const weights = scratch.take<T>(shape.scores<T>(tile));
    T* const p = scratch.take<T>(tile * width);
    T* const global_keys = scratch.take<T>(to_out ? stretch.count * width : 0);
    Index unseen = key.sum[0] != T(0) ? 0 : stretch.count;  // tokens of the stretch that see nothing

    for (Index at = 0; at < stretch.count; at += tile) {
      const Index first = stretch.first + at;
      const Index count = std::min(tile, stretch.count - at);
      Index listed = 0;
      for (Index i = 0; i < count; ++i) {
        visible[i] = call.sees(first + i);
        if (!visible[i]) continue;
        unseen = std::min(unseen, at + i);
        tokens[listed] = first + i;
        rows[listed++] = i;
      }
      const auto keep = [&](Matrix<T>& to) {
        for (Index i = 0; i < listed; ++i)
          std::copy_n(weights + i * shape.padded(), shape.padded(), to.row(tokens[i]).data());
      };
      detail::score_rows<T>(shape, call.w_q, {call.inputs.query, tokens, listed}, 0, listed, weights);
      detail::prefix_weights(shape, weights, listed, query, scratch);
      if (to_out && call.saved != nullptr) keep(call.saved->query_weights);
      const Tokens<T> tile_p(p, count, width, width);
      detail::prefix_means<T>(shape, weights, call.inputs.query.middle_rows(first, count), visible, query, tile_p);
      for (Index i = 0; i < listed; ++i) {
        combine(tile_p.row(rows[i]), call.inputs.key.row(tokens[i]), nullptr, tile_p.row(rows[i]),
                call.inputs.key.row(tokens[i]), call.inputs.query.row(tokens[i]));
      }
      const detail::RowList<const T> seen{tile_p, rows, listed};
      if (!to_out) {
        detail::pool<T>(shape, call.w_k, seen, weights, key, scratch);
        continue;
      }
      detail::score_rows<T>(shape, call.w_k, seen, 0, listed, weights);
      detail::prefix_weights(shape, weights, listed, key, scratch);
      if (call.saved != nullptr) keep(call.saved->key_weights);
      detail::prefix_means<T>(shape, weights, tile_p, visible, key, {global_keys + at * width, count, width, width});
    }
    if (to_out) {
      write_rows(call, stretch, scratch, [&](Index token) {
        const Index i = token - stretch.first;
        return i < unseen ? nullptr : global_keys + i * width;
      });
    }
  }

  // ---- backward
  // ------------------------------------------------------------------------------------------------------

  struct BackwardCall {
    const Saved& saved;
    Tokens<const T> grad_out;
    const InputGradients<T>& grad;
    Tokens<const T> grad_u;
    T* grad_w_q;  // of the packed weights: one matrix a stretch, summed up at the end
    T* grad_w_k;  // bidirectional: of the folded weights
  };

  void check_gradients(const Inputs<T>& inputs, Tokens<const T> grad_out, const InputGradients<T>& grad,
                       const Parameters& grad_parameters) const {
    const Index n = inputs.query.rows();
    detail::check_shape(name, "grad_out", grad_out, n, heads_.out_cols(), "query", "its heads");
    detail::check_shape(name, "the gradient of query", grad.query, n, heads_.query_cols(), "query", "its heads");
    detail::check_shape(name, "the gradient of key", grad.key, n, heads_.key_cols(), "key", "its heads");
    detail::check_shape(name, "the gradient of value", grad.value, n, heads_.value_cols(), "key", "its heads");
    check_parameters(grad_parameters, "the gradient of ");
  }

  void check_saved(const Call& call, const Saved& saved) const {
    const Index n = call.inputs.query.rows();
    const Index means = options_.causal ? call.stretches.count() : call.stretches.sequences;
    detail::require(saved.query_weights.rows() == n && saved.query_means.rows() == means, name,
                    "saved must come from forward on the same inputs, but holds ", saved.query_weights.rows(),
                    " tokens and ", saved.query_means.rows(), " means where there are ", n, " and ", means, ".");
  }

  /// Whether the value of a token may be read: not where the token is masked and nothing depends on its row of out.
  bool reads_value(const Call& call, const BackwardCall& back, Index token) const {
    if (call.sees(token)) return true;
    const T* const row = back.grad_out.row(token);
    return std::any_of(row, row + heads_.query_cols(), [](T x) { return x != T(0); });
  }

  /// Of u = gk * v for one token: writes grad_v = gk * grad_u, summed over the heads that share it, and
  /// grad_gk = grad_u * v, added where `add` says so.
  void combine_backward(const T* global_key, const T* value, const T* grad_u, T* grad_value, T* grad_global_key,
                        bool add) const {
    const Index group = heads_.group();
    for (Index g = 0; g < heads_.key_value; ++g) {
      detail::for_each_packet<T>(heads_.dim, [&](auto by, Index c) {
        using P = typename decltype(by)::template Of<T>;
        const P v = detail::ploadu<P>(value + g * heads_.dim + c);
        P sum = detail::pset1<P>(T(0));
        for (Index h = g * group; h < (g + 1) * group; ++h) {
          const Index at = h * heads_.dim + c;
          const P gradient = detail::ploadu<P>(grad_u + at);
          sum = detail::pmadd(gradient, detail::ploadu<P>(global_key + at), sum);
          const P before = add ? detail::ploadu<P>(grad_global_key + at) : detail::pset1<P>(T(0));
          detail::pstoreu(grad_global_key + at, detail::pmadd(gradient, v, before));
        }
        detail::pstoreu(grad_value + g * heads_.dim + c, sum);
      });
    }
  }

  void backward_bidirectional(const Call& call, const BackwardCall& back, Parameters& grad_parameters) const {
    const Index width = heads_.query_cols();
    const Stretches& stretches = call.stretches;
    const auto gq = [&](Index b) { return back.saved.query_means.row(b).data(); };
    const auto mean_key = [&](Index b) { return back.saved.key_means.row(b).data(); };
    T* const global_keys = call.work.template take<T>(stretches.sequences * width);
    T* const parts = call.work.template take<T>(stretches.count() * width);
    T* const grad_mean_keys = call.work.template take<T>(stretches.sequences * width);
    T* const grad_global_queries = call.work.template take<T>(stretches.sequences * width);
    for (Index b = 0; b < stretches.sequences; ++b) {
      for (Index c = 0; c < width; ++c) global_keys[b * width + c] = gq(b)[c] * mean_key(b)[c];
    }

    call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
      const Stretch& stretch = stretches[s];
      T* const grad_global_key = parts + s * width;
      std::fill_n(grad_global_key, width, T(0));
      for_each_block(call, stretch, false, detail::row_block * strand, scratch, [&](const Index* token, Index count) {
        for (Index i = 0; i < count; ++i) {
          T* const grad_value = back.grad.value.row(token[i]);
          if (reads_value(call, back, token[i])) {
            combine_backward(global_keys + stretch.sequence * width, call.inputs.value.row(token[i]),
                             back.grad_u.row(token[i]), grad_value, grad_global_key, true);
          } else {
            std::fill_n(grad_value, heads_.value_cols(), T(0));
          }
        }
      });
    });
    if (options_.transform) {
      transform_backward(call, back, grad_parameters,
                         [&](Index token, const Stretch& stretch, Index first, Index count, T* to) {
                           const bool read = reads_value(call, back, token);
                           const T* const gk = global_keys + stretch.sequence * width;
                           const T* const value = call.inputs.value.row(token);
                           for (Index i = 0; i < count; ++i) {
                             const Index c = first + i;
                             const Index shared = key_shape().column(c / heads_.dim) + c % heads_.dim;
                             to[i] = read ? gk[c] * value[shared] : T(0);
                           }
                         });
    }

    // gk = gq * mean_key passes its gradient on to mean_key at once, and to gq below.
    for (Index b = 0; b < stretches.sequences; ++b) {
      T* const sum = grad_mean_keys + b * width;
      T* const grad_gq = grad_global_queries + b * width;
      std::fill_n(sum, width, T(0));
      for (Index s = stretches.sequence_first[b]; s < stretches.sequence_first[b + 1]; ++s) {
        for (Index c = 0; c < width; ++c) sum[c] += parts[s * width + c];
      }
      for (Index c = 0; c < width; ++c) {
        grad_gq[c] = sum[c] * mean_key(b)[c];
        sum[c] *= gq(b)[c];
      }
    }

    pool_tokens_backward(
        call, key_shape(), call.inputs.key, [&](Index b, Scratch& scratch) { return fold(call.w_k, gq(b), scratch); },
        back.saved.key_weights, back.saved.key_means, grad_mean_keys, {}, back.grad.key, back.grad_w_k);
    fold_backward(call, back, grad_global_queries, grad_parameters);
    pool_tokens_backward(
        call, query_shape(), call.inputs.query, [&](Index, Scratch&) { return call.w_q; }, back.saved.query_weights,
        back.saved.query_means, grad_global_queries, options_.add_query ? back.grad_out : Tokens<const T>{},
        back.grad.query, back.grad_w_q);
    add_weight_gradient(call, back.grad_w_q, grad_parameters.w_q);
  }

  template <class WeightsOf>
  void pool_tokens_backward(const Call& call, const detail::PoolingShape& shape, Tokens<const T> rows,
                            WeightsOf&& weights_of, const Matrix<T>& token_weights, const Matrix<T>& means,
                            const T* grad_means, Tokens<const T> start, Tokens<T> grad_rows, T* grad_weights) const {
    const Index padded = shape.padded();
    call.work.for_each(call.stretches.count(), [&](Index s, Scratch& scratch) {
      const Stretch& stretch = call.stretches[s];
      const T* const grad_mean = grad_means + stretch.sequence * shape.width();
      const T* const weights = weights_of(stretch.sequence, scratch);
      T* const grad_weight = grad_weights + s * padded * shape.cols();
      std::fill_n(grad_weight, padded * shape.cols(), T(0));
      T* const center = scratch.take<T>(padded);
      for (Index h = 0; h < shape.heads; ++h) {
        center[h] =
            detail::dot(means.row(stretch.sequence).data() + h * shape.dim, grad_mean + h * shape.dim, shape.dim);
      }
      T* const weight = scratch.take<T>(detail::row_block * strand * padded);
      for_each_block(call, stretch, true, detail::row_block * strand, scratch, [&](const Index* token, Index count) {
        for (Index i = 0; i < count; ++i) std::copy_n(token_weights.row(token[i]).data(), padded, weight + i * padded);
        detail::pool_backward<T>(shape, weights, {rows, token, count}, weight, center, grad_mean, start, grad_rows,
                                 grad_weight);
      });
      for (Index i = stretch.first; i < stretch.first + stretch.count; ++i) {
        if (call.sees(i)) continue;
        if (start.data() == nullptr) {
          std::fill_n(grad_rows.row(i), shape.cols(), T(0));
        } else {
          std::copy_n(start.row(i), shape.cols(), grad_rows.row(i));
        }
      }
    });
  }

  /// Of the folded weights, folded = sum_(h of a group) w_k[h] gq[h]: adds to grad_gq and to the gradient of w_k.
  void fold_backward(const Call& call, const BackwardCall& back, T* grad_global_queries,
                     Parameters& grad_parameters) const {
    const detail::PoolingShape shape = key_shape();
    const Index width = shape.width();
    const Index size = shape.padded() * shape.cols();
    const Stretches& stretches = call.stretches;
    // Each sequence's sum takes the place of its first stretch's.
    call.work.for_each(stretches.sequences, [&](Index b, Scratch&) {
      const Index first = stretches.sequence_first[b];
      T* const sum = back.grad_w_k + first * size;
      T* const grad_gq = grad_global_queries + b * width;
      if (first == stretches.sequence_first[b + 1]) return;
      for (Index s = first + 1; s < stretches.sequence_first[b + 1]; ++s) {
        for (Index i = 0; i < size; ++i) sum[i] += back.grad_w_k[s * size + i];
      }
      for (Index row = 0; row < shape.heads; ++row) {
        for (Index h = 0; h < shape.heads; ++h) {
          for (Index c = 0; c < shape.dim; ++c) {
            grad_gq[h * shape.dim + c] +=
                call.w_k[row * width + h * shape.dim + c] * sum[row * shape.cols() + shape.column(h) + c];
          }
        }
      }
    });
    call.work.for_each(shape.heads, [&](Index row, Scratch&) {
      for (Index b = 0; b < stretches.sequences; ++b) {
        const Index first = stretches.sequence_first[b];
        if (first == stretches.sequence_first[b + 1]) continue;
        const T* const sum = back.grad_w_k + first * size + row * shape.cols();
        const T* const gq = back.saved.query_means.row(b).data();
        add_row_gradient(row, grad_parameters.w_k,
                         [&](Index h, Index c) { return sum[shape.column(h) + c] * gq[h * shape.dim + c]; });
      }
    });
  }

  /// Adds to row `row` of a score weight's gradient what `gradient(head, feature)` says of the packed weight's.
  template <class Gradient>
  void add_row_gradient(Index row, Matrix<T>& to, Gradient&& gradient) const {
    for (Index h = 0; h < heads_.query; ++h) {
      if (options_.per_head_weights && h != row) continue;
      const Index first = options_.per_head_weights ? 0 : h * heads_.dim;
      for (Index c = 0; c < heads_.dim; ++c) to(row, first + c) += weight_factor() * gradient(h, c);
    }
  }

  void add_weight_gradient(const Call& call, const T* parts, Matrix<T>& to) const {
    const detail::PoolingShape shape = query_shape();
    const Index size = shape.padded() * shape.cols();
    call.work.for_each(shape.heads, [&](Index row, Scratch& scratch) {
      T* const sum = scratch.take<T>(shape.cols());
      std::fill_n(sum, shape.cols(), T(0));
      for (Index s = 0; s < call.stretches.count(); ++s) {
        for (Index c = 0; c < shape.cols(); ++c) sum[c] += parts[s * size + row * shape.cols() + c];
      }
      add_row_gradient(row, to, [&](Index h, Index c) { return sum[h * shape.dim + c]; });
    });
  }

  /// Of out = w_t u + b_t: adds grad_out^T u and the column sums of grad_out. Each task owns some columns of w_t's
  /// gradient and goes through all tokens; write_u(token, stretch, first, count, to) gives columns of a token's u.
  template <class WriteU>
  void transform_backward(const Call& call, const BackwardCall& back, Parameters& grad_parameters,
                          WriteU&& write_u) const {
    constexpr int vectors = detail::PackedMatrix<T>::vectors;
    constexpr Index panel = detail::PackedMatrix<T>::width;
    const Index width = heads_.query_cols();
    const Index columns = columns_of_a_task(width);
    call.work.for_each((width + columns - 1) / columns, [&](Index task, Scratch& scratch) {
      const Index first_column = task * columns;
      const Index mine = std::min(columns, width - first_column);
      const Tokens<T> grad_w_t = Tokens<T>(grad_parameters.w_t).middle_cols(first_column, mine);
      T* const u = scratch.take<T>(transform_rows * columns);
      std::fill_n(u, transform_rows * columns, T(0));
      for (Index s = 0; s < call.stretches.count(); ++s) {
        const Stretch& stretch = call.stretches[s];
        for (Index first = 0; first < stretch.count; first += transform_rows) {
          const Index count = std::min(transform_rows, stretch.count - first);
          const Index token = stretch.first + first;
          for (Index i = 0; i < count; ++i) {
            write_u(token + i, stretch, first_column, mine, u + i * columns);
            if (grad_parameters.b_t.size() == 0) continue;
            for (Index c = 0; c < mine; ++c) {
              grad_parameters.b_t(0, first_column + c) += back.grad_out(token + i, first_column + c);
            }
          }
          for (Index c = 0; c < mine; c += panel) {
            detail::multiply<vectors>(
                detail::Broadcast<T>{back.grad_out.row(token), 1, back.grad_out.stride()}, width, u + c, columns, count,
                [](Index, int) { return detail::pset1<detail::Packet<T>>(T(0)); },
                [&](Index r, int v, const detail::Packet<T>& sum) {
                  const Index at = c + v * detail::lanes<T>;
                  detail::add_numbers(grad_w_t.row(r) + at, mine - at, sum);
                });
          }
        }
      }
    });
  }

  static Index columns_of_a_task(Index width) {
    constexpr Index panel = detail::PackedMatrix<T>::width;
    return std::min(detail::round_up(width, panel), std::max<Index>(panel, 128 / panel * panel));
  }

  // ---- backward, causal
  // ----------------------------------------------------------------------------------------------

  /// Three rounds over the stretches as forward, now from the end: what each stretch's rows leave for the keys before
  /// it; the keys, and what is left for the queries before; the queries. The gradient of gq_t waits in the rows of
  /// grad.query.
  void backward_causal(const Call& call, const BackwardCall& back, Parameters& grad_parameters) const {
    using Suffix = detail::SuffixSums<T>;
    const detail::PoolingShape shape = query_shape();
    const Stretches& stretches = call.stretches;
    const Index size = Suffix::size(shape);
    T* const queries = call.work.template take<T>(stretches.count() * size);
    T* const keys = call.work.template take<T>(stretches.count() * size);
    const auto suffix = [&](T* sums, Index s) { return Suffix::at(sums + s * size, shape); };
    // What the first stretch of a sequence leaves, no other takes.
    const auto is_first = [&](Index s) { return s == stretches.sequence_first[stretches[s].sequence]; };
    const auto finish_round = [&](T* sums) {
      call.work.for_each(stretches.sequences, [&](Index b, Scratch& scratch) {
        const Suffix after = Suffix::at(scratch.take<T>(size), shape);
        const Suffix own = Suffix::at(scratch.take<T>(size), shape);
        after.start(shape);
        for (Index s = stretches.sequence_first[b + 1]; s-- > stretches.sequence_first[b];) {
          std::copy_n(sums + s * size, size, own.scalar);
          std::copy_n(after.scalar, size, sums + s * size);
          own.join(after, shape);
          std::copy_n(own.scalar, size, after.scalar);
        }
      });
    };
    if (options_.transform) {
      const Tokens<T> u(call.work.template take<T>(call.inputs.query.rows() * shape.width()), call.inputs.query.rows(),
                        shape.width(), shape.width());
      call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
        const Recomputed r = recompute(call, back, s, true, scratch);
        for (Index i = 0; i < stretches[s].count; ++i) {
          const Index token = stretches[s].first + i;
          const T* const value = call.inputs.value.row(token);
          combine(reads_value(call, back, token) ? r.key.row(i) : nullptr, value, nullptr, u.row(token), value, value);
        }
      });
      transform_backward(call, back, grad_parameters,
                         [&](Index token, const Stretch&, Index first, Index count, T* to) {
                           std::copy_n(u.row(token) + first, count, to);
                         });
    }
    call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
      const Suffix own = suffix(keys, s);
      own.start(shape);
      if (!is_first(s)) walk_back_keys(call, back, s, own, {}, scratch);
    });
    finish_round(keys);
    call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
      const Suffix own = suffix(queries, s);
      own.start(shape);
      walk_back_keys(call, back, s, suffix(keys, s), own, scratch);
    });
    finish_round(queries);
    call.work.for_each(stretches.count(), [&](Index s, Scratch& scratch) {
      walk_back_queries(call, back, s, suffix(queries, s), scratch);
    });
    add_weight_gradient(call, back.grad_w_q, grad_parameters.w_q);
    add_weight_gradient(call, back.grad_w_k, grad_parameters.w_k);
  }

  /// The prefix means of a stretch again, from what it started with and the weights of its tokens.
  struct Recomputed {
    Index visible_count = 0;
    bool* visible;    // of each token of the stretch
    Tokens<T> query;  // gq_t
    Tokens<T> p;      // gq_t * k_t
    Tokens<T> key;    // gk_t
  };

  Recomputed recompute(const Call& call, const BackwardCall& back, Index s, bool keys, Scratch& scratch) const {
    const detail::PoolingShape shape = query_shape();
    const Index width = shape.width();
    const Index padded = shape.padded();
    const Stretch& stretch = call.stretches[s];
    const auto take_rows = [&](bool wanted) {
      return wanted ? Tokens<T>(scratch.take<T>(stretch.count * width), stretch.count, width, width) : Tokens<T>();
    };
    Recomputed r{0, scratch.take<bool>(stretch.count), take_rows(true), take_rows(keys), take_rows(keys)};
    T* const weights = scratch.take<T>(stretch.count * padded);
    const Pool pool = Pool::at(scratch.take<T>(Pool::size(shape)), shape);
    const auto gather = [&](const Matrix<T>& from, const Matrix<T>& start) {
      T* to = weights;
      for (Index i = 0; i < stretch.count; ++i) {
        if (!r.visible[i]) continue;
        std::copy_n(from.row(stretch.first + i).data(), padded, to);
        to += padded;
      }
      std::copy_n(start.row(s).data(), width, pool.mean);
    };
    for (Index i = 0; i < stretch.count; ++i) r.visible[i] = call.sees(stretch.first + i);
    gather(back.saved.query_weights, back.saved.query_means);
    detail::prefix_means<T>(shape, weights, call.inputs.query.middle_rows(stretch.first, stretch.count), r.visible,
                            pool, r.query);
    if (!keys) return r;
    for (Index i = 0; i < stretch.count; ++i) {
      if (!r.visible[i]) continue;
      const T* const k = call.inputs.key.row(stretch.first + i);
      combine(r.query.row(i), k, nullptr, r.p.row(i), k, k);
    }
    gather(back.saved.key_weights, back.saved.key_means);
    detail::prefix_means<T>(shape, weights, r.p, r.visible, pool, r.key);
    return r;
  }

  /// Goes back through a stretch's keys, `after` being what the rows after it leave. With `queries` it writes the
  /// gradients of value and key, turns the rows of grad.query into the gradient of gq, and takes these into `queries`;
  /// without, it only takes the stretch into `after`.
  void walk_back_keys(const Call& call, const BackwardCall& back, Index s, const detail::SuffixSums<T>& after,
                      const detail::SuffixSums<T>& queries, Scratch& scratch) const {
    constexpr Index tile = detail::pooling_tile;
    const bool write = queries.vector != nullptr;
    const detail::PoolingShape shape = query_shape();
    const Index width = shape.width();
    const Index padded = shape.padded();
    const Stretch& stretch = call.stretches[s];
    const Recomputed r = recompute(call, back, s, true, scratch);
    T* const grad_global_key = scratch.take<T>(width);
    T* const unused = scratch.take<T>(heads_.value_cols());
    const Tokens<T> grad_p(scratch.take<T>(tile * width), tile, width, width);
    T* const grad_scores = scratch.take<T>(tile * padded);
    T* const grad_weights = back.grad_w_k + s * padded * width;
    if (write) std::fill_n(grad_weights, padded * width, T(0));

    for (Index end = stretch.count; end > 0;) {
      const Index first = (end - 1) / tile * tile;
      Index rows[tile];
      Index grad_rows[tile];
      Index listed = 0;
      for (Index i = end; i-- > first;) {
        const Index token = stretch.first + i;
        T* const grad_value = write ? back.grad.value.row(token) : unused;
        if (reads_value(call, back, token)) {
          combine_backward(r.key.row(i), call.inputs.value.row(token), back.grad_u.row(token), grad_value,
                           grad_global_key, false);
        } else {
          std::fill_n(grad_value, heads_.value_cols(), T(0));
          std::fill_n(grad_global_key, width, T(0));
        }
        const T* const weight = r.visible[i] ? back.saved.key_weights.row(token).data() : nullptr;
        const bool wanted = write && r.visible[i];
        detail::prefix_backward_row<T>(shape, r.key.row(i), grad_global_key, weight, wanted ? r.p.row(i) : nullptr,
                                       after, grad_p.row(listed), grad_scores + listed * padded);
        if (!wanted) continue;
        std::fill_n(grad_scores + listed * padded + shape.heads, padded - shape.heads, T(0));
        rows[listed] = i;
        grad_rows[listed] = listed;
        ++listed;
      }
      if (write) {
        detail::score_rows_backward<T>(shape, call.w_k, {r.p, rows, listed}, grad_scores, {grad_p, grad_rows, listed},
                                       grad_weights);
        Index at = 0;
        for (Index i = end; i-- > first;) {
          const Index token = stretch.first + i;
          T* const grad_query = back.grad.query.row(token);
          if (r.visible[i]) {
            combine_backward(r.query.row(i), call.inputs.key.row(token), grad_p.row(at++), back.grad.key.row(token),
                             grad_query, false);
          } else {
            std::fill_n(grad_query, width, T(0));
            std::fill_n(back.grad.key.row(token), heads_.key_cols(), T(0));
          }
          const T* const weight = r.visible[i] ? back.saved.query_weights.row(token).data() : nullptr;
          detail::prefix_backward_row<T>(shape, r.query.row(i), grad_query, weight, nullptr, queries, nullptr, nullptr);
        }
      }
      end = first;
    }
  }

  void walk_back_queries(const Call& call, const BackwardCall& back, Index s, const detail::SuffixSums<T>& after,
                         Scratch& scratch) const {
    constexpr Index tile = detail::pooling_tile;
    const detail::PoolingShape shape = query_shape();
    const Index width = shape.width();
    const Index padded = shape.padded();
    const Stretch& stretch = call.stretches[s];
    const Recomputed r = recompute(call, back, s, false, scratch);
    T* const grad_scores = scratch.take<T>(tile * padded);
    T* const grad_weights = back.grad_w_q + s * padded * width;
    std::fill_n(grad_weights, padded * width, T(0));
    for (Index end = stretch.count; end > 0;) {
      const Index first = (end - 1) / tile * tile;
      Index tokens[tile];
      Index listed = 0;
      for (Index i = end; i-- > first;) {
        const Index token = stretch.first + i;
        T* const grad_query = back.grad.query.row(token);
        const T* const weight = r.visible[i] ? back.saved.query_weights.row(token).data() : nullptr;
        detail::prefix_backward_row<T>(shape, r.query.row(i), grad_query, weight,
                                       r.visible[i] ? call.inputs.query.row(token) : nullptr, after, grad_query,
                                       grad_scores + listed * padded);
        if (!r.visible[i]) continue;
        std::fill_n(grad_scores + listed * padded + shape.heads, padded - shape.heads, T(0));
        tokens[listed++] = token;
      }
      detail::score_rows_backward<T>(shape, call.w_q, {call.inputs.query, tokens, listed}, grad_scores,
                                     {back.grad.query, tokens, listed}, grad_weights);
      for (Index i = first; options_.add_query && i < end; ++i) {
        T* const grad_query = back.grad.query.row(stretch.first + i);
        const T* const grad_out = back.grad_out.row(stretch.first + i);
        for (Index c = 0; c < width; ++c) grad_query[c] += grad_out[c];
      }
      end = first;
    }
  }

  Heads heads_;
  Options options_;
  Parameters parameters_;
};

}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
