#pragma once

// A transformer for any attention: embedding, blocks with layer norm first, and a head.

#include "layers.hpp"

#include <nearfar/attention.hpp>

#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace train {

/// Sequences end to end, and what a model should say of them.
struct Batch {
  std::vector<int> tokens;
  std::vector<Index> offsets = {0};
  std::vector<int> targets;  ///< one a token, or one a sequence for a model that pools

  Index sequences() const { return static_cast<Index>(offsets.size()) - 1; }
  void end_sequence() { offsets.push_back(static_cast<Index>(tokens.size())); }
};

/// y = attention(x W_q + b_q, x W_k + b_k, x W_v + b_v) W_o + b_o. The three projections are one product.
template <nearfar::DifferentiableAttention Attention>
class AttentionLayer {
 public:
  using T = typename Attention::Scalar;

  AttentionLayer(Index width, const Attention& attention, Random& random)
      : attention_(attention),
        grad_attention_(nearfar::zeros_like(std::as_const(attention_).parameters())),
        projection_(width, heads().query_cols() + heads().key_cols() + heads().value_cols(), random),
        output_(heads().out_cols(), width, random),
        attended_(heads().out_cols()),
        grad_projected_(heads().query_cols() + heads().key_cols() + heads().value_cols()) {}

  Tokens<T> forward(Tokens<const T> x, std::span<const Index> offsets,
                    nearfar::Context& context = nearfar::default_context()) {
    const Tokens<const T> projected = projection_.forward(x);
    inputs_ = {.query = query(projected), .key = key(projected), .value = value(projected), .query_offsets = offsets};
    const Tokens<T> attended = attended_.rows(x.rows());
    nearfar::forward(attention_, inputs_, attended, saved_, context);
    return output_.forward(attended);
  }

  Tokens<T> backward(Tokens<const T> grad_y, nearfar::Context& context = nearfar::default_context()) {
    const Tokens<T> grad_attended = output_.backward(grad_y);
    const Tokens<T> grad = grad_projected_.rows(grad_y.rows());
    nearfar::backward(attention_, inputs_, attended_.rows(grad_y.rows()), saved_, grad_attended,
                      {query(grad), key(grad), value(grad)}, grad_attention_, context);
    return projection_.backward(grad);
  }

  template <class Visit>
  void for_each(const std::string& prefix, Visit&& visit) {
    projection_.for_each(prefix + "projection.", visit);
    std::vector<Matrix<T>*> gradients;
    grad_attention_.for_each([&](const std::string&, Matrix<T>& gradient) { gradients.push_back(&gradient); });
    auto gradient = gradients.begin();
    auto&& parameters = attention_.parameters();
    parameters.for_each(
        [&](const std::string& parameter, Matrix<T>& value) { visit(prefix + parameter, value, **gradient++); });
    output_.for_each(prefix + "output.", visit);
  }

 private:
  nearfar::Heads heads() const { return attention_.heads(); }

  template <class Scalar>
  Tokens<Scalar> query(Tokens<Scalar> projected) const {
    return projected.middle_cols(0, heads().query_cols());
  }
  template <class Scalar>
  Tokens<Scalar> key(Tokens<Scalar> projected) const {
    return projected.middle_cols(heads().query_cols(), heads().key_cols());
  }
  template <class Scalar>
  Tokens<Scalar> value(Tokens<Scalar> projected) const {
    return projected.middle_cols(heads().query_cols() + heads().key_cols(), heads().value_cols());
  }

  Attention attention_;
  typename Attention::Parameters grad_attention_;
  typename Attention::Saved saved_;
  nearfar::Inputs<T> inputs_;
  Dense<T> projection_, output_;
  Buffer<T> attended_, grad_projected_;
};

/// y = dropout(gelu(x W_1 + b_1)) W_2 + b_2.
template <class T>
class FeedForward {
 public:
  FeedForward(Index from, Index hidden, Index to, double dropout, Random& random)
      : in_(from, hidden, random), gelu_(hidden), dropout_(hidden, dropout), out_(hidden, to, random) {}

  Tokens<T> forward(Tokens<const T> x, Random* random) {
    return out_.forward(dropout_.forward(gelu_.forward(in_.forward(x)), random));
  }

  Tokens<T> backward(Tokens<const T> grad_y) {
    return in_.backward(gelu_.backward(dropout_.backward(out_.backward(grad_y))));
  }

  template <class Visit>
  void for_each(const std::string& prefix, Visit&& visit) {
    in_.for_each(prefix + "in.", visit);
    out_.for_each(prefix + "out.", visit);
  }

 private:
  Dense<T> in_;
  Gelu<T> gelu_;
  Dropout<T> dropout_;
  Dense<T> out_;
};

/// The transformer block with layer norm first:
///
///   x += dropout(attention(norm(x)))
///   x += dropout(feed_forward(norm(x)))
template <nearfar::DifferentiableAttention Attention>
class Block {
 public:
  using T = typename Attention::Scalar;

  Block(Index width, const Attention& attention, Index feed_forward, double dropout, Random& random)
      : attention_(width, attention, random),
        feed_forward_(width, feed_forward, width, dropout, random),
        norm_1_(width),
        norm_2_(width),
        dropout_1_(width, dropout),
        dropout_2_(width, dropout),
        between_(width),
        y_(width),
        grad_between_(width),
        grad_x_(width) {}

