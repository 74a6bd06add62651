#pragma once

#include <nearfar/attention.hpp>
#include <nearfar/context.hpp>
#include <nearfar/mask.hpp>

#include "support/random.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace nearfar::test {

/// Query, key and value that own their memory, with a key mask and offsets where they are not empty. `inputs()` is what
/// attention takes; it lives no longer than the sample.
template <class T>
struct Sample {
  Matrix<T> query;
  Matrix<T> key;
  Matrix<T> value;
  std::vector<std::uint8_t> key_mask = {};
  std::vector<Index> query_offsets = {};
  std::vector<Index> key_offsets = {};

  Inputs<T> inputs() const { return {query, key, value, key_mask, query_offsets, key_offsets}; }
};

/// One sequence of n_q queries and n_k keys (as many as queries unless given), unit variance.
template <class T>
Sample<T> random_sample(const Heads& heads, Index n_q, std::uint64_t seed, std::optional<Index> n_k = {}) {
  Random random(seed);
  return {random.matrix<T>(n_q, heads.query_cols()), random.matrix<T>(n_k.value_or(n_q), heads.key_cols()),
          random.matrix<T>(n_k.value_or(n_q), heads.value_cols())};
}

/// The same sample in another scalar type.
template <class To, class From>
Sample<To> cast(const Sample<From>& from) {
  return {from.query.template cast<To>(),
          from.key.template cast<To>(),
          from.value.template cast<To>(),
          from.key_mask,
          from.query_offsets,
          from.key_offsets};
}

/// The first `n` tokens of a sample whose queries and keys are the same tokens and that has no offsets.
template <class T>
Sample<T> first_tokens(const Sample<T>& sample, Index n) {
  Sample<T> result{sample.query.topRows(n), sample.key.topRows(n), sample.value.topRows(n)};
  if (!sample.key_mask.empty()) result.key_mask.assign(sample.key_mask.begin(), sample.key_mask.begin() + n);
  return result;
}

/// Several sequences end to end, with offsets. If one has a key mask, those that have none see all their keys.
template <class T>
Sample<T> pack(std::span<const Sample<T>> sequences) {
  Index queries = 0, keys = 0;
  bool masked = false;
  Sample<T> result;
  result.query_offsets = result.key_offsets = {0};
  for (const Sample<T>& one : sequences) {
    queries += one.query.rows();
    keys += one.key.rows();
    masked = masked || !one.key_mask.empty();
    result.query_offsets.push_back(queries);
    result.key_offsets.push_back(keys);
  }
  result.query.resize(queries, sequences.front().query.cols());
  result.key.resize(keys, sequences.front().key.cols());
  result.value.resize(keys, sequences.front().value.cols());
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    const Sample<T>& one = sequences[b];
    result.query.middleRows(result.query_offsets[b], one.query.rows()) = one.query;
    result.key.middleRows(result.key_offsets[b], one.key.rows()) = one.key;
    result.value.middleRows(result.key_offsets[b], one.value.rows()) = one.value;
    if (!masked) continue;
    const auto all = std::vector<std::uint8_t>(static_cast<std::size_t>(one.key.rows()), 1);
    const auto& mask = one.key_mask.empty() ? all : one.key_mask;
    result.key_mask.insert(result.key_mask.end(), mask.begin(), mask.end());
  }
  return result;
}

/// The same sample with every key/value head written out once for each query head that reads it.
template <class T>
Sample<T> repeat_key_heads(const Heads& heads, const Sample<T>& sample) {
  Sample<T> result = sample;
  result.key.resize(sample.key.rows(), heads.query * heads.dim);
  result.value.resize(sample.value.rows(), heads.query * heads.value_width());
  for (Index h = 0; h < heads.query; ++h) {
    const Index g = h / heads.group();
    result.key.middleCols(h * heads.dim, heads.dim) = sample.key.middleCols(g * heads.dim, heads.dim);
    result.value.middleCols(h * heads.value_width(), heads.value_width()) =
        sample.value.middleCols(g * heads.value_width(), heads.value_width());
  }
  return result;
}

