#pragma once

#include <nearfar/attention.hpp>
#include <nearfar/mask.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace reference {

/// What one query head reads of one sequence.
template <class T>
struct Head {
  Index index;               ///< which query head it is
  Matrix<T> query;           ///< n_q x dim
  Matrix<T> key;             ///< n_k x dim
  Matrix<T> value;           ///< n_k x value_dim
  std::vector<bool> usable;  ///< false for a masked key
};

/// The result of `attend(inputs)` for each sequence of a packed batch, end to end.
template <class T, class Attend>
Matrix<T> each_sequence(const Heads& heads, const Inputs<T>& inputs, Attend&& attend) {
  Matrix<T> out(inputs.query.rows(), heads.out_cols());
  for (Index b = 0; b < sequence_count(inputs); ++b) {
    const Sequence rows = sequence(inputs, b);
    Inputs<T> one{inputs.query.middle_rows(rows.query_begin, rows.query_count),
                  inputs.key.middle_rows(rows.key_begin, rows.key_count),
                  inputs.value.middle_rows(rows.key_begin, rows.key_count)};
    if (const std::uint8_t* mask = key_mask(inputs, rows)) one.key_mask = {mask, mask + rows.key_count};
    out.middleRows(rows.query_begin, rows.query_count) = attend(one);
  }
  return out;
}

/// The columns of one query head, and those of the key/value head that it reads.
template <class T>
Head<T> take_head(const Heads& heads, const Inputs<T>& inputs, Index h) {
  const Index key_head = h / heads.group();
  Head<T> head{h, inputs.query.head(h, heads.dim).matrix(), inputs.key.head(key_head, heads.dim).matrix(),
               inputs.value.head(key_head, heads.value_width()).matrix(),
               std::vector<bool>(static_cast<std::size_t>(inputs.key.rows()), true)};
  for (std::size_t j = 0; j < inputs.key_mask.size(); ++j) head.usable[j] = inputs.key_mask[j] != 0;
  return head;
}

/// The result of `attend(head)` for each head of each sequence, side by side.
template <class T, class Attend>
Matrix<T> each_head(const Heads& heads, const Inputs<T>& inputs, Attend&& attend) {
  return each_sequence(heads, inputs, [&](const Inputs<T>& one) {
    Matrix<T> out(one.query.rows(), heads.out_cols());
    for (Index h = 0; h < heads.query; ++h) {
      out.middleCols(h * heads.value_width(), heads.value_width()) = attend(take_head(heads, one, h));
    }
    return out;
  });
}

template <class T>
bool usable(const Head<T>& head, Index key) {
  return head.usable[static_cast<std::size_t>(key)];
}

/// Key j is visible to query i iff it is not masked and i' - left <= j <= i' + right, where i' = i + n_k - n_q aligns
/// the queries with the end of the keys.
template <class T>
bool visible(const Head<T>& head, Window window, Index query, Index key) {
  const Index position = query + head.key.rows() - head.query.rows();
  const bool in_window = key - position >= -window.left && key - position <= window.right;
  return in_window && usable(head, key);
}

inline Window visible_window(bool causal, Window window = {}) { return causal ? window.causal() : window; }

template <class T>
T scale_or_default(const Head<T>& head, std::optional<double> scale) {
  return static_cast<T>(scale.value_or(1 / std::sqrt(static_cast<double>(head.key.cols()))));
}

/// The weights m_j e^{s_j} / sum_j m_j e^{s_j}. Where the mass m_j is 0 the score s_j is not read; where nothing has
/// mass, or every score is -infinity, all weights are 0.
template <class T>
std::vector<T> softmax_weights(const std::vector<T>& score, const std::vector<T>& mass) {
  T max = -std::numeric_limits<T>::infinity();
  for (std::size_t j = 0; j < score.size(); ++j) {
    if (mass[j] > 0) max = std::max(max, score[j]);
  }
  std::vector<T> weight(score.size(), T(0));
  if (max == -std::numeric_limits<T>::infinity()) return weight;
  T sum = 0;
  for (std::size_t j = 0; j < score.size(); ++j) {
    if (mass[j] > 0) weight[j] = mass[j] * std::exp(score[j] - max);
    sum += weight[j];
  }
  for (T& w : weight) w /= sum;
  return weight;
}

/// sum_j weight_j rows_j, rows of weight 0 unread.
template <class T>
Matrix<T> weighted_sum(const std::vector<T>& weight, const Matrix<T>& rows) {
  Matrix<T> sum = Matrix<T>::Zero(1, rows.cols());
  for (std::size_t j = 0; j < weight.size(); ++j) {
    if (weight[j] != 0) sum += weight[j] * rows.row(static_cast<Index>(j));
  }
  return sum;
}

}  // namespace reference
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