  Tokens<const T> forward(Tokens<const T> x, std::span<const Index> offsets, Random* random,
                          nearfar::Context& context = nearfar::default_context()) {
    const Tokens<T> between = between_.rows(x.rows()), y = y_.rows(x.rows());
    add(x, dropout_1_.forward(attention_.forward(norm_1_.forward(x), offsets, context), random), between);
    add(between, dropout_2_.forward(feed_forward_.forward(norm_2_.forward(between), random), random), y);
    return y;
  }

  Tokens<T> backward(Tokens<const T> grad_y, nearfar::Context& context = nearfar::default_context()) {
    const Tokens<T> grad_between = grad_between_.rows(grad_y.rows()), grad_x = grad_x_.rows(grad_y.rows());
    add(grad_y, norm_2_.backward(feed_forward_.backward(dropout_2_.backward(grad_y))), grad_between);
    add(grad_between, norm_1_.backward(attention_.backward(dropout_1_.backward(grad_between), context)), grad_x);
    return grad_x;
  }

  template <class Visit>
  void for_each(const std::string& prefix, Visit&& visit) {
    norm_1_.for_each(prefix + "norm_1.", visit);
    attention_.for_each(prefix + "attention.", visit);
    norm_2_.for_each(prefix + "norm_2.", visit);
    feed_forward_.for_each(prefix + "feed_forward.", visit);
  }

 private:
  static void add(Tokens<const T> a, Tokens<const T> b, Tokens<T> sum) { sum.matrix() = a.matrix() + b.matrix(); }

  AttentionLayer<Attention> attention_;
  FeedForward<T> feed_forward_;
  LayerNorm<T> norm_1_, norm_2_;
  Dropout<T> dropout_1_, dropout_2_;
  Buffer<T> between_, y_, grad_between_, grad_x_;
};

/// From tokens to logits: a dense layer for every token, or a feed-forward network for the mean of every sequence.
template <class T>
class Head {
 public:
  Head(Index width, Index hidden, Index classes, bool pool, Random& random) : pooling_(width) {
    if (pool) {
      of_sequence_.emplace(width, hidden, classes, 0, random);
    } else {
      of_token_.emplace(width, classes, random);
    }
  }

  Tokens<const T> forward(Tokens<const T> x, std::span<const Index> offsets) {
    return of_token_ ? of_token_->forward(x) : of_sequence_->forward(pooling_.forward(x, offsets), nullptr);
  }

  Tokens<T> backward(Tokens<const T> grad_y) {
    return of_token_ ? of_token_->backward(grad_y) : pooling_.backward(of_sequence_->backward(grad_y));
  }

  template <class Visit>
  void for_each(const std::string& prefix, Visit&& visit) {
    of_token_ ? of_token_->for_each(prefix, visit) : of_sequence_->for_each(prefix, visit);
  }

 private:
  MeanPooling<T> pooling_;
  std::optional<Dense<T>> of_token_;
  std::optional<FeedForward<T>> of_sequence_;
};

struct ModelOptions {
  Index vocabulary = 0;
  Index max_length = 0;
  EmbeddingStart embedding = EmbeddingStart::small;
  Index classes = 0;
  /// One answer a sequence, from the mean of its tokens, instead of one a token.
  bool pool = false;
  Index width = 64;
  Index layers = 2;
  Index feed_forward = 128;
  double dropout = 0.1;
};

/// Embedding, blocks, layer norm and a head: a row of logits for each token, or for each sequence if it pools.
template <nearfar::DifferentiableAttention Attention>
class Model {
 public:
  using T = typename Attention::Scalar;

  /// Every block gets a copy of `attention`, with parameters of its own.
  Model(const ModelOptions& options, const Attention& attention, Random random)
      : embedding_(options.vocabulary, options.max_length, options.width, options.embedding, random),
        dropout_(options.width, options.dropout),
        norm_(options.width),
        head_(options.width, options.feed_forward, options.classes, options.pool, random) {
    blocks_.reserve(static_cast<std::size_t>(options.layers));
    for (Index i = 0; i < options.layers; ++i) {
      blocks_.emplace_back(options.width, attention, options.feed_forward, options.dropout, random);
    }
  }

  // The optimiser holds pointers to the parameters.
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  /// What dropout drops is drawn from `random`; without one nothing is dropped. `batch` must stay as it is until
  /// backward.
  Tokens<const T> forward(const Batch& batch, Random* random, nearfar::Context& context = nearfar::default_context()) {
    Tokens<const T> x = dropout_.forward(embedding_.forward(batch.tokens, batch.offsets), random);
    for (Block<Attention>& block : blocks_) x = block.forward(x, batch.offsets, random, context);
    return head_.forward(norm_.forward(x), batch.offsets);
  }

  void backward(Tokens<const T> grad_logits, nearfar::Context& context = nearfar::default_context()) {
    Tokens<const T> grad = norm_.backward(head_.backward(grad_logits));
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) grad = block->backward(grad, context);
    embedding_.backward(dropout_.backward(grad));
  }

  template <class Visit>
  void for_each(const std::string& prefix, Visit&& visit) {
    embedding_.for_each(prefix + "embedding.", visit);
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      blocks_[i].for_each(prefix + "block_" + std::to_string(i) + ".", visit);
    }
    norm_.for_each(prefix + "norm.", visit);
    head_.for_each(prefix + "head.", visit);
  }

 private:
  Embedding<T> embedding_;
  Dropout<T> dropout_;
  std::vector<Block<Attention>> blocks_;
  LayerNorm<T> norm_;
  Head<T> head_;
};

}  // namespace train