/// Writes NaN (or another poison) into the key and value rows of masked keys, which must never be read.
template <class T>
void poison_masked_keys(Sample<T>& sample, T poison = std::numeric_limits<T>::quiet_NaN()) {
  for (std::size_t j = 0; j < sample.key_mask.size(); ++j) {
    if (sample.key_mask[j] != 0) continue;
    sample.key.row(static_cast<Index>(j)).setConstant(poison);
    sample.value.row(static_cast<Index>(j)).setConstant(poison);
  }
}

/// A matrix that stands inside a larger one, its rows apart and its first element at an odd address (one scalar past a
/// cache line). What surrounds it is NaN: reading it shows in the results, and writing there shows in `is_intact()`.
template <class T>
class Scattered {
 public:
  explicit Scattered(const Matrix<T>& matrix)
      : rows_(matrix.rows()),
        cols_(matrix.cols()),
        stride_(cols_ + 5),
        memory_(static_cast<std::size_t>(rows_ * stride_ + 32), std::numeric_limits<T>::quiet_NaN()) {
    view().matrix() = matrix;
  }

  Tokens<T> view() {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    const auto to_line = static_cast<Index>((64 - address % 64) % 64 / sizeof(T));
    return {memory_.data() + to_line + 1, rows_, cols_, stride_};
  }

  bool is_intact() {
    const T* begin = view().data();
    for (std::size_t at = 0; at < memory_.size(); ++at) {
      const Index place = memory_.data() + at - begin;
      const bool inside = place >= 0 && place < rows_ * stride_ && place % stride_ < cols_;
      if (!inside && !std::isnan(memory_[at])) return false;
    }
    return true;
  }

 private:
  Index rows_;
  Index cols_;
  Index stride_;
  std::vector<T> memory_;
};

/// The result of forward, in `threads` threads. Out starts as NaN, so that a row left unwritten shows.
template <class A, class T = typename A::Scalar>
Matrix<T> run_forward(const A& attention, const Inputs<T>& inputs, int threads = 1) {
  Matrix<T> out =
      Matrix<T>::Constant(inputs.query.rows(), attention.heads().out_cols(), std::numeric_limits<T>::quiet_NaN());
  Context context(threads);
  attention.forward(inputs, out, context);
  return out;
}

template <class A, class T>
Matrix<T> run_forward(const A& attention, const Sample<T>& sample, int threads = 1) {
  return run_forward<A, T>(attention, sample.inputs(), threads);
}

/// What the backward pass gives.
template <class T, class Parameters>
struct Gradients {
  Matrix<T> out;  ///< of the forward pass that saved
  Matrix<T> query;
  Matrix<T> key;
  Matrix<T> value;
  Parameters parameters;
};

/// Forward with saving, then backward, in `threads` threads. Gradients of inputs start as NaN, because they are
/// written; those of parameters as 0, because they are added to.
template <class A, class T = typename A::Scalar>
Gradients<T, typename A::Parameters> run_backward(const A& attention, const Inputs<T>& inputs,
                                                  const Matrix<T>& grad_out, int threads = 1) {
  const auto unwritten = [](Index rows, Index cols) {
    return Matrix<T>(Matrix<T>::Constant(rows, cols, std::numeric_limits<T>::quiet_NaN()));
  };
  const Heads heads = attention.heads();
  Gradients<T, typename A::Parameters> result{
      unwritten(inputs.query.rows(), heads.out_cols()), unwritten(inputs.query.rows(), heads.query_cols()),
      unwritten(inputs.key.rows(), heads.key_cols()), unwritten(inputs.key.rows(), heads.value_cols()),
      zeros_like(attention.parameters())};
  typename A::Saved saved;
  Context context(threads);
  attention.forward(inputs, result.out, saved, context);
  attention.backward(inputs, result.out, saved, grad_out, {result.query, result.key, result.value}, result.parameters,
                     context);
  return result;
}

template <class A, class T>
Gradients<T, typename A::Parameters> run_backward(const A& attention, const Sample<T>& sample,
                                                  const Matrix<T>& grad_out, int threads = 1) {
  return run_backward<A, T>(attention, sample.inputs(), grad_out, threads);
}

}  // namespace nearfar::test
