#pragma once

#include <nearfar/reference/head.hpp>
#include <nearfar/reference/multipole.hpp>

#include <Eigen/QR>

#include <cmath>
#include <functional>
#include <optional>
#include <span>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {

/// The naive form of every mechanism: its definition written down as loops over pairs of tokens, O(n^2) time, memory as
/// it comes. It is what the fast forms are tested against, and what to read first; it is not in nearfar.hpp, and it
/// needs none of them.
///
/// Every function takes the heads, the inputs (key mask, packed sequences and grouped heads included) and the
/// mechanism's terms, and returns out. The inputs must be valid: nothing is checked.
namespace reference {

// ---------------------------------------------------------------------------------------------------------------------
// Softmax and Banded.

/// out_i = sum_j softmax_j(scale * q_i . k_j) v_j over the visible keys of the window.
template <class T>
Matrix<T> banded_head(const Head<T>& head, Window window, std::optional<double> scale) {
  const auto keys = static_cast<std::size_t>(head.key.rows());
  Matrix<T> out(head.query.rows(), head.value.cols());
  for (Index i = 0; i < out.rows(); ++i) {
    std::vector<T> score(keys, T(0)), mass(keys, T(0));
    for (Index j = 0; j < head.key.rows(); ++j) {
      if (!visible(head, window, i, j)) continue;
      score[static_cast<std::size_t>(j)] = scale_or_default(head, scale) * head.query.row(i).dot(head.key.row(j));
      mass[static_cast<std::size_t>(j)] = 1;
    }
    out.row(i) = weighted_sum(softmax_weights(score, mass), head.value);
  }
  return out;
}

template <class T>
Matrix<T> softmax(const Heads& heads, const Inputs<T>& inputs, bool causal = false, std::optional<double> scale = {}) {
  return each_head(heads, inputs,
                   [&](const Head<T>& head) { return banded_head(head, visible_window(causal), scale); });
}

template <class T>
Matrix<T> banded(const Heads& heads, const Inputs<T>& inputs, Window window, bool causal = false,
                 std::optional<double> scale = {}) {
  return each_head(heads, inputs,
                   [&](const Head<T>& head) { return banded_head(head, visible_window(causal, window), scale); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Linear.

template <class T>
struct LinearTerms {
  std::vector<std::function<T(T)>> feature_maps;
  bool normalize_features = false;  ///< divides phi(x) by the sum of its entries
  bool row_sum = true;              ///< normalise by sum_j a_ij + eps; else by sqrt(n_k)
  double eps = 1e-6;
  bool causal = false;
};

/// phi of every entry of every row; if normalised each row over its sum, or 0 where the sum is 0.
template <class T>
Matrix<T> features(const Matrix<T>& rows, const std::function<T(T)>& phi, bool normalize) {
  Matrix<T> result = rows.unaryExpr(phi);
  for (Index i = 0; normalize && i < rows.rows(); ++i) {
    const T sum = result.row(i).sum();
    result.row(i) *= sum == 0 ? T(0) : 1 / sum;
  }
  return result;
}

/// out_i = sum_j a_ij v_j / (sum_j a_ij + eps), or / sqrt(n_k), with a_ij = phi(q_i) . phi(k_j) over the visible keys.
template <class T>
Matrix<T> linear_head(const Head<T>& head, const std::function<T(T)>& phi, const LinearTerms<T>& terms) {
  const Matrix<T> query = features(head.query, phi, terms.normalize_features);
  const Matrix<T> key = features(head.key, phi, terms.normalize_features);
  Matrix<T> out = Matrix<T>::Zero(head.query.rows(), head.value.cols());
  for (Index i = 0; i < out.rows(); ++i) {
    T sum = 0;
    bool sees_any = false;
    for (Index j = 0; j < head.key.rows(); ++j) {
      if (!visible(head, visible_window(terms.causal), i, j)) continue;
      const T a = query.row(i).dot(key.row(j));
      out.row(i) += a * head.value.row(j);
      sum += a;
      sees_any = true;
    }
    if (sees_any)
      out.row(i) /= terms.row_sum ? sum + static_cast<T>(terms.eps) : std::sqrt(static_cast<T>(head.key.rows()));
  }
  return out;
}

/// The sum over the feature maps.
template <class T>
Matrix<T> linear(const Heads& heads, const Inputs<T>& inputs, const LinearTerms<T>& terms) {
  return each_head(heads, inputs, [&](const Head<T>& head) {
    Matrix<T> out = Matrix<T>::Zero(head.query.rows(), head.value.cols());
    for (const auto& phi : terms.feature_maps) out += linear_head(head, phi, terms);
    return out;
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Fmm.

/// The weights are heads.query x value_dim, as they multiply: after the sigmoid, if there is one.
template <class T>
struct FmmTerms {
  Window window;  ///< of the near field; linear.causal hides later keys from it too
  std::optional<double> scale = {};
  LinearTerms<T> linear;
  Matrix<T> near_weight;
  std::vector<Matrix<T>> far_weights;  ///< one a feature map
};

/// out = w_near * banded + sum_r w_far_r * linear_r, feature by feature.
template <class T>
Matrix<T> fmm(const Heads& heads, const Inputs<T>& inputs, const FmmTerms<T>& terms) {
  return each_head(heads, inputs, [&](const Head<T>& head) {
    Matrix<T> out = banded_head(head, visible_window(terms.linear.causal, terms.window), terms.scale);
    out *= terms.near_weight.row(head.index).asDiagonal();
    for (std::size_t r = 0; r < terms.far_weights.size(); ++r) {
      out += linear_head(head, terms.linear.feature_maps[r], terms.linear) *
             terms.far_weights[r].row(head.index).asDiagonal();
    }
    return out;
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Nystrom.

/// The mean over the usable tokens of each of `landmarks` segments; segments without any are left out.
template <class T>
Matrix<T> landmark_means(const Head<T>& head, const Matrix<T>& rows, Index landmarks) {
  const Index n = rows.rows();
  Matrix<T> means(0, rows.cols());
  for (Index t = 0; t < landmarks; ++t) {
    Matrix<T> sum = Matrix<T>::Zero(1, rows.cols());
    Index count = 0;
    for (Index i = t * n / landmarks; i < (t + 1) * n / landmarks; ++i) {
      if (!usable(head, i)) continue;
      sum += rows.row(i);
      ++count;
    }
    if (count == 0) continue;
    means.conservativeResize(means.rows() + 1, Eigen::NoChange);
    means.bottomRows(1) = sum / static_cast<T>(count);
  }
  return means;
}

/// Z_0 = A^T / (|A|_1 |A|_inf), then Z <- 1/4 Z (13 I - A Z (15 I - A Z (7 I - A Z))).
template <class T>
Matrix<T> inverse_iterate(const Matrix<T>& a, Index iterations) {
  const Matrix<T> identity = Matrix<T>::Identity(a.rows(), a.rows());
  Matrix<T> z = a.transpose() / (a.cwiseAbs().colwise().sum().maxCoeff() * a.cwiseAbs().rowwise().sum().maxCoeff());
  for (Index i = 0; i < iterations; ++i) {
    const Matrix<T> p = a * z;
    z = T(0.25) * z * (T(13) * identity - p * (T(15) * identity - p * (T(7) * identity - p)));
  }
  return z;
}

/// out = softmax(Q Kl^T) pinv(softmax(Ql Kl^T)) softmax(Ql K^T) V, the scale inside each softmax. Ql and Kl are the
/// landmarks of queries and keys. With `iterations` so many steps of inverse_iterate take the place of pinv.
template <class T>
Matrix<T> nystrom(const Heads& heads, const Inputs<T>& inputs, Index landmarks, std::optional<double> scale = {},
                  std::optional<Index> iterations = {}) {
  return each_head(heads, inputs, [&](const Head<T>& head) -> Matrix<T> {
    const Matrix<T> query_landmarks = landmark_means(head, head.query, landmarks);
    const Matrix<T> key_landmarks = landmark_means(head, head.key, landmarks);
    if (key_landmarks.rows() == 0) return Matrix<T>::Zero(head.query.rows(), head.value.cols());

    // Each factor is softmax attention; the first two to the identity, which makes their weights the result.
    const auto attend = [&](const Matrix<T>& query, const Matrix<T>& key, const Matrix<T>& value,
                            const std::vector<bool>& keys_usable) {
      return banded_head(Head<T>{head.index, query, key, value, keys_usable}, Window{},
                         double(scale_or_default(head, scale)));
    };
    const Index r = key_landmarks.rows();
    const Matrix<T> identity = Matrix<T>::Identity(r, r);
    const std::vector<bool> all(static_cast<std::size_t>(r), true);
    const Matrix<T> left = attend(head.query, key_landmarks, identity, all);
    const Matrix<T> kernel = attend(query_landmarks, key_landmarks, identity, all);
    const Matrix<T> right = attend(query_landmarks, head.key, head.value, head.usable);
    if (iterations) return left * (inverse_iterate(kernel, *iterations) * right);
    return left * (kernel.completeOrthogonalDecomposition().pseudoInverse() * right);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Additive.

/// Row h of a score weight gives the score of head h from all heads' features; D = heads.query * dim.
template <class T>
struct AdditiveTerms {
  Matrix<T> w_q;  ///< heads.query x D
  Matrix<T> b_q;  ///< 1 x heads.query
  Matrix<T> w_k;  ///< heads.query x D
  Matrix<T> b_k;  ///< 1 x heads.query
  Matrix<T> w_t;  ///< D x D, a row an output feature
  Matrix<T> b_t;  ///< 1 x D
  bool causal = false;
  bool add_query = true;
  std::optional<double> scale = {};
};

/// A head's columns of key or value, once for each query head that reads them.
template <class T>
Matrix<T> repeat_heads(const Heads& heads, Tokens<const T> rows) {
  Matrix<T> result(rows.rows(), heads.query * heads.dim);
  for (Index h = 0; h < heads.query; ++h) {
    result.middleCols(h * heads.dim, heads.dim) = rows.head(h / heads.group(), heads.dim).matrix();
  }
  return result;
}

/// Row t is, head by head, sum_i softmax_i(scale * (x_i . w_h + b_h)) x_i over the usable tokens i (i <= t if causal).
template <class T>
Matrix<T> pooled_tokens(const Heads& heads, const Matrix<T>& x, const Matrix<T>& weight, const Matrix<T>& bias,
                        std::span<const std::uint8_t> mask, const AdditiveTerms<T>& terms) {
  const auto n = static_cast<std::size_t>(x.rows());
  const double scale = terms.scale.value_or(1 / std::sqrt(static_cast<double>(heads.dim)));
  Matrix<T> pooled(x.rows(), x.cols());
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index h = 0; h < heads.query; ++h) {
      std::vector<T> score(n, T(0)), mass(n, T(0));
      for (std::size_t i = 0; i < n; ++i) {
        const auto token = static_cast<Index>(i);
        if ((terms.causal && token > t) || (!mask.empty() && mask[i] == 0)) continue;
        score[i] = static_cast<T>(scale) * (x.row(token).dot(weight.row(h)) + bias(0, h));
        mass[i] = 1;
      }
      const Matrix<T> own_columns = x.middleCols(h * heads.dim, heads.dim);
      pooled.row(t).segment(h * heads.dim, heads.dim) = weighted_sum(softmax_weights(score, mass), own_columns);
    }
  }
  return pooled;
}

/// out_i = W_t (gk_i * v_i) + b_t + q_i, where gk pools p_i = gq_i * k_i and gq pools q_i, all feature by feature.
template <class T>
Matrix<T> additive(const Heads& heads, const Inputs<T>& inputs, const AdditiveTerms<T>& terms) {
  return each_sequence(heads, inputs, [&](const Inputs<T>& one) -> Matrix<T> {
    const Matrix<T> query = one.query.matrix();
    const Matrix<T> key = repeat_heads<T>(heads, one.key);
    const Matrix<T> value = repeat_heads<T>(heads, one.value);
    const Matrix<T> global_query = pooled_tokens(heads, query, terms.w_q, terms.b_q, one.key_mask, terms);
    const Matrix<T> product = global_query.cwiseProduct(key);
    const Matrix<T> global_key = pooled_tokens(heads, product, terms.w_k, terms.b_k, one.key_mask, terms);
    // Where gk has pooled no token it is 0, and the value, which may be that of a masked key, is not read.
    const Matrix<T> u = (global_key.array() == 0).select(T(0), global_key.cwiseProduct(value));
    Matrix<T> out = (u * terms.w_t.transpose()).rowwise() + terms.b_t.row(0);
    if (terms.add_query) out += query;
    return out;
  });
}

}  // namespace reference
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
